import nibabel
import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine, write_nifti
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel.testing import data_path

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import OutputError, UnreadableFile
from medvit.writers.nifti import NiftiLabelWriter, _lossless_type, write_volume

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
    with pytest.raises(UnreadableFile, match=r"gone\.nii: the source header is needed"):
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
