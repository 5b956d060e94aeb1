"""Heads that any encoder can feed: a segmentation of the image, classes for it, or its embedding as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.dims import conv, interpolation
from medvit.models.encoder import Encoder
from medvit.registry import create_model, register


def as_encoder(encoder: nn.Module | Mapping[str, Any]) -> nn.Module:
    """An encoder from a network: the network itself, or its ``encoder``.

    Args:
        encoder: a module, or the arguments of :func:`medvit.create_model` (``name`` among them).

    Raises:
        ValueError: neither it nor its ``encoder`` keeps the contract of :class:`~medvit.models.encoder.Encoder`.
    """
    model = create_model(**encoder) if isinstance(encoder, Mapping) else encoder
    for candidate in (model, getattr(model, "encoder", None)):
        if isinstance(candidate, nn.Module) and isinstance(candidate, Encoder):
            return candidate
    raise ValueError(
        f"an encoder needs spatial_dims, in_channels, channels, strides, embed_dim and embed(), or an `encoder` that "
        f"has them; {type(model).__name__} has neither"
    )


@register("segmenter")
class Segmenter(nn.Module):
    """Any encoder, a feature pyramid over its maps and the image itself, and one logit per class and voxel.

    Args:
        encoder: see :func:`as_encoder`.
        out_channels: classes.
        width: channels of the pyramid.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``, any size the encoder takes.

    Source: Lin et al., "Feature Pyramid Networks for Object Detection" (CVPR 2017).
    """

    def __init__(self, encoder: nn.Module | Mapping[str, Any], out_channels: int, *, width: int = 64):
        super().__init__()
        body: Any = as_encoder(encoder)  # a module and an Encoder: a type that Python cannot spell
        dims, channels, image = body.spatial_dims, body.channels, body.in_channels
        self.encoder, self.spatial_dims, self.mode = body, dims, interpolation(dims)
        self.lateral = nn.ModuleList(conv(dims, c, width, 1) for c in (image, *channels))
        self.smooth = nn.ModuleList(
            nn.Sequential(conv(dims, width, width, 3, padding=1), nn.GroupNorm(1, width), nn.GELU())
            for _ in range(len(channels))
        )
        self.head = conv(dims, width, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        maps = [lateral(f) for lateral, f in zip(self.lateral, (x, *self.encoder(x)), strict=True)]
        out = maps.pop()
        for finer, smooth in zip(reversed(maps), self.smooth, strict=True):
            out = smooth(finer + F.interpolate(out, finer.shape[2:], mode=self.mode, align_corners=False))
        logits: Tensor = self.head(out)
        return logits


@register("classifier")
class Classifier(nn.Module):
    """Any encoder's summary vector, normalised, and one logit per class.

    Args:
        encoder: see :func:`as_encoder`.
        num_classes: classes.
        frozen: train the head alone: a linear probe.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, num_classes)``.
    """

    def __init__(self, encoder: nn.Module | Mapping[str, Any], num_classes: int, *, frozen: bool = False):
        super().__init__()
        body: Any = as_encoder(encoder)
        self.encoder, self.frozen = body, frozen
        self.norm, self.head = nn.LayerNorm(body.embed_dim), nn.Linear(body.embed_dim, num_classes)
        if frozen:
            body.requires_grad_(False)

    def train(self, mode: bool = True) -> Classifier:
        """As of any module; a frozen encoder stays in evaluation mode, or it would drop paths."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits; see the class."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            vector = self.encoder.embed(x)
        logits: Tensor = self.head(self.norm(vector))
        return logits


@register("embedder")
class Embedder(nn.Module):
    """Any encoder's summary vector and nothing else: one tensor out, as bundles and exports need it.

    It has no parameters of its own: its state is that of the encoder, below the name ``encoder``.

    Args:
        encoder: see :func:`as_encoder`.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, embed_dim)``.
    """

    def __init__(self, encoder: nn.Module | Mapping[str, Any]):
        super().__init__()
        body: Any = as_encoder(encoder)
        self.encoder = body

    def forward(self, x: Tensor) -> Tensor:
        """The vector; see the class."""
        vector: Tensor = self.encoder.embed(x)
        return vector
