"""A PostgreSQL server of a test's own: on loopback, in a temporary folder, gone afterwards."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lightship.fleet.broker import free_port

INITDB = shutil.which("initdb") or next(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")), None)


@contextmanager
def running_postgres() -> Iterator[str]:
    """Its address, `postgresql://…`; the test is skipped where there is no server or no driver."""
    psycopg = pytest.importorskip("psycopg")
    if INITDB is None:
        pytest.skip("postgresql is not installed")
    # The server refuses to run as root, and nobody else may look into pytest's folders.
    programs, folder = Path(INITDB).parent, Path(tempfile.mkdtemp(prefix="lightship-pg-"))
    folder.chmod(0o777)
    port = free_port("127.0.0.1")
    become = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
    make = [*become, programs / "initdb", "-D", folder / "data", "-U", "lightship", "-A", "trust"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder)
    options = ["-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    words = [*become, programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, *options]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL, cwd=folder)
    url = f"postgresql://lightship@127.0.0.1:{port}/postgres"
    try:
        end = time.monotonic() + 120
        while True:
            try:
                psycopg.connect(url).close()
                break
            except psycopg.OperationalError:
                assert time.monotonic() < end
                time.sleep(0.2)
        yield url
    finally:
        process.send_signal(signal.SIGINT)  # and it waits for nobody
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
