"""Masked autoencoder as a pre-training objective, in 2D and 3D, with any strategy of hiding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medvit.layers.masking import patchify, unpatchify
from medvit.models.mae import MAE
from medvit.models.vit import ViTEncoder
from medvit.pretrain.masking import RandomMask, TokenMask, ranking, token_mask
from medvit.pretrain.objective import Losses, image_of, row_of


class MAEObjective(nn.Module):
    """Reconstruct hidden patches.

    Args:
        model: the network; its ``mask_ratio`` (0.9 for X-rays) and ``norm_pix_loss`` hold.
        masking: which patches are hidden.

    Batches hold ``image`` ``(B, C, *spatial)`` and, for :class:`~medvit.pretrain.masking.SemanticMask`,
    ``image_weights`` ``(B, 1, *spatial)``.

    Raises:
        ValueError: masking that hides no patches; in ``forward``, a batch without an image, or with one that does not
            fit the network.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022); for X-rays Xiao et al., "Delving
    into Masked Autoencoders for Multi-Label Thorax Disease Classification" (WACV 2023).
    """

    def __init__(self, model: MAE, *, masking: TokenMask | None = None):
        super().__init__()
        self.model, self.masking = model, token_mask(masking, RandomMask())

    @property
    def encoder(self) -> ViTEncoder:
        """The network's encoder."""
        return self.model.encoder

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The mean squared error over hidden patches."""
        x = image_of(batch, "image")
        self.encoder.grid_of(x)
        loss = self.model(x, noise=self._noise(x, batch, progress)).loss
        return Losses(loss, {"reconstruction": loss.detach()})

    def after_step(self, progress: float) -> None:
        """Nothing: there is no teacher."""

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first image: whole, without its hidden patches, and with these reconstructed; see ``row_of``."""
        x = image_of(batch, "image")
        out = self.model(x, noise=self._noise(x, batch, 1.0))
        painted = painted_in(x, out.pred, out.mask, self.encoder.patch_size, norm_pix=self.model.norm_pix_loss)
        return {"reconstruction": row_of(x[0], *(image[0] for image in painted))}

    def _noise(self, x: Tensor, batch: Mapping[str, Tensor], progress: float) -> Tensor:
        weights = batch.get("image_weights")
        return ranking(self.masking, x, self.encoder.patch_size, self.model.mask_ratio, progress, weights)


def painted_in(
    x: Tensor, pred: Tensor, mask: Tensor, patch_size: Sequence[int], *, norm_pix: bool = False
) -> tuple[Tensor, Tensor]:
    """Images without their hidden patches, and with what was predicted in their place.

    Args:
        x: ``(B, C, *spatial)``.
        pred: ``(B, N, P)``, see :func:`~medvit.layers.masking.patchify`.
        mask: ``(B, N)``, 1 where hidden.
        patch_size: per axis.
        norm_pix: predictions are of pixels normalised per patch; each patch's own mean and deviation undo that.

    Returns:
        Two float32 tensors like ``x``; what is hidden is at the minimum of the image.
    """
    grid = [n // p for n, p in zip(x.shape[2:], patch_size, strict=True)]
    patches, hidden = patchify(x.float(), patch_size), mask[..., None].bool()
    pred = pred.float()
    if norm_pix:
        pred = pred * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
    floor = patches.flatten(1).amin(1)[:, None, None]
    return tuple(unpatchify(torch.where(hidden, what, patches), patch_size, grid) for what in (floor, pred))  # type: ignore[return-value]
