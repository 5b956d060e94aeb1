import gzip
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine, phantom, write_nifti

from medvit.data.nifti import read_nifti, read_nifti_header, stem
from medvit.errors import UnreadableFile, UnreadableSeries

SHARED = Path(__file__).parents[3] / "shared" / "data"


def refusal(path):
    """Code and message of an error that the header alone gives."""
    with pytest.raises((UnreadableSeries, UnreadableFile)) as caught:
        read_nifti_header(path)
    assert str(caught.value).startswith(str(path))
    return caught.value.code, str(caught.value)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_every_orientation_keeps_order_and_affine(tmp_path, name, suffix):
    array, affine = phantom(), make_affine(name)
    path = write_nifti(tmp_path / f"x{suffix}", array, affine)
    volume = read_nifti(path, "p1/x")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_array_equal(volume.space.affine, nibabel.load(path).affine)
    np.testing.assert_allclose(volume.space.affine, affine, atol=1e-5)
    assert volume.array.dtype == np.float32 and volume.notes == ()
    assert (volume.source.kind, volume.source.files, volume.source.name) == ("nifti", (path,), "p1/x")
    assert volume.space.frame_of_reference is None


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64", "int64", "uint64"])
def test_types(tmp_path, dtype):
    array = phantom().astype(dtype) % 200
    np.testing.assert_array_equal(read_nifti(write_nifti(tmp_path / "x.nii", array, make_affine())).array, array)


def test_scale_big_endian_nifti2_and_pairs(tmp_path):
    array, affine = phantom(), make_affine()
    scaled = nibabel.Nifti1Image(array, affine)
    scaled.header.set_slope_inter(0.5, -3)
    scaled.to_filename(tmp_path / "scaled.nii")
    raw = nibabel.load(tmp_path / "scaled.nii").dataobj.get_unscaled()
    np.testing.assert_allclose(read_nifti(tmp_path / "scaled.nii").array, raw * 0.5 - 3)
    nibabel.Nifti1Image(array, affine, nibabel.Nifti1Header(endianness=">")).to_filename(tmp_path / "big.nii")
    nibabel.Nifti2Image(array, affine).to_filename(tmp_path / "two.nii.gz")
    nibabel.Nifti1Pair(array, affine).to_filename(tmp_path / "pair.img")
    for name in ("big.nii", "two.nii.gz", "pair.hdr", "pair.img"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).array, array)


def test_sform_counts_and_a_disagreeing_qform_is_told(tmp_path):
    image = nibabel.Nifti1Image(phantom(), make_affine("oblique"))
    image.set_sform(make_affine("oblique"), 1)
    image.set_qform(make_affine("coronal"), 1)
    image.to_filename(tmp_path / "x.nii")
    known = read_nifti_header(tmp_path / "x.nii")
    np.testing.assert_allclose(known.space.affine, make_affine("oblique"), atol=1e-5)
    assert len(known.notes) == 1 and "sform and qform place voxels up to" in known.notes[0]


def test_qform_alone(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine("oblique"), sform_code=0)
    known = read_nifti_header(path)
    np.testing.assert_allclose(known.space.affine, make_affine("oblique"), atol=1e-4)
    assert known.notes == ()


def test_neither_form_is_told(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine(), sform_code=0, qform_code=0)
    assert read_nifti_header(path).notes == ("its orientation is unknown: neither sform nor qform is set",)


def test_a_sheared_sform_is_kept_exactly(tmp_path):
    affine = make_affine()
    affine[1, 2] = 0.75
    known = read_nifti_header(write_nifti(tmp_path / "x.nii", phantom(), affine))
    np.testing.assert_array_equal(known.space.affine, affine)
    assert known.notes == ()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"srow_z": [0, 0, 0, 0]}, "singular"),
        ({"srow_x": [np.nan, 0, 0, 0]}, "finite"),
        ({"srow_x": [0, 0, 0, 1], "srow_y": [0, 0, 0, 1], "srow_z": [0, 0, 0, 1]}, "singular"),
    ],
)
def test_singular_affine(tmp_path, header, message):
    code, text = refusal(write_nifti(tmp_path / "x.nii.gz", phantom(), make_affine(), **header))
    assert code == "singular-affine" and message in text


def test_a_qform_that_is_no_rotation(tmp_path):
    path = write_nifti(tmp_path / "x.nii.gz", phantom(), make_affine(), quatern_b=2.0)
    np.testing.assert_array_equal(read_nifti_header(path).space.affine, make_affine())  # the sform counts
    code, text = refusal(write_nifti(path, phantom(), make_affine(), quatern_b=2.0, sform_code=0))
    assert code == "unreadable" and "not a readable NIfTI file" in text


def test_trailing_ones_are_squeezed_and_missing_axes_added(tmp_path):
    array = phantom()
    path = write_nifti(tmp_path / "5d.nii", array[..., None, None], make_affine())
    np.testing.assert_array_equal(read_nifti(path).array, array)
    flat = write_nifti(tmp_path / "2d.nii", array[:, :, 0], make_affine())
    np.testing.assert_array_equal(read_nifti(flat).array, array[:, :, :1])


def test_four_dimensional(tmp_path):
    array = np.stack([phantom()] * 3, -1)
    code, text = refusal(write_nifti(tmp_path / "x.nii", array, make_affine()))
    assert code == "four-dimensional" and "(7, 6, 5, 3)" in text


def test_colour_and_complex(tmp_path):
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refusal(write_nifti(tmp_path / "rgb.nii", colours, make_affine()))[0] == "colour"
    assert refusal(write_nifti(tmp_path / "c.nii", np.zeros((4, 4, 4), "complex64"), make_affine()))[0] == "complex"


def test_sizes_of_zero(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine())
    data = bytearray(path.read_bytes())
    for offset, value in ((42, 0), (40, 0)):  # dim[1], then dim[0]
        data[offset : offset + 2] = value.to_bytes(2, "little")
        path.write_bytes(data)
        code, text = refusal(path)
        assert code in ("empty", "unreadable") and text


def test_lengths_in_metres(tmp_path):
    code, text = refusal(write_nifti(tmp_path / "x.nii", phantom(), make_affine(), xyzt_units=1))
    assert code == "units" and "metres" in text


def test_nan_and_infinity_become_zero_with_a_note(tmp_path):
    array = phantom().astype(np.float32)
    array[0, 0, 0], array[1, 2, 3], array[2, 2, 2] = np.nan, np.inf, -np.inf
    volume = read_nifti(write_nifti(tmp_path / "x.nii", array, make_affine()))
    assert volume.notes == ("3 of 210 voxels were NaN or infinite and count as 0",)
    np.testing.assert_array_equal(volume.array, np.where(np.isfinite(array), array, 0))


def test_float64_beyond_float32_counts_as_infinite(tmp_path):
    array = phantom().astype(np.float64)
    array[0, 0, 0] = 1e300
    assert read_nifti(write_nifti(tmp_path / "x.nii", array, make_affine())).array[0, 0, 0] == 0


def test_nothing_finite(tmp_path):
    path = write_nifti(tmp_path / "x.nii", np.full((3, 3, 3), np.nan, np.float32), make_affine())
    with pytest.raises(UnreadableSeries, match="none of its 27 voxels") as caught:
        read_nifti(path)
    assert caught.value.code == "not-finite"


def test_short_file(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine())
    path.write_bytes(path.read_bytes()[:-20])
    code, text = refusal(path)
    assert code == "unreadable" and "cut short: 752 of 772 bytes" in text


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_truncated_gzip(tmp_path, keep):
    path = write_nifti(tmp_path / "x.nii.gz", phantom((40, 40, 20)), make_affine())
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    read_nifti_header(path)  # the header is whole
    with pytest.raises(UnreadableFile, match=r"voxels cannot be read \(EOFError.*get the file again"):
        read_nifti(path)


def test_every_flipped_bit_of_a_gzip_file_is_noticed(tmp_path):
    path = write_nifti(tmp_path / "x.nii.gz", phantom((40, 40, 20)), make_affine())
    data = path.read_bytes()
    for position in np.random.default_rng(0).integers(1000, len(data), 25):
        damaged = bytearray(data)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        with pytest.raises(UnreadableFile):
            read_nifti(path)


def test_gzip_of_a_short_file(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine())
    zipped = tmp_path / "x.nii.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()[:-20]))
    with pytest.raises(UnreadableFile, match="voxels cannot be read"):
        read_nifti(zipped)


def test_a_header_that_promises_too_much(tmp_path):
    path = write_nifti(tmp_path / "x.nii.gz", phantom(), make_affine())
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = (32000).to_bytes(2, "little") * 3
    path.write_bytes(gzip.compress(bytes(data)))
    code, text = refusal(path)
    assert code == "unreadable" and "65536000000352 bytes of voxels cannot be in a gzip file of" in text


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8b\x08\0", b"\0" * 352])
@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_what_is_no_nifti(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert refusal(path)[0] == "unreadable"


def test_bad_magic_is_not_taken_for_analyze(tmp_path):
    nibabel.AnalyzeImage(phantom(), np.eye(4)).to_filename(tmp_path / "x.img")
    code, text = refusal(tmp_path / "x.hdr")
    assert code == "unreadable" and "left and right" in text


def test_a_header_without_its_image(tmp_path):
    nibabel.Nifti1Pair(phantom(), make_affine()).to_filename(tmp_path / "x.img")
    (tmp_path / "x.img").unlink()
    code, text = refusal(tmp_path / "x.hdr")
    assert code == "unreadable" and "x.img, which does not exist" in text


def test_absent(tmp_path):
    code, text = refusal(tmp_path / "absent.nii")
    assert code == "unreadable" and "No such file" in text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.nii.gz", "a"), ("a.b.nii", "a.b"), ("A.NII.GZ", "A"), ("a.hdr", "a"), ("a.img.gz", "a"), ("a.txt", "a")],
)
def test_stem(name, expected):
    assert stem(Path("somewhere") / name) == expected


@pytest.mark.parametrize("name", ["example4d.nii.gz", "anatomical.nii", "reoriented_anat_moved.nii", "standard.nii.gz"])
def test_files_that_come_with_nibabel(name):
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    if not path.exists():
        pytest.skip("nibabel was installed without its test data")
    image = nibabel.load(path)
    if len(image.shape) == 4:
        assert refusal(path)[0] == "four-dimensional"
        return
    volume = read_nifti(path)
    np.testing.assert_array_equal(volume.array, image.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(volume.space.affine, image.affine)


@pytest.mark.skipif(not (SHARED / "msd_hippocampus").is_dir(), reason="the shared hippocampus images are not here")
def test_hippocampus_agrees_with_nibabel():
    for path in sorted((SHARED / "msd_hippocampus" / "images").iterdir())[:20]:
        volume, image = read_nifti(path), nibabel.load(path)
        np.testing.assert_array_equal(volume.array, image.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(volume.space.affine, image.affine)
        assert volume.notes == ()
