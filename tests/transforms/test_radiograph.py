from __future__ import annotations

import numpy as np
import pytest
import torch
from data_synthetic import slice_dataset
from monai.data import MetaTensor
from PIL import Image

from medvit.transforms import ResizeShorterSided, RowsFirstd, rad_dino_preprocessing

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
MEAN, STD = 0.5307, 0.2583


def picture(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Grey values (row, column): a smooth ramp, edges, and noise that makes the resizing overshoot."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:rows, :columns]
    image = (
        90 + 80 * np.sin(x / 9) * np.cos(y / 13) + 60 * ((x // 17 + y // 11) % 2) + rng.normal(0, 25, (rows, columns))
    )
    return np.clip(image, 0, 255).astype(np.uint8)


SIZES = [(137, 90), (90, 137), (56, 56), (40, 61), (57, 56), (131, 71)]


@pytest.mark.upstream
@pytest.mark.parametrize("backend", ["torchvision", "pil"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_it_is_hugging_faces_up_to_the_rounding_of_8_bits(tmp_path, shape, backend):
    from transformers.models.bit.image_processing_bit import BitImageProcessor
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

    size = 56
    image = Image.fromarray(picture(*shape))
    image.save(tmp_path / "x.png")
    processor = (BitImageProcessor if backend == "torchvision" else BitImageProcessorPil)(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
    )
    golden = processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    ours = rad_dino_preprocessing(size=size)({"image": str(tmp_path / "x.png")})["image"]
    assert ours.shape == golden.shape == (3, size, size) and ours.dtype == torch.float32
    off = (ours.as_tensor() - golden).abs() * STD * 255  # in grey values
    assert off.max() <= 1.1 and off.mean() <= 0.35
    if min(shape) == size:  # nothing to resize: nothing to round
        assert off.max() < 1e-3


@pytest.mark.upstream
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_resizing_is_torchvisions_without_rounding(shape):
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    image = 0.3 + 0.4 * torch.from_numpy(picture(*shape))[None] / 255  # nothing overshoots
    golden = resize(image, 56, interpolation=InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
    ours = ResizeShorterSided("image", 56)({"image": image})["image"]
    torch.testing.assert_close(ours, golden, rtol=0, atol=1e-6)


def test_dicom_and_png_of_one_image_give_the_same(tmp_path):
    pixels = picture(70, 90)
    pixels[0, 0], pixels[0, 1] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    ds = slice_dataset(255 - pixels.T)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.Modality, ds.PhotometricInterpretation = "CR", "MONOCHROME1"
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    prepare = rad_dino_preprocessing(["a", "b"], size=42)
    item = prepare({"a": tmp_path / "x.png", "b": tmp_path / "x.dcm"})
    torch.testing.assert_close(item["a"].as_tensor(), item["b"].as_tensor(), rtol=0, atol=1e-5)


def test_rows_come_first_and_the_centre_is_kept(tmp_path):
    pixels = np.zeros((14, 28), np.uint8)
    pixels[3, 10] = 255  # row 3, column 10; the crop starts at column 7
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = rad_dino_preprocessing(size=14)({"image": tmp_path / "x.png"})["image"]
    white, black = (1 - MEAN) / STD, -MEAN / STD
    torch.testing.assert_close(image[:, 3, 3], torch.full((3,), white))
    assert (image == image.max()).sum() == 3
    torch.testing.assert_close(image.as_tensor().min(), torch.tensor(black))


def test_voi_is_passed_on(tmp_path):
    ds = slice_dataset(np.arange(196, dtype=np.uint16).reshape(14, 14))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.Modality, ds.WindowCenter, ds.WindowWidth = "CR", 50, 20
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    windowed, spread = (
        rad_dino_preprocessing(size=14, voi=voi)({"image": tmp_path / "x.dcm"})["image"] for voi in (True, False)
    )
    assert len(windowed[0].unique()) == 20 and len(spread[0].unique()) == 196


def test_the_network_takes_it(tmp_path):
    from medvit import create_model

    Image.fromarray(picture(70, 90)).save(tmp_path / "x.png")
    image = rad_dino_preprocessing(size=56)({"image": tmp_path / "x.png"})["image"]
    encoder = create_model("rad_dino", img_size=56, embed_dim=16, depth=1, num_heads=2)
    assert encoder(image[None])[0].shape == (1, 16, 4, 4)


def test_meta_data_are_kept():
    image = MetaTensor(torch.rand(2, 20, 31), meta={"filename_or_obj": "x.dcm"})
    item = {"image": image, "other": 1}
    out = ResizeShorterSided("image", 10)(item)
    assert out["image"].shape == (2, 10, 15) and out["image"].meta["filename_or_obj"] == "x.dcm"
    assert out["other"] == 1 and item["image"] is image


def test_the_affine_says_where_pixels_came_from():
    x = torch.arange(30.0)[None, :, None].expand(1, 30, 20) / 30
    small = ResizeShorterSided("image", 10)({"image": MetaTensor(x)})["image"]
    inner = torch.arange(3, 12)  # borders are not interpolated
    source = small.affine[0, 0] * inner + small.affine[0, -1]
    torch.testing.assert_close(source.float(), 30 * small.as_tensor()[0, inner, 5], rtol=0, atol=0.02)
    turned = RowsFirstd("image")({"image": small})["image"]
    assert turned.shape == (1, 10, 15) and torch.equal(turned.as_tensor(), small.as_tensor().transpose(1, 2))
    assert (turned.affine @ torch.tensor([2.0, 7, 0, 1], dtype=torch.float64)).tolist() == pytest.approx(
        (small.affine @ torch.tensor([7.0, 2, 0, 1], dtype=torch.float64)).tolist()
    )
    assert RowsFirstd("image")({"image": x})["image"].shape == (1, 20, 30)  # without meta data


def test_rows_and_columns_need_an_image_of_two_axes():
    with pytest.raises(ValueError, match=r"'image' must be an image \(C, x, y\), got shape \(1, 4, 4, 4\)"):
        RowsFirstd("image")({"image": torch.zeros(1, 4, 4, 4)})


def test_a_missing_key():
    assert ResizeShorterSided("image", 10, allow_missing_keys=True)({}) == {}
    assert RowsFirstd("image", allow_missing_keys=True)({}) == {}
    with pytest.raises(KeyError):
        ResizeShorterSided("image", 10)({})


@pytest.mark.parametrize("size", [0, -14, 500])
def test_a_size_that_is_no_multiple_of_the_patch(size):
    with pytest.raises(ValueError, match=f"size must be a positive multiple of the patch, 14, got {size}; published"):
        rad_dino_preprocessing(size=size)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (torch.zeros(1, 4, 4, 4), r"torch.float32 of shape \(1, 4, 4, 4\)"),
        (torch.zeros(1, 4, 4, dtype=torch.uint8), r"torch.uint8 of shape \(1, 4, 4\)"),
    ],
)
def test_what_is_no_grey_image_is_not_resized(image, found):
    with pytest.raises(ValueError, match=rf"'image' must be a floating-point image \(C, x, y\), got {found}"):
        ResizeShorterSided("image", 2)({"image": image})
