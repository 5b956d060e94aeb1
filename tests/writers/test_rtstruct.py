import numpy as np
import pydicom
import pytest
from data_synthetic import ORIENTATIONS, make_affine
from results_synthetic import KINDS, SHAPE, STRUCTURES, errors_of, labels, no_files, synthetic, write_radiograph

from medvit.data.contours import even_odd
from medvit.data.labels import LabelMap
from medvit.data.segmentations import read_rtstruct
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import OutputError
from medvit.writers.rtstruct import RtStructWriter

WRITER = RtStructWriter("a_bundle", "1.2.3")


def _structures(seed=0, shape=SHAPE):
    """Denser labels: holes, islands in them, and parts that touch at corners."""
    array = np.random.default_rng(seed).choice(3, shape, p=(0.3, 0.6, 0.1)).astype(np.uint8)
    array[:, :, 1] = 0
    return array


def _rasterised(ds, label_map):
    """Masks by exclusive or of all contours of a slice, from the plain attributes."""
    again = np.zeros_like(label_map.array)
    for item in ds.ROIContourSequence:
        for contour in item.get("ContourSequence", ()):
            assert contour.ContourGeometricType == "CLOSED_PLANAR"
            points = np.reshape(contour.ContourData, (-1, 3)).astype(float)
            assert len(points) == contour.NumberOfContourPoints
            voxels = label_map.space.voxels_of(points * (-1, -1, 1))
            k = np.rint(voxels[0, 2]).astype(int)
            np.testing.assert_allclose(voxels[:, 2], k, atol=1e-3)
            again[:, :, k] += np.where(even_odd(voxels[:, :2], again.shape[:2]), item.ReferencedROINumber, 0).astype(
                "u1"
            )
    return again


@pytest.mark.parametrize("orientation", [name for name in ORIENTATIONS if name != "reversed"])
def test_contours_are_the_mask_in_every_orientation(tmp_path, orientation):
    label_map = synthetic(tmp_path / "in", orientation, _structures(), modality="CT")
    path = WRITER.write(label_map, tmp_path / "out" / "1.2")
    assert path == tmp_path / "out" / "1.2_rtstruct.dcm"
    np.testing.assert_array_equal(_rasterised(pydicom.dcmread(path), label_map), label_map.array)
    again = read_rtstruct(path, label_map.space)
    np.testing.assert_array_equal(again.array, label_map.array)
    assert [s.name for s in again.structures] == ["anterior", "posterior", "absent"]
    assert again.notes == ()
    assert errors_of(path) == []


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "classic"])
def test_frames_of_one_file(tmp_path, kind):
    label_map = synthetic(tmp_path / "in", "oblique", _structures(), kind=kind)
    path = WRITER.write(label_map, tmp_path / "out")
    ds = pydicom.dcmread(path)
    np.testing.assert_array_equal(_rasterised(ds, label_map), label_map.array)
    study = ds.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence[0]
    (image,) = study.RTReferencedSeriesSequence[0].ContourImageSequence
    first = pydicom.dcmread(label_map.source.files[0])
    assert image.ReferencedSOPInstanceUID == first.SOPInstanceUID
    contour = ds.ROIContourSequence[0].ContourSequence[0]
    if kind == "mosaic":
        assert "ReferencedFrameNumber" not in image
        assert "ContourImageSequence" not in contour
    else:
        assert sorted(image.ReferencedFrameNumber) == sorted(frame + 1 for frame in label_map.source.frames)
        named = contour.ContourImageSequence[0].ReferencedFrameNumber
        own = first.PerFrameFunctionalGroupsSequence[named - 1].PlanePositionSequence[0].ImagePositionPatient
        normal = np.cross(*label_map.space.lps_affine[:3, :2].T)
        assert abs((np.array(contour.ContourData[:3], float) - np.array(own, float)) @ normal) < 1e-3
    assert errors_of(path) == []


def test_a_tilted_series_keeps_its_planes(tmp_path):
    affine = make_affine("axial")
    affine[1, 2] = 0.9  # about 20 degrees
    label_map = synthetic(tmp_path / "in", array=_structures(), affine=affine)
    path = WRITER.write(label_map, tmp_path / "out")
    np.testing.assert_array_equal(_rasterised(pydicom.dcmread(path), label_map), label_map.array)


def test_a_flipped_and_cropped_label_map_is_drawn_on_the_source(tmp_path):
    whole = synthetic(tmp_path / "in", "oblique", _structures())
    affine = whole.space.affine @ np.diag([-1, 1, 1, 1])
    affine[:3, 3] = whole.space.world((6, 2, 3))
    array = whole.array[2:7, 2:, 3:][::-1]
    part = LabelMap(array, Space.from_affine(array.shape, affine), whole.source, STRUCTURES)
    path = WRITER.write(part, tmp_path / "out")
    np.testing.assert_array_equal(read_rtstruct(path, part.space).array, array)
    expected = np.zeros_like(whole.array)
    expected[2:7, 2:, 3:] = whole.array[2:7, 2:, 3:]
    np.testing.assert_array_equal(_rasterised(pydicom.dcmread(path), whole), expected)


def test_what_the_file_says_about_itself(tmp_path):
    label_map = synthetic(tmp_path / "in")
    ds = pydicom.dcmread(WRITER.write(label_map, tmp_path / "out"))
    first = pydicom.dcmread(label_map.source.files[0])
    assert (ds.Modality, ds.SeriesNumber, ds.SeriesDescription) == ("RTSTRUCT", 1103, "Contours by a_bundle")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert ds[keyword].value == first[keyword].value
    (frame,) = ds.ReferencedFrameOfReferenceSequence
    assert frame.FrameOfReferenceUID == first.FrameOfReferenceUID
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == first.SeriesInstanceUID
    uids = {pydicom.dcmread(file).SOPInstanceUID: k for k, file in enumerate(label_map.source.files)}
    assert {image.ReferencedSOPInstanceUID for image in series.ContourImageSequence} == set(uids)
    assert [roi.ROIName for roi in ds.StructureSetROISequence] == ["anterior", "posterior", "absent"]
    assert {roi.ROIGenerationAlgorithm for roi in ds.StructureSetROISequence} == {"AUTOMATIC"}
    assert [list(item.ROIDisplayColor) for item in ds.ROIContourSequence] == [list(s.color) for s in STRUCTURES]
    assert "ContourSequence" not in ds.ROIContourSequence[2]
    codes = [item.RTROIIdentificationCodeSequence[0].CodeValue for item in ds.RTROIObservationsSequence]
    assert codes == ["5366008"] * 3
    for contour in ds.ROIContourSequence[0].ContourSequence:
        k = uids[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
        height = float(contour.ContourData[2])
        assert height == pytest.approx(label_map.space.affine[2, 3] + 2.5 * k, abs=1e-3)


def test_an_empty_label_map(tmp_path):
    label_map = synthetic(tmp_path / "in", array=np.zeros(SHAPE, np.uint8))
    path = WRITER.write(label_map, tmp_path / "out")
    assert read_rtstruct(path, label_map.space).array.max() == 0
    assert errors_of(path) == []


def test_a_contour_longer_than_explicit_encodings_allow(tmp_path):
    array = np.zeros((120, 110, 2), np.uint8)
    array[1::2, :, 0] = array[:, 55, 0] = 1  # a comb of 11 000 corners
    label_map = synthetic(tmp_path / "in", array=array)
    path = WRITER.write(label_map, tmp_path / "out")
    (contour,) = pydicom.dcmread(path).ROIContourSequence[0].ContourSequence
    array_again = read_rtstruct(path, label_map.space).array
    np.testing.assert_array_equal(array_again, array)
    assert len(contour.get_item("ContourData").value) > 2000


def test_sources_without_a_frame_of_reference_are_refused(tmp_path):
    label_map = synthetic(tmp_path / "in", FrameOfReferenceUID=None)
    _assert_refused(label_map, tmp_path, "but this image has no Frame of Reference UID; write a DICOM SEG instead")
    _assert_refused(write_radiograph(tmp_path / "cr"), tmp_path, "this image has no place in the patient")


def _assert_refused(label_map, folder, message):
    with pytest.raises(OutputError, match=message):
        WRITER.write(label_map, folder / "refused")
    assert no_files(folder)


def test_a_nifti_source_has_no_contours(tmp_path):
    label_map = LabelMap(labels(), Space.from_affine(SHAPE, np.eye(4)), Source("nifti", ()), STRUCTURES)
    assert WRITER.write(label_map, tmp_path / "out") is None


def _move(ds, *distance):
    contour = ds.ROIContourSequence[0].ContourSequence[0]
    contour.ContourData = [v + d for v, d in zip(contour.ContourData, np.tile(distance, 99), strict=False)]


def _shift(ds):
    _move(ds, 0.75, 0, 0)


def _lose(ds):
    del ds.ROIContourSequence[1].ContourSequence[0]


def _lift(ds):
    _move(ds, 0, 0, 1)


def _other_study(ds):
    ds.StudyInstanceUID = "1.2.3"


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_shift, r"\d+ voxels, centre of structure 1"),
        (_lose, r"\d+ voxels, area of structure 2 [\d.]+ mm² instead of"),
        (_lift, 'must lie on the slices of the image, but one of structure "anterior" runs from slice 0.4'),
        (_other_study, "StudyInstanceUID"),
    ],
)
def test_a_file_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch, damage, found):
    build = RtStructWriter._build

    def damaged(*args):
        ds = build(*args)
        damage(ds)
        return ds

    monkeypatch.setattr(RtStructWriter, "_build", damaged)
    array = np.zeros(SHAPE, np.uint8)
    array[2:5, 2:4, 0], array[6:8, 2:4, 3:5] = 1, 2
    _assert_refused(synthetic(tmp_path / "in", array=array), tmp_path, rf"RT Structure Set did not read back .*{found}")
