"""Swin UNETR's pre-training, in 2D and 3D: paint in what is gone, tell the rotation, know one's other view.

Tang et al., "Self-Supervised Pre-Training of Swin Transformers for 3D Medical Image Analysis" (CVPR 2022);
Project-MONAI/research-contributions ``SwinUNETR/Pretrain``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.dims import conv, instance_norm, interpolation
from medvit.models.encoder import check_image
from medvit.models.swin import SwinEncoder
from medvit.models.weights import KeyMap
from medvit.pretrain.masking import Corruption, GroupMask, GroupReplacement
from medvit.pretrain.objective import Losses, from_processes, image_of, row_of

_BOXES = GroupMask(edges=(0.05, 0.25))
DROPPED = (
    GroupReplacement((0.0, 0.3), "noise", masking=_BOXES),
    GroupReplacement((0.0, 0.3), "image", masking=_BOXES),
)


def nt_xent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """NT-Xent: of all other vectors, those of all processes, each is to find the other view of its image.

    Args:
        a: ``(n, D)``, one view of each image.
        b: ``(n, D)``, the other views in the same order.
        temperature: divides cosine similarities.

    Source: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (ICML 2020), eq. 1.
    """
    with torch.autocast(a.device.type, enabled=False):
        a, b = F.normalize(a.float(), dim=1), F.normalize(b.float(), dim=1)
        all_a, first = from_processes(a)
        all_b, _ = from_processes(b)
        similarity = torch.cat([a, b]) @ torch.cat([all_a, all_b]).T / temperature
        own = first + torch.arange(len(a), device=a.device)
        itself, other = torch.cat([own, len(all_a) + own]), torch.cat([len(all_a) + own, own])
        rows = torch.arange(len(itself), device=a.device)
        return F.cross_entropy(similarity.index_put((rows, itself), similarity.new_tensor(-float("inf"))), other)


class SwinObjective(nn.Module):
    """Two views of each image, each turned and with parts replaced; three small heads on the deepest map.

    The image head is the authors' ("vae"): convolutions, instance norms and linear upsampling to the full size. The
    heads of rotation and contrast read the mean of the deepest map, which is the encoder's ``embed``, where the
    authors' read its first and its second token.

    Args:
        encoder: with its weights, fresh or trained.
        corruptions: applied to each view one after the other; None: the authors', boxes of noise, then boxes of another
            image, up to 0.3 of the image each.
        weights: of inpainting, rotation and contrast in the sum.
        plane: the two axes of the image in which it is turned; the first two are axial in medvit's order.
        projection: length of the vectors that are contrasted.
        temperature: of the contrast.

    Batches hold ``image`` ``(B, C, *spatial)``: sides multiples of the deepest stride, more than one such cell in all,
    equal in the plane.

    Raises:
        ValueError: weights or a plane that do not fit; in ``forward``, images that do not.
    """

    def __init__(
        self,
        encoder: SwinEncoder,
        *,
        corruptions: Sequence[Corruption] | None = None,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        plane: tuple[int, int] = (0, 1),
        projection: int = 512,
        temperature: float = 0.5,
    ):
        super().__init__()
        if len(weights) != 3 or min(weights) < 0:
            raise ValueError(
                f"weights must be three numbers that are not negative, got {tuple(weights)}; use (1, 1, 1)"
            )
        if len(set(plane)) != 2 or not all(0 <= axis < encoder.spatial_dims for axis in plane):
            raise ValueError(f"plane must be two of the {encoder.spatial_dims} axes, got {tuple(plane)}; use (0, 1)")
        self.encoder = encoder
        self.corruptions = DROPPED if corruptions is None else tuple(corruptions)
        self.weights, self.plane, self.temperature = tuple(weights), tuple(plane), temperature
        self.rotation_head = nn.Linear(encoder.embed_dim, 4)
        self.contrastive_head = nn.Linear(encoder.embed_dim, projection)
        self.image_head = image_head(encoder)

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The weighted sum; parts are ``inpainting`` (mean absolute error), ``rotation`` and ``contrast``."""
        x = image_of(batch, "image")
        self._check(x)
        views = [self.turned(x) for _ in range(2)]
        whole, turns = (torch.cat(both) for both in zip(*views, strict=True))
        deepest = self.encoder(torch.cat([self.corrupted(view) for view, _ in views]))[-1]
        summary = deepest.flatten(2).mean(-1)
        first, second = self.contrastive_head(summary).chunk(2)
        parts = {
            "inpainting": F.l1_loss(self.image_head(deepest).float(), whole.float()),
            "rotation": F.cross_entropy(self.rotation_head(summary).float(), turns),
            "contrast": nt_xent(first, second, self.temperature),
        }
        loss = torch.stack([w * part for w, part in zip(self.weights, parts.values(), strict=True)]).sum()
        return Losses(loss, {name: part.detach() for name, part in parts.items()})

    def after_step(self, progress: float) -> None:
        """Nothing: there is no teacher."""

    def turned(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images each turned by a random number of quarters, and these numbers, int64 ``(B,)``."""
        turns = torch.randint(4, (len(x),))
        first, second = (1 + axis for axis in self.plane)
        images = [image.rot90(int(turn), (first, second)) for image, turn in zip(x, turns, strict=True)]
        return torch.stack(images), turns.to(x.device)

    def corrupted(self, x: Tensor) -> Tensor:
        """Images after all corruptions."""
        for corruption in self.corruptions:
            x = corruption(x).image
        return x

    def export(self) -> dict[str, Tensor]:
        """The encoder in MONAI's names, which the layout ``monai-ssl`` of Swin UNETR loads into a network.

        ``load_weights(network.encoder, objective.encoder.state_dict())`` does the same without it. ``medvit convert``
        takes files of this layout for MONAI's, whose order of patch merging was another: give it ``downsample``.

        Raises:
            WeightsMismatch: an encoder with ``use_v2``, whose convolutions this layout lacks.
        """
        return MONAI_SSL_NAMES.apply(self.encoder.state_dict())

    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first image: whole, corrupted, painted in; see ``row_of``."""
        x = image_of(batch, "image")
        corrupted = self.corrupted(x)
        painted = self.image_head(self.encoder(corrupted)[-1])
        return {"inpainting": row_of(x[0], corrupted[0], painted[0])}

    def _check(self, x: Tensor) -> None:
        check_image(x, self.encoder.in_channels, self.encoder.spatial_dims)
        sides, cell = tuple(x.shape[2:]), self.encoder.strides[-1]
        if sides == cell or any(n % c for n, c in zip(sides, cell, strict=True)):
            fits = tuple(max(-(-n // c), 1) * c for n, c in zip(sides, cell, strict=True))
            fits = tuple(2 * n for n in fits) if fits == cell else fits
            raise ValueError(
                f"every side must be a multiple of {cell} and the image larger than one such cell, got {sides}; "
                f"use {fits}"
            )
        if sides[self.plane[0]] != sides[self.plane[1]]:
            raise ValueError(f"the image must be square in the plane {self.plane} in which it is turned, got {sides}")


def image_head(encoder: SwinEncoder) -> nn.Sequential:
    """The deepest map to an image: per level a convolution that narrows, norm, LeakyReLU and linear upsampling."""
    dims, levels = encoder.spatial_dims, list(zip(encoder.channels, encoder.strides, strict=True))[::-1]
    parts: list[nn.Module] = []
    finer = [*levels[1:], (encoder.channels[0], (1,) * dims)]
    for (width, stride), (narrower, below) in zip(levels, finer, strict=True):
        scale = tuple(float(n // b) for n, b in zip(stride, below, strict=True))
        parts += [
            conv(dims, width, narrower, 3, padding=1),
            instance_norm(dims, narrower),
            nn.LeakyReLU(),
            nn.Upsample(scale_factor=scale, mode=interpolation(dims), align_corners=False),
        ]
    return nn.Sequential(*parts, conv(dims, encoder.channels[0], encoder.in_channels, 1))


# the way back of SSL_KEYS in medvit.models.swin_unetr
_BLOCK, _MONAI_BLOCK = r"stages\.(\d+)\.blocks\.(\d+)\.", r"layers{\1+1}.0.blocks.\2."
MONAI_SSL_NAMES = KeyMap(
    "medvit Swin encoder",
    {
        r"(patch_embed\.(?:proj|norm)\.(?:weight|bias))": r"\1",
        rf"{_BLOCK}attn\.relative_bias\.table": rf"{_MONAI_BLOCK}attn.relative_position_bias_table",
        rf"{_BLOCK}((?:norm[12]|attn\.(?:qkv|proj)|mlp\.fc[12])\.(?:weight|bias))": rf"{_MONAI_BLOCK}\3",
        r"stages\.(\d+)\.merge\.((?:norm|reduction)\.(?:weight|bias))": r"layers{\1+1}.0.downsample.\2",
    },
)
