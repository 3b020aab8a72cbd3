"""An assignment is verified in a process of its own, before a real control plane."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
from tests.agent.link.field import Device, Field

from lightship.storage.models import ModelVersion
from lightship_agent.contract.codes import LightshipError, LinkError, TrustError, UpdateError
from lightship_agent.contract.device_api import Paths
from lightship_agent.contract.transport import TRANSPORT_SUFFIX, delta_path
from lightship_agent.contract.wire import sha256_hex
from lightship_agent.update import check as checking
from lightship_agent.update.check import CheckReply, CheckRequest, FileSource, ServerSource, check, check_in_child


def request(field: Field, device: Device, **changes: object) -> CheckRequest:
    """What the agent would ask: the assignment as the server hands it out."""
    made = CheckRequest(
        state_dir=str(device.folder),
        device=device.identity.device,
        envelope=field.envelope(device.identity.device),
        floor=0,
        now=time.time(),
        source=ServerSource(metadata_url=f"{field.url}{Paths.METADATA}"),
    )
    return msgspec.structs.replace(made, **changes)


def assigned(field: Field) -> tuple[Device, ModelVersion]:
    """A device with a released bundle assigned to it."""
    device, version = field.device(), field.release(1)
    field.assign("press-1", version)
    return device, version


def test_the_child_says_what_shall_run_and_what_to_fetch_for_it(field: Field) -> None:
    device, version = assigned(field)

    reply = check_in_child(request(field, device))

    assert (reply.assignment.sha256, reply.assignment.seq) == (version.digest, 1)
    assert (reply.bundle.path, reply.bundle.sha256, reply.bundle.length) == (version.path, version.digest, version.length)
    packed = field.published(version)
    assert reply.transport.path == version.path + TRANSPORT_SUFFIX
    assert packed.as_posix().endswith(reply.transport.url_path)
    assert reply.transport.length == packed.stat().st_size
    assert reply.delta is None
    assert {"root", "timestamp", "snapshot", "targets", "releases"} <= reply.metadata_expires.keys()
    assert min(reply.metadata_expires.values()) > time.time() + 3 * 86_400
    assert check(request(field, device)) == reply
