"""What MONAI's transforms lack: for pre-training and adaptation, for radiographs, and for the way back to the source.

Everything here sits in any MONAI ``Compose``. Names are loaded on first use, so that importing this package does not
import MONAI.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvit.transforms.crop import MultiCropd, RandResizedCropd
    from medvit.transforms.foreground import ForegroundCropd
    from medvit.transforms.gradient import GradientMagnituded
    from medvit.transforms.hounsfield import HounsfieldWindowsd
    from medvit.transforms.masked import RandPatchMaskd
    from medvit.transforms.photometric import RadiographRanged
    from medvit.transforms.radiograph import ResizeShorterSided, RowsFirstd, rad_dino_preprocessing
    from medvit.transforms.rank import ByRankd
    from medvit.transforms.resample import resample_labels
    from medvit.transforms.respace import Respaced
    from medvit.transforms.restore import ArgmaxLabelsd, RestoreLabelsd

__all__ = [
    "ArgmaxLabelsd",
    "ByRankd",
    "ForegroundCropd",
    "GradientMagnituded",
    "HounsfieldWindowsd",
    "MultiCropd",
    "RadiographRanged",
    "RandPatchMaskd",
    "RandResizedCropd",
    "ResizeShorterSided",
    "Respaced",
    "RestoreLabelsd",
    "RowsFirstd",
    "rad_dino_preprocessing",
    "resample_labels",
]

_HOMES = {
    "ArgmaxLabelsd": "restore",
    "ByRankd": "rank",
    "ForegroundCropd": "foreground",
    "GradientMagnituded": "gradient",
    "HounsfieldWindowsd": "hounsfield",
    "MultiCropd": "crop",
    "RadiographRanged": "photometric",
    "RandPatchMaskd": "masked",
    "RandResizedCropd": "crop",
    "ResizeShorterSided": "radiograph",
    "Respaced": "respace",
    "RestoreLabelsd": "restore",
    "RowsFirstd": "radiograph",
    "rad_dino_preprocessing": "radiograph",
    "resample_labels": "resample",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
