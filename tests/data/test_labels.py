import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import BundleError

ANATOMY = {"value": "91723000", "scheme": "SCT", "meaning": "Anatomical Structure"}
HIPPOCAMPUS = {"value": "5366008", "scheme": "SCT", "meaning": "Hippocampus"}
ANTERIOR = {"value": "255549009", "scheme": "SCT", "meaning": "Anterior"}
BLOCK = {
    "10": {"name": "whole", "category": ANATOMY, "type": HIPPOCAMPUS, "color": [0, 128, 255]},
    "2": {"name": "front", "category": ANATOMY, "type": HIPPOCAMPUS, "modifier": ANTERIOR, "color": [230, 159, 0]},
}


def _structure(label, name="s"):
    return Structure(label, name, Code("1", "99T", "a"), Code("2", "99T", "b"), (1, 2, 3))


def _label_map(array, structures, affine=None):
    space = Space.from_affine(array.shape, np.eye(4) if affine is None else affine)
    return LabelMap(array, space, Source("nifti", ()), structures)


def test_metadata_gives_structures_in_numeric_order():
    front, whole = Structure.from_metadata(BLOCK)
    assert (front.label, front.name, front.color) == (2, "front", (230, 159, 0))
    assert front.category == Code("91723000", "SCT", "Anatomical Structure")
    assert front.type == Code("5366008", "SCT", "Hippocampus")
    assert front.modifier == Code("255549009", "SCT", "Anterior")
    assert (whole.label, whole.modifier) == (10, None)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("2", "name"), "", r"structure '2': name must be text of 1 to 64 characters without a backslash, got ''"),
        (("2", "name"), "a\\b", "without a backslash"),
        (("2", "name"), "x" * 65, "1 to 64 characters"),
        (("2", "name"), "whole", r"every structure needs its own name, got \['whole', 'whole'\]"),
        (("2", "colour"), [1, 2, 3], r"structure '2' needs .* got .*'colour'"),
        (("2", "color"), [1, 2], r"color must be three integers from 0 to 255 \(sRGB\), got \[1, 2\]"),
        (("2", "color"), [1, 2, 256], "256"),
        (("2", "color"), "red", "got 'red'"),
        (("2", "type"), "hippocampus", "type must be a code with exactly the keys .*, got 'hippocampus'"),
        (("2", "type", "value"), 5366008, "structure '2': type: value must be text of 1 to 64"),
        (("2", "type", "scheme"), "x" * 17, "scheme must be text of 1 to 16"),
        (("2", "type", "version"), "1", "exactly the keys"),
        (("2",), ["front"], "structure '2' needs"),
        (("0",), BLOCK["2"], r"structure '0': a label must be a whole number from 1 to 65535 \(0 is background"),
        (("65536",), BLOCK["2"], "structure '65536'"),
        (("one",), BLOCK["2"], "structure 'one'"),
        (("02",), {**BLOCK["2"], "name": "other"}, r"every structure needs its own label, got \[2, 2, 10\]"),
    ],
)
def test_a_wrong_entry_is_named(path, value, message):
    block = json.loads(json.dumps(BLOCK))
    *parents, last = path
    entry = block
    for key in parents:
        entry = entry[key]
    entry[last] = value
    with pytest.raises(BundleError, match=message):
        Structure.from_metadata(block)


@pytest.mark.parametrize("field", ["name", "category", "type", "color"])
def test_a_missing_field_is_named(field):
    block = {"1": {key: value for key, value in BLOCK["2"].items() if key != field}}
    with pytest.raises(BundleError, match=r"structure '1' needs \['category', 'color', 'name', 'type'\]"):
        Structure.from_metadata(block)


@pytest.mark.parametrize("block", [{}, None, ["front"]])
def test_metadata_must_be_a_mapping_with_entries(block):
    with pytest.raises(BundleError, match="non-empty mapping"):
        Structure.from_metadata(block)


def test_volumes_count_every_structure_in_mm3():
    array = np.zeros((4, 3, 2), np.uint8)
    array[:2, 0] = 1  # 4 voxels
    array[3, 2, 1] = 7
    affine = np.diag([0.5, 1.0, 3.0, 1.0])
    affine[0, 2] = 1.0  # shear changes no volume
    rows = _label_map(array, (_structure(1, "a"), _structure(5, "b"), _structure(7, "c")), affine).volumes()
    assert rows == [
        {"label": 1, "structure": "a", "voxels": 4, "volume_mm3": 6.0},
        {"label": 5, "structure": "b", "voxels": 0, "volume_mm3": 0.0},
        {"label": 7, "structure": "c", "voxels": 1, "volume_mm3": 1.5},
    ]


def test_a_label_beyond_the_arrays_type_is_empty():
    rows = _label_map(np.ones((2, 2, 2), np.uint8), (_structure(1, "a"), _structure(300, "b"))).volumes()
    assert [row["voxels"] for row in rows] == [8, 0]


@given(hnp.arrays(np.uint16, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=st.integers(0, 6)))
def test_voxels_agree_with_counting(array):
    label_map = _label_map(array, tuple(_structure(n, str(n)) for n in range(1, 7)))
    assert [row["voxels"] for row in label_map.volumes()] == [int((array == n).sum()) for n in range(1, 7)]


def test_label_maps_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="must be uint8 or uint16, got int64"):
        _label_map(np.zeros((2, 2, 2), np.int64), ())
    with pytest.raises(ValueError, match=r"labels \[3\] occur in the array but only \[1\] are described"):
        _label_map(np.full((2, 2, 2), 3, np.uint8), (_structure(1),))
    with pytest.raises(ValueError, match=r"shape \(2, 2, 2\) do not fill a space of shape \(2, 2, 3\)"):
        LabelMap(np.zeros((2, 2, 2), np.uint8), Space.from_affine((2, 2, 3), np.eye(4)), Source("nifti", ()), ())


def test_a_photograph_has_areas_and_no_volumes():
    array = np.zeros((20, 15, 1), np.uint8)
    array[:7, 0] = 2
    space = Space.from_affine(array.shape, np.eye(4), unit="px")
    label_map = LabelMap(array, space, Source("raster", ()), (_structure(2, "vessel"), _structure(3, "none")))
    assert label_map.volumes() == [
        {"label": 2, "structure": "vessel", "voxels": 7, "volume_mm3": None, "area_px": 7, "fraction": 0.023333},
        {"label": 3, "structure": "none", "voxels": 0, "volume_mm3": None, "area_px": 0, "fraction": 0.0},
    ]
