"""What a stranger may send to the recovery: bytes of any kind are refused with a code, before the database is asked."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightship.fleet import recovery
from lightship.fleet.recovery import NonceSeal
from lightship_agent.contract.codes import EnrolError
from lightship_agent.contract.recovery import PAYLOAD_TYPE, Proof, Signature, SignedProof, from_base64, pae, to_base64
from lightship_agent.link.identity import key_digest, new_key
from lightship_agent.link.renewal import prove

KEY = new_key()
GOOD = prove(KEY, Proof(device="pump-1", nonce="n", csr="c"))


def test_a_proof_says_who_signed_what() -> None:
    proof, spki = recovery.open_proof(GOOD)
    assert (proof, spki) == (Proof(device="pump-1", nonce="n", csr="c"), key_digest(KEY))


@settings(max_examples=300)
@given(st.sampled_from(["payload", "sig", "public"]), st.integers(0, 10_000), st.integers(1, 255))
def test_a_proof_with_any_byte_changed_does_not_hold(part: str, at: int, flip: int) -> None:
    whole = GOOD.payload if part == "payload" else getattr(GOOD.signatures[0], part)
    data = bytearray(from_base64(whole))
    data[at % len(data)] ^= flip
    changed = to_base64(bytes(data))
    if part == "payload":
        spoilt = msgspec.structs.replace(GOOD, payload=changed)
    else:
        spoilt = msgspec.structs.replace(
            GOOD, signatures=(msgspec.structs.replace(GOOD.signatures[0], **{part: changed}),)
        )
    with pytest.raises(EnrolError) as refused:
        recovery.open_proof(spoilt)
    assert refused.value.code == "enrol.proof"


@settings(max_examples=300)
@given(st.text() | st.binary().map(to_base64), st.text() | st.binary().map(to_base64), st.binary(max_size=200))
def test_bytes_of_any_kind_are_no_proof(payload: str, sig: str, public: bytes) -> None:
    signature = Signature(keyid="", sig=sig, public=to_base64(public))
    with pytest.raises(EnrolError) as refused:
        recovery.open_proof(SignedProof(payload=payload, payload_type=PAYLOAD_TYPE, signatures=(signature,)))
    assert refused.value.code == "enrol.proof"


@given(st.binary(max_size=200))
def test_a_payload_that_the_right_key_signed_must_still_be_a_proof(payload: bytes) -> None:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    sig = KEY.sign(pae(payload), ec.ECDSA(hashes.SHA256()))
    signed = msgspec.structs.replace(
        GOOD,
        payload=to_base64(payload),
        signatures=(msgspec.structs.replace(GOOD.signatures[0], sig=to_base64(sig)),),
    )
    with pytest.raises(EnrolError) as refused:
        recovery.open_proof(signed)
    assert refused.value.code == "enrol.proof"


@settings(max_examples=300)
@given(st.text(max_size=120))
def test_a_nonce_that_is_not_ours_is_not_taken(nonce: str) -> None:
    with pytest.raises(EnrolError):
        SEAL.check("pump-1", nonce)


@pytest.fixture(autouse=True, scope="module")
def _seal(tmp_path_factory: pytest.TempPathFactory) -> None:
    SEAL._path = tmp_path_factory.mktemp("seal") / "nonce.key"


SEAL = NonceSeal(Path("nowhere"))


def test_a_nonce_is_known_again_after_a_restart_and_its_key_is_secret(tmp_path: Path) -> None:
    nonce = NonceSeal(tmp_path / "nonce.key").make("pump-1")
    assert NonceSeal(tmp_path / "nonce.key").check("pump-1", nonce) > 0
    assert oct((tmp_path / "nonce.key").stat().st_mode)[-3:] == "600"
    with pytest.raises(EnrolError):
        NonceSeal(tmp_path / "other.key").check("pump-1", nonce)
