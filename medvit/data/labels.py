"""What a segmentation says: coded structures and the label map that carries them on a source grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import BundleError

_MAX_LABEL = 65535  # what uint16, and DICOM's segment number, can hold


@dataclass(frozen=True)
class Code:
    """One concept of a coding scheme, e.g. ``Code("5366008", "SCT", "Hippocampus")``."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Structure:
    """One label of a label map, named for people and coded for machines.

    Args:
        label: voxel value, 1 to 65535; 0 is background and is no structure.
        name: unique within a label map, at most 64 characters.
        category: kind of thing, from DICOM CID 7150 (e.g. anatomical structure).
        type: the thing itself, from DICOM CID 7151 (e.g. hippocampus).
        color: recommended display colour, sRGB 0-255.
        modifier: narrows ``type`` down (e.g. anterior, left), or None.
    """

    label: int
    name: str
    category: Code
    type: Code
    color: tuple[int, int, int]
    modifier: Code | None = None

    @classmethod
    def from_metadata(cls, block: Mapping[str, Any]) -> tuple[Structure, ...]:
        """Structures of a bundle's metadata block, in the order of their labels.

        Args:
            block: ``{"1": {"name": ..., "category": CODE, "type": CODE, "modifier": CODE, "color": [r, g, b]}, ...}``
                with ``CODE = {"value": ..., "scheme": ..., "meaning": ...}``; ``modifier`` may be absent.

        Raises:
            BundleError: naming the entry, what it needs and what it holds.
        """
        if not isinstance(block, Mapping) or not block:
            raise BundleError(f"the structures of a bundle must be a non-empty mapping of labels, got {block!r}")
        structures = sorted((_parse_structure(key, entry) for key, entry in block.items()), key=lambda s: s.label)
        for field in ("label", "name"):
            values = [getattr(s, field) for s in structures]
            if len(set(values)) < len(values):
                raise BundleError(f"every structure needs its own {field}, got {values}")
        return tuple(structures)


def _parse_structure(key: str, entry: Any) -> Structure:
    where = f"structure {key!r}"
    if not str(key).isdecimal() or not 1 <= int(key) <= _MAX_LABEL:
        raise BundleError(
            f"{where}: a label must be a whole number from 1 to {_MAX_LABEL} (0 is background; leave it out)"
        )
    required, optional = {"name", "category", "type", "color"}, {"modifier"}
    if not isinstance(entry, Mapping) or not required <= set(entry) <= required | optional:
        found = sorted(entry) if isinstance(entry, Mapping) else repr(entry)
        raise BundleError(f"{where} needs {sorted(required)} and may have {sorted(optional)}, got {found}")
    color = entry["color"]
    if (
        not isinstance(color, Sequence)
        or len(color) != 3
        or not all(isinstance(v, int) and 0 <= v <= 255 for v in color)
    ):
        raise BundleError(f"{where}: color must be three integers from 0 to 255 (sRGB), got {color!r}")
    return Structure(
        label=int(key),
        name=_text(entry["name"], f"{where}: name", 64),
        category=_parse_code(entry["category"], f"{where}: category"),
        type=_parse_code(entry["type"], f"{where}: type"),
        modifier=_parse_code(entry["modifier"], f"{where}: modifier") if "modifier" in entry else None,
        color=(color[0], color[1], color[2]),
    )


def _parse_code(entry: Any, where: str) -> Code:
    keys = ["meaning", "scheme", "value"]
    if not isinstance(entry, Mapping) or sorted(entry) != keys:
        raise BundleError(f"{where} must be a code with exactly the keys {keys}, got {entry!r}")
    return Code(
        value=_text(entry["value"], f"{where}: value", 64),
        scheme=_text(entry["scheme"], f"{where}: scheme", 16),
        meaning=_text(entry["meaning"], f"{where}: meaning", 64),
    )


def _text(value: Any, where: str, longest: int) -> str:
    # the lengths are those of the DICOM attributes the text ends up in; a backslash would split it into several values
    if not isinstance(value, str) or not value.strip() or len(value) > longest or "\\" in value:
        raise BundleError(f"{where} must be text of 1 to {longest} characters without a backslash, got {value!r}")
    return value


@dataclass(frozen=True, eq=False)
class LabelMap:
    """A segmentation on the voxel grid of the image it was made from.

    Args:
        array: ``(i, j, k)`` uint8 or uint16 in the source's axis order (DICOM: column, row, slice); 0 is background.
        space: the grid of ``array``, equal to the source's.
        source: the image that was segmented.
        structures: what each label means; every label that occurs must be among them.
        notes: what a person should know of the image, one sentence each.

    Raises:
        ValueError: a dtype, shape or label that does not fit.
    """

    array: np.ndarray
    space: Space
    source: Source
    structures: tuple[Structure, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.array.dtype not in (np.uint8, np.uint16):
            raise ValueError(f"a label map must be uint8 or uint16, got {self.array.dtype}")
        if self.array.shape != self.space.shape:
            raise ValueError(f"labels of shape {self.array.shape} do not fill a space of shape {self.space.shape}")
        known = {s.label for s in self.structures}
        unknown = sorted(set(np.flatnonzero(self._counts).tolist()) - known - {0})
        if unknown:
            raise ValueError(f"labels {unknown} occur in the array but only {sorted(known)} are described")

    @cached_property
    def _counts(self) -> np.ndarray:
        """Voxels per label, ``(65536 or 256,)`` int64."""
        size = int(np.iinfo(self.array.dtype).max) + 1
        counts = np.zeros(size, dtype=np.int64)
        for slab in self.array:  # bincount widens its input to 64 bits: a slab at a time keeps that small
            counts += np.bincount(slab.ravel(), minlength=size)
        return counts

    def voxels(self, structure: Structure) -> int:
        """Number of voxels of one structure."""
        return int(self._counts[structure.label]) if structure.label < len(self._counts) else 0

    def volumes(self) -> list[dict[str, Any]]:
        """One row per structure, also empty ones: label, structure, voxels and volume_mm3 (to 0.001 mm³).

        A photograph has no physical size: there volume_mm3 is None, and two more entries are area_px, the number of
        pixels, and fraction (to 1e-6), their share of all pixels, those around a round field of view included.
        """
        return [
            {"label": s.label, "structure": s.name, "voxels": self.voxels(s), **self._size(s)} for s in self.structures
        ]

    def _size(self, structure: Structure) -> dict[str, Any]:
        voxels = self.voxels(structure)
        if self.space.unit == "px":
            return {"volume_mm3": None, "area_px": voxels, "fraction": round(voxels / self.array.size, 6)}
        return {"volume_mm3": round(voxels * self.space.voxel_volume, 3)}
