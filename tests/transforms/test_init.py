import pytest

import medvit.transforms


def test_every_name_loads_and_an_unknown_one_does_not():
    for name in medvit.transforms.__all__:
        assert getattr(medvit.transforms, name).__name__ == name
    with pytest.raises(AttributeError, match=r"^module 'medvit.transforms' has no attribute 'Nothing'$"):
        medvit.transforms.Nothing  # noqa: B018
