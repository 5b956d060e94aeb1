"""Uni4Eye: one ViT for 2D and 3D images, pre-trained by reconstructing hidden patches of image and gradient map.

Cai et al., "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer for
Ophthalmic Image Classification" (MICCAI 2022). The encoder is exact against Davidczy/Uni4Eye_pp, which has no model
with two decoders; the network with one is :mod:`medvit.models.uni4eye_pp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import isqrt, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvit.dims import ntuple
from medvit.layers.masking import Masking, hidden_patch_loss, patchify, random_masking
from medvit.layers.unified_patch import Axes, UnifiedPatchEmbed, UnifiedPosition
from medvit.models.mae import initialise
from medvit.models.vit import ASK_HEADS, BLOCK_KEYS, EPS, published_heads, vit_blocks
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

PerRank = int | Mapping[int, int | Sequence[int]]
RANKS = (2, 3)
POSITIONS = ("sincos", "official")


@register("uni4eye")
class Uni4Eye(nn.Module):
    """Encoder of 2D and 3D images; the rank of each input chooses patch embedding and positions, all else is shared.

    Volumes are ``(B, C, H, W, D)``, depth **last**, as the authors' patch embedding takes them. Arguments that may
    differ between the ranks also take a mapping from rank, e.g. ``patch_size={2: 16, 3: (16, 16, 8)}``. Defaults are
    the authors' (ViT-L/16).

    Args:
        in_channels: image channels, for both ranks or by rank.
        spatial_dims: the rank that ``in_channels`` and ``strides`` speak of; both ranks are taken whatever it is.
        img_size: what the position tables are made for; they are resized for images of other sizes. An int S
            means S x S and, as the authors', S x S x S // 2.
        patch_size: patch edge in voxels.
        embed_dim, depth, num_heads, mlp_ratio: width, blocks, heads, hidden width of the MLPs over ``embed_dim``.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        positions: ``"sincos"``; or ``"official"``: the authors' 3D table was never filled, so that volumes are bags of
            patches. Tables are frozen parameters: loaded weights bring their own.

    Attributes:
        channels, strides: of the one feature map.

    Shapes: ``(B, C, *spatial)`` to one map ``(B, embed_dim, *floor(spatial / patch_size))``; what exceeds whole patches
    is left out at the end of each axis.

    Raises:
        ValueError: arguments, or images in ``forward``, that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[int, int] = 3,
        *,
        spatial_dims: int = 3,
        img_size: PerRank = 224,
        patch_size: PerRank = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        positions: str = "sincos",
    ):
        super().__init__()
        if spatial_dims not in RANKS:
            raise ValueError(f"spatial_dims must be one of {RANKS}, got {spatial_dims!r}")
        if isinstance(img_size, int):
            img_size = {2: img_size, 3: (img_size, img_size, img_size // 2)}
        patches = _axes(patch_size, "patch_size")
        sizes = _axes(img_size, "img_size")
        grids = {rank: tuple(n // p for n, p in zip(sizes[rank], patches[rank], strict=True)) for rank in RANKS}
        if any(min(grid) < 1 for grid in grids.values()):
            raise ValueError(f"img_size must hold a patch on every axis, got img_size={sizes} for patch_size={patches}")
        channels = by_rank(in_channels, "in_channels")
        self.spatial_dims, self.in_channels, self.embed_dim = spatial_dims, channels[spatial_dims], embed_dim
        self.channels, self.strides = (embed_dim,), (patches[spatial_dims],)
        self.patch_embed = UnifiedPatchEmbed(channels, embed_dim, patches)
        self.pos_embed = positions_of(embed_dim, grids, positions)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.blocks = vit_blocks(embed_dim, depth, num_heads, mlp_ratio, drop_path_rate=drop_path_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS)
        initialise(self)

    def tokens(self, x: Tensor, masking: Masking | None = None) -> Tensor:
        """Normalised tokens, cls first.

        Args:
            x: ``(B, C, *spatial)``.
            masking: which patches to encode, and in which order; None: all, in raster order.

        Returns:
            ``(B, 1 + N, embed_dim)``, N the number of encoded patches.
        """
        embedded = self.patch_embed(x)
        position = self.pos_embed(tuple(embedded.shape[1:-1]))
        patches = embedded.flatten(1, -2) + position[:, 1:]
        if masking is not None:
            patches = masking.select(patches)
        cls = (self.cls_token + position[:, :1]).expand(x.shape[0], -1, -1)
        out = torch.cat([cls.to(patches.dtype), patches], dim=1)
        for block in self.blocks:
            out = block(out)
        normalised: Tensor = self.norm(out)
        return normalised

    def forward(self, x: Tensor) -> list[Tensor]:
        """The patch tokens as one feature map; see the class."""
        grid = self.patch_embed.grid(x)
        return [self.tokens(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], self.embed_dim, *grid)]

    def embed(self, x: Tensor) -> Tensor:
        """The cls token, ``(B, embed_dim)``."""
        return self.tokens(x)[:, 0]


class UnifiedDecoder(nn.Module):
    """Tokens of visible patches to predictions for all patches: shared blocks, positions and heads by rank.

    Args:
        in_dim: channels of the encoder's tokens.
        grids: tokens per axis that the position tables are made for, by rank.
        outputs: values predicted per patch, by rank.
        dim, depth, num_heads, mlp_ratio: width, blocks, heads and MLP ratio.
        positions: see :class:`Uni4Eye`.
    """

    def __init__(
        self,
        in_dim: int,
        grids: Mapping[int, Axes],
        outputs: Mapping[int, int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        positions: str,
    ):
        super().__init__()
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = positions_of(dim, grids, positions)
        self.blocks = vit_blocks(dim, depth, num_heads, mlp_ratio)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.ModuleDict({str(rank): nn.Linear(dim, outputs[rank]) for rank in grids})
        initialise(self)

    def fill(self, latent: Tensor, masking: Masking, grid: Axes) -> Tensor:
        """The encoder's ``(B, 1 + K, in_dim)`` in raster order with mask tokens and positions, ``(B, 1 + N, dim)``."""
        x = self.embed(latent)
        x = torch.cat([x[:, :1], masking.fill(x[:, 1:], self.mask_token)], dim=1)
        filled: Tensor = x + self.pos_embed(grid)
        return filled

    def predict(self, tokens: Tensor, rank: int) -> Tensor:
        """Tokens of :meth:`fill` to values per patch, ``(B, N, outputs[rank])``."""
        for block in self.blocks:
            tokens = block(tokens)
        values: Tensor = self.pred[str(rank)](self.norm(tokens))
        return values[:, 1:]

    def forward(self, latent: Tensor, masking: Masking, grid: Axes) -> Tensor:
        """:meth:`fill`, then :meth:`predict`."""
        return self.predict(self.fill(latent, masking, grid), len(grid))


class Uni4EyeReconstruction(NamedTuple):
    """What :class:`Uni4EyeMAE` makes of a batch of images with N patches, K of them visible.

    Attributes:
        loss: scalar, ``image_loss + gradient_weight * gradient_loss``.
        image_loss, gradient_loss: scalars, see :func:`~medvit.layers.masking.hidden_patch_loss`.
        image, gradient: ``(B, N, prod(patch_size) * C)``, predicted values of every patch, see
            :func:`~medvit.layers.masking.patchify`; its inverse makes images of them.
        mask: ``(B, N)``, 1 where a patch was hidden.
        latent: ``(B, 1 + K, embed_dim)``, the encoder's cls and visible tokens, these in ascending order of noise.
    """

    loss: Tensor
    image_loss: Tensor
    gradient_loss: Tensor
    image: Tensor
    gradient: Tensor
    mask: Tensor
    latent: Tensor


@register("uni4eye_mae")
class Uni4EyeMAE(nn.Module):
    """Pre-training of the paper: hidden patches are reconstructed by two decoders, as image and as gradient map.

    Args:
        in_channels, spatial_dims, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, positions: see
            :class:`Uni4Eye`; ``mlp_ratio`` and ``positions`` hold for the decoders too.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of each of the two decoders.
        norm_pix_loss: targets of the image decoder are normalised per patch.
        gradient_weight: of the gradient map's loss in the sum.
        mask_ratio: fraction of the patches that ``forward`` hides unless told otherwise; the authors trained with 0.5.

    Shapes: ``(B, C, *spatial)`` of rank 2 or 3, every side a multiple of the patch, to a
    :class:`Uni4EyeReconstruction`. ``encoder`` sees whole images and takes no part in masking when called by itself.

    Raises:
        ValueError: arguments, or images and noise in ``forward``, that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[int, int] = 3,
        *,
        spatial_dims: int = 3,
        img_size: PerRank = 224,
        patch_size: PerRank = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        gradient_weight: float = 1.0,
        mask_ratio: float = 0.5,
        positions: str = "sincos",
    ):
        super().__init__()
        self.norm_pix_loss, self.gradient_weight, self.mask_ratio = norm_pix_loss, gradient_weight, mask_ratio
        self.encoder = Uni4Eye(
            in_channels,
            spatial_dims=spatial_dims,
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
        )
        embed = self.encoder.patch_embed
        decoder = partial(
            UnifiedDecoder,
            embed_dim,
            self.encoder.pos_embed.grids,
            {rank: prod(patch) * embed.in_channels[rank] for rank, patch in embed.patch_size.items()},
            dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
        )
        self.image_decoder, self.gradient_decoder = decoder(), decoder()

    def forward(
        self,
        x: Tensor,
        mask_ratio: float | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Uni4EyeReconstruction:
        """Hide patches, encode the others, reconstruct twice, compare.

        Args:
            x: images or volumes, see the class.
            mask_ratio: see :func:`~medvit.layers.masking.random_masking`; None: the constructor's.
            noise: ``(B, N)``, decides what is hidden; None: drawn uniformly from [0, 1).
            generator: source of the noise, on the device of ``x``; None: torch's global one.
        """
        grid = whole_grid(self.encoder.patch_embed, x)
        patch = self.encoder.patch_embed.patch_size[len(grid)]
        masking = random_masking(
            noise_for(x, grid, noise, generator), self.mask_ratio if mask_ratio is None else mask_ratio
        )
        latent = self.encoder.tokens(x, masking)
        image = self.image_decoder(latent, masking, grid)
        gradient = self.gradient_decoder(latent, masking, grid)
        image_loss = hidden_patch_loss(image, patchify(x, patch), masking.mask, norm_pix=self.norm_pix_loss)
        gradient_loss = hidden_patch_loss(gradient, patchify(gradient_map(x), patch), masking.mask)
        loss = image_loss + self.gradient_weight * gradient_loss
        return Uni4EyeReconstruction(loss, image_loss, gradient_loss, image, gradient, masking.mask, latent)


def gradient_map(x: Tensor) -> Tensor:
    """Length of the Sobel gradient, channel by channel, in intensity per voxel.

    Along its axis the derivative is half the difference of the neighbours, across it a 1:2:1 mean smooths; border
    voxels repeat outwards. An axis of length one adds nothing, so that a slice has the same map as image and as volume.

    Args:
        x: ``(B, C, *spatial)``, any rank.

    Returns:
        The same shape, float32 at least.
    """
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    squares = torch.zeros_like(x)
    for axis in range(2, x.dim()):
        derivative = x
        for other in range(2, x.dim()):
            before, after = _neighbours(derivative, other)
            derivative = (after - before) / 2 if other == axis else (before + 2 * derivative + after) / 4
        squares = squares + derivative.square()
    return squares.sqrt()


def _neighbours(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    n = x.shape[axis]
    before = torch.cat([x.narrow(axis, 0, 1), x.narrow(axis, 0, n - 1)], axis)
    after = torch.cat([x.narrow(axis, 1, n - 1), x.narrow(axis, n - 1, 1)], axis)
    return before, after


# --- parts shared with uni4eye_pp


def by_rank(value: Any, name: str) -> dict[int, Any]:
    """A value for every rank, from one for all or a mapping (whose keys may be text, as JSON's are).

    Raises:
        ValueError: a mapping that does not name exactly the ranks 2 and 3.
    """
    if not isinstance(value, Mapping):
        return dict.fromkeys(RANKS, value)
    values = {int(rank): v for rank, v in value.items()}
    if sorted(values) != list(RANKS):
        raise ValueError(f"{name} by rank needs the keys {RANKS}, got {value!r}")
    return values


def _axes(value: PerRank, name: str) -> dict[int, Axes]:
    return {rank: ntuple(v, rank, f"{name} of rank {rank}") for rank, v in by_rank(value, name).items()}


def positions_of(dim: int, grids: Mapping[int, Axes], positions: str) -> UnifiedPosition:
    """Position tables as the argument ``positions`` of the networks wants them."""
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {POSITIONS}, got {positions!r}")
    return UnifiedPosition(dim, grids, zero=(3,) if positions == "official" else ())


def whole_grid(embed: UnifiedPatchEmbed, x: Tensor) -> Axes:
    """The grid of an image that can be reconstructed.

    Raises:
        ValueError: a side that is no multiple of the patch, besides what :meth:`UnifiedPatchEmbed.grid` refuses.
    """
    grid, sides = embed.grid(x), tuple(x.shape[2:])
    patch = embed.patch_size[len(grid)]
    if any(n % p for n, p in zip(sides, patch, strict=True)):
        fits = tuple(-(-n // p) * p for n, p in zip(sides, patch, strict=True))
        raise ValueError(f"every side must be a multiple of the patch {patch}, got {sides}; use {fits}")
    return grid


def noise_for(x: Tensor, grid: Axes, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
    """The given noise, or uniform noise, ``(B, N)``.

    Raises:
        ValueError: given noise of another shape.
    """
    shape = (x.shape[0], prod(grid))
    if noise is None:
        return torch.rand(shape, device=x.device, generator=generator)
    if noise.shape != shape:
        raise ValueError(f"one number per patch is needed, {shape} for the grid {grid}, got {tuple(noise.shape)}")
    return noise


# --- weights of Davidczy/Uni4Eye_pp: its "23D" model has tables by rank, its earlier 2D ones (models_mymae) have not

# decoder, dynamic head and the unused `mlp`
_NOT_ENCODER = {r"(decoder_\w+|mask_token|controller|mlp)(\..+)?": None}


def encoder_keys(prefix: str = "") -> dict[str, str]:
    """Table of the authors' encoder keys; ``prefix`` comes before ours. Names without a rank are 2D."""
    return {
        r"cls_token": f"{prefix}cls_token",
        r"pos_embed([23])": prefix + r"pos_embed.\1",
        r"pos_embed": f"{prefix}pos_embed.2",
        r"patch_embed\.proj([23])\.(weight|bias)": prefix + r"patch_embed.\1.\2",
        r"patch_embed\.proj\.(weight|bias)": prefix + r"patch_embed.2.\1",
        rf"blocks\.(\d+)\.{BLOCK_KEYS}": prefix + r"blocks.\1.\2",
        r"norm\.(weight|bias)": prefix + r"norm.\1",
    }


def infer_encoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor values of :class:`Uni4Eye` that the authors' weights show; heads only at published widths."""
    suffix = "2" if "pos_embed2" in state else ""
    embed_dim, channels, patch = state[f"patch_embed.proj{suffix}.weight"].shape[:3]
    size = patch * isqrt(state[f"pos_embed{suffix}"].shape[1] - 1)
    arguments = {"in_channels": channels, "img_size": size, "patch_size": patch}
    volume = tuple(state["patch_embed.proj3.weight"].shape[1:]) if suffix else None
    if volume == (1, patch, 3, patch):  # see uni4eye_pp
        arguments = slab_arguments(channels, size, patch)
    return {
        **arguments,
        "embed_dim": embed_dim,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        **published_heads(embed_dim),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
    }


def slab_arguments(in_channels: int, img_size: int, patch_size: int) -> dict[str, Any]:
    """Arguments of an encoder whose volumes are slabs of three slices, one channel and depth in the middle."""
    p, s = patch_size, img_size
    return {
        "in_channels": {2: in_channels, 3: 1},
        "img_size": {2: s, 3: (s, 3, s)},
        "patch_size": {2: p, 3: (p, 3, p)},
    }


UNI4EYE_KEYS = KeyMap("uni4eye", {**encoder_keys(), **_NOT_ENCODER})
_MAE_KEYS = KeyMap("uni4eye", {**encoder_keys("encoder."), **_NOT_ENCODER})
MARKS_23D = (r"patch_embed\.proj2\.weight", r"pos_embed3")
MARKS_2D = (r"patch_embed\.proj\.weight", r"controller\.weight")

LAYOUTS = (
    Layout("uni4eye", "uni4eye", UNI4EYE_KEYS, MARKS_23D, infer=infer_encoder, ask=ASK_HEADS),
    Layout(
        "uni4eye_2d",
        "uni4eye",
        UNI4EYE_KEYS,
        MARKS_2D,
        r"(patch_embed|pos_embed)\.3.*",
        infer=infer_encoder,
        ask=ASK_HEADS,
    ),
    # the authors' one decoder is trained with their dynamic head; the paper's two start afresh
    Layout(
        "uni4eye_to_mae", "uni4eye_mae", _MAE_KEYS, MARKS_23D, r"\w+_decoder\..*", infer=infer_encoder, ask=ASK_HEADS
    ),
)
