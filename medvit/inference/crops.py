"""Averaging over crops of an image at inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor
from torch.nn import functional as F

from medvit.dims import ntuple


class MeanOverCrops(Inferer):  # type: ignore[misc]  # MONAI ships no types
    """Runs another inferer on crops about the middle of an image, and averages what it says of the image as a whole.

    Each crop is resampled to the size that the network takes: linear interpolation, corners not aligned, as
    :class:`medvit.pretrain.images.WholeView`. For networks trained on random crops; several crops as in Krizhevsky et
    al. (NeurIPS 2012), several sizes as in Simonyan and Zisserman (ICLR 2015). Every crop costs as much as the image.

    Args:
        inferer: the inferer to run, e.g. ``monai.inferers.SimpleInferer()``.
        size: of the crops, one number or one per axis.
        fractions: of each side of the image, one per crop, in (0, 1]; 1 is the whole image.
        mirror_axes: spatial axes, 0 being the first after the channels, along which every crop is also seen mirrored,
            for networks trained with flips along them; each doubles the cost.

    Raises:
        ValueError: fractions not in (0, 1] or none, axes below 0 or named twice; in a call, an axis that the image does
            not have, or a network that gives maps, which are not of the same places.
    """

    def __init__(
        self,
        inferer: Inferer,
        size: int | Sequence[int],
        fractions: Sequence[float] = (1.0, 0.95, 0.9),
        mirror_axes: Sequence[int] = (),
    ):
        super().__init__()
        self.inferer, self.size, self.fractions, self.mirror_axes = inferer, size, tuple(fractions), tuple(mirror_axes)
        if not self.fractions or not all(0 < fraction <= 1 for fraction in self.fractions):
            raise ValueError(f"fractions must lie in (0, 1], got {list(fractions)}; 1 is the whole image")
        if len(set(self.mirror_axes)) < len(self.mirror_axes) or any(axis < 0 for axis in self.mirror_axes):
            raise ValueError(f"mirror_axes must be different spatial axes, counted from 0, got {list(mirror_axes)}")

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean ``(B, K)`` over the crops of ``inputs`` ``(B, C, *spatial)``, 2D or 3D."""
        rank = inputs.dim() - 2
        if any(axis >= rank for axis in self.mirror_axes):
            raise ValueError(f"the image must have every axis to mirror, {self.mirror_axes}, got {tuple(inputs.shape)}")
        size = ntuple(self.size, rank, "size")
        found = []
        for fraction in self.fractions:
            views = [_middle(inputs, fraction, size)]
            for axis in self.mirror_axes:
                views += [view.flip(2 + axis) for view in views]
            found += [self.inferer(view, network, *args, **kwargs) for view in views]
        if found[0].dim() != 2:
            raise ValueError(
                f"what is averaged over crops must be a vector per image, (B, K), got shape {tuple(found[0].shape)}; "
                "run maps on the whole image"
            )
        return torch.stack(found).mean(dim=0)


def _middle(images: Tensor, fraction: float, size: Sequence[int]) -> Tensor:
    rank = len(size)
    theta = torch.cat([fraction * torch.eye(rank), torch.zeros(rank, 1)], dim=1).to(images)
    grid = F.affine_grid(theta.expand(len(images), -1, -1), [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
