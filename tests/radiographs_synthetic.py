"""X-rays for tests, tables of them, and commands as a user types them."""

from __future__ import annotations

import csv
import os
import subprocess
import sys

import numpy as np
from data_synthetic import slice_dataset
from PIL import Image

DX = "1.2.840.10008.5.1.4.1.1.1.1"
MONAI_RUN = ("-m", "monai.bundle", "run")


def shadows(width=300, height=220, seed=0):
    """Smooth random uint8 pixels ``(row, column)`` that use the whole range."""
    coarse = np.random.default_rng(seed).random((9, 12))
    pixels = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    return np.round(255 * (pixels - pixels.min()) / np.ptp(pixels)).astype(np.uint8)


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_radiograph(path, pixels, number=1, **tags):
    """A DX file of ``(row, column)`` uint8 pixels that names a patient."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = slice_dataset(np.ascontiguousarray(pixels.T))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DX
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{number}"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = "1.2.4", "1.2.5", 3
    ds.PatientName, ds.Modality, ds.SeriesDescription = "Zyxwvut^Qponmlk", "DX", "chest"
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient"):
        if keyword in ds:
            delattr(ds, keyword)
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def write_x_rays(folder, train=8, val=4):
    """Labelled X-rays of several sizes with their ``cases.csv``."""
    rows = []
    for n in range(train + val):
        write_png(folder / f"images/child{n}.png", shadows(120 + 10 * n, 130, seed=n))
        split, subtype = "train" if n < train else "val", ("bacteria", "virus")[n % 2]
        rows.append(
            {
                "case_id": f"child{n}",
                "image": f"images/child{n}.png",
                "split": split,
                "subtype": subtype,
                "patient_group": f"p{n}",
            }
        )
    with (folder / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def rows_of(path):
    """Rows of a table, by case."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["case"]: row for row in csv.DictReader(file)}


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def command(cwd, *words, **options):
    """Run Python with words and ``--key value`` in a folder; returns all that it said."""
    typed = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "CUDA_VISIBLE_DEVICES": ""}
    whole = [sys.executable, *map(str, words), *typed]
    done = subprocess.run(whole, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr
