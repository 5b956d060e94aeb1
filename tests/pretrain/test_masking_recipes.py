"""Strategies of hiding are exchanged from the command line of a recipe, as MONAI takes its options."""

import json
from pathlib import Path

import pytest
import torch
from monai.bundle import ConfigParser

from medvit.pretrain.masking import (
    BlockMask,
    FrequencyMask,
    GroupMask,
    GroupReplacement,
    RandomMask,
    SemanticMask,
    Weighted,
    detail,
)

ROOT = Path(__file__).parents[2]
STRATEGIES = [(RandomMask, {}), (BlockMask, {"min_size": 2}), (GroupMask, {"edges": [0.1, 0.4]}), (SemanticMask, {})]
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2, "decoder_embed_dim": 24, "decoder_depth": 1}
MAE = {"image": torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))}
BOTH = {"image2d": MAE["image"], "image3d": torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))}


def objective(recipe, strategy, options, **changes):
    parser = ConfigParser(json.loads((ROOT / f"configs/pretrain/{recipe}.json").read_text(encoding="utf-8")))
    for name, value in {**SMALL, "decoder_num_heads": 2}.items():
        parser[f"network_def#{name}"] = value
    target = {"_target_": f"{strategy.__module__}.{strategy.__name__}", **options}
    parser.update({"objective#masking": target, "image_size": 64, **changes})  # as options of monai.bundle run
    return parser.get_parsed_content("objective")


@pytest.mark.parametrize(("strategy", "options"), STRATEGIES, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize(
    ("recipe", "batch", "changes"),
    [("mae_cxr", MAE, {}), ("uni4eye_mixed", BOTH, {"volume_size": [16, 16, 16]})],
    ids=["mae", "uni4eye"],
)
def test_a_recipe_hides_by_the_strategy_that_it_is_given(recipe, batch, changes, strategy, options):
    task = objective(recipe, strategy, options, **changes)
    assert type(task.masking) is strategy
    drawn, draw = [], task.masking
    task.masking = lambda *args: drawn.append(draw(*args)) or drawn[-1]
    masks = []
    task.model.register_forward_hook(lambda module, given, out: masks.append(out.mask))
    loss = task(Weighted()(batch), 1.0).loss
    assert torch.isfinite(loss) and len(masks) == len(batch)
    for hidden, mask in zip(drawn, masks, strict=True):
        assert torch.equal(hidden, mask.bool())


def test_corruptions_are_exchanged_alike():
    parser = ConfigParser(json.loads((ROOT / "configs/pretrain/swin_hippocampus.json").read_text(encoding="utf-8")))
    home = "medvit.pretrain.masking"
    wanted = [
        {"_target_": f"{home}.FrequencyMask", "radius": 4.0},
        {"_target_": f"{home}.GroupReplacement", "ratio": [0.1, 0.2], "masking": {"_target_": f"{home}.BlockMask"}},
    ]
    parser.update({"objective#corruptions": wanted, "network_def#feature_size": 12})
    task, x = parser.get_parsed_content("objective"), torch.rand(2, 1, 64, 64, 64)
    first, second = task.corruptions
    assert first == FrequencyMask(4.0) and second == GroupReplacement([0.1, 0.2], masking=BlockMask())
    torch.manual_seed(0)
    expected = second(first(x).image).image
    torch.manual_seed(0)
    assert torch.equal(task.corrupted(x), expected)


def test_patches_with_detail_are_hidden_first_in_the_end():
    image = torch.zeros(1, 1, 32, 32)
    image[..., :8, :] = torch.rand(1, 1, 8, 32, generator=torch.Generator().manual_seed(0))
    batch = Weighted()({"image": image, "other": image})
    assert batch.keys() == {"image", "other", "image_weights"} and torch.equal(batch["image_weights"], detail(image))
    task = objective("mae_cxr", SemanticMask, {"strength": 50.0}, image_size=32)
    task.model.mask_ratio = 0.25
    masks = []
    task.model.register_forward_hook(lambda module, given, out: masks.append(out.mask))
    task(batch, 1.0)
    assert masks[0].reshape(4, 4)[0].tolist() == [1, 1, 1, 1]


def test_maps_belong_to_the_views_that_an_augmentation_made():
    def halved(batch):
        return {"image2d": batch["image"][..., ::2], "image3d": batch["image"][..., None]}

    made = Weighted(halved, weigh=lambda x: x[:, :1] + 1, keys=("image2d",))(MAE)
    assert made.keys() == {"image2d", "image3d", "image2d_weights"}
    assert torch.equal(made["image2d_weights"], MAE["image"][..., ::2] + 1)
