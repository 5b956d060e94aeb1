import nibabel
import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine, write_nifti
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.testing import data_path
from photographs_synthetic import colours, write_picture
from PIL import Image, ImageOps

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.nifti import read_nifti, read_nifti_header
from medvit.data.raster import read_raster
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import OutputError, SpaceMismatch, UnreadableFile
from medvit.writers.nifti import NiftiLabelWriter, _lossless_type, write_series, write_volume

SHAPE = (5, 4, 3)
LABELS = np.random.default_rng(0).integers(0, 3, SHAPE).astype(np.uint8)
STRUCTURES = tuple(Structure(n, f"s{n}", Code("1", "99T", "a"), Code("2", "99T", "b"), (n, 2, 3)) for n in (1, 2, 300))


def _label_map(space, source, array=LABELS):
    return LabelMap(array, space, source, STRUCTURES)


def _of_file(path):
    image = nibabel.load(path)
    space = Space.from_affine(image.shape[:3], image.affine)
    array = np.random.default_rng(0).integers(0, 3, space.shape).astype(np.uint8)
    return _label_map(space, Source("nifti", (path,)), array)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_dicom_source_gives_sform_and_qform_in_scanner_millimetres(tmp_path, orientation):
    affine = make_affine(orientation)
    path = NiftiLabelWriter().write(
        _label_map(Space.from_affine(SHAPE, affine), Source("dicom", ())), tmp_path / "1.2.840"
    )
    assert path == tmp_path / "1.2.840_seg.nii.gz"
    image = nibabel.load(path)
    np.testing.assert_array_equal(np.asarray(image.dataobj), LABELS)
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    np.testing.assert_allclose(image.header.get_qform(), affine, atol=1e-4)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 1)
    assert image.header.get_xyzt_units() == ("mm", "unknown")


def test_a_sheared_grid_has_no_qform(tmp_path):
    affine = make_affine("axial")
    affine[1, 2] = 0.7
    path = NiftiLabelWriter().write(
        _label_map(Space.from_affine(SHAPE, affine), Source("dicom", ())), tmp_path / "tilt"
    )
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    assert (image.header["sform_code"], image.header["qform_code"]) == (1, 0)


@pytest.mark.parametrize(
    ("sform", "qform", "units"), [(1, 1, 2), (4, 2, 10), (2, 0, 1), (0, 1, 3), (0, 0, 0)], ids=lambda value: str(value)
)
def test_a_nifti_source_passes_on_its_geometry_bit_for_bit(tmp_path, sform, qform, units):
    codes = {"sform_code": sform, "qform_code": qform, "xyzt_units": units}
    source = write_nifti(tmp_path / "in.nii.gz", np.ones(SHAPE, np.int16), make_affine("oblique"), **codes)
    path = NiftiLabelWriter().write(_of_file(source), tmp_path / "out")
    old, new = nibabel.load(source), nibabel.load(path)
    np.testing.assert_array_equal(new.affine, old.affine)
    for field in ("sform_code", "qform_code", "srow_x", "srow_y", "srow_z", "quatern_b", "quatern_c", "quatern_d"):
        np.testing.assert_array_equal(new.header[field], old.header[field], err_msg=field)
    assert new.header.get_xyzt_units()[0] == old.header.get_xyzt_units()[0]
    np.testing.assert_array_equal(new.header["pixdim"][:4], old.header["pixdim"][:4])


def test_nothing_but_geometry_is_taken_from_the_source(tmp_path):
    text = {"descrip": b"Doe^Jane", "db_name": b"SECRET", "aux_file": b"SECRET", "scl_slope": 2.5, "scl_inter": 7}
    source = write_nifti(tmp_path / "in.nii", np.ones(SHAPE, np.int16), make_affine(), **text)
    path = NiftiLabelWriter(suffix=".nii").write(_of_file(source), tmp_path / "out")
    content = path.read_bytes()
    assert b"Doe" not in content
    assert b"SECRET" not in content
    with path.open("rb") as file:
        header = nibabel.Nifti1Header.from_fileobj(file)  # load() would hide the slope
    assert (header["scl_slope"], header["scl_inter"]) == (1, 0)
    assert header["intent_code"] == 0


@pytest.mark.parametrize("name", ["example4d.nii.gz", "anatomical.nii", "example_nifti2.nii.gz"])
def test_real_files_keep_their_affine(tmp_path, name):
    from pathlib import Path

    label_map = _of_file(Path(data_path) / name)
    image = nibabel.load(NiftiLabelWriter().write(label_map, tmp_path / "out"))
    assert image.shape == label_map.space.shape
    np.testing.assert_array_equal(image.affine, label_map.space.affine)
    np.testing.assert_array_equal(np.asarray(image.dataobj), label_map.array)


def test_a_space_that_is_not_the_files_wins(tmp_path):
    source = write_nifti(tmp_path / "in.nii", np.ones(SHAPE, np.int16), make_affine())
    cropped = Space.from_affine(SHAPE, make_affine("sagittal", origin=(1, 2, 3)))
    path = NiftiLabelWriter().write(_label_map(cropped, Source("nifti", (source,))), tmp_path / "out")
    np.testing.assert_allclose(nibabel.load(path).affine, cropped.affine, atol=1e-5)


def test_a_source_that_is_gone_is_named(tmp_path):
    source = Source("nifti", (tmp_path / "gone.nii",))
    with pytest.raises(UnreadableFile, match=r"gone\.nii: cannot be opened: No such file"):
        NiftiLabelWriter().write(_label_map(Space.from_affine(SHAPE, np.eye(4)), source), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_uint16_labels_and_equal_bytes(tmp_path):
    array = LABELS.astype(np.uint16) * 150
    array[array == 150] = 1
    label_map = _label_map(Space.from_affine(SHAPE, make_affine()), Source("dicom", ()), array)
    first, second = (NiftiLabelWriter().write(label_map, tmp_path / name) for name in ("a", "b"))
    image = nibabel.load(first)
    assert image.get_data_dtype() == np.uint16
    np.testing.assert_array_equal(np.asarray(image.dataobj), array)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes()[4:8] == bytes(4)  # gzip's time stamp


def test_an_existing_file_is_kept(tmp_path):
    label_map = _label_map(Space.from_affine(SHAPE, np.eye(4)), Source("dicom", ()))
    path = NiftiLabelWriter().write(label_map, tmp_path / "a")
    before = path.read_bytes()
    with pytest.raises(OutputError, match="exists already"):
        NiftiLabelWriter().write(label_map, tmp_path / "a")
    assert path.read_bytes() == before
    assert NiftiLabelWriter().write(label_map, tmp_path / "a", overwrite=True) == path


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ((-1024, 3071), np.int16),
        ((0, 255), np.int16),
        ((0, 40000), np.uint16),
        ((-5, 40000), np.int32),
        ((0, 0.5), np.float32),
        ((0, 2**24), np.int32),
        ((0, 2**25), np.float32),
        ((0, 1e30), np.float32),
    ],
)
def test_images_are_stored_in_the_smallest_exact_type(tmp_path, values, dtype):
    array = np.zeros(SHAPE, np.float32)
    array[1:3, 2, 1] = values
    path = tmp_path / "sub" / "image.nii.gz"
    affine = make_affine("oblique")
    assert write_volume(Volume(array, Space.from_affine(SHAPE, affine), Source("dicom", ())), path) == path
    image = nibabel.load(path)
    assert image.get_data_dtype() == dtype
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), array)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)


@given(hnp.arrays(np.float32, (2, 2, 2), elements=st.floats(width=32, allow_nan=True)))
def test_the_stored_type_never_changes_a_value(array):
    np.testing.assert_array_equal(array.astype(_lossless_type(array)).astype(np.float32), array)


def test_more_voxels_than_nifti1_can_count(tmp_path):
    array = np.zeros((40000, 1, 1), np.uint8)
    label_map = _label_map(Space.from_affine(array.shape, np.eye(4)), Source("dicom", ()), array)
    image = nibabel.load(NiftiLabelWriter().write(label_map, tmp_path / "long"))
    assert isinstance(image, nibabel.Nifti2Image)
    assert image.shape == (40000, 1, 1)


# ---- series, colours, images without a place


def image_of(array, affine=None, unit="mm", **source):
    affine = make_affine("oblique") if affine is None else affine
    return Volume(array, Space.from_affine(array.shape[:3], affine, unit=unit), Source("dicom", (), **source))


@pytest.mark.parametrize("step", [None, 1.75])
def test_a_series_is_one_file_with_its_time_step(tmp_path, step):
    arrays = [np.random.default_rng(n).integers(0, 40000, SHAPE).astype(np.float32) for n in range(4)]
    arrays[2][0, 0, 0] = -9
    path = write_series([image_of(array) for array in arrays], tmp_path / "x.nii.gz", time_step=step)
    image = nibabel.load(path)
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.stack(arrays, -1))
    assert image.get_data_dtype() == np.int32  # uint16 for three of them, not for the third
    np.testing.assert_allclose(image.affine, make_affine("oblique"), atol=1e-5)
    assert image.header["pixdim"][4] == (step or 1)
    assert image.header.get_xyzt_units() == ("mm", "sec" if step else "unknown")
    assert [read_nifti(path, index=n).array.max() for n in range(4)] == [array.max() for array in arrays]
    assert read_nifti_header(path).time_step == step


def test_fractions_in_one_volume_make_all_of_a_series_float32(tmp_path):
    arrays = [np.full(SHAPE, value, np.float32) for value in (2**24 - 1, 0.1)]
    image = nibabel.load(write_series([image_of(array) for array in arrays], tmp_path / "x.nii"))
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(image.get_fdata(dtype=np.float32), np.stack(arrays, -1))


def test_scaled_values_are_kept_bit_for_bit(tmp_path):
    array = (np.random.default_rng(0).integers(0, 4096, SHAPE) * 0.0037 - 1.1).astype(np.float32)
    path = write_volume(image_of(array), tmp_path / "x.nii.gz")
    assert nibabel.load(path).get_fdata(dtype=np.float32).tobytes() == np.asfortranarray(array).tobytes()


def test_a_series_needs_one_grid(tmp_path):
    moved = make_affine("oblique")
    moved[0, 3] += 1
    volumes = [image_of(np.zeros(SHAPE, np.float32), affine) for affine in (None, None, moved)]
    with pytest.raises(SpaceMismatch, match=r"volumes 0 and 2 of a series .* corners are 1 mm apart"):
        write_series(volumes, tmp_path / "x.nii")
    assert list(tmp_path.iterdir()) == []


def test_a_series_of_a_nifti_source_keeps_its_fields(tmp_path):
    array = np.random.default_rng(0).integers(0, 9, (*SHAPE, 2)).astype(np.int16)
    source = write_nifti(tmp_path / "in.nii", array, make_affine("oblique"), qform_code=2, xyzt_units=2 + 8)
    known = read_nifti_header(source)
    path = write_series(
        [read_nifti(source, index=n) for n in range(2)], tmp_path / "out.nii", time_step=known.time_step
    )
    old, new = nibabel.load(source), nibabel.load(path)
    np.testing.assert_array_equal(new.dataobj, old.dataobj)
    assert new.header["qform_code"] == 2
    for field in ("srow_x", "quatern_b", "pixdim", "xyzt_units"):
        np.testing.assert_array_equal(new.header[field], old.header[field], err_msg=field)


def test_colours_become_rgb24(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3)).astype(np.float32)
    image = nibabel.load(write_volume(image_of(array), tmp_path / "x.nii.gz"))
    assert image.get_data_dtype() == np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    voxels = np.asarray(image.dataobj)
    np.testing.assert_array_equal(np.stack([voxels[channel] for channel in "RGB"], -1), array)
    np.testing.assert_allclose(image.affine, make_affine("oblique"), atol=1e-5)
    for value in (-1, 256, 0.5, np.nan):
        array[0, 0, 0, 0] = value
        with pytest.raises(OutputError, match=r"colours must be whole numbers of 0 to 255, got values from"):
            write_volume(image_of(array), tmp_path / "bad.nii")
    with pytest.raises(OutputError, match=r"three channels, got an array of shape \(5, 4, 3, 2\)"):
        write_volume(image_of(array[..., :2]), tmp_path / "bad.nii")
    array[0, 0, 0, 0] = 0
    with pytest.raises(OutputError, match="a series of 2 colour images fits no NIfTI file"):
        write_series([image_of(array)] * 2, tmp_path / "bad.nii")
    assert not (tmp_path / "bad.nii").exists()


def test_an_image_without_a_place_states_its_spacing_only(tmp_path):
    array = np.random.default_rng(0).integers(0, 4096, (6, 5, 1)).astype(np.float32)
    path = write_volume(image_of(array, np.diag([0.139, 0.14, 1, 1])), tmp_path / "x.nii", placed=False)
    header = nibabel.load(path).header
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (0, 0, "mm")
    np.testing.assert_allclose(header["pixdim"][1:4], [0.139, 0.14, 1])
    np.testing.assert_array_equal(nibabel.load(path).dataobj, array)
    assert read_nifti_header(path).notes == ("its orientation is unknown: neither sform nor qform is set",)


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photograph_is_written_upright_and_without_millimetres(tmp_path, orientation):
    picture = write_picture(tmp_path / "a.jpg", colours(24, 16), orientation)
    image = nibabel.load(write_volume(read_raster(picture), tmp_path / "a.nii.gz"))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(picture)))
    voxels = np.asarray(image.dataobj)
    np.testing.assert_array_equal(np.stack([voxels[channel][..., 0].T for channel in "RGB"], -1), shown)
    assert image.shape == ((24, 16, 1) if orientation == 1 else (16, 24, 1))
    header = image.header
    assert (header["sform_code"], header["qform_code"], header.get_xyzt_units()[0]) == (0, 0, "unknown")
    np.testing.assert_array_equal(header["pixdim"][1:4], [1, 1, 1])


def test_a_qform_with_a_handedness_of_0_is_one_of_1(tmp_path):
    """As the standard says of pixdim[0], and old programs write; nibabel takes no 0."""
    affine = make_affine("oblique")
    file = write_nifti(tmp_path / "s.nii", np.zeros((3, 4, 5), np.int16), affine, sform_code=0)
    with file.open("r+b") as stream:
        stream.seek(76)
        stream.write(b"\0" * 4)
    volume = read_nifti(file)
    written = nibabel.load(write_volume(volume, tmp_path / "t.nii"))
    np.testing.assert_allclose(written.affine, volume.space.affine, atol=1e-5)
    assert written.header["pixdim"][0] == np.sign(np.linalg.det(affine)) == 1
