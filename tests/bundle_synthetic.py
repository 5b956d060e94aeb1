"""Bundles whose answer is known, images for them and labelled cohorts, shared by tests."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_synthetic import make_affine, write_nifti

from medvit.models.weights import file_sha256

BUNDLES = Path(__file__).parents[1] / "bundles"
# What decides about the label of a voxel: its intensity in units of the image's standard deviation, above the mean.
LEVELS = (0.3, 1.7)


def make_bundle(folder: Path, origin: str = "hippocampus_swin_unetr", name: str = "tiny") -> Path:
    """A copy of a bundle whose network is a 1 x 1 x 1 convolution that labels voxels by intensity (:data:`LEVELS`)."""
    root = folder / name
    shutil.copytree(BUNDLES / origin, root, ignore=shutil.ignore_patterns("models"))
    for config in ("inference", "train"):
        edit_json(
            root / f"configs/{config}.json",
            network_def={"_target_": "torch.nn.Conv3d", "in_channels": 1, "out_channels": 3, "kernel_size": 1},
        )
    edit_json(root / "configs/inference.json", smallest_mm=[0, 0, 0], largest_mm=[1000, 1000, 1000])
    edit_json(root / "configs/metadata.json", name=name)
    write_weights(
        root,
        {
            "weight": torch.tensor([0.0, 1.0, 2.0]).reshape(3, 1, 1, 1, 1),
            "bias": torch.tensor([0.0, -LEVELS[0], -LEVELS[0] - LEVELS[1]]),
        },
    )
    return root


def write_weights(root: Path, state: dict[str, Any], *, honest: bool = True) -> None:
    """Put weights into a bundle and, if ``honest``, their hash into its metadata."""
    path = root / "models/model.pt"
    path.parent.mkdir(exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())
    if honest:
        metadata = json.loads((root / "configs/metadata.json").read_text(encoding="utf-8"))
        edit_json(root / "configs/metadata.json", medvit={**metadata["medvit"], "weights_sha256": file_sha256(path)})


def edit_json(path: Path, **changes: Any) -> None:
    """Set top-level keys of a JSON file; None removes them."""
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept, indent=4) + "\n", encoding="utf-8")


def blobs(shape: tuple[int, int, int] = (36, 48, 32)) -> np.ndarray:
    """A smooth int16 image with a large blob, off centre along each axis, and a brighter one inside; noise-free."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij"), -1)
    large = np.exp(-(((grid - (0.1, -0.2, 0.15)) / (0.5, 0.4, 0.6)) ** 2).sum(-1))
    small = np.exp(-(((grid - (0.25, -0.05, -0.1)) / 0.2) ** 2).sum(-1))
    return (1000 * large + 1500 * small).astype(np.int16)


def expected_labels(image: np.ndarray) -> np.ndarray:
    """What the network of :func:`make_bundle` makes of an image with voxels of 1 mm: no resampling is involved."""
    image = image.astype(np.float64)
    return np.digitize((image - image.mean()) / image.std(), LEVELS).astype(np.uint8)


def write_cohort(folder: Path, train: int = 4, val: int = 2) -> Path:
    """A labelled cohort of small NIfTI files with its ``cases.csv``; returns the folder."""
    rng = np.random.default_rng(3)
    rows = []
    for n in range(train + val):
        label = np.zeros((20, 28, 20), np.uint8)
        label[5:14, 4:14, 5:14], label[5:14, 14:24, 5:14] = 1, 2
        image = (80 * label + rng.integers(0, 30, label.shape)).astype(np.int16)
        for kind, array in (("image", image), ("label", label)):
            write_nifti(folder / kind / f"case{n}.nii.gz", array, make_affine("axial", (1, 1, 1)))
        files = {kind: f"{kind}/case{n}.nii.gz" for kind in ("image", "label")}
        rows.append({"case_id": f"case{n}", **files, "split": "train" if n < train else "val"})
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder
