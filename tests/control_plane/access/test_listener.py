"""How the operator API listens: safe by default wherever it is bound, and what is not safe has to be said."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from tests.control_plane.access.callers import token
from tests.control_plane.things import until

from lightship.access.rules import Role
from lightship.api.listener import Listener, is_loopback, operator_listener
from lightship.app import ControlPlane
from lightship.home import Home
from lightship.settings import load_settings
from lightship_agent.contract.codes import SettingsError


def listener(tmp_path: Path, **changed: str) -> Listener:
    return operator_listener(load_settings({}, {"home": str(tmp_path), **changed}))


@contextmanager
def running(home: Home, **changed: str) -> Iterator[ControlPlane]:
    """The whole control plane, in a thread, on free ports."""
    ports = {"api_port": "0", "device_port": "0", "broker": "none", "reconcile_seconds": "60"}
    plane = ControlPlane(home, load_settings({}, {"home": str(home.path), **ports, **changed}))
    plane.start()
    servers = plane._servers
    threads = [
        threading.Thread(target=s.run, kwargs={"sockets": [sock]})
        for s, sock in zip(servers, plane._sockets, strict=True)
    ]
    for thread in threads:
        thread.start()
    try:
        until(lambda: all(s.started for s in servers))
        yield plane
    finally:
        plane._stopping()
        for server in servers:
            server.should_exit = True
        for thread in threads:
            thread.join(60)
        plane.stop()


@pytest.mark.parametrize(
    ("changed", "tls", "open_reads"),
    [
        ({}, False, True),
        ({"api_host": "localhost"}, False, True),
        ({"api_host": "::1"}, False, True),
        ({"api_host": "127.8.9.1"}, False, True),
        ({"environment": "production"}, False, False),
        ({"environment": "production", "api_reads": "open"}, False, True),
        ({"api_reads": "token"}, False, False),
        ({"api_tls": "on"}, True, True),
        ({"api_host": "0.0.0.0"}, True, False),
        ({"api_host": "::"}, True, False),
        ({"api_host": "192.0.2.7", "environment": "development"}, True, False),
        ({"api_host": "lightship.example.net"}, True, False),
        ({"api_host": "0.0.0.0", "api_tls": "insecure"}, False, False),
    ],
)
def test_what_others_can_reach_is_https_and_needs_a_token(
    tmp_path: Path, changed: dict[str, str], tls: bool, open_reads: bool
) -> None:
    found = listener(tmp_path, **changed)
    assert (found.tls, found.open_reads) == (tls, open_reads)


def test_plain_http_that_others_can_reach_is_said_in_capitals(tmp_path: Path) -> None:
    assert listener(tmp_path, api_host="0.0.0.0", api_tls="insecure").notice.startswith("INSECURE")
    assert "INSECURE" not in listener(tmp_path, api_tls="insecure").notice


@pytest.mark.parametrize(
    "changed",
    [
        {"api_host": "0.0.0.0", "api_reads": "open"},
        {"api_host": "0.0.0.0", "api_tls": "off"},
        {"api_cert": "x.pem"},
        {"api_key": "x.key"},
        {"api_cert": "missing.pem", "api_key": "missing.key"},
        {"api_cert": "x.pem", "api_key": "x.key", "api_tls": "insecure"},
        {"environment": "Not A Name"},
        {"environment": ""},
    ],
)
def test_settings_that_contradict_each_other_or_name_nothing_are_refused(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    with pytest.raises(SettingsError) as e:
        listener(tmp_path, **changed)
    assert e.value.code == "settings.invalid"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["localhost.evil.example", "127.0.0.1.evil.example", "", "0", "10.0.0.1", "0.0.0.0"])
def test_only_what_is_loopback_counts_as_loopback(host: str) -> None:
    assert not is_loopback(host)


def test_bound_wider_than_loopback_it_answers_over_tls_of_our_ca_to_tokens_and_nobody_else(home: Home) -> None:
    shown = token(home, Role.VIEWER, environment="development")
    with running(home, api_host="0.0.0.0", public_host="lightship.example.net") as plane:
        assert plane.addresses is not None
        port = plane.addresses.dashboard.rpartition(":")[2]
        assert plane.addresses.dashboard.startswith("https://")
        address = f"https://127.0.0.1:{port}"
        trusting = ssl.create_default_context(cafile=str(home.ca.certificate_path))
        with httpx.Client(base_url=address, verify=trusting) as client:
            assert client.get("/healthz").text == "ok\n"
            assert client.get("/api/v1/overview").json()["code"] == "access.token"
            bearer = {"Authorization": f"Bearer {shown}"}
            assert client.get("/api/v1/overview", headers=bearer).status_code == 200
            foreign = client.get("/api/v1/overview", headers={**bearer, "Host": "evil.example"})
            assert foreign.status_code == 400
            public = client.get("/api/v1/overview", headers={**bearer, "Host": "lightship.example.net"})
            assert public.status_code == 200
            cookie = client.post("/login", data={"token": shown}).headers["set-cookie"]
            assert "secure" in cookie.lower()
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/healthz")
        key = home.path / "ca" / "api.key"
        assert key.stat().st_mode & 0o777 == 0o600


def test_a_certificate_of_ones_own_is_the_one_that_is_shown(home: Home, tmp_path: Path) -> None:
    key, chain = home.ca.issue_server(["localhost", "127.0.0.1"])
    (tmp_path / "own.key").write_bytes(key)
    (tmp_path / "own.pem").write_bytes(chain)
    own: dict[str, Any] = {"api_cert": str(tmp_path / "own.pem"), "api_key": str(tmp_path / "own.key")}
    with running(home, **own) as plane:
        assert plane.addresses is not None
        trusting = ssl.create_default_context(cafile=str(home.ca.certificate_path))
        with httpx.Client(base_url=plane.addresses.dashboard, verify=trusting) as client:
            assert client.get("/healthz").status_code == 200
        port = int(plane.addresses.dashboard.rpartition(":")[2])
        shown = ssl.get_server_certificate(("127.0.0.1", port))
        assert shown.strip().encode() in chain
        assert not (home.path / "ca" / "api.key").exists()


@pytest.mark.parametrize("wrong", ["another key", "sealed", "no key", "swapped"])
def test_a_certificate_that_cannot_serve_is_refused_at_the_start(home: Home, tmp_path: Path, wrong: str) -> None:
    key, chain = home.ca.issue_server(["localhost"])
    if wrong == "another key":
        key = home.ca.issue_server(["localhost"])[0]
    elif wrong == "sealed":
        sealed = serialization.BestAvailableEncryption(b"open sesame")
        formats = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
        key = serialization.load_pem_private_key(key, None).private_bytes(*formats, sealed)
    elif wrong == "no key":
        key = b""
    elif wrong == "swapped":
        key, chain = chain, key
    (tmp_path / "own.key").write_bytes(key)
    (tmp_path / "own.pem").write_bytes(chain)
    with (
        pytest.raises(SettingsError, match="unsealed key") as e,
        running(home, api_cert=str(tmp_path / "own.pem"), api_key=str(tmp_path / "own.key")),
    ):
        pass
    assert e.value.code == "settings.invalid"


def test_a_claim_about_where_one_comes_from_is_not_believed(home: Home) -> None:
    """Behind no proxy of ours, a header that names another address is a lie."""
    shown = token(home, Role.OPERATOR, environment="development")
    with running(home) as plane:
        assert plane.addresses is not None
        lies = {"X-Forwarded-For": "198.51.100.77", "Forwarded": "for=198.51.100.77"}
        headers = {"Authorization": f"Bearer {shown}", **lies}
        made = httpx.post(f"{plane.addresses.dashboard}/api/v1/join-tokens", json={}, headers=headers)
        assert made.status_code == 201
        event = httpx.get(f"{plane.addresses.dashboard}/api/v1/audit?limit=1", headers=headers).json()[0]
    assert (event["actor"], event["verb"], event["origin"]) == ("token:operator", "token.create", "127.0.0.1")
