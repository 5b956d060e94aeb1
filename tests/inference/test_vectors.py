import json
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medvit.adapt.embeddings import Embeddings
from medvit.data.volume import Source
from medvit.errors import OutputError, UnreadableFile, UnsuitableImage
from medvit.inference.batch import FolderRunner
from medvit.inference.formats import make_vector_writers
from medvit.inference.region import Region
from medvit.inference.vectors import VectorPredictor, VectorReport, Vectors, by_class

CLASSES = ("bacteria", "virus, or none")


def load(case):
    """The number in a file, as an image of two channels in one of the ranks that readers give."""
    (file,) = [case["image"]] if isinstance(case["image"], str) else case["image"]
    text = Path(file).read_text(encoding="utf-8")
    if text == "bad":
        raise UnsuitableImage(f"{file}: blank")
    meta = {"medvit_kind": "raster", "modality": "", "study_uid": "", "series_uid": "1.2", "spatial_shape": [9, 7]}
    image = torch.full((2, *case.get("size", (4, 4))), float(text))
    return {**case, "image": MetaTensor(image, meta=meta | {"medvit_notes": "one\ntwo"})}


def scores(images):
    share = images.mean().reshape(1).sigmoid()
    return torch.cat([1 - share, share])


def embedding(images):
    return images.mean(dim=tuple(range(2, images.dim())))[0] + torch.arange(2)


def runner(folder, existing="refuse", formats=("scores", "embedding"), cases=None, version=1):
    heads = {"scores": scores, "embedding": embedding}
    writers = make_vector_writers(formats, CLASSES)
    listed = []
    (folder / "in").mkdir(exist_ok=True)
    for name, value in (cases or {"b": 0.0, "sub/a": 2.0}).items():
        path = folder / "in" / f"{name.replace('/', '_')}.png"
        path.write_text(str(value), encoding="utf-8")
        listed.append({"image": str(path), "case": name, "notes": ["zero"]})
    return FolderRunner(
        listed,
        VectorPredictor(load, {name: heads[name] for name in formats}),
        writers,
        folder / "out",
        existing=existing,
        provenance={"version": version, "formats": formats},
        report=report(str(version), formats),
    )


def report(sha256, formats):
    def save(cases, vectors, path):
        Embeddings(vectors, tuple(cases), sha256).save(path)

    return VectorReport(CLASSES, save, sha256) if "embedding" in formats else VectorReport(CLASSES)


def outputs(folder):
    return sorted(p.relative_to(folder / "out").as_posix() for p in (folder / "out").rglob("*") if p.is_file())


def test_a_case_gets_its_files_and_a_run_its_tables(tmp_path):
    _, second = runner(tmp_path).run()
    share = 1 / (1 + np.exp(-2.0))
    assert outputs(tmp_path) == [
        "b_embedding.npy", "b_scores.json", "embeddings.csv", "embeddings.safetensors", "manifest.jsonl",
        "predictions.csv", "sub/a_embedding.npy", "sub/a_scores.json",
    ]  # fmt: skip
    assert {key: second[key] for key in ("kind", "modality", "series_uid", "shape", "notes", "vectors", "scores")} == {
        "kind": "raster",
        "modality": "",
        "series_uid": "1.2",
        "shape": [9, 7],
        "notes": ["zero", "one", "two"],
        "vectors": {"scores": 2, "embedding": 2},
        "scores": {CLASSES[0]: round(1 - share, 6), CLASSES[1]: round(share, 6)},
    }
    assert json.loads((tmp_path / "out/sub/a_scores.json").read_text(encoding="utf-8")) == second["scores"]
    assert (tmp_path / "out/predictions.csv").read_text(encoding="utf-8").splitlines() == [
        'case,file,bacteria,"virus, or none"',
        "b,b.png,0.5,0.5",
        f"sub/a,sub_a.png,{1 - share:.6f},{share:.6f}",
    ]
    table = Embeddings.load(tmp_path / "out/embeddings.safetensors")
    assert table.cases == ("b", "sub/a")
    assert table.vectors["embed"].tolist() == [[0, 1], [2, 3]]
    assert (tmp_path / "out/embeddings.csv").read_text(encoding="utf-8").splitlines() == [
        "case,file,e0,e1", "b,b.png,0.0,1.0", "sub/a,sub_a.png,2.0,3.0",
    ]  # fmt: skip
    assert np.load(tmp_path / "out/sub/a_embedding.npy").dtype == np.float32


@pytest.mark.parametrize("size", [(4, 4), (4, 3, 2)])
def test_images_and_volumes_alike(size, tmp_path):
    path = tmp_path / "x"
    path.write_text("3", encoding="utf-8")
    result = VectorPredictor(load, {"embedding": embedding})({"image": [str(path)], "case": "x", "size": size})
    assert result.values["embedding"].tolist() == [3, 4] and result.source.files == (path,)


def test_one_bad_image_is_told_and_the_others_are_done(tmp_path):
    records = list(runner(tmp_path, cases={"a": 1.0, "bad": "bad", "nan": "nan", "c": 2.0}).records())
    assert [(record["status"], record["code"]) for record in records] == [
        ("ok", None), ("failed", "unsuitable"), ("failed", "internal"), ("ok", None),
    ]  # fmt: skip
    assert Embeddings.load(tmp_path / "out/embeddings.safetensors").cases == ("a", "c")


def test_a_run_is_resumed_and_its_tables_are_whole(tmp_path):
    runner(tmp_path, cases={"a": 1.0}).run()
    before = (tmp_path / "out/a_scores.json").stat().st_mtime_ns
    records = runner(tmp_path, "resume", cases={"a": 1.0, "b": 2.0}).run()
    assert [record["status"] for record in records] == ["skipped", "ok"]
    assert (tmp_path / "out/a_scores.json").stat().st_mtime_ns == before
    assert Embeddings.load(tmp_path / "out/embeddings.safetensors").cases == ("a", "b")
    assert len((tmp_path / "out/predictions.csv").read_text(encoding="utf-8").splitlines()) == 3
    again = list(runner(tmp_path, "resume", cases={"a": 1.0}, version=2).records())
    assert again[0]["code"] == "output" and "was made with other version" in again[0]["reason"]


def test_results_are_not_replaced_unasked_and_nothing_stale_stays(tmp_path):
    runner(tmp_path).run()
    refused = list(runner(tmp_path, formats=("scores",)).records())
    assert {record["code"] for record in refused} == {"output"}
    assert "embeddings.safetensors" in outputs(tmp_path)
    runner(tmp_path, "overwrite", formats=("scores",)).run()
    assert outputs(tmp_path) == ["b_scores.json", "manifest.jsonl", "predictions.csv", "sub/a_scores.json"]
    runner(tmp_path, "overwrite", formats=("embedding",)).run()
    assert outputs(tmp_path) == [
        "b_embedding.npy", "embeddings.csv", "embeddings.safetensors", "manifest.jsonl", "predictions.csv",
        "sub/a_embedding.npy",
    ]  # fmt: skip
    assert (tmp_path / "out/predictions.csv").read_text(encoding="utf-8") == 'case,file,bacteria,"virus, or none"\n'


def test_vectors_of_other_weights_are_never_mixed(tmp_path):
    path = tmp_path / "out/embeddings.safetensors"
    runner(tmp_path).run()
    list(runner(tmp_path, version=2).records())  # all refused
    assert (Embeddings.load(path).encoder_sha256, Embeddings.load(path).cases) == ("1", ("b", "sub/a"))
    runner(tmp_path, "overwrite", version=2, cases={"b": 4.0}).run()
    assert (Embeddings.load(path).encoder_sha256, Embeddings.load(path).cases) == ("2", ("b",))
    rows = (tmp_path / "out/embeddings.csv").read_text(encoding="utf-8").splitlines()
    assert rows == ["case,file,e0,e1", "b,b.png,4.0,5.0"]


def test_the_table_of_embeddings_tells_every_float32_apart(tmp_path):
    values = [0.1, 1 / 3, 1e-12, 123456.789, -1.0000001]
    runner(tmp_path, formats=("embedding",), cases={f"case{n}": value for n, value in enumerate(values)}).run()
    for row in (tmp_path / "out/embeddings.csv").read_text(encoding="utf-8").splitlines()[1:]:
        name, _, *texts = row.split(",")
        assert np.array_equal(np.array(texts, np.float32), np.load(tmp_path / f"out/{name}_embedding.npy"))


def test_a_damaged_vector_is_told(tmp_path):
    runner(tmp_path).run()
    (tmp_path / "out/b_embedding.npy").write_bytes(b"")
    with pytest.raises(OutputError, match=r"b_embedding.npy: is damaged; remove it and resume"):
        list(runner(tmp_path, "resume").records())
    (tmp_path / "out/b_embedding.npy").unlink()
    runner(tmp_path, "resume").run()
    assert np.load(tmp_path / "out/b_embedding.npy").tolist() == [0, 1]


def test_equal_runs_give_equal_bytes(tmp_path):
    trees = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        runner(tmp_path / name).run()
        trees.append({path: (tmp_path / name / "out" / path).read_bytes() for path in outputs(tmp_path / name)})
    tables = [Embeddings.load(tmp_path / name / "out/embeddings.safetensors") for name in ("one", "two")]
    assert trees[0].pop("embeddings.safetensors")[-16:] == trees[1].pop("embeddings.safetensors")[-16:]
    assert trees[0] == trees[1] and tables[0].cases == tables[1].cases


def test_the_network_runs_without_autograd(tmp_path):
    (tmp_path / "x").write_text("1", encoding="utf-8")
    seen = []

    def head(images):
        seen.append((torch.is_inference_mode_enabled(), type(images), tuple(images.shape)))
        return images.flatten()

    VectorPredictor(load, {"scores": head})({"image": str(tmp_path / "x"), "case": "x"})
    assert seen == [(True, torch.Tensor, (1, 2, 4, 4))]


@pytest.mark.parametrize("value", [np.zeros((1, 2)), np.array([0, np.nan])])
def test_what_is_no_finite_vector_is_refused(value):
    with pytest.raises(ValueError, match="must be one finite vector"):
        Vectors({"scores": value}, Source("raster", ()), (1, 1))


def test_probabilities_of_other_classes_are_refused():
    result = Vectors({"scores": np.ones(3)}, Source("raster", ()), (1, 1))
    with pytest.raises(ValueError, match="zip"):
        by_class(CLASSES, result)


@pytest.mark.parametrize("formats", [[], ["nifti"], ["scores", "png"], ["patches"]])
def test_formats_of_label_maps_are_refused(formats):
    with pytest.raises(ValueError, match=r"formats must be some of scores, embedding, got \["):
        make_vector_writers(formats, CLASSES)


@pytest.mark.parametrize("formats", [[], ["scores"], ["embedding", "png"]])
def test_without_classes_there_are_no_scores(formats):
    with pytest.raises(ValueError, match=r"formats must be some of embedding, patches, got \["):
        make_vector_writers(formats, ())


def patches(images):
    return images[0, :, ::2, ::2]


def test_patches_are_written_with_what_they_cover(tmp_path):
    (tmp_path / "x").write_text("3", encoding="utf-8")
    predictor = VectorPredictor(load, {"patches": patches, "embedding": embedding})
    case = {"image": str(tmp_path / "x"), "case": "x"}
    writers = make_vector_writers(["patches", "embedding"], ())
    (record,) = FolderRunner([case], predictor, writers, tmp_path / "out", report=report("1", ("embedding",))).run()
    assert record["outputs"] == ["x_patches.npy", "x_embedding.npy"]
    assert record["vectors"] == {"patches": 2, "embedding": 2}
    assert record["patches"] == {"grid": [2, 2], "axes": [0, 1], "start": [0, 0], "stop": [4, 4]}
    stored = np.load(tmp_path / "out/x_patches.npy")
    assert stored.dtype == np.float32 and stored.tolist() == np.full((2, 2, 2), 3).tolist()


@pytest.mark.parametrize("region", [None, Region((2, 1), (0, 1), (0, 0), (4, 4))])
def test_patches_without_their_region_are_refused(region):
    with pytest.raises(ValueError, match=r"patches must come with the region that they cover, got shape \(3, 2, 2\)"):
        Vectors({"patches": np.zeros((3, 2, 2))}, Source("raster", ()), (1, 1), region=region)


def test_a_file_that_vanished_is_a_failed_case(tmp_path):
    one = runner(tmp_path, cases={"a": 1.0})
    (tmp_path / "in/a.png").unlink()
    (record,) = one.records()
    assert record["status"] == "failed" and record["code"] == UnreadableFile("x", "y").code
