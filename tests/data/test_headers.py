import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from dicom_synthetic import (
    CLASS,
    measures_group,
    nested,
    orientation_group,
    position_group,
    write_flat,
    write_multiframe,
)

from medvit.data.dicom import read_dicom
from medvit.data.headers import FLAT_CLASSES, IMAGE_CLASSES, NotAnImage, read_header
from medvit.data.study import discover
from medvit.errors import UnreadableFile, UnreadableSeries

UNPLACED = "its position and orientation in the patient are unknown"
GREY = np.random.default_rng(0).integers(0, 4000, (1, 6, 8), dtype=np.uint16)
COLOUR = np.random.default_rng(1).integers(0, 256, (1, 6, 8, 3), dtype=np.uint8)
NO_SPACING = {"PixelSpacing": None}


def only(path):
    (one,) = discover(path.parent).series
    return one


def volume_of(path, frames, spacing=None, notes=(UNPLACED,)):
    """One flat image: voxels in (column, row, frame) order, spacing, notes, no place claimed."""
    one = only(path)
    assert one.problem is None and not one.placed
    assert one.channels == (3 if frames.ndim == 4 else 1)
    volume = one.read()
    np.testing.assert_array_equal(volume.array, np.moveaxis(frames, (0, 1, 2), (2, 1, 0)))
    assert volume.space.unit == ("mm" if spacing else "px")
    np.testing.assert_allclose(volume.space.affine, np.diag([*(spacing or (1, 1)), 1, 1]))
    assert volume.notes == notes and volume.space.frame_of_reference is None
    assert volume.source.frames == tuple(range(len(frames))) and one.origins == (path,)
    return one


def refused_by_networks(path, code, words):
    with pytest.raises(UnreadableSeries, match=words) as caught:
        read_dicom([path], "s")
    assert caught.value.code == code


# ---- images that need no place


@pytest.mark.parametrize(
    ("tags", "spacing", "more"),
    [
        ({"PixelSpacing": [0.2, 0.15]}, (0.15, 0.2), ""),
        (
            {"ImagerPixelSpacing": [0.2, 0.15]},
            (0.15, 0.2),
            ", and its spacing is that at the detector, so that lengths in the patient are smaller",
        ),
        ({"NominalScannedPixelSpacing": [0.2, 0.15]}, (0.15, 0.2), ", and its spacing is that of the film"),
        ({"PixelSpacing": [0.2, 0.15], "ImagerPixelSpacing": [0.3, 0.3]}, (0.15, 0.2), ""),
        ({}, None, ", and so is the size of a pixel"),
        ({"PixelSpacing": [0, 0.15]}, None, ", and so is the size of a pixel"),
        ({"PixelSpacing": [0.2]}, None, ", and so is the size of a pixel"),
    ],
)
@pytest.mark.parametrize(("sop_class", "modality"), [("1", "CR"), ("1.1", "DX"), ("1.2", "MG"), ("12.1", "XA")])
def test_a_projection(tmp_path, sop_class, modality, tags, spacing, more):
    path = write_flat(tmp_path / "x.dcm", GREY, sop_class, modality, **tags)
    one = volume_of(path, GREY, spacing, (UNPLACED + more,))
    assert one.modality == modality
    refused_by_networks(
        path, "no-geometry", r"has none \(series 3 .*\); read projections with medvit\.data\.radiograph"
    )


def region(**tags):
    known = {"PhysicalUnitsXDirection": 3, "PhysicalUnitsYDirection": 3}
    return nested(**{**known, "PhysicalDeltaX": 0.02, "PhysicalDeltaY": 0.03, **tags})


@pytest.mark.parametrize(
    ("regions", "spacing"),
    [
        ([region()], (0.2, 0.3)),
        ([region(PhysicalDeltaY=-0.03)], (0.2, 0.3)),
        ([region(), region()], None),  # two windows on one screen
        ([region(), region(PhysicalDeltaX=0.5)], None),
        ([region(PhysicalUnitsXDirection=4, PhysicalUnitsYDirection=7)], None),  # seconds and cm per second
        ([region(PhysicalDeltaX=0.0)], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("frames", [1, 4])
def test_ultrasound_regions(tmp_path, regions, spacing, frames):
    video = np.concatenate([GREY + n for n in range(frames)])
    path = write_flat(
        tmp_path / "us.dcm", video, "3.1" if frames > 1 else "6.1", "US", SequenceOfUltrasoundRegions=regions
    )
    notes = (UNPLACED + ("" if spacing else ", and so is the size of a pixel"),)
    if frames > 1:
        notes += ("4 frames one after the other along the third axis",)
    assert volume_of(path, video, spacing, notes).space.shape == (8, 6, frames)


@pytest.mark.parametrize(("sop_class", "modality"), [("7", "OT"), ("77.1.5.1", "OP"), ("6.1", "US")])
def test_colours(tmp_path, sop_class, modality):
    path = write_flat(tmp_path / "sc.dcm", COLOUR, sop_class, modality)
    volume_of(path, COLOUR, None, (f"{UNPLACED}, and so is the size of a pixel",))
    refused_by_networks(path, "colour", "grey values are needed, but this is a colour image")


def test_a_colour_video(tmp_path):
    video = np.concatenate([COLOUR, COLOUR[:, ::-1], COLOUR[:, :, ::-1]])
    path = write_flat(tmp_path / "sc.dcm", video, "7.4", "ES")
    notes = (f"{UNPLACED}, and so is the size of a pixel", "3 frames one after the other along the third axis")
    volume_of(path, video, None, notes)


def test_a_palette_is_colour(tmp_path):
    tables = {}
    for channel in ("Red", "Green", "Blue"):
        tables[f"{channel}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        table = np.random.default_rng(len(channel)).integers(0, 256, 256).astype("<u2") * 257
        tables[f"{channel}PaletteColorLookupTableData"] = table.tobytes()
    stored = COLOUR[..., 0]
    path = write_flat(tmp_path / "us.dcm", stored, "6.1", "US", PhotometricInterpretation="PALETTE COLOR", **tables)
    assert read_header(path).matrix == (6, 8, 3)
    one = only(path)
    assert one.channels == 3 and one.read().array.shape == (8, 6, 1, 3)
    shades = [np.frombuffer(tables[f"{c}PaletteColorLookupTableData"], "<u2") // 257 for c in ("Red", "Green", "Blue")]
    np.testing.assert_array_equal(
        one.read().array[:, :, 0], np.stack([shade[stored[0]] for shade in shades], -1).swapaxes(0, 1)
    )
    refused_by_networks(path, "colour", "grey values are needed")


def test_every_flat_file_is_an_image_of_its_own(tmp_path):
    """Views of one examination share a series, a matrix and a class; they are no stack."""
    for n in range(3):
        write_flat(tmp_path / f"{n}.dcm", GREY + n, "1.1", "DX", SeriesInstanceUID="1.2.3", PixelSpacing=[0.1, 0.1])
    series = discover(tmp_path).series
    assert [one.name for one in series] == ["3_T1_test", "3_T1_test_2", "3_T1_test_3"]
    for n, one in enumerate(series):
        np.testing.assert_array_equal(one.read().array[:, :, 0], (GREY[0] + n).T)


def test_a_secondary_capture_with_a_place_is_a_slice(tmp_path):
    """Reformatted slices often come as secondary captures; their tags place them."""
    affine = make_affine("coronal")
    files = write_dicom_series(tmp_path, phantom(), affine, SOPClassUID=CLASS + "7")
    (one,) = discover(tmp_path).series
    assert one.placed and one.problem is None and one.files == tuple(files)
    np.testing.assert_array_equal(one.read().array, phantom())
    np.testing.assert_allclose(one.space.affine, affine, atol=2e-6)


def test_a_multi_frame_capture_with_functional_groups_is_a_volume(tmp_path):
    affine = make_affine("oblique")
    shared = {**measures_group(affine), **orientation_group(affine)}
    groups = [position_group(affine, k) for k in range(5)]
    path = write_multiframe(tmp_path / "x.dcm", list(np.moveaxis(phantom(), 2, 0)), groups, shared, sop_class="7.3")
    np.testing.assert_array_equal(only(path).read().array, phantom())
    np.testing.assert_allclose(only(path).space.affine, affine, atol=2e-6)


def test_groups_without_places_in_a_projection_are_frames_one_after_the_other(tmp_path):
    images = list(np.moveaxis(phantom(), 2, 0))
    path = write_multiframe(tmp_path / "x.dcm", images, [{}] * 5, {}, sop_class="12.1.1", Modality="XA")
    one = only(path)
    assert not one.placed and one.space.shape == (7, 6, 5)
    np.testing.assert_array_equal(one.read().array, phantom())


# ---- images that need one


@pytest.mark.parametrize(("sop_class", "modality"), [("2", "CT"), ("4", "MR"), ("128", "PT")])
@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"ImageOrientationPatient": []}, "ImageOrientationPatient is missing"),
        ({"PixelSpacing": None}, "PixelSpacing is missing"),
    ],
)
def test_a_tomogram_without_a_place_is_refused(tmp_path, sop_class, modality, tags, reason):
    """Never invented, in convert as little as for networks; ImagerPixelSpacing is no spacing in the patient."""
    write_dicom_series(
        tmp_path,
        phantom((7, 6, 1)),
        make_affine(),
        SOPClassUID=CLASS + sop_class,
        Modality=modality,
        ImagerPixelSpacing=[1, 1],
        **tags,
    )
    (one,) = discover(tmp_path).series
    assert one.problem.code == "no-geometry" and one.space is None
    assert f"its place in the patient is unknown: {reason}; export the series again with these tags" in str(one.problem)


def test_a_file_without_a_class_is_judged_by_its_modality(tmp_path):
    path = write_flat(tmp_path / "a/x.dcm", GREY, "1", "CR", SOPClassUID=None, PixelSpacing=[1, 2])
    ds = pydicom.dcmread(path)
    ds.file_meta.MediaStorageSOPClassUID = ""
    ds.save_as(path)
    volume_of(path, GREY, (2, 1))
    ds.Modality = "CT"
    (tmp_path / "b").mkdir()
    ds.save_as(tmp_path / "b/x.dcm")
    assert only(tmp_path / "b/x.dcm").problem.code == "no-geometry"


@pytest.mark.parametrize(("rows", "columns"), [(0, 8), (6, 0)])
def test_an_image_without_pixels(tmp_path, rows, columns):
    path = write_flat(tmp_path / "x.dcm", GREY, "1", "CR", Rows=rows, Columns=columns)
    assert only(path).problem.code == "no-geometry"
    assert f"Rows and Columns of at least 1, got {rows} x {columns}" in str(only(path).problem)


# ---- classes


@pytest.mark.parametrize(
    "tail", ["88.11", "66.4", "66.7", "66.8", "481.2", "481.3", "481.5", "11.1", "88.59", "66", "4.2", "104.1"]
)
def test_objects_that_are_no_images(tmp_path, tail):
    """Report, SEG, label map, dose, structures, plan, presentation state, key objects, raw data, spectroscopy, PDF."""
    (path,) = write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine(), SOPClassUID=CLASS + tail)
    with pytest.raises(NotAnImage, match=r"a DICOM object that is not an image: \w"):
        read_header(path)
    inventory = discover(tmp_path)
    assert inventory.series == () and [(a.path, a.code) for a in inventory.set_aside] == [(path, "not-an-image")]


def test_image_classes_are_those_of_the_standard():
    from pydicom.uid import UID

    names = {UID(one).name for one in IMAGE_CLASSES}
    assert not [name for name in names if name.startswith("1.2.")] and all("Storage" in name for name in names)
    assert FLAT_CLASSES < IMAGE_CLASSES
    assert {"CT Image Storage", "Enhanced MR Image Storage", "Positron Emission Tomography Image Storage"} <= names
    flat = {UID(one).name for one in FLAT_CLASSES}
    assert {"Computed Radiography Image Storage", "Secondary Capture Image Storage"} <= flat
    assert not {name for name in flat if name.startswith(("CT", "MR", "Positron", "Enhanced CT", "Enhanced MR"))}


def test_a_header_knows_its_frames_and_no_pixels(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine("oblique"), EchoTime=4.6)
    header = read_header(files[3])
    (frame,) = header.frames
    assert header.defect is None and header.plane == frame.plane and not (header.flat or header.mosaic)
    assert (frame.number, frame.label("echo_time_ms"), frame.thickness) == (0, 4.6, 2.5)
    written = (np.datetime64("2020-01-02T10:11:12") - np.datetime64("1900-01-01")) / np.timedelta64(1, "s")
    assert (frame.time, frame.written) == (None, written)
    assert header.matrix == (6, 7, 1) and frame.plane.shape == (7, 6)


@pytest.mark.parametrize("written", [b"", b"0", b"-1", b"nan", b"thic"])
def test_a_thickness_that_makes_no_sense(tmp_path, written):
    (path,) = write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine(), SliceThickness="7.77")
    data = path.read_bytes()
    assert data.count(b"7.77") == 1
    path.write_bytes(data.replace(b"7.77", written.ljust(4)))
    problem = only(path).problem
    assert problem is not None and problem.code == "single-slice"
    assert "one slice without a SliceThickness has no extent across the slice" in str(problem)


def test_a_file_that_is_no_dicom_says_so(tmp_path):
    (tmp_path / "x").write_bytes(b"x" * 200)
    with pytest.raises(UnreadableFile, match="not a DICOM file"):
        read_header(tmp_path / "x")
