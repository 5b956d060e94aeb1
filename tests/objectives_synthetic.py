"""The objectives with the smallest networks, on real images, ready to train.

Images come with packages: a fundus photograph (scikit-image) cut into tiles, and the MNI152 T1 template (nilearn) cut
into blocks.

With ``settled`` every random choice (crops, masks, turns, what is dropped) becomes a function of the image: of which
process draws what, nothing is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medvit.models.mae import MAE
from medvit.models.rad_dino import RadDino
from medvit.models.swin import SwinEncoder
from medvit.models.uni4eye import Uni4EyeMAE
from medvit.pretrain.dino import DINOObjective
from medvit.pretrain.images import Augment, CachedImages, RandomViews, crop, to_unit
from medvit.pretrain.mae import MAEObjective
from medvit.pretrain.masking import Corrupted
from medvit.pretrain.swin import SwinObjective
from medvit.pretrain.trainer import Trainer
from medvit.pretrain.uni4eye import Uni4EyeObjective

TASKS = ("mae", "uni4eye", "dino", "dino_centre", "swin")
BLOCKS = {"embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}


def real_images() -> dict[str, Tensor]:
    """``image2d`` uint8 ``(16, 1, 64, 64)`` and ``image3d`` uint8 ``(12, 1, 16, 16, 16)``."""
    from nilearn.datasets import load_mni152_template
    from skimage.data import retina

    eye = torch.from_numpy(retina()[192:1216, 192:1216, 1]).float()
    eye = eye.reshape(256, 4, 256, 4).mean((1, 3)).reshape(4, 64, 4, 64).transpose(1, 2).reshape(16, 1, 64, 64)
    head = torch.from_numpy(load_mni152_template(resolution=4).get_fdata()[8:40, 5:53, 6:38]) * 255
    head = head.reshape(2, 16, 3, 16, 2, 16).permute(0, 2, 4, 1, 3, 5).reshape(12, 1, 16, 16, 16)
    return {"image2d": eye.round().to(torch.uint8), "image3d": head.round().to(torch.uint8)}


def make(output_dir, *, task: str, images: str, settled: bool = False, **settings) -> Trainer:
    """A run of six steps; ``images`` is a file of :func:`real_images`."""
    torch.manual_seed(3)
    kept = torch.load(images, weights_only=True)
    ranks = {"uni4eye": {"image2d": "image2d", "image3d": "image3d"}}.get(task, {"image": "image2d"})
    arguments = {
        "batch_size": 8 * len(ranks),
        "accumulate": len(ranks),
        "steps": 6,
        "learning_rate": 2e-3,
        # AdamW by its own would blow rounding errors up to whole steps where a gradient is 0; Swin's are larger
        "eps": 1e-3 if task == "swin" else 1e-4,
        "save_every": 2,
        "log_every": 2,
        "device": "cpu",
        "seed": 11,
    } | settings
    data = [_source(kept[name], key) for key, name in ranks.items()]
    return Trainer(
        objective(task, settled), data, augment=Augment(views(task, settled)), output_dir=output_dir, **arguments
    )


def objective(task: str, settled: bool):
    masking = Regular() if settled else None
    if task == "mae":
        return MAEObjective(MAE(in_channels=1, img_size=32, patch_size=8, **BLOCKS, **DECODER), masking=masking)
    if task == "uni4eye":
        sizes = {"img_size": {2: 32, 3: (16, 16, 16)}, "patch_size": {2: 8, 3: 8}}
        return Uni4EyeObjective(Uni4EyeMAE(in_channels={2: 1, 3: 1}, **sizes, **BLOCKS, **DECODER), masking=masking)
    if task == "swin":
        body = {"feature_size": 6, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 3}
        kind, options = (Still, {"corruptions": (darkened,)}) if settled else (SwinObjective, {})
        return kind(SwinEncoder(2, 1, **body), projection=8, **options)
    encoder = RadDino(in_channels=1, img_size=32, patch_size=8, drop_path_rate=0.0 if settled else 0.2, **BLOCKS)
    with torch.no_grad():  # away from the start, where all cls tokens are alike and gradients of KoLeo beyond measure
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    still = {"masking": masking, "mask_probability": 1.0, "mask_ratio": (0.4, 0.4)} if settled else {}
    centring = "softmax" if task == "dino_centre" else "sinkhorn"
    head = {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}
    return DINOObjective(encoder, centring=centring, momentum=(0.8, 1.0), **head, **still)


def views(task: str, settled: bool):
    """Crops of the images by the names that the objective asks for."""
    if task == "uni4eye":
        wanted = {"image2d": (32, "image2d"), "image3d": (16, "image3d")}
    elif task.startswith("dino"):
        wanted = {**{f"image_global_{i}": (32, "image") for i in range(2)}, "image_local_0": (16, "image")}
    else:
        wanted = {"image": (64 if task == "swin" else 32, "image")}
    if settled:
        return {name: Part(size, number / 10, key) for number, (name, (size, key)) in enumerate(wanted.items())}
    return {name: RandomViews(size, key=key) for name, (size, key) in wanted.items()}


class Regular:
    """Hides patches in a fixed order."""

    def __call__(self, grid, hidden, progress=0.0, weights=None):
        count = int(torch.tensor(grid).prod())
        order = (7 * torch.arange(count) + 3) % count  # 7 divides none of the grids
        return order < torch.tensor(hidden)[:, None]


class Part:
    """The same crop of every image."""

    def __init__(self, size: int, start: float, key: str):
        self.size, self.start, self.key = size, start, key

    def __call__(self, images: Tensor) -> Tensor:
        rank = images.dim() - 2
        low = torch.full((len(images), rank), self.start)
        return (crop(to_unit(images), low, low + 0.7, (self.size,) * rank) - 0.5) / 0.25


class Still(SwinObjective):
    """Turns an image by where it is brightest, and the second view a quarter further."""

    calls = 0

    def turned(self, x):
        quadrants = torch.nn.functional.adaptive_avg_pool2d(x.mean(1), 2).flatten(1)
        turns = (quadrants.argmax(1) + self.calls) % 4
        self.calls = 1 - self.calls
        return torch.stack([image.rot90(int(turn), (1, 2)) for image, turn in zip(x, turns, strict=True)]), turns


def darkened(x: Tensor) -> Corrupted:
    """What is brighter than the mean of its image is taken away."""
    mask = (x > x.mean((1, 2, 3), keepdim=True)).any(1, keepdim=True)
    return Corrupted(x.masked_fill(mask, 0), mask)


def _source(images: Tensor, key: str) -> CachedImages:
    cases = [{"image": number} for number in range(len(images))]
    return CachedImages(cases, lambda case: {"image": images[case["image"]].float() / 255}, key=key)
