"""Reading fenced blocks: what the docs tell people to type, and what they say will come back."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Command:
    """A line to type, and the lines that are expected."""

    text: str
    expected: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A fenced block. `language` is the first word behind the fence, `words` are the others."""

    language: str
    words: tuple[str, ...]
    body: str

    @property
    def file(self) -> str:
        """The file that the block is the content of, or ""."""
        return next((w.removeprefix("file=") for w in self.words if w.startswith("file=")), "")

    @property
    def commands(self) -> list[Command]:
        """The commands of a console block: lines that begin with `$ `, each with what follows it."""
        found: list[Command] = []
        for line in self.body.splitlines():
            if line.startswith("$ "):
                found.append(Command(line[2:], ()))
            elif found:
                found[-1] = Command(found[-1].text, (*found[-1].expected, line))
        return found


def blocks(path: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    found = []
    for match in _FENCE.finditer(path.read_text(encoding="utf-8")):
        language, *words = match["info"].split() or [""]
        found.append(Block(language, tuple(words), match["body"]))
    return found


def pages() -> list[Path]:
    """Every page that people read: those at the top, the members' own, and docs/."""
    return sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")})
