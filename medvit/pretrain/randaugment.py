"""RandAugment of batches of 2D views, by timm's operations."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor

MODES = {1: "L", 3: "RGB"}
_POLICY = re.compile(r"rand-m\d(?=.*-inc1)(-(mstd[\d.]+|inc1|n\d|p[\d.]+))+")


class RandAugment:
    """A few random operations on each image: turns, shears, shifts, grey curves, sharpness and the like.

    The images go through 8 bits. All randomness comes from the generators of Python and numpy, which a run seeds batch
    by batch (:func:`medvit.pretrain.stream.seed_everything`).

    Args:
        policy: in timm's words, with ``inc1``: magnitudes from 0 to 9, 10 would leave an image no bit. The default is
            what Xiao et al. (WACV 2023) fine-tune X-rays with.
        fill: what comes in from outside of the image, in [0, 1].

    Raises:
        ValueError: a policy that timm does not understand, or (in a call) images of another rank or other channels.

    Source: Cubuk et al., "RandAugment" (NeurIPS 2020); ``timm.data.auto_augment``.
    """

    def __init__(self, policy: str = "rand-m6-mstd0.5-inc1", *, fill: float = 0.5):
        if not _POLICY.fullmatch(policy):
            raise ValueError(
                f"policy must be one of timm's with m0 to m9 and inc1, got {policy!r}; use 'rand-m6-mstd0.5-inc1'"
            )
        grey = round(255 * fill)
        self._policies: dict[int, Any] = {
            channels: rand_augment_transform(
                f"{policy}-mmax9", {"img_mean": (grey,) * channels if channels > 1 else grey}
            )
            for channels in MODES
        }

    def __call__(self, views: Tensor) -> Tensor:
        """``(B, C, rows, columns)`` in [0, 1], C 1 or 3, to the same, float32 on the same device."""
        if views.dim() != 4 or views.shape[1] not in MODES:
            raise ValueError(
                f"RandAugment needs images (B, 1 or 3, rows, columns), got shape {tuple(views.shape)}; volumes have "
                "contrast, brightness and flips of RandomViews"
            )
        channels = views.shape[1]
        pixels = (views.clamp(0, 1) * 255).round().to(torch.uint8).movedim(1, -1).cpu().numpy()
        made = [self._policies[channels](_picture(image)) for image in pixels]
        out = torch.from_numpy(np.stack([np.asarray(image) for image in made])).reshape(pixels.shape)
        return out.movedim(-1, 1).to(views.device).float() / 255


def _picture(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels, MODES[pixels.shape[-1]])
