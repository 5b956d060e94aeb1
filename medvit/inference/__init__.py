"""Networks over whole images: the sliding window (a MONAI inferer) and what follows it. A network is any callable.

Names are loaded on first use, so that importing this package does not import MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvit.inference.sliding import SlidingWindow, WindowPlan

__all__ = ["SlidingWindow", "WindowPlan"]

_HOMES = {"SlidingWindow": "sliding", "WindowPlan": "sliding"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
