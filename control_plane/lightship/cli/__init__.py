"""`lightship`: the control plane's command line.

Rules: tables for people, `--json` for machines; progress goes to stderr; errors carry their code, and the exit status
is that of their family (docs/reference/errors.md); heavy libraries are imported by the commands that need them.
"""

from .root import cli, main

__all__ = ["cli", "main"]
