"""The demo study, and the scripts that a newcomer runs first."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import nibabel
import numpy as np
import pydicom
import pytest

from medvit.data import Series, discover

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared/data/msd_hippocampus/cases.csv"

pytest.importorskip("nilearn", reason="the demo study needs nilearn")


def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_demo_study", ROOT / "scripts/make_demo_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "study"
    demo().make_study(folder)
    return folder


def ras(series: Series) -> tuple[np.ndarray, np.ndarray]:
    """Voxels and affine of a series, turned to RAS."""
    volume = series.read()
    image = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array, volume.space.affine))
    return np.asarray(image.dataobj), image.affine


# --- the study


def test_the_series_are_one_image_in_three_ways(study: Path) -> None:
    axial, sagittal, nifti = discover(study).series
    assert [s.name for s in (axial, sagittal, nifti)] == ["dicom/1_T1_axial", "dicom/2_T1_sagittal", "left_hippocampus"]
    assert [s.space.orientation for s in (axial, sagittal, nifti) if s.space] == ["LPS", "PIR", "RAS"]
    assert not any(s.problem or s.notes for s in (axial, sagittal, nifti))
    voxels, affine = ras(nifti)
    for one in (axial, sagittal):
        others, there = ras(one)
        np.testing.assert_array_equal(others, voxels)
        np.testing.assert_allclose(there, affine, atol=1e-6)


def test_it_is_the_left_side_of_the_template(study: Path) -> None:
    from nilearn.datasets import load_mni152_template

    image = nibabel.load(study / "left_hippocampus.nii.gz")
    assert image.shape == (37, 49, 46)
    template = load_mni152_template(resolution=1)
    world = image.affine @ (18, 24, 22, 1)
    assert world[0] < 0  # RAS
    i, j, k = np.rint(np.linalg.inv(template.affine) @ world)[:3].astype(int)
    there = np.asarray(template.dataobj[i - 2 : i + 3, j - 2 : j + 3, k - 2 : k + 3])
    here = np.asarray(image.dataobj)[16:21, 22:27, 20:25]
    np.testing.assert_allclose(here / 1000, there, atol=5e-4)
    assert there.std() > 0.01


def test_headers_name_nobody_and_belong_together(study: Path) -> None:
    datasets = [pydicom.dcmread(file) for file in sorted((study / "dicom").iterdir())]
    assert {(str(d.PatientName), d.PatientID, d.PatientBirthDate) for d in datasets} == {("Demo^Template", "DEMO", "")}
    assert len({d.SOPInstanceUID for d in datasets}) == len(datasets) == 46 + 37
    assert len({d.SeriesInstanceUID for d in datasets}) == 2
    assert len({d.StudyInstanceUID for d in datasets}) == len({d.FrameOfReferenceUID for d in datasets}) == 1


def test_the_licence_travels_with_the_images(study: Path) -> None:
    text = " ".join((study / "ATTRIBUTION.txt").read_text(encoding="utf-8").split())
    assert "Copyright (C) 1993-2004 Louis Collins, McConnell Brain Imaging Centre" in text
    assert "Fonov VS" in text
    assert "The patient in the DICOM headers does not exist." in text


def test_making_it_again_changes_nothing(study: Path) -> None:
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    demo().make_study(study)
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(not CASES.is_file(), reason="the data set is not beside this checkout")
def test_training_crops_look_like_the_left_side() -> None:
    """What the box of the demo, and the card of the bundle, rest on."""
    from nilearn.datasets import load_mni152_template

    template = load_mni152_template(resolution=1)
    start = (np.array((-65, -75, -55)) - template.affine[:3, 3]).astype(int)
    voxels = np.asarray(template.dataobj)
    np.testing.assert_array_equal(voxels, voxels[::-1])  # symmetric: a right side is a left one in the mirror
    left = voxels[tuple(slice(a, a + n) for a, n in zip(start, (70, 110, 85), strict=True))]
    with CASES.open(newline="", encoding="utf-8") as file:
        images = [CASES.parent / row["image"] for row in csv.DictReader(file)][::25]
    for path in images:
        crop = np.asarray(nibabel.load(path).dataobj, dtype=float)
        assert best_match(left, crop) > best_match(left[::-1], crop), path.name


def best_match(image: np.ndarray, crop: np.ndarray) -> float:
    """Largest normalised cross-correlation over all places of ``crop`` inside ``image``."""
    from scipy.signal import fftconvolve

    def slide(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
        return fftconvolve(values, kernel[::-1, ::-1, ::-1], mode="valid")

    ones = np.ones(crop.shape)
    centred = crop - crop.mean()
    spread = slide(image**2, ones) - slide(image, ones) ** 2 / crop.size
    scores = slide(image, centred) / np.sqrt(np.maximum(spread, 1e-9) * (centred**2).sum())
    return float(scores.max())


# --- the scripts


def checkout(folder: Path, python: str | None = None) -> Path:
    """A copy of the checkout whose environment is this one, or ``python``, a stand-in for it that logs its calls."""
    (folder / "scripts").mkdir(parents=True)
    for name in ("quickstart", "venv.sh", "make_demo_study.py"):
        (folder / "scripts" / name).write_bytes((ROOT / "scripts" / name).read_bytes())
    (folder / "scripts/quickstart").chmod(0o755)
    (folder / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    tools = folder / ".venv/bin"
    tools.mkdir(parents=True)
    real = {"python": "", "medvit": "-c 'from medvit.cli import main; main()'"}
    for name, program in real.items():
        (tools / name).write_text(python or f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        (tools / name).chmod(0o755)
    if python is None:
        (folder / ".venv/.installed-demo").write_text(f"{folder}\n{(folder / 'pyproject.toml').read_text()}")
    return folder


def shell(command: list[str | Path], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )


def test_quickstart_runs_from_anywhere_and_again(tmp_path: Path) -> None:
    root = checkout(tmp_path / "check out")
    (root / "bundles").symlink_to(ROOT / "bundles")
    for _ in range(2):
        done = shell([root / "scripts/quickstart", "my results"], tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    results = tmp_path / "my results/results"
    told = [Path(line.strip()) for line in done.stdout.splitlines() if line.startswith("    ")]
    assert len(told) == 3 + 2 + 3 + 1 + 1  # masks, SEG, pictures, table, manifest
    assert all(path.is_file() and path.is_relative_to(results) for path in told)
    assert "left_hippocampus\tanterior hippocampus\t" in done.stdout
    with (results / "volumes.csv").open(newline="") as file:
        volumes = {(row["case"], row["label"]): row["volume_mm3"] for row in csv.DictReader(file)}
    for label in "12":  # the same image three times
        assert len({volumes[case, label] for case in {case for case, _ in volumes}}) == 1


def test_quickstart_fails_when_the_prediction_does(tmp_path: Path) -> None:
    root = checkout(tmp_path / "checkout")
    done = shell([root / "scripts/quickstart"], tmp_path)
    assert done.returncode == 1
    assert "bundles/hippocampus_swin_unetr: no such bundle" in done.stderr
    assert (root / "quickstart-output/study/left_hippocampus.nii.gz").is_file()


@pytest.mark.parametrize("arguments", [("--help",), ("one", "two")])
def test_quickstart_says_how_it_is_used(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = shell([ROOT / "scripts/quickstart", *arguments], tmp_path)
    assert done.returncode == 2
    assert "[OUTPUT]" in done.stderr


def test_the_environment_is_installed_when_it_must_be(tmp_path: Path) -> None:
    stand_in = '#!/bin/sh\necho "$@" >>"$CALLS"\ncase "$*" in *install*) exit "$INSTALL";; esac\n'
    root = checkout(tmp_path / "checkout", stand_in)

    def installs(folder: Path, outcome: int = 0) -> int:
        calls = tmp_path / "calls"
        calls.write_text("")
        script = f'set -euo pipefail; ROOT="{folder}"; source "$ROOT/scripts/venv.sh"; ensure_venv demo'
        done = shell(["bash", "-c", script], tmp_path, CALLS=str(calls), INSTALL=str(outcome))
        assert done.returncode == outcome, done.stderr
        return calls.read_text().count(f"install --disable-pip-version-check --editable {folder}[demo]")

    assert installs(root, outcome=1) == 1
    assert installs(root) == 1  # since the first one failed
    assert installs(root) == 0
    with (root / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert installs(root) == 1
    assert installs(root) == 0
    moved = root.rename(tmp_path / "moved")
    assert installs(moved) == 1
    assert installs(moved) == 0
