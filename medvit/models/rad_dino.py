"""RAD-DINO: the DINOv2 vision transformer, with Hugging Face's or the original authors' rule for other image sizes.

Pérez-García et al., "Exploring Scalable Medical Image Encoders Beyond Text Supervision" (Nature Machine Intelligence
2025); Oquab et al., "DINOv2" (TMLR 2024); Darcet et al., "Vision Transformers Need Registers" (ICLR 2024).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from timm.layers import GluMlp, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from medvit.dims import conv, ntuple
from medvit.layers.attention import check_heads
from medvit.layers.position import resize_position
from medvit.models.encoder import check_image, patch_statistics
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

# arguments of resize_position
_INTERPOLATIONS: dict[str, dict[str, Any]] = {"size": {}, "offset": {"offset": 0.1}, "antialias": {"antialias": True}}


@register("rad_dino")
class RadDino(nn.Module):
    """DINOv2 encoder; the defaults are RAD-DINO, ViT-B/14 at 518 x 518.

    Its token sequences are cls, registers, then patches in raster order; only cls and patches have positions.

    Args:
        in_channels: image channels; a grey radiograph is repeated to three.
        spatial_dims: 2, or 3 for the same network over volumes (no published weights).
        img_size: image size that the position table is made for, one number or one per axis; any other size may be
            given to :meth:`forward`.
        patch_size: edge of a patch in voxels, one number or one per axis.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the transformer blocks.
        use_swiglu_ffn: DINOv2-giant's gated MLP, two thirds as wide, instead of the GELU MLP.
        layer_scale_init: initial factor of each residual branch; not 0.
        norm_eps: of every LayerNorm.
        drop_path_rate: probability of dropping a residual branch in training, the same for all blocks.
        num_register_tokens: registers between cls and patches.
        use_mask_token: have the token that stands for masked patches; only :meth:`tokens` with a mask uses it.
        interpolation: of the position table to another grid, always bicubic. ``"size"``: Hugging Face's Dinov2, which
            published RAD-DINO; ``"offset"``: the original DINOv2, whose scale is off by ``0.1 / grid``;
            ``"antialias"``: DINOv2 with registers, both libraries.

    Shapes: ``(B, in_channels, *spatial)`` to one feature map ``(B, embed_dim, *spatial // patch_size)``. Sides that are
    not whole patches lose the rest at their end, as in Hugging Face (the original refuses them).

    Raises:
        ValueError: values that do not fit, at construction or in a forward pass.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        spatial_dims: int = 2,
        img_size: int | Sequence[int] = 518,
        patch_size: int | Sequence[int] = 14,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        use_swiglu_ffn: bool = False,
        layer_scale_init: float = 1.0,
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        num_register_tokens: int = 0,
        use_mask_token: bool = True,
        interpolation: str = "size",
    ):
        super().__init__()
        patch = ntuple(patch_size, spatial_dims, "patch_size")
        image = ntuple(img_size, spatial_dims, "img_size")
        check_heads(embed_dim, num_heads)
        if interpolation not in _INTERPOLATIONS:
            raise ValueError(f"interpolation must be one of {sorted(_INTERPOLATIONS)}, got {interpolation!r}")
        if layer_scale_init == 0:  # timm would leave the scale out
            raise ValueError("layer_scale_init must not be 0; DINOv2 trains from 1e-5, RAD-DINO has 1.0")
        if any(n < p for n, p in zip(image, patch, strict=True)):
            raise ValueError(f"img_size must hold at least one patch of {patch}, got {image}")
        self.spatial_dims, self.in_channels, self.embed_dim = spatial_dims, in_channels, embed_dim
        self.channels, self.strides, self.interpolation = (embed_dim,), (patch,), interpolation
        self.grid = tuple(n // p for n, p in zip(image, patch, strict=True))
        self.prefix = 1 + num_register_tokens
        self.patch_embed = conv(spatial_dims, in_channels, embed_dim, kernel_size=patch, stride=patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + prod(self.grid), embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim)) if use_mask_token else None
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                init_values=layer_scale_init,
                drop_path=drop_path_rate,
                norm_layer=partial(nn.LayerNorm, eps=norm_eps),
                act_layer=nn.SiLU if use_swiglu_ffn else nn.GELU,
                mlp_layer=_swiglu if use_swiglu_ffn else Mlp,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self._initialise()

    def forward(self, x: Tensor) -> list[Tensor]:
        """The normalised patch tokens as one feature map; see the class."""
        patches = self.tokens(x)[:, self.prefix :]
        grid = [n // p for n, p in zip(x.shape[2:], self.strides[0], strict=True)]
        return [patches.transpose(1, 2).reshape(x.shape[0], self.embed_dim, *grid)]

    def embed(self, x: Tensor) -> Tensor:
        """Image ``(B, in_channels, *spatial)`` to its normalised cls token ``(B, embed_dim)``."""
        return self.tokens(x)[:, 0]

    def tokens(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Image ``(B, in_channels, *spatial)`` to normalised tokens ``(B, prefix + N, embed_dim)``.

        Args:
            x: the image.
            mask: bool ``(B, N)``, True where the mask token replaces the patch, in raster order.
        """
        tokens = self._embedded(x, mask)
        for block in self.blocks:
            tokens = block(tokens)
        out: Tensor = self.norm(tokens)
        return out

    def hidden_states(self, x: Tensor, mask: Tensor | None = None) -> list[Tensor]:
        """The embedded tokens and what each block makes of them, ``depth + 1`` tensors; none is normalised."""
        states = [self._embedded(x, mask)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states

    def block_statistics(self, x: Tensor) -> Tensor:
        """Four moments over the patches after every block, ``(B, 4 * depth * embed_dim)``.

        See :func:`~medvit.models.encoder.patch_statistics`.
        """
        return patch_statistics(self.hidden_states(x)[1:], self.prefix)

    def positions(self, grid: Sequence[int]) -> Tensor:
        """Position table ``(1, 1 + N, embed_dim)`` for cls and the patches of ``grid``."""
        return resize_position(self.pos_embed, self.grid, grid, **_INTERPOLATIONS[self.interpolation])

    def _embedded(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check(x)
        patches = self.patch_embed(x)  # the convolution drops what is no whole patch
        tokens = patches.flatten(2).transpose(1, 2)
        if mask is not None:
            tokens = self._masked(tokens, mask)
        positions = self.positions(patches.shape[2:])
        parts = [self.cls_token + positions[:, :1]]
        if self.register_tokens is not None:
            parts.append(self.register_tokens)
        tokens = tokens + positions[:, 1:]
        return torch.cat([part.expand(x.shape[0], -1, -1).to(tokens.dtype) for part in parts] + [tokens], dim=1)

    def _masked(self, tokens: Tensor, mask: Tensor) -> Tensor:
        if self.mask_token is None:
            raise ValueError("this network has no mask token; build it with use_mask_token=True, or give no mask")
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
            raise ValueError(
                f"mask must be bool, one value per patch {tuple(tokens.shape[:2])}, got {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
        return torch.where(mask[..., None], self.mask_token.to(tokens.dtype), tokens)

    def _check(self, x: Tensor) -> None:
        patch = self.strides[0]
        check_image(x, self.in_channels, self.spatial_dims)
        if any(n < p for n, p in zip(x.shape[2:], patch, strict=True)):
            raise ValueError(f"every side must hold at least one patch of {patch}, got {tuple(x.shape[2:])}")

    def _initialise(self) -> None:
        """Hugging Face's initial values: truncated normal of std 0.02, zero biases and mask token."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for token in (self.cls_token, self.pos_embed, self.register_tokens):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)


def _swiglu(in_features: int, hidden_features: int, **options: Any) -> nn.Module:
    """DINOv2's gated MLP: two thirds of the width, rounded up to a multiple of 8; gate and value in one layer."""
    width = (int(hidden_features * 2 / 3) + 7) // 8 * 8
    mlp: nn.Module = GluMlp(in_features, 2 * width, gate_last=False, **options)
    return mlp


# what is one layer here, and its parts in Hugging Face's files (transformers 5 renames them in memory)
_FUSED = (
    ("attention.qkv", ("attention.attention.query", "attention.attention.key", "attention.attention.value")),
    ("attention.qkv", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("mlp.weights_in", ("mlp.gate_proj", "mlp.up_proj")),
)


def _fuse(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put the parts of ``_FUSED`` side by side; what lacks a part is left for the key table to refuse."""
    state = dict(state)
    for fused, parts in _FUSED:
        for key in [key for key in state if f".{parts[0]}." in key]:
            names = [key.replace(parts[0], part) for part in parts]
            if all(name in state for name in names):
                state[key.replace(parts[0], fused)] = torch.cat([state.pop(name) for name in names])
    return state


# classification heads hold the network under a prefix
_ROOT = r"(?:dinov2(?:_with_registers)?\.)?"
_LAYER = _ROOT + r"encoder\.layer\.(\d+)\."
HUGGINGFACE_KEYS = KeyMap(
    "dinov2_huggingface",
    {
        _ROOT + r"embeddings\.(cls_token|mask_token|register_tokens)": r"\1",
        _ROOT + r"embeddings\.position_embeddings": "pos_embed",
        _ROOT + r"embeddings\.patch_embeddings\.projection\.(weight|bias)": r"patch_embed.\1",
        _LAYER + r"(norm[12])\.(weight|bias)": r"blocks.\1.\2.\3",
        _LAYER + r"attention\.qkv\.(weight|bias)": r"blocks.\1.attn.qkv.\2",
        _LAYER + r"attention\.(?:output\.dense|o_proj)\.(weight|bias)": r"blocks.\1.attn.proj.\2",
        _LAYER + r"layer_scale([12])\.lambda1": r"blocks.\1.ls\2.gamma",
        _LAYER + r"mlp\.(fc[12])\.(weight|bias)": r"blocks.\1.mlp.\2.\3",
        _LAYER + r"mlp\.weights_in\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
        _LAYER + r"mlp\.(?:weights_out|down_proj)\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
        _ROOT + r"layernorm\.(weight|bias)": r"norm.\1",
        r"classifier\.(?:weight|bias)": None,
    },
)

# training checkpoints hold blocks in chunks, blocks.CHUNK.N, and the heads beside the backbone
_BLOCK = r"blocks\.(?:\d+\.)?(\d+)\."
DINOV2_KEYS = KeyMap(
    "dinov2",
    {
        r"(cls_token|mask_token|register_tokens|pos_embed)": r"\1",
        r"patch_embed\.proj\.(weight|bias)": r"patch_embed.\1",
        _BLOCK + r"(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)": r"blocks.\1.\2.\3",
        _BLOCK + r"(ls[12])\.gamma": r"blocks.\1.\2.gamma",
        _BLOCK + r"mlp\.w12\.(weight|bias)": r"blocks.\1.mlp.fc1.\2",
        _BLOCK + r"mlp\.w3\.(weight|bias)": r"blocks.\1.mlp.fc2.\2",
        r"norm\.(weight|bias)": r"norm.\1",
        r"(?:dino|ibot)_head\..*": None,
    },
)


# the heads of every published DINOv2 have 64 channels; of other widths nothing tells
_PUBLISHED_WIDTHS = (384, 768, 1024, 1536)
_ASK = {"num_heads": "no shape depends on it"}


def _infer(keys: KeyMap, rule: str, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor values that follow from a foreign state dict; ``rule`` is how its library interpolates."""
    ours = keys.apply(_fuse(dict(state)))
    dim, channels, *patch = ours["patch_embed.weight"].shape
    widened, hidden = ours["blocks.0.mlp.fc1.weight"].shape[0], ours["blocks.0.mlp.fc2.weight"].shape[1]
    side = round((ours["pos_embed"].shape[1] - 1) ** (1 / len(patch)))
    registers = ours["register_tokens"].shape[1] if "register_tokens" in ours else 0
    values: dict[str, Any] = {
        "in_channels": channels,
        "spatial_dims": len(patch),
        "img_size": tuple(side * p for p in patch),
        "patch_size": tuple(patch),
        "embed_dim": dim,
        "depth": 1 + max(int(key.split(".")[1]) for key in ours if key.startswith("blocks.")),
        "mlp_ratio": (hidden if widened == hidden else 1.5 * hidden) / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in ours,
        "use_swiglu_ffn": widened != hidden,
        "num_register_tokens": registers,
        "use_mask_token": "mask_token" in ours,
        "interpolation": "antialias" if registers else rule,
    }
    return {**values, "num_heads": dim // 64} if dim in _PUBLISHED_WIDTHS else values


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "dinov2_huggingface",
        "rad_dino",
        HUGGINGFACE_KEYS,
        marks=(_ROOT + r"embeddings\.patch_embeddings\.projection\.weight", _LAYER + r"layer_scale1\.lambda1"),
        transform=_fuse,
        infer=partial(_infer, HUGGINGFACE_KEYS, "size"),
        ask=_ASK,
    ),
    Layout(
        "dinov2",
        "rad_dino",
        DINOV2_KEYS,
        marks=("mask_token", _BLOCK + r"ls1\.gamma"),
        infer=partial(_infer, DINOV2_KEYS, "offset"),
        ask=_ASK,
    ),
)
