"""What becomes of every key of a foreign file, and of every parameter of the network it is for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from medvit.models.reshape import Reshape
from medvit.models.weights import Layout

Noted = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Account:
    """Keys of a file and of a network by what becomes of them. Entries of the last four lists forbid writing.

    Attributes:
        matched: the network's names.
        adapted: the network's names, each with what was done at the user's wish to fit its shape.
        dropped: the file's names, left out on purpose.
        allowed: the network's names that the file lacks, which the user allowed; they keep fresh weights.
        missing: the network's names that the file lacks.
        differs: the network's names, each with both shapes.
        unexplained: the file's names, each with a reason where there is a special one.
        broken: the network's names whose values are not all finite.
        helps: options that would mend some of ``missing`` and ``differs``.
    """

    matched: tuple[str, ...]
    adapted: Noted
    dropped: tuple[str, ...]
    allowed: tuple[str, ...]
    missing: tuple[str, ...]
    differs: Noted
    unexplained: Noted
    broken: tuple[str, ...]
    helps: tuple[str, ...]

    def problem(self) -> str | None:
        """Why nothing may be written, and what would help; None if all is accounted for."""
        lists = (
            (self.missing, "missing"),
            (self.differs, "of another shape"),
            (self.unexplained, "unexplained"),
            (self.broken, "with NaN or infinite values"),
        )
        found = ", ".join(f"{len(names)} {what}" for names, what in lists if names)
        return f"{found}; {' and '.join(self.helps)} would help" if found and self.helps else found or None

    def rows(self) -> list[tuple[str, int, str]]:
        """For people: what, how many, which; those that matched are not named."""
        lists: list[tuple[str, Noted | tuple[str, ...]]] = [
            ("adapted", self.adapted),
            ("dropped on purpose", self.dropped),
            ("missing, allowed", self.allowed),
            ("missing", self.missing),
            ("shape differs", self.differs),
            ("unexplained", self.unexplained),
            ("NaN or infinite", self.broken),
        ]
        always = ("dropped on purpose", "missing", "shape differs", "unexplained")
        shown = [(what, len(names), drawn_together(names)) for what, names in lists if names or what in always]
        return [("matched", len(self.matched), ""), *shown]


def take_stock(
    layout: Layout, state: dict[str, Tensor], network: nn.Module, reshape: Reshape, allow_partial: bool
) -> tuple[Account, dict[str, Tensor]]:
    """Hold a file against a network.

    Args:
        layout: of the file.
        state: the file's tensors.
        network: on any device, the meta device too.
        reshape: what may be done to tensors of another shape.
        allow_partial: the network may lack what the layout lacks by nature.

    Returns:
        The account, and the tensors under the network's names, floating-point ones in its types.
    """
    own = network.state_dict()
    names, dropped, unexplained = _rename(layout, state, own)
    tensors: dict[str, Tensor] = {}
    adapted, differs, broken = [], [], []
    helps: dict[str, None] = {}
    for name, raw in names.items():
        value, target = raw, own[name]
        if raw.is_floating_point() and target.is_floating_point():
            value = raw.to(target.dtype)
        if value.shape != target.shape:
            fitted = reshape.fit(value, name, network)
            value = fitted.value
            helps |= dict.fromkeys(fitted.helps)
            if value.shape == target.shape:
                adapted.append((name, ", ".join(fitted.done)))
        tensors[name] = value.contiguous()
        if not value.isfinite().all():
            broken.append(name)
        elif value.shape != target.shape:
            differs.append((name, f"network {tuple(target.shape)}, file {tuple(raw.shape)}"))
        elif value.dtype != target.dtype:
            differs.append((name, f"network {target.dtype}, file {raw.dtype}"))
    missing = tuple(name for name in own if name not in tensors)
    partial = layout.partial is not None and all(re.fullmatch(layout.partial, name) for name in missing)
    if missing and partial and not allow_partial:
        helps["--allow-partial"] = None
    aside = {*dict(differs), *broken}
    adapted = [(name, note) for name, note in adapted if name not in aside]
    aside |= dict(adapted).keys()
    account = Account(
        matched=tuple(name for name in tensors if name not in aside),
        adapted=tuple(adapted),
        dropped=tuple(dropped),
        allowed=missing if partial and allow_partial else (),
        missing=() if partial and allow_partial else missing,
        differs=tuple(differs),
        unexplained=tuple(unexplained),
        broken=tuple(broken),
        helps=tuple(helps),
    )
    return account, tensors


def _rename(
    layout: Layout, state: dict[str, Tensor], own: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str], list[tuple[str, str]]]:
    """Tensors by the network's names; keys dropped on purpose; keys unexplained, with the reason."""
    names: dict[str, Tensor] = {}
    dropped, unexplained = [], []
    for key, value in layout.prepared(state).items():
        try:
            name = layout.keys.rename(key)
        except KeyError:
            unexplained.append((key, ""))
            continue
        if name is None or (name not in own and layout.is_surplus(name)):
            dropped.append(key)
        elif name not in own:
            unexplained.append((key, "this network has no such part"))
        elif name in names:
            unexplained.append((key, "a second key for the same parameter"))
        else:
            names[name] = value
    return names, dropped, unexplained


def drawn_together(names: Iterable[str | tuple[str, str]], most: int = 8) -> str:
    """Names for people, perhaps with notes; those that differ in their numbers only become one, with the count."""
    groups: dict[tuple[str, str], list[str]] = {}
    for item in names:
        name, note = (item, "") if isinstance(item, str) else item
        groups.setdefault((re.sub(r"\d+", "*", name), note), []).append(name)
    texts = [
        (f"{pattern} ({len(group)})" if len(group) > 1 else group[0]) + (f": {note}" if note else "")
        for (pattern, note), group in groups.items()
    ]
    return "; ".join(texts[:most]) + (f"; and {len(texts) - most} more kinds" if len(texts) > most else "")
