"""Averaging over mirror images at inference."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from monai.inferers import Inferer
from torch import Tensor


class Mirror(Inferer):  # type: ignore[misc]  # MONAI ships no types
    """Runs another inferer on the image and on its mirror images, and averages the logits in the image's own frame.

    For networks trained with random flips along these axes; every axis doubles the time. Averaging mirror images as in
    nnU-Net (Isensee et al., Nat Methods 18:203, 2021).

    Args:
        inferer: the inferer to run, e.g. a :class:`~medvit.inference.sliding.SlidingWindow`.
        axes: spatial axes to mirror, 0 being the first after the channels, each once; none runs ``inferer`` as it is.

    Raises:
        ValueError: an axis below 0 or named twice; in a call, one that the image does not have.
    """

    def __init__(self, inferer: Inferer, axes: Sequence[int] = ()):
        super().__init__()
        self.inferer, self.axes = inferer, tuple(int(a) for a in axes)
        if len(set(self.axes)) < len(self.axes) or any(a < 0 for a in self.axes):
            raise ValueError(f"axes must be different spatial axes, counted from 0, got {list(axes)}")

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Mean logits ``(B, K, *spatial)`` of ``inputs`` ``(B, C, *spatial)``."""
        if any(a >= inputs.dim() - 2 for a in self.axes):
            raise ValueError(f"the image must have every axis to mirror, {self.axes}, got shape {tuple(inputs.shape)}")
        total: Tensor = self.inferer(inputs, network, *args, **kwargs)
        count = 1
        for size in range(1, len(self.axes) + 1):
            for axes in itertools.combinations(self.axes, size):
                dims = [2 + a for a in axes]
                total = total + self.inferer(inputs.flip(dims), network, *args, **kwargs).flip(dims)
                count += 1
        return total / count
