import itertools

import numpy as np
import pytest
import torch
from bundle_synthetic import blobs, expected_labels
from data_synthetic import ORIENTATIONS, make_affine, write_dicom_series, write_nifti
from monai.inferers import SimpleInferer
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, Orientationd

from medvit.data import VolumeReader
from medvit.data.labels import Code, Structure
from medvit.errors import UnreadableFile
from medvit.inference.predictor import Predictor, root_cause
from medvit.transforms import ArgmaxLabelsd, RestoreLabelsd

CODE = Code("1", "99T", "thing")
STRUCTURES = (Structure(1, "shell", CODE, CODE, (255, 0, 0)), Structure(2, "core", CODE, CODE, (0, 255, 0)))
# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


def levels(image):
    """Logits of :func:`expected_labels`."""
    return torch.cat([torch.zeros_like(image), image - 0.3, 2 * image - 2.0], dim=1)


@pytest.fixture(scope="module")
def predictor():
    load = LoadImaged("image", reader=VolumeReader())
    preprocessing = Compose(
        [load, EnsureChannelFirstd("image"), Orientationd("image", "RAS", labels=None), NormalizeIntensityd("image")]
    )
    return Predictor(preprocessing, levels, SimpleInferer(), Compose([ArgmaxLabelsd(), RestoreLabelsd()]), STRUCTURES)


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "coronal", "oblique", "reversed"])
def test_labels_of_a_nifti_file_lie_on_its_own_grid(predictor, tmp_path, orientation):
    image, affine = blobs((12, 15, 10)), make_affine(orientation)
    path = write_nifti(tmp_path / "a.nii.gz", image, affine)
    result = predictor({"image": str(path), "case": "a"})
    assert np.array_equal(result.array, expected_labels(image))
    assert result.array.dtype == np.uint8
    assert np.abs(result.space.affine - affine).max() < 1e-5
    assert (result.source.kind, result.source.files, result.source.name) == ("nifti", (path,), "a")
    assert result.structures == STRUCTURES
    assert [row["voxels"] for row in result.volumes()] == [(expected_labels(image) == n).sum() for n in (1, 2)]


@pytest.mark.parametrize("orientation", sorted(set(ORIENTATIONS) - {"reversed"}))
def test_labels_of_a_dicom_series_lie_on_its_slices_and_know_them(predictor, tmp_path, orientation):
    image, affine = blobs((12, 15, 10)), make_affine(orientation)
    files = write_dicom_series(tmp_path, image, affine, FrameOfReferenceUID="1.2.3.4")
    result = predictor({"image": [str(file) for file in reversed(files)], "case": "p/series"})
    assert np.array_equal(result.array, expected_labels(image))
    assert np.abs(result.space.affine - affine).max() < 1e-4
    assert result.space.frame_of_reference == "1.2.3.4"
    assert (result.source.kind, result.source.files, result.source.modality) == ("dicom", tuple(files), "MR")
    assert result.source.study_uid and result.source.series_uid
    assert result.source.name == "p/series"


def test_the_network_runs_without_autograd_on_its_device(predictor, tmp_path):
    seen = {}

    def network(image):
        seen.update(inference=torch.is_inference_mode_enabled(), device=image.device, batch=image.shape)
        return levels(image)

    path = write_nifti(tmp_path / "a.nii", blobs((6, 5, 4)), np.eye(4))
    Predictor(predictor.preprocessing, network, SimpleInferer(), predictor.postprocessing, STRUCTURES, "cpu")(
        {"image": str(path), "case": "a"}
    )
    assert seen == {"inference": True, "device": torch.device("cpu"), "batch": (1, 1, 6, 5, 4)}


def test_what_is_wrong_with_a_file_can_be_told_from_monais_wrapping(predictor, tmp_path):
    path = write_nifti(tmp_path / "a.nii", blobs((6, 5, 4)), np.eye(4))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(RuntimeError, match="applying transform") as caught:
        predictor({"image": str(path), "case": "a"})
    cause = root_cause(caught.value)
    assert isinstance(cause, UnreadableFile)
    assert str(cause).startswith(f"{path}: the file is cut short")


def test_root_cause_is_the_outermost_error_of_ours_or_else_the_first_of_all():
    def chained(*errors):
        for cause, effect in itertools.pairwise(errors):
            effect.__cause__ = cause
        return errors[-1]

    first, ours, wrapper = ValueError("first"), UnreadableFile("a", "b"), RuntimeError("wrapper")
    assert root_cause(chained(first, ours, wrapper)) is ours
    assert root_cause(chained(KeyError("x"), RuntimeError("y"))).args == ("x",)
    assert root_cause(first) is first
