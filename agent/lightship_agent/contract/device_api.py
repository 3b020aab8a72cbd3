"""Contract: the device API, its paths and JSON bodies, and the join token.

Rules: bodies are JSON, decoded into these structs on both sides; everything but `CA`, `ENROL` and the two of the
recovery needs a device certificate.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from .codes import EnrolError

#: Response header of ASSIGNMENT: `<epoch>:<seq>`, how far this device's reports have been stored.
ACKED_HEADER: Final = "lightship-acked"
#: Beside it: the same of the device's other epochs, `<epoch>:<seq>` separated by commas. Urgent reports have their own.
ALSO_ACKED_HEADER: Final = "lightship-also-acked"
#: Beside them, where something is asked of the device: MessagePack `Asking`, in URL-safe base64.
ASKED_HEADER: Final = "lightship-asked"
#: Request header: `<16 hexadecimal digits>:<boot counter>`, the run of the agent that asks; new with every start.
INSTANCE_HEADER: Final = "lightship-instance"

#: Bytes of the longest release list that devices read, some 40,000 bundles; the control plane signs no longer one.
MAX_RELEASE_LIST: Final = 12_000_000


class Paths:
    """The device API's paths."""

    CA: Final = "/v1/ca"
    ENROL: Final = "/v1/enrol"
    RENEW: Final = "/v1/renew"
    RECOVERY_NONCE: Final = "/v1/recover/nonce"
    RECOVER: Final = "/v1/recover"
    ASSIGNMENT: Final = "/v1/assignment"
    TELEMETRY: Final = "/v1/telemetry"
    REPLY: Final = "/v1/reply"
    PING: Final = "/v1/ping"
    METADATA: Final = "/v1/tuf/metadata/"
    TARGETS: Final = "/v1/tuf/targets/"


class EnrolRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/enrol."""

    token: str  # empty, where the key is listed
    device: str
    csr: str
    serial: str = ""  # of the hardware, as it says itself


class EnrolReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to POST /v1/enrol."""

    device: str
    tenant: str
    chain: str
    tuf_root: str
    broker_host: str = ""
    broker_port: int = 0
    broker_auth: str = ""
    broker_username: str = ""
    broker_password: str = ""


class RenewRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of POST /v1/renew."""

    csr: str


class RenewReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer to POST /v1/renew."""

    chain: str


class JoinToken(NamedTuple):
    """The parts of a join token."""

    token_id: str
    secret: str
    pin: str


def parse_token(text: str) -> JoinToken:
    """The parts of `text`.

    Raises:
        EnrolError: enrol.token.
    """
    parts = text.strip().split(".")
    if len(parts) != 3 or not all(parts) or len(parts[2]) != 64:
        message = "A join token has three parts: id.secret.sha256-of-the-CA-key."
        raise EnrolError("enrol.token", message, remedy="Ask for one with `lightship device token`.")
    return JoinToken(*parts)
