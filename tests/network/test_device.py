"""A whole device behind a faulty link: whatever the link does, the old model serves, and later the new one comes."""

from __future__ import annotations

import random

import pytest
from tests.agent.link.field import Device, Field
from tests.network.proxy import Fault, Proxy

from lightship.storage.models import ModelVersion


def running(field: Field) -> tuple[Device, ModelVersion]:
    """A device that got version 1 over the link."""
    first = field.release(1)
    device = field.device()
    field.assign("press-1", first)
    device.look()
    assert device.host.serving == first.digest
    return device, first


#: A handshake and an assignment take about 3,000 bytes of the link, all metadata 10,000 and more.
@pytest.mark.parametrize(
    "fault",
    [
        Fault(after=0, end="reset"),
        Fault(after=700, end="reset"),
        Fault(after=2_500),
        Fault(after=4_500, end="reset"),
        Fault(answer=lambda _: b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/portal\r\n\r\n"),
        Fault(answer=lambda _: b""),
    ],
    ids=["reset-at-once", "reset-in-handshake", "cut-after-handshake", "reset-in-metadata", "portal", "nothing"],
)
def test_whatever_the_link_does_the_old_model_serves_and_the_new_one_comes_when_it_is_well(
    field: Field, link: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, first = running(field)
    second = field.release(2, flip=True)
    field.assign("press-1", second)
    bundles = device.on_disk("tuf/", "staging/")
    link.usual = fault
    link.cut()

    for _ in range(3):
        link.cut()
        device.look()
        assert device.host.serving == first.digest

    assert device.updater.trust_code.startswith("link.") or device.updater.state.last_code.startswith("link.")
    assert device.updater.state.penalties == {}
    found = device.on_disk("tuf/", "staging/")
    assert {name for name in found if name.startswith("bundles/")} == {n for n in bundles if n.startswith("bundles/")}
    link.usual = Fault()
    link.cut()
    assert field.boot(device.identity).host.serving == first.digest
    device.look()
    assert device.host.serving == second.digest


def test_a_link_that_breaks_in_every_download_delivers_in_the_end(
    field: Field, link: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda *_: 0.0)
    device, first = running(field)
    second = field.release(2, flip=True)
    size = field.published(second).stat().st_size
    field.assign("press-1", second)
    for n in range(1, 4):
        field.fault("targets", times=1, cut_after=n * size // 8)

    device.look()

    assert device.host.history == [None, first.digest, second.digest]
    begun = [int(r.removeprefix("bytes=").rstrip("-") or 0) for _, _, r in field.server.asked("targets")[-4:]]
    assert begun == sorted(begun)
    assert begun[-1] > 0
