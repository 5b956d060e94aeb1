"""HBFormer: Swin encoder, bridge and multi-scale feature fusion decoder. Exact against the authors' published network.

Zheng et al., "HBFormer: A Hybrid-Bridge Transformer for Microtumor and Miniature Organ Segmentation" (BIBM 2025);
lzeeorno/HBFormer, whose encoder is timm's ``SwinTransformer``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.dims import conv, conv_transpose, interpolation, ntuple
from medvit.kernels import WindowGeometry
from medvit.layers.block import SwinBlock
from medvit.layers.fusion import MFF
from medvit.layers.patch import PatchEmbed, PatchMerging
from medvit.models.encoder import check_image
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

PATCH = 4
CELL = 8 * PATCH  # image voxels per token of the last of the four stages
WINDOWS = (7, 8, 6, 5, 4)  # the authors' order of preference


class HBFormerStage(nn.Module):
    """Patch merging (not in the first stage), then blocks with alternating unshifted and shifted windows.

    timm's order of things: merging comes first, and the grid is rolled before it is padded.

    Args:
        spatial_dims: rank of the grid.
        dim: channels out.
        num_heads: attention heads.
        window: per-axis window edge in tokens.
        mlp_ratio: hidden width of the MLPs over ``dim``.
        drop_path: stochastic depth rate of each block; their number is the depth.
        merge: whether the stage starts with merging, from ``dim // 2`` channels.
    """

    def __init__(
        self,
        spatial_dims: int,
        dim: int,
        num_heads: int,
        window: tuple[int, ...],
        mlp_ratio: float,
        drop_path: Sequence[float],
        merge: bool,
    ):
        super().__init__()
        self.merge = PatchMerging(spatial_dims, dim // 2) if merge else nn.Identity()
        geometries = [WindowGeometry.swin(window, spatial_dims, shifted=s, roll_first=True) for s in (False, True)]
        self.blocks = nn.Sequential(
            *[
                SwinBlock(dim, num_heads, geometries[j % 2], mlp_ratio=mlp_ratio, drop_path=rate)
                for j, rate in enumerate(drop_path)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *grid, dim / 2)`` to ``(B, *ceil(grid / 2), dim)``; the first stage keeps grid and channels."""
        out: Tensor = self.blocks(self.merge(x))
        return out


class HBFormerEncoder(nn.Module):
    """1 x 1 projection to three channels, then a Swin transformer as timm computes it; one map per stage, no last norm.

    Args:
        in_channels: image channels.
        spatial_dims: 2 or 3.
        img_size: image edge per axis that windows and their bias tables are sized for; other images run all the same.
        window_size: window edge in tokens, per axis; None: the first of 7, 8, 6, 5, 4 that divides
            ``img_size[0] // 4``. A stage's window is no longer than its grid at ``img_size``.
        embed_dim: channels after the patch embedding; each further stage doubles them.
        depths, num_heads: blocks and heads of the four stages.
        mlp_ratio: see :class:`~medvit.layers.block.SwinBlock`.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.

    Attributes:
        embed_dim: length of :meth:`embed`'s vector, the channels of the last stage.

    Raises:
        ValueError: sizes, heads or rates that do not fit; images of another rank or with other channels.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        spatial_dims: int = 2,
        img_size: int | Sequence[int] = 256,
        window_size: int | Sequence[int] | None = None,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        if any(not isinstance(values, Sequence) or len(values) != 4 for values in (depths, num_heads)):
            raise ValueError(
                f"HBFormer has four stages, got depths={depths} and num_heads={num_heads}; "
                "the authors use depths=(2, 2, 6, 2) and num_heads=(3, 6, 12, 24)"
            )
        size = ntuple(img_size, spatial_dims, "img_size")
        window = ntuple(_window(size) if window_size is None else window_size, spatial_dims, "window_size")
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = tuple(embed_dim * 2**i for i in range(4))
        self.strides = tuple((PATCH * 2**i,) * spatial_dims for i in range(4))
        self.embed_dim = self.channels[-1]
        self.input_proj = conv(spatial_dims, in_channels, 3, 1)
        self.patch_embed = PatchEmbed(spatial_dims, 3, embed_dim, (PATCH,) * spatial_dims, norm=True)
        grids = [[-(-n // CELL) * CELL // stride[0] for n in size] for stride in self.strides]
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList(
            HBFormerStage(
                spatial_dims,
                self.channels[i],
                num_heads[i],
                tuple(min(w, g) for w, g in zip(window, grids[i], strict=True)),
                mlp_ratio,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                merge=i > 0,
            )
            for i in range(4)
        )
        self.stages.apply(_initialise)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, in_channels, *spatial)`` to maps ``(B, channels[i], *ceil(spatial / strides[i]))``, finest first."""
        check_image(x, self.in_channels, self.spatial_dims)
        x = self.patch_embed(self.input_proj(x))
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x.movedim(-1, 1))
        return features

    def embed(self, x: Tensor) -> Tensor:
        """Mean over the deepest map, ``(B, embed_dim)``."""
        deepest: Tensor = self(x)[-1]
        return deepest.flatten(2).mean(2)


@register("hbformer")
class HBFormer(nn.Module):
    """Segmentation network: the encoder's maps, fused from coarse to fine.

    Args:
        in_channels, out_channels: image channels and classes.
        spatial_dims: 2 (published) or 3.
        img_size, window_size, embed_dim, depths, num_heads, mlp_ratio, drop_path_rate: see :class:`HBFormerEncoder`.
        feature_size: width of the decoder at half resolution; None: ``embed_dim // 2``, as the authors have it.

    Shapes: ``(B, in_channels, *spatial)`` to logits ``(B, out_channels, *spatial)``, for any size: the image is
    zero-padded at the end of each axis to a multiple of 32 and the logits are cropped. Images of ``img_size`` give the
    authors' numbers.

    Raises:
        ValueError: sizes that do not fit, at construction or in ``forward``.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 9,
        *,
        spatial_dims: int = 2,
        img_size: int | Sequence[int] = 256,
        window_size: int | Sequence[int] | None = None,
        embed_dim: int = 96,
        feature_size: int | None = None,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
    ):
        super().__init__()
        self.encoder = HBFormerEncoder(
            in_channels,
            spatial_dims=spatial_dims,
            img_size=img_size,
            window_size=window_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
        )
        c, f = self.encoder.channels, embed_dim // 2 if feature_size is None else feature_size
        if f < 1:
            raise ValueError(f"feature_size must be positive, got {f}; the authors use embed_dim // 2")
        self.interpolation = interpolation(spatial_dims)
        # coarse to fine; the first fusion takes the encoder's two deepest maps as they are
        self.projections = nn.ModuleList(conv(spatial_dims, c[i], f * 2**i, 1) for i in range(3))
        widths = [(c[3], c[2], 8 * f), (8 * f, 4 * f, 4 * f), (4 * f, 2 * f, 2 * f), (2 * f, f, f)]
        self.fusions = nn.ModuleList(MFF(spatial_dims, *width) for width in widths)
        self.head = nn.Sequential(
            conv_transpose(spatial_dims, f, f, 4, stride=2, padding=1, bias=False),
            conv(spatial_dims, f, out_channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        check_image(x, self.encoder.in_channels, self.encoder.spatial_dims)
        sides = x.shape[2:]
        x = F.pad(x, [v for n in reversed(sides) for v in (0, -n % CELL)])
        features = self.encoder(x)
        out = self.fusions[0](features[3], features[2])
        for i, fusion in zip((2, 1, 0), self.fusions[1:], strict=True):
            skip = self.projections[i](features[i])
            skip = F.interpolate(skip, scale_factor=2, mode=self.interpolation, align_corners=True)
            out = fusion(out, skip)
        logits: Tensor = self.head(out)
        return logits[(slice(None), slice(None), *[slice(n) for n in sides])]


def _window(img_size: tuple[int, ...]) -> int:
    """The authors' window: the first preference that divides the first axis of the token grid."""
    for window in WINDOWS:
        if img_size[0] >= PATCH and img_size[0] // PATCH % window == 0:
            return window
    raise ValueError(
        f"without window_size the first of {WINDOWS} that divides img_size[0] // {PATCH} is taken; "
        f"none does for img_size={img_size}; give window_size, e.g. 7"
    )


def _initialise(module: nn.Module) -> None:
    """As timm does: truncated normal weights, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- public weights


_SWIN = {
    r"patch_embed\.(proj|norm)\.(weight|bias)": r"encoder.patch_embed.\1.\2",
    r"layers\.(\d)\.blocks\.(\d+)\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)": (
        r"encoder.stages.\1.blocks.\2.\3.\4"
    ),
    r"layers\.(\d)\.blocks\.(\d+)\.attn\.relative_position_bias_table": (
        r"encoder.stages.\1.blocks.\2.attn.relative_bias.table"
    ),
    # made anew from the sizes
    r"layers\.\d\.blocks\.\d+\.(attn\.relative_position_index|attn_mask)": None,
    # the published network has no norm after its last stage
    r"norm\.(weight|bias)": None,
}
_MERGE_FIRST = {r"layers\.([123])\.downsample\.(norm|reduction)\.(weight|bias)": r"encoder.stages.\1.merge.\2.\3"}
_MERGE_LAST = {r"layers\.([012])\.downsample\.(norm|reduction)\.(weight|bias)": r"encoder.stages.{\1+1}.merge.\2.\3"}
_CLASSIFIER = {r"head\.(fc\.)?(weight|bias)": None}

_DECODER = {
    r"proj_enc([123])\.(weight|bias)": r"projections.{\1-1}.\2",
    r"proj_enc4\.(weight|bias)": None,  # never used
    r"MFF_decoder([1-4])\.transp_conv\.(weight|bias)": r"fusions.{4-\1}.up.\2",
    r"MFF_decoder([1-4])\.LRD_block\.conv([12])\.weight": r"fusions.{4-\1}.lrd.conv\2.weight",
    r"MFF_decoder([1-4])\.LRD_block\.conv_skip\.weight": r"fusions.{4-\1}.lrd.shortcut.weight",
    r"MFF_decoder([1-4])\.LRD_block\.bn([12])\.(\w+)": r"fusions.{4-\1}.lrd.norm\2.\3",
    r"MFF_decoder([1-4])\.Med_DSPP\.(branch|expert)_attention\.([13])\.(weight|bias)": (
        r"fusions.{4-\1}.dspp.\2_gate.{\3-1}.\4"
    ),
    r"MFF_decoder([1-4])\.Med_DSPP\.dw_experts\.(\d)\.(\d)\.weight": (
        r"fusions.{4-\1}.dspp.branches.\2.depthwise.\3.weight"
    ),
    r"MFF_decoder([1-4])\.Med_DSPP\.pw_experts\.(\d)\.(\d)\.weight": (
        r"fusions.{4-\1}.dspp.branches.\2.pointwise.\3.weight"
    ),
    r"MFF_decoder([1-4])\.Med_DSPP\.bns\.(\d)\.(\w+)": r"fusions.{4-\1}.dspp.branches.\2.norm.\3",
    r"MFF_decoder([1-4])\.Med_DSPP\.eca\.conv\.weight": r"fusions.{4-\1}.dspp.attention.conv.weight",
    r"MFF_decoder([1-4])\.Med_DSPP\.fuse\.weight": r"fusions.{4-\1}.dspp.fuse.weight",
    r"MFF_decoder([1-4])\.Med_DSPP\.fuse_bn\.(\w+)": r"fusions.{4-\1}.dspp.norm.\2",
    r"MFF_decoder([1-4])\.BN\.(\w+)": r"fusions.{4-\1}.norm.\2",
    r"out\.([01])\.(weight|bias)": r"head.\1.\2",
}

HBFORMER_KEYS = KeyMap(
    "hbformer",
    {r"input_proj\.(weight|bias)": r"encoder.input_proj.\1"}
    | {rf"MWAencoder\.backbone\.{pattern}": new for pattern, new in (_SWIN | _MERGE_FIRST).items()}
    | _DECODER,
)
MICROSOFT_KEYS = KeyMap("swin-microsoft", _SWIN | _MERGE_LAST | _CLASSIFIER)
TIMM_KEYS = KeyMap("swin-timm", _SWIN | _MERGE_FIRST | _CLASSIFIER)


def _infer_encoder(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """Constructor values of the encoder by the official names of its weights."""

    def blocks(i: int) -> list[str]:
        return [
            k for k in state if k.startswith(f"{prefix}layers.{i}.") and k.endswith(".relative_position_bias_table")
        ]

    first = state[f"{prefix}layers.0.blocks.0.mlp.fc1.weight"]
    tables = [state[blocks(i)[0]] for i in range(4)]
    sides = [isqrt(table.shape[0]) for table in tables]
    values: dict[str, Any] = {
        "embed_dim": first.shape[1],
        "depths": tuple(len(blocks(i)) for i in range(4)),
        "num_heads": tuple(table.shape[1] for table in tables),
        "mlp_ratio": first.shape[0] / first.shape[1],
    }
    if all(side**2 == table.shape[0] for side, table in zip(sides, tables, strict=True)):  # square windows
        values["window_size"] = (max(sides) + 1) // 2
        # the last grid, if it clamped the window; no smaller than the window otherwise, which is all that matters
        values["img_size"] = CELL * (sides[3] + 1) // 2
    return values


def _infer_network(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor values by the official names."""
    return {
        **_infer_encoder(state, "MWAencoder.backbone."),
        "in_channels": state["input_proj.weight"].shape[1],
        "out_channels": state["out.1.weight"].shape[0],
        "feature_size": state["proj_enc1.weight"].shape[0],
    }


_BEYOND_SWIN = r"encoder\.input_proj\..*|projections\..*|fusions\..*|head\..*"

LAYOUTS = (
    Layout(
        "hbformer",
        "hbformer",
        HBFORMER_KEYS,
        (r"MWAencoder\.backbone\.patch_embed\.proj\.weight", r"MFF_decoder1\.transp_conv\.weight"),
        infer=_infer_network,
    ),
    Layout(
        "swin-microsoft",
        "hbformer",
        MICROSOFT_KEYS,
        (r"patch_embed\.proj\.weight", r"layers\.0\.downsample\.reduction\.weight"),
        partial=_BEYOND_SWIN,
        infer=_infer_encoder,
    ),
    Layout(
        "swin-timm",
        "hbformer",
        TIMM_KEYS,
        (r"patch_embed\.proj\.weight", r"layers\.3\.downsample\.reduction\.weight"),
        partial=_BEYOND_SWIN,
        infer=_infer_encoder,
    ),
)
