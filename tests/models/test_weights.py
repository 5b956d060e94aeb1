"""Loading weights: every key accounted for, or nothing loaded."""

import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvit.errors import WeightsMismatch
from medvit.models.weights import KeyMap, Layout, file_sha256, load_weights, read_state

KEYS = KeyMap(
    "theirs",
    {
        r"stage(\d)\.linear(\d+)\.(weight|bias)": r"{\1-1}.{10-\2}.\3",
        r"merge(\d+)\.(weight|bias)": r"{\1+1}.merge.\2",
        r"stage\d\.index": None,
        r"head\.(weight|bias)": r"out.\1",
    },
)


class Failing(nn.Module):
    """A network of two layers, for loading into."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(3, 1)


def zeros(*keys):
    return dict.fromkeys(keys, torch.zeros(1))


# --- KeyMap


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("stage1.linear10.weight", "0.0.weight"),
        ("stage3.linear2.bias", "2.8.bias"),
        ("head.bias", "out.bias"),
        ("merge9.bias", "10.merge.bias"),
        ("stage2.index", None),
    ],
)
def test_names_are_rewritten_with_arithmetic_or_dropped_on_purpose(key, expected):
    assert KEYS.rename(key) == expected


@pytest.mark.parametrize(
    "key", ["stage1.linear1.weights", "module.head.weight", "head.weight.extra", "", "stageX.index"]
)
def test_a_pattern_must_explain_the_whole_key(key):
    with pytest.raises(KeyError):
        KEYS.rename(key)


def test_tensors_keep_their_identity_under_their_new_names():
    state = {"head.weight": torch.ones(2), "stage1.index": torch.ones(3), "stage1.linear1.bias": torch.ones(4)}
    out = KEYS.apply(state)
    assert list(out) == ["out.weight", "0.9.bias"]
    assert out["out.weight"] is state["head.weight"]


def test_all_keys_that_nothing_explains_are_listed():
    state = zeros("head.weight", *[f"module.head.{i}" for i in range(8)])
    message = (
        "8 of 9 keys are not of the theirs layout: module.head.0, module.head.1, module.head.2, module.head.3, "
        "module.head.4, module.head.5, and 2 more; these weights belong to another network or wrapper"
    )
    with pytest.raises(WeightsMismatch, match=f"^{re.escape(message)}$"):
        KEYS.apply(state)


def test_two_keys_may_not_become_one():
    keys = KeyMap("theirs", {r"(?:old|new)\.(\w+)": r"\1"})
    message = "two keys of the theirs layout become 'weight', the second is 'new.weight'"
    with pytest.raises(WeightsMismatch, match=f"^{re.escape(message)}$"):
        keys.apply(zeros("old.weight", "new.weight"))


# --- load_weights


def test_weights_are_copied_and_converted():
    model = Failing()
    state = {k: torch.full_like(v, 0.5, dtype=torch.float16) for k, v in model.state_dict().items()}
    load_weights(model, state)
    for value in model.state_dict().values():
        assert value.dtype == torch.float32
        assert (value == 0.5).all()


def test_a_foreign_layout_goes_through_its_key_map():
    model = nn.Sequential(nn.Linear(1, 1))
    load_weights(
        model,
        {"w": torch.tensor([[3.0]]), "b": torch.tensor([4.0]), "step": torch.tensor(7)},
        KeyMap("short", {"w": "0.weight", "b": "0.bias", "step": None}),
    )
    assert model(torch.tensor([[2.0]])).item() == 10


def _joined(state):
    return {**{k: v for k, v in state.items() if k not in "qk"}, "qk": torch.cat([state["q"], state["k"]])}


def test_a_layout_transforms_before_it_renames():
    model, state = nn.Sequential(nn.Linear(1, 2)), {"q": torch.ones(1, 1), "k": torch.zeros(1, 1), "b": torch.ones(2)}
    layout = Layout("split", "m", KeyMap("split", {"qk": "0.weight", "b": "0.bias"}), (), transform=_joined)
    load_weights(model, state, layout)
    assert model[0].weight.flatten().tolist() == [1, 0]
    assert list(state) == ["q", "k", "b"]


def test_what_a_layout_calls_partial_stays_as_it_is():
    model = Failing()
    before = model.second.weight.clone()
    layout = Layout("encoder", "m", KeyMap("encoder", {r"e\.(\w+)": r"first.\1"}), (), partial=r"second\..*")
    load_weights(model, {"e.weight": torch.ones(3, 2), "e.bias": torch.ones(3)}, layout)
    assert torch.equal(model.second.weight, before)
    assert (model.first.weight == 1).all()
    with pytest.raises(WeightsMismatch, match=r"1 missing \(first\.bias\)"):
        load_weights(model, {"e.weight": torch.zeros(3, 2)}, layout)
    assert (model.first.weight == 1).all()


@pytest.mark.parametrize(
    ("change", "account"),
    [
        (lambda s: s.pop("first.bias"), "1 missing (first.bias)"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexpected (extra)"),
        (
            lambda s: s.update({"second.weight": torch.zeros(1, 4)}),
            "1 of another shape (second.weight: network (1, 3), weights (1, 4))",
        ),
        (
            lambda s: (s.pop("first.bias"), s.pop("first.weight"), s.update(z=s["second.bias"], a=torch.zeros(1))),
            "2 missing (first.bias, first.weight); 2 unexpected (a, z)",
        ),
    ],
)
def test_a_misfit_is_accounted_for_and_nothing_is_copied(change, account):
    model = Failing()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = {k: v + 1 for k, v in before.items()}
    change(state)
    message = f"the weights do not fit the network: {account}. Check that both are of the same bundle"
    with pytest.raises(WeightsMismatch, match=f"^{re.escape(message)}$"):
        load_weights(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failing_key_map_copies_nothing():
    model = nn.Sequential(nn.Linear(1, 1))
    before = model[0].weight.clone()
    with pytest.raises(WeightsMismatch, match="1 of 2 keys are not of the short layout: b;"):
        load_weights(model, {"w": before + 1, "b": torch.zeros(1)}, KeyMap("short", {"w": "0.weight"}))
    assert torch.equal(model[0].weight, before)


# --- read_state

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.count": torch.tensor(7)}


@pytest.fixture(params=[".pt", ".safetensors"])
def weights_file(request, tmp_path):
    path = tmp_path / f"model{request.param}"
    if request.param == ".pt":
        torch.save(STATE, path)
    else:
        save_file(STATE, path)
    return path


def refusal(path, reason):
    return pytest.raises(WeightsMismatch, match=f"^{re.escape(str(path))}: {reason}")


def test_both_formats_are_read(weights_file):
    state = read_state(weights_file)
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], STATE[key]) for key in STATE)
    assert state["a.count"].dtype == torch.int64


def test_the_right_hash_is_accepted_in_either_case(weights_file):
    digest = file_sha256(weights_file)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert read_state(str(weights_file), digest).keys() == read_state(weights_file, digest.upper()).keys()


def test_the_hash_is_of_the_files_bytes(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_another_hash_names_both(weights_file):
    reason = (
        "the weights are not those the metadata names: expected sha256 "
        + "0" * 64
        + f", found {file_sha256(weights_file)}; "
        "restore the file, or record the new weights in the metadata$"
    )
    with refusal(weights_file, reason):
        read_state(weights_file, "0" * 64)


def test_a_missing_file(tmp_path):
    with refusal(tmp_path / "none.pt", "no such weights file$"):
        read_state(tmp_path / "none.pt")
    with refusal(tmp_path, "no such weights file$"):
        read_state(tmp_path)


def test_a_truncated_file(weights_file):
    weights_file.write_bytes(weights_file.read_bytes()[:-60])
    with refusal(weights_file, r"not readable as plain tensors \(\w+: "):
        read_state(weights_file)


def test_code_in_a_pickle_is_not_run(tmp_path):
    path = tmp_path / "model.pt"
    torch.save({"model": Failing()}, path)
    reason = (
        "damaged, or holds Python objects besides tensors, whose code is not run; "
        "convert the checkpoint to a flat dict of tensors first$"
    )
    with refusal(path, reason):
        read_state(path)


def test_a_text_file_is_refused(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("<html>404</html>")
    with refusal(path, "damaged, or holds Python objects besides tensors"):
        read_state(path)


@pytest.mark.parametrize(
    "contents",
    [{"state_dict": STATE}, {**STATE, "epoch": 3}, [torch.zeros(1)], torch.zeros(1), {1: torch.zeros(1)}],
    ids=["nested", "with a number", "list", "tensor", "numbered"],
)
def test_anything_but_a_flat_dict_of_tensors_is_refused(contents, tmp_path):
    path = tmp_path / "model.pt"
    torch.save(contents, path)
    with refusal(path, "must hold a flat dict of tensors, nothing else; convert the checkpoint first$"):
        read_state(path)
