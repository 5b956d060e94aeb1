import numpy as np
import pydicom
import pytest
from data_synthetic import ORIENTATIONS, make_affine, phantom
from dcm2niix_peer import on_grid, volumes_of
from dicom_synthetic import (
    CLASS,
    arrays_of,
    csa_header,
    measures_group,
    nested,
    orientation_group,
    orientation_of,
    position_group,
    position_of,
    write_flat,
    write_multiframe,
    write_siemens_mosaic,
    write_uih_mosaic,
)

from medvit.data.dicom import read_dicom
from medvit.data.headers import read_header
from medvit.data.study import discover
from medvit.errors import UnreadableSeries

AFFINE = make_affine("oblique")
UPRIGHT = sorted(set(ORIENTATIONS) - {"reversed"})


def check(path, array, affine, frames=None, **source):
    """One volume, its grid and voxels, and which frame of the file each slice is."""
    (one,) = discover(path.parent).series
    assert one.problem is None, one.problem
    volume = one.read()
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
    assert volume.space == one.space and volume.array.dtype == np.float32
    assert volume.source.files == (path,) * array.shape[2] and one.origins == (path,)
    assert volume.source.frames == tuple(range(array.shape[2]) if frames is None else frames)
    for name, value in source.items():
        assert getattr(volume.source, name) == value
    return one


def refusal(path):
    with pytest.raises(UnreadableSeries) as caught:
        read_dicom([path], "s")
    (one,) = discover(path.parent).series
    assert one.problem is not None and one.problem.code == caught.value.code
    return caught.value.code, caught.value.reason


# ---- functional groups

_PLACES = {
    "per frame": lambda affine, k: (
        {**measures_group(affine), **orientation_group(affine), **position_group(affine, k)},
        {},
        {},
    ),
    "shared": lambda affine, k: (
        position_group(affine, k),
        {**measures_group(affine), **orientation_group(affine)},
        {},
    ),
    "top level": lambda affine, k: (
        position_group(affine, k),
        {},
        {
            "ImageOrientationPatient": orientation_of(affine),
            "PixelSpacing": [float(v) for v in np.linalg.norm(affine[:3, 1::-1], axis=0)],
            "SliceThickness": float(np.linalg.norm(affine[:3, 2])),
        },
    ),
}


@pytest.mark.parametrize("where", list(_PLACES))
@pytest.mark.parametrize("name", ["axial", "oblique", "oblique-sagittal", "feet-first"])
def test_geometry_of_a_multi_frame_object(tmp_path, where, name):
    """Frames in any order, each placed by its own groups, the shared ones or the top level."""
    array, affine = phantom(), make_affine(name)
    order = [3, 0, 4, 1, 2]
    places = [_PLACES[where](affine, k) for k in order]
    path = write_multiframe(
        tmp_path / "e.dcm",
        [array[:, :, k] for k in order],
        [each for each, _, _ in places],
        *places[0][1:2],
        **places[0][2],
    )
    one = check(path, array, affine, np.argsort(order), mosaic=False, modality="MR")
    assert one.space.frame_of_reference == "1.2.4" and one.notes == ()


def test_groups_of_the_frame_come_before_shared_ones_and_the_top_level(tmp_path):
    """Two stacks of two orientations in one object; the shared orientation is that of the first only."""
    arrays, affines = arrays_of(2), [make_affine("axial"), make_affine("coronal", (0.5, 0.5, 4))]
    images, groups = [], []
    for k in range(5):  # alternating
        for n, (array, affine) in enumerate(zip(arrays, affines, strict=True)):
            images.append(array[:, :, k])
            own = {**measures_group(affine), **orientation_group(affine)} if n else {}
            groups.append({**own, **position_group(affine, k)})
    shared = {**measures_group(affines[0]), **orientation_group(affines[0])}
    wrong = {"ImageOrientationPatient": [0, 1, 0, 0, 0, -1], "PixelSpacing": [9, 9]}
    path = write_multiframe(tmp_path / "e.dcm", images, groups, shared, **wrong)
    first, second = discover(tmp_path).series
    assert (first.name, second.name) == ("3_T1_test", "3_T1_test_2")
    for n, one in enumerate((first, second)):
        assert one.problem is None
        volume = one.read()
        np.testing.assert_array_equal(volume.array, arrays[n])
        np.testing.assert_allclose(volume.space.affine, affines[n], atol=2e-6)
        assert volume.source.frames == tuple(range(n, 10, 2)) and one.origins == (path,)


def test_each_frame_has_its_own_rescale(tmp_path):
    array = phantom()
    slopes, intercepts = [1, 0.5, 2, 0.0037, 3], [0, 10, -1024, 0, 7]
    groups = [
        position_group(AFFINE, k)
        | {"PixelValueTransformationSequence": nested(RescaleSlope=slopes[k], RescaleIntercept=intercepts[k])}
        for k in range(5)
    ]
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    path = write_multiframe(
        tmp_path / "e.dcm", list(np.moveaxis(array, 2, 0)), groups, shared, RescaleSlope=9, RescaleIntercept=9
    )
    volume = read_dicom([path])
    np.testing.assert_allclose(volume.array, array * np.array(slopes) + intercepts, rtol=1e-6)


def test_a_rescale_shared_by_all_frames(tmp_path):
    array = phantom()
    shared = {
        **measures_group(AFFINE),
        **orientation_group(AFFINE),
        "PixelValueTransformationSequence": nested(RescaleSlope=0.5, RescaleIntercept=-3, RescaleType="HU"),
    }
    groups = [position_group(AFFINE, k) for k in range(5)]
    path = write_multiframe(tmp_path / "e.dcm", list(np.moveaxis(array, 2, 0)), groups, shared, sop_class="2.1")
    np.testing.assert_array_equal(read_dicom([path]).array, array * 0.5 - 3)


@pytest.mark.parametrize(
    ("group", "parameters"),
    [
        (
            lambda n: {"MREchoSequence": nested(EffectiveEchoTime=(2.3, 4.6)[n])},
            [{"echo_time_ms": 2.3}, {"echo_time_ms": 4.6}],
        ),
        (
            lambda n: {"MRDiffusionSequence": nested(DiffusionBValue=(0.0, 800.0)[n])},
            [{"b_value": 0.0}, {"b_value": 800.0}],
        ),
        (
            lambda n: {
                "MRDiffusionSequence": nested(
                    DiffusionBValue=800.0,
                    DiffusionGradientDirectionSequence=nested(
                        DiffusionGradientOrientation=([1.0, 0.0, 0.0], [0.0, 0.8, 0.6])[n]
                    ),
                )
            },
            [{"b_vector": "1 0 0"}, {"b_vector": "0 0.8 0.6"}],
        ),
        (
            lambda n: {"MRImageFrameTypeSequence": nested(ComplexImageComponent=("MAGNITUDE", "PHASE")[n])},
            [{"component": "MAGNITUDE"}, {"component": "PHASE"}],
        ),
        (
            lambda n: {"FrameContentSequence": nested(TemporalPositionIndex=n + 1)},
            [{"temporal_position": 1.0}, {"temporal_position": 2.0}],
        ),
        (lambda n: {"FrameContentSequence": nested(StackID=str(n))}, [{"stack": "0"}, {"stack": "1"}]),
        (
            lambda n: {"CardiacSynchronizationSequence": nested(NominalCardiacTriggerDelayTime=40.0 * n)},
            [{"trigger_time_ms": 0.0}, {"trigger_time_ms": 40.0}],
        ),
        (
            lambda n: {"FrameContentSequence": nested(FrameAcquisitionNumber=n + 1)},
            [{"acquisition": 1.0}, {"acquisition": 2.0}],
        ),
        (
            lambda n: {"FrameContentSequence": nested(FrameAcquisitionDateTime=f"2020010210111{n}.5")},
            [{"time_point": 0.0}, {"time_point": 1.0}],
        ),
    ],
)
def test_several_volumes_in_one_object(tmp_path, group, parameters):
    """Frames of two volumes one after the other, apart by a functional group."""
    arrays = arrays_of(2)
    images = [array[:, :, k] for k in range(5) for array in arrays]
    groups = [position_group(AFFINE, k) | group(n) for k in range(5) for n in range(2)]
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    path = write_multiframe(tmp_path / "e.dcm", images, groups, shared, AcquisitionNumber=None)
    series = discover(tmp_path).series
    assert [one.problem for one in series] == [None, None]
    assert [one.parameters for one in series] == parameters
    for n, one in enumerate(series):
        volume = one.read()
        np.testing.assert_array_equal(volume.array, arrays[n])
        np.testing.assert_allclose(volume.space.affine, AFFINE, atol=2e-6)
        assert (volume.source.files, volume.source.frames) == ((path,) * 5, tuple(range(n, 10, 2)))
        np.testing.assert_array_equal(read_dicom([path], volume=n).array, arrays[n])


def test_frames_apart_by_a_dimension_of_any_meaning(tmp_path):
    """A private dimension pointer tells volumes apart; that of the position does not."""
    arrays = arrays_of(2)
    content = [
        {"FrameContentSequence": nested(DimensionIndexValues=[k + 1, n + 1])} | position_group(AFFINE, k)
        for n in range(2)
        for k in range(5)
    ]
    pointers = [nested(DimensionIndexPointer=0x00200032), nested(DimensionIndexPointer=0x20051413)]
    images = [array[:, :, k] for array in arrays for k in range(5)]
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    write_multiframe(tmp_path / "e.dcm", images, content, shared, DimensionIndexSequence=pointers)
    series = discover(tmp_path).series
    assert [one.parameters for one in series] == [{"dimension": "1"}, {"dimension": "2"}]
    for one, array in zip(series, arrays, strict=True):
        np.testing.assert_array_equal(one.read().array, array)


def test_frames_at_one_place_that_nothing_tells_apart_are_refused(tmp_path):
    images = [array[:, :, k] for array in arrays_of(2) for k in range(5)]
    groups = [position_group(AFFINE, k) for k in range(5)] * 2
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    code, reason = refusal(write_multiframe(tmp_path / "e.dcm", images, groups, shared))
    assert code == "four-dimensional" and "10 slices lie at 5 positions, 2 at each" in reason


def test_a_gap_between_frames_is_refused(tmp_path):
    array = phantom()
    kept = [0, 1, 3, 4]
    groups = [position_group(AFFINE, k) for k in kept]
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    path = write_multiframe(tmp_path / "e.dcm", [array[:, :, k] for k in kept], groups, shared)
    code, reason = refusal(path)
    assert code == "missing-slice" and "1 of 5 slices are missing: slices are 2.5 mm apart" in reason


@pytest.mark.parametrize(
    ("keep", "drop", "reason"),
    [
        (5, "PlanePositionSequence", "ImagePositionPatient is missing"),
        (5, "PlaneOrientationSequence", "ImageOrientationPatient is missing"),
        (5, "PixelMeasuresSequence", "PixelSpacing is missing"),
        (4, "", "NumberOfFrames is 5, but PerFrameFunctionalGroupsSequence describes 4"),
        (0, "", "NumberOfFrames is 5, but PerFrameFunctionalGroupsSequence describes 0"),
    ],
)
def test_frames_without_a_place_are_refused(tmp_path, keep, drop, reason):
    groups = [{**measures_group(AFFINE), **orientation_group(AFFINE), **position_group(AFFINE, k)} for k in range(keep)]
    for group in groups[-1:]:
        group.pop(drop, None)
    code, found = refusal(write_multiframe(tmp_path / "e.dcm", list(np.moveaxis(phantom(), 2, 0)), groups, {}))
    assert code == "no-geometry" and reason in found and "export the series again with these tags" in found


def test_frames_of_a_classic_class_say_not_where_they_lie(tmp_path):
    path = write_multiframe(
        tmp_path / "e.dcm",
        list(np.moveaxis(phantom(), 2, 0)),
        sop_class="4",
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        PixelSpacing=[1, 1],
    )
    code, reason = refusal(path)
    assert code == "multi-frame" and "5 frames without functional groups says not where they lie" in reason


def test_files_of_one_frame_each_make_one_volume(tmp_path):
    """Legacy-converted objects and XA enhanced ones often have one slice per file."""
    array = phantom()
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    files = [
        write_multiframe(tmp_path / f"{k}.dcm", [array[:, :, k]], [position_group(AFFINE, k)], shared, sop_class="4.4")
        for k in range(5)
    ]
    (one,) = discover(tmp_path).series
    volume = one.read()
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, AFFINE, atol=2e-6)
    assert volume.source.files == tuple(files)


def test_two_objects_of_one_series_make_one_volume_each(tmp_path):
    """Enhanced objects of two time points: one file per volume."""
    arrays = arrays_of(2)
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    groups = [position_group(AFFINE, k) for k in range(5)]
    for n, array in enumerate(arrays):
        path = tmp_path / f"{1 - n}.dcm"
        images = list(np.moveaxis(array, 2, 0))
        write_multiframe(path, images, groups, shared, InstanceNumber=n + 1, SOPInstanceUID=f"1.2.3.9{n}")
    series = discover(tmp_path).series
    assert [one.parameters for one in series] == [{"instance": 1.0}, {"instance": 2.0}]
    for n, one in enumerate(series):
        np.testing.assert_array_equal(one.read().array, arrays[n])
        assert one.origins == (tmp_path / f"{1 - n}.dcm",)


def test_tilted_frames_of_a_multi_frame_object(tmp_path):
    affine = make_affine("axial", (0.5, 0.5, 5))
    affine[1, 2] = 1.0
    array = phantom()
    shared = {**measures_group(affine), **orientation_group(affine)}
    groups = [position_group(affine, k) for k in range(5)]
    write_multiframe(tmp_path / "e.dcm", list(np.moveaxis(array, 2, 0)), groups, shared, sop_class="2.1")
    (one,) = discover(tmp_path).series
    np.testing.assert_allclose(one.space.affine, affine, atol=1e-6)
    np.testing.assert_array_equal(one.read().array, array)
    assert "sheared by 11.31 degrees" in one.notes[0]


# ---- mosaics


@pytest.mark.parametrize("upwards", [True, False])
@pytest.mark.parametrize("name", UPRIGHT)
def test_a_siemens_mosaic(tmp_path, name, upwards):
    """Tiles in both directions of the normal; seven of them in a square of nine."""
    array, affine = phantom((8, 6, 7)), make_affine(name)
    path = write_siemens_mosaic(tmp_path / "m.dcm", array, affine, upwards=upwards)
    numbers = range(7) if upwards else range(6, -1, -1)
    assert check(path, array, affine, numbers, mosaic=True).notes == ()
    assert read_header(path).matrix == (6, 8, 1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9, 10, 12])
@pytest.mark.parametrize("write", [write_siemens_mosaic, write_uih_mosaic])
def test_any_number_of_tiles(tmp_path, write, count):
    array = phantom((8, 6, count))
    check(write(tmp_path / "m.dcm", array, AFFINE, SliceThickness=2.5), array, AFFINE, mosaic=True)


@pytest.mark.parametrize("name", UPRIGHT)
def test_a_uih_mosaic(tmp_path, name):
    array, affine = phantom((8, 6, 7)), make_affine(name)
    check(write_uih_mosaic(tmp_path / "m.dcm", array, affine), array, affine, mosaic=True)


@pytest.mark.parametrize("write", [write_siemens_mosaic, write_uih_mosaic])
def test_mosaics_are_time_points_of_one_series(tmp_path, write):
    arrays = arrays_of(3, (8, 6, 7))
    for n, array in enumerate(arrays):
        tags = {"InstanceNumber": n + 1, "SOPInstanceUID": f"1.2.9.{n}", "RescaleSlope": 2, "RescaleIntercept": n}
        write(tmp_path / f"{2 - n}.dcm", array, AFFINE, **tags)
    series = discover(tmp_path).series
    assert [one.parameters for one in series] == [{"instance": 1.0}, {"instance": 2.0}, {"instance": 3.0}]
    for n, one in enumerate(series):
        volume = one.read()
        np.testing.assert_array_equal(volume.array, 2.0 * arrays[n] + n)
        np.testing.assert_allclose(volume.space.affine, AFFINE, atol=2e-6)
        assert volume.source.files == (tmp_path / f"{2 - n}.dcm",) * 7 and volume.source.mosaic


_NORMAL = ("FD", ["0.0", "0.0", "1.0"])


@pytest.mark.parametrize(
    ("csa", "words"),
    [
        (b"", "the Siemens CSA header that places the tiles of a mosaic is"),
        (b"SV10\4\3\2\1" + b"\xff" * 90, "is damaged ("),
        (csa_header(SliceNormalVector=_NORMAL), "is missing"),
        (csa_header(NumberOfImagesInMosaic=("US", [7])), "is missing"),
        (csa_header(NumberOfImagesInMosaic=("US", ["many"]), SliceNormalVector=_NORMAL), "is damaged (ValueError)"),
        (
            csa_header(NumberOfImagesInMosaic=("US", [7]), SliceNormalVector=("FD", ["0.0", "1.0", "0.0"])),
            "SliceNormalVector [0.0, 1.0, 0.0] is not at a right angle to the image",
        ),
        (
            csa_header(NumberOfImagesInMosaic=("US", [50]), SliceNormalVector=_NORMAL),
            "24 x 18 pixels cannot hold 50 slices in rows of 8",
        ),
    ],
)
def test_a_mosaic_without_a_sound_private_header_is_refused(tmp_path, csa, words):
    path = write_siemens_mosaic(tmp_path / "m.dcm", phantom((8, 6, 7)), make_affine("axial"), csa=csa)
    code, reason = refusal(path)
    assert code == "mosaic" and "24 x 18 pixels hold many slices side by side (mosaic), but" in reason
    assert words in reason and reason.endswith("convert it to single slices at the scanner")


def test_a_mosaic_without_private_tags_is_refused(tmp_path):
    def strip(ds):
        ds.remove_private_tags()

    path = write_siemens_mosaic(tmp_path / "m.dcm", phantom((8, 6, 7)), make_affine("axial"), edit=strip)
    assert refusal(path)[0] == "mosaic"
    ds = pydicom.dcmread(path)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M", "VFRAME"]
    ds.save_as(path)
    assert refusal(path)[0] == "mosaic"


def test_a_mosaic_needs_a_distance_between_slices(tmp_path):
    known = {"SpacingBetweenSlices": None, "SliceThickness": None}
    path = write_siemens_mosaic(tmp_path / "m.dcm", phantom((8, 6, 7)), AFFINE, **known)
    code, reason = refusal(path)
    assert code == "mosaic" and "the tiles of a mosaic need SpacingBetweenSlices, got None" in reason
    known["SliceThickness"] = 2.5
    array = phantom((8, 6, 7))
    check(write_siemens_mosaic(tmp_path / "m.dcm", array, AFFINE, **known), array, AFFINE, mosaic=True)


def test_a_uih_mosaic_with_a_missing_place_is_refused(tmp_path):
    path = write_uih_mosaic(tmp_path / "m.dcm", phantom((8, 6, 7)), AFFINE)
    ds = pydicom.dcmread(path)
    del ds[0x00651051].value[3].ImagePositionPatient
    del ds.ImagePositionPatient
    ds.save_as(path)
    code, reason = refusal(path)
    assert code == "mosaic" and "ImagePositionPatient is missing" in reason


@pytest.mark.parametrize("count", [5, 7, 20])
@pytest.mark.parametrize("kind", ["upwards", "downwards", "uih"])
@pytest.mark.parametrize("name", ["axial", "oblique", "oblique-sagittal", "coronal"])
def test_mosaics_against_dcm2niix(tmp_path, kind, name, count):
    """Rows of tiles are as few as hold them for UIH, though more would divide the image as well."""
    affine, path = make_affine(name, (3, 3, 4)), tmp_path / "in" / "m.dcm"
    array = phantom((16, 18 if kind == "uih" else 16, count))
    if kind == "uih":
        write_uih_mosaic(path, array, affine, Manufacturer="UIH")
    else:
        write_siemens_mosaic(path, array, affine, upwards=kind == "upwards", Manufacturer="SIEMENS")
    volume = read_dicom([path])
    np.testing.assert_array_equal(volume.array, array)
    ((theirs, placed),) = volumes_of(tmp_path / "in", tmp_path / "out")
    np.testing.assert_array_equal(on_grid(volume.space, theirs, placed), array)


# ---- other classes with frames


def test_tomosynthesis_lies_in_the_patient(tmp_path):
    array = phantom()
    shared = {**measures_group(AFFINE), **orientation_group(AFFINE)}
    groups = [position_group(AFFINE, k) for k in range(5)]
    path = write_multiframe(
        tmp_path / "e.dcm", list(np.moveaxis(array, 2, 0)), groups, shared, sop_class="13.1.3", Modality="MG"
    )
    assert pydicom.dcmread(path).SOPClassUID == CLASS + "13.1.3"
    check(path, array, AFFINE, modality="MG")


def test_positions_are_read_to_the_last_digit(tmp_path):
    """Functional groups hold decimal strings; positions a micrometre apart stay so."""
    affine = make_affine("axial", (1, 1, 0.05))
    groups = [position_group(affine, k) for k in range(5)]
    assert position_of(affine, 1)[2] - position_of(affine, 0)[2] == pytest.approx(0.05)
    shared = {**measures_group(affine), **orientation_group(affine)}
    path = write_multiframe(tmp_path / "e.dcm", list(np.moveaxis(phantom(), 2, 0)), groups, shared)
    check(path, phantom(), affine)


# ---- reconstructed tomograms of nuclear medicine


def write_tomo(path, array, affine, step=1, order=None, kind="RECON TOMO", **tags):
    """Slices ``(i, j, k)`` of which only the first is placed; they follow against the normal where ``step`` is -1."""
    count = array.shape[2]
    frames = array.transpose(2, 1, 0)[::step]
    first = 0 if step > 0 else count - 1
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    known = {
        "ImageType": ["ORIGINAL", "PRIMARY", kind, "EMISSION"],
        "PixelSpacing": [float(y), float(x)],
        "SliceThickness": 2 * float(z),
        "SpacingBetweenSlices": step * float(z),
        "SliceVector": list(range(1, count + 1)) if order is None else order,
        "DetectorInformationSequence": [
            nested(
                ImagePositionPatient=position_of(affine, first),
                ImageOrientationPatient=orientation_of(affine),
            )
        ],
    }
    order = known["SliceVector"] or range(1, count + 1)
    stored = frames[[int(number) - 1 for number in order]] if sorted(order) == list(range(1, count + 1)) else frames
    return write_flat(path, stored, "20", "NM", **(known | tags))


@pytest.mark.parametrize("name", UPRIGHT)
@pytest.mark.parametrize(
    ("step", "order", "frames"),
    [(1, None, (0, 1, 2, 3, 4)), (-1, None, (4, 3, 2, 1, 0)), (1, [3, 1, 2, 5, 4], (1, 2, 0, 4, 3))],
)
def test_a_tomogram_of_nuclear_medicine(tmp_path, name, step, order, frames):
    array, affine = phantom((7, 6, 5)), make_affine(name)
    path = write_tomo(tmp_path / "nm.dcm", array, affine, step, order)
    one = check(path, array, affine, frames)
    assert (one.modality, one.placed, one.notes) == ("NM", True, ())


def test_a_tomogram_against_dcm2niix(tmp_path):
    array = phantom((7, 6, 5))
    path = write_tomo(tmp_path / "in" / "nm.dcm", array, AFFINE)
    ((theirs, affine),) = volumes_of(path.parent, tmp_path / "out")
    volume = read_dicom([path])
    np.testing.assert_array_equal(on_grid(volume.space, theirs, affine), array)


@pytest.mark.parametrize(
    "tags",
    [
        {"kind": "TOMO"},  # projections
        {"SpacingBetweenSlices": None},
        {"SpacingBetweenSlices": 0},
        {"SliceVector": None},
        {"order": [1, 2, 3, 4, 4]},
        {"order": [1, 2, 3, 4]},
        {"DetectorInformationSequence": None},
    ],
)
def test_frames_of_nuclear_medicine_that_are_not_placed_are_flat(tmp_path, tags):
    array = phantom((7, 6, 5))
    write_tomo(tmp_path / "nm.dcm", array, AFFINE, **tags)
    (one,) = discover(tmp_path).series
    assert (one.problem, one.placed, one.space.shape) == (None, False, (7, 6, 5))
    assert "its position and orientation in the patient are unknown" in one.notes
    np.testing.assert_array_equal(one.read().array, array)
