"""What masked image modelling needs besides networks: hidden tokens, pixels as tokens, and the loss on the hidden ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), generalised to any rank and channel count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Masking(NamedTuple):
    """Which of N tokens an encoder sees, and in which order.

    Attributes:
        keep: ``(B, K)`` int64, indices of the visible tokens in the order in which the encoder gets them.
        mask: ``(B, N)`` float32, 1 where a token is hidden, raster order.
        restore: ``(B, N)`` int64, for each token in raster order its place among ``[visible, hidden]``.
    """

    keep: Tensor
    mask: Tensor
    restore: Tensor

    def select(self, tokens: Tensor) -> Tensor:
        """The visible ones of ``(B, N, C)``, as ``(B, K, C)``."""
        return tokens.gather(1, self.keep[..., None].expand(-1, -1, tokens.shape[-1]))

    def fill(self, visible: Tensor, mask_token: Tensor) -> Tensor:
        """``(B, K, C)`` back in raster order, with ``mask_token`` ``(1, 1, C)`` where hidden, as ``(B, N, C)``."""
        hidden = self.restore.shape[1] - visible.shape[1]
        both = torch.cat([visible, mask_token.to(visible.dtype).expand(visible.shape[0], hidden, -1)], dim=1)
        return both.gather(1, self.restore[..., None].expand(-1, -1, both.shape[-1]))


def random_masking(noise: Tensor, ratio: float) -> Masking:
    """Hide the tokens of largest noise.

    Args:
        noise: ``(B, N)``, e.g. uniform in [0, 1). The ``int(N * (1 - ratio))`` smallest stay visible, in ascending
            order of noise (even a ratio of 0 shuffles); the product truncates in floating point as the authors'
            does: of 100 tokens a ratio of 0.9 keeps 9.
        ratio: fraction hidden, ``0 <= ratio < 1``.

    Raises:
        ValueError: noise of another rank, or a ratio that leaves no token visible.
    """
    if noise.dim() != 2 or noise.shape[1] < 1:
        raise ValueError(f"noise must be (B, tokens), got shape {tuple(noise.shape)}")
    count = noise.shape[1]
    kept = int(count * (1 - ratio))
    if not 0 <= ratio < 1 or kept < 1:
        raise ValueError(
            f"mask_ratio must lie in [0, 1) and leave a token visible, got {ratio} of {count} tokens; "
            f"use {max(0.0, min(0.75, 1 - 1.5 / count)):.3g}"
        )
    order = noise.argsort(dim=1, stable=True)
    restore = order.argsort(dim=1)
    return Masking(order[:, :kept], (restore >= kept).float(), restore)


def patchify(images: Tensor, patch_size: Sequence[int]) -> Tensor:
    """Images as one vector of pixels per patch.

    Args:
        images: ``(B, C, *spatial)``, every side a multiple of the patch.
        patch_size: per axis.

    Returns:
        ``(B, N, prod(patch_size) * C)``: patches in raster order, pixels in raster order, channel fastest; in 2D the
        authors' ``(p_h, p_w, c)``.
    """
    rank = len(patch_size)
    halves = [n for side, patch in zip(images.shape[2:], patch_size, strict=True) for n in (side // patch, patch)]
    cut = images.reshape(*images.shape[:2], *halves)  # (B, C, n_0, p_0, n_1, p_1, ...)
    grid, within = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    return cut.permute(0, *grid, *within, 1).flatten(1 + rank).flatten(1, rank)


def unpatchify(patches: Tensor, patch_size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Inverse of :func:`patchify`: ``(B, prod(grid), prod(patch_size) * C)`` to ``(B, C, *(grid * patch_size))``."""
    rank = len(grid)
    cut = patches.reshape(patches.shape[0], *grid, *patch_size, -1)
    axes = [1 + axis + rank * within for axis in range(rank) for within in (0, 1)]
    sides = [n * patch for n, patch in zip(grid, patch_size, strict=True)]
    return cut.permute(0, 1 + 2 * rank, *axes).reshape(patches.shape[0], -1, *sides)


def hidden_patch_loss(pred: Tensor, target: Tensor, mask: Tensor, *, norm_pix: bool = False) -> Tensor:
    """Mean squared error per patch, averaged over the hidden ones, in float32.

    Args:
        pred: ``(B, N, P)``, predicted pixels.
        target: ``(B, N, P)``, see :func:`patchify`.
        mask: ``(B, N)``, 1 where hidden.
        norm_pix: targets are first normalised per patch, by its mean and ``sqrt(unbiased variance + 1e-6)``.

    Returns:
        A scalar; not a number where nothing is hidden.
    """
    target = target.float()
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    return ((pred.float() - target).square().mean(-1) * mask).sum() / mask.sum()
