"""Which parameters a fine-tuning trains, said by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import nn


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Those of ``names`` that a regular expression matches as a whole, in their order.

    Raises:
        ValueError: an expression that is none, or that matches no name.
    """
    names = list(names)
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise ValueError(f"a pattern must be a regular expression, got {error.pattern!r}: {error}") from error
    for pattern in compiled:
        if not any(map(pattern.fullmatch, names)):
            shown = ", ".join([*names[:3], "...", *names[-3:]] if len(names) > 6 else names)
            raise ValueError(f"the pattern {pattern.pattern!r} matches none of the names {shown}")
    return [name for name in names if any(pattern.fullmatch(name) for pattern in compiled)]


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop training the parameters that ``patterns`` match, and say which; the others stay as they are.

    Args:
        model: the network.
        patterns: regular expressions of whole parameter names, e.g. ``[r"encoder\\..*"]``.

    Raises:
        ValueError: see :func:`matching`.
    """
    parameters = dict(model.named_parameters())
    frozen = matching(parameters, patterns)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def train_only(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Train the parameters that ``patterns`` match and freeze all others; say which are trained.

    Args:
        model: the network.
        patterns: regular expressions of whole parameter names; none freezes all.

    Raises:
        ValueError: see :func:`matching`.
    """
    parameters = dict(model.named_parameters())
    trained = matching(parameters, patterns)
    model.requires_grad_(False)
    for name in trained:
        parameters[name].requires_grad_(True)
    return trained
