"""Small collections of images in memory as bytes, and random views of whole batches of them on the device.

Decoding a file costs more than a training step of a small network: each file is decoded once. Views are drawn for a
batch at a time, by torch, in 2D and 3D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from medvit.dims import ntuple
from medvit.pretrain.record import tracked


class CachedImages:
    """Images ``(C, *spatial)`` of one shape in [0, 1], decoded once and kept as uint8: a source of whole batches.

    Args:
        cases: what ``transform`` takes, e.g. ``{"image": path, "label": 1}``.
        transform: a case to a mapping with the ``image``, float in [0, 1]; deterministic.
        labels: entry of the cases, numbers or equally long rows of numbers, that batches hold as ``label``; None: none.
        key: what batches call the images.

    Raises:
        ValueError: no cases, one without a label, shapes that differ, or values outside of [0, 1].
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        transform: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        *,
        labels: str | None = None,
        key: str = "image",
    ):
        if not cases:
            raise ValueError("there are no cases to cache; check split and the other conditions on the table")
        if labels is not None and (without := [case for case in cases if labels not in case]):
            raise ValueError(f"every case needs the label {labels!r}, {without[0].get('image')} has none")
        self.cases, self.key = list(cases), key
        first = self._bytes(self.cases[0], transform)
        self.images = torch.empty((len(self.cases), *first.shape), dtype=torch.uint8)
        for number in tracked(range(len(self.cases)), "reading images"):
            case = self.cases[number]
            image = self._bytes(case, transform) if number else first
            if image.shape != first.shape:
                raise ValueError(
                    f"images in memory must have one shape, {case['image']} has {tuple(image.shape)} and the first one "
                    f"{tuple(first.shape)}; end the transform with a crop or resize"
                )
            self.images[number] = image
        self.labels = None if labels is None else torch.tensor([case[labels] for case in self.cases])

    @staticmethod
    def _bytes(case: Mapping[str, Any], transform: Callable[[Mapping[str, Any]], Mapping[str, Any]]) -> Tensor:
        image = torch.as_tensor(transform(case)["image"]).as_subclass(Tensor)
        low, high = float(image.min()), float(image.max())
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # interpolation rounds
            raise ValueError(f"the transform must bring values to [0, 1], {case['image']} has {low:g} to {high:g}")
        return (image.clamp(0, 1) * 255).round().to(torch.uint8)

    def __len__(self) -> int:
        return len(self.cases)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Images ``(B, C, *spatial)`` uint8, and ``label`` ``(B, ...)`` if there are any."""
        chosen = torch.as_tensor(indices)
        found = {self.key: self.images[chosen]}
        return found if self.labels is None else found | {"label": self.labels[chosen]}


class RandomViews:
    """Random resized crops, flips and normalisation of a batch; draws from torch's global generator of the device.

    A crop covers a fraction of the image's area (volume), drawn uniformly; each side is stretched by a log-uniform
    factor, the volume kept; it lies anywhere within. (Szegedy et al., CVPR 2015, as torchvision's ``RandomResizedCrop``
    in any rank and without its ten attempts: a stretched side longer than the image is cut.) Linear interpolation,
    corners not aligned; where images are more than twice as large as the views, fine structure aliases.

    Args:
        size: of the views, one number or one per axis.
        scale: least and greatest fraction.
        stretch: greatest ratio of the sides of a crop, the image counted as a square; 1: none.
        flips: probability of a flip per axis of the image; empty: none.
        mean, std: of the normalisation of values in [0, 1].
        contrast: greatest relative change of contrast about the view's mean; 0: none.
        brightness: greatest shift of values in [0, 1]; 0: none.
        augment: views in [0, 1] to views, before the normalisation, such as
            :class:`~medvit.pretrain.randaugment.RandAugment`; None: nothing more.
        key: entry of the batch that :class:`Augment` gives it.

    Raises:
        ValueError: fractions not in (0, 1], a stretch below 1, or (in a call) flips for another rank.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        scale: Sequence[float] = (0.5, 1.0),
        stretch: float = 4 / 3,
        flips: Sequence[float] = (),
        mean: float = 0.5,
        std: float = 0.25,
        contrast: float = 0.0,
        brightness: float = 0.0,
        augment: Callable[[Tensor], Tensor] | None = None,
        key: str = "image",
    ):
        low, high = scale
        if not 0 < low <= high <= 1 or stretch < 1:
            raise ValueError(
                "scale must be two fractions in (0, 1], the smaller first, and stretch at least 1, "
                f"got {tuple(scale)} and {stretch}; use (0.5, 1.0) and 4/3"
            )
        self.size, self.scale, self.stretch, self.flips = size, (low, high), stretch, tuple(flips)
        self.mean, self.std, self.contrast, self.brightness = mean, std, contrast, brightness
        self.augment, self.key = augment, key

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, *spatial)``, uint8 or in [0, 1], to float32 ``(B, C, *size)``."""
        images = to_unit(images)
        rank, device = images.dim() - 2, images.device
        if self.flips and len(self.flips) != rank:
            raise ValueError(f"flips must have one probability for each of {rank} axes, got {self.flips}")
        low, high = self.boxes(len(images), rank, device)
        chances = torch.tensor(self.flips or (0.0,) * rank, device=device)
        turned = torch.rand(len(images), rank, device=device) < chances
        ends = torch.where(turned, high, low), torch.where(turned, low, high)
        views = self._shaded(crop(images, *ends, ntuple(self.size, rank, "size")))
        views = views if self.augment is None else self.augment(views)
        return (views - self.mean) / self.std

    def boxes(self, count: int, rank: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Random boxes: lower and upper corners ``(count, rank)`` as fractions of the image."""
        volume = torch.empty(count, 1, device=device).uniform_(*self.scale)
        bend = torch.empty(count, rank, device=device).uniform_(-log(self.stretch) / 2, log(self.stretch) / 2)
        side = (volume ** (1 / rank) * (bend - bend.mean(1, keepdim=True)).exp()).clamp(max=1.0)
        low = torch.rand(count, rank, device=device) * (1 - side)
        return low, low + side

    def _shaded(self, views: Tensor) -> Tensor:
        if not (self.contrast or self.brightness):
            return views
        shape = (len(views), *[1] * (views.dim() - 1))
        factor = torch.empty(shape, device=views.device).uniform_(1 - self.contrast, 1 + self.contrast)
        shift = torch.empty(shape, device=views.device).uniform_(-self.brightness, self.brightness)
        middle = views.mean(dim=tuple(range(1, views.dim())), keepdim=True)
        return (views - middle) * factor + middle + shift


class WholeView:
    """The whole image at the size and normalisation that the network is trained with: the view to evaluate on.

    Args:
        size, mean, std, key: see :class:`RandomViews`.
        middle: fraction of each side that is seen, about the middle; 1: all.

    Raises:
        ValueError: a fraction not in (0, 1].
    """

    def __init__(
        self,
        size: int | Sequence[int],
        *,
        mean: float = 0.5,
        std: float = 0.25,
        middle: float = 1.0,
        key: str = "image",
    ):
        if not 0 < middle <= 1:
            raise ValueError(f"middle must be a fraction in (0, 1], got {middle}; use 1")
        self.size, self.mean, self.std, self.middle, self.key = size, mean, std, middle, key

    def __call__(self, images: Tensor) -> Tensor:
        """``(B, C, *spatial)``, uint8 or in [0, 1], to float32 ``(B, C, *size)``."""
        count, rank = len(images), images.dim() - 2
        low = torch.full((count, rank), (1 - self.middle) / 2, device=images.device)
        views = crop(to_unit(images), low, 1 - low, ntuple(self.size, rank, "size"))
        return (views - self.mean) / self.std


class Augment:
    """Batches of images to batches of views.

    Args:
        views: by the name that an objective asks for, e.g. ``{"image": RandomViews(64)}``, or several of one image,
            ``image_global_0``, ``image_global_1`` and so on. Views of a key that a batch lacks are left out: sources
            that take turns have other keys.

    Raises:
        ValueError: in a call, a batch that has none of the keys.
    """

    def __init__(self, views: Mapping[str, RandomViews | WholeView]):
        self.views = dict(views)

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The views, and what of the batch is not their source."""
        made = {name: view(batch[view.key]) for name, view in self.views.items() if view.key in batch}
        used = {view.key for view in self.views.values()}
        if not made:
            raise ValueError(f"the batch must hold one of {sorted(used)}, got {sorted(batch)}")
        return {name: value for name, value in batch.items() if name not in used} | made


def to_unit(images: Tensor) -> Tensor:
    """Bytes to float32 in [0, 1]; anything else as it is, float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def crop(images: Tensor, low: Tensor, high: Tensor, size: Sequence[int]) -> Tensor:
    """Boxes of images at another resolution, linear interpolation, pixels beyond the border as the border.

    Args:
        images: ``(B, C, *spatial)``.
        low: ``(B, rank)``, where the first edge of each view lies on each axis, as a fraction of the image.
        high: likewise the last edge; ``high < low`` flips.
        size: of the views, per axis.

    Returns:
        ``(B, C, *size)``.
    """
    scale, shift = (high - low).flip(1), (low + high - 1).flip(1)  # of [-1, 1]; grid_sample counts axes from the last
    theta = torch.cat([torch.diag_embed(scale), shift[..., None]], dim=2)
    grid = F.affine_grid(theta, [len(images), images.shape[1], *size], align_corners=False)
    return F.grid_sample(images, grid.to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False)
