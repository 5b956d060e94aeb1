import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import ORIENTATIONS, make_affine, phantom, slice_dataset, write_dicom_series
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless

from medvit.data.dicom import assemble, read_dicom
from medvit.data.grouping import group_series, without_duplicates
from medvit.data.headers import NotAnImage, looks_like_dicom, read_header
from medvit.data.space import LPS_TO_RAS
from medvit.data.volume import Source
from medvit.errors import UnreadableFile, UnreadableSeries


def bundled(name):
    return Path(get_testdata_file(name, download=False))


def refusal(files, name="s"):
    with pytest.raises(UnreadableSeries) as caught:
        read_dicom(files, name)
    return caught.value.code, str(caught.value)


def cut_end(path, cut):
    """Cut ``cut`` bytes off the end of a file."""
    path.write_bytes(path.read_bytes()[:-cut])


@pytest.mark.parametrize("name", sorted(set(ORIENTATIONS) - {"reversed"}))
def test_every_orientation_voxel_for_voxel(tmp_path, name):
    array, affine = phantom(), make_affine(name)
    files = write_dicom_series(tmp_path, array, affine)
    volume = read_dicom(sorted(files), "p1/twin")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
    assert volume.array.dtype == np.float32 and volume.notes == ()
    first = pydicom.dcmread(files[0])
    source = volume.source
    assert (source.kind, source.modality, source.name, source.files) == ("dicom", "MR", "p1/twin", tuple(files))
    assert (source.study_uid, source.series_uid) == (first.StudyInstanceUID, first.SeriesInstanceUID)
    assert volume.space.frame_of_reference == first.FrameOfReferenceUID


def test_a_left_handed_stack_is_turned_round(tmp_path):
    array, affine = phantom(), make_affine("reversed")
    files = write_dicom_series(tmp_path, array, affine)
    volume = read_dicom(files)
    np.testing.assert_array_equal(volume.array, array[:, :, ::-1])
    assert volume.source.files == tuple(files[::-1]) and volume.space.orientation == "LPS"
    np.testing.assert_allclose(volume.space.world((0, 0, 4)), affine[:3, 3], atol=1e-6)


@settings(max_examples=15)
@given(
    st.sampled_from(sorted(set(ORIENTATIONS) - {"reversed"})),
    st.tuples(*[st.integers(1, 6)] * 3),
    st.sampled_from(["int16", "uint16", "int8", "uint8"]),
    st.integers(0, 99),
)
def test_any_shape_and_integer_type(tmp_path_factory, name, shape, dtype, seed):
    limits = np.iinfo(dtype)
    array = np.random.default_rng(seed).integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
    volume = read_dicom(write_dicom_series(tmp_path_factory.mktemp("s"), array, make_affine(name)))
    np.testing.assert_array_equal(volume.array, array)


@pytest.mark.parametrize("name", ["axial", "oblique", "oblique-sagittal", "feet-first"])
def test_agrees_with_simpleitk(tmp_path, name):
    import SimpleITK as sitk

    files = write_dicom_series(tmp_path, phantom((9, 8, 7)), make_affine(name), modality="CT")
    volume = read_dicom(files)
    image = sitk.ReadImage([str(file) for file in files])
    np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    np.testing.assert_allclose(volume.space.affine, LPS_TO_RAS @ affine, atol=1e-6)


def test_ct_is_in_hounsfield_units(tmp_path):
    array = phantom()
    volume = read_dicom(write_dicom_series(tmp_path, array, make_affine(), modality="CT"))
    np.testing.assert_array_equal(volume.array, array - 1024.0)


def test_rescale_differs_from_slice_to_slice(tmp_path):
    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = [(1, 0), (0.0037, 0), (2.5, -10), (1, 7), (0.5, 0.25)][k]

    array = phantom()
    volume = read_dicom(write_dicom_series(tmp_path, array, make_affine(), modality="PT", edit=edit))
    slopes, intercepts = np.array([1, 0.0037, 2.5, 1, 0.5]), np.array([0, 0, -10, 7, 0.25])
    np.testing.assert_allclose(volume.array, array * slopes + intercepts, rtol=1e-6)


@pytest.mark.parametrize(("slope", "message"), [("0", "RescaleSlope is 0"), ("1e400", "RescaleSlope is inf")])
def test_a_senseless_rescale_is_refused(tmp_path, slope, message):
    files = write_dicom_series(tmp_path, phantom(), make_affine(), RescaleSlope=slope, RescaleIntercept="0")
    with pytest.raises(UnreadableFile, match=message):
        read_dicom(files)


def test_modality_lut(tmp_path):
    def edit(ds, k):
        lut = pydicom.Dataset()
        lut.add_new("LUTDescriptor", "US", [2000, 0, 16])
        lut.add_new("LUTData", "OW", (np.arange(2000, dtype="<u2") * 3 + 5).tobytes())
        ds.ModalityLUTSequence = [lut]

    array = phantom().astype(np.uint16)
    volume = read_dicom(write_dicom_series(tmp_path, array, make_affine(), edit=edit))
    np.testing.assert_array_equal(volume.array, array * 3.0 + 5)


def test_monochrome1_is_not_inverted(tmp_path):
    array = phantom()
    files = write_dicom_series(tmp_path, array, make_affine(), PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_dicom(files).array, array)


def test_rubbish_above_bits_stored_is_masked(tmp_path):
    array = phantom().astype(np.uint16)
    dirty = array | 0xF000
    volume = read_dicom(write_dicom_series(tmp_path, dirty, make_affine(), BitsStored=12, HighBit=11))
    np.testing.assert_array_equal(volume.array, array)


ENCODINGS = [
    *("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"),
    *("MR_small_bigendian", "MR_small_implicit", "MR_small_expb", "MR_small_padded"),
]


@pytest.mark.parametrize("name", ENCODINGS)
def test_encodings_of_one_image_agree(name):
    reference, volume = read_dicom([bundled("MR_small.dcm")]), read_dicom([bundled(f"{name}.dcm")])
    np.testing.assert_array_equal(volume.array, reference.array)
    assert volume.space == reference.space and volume.array.std() > 100
    assert volume.notes == ("a single slice: its thickness of 0.8 mm stands for the distance between slices",)


def test_a_file_without_preamble_and_meta_header(tmp_path):
    array = phantom()
    files = write_dicom_series(tmp_path, array, make_affine())
    for file in files:
        ds = pydicom.dcmread(file)
        bare = pydicom.Dataset(dict(ds.items()))
        bare.save_as(file, implicit_vr=True, little_endian=True, enforce_file_format=False)
        assert file.read_bytes()[:2] == b"\x08\x00"
    np.testing.assert_array_equal(read_dicom(files).array, array)


def test_identical_copies_are_dropped_with_a_note(tmp_path):
    array = phantom()
    files = write_dicom_series(tmp_path, array, make_affine())
    copy = shutil.copy(files[2], tmp_path / "a copy.dcm")
    volume = read_dicom([*files, copy])
    np.testing.assert_array_equal(volume.array, array)
    assert len(volume.source.files) == 5
    assert volume.notes[0].startswith("duplicates of other files ignored: 1 (")


def test_the_same_uid_with_other_pixels_is_no_copy(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    ds = pydicom.dcmread(files[2])
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(tmp_path / "other.dcm")
    code, message = refusal([*files, tmp_path / "other.dcm"])
    assert code == "duplicate-positions" and "1 of 5 positions hold several" in message


def test_one_instance_uid_on_all_slices_is_survived(tmp_path):
    array = phantom()
    files = write_dicom_series(tmp_path, array, make_affine(), SOPInstanceUID="1.2.3")
    np.testing.assert_array_equal(read_dicom(files).array, array)


def test_missing_slice_names_the_gap(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    code, message = refusal(files[:2] + files[3:], "p1/T1")
    assert code == "missing-slice"
    assert (
        message.startswith("p1/T1: 1 of 5 slices are missing: slices are 2.5 mm apart") and "-57.5 and -52.5" in message
    )


def test_four_dimensional(tmp_path):
    """Two volumes whose images nothing tells apart; test_volumes.py has those that are."""
    same = {"SeriesInstanceUID": "1.2", "StudyInstanceUID": "1", "FrameOfReferenceUID": "1.3", "ContentTime": ""}
    files = write_dicom_series(tmp_path / "a", phantom(), make_affine(), **same)
    more = write_dicom_series(tmp_path / "b", phantom(seed=1), make_affine(), **same)
    code, message = refusal(files + more)
    assert code == "four-dimensional" and "10 slices lie at 5 positions, 2 at each" in message


@pytest.mark.parametrize("lacking", [[0], [4], [1, 2], [0, 1, 2, 3], list(range(5))])
def test_some_files_lack_the_frame_of_reference(tmp_path, lacking):
    """As after de-identification: they belong together all the same, and the volume has the UID that there is."""

    def edit(ds, k):
        if k in lacking:
            del ds.FrameOfReferenceUID

    array = phantom()
    files = write_dicom_series(tmp_path, array, make_affine(), edit=edit, FrameOfReferenceUID="1.2.3.4")
    volume = read_dicom(files)
    np.testing.assert_array_equal(volume.array, array)
    every = len(lacking) == 5
    assert volume.notes == (() if every else ("some of its files lack the FrameOfReferenceUID that the others have",))
    assert volume.space.frame_of_reference == (None if every else "1.2.3.4")


def test_rounding_noise_of_tags_is_one_volume(tmp_path):
    """Cosines and spacings that differ from slice to slice in the fifth digit, as scanners write them."""
    rng = np.random.default_rng(1)
    affine = make_affine("oblique")

    def edit(ds, k):
        ds.ImageOrientationPatient = [float(v) + rng.uniform(-3e-5, 3e-5) for v in ds.ImageOrientationPatient]
        ds.PixelSpacing = [float(v) * (1 + rng.uniform(-3e-5, 3e-5)) for v in ds.PixelSpacing]

    array = phantom((7, 6, 30))
    volume = read_dicom(write_dicom_series(tmp_path, array, affine, edit=edit))
    np.testing.assert_array_equal(volume.array, array)
    corners = np.array([(0, 0, 0), (6, 5, 29), (6, 0, 29)])
    expected = corners @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(volume.space.world(corners), expected, atol=2e-3)
    assert volume.notes == ()


@pytest.mark.parametrize("lacking", [[0], [2, 3], list(range(5))])
def test_files_without_a_class_are_judged_by_what_is_in_them(tmp_path, lacking):
    def edit(ds, k):
        if k in lacking:
            del ds.SOPClassUID
            ds.file_meta.MediaStorageSOPClassUID = ""

    array = phantom()
    for file in write_dicom_series(tmp_path / "a", array, make_affine("coronal")):
        ds = pydicom.dcmread(file)
        edit(ds, list(array[0, 0]).index(ds.pixel_array[0, 0]))
        ds.save_as(file)
    volume = read_dicom(list((tmp_path / "a").iterdir()))
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, make_affine("coronal"), atol=2e-6)


def test_padding_and_signed_values_are_kept(tmp_path):
    """PixelPaddingValue is a raw value; it is scaled like the rest, and no voxel is dropped."""
    array = phantom() - 1000
    array[0, :, :] = -2000
    files = write_dicom_series(tmp_path, array, make_affine(), modality="CT", PixelPaddingValue=-2000)
    np.testing.assert_array_equal(read_dicom(files).array, array - 1024.0)


def test_numbers_beyond_24_bits_are_counted(tmp_path):
    array = phantom().astype(np.int32)
    array[2, 3, 1], array[0, 0, 4], array[1, 1, 1] = 2**24 + 1, -(2**30) - 1, 2**25
    volume = read_dicom(write_dicom_series(tmp_path, array, make_affine()))
    np.testing.assert_array_equal(volume.array, array.astype(np.float32))
    assert volume.notes == ("2 voxels hold numbers beyond 16777216, which were rounded to 24 bits",)


def test_paths_in_any_script(tmp_path):
    array = phantom()
    files = write_dicom_series(tmp_path / "Pаtient Ü 图 ‘x’", array, make_affine(), prefix="снимок ")
    volume = read_dicom(files)
    np.testing.assert_array_equal(volume.array, array)
    files[2].unlink()
    code, message = refusal([file for file in files if file != files[2]], "")
    assert code == "missing-slice" and message.startswith(str(tmp_path / "Pаtient Ü 图 ‘x’"))


def test_two_frames_of_reference_are_two_series(tmp_path):
    """A patient who was moved in between: equal positions are other places."""

    def edit(ds, k):
        ds.FrameOfReferenceUID = f"1.2.3.{k // 3}"

    code, message = refusal(write_dicom_series(tmp_path, phantom((7, 6, 6)), make_affine(), edit=edit))
    assert code == "several-series" and message.count('3 files of series 3 "T1 test" (MR, 7 x 6)') == 2


def test_a_frame_of_reference_for_each_file_is_none(tmp_path):
    """Some anonymisation makes new UIDs file by file."""
    affine, array = make_affine("oblique"), phantom()
    files = write_dicom_series(
        tmp_path, array, affine, edit=lambda ds, k: setattr(ds, "FrameOfReferenceUID", f"1.2.3.{k}")
    )
    volume = read_dicom(files)
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
    assert volume.space.frame_of_reference is None
    assert volume.notes == (
        "each of its files has a FrameOfReferenceUID of its own; their positions were taken to be in one frame",
    )


@pytest.mark.parametrize("uid", [None, "1.2.3"])
@pytest.mark.parametrize("step", [5, 5.3])
def test_series_of_one_uid_are_told_apart_by_their_number(tmp_path, uid, step):
    """UIDs that were removed, or all made one; the second series begins where the first one ends."""
    affine = make_affine("oblique")
    arrays = [phantom(seed=1), phantom((7, 6, 4), seed=2)]
    shared = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": uid, "FrameOfReferenceUID": "1.2.4"}
    for n, array in enumerate(arrays):
        placed = affine.copy()
        placed[:3, 3] = affine[:3] @ (0, 0, n * step, 1)
        write_dicom_series(tmp_path, array, placed, prefix=f"{n}_", SeriesNumber=n + 3, **shared)
    groups = group_series(map(read_header, sorted(tmp_path.iterdir())))
    assert [[group.first.series_number, len(group.images), group.notes] for group in groups] == [[3, 5, ()], [4, 4, ()]]
    for group, array in zip(groups, arrays, strict=True):
        (assembly,) = assemble(group, "s")
        assert assembly.problem is None
        np.testing.assert_array_equal(assembly.load(Source("dicom", ())).array, array)


def test_a_broken_slice_spoils_the_series_of_its_number(tmp_path):
    """Of series that share one UID."""
    for n, slices in enumerate((5, 4)):
        shared = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "SeriesNumber": n + 3}
        files = write_dicom_series(tmp_path, phantom((7, 6, slices)), make_affine(), prefix=f"{n}_", **shared)
    cut_end(files[-1], 10)
    groups = group_series(map(read_header, sorted(tmp_path.iterdir())))
    assert [(group.first.series_number, [one.path for one in group.broken]) for group in groups] == [
        (3, []),
        (4, [files[-1]]),
    ]


@pytest.mark.parametrize(
    ("keyword", "values", "name"),
    [
        ("ImageType", ["ORIGINAL\\PRIMARY\\M", "ORIGINAL\\PRIMARY\\P"], "image_type"),
        ("ConvolutionKernel", ["B30f", "B70f"], "kernel"),
        ("KVP", [80, 140], "kvp"),
    ],
)
def test_slices_of_two_kinds_in_one_stack_carry_a_note(tmp_path, keyword, values, name):
    def edit(ds, k):
        setattr(ds, keyword, values[k >= 3])

    volume = read_dicom(write_dicom_series(tmp_path, phantom(), make_affine(), edit=edit))
    assert volume.notes == (f"its slices differ in {name}, and may be of several images",)


@pytest.mark.parametrize(
    ("modality", "stated", "short"), [("PT", 7, True), ("PT", 5, False), ("PT", 4, False), ("MR", 7, False)]
)
def test_a_pet_series_counts_its_slices(tmp_path, modality, stated, short):
    """Two slices that are lost at an end leave no gap."""
    files = write_dicom_series(tmp_path, phantom(), make_affine(), modality=modality, NumberOfSlices=stated)
    note = "its header counts 7 slices, but only 5 are here; the first or last may be lost"
    assert read_dicom(files).notes == ((note,) if short else ())


@pytest.mark.parametrize(
    ("kept", "stated", "lost"),
    [
        ((0, 2, 4), 2.5, True),  # every second one
        ((1, 4), 2.5, True),  # two are even whatever lay between them
        ((0, 1, 2, 3, 4), 2.5, False),
        ((0, 2, 4), 5, False),
        ((0, 2, 4), None, False),
        ((0, 2, 4), 1.25, False),  # below the thickness: a gap
        ((2,), 1, False),
    ],
)
def test_slices_that_are_lost_evenly(tmp_path, kept, stated, lost):
    files = write_dicom_series(tmp_path, phantom(), make_affine(), SpacingBetweenSlices=stated)
    volume = read_dicom([files[k] for k in kept])
    step = 2.5 * (kept[-1] - kept[0]) / (len(kept) - 1 or 1)
    note = f"its slices are {step:g} mm apart, 2.5 mm by SpacingBetweenSlices; some may be lost"
    assert (note in volume.notes) == lost and len(volume.notes) == (lost or len(kept) == 1)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("sop_class", ["7", "1.1"])  # secondary capture, digital X-ray
def test_a_capture_with_a_place_but_no_thickness_is_flat(tmp_path, sop_class, count):
    array = phantom((7, 6, count))
    tags = {"SOPClassUID": f"1.2.840.10008.5.1.4.1.1.{sop_class}", "SliceThickness": None}
    files = write_dicom_series(tmp_path, array, make_affine(), ImagePositionPatient=[1, 2, 3], **tags)
    with pytest.raises(UnreadableSeries, match="has none"):
        read_dicom(files)
    (group,) = group_series(map(read_header, files))
    found = assemble(group, "s")
    assert len(found) == count
    for one in found:
        assert (one.problem, one.flat, one.space.shape, one.space.spacing) == (None, True, (7, 6, 1), (0.75, 1.25, 1.0))
        assert "without a SliceThickness" in one.notes[-1] and "without its place" in one.notes[-1]
        assert one.frames == (0,)
        np.testing.assert_array_equal(one.load(Source("dicom", ())).array, array[:, :, [files.index(one.files[0])]])


def test_captures_with_a_place_but_no_thickness_are_stacked_where_they_can_be(tmp_path):
    tags = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "SliceThickness": None}
    volume = read_dicom(write_dicom_series(tmp_path, phantom(), make_affine(), **tags))
    np.testing.assert_allclose(volume.space.affine, make_affine(), atol=2e-6)


def test_gantry_tilt(tmp_path):
    affine = make_affine("axial", (0.5, 0.5, 5))
    affine[1, 2] = 1.0
    code, message = refusal(write_dicom_series(tmp_path, phantom(), affine))
    assert code == "gantry-tilt" and "11.31 degrees" in message


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"ImagePositionPatient": None}, "ImagePositionPatient is missing"),
        ({"ImageOrientationPatient": None}, "ImageOrientationPatient is missing"),
        ({"PixelSpacing": None}, "PixelSpacing is missing"),
        ({"PixelSpacing": [0, 1]}, "PixelSpacing must be positive"),
        ({"PixelSpacing": [1]}, "PixelSpacing needs 2 numbers, got 1"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "two orthogonal unit vectors"),
    ],
)
def test_geometry_is_never_invented(tmp_path, tags, reason):
    code, message = refusal(write_dicom_series(tmp_path, phantom(), make_affine(), **tags))
    assert code == "no-geometry" and reason in message and "and 4 more of 5 files" in message


def test_text_instead_of_numbers(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine(), PixelSpacing=[1.25, 0.75])
    for file in files:
        data = file.read_bytes()
        assert b"1.25\\0.75" in data
        file.write_bytes(data.replace(b"1.25\\0.75", b"wide\\0.75"))
    assert refusal(files)[0] == "no-geometry"


def test_one_slice_without_geometry_spoils_its_series(tmp_path):
    def edit(ds, k):
        if k == 4:
            del ds.ImagePositionPatient

    files = write_dicom_series(tmp_path, phantom(), make_affine(), edit=edit)
    code, message = refusal(files)  # without it four slices would look like a complete stack
    assert code == "no-geometry" and f"{files[4].name} of 5 files" in message


@pytest.mark.parametrize("cut", [1, 40])
def test_pixels_cut_short(tmp_path, cut):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    cut_end(files[4], cut)
    code, message = refusal(files)
    assert code == "truncated"
    assert f"{files[4].name} of 5 files: the file is cut short: {84 - cut} of 84 bytes of pixels are there" in message


def test_header_cut_short_spoils_its_series(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    data = files[0].read_bytes()
    files[0].write_bytes(data[: data.index(b"\x20\x00\x32\x00")])  # after the UIDs, before the position
    code, message = refusal(files)
    assert code == "truncated" and f"{files[0].name} of 5 files: the file ends before its pixels" in message


def test_fewer_pixels_than_the_matrix_needs(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine(), Rows=600, Columns=700)
    code, message = refusal(files)
    assert code == "truncated" and "84 of 840000 bytes" in message


def test_bundled_truncated_file():
    code, message = refusal([bundled("MR_truncated.dcm")])
    assert code == "truncated" and "8130 of 8192 bytes" in message


def compressed(tmp_path, syntax, stream=b"\0" * 64, **tags):
    def edit(ds, k):
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([stream])
        ds["PixelData"].is_undefined_length = True

    return write_dicom_series(tmp_path, phantom(), make_affine(), edit=edit, **tags)


def test_header_bomb(tmp_path):
    files = compressed(tmp_path, RLELossless, Rows=65535, Columns=65535, BitsAllocated=32, BitsStored=32, HighBit=31)
    code, message = refusal(files)
    assert code == "truncated" and "promises 17179344900 bytes of pixels in a file of" in message


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, RLELossless, JPEGLosslessSV1, JPEGLSLossless])
def test_a_corrupt_stream_names_its_file(tmp_path, syntax):
    files = compressed(tmp_path, syntax)
    with pytest.raises(UnreadableFile, match="pixels cannot be decoded") as caught:
        read_dicom(files)
    assert str(caught.value).startswith(str(files[0])) and syntax.name in str(caught.value)


def test_a_private_syntax_is_refused(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    for file in files:
        data = file.read_bytes()
        assert data.count(b"1.2.840.10008.1.2.1\0") == 1
        file.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.999.10008.1.2.1\0"))
    with pytest.raises(UnreadableFile, match=r"corrupt DICOM header|private transfer syntax"):
        read_dicom(files)


@pytest.mark.parametrize(
    ("tags", "code", "words"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "mosaic", "7 x 6 pixels hold many slices"),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            "colour",
            "grey values are needed, but this is a colour image",
        ),
        ({"NumberOfFrames": 2, "Rows": 3}, "multi-frame", "2 frames"),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1"},
            "no-geometry",
            "NumberOfFrames is 1, but PerFrameFunctionalGroupsSequence describes 0",
        ),
    ],
)
def test_kinds_of_image_that_are_no_slice(tmp_path, tags, code, words):
    found, message = refusal(write_dicom_series(tmp_path, phantom(), make_affine(), **tags))
    assert found == code and words in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rtdose.dcm", "RT Dose Storage"),
        ("reportsi.dcm", "Basic Text SR Storage"),
        ("liver_1frame.dcm", "Segmentation Storage"),
        ("dicomdirtests/DICOMDIR", "Media Storage Directory"),
        ("ExplVR_LitEndNoMeta.dcm", "RT Ion Plan Storage"),
    ],
)
def test_objects_that_are_no_images(name, kind):
    path = bundled("MR_small.dcm").parent / name
    with pytest.raises(NotAnImage, match=kind):
        read_header(path)


def test_files_that_are_not_dicom(tmp_path):
    for content, message in ((b"", "the file is empty"), (b"hello" * 100, "not a DICOM file")):
        path = tmp_path / "x.dcm"
        path.write_bytes(content)
        with pytest.raises(UnreadableFile, match=message):
            read_header(path)
    with pytest.raises(UnreadableFile, match="cannot be opened: No such file"):
        read_header(tmp_path / "absent.dcm")


@settings(max_examples=80)
@given(st.integers(0, 2**32))
def test_a_damaged_header_is_an_error_of_ours_or_still_a_header(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    path = write_dicom_series(tmp_path_factory.mktemp("fuzz"), phantom((3, 3, 1)), make_affine())[0]
    content = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 9)):
        content[rng.integers(132, len(content))] = rng.integers(256)
    path.write_bytes(bytes(content[: rng.integers(140, len(content) + 1)] if rng.random() < 0.5 else content))
    try:
        header = read_header(path)
        assert header.plane is not None or header.defect is not None
        read_dicom([path])
    except (UnreadableFile, UnreadableSeries):
        pass


def test_what_a_beginning_tells():
    assert looks_like_dicom(b"\0" * 128 + b"DICM")
    assert looks_like_dicom(b"\x08\x00\x05\x00CS" + b"\0" * 200)
    assert not looks_like_dicom(b"\x08\x00 some text that begins oddly" + b" " * 200)
    assert not looks_like_dicom(b"\x08\x00\x05\x00CS")


def test_scouts_do_not_mix_with_their_series(tmp_path):
    common = {"StudyInstanceUID": "1", "SeriesInstanceUID": "1.2", "FrameOfReferenceUID": "1.3"}
    files = write_dicom_series(tmp_path, phantom(), make_affine(), **common)
    scouts = [
        *write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine("coronal"), prefix="A", **common),
        *write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine(spacing=(0.9, 1.25, 2)), prefix="B", **common),
        *write_dicom_series(tmp_path, phantom((9, 6, 1)), make_affine(), prefix="C", **common),
        *write_dicom_series(
            tmp_path,
            phantom((7, 6, 1)),
            make_affine(),
            prefix="D",
            ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"],
            **common,
        ),
    ]
    groups = group_series([read_header(file) for file in [*files, *scouts]])
    assert sorted(len(group.images) for group in groups) == [1, 1, 1, 1, 5]
    (volume,) = assemble(max(groups, key=lambda group: len(group.images)), "s")
    assert volume.files == tuple(files) and volume.problem is None
    np.testing.assert_allclose(volume.space.affine, make_affine(), atol=2e-6)
    array = volume.load(Source("dicom", ())).array
    np.testing.assert_array_equal(array, phantom())
    code, message = refusal([*files, *scouts])
    assert code == "several-series" and 'series 3 "T1 test" (MR, 7 x 6)' in message


@pytest.mark.parametrize(("volumes", "slices"), [(1, 5000), (200, 50)])
def test_thousands_of_slices_are_grouped_in_no_time(tmp_path, volumes, slices):
    """Nothing is quadratic in the number of files."""
    (file,) = write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine())
    header = read_header(file)
    (frame,) = header.frames
    headers = []
    for n in range(volumes * slices):
        plane = replace(frame.plane, position=(0.0, 0.0, 2.5 * (n % slices)))
        known = replace(frame, plane=plane, labels=(*frame.labels[:-1], float(n)), time=None)
        headers.append(replace(header, path=tmp_path / f"{n:05d}", instance_uid=f"1.{n}", frames=(known,)))
    start = time.perf_counter()
    (group,) = group_series(headers)
    group, dropped = without_duplicates(group)
    found = assemble(group, "s")
    assert time.perf_counter() - start < 5  # 0.3 s on an idle core
    assert dropped == () and [len(one.files) for one in found] == [slices] * volumes
    assert [one.space.shape for one in found] == [(7, 6, slices)] * volumes


def test_messages_hold_no_patient_data(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    for chosen in (files[:1] + files[2:4], [*files, *write_dicom_series(tmp_path / "b", phantom(), make_affine())]):
        message = refusal(chosen)[1]
        assert not any(secret in message for secret in ("Doe", "SECRET", "1970"))


def test_no_files():
    with pytest.raises(UnreadableSeries, match="at least one file is needed"):
        read_dicom([])


def test_slices_of_a_series_are_read_once_each(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    assert read_dicom([*files, *files]).notes == ()


def test_slice_dataset_has_the_stated_layout():
    image = np.arange(6, dtype=np.int16).reshape(3, 2)  # 3 columns, 2 rows
    ds = slice_dataset(image)
    assert (ds.Rows, ds.Columns) == (2, 3)
    np.testing.assert_array_equal(ds.pixel_array, image.T)
