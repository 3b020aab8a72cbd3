"""Update: the former name of `update.download`, for those who still import it from here."""

from __future__ import annotations

from .download import ATTEMPTS, download

__all__ = ["ATTEMPTS", "download"]
