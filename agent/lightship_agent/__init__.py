"""The device's half of Lightship: pull signed bundles, try them, serve them, watch them, report.

The public surface is small on purpose; everything else is a room of its own:
contract (shared language), runtime, serving, monitor, update, link.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
