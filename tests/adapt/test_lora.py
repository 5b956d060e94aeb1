import copy

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from medvit import create_model
from medvit.adapt.lora import LowRank, adapters, add_lora, bake, load_lora, merge, save_lora, unmerge
from medvit.errors import UnreadableFile, WeightsMismatch

LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), (2, 4, 9, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 5, (3, 3, 1), stride=(1, 2, 1), padding=(1, 1, 0), bias=False), (2, 2, 5, 6, 4)),
    "patches": (lambda: nn.Conv2d(3, 8, 4, stride=4), (2, 3, 8, 8)),
    "groups": (lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=2), (2, 4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose3d(4, 3, 2, stride=2), (2, 4, 3, 3, 3)),
}


def randomise(model, seed=0):
    """Factors as after a training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters(model).values():
            for factor in adapter.parameters():
                factor.copy_(torch.randn(factor.shape, generator=generator) / 3)
    return model


def adapted(case="conv2d", rank=2, alpha=3.0, seed=0):
    torch.manual_seed(1)
    model = nn.Sequential(LAYERS[case][0]())
    add_lora(model, ["0"], rank=rank, alpha=alpha)
    return randomise(model, seed)


def image(case="conv2d"):
    return torch.randn(LAYERS[case][1], generator=torch.Generator().manual_seed(2))


def two_layers(layer, adapter, x):
    """The paper's form: the base, and beside it a layer into few channels with a pointwise one behind."""
    scale = adapter.alpha / adapter.rank
    if isinstance(layer, nn.Linear):
        return layer(x) + scale * F.linear(F.linear(x, adapter.down), adapter.up)
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    few = convolve(x, adapter.down.view(adapter.rank, *layer.weight.shape[1:]), None, layer.stride, layer.padding)
    return layer(x) + scale * convolve(few, adapter.up.view(*adapter.up.shape, *[1] * (x.dim() - 2)))


# --- forward


@pytest.mark.parametrize("case", ["linear", "conv1d", "conv2d", "conv3d", "patches"])
def test_an_adapted_layer_is_the_papers_two_layers_beside_it(case):
    torch.manual_seed(1)
    plain = LAYERS[case][0]()
    model, x = adapted(case), image(case)
    assert torch.allclose(model(x), two_layers(plain, adapters(model)["0"], x), atol=1e-5)


@pytest.mark.parametrize("case", LAYERS)
def test_it_starts_as_the_base(case):
    torch.manual_seed(1)
    model, x = nn.Sequential(LAYERS[case][0]()), image(case)
    before = model(x)
    assert add_lora(model, ["0"], rank=2) == ["0"]
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("case", LAYERS)
def test_merged_equals_unmerged_and_baked(case):
    model, x = adapted(case), image(case)
    apart = model(x)
    base = model[0].parametrizations["weight"].original.clone()
    merge(model)
    assert torch.equal(model(x), apart)
    merge(model)
    assert torch.equal(model(x), apart)
    unmerge(model)
    assert torch.equal(model(x), apart)
    assert torch.equal(model[0].parametrizations["weight"].original, base)
    bake(model)
    assert type(model[0]) is type(LAYERS[case][0]())
    assert model.state_dict().keys() == nn.Sequential(LAYERS[case][0]()).state_dict().keys()
    assert torch.equal(model(x), apart)
    assert not torch.equal(model[0].weight, base)
    assert adapters(model) == {}


def test_a_merged_network_can_be_baked_and_trained_anew():
    model, x = adapted(), image()
    apart = model(x)
    merge(model)
    bake(model)
    assert torch.equal(model(x), apart)
    add_lora(model, ["0"], rank=1)
    assert torch.equal(model(x), apart)


def test_a_baked_copy_leaves_the_original_its_adapters():
    network = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 3))
    add_lora(network, ["0", "1"], rank=1)
    with torch.no_grad():
        network[0].parametrizations.weight[0].up.fill_(0.5)
    baked = copy.deepcopy(network)
    bake(baked)
    assert [type(layer) for layer in baked] == [nn.Linear, nn.Conv1d] and not adapters(baked)
    assert set(adapters(network)) == {"0", "1"}
    x = torch.randn(3, 4)
    torch.testing.assert_close(network[0](x), baked[0](x))
    add_lora(baked, ["0"], rank=1)
    torch.testing.assert_close(network[0](x), baked[0](x))


def test_weights_that_are_loaded_take_merging_back():
    one, other = (nn.Sequential(nn.Linear(4, 4)) for _ in range(2))
    for network in (one, other):
        add_lora(network, ["0"], rank=1)
    merge(one)
    one.load_state_dict(other.state_dict())
    x = torch.randn(3, 4)
    torch.testing.assert_close(one(x), other(x))
    assert all(p.requires_grad for p in adapters(one)["0"].parameters())


def test_scale_is_alpha_over_rank():
    x = image()
    base = adapted(alpha=0.0)(x)
    assert torch.allclose(adapted(alpha=6.0)(x) - base, 2 * (adapted(alpha=3.0)(x) - base), atol=1e-5)


# --- training


def test_only_factors_and_what_was_named_are_trained():
    torch.manual_seed(0)
    model = create_model("vit", num_classes=2, img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2)
    before = copy.deepcopy(model.state_dict())
    layers = add_lora(model, [r".*attn\.(qkv|proj)"], rank=2, trainable=[r"head\..*"])
    assert layers == [f"encoder.blocks.{i}.attn.{part}" for i in (0, 1) for part in ("qkv", "proj")]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    factors = {f"{n}.parametrizations.weight.0.{part}" for n in layers for part in ("up", "down")}
    assert trained == factors | {"head.weight", "head.bias"}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    after = {n.replace("parametrizations.weight.original", "weight"): v for n, v in model.state_dict().items()}
    changed = {n for n, v in before.items() if not torch.equal(after[n], v)}
    assert changed == {"head.weight", "head.bias"}
    assert all(adapter.up.abs().max() > 0 for adapter in adapters(model).values())


def test_gradients_are_those_of_the_papers_two_layers():
    torch.manual_seed(1)
    plain = LAYERS["conv3d"][0]()
    model, x = adapted("conv3d"), image("conv3d")
    adapter = adapters(model)["0"]
    ours = torch.autograd.grad(model(x).square().sum(), [adapter.down, adapter.up])
    theirs = torch.autograd.grad(two_layers(plain, adapter, x).square().sum(), [adapter.down, adapter.up])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(ours, theirs, strict=True))


def test_merged_factors_are_not_trained():
    model = adapted()
    merge(model)
    assert not any(p.requires_grad for a in adapters(model).values() for p in a.parameters())
    unmerge(model)
    assert all(p.requires_grad for a in adapters(model).values() for p in a.parameters())


def test_under_autocast_merged_equals_unmerged():
    model, x = adapted(), image()
    with torch.autocast("cpu", torch.bfloat16):
        apart = model(x)
        merge(model)
        assert apart.dtype == torch.bfloat16
        assert torch.equal(model(x), apart)


def test_a_half_precision_base_keeps_its_type():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(6, 5).bfloat16())
    add_lora(model, ["0"], rank=2)
    randomise(model)
    x = torch.randn(3, 6).bfloat16()
    apart = model(x)
    merge(model)
    assert apart.dtype == torch.bfloat16
    assert adapters(model)["0"].down.dtype == torch.float32
    assert torch.equal(model(x), apart)


def test_code_that_takes_a_kernel_sees_the_adapter():
    """Convolution blocks of the decoders compute with ``layer.weight`` and never call the layer."""
    torch.manual_seed(0)
    small = {"feature_size": 4, "num_heads": [1] * 4, "depths": [1] * 4, "window_size": 2}
    model = create_model("swin_unetr", in_channels=1, out_channels=2, spatial_dims=2, **small).eval()
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        before = model(x)
        assert add_lora(model, ["head"], rank=1) == ["head"]
        randomise(model)
        after = model(x)
        bake(model)
        assert torch.allclose(model(x), after)
    assert (after - before).abs().max() > 1e-2


def test_it_compiles_whole():
    model, x = adapted(), image()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x), model(x), atol=1e-6)


# --- the file


def test_a_file_holds_the_factors_alone_and_brings_them_back(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model, x = adapted(seed=4), image()
    save_lora(model, path)
    assert load_file(path).keys() == {"0.down", "0.up"}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["rank"], metadata["alpha"], metadata["targets"]) == ("2", "3.0", '["0"]')
    other = adapted(seed=5)
    merge(other)
    assert not torch.equal(other(x), model(x))
    load_lora(other, path)
    assert torch.equal(other(x), model(x))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter.safetensors"]


def test_merging_does_not_change_the_file(tmp_path):
    model = adapted()
    save_lora(model, tmp_path / "apart.safetensors")
    merge(model)
    save_lora(model, tmp_path / "merged.safetensors")
    apart, merged = tmp_path / "apart.safetensors", tmp_path / "merged.safetensors"
    assert all(torch.equal(v, load_file(merged)[n]) for n, v in load_file(apart).items())
    with safe_open(apart, "pt") as one, safe_open(merged, "pt") as other:
        assert one.metadata() == other.metadata()
    assert model.state_dict().keys() == adapted().state_dict().keys()


def test_what_is_trained_beside_travels_along(tmp_path):
    def make(seed):
        torch.manual_seed(3)
        model = nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
        add_lora(model, ["body"], rank=1, trainable=[r"head\..*"])
        torch.manual_seed(seed)
        nn.init.normal_(model["head"].weight)
        return randomise(model, seed)

    path = tmp_path / "adapter.safetensors"
    first, second = make(0), make(1)
    save_lora(first, path)
    assert load_file(path).keys() == {"body.down", "body.up", "head.weight", "head.bias"}
    load_lora(second, path)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "rank is 2 in the file, 3 in the network"),
        ({"alpha": 4.0}, "alpha is 3.0 in the file, 4.0 in the network"),
    ],
)
def test_adapters_of_another_make_are_refused(tmp_path, options, message):
    path = tmp_path / "adapter.safetensors"
    save_lora(adapted(), path)
    other = adapted(**options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(WeightsMismatch, match=message):
        load_lora(other, path)
    assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_adapters_of_another_base_and_of_other_layers_are_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = adapted()
    save_lora(model, path)
    with torch.no_grad():
        model[0].parametrizations["weight"].original.view(-1)[0] += 1e-3
    with pytest.raises(WeightsMismatch, match=r"base_sha256 is [0-9a-f]{64} in the file, "):
        load_lora(model, path)
    other = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    add_lora(other, ["1"], rank=2, alpha=3.0)
    with pytest.raises(WeightsMismatch, match=r"targets differ, only in the file \['0'\], only in the network \['1'\]"):
        load_lora(other, path)
    save_lora(other, path)
    other[0].requires_grad_(True)
    with pytest.raises(
        WeightsMismatch, match=r"trained differ, only in the file \[\], only in the network \['0.bias',"
    ):
        load_lora(other, path)


def test_other_tensors_and_files_are_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    model = adapted()
    save_lora(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({k: v[:1] for k, v in load_file(path).items()}, path, metadata)
    with pytest.raises(WeightsMismatch, match="tensors of other names or shapes"):
        load_lora(model, path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UnreadableFile, match="holds no adapters: its metadata lacks 'rank'"):
        load_lora(model, path)
    path.write_bytes(b"nonsense")
    with pytest.raises(UnreadableFile, match="holds no adapters that can be read"):
        load_lora(model, path)
    with pytest.raises(UnreadableFile, match="holds no adapters that can be read"):
        load_lora(model, tmp_path / "none.safetensors")


# --- refusals


def test_adapters_are_refused_where_they_cannot_be():
    model = adapted()
    with pytest.raises(ValueError, match=r"this network has adapters; bake\(\)"):
        add_lora(model, ["0"])
    plain = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    with pytest.raises(ValueError, match="rank must be from 1 to 2 for a 2 x 3 weight, got 3"):
        add_lora(plain, ["0"], rank=3)
    with pytest.raises(ValueError, match="the pattern '1' matches none of the names 0"):
        add_lora(plain, ["1"], rank=1)
    with pytest.raises(ValueError, match="the pattern 'nothing' matches none"):
        add_lora(plain, ["0"], rank=1, trainable=["nothing"])
    assert not parametrize.is_parametrized(plain[0])  # nothing was done
    assert all(p.requires_grad for p in plain.parameters())
    with pytest.raises(ValueError, match=r"has no adapters; call add_lora\(\)"):
        save_lora(plain, "nowhere")
    with pytest.raises(ValueError, match="rank must be from 1 to 2"):
        LowRank(torch.zeros(2, 3), 0, 1.0)
