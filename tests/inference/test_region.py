"""What a grid of patches covers, against images whose voxels say where they come from."""

import numpy as np
import pytest
import torch
from data_synthetic import make_affine, write_nifti
from monai.data import MetaTensor
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    Orientationd,
    Resized,
    ResizeWithPadOrCropd,
    Spacingd,
)
from PIL import Image

from medvit.data import VolumeReader
from medvit.data.radiograph import RadiographReader
from medvit.errors import MedvitError
from medvit.inference.region import Region
from medvit.transforms import ResizeShorterSided, RowsFirstd

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")


def centres(region, grid_axis):
    """Where the centres of the patches along one axis of the grid lie in the source, in voxels from its outer face."""
    start, stop, count = region.start[grid_axis], region.stop[grid_axis], region.grid[grid_axis]
    return start + (stop - start) * (np.arange(count) + 0.5) / count


@pytest.mark.parametrize(
    ("size", "start", "stop"),
    [
        ((60, 40), (0, 10), (40, 50)),  # (width, height) to (row, column)
        ((40, 60), (10, 0), (50, 40)),
        ((50, 50), (0, 0), (50, 50)),
    ],
)
def test_a_radiograph_is_covered_in_the_middle(size, start, stop, tmp_path):
    ramp = np.broadcast_to(np.linspace(0, 255, size[0]), size[::-1])
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "x.png")
    steps = [ResizeShorterSided("image", 32), CenterSpatialCropd("image", 32), RowsFirstd("image")]
    steps += [Resized("image", (16, 16), mode="bilinear", align_corners=False)]
    load = [LoadImaged("image", reader=RadiographReader()), EnsureChannelFirstd("image")]
    image = Compose([*load, *steps])({"image": str(tmp_path / "x.png")})["image"]
    region = Region.of(image, (4, 4))
    assert (region.grid, region.axes) == ((4, 4), (1, 0))
    assert region.start == pytest.approx(start, abs=1e-3) and region.stop == pytest.approx(stop, abs=1e-3)
    # the brightness of the ramp tells the same; columns are the grid's second axis
    seen = image.as_tensor()[0].reshape(16, 4, 4).mean((0, 2)) * (size[0] - 1) + 0.5
    assert centres(region, 1) == pytest.approx(seen.numpy(), abs=0.6)


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "coronal", "oblique"])
def test_a_volume_is_covered_where_its_voxels_are(orientation, tmp_path):
    shape = (20, 26, 18)
    steps = [
        LoadImaged("image", reader=VolumeReader()),
        EnsureChannelFirstd("image"),
        Orientationd("image", "RAS", labels=None),
        Spacingd("image", (1, 1, 1), mode="bilinear"),
        ResizeWithPadOrCropd("image", (16, 24, 32)),
    ]
    for axis in range(3):
        ramp = np.broadcast_to(np.arange(shape[axis]).reshape([-1 if n == axis else 1 for n in range(3)]), shape)
        path = write_nifti(tmp_path / f"{axis}.nii.gz", ramp.astype(np.int16), make_affine(orientation, (1.5, 1, 0.8)))
        image = Compose(steps)({"image": str(path)})["image"]
        region = Region.of(image, (2, 3, 4))
        along = region.axes.index(axis)
        # voxels of the source along this axis, where they are neither padding nor extrapolated
        values = image.as_tensor()[0].movedim(along, 0).flatten(1).amax(1)
        places = np.interp(np.arange(len(values)) + 0.5, [0, len(values)], [region.start[along], region.stop[along]])
        inside = (places > 1.5) & (places < shape[axis] - 1.5)
        assert inside.sum() > 10
        assert places[inside] == pytest.approx(values.numpy()[inside] + 0.5, abs=0.02)


def test_what_is_no_axis_of_the_source_has_no_box():
    turned = torch.eye(4, dtype=torch.float64)
    turned[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    with pytest.raises(MedvitError, match="keeps the axes of the image, but this one turns them"):
        Region.of(MetaTensor(torch.zeros(1, 4, 4), affine=turned), (2, 2))


def test_patches_that_leave_a_rest_are_refused():
    with pytest.raises(MedvitError, match=r"\(2, 3\) patches leave a rest of an image of \(4, 4\); choose"):
        Region.of(MetaTensor(torch.zeros(1, 4, 4)), (2, 3))
