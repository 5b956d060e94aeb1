"""Bundles that describe images by vectors: X-rays and volumes from file to table, through both doors."""

import csv
import json
import logging
import shutil
import warnings

import monai
import numpy as np
import pytest
import torch
from bundle_synthetic import BUNDLES, blobs, edit_json
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from monai.bundle import verify_net_in_out
from radiographs_synthetic import (
    MONAI_RUN,
    command,
    rows_of,
    shadows,
    tree,
    write_png,
    write_radiograph,
    write_x_rays,
)
from typer.testing import CliRunner

from medvit import create_model
from medvit.adapt.embeddings import Embeddings
from medvit.bundle import Bundle, classes
from medvit.cli import app
from medvit.data.listing import listed_images
from medvit.errors import BundleError, NothingFound
from medvit.pretrain.checkpoint import export
from medvit.pretrain.images import CachedImages, WholeView

NAMES = ("cxr_rad_dino", "uni4eye")
REAL = BUNDLES.parents[1] / "shared/data"

# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


@pytest.fixture(scope="module", params=NAMES)
def root(request):
    return BUNDLES / request.param


@pytest.fixture
def _loggers():
    """The command sets up the logger of its process."""
    logger, first = logging.getLogger("medvit"), logging.getLogger()
    before = logger.handlers, logger.level, first.handlers[:]
    yield
    logger.handlers, logger.level, first.handlers[:] = before


def takes_volumes(root):
    return "volume_data_format" in Bundle(root).metadata


def _name_patient(dataset, k):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.add_new(0x00101010, "AS", "Zyxwvut")  # pydicom warns of it, quoting


def write_study(folder):
    """X-rays and volumes of all kinds, with much else."""
    pixels = shadows()
    write_png(folder / "plain.png", pixels)
    write_radiograph(folder / "dicom/one.dcm", pixels)
    write_radiograph(folder / "dicom/two.dcm", 255 - pixels, 2, PhotometricInterpretation="MONOCHROME1")
    write_radiograph(folder / "dicom/three.dcm", shadows(seed=5), 3)
    write_radiograph(folder / "mammography/breast.dcm", pixels, 4, Modality="MG", SeriesInstanceUID="1.2.6")
    affine = make_affine("sagittal", (1, 1.1, 0.9))
    tags = {"PatientName": "Zyxwvut^Qponmlk", "SeriesDescription": "crop"}
    write_dicom_series(folder / "mr", blobs(), affine, edit=_name_patient, **tags)
    write_nifti(folder / "crop.nii.gz", blobs(), affine)
    write_nifti(folder / "head.nii.gz", blobs((90, 100, 80)), make_affine("axial", (2, 2, 2)))
    write_dicom_series(folder / "ct", phantom(), make_affine(), modality="CT")
    write_png(folder / "colours.png", np.stack([pixels, 255 - pixels, pixels], -1))
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICMxx")
    (folder / "notes.txt").write_text("no image")


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """The study and its results through our door."""
    base = tmp_path_factory.mktemp(root.name)
    write_study(base / "in")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Bundle(root).runner(
            dataset_dir=[base / "in"], output_dir=base / "out", formats=["embedding", "patches"], device_name="cpu"
        )
        return root, base, {record["case"]: record for record in runner.records()}


# ---- from folder to table


def test_every_image_of_its_kinds_is_a_row_and_nothing_else_is(run):
    root, base, records = run
    wanted = {
        "broken": "unreadable", "colours": "colour", "dicom/3_chest": None, "dicom/3_chest_2": None,
        "dicom/3_chest_3": None, "plain": None,
    }  # fmt: skip
    if takes_volumes(root):
        wanted |= {"crop": None, "head": "unsuitable", "mr/3_crop": None}
        assert "field of view must be 24-64 × 32-80 × 20-64 mm" in records["head"]["reason"]
    assert {name: record["code"] for name, record in records.items()} == wanted
    rows, length = rows_of(base / "out/embeddings.csv"), Bundle(root).network().encoder.embed_dim
    assert sorted(rows) == sorted(name for name, code in wanted.items() if code is None)
    assert rows["plain"]["file"] == "plain.png"
    assert list(rows["plain"]) == ["case", "file", *(f"e{n}" for n in range(length))]


def test_the_format_of_an_image_does_not_matter(run):
    root, base, _ = run
    vectors = Embeddings.load(base / "out/embeddings.safetensors")

    def apart(one, two):
        return float((vectors.of([one]) - vectors.of([two])).abs().max())

    assert apart("plain", "dicom/3_chest") < 1e-4 and apart("plain", "dicom/3_chest_3") < 1e-4
    assert apart("plain", "dicom/3_chest_2") > 1e-3
    if takes_volumes(root):
        assert apart("crop", "mr/3_crop") < 1e-4
        assert apart("crop", "plain") > 1e-3


def test_no_patient_is_named(run):
    _, base, _ = run
    for path, data in tree(base / "out").items():
        assert "zyxwvut" not in path.lower() and b"zyxwvut" not in data.lower(), path


def test_vectors_and_patches_are_those_of_the_encoder_and_say_so(run):
    root, base, records = run
    bundle = Bundle(root)
    network = bundle.network()
    embeddings = Embeddings.load(base / "out/embeddings.safetensors", network.encoder)
    prepare = bundle.parser().get_parsed_content("preprocessing")
    for name, file in {"plain": "plain.png", **({"crop": "crop.nii.gz"} if takes_volumes(root) else {})}.items():
        image = prepare({"image": str(base / "in" / file)})["image"].as_tensor()[None]
        with torch.inference_mode():
            vector, (patches,) = network(image)[0], network.encoder(image)
        assert torch.equal(embeddings.of([name])[0], vector)
        assert np.array_equal(np.load(base / f"out/{name}_embedding.npy"), vector.numpy())
        row = list(rows_of(base / "out/embeddings.csv")[name].values())[2:]
        assert np.array_equal(np.array(row, np.float32), vector.numpy())
        assert np.array_equal(np.load(base / f"out/{name}_patches.npy"), patches[0].numpy())
        assert records[name]["patches"]["grid"] == list(patches.shape[2:])


def test_the_manifest_says_what_the_patches_cover(run):
    root, _, records = run
    x_ray = records["plain"]
    assert x_ray["shape"] == [300, 220]
    assert x_ray["patches"]["axes"] == [1, 0]  # rows first
    assert x_ray["patches"]["start"] == pytest.approx([0, 40], abs=1.2)  # sides are rounded down before they are cut
    assert x_ray["patches"]["stop"] == pytest.approx([220, 260], abs=1.2)
    if takes_volumes(root):
        for name in ("crop", "mr/3_crop"):
            record, size = records[name], Bundle(root).parser()["volume_size"]
            spacing = [(1, 1.1, 0.9)[axis] for axis in record["patches"]["axes"]]
            ends = zip(record["patches"]["start"], record["patches"]["stop"], spacing, strict=True)
            covered = [abs(stop - start) * step for start, stop, step in ends]
            assert covered == pytest.approx(size, abs=0.01)
        assert sorted(records["crop"]["patches"]["axes"]) == [0, 1, 2]


def test_monais_door_gives_the_same_bytes(run, tmp_path):
    root, base, _ = run
    folders = ["dicom", *(["mr"] if takes_volumes(root) else [])]
    for name in folders:
        shutil.copytree(base / "in" / name, tmp_path / "in" / name)
    options = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "monai", "device_name": "cpu"}
    config = {"bundle_root": root, "config_file": root / "configs/inference.json"}
    said = command(tmp_path, *MONAI_RUN, **config, **options, formats="['embedding','patches']")
    assert "dicom/3_chest_3: ok" in said and "zyxwvut" not in said.lower()
    options |= {"output_dir": tmp_path / "ours", "formats": ["embedding", "patches"]}
    Bundle(root).runner(**options).run()
    assert tree(tmp_path / "monai") == tree(tmp_path / "ours")
    assert len(tree(tmp_path / "ours")) == 2 * (3 + len(folders) - 1) + 3


@pytest.mark.usefixtures("_loggers")
def test_the_command_says_how_many_numbers_it_wrote(tmp_path):
    write_png(tmp_path / "in/plain.png", shadows())
    words = ["predict", str(BUNDLES / "cxr_rad_dino"), str(tmp_path / "in"), "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*words, "-f", "patches", "-f", "embedding", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert "case\timage\tnumbers" in done.stdout and "plain\t300×220\t192 (patches), 192 (embedding)" in done.stdout
    assert "embeddings.csv" in tree(tmp_path / "out")


def test_what_a_bundle_cannot_give_is_refused(root, tmp_path):
    write_png(tmp_path / "in/plain.png", shadows())
    options = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "out"}
    with pytest.raises(BundleError, match=r"formats must be some of embedding, patches, got \['scores'\]"):
        Bundle(root).runner(**options, formats=["scores"])
    with pytest.raises(NothingFound, match="no photograph and no DICOM radiograph of modality CR or DX"):
        write_dicom_series(tmp_path / "ct", phantom(), make_affine(), modality="CT")
        Bundle(root).runner(dataset_dir=tmp_path / "ct", output_dir=tmp_path / "out")


# ---- what the network sees


def learned(root, path, rank):
    """An image as pre-training sees the whole of it: decoded, kept as bytes, viewed."""
    recipe = Bundle(root).parser("pretrain")
    steps, size = [("preprocessing", "image_size"), ("volume_preprocessing", "volume_size")][rank - 2]
    kept = CachedImages([{"image": str(path)}], recipe.get_parsed_content(steps))
    return WholeView(recipe[size], mean=recipe["mean"], std=recipe["std"])(kept.batch([0])["image"])[0]


@pytest.mark.parametrize("size", [(224, 224), (300, 220), (131, 400)])
def test_inference_sees_the_x_rays_that_the_network_was_trained_on(root, size, tmp_path):
    path = write_png(tmp_path / "a.png", shadows(*size))
    seen = Bundle(root).parser().get_parsed_content("preprocessing")({"image": str(path)})["image"]
    expected = learned(root, path, 2)
    shape = Bundle(root).metadata["network_data_format"]["inputs"]["image"]["spatial_shape"]
    assert list(seen.shape) == [1, *shape] and seen.dtype == torch.float32
    torch.testing.assert_close(seen.as_tensor(), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("orientation", "spacing"), [("axial", (1, 1, 1)), ("oblique", (1.2, 1, 0.8))])
def test_inference_sees_the_volumes_that_the_network_was_trained_on(orientation, spacing, tmp_path):
    root = BUNDLES / "uni4eye"
    image = np.random.default_rng(0).integers(0, 103, (35, 51, 35))  # many values come to lie between two whole ones
    path = write_nifti(tmp_path / "a.nii.gz", image.astype(np.int16), make_affine(orientation, spacing))
    seen = Bundle(root).parser().get_parsed_content("preprocessing")({"image": str(path)})["image"]
    assert list(seen.shape) == [1, *Bundle(root).metadata["volume_data_format"]["inputs"]["image"]["spatial_shape"]]
    torch.testing.assert_close(seen.as_tensor(), learned(root, path, 3), atol=2e-5, rtol=0)


@pytest.mark.parametrize("root", NAMES)
def test_real_images_are_seen_as_in_training(root, tmp_path):
    bundle = Bundle(BUNDLES / root)
    recipe = bundle.parser("pretrain", dataset_dir=REAL)
    if not (REAL / "cxr_pneumonia224/cases.csv").is_file():
        pytest.skip("the data sets are not beside this checkout")
    prepare = bundle.parser().get_parsed_content("preprocessing")
    for rank, sets in ((2, "sets"), (3, "volumes")):
        if sets in recipe:
            cases = listed_images(REAL, recipe[sets])
            for case in cases[:: len(cases) // 3]:
                seen = prepare({"image": case["image"]})["image"].as_tensor()
                torch.testing.assert_close(seen, learned(bundle.root, case["image"], rank), atol=2e-5, rtol=0)


def test_a_channel_can_be_repeated(tmp_path):
    path = write_png(tmp_path / "a.png", shadows())
    one, three = (
        Bundle(BUNDLES / "cxr_rad_dino").parser(channels=n).get_parsed_content("preprocessing")({"image": str(path)})
        for n in (1, 3)
    )
    assert torch.equal(three["image"].as_tensor(), one["image"].as_tensor().expand(3, -1, -1))


# ---- metadata


def test_an_embedding_has_no_classes(root):
    assert classes(Bundle(root).metadata) == ()


def test_monai_verifies_the_network(root):
    files = {"meta_file": str(root / "configs/metadata.json"), "config_file": str(root / "configs/inference.json")}
    verify_net_in_out("network_def", **files, device="cpu")
    monai.utils.set_determinism(None)


@pytest.mark.parametrize("described", ["network_data_format", "volume_data_format"])
def test_verify_notices_a_vector_of_another_length(described, tmp_path):
    root = shutil.copytree(BUNDLES / "uni4eye", tmp_path / "uni4eye")
    data = json.loads((root / "configs/metadata.json").read_text(encoding="utf-8"))[described]
    data["outputs"]["pred"]["num_channels"] = 100
    edit_json(root / "configs/metadata.json", **{described: data})
    wrong = {name: reason for name, reason in Bundle(root).verify() if reason}
    assert wrong == {"network": "by the metadata the network returns (1, 100), it returns (1, 192)"}


# ---- training, on a few small images


@pytest.mark.slow
def test_from_images_to_a_bundle_with_the_commands_of_the_card(root, tmp_path):
    write_x_rays(tmp_path / "data/tiny")
    sets = {"sets": "['tiny']"}
    if takes_volumes(root):
        rows = [{"case_id": f"v{n}", "image": f"v{n}.nii.gz", "split": ("train", "val")[n % 2]} for n in range(4)]
        for n, row in enumerate(rows):
            write_nifti(tmp_path / "data/deep" / row["image"], blobs((35, 48 + n, 36)), make_affine("axial", (1, 1, 1)))
        with (tmp_path / "data/deep/cases.csv").open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        sets["volumes"] = "['deep']"
    bundle = shutil.copytree(root, tmp_path / root.name)
    options = {"dataset_dir": tmp_path / "data", "output_dir": "pre", "epochs": 1, "batch_size": 2, **sets}
    options |= {"bundle_root": bundle, "config_file": bundle / "configs/pretrain.json", "trainer#watchers": "[]"}
    if root.name == "cxr_rad_dino":  # goes on from a masked autoencoder
        recipe = json.loads((BUNDLES / "cxr_mae/configs/pretrain.json").read_text(encoding="utf-8"))
        sizes = {k: v for k, v in recipe["network_def"].items() if k not in ("_target_", "name", "img_size")}
        autoencoder = create_model("mae", img_size=recipe["image_size"], **sizes)
        options["start"] = export(autoencoder.encoder.state_dict(), tmp_path / "mae.safetensors", {})
    command(tmp_path, *MONAI_RUN, **options)
    before = Bundle(bundle).metadata["medvit"]["weights_sha256"]
    freeze = BUNDLES.parent / "scripts/freeze_weights.py"
    command(tmp_path, freeze, bundle, tmp_path / "pre/encoder.safetensors", "--half")
    assert Bundle(bundle).metadata["medvit"]["weights_sha256"] != before
    assert {name: wrong for name, wrong in Bundle(bundle).verify() if wrong} == {}
    Bundle(bundle).runner(dataset_dir=tmp_path / "data", output_dir=tmp_path / "out").run()
    assert len(rows_of(tmp_path / "out/embeddings.csv")) == (16 if takes_volumes(root) else 12)
