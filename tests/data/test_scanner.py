"""Real series of scanners, of the hard kinds, against dcm2niix and, where it scales otherwise, against their tags."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dcm2niix_peer import on_grid, volumes_of
from scipy.ndimage import center_of_mass

from medvit.data.dicom import read_dicom
from medvit.data.regrid import Repairs
from medvit.data.space import LPS_TO_RAS
from medvit.data.study import discover
from medvit.errors import UnreadableSeries

SCANNER = Path(__file__).parents[3] / "shared" / "data" / "dicom_scanner"
pytestmark = pytest.mark.skipif(not SCANNER.is_dir(), reason="the shared scanner series are not here")

# of each folder: volumes, shape, and what tells the volumes apart
FOUND = {
    "classic_ge_dwi": (2, (128, 128, 4), [{"b_value": 0.0}, {"b_value": 1000.0}]),
    "classic_siemens_dwi": (2, (192, 192, 4), [{"b_value": 0.0}, {"b_value": 1000.0}]),
    "ct_gantry_tilt": (1, (512, 512, 4), [{}]),
    "enhanced_philips_dwi": (
        4,
        (128, 128, 8),
        [
            {"b_value": 0.0},
            {"b_value": 1300.0, "b_vector": "1 0 0"},
            {"b_value": 1300.0, "b_vector": "0 -1 0"},
            {"b_value": 1300.0, "b_vector": "-0.026 -0.6492 0.7602"},
        ],
    ),
    "enhanced_siemens_xa30": (1, (128, 128, 96), [{}]),
    "mosaic_siemens": (2, (64, 64, 35), None),
    "mosaic_siemens_jpeg": (2, (86, 86, 36), None),
    "mosaic_uih": (17, (64, 64, 20), None),
    "mr_hitachi": (1, (64, 64, 4), [{}]),
    "mr_jpeg2000": (1, (256, 256, 4), [{}]),
}
_TILTED = ("ct_gantry_tilt",)  # dcm2niix shears nothing, see its issue 259


@cache
def _series(folder):
    return tuple(one for one in discover(SCANNER / folder).series if one.kind == "dicom")


@pytest.mark.parametrize("folder", FOUND)
def test_volumes_of_a_real_series(folder):
    count, shape, parameters = FOUND[folder]
    series = _series(folder)
    assert [one.problem for one in series] == [None] * count
    assert [one.space.shape for one in series] == [shape] * count
    assert [(one.volume, one.volumes) for one in series] == [(n, count) for n in range(count)]
    if parameters is not None:
        assert [one.parameters for one in series] == parameters
    else:
        assert all(one.parameters for one in series)
        assert len({tuple(one.parameters.items()) for one in series}) == count
    used = [file for one in series for file in one.origins]
    kept = [file for file in (SCANNER / folder).iterdir() if file.suffix != ".nii"]
    assert set(used) == set(kept)
    if not folder.startswith("enhanced"):
        assert len(used) == len(kept)


@pytest.mark.parametrize("folder", [name for name in FOUND if name not in _TILTED])
def test_every_volume_against_dcm2niix(tmp_path, folder):
    """Same voxels at the same places in the patient; Philips with scaling by RescaleSlope, as the tags say."""
    theirs = volumes_of(SCANNER / folder, tmp_path)
    series = _series(folder)
    assert len(theirs) == len(series)
    for one in series:
        volume = one.read()
        matches = [
            other for array, affine in theirs
            if np.allclose(other := on_grid(volume.space, array, affine), volume.array, rtol=1e-5, atol=1e-3)
        ]  # fmt: skip
        assert len(matches) == 1, f"{len(matches)} volumes of dcm2niix are like {one.name}"
        assert volume.array.std() > 0


def test_volumes_come_in_the_order_of_dcm2niix(tmp_path):
    """That of acquisition, by which b-values and time points are counted."""
    for folder in ("classic_siemens_dwi", "mosaic_siemens_jpeg", "mosaic_uih"):
        theirs = volumes_of(SCANNER / folder, tmp_path / folder)
        for one, (array, affine) in zip(_series(folder), theirs, strict=True):
            volume = one.read()
            expected = on_grid(volume.space, array, affine)
            np.testing.assert_allclose(volume.array, expected, rtol=1e-5, atol=1e-3)


def test_philips_values_are_those_of_the_rescale_tags():
    """Frame by frame, from the pixels as pydicom decodes them."""
    (file,) = _series("enhanced_philips_dwi")[0].origins
    ds = pydicom.dcmread(file)
    stored = ds.pixel_array
    for one in _series("enhanced_philips_dwi"):
        volume = one.read()
        for k, number in enumerate(volume.source.frames):
            transform = ds.PerFrameFunctionalGroupsSequence[number].PixelValueTransformationSequence[0]
            slope, intercept = float(transform.RescaleSlope), float(transform.RescaleIntercept)
            np.testing.assert_allclose(volume.array[:, :, k], stored[number].T * slope + intercept, rtol=1e-6)
            place = ds.PerFrameFunctionalGroupsSequence[number].PlanePositionSequence[0].ImagePositionPatient
            at = LPS_TO_RAS[:3, :3] @ volume.space.world((0, 0, k))
            np.testing.assert_allclose(at, [float(v) for v in place], atol=5e-3)


def test_real_gantry_tilt_lies_where_its_tags_say(tmp_path):
    (one,) = _series("ct_gantry_tilt")
    volume = one.read()
    assert "sheared by 14.00 degrees (gantry tilt)" in one.notes[0]
    for k, file in enumerate(volume.source.files):
        ds = pydicom.dcmread(file)
        orientation = np.reshape([float(v) for v in ds.ImageOrientationPatient], (2, 3))
        position, spacing = np.array(ds.ImagePositionPatient, float), [float(v) for v in ds.PixelSpacing]
        for i, j in ((0, 0), (511, 0), (0, 511), (300, 41)):
            place = position + i * spacing[1] * orientation[0] + j * spacing[0] * orientation[1]
            np.testing.assert_allclose(volume.space.world((i, j, k)), place * (-1, -1, 1), atol=5e-3)
        expected = ds.pixel_array.T * float(ds.RescaleSlope) + float(ds.RescaleIntercept)
        np.testing.assert_array_equal(volume.array[:, :, k], expected)
    (upright,) = discover(SCANNER / "ct_gantry_tilt", repairs=Repairs(tilt="resample")).series
    straight = upright.read()
    axes = straight.space.affine[:3, :3] / np.linalg.norm(straight.space.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    # the centre of mass, to which the air around adds nothing, stays where it is
    centres = []
    for found in (volume, straight):
        mass = found.array.astype(np.float64) - volume.array.min()
        centres.append(found.space.world(np.array(center_of_mass(mass))))
    np.testing.assert_allclose(*centres, atol=0.2)
    with pytest.raises(UnreadableSeries, match=r"14\.00 degrees"):
        read_dicom(volume.source.files)


def test_real_uneven_slices():
    folder = SCANNER / "ct_uneven_slices"
    (one,) = discover(folder).series
    assert one.problem.code == "missing-slice" and len(one.files) == 4
    assert "1 of 5 slices are missing: slices are 5 mm apart, but there is a gap between 28.11 and 38.11" in str(
        one.problem
    )
    (even,) = discover(folder, repairs=Repairs(uneven="resample")).series
    volume = even.read()
    assert volume.array.shape[2] == 5 and volume.space.spacing[2] == pytest.approx(5, abs=0.01)
    parts = discover(folder, repairs=Repairs(uneven="split")).series
    assert sorted(file for part in parts for file in part.files) == sorted(folder.iterdir())
    assert parts[0].space.shape == (512, 512, 3) and parts[0].problem is None
    assert parts[1].problem.code == "single-slice"  # it says nothing about its thickness


@pytest.mark.parametrize("folder", ["mr_hitachi", "mr_jpeg2000"])
def test_a_plain_real_series_against_simpleitk(folder):
    import SimpleITK as sitk

    volume = _series(folder)[0].read()
    image = sitk.ReadImage([str(file) for file in volume.source.files])
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    last = image.TransformIndexToPhysicalPoint([n - 1 for n in image.GetSize()])
    np.testing.assert_allclose(volume.space.world(np.array(volume.space.shape) - 1) * (-1, -1, 1), last, atol=5e-3)


def test_all_of_them_in_one_folder():
    """Nothing mixes, nothing is lost: the same volumes as folder by folder."""
    inventory = discover(SCANNER)
    usable = [one for one in inventory.series if one.kind == "dicom" and one.problem is None]
    assert len(usable) == sum(count for count, _, _ in FOUND.values())
    for folder in FOUND:
        here = [one for one in usable if one.name.startswith(f"{folder}/")]
        assert [one.space for one in here] == [one.space for one in _series(folder)]
