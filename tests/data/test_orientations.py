"""From DICOM in every orientation to NIfTI, to a mask, to SEG and RTSTRUCT and back, checked by independent readers.

Every voxel holds a number of its own, so that a reader says of each where it thinks it is, in mm.
"""

from __future__ import annotations

from itertools import permutations, product

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from data_synthetic import write_dicom_series
from dicom_synthetic import measures_group, nested, orientation_group, position_group, write_multiframe
from results_synthetic import STRUCTURES

from medvit.data.labels import LabelMap
from medvit.data.segmentations import read_dicom_seg, read_rtstruct
from medvit.data.space import Space
from medvit.data.study import discover
from medvit.writers.convert import convert
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter
from medvit.writers.rtstruct import RtStructWriter

SHAPE, SPACING, ORIGIN = (9, 7, 6), (0.75, 1.25, 2.5), (-31.5, 17.25, -60.0)
HALF_A_VOXEL = 0.5 * min(SPACING)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def _axes():
    """All 48 ways to lay columns, rows and slices along the axes of the patient."""
    for order in permutations(range(3)):
        for signs in product((1, -1), repeat=3):
            yield np.eye(3)[:, order] * signs


def _oblique(seed):
    """A random rotation; of odd seeds a left-handed one, whose slices run against the normal."""
    turn = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    turn[:, 2] *= np.sign(np.linalg.det(turn)) * (-1) ** seed
    return turn


def _name(directions):
    return "".join(nibabel.aff2axcodes(nibabel.affines.from_matvec(directions)))


AXES = {_name(directions): directions for directions in _axes()}
OBLIQUE = {f"oblique{seed}": _oblique(seed) for seed in range(20)}
ALL = AXES | OBLIQUE


def _affine(directions):
    return nibabel.affines.from_matvec(directions * SPACING, ORIGIN)


def _numbered():
    """Voxels 0 to 377, plus 1000 or 2000 in two structures without any symmetry, one with a hole."""
    array = np.random.default_rng(5).permutation(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    array[1:6, 1:4, 1:5] += 1000
    array[3, 2, 2:4] -= 1000
    array[5, 3, 4] -= 1000
    array[6:8, 4:7, 2:4] += 2000
    array[7, 6, 3] -= 2000
    return array


ARRAY = _numbered()


def _points(affine):
    """Where the voxels numbered 0, 1, ... really are, (n, 3) RAS+ mm, and the structure of each."""
    voxels = np.argwhere(ARRAY >= 0)
    values = ARRAY[tuple(voxels.T)]
    order = np.argsort(values % 1000)
    return nibabel.affines.apply_affine(affine, voxels)[order], (values // 1000)[order]


def _assert_placed(array, affine, truth):
    """Every numbered voxel of ``array`` (i, j, k) lies where it really is."""
    voxels = np.argwhere(array >= 0)
    order = np.argsort(array[tuple(voxels.T)] % 1000)
    found = nibabel.affines.apply_affine(affine, voxels)[order]
    np.testing.assert_array_equal(np.sort(array, axis=None), np.sort(ARRAY, axis=None))
    np.testing.assert_allclose(found, _points(truth)[0], atol=1e-3)


def _assert_structures(points, labels, truth):
    """Labelled points (n, 3) RAS+ mm are those of the structures, and so are their centroids."""
    where, structure = _points(truth)
    for number in (1, 2):
        found, expected = points[labels == number], where[structure == number]
        assert np.linalg.norm(found.mean(axis=0) - expected.mean(axis=0)) < HALF_A_VOXEL
        assert len(found) == len(expected)
        distances = np.linalg.norm(found[:, None] - expected[None], axis=-1)
        assert distances.min(axis=0).max() < 2e-3
        assert distances.min(axis=1).max() < 2e-3


def _labelled(array, affine):
    voxels = np.argwhere(array > 0)
    return nibabel.affines.apply_affine(affine, voxels), array[tuple(voxels.T)]


def _by_itk(image):
    """Array (i, j, k) and RAS+ affine of a SimpleITK image."""
    matrix = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    return sitk.GetArrayFromImage(image).T, LPS @ nibabel.affines.from_matvec(matrix, image.GetOrigin())


def _frames_of(seg):
    """Labelled points of a SEG by the plain attributes of each frame."""
    found = []
    for n, frame in enumerate(seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)):
        own, shared = seg.PerFrameFunctionalGroupsSequence[n], seg.SharedFunctionalGroupsSequence[0]
        across, down = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
        row_step, column_step = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
        rows, columns = np.nonzero(frame)
        corner = np.array(own.PlanePositionSequence[0].ImagePositionPatient, float)
        points = corner + np.outer(columns * column_step, across) + np.outer(rows * row_step, down)
        found.append((points, np.full(len(points), own.SegmentIdentificationSequence[0].ReferencedSegmentNumber)))
    points, labels = map(np.concatenate, zip(*found, strict=True))
    return points * (-1, -1, 1), labels


def _contoured(rtstruct, truth):
    """Labelled points of an RTSTRUCT: those of the true voxel centres that its contours go round, by ray casting."""
    where = _points(truth)[0]
    labels = np.zeros(len(where), int)
    unit = truth[:3, :3] / np.linalg.norm(truth[:3, :3], axis=0)
    normal = np.cross(unit[:, 0], unit[:, 1])
    for item in rtstruct.ROIContourSequence:
        for contour in item.get("ContourSequence", ()):
            corners = np.reshape(np.array(contour.ContourData, float), (-1, 3)) * (-1, -1, 1)
            on_plane = np.abs((where - corners[0]) @ normal) < 1e-2
            assert np.ptp(corners @ normal) < 1e-3
            (u0, v0), (u, v) = (corners @ unit[:, :2]).T, (where @ unit[:, :2]).T
            u1, v1 = np.roll(u0, -1), np.roll(v0, -1)
            inside = np.zeros(len(where), bool)
            for a, b, c, d in zip(u0, v0, u1, v1, strict=True):
                if (b <= d and abs(d - b) > 1e-9) or b > d + 1e-9:
                    crosses = (v >= min(b, d)) & (v < max(b, d))
                    inside ^= crosses & (u < a + (v - b) * (c - a) / (d - b))
            labels += np.where(on_plane & inside, int(item.ReferencedROINumber), 0)
    return where[labels > 0], labels[labels > 0]


def _converted(tmp_path):
    """The one series of ``in``, as a volume and as the NIfTI file made of it."""
    inventory = discover(tmp_path / "in")
    (series,), (record,) = inventory.series, convert(inventory, tmp_path / "out")
    assert record["output"], record
    return record, nibabel.load(record["output"]), series.read()


def _mask(image, volume, canonical):
    """A label map made of the NIfTI file alone, on its grid or turned to RAS+; its source is that of the volume."""
    image = nibabel.as_closest_canonical(image) if canonical else image
    array = (np.asanyarray(image.dataobj) // 1000).astype(np.uint8)
    return LabelMap(array, Space.from_affine(array.shape, image.affine), volume.source, STRUCTURES)


def _assert_results(label_map, volume, truth, folder, regular=True):
    """SEG, RTSTRUCT and NIfTI of a label map lie where the structures are, whoever reads them."""
    seg = DicomSegWriter("a_bundle", "1").write(label_map, folder / "result")
    _assert_structures(*_frames_of(pydicom.dcmread(seg)), truth)
    if regular:
        found = highdicom.seg.segread(seg).get_volume(combine_segments=True)
        _assert_structures(*_labelled(found.array, LPS @ found.affine), truth)
        alone = read_dicom_seg(seg)
        _assert_structures(*_labelled(alone.array, alone.space.affine), truth)
    rtstruct = RtStructWriter("a_bundle", "1").write(label_map, folder / "result")
    _assert_structures(*_contoured(pydicom.dcmread(rtstruct), truth), truth)
    for n, again in enumerate((read_dicom_seg(seg, volume), read_rtstruct(rtstruct, volume))):
        path = NiftiLabelWriter().write(again, folder / f"again{n}")
        if regular:
            _assert_structures(*_labelled(*_by_itk(sitk.ReadImage(path))), truth)
        image = nibabel.load(path)
        _assert_structures(*_labelled(np.asanyarray(image.dataobj), image.affine), truth)


@pytest.mark.parametrize("name", ALL)
def test_every_orientation_survives(name, tmp_path):
    truth = _affine(ALL[name])
    files = write_dicom_series(tmp_path / "in", ARRAY, truth)
    record, image, volume = _converted(tmp_path)
    assert record["status"] == "ok"
    np.testing.assert_allclose(record["spacing"], SPACING, atol=1e-4)
    if name in AXES:
        right_handed = np.linalg.det(AXES[name]) > 0
        turned = dict(zip("RLAPSI", "LRPAIS", strict=True))[name[2]]
        assert record["orientation"] == name[:2] + (name[2] if right_handed else turned)
    _assert_placed(np.asanyarray(image.dataobj), image.affine, truth)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(files[0].parent)))
    for other in (reader.Execute(), sitk.ReadImage(record["output"])):
        _assert_placed(*_by_itk(other), truth)
    turned_round = list(ALL).index(name) % 2 == 1
    _assert_results(_mask(image, volume, turned_round), volume, truth, tmp_path)


@pytest.mark.parametrize("name", ["LPS", "IAR", "oblique3"])
def test_a_tilted_series_survives(name, tmp_path):
    truth = _affine(ALL[name])
    truth[:3, 2] += 0.35 * truth[:3, 1]
    write_dicom_series(tmp_path / "in", ARRAY, truth)
    record, image, volume = _converted(tmp_path)
    assert record["status"] == "warning"
    assert "gantry tilt" in record["reason"]
    _assert_placed(np.asanyarray(image.dataobj), image.affine, truth)
    _assert_results(_mask(image, volume, canonical=False), volume, truth, tmp_path, regular=False)


@pytest.mark.parametrize("name", ["LPS", "ARI", "PSL", "oblique4", "oblique7"])
def test_a_multi_frame_object_survives(name, tmp_path):
    truth = _affine(ALL[name])
    order = [4, 1, 5, 0, 3, 2]
    file = write_multiframe(
        tmp_path / "in" / "enhanced.dcm",
        [ARRAY[:, :, k] for k in order],
        [position_group(truth, k) | {"FrameContentSequence": nested(DimensionIndexValues=[k + 1])} for k in order],
        measures_group(truth) | orientation_group(truth),
        DimensionIndexSequence=[nested(DimensionIndexPointer=0x00200032, FunctionalGroupPointer=0x00209113)],
    )
    record, image, volume = _converted(tmp_path)
    assert record["status"] == "ok"
    _assert_placed(np.asanyarray(image.dataobj), image.affine, truth)
    seen = highdicom.imread(file).get_volume()
    _assert_placed(seen.array.astype(int), LPS @ seen.affine, truth)
    _assert_results(_mask(image, volume, canonical=True), volume, truth, tmp_path)
