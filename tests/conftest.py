"""Settings shared by all tests."""

import torch
from hypothesis import settings

# A busy machine must not fail a property; time is watched by the suite as a whole.
settings.register_profile("medvit", deadline=None)
settings.load_profile("medvit")


def pytest_runtest_setup() -> None:
    """Random weights and inputs are a test's own, whatever ran before it and in whichever process."""
    torch.manual_seed(0)
