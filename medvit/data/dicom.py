"""DICOM: files to series, a series to volumes, a volume to voxels.

Grouping and geometry are ours, because readers that assume one regular stack per series return silently wrong volumes
on real folders.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medvit.data import doubts
from medvit.data.frames import Frame, Label
from medvit.data.grouping import Group, Image, describe, duplicates_note, group_series, without_duplicates
from medvit.data.headers import FLAT_CLASSES, Header, NotAnImage, read_header
from medvit.data.pixels import Pixels, decode
from medvit.data.regrid import AS_IT_IS, Repairs, between, even_heights, even_stack, straighten
from medvit.data.slices import Plane, Stack, arrange
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.data.volumes import Part, by_kind, places, separate, shorter
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries

_NETWORK = Repairs(tilt="refuse")
_ONE_KIND = ("image_type", "component", "kernel", "kvp")  # labels that slices of one volume should share
_LACKING = 1.9  # times the distance that is stated
_EXACT = 2**24  # float32 holds every whole number up to here


@dataclass(frozen=True)
class Assembly:
    """One volume put together from headers, or the problem that prevents it.

    Args:
        files: of each slice, in slice order; where there is a problem, of all that may belong to it.
        frames: of each slice, its number in its file.
        mosaic: these are tiles.
        space: its grid, before any resampling.
        problem: why there is none.
        notes: what a person should know.
        parameters: what tells the volume from others of its series, see :class:`medvit.data.volumes.Part`.
        flat: images that have no place in the patient and need none.
        colour: three values per voxel.
        heights: of slices at uneven distances that are to be resampled, mm.
        upright: False for sheared slices that are to be resampled.
    """

    files: tuple[Path, ...]
    frames: tuple[int, ...] = ()
    mosaic: bool = False
    space: Space | None = None
    problem: MedvitError | None = None
    notes: tuple[str, ...] = ()
    parameters: dict[str, Label] = field(default_factory=dict)
    flat: bool = False
    colour: bool = False
    heights: tuple[float, ...] = ()
    upright: bool = True

    def load(self, source: Source) -> Volume:
        """Read the voxels; ``source`` is completed with files and frames.

        Raises:
            MedvitError: the problem, if there is one.
            UnreadableFile: pixels that cannot be decoded.
        """
        if self.problem is not None or self.space is None:
            raise self.problem or AssertionError("an assembly has a space or a problem")
        columns, rows = self.space.shape[:2]
        array = np.empty((len(self.files), rows, columns, *((3,) if self.colour else ())), dtype=np.float32)
        rounded = 0
        for k, image in self._images((rows, columns)):
            array[k] = image
            if np.abs(image).max() > _EXACT:
                rounded += int(np.count_nonzero(array[k] != image))
        array = array.transpose(2, 1, 0, *range(3, array.ndim))
        notes = self.notes
        if rounded:
            notes += (f"{rounded} voxels hold numbers beyond {_EXACT}, which were rounded to 24 bits",)
        if self.heights:
            array = between(array, self.heights)
        source = replace(source, files=self.files, frames=self.frames, mosaic=self.mosaic)
        volume = Volume(array, self.space, source, notes)
        return volume if self.upright else straighten(volume)

    def _images(self, shape: tuple[int, int]) -> Iterator[tuple[int, np.ndarray]]:
        """Slices with their numbers, one file after the other, so that one is open at a time."""
        numbers: dict[Path, list[int]] = defaultdict(list)
        for k, file in enumerate(self.files):
            numbers[file].append(k)
        for file, some in numbers.items():
            pixels = decode(file)
            for k in some:
                image = self._image(pixels, self.frames[k], shape)
                if image.shape[:2] != shape or (image.ndim == 3) != self.colour:
                    raise UnreadableFile(
                        file, f"its pixels decode to shape {image.shape}, but its header and series need {shape}"
                    )
                yield k, image

    def _image(self, pixels: Pixels, number: int, shape: tuple[int, int]) -> np.ndarray:
        if not self.mosaic:
            return pixels.rescaled(number)
        whole = pixels.rescaled(0)
        row, column = divmod(number, whole.shape[1] // shape[1])
        return whole[row * shape[0] : (row + 1) * shape[0], column * shape[1] : (column + 1) * shape[1]]


def assemble(
    group: Group,
    series: str,
    lost: Sequence[Path] = (),
    repairs: Repairs = AS_IT_IS,
) -> list[Assembly]:
    """Put the volumes of one group together, in the order of acquisition, or say why not.

    Args:
        group: one of :func:`group_series`.
        series: what messages call it.
        lost: unreadable files that may be slices of it. With any the series is refused: a gap would be seen, but a
            first or last slice that is missing leaves no trace.
        repairs: what becomes of sheared and uneven slices.
    """
    images = group.images
    notes = tuple(dict.fromkeys(note for header in group.headers for note in header.notes))
    notes += group.notes + doubts.disagreements([h.alike for h in group.headers], [f.scale for _, f in images])
    files = tuple(header.path for header in group.headers)
    problem = _incomplete(group, series, lost)
    if problem is not None:
        return [Assembly((*files, *lost), problem=problem, notes=notes)]
    colour = group.first.matrix[2] == 3
    if group.first.flat:
        return [_flat(group.first, notes, colour)]
    if colour:  # between colours there is no colour
        repairs = Repairs(repairs.tilt.replace("resample", "keep"), repairs.uneven.replace("resample", "refuse"))
    planes = [frame.plane for _, frame in images if frame.plane]
    frames = [frame for _, frame in images]
    where = places(planes)
    parts = separate(frames, where) if len(set(where)) < len(where) else [Part(tuple(range(len(frames))))]
    found = [_volume(images, part, series, repairs) for part in parts]
    for n, more in enumerate(shorter(parts, where)):
        if more and found[n].problem is None:
            note = f"another volume of its series goes on at an end (slices: {more}), which this one may have lost"
            found[n] = replace(found[n], notes=(*found[n].notes, note))
    if len(parts) == 1 and found[0].problem is not None and len(set(where)) == len(where):
        for way in by_kind(frames):
            finer = [_volume(images, part, series, repairs) for part in way]
            if all(one.problem is None for one in finer):
                found = finer
                break
    if len(found) == 1 and isinstance(found[0].problem, UnreadableSeries) and repairs.uneven == "split":
        found = _runs(images, where, series, repairs) or found
    missing_frame = {header.frame_of_reference for header in group.headers}
    if len(missing_frame) > 1:
        notes += ("some of its files lack the FrameOfReferenceUID that the others have",)
    return [replace(one, notes=(*notes, *one.notes), colour=colour) for one in found]


def _incomplete(group: Group, series: str, lost: Sequence[Path]) -> UnreadableSeries | None:
    if lost:
        names = ", ".join(path.name for path in lost[:5]) + (", ..." if len(lost) > 5 else "")
        reason = (
            f"every slice is needed, but of the files beside it {len(lost)} cannot be read ({names}), and may be its "
            "first or last slice; get them again, or move them elsewhere if they are not part of it"
        )
        return UnreadableSeries(series, "incomplete", reason)
    if group.broken:
        broken, count = group.broken, len(group.headers)
        code, reason = broken[0].defect or ("", "")
        which = broken[0].path.name if len(broken) == 1 else f"{broken[0].path.name} and {len(broken) - 1} more"
        return UnreadableSeries(series, code, f"{which} of {count} files: {reason}")
    return None


def _flat(header: Header, notes: tuple[str, ...], colour: bool) -> Assembly:
    """The images of one file without a place, as slices on an axis of their own."""
    count = len(header.frames)
    rows, columns = header.matrix[:2]
    x, y = header.pixel_spacing or (1.0, 1.0)
    unit = "mm" if header.pixel_spacing else "px"
    space = Space.from_affine((columns, rows, count), np.diag([x, y, 1.0, 1.0]), None, unit)
    if count > 1:
        notes += (f"{count} frames one after the other along the third axis",)
    numbers = tuple(frame.number for frame in header.frames)
    return Assembly((header.path,) * count, numbers, space=space, notes=notes, flat=True, colour=colour)


def _thin(header: Header, frame: Frame) -> Assembly:
    """A projection or capture that has a place, but no thickness to make a volume of."""
    note = "an image without a SliceThickness, which makes no volume: it was written without its place in the patient"
    spacing = frame.plane.spacing if frame.plane else None
    return _flat(replace(header, frames=(frame,), pixel_spacing=spacing), (note,), header.matrix[2] == 3)


def _volume(images: Sequence[Image], part: Part, series: str, repairs: Repairs) -> Assembly:
    """One volume from some of the images, or the problem."""
    chosen = [images[n] for n in part.members]
    files = tuple(header.path for header, _ in chosen)
    known: dict[str, Any] = {"mosaic": chosen[0][0].mosaic, "parameters": part.parameters}
    if part.missing:
        reason = (
            f"{part.missing} of its {len(chosen) + part.missing} slices are missing, which other volumes of the series "
            "have; the acquisition was interrupted, or files are lost"
        )
        return Assembly(files, problem=UnreadableSeries(series, "incomplete-volume", reason), **known)
    planes = [frame.plane for _, frame in chosen if frame.plane]
    try:
        _require_one_unit(chosen, series)
        stack, heights = _stack(planes, series, chosen[0][1].thickness, repairs)
    except UnreadableSeries as problem:
        if problem.code == "single-slice" and chosen[0][0].sop_class in FLAT_CLASSES:
            return replace(_thin(*chosen[0]), parameters=part.parameters)
        return Assembly(files, problem=problem, **known)
    ordered = [chosen[n] for n in stack.order]
    notes, upright = stack.notes + _mixed(chosen) + _short(chosen, stack), True
    if stack.tilt:
        what = f"slices are sheared by {stack.tilt:.2f} degrees (gantry tilt)"
        if repairs.tilt == "refuse":
            reason = f"slices must be stacked at a right angle, but these {what[7:]}; resample the series to an upright"
            tilted = UnreadableSeries(series, "gantry-tilt", f"{reason} grid first (medvit convert --tilt resample)")
            return Assembly(files, problem=tilted, **known)
        upright = repairs.tilt == "keep"
        notes += (f"{what}, and so is its grid: programs that take it for upright are wrong",) if upright else ()
    count = len(even_heights(heights)) if heights else len(ordered)
    frame_of_reference = next((one.frame_of_reference for one, _ in ordered if one.frame_of_reference), None)
    space = Space.from_affine((*planes[0].shape, count), stack.affine, frame_of_reference)
    numbers = tuple(frame.number for _, frame in ordered)
    files = tuple(header.path for header, _ in ordered)
    return Assembly(files, numbers, space=space, notes=notes, heights=heights, upright=upright, **known)


def _stack(
    planes: Sequence[Plane], series: str, thickness: float | None, repairs: Repairs
) -> tuple[Stack, tuple[float, ...]]:
    """The planes in order, and their heights if these are uneven and to be resampled."""
    try:
        return arrange(planes, series, thickness), ()
    except UnreadableSeries as problem:
        if problem.code in ("uneven-slices", "missing-slice") and repairs.uneven == "resample":
            return even_stack(planes, series)
        raise


def _require_one_unit(images: Sequence[Image], series: str) -> None:
    """Refuse to mix, say, Hounsfield units with optical density."""
    units = {frame.label("rescale_type") for _, frame in images} - {None}
    if len(units) > 1:
        reason = f"slices of one volume must share one unit, but RescaleType is {sorted(map(str, units))}"
        raise UnreadableSeries(series, "units-vary", f"{reason}; export the series again")


def _mixed(images: Sequence[Image]) -> tuple[str, ...]:
    mixed = [name for name in _ONE_KIND if len({frame.label(name) for _, frame in images} - {None}) > 1]
    return (f"its slices differ in {', '.join(mixed)}, and may be of several images",) if mixed else ()


def _short(images: Sequence[Image], stack: Stack) -> tuple[str, ...]:
    """What says that slices are missing where there is no gap: at an end, or every second one."""
    notes: tuple[str, ...] = ()
    stated = max(header.slices or 0 for header, _ in images)
    if stated > len(images):
        notes += (f"its header counts {stated} slices, but only {len(images)} are here; the first or last may be lost",)
    apart = max(frame.apart or 0.0 for _, frame in images)
    step = float(np.linalg.norm(stack.affine[:3, 2]))
    if len(images) > 1 and apart and step > _LACKING * apart:
        notes += (f"its slices are {step:.4g} mm apart, {apart:.4g} mm by SpacingBetweenSlices; some may be lost",)
    return notes


def _runs(images: Sequence[Image], where: Sequence[int], series: str, repairs: Repairs) -> list[Assembly]:
    """Stacks of even slices one above the other, each as long as possible; none if the places repeat."""
    if len(set(where)) < len(where):
        return []
    left = [int(n) for n in np.argsort(where)]
    found: list[Assembly] = []
    while left:
        best = _volume(images, Part(tuple(left[:1]), {"stack": float(len(found))}), series, repairs)
        length = 1
        for end in range(2, len(left) + 1):
            longer = _volume(images, Part(tuple(left[:end]), {"stack": float(len(found))}), series, repairs)
            if longer.problem is not None:
                break
            best, length = longer, end
        found.append(best)
        left = left[length:]
    return found


def read_dicom(files: Iterable[str | Path], name: str = "", volume: int | None = None) -> Volume:
    """Read the files of one series, in any order, into one volume.

    Args:
        files: every file of the series; copies are dropped with a note.
        name: stem for outputs, and what messages call the series; default: its folder.
        volume: which one, from 0, where the series holds several (echoes, time points, ...). None: the first, with a
            note.

    Returns:
        Volume with array ``(column i, row j, slice k)``; ``k`` runs along cross(row direction, column direction).
        Stored values times RescaleSlope plus RescaleIntercept, slice by slice (or through the modality look-up table),
        float32. MONOCHROME1 is not inverted: that is a wish about display, and these values are measurements.
        Padding is kept.

    Raises:
        UnreadableFile: a file that is no DICOM image, or whose pixels cannot be decoded.
        UnreadableSeries: files of several series, unreadable files among them, no such volume, images in colour or
            without a place, or a geometry that is not one regular, upright 3D grid.
    """
    label, headers, volumes = _assembled(files, name)
    if not 0 <= (volume or 0) < len(volumes):
        reason = f"volume {volume} is asked for, but the series holds {len(volumes)}, counted from 0"
        raise UnreadableSeries(label, "no-such-volume", reason)
    chosen = volumes[volume or 0]
    _require_place(chosen, headers[0], label)
    if volume is None and len(volumes) > 1:
        chosen = replace(chosen, notes=(*chosen.notes, first_of(volumes)))
    first = headers[0]
    return chosen.load(Source("dicom", (), first.modality, first.study_uid, first.series_uid, name))


def read_dicom_again(source: Source) -> Volume:
    """The volume that ``source`` was made for, whichever it was of its series.

    Raises:
        UnreadableFile, UnreadableSeries: as :func:`read_dicom`, and ``no-such-volume`` where the files have changed.
    """
    label, headers, volumes = _assembled(source.files, source.name)
    for volume in volumes:
        if (volume.files, volume.frames) == (source.files, source.frames or (0,) * len(source.files)):
            _require_place(volume, headers[0], label)
            return volume.load(source)
    raise UnreadableSeries(label, "no-such-volume", "its files no longer make the volume that they made; read it anew")


def _assembled(files: Iterable[str | Path], name: str) -> tuple[str, list[Header], list[Assembly]]:
    """What to call one series, its headers and its volumes."""
    headers, unreadable = _headers(files)
    if not headers:
        raise UnreadableSeries(name or "DICOM series", "no-files", "at least one file is needed")
    label = name or str(headers[0].path.parent if len(headers) > 1 else headers[0].path)
    groups = group_series(headers)
    if len(groups) > 1:
        found = "; ".join(f"{len(group.headers)} files of {describe(group.first)}" for group in groups[:5])
        reason = f"the files of one series are needed, but these make {len(groups)}: {found}; give one of them"
        raise UnreadableSeries(label, "several-series", reason)
    group, dropped = without_duplicates(groups[0])
    volumes = assemble(group, label, [error.path for error in unreadable], _NETWORK)
    if dropped:
        volumes = [replace(volume, notes=(duplicates_note(dropped), *volume.notes)) for volume in volumes]
    return label, headers, volumes


def _headers(files: Iterable[str | Path]) -> tuple[list[Header], list[UnreadableFile]]:
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
    return headers, unreadable


def _require_place(assembly: Assembly, header: Header, series: str) -> None:
    """What networks for volumes need: grey values, and a place in the patient."""
    if assembly.problem is not None:
        raise assembly.problem
    if assembly.colour:
        reason = "grey values are needed, but this is a colour image"
        raise UnreadableSeries(series, "colour", reason)
    if assembly.flat:
        reason = f"an image with a place in the patient is needed, but this has none ({describe(header)})"
        raise UnreadableSeries(series, "no-geometry", f"{reason}; read projections with medvit.data.radiograph")


def first_of(volumes: Sequence[Assembly]) -> str:
    """A note on which of several volumes was taken."""
    known = ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in volumes[0].parameters.items()
    )
    return f"the first of {len(volumes)} volumes of its series" + (f" ({known})" if known else "")
