"""Projection radiographs: one file to a grey image in [0, 1], dark air and bright bone, as a viewer would show it.

A projection has no place in the patient, so none is claimed: no spacing, no orientation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID, ExplicitVRBigEndian

from medvit.data.headers import looks_like_dicom
from medvit.data.lookup import read_table
from medvit.data.pixels import Pixels, decode, quietly
from medvit.data.raster import read_raster, sniff, upright
from medvit.data.storage import HeaderError
from medvit.data.volume import Source
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries, UnsuitableImage

_CLASS = "1.2.840.10008.5.1.4.1.1."
# computed and digital radiography, mammography, intra-oral; angiography and fluoroscopy
_SOP_CLASSES = {_CLASS + tail for tail in ("1", "1.1", "1.1.1", "1.2", "1.2.1", "1.3", "1.3.1", "12.1", "12.2")}
# for secondary captures, as which public data sets were often released
_MODALITIES = ("CR", "DX", "MG", "IO", "PX", "RG", "RF", "XA")


@dataclass(frozen=True)
class Radiograph:
    """A grey projection image.

    Args:
        array: ``(x, y)`` = (column, row), float32 in [0, 1]; 0 is black.
        source: where it came from.
        contrast: what mapped the values to [0, 1]: ``"lut"`` or ``"window"``, the file's own; ``"range"``, its least
            and greatest value; ``"full"``, all that its type can hold (PNG, JPEG, ...).
    """

    array: np.ndarray
    source: Source
    contrast: str


def read_radiograph(path: str | Path, *, voi: bool = True) -> Radiograph:
    """Read one radiograph: DICOM (CR, DX, MG, RF, ... of a single frame), or a grey PNG, JPEG, TIFF, BMP.

    DICOM values go through the modality LUT or rescaling, then through the VOI LUT sequence, else the window (the first
    of several; LINEAR, LINEAR_EXACT or SIGMOID), else linearly from least to greatest. MONOCHROME1, and presentation
    LUT shape INVERSE, are inverted, once. Padding takes no part in any of this and is black. Pictures are turned
    upright as their EXIF orientation says; three equal channels, and an opaque alpha, are grey.

    Args:
        path: the file, known by its content.
        voi: False: from least to greatest value, whatever VOI LUT or window the file has.

    Raises:
        UnreadableFile: not an image, damaged, or with a VOI LUT or window that makes no sense.
        UnreadableSeries: several frames, colours, transparency, or values of another type.
        UnsuitableImage: not a projection radiograph, or blank.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(132)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    if looks_like_dicom(start):
        return _read_dicom(path, voi)
    if sniff(start):
        return _read_raster(path)
    raise UnreadableFile(path, "neither DICOM nor a PNG, JPEG, TIFF or BMP file")


class RadiographReader(ImageReader):  # type: ignore[misc]  # MONAI ships no types
    """MONAI image reader for what :func:`read_radiograph` reads: ``LoadImaged(keys, reader=RadiographReader())``.

    The array is ``(x, y)`` float32 in [0, 1] without a channel (``EnsureChannelFirstd`` adds it), with the axes of
    MONAI's ``PILReader``: networks trained on (row, column) need it transposed. There is no affine. Meta data hold
    MONAI's own keys and ``medvit_kind``, ``medvit_contrast``, ``modality``, ``study_uid``, ``series_uid``.

    Args:
        voi: see :func:`read_radiograph`.
    """

    def __init__(self, voi: bool = True):
        super().__init__()
        self.voi = voi

    def verify_suffix(self, filename: Any) -> bool:
        """True: files are judged by content."""
        return True

    def read(self, data: Any, **kwargs: Any) -> tuple[Path, ...]:
        """The paths; everything else happens in :meth:`get_data`, since MONAI goes on to other readers after errors."""
        return (Path(data),) if isinstance(data, str | Path) else tuple(Path(path) for path in data)

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Array and meta data of the one file; raises as :func:`read_radiograph`."""
        if len(img) != 1:
            raise UnreadableSeries(img[0], "several-files", f"one radiograph is one file, got {len(img)}; load each")
        radiograph = read_radiograph(img[0], voi=self.voi)
        source = radiograph.source
        return radiograph.array, {
            MetaKeys.SPATIAL_SHAPE.value: np.array(radiograph.array.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM.value: "no_channel",
            "filename_or_obj": str(img[0]),
            "medvit_kind": source.kind,
            "medvit_contrast": radiograph.contrast,
            "modality": source.modality,
            "study_uid": source.study_uid,
            "series_uid": source.series_uid,
        }


def _read_dicom(path: Path, voi: bool) -> Radiograph:
    pixels = decode(path)
    modality = _text(pixels.ds, "Modality").upper()
    _check(path, pixels, modality)
    stored, values = pixels.frame(0), pixels.rescaled(0)
    try:
        with quietly():
            shown, contrast = _displayed(path, pixels, stored, values, voi)
    except MedvitError:
        raise
    except Exception as error:  # a corrupt element can raise nearly anything, and its text may quote the header
        reason = f"what says how to display it is damaged ({type(error).__name__}); try voi=False"
        raise UnreadableFile(path, reason) from error
    study, series = (_text(pixels.ds, keyword) for keyword in ("StudyInstanceUID", "SeriesInstanceUID"))
    return Radiograph(
        shown.T.astype(np.float32), Source("dicom", (path,), modality, study, series, path.stem), contrast
    )


def _check(path: Path, pixels: Pixels, modality: str) -> None:
    sop_class = UID(_text(pixels.ds, "SOPClassUID"))
    if sop_class not in _SOP_CLASSES and modality not in _MODALITIES:
        raise UnsuitableImage(
            f"{path}: a projection radiograph is needed ({', '.join(_MODALITIES)}), but this is "
            f"{(sop_class.is_valid and sop_class.name) or 'of no known kind'} of modality "
            f"{modality if modality.isalpha() and len(modality) <= 16 else 'unknown'}"
        )
    if len(pixels.shape) == 4:
        kind = f"this is a colour image ({_text(pixels.ds, 'PhotometricInterpretation')})"
        raise UnreadableSeries(path, "colour", f"grey values are needed, but {kind}")
    if pixels.shape[0] > 1:
        reason = f"a multi-frame object of {pixels.shape[0]} frames; convert it to single-frame files first"
        raise UnreadableSeries(path, "multi-frame", reason)


def _displayed(path: Path, pixels: Pixels, stored: np.ndarray, values: np.ndarray, voi: bool) -> tuple[np.ndarray, str]:
    """Rescaled values (row, column) to [0, 1] as displayed, and by what contrast."""
    ds, padding = pixels.ds, _padding(pixels, stored)
    if voi and ds.get("VOILUTSequence"):
        shown, contrast = _looked_up(path, ds, values), "lut"
    elif voi and _first(ds, "WindowCenter") is not None and _first(ds, "WindowWidth") is not None:
        shown, contrast = _windowed(path, ds, values), "window"
    else:
        image = values[~padding]
        low, high = (image.min(), image.max()) if image.size else (0, 0)
        if low == high:
            raise UnsuitableImage(f"{path}: blank: every pixel has the same value, {low:g}")
        shown, contrast = (values - low) / (high - low), "range"
    shown = np.clip(shown, 0.0, 1.0)
    # Of MONOCHROME1 and INVERSE one demands the other (PS3.3 C.8.11.1), so both together invert once.
    if ds.PhotometricInterpretation == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE":
        shown = 1.0 - shown
    return np.where(padding, 0.0, shown), contrast


def _padding(pixels: Pixels, stored: np.ndarray) -> np.ndarray:
    """True where there is no image: PixelPaddingValue, or the range from there to PixelPaddingRangeLimit."""
    if pixels.padding is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = pixels.stored_value("PixelPaddingRangeLimit")
    low, high = sorted((pixels.padding, pixels.padding if limit is None else limit))
    return (stored >= low) & (stored <= high)


def _windowed(path: Path, ds: Dataset, values: np.ndarray) -> np.ndarray:
    """Values to [0, 1] through the first window (PS3.3 C.11.2.1.2 and C.11.2.1.3), not yet clipped."""
    center, width = _first(ds, "WindowCenter"), _first(ds, "WindowWidth")
    function = str(ds.get("VOILUTFunction") or "LINEAR").upper()
    assert center is not None and width is not None
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise UnreadableFile(path, f"its VOI LUT function is {function!r}, which DICOM does not define; try voi=False")
    if not (width > 0 and np.isfinite(center + width)) or (function == "LINEAR" and width < 1):
        raise UnreadableFile(path, f"its window of centre {center:g} and width {width:g} is none; try voi=False")
    if function == "SIGMOID":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-4 * (values - center) / width)))
    if function == "LINEAR":
        center, width = center - 0.5, width - 1
    if width == 0:
        return np.asarray(values > center, dtype=np.float64)
    return (values - center) / width + 0.5


def _looked_up(path: Path, ds: Dataset, values: np.ndarray) -> np.ndarray:
    """Values to [0, 1], the least and greatest entry, through the first VOI LUT (PS3.3 C.11.2.1.1).

    Not to 0 and 2 ** bits - 1: tables of 12 bits are declared as 16.
    """
    item, little = ds.VOILUTSequence[0], ds.file_meta.TransferSyntaxUID != ExplicitVRBigEndian
    try:
        table = read_table(item.LUTDescriptor, item.LUTData, signed=bool(values.min() < 0), little=little)
    except HeaderError as error:
        raise UnreadableFile(path, f"its VOI LUT {error}; try voi=False") from error
    low, high = float(table.entries.min()), float(table.entries.max())
    if low == high:
        raise UnreadableFile(path, f"its VOI LUT turns every value into {low:g}; try voi=False")
    return (table(values).astype(np.float64) - low) / (high - low)


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    return "" if value is None else str(value).strip()


def _first(ds: Dataset, keyword: str) -> float | None:
    value = ds.get(keyword)
    if isinstance(value, MultiValue):
        value = value[0] if len(value) else None
    return None if value is None or value == "" else float(value)


def _read_raster(path: Path) -> Radiograph:
    volume = read_raster(path)
    with Image.open(path) as image:
        white = 65535 if image.mode.startswith("I") else 255
    pixels = upright(volume.array[:, :, 0], volume.space)
    if pixels.ndim == 3:
        if (pixels != pixels[..., :1]).any():
            raise UnreadableSeries(path, "colour", "grey values are needed, but this is a colour image")
        pixels = pixels[..., 0]
    if pixels.min() == pixels.max():
        raise UnsuitableImage(f"{path}: blank: every pixel has the same value, {pixels.min():g}")
    return Radiograph(pixels / np.float32(white), volume.source, "full")
