import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from medvit import create_model
from medvit.adapt.embeddings import Embeddings, extract
from medvit.adapt.fingerprint import state_sha256
from medvit.errors import UnreadableFile, WeightsMismatch


def encoder(seed=0):
    torch.manual_seed(seed)
    small = {"in_channels": 1, "img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
    return create_model("vit", **small, drop_path_rate=0.5).encoder


def batches():
    generator = torch.Generator().manual_seed(1)
    for names in (["a", "b"], ["c"]):
        yield names, torch.randn(len(names), 1, 8, 8, generator=generator)


def some(**changes):
    values = {"vectors": {"embed": torch.eye(3)}, "cases": ("a", "b", "c"), "encoder_sha256": "0" * 64}
    return Embeddings(**(values | changes))


def test_vectors_are_the_encoders_in_evaluation_mode():
    network = encoder()
    network.train()
    network.blocks[0].eval()
    modes = [module.training for module in network.modules()]
    found = extract(network, batches())
    assert [module.training for module in network.modules()] == modes
    network.eval()
    with torch.no_grad():
        slow = torch.cat([network.embed(images) for _, images in batches()])
    assert found.cases == ("a", "b", "c")
    assert torch.equal(found.vectors["embed"], slow)
    assert not found.vectors["embed"].requires_grad
    assert found.encoder_sha256 == state_sha256(network.state_dict())
    assert torch.equal(found.of(["c", "a"]), slow[[2, 0]])


def test_other_vectors_may_be_read():
    network = encoder()

    def read(x):
        tokens = network.tokens(x)
        return {"cls": tokens[:, 0], "mean": tokens[:, 1:].mean(1).bfloat16()}

    found = extract(network, batches(), read)
    assert found.vectors.keys() == {"cls", "mean"}
    assert found.vectors["mean"].dtype == torch.float32
    assert found.of(["b"], "mean").shape == (1, 12)
    with pytest.raises(ValueError, match="there are the vectors cls, mean, none named 'embed'"):
        found.of(["b"])


def test_a_mode_is_put_back_after_a_failure():
    network = encoder().train()

    def failing():
        yield from batches()
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        extract(network, failing())
    assert network.training


def test_a_file_brings_them_back(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    network = encoder()
    found = extract(network, batches())
    found.save(path)
    found.save(path)
    back = Embeddings.load(path, network)
    assert (back.cases, back.encoder_sha256) == (found.cases, found.encoder_sha256)
    assert torch.equal(back.vectors["embed"], found.vectors["embed"])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_embeddings_of_other_weights_are_refused(tmp_path):
    path = tmp_path / "embeddings.safetensors"
    extract(encoder(), batches()).save(path)
    with pytest.raises(WeightsMismatch, match=r"made by weights of sha256 \w+, but this encoder's are \w+; compute"):
        Embeddings.load(path, encoder(seed=1))
    assert Embeddings.load(path).cases == ("a", "b", "c")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "other.safetensors"
    with pytest.raises(UnreadableFile, match="holds no embeddings that can be read"):
        Embeddings.load(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UnreadableFile, match="holds no embeddings that can be read"):
        Embeddings.load(path)
    save_file({"embed": torch.zeros(1, 2)}, path)
    with pytest.raises(UnreadableFile, match="its metadata lacks 'cases'"):
        Embeddings.load(path)
    save_file({"embed": torch.zeros(1, 2)}, path, {"cases": json.dumps(["a", "b"]), "encoder_sha256": "0"})
    with pytest.raises(UnreadableFile, match=r"one vector for each of 2 cases, got shape \(1, 2\)"):
        Embeddings.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cases": ("a", "b", "a")}, "every case must come once, got a several times"),
        ({"cases": ("a", "b")}, r"one vector for each of 2 cases, got shape \(3, 3\)"),
        ({"vectors": {"embed": torch.zeros(3)}}, r"got shape \(3,\)"),
        ({"vectors": {"embed": torch.tensor([[1.0], [torch.nan], [torch.inf]])}}, "must be finite, it is not for b, c"),
    ],
)
def test_what_is_no_vector_per_case(changes, message):
    with pytest.raises(ValueError, match=message):
        some(**changes)


def test_cases_without_a_vector_are_refused():
    with pytest.raises(ValueError, match="2 of 3 cases have no vector, among them x, y"):
        some().of(["x", "a", "y"])


def test_what_cannot_be_embedded():
    with pytest.raises(ValueError, match="there is nothing to embed"):
        extract(encoder(), [])
    with pytest.raises(ValueError, match="one name per image, got 1 for 2 images"):
        extract(encoder(), [(["a"], torch.zeros(2, 1, 8, 8))])
    with pytest.raises(ValueError, match="every case must come once, got a several times"):
        extract(encoder(), [(["a", "a"], torch.zeros(2, 1, 8, 8))])
    bare = nn.Identity()
    bare.embed = lambda x: x.flatten(1)
    assert extract(bare, [(["a"], torch.ones(1, 1, 2, 2))]).vectors["embed"].tolist() == [[1, 1, 1, 1]]
