"""What masked modelling hides: exchangeable strategies, over the token grid or in the images themselves.

Token masks (:class:`RandomMask`, :class:`BlockMask`, :class:`GroupMask`, :class:`SemanticMask`) hide exactly as many
patches as they are asked to. Corruptions (:class:`GroupReplacement`, :class:`FrequencyMask`) change images, for
encoders that see all of them. Both work in any rank. Masks are drawn on the CPU: where a run computes does not change
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import exp, log, prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from medvit.dims import ntuple
from medvit.layers.masking import patchify
from medvit.models.uni4eye import gradient_map

Box = tuple[slice, ...]
FILLS = ("noise", "image")
_TRIES = 10


class TokenMask(Protocol):
    """Chooses the patches to hide."""

    def __call__(
        self, grid: Sequence[int], hidden: Sequence[int], progress: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Draw a mask.

        Args:
            grid: tokens per axis.
            hidden: how many to hide, for each image of the batch.
            progress: of the training, 0 to 1.
            weights: ``(B, N)``, how much each patch matters, where the strategy asks for it.

        Returns:
            bool ``(B, N)``, N the tokens of the grid in raster order; exactly ``hidden[b]`` are True in row b.

        Raises:
            ValueError: more hidden patches than there are, or weights that do not fit.
        """
        ...


class Corrupted(NamedTuple):
    """Images after a corruption, and ``(B, 1, *spatial)`` bool, True where something was taken away."""

    image: Tensor
    mask: Tensor


class Corruption(Protocol):
    """Takes something away from images ``(B, C, *spatial)``."""

    def __call__(self, x: Tensor) -> Corrupted:
        """A corrupted copy, and where."""
        ...


# --- which patches


@dataclass(frozen=True)
class RandomMask:
    """Each set of patches is as likely as any other.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022).
    """

    def __call__(
        self, grid: Sequence[int], hidden: Sequence[int], progress: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Draw; see :class:`TokenMask`."""
        return _largest(torch.rand(len(hidden), prod(grid)), hidden)


@dataclass(frozen=True)
class BlockMask:
    """Boxes of random size and shape until enough is hidden: the blockwise masking of BEiT and DINOv2.

    A box has a volume drawn uniformly between ``min_size`` and what is left to hide. Ratios of its edges are drawn
    log-uniformly, in 2D as the authors do; in other ranks the axes are put in random order and the ratio of each to the
    next is drawn so. Edges are shorter than the grid. Axes of one token take no part: a volume of one slice is masked
    as its slice.

    The authors' masks miss their number where no box fits in ten attempts. Here a box that hides too much is cut short,
    and after ten attempts patches are drawn one by one.

    Args:
        min_size: patches of the smallest box.
        min_aspect: smallest ratio of two edges; the largest is its inverse.

    Raises:
        ValueError: a size below 1, or a ratio out of (0, 1].

    Source: Bao et al., "BEiT" (ICLR 2022), algorithm 1; facebookresearch/dinov2 ``dinov2/data/masking.py``.
    """

    min_size: int = 4
    min_aspect: float = 0.3

    def __post_init__(self) -> None:
        if self.min_size < 1 or not 0 < self.min_aspect <= 1:
            raise ValueError(
                f"min_size must be at least 1 and min_aspect in (0, 1], got {self.min_size} and {self.min_aspect}; "
                "use 4 and 0.3"
            )

    def __call__(
        self, grid: Sequence[int], hidden: Sequence[int], progress: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Draw; see :class:`TokenMask`."""
        return _boxes(grid, hidden, self._box)

    def _box(self, grid: Sequence[int], left: int) -> Box | None:
        axes = [axis for axis, n in enumerate(grid) if n > 1]
        if not axes:
            return None
        axes = [axes[i] for i in torch.randperm(len(axes)).tolist()]
        edge = _uniform(self.min_size, left) ** (1 / len(axes))
        ratios = [_uniform(log(self.min_aspect), -log(self.min_aspect)) for _ in axes[1:]]
        logs = list(accumulate([0.0, *ratios]))
        mean = sum(logs) / len(logs)
        edges = dict.fromkeys(range(len(grid)), 1)
        edges |= {axis: max(1, round(edge * exp(a - mean))) for axis, a in zip(axes, logs, strict=True)}
        if any(edges[axis] >= grid[axis] for axis in axes):
            return None
        starts = [_below(n - edges[axis] + 1) if n > 1 else 0 for axis, n in enumerate(grid)]
        return tuple(slice(start, start + edges[axis]) for axis, start in enumerate(starts))


@dataclass(frozen=True)
class GroupMask:
    """Groups of connected patches: boxes with independent random edges at random places, cut off at the border.

    Args:
        edges: shortest and longest edge of a box, as fractions of the grid; at least one patch.

    Raises:
        ValueError: fractions that are not ``0 <= shortest <= longest <= 1``.

    Source: Atito et al., "GMML is All you Need" (2022), Sara-Ahmed/GMML ``datasets/datasets_utils.py``: edges to 0.3.
    """

    edges: tuple[float, float] = (0.0, 0.3)

    def __post_init__(self) -> None:
        _check_range("edges", self.edges)

    def __call__(
        self, grid: Sequence[int], hidden: Sequence[int], progress: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Draw; see :class:`TokenMask`."""
        return _boxes(grid, hidden, self._box)

    def _box(self, grid: Sequence[int], left: int) -> Box:
        box = []
        for n in grid:
            shortest, longest = (max(1, int(n * edge)) for edge in self.edges)
            start = _below(n)
            box.append(slice(start, min(n, start + shortest + _below(longest - shortest + 1))))
        return tuple(box)


@dataclass(frozen=True)
class SemanticMask:
    """Patches that matter are hidden more often, the more the longer training goes on: from easy to hard.

    Patches are drawn one after the other without replacement, each with a probability proportional to
    ``weight ** (strength * progress)``: at random to begin with, in proportion to the weights in the end.
    The weights come with the batch: attention of a trained encoder, a segmentation, local detail.

    SemMAE goes from hiding a share of every semantic part to hiding whole parts; this is the same curriculum for
    weights per patch, which need no parts.

    Args:
        strength: exponent of the weights at the end of the training.

    Raises:
        ValueError: a negative strength; on a call, weights that are missing, of another shape, negative or not finite.

    Source: Li et al., "SemMAE: Semantic-Guided Masking for Learning Masked Autoencoders" (NeurIPS 2022); Gumbel
    top-k sampling: Kool et al., "Stochastic Beams and Where to Find Them" (ICML 2019).
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.strength < 0:
            raise ValueError(f"strength must not be negative, got {self.strength}; use 1.0")

    def __call__(
        self, grid: Sequence[int], hidden: Sequence[int], progress: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Draw; see :class:`TokenMask`."""
        shape = (len(hidden), prod(grid))
        if weights is None or weights.shape != shape:
            raise ValueError(
                f"semantic masking needs a weight for every patch, {shape}, got "
                f"{None if weights is None else tuple(weights.shape)}; the batch brings them as a map beside the image"
            )
        wide = weights.detach().cpu().double()
        if not bool((wide.isfinite() & (wide >= 0)).all()):
            raise ValueError("weights must be finite and not negative, got others; use e.g. weights.clamp(min=0)")
        gumbel = -torch.empty(shape, dtype=torch.float64).exponential_().log()
        powers = self.strength * progress * wide.clamp_min(torch.finfo(torch.float64).tiny).log()
        return _largest(powers + gumbel, hidden)


class Weighted:
    """Batches with a map of what matters beside each image, for :class:`SemanticMask`: ``augment`` of a trainer.

    Args:
        augment: makes the batches; None: they come as they are.
        weigh: images ``(B, C, *spatial)`` to weights ``(B, 1, *spatial)``; None: the length of their Sobel gradient,
            so that patches with detail matter.
        keys: images that get one, under ``KEY_weights``; those that a batch lacks are left out.
    """

    def __init__(
        self,
        augment: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] | None = None,
        *,
        weigh: Callable[[Tensor], Tensor] | None = None,
        keys: Sequence[str] = ("image", "image2d", "image3d"),
    ):
        self.augment, self.weigh, self.keys = augment, weigh or detail, tuple(keys)

    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch and its maps."""
        made = dict(batch if self.augment is None else self.augment(batch))
        return made | {f"{key}_weights": self.weigh(made[key]) for key in self.keys if key in made}


def detail(x: Tensor) -> Tensor:
    """Length of the Sobel gradient of ``(B, C, *spatial)``, mean over channels, ``(B, 1, *spatial)``."""
    return gradient_map(x).mean(1, keepdim=True)


def token_mask(masking: TokenMask | None, default: TokenMask) -> TokenMask:
    """What hides patches; ``default`` where nothing is given.

    Raises:
        ValueError: a corruption, which changes the image instead.
    """
    if isinstance(masking, GroupReplacement | FrequencyMask):
        raise ValueError(
            f"{type(masking).__name__} changes images and hides no patches; use it as a corruption of SwinObjective, "
            "and here RandomMask, BlockMask, GroupMask or SemanticMask"
        )
    return masking or default


def ranking(
    strategy: TokenMask,
    x: Tensor,
    patch_size: Sequence[int],
    ratio: float,
    progress: float,
    weights: Tensor | None = None,
) -> Tensor:
    """Noise with which :func:`~medvit.layers.masking.random_masking` hides what a strategy chooses.

    Args:
        strategy: draws the mask.
        x: images ``(B, C, *spatial)``, every side a multiple of the patch.
        patch_size: per axis.
        ratio: fraction hidden, the same that ``random_masking`` gets; its rounding is followed.
        progress: see :class:`TokenMask`.
        weights: map ``(B, 1, *spatial)`` of what matters; a patch has the mean over its voxels.

    Returns:
        ``(B, N)`` on the device of ``x``: visible patches in [0, 1), hidden ones in [1, 2].

    Raises:
        ValueError: a map that does not lie on the images.
    """
    sides = tuple(x.shape[2:])
    if weights is not None and weights.shape != (len(x), 1, *sides):
        raise ValueError(f"the weights must be a map {(len(x), 1, *sides)} like the image, got {tuple(weights.shape)}")
    grid = tuple(n // p for n, p in zip(sides, patch_size, strict=True))
    hidden = prod(grid) - int(prod(grid) * (1 - ratio))
    per_patch = None if weights is None else patchify(weights, patch_size).float().mean(-1)
    mask = strategy(grid, [hidden] * len(x), progress, per_patch)
    return (torch.rand(mask.shape) + mask).to(x.device)


# --- in images


@dataclass(frozen=True)
class GroupReplacement:
    """Groups of voxels replaced by noise or by another image of the batch.

    Args:
        ratio: smallest and largest fraction of the image to replace; drawn uniformly for each image, then rounded to a
            number of cells and kept exactly.
        fill: ``"noise"``: normal, with the mean and standard deviation of each image and channel; ``"image"``: the same
            place of another image of the batch.
        cell: what is replaced as a whole: edge in voxels, one number or one per axis; e.g. the patch of the encoder.
        masking: draws the cells.

    The mask is that of the replaced voxels.

    Raises:
        ValueError: ratios or a fill that are none; on a call, sides that are no multiple of the cell, or one image
            alone where it is to be filled from another.

    Source: Atito et al., "GMML is All you Need" (2022), which replaces 0.5 to 0.7; Tang et al., "Self-Supervised
    Pre-Training of Swin Transformers for 3D Medical Image Analysis" (CVPR 2022), 0 to 0.3.
    """

    ratio: tuple[float, float] = (0.5, 0.7)
    fill: str = "noise"
    cell: int | tuple[int, ...] = 1
    masking: TokenMask = field(default_factory=GroupMask)

    def __post_init__(self) -> None:
        _check_range("ratio", self.ratio)
        if self.fill not in FILLS:
            raise ValueError(f"fill must be one of {FILLS}, got {self.fill!r}")

    def __call__(self, x: Tensor) -> Corrupted:
        """Replace; see the class."""
        sides = tuple(x.shape[2:])
        cell = ntuple(self.cell, len(sides), "cell")
        if any(n % c for n, c in zip(sides, cell, strict=True)):
            raise ValueError(f"every side must be a multiple of the cell {cell}, got {sides}")
        if self.fill == "image" and len(x) < 2:
            raise ValueError("replacing by another image needs two images in a batch, got 1; use fill='noise'")
        grid = [n // c for n, c in zip(sides, cell, strict=True)]
        hidden = [round(_uniform(*self.ratio) * prod(grid)) for _ in x]
        mask = self.masking(grid, hidden).reshape(len(x), 1, *grid).to(x.device)
        for axis, edge in enumerate(cell):
            mask = mask.repeat_interleave(edge, 2 + axis)
        return Corrupted(torch.where(mask, self._filling(x), x), mask)

    def _filling(self, x: Tensor) -> Tensor:
        if self.fill == "image":
            return x.roll(1 + _below(len(x) - 1), 0)
        axes = tuple(range(2, x.dim()))
        std, mean = torch.std_mean(x, axes, keepdim=True, correction=0)
        return mean + std * torch.randn_like(x)


@dataclass(frozen=True)
class FrequencyMask:
    """Low or high frequencies taken away.

    Args:
        radius: what is low: a frequency shorter than this, in cycles per image side. The authors have 16 at 224 x 224.
        low_pass: fraction of the images that keep the low frequencies; the others keep the high ones.

    The mask is that of the frequencies taken away, in the order of ``torch.fft.fftn``. Images become float32; values
    are not clipped to a range, as the authors clip images between 0 and 1.

    Raises:
        ValueError: a radius that is not positive, or a fraction out of [0, 1].

    Source: Xie et al., "Masked Frequency Modeling for Self-Supervised Visual Pre-Training" (ICLR 2023), Jiahao000/MFM.
    """

    radius: float = 16.0
    low_pass: float = 0.5

    def __post_init__(self) -> None:
        if self.radius <= 0 or not 0 <= self.low_pass <= 1:
            raise ValueError(
                f"radius must be positive and low_pass in [0, 1], got {self.radius} and {self.low_pass}; use 16 and 0.5"
            )

    def __call__(self, x: Tensor) -> Corrupted:
        """Filter; see the class."""
        axes = tuple(range(2, x.dim()))
        frequencies = torch.meshgrid(*[torch.fft.fftfreq(n) * n for n in x.shape[2:]], indexing="ij")
        low = torch.stack(frequencies).square().sum(0) < self.radius**2
        keeps_low = torch.rand(len(x)) < self.low_pass
        removed = (low != keeps_low.reshape(-1, *[1] * len(axes)))[:, None].to(x.device)
        image = torch.fft.ifftn(torch.fft.fftn(x.float(), dim=axes) * ~removed, dim=axes).real
        return Corrupted(image, removed)


# --- parts


def _largest(scores: Tensor, hidden: Sequence[int]) -> Tensor:
    """True for the ``hidden[b]`` largest scores of row b."""
    _check_hidden(hidden, scores.shape[1])
    ranks: Tensor = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < torch.tensor(hidden).reshape(-1, 1)


def _boxes(grid: Sequence[int], hidden: Sequence[int], draw: Callable[[Sequence[int], int], Box | None]) -> Tensor:
    """Masks filled by boxes; ``draw(grid, left)`` makes a box, or None where it has no luck."""
    _check_hidden(hidden, prod(grid))
    return torch.stack([_filled(grid, count, draw).flatten() for count in hidden])


def _filled(grid: Sequence[int], count: int, draw: Callable[[Sequence[int], int], Box | None]) -> Tensor:
    mask = torch.zeros(*grid, dtype=torch.bool)
    left, misses = count, 0
    while left and misses < _TRIES:
        box = draw(grid, left)
        fresh = torch.zeros(0, dtype=torch.bool) if box is None else ~mask[box]
        fresh &= (fresh.flatten().cumsum(0) <= left).reshape(fresh.shape)
        new = int(fresh.sum())
        if box is None or new == 0:
            misses += 1
            continue
        mask[box] |= fresh
        left, misses = left - new, 0
    visible = (~mask.flatten()).nonzero()[:, 0]
    mask.view(-1)[visible[torch.randperm(len(visible))[:left]]] = True
    return mask


def _check_hidden(hidden: Sequence[int], count: int) -> None:
    if not all(0 <= n <= count for n in hidden):
        raise ValueError(f"of {count} patches 0 to {count} can be hidden, got {list(hidden)}")


def _check_range(name: str, value: tuple[float, float]) -> None:
    low, high = value
    if not 0 <= low <= high <= 1:
        raise ValueError(f"{name} must be two fractions, the smaller first, got {tuple(value)}; use (0.1, 0.3)")


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _below(n: int) -> int:
    return int(torch.randint(n, ()))
