"""Weights of another size made to fit: position tables, patches, 2D kernels in 3D, image channels; where asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.layers.attention import RelativePositionBias
from medvit.layers.position import resize_position

INFLATIONS = ("mean", "center")
CHANNELS = ("repeat", "average")


def inflate(kernel: Tensor, depth: int, how: str) -> Tensor:
    """A 2D convolution kernel as a 3D one.

    Args:
        kernel: ``(out, in, h, w)``.
        depth: of the new kernel.
        how: ``"mean"``: ``depth`` copies, each divided by ``depth``: a volume whose slices are all the same gives
            what the slice gave. ``"center"``: the kernel in the middle slice (the later one of an even depth) and
            zeros around it: every slice gives what it gave alone.

    Returns:
        ``(out, in, depth, h, w)``.

    Raises:
        ValueError: another ``how``.

    Source: Carreira and Zisserman, "Quo Vadis, Action Recognition?" (CVPR 2017), for the mean; Arnab et al., "ViViT"
    (ICCV 2021), for the centre.
    """
    _check("inflate", how, INFLATIONS)
    if how == "mean":
        return (kernel / depth)[:, :, None].expand(-1, -1, depth, -1, -1).contiguous()
    out = kernel.new_zeros(*kernel.shape[:2], depth, *kernel.shape[2:])
    out[:, :, depth // 2] = kernel
    return out


def adapt_channels(kernel: Tensor, channels: int, how: str) -> Tensor:
    """A kernel over other image channels, scaled so that its responses keep their size.

    Args:
        kernel: ``(out, in, *k)``.
        channels: wanted.
        how: ``"repeat"``: new channel ``i`` reads as channel ``i mod in`` did, times ``in / channels``; an image that
            repeats its channels in turn gives what it gave. ``"average"``: every new channel reads as the mean of the
            old ones, times ``in / channels``; an image of equal channels gives what it gave.

    Returns:
        ``(out, channels, *k)``.

    Raises:
        ValueError: another ``how``, or ``"repeat"`` for fewer channels than there are.
    """
    _check("channels", how, CHANNELS)
    old = kernel.shape[1]
    if how == "average":
        return (kernel.sum(1, keepdim=True) / channels).expand(-1, channels, *kernel.shape[2:]).contiguous()
    if channels < old:
        raise ValueError(f"channels='repeat' makes more channels, got {channels} of {old}; use 'average'")
    return kernel[:, torch.arange(channels, device=kernel.device) % old] * (old / channels)


def resize_patches(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """A patch embedding for patches of another size.

    It gives for patches enlarged to ``size`` (cubic along each axis, antialiased) what ``kernel`` gave before; for
    smaller patches no kernel can, and this one is nearest over white noise.

    Args:
        kernel: ``(out, in, *patch)``.
        size: of the new patches, per axis.

    Returns:
        ``(out, in, *size)``.

    Source: Beyer et al., "FlexiViT: One Model for All Patch Sizes" (CVPR 2023), sec. 3.4.
    """
    out = kernel.double()
    for axis, (old, new) in enumerate(zip(kernel.shape[2:], size, strict=True), 2):
        basis = torch.eye(old, dtype=torch.float64, device=kernel.device)[None, None]
        resized = F.interpolate(basis, size=(old, new), mode="bicubic", antialias=True)[0, 0]
        out = (out.movedim(axis, -1) @ torch.linalg.pinv(resized).T).movedim(-1, axis)
    return out.to(kernel.dtype).contiguous()


def grid_of(rows: int, like: Sequence[int], *, flat: bool = False) -> tuple[int, ...] | None:
    """The token grid that a table of ``rows`` rows was made for; None if that cannot be told.

    Args:
        rows: without those of cls and register tokens.
        like: the grid wanted. One of its proportions is taken first, then one of equal sides.
        flat: the table is of a plane: the first axis is one.
    """
    if flat:
        plane = grid_of(rows, like[1:])
        return None if plane is None else (1, *plane)
    factor = (rows / prod(like)) ** (1 / len(like))
    edge = round(rows ** (1 / len(like)))
    for grid in (tuple(round(n * factor) for n in like), (edge,) * len(like)):
        if prod(grid) == rows:
            return grid
    return None


@dataclass(frozen=True)
class Fitted:
    """A tensor on its way to another shape.

    Attributes:
        value: the tensor as far as it got.
        done: what was done to it, for people.
        helps: options that would change it further.
    """

    value: Tensor
    done: tuple[str, ...] = ()
    helps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reshape:
    """What may be done to tensors that do not fit; the default is nothing.

    Args:
        positions: resize position tables and tables of relative position bias: cubic, axis by axis, as published code
            does (:func:`~medvit.layers.position.resize_position`). Rows of cls stay.
        inflate: see :func:`inflate`; the depth axis comes first.
        channels: see :func:`adapt_channels`; of convolutions that read the image.
        patches: resize patch embeddings, see :func:`resize_patches`; before inflation.

    Raises:
        ValueError: an unknown choice.
    """

    positions: bool = False
    inflate: str | None = None
    channels: str | None = None
    patches: bool = False

    def __post_init__(self) -> None:
        _check("inflate", self.inflate, (None, *INFLATIONS))
        _check("channels", self.channels, (None, *CHANNELS))

    def fit(self, value: Tensor, key: str, network: nn.Module) -> Fitted:
        """Bring a tensor towards the shape it has in a network.

        Args:
            value: from the file.
            key: name of the parameter in ``network``.
            network: has ``in_channels``, itself or in its ``encoder``, unless ``channels`` is not to apply.
        """
        parent, _, leaf = key.rpartition(".")
        module = network.get_submodule(parent)
        if isinstance(module, nn.Conv2d | nn.Conv3d) and leaf == "weight":
            return self._kernel(value, module, network)
        if isinstance(module, RelativePositionBias):
            sides = tuple(2 * n - 1 for n in module.window)
            if value.dim() == 2 and value.shape[1] == module.table.shape[1]:
                fitted = self._table(value[None], sides, 0)
                return Fitted(fitted.value[0], fitted.done, fitted.helps)
        grid = _grid(module, leaf)
        own = network.get_parameter(key) if grid is not None else value
        if grid is not None and value.dim() == 3 and value.shape[2] == own.shape[2]:
            return self._table(value, grid, own.shape[1] - prod(grid))
        return Fitted(value)

    def _kernel(self, value: Tensor, conv: nn.Conv2d | nn.Conv3d, network: nn.Module) -> Fitted:
        own = conv.weight.shape
        done: tuple[str, ...] = ()
        helps: tuple[str, ...] = ()
        plane = own[2 - value.dim() :]
        same = value.dim() in (4, len(own)) and value.shape[2:] == plane
        embeds = conv.stride == conv.kernel_size and max(conv.stride) > 1 and value.shape[0] == own[0]
        if value.dim() in (4, len(own)) and not same and embeds:
            if self.patches:
                sizes = " to ".join("x".join(map(str, s)) for s in (value.shape[2:], plane))
                value = resize_patches(value, plane)
                done += (f"patches resized from {sizes}",)
            else:
                helps += ("--resize-patches",)
            same = True
        if same and value.dim() == 4 and len(own) == 5:
            if self.inflate is None:
                helps += ("--inflate",)
            else:
                value = inflate(value, own[2], self.inflate)
                done += (f"inflated to depth {own[2]} ({self.inflate})",)
        others = value.shape[0] == own[0] and same
        reads_image = own[1] == _image_channels(network) and conv.groups == 1
        if others and reads_image and value.shape[1] != own[1]:
            if self.channels is None:
                helps += ("--channels",)
            elif self.channels == "repeat" and own[1] < value.shape[1]:
                helps += ("--channels average",)
            else:
                done += (f"{value.shape[1]} channels to {own[1]} ({self.channels})",)
                value = adapt_channels(value, own[1], self.channels)
        return Fitted(value, done, helps)

    def _table(self, value: Tensor, grid: tuple[int, ...], prefix: int) -> Fitted:
        rows = value.shape[1] - prefix
        if rows == prod(grid):
            return Fitted(value)
        if not self.positions:
            return Fitted(value, helps=("--resize-positions",))
        old = grid_of(rows, grid, flat=self.inflate is not None and len(grid) == 3)
        if old is None:
            return Fitted(value)
        sizes = " to ".join("x".join(map(str, g)) for g in (old, grid))
        return Fitted(resize_position(value, old, grid, prefix=prefix), (f"resized from {sizes}",))


def _grid(module: nn.Module, leaf: str) -> tuple[int, ...] | None:
    """Tokens per axis of a module's position table ``leaf``."""
    if leaf == "pos_embed" and isinstance(grid := getattr(module, "grid", None), tuple):
        return grid
    grids = getattr(module, "grids", {})  # one table per rank
    return grids.get(int(leaf)) if isinstance(grids, dict) and leaf.isdigit() else None


def _image_channels(network: nn.Module) -> int | None:
    channels = getattr(network, "in_channels", getattr(getattr(network, "encoder", None), "in_channels", None))
    return channels if isinstance(channels, int) else None


def _check(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")
