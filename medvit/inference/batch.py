"""Many cases, each in isolation: a failing one is recorded and the next begins."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medvit.data.labels import LabelMap
from medvit.errors import MedvitError, OutputError
from medvit.inference.predictor import Predictor, root_cause
from medvit.writers.base import Writer, with_suffix
from medvit.writers.table import write_volumes

logger = logging.getLogger("medvit")

MANIFEST = "manifest.jsonl"
EXISTING = ("refuse", "overwrite", "resume")


class CasesFailed(MedvitError):
    """Some cases of a run failed; the others are done and every one has its line in the manifest."""

    code = "cases-failed"


class FolderRunner:
    """Runs a predictor over cases and writes each result; safe to interrupt and to resume.

    In ``output_dir`` each case gets ``<case><writer suffix>`` for every writer that applies, all of them or none:
    results are written to a staging folder and moved when the whole case has succeeded. ``manifest.jsonl`` gains one
    line per attempted case (the last line of a case counts), ``volumes.csv`` and ``volumes.json`` hold the volumes of
    all cases that are done. No clock time and no path outside ``output_dir`` is written: equal inputs give equal bytes,
    DICOM objects excepted, whose identifiers are new each time.

    Args:
        cases: ``{"image": path or paths, "case": name}`` each, names unique and relative with ``/``.
        predictor: segments one case.
        writers: output formats.
        output_dir: created if needed.
        existing: what happens to a case with results: ``"refuse"`` fails it, ``"overwrite"`` replaces them when the new
            ones are complete, ``"resume"`` keeps them if they came from the same ``provenance`` and fails it otherwise.
        provenance: facts for every manifest line, such as bundle, version and weights hash.

    Raises:
        ValueError: an unknown ``existing``, or two cases of one name.
    """

    def __init__(
        self,
        cases: Sequence[Mapping[str, Any]],
        predictor: Predictor,
        writers: Sequence[Writer],
        output_dir: str | Path,
        *,
        existing: str = "refuse",
        provenance: Mapping[str, Any] | None = None,
    ):
        if existing not in EXISTING:
            raise ValueError(f"existing must be one of {', '.join(EXISTING)}, got {existing!r}")
        names = [str(case["case"]) for case in cases]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"every case needs its own name, but these occur twice: {', '.join(twice)}")
        self.cases, self.predictor, self.writers = list(cases), predictor, list(writers)
        self.output_dir, self.existing, self.provenance = Path(output_dir), existing, dict(provenance or {})

    def run(self) -> list[dict[str, Any]]:
        """Run all cases, log a line for each, and fail at the end if any failed.

        Returns:
            The manifest records of this run.

        Raises:
            CasesFailed: naming each failed case and why.
            OutputError: ``output_dir`` cannot be written at all.
        """
        records = []
        for record in self.records():
            records.append(record)
            level = logging.ERROR if record["status"] == "failed" else logging.INFO
            reason = f": {record['reason']}" if record["reason"] else ""
            logger.log(level, "case %d of %d, %s: %s%s", len(records), len(self.cases), record["case"], record["status"], reason)
        require_success(records)
        return records

    def records(self) -> Iterator[dict[str, Any]]:
        """Run case by case; yields the manifest record of each as it is finished.

        Raises:
            OutputError: ``output_dir`` cannot be written at all.
        """
        known = self._prepare()
        try:
            for case in self.cases:
                record = self._one(case, known)
                if record["status"] != "skipped":
                    self._append(record)
                    known[record["case"]] = record
                yield record
        finally:
            rows = [
                {"case": name, **row}
                for name in sorted(known)
                if known[name]["status"] == "ok"
                for row in known[name]["volumes"]
            ]
            write_volumes(rows, self.output_dir, overwrite=True)

    def _prepare(self) -> dict[str, dict[str, Any]]:
        """Make the output folder and read the last manifest record of each case."""
        path = self.output_dir / MANIFEST
        known: dict[str, dict[str, Any]] = {}
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with path.open("a+", encoding="utf-8") as file:
                file.seek(0)
                for line in file:
                    # an interrupted write can leave half a line: that case is simply not done
                    try:
                        record = json.loads(line)
                        known[record["case"]] = record
                    except (ValueError, KeyError, TypeError):
                        logger.warning("%s: ignored a damaged line", path)
        except OSError as error:
            raise OutputError(f"{self.output_dir}: cannot write there ({error.strerror}); choose another output folder") from error
        return known

    def _append(self, record: Mapping[str, Any]) -> None:
        path = self.output_dir / MANIFEST
        try:
            with path.open("rb+") as file:
                file.seek(0, os.SEEK_END)
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # close a line that an interrupted run left open
                        file.write(b"\n")
                file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror})") from error

    def _one(self, case: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        name = str(case["case"])
        record: dict[str, Any] = {"case": name, "status": "ok", "code": "", "reason": ""}
        try:
            if self._is_done(name, known.get(name)):
                return {**known[name], "status": "skipped", "reason": "done before with the same weights"}
            label_map = self.predictor(case)
            outputs = self._write(name, label_map)
            record |= {
                "outputs": outputs,
                "files": len(label_map.source.files),
                "kind": label_map.source.kind,
                "modality": label_map.source.modality,
                "series_uid": label_map.source.series_uid,
                "shape": list(label_map.space.shape),
                "spacing_mm": [round(v, 6) for v in label_map.space.spacing],
                "orientation": label_map.space.orientation,
                "volumes": label_map.volumes(),
            }
        except Exception as error:
            record |= _failure(error)
            logger.debug("case %s failed", name, exc_info=True)
        return record | self.provenance

    def _is_done(self, name: str, before: Mapping[str, Any] | None) -> bool:
        """Whether the case can be skipped; refuses one whose results would be lost."""
        stem = self.output_dir / name
        present = [p for w in self.writers if (p := with_suffix(stem, w.suffix)).exists()]
        if not present or self.existing == "overwrite":
            return False
        if self.existing == "refuse":
            raise OutputError(f"{present[0]}: exists already; resume to keep finished cases, overwrite to replace them")
        ours = before is not None and before["status"] == "ok"
        if ours and all((self.output_dir / o).is_file() for o in before["outputs"]):  # type: ignore[index]
            changed = [k for k, v in self.provenance.items() if before.get(k) != v]  # type: ignore[union-attr]
            if not changed:
                return True
            raise OutputError(
                f"{present[0]}: was made with other {', '.join(changed)}; choose another output folder, or overwrite"
            )
        raise OutputError(f"{present[0]}: exists, but the manifest does not say that this case was finished; overwrite it")

    def _write(self, name: str, label_map: LabelMap) -> list[str]:
        """Write every format to a staging folder, then move all to their places; returns names below ``output_dir``."""
        stem = self.output_dir / name
        staging = Path(tempfile.mkdtemp(prefix=".medvit-", dir=self.output_dir))
        try:
            made = [path for w in self.writers if (path := w.write(label_map, staging / stem.name)) is not None]
            stem.parent.mkdir(parents=True, exist_ok=True)
            for path in made:
                path.replace(stem.parent / path.name)
        except OSError as error:
            raise OutputError(f"{stem}: cannot be written ({error.strerror or error})") from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return [(stem.parent / path.name).relative_to(self.output_dir).as_posix() for path in made]


def require_success(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise :class:`CasesFailed` if any record says so."""
    failed = [r for r in records if r["status"] == "failed"]
    if failed:
        reasons = "; ".join(f"{r['case']}: {r['reason']}" for r in failed)
        raise CasesFailed(f"{len(failed)} of {len(records)} cases failed: {reasons}")


def _failure(error: Exception) -> dict[str, str]:
    cause = root_cause(error)
    if isinstance(cause, MedvitError):
        return {"status": "failed", "code": cause.code, "reason": str(cause)}
    if isinstance(cause, torch.OutOfMemoryError | MemoryError):
        return {"status": "failed", "code": "out-of-memory", "reason": "not enough memory; use a smaller batch_size or the CPU"}
    return {"status": "failed", "code": "internal", "reason": f"{type(cause).__name__}: {cause}"}
