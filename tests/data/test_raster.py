import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from photographs_synthetic import as_volume, colours, write_picture
from PIL import Image, ImageFile, ImageOps

from medvit.data.raster import exif_orientation, read_raster, read_raster_header, sniff, stem, upright
from medvit.errors import UnreadableFile, UnreadableSeries

LOSSLESS = {
    "a.png": {},
    "a.tif": {},
    "b.tif": {"compression": "tiff_lzw"},
    "c.tif": {"compression": "tiff_deflate"},
    "a.bmp": {},
}


def code_of(caught):
    return caught.value.code


# ---- pixels


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_those_of_the_file_column_first(tmp_path, name, channels):
    pixels = colours() if channels == 3 else colours()[..., 0]
    path = write_picture(tmp_path / name, pixels, **LOSSLESS[name])
    volume = read_raster(path, "x/y")
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    np.testing.assert_array_equal(volume.array, as_volume(pixels))
    assert volume.array.shape == (70, 45, 1, 3)[: 3 + (channels == 3)]
    assert (volume.space.shape, volume.space.unit, volume.notes) == ((70, 45, 1), "px", ())
    np.testing.assert_array_equal(volume.space.affine, np.eye(4))
    assert (volume.source.kind, volume.source.files, volume.source.name) == ("raster", (path,), "x/y")
    assert volume.source.modality == volume.source.study_uid == ""
    header = read_raster_header(path)
    assert (header.space, header.channels, header.notes) == (volume.space, channels, ())


def test_a_jpeg_gives_what_pillow_decodes(tmp_path):
    path = write_picture(tmp_path / "a.jpg", colours(), quality=90)
    np.testing.assert_array_equal(read_raster(path).array, as_volume(np.asarray(Image.open(path))))
    assert np.abs(read_raster(path).array - as_volume(colours())).mean() < 5
    assert read_raster(path).source.name == "a"


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_grey_of_16_bits_is_not_scaled(tmp_path, name):
    pixels = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
    np.testing.assert_array_equal(read_raster(write_picture(tmp_path / name, pixels)).array, as_volume(pixels))


def test_big_endian_tiff_of_16_bits(tmp_path):
    pixels = np.array([[0, 1, 255], [256, 40000, 65535]], np.uint16)
    # ten entries of (tag, type, count, value) and the pixels behind them
    tags = [(256, 3), (257, 2), (258, 16), (259, 1), (262, 1), (273, 8 + 2 + 12 * 8 + 4), (277, 1), (279, 12)]
    entries = b"".join(
        struct.pack(">HHI", tag, 4 if tag in (273, 279) else 3, 1)
        + (struct.pack(">I", value) if tag in (273, 279) else struct.pack(">HH", value, 0))
        for tag, value in tags
    )
    head = b"MM\0*" + struct.pack(">IH", 8, len(tags))
    (tmp_path / "a.tif").write_bytes(head + entries + b"\0" * 4 + pixels.astype(">u2").tobytes())
    np.testing.assert_array_equal(read_raster(tmp_path / "a.tif").array, as_volume(pixels))


def test_grey_of_few_bits_spreads_over_8(tmp_path):
    write_picture(tmp_path / "a.png", np.array([[0, 255, 255]], np.uint8), mode="1")
    assert read_raster(tmp_path / "a.png").array.ravel().tolist() == [0, 255, 255]


def test_palettes_give_their_colours(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    assert read_raster(tmp_path / "a.png").array[:, 0, 0].tolist() == [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    assert read_raster_header(tmp_path / "a.png").channels == 3


# ---- orientation: pixels stay where they are stored, the affine leads to the upright picture


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif"])
def test_the_affine_leads_to_what_viewers_show(tmp_path, name, orientation):
    pixels = colours(24, 16)
    path = write_picture(tmp_path / name, pixels, orientation)
    volume = read_raster(path)
    stored = pixels if name != "a.jpg" else np.asarray(Image.open(path))
    np.testing.assert_array_equal(volume.array, as_volume(stored))
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    turned = upright(volume.array, volume.space)
    np.testing.assert_array_equal(turned, as_volume(shown))
    for column, row in ((0, 0), (23, 0), (5, 11)):
        x, y, z = volume.space.world(np.array([column, row, 0])).astype(int)
        assert z == 0
        np.testing.assert_array_equal(shown[y, x], stored[row, column])
    assert exif_orientation(volume.space) == orientation
    assert read_raster_header(path).space == volume.space
    assert [f"its EXIF orientation is {orientation}" in note for note in volume.notes] == [True] * (orientation > 1)


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_makes_no_sense_is_none(tmp_path, value):
    assert exif_orientation(read_raster(write_picture(tmp_path / "a.jpg", colours(), value)).space) == 1


def test_damaged_exif_data_are_none(tmp_path):
    path = write_picture(tmp_path / "a.jpg", colours(), 6)
    path.write_bytes(path.read_bytes().replace(b"Exif\0\0MM\0*", b"Exif\0\0MMMM"))
    assert exif_orientation(read_raster(path).space) == 1


def test_an_orientation_behind_the_pixels_of_a_png_is_refused(tmp_path):
    path = write_picture(tmp_path / "a.png", colours(), 6)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4], "big")]
    moved = data.replace(chunk, b"")
    path.write_bytes(moved[:-12] + chunk + moved[-12:])
    with pytest.raises(UnreadableFile, match="EXIF orientation stands behind its pixels"):
        read_raster(path)


# ---- what is refused


@pytest.mark.parametrize("name", [*LOSSLESS, "a.jpg", "progressive.jpg"])
def test_a_file_cut_anywhere_is_unreadable_or_whole(tmp_path, name):
    options = LOSSLESS.get(name, {"progressive": name != "a.jpg"})
    path = write_picture(tmp_path / name, colours(150, 100), **options)
    data, whole, refused = path.read_bytes(), read_raster(path).array, 0
    cuts = (1, 2, 4, 10, 13, 100, len(data) // 10, len(data) // 2, len(data) - 40, len(data) - 8)
    for cut in cuts:
        path.write_bytes(data[:-cut])
        try:
            np.testing.assert_array_equal(read_raster(path).array, whole)
        except UnreadableFile as error:
            refused += 1
            assert str(error).startswith(f"{path}: ") and str(error).endswith("get it again")
    assert refused >= len(cuts) - 3  # a TIFF may end with bytes that nothing needs


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_a_file_whose_end_is_zeros_is_unreadable(tmp_path, name):
    path = write_picture(tmp_path / name, colours(150, 100))
    data = path.read_bytes()
    for lost in (len(data) // 10, len(data) // 2):
        path.write_bytes(data[:-lost] + b"\0" * lost)
        with pytest.raises(UnreadableFile, match=r"cut short.*get it again"):
            read_raster(path)
    path.write_bytes(data + b"\0" * 100)  # padding behind the end costs nothing
    assert read_raster(path).array.shape == (150, 100, 1, 3)


def test_the_thumbnail_of_a_jpeg_does_not_count_as_its_end(tmp_path):
    thumbnail = write_picture(tmp_path / "t.jpg", colours(16, 16)).read_bytes()
    path = write_picture(tmp_path / "a.jpg", colours(150, 100), exif=b"Exif\0\0" + thumbnail)
    data = path.read_bytes()
    assert data.count(b"\xff\xd9") == 2 and read_raster(path).array.any()
    path.write_bytes(data[:-2])
    with pytest.raises(UnreadableFile, match="its end-of-image marker is missing"):
        read_raster(path)


def test_a_wrong_checksum_in_a_png(tmp_path):
    path = write_picture(tmp_path / "a.png", colours())
    data = bytearray(path.read_bytes())
    data[data.index(b"IDAT") + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(UnreadableFile, match="no readable PNG, JPEG, TIFF, BMP file: cut short, corrupt"):
        read_raster(path)


def test_tolerance_set_by_others_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    path = write_picture(tmp_path / "a.tif", colours())
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UnreadableFile):
        read_raster(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
@pytest.mark.parametrize("opaque", [True, False])
def test_alpha_goes_where_it_says_nothing(tmp_path, mode, opaque):
    pixels = np.asarray(Image.fromarray(colours()).convert(mode)).copy()
    pixels[:9, :7, -1] = 255 if opaque else 254
    path = write_picture(tmp_path / "a.png", pixels)
    assert read_raster_header(path).channels == (1 if mode == "LA" else 3)
    if opaque:
        volume = read_raster(path)
        np.testing.assert_array_equal(volume.array, as_volume(pixels[..., 0] if mode == "LA" else pixels[..., :3]))
        assert volume.notes == ("its alpha channel, opaque everywhere, was left out",)
        return
    with pytest.raises(
        UnreadableSeries, match=r"2 % of its pixels are transparent, .* save it without alpha"
    ) as caught:
        read_raster(path)
    assert code_of(caught) == "transparent"


@pytest.mark.parametrize(("mode", "transparency"), [("L", 0), ("RGB", (0, 0, 0)), ("P", 0)])
def test_one_transparent_colour(tmp_path, mode, transparency):
    pixels = np.zeros((2, 5, 3), np.uint8)
    pixels[:, 1:] = 200
    path = write_picture(tmp_path / "a.png", pixels, mode=mode)
    Image.open(path).save(path, transparency=int(np.asarray(Image.open(path))[0, 0]) if mode == "P" else transparency)
    with pytest.raises(UnreadableSeries, match=r"20 % of its pixels are transparent"):
        read_raster(path)


@pytest.mark.parametrize(
    ("name", "mode"), [("a.jpg", "CMYK"), ("a.tif", "CMYK"), ("a.tif", "LAB"), ("a.tif", "F"), ("a.tif", "I")]
)
def test_other_kinds_of_pixels(tmp_path, name, mode):
    path = tmp_path / name
    Image.new(mode, (8, 6)).save(path)
    for read in (read_raster_header, read_raster):
        with pytest.raises(UnreadableSeries, match=rf"are of pillow's mode {mode}; save it as 8-bit RGB") as caught:
            read(path)
        assert code_of(caught) == "pixel-type"


def png(width, height, depth, colour, rows):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_colours_of_16_bits_are_not_cut_to_8(tmp_path, colour, channels):
    rows = (b"\0" + b"\x12\x34" * 3 * channels) * 2
    (tmp_path / "a.png").write_bytes(png(3, 2, 16, colour, rows))
    with pytest.raises(UnreadableSeries, match="have 16 bits per channel, which pillow would cut to 8") as caught:
        read_raster_header(tmp_path / "a.png")
    assert code_of(caught) == "pixel-type"


def tiff(planes, bits, **tags):
    """A plain TIFF of 4 x 3 pixels, one strip for each plane."""
    entries = {256: [4], 257: [3], 258: [bits] * len(planes), 259: [1], 262: [2 if len(planes) > 1 else 1]}
    entries |= {277: [len(planes)], 278: [3], 284: [2 if len(planes) > 1 else 1]}
    entries |= {int(tag[1:]): [value] for tag, value in tags.items()}
    starts = [8 + sum(map(len, planes[:n])) for n in range(len(planes))]
    entries |= {273: starts, 279: [len(plane) for plane in planes]}
    pixels, long = b"".join(planes), b""
    directory = struct.pack("<H", len(entries))
    behind = 8 + len(pixels) + 2 + 12 * len(entries) + 4
    for tag, values in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            packed, long = struct.pack("<I", behind + len(long)), long + packed
        directory += struct.pack("<HHI", tag, 3, len(values)) + packed.ljust(4, b"\0")
    return struct.pack("<4sI", b"II*\0", 8 + len(pixels)) + pixels + directory + bytes(4) + long


@pytest.mark.parametrize(
    ("planes", "bits", "tags", "message"),
    [
        (3, 16, {}, "have 16 bits per channel, which pillow would cut to 8"),
        (1, 16, {"t262": 0}, "are of 16 bits with 0 for white, which pillow would not turn"),
        (1, 8, {"t339": 2}, "have a sign, which pillow would not heed"),
    ],
)
def test_tiff_files_that_pillow_would_misread(tmp_path, planes, bits, tags, message):
    path = tmp_path / "a.tif"
    path.write_bytes(tiff([bytes(12 * bits // 8)] * planes, bits, **tags))
    with pytest.raises(UnreadableSeries, match=message) as caught:
        read_raster_header(path)
    assert code_of(caught) == "pixel-type"


def test_planes_of_8_bits_and_white_as_0(tmp_path):
    path = tmp_path / "a.tif"
    planes = [bytes(range(n, n + 12)) for n in (0, 50, 100)]
    path.write_bytes(tiff(planes, 8, t339=1))
    pixels = np.frombuffer(b"".join(planes), np.uint8).reshape(3, 3, 4).transpose(1, 2, 0)
    np.testing.assert_array_equal(read_raster(path).array, as_volume(pixels))
    path.write_bytes(tiff(planes[:1], 8, t262=0))
    np.testing.assert_array_equal(read_raster(path).array, as_volume(255 - pixels[..., 0]))


@pytest.mark.parametrize("value", [0x1234, 0x1235])
def test_one_transparent_grey_of_16_bits(tmp_path, value):
    path = tmp_path / "a.png"
    data = png(3, 2, 16, 0, (b"\0" + b"\x12\x34" + b"\x20\0" * 2) * 2)
    start = data.index(b"IDAT") - 4
    chunk = b"tRNS" + struct.pack(">H", value)
    path.write_bytes(data[:start] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[start:])
    if value == 0x1235:  # no pixel has it
        assert read_raster(path).array[0, 0, 0] == 0x1234
        return
    with pytest.raises(UnreadableSeries, match=r"33\.3 % of its pixels are transparent"):
        read_raster(path)


def test_several_pictures_in_one_file(tmp_path):
    first, second = (Image.fromarray(colours(seed=n)) for n in (0, 1))
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[second])
    first.save(tmp_path / "animated.png", save_all=True, append_images=[second])
    first.save(tmp_path / "thumbnail.tif", tiffinfo={254: 1})
    for path in sorted(tmp_path.iterdir()):
        for read in (read_raster_header, read_raster):
            with pytest.raises(UnreadableSeries, match="one picture is needed, but the file holds several") as caught:
                read(path)
            assert code_of(caught) == "multi-frame"


@pytest.mark.parametrize("orientation", [1, 6])
def test_of_a_cameras_mpo_file_the_first_picture_is_read(tmp_path, orientation):
    first, second = (Image.fromarray(colours(150, 100, seed=n)) for n in (0, 1))
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[274] = orientation
    first.save(path, format="MPO", save_all=True, append_images=[second], exif=exif)
    volume = read_raster(path)
    with Image.open(path) as shown:
        np.testing.assert_array_equal(volume.array, as_volume(np.asarray(shown)))
    assert volume.notes[-1] == "a camera's file of 2 pictures; the first, which viewers show, was read"
    assert read_raster_header(path).notes == volume.notes and len(volume.notes) == 1 + (orientation > 1)
    assert exif_orientation(volume.space) == orientation
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(UnreadableFile, match="get it again"):
        read_raster(path)


@pytest.mark.parametrize(("most", "bits"), [(4095, 12), (1023, 10), (65535, None), (20000, None)])
def test_values_of_a_detector_in_16_bits_are_noted(tmp_path, most, bits):
    pixels = np.array([[0, 1, 255], [256, 300, most]], np.uint16)
    volume = read_raster(write_picture(tmp_path / "a.png", pixels))
    np.testing.assert_array_equal(volume.array, as_volume(pixels))
    note = f"its 16-bit values use {bits} bits, up to {most}: dark where 65535 counts as white"
    assert volume.notes == (() if bits is None else (note,))


def test_a_picture_too_large_is_refused_by_its_header(tmp_path, monkeypatch):
    path = write_picture(tmp_path / "a.png", colours(70, 45))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # pillow warns above it: nobody hears that
    assert read_raster(path).array.shape[:2] == (70, 45)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableFile, match="a photograph may have 2000 pixels at most"):
        read_raster_header(path)


def test_no_file_and_no_picture(tmp_path):
    with pytest.raises(UnreadableFile, match=r"no\.png: cannot be opened: No such file"):
        read_raster(tmp_path / "no.png")
    (tmp_path / "a.png").write_text("hello")
    with pytest.raises(UnreadableFile, match="UnidentifiedImageError"):
        read_raster(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    with pytest.raises(UnreadableFile, match="no readable PNG, JPEG, TIFF, BMP file"):
        read_raster(tmp_path / "a.gif")


def test_memory_is_not_an_unreadable_file(tmp_path, monkeypatch):
    path = write_picture(tmp_path / "a.bmp", colours())
    monkeypatch.setattr(Image.Image, "convert", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        read_raster(path)


# ---- headers only, and names


def test_headers_are_read_without_pixels(tmp_path, monkeypatch):
    files = [write_picture(tmp_path / name, colours(), 6) for name in ("a.png", "a.jpg", "a.tif", "a.bmp")]
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    for file in files:
        assert read_raster_header(file).channels == 3


def test_formats_are_told_by_content(tmp_path):
    for name, kind in (("a.png", "PNG"), ("a.jpg", "JPEG"), ("a.tif", "TIFF"), ("a.bmp", "BMP"), ("a.gif", None)):
        assert sniff(write_picture(tmp_path / name, colours()).read_bytes()[:132]) == kind
    write_picture(tmp_path / "big.tif", colours(), big_tiff=True)
    assert sniff((tmp_path / "big.tif").read_bytes()[:132]) == "TIFF"
    np.testing.assert_array_equal(read_raster(tmp_path / "big.tif").array, as_volume(colours()))
    assert [sniff(start) for start in (b"", b"BM", b"BMI of 40 patients, in kg/m2", b"II*", b"\x89PNG")] == [None] * 5


def test_stems():
    names = ("a.b.JPG", "a.jpeg", "a.tiff", "photo.001", ".png")
    assert [stem(Path(name)) for name in names] == ["a.b", "a", "a", "photo.001", ".png"]
