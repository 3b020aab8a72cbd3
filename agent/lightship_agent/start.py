"""`lightship-agent` as a program: what is to be so before anything else is loaded.

Rules: most of the time until the first answer goes by loading code, which makes no garbage: nobody looks for any until
the agent serves (see `Agent.run`).
"""

from __future__ import annotations

import gc
import sys


def main() -> int:
    """Run the command line; the process exit status."""
    if sys.argv[1:2] == ["run"]:
        gc.disable()
    from .cli import main as command

    return command()


if __name__ == "__main__":
    sys.exit(main())
