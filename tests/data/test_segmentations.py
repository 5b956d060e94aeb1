import itertools

import highdicom
import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from pydicom.dataset import Dataset
from results_synthetic import SHAPE, STRUCTURES, labels, synthetic, write_radiograph

from medvit.data.labels import LabelMap
from medvit.data.segmentations import read_dicom_seg, read_rtstruct
from medvit.data.space import Space
from medvit.data.volume import Volume
from medvit.errors import SpaceMismatch, UnreadableFile
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.rtstruct import RtStructWriter

SEG, CONTOURS = DicomSegWriter("a_bundle", "1.2.3"), RtStructWriter("a_bundle", "1.2.3")


def _written(tmp_path, writer=SEG, orientation="oblique", **options):
    label_map = synthetic(tmp_path / "in", orientation, **options)
    return label_map, writer.write(label_map, tmp_path / "out")


def _edited(path, edit):
    ds = pydicom.dcmread(path)
    edit(ds)
    ds.save_as(path)
    return path


def _third_party_seg(tmp_path, array, affine=None, kind="BINARY", **options):
    """As somebody else would write it with highdicom: all segments as channels ``(column, row, slice, segment)``."""
    affine = make_affine("coronal") if affine is None else affine
    files = write_dicom_series(tmp_path / "in", phantom(array.shape[:3]), affine)
    images = [pydicom.dcmread(file) for file in files]
    code = highdicom.sr.CodedConcept("5366008", "SCT", "Hippocampus")
    segments = [
        highdicom.seg.SegmentDescription(n, f"part {n}", code, code, "MANUAL") for n in range(1, array.shape[3] + 1)
    ]
    uids = {f"{name}_instance_uid": highdicom.UID() for name in ("series", "sop")}
    seg = highdicom.seg.Segmentation(
        images, array.transpose(2, 1, 0, 3), kind, segments, series_number=1, instance_number=1, manufacturer="x",
        manufacturer_model_name="x", software_versions="1", device_serial_number="1", **uids, **options,
    )  # fmt: skip
    seg.save_as(tmp_path / "third.dcm")
    return Space.from_affine(array.shape[:3], affine, images[0].FrameOfReferenceUID), tmp_path / "third.dcm"


def test_a_segmentation_reads_back_with_its_structures(tmp_path):
    label_map, path = _written(tmp_path)
    found = read_dicom_seg(path, Volume(np.zeros(SHAPE, np.float32), label_map.space, label_map.source))
    np.testing.assert_array_equal(found.array, label_map.array)
    assert (found.structures, found.source, found.space) == (STRUCTURES, label_map.source, label_map.space)


def test_without_an_image_the_grid_is_that_of_the_frames(tmp_path):
    label_map, path = _written(tmp_path)  # its second slice is empty, so there is no frame of it
    found = read_dicom_seg(path)
    np.testing.assert_array_equal(found.array, label_map.array)
    assert found.space.distance_to(label_map.space) < 1e-4
    assert found.space.frame_of_reference == label_map.space.frame_of_reference
    first = pydicom.dcmread(label_map.source.files[0])
    assert (found.source.kind, found.source.files) == ("dicom-segmentation", (path,))
    assert (found.source.study_uid, found.source.series_uid) == (first.StudyInstanceUID, first.SeriesInstanceUID)


def test_a_tilted_one_and_one_of_a_single_slice_too(tmp_path):
    tilted = make_affine("axial")
    tilted[1, 2] = 0.9
    for name, array in {"tilted": labels(), "single": labels((9, 7, 1))}.items():
        label_map, path = _written(tmp_path / name, array=array, affine=tilted if name == "tilted" else None)
        found = read_dicom_seg(path)
        np.testing.assert_array_equal(found.array, label_map.array)
        assert found.space.distance_to(label_map.space) < 1e-4


def test_a_grid_that_is_turned_and_larger(tmp_path):
    label_map, path = _written(tmp_path)
    larger = label_map.space.affine.copy()
    larger[:3, :3] = label_map.space.affine[:3, [2, 0, 1]] * (-1, 1, 1)
    larger[:3, 3] = label_map.space.world((-2, 0, 7))
    found = read_dicom_seg(path, Space.from_affine((9, 12, 7), larger))
    expected = np.zeros((9, 12, 7), np.uint8)
    expected[2:8, 2:11] = label_map.array.transpose(2, 0, 1)[::-1]
    np.testing.assert_array_equal(found.array, expected)


@pytest.mark.parametrize("axes", list(itertools.permutations(range(3))))
def test_all_48_turns_of_a_grid_against_its_source_and_back(tmp_path, axes):
    source = synthetic(tmp_path / "in", "oblique")
    for number, signs in enumerate(itertools.product((1, -1), repeat=3)):
        affine = source.space.affine.copy()
        affine[:3, :3] = source.space.affine[:3, axes] * signs
        start = [n - 1 if signs[axes.index(a)] < 0 else 0 for a, n in enumerate(SHAPE)]
        affine[:3, 3] = source.space.world(start)
        array = source.array.transpose(axes)[tuple(slice(None, None, s) for s in signs)]
        space = Space.from_affine(array.shape, affine, source.space.frame_of_reference)
        turned = LabelMap(array, space, source.source, STRUCTURES)
        for writer, read in ((SEG, read_dicom_seg), (CONTOURS, read_rtstruct)):
            path = writer.write(turned, tmp_path / str(number))
            np.testing.assert_array_equal(read(path, space).array, array)
            np.testing.assert_array_equal(read(path, source.space).array, source.array)


def test_chosen_segments_and_fractions(tmp_path):
    array = np.zeros((*SHAPE, 2))
    array[1:4, 2, 3, 0], array[3:6, 2, 3, 1] = (0.3, 0.6, 1), (1, 0.6, 0.3)
    space, path = _third_party_seg(tmp_path, array, kind="FRACTIONAL", fractional_type="PROBABILITY")
    assert read_dicom_seg(path, space, segments=["part 2"]).array[:, 2, 3].tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 0]
    assert read_dicom_seg(path, space, segments=[1], threshold=0.25).array.sum() == 3
    assert read_dicom_seg(path, space, segments=[1], threshold=1).array.sum() == 1
    with pytest.raises(ValueError, match="over 0 and up to 1, got 0"):
        read_dicom_seg(path, space, threshold=0)
    with pytest.raises(UnreadableFile, match=r"\['part 3'\] are to be read, but .* are 1 \"part 1\", 2 \"part 2\""):
        read_dicom_seg(path, space, segments=["part 3"])


def test_overlapping_segments_are_refused_together_and_read_one_by_one(tmp_path):
    array = np.zeros((*SHAPE, 2), np.uint8)
    array[1:4, 2, 3, 0], array[3:6, 2, 3, 1] = 1, 1
    space, path = _third_party_seg(tmp_path, array)
    with pytest.raises(UnreadableFile, match='"part 1" and "part 2" in 1 voxels; read them one after the other'):
        read_dicom_seg(path, space)
    for number in (1, 2):
        found = read_dicom_seg(path, space, segments=[number])
        np.testing.assert_array_equal(found.array, number * array[..., number - 1])
        assert [s.label for s in found.structures] == [number]


def test_a_radiograph_is_read_by_its_pixels(tmp_path):
    label_map = write_radiograph(tmp_path / "in")
    path = SEG.write(label_map, tmp_path / "out")
    found = read_dicom_seg(path)
    np.testing.assert_array_equal(found.array, label_map.array)
    assert found.space.unit == "px"
    with pytest.raises(SpaceMismatch, match="no place in the patient, so an image of its 9 x 7 pixels is needed"):
        read_dicom_seg(path, Space.from_affine((7, 9, 1), np.eye(4)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a @ np.diag([2, 1, 1, 1]), "frame 1 does not lie on the voxels of .* another voxel size or direct"),
        (lambda a: a @ np.diag([1, 1, 0.5, 1]), "another voxel size or direction"),  # would fit slice by slice
        (lambda a: a + np.array([[0, 0, 0, 0.3]] * 3 + [[0] * 4]), r"frame 1 .* it is 0\.\d+ voxels off; give the im"),
        (lambda a: a + _moved(a), "beyond the grid of 9 x 7 x 6 voxels"),
    ],
)
def test_another_grid_is_refused(tmp_path, change, message):
    label_map, path = _written(tmp_path, orientation="axial")
    shape = (9, 7, 12) if "direction" in message and "frame" not in message else SHAPE
    with pytest.raises(SpaceMismatch, match=message):
        read_dicom_seg(path, Space.from_affine(shape, change(label_map.space.affine)))


def _moved(affine):
    result = np.zeros((4, 4))
    result[:3, 3] = 5 * affine[:3, 0]
    return result


def test_another_frame_of_reference_is_refused(tmp_path):
    for writer, read in ((SEG, read_dicom_seg), (CONTOURS, read_rtstruct)):
        label_map, path = _written(tmp_path / writer.suffix, writer)
        other = Space.from_affine(SHAPE, label_map.space.affine, "1.2.3")
        with pytest.raises(SpaceMismatch, match=r"must lie in the image's frame of reference 1\.2\.3, but lies in"):
            read(path, other)


@pytest.mark.parametrize("read", [read_dicom_seg, read_rtstruct])
def test_other_files_are_refused(tmp_path, read):
    label_map, seg = _written(tmp_path)
    contours = CONTOURS.write(label_map, tmp_path / "out")
    space = label_map.space
    other = contours if read is read_dicom_seg else seg
    with pytest.raises(UnreadableFile, match=r"is needed, but this is: (RT Structure Set|Segmentation) Storage"):
        read(other, space)
    (tmp_path / "text").write_text("no DICOM")
    with pytest.raises(UnreadableFile, match=r"not a readable DICOM file \(InvalidDicomError\)"):
        read(tmp_path / "text", space)
    with pytest.raises(UnreadableFile, match="cannot be opened: No such file"):
        read(tmp_path / "none", space)


def test_damaged_files_are_refused_without_quoting_them(tmp_path):
    label_map, path = _written(tmp_path)
    _edited(path, lambda ds: delattr(ds, "SegmentSequence"))
    with pytest.raises(UnreadableFile, match=r"damaged or not of the standard \(AttributeError\)"):
        read_dicom_seg(path, label_map.space)
    path = CONTOURS.write(label_map, tmp_path / "out")
    _edited(path, lambda ds: setattr(ds.ROIContourSequence[0].ContourSequence[0], "ContourData", [1, 2, 3, 4]))
    with pytest.raises(UnreadableFile, match=r"damaged or not of the standard \(ValueError\)"):
        read_rtstruct(path, label_map.space)


def test_unevenly_spaced_frames_need_their_image(tmp_path):
    _, path = _written(tmp_path, orientation="axial")

    def uneven(ds):
        del ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
        for frame in ds.PerFrameFunctionalGroupsSequence:
            position = frame.PlanePositionSequence[0]
            x, y, z = map(float, position.ImagePositionPatient)
            position.ImagePositionPatient = [x, y, z + 1.2 * (z > -52)]

    with pytest.raises(UnreadableFile, match="not evenly spaced, or it does not say how; give its image"):
        read_dicom_seg(_edited(path, uneven))


def test_structures_read_back_with_names_colours_and_codes(tmp_path):
    label_map, path = _written(tmp_path, CONTOURS)
    found = read_rtstruct(path, Volume(np.zeros(SHAPE, np.float32), label_map.space, label_map.source))
    np.testing.assert_array_equal(found.array, label_map.array)
    assert found.source == label_map.source
    assert [(s.name, s.color, s.type) for s in found.structures] == [(s.name, s.color, s.type) for s in STRUCTURES]
    found = read_rtstruct(path, label_map.space, structures=["posterior"])
    np.testing.assert_array_equal(found.array, label_map.array == 2)
    assert [(s.label, s.name) for s in found.structures] == [(1, "posterior")]
    first = pydicom.dcmread(label_map.source.files[0])
    assert (found.source.kind, found.source.series_uid) == ("dicom-segmentation", first.SeriesInstanceUID)
    with pytest.raises(
        UnreadableFile, match=r"\['liver'\] are to be read, but the structures in it are 1 \"anterior\""
    ):
        read_rtstruct(path, label_map.space, structures=["liver"])


def _contour(space, k, corners, kind="CLOSED_PLANAR"):
    """A contour of voxel coordinates (column, row) on slice ``k``."""
    contour = Dataset()
    points = space.world(np.c_[corners, np.full(len(corners), k)]) * (-1, -1, 1)
    contour.ContourGeometricType, contour.NumberOfContourPoints = kind, len(points)
    contour.ContourData = [round(float(v), 5) for v in points.ravel()]
    return contour


def _ellipse(center, radius, start=0):
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False) + start
    return np.array(center) + radius * np.stack([np.cos(angle), np.sin(angle)], 1)


def _drawn_by_others(tmp_path, contours, shape=(24, 20, 6)):
    """A structure set whose first ROI holds ``contours(space)`` and nothing of what is optional."""
    label_map, path = _written(tmp_path, CONTOURS, array=np.zeros(shape, np.uint8))

    def redraw(ds):
        for keyword in ("RTROIObservationsSequence", "ApprovalStatus"):
            delattr(ds, keyword)
        ds.ROIContourSequence = ds.ROIContourSequence[:1]
        del ds.ROIContourSequence[0].ROIDisplayColor
        ds.StructureSetROISequence[0].ROINumber = ds.ROIContourSequence[0].ReferencedROINumber = 17
        ds.ROIContourSequence[0].ContourSequence = contours(label_map.space)

    return label_map.space, _edited(path, redraw)


def test_contours_of_others_several_per_slice_with_holes(tmp_path):
    def draw(space):
        outer, hole, island = _ellipse((8, 9), 6.3), _ellipse((8.2, 9), 3.4)[::-1], _ellipse((18.3, 5), 2.6)
        point = _contour(space, 2, [(3, 3)], "POINT")
        return [_contour(space, 2, hole), _contour(space, 2, outer), _contour(space, 4, island), point]

    space, path = _drawn_by_others(tmp_path, draw)
    found = read_rtstruct(path, space)
    i, j = np.mgrid[:24, :20]
    expected = np.zeros(space.shape, bool)
    expected[:, :, 2] = (np.hypot(i - 8, j - 9) < 6.3) & (np.hypot(i - 8.2, j - 9) >= 3.4)
    expected[:, :, 4] = np.hypot(i - 18.3, j - 5) < 2.6
    assert np.count_nonzero((found.array > 0) != expected) <= 2  # pixels that the chords of 90 corners pass by
    assert found.notes == ('structure "anterior": contours of type POINT enclose nothing and were left out',)
    assert [s.name for s in found.structures] == ["anterior", "posterior", "absent"]
    assert read_rtstruct(path, space, structures=[17]).array.sum() == found.array.sum()


@pytest.mark.parametrize(
    ("corners", "kind", "note"),
    [
        ([(1, 1), (3, 1)], "CLOSED_PLANAR", "contours of fewer than 3 points were left out"),
        ([(1.1, 1.1), (1.4, 1.1), (1.2, 1.4)], "CLOSED_PLANAR", "slice 1: 1 contours hold no voxel centre"),
        ([(-9.5, 1.5), (1.5, 1.5), (1.5, 4.5)], "CLOSED_PLANAR", "what lies beyond the edge of the image was cut off"),
        ([(1, 1), (3, 1), (3, 3)], "OPEN_PLANAR", "contours of type OPEN_PLANAR enclose nothing"),
    ],
)
def test_what_is_left_out_is_noted(tmp_path, corners, kind, note):
    space, path = _drawn_by_others(tmp_path, lambda space: [_contour(space, 1, corners, kind)])
    notes = read_rtstruct(path, space).notes
    assert any(note in found for found in notes), notes


def test_exclusive_contours(tmp_path):
    squares = [[(a, a), (b, a), (b, b), (a, b)] for a, b in ((0.5, 4.5), (2.5, 6.5))]
    space, path = _drawn_by_others(tmp_path, lambda s: [_contour(s, 0, c, "CLOSEDPLANAR_XOR") for c in squares])
    assert read_rtstruct(path, space).array.sum() == 24
    space, path = _drawn_by_others(tmp_path / "b", lambda s: [_contour(s, 0, c) for c in squares])
    found = read_rtstruct(path, space)
    assert (found.array.sum(), len(found.notes)) == (28, 1)


@pytest.mark.parametrize(("k", "runs"), [(2.5, "2.5 to 2.5"), (6, "6 to 6"), (-1, "-1 to -1")])
def test_contours_off_the_slices_are_refused(tmp_path, k, runs):
    space, path = _drawn_by_others(tmp_path, lambda space: [_contour(space, k, _ellipse((8, 9), 5))])
    with pytest.raises(SpaceMismatch, match=f'one of structure "anterior" runs from slice {runs} of 0 to 5; give the'):
        read_rtstruct(path, space)


def test_overlapping_structures_are_read_one_by_one(tmp_path):
    label_map, path = _written(tmp_path, CONTOURS)

    def repeat(ds):
        ds.ROIContourSequence[1].ContourSequence = ds.ROIContourSequence[0].ContourSequence

    _edited(path, repeat)
    with pytest.raises(
        UnreadableFile, match=r'"anterior" and "posterior" in \d+ voxels; read them one after the other'
    ):
        read_rtstruct(path, label_map.space)
    found = read_rtstruct(path, label_map.space, structures=["posterior"])
    np.testing.assert_array_equal(found.array, label_map.array == 1)
