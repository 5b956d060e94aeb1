"""Plain vision transformer in 2D and 3D, and the classifier made of it: the fine-tuned network of CXR MAE.

Dosovitskiy et al., "An Image is Worth 16x16 Words" (ICLR 2021); Xiao et al., "Delving into Masked Autoencoders for
Multi-Label Thorax Disease Classification" (WACV 2023), lambert-x/medical_mae ``models_vit.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medvit.dims import ntuple
from medvit.layers.attention import check_heads
from medvit.layers.masking import Masking
from medvit.layers.patch import PatchEmbed
from medvit.layers.position import resize_position, sincos_position
from medvit.models.encoder import check_image, patch_statistics
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

EPS = 1e-6
GLOBAL_POOLS = ("avg", "cls")
POSITIONS = ("learned", "sincos")
READS = ("embed", "blocks")


class ViTEncoder(nn.Module):
    """Patches, a cls token, positions and pre-norm blocks.

    Args:
        in_channels: image channels.
        spatial_dims: 2 or 3.
        img_size: image size, per axis, that the position table belongs to; other sizes resize the table, see
            :func:`~medvit.layers.position.resize_position`.
        patch_size: patch edge, per axis.
        embed_dim: channels of a token.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLPs over ``embed_dim``.
        qkv_bias: bias of the queries, keys and values.
        drop_path_rate: stochastic depth, growing linearly from 0 to this over the blocks.
        global_pool: ``"avg"``: tokens are the last block's output, and the summary is LayerNorm of the mean of the
            patch tokens; ``"cls"``: tokens go through a LayerNorm, and the summary is the cls token.
        position: ``"learned"``, or ``"sincos"``: fixed, see :func:`~medvit.layers.position.sincos_position`.

    Attributes:
        spatial_dims, in_channels, channels, strides, embed_dim: see :class:`~medvit.models.encoder.Encoder`.

    Raises:
        ValueError: values that do not fit, at construction or in ``forward``: sides must be multiples of the patch.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        spatial_dims: int = 2,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        position: str = "learned",
    ):
        super().__init__()
        _check_choice("global_pool", global_pool, GLOBAL_POOLS)
        _check_choice("position", position, POSITIONS)
        self.spatial_dims, self.in_channels, self.embed_dim = spatial_dims, in_channels, embed_dim
        self.global_pool = global_pool
        self.patch_size = ntuple(patch_size, spatial_dims, "patch_size")
        self.channels, self.strides = (embed_dim,), (self.patch_size,)
        self.patch_embed = PatchEmbed(spatial_dims, in_channels, embed_dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.grid = _whole_patches("img_size", ntuple(img_size, spatial_dims, "img_size"), self.patch_size)
        if position == "sincos":
            self.pos_embed = nn.Parameter(sincos_position(embed_dim, self.grid), requires_grad=False)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, 1 + prod(self.grid), embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = vit_blocks(embed_dim, depth, num_heads, mlp_ratio, qkv_bias, drop_path_rate)
        self.norm = nn.LayerNorm(embed_dim, eps=EPS) if global_pool == "cls" else nn.Identity()
        self.fc_norm = nn.LayerNorm(embed_dim, eps=EPS) if global_pool == "avg" else nn.Identity()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def grid_of(self, x: Tensor) -> tuple[int, ...]:
        """Tokens per axis of ``(B, in_channels, *spatial)``.

        Raises:
            ValueError: another rank, other channels, or a side that is no multiple of the patch.
        """
        check_image(x, self.in_channels, self.spatial_dims)
        return _whole_patches("the image", x.shape[2:], self.patch_size)

    def tokens(self, x: Tensor, masking: Masking | None = None) -> Tensor:
        """Tokens of an image: the cls token, then the patches.

        Args:
            x: ``(B, in_channels, *spatial)``.
            masking: patches to leave out before the blocks, and the order of the others.

        Returns:
            ``(B, 1 + N, embed_dim)`` in raster order, or ``(B, 1 + K, embed_dim)`` in the order of ``masking.keep``.
        """
        tokens = self._embedded(x, masking)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens)
        return out

    def _embedded(self, x: Tensor, masking: Masking | None = None) -> Tensor:
        """What the first block is given."""
        position = resize_position(self.pos_embed, self.grid, self.grid_of(x))
        patches = self.patch_embed(x).flatten(1, -2) + position[:, 1:]
        if masking is not None:
            patches = masking.select(patches)
        cls = (self.cls_token + position[:, :1]).expand(x.shape[0], -1, -1)
        return torch.cat([cls, patches], dim=1)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """The embedded tokens and what each block makes of them, ``depth + 1`` tensors; none is normalised."""
        states = [self._embedded(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def block_statistics(self, x: Tensor) -> Tensor:
        """Four moments over the patches after every block, ``(B, 4 * depth * embed_dim)``.

        See :func:`~medvit.models.encoder.patch_statistics`.
        """
        return patch_statistics(self.hidden_states(x)[1:])

    def embed(self, x: Tensor) -> Tensor:
        """One vector ``(B, embed_dim)`` per image, see ``global_pool``."""
        tokens = self.tokens(x)
        summary = tokens[:, 1:].mean(dim=1) if self.global_pool == "avg" else tokens[:, 0]
        out: Tensor = self.fc_norm(summary)
        return out

    def forward(self, x: Tensor) -> list[Tensor]:
        """One feature map, ``[(B, embed_dim, *(spatial / patch_size))]``: the patch tokens."""
        return [self.tokens(x)[:, 1:].transpose(1, 2).reshape(x.shape[0], self.embed_dim, *self.grid_of(x))]


@register("vit")
class ViT(nn.Module):
    """Classifier: an encoder's summary and a linear head; initialised as the authors fine-tune it.

    Args:
        in_channels: image channels.
        num_classes: logits; 0: ``forward`` returns what the head would read.
        reads: ``"embed"``: the head reads the encoder's summary; ``"blocks"``: texture at every depth,
            :meth:`ViTEncoder.block_statistics`.
        **encoder: arguments of :class:`ViTEncoder`; the defaults make a ViT-B/16 at 224.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, num_classes)``.

    Raises:
        ValueError: other reads, or what the encoder refuses.
    """

    def __init__(self, in_channels: int = 3, num_classes: int = 0, *, reads: str = "embed", **encoder: Any):
        super().__init__()
        _check_choice("reads", reads, READS)
        self.encoder, self.reads = ViTEncoder(in_channels, **encoder), reads
        self.head: nn.Module = nn.Identity()
        if num_classes:
            width = self.encoder.embed_dim * (4 * len(self.encoder.blocks) if reads == "blocks" else 1)
            self.head = nn.Linear(width, num_classes)
            nn.init.trunc_normal_(self.head.weight, std=2e-5)
            nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits or embedding; see the class."""
        read = self.encoder.block_statistics if self.reads == "blocks" else self.encoder.embed
        out: Tensor = self.head(read(x))
        return out


def vit_blocks(
    dim: int, depth: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = True, drop_path_rate: float = 0.0
) -> nn.ModuleList:
    """Pre-norm transformer blocks over ``(B, N, dim)``, with a LayerNorm eps of 1e-6 and growing stochastic depth.

    Raises:
        ValueError: heads that do not divide the width.
    """
    check_heads(dim, num_heads)
    rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()
    norm = partial(nn.LayerNorm, eps=EPS)
    return nn.ModuleList(
        Block(dim, num_heads, mlp_ratio=mlp_ratio, qkv_bias=qkv_bias, drop_path=rate, norm_layer=norm) for rate in rates
    )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def _whole_patches(what: str, size: Sequence[int], patch: tuple[int, ...]) -> tuple[int, ...]:
    if any(n < p or n % p for n, p in zip(size, patch, strict=True)):
        fits = tuple(max(-(-n // p), 1) * p for n, p in zip(size, patch, strict=True))
        raise ValueError(f"every side of {what} must be a multiple of the patch {patch}, got {tuple(size)}; use {fits}")
    return tuple(n // p for n, p in zip(size, patch, strict=True))


# --- weights

# names within blocks and outside them, the same in timm, facebookresearch/mae and medical_mae
BLOCK_KEYS = r"((?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))"
ENCODER_KEYS = {
    r"(cls_token|pos_embed)": r"encoder.\1",
    r"patch_embed\.proj\.(weight|bias)": r"encoder.patch_embed.proj.\1",
    rf"blocks\.(\d+)\.{BLOCK_KEYS}": r"encoder.blocks.\1.\2",
}
CLASSIFIER_KEYS = KeyMap(
    "medical_mae classifier",
    {
        **ENCODER_KEYS,
        r"(fc_norm|norm)\.(weight|bias)": r"encoder.\1.\2",
        r"head\.(weight|bias)": r"head.\1",
    },
)
_DECODER_KEYS = r"mask_token|decoder_pos_embed|decoder_(?:embed|norm|pred|blocks)\..*"
MAE_TO_AVG_KEYS = KeyMap(
    "encoder of an MAE, for global_pool='avg'",
    {**ENCODER_KEYS, r"norm\.(weight|bias)": None, _DECODER_KEYS: None},
)
MAE_TO_CLS_KEYS = KeyMap(
    "encoder of an MAE, for global_pool='cls'",
    {**ENCODER_KEYS, r"norm\.(weight|bias)": r"encoder.norm.\1", _DECODER_KEYS: None},
)


# the heads of every published encoder have 64 channels; of other widths nothing tells
_PUBLISHED_WIDTHS = (384, 768, 1024)
ASK_HEADS = {"num_heads": "no shape depends on it"}


def published_heads(dim: int) -> dict[str, int]:
    """``num_heads`` of the published encoders of a width; nothing for other widths."""
    return {"num_heads": dim // 64} if dim in _PUBLISHED_WIDTHS else {}


def infer_encoder(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor values that follow from the shapes of a state dict in the authors' names."""
    kernel = state["patch_embed.proj.weight"]
    patch, dim = tuple(kernel.shape[2:]), kernel.shape[0]
    blocks = {key.split(".")[1] for key in state if key.startswith("blocks.")}
    values: dict[str, Any] = {
        "spatial_dims": len(patch),
        "in_channels": kernel.shape[1],
        "patch_size": patch,
        "embed_dim": dim,
        "depth": len(blocks),
        **published_heads(dim),
        "mlp_ratio": state["blocks.0.mlp.fc1.weight"].shape[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }
    tokens = state["pos_embed"].shape[1] - 1
    edge = round(tokens ** (1 / len(patch)))
    if edge ** len(patch) == tokens:  # otherwise not a cube of patches, and only the user knows
        values["img_size"] = tuple(edge * p for p in patch)
    return values


def _infer_classifier(global_pool: str | None = None) -> Any:
    def infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
        pool = global_pool or ("avg" if "fc_norm.weight" in state else "cls")
        classes = {"num_classes": state["head.weight"].shape[0]} if "head.weight" in state else {}
        return {**infer_encoder(state), "global_pool": pool, **classes}

    return infer


_BLOCKS = r"blocks\.0\.attn\.qkv\.weight"
LAYOUTS = (
    Layout(
        "medical_mae_classifier",
        "vit",
        CLASSIFIER_KEYS,
        # an MAE's encoder without its decoder has neither head nor fc_norm
        marks=(_BLOCKS, r"pos_embed", r"(head|fc_norm)\.weight"),
        infer=_infer_classifier(),
        ask=ASK_HEADS,
    ),
    Layout(
        "mae_encoder",
        "vit",
        MAE_TO_AVG_KEYS,
        marks=(_BLOCKS, r"pos_embed", r"norm\.weight"),
        partial=r"(head|encoder\.fc_norm)\..*",
        infer=_infer_classifier("avg"),
        ask=ASK_HEADS,
    ),
    Layout(
        "mae_encoder_cls",
        "vit",
        MAE_TO_CLS_KEYS,
        marks=(_BLOCKS, r"pos_embed", r"norm\.weight"),
        partial=r"head\..*",
        infer=_infer_classifier("cls"),
        ask=ASK_HEADS,
    ),
)
