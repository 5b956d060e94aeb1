"""JPEG streams that only GDCM decodes, decoded in another process: GDCM can abort the interpreter it runs in.

The file is both ends of a pipe. Imported, it is the client; run as a script, it answers until its input ends. A plain
child process, unlike one of ``multiprocessing``, needs no ``__main__`` guard and may be started by daemons such as the
workers of a ``DataLoader``.
"""

from __future__ import annotations

import atexit
import os
import struct
import subprocess
import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from typing import IO, Any

PATIENCE = 120.0  # seconds for one frame, before its decoding counts as hung

_REQUEST = struct.Struct("<?5I")  # lossless, rows, columns, samples, precision; bytes that follow
_ANSWER = struct.Struct("<?I")  # decoded; bytes that follow


class DecoderProcess:
    """The client: starts the process when it is first needed, and again after a crash. Safe to use from threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)

    @staticmethod
    def available() -> bool:
        """True if python-gdcm is installed; it is not imported here."""
        return find_spec("gdcm") is not None

    def decode(self, stream: bytes, *, lossless: bool, rows: int, columns: int, samples: int, precision: int) -> bytes:
        """Decode one JPEG stream, lossless (SOF3) or extended of 12 bits.

        Args:
            stream: one whole frame.
            lossless: process 14, not the discrete cosine transform.
            rows: of the image, as ``columns`` and ``samples`` per pixel.
            columns: see ``rows``.
            samples: 1 or 3; colours are not converted.
            precision: bits per sample as the stream has them, at most 16.

        Returns:
            Unsigned samples, little endian, of 1 byte each for a precision of up to 8 and else of 2, colour by pixel.

        Raises:
            ValueError: the stream cannot be decoded, or GDCM crashed or hung on it.
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            timer = threading.Timer(PATIENCE, process.kill)
            timer.start()
            try:
                _write(process.stdin, _REQUEST.pack(lossless, rows, columns, samples, precision, len(stream)) + stream)
                decoded, length = _ANSWER.unpack(_read(process.stdout, _ANSWER.size))
                answer = _read(process.stdout, length)
            except (OSError, EOFError):
                self._stop()
                raise ValueError("GDCM crashed or hung on it") from None
            except BaseException:  # interrupted: what is still in the pipe must not answer the next request
                self._stop()
                raise
            finally:
                timer.cancel()
        if not decoded:
            raise ValueError(f"GDCM: {answer.decode(errors='replace')}")
        return answer

    def close(self) -> None:
        """End the process; the next request starts another."""
        with self._lock:
            self._stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._stop()
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-W", "ignore", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
            )
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # reaps it and closes the pipes
            self._process = None

    def _forget(self) -> None:
        """In a forked child: the process answers the parent, so its pipes are left alone and another one is started."""
        self._lock = threading.Lock()
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.returncode = 0  # not ours to wait for
            self._process = None


def _read(file: IO[bytes], length: int) -> bytes:
    """Exactly ``length`` bytes of an unbuffered pipe."""
    parts = []
    while length:
        part = file.read(min(length, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _write(file: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _decode(stream: bytes, lossless: bool, rows: int, columns: int, samples: int, precision: int) -> bytes:
    gdcm: Any = import_module("gdcm")  # only ever in this file's own process
    fragment = gdcm.Fragment()
    fragment.SetByteStringValue(stream)
    fragments = gdcm.SequenceOfFragments.New()
    fragments.AddFragment(fragment)
    element = gdcm.DataElement(gdcm.Tag(0x7FE0, 0x0010))
    element.SetValue(fragments.__ref__())
    image = gdcm.Image()
    image.SetNumberOfDimensions(2)
    image.SetDimensions((columns, rows, 1))
    image.SetDataElement(element)
    photometric, syntax = gdcm.PhotometricInterpretation, gdcm.TransferSyntax
    # told that they are RGB already, GDCM converts no colours
    image.SetPhotometricInterpretation(photometric(photometric.RGB if samples == 3 else photometric.MONOCHROME2))
    image.SetTransferSyntax(syntax(syntax.JPEGLosslessProcess14 if lossless else syntax.JPEGExtendedProcess2_4))
    allocated = 8 if precision <= 8 else 16
    image.SetPixelFormat(gdcm.PixelFormat(samples, allocated, precision, precision - 1, 0))
    decoded: str | None = image.GetBuffer()
    if decoded is None:
        raise ValueError("the stream is corrupt or of an unknown kind")
    return decoded.encode("utf-8", "surrogateescape")


def _serve() -> None:
    requests = sys.stdin.buffer
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what GDCM prints must not mix with the answers
    while header := requests.read(_REQUEST.size):
        lossless, rows, columns, samples, precision, length = _REQUEST.unpack(header)
        try:
            answer, decoded = _decode(requests.read(length), lossless, rows, columns, samples, precision), True
        except Exception as error:  # the client says it in its own words
            answer, decoded = str(error).encode(), False
        _write(answers, _ANSWER.pack(decoded, len(answer)) + answer)


if __name__ == "__main__":
    _serve()
