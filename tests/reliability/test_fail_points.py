"""Fail points: what can be ordered, what is done, and that every name in the code is known."""

from __future__ import annotations

import ast
import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.codes import CODES, LightshipError, SettingsError
from lightship_agent.fail_points import FAIL_POINTS, Order, Saboteur, parse_orders, saboteur_for
from lightship_agent.update.machine import Phase

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = (ROOT / "agent" / "lightship_agent", ROOT / "control_plane" / "lightship")
PHASES = get_args(Phase)
KNOWN = {name.replace("{phase}", phase) for name in FAIL_POINTS for phase in PHASES}


def named_in(source: str) -> Iterator[str]:
    """The names in the calls of fail_point; an f-string's only hole is a phase."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "fail_point":
            name = node.args[0]
            if isinstance(name, ast.Constant):
                yield str(name.value)
            elif isinstance(name, ast.JoinedStr):
                parts = [str(v.value) if isinstance(v, ast.Constant) else "{phase}" for v in name.values]
                yield "".join(parts)


def test_every_fail_point_in_the_code_is_listed_and_every_listed_one_is_in_the_code() -> None:
    found = {name for home in PROGRAMS for path in home.rglob("*.py") for name in named_in(path.read_text())}

    assert found == set(FAIL_POINTS)


def test_every_fail_point_says_where_it_stands() -> None:
    assert all(says.endswith(".") and len(says) > 20 for says in FAIL_POINTS.values())


def test_a_bare_name_is_an_order_to_die() -> None:
    assert parse_orders("soaking") == (Order(point="soaking"),)


def test_an_order_with_everything() -> None:
    (order,) = parse_orders("before-save-trying>file-written(*.json)=error:storage.full@3/always")

    assert order == Order(
        point="file-written", glob="*.json", earlier="before-save-trying", action="error", code="storage.full",
        at_pass=3, always=True,
    )  # fmt: skip


@given(
    st.lists(
        st.builds(
            Order,
            point=st.sampled_from(sorted(KNOWN)),
            glob=st.sampled_from(["*", "update.json", "*.tar"]),
            earlier=st.sampled_from(["", *sorted(KNOWN)]),
            action=st.sampled_from(["kill", "hang", "enospc", "erofs"]),
            at_pass=st.integers(0, 99),
            always=st.booleans(),
        )
    )
)
def test_what_is_written_as_an_order_is_read_as_that_order(orders: list[Order]) -> None:
    text = ",".join(
        f"{o.earlier + '>' if o.earlier else ''}{o.point}({o.glob})={o.action}"
        f"{f'@{o.at_pass}' if o.at_pass else ''}{'/always' if o.always else ''}"
        for o in orders
    )

    assert parse_orders(text) == tuple(orders)


@pytest.mark.parametrize("text", ["soaking=explode", "soaking@0", "=kill", "soaking=error:no.such", "a b", "soaking("])
def test_what_is_no_order_is_refused_and_named(text: str) -> None:
    with pytest.raises(SettingsError, match="LIGHTSHIP_FAIL_POINT: expected") as refused:
        parse_orders(text)

    assert refused.value.code == "settings.invalid"


def test_without_the_variable_there_is_no_saboteur() -> None:
    assert saboteur_for({}) is None
    assert saboteur_for({"LIGHTSHIP_FAIL_POINT_FOLDER": "/nowhere"}) is None


@pytest.mark.parametrize(("action", "number"), [("enospc", errno.ENOSPC), ("erofs", errno.EROFS)])
def test_a_disk_fails_as_the_kernel_says_it(action: str, number: int) -> None:
    saboteur = Saboteur(parse_orders(f"file-begun(update.json)={action}"), None)

    saboteur.passed("file-begun", "boot")
    with pytest.raises(OSError, match=r"No space|Read-only") as failed:
        saboteur.passed("file-begun", "update.json")

    assert failed.value.errno == number


@pytest.mark.parametrize("code", sorted(CODES))
def test_every_code_can_be_ordered(code: str) -> None:
    saboteur = Saboteur(parse_orders(f"probing=error:{code}"), None)

    with pytest.raises(LightshipError) as failed:
        saboteur.passed("probing", "")

    assert failed.value.code == code


def test_with_a_folder_an_order_is_carried_out_once_over_restarts_and_every_pass_is_noted(tmp_path: Path) -> None:
    orders = parse_orders("probing=enospc,soaking=erofs/always")

    with pytest.raises(OSError, match="No space"):
        Saboteur(orders, tmp_path).passed("probing", "")
    restarted = Saboteur(orders, tmp_path)
    restarted.passed("probing", "x")
    for _ in range(2):
        with pytest.raises(OSError, match="Read-only"):
            restarted.passed("soaking", "")

    trace = [line.split(" ", 1)[1].rstrip() for line in (tmp_path / "trace").read_text().splitlines()]
    assert trace == ["probing", "! enospc", "probing x", "soaking", "! erofs", "soaking", "! erofs"]


def test_an_order_waits_for_the_pass_and_for_the_point_it_names() -> None:
    saboteur = Saboteur(parse_orders("before-save-trying>file-written=enospc@2"), None)

    for point in ("file-written", "file-written", "before-save-trying", "file-written"):
        saboteur.passed(point, "")
    with pytest.raises(OSError, match="No space"):
        saboteur.passed("file-written", "")


def test_an_order_waits_for_the_point_with_the_subject_it_names() -> None:
    saboteur = Saboteur(parse_orders("reported(committed)>sending=enospc"), None)

    for point, subject in (("sending", ""), ("reported", "soaking"), ("sending", ""), ("reported", "committed")):
        saboteur.passed(point, subject)
    with pytest.raises(OSError, match="No space"):
        saboteur.passed("sending", "")


def test_a_variable_that_is_set_later_does_nothing_and_at_the_start_it_kills() -> None:
    later = (
        "import os\nfrom lightship_agent.fail_points import fail_point\n"
        "os.environ['LIGHTSHIP_FAIL_POINT'] = 'probing'\nfail_point('probing')\nprint('alive')"
    )
    env = {"PYTHONPATH": str(PROGRAMS[0].parent)}

    harmless = subprocess.run([sys.executable, "-c", later], env=env, capture_output=True, text=True, check=False)
    killed = subprocess.run([sys.executable, "-c", later], env={**env, "LIGHTSHIP_FAIL_POINT": "probing"}, check=False)

    assert harmless.stdout.strip() == "alive"
    assert killed.returncode == -9
