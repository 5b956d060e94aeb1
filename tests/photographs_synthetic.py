"""Photographs for tests, and a bundle over them whose answer is known."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bundle_synthetic import edit_json, make_bundle, write_weights
from PIL import Image

EXIF_ORIENTATION = 274


def colours(width: int = 70, height: int = 45, seed: int = 0) -> np.ndarray:
    """Random smooth uint8 pixels ``(row, column, 3)`` without any symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def write_picture(
    path: Path, pixels: np.ndarray, orientation: int = 1, mode: str | None = None, **options: Any
) -> Path:
    """Save ``(row, column[, channel])`` pixels, with an EXIF orientation if it is not 1; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if mode is not None:
        image = image.convert(mode)
    if orientation != 1 and path.suffix.startswith(".tif"):
        options["tiffinfo"] = {EXIF_ORIENTATION: orientation}
    elif orientation != 1:
        options["exif"] = Image.Exif()
        options["exif"][EXIF_ORIENTATION] = orientation
    image.save(path, **options)
    return path


def as_volume(pixels: np.ndarray) -> np.ndarray:
    """Pixels ``(row, column[, channel])`` as medvit's array, ``(column, row, 1[, channel])`` float32."""
    return pixels.swapaxes(0, 1)[:, :, None].astype(np.float32)


def labels_of(pixels: np.ndarray) -> np.ndarray:
    """What the network of :func:`make_photograph_bundle` says of uint8 colours, ``(row, column)``."""
    red, green, _ = np.moveaxis(pixels.astype(float), -1, 0)
    return np.stack([np.zeros_like(red), red - 128.5, green - 150.25]).argmax(0).astype(np.uint8)


def make_photograph_bundle(folder: Path, name: str = "photographs") -> Path:
    """A bundle for colour photographs: a 2D 1 x 1 convolution, in windows of one slice, over pixels as they are."""
    root = make_bundle(folder, name=name)
    (root / "configs/train.json").unlink()
    path = root / "configs/inference.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    window = config["inferer"]["inferer"]["inferer"] | {"spatial_dims": 2}
    edit_json(
        path,
        formats=["png", "overlay"],
        modalities=None,
        smallest_mm=None,
        largest_mm=None,
        smallest_px=[8, 8, 1],
        largest_px=[4000, 4000, 1],
        roi_size=[32, 32, 1],
        network_def={"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 3, "kernel_size": 1},
        inferer={**config["inferer"], "inferer": {**config["inferer"]["inferer"], "inferer": window}},
        dataset={
            **config["dataset"],
            "data": {
                "_target_": "medvit.data.cases.list_cases",
                "dataset_dir": "@dataset_dir",
                "exclude": "@output_dir",
                "kinds": ["raster"],
            },
        },
        preprocessing={
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image", "reader": "medvit.data.reader.VolumeReader"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {
                    "_target_": "medvit.transforms.extent.RequireChannelsd",
                    "keys": "image",
                    "channels": 3,
                    "advice": "give the photograph in colour",
                },
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS", "labels": None},
                {
                    "_target_": "medvit.transforms.extent.RequireExtentd",
                    "keys": "image",
                    "low": "@smallest_px",
                    "high": "@largest_px",
                    "advice": "resize it",
                },
            ],
        },
    )
    write_weights(
        root,
        {
            "weight": torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]).reshape(3, 3, 1, 1),
            "bias": torch.tensor([0.0, -128.5, -150.25]),
        },
    )
    return root


def takes_photographs(root: Path) -> bool:
    """True for a bundle whose cases are photographs."""
    config = json.loads((root / "configs/inference.json").read_text(encoding="utf-8"))
    return "raster" in config["dataset"]["data"].get("kinds", ())


def write_album(folder: Path, train: int = 4, val: int = 2, size: tuple[int, int] = (420, 400)) -> Path:
    """A labelled cohort of photographs, each with a mask of its field of view; returns the folder."""
    rows = []
    for n in range(train + val):
        pixels = colours(*size, seed=n)
        round_field = np.hypot(*(np.indices(pixels.shape[:2]) - np.array(pixels.shape[:2])[:, None, None] / 2)) < 190
        masks = {"label": (pixels[..., 1] < 90) & round_field, "fov": round_field}
        write_picture(folder / f"image/eye{n}.jpg", pixels * round_field[..., None], quality=95)
        for column, mask in masks.items():
            write_picture(folder / f"{column}/eye{n}.png", mask.astype(np.uint8) * 255)
        files = {"image": f"image/eye{n}.jpg", **{column: f"{column}/eye{n}.png" for column in masks}}
        rows.append({"case_id": f"case{n}", **files, "split": "train" if n < train else "val"})
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return folder
