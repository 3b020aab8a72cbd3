"""Source: what can only be read in the code's text. Rules: it parses and never imports what it looks at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
AGENT = ROOT / "agent" / "lightship_agent"
CONTROL_PLANE = ROOT / "control_plane" / "lightship"


@dataclass(frozen=True)
class Field:
    """One field of a struct: its annotation, its default and the comment beside it, as written."""

    name: str
    annotation: str
    default: str
    comment: str


@dataclass(frozen=True)
class Struct:
    """A class with annotated fields."""

    name: str
    summary: str
    fields: tuple[Field, ...]
    tag: str


def modules(folder: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Every module below `folder`, in the order of its path."""
    for path in sorted(folder.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """The room a module is in, e.g. `control_plane/fleet`."""
    parts = path.relative_to(ROOT).parts
    inner = parts[2] if len(parts) > 3 else path.stem
    return f"{parts[0]}/{inner}"


def summary(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())


def structs(path: Path) -> list[Struct]:
    """The public message structs of a module, in its order."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found = []
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and _is_struct(node):
            fields = tuple(_field(item, lines) for item in node.body if isinstance(item, ast.AnnAssign))
            tags = [k.value.value for k in node.keywords if k.arg == "tag" and isinstance(k.value, ast.Constant)]
            found.append(Struct(node.name, summary(node), fields, str(tags[0]) if tags else ""))
    return found


def string_constants(tree: ast.AST) -> set[str]:
    """Every string literal below `tree`."""
    return {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def _is_struct(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base) in ("msgspec.Struct", "Record", "NamedTuple") for base in node.bases)


def _field(node: ast.AnnAssign, lines: list[str]) -> Field:
    line = lines[(node.end_lineno or node.lineno) - 1]
    comment = line[node.end_col_offset or 0 :].strip().removeprefix("#").strip()
    default = ast.unparse(node.value) if node.value is not None else ""
    renamed = _renamed(node)
    name = renamed or ast.unparse(node.target)
    return Field(name, ast.unparse(node.annotation), "" if renamed else default, comment)


def _renamed(node: ast.AnnAssign) -> str:
    """The name on the wire, where `msgspec.field(name=…)` gives another."""
    if not isinstance(node.value, ast.Call) or ast.unparse(node.value.func) != "msgspec.field":
        return ""
    return next((str(ast.literal_eval(k.value)) for k in node.value.keywords if k.arg == "name"), "")
