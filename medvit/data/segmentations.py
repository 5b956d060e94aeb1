"""DICOM SEG and RTSTRUCT in: segmentations of any maker as a label map on the grid of an image.

Voxels are found by where they are in the patient, never by their order in the file, and what does not lie on the grid
asked for is refused: nothing is resampled. A label map holds one structure per voxel; of a file whose structures
overlap they are read in several goes, by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom import Dataset

from medvit.data.contours import fill
from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.pixels import decode
from medvit.data.space import LPS_TO_RAS, Space
from medvit.data.volume import Source, Volume
from medvit.errors import MedvitError, SpaceMismatch, UnreadableFile

_SEG = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7")
_RTSTRUCT = ("1.2.840.10008.5.1.4.1.1.481.3",)
_NEAR = 0.1  # voxels: farther from a voxel centre is another grid; rounding of decimal strings is far below
_ANATOMY, _TISSUE = Code("91723000", "SCT", "Anatomical Structure"), Code("85756007", "SCT", "Tissue")
_COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167))


def read_dicom_seg(
    path: str | Path,
    like: Volume | Space | None = None,
    *,
    segments: Collection[str | int] | None = None,
    threshold: float = 0.5,
) -> LabelMap:
    """Read a DICOM Segmentation (BINARY, FRACTIONAL or LABELMAP).

    Args:
        path: the file.
        like: the image it belongs to, or its grid: the result lies on it. None: on the grid of the file's own frames,
            where slices that were left out as empty are filled in.
        segments: names or numbers of the segments to read, the others are left out; None: all. Needed where segments
            overlap.
        threshold: of a FRACTIONAL segmentation, the fraction from which a voxel belongs to a segment; over 0, up to 1.

    Returns:
        Label map with the segments' numbers as labels. Its source is that of ``like`` if this is a volume.

    Raises:
        UnreadableFile: no DICOM Segmentation, damaged, or segments that overlap or are not there.
        SpaceMismatch: it does not lie on the grid of ``like``, or in another frame of reference.
        ValueError: a ``threshold`` out of range.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be over 0 and up to 1, got {threshold}")
    path = Path(path)
    ds = _read(path, _SEG, "a DICOM Segmentation")
    with _parsing(path):
        structures = _chosen(path, [s for s in map(_segment, ds.SegmentSequence) if s.label], segments)
        frames = _frames(ds)
        scale = threshold * int(ds.get("MaximumFractionalValue") or 1)
        space = _own_space(path, ds, frames) if like is None else like if isinstance(like, Space) else like.space
        _same_frame_of_reference(path, ds.get("FrameOfReferenceUID"), space)
        canvas = _Canvas(path, space, structures)
        wanted = {s.label for s in structures}
        for number, (frame, values) in enumerate(zip(frames, stored_frames(path), strict=True), 1):
            where = _lattice(path, frame, values.shape, space, number)
            labels = values if frame.segment is None else np.where(values >= scale, frame.segment, 0)
            for label in np.unique(labels):
                if label in wanted:
                    rows, columns = np.nonzero(labels == label)
                    canvas.paint(int(label), where(columns, rows), f"frame {number}")
        return canvas.label_map(like, _referenced(ds))


def read_rtstruct(
    path: str | Path, like: Volume | Space, *, structures: Collection[str | int] | None = None
) -> LabelMap:
    """Read the contours of a DICOM RT Structure Set as voxels.

    A voxel belongs to a structure if its centre lies inside its contours: inside one of them, and not inside another
    that lies wholly within that one, which is a hole (and so on inwards). Keyholes are read as they are meant.

    Args:
        path: the file.
        like: the image it belongs to, or its grid; contours must lie on its slices.
        structures: names or ROI numbers of the structures to read; None: all. Needed where structures overlap.

    Returns:
        Label map with labels 1..n in the order of the structures read; notes tell of points, open lines and contours
        too small to hold a voxel centre, which have no voxels. Its source is that of ``like`` if this is a volume.

    Raises:
        UnreadableFile: no RT Structure Set, damaged, or structures that overlap or are not there.
        SpaceMismatch: contours that do not lie on the slices of ``like``, or in another frame of reference.
    """
    path = Path(path)
    ds = _read(path, _RTSTRUCT, "a DICOM RT Structure Set")
    with _parsing(path):
        rois = {int(roi.ROINumber): roi for roi in ds.StructureSetROISequence}
        drawn = {int(item.ReferencedROINumber): item for item in ds.get("ROIContourSequence") or ()}
        codes = {int(item.ReferencedROINumber): item for item in ds.get("RTROIObservationsSequence") or ()}
        known = [_roi(n, number, roi, drawn, codes) for n, (number, roi) in enumerate(rois.items())]
        chosen = _chosen(path, known, structures)
        space = like if isinstance(like, Space) else like.space
        labelled = [replace(s, label=n) for n, s in enumerate(chosen, 1)]
        canvas = _Canvas(path, space, labelled)
        for ours, theirs in zip(labelled, chosen, strict=True):
            roi = rois[theirs.label]
            _same_frame_of_reference(path, roi.get("ReferencedFrameOfReferenceUID"), space)
            contours = _contours(path, drawn.get(theirs.label), space, canvas.notes, ours.name)
            for (axis, k), polygons in contours.items():
                shape = [n for other, n in enumerate(space.shape) if other != axis]
                mask, notes = fill([p for p, _ in polygons], shape, any(xor for _, xor in polygons))
                canvas.notes.update(dict.fromkeys(f'structure "{ours.name}", slice {k}: {note}' for note in notes))
                canvas.paint(ours.label, np.insert(np.argwhere(mask), axis, k, axis=1), f"slice {k}")
        return canvas.label_map(like, _referenced_by_rtstruct(ds))


def stored_frames(path: Path) -> Iterator[np.ndarray]:
    """Frames of a SEG as stored, ``(row, column)`` each, one in memory at a time.

    Raises:
        UnreadableFile: pixels that cannot be decoded.
    """
    pixels = decode(path)
    count, rows, columns = pixels.shape
    if pixels.ds.BitsAllocated > 1:
        yield from (pixels.frame(number) for number in range(count))
        return
    packed = np.frombuffer(pydicom.dcmread(path).PixelData, np.uint8)  # frames need not begin on a whole byte
    size = rows * columns
    for start in range(0, count * size, size):
        bits = np.unpackbits(packed[start // 8 : -(-(start + size) // 8)], bitorder="little")
        yield bits[start % 8 : start % 8 + size].reshape(rows, columns)


@dataclass
class _Canvas:
    """A label map being painted; two structures on one voxel are counted, and refused in the end."""

    path: Path
    space: Space
    structures: Sequence[Structure]
    notes: dict[str, None] = field(default_factory=dict)  # in order, each once

    def __post_init__(self) -> None:
        largest = max((s.label for s in self.structures), default=0)
        self.array = np.zeros(self.space.shape, np.uint8 if largest < 256 else np.uint16)
        self._overlaps: dict[tuple[int, int], int] = {}

    def paint(self, label: int, voxels: np.ndarray, where: str) -> None:
        """Give ``voxels`` (n, 3) to ``label``."""
        if len(voxels) and (voxels.min() < 0 or (voxels.max(0) >= self.space.shape).any()):
            raise SpaceMismatch(
                f"{self.path}: {where} has voxels beyond the grid of {' x '.join(map(str, self.space.shape))} voxels "
                "that it was to be read on; give the image that it belongs to"
            )
        index = tuple(voxels.T)
        before = self.array[index]
        for other in np.unique(before[(before != 0) & (before != label)]).tolist():
            pair = min(other, label), max(other, label)
            self._overlaps[pair] = self._overlaps.get(pair, 0) + int(np.count_nonzero(before == other))
        self.array[index] = label

    def label_map(self, like: Volume | Space | None, uids: tuple[str, str]) -> LabelMap:
        if self._overlaps:
            names = {s.label: s.name for s in self.structures}
            pairs = [f'"{names[a]}" and "{names[b]}" in {n} voxels' for (a, b), n in self._overlaps.items()]
            more = f" and {len(pairs) - 3} more pairs" if len(pairs) > 3 else ""
            raise UnreadableFile(
                self.path,
                f"structures of one label map must not overlap, but these do: {', '.join(pairs[:3])}{more}; "
                "read them one after the other, by name",
            )
        own = Source("dicom-segmentation", (self.path,), "", *uids)
        source = like.source if isinstance(like, Volume) else own
        return LabelMap(self.array, self.space, source, tuple(self.structures), tuple(self.notes))


@dataclass(frozen=True)
class _Frame:
    """One frame of a SEG: its segment (None: a label map's), and its place in LPS mm (None: it has none)."""

    segment: int | None
    position: np.ndarray | None
    steps: np.ndarray  # (3, 2): mm for one column, for one row
    between: float  # mm between slices, 0 where not said
    thickness: float  # mm, 0 where not said

    @property
    def normal(self) -> np.ndarray:
        normal = np.cross(*self.steps.T)
        return np.asarray(normal / np.linalg.norm(normal))


def _read(path: Path, classes: Sequence[str], what: str) -> Dataset:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(path, stop_before_pixels=True)
            found = str(ds.get("SOPClassUID", ""))
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # a damaged header raises whatever the parser trips over, and may quote it
        raise UnreadableFile(path, f"not a readable DICOM file ({type(error).__name__}); get it again") from error
    if found not in classes:
        kind = pydicom.uid.UID(found).name if pydicom.uid.UID(found).is_valid else "DICOM without a SOP class"
        raise UnreadableFile(path, f"{what} is needed, but this is: {kind}")
    return ds


@contextmanager
def _parsing(path: Path) -> Iterator[None]:
    """Errors of a damaged file as ours, not quoting it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except MedvitError:
        raise
    except Exception as error:
        raise UnreadableFile(path, f"damaged or not of the standard ({type(error).__name__}); get it again") from error


def _chosen(path: Path, known: Sequence[Structure], wanted: Collection[str | int] | None) -> list[Structure]:
    if wanted is None:
        return list(known)
    if absent := [w for w in wanted if not any(w in (s.name, s.label) for s in known)]:
        listed = ", ".join(f'{s.label} "{s.name}"' for s in known[:20])
        raise UnreadableFile(path, f"{absent} are to be read, but the structures in it are {listed}")
    return [s for s in known if s.label in wanted or s.name in wanted]


def _segment(item: Dataset) -> Structure:
    number = int(item.SegmentNumber)
    types = item.get("SegmentedPropertyTypeCodeSequence")
    modifiers = types[0].get("SegmentedPropertyTypeModifierCodeSequence") if types else None
    lab = item.get("RecommendedDisplayCIELabValue")
    return Structure(
        number,
        str(item.get("SegmentLabel") or f"segment {number}"),
        _code(item.get("SegmentedPropertyCategoryCodeSequence"), _ANATOMY),
        _code(types, _TISSUE),
        _srgb(lab) if lab is not None and len(lab) == 3 else _COLORS[number % len(_COLORS)],
        _code(modifiers, _TISSUE) if modifiers else None,
    )


def _roi(
    place: int, number: int, roi: Dataset, drawn: Mapping[int, Dataset], observed: Mapping[int, Dataset]
) -> Structure:
    """A structure with the ROI's number as its label."""
    color = drawn[number].get("ROIDisplayColor") if number in drawn else None
    codes = observed[number].get("RTROIIdentificationCodeSequence") if number in observed else None
    return Structure(
        number,
        str(roi.get("ROIName") or f"ROI {number}"),
        _ANATOMY,
        _code(codes, _TISSUE),
        (int(color[0]), int(color[1]), int(color[2])) if color else _COLORS[place % len(_COLORS)],
    )


def _code(sequence: Any, default: Code) -> Code:
    if not sequence:
        return default
    item = sequence[0]
    value = item.get("CodeValue") or item.get("LongCodeValue") or item.get("URNCodeValue") or default.value
    return Code(
        str(value),
        str(item.get("CodingSchemeDesignator") or default.scheme),
        str(item.get("CodeMeaning") or default.meaning),
    )


def _srgb(lab: Sequence[int]) -> tuple[int, int, int]:
    """DICOM's 16-bit CIELab as sRGB 0..255."""
    from highdicom.color import CIELabColor

    red, green, blue = CIELabColor.from_dicom_value(tuple(int(v) for v in lab)).to_rgb()
    return int(red), int(green), int(blue)


def _frames(ds: Dataset) -> list[_Frame]:
    shared = (ds.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    return [_frame(ds, item, shared) for item in ds.PerFrameFunctionalGroupsSequence]


def _frame(ds: Dataset, own: Dataset, shared: Dataset) -> _Frame:
    def group(keyword: str) -> Dataset:
        found = own.get(keyword) or shared.get(keyword)
        return found[0] if found else Dataset()

    measures = group("PixelMeasuresSequence")
    position = group("PlanePositionSequence").get("ImagePositionPatient")
    orientation = group("PlaneOrientationSequence").get("ImageOrientationPatient") or (1, 0, 0, 0, 1, 0)
    row, column = map(float, measures.get("PixelSpacing") or (1, 1))
    labelmap = ds.SegmentationType == "LABELMAP"
    return _Frame(
        None if labelmap else int(group("SegmentIdentificationSequence").ReferencedSegmentNumber),
        np.array(position, float) if position else None,
        np.reshape(orientation, (2, 3)).astype(float).T * (column, row),
        abs(float(measures.get("SpacingBetweenSlices") or 0)),
        float(measures.get("SliceThickness") or 0),
    )


def _own_space(path: Path, ds: Dataset, frames: Sequence[_Frame]) -> Space:
    """The grid of the frames, slices between them that were left out filled in."""
    first, shape = frames[0], (ds.Columns, ds.Rows)
    if first.position is None:
        return Space.from_affine((*shape, 1), np.eye(4), None, "px")
    positions = np.array([frame.position for frame in frames], float)
    heights = (positions - first.position) @ first.normal
    low, high = int(heights.argmin()), int(heights.argmax())
    heights = heights - heights[low]
    steps = np.diff(np.sort(heights))
    steps = steps[steps > 1e-2]  # frames of several segments share a plane, up to rounding
    for unit in filter(None, (first.between, float(steps.min()) if len(steps) else first.thickness)):
        numbers = heights / unit
        if np.abs(numbers - np.rint(numbers)).max() <= _NEAR:
            break
    else:
        raise UnreadableFile(path, "its frames are not evenly spaced, or it does not say how; give its image as `like`")
    count = int(np.rint(numbers[high])) + 1
    step = (positions[high] - positions[low]) / (count - 1) if count > 1 else unit * first.normal
    affine = np.eye(4)
    affine[:3] = np.column_stack([first.steps, step, positions[low]])
    return Space.from_affine((*shape, count), LPS_TO_RAS @ affine, ds.get("FrameOfReferenceUID"))


def _same_frame_of_reference(path: Path, uid: str | None, space: Space) -> None:
    if uid and space.frame_of_reference and str(uid) != space.frame_of_reference:
        raise SpaceMismatch(
            f"{path}: must lie in the image's frame of reference {space.frame_of_reference}, but lies in {uid}; "
            "register the two first, or give the image that it belongs to"
        )


def _lattice(
    path: Path, frame: _Frame, shape: tuple[int, ...], space: Space, number: int
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """From pixels (columns, rows) of a frame to voxels (n, 3) of ``space``, on which the frame must lie."""
    rows, columns = shape
    if frame.position is None:  # a plain X-ray: the same pixels are all there is to go by
        if space.shape != (columns, rows, 1):
            raise SpaceMismatch(
                f"{path}: has no place in the patient, so an image of its {columns} x {rows} pixels is needed, but the "
                f"grid is of {' x '.join(map(str, space.shape))} voxels"
            )
        steps, start, off = np.eye(3, 2), np.zeros(3), 0.0
    else:
        inverse = np.linalg.inv(space.lps_affine)
        exact_steps, exact_start = inverse[:3, :3] @ frame.steps, inverse[:3] @ (*frame.position, 1)
        steps, start = np.rint(exact_steps), np.rint(exact_start)
        ends = np.array([(0, columns - 1, 0, columns - 1), (0, 0, rows - 1, rows - 1)])
        off = float(np.abs((exact_steps - steps) @ ends + (exact_start - start)[:, None]).max())
        if (np.abs(steps).sum(0) != 1).any() or abs(steps[:, 0] @ steps[:, 1]) > 0:
            off = np.inf
        else:  # a coarser stack would fit slice by slice
            across = int(np.abs(steps).sum(1).argmin())
            height = abs(float(frame.normal @ space.lps_affine[:3, across]))
            fits = abs(frame.between - height) <= _NEAR * height or not frame.between or space.shape[across] == 1
            off = off if fits else np.inf
    if not off <= _NEAR:
        away = f"{off:.2g} voxels off" if np.isfinite(off) else "of another voxel size or direction"
        raise SpaceMismatch(
            f"{path}: frame {number} does not lie on the voxels of the grid that it was to be read on: it is {away}; "
            "give the image that it belongs to, or resample that one"
        )

    def voxels(column: np.ndarray, row: np.ndarray) -> np.ndarray:
        return np.asarray(np.stack([column, row], -1) @ steps.T + start).astype(int)

    return voxels


def _contours(
    path: Path, item: Dataset | None, space: Space, notes: dict[str, None], name: str
) -> dict[tuple[int, int], list[tuple[np.ndarray, bool]]]:
    """Closed contours per (axis, slice across it): coordinates (n, 2) along the other axes, and whether exclusive-or.

    The axis is the last one, unless the grid is turned against the image that the contours were drawn on.
    """
    found: dict[tuple[int, int], list[tuple[np.ndarray, bool]]] = {}
    for contour in (item.get("ContourSequence") or ()) if item is not None else ():
        kind = str(contour.get("ContourGeometricType") or "")
        if kind not in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
            notes[f'structure "{name}": contours of type {kind or "unknown"} enclose nothing and were left out'] = None
            continue
        points = contour_points(contour)
        if not np.isfinite(points).all():
            raise ValueError("a point of a contour is no number")
        if len(points) < 3:
            notes[f'structure "{name}": contours of fewer than 3 points were left out'] = None
            continue
        voxels = space.voxels_of(points * (-1, -1, 1))
        levels = np.rint(np.median(voxels, axis=0)).astype(int)
        off = np.abs(voxels - levels).max(0)
        axis = next((axis for axis in (2, 1, 0) if off[axis] <= _NEAR), 2)
        if not off[axis] <= _NEAR or not 0 <= levels[axis] < space.shape[axis]:
            raise SpaceMismatch(
                f'{path}: contours must lie on the slices of the image, but one of structure "{name}" runs from slice '
                f"{voxels[:, 2].min():.4g} to {voxels[:, 2].max():.4g} of 0 to {space.shape[2] - 1}; give the image "
                "that it was drawn on"
            )
        flat = np.delete(voxels, axis, axis=1)
        if flat.min() < -1 or (flat.max(0) > np.delete(space.shape, axis)).any():
            notes[f'structure "{name}": what lies beyond the edge of the image was cut off'] = None
        found.setdefault((axis, int(levels[axis])), []).append((flat, kind == "CLOSEDPLANAR_XOR"))
    return found


def contour_points(contour: Dataset) -> np.ndarray:
    """Points (n, 3) of one contour, LPS mm."""
    stored = contour.get_item("ContourData")
    # a structure set holds millions of numbers: those not parsed yet need not become pydicom's objects
    text = stored.value.decode("ascii").split("\\") if isinstance(stored.value, bytes) else stored.value
    return np.array(text, float).reshape(-1, 3)


def _referenced(ds: Dataset) -> tuple[str, str]:
    """Study and series UID of the images that a SEG belongs to."""
    series = ds.get("ReferencedSeriesSequence")
    return str(ds.get("StudyInstanceUID", "")), str(series[0].get("SeriesInstanceUID", "")) if series else ""


def _referenced_by_rtstruct(ds: Dataset) -> tuple[str, str]:
    for frame in ds.get("ReferencedFrameOfReferenceSequence") or ():
        for study in frame.get("RTReferencedStudySequence") or ():
            for series in study.get("RTReferencedSeriesSequence") or ():
                return str(ds.get("StudyInstanceUID", "")), str(series.get("SeriesInstanceUID", ""))
    return str(ds.get("StudyInstanceUID", "")), ""
