import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import generate_frames

from medvit.data import gdcm_process
from medvit.data.gdcm_process import DecoderProcess
from medvit.data.pixels import decode

BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
COLOURS, TWELVE_BITS = BUNDLED / "SC_rgb_jpeg_gdcm.dcm", BUNDLED / "JPEG-lossy.dcm"


@pytest.fixture
def process():
    process = DecoderProcess()
    yield process
    process.close()


def stream(path=COLOURS):
    return next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))


def colours(process, data=None):
    return process.decode(data or stream(), lossless=True, rows=100, columns=100, samples=3, precision=8)


def test_samples_of_one_and_of_two_bytes(process):
    frame = np.frombuffer(colours(process), np.uint8).reshape(100, 100, 3)
    assert frame[5, 50].tolist() == [255, 0, 0] and frame[95, 50].tolist() == [255, 255, 255]
    options = {"lossless": False, "rows": 1024, "columns": 256, "samples": 1, "precision": 12}
    frame = np.frombuffer(process.decode(stream(TWELVE_BITS), **options), "<u2")
    assert (len(frame), frame.min(), frame.max(), frame.sum()) == (1024 * 256, 0, 264, 3767007)


def test_a_corrupt_stream_is_an_error_and_the_next_one_is_decoded(process):
    for data in (stream()[:500], b"\xff\xd8" + b"U" * 500):
        with pytest.raises(ValueError, match="GDCM: the stream is corrupt or of an unknown kind"):
            colours(process, data)
    first = process._process.pid
    assert len(colours(process)) == 30000 and process._process.pid == first


@pytest.mark.parametrize(
    "script",
    ["import os; os.abort()", "import sys; sys.stdin.buffer.read(9); raise SystemExit(3)", "print('hello' * 9)"],
)
def test_a_crash_is_an_error_and_the_next_stream_is_decoded(process, monkeypatch, tmp_path, script):
    (tmp_path / "crash.py").write_text(script)
    with monkeypatch.context() as patch:
        patch.setattr(gdcm_process, "__file__", str(tmp_path / "crash.py"))
        with pytest.raises(ValueError, match="GDCM crashed or hung on it"):
            colours(process)
    assert len(colours(process)) == 30000


def test_a_decoder_that_hangs_is_ended(process, monkeypatch, tmp_path):
    (tmp_path / "hang.py").write_text("import time; time.sleep(60)")
    monkeypatch.setattr(gdcm_process, "PATIENCE", 0.2)
    with monkeypatch.context() as patch:
        patch.setattr(gdcm_process, "__file__", str(tmp_path / "hang.py"))
        with pytest.raises(ValueError, match="GDCM crashed or hung on it"):
            colours(process)


def test_a_process_killed_between_frames_is_started_again(process):
    colours(process)
    process._process.kill()
    process._process.wait()
    assert len(colours(process)) == 30000


def test_threads_take_turns(process):
    expected = colours(process)
    with ThreadPoolExecutor(8) as pool:
        assert all(answer == expected for answer in pool.map(lambda _: colours(process), range(40)))


def test_a_script_needs_no_guard_and_leaves_nothing_behind(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"from medvit.data.pixels import decode\nprint(decode({str(COLOURS)!r}).frame(0).sum())\n")
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == ["3831000"] and "ResourceWarning" not in done.stderr


class Frames:
    def __len__(self):
        return 12

    def __getitem__(self, number):
        path = TWELVE_BITS if number % 2 else COLOURS
        return int(decode(path).frame(0).sum())


def test_in_the_workers_of_a_data_loader():
    from torch.utils.data import DataLoader

    expected = [Frames()[n] for n in range(12)]  # the parent has a process of its own by now
    assert expected == [3831000, 3767007] * 6
    assert list(DataLoader(Frames(), batch_size=None, num_workers=2)) == expected
    assert Frames()[1] == 3767007


def test_it_says_whether_it_can_run(monkeypatch):
    assert DecoderProcess.available()
    monkeypatch.setattr(gdcm_process, "find_spec", lambda name: None)
    assert not DecoderProcess.available()
