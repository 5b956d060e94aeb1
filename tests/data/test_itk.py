import numpy as np
import pytest
import SimpleITK as sitk
from data_synthetic import ORIENTATIONS, make_affine, phantom

from medvit.data.itk import read_itk, read_itk_header
from medvit.errors import UnreadableFile, UnreadableSeries

NAMES = ["x.mha", "x.mhd", "x.nrrd", "x.nhdr"]
LPS = np.diag([-1.0, -1.0, 1.0])


def write(path, array, affine=None, compressed=False):
    """``array`` (i, j, k) with a RAS+ affine, by SimpleITK."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    affine = make_affine("oblique") if affine is None else affine
    if array.ndim == 3:
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(steps.tolist())
        image.SetDirection((LPS @ affine[:3, :3] / steps).ravel().tolist())
        image.SetOrigin((LPS @ affine[:3, 3]).tolist())
    sitk.WriteImage(image, str(path), compressed)
    return path


def edited(path, *changes):
    """Replace bytes in a file; each pair must be there once."""
    data = path.read_bytes()
    for old, new in changes:
        assert data.count(old) == 1, old
        data = data.replace(old, new)
    path.write_bytes(data)
    return path


def refusal(path, read=read_itk_header):
    with pytest.raises((UnreadableSeries, UnreadableFile)) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    return caught.value.code, str(caught.value)


# ---- what is right


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_voxels_and_affine(tmp_path, name, compressed):
    path = write(tmp_path / name, phantom(), compressed=compressed)
    volume, known = read_itk(path, "p/x"), read_itk_header(path)
    np.testing.assert_array_equal(volume.array, phantom())
    np.testing.assert_allclose(volume.space.affine, make_affine("oblique"), atol=1e-9)
    assert (volume.array.dtype, volume.notes, known.space) == (np.float32, (), volume.space)
    assert (volume.source.kind, volume.source.files, volume.source.name) == ("itk", (path,), "p/x")
    assert known.voxels.is_file() and (known.voxels == path) == (name in ("x.mha", "x.nrrd"))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation(tmp_path, orientation):
    for name in ("x.mha", "x.nrrd"):
        space = read_itk_header(write(tmp_path / name, phantom(), make_affine(orientation))).space
        np.testing.assert_allclose(space.affine, make_affine(orientation), atol=1e-9)


@pytest.mark.parametrize(
    "dtype", ["uint8", "int8", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_types(tmp_path, name, dtype):
    array = (phantom() % 100).astype(dtype)
    np.testing.assert_array_equal(read_itk(write(tmp_path / name, array)).array, array)


def test_whole_numbers_too_large_and_numbers_that_are_none(tmp_path):
    array = phantom().astype(np.int64)
    array[0, 0, 0] = 2**24 + 1
    (note,) = read_itk(write(tmp_path / "x.mha", array)).notes
    assert note.startswith("1 voxels hold whole numbers beyond 16777216")
    array = phantom().astype(np.float32)
    array[0, 0, 0] = np.nan
    volume = read_itk(write(tmp_path / "x.nrrd", array))
    assert volume.array[0, 0, 0] == 0 and volume.notes == ("1 of 210 voxels were NaN or infinite and count as 0",)
    assert refusal(write(tmp_path / "y.nrrd", array * np.nan), read_itk)[0] == "not-finite"


@pytest.mark.parametrize("space", ["right-anterior-superior", "RAS", "left-anterior-superior", "LAS"])
def test_other_coordinates_agree_with_simpleitk(tmp_path, space):
    path = edited(write(tmp_path / "x.nrrd", phantom()), (b"left-posterior-superior", space.encode()))
    image = sitk.ReadImage(str(path))
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps[:3, 3] = image.GetOrigin()
    known = read_itk_header(path)
    np.testing.assert_allclose(known.space.affine, np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps, atol=1e-9)
    assert known.notes == ()


def test_a_byte_order_that_is_not_stated(tmp_path):
    path = edited(write(tmp_path / "x.mha", phantom()), (b"BinaryDataByteOrderMSB = False\n", b""))
    volume = read_itk(path)
    np.testing.assert_array_equal(volume.array, phantom())
    assert len(volume.notes) == 1 and "its byte order is not stated" in volume.notes[0]
    path = write(tmp_path / "y.mha", phantom())
    body = phantom().astype(">i2").T.tobytes()
    path.write_bytes(path.read_bytes()[: -len(body)].replace(b"MSB = False", b"MSB = True") + body)
    np.testing.assert_array_equal(read_itk(path).array, phantom())


def test_big_endian(tmp_path):
    path = write(tmp_path / "x.nrrd", phantom())
    head, body = path.read_bytes().split(b"\n\n", 1)
    swapped = np.frombuffer(body, "<i2").astype(">i2").tobytes()
    path.write_bytes(head.replace(b"endian: little", b"endian: big") + b"\n\n" + swapped)
    np.testing.assert_array_equal(read_itk(path).array, phantom())


def test_two_dimensions_are_one_slice_without_a_place(tmp_path):
    array = phantom()[:, :, 0]
    for name in ("x.mha", "x.nrrd"):
        volume = read_itk(write(tmp_path / name, array))
        np.testing.assert_array_equal(volume.array, array[..., None])
        assert volume.space.spacing == (1, 1, 1) and "its place in the patient is unknown" in volume.notes[0]


@pytest.mark.parametrize("line", [b"TransformMatrix", b"Offset"])
def test_a_place_that_metaimage_leaves_out_is_noted(tmp_path, line):
    path = write(tmp_path / "x.mha", phantom())
    text = next(row for row in path.read_bytes().split(b"\n") if row.startswith(line))
    (note,) = read_itk_header(edited(path, (text + b"\n", b""))).notes
    assert "its place in the patient is unknown" in note


def test_spacings_alone_are_noted_in_nrrd(tmp_path):
    path = write(tmp_path / "x.nrrd", phantom(), make_affine("axial"))
    rows = path.read_bytes().split(b"\n")
    gone = [row + b"\n" for row in rows if row.startswith((b"space: ", b"space origin"))]
    directions = next(row for row in rows if row.startswith(b"space directions"))
    path = edited(path, *((row, b"") for row in gone), (directions, b"spacings: 0.75 1.25 2.5"))
    known = read_itk_header(path)
    assert known.space.spacing == (0.75, 1.25, 2.5) and "its place in the patient is unknown" in known.notes[0]
    assert refusal(edited(path, (b"0.75 1.25 2.5", b"0.75 1.25 nan")))[0] == "no-geometry"


def test_bytes_behind_the_voxels_are_noted(tmp_path):
    for name in ("x.mha", "x.nrrd"):
        path = write(tmp_path / name, phantom())
        path.write_bytes(path.read_bytes() + bytes(10))
        assert read_itk(path).notes == ("10 bytes behind its voxels, which its header does not mention, were not read",)


def test_voxels_at_the_end_of_another_file(tmp_path):
    path = write(tmp_path / "x.nhdr", phantom())
    raw = tmp_path / "x.raw"
    raw.write_bytes(b"some header" + raw.read_bytes())
    edited(path, (b"data file: ", b"byte skip: -1\ndata file: "))
    volume = read_itk(path)
    np.testing.assert_array_equal(volume.array, phantom())
    assert volume.notes == ()


# ---- what is refused


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_anywhere_is_refused(tmp_path, name, compressed, capfd):
    path = write(tmp_path / name, phantom((20, 20, 10)), compressed=compressed)
    file = read_itk_header(path).voxels
    data = file.read_bytes()
    for cut in (1, 2, 5, 9, 100, len(data) // 2, len(data) - 200, len(data) - 20, len(data)):
        file.write_bytes(data[: max(len(data) - cut, 0)])
        assert refusal(path, read_itk)[0] in ("unreadable", "no-geometry")  # the latter of half a header
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_flipped_bits_in_packed_voxels_are_noticed(tmp_path, name):
    path = write(tmp_path / name, phantom((20, 20, 10)), compressed=True)
    data = path.read_bytes()
    start = len(data) - 2000
    for position in np.random.default_rng(0).integers(start, len(data) - 8, 20):
        damaged = bytearray(data)
        damaged[position] ^= 16
        path.write_bytes(damaged)
        assert refusal(path, read_itk)[0] == "unreadable"


@pytest.mark.parametrize("name", ["x.mhd", "x.nhdr"])
def test_voxels_that_are_not_there(tmp_path, name):
    path = write(tmp_path / name, phantom())
    (tmp_path / "x.raw").unlink()
    assert "its voxels should be in x.raw, which does not exist" in refusal(path)[1]
    edited(path, (b"x.raw", b"../x.raw"))
    assert "its header points elsewhere" in refusal(path)[1]
    assert refusal(edited(path, (b"../x.raw", b"x%03d.raw 1 5 1")))[0] == "several-files"


@pytest.mark.parametrize(
    ("name", "old", "new", "code", "message"),
    [
        ("x.mha", b"DimSize = 7 6 5", b"DimSize = 7 6 0", "empty", "got (7, 6, 0)"),
        ("x.mha", b"DimSize = 7 6 5", b"DimSize = 7 6", "unreadable", "a number that is none"),
        ("x.mha", b"DimSize = 7 6 5", b"DimSize = 70000 60000 50000", "unreadable", "cut short"),
        ("x.mha", b"DimSize", b"DimSizes", "unreadable", "'dimsize' is missing"),
        ("x.mha", b"ElementSpacing = 0.75 ", b"ElementSpacing = 0 ", "no-geometry", "got 0 1.25 2.5"),
        ("x.mha", b"ElementSpacing", b"Spacing", "no-geometry", "got none"),
        ("x.mha", b"ElementType = MET_SHORT", b"ElementType = MET_OTHER", "pixel-type", "'MET_OTHER'"),
        ("x.mha", b"BinaryData = True", b"BinaryData = False", "encoding", "save them binary"),
        ("x.mha", b"ElementType", b"ElementToIntensityFunctionSlope = 2\nElementType", "pixel-type", "scaled by 2"),
        ("x.mha", b"ElementType", b"DistanceUnits = um\nElementType", "units", "says 'um'"),
        ("x.mha", b"TransformMatrix = ", b"TransformMatrix = nan ", "unreadable", "a number that is none"),
        ("x.mha", b"TransformMatrix = 1 ", b"TransformMatrix = 2 ", "singular-affine", "length 1, got 2, 1, 1"),
        ("x.mha", b"ElementDataFile = LOCAL", b"ElementDataFile = ", "unreadable", "corrupt header"),
        ("x.nrrd", b"endian: little", b"endian: odd", "unreadable", "'endian' is missing"),
        ("x.nrrd", b"space origin: (", b"space origin: (1,", "unreadable", "a number that is none"),
        ("x.nrrd", b"sizes: 7 6 5", b"sizes: 7 6 -5", "empty", "got (7, 6, -5)"),
        ("x.nrrd", b"sizes: 7 6 5", b"sizes: 7 6", "unreadable", "a number that is none"),
        ("x.nrrd", b"NRRD000", b"NRRX000", "unreadable", "does not begin with NRRD000"),
        ("x.nrrd", b"type: short", b"type: block", "pixel-type", "'block'"),
        ("x.nrrd", b"encoding: raw", b"encoding: ascii", "encoding", "is 'ascii'"),
        ("x.nrrd", b"encoding: raw", b"line skip: 2\nencoding: raw", "encoding", "skips 2 lines"),
        ("x.nrrd", b"left-posterior-superior", b"scanner-xyz", "no-geometry", "its space is 'scanner-xyz'"),
        ("x.nrrd", b"space origin", b'space units: "mm" "mm" "um"\nspace origin', "units", "says 'um'"),
    ],
)
def test_headers_that_simpleitk_would_fill_in(tmp_path, name, old, new, code, message, capfd):
    path = write(tmp_path / name, phantom(), make_affine("axial"))
    found, text = refusal(edited(path, (old, new)))
    assert (found, message in text) == (code, True), text
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_vectors_colours_and_series(tmp_path, name):
    def vectors(dtype, count):
        image = sitk.GetImageFromArray(np.zeros((5, 6, 7, count), dtype), isVector=True)
        sitk.WriteImage(image, str(tmp_path / name))
        return tmp_path / name

    assert refusal(vectors(np.uint8, 3))[0] == "colour"
    code, text = refusal(vectors(np.float32, 3))
    assert code == "vectors" and "it has 3" in text
    image = sitk.JoinSeries([sitk.GetImageFromArray(phantom())] * 4)
    sitk.WriteImage(image, str(tmp_path / "t.mha"))
    code, text = refusal(tmp_path / "t.mha")
    assert code == "four-dimensional" and "(5, 6, 7, 4) voxels" in text


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 400, b"NRRD0004\n", b"ObjectType = Image\n", b"a = " * 999])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_neither(tmp_path, name, content, capfd):
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name)[0] == "unreadable"
    assert capfd.readouterr() == ("", "")
    assert "cannot be opened: No such file" in refusal(tmp_path / ("no" + name))[1]


def test_a_patient_in_the_header_is_in_no_message(tmp_path):
    path = write(tmp_path / "x.mha", phantom())
    edited(path, (b"NDims", b"PatientName = Doe\nNDims"), (b"TransformMatrix = ", b"TransformMatrix = Doe "))
    assert "Doe" not in refusal(path)[1]


@pytest.mark.parametrize("name", ["x.mha", "x.nrrd"])
def test_damage_of_any_kind_is_refused_or_harmless(tmp_path, name, capfd):
    path = write(tmp_path / name, phantom(), compressed=True)
    whole, intact, random = path.read_bytes(), read_itk(path), np.random.default_rng(0)
    for _ in range(400):
        data = bytearray(whole)
        for position in random.integers(0, len(data), random.integers(1, 4)):
            data[position] = random.integers(0, 256)
        path.write_bytes(data[: random.integers(1, len(data))] if random.random() < 0.3 else data)
        try:
            volume = read_itk(path)
        except (UnreadableFile, UnreadableSeries):
            continue
        np.testing.assert_array_equal(volume.array, intact.array)  # its place is in digits that may say anything
    assert capfd.readouterr() == ("", "")
