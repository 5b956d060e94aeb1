"""What every registered model keeps, whatever it is: a new model is tested by an entry in CASES."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from medvit import create_model, list_models
from medvit.models.encoder import Encoder
from medvit.models.heads import Classifier, Embedder, Segmenter, as_encoder
from medvit.models.weights import load_weights, read_state

KEYS = json.loads((Path(__file__).parent / "state_keys.json").read_text())
SWIN = {"feature_size": 12, "num_heads": [2, 2, 2, 2], "depths": [2, 1, 1, 1], "window_size": 2}
D_FORMER = {
    "embed_dim": 8,
    "depths": [2, 2, 1, 1],
    "num_heads": [1, 2, 2, 2],
    "group_size": 2,
    "intervals": [4, 2, 1, 1],
}
HBFORMER = {"embed_dim": 16, "depths": [2, 1, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 2}
VIT = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4}
RAD_DINO = {"embed_dim": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "img_size": 16}
DECODER = {"decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}

# id: (name, arguments, size of an example image). Two classes or channels throughout, narrow.
CASES = {
    "swin_unetr-2d": ("swin_unetr", {**SWIN, "spatial_dims": 2, "in_channels": 1, "out_channels": 2}, (96, 128)),
    "swin_unetr-3d": ("swin_unetr", {**SWIN, "spatial_dims": 3, "in_channels": 2, "out_channels": 2}, (32, 64, 32)),
    "d_former-2d": (
        "d_former",
        {**D_FORMER, "spatial_dims": 2, "in_channels": 1, "out_channels": 2},
        (32, 48),
    ),
    "d_former-3d": (
        "d_former",
        {**D_FORMER, "spatial_dims": 3, "in_channels": 2, "out_channels": 2},
        (16, 32, 16),
    ),
    "hbformer-2d": (
        "hbformer",
        {**HBFORMER, "spatial_dims": 2, "in_channels": 3, "out_channels": 2, "img_size": [64, 64]},
        (64, 64),
    ),
    "hbformer-3d": (
        "hbformer",
        {**HBFORMER, "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "img_size": [32, 64, 32]},
        (32, 64, 32),
    ),
    "vit-2d": ("vit", {**VIT, "spatial_dims": 2, "in_channels": 3, "num_classes": 2, "img_size": 16}, (16, 16)),
    "vit-3d": ("vit", {**VIT, "spatial_dims": 3, "in_channels": 1, "num_classes": 2, "img_size": 8}, (8, 8, 8)),
    "mae-2d": ("mae", {**VIT, **DECODER, "spatial_dims": 2, "in_channels": 3, "img_size": 16}, (16, 16)),
    "mae-3d": ("mae", {**VIT, **DECODER, "spatial_dims": 3, "in_channels": 1, "img_size": 8}, (8, 8, 8)),
    "uni4eye-2d": ("uni4eye", {**VIT, "spatial_dims": 2, "in_channels": 1, "img_size": 16}, (16, 16)),
    "uni4eye-3d": ("uni4eye", {**VIT, "spatial_dims": 3, "in_channels": 1, "img_size": 16}, (16, 16, 8)),
    "uni4eye_mae-2d": (
        "uni4eye_mae",
        {**VIT, **DECODER, "spatial_dims": 2, "in_channels": 1, "img_size": 16},
        (16, 16),
    ),
    "uni4eye_mae-3d": (
        "uni4eye_mae",
        {**VIT, **DECODER, "spatial_dims": 3, "in_channels": 1, "img_size": 16},
        (16, 16, 8),
    ),
    "uni4eye_pp_mae-2d": (
        "uni4eye_pp_mae",
        {**VIT, **DECODER, "in_channels": 3, "img_size": 16},
        (16, 16),
    ),
    "uni4eye_pp_mae-3d": (
        "uni4eye_pp_mae",
        {**VIT, **DECODER, "spatial_dims": 3, "img_size": 16},
        (16, 3, 16),
    ),
    "rad_dino-2d": ("rad_dino", RAD_DINO, (16, 16)),
    "rad_dino-3d": ("rad_dino", {**RAD_DINO, "spatial_dims": 3, "in_channels": 1, "img_size": 8}, (8, 8, 8)),
    "segmenter-3d": (
        "segmenter",
        {
            "encoder": {"name": "d_former", **D_FORMER, "in_channels": 1, "out_channels": 2},
            "out_channels": 2,
        },
        (16, 32, 16),
    ),
    "classifier-2d": (
        "classifier",
        {
            "encoder": {"name": "swin_unetr", **SWIN, "spatial_dims": 2, "in_channels": 1, "out_channels": 2},
            "num_classes": 2,
        },
        (64, 64),
    ),
    "embedder-2d": (
        "embedder",
        {"encoder": {"name": "swin_unetr", **SWIN, "spatial_dims": 2, "in_channels": 1, "out_channels": 2}},
        (64, 64),
    ),
}  # fmt: skip
NETWORKS = [case for case in CASES if case.split("-")[0] in ("swin_unetr", "d_former", "hbformer", "segmenter")]
ENCODERS = [case for case in CASES if not case.startswith(("segmenter", "classifier", "embedder"))]


def build(case, seed=0):
    torch.manual_seed(seed)
    name, arguments, _ = CASES[case]
    return create_model(name, **arguments).eval()


def image(case, batch=2, sides=None, seed=1):
    sides = CASES[case][2] if sides is None else sides
    channels = as_encoder(build(case)).in_channels
    return torch.randn(batch, channels, *sides, generator=torch.Generator().manual_seed(seed))


def tensors(output):
    """All floating tensors a model returned, whatever it wraps them in."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    items = vars(output).values() if hasattr(output, "__dict__") else output
    return [t for item in items if item is not None for t in tensors(item)]


def objective(output):
    """What training would minimise: the model's own loss, or something that depends on every output."""
    loss = getattr(output, "loss", None)
    return loss if loss is not None else sum((t**2).mean() for t in tensors(output))


def run(model, x, seed=2):
    """Masking models draw their mask: the same one each time."""
    torch.manual_seed(seed)
    return model(x)


# --- the registry


def test_every_registered_model_has_a_case():
    assert {name for name, _, _ in CASES.values()} == set(list_models())


# --- forward and backward


def objectives(case, model):
    """Losses that together use all that a model can do."""
    yield objective(run(model, image(case)))
    if case.startswith("uni4eye"):  # one model for both ranks: the other one too
        yield objective(run(model, image(case.replace("2d", "3d") if "2d" in case else case.replace("3d", "2d"))))
    if case.startswith("rad_dino"):  # only masked patches need the mask token
        x = image(case)
        yield objective(model.tokens(x, mask=torch.arange(model.tokens(x).shape[1] - 1).expand(2, -1) < 3))


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_gets_a_gradient(case):
    model = build(case).train()
    for loss in objectives(case, model):
        loss.backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


@pytest.mark.parametrize("case", NETWORKS)
def test_a_segmentation_network_gives_a_logit_per_class_and_voxel(case):
    x = image(case)
    logits = build(case)(x)
    assert logits.shape == (2, 2, *x.shape[2:])
    assert logits.std() > 0


@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_one_is_that_image_of_a_larger_batch(case):
    model, x = build(case), image(case)
    model = as_encoder(model) if "mae" in case else model  # pre-training draws a mask per image
    for both, alone in zip(tensors(model(x)), tensors(model(x[1:])), strict=True):
        torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_autocast_stays_near_float32(case):
    model, x = build(case), image(case, batch=1)  # CPUs without AVX-512 are slow in bfloat16
    with torch.no_grad():
        exact = tensors(run(model, x))
        with torch.autocast("cpu", torch.bfloat16):
            rough = tensors(run(model, x))
    for a, b in zip(exact, rough, strict=True):
        assert torch.isfinite(b).all()
        assert (a - b.float()).norm() < 0.1 * a.norm() + 1e-3


# --- the encoder contract


@pytest.mark.parametrize("case", ENCODERS)
def test_an_encoder_says_what_it_gives(case):
    encoder, x = as_encoder(build(case)), image(case)
    assert isinstance(encoder, Encoder)
    assert encoder.in_channels == x.shape[1]
    assert encoder.spatial_dims == x.dim() - 2
    maps = encoder(x)
    assert len(maps) == len(encoder.channels) == len(encoder.strides)
    for given, channels, strides in zip(maps, encoder.channels, encoder.strides, strict=True):
        grid = tuple(-(-n // s) for n, s in zip(x.shape[2:], strides, strict=True))
        assert given.shape == (2, channels, *grid)
    assert list(encoder.strides) == sorted(encoder.strides)
    vector = encoder.embed(x)
    assert vector.shape == (2, encoder.embed_dim)
    assert (vector[0] - vector[1]).abs().max() > 1e-4  # of the image, not of the weights alone


@pytest.mark.parametrize("case", ENCODERS)
def test_any_encoder_feeds_any_head(case):
    x = image(case)
    segmenter = Segmenter(build(case), 3, width=8)
    assert segmenter(x).shape == (2, 3, *x.shape[2:])
    classifier = Classifier(build(case), 4)
    assert classifier(x).shape == (2, 4)
    encoder = as_encoder(build(case))
    assert torch.equal(Embedder(encoder)(x), encoder.embed(x))
    for head in (segmenter, classifier):
        head(x).square().sum().backward()
        assert all(p.grad is not None for p in head.head.parameters())


def test_a_frozen_classifier_trains_its_head_alone():
    probe = Classifier(build("vit-2d"), 2, frozen=True)
    probe(image("vit-2d")).sum().backward()
    assert all((p.grad is None) == n.startswith("encoder.") for n, p in probe.named_parameters())


def test_what_is_no_encoder_feeds_no_head():
    with pytest.raises(ValueError, match=re.escape("Linear has neither")):
        Classifier(nn.Linear(2, 2), 2)


# --- bad arguments


@pytest.mark.parametrize("case", ENCODERS)
def test_another_rank_or_channel_count_is_refused(case):
    encoder, x = as_encoder(build(case)), image(case)
    with pytest.raises(ValueError, match=r"(needs|takes) .*, got shape \("):
        encoder(x[:, :1].repeat(1, x.shape[1] + 1, *[1] * (x.dim() - 2)))
    with pytest.raises(ValueError, match=r"(needs|takes) .*, got shape \("):
        encoder(x[0, 0])


@pytest.mark.parametrize("case", ENCODERS)
def test_odd_sizes_work_or_the_message_says_which_would(case):
    model, encoder = build(case), as_encoder(build(case))
    sides = tuple(n + 3 for n in CASES[case][2])
    try:
        maps = encoder(image(case, sides=sides))
    except ValueError as error:
        numbers = re.findall(r"\((\d+(?:, \d+)+)\)", str(error))
        fitting = tuple(int(n) for n in numbers[-1].split(", "))  # the last tuple of the message is the way out
        maps = encoder(image(case, sides=fitting))
    assert all(torch.isfinite(m).all() for m in maps)
    if case in NETWORKS and not case.startswith("swin_unetr"):
        x = image(case, sides=sides)
        assert model(x).shape[2:] == sides


# --- state


@pytest.mark.parametrize("case", CASES)
def test_state_dict_keys_are_frozen(case):
    """Published weights must go on loading: a changed key needs a key map for the old one, then a new entry here."""
    state = build(case).state_dict()
    account = "\n".join(f"{key} {list(value.shape)}" for key, value in state.items())
    assert [len(state), hashlib.sha256(account.encode()).hexdigest()[:16]] == KEYS[case]


@pytest.mark.parametrize("case", CASES)
def test_construction_is_seeded_and_a_reload_is_exact(case, tmp_path):
    from safetensors.torch import save_file

    model, again, other = build(case), build(case), build(case, seed=5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    load_weights(other, read_state(tmp_path / "weights.safetensors"))
    x = image(case)
    for a, b in zip(tensors(run(model, x)), tensors(run(other, x)), strict=True):
        assert torch.equal(a, b)


# --- compile and export

# The image side must be a multiple of this where torch.export leaves it open. Windowed networks are exported at a fixed
# size: whether a stage pads its grid or clamps its window is decided by comparing sizes, and as symbols these decisions
# take torch minutes to solve and hold for one range only.
DYNAMIC = {"vit": 4, "mae": 4, "uni4eye": 4, "rad_dino": 4}
EXPORTED = [case for case in CASES if case in NETWORKS or case.split("-")[0] in DYNAMIC]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_compiles_without_graph_breaks(case):
    model, x = build(case), image(case)
    with torch.no_grad():
        compiled = run(torch.compile(model, backend="eager", fullgraph=True), x)
        for a, b in zip(tensors(run(model, x)), tensors(compiled), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    torch.compiler.reset()


def exported(case):
    """What is deployed (a network, or the encoder of a pre-trained one), images to try it on, and its dynamic sides."""
    model = build(case) if case in NETWORKS else as_encoder(build(case))
    multiple = DYNAMIC.get(case.split("-")[0])
    if multiple is None:
        return model, [image(case)], None
    sides = [tuple(k * n for n in CASES[case][2]) for k in (2, 3)]
    open_sides = {2 + i: multiple * torch.export.Dim(f"n{i}", min=2) for i in range(len(sides[0]))}
    return model, [image(case, sides=s) for s in sides], (open_sides,)


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPORTED)
def test_torch_export_reproduces_the_model(case):
    model, images, sides = exported(case)
    program = torch.export.export(model, (images[0],), dynamic_shapes=sides).module()
    for x in images:
        for a, b in zip(tensors(model(x)), tensors(program(x)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.upstream
@pytest.mark.parametrize("case", [case for case in EXPORTED if case.endswith("-2d")])  # an export takes long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_onnx_reproduces_the_model(case, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images, sides = exported(case)
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (images[0],), path, dynamo=True, dynamic_shapes=sides, verbose=False)
    session = onnxruntime.InferenceSession(path)
    for x in images:
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for a, b in zip(tensors(model(x)), found, strict=True):
            torch.testing.assert_close(a.detach(), torch.from_numpy(b), rtol=1e-4, atol=1e-4)
