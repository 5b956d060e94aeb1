import logging
import shutil
import subprocess
import sys
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
from data_synthetic import ORIENTATIONS, make_affine, phantom, write_dicom_series
from results_synthetic import (
    ANATOMY,
    HIPPOCAMPUS,
    KINDS,
    SHAPE,
    STRUCTURES,
    errors_of,
    label_map_of,
    labels,
    no_files,
    synthetic,
    write_radiograph,
)

from medvit.data.labels import LabelMap, Structure
from medvit.data.segmentations import read_dicom_seg
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import OutputError, UnreadableFile
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.dicom_source import quiet

WRITER = DicomSegWriter("a_bundle", "1.2.3")
HIPPOCROP = Path(__file__).parents[3] / "shared" / "data" / "dicom_hippocrop"
RIGHT_HANDED = [name for name in ORIENTATIONS if name != "reversed"]


def _in_patient(seg):
    """Labelled voxels of a SEG as rows (x, y, z in LPS mm, segment), from the plain attributes of every frame."""
    rows = []
    shared = seg.SharedFunctionalGroupsSequence[0]
    along_row, along_column = np.reshape(shared.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(
        float
    )
    row_step, column_step = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    pixels = seg.pixel_array.reshape(-1, seg.Rows, seg.Columns)
    for frame, groups in zip(pixels, seg.PerFrameFunctionalGroupsSequence, strict=True):
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        row, column = np.nonzero(frame)
        points = origin + np.outer(column * column_step, along_row) + np.outer(row * row_step, along_column)
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        rows.append(np.c_[points, np.full(len(points), number)])
    return np.concatenate(rows)


def _assert_equal_in_patient(seg, label_map):
    found = _in_patient(seg)
    world = label_map.space.lps_affine
    voxels = np.rint((found[:, :3] - world[:3, 3]) @ np.linalg.inv(world[:3, :3]).T).astype(int)
    np.testing.assert_allclose(label_map.space.world(voxels) * (-1, -1, 1), found[:, :3], atol=1e-3)
    again = np.zeros_like(label_map.array)
    again[tuple(voxels.T)] = found[:, 3]
    np.testing.assert_array_equal(again, label_map.array)


def _assert_conformant(path):
    assert errors_of(path) == []


@pytest.mark.parametrize("orientation", RIGHT_HANDED)
@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_every_orientation_lands_on_the_source(tmp_path, orientation, modality):
    label_map = synthetic(tmp_path / "in", orientation, modality=modality)
    path = WRITER.write(label_map, tmp_path / "out" / "1.2.840")
    assert path == tmp_path / "out" / "1.2.840_seg.dcm"
    seg = highdicom.seg.segread(path)
    sources = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, label_map.source.files)}
    first = next(iter(sources.values()))
    _assert_equal_in_patient(seg, label_map)

    assert (seg.Rows, seg.Columns) == (first.Rows, first.Columns)
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert seg[keyword].value == first[keyword].value
    assert seg.SeriesInstanceUID != first.SeriesInstanceUID
    assert seg.SOPInstanceUID not in sources
    (referenced,) = seg.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == first.SeriesInstanceUID
    assert {r.ReferencedSOPInstanceUID for r in referenced.ReferencedInstanceSequence} == set(sources)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        source = sources[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        assert frame.PlanePositionSequence[0].ImagePositionPatient == source.ImagePositionPatient
    _assert_conformant(path)


def test_the_frames_read_as_a_volume_on_the_same_affine(tmp_path):
    label_map = synthetic(tmp_path / "in", "oblique")
    volume = highdicom.seg.segread(WRITER.write(label_map, tmp_path / "out")).get_volume(combine_segments=True)
    np.testing.assert_allclose(volume.spacing, [2.5, 1.25, 0.75], atol=1e-4)  # not the slices that hold labels only
    assert volume.array.max() == 2
    assert volume.array.astype(bool).sum() == np.count_nonzero(label_map.array)


def test_segments_are_described_as_the_structures(tmp_path):
    seg = pydicom.dcmread(WRITER.write(synthetic(tmp_path / "in"), tmp_path / "out"))
    assert (seg.Modality, seg.SegmentationType, seg.ContentLabel) == ("SEG", "BINARY", "SEGMENTATION")
    assert seg.file_meta.TransferSyntaxUID == pydicom.uid.ExplicitVRLittleEndian
    assert (seg.SeriesNumber, seg.SeriesDescription) == (1003, "Segmentation by a_bundle")
    assert [s.SegmentNumber for s in seg.SegmentSequence] == [1, 2, 3]
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["anterior", "posterior", "absent"]
    front, back, absent = seg.SegmentSequence
    category, kind = front.SegmentedPropertyCategoryCodeSequence[0], front.SegmentedPropertyTypeCodeSequence[0]
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("91723000", "SCT")
    assert (kind.CodeValue, kind.CodeMeaning) == ("5366008", "Hippocampus")
    modifiers = [
        s.SegmentedPropertyTypeCodeSequence[0].get("SegmentedPropertyTypeModifierCodeSequence") for s in (front, back)
    ]
    assert [m[0].CodeValue for m in modifiers] == ["255549009", "255551008"]
    assert "SegmentedPropertyTypeModifierCodeSequence" not in absent.SegmentedPropertyTypeCodeSequence[0]
    assert (front.SegmentAlgorithmType, front.SegmentAlgorithmName) == ("AUTOMATIC", "a_bundle")
    assert front.SegmentationAlgorithmIdentificationSequence[0].AlgorithmVersion == "1.2.3"
    assert len({s.TrackingUID for s in seg.SegmentSequence}) == 3
    lab = highdicom.color.CIELabColor.from_dicom_value(absent.RecommendedDisplayCIELabValue)
    np.testing.assert_allclose((lab.l_star, lab.a_star, lab.b_star), (32.3, 79.2, -107.9), atol=0.1)  # sRGB blue


def test_labels_are_renumbered_to_segments(tmp_path):
    array = labels().astype(np.uint16) * 150  # 150 and 300
    structures = tuple(Structure(label, str(label), ANATOMY, HIPPOCAMPUS, (1, 2, 3)) for label in (7, 150, 300))
    affine = make_affine("coronal")
    files = write_dicom_series(tmp_path / "in", phantom(SHAPE), affine)
    seg = highdicom.seg.segread(WRITER.write(label_map_of(files, array, affine, structures), tmp_path / "out"))
    found = _in_patient(seg)[:, 3]
    assert {n: int((found == n).sum()) for n in (1, 2, 3)} == {1: 0, 2: (array == 150).sum(), 3: (array == 300).sum()}


@pytest.mark.parametrize("shape", [SHAPE, (8, 8, 1)])
def test_an_empty_label_map_still_describes_its_segments(tmp_path, shape):
    label_map = synthetic(tmp_path / "in", array=np.zeros(shape, np.uint8))
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    assert (seg.number_of_segments, int(seg.pixel_array.sum())) == (3, 0)
    _assert_conformant(path)


def test_a_single_structure_and_a_single_slice(tmp_path):
    array = np.minimum(labels((5, 4, 1)), 1)
    affine = make_affine("sagittal")
    files = write_dicom_series(tmp_path / "in", phantom(array.shape), affine)
    label_map = label_map_of(files, array, affine, STRUCTURES[:1])
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    assert int(seg.pixel_array.sum()) == array.sum()
    _assert_conformant(path)


def test_tilted_and_uneven_series_keep_their_planes(tmp_path):
    tilted = make_affine("axial")
    tilted[1, 2] = 0.9  # about 20 degrees
    for name, label_map in {
        "tilted": synthetic(tmp_path / "tilted", affine=tilted),
        "uneven": synthetic(tmp_path / "uneven", edit=_nudge),
        "noisy": synthetic(tmp_path / "noisy", "oblique", edit=_turn_a_little),
    }.items():
        path = WRITER.write(label_map, tmp_path / name)
        seg = pydicom.dcmread(path)
        found, expected = np.sort(_in_patient(seg)[:, 3]), np.sort(label_map.array[label_map.array > 0])
        np.testing.assert_array_equal(found, expected)
        if name == "tilted":
            _assert_equal_in_patient(seg, label_map)
        _assert_conformant(path)


def _nudge(ds, k):
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y, round(float(z) + 0.02 * (-1) ** k, 6)]


def _turn_a_little(ds, k):
    ds.ImageOrientationPatient = [round(float(v) + k * 1e-6, 8) for v in ds.ImageOrientationPatient]


def test_sources_that_lack_what_highdicom_takes_for_granted(tmp_path):
    absent = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyID", "StudyDate", "StudyTime")
    absent += (
        "AccessionNumber",
        "SliceThickness",
        "SeriesNumber",
        "PositionReferenceIndicator",
        "ReferringPhysicianName",
    )
    label_map = synthetic(tmp_path / "in", SpacingBetweenSlices=-99, **dict.fromkeys(absent))
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    _assert_equal_in_patient(seg, label_map)
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert (measures.SliceThickness, measures.SpacingBetweenSlices) == (2.5, 2.5)
    assert (seg.PatientID, seg.SeriesNumber) == ("", 1000)
    _assert_conformant(path)


def test_values_that_no_standard_allows_are_left_out(tmp_path):
    def spoil(ds, _):
        ds._dict[pydicom.tag.Tag("PatientBirthDate")] = _raw("PatientBirthDate", "DA", b"sometime")
        ds._dict[pydicom.tag.Tag("PatientSex")] = _raw("PatientSex", "CS", b"X ")
        ds._dict[pydicom.tag.Tag("PatientAge")] = _raw("PatientAge", "AS", b"0Y")

    label_map = synthetic(tmp_path / "in", edit=spoil)
    path = WRITER.write(label_map, tmp_path / "out")
    seg = pydicom.dcmread(path)
    assert (seg.PatientBirthDate, seg.PatientSex) == ("", "")
    assert "PatientAge" not in seg
    _assert_conformant(path)


def _raw(keyword, vr, value):
    tag = pydicom.tag.Tag(keyword)
    return pydicom.dataelem.RawDataElement(tag, vr, len(value), value, 0, False, True)


def test_a_series_without_a_frame_of_reference_gets_none(tmp_path):
    label_map = synthetic(tmp_path / "in", "oblique", FrameOfReferenceUID=None)
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    assert "FrameOfReferenceUID" not in seg
    assert "PositionReferenceIndicator" not in seg
    _assert_equal_in_patient(seg, label_map)
    _assert_conformant(path)


def test_a_nifti_source_has_no_dicom_seg(tmp_path):
    label_map = LabelMap(labels(), Space.from_affine(SHAPE, np.eye(4)), Source("nifti", ()), STRUCTURES)
    assert WRITER.write(label_map, tmp_path / "out") is None
    assert list(tmp_path.iterdir()) == []


def _renamed(ds, k, keyword):
    if k == 2:
        setattr(ds, keyword, "1.2.3")


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"])
def test_mixed_sources_are_refused(tmp_path, keyword):
    label_map = synthetic(tmp_path / "in", edit=lambda ds, k: _renamed(ds, k, keyword))
    _assert_refused(
        label_map, tmp_path, rf"the source of a result in DICOM must have one {keyword}, got \['1\.2\.3', '"
    )


@pytest.mark.parametrize("field", ["study_uid", "series_uid"])
def test_a_source_that_changed_since_it_was_read(tmp_path, field):
    good = synthetic(tmp_path / "in")
    source = Source("dicom", good.source.files, **{field: "1.9"})
    _assert_refused(LabelMap(good.array, good.space, source, STRUCTURES), tmp_path, r"must have one \w+UID, got \['1\.")


def test_another_frame_of_reference_is_refused(tmp_path):
    good = synthetic(tmp_path / "in")
    space = Space.from_affine(SHAPE, good.space.affine, "1.9")
    _assert_refused(LabelMap(good.array, space, good.source, STRUCTURES), tmp_path, "one FrameOfReferenceUID, got")


def test_slices_must_be_told_apart(tmp_path):
    label_map = synthetic(tmp_path / "in", SOPInstanceUID="1.2.3")
    _assert_refused(label_map, tmp_path, "several slices share one SOPInstanceUID")
    label_map = synthetic(tmp_path / "other", SOPInstanceUID="")
    _assert_refused(label_map, tmp_path, r"but it has no \['SOPInstanceUID'\]; write NIfTI instead")


def test_one_file_for_many_slices_is_refused(tmp_path):
    good = synthetic(tmp_path / "in")
    label_map = LabelMap(good.array, good.space, Source("dicom", good.source.files[:1]), STRUCTURES)
    _assert_refused(label_map, tmp_path, "but it reaches beyond the 9 x 7 x 1 voxels of the source; predict again")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_flipped_label_map_is_put_back_on_the_source(tmp_path, axis):
    good = synthetic(tmp_path / "in", "oblique")
    affine = good.space.affine.copy()
    affine[:3, 3] += affine[:3, axis] * (SHAPE[axis] - 1)
    affine[:3, axis] *= -1
    flipped = LabelMap(np.flip(good.array, axis), Space.from_affine(SHAPE, affine), good.source, STRUCTURES)
    seg = highdicom.seg.segread(WRITER.write(flipped, tmp_path / "out"))
    _assert_equal_in_patient(seg, good)
    assert (seg.Rows, seg.Columns) == (7, 9)


@pytest.mark.parametrize("kind", ["classic", "enhanced-4d"])
def test_a_cropped_and_turned_label_map_is_put_back_on_the_source(tmp_path, kind):
    good = synthetic(tmp_path / "in", "oblique-sagittal", kind=kind)
    box = np.zeros_like(good.array)
    box[2:7, 1:5, 1:5] = good.array[2:7, 1:5, 1:5]
    affine = good.space.affine.copy()
    affine[:3, 3] = good.space.world((2, 1, 4))
    affine[:3, :3] = good.space.affine[:3, :3] @ np.array([(0, 1, 0), (0, 0, 1), (-1, 0, 0)])
    array = box[2:7, 1:5, 1:5].transpose(2, 0, 1)[::-1]
    cropped = LabelMap(array, Space.from_affine(array.shape, affine), good.source, STRUCTURES)
    path = WRITER.write(cropped, tmp_path / "out")
    _assert_equal_in_patient(pydicom.dcmread(path), LabelMap(box, good.space, good.source, STRUCTURES))
    np.testing.assert_array_equal(read_dicom_seg(path, cropped.space).array, array)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_shifted_grid_is_refused(tmp_path, axis):
    good = synthetic(tmp_path / "in", "oblique")
    shifted = good.space.affine.copy()
    shifted[:3, 3] += 0.2 * shifted[:3, axis]
    label_map = LabelMap(good.array, Space.from_affine(SHAPE, shifted), good.source, STRUCTURES)
    _assert_refused(
        label_map, tmp_path, r"\(9 x 7 x 6 voxels\) must lie on .* but its voxels are not those of the source"
    )


def test_a_coarser_grid_is_refused(tmp_path):
    good = synthetic(tmp_path / "in")
    label_map = LabelMap(
        good.array[::2],
        Space.from_affine((5, 7, 6), good.space.affine @ np.diag([2, 1, 1, 1])),
        good.source,
        STRUCTURES,
    )
    _assert_refused(label_map, tmp_path, "its voxels are not those of the source")


def test_slices_that_moved_apart_are_refused(tmp_path):
    label_map = synthetic(tmp_path / "in", edit=lambda ds, k: _push(ds, 0.3 * (k == 2)))
    _assert_refused(label_map, tmp_path, r"but there it is 0\.3 mm away from slice 2")


def _push(ds, distance):
    x, y, z = ds.ImagePositionPatient
    ds.ImagePositionPatient = [x, y, float(z) + distance]


def _second(**tags):
    """Changes attributes of the slices behind the first."""
    return lambda ds, k: [setattr(ds, keyword, value) for keyword, value in tags.items() if k > 0]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_second(PixelSpacing=[1.25, 0.8]), "all slices of the source must be of one size and spacing; write NIfTI"),
        (_second(Rows=6), "all slices of the source must be of one size and spacing; write NIfTI"),
        (_second(ImagePositionPatient=[31.5, -17.25, -60]), "the slices of the source do not span a volume; write NIf"),
        (_second(PixelSpacing=""), "needs ImagePositionPatient, ImageOrientationPatient and PixelSpacing of frame 1"),
        (_second(ImagePositionPatient=[1, 2]), "needs ImagePositionPatient, ImageOrientationPatient and PixelSpacing"),
    ],
)
def test_sources_whose_planes_do_not_agree_are_refused(tmp_path, edit, message):
    _assert_refused(synthetic(tmp_path / "in", edit=edit), tmp_path, message)


def test_files_in_another_order_give_the_same_segmentation(tmp_path):
    good = synthetic(tmp_path / "in")
    turned = LabelMap(good.array, good.space, Source("dicom", good.source.files[::-1]), STRUCTURES)
    _assert_equal_in_patient(pydicom.dcmread(WRITER.write(turned, tmp_path / "out")), good)


def test_another_matrix_is_refused(tmp_path):
    good = synthetic(tmp_path / "in")
    space = Space.from_affine((7, 9, 6), good.space.affine)
    label_map = LabelMap(good.array.transpose(1, 0, 2), space, good.source, STRUCTURES)
    _assert_refused(label_map, tmp_path, "it reaches beyond the 9 x 7 x 6 voxels of the source")


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "classic"])
@pytest.mark.parametrize("orientation", ["oblique", "oblique-sagittal"])
def test_frames_of_one_file(tmp_path, kind, orientation):
    label_map = synthetic(tmp_path / "in", orientation, kind=kind)
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    _assert_equal_in_patient(seg, label_map)
    first = pydicom.dcmread(label_map.source.files[0])
    (item,) = seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    assert (item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID) == (first.SOPClassUID, first.SOPInstanceUID)
    assert (seg.StudyInstanceUID, seg.FrameOfReferenceUID) == (first.StudyInstanceUID, first.FrameOfReferenceUID)
    for frame in seg.PerFrameFunctionalGroupsSequence:
        named = frame.DerivationImageSequence[0].SourceImageSequence[0]
        assert named.ReferencedSOPInstanceUID == first.SOPInstanceUID
        if kind == "mosaic":
            assert "ReferencedFrameNumber" not in named
            assert named.SpatialLocationsPreserved == "NO"
        else:
            assert named.ReferencedFrameNumber - 1 in label_map.source.frames
            own = first.PerFrameFunctionalGroupsSequence[named.ReferencedFrameNumber - 1]
            np.testing.assert_allclose(
                own.PlanePositionSequence[0].ImagePositionPatient,
                frame.PlanePositionSequence[0].ImagePositionPatient,
                atol=1e-6,
            )
    _assert_conformant(path)


@pytest.mark.parametrize("kind", ["LABELMAP", "FRACTIONAL"])
@pytest.mark.parametrize("source", ["classic", "enhanced", "mosaic"])
def test_other_kinds_of_segmentation(tmp_path, kind, source):
    label_map = synthetic(tmp_path / "in", "oblique", kind=source)
    path = DicomSegWriter("a_bundle", "1.2.3", "_x.dcm", kind=kind).write(label_map, tmp_path / "out")
    seg = pydicom.dcmread(path)
    assert (path.name, seg.SegmentationType) == ("out_x.dcm", kind)
    np.testing.assert_array_equal(read_dicom_seg(path, label_map.space).array, label_map.array)
    if kind == "FRACTIONAL":
        assert (seg.SegmentationFractionalType, seg.MaximumFractionalValue) == ("OCCUPANCY", 255)
        _assert_conformant(path)
    else:
        assert seg.file_meta.TransferSyntaxUID == pydicom.uid.RLELossless
        unknown = ("Information Object Not found", "SegmentNumber not monotonically")  # the tool predates label maps
        assert [e for e in errors_of(path) if not any(u in e for u in unknown)] == []


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="must be one of BINARY, LABELMAP, FRACTIONAL, got 'SURFACE'"):
        DicomSegWriter("a", "1", kind="SURFACE")


def test_a_plain_radiograph_has_a_segmentation_of_its_pixels(tmp_path):
    label_map = write_radiograph(tmp_path / "in")
    path = WRITER.write(label_map, tmp_path / "out")
    seg = highdicom.seg.segread(path)
    assert "FrameOfReferenceUID" not in seg
    assert "PlanePositionSequence" not in seg.PerFrameFunctionalGroupsSequence[0]
    np.testing.assert_array_equal(read_dicom_seg(path, label_map.space).array, label_map.array)
    named = seg.PerFrameFunctionalGroupsSequence[0].DerivationImageSequence[0].SourceImageSequence[0]
    assert named.ReferencedSOPInstanceUID == pydicom.dcmread(label_map.source.files[0]).SOPInstanceUID
    _assert_conformant(path)


def test_a_part_of_a_plain_radiograph_is_refused(tmp_path):
    whole = write_radiograph(tmp_path / "in")
    part = LabelMap(whole.array[1:], Space.from_affine((8, 7, 1), whole.space.affine), whole.source, STRUCTURES)
    _assert_refused(part, tmp_path, "no place in the patient, so .* one frame of 9 x 7 pixels, .* has 8 x 7 x 1 voxels")


def test_dcmqi_reads_the_same_voxels(tmp_path):
    beside = Path(sys.executable).with_name("segimage2itkimage")
    program = str(beside) if beside.exists() else shutil.which("segimage2itkimage")
    if not program:
        pytest.skip("segimage2itkimage (the package dcmqi) is not installed")
    label_map = synthetic(tmp_path / "in", "oblique-sagittal", labels((32, 30, 6)))
    path = WRITER.write(label_map, tmp_path / "out")
    command = [program, "--inputDICOM", path, "--outputDirectory", tmp_path, "-t", "nii"]
    subprocess.run([*command, "--prefix", "x", "--mergeSegments"], check=True, capture_output=True)
    (file,) = tmp_path.glob("x*.nii*")
    image = nibabel.load(file)
    found = np.argwhere(np.asarray(image.dataobj))
    world = nibabel.affines.apply_affine(image.affine, found)
    voxels = np.rint(label_map.space.voxels_of(world)).astype(int)
    np.testing.assert_allclose(label_map.space.world(voxels), world, atol=1e-3)
    again = np.zeros_like(label_map.array)
    again[tuple(voxels.T)] = np.asarray(image.dataobj)[tuple(found.T)]
    np.testing.assert_array_equal(again, label_map.array)


def test_nothing_of_the_patient_is_logged(tmp_path, caplog, capfd):
    caplog.set_level("DEBUG")
    WRITER.write(synthetic(tmp_path / "in", PatientName="Doe"), tmp_path / "out")  # highdicom warns of such a name
    with quiet():
        logging.getLogger("highdicom.imported_only_now").warning("Doe")
    assert "Doe" not in caplog.text + "".join(capfd.readouterr())


def _assert_refused(label_map, folder, message):
    with pytest.raises(OutputError, match=message):
        WRITER.write(label_map, folder / "refused")
    assert no_files(folder)


def test_a_source_file_that_is_gone_is_named(tmp_path):
    label_map = synthetic(tmp_path / "in")
    label_map.source.files[2].unlink()
    with pytest.raises(UnreadableFile, match=rf"{label_map.source.files[2].name}: the source header is needed"):
        WRITER.write(label_map, tmp_path / "out")


def test_a_damaged_header_is_refused_without_quoting_it(tmp_path):
    good = synthetic(tmp_path / "in")
    for file in good.source.files:
        ds = pydicom.dcmread(file)
        ds._dict[pydicom.tag.Tag("Columns")] = _raw("Columns", "US", b"Doe")
        ds.save_as(file)
    with pytest.raises(UnreadableFile, match=r"its header cannot be used for results in DICOM \(\w+\)$"):
        WRITER.write(good, tmp_path / "out")
    assert no_files(tmp_path)


def test_an_error_of_highdicom_does_not_quote_the_patient(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("value 'Doe^Jane' is not allowed")

    monkeypatch.setattr(DicomSegWriter, "_build", fail)
    with pytest.raises(OutputError, match=r"highdicom cannot make a DICOM SEG of this series \(ValueError") as caught:
        WRITER.write(synthetic(tmp_path / "in"), tmp_path / "out")
    assert "Doe" not in str(caught.value)


def _flip_voxels(seg):
    seg.PixelData = bytes([0b1, *bytes(len(seg.PixelData) - 1)])


def _overlap(seg):
    seg.PixelData = b"\xff" * len(seg.PixelData)


def _shift_frame(seg):
    seg.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient = [1, 2, 3]


def _turn(seg):
    seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient = [0, 1, 0, 1, 0, 0]


def _other_frame(seg):
    seg.FrameOfReferenceUID = "1.2.3"


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_flip_voxels, "centre of segment 1 .* mm away"),
        (_overlap, "voxels|centre of segment 1 "),
        (_shift_frame, "position of frame 1"),
        (_turn, "centre of segment"),
        (_other_frame, "FrameOfReferenceUID"),
    ],
)
def test_a_file_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch, damage, found):
    build = DicomSegWriter._build

    def damaged(*args):
        seg = build(*args)
        damage(seg)
        return seg

    monkeypatch.setattr(DicomSegWriter, "_build", damaged)
    _assert_refused(synthetic(tmp_path / "in"), tmp_path, rf"did not read back as it was meant \(.*{found}")


def test_an_existing_file_is_kept(tmp_path):
    label_map = synthetic(tmp_path / "in")
    path = WRITER.write(label_map, tmp_path / "out")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        WRITER.write(label_map, tmp_path / "out")
    assert path.read_bytes() == before
    assert WRITER.write(label_map, tmp_path / "out", overwrite=True) == path
    assert path.read_bytes() != before  # new UIDs


@pytest.mark.skipif(not HIPPOCROP.is_dir(), reason="the shared hippocampus series are not beside the project")
@pytest.mark.parametrize("series", ["series1", "series2", "series3"])
def test_real_series(tmp_path, series):
    headers = {f: pydicom.dcmread(f, stop_before_pixels=True) for f in (HIPPOCROP / series).iterdir()}
    files = sorted(headers, key=lambda f: float(headers[f].ImagePositionPatient[2]))
    first = headers[files[0]]
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine[:3, 3] = np.array(first.ImagePositionPatient, float) * (-1, -1, 1)
    label_map = label_map_of(files, labels((first.Columns, first.Rows, len(files))), affine)
    path = WRITER.write(label_map, tmp_path / "out")
    _assert_equal_in_patient(highdicom.seg.segread(path), label_map)
    _assert_conformant(path)
