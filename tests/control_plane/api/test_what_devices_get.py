"""What a device gets from the device API, and what it is refused, over real mutual TLS."""

from __future__ import annotations

import contextlib
import json
import socket
from pathlib import Path

import pytest
from sqlalchemy import func, select
from tests.control_plane.api.callers import HUNG_UP, Answer, facts, guarded_routes, member
from tests.control_plane.things import Served, register

from lightship.storage.models import DeadLetter
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.wire import MAX_PACKED, sha256_hex

# What they get ------------------------------------------------------------------------------------------------------


@pytest.fixture
def target(served: Served) -> tuple[str, bytes]:
    """Path and bytes of a bundle as it travels."""
    register(served.home)
    file = next(served.home.releases.targets.rglob("*.zst"))
    return Paths.TARGETS + str(file.relative_to(served.home.releases.targets)), file.read_bytes()


def test_metadata_is_served_as_it_lies_there(served: Served, tmp_path: Path) -> None:
    said = member(served, tmp_path).ask(Paths.METADATA + "timestamp.json")
    assert said.status == 200
    assert said.body == (served.home.releases.metadata / "timestamp.json").read_bytes()
    assert said.headers["content-type"] == "application/json"


@pytest.mark.parametrize("name", ["2.root.json", "timestamp", "timestamp.json.tmp", "a" * 5_000 + ".json", "%00.json"])
def test_unknown_metadata_is_404_and_never_a_page(served: Served, tmp_path: Path, name: str) -> None:
    said = member(served, tmp_path).ask(Paths.METADATA + name)
    assert (said.status, said.code) == (404, "release.unknown")


def test_a_target_is_served_whole_and_by_its_digest(served: Served, tmp_path: Path, target: tuple[str, bytes]) -> None:
    path, data = target
    said = member(served, tmp_path).ask(path)
    assert (said.status, sha256_hex(said.body)) == (200, sha256_hex(data))
    assert sha256_hex(data) in path
    assert said.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("asked", "first", "last"),
    [("bytes=0-0", 0, 1), ("bytes=10-19", 10, 20), ("bytes=100-", 100, None), ("bytes=-7", -7, None)],
)
def test_a_part_of_a_target_is_served_as_206(
    served: Served, tmp_path: Path, target: tuple[str, bytes], asked: str, first: int, last: int | None
) -> None:
    path, data = target
    said = member(served, tmp_path).ask(path, headers={"range": asked})
    begin = first % len(data)
    assert (said.status, said.body) == (206, data[first:last])
    assert said.headers["content-range"] == f"bytes {begin}-{begin + len(said.body) - 1}/{len(data)}"
    assert said.headers["content-length"] == str(len(said.body))


def test_a_range_that_ends_behind_the_file_ends_with_it(
    served: Served, tmp_path: Path, target: tuple[str, bytes]
) -> None:
    path, data = target
    said = member(served, tmp_path).ask(path, headers={"range": f"bytes=5-{10 * len(data)}"})
    assert (said.status, said.body) == (206, data[5:])


def test_a_range_behind_the_file_is_416_and_says_how_long_it_is(
    served: Served, tmp_path: Path, target: tuple[str, bytes]
) -> None:
    path, data = target
    said = member(served, tmp_path).ask(path, headers={"range": f"bytes={len(data)}-"})
    assert said.status == 416
    assert said.headers["content-range"].endswith(f"*/{len(data)}")


def test_if_range_resumes_the_same_file_and_begins_anew_with_another(
    served: Served, tmp_path: Path, target: tuple[str, bytes]
) -> None:
    path, data = target
    device = member(served, tmp_path)
    etag = device.ask(path).headers["etag"]
    same = device.ask(path, headers={"range": "bytes=100-", "if-range": etag})
    other = device.ask(path, headers={"range": "bytes=100-", "if-range": '"another"'})
    assert (same.status, same.body) == (206, data[100:])
    assert (other.status, other.body) == (200, data)


def test_ten_thousand_ranges_cost_no_more_than_the_file(
    served: Served, tmp_path: Path, target: tuple[str, bytes]
) -> None:
    path, data = target
    many = "bytes=" + ",".join(f"{i}-{i}" for i in range(0, 10_000, 2))
    said = member(served, tmp_path).ask(path, headers={"range": many})
    assert said.status in (200, 206, 416)
    assert len(said.body) <= 2 * len(data)


def test_head_says_how_long_a_target_is_without_sending_it(
    served: Served, tmp_path: Path, target: tuple[str, bytes]
) -> None:
    path, data = target
    said = member(served, tmp_path).ask(path, method="HEAD")
    assert (said.status, said.body) == (200, b"")
    assert said.headers["content-length"] == str(len(data))


ESCAPES = (
    "../keys/releases.key",
    "../../lightship.db",
    "%2e%2e/%2e%2e/lightship.db",
    "..%2f..%2flightship.db",
    "..%2F..%2Foperator-token",
    "%2e%2e%2foperator-token",
    "....//....//operator-token",
    "..%5c..%5coperator-token",
    "..%252f..%252foperator-token",
    "/etc/passwd",
    "%2fetc%2fpasswd",
    "bundles/..%2f..%2f..%2foperator-token/x",
    "bundles/../../../operator-token",
    "bundles/%2e%2e/%2e%2e%2f%2e%2e%2foperator-token",
    "../../ca/ca.key",
    "..%2f..%2fca/ca.key/x",
    "bundles/pump/.%00.zst",
    "bundles/pump/%c0%ae%c0%ae",
    "bundles/pump/",
    "bundles//pump",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_path_leads_out_of_the_repository(
    served: Served, tmp_path: Path, target: tuple[str, bytes], escape: str
) -> None:
    device = member(served, tmp_path)
    said: list[Answer] = [device.ask(prefix + escape) for prefix in (Paths.METADATA, Paths.TARGETS)]
    assert {a.status for a in said} <= {400, 404}
    secrets = [served.home.token_path.read_bytes(), (served.home.path / "ca" / "ca.key").read_bytes()[:60]]
    assert not any(s in a.body for a in said for s in secrets)
    assert all(len(a.body) < 200 for a in said)


def test_a_symbolic_link_or_a_folder_is_no_target(served: Served, tmp_path: Path, target: tuple[str, bytes]) -> None:
    folder = target[0].rpartition("/")[0]
    said = member(served, tmp_path).ask(folder + "/.")
    assert said.status == 404


# What is refused ----------------------------------------------------------------------------------------------------


def test_a_report_that_is_too_large_is_413_and_nothing_is_stored(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    before = facts(served.home)
    said = device.ask(Paths.TELEMETRY, method="POST", body=bytes(MAX_PACKED + 1))
    assert (said.status, said.code) == (413, "wire.too-large")
    assert facts(served.home) == before
    assert device.ask(Paths.PING).status == 200


@pytest.mark.parametrize("path", [Paths.ENROL, Paths.RENEW])
def test_a_request_that_is_too_large_is_413(served: Served, tmp_path: Path, path: str) -> None:
    device = member(served, tmp_path)
    before = facts(served.home)
    body = b'{"csr":"' + b"A" * 70_000 + b'"}'
    said = device.ask(path, method="POST", body=body)
    assert (said.status, said.code) == (413, "wire.too-large")
    assert facts(served.home) == before


def test_a_body_without_an_end_is_cut_off_at_its_bound(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    sent, where = 0, served.url.removeprefix("https://").split(":")
    with (
        socket.create_connection((where[0], int(where[1])), timeout=20) as plain,
        device.context().wrap_socket(plain, server_hostname=where[0]) as tls,
    ):
        head = f"POST {Paths.TELEMETRY} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
        tls.sendall(head.encode())
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        tls.settimeout(5)
        said = b""
        try:
            while sent < 400 * len(chunk) and not said:
                tls.sendall(chunk)
                sent += len(chunk)
                tls.settimeout(0.02)
                try:
                    said = tls.recv(4_096)
                except TimeoutError:
                    tls.settimeout(5)
        except (*HUNG_UP, TimeoutError):
            pass
    assert b" 413 " in said.split(b"\r\n")[0]
    assert sent < 20 * MAX_PACKED
    assert device.ask(Paths.PING).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"csr": 7}',
        b"\xff\xfe",
        b"[" * 30_000,
        b'{"token":"a","device":"b"}',
        b'{"csr":"-----BEGIN CERTIFICATE REQUEST-----"}',
    ],
    ids=lambda b: repr(b[:16]),
)
@pytest.mark.parametrize("path", [Paths.ENROL, Paths.RENEW])
def test_a_malformed_request_is_400_and_changes_nothing(served: Served, tmp_path: Path, path: str, body: bytes) -> None:
    device = member(served, tmp_path)
    before = facts(served.home)
    said = device.ask(path, method="POST", body=body)
    assert (said.status, said.code) == (400, "enrol.request")
    assert facts(served.home) == before


def test_a_report_that_is_none_becomes_a_dead_letter(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    said = device.ask(Paths.TELEMETRY, method="POST", body=b"not a report")
    assert (said.status, json.loads(said.body)) == (202, {"code": "wire.malformed", "missing": []})
    with served.home.database.read() as session:
        assert session.scalar(select(func.count()).select_from(DeadLetter)) == 1


def test_the_wrong_method_is_405(served: Served, tmp_path: Path) -> None:
    device = member(served, tmp_path)
    for method, path in guarded_routes(served.home):
        assert device.ask(path, method="DELETE").status == 405
        other = "GET" if method == "POST" else "POST"
        assert device.ask(path, method=other, body=b"{}" if other == "POST" else None).status == 405


def test_plain_http_and_garbage_are_not_answered(served: Served, tmp_path: Path) -> None:
    host, port = served.url.removeprefix("https://").split(":")
    for bytes_sent in (b"GET /v1/ca HTTP/1.1\r\nhost: x\r\n\r\n", b"\x00" * 64, b"\x16\x03\x01\xff\xff"):
        with socket.create_connection((host, int(port)), timeout=5) as plain:
            plain.sendall(bytes_sent)
            plain.shutdown(socket.SHUT_WR)
            said = b""
            with contextlib.suppress(ConnectionError):
                said = plain.recv(4_096)
        assert b"HTTP/1.1 200" not in said
    assert member(served, tmp_path).ask(Paths.PING).status == 200
