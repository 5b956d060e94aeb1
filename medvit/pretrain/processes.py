"""One process or many: who am I, how do the processes share a network, and how does it become one state again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList

from medvit.errors import OutputError

PARALLEL = ("ddp", "fsdp")


class World:
    """The processes of a run, as torchrun starts them; a single one without it.

    Args:
        device: ``"auto"`` (CUDA where there is one, else the CPU), or a name that torch knows.

    Attributes:
        rank, size: which of how many.
        device: of this process; with several CUDA devices that of its ``LOCAL_RANK``.
    """

    def __init__(self, device: str | torch.device = "auto"):
        if dist.is_initialized():  # the caller's group, such as that of torch.multiprocessing.spawn
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
        else:
            self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        name = ("cuda" if torch.cuda.is_available() else "cpu") if str(device) == "auto" else str(device)
        self.device = torch.device(name)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

    @contextmanager
    def open(self) -> Iterator[None]:
        """Join the process group for the time of the context, unless the caller has done so."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size == 1 or dist.is_initialized():
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", rank=self.rank, world_size=self.size)
        try:
            yield
        finally:
            dist.destroy_process_group()

    def mean(self, values: Tensor) -> Tensor:
        """Mean of a tensor over the processes."""
        if self.size == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.size

    def require_same(self, number: int, what: str) -> None:
        """Refuse processes that do not find the same.

        Raises:
            OutputError: they do not; names all they found.
        """
        if self.size == 1:
            return
        found: list[int] = [0] * self.size
        dist.all_gather_object(found, number)
        if len(set(found)) > 1:
            raise OutputError(f"{what} must be the same for all processes, which found {found}; give them one folder")

    def from_first(self, number: int) -> int:
        """The number that the first process has."""
        if self.size == 1:
            return number
        held = [number]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def share(self, module: nn.Module, parallel: str) -> nn.Module:
        """What to call instead of ``module`` so that gradients are means over the processes; itself if there is one.

        Parameters and buffers become those of the first process. With ``"fsdp"`` the module itself is changed: the
        blocks of its module lists, and the rest as one, hold a part of each tensor (FSDP2).

        Raises:
            ValueError: another name.
        """
        if parallel not in PARALLEL:
            raise ValueError(f"parallel must be one of {PARALLEL}, got {parallel!r}")
        if self.size == 1:
            return module
        if parallel == "fsdp":
            return self._sharded(module)
        # of a network for 2D and 3D images a batch may use one half only
        return DistributedDataParallel(module, find_unused_parameters=True)

    def _sharded(self, module: nn.Module) -> nn.Module:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)
        mesh = init_device_mesh(self.device.type, (self.size,))
        # an adapter stays with the weight that it adapts
        lists = [m for m in module.modules() if isinstance(m, nn.ModuleList) and not isinstance(m, ParametrizationList)]
        for child in reversed(lists):  # lists within lists first
            for block in child:
                if any(True for _ in block.parameters()):
                    fully_shard(block, mesh=mesh)
        fully_shard(module, mesh=mesh)
        return module


def accumulating(shared: nn.Module, last: bool) -> Any:
    """Context for one of several backward passes of a step: only the last one talks to other processes."""
    if isinstance(shared, DistributedDataParallel) and not last:
        return shared.no_sync()
    if isinstance(shared, FSDPModule):
        shared.set_requires_gradient_sync(last)
    return nullcontext()


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Whole parameters throughout a sharded module, for calls of its parts; every process must enter."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.unshard()
    for part in parts[1:]:  # the first is the whole, which keeps its parameters after a call anyway
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts[1:]:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def whole(state: Any) -> Any:
    """A copy of nested dicts, lists and tensors on the CPU, sharded tensors put together; every process must call."""
    if isinstance(state, DTensor):
        state = state.full_tensor()
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    return [whole(value) for value in state] if isinstance(state, list | tuple) else state


def like(value: Tensor, own: Tensor) -> Tensor:
    """``value``, whole, sharded as ``own`` is; itself where that is not sharded, or of another shape."""
    if isinstance(own, DTensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
