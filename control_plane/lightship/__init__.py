"""The control plane: trains, versions, converts, signs, releases, and decides what the fleet runs."""

__version__ = "0.1.0"

__all__ = ["__version__"]
