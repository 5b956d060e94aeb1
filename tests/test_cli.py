import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from bundle_synthetic import blobs, edit_json, expected_labels, make_bundle, write_weights
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from dicom_synthetic import (
    arrays_of,
    measures_group,
    nested,
    orientation_group,
    position_group,
    tilted_affine,
    write_flat,
    write_multiframe,
    write_siemens_mosaic,
    write_volumes,
)
from typer.testing import CliRunner

from medvit.cli import app

PATIENT = {
    "PatientName": "Zyxwvut^Qponmlk",
    "PatientID": "PID-83561",
    "PatientBirthDate": "19370521",
    "AccessionNumber": "ACC-49127",
    "ReferringPhysicianName": "Edcba^Hgf",
}
SECRETS = ("zyxwvut", "qponmlk", "pid-83561", "19370521", "acc-49127", "edcba")


@pytest.fixture(autouse=True)
def _loggers():
    """The command sets up the logger of its process."""
    logger, root = logging.getLogger("medvit"), logging.getLogger()
    before = logger.handlers, logger.level, root.handlers[:]
    yield
    logger.handlers, logger.level, root.handlers[:] = before


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return str(make_bundle(tmp_path_factory.mktemp("bundles")))


@pytest.fixture
def study(tmp_path):
    """One DICOM series and one NIfTI file of the same shape."""
    write_dicom_series(tmp_path / "study/p1", blobs(), make_affine("oblique", (1, 1, 1)), **PATIENT)
    write_nifti(tmp_path / "study/p2/scan.nii.gz", blobs(), make_affine("sagittal", (1, 1, 1)))
    return tmp_path / "study"


def medvit(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def manifest(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def tree(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def failure(folder, case):
    (record,) = [record for record in manifest(folder) if record["case"] == case]
    assert record["status"] == "failed"
    return record["code"], record["reason"]


# ---- the command itself


def test_help_answers_within_a_second():
    def seconds():
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "medvit.cli", "--help"], capture_output=True, text=True, check=True
        )
        assert "predict" in done.stdout
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1


def test_importing_the_command_imports_nothing_heavy():
    heavy = {"torch", "monai", "numpy", "nibabel", "pydicom", "highdicom", "scipy", "matplotlib", "ignite"}
    code = f"import sys, medvit.cli; print(*sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


@pytest.mark.parametrize("command", ["predict", "inspect", "convert", "bundles", "verify"])
def test_every_command_explains_itself(command):
    assert "Usage" in medvit(command, "--help").output


@pytest.mark.parametrize(
    "arguments",
    [
        ("predict",),
        ("nonsense",),
        ("predict", "b", "in"),
        ("convert", "in"),
        ("predict", "b", "i", "-o", "x", "-f", "tiff"),
    ],
)
def test_wrong_usage_is_exit_status_2(arguments):
    medvit(*arguments, code=2)


def test_overwrite_and_resume_exclude_each_other(bundle, study, tmp_path):
    result = medvit("predict", bundle, study, "-o", tmp_path / "out", "--overwrite", "--resume", code=2)
    assert "exclude each other" in result.stderr


# ---- predict


def test_predict_writes_masks_tables_and_pictures(bundle, study, tmp_path):
    out = tmp_path / "out"
    result = medvit("predict", bundle, study, "--output", out)
    assert list(tree(out)) == [
        "manifest.jsonl",
        "p1/3_T1_test_overlay.png",
        "p1/3_T1_test_seg.dcm",
        "p1/3_T1_test_seg.nii.gz",
        "p2/scan_overlay.png",
        "p2/scan_seg.nii.gz",
        "volumes.csv",
        "volumes.json",
    ]
    voxels = np.bincount(expected_labels(blobs()).ravel())
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert rows == [
        ["case", "structure", "volume mm³"],
        *([case, f"{name} hippocampus", f"{float(voxels[label]):.1f}"]
          for case in ("p1/3_T1_test", "p2/scan") for label, name in ((1, "anterior"), (2, "posterior"))),
    ]  # fmt: skip
    assert result.stderr.splitlines() == [
        "1/2 p1/3_T1_test: ok",
        "2/2 p2/scan: ok",
        f"2 done, 0 skipped, 0 failed; results and manifest.jsonl in {out}",
    ]
    mask = nibabel.load(out / "p2/scan_seg.nii.gz")
    assert np.array_equal(np.asarray(mask.dataobj), expected_labels(blobs()))
    assert mask.get_data_dtype() == np.uint8


def test_predict_can_write_one_format_only(bundle, study, tmp_path):
    medvit("predict", bundle, study, "-o", tmp_path / "out", "-f", "dicom-seg", "-f", "dicom-seg")
    assert list(tree(tmp_path / "out")) == ["manifest.jsonl", "p1/3_T1_test_seg.dcm", "volumes.csv", "volumes.json"]


def test_options_reach_the_manifest(bundle, study, tmp_path):
    options = ("-f", "nifti", "--amp", "--batch-size", 2, "--device", "cpu")
    medvit("predict", bundle, study, "-o", tmp_path / "out", *options)
    record = manifest(tmp_path / "out")[0]
    assert record["settings"]["amp"] is True and record["settings"]["formats"] == ["nifti"]
    assert record["device"] == "cpu"


def test_several_inputs_with_equal_names_get_their_own_results(bundle, tmp_path):
    for n, folder in enumerate(("a", "b")):
        write_nifti(tmp_path / folder / "scan.nii.gz", np.roll(blobs(), n, 0), np.eye(4))
    out = tmp_path / "out"
    medvit("predict", bundle, tmp_path / "a", tmp_path / "b", "-o", out, "-f", "nifti")
    outputs = [record["outputs"] for record in manifest(out)]
    assert outputs == [["scan_seg.nii.gz"], ["scan_2_seg.nii.gz"]]
    masks = [np.asarray(nibabel.load(out / name[0]).dataobj) for name in outputs]
    assert np.array_equal(np.roll(masks[0], 1, 0), masks[1]) and not np.array_equal(*masks)


def test_two_series_in_one_folder_are_two_cases(bundle, tmp_path):
    for prefix, number in (("A", 3), ("B", 4)):
        write_dicom_series(tmp_path / "in", blobs(), np.eye(4), prefix=prefix, SeriesNumber=number)
    medvit("predict", bundle, tmp_path / "in", "-o", tmp_path / "out", "-f", "nifti")
    assert [record["case"] for record in manifest(tmp_path / "out")] == ["3_T1_test", "4_T1_test"]


def test_a_hash_in_a_path_is_a_path(bundle, tmp_path):
    write_nifti(tmp_path / "case#1/scan#2.nii", blobs(), np.eye(4))
    medvit("predict", bundle, tmp_path / "case#1", "-o", tmp_path / "out#3", "-f", "nifti")
    assert (tmp_path / "out#3/scan#2_seg.nii.gz").is_file()


def test_results_inside_the_input_folder_are_no_inputs_of_the_next_run(bundle, tmp_path):
    write_nifti(tmp_path / "in/scan.nii", blobs(), np.eye(4))
    for resume in ((), ("--resume",)):
        medvit("predict", bundle, tmp_path / "in", "-o", tmp_path / "in/results", "-f", "nifti", *resume)
    assert [record["case"] for record in manifest(tmp_path / "in/results")] == ["scan"]


@pytest.mark.parametrize("command", [("predict", "BUNDLE"), ("convert",)])
def test_the_output_folder_cannot_be_an_input(bundle, study, command):
    before = tree(study)
    words = [bundle if word == "BUNDLE" else word for word in command]
    result = medvit(*words, study, "-o", study, code=1)
    assert f"{study}: is an input too; choose another output folder" in result.stderr
    assert tree(study) == before


def test_other_modalities_are_skipped_with_a_line(bundle, study, tmp_path):
    write_dicom_series(study / "ct", blobs(), np.eye(4), modality="CT")
    result = medvit("predict", bundle, study, "-o", tmp_path / "out", "-f", "nifti")
    assert "skipped, its modality is CT and not MR" in result.stderr
    assert len(manifest(tmp_path / "out")) == 2


# ---- predict, again


def test_a_second_run_refuses_resumes_or_overwrites(bundle, study, tmp_path):
    out = tmp_path / "out"
    command = ("predict", bundle, study, "-o", out, "-f", "nifti")
    medvit(*command)
    before = tree(out)

    result = medvit(*command, code=1)
    assert "scan_seg.nii.gz: exists already; resume to keep finished cases, overwrite to replace them" in result.stderr
    assert {name: data for name, data in tree(out).items() if name != "manifest.jsonl"} == {
        name: data for name, data in before.items() if name != "manifest.jsonl"
    }

    write_nifti(study / "p3/new.nii", blobs(), np.eye(4))
    result = medvit(*command, "--resume")
    assert "1 done, 2 skipped, 0 failed" in result.stderr
    assert (out / "p3/new_seg.nii.gz").is_file()
    assert len((out / "volumes.csv").read_text(encoding="utf-8").splitlines()) == 7

    write_nifti(study / "p2/scan.nii.gz", blobs()[::-1], make_affine("sagittal", (1, 1, 1)))
    medvit(*command, "--overwrite")
    mask = np.asarray(nibabel.load(out / "p2/scan_seg.nii.gz").dataobj)
    assert np.array_equal(mask, expected_labels(blobs()[::-1]))
    assert tree(out)["p1/3_T1_test_seg.nii.gz"] == before["p1/3_T1_test_seg.nii.gz"]


def test_resuming_with_other_weights_or_formats_is_refused(bundle, study, tmp_path):
    out = tmp_path / "out"
    medvit("predict", bundle, study / "p2", "-o", out, "-f", "nifti")
    result = medvit("predict", bundle, study / "p2", "-o", out, "--resume", code=1)
    assert "scan_seg.nii.gz: was made with other settings" in result.stderr
    other = make_bundle(tmp_path)
    write_weights(other, {"weight": torch.ones(3, 1, 1, 1, 1), "bias": torch.tensor([0.0, 1.0, 0.0])})
    before = tree(out)["scan_seg.nii.gz"]
    result = medvit("predict", other, study / "p2", "-o", out, "-f", "nifti", "--resume", code=1)
    assert "was made with other weights_sha256; choose another output folder, or overwrite" in result.stderr
    assert tree(out)["scan_seg.nii.gz"] == before


# ---- bad input: one message, a line in the manifest, exit status 1, the others done


def _truncated_nifti(folder):
    path = write_nifti(folder / "bad.nii.gz", blobs(), np.eye(4))
    path.write_bytes(path.read_bytes()[:-500])
    return "bad", "unreadable", f"{path}: "


def _truncated_dicom(folder):
    path = write_dicom_series(folder / "bad", blobs(), np.eye(4))[7]
    path.write_bytes(path.read_bytes()[:-500])
    return "bad/3_T1_test", "truncated", path.name


def _missing_slice(folder):
    write_dicom_series(folder / "bad", blobs(), np.eye(4))[7].unlink()
    return "bad/3_T1_test", "missing-slice", "gap between 6 and 8 mm"


def _four_dimensional(folder):
    uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    same = {**uids, "InstanceNumber": 1, "ContentTime": ""}  # two volumes, and nothing tells their images apart
    for prefix, array in (("A", blobs()), ("B", 1 + blobs())):
        write_dicom_series(folder / "bad", array, np.eye(4), prefix=prefix, **same)
    return "bad/3_T1_test", "four-dimensional", "64 slices lie at 32 positions, 2 at each: several volumes"


def _singular(folder):
    path = write_nifti(folder / "bad.nii", blobs(), np.eye(4), srow_x=[0, 0, 0, 0], qform_code=0)
    return "bad", "singular-affine", f"{path}: the affine is singular"


def _not_nifti(folder):
    (folder / "bad.nii").write_bytes(b"hello" * 100)
    return "bad", "unreadable", str(folder / "bad.nii")


BAD = [_truncated_nifti, _truncated_dicom, _missing_slice, _four_dimensional, _singular, _not_nifti]


@pytest.mark.parametrize("spoil", BAD)
def test_a_bad_case_has_its_reason_and_the_others_their_masks(bundle, study, tmp_path, spoil):
    case, code, part = spoil(study)
    out = tmp_path / "out"
    result = medvit("predict", bundle, study, "-o", out, "-f", "nifti", code=1)
    found_code, reason = failure(out, case)
    assert found_code == code
    assert part in reason
    assert f"failed: {case} ({code}): {reason}" in result.stderr
    assert "2 done, 0 skipped, 1 failed" in result.stderr
    assert [name for name in tree(out) if name.endswith(".nii.gz")] == ["p1/3_T1_test_seg.nii.gz", "p2/scan_seg.nii.gz"]
    assert not list(out.rglob(".*"))

    # what headers cannot tell, such as a gzip stream that ends early, is for the reader to find
    known = spoil is not _truncated_nifti
    lines = medvit("inspect", study, "--json", code=int(known)).stdout.splitlines()
    assert [json.loads(line)["code"] for line in lines] == [code if known else None, None, None]
    record = next(
        json.loads(line)
        for line in medvit("convert", study, "-o", tmp_path / "nii", "--json", code=1).stdout.splitlines()
        if case in line
    )
    assert (record["status"], record["code"], record["output"]) == ("rejected", code, None)
    assert part in record["reason"]


def test_all_that_is_wrong_at_once(bundle, study, tmp_path):
    cases = [spoil(study / spoil.__name__)[:2] for spoil in BAD if not (study / spoil.__name__).mkdir()]
    result = medvit("predict", bundle, study, "-o", tmp_path / "out", "-f", "nifti", code=1)
    assert f"2 done, 0 skipped, {len(BAD)} failed" in result.stderr
    codes = {record["case"]: record["code"] for record in manifest(tmp_path / "out")}
    for spoil, (case, code) in zip(BAD, cases, strict=True):
        assert codes[f"{spoil.__name__}/{case}"] == code


def test_of_a_4d_image_the_first_volume_is_segmented(bundle, tmp_path):
    path = write_nifti(tmp_path / "in/four.nii", np.stack([blobs(), blobs()[::-1]], -1), np.eye(4))
    result = medvit("predict", bundle, path, "-o", tmp_path / "out", "-f", "nifti")
    assert f"{path}: the first of the 2 volumes of its file" in result.stderr
    (record,) = manifest(tmp_path / "out")
    assert (record["case"], record["outputs"]) == ("four_v0", ["four_v0_seg.nii.gz"])
    assert record["notes"] == ["the first of the 2 volumes of its file"]
    mask = np.asarray(nibabel.load(tmp_path / "out/four_v0_seg.nii.gz").dataobj)
    assert np.array_equal(mask, expected_labels(blobs()))


@pytest.mark.parametrize("content", ["nothing", "text", "absent"])
def test_nothing_to_do(bundle, tmp_path, content):
    folder = tmp_path / "in"
    if content != "absent":
        folder.mkdir()
    if content == "text":
        (folder / "notes.txt").write_text("hello")
    out = tmp_path / "out"
    reason = {
        "nothing": "no NIfTI file and no MetaImage or NRRD file found; there is: nothing at all",
        "text": "there is: notes.txt: no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF or BMP file",
        "absent": "no such file or folder",
    }[content]
    for command in (("predict", bundle, folder, "-o", out), ("inspect", folder), ("convert", folder, "-o", out)):
        aside = command[0] == "convert" and content == "text"  # every file is accounted for, and none of them failed
        result = medvit(*command, code=0 if aside else 1)
        last = result.stderr.splitlines()[-1]
        assert last.startswith("0 written, 0 rejected, 1 set aside" if aside else f"medvit: {folder}: no ")
        if command[0] == "predict":
            assert reason in last
    (record,) = manifest(out)
    assert (record["case"], record["status"], record["code"]) == (None, "failed", "nothing-found")
    assert reason in record["reason"]


def test_an_output_that_is_a_file(bundle, study, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = medvit("predict", bundle, study, "-o", tmp_path / "out", code=1)
    assert result.stderr == (
        f"medvit: {tmp_path}/out/manifest.jsonl: cannot be written (File exists); "
        "choose a writable folder with free space\n"
    )
    result = medvit("convert", study, "-o", tmp_path / "out", "--json", code=1)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["status"], r["code"]) for r in records] == [("rejected", "output")] * 2
    assert f"{tmp_path}/out/p2/scan.nii.gz: cannot be written" in records[1]["reason"]
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_that_cannot_be_made(bundle, study):
    result = medvit("predict", bundle, study, "-o", "/proc/nowhere/out", code=1)
    assert result.stderr.startswith("medvit: /proc/nowhere/out/manifest.jsonl: cannot be written (")


@pytest.mark.parametrize(
    ("spoil", "code", "part"),
    [
        (lambda root: (root / "models/model.pt").unlink(), "weights-mismatch", "models/model.pt: no such weights file"),
        (
            lambda root: write_weights(root, {"weight": torch.zeros(3)}, honest=False),
            "weights-mismatch",
            "models/model.pt: the weights are not those the metadata names: expected sha256",
        ),
        (
            lambda root: write_weights(root, {"weight": torch.zeros(2, 1, 1, 1, 1), "bias": torch.zeros(2)}),
            "weights-mismatch",
            "models/model.pt: the weights do not fit the network: 2 of another shape",
        ),
        (lambda root: edit_json(root / "configs/inference.json", overlap=2), "bundle", "overlap must be in [0, 1)"),
    ],
)
def test_a_bundle_that_does_not_serve(study, tmp_path, spoil, code, part):
    root, out = make_bundle(tmp_path), tmp_path / "out"
    medvit("predict", root, study, "-o", out, "-f", "nifti")
    before = tree(out)
    spoil(root)
    result = medvit("predict", root, study, "-o", out, "--overwrite", code=1)
    assert part in result.stderr and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("medvit: ")
    after = tree(out)
    last = json.loads(after.pop("manifest.jsonl").splitlines()[-1])
    assert (last["case"], last["status"], last["code"]) == (None, "failed", code)
    assert part in last["reason"]
    before.pop("manifest.jsonl")
    assert after == before


def test_an_unknown_bundle_and_device(bundle, study, tmp_path):
    result = medvit("predict", "nonsense", study, "-o", tmp_path / "out", code=1)
    assert result.stderr.startswith("medvit: nonsense: no such bundle; give a folder that holds configs/metadata.json")
    assert not (tmp_path / "out").exists()
    result = medvit("predict", bundle, study, "-o", tmp_path / "out", "--device", "gpu", code=1)
    assert result.stderr == "medvit: device 'gpu' is unknown to torch; use auto, cpu or cuda\n"


# ---- privacy


def test_no_patient_data_in_names_manifests_logs_and_messages(bundle, tmp_path, caplog):
    study, out = tmp_path / "in", tmp_path / "out"
    write_dicom_series(study / "good", blobs(), np.eye(4), **PATIENT)
    write_dicom_series(study / "gap", blobs(), np.eye(4), **PATIENT)[5].unlink()
    cut = write_dicom_series(study / "cut", blobs(), np.eye(4), **PATIENT)[5]
    cut.write_bytes(cut.read_bytes()[:400])
    write_dicom_series(study / "odd", blobs(), np.eye(4), edit=_odd, **PATIENT)
    write_dicom_series(study / "ct", blobs(), np.eye(4), modality="CT", **PATIENT)
    said = ""
    with caplog.at_level(logging.DEBUG, "medvit"):
        for command in (
            ("--verbose", "predict", bundle, study, "-o", out),
            ("--verbose", "convert", study, "-o", out / "nifti", "--json"),
            ("--verbose", "convert", study, "-o", out / "nifti"),
            ("--verbose", "inspect", study),
            ("--verbose", "inspect", study, "--json"),
        ):
            result = CliRunner().invoke(app, [str(word) for word in command])
            assert result.exit_code == 1
            said += result.output
        said += "".join(record.getMessage() for record in caplog.records if record.name == "medvit")
    assert any(name.endswith("good/3_T1_test_seg.dcm") for name in tree(out))
    for name, content in tree(out).items():
        said += name
        if not name.endswith(".dcm"):  # a SEG belongs to the patient and names him, as DICOM demands
            plain = gzip.decompress(content) if name.endswith(".gz") else content
            said += plain.decode("latin-1")
    assert [secret for secret in SECRETS if secret in said.lower()] == []


def _odd(dataset, k):
    """Values that parsers complain about, quoting what they found."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset.add_new(0x00101010, "AS", "Zyxwvut")
        if k == 3:
            dataset.add_new(0x00280008, "LO", "unknown")  # the number of frames
        if k == 4:
            dataset.add_new(0x00200032, "LO", "unknown")  # the position


# ---- inspect and convert


def test_inspect_says_what_would_be_used(study):
    (study / "notes.txt").write_text("hello")
    result = medvit("inspect", study)
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["image", "kind", "modality", "shape", "spacing mm", "axes", "files"],
        ["p1/3_T1_test", "dicom", "MR", "36×48×32", "1×1×1", "LPS", "32"],
        ["p2/scan", "nifti", "-", "36×48×32", "1×1×1", "PIR", "1"],
        ["set aside", "code", "why"],
        [str(study / "notes.txt"), "not-an-image", "no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF or BMP file"],
    ]
    assert result.stderr.splitlines()[-1] == "2 usable, 0 not usable, 1 files set aside"


def test_inspect_reads_no_pixels(study, monkeypatch):
    import pydicom

    monkeypatch.setattr(pydicom.Dataset, "pixel_array", property(lambda self: pytest.fail("pixels were read")))
    medvit("inspect", study)


def test_inspect_fails_on_files_that_should_be_readable(study):
    (study / "broken.dcm").write_bytes(b"")
    result = medvit("inspect", study, code=1)
    assert f"broken.dcm\tunreadable\t{study / 'broken.dcm'}: named like DICOM, but empty" in result.stdout
    assert result.stderr.endswith("2 usable, 1 not usable, 0 files set aside\n")


def test_an_emptied_end_slice_fails_in_every_command(bundle, study, tmp_path):
    lost = write_dicom_series(study / "p3", blobs(), np.eye(4))[-1]
    lost.write_bytes(b"")
    expected = {"p3/3_T1_test": "incomplete", f"p3/{lost.name}": "unreadable"}
    out = tmp_path / "out"
    result = medvit("predict", bundle, study, "-o", out, "-f", "nifti", code=1)
    assert "2 done, 0 skipped, 2 failed" in result.stderr
    assert {r["case"]: r["code"] for r in manifest(out) if r["status"] == "failed"} == expected
    assert all(lost.name in r["reason"] for r in manifest(out) if r["status"] == "failed")
    for command in (("inspect", study), ("convert", study, "-o", tmp_path / "nii")):
        lines = [json.loads(line) for line in medvit(*command, "--json", code=1).stdout.splitlines()]
        assert {line["series"]: line["code"] for line in lines if line["status"] == "rejected"} == expected


def test_results_of_another_run_are_no_inputs(bundle, tmp_path):
    write_nifti(tmp_path / "in/scan.nii", blobs(), np.eye(4))
    for run in ("first", "second"):
        medvit("predict", bundle, tmp_path / "in", "-o", tmp_path / "in" / run, "-f", "nifti")
        assert [record["case"] for record in manifest(tmp_path / "in" / run)] == ["scan"]


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_pipe_that_is_no_utf8(tmp_path, arguments):
    write_nifti(tmp_path / "图.nii", np.zeros((3, 3, 3), np.int16), np.eye(4))
    result = subprocess.run(
        [sys.executable, "-m", "medvit.cli", "inspect", tmp_path, *arguments],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=True,
    )
    assert ("图".encode() if arguments else rb"\u56fe") in result.stdout


def test_inspect_admits_when_it_reads_pixels():
    said = " ".join(medvit("inspect", "--help").stdout.replace("│", " ").split())
    assert "Reads headers; pixels only of DICOM files that claim to be copies of each other." in said


def test_inspect_json_lines(study):
    write_nifti(study / "p2/four.nii", np.zeros((3, 3, 3, 2), np.int16), np.eye(4))
    write_nifti(study / "p2/hole.nii", np.zeros((3, 3, 3), np.int16), np.eye(4), sform_code=0, qform_code=0)
    (study / "notes.txt").write_text("hello")
    lines = [json.loads(line) for line in medvit("inspect", study, "--json").stdout.splitlines()]
    assert [(line["series"], line["status"], line["code"], line.get("parameters")) for line in lines] == [
        ("p1/3_T1_test", "ok", None, None),
        ("p2/four_v0", "ok", None, {"time_point": 0.0}),
        ("p2/four_v1", "ok", None, {"time_point": 1.0}),
        ("p2/hole", "warning", "notes", None),
        ("p2/scan", "ok", None, None),
        (None, "set-aside", "not-an-image", None),
    ]
    assert [(line["volume"], line["volumes"], line["files"]) for line in lines[1:3]] == [
        (n, 2, [str(study / "p2/four.nii")]) for n in range(2)
    ]
    assert lines[4] == {
        "status": "ok",
        "code": None,
        "reason": None,
        "series": "p2/scan",
        "files": [str(study / "p2/scan.nii.gz")],
        "modality": "",
        "shape": [36, 48, 32],
        "spacing": [1.0, 1.0, 1.0],
        "orientation": "PIR",
    }
    assert len(lines[0]["files"]) == 32
    assert "neither sform nor qform" in lines[3]["reason"]


def test_convert_json_lines(study, tmp_path):
    write_nifti(study / "p2/four.nii", np.zeros((3, 3, 3, 2), np.int16), np.eye(4))
    write_nifti(study / "p2/gone.nii", np.zeros((3, 3, 3), np.int16), np.eye(4), srow_x=[0, 0, 0, 0], qform_code=0)
    (study / "notes.txt").write_text("hello")
    result = medvit("convert", study, "-o", tmp_path / "nii", "--json", code=1)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    inspected = [json.loads(line) for line in medvit("inspect", study, "--json", code=1).stdout.splitlines()]
    assert [{key: value for key, value in line.items() if key != "output"} for line in lines] == inspected
    assert [line["output"] for line in lines] == [
        str(tmp_path / "nii/p1/3_T1_test.nii.gz"),
        str(tmp_path / "nii/p2/four_v0.nii.gz"),
        str(tmp_path / "nii/p2/four_v1.nii.gz"),
        None,
        str(tmp_path / "nii/p2/scan.nii.gz"),
        None,
    ]
    assert result.stderr.splitlines() == [
        "1/6 p1/3_T1_test: ok",
        "2/6 p2/four_v0: ok",
        "3/6 p2/four_v1: ok",
        "4/6 p2/gone: rejected",
        "5/6 p2/scan: ok",
        f"6/6 {study / 'notes.txt'}: set-aside",
        "4 written, 1 rejected, 1 set aside",
    ]
    image = nibabel.load(lines[0]["output"])
    assert np.array_equal(np.asarray(image.dataobj), blobs())
    assert np.abs(image.affine - make_affine("oblique", (1, 1, 1))).max() < 1e-4


def test_convert_tables_and_overwriting(study, tmp_path):
    out = tmp_path / "nii"
    result = medvit("convert", study, "-o", out)
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["series", "status", "output", "reason"],
        ["p1/3_T1_test", "ok", str(out / "p1/3_T1_test.nii.gz"), ""],
        ["p2/scan", "ok", str(out / "p2/scan.nii.gz"), ""],
    ]
    before = tree(out)
    assert "exists already" in medvit("convert", study, "-o", out, code=1).stdout
    medvit("convert", study, "-o", out, "--overwrite")
    assert tree(out) == before


def test_converted_files_inside_the_input_folder_are_not_converted_again(study):
    for _ in range(2):
        medvit("convert", study, "-o", study / "nii", "--overwrite")
    assert list(tree(study / "nii")) == ["p1/3_T1_test.nii.gz", "p2/scan.nii.gz"]


def test_reasons_stay_on_one_line_of_a_table(tmp_path):
    write_nifti(tmp_path / "a\tb\nc.nii", np.zeros((3, 3, 3), np.int16), np.eye(4))
    lines = medvit("inspect", tmp_path).stdout.splitlines()
    assert len(lines) == 2 and lines[1].split("\t")[0] == "a b c"


def test_names_that_are_no_utf8(tmp_path):
    path = Path(str(tmp_path)) / b"caf\xe9.nii".decode("utf-8", "surrogateescape")
    write_nifti(path, np.zeros((3, 3, 3), np.int16), np.eye(4))
    assert r"caf\udce9" in medvit("inspect", tmp_path).stdout
    (line,) = medvit("convert", tmp_path, "-o", tmp_path / "out", "--json").stdout.splitlines()
    assert json.loads(line)["files"] == [str(path)]


def lines_of(*arguments, code=0):
    return [json.loads(line) for line in medvit(*arguments, "--json", code=code).stdout.splitlines()]


def test_convert_to_one_4d_file(tmp_path):
    arrays = arrays_of(3)
    write_volumes(tmp_path / "in", arrays, make_affine("oblique"), *[{"EchoTime": n + 1} for n in range(3)])
    assert len(lines_of("convert", tmp_path / "in", "-o", tmp_path / "each")) == 3
    (line,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "all", "--4d")
    assert (line["status"], line["volumes"], line["volume"]) == ("ok", 3, None)
    image = nibabel.load(line["output"])
    assert np.array_equal(np.asarray(image.dataobj), np.stack(arrays, -1))
    assert np.abs(image.affine - make_affine("oblique")).max() < 1e-5


def test_convert_tilted_slices(bundle, tmp_path):
    """Kept with a warning; upright or refused on request; refused by networks, in that the others are done."""
    array = phantom((8, 7, 12))
    write_dicom_series(tmp_path / "in", array, tilted_affine(14))
    (kept,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "keep")
    assert kept["status"] == "warning" and "sheared by 14.00 degrees" in kept["reason"]
    assert np.abs(nibabel.load(kept["output"]).affine - tilted_affine(14)).max() < 1e-5
    (upright,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "up", "--tilt", "resample")
    assert upright["status"] == "warning" and upright["shape"][1] > 7
    axes = nibabel.load(upright["output"]).affine[:3, :3] / upright["spacing"]
    assert np.abs(axes.T @ axes - np.eye(3)).max() < 1e-5
    (refused,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "no", "--tilt", "refuse", code=1)
    assert (refused["status"], refused["code"], refused["output"]) == ("rejected", "gantry-tilt", None)
    assert not (tmp_path / "no").exists()
    write_nifti(tmp_path / "in/scan.nii", blobs(), np.eye(4))
    medvit("predict", bundle, tmp_path / "in", "-o", tmp_path / "out", "-f", "nifti", code=1)
    code, reason = failure(tmp_path / "out", "3_T1_test")
    assert code == "gantry-tilt" and "medvit convert --tilt resample" in reason
    assert (tmp_path / "out/scan_seg.nii.gz").is_file()


def test_convert_uneven_slices(tmp_path):
    array = phantom((7, 6, 9))
    files = write_dicom_series(tmp_path / "in", array, make_affine())
    files[5].unlink()
    (line,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "no", code=1)
    assert (line["status"], line["code"], len(line["files"])) == ("rejected", "missing-slice", 8)
    assert (
        "1 of 9 slices are missing: slices are 2.5 mm apart, but there is a gap between -50 and -45" in line["reason"]
    )
    (line,) = lines_of("convert", tmp_path / "in", "-o", tmp_path / "even", "--uneven", "resample")
    stored = np.asarray(nibabel.load(line["output"]).dataobj)
    assert np.array_equal(np.delete(stored, 5, 2), np.delete(array, 5, 2))
    assert np.array_equal(stored[:, :, 5], (array[:, :, 4].astype(float) + array[:, :, 6]) / 2)
    below, above = lines_of("convert", tmp_path / "in", "-o", tmp_path / "parts", "--uneven", "split")
    assert np.array_equal(np.asarray(nibabel.load(below["output"]).dataobj), array[:, :, :5])
    assert np.array_equal(np.asarray(nibabel.load(above["output"]).dataobj), array[:, :, 6:])
    assert nibabel.load(above["output"]).affine[2, 3] == pytest.approx(-60 + 6 * 2.5)
    medvit("convert", tmp_path / "in", "-o", tmp_path / "x", "--uneven", "guess", code=2)
    medvit("convert", tmp_path / "in", "-o", tmp_path / "x", "--tilt", "guess", code=2)


def test_convert_a_zipped_study(study, tmp_path):
    shutil.make_archive(str(tmp_path / "zips/study"), "zip", study)
    lines = lines_of("convert", tmp_path / "zips", "-o", tmp_path / "nii")
    assert [(line["status"], line["series"]) for line in lines] == [
        ("ok", "study/p1/3_T1_test"),
        ("ok", "study/p2/scan"),
        ("set-aside", None),
    ]
    assert np.array_equal(np.asarray(nibabel.load(lines[0]["output"]).dataobj), blobs())
    assert lines[1]["files"] == [str(tmp_path / "zips/study.zip/p2/scan.nii.gz")]


def test_exit_statuses_of_convert(tmp_path):
    """0 with warnings and files set aside, 1 as soon as one is rejected, 2 for wrong usage; one never stops another."""
    folder = tmp_path / "in"
    write_dicom_series(folder / "tilted", phantom((8, 7, 12)), tilted_affine(14))
    write_flat(folder / "x.dcm", np.zeros((1, 6, 8), np.uint8), "1", "CR")
    (folder / "notes.txt").write_text("hello")
    lines = lines_of("convert", folder, "-o", tmp_path / "a")
    assert [line["status"] for line in lines] == ["warning", "warning", "set-aside"]
    write_dicom_series(folder / "gap", phantom(), make_affine())[2].unlink()
    lines = lines_of("convert", folder, "-o", tmp_path / "b", code=1)
    assert [line["status"] for line in lines] == ["warning", "rejected", "warning", "set-aside"]
    assert sum(line["output"] is not None for line in lines) == 2
    medvit("convert", folder, "--4d", code=2)


def test_a_mosaic_and_a_multi_frame_object_are_segmented_on_their_own_slices(bundle, tmp_path):
    """The first volume of several; the SEG refers to the frames it was made of."""
    affine = make_affine("oblique", (1, 1, 1))
    write_siemens_mosaic(tmp_path / "in/mosaic/m.dcm", blobs(), affine, StudyDescription="x")
    shared = {**measures_group(affine), **orientation_group(affine)}
    arrays = [blobs(), blobs()[::-1]]
    groups = [
        {**position_group(affine, k), "FrameContentSequence": nested(TemporalPositionIndex=n + 1)}
        for n in range(2)
        for k in range(32)
    ]
    images = [array[:, :, k] for array in arrays for k in range(32)]
    write_multiframe(tmp_path / "in/enhanced/e.dcm", images, groups, shared, SeriesInstanceUID="1.2.77")
    out = tmp_path / "out"
    medvit("predict", bundle, tmp_path / "in", "-o", out, "-f", "nifti")
    for case in ("mosaic/3_T1_test", "enhanced/3_T1_test_v0"):
        mask = nibabel.load(out / f"{case}_seg.nii.gz")
        assert np.array_equal(np.asarray(mask.dataobj), expected_labels(blobs()))
        assert np.abs(mask.affine - affine).max() < 1e-5
    notes = {record["case"]: record["notes"] for record in manifest(out)}
    assert notes["mosaic/3_T1_test"] == []
    assert notes["enhanced/3_T1_test_v0"] == ["the first of 2 volumes of its series (temporal_position 1)"]


def test_convert_without_identifiers(tmp_path):
    """DICOM again, one record and one line of progress per file; what is no DICOM is set aside."""
    folder, out = tmp_path / "in", tmp_path / "out"
    array = phantom()
    write_dicom_series(folder, array, make_affine("oblique"), **PATIENT)
    write_nifti(folder / "scan.nii", array, np.eye(4))
    (folder / "notes.txt").write_text("hello")
    result = medvit("convert", folder, "-o", out, "--deidentify", "--json")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(line["status"], line["code"]) for line in lines[5:]] == [
        ("set-aside", "not-dicom"),
        ("set-aside", "not-an-image"),
    ]
    assert [line["output"] is not None for line in lines] == [True] * 5 + [False] * 2
    assert sorted(line["files"][0] for line in lines) == sorted(str(path) for path in folder.iterdir())
    assert [line.split()[0] for line in result.stderr.splitlines()[:-1]] == [f"{n}/7" for n in range(1, 8)]
    (line,) = lines_of("convert", out, "-o", tmp_path / "nii")
    assert np.array_equal(np.asarray(nibabel.load(line["output"]).dataobj), array)
    said = result.output + "".join(tree(out)) + "".join(data.decode("latin-1") for data in tree(out).values())
    assert [secret for secret in SECRETS if secret in said.lower()] == []


# ---- bundles and verify


def test_bundles_are_listed_and_a_broken_one_does_not_hide_the_others(tmp_path, monkeypatch):
    make_bundle(tmp_path, name="aaa")
    monkeypatch.setenv("MEDVIT_BUNDLES", str(tmp_path))
    rows = [line.split("\t") for line in medvit("bundles").stdout.splitlines()]
    assert rows[0] == ["bundle", "version", "task", "folder"]
    assert rows[1][0] == "aaa" and rows[1][3] == str(tmp_path / "aaa")
    assert "hippocampus_swin_unetr" in [row[0] for row in rows]
    (tmp_path / "aaa/configs/metadata.json").write_text("{")
    rows = [line.split("\t") for line in medvit("bundles", code=1).stdout.splitlines()]
    assert rows[1][:2] == ["aaa", "-"] and "cannot be read" in rows[1][2]
    assert "hippocampus_swin_unetr" in [row[0] for row in rows]


def test_no_bundles(monkeypatch):
    monkeypatch.setattr("medvit.bundle.bundle_folders", lambda: [])
    assert medvit("bundles").stderr == "no bundles found; set MEDVIT_BUNDLES to a folder of bundles\n"


def test_verify(tmp_path):
    root = make_bundle(tmp_path)
    checks = ["files", "metadata", "weights", "network", "configs agree"]
    assert medvit("verify", root).stdout.splitlines() == ["check\tresult", *(f"{check}\tok" for check in checks)]
    (root / "LICENSE").unlink()
    assert f"files\t{root}: lacks LICENSE" in medvit("verify", root, code=1).stdout


# ---- on a terminal


def test_tables_are_drawn_on_a_terminal(study, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    from medvit import terminal

    terminal.table(("a", "b"), [("x[bold]", 1)])
    drawn = capsys.readouterr().out
    assert "x[bold]" in drawn and "┃" in drawn and "\t" not in drawn


@pytest.mark.parametrize("option", [["--4d"], ["--tilt", "resample"], ["--uneven", "split"]])
def test_options_for_nifti_are_wrong_usage_where_dicom_is_copied(tmp_path, option):
    result = medvit("convert", tmp_path, "-o", tmp_path / "out", "--deidentify", *option, code=2)
    assert "--deidentify copies DICOM files" in " ".join(result.stderr.replace("│", " ").split())
