"""Link: enrolment.

Rules:
* a join token is `id.secret.sha256(CA public key)`: the pin travels with it, so first contact is not on trust;
* the key is born here and never leaves; the server learns a certificate request;
* enrolment ends with a whole identity on disk, or with nothing, and an answer is believed only once it was checked;
* a key that was made before (`lightship-agent key`) is taken: the operator may have listed its digest, and no token is
  needed then, but the pin still is;
* an answer that got lost on its way is asked for again with the same key, which the server takes for the same request;
  so it does where the program was killed meanwhile, and is started again with the same token within ten minutes.
"""

from __future__ import annotations

import contextlib
import ssl
from pathlib import Path
from typing import Final

import httpx
import msgspec
from cryptography.hazmat.primitives.asymmetric import ec

from lightship_agent.contract.codes import EnrolError, InvalidNameError, LinkError, StorageError
from lightship_agent.contract.device_api import EnrolReply, EnrolRequest, Paths, parse_token
from lightship_agent.contract.names import check_name
from lightship_agent.fail_points import fail_point
from lightship_agent.files import storage_error, write_durably

from . import identity as store
from .client import Reply, ask, check_server, open_client, server_ca

_ASK_TIMES: Final = 3


def enrol(
    state_dir: Path, *, server: str, token: str, device: str, pin: str = "", serial: str = "", key_uri: str = ""
) -> store.Identity:
    """Make a key, have it certified, and store the identity.

    Args:
        state_dir: the agent's state directory; created if missing.
        server: the control plane's device address, https://host:port.
        token: a join token; empty where the operator has listed the digest of this device's key.
        device: the id this device asks for.
        pin: sha256 of the CA's public key, where there is no token that brings it.
        serial: of the hardware, for an operator who lists devices by it.
        key_uri: a PKCS#11 URI of the key to use instead of one in a file.

    Raises:
        EnrolError: enrol.token, enrol.pin, enrol.request, enrol.taken, enrol.certificate, enrol.not-listed, enrol.key.
        InvalidNameError: name.invalid.
        LinkError: link.unreachable, link.slow, link.status.
        SettingsError: settings.invalid for an address that is not https.
        StorageError: storage.full, storage.unwritable.
    """
    check_name("device id", device)
    if (state_dir / store.FOLDER).exists():
        raise EnrolError("enrol.taken", f"{state_dir} already holds an identity.", remedy="Remove it to enrol anew.")
    server = check_server(server)
    token = token.strip()
    ca = server_ca(server, parse_token(token).pin if token or not pin else pin)
    is_new, is_ours = not state_dir.exists(), not key_uri and early_key(state_dir) is None
    if is_ours:
        # On disk before anybody knows of it: who is killed from here on asks again with the same key.
        make_early_key(state_dir)
    try:
        _enrol_with(state_dir, server, ca, EnrolRequest(token=token, device=device, csr="", serial=serial), key_uri)
    finally:
        if is_ours or (state_dir / store.FOLDER).exists():
            (state_dir / store.EARLY_KEY).unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):  # it is not empty: the device is enrolled
                state_dir.rmdir()
    return store.load_identity(state_dir)


def _enrol_with(state_dir: Path, server: str, ca: bytes, request: EnrolRequest, key_uri: str) -> None:
    device = request.device
    key = store.token_key(key_uri) if key_uri else early_key(state_dir)
    assert key is not None  # made before, or by whoever called
    csr = store.certificate_request(key, device).decode()
    reply = _ask(server, ca, msgspec.structs.replace(request, csr=csr))
    _check(reply, key, device, ca)
    fail_point("enrol-answered")
    info = store.IdentityFile(device=device, tenant=reply.tenant, server=server, broker=_broker(reply))
    files = {
        **({"key.uri": key_uri.strip().encode()} if key_uri else {"key.pem": store.key_pem(key)}),
        "cert.pem": reply.chain.encode(),
        "ca.pem": ca,
        "tuf-root.json": reply.tuf_root.encode(),
        "identity.json": msgspec.json.encode(info),
    }
    if reply.broker_password:
        files["broker-password"] = reply.broker_password.encode()
    store.store_identity(state_dir, files)


def make_early_key(state_dir: Path) -> str:
    """The digest of the key that this device will enrol with, which is made now if it was not before.

    Raises:
        EnrolError: enrol.taken for a device that is enrolled.
        StorageError: storage.full, storage.unwritable, storage.corrupt.
    """
    if (state_dir / store.FOLDER).exists():
        raise EnrolError("enrol.taken", f"{state_dir} already holds an identity.", remedy="Remove it to enrol anew.")
    key = early_key(state_dir)
    if key is None:
        key = store.new_key()
        try:
            state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            raise storage_error(e, state_dir) from e
        write_durably(state_dir / store.EARLY_KEY, store.key_pem(key), mode=0o600)
    return store.key_digest(key)


def early_key(state_dir: Path) -> ec.EllipticCurvePrivateKey | None:
    """The key that was made before enrolment, if one was.

    Raises:
        StorageError: storage.corrupt.
    """
    path = state_dir / store.EARLY_KEY
    try:
        return store.read_key(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as e:
        raise StorageError("storage.corrupt", f"The key in {path} can't be read: {e}.", remedy="Remove it.") from e


def _ask(server: str, ca: bytes, request: EnrolRequest) -> EnrolReply:
    url = f"{server}{Paths.ENROL}"
    with open_client(ssl.create_default_context(cadata=ca.decode())) as http:
        reply = _ask_again(http, url, msgspec.json.encode(request))
    if reply.status != 200:
        raise reply.refusal()
    return reply.read(EnrolReply)


def _ask_again(http: httpx.Client, url: str, content: bytes) -> Reply:
    for _ in range(_ASK_TIMES - 1):
        try:
            return ask(http, "POST", url, content=content)
        except LinkError as e:
            if isinstance(e.__cause__, httpx.ConnectError | httpx.ConnectTimeout):
                raise  # nothing was asked yet, so nothing was lost
    return ask(http, "POST", url, content=content)


def _check(reply: EnrolReply, key: ec.EllipticCurvePrivateKey, device: str, ca: bytes) -> None:
    from tuf.api.exceptions import RepositoryError
    from tuf.api.metadata import Metadata, Root

    store.check_chain(reply.chain.encode(errors="replace"), key, device, ca)
    try:
        check_name("tenant", reply.tenant)
        root = Metadata[Root].from_bytes(reply.tuf_root.encode())
        root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)
    except (RepositoryError, ValueError, InvalidNameError) as e:
        message = f"The control plane's answer holds no tenant or no root of trust: {type(e).__name__}: {e}."
        raise LinkError("link.status", message) from e


def _broker(reply: EnrolReply) -> store.Broker | None:
    if not reply.broker_host:
        return None
    if reply.broker_auth not in {"mtls", "password"} or not 0 < reply.broker_port < 65_536:
        message = f"A broker at port {reply.broker_port} with {reply.broker_auth[:40]!r} is none that we know to use."
        raise LinkError("link.status", message, remedy="Upgrade the agent, or correct the control plane's settings.")
    return store.Broker(
        host=reply.broker_host, port=reply.broker_port, auth=reply.broker_auth, username=reply.broker_username
    )
