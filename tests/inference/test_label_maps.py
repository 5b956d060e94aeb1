import numpy as np
import pytest
import torch
from data_synthetic import make_affine, write_nifti
from PIL import Image

from medvit.errors import NothingFound, SpaceMismatch, UnreadableFile
from medvit.inference.label_maps import paired, read_pair


def test_names_tell_what_belongs_together(tmp_path):
    for name in ("truth/a.nii.gz", "truth/b_seg.nii", "truth/notes.txt", "found/a_seg.nii.gz", "found/b_seg.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found, truth = tmp_path / "found", tmp_path / "truth"
    assert paired(found, truth) == {
        "a": (found / "a_seg.nii.gz", truth / "a.nii.gz"),
        "b_seg": (found / "b_seg.nii.gz", truth / "b_seg.nii"),
    }
    (truth / "c.nii").touch()
    with pytest.raises(NothingFound, match=r"found: needs a label map of every case of the other folder, lacks c$"):
        paired(found, truth)
    for number in range(7):
        (found / f"d{number}_seg.nii").touch()
    (truth / "c.nii").unlink()
    with pytest.raises(NothingFound, match=r"truth: needs .* lacks d0, d1, d2, d3, d4, \.\.\.$"):
        paired(found, truth)
    with pytest.raises(NothingFound, match=r"holds no label maps; give a folder of \.nii, \.nii\.gz, \.png files"):
        paired(found, tmp_path / "empty")


def test_what_predict_writes_beside_and_below_is_understood(tmp_path):
    names = ("found/a_seg.nii.gz", "found/a_overlay.png", "found/sub/b_seg.nii.gz", "found/sub/b_overlay.png")
    for name in (*names, "truth/a.nii.gz", "truth/sub/b.nii.gz", "plain/a.nii", "plain/sub/b.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    found, truth = tmp_path / "found", tmp_path / "truth"
    assert paired(found, truth) == {
        "a": (found / "a_seg.nii.gz", truth / "a.nii.gz"),
        "sub/b": (found / "sub/b_seg.nii.gz", truth / "sub/b.nii.gz"),
    }
    assert set(paired(tmp_path / "plain", truth)) == {"a", "sub/b"}
    (tmp_path / "plain/a.png").touch()
    with pytest.raises(UnreadableFile, match=r"a\.png: is a second label map of the case a, beside .*a\.nii"):
        paired(tmp_path / "plain", truth)


def test_both_are_read_on_one_grid(tmp_path):
    labels, spacing = np.arange(24).reshape(2, 3, 4) % 3, (0.5, 2.0, 3.0)
    for name in "ab":
        write_nifti(tmp_path / f"{name}.nii", labels.astype(np.uint8), make_affine(spacing=spacing))
    ours, theirs, found = read_pair(tmp_path / "a.nii", tmp_path / "b.nii")
    assert torch.equal(ours, torch.from_numpy(labels)) and torch.equal(ours, theirs)
    assert found == pytest.approx(spacing)
    write_nifti(tmp_path / "far.nii", labels.astype(np.uint8), make_affine(spacing=(0.5, 2.0, 3.5)))
    with pytest.raises(SpaceMismatch, match=r"b\.nii and .*far\.nii"):
        read_pair(tmp_path / "far.nii", tmp_path / "b.nii")
    write_nifti(tmp_path / "half.nii", labels.astype(np.float32) / 2, make_affine(spacing=spacing))
    with pytest.raises(UnreadableFile, match=r"half\.nii: holds no label map: whole numbers from 0"):
        read_pair(tmp_path / "half.nii", tmp_path / "b.nii")


def test_pictures_have_two_axes_and_pixels(tmp_path):
    Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)).save(tmp_path / "a.png")
    ours, theirs, spacing = read_pair(tmp_path / "a.png", tmp_path / "a.png")
    assert ours.tolist() == theirs.tolist() == [[0, 2], [1, 1], [2, 0]] and spacing == (1, 1)
