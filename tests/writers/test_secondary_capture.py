import io
import zipfile

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom
from results_synthetic import SHAPE, STRUCTURES, errors_of, labels, no_files, synthetic, write_radiograph

from medvit.data.labels import LabelMap
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import OutputError
from medvit.writers import secondary_capture
from medvit.writers.dicom_source import dicom_source
from medvit.writers.secondary_capture import SecondaryCaptureWriter

WRITER = SecondaryCaptureWriter("a_bundle", "1.2.3", opacity=0.5)


def _instances(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == [f"IM{n:05d}.dcm" for n in range(1, len(archive.namelist()) + 1)]
        return [pydicom.dcmread(io.BytesIO(archive.read(name))) for name in archive.namelist()]


def test_every_slice_is_a_picture_of_greys_under_colours(tmp_path):
    label_map = synthetic(tmp_path / "in", "oblique")
    path = WRITER.write(label_map, tmp_path / "out" / "a.b")
    assert path == tmp_path / "out" / "a.b_overlay.zip"
    pictures = np.stack([ds.pixel_array for ds in _instances(path)]).transpose(2, 1, 0, 3)
    image = phantom(SHAPE).astype(float)
    low, high = np.percentile(image, (1, 99.5))
    grey = np.rint(np.clip((image - low) / (high - low), 0, 1) * 255)
    for structure in (None, *STRUCTURES[:2]):
        where = label_map.array == (structure.label if structure else 0)
        found, below = pictures[where].astype(float), grey[where][:, None]
        expected = below if structure is None else (below + structure.color) / 2
        np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=0.51)


def test_what_the_pictures_say_about_themselves(tmp_path):
    label_map = synthetic(tmp_path / "in", "feet-first")
    instances = _instances(WRITER.write(label_map, tmp_path / "out"))
    for ds, file in zip(instances, label_map.source.files, strict=True):
        source = pydicom.dcmread(file)
        assert ds.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
        assert ds.ImageType[:2] == ["DERIVED", "SECONDARY"]
        assert (ds.BurnedInAnnotation, ds.SeriesNumber) == ("NO", 1203)
        assert (ds.SeriesDescription, ds.Rows, ds.Columns) == ("Burnt-in structures by a_bundle", 7, 9)
        assert ds.DerivationDescription == "Image windowed to 8 bits, structures drawn over it"
        assert ds.SourceImageSequence[0].ReferencedSOPInstanceUID == source.SOPInstanceUID
        assert (ds.StudyInstanceUID, ds.PatientID) == (source.StudyInstanceUID, source.PatientID)
        assert ds.PatientOrientation == ["R", "P"]
        assert ds.PixelSpacing == [1.25, 0.75]
        assert "ImagePositionPatient" not in ds
    assert [ds.InstanceNumber for ds in instances] == list(range(1, 7))
    assert len({ds.SeriesInstanceUID for ds in instances}) == 1
    assert len({ds.SOPInstanceUID for ds in instances}) == 6


def test_the_pictures_are_conformant(tmp_path):
    for number, ds in enumerate(_instances(WRITER.write(synthetic(tmp_path / "in", "oblique"), tmp_path / "out"))):
        file = tmp_path / f"{number}.dcm"
        ds.save_as(file)
        assert errors_of(file) == []


@pytest.mark.parametrize("kind", ["enhanced", "mosaic", "radiograph"])
def test_other_sources_and_colours(tmp_path, monkeypatch, kind):
    folder = tmp_path / "in"
    label_map = write_radiograph(folder) if kind == "radiograph" else synthetic(folder, "oblique", kind=kind)
    shape = (*label_map.array.T.shape, 3)
    monkeypatch.setattr(secondary_capture, "_image", lambda *_: np.full(shape, 100.0))
    instances = _instances(WRITER.write(label_map, tmp_path / "out"))
    pictures = np.stack([ds.pixel_array for ds in instances])
    assert (pictures[label_map.array.T == 0] == 100).all()
    np.testing.assert_array_equal(pictures[label_map.array.T == 2], [[93, 140, 166]] * (label_map.array == 2).sum())
    frames = [ds.SourceImageSequence[0].get("ReferencedFrameNumber") for ds in instances]
    assert frames == ([frame + 1 for frame in label_map.source.frames] if kind == "enhanced" else [None] * len(frames))
    instances[0].save_as(tmp_path / "one.dcm")
    assert errors_of(tmp_path / "one.dcm") == []


def test_frames_of_one_of_several_volumes_and_of_a_tilted_series(tmp_path):
    label_map = synthetic(tmp_path / "in", "oblique", kind="enhanced-4d")
    stored = pydicom.dcmread(label_map.source.files[0])
    stored.PixelData = phantom((9, 7, 12)).T.tobytes()
    stored.save_as(label_map.source.files[0])
    source = dicom_source(label_map)
    expected = phantom((9, 7, 12)).T[list(label_map.source.frames)]
    np.testing.assert_array_equal(secondary_capture._image(label_map, source), expected)
    tilted = make_affine("axial")
    tilted[1, 2] = 0.9
    label_map = synthetic(tmp_path / "tilted", affine=tilted)
    np.testing.assert_array_equal(secondary_capture._image(label_map, dicom_source(label_map)), phantom(SHAPE).T)


def test_a_radiograph_of_the_first_kind_is_inverted(tmp_path):
    label_map = write_radiograph(tmp_path / "in")
    ds = pydicom.dcmread(label_map.source.files[0])
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(label_map.source.files[0])
    image = secondary_capture._image(label_map, dicom_source(label_map))
    np.testing.assert_array_equal(image, -phantom((9, 7, 1)).T)


def test_a_mosaic_that_reads_otherwise_is_refused(tmp_path, monkeypatch):
    label_map = synthetic(tmp_path / "in", kind="mosaic")
    other = Volume(np.zeros((9, 7, 5), np.float32), Space.from_affine((9, 7, 5), np.eye(4)), label_map.source)
    monkeypatch.setattr("medvit.data.reader.read_again", lambda _: other)
    with pytest.raises(OutputError, match="9 x 7 x 6 voxels, but has 9 x 7 x 5; predict again"):
        WRITER.write(label_map, tmp_path / "out")
    assert no_files(tmp_path)


def test_errors_of_highdicom_do_not_quote_the_patient(tmp_path, monkeypatch):
    def fail(*_):
        raise ValueError("value 'Doe^Jane' is not allowed")

    monkeypatch.setattr(SecondaryCaptureWriter, "_save", fail)
    with pytest.raises(OutputError, match=r"cannot make secondary captures of this series \(ValueError") as caught:
        WRITER.write(synthetic(tmp_path / "in"), tmp_path / "out")
    assert "Doe" not in str(caught.value)
    assert no_files(tmp_path)


def test_a_nifti_source_has_no_pictures(tmp_path):
    label_map = LabelMap(labels(), Space.from_affine(SHAPE, np.eye(4)), Source("nifti", ()), STRUCTURES)
    assert WRITER.write(label_map, tmp_path / "out") is None
