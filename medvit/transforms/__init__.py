"""What MONAI's transforms lack: label maps restored to the source grid. Everything here sits in any MONAI ``Compose``.

Names are loaded on first use, so that importing this package does not import MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvit.transforms.resample import resample_labels
    from medvit.transforms.restore import ArgmaxLabelsd, RestoreLabelsd

__all__ = ["ArgmaxLabelsd", "RestoreLabelsd", "resample_labels"]

_HOMES = {"ArgmaxLabelsd": "restore", "RestoreLabelsd": "restore", "resample_labels": "resample"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
