"""Uni4Eye++ as published in code: one decoder, and a dynamic head that mixes its predictions by image and task.

Cai et al., "Uni4Eye++: A General Masked Image Modeling Multi-modal Pre-training Framework for Ophthalmic Image
Classification and Segmentation" (IEEE TMI 2024); exact against Davidczy/Uni4Eye_pp, 4e984a8. For its checkpoints; new
pre-training wants :class:`~medvit.models.uni4eye.Uni4EyeMAE`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.layers.masking import hidden_patch_loss, patchify, random_masking
from medvit.models.uni4eye import (
    MARKS_2D,
    MARKS_23D,
    Uni4Eye,
    UnifiedDecoder,
    encoder_keys,
    infer_encoder,
    noise_for,
    slab_arguments,
    whole_grid,
)
from medvit.models.vit import ASK_HEADS, BLOCK_KEYS
from medvit.models.weights import KeyMap, Layout
from medvit.registry import register

VOLUMES = ("slab", "cube")


class DynamicHead(nn.Module):
    """A linear map over the patches of each image, made from the image's own tokens and its task.

    Args:
        count: patches N.
        num_tasks: length of the task code.
    """

    def __init__(self, count: int, num_tasks: int):
        super().__init__()
        self.count, self.num_tasks = count, num_tasks
        # a 1 x 1 convolution only for the authors' weight shape
        self.controller = nn.Conv1d(1 + count + num_tasks, count * count + count, 1)

    def forward(self, tokens: Tensor, pred: Tensor, task_id: Tensor | None) -> Tensor:
        """Mix predictions.

        Args:
            tokens: ``(B, 1 + N, D)``, rectified decoder input.
            pred: ``(B, N, P)``.
            task_id: ``(B,)`` int64, or None for a code of zeros.

        Returns:
            ``(B, N, P)``: ``weight @ pred + bias`` with ``(B, N, N)`` weights and ``(B, N, 1)`` biases.

        Raises:
            ValueError: another number of tasks than images, or a task that is none of ``num_tasks``.
        """
        if task_id is not None and task_id.shape != tokens.shape[:1]:
            raise ValueError(
                f"task_id must be one number of the {self.num_tasks} tasks per image, {tuple(tokens.shape[:1])}, "
                f"got {tuple(task_id.shape)}"
            )
        # its outcome is data: a compiled graph leaves the check to one_hot
        if task_id is not None and not torch.compiler.is_compiling() and not _all_below(task_id, self.num_tasks):
            raise ValueError(f"task_id must lie in 0 to {self.num_tasks - 1}, got {task_id.tolist()}")
        if task_id is None:
            code = tokens.new_zeros(tokens.shape[0], self.num_tasks)
        else:
            code = F.one_hot(task_id, self.num_tasks).to(tokens)
        parameters = self.controller(torch.cat([tokens.mean(-1), code], 1)[..., None]).flatten(1)
        weight, bias = parameters.split([self.count * self.count, self.count], 1)
        return torch.baddbmm(bias[..., None], weight.unflatten(1, (self.count, self.count)), pred)


def _all_below(values: Tensor, end: int) -> bool:
    return bool(((values >= 0) & (values < end)).all())


class Uni4EyePPReconstruction(NamedTuple):
    """What :class:`Uni4EyePPMAE` makes of a batch of images with N patches, K of them visible.

    Attributes:
        loss: mean squared error over hidden patches, of ``logits``, or of ``pred`` where an entropy map was given.
        pred: the decoder's values per patch, before the dynamic head, ``(B, N, P)``.
        logits: after it.
        mask: ``(B, N)``, 1 where a patch was hidden.
        latent: ``(B, 1 + K, embed_dim)``, the encoder's cls and visible tokens, these in ascending order of noise.
        ids_restore: ``(B, N)``, for each patch its place among ``[visible, hidden]``.
    """

    loss: Tensor
    pred: Tensor
    logits: Tensor
    mask: Tensor
    latent: Tensor
    ids_restore: Tensor


@register("uni4eye_pp_mae")
class Uni4EyePPMAE(nn.Module):
    """Masked autoencoder of the public Uni4Eye++ code, for 2D and 3D.

    The dynamic head mixes a fixed number of patches, so images have the size of construction; any number of patches
    will do (the authors' code works for 196 alone).

    Args:
        in_channels: channels of 2D images; of volumes too where they are cubes.
        spatial_dims, embed_dim, depth, num_heads, mlp_ratio, positions: see :class:`~medvit.models.uni4eye.Uni4Eye`.
        img_size, patch_size: edge of the square images and patches, in pixels.
        decoder_embed_dim, decoder_depth, decoder_num_heads: of the decoder.
        norm_pix_loss: targets are normalised per patch.
        num_tasks: length of the one-hot task code.
        mask_ratio: fraction of the patches that ``forward`` hides unless told otherwise; the authors' training loop has
            0.5, whatever its argument says.
        volume: ``"slab"``: volumes ``(B, 1, S, 3, S)`` in patches ``(p, 3, p)``, for which the authors' 3D decoder and
            loss are made, though they published no such embedding. ``"cube"``: their published one, ``(B, C, S, S,
            S // 2)`` in patches ``(p, p, p)``, and so their checkpoints: volumes can be encoded, not reconstructed,
            since the decoder predicts ``3 * p * p`` values per patch.

    Raises:
        ValueError: arguments, or inputs of ``forward``, that do not fit.
    """

    def __init__(
        self,
        in_channels: int = 3,
        *,
        spatial_dims: int = 2,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        num_tasks: int = 7,
        mask_ratio: float = 0.5,
        volume: str = "slab",
        positions: str = "sincos",
    ):
        super().__init__()
        if volume not in VOLUMES:
            raise ValueError(f"volume must be one of {VOLUMES}, got {volume!r}")
        images: dict[str, Any] = {"in_channels": in_channels, "img_size": img_size, "patch_size": patch_size}
        self.encoder = Uni4Eye(
            **(slab_arguments(**images) if volume == "slab" else images),
            spatial_dims=spatial_dims,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
        )
        self.norm_pix_loss, self.mask_ratio = norm_pix_loss, mask_ratio
        grids = self.encoder.pos_embed.grids
        self.decoder = UnifiedDecoder(
            embed_dim,
            grids,
            {2: patch_size**2 * in_channels, 3: patch_size**2 * 3},
            dim=decoder_embed_dim,
            depth=decoder_depth,
            num_heads=decoder_num_heads,
            mlp_ratio=mlp_ratio,
            positions=positions,
        )
        self.head = DynamicHead(prod(grids[2]), num_tasks)

    def forward(
        self,
        x: Tensor,
        mask_ratio: float | None = None,
        *,
        task_id: Tensor | None = None,
        noise: Tensor | None = None,
        entropy: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Uni4EyePPReconstruction:
        """Hide patches, reconstruct them.

        Args:
            x: images ``(B, C, S, S)``, or volumes as ``volume`` says.
            mask_ratio: see :func:`~medvit.layers.masking.random_masking`; None: the constructor's.
            task_id: ``(B,)`` int64, which of the tasks (kinds of image) each is of; None: a code of zeros.
            noise: ``(B, N)``, decides what is hidden; None: drawn uniformly from [0, 1).
            entropy: ``(B, N)`` in [0, 1], multiplies the noise, so that informative patches are hidden more often; the
                loss is then taken before the dynamic head, as in the authors' ``imgen`` variant.
            generator: source of the noise, on the device of ``x``; None: torch's global one.
        """
        grid = whole_grid(self.encoder.patch_embed, x)
        patch = self._reconstructible(x, grid)
        noise = noise_for(x, grid, noise, generator)
        if entropy is not None:
            noise = noise * noise_for(x, grid, entropy)
        masking = random_masking(noise, self.mask_ratio if mask_ratio is None else mask_ratio)
        latent = self.encoder.tokens(x, masking)
        # the authors' pooling rectifies in place, and the decoder goes on with what it leaves
        tokens = self.decoder.fill(latent, masking, grid).relu()
        pred = self.decoder.predict(tokens, len(grid))
        logits = self.head(tokens, pred, task_id)
        judged = logits if entropy is None else pred
        loss = hidden_patch_loss(judged, patchify(x, patch), masking.mask, norm_pix=self.norm_pix_loss)
        return Uni4EyePPReconstruction(loss, pred, logits, masking.mask, latent, masking.restore)

    def _reconstructible(self, x: Tensor, grid: tuple[int, ...]) -> tuple[int, ...]:
        embed = self.encoder.patch_embed
        rank, patch = len(grid), embed.patch_size[len(grid)]
        values, predicted = prod(patch) * embed.in_channels[rank], self.decoder.pred[str(rank)].out_features
        if values != predicted:
            raise ValueError(
                f"the decoder predicts {predicted} values per patch and {patch} patches have {values}: volumes in "
                "cubes are encoded only (`encoder`); reconstruct them with volume='slab' or with 'uni4eye_mae'"
            )
        if prod(grid) != self.head.count:
            whole = tuple(g * p for g, p in zip(self.encoder.pos_embed.grids[rank], patch, strict=True))
            raise ValueError(
                f"the dynamic head mixes {self.head.count} patches: sides {whole}, got {tuple(x.shape[2:])}"
            )
        return patch


# --- weights of Davidczy/Uni4Eye_pp


def _infer(state: Mapping[str, Tensor]) -> dict[str, Any]:
    arguments = infer_encoder(state)
    volume = "slab" if isinstance(arguments["patch_size"], dict) else "cube"
    if volume == "slab":
        arguments.update({name: arguments[name][2] for name in ("in_channels", "img_size", "patch_size")})
    count = arguments["img_size"] // arguments["patch_size"]
    width = state["decoder_embed.weight"].shape[0]
    return {
        **arguments,
        "decoder_embed_dim": width,
        **({"decoder_num_heads": 16} if width == 512 else {}),  # of all published models
        "decoder_depth": len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")}),
        "num_tasks": state["controller.weight"].shape[1] - 1 - count**2,
        "volume": volume,
    }


PP_KEYS = KeyMap(
    "uni4eye_pp",
    {
        **encoder_keys("encoder."),
        r"decoder_embed\.(weight|bias)": r"decoder.embed.\1",
        r"mask_token": "decoder.mask_token",
        r"decoder_pos_embed([23])": r"decoder.pos_embed.\1",
        r"decoder_pos_embed": "decoder.pos_embed.2",
        rf"decoder_blocks\.(\d+)\.{BLOCK_KEYS}": r"decoder.blocks.\1.\2",
        r"decoder_norm\.(weight|bias)": r"decoder.norm.\1",
        r"decoder_pred([23])\.(weight|bias)": r"decoder.pred.\1.\2",
        r"decoder_pred\.(weight|bias)": r"decoder.pred.2.\1",
        r"controller\.(weight|bias)": r"head.controller.\1",
        r"mlp\.(weight|bias)": None,  # declared by the authors, never used
    },
)

_ASK = {**ASK_HEADS, "decoder_num_heads": "no shape depends on it"}

LAYOUTS = (
    Layout("uni4eye_pp", "uni4eye_pp_mae", PP_KEYS, (*MARKS_23D, r"controller\.weight"), infer=_infer, ask=_ASK),
    Layout(
        "uni4eye_pp_2d",
        "uni4eye_pp_mae",
        PP_KEYS,
        MARKS_2D,
        r"encoder\.(patch_embed|pos_embed)\.3.*|decoder\.(pos_embed|pred)\.3.*",
        infer=_infer,
        ask=_ASK,
    ),
)
