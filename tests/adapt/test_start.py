import pytest
import torch
from torch import nn
from training_synthetic import Told

from medvit import create_model
from medvit.adapt.probe import fit_linear_probe
from medvit.adapt.start import start_head
from medvit.models.heads import Classifier


def vit(outputs):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    return create_model("vit", in_channels=1, num_classes=outputs, drop_path_rate=0.5, **sizes)


def classifier(outputs):
    network = vit(outputs)
    return Classifier(network.encoder, outputs)


def halved(images):
    return images / 2


SEVERAL = {
    "two classes": (2, lambda i: i // 2 % 2),
    "three classes": (3, lambda i: i // 2 % 3),
    "two labels": (2, lambda i: torch.stack([i // 2 % 2, i // 4 % 2], 1)),
}


@pytest.mark.parametrize("make", [vit, classifier])
@pytest.mark.parametrize(("outputs", "labels"), SEVERAL.values(), ids=SEVERAL)
def test_outputs_are_the_logits_of_the_probe_on_what_the_head_reads(make, outputs, labels):
    data, network = Told(40, labels), make(outputs).train()
    network.encoder.eval()
    assert start_head(network, "probe", data, halved, l2=0.1, batch_size=7) is network
    assert network.training and not network.encoder.training  # as they were
    network.eval()
    vectors = network.encoder.embed(halved(data.images))
    if make is classifier:
        vectors = network.norm(vectors)
    probe = fit_linear_probe(vectors.detach(), data.labels, l2=0.1)
    torch.testing.assert_close(network(halved(data.images)), probe.logits(vectors).float(), rtol=1e-4, atol=1e-5)


def test_the_probe_is_of_what_an_inferer_gives():
    def both(images, network):  # of an image and its mirror image
        return (network(images) + network(images.flip(3))) / 2

    data, network = Told(40, SEVERAL["two classes"][1]), vit(2)
    start_head(network, "probe", data, halved, inferer=both, l2=0.1)
    images = halved(data.images)
    vectors = both(images, network.eval().encoder.embed).detach()
    probe = fit_linear_probe(vectors, data.labels, l2=0.1)
    torch.testing.assert_close(both(images, network), probe.logits(vectors).float(), rtol=1e-4, atol=1e-5)


def test_the_penalty_is_chosen_on_folds_of_patients(monkeypatch):
    asked = {}

    def fit(x, y, **options):
        asked.update(options)
        return fit_linear_probe(x, y, l2=0.1)

    monkeypatch.setattr("medvit.adapt.start.fit_linear_probe", fit)
    start_head(vit(2), "probe", Told(40, lambda i: i // 2 % 2), halved, seed=3)
    assert asked == {"l2": None, "classes": 2, "groups": [f"p{i // 2}" for i in range(40)], "seed": 3}


def test_the_encoder_and_a_fresh_head_stay_as_they_are():
    data, before = Told(40, lambda i: i // 2 % 2), vit(2).state_dict()
    fresh = start_head(vit(2), "fresh", data, halved).state_dict()
    probed = start_head(vit(2), "probe", data, halved, l2=0.1).state_dict()
    assert all(torch.equal(before[key], fresh[key]) for key in before)
    assert {key for key in before if not torch.equal(before[key], probed[key])} == {"head.weight", "head.bias"}


@pytest.mark.parametrize(
    ("network", "how", "message"),
    [
        (vit(2), "ridge", r"how must be one of fresh, probe, got 'ridge'"),
        (nn.Identity(), "probe", r"a linear layer with a bias named head; that of Identity is None; use how='fresh'"),
        (vit(0), "probe", r"that of ViT is Identity\(\)"),
    ],
)
def test_refusals(network, how, message):
    with pytest.raises(ValueError, match=message):
        start_head(network, how, Told(40, lambda i: i // 2 % 2), halved)


def test_outputs_must_be_the_labels():
    with pytest.raises(ValueError, match="the head has 3 outputs, but the labels make 2"):
        start_head(vit(3), "probe", Told(40, SEVERAL["two labels"][1]), halved, l2=0.1)
