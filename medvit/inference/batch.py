"""Many cases, each in isolation: a failing one is recorded and the next begins."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import torch

from medvit.data.labels import LabelMap
from medvit.data.space import Space
from medvit.errors import MedvitError, OutputError, UnreadableFile
from medvit.inference.predictor import root_cause
from medvit.writers.base import with_suffix
from medvit.writers.table import write_volumes

logger = logging.getLogger("medvit")

MANIFEST = "manifest.jsonl"
EXISTING = ("refuse", "overwrite", "resume")


class CasesFailed(MedvitError):
    """Some cases of a run failed; the others are done and every one has its line in the manifest."""

    code = "cases-failed"


class ResultWriter(Protocol):
    """A :class:`~medvit.writers.base.Writer` of results of any kind."""

    @property
    def suffix(self) -> str:
        """What is put behind a stem to name the file."""
        ...

    def write(self, result: Any, stem: Path, /) -> Path | None:
        """Write ``result`` to ``stem`` + :attr:`suffix`; None where the format does not apply to it."""
        ...


class Report(Protocol):
    """What a run says of its results besides the files of each.

    Attributes:
        key: entry of :meth:`describe` that is never empty; a line of the manifest without it is damaged.
    """

    key: str

    def describe(self, result: Any) -> dict[str, Any]:
        """What the manifest says of one result, for JSON."""
        ...

    def tabulate(self, done: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write tables into ``folder``: ``done`` holds the manifest's line of every case that is done, by name."""
        ...


class VolumeReport:
    """Of label maps: ``volumes.csv`` and ``volumes.json``, see :func:`medvit.writers.table.write_volumes`."""

    key = "volumes"

    def describe(self, result: LabelMap) -> dict[str, Any]:
        """What the image was, and the volume of each structure."""
        return {
            "files": len(result.source.files),
            "kind": result.source.kind,
            "modality": result.source.modality,
            "series_uid": result.source.series_uid,
            "shape": list(result.space.shape),
            "spacing_mm": _spacing(result.space),
            "orientation": result.space.orientation or None,
            "notes": list(result.notes),
            "volumes": result.volumes(),
        }

    def tabulate(self, done: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """A row per case and structure; tables of an earlier run are replaced."""
        rows = [{"case": name, **row} for name in sorted(done) for row in done[name]["volumes"]]
        write_volumes(rows, folder, overwrite=True)


class FolderRunner:
    """Runs a predictor over cases and writes each result; safe to interrupt and to resume.

    In ``output_dir`` each case gets ``<case><writer suffix>`` for every writer that applies, all of them or none:
    results are written to a staging folder and moved, one after the other, when the whole case has succeeded.
    ``manifest.jsonl`` gains one line per attempted case; the last line with status ``ok`` describes the files that are
    there, since a failed attempt leaves earlier results alone. Tables of all cases that are done come at the end, see
    ``report``. No clock time is written, and no path outside ``output_dir`` but in the reasons of failures. Equal
    inputs give equal bytes, but for identifiers of DICOM objects, which are new each time, and the order of metadata in
    safetensors files.

    Args:
        cases: ``{"image": path or paths, "case": name}`` each, names unique and relative with ``/``.
        predictor: one case to a result: a label map for the default ``report``.
        writers: output formats of these results.
        output_dir: created if needed.
        existing: what happens to a case with results: ``"refuse"`` fails it, ``"overwrite"`` replaces them when new
            ones are complete (those of formats not asked for now are removed), ``"resume"`` keeps them if they came
            from the same image and ``provenance`` and fails it otherwise.
        provenance: facts for every manifest line, such as bundle, version and weights hash; for JSON.
        report: what the manifest and the tables say of results; by default the volumes of label maps.

    Raises:
        ValueError: an unknown ``existing``, two cases of one name, or a name that leads out of ``output_dir``.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        predictor: Callable[[Mapping[str, Any]], Any],
        writers: Sequence[ResultWriter],
        output_dir: str | Path,
        *,
        existing: str = "refuse",
        provenance: Mapping[str, Any] | None = None,
        report: Report | None = None,
    ):
        if existing not in EXISTING:
            raise ValueError(f"existing must be one of {', '.join(EXISTING)}, got {existing!r}")
        names = Counter(str(case["case"]) for case in cases)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise ValueError(f"every case needs its own name, but these occur twice: {', '.join(twice)}")
        if astray := [name for name in names if not _is_below(name)]:
            raise ValueError(
                f"a case's name must be a path below the output folder, got {', '.join(map(repr, astray))}"
            )
        self.cases, self.predictor, self.writers = list(cases), predictor, list(writers)
        self.output_dir, self.existing = Path(output_dir), existing
        self.report: Report = report or VolumeReport()
        self.provenance: dict[str, Any] = json.loads(json.dumps(provenance or {}))  # as the manifest gives it back

    def run(self) -> list[dict[str, Any]]:
        """Run all cases, log a line for each, and fail at the end if any failed.

        Returns:
            The manifest records of this run.

        Raises:
            CasesFailed: naming failed cases and why.
            OutputError: ``output_dir`` cannot be written at all.
        """
        records = []
        for record in self.records():
            records.append(record)
            level = logging.ERROR if record["status"] == "failed" else logging.INFO
            outcome = record["status"] + (f": {record['reason']}" if record["reason"] else "")
            logger.log(level, "case %d of %d, %s: %s", len(records), len(self.cases), record["case"], outcome)
        require_success(records)
        return records

    def records(self) -> Iterator[dict[str, Any]]:
        """Run case by case; yields the record of each as it is finished.

        A record has ``case``, ``status`` (``ok``, ``failed`` or ``skipped``), ``code`` and ``reason`` (None when ok),
        the provenance and, unless failed, ``outputs`` (names below ``output_dir``) and what the report says, such
        as ``volumes``. Those that are not skipped are lines of the manifest.

        Raises:
            OutputError: ``output_dir`` cannot be written at all.
        """
        known = self._prepare()
        try:
            for case in self.cases:
                record = self._one(case, known.get(str(case["case"])))
                if record["status"] != "skipped":
                    _append(self.output_dir / MANIFEST, record)
                if record["status"] == "ok":
                    known[record["case"]] = record
                yield record
        finally:
            done = {name: record for name, record in known.items() if self._is_complete(record)}
            self.report.tabulate(done, self.output_dir)

    def _prepare(self) -> dict[str, dict[str, Any]]:
        """Make the output folder, see that it can be written, and read the last record of each case that succeeded."""
        path = self.output_dir / MANIFEST
        _append(path)
        known = {}
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        record = json.loads(line)
                        if record["status"] == "ok" and record["outputs"] and record[self.report.key]:
                            known[record["case"]] = record
                    except (ValueError, KeyError, TypeError):  # an interrupted write can leave half a line
                        logger.warning("%s: line %d is damaged and was ignored", path, number)
        except OSError as error:
            raise OutputError(f"{path}: cannot be read ({error.strerror}); choose another output folder") from error
        return known

    def _is_complete(self, record: Mapping[str, Any]) -> bool:
        return all((self.output_dir / output).is_file() for output in record["outputs"])

    def _one(self, case: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
        """Run one case; ``before`` is the record of its last success in this output folder."""
        name = str(case["case"])
        record: dict[str, Any] = {"case": name, "status": "ok", "code": None, "reason": None}
        try:
            identity = _identity(case) | self.provenance
            record |= identity
            if self._is_done(name, before, identity):
                return {**(before or {}), "status": "skipped", "reason": "done before, in the same way"}
            result = self.predictor(case)
            outputs = self._write(name, result)
            if not outputs:
                logger.warning("%s: none of the formats asked for applies to it, so nothing was written", name)
            # of formats not asked for now; where nothing new came, what is there stays
            for stale in set(before["outputs"] if before and outputs else ()) - set(outputs):
                (self.output_dir / stale).unlink(missing_ok=True)
            record |= {"outputs": outputs, **self.report.describe(result)}
        except Exception as error:
            record |= _failure(error) | self.provenance
            logger.debug("case %s failed", name, exc_info=True)
        return record

    def _is_done(self, name: str, before: Mapping[str, Any] | None, identity: Mapping[str, Any]) -> bool:
        """Whether the case can be skipped; refuses one whose results would be lost or mistaken for those of another."""
        stem = self.output_dir / name
        paths = {with_suffix(stem, w.suffix) for w in self.writers}
        paths |= {self.output_dir / output for output in (before["outputs"] if before else ())}
        present = sorted(path for path in paths if os.path.lexists(path))
        if not present or self.existing == "overwrite":
            return False
        if self.existing == "refuse":
            raise OutputError(f"{present[0]}: exists already; resume to keep finished cases, overwrite to replace them")
        if before is None:
            raise OutputError(
                f"{present[0]}: exists, but by the manifest this case was never finished; remove or overwrite it"
            )
        if changed := [key for key, value in identity.items() if before.get(key) != value]:
            raise OutputError(
                f"{present[0]}: was made with other {', '.join(changed)}; choose another output folder, or overwrite"
            )
        return self._is_complete(before)  # a missing file is made again, together with the others

    def _write(self, name: str, result: Any) -> list[str]:
        """Write every format to a staging folder, then move all to their places; returns names below ``output_dir``."""
        stem = self.output_dir / name
        staging = ""
        try:
            with tempfile.TemporaryDirectory(
                prefix=".medvit-", dir=self.output_dir, ignore_cleanup_errors=True
            ) as staging:
                staged = Path(staging) / stem.name
                made = [path for w in self.writers if (path := w.write(result, staged)) is not None]
                stem.parent.mkdir(parents=True, exist_ok=True)
                targets = [stem.parent / path.name for path in made]
                if folders := [target for target in targets if target.is_dir()]:
                    raise OutputError(f"{folders[0]}: is a folder; remove it, or choose another output folder")
                for path, target in zip(made, targets, strict=True):
                    path.replace(target)
        except OSError as error:
            raise OutputError(f"{stem}: cannot be written ({error.strerror or error}); make room or access") from error
        except OutputError as error:  # a person looks for the file under its final name
            raise OutputError(str(error).replace(staging, str(stem.parent))) from error
        return [target.relative_to(self.output_dir).as_posix() for target in targets]


def _spacing(space: Space) -> list[float] | None:
    """In mm; None for a photograph, whose physical size is unknown."""
    return [round(v, 6) for v in space.spacing] if space.unit == "mm" else None


def _identity(case: Mapping[str, Any]) -> dict[str, str]:
    """Which image a case is: a name for people, a hash of all its bytes for machines."""
    image = case["image"]
    files = [Path(image)] if isinstance(image, str | Path) else [Path(file) for file in image]
    name = files[0].name if len(files) == 1 else files[0].parent.name
    if files[0].suffix == ".hdr" and (voxels := files[0].with_suffix(".img")).is_file():
        files.append(voxels)
    hashes = []
    for path in files:
        try:
            with path.open("rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise UnreadableFile(path, f"cannot be opened: {error.strerror}") from error
    return {"input": name, "input_sha256": hashlib.sha256("".join(sorted(hashes)).encode()).hexdigest()}


def record_failed_run(output_dir: str | Path, error: MedvitError) -> None:
    """Add a line without a case to the manifest: a run that could not begin, because of its weights for instance.

    Raises:
        OutputError: the manifest cannot be written.
    """
    _append(Path(output_dir) / MANIFEST, {"case": None, **_failure(error)})


def require_success(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`CasesFailed` if any record says so."""
    failed = [r for r in records if r["status"] == "failed"]
    if failed:
        reasons = "; ".join(f"{r['case']}: {r['reason']}" for r in failed[:10])
        more = f"; and {len(failed) - 10} more, see {MANIFEST}" if len(failed) > 10 else ""
        raise CasesFailed(f"{len(failed)} of {len(records)} cases failed: {reasons}{more}")


def _append(path: Path, record: Mapping[str, Any] | None = None) -> None:
    """Add a line to a manifest, which is created if need be; without a record only see that this is possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+") as file:
            if file.tell():  # close a line that an interrupted run left open
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            if record is not None:
                # a file name may hold bytes that are no UTF-8; as \udcXX they are JSON again
                file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({reason}); choose a writable folder with free space") from error


def _failure(error: Exception) -> dict[str, str]:
    cause = root_cause(error)
    if isinstance(cause, MedvitError):
        code, reason = cause.code, str(cause)
    elif isinstance(cause, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(cause):
        code, reason = "out-of-memory", "not enough memory; use a smaller batch_size or the CPU"
    else:
        # not quoting an error that is not ours: it may hold what a header says, which may be the patient's name
        code, reason = (
            "internal",
            f"{type(cause).__name__} in the pipeline; the debug log (--verbose) has the traceback",
        )
    return {"status": "failed", "code": code, "reason": reason}


def _is_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.name) and not path.is_absolute() and ".." not in path.parts
