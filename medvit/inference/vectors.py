"""Networks that say something of an image as a whole: class probabilities, or vectors that describe it or its patches.

Each result is a few named vectors. A case gets a small file for each, a run tables of all: ``predictions.csv`` with the
probabilities, ``embeddings.csv`` and ``embeddings.safetensors`` with the vectors.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvit.data.volume import Source
from medvit.errors import OutputError
from medvit.inference.predictor import repeatable
from medvit.inference.region import Region
from medvit.writers.base import atomic, with_suffix

SCORES, EMBEDDING, PATCHES = "scores", "embedding", "patches"
PREDICTIONS, EMBEDDING_TABLE, EMBEDDINGS = "predictions.csv", "embeddings.csv", "embeddings.safetensors"
# Writes cases and their vectors, by name (N, D), to a file, replacing what is there.
SaveEmbeddings = Callable[[Sequence[str], dict[str, Tensor], Path], None]


@dataclass(frozen=True, eq=False)
class Vectors:
    """What a network says of one image.

    Args:
        values: by name, ``(D,)`` float32; of ``"patches"`` one for each patch of a grid, ``(D, *grid)``.
        source: the image.
        shape: of the image as it was read, in voxels.
        notes: what a person should know of the image, one sentence each.
        region: what of the image the grid of patches covers; None: there are none.

    Raises:
        ValueError: a vector of another rank, or with NaN or infinity; patches without a region.
    """

    values: Mapping[str, np.ndarray]
    source: Source
    shape: tuple[int, ...]
    notes: tuple[str, ...] = ()
    region: Region | None = None

    def __post_init__(self) -> None:
        for name, value in self.values.items():
            if (value.ndim != 1 and name != PATCHES) or not np.isfinite(value).all():
                raise ValueError(f"{name} must be one finite vector, got shape {value.shape} of {value.dtype}")
        if PATCHES in self.values and (self.region is None or self.region.grid != self.values[PATCHES].shape[1:]):
            raise ValueError(
                f"patches must come with the region that they cover, got shape {self.values[PATCHES].shape} and "
                f"{self.region}"
            )


class VectorPredictor:
    """One image at a time to vectors.

    Args:
        preprocessing: MONAI dictionary transform from ``{"image": path or paths}`` to a MetaTensor ``(C, *spatial)``
            that was loaded with :class:`medvit.data.RadiographReader` or :class:`medvit.data.VolumeReader`.
        heads: by name, what makes a vector ``(D,)``, or for ``"patches"`` a map ``(D, *grid)``, of a batch of one image
            ``(1, C, *spatial)``.
        device: where they run.
    """

    def __init__(
        self,
        preprocessing: Callable[[Any], Any],
        heads: Mapping[str, Callable[[Tensor], Tensor]],
        device: torch.device | str = "cpu",
    ):
        self.preprocessing, self.heads, self.device = preprocessing, dict(heads), torch.device(device)

    def __call__(self, case: Mapping[str, Any]) -> Vectors:
        """Vectors of one case; see :meth:`medvit.inference.predictor.Predictor.__call__`."""
        image = self.preprocessing(dict(case))["image"]
        meta = image.meta
        with repeatable():
            batch = image.as_tensor()[None].to(self.device)
            values = {name: head(batch).float().cpu().numpy() for name, head in self.heads.items()}
        files = case["image"]
        source = Source(
            kind=str(meta["medvit_kind"]),
            files=(Path(files),) if isinstance(files, str | Path) else tuple(map(Path, files)),
            modality=str(meta["modality"]),
            study_uid=str(meta["study_uid"]),
            series_uid=str(meta["series_uid"]),
            name=str(case["case"]),
        )
        notes = dict.fromkeys((*case.get("notes", ()), *str(meta.get("medvit_notes", "")).splitlines()))
        shape = tuple(int(n) for n in np.asarray(meta["spatial_shape"]))
        region = Region.of(image, values[PATCHES].shape[1:]) if PATCHES in values else None
        return Vectors(values, source, shape, tuple(notes), region)


class ScoresWriter:
    """Probabilities as ``<case>_scores.json``: by class, to 1e-6.

    Args:
        classes: their names, in the order of the vector.
    """

    suffix = "_scores.json"

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)

    def write(self, result: Vectors, stem: Path, /) -> Path:
        """Write to ``stem`` + suffix; raises OutputError, see :func:`medvit.writers.base.atomic`."""
        path = with_suffix(stem, self.suffix)
        with atomic(path) as part:
            text = json.dumps(by_class(self.classes, result), indent=2, ensure_ascii=False) + "\n"
            part.write_text(text, encoding="utf-8")
        return path


class ArrayWriter:
    """One of the vectors as ``<case>_<name>.npy``, float32.

    Args:
        name: of the vector.
    """

    def __init__(self, name: str):
        self.name, self.suffix = name, f"_{name}.npy"

    def write(self, result: Vectors, stem: Path, /) -> Path:
        """Write to ``stem`` + suffix; raises OutputError, see :func:`medvit.writers.base.atomic`."""
        path = with_suffix(stem, self.suffix)
        with atomic(path) as part, part.open("wb") as file:
            np.save(file, result.values[self.name].astype(np.float32))
        return path


class VectorReport:
    """What a run says of vectors: a line per case in the manifest, and tables of all cases.

    Args:
        classes: names of the classes, for the columns of ``predictions.csv``; none: no such table.
        save: writes ``embeddings.safetensors``; None: this run makes no embeddings.
        encoder_sha256: of the weights that make them, lest vectors of others get into the tables.
    """

    key = "vectors"

    def __init__(self, classes: Sequence[str] = (), save: SaveEmbeddings | None = None, encoder_sha256: str = ""):
        self.classes, self.save, self.encoder_sha256 = tuple(classes), save, encoder_sha256

    def describe(self, result: Vectors) -> dict[str, Any]:
        """What the image was, the length of each vector, the probabilities, and what the patches cover."""
        return {
            "kind": result.source.kind,
            "modality": result.source.modality,
            "series_uid": result.source.series_uid,
            "shape": list(result.shape),
            "notes": list(result.notes),
            "vectors": {name: len(value) for name, value in result.values.items()},
            **({"scores": by_class(self.classes, result)} if SCORES in result.values else {}),
            **({"patches": {k: list(v) for k, v in asdict(result.region).items()}} if result.region else {}),
            **({"encoder_sha256": self.encoder_sha256} if EMBEDDING in result.values else {}),
        }

    def tabulate(self, done: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """A row per case, by name; tables of an earlier run are replaced.

        Raises:
            OutputError: a table cannot be written.
        """
        if self.classes:
            scored = [(name, done[name]) for name in sorted(done) if SCORES in done[name]["vectors"]]
            rows = [[name, line["input"], *(line["scores"][c] for c in self.classes)] for name, line in scored]
            _write_table(folder / PREDICTIONS, ["case", "file", *self.classes], rows)
        embedded = [name for name in sorted(done) if EMBEDDING in done[name]["vectors"]]
        alike = [name for name in embedded if done[name]["encoder_sha256"] == self.encoder_sha256]
        if not embedded:
            for table in (EMBEDDING_TABLE, EMBEDDINGS):
                (folder / table).unlink(missing_ok=True)  # of cases that were overwritten without
        elif self.save is not None and alike:
            suffix = ArrayWriter(EMBEDDING).suffix
            vectors = np.stack([_load(with_suffix(folder / name, suffix)) for name in alike])
            with atomic(folder / EMBEDDINGS, overwrite=True) as part:
                self.save(alike, {"embed": torch.from_numpy(vectors)}, part)
            columns = [f"e{n}" for n in range(vectors.shape[1])]
            named = ([name, done[name]["input"]] for name in alike)
            # numpy writes as many digits as tell a float32 from its neighbours
            texts = ([str(value) for value in vector] for vector in vectors)
            lines = ([*name, *text] for name, text in zip(named, texts, strict=True))
            _write_table(folder / EMBEDDING_TABLE, ["case", "file", *columns], lines)


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with (
        atomic(path, overwrite=True) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


def _load(path: Path) -> np.ndarray:
    try:
        vector: np.ndarray = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise OutputError(f"{path}: is damaged; remove it and resume, which makes it again") from error
    return vector


def by_class(classes: Sequence[str], result: Vectors) -> dict[str, float]:
    """The probabilities of a result, to 1e-6, by the names of the classes.

    Raises:
        ValueError: another number of classes.
    """
    scores = result.values[SCORES].tolist()
    return {name: round(score, 6) for name, score in zip(classes, scores, strict=True)}
