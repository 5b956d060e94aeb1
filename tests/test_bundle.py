import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_synthetic import blobs, edit_json, expected_labels, make_bundle, write_weights
from data_synthetic import make_affine, write_nifti

from medvit import create_model
from medvit.bundle import Bundle, bundle_folders, find_bundle, list_bundles, locate, select_device, structures
from medvit.errors import BundleError, NothingFound, WeightsMismatch

# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")
NAME = "hippocampus_swin_unetr"


@pytest.fixture
def tiny(tmp_path):
    return Bundle(make_bundle(tmp_path))


@pytest.fixture
def study(tmp_path):
    write_nifti(tmp_path / "study/a.nii.gz", blobs(), make_affine("sagittal", (1, 1, 1)))
    return tmp_path / "study"


def _result(check, bundle):
    return dict(bundle.verify())[check]


# ---- finding


def test_bundles_are_found_by_name_and_by_folder(tmp_path, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    assert find_bundle(NAME).name == NAME
    assert find_bundle("tiny").root == tmp_path / "tiny"  # a folder here
    assert find_bundle(str(tmp_path / "tiny")).metadata["name"] == "tiny"
    monkeypatch.chdir("/")
    with pytest.raises(BundleError, match=f"tiny: no such bundle; give a folder that holds .*, or one of: .*{NAME}"):
        find_bundle("tiny")
    monkeypatch.setenv("MEDVIT_BUNDLES", str(tmp_path))
    assert find_bundle("tiny").root == tmp_path / "tiny"
    assert {"tiny", NAME} <= {bundle.name for bundle in list_bundles()}


def test_the_users_own_folders_come_first(tmp_path, monkeypatch):
    make_bundle(tmp_path, name=NAME)
    monkeypatch.setenv("MEDVIT_BUNDLES", f"{tmp_path}:{tmp_path / 'absent'}")
    assert bundle_folders()[0] == tmp_path and tmp_path / "absent" not in bundle_folders()
    assert find_bundle(NAME).root == tmp_path / NAME


def test_locate_prefers_the_bundle_where_one_is_to_the_installed_one(tmp_path, monkeypatch):
    make_bundle(tmp_path, name=NAME)
    for folder in (tmp_path, tmp_path / NAME):
        monkeypatch.chdir(folder)
        assert locate(NAME) == str(tmp_path / NAME)
    monkeypatch.chdir("/")
    assert Path(locate(NAME)) == find_bundle(NAME).root != tmp_path / NAME
    with pytest.raises(BundleError, match=r"other: no such bundle; .*; or pass --bundle_root"):
        locate("other")


# ---- parts


def test_select_device():
    assert select_device("cpu") == torch.device("cpu")
    assert select_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BundleError, match="device 'gpu' is unknown to torch; use auto, cpu or cuda"):
        select_device("gpu")


def test_select_device_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device() == torch.device("cpu")
    with pytest.raises(BundleError, match="device 'cuda:1' needs a CUDA GPU and torch sees none; use auto or cpu"):
        select_device("cuda:1")


def test_the_network_comes_with_its_weights_ready_for_inference(tiny):
    network = tiny.network()
    assert not network.training
    assert network.weight.flatten().tolist() == [0, 1, 2]


def test_structures_need_names_and_codes_that_agree(tiny):
    assert [(s.label, s.name) for s in structures(tiny.metadata)] == [
        (1, "anterior hippocampus"),
        (2, "posterior hippocampus"),
    ]
    with pytest.raises(BundleError, match="the metadata lack 'medvit'"):
        structures({key: value for key, value in tiny.metadata.items() if key != "medvit"})
    fewer = json.loads(json.dumps(tiny.metadata))
    del fewer["medvit"]["structures"]["2"]
    with pytest.raises(BundleError, match=r"every label of channel_def but 0: \['1', '2'\], got \['1'\]"):
        structures(fewer)


# ---- configuration


def test_overrides_must_be_known_keys(tiny):
    assert tiny.parser(overlap=0.25)["overlap"] == 0.25
    with pytest.raises(BundleError, match=r"inference.json: has no key 'overlapp' to override; it has .*, overlap,"):
        tiny.parser(overlapp=0.25)


@pytest.mark.parametrize("text", ["/data/case#1", "$print()", "@overlap", "%x.json"])
def test_text_that_monai_takes_for_syntax_is_refused(tiny, text):
    for value in (text, ["fine", text]):
        with pytest.raises(BundleError, match=r"as syntax; give a pathlib\.Path"):
            tiny.parser(dataset_dir=value)


def test_later_configs_lie_over_earlier_ones(tiny):
    parser = tiny.parser("train", "evaluate", resume="")
    assert parser["checkpoint"] == "models/model.pt" and parser["max_epochs"] == 220
    assert parser["validate"]["evaluator"]["network"] == "@network"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_unreadable_configuration(tiny, content):
    path = tiny.root / "configs/metadata.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BundleError, match=r"metadata.json: (cannot be read|must hold a JSON object, got list)"):
        _ = tiny.metadata
    with pytest.raises(BundleError):
        tiny.runner()


def test_an_error_of_the_configuration_is_told_in_one_sentence(tiny, study):
    edit_json(tiny.root / "configs/inference.json", inferer={"_target_": "SlidingWindowInfererer"})
    with pytest.raises(BundleError, match=r"tiny: 'evaluator' of its configuration cannot be built \(\w+: .*Infererer"):
        tiny.runner(dataset_dir=study)


def test_bundles_of_other_makers_are_left_to_monai(tiny, study, tmp_path):
    edit_json(tiny.root / "configs/inference.json", evaluator={"_target_": "SimpleInferer"})
    with pytest.raises(
        BundleError, match=r"must be a medvit\.bundle\.folder_runner, got SimpleInferer; run this bundle with"
    ):
        tiny.runner(dataset_dir=study, output_dir=tmp_path / "out")


# ---- running


def test_the_runner_does_what_the_network_says(tiny, study, tmp_path):
    (record,) = tiny.runner(dataset_dir=study, output_dir=tmp_path / "out", formats=["nifti"]).run()
    import nibabel

    mask = nibabel.load(tmp_path / "out" / record["outputs"][0])
    assert np.array_equal(np.asarray(mask.dataobj), expected_labels(blobs()))
    assert record["bundle"] == "tiny"
    assert record["weights_sha256"] == tiny.metadata["medvit"]["weights_sha256"]
    assert record["settings"] == {
        "roi_size": [64, 64, 64],
        "overlap": 0.5,
        "mirror_axes": [0],
        "amp": False,
        "formats": ["nifti"],
    }
    assert set(record["versions"]) == {"medvit", "monai", "torch"}


def test_paths_that_are_syntax_to_monai_work_as_paths(tmp_path):
    root = make_bundle(tmp_path / "#1")
    write_nifti(tmp_path / "$in#/@a#2.nii", blobs(), np.eye(4))
    out = tmp_path / "%out#"
    (record,) = Bundle(root).runner(dataset_dir=[tmp_path / "$in#"], output_dir=out, formats=["nifti"]).run()
    assert record["case"] == "@a#2"
    assert (out / "@a#2_seg.nii.gz").is_file()


def test_what_is_wrong_is_raised_without_monais_wrapping(tiny, study, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingFound, match=r"empty: no DICOM series of modality MR and no NIfTI file and no MetaImage"):
        tiny.runner(dataset_dir=tmp_path / "empty")
    with pytest.raises(BundleError, match="device 'gpu' is unknown"):
        tiny.runner(dataset_dir=study, device_name="gpu")


# ---- weights


def test_missing_weights(tiny, study):
    (tiny.root / "models/model.pt").unlink()
    with pytest.raises(WeightsMismatch, match=r"tiny/models/model.pt: no such weights file"):
        tiny.runner(dataset_dir=study)
    assert "lacks models/model.pt" in _result("files", tiny)


def test_weights_with_another_hash(tiny, study):
    write_weights(tiny.root, {"weight": torch.zeros(3, 1, 1, 1, 1), "bias": torch.zeros(3)}, honest=False)
    expected = tiny.metadata["medvit"]["weights_sha256"]
    with pytest.raises(
        WeightsMismatch, match=rf"tiny/models/model.pt: .* expected sha256 {expected}, found [0-9a-f]{{64}}; "
    ):
        tiny.runner(dataset_dir=study)
    assert f"expected sha256 {expected}" in _result("weights", tiny)


def test_weights_of_another_shape(tiny, study):
    write_weights(tiny.root, {"weight": torch.zeros(4, 1, 1, 1, 1), "bias": torch.zeros(4)})
    with pytest.raises(
        WeightsMismatch,
        match=r"tiny/models/model.pt: the weights do not fit the network: 2 of another shape "
        r"\(bias: network \(3,\), weights \(4,\), weight: ",
    ):
        Bundle(tiny.root).runner(dataset_dir=study)


def test_weights_with_other_names(tiny, study):
    write_weights(tiny.root, {"weight": torch.zeros(3, 1, 1, 1, 1), "offset": torch.zeros(3)})
    with pytest.raises(WeightsMismatch, match=r"1 missing \(bias\); 1 unexpected \(offset\)"):
        Bundle(tiny.root).runner(dataset_dir=study)


# ---- verify: each check must be able to fail


def test_a_whole_bundle_verifies(tiny):
    assert dict(tiny.verify()) == dict.fromkeys(["files", "metadata", "weights", "network", "configs agree"])
    (tiny.root / "configs/train.json").unlink()
    assert _result("configs agree", tiny) is None


def test_verify_files(tiny):
    (tiny.root / "LICENSE").unlink()
    (tiny.root / "docs/README.md").unlink()
    assert _result("files", tiny) == f"{tiny.root}: lacks LICENSE, docs/README.md"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "huge"}, "the metadata call the bundle 'huge', its folder 'tiny'"),
        ({"version": "9.9.9"}, "version '9.9.9' is not in the changelog"),
        ({"medvit": None}, "the metadata lack 'medvit': needed are the channel_def of pred and medvit.structures"),
    ],
)
def test_verify_metadata(tiny, change, message):
    edit_json(tiny.root / "configs/metadata.json", **change)
    assert _result("metadata", Bundle(tiny.root)) == message


def test_verify_weights_needs_their_hash(tiny):
    edit_json(tiny.root / "configs/metadata.json", medvit={"structures": tiny.metadata["medvit"]["structures"]})
    assert "must hold medvit.weights_sha256" in _result("weights", Bundle(tiny.root))
    assert "'network' of its configuration cannot be built" in _result("network", Bundle(tiny.root))


def test_verify_network(tiny):
    formats = json.loads(json.dumps(tiny.metadata["network_data_format"]))
    formats["outputs"]["pred"]["num_channels"] = 5
    edit_json(tiny.root / "configs/metadata.json", network_data_format=formats)
    assert _result("network", Bundle(tiny.root)) == (
        "by the metadata the network returns (1, 5, 64, 64, 64), it returns (1, 3, 64, 64, 64)"
    )


def test_verify_network_output(tiny):
    write_weights(tiny.root, {"weight": torch.full((3, 1, 1, 1, 1), float("nan")), "bias": torch.zeros(3)})
    assert _result("network", Bundle(tiny.root)) == "the network returns NaN or infinity for an image of zeros"


@pytest.mark.parametrize("key", ["network_def", "roi_size"])
def test_verify_configs(tiny, key):
    edit_json(tiny.root / "configs/train.json", **{key: [1]})
    assert _result("configs agree", tiny) == f"train.json and inference.json disagree about {key}"


# ---- freezing weights


@pytest.fixture(scope="module")
def freeze():
    spec = importlib.util.spec_from_file_location(
        "freeze_weights", Path(__file__).parents[1] / "scripts/freeze_weights.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.freeze


def _state(value=0.5):
    return {"weight": torch.full((3, 1, 1, 1, 1), value), "bias": torch.full((3,), value)}


def test_freezing_adopts_weights_and_their_hash(tiny, tmp_path, freeze, capsys):
    torch.save({"ema": _state(), "trainer": {"epoch": 3}}, tmp_path / "checkpoint.pt")
    freeze(tiny, tmp_path / "checkpoint.pt", key="ema", half=True)
    frozen = Bundle(tiny.root)
    assert dict(frozen.verify()) == dict.fromkeys(["files", "metadata", "weights", "network", "configs agree"])
    stored = torch.load(tiny.root / "models/model.pt", weights_only=True)
    assert stored["weight"].dtype == torch.float16
    assert frozen.network().weight.dtype == torch.float32 and frozen.network().weight.flatten().tolist() == [0.5] * 3
    assert frozen.metadata["medvit"]["weights_sha256"] in capsys.readouterr().out
    text = (tiny.root / "configs/metadata.json").read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"ema": _state()}, {"key": "best"}, "has no entry 'best', but ema"),
        ({"ema": _state(), "epoch": 3}, {}, "holds more than tensors; pick one of ema, epoch with --key"),
        (_state(float("nan")), {}, "NaN or infinite values in weight, bias"),
        (_state(1e6), {"half": True}, "NaN or infinite values in weight, bias"),
        ({"weight": torch.zeros(1)}, {}, "do not fit the network: 1 missing"),
        (None, {}, "no such checkpoint"),
    ],
)
def test_freezing_touches_nothing_when_weights_do_not_serve(tiny, tmp_path, freeze, content, options, message):
    before = {p: p.read_bytes() for p in tiny.root.rglob("*") if p.is_file()}
    path = tmp_path / "checkpoint.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsMismatch, match=message):
        freeze(tiny, path, **options)
    assert {p: p.read_bytes() for p in tiny.root.rglob("*") if p.is_file()} == before


def test_freezing_an_encoder_into_a_network_that_adds_nothing_to_it(tiny, tmp_path, freeze):
    encoder = {"name": "rad_dino", "img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 2}
    edit_json(
        tiny.root / "configs/inference.json",
        network_def={"_target_": "medvit.create_model", "name": "embedder", "encoder": encoder},
    )
    trained = create_model(**encoder)
    torch.save(trained.state_dict(), tmp_path / "encoder.pt")
    freeze(tiny, tmp_path / "encoder.pt")
    network = Bundle(tiny.root).network()
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in network.encoder.state_dict().items())
    torch.save({**trained.state_dict(), "more": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(WeightsMismatch, match="do not fit the network"):
        freeze(tiny, tmp_path / "other.pt")


def test_a_copy_of_a_bundle_is_a_bundle(tiny, tmp_path):
    shutil.copytree(tiny.root, tmp_path / "elsewhere/tiny")
    assert all(wrong is None for wrong in dict(Bundle(tmp_path / "elsewhere/tiny").verify()).values())
