import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from training_synthetic import Encoder

from medvit import create_model
from medvit.errors import OutputError, WeightsMismatch
from medvit.pretrain.checkpoint import Checkpoints, export, load_encoder, plain_state

ROOT = Path(__file__).parents[2]


def test_the_newest_state_comes_back_and_old_ones_go(tmp_path):
    states = Checkpoints(tmp_path, 2, {"seed": 1})
    assert states.latest() is None
    for step in (5, 20, 100):
        states.save(step, {"weights": {"w": torch.full((2,), float(step))}})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000020.pt", "step-000000100.pt"]
    found = states.latest()
    assert found["step"] == 100 and found["weights"]["w"].tolist() == [100, 100]
    states.clear()
    assert states.latest() is None


def test_half_a_state_is_none(tmp_path):
    states = Checkpoints(tmp_path, 1, {})
    states.save(3, {})
    (tmp_path / "step-000000009.part").write_bytes(b"half")
    assert states.latest()["step"] == 3


def test_a_damaged_state_is_told(tmp_path):
    (tmp_path / "step-000000009.pt").write_bytes(b"nothing")
    with pytest.raises(OutputError, match=r"step-000000009.pt: not a state of a run \(.*delete it to go on"):
        Checkpoints(tmp_path, 1, {}).latest()


def test_settings_must_agree(tmp_path):
    Checkpoints(tmp_path, 1, {"seed": 1, "steps": 5}).save(3, {})
    with pytest.raises(OutputError, match="steps: 5 there, 6 now"):
        Checkpoints(tmp_path, 1, {"seed": 1, "steps": 6}).latest()


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(12, 2)


def test_an_exported_encoder_goes_into_an_encoder_or_a_network(tmp_path):
    encoder, path = Encoder(), tmp_path / "deep/encoder.safetensors"
    export(encoder.state_dict(), path, {"name": "toy"})
    for target in (Encoder(), Network()):
        assert load_encoder(target, path) is target
        body = getattr(target, "encoder", target)
        assert all(torch.equal(body.state_dict()[key], value) for key, value in encoder.state_dict().items())
    fresh = Encoder()
    before = fresh.patch.weight.clone()
    assert torch.equal(load_encoder(fresh, "").patch.weight, before)


def test_what_is_dropped_and_fresh_must_be_said(tmp_path):
    encoder, path = Encoder(), tmp_path / "encoder.safetensors"
    export({k: v for k, v in encoder.state_dict().items() if k != "cls_token"} | {"old": torch.ones(1)}, path, {})
    with pytest.raises(WeightsMismatch, match=r"missing \(cls_token\).*unexpected \(old\)"):
        load_encoder(Encoder(), path)
    target = Encoder()
    target.cls_token.data.fill_(7)
    load_encoder(target, path, drop="old", fresh="cls_.*")
    assert (target.cls_token == 7).all() and torch.equal(target.patch.weight, encoder.patch.weight)


def test_an_encoder_of_another_kind_may_be_renamed(tmp_path):
    encoder, path = Encoder(), tmp_path / "encoder.safetensors"
    export({key.replace("patch.", "stem.proj."): v for key, v in encoder.state_dict().items()}, path, {})
    target = load_encoder(Encoder(), path, rename={r"^stem\.proj\.": "patch."})
    assert all(torch.equal(target.state_dict()[key], value) for key, value in encoder.state_dict().items())
    with pytest.raises(WeightsMismatch, match=r"rename gives two tensors the name 'x'; use a narrower"):
        load_encoder(Encoder(), path, rename={"^stem.*": "x"})


def test_a_masked_autoencoders_encoder_starts_a_rad_dino(tmp_path):
    options = {"in_channels": 1, "img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    small = {"decoder_embed_dim": 8, "decoder_depth": 1, "decoder_num_heads": 2}
    mae, path = create_model("mae", **options, **small).encoder.eval(), tmp_path / "encoder.safetensors"
    export(mae.state_dict(), path, {})
    recipe = json.loads((ROOT / "configs/pretrain/dino_cxr.json").read_text(encoding="utf-8"))["network"]
    dino = create_model("rad_dino", **options).eval()
    assert load_encoder(dino, path, rename=recipe["rename"], fresh=recipe["fresh"]) is dino
    x = torch.rand(3, 1, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(dino.tokens(x), mae.tokens(x))


def test_weights_that_are_not_those_of_the_note(tmp_path):
    path = tmp_path / "encoder.safetensors"
    with pytest.raises(WeightsMismatch, match="no such weights; pre-train first"):
        load_encoder(Encoder(), path)
    export(Encoder().state_dict(), path, {})
    note = tmp_path / "encoder.safetensors.json"
    note.write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(WeightsMismatch, match="expected sha256 0000"):
        load_encoder(Encoder(), path)


def test_parametrised_weights_are_stored_as_they_are_computed(tmp_path):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    network = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    base = {key: value.clone() for key, value in network.state_dict().items()}
    assert plain_state(network).keys() == base.keys()
    parametrize.register_parametrization(network[1], "weight", Doubled())
    found = plain_state(network)
    assert found.keys() == base.keys()
    assert torch.equal(found["1.weight"], 2 * base["1.weight"]) and torch.equal(found["0.weight"], base["0.weight"])
    assert "1.parametrizations.weight.original" in network.state_dict()
    alone = network[1]
    assert torch.equal(plain_state(alone)["weight"], 2 * base["1.weight"])


@pytest.mark.parametrize("text", ["{}", "[]", "not JSON"])
def test_a_note_without_a_checksum_is_named(tmp_path, text):
    path = export(Encoder().state_dict(), tmp_path / "encoder.safetensors", {})
    (tmp_path / "encoder.safetensors.json").write_text(text)
    with pytest.raises(WeightsMismatch, match=r"encoder.safetensors.json: must say the sha256 of encoder.safetensors"):
        load_encoder(Encoder(), path)
