"""The sliding window against known answers, against MONAI's own inferer, and its window placement by properties."""

import itertools
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from monai.data import MetaTensor, decollate_batch, list_data_collate
from monai.inferers import Inferer, SlidingWindowInferer
from torch.nn import functional

from medvit.inference import SlidingWindow, WindowPlan
from medvit.inference.sliding import window_starts


def random_image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def position_dependent(x):
    """Two classes that differ by where in the window a voxel lies, so that placement, blend and padding all show."""
    ramp = sum(torch.linspace(0, 1 + a, n).reshape([-1 if b == a else 1 for b in range(x.ndim - 2)])
               for a, n in enumerate(x.shape[2:]))  # fmt: skip
    return torch.cat([x[:, :1] * ramp, x[:, :1].square() - ramp], dim=1)


# --- answers known beforehand


@pytest.mark.parametrize("placement", ["fixed", "even"])
@pytest.mark.parametrize("blend", ["constant", "gaussian"])
@pytest.mark.parametrize("size", [(17,), (16, 23), (9, 30), (12, 5, 19), (1, 20, 33)])
def test_a_network_that_adds_one_gives_the_image_plus_one(size, blend, placement):
    roi = (8, 10, 7)[: len(size)]
    image = random_image(2, 3, *size)
    window = SlidingWindow(roi, overlap=0.4, batch_size=4, blend=blend, placement=placement)
    torch.testing.assert_close(window(image, lambda x: x + 1), image + 1, rtol=0, atol=1e-5)


def test_convolution_equals_the_whole_image_one_where_no_window_border_is_near():
    # Along an axis windows of 16 start at 0, 8, 16; the kernel reaches one voxel, so a window is wrong on its border
    # voxels, except at the image's own border, where window and whole image pad alike.
    image, kernel = random_image(1, 1, 32, 32), random_image(2, 1, 3, 3, seed=1)
    whole = functional.conv2d(image, kernel, padding=1)
    tiled = SlidingWindow((16, 16), overlap=0.5)(image, lambda x: functional.conv2d(x, kernel, padding=1))
    exact = np.setdiff1d(np.arange(32), [7, 8, 15, 16, 23, 24])
    torch.testing.assert_close(tiled[..., exact, :][..., exact], whole[..., exact, :][..., exact], rtol=0, atol=1e-5)
    assert (tiled - whole)[..., 8, :].abs().max() > 0.01


def test_blending_by_hand():
    # two windows of 4 over 6 voxels; the network answers 0 in the first call, 1 in the second
    answers = iter([0.0, 1.0])
    window = SlidingWindow((4,), overlap=0.5, blend="gaussian", sigma_scale=0.25)
    result = window(torch.zeros(1, 1, 6), lambda x: torch.full_like(x, next(answers)))[0, 0]
    w = np.exp(-0.5 * np.array([-1.5, -0.5, 0.5, 1.5]) ** 2)
    expected = [0, 0, w[0] / (w[0] + w[2]), w[1] / (w[1] + w[3]), 1, 1]
    np.testing.assert_allclose(result, expected, atol=1e-6)


def test_depth_one_windows_over_a_volume_are_a_loop_over_slices():
    volume, kernel = random_image(1, 1, 5, 12, 12), random_image(1, 1, 3, 3, seed=1)
    network = lambda x: functional.conv2d(x.squeeze(2), kernel, padding=1).unsqueeze(2)  # noqa: E731
    result = SlidingWindow((1, 12, 12), batch_size=2)(volume, network)
    for k in range(5):
        torch.testing.assert_close(result[:, :, k], functional.conv2d(volume[:, :, k], kernel, padding=1))


# --- MONAI's own inferer defines "fixed"


@pytest.mark.upstream
@pytest.mark.parametrize("blend", ["constant", "gaussian"])
@pytest.mark.parametrize(
    ("size", "roi", "overlap"),
    [
        ((31, 16), (16, 16), 0.25),
        ((37, 50), (16, 12), (0.5, 0.6)),
        ((9, 41), (16, 8), 0.3),
        ((20, 33, 17), (8, 16, 17), 0.5),
        ((7, 19, 24), (10, 8, 9), (0.1, 0.7, 0.45)),
        ((13, 6, 5), (5, 9, 8), 0.9),
    ],
)
def test_equals_monai(size, roi, overlap, blend):
    image = random_image(2, 1, *size)
    ours = SlidingWindow(roi, overlap=overlap, batch_size=3, blend=blend, padding_value=0.5)
    theirs = SlidingWindowInferer(roi, sw_batch_size=3, overlap=overlap, mode=blend, cval=0.5)
    expected = theirs(image, position_dependent)
    torch.testing.assert_close(ours(image, position_dependent), expected, rtol=0, atol=1e-5)


@pytest.mark.upstream
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_modes_equal_monai(mode):
    image = random_image(1, 1, 11, 30)
    ours = SlidingWindow((16, 16), padding_mode=mode, blend="gaussian")
    theirs = SlidingWindowInferer((16, 16), mode="gaussian", padding_mode=mode)
    torch.testing.assert_close(ours(image, position_dependent), theirs(image, position_dependent), rtol=0, atol=1e-5)


# --- plans


def test_fixed_placement_moves_the_last_window_back():
    assert window_starts(100, 64, 0.5, "fixed") == (0, 32, 36)
    assert window_starts(64, 64, 0.5, "fixed") == (0,)
    assert window_starts(96, 64, 0.5, "fixed") == (0, 32)


def test_even_placement_is_nnunets():
    # the example in nnU-Net's own comment: tile 64, step 0.5, image 110
    assert window_starts(110, 64, 0.5, "even") == (0, 23, 46)
    assert window_starts(64, 64, 0.5, "even") == (0,)


def test_even_placement_is_not_misled_by_rounding():
    assert 100 * (1 - 0.9) < 10
    assert window_starts(190, 100, 0.9, "even") == tuple(range(0, 91, 10))


@given(
    roi=st.integers(1, 70),
    extra=st.integers(0, 200),
    overlap=st.floats(0, 0.99),
    placement=st.sampled_from(["fixed", "even"]),
)
def test_windows_cover_the_axis_once_each(roi, extra, overlap, placement):
    size = roi + extra
    starts = window_starts(size, roi, overlap, placement)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == size - roi
    assert all(1 <= step <= roi for step in steps)
    step = max(roi * (1 - overlap), 1)
    if placement == "even" and len(steps):
        assert np.ptp(steps) <= 1
        assert steps.mean() <= step + 1e-6
        assert len(steps) == 1 or extra / (len(steps) - 1) >= step - 1e-6  # one window less would not do
    if placement == "fixed" and len(steps) > 1:
        assert set(steps[:-1]) == {max(int(roi * (1 - overlap)), 1)}


@given(
    size=st.lists(st.integers(1, 24), min_size=1, max_size=3),
    roi=st.lists(st.integers(4, 20), min_size=3, max_size=3),
    overlap=st.floats(0, 0.8),
    placement=st.sampled_from(["fixed", "even"]),
)
def test_every_voxel_has_weight(size, roi, overlap, placement):
    window = SlidingWindow(roi[: len(size)], overlap=overlap, placement=placement, blend="gaussian", sigma_scale=0.05)
    plan = window.plan(size)
    count = torch.zeros(plan.padded_size)
    for box in plan:
        count[box] += plan.weight()
    assert count.min() >= 1e-3
    assert len(list(plan)) == len(plan) == len(set(itertools.product(*plan.starts)))
    padded = [before + n + after for n, (before, after) in zip(size, plan.padding, strict=True)]
    assert padded == list(plan.padded_size)
    assert all(0 <= after - before <= 1 for before, after in plan.padding)


def test_a_plan_is_a_hashable_value_in_scan_order():
    window = SlidingWindow((4, 4), overlap=0.5)
    plan = window.plan((6, 8))
    assert plan == window.plan((6, 8))
    assert hash(plan) == hash(window.plan(torch.Size([6, 8])))
    corners = [tuple(s.start for s in box) for box in plan]
    assert corners == [(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]
    assert isinstance(plan, WindowPlan)


# --- behaviour around it


def test_batches_of_windows_are_full_and_cross_images():
    sizes = []

    def network(x):
        sizes.append(len(x))
        return x

    SlidingWindow((4,), overlap=0, batch_size=4)(torch.zeros(3, 1, 8), network)
    assert sizes == [4, 2]


def test_meta_data_travel_with_the_image_and_stay_out_of_the_network():
    affine = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0], dtype=torch.float64))
    images = [MetaTensor(random_image(1, 6, 6, 6, seed=s), affine=affine * (s + 1), meta={"n": s}) for s in range(2)]
    batch = list_data_collate([{"image": image} for image in images])["image"]
    kinds = set()

    def network(x):
        kinds.add(type(x))
        return x

    result = SlidingWindow((4, 4, 4))(batch, network)
    assert kinds == {torch.Tensor}
    assert isinstance(result, MetaTensor)
    for one, image in zip(decollate_batch(result), images, strict=True):
        torch.testing.assert_close(one.affine, image.affine)
        assert one.meta["n"] == image.meta["n"]
        torch.testing.assert_close(one.as_tensor(), image.as_tensor())


def test_half_precision_outputs_are_summed_in_float32():
    # 1 + 2^-8 summed in float16 over 10 windows would lose the fraction
    image = torch.full((1, 1, 64), 1 + 2**-8)
    result = SlidingWindow((16,), overlap=0.9)(image, lambda x: x.half())
    assert result.dtype == torch.float32
    assert (result == 1 + 2**-8).all()
    assert SlidingWindow((16,))(image.double(), lambda x: x).dtype == torch.float64


def test_arguments_reach_the_network_and_the_input_is_left_alone():
    image = random_image(1, 1, 9)
    before = image.clone()
    result = SlidingWindow((4,))(image, lambda x, a, *, b: x * a + b, 2.0, b=1.0)
    torch.testing.assert_close(result, image * 2 + 1)
    assert torch.equal(image, before)


def test_it_is_a_monai_inferer_that_may_sum_elsewhere():
    window = SlidingWindow([4], device="cpu")
    assert isinstance(window, Inferer)
    assert window(inputs=torch.ones(1, 1, 4), network=lambda x: x).device.type == "cpu"


def test_gradients_flow_if_the_caller_wants_them():
    image = random_image(1, 1, 9).requires_grad_()
    SlidingWindow((4,), overlap=0.5)(image, lambda x: 3 * x).sum().backward()
    torch.testing.assert_close(image.grad, torch.full_like(image, 3.0))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_on_the_cpu_what_the_gpu_computes():
    image = random_image(1, 1, 20, 20, 20).cuda()
    result = SlidingWindow((8, 8, 8), blend="gaussian", device="cpu")(image, lambda x: x + 1)
    assert result.device.type == "cpu"
    torch.testing.assert_close(result, image.cpu() + 1)


# --- every guard fires


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"roi_size": 96}, "roi_size needs one size per spatial axis, such as (96, 96, 96), got 96"),
        ({"roi_size": ()}, "roi_size needs one size per spatial axis, such as (96, 96, 96), got ()"),
        ({"roi_size": (96, 0)}, "roi_size must be whole and above 0 on every axis, got (96, 0)"),
        ({"roi_size": (96, 9.5)}, "roi_size must be whole and above 0 on every axis, got (96, 9.5)"),
        ({"overlap": 1.0}, "overlap must be in [0, 1) on every axis, got 1.0"),
        ({"overlap": (0.5, -0.1)}, "overlap must be in [0, 1) on every axis, got (0.5, -0.1)"),
        ({"overlap": (0.5,)}, "overlap needs one number, or one for each of the 2 axes of roi_size, got (0.5,)"),
        ({"sigma_scale": 0}, "sigma_scale must be above 0 on every axis, got 0"),
        ({"batch_size": 0}, "batch_size must be whole and above 0, got 0"),
        ({"placement": "spread"}, "placement must be one of fixed, even, got 'spread'"),
        ({"blend": "gauss"}, "blend must be one of constant, gaussian, got 'gauss'"),
        ({"padding_mode": "zeros"}, "padding_mode must be one of constant, reflect, replicate, circular, got 'zeros'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SlidingWindow(**{"roi_size": (8, 8), **arguments})


def test_image_of_another_rank():
    message = (
        "one spatial axis per entry of roi_size=(8, 8), got 3 of sizes (8, 9, 10); inputs are (batch, channel, *spa"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SlidingWindow((8, 8))(torch.zeros(1, 1, 8, 9, 10), lambda x: x)


def test_empty_batch():
    with pytest.raises(ValueError, match=re.escape("at least one image, got shape (0, 1, 8)")):
        SlidingWindow((8,))(torch.zeros(0, 1, 8), lambda x: x)


@pytest.mark.parametrize(
    ("network", "got"),
    [
        (lambda x: x[..., ::2], "(2, 1, 8, 4)"),
        (lambda x: x[:1], "(1, 1, 8, 8)"),
        (lambda x: x[:, 0], "(2, 8, 8)"),
    ],
)
def test_network_that_returns_another_size(network, got):
    message = f"the network must return the size of its window: expected (2, K, 8, 8), got {got}"
    with pytest.raises(ValueError, match=re.escape(message)):
        SlidingWindow((8, 8), batch_size=2)(torch.zeros(1, 1, 8, 12), network)


def test_network_that_returns_no_tensor():
    with pytest.raises(TypeError, match=r"must return one tensor \(b, K, \*roi_size\), got tuple; wrap it to pick one"):
        SlidingWindow((8,))(torch.zeros(1, 1, 8), lambda x: (x, x))


@pytest.mark.parametrize(("mode", "limit"), [("reflect", 4), ("circular", 5)])
def test_padding_that_the_image_cannot_give(mode, limit):
    message = (
        f"padding_mode='{mode}' adds at most {limit} voxels to a side of 5, but an image of (5, 20) needs 6 for "
        "roi_size=(16, 16); use 'constant' or 'replicate'"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        SlidingWindow((16, 16), padding_mode=mode)(torch.zeros(1, 1, 5, 20), lambda x: x)


# --- a network of fewer dimensions than the image


@pytest.mark.parametrize(("roi", "flat"), [((8, 6, 1), 2), ((1, 8, 6), 0), ((8, 1, 6), 1)])
@pytest.mark.parametrize("blend", ["constant", "gaussian"])
def test_a_2d_network_over_a_volume_is_the_2d_window_on_every_slice(roi, flat, blend):
    volume = random_image(2, 1, 11, 9, 13)
    options = {"overlap": 0.5, "batch_size": 3, "blend": blend}
    shapes = set()

    def network(x):
        shapes.add(tuple(x.shape[1:]))
        return position_dependent(x)

    result = SlidingWindow(roi, spatial_dims=2, **options)(volume, network)
    plane = SlidingWindow([n for n in roi if n > 1], **options)
    expected = torch.stack([plane(s, position_dependent) for s in volume.unbind(2 + flat)], dim=2 + flat)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert shapes == {(1, *(n for n in roi if n > 1))}


@pytest.mark.parametrize("placement", ["fixed", "even"])
def test_every_slice_is_seen_once_whatever_the_overlap(placement):
    plan = SlidingWindow((4, 1), overlap=0.75, placement=placement, spatial_dims=1).plan((4, 7))
    assert plan.starts == ((0,), tuple(range(7)))


def test_a_photograph_has_one_slice():
    image = random_image(1, 3, 70, 45, 1)
    window = SlidingWindow((32, 32, 1), overlap=0.5, batch_size=4, blend="gaussian", spatial_dims=2)
    result = window(MetaTensor(image, meta={"case": "eye"}), lambda x: functional.conv2d(x, torch.ones(2, 3, 1, 1)))
    torch.testing.assert_close(result.as_tensor()[:, :1], image.sum(1, keepdim=True), rtol=0, atol=1e-5)
    assert result.shape == (1, 2, 70, 45, 1) and result.meta["case"] == "eye"


def test_a_flat_window_alone_does_not_make_a_network_2d():
    seen = []
    SlidingWindow((4, 4, 1))(random_image(1, 1, 4, 4, 2), lambda x: seen.append(x.shape) or x)
    assert seen == [(1, 1, 4, 4, 1)] * 2
    assert SlidingWindow((4, 4, 1), spatial_dims=3).network_roi == (4, 4, 1)


@pytest.mark.parametrize(("roi", "dims"), [((8, 8, 8), 2), ((8, 1, 1), 2), ((8, 8, 1), 1), ((8, 8), 3)])
def test_the_window_must_be_flat_where_the_network_is(roi, dims):
    message = re.escape(
        f"roi_size must have {dims} entries above 1 and else only 1 for a network of spatial_dims={dims}"
    )
    with pytest.raises(ValueError, match=message):
        SlidingWindow(roi, spatial_dims=dims)


def test_a_2d_network_must_return_the_size_of_its_window():
    window = SlidingWindow((8, 6, 1), spatial_dims=2)
    with pytest.raises(ValueError, match=re.escape("expected (1, K, 8, 6), got (1, 1, 4, 3)")):
        window(random_image(1, 1, 8, 6, 2), lambda x: x[..., ::2, ::2])
