"""D-Former: a U of dilated transformer stages, down and up, with heads at three scales; in 2D and 3D.

Wu et al., "D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation" (2022), kkk55596/D-Former.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvit.dims import conv, ntuple
from medvit.layers.d_former import DFormerStage
from medvit.layers.patch import PatchEmbed, PatchExpand, PatchMerging
from medvit.models.encoder import check_image
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

LEVELS = 4
_PATCH, _GROUP = (2, 4, 4), (2, 8, 8)


class DFormerEncoder(nn.Module):
    """Patch embedding and four stages, patch merging between them.

    Args:
        spatial_dims, in_channels: of the image.
        dim: channels after the patch embedding; each merging doubles them.
        patch_size: patch edge, per axis.
        patch_norm: LayerNorm after the patch embedding.
        drop_rate: dropout after the patch embedding.
        stage: makes the blocks of a level, 0 the finest.

    Attributes:
        channels, strides: of the feature maps: the input of stages 0, 1 and 2, and the normalised output of stage 3.
        embed_dim: length of :meth:`embed`, the deepest map's channels.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        dim: int,
        patch_size: tuple[int, ...],
        patch_norm: bool,
        drop_rate: float,
        stage: Callable[[int], DFormerStage],
    ):
        super().__init__()
        self.spatial_dims, self.in_channels = spatial_dims, in_channels
        self.channels = tuple(dim * 2**i for i in range(LEVELS))
        self.strides = tuple(tuple(p * 2**i for p in patch_size) for i in range(LEVELS))
        self.embed_dim = self.channels[-1]
        self.patch_embed = PatchEmbed(spatial_dims, in_channels, dim, patch_size, norm=patch_norm)
        self.drop = nn.Dropout(drop_rate)
        self.stages = nn.ModuleList(stage(i) for i in range(LEVELS))
        self.merges = nn.ModuleList(PatchMerging(spatial_dims, c, "mergingv2") for c in self.channels[:-1])
        self.norm = nn.LayerNorm(self.embed_dim)

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, in_channels, *spatial)`` to maps ``(B, channels[i], *ceil(spatial / strides[i]))``, finest first."""
        check_image(x, self.in_channels, self.spatial_dims)
        x = self.drop(self.patch_embed(x))
        maps = []
        for stage, merge in zip(self.stages, self.merges, strict=False):  # the last stage is not merged
            maps.append(x)
            x = merge(stage(x))
        maps.append(self.norm(self.stages[-1](x)))
        return [tokens.movedim(-1, 1) for tokens in maps]

    def embed(self, x: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` to ``(B, embed_dim)``: the mean over the deepest map."""
        deepest: Tensor = self(x)[-1]
        return deepest.flatten(2).mean(-1)


class DFormerDecoder(nn.Module):
    """Patch expanding, then a stage over the expanded tokens and the skip, three times; mirrors the encoder.

    Args:
        channels: of the encoder's maps.
        spatial_dims: rank of the grid.
        stage: makes the blocks of a level, 0 the finest.
    """

    def __init__(self, channels: tuple[int, ...], spatial_dims: int, stage: Callable[[int], DFormerStage]):
        super().__init__()
        levels = range(LEVELS - 2, -1, -1)
        self.expands = nn.ModuleList(PatchExpand(2 * channels[i], channels[i], (2,) * spatial_dims) for i in levels)
        self.fuses = nn.ModuleList(nn.Linear(2 * channels[i], channels[i]) for i in levels)
        self.stages = nn.ModuleList(stage(i) for i in levels)
        self.norm = nn.LayerNorm(channels[0])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """The encoder's maps to token grids ``(B, *grid, C)`` of its first three levels, finest first.

        The finest has passed its stage and a norm; the others are what enters theirs, before the skip.
        """
        *skips, x = [image.movedim(1, -1) for image in maps]
        out = []
        for expand, fuse, stage, skip in zip(self.expands, self.fuses, self.stages, reversed(skips), strict=True):
            x = expand(x)[(slice(None), *[slice(n) for n in skip.shape[1:-1]])]
            out.append(x)
            x = stage(fuse(torch.cat((x, skip), -1)))
        out[-1] = self.norm(x)
        return out[::-1]


class PatchHead(nn.Module):
    """Tokens to one logit per voxel of their patches and class: patch expanding, then a linear map without bias.

    Shapes: ``(B, *grid, dim)`` to ``(B, out_channels, *(grid * patch_size))``.
    """

    def __init__(self, dim: int, out_channels: int, patch_size: tuple[int, ...]):
        super().__init__()
        self.expand = PatchExpand(dim, dim, patch_size)
        self.project = conv(len(patch_size), dim, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        logits: Tensor = self.project(self.expand(x).movedim(-1, 1))
        return logits


@register("d_former")
class DFormer(nn.Module):
    """Segmentation network for images of any size.

    Tokens beyond the edge of a grid never take part in attention, and what merging and expanding add there is cropped.

    Args:
        in_channels, out_channels: image channels and classes.
        spatial_dims: 2 or 3.
        patch_size: patch edge in voxels, one number or one per axis; by default (2, 4, 4), in 2D (4, 4).
        embed_dim: width at the finest level; each level doubles it.
        depths, num_heads: blocks and heads of each of the four levels, the same down and up.
        group_size: tokens of a group, one number or one per axis; by default (2, 8, 8), in 2D (8, 8).
        intervals: of the global groups of each level.
        mlp_ratio, qkv_bias: see :class:`~medvit.layers.d_former.DFormerBlock`.
        patch_norm: LayerNorm after the patch embedding.
        deep_supervision: heads at 1/2 and 1/4 of the size too, whose logits are returned in training mode.
        drop_rate, attn_drop_rate: dropout of tokens and projections, and of attention weights.
        drop_path_rate: stochastic depth of the deepest block; rises linearly from 0.
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        official_quirks: compute what the authors' code does, to compare with it: see
            :class:`~medvit.layers.d_former.GroupAttention` for attention; logits are not cropped to the image; there
            are heads at three scales, of which ``deep_supervision`` returns the first two, also in evaluation.

    Shapes: ``(B, in_channels, *spatial)`` to logits ``(B, out_channels, *spatial)``, or in training under deep
        supervision to a list of them, finest first, of ``ceil(spatial / 2**i)`` voxels.

    Raises:
        ValueError: arguments that do not fit; in ``forward``, an image of another rank or channel count, or empty.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 3,
        patch_size: int | Sequence[int] | None = None,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        group_size: int | Sequence[int] | None = None,
        intervals: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        deep_supervision: bool = False,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        use_checkpoint: bool = False,
        official_quirks: bool = False,
    ):
        super().__init__()
        for name, values in (("depths", depths), ("num_heads", num_heads), ("intervals", intervals)):
            if not isinstance(values, Sequence) or len(values) != LEVELS or any(n < 1 for n in values):
                raise ValueError(f"{name} needs one number above 0 for each of the four levels, got {values}")
        patch = _per_axis(patch_size, _PATCH, spatial_dims, "patch_size")
        group = _per_axis(group_size, _GROUP, spatial_dims, "group_size")
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def stage(level: int) -> DFormerStage:
            return DFormerStage(
                spatial_dims,
                embed_dim * 2**level,
                num_heads[level],
                group,
                intervals[level],
                rates[sum(depths[:level]) : sum(depths[: level + 1])],
                use_checkpoint,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
                official_quirks=official_quirks,
            )

        self.deep_supervision, self.official_quirks = deep_supervision, official_quirks
        self.encoder = DFormerEncoder(spatial_dims, in_channels, embed_dim, patch, patch_norm, drop_rate, stage)
        widths = self.encoder.channels
        self.decoder = DFormerDecoder(widths, spatial_dims, stage)
        heads = 3 if deep_supervision or official_quirks else 1
        self.heads = nn.ModuleList(PatchHead(c, out_channels, patch) for c in widths[:heads])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits; see the class."""
        heads = list(self.heads)[: self._scales()]
        tokens = self.decoder(self.encoder(x))
        logits = [head(grid) for head, grid in zip(heads, tokens, strict=False)]
        if not self.official_quirks:
            sizes = [[-(-n // 2**i) for n in x.shape[2:]] for i in range(len(heads))]
            logits = [y[(..., *[slice(n) for n in size])] for y, size in zip(logits, sizes, strict=True)]
        return logits if len(heads) > 1 else logits[0]

    def _scales(self) -> int:
        if not self.deep_supervision:
            return 1
        if self.official_quirks:
            return 2
        return 3 if self.training else 1


def _per_axis(
    value: int | Sequence[int] | None, default: tuple[int, ...], spatial_dims: int, name: str
) -> tuple[int, ...]:
    sizes = ntuple(default[-spatial_dims:] if value is None else value, spatial_dims, name)
    if any(n < 1 for n in sizes):
        raise ValueError(f"{name} must be at least 1 on every axis, got {value}")
    return sizes


_BLOCK = r"(norm1|norm2|attn\.qkv|attn\.proj|mlp\.fc1|mlp\.fc2)\.(weight|bias)"
# the authors' names to medvit's
OFFICIAL_KEYS = KeyMap(
    "d_former-official",
    {
        r"model_down\.patch_embed\.(proj|norm)\.(weight|bias)": r"encoder.patch_embed.\1.\2",
        r"model_down\.layers\.(\d)\.pos_block\.proj\.0\.(weight|bias)": r"encoder.stages.\1.position.conv.\2",
        rf"model_down\.layers\.(\d)\.blocks\.(\d+)\.{_BLOCK}": r"encoder.stages.\1.blocks.\2.\3.\4",
        r"model_down\.layers\.(\d)\.downsample\.(norm|reduction)\.(weight|bias)": r"encoder.merges.\1.\2.\3",
        r"model_down\.norm\.(weight|bias)": r"encoder.norm.\1",
        r"model_down\.layers_up\.0\.(expand|norm)\.(weight|bias)": r"decoder.expands.0.\1.\2",
        r"model_down\.layers_up\.(\d)\.upsample\.(expand|norm)\.(weight|bias)": r"decoder.expands.\1.\2.\3",
        r"model_down\.concat_back_dim\.(\d)\.(weight|bias)": r"decoder.fuses.{\1-1}.\2",
        r"model_down\.layers_up\.(\d)\.pos_block\.proj\.0\.(weight|bias)": r"decoder.stages.{\1-1}.position.conv.\2",
        rf"model_down\.layers_up\.(\d)\.blocks\.(\d+)\.{_BLOCK}": r"decoder.stages.{\1-1}.blocks.\2.\3.\4",
        r"model_down\.norm_up\.(weight|bias)": r"decoder.norm.\1",
        r"final\.(\d)\.0\.(expand|norm)\.(weight|bias)": r"heads.\1.expand.\2.\3",
        r"final\.(\d)\.1\.weight": r"heads.\1.project.weight",
    },
)


# of the network whose patches and width are the authors' defaults
_PUBLISHED = {"num_heads": (3, 6, 12, 24), "group_size": _GROUP}


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of an official file tell; heads and groups leave no trace, nor intervals, which are fixed."""
    patch = state["model_down.patch_embed.proj.weight"]
    first = "model_down.layers.0.blocks.0."
    block = re.compile(r"model_down\.layers\.(\d)\.blocks\.\d+\.norm1\.weight")
    levels = [int(m[1]) for m in map(block.fullmatch, state) if m]
    return {
        "spatial_dims": patch.dim() - 2,
        "in_channels": patch.shape[1],
        "out_channels": state["final.0.1.weight"].shape[0],
        "patch_size": tuple(patch.shape[2:]),
        "embed_dim": patch.shape[0],
        **(_PUBLISHED if (patch.shape[0], *patch.shape[2:]) == (96, *_PATCH) else {}),
        "depths": tuple(levels.count(i) for i in range(LEVELS)),
        "mlp_ratio": state[first + "mlp.fc1.weight"].shape[0] / patch.shape[0],
        "qkv_bias": first + "attn.qkv.bias" in state,
        "patch_norm": "model_down.patch_embed.norm.weight" in state,
        "deep_supervision": True,  # the authors build all three heads in any case
    }


LAYOUTS = (
    Layout(
        name="official",
        model="d_former",
        keys=OFFICIAL_KEYS,
        marks=(r"model_down\.layers_up\.0\.expand\.weight", r"final\.0\.1\.weight"),
        surplus=r"heads\.[12]\..*",  # the authors build all three whatever deep_supervision says
        infer=_infer,
        ask={
            "num_heads": "no shape depends on it; one number for each level, such as [3,6,12,24]",
            "group_size": "no shape depends on it; one number or one per axis, such as [2,8,8]",
        },
    ),
)
