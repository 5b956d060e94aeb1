"""A name for a set of weights, so that what was made with them can say so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """Hexadecimal sha256 of names, types, shapes and bits of tensors; neither their order nor their device counts."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().to("cpu", copy=True).contiguous()  # FSDP2 cannot free what numpy has seen
        digest.update(f"{name}\0{value.dtype}\0{tuple(value.shape)}\0".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
