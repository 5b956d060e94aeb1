"""Settings shared by all tests."""

from hypothesis import settings

# A busy machine must not fail a property; time is watched by the suite as a whole.
settings.register_profile("medvit", deadline=None)
settings.load_profile("medvit")
