"""From files to volumes with a proven place in the patient, and photographs. Importing this does not import MONAI."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medvit.data.any_rank import AnyRankReader as AnyRankReader
    from medvit.data.cases import list_cases as list_cases
    from medvit.data.dicom import read_dicom as read_dicom
    from medvit.data.nifti import read_nifti as read_nifti
    from medvit.data.radiograph import Radiograph as Radiograph
    from medvit.data.radiograph import RadiographReader as RadiographReader
    from medvit.data.radiograph import read_radiograph as read_radiograph
    from medvit.data.raster import read_raster as read_raster
    from medvit.data.reader import VolumeReader as VolumeReader
    from medvit.data.reader import read_volume as read_volume
    from medvit.data.space import Space as Space
    from medvit.data.study import Inventory as Inventory
    from medvit.data.study import Series as Series
    from medvit.data.study import SetAside as SetAside
    from medvit.data.study import discover as discover
    from medvit.data.volume import Source as Source
    from medvit.data.volume import Volume as Volume

_HOMES = {
    "AnyRankReader": "any_rank",
    "Inventory": "study",
    "Series": "study",
    "Radiograph": "radiograph",
    "RadiographReader": "radiograph",
    "SetAside": "study",
    "Source": "volume",
    "Space": "space",
    "Volume": "volume",
    "VolumeReader": "reader",
    "discover": "study",
    "list_cases": "cases",
    "read_dicom": "dicom",
    "read_nifti": "nifti",
    "read_radiograph": "radiograph",
    "read_raster": "raster",
    "read_volume": "reader",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
