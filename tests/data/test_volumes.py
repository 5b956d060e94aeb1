from itertools import combinations, pairwise

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from dicom_synthetic import UIDS, arrays_of, tilted_affine, write_volumes
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.data.dicom import read_dicom
from medvit.data.frames import LABELS, Frame
from medvit.data.slices import Plane
from medvit.data.study import discover
from medvit.data.volumes import Part, by_kind, places, separate, shorter
from medvit.errors import UnreadableSeries

AFFINE = make_affine("oblique")


def frame(k=0, time=None, **labels):
    plane = Plane((7, 6), (0.0, 0.0, 2.5 * k), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (1.0, 1.0))
    return Frame(0, plane, tuple(labels.get(name) for name in LABELS), time, None)


def check(folder, arrays, parameters, affine=AFFINE):
    """Every volume of the one series in ``folder``: name, parameters, grid and voxels; nothing is lost."""
    inventory = discover(folder)
    assert [one.problem for one in inventory.series] == [None] * len(arrays)
    assert [one.parameters for one in inventory.series] == parameters
    for n, (one, array) in enumerate(zip(inventory.series, arrays, strict=True)):
        assert (one.volume, one.volumes, one.base, one.name) == (n, len(arrays), "3_T1_test", f"3_T1_test_v{n}")
        volume = one.read()
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
        assert volume.source.files == one.files and volume.source.frames == (0,) * array.shape[2]
    files = [file for one in inventory.series for file in one.files]
    assert sorted(files) == sorted(folder.iterdir()) and len(set(files)) == len(files)


def refused(folder, code, *words):
    (one,) = discover(folder).series
    assert one.problem is not None and one.problem.code == code, one.problem
    assert all(word in str(one.problem) for word in words), one.problem
    assert sorted(one.files) == sorted(folder.iterdir())


# ---- what tells volumes apart

DIFFUSION = [
    {"DiffusionBValue": 0.0},
    {"DiffusionBValue": 1000.0, "DiffusionGradientOrientation": [1.0, 0.0, 0.0]},
    {"DiffusionBValue": 1000.0, "DiffusionGradientOrientation": [0.0, 0.6, -0.8]},
]


@pytest.mark.parametrize(
    ("tags", "parameters"),
    [
        ([{"EchoTime": t} for t in (2.3, 4.6, 6.9)], [{"echo_time_ms": t} for t in (2.3, 4.6, 6.9)]),
        ([{"InversionTime": t} for t in (100, 800, 2500)], [{"inversion_time_ms": t} for t in (100.0, 800.0, 2500.0)]),
        ([{"FlipAngle": a} for a in (5, 10, 20)], [{"flip_angle": a} for a in (5.0, 10.0, 20.0)]),
        (
            DIFFUSION,
            [
                {"b_value": 0.0},
                {"b_value": 1000.0, "b_vector": "1 0 0"},
                {"b_value": 1000.0, "b_vector": "0 0.6 -0.8"},
            ],
        ),
        ([{"TemporalPositionIdentifier": n} for n in (1, 2, 3)], [{"temporal_position": n} for n in (1.0, 2.0, 3.0)]),
        ([{"TriggerTime": t} for t in (0, 40, 80)], [{"trigger_time_ms": t} for t in (0.0, 40.0, 80.0)]),
        ([{"AcquisitionNumber": n} for n in (1, 2, 3)], [{"acquisition": n} for n in (1.0, 2.0, 3.0)]),
        ([{"ComplexImageComponent": c} for c in ("MAGNITUDE", "PHASE", "REAL")], [
            {"component": c} for c in ("MAGNITUDE", "PHASE", "REAL")
        ]),
        ([{"ImageType": ["ORIGINAL", "PRIMARY", c]} for c in "MPR"], [
            {"image_type": f"ORIGINAL\\PRIMARY\\{c}"} for c in "MPR"
        ]),
        ([{"ConvolutionKernel": c} for c in ("B30f", "B60f", "B80f")], [
            {"kernel": c} for c in ("B30f", "B60f", "B80f")
        ]),
        ([{"KVP": v} for v in (80, 100, 140)], [{"kvp": v} for v in (80.0, 100.0, 140.0)]),
        ([{"StackID": c} for c in "123"], [{"stack": c} for c in "123"]),
    ],
    ids=lambda value: "-".join(value[-1]) if isinstance(value, list) else None,
)  # fmt: skip
def test_volumes_of_one_series_by_a_label(tmp_path, tags, parameters):
    """In the order of InstanceNumber, whatever the files are called."""
    arrays = arrays_of(3)

    def edit(ds, n, k):
        ds.InstanceNumber = 5 * n + k + 1

    write_volumes(tmp_path, arrays, AFFINE, *tags, edit=edit)
    check(tmp_path, arrays, parameters)


def test_the_order_is_that_of_acquisition_not_of_the_label(tmp_path):
    arrays = arrays_of(2)

    def edit(ds, n, k):
        ds.InstanceNumber = 5 * (1 - n) + k + 1

    write_volumes(tmp_path, arrays, AFFINE, {"EchoTime": 2.3}, {"EchoTime": 4.6}, edit=edit)
    check(tmp_path, arrays[::-1], [{"echo_time_ms": 4.6}, {"echo_time_ms": 2.3}])


@pytest.mark.parametrize(
    ("group", "element", "vr", "values", "creator"),
    [
        (0x0019, 0x100C, "IS", (0, 700), "SIEMENS MR HEADER"),
        (0x0043, 0x1039, "IS", ([1000000050, 8, 0, 0], [700, 8, 0, 0]), "GEMS_PARM_01"),
        (0x2001, 0x1003, "FL", (0.0, 700.0), "Philips Imaging DD 001"),
        (0x0065, 0x1009, "FD", (0.0, 700.0), "Image Private Header"),
    ],
)
@pytest.mark.parametrize("unknown", [False, True])
def test_b_values_in_private_tags(tmp_path, group, element, vr, values, creator, unknown):
    def edit(ds, n, k):
        ds.add_new((group << 16) + 0x10, "LO", creator)
        ds.add_new((group << 16) + element, vr, values[n])
        if unknown and vr == "IS":  # as converters from implicit VR leave them
            text = "\\".join(map(str, np.atleast_1d(values[n]))).encode()
            ds.add_new((group << 16) + element, "UN", text + b" " * (len(text) % 2))
        elif unknown:
            ds.add_new((group << 16) + element, "UN", np.array(values[n], "<f4" if vr == "FL" else "<f8").tobytes())

    arrays = arrays_of(2)
    write_volumes(tmp_path, arrays, AFFINE, edit=edit)
    check(tmp_path, arrays, [{"b_value": 50.0 if group == 0x43 else 0.0}, {"b_value": 700.0}])


def test_several_labels_one_inside_the_other(tmp_path):
    """Two echoes, of each magnitude and phase, of each two time points."""
    arrays = arrays_of(8)
    tags = [
        {"EchoTime": (3, 5)[n // 4], "ImageType": ["ORIGINAL", "PRIMARY", "MP"[n // 2 % 2]], "AcquisitionNumber": n % 2}
        for n in range(8)
    ]
    write_volumes(tmp_path, arrays, AFFINE, *tags, edit=lambda ds, n, k: setattr(ds, "InstanceNumber", 5 * n + k))
    parameters = [
        {
            "image_type": f"ORIGINAL\\PRIMARY\\{'MP'[n // 2 % 2]}",
            "echo_time_ms": (3.0, 5.0)[n // 4],
            "acquisition": float(n % 2),
        }
        for n in range(8)
    ]
    check(tmp_path, arrays, parameters)


def test_a_phase_image_with_a_scale_of_its_own(tmp_path):
    """Magnitude and phase: two kinds, each rescaled by its own slope; here told apart by nothing but RescaleType."""
    arrays = arrays_of(2)
    tags = (
        {"RescaleSlope": 1, "RescaleIntercept": 0, "RescaleType": "US"},
        {"RescaleSlope": 2, "RescaleIntercept": -4096, "RescaleType": "rad"},
    )
    write_volumes(tmp_path, arrays, AFFINE, *tags, edit=lambda ds, n, k: setattr(ds, "InstanceNumber", 5 * n + k))
    check(tmp_path, [arrays[0], 2.0 * arrays[1] - 4096], [{"rescale_type": "US"}, {"rescale_type": "rad"}])


def test_kinds_may_cover_different_slices(tmp_path):
    """A phase image of three slices beside a magnitude image of five: perhaps neither misses any."""
    arrays = [phantom((7, 6, 5)), phantom((7, 6, 3), seed=1)]
    write_dicom_series(tmp_path, arrays[0], AFFINE, prefix="m", ImageType=["ORIGINAL", "PRIMARY", "M"], **UIDS)
    higher = AFFINE.copy()
    higher[:3, 3] = AFFINE[:3] @ (0, 0, 2, 1)
    write_dicom_series(tmp_path, arrays[1], higher, prefix="p", ImageType=["ORIGINAL", "PRIMARY", "P"], **UIDS)
    found = {one.parameters["image_type"][-1]: one for one in discover(tmp_path).series}
    for one, array, affine in ((found["M"], arrays[0], AFFINE), (found["P"], arrays[1], higher)):
        assert one.problem is None
        np.testing.assert_array_equal(one.read().array, array)
        np.testing.assert_allclose(one.space.affine, affine, atol=2e-6)
    note = "another volume of its series goes on at an end (slices: 2), which this one may have lost"
    assert (found["M"].notes, found["P"].notes) == ((), (note,))


@pytest.mark.parametrize(
    ("others", "lost"),
    [
        ([(0, 1, 2, 3, 4)], 0),
        ([(0, 1, 2, 3, 4, 5)], 1),
        ([(0, 1, 2, 3, 4, 5), (-2, -1, 0, 1, 2, 3, 4, 5)], 3),
        ([(1, 2, 3, 4, 5)], 0),  # its own way at both ends
        ([(-1, 0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4)], 0),  # thinner slices
    ],
)
def test_slices_that_another_volume_has_at_an_end(others, lost):
    stacks = [(0, 1, 2, 3, 4), *others]
    where = [place for stack in stacks for place in stack]
    ends = np.cumsum([0, *map(len, stacks)])
    parts = [Part(tuple(range(start, end))) for start, end in pairwise(ends)]
    assert shorter(parts, where)[0] == lost


# ---- by order


def orders(way):
    """InstanceNumber (volume, slice) of three volumes of five slices."""
    return {
        "volume by volume": lambda n, k: 5 * n + k + 1,
        "slice by slice": lambda n, k: 3 * k + n + 1,
        "interleaved slices": lambda n, k: 5 * n + (0, 3, 1, 4, 2)[k] + 1,
        "downwards": lambda n, k: 5 * n + (4 - k) + 1,
    }[way]


@pytest.mark.parametrize("way", ["volume by volume", "slice by slice", "interleaved slices", "downwards"])
def test_volumes_by_instance_number(tmp_path, way):
    arrays, number = arrays_of(3), orders(way)

    def edit(ds, n, k):
        ds.InstanceNumber = number(n, k)
        ds.ContentTime = ""

    write_volumes(tmp_path, arrays, AFFINE, edit=edit)
    check(tmp_path, arrays, [{"time_point": float(n)} for n in range(3)])


@pytest.mark.parametrize("way", ["volume by volume", "slice by slice"])
@pytest.mark.parametrize("keywords", [("AcquisitionDate", "AcquisitionTime"), ("ContentDate", "ContentTime")])
def test_volumes_by_time(tmp_path, way, keywords):
    """Also over midnight; instance numbers are all alike."""
    arrays, number = arrays_of(3), orders(way)

    def edit(ds, n, k):
        minute = 23 * 60 + 50 + number(n, k)
        day, hour, rest = 2 + minute // 1440, minute // 60 % 24, minute % 60
        ds.InstanceNumber, ds.ContentTime = 1, ""
        setattr(ds, keywords[0], f"202001{day:02d}")
        setattr(ds, keywords[1], f"{hour:02d}{rest:02d}30.25")

    write_volumes(tmp_path, arrays, AFFINE, edit=edit)
    check(tmp_path, arrays, [{"time_point": float(n)} for n in range(3)])


@pytest.mark.parametrize(
    "number",
    [
        lambda n, k: 1,
        lambda n, k: k + 1,
        lambda n, k: None,
        lambda n, k: (1, 2, 5, 6, 9)[k] if n == 0 else (3, 4, 7, 8, 10)[k],  # neither by volume nor by slice
    ],
)
def test_an_ambiguous_order_is_refused(tmp_path, number):
    def edit(ds, n, k):
        ds.InstanceNumber = number(n, k)
        ds.ContentTime = ""

    write_volumes(tmp_path, arrays_of(2), AFFINE, edit=edit)
    refused(tmp_path, "four-dimensional", "10 slices lie at 5 positions, 2 at each", "give one of them")


def by_time(folder, arrays, seconds, number, keyword="AcquisitionTime"):
    """Volumes of which each image has a time without its date."""

    def edit(ds, n, k):
        at = seconds(n, k) % 86400
        ds.InstanceNumber, ds.ContentDate, ds.ContentTime = number(n, k), "", ""
        setattr(ds, keyword, f"{int(at // 3600):02d}{int(at // 60 % 60):02d}{at % 60:05.2f}")

    write_volumes(folder, arrays, AFFINE, edit=edit)


def test_times_over_midnight_without_dates_order_nothing(tmp_path):
    """Slice after slice, every 2.5 s: midnight falls into the second volume, of which a part would seem the first."""
    arrays = arrays_of(3)
    by_time(tmp_path, arrays, lambda n, k: 86396 + 2.5 * n + 0.5 * k, orders("volume by volume"))
    check(tmp_path, arrays, [{"time_point": float(n)} for n in range(3)])


def test_times_over_midnight_without_dates_and_without_numbers_are_refused(tmp_path):
    by_time(tmp_path, arrays_of(3), lambda n, k: 86396 + 2.5 * n + 0.5 * k, lambda n, k: 1)
    refused(tmp_path, "four-dimensional", "3 at each")


def test_instance_numbers_come_before_the_time_of_reconstruction(tmp_path):
    """Magnitude and phase, say, of which one slice was reconstructed in the other order."""
    arrays = arrays_of(2)
    by_time(tmp_path, arrays, lambda n, k: 2 * k + (n != (k == 2)), orders("volume by volume"), "ContentTime")
    check(tmp_path, arrays, [{"time_point": float(n)} for n in range(2)])


def test_the_time_of_reconstruction_orders_nothing_where_it_runs_to_and_fro(tmp_path):
    by_time(tmp_path, arrays_of(2), lambda n, k: (1, 2, 5, 6, 9)[k] + 2 * n * (k < 4), lambda n, k: 1, "ContentTime")
    refused(tmp_path, "four-dimensional", "2 at each")


def test_a_time_that_one_image_lacks_orders_nothing(tmp_path):
    def edit(ds, n, k):
        ds.InstanceNumber, ds.ContentTime = 1, "" if (n, k) == (1, 2) else f"1011{n}{k}"

    write_volumes(tmp_path, arrays_of(2), AFFINE, edit=edit)
    refused(tmp_path, "four-dimensional", "2 at each")


# ---- beside each other, and sheared


@pytest.mark.parametrize("beside", [60.0, 0.5 + 60, 1.01])
def test_stations_beside_each_other(tmp_path, beside):
    """Equal heights, other places: two volumes, whatever else is alike."""
    arrays = arrays_of(2)
    affines = [make_affine("oblique"), make_affine("oblique")]
    affines[1][:3, 3] += affines[1][:3, 0] / np.linalg.norm(affines[1][:3, 0]) * beside
    for n in range(2):
        write_dicom_series(tmp_path, arrays[n], affines[n], prefix=f"s{n}_", InstanceNumber=n, **UIDS)
    series = discover(tmp_path).series
    assert [one.parameters for one in series] == [{"station": 0.0}, {"station": 1.0}]
    for one, array, affine in zip(series, arrays, affines, strict=True):
        np.testing.assert_array_equal(one.read().array, array)
        np.testing.assert_allclose(one.space.affine, affine, atol=2e-6)


@pytest.mark.parametrize("degrees", [0.3, 2, 5, 11, 22, 30])
@pytest.mark.parametrize("step", [0.8, 2.5, 10.0])
def test_sheared_slices_are_no_stations(tmp_path, degrees, step):
    """Volumes of a tilted gantry at the same places: whole, not torn into stacks of slices that lie nearly upright."""
    affine, arrays = tilted_affine(degrees, (1, 1, step)), arrays_of(2, (7, 6, 30))
    write_volumes(
        tmp_path, arrays, affine, {"AcquisitionNumber": 1}, {"AcquisitionNumber": 2}, edit=lambda ds, n, k: None
    )
    series = discover(tmp_path).series
    assert [one.parameters for one in series] == [{"acquisition": 1.0}, {"acquisition": 2.0}]
    for one, array in zip(series, arrays, strict=True):
        np.testing.assert_array_equal(one.read().array, array)
        np.testing.assert_allclose(one.space.affine, affine, atol=3e-6)


# ---- incomplete


def test_the_last_volume_was_interrupted(tmp_path):
    arrays = arrays_of(3)

    def edit(ds, n, k):
        ds.InstanceNumber, ds.ContentTime = 5 * n + k + 1, ""

    files = write_volumes(tmp_path, arrays, AFFINE, edit=edit)
    for file in files[13:]:
        file.unlink()
    series = discover(tmp_path).series
    assert [one.problem and one.problem.code for one in series] == [None, None, "incomplete-volume"]
    for one, array in zip(series[:2], arrays[:2], strict=True):
        np.testing.assert_array_equal(one.read().array, array)
        np.testing.assert_allclose(one.space.affine, AFFINE, atol=2e-6)
    assert "2 of its 5 slices are missing, which other volumes of the series have" in str(series[2].problem)
    assert sorted(series[2].files) == sorted(files[10:13]) and series[2].space is None
    with pytest.raises(UnreadableSeries, match="the acquisition was interrupted, or files are lost"):
        series[2].read()


@pytest.mark.parametrize("clock", ["instance", "time of a volume", "time of a slice"])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3)])
@pytest.mark.parametrize("count", [1, 2])
def test_whichever_images_are_lost_no_volume_is_mixed(clock, order, count):
    """At the place of a lost image all that follow seem to be of the volume before theirs."""
    known = []
    for volume, turn in np.ndindex(4, 4):
        time = {"time of a volume": 2.0 * volume, "time of a slice": 2.0 * volume + 0.5 * turn}.get(clock)
        known.append((volume, frame(order[turn], time, instance=1.0 + 4 * volume + turn)))
    interrupted = 0
    for lost in combinations(range(16), count):
        kept = [one for n, one in enumerate(known) if n not in lost]
        frames = [one for _, one in kept]
        where = places([one.plane for one in frames])
        for part in separate(frames, where):
            here = [where[n] for n in part.members]
            if len(here) == len(set(here)) and not part.missing:
                assert len({kept[n][0] for n in part.members}) == 1, lost
                interrupted += min(lost) > 11
    assert interrupted  # the volumes before one that was


@pytest.mark.parametrize(("lost", "volume"), [((7,), 1), ((0,), 0), ((14,), 2), ((5, 9), 1)])
def test_a_slice_of_one_volume_is_lost(tmp_path, lost, volume):
    """First and last slices too, which leave no gap; the volume is known by its label."""
    arrays = arrays_of(3)
    tags = [{"TemporalPositionIdentifier": n + 1} for n in range(3)]
    files = write_volumes(tmp_path, arrays, AFFINE, *tags)
    for n in lost:
        files[n].unlink()
    series = {int(one.parameters["temporal_position"]) - 1: one for one in discover(tmp_path).series}
    for n, array in enumerate(arrays):
        if n == volume:
            assert series[n].problem.code == "incomplete-volume"
            assert f"{len(lost)} of its 5 slices are missing" in str(series[n].problem)
        else:
            np.testing.assert_array_equal(series[n].read().array, array)


def test_a_slice_lost_in_the_middle_of_a_numbered_series_is_refused(tmp_path):
    """Without labels the images after the gap would belong to the wrong volume."""
    files = write_volumes(
        tmp_path,
        arrays_of(3),
        AFFINE,
        edit=lambda ds, n, k: ds.update({"InstanceNumber": 5 * n + k, "ContentTime": ""}),
    )
    files[6].unlink()
    refused(tmp_path, "duplicate-positions", "5 of 5 positions hold several different ones")


@pytest.mark.parametrize("tags", [{}, {"AcquisitionNumber": 2}, {"EchoTime": 3}, {"TemporalPositionIdentifier": 2}])
def test_a_slice_that_was_sent_again_is_refused(tmp_path, tags):
    files = write_dicom_series(tmp_path, phantom(), AFFINE)
    ds = pydicom.dcmread(files[2])
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4.5"
    ds.InstanceNumber, ds.ContentTime = 77, "235959"
    ds.PixelData = bytes(len(ds.PixelData))
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(tmp_path / "again.dcm")
    refused(tmp_path, "duplicate-positions", "1 of 5 positions hold several different ones", "mm along the normal")


def test_two_positions_in_one_series_are_two_volumes_of_one_slice(tmp_path):
    """A cine of one slice: time points of one position."""
    arrays = arrays_of(3, (7, 6, 1))
    tags = [{"TriggerTime": 30 * n} for n in range(3)]
    write_volumes(tmp_path, arrays, AFFINE, *tags, edit=lambda ds, n, k: setattr(ds, "InstanceNumber", n))
    check(tmp_path, arrays, [{"trigger_time_ms": 30.0 * n} for n in range(3)])


# ---- one unit


def test_units_that_vary_are_refused(tmp_path):
    def edit(ds, k):
        ds.RescaleType = "HU" if k % 2 else "OD"

    write_dicom_series(tmp_path, phantom(), AFFINE, modality="CT", edit=edit)
    refused(tmp_path, "units-vary", "must share one unit, but RescaleType is ['HU', 'OD']; export the series again")


def test_a_unit_that_some_slices_lack_is_that_of_the_others(tmp_path):
    def edit(ds, k):
        if k != 2:
            ds.RescaleType = "HU"

    files = write_dicom_series(tmp_path, phantom(), AFFINE, modality="CT", edit=edit)
    np.testing.assert_array_equal(read_dicom(files).array, phantom() - 1024.0)


def test_stacks_of_other_kinds_one_above_the_other(tmp_path):
    """Uneven together, even each: split by what tells them apart, so none is interpolated over the step."""
    upper = AFFINE.copy()
    upper[:3, 3] = AFFINE[:3] @ (0, 0, 7.5, 1)
    arrays = arrays_of(2)
    write_dicom_series(tmp_path, arrays[0], AFFINE, prefix="a", ConvolutionKernel="B30f", InstanceNumber=1, **UIDS)
    write_dicom_series(tmp_path, arrays[1], upper, prefix="b", ConvolutionKernel="B60f", InstanceNumber=2, **UIDS)
    first, second = discover(tmp_path).series
    assert [one.parameters for one in (first, second)] == [{"kernel": "B30f"}, {"kernel": "B60f"}]
    for one, array, affine in ((first, arrays[0], AFFINE), (second, arrays[1], upper)):
        np.testing.assert_array_equal(one.read().array, array)
        np.testing.assert_allclose(one.space.affine, affine, atol=2e-6)


# ---- the functions themselves


def test_places_are_numbers_of_heights_from_below():
    planes = [frame(k).plane for k in (3, 0, 1, 0, 3)]
    assert places(planes) == [2, 0, 1, 0, 2]
    near = frame(1 + 0.004 / 2.5).plane
    assert places([*planes, near]) == [2, 0, 1, 0, 2, 1]


@settings(max_examples=60)
@given(st.integers(2, 4), st.integers(1, 5), st.randoms())
def test_any_order_of_files_gives_the_same_volumes(count, slices, random):
    frames = [
        frame(k, temporal_position=float(n), instance=float(n * slices + k))
        for n in range(count)
        for k in range(slices)
    ]
    random.shuffle(frames)
    parts = separate(frames, places([one.plane for one in frames]))
    assert [part.parameters for part in parts] == [{"temporal_position": float(n)} for n in range(count)]
    for n, part in enumerate(parts):
        assert {frames[m].label("temporal_position") for m in part.members} == {float(n)}
        assert len(part.members) == slices and part.missing == 0


@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=14
    )
)
def test_no_image_is_lost_or_used_twice(images):
    """Whatever the labels: every image is in one part, and a part is whole, incomplete and known so, or ambiguous."""
    frames = [frame(k, echo_time_ms=float(e), acquisition=float(a), instance=float(i)) for k, e, a, i in images]
    where = places([one.plane for one in frames])
    parts = separate(frames, where)
    assert sorted(n for part in parts for n in part.members) == list(range(len(frames)))
    for part in parts:
        here = [where[n] for n in part.members]
        if len(parts) > 1 and part.missing == 0 and len(set(here)) == len(here):
            assert set(here) == set(where) or not part.parameters.keys() - set(LABELS)


def test_kinds_need_three_images_each():
    assert by_kind([frame(k, kernel="ab"[k // 2]) for k in range(4)]) == []
    (way,) = by_kind([frame(k, kernel="ab"[k // 3]) for k in range(6)])
    assert [(part.members, part.parameters) for part in way] == [
        ((0, 1, 2), {"kernel": "a"}),
        ((3, 4, 5), {"kernel": "b"}),
    ]
