"""`lightship-agent`: the device's command line.

Rules: tables for people, `--json` for machines; errors go to stderr with their code, and the exit status is that of
their family (docs/reference/errors.md); secrets come from files or standard input, never from arguments.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from . import __version__, lean  # first: it loads msgspec
from .contract.codes import CODES, LightshipError, SettingsError, error_of
from .logs import configure
from .settings import SETTINGS, Settings, load_settings

if TYPE_CHECKING:
    import argparse


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; the reference page is generated from it."""
    import argparse

    parser = argparse.ArgumentParser(prog="lightship-agent", description="Serve released models on this device.")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    run = _verb(verbs, "run", "Serve, watch, report and update until stopped.")
    for setting in SETTINGS:
        if setting.name != "state_dir":
            unit = f" ({setting.unit})" if setting.unit else ""
            help_text = f"{setting.help}{unit} Default: {setting.default or 'none'}; {setting.env}."
            run.add_argument(f"--{setting.name.replace('_', '-')}", help=help_text)
    enrol = _verb(verbs, "enrol", "Give this device an identity, with a join token.")
    enrol.add_argument("--server", required=True, help="The control plane's device address, https://host:port.")
    enrol.add_argument("--device", required=True, help="The id this device asks for.")
    proof = enrol.add_mutually_exclusive_group(required=True)
    proof.add_argument("--token-file", help="File that holds the join token; - for standard input.")
    proof.add_argument("--ca-pin", help="Without a token: sha256 of the CA's public key; the key must be listed.")
    enrol.add_argument("--serial", default="", help="The hardware's serial, where the operator lists devices by it.")
    enrol.add_argument(
        "--key-uri", default="", help="A PKCS#11 URI of the key, if it is in a token; its PIN in a file."
    )
    key = _verb(verbs, "key", "Make the key this device will enrol with, and print its digest for the operator's list.")
    key.add_argument("--key-uri", default="", help="Print the digest of this key in a PKCS#11 token instead.")
    status = _verb(verbs, "status", "What the running agent serves and how it is.")
    explain = _verb(verbs, "explain", "Why the running agent answered its newest rows so, feature by feature.")
    explain.add_argument("--model", help="Which model; default: the only one that is served.")
    explain.add_argument("--newest", type=int, default=5, help="How many of the last rows, up to 16. Default: 5.")
    explain.add_argument("--permutations", type=int, default=10, help="Walks per row: more are closer. Default: 10.")
    explain.add_argument("--top", type=int, default=5, help="Features named per row. Default: 5.")
    for verb in (status, explain):
        _say_where(verb)
    token = _verb(verbs, "token", "Make a token for a program that asks over HTTP; it is shown once.")
    token.add_argument("name", metavar="NAME", help="What the token is called in the file.")
    token.add_argument("--file", help="The token file; default: LIGHTSHIP_AGENT_HTTP_TOKEN_FILE.")
    verify = _verb(verbs, "verify", "Check a bundle file, or the committed one, by probing it on this machine.")
    verify.add_argument("bundle", nargs="?", help="An uncompressed bundle; default: the committed one.")
    retry = _verb(verbs, "retry", "Empty the penalty box, so that a bundle that failed here is tried again now.")
    rollback = _verb(verbs, "rollback", "Serve the version before again, at once; the one that is left waits a day.")
    rollback.add_argument("--reason", required=True, help="Why; it is reported to the control plane.")
    for verb in (retry, rollback):
        verb.add_argument(
            "--wait", type=float, default=15.0, help="Seconds to wait for the running agent. Default: 15."
        )
    carried = _verb(
        verbs, "import", "Verify a file that was carried here, and have the agent apply it without a network."
    )
    carried.add_argument("file", help="A file that `lightship release export` wrote.")
    carried.add_argument("--no-wait", action="store_true", help="Leave the file for the agent, and return at once.")
    carried.add_argument(
        "--timeout", type=float, default=900.0, help="Seconds to wait until the agent has settled it. Default: 900."
    )
    _verb(verbs, "doctor", "Check identity, network, trust, disk and runtime, and say what to do.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; the process exit status."""
    options = _options(sys.argv[1:] if arguments is None else arguments)
    try:
        settings = load_settings(os.environ, {s.name: getattr(options, s.name, None) for s in SETTINGS})
        _configure_logging(settings)
        return _VERBS[options.verb](options, settings)
    except LightshipError as e:
        return _fail(e, as_json=options.json)
    except KeyboardInterrupt:
        return 130


def _options(arguments: list[str]) -> argparse.Namespace:
    if arguments == ["run"]:  # as a service is started: it need not wait for the other verbs
        return cast("argparse.Namespace", SimpleNamespace(verb="run", json=False))
    return build_parser().parse_args(arguments)


def _verb(verbs: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help_text, description=help_text)
    parser.add_argument("--state-dir", help="Where identity, bundles and the outbox live.")
    parser.add_argument("--json", action="store_true", help="Machine-readable output.")
    return parser


def _say_where(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--url", help="The agent's address; default: from the settings, its Unix socket first.")
    verb.add_argument("--ca", help="PEM of the authority that verifies it over https; default: the system's.")
    verb.add_argument("--token-file", help="File that holds a token, where the agent wants one; - for standard input.")


def _run(_options: argparse.Namespace, settings: Settings) -> int:
    from .app import Agent

    Agent(settings).run()
    return 0


def _enrol(options: argparse.Namespace, settings: Settings) -> int:
    from .link.enrol import enrol

    identity = enrol(
        settings.state_dir,
        server=options.server,
        token=_token(options.token_file),
        device=options.device,
        pin=(options.ca_pin or "").lower(),
        serial=options.serial,
        key_uri=options.key_uri,
    )
    broker = identity.info.broker
    facts = {
        "device": identity.device,
        "server": identity.info.server,
        "mqtt": f"{broker.host}:{broker.port} ({broker.auth})" if broker else "none: HTTPS only",
        "certificate expires": identity.certificate().not_valid_after_utc.isoformat(),
    }
    _show(facts, as_json=options.json)
    return 0


def _token(file: str | None) -> str:
    if file is None:
        return ""
    return sys.stdin.read() if file == "-" else _read(Path(file))


def _key(options: argparse.Namespace, settings: Settings) -> int:
    from .link.enrol import make_early_key
    from .link.identity import key_digest, token_key

    digest = key_digest(token_key(options.key_uri)) if options.key_uri else make_early_key(settings.state_dir)
    _show({"key": digest}, as_json=options.json)
    return 0


def _new_token(options: argparse.Namespace, settings: Settings) -> int:
    from .serving.access import add_token

    file = options.file or settings.http_token_file
    if not file:
        raise SettingsError("settings.missing", "Name the token file: --file, or LIGHTSHIP_AGENT_HTTP_TOKEN_FILE.")
    token = add_token(Path(file), options.name)
    _show({"token": token}, as_json=True) if options.json else _print(token)
    return 0


def _status(options: argparse.Namespace, settings: Settings) -> int:
    url, said = _ask_health(options, settings)
    if isinstance(said, dict) and said.get("code") in CODES:
        raise error_of(said["code"], str(said.get("error", "")))
    if not isinstance(said, dict) or not {"device", "running", "update", "link"} <= set(said):
        raise _no_agent(url, "something else does")
    if options.json:
        _show(said, as_json=True)
        return 0
    running = ", ".join(f"{r['model']}@{r['version']} ({r['digest'][:12]})" for r in said["running"]) or "nothing"
    _show(
        {
            "device": said["device"],
            "serving": running,
            **({"beside it": _beside_words(said["beside"])} if said.get("beside") else {}),
            "degraded": ", ".join(said["degraded"]) or "no",
            "data": ", ".join(f"{f['feature']} of {f['model']}: {f['kind']}" for f in said.get("faults", ())) or "good",
            "update": _update_words(said["update"]),
            "server": said["link"]["server"],
            "mqtt": said["link"]["mqtt"],
            "reports waiting": said["link"]["outbox_records"],
            "up for": f"{said['uptime_seconds']} s",
        },
        as_json=False,
    )
    return 0


def _ask_health(options: argparse.Namespace, settings: Settings) -> tuple[str, Any]:
    import ssl

    lean.load("httpx")
    import httpx

    by_socket = not options.url and bool(settings.socket)
    url = "http://localhost" if by_socket else options.url or _own_url(settings)
    token = _token(options.token_file).strip()
    try:
        verify = ssl.create_default_context(cafile=options.ca) if options.ca else True
        transport = httpx.HTTPTransport(uds=settings.socket if by_socket else None, verify=verify)
        with httpx.Client(transport=transport, timeout=5.0) as client:
            reply = client.get(f"{url}/v2/health", headers={"authorization": f"Bearer {token}"} if token else {})
            return url, reply.json()
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as e:
        where = settings.socket if by_socket else url
        raise _no_agent(where, f"{type(e).__name__}: {e}") from e


def _own_url(settings: Settings) -> str:
    kind = "https" if settings.http_certificate_file else "http"
    return f"{kind}://{settings.http_host}:{settings.http_port}"


def _explain(options: argparse.Namespace, settings: Settings) -> int:
    from dataclasses import asdict

    from .client import Client

    address = options.url or (f"unix:{settings.socket}" if settings.socket else _own_url(settings))
    token = _token(options.token_file).strip()
    with Client(address, model=options.model, timeout=60.0, token=token, ca=options.ca) as client:
        told = client.explain(newest=options.newest, permutations=options.permutations, top=options.top)
    if options.json:
        _show([asdict(one) for one in told], as_json=True)
        return 0
    for one in told:
        _print(f"{one.target}: {one.explained:.4g}, where the average is {one.base:.4g}")
        width = max((len(r.feature) for r in one.reasons), default=0)
        for r in one.reasons:
            value = f"{r.value:.4g}" if isinstance(r.value, float) else r.value or "missing"
            _print(f"  {r.attribution:+10.4g}  {r.feature:<{width}}  {value}")
    return 0


def _beside_words(beside: list[dict[str, Any]]) -> str:
    return ", ".join(
        f"{b['model']}@{b['version']} ({b['mode']}, {b['share']:.0%}) {b['state']} {b['code']}".rstrip() for b in beside
    )


def _update_words(update: dict[str, Any]) -> str:
    waiting, boxed = update.get("waiting"), [d[:12] for d, until in update["penalties"].items() if until > time.time()]
    words = [update["phase"]]
    if waiting:
        words.append(f"{waiting['sha256'][:12]} waits: {waiting['reason']}")
    if boxed:
        words.append(f"in the penalty box: {', '.join(boxed)}")
    return "; ".join(words)


def _no_agent(url: str, found: str) -> LightshipError:
    from .contract.codes import LinkError

    remedy = "Is it running? Give its address with --url."
    return LinkError("link.unreachable", f"No agent answers on {url}: {found}.", remedy=remedy)


def _verify(options: argparse.Namespace, settings: Settings) -> int:
    from .contract.bundle import read_bundle
    from .contract.codes import BundleError
    from .runtime.probe import probe
    from .update.store import BundleStore, StateFile

    if options.bundle:
        path = Path(options.bundle)
    else:
        current = StateFile(settings.state_dir).load().current
        if current is None:
            raise BundleError("bundle.malformed", "No bundle is committed here.", remedy="Name a bundle file.")
        path = BundleStore(settings.state_dir).path(current.sha256)
    bundle = read_bundle(_read_bytes(path))
    report = probe(path, bundle.manifest.requires)
    facts = {
        "model": f"{bundle.manifest.model}@{bundle.manifest.version}",
        "digest": bundle.digest,
        "golden rows": f"agree, largest difference {report.max_difference:.2e}",
        "latency p95": f"{report.latency_ms_p95:.3f} ms",
        "memory": f"{report.memory_mb:.0f} MB",
    }
    _show(facts, as_json=options.json)
    return 0


def _retry(options: argparse.Namespace, settings: Settings) -> int:
    return _order(options, settings, "clear-penalties", "")


def _rollback(options: argparse.Namespace, settings: Settings) -> int:
    from .contract.codes import UpdateError
    from .update.store import StateFile

    if StateFile(settings.state_dir).load().previous is None:
        message = f"{settings.state_dir} holds no version before the one that runs."
        raise UpdateError("update.no-way-back", message, remedy="Assign another version from the control plane.")
    return _order(options, settings, "go-back", options.reason)


def _order(options: argparse.Namespace, settings: Settings, verb: Any, reason: str) -> int:
    """Leave an order for the agent, and see whether one takes it."""
    from .link.identity import load_identity
    from .update import orders
    from .update.store import StateFile

    load_identity(settings.state_dir)  # what is no agent's folder takes no orders
    path = orders.leave(settings.state_dir, verb, reason)
    end = time.monotonic() + options.wait
    while path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    current = StateFile(settings.state_dir).load().current
    facts = {
        "order": verb,
        "taken": "no: it will be when the agent is started" if path.exists() else "yes",
        "committed": f"{current.model}@{current.version} ({current.sha256[:12]})" if current else "nothing",
    }
    _show(facts, as_json=options.json)
    return 0


def _import(options: argparse.Namespace, settings: Settings) -> int:
    from .update.importing import follow, import_file

    told = [-1]

    def copied(done: int, whole: int) -> None:
        tenth = 10 * done // max(1, whole)
        if tenth > told[0]:
            told[0] = tenth
            _say(f"copying: {done / 1e6:.1f} of {whole / 1e6:.1f} MB")

    _say("verifying …")
    imported = import_file(Path(options.file), settings.state_dir, progress=copied)
    wanted, outcome = imported.assignment, "waits for the agent"
    if imported.waits_at is None:
        outcome = "already runs here"
    elif not options.no_wait:
        settled = follow(imported, settings.state_dir, timeout=options.timeout, progress=_say)
        outcome = "applied" if settled == "applied" else "no agent has taken it: it is applied at the next start"
    facts = {
        "model": f"{wanted.model}@{wanted.version}",
        "digest": wanted.sha256,
        "outcome": outcome,
    }
    _show(facts, as_json=options.json)
    return 0


def _doctor(options: argparse.Namespace, settings: Settings) -> int:
    from .doctor import examine

    findings = examine(settings)
    if options.json:
        _show([{"check": f.check, "ok": f.ok, "said": f.said, "code": f.code} for f in findings], as_json=True)
    else:
        for finding in findings:
            _print(f"{'ok  ' if finding.ok else 'FAIL'}  {finding.check:<12} {finding.said}")
    return 0 if all(f.ok for f in findings) else 1


_VERBS = {
    "run": _run,
    "enrol": _enrol,
    "key": _key,
    "status": _status,
    "explain": _explain,
    "token": _new_token,
    "verify": _verify,
    "import": _import,
    "retry": _retry,
    "rollback": _rollback,
    "doctor": _doctor,
}


def _read(path: Path) -> str:
    return _read_bytes(path).decode(errors="replace")


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise SettingsError("settings.invalid", f"Can't read {path}: {e.strerror}.") from e


def _show(facts: Any, *, as_json: bool) -> None:
    if as_json:
        _print(json.dumps(facts, indent=2, sort_keys=True))
        return
    width = max(len(k) for k in facts)
    for key, value in facts.items():
        _print(f"{key:<{width}}  {value}")


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _say(text: str) -> None:
    """How it goes, for people; standard output is for what came of it."""
    sys.stderr.write(f"{text}\n")


def _fail(e: LightshipError, *, as_json: bool) -> int:
    if as_json:
        sys.stderr.write(json.dumps({"code": e.code, "error": str(e)}) + "\n")
    else:
        sys.stderr.write(f"error [{e.code}]: {e}\n")
    return e.exit_status


def _configure_logging(settings: Settings) -> None:
    configure("lightship-agent", settings.log_level, settings.log_format)


if __name__ == "__main__":
    sys.exit(main())
