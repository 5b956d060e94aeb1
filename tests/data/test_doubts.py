from pathlib import Path

import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series

from medvit.data.doubts import TAGS, alike, disagreements, strays
from medvit.data.slices import Plane
from medvit.data.study import discover

SHAPE = (6, 5, 6)
NEXT = "lies exactly where a slice is missing or the next one would be"
TORN = "it lies exactly where a slice of another series in its folder would, and may be one"


def _series(tmp_path, edit=None, **tags):
    write_dicom_series(tmp_path, phantom(SHAPE), make_affine("oblique"), edit=edit, **tags)
    return discover(tmp_path).series


@pytest.mark.parametrize(
    ("modality", "keyword", "value"),
    [
        ("MR", "BitsStored", 12),
        ("MR", "PixelRepresentation", 0),
        ("MR", "Modality", "PT"),
        ("CT", "RescaleSlope", 1.1),
        ("CT", "RescaleIntercept", None),
    ],
)
def test_one_file_that_says_otherwise_is_told(tmp_path, modality, keyword, value):
    def edit(ds, k):
        if k == 2 and value is None:
            del ds[keyword]
        elif k == 2:
            setattr(ds, keyword, value)

    (series,) = _series(tmp_path, edit, modality=modality)
    assert series.problem is None
    assert series.notes == (f"its images disagree on {keyword}: one may be damaged, or of another series",)


def test_scales_of_their_own_are_normal_except_in_ct_but_not_that_one_has_none(tmp_path):
    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = 1 + k, 0
        if k == 5 and ds.Modality == "MR":
            del ds.RescaleSlope

    assert _series(tmp_path / "pt", edit, modality="PT")[0].notes == ()
    assert "disagree on RescaleSlope:" in _series(tmp_path / "ct", edit, modality="CT")[0].notes[0]
    assert "disagree on RescaleSlope:" in _series(tmp_path / "mr", edit)[0].notes[0]


def test_all_that_differs_is_listed():
    one = tuple("a" for _ in TAGS)
    assert disagreements([one, one], [(1.0, 0.0), (1.0, 0.0)]) == ()
    other = (*one[:4], "b", "b")
    (note,) = disagreements([one, other], [(1.0, None), (1.0, 0.0)])
    assert "disagree on HighBit, PixelRepresentation, RescaleIntercept:" in note
    assert alike({"Modality": " CT ", "BitsStored": 12}) == ("CT", "", "", "12", "", "")


@pytest.mark.parametrize("end", [0, 5])
@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("SeriesInstanceUID", "1.2.3"),
        ("StudyInstanceUID", None),
        ("FrameOfReferenceUID", "1.2.3"),
        ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2"),
        ("SeriesNumber", 99),
        ("PixelSpacing", [3, 3]),
        ("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]),
        ("ImageType", "ORIGINAL\\PRIMARY\\LOCALIZER"),
    ],
)
def test_a_slice_that_left_its_series_at_an_end_is_missed(tmp_path, keyword, value, end):
    def edit(ds, k):
        if k == end:
            setattr(ds, keyword, value)

    series = _series(tmp_path, edit)
    (whole,) = [one for one in series if len(one.files) == SHAPE[2] - 1]
    (note,) = whole.notes
    assert NEXT in note
    assert "a slice short" in note
    alone = [one for one in series if one is not whole]
    assert all(TORN in one.notes for one in alone)
    assert len(alone) == (keyword != "ImageType")  # a localizer is set aside


@pytest.mark.parametrize(
    ("keyword", "value"), [("FrameOfReferenceUID", "1.2.3"), ("SOPClassUID", "1.2.840.10008.5.1.4.1.1.2")]
)
def test_halves_of_a_series_that_should_share_a_uid_tell_of_each_other(tmp_path, keyword, value):
    """A series has one frame of reference, but some programs make a new one for a part of it."""
    series = _series(tmp_path, lambda ds, k: setattr(ds, keyword, value) if k < 3 else None)
    assert [len(one.files) for one in series] == [3, 3]
    note = f"its series has more images like these, which are left out, since their {keyword} is another"
    assert [one.notes for one in series] == [(note,)] * 2


def test_images_of_another_number_are_no_halves(tmp_path):
    def edit(ds, k):
        if k < 3:
            ds.FrameOfReferenceUID, ds.SeriesNumber = "1.2.3", 99

    assert [one.notes for one in _series(tmp_path, edit)] == [()] * 2


def _plane(x=0.0, y=0.0, z=0.0):
    return Plane((4, 4), (x, y, z), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0))


def _stack(folder, heights):
    return [(Path(folder) / f"{z}.dcm", _plane(z=z)) for z in heights]


@pytest.mark.parametrize(
    ("others", "seen"),
    [
        ([("a", [9.0])], True),
        ([("a", [-3.0])], True),
        ([("a", [9.02])], True),
        ([("a", [9.1])], False),  # beside the line by more than what rounding does
        ([("a", [12.0])], False),
        ([("a", [3.0])], False),  # inside
        ([("b", [9.0])], False),  # another folder
        ([("a", [9.0, 12.0])], True),
        ([("a", [9.0, 12.0, 15.0])], False),  # a stack of its own
    ],
)
def test_where_a_stray_is_looked_for(others, seen):
    notes = strays([_stack("a", [0.0, 3.0, 6.0]), *(_stack(*other) for other in others)])
    assert [bool(note) for note in notes] == [seen, seen]


def test_slices_torn_out_of_a_stack_are_no_stack_of_their_own():
    torn = _stack("a", [0.0, 9.0])  # any two are evenly spaced
    notes = strays([_stack("a", [3.0, 6.0, 12.0, 15.0, 18.0]), torn])
    assert notes[1] == (TORN,)
    assert notes[0][0].startswith("0.0.dcm, 9.0.dcm, which does not share")


def test_a_sheared_stack_goes_on_along_its_own_axis():
    tilted = [(Path("a/x.dcm"), _plane(y=2.0 * k, z=5.0 * k)) for k in range(4)]
    assert strays([tilted, [(Path("a/s.dcm"), _plane(y=8.0, z=20.0))]])[1] == (TORN,)
    assert strays([tilted, [(Path("a/s.dcm"), _plane(y=0.0, z=20.0))]]) == [(), ()]


def test_several_volumes_at_the_same_places_are_one_stack():
    twice = _stack("a", [0.0, 3.0, 6.0, 0.0, 3.0, 6.0])
    assert [len(note) for note in strays([twice, _stack("a", [9.0])])] == [1, 1]


def test_images_without_a_place_and_lone_ones_do_not_matter():
    assert strays([[], _stack("a", [0.0]), _stack("a", [3.0])]) == [(), (), ()]
    assert strays([]) == []


def test_many_small_groups_take_no_time():
    rng = np.random.default_rng(0)
    groups = [[(Path("a/x.dcm"), _plane(*rng.normal(size=3)))] for _ in range(300)]
    groups += [_stack("a", np.arange(20.0) + 100 * n) for n in range(50)]
    assert not any(strays(groups))
