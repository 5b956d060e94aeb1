"""One picture per case: the label map over the image, a volume in three planes, for a person to judge at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvit.data.labels import LabelMap, Structure
from medvit.data.raster import upright
from medvit.data.space import Space
from medvit.errors import SpaceMismatch
from medvit.writers.base import atomic, with_suffix

_PIXELS = 480  # pixels along the longest edge of the patient box: the same scale in all three panels
_INCHES = 4.2  # the same edge on paper
_DPI = 150
_PHOTOGRAPH = 1050  # pixels along the longest edge of a photograph, in each of its two panels: 7 inches
_LEGEND_ENTRIES = 12
_ENOUGH_VOXELS = 1_000_000  # to find where the structures are


@dataclass(frozen=True)
class _Plane:
    """A view: which RAS axes run right and up in the picture, in which direction, and the letters at its edges."""

    name: str
    normal: int
    right: tuple[int, int]  # axis, sign
    up: tuple[int, int]
    letters: str  # left, right, top, bottom


# The radiological convention: one looks from the feet and from the front, so the patient's right is on the left.
_PLANES = (
    _Plane("axial", 2, (0, -1), (1, 1), "RLAP"),
    _Plane("coronal", 1, (0, -1), (2, 1), "RLSI"),
    _Plane("sagittal", 0, (1, -1), (2, 1), "APSI"),
)


class OverlayWriter:
    """Writes :func:`overlay` pictures; the image is read again from the label map's source files.

    Args:
        suffix: what is put behind the stem.
    """

    def __init__(self, suffix: str = "_overlay.png"):
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path:
        """Write to ``stem`` + suffix and return that path; errors are those of reading and of :func:`overlay`."""
        from medvit.data.reader import read_again

        image = read_again(label_map.source).array
        return overlay(image, label_map, with_suffix(stem, self.suffix), overwrite=overwrite)


def overlay(image: np.ndarray, label_map: LabelMap, path: Path, *, overwrite: bool = False) -> Path:
    """Draw the structures as a PNG without patient data: three planes of a volume, or a photograph with and without.

    Planes are those of the patient, not of the array: an oblique or anisotropic grid is resampled (image linear, labels
    nearest) so that one millimetre is the same everywhere. Radiological convention, with letters. A photograph is shown
    upright, as its EXIF orientation wants it. Equal inputs give equal bytes for one version of matplotlib.

    Args:
        image: ``(i, j, k)`` or, in colours of 0 to 255, ``(i, j, k, 3)`` on the grid of ``label_map``.
        label_map: what to draw; structures without voxels appear in the legend only.
        path: a ``.png`` file; its folders are created.
        overwrite: replace an existing file.

    Raises:
        SpaceMismatch: the image is not of the label map's shape.
        OutputError: see :func:`medvit.writers.base.atomic`.
    """
    if image.shape[:3] != label_map.space.shape:
        raise SpaceMismatch(f"the picture needs an image of shape {label_map.space.shape}, got {image.shape}")
    figure = _photograph(image, label_map) if label_map.space.unit == "px" else _three_planes(image, label_map)
    _legend(figure, label_map)
    with atomic(path, overwrite=overwrite) as part:
        # without this matplotlib writes its version and home page into the file
        figure.savefig(part, format="png", facecolor="black", metadata={"Software": None})
    return path


def _three_planes(image: np.ndarray, label_map: LabelMap) -> Any:
    """Axial, coronal and sagittal planes through the structures."""
    low, high = _bounds(label_map.space)
    center = _center(label_map, low, high)
    window = _window(image)
    figure, panels = _layout(high - low, entries=len(label_map.structures))
    for plane, axes in zip(_PLANES, panels, strict=True):
        points = _points(plane, center, low, high)
        picture, labels = _sample(points, image, label_map, window)
        _draw(axes, picture, labels, label_map.structures)
        _annotate(axes, plane, float(center[plane.normal]))
    return figure


def _photograph(image: np.ndarray, label_map: LabelMap) -> Any:
    """The photograph as it is and, beside it, under its structures: without contours, which would hide thin ones."""
    low, high = (0.0, 255.0) if image.max() <= 255 else _window(image)
    gray = np.clip((upright(image, label_map.space)[:, :, 0] - low) / (high - low), 0, 1)
    plain = np.broadcast_to(gray[..., None] if gray.ndim == 2 else gray, (*gray.shape[:2], 3)).swapaxes(0, 1)
    labels = upright(label_map.array, label_map.space)[:, :, 0].T
    painted = plain.copy()
    for structure in label_map.structures:
        mask = labels == structure.label
        painted[mask] = 0.3 * painted[mask] + 0.7 * np.array(_rgb(structure.color))
    size = np.array(labels.shape[::-1]) * (_PHOTOGRAPH / max(labels.shape))
    figure, panels = _panels([size / _DPI] * 2, entries=len(label_map.structures))
    for axes, picture, title in zip(panels, (plain, painted), ("photograph", "structures"), strict=True):
        axes.imshow(_reduced(picture, size), interpolation="nearest", aspect="auto")
        axes.set_title(title, color="white", size=9)
        axes.set_axis_off()
    return figure


def _reduced(picture: np.ndarray, size: np.ndarray) -> np.ndarray:
    """A picture ``(rows, columns, 3)``, 0..1, as 8 bits and of at most ``size`` (columns, rows) pixels, antialiased."""
    from PIL import Image

    whole = Image.fromarray(np.rint(255 * picture).astype(np.uint8))
    if whole.width <= size[0]:
        return np.asarray(whole)
    columns, rows = (max(1, round(n)) for n in size)
    return np.asarray(whole.resize((columns, rows), Image.Resampling.LANCZOS))


def _layout(size: np.ndarray, entries: int) -> tuple[Any, list[Any]]:
    """A figure with one empty panel per plane, all at one scale, for a patient box of ``size`` (x, y, z) mm."""
    return _panels([np.array((size[p.right[0]], size[p.up[0]])) * _INCHES / size.max() for p in _PLANES], entries)


def _panels(panels: list[np.ndarray], entries: int) -> tuple[Any, list[Any]]:
    """A black figure with empty panels of these (width, height) in inches, side by side above a legend."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    gap, title, legend = (
        0.25,
        0.4,
        0.35 + 0.25 * math.ceil(min(entries, _LEGEND_ENTRIES + 1) / 3),
    )  # inches
    wide, tall = sum(w for w, _ in panels) + 4 * gap, max(h for _, h in panels)
    width, height = max(wide, 7.0), title + tall + legend
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="black")
    FigureCanvasAgg(figure)
    axes, left = [], (width - wide) / 2 + gap
    for w, h in panels:
        axes.append(figure.add_axes((left / width, (legend + (tall - h) / 2) / height, w / width, h / height)))
        left += w + gap
    return figure, axes


def _bounds(space: Space) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper RAS corner (mm) of the box around all voxels, edges included."""
    ends = np.array([(-0.5, n - 0.5) for n in space.shape])
    corners = space.world(np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3))
    return corners.min(0), corners.max(0)


def _center(label_map: LabelMap, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The RAS point (mm) whose three planes show most of every structure; the middle of the image if there is none."""
    found = np.flatnonzero(label_map.array)
    if not len(found):
        return np.asarray((low + high) / 2)
    found = found[:: 1 + len(found) // _ENOUGH_VOXELS]
    labels = label_map.array.ravel()[found]
    points = label_map.space.world(np.stack(np.unravel_index(found, label_map.array.shape), -1))
    width = max(label_map.space.spacing)  # thinner bins would be empty between the slices
    center = np.empty(3)
    for axis in range(3):
        bins = ((points[:, axis] - low[axis]) / width).astype(int)
        shown = np.zeros(bins.max() + 1)
        for label in np.unique(labels):
            counts = np.bincount(bins[labels == label], minlength=len(shown))
            shown += np.sqrt(counts / counts.max())  # the root favours a plane through two structures over one's middle
        best = int(shown.argmax())
        center[axis] = np.median(points[bins == best, axis])
    return center


def _window(image: np.ndarray) -> tuple[float, float]:
    sample = image.ravel()[:: 1 + image.size // _ENOUGH_VOXELS]
    low, high = np.percentile(sample, (1, 99.5))
    return float(low), float(high) if high > low else float(low) + 1.0


def _points(plane: _Plane, center: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """RAS points (mm) of a plane's pixels as ``(rows from the top, columns from the left, 3)``."""
    step = (high - low).max() / _PIXELS
    lines = []
    for axis, sign in (plane.right, plane.up):
        count = max(1, round((high[axis] - low[axis]) / step))
        line = low[axis] + (np.arange(count) + 0.5) * (high[axis] - low[axis]) / count
        lines.append(line[::sign])
    columns, rows = lines[0], lines[1][::-1]
    points = np.empty((len(rows), len(columns), 3))
    points[:] = center
    points[..., plane.right[0]] = columns[None, :]
    points[..., plane.up[0]] = rows[:, None]
    return points


def _sample(
    points: np.ndarray, image: np.ndarray, label_map: LabelMap, window: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Gray values 0..1 and labels at ``points``, both 0 outside the image; ``(rows, columns)`` each."""
    from scipy.ndimage import map_coordinates

    voxels = np.moveaxis(label_map.space.voxels_of(points), -1, 0)
    size = np.array(label_map.space.shape).reshape(3, 1, 1)
    nearest = np.floor(voxels + 0.5).astype(int)
    inside = ((nearest >= 0) & (nearest < size)).all(0)
    labels = np.where(inside, label_map.array[tuple(np.clip(nearest, 0, size - 1))], 0)
    gray = map_coordinates(np.asarray(image, np.float32), voxels, order=1, mode="nearest")
    return np.where(inside, np.clip((gray - window[0]) / (window[1] - window[0]), 0, 1), 0), labels


def _draw(axes: Any, gray: np.ndarray, labels: np.ndarray, structures: tuple[Structure, ...]) -> None:
    rows, columns = labels.shape
    picture = np.repeat(gray[..., None], 3, axis=-1)
    masks = [(s.color, labels == s.label) for s in structures]
    for color, mask in masks:
        picture[mask] = 0.65 * picture[mask] + 0.35 * np.array(_rgb(color))
    axes.imshow(picture, interpolation="nearest", aspect="auto")
    for color, mask in masks:
        if mask.any():
            framed = np.pad(mask, 1).astype(np.uint8)  # closes contours at the edge of the image
            grid = np.arange(-1, columns + 1), np.arange(-1, rows + 1)
            axes.contour(*grid, framed, levels=[0.5], colors=[_rgb(color)], linewidths=1.2)
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_axis_off()


def _annotate(axes: Any, plane: _Plane, position: float) -> None:
    axes.set_title(f"{plane.name} · {'xyz'[plane.normal]} = {position:.1f} mm", color="white", size=9)
    places = [(0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center")]
    places += [(0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom")]
    for letter, (x, y, ha, va) in zip(plane.letters, places, strict=True):
        axes.text(x, y, letter, color="yellow", size=10, ha=ha, va=va, transform=axes.transAxes)


def _legend(figure: Any, label_map: LabelMap) -> None:
    from matplotlib.patches import Patch

    rows = sorted(zip(label_map.structures, label_map.volumes(), strict=True), key=lambda pair: -pair[1]["voxels"])
    kept = sorted(rows[:_LEGEND_ENTRIES], key=lambda pair: pair[0].label)
    handles = [Patch(color=_rgb(s.color), label=f"{s.name}  {_size(row)}") for s, row in kept]
    if len(rows) > len(kept):
        handles.append(Patch(color="black", label=f"and {len(rows) - len(kept)} smaller"))
    legend = figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_color("white")


def _size(row: dict[str, Any]) -> str:
    """The size of a structure, from its row of :meth:`LabelMap.volumes`."""
    if row["volume_mm3"] is None:
        return f"{row['area_px']:,} px ({row['fraction']:.2%})"
    return f"{row['volume_mm3']:,.0f} mm³"


def _rgb(color: tuple[int, int, int]) -> tuple[float, float, float]:
    return color[0] / 255, color[1] / 255, color[2] / 255
