"""What MONAI's transforms lack: label maps restored to the source grid, radiographs as RAD-DINO takes them.

Everything here sits in any MONAI ``Compose``. Names are loaded on first use, so that importing this package does not
import MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvit.transforms.radiograph import ResizeShorterSided, rad_dino_preprocessing
    from medvit.transforms.resample import resample_labels
    from medvit.transforms.restore import ArgmaxLabelsd, RestoreLabelsd

__all__ = ["ArgmaxLabelsd", "ResizeShorterSided", "RestoreLabelsd", "rad_dino_preprocessing", "resample_labels"]

_HOMES = {
    "ArgmaxLabelsd": "restore",
    "ResizeShorterSided": "radiograph",
    "RestoreLabelsd": "restore",
    "rad_dino_preprocessing": "radiograph",
    "resample_labels": "resample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
