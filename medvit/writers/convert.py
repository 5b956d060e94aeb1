"""Every image series of an inventory to NIfTI, one record per series and per file that is none."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medvit.errors import MedvitError
from medvit.writers.base import with_suffix
from medvit.writers.nifti import write_volume

if TYPE_CHECKING:
    from medvit.data.study import Inventory, Series

_log = logging.getLogger("medvit")


def convert(inventory: Inventory, output_dir: Path, *, overwrite: bool = False) -> Iterator[dict[str, Any]]:
    """Write each series to ``output_dir/<series.name>.nii.gz`` and yield what became of it, one at a time.

    Nothing is converted before the iterator is advanced. A series that fails is a record, never an exception.

    Args:
        inventory: from :func:`medvit.data.study.discover`.
        output_dir: created as needed.
        overwrite: replace existing files; without it an existing file makes its series ``rejected``.

    Yields:
        Records for JSON, series first, then files set aside, each in the inventory's order: ``status`` (``ok``,
        ``warning``: written, but read ``reason``; ``rejected``: nothing written; ``set-aside``: no image), ``code`` (a
        stable word, None when ok), ``reason``, ``series``, ``files``, ``output``, ``modality``, ``shape`` (voxels),
        ``spacing`` (mm) and ``orientation`` (e.g. ``"LPS"``), None where unknown. Photographs are set aside.
    """
    for series in inventory.series:
        yield _convert_one(series, with_suffix(output_dir / series.name, ".nii.gz"), overwrite)
    for aside in inventory.set_aside:
        yield _record("set-aside", aside.code, aside.reason, files=[str(aside.path)])


def _convert_one(series: Series, path: Path, overwrite: bool) -> dict[str, Any]:
    known: dict[str, Any] = {
        "series": series.name,
        "files": [str(f) for f in series.files],
        "modality": series.modality,
    }
    if series.kind == "raster":
        code, reason = "photograph", "a photograph: it has no place in millimetres, which a NIfTI file states"
        return _record("set-aside", code, reason, **known)
    space = series.space
    outcome: tuple[str, str | None, str | None]
    try:
        volume = series.read()
        space = volume.space
        write_volume(volume, path, overwrite=overwrite)
        known["output"] = str(path)
        outcome = ("warning", "notes", " ".join(volume.notes)) if volume.notes else ("ok", None, None)
    except MedvitError as error:
        outcome = ("rejected", error.code, str(error))
    except Exception as error:  # one bad series, whatever is bad about it, must not cost the others
        # not one of ours: its text may quote the header, which may hold the patient's name
        reason = f"{type(error).__name__} while converting; the debug log (--verbose) has the traceback, report it"
        outcome = ("rejected", "internal", f"{series.name}: {reason}")
        _log.debug("%s: not converted", series.name, exc_info=True)
    if space is not None:
        spacing = [round(step, 6) for step in space.spacing]
        known.update(shape=list(space.shape), spacing=spacing, orientation=space.orientation)
    return _record(*outcome, **known)


def _record(status: str, code: str | None, reason: str | None, **known: Any) -> dict[str, Any]:
    unknown = dict.fromkeys(("series", "files", "output", "modality", "shape", "spacing", "orientation"))
    return {"status": status, "code": code, "reason": reason, **unknown, **known}
