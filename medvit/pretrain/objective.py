"""What a pre-training objective promises, and what its processes agree on where several train together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch import distributed as dist


class Losses(NamedTuple):
    """What an objective makes of a batch.

    Attributes:
        loss: scalar to minimise.
        parts: what it is made of, scalars without gradient and before weighting, for the log.
    """

    loss: Tensor
    parts: dict[str, Tensor]


@runtime_checkable
class Objective(Protocol):
    """A ``torch.nn.Module`` that makes a loss of images without labels.

    All randomness comes from torch's global generators, so that their saved state resumes a run exactly.
    """

    @property
    def encoder(self) -> Any:
        """What is exported and probed, a module and a :class:`~medvit.models.encoder.Encoder`."""
        ...

    def __call__(self, batch: Mapping[str, Tensor], progress: float) -> Losses:
        """The loss of a batch; ``progress`` runs from 0 to 1 over the training."""
        ...

    def after_step(self, progress: float) -> None:
        """What follows each step of the optimizer: a teacher's update, or nothing."""
        ...


def image_of(batch: Mapping[str, Tensor], key: str) -> Tensor:
    """An entry of a batch.

    Raises:
        ValueError: it is not there.
    """
    if key not in batch:
        raise ValueError(f"the batch must hold {key!r}, got {sorted(batch)}; rename an entry in the transforms")
    return batch[key]


def row_of(*images: Tensor) -> Tensor:
    """Images side by side, as the optional method ``pictures`` of an objective offers them to be saved.

    Args:
        *images: ``(C, *spatial)`` of one shape. Volumes show the middle slice of their last axis. The first image sets
            the range of grey values.

    Returns:
        float32 ``(rows, columns, 3)`` in [0, 1]; one channel, or channels other than three, are shown as their mean.
    """
    low, high = images[0].min().float(), images[0].max().float()
    flat = []
    for image in images:
        picture = image.float() if image.dim() == 3 else image.float()[..., image.shape[-1] // 2]
        picture = picture if len(picture) == 3 else picture.mean(0, keepdim=True).expand(3, -1, -1)
        flat.append(((picture - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).permute(1, 2, 0))
    return torch.cat(flat, 1)


def several_processes() -> bool:
    """Whether torch.distributed runs, with more than this process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def over_processes(x: Tensor, op: str = "sum") -> Tensor:
    """A tensor reduced over all processes, ``"sum"`` or ``"max"``; itself where there is one. Without gradient."""
    if not several_processes():
        return x
    out = x.detach().clone()
    dist.all_reduce(out, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX)
    return out


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of a row is the sum of what all processes ask of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def from_processes(x: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, and the place of this one's first row among them.

    Gradients go back to the process that each row came from. With the mean of the processes' losses, whose gradients
    data parallel training averages, they are those of one process that has all rows.

    Args:
        x: ``(n, ...)``, n and dtype the same in all processes.
    """
    if not several_processes():
        return x, 0
    gathered: Tensor = _Gather.apply(x)
    return gathered, dist.get_rank() * len(x)
