import os
from pathlib import Path

import pytest

from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix


def test_the_file_appears_whole_with_ordinary_rights_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "folder" / "result.txt"
    with atomic(path) as part:
        part.write_text("whole")
        assert not path.exists()
        assert part.parent == path.parent
    assert path.read_text() == "whole"
    assert [p.name for p in path.parent.iterdir()] == ["result.txt"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_file_and_no_rest(tmp_path, failure):
    path = tmp_path / "result.txt"
    path.write_text("old")
    with pytest.raises(type(failure)), atomic(path, overwrite=True) as part:
        part.write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_overwriting_must_be_asked_for(tmp_path):
    path = tmp_path / "result.txt"
    path.write_text("old")
    entered = False
    with (
        pytest.raises(OutputError, match=r"result\.txt: exists already; choose another output, or allow to"),
        atomic(path),
    ):
        entered = True
    assert not entered
    assert path.read_text() == "old"
    with atomic(path, overwrite=True) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    path = tmp_path / "result.txt"
    with pytest.raises(OutputError, match="exists already"), atomic(path) as part:
        part.write_text("mine")
        path.write_text("theirs")
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_or_a_dangling_link_in_the_way(tmp_path):
    (tmp_path / "result").mkdir()
    with pytest.raises(OutputError, match="result: is a folder"), atomic(tmp_path / "result", overwrite=True):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="link: exists already"), atomic(tmp_path / "link"):
        pass


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "result.txt"
    with (
        pytest.raises(OutputError, match=r"file/result\.txt: cannot be written \(.+\); choose a writable"),
        atomic(path),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"cannot be written \(Permission denied\)"), atomic(tmp_path / "result.txt"):
        pass


def test_a_full_disk_is_named(tmp_path):
    path = tmp_path / "result.txt"
    with pytest.raises(OutputError, match=r"result\.txt: cannot be written \(No space left on device\)"), atomic(path):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_suffix_keeps_the_dots_of_the_stem():
    assert with_suffix(Path("a/1.2.840"), "_seg.dcm") == Path("a/1.2.840_seg.dcm")
