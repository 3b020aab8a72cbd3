"""Audit: every verb that the code writes to the audit log, found by walking its syntax.

Rules: a verb is what stands behind `verb=` in a call of `audit.append`; a name is followed to its assignments in the
same function; an f-string shows its expression in angle brackets; what can't be followed is an error, not a gap.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass

from .source import CONTROL_PLANE, modules, summary

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, order=True)
class Verb:
    """A verb, and the act that writes it."""

    name: str
    subject: str
    where: str
    act: str


def verbs() -> list[Verb]:
    """All of them, by name.

    Raises:
        ValueError: a verb that can't be read from the syntax.
    """
    found: set[Verb] = set()
    for path, tree in modules(CONTROL_PLANE):
        for function in (n for n in ast.walk(tree) if isinstance(n, Function)):
            where = f"{path.relative_to(CONTROL_PLANE)}: {function.name}"
            for call in _appends(function):
                given = {k.arg: k.value for k in call.keywords}
                for name in _names(given["verb"], function):
                    found.add(Verb(name, _text(given["subject"]), where, summary(function)))
    return sorted(found)


def _appends(function: Function) -> list[ast.Call]:
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
    return [c for c in calls if ast.unparse(c.func) == "audit.append" and any(k.arg == "verb" for k in c.keywords)]


def _names(value: ast.expr, function: Function) -> list[str]:
    match value:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.JoinedStr():
            return [_text(value)]
        case ast.IfExp(body=body, orelse=orelse):
            return [*_names(body, function), *_names(orelse, function)]
        case ast.Name(id=name):
            assigned = [n.value for n in ast.walk(function) if isinstance(n, ast.Assign) and _assigns(n, name)]
            if assigned:
                return [found for v in assigned for found in _names(v, function)]
    message = f"{function.name}: the verb {ast.unparse(value)} can't be read from the code."
    raise ValueError(message)


def _assigns(node: ast.Assign, name: str) -> bool:
    return any(isinstance(t, ast.Name) and t.id == name for t in node.targets)


def _text(value: ast.expr) -> str:
    """A string with its expressions in angle brackets."""
    match value:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_text(v) for v in values)
        case ast.FormattedValue(value=inner):
            return _text(inner)
        case _:
            return f"<{ast.unparse(value)}>"
