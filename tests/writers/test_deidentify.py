import re
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medvit.data.dicom import read_dicom
from medvit.errors import OutputError, UnreadableFile, UnreadableSeries
from medvit.writers.deidentify import Deidentifier, _table

SHARED = Path(__file__).parents[3] / "shared" / "data" / "dicom_scanner"
PUBLIC = "1.2.840.10008."
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)


def item(**elements):
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def one_file(folder, edit=None, modality="CT", **tags):
    """A slice with identifiers wherever they may be."""

    def fill(ds, _):
        ds.OtherPatientIDs, ds.PatientAddress = ["SECRET-OTHER", "SECRET-MORE"], "Secret Lane 5"
        ds.InstitutionName, ds.StationName, ds.DeviceSerialNumber = "Secret Hospital", "SECRETSTATION", "SECRET12345"
        ds.OperatorsName, ds.PerformingPhysicianName = "Smithers^Waylon", "Hibbert^Julius"
        ds.StudyDescription, ds.ImageComments = "for Jane Doe", "Doe was here"
        ds.AcquisitionDateTime, ds.PatientAge, ds.PatientWeight = "20200102101112.5", "050Y", 70
        ds.private_block(0x0029, "SECRET CREATOR", create=True).add_new(1, "LO", "SECRET-PRIVATE")
        ds.ReferencedImageSequence = [item(ReferencedSOPClassUID=ds.SOPClassUID, ReferencedSOPInstanceUID="1.2.3.4.5")]
        ds.RequestAttributesSequence = [item(RequestedProcedureID="SECRET-REQ")]
        deep = item(PatientName="Doe^Jane", ReferencedFrameOfReferenceUID=ds.FrameOfReferenceUID, CodeMeaning="Thorax")
        deep.private_block(0x0029, "SECRET CREATOR", create=True).add_new(1, "LO", "SECRET-DEEP")
        ds.ViewCodeSequence = [item(CodeValue="1", CodingSchemeDesignator="DCM", ViewModifierCodeSequence=[deep])]
        ds.preamble = b"SECRET-PREAMBLE!" * 8
        ds.file_meta.SourceApplicationEntityTitle = "SECRETAE"
        if edit is not None:
            edit(ds)

    return write_dicom_series(folder, phantom((7, 6, 1)), make_affine(), modality=modality, edit=fill, **tags)[0]


def cleaned(tmp_path, source, key=b"k" * 16):
    target = tmp_path / "out" / "1.dcm"
    notes = Deidentifier(key).write(source, target, overwrite=True)
    return pydicom.dcmread(target), notes


# ---- what the profile asks for


def test_the_profile_at_every_level(tmp_path):
    source = one_file(tmp_path / "in")
    old = pydicom.dcmread(source)
    ds, notes = cleaned(tmp_path, source)
    assert notes == ()
    data = (tmp_path / "out" / "1.dcm").read_bytes()
    for secret in (
        b"SECRET",
        b"Secret",
        b"Doe",
        b"Jane",
        b"Smithers",
        b"Hibbert",
        b"2020010",
        b"19700101",
        b"1.2.3.4.5",
    ):
        assert secret not in data, secret
    for gone in ("StudyDescription", "PatientAge", "PatientWeight", "OtherPatientIDs", "RequestAttributesSequence"):
        assert gone not in ds
    assert (ds.AccessionNumber, ds.StudyDate, ds.PatientBirthDate, ds.PatientSex) == ("", "", "", "")
    assert (ds.ContentDate, ds.InstitutionName, ds.DeviceSerialNumber) == ("19000101", "ANONYMIZED", "ANONYMIZED")
    assert (ds.Manufacturer, ds.KVP, ds.PixelSpacing) == ("medvit", 120, old.PixelSpacing)
    assert ds.PixelData == old.PixelData and ds.file_meta.TransferSyntaxUID == old.file_meta.TransferSyntaxUID
    deep = ds.ViewCodeSequence[0].ViewModifierCodeSequence[0]
    assert (deep.CodeMeaning, deep.PatientName) == ("Thorax", "")
    assert ds.preamble == bytes(128) and "SourceApplicationEntityTitle" not in ds.file_meta


def test_what_was_done_is_declared(tmp_path):
    ds, _ = cleaned(tmp_path, one_file(tmp_path / "in"))
    assert (ds.PatientIdentityRemoved, ds.LongitudinalTemporalInformationModified) == ("YES", "REMOVED")
    assert "PS3.15 Basic Application Level Confidentiality Profile" in ds.DeidentificationMethod
    (code,) = ds.DeidentificationMethodCodeSequence
    assert (code.CodeValue, code.CodingSchemeDesignator) == ("113100", "DCM")
    assert re.fullmatch("ANON[0-9A-F]{12}", ds.PatientID) and ds.PatientName == ds.PatientID


def test_uids_and_patients_stay_equal_within_a_run_and_differ_between_runs(tmp_path):
    files = write_dicom_series(tmp_path / "in", phantom((7, 6, 3)), make_affine())
    other = one_file(tmp_path / "other", PatientID="ANOTHER")

    def run(key):
        worker, result = Deidentifier(key), []
        for n, file in enumerate([*files, other]):
            worker.write(file, tmp_path / "out" / f"{n}.dcm", overwrite=True)
            result.append(pydicom.dcmread(tmp_path / "out" / f"{n}.dcm"))
        return result

    first = run(b"a" * 16)
    keywords = ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID")
    for keyword in keywords:
        values = [str(ds[keyword].value) for ds in first]
        assert len(set(values[:3])) == 1 and values[3] != values[0]
    assert len({ds.SOPInstanceUID for ds in first}) == 4
    for ds in first:
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        assert ds.SOPInstanceUID.is_valid and ds.SOPInstanceUID.startswith("2.25.")
        assert ds.SOPClassUID.startswith(PUBLIC)
    deep = first[3].ViewCodeSequence[0].ViewModifierCodeSequence[0]
    assert deep.ReferencedFrameOfReferenceUID == first[3].FrameOfReferenceUID
    assert [ds.SOPInstanceUID for ds in run(b"a" * 16)] == [ds.SOPInstanceUID for ds in first]
    for again in (run(b"b" * 16), run(None)):
        assert not {ds.SOPInstanceUID for ds in again} & {ds.SOPInstanceUID for ds in first}
        assert again[0].PatientID != first[0].PatientID
    with pytest.raises(ValueError, match="16 bytes or more, got 5"):
        Deidentifier(b"short")


def test_the_volume_is_the_same(tmp_path):
    array, affine = phantom(), make_affine("oblique")
    files = write_dicom_series(tmp_path / "in", array, affine)
    records = list(Deidentifier().write_all(files, tmp_path / "out"))
    volume = read_dicom([record.target for record in records])
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.space.affine, affine, atol=1e-5)


def test_references_of_a_structure_set_still_match(tmp_path):
    source = Path(get_testdata_file("rtstruct.dcm"))
    old = pydicom.dcmread(source, force=True)
    frame = old.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    image = one_file(
        tmp_path / "in",
        FrameOfReferenceUID=frame.FrameOfReferenceUID,
        SeriesInstanceUID=series.SeriesInstanceUID,
    )
    worker = Deidentifier()
    worker.write(source, tmp_path / "rs.dcm")
    worker.write(image, tmp_path / "im.dcm")
    ds, ct = pydicom.dcmread(tmp_path / "rs.dcm"), pydicom.dcmread(tmp_path / "im.dcm")
    frame = ds.ReferencedFrameOfReferenceSequence[0]
    series = frame.RTReferencedStudySequence[0].RTReferencedSeriesSequence[0]
    assert frame.FrameOfReferenceUID == ct.FrameOfReferenceUID
    assert series.SeriesInstanceUID == ct.SeriesInstanceUID
    names = [roi.ROIName for roi in ds.StructureSetROISequence]
    assert names == [f"ROI {roi.ROINumber}" for roi in old.StructureSetROISequence]
    assert ds.ROIContourSequence[0].ContourSequence[0].ContourData == (
        old.ROIContourSequence[0].ContourSequence[0].ContourData
    )


def test_the_table_is_the_whole_table():
    tags, masked = _table()
    assert len(tags) > 640 and len(masked) == 3
    for keyword, action in (("PatientName", "empty"), ("SeriesDescription", "remove"), ("PatientID", "dummy")):
        assert tags[pydicom.datadict.tag_for_keyword(keyword)] == action


# ---- residue


def test_names_in_what_the_profile_keeps_are_found(tmp_path):
    def edit(ds):
        ds.ManufacturerModelName = "scanner of jane doe"
        ds.BodyPartExamined = "SECRETSTATION"
        ds.SoftwareVersions = ["v1", "SECRET-ACC"]
        ds.ScanOptions = "JANEWAY"
        ds.ViewCodeSequence[0].CodeMeaning = "1.2.3.4.5"

    ds, notes = cleaned(tmp_path, one_file(tmp_path / "in", edit))
    assert [note.split()[0] for note in notes] == [
        "BodyPartExamined", "CodeMeaning", "ManufacturerModelName", "SoftwareVersions",
    ]  # fmt: skip
    assert all(note.endswith("repeated what identifies a person and was replaced") for note in notes)
    assert ds.ManufacturerModelName == ds.BodyPartExamined == ds.SoftwareVersions == "ANONYMIZED"
    assert ds.ScanOptions == "JANEWAY"  # another word


def test_what_the_standard_does_not_know_and_overlays_go(tmp_path):
    def edit(ds):
        ds.add_new(0x00081FFE, "LO", "SECRET-UNKNOWN")
        ds.add_new(0x60000010, "US", 8)
        ds.add_new(0x60003000, "OW", b"SECRET-OVERLAY!!")
        ds.add_new(0x50000010, "US", 8)

    ds, _ = cleaned(tmp_path, one_file(tmp_path / "in", edit))
    assert not [tag for tag in ds.keys() if tag.group in (0x5000, 0x6000) or tag == 0x00081FFE]  # noqa: SIM118


def test_values_of_the_wrong_kind_are_left_out(tmp_path):
    source = one_file(tmp_path / "in", SliceThickness=2.5)
    data = source.read_bytes()
    assert data.count(b"\x18\x00\x50\x00DS\x04\x002.5 ") == 1
    source.write_bytes(data.replace(b"\x18\x00\x50\x00DS\x04\x002.5 ", b"\x18\x00\x50\x00DS\x04\x00Doe "))
    ds, notes = cleaned(tmp_path, source)
    assert notes == ("SliceThickness held no value of its kind and was left out",)
    assert "SliceThickness" not in ds


def identifying(ds):
    """Values that must not be in a result, collected with other code than the library's."""
    keywords = (
        "PatientID AccessionNumber PatientBirthDate InstitutionName InstitutionAddress StationName PatientAddress"
    )
    keywords += " DeviceSerialNumber OtherPatientIDs StudyDescription SeriesDescription PerformedProcedureStepID"
    for element in ds.iterall():
        values = element.value if isinstance(element.value, MultiValue) else [element.value]
        for value in values:
            text = str(value).strip()
            is_uid = element.VR == "UI" and not text.startswith(PUBLIC) and "ClassUID" not in element.keyword
            if (is_uid or element.VR == "PN" or element.keyword in keywords.split()) and len(text) > 5:
                yield text


BUNDLED = (
    *("CT_small.dcm", "MR_small.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm", "image_dfl.dcm", "rtdose.dcm"),
    *("liver_1frame.dcm", "JPEG2000.dcm", "priv_SQ.dcm", "nested_priv_SQ.dcm", "UN_sequence.dcm", "ExplVR_BigEnd.dcm"),
    *("rtstruct.dcm", "meta_missing_tsyntax.dcm"),
)


def scanner_files():
    yield from (Path(get_testdata_file(name)) for name in BUNDLED)
    if SHARED.is_dir():
        yield from (
            sorted(folder.glob("*.dcm"))[0] for folder in sorted(SHARED.iterdir()) if list(folder.glob("*.dcm"))
        )


@pytest.mark.filterwarnings("ignore")  # pydicom's, on reading the files as the test does
@pytest.mark.parametrize("source", list(scanner_files()), ids=lambda path: f"{path.parent.name}-{path.name[:24]}")
def test_no_identifying_value_of_a_real_file_is_left(tmp_path, source):
    old = pydicom.dcmread(source, force=True)
    if old.get("SOPClassUID") is None:
        with pytest.raises(UnreadableSeries, match="an object of no class"):
            cleaned(tmp_path, source)
        return
    try:
        ds, _ = cleaned(tmp_path, source)
    except UnreadableSeries as error:
        assert error.code == "burned-in" and not list(tmp_path.rglob("*.dcm"))
        return
    assert not [element for element in ds.iterall() if element.tag.is_private]
    pixels = {tag: ds[tag].value for tag in PIXELS if tag in ds}
    assert pixels == {tag: old[tag].value for tag in PIXELS if tag in old}
    for tag in pixels:
        del ds[tag]
    if ds.file_meta.TransferSyntaxUID.is_deflated:
        ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.save_as(tmp_path / "text.dcm")
    data = (tmp_path / "text.dcm").read_bytes().lower()
    for value in set(identifying(old)):
        assert not re.search(re.escape(value.lower().encode()) + rb"(?![\d.])", data), value


# ---- what is set aside, and layout


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda ds: setattr(ds, "BurnedInAnnotation", "YES"), "text is burned into its pixels"),
        (lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"), "a capture of a screen"),
        (lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.6.1"), "an ultrasound image"),
        (lambda ds: setattr(ds, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.77.1.4"), "a photograph"),
        (lambda ds: setattr(ds, "Modality", "US"), "an ultrasound image"),
        (lambda ds: setattr(ds, "ImageType", ["DERIVED", "SECONDARY", "SCREEN SAVE"]), "a capture of a screen"),
        (lambda ds: setattr(ds, "ImageType", ["DERIVED", "SECONDARY", "OTHER", "CT_SOM5 PROT"]), "a capture"),
        (lambda ds: setattr(ds, "ConversionType", "WSD"), "a capture of a screen"),
    ],
)
def test_pixels_that_may_show_names_are_refused(tmp_path, edit, message):
    with pytest.raises(UnreadableSeries, match=message) as caught:
        cleaned(tmp_path, one_file(tmp_path / "in", edit))
    assert caught.value.code == "burned-in" and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["reportsi.dcm", "waveform_ecg.dcm", "rtplan.dcm", "DICOMDIR"])
def test_objects_of_words_are_refused(tmp_path, name):
    with pytest.raises(UnreadableSeries, match="what it says in words may name the patient") as caught:
        cleaned(tmp_path, Path(get_testdata_file(name)))
    assert caught.value.code == "not-an-image"


def test_files_are_numbered_and_none_stops_the_others(tmp_path):
    first = write_dicom_series(tmp_path / "a", phantom((7, 6, 2)), make_affine())
    second = write_dicom_series(tmp_path / "b", phantom((7, 6, 2)), make_affine(), BurnedInAnnotation="YES")
    third = one_file(tmp_path / "c", StudyInstanceUID=pydicom.dcmread(first[0]).StudyInstanceUID)
    (tmp_path / "Doe.dcm").write_bytes(b"junk")
    (tmp_path / "cut.dcm").write_bytes(first[0].read_bytes()[:700])
    sources = [first[0], second[0], tmp_path / "Doe.dcm", third, first[1], tmp_path / "no.dcm"]
    records = list(Deidentifier().write_all(sources, tmp_path / "out"))
    out = tmp_path / "out"
    assert [record.target for record in records] == [
        out / "1/1/1.dcm", None, None, out / "1/2/1.dcm", out / "1/1/2.dcm", None,
    ]  # fmt: skip
    assert [record.code for record in records] == [None, "burned-in", "unreadable", None, None, "unreadable"]
    assert "not a DICOM file" in records[2].reason and "No such file" in records[5].reason
    written = sorted(file.relative_to(out).as_posix() for file in out.rglob("*") if file.is_file())
    assert written == ["1/1/1.dcm", "1/1/2.dcm", "1/2/1.dcm"]
    (record,) = Deidentifier().write_all([first[0]], out)
    assert record.code == "output" and "exists already" in record.reason
    with pytest.raises(OutputError):
        Deidentifier().write(first[0], out / "1/1/1.dcm")


@pytest.mark.filterwarnings("ignore")  # pydicom's, on reading the files as the test does
@pytest.mark.parametrize(
    ("found", "damaged"),
    [
        (b"\x28\x00\x02\x01US\x02\x00", b"\x28\x00\x02\x01US\x02\x02"),  # numbers that go on over private elements
        (b"\x08\x00\x70\x00LO\x06\x00", b"\x08\x00\x70\x00LO\x06\x01"),  # a text that goes on over the patient
        (b"\x10\x00\x20\x00LO", b"\x54\x00\x20\x00LO"),  # an ID as a vector of numbers
        (b"\x10\x00\x20\x00LO", b"\x10\x7f\x20\x00LO"),  # as an element of a retired group
    ],
)
def test_a_damaged_length_or_tag_carries_nothing_along(tmp_path, found, damaged):
    source = one_file(tmp_path / "in", Manufacturer="medvit")
    data = source.read_bytes()
    assert found in data
    source.write_bytes(data.replace(found, damaged, 1))
    try:
        cleaned(tmp_path, source)
    except (UnreadableFile, UnreadableSeries):
        assert not (tmp_path / "out" / "1.dcm").exists()
    else:
        out = (tmp_path / "out" / "1.dcm").read_bytes()
        assert b"SECRET" not in out and b"Doe" not in out


@pytest.mark.filterwarnings("ignore")  # pydicom's, on reading the files as the test does
def test_damaged_headers_leak_nothing(tmp_path):
    source = one_file(tmp_path / "in")
    whole, outcomes = source.read_bytes(), set()
    random = np.random.default_rng(0)
    begin = whole.index(b"DICM") + 4
    for _ in range(500):
        data = bytearray(whole)
        for position in random.integers(begin, whole.index(b"\xe0\x7f\x10\x00"), 3):
            data[position] = random.integers(0, 256)
        source.write_bytes(data)
        try:
            cleaned(tmp_path, source)
        except (UnreadableFile, UnreadableSeries) as error:
            outcomes.add(error.code)
            assert "SECRET" not in str(error) and "Doe" not in str(error)
        else:
            outcomes.add("written")
            assert b"SECRET-" not in (tmp_path / "out" / "1.dcm").read_bytes()
    assert {"written", "unreadable"} <= outcomes
