"""Link: enrolment and renewal.

Rules:
* a join token is `id.secret.sha256(CA public key)`: the pin travels with it, so first contact is not on trust;
* the key is born here and never leaves; the server learns a certificate request;
* enrolment ends with a whole identity on disk, or with nothing.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import msgspec

from lightship_agent.contract.codes import EnrolError, LinkError
from lightship_agent.contract.device_api import EnrolReply, EnrolRequest, Paths, parse_token
from lightship_agent.contract.names import check_name

from . import identity as store
from .client import ControlPlane, link_error, server_ca


def enrol(state_dir: Path, *, server: str, token: str, device: str) -> store.Identity:
    """Make a key, have it certified, and store the identity.

    Args:
        state_dir: the agent's state directory; created if missing.
        server: the control plane's device address, https://host:port.
        token: a join token.
        device: the id this device asks for.

    Raises:
        EnrolError: enrol.token, enrol.pin, enrol.request, enrol.taken.
        LinkError: link.unreachable, link.status.
        StorageError: storage.full, storage.unwritable.
    """
    check_name("device id", device)
    if (state_dir / store.FOLDER).exists():
        raise EnrolError("enrol.taken", f"{state_dir} already holds an identity.", remedy="Remove it to enrol anew.")
    server = server.rstrip("/")
    parsed = parse_token(token)
    ca = server_ca(server, parsed.pin)
    key = store.new_key()
    csr = store.certificate_request(key, device)
    reply = _ask(server, ca, EnrolRequest(token=token.strip(), device=device, csr=csr.decode()))
    broker = None
    if reply.broker_host:
        broker = store.Broker(
            host=reply.broker_host,
            port=reply.broker_port,
            auth=reply.broker_auth,
            username=reply.broker_username,
        )
    info = store.IdentityFile(device=reply.device, tenant=reply.tenant, server=server, broker=broker)
    files = {
        "key.pem": store.key_pem(key),
        "cert.pem": reply.chain.encode(),
        "ca.pem": ca,
        "tuf-root.json": reply.tuf_root.encode(),
        "identity.json": msgspec.json.encode(info),
    }
    if reply.broker_password:
        files["broker-password"] = reply.broker_password.encode()
    store.store_identity(state_dir, files)
    return store.load_identity(state_dir)


def renew(identity: store.Identity, client: ControlPlane) -> None:
    """Replace key and certificate by fresh ones.

    Raises:
        LinkError: link.unreachable, link.status.
        EnrolError: enrol.revoked.
        StorageError: storage.full, storage.unwritable.
    """
    key = store.new_key()
    chain = client.renew(store.certificate_request(key, identity.device))
    store.replace_certificate(identity, key, chain)


def renewal_due(not_before: float, not_after: float, now: float) -> bool:
    """Whether two thirds of a certificate's life are over. Times are Unix seconds."""
    return now >= not_before + (not_after - not_before) * 2 / 3


def _ask(server: str, ca: bytes, request: EnrolRequest) -> EnrolReply:
    context = ssl.create_default_context(cadata=ca.decode())
    url = f"{server}{Paths.ENROL}"
    try:
        reply = httpx.post(url, verify=context, timeout=30.0, content=msgspec.json.encode(request))
    except (httpx.HTTPError, OSError) as e:
        raise link_error(e, url) from e
    if reply.status_code == 200:
        try:
            return msgspec.json.decode(reply.content, type=EnrolReply)
        except msgspec.MsgspecError as e:
            raise LinkError("link.status", f"{url}: the answer is not an enrolment: {e}.") from e
    raise _refusal(reply, url)


def _refusal(reply: httpx.Response, url: str) -> EnrolError | LinkError:
    try:
        said = reply.json()
        return EnrolError(str(said["code"]), str(said["error"]))
    except (ValueError, KeyError, TypeError, AssertionError):
        return LinkError("link.status", f"{url}: expected 200, found {reply.status_code}: {reply.text[:300]}")
