"""Who may ask over TCP: real TLS, real certificates, tokens in real files, and pages of browsers that may not."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lightship.fleet.ca import CertificateAuthority
from lightship_agent.client import AsyncClient, Client
from lightship_agent.contract.codes import LightshipError, SettingsError
from lightship_agent.runtime.model import LoadedModel
from lightship_agent.serving import tls
from lightship_agent.serving.access import Access, Door, Tls, Watched, access_of, add_token, read_tokens
from lightship_agent.serving.connections import Limits
from lightship_agent.serving.dataplane import DataPlane
from lightship_agent.serving.http import create_app
from lightship_agent.serving.server import HttpServer

Models = Callable[..., LoadedModel]
ROW = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [1, 4], "data": [0.5] * 4}]}
INFER = "/v2/models/pump/infer"
WIDE = "0.0.0.0"


class Papers:
    """An authority, and files signed by it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = CertificateAuthority(folder / "ca")
        self.authority.create()
        self.ca = self.authority.certificate_path
        self.certificate, self.key = folder / "server.pem", folder / "server.key"
        self.renew()

    def renew(self) -> None:
        """A new certificate over a new key, under the names of the old files."""
        for path, content in zip((self.key, self.certificate), self.authority.issue_server(["localhost"]), strict=True):
            fresh = path.with_suffix(".fresh")
            fresh.write_bytes(content)
            fresh.rename(path)

    def client(self, name: str = "scada") -> tuple[Path, Path]:
        """Certificate and key of somebody."""
        key, chain = self.authority.issue_client(name)
        (self.folder / f"{name}.key").write_bytes(key)
        (self.folder / f"{name}.pem").write_bytes(chain)
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def tls(self, *, mutual: bool = False) -> Tls:
        return Tls(self.certificate, self.key, self.ca if mutual else None)


@pytest.fixture
def papers(tmp_path: Path) -> Papers:
    return Papers(tmp_path)


@contextlib.contextmanager
def serving(
    model: LoadedModel, access: Access, *, host: str = "127.0.0.1", limits: Limits | None = None, **more: Any
) -> Iterator[tuple[DataPlane, str]]:
    """A data plane behind a server with that access, and the server's address without the scheme."""
    plane = DataPlane(lambda *_: None)
    plane.install(model)
    app = create_app(plane, status=dict, metrics=str)
    server = HttpServer(app, host=host, port=0, access=access, limits=limits, **more)
    server.start()
    try:
        yield plane, f"localhost:{(server.address or ('', 0))[1]}"
    finally:
        server.stop()


def code(reply: httpx.Response) -> tuple[int, str]:
    said = reply.json()
    assert set(said) == {"error", "code"}
    return reply.status_code, said["code"]


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# Bound wider than loopback --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", [WIDE, "::", "203.0.113.7"])
@pytest.mark.parametrize("has", ["nothing", "tokens", "tls"])
def test_what_other_machines_reach_is_refused_at_start_without_both_halves(papers: Papers, host: str, has: str) -> None:
    tokens = papers.folder / "tokens"
    add_token(tokens, "scada")
    access = Access(papers.tls() if has == "tls" else None, tokens if has == "tokens" else None)
    app = create_app(DataPlane(lambda *_: None), status=dict, metrics=str)

    with pytest.raises(SettingsError) as refused:
        HttpServer(app, host=host, port=0, access=access).start()

    assert refused.value.code == "settings.exposed"
    assert ("TLS" in refused.value.message) == (has != "tls")
    assert ("token" in refused.value.message) == (has != "tokens")


def test_with_tls_and_a_token_other_machines_are_answered(papers: Papers, make_model: Models) -> None:
    tokens = papers.folder / "tokens"
    token = add_token(tokens, "scada")

    with serving(make_model(), Access(papers.tls(), tokens), host=WIDE) as (plane, address):
        context = ssl.create_default_context(cafile=str(papers.ca))
        with httpx.Client(base_url=f"https://{address}", verify=context) as client:
            bearer = {"Authorization": f"Bearer {token}"}
            assert client.post(INFER, json=ROW, headers=bearer).status_code == 200
            assert client.get("/metrics", headers=bearer).status_code == 200
            for said in ({}, {"Authorization": "Bearer x"}, {"Authorization": f"Basic {token}"}):
                refused = client.post(INFER, json=ROW, headers=said)
                assert code(refused) == (401, "serving.token")
                assert refused.headers["www-authenticate"] == "Bearer"
            assert [client.get(p).status_code for p in ("/v2/health/live", "/v2/health/ready")] == [200, 200]
            assert [client.get(p).status_code for p in ("/v2/health", "/metrics", "/v2", "/nowhere")] == [401] * 4
            assert client.post("/v2/health/live").status_code == 401
        assert plane.errors()["serving.token"] == 8
        assert plane.stats()[0].requests == 1


def test_plain_http_on_the_tls_port_gets_nowhere_and_is_counted(papers: Papers, make_model: Models) -> None:
    with serving(make_model(), Access(papers.tls())) as (plane, address):
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{address}/v2/health/live")
        until(lambda: plane.errors() == {"serving.handshake": 1})
        assert secure(papers, address).get("/v2/health/live").status_code == 200


def secure(papers: Papers, address: str, cert: tuple[Path, Path] | None = None) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(papers.ca))
    if cert is not None:
        context.load_cert_chain(*cert)
    return httpx.Client(base_url=f"https://{address}", verify=context, headers={"connection": "close"})


def test_with_a_client_authority_only_its_certificates_open_anything(
    papers: Papers, make_model: Models, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    stranger = Papers(tmp_path / "other").client()

    with serving(make_model(), Access(papers.tls(mutual=True)), host=WIDE) as (plane, address):
        with secure(papers, address, papers.client()) as known:
            assert known.post(INFER, json=ROW).status_code == 200
        for cert in (None, stranger):
            with secure(papers, address, cert) as unknown, pytest.raises(httpx.HTTPError):
                unknown.get("/v2/health/live")
        until(lambda: plane.errors() == {"serving.handshake": 2})


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_todays_versions_of_tls_are_spoken(papers: Papers, make_model: Models, version: ssl.TLSVersion) -> None:
    context = ssl.create_default_context(cafile=str(papers.ca))
    context.minimum_version = context.maximum_version = version
    with serving(make_model(), Access(papers.tls())) as (_, address), httpx.Client(verify=context) as client:
        assert client.post(f"https://{address}{INFER}", json=ROW).status_code == 200


def test_large_bodies_and_many_requests_go_through_one_secured_connection(papers: Papers, make_model: Models) -> None:
    rows = {"inputs": [{"name": "features", "datatype": "FP32", "shape": [20_000, 4], "data": [0.5] * 80_000}]}
    with serving(make_model(), Access(papers.tls())) as (_, address), secure(papers, address) as client:
        client.headers.pop("connection")
        assert len(client.post(INFER, json=rows).json()["outputs"][0]["data"]) == 20_000
        assert {client.post(INFER, json=ROW).status_code for _ in range(200)} == {200}


# What changes while it runs -------------------------------------------------------------------------------------------


def test_a_renewed_certificate_is_shown_to_the_next_client_and_the_connected_go_on(
    papers: Papers, make_model: Models
) -> None:
    def shown(address: str) -> str:
        return hashlib.sha256(
            ssl.get_server_certificate(("localhost", int(address.split(":")[1]))).encode()
        ).hexdigest()

    with serving(make_model(), Access(papers.tls())) as (_, address), secure(papers, address) as client:
        client.headers.pop("connection")
        assert client.post(INFER, json=ROW).status_code == 200
        first = shown(address)

        papers.renew()

        until(lambda: shown(address) != first)
        assert client.post(INFER, json=ROW).status_code == 200


def test_a_certificate_that_does_not_fit_its_key_is_not_taken(papers: Papers, make_model: Models) -> None:
    with serving(make_model(), Access(papers.tls())) as (_, address):
        assert secure(papers, address).get("/v2").status_code == 200
        papers.certificate.write_bytes(papers.authority.issue_server(["localhost"])[1])
        time.sleep(1.1)
        assert secure(papers, address).get("/v2").status_code == 200
        papers.key.unlink()
        time.sleep(1.1)
        assert secure(papers, address).get("/v2").status_code == 200


def test_a_token_counts_from_the_moment_it_is_in_the_file_until_it_is_taken_out(
    make_model: Models, tmp_path: Path
) -> None:
    tokens = tmp_path / "tokens"
    first = add_token(tokens, "first")
    with serving(make_model(), Access(tokens=tokens)) as (_, address):

        def status(token: str) -> int:
            return httpx.get(f"http://{address}/v2", headers={"authorization": f"bearer {token}"}).status_code

        second = add_token(tokens, "second")
        until(lambda: status(second) == 200)
        lines = tokens.read_text().splitlines()
        tokens.write_text(lines[1] + "\n")
        until(lambda: status(first) == 401)
        assert status(second) == 200
        tokens.write_text("what is this\n")
        time.sleep(1.1)
        assert (status(first), status(second)) == (401, 200)


def test_of_a_token_the_file_holds_only_the_hash(tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens", "scada")

    text = (tmp_path / "tokens").read_text()
    assert token not in text
    assert read_tokens(tmp_path / "tokens") == {"scada": hashlib.sha256(token.encode()).hexdigest()}
    assert len(token) == 4 + 43
    with pytest.raises(SettingsError):
        add_token(tmp_path / "tokens", "scada")
    with pytest.raises(SettingsError):
        add_token(tmp_path / "tokens", "two words")
    assert (tmp_path / "tokens").read_text() == text


@pytest.mark.parametrize(
    "content", ["secret", "a " + "0" * 63, "a " + "0" * 64 + "\na " + "1" * 64, "\udcff", "a b " + "0" * 64]
)
def test_a_token_file_that_is_none_is_refused_at_start(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(SettingsError) as refused:
        Door(tokens=tmp_path / "tokens")
    assert refused.value.code == "settings.invalid"


def test_a_token_file_that_anybody_may_write_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "scada")
    (tmp_path / "tokens").chmod(0o666)
    for path in (tmp_path / "tokens", tmp_path / "missing"):
        with pytest.raises(SettingsError):
            read_tokens(path)


def test_a_file_is_looked_at_once_a_second_at_most(tmp_path: Path) -> None:
    path, now, reads = tmp_path / "file", [0.0], [0]
    path.write_text("1")

    def read() -> str:
        reads[0] += 1
        return path.read_text()

    watched = Watched((path,), read, clock=lambda: now[0])
    path.write_text("changed")
    assert watched.now() == "1"
    now[0] = 1.0
    assert [watched.now() for _ in range(5)] == ["changed"] * 5
    assert reads == [2]


@pytest.mark.parametrize(
    "wrong", [{"certificate": "c"}, {"key": "k"}, {"client_ca": "a"}, {"key": "k", "client_ca": "a"}]
)
def test_half_of_tls_is_no_setting(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingsError) as refused:
        access_of(**{"certificate": "", "key": "", "client_ca": "", "tokens": "", "hosts": "", **wrong})
    assert refused.value.code == "settings.missing"


def test_files_that_are_no_certificates_are_refused_at_start(papers: Papers, make_model: Models) -> None:
    papers.certificate.write_text("no PEM")
    with pytest.raises(SettingsError) as refused, serving(make_model(), Access(papers.tls())):
        pass
    assert refused.value.code == "settings.invalid"


# What clients may take ------------------------------------------------------------------------------------------------


def test_a_handshake_that_does_not_end_is_given_up_and_nobody_waits_for_it(
    papers: Papers, make_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "HANDSHAKE_SECONDS", 0.5)
    with serving(make_model(), Access(papers.tls())) as (plane, address), contextlib.ExitStack() as stack:
        port = int(address.split(":")[1])
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(20)]
        assert secure(papers, address).get("/v2").status_code == 200
        assert {one.recv(1) for one in silent} == {b""}
        until(lambda: plane.errors() == {"serving.handshake": 20})


def test_of_too_many_handshakes_the_oldest_is_let_go(
    papers: Papers, make_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tls, "_HANDSHAKES", 4)
    with serving(make_model(), Access(papers.tls())) as (plane, address), contextlib.ExitStack() as stack:
        port = int(address.split(":")[1])
        silent = [stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5)) for _ in range(6)]
        assert secure(papers, address).get("/v2").status_code == 200
        assert [one.recv(1) for one in silent[:2]] == [b"", b""]
        assert plane.errors()["serving.handshake"] >= 2


def test_beyond_the_cap_no_handshake_begins_and_there_is_room_again_later(papers: Papers, make_model: Models) -> None:
    with serving(make_model(), Access(papers.tls()), limits=Limits(secured=3)) as (_, address):
        clients = [secure(papers, address) for _ in range(3)]
        for client in clients:
            client.headers.pop("connection")
            assert client.get("/v2").status_code == 200
        with pytest.raises(httpx.HTTPError), secure(papers, address) as one_too_many:
            one_too_many.get("/v2")
        assert [client.get("/v2").status_code for client in clients] == [200] * 3
        for client in clients:
            client.close()
        until(lambda: _answers(papers, address))


def _answers(papers: Papers, address: str) -> bool:
    try:
        with secure(papers, address) as client:
            return client.get("/v2").status_code == 200
    except httpx.HTTPError:
        return False


def test_a_body_without_a_token_is_not_waited_for(make_model: Models, tmp_path: Path) -> None:
    add_token(tmp_path / "tokens", "scada")
    fields = "host: localhost\r\ncontent-length: 9000000\r\nexpect: 100-continue"
    with (
        serving(make_model(), Access(tokens=tmp_path / "tokens")) as (_, address),
        socket.create_connection(("127.0.0.1", int(address.split(":")[1])), timeout=5) as client,
    ):
        client.sendall(f"POST {INFER} HTTP/1.1\r\n{fields}\r\n\r\n".encode())
        said = client.recv(4096)
    assert said.startswith(b"HTTP/1.1 401 ")
    assert b"connection: close" in said


# Browsers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "LOCALHOST:8500"}, 200),
        ({"host": "127.0.0.1:8500"}, 200),
        ({"host": "127.9.9.9"}, 200),
        ({"host": "[::1]:8500"}, 200),
        ({"host": "edge.localhost"}, 200),
        ({"host": "gateway.plant"}, 200),
        ({"host": "evil.example"}, 403),
        ({"host": "evil.example:8500"}, 403),
        ({"host": "localhost.evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "10.0.0.7"}, 403),
        ({"host": "[::1]evil"}, 403),
        ({"host": "localhost:80x"}, 403),
        ({"host": ""}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example"}, 403),
        ({"host": "localhost:1", "origin": "http://localhost:1"}, 200),
        ({"host": "localhost:1", "origin": "http://localhost:2"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "none"}, 200),
    ],
)
def test_on_loopback_pages_of_a_browser_and_foreign_names_get_nowhere(
    local: tuple[DataPlane, str], fields: dict[str, str], status: int
) -> None:
    plane, address = local
    before = plane.stats()[0].requests

    reply = httpx.post(f"http://{address}{INFER}", json=ROW, headers=fields)

    assert reply.status_code == status
    assert plane.stats()[0].requests - before == (status == 200)
    if status == 403:
        assert code(reply) == (403, "serving.origin")
    assert [name for name in reply.headers if name.startswith("access-control")] == []


@pytest.fixture(scope="module")
def local(make_model: Models) -> Iterator[tuple[DataPlane, str]]:
    with serving(make_model(), Access(hosts=frozenset({"gateway.plant"}))) as opened:
        yield opened


def test_a_page_can_neither_label_a_prediction_nor_ask_whether_it_might(local: tuple[DataPlane, str]) -> None:
    _, address = local
    page = {"origin": "https://evil.example"}

    label = httpx.post(
        f"http://{address}/v2/models/pump/feedback", content=b'{"id":"a","label":"worn"}',
        headers={**page, "content-type": "text/plain"},
    )  # fmt: skip
    preflight = httpx.options(f"http://{address}{INFER}", headers={**page, "access-control-request-method": "POST"})

    assert code(label) == code(preflight) == (403, "serving.origin")
    assert httpx.options(f"http://{address}{INFER}").status_code == 405


def test_on_a_unix_socket_no_name_is_foreign(make_model: Models, tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    by_socket = httpx.Client(transport=httpx.HTTPTransport(uds=str(path)))
    with serving(make_model(), Access(), unix_socket=path), by_socket as client:
        assert client.post(f"http://gateway.plant{INFER}", json=ROW).status_code == 200
    assert not os.path.lexists(path)


@pytest.mark.parametrize(
    "fields", [["host: localhost", "host: evil"], ["host: localhost", "authorization: a", "authorization: b"], []]
)
def test_what_two_readers_could_read_differently_is_refused(local: tuple[DataPlane, str], fields: list[str]) -> None:
    with socket.create_connection(("127.0.0.1", int(local[1].split(":")[1])), timeout=5) as client:
        client.sendall("\r\n".join(["GET /v2 HTTP/1.1", *fields, "", ""]).encode())
        said = client.recv(4096)
    assert said.startswith(b"HTTP/1.1 400 ")
    assert json.loads(said.partition(b"\r\n\r\n")[2])["code"] == "serving.malformed"


# The client library ---------------------------------------------------------------------------------------------------


def test_the_client_library_shows_tokens_and_certificates(papers: Papers, make_model: Models) -> None:
    tokens = papers.folder / "tokens"
    token = add_token(tokens, "scada")
    with serving(make_model(), Access(papers.tls(mutual=True), tokens), host=WIDE) as (_, address):
        with Client(f"https://{address}", token=token, ca=papers.ca, cert=papers.client()) as agent:
            assert agent.predict([[0.5] * 4]).version == 1
        with Client(f"https://{address}", token="lsa_x", ca=papers.ca, cert=papers.client()) as agent:
            with pytest.raises(LightshipError) as refused:
                agent.predict([[0.5] * 4])
            assert refused.value.code == "serving.token"
        for options in ({"ca": papers.ca}, {"cert": papers.client()}):
            with Client(f"https://{address}", token=token, retries=0, **options) as agent:  # type: ignore[arg-type]
                with pytest.raises(LightshipError) as refused:
                    agent.predict([[0.5] * 4])
                assert refused.value.code == "link.unreachable"
    with pytest.raises(SettingsError):
        Client("https://localhost:1", ca=papers.folder / "missing.pem")


async def _predict(address: str, token: str, ca: Path) -> int:
    async with AsyncClient(f"https://{address}", token=token, ca=ca) as agent:
        return (await agent.predict([[0.5] * 4])).version


def test_so_does_the_asynchronous_one(papers: Papers, make_model: Models) -> None:
    import asyncio

    token = add_token(papers.folder / "tokens", "scada")
    with serving(make_model(), Access(papers.tls(), papers.folder / "tokens"), host=WIDE) as (_, address):
        assert asyncio.run(_predict(address, token, papers.ca)) == 1
