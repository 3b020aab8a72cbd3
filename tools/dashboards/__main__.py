"""`make dashboards`: write Grafana's dashboards, or with `--check` say which are stale and exit 1."""

from __future__ import annotations

import argparse
import json
import sys

from lightship.dashboards.export import FILES

from .boards import BOARDS

FOLDER = FILES / "grafana" / "dashboards"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m dashboards", description="Write Grafana's dashboards.")
    parser.add_argument("--check", action="store_true", help="Write nothing; exit 1 when one is stale.")
    options = parser.parse_args(arguments)
    found = stale()
    for name, text in found.items():
        if options.check:
            print(f"{name} is stale; run `make dashboards`.")
        else:
            (FOLDER / name).write_text(text, encoding="utf-8")
            print(f"{FOLDER / name}")
    return 1 if options.check and found else 0


def stale() -> dict[str, str]:
    """The text of each dashboard whose file is another one, by the name of the file."""
    made = {f"{name}.json": json.dumps(board.to_json(), indent=2) + "\n" for name, board in BOARDS.items()}
    return {n: t for n, t in made.items() if not (FOLDER / n).exists() or (FOLDER / n).read_text("utf-8") != t}


if __name__ == "__main__":
    sys.exit(main())
