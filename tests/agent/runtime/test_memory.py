"""How much memory there is: from a /proc and a /sys that we wrote, and from this machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightship_agent.runtime.memory import available_bytes, own_bytes, trim_memory


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "proc/meminfo", "MemTotal:  4000 kB\nMemAvailable:  2000 kB\n")
    write(tmp_path / "proc/self/smaps_rollup", "00400000-7fff ---p 00:00 0 [rollup]\nRss: 900 kB\nPss:   700 kB\n")
    return tmp_path


def group(root: Path, path: str, *, limit: str, used: int, files: int = 0) -> None:
    write(root / "sys/fs/cgroup" / path / "memory.max", f"{limit}\n")
    write(root / "sys/fs/cgroup" / path / "memory.current", f"{used}\n")
    write(root / "sys/fs/cgroup" / path / "memory.stat", f"anon 1\ninactive_file {files}\n")


def test_without_a_control_group_the_device_is_the_bound(root: Path) -> None:
    assert available_bytes(root) == 2_000 * 1_024
    assert own_bytes(root) == 700 * 1_024


def test_the_tightest_control_group_is_the_bound_and_pages_of_files_do_not_count(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/system.slice/lightship-agent.service\n")
    group(root, "system.slice/lightship-agent.service", limit="1000000", used=900_000, files=50_000)
    group(root, "system.slice", limit="max", used=0)
    assert available_bytes(root) == 150_000
    group(root, "system.slice", limit="100000", used=40_000)
    assert available_bytes(root) == 60_000
    group(root, "system.slice", limit="100000", used=140_000)
    assert available_bytes(root) == 0


@pytest.mark.parametrize("said", ["", "1:name=systemd:/x\n", "0::/../../etc\n", "\x00\n"])
def test_what_can_not_be_read_bounds_nothing(root: Path, said: str) -> None:
    write(root / "proc/self/cgroup", said)
    assert available_bytes(root) == 2_000 * 1_024


def test_a_system_without_proc_says_nothing(tmp_path: Path) -> None:
    assert available_bytes(tmp_path) is None
    assert own_bytes(tmp_path) is None


def test_this_machine_answers() -> None:
    assert (own_bytes() or 0) > 1 << 20
    assert (available_bytes() or 0) > 1 << 20
    assert trim_memory()
