"""Networks by name. Architectures only: trained weights come with a bundle, never alone."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T", bound="Callable[..., Any]")
_MODELS: dict[str, Callable[..., Any]] = {}
# imported on first use, so that `import medvit` stays light
_MODULES = ("medvit.models.swin_unetr",)


def register(name: str) -> Callable[[T], T]:
    """Decorator that makes a class or builder available to :func:`create_model`.

    Raises:
        ValueError: the name is taken.
    """

    def add(builder: T) -> T:
        if name in _MODELS:
            raise ValueError(f"a model named {name!r} is registered already: {_MODELS[name]}")
        _MODELS[name] = builder
        return builder

    return add


def list_models() -> list[str]:
    """Names that :func:`create_model` knows, sorted."""
    for module in _MODULES:
        importlib.import_module(module)
    return sorted(_MODELS)


def create_model(name: str, **arguments: Any) -> nn.Module:
    """Build a network with fresh weights.

    Args:
        name: one of :func:`list_models`.
        **arguments: the network's own constructor arguments, e.g. ``spatial_dims``, ``in_channels``.

    Raises:
        ValueError: an unknown name (the nearest one is suggested), or values the network refuses.
        TypeError: an argument the network does not have.
    """
    names = list_models()
    if name not in names:
        near = get_close_matches(name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {names}"
        raise ValueError(f"no model named {name!r}; {hint}")
    model: nn.Module = _MODELS[name](**arguments)
    return model
