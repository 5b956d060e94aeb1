"""The cases of a folder, as the list of dictionaries that MONAI data sets take."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medvit.data.study import Inventory, Series, discover, is_folder
from medvit.errors import NothingFound

VOLUMES = ("dicom", "nifti", "itk")
# photographs of formats that are not read: among photographs they are lost cases, not litter
_OTHER_PHOTOGRAPHS = {".avif", ".gif", ".heic", ".heif", ".webp"}
_KINDS = {
    "dicom": "DICOM series",
    "nifti": "NIfTI file",
    "itk": "MetaImage or NRRD file",
    "raster": "photograph",
    "projection": "DICOM radiograph",
}
_log = logging.getLogger("medvit")


def list_cases(
    dataset_dir: str | Path | Sequence[str | Path],
    modalities: Sequence[str] = (),
    key: str = "image",
    exclude: str | Path | None = None,
    kinds: Sequence[str] = VOLUMES,
) -> list[dict[str, Any]]:
    """Every candidate image below ``dataset_dir``, one dictionary each, by name; of a 4D series the first volume.

    Candidates that cannot be used, unreadable files among them, are listed too: loading them raises the reason, so that
    it counts as a failed case. What is left out (files that are no images, scouts, results of earlier runs, other
    kinds and modalities) goes to the log ``medvit``.

    Args:
        dataset_dir: a folder or file, or several.
        modalities: DICOM modalities to take, such as ``["MR"]``; empty takes all. NIfTI files do not say and are
            always taken.
        key: of the image in each dictionary.
        exclude: a folder that is not entered: give the output folder, lest results of an earlier run become inputs.
        kinds: what to take: some of ``"dicom"``, ``"nifti"``, ``"itk"``, ``"raster"`` (photographs and other pictures)
            and ``"projection"`` (of DICOM, only images without a place in the patient; each file is a case). Volumes
            and photographs are never mixed unless asked for: no network takes both by mistake.

    Returns:
        ``[{key: path or list of paths (str), "case": name, "notes": what a person should know (list of str)}, ...]``.

    Raises:
        NothingFound: no such folder, or no candidate in it.
        OutputError: ``exclude`` is ``dataset_dir`` itself.
        ValueError: an unknown kind, or none.
    """
    if not kinds or not set(kinds) <= set(_KINDS):
        raise ValueError(f"kinds must be some of {', '.join(_KINDS)}, got {list(kinds)}")
    inventory = discover(dataset_dir, exclude=exclude)
    wanted = {modality.upper() for modality in modalities}
    firsts = [one for one in inventory.series if one.volume == 0]
    chosen = [one for one in firsts if _is_kind(one, kinds) and _is_wanted(one, wanted)]
    if not chosen:
        raise NothingFound(_nothing(dataset_dir, kinds, sorted(wanted), inventory))
    for aside in inventory.set_aside:
        lost = "raster" in kinds and aside.path.suffix.lower() in _OTHER_PHOTOGRAPHS
        level = logging.WARNING if lost else logging.INFO
        _log.log(level, "%s: set aside (%s): %s", aside.path, aside.code, aside.reason)
    for one in chosen:
        if one.volumes > 1:
            _log.info("%s: the first of %d volumes is taken", one.name, one.volumes)
    return [{key: _files(one), "case": one.name, "notes": list(one.notes)} for one in chosen]


def _takes(one: Series, kinds: Sequence[str]) -> bool:
    unknown = one.problem is not None and not one.modality  # may be what is asked for: to fail, not to vanish
    return one.kind in kinds or ("projection" in kinds and one.kind == "dicom" and (unknown or not one.placed))


def _is_kind(one: Series, kinds: Sequence[str]) -> bool:
    if _takes(one, kinds) or is_folder(one.files[0]):  # a closed folder may hold any kind
        return True
    # pictures lie beside volumes by the hundred and mean nothing; a volume among photographs is a mistake to be told
    level = logging.INFO if one.kind == "raster" else logging.WARNING
    wanted = " or ".join(f"a {_KINDS[kind]}" for kind in kinds)
    _log.log(level, "%s: skipped, it is a %s and not %s", one.name, _KINDS[one.kind], wanted)
    return False


def _is_wanted(one: Series, wanted: set[str]) -> bool:
    if not wanted or one.kind != "dicom" or one.modality in wanted or (one.problem is not None and not one.modality):
        return True
    _log.warning(
        "%s: skipped, its modality is %s and not %s", one.name, one.modality or "unknown", "/".join(sorted(wanted))
    )
    return False


def _files(one: Series) -> str | list[str]:
    return str(one.files[0]) if one.kind != "dicom" else [str(file) for file in dict.fromkeys(one.files)]


def _nothing(dataset_dir: object, kinds: Sequence[str], wanted: list[str], inventory: Inventory) -> str:
    """What was looked for, where, and what was there instead."""
    where = dataset_dir if isinstance(dataset_dir, str | Path) else ", ".join(map(str, dataset_dir))  # type: ignore[call-overload]
    dicom = {kind: f"{_KINDS[kind]} of modality {' or '.join(wanted)}" for kind in ("dicom", "projection")}
    names = _KINDS | (dicom if wanted else {})
    sought = " and ".join(f"no {names[kind]}" for kind in names if kind in kinds)
    others = sorted({one.modality or "unknown" for one in inventory.series if _takes(one, kinds)})
    found = [f"series of other modalities: {', '.join(others)}"] if others else []
    counts = Counter(_KINDS[one.kind] for one in inventory.series if not _takes(one, kinds))
    found += [f"{name}: {count}, not taken here" for name, count in sorted(counts.items())]
    found += [f"{aside.path.name}: {aside.reason}" for aside in inventory.set_aside[:3]]
    more = len(inventory.set_aside) - 3
    if more > 0:
        found.append(f"and {more} more files that are no images")
    return f"{where}: {sought} found; there is: {'; '.join(found) or 'nothing at all'}"
