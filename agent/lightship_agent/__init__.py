"""The device's half of Lightship: pull signed bundles, try them, serve them, watch them, report.

The public surface is small on purpose; everything else is a room of its own:
contract (shared language), runtime, serving, monitor, update, link.

    from lightship_agent import load        a model in your own process (docs/serving.md)
    from lightship_agent import Metrics     your own numbers in the device's reports (docs/device-reports.md)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client.numbers import Metrics
    from .serving.inprocess import Model, load

__version__ = "0.1.0"

__all__ = ["Metrics", "Model", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """Load the runtime only when it is asked for: whoever imports this package may want a constant."""
    if name in {"Model", "load"}:
        from .serving import inprocess

        return getattr(inprocess, name)
    if name == "Metrics":
        from .client.numbers import Metrics

        return Metrics
    message = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(message)
