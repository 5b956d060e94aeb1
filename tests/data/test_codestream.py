from base64 import b64decode
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from pixels_synthetic import ENCODED, compressed, dataset, encoded, grey, save
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import UID, JPEG2000Lossless, JPEGBaseline8Bit, JPEGLossless, RLELossless

from medvit.data.pixels import decode
from medvit.errors import UnreadableFile

# (251 * column + 13 * row * row) % 4096 of 12 x 16, encoded by OpenJPH 0.26.3; nothing installed encodes HTJ2K
HTJ2K = (
    "/0//UQApQAAAAAAQAAAADAAAAAAAAAAAAAAAEAAAAAwAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCI"
    "kJCQkJCQkJCQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAAPwAAf+TwAAmz/QFB3QAAMAAE0AAE0AAEwB4"
    "8QOHdACK/gKHdAAH/gIHdADAABVQAATwAATgBEgB2UDzAMKUAC0G/gIBdAAIIOgAojQAwAAVkAAFqwAAVoBmoBBvu1B6iZigVQDn"
    "+XyeDw8a0kCQOfEAQAH8wRHpuQCe+QNf+Ez+4ImYwFUAwAAtiAAF3EAALSD09P5BXxLsf/7573/RF33850EcADGCeACZc2ZmZmZm"
    "ZmbOmZmZmZkB8pAvQxlAZACRAUQGEBmAmGF35O9uhkH0AEEghABjjGWv1l6MajGwAf7nf/9/f/9//375Bwiccwl4AP/Z"
)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image.dcm"


@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("i1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_lossless_round_trips(path, tmp_path, syntax, dtype, bits):
    frames = grey((3, 34, 37), dtype, bits)
    ds, _ = encoded(tmp_path, frames, syntax, bits)
    pixels = decode(save(path, ds, syntax))
    assert pixels.stored.dtype == frames.dtype
    np.testing.assert_array_equal(pixels.stored, frames)
    np.testing.assert_array_equal(pixels.frame(1), frames[1])


@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
def test_lossless_colours(path, tmp_path, syntax):
    frames = np.random.default_rng(0).integers(0, 256, (2, 34, 37, 3), dtype=np.uint8)
    ds, _ = encoded(tmp_path, frames, syntax, 8)
    ds.PhotometricInterpretation = "RGB"
    np.testing.assert_array_equal(decode(save(path, ds, syntax)).stored, frames)


@pytest.mark.parametrize("table", ["none", "basic", "extended", "wrong"])
@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
def test_fragments_and_offset_tables(path, tmp_path, syntax, pieces, table):
    if pieces > 1 and (syntax == RLELossless or table == "extended"):
        pytest.skip("one fragment per frame is required")
    frames = grey((4, 34, 37))
    ds, streams = encoded(tmp_path, frames, syntax, 12)
    if table == "extended":
        ds.PixelData, ds.ExtendedOffsetTable, ds.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    else:
        ds.PixelData = encapsulate(streams, fragments_per_frame=pieces, has_bot=table != "none")
        if table == "wrong":
            ds.PixelData = ds.PixelData[:12] + b"\x07" * 4 + ds.PixelData[16:]
    np.testing.assert_array_equal(decode(save(path, ds, syntax)).stored, frames)


def jpeg(image, **options):
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


def scene():
    """A smooth image (rows, columns, 3) whose colours a wrong conversion would change by far."""
    y, x = np.mgrid[:32, :48]
    return np.stack([5 * x, 7 * y, 255 - 5 * x], axis=-1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("syntax", [f"1.2.840.10008.1.2.4.{n}" for n in (201, 202, 203)])
def test_high_throughput_jpeg2000(path, syntax):
    row, column = np.mgrid[:12, :16]
    ds = dataset(np.zeros((1, 12, 16), np.uint16))
    save(path, compressed(ds, UID(syntax), [b64decode(HTJ2K)]), UID(syntax))
    np.testing.assert_array_equal(decode(path).frame(0), (251 * column + 13 * row * row) % 4096)


def process14(image, predictor, precision):
    """Lossless JPEG, ISO 10918-1 annex H, with any of its predictors; every category has a code of 5 bits."""
    x = np.pad(image.astype(np.int64), ((1, 0), (1, 0)))
    a, b, c = x[1:, :-1], x[:-1, 1:], x[:-1, :-1]
    guesses = (a, b, c, a + b - c, a + (b - c >> 1), b + (a - c >> 1), a + b >> 1)
    predicted = guesses[predictor - 1].copy()
    predicted[0], predicted[:, 0] = a[0], b[:, 0]
    predicted[0, 0] = 1 << precision - 1
    bits = []
    for difference in ((image - predicted + 32768) % 65536 - 32768).ravel().tolist():
        category = 16 if difference == -32768 else abs(difference).bit_length()
        bits.append(f"{category:05b}")
        if 0 < category < 16:
            bits.append(f"{difference if difference > 0 else difference + (1 << category) - 1:0{category}b}")
    text = "".join(bits)
    data = int(text + "1" * (-len(text) % 8), 2).to_bytes(-(-len(text) // 8), "big").replace(b"\xff", b"\xff\0")
    rows, columns = (n.to_bytes(2, "big") for n in image.shape)
    frame = b"\xff\xc3\0\x0b" + bytes([precision]) + rows + columns + b"\1\1\x11\0"
    table = b"\xff\xc4\0\x24\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    scan = b"\xff\xda\0\x08\1\1\0" + bytes([predictor, 0, 0])
    return b"\xff\xd8" + frame + table + scan + data + b"\xff\xd9"


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("u2", 12), ("u2", 16), ("i2", 12), ("i2", 16)])
def test_every_predictor_of_lossless_jpeg(path, predictor, dtype, bits):
    frames = grey((2, 11, 9), dtype, bits)
    streams = [process14(frame.astype(int) % (1 << bits), predictor, bits) for frame in frames]
    save(path, compressed(dataset(frames, bits), JPEGLossless, streams), JPEGLossless)
    np.testing.assert_array_equal(decode(path).stored, frames)


@pytest.mark.parametrize("subsampling", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL", "YBR_FULL_422"])
@pytest.mark.parametrize("marker", ["JFIF", "Adobe", "none"])
def test_colours_of_jpeg(path, photometric, subsampling, marker):
    """Pillow writes YBR with a JFIF marker. A stream without any marker is what DICOM says it is."""
    stream = jpeg(scene(), subsampling=subsampling)
    without = stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64" + bytes(4) + b"\x01"  # transform 1: YBR
    stream = {"JFIF": stream, "Adobe": without[:2] + adobe + without[2:], "none": without}[marker]
    ds = compressed(dataset(scene()[None], PhotometricInterpretation=photometric), JPEGBaseline8Bit, [stream])
    frame = decode(save(path, ds, JPEGBaseline8Bit)).frame(0).astype(int)
    if marker == "none" and photometric == "RGB":
        expected = np.asarray(Image.fromarray(scene()).convert("YCbCr"))
    else:
        expected = scene()
    assert np.abs(frame - expected).mean() < 4


@pytest.mark.parametrize(("dtype", "bits"), [("u1", 8), ("u2", 12), ("i2", 12)])
def test_grey_jpeg(path, dtype, bits):
    image = scene()[..., 0]
    ds = compressed(dataset(image[None].astype(dtype), bits), JPEGBaseline8Bit, [jpeg(image)])
    frame = decode(save(path, ds, JPEGBaseline8Bit)).frame(0)
    assert frame.dtype == np.dtype(dtype) and frame.max() > 200
    np.testing.assert_array_equal(frame, np.asarray(Image.open(BytesIO(jpeg(image)))))


def test_frames_are_decoded_when_asked_for(path):
    frames = grey((3, 40, 50))
    ds, streams = encoded(None, frames, JPEG2000Lossless, 12)
    streams[2] = streams[2][:100] + bytes(len(streams[2]) - 102) + b"\xff\xd9"
    save(path, compressed(ds, JPEG2000Lossless, streams), JPEG2000Lossless)
    pixels = decode(path)
    np.testing.assert_array_equal(pixels.frame(1), frames[1])
    with pytest.raises(UnreadableFile, match=r"JPEG 2000 .* of frame 3 cannot be decoded: .*; get the file again"):
        pixels.frame(2)
    with pytest.raises(IndexError, match="frame 3 of 3"):
        pixels.frame(3)
    with pytest.raises(IndexError, match="frame -1 of 3"):
        pixels.frame(-1)


# --- what is refused


@pytest.mark.parametrize("given", [1, 2, 4])
@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
def test_another_number_of_frames(path, tmp_path, syntax, given):
    ds, streams = encoded(tmp_path, grey((5, 34, 37)), syntax, 12)
    ds.NumberOfFrames = 3
    save(path, compressed(ds, syntax, streams[:given]), syntax)
    with pytest.raises(UnreadableFile, match=f"3 frames are needed, but its pixels hold {given}"):
        decode(path)


def test_missing_number_of_frames_is_one_here_too(path, tmp_path):
    ds, streams = encoded(tmp_path, grey((2, 34, 37)), JPEG2000Lossless, 12)
    del ds.NumberOfFrames
    with pytest.raises(UnreadableFile, match="1 frames are needed, but its pixels hold 2"):
        decode(save(path, ds, JPEG2000Lossless))
    assert decode(save(path, compressed(ds, JPEG2000Lossless, streams[:1]), JPEG2000Lossless)).shape == (1, 34, 37)


@pytest.mark.parametrize("syntax", [*ENCODED, JPEGBaseline8Bit], ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize("filled", [False, True])
def test_a_stream_that_was_cut_short(path, tmp_path, syntax, filled):
    """In a sound file: its fragments have the right lengths. Nothing is decoded that differs from the whole stream."""
    if filled and syntax == RLELossless:
        pytest.skip("zeros are run lengths, too")
    frames = grey((1, 34, 48), np.uint8, 8)
    if syntax == JPEGBaseline8Bit:
        stream = jpeg(frames[0])
        ds, frames = dataset(frames), np.asarray(Image.open(BytesIO(stream)))[None]
    else:
        ds, (stream,) = encoded(tmp_path, frames, syntax, 8)
    refused = 0
    for end in range(1, len(stream), 29):
        cut = stream[:end] + bytes(len(stream) - end if filled else 0)
        save(path, compressed(ds, syntax, [cut]), syntax)
        try:
            frame = decode(path).frame(0)
        except UnreadableFile:
            refused += 1
        else:  # padding, or the marker of the end, was lost
            np.testing.assert_array_equal(frame, frames[0])
    assert refused > 40


@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
def test_a_file_that_was_cut_short(path, tmp_path, syntax):
    ds, _ = encoded(tmp_path, grey((2, 34, 37)), syntax, 12)
    data = save(path, ds, syntax).read_bytes()
    for end in range(len(data) - 1400, len(data) - 12, 31):
        path.write_bytes(data[:end])
        with pytest.raises(UnreadableFile):
            decode(path)


@pytest.mark.parametrize("syntax", ENCODED, ids=lambda syntax: syntax.keyword)
@pytest.mark.parametrize(("rows", "columns"), [(37, 34), (33, 37), (34, 74)])
def test_a_stream_of_another_shape(path, tmp_path, syntax, rows, columns):
    ds, _ = encoded(tmp_path, grey((1, 34, 37)), syntax, 12)
    ds.Rows, ds.Columns = rows, columns
    if syntax == RLELossless and rows * columns == 34 * 37:
        pytest.skip("run lengths do not know their shape")
    message = r"RLE" if syntax == RLELossless else rf"are \(34, 37, 1\) in the stream, but \({rows}, {columns}, 1\)"
    with pytest.raises(UnreadableFile, match=message):
        decode(save(path, ds, syntax)).frame(0)


def test_more_bits_than_are_allocated(path, tmp_path):
    for syntax in ENCODED[1:]:
        ds, _ = encoded(tmp_path, grey((1, 34, 37), bits=16), syntax, 16)
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
        with pytest.raises(UnreadableFile, match="its stream has 16 bits, but BitsAllocated is 8"):
            decode(save(path, ds, syntax)).frame(0)


def test_pixels_that_are_no_fragments(path):
    ds = dataset(grey(), 12)
    save(path, ds)
    data = path.read_bytes()  # of a length, and not compressed
    path.write_bytes(data.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"))
    with pytest.raises(UnreadableFile, match="they are not in fragments, as compressed pixels must be"):
        decode(path)


def test_junk_instead_of_a_stream(path):
    for stream in (b"junk" * 30, b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9", b"\xff\x4f\xff\x51" + bytes(9), bytes(60)):
        save(path, compressed(dataset(grey((1, 34, 37))), JPEG2000Lossless, [stream]), JPEG2000Lossless)
        with pytest.raises(UnreadableFile, match=r"a compressed frame (has no header|does not begin like one)"):
            decode(path).frame(0)


def test_jpeg2000_may_be_padded_and_lie_in_a_jp2_file(path, tmp_path):
    frames = grey((1, 34, 37))
    ds, (stream,) = encoded(tmp_path, frames, JPEG2000Lossless, 12)
    bare = stream.rstrip(b"\0")
    assert bare.endswith(b"\xff\xd9")
    part = bare.index(b"\xff\x90")
    to_the_end = bare[: part + 6] + bytes(4) + bare[part + 10 :]  # a tile part that does not tell its length
    buffer = BytesIO()
    Image.fromarray(frames[0]).save(buffer, "JPEG2000")
    for data in (bare + bytes(40), to_the_end, buffer.getvalue()):
        save(path, compressed(ds, JPEG2000Lossless, [data]), JPEG2000Lossless)
        np.testing.assert_array_equal(decode(path).frame(0), frames[0])
    for data in (bare[:-2], bare[:-2] + bytes(40), to_the_end[:-2]):
        save(path, compressed(ds, JPEG2000Lossless, [data]), JPEG2000Lossless)
        with pytest.raises(UnreadableFile, match="a compressed frame is cut short"):
            decode(path).frame(0)
