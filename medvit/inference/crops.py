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
    :class:`medvit.pretrain.images.WholeView`, in float32 under autocast, too. For networks trained on random crops;
    several crops as in Krizhevsky et al. (NeurIPS 2012), several sizes as in Simonyan and Zisserman (ICLR 2015). Every
    crop costs as much as the image.

    Args:
        inferer: the inferer to run, e.g. ``monai.inferers.SimpleInferer()``.
        size: of the crops, one number or one per axis.
        fractions: of each side of the image, one per crop, in (0, 1]; 1 is the whole image.
        mirror_axes: spatial axes, 0 being the first after the channels, along which every crop is also seen mirrored,
            for networks trained with flips along them; each doubles the cost.

    Raises:
        ValueError: fractions not in (0, 1] or none, axes below 0 or named twice; in a call, an image of another rank or
            of whole numbers, an axis that it does not have, or several views and a network that gives maps, which are
            not of the same places.
    """

    def __init__(
        self,
        inferer: Inferer,
        size: int | Sequence[int],
        fractions: Sequence[float] = (1.0, 0.95, 0.9),
        mirror_axes: Sequence[int] = (),
    ):
        super().__init__()
        if not _listed(fractions) or not fractions or not all(0 < fraction <= 1 for fraction in fractions):
            raise ValueError(
                f"fractions must be a list of numbers in (0, 1], got {fractions}; [1.0] is the whole image"
            )
        if not _listed(mirror_axes) or len(set(mirror_axes)) < len(mirror_axes) or any(a < 0 for a in mirror_axes):
            raise ValueError(
                f"mirror_axes must be a list of different spatial axes, counted from 0, got {mirror_axes}; [] is none"
            )
        self.inferer, self.size, self.fractions, self.mirror_axes = inferer, size, tuple(fractions), tuple(mirror_axes)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean ``(B, K)`` over the crops of ``inputs`` ``(B, C, *spatial)``, 2D or 3D; float32 or float64.

        Of a single view what the inferer gives, as it is.
        """
        rank = inputs.dim() - 2
        if rank not in (2, 3) or not inputs.is_floating_point():
            raise ValueError(
                f"images must be (B, C, *spatial) in 2D or 3D, of floating numbers, got {tuple(inputs.shape)} of "
                f"{inputs.dtype}"
            )
        if any(axis >= rank for axis in self.mirror_axes):
            raise ValueError(f"the image must have every axis to mirror, {self.mirror_axes}, got {tuple(inputs.shape)}")
        size = ntuple(self.size, rank, "size")
        found = []
        for fraction in self.fractions:
            views = [_middle(inputs, fraction, size)]
            for axis in self.mirror_axes:
                views += [view.flip(2 + axis) for view in views]
            found += [self.inferer(view, network, *args, **kwargs) for view in views]
        if len(found) == 1:
            said: Tensor = found[0]
            return said
        if not isinstance(found[0], Tensor) or found[0].dim() != 2:
            got = f"shape {tuple(found[0].shape)}" if isinstance(found[0], Tensor) else type(found[0]).__name__
            raise ValueError(
                f"what is averaged over crops must be a vector per image, (B, K), got {got}; run maps on the whole "
                "image, with fractions [1.0] and mirror_axes []"
            )
        return torch.stack([_precise(vectors) for vectors in found]).mean(dim=0)


def _middle(images: Tensor, fraction: float, size: Sequence[int]) -> Tensor:
    rank, precise = len(size), _precise(images)
    theta = torch.cat([fraction * torch.eye(rank), torch.zeros(rank, 1)], dim=1).to(precise).expand(len(images), -1, -1)
    with torch.autocast(images.device.type, enabled=False):  # in half precision places would be off by pixels
        grid = F.affine_grid(theta, [len(images), images.shape[1], *size], align_corners=False)
        crop = F.grid_sample(precise, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return crop.to(images.dtype)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
