"""Full, frozen and low-rank fine-tuning: what moves, what does not, and what is left behind."""

import pytest
import torch
from monai.bundle import ConfigParser
from torch import nn
from training_synthetic import assert_same, make_adapted, state, train_in_two

from medvit import create_model
from medvit.adapt.adapted import WAYS, LoraFile, adapted
from medvit.adapt.layer_decay import layer_decay_groups
from medvit.adapt.lora import adapters, load_lora
from medvit.models.vit import ViTEncoder
from medvit.models.weights import load_weights, read_state
from medvit.pretrain.supervised import Supervised
from medvit.pretrain.trainer import Trainer

VIT = {"in_channels": 1, "img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
NETWORKS = {
    "vit": {"name": "vit", "num_classes": 2, "drop_path_rate": 0.9, **VIT},
    "classifier": {"name": "classifier", "num_classes": 2, "encoder": {"name": "rad_dino", **VIT}},
    "segmenter": {"name": "segmenter", "out_channels": 2, "encoder": {"name": "vit", **VIT}},
}


class Source:
    """Bright images are of class 1."""

    def __init__(self, dense):
        self.labels = torch.arange(16) % 2
        noise = torch.randn(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.images = 0.3 * noise + self.labels[:, None, None, None]
        if dense:
            self.labels = self.labels[:, None, None].expand(-1, 16, 16)

    def __len__(self):
        return 16

    def batch(self, indices):
        return {"image": self.images[list(indices)], "label": self.labels[list(indices)]}


def network(name, how):
    torch.manual_seed(0)
    return adapted(create_model(**NETWORKS[name]), how, rank=2)


def train(tmp_path, name, how):
    objective = Supervised(network(name, how), nn.CrossEntropyLoss())
    before = {key: value.clone() for key, value in objective.network.state_dict().items()}
    trainer = Trainer(
        objective,
        Source(name == "segmenter"),
        output_dir=tmp_path,
        batch_size=8,
        steps=12,
        learning_rate=1e-2,
        groups=lambda model: layer_decay_groups(model, lr=1.0, decay=0.8),
        watchers=[LoraFile(tmp_path / "lora.safetensors")],
        log_every=1,
        device="cpu",
    )
    trainer.run()
    after = objective.network.state_dict()
    return objective.network.eval(), {key for key, value in after.items() if not torch.equal(value, before[key])}


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_trained_and_what_is_exported(tmp_path, name, how):
    trained, moved = train(tmp_path, name, how)
    inside = {key for key in moved if key.startswith("encoder.")}
    assert moved - inside
    assert {"full": bool(inside), "frozen": not inside}.get(
        how, all("parametrizations" in key for key in inside) and bool(inside)
    )
    plain = create_model(**NETWORKS[name])
    load_weights(plain, read_state(tmp_path / "network.safetensors"))
    images = Source(False).images
    torch.testing.assert_close(plain.eval()(images), trained(images))
    assert (tmp_path / "lora.safetensors").exists() is (how == "lora")
    if how == "lora":
        again = network(name, how)
        load_lora(again, tmp_path / "lora.safetensors")
        torch.testing.assert_close(again.eval()(images), trained(images))


def test_a_word_in_a_recipe_decides():
    recipe = {
        "adapt": "lora",
        "network": {"_target_": "medvit.create_model", **NETWORKS["vit"]},
        "adapted": {"_target_": "medvit.adapt.adapted.adapted", "network": "@network", "how": "@adapt", "rank": 2},
    }
    assert set(adapters(ConfigParser(recipe).get_parsed_content("adapted"))) == {
        f"encoder.blocks.{block}.attn.{layer}" for block in range(2) for layer in ("qkv", "proj")
    }
    assert not adapters(ConfigParser({**recipe, "adapt": "frozen"}).get_parsed_content("adapted"))


def test_a_frozen_encoder_drops_nothing():
    images = Source(False).images
    frozen = network("vit", "frozen").train()
    assert torch.equal(frozen.encoder.embed(images), frozen.encoder.embed(images))
    full = network("vit", "full").train()
    assert not torch.equal(full.encoder.embed(images), full.encoder.embed(images))


def test_what_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="how must be one of full, lora, frozen, got 'none'"):
        adapted(nn.Linear(1, 1), "none")
    with pytest.raises(ValueError, match="ViTEncoder has nothing around its encoder to train; use how='full'"):
        adapted(ViTEncoder(**VIT), "frozen")
    with pytest.raises(ValueError, match="matches none of the names"):
        adapted(create_model(**NETWORKS["vit"]), "lora", targets=["conv"])


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    """Every way in two processes, under DDP and under FSDP2."""
    folder = tmp_path_factory.mktemp("two")
    runs = [(how, parallel) for how in WAYS for parallel in ("ddp", "fsdp")]
    words = [[folder / how / parallel, {"adapt": how, "parallel": parallel}] for how, parallel in runs]
    train_in_two(*[word for pair in words for word in pair])
    return folder


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", WAYS)
def test_two_processes_equal_one(in_two, tmp_path, how, parallel):
    two = in_two / how / parallel
    make_adapted(tmp_path, adapt=how).run()
    assert_same(state(tmp_path, 4), state(two, 4), 1e-5)
    files = ["network.safetensors"] + (["lora.safetensors"] if how == "lora" else [])
    for name in files:
        assert_same(read_state(tmp_path / name), read_state(two / name), 1e-5)
    assert (two / "lora.safetensors").exists() is (how == "lora")


@pytest.mark.parametrize("how", WAYS)
def test_one_process_goes_on_from_a_sharded_state(in_two, tmp_path, how):
    (tmp_path / "checkpoints").mkdir()
    name = "checkpoints/step-000000002.pt"
    (tmp_path / name).write_bytes((in_two / how / "fsdp" / name).read_bytes())
    make_adapted(tmp_path, adapt=how).run()
    assert_same(state(tmp_path, 4), state(in_two / how / "fsdp", 4), 1e-5)
