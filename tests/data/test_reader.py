import logging
from dataclasses import replace

import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import as_volume, colours, write_picture
from PIL import Image, ImageOps

from medvit.data.reader import VolumeReader, read_again, read_volume
from medvit.errors import MedvitError, NothingFound, UnreadableFile, UnreadableSeries

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")


@pytest.fixture
def folder(tmp_path):
    write_dicom_series(tmp_path / "mr", phantom(), make_affine("oblique"))
    write_nifti(tmp_path / "twin.nii.gz", phantom(), make_affine("oblique"))
    return tmp_path


def load(image):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    pipeline = Compose([LoadImaged("image", reader=VolumeReader()), EnsureChannelFirstd("image")])
    return pipeline({"image": image})["image"]


def test_array_and_meta_of_a_dicom_series(folder):
    files = sorted((folder / "mr").iterdir())
    reader = VolumeReader()
    array, meta = reader.get_data(reader.read([str(file) for file in files]))
    np.testing.assert_array_equal(array, phantom())
    np.testing.assert_allclose(meta["affine"], make_affine("oblique"), atol=2e-6)
    np.testing.assert_array_equal(meta["original_affine"], meta["affine"])
    assert meta["spatial_shape"].tolist() == [7, 6, 5]
    assert (meta["space"], meta["original_channel_dim"], meta["filename_or_obj"]) == (
        "RAS",
        "no_channel",
        str(files[0]),
    )
    assert (meta["medvit_kind"], meta["modality"], meta["medvit_notes"]) == ("dicom", "MR", "")
    assert meta["frame_of_reference"] == read_volume(files).space.frame_of_reference
    assert all(isinstance(meta[name], str) for name in ("study_uid", "series_uid", "frame_of_reference"))


def test_a_nifti_file_has_no_frame_of_reference(folder):
    reader = VolumeReader()
    array, meta = reader.get_data(reader.read(folder / "twin.nii.gz"))
    np.testing.assert_array_equal(array, phantom())
    assert "frame_of_reference" not in meta
    assert (meta["medvit_kind"], meta["modality"], meta["study_uid"]) == ("nifti", "", "")


def test_through_load_imaged(folder):
    files = [str(file) for file in sorted((folder / "mr").iterdir())]
    for image in (files, str(folder / "twin.nii.gz"), folder / "twin.nii.gz", str(folder / "mr")):
        tensor = load(image)
        assert tensor.shape == (1, 7, 6, 5)
        np.testing.assert_array_equal(tensor[0], phantom())
        np.testing.assert_allclose(tensor.affine, make_affine("oblique"), atol=1e-5)
        assert tensor.meta["original_channel_dim"] == "no_channel"


def test_orientation_is_right_for_monai(folder):
    from monai.transforms import Orientation

    from medvit.data.space import Space

    tensor = load(str(folder / "twin.nii.gz"))
    upright = Orientation("RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))(tensor)
    assert Space.from_affine(upright.shape[1:], upright.affine.numpy()).orientation == "RAS"
    np.testing.assert_array_equal(upright[0], phantom()[::-1, ::-1, :])


def test_a_refused_series_does_not_fall_through_to_monais_readers(folder):
    files = sorted((folder / "mr").iterdir())
    lost = next(file for file in read_volume(files).source.files[2:3])
    lost.unlink()
    with pytest.raises(RuntimeError) as caught:
        load([str(file) for file in files if file != lost])
    causes = []
    error = caught.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert [error.code for error in causes if isinstance(error, MedvitError)] == ["missing-slice"]


def test_read_never_raises():
    assert VolumeReader().read(["/no/such/file"]) and VolumeReader().verify_suffix("anything")
    with pytest.raises(NothingFound, match="/no/such/file: no such file or folder"):
        VolumeReader().get_data(VolumeReader().read("/no/such/file"))


def test_one_dicom_file(folder):
    volume = read_volume(next((folder / "mr").iterdir()))
    assert volume.array.shape == (7, 6, 1) and "single slice" in volume.notes[0]


def test_dicom_named_like_nifti(folder):
    files = sorted((folder / "mr").iterdir())
    renamed = [file.rename(file.with_suffix(".nii")) for file in files]
    np.testing.assert_array_equal(read_volume(renamed).array, phantom())


def test_a_folder_must_hold_one_usable_series(folder, tmp_path):
    with pytest.raises(UnreadableSeries, match=r"holds 2: mr/3_T1_test, twin; give one of them") as caught:
        read_volume(folder)
    assert caught.value.code == "several-series"
    write_nifti(folder / "flat.nii", np.zeros((2, 2, 2), np.uint8), make_affine(), srow_x=[0, 0, 0, 0], qform_code=0)
    (folder / "twin.nii.gz").unlink()
    np.testing.assert_array_equal(read_volume(folder).array, phantom())  # the unusable one does not count
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(NothingFound, match="no DICOM series or NIfTI file that makes a 3D volume"):
        read_volume(empty)
    (folder / "flat.nii").rename(empty / "a.nii")
    with pytest.raises(UnreadableSeries, match="the affine is singular"):
        read_volume(empty)
    (empty / "b.nii").write_bytes(b"")
    with pytest.raises(NothingFound, match=r"2 were found, none of them usable: .*the affine is singular"):
        read_volume(empty)


def series_of(folder, count=3):
    """Time points of one DICOM series, and their arrays."""
    uids = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
    arrays = [phantom(seed=n) for n in range(count)]
    for n, array in enumerate(arrays):
        tags = uids | {"TemporalPositionIdentifier": n + 1}
        write_dicom_series(folder, array, make_affine("oblique"), prefix=f"t{n}_", **tags)
    return arrays


@pytest.mark.parametrize("kind", ["dicom", "nifti"])
def test_one_of_several_volumes(tmp_path, kind, caplog):
    arrays = series_of(tmp_path / "in") if kind == "dicom" else [phantom(seed=n) for n in range(3)]
    if kind == "nifti":
        write_nifti(tmp_path / "in/x.nii", np.stack(arrays, -1), make_affine("oblique"))
    files = sorted((tmp_path / "in").iterdir())
    what = "series (temporal_position 1)" if kind == "dicom" else "file"
    note = f"the first of {'' if kind == 'dicom' else 'the '}3 volumes of its {what}"
    for paths in (files, tmp_path / "in"):
        first = read_volume(paths)
        np.testing.assert_array_equal(first.array, arrays[0])
        assert first.notes == (note,)
        for n, array in enumerate(arrays):
            volume = read_volume(paths, volume=n)
            np.testing.assert_array_equal(volume.array, array)
            np.testing.assert_allclose(volume.space.affine, make_affine("oblique"), atol=2e-6)
            assert volume.notes == ()
            again = read_again(volume.source)
            np.testing.assert_array_equal(again.array, array)
            assert again.space == volume.space
        for n in (3, -1):
            with pytest.raises(UnreadableSeries, match=rf"volume {n} is asked for, .* holds 3, counted") as caught:
                read_volume(paths, volume=n)
            assert caught.value.code == "no-such-volume"
    _, meta = VolumeReader(volume=2).get_data(files)
    assert meta["medvit_notes"] == "" and meta["medvit_frames"] == ([0] * 5 if kind == "dicom" else [2])
    with caplog.at_level(logging.WARNING, "medvit"):
        assert VolumeReader().get_data(files)[1]["medvit_notes"] == note
    assert note in caplog.text


def test_a_volume_whose_files_have_changed_is_not_read_again(tmp_path):
    source = read_volume(write_dicom_series(tmp_path, phantom(), make_affine())).source
    with pytest.raises(UnreadableSeries, match="no longer make the volume that they made; read it anew") as caught:
        read_again(replace(source, frames=(1,) * 5))
    assert caught.value.code == "no-such-volume"


def test_several_nifti_files_are_not_stacked(folder):
    with pytest.raises(UnreadableSeries, match="2 files came together"):
        read_volume([folder / "twin.nii.gz"] * 2)


def test_notes_are_logged(tmp_path, caplog):
    array = phantom().astype(np.float32)
    array[0, 0, 0] = np.nan
    path = write_nifti(tmp_path / "x.nii", array, make_affine())
    with caplog.at_level(logging.WARNING, "medvit"):
        _, meta = VolumeReader().get_data([path])
    assert meta["medvit_notes"] == "1 of 210 voxels were NaN or infinite and count as 0"
    assert meta["medvit_notes"] in caplog.text and str(path) in caplog.text


# ---- photographs


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photograph_through_load_imaged(tmp_path, orientation):
    path = write_picture(tmp_path / "a.png", colours(), orientation)
    tensor = load(str(path))
    assert tensor.shape == (3, 70, 45, 1)
    np.testing.assert_array_equal(tensor, np.moveaxis(as_volume(colours()), -1, 0))
    assert (tensor.meta["medvit_kind"], tensor.meta["medvit_unit"]) == ("raster", "px")
    assert tensor.meta["spatial_shape"].tolist() == [70, 45, 1]
    np.testing.assert_array_equal(tensor.affine, read_volume(path).space.affine)
    grey = write_picture(tmp_path / "b.png", colours()[..., 0])
    np.testing.assert_array_equal(load(str(grey)), as_volume(colours()[..., 0])[None])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_monai_turns_a_photograph_upright(tmp_path, orientation):
    from monai.transforms import Orientation

    path = write_picture(tmp_path / "a.png", colours(24, 16), orientation)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    tensor = Orientation("RAS", labels=None)(load(str(path)))
    np.testing.assert_array_equal(tensor, np.moveaxis(as_volume(shown), -1, 0))
    np.testing.assert_array_equal(tensor.affine, np.eye(4))


def test_photographs_in_a_folder_do_not_count(folder):
    (folder / "twin.nii.gz").unlink()
    picture = write_picture(folder / "screenshot.png", colours())
    np.testing.assert_array_equal(read_volume(folder).array, phantom())
    assert read_volume(folder / "screenshot.png").array.shape == (70, 45, 1, 3)
    with pytest.raises(UnreadableSeries, match="one file of its kind makes an image, but 2 files came together"):
        read_volume([picture, *(folder / "mr").iterdir()][:2])


def test_a_file_named_like_a_photograph_is_read_as_one(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(UnreadableFile, match="no readable PNG, JPEG, TIFF, BMP file"):
        read_volume(tmp_path / "a.jpg")


def test_dicom_named_like_a_photograph(folder):
    renamed = [file.rename(file.with_suffix(".jpg")) for file in sorted((folder / "mr").iterdir())]
    np.testing.assert_array_equal(read_volume(renamed).array, phantom())
