"""Every image of an inventory to NIfTI, one record per volume and per file that is none."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvit.errors import MedvitError, SpaceMismatch
from medvit.writers.base import with_suffix
from medvit.writers.nifti import write_series

if TYPE_CHECKING:
    from medvit.data.study import Inventory, Series

_SAME_GRID_MM = 1e-3
_log = logging.getLogger("medvit")


def convert(
    inventory: Inventory, output_dir: Path, *, overwrite: bool = False, four_d: bool = False
) -> Iterator[dict[str, Any]]:
    """Write each volume to ``output_dir/<series.name>.nii.gz`` and yield what became of it, one at a time.

    Nothing is converted before the iterator is advanced. A series that fails is a record, never an exception.

    Args:
        inventory: from :func:`medvit.data.study.discover`.
        output_dir: created as needed.
        overwrite: replace existing files; without it an existing file makes its series ``rejected``.
        four_d: the volumes of one series in one file where they share a grid.

    Yields:
        Records for JSON, images first, then files set aside, each in the inventory's order: ``status`` (``ok``,
        ``warning``: written, but read ``reason``; ``rejected``: nothing written; ``set-aside``: no image), ``code`` (a
        stable word, None when ok), ``reason``, ``series``, ``files``, ``output``, ``modality``, ``shape`` (voxels),
        ``spacing`` (mm) and ``orientation`` (e.g. ``"LPS"``), None where unknown; of one of several volumes also
        ``volume`` (from 0), ``volumes`` and ``parameters`` (what tells it from the others). Photographs are set aside.
    """
    groups = _together(inventory.series) if four_d else [[one] for one in inventory.series]
    of_base = Counter(volumes[0].base for volumes in groups if len(volumes) > 1)
    for volumes in groups:
        first = volumes[0]
        name = first.base if len(volumes) > 1 and of_base[first.base] == 1 else first.name
        yield _convert(volumes, name, output_dir, overwrite)
    for aside in inventory.set_aside:
        yield _record("set-aside", aside.code, aside.reason, files=[str(aside.path)])


def deidentify(inventory: Inventory, output_dir: Path, *, overwrite: bool = False) -> Iterator[dict[str, Any]]:
    """Write every DICOM file without identifiers to ``output_dir/<study>/<series>/<n>.dcm``; see ``Deidentifier``.

    Segmentations, structure sets and scouts are written too, reports and images that may show names are set aside.

    Yields:
        Records like those of :func:`convert`, one for each file.
    """
    from medvit.writers.deidentify import Deidentifier

    names = {file: one for one in inventory.series if one.kind == "dicom" for file in one.files}
    others = [one for one in inventory.series if one.kind != "dicom"]
    asides = {aside.path: aside for aside in inventory.set_aside}
    writer = Deidentifier()
    for done in writer.write_all(
        [*names, *(path for path in asides if _is_dicom(path))], output_dir, overwrite=overwrite
    ):
        series = names.get(done.source)
        known: dict[str, Any] = {"files": [str(done.source)]}
        if series is not None:
            known |= {"series": series.base, "modality": series.modality}
        if done.target is not None:
            outcome = ("warning", "notes", "; ".join(done.notes)) if done.notes else ("ok", None, None)
            yield _record(*outcome, **known, output=str(done.target))
        else:
            status = "set-aside" if done.code in ("burned-in", "not-an-image") else "rejected"
            yield _record(status, done.code, done.reason, **known)
    for one in others:
        yield _record("set-aside", "not-dicom", "de-identification is for DICOM files", **about(one))
    for path, aside in asides.items():
        if not _is_dicom(path):
            yield _record("set-aside", aside.code, aside.reason, files=[str(path)])


def _is_dicom(path: Path) -> bool:
    from medvit.data.headers import looks_like_dicom

    try:
        with path.open("rb") as file:
            return looks_like_dicom(file.read(132))
    except OSError:
        return False


def about(series: Series) -> dict[str, Any]:
    """What a record says of a series, as far as headers tell."""
    known: dict[str, Any] = {
        "series": series.name,
        "files": [str(f) for f in series.origins],
        "modality": series.modality,
        **({"channels": series.channels} if series.channels > 1 or series.kind == "raster" else {}),
    }
    if series.volumes > 1:
        known |= {"volume": series.volume, "volumes": series.volumes, "parameters": series.parameters}
    return known | (_grid(series.space, series.placed) if series.space else {})


def _together(series: Sequence[Series]) -> list[list[Series]]:
    """All sound volumes of a series and grid together, in their order; what else there is alone."""
    groups: list[list[Series]] = []
    of_base: dict[str, list[list[Series]]] = defaultdict(list)
    for one in series:
        joins = one.volumes > 1 and one.problem is None and one.channels == 1
        homes = [group for group in of_base[one.base] if _same_grid(group[0], one)] if joins else []
        if homes:
            homes[0].append(one)
            continue
        groups.append([one])
        if joins:
            of_base[one.base].append(groups[-1])
    return [sorted(group, key=lambda one: one.volume) for group in groups]


def _same_grid(one: Series, other: Series) -> bool:
    return one.space is not None and other.space is not None and one.space.distance_to(other.space) <= _SAME_GRID_MM


def _convert(volumes: list[Series], name: str, output_dir: Path, overwrite: bool) -> dict[str, Any]:
    series, known = volumes[0], about(volumes[0])
    if len(volumes) > 1:
        files = dict.fromkeys(str(file) for one in volumes for file in one.origins)
        known |= {"series": name, "files": list(files), "volumes": len(volumes)}
        known |= {"volume": None, "parameters": [one.parameters for one in volumes]}
    if series.kind == "raster":
        code, reason = "photograph", "a photograph: it has no place in millimetres, which a NIfTI file states"
        return _record("set-aside", code, reason, **known)
    path = with_suffix(output_dir / name, ".nii.gz")
    outcome: tuple[str, str | None, str | None]
    try:
        read = [one.read() for one in volumes]
        known |= _grid(read[0].space, series.placed)
        placed = None if series.placed else False
        write_series(read, path, overwrite=overwrite, time_step=series.time_step, placed=placed)
        known["output"] = str(path)
        notes = tuple(dict.fromkeys(note for volume in read for note in volume.notes))
        outcome = ("warning", "notes", "; ".join(notes)) if notes else ("ok", None, None)
    except SpaceMismatch as error:
        outcome = ("rejected", error.code, f"{error}; convert them one by one, without --4d")
    except MedvitError as error:
        outcome = ("rejected", error.code, _named(error, series))
    except Exception as error:  # one bad series, whatever is bad about it, must not cost the others
        # not one of ours: its text may quote the header, which may hold the patient's name
        reason = f"{type(error).__name__} while converting; the debug log (--verbose) has the traceback, report it"
        outcome = ("rejected", "internal", f"{series.name}: {reason}")
        _log.debug("%s: not converted", series.name, exc_info=True)
    return _record(*outcome, **known)


def _named(error: MedvitError, series: Series) -> str:
    """The message; a temporary file is called by its name in its archive."""
    message = str(error)
    if series.archive:
        for file in dict.fromkeys(series.files):
            message = message.replace(str(file), str(series.archive.unpacked.original(file)))
    return message


def _grid(space: Any, placed: bool) -> dict[str, Any]:
    spacing = [round(step, 6) for step in space.spacing] if space.unit == "mm" else None
    return {
        "shape": list(space.shape),
        "spacing": spacing,
        "orientation": (space.orientation or None) if placed else None,
    }


def _record(status: str, code: str | None, reason: str | None, **known: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("series", "files", "output", "modality", "shape", "spacing", "orientation"))
    return {"status": status, "code": code, "reason": reason, **unknown, **known}
