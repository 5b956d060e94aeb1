import hashlib
import json
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import MedvitError, OutputError, UnreadableSeries, WeightsMismatch
from medvit.inference.batch import CasesFailed, FolderRunner, record_failed_run, require_success
from medvit.writers.base import atomic, with_suffix
from medvit.writers.nifti import NiftiLabelWriter

CODE = Code("1", "99T", "thing")
STRUCTURES = (Structure(1, "shell", CODE, CODE, (255, 0, 0)), Structure(2, "core", CODE, CODE, (0, 255, 0)))


def predict(case):
    """A label map with ``case["answer"]`` voxels of label 1; an exception is raised instead."""
    if isinstance(case["answer"], BaseException):
        raise case["answer"]
    array = np.zeros((4, 5, 6), np.uint8)
    array.ravel()[: case["answer"]] = 1
    return LabelMap(
        array,
        Space.from_affine(array.shape, np.diag([1, 2, 0.5, 1])),
        Source("test", (Path("a"), Path("b"))),
        STRUCTURES,
        tuple(case.get("notes", ())),
    )


class TextWriter:
    """Writes the number of labelled voxels; fails for the cases in ``failing`` after half of the file."""

    suffix = ".txt"

    def __init__(self, *failing, error=None):
        self.failing, self.error = failing, error or OSError(28, "No space left on device")

    def write(self, label_map, stem, *, overwrite=False):
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            part.write_text("half")
            if int(label_map.array.sum()) in self.failing:
                raise self.error
            part.write_text(str(int(label_map.array.sum())))
        return path


class Inapplicable:
    suffix = "_seg.dcm"

    def write(self, label_map, stem, *, overwrite=False):
        return None


@pytest.fixture(autouse=True)
def inputs(tmp_path_factory):
    """Where :func:`runner` puts the input files, whose contents are the answers."""
    runner.inputs = tmp_path_factory.mktemp("inputs")
    return runner.inputs


def runner(folder, *writers, provenance=None, existing="refuse", predictor=predict, **cases):
    listed = []
    for name, answer in cases.items():
        path = runner.inputs / name.replace("/", "_") / (Path(name).name.strip(".") or "x")
        path.parent.mkdir(exist_ok=True)
        path.write_text(repr(answer))
        listed.append({"image": str(path), "case": name, "answer": answer})
    return FolderRunner(
        listed, predictor, writers or [NiftiLabelWriter()], folder, existing=existing, provenance=provenance
    )


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def statuses(records):
    return {record["case"]: record["status"] for record in records}


def test_every_case_gets_its_files_its_line_and_its_rows(tmp_path):
    out = tmp_path / "new" / "out"
    records = runner(
        out, NiftiLabelWriter(), Inapplicable(), TextWriter(), provenance={"bundle": "b"}, **{"p/x.1": 7, "y": 0}
    ).run()
    assert set(tree(out)) == {
        "p/x.1_seg.nii.gz", "p/x.1.txt", "y_seg.nii.gz", "y.txt", "manifest.jsonl", "volumes.csv", "volumes.json",
    }  # fmt: skip
    assert manifest(out) == records
    assert records[0] == {
        "case": "p/x.1",
        "status": "ok",
        "code": None,
        "reason": None,
        "input": "x.1",
        "input_sha256": hashlib.sha256(hashlib.sha256(b"7").hexdigest().encode()).hexdigest(),
        "outputs": ["p/x.1_seg.nii.gz", "p/x.1.txt"],
        "files": 2,
        "kind": "test",
        "modality": "",
        "series_uid": "",
        "shape": [4, 5, 6],
        "spacing_mm": [1.0, 2.0, 0.5],
        "orientation": "RAS",
        "notes": [],
        "volumes": [
            {"label": 1, "structure": "shell", "voxels": 7, "volume_mm3": 7.0},
            {"label": 2, "structure": "core", "voxels": 0, "volume_mm3": 0.0},
        ],
        "bundle": "b",
    }
    assert (out / "volumes.csv").read_text(encoding="utf-8").splitlines() == [
        "case,label,structure,voxels,volume_mm3",
        "p/x.1,1,shell,7,7.0",
        "p/x.1,2,core,0,0.0",
        "y,1,shell,0,0.0",
        "y,2,core,0,0.0",
    ]


def test_equal_runs_give_equal_bytes(tmp_path):
    for name in ("a", "b"):
        runner(tmp_path / name, NiftiLabelWriter(), TextWriter(), x=3, y=4).run()
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_failing_case_does_not_stop_the_others(tmp_path, caplog):
    error = UnreadableSeries("folder/x", "missing-slice", "slice 3 is missing; export it again")
    with caplog.at_level(logging.INFO, "medvit"), pytest.raises(CasesFailed) as caught:
        runner(tmp_path, a=1, x=error, z=2).run()
    assert str(caught.value) == "1 of 3 cases failed: x: folder/x: slice 3 is missing; export it again"
    assert caught.value.code == "cases-failed"
    assert statuses(manifest(tmp_path)) == {"a": "ok", "x": "failed", "z": "ok"}
    assert manifest(tmp_path)[1] == {
        "case": "x",
        "status": "failed",
        "code": "missing-slice",
        "reason": "folder/x: slice 3 is missing; export it again",
        "input": "x",
        "input_sha256": manifest(tmp_path)[1]["input_sha256"],
    }
    assert "case 2 of 3, x: failed: folder/x: slice 3 is missing" in caplog.text
    assert "case 3 of 3, z: ok" in caplog.text
    assert "z_seg.nii.gz" in tree(tmp_path)


def test_many_failures_are_summed_up():
    failed = [{"case": str(n), "status": "failed", "reason": "r"} for n in range(12)]
    with pytest.raises(CasesFailed, match=r"^12 of 13 cases failed: 0: r; .*; 9: r; and 2 more, see manifest.jsonl$"):
        require_success([*failed, {"case": "x", "status": "ok"}])


def test_errors_of_other_libraries_are_not_quoted_but_logged_for_debugging(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, "medvit"):
        (record,) = runner(tmp_path, x=ValueError("cannot parse 'Doe^Jane'")).records()
    assert (record["code"], record["status"]) == ("internal", "failed")
    assert record["reason"] == "ValueError in the pipeline; the debug log (--verbose) has the traceback"
    assert "Doe" not in (tmp_path / "manifest.jsonl").read_text(encoding="utf-8")
    assert "Traceback" in caplog.text


def no_such_memory():
    """What torch raises when the CPU has not enough memory: a plain RuntimeError."""
    try:
        torch.empty(1 << 60, dtype=torch.uint8)
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("error", [MemoryError("x"), torch.OutOfMemoryError("x"), no_such_memory()])
def test_running_out_of_memory_has_its_own_advice(tmp_path, error):
    records = list(runner(tmp_path, x=error, y=1).records())
    assert (records[0]["code"], records[0]["reason"]) == (
        "out-of-memory",
        "not enough memory; use a smaller batch_size or the CPU",
    )
    assert records[1]["status"] == "ok"


def test_a_failing_writer_leaves_nothing_of_its_case(tmp_path):
    records = list(runner(tmp_path, NiftiLabelWriter(), TextWriter(2), a=1, b=2, c=3).records())
    assert statuses(records) == {"a": "ok", "b": "failed", "c": "ok"}
    reason = f"{tmp_path}/b.txt: cannot be written (No space left on device); choose a writable folder with free space"
    assert (records[1]["code"], records[1]["reason"]) == ("output", reason)
    assert set(tree(tmp_path)) == {
        "a_seg.nii.gz", "a.txt", "c_seg.nii.gz", "c.txt", "manifest.jsonl", "volumes.csv", "volumes.json",
    }  # fmt: skip
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


@pytest.mark.parametrize("error", [MedvitError("no"), RuntimeError("no"), OSError(5, "Input/output error")])
def test_a_failing_writer_leaves_earlier_results_untouched(tmp_path, error):
    list(runner(tmp_path, NiftiLabelWriter(), TextWriter(), a=1, b=2).records())
    before = tree(tmp_path)
    records = list(
        runner(tmp_path, NiftiLabelWriter(), TextWriter(3, error=error), existing="overwrite", a=3, b=4).records()
    )
    assert statuses(records) == {"a": "failed", "b": "ok"}
    after = tree(tmp_path)
    assert all(after[name] == before[name] for name in ("a_seg.nii.gz", "a.txt"))
    assert after["b.txt"] == b"4"
    table = after["volumes.csv"].decode()
    assert "a,1,shell,1,1.0" in table and "b,1,shell,4,4.0" in table  # what the files say
    # and a later resumption knows that the earlier result is whole
    assert statuses(runner(tmp_path, NiftiLabelWriter(), TextWriter(), existing="resume", a=1, b=4).records()) == {
        "a": "skipped",
        "b": "skipped",
    }


def test_results_are_not_replaced_unasked(tmp_path):
    list(runner(tmp_path, a=1).records())
    before = tree(tmp_path)
    (record,) = runner(tmp_path, a=2).records()
    assert (record["status"], record["code"]) == ("failed", "output")
    assert record["reason"] == (
        f"{tmp_path}/a_seg.nii.gz: exists already; resume to keep finished cases, overwrite to replace them"
    )
    after = tree(tmp_path)
    assert after.pop("manifest.jsonl").startswith(before.pop("manifest.jsonl"))
    assert after == before


def test_overwriting_replaces_results_and_their_rows(tmp_path):
    list(runner(tmp_path, a=1, b=2).records())
    (record,) = runner(tmp_path, a=5, existing="overwrite").records()
    assert record["volumes"][0]["voxels"] == 5
    table = (tmp_path / "volumes.csv").read_text(encoding="utf-8")
    assert "a,1,shell,5,5.0" in table and "a,1,shell,1" not in table and "b,1,shell,2,2.0" in table


def test_an_interrupted_run_can_be_resumed(tmp_path):
    calls = []

    def counted(case):
        calls.append(case["case"])
        return predict(case)

    with pytest.raises(KeyboardInterrupt):
        list(runner(tmp_path, predictor=counted, a=1, b=KeyboardInterrupt(), c=3).records())
    assert set(tree(tmp_path)) == {"a_seg.nii.gz", "manifest.jsonl", "volumes.csv", "volumes.json"}
    assert "a,1,shell,1,1.0" in (tmp_path / "volumes.csv").read_text(encoding="utf-8")
    calls.clear()
    records = list(runner(tmp_path, predictor=counted, existing="resume", a=1, b=2, c=3).records())
    assert calls == ["b", "c"]
    assert statuses(records) == {"a": "skipped", "b": "ok", "c": "ok"}
    assert records[0]["reason"] == "done before, in the same way"
    assert records[0]["volumes"][0]["voxels"] == 1
    assert [record["case"] for record in manifest(tmp_path)] == ["a", "b", "c"]
    assert len((tmp_path / "volumes.csv").read_text(encoding="utf-8").splitlines()) == 7


def test_a_kill_during_a_write_leaves_no_file_under_its_name(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        list(runner(tmp_path, NiftiLabelWriter(), TextWriter(1, error=KeyboardInterrupt()), a=1).records())
    assert set(tree(tmp_path)) == {"manifest.jsonl", "volumes.csv", "volumes.json"}


def test_a_half_written_line_is_ignored_and_closed(tmp_path, caplog):
    list(runner(tmp_path, a=1, b=2).records())
    path = tmp_path / "manifest.jsonl"
    path.write_bytes(path.read_bytes()[:-40])
    (tmp_path / "b_seg.nii.gz").unlink()
    records = list(runner(tmp_path, existing="resume", a=1, b=2).records())
    assert statuses(records) == {"a": "skipped", "b": "ok"}
    assert f"{path}: line 2 is damaged and was ignored" in caplog.text
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0])["case"] == "a" and json.loads(lines[2])["case"] == "b" and lines[3] == b""


@pytest.mark.parametrize("line", [b"[1]\n", b"{}\n", b"\xff\xfe\n", b'{"status": "ok", "case": "a"}\n', b"7\n"])
def test_foreign_lines_in_the_manifest_do_no_harm(tmp_path, caplog, line):
    (tmp_path / "manifest.jsonl").write_bytes(line)
    assert statuses(runner(tmp_path, existing="resume", a=1).records()) == {"a": "ok"}
    assert "line 1 is damaged" in caplog.text


@pytest.mark.parametrize(("key", "value"), [("weights_sha256", "other"), ("settings", {"roi": [1, 2]}), ("new", 1)])
def test_resuming_with_other_weights_or_settings_is_refused(tmp_path, key, value):
    provenance = {"weights_sha256": "abc", "settings": {"roi": (1, 1)}}
    list(runner(tmp_path, provenance=provenance, a=1).records())
    before = tree(tmp_path)
    assert statuses(runner(tmp_path, provenance=provenance, existing="resume", a=1).records()) == {"a": "skipped"}
    (record,) = runner(tmp_path, provenance=provenance | {key: value}, existing="resume", a=1).records()
    assert record["reason"] == (
        f"{tmp_path}/a_seg.nii.gz: was made with other {key}; choose another output folder, or overwrite"
    )
    assert tree(tmp_path)["a_seg.nii.gz"] == before["a_seg.nii.gz"]


def test_resuming_does_not_trust_files_that_the_manifest_does_not_know(tmp_path):
    (tmp_path / "a_seg.nii.gz").write_bytes(b"somebody else's")
    (record,) = runner(tmp_path, existing="resume", a=1).records()
    assert record["status"] == "failed"
    assert "a_seg.nii.gz: exists, but by the manifest this case was never finished" in record["reason"]
    assert (tmp_path / "a_seg.nii.gz").read_bytes() == b"somebody else's"


def test_resuming_does_failed_and_vanished_cases_again(tmp_path):
    list(runner(tmp_path, a=ValueError("x"), b=2).records())
    (tmp_path / "b_seg.nii.gz").unlink()
    assert statuses(runner(tmp_path, existing="resume", a=1, b=2).records()) == {"a": "ok", "b": "ok"}


def test_a_folder_in_the_way_of_one_output_keeps_all_of_them_back(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (record,) = runner(tmp_path, NiftiLabelWriter(), TextWriter(), existing="overwrite", a=1).records()
    assert record["reason"] == f"{tmp_path}/a.txt: is a folder; remove it, or choose another output folder"
    assert set(tree(tmp_path)) == {"manifest.jsonl", "volumes.csv", "volumes.json"}


def test_a_file_where_a_case_needs_a_folder(tmp_path):
    (tmp_path / "p").write_text("")
    records = list(runner(tmp_path, **{"p/a": 1, "b": 2}).records())
    assert statuses(records) == {"p/a": "failed", "b": "ok"}
    assert records[0]["reason"].startswith(f"{tmp_path}/p/a")
    assert "cannot be written (" in records[0]["reason"]


def test_an_output_path_that_is_a_file(tmp_path):
    path = tmp_path / "out"
    path.write_text("mine")
    with pytest.raises(
        OutputError, match=r"out/manifest.jsonl: cannot be written \(File exists\); choose a writable folder"
    ):
        list(runner(path, a=1).records())
    assert path.read_text() == "mine"


def test_an_unwritable_output_folder_is_found_out_before_any_work(tmp_path, monkeypatch):
    calls = []
    real = Path.open

    def refuse(path, mode="r", **kwargs):
        if path.name == "manifest.jsonl" and "a" in mode:
            raise PermissionError(13, "Permission denied")
        return real(path, mode, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(
        OutputError, match=r"manifest.jsonl: cannot be written \(Permission denied\); choose a writable folder"
    ):
        list(runner(tmp_path, predictor=calls.append, a=1).records())
    assert calls == []


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_without_write_permission(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        list(runner(folder / "out", a=1).records())


def test_an_unreadable_manifest(tmp_path):
    (tmp_path / "manifest.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"manifest.jsonl: cannot be written \(Is a directory\)"):
        list(runner(tmp_path, a=1).records())


def test_names_that_are_no_utf8_survive_the_manifest_and_the_table(tmp_path):
    name = os.fsdecode(b"caf\xe9/\xe4")
    list(runner(tmp_path, **{name: 1, "grün": 2}).records())
    assert (tmp_path / f"{name}_seg.nii.gz").is_file()
    assert [record["case"] for record in manifest(tmp_path)] == [name, "grün"]
    assert "grün" in (tmp_path / "manifest.jsonl").read_text(encoding="utf-8")
    assert r"caf\udce9/\udce4,1,shell,1,1.0" in (tmp_path / "volumes.csv").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "volumes.json").read_text(encoding="utf-8"))[0]["case"] == name
    assert statuses(runner(tmp_path, existing="resume", **{name: 1}).records()) == {name: "skipped"}


def test_a_run_that_could_not_begin_has_a_line_too(tmp_path):
    record_failed_run(tmp_path / "out", WeightsMismatch("model.pt: no such weights file"))
    assert manifest(tmp_path / "out") == [
        {"case": None, "status": "failed", "code": "weights-mismatch", "reason": "model.pt: no such weights file"}
    ]
    assert statuses(runner(tmp_path / "out", existing="resume", a=1).records()) == {"a": "ok"}
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        record_failed_run(tmp_path / "file", MedvitError("x"))


def test_arguments_are_checked(tmp_path):
    with pytest.raises(ValueError, match="existing must be one of refuse, overwrite, resume, got 'replace'"):
        runner(tmp_path, existing="replace", a=1)
    with pytest.raises(ValueError, match="these occur twice: a"):
        FolderRunner([{"case": "a"}, {"case": "b"}, {"case": "a"}], predict, [], tmp_path)
    for name in ("../a", "/a", "", "a/../../b"):
        with pytest.raises(ValueError, match="a path below the output folder, got '"):
            runner(tmp_path, **{name: 1})
    assert list(tmp_path.iterdir()) == []


def test_resuming_with_another_image_of_the_same_name_is_refused(tmp_path):
    list(runner(tmp_path, a=1).records())
    before = (tmp_path / "a_seg.nii.gz").read_bytes()
    (record,) = runner(tmp_path, existing="resume", a=2).records()
    assert (record["status"], record["code"]) == ("failed", "output")
    assert "a_seg.nii.gz: was made with other input_sha256; choose another output folder" in record["reason"]
    assert (tmp_path / "a_seg.nii.gz").read_bytes() == before


def test_a_series_is_known_by_all_its_files_in_any_order(tmp_path, inputs):
    files = [inputs / "series" / name for name in ("1", "2")]
    files[0].parent.mkdir()
    for file in files:
        file.write_text(file.name)

    def run(*files):
        case = {"image": [str(file) for file in files], "case": "s", "answer": 3}
        return next(FolderRunner([case], predict, [NiftiLabelWriter()], tmp_path, existing="resume").records())

    assert run(*files)["input"] == "series"
    assert run(*files[::-1])["status"] == "skipped"
    files[1].write_text("changed")
    assert run(*files)["status"] == "failed"


def test_the_voxels_of_a_header_file_count(tmp_path, inputs):
    for name in ("a.hdr", "a.img"):
        (inputs / name).write_text("1")
    case = {"image": str(inputs / "a.hdr"), "case": "a", "answer": 3}
    states = []
    for _ in range(2):
        states += [
            r["status"]
            for r in FolderRunner([case], predict, [NiftiLabelWriter()], tmp_path, existing="resume").records()
        ]
        (inputs / "a.img").write_text("2")
    assert states == ["ok", "failed"]


def test_overwriting_with_fewer_formats_leaves_no_stale_file(tmp_path):
    list(runner(tmp_path, NiftiLabelWriter(), TextWriter(), a=1).records())
    (record,) = runner(tmp_path, NiftiLabelWriter(), existing="overwrite", a=2).records()
    assert record["outputs"] == ["a_seg.nii.gz"]
    assert not (tmp_path / "a.txt").exists()


def test_results_in_another_format_are_in_the_way_too(tmp_path):
    list(runner(tmp_path, TextWriter(), a=1).records())
    (record,) = runner(tmp_path, NiftiLabelWriter(), a=1).records()
    assert record["reason"].startswith(f"{tmp_path}/a.txt: exists already")


def test_notes_about_an_image_reach_the_manifest(tmp_path, inputs):
    (inputs / "a").write_text("1")
    case = {"image": str(inputs / "a"), "case": "a", "answer": 1, "notes": ["its orientation is unknown"]}
    FolderRunner([case], predict, [NiftiLabelWriter()], tmp_path).run()
    assert manifest(tmp_path)[0]["notes"] == ["its orientation is unknown"]


def test_an_input_that_vanished_is_a_failed_case(tmp_path, inputs):
    case = {"image": str(inputs / "gone"), "case": "a", "answer": 1}
    (record,) = FolderRunner([case], predict, [NiftiLabelWriter()], tmp_path).records()
    assert (record["code"], record["reason"]) == (
        "unreadable",
        f"{inputs}/gone: cannot be opened: No such file or directory",
    )
