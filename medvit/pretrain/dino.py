"""DINOv2's objective, in 2D and 3D: a student learns what a slow average of itself sees in other crops.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (TMLR 2024), facebookresearch/dinov2; it
joins DINO (Caron et al., ICCV 2021), iBOT (Zhou et al., ICLR 2022), Sinkhorn-Knopp centring (Caron et al., "SwAV",
NeurIPS 2020) and KoLeo (Sablayrolles et al., ICLR 2019). RAD-DINO was trained so from DINOv2's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from itertools import pairwise, takewhile
from math import cos, pi, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.models.rad_dino import RadDino
from medvit.pretrain.masking import BlockMask, SemanticMask, TokenMask, token_mask
from medvit.pretrain.objective import Losses, from_processes, over_processes, row_of

CENTRINGS = ("sinkhorn", "softmax")


# --- heads


class PrototypeHead(nn.Module):
    """Tokens to similarities with prototypes: an MLP with GELU, unit length, a linear layer with weight norm.

    Names of weights are the authors': their ``dino_head`` and ``ibot_head`` load as they are.

    Args:
        dim: channels of the tokens.
        prototypes: outputs K.
        hidden_dim, bottleneck_dim, layers: widths and number of linear layers of the MLP.

    Shapes: ``(..., dim)`` to ``(..., K)``.
    """

    def __init__(
        self, dim: int, *, prototypes: int = 65536, hidden_dim: int = 2048, bottleneck_dim: int = 256, layers: int = 3
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}; use 3")
        widths = [dim, *[hidden_dim] * (layers - 1), bottleneck_dim]
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            linear = nn.Linear(a, b)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            parts += [linear, nn.GELU()]
        self.mlp = nn.Sequential(*parts[:-1])
        self.last_layer = WeightNormLinear(bottleneck_dim, prototypes)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """Similarities; ``frozen`` gives the prototypes a gradient of zero."""
        x = self.mlp(x)
        unit = F.normalize(x, dim=-1, eps=1e-6 if x.dtype == torch.float16 else 1e-12)
        out: Tensor = self.last_layer(unit, frozen)
        return out


class WeightNormLinear(nn.Module):
    """Linear layer without bias whose rows have a learned length ``weight_g`` and direction ``weight_v``."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(out_dim, 1))
        self.weight_v = nn.Parameter(torch.empty(out_dim, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=5**0.5)

    def forward(self, x: Tensor, frozen: bool = False) -> Tensor:
        """``(..., in_dim)`` to ``(..., out_dim)``."""
        weight = self.weight_g * self.weight_v / self.weight_v.norm(dim=1, keepdim=True)
        # zero times it rather than nothing: several processes wait for every gradient
        return F.linear(x, weight.detach() + 0 * weight if frozen else weight)


class Network(nn.Module):
    """An encoder and its heads: the student, or the teacher.

    Args:
        encoder: makes tokens.
        separate: masked patches have a head of their own, ``ibot_head``, instead of sharing ``dino_head``.
        **head: arguments of :class:`PrototypeHead`.
    """

    def __init__(self, encoder: RadDino, separate: bool, **head: int):
        super().__init__()
        self.encoder = encoder
        self.dino_head = PrototypeHead(encoder.embed_dim, **head)
        self.ibot_head = PrototypeHead(encoder.embed_dim, **head) if separate else None

    def patch_logits(self, tokens: Tensor, mask: Tensor, frozen: bool = False) -> Tensor:
        """Logits ``(M, K)`` of the M patches that ``mask`` ``(B, N)`` names, of the encoder's tokens."""
        head = self.dino_head if self.ibot_head is None else self.ibot_head
        out: Tensor = head(tokens[:, self.encoder.prefix :][mask], frozen)
        return out


# --- the teacher's targets


def sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """Soft assignments of samples to prototypes that use all prototypes equally, over all processes.

    ``exp(logits / temperature)``, then in turn each prototype is scaled to an equal share of the samples, and each
    sample to one. The authors' iteration, with the largest logit taken off first, which changes nothing but overflow.

    Args:
        logits: ``(n, K)``; n may differ between processes, and be 0.
        temperature: divides the logits.
        iterations: of the two steps.

    Returns:
        float32 ``(n, K)``; rows sum to one.
    """
    logits = logits.detach().float()
    top = logits.amax() if len(logits) else logits.new_full((), float("-inf"))
    q = ((logits - over_processes(top, "max")) / temperature).exp()
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(iterations):
        q = q / over_processes(q.sum(0)).clamp_min(tiny)
        q = q / q.sum(1, keepdim=True).clamp_min(tiny)
    return q


class Centre(nn.Module):
    """DINO's first way against collapse: logits minus their running mean, then softmax.

    Args:
        prototypes: K.
        momentum: weight of what is there already.

    In training each call moves the mean towards that of its samples, of all processes, after it was used.
    """

    centre: Tensor

    def __init__(self, prototypes: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(prototypes))

    @torch.no_grad()
    def forward(self, logits: Tensor, temperature: float) -> Tensor:
        """``(n, K)`` to float32 ``(n, K)``; rows sum to one."""
        logits = logits.float()
        targets = ((logits - self.centre) / temperature).softmax(1)
        if self.training:
            count = over_processes(logits.new_tensor(float(len(logits))))
            mean = over_processes(logits.sum(0)) / count.clamp_min(1)
            self.centre.lerp_(torch.where(count > 0, mean, self.centre), 1 - self.momentum)
        return targets


# --- losses


def crop_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """DINO: mean cross-entropy over all pairs of a student's and a teacher's crop that are not the same crop.

    Args:
        student: logits ``(S, B, K)``, the global crops first, in the teacher's order.
        teacher: targets ``(G, B, K)`` of the global crops.
        temperature: of the student.
    """
    crops, views = len(student), len(teacher)
    with torch.autocast(student.device.type, enabled=False):
        logs = (student.float() / temperature).log_softmax(-1)
        pairs = -torch.einsum("sbk,gbk->sg", logs, teacher) / student.shape[1]
    same = torch.eye(crops, views, dtype=torch.bool, device=pairs.device)
    return pairs.masked_fill(same, 0).sum() / (crops * views - views)


def patch_loss(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 0.1) -> Tensor:
    """iBOT: cross-entropy of masked patches, averaged over those of each image, then over all images.

    Args:
        student: logits ``(M, K)`` of the masked patches, image by image.
        teacher: their targets.
        mask: bool ``(B, N)`` with M True; images without masked patches count with a loss of zero, as the authors'.
        temperature: of the student.
    """
    losses = -(teacher * (student.float() / temperature).log_softmax(-1)).sum(-1)
    weights = (1 / mask.sum(1, keepdim=True).clamp_min(1)).expand(mask.shape)[mask]
    return (losses * weights).sum() / len(mask)


def koleo(x: Tensor, eps: float = 1e-8) -> Tensor:
    """KoLeo: minus the mean log distance to the nearest other vector, of vectors of unit length.

    Neighbours are looked for among all processes, so that the loss does not depend on their number; the authors look
    within each.

    Args:
        x: ``(n, D)``, one vector per image.
        eps: added to lengths and distances.

    Raises:
        ValueError: one vector alone.
    """
    with torch.autocast(x.device.type, enabled=False):
        unit = F.normalize(x.float(), dim=-1, eps=eps)
        others, first = from_processes(unit)
        if len(others) < 2:
            raise ValueError("KoLeo needs two images in a batch, got 1; use a larger batch or koleo_weight=0")
        own = torch.arange(len(unit), device=x.device)
        dots = (unit @ others.T).detach().index_put((own, first + own), unit.new_tensor(-float("inf")))
        distances = F.pairwise_distance(unit, others[dots.argmax(1)], eps=eps)
        return -(distances + eps).log().mean()


# --- the objective


class DINOObjective(nn.Module):
    """DINO on cls tokens, iBOT on masked patches, KoLeo on cls tokens.

    Args:
        encoder: the student's, with its weights, converted or fresh, and its stochastic depth; needs a mask token for
            iBOT. The teacher starts as its copy.
        separate_head: masked patches have a head of their own.
        centring: of the teacher's logits, ``"sinkhorn"`` or ``"softmax"`` (see :class:`Centre`).
        dino_weight, ibot_weight, koleo_weight: of the three losses; KoLeo's is for each global crop.
        masking: draws iBOT's masks.
        mask_probability: fraction of the global crops that are masked.
        mask_ratio: smallest and largest fraction of patches hidden in these; spread evenly over the batch.
        momentum: of the teacher's average, at the start and at the end; in between half a cosine.
        teacher_temperature: at the start and after the warm-up, which is linear.
        warm_up: fraction of the training.
        student_temperature: the student's.
        freeze_last_layer: fraction of the training, at its start, in which prototypes stay as they are.
        **head: arguments of :class:`PrototypeHead`.

    Batches hold the views of :class:`~medvit.transforms.MultiCropd`: ``image_global_0``, ``image_global_1`` and so on,
    ``(B, C, *spatial)``, and, if wanted, ``image_local_0`` and so on, ``(B, C, *smaller)``. The position table is
    resized to each. All that is scheduled follows ``progress``.

    Attributes:
        student, teacher: each with ``encoder`` and heads. The teacher is never trained nor in training mode.

    Raises:
        ValueError: arguments, or batches in ``forward``, that do not fit.
    """

    def __init__(
        self,
        encoder: RadDino,
        *,
        separate_head: bool = True,
        centring: str = "sinkhorn",
        dino_weight: float = 1.0,
        ibot_weight: float = 1.0,
        koleo_weight: float = 0.1,
        masking: TokenMask | None = None,
        mask_probability: float = 0.5,
        mask_ratio: tuple[float, float] = (0.1, 0.5),
        momentum: tuple[float, float] = (0.992, 1.0),
        teacher_temperature: tuple[float, float] = (0.04, 0.07),
        warm_up: float = 0.3,
        student_temperature: float = 0.1,
        freeze_last_layer: float = 0.01,
        **head: int,
    ):
        super().__init__()
        if centring not in CENTRINGS:
            raise ValueError(f"centring must be one of {CENTRINGS}, got {centring!r}")
        if ibot_weight and encoder.mask_token is None:
            raise ValueError("iBOT needs an encoder with a mask token: use_mask_token=True, or ibot_weight=0")
        low, high = mask_ratio
        if not (0 <= mask_probability <= 1 and 0 <= low <= high < 1):
            raise ValueError(
                f"mask_probability must lie in [0, 1] and mask_ratio be two fractions, the smaller first, got "
                f"{mask_probability} and {tuple(mask_ratio)}; use 0.5 and (0.1, 0.5)"
            )
        self.student = Network(encoder, separate_head and ibot_weight > 0, **head)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()
        count = len(self.student.dino_head.last_layer.weight_g)
        self.dino_centre = Centre(count) if centring == "softmax" else None
        self.ibot_centre = Centre(count) if centring == "softmax" and ibot_weight else None
        self.dino_weight, self.ibot_weight, self.koleo_weight = dino_weight, ibot_weight, koleo_weight
        if isinstance(masking, SemanticMask):
            raise ValueError("SemanticMask needs weights, which the views of DINO lack; use BlockMask or RandomMask")
        self.masking = token_mask(masking, BlockMask())
        self.mask_probability, self.mask_ratio = mask_probability, (low, high)
        self.momentum, self.teacher_temperature, self.warm_up = tuple(momentum), tuple(teacher_temperature), warm_up
        self.student_temperature, self.freeze_last_layer = student_temperature, freeze_last_layer

    @property
    def encoder(self) -> RadDino:
        """The teacher's: what the authors evaluate and publish."""
        return self.teacher.encoder

    def train(self, mode: bool = True) -> DINOObjective:
        """Training or evaluation mode for all but the teacher, which stays in the latter."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The weighted sum; parts are ``dino``, ``ibot`` and ``koleo``."""
        crops = self._crops(batch, "global", at_least=2)
        views, images = len(crops), len(crops[0])
        x = torch.cat(crops)
        mask = self.masks(len(x), self._grid(x)).to(x.device) if self.ibot_weight else None
        frozen = progress < self.freeze_last_layer
        cls_targets, patch_targets = self._targets(x, mask, progress)
        tokens = self.student.encoder.tokens(x, mask)
        cls = tokens[:, 0]
        local = self._crops(batch, "local", at_least=0, images=images)
        every = torch.cat([cls, self.student.encoder.tokens(torch.cat(local))[:, 0]]) if local else cls
        logits = self.student.dino_head(every, frozen).reshape(-1, images, cls_targets.shape[1])
        targets = cls_targets.reshape(views, images, -1)
        parts = {"dino": crop_loss(logits, targets, self.student_temperature)}
        loss = self.dino_weight * parts["dino"]
        if self.koleo_weight:
            parts["koleo"] = torch.stack([koleo(crop) for crop in cls.chunk(views)]).mean()
            loss = loss + self.koleo_weight * views * parts["koleo"]
        if mask is not None and patch_targets is not None:
            patches = self.student.patch_logits(tokens, mask, frozen)
            parts["ibot"] = patch_loss(patches, patch_targets, mask, self.student_temperature)
            loss = loss + self.ibot_weight * parts["ibot"]
        return Losses(loss, {name: part.detach() for name, part in parts.items()})

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher: ``teacher = m * teacher + (1 - m) * student``, with :meth:`teacher_momentum` m."""
        m = self.teacher_momentum(progress)
        for slow, fast in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            slow.mul_(m).add_(fast, alpha=1 - m)

    def teacher_momentum(self, progress: float) -> float:
        """Weight of the teacher in its average."""
        start, end = self.momentum
        return end + (start - end) * (1 + cos(pi * progress)) / 2

    def temperature(self, progress: float) -> float:
        """The teacher's temperature."""
        start, end = self.teacher_temperature
        return end if progress >= self.warm_up else start + (end - start) * progress / self.warm_up

    def masks(self, count: int, grid: Sequence[int]) -> Tensor:
        """Masks for global crops, bool ``(count, N)``: some have none, ratios of the others are spread evenly."""
        masked = int(count * self.mask_probability)
        low, high = self.mask_ratio
        share = (torch.arange(masked) + torch.rand(masked)) / max(masked, 1)
        hidden = [int(prod(grid) * (low + (high - low) * s)) for s in share.tolist()] + [0] * (count - masked)
        return self.masking(grid, [hidden[i] for i in torch.randperm(count).tolist()])

    @torch.no_grad()
    def pictures(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first image and where its cls token looks in the last block, mean over heads; see ``row_of``."""
        x = self._crops(batch, "global", at_least=1)[0][:1]
        grid = self._grid(x)
        attention = cls_attention(self.encoder.blocks[-1], self.encoder.hidden_states(x)[-2])[:, self.encoder.prefix :]
        look = F.interpolate(attention.reshape(1, 1, *grid), x.shape[2:]).expand_as(x)[0]
        low, high = x.min(), x.max()
        return {"attention": row_of(x[0], low + (high - low) * look / look.max())}

    @torch.no_grad()
    def _targets(self, x: Tensor, mask: Tensor | None, progress: float) -> tuple[Tensor, Tensor | None]:
        tokens, temperature = self.teacher.encoder.tokens(x), self.temperature(progress)
        cls = self._centred(self.dino_centre, self.teacher.dino_head(tokens[:, 0]), temperature)
        if mask is None:
            return cls, None
        return cls, self._centred(self.ibot_centre, self.teacher.patch_logits(tokens, mask), temperature)

    @staticmethod
    def _centred(centre: Centre | None, logits: Tensor, temperature: float) -> Tensor:
        if centre is None:
            return sinkhorn(logits, temperature)
        targets: Tensor = centre(logits, temperature)
        return targets

    def _crops(self, batch: Mapping[str, Tensor], kind: str, at_least: int, images: int | None = None) -> list[Tensor]:
        """All ``image_{kind}_0``, ``image_{kind}_1`` ... there are."""
        names = [f"image_{kind}_{i}" for i in range(len(batch))]
        crops = [batch[name] for name in takewhile(batch.__contains__, names)]
        wrong = any(crop.shape != crops[0].shape or len(crop) != (images or len(crop)) for crop in crops)
        if wrong or len(crops) < at_least:
            raise ValueError(
                f"{at_least} or more {kind} crops of one shape, of the same images, are needed: image_{kind}_0 and so "
                f"on; got { ({name: tuple(value.shape) for name, value in batch.items()}) }"
            )
        return crops

    def _grid(self, x: Tensor) -> list[int]:
        return [n // p for n, p in zip(x.shape[2:], self.encoder.strides[0], strict=True)]


def cls_attention(block: Any, tokens: Tensor) -> Tensor:
    """Attention of the first token to all of ``(B, N, C)`` in a block of timm's, mean over heads, ``(B, N)``."""
    attn = block.attn
    q, k, _ = attn.qkv(block.norm1(tokens)).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)
    out: Tensor = (torch.einsum("bhd,bnhd->bhn", q[:, 0], k) * attn.scale).softmax(-1).mean(1)
    return out
