"""Storage: the database, opened right.

Rules:
* SQLite runs in WAL mode with foreign keys on, a busy timeout, and BEGIN IMMEDIATE for every transaction that may
  write: the driver's deferred BEGIN makes a read-then-write fail as "database is locked" under load;
* `write()` and `read()` are the only doors; both close what they open;
* the schema is made and changed by migrations only, explicitly (`lightship init`, `lightship db upgrade`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, create_engine, event, inspect
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Session

from lightship_agent.contract.codes import StorageError
from lightship_agent.fail_points import fail_point

_MIGRATIONS: Final = Path(__file__).parent / "migrations"
BUSY_SECONDS: Final = 30
_WRITES: Final = "lightship_writes"
#: What SQLite takes for the shared memory beside a database in WAL mode.
SPARE_BYTES: Final = 64 * 1024


class Database:
    """An engine and its two doors."""

    def __init__(self, url: str) -> None:
        """Open `url`, e.g. sqlite:////path/lightship.db or postgresql+psycopg://…."""
        self.url = url
        self.engine: Engine = create_engine(url)
        if self.engine.dialect.name == "sqlite":
            event.listen(self.engine, "connect", _configure_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that may write: committed at the end, rolled back on any error.

        Raises:
            StorageError: storage.full, storage.unwritable, storage.busy, storage.corrupt; nothing was written.
        """
        with self._session(writes=True) as session:
            yield session
            session.flush()
            fail_point("before-commit")
        fail_point("after-commit")

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that only reads; SQLite refuses what would be written through it.

        Raises:
            StorageError: storage.corrupt, storage.unwritable.
        """
        with self._session(writes=False) as session:
            yield session

    @contextmanager
    def _session(self, *, writes: bool) -> Iterator[Session]:
        with (
            _explained(self.engine),
            self.engine.connect().execution_options(**{_WRITES: writes}) as connection,
            connection.begin(),
            Session(connection, expire_on_commit=False) as session,
        ):
            yield session
            session.flush()

    def upgrade(self) -> None:
        """Bring the schema to the newest version.

        Raises:
            StorageError: storage.full, storage.unwritable, storage.busy, storage.corrupt.
        """
        from alembic import command

        with _explained(self.engine):
            command.upgrade(self._alembic(), "head")

    def check_schema(self) -> None:
        """Refuse a database of another version.

        Raises:
            StorageError: storage.schema, storage.corrupt, storage.unwritable.
        """
        from alembic.script import ScriptDirectory

        newest = ScriptDirectory.from_config(self._alembic()).get_current_head()
        found = self.revision()
        if found != newest:
            message = f"Expected schema {newest}, found {found}."
            raise StorageError("storage.schema", message, remedy="Run `lightship db upgrade`.")

    def revision(self) -> str | None:
        """The version of the schema; None for an empty database.

        Raises:
            StorageError: storage.corrupt, storage.unwritable.
        """
        from alembic.runtime.migration import MigrationContext

        with _explained(self.engine), self.engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision()

    def tables(self) -> list[str]:
        """The names of the tables that are there."""
        return inspect(self.engine).get_table_names()

    def _alembic(self) -> Any:
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["engine"] = self.engine
        return config


@contextmanager
def _explained(engine: Engine) -> Iterator[None]:
    """Say what an error of the driver means."""
    try:
        yield
    except DatabaseError as e:
        text = str(e.orig)
        if "disk is full" in text or ("disk I/O error" in text and _is_full(engine)):
            message = f"The database has no space left: {text}."
            raise StorageError("storage.full", message, remedy="Free space and try again.") from e
        # "disk I/O error" is what SQLite says when the system refuses a write for any reason but a full disk.
        if any(word in text for word in ("readonly", "unable to open", "disk I/O error")):
            raise StorageError("storage.unwritable", f"The database can't be written: {text}.") from e
        if any(word in text for word in ("malformed", "not a database")):
            remedy = "Restore it from your backup."
            raise StorageError("storage.corrupt", f"The database is damaged: {text}.", remedy=remedy) from e
        if "is locked" in text:
            message = f"Another program kept the database locked for {BUSY_SECONDS} s."
            raise StorageError("storage.busy", message, remedy="Try again.") from e
        raise


def _is_full(engine: Engine) -> bool:
    """Whether SQLite's file has no room left to grow: opening one needs some, and then the error does not say so."""
    file = engine.url.database if engine.dialect.name == "sqlite" else None
    if not file:
        return False
    with contextlib.suppress(OSError):
        return shutil.disk_usage(Path(file).parent).free < SPARE_BYTES
    return False


def _configure_sqlite(connection: Any, _record: Any) -> None:
    # Transactions are begun by the listener below, never by the driver. Patience comes first: the others may wait.
    connection.isolation_level = None
    for pragma in (f"busy_timeout={BUSY_SECONDS * 1_000}", "journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, True)
    connection.exec_driver_sql(f"PRAGMA query_only={'OFF' if writes else 'ON'}")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
