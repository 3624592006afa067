"""No deadline for hypothesis: a busy machine is not a broken law."""

from hypothesis import settings

settings.register_profile("data", settings(), deadline=None)
settings.load_profile("data")
