"""The agent's process holds no package that nobody there needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightship_agent import lean


def said_by(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("package", "absent"), [("msgspec", ["typing_extensions"]), ("httpx", ["anyio", "click", "typing_extensions"])]
)
def test_what_a_package_does_without_is_not_there_and_can_still_be_had(package: str, absent: list[str]) -> None:
    program = f"""
import sys
from lightship_agent import lean
lean.load({package!r})
print([name for name in {absent} if name in sys.modules])
import {package}, typing_extensions, anyio
print({package}.__name__, typing_extensions.__name__, anyio.__name__)
"""
    assert said_by(program) == f"[]\n{package} typing_extensions anyio"


def test_the_command_line_loads_nothing_of_the_kind() -> None:
    assert said_by("import sys, lightship_agent.cli; print('typing_extensions' in sys.modules)") == "False"


def test_structs_are_read_without_the_extensions_as_with_them() -> None:
    program = """
import sys
from lightship_agent import lean
lean.load("msgspec")
import msgspec
from lightship_agent.contract.messages import Heartbeat
print(msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(Heartbeat)))["$ref"])
"""
    assert said_by(program) == "#/$defs/Heartbeat"


def test_what_is_loaded_already_stays() -> None:
    before = {name: sys.modules[name] for name in ("msgspec", "typing_extensions") if name in sys.modules}

    lean.load("msgspec")

    assert before.items() <= sys.modules.items()
    assert None not in sys.modules.values()
