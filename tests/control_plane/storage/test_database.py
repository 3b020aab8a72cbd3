"""The database: its schema is the models', its doors are the only ones, and its errors have words."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import select, text

from lightship.home import Home
from lightship.storage.database import Database
from lightship.storage.models import Alias, Base
from lightship_agent.contract.codes import StorageError

WRITERS, EACH = 4, 25


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'lightship.db'}")
    made.upgrade()
    yield made
    made.close()


def aliases(database: Database) -> list[str]:
    with database.read() as session:
        return sorted(session.scalars(select(Alias.alias)))


def add(database: Database, alias: str) -> None:
    with database.write() as session:
        session.add(Alias(model="pump", alias=alias, version=1))


def test_migrating_an_empty_database_gives_exactly_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        difference = compare_metadata(context, Base.metadata)
    assert difference == []
    assert set(database.tables()) == {*Base.metadata.tables, "alembic_version"}
    database.check_schema()


def test_migrating_twice_changes_nothing(database: Database) -> None:
    add(database, "kept")
    database.upgrade()
    assert aliases(database) == ["kept"]


def test_a_database_of_another_version_is_refused_with_the_command_that_helps(database: Database) -> None:
    with database.write() as session:
        session.execute(text("update alembic_version set version_num = '0000'"))
    with pytest.raises(StorageError, match="lightship db upgrade") as e:
        database.check_schema()
    assert e.value.code == "storage.schema"


def test_a_folder_without_a_database_is_no_home(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lightship init") as e:
        Home.open(tmp_path)
    assert e.value.code == "storage.not-initialised"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_no_database_is_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "lightship.db").write_bytes(b"these are not the pages of a database" * 200)
    with pytest.raises(StorageError, match="backup") as e:
        Home.open(tmp_path)
    assert e.value.code == "storage.corrupt"


def test_an_error_inside_the_write_door_takes_everything_back(database: Database) -> None:
    def act() -> None:
        with database.write() as session:
            session.add(Alias(model="pump", alias="half", version=1))
            session.flush()
            raise KeyError

    with pytest.raises(KeyError):
        act()
    assert aliases(database) == []


def test_nothing_can_be_written_through_the_read_door(database: Database) -> None:
    with pytest.raises(StorageError, match="readonly"), database.read() as session:
        session.add(Alias(model="pump", alias="smuggled", version=1))
    assert aliases(database) == []
    add(database, "honest")  # the same pooled connection writes again through the other door
    assert aliases(database) == ["honest"]


def test_readers_go_on_while_somebody_writes(database: Database) -> None:
    add(database, "before")
    with database.write() as session:
        session.add(Alias(model="pump", alias="under-way", version=1))
        session.flush()
        assert aliases(database) == ["before"]
    assert aliases(database) == ["before", "under-way"]


def test_foreign_keys_and_write_ahead_are_on_for_every_connection(database: Database) -> None:
    for door in (database.read, database.write):
        with door() as session:
            assert session.scalar(text("pragma foreign_keys")) == 1
            assert session.scalar(text("pragma journal_mode")) == "wal"
            assert session.scalar(text("pragma synchronous")) == 2


def test_four_processes_that_read_and_then_write_never_see_a_locked_database(database: Database) -> None:
    # Read-then-write in one transaction is what fails with deferred transactions.
    program = textwrap.dedent(f"""
        import sys
        from sqlalchemy import func, select
        from lightship.storage.database import Database
        from lightship.storage.models import Alias
        database = Database(sys.argv[1])
        for i in range({EACH}):
            with database.write() as session:
                n = session.scalar(select(func.count()).select_from(Alias))
                session.add(Alias(model=sys.argv[2], alias=f"a{{i}}", version=n + 1))
        database.close()
    """)
    writers = [
        subprocess.Popen([sys.executable, "-c", program, database.url, f"writer-{n}"], stderr=subprocess.PIPE)
        for n in range(WRITERS)
    ]
    said = [w.communicate(timeout=120)[1].decode() for w in writers]
    assert [w.returncode for w in writers] == [0] * WRITERS, said
    with database.read() as session:
        # Each saw what the others had committed: the numbers have no gap and no double.
        numbers = sorted(session.scalars(select(Alias.version)))
    assert numbers == list(range(1, WRITERS * EACH + 1))


def test_four_processes_that_begin_at_once_make_one_schema(tmp_path: Path) -> None:
    # The first open also switches the journal, which needs the file alone.
    Database(f"sqlite:///{tmp_path / 'lightship.db'}").close()
    program = (
        "import sys; from lightship.storage.database import Database as D\nd = D(sys.argv[1])\nwith d.write(): pass"
    )
    url = f"sqlite:///{tmp_path / 'lightship.db'}"
    opened = [subprocess.Popen([sys.executable, "-c", program, url], stderr=subprocess.PIPE) for _ in range(WRITERS)]
    said = [o.communicate(timeout=120)[1].decode() for o in opened]
    assert [o.returncode for o in opened] == [0] * WRITERS, said


def test_a_writer_that_waits_too_long_is_told_who_is_in_the_way(database: Database) -> None:
    impatient = Database(database.url)
    with impatient.write() as session:
        session.execute(text("pragma busy_timeout = 50"))
    with database.write(), pytest.raises(StorageError, match="Another program") as e, impatient.write():
        pass
    impatient.close()
    assert e.value.code == "storage.busy"


def test_a_full_database_says_so_and_keeps_nothing_of_the_write(database: Database) -> None:
    add(database, "before")
    with database.write() as session:
        pages = session.scalar(text("pragma page_count"))
        session.execute(text(f"pragma max_page_count = {pages + 2}"))
    with pytest.raises(StorageError, match="Free space") as e, database.write() as session:
        session.add(Alias(model="x" * 200_000, alias="too-much", version=1))
    assert e.value.code == "storage.full"
    assert aliases(database) == ["before"]
    add(database, "after")
    assert aliases(database) == ["after", "before"]


def test_at_the_limit_of_file_sizes_nothing_is_half_written(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import json, resource, signal, sys
        from pathlib import Path
        from sqlalchemy import select
        from lightship.home import Home
        from lightship.storage.models import Alias
        from lightship_agent.contract.codes import StorageError

        home = Home.create(Path(sys.argv[1]))
        kept = home.artifacts.put(b"small")
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        most = max(p.stat().st_size for p in Path(sys.argv[1]).glob("lightship.db*")) + 8_192
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        codes = []
        def row():
            with home.database.write() as session:
                session.add(Alias(model="x" * 2 * most, alias="too-much", version=1))
        for attempt in (row, lambda: home.artifacts.put(b"y" * 2 * most)):
            try:
                attempt()
            except StorageError as e:
                codes.append(e.code)
        with home.database.read() as session:
            rows = list(session.scalars(select(Alias.alias)))
        home.close()
        print(json.dumps({"codes": codes, "rows": rows, "kept": kept}))
    """)
    home = tmp_path / "home"
    done = subprocess.run([sys.executable, "-c", program, str(home)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    assert said["codes"] == ["storage.unwritable", "storage.full"]
    assert said["rows"] == []
    files = [p for p in (home / "artifacts").rglob("*") if p.is_file()]
    assert [p.name for p in files] == [said["kept"]]
    with sqlite3.connect(home / "lightship.db") as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()
