"""What every encoder promises, so that any of them can feed any head."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

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
