import json
import logging
import os
from pathlib import Path

import pytest
import torch
from checkpoint_synthetic import MAE, mae_names, random_model
from official import translate
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from medvit import create_model
from medvit.cli import app
from medvit.models.convert import load_converted, read_config

PARITY = Path(__file__).parents[2] / "shared" / "parity"
HEADS = ("--set", "num_heads=2", "--set", "decoder_num_heads=2")


@pytest.fixture(autouse=True)
def _loggers():
    """The command sets up the logger of its process."""
    logger, root = logging.getLogger("medvit"), logging.getLogger()
    before = logger.handlers, logger.level, root.handlers[:]
    yield
    logger.handlers, logger.level, root.handlers[:] = before


def medvit(*arguments, code=0):
    result = CliRunner().invoke(app, ["weights", *map(str, arguments)])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def said(result):
    """Standard error on one line: usage errors are drawn in a box, wrapped."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def mae():
    return random_model("mae", **MAE)


@pytest.fixture
def checkpoint(mae, tmp_path):
    path = tmp_path / "mae.pth"
    torch.save({"model": {f"module.{k}": v for k, v in mae_names(mae).items()}, "epoch": 3}, path)
    return path


# --- inspect


def test_inspect_shows_what_a_file_is(checkpoint):
    lines = medvit("inspect", checkpoint).stdout.splitlines()
    assert f"file\t{checkpoint}" in lines
    assert "format\tzip" in lines
    assert "types\tfloat32 (50)" in lines
    assert "unwrapped\tentry 'model', prefix 'module.'" in lines
    assert "set aside\tepoch" in lines
    (row,) = [line for line in lines if line.startswith("medical_mae\tmae\t")]
    assert "embed_dim=16, depth=2, mlp_ratio=4.0, qkv_bias=true, img_size=[32, 32]" in row
    assert row.endswith("\tnum_heads, decoder_num_heads\t-")


def test_inspect_as_json(checkpoint):
    found = json.loads(medvit("inspect", checkpoint, "--json").stdout)
    assert found["layouts"][0]["layout"] == "medical_mae"
    assert found["tensors"] == 50


def test_inspect_of_keys_that_no_layout_knows(tmp_path):
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(3)}, tmp_path / "x.pt")
    assert medvit("inspect", tmp_path / "x.pt").stderr == "no public layout: layer*.weight (3)\n"


def test_inspect_builds_no_network(checkpoint, monkeypatch):
    monkeypatch.setattr("medvit.models.convert.create_model", lambda *a, **k: pytest.fail("built a network"))
    medvit("inspect", checkpoint)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path):
    (tmp_path / "x.pt").write_text("<html>")
    result = medvit("inspect", tmp_path / "x.pt", code=1)
    assert result.stderr.startswith(f"medvit: {tmp_path / 'x.pt'}: not ")
    assert result.stderr.count("\n") == 1


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_nothing_in_a_file_is_executed(command, tmp_path):
    torch.save({"model": {}, "args": Attack(f"touch {tmp_path / 'executed'}")}, tmp_path / "x.pt")
    options = ("-m", "mae", "-o", tmp_path / "o.safetensors") if command == "convert" else ()
    assert "it asks for posix.system" in medvit(command, tmp_path / "x.pt", *options, code=1).stderr
    assert not (tmp_path / "executed").exists()


# --- convert


def test_convert_prints_the_account_and_writes(checkpoint, mae, tmp_path):
    output = tmp_path / "made" / "out.safetensors"
    result = medvit("convert", checkpoint, "-m", "mae", "-o", output, *HEADS)
    lines = result.stdout.splitlines()
    assert f"{checkpoint}\tmedical_mae\tmae\tentry 'model', prefix 'module.'\tepoch" in lines
    for row in ("num_heads\t2\tgiven", "depth\t2\tfile", "mask_ratio\t0.75\tdefault"):
        assert row in lines
    assert lines[-5:] == [
        "matched\t50\t", "dropped on purpose\t0\t", "missing\t0\t", "shape differs\t0\t", "unexplained\t0\t"
    ]  # fmt: skip
    assert result.stderr == f"50 tensors written to {output}\n"
    assert [p.name for p in output.parent.iterdir()] == ["out.safetensors"]
    image, noise = torch.randn(1, 3, 32, 32), torch.rand(1, 16)
    with torch.no_grad():
        assert torch.equal(load_converted(output)(image, noise=noise).pred, mae(image, noise=noise).pred)


@pytest.mark.parametrize("as_file", [True, False])
def test_config_is_json_or_a_file_of_it_and_set_comes_after(as_file, checkpoint, tmp_path):
    text = json.dumps({"num_heads": 4, "decoder_num_heads": 2})
    (tmp_path / "config.json").write_text(text)
    config = tmp_path / "config.json" if as_file else text
    output = tmp_path / "out.safetensors"
    medvit("convert", checkpoint, "-m", "mae", "-o", output, "--config", config, "--set", "num_heads=2")
    with safe_open(output, "pt") as file:
        arguments = read_config(file.metadata()["config"])
    assert (arguments["num_heads"], arguments["decoder_num_heads"]) == (2, 2)


def test_a_refusal_shows_the_account_and_writes_nothing(checkpoint, tmp_path):
    contents = torch.load(checkpoint)
    contents["model"]["module.junk"] = torch.zeros(1)
    contents["model"].pop("module.norm.bias")
    torch.save(contents, checkpoint)
    output = tmp_path / "out.safetensors"
    result = medvit("convert", checkpoint, "-m", "mae", "-o", output, *HEADS, "--set", "img_size=64", code=1)
    lines = result.stdout.splitlines()
    assert "img_size\t64\tgiven; the file says [32, 32]" in lines
    assert lines[-3:] == [
        "missing\t1\tencoder.norm.bias",
        "shape differs\t2\tencoder.pos_embed: network (1, 65, 16), file (1, 17, 16); "
        "decoder.pos_embed: network (1, 65, 16), file (1, 17, 16)",
        "unexplained\t1\tjunk",
    ]
    assert result.stderr == (
        f"medvit: {checkpoint}: does not fit this mae (medical_mae layout): 1 missing, 2 of another shape, "
        "1 unexplained; --resize-positions would help\n"
    )
    assert not output.exists()


def test_options_reach_the_conversion(checkpoint, tmp_path):
    contents = torch.load(checkpoint)
    contents["model"]["module.junk"] = torch.zeros(1)
    torch.save({"ema": contents["model"]}, checkpoint)
    output = tmp_path / "out.safetensors"
    medvit(
        "convert", checkpoint, "--model", "vit", "--output", output, "--entry", "ema", "--layout", "mae_encoder_cls",
        "--set", "num_heads=2", "--set", "num_classes=3", "--set", "spatial_dims=3", "--set", "in_channels=1",
        "--set", "img_size=[16, 32, 32]", "--set", "patch_size=[8, 4, 4]", "--set", "global_pool=cls", "--drop", "junk",
        "--allow-partial", "--resize-positions", "--resize-patches", "--inflate", "center", "--channels", "average",
    )  # fmt: skip
    with safe_open(output, "pt") as file:
        header = file.metadata()
    assert json.loads(header["adapted"]) == [
        ["encoder.pos_embed", "resized from 1x4x4 to 2x8x8"],
        [
            "encoder.patch_embed.proj.weight",
            "patches resized from 8x8 to 4x4, inflated to depth 8 (center), 3 channels to 1 (average)",
        ],
    ]
    assert json.loads(header["missing"]) == ["head.weight", "head.bias"]


def test_an_existing_file_is_left_alone(checkpoint, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_bytes(b"mine")
    assert "exists already" in medvit("convert", checkpoint, "-m", "mae", "-o", output, *HEADS, code=1).stderr
    assert output.read_bytes() == b"mine"
    medvit("convert", checkpoint, "-m", "mae", "-o", output, *HEADS, "--overwrite")
    assert len(load_file(output)) == 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-m", "maee", "-o", "x.safetensors"), "no model named 'maee'; there are classifier, d_former, "),
        (("-m", "mae", "-o", "x.pt"), "--output must end in .safetensors, got x.pt"),
        (("-m", "mae", "-o", "x.safetensors", "--set", "depth"), "--set takes name=value, got 'depth'"),
        (("-m", "mae", "-o", "x.safetensors", "--config", "{"), "--config takes JSON or a file of it, got '{'"),
        (("-m", "mae", "-o", "x.safetensors", "--config", "no"), "--config takes JSON or a file of it, got 'no'"),
        (("-m", "mae", "-o", "x.safetensors", "--drop", "("), "--drop takes a regular expression, got '('"),
        (("-m", "mae", "-o", "x.safetensors", "--inflate", "max"), "Invalid value for '--inflate'"),
        (("-m", "mae"), "Missing option '--output'"),
    ],
)
def test_wrong_usage(arguments, message, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert message in said(medvit("convert", tmp_path / "x.pt", *arguments, code=2))


@pytest.mark.parametrize("arguments", [("--help",), ("inspect", "--help"), ("convert", "--help")])
def test_every_command_explains_itself(arguments):
    assert "Usage" in medvit(*arguments).output


# --- the official files of ../shared/parity, from their constructors to a stored tensor


# fixture: model, document whose table translates its arguments, further ones, input, what to call, stored output
CASES = {
    "swinunetr3d": (
        "swin_unetr", "swin_unetr", {"use_v2": True, "downsample": "merging"}, "in.input",
        lambda m, x: m.encoder(x)[4], "out.v2.hidden_states.4",
    ),
    "swinunetr2d": (
        "swin_unetr", "swin_unetr", {"use_v2": True}, "in.input",
        lambda m, x: m.encoder(x)[4], "out.v2.hidden_states.4",
    ),
    "dformer_seg": (
        "d_former", "d_former", {}, "in.input", lambda m, x: m.encoder(x)[3].movedim(1, -1), "out.bottleneck_norm"
    ),
    "hbformer": ("hbformer", "hbformer", {}, "in.input", lambda m, x: m(x)[..., ::4, ::4], "out.out@s4"),
    "uni4eye_encoder": ("uni4eye", "uni4eye", {}, "in.imgs3d", lambda m, x: m.tokens(x), "out.3d.latent_all"),
    "uni4eye_mae": (
        "uni4eye_pp_mae", "uni4eye", {}, "in.imgs2d", lambda m, x, noise: m(x, noise=noise).pred, "out.2d.pred"
    ),
    "raddino": ("rad_dino", "rad_dino", {}, "in.rect", lambda m, x: m.embed(x), "out.rect.pooler_output"),
    "raddino_fbkeys": (
        "rad_dino", "rad_dino", {}, "in.rect", lambda m, x: m.embed(x), "out.rect.offset0.1.x_norm_clstoken"
    ),
    "medmae_vit": ("vit", "mae", {}, "in.imgs", lambda m, x: m(x), "out.global_pool.logits"),
    "medmae_pretrain": (
        "mae", "mae", {}, "in.imgs", lambda m, x, noise: m(x, 0.75, noise=noise).pred, "out.r0.75.pred"
    ),
}  # fmt: skip
beside = pytest.mark.skipif(
    not PARITY.is_dir(), reason="the golden tensors of ../shared/parity are not beside this checkout"
)


@beside
@pytest.mark.parametrize("case", CASES)
def test_an_official_file_becomes_a_network_that_reproduces_it(case, tmp_path):
    model, document, further, image, call, stored = CASES[case]
    description = json.loads((PARITY / f"{case}.json").read_text())
    official = {}
    for part in ("constructor", "backbone_override", "hf_config"):
        official |= description["config"].get(part, {})
    config = translate(f"docs/{document}.md", official)
    if model == "uni4eye":  # the encoder of a network with a decoder
        config = {k: v for k, v in config.items() if not k.startswith("decoder")}
    source, output = PARITY / f"{case}.weights.safetensors", tmp_path / "out.safetensors"
    if case == "uni4eye_mae":  # stored as the factors of a large matrix
        state = load_file(source)
        u, v = state.pop("controller.weight.u"), state.pop("controller.weight.v")
        state["controller.weight"] = (u[:, None] * v[torch.arange(len(u)) % 4])[..., None]
        source = tmp_path / "source.safetensors"
        save_file(state, source)

    medvit("convert", source, "-m", model, "-o", output, "--config", json.dumps({**config, **further}))

    with safe_open(output, "pt") as file:
        arguments = read_config(file.metadata()["config"])
    network = create_model(model, **arguments)
    network.load_state_dict(load_file(output))
    io = load_file(PARITY / f"{case}.io.safetensors")
    noise = (io["in.noise"],) if "in.noise" in io else ()
    with torch.no_grad():
        got = call(network.eval(), io[image], *noise)
    assert got.shape == io[stored].shape
    assert (got - io[stored]).abs().max() <= description["tolerance_abs"]


@beside
@pytest.mark.parametrize("case", ["dformer_blocks", "hbformer_blocks"])
def test_single_blocks_are_no_network(case, tmp_path):
    model = {"dformer_blocks": "d_former", "hbformer_blocks": "hbformer"}[case]
    source, output = PARITY / f"{case}.weights.safetensors", tmp_path / "out.safetensors"
    result = medvit("convert", source, "-m", model, "-o", output, code=1)
    assert f"no weights of {model}: no public layout has keys like" in result.stderr
    assert not output.exists()
