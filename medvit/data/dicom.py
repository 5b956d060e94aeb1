"""DICOM: files to series, one series to a volume.

Pixels come from pydicom; grouping and geometry are ours, because readers that assume one regular stack per series
return silently wrong volumes on real folders.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_modality_lut
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medvit.data.headers import Header, NotAnImage, number_of, read_header
from medvit.data.slices import arrange
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries

# GDCM can abort the interpreter on a corrupt JPEG 2000 stream, so the decoders that may run are named, best first.
_PLUGINS = {"1.2.840.10008.1.2.4.9": ("pylibjpeg", "pillow"), "1.2.840.10008.1.2.4.20": ("pylibjpeg",)}
_PACKAGES = {
    "1.2.840.10008.1.2.4.5": "pylibjpeg-libjpeg or python-gdcm",
    "1.2.840.10008.1.2.4.7": "pylibjpeg-libjpeg or python-gdcm",
    "1.2.840.10008.1.2.4.8": "pyjpegls",
    "1.2.840.10008.1.2.4.9": "pylibjpeg and pylibjpeg-openjpeg",
    "1.2.840.10008.1.2.4.20": "pylibjpeg and pylibjpeg-openjpeg",
}


@dataclass(frozen=True)
class Assembly:
    """One series put together from headers: files in slice order and their grid, or the problem that prevents it."""

    files: tuple[Path, ...]
    space: Space | None = None
    problem: MedvitError | None = None
    notes: tuple[str, ...] = ()


def group_series(headers: Iterable[Header]) -> list[list[Header]]:
    """Files that may form one volume together, each group sorted by path; the groups sorted by their first file.

    Grouped by study and series UID, then split by matrix, frame of reference, kind of image, orientation and pixel
    spacing, so that scouts do not mix with the series they were made for. A broken file joins the largest group of its
    series: a slice that is lost must be seen.
    """
    by_uid: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in sorted(headers, key=lambda h: h.path):
        by_uid[header.study_uid, header.series_uid or f"folder {header.path.parent}"].append(header)
    groups: list[list[Header]] = []
    for members in by_uid.values():
        groups += _split(members)
    return sorted(groups, key=lambda group: group[0].path)


def _split(members: Sequence[Header]) -> list[list[Header]]:
    """Split one series UID by what slices of one volume must share."""
    alike: dict[Any, list[list[Header]]] = defaultdict(list)
    loose: list[Header] = []
    for header in members:
        if header.plane is None and header.defect is not None and header.defect[0] in ("truncated", "no-geometry"):
            loose.append(header)
            continue
        kind = header.defect[0] if header.defect else None
        clusters = alike[header.matrix, header.frame_of_reference, header.localizer, header.sop_class, kind]
        for cluster in clusters:
            first = cluster[0].plane
            if header.plane is None or first is None or header.plane.is_like(first):
                cluster.append(header)
                break
        else:
            clusters.append([header])
    groups = [cluster for clusters in alike.values() for cluster in clusters]
    for header in loose:
        homes = [group for group in groups if group[0].matrix == header.matrix]
        if not homes and header.defect and header.defect[0] == "truncated":
            homes = groups
        if homes:
            max(homes, key=len).append(header)
        else:
            groups.append([header])
    return [sorted(group, key=lambda h: h.path) for group in groups]


def assemble(headers: Sequence[Header], series: str, lost: Sequence[Path] = ()) -> Assembly:
    """Put one group of :func:`group_series` together, or say why not.

    Args:
        headers: the group.
        series: what messages call it.
        lost: unreadable files that may be slices of it. With any the series is refused: a gap would be seen, but a
            first or last slice that is missing leaves no trace.
    """
    kept, notes = _without_duplicates(headers)
    files = tuple(header.path for header in kept)
    if lost:
        names = ", ".join(path.name for path in lost[:5]) + (", ..." if len(lost) > 5 else "")
        reason = (
            f"every slice is needed, but of the files beside it {len(lost)} cannot be read ({names}), and may be its "
            "first or last slice; get them again, or move them elsewhere if they are not part of it"
        )
        return Assembly((*files, *lost), None, UnreadableSeries(series, "incomplete", reason), notes)
    broken = [header for header in kept if header.defect]
    if broken:
        code, reason = broken[0].defect or ("", "")
        which = broken[0].path.name if len(broken) == 1 else f"{broken[0].path.name} and {len(broken) - 1} more"
        return Assembly(files, None, UnreadableSeries(series, code, f"{which} of {len(kept)} files: {reason}"), notes)
    planes = [header.plane for header in kept if header.plane]
    try:
        stack = arrange(planes, series, kept[0].thickness)
    except UnreadableSeries as problem:
        return Assembly(files, None, problem, notes)
    shape = (*planes[0].shape, len(planes))
    space = Space.from_affine(shape, stack.affine, kept[0].frame_of_reference)
    return Assembly(tuple(files[n] for n in stack.order), space, None, notes + stack.notes)


def _without_duplicates(headers: Sequence[Header]) -> tuple[list[Header], tuple[str, ...]]:
    """Drop copies of a file: same instance UID, same place and same pixels. Pixels are read for suspects only."""
    suspects: dict[Any, list[Header]] = defaultdict(list)
    for header in headers:
        suspects[header.instance_uid, header.plane and header.plane.position].append(header)
    dropped: dict[Path, None] = {}  # in order, and quick to ask
    for copies in suspects.values():
        if len(copies) > 1 and copies[0].plane:
            seen: set[bytes] = set()
            for header in copies:
                pixels = _stored_bytes(header.path)
                if pixels is not None and pixels in seen:
                    dropped[header.path] = None
                elif pixels is not None:
                    seen.add(pixels)
    if not dropped:
        return list(headers), ()
    example = next(iter(dropped)).name + (", ..." if len(dropped) > 1 else "")
    note = f"duplicates of other files ignored: {len(dropped)} ({example})"
    return [header for header in headers if header.path not in dropped], (note,)


def _stored_bytes(path: Path) -> bytes | None:
    """Digest of the stored pixels and of what scales them, None if they cannot be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(path, force=True)
        scale = f"{ds.get('RescaleSlope')} {ds.get('RescaleIntercept')}"
        return hashlib.sha256(scale.encode() + ds.PixelData).digest()
    except Exception:  # a corrupt file is no proven duplicate; reading its pixels will say what is wrong
        return None


def read_dicom(files: Iterable[str | Path], name: str = "") -> Volume:
    """Read the files of one series, in any order, into one volume.

    Args:
        files: every file of the series; copies are dropped with a note.
        name: stem for outputs, and what messages call the series; default: its folder.

    Returns:
        Volume with array ``(column i, row j, slice k)``; ``k`` runs along cross(row direction, column direction).
        Stored values times RescaleSlope plus RescaleIntercept, slice by slice (or through the modality look-up table),
        float32. MONOCHROME1 is not inverted: that is a wish about display, and these values are measurements.
        Padding is kept.

    Raises:
        UnreadableFile: a file that is no DICOM image, or whose pixels cannot be decoded.
        UnreadableSeries: files of several series, unreadable files among them, or a geometry that is not one regular 3D
            grid.
    """
    headers: list[Header] = []
    unreadable: list[UnreadableFile] = []
    for file in dict.fromkeys(Path(file) for file in files):
        try:
            headers.append(read_header(file))
        except NotAnImage:
            raise
        except UnreadableFile as error:
            unreadable.append(error)
    if unreadable and not headers:
        raise unreadable[0]
    if not headers:
        raise UnreadableSeries(name or "DICOM series", "no-files", "at least one file is needed")
    label = name or str(headers[0].path.parent if len(headers) > 1 else headers[0].path)
    groups = group_series(headers)
    if len(groups) > 1:
        found = "; ".join(f"{len(group)} files of {describe(group[0])}" for group in groups[:5])
        reason = f"the files of one series are needed, but these make {len(groups)}: {found}; give one of them"
        raise UnreadableSeries(label, "several-series", reason)
    assembly = assemble(groups[0], label, [error.path for error in unreadable])
    if assembly.problem is not None or assembly.space is None:
        raise assembly.problem or AssertionError("an assembly has a space or a problem")
    array = np.empty(assembly.space.shape[::-1], dtype=np.float32)
    for k, file in enumerate(assembly.files):
        array[k] = read_pixels(file, array.shape[1:])[2]
    first = headers[0]
    source = Source("dicom", assembly.files, first.modality, first.study_uid, first.series_uid, name)
    return Volume(array.transpose(2, 1, 0), assembly.space, source, assembly.notes)


def describe(header: Header) -> str:
    """A series in a few words, e.g. ``series 3 "T1 test" (MR, 64 x 64)``."""
    number = "series" if header.series_number is None else f"series {header.series_number}"
    description = f' "{header.description}"' if header.description else ""
    return f"{number}{description} ({header.modality or 'no modality'}, {header.matrix[1]} x {header.matrix[0]})"


def read_pixels(path: Path, shape: tuple[int, ...]) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """One image file: its data set, its stored values and these rescaled, both (row, column).

    Raises:
        UnreadableFile: pixels that cannot be decoded, or are not of ``shape``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ds = pydicom.dcmread(path, force=True)
            if "TransferSyntaxUID" not in ds.file_meta:  # no meta header: pydicom has just found the encoding out
                implicit, little = ds.original_encoding
                syntax = (
                    ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
                )
                ds.file_meta.TransferSyntaxUID = syntax
            stored = _decode(path, ds)
            if "ModalityLUTSequence" in ds:
                values = apply_modality_lut(stored, ds)
            else:
                slope, intercept = (number_of(ds, k, d) for k, d in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)))
                values = stored.astype(np.float64) * slope + intercept
        except MedvitError:
            raise
        except Exception as error:  # decoders raise what they like on corrupt streams
            detail = " ".join(str(error).split())[:300]
            raise UnreadableFile(path, f"its pixels cannot be read ({type(error).__name__}: {detail})") from error
    if values.shape != shape:
        raise UnreadableFile(path, f"its pixels decode to shape {values.shape}, but its header and series need {shape}")
    return ds, stored, values


def _decode(path: Path, ds: Dataset) -> np.ndarray:
    """Stored values (row, column), with rubbish above BitsStored masked."""
    syntax = ds.file_meta.TransferSyntaxUID
    if syntax.is_private:
        raise UnreadableFile(path, f"its pixels have the private transfer syntax {syntax}; export it uncompressed")
    if not syntax.is_compressed:
        return np.asarray(ds.pixel_array)
    try:
        available = get_decoder(syntax).available_plugins
    except NotImplementedError:
        available = ()
    named = next((names for prefix, names in _PLUGINS.items() if syntax.startswith(prefix)), available)
    plugins = [plugin for plugin in named if plugin in available]
    if not plugins:
        package = next((names for prefix, names in _PACKAGES.items() if syntax.startswith(prefix)), "")
        remedy = f"install {package}, or export it uncompressed" if package else "export it uncompressed"
        raise UnreadableFile(
            path, f"its pixels are compressed as {syntax.name}, which nothing installed decodes; {remedy}"
        )
    try:
        ds.pixel_array_options(decoding_plugin=plugins[0])
        return np.asarray(ds.pixel_array)
    except Exception as error:
        detail = " ".join(str(error).split())[:300]
        raise UnreadableFile(
            path, f"its {syntax.name} pixels cannot be decoded: {detail}; get the file again"
        ) from error
