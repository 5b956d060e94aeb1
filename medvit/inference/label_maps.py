"""Label maps beside their references: which belongs to which, and both on one grid."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medvit.data.nifti import stem
from medvit.data.reader import read_volume
from medvit.data.volume import Volume
from medvit.errors import NothingFound, UnreadableFile

SUFFIXES = (".nii", ".nii.gz", ".png")
WRITTEN = "_seg"  # what the writers of this package put behind a case's name


def paired(found: str | Path, truth: str | Path) -> dict[str, tuple[Path, Path]]:
    """The two label maps of each case, by the name of the reference.

    Args:
        found: folder of predictions, NIfTI or PNG, in folders and named as their references, or with ``_seg`` behind;
            where any file ends so, such as in what ``medvit predict`` writes, others are no predictions.
        truth: folder of references.

    Raises:
        NothingFound: no reference, one without a prediction, or a prediction without one.
        UnreadableFile: two files of one case.
    """
    theirs = _by_case((case, file) for case, file in _files(Path(truth)))
    files = _files(Path(found))
    written = [(case, file) for case, file in files if case.endswith(WRITTEN)] or files
    ours = _by_case((case if case in theirs else case.removesuffix(WRITTEN), file) for case, file in written)
    if not theirs:
        raise NothingFound(f"{truth}: holds no label maps; give a folder of {', '.join(SUFFIXES)} files")
    for held, wanted, folder in ((ours, theirs, found), (theirs, ours, truth)):
        if missing := sorted(wanted.keys() - held.keys()):
            shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise NothingFound(f"{folder}: needs a label map of every case of the other folder, lacks {shown}")
    return {case: (ours[case], theirs[case]) for case in sorted(theirs)}


def read_pair(found: Path, truth: Path) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """Both label maps, int64 ``(*spatial)``, and the spacing of their grid (mm; pixels of pictures).

    One slice is an image of two axes.

    Raises:
        MedvitError: a file that cannot be read, or holds other values than labels.
        SpaceMismatch: two grids.
    """
    ours, theirs = read_volume(found), read_volume(truth)
    theirs.space.require_same(ours.space, what=f"{truth} and {found}")
    spacing = theirs.space.spacing
    flat = theirs.space.shape[2] == 1
    maps = [_labels(volume, file) for volume, file in ((ours, found), (theirs, truth))]
    first, second = (m[..., 0] if flat else m for m in maps)
    return first, second, spacing[:2] if flat else spacing


def _files(folder: Path) -> list[tuple[str, Path]]:
    files = [file for file in sorted(folder.rglob("*")) if file.name.lower().endswith(SUFFIXES)]
    return [((file.relative_to(folder).parent / stem(file)).as_posix(), file) for file in files]


def _by_case(files: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for case, file in files:
        if case in found:
            raise UnreadableFile(
                file, f"is a second label map of the case {case}, beside {found[case]}; leave one of them"
            )
        found[case] = file
    return found


def _labels(volume: Volume, file: Path) -> Tensor:
    values = volume.array
    if values.ndim != 3 or not np.array_equal(values, np.floor(values)) or values.min() < 0:
        raise UnreadableFile(file, "holds no label map: whole numbers from 0, one per voxel, are needed")
    return torch.from_numpy(values.astype(np.int64))
