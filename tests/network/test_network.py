"""Downloads over a real link that fails in every way links do."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.network.conftest import NAME, Asked, Site, certificate
from tests.network.proxy import Fault, Proxy

from lightship_agent.contract.codes import LinkError
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update.download import ATTEMPTS, Terms, download
from lightship_agent.update.rate import bucket_for

SIZE = 3_000_000
DATA = os.urandom(SIZE)
MEGABYTE = 1_000_000
Pause = Callable[[float], None]


def url(proxy: Proxy, scheme: str = "https", host: str = "127.0.0.1") -> str:
    return f"{scheme}://{host}:{proxy.port}/pump.tar.zst"


def says(status: str, body: bytes, *headers: str) -> Callable[[bytes], bytes]:
    """An answer that the link gives by itself."""
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers])
    return lambda _request: head.encode() + b"\r\n\r\n" + body


def refused(site: Site, where: str, part: Path, pause: Pause, code: str, **terms: Any) -> LinkError:
    """The download fails with that code; what was there before is there still, and nothing else."""
    before = part.read_bytes() if part.exists() else None
    with pytest.raises(LinkError) as caught:
        download(site.http, where, part, SIZE, pause=pause, terms=Terms(**terms))
    assert caught.value.code == code
    assert (part.read_bytes() if part.exists() else None) == before
    return caught.value


# Links that break -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("tls", [True, False], ids=["tls", "plain"])
def test_a_link_that_breaks_in_the_middle_costs_no_byte_twice(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause, end: Any, tls: bool
) -> None:
    server = site.serve(tls=tls)
    site.put("pump.tar.zst", DATA)
    link = site.link(server)
    link.fail([Fault(after=MEGABYTE, end=end)] * 2)

    data = download(site.http, url(link, "https" if tls else "http"), tmp_path / "part", SIZE, pause=pause)

    assert data == DATA
    assert [a.status for a in server.asked] == [200, 206, 206]
    # A reset takes along what had arrived and was not read yet, which is more on a busy machine; twice all is 5 MB.
    assert link.downstream < (1.05 if end == "close" else 1.5) * SIZE
    assert len(waits) == 2
    assert all(0 <= w <= 1 for w in waits)


def test_a_link_that_falls_silent_is_given_up_and_taken_up_again(site: Site, tmp_path: Path, pause: Pause) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    link = site.link(server)
    link.fail([Fault(after=MEGABYTE, end="hang")])

    data = download(site.http, url(link), tmp_path / "part", SIZE, pause=pause, terms=Terms(silence_seconds=2))

    assert data == DATA
    assert [a.status for a in server.asked] == [200, 206]


def test_a_link_that_is_always_cut_before_the_handshake_ends_is_tried_so_often_and_no_more(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    link = site.link(server)
    link.usual = Fault(after=100, end="reset")

    refused(site, url(link), tmp_path / "part", pause, "link.unreachable")

    assert server.asked == []
    assert (link.connections, len(waits)) == (ATTEMPTS, ATTEMPTS - 1)


def test_a_link_that_brings_something_each_time_gets_there_in_the_end(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link = site.link(server)
    link.usual = Fault(after=150_000)

    assert download(site.http, url(link, "http"), tmp_path / "part", SIZE, pause=pause) == DATA

    assert len(waits) > 3 * ATTEMPTS


def test_a_link_that_brings_next_to_nothing_is_left_for_later(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link, part = site.link(server), tmp_path / "part"
    link.usual = Fault(after=1_000)

    with pytest.raises(LinkError) as caught:
        download(site.http, url(link, "http"), part, SIZE, pause=pause)

    assert caught.value.code == "link.unreachable"
    assert len(waits) == ATTEMPTS - 1
    assert 0 < part.stat().st_size < 1_000 * ATTEMPTS
    link.usual = Fault()
    assert download(site.http, url(link, "http"), part, SIZE, pause=pause) == DATA


def test_an_answer_that_says_less_than_it_should_is_refused_and_what_is_here_is_kept(
    site: Site, tmp_path: Path, pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA[:-1])
    link, part = site.link(server), tmp_path / "part"
    part.write_bytes(DATA[:1000])

    refused(site, url(link, "http"), part, pause, "link.status")

    assert len(server.asked) == 1


def test_120_mb_over_a_link_that_dies_every_5_mb_arrive_and_cost_less_than_105_percent(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    size = 120 * MEGABYTE
    data = os.urandom(size)
    server = site.serve()
    site.put("pump.tar.zst", data)
    link = site.link(server)
    link.usual = Fault(after=5 * MEGABYTE, end="reset")

    arrived = download(site.http, url(link), tmp_path / "part", size, pause=pause)

    assert sha256_hex(arrived) == sha256_hex(data)
    assert link.downstream < 1.05 * size
    assert len(server.asked) == link.connections
    assert 24 <= link.connections <= 27
    assert {a.status for a in server.asked} == {200, 206}
    with pytest.raises(LinkError):
        download(site.http, url(link) + ".zpatch", tmp_path / "patch", size, pause=pause)
    assert [a for a in server.asked if a.status == 404] == [Asked("/pump.tar.zst.zpatch", "", 404)]
    assert len(waits) == [a.status for a in server.asked].count(206)


def test_a_link_that_swallows_every_packet_is_given_up(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    began = time.monotonic()
    with blackhole("127.0.0.1") as port:
        where = f"https://127.0.0.1:{port}/pump.tar.zst"

        refused(site, where, tmp_path / "part", pause, "link.slow", silence_seconds=0.3, attempts=3)

    assert len(waits) == 2
    assert time.monotonic() - began < 10


# Links that are slow --------------------------------------------------------------------------------------------------


def test_a_drip_after_a_fast_start_is_too_slow(site: Site, tmp_path: Path, pause: Pause) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link, part = site.link(server), tmp_path / "part"

    def fast_then_slow(_request: bytes) -> bytes:
        return f"HTTP/1.1 200 OK\r\nContent-Length: {SIZE}\r\n\r\n".encode() + DATA[:MEGABYTE]

    # The first connection brings a megabyte at once and then hangs, the next ones drip.
    link.fail([Fault(answer=fast_then_slow, end="hang")])
    link.usual = Fault(drip=0.005)
    began = time.monotonic()

    with pytest.raises(LinkError) as caught:
        download(
            site.http,
            url(link, "http"),
            part,
            SIZE,
            pause=pause,
            terms=Terms(silence_seconds=1, answer_seconds=20, grace_seconds=1, attempts=2),
        )

    assert caught.value.code == "link.slow"
    assert time.monotonic() - began < 30
    assert part.read_bytes()[:MEGABYTE] == DATA[:MEGABYTE]


def test_a_head_that_drips_is_not_waited_for(site: Site, tmp_path: Path, pause: Pause) -> None:
    link = site.link(site.serve(tls=False))
    link.usual = Fault(answer=says("200 OK", b"", "X-Padding: " + "x" * 10_000), drip=0.05)
    began = time.monotonic()

    refused(site, url(link, "http"), tmp_path / "part", pause, "link.slow", answer_seconds=0.5, attempts=2)

    assert time.monotonic() - began < 10


def test_a_download_that_takes_longer_than_it_may_is_ended_and_gone_on_with_later(
    site: Site, tmp_path: Path, pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link, part = site.link(server), tmp_path / "part"
    link.fail([Fault(rate=200_000)])

    with pytest.raises(LinkError) as caught:
        download(site.http, url(link, "http"), part, SIZE, pause=pause, terms=Terms(seconds=3))

    assert caught.value.code == "link.slow"
    assert 0 < part.stat().st_size < SIZE
    assert download(site.http, url(link, "http"), part, SIZE, pause=pause) == DATA
    assert server.asked[-1].range != ""


def test_a_bandwidth_cap_is_kept_on_the_wire(site: Site, tmp_path: Path) -> None:
    server, size = site.serve(), 800_000
    site.put("pump.tar.zst", DATA[:size])
    link = site.link(server)
    began = time.monotonic()

    data = download(site.http, url(link), tmp_path / "part", size, rate=bucket_for(200))

    assert data == DATA[:size]
    assert time.monotonic() - began > 3.5  # four seconds' worth, less a full bucket and the last chunk
    # Besides what one second may bring: the bucket, and what the buffers between here and there take unasked.
    assert sum(n for at, n in link.sent if at < began + 1) < 500_000


# Links and servers that refuse or lie ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
def test_what_the_server_refuses_is_asked_for_once(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause, status: int
) -> None:
    server = site.serve()
    if status != 404:
        site.put("pump.tar.zst", DATA)
        server.statuses = [status]

    refused(site, url(site.link(server)), tmp_path / "part", pause, "link.status")

    assert [a.status for a in server.asked] == [status]
    assert waits == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_server_that_stumbles_is_asked_again(site: Site, tmp_path: Path, pause: Pause, status: int) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    server.statuses = [status] * (ATTEMPTS - 1)

    assert download(site.http, url(site.link(server)), tmp_path / "part", SIZE, pause=pause) == DATA

    assert [a.status for a in server.asked] == [status] * (ATTEMPTS - 1) + [200]


def test_a_server_that_never_recovers_is_left_alone(
    site: Site, tmp_path: Path, waits: list[float], pause: Pause
) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    server.statuses = [503] * 100

    refused(site, url(site.link(server)), tmp_path / "part", pause, "link.status")

    assert len(server.asked) == ATTEMPTS
    assert all(0 <= w <= 0.5 * 2**n for n, w in enumerate(waits, 1))


def test_a_range_that_begins_elsewhere_is_refused_and_not_asked_for_again(
    site: Site, tmp_path: Path, pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link, part = site.link(server), tmp_path / "part"
    link.fail([Fault(after=MEGABYTE), Fault(rewrite=(b"content-range: bytes ", b"content-range: bytes 1"))])

    with pytest.raises(LinkError, match="content-range") as caught:
        download(site.http, url(link, "http"), part, SIZE, pause=pause)

    assert caught.value.code == "link.status"
    assert not part.exists()
    assert download(site.http, url(link, "http"), part, SIZE, pause=pause) == DATA
    assert [a.range != "" for a in server.asked] == [False, True, False]


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_a_redirect_is_not_followed(site: Site, tmp_path: Path, pause: Pause, status: str) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link = site.link(server)
    link.usual = Fault(answer=says(status, b"", f"Location: http://127.0.0.1:{server.port}/pump.tar.zst"))

    refused(site, url(link, "http"), tmp_path / "part", pause, "link.status")

    assert server.asked == []
    assert link.connections == 1


def test_the_page_of_a_captive_portal_is_neither_kept_nor_taken_for_the_file(
    site: Site, tmp_path: Path, pause: Pause
) -> None:
    server = site.serve(tls=False)
    site.put("pump.tar.zst", DATA)
    link, part = site.link(server), tmp_path / "part"
    page = b"<html>Please accept our terms</html>"
    link.fail([Fault(answer=says("200 OK", page, "Content-Type: text/html; charset=utf-8"))] * 2)

    e = refused(site, url(link, "http"), part, pause, "link.status")
    assert "portal" in str(e)
    part.write_bytes(DATA[:MEGABYTE])
    refused(site, url(link, "http"), part, pause, "link.status")

    assert download(site.http, url(link, "http"), part, SIZE, pause=pause) == DATA
    assert [a.range for a in server.asked] == [f"bytes={MEGABYTE}-"]


def test_a_captive_portal_without_a_length_is_refused_as_well(site: Site, tmp_path: Path, pause: Pause) -> None:
    link, part = site.link(site.serve(tls=False)), tmp_path / "part"
    link.usual = Fault(answer=lambda _: b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>Hello</html>")
    part.write_bytes(DATA[:MEGABYTE])

    refused(site, url(link, "http"), part, pause, "link.status")


def test_a_portal_that_breaks_into_tls_shows_the_wrong_certificate(site: Site, tmp_path: Path, pause: Pause) -> None:
    portal = site.serve(own=certificate(tmp_path, "portal"))
    site.put("pump.tar.zst", DATA)

    e = refused(site, url(site.link(portal)), tmp_path / "part", pause, "link.unreachable")

    assert "certificate" in str(e).lower()
    assert portal.asked == []


def test_what_does_not_speak_http_is_unreachable(site: Site, tmp_path: Path, pause: Pause) -> None:
    link = site.link(site.serve(tls=False))
    link.usual = Fault(answer=lambda _: b"SSH-2.0-OpenSSH_9.9\r\n")

    refused(site, url(link, "http"), tmp_path / "part", pause, "link.unreachable")

    assert link.connections == ATTEMPTS


# Addresses ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_both_kinds_of_address_work(site: Site, tmp_path: Path, pause: Pause, host: str) -> None:
    server = site.serve(host=host)
    site.put("pump.tar.zst", DATA)
    link = site.link(server, host=host)
    link.fail([Fault(after=MEGABYTE)])
    shown = f"[{host}]" if ":" in host else host

    assert download(site.http, url(link, host=shown), tmp_path / "part", SIZE, pause=pause) == DATA


@pytest.mark.parametrize("listens", ["127.0.0.1", "::1"])
def test_where_one_address_of_a_name_refuses_the_other_is_used(
    site: Site, tmp_path: Path, pause: Pause, monkeypatch: pytest.MonkeyPatch, listens: str
) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    link = site.link(server, host=listens)
    refusing = "::1" if listens == "127.0.0.1" else "127.0.0.1"
    resolve_name_to(monkeypatch, (refusing, link.port), (listens, link.port))

    assert download(site.http, url(link, host=NAME), tmp_path / "part", SIZE, pause=pause) == DATA
    assert len(server.asked) == 1


@pytest.mark.parametrize("listens", ["127.0.0.1", "::1"])
def test_where_one_address_of_a_name_swallows_every_packet_the_other_is_used(
    site: Site, tmp_path: Path, pause: Pause, monkeypatch: pytest.MonkeyPatch, listens: str
) -> None:
    server = site.serve()
    site.put("pump.tar.zst", DATA)
    link = site.link(server, host=listens)
    other = "::1" if listens == "127.0.0.1" else "127.0.0.1"
    with blackhole(other) as silent:
        resolve_name_to(monkeypatch, (other, silent), (listens, link.port))

        data = download(
            site.http, url(link, host=NAME), tmp_path / "part", SIZE, pause=pause, terms=Terms(silence_seconds=2)
        )

    assert data == DATA
    assert [a.status for a in server.asked] == [200]


def resolve_name_to(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> None:
    """What a name server says of a name with several addresses, in this order."""
    resolve = socket.getaddrinfo

    def answer(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        if host not in (NAME, NAME.encode()):
            return resolve(host, port, *args, **kwargs)
        return [found for address, at in addresses for found in resolve(address, at, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)


@contextmanager
def blackhole(host: str) -> Iterator[int]:
    """A port that answers to nothing, not even with a refusal: nobody accepts, and the queue before it is full."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server((host, 0), family=family, backlog=0))
        for _ in range(4):
            waiting = stack.enter_context(socket.socket(family))
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname()[:2])
        time.sleep(0.05)
        yield listener.getsockname()[1]
