import io
import os
import shutil
import stat
import tarfile
import zipfile
from pathlib import Path

import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from pydicom.data import get_testdata_file

from medvit.data import archives
from medvit.data.archives import is_archive, missing_of_dicomdir, stem, unpacked
from medvit.errors import UnreadableFile, UnreadableSeries

FILES = {"p1/a.dcm": b"one" * 1000, "p1/b/c.dcm": os.urandom(5000), "ü.nii": b"three"}


def pack(path, files=FILES):
    """An archive of ``{name: bytes}``, by the extension of its name."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def contents(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refusal(path):
    with pytest.raises((UnreadableSeries, UnreadableFile)) as caught, unpacked(path):
        pytest.fail("it was unpacked")
    assert str(caught.value).startswith(str(path))
    return caught.value.code, str(caught.value)


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where temporary folders go; empty after each test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["study.1.zip", "study.1.tar", "study.1.tar.gz", "study.1.tgz"])
def test_members_come_out_below_the_name_of_the_archive(tmp_path, temporary, name):
    path, seen = pack(tmp_path / name), []
    assert is_archive(path, path.read_bytes()[:300])
    with unpacked(path, progress=seen.append) as found:
        assert contents(found.folder) == {f"study.1/{name}": data for name, data in FILES.items()}
        assert found.problems == () and found.folder.is_relative_to(temporary)
        assert found.original(found.folder / "study.1" / "p1" / "a.dcm") == path / "p1" / "a.dcm"
        assert seen == [1, 2, 3]


def test_the_folder_goes_when_the_block_fails(tmp_path):
    with pytest.raises(KeyError), unpacked(pack(tmp_path / "a.zip")):
        raise KeyError


def test_a_series_in_a_zip_is_read(tmp_path):
    write_dicom_series(tmp_path / "in", phantom(), make_affine())
    path = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "in"))
    with unpacked(path) as found:
        assert sorted(pydicom.dcmread(file).InstanceNumber for file in found.folder.rglob("*.dcm")) == [1, 2, 3, 4, 5]


def test_only_archives_of_files_are_archives(tmp_path):
    start = pack(tmp_path / "a.zip").read_bytes()[:300]
    assert [is_archive(Path(name), start) for name in ("a.zip", "A.ZIP", "a.docx", "a.npz", "a")] == [True, True] + [
        False
    ] * 3
    assert not is_archive(Path("a.zip"), b"hello") and not is_archive(Path("a.nii.gz"), b"\x1f\x8b")
    assert [stem(Path(name)) for name in ("a.b.ZIP", "a.tar.gz", "a.tgz", "a", ".zip")] == [
        "a.b",
        "a",
        "a",
        "a",
        ".zip",
    ]


@pytest.mark.parametrize("name", ["../a", "p/../../a", "/etc/a", "C:\\a", "..\\a"])
@pytest.mark.parametrize("archive", ["x.zip", "x.tar.gz"])
def test_members_that_would_leave_the_folder(tmp_path, archive, name):
    code, text = refusal(pack(tmp_path / archive, {"good": b"1", name: b"2"}))
    assert code == "unsafe-archive" and "outside its folder; do not trust it" in text
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["x.zip", "x.tar.gz"])
def test_bombs(tmp_path, monkeypatch, name):
    monkeypatch.setattr(archives, "_HARMLESS", 1 << 16)
    with unpacked(pack(tmp_path / name, {"a": bytes(1 << 16)})):
        pass
    code, text = refusal(pack(tmp_path / name, {"a": bytes(1 << 21)}))
    assert code == "too-large" and "over 200 times as many; if you trust it" in text


def test_sizes_that_a_zip_lies_about_do_not_count(tmp_path):
    path = pack(tmp_path / "x.zip", {"a": bytes(1 << 16), "b": b"fine"})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = (22, archive.start_dir + 24)
    for place in places:
        assert data[place : place + 4] == (1 << 16).to_bytes(4, "little")
        data[place : place + 4] = (1 << 10).to_bytes(4, "little")
    path.write_bytes(data)
    with unpacked(path) as found:
        assert contents(found.folder) == {"x/b": b"fine"}
        (problem,) = found.problems
    assert (
        problem.code == "unreadable"
        and str(problem) == f"{path}/a: damaged, or packed in an unknown way (BadZipFile); get it again"
    )


def test_more_than_the_disk_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_SPARE", shutil.disk_usage(tmp_path).free - 1000)
    code, text = refusal(pack(tmp_path / "x.zip"))
    assert code == "too-large" and "it unpacks to 8005 bytes" in text and "make room" in text


def test_too_many_members(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_MEMBERS", 2)
    code, text = refusal(pack(tmp_path / "x.tar"))
    assert code == "too-large" and "more than 2 members" in text


@pytest.mark.parametrize("encrypted", [("a",), ("a", "b")])
def test_encrypted_members(tmp_path, encrypted):
    path = pack(tmp_path / "x.zip", {"a": b"1", "b": b"2"})
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    for _ in range(2):
        name = chr(data[start + 46])
        data[start + 8] |= name in encrypted
        start += 47
    path.write_bytes(data)
    if len(encrypted) == 2:
        code, text = refusal(path)
        assert code == "encrypted" and "with its password" in text
        return
    with unpacked(path) as found:
        assert contents(found.folder) == {"x/b": b"2"}
        assert [(problem.code, problem.series) for problem in found.problems] == [("encrypted", f"{path}/a")]


def test_archives_inside_and_names_that_come_twice(tmp_path):
    inner = pack(tmp_path / "inner.zip").read_bytes()
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name, data in (("a", b"1"), ("a", b"2"), ("d/inner.zip", inner)):
            archive.writestr(name, data)
    with unpacked(tmp_path / "x.zip") as found:
        assert contents(found.folder) == {"x/a": b"1"}
        assert [problem.code for problem in found.problems] == ["duplicate-member", "nested-archive"]


def test_links_are_no_files(tmp_path):
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    for name in ("x.zip", "x.tar"):
        with unpacked(tmp_path / name) as found:
            assert contents(found.folder) == {} and [problem.code for problem in found.problems] == ["link"]


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_a_cut_archive_is_refused(tmp_path, name):
    path = pack(tmp_path / name)
    data = path.read_bytes()
    whole = 3 * 512 + 3072 + 5120 + 512  # of the tar, without the blocks that end it
    for keep in (0, 10, 512 + 3072, len(data) // 2, min(len(data) - 1, whole)):
        path.write_bytes(data[:keep])
        assert refusal(path)[0] == "unreadable"


def test_a_damaged_member_costs_only_itself(tmp_path):
    path = pack(tmp_path / "x.zip")
    data = bytearray(path.read_bytes())
    data[data.index(FILES["p1/b/c.dcm"][:20]) + 10] ^= 1
    path.write_bytes(data)
    with unpacked(path) as found:
        assert sorted(contents(found.folder)) == ["x/p1/a.dcm", "x/ü.nii"]
        assert [problem.code for problem in found.problems] == ["unreadable"]


def test_a_damaged_header_within_a_tar(tmp_path):
    path = pack(tmp_path / "x.tar")
    data = bytearray(path.read_bytes())
    data[512 + 3072 : 512 + 3072 + 200] = b"x" * 200  # tarfile takes it for the end
    path.write_bytes(data)
    code, text = refusal(path)
    assert code == "unreadable" and "its end is missing" in text


def test_no_archive(tmp_path):
    assert "No such file" in refusal(tmp_path / "no.zip")[1]
    (tmp_path / "a.zip").write_bytes(b"hello")
    assert "a damaged archive, or none" in refusal(tmp_path / "a.zip")[1]


# ---- DICOMDIR


def test_files_that_a_dicomdir_lists(tmp_path):
    source = Path(get_testdata_file("DICOMDIR"))
    listed = missing_of_dicomdir(shutil.copy(source, tmp_path / "DICOMDIR"))
    assert len(listed) == 31 and listed[0] == tmp_path / "77654033" / "CR1" / "6154"
    target = tmp_path / "77654033" / "cr1" / "6154"  # as a file system of CDs may show it
    target.parent.mkdir(parents=True)
    target.touch()
    assert missing_of_dicomdir(tmp_path / "DICOMDIR") == listed[1:]


@pytest.mark.parametrize("content", [None, b"", b"hello", bytes(128) + b"DICM" + b"\4\0\x20\x12SQ\0\0\xff\xff\xff\xff"])
def test_a_damaged_dicomdir_lists_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "DICOMDIR").write_bytes(content)
    assert missing_of_dicomdir(tmp_path / "DICOMDIR") == []
