"""Which of many images at the same places belong to one volume; knows no files.

Echoes, time points, cardiac phases, diffusion weightings, magnitude and phase often share one series. Volumes are told
apart by the first labels that do so cleanly, else by the order of acquisition where that is unambiguous, else not.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from medvit.data.frames import KINDS, REPETITIONS, Frame, Label
from medvit.data.slices import SAME_POSITION_MM, Plane

_BESIDE_MM = 1.0  # stacks that lie further apart sideways do not lie at one place
_UPRIGHT_MM = 0.1  # by which slices of an upright stack may differ sideways


@dataclass(frozen=True)
class Part:
    """Images that make one volume.

    Args:
        members: their numbers, in the order they came in.
        parameters: what tells this volume from the others of its series, by names of
            :data:`medvit.data.frames.LABELS`, or ``time_point`` from 0.
        missing: slices that others of its series have and it has not.
    """

    members: tuple[int, ...]
    parameters: dict[str, Label] = field(default_factory=dict)
    missing: int = 0


def places(planes: Sequence[Plane]) -> list[int]:
    """Number of each plane's height along the common normal, from 0 upwards; equal where two lie at one place."""
    across, down = (np.mean([getattr(plane, name) for plane in planes], axis=0) for name in ("across", "down"))
    normal = np.cross(across, down)
    heights = np.array([plane.position for plane in planes]) @ (normal / np.linalg.norm(normal))
    return _numbered(heights, SAME_POSITION_MM)


def _numbered(values: np.ndarray, gap: float) -> list[int]:
    """Number of the cluster of each value, from 0 upwards; clusters are more than ``gap`` apart."""
    order = np.argsort(values, kind="stable")
    numbers = np.empty(len(values), dtype=int)
    numbers[order] = np.cumsum(np.diff(values[order], prepend=values[order[0]]) > gap)
    return [int(number) for number in numbers]


def separate(frames: Sequence[Frame], where: Sequence[int]) -> list[Part]:
    """Volumes of ``frames`` whose places are ``where``, in the order of their first image.

    A part in which places still repeat could not be told apart.
    """
    parts = _side_by_side(frames, where)
    for name in (*KINDS, *REPETITIONS):
        parts = [finer for part in parts for finer in _by_label(part, name, frames, where)]
    parts = [finer for part in parts for finer in _by_order(part, frames, where)]
    return sorted(parts, key=lambda part: min(_rank(frames[n], n) for n in part.members))


def shorter(parts: Sequence[Part], where: Sequence[int]) -> list[int]:
    """How many slices each part lacks at its ends that another one has."""
    covered = [frozenset(where[n] for n in part.members) for part in parts]
    distinct = set(covered)

    def lacking(own: frozenset[int]) -> int:
        more = [other - own for other in distinct if own < other]
        beyond = (rest for rest in more if not any(min(own) < place < max(own) for place in rest))
        return max(map(len, beyond), default=0)

    lost = {own: lacking(own) for own in distinct}
    return [lost[own] for own in covered]


def by_kind(frames: Sequence[Frame]) -> list[list[Part]]:
    """Ways to split images at different places that make no volume together: by one label each.

    Of three images or more, since two are always an even stack.
    """
    ways = []
    for name in (*KINDS, "acquisition"):
        groups = _grouped(range(len(frames)), lambda n, name=name: frames[n].label(name))  # type: ignore[misc]
        if len(groups) > 1 and min(map(len, groups.values())) > 2:
            ways.append([Part(tuple(members), _known(name, value)) for value, members in groups.items()])
    return ways


def _side_by_side(frames: Sequence[Frame], where: Sequence[int]) -> list[Part]:
    """Stacks at the same heights but beside each other, as of a body scanned in two stations."""
    origin, across, down = (np.array(getattr(frames[0].plane, name)) for name in ("position", "across", "down"))
    beside = np.array([frame.plane.position if frame.plane else origin for frame in frames]) - origin
    beside = np.column_stack([beside @ across, beside @ down])
    stations: dict[tuple[int, int], list[int]] = defaultdict(list)
    for n, place in enumerate(zip(*(_numbered(column, _BESIDE_MM) for column in beside.T), strict=True)):
        stations[place].append(n)
    # sheared slices move sideways from height to height, and are no stations
    upright = all(np.ptp(beside[members], axis=0).max() <= _UPRIGHT_MM for members in stations.values())
    if len(stations) > 1 and upright and all(len({where[n] for n in members}) > 1 for members in stations.values()):
        return [Part(tuple(members), {"station": float(n)}) for n, members in enumerate(stations.values())]
    return [Part(tuple(range(len(frames))))]


def _rank(frame: Frame, number: int) -> tuple[float, int]:
    instance = frame.label("instance")
    return (float(instance) if isinstance(instance, float) else 0.0), number


def _by_label(part: Part, name: str, frames: Sequence[Frame], where: Sequence[int]) -> list[Part]:
    """The parts that differ in one label; the part itself where that does not tell volumes apart cleanly."""
    most = max(Counter(where[n] for n in part.members).values())
    if most == 1:
        return [part]
    groups = _grouped(part.members, lambda n: frames[n].label(name))
    if len(groups) == 1:
        return [part]
    counts = {value: Counter(where[n] for n in members) for value, members in groups.items()}
    if max(max(count.values()) for count in counts.values()) == most and name in KINDS:
        return [part]
    even = {value for value, count in counts.items() if len(set(count.values())) == 1}
    all_places = {where[n] for n in part.members}
    if name in KINDS:
        missing = dict.fromkeys(groups, 0)
        clean = len(even) == len(groups)
    else:
        missing = {value: len(all_places) - len(count) for value, count in counts.items()}
        whole = [value for value in even if not missing[value]]
        clean = 2 * len(whole) >= len(groups) and (len(whole) == len(groups) or len(whole) > 1)
    if not clean:
        return [part]
    return [
        Part(tuple(members), part.parameters | _known(name, value), part.missing + missing[value])
        for value, members in groups.items()
    ]


def _by_order(part: Part, frames: Sequence[Frame], where: Sequence[int]) -> list[Part]:
    """Volumes one after the other, by times or numbers; the part itself where these are ambiguous."""
    if max(Counter(where[n] for n in part.members).values()) == 1:
        return [part]
    stacks = list(_grouped(part.members, lambda n: where[n]).values())
    for key, is_time, longest in _CLOCKS:
        values = {n: value for n in part.members if isinstance(value := key(frames[n]), float)}
        if len(values) < len(part.members) or max(values.values()) - min(values.values()) > longest:
            continue
        ranked = [sorted(stack, key=values.__getitem__) for stack in stacks]
        distinct = all(len({values[n] for n in stack}) == len(stack) for stack in ranked)
        begins = frames[min(values, key=values.__getitem__)].label("instance") in (0, 1)
        volumes = _in_turn(ranked, values, is_time, begins) if distinct else None
        if volumes:
            return [
                replace(
                    part,
                    members=tuple(sorted(volume)),
                    parameters=part.parameters | {"time_point": float(number)},
                    missing=part.missing + len(stacks) - len(volume),
                )
                for number, volume in enumerate(volumes)
            ]
    return [part]


_LONGEST_S = 12 * 3600.0  # times of a series that lie further apart are of two days, without their dates

# What orders images at one place, whether it is the time of their acquisition, and how far apart its values may lie:
# numbers may have been given, and images reconstructed, in any order.
_CLOCKS: tuple[tuple[Callable[[Frame], Label | None], bool, float], ...] = (
    (lambda frame: frame.label("trigger_time_ms"), True, np.inf),
    (lambda frame: frame.time, True, _LONGEST_S),
    (lambda frame: frame.label("instance"), False, np.inf),
    (lambda frame: frame.written, False, _LONGEST_S),
)


def _in_turn(ranked: list[list[int]], values: dict[int, float], is_time: bool, begins: bool) -> list[list[int]] | None:
    """The n-th image of each place as the n-th volume, None where that is a guess.

    ``begins``: the first image of all is the first of its series, so that none is missing before it.
    """
    most = max(map(len, ranked))
    volumes = [[stack[n] for stack in ranked if n < len(stack)] for n in range(most)]
    by_volume = _one_after_the_other(volumes, values)
    if all(len(volume) == len(ranked) for volume in volumes):
        # numbers are trusted where they run through one volume after the other, or one place after the other
        return volumes if is_time or by_volume or _one_after_the_other(ranked, values) else None
    # the last of several was interrupted; two sets of which one is short may be a slice that was sent again
    cut = most > 2 and all(len(volume) == len(ranked) for volume in volumes[:-1])
    return volumes if cut and by_volume and begins and _in_one_order(ranked, values) else None


def _in_one_order(ranked: list[list[int]], values: dict[int, float]) -> bool:
    """Whether places follow each other alike in every volume, and the last one ends early.

    Else an image is missing before: at its place, all that follow seem to be of the volume before theirs.
    """
    order = sorted(ranked, key=lambda stack: values[stack[0]])
    for number in range(len(max(ranked, key=len))):
        turn = [values[stack[number]] if number < len(stack) else np.inf for stack in order]
        if any(later < earlier for earlier, later in pairwise(turn)):
            return False
    return True


def _one_after_the_other(groups: list[list[int]], values: dict[int, float]) -> bool:
    spans = sorted((min(values[n] for n in group), max(values[n] for n in group)) for group in groups)
    return all(end < start for (_, end), (start, _) in pairwise(spans))


def _grouped(members: Iterable[int], key: Callable[[int], Label | None]) -> dict[Label | None, list[int]]:
    groups: dict[Label | None, list[int]] = defaultdict(list)
    for n in members:
        groups[key(n)].append(n)
    return groups


def _known(name: str, value: Label | None) -> dict[str, Label]:
    return {} if value is None else {name: value}
