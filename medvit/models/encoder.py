"""What every encoder promises, so that any of them can feed any head."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Encoder(Protocol):
    """Image ``(B, in_channels, *spatial)`` to feature maps, and to one vector per image.

    Attributes:
        spatial_dims: rank of the images it takes.
        in_channels: channels of the images it takes.
        channels: channels of each feature map, finest map first.
        strides: per feature map and axis, image voxels per feature.
        embed_dim: length of the vector of :meth:`embed`.
    """

    spatial_dims: int
    in_channels: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    embed_dim: int

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Feature maps ``(B, channels[i], *ceil(spatial / strides[i]))``, finest first."""
        ...

    def embed(self, x: Tensor) -> Tensor:
        """The encoder's own summary of each image, ``(B, embed_dim)``."""
        ...


def check_image(x: Tensor, in_channels: int, spatial_dims: int) -> None:
    """Refuse what is no batch of images of this rank and these channels.

    Raises:
        ValueError: another rank, other channels, or an axis without voxels.
    """
    if x.dim() != 2 + spatial_dims or x.shape[1] != in_channels or not all(n > 0 for n in x.shape[2:]):
        grey = x.dim() == 2 + spatial_dims and x.shape[1] == 1 < in_channels
        raise ValueError(
            f"this network needs (B, {in_channels}, {spatial_dims} spatial axes), got shape {tuple(x.shape)}"
            + (f"; repeat the channel of a grey image {in_channels} times" if grey else "")
            + ("; no axis may be empty" if 0 in x.shape[2:] else "")
        )


def patch_statistics(states: Iterable[Tensor], prefix: int = 1) -> Tensor:
    """Four moments over the patches of token sequences: of the first, of the second, and so on.

    Args:
        states: each ``(B, prefix + N, D)``, such as what every block of a transformer gives.
        prefix: tokens before the patches.

    Returns:
        ``(B, 4 * D * number of states)``: of each state mean, standard deviation, skewness and kurtosis (of a normal
        distribution 3; where the deviation is about 1e-3 or less both go to 0), in the type of the states.

    Source: several blocks as DINOv2 is evaluated (Oquab et al., TMLR 2024); mean and deviation as in statistics pooling
    (Snyder et al., "X-vectors", ICASSP 2018), skewness and kurtosis as in Rouvier et al. (arXiv:2105.04310).
    """
    parts = []
    for tokens in states:
        patches = tokens[:, prefix:].to(torch.promote_types(tokens.dtype, torch.float32))
        mean = patches.mean(dim=1, keepdim=True)
        apart = patches - mean
        deviation = (apart.square().mean(dim=1, keepdim=True) + 1e-6).sqrt()  # the root of 0 has no gradient
        apart = apart / deviation
        moments = [mean.squeeze(1), deviation.squeeze(1), apart.pow(3).mean(dim=1), apart.pow(4).mean(dim=1)]
        parts += [moment.to(tokens.dtype) for moment in moments]
    return torch.cat(parts, dim=1)
