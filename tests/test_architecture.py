"""The rooms and the arrows between them: the imports of every module are read, and none may point the wrong way."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
AGENT, CONTROL_PLANE = ROOT / "agent", ROOT / "control_plane"
#: What a device must never need.
HEAVY = {"lightship", "sklearn", "scipy", "pandas", "onnx", "skl2onnx", "fastapi", "sqlalchemy", "joblib", "alembic"}
#: What touches the world: files, network, clocks, threads, processes, chance.
WORLDLY = {
    "asyncio", "concurrent", "datetime", "fcntl", "glob", "httpx", "io", "logging", "multiprocessing", "onnxruntime",
    "os", "paho", "pathlib", "random", "secrets", "select", "shutil", "signal", "socket", "sqlalchemy", "ssl",
    "subprocess", "tempfile", "threading", "time", "urllib", "uvicorn", "uuid",
}  # fmt: skip
#: What decides is a function of its arguments.
DECIDERS = (
    "lightship_agent.update.machine",
    "lightship_agent.runtime.compat",
    "lightship.access.rules",
    "lightship.alerting.decide",
    "lightship.alerting.findings",
    "lightship.alerting.payload",
    "lightship.alerting.routes",
    "lightship.alerting.signature",
    "lightship.fleet.rollout",
    "lightship.monitoring.tails",
    "lightship.monitoring.calibration",
    "lightship.monitoring.conformal",
    "lightship.monitoring.drift",
    "lightship.monitoring.memory",
    "lightship.monitoring.replay",
    "lightship.monitoring.fleet",
    "lightship.monitoring.canary",
    "lightship.monitoring.policy",
    "lightship.registry.rules",
    "lightship.training.gate",
)
#: Decisions 0003, 0010 and 0025: beside the contract, the control plane runs a model as the device will, writes files
#: and logs as it does, and fails in tests where it is told to, as it does.
SHARED = (
    "lightship_agent.contract", "lightship_agent.runtime", "lightship_agent.files", "lightship_agent.fail_points",
    "lightship_agent.logs",
)  # fmt: skip
#: `compression` is the standard library's from Python 3.14 on.
STANDARD = frozenset(sys.stdlib_module_names) | {"compression"}
#: Where a distribution's name is not the name one imports.
DISTRIBUTIONS = {"backports": "backports.zstd", "paho": "paho-mqtt", "PIL": "pillow"}


@cache
def modules() -> dict[str, Path]:
    """Every module of both members, by dotted name."""
    found = {}
    for home in (AGENT, CONTROL_PLANE):
        for path in sorted(home.rglob("*.py")):
            parts = path.relative_to(home).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Everything a module imports anywhere in it, as absolute dotted names; `from a import b` gives `a.b`."""
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{source}.{alias.name}" for alias in node.names}
    return frozenset(found)


def roots(module: str) -> set[str]:
    return {name.partition(".")[0] for name in imports(module)}


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == a or name.startswith(f"{a}.") for a in allowed)


def of(package: str) -> list[str]:
    return [name for name in modules() if within(name, (package,))]


def project_imports(module: str) -> Iterator[str]:
    """The project's own modules that a module imports."""
    for name in imports(module):
        if name in modules():
            yield name
        elif name.rpartition(".")[0] in modules():
            yield name.rpartition(".")[0]


def test_the_agent_needs_nothing_that_only_a_server_has() -> None:
    assert {m: roots(m) & HEAVY for m in of("lightship_agent") if roots(m) & HEAVY} == {}


def test_the_contract_imports_the_standard_library_numpy_the_codecs_and_itself() -> None:
    allowed = STANDARD | {"numpy", "msgspec", "backports", "lightship_agent"}
    strangers = {m: roots(m) - allowed for m in of("lightship_agent.contract")}
    others = {
        m: [n for n in imports(m) if n.startswith("lightship_agent") and not within(n, SHARED[:1])] for m in strangers
    }

    assert not any(strangers.values()), strangers
    assert not any(others.values()), others


def test_the_contract_opens_waits_and_rolls_no_dice() -> None:
    assert {m: roots(m) & WORLDLY for m in of("lightship_agent.contract") if roots(m) & WORLDLY} == {}


def test_the_control_plane_takes_from_the_agent_only_what_they_share() -> None:
    taken = {
        m: [n for n in imports(m) if within(n, ("lightship_agent",)) and not within(n, SHARED)] for m in of("lightship")
    }

    assert {m: names for m, names in taken.items() if names} == {}


@pytest.mark.parametrize("module", DECIDERS)
def test_a_decider_and_all_that_it_leans_on_touch_nothing(module: str) -> None:
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        seen.add(name)
        assert not roots(name) & WORLDLY, name
        waiting += [n for n in project_imports(name) if n not in seen]


def test_only_what_the_agent_declares_is_imported_by_it() -> None:
    project = tomllib.loads((AGENT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[<>=;\[ ]", requirement)[0] for requirement in declared}
    imported = {root for module in of("lightship_agent") for root in roots(module)} - STANDARD - {"lightship_agent"}

    assert {DISTRIBUTIONS.get(root, root) for root in imported} <= names


def test_vendors_are_known_only_to_the_room_for_them() -> None:
    knowing = [m for m in of("lightship") if {"iotcore", "mlflow", "boto3", "airflow", "kfp"} & roots(m)]

    assert all(within(m, ("lightship.integrations",)) for m in knowing), knowing


def test_onnxruntime_is_loaded_in_one_place_where_it_is_told_not_to_report() -> None:
    loading = [m for m in modules() if "onnxruntime" in roots(m)]

    assert loading == ["lightship_agent.runtime.ort"]


def test_there_is_no_utils_module() -> None:
    forbidden = {"utils", "util", "helpers", "misc", "common"}

    assert [name for name in modules() if name.rpartition(".")[2] in forbidden] == []


def test_every_module_says_what_room_it_is() -> None:
    written = {n: p for n, p in modules().items() if "migrations" not in p.parts}

    assert [n for n, p in written.items() if not ast.get_docstring(ast.parse(p.read_text()))] == []


@pytest.mark.parametrize("module", [n for n, p in modules().items() if "__all__" in p.read_text()])
def test_what_a_module_promises_is_there(module: str) -> None:
    loaded = importlib.import_module(module)

    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    assert len(loaded.__all__) == len(set(loaded.__all__))
