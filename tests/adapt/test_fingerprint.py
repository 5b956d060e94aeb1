import hashlib

import torch
from torch import nn

from medvit.adapt.fingerprint import state_sha256


def test_it_is_the_hash_of_what_the_document_says():
    state = {"b": torch.tensor([1.5, -2.0]), "a": torch.tensor(3, dtype=torch.int64)}
    text = b"a\0torch.int64\0()\0" + (3).to_bytes(8, "little")
    text += b"b\0torch.float32\0(2,)\0" + bytes.fromhex("0000c03f000000c0")
    assert state_sha256(state) == hashlib.sha256(text).hexdigest()


def test_every_bit_counts_and_the_order_does_not():
    state = nn.Linear(3, 2).state_dict()
    found = state_sha256(state)
    assert state_sha256(dict(reversed(state.items()))) == found
    strided = {name: torch.stack([value, value], dim=-1)[..., 0] for name, value in state.items()}
    assert not strided["weight"].is_contiguous()
    assert state_sha256(strided) == found
    others = (
        {**state, "weight": state["weight"].T},
        {**state, "weight": state["weight"].nextafter(torch.tensor(9.0))},
        {**state, "bias": state["bias"].double()},
        {"weight": state["weight"], "bais": state["bias"]},
    )
    assert len({found, *map(state_sha256, others)}) == 5
    assert state_sha256({"a": torch.ones(2, dtype=torch.bfloat16)}) != state_sha256({"a": torch.ones(2)})
