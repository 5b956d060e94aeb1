"""Reduced precision as a property of how a network is run, not of the network."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor

_FAST_CPUS = ("AVX512", "AMX", "SVE")  # on others a convolution in bfloat16 takes a hundred times as long as in float32
_log = logging.getLogger("medvit")


class Autocast(Inferer):  # type: ignore[misc]  # MONAI ships no types
    """Runs another inferer under ``torch.autocast`` and returns float32 logits, one tensor or a list, on any device.

    MONAI's engines autocast on CUDA only; bfloat16 doubles the speed of convolutions on many CPUs too. On CPUs without
    vector instructions for it the inferer runs in float32, and the log ``medvit`` says so once.

    Args:
        inferer: the inferer to run, e.g. ``monai.inferers.SimpleInferer()``.
        enabled: False runs it as it is.
        dtype: ``"bfloat16"`` or ``"float16"``.

    Raises:
        ValueError: another dtype.
    """

    def __init__(self, inferer: Inferer, enabled: bool = True, dtype: str = "bfloat16"):
        super().__init__()
        kinds = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in kinds:
            raise ValueError(f"autocast dtype must be one of {sorted(kinds)}, got {dtype!r}")
        self.inferer, self.enabled, self.dtype = inferer, enabled, kinds[dtype]

    def __call__(self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor | list[Tensor]:
        """Logits of ``inputs`` in float32; a list under deep supervision."""
        enabled = self.enabled and not (inputs.device.type == "cpu" and _slow(torch.backends.cpu.get_cpu_capability()))
        with torch.autocast(inputs.device.type, self.dtype, enabled=enabled):
            logits: Tensor | Sequence[Tensor] = self.inferer(inputs, network, *args, **kwargs)
        return logits.float() if isinstance(logits, Tensor) else [scale.float() for scale in logits]


@cache
def _slow(capability: str) -> bool:
    """Whether a CPU of this capability, in torch's words, computes in 16 bits slowly; asked once."""
    slow = not capability.startswith(_FAST_CPUS)
    if slow:
        _log.warning("this CPU (%s) is slow in 16 bits; float32 is used instead", capability)
    return slow
