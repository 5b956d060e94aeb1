import highdicom
import numpy as np
import pydicom
import pytest
from results_synthetic import KINDS, SHAPE, STRUCTURES, errors_of, labels, no_files, synthetic, write_radiograph

from medvit.data.labels import LabelMap
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import OutputError
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.structured_report import ReportWriter

SEG = DicomSegWriter("a_bundle", "1.2.3")
WRITER = ReportWriter(SEG)


@pytest.mark.parametrize("kind", KINDS)
def test_every_structure_has_its_volume_and_its_segment(tmp_path, kind):
    label_map = synthetic(tmp_path / "in", "oblique", kind=kind)
    seg = pydicom.dcmread(SEG.write(label_map, tmp_path / "out"))
    path = WRITER.write(label_map, tmp_path / "out")
    assert path == tmp_path / "out_report.dcm"
    report = highdicom.sr.srread(path)
    groups = report.content.get_volumetric_roi_measurement_groups()
    assert [group.tracking_identifier for group in groups] == ["anterior", "posterior", "absent"]
    for number, (group, structure) in enumerate(zip(groups, STRUCTURES, strict=True), 1):
        (measurement,) = group.get_measurements(name=pydicom.sr.codedict.codes.SCT.Volume)
        voxels = (label_map.array == structure.label).sum()
        assert measurement.value == pytest.approx(voxels * 0.75 * 1.25 * 2.5, abs=1e-3)
        assert measurement.unit.value == "mm3"
        assert group.finding_type.value == "5366008"
        named = group.reference_type, group.referenced_segment[0]
        assert named[0].meaning == "Referenced Segment"
        assert named[1].referenced_sop_instance_uid == seg.SOPInstanceUID
        assert named[1].referenced_segment_numbers == [number]
    assert errors_of(path) == []


def test_what_the_report_says_about_itself(tmp_path):
    label_map = synthetic(tmp_path / "in")
    seg = pydicom.dcmread(SEG.write(label_map, tmp_path / "out"))
    report = pydicom.dcmread(WRITER.write(label_map, tmp_path / "out"))
    first = pydicom.dcmread(label_map.source.files[0])
    for keyword in ("StudyInstanceUID", "PatientID", "PatientName"):
        assert report[keyword].value == first[keyword].value
    assert (report.Modality, report.SeriesNumber, report.SeriesDescription) == ("SR", 1303, "Volumes by a_bundle")
    assert (report.CompletionFlag, report.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    (series,) = study.ReferencedSeriesSequence
    assert series.ReferencedSOPSequence[0].ReferencedSOPInstanceUID == seg.SOPInstanceUID


def test_the_segmentation_must_be_there(tmp_path):
    _assert_refused(synthetic(tmp_path / "in"), tmp_path, "refused_seg.dcm: a report refers to .* write it first")


def test_the_segmentation_must_be_of_this_result(tmp_path):
    label_map = synthetic(tmp_path / "in")
    (tmp_path / "refused").mkdir()
    SEG.write(label_map, tmp_path / "refused" / "x")
    array = label_map.array.copy()
    array[0, 0, 0] = 3
    other = LabelMap(array, label_map.space, label_map.source, STRUCTURES)
    with pytest.raises(OutputError, match="needs the DICOM SEG of the same result, but this is another; write both"):
        WRITER.write(other, tmp_path / "refused" / "x")
    assert not (tmp_path / "refused" / "x_report.dcm").exists()


def test_a_radiograph_has_no_volume(tmp_path):
    _assert_refused(write_radiograph(tmp_path / "in"), tmp_path, "a report of volumes needs an image with a place")


def _assert_refused(label_map, folder, message):
    with pytest.raises(OutputError, match=message):
        WRITER.write(label_map, folder / "refused")
    assert no_files(folder)


def test_errors_of_highdicom_do_not_quote_the_patient(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("value 'Doe^Jane' is not allowed")

    monkeypatch.setattr(ReportWriter, "_build", fail)
    label_map = synthetic(tmp_path / "in")
    SEG.write(label_map, tmp_path / "x" / "out")
    with pytest.raises(OutputError, match=r"cannot make a report of this series \(ValueError") as caught:
        WRITER.write(label_map, tmp_path / "x" / "out")
    assert "Doe" not in str(caught.value)


def test_a_report_that_does_not_read_back_is_not_kept(tmp_path, monkeypatch):
    build = ReportWriter._build

    def damaged(*args):
        report = build(*args)
        value = _measured(report)[0]
        value.NumericValue, value.FloatingPointValue = "99", 99.0
        return report

    def _measured(item):
        found = [item.MeasuredValueSequence[0]] if item.get("MeasuredValueSequence") else []
        return found + [value for child in item.get("ContentSequence", ()) for value in _measured(child)]

    monkeypatch.setattr(ReportWriter, "_build", damaged)
    label_map = synthetic(tmp_path / "in")
    SEG.write(label_map, tmp_path / "x" / "out")
    with pytest.raises(OutputError, match=r"the report did not read back as it was meant \(volumes\)"):
        WRITER.write(label_map, tmp_path / "x" / "out")


def test_a_nifti_source_has_no_report(tmp_path):
    label_map = LabelMap(labels(), Space.from_affine(SHAPE, np.eye(4)), Source("nifti", ()), STRUCTURES)
    assert WRITER.write(label_map, tmp_path / "out") is None
