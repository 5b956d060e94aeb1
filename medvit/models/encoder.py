"""What every encoder promises, so that any of them can feed any head."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Encoder(Protocol):
    """Image ``(B, C, *spatial)`` to feature maps, finest first.

    Attributes:
        spatial_dims: rank of the images it takes.
        channels: channels of each feature map.
        strides: per feature map and axis, image voxels per feature.
    """

    spatial_dims: int
    channels: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Feature maps ``(B, channels[i], *spatial / strides[i])``."""
        ...
