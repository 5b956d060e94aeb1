"""dcm2niix as an independent reader (``from dcm2niix_peer import volumes_of, on_grid``)."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medvit.data.space import Space


def volumes_of(folder: Path, output: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Array and RAS+ affine of every volume that dcm2niix finds; the test is skipped where it is not installed.

    Philips images with the scaling of RescaleSlope, as others have it.
    """
    program = Path(sys.executable).with_name("dcm2niix")
    found = str(program) if program.exists() else shutil.which("dcm2niix")
    if found is None:
        pytest.skip("dcm2niix is not installed")
    output.mkdir(parents=True, exist_ok=True)
    options = ("-b", "n", "-z", "n", "-p", "n", "-f", "%s_%d", "-o", str(output))
    subprocess.run([found, *options, str(folder)], check=True, capture_output=True)
    volumes = []
    for file in sorted(output.glob("*.nii")):
        image = nibabel.load(file)
        array = image.get_fdata()
        stack = array if array.ndim == 4 else array[..., None]
        volumes += [(stack[..., n], image.affine) for n in range(stack.shape[3])]
    return volumes


def on_grid(space: Space, array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """``array`` turned and flipped to ``space``; fails unless the two are one grid, corner by corner."""
    steps = np.linalg.solve(affine, space.affine)
    whole = np.rint(steps[:3, :3])
    assert (np.abs(whole).sum(0) == 1).all() and (np.abs(whole).sum(1) == 1).all()
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in space.shape], indexing="ij")).reshape(3, -1).T
    theirs = corners @ whole.T + np.rint(steps[:3, 3])
    off = np.linalg.norm(space.world(corners) - (theirs @ affine[:3, :3].T + affine[:3, 3]), axis=1)
    assert off.max() < 5e-3, f"grids lie {off.max():.3g} mm apart"
    order = np.abs(whole).argmax(axis=0)  # their axis of each of ours
    turned = array.transpose(order)
    assert turned.shape == space.shape
    return np.flip(turned, [n for n in range(3) if whole[order[n], n] < 0])
