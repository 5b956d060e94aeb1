import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, Subset

from medvit.pretrain.stream import Stream, seed_everything


class Items:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"index": index, "drawn": torch.rand(()), "name": "text is left out"}


class Whole(Items):
    def batch(self, indices):
        return {"index": torch.tensor(indices)}


class Seeded:
    """A MONAI transform has a generator of its own."""

    def set_random_state(self, seed):
        self.R = np.random.RandomState(seed)


class Transformed(Items):
    def __init__(self, count):
        super().__init__(count)
        self.transform = Seeded()

    def __getitem__(self, index):
        return {"index": index, "drawn": self.transform.R.rand()}


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 5))
def test_every_item_comes_once_per_epoch(count, batch_size, seed):
    stream = Stream([Items(count)], batch_size, seed=seed)
    keys = [key for number in range(-(-3 * count // batch_size)) for key in stream.keys(number)]
    assert len(keys) >= 3 * count
    for epoch in range(3):
        mine = keys[epoch * count : (epoch + 1) * count]
        assert {key.epoch for key in mine} == {epoch}
        assert sorted(key.item for key in mine) == list(range(count))


def test_processes_share_a_batch_without_overlap():
    whole = Stream([Items(30), Items(7)], 6, seed=1)
    parts = [Stream([Items(30), Items(7)], 6, seed=1, rank=rank, world=3) for rank in range(3)]
    for number in range(12):
        assert whole.keys(number) == [key for part in parts for key in part.keys(number)]
        assert {key.source for key in whole.keys(number)} == {number % 2}


def test_order_differs_between_epochs_seeds_and_sources():
    def orders(seed):
        stream = Stream([Items(50), Items(50)], 50, seed=seed)
        return [tuple(key.item for key in stream.keys(number)) for number in range(4)]

    assert len({*orders(0), *orders(1)}) == 8
    assert orders(3) == orders(3)


def some_of(count):
    return Subset(Transformed(count + 2), range(count))


def one_after_the_other(count):
    return ConcatDataset([Transformed(4), some_of(count - 4)])


@pytest.mark.parametrize("source", [Items, Transformed, some_of, one_after_the_other])
def test_items_draw_the_same_numbers_wherever_they_are_loaded(source):
    stream = Stream([source(10)], 4, seed=2)
    whole = list(stream.batches(0, 6))
    late = list(stream.batches(4, 6))
    workers = list(Stream([source(10)], 4, seed=2, num_workers=2).batches(0, 6))
    for one, other in zip([*whole, *whole[4:]], [*workers, *late], strict=True):
        assert one.keys() == other.keys() == {"index", "drawn"}
        assert all(torch.equal(one[key], other[key]) for key in one)
    drawn = torch.cat([batch["drawn"] for batch in whole])
    assert len(set(drawn.tolist())) == 24  # an item is drawn anew in each epoch


def test_a_source_may_make_whole_batches():
    stream = Stream([Whole(10)], 4, seed=2)
    (batch,) = stream.batches(1, 2)
    assert batch["index"].tolist() == [key.item for key in stream.keys(1)]


class MetaTensor(torch.Tensor):
    """As MONAI's."""


def test_tensors_become_plain_ones():
    class Meta(Items):
        def __getitem__(self, index):
            return {"image": torch.ones(1, 2).as_subclass(MetaTensor)}

    (batch,) = Stream([Meta(4)], 2).batches(0, 1)
    assert type(batch["image"]) is torch.Tensor and batch["image"].shape == (2, 1, 2)


def test_epochs_and_batches():
    stream = Stream([Items(10), Items(99)], 4)
    assert (stream.batches_in(1), stream.batches_in(2), stream.batches_in(0.1)) == (6, 10, 2)
    assert stream.epochs_in(10) == 2.0
    counts = Counter(key.item for number in range(0, 10, 2) for key in stream.keys(number))
    assert set(counts.values()) == {2}


def test_a_key_seeds_every_generator():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random()  # noqa: NPY002

    seed_everything(1, 2, 3)
    first = draw()
    seed_everything(1, 2, 3)
    assert draw() == first
    seed_everything(1, 2, 4)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Stream([], 4), r"needs items, got sizes \[\]"),
        (lambda: Stream([Items(3), Items(0)], 4), r"got sizes \[3, 0\]"),
        (lambda: Stream([Items(3)], 5, world=2), "2 processes must share a batch evenly, got 5"),
        (lambda: Stream([Items(3)], 0), "evenly, got 0"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
