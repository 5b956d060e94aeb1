from __future__ import annotations

import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from dicom_synthetic import write_flat
from monai.transforms import LoadImage
from PIL import Image

from medvit.data import AnyRankReader, RadiographReader, VolumeReader
from medvit.errors import UnreadableFile, UnreadableSeries, UnsuitableImage

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
DX, SECONDARY_CAPTURE = "1.1", "7"


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (6, 9), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    write_flat(tmp_path / "x.dcm", pixels[None], DX, "DX")
    write_dicom_series(tmp_path / "mr", phantom(), make_affine())
    write_nifti(tmp_path / "v.nii.gz", phantom(), make_affine())
    return tmp_path


@pytest.mark.parametrize(("name", "rank", "twin"), [
    ("a.png", 2, RadiographReader), ("x.dcm", 2, RadiographReader),
    ("v.nii.gz", 3, VolumeReader), ("mr", 3, VolumeReader),
])  # fmt: skip
def test_each_file_is_read_as_what_it_is(folder, name, rank, twin):
    path = folder / name
    files = [path] if path.is_file() else sorted(path.iterdir())
    ours, theirs = (
        LoadImage(reader=reader(), image_only=True)([str(f) for f in files]) for reader in (AnyRankReader, twin)
    )
    assert ours.ndim == rank and np.array_equal(ours.numpy(), theirs.numpy())
    assert ours.meta["medvit_kind"] == theirs.meta["medvit_kind"]


def test_one_slice_with_a_place_is_a_volume(folder):
    (first, *_) = sorted((folder / "mr").iterdir())
    array, meta = AnyRankReader().get_data([first])
    assert array.ndim == 3 and meta["medvit_unit"] == "mm"


def test_errors_are_those_of_the_reader_for_it(folder):
    reader = AnyRankReader()
    assert reader.verify_suffix("x") and reader.read("x")[0].name == "x"
    Image.fromarray(np.zeros((4, 4, 3), np.uint8) + np.arange(3, dtype=np.uint8)).save(folder / "c.png")
    with pytest.raises(UnreadableSeries, match="grey values are needed"):
        reader.get_data([folder / "c.png"])
    write_flat(folder / "sc.dcm", np.zeros((1, 4, 4), np.uint8), SECONDARY_CAPTURE, "OT")
    with pytest.raises(UnsuitableImage, match="a projection radiograph is needed"):
        reader.get_data([folder / "sc.dcm"])
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICMxx")
    with pytest.raises((UnreadableFile, UnreadableSeries)):
        reader.get_data([folder / "broken.dcm"])
