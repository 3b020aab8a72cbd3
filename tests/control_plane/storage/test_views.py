"""Views for dashboards: the same on both engines, in nobody's way, and without secrets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic import command
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import DBAPIError
from tests.control_plane.postgres import running_postgres

from lightship.storage.database import Database
from lightship.storage.views import READER, VIEWS

#: What no view may show: credentials, keys, evidence and rows.
SECRET = {"spki", "spki_next", "retired_spki", "secret_hash", "digest_of_token", "envelope", "payload", "x", "y",
          "counts", "evidence", "serial", "nonce"}  # fmt: skip


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'lightship.db'}")
    made.upgrade()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgres() as url:
        yield url.replace("postgresql://", "postgresql+psycopg://")


def columns(database: Database) -> dict[str, list[str]]:
    with database.read() as session:
        return {v.name: list(session.execute(text(f"SELECT * FROM {v.name}")).keys()) for v in VIEWS}


def test_every_view_can_be_read_and_shows_no_secret(database: Database) -> None:
    found = columns(database)
    assert {name: SECRET & set(names) for name, names in found.items() if SECRET & set(names)} == {}
    assert all(found.values())


def test_a_view_shows_a_device_as_its_table_has_it(database: Database) -> None:
    with database.write() as session:
        session.execute(text("INSERT INTO dead_letters VALUES ('1', 7, 'pump-1/tele', 'wire.malformed', 'why', x'00')"))
    with database.read() as session:
        assert session.execute(text("SELECT * FROM view_dead_letters")).all() == [
            ("1", 7, "pump-1/tele", "wire.malformed", "why")
        ]


def test_tables_under_views_can_still_be_changed_and_taken_back(database: Database) -> None:
    command.downgrade(database._alembic(), "0001")
    assert inspect(database.engine).get_view_names() == []

    database.upgrade()

    assert sorted(inspect(database.engine).get_view_names()) == sorted(v.name for v in VIEWS)


def test_what_another_version_called_a_view_is_gone_after_an_upgrade(database: Database) -> None:
    with database.write() as session:
        session.execute(text("CREATE VIEW view_of_old AS SELECT 1 AS one"))
    database.upgrade()
    assert "view_of_old" not in inspect(database.engine).get_view_names()


@pytest.mark.extras("psycopg")
def test_on_postgresql_the_views_are_the_same_and_their_reader_reads_nothing_else(
    server: str, database: Database
) -> None:
    plane = Database(server)
    with plane.engine.begin() as connection:
        connection.execute(text(f"CREATE ROLE {READER} NOLOGIN"))
        connection.execute(text(f"CREATE ROLE grafana LOGIN IN ROLE {READER}"))
    plane.upgrade()
    plane.upgrade()  # made anew, and still readable
    assert columns(plane) == columns(database)

    reader = create_engine(server.replace("lightship@", "grafana@"))
    with reader.connect() as connection:
        for view in VIEWS:
            connection.execute(text(f"SELECT * FROM {view.name}"))
    for forbidden in ("SELECT * FROM devices", "SELECT * FROM join_tokens", "DELETE FROM view_alarms"):
        with reader.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
            connection.execute(text(forbidden))
    reader.dispose()
    plane.close()
