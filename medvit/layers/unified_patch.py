"""Images of several ranks to tokens of one width, so that one set of transformer blocks takes them all.

Cai et al., "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer for
Ophthalmic Image Classification" (MICCAI 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from medvit.dims import conv
from medvit.layers.position import resize_position, sincos_position

Axes = tuple[int, ...]


class UnifiedPatchEmbed(nn.ModuleDict):
    """Non-overlapping patches to tokens, by a convolution for each rank of image; the input's rank chooses.

    Args:
        in_channels: image channels, by rank.
        dim: channels of the tokens, the same for all ranks.
        patch_size: patch edge per axis in voxels, by rank; its keys are the ranks that can be embedded.

    Shapes: ``(B, in_channels[rank], *spatial)`` to ``(B, *floor(spatial / patch_size[rank]), dim)``. What exceeds whole
    patches is left out at the end of each axis, as in the authors' convolution.

    Raises:
        ValueError: ``forward`` or :meth:`grid` of an image of another rank or channel count, or smaller than a patch.
    """

    def __init__(self, in_channels: Mapping[int, int], dim: int, patch_size: Mapping[int, Axes]):
        super().__init__(
            {
                str(rank): conv(rank, in_channels[rank], dim, kernel_size=patch, stride=patch)
                for rank, patch in patch_size.items()
            }
        )
        self.in_channels, self.patch_size = dict(in_channels), dict(patch_size)

    def grid(self, x: Tensor) -> Axes:
        """Tokens per axis of an image."""
        rank = x.dim() - 2
        if rank not in self.patch_size or x.shape[1] != self.in_channels[rank]:
            takes = " or ".join(f"(B, {self.in_channels[rank]}, {rank} spatial axes)" for rank in self.patch_size)
            raise ValueError(f"this network takes images {takes}, got shape {tuple(x.shape)}")
        patch = self.patch_size[rank]
        if any(n < p for n, p in zip(x.shape[2:], patch, strict=True)):
            raise ValueError(f"no side may be smaller than the patch {patch}, got {tuple(x.shape[2:])}; pad the image")
        return tuple(n // p for n, p in zip(x.shape[2:], patch, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """Embed; see the class."""
        self.grid(x)
        tokens: Tensor = self[str(x.dim() - 2)](x)
        return tokens.movedim(1, -1)


class UnifiedPosition(nn.Module):
    """A frozen position table for each rank, resized to the grid that comes; the grid's rank chooses.

    Args:
        dim: channels.
        grids: tokens per axis that the tables are made for, by rank.
        zero: ranks whose table is zero instead of sine-cosine: the authors never filled that of 3D, which leaves
            volumes without any position.

    Shapes: a grid to ``(1, 1 + prod(grid), dim)``; the first row belongs to the cls token and starts as zeros.
    """

    def __init__(self, dim: int, grids: Mapping[int, Axes], zero: tuple[int, ...] = ()):
        super().__init__()
        self.grids = dict(grids)
        for rank, grid in self.grids.items():
            table = torch.zeros(1, 1 + prod(grid), dim)
            if rank not in zero:
                table.copy_(sincos_position(dim, grid))
            self.register_parameter(str(rank), nn.Parameter(table, requires_grad=False))

    def forward(self, grid: Axes) -> Tensor:
        """The table for a grid; see the class."""
        return resize_position(self.get_parameter(str(len(grid))), self.grids[len(grid)], grid)
