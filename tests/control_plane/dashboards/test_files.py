"""The files that users copy: fresh, whole, written together, and naming nothing that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import text
from tests.control_plane.dashboards.files import (
    ALERTS,
    DASHBOARDS,
    RECORDING,
    dashboard,
    expressions,
    known,
    metric_names,
    queries,
    recorded,
    rule_expressions,
    targets,
)
from tests.control_plane.postgres import running_postgres
from tests.docs.test_reference import objection

from dashboards.__main__ import stale
from lightship.cli import cli
from lightship.dashboards.export import FILES, export, files
from lightship.home import Home
from lightship.storage.database import Database
from lightship_agent.contract.codes import StorageError


def test_the_dashboards_are_those_of_their_source() -> None:
    assert list(stale()) == [], "run `make dashboards`"
    assert [p.stem for p in DASHBOARDS] == ["fleet", "ingest-health", "model-and-drift", "rollout"]


def test_every_metric_that_a_rule_or_a_panel_names_exists() -> None:
    named = {p.name: metric_names(rule_expressions(p)) for p in (RECORDING, ALERTS)}
    named |= {p.name: {n for _, e in expressions(p) for n in metric_names(e)} for p in DASHBOARDS}

    assert all(named.values())
    assert {name: sorted(found - known()) for name, found in named.items() if found - known()} == {}


def test_a_metric_that_does_not_exist_is_noticed() -> None:
    assert metric_names('sum(rate(lightship_rows_servd_total{group="lightship_x"}[5m]))') - known() == {
        "lightship_rows_servd_total"
    }


def test_every_recorded_series_is_used() -> None:
    used = metric_names(rule_expressions(ALERTS))
    for path in DASHBOARDS:
        used |= {name for _, e in expressions(path) for name in metric_names(e)}

    assert recorded() - used == set()


def test_commands_that_alerts_advise_are_commands() -> None:
    advised = [c for c in re.findall(r"`([^`]+)`", ALERTS.read_text()) if c.startswith("lightship ")]
    assert len(advised) > 8
    assert [c for c in advised if objection(re.sub(r"\{\{.*?\}\}", "x", c))] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda p: p.stem)
def test_a_dashboard_has_what_grafana_needs_to_provision_it(path: Path) -> None:
    board = dashboard(path)
    panels = board["panels"]

    assert re.fullmatch(r"[a-z-]{1,40}", board["uid"])
    assert len({p["id"] for p in panels}) == len(panels)
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or (panel["targets"] and panel["description"] and panel["datasource"]["uid"])
    cells = [
        (x, y)
        for p in panels
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)), "panels lie on each other"
    uses = set(re.findall(r"\$(group|model)\b", path.read_text()))
    assert uses == {v["name"] for v in board["templating"]["list"]}
    assert {t["datasource"]["uid"] for _, t in targets(path)} <= {"lightship-prometheus", "lightship-sql"}


def test_every_sql_panel_runs_on_the_views_of_sqlite(home: Home) -> None:
    asked = [sql for p in DASHBOARDS for _, sql in queries(p)]
    assert len(asked) == 8
    with home.database.read() as session:
        for sql in asked:
            assert session.execute(text(sql)).all() == []
        assert all(re.search(r"FROM view_\w+", sql) for sql in asked)


@pytest.mark.extras("psycopg")
def test_every_sql_panel_runs_on_the_views_of_postgresql() -> None:
    with running_postgres() as url:
        database = Database(url.replace("postgresql://", "postgresql+psycopg://"))
        database.upgrade()
        with database.read() as session:
            for path in DASHBOARDS:
                for _, sql in queries(path):
                    session.execute(text(sql))
        database.close()


def test_all_files_are_exported_and_once_more_changes_nothing(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["dashboards", "export", str(tmp_path / "out")])

    assert done.exit_code == 0, done.output
    written = {
        str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()
    }
    assert written == files()
    assert len(written) == 10
    assert export(tmp_path / "out")
    assert FILES.joinpath("prometheus", "lightship.alerts.yml").exists()


def test_a_file_that_somebody_changed_is_kept_and_nothing_else_is_written(tmp_path: Path) -> None:
    mine = tmp_path / "prometheus" / "lightship.alerts.yml"
    mine.parent.mkdir()
    mine.write_text("mine")

    with pytest.raises(StorageError, match=r"lightship\.alerts\.yml") as e:
        export(tmp_path)

    assert e.value.code == "storage.exists"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [mine]
    assert mine.read_text() == "mine"

    export(tmp_path, force=True)

    assert mine.read_bytes() == files()["prometheus/lightship.alerts.yml"]


def test_a_folder_that_is_a_file_is_called_unwritable(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(StorageError) as e:
        export(tmp_path / "out")
    assert e.value.code == "storage.unwritable"
    assert (tmp_path / "out").read_text() == "in the way"
