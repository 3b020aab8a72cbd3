"""The agent's process without what nobody here needs.

Rules:
* some packages take others with them where those are installed, and do without where they are not: on a device they do
  without, which saves 2 MB and a good part of the time until the first answer;
* only in the agent's own process, where nobody else wants those others; whatever is loaded already stays;
* msgspec is loaded with this module, which is imported first.
"""

from __future__ import annotations

import importlib
import sys
from typing import Final

#: By package, what it looks for and does without: from Python 3.11 on typing has what msgspec wants of its extensions;
#: httpx serves asyncio by anyio, and a command line by the others.
_DOES_WITHOUT: Final = {
    "msgspec": ("typing_extensions",),
    "httpx": ("anyio", "click", "rich", "trio", "typing_extensions"),
}


def load(package: str) -> None:
    """Import it as if what it does without was not installed; in the main thread, while no other imports anything."""
    absent = [name for name in _DOES_WITHOUT[package] if name not in sys.modules]
    if package in sys.modules:
        return
    for name in absent:
        sys.modules[name] = None  # type: ignore[assignment] # what the import system takes for: there is none
    try:
        importlib.import_module(package)
    finally:
        for name in absent:
            del sys.modules[name]


load("msgspec")
