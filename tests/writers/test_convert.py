import json
import logging
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from dicom_synthetic import arrays_of, tilted_affine, write_flat, write_volumes
from photographs_synthetic import colours, write_picture

from medvit.data.regrid import Repairs
from medvit.data.space import Space
from medvit.data.study import Inventory, SetAside, discover
from medvit.data.volume import Source, Volume
from medvit.errors import MedvitError, UnreadableSeries
from medvit.writers.convert import convert

KEYS = ["status", "code", "reason", "series", "files", "output", "modality", "shape", "spacing", "orientation"]
AFFINE = make_affine("oblique")


@dataclass(frozen=True)
class Stub:
    """What convert uses of a Series; ``outcome`` is returned, or raised, by read()."""

    name: str
    outcome: Volume | BaseException
    space: Space | None = None
    kind: str = "dicom"
    modality: str = "MR"
    origins: tuple[Path, ...] = (Path("in/a.dcm"),)
    channels: int = 1
    base: str = ""
    volume: int = 0
    volumes: int = 1
    parameters: dict[str, float] = field(default_factory=dict)
    placed: bool = True
    time_step: float | None = None
    archive: None = None

    @property
    def problem(self):
        return self.outcome if isinstance(self.outcome, MedvitError) else None

    def read(self):
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


def _volume(*notes):
    array = phantom().astype(np.float32)
    return Volume(array, Space.from_affine(array.shape, AFFINE), Source("dicom", ()), notes)


def _convert(folder, *series, set_aside=(), **options):
    return list(convert(Inventory(series, set_aside), folder, **options))


def test_each_outcome_has_a_record_and_none_stops_the_rest(tmp_path, caplog):
    caplog.set_level(logging.DEBUG, "medvit")
    unforeseen = "converting; the debug log (--verbose) has the traceback, report it"
    space = Space.from_affine((4, 5, 6), np.diag([1, 2, 3, 1]))
    records = _convert(
        tmp_path,
        Stub("p1/good.1", _volume()),
        Stub("p1/odd", _volume("A duplicate was dropped.", "Another.")),
        Stub("gap", UnreadableSeries("gap", "missing-slice", "a slice is missing at 12 mm"), space),
        Stub("bug", RuntimeError("value 'Doe^Jane'")),
        Stub("memory", MemoryError()),
        Stub("last", _volume()),
        set_aside=(SetAside(Path("in/report.dcm"), "not-an-image", "a structured report"),),
    )
    assert [list(record) for record in records] == [KEYS] * 7
    assert [(r["status"], r["code"], r["reason"]) for r in records] == [
        ("ok", None, None),
        ("warning", "notes", "A duplicate was dropped.; Another."),
        ("rejected", "missing-slice", "gap: a slice is missing at 12 mm"),
        ("rejected", "internal", f"bug: RuntimeError while {unforeseen}"),
        ("rejected", "internal", f"memory: MemoryError while {unforeseen}"),
        ("ok", None, None),
        ("set-aside", "not-an-image", "a structured report"),
    ]
    assert [(r.getMessage(), r.levelname, r.exc_info is not None) for r in caplog.records] == [
        ("bug: not converted", "DEBUG", True),
        ("memory: not converted", "DEBUG", True),
    ]
    good, gap, aside = records[0], records[2], records[6]
    assert good["output"] == str(tmp_path / "p1" / "good.1.nii.gz")
    assert (good["shape"], good["spacing"], good["orientation"]) == ([7, 6, 5], [0.75, 1.25, 2.5], "LPS")
    assert (good["series"], good["files"], good["modality"]) == ("p1/good.1", ["in/a.dcm"], "MR")
    assert (gap["output"], gap["shape"], gap["spacing"], gap["orientation"]) == (None, [4, 5, 6], [1, 2, 3], "RAS")
    assert (aside["series"], aside["files"], aside["shape"]) == (None, ["in/report.dcm"], None)
    assert json.loads(json.dumps(records)) == records
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert written == ["last.nii.gz", "p1/good.1.nii.gz", "p1/odd.nii.gz"]


def test_an_interrupt_is_no_failure_of_a_series(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        _convert(tmp_path, Stub("a", KeyboardInterrupt()))


def test_records_come_one_at_a_time(tmp_path):
    records = convert(Inventory((Stub("a", _volume()), Stub("b", _volume())), ()), tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert next(records)["series"] == "a"
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]


def test_existing_files_are_kept_unless_asked(tmp_path):
    (tmp_path / "a.nii.gz").write_text("mine")
    (record,) = _convert(tmp_path, Stub("a", _volume()))
    assert (record["status"], record["code"], record["output"]) == ("rejected", "output", None)
    assert "exists already" in record["reason"]
    assert (tmp_path / "a.nii.gz").read_text() == "mine"
    (record,) = _convert(tmp_path, Stub("a", _volume()), overwrite=True)
    assert record["status"] == "ok"


def test_a_folder_of_both_formats_comes_out_as_it_went_in(tmp_path):
    array = phantom()
    write_dicom_series(tmp_path / "in" / "p1", array, AFFINE)
    write_nifti(tmp_path / "in" / "p2" / "image.nii", array, make_affine("coronal"))
    (tmp_path / "in" / "notes.txt").write_text("not an image")
    records = list(convert(discover(tmp_path / "in"), tmp_path / "out"))
    assert [r["status"] for r in records] == ["ok", "ok", "set-aside"]
    assert [r["modality"] for r in records] == ["MR", "", None]
    for record, affine in zip(records[:2], (AFFINE, make_affine("coronal")), strict=True):
        image = nibabel.load(record["output"])
        np.testing.assert_array_equal(np.asarray(image.dataobj), array)
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)
        assert image.get_data_dtype() == np.int16
        assert b"SECRET" not in Path(record["output"]).read_bytes()


def test_photographs_are_left_out_with_a_reason(tmp_path):
    write_nifti(tmp_path / "in/scan.nii", phantom(), AFFINE)
    write_picture(tmp_path / "in/eye.png", colours())
    (tmp_path / "in/lost.jpg").write_bytes(b"")
    records = list(convert(discover(tmp_path / "in"), tmp_path / "out"))
    reason = "a photograph: it has no place in millimetres, which a NIfTI file states"
    assert [(r["series"], r["status"], r["code"], r["reason"]) for r in records] == [
        ("eye", "set-aside", "photograph", reason),
        ("lost.jpg", "set-aside", "photograph", reason),
        ("scan", "ok", None, None),
    ]
    assert [list(record) for record in records] == [[*KEYS, "channels"]] * 2 + [KEYS]
    assert [record.get("channels") for record in records] == [3, 1, None]
    assert records[0]["files"] == [str(tmp_path / "in/eye.png")] and records[0]["output"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scan.nii.gz"]


# ---- several volumes, images without a place, repairs


def files_of(records):
    """How often the records name each file."""
    return Counter(file for record in records for file in record["files"])


def check(record, array, affine=AFFINE):
    image = nibabel.load(record["output"])
    np.testing.assert_array_equal(np.asarray(image.dataobj), array)
    np.testing.assert_allclose(image.affine, affine, atol=1e-5)
    return image


def test_each_volume_of_a_series_is_a_file(tmp_path):
    arrays = arrays_of(3)
    times = [{"EchoTime": t} for t in (2.5, 5, 7.5)]
    files = write_volumes(tmp_path / "in", arrays, AFFINE, *times)
    records = list(convert(discover(tmp_path / "in"), tmp_path / "out"))
    assert [(r["status"], r["series"], r["volume"], r["volumes"], r["parameters"]) for r in records] == [
        ("ok", f"3_T1_test_v{n}", n, 3, {"echo_time_ms": 2.5 * (n + 1)}) for n in range(3)
    ]
    for record, array in zip(records, arrays, strict=True):
        check(record, array)
    assert files_of(records) == Counter(map(str, files))
    assert json.loads(json.dumps(records)) == records


def test_the_volumes_of_a_series_in_one_file(tmp_path):
    arrays = arrays_of(3)
    times = [{"EchoTime": t} for t in (2.5, 5, 7.5)]
    files = write_volumes(tmp_path / "in", arrays, AFFINE, *times)
    (record,) = convert(discover(tmp_path / "in"), tmp_path / "out", four_d=True)
    assert (record["status"], record["series"], record["volume"], record["volumes"]) == ("ok", "3_T1_test", None, 3)
    assert record["parameters"] == [{"echo_time_ms": t} for t in (2.5, 5, 7.5)]
    assert record["output"] == str(tmp_path / "out/3_T1_test.nii.gz") and record["shape"] == [7, 6, 5]
    check(record, np.stack(arrays, -1))
    assert files_of([record]) == Counter(map(str, files))


def test_an_interrupted_last_volume_is_rejected_and_the_others_make_one_file(tmp_path):
    arrays = arrays_of(4)

    def edit(ds, n, k):
        ds.InstanceNumber, ds.ContentTime = 5 * n + k + 1, ""

    files = write_volumes(tmp_path / "in", arrays, AFFINE, edit=edit)
    files[19].unlink()
    whole, cut = convert(discover(tmp_path / "in"), tmp_path / "out", four_d=True)
    assert (whole["series"], whole["status"], whole["volumes"]) == ("3_T1_test", "ok", 3)
    check(whole, np.stack(arrays[:3], -1))
    assert (cut["series"], cut["status"], cut["code"]) == ("3_T1_test_v3", "rejected", "incomplete-volume")
    assert "1 of its 5 slices are missing" in cut["reason"] and cut["output"] is None
    assert files_of([whole, cut]) == Counter(map(str, files[:19]))


def test_volumes_on_other_grids_do_not_join_one_file(tmp_path):
    """Magnitude and phase of two echoes each, the phase with fewer slices; and none overwrites another."""
    arrays = [phantom((7, 6, 5)), phantom((7, 6, 5), seed=1), phantom((7, 6, 4), seed=2), phantom((7, 6, 4), seed=3)]
    tags = [{"ImageType": ["ORIGINAL", "PRIMARY", "MMPP"[n]], "EchoTime": n % 2 + 1} for n in range(4)]
    write_volumes(tmp_path / "in", arrays, AFFINE, *tags, edit=lambda ds, n, k: setattr(ds, "InstanceNumber", n))
    first, second = convert(discover(tmp_path / "in"), tmp_path / "out", four_d=True, overwrite=True)
    assert [one["output"] for one in (first, second)] == [str(tmp_path / f"out/3_T1_test_v{n}.nii.gz") for n in (0, 2)]
    check(first, np.stack(arrays[:2], -1))
    check(second, np.stack(arrays[2:], -1))


@pytest.mark.parametrize("four_d", [False, True])
def test_volumes_and_files_with_meeting_names_stay_apart(tmp_path, four_d):
    """``x_v0`` is the first volume of ``x``, and another file; with overwriting neither is lost."""
    arrays = arrays_of(2)
    write_nifti(tmp_path / "in/x.nii", np.stack(arrays, -1), AFFINE)
    write_nifti(tmp_path / "in/x_v0.nii", phantom(seed=9), AFFINE)
    write_nifti(tmp_path / "in/X_V1.nii", phantom(seed=8), AFFINE)
    records = list(convert(discover(tmp_path / "in"), tmp_path / "out", four_d=four_d, overwrite=True))
    assert {r["status"] for r in records} == {"ok"} and len({r["output"].lower() for r in records}) == len(records)
    found = {
        Path(r["files"][0]).name + str(r.get("volume") or ""): nibabel.load(r["output"]).get_fdata() for r in records
    }
    np.testing.assert_array_equal(found["x_v0.nii"], phantom(seed=9))
    np.testing.assert_array_equal(found["X_V1.nii"], phantom(seed=8))
    if four_d:
        np.testing.assert_array_equal(found["x.nii"], np.stack(arrays, -1))
    else:
        np.testing.assert_array_equal(found["x.nii"], arrays[0])
        np.testing.assert_array_equal(found["x.nii1"], arrays[1])


def test_time_steps_of_a_4d_file_are_kept(tmp_path):
    path = write_nifti(tmp_path / "in/x.nii", np.stack(arrays_of(3), -1), AFFINE)
    image = nibabel.load(path)
    image.header["pixdim"][4] = 2.5
    image.header.set_xyzt_units("mm", "sec")
    nibabel.Nifti1Image(np.asarray(image.dataobj), None, image.header).to_filename(path)
    (record,) = convert(discover(path), tmp_path / "out", four_d=True)
    assert nibabel.load(record["output"]).header.get_zooms()[3] == 2.5


def test_an_image_without_a_place_states_none(tmp_path):
    frame = np.random.default_rng(0).integers(0, 999, (1, 6, 8), dtype=np.uint16)
    write_flat(tmp_path / "in/x.dcm", frame, "1.1", "DX", ImagerPixelSpacing=[0.2, 0.15])
    (record,) = convert(discover(tmp_path / "in"), tmp_path / "out")
    assert (record["status"], record["code"], record["modality"]) == ("warning", "notes", "DX")
    assert record["reason"].startswith(
        "its position and orientation in the patient are unknown, and its spacing is that"
    )
    assert (record["shape"], record["spacing"], record["orientation"]) == ([8, 6, 1], [0.15, 0.2, 1.0], None)
    image = nibabel.load(record["output"])
    np.testing.assert_array_equal(np.asarray(image.dataobj)[:, :, 0], frame[0].T)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0)
    np.testing.assert_allclose(image.header.get_zooms(), (0.15, 0.2, 1))


def test_a_colour_capture_is_rgb24(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (1, 6, 8, 3), dtype=np.uint8)
    write_flat(tmp_path / "in/x.dcm", frame, "7", "OT")
    (record,) = convert(discover(tmp_path / "in"), tmp_path / "out")
    assert (record["status"], record["channels"], record["spacing"]) == ("warning", 3, None)
    image = nibabel.load(record["output"])
    stored = np.asarray(image.dataobj)
    assert image.header.get_data_dtype() == np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
    np.testing.assert_array_equal(np.stack([stored[c] for c in "RGB"], -1)[:, :, 0], frame[0].swapaxes(0, 1))


def test_a_tilted_series_says_so(tmp_path):
    affine, array = tilted_affine(14), phantom((8, 7, 12))
    write_dicom_series(tmp_path / "in", array, affine)
    (record,) = convert(discover(tmp_path / "in"), tmp_path / "out")
    assert record["status"] == "warning" and "slices are sheared by 14.00 degrees (gantry tilt)" in record["reason"]
    image = check(record, array, affine)
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 0)  # a quaternion has no shear
    inventory = discover(tmp_path / "in", repairs=Repairs(tilt="resample"))
    (record,) = convert(inventory, tmp_path / "upright")
    assert record["shape"] == list(nibabel.load(record["output"]).shape) and record["shape"][1] > 7
    assert "were resampled to an upright grid" in record["reason"]


def test_members_of_an_archive_are_called_by_their_names_in_it(tmp_path):
    write_dicom_series(tmp_path / "in", phantom(), AFFINE)
    cut = write_dicom_series(tmp_path / "in/cut", phantom(), AFFINE)
    cut[4].write_bytes(cut[4].read_bytes()[:-9])
    shutil.make_archive(str(tmp_path / "zips/study"), "zip", tmp_path / "in")
    records = list(convert(discover(tmp_path / "zips", unpack=True), tmp_path / "out"))
    assert [(r["status"], r["series"]) for r in records] == [
        ("ok", "study/3_T1_test"),
        ("rejected", "study/cut/3_T1_test"),
        ("set-aside", None),
    ]
    check(records[0], phantom())
    archive = tmp_path / "zips/study.zip"
    members = [str(archive / path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.dcm")]
    assert files_of(records) == Counter([*members, str(archive)])
    assert records[1]["code"] == "truncated" and cut[4].name in records[1]["reason"]
    assert not any("/medvit-" in json.dumps(record) for record in records)


def test_every_file_is_named_exactly_once(tmp_path):
    """By classic series, of one volume or several: used, refused or set aside."""
    folder = tmp_path / "in"
    write_dicom_series(folder / "a", phantom(), AFFINE)
    write_volumes(folder / "b", arrays_of(2), AFFINE, {"EchoTime": 3}, {"EchoTime": 6})
    write_dicom_series(folder / "gap", phantom(), AFFINE)[2].unlink()
    copy = write_dicom_series(folder / "c", phantom(), AFFINE)[0]
    shutil.copy(copy, folder / "c/again.dcm")
    write_dicom_series(folder / "s", phantom((7, 6, 1)), AFFINE, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_flat(folder / "x.dcm", np.zeros((1, 6, 8), np.uint8), "1", "CR")
    write_picture(folder / "eye.png", colours())
    write_nifti(folder / "scan.nii", phantom(), AFFINE)
    (folder / "broken.nii").write_bytes(b"")
    (folder / "notes.txt").write_text("hello")
    records = list(convert(discover(folder), tmp_path / "out"))
    assert files_of(records) == Counter(str(path) for path in folder.rglob("*") if path.is_file())
    assert Counter(record["status"] for record in records) == {"ok": 4, "warning": 2, "rejected": 2, "set-aside": 4}
    for record in records:
        assert (record["output"] is not None) == (record["status"] in ("ok", "warning"))
        assert (record["code"] is None) == (record["reason"] is None) == (record["status"] == "ok")
