import numpy as np
import pytest
from pixels_synthetic import dataset, save
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian

from medvit.data.lookup import read_table
from medvit.data.pixels import decode
from medvit.errors import UnreadableFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image.dcm"


# --- tables


@pytest.mark.parametrize("data", [[5, 6, 9], b"\x05\0\x06\0\x09\0", b"\x05\x06\x09\0", b"\x05\x06\x09"])
def test_entries_come_as_numbers_as_words_and_as_bytes(data):
    table = read_table([3, 10, 8], data, signed=False, little=True)
    assert table(np.array([[0, 10, 11, 12, 900]])).tolist() == [[5, 5, 6, 9, 9]]


def test_big_endian_words_and_bytes_in_words():
    assert read_table([2, 0, 16], b"\x01\x02\x03\x04", signed=False, little=False).entries.tolist() == [0x102, 0x304]
    assert read_table([4, 0, 8], b"\x01\x02\x03\x04", signed=False, little=False).entries.tolist() == [2, 1, 4, 3]


def test_more_values_than_the_type_of_the_entries_can_count():
    """pydicom takes the index modulo the type."""
    table = read_table([1000, 0, 8], bytes(n // 4 for n in range(1000)), signed=False, little=True)
    assert table(np.array([0, 255, 256, 999], np.uint16)).tolist() == [0, 63, 64, 249]
    assert table(np.array([200], np.uint8)).tolist() == [50]


def test_first_values():
    entries = list(range(100))
    assert read_table([100, 65526, 16], entries, signed=True, little=True)(np.array([-10, -9, 0])).tolist() == [
        0,
        1,
        10,
    ]
    assert read_table([100, -10, 16], entries, signed=True, little=True)(np.array([-10, -9, 0])).tolist() == [0, 1, 10]
    assert read_table([100, 65000, 16], entries, signed=False, little=True)(np.array([0, 65001])).tolist() == [0, 1]
    assert len(read_table([0, 0, 16], range(65536), signed=False, little=True).entries) == 65536


def test_values_between_entries_are_rounded():
    assert read_table([3, 0, 8], [7, 8, 9], signed=False, little=True)(np.array([0.4, 0.6, 1.6])).tolist() == [7, 8, 9]


def test_a_short_table():
    with pytest.raises(ValueError, match="promises 65536 entries, but has 3"):
        read_table([0, 0, 16], [1, 2, 3], signed=False, little=True)


# --- palettes

COLOURS = ("Red", "Green", "Blue")


def palette(pixels, tables, bits, first=0, little=True, segmented=False, count=None):
    """A PALETTE COLOR data set; ``tables`` of three colours, as words of 16 bits or bytes."""
    ds = dataset(pixels, PhotometricInterpretation="PALETTE COLOR")
    for colour, table in zip(COLOURS, tables, strict=True):
        descriptor = [(count or len(table)) % (1 << 16), first % (1 << 16), bits]
        ds.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", descriptor)
        data = np.asarray(table, np.uint8 if bits == 8 else "<u2" if little else ">u2").tobytes()
        data += b"\0" * (len(data) % 2)
        if bits == 8 and not little:
            data = np.frombuffer(data, "<u2").byteswap().tobytes()
        ds.add_new(f"{'Segmented' * segmented}{colour}PaletteColorLookupTableData", "OW", data)
    if not little:
        cells = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
        ds.add_new(0x7FE00010, "OB" if pixels.dtype.itemsize == 1 else "OW", cells + b"\0" * (len(cells) % 2))
    return ds


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_a_palette_of_every_size(path, dtype, bits, little):
    random = np.random.default_rng(0)
    tables = random.integers(0, 1 << bits, (3, 200))
    pixels = random.integers(0, 250, (2, 5, 7)).astype(dtype)
    ds = palette(pixels, tables, bits, first=20, little=little)
    decoded = decode(save(path, ds, ExplicitVRLittleEndian if little else ExplicitVRBigEndian))
    assert decoded.shape == (2, 5, 7, 3) and decoded.stored.dtype == np.uint8
    index = np.clip(pixels.astype(int) - 20, 0, 199)
    np.testing.assert_array_equal(decoded.stored, np.moveaxis(tables[:, index] >> (bits - 8), 0, -1))
    np.testing.assert_array_equal(decoded.rescaled(1), decoded.frame(1))


def test_eight_bits_declared_as_sixteen(path):
    tables = np.array([[0, 100, 255], [1, 2, 3], [7, 8, 9]])
    pixels = np.array([[[0, 1, 2]]], np.uint8)
    assert decode(save(path, palette(pixels, tables, 16))).frame(0)[0].tolist() == [[0, 1, 7], [100, 2, 8], [255, 3, 9]]


def test_a_palette_of_signed_pixels(path):
    pixels = np.array([[[-5, -4, 3]]], np.int16)
    tables = np.arange(9)[None].repeat(3, axis=0)
    assert decode(save(path, palette(pixels, tables, 16, first=-5))).frame(0)[0, :, 0].tolist() == [0, 1, 8]


SEGMENTS = [  # segments of words, entries; PS3.3 C.7.9.2
    ([0, 3, 10, 20, 30], [10, 20, 30]),
    ([0, 1, 10, 1, 4, 30], [10, 15, 20, 25, 30]),
    ([0, 1, 30, 1, 3, 0, 1, 2, 0], [30, 20, 10, 0, 0, 0]),  # a line that goes on from an entry of 0
    ([0, 2, 7, 9, 1, 2, 13, 0, 1, 1, "copy 2 from 0"], [7, 9, 11, 13, 1, 7, 9, 11, 13]),
    ([0, 2, 7, 9, 1, 2, 13, "copy 1 from 4"], [7, 9, 11, 13, 13, 13]),  # a line from where the copy begins
]


def words(segments, bits):
    out = []
    for word in segments:
        if isinstance(word, str):
            _, count, _, index = word.split()
            offset = int(index) * bits // 8
            parts = [offset & 0xFF, offset >> 8, 0, 0] if bits == 8 else [offset, 0]
            out += [2, int(count), *parts]
        else:
            out.append(word)
    return out


@pytest.mark.parametrize("little", [True, False])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("segments", "entries"), SEGMENTS)
def test_segmented_palettes(path, segments, entries, bits, little):
    scale = 1 if bits == 8 else 256
    data = words(segments, bits)
    pixels = np.arange(len(entries), dtype=np.uint8).reshape(1, 1, -1)
    if scale > 1:  # entries, not the kinds and lengths of segments, grow
        data, plain = [], segments
        position = 0
        while position < len(plain):
            if isinstance(plain[position], str):
                data += words([plain[position]], bits)
                position += 1
                continue
            kind, length = plain[position : position + 2]
            count = length if kind == 0 else 1
            data += [kind, length, *(v * scale for v in plain[position + 2 : position + 2 + count])]
            position += 2 + count
    ds = palette(pixels, [data] * 3, bits, little=little, segmented=True, count=len(entries))
    frame = decode(save(path, ds, ExplicitVRLittleEndian if little else ExplicitVRBigEndian)).frame(0)
    assert frame[0, :, 0].tolist() == frame[0, :, 2].tolist() == entries


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([1, 2, 9, 0], "its segmented palette is damaged"),  # a line from nowhere
        ([3, 2, 9, 0], "its segmented palette is damaged"),
        ([0, 1, 9, 2, 1, 6, 0, 0], "its segmented palette is damaged"),  # a copy of a copy
        ([0, 1, 9, *[2, 1, 0, 0] * 9, 0], "its red palette promises 300 entries, but has 10"),
        ([0, 1, 9, *[1, 65535, 9] * 2, 0], "it makes more than 65536 entries"),
    ],
)
def test_segments_that_make_no_sense(path, segments, message):
    ds = palette(np.zeros((1, 2, 2), np.uint8), [segments] * 3, 16, segmented=True, count=300)
    with pytest.raises(UnreadableFile, match=message):
        decode(save(path, ds)).frame(0)


def test_a_palette_that_is_missing_or_short(path):
    pixels, tables = np.zeros((1, 2, 2), np.uint8), np.zeros((3, 9), int)
    ds = palette(pixels, tables, 16)
    del ds.GreenPaletteColorLookupTableData
    with pytest.raises(UnreadableFile, match="cannot be decoded: its green palette is missing; get the file again"):
        decode(save(path, ds)).frame(0)
    with pytest.raises(UnreadableFile, match="its red palette promises 30 entries, but has 18"):
        decode(save(path, palette(pixels, tables, 16, count=30))).frame(0)
