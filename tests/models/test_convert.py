"""Public layouts to files of ours: recognised, inferred, written, loaded again with the same numbers."""

import json
import re
from pathlib import Path

import pytest
import torch
from checkpoint_synthetic import MAE, SWIN, mae_names, monai_names, random_model, ssl_names
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import medvit
from medvit import create_model
from medvit.errors import WeightsMismatch
from medvit.models.checkpoints import read_checkpoint
from medvit.models.convert import convert, describe, layouts, load_converted, read_config, recognise
from medvit.models.reshape import Reshape

DAE = {"root": "encoder.", "stage": "layers{}.0.0."}


@pytest.fixture
def file(tmp_path):
    """Write a checkpoint and read it back."""

    def write(contents, name="public.pth"):
        torch.save(contents, tmp_path / name)
        return read_checkpoint(tmp_path / name)

    return write


@pytest.fixture(scope="module")
def swin():
    return random_model("swin_unetr", downsample="merging_legacy", **SWIN)


@pytest.fixture(scope="module")
def mae():
    return random_model("mae", **MAE)


def refusal(message):
    return pytest.raises(WeightsMismatch, match=message)


# --- recognition


def test_layouts_of_a_model_have_names_of_their_own():
    names = [(layout.model, layout.name) for layout in layouts()]
    assert len(set(names)) == len(names)
    assert {model for model, _ in names} == {
        "d_former", "hbformer", "mae", "rad_dino", "swin_unetr", "uni4eye", "uni4eye_mae", "uni4eye_pp_mae", "vit"
    }  # fmt: skip


def test_the_document_lists_every_layout():
    text = (Path(__file__).parents[2] / "docs/weights.md").read_text()
    rows = re.findall(r"^\| (.*?) \| `(\w+)` \|", text, flags=re.MULTILINE)
    listed = sorted((model, name) for names, model in rows for name in re.findall("`(.+?)`", names))
    assert listed == sorted((layout.model, layout.name) for layout in layouts())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (monai_names, "monai"),
        (ssl_names, "monai-ssl"),
        (lambda model: ssl_names(model, **DAE), "monai-dae"),
        (lambda model: ssl_names(model, **DAE, mlp="linear"), "monai-dae"),
    ],
)
def test_swin_layouts_are_told_apart(names, expected, swin):
    assert [layout.name for layout in recognise(names(swin))] == [expected]


def test_an_mae_is_an_encoder_too(mae):
    found = [(layout.model, layout.name) for layout in recognise(mae_names(mae))]
    assert found == [("mae", "medical_mae"), ("vit", "mae_encoder"), ("vit", "mae_encoder_cls")]


def test_only_layouts_that_explain_every_key_count_where_there_are_any(mae):
    names = mae_names(mae) | {"head.weight": torch.zeros(2, 16), "head.bias": torch.zeros(2)}
    names = {k: v for k, v in names.items() if not re.match("decoder|mask_token", k)}
    assert [layout.name for layout in recognise(names)] == ["medical_mae_classifier"]
    found = {layout.name for layout in recognise({**names, "junk": torch.zeros(1)})}
    assert found == {"medical_mae_classifier", "mae_encoder", "mae_encoder_cls"}


# --- Swin UNETR: the order of patch merging


def test_the_merging_order_of_a_full_3d_file_must_be_said(swin, file):
    checkpoint = file({"state_dict": monai_names(swin)})
    with refusal(
        r"^swin_unetr needs to know downsample: neither keys nor shapes tell the order of patch merging, .*"
        r"'merging_legacy' for weights trained with MONAI before 1\.5 .*; say --set downsample=\.\.\.$"
    ):
        convert(checkpoint, "swin_unetr")


@pytest.mark.parametrize("order", ["merging_legacy", "merging", "mergingv2"])
def test_the_order_said_is_the_order_written(order, swin, file, tmp_path):
    convert(file({"state_dict": monai_names(swin)}), "swin_unetr", {"downsample": order}).save(tmp_path / "out")
    loaded = load_converted(tmp_path / "out")
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        same = torch.equal(loaded(image), swin(image))
    assert same == (order == "merging_legacy")
    assert not loaded.training


def test_in_2d_there_is_one_order(file, tmp_path):
    swin = random_model("swin_unetr", spatial_dims=2, **{**SWIN, "window_size": (2, 3)})
    convert(file(monai_names(swin)), "swin_unetr").save(tmp_path / "out")
    image = torch.randn(1, 1, 64, 32)
    with torch.no_grad():
        assert torch.equal(load_converted(tmp_path / "out")(image), swin(image))


@pytest.mark.parametrize(
    "contents",
    [
        lambda swin: {
            "state_dict": {f"module.{k}": v for k, v in ssl_names(swin).items()}
            | {f"module.{head}.weight": torch.zeros(1) for head in ("rotation_head", "contrastive_head", "conv")}
        },
        lambda swin: {
            "model": ssl_names(swin, **DAE)
            | dict.fromkeys(("encoder.mask_token", "encoder.norm.bias", "out.conv.conv.bias"), torch.zeros(1))
        },
    ],
    ids=["model_swinvit.pt", "ssl_pretrained_weights.pth"],
)  # fmt: skip
def test_self_supervised_encoders_bring_their_order(contents, swin, file, tmp_path):
    checkpoint = file(contents(swin))
    with refusal("^swin_unetr needs out_channels, which this file does not tell; say --set out_channels=...$"):
        convert(checkpoint, "swin_unetr")
    conversion = convert(checkpoint, "swin_unetr", {"out_channels": 5})
    assert len(conversion.account.dropped) == 3 + 5  # the heads, and five index buffers
    with refusal(r"does not fit this swin_unetr \(monai-\w+ layout\): \d+ missing; --allow-partial would help$"):
        conversion.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    convert(checkpoint, "swin_unetr", {"out_channels": 5}, allow_partial=True).save(tmp_path / "out")

    with refusal(
        r"out: lacks 33 tensors of swin_unetr \(stem\.conv\*\.weight \(2\); .*\), which would stay random; train them"
    ):
        load_converted(tmp_path / "out")
    loaded = load_converted(tmp_path / "out", allow_partial=True)
    image = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        for ours, theirs in zip(loaded.encoder(image), swin.encoder(image), strict=True):
            assert torch.equal(ours, theirs)


def test_what_shapes_tell_of_a_swin(swin):
    (layout,) = recognise(monai_names(swin))
    expected = {**SWIN, "spatial_dims": 3, "patch_size": [2, 2, 2], "qkv_bias": True, "patch_norm": False}
    expected |= {"norm_name": "instance", "use_v2": False}
    assert json.loads(json.dumps(layout.infer(monai_names(swin)))) == json.loads(json.dumps(expected))


def test_without_its_index_only_a_cubic_window_is_told(swin):
    def told(model):
        names = {k: v for k, v in monai_names(model).items() if "index" not in k}
        return recognise(names)[0].infer(names).get("window_size")

    assert told(swin) is None
    assert told(create_model("swin_unetr", **{**SWIN, "window_size": 3})) == [3, 3, 3]


@pytest.mark.upstream
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{"norm_name": "batch", "patch_norm": True}, {"use_v2": True, "qkv_bias": False}])
def test_monais_own_state_dict(options, file, tmp_path):
    pytest.importorskip("einops")
    from monai.networks.nets import SwinUNETR

    torch.manual_seed(0)
    theirs = SwinUNETR(in_channels=2, out_channels=3, spatial_dims=2, feature_size=12, **options).eval()
    convert(file({"state_dict": theirs.state_dict()}), "swin_unetr").save(tmp_path / "out")
    image = torch.randn(1, 2, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load_converted(tmp_path / "out")(image), theirs(image), rtol=0, atol=1e-4)


# --- masked autoencoders


def test_an_mae_comes_back_whole(mae, file, tmp_path):
    checkpoint = file({"model": mae_names(mae), "epoch": 799})
    convert(checkpoint, "mae", {"num_heads": 2, "decoder_num_heads": 2}).save(tmp_path / "out")
    loaded = load_converted(tmp_path / "out")
    image, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(image, noise=noise).pred, mae(image, noise=noise).pred)


def test_heads_are_asked_for_unless_the_width_is_published(mae, file):
    with refusal(
        r"^mae needs to know num_heads: no shape depends on it; decoder_num_heads: no shape depends on it; "
        r"say --set num_heads=\.\.\. --set decoder_num_heads=\.\.\.$"
    ):
        convert(file(mae_names(mae)), "mae")
    with refusal(r"^mae needs to know decoder_num_heads: no shape depends on it; say --set decoder_num_heads=\.\.\.$"):
        convert(file(mae_names(mae)), "mae", {"num_heads": 2})
    published = create_model(
        "mae", img_size=32, embed_dim=384, depth=1, num_heads=6, decoder_embed_dim=128, decoder_depth=1
    )
    settings = {s.name: s for s in convert(file(mae_names(published)), "mae").settings}
    assert (settings["num_heads"].value, settings["num_heads"].origin) == (6, "file")
    assert (settings["decoder_num_heads"].value, settings["decoder_num_heads"].origin) == (16, "file")


def test_an_mae_to_a_classifier(mae, file, tmp_path):
    checkpoint = file(mae_names(mae))
    given = {"num_heads": 2, "num_classes": 14}
    with refusal(r"may have any of the layouts \['mae_encoder', 'mae_encoder_cls'\]; say which \(--layout\)$"):
        convert(checkpoint, "vit", given)
    conversion = convert(checkpoint, "vit", given, layout="mae_encoder_cls", allow_partial=True)
    assert conversion.account.allowed == ("head.weight", "head.bias")
    conversion.save(tmp_path / "out")
    loaded = load_converted(tmp_path / "out", allow_partial=True)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.encoder.tokens(image), mae.encoder.tokens(image))


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_an_encoder_without_decoder_or_head(pool, mae, file, tmp_path):
    """facebookresearch/mae publishes its encoders so, and timm every network built without classes."""
    names = {k: v for k, v in mae_names(mae).items() if not re.match("decoder|mask_token", k)}
    layout = "mae_encoder_cls" if pool == "cls" else "mae_encoder"
    conversion = convert(file({"model": names}), "vit", {"num_heads": 2}, layout=layout, allow_partial=True)
    conversion.save(tmp_path / "out")
    loaded = load_converted(tmp_path / "out", allow_partial=True).encoder
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = loaded.tokens(image) if pool == "cls" else mae.encoder.norm(loaded.tokens(image))
        torch.testing.assert_close(tokens, mae.encoder.tokens(image))
    if pool == "avg":  # a fine-tuned one has its norm, and needs no layout said
        names = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in names.items()}
        assert convert(file(names), "vit", {"num_heads": 2}).layout.name == "medical_mae_classifier"


def test_a_table_of_another_size_needs_leave(mae, file, tmp_path):
    checkpoint = file(mae_names(mae))
    given = {"num_heads": 2, "decoder_num_heads": 2, "img_size": 64}
    with refusal(r"mae \(medical_mae layout\): 2 of another shape; --resize-positions would help$"):
        convert(checkpoint, "mae", given).save(tmp_path / "out")
    conversion = convert(checkpoint, "mae", given, reshape=Reshape(positions=True))
    assert conversion.account.adapted == (
        ("encoder.pos_embed", "resized from 4x4 to 8x8"),
        ("decoder.pos_embed", "resized from 4x4 to 8x8"),
    )
    conversion.save(tmp_path / "out")
    assert load_converted(tmp_path / "out").encoder.grid == (8, 8)


def test_a_2d_encoder_in_3d_embeds_equal_slices_as_it_did_one(file, tmp_path):
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    flat = random_model("vit", in_channels=3, num_classes=2, **arguments)
    names = {k.removeprefix("encoder."): v for k, v in flat.state_dict().items()}
    given = {"num_heads": 2, "spatial_dims": 3, "img_size": 16, "patch_size": 8, "in_channels": 1}
    reshape = Reshape(positions=True, inflate="mean", channels="average")
    conversion = convert(file(names), "vit", given, reshape=reshape)
    assert conversion.account.adapted == (
        ("encoder.pos_embed", "resized from 1x2x2 to 2x2x2"),
        ("encoder.patch_embed.proj.weight", "inflated to depth 8 (mean), 3 channels to 1 (average)"),
    )
    conversion.save(tmp_path / "out")
    deep = load_converted(tmp_path / "out").encoder
    grey = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        theirs = flat.encoder.patch_embed(grey.expand(-1, 3, -1, -1))
        ours = deep.patch_embed(grey[:, :, None].expand(-1, -1, 16, -1, -1))
    for z in range(2):
        torch.testing.assert_close(ours[:, z], theirs, atol=1e-5, rtol=1e-5)
        table = deep.pos_embed[:, 1 + 4 * z :][:, :4]
        torch.testing.assert_close(table, flat.encoder.pos_embed[:, 1:], atol=1e-6, rtol=0)


# --- what is refused


def test_settings_say_where_they_come_from(mae, file):
    conversion = convert(
        file(mae_names(mae)), "mae", {"num_heads": 2, "decoder_num_heads": 2, "patch_size": 8, "embed_dim": 32}
    )
    found = {s.name: (s.value, s.origin, s.disputed, s.found) for s in conversion.settings}
    assert found["num_heads"] == (2, "given", False, None)
    assert found["patch_size"] == (8, "given", False, [8, 8])  # the same, in other words
    assert found["embed_dim"] == (32, "given", True, 16)
    assert found["depth"] == (2, "file", False, None)
    assert found["mask_ratio"] == (0.75, "default", False, None)
    assert conversion.config["img_size"] == [32, 32]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"embed_dims": 16}, r"^mae has no argument 'embed_dims'; did you mean 'embed_dim'\?$"),
        ({"zzz": 16}, r"^mae has no argument 'zzz'; it has \['in_channels', "),
        ({"num_heads": 5}, r"public\.pth: mae refuses these arguments: num_heads must divide the width 16, got 5"),
    ],
)
def test_arguments_that_do_not_fit(given, message, mae, file):
    with refusal(message):
        convert(file(mae_names(mae)), "mae", {"num_heads": 2, "decoder_num_heads": 2, **given})


def test_an_argument_handed_on_is_checked_by_who_takes_it(file):
    vit = create_model("vit", num_classes=2, img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
    names = {k.removeprefix("encoder."): v for k, v in vit.state_dict().items()}
    with refusal("vit refuses these arguments: .*unexpected keyword argument 'zzz'"):
        convert(file(names), "vit", {"num_heads": 2, "zzz": 1})


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.pop("norm.bias"), "1 missing"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unexplained"),
        (lambda s: s.update({"norm.bias": torch.zeros(17)}), "1 of another shape"),
        (
            lambda s: (s.pop("mask_token"), s.update({"norm.bias": torch.zeros(17), "extra": torch.zeros(1)})),
            "1 missing, 1 of another shape, 1 unexplained",
        ),
    ],
)
def test_nothing_is_written_with_a_key_unaccounted_for(change, problem, mae, file, tmp_path):
    names = mae_names(mae)
    change(names)
    conversion = convert(file(names), "mae", {"num_heads": 2, "decoder_num_heads": 2})
    with refusal(rf"public\.pth: does not fit this mae \(medical_mae layout\): {problem}$"):
        conversion.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_keys_are_left_out_where_that_is_said(mae, file, tmp_path):
    names = mae_names(mae) | {"ema.decay": torch.zeros(1)}
    given = {"num_heads": 2, "decoder_num_heads": 2}
    conversion = convert(file(names), "mae", given, drop=[r"ema\..*"])
    assert conversion.account.dropped == ("ema.decay",)
    conversion.save(tmp_path / "out")


def test_weights_of_another_network(mae, file):
    with refusal(
        r"no weights of swin_unetr: the keys are of medical_mae \(mae\), mae_encoder \(vit\), mae_encoder_cls \(vit\); "
        r"swin_unetr takes \['monai', 'monai-dae', 'monai-ssl'\]$"
    ):
        convert(file(mae_names(mae)), "swin_unetr")


def test_a_d_former_is_asked_for_heads_and_groups_unless_it_has_the_authors_width_and_patch():
    (layout,) = layouts("d_former")
    first = "model_down.layers.0.blocks.0."
    shapes = {"model_down.patch_embed.proj.weight": (96, 3, 2, 4, 4), "final.0.1.weight": (14, 96, 1, 1, 1)}
    shapes |= {f"{first}mlp.fc1.weight": (384, 96), f"{first}norm1.weight": (96,)}
    state = {key: torch.zeros(shape) for key, shape in shapes.items()}
    told = layout.infer(state)
    assert (told["num_heads"], told["group_size"]) == ((3, 6, 12, 24), (2, 8, 8))
    assert set(layout.ask) == {"num_heads", "group_size"}
    for shape in ((48, 1, 2, 4, 4), (96, 1, 1, 4, 4)):
        state["model_down.patch_embed.proj.weight"] = torch.zeros(shape)
        assert not set(layout.ask) & set(layout.infer(state))


def test_a_converted_file_is_not_converted_again(conversion, tmp_path):
    conversion.save(tmp_path / "out")
    with refusal(r"out: is converted already, to mae; `load_converted` builds it$"):
        convert(read_checkpoint(tmp_path / "out"), "vit")


def test_weights_of_no_network_here(file):
    with refusal(r"no weights of vit: no public layout has keys like layer\*\.weight \(2\); fc\.bias; vit takes"):
        convert(
            file({"layer1.weight": torch.zeros(1), "layer2.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}), "vit"
        )


def test_the_densenet_of_medical_mae_is_called_by_its_name(file):
    checkpoint = file({"model": {"model.encoder.features.conv0.weight": torch.zeros(1)}})
    message = "keys model.encoder.*: the DenseNet masked autoencoder of medical_mae, no network of medvit"
    with refusal(f"no weights of mae: {re.escape(message)}; mae takes"):
        convert(checkpoint, "mae")
    assert describe(checkpoint)["note"] == message


def test_unknown_names(mae, file):
    checkpoint = file(mae_names(mae))
    with refusal(r"^mae has no layout 'monai'; it has \['medical_mae'\]$"):
        convert(checkpoint, "mae", layout="monai")
    with pytest.raises(ValueError, match=r"^no model named 'maee'; did you mean 'mae'\?$"):
        convert(checkpoint, "maee")


# --- the file written


@pytest.fixture
def conversion(mae, file):
    return convert(file({"model": mae_names(mae)}), "mae", {"num_heads": 2, "decoder_num_heads": 2})


def test_the_header_says_what_the_file_is(conversion, tmp_path):
    conversion.save(tmp_path / "out")
    with safe_open(tmp_path / "out", "pt") as file:
        header = file.metadata()
    assert header.pop("config") == json.dumps(conversion.config, sort_keys=True)
    assert header == {
        "format": "pt",
        "model": "mae",
        "layout": "medical_mae",
        "source": "public.pth",
        "source_sha256": conversion.checkpoint.sha256,
        "medvit_version": medvit.__version__,
        "adapted": "[]",
        "missing": "[]",
    }
    rebuilt = create_model("mae", **read_config(json.dumps(conversion.config)))
    rebuilt.load_state_dict(load_file(tmp_path / "out"))


def test_the_same_conversion_gives_the_same_bytes(conversion, tmp_path):
    """The library orders header entries anew in each call."""
    for i in range(5):
        conversion.save(tmp_path / f"{i}")
    assert len({(tmp_path / f"{i}").read_bytes() for i in range(5)}) == 1


def test_tensors_start_where_every_type_is_aligned(conversion, tmp_path):
    conversion.save(tmp_path / "out")
    assert int.from_bytes((tmp_path / "out").read_bytes()[:8], "little") % 8 == 0


def test_building_for_shapes_draws_no_random_numbers(mae, file):
    checkpoint = file(mae_names(mae))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    convert(checkpoint, "mae", {"num_heads": 2, "decoder_num_heads": 2})
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_what_was_not_converted(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with refusal(r"plain\.safetensors: names no network in its header; `medvit weights convert` writes files that do$"):
        load_converted(tmp_path / "plain.safetensors")


def test_loading_a_file_whose_tensors_were_changed(conversion, tmp_path):
    conversion.save(tmp_path / "out")
    with safe_open(tmp_path / "out", "pt") as file:
        header = file.metadata()
    tensors = load_file(tmp_path / "out")
    tensors.pop("decoder.mask_token")
    save_file(tensors, tmp_path / "out", header)
    with refusal(r"the weights do not fit the network: 1 missing \(decoder\.mask_token\)"):
        load_converted(tmp_path / "out")


def test_arguments_by_rank_survive_json():
    assert read_config('{"img_size": {"2": 56, "3": [56, 3, 56]}}') == {"img_size": {2: 56, 3: [56, 3, 56]}}
    with pytest.raises(ValueError, match="a JSON object of constructor arguments is needed, got '3'"):
        read_config("3")


# --- describe


def test_a_description_is_json_and_complete(mae, file):
    checkpoint = file({"model": mae_names(mae), "epoch": 3})
    found = json.loads(json.dumps(describe(checkpoint)))
    assert {k: found[k] for k in ("format", "unwrapped", "set_aside", "converted", "unexplained", "note")} == {
        "format": "zip", "unwrapped": ["entry 'model'"], "set_aside": ["epoch"], "converted": None, "unexplained": [],
        "note": None,
    }  # fmt: skip
    assert found["tensors"] == len(mae.state_dict())
    assert found["parameters"] == sum(v.numel() for v in mae.state_dict().values())
    assert found["dtypes"] == {"float32": found["tensors"]}
    first = found["layouts"][0]
    assert (first["layout"], first["model"], first["ask"], first["unexplained"]) == (
        "medical_mae",
        "mae",
        ["num_heads", "decoder_num_heads"],
        [],
    )
    assert first["config"]["decoder_depth"] == 1


def test_what_is_left_unexplained_and_what_stops_inference(mae, file):
    names = mae_names(mae) | {"junk": torch.zeros(1, dtype=torch.float16)}
    names.pop("blocks.0.mlp.fc1.weight")
    first = describe(file(names))["layouts"][0]
    assert (first["unexplained"], first["config"]) == (["junk"], {})
    unknown = describe(file({"junk": torch.zeros(1)}))
    assert (unknown["layouts"], unknown["unexplained"]) == ([], ["junk"])


def test_a_converted_file_describes_itself(conversion, tmp_path):
    conversion.save(tmp_path / "out.safetensors")
    found = describe(read_checkpoint(tmp_path / "out.safetensors"))
    assert found["converted"]["model"] == "mae"
    assert (found["layouts"], found["unexplained"]) == ([], [])
