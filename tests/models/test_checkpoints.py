"""Foreign files: read without running them, and unwrapped to one flat dict of tensors."""

import argparse
import hashlib
import os
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medvit.errors import WeightsMismatch
from medvit.models.checkpoints import read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.count": torch.tensor(7)}


def prefixed(prefix, state=STATE):
    return {prefix + key: value for key, value in state.items()}


def saved(tmp_path, contents, **options):
    path = tmp_path / "model.pth"
    torch.save(contents, path, **options)
    return path


def same(state, expected=STATE):
    return state.keys() == expected.keys() and all(torch.equal(state[k], expected[k]) for k in expected)


def refusal(path, reason):
    return pytest.raises(WeightsMismatch, match=f"^{re.escape(str(path))}: {reason}")


# --- formats


@pytest.mark.parametrize("zipped", [True, False])
def test_both_pickled_formats_are_read(zipped, tmp_path):
    path = saved(tmp_path, STATE, _use_new_zipfile_serialization=zipped)
    checkpoint = read_checkpoint(str(path))
    assert same(checkpoint.state)
    assert checkpoint.format == ("zip" if zipped else "pickle")
    assert (checkpoint.unwrapped, checkpoint.set_aside, checkpoint.header) == ((), (), {})
    assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_safetensors_is_told_by_its_contents_and_brings_its_header(tmp_path):
    path = tmp_path / "model.bin"
    save_file(STATE, path, {"format": "pt", "note": "kept"})
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state)
    assert (checkpoint.format, checkpoint.header["note"]) == ("safetensors", "kept")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16])
def test_tensors_keep_the_type_they_are_stored_in(dtype, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.tensor([0.5, -3.0]).to(dtype)}, path)
    value = read_checkpoint(path).state["w"]
    assert value.dtype == dtype
    assert value.float().tolist() == [0.5, -3.0]


def test_a_missing_file(tmp_path):
    with refusal(tmp_path, "no such weights file$"):
        read_checkpoint(tmp_path)


def test_a_truncated_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(STATE, path)
    path.write_bytes(path.read_bytes()[:-8])
    with refusal(path, r"not a whole safetensors file \(.*\); fetch it again$"):
        read_checkpoint(path)


def test_a_truncated_zip(tmp_path):
    path = saved(tmp_path, STATE)
    path.write_bytes(path.read_bytes()[:-60])
    with refusal(path, r"not readable as a checkpoint \(\w+: .*\); fetch it again if it is damaged$"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not readable as a checkpoint"),
        (b"<html>404</html>", "not read: it is damaged or no checkpoint; nothing but tensors"),
        (b"\x80\x02", "not readable as a checkpoint"),
    ],
)
def test_what_is_no_checkpoint(contents, message, tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(contents)
    with refusal(path, message):
        read_checkpoint(path)


# --- what may be in a pickle


class Attack:
    """Runs a command when it is unpickled without care."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["alone", "beside the weights"])
def test_a_malicious_pickle_is_refused_and_not_executed(where, zipped, tmp_path):
    trap = tmp_path / "executed"
    attack = Attack(f"touch {trap}")
    path = saved(
        tmp_path,
        attack if where == "alone" else {"model": STATE, "args": attack},
        _use_new_zipfile_serialization=zipped,
    )
    with refusal(path, r"not read: it asks for posix\.system, and nothing but tensors, numbers and text is taken from"):
        read_checkpoint(path)
    assert not trap.exists()


def test_objects_of_other_classes_are_refused(tmp_path):
    path = saved(tmp_path, {"model": torch.nn.Linear(1, 1)})
    with refusal(
        path, r"not read: it asks for torch\.nn\.modules\.linear\.Linear, and .* whose code is never run; ask"
    ):
        read_checkpoint(path)


def test_a_namespace_cannot_smuggle_an_object_in(tmp_path):
    trap = tmp_path / "executed"
    path = saved(tmp_path, {"model": STATE, "args": argparse.Namespace(x=Attack(f"touch {trap}"))})
    with refusal(path, "not read: it asks for posix.system"):
        read_checkpoint(path)
    assert not trap.exists()


def test_numpy_arrays_of_objects_are_refused(tmp_path):
    path = saved(tmp_path, {"model": STATE, "history": np.array([1, "x"], dtype=object)})
    with refusal(path, r"not read: it asks for numpy\.\S+\._reconstruct, and"):
        read_checkpoint(path)


def test_reading_leaves_torchs_own_allow_list_as_it_was(tmp_path):
    before = set(map(str, torch.serialization.get_safe_globals()))
    read_checkpoint(saved(tmp_path, STATE))
    assert set(map(str, torch.serialization.get_safe_globals())) == before


def test_an_mae_checkpoint_with_its_arguments(tmp_path):
    contents = {
        "model": STATE,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 799,
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(blr=1.5e-4, model="mae_vit_base_patch16", betas=[0.9, 0.95]),
    }
    checkpoint = read_checkpoint(saved(tmp_path, contents))
    assert same(checkpoint.state)
    assert checkpoint.unwrapped == ("entry 'model'",)
    assert checkpoint.set_aside == ("optimizer", "epoch", "scaler", "args")


@pytest.mark.parametrize("best", [np.float64(0.8123), np.float32(0.5), np.int64(3), np.bool_(True)])
@pytest.mark.parametrize("module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_a_number_of_numpy_beside_the_weights(module, best, tmp_path, monkeypatch):
    """MONAI's Swin UNETR scripts save ``best_acc`` so; numpy before 2 called the module otherwise."""
    scalar = best.__reduce__()[0]
    path = tmp_path / "model.pt"
    torch.save({"epoch": 5, "best_acc": best, "state_dict": STATE}, path, _use_new_zipfile_serialization=False)
    name = scalar.__module__.encode()
    data = path.read_bytes()
    assert name in data
    path.write_bytes(data.replace(name, module.encode()))
    checkpoint = read_checkpoint(path)
    assert same(checkpoint.state)
    assert checkpoint.set_aside == ("epoch", "best_acc")


# --- wrappers


@pytest.mark.parametrize("entry", ["state_dict", "model", "model_state_dict", "network", "teacher", "student"])
def test_known_entries_are_opened(entry, tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path, {entry: STATE, "epoch": 3}))
    assert same(checkpoint.state)
    assert (checkpoint.unwrapped, checkpoint.set_aside) == ((f"entry {entry!r}",), ("epoch",))


def test_entries_within_entries(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path, {"state_dict": {"network": STATE, "step": 1}}))
    assert same(checkpoint.state)
    assert checkpoint.unwrapped == ("entry 'state_dict'", "entry 'network'")


def test_a_tensor_beside_the_entry_is_no_weight(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path, {"model": STATE, "loss": torch.tensor(0.1)}))
    assert same(checkpoint.state)
    assert checkpoint.set_aside == ("loss",)


def test_numbers_among_flat_weights_are_set_aside(tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path, {**STATE, "epoch": 3}))
    assert same(checkpoint.state)
    assert checkpoint.set_aside == ("epoch",)


def test_of_dinov2s_two_networks_the_teacher_is_taken_unless_said_otherwise(tmp_path):
    path = saved(tmp_path, {"student": prefixed("", {"w": torch.zeros(1)}), "teacher": STATE})
    assert same(read_checkpoint(path).state)
    assert list(read_checkpoint(path, "student").state) == ["w"]


def test_several_entries_are_not_guessed_between(tmp_path):
    path = saved(tmp_path, {"model": STATE, "state_dict": STATE})
    with refusal(
        path, re.escape("weights under several entries, ['state_dict', 'model']; say which with `entry` (--entry)")
    ):
        read_checkpoint(path)
    assert same(read_checkpoint(path, "model").state)


def test_an_entry_of_another_name_must_be_said(tmp_path):
    path = saved(tmp_path, {"ema": STATE, "epoch": 3})
    with refusal(
        path,
        r"no tensors, and none of the entries \['state_dict', .*\] holds any; the file has \['ema', 'epoch'\]; "
        r"if the weights are one of \['ema'\], say so",
    ):
        read_checkpoint(path)
    assert same(read_checkpoint(path, "ema").state)
    with refusal(path, re.escape("no weights under the entry 'epoch'; there are ['ema']")):
        read_checkpoint(path, "epoch")


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (torch.zeros(1), "holds a Tensor; a dict of tensors is needed$"),
        ([STATE], "holds a list; a dict of tensors is needed$"),
        ({}, r"no tensors, and none of the entries .* holds any; the file has \[\]$"),
        ({"model": {"epoch": 3}}, r"no tensors, .*; the file has \['model'\]$"),
    ],
)
def test_files_without_weights(contents, reason, tmp_path):
    path = saved(tmp_path, contents)
    with refusal(path, reason):
        read_checkpoint(path)


# --- prefixes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "backbone.", "module._orig_mod.", "module.backbone."])
def test_prefixes_of_all_keys_are_taken_off(prefix, tmp_path):
    checkpoint = read_checkpoint(saved(tmp_path, prefixed(prefix)))
    assert same(checkpoint.state)
    assert checkpoint.unwrapped == tuple(f"prefix '{p}.'" for p in prefix[:-1].split("."))


def test_the_heads_of_dinov2_stay_beside_its_backbone(tmp_path):
    heads = {"dino_head.mlp.0.weight": torch.zeros(1), "ibot_head.last_layer.weight": torch.zeros(1)}
    checkpoint = read_checkpoint(saved(tmp_path, {"teacher": prefixed("backbone.") | heads}))
    assert same(checkpoint.state, STATE | heads)
    assert checkpoint.unwrapped == ("entry 'teacher'", "prefix 'backbone.'")


@pytest.mark.parametrize("prefix", ["module.", "backbone."])
def test_a_prefix_of_some_keys_only_is_a_name(prefix, tmp_path):
    state = prefixed(prefix) | {"other.weight": torch.zeros(1)}
    assert same(read_checkpoint(saved(tmp_path, state)).state, state)
