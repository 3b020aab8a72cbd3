"""Whatever bytes arrive in place of signed ones, the answer is a refusal with a code, and never anything else."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.agent.update.ground import Ground, open_ground
from tests.conformance.simulator import Answer
from tuf.api.metadata import Metadata

from lightship_agent.contract.assignment import PAYLOAD_TYPE
from lightship_agent.contract.codes import LightshipError, TrustError
from lightship_agent.update.releases import Releases

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
junk = st.recursive(scalars, lambda x: st.lists(x, max_size=4) | st.dictionaries(st.text(max_size=8), x, max_size=4))
keyids = st.text("0123456789abcdef", min_size=1, max_size=64)
signatures = st.lists(
    st.fixed_dictionaries({"keyid": keyids | junk, "sig": st.text(max_size=90) | junk}) | junk, max_size=4
)


def look(ground: Ground, http: httpx.Client) -> Releases:
    return Releases(
        ground.folder / "tuf", http, ground.url, (ground.folder / "identity" / "tuf-root.json").read_bytes()
    )


def code_of_a_look(ground: Ground, http: httpx.Client) -> str:
    try:
        look(ground, http)
    except LightshipError as e:
        return e.code
    return ""


def mutated(document: Any, path: list[int], value: Any) -> Any:
    """`document` with another value at the place that `path` leads to."""
    if not path or not isinstance(document, dict | list) or not document:
        return value
    keys = sorted(document) if isinstance(document, dict) else list(range(len(document)))
    key = keys[path[0] % len(keys)]
    copy = dict(document) if isinstance(document, dict) else list(document)
    copy[key] = mutated(document[key], path[1:], value)
    return copy


def test_no_envelope_but_the_directors_is_opened(tmp_path: Path) -> None:
    with open_ground(tmp_path) as ground, httpx.Client() as http:
        releases = look(ground, http)
        genuine = json.loads(ground.sign(ground.assignment()))
        keyid = ground.repository.signers["director"][0].public_key.keyid

        def refuses(data: bytes) -> None:
            with pytest.raises(TrustError) as refusal:
                releases.open_assignment(data)
            assert refusal.value.code in {"trust.signature", "trust.metadata"}

        @settings(max_examples=300, deadline=None)
        @given(st.binary(max_size=200))
        def bytes_at_random(data: bytes) -> None:
            refuses(data)

        @settings(max_examples=300, deadline=None)
        @given(st.lists(st.integers(0, 9), min_size=1, max_size=4), junk)
        def a_genuine_one_with_one_thing_changed(path: list[int], value: Any) -> None:
            changed = mutated(genuine, path, value)
            if changed != genuine:
                refuses(json.dumps(changed).encode())

        @settings(max_examples=300, deadline=None)
        @given(st.binary(max_size=60), signatures, st.booleans())
        def any_payload_with_any_signatures(payload: bytes, found: list[Any], ours: bool) -> None:
            named = [{**s, "keyid": keyid} if ours and isinstance(s, dict) else s for s in found]
            packed = base64.b64encode(payload).decode()
            refuses(json.dumps({"payload": packed, "payloadType": PAYLOAD_TYPE, "signatures": named}).encode())

        bytes_at_random()
        a_genuine_one_with_one_thing_changed()
        any_payload_with_any_signatures()
        assert releases.open_assignment(json.dumps(genuine).encode()).device == "press-1"


def test_no_metadata_but_the_signed_is_believed(tmp_path: Path) -> None:
    with open_ground(tmp_path) as ground, httpx.Client() as http:
        repository = ground.repository
        look(ground, http)
        repository.update("releases")
        genuine = {role: json.loads(repository.published[role][-1][1]) for role in ("timestamp", "snapshot", "targets")}
        before = ground.on_disk()

        @settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
        @given(st.sampled_from(sorted(genuine)), st.lists(st.integers(0, 9), min_size=1, max_size=6), junk)
        def one_thing_changed(role: str, path: list[int], value: Any) -> None:
            changed = mutated(genuine[role], path, value)
            if changed == genuine[role]:
                return
            repository.lies.clear()
            repository.lie(rf"(\d\.)?{role}\.json", Answer(200, json.dumps(changed).encode()))
            for name in ("timestamp", "snapshot", "targets"):
                (ground.folder / "tuf" / f"{name}.json").unlink(missing_ok=True)
            data = json.dumps(changed).encode()
            code = code_of_a_look(ground, http)
            assert code.partition(".")[0] in {"", "trust", "link"}
            if not code:
                # What is around the signed part, or a field that is spelled in another way, may change.
                assert (
                    Metadata.from_bytes(data).signed == Metadata.from_bytes(json.dumps(genuine[role]).encode()).signed
                )

        one_thing_changed()
        assert ground.on_disk() == before
        repository.lies.clear()
        look(ground, http)
