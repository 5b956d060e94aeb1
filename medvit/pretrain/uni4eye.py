"""Uni4Eye as a pre-training objective: images and volumes in one step, each as itself and as its gradient map."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medvit.models.uni4eye import Uni4Eye, Uni4EyeMAE, Uni4EyeReconstruction, gradient_map, whole_grid
from medvit.pretrain.mae import painted_in
from medvit.pretrain.masking import RandomMask, TokenMask, ranking, token_mask
from medvit.pretrain.objective import Losses, row_of

RANKS = {"image2d": 2, "image3d": 3}


class Uni4EyeObjective(nn.Module):
    """Reconstruct hidden patches of 2D images and of volumes through one encoder and its two decoders.

    Args:
        model: the network; its ``mask_ratio``, ``norm_pix_loss`` and ``gradient_weight`` hold.
        weights: of the two ranks' losses in the sum, by the names of the batch.
        masking: which patches are hidden.

    Batches hold ``image2d`` ``(B, C, H, W)``, ``image3d`` ``(B', C', H, W, D)``, or both; a rank that is not there adds
    nothing, and what only it uses gets no gradient (data parallel training must then look for unused parameters). For
    :class:`~medvit.pretrain.masking.SemanticMask` they hold ``image2d_weights`` and ``image3d_weights`` too, of one
    channel.

    Raises:
        ValueError: weights that do not name both ranks or are negative; in ``forward``, a batch without images, or
            with images of another rank or size.

    Source: Cai et al., "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer
    for Ophthalmic Image Classification" (MICCAI 2022); the authors take the ranks in turn, epoch by epoch.
    """

    def __init__(
        self, model: Uni4EyeMAE, *, weights: Mapping[str, float] | None = None, masking: TokenMask | None = None
    ):
        super().__init__()
        self.weights = dict(weights or dict.fromkeys(RANKS, 1.0))
        if self.weights.keys() != RANKS.keys() or min(self.weights.values()) < 0:
            raise ValueError(f"weights needs a number that is not negative for each of {list(RANKS)}, got {weights}")
        self.model, self.masking = model, token_mask(masking, RandomMask())

    @property
    def encoder(self) -> Uni4Eye:
        """The network's encoder."""
        return self.model.encoder

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The weighted sum of the ranks' losses; parts are named ``image2d_image``, ``image2d_gradient`` and so on."""
        keys = [key for key in RANKS if key in batch]
        if not keys:
            raise ValueError(f"the batch must hold one of {list(RANKS)} or both, got {sorted(batch)}")
        losses: list[Tensor] = []
        parts: dict[str, Tensor] = {}
        for key in keys:
            out = self._reconstructed(key, batch, progress)
            losses.append(self.weights[key] * out.loss)
            parts |= {f"{key}_image": out.image_loss.detach(), f"{key}_gradient": out.gradient_loss.detach()}
        return Losses(torch.stack(losses).sum(), parts)

    def after_step(self, progress: float) -> None:
        """Nothing: there is no teacher."""

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first image of each rank as image and as gradient map: whole, with holes, reconstructed."""
        rows = {}
        for key in [key for key in RANKS if key in batch]:
            x, out = batch[key], self._reconstructed(key, batch, 1.0)
            patch, norm = self.encoder.patch_embed.patch_size[RANKS[key]], self.model.norm_pix_loss
            image = painted_in(x, out.image, out.mask, patch, norm_pix=norm)
            edges = gradient_map(x)
            gradient = painted_in(edges, out.gradient, out.mask, patch)
            rows[f"{key}_image"] = row_of(x[0], *(part[0] for part in image))
            rows[f"{key}_gradient"] = row_of(edges[0], *(part[0] for part in gradient))
        return rows

    def _reconstructed(self, key: str, batch: Mapping[str, Tensor], progress: float) -> Uni4EyeReconstruction:
        x, rank, embed = batch[key], RANKS[key], self.encoder.patch_embed
        if x.dim() != 2 + rank:
            raise ValueError(f"{key} must have {rank} spatial axes, got shape {tuple(x.shape)}")
        whole_grid(embed, x)
        weights = batch.get(f"{key}_weights")
        noise = ranking(self.masking, x, embed.patch_size[rank], self.model.mask_ratio, progress, weights)
        out: Uni4EyeReconstruction = self.model(x, noise=noise)
        return out
