"""Every error medvit raises on purpose. Each message says what was required, what came and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class MedvitError(Exception):
    """Base of all errors a user can cause and can mend.

    ``code`` is a short stable word for scripts (it lands in manifests and JSON lines); ``str(error)`` is for people.
    """

    code = "error"

    def __reduce__(self) -> tuple[Any, ...]:
        # the arguments of a subclass are not those of Exception, which pickle would call it with
        return _again, (type(self), self.args, vars(self))


def _again(kind: type[MedvitError], arguments: tuple[Any, ...], attributes: dict[str, Any]) -> MedvitError:
    error = kind.__new__(kind, *arguments)
    vars(error).update(attributes)
    return error


class UnreadableFile(MedvitError):
    """A single file cannot be read: truncated, corrupt, of an unknown format, or without permission."""

    code = "unreadable"

    def __init__(self, path: str | Path, reason: str):
        self.path, self.reason = Path(path), reason
        super().__init__(f"{path}: {reason}")


class UnreadableSeries(MedvitError):
    """Readable files that do not make one image volume with a proven geometry.

    Args:
        series: what a person would call it: a file name, or a series description with its folder.
        code: short stable word, e.g. ``missing-slice``, ``gantry-tilt``, ``four-dimensional``, ``no-geometry``.
        reason: one sentence with the values found and what to do.
    """

    def __init__(self, series: str | Path, code: str, reason: str):
        self.series, self.code, self.reason = str(series), code, reason
        super().__init__(f"{series}: {reason}")


class NothingFound(MedvitError):
    """A folder or file list holds no image that could be used."""

    code = "nothing-found"


class SpaceMismatch(MedvitError):
    """Two images that had to lie on one voxel grid do not."""

    code = "space-mismatch"


class UnsuitableImage(MedvitError):
    """An image that is sound, but not what the network was made for."""

    code = "unsuitable"


class WeightsMismatch(MedvitError):
    """Weights that do not belong to the network: other keys, other shapes, another sha256."""

    code = "weights-mismatch"


class BundleError(MedvitError):
    """A bundle folder that is incomplete, contradicts itself, or cannot be found."""

    code = "bundle"


class OutputError(MedvitError):
    """An output that cannot be written, or that exists and may not be replaced."""

    code = "output"
