"""From scores to labels on the source grid, through MONAI's own preprocessing."""

import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    CropForegroundd,
    Flipd,
    Orientationd,
    ResizeWithPadOrCropd,
    Rotate90d,
    Spacingd,
    SpatialPadd,
)

from medvit.errors import MedvitError, SpaceMismatch
from medvit.transforms import ArgmaxLabelsd, RestoreLabelsd

OBLIQUE = np.array([[-0.8, 0.25, 0.3, 40.0], [0.3, 0.9, -0.4, -25.0], [0.15, 0.2, 1.9, -30.0], [0, 0, 0, 1]])


def rotation(degrees, axis):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turned = np.eye(3)
    i, j = [a for a in range(3) if a != axis]
    turned[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    return turned


def rigid(spacing, origin, *turns):
    affine = np.diag([*spacing, 1.0])
    for degrees, axis in turns:
        affine[:3, :3] = rotation(degrees, axis) @ affine[:3, :3]
    affine[:3, 3] = origin
    return affine


GRIDS = {
    "axial": (rigid((1.0, 1.0, 3.0), (-14.0, -16.0, -20.0)), (28, 32, 14)),
    "lps": (np.array([[-1.0, 0, 0, 15], [0, -1.2, 0, 14], [0, 0, 2.0, -16], [0, 0, 0, 1]]), (30, 24, 17)),
    "sagittal": (np.array([[0, 0, 2.0, -15], [1.1, 0, 0, -16], [0, -1.0, 0, 15], [0, 0, 0, 1]]), (29, 31, 16)),
    "coronal": (np.array([[-1.0, 0, 0, 14], [0, 0, 2.5, -17], [0, -1.0, 0, 15], [0, 0, 0, 1]]), (28, 31, 14)),
    "oblique": (rigid((1.0, 1.0, 2.2), (-9.0, -18.0, -17.0), (20, 0), (-15, 1), (10, 2)), (28, 31, 15)),
}  # fmt: skip


def image_on(affine, shape, values=None):
    """What LoadImaged and EnsureChannelFirstd give: (1, i, j, k) with the file's grid in the meta data."""
    meta = {"original_affine": affine.copy(), "spatial_shape": np.array(shape), "filename_or_obj": "case.nii.gz"}
    values = torch.rand(shape) if values is None else torch.as_tensor(values, dtype=torch.float32)
    return MetaTensor(values[None], affine=torch.tensor(affine), meta=meta)


def world(affine, shape):
    return np.moveaxis(np.indices(shape), 0, -1) @ affine[:3, :3].T + affine[:3, 3]


def shapes_at(points):
    """Two structures defined in mm, so that any grid can be asked what it should hold; and the distance to them."""
    ball = np.linalg.norm(points - (1.0, -2.0, 0.5), axis=-1) - 7
    ellipsoid = (np.linalg.norm((points - (-1.0, 9.0, 3.0)) / (6.0, 2.5, 5.0), axis=-1) - 1) * 2.5
    return np.where(ball < 0, 1, np.where(ellipsoid < 0, 2, 0)), np.minimum(np.abs(ball), np.abs(ellipsoid))


EXACT = {
    "reorient": [Orientationd("image", axcodes="RAS", labels=None)],
    "reorient, pad": [Orientationd("image", axcodes="PIR", labels=None), SpatialPadd("image", (48, 40, 41))],
    "flip, turn": [Flipd("image", spatial_axis=1), Rotate90d("image", k=3, spatial_axes=(0, 2))],
}


@pytest.mark.parametrize("steps", EXACT)
@pytest.mark.parametrize("grid", GRIDS)
def test_reorientation_and_padding_are_undone_exactly(grid, steps):
    affine, shape = GRIDS[grid]
    labels = np.random.default_rng(0).integers(0, 9, shape)
    item = Compose(EXACT[steps])({"image": image_on(affine, shape, labels)})
    item["pred"] = item["image"].as_tensor().round().to(torch.uint8)
    result = RestoreLabelsd()(item)["pred"]
    assert result.dtype == torch.uint8
    np.testing.assert_array_equal(result.numpy()[0], labels)
    np.testing.assert_allclose(result.affine, affine, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_a_crop_leaves_background_where_the_network_did_not_look(grid):
    affine, shape = GRIDS[grid]
    values = np.zeros(shape)
    values[4:-5, 3:-4, 2:-3] = np.random.default_rng(1).integers(1, 5, values[4:-5, 3:-4, 2:-3].shape)
    item = Compose([
        Orientationd("image", axcodes="SPL", labels=None),
        CropForegroundd("image", source_key="image", allow_smaller=True),
        ResizeWithPadOrCropd("image", (20, 40, 24)),
    ])({"image": image_on(affine, shape, values)})  # fmt: skip
    item["pred"] = item["image"].as_tensor() + 1  # 1 wherever the network saw background
    restored = RestoreLabelsd()(item)["pred"].numpy()[0]
    seen = restored > 0
    np.testing.assert_array_equal(restored[seen], values[seen] + 1)
    assert 0 < (~seen).sum() < seen.size


@pytest.mark.parametrize("pixdim", [(1.0, 1.0, 1.0), (1.5, 1.5, 1.5), (0.8, 1.3, 2.0)])
@pytest.mark.parametrize("grid", GRIDS)
def test_labels_land_where_they_are_in_the_world(grid, pixdim):
    affine, shape = GRIDS[grid]
    item = Compose([
        Orientationd("image", axcodes="RAS", labels=None),
        Spacingd("image", pixdim=pixdim),
        CenterSpatialCropd("image", (26, -1, -1)),
        SpatialPadd("image", (32, 36, 40)),
    ])({"image": image_on(affine, shape)})  # fmt: skip
    network_affine = item["image"].affine.numpy()
    item["pred"] = torch.from_numpy(shapes_at(world(network_affine, item["image"].shape[1:]))[0])[None]
    result = RestoreLabelsd()(item)["pred"]
    expected, distance = shapes_at(world(affine, shape))
    reach = np.linalg.norm(pixdim) / 2 + 1e-6  # the nearest network voxel is at most half a diagonal away
    within = distance > reach
    assert result.shape == (1, *shape)
    assert (expected[within] > 0).sum() > 30
    np.testing.assert_array_equal(result.numpy()[0][within], expected[within])
    assert (result.numpy()[0] == expected).mean() > 0.97


def test_a_sheared_source_grid():
    shape = (36, 40, 24)
    affine = OBLIQUE.copy()
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    image = image_on(affine, shape)
    network = rigid((1.0, 1.0, 1.0), (-20.0, -20.0, -20.0))
    meta = {k: image.meta[k] for k in ("original_affine", "spatial_shape")}
    seen = MetaTensor(torch.zeros(1, 40, 40, 40), affine=torch.tensor(network), meta=meta)
    pred = torch.from_numpy(shapes_at(world(network, (40, 40, 40)))[0])[None]
    result = RestoreLabelsd()({"image": seen, "pred": pred})["pred"].numpy()[0]
    expected, distance = shapes_at(world(affine, shape))
    np.testing.assert_array_equal(result[distance > 0.87], expected[distance > 0.87])


def test_after_collating_and_decollating_as_engines_do():
    items = []
    for seed, grid in enumerate(["axial", "oblique"]):
        affine, shape = GRIDS[grid]
        values = np.random.default_rng(seed).integers(0, 4, shape)
        items.append({"image": image_on(affine, shape, values), "values": torch.tensor(0)})
    ready = [SpatialPadd("image", (32, 32, 16))(item) for item in items]
    batch = list_data_collate(ready)
    scores = torch.nn.functional.one_hot(batch["image"].as_tensor()[:, 0].long(), 4).movedim(-1, 1).float()
    batch["pred"] = MetaTensor(scores).copy_meta_from(batch["image"])
    post = Compose([ArgmaxLabelsd("pred"), RestoreLabelsd("pred", source_key="image")])
    for item, out in zip(items, map(post, decollate_batch(batch)), strict=True):
        np.testing.assert_array_equal(out["pred"].numpy(), item["image"].numpy())
        np.testing.assert_allclose(out["pred"].affine, item["image"].affine)
        assert out["pred"].meta["filename_or_obj"] == "case.nii.gz"
        assert set(out) == {"image", "values", "pred"}


def one_case(pred, **meta):
    image = image_on(np.eye(4), (3, 4, 5))
    image.meta.update(meta)
    return {"image": image, "pred": pred}


@pytest.mark.parametrize(
    ("pred", "dtype"),
    [
        (torch.full((1, 3, 4, 5), 7.0), torch.uint8),
        (torch.full((1, 3, 4, 5), 255), torch.uint8),
        (torch.full((1, 3, 4, 5), 256), torch.uint16),
        (torch.full((1, 3, 4, 5), 7, dtype=torch.uint16), torch.uint16),
        (torch.ones((1, 3, 4, 5), dtype=torch.bool), torch.uint8),
        (np.full((1, 3, 4, 5), 7, dtype=np.int16), torch.uint8),
        (MetaTensor(torch.full((1, 3, 4, 5), 7)), torch.uint8),
    ],
)
def test_labels_in_any_dtype_come_out_small(pred, dtype):
    result = RestoreLabelsd()(one_case(pred))["pred"]
    assert result.dtype == dtype
    np.testing.assert_array_equal(result.numpy(), np.asarray(pred))


def test_input_item_is_not_changed_and_names_resolve_for_bundles():
    from monai.bundle import ConfigParser

    item = one_case(torch.ones(1, 3, 4, 5))
    before = item["pred"]
    config = {"post": {"_target_": "medvit.transforms.RestoreLabelsd", "keys": "pred", "source_key": "image"}}
    post = ConfigParser(config).get_parsed_content("post")
    assert isinstance(post, RestoreLabelsd)
    assert post(item)["pred"] is not before
    assert item["pred"] is before


def test_missing_keys():
    with pytest.raises(KeyError, match="pred"):
        RestoreLabelsd()({"image": None})
    assert RestoreLabelsd(allow_missing_keys=True)({"image": None}) == {"image": None}
    assert ArgmaxLabelsd(allow_missing_keys=True)({}) == {}


@pytest.mark.parametrize(
    ("item", "error", "message"),
    [
        (
            one_case(torch.zeros(1, 3, 4, 6)), SpaceMismatch,
            "'pred' must lie on the grid of 'image', but has shape (3, 4, 6) and the image (3, 4, 5); restore before",
        ),
        (one_case(torch.zeros(2, 3, 4, 5)), ValueError, "must be one label map (1, i, j, k), got shape (2, 3, 4, 5)"),
        (one_case(torch.zeros(3, 4, 5)), ValueError, "must be one label map (1, i, j, k), got shape (3, 4, 5)"),
        (
            one_case(torch.full((1, 3, 4, 5), 0.25)), ValueError,
            "'pred' must hold whole labels from 0 to 65535, got float32 values from 0.25 to 0.25; use ArgmaxLabelsd",
        ),
        (one_case(torch.full((1, 3, 4, 5), -1)), ValueError, "got int64 values from -1 to -1"),
        (one_case(torch.full((1, 3, 4, 5), 65536)), ValueError, "got int64 values from 65536 to 65536"),
        (one_case(torch.full((1, 3, 4, 5), torch.nan)), ValueError, "got float32 values from nan to nan"),
        (
            {"image": torch.zeros(1, 3, 4, 5), "pred": torch.zeros(1, 3, 4, 5)}, TypeError,
            "'image' must be a MetaTensor that knows its grid, got Tensor; load it with LoadImaged",
        ),
        (
            {"image": MetaTensor(torch.zeros(1, 3, 4, 5)), "pred": torch.zeros(1, 3, 4, 5)}, ValueError,
            "the meta data of 'image' must hold the grid of its file, but lack original_affine and spatial_shape; load",
        ),
        (
            one_case(torch.zeros(1, 3, 4, 5), spatial_shape=(3, 4)), ValueError,
            "'image' must be a 3D image (1, i, j, k) of a 3D file, got sizes (3, 4, 5) and (3, 4)",
        ),
    ],
)  # fmt: skip
def test_restore_guards(item, error, message):
    with pytest.raises(error, match=re.escape(message)):
        RestoreLabelsd()(item)


# --- argmax


@pytest.mark.parametrize(("classes", "dtype"), [(2, torch.uint8), (256, torch.uint8), (257, torch.uint16)])
@pytest.mark.parametrize("grid", [(6, 7, 5), (9, 4)])
def test_argmax(classes, dtype, grid):
    scores = torch.randn(classes, *grid, generator=torch.Generator().manual_seed(0))
    labels = ArgmaxLabelsd("pred")({"pred": scores})["pred"]
    assert labels.dtype == dtype
    assert labels.shape == (1, *grid)
    assert torch.equal(labels[0].long(), scores.argmax(0))


def test_argmax_keeps_meta_data():
    affine = torch.tensor(OBLIQUE)
    labels = ArgmaxLabelsd()({"pred": MetaTensor(torch.randn(3, 2, 2, 2), affine=affine, meta={"name": "a"})})["pred"]
    assert isinstance(labels, MetaTensor)
    torch.testing.assert_close(labels.affine, affine)
    assert labels.meta["name"] == "a"


def test_argmax_guards():
    message = (
        "'pred' must be scores (classes, *grid) of 2 to 65536 classes, got shape (1, 4, 4); a network with a single"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        ArgmaxLabelsd()({"pred": torch.zeros(1, 4, 4)})
    scores = torch.zeros(3, 4, 4, 4)
    scores[1, 2, 3, 0] = torch.nan
    with pytest.raises(MedvitError, match="'pred' must hold finite scores, but some are NaN, which have no best class"):
        ArgmaxLabelsd()({"pred": scores})


@pytest.mark.parametrize("turn", [((1, 0), (0, 1)), ((0, -1), (1, 0)), ((0, 1), (1, 0)), ((-1, 0), (0, -1))])
def test_labels_of_a_photograph_return_to_its_stored_pixels(turn):
    affine = np.eye(4)
    affine[:2, :2] = turn
    labels = np.random.default_rng(0).integers(0, 3, (30, 20, 1)).astype(np.uint8)
    image = image_on(affine, labels.shape, labels)
    image.meta["medvit_unit"] = "px"
    seen = Orientationd("image", axcodes="RAS", labels=None)({"image": image})
    item = RestoreLabelsd()({**seen, "pred": seen["image"].clone()})
    np.testing.assert_array_equal(item["pred"][0], labels)
    np.testing.assert_array_equal(item["pred"].affine, affine)
