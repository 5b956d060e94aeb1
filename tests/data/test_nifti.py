import gzip
import os
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
    (note,) = known.notes
    assert note == "its axes are not perpendicular (by up to 17 degrees); the affine is kept as it is"


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
    known = read_nifti_header(path)
    np.testing.assert_array_equal(known.space.affine, make_affine())
    assert known.notes == ("its qform makes no sense; the sform counts",)
    code, text = refusal(write_nifti(path, phantom(), make_affine(), quatern_b=2.0, sform_code=0))
    assert code == "singular-affine" and "quaternion (2, 0, 1) of its qform is no rotation" in text


def test_trailing_ones_are_squeezed_and_missing_axes_added(tmp_path):
    array = phantom()
    path = write_nifti(tmp_path / "5d.nii", array[..., None, None], make_affine())
    np.testing.assert_array_equal(read_nifti(path).array, array)
    flat = write_nifti(tmp_path / "2d.nii", array[:, :, 0], make_affine())
    np.testing.assert_array_equal(read_nifti(flat).array, array[:, :, :1])


def changed(path, **fields):
    """Write fields of a header as they are, without nibabel's repairs."""
    raw = bytearray(path.read_bytes())
    header = nibabel.Nifti1Header(bytes(raw[:348]), check=False)
    for name, value in fields.items():
        header[name] = value
    raw[:348] = header.binaryblock
    path.write_bytes(raw)
    return path


def series(tmp_path, name="x.nii.gz", count=3, **header):
    array = np.stack([phantom(seed=n) for n in range(count)], -1)
    path = changed(write_nifti(tmp_path / "x.nii", array, make_affine("oblique")), **header)
    if name.endswith(".gz"):
        (tmp_path / name).write_bytes(gzip.compress(path.read_bytes()))
    return tmp_path / name, array


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz"])
def test_a_series_comes_out_volume_by_volume(tmp_path, name):
    pixdim = [1, 0.75, 1.25, 2.5, 1500, 1, 1, 1]
    path, array = series(tmp_path, name, xyzt_units=2 + 16, pixdim=pixdim, scl_slope=0.5, scl_inter=-1)
    known = read_nifti_header(path)
    assert (known.volumes, known.time_step, known.space.shape, known.notes) == (3, 1.5, (7, 6, 5), ())
    for n in (2, 0, 1):
        volume = read_nifti(path, f"x_{n}", n)
        np.testing.assert_array_equal(volume.array, array[..., n] * 0.5 - 1)
        assert volume.space == known.space and volume.source.name == f"x_{n}"
    with pytest.raises(UnreadableSeries, match=r"holds 3 of \(7, 6, 5\) voxels; say which one \(0 to 2\)") as caught:
        read_nifti(path)
    assert caught.value.code == "four-dimensional"
    for index in (3, -1):
        with pytest.raises(ValueError, match=f"volumes 0 to 2, got index={index}"):
            read_nifti(path, index=index)


@pytest.mark.parametrize(("units", "step"), [(2, None), (2 + 8, 2.0), (2 + 24, 2e-6), (2 + 40, None)])
def test_time_steps_are_seconds_or_unknown(tmp_path, units, step):
    path, _ = series(tmp_path, xyzt_units=units, pixdim=[1, 1, 1, 1, 2, 1, 1, 1])
    assert read_nifti_header(path).time_step == pytest.approx(step)


def test_a_series_that_changes_between_two_reads_is_not_remembered(tmp_path):
    path, array = series(tmp_path)
    read_nifti(path, index=0)
    os.utime(write_nifti(path, array + 1, make_affine()), (1, 1))
    np.testing.assert_array_equal(read_nifti(path, index=1).array, array[..., 1] + 1)


def test_more_axes_and_parts_of_vectors_are_refused(tmp_path):
    array = np.zeros((4, 3, 2, 1, 3), np.float32)
    code, text = refusal(write_nifti(tmp_path / "5d.nii", array, make_affine(), intent_code=1007))
    assert code == "five-dimensional" and "(4, 3, 2, 1, 3) voxels" in text
    code, text = refusal(series(tmp_path, intent_code=1007)[0])
    assert code == "vectors" and "its 3 are parts of one (intent code 1007)" in text
    assert read_nifti_header(write_nifti(tmp_path / "one.nii", phantom(), make_affine(), intent_code=1007)).volumes == 1


def test_colour_and_complex(tmp_path):
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    assert refusal(write_nifti(tmp_path / "rgb.nii", colours, make_affine()))[0] == "colour"
    rgba = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1"), ("A", "u1")])
    assert refusal(write_nifti(tmp_path / "rgba.nii", rgba, make_affine()))[0] == "colour"
    assert refusal(write_nifti(tmp_path / "c.nii", np.zeros((4, 4, 4), "complex64"), make_affine()))[0] == "complex"


@pytest.mark.parametrize(
    ("fields", "code", "message"),
    [
        ({"datatype": 1, "bitpix": 1}, "pixel-type", "its voxels are"),
        ({"datatype": 0, "bitpix": 0}, "pixel-type", "its voxels are"),
        ({"datatype": 1536, "bitpix": 128}, "pixel-type", "at most 64 bits"),
        ({"datatype": 77}, "unreadable", "its data type is 77"),
        ({"bitpix": 32}, "unreadable", "says 32 bits per voxel, but its data type int16 has 16"),
        ({"vox_offset": 300}, "unreadable", "cannot begin at byte 300, a whole number from 352"),
        ({"vox_offset": np.nan}, "unreadable", "cannot"),
        ({"vox_offset": 368}, "unreadable", "cut short: 772 of 788 bytes"),
        ({"dim": [3, -7, 6, 5, 1, 1, 1, 1]}, "empty", "got (-7, 6, 5)"),
        ({"dim": [8, 7, 6, 5, 1, 1, 1, 1]}, "unreadable", "1 to 7 axes, got 8"),
        ({"sform_code": 17}, "unreadable", "sform_code must be 0 to 5, got 17"),
        ({"qform_code": -1}, "unreadable", "qform_code must be 0 to 5, got -1"),
        ({"scl_slope": 2, "scl_inter": np.nan}, "unreadable", "its scale 2 and nan"),
        ({"sform_code": 0, "pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "singular-affine", "above 0, got 0, 1, 1,"),
        ({"sform_code": 0, "pixdim": [1, 1, -2, 1, 1, 1, 1, 1]}, "singular-affine", "above 0, got 1, -2, 1,"),
        ({"sform_code": 0, "pixdim": [1, 1, np.nan, 1, 1, 1, 1, 1]}, "singular-affine", "got 1, nan, 1,"),
        ({"sform_code": 0, "qform_code": 0, "pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "singular-affine", "above 0"),
        ({"sform_code": 0, "pixdim": [-2, 1, 1, 1, 1, 1, 1, 1]}, "singular-affine", "-1, 0 or 1, got -2"),
        ({"sform_code": 0, "quatern_b": np.nan}, "singular-affine", ""),
        ({"xyzt_units": 3}, "units", "micrometres"),
        ({"magic": b"ni1"}, "unreadable", "does not end in .hdr"),
    ],
)
def test_headers_that_nibabel_would_mend_are_refused(tmp_path, fields, code, message):
    path = changed(write_nifti(tmp_path / "x.nii", phantom(), make_affine()), **fields)
    found, text = refusal(path)
    assert (found, message in text) == (code, True), text


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"pixdim": [1, 0, 1, 1, 1, 1, 1, 1]}, "its qform makes no sense; the sform counts"),
        ({"qform_code": 0, "pixdim": [1, 3, 3, 3, 1, 1, 1, 1]}, "measure 3, 3, 3 mm by pixdim, but 0.75, 1.25, 2.5 by"),
        ({"qform_code": 0, "pixdim": [1, 0, 3, 3, 1, 1, 1, 1]}, None),
    ],
)
def test_a_good_sform_outweighs_the_rest(tmp_path, fields, note):
    path = changed(write_nifti(tmp_path / "x.nii", phantom(), make_affine()), **fields)
    known = read_nifti_header(path)
    np.testing.assert_array_equal(known.space.affine, make_affine())
    assert len(known.notes) == (note is not None) and (note is None or note in known.notes[0])


@pytest.mark.parametrize("qfac", [-1, 0, 1])
def test_qfac_turns_the_third_axis(tmp_path, qfac):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine("oblique"), sform_code=0)
    affine = read_nifti_header(path).space.affine.copy()
    affine[:3, 2] *= -1 if qfac == -1 else 1
    changed(path, pixdim=[qfac, 0.75, 1.25, 2.5, 1, 1, 1, 1])
    np.testing.assert_allclose(read_nifti_header(path).space.affine, affine, atol=1e-6)


@pytest.mark.parametrize("slope", [0, np.nan, np.inf])
def test_a_slope_that_is_none_scales_nothing(tmp_path, slope):
    path = changed(write_nifti(tmp_path / "x.nii", phantom(), make_affine()), scl_slope=slope, scl_inter=5)
    np.testing.assert_array_equal(read_nifti(path).array, phantom())


def test_display_range_text_and_extensions_count_for_nothing(tmp_path):
    image = nibabel.Nifti1Image(phantom(), make_affine())
    image.header["cal_min"], image.header["cal_max"], image.header["descrip"] = 5, 10, b"Doe^Jane"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Doe^Jane" * 20))
    image.to_filename(tmp_path / "x.nii.gz")
    volume = read_nifti(tmp_path / "x.nii.gz")
    np.testing.assert_array_equal(volume.array, phantom())
    assert volume.notes == () and "Doe" not in repr(volume.source)


def test_whole_numbers_too_large_for_float32_are_counted(tmp_path):
    for dtype, great in (("int32", 2**24 + 1), ("uint64", 2**40 + 1), ("int64", -(2**24) - 1)):
        array = phantom().astype(dtype)
        array[1, 2, 3] = great
        volume = read_nifti(write_nifti(tmp_path / "x.nii", array, make_affine()))
        assert volume.notes == ("1 voxels hold whole numbers beyond 16777216, which were rounded to 24 bits",)
    array[1, 2, 3] = 2**24
    assert read_nifti(write_nifti(tmp_path / "x.nii", array, make_affine())).notes == ()


def test_packed_or_not_is_seen_inside_and_not_in_the_name(tmp_path):
    plain = write_nifti(tmp_path / "a.nii", phantom(), make_affine())
    packed = write_nifti(tmp_path / "a.nii.gz", phantom(), make_affine())
    plain.rename(tmp_path / "plain.nii.gz")
    packed.rename(tmp_path / "packed.nii")
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).array, phantom())


@pytest.mark.parametrize("names", [("A.HDR", "A.IMG"), ("a.hdr", "a.img.gz"), ("a.hdr.gz", "a.img.gz")])
def test_pairs_under_other_names(tmp_path, names):
    nibabel.Nifti1Pair(phantom(), make_affine()).to_filename(tmp_path / "x.img")
    for old, new in zip(("x.hdr", "x.img"), names, strict=True):
        data = (tmp_path / old).read_bytes()
        (tmp_path / new).write_bytes(gzip.compress(data) if new.endswith(".gz") else data)
        (tmp_path / old).unlink()
    for name in names:
        np.testing.assert_array_equal(read_nifti(tmp_path / name).array, phantom())
    assert read_nifti_header(tmp_path / names[0]).voxels == tmp_path / names[1]


def test_bytes_behind_the_voxels_are_noted(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine())
    data = path.read_bytes() + bytes(8)
    path.write_bytes(data)
    (tmp_path / "x.nii.gz").write_bytes(gzip.compress(data))
    note = "8 bytes behind its voxels, which its header does not mention, were not read"
    assert read_nifti_header(path).notes == read_nifti(path).notes == (note,)
    assert read_nifti(tmp_path / "x.nii.gz").notes == (note,)


@pytest.mark.parametrize("end", [b"rubbish", b"\x1f\x8b\x08"])
def test_rubbish_behind_gzip_data(tmp_path, end):
    path = write_nifti(tmp_path / "x.nii.gz", phantom(), make_affine())
    data = path.read_bytes()
    path.write_bytes(data + end)
    with pytest.raises(UnreadableFile, match="its voxels cannot be read"):
        read_nifti(path)
    for cut in range(1, 8):  # within the checksum and the length at the end
        path.write_bytes(data[:-cut])
        with pytest.raises(UnreadableFile, match="its voxels cannot be read"):
            read_nifti(path)


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
    with pytest.raises(UnreadableFile, match="cut short: 752 of 772 bytes are in its gzip data"):
        read_nifti(zipped)


def test_a_header_that_promises_too_much(tmp_path):
    path = write_nifti(tmp_path / "x.nii.gz", phantom(), make_affine())
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[42:48] = (32000).to_bytes(2, "little") * 3
    path.write_bytes(gzip.compress(bytes(data)))
    code, text = refusal(path)
    assert code == "unreadable" and "65536000000352 bytes of voxels cannot be in a gzip file of" in text


# what says how bits become numbers: dim, datatype, bitpix, scl_slope, scl_inter. Any value of them may be meant.
UNPROVEN = {*range(40, 56), *range(70, 74), *range(112, 120)}


def test_damage_of_any_kind_is_refused_noted_or_harmless(tmp_path):
    path = write_nifti(tmp_path / "x.nii", phantom(), make_affine("oblique"))
    whole, intact, random = path.read_bytes(), read_nifti(path), np.random.default_rng(0)
    for _ in range(1000):
        data = bytearray(whole)
        position = int(random.integers(0, 352))
        data[position] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(0, len(data))] if random.random() < 0.3 else data)
        try:
            volume = read_nifti(path)
        except (UnreadableFile, UnreadableSeries):
            continue
        if not volume.notes and position not in UNPROVEN:
            np.testing.assert_array_equal(volume.array, intact.array)
            # sform and qform prove each other
            assert volume.space.distance_to(intact.space) < 0.02


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


@pytest.mark.parametrize(
    "name",
    ["example4d.nii.gz", "anatomical.nii", "reoriented_anat_moved.nii", "standard.nii.gz", "example_nifti2.nii.gz"],
)
def test_files_that_come_with_nibabel(name):
    path = Path(nibabel.__file__).parent / "tests" / "data" / name
    if not path.exists():
        pytest.skip("nibabel was installed without its test data")
    image = nibabel.load(path)
    values = np.atleast_3d(image.get_fdata(dtype=np.float32))
    volumes = read_nifti_header(path).volumes
    assert volumes == (image.shape[3] if len(image.shape) == 4 else 1)
    for index in range(volumes):
        volume = read_nifti(path, index=index)
        np.testing.assert_allclose(volume.array, values[..., index] if volumes > 1 else values, rtol=1e-6)
        np.testing.assert_array_equal(volume.space.affine, image.affine)


@pytest.mark.skipif(not (SHARED / "msd_hippocampus").is_dir(), reason="the shared hippocampus images are not here")
def test_hippocampus_agrees_with_nibabel():
    for path in sorted((SHARED / "msd_hippocampus" / "images").iterdir())[:20]:
        volume, image = read_nifti(path), nibabel.load(path)
        np.testing.assert_array_equal(volume.array, image.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(volume.space.affine, image.affine)
        assert volume.notes == ()
