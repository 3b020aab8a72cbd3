"""`make docs`: write docs/reference/, or with `--check` say what is stale and exit 1.

Rules: pages are pure functions of the code; the same code gives the same bytes on any machine; a page that the code
no longer has is removed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .pages import ROOT, render_all

FOLDER = ROOT / "docs" / "reference"


def main(arguments: list[str] | None = None) -> int:
    """Write or check; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m docs_reference", description="Write docs/reference/ from the code."
    )
    parser.add_argument("--check", action="store_true", help="Write nothing; exit 1 when a page is stale.")
    options = parser.parse_args(arguments)
    stale = stale_pages(FOLDER)
    if options.check:
        for name in stale:
            print(f"docs/reference/{name} is stale; run `make docs`.")
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    pages = render_all()
    for name in stale:
        if name in pages:
            (FOLDER / name).write_text(pages[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
        print(f"docs/reference/{name}")
    return 0


def stale_pages(folder: Path) -> list[str]:
    """Names of pages in `folder` that differ from the code, are missing, or have no source any more."""
    pages = render_all()
    there = {p.name: p.read_text(encoding="utf-8") for p in folder.iterdir() if p.suffix in {".md", ".json"}}
    return sorted(name for name in {*pages, *there} if pages.get(name) != there.get(name))


if __name__ == "__main__":
    sys.exit(main())
