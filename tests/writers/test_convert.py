import json
import logging
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import colours, write_picture

from medvit.data.space import Space
from medvit.data.study import Inventory, SetAside, discover
from medvit.data.volume import Source, Volume
from medvit.errors import UnreadableSeries
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
    files: tuple[Path, ...] = (Path("in/a.dcm"),)

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
        ("warning", "notes", "A duplicate was dropped. Another."),
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
    assert [list(record) for record in records] == [KEYS] * 3
    assert records[0]["files"] == [str(tmp_path / "in/eye.png")] and records[0]["output"] is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scan.nii.gz"]
