"""Every key of a file and of a network is on exactly one list."""

import pytest
import torch
from torch import nn

from medvit.models.account import drawn_together, take_stock
from medvit.models.reshape import Reshape
from medvit.models.weights import KeyMap, Layout


class Net(nn.Module):
    """Two layers and a counter; ``in_channels`` for the stem."""

    def __init__(self):
        super().__init__()
        self.in_channels = 1
        self.stem, self.head = nn.Conv2d(1, 2, 3), nn.Linear(2, 3)
        self.register_buffer("count", torch.tensor(0))


KEYS = KeyMap("theirs", {r"s\.(\w+)": r"stem.\1", r"(h|h2)\.(\w+)": r"head.\2", "n": "count", r"old\..*": None})


def state(**changes):
    full = {
        "s.weight": torch.ones(2, 1, 3, 3),
        "s.bias": torch.ones(2),
        "h.weight": torch.ones(3, 2),
        "h.bias": torch.ones(3),
        "n": torch.tensor(4),
    }
    for key, value in changes.items():
        full[key.replace("__", ".")] = value
    return {k: v for k, v in full.items() if v is not None}


def stock(given, *, partial=None, allow=False, transform=None, **reshape):
    layout = Layout("theirs", "net", KEYS, (), partial, transform)
    return take_stock(layout, given, Net().to("meta"), Reshape(**reshape), allow)


def test_a_whole_file():
    account, tensors = stock(state(old__thing=torch.zeros(1)))
    assert account.matched == ("stem.weight", "stem.bias", "head.weight", "head.bias", "count")
    assert account.dropped == ("old.thing",)
    assert account.problem() is None
    assert tensors["count"].item() == 4
    assert account.rows() == [
        ("matched", 5, ""),
        ("dropped on purpose", 1, "old.thing"),
        ("missing", 0, ""),
        ("shape differs", 0, ""),
        ("unexplained", 0, ""),
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64])
def test_stored_types_become_the_networks(dtype):
    _, tensors = stock(state(s__bias=torch.tensor([0.5, -3.0]).to(dtype)))
    assert tensors["stem.bias"].dtype == torch.float32
    assert tensors["stem.bias"].tolist() == [0.5, -3.0]


def test_every_fault_is_listed():
    account, _ = stock(
        state(
            s__weight=torch.ones(2, 2, 3, 3),
            h__bias=None,
            h2__weight=torch.ones(3, 2),
            s__scale=torch.ones(1),
            junk=torch.ones(1),
            n=torch.tensor(1.0),
        )
    )
    assert account.missing == ("head.bias",)
    assert account.differs == (
        ("stem.weight", "network (2, 1, 3, 3), file (2, 2, 3, 3)"),
        ("count", "network torch.int64, file torch.float32"),
    )
    assert account.unexplained == (
        ("h2.weight", "a second key for the same parameter"),
        ("s.scale", "this network has no such part"),
        ("junk", ""),
    )
    assert account.matched == ("stem.bias", "head.weight")
    assert account.problem() == "1 missing, 2 of another shape, 3 unexplained; --channels would help"


def test_whole_numbers_where_the_network_has_fractions():
    account, _ = stock(state(h__bias=torch.tensor([1, 2, 3])))
    assert account.differs == (("head.bias", "network torch.float32, file torch.int64"),)


def test_what_was_asked_for_is_done_and_listed():
    account, tensors = stock(state(s__weight=torch.ones(2, 2, 3, 3)), channels="average")
    assert account.adapted == (("stem.weight", "2 channels to 1 (average)"),)
    assert "stem.weight" not in account.matched
    assert account.problem() is None
    assert tensors["stem.weight"].flatten().tolist() == [2.0] * 18
    assert account.rows()[1] == ("adapted", 1, "stem.weight: 2 channels to 1 (average)")


def test_a_part_needs_leave():
    encoder = state(h__weight=None, h__bias=None)
    account, _ = stock(encoder, partial=r"head\..*")
    assert account.problem() == "2 missing; --allow-partial would help"
    account, tensors = stock(encoder, partial=r"head\..*", allow=True)
    assert (account.missing, account.allowed, account.problem()) == ((), ("head.weight", "head.bias"), None)
    assert list(tensors) == ["stem.weight", "stem.bias", "count"]
    assert ("missing, allowed", 2, "head.weight; head.bias") in account.rows()


@pytest.mark.parametrize("partial", [None, r"head\..*"])
def test_no_leave_is_given_for_what_the_layout_does_not_lack_by_nature(partial):
    account, _ = stock(state(h__weight=None, s__bias=None), partial=partial, allow=True)
    assert (account.missing, account.allowed) == (("stem.bias", "head.weight"), ())
    assert account.problem() == "2 missing"


def test_a_transform_comes_before_the_names():
    def fuse(given):
        given["s.weight"] = torch.cat([given.pop("a"), given.pop("b")])
        return given

    given = state(s__weight=None, a=torch.zeros(1, 1, 3, 3), b=torch.ones(1, 1, 3, 3))
    account, tensors = stock(given, transform=fuse)
    assert account.problem() is None
    assert tensors["stem.weight"].sum().item() == 9
    assert {"a", "b"} <= given.keys()  # the caller's dict is left alone


def test_names_for_people():
    names = [*[f"blocks.{i}.norm.weight" for i in range(12)], "head.bias", ("a.1", "why"), ("a.2", "why"), ("a.3", "")]
    assert drawn_together(names) == "blocks.*.norm.weight (12); head.bias; a.* (2): why; a.3"
    assert drawn_together(["a", "b", "c"], most=2) == "a; b; and 1 more kinds"
    assert drawn_together([]) == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value):
    account, _ = stock(state(h__bias=torch.tensor([1.0, value, 1.0])))
    assert account.broken == ("head.bias",) and "head.bias" not in account.matched
    assert account.problem() == "1 with NaN or infinite values"
    assert ("NaN or infinite", 1, "head.bias") in account.rows()
