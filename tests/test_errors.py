"""Errors that go from one process to another."""

import pickle

import pytest

from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries


@pytest.mark.parametrize(
    "error",
    [MedvitError("a"), UnreadableFile("a/b.dcm", "cut short"), UnreadableSeries("series", "missing-slice", "a gap")],
)
def test_errors_survive_pickling(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error)
    assert (str(again), again.code, vars(again)) == (str(error), error.code, vars(error))
    assert again.args == error.args
