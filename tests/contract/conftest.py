"""Two busy cores decide how long an example takes, not the code under test."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("contract", deadline=None)
settings.load_profile("contract")
