"""What a download makes of each answer, told by a link that answers by itself; tests/network has the real servers."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.network.proxy import Fault, Proxy

from lightship_agent.contract.codes import LightshipError, LinkError, StorageError, UpdateError
from lightship_agent.update.download import ATTEMPTS, MAX_RETRY_AFTER, Terms, _retry_after, download

SIZE = 300_000
DATA = os.urandom(SIZE)
OTHER = os.urandom(SIZE)


class Server:
    """Answers with what the test wrote down, and remembers the heads of the requests."""

    def __init__(self) -> None:
        self.link = Proxy(("127.0.0.1", 9))
        self.heads: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.link.port}/pump.tar.zst"

    def asked(self, name: str) -> list[str]:
        """That header of each request; nothing where it was not sent."""
        lines = [dict(line.lower().partition(": ")[::2] for line in head.split("\r\n")) for head in self.heads]
        return [each.get(name, "") for each in lines]

    def usually(self, answer: Callable[[int, int], bytes]) -> None:
        """Every answer: from how many requests came before, and where the range begins."""

        def noted(request: bytes) -> bytes:
            self.heads.append(request.decode())
            begin = self.asked("range")[-1].removeprefix("bytes=").rstrip("-")
            return answer(len(self.heads) - 1, int(begin or 0))

        self.link.usual = Fault(answer=noted)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.link.close()


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False) as http:
        yield http


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / "0123.part"


def says(status: str, body: bytes, *headers: str) -> bytes:
    head = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "Connection: close"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def whole(data: bytes = DATA, *headers: str) -> bytes:
    return says("200 OK", data, *headers)


def rest(begin: int, data: bytes = DATA, *headers: str) -> bytes:
    found = f"Content-Range: bytes {begin}-{len(data) - 1}/{len(data)}"
    return says("206 Partial Content", data[begin:], found, *headers)


def get(http: httpx.Client, server: Server, part: Path, waits: list[float] | None = None, **terms: float) -> bytes:
    pause = (lambda _: None) if waits is None else waits.append
    return download(http, server.url, part, SIZE, pause=pause, terms=Terms(**terms))  # type: ignore[arg-type]


def refused(http: httpx.Client, server: Server, part: Path, code: str, *, asked: int = 1) -> LightshipError:
    with pytest.raises(LightshipError) as caught:
        get(http, server, part)
    assert caught.value.code == code
    assert len(server.heads) == asked
    return caught.value


# What is here already -------------------------------------------------------------------------------------------------


def test_what_is_complete_is_not_asked_for(http: httpx.Client, server: Server, part: Path) -> None:
    part.write_bytes(DATA)

    assert get(http, server, part) == DATA
    assert server.link.connections == 0


def test_nothing_is_nothing_and_is_not_asked_for(http: httpx.Client, server: Server, part: Path) -> None:
    assert download(http, server.url, part, 0) == b""
    assert server.link.connections == 0


def test_a_part_that_is_longer_than_the_file_is_not_a_part_of_it(
    http: httpx.Client, server: Server, part: Path
) -> None:
    part.write_bytes(OTHER + b"!")
    server.usually(lambda n, begin: whole())

    assert get(http, server, part) == DATA
    assert server.asked("range") == [""]


def test_a_download_killed_in_the_middle_is_gone_on_with_by_the_next_process(
    http: httpx.Client, server: Server, part: Path
) -> None:
    server.usually(lambda n, begin: rest(begin) if begin else whole())
    server.link.fail([Fault(answer=server.link.usual.answer, rate=200_000)])
    program = (
        "import sys, httpx; from pathlib import Path; from lightship_agent.update.download import download\n"
        "download(httpx.Client(trust_env=False), sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", program, server.url, part, str(SIZE)], env=environment) as victim:
        end = time.monotonic() + 120
        while not (part.exists() and part.stat().st_size > 50_000) and time.monotonic() < end:
            time.sleep(0.01)
        victim.send_signal(signal.SIGKILL)
    had = part.stat().st_size
    assert 50_000 < had < SIZE

    assert get(http, server, part) == DATA

    assert server.asked("range")[-1] == f"bytes={had}-"


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, SIZE), max_size=12))
def test_wherever_and_however_often_it_is_cut_the_file_is_the_file(http: httpx.Client, cuts: list[int]) -> None:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = Server()
        stack.callback(server.link.close)
        server.usually(lambda n, begin: (rest(begin) if begin else whole())[: cuts[n] if n < len(cuts) else None])

        assert get(http, server, folder / "part", attempts=20) == DATA
        assert server.link.downstream <= SIZE + len(server.heads) * 300


# Is it still the same file? -------------------------------------------------------------------------------------------


def test_the_tag_of_the_file_goes_with_the_range(http: httpx.Client, server: Server, part: Path) -> None:
    server.usually(lambda n, begin: rest(begin, DATA, 'ETag: "one"') if begin else whole(DATA, 'ETag: "one"')[:99_000])

    assert get(http, server, part) == DATA

    assert server.asked("if-range") == ["", '"one"']
    assert [p.name for p in part.parent.iterdir()] == [part.name]


def test_a_file_that_has_become_another_is_fetched_from_its_beginning(
    http: httpx.Client, server: Server, part: Path
) -> None:
    server.usually(lambda n, begin: whole(DATA, 'ETag: "two"') if n else whole(OTHER, 'ETag: "one"')[:99_000])

    assert get(http, server, part) == DATA


def test_replicas_that_name_one_file_differently_do_not_make_it_start_over_for_ever(
    http: httpx.Client, server: Server, part: Path
) -> None:
    def replica(n: int, begin: int) -> bytes:
        mine = f'"replica-{n}"'
        condition = server.asked("if-range")[-1]
        if begin and condition in ("", mine):
            return rest(begin, DATA, f"ETag: {mine}")[:99_000]
        return whole(DATA, f"ETag: {mine}")[:99_000]

    server.usually(replica)

    assert get(http, server, part) == DATA
    assert server.asked("if-range").count("") == len(server.heads) - 1


@pytest.mark.parametrize("etag", ['W/"weak"', "bare", '"two" lines', '"' + "x" * 300 + '"'])
def test_a_tag_that_does_not_promise_the_same_bytes_is_not_used(
    http: httpx.Client, server: Server, part: Path, etag: str
) -> None:
    server.usually(lambda n, begin: rest(begin) if begin else whole(DATA, f"ETag: {etag}")[:99_000])

    assert get(http, server, part) == DATA
    assert server.asked("if-range") == ["", ""]


def test_a_server_that_knows_no_ranges_is_not_asked_again_and_again_for_the_whole(
    http: httpx.Client, server: Server, part: Path
) -> None:
    server.usually(lambda n, begin: whole()[:200_000])

    with pytest.raises(LinkError, match="still not complete|peer closed") as caught:
        get(http, server, part)

    assert caught.value.code == "link.unreachable"
    assert server.link.downstream < 3 * SIZE


def test_a_file_that_ends_before_our_part_does_begins_anew_the_next_time(
    http: httpx.Client, server: Server, part: Path
) -> None:
    part.write_bytes(OTHER[:99_000])
    server.usually(lambda n, begin: whole() if n else says("416 Range Not Satisfiable", b""))

    refused(http, server, part, "link.status")

    assert not part.exists()
    assert get(http, server, part) == DATA


# Answers that are not the file ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        rest(0),
        says("204 No Content", b""),
        says("304 Not Modified", b""),
        says("200 OK", DATA, "Content-Encoding: gzip"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        whole(DATA[:-1]),
        whole(DATA + b"!"),
    ],
    ids=["part-unasked", "nothing", "not-modified", "encoded", "chunked", "short", "long"],
)
def test_what_is_not_the_file_is_asked_for_once_and_not_kept(
    http: httpx.Client, server: Server, part: Path, answer: bytes
) -> None:
    server.usually(lambda n, begin: answer)

    refused(http, server, part, "link.status")

    assert not part.exists()


@pytest.mark.parametrize(
    "content_range", ["", "bytes 0-299999/300000", "bytes 99000-299999/*", "bytes 99000-300000/300001", "bytes x"]
)
def test_a_range_that_is_not_the_rest_is_refused(
    http: httpx.Client, server: Server, part: Path, content_range: str
) -> None:
    part.write_bytes(DATA[:99_000])
    server.usually(lambda n, begin: says("206 Partial Content", DATA[99_000:], f"Content-Range: {content_range}"))

    refused(http, server, part, "link.status")

    assert not part.exists() or part.read_bytes() == DATA[:99_000]


def test_more_than_was_signed_is_refused_however_long_it_says_it_is(
    http: httpx.Client, server: Server, part: Path
) -> None:
    endless = b"HTTP/1.0 200 OK\r\nContent-Type: application/octet-stream\r\n\r\n" + DATA + b"!" * 500_000
    server.usually(lambda n, begin: endless)

    refused(http, server, part, "link.status")

    assert not part.exists()


def test_an_address_that_is_none_is_not_tried_again(http: httpx.Client, part: Path) -> None:
    waits: list[float] = []
    for url in ("http://[::1", "gopher://there/x", "https://"):
        with pytest.raises(LinkError) as caught:
            download(http, url, part, SIZE, pause=waits.append)
        assert caught.value.code == "link.unreachable"
    assert waits == []


# A server that asks for time ------------------------------------------------------------------------------------------


def test_a_server_that_names_a_time_is_not_asked_before_it(http: httpx.Client, server: Server, part: Path) -> None:
    waits: list[float] = []
    now = time.time() - 10 * 365 * 86_400  # its clock, not ours
    date = f"Date: {formatdate(now, usegmt=True)}", f"Retry-After: {formatdate(now + 90, usegmt=True)}"
    answers = [says("503 Busy", b"", "Retry-After: 120"), says("429 Slow Down", b"", *date), whole()]
    server.usually(lambda n, begin: answers[n])

    assert get(http, server, part, waits) == DATA

    assert 120 <= waits[0] <= 121
    assert 90 <= waits[1] <= 92


@pytest.mark.parametrize("asks", [str(int(MAX_RETRY_AFTER) + 1), "9" * 5_000])
def test_a_server_that_asks_for_too_much_time_is_left_alone(
    http: httpx.Client, server: Server, part: Path, asks: str
) -> None:
    server.usually(lambda n, begin: says("503 Busy", b"", f"Retry-After: {asks}"))

    refused(http, server, part, "link.status")


@given(st.text(max_size=30) | st.from_regex(r"[A-Z][a-z]{2}, \d{1,6} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d GMT"))
def test_a_time_that_makes_no_sense_is_no_time(text: str) -> None:
    asked = _retry_after(httpx.Headers([(b"retry-after", text.encode())]))

    assert asked is None or asked >= 0


def test_without_a_time_the_waits_are_random_and_grow(http: httpx.Client, server: Server, part: Path) -> None:
    waits: list[float] = []
    server.usually(lambda n, begin: says("500 Oh", b""))

    for _ in range(10):
        with pytest.raises(LinkError):
            get(http, server, part, waits)

    rounds = [waits[i : i + ATTEMPTS - 1] for i in range(0, len(waits), ATTEMPTS - 1)]
    assert all(0 <= w <= 0.5 * 2**n for each in rounds for n, w in enumerate(each, 1))
    assert max(each[-1] for each in rounds) > 2
    assert len({round(w, 6) for w in waits}) > len(waits) / 2


# The caller, and the disk ---------------------------------------------------------------------------------------------


def test_a_stop_is_heard_between_two_chunks_and_what_has_come_stays(
    http: httpx.Client, server: Server, part: Path
) -> None:
    server.usually(lambda n, begin: rest(begin) if begin else whole())

    with pytest.raises(UpdateError) as caught:
        download(http, server.url, part, SIZE, stopped=lambda: part.exists() and part.stat().st_size > 10_000)

    assert caught.value.code == "update.interrupted"
    assert 10_000 < part.stat().st_size < SIZE
    assert get(http, server, part) == DATA


def test_a_stop_is_heard_while_nobody_answers(http: httpx.Client, server: Server, part: Path) -> None:
    server.link.usual = Fault(answer=lambda _: b"", end="hang")
    began = time.monotonic()

    with pytest.raises(UpdateError):
        download(http, server.url, part, SIZE, stopped=lambda: time.monotonic() > began + 0.5)

    assert time.monotonic() - began < 10  # and not till the silence is too long


def test_whatever_the_caller_raises_instead_of_stopping_comes_through(
    http: httpx.Client, server: Server, part: Path
) -> None:
    server.usually(lambda n, begin: whole())

    def closed() -> bool:
        raise UpdateError("update.deferred", "The window is closed.")

    with pytest.raises(UpdateError, match="closed"):
        download(http, server.url, part, SIZE, stopped=closed)
    assert server.heads == []


def test_where_there_is_no_room_nothing_is_asked_for(http: httpx.Client, server: Server, part: Path) -> None:
    with pytest.raises(StorageError) as caught:
        get(http, server, part, reserve=1 << 60)

    assert caught.value.code == "storage.full"
    assert server.link.connections == 0
    assert list(part.parent.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_gets_its_room_back(http: httpx.Client, server: Server, part: Path) -> None:
    server.usually(lambda n, begin: whole())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(StorageError) as caught:
            get(http, server, part)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert caught.value.code == "storage.full"
    assert not part.exists()


def test_a_folder_that_is_not_there_cannot_be_written(http: httpx.Client, server: Server, part: Path) -> None:
    with pytest.raises(StorageError) as caught:
        get(http, server, part.parent / "absent" / "part")

    assert caught.value.code == "storage.unwritable"
