"""Pages: each is a function that renders one file of docs/reference/."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterable

from lightship.api import metrics as fleet_metrics
from lightship.settings import SETTINGS
from lightship.storage.views import READER, VIEWS
from lightship_agent import settings as agent_settings
from lightship_agent.contract import codes, topics
from lightship_agent.serving import http as agent_http
from lightship_agent.serving import metrics as agent_metrics

from . import audit, commands, http, source
from .markdown import code, page, section, table
from .openapi import openapi
from .source import ROOT

__all__ = ["ROOT", "render_all"]

#: Contract modules with structs, in the order in which a reader meets them.
_CONTRACT = (
    "messages",
    "app_metrics",
    "assignment",
    "manifest",
    "schema",
    "profile",
    "moments",
    "quality",
    "projection",
    "bundle",
    "device_api",
)


def render_all() -> dict[str, str]:
    """Every page's text by file name."""
    return {
        "README.md": _index(),
        "settings.md": _settings(),
        "cli.md": _cli(),
        "metrics.md": _metrics(),
        "views.md": _views(),
        "topics.md": _topics(),
        "errors.md": _errors(),
        "messages.md": _messages(),
        "http.md": _http(),
        "audit.md": _audit(),
        "openapi.json": openapi(),
    }


def _index() -> str:
    rows = (
        ("[settings.md](settings.md)", "every setting of both programs"),
        ("[cli.md](cli.md)", "every command and option"),
        ("[http.md](http.md)", "every route: device API, operator API, agent"),
        ("[openapi.json](openapi.json)", "the agent's HTTP, as OpenAPI 3.1"),
        ("[messages.md](messages.md)", "every struct both sides agree on, field by field"),
        ("[topics.md](topics.md)", "the MQTT topic tree"),
        ("[metrics.md](metrics.md)", "Prometheus metrics of both programs"),
        ("[views.md](views.md)", "SQL views for dashboards"),
        ("[errors.md](errors.md)", "error codes and exit statuses"),
        ("[audit.md](audit.md)", "every verb of the audit log"),
    )
    intro = "Generated from the code by `make docs`; a test fails when a page and the code differ."
    return page("Reference", intro, table(("page", "what it lists"), rows))


def _settings() -> str:
    intro = (
        "A flag wins over the environment, and that over the default. The control plane also reads "
        "`<home>/settings.toml`, between environment and default. Secrets are never settings: they are files with mode "
        "0600."
    )
    plane = (
        (code(s.name), code(s.env), code(s.default), s.unit, s.help, ", ".join(map(code, s.choices))) for s in SETTINGS
    )
    agent = ((code(s.name), code(s.env), code(s.default), s.unit, s.help) for s in agent_settings.SETTINGS)
    columns = ("setting", "environment", "default", "unit", "meaning")
    return page(
        "Settings",
        intro,
        section(
            "Control plane",
            "Flags of `lightship up`, with `-` for `_`; `--home` belongs to `lightship` itself.",
            table((*columns, "one of"), plane),
        ),
        section(
            "Agent",
            "Flags of `lightship-agent run`, with `-` for `_`; `--state-dir` belongs to every verb.",
            table(columns, agent),
        ),
    )


def _cli() -> str:
    intro = (
        "Every command takes `--json`, which puts its result on standard output as JSON and its error on standard "
        "error as `{code, error}`. Exit statuses are listed in [errors.md](errors.md)."
    )
    trees = (commands.lightship(), commands.lightship_agent())
    return page("Command lines", intro, *(_command(c) for tree in trees for c in tree.walk()))


def _command(command: commands.Command) -> str:
    arguments = " ".join(o.value for o in command.options if not o.names)
    usage = code(" ".join(filter(None, (*command.words, arguments, "COMMAND …" if command.below else ""))))
    options = (
        (
            ", ".join(map(code, o.names)) + (f" {code(o.value)}" if o.value else ""),
            o.help + (" Required." if o.required else ""),
            code(o.default),
        )
        for o in command.options
        if o.names and o.names != ("--json",)
    )
    below = ", ".join(f"[`{name}`](#{'-'.join(c.words)})" for name, c in command.below.items())
    return section(
        " ".join(command.words),
        command.help,
        usage,
        table(("option", "meaning", "default"), options),
        f"Commands: {below}." if below else "",
        level=2 if len(command.words) < 3 else 3,
    )


def _metrics() -> str:
    plane = ((code(m.name), m.kind, ", ".join(map(code, m.labels)), m.help) for m in fleet_metrics.METRICS)
    agent = ((code(m.name), m.type, m.help) for m in agent_metrics.METRICS)
    return page(
        "Metrics",
        "Both programs serve Prometheus text on `/metrics`: the control plane beside the dashboard, the agent beside "
        "its inference endpoint.",
        section(
            "Control plane",
            "Aggregates over the fleet, never a series per device: at most "
            f"{sum(m.series for m in fleet_metrics.METRICS):,} series, however large the fleet. Sets of labels beyond "
            f"a metric's bound are told as {code(fleet_metrics.OTHER)}. Gathered at most every "
            f"{fleet_metrics.CACHE_SECONDS:.0f} s. A *gauge histogram* says how things are spread now "
            "(`_bucket`, `_gcount`, `_gsum`): `histogram_quantile` of it needs no `rate`.",
            table(("metric", "type", "labels", "meaning"), plane),
        ),
        section("Agent", table(("metric", "type", "meaning"), agent)),
    )


def _views() -> str:
    sections = (section(code(v.name), v.help, f"```sql\n{textwrap.dedent(v.query).strip()}\n```") for v in VIEWS)
    return page(
        "Views",
        "Read-only views in the fleet's database, for dashboards and people with SQL: the same on SQLite and "
        "PostgreSQL. Times end in `_ms`: milliseconds since the Unix epoch. No secret is in any. They are made anew by "
        f"`lightship db upgrade`; on PostgreSQL the role {code(READER)}, if there is one, may read them.",
        *sections,
    )


def _topics() -> str:
    functions = [
        f
        for _, f in inspect.getmembers(topics, inspect.isfunction)
        if f.__module__ == topics.__name__ and inspect.signature(f).return_annotation == "str"
    ]
    functions.sort(key=lambda f: f.__code__.co_firstlineno)
    rows = [(code(f.__name__), code(_placeheld(f)), _first_paragraph(f.__doc__)) for f in functions]
    subscribed = "\n".join(f"- {code(t)}" for t in topics.ingest_filters())
    return page(
        "Topics",
        "Built by `lightship_agent.contract.topics`, one function per topic. Topics carry no trust: what a device runs "
        "is decided by signatures, and who sent a report by the broker's authentication.",
        table(("function", "topic", "carries"), rows),
        section("What the control plane subscribes to", _first_paragraph(topics.ingest_filters.__doc__), subscribed),
        section("Payloads", "See [messages.md](messages.md)."),
    )


def _placeheld(function: object) -> str:
    assert callable(function)
    return str(function(*(f"<{name}>" for name in inspect.signature(function).parameters)))


def _errors() -> str:
    where = _rooms_by_code()
    intro = (
        "A code, once released, keeps its meaning. The process exit status is that of the code's family; 0 is success, "
        "1 an unexpected crash (or a failed `doctor` check), 2 wrong usage of the command line, 130 an interrupt. "
        "*HTTP* is the agent's status where it answers with that code."
    )
    sections = []
    for family, status in codes.EXIT_STATUS.items():
        rows = (
            (code(c), meaning, str(agent_http.STATUS.get(c, "")), ", ".join(where.get(c, ())))
            for c, meaning in codes.CODES.items()
            if c.startswith(f"{family}.")
        )
        sections.append(
            section(f"{family}.*: exit status {status}", table(("code", "meaning", "HTTP", "appears in"), rows))
        )
    return page("Errors", intro, *sections)


def _rooms_by_code() -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for folder in (source.AGENT, source.CONTROL_PLANE):
        for path, tree in source.modules(folder):
            if path.name == "codes.py":
                continue
            for text in source.string_constants(tree) & codes.CODES.keys():
                found.setdefault(text, set()).add(source.room(path))
    return {c: sorted(rooms) for c, rooms in found.items()}


def _messages() -> str:
    sections = []
    for name in _CONTRACT:
        path = source.AGENT / "contract" / f"{name}.py"
        parts = [_struct(s) for s in source.structs(path)]
        sections.append(section(f"contract.{name}", *parts))
    return page(
        "Messages",
        "What both programs agree on. Telemetry is MessagePack (zlib above one TCP segment), the device API, the "
        "assignment and the manifest are JSON; both are decoded straight into these structs, so a wrong type is an "
        "error at the border. Types are written as in the code. A packed vector is a byte, its width w in bytes plus "
        "0x80 if numbers are signed and 0x40 if a base follows (8 bytes, signed, to be added to each); then the lowest "
        "bytes of all numbers, the next bytes of all, w times. An array of numbers may be sent instead.",
        *sections,
    )


def _struct(struct: source.Struct) -> str:
    rows = ((code(f.name), code(f.annotation), code(f.default), f.comment) for f in struct.fields)
    tag = f"Tag: {code(struct.tag)}." if struct.tag else ""
    return section(
        struct.name,
        " ".join(filter(None, (struct.summary, tag))),
        table(("field", "type", "default", ""), rows),
        level=3,
    )


def _http() -> str:
    columns = ("method", "path", "what it does")
    return page(
        "HTTP",
        "Errors are JSON with a stable `code`, see [errors.md](errors.md).",
        section(
            "Device API: HTTPS, mutual TLS",
            "Default port 8643. Everything but the first four routes needs a device certificate, and the device must "
            "be active with that very key in the database.",
            table(columns, _routes(http.device_routes())),
        ),
        section(
            "Operator API and dashboard: HTTP on loopback, HTTPS elsewhere",
            "Default port 8600. `Authorization: Bearer` with an API token of the role in the third column or more, for "
            "this server's environment: [who may do what](../operators-guide.md#who-may-do-what). Reads for viewers "
            "are open on loopback in the environment `development`. What changes something is audited.",
            table(
                ("method", "path", "least role", "verb", "what it does"),
                ((m, code(path), role, code(verb), words) for m, path, role, verb, words in http.operator_routes()),
            ),
        ),
        section(
            "Agent: HTTP on loopback and, where set, a Unix socket",
            "Default port 8500. The Open Inference Protocol V2 with the binary tensor, repository and statistics "
            "extensions, plus feedback and metrics.",
            table(columns, _routes(http.agent_routes())),
        ),
    )


def _routes(rows: Iterable[http.Row]) -> Iterable[tuple[str, str, str]]:
    return ((method, code(path), words) for method, path, words in rows)


def _audit() -> str:
    rows = ((code(v.name), code(v.subject), v.act, code(v.where)) for v in audit.verbs())
    return page(
        "Audit verbs",
        "Every mutating act appends one event to a hash chain, in the transaction that does it: time, actor, verb, "
        "subject, detail, and the digest of the event before. `lightship audit` lists them, `lightship audit verify` "
        "checks the chain. Angle brackets stand for what the act names.",
        table(("verb", "subject", "the act", "written in"), rows),
    )


def _first_paragraph(text: str | None) -> str:
    return " ".join((text or "").split("\n\n")[0].split())
