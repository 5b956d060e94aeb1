"""Swin UNETR: Swin encoder, convolutional U-shaped decoder. Exact against MONAI 1.6.1 in every variant.

Hatamizadeh et al., "Swin UNETR: Swin Transformers for Semantic Segmentation of Brain Tumors in MRI Images" (2022);
He et al., "SwinUNETR-V2" (MICCAI 2023); Project-MONAI/MONAI ``SwinUNETR``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from torch import Tensor, nn

from medvit.dims import conv, ntuple
from medvit.layers.conv import ResidualBlock, UpBlock, convolve
from medvit.models.encoder import check_image
from medvit.models.swin import SwinEncoder
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register


@register("swin_unetr")
class SwinUNETR(nn.Module):
    """Segmentation network; argument names and defaults are MONAI's, with ``clamp`` and ``"merging_legacy"`` added.

    Args:
        in_channels, out_channels: image channels and classes.
        spatial_dims: 2 or 3.
        feature_size: width C at half resolution, a multiple of 12 at the default heads (each head count must divide its
            stage's width).
        norm_name: ``"instance"`` or ``"batch"``, of the convolution blocks.
        patch_size, depths, num_heads, window_size, qkv_bias, mlp_ratio, drop_rate, attn_drop_rate, dropout_path_rate,
        normalize, patch_norm, downsample, use_v2, use_checkpoint, clamp: see :class:`~medvit.models.swin.SwinEncoder`;
            the decoder needs four stages.

    Shapes: ``(B, in_channels, *spatial)`` to logits ``(B, out_channels, *spatial)``; every side a multiple of
    ``16 * patch_size``, and under instance norm the image larger than one such cell: the deepest map needs two voxels.

    Raises:
        ValueError: sizes that do not fit, at construction or in ``forward``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 3,
        patch_size: int | Sequence[int] = 2,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        feature_size: int = 24,
        norm_name: str = "instance",
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        normalize: bool = True,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        downsample: str = "merging",
        use_v2: bool = False,
        clamp: str = "prefix",
    ):
        super().__init__()
        if not isinstance(depths, Sequence) or len(depths) != 4:
            raise ValueError(f"Swin UNETR has four stages, got depths={depths}")
        self.in_channels = in_channels
        self.takes_one_cell = norm_name != "instance"
        self.encoder = SwinEncoder(
            spatial_dims,
            in_channels,
            feature_size,
            patch_size=patch_size,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            mlp_ratio=mlp_ratio,
            drop_rate=drop_rate,
            attn_drop_rate=attn_drop_rate,
            dropout_path_rate=dropout_path_rate,
            normalize=normalize,
            patch_norm=patch_norm,
            downsample=downsample,
            use_v2=use_v2,
            use_checkpoint=use_checkpoint,
            clamp=clamp,
        )
        c = self.encoder.channels
        # full resolution from the image, then one per encoder level; level 3 goes in as it is
        self.stem = ResidualBlock(spatial_dims, in_channels, c[0], norm_name)
        self.skips = nn.ModuleList(ResidualBlock(spatial_dims, c[i], c[i], norm_name) for i in range(3))
        self.bottleneck = ResidualBlock(spatial_dims, c[4], c[4], norm_name)
        patch = ntuple(patch_size, spatial_dims, "patch_size")
        scales: list[int | tuple[int, ...]] = [2, 2, 2, 2, patch]
        widths = (c[4], c[3], c[2], c[1], c[0], c[0])
        self.ups = nn.ModuleList(
            UpBlock(spatial_dims, widths[i], widths[i + 1], norm_name, scale) for i, scale in enumerate(scales)
        )
        self.head = conv(spatial_dims, c[0], out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        self._check(x)
        h = list(self.encoder(x))
        out = self.bottleneck(h.pop())
        for level, up in enumerate(self.ups):
            out = up(out, self._skip(level, h, x))
        return convolve(self.head, out).contiguous()  # decoder maps have their channels last, users view logits flat

    def _skip(self, level: int, h: list[Tensor], x: Tensor) -> Tensor:
        """The skip of a level, from coarse to fine, made when it is needed; what is used up is dropped from ``h``."""
        if level > len(self.skips):
            return self.stem(x)  # type: ignore[no-any-return]
        return h.pop() if level == 0 else self.skips[-level](h.pop())

    def _check(self, x: Tensor) -> None:
        cell = self.encoder.strides[-1]
        check_image(x, self.in_channels, len(cell))
        sides = tuple(x.shape[2:])
        too_small = sides == cell and not self.takes_one_cell
        if too_small or any(n < c or n % c for n, c in zip(sides, cell, strict=True)):
            fits = tuple(max(-(-n // c), 1) * c for n, c in zip(sides, cell, strict=True))
            fits = tuple(2 * n for n in fits) if fits == cell and not self.takes_one_cell else fits
            larger = "" if self.takes_one_cell else " and the image larger than one such cell"
            raise ValueError(
                f"every side must be a multiple of {cell}{larger}, got {sides}; "
                f"pad to {fits}, or use a sliding window with such a roi"
            )


# --- weights


def _encoder_keys(root: str, stage: str, mlp: str) -> dict[str, str | None]:
    """Table of a Swin encoder; patterns of what stands before its names, of a stage (numbered), of an MLP's layer."""
    block, ours = rf"{root}{stage}blocks\.(\d+)\.", r"encoder.stages.{\1-1}.blocks.\2."
    return {
        rf"{root}patch_embed\.(proj|norm)\.(weight|bias)": r"encoder.patch_embed.\1.\2",
        rf"{block}(norm[12])\.(weight|bias)": rf"{ours}\3.\4",
        rf"{block}attn\.relative_position_bias_table": rf"{ours}attn.relative_bias.table",
        rf"{block}attn\.relative_position_index": None,
        rf"{block}attn\.(qkv|proj)\.(weight|bias)": rf"{ours}attn.\3.\4",
        rf"{block}mlp\.{mlp}([12])\.(weight|bias)": rf"{ours}mlp.fc\3.\4",
        rf"{root}{stage}downsample\.(norm|reduction)\.(weight|bias)": r"encoder.stages.{\1-1}.merge.\2.\3",
    }


# MONAI's names to medvit's; None is dropped on purpose
MONAI_KEYS = KeyMap(
    "monai",
    {
        **_encoder_keys(r"swinViT\.", r"layers(\d)\.0\.", "linear"),
        r"swinViT\.layers(\d)c\.0\.layer\.conv([12])\.conv\.weight": r"encoder.stages.{\1-1}.conv.conv\2.weight",
        # norms have keys only where they are batch norms
        r"encoder1\.layer\.conv([12])\.conv\.weight": r"stem.conv\1.weight",
        r"encoder1\.layer\.norm([12])\.(\w+)": r"stem.norm\1.\2",
        r"encoder1\.layer\.conv3\.conv\.weight": r"stem.shortcut.0.weight",
        r"encoder1\.layer\.norm3\.(\w+)": r"stem.shortcut.1.\1",
        r"encoder([2-4])\.layer\.conv([12])\.conv\.weight": r"skips.{\1-2}.conv\2.weight",
        r"encoder([2-4])\.layer\.norm([12])\.(\w+)": r"skips.{\1-2}.norm\2.\3",
        r"encoder10\.layer\.conv([12])\.conv\.weight": r"bottleneck.conv\1.weight",
        r"encoder10\.layer\.norm([12])\.(\w+)": r"bottleneck.norm\1.\2",
        r"decoder([1-5])\.transp_conv\.conv\.weight": r"ups.{5-\1}.up.weight",
        r"decoder([1-5])\.conv_block\.conv([12])\.conv\.weight": r"ups.{5-\1}.block.conv\2.weight",
        r"decoder([1-5])\.conv_block\.norm([12])\.(\w+)": r"ups.{5-\1}.block.norm\2.\3",
        r"decoder([1-5])\.conv_block\.conv3\.conv\.weight": r"ups.{5-\1}.block.shortcut.0.weight",
        r"decoder([1-5])\.conv_block\.norm3\.(\w+)": r"ups.{5-\1}.block.shortcut.1.\2",
        r"out\.conv\.conv\.(weight|bias)": r"head.\1",
    },
)


# Encoders published for fine-tuning, both trained in code that had the merging order of MONAI before 1.5.
SSL_KEYS = KeyMap(
    "monai-ssl",
    {**_encoder_keys("", r"layers(\d)\.0\.", "fc"), r"(rotation_head|contrastive_head|conv)\..*": None},
)
DAE_KEYS = KeyMap(
    "monai-dae",
    {
        **_encoder_keys(r"encoder\.", r"layers(\d)\.0\.0\.", "(?:fc|linear)"),
        r"encoder\.(mask_token|norm\.weight|norm\.bias)": None,
        r"(?!encoder\.).*": None,  # the decoder of the pre-training, which MONAI's filter_swinunetr leaves out too
    },
)


def _infer_encoder(state: Mapping[str, Tensor], mlp: str, root: str = "") -> dict[str, Any]:
    kernel = state[f"{root}patch_embed.proj.weight"]
    width, rank = kernel.shape[0], kernel.dim() - 2
    first = [f"{root}layers{i}.0.blocks.0." for i in range(1, 5)]
    tables = [state[f"{block}attn.relative_position_bias_table"] for block in first]
    numbers = [{m[1] for k in state if (m := re.match(rf"{block[:-2]}(\d+)\.", k))} for block in first]
    window = _window(tables[0].shape[0], state.get(f"{first[0]}attn.relative_position_index"), rank)
    return {
        "spatial_dims": rank,
        "in_channels": kernel.shape[1],
        "feature_size": width,
        "patch_size": list(kernel.shape[2:]),
        "depths": [len(n) for n in numbers],
        "num_heads": [table.shape[1] for table in tables],
        **({"window_size": window} if window else {}),
        "mlp_ratio": state[f"{first[0]}mlp.{mlp}1.weight"].shape[0] / width,
        "qkv_bias": f"{first[0]}attn.qkv.bias" in state,
        "patch_norm": f"{root}patch_embed.norm.weight" in state,
        **({"downsample": "merging"} if rank == 2 else {}),  # where there is one order only
    }


def _infer_monai(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        **_infer_encoder(state, "linear", "swinViT."),
        "out_channels": state["out.conv.conv.weight"].shape[0],
        "norm_name": "batch" if "encoder1.layer.norm1.running_mean" in state else "instance",
        "use_v2": "swinViT.layers1c.0.layer.conv1.conv.weight" in state,
    }


def _infer_ssl(state: Mapping[str, Tensor]) -> dict[str, Any]:
    return {**_infer_encoder(state, "fc"), "downsample": "merging_legacy"}


def _infer_dae(state: Mapping[str, Tensor]) -> dict[str, Any]:
    def plain(key: str) -> str:
        return re.sub(r"^encoder\.(layers\d\.0\.)?(?:0\.)?", r"\1", key).replace(".mlp.linear", ".mlp.fc")

    return _infer_ssl({plain(k): v for k, v in state.items() if k.startswith("encoder.")})


def _window(rows: int, index: Tensor | None, rank: int) -> list[int] | None:
    """Window whose bias table has ``rows`` rows; the stored ``index`` tells apart those of unequal edges."""
    if index is None:
        edge = (round(rows ** (1 / rank)) + 1) // 2
        return [edge] * rank if (2 * edge - 1) ** rank == rows else None
    tokens = index.shape[0]
    edges = [n for n in range(1, tokens + 1) if tokens % n == 0]
    for window in product(edges, repeat=rank):
        if prod(window) == tokens and prod(2 * w - 1 for w in window) == rows:
            strides = [prod(2 * w - 1 for w in window[i + 1 :]) for i in range(rank)]
            # the first token's row: offsets from it to every token of the window
            row = [sum((w - 1 - n) * s for w, n, s in zip(window, at, strides, strict=True)) for at in _raster(window)]
            if index[0].tolist() == row:
                return list(window)
    return None


def _raster(window: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    return product(*map(range, window))


_SSL_LACKS = r"(stem|skips|bottleneck|ups|head)\..*"
LAYOUTS = (
    Layout(
        "monai",
        "swin_unetr",
        MONAI_KEYS,
        (r"swinViT\.patch_embed\.proj\.weight", r"out\.conv\.conv\.weight"),
        infer=_infer_monai,
        ask={
            "downsample": "neither keys nor shapes tell the order of patch merging, and another one computes something "
            "else; 'merging_legacy' for weights trained with MONAI before 1.5 (all that were published before 2025), "
            "'merging' for those of MONAI 1.5 and later, 'mergingv2' where the training said so"
        },
    ),
    Layout(
        "monai-ssl",
        "swin_unetr",
        SSL_KEYS,
        (r"patch_embed\.proj\.weight", r"layers1\.0\.blocks\.0\.mlp\.fc1\.weight"),
        partial=_SSL_LACKS,
        infer=_infer_ssl,
    ),
    Layout(
        "monai-dae",
        "swin_unetr",
        DAE_KEYS,
        (r"encoder\.patch_embed\.proj\.weight", r"encoder\.layers1\.0\.0\.blocks\.0\.norm1\.weight"),
        partial=_SSL_LACKS,
        infer=_infer_dae,
    ),
)
