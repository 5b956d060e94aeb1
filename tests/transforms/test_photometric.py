import numpy as np
import pytest
import torch
from data_synthetic import slice_dataset
from monai.data import MetaTensor, PydicomReader
from monai.transforms import Compose, LoadImaged

from medvit.data.radiograph import RadiographReader
from medvit.errors import UnsuitableImage
from medvit.transforms import RadiographRanged
from medvit.transforms.photometric import within_frame

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:.*PydicomReader:UserWarning")


def picture(shape=(60, 50), seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(1000, 200, (1, *shape)))


def ranged(image, **kwargs):
    return RadiographRanged("x", **kwargs)({"x": image})["x"]


@pytest.mark.parametrize("shape", [(60, 50), (12, 20, 15)], ids=str)
def test_between_percentiles_it_is_linear(shape):
    image = picture(shape)
    out = ranged(image, lower=2, upper=95)
    low, high = np.percentile(image.numpy(), (2, 95))
    golden = ((image - low) / (high - low)).clamp(0, 1).float()
    assert out.dtype == torch.float32 and type(out) is torch.Tensor
    torch.testing.assert_close(out, golden, rtol=0, atol=1e-6)


@pytest.mark.parametrize("value", [0, 1000, 4095])
@pytest.mark.parametrize("width", [(1, 0, 0, 3), (40, 10, 25, 60)], ids=str)
def test_a_frame_of_any_width_and_value_changes_nothing_inside(value, width):
    image = picture()
    top, bottom, left, right = width
    framed = torch.nn.functional.pad(image, (left, right, top, bottom), value=value)
    framed[0, 0, 0] = framed[0, -1, -1] = 2000  # markers on the frame
    framed += torch.rand(framed.shape, generator=torch.Generator().manual_seed(0)) * 0.5  # as JPEG would
    inside = (slice(None), slice(top, top + 60), slice(left, left + 50))
    found = within_frame(framed.numpy())[1:]
    assert found == inside[1:] or (value == 1000 and found)  # a frame as grey as the picture
    torch.testing.assert_close(ranged(framed)[inside], ranged(image), rtol=0, atol=2e-3)


def test_markers_and_dead_pixels_do_not_darken_the_rest():
    image = picture()
    marked = image.clone()
    marked[0, 5, 5:9], marked[0, 30, 30] = 65535, -1e6
    same = marked == image
    torch.testing.assert_close(ranged(marked)[same], ranged(image)[same], rtol=0, atol=0.03)


def test_few_values_and_a_single_direction():
    stripes = torch.zeros(1, 20, 20)
    stripes[0, 10:] = 7  # every line along it is one value
    assert ranged(stripes).unique().tolist() == [0, 1]
    speck = torch.zeros(1, 40, 40)
    speck[0, 20, 20] = 9
    assert ranged(speck).sum() == 1
    # both percentiles agree within the frame
    sparse = torch.zeros(1, 40, 40)
    sparse[0, 0, 0] = sparse[0, -1, -1] = 9
    assert ranged(sparse).unique().tolist() == [0, 1]


def test_inverted_if_told():
    image = picture()
    plain = ranged(image, invert=False)
    torch.testing.assert_close(ranged(image, invert=True), 1 - plain, rtol=0, atol=1e-6)
    assert torch.equal(ranged(image), plain)
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1])).double()
    for meta, inverse in [
        ({"00280004": {"vr": "CS", "Value": ["MONOCHROME1"]}}, True),
        ({"00280004": {"vr": "CS", "Value": ["MONOCHROME2"]}}, False),
        ({"0028|0004": "MONOCHROME1 "}, True),
        ({"PhotometricInterpretation": "MONOCHROME1"}, True),
        ({"PhotometricInterpretation": "MONOCHROME1", "medvit_contrast": "window"}, False),
        ({}, False),
    ]:
        out = ranged(MetaTensor(image, affine=affine, meta=meta))
        torch.testing.assert_close(out.as_tensor(), 1 - plain if inverse else plain, rtol=0, atol=1e-6)
        assert torch.equal(out.affine, affine)


def test_dicom_through_any_reader_is_bright_where_bone_is(tmp_path):
    grey = np.clip(np.random.default_rng(1).normal(128, 30, (40, 30)), 0, 255).astype(np.uint8)
    ds = slice_dataset(255 - grey.T)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.Modality, ds.PhotometricInterpretation = "CR", "MONOCHROME1"
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    golden = ranged(torch.from_numpy(grey)[None])
    for reader in (PydicomReader(prune_metadata=False), RadiographReader()):
        steps = Compose([LoadImaged("x", reader=reader, ensure_channel_first=True), RadiographRanged("x")])
        out = steps({"x": tmp_path / "x.dcm"})["x"].as_tensor()
        torch.testing.assert_close(out, golden.mT, rtol=0, atol=1e-5)  # (x, y)


def test_what_makes_no_sense_is_refused():
    for limits in [(-1, 99), (50, 50), (1, 101)]:
        with pytest.raises(ValueError, match=r"^percentiles must rise within 0 to 100, got lower="):
            RadiographRanged("x", *limits)
    with pytest.raises(ValueError, match=r"^invert must be True, False or 'meta', got 'yes'$"):
        RadiographRanged("x", invert="yes")
    for image in (torch.full((1, 5, 5), 3.0), torch.tensor([[[1.0, torch.nan]]])):
        with pytest.raises(UnsuitableImage, match=r"^'x' must show something, but its values are blank or not finite$"):
            ranged(image)
