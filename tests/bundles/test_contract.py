"""What every folder in bundles/ must keep: MONAI's contract, ours, and geometry from file to file."""

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import highdicom
import jsonschema
import monai
import nibabel
import numpy as np
import pytest
import torch
from bundle_synthetic import BUNDLES, blobs, edit_json, expected_labels, make_bundle, write_cohort, write_weights
from data_synthetic import make_affine, write_dicom_series, write_nifti
from monai.bundle import ConfigWorkflow
from photographs_synthetic import colours, takes_photographs, write_album, write_picture

from medvit.bundle import Bundle

ROOTS = sorted(path.parent.parent for path in BUNDLES.glob("*/configs/metadata.json"))
SCHEMA = Path(__file__).with_name("meta_schema_20240725.json")
ORIENTATIONS = ("axial", "sagittal", "coronal", "oblique")
# Top-level keys that MONAI or a user reads and no other key has to mention.
ENTRANCES = {"imports", "bundle_root", "initialize", "run", "probe", "finalize", "evaluator", "displayable_configs"}

pytestmark = [
    pytest.mark.parametrize("root", ROOTS, ids=lambda root: root.name, scope="module"),
    # MONAI advertises an optional package whenever LoadImaged is made
    pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader"),
]


@pytest.fixture(autouse=True)
def _process():
    """A workflow's traces in its process: where modules come from, and seeds."""
    before = sys.path[:]
    yield
    sys.path[:] = before
    monai.utils.set_determinism(None)


def configs(root):
    """Every combination of configs that a user may run: inference, train, and train under each overlay.

    Without train.json every config stands alone.
    """
    stems = {path.stem for path in (root / "configs").glob("*.json")} - {"metadata"}
    overlays = sorted(stems - {"inference", "train"})
    if "train" not in stems:
        return [("inference",), *((overlay,) for overlay in overlays)]
    return [("inference",), ("train",), *(("train", overlay) for overlay in overlays)]


def workflow(root, *stems, **overrides):
    """MONAI's workflow over configs of a bundle, initialised."""
    files = [str(root / f"configs/{stem}.json") for stem in stems]
    kind = "infer" if "inference" in stems else "train"
    made = ConfigWorkflow(files, workflow_type=kind, logging_file=False, bundle_root=str(root), **overrides)
    made.initialize()
    return made


def cohort(root, folder):
    """Labelled cases of the kind that a bundle takes, called case0, case1 and so on."""
    return write_album(folder) if takes_photographs(root) else write_cohort(folder)


def quick(root):
    """Settings of a bundle for photographs that keep these small."""
    return {"longest_side": 420} if takes_photographs(root) and not gives_vectors(root) else {}


def gives_vectors(root):
    """True for a bundle that says something of an image as a whole; see test_classifiers.py, test_embedders.py."""
    return Bundle(root).metadata["network_data_format"]["outputs"]["pred"]["type"] in ("probabilities", "tuples")


def strings(config, path=()):
    """(path, text) of every string in a configuration, keys included."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield (*path, key), key
            yield from strings(value, (*path, key))
    elif isinstance(config, list):
        for number, value in enumerate(config):
            yield from strings(value, (*path, str(number)))
    elif isinstance(config, str):
        yield path, config


def references(text):
    """Ids that a string of a configuration refers to."""
    if not text.startswith(("$", "@")):
        return []
    return [found.rstrip(":") for found in re.findall(r"@((?:\w+|::)+)", text)]


# ---- files and text


def test_files(root):
    needed = ("LICENSE", "configs/metadata.json", "configs/inference.json", "configs/logging.conf", "docs/README.md")
    assert [name for name in needed if not (root / name).is_file()] == []
    assert list((root / "models").glob("*.pt")) == [root / "models/model.pt"]  # other tools offer every *.pt
    assert Bundle(root).metadata["eval_metrics"]  # measured, and stated in the card too
    card = (root / "docs/README.md").read_text(encoding="utf-8")
    assert [str(value) for value in Bundle(root).metadata["eval_metrics"].values() if str(value) not in card] == []


def test_json_is_plain(root):
    def unique(pairs):
        assert len(dict(pairs)) == len(pairs), f"a key occurs twice: {[key for key, _ in pairs]}"
        return dict(pairs)

    for path in root.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=unique)
        assert text == json.dumps(content, indent=4, ensure_ascii=False) + "\n", f"{path.name}: 4 spaces, final newline"
        assert len(text) < 1_000_000


def test_metadata_follow_the_schema(root):
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    metadata = Bundle(root).metadata
    jsonschema.validate(metadata, schema)
    assert metadata["schema"].endswith(SCHEMA.name)
    assert next(iter(metadata["changelog"])) == metadata["version"]  # newest first
    assert set(metadata["network_data_format"]["inputs"]) == {"image"}
    assert set(metadata["network_data_format"]["outputs"]) == {"pred"}
    assert "not for diagnosis" in metadata["intended_use"]
    assert metadata["data_source"] and metadata["references"] and metadata["medvit"]["weights_licence"]


def test_inference_can_be_audited_without_being_run(root):
    config = json.loads((root / "configs/inference.json").read_text(encoding="utf-8"))
    code = {path[0] for path, text in strings(config) if text.startswith("$")}
    assert code <= {"initialize", "run"}
    targets = [text for path, text in strings(config) if path[-1] == "_target_"]
    assert targets and not [target for target in targets if target.startswith("scripts.")]


def test_no_text_that_monai_would_rewrite(root):
    for path in (root / "configs").glob("*.json"):
        for place, text in strings(json.loads(path.read_text(encoding="utf-8"))):
            assert "#" not in text and not text.startswith("%"), f"{path.name}: {place}"
            assert place[-1] == "imports" or "import" not in place[-1], f"{path.name}: {place}"


def test_every_reference_resolves_and_every_key_is_used(root):
    for stems in configs(root):
        parser = Bundle(root).parser(*stems)
        config = {key: value for key, value in parser.get().items() if key != "_meta_"}
        used = [(place, id) for place, text in strings(config) for id in references(text)]
        assert [(place, id) for place, id in used if id not in parser] == [], stems
        if len(stems) == 1:  # an overlay may leave keys of its base behind
            mentioned = {id.split("::")[0] for _, id in used}
            assert set(config) - mentioned - ENTRANCES == set(), stems


def test_configs_have_what_the_command_sets(root):
    keys = Bundle(root).parser().get()
    wanted = {"dataset_dir", "output_dir", "device_name", "existing", "formats", "batch_size", "amp", "checkpoint"}
    assert wanted - set(keys) == ({"batch_size"} if gives_vectors(root) else set())  # there are no windows


# ---- objects


def test_it_verifies_and_its_weights_load_strictly(root):
    assert {name: wrong for name, wrong in Bundle(root).verify() if wrong} == {}
    state = torch.load(root / "models/model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    network = Bundle(root).network()
    assert set(network.state_dict()) == set(state)
    assert (root / "models/model.pt").stat().st_size <= 8.4e6


def test_training_and_inference_see_the_same_image(root, tmp_path):
    if not (root / "configs/train.json").exists():
        pytest.skip("this bundle is not trained here")
    if takes_photographs(root):
        case = {
            key: str(path) for key in ("image", "label", "fov") for path in write_album(tmp_path).glob(f"{key}/eye0.*")
        }
    else:
        shape = (28, 48, 20)
        image = (blobs(shape) + np.random.default_rng(0).integers(0, 50, shape)).astype(np.int16)
        path = write_nifti(tmp_path / "a.nii.gz", image, make_affine("oblique", (1.3, 0.8, 2.0)))
        case = {"image": str(path), "label": str(path)}
    seen = Bundle(root).parser().get_parsed_content("preprocessing")({"image": case["image"]})["image"]
    trained = Bundle(root).parser("train", dataset_dir=tmp_path).get_parsed_content("validate::preprocessing")
    learned = trained(case)["image"]
    assert seen.shape == learned.shape and seen.dtype == learned.dtype == torch.float32
    assert torch.allclose(seen.affine, learned.affine, atol=1e-6)
    assert torch.allclose(seen.as_tensor(), learned.as_tensor(), atol=1e-6)
    if not takes_photographs(root):
        assert float(seen.mean()) == pytest.approx(0, abs=1e-4) and float(seen.std()) == pytest.approx(1, abs=1e-3)


def test_monai_finds_the_properties_it_requires(root, tmp_path):
    cohort(root, tmp_path / "cohort")
    overrides = {"dataset_dir": str(tmp_path / "cohort"), "output_dir": str(tmp_path / "out")}
    infer = workflow(root, "inference", **overrides)
    assert infer.check_properties() == []
    assert isinstance(infer.network_def, torch.nn.Module)
    assert not (tmp_path / "out").exists()  # looking writes nothing
    if (root / "configs/train.json").exists():
        train = workflow(root, "train", **overrides)
        assert train.check_properties() == []
        assert isinstance(train.max_epochs, int)


def test_the_real_network_gives_the_same_bytes_twice(root, tmp_path):
    if gives_vectors(root):
        first = Bundle(root).parser()["formats"][0]
        mask = {"scores": "a_scores.json", "embedding": "a_embedding.npy"}[first]
        path = write_picture(tmp_path / "a.png", colours(420, 400)[..., 0])
    elif takes_photographs(root):
        path, mask = write_picture(tmp_path / "a.jpg", colours(420, 400), 6), "a_seg.png"
    else:
        path, mask = tmp_path / "a.nii.gz", "a_seg.nii.gz"
        write_nifti(path, blobs((30, 40, 30)), make_affine("oblique", (1.2, 1, 1.1)))
    for out in ("one", "two"):
        Bundle(root).runner(dataset_dir=path, output_dir=tmp_path / out, **quick(root)).run()
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert mask in tree(tmp_path / "one")


# ---- from file to file, through both doors; the network is one whose answer is known


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def monai_run(root, *stems, cwd, launcher=(), **overrides):
    """``python -m monai.bundle run`` as a user types it; returns its output, standard error included."""
    files = [str(root / f"configs/{stem}.json") for stem in stems]
    options = {"bundle_root": root, "config_file": files[0] if len(files) == 1 else str(files), **overrides}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, *launcher, "-m", "monai.bundle", "run", *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def _name_patient(dataset, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.add_new(0x00101010, "AS", "Zyxwvut")  # pydicom warns of it, quoting


@pytest.fixture(scope="module")
def runs(root, tmp_path_factory):
    """One study in four orientations as DICOM and NIfTI; its masks through MONAI's door and through ours."""
    if takes_photographs(root):
        pytest.skip("a bundle for photographs; how these come back is the matter of test_photographs.py")
    base = tmp_path_factory.mktemp(root.name)
    for orientation in ORIENTATIONS:
        affine = make_affine(orientation, (1, 1, 1))
        tags = {"PatientName": "Zyxwvut^Qponmlk", "SeriesDescription": orientation, "FrameOfReferenceUID": "1.2.3"}
        write_dicom_series(base / f"in/dicom/{orientation}", blobs(), affine, edit=_name_patient, **tags)
        upright = nibabel.as_closest_canonical(nibabel.Nifti1Image(blobs(), affine))
        write_nifti(base / f"in/nifti/{orientation}.nii.gz", np.asarray(upright.dataobj), upright.affine)
    bundle = make_bundle(base, origin=root.name)
    (base / "elsewhere").mkdir()
    said = monai_run(bundle, "inference", cwd=base / "elsewhere", dataset_dir=base / "in", output_dir=base / "monai")
    before = tree(base / "in"), tree(bundle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Bundle(bundle).runner(dataset_dir=[base / "in"], output_dir=base / "medvit").run()
    assert (tree(base / "in"), tree(bundle)) == before
    assert list((base / "elsewhere").iterdir()) == []
    return base, said


def masks(out, orientation):
    """NIfTI masks of the DICOM series and of the NIfTI file in one orientation."""
    return [
        nibabel.load(out / name)
        for name in (f"dicom/{orientation}/3_{orientation}_seg.nii.gz", f"nifti/{orientation}_seg.nii.gz")
    ]


def test_both_doors_give_the_same_bytes(runs):
    base, said = runs
    one, two = (
        {name: data for name, data in tree(base / out).items() if not name.endswith("_seg.dcm")}
        for out in ("monai", "medvit")
    )
    assert len(one) == 2 * 4 * 2 + 3
    assert one == two
    assert " - medvit - INFO - case 8 of 8, nifti/sagittal: ok" in said  # logging.conf was accepted
    assert "zyxwvut" not in said.lower()


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_masks_lie_on_the_grid_of_their_source(runs, orientation):
    base, _ = runs
    of_dicom, of_nifti = masks(base / "monai", orientation)
    source = nibabel.load(base / f"in/nifti/{orientation}.nii.gz")
    assert of_dicom.shape == blobs().shape
    assert np.abs(of_dicom.affine - make_affine(orientation, (1, 1, 1))).max() < 1e-5
    assert of_nifti.shape == source.shape and np.abs(of_nifti.affine - source.affine).max() < 1e-5
    for code in ("sform_code", "qform_code"):
        assert of_nifti.header[code] == source.header[code]
    assert of_dicom.get_data_dtype() == of_nifti.get_data_dtype() == np.uint8


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_labels_are_right_and_equal_in_the_patient_for_dicom_and_nifti(runs, orientation):
    base, _ = runs
    of_dicom, of_nifti = masks(base / "monai", orientation)
    assert np.array_equal(np.asarray(of_dicom.dataobj), expected_labels(blobs()))
    upright = nibabel.as_closest_canonical(of_dicom)
    assert np.array_equal(np.asarray(upright.dataobj), np.asarray(of_nifti.dataobj))
    assert np.abs(upright.affine - of_nifti.affine).max() < 1e-5


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.filterwarnings("ignore:Invalid value for VR AS")
def test_the_seg_says_what_the_nifti_mask_says(runs, orientation):
    base, _ = runs
    mask, _ = masks(base / "monai", orientation)
    seg = highdicom.seg.segread(base / f"monai/dicom/{orientation}/3_{orientation}_seg.dcm")
    volume = seg.get_volume(combine_segments=True)
    to_mask = np.linalg.inv(mask.affine) @ np.diag([-1, -1, 1, 1]) @ volume.affine  # DICOM's world is LPS
    indices = np.argwhere(volume.array)
    places = indices @ to_mask[:3, :3].T + to_mask[:3, 3]
    assert np.abs(places - np.rint(places)).max() < 1e-3
    labels = np.asarray(mask.dataobj)
    assert len(indices) == np.count_nonzero(labels) > 1000
    assert np.array_equal(labels[tuple(np.rint(places).astype(int).T)], volume.array[tuple(indices.T)])
    described = [(s.segment_number, s.segment_label) for s in seg.SegmentSequence]
    names = Bundle(base / "tiny").metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert described == [(int(n), name) for n, name in names.items() if n != "0"]


def test_volumes_count_the_voxels_of_the_masks(runs):
    base, _ = runs
    rows = json.loads((base / "monai/volumes.json").read_text(encoding="utf-8"))
    counts = np.bincount(expected_labels(blobs()).ravel())
    assert len(rows) == 8 * 2
    assert all(row["voxels"] == counts[row["label"]] for row in rows)
    assert all(row["volume_mm3"] == pytest.approx(row["voxels"], rel=1e-6) for row in rows)


def test_a_coarse_oblique_grid_is_restored_too(root, tmp_path):
    if takes_photographs(root):
        pytest.skip("photographs have no coarse grids")
    bundle = make_bundle(tmp_path, origin=root.name)
    affine = make_affine("oblique", (0.8, 1.7, 2.4))
    write_nifti(tmp_path / "a.nii.gz", blobs(), affine)
    (record,) = Bundle(bundle).runner(dataset_dir=tmp_path / "a.nii.gz", output_dir=tmp_path / "out").run()
    mask = nibabel.load(tmp_path / "out" / record["outputs"][0])
    assert mask.shape == blobs().shape and np.abs(mask.affine - affine).max() < 1e-5
    # resampling to 1 mm and back may move a border by half a voxel, and intensities by a little
    labels, expected = np.asarray(mask.dataobj), expected_labels(blobs())
    for label in (1, 2):
        dice = (
            2 * ((labels == label) & (expected == label)).sum() / ((labels == label).sum() + (expected == label).sum())
        )
        assert dice > 0.9


# ---- training, on six tiny cases


def training(root):
    """Settings of a short training: one crop per case and epoch."""
    short = {"num_workers": 0, "batch_size": 2, "val_interval": 1, **quick(root)}
    return {**short, "tiles_per_image": 1} if takes_photographs(root) else short


def trained(root, *stems, **overrides):
    return workflow(root, *stems, **{"checkpoint_saver::n_saved": 9, **training(root), **overrides})


def checkpoint(folder, epoch):
    return torch.load(folder / f"checkpoint_epoch={epoch}.pt", weights_only=True)


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.fixture
def progress():
    """Text of what StatsHandler says; its logger does not hand on to others."""
    text, logger = io.StringIO(), logging.getLogger("monai.handlers.StatsHandler")
    handler = logging.StreamHandler(text)
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


@pytest.mark.slow
def test_training_is_reproducible_and_resumes(root, tmp_path, progress):
    if not (root / "configs/train.json").exists():
        pytest.skip("this bundle is not trained here")
    cohort(root, tmp_path / "cohort")
    options = {"dataset_dir": str(tmp_path / "cohort"), "max_epochs": 2}

    whole = trained(root, "train", output_dir=str(tmp_path / "whole"), **options)
    whole.run()
    said = progress.getvalue()
    assert len(re.findall(r"Epoch: \d/2, Iter: 2/2 -- train_loss: \d", said)) == 2  # once per epoch
    assert len(re.findall(r"Metrics -- (?:val_dice_\w+: [\d.]+ )*val_mean_dice: [\d.]+", said)) == 2
    assert sorted(p.name for p in (tmp_path / "whole").iterdir()) == [
        "checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "final.pt",
    ]  # fmt: skip

    halted = {"output_dir": str(tmp_path / "halted"), "train::trainer::max_epochs": 1}
    trained(root, "train", **halted, **options).run()
    first, other = (checkpoint(tmp_path / run, 1) for run in ("whole", "halted"))
    assert first.keys() == other.keys()
    for name in first.keys() & {"network", "ema"}:
        assert equal(first[name], other[name])  # the seed decides
    assert not equal(first["network"], checkpoint(tmp_path / "whole", 2)["network"])
    assert not (tmp_path / "halted/checkpoint_epoch=2.pt").exists()

    resume = str(tmp_path / "halted/checkpoint_epoch=1.pt")
    progress.truncate(progress.seek(0))
    trained(root, "train", output_dir=str(tmp_path / "resumed"), resume=resume, **options).run()
    assert "Epoch: 2/2" in progress.getvalue() and "Epoch: 1/2" not in progress.getvalue()
    last, reference = checkpoint(tmp_path / "resumed", 2), checkpoint(tmp_path / "whole", 2)
    assert last["trainer"]["iteration"] == reference["trainer"]["iteration"] == 4
    assert last["lr_scheduler"]["last_epoch"] == reference["lr_scheduler"]["last_epoch"]
    steps = {int(state["step"]) for state in last["optimizer"]["state"].values()}
    assert steps == {4}

    # what training writes, evaluation reads
    bundle = make_bundle(tmp_path, origin=root.name, name="copy")
    for config in ("train", "inference"):
        definition = json.loads((root / f"configs/{config}.json").read_text(encoding="utf-8"))["network_def"]
        edit_json(bundle / f"configs/{config}.json", network_def=definition)
    write_weights(bundle, torch.load(tmp_path / "resumed/final.pt", weights_only=True))
    folders = {"dataset_dir": options["dataset_dir"], "output_dir": str(tmp_path / "evaluation")}
    evaluation = workflow(bundle, "train", "evaluate", **folders, **quick(root))
    evaluation.run()
    report = json.loads((tmp_path / "evaluation/dice.json").read_text(encoding="utf-8"))
    assert report["cases"] == 2
    names = Bundle(root).metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert list(report) == ["cases", *(name for label, name in names.items() if label != "0"), "mean"]
    assert report["mean"]["mean"] == pytest.approx(evaluation.evaluator.state.metrics["val_mean_dice"], abs=1e-4)
    rows = (tmp_path / "evaluation/dice.csv").read_text(encoding="utf-8").splitlines()
    assert [row.split(",")[0] for row in rows] == ["case", "case4", "case5"]


@pytest.mark.slow
def test_other_trainings_start(root, tmp_path):
    others = [stems for stems in configs(root) if len(stems) == 2 and stems[1] not in ("evaluate", "multi_gpu_train")]
    cohort(root, tmp_path / "cohort")
    for stems in others:
        out = tmp_path / stems[1]
        trained(root, *stems, dataset_dir=str(tmp_path / "cohort"), output_dir=str(out), max_epochs=1).run()
        assert (out / "final.pt").is_file()


@pytest.mark.slow
def test_fine_tuning_starts_from_the_weights_of_the_bundle(root, tmp_path):
    if not {"train.json", "finetune.json"} <= {path.name for path in (root / "configs").iterdir()}:
        pytest.skip("this bundle has no second stage")
    cohort(root, tmp_path / "cohort")
    still = {"learning_rate": 0.0, "weight_decay": 0.0, "max_epochs": 1}
    options = {"dataset_dir": str(tmp_path / "cohort"), "output_dir": str(tmp_path / "out"), **still}
    trained(root, "train", "finetune", **options).run()
    final, shipped = torch.load(tmp_path / "out/final.pt", weights_only=True), Bundle(root).network()
    assert final.keys() == shipped.state_dict().keys()
    for key, value in shipped.named_parameters():  # running statistics move without a learning rate
        torch.testing.assert_close(final[key], value.detach(), rtol=1e-5, atol=1e-7)
    # and so on several processes: what is distributed is what was started from
    together = Bundle(root).parser("train", "finetune", "multi_gpu_train").get()
    assert together["start"]["_target_"] == "medvit.bundle.load_network" and "@start" in together["network"]["module"]


@pytest.mark.slow
def test_training_on_two_processes(root, tmp_path):
    if not (root / "configs/multi_gpu_train.json").exists():
        pytest.skip("this bundle is not trained here")
    cohort(root, tmp_path / "cohort")
    said = monai_run(
        root,
        *("train", "multi_gpu_train"),
        cwd=tmp_path,
        launcher=("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
        dataset_dir=tmp_path / "cohort",
        output_dir=tmp_path / "out",
        **{"max_epochs": 1, **training(root)},
    )
    assert len(re.findall(r"train_loss: \d", said)) == 1  # one process speaks
    assert len(re.findall(r"Metrics -- ", said)) == 1
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["checkpoint_epoch=1.pt", "final.pt"]
    state, final = checkpoint(tmp_path / "out", 1), torch.load(tmp_path / "out/final.pt", weights_only=True)
    names = set(Bundle(root).network().state_dict())
    assert set(state["network"]) == set(final) == set(state.get("ema", final)) == names  # no "module." in front
