"""A network over an image larger than its input: windows, forward passes, one weighted mean, in any dimension."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor
from torch.nn import functional

PLACEMENTS = ("fixed", "even")
BLENDS = ("constant", "gaussian")
PADDING_MODES = ("constant", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class WindowPlan:
    """Where windows lie on an image and how much each voxel of a window counts: geometry without pixels.

    Starts refer to the padded grid: an axis shorter than its window is padded on both sides, the odd voxel at the end.

    Args:
        image_size: voxels per spatial axis, before padding.
        roi_size: window size per axis.
        starts: per axis, the first voxel of each window, strictly increasing. Windows are the product over axes.
        blend: ``"constant"`` counts every voxel alike, ``"gaussian"`` less towards the borders of a window.
        sigma_scale: standard deviation of the Gaussian per axis, as a fraction of the window.
    """

    image_size: tuple[int, ...]
    roi_size: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    blend: str = "constant"
    sigma_scale: tuple[float, ...] = ()

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Voxels added before and after each axis."""
        missing = [max(roi - size, 0) for size, roi in zip(self.image_size, self.roi_size, strict=True)]
        return tuple((m // 2, m - m // 2) for m in missing)

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Grid that the windows cover."""
        return tuple(max(size, roi) for size, roi in zip(self.image_size, self.roi_size, strict=True))

    def __len__(self) -> int:
        return math.prod(len(axis) for axis in self.starts)

    def __iter__(self) -> Iterator[tuple[slice, ...]]:
        """Windows as slices of the padded grid, last axis fastest: what lies before a window's first start is final."""
        for corner in itertools.product(*self.starts):
            yield tuple(slice(start, start + roi) for start, roi in zip(corner, self.roi_size, strict=True))

    def weight(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Tensor:
        """Weight of each voxel of one window, ``(*roi_size)``, in (0, 1].

        The Gaussian is MONAI's: centred on the window, and never below 1e-3, so that a corner covered by one window
        only is still divided by a number that float32 holds well.
        """
        weight = torch.ones(self.roi_size, dtype=torch.float32)
        if self.blend == "gaussian":
            for axis, (roi, scale) in enumerate(zip(self.roi_size, self.sigma_scale, strict=True)):
                offset = torch.arange(roi, dtype=torch.float32) - (roi - 1) / 2
                bell = torch.exp(offset.square() / (-2 * (scale * roi) ** 2))
                weight = weight * bell.reshape([roi if a == axis else 1 for a in range(len(self.roi_size))])
            weight = weight.clamp_(min=1e-3)
        return weight.to(device=device, dtype=dtype)


def window_starts(size: int, roi: int, overlap: float, placement: str) -> tuple[int, ...]:
    """First voxels of the windows of length ``roi`` that cover one axis of ``size >= roi`` voxels without gaps.

    ``"fixed"`` (MONAI) steps by ``int(roi * (1 - overlap))`` and moves the last window back to the border, where the
    overlap grows. ``"even"`` (nnU-Net) takes as many windows as a step of ``roi * (1 - overlap)`` needs and spreads
    them evenly.
    """
    last = size - roi
    if placement == "fixed":
        step = max(int(roi * (1 - overlap)), 1)
        return (*range(0, last, step), last)
    # 1e-9: 100 * (1 - 0.9) is a hair below 10 in floating point and must not cost a window
    gaps = math.ceil(last / max(roi * (1 - overlap), 1.0) - 1e-9)
    return (*(round(last * n / gaps) for n in range(gaps)), last)


class SlidingWindow(Inferer):  # type: ignore[misc]  # MONAI ships no types
    """Runs a network window by window and returns the weighted mean of its outputs on the whole image.

    Outputs are added up as they come: memory is one image-sized sum, one weight map and one batch of windows. Gradients
    are the caller's affair; wrap the call in ``torch.inference_mode()``.

    Args:
        roi_size: window size per spatial axis; its length fixes the number of spatial dimensions.
        overlap: least fraction of a window that its neighbour covers again, in [0, 1); one number or one per axis.
        batch_size: windows per forward pass. Windows of different images of a batch may share a pass.
        placement: ``"fixed"`` (MONAI: constant step, last window moved back) or ``"even"`` (nnU-Net: spread evenly).
        blend: ``"constant"`` or ``"gaussian"``.
        sigma_scale: standard deviation of the Gaussian as a fraction of the window; one number or one per axis.
        padding_mode: how an axis shorter than its window is filled: ``"constant"``, ``"reflect"``, ``"replicate"``,
            ``"circular"``. The padding is cut off again.
        padding_value: fill value of ``"constant"``.
        spatial_dims: of the network, if it has fewer than ``roi_size``: as many entries of that must be 1, and windows
            reach the network without these axes. A 2D network with ``roi_size=(256, 256, 1)`` goes over a volume slice
            by slice, and over a photograph, which has one slice. None: as many as ``roi_size``.
        device: where outputs are summed; None: where the image is. ``"cpu"`` keeps large images out of GPU memory.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float | Sequence[float] = 0.25,
        batch_size: int = 1,
        placement: str = "fixed",
        blend: str = "constant",
        sigma_scale: float | Sequence[float] = 0.125,
        padding_mode: str = "constant",
        padding_value: float = 0.0,
        device: torch.device | str | None = None,
        spatial_dims: int | None = None,
    ):
        super().__init__()
        if not isinstance(roi_size, Sequence) or not roi_size:
            raise ValueError(f"roi_size needs one size per spatial axis, such as (96, 96, 96), got {roi_size!r}")
        rank = len(roi_size)
        self.roi_size: tuple[int, ...] = _per_axis("roi_size", roi_size, rank, "whole and above 0", _is_count, int)
        self.overlap = _per_axis("overlap", overlap, rank, "in [0, 1)", lambda v: 0 <= v < 1, float)
        self.sigma_scale = _per_axis("sigma_scale", sigma_scale, rank, "above 0", lambda v: v > 0, float)
        if not _is_count(batch_size):
            raise ValueError(f"batch_size must be whole and above 0, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.placement = _one_of("placement", placement, PLACEMENTS)
        self.blend = _one_of("blend", blend, BLENDS)
        self.padding_mode = _one_of("padding_mode", padding_mode, PADDING_MODES)
        self.padding_value = padding_value
        self.device = None if device is None else torch.device(device)
        self.network_roi = _without_flat_axes(self.roi_size, rank if spatial_dims is None else spatial_dims)

    def plan(self, image_size: Sequence[int]) -> WindowPlan:
        """The windows for an image of ``image_size`` (spatial axes only).

        Raises:
            ValueError: another number of axes than ``roi_size`` has.
        """
        size = tuple(int(n) for n in image_size)
        if len(size) != len(self.roi_size):
            raise ValueError(
                f"the image must have one spatial axis per entry of roi_size={self.roi_size}, got {len(size)} of sizes "
                f"{size}; inputs are (batch, channel, *spatial)"
            )
        starts = tuple(
            window_starts(max(n, roi), roi, overlap, self.placement)
            for n, roi, overlap in zip(size, self.roi_size, self.overlap, strict=True)
        )
        return WindowPlan(size, self.roi_size, starts, self.blend, self.sigma_scale)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Run ``network`` over ``inputs``.

        Args:
            inputs: ``(B, C, *spatial)``.
            network: takes ``(b, C, *roi_size)`` with ``b <= batch_size`` and returns ``(b, K, *roi_size)``, both
                without the axes of size 1 that ``spatial_dims`` leaves out.
            *args: passed to every call of ``network``.
            **kwargs: passed to every call of ``network``.

        Returns:
            ``(B, K, *spatial)`` on ``device``, in the network's dtype but at least float32; a MetaTensor, with the meta
            data of ``inputs``, if ``inputs`` is one.

        Raises:
            ValueError: wrong number of axes, an empty batch, or a network that returns another batch or spatial size.
            TypeError: a network that does not return one tensor.
        """
        plan = self.plan(inputs.shape[2:])
        if not len(inputs):
            raise ValueError(f"inputs must hold at least one image, got shape {tuple(inputs.shape)}")
        image = self._pad(_plain(inputs), plan)
        mean: _WeightedMean | None = None
        for batch in _batched(itertools.product(range(len(image)), plan), self.batch_size):
            windows = torch.stack([image[item][(slice(None), *window)] for item, window in batch])
            windows = windows.reshape(*windows.shape[:2], *self.network_roi)
            output = _checked(network(windows, *args, **kwargs), len(batch), self.network_roi)
            output = output.reshape(*output.shape[:2], *plan.roi_size)
            if mean is None:  # only now is the number of classes known
                mean = _WeightedMean(plan, len(image), output, self.device or image.device)
            mean.add(batch, output)
        assert mean is not None  # a plan has at least one window
        result = mean.finish()
        return MetaTensor(result).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else result

    def _pad(self, image: Tensor, plan: WindowPlan) -> Tensor:
        if plan.padded_size == plan.image_size:
            return image
        for size, (_, after) in zip(plan.image_size, plan.padding, strict=True):
            limit = {"reflect": size - 1, "circular": size}.get(self.padding_mode, after)
            if after > limit:
                raise ValueError(
                    f"padding_mode={self.padding_mode!r} adds at most {limit} voxels to a side of {size}, but an image "
                    f"of {plan.image_size} needs {after} for roi_size={plan.roi_size}; use 'constant' or 'replicate'"
                )
        # torch lists the last axis first
        amounts = [amount for pair in reversed(plan.padding) for amount in pair]
        value = self.padding_value if self.padding_mode == "constant" else None
        return functional.pad(image, amounts, mode=self.padding_mode, value=value)


class _WeightedMean:
    """Sum of weighted windows and of their weights over the padded grid of a plan."""

    def __init__(self, plan: WindowPlan, images: int, output: Tensor, device: torch.device):
        # half precision would lose what many overlapping windows add up
        dtype = torch.promote_types(output.dtype, torch.float32)
        self.plan = plan
        self.weight = plan.weight(dtype=dtype, device=device)
        self.total = torch.zeros(images, output.shape[1], *plan.padded_size, dtype=dtype, device=device)
        self.count = torch.zeros(plan.padded_size, dtype=dtype, device=device)
        for window in plan:
            self.count[window] += self.weight

    def add(self, batch: list[tuple[int, tuple[slice, ...]]], output: Tensor) -> None:
        for (item, window), values in zip(batch, output.to(self.total), strict=True):
            self.total[item][(slice(None), *window)] += values * self.weight

    def finish(self) -> Tensor:
        """The mean on the image without its padding, ``(B, K, *spatial)``."""
        before = [pair[0] for pair in self.plan.padding]
        inside = [slice(start, start + size) for start, size in zip(before, self.plan.image_size, strict=True)]
        return self.total.div_(self.count)[(slice(None), slice(None), *inside)]


def _without_flat_axes(roi_size: tuple[int, ...], spatial_dims: int) -> tuple[int, ...]:
    """The window as a network of ``spatial_dims`` dimensions sees it."""
    if spatial_dims == len(roi_size):
        return roi_size
    thick = tuple(n for n in roi_size if n > 1)
    if len(thick) != spatial_dims:
        raise ValueError(
            f"roi_size must have {spatial_dims} entries above 1 and else only 1 for a network of spatial_dims="
            f"{spatial_dims}, got roi_size={roi_size}; a 2D network takes slices of a volume with (256, 256, 1)"
        )
    return thick


def _checked(output: Any, batch: int, roi_size: tuple[int, ...]) -> Tensor:
    """The network's output without meta data, if it is one tensor ``(batch, K, *roi_size)``."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"the network must return one tensor (b, K, *roi_size), got {type(output).__name__}; wrap it to pick one"
        )
    if output.ndim != len(roi_size) + 2 or len(output) != batch or tuple(output.shape[2:]) != roi_size:
        expected = ", ".join(map(str, (batch, "K", *roi_size)))
        raise ValueError(
            f"the network must return the size of its window: expected ({expected}), got {tuple(output.shape)}; "
            "choose a roi_size that the network divides evenly, or wrap it to crop its output"
        )
    return _plain(output)


def _plain(tensor: Tensor) -> Tensor:
    """Without MONAI's meta data, whose bookkeeping would run on every slice."""
    return tensor.as_tensor() if isinstance(tensor, MetaTensor) else tensor


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _per_axis(
    name: str, value: Any, rank: int, wanted: str, valid: Callable[[Any], bool], kind: type
) -> tuple[Any, ...]:
    """``value`` (one number, or one per axis) as a checked tuple of ``rank`` numbers."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{name} needs one number, or one for each of the {rank} axes of roi_size, got {value!r}")
    if not all(valid(v) for v in values):
        raise ValueError(f"{name} must be {wanted} on every axis, got {value!r}")
    return tuple(kind(v) for v in values)


def _is_count(value: Any) -> bool:
    return bool(int(value) == value and value > 0)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    return value
