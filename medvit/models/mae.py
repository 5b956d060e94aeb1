"""Masked autoencoder in 2D and 3D: an encoder of the visible patches, a small decoder that paints the hidden ones.

He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), facebookresearch/mae; for chest X-rays
Xiao et al., "Delving into Masked Autoencoders for Multi-Label Thorax Disease Classification" (WACV 2023),
lambert-x/medical_mae ``models_mae.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medvit.layers.masking import Masking, hidden_patch_loss, patchify, random_masking, unpatchify
from medvit.layers.position import resize_position, sincos_position
from medvit.models.vit import ASK_HEADS, BLOCK_KEYS, ENCODER_KEYS, EPS, ViTEncoder, infer_encoder, vit_blocks
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of a batch of images with N patches, K of them visible.

    Attributes:
        loss: scalar, see :func:`~medvit.layers.masking.hidden_patch_loss`.
        pred: ``(B, N, P)``, predicted pixels of every patch, see :func:`~medvit.layers.masking.patchify`.
        mask: ``(B, N)``, 1 where a patch was hidden.
        latent: ``(B, 1 + K, embed_dim)``, the encoder's cls and visible tokens, these in ascending order of noise.
        ids_restore: ``(B, N)``, for each patch its place among ``[visible, hidden]``.
    """

    loss: Tensor
    pred: Tensor
    mask: Tensor
    latent: Tensor
    ids_restore: Tensor


class MAEDecoder(nn.Module):
    """Visible tokens to a vector for every patch.

    Args:
        in_dim: channels of the encoder's tokens.
        out_dim: numbers per patch.
        grid: tokens per axis that the fixed position table is made for.
        dim: channels within.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio, qkv_bias: see :class:`~medvit.models.vit.ViTEncoder`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        grid: Sequence[int],
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
    ):
        super().__init__()
        self.grid = tuple(grid)
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(sincos_position(dim, self.grid), requires_grad=False)
        self.blocks = vit_blocks(dim, depth, num_heads, mlp_ratio, qkv_bias)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.pred = nn.Linear(dim, out_dim)

    def forward(self, latent: Tensor, masking: Masking, grid: Sequence[int]) -> Tensor:
        """Tokens ``(B, 1 + K, in_dim)``, cls first, to ``(B, prod(grid), out_dim)`` in raster order."""
        x = self.embed(latent)
        x = torch.cat([x[:, :1], masking.fill(x[:, 1:], self.mask_token)], dim=1)
        x = x + resize_position(self.pos_embed, self.grid, grid)
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.pred(self.norm(x)[:, 1:])
        return out


@register("mae")
class MAE(nn.Module):
    """Pre-training network; the defaults make the authors' ViT-B/16 with a decoder of 512 channels and 8 blocks.

    Args:
        in_channels: image channels.
        spatial_dims, img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, qkv_bias: of the encoder, see
            :class:`~medvit.models.vit.ViTEncoder`; its positions are fixed sine-cosine ones. Other sizes than
            ``img_size`` resize both position tables.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: the loss is on pixels normalised per patch.
        mask_ratio: fraction of the patches that ``forward`` hides unless told otherwise.

    ``encoder`` sees whole images and takes no part in masking when called by itself.
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
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        norm_pix_loss: bool = False,
        mask_ratio: float = 0.75,
    ):
        super().__init__()
        self.norm_pix_loss, self.mask_ratio = norm_pix_loss, mask_ratio
        self.encoder = ViTEncoder(
            in_channels,
            spatial_dims=spatial_dims,
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
            global_pool="cls",
            position="sincos",
        )
        self.decoder = MAEDecoder(
            embed_dim,
            prod(self.encoder.patch_size) * in_channels,
            self.encoder.grid,
            dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=qkv_bias,
        )
        initialise(self)

    def forward(
        self,
        x: Tensor,
        mask_ratio: float | None = None,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Reconstruction:
        """Hide, encode, reconstruct, compare.

        Args:
            x: ``(B, in_channels, *spatial)``.
            mask_ratio: see :func:`~medvit.layers.masking.random_masking`; None: the constructor's.
            noise: ``(B, N)``, decides what is hidden; None: drawn uniformly from [0, 1).
            generator: source of the noise, on the device of ``x``; None: torch's global one.

        Raises:
            ValueError: an image that does not fit, noise of another shape, a ratio that leaves nothing visible.
        """
        grid = self.encoder.grid_of(x)
        if noise is None:
            noise = torch.rand(x.shape[0], prod(grid), device=x.device, generator=generator)
        if noise.shape != (x.shape[0], prod(grid)):
            raise ValueError(
                f"noise must be (B, tokens) = {(x.shape[0], prod(grid))} for this batch, got {tuple(noise.shape)}"
            )
        masking = random_masking(noise, self.mask_ratio if mask_ratio is None else mask_ratio)
        latent = self.encoder.tokens(x, masking)
        pred = self.decoder(latent, masking, grid)
        target = patchify(x, self.encoder.patch_size)
        loss = hidden_patch_loss(pred, target, masking.mask, norm_pix=self.norm_pix_loss)
        return Reconstruction(loss, pred, masking.mask, latent, masking.restore)

    def patchify(self, x: Tensor) -> Tensor:
        """Images ``(B, in_channels, *spatial)`` to patch vectors; see :func:`~medvit.layers.masking.patchify`."""
        self.encoder.grid_of(x)
        return patchify(x, self.encoder.patch_size)

    def unpatchify(self, patches: Tensor, spatial: Sequence[int] | None = None) -> Tensor:
        """Patch vectors, e.g. ``pred``, to images of size ``spatial`` (None: the size the network was made for)."""
        patch = self.encoder.patch_size
        grid = self.encoder.grid if spatial is None else [n // p for n, p in zip(spatial, patch, strict=True)]
        return unpatchify(patches, patch, grid)


def initialise(network: nn.Module) -> None:
    """The authors' initial weights: Xavier-uniform for linear layers and patch embeddings, 0.02 normal for tokens.

    The patch embedding counts as a linear layer of the flattened patch.
    """
    for name, parameter in network.named_parameters():
        if name.endswith(("cls_token", "mask_token")):
            nn.init.normal_(parameter, std=0.02)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.xavier_uniform_(module.weight.data.flatten(1))


# --- weights

MAE_KEYS = KeyMap(
    "medical_mae",
    {
        **ENCODER_KEYS,
        r"norm\.(weight|bias)": r"encoder.norm.\1",
        r"mask_token": r"decoder.mask_token",
        r"decoder_pos_embed": r"decoder.pos_embed",
        r"decoder_(embed|norm|pred)\.(weight|bias)": r"decoder.\1.\2",
        rf"decoder_blocks\.(\d+)\.{BLOCK_KEYS}": r"decoder.blocks.\1.\2",
    },
)


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    width = state["decoder_embed.weight"].shape[0]
    blocks = {key.split(".")[1] for key in state if key.startswith("decoder_blocks.")}
    # every published decoder has 16 heads and one of these widths; of other widths nothing tells
    heads = {"decoder_num_heads": 16} if width in (128, 512) else {}
    return {**infer_encoder(state), "decoder_embed_dim": width, "decoder_depth": len(blocks), **heads}


LAYOUTS = (
    Layout(
        "medical_mae",
        "mae",
        MAE_KEYS,
        marks=(r"blocks\.0\.attn\.qkv\.weight", r"decoder_embed\.weight", r"decoder_pos_embed"),
        infer=_infer,
        ask={**ASK_HEADS, "decoder_num_heads": ASK_HEADS["num_heads"]},
    ),
)
