"""CLI: the root command, and those that need no group."""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import closing
from pathlib import Path

import click

from lightship import __version__
from lightship.home import terminal
from lightship.settings import SETTINGS, Settings, load_settings
from lightship.storage.audit import coming_from
from lightship_agent.contract.codes import LightshipError
from lightship_agent.files import write_durably
from lightship_agent.logs import configure

from .alerts import alert
from .audit import audit
from .broker import broker
from .console import console, emit, fail, json_option, opened, say, stamp, table, with_home
from .dashboards import dashboards
from .data import data
from .devices import device
from .drift import drift
from .experiments import experiment
from .keys import keys
from .models import model, train
from .releases import release
from .retrain import alarm, retrain
from .rollouts import rollout
from .telemetry import ingest, telemetry
from .tokens import token

log = logging.getLogger(__name__)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("--home", help="The control plane's home folder. Default: LIGHTSHIP_HOME, or ~/.lightship.")
@click.pass_context
def cli(context: click.Context, home: str | None) -> None:
    """Train, release and roll out models to a fleet of edge devices, and watch them there."""
    context.obj = load_settings(os.environ, {"home": home})
    context.with_resource(coming_from(terminal(os.environ)))


@cli.command()
@click.option(
    "--production", is_flag=True, help="Without keys of root, targets and releases: the first ceremony names them."
)
@json_option
@click.pass_obj
def init(settings: Settings, production: bool, as_json: bool) -> None:
    """Make a home: database, certificate authority, signing keys, release repository."""
    from lightship.home import Home

    home = Home.create(settings.home, production=production)
    notice, begun = home.notice(), home.releases.exists
    facts = {"home": str(home.path), "ca_pin": home.ca.pin(), "notice": notice, "releases": begun}
    home.close()
    if as_json:
        emit(facts)
        return
    further = "`lightship up`, or `lightship data add`." if begun else "`lightship keys ceremony begin --root …`."
    say("\n".join(filter(None, (f"Made {facts['home']}.", notice, f"Next: {further}"))))


def _up_options(command: click.Command) -> click.Command:
    for setting in reversed(SETTINGS):
        if setting.name != "home":
            unit = f" ({setting.unit})" if setting.unit else ""
            text = f"{setting.help}{unit} Default: {setting.default or 'none'}; {setting.env}."
            command.params.append(click.Option([f"--{setting.name.replace('_', '-')}"], help=text))
    return command


@click.command()
@click.option("--ready-file", type=click.Path(path_type=Path), help="Write the addresses here, as JSON, when ready.")
@json_option
@click.pass_obj
def up(settings: Settings, /, ready_file: Path | None, as_json: bool, **flags: str | None) -> None:
    """Run the control plane: device and operator API, dashboard, broker, ingest, director, reconciler."""
    import json

    from lightship.app import ControlPlane

    settings = load_settings(os.environ, {"home": str(settings.home), **flags})
    configure("lightship", settings.log_level, settings.log_format)
    # Until the servers take the signals over, a polite end has to stop the broker too.
    signal.signal(signal.SIGTERM, _interrupt)
    with opened(settings) as home, closing(ControlPlane(home, settings)) as plane:
        addresses = plane.start()
        if exposed := home.exposed():
            log.warning("others on this machine may look into %s", ", ".join(map(str, exposed)))
        broker = addresses.broker
        facts = {
            "dashboard": addresses.dashboard,
            "devices": addresses.devices,
            "broker": f"{broker.kind} {broker.host}:{broker.port} ({broker.auth})" if broker else "none",
            "notice": broker.notice if broker else "No broker: devices report over HTTPS and poll.",
            "environment": settings.environment,
            "access": addresses.access,
        }
        if as_json:
            emit(facts)
        else:
            say(f"dashboard {facts['dashboard']}\ndevices   {facts['devices']}\nbroker    {facts['broker']}")
            say("\n".join(t for t in (facts["access"], facts["notice"], home.notice()) if t))
        if ready_file is not None:
            write_durably(ready_file, json.dumps(facts).encode())
        plane.serve()


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


@cli.command()
@json_option
@with_home
def status(home: object, as_json: bool) -> None:
    """The fleet at a glance."""
    from lightship.api import views
    from lightship.home import Home

    assert isinstance(home, Home)
    with home.database.read() as session:
        seen = views.overview(session)
    if as_json:
        emit(seen)
        return
    rows = [
        (
            d["id"],
            "online" if d["online"] else "silent",
            f"{d['model']}@{d['version']}" if d["model"] else "",
            d["drift"],
        )
        for d in seen["devices"]
    ]
    table("Devices", ("device", "state", "runs", "drift"), rows)
    alarms = [a for a in seen["alarms"] if not a["closed_at"]]
    table(
        "Open alarms", ("since", "level", "says"), [(stamp(a["opened_at"]), a["level"], a["sentence"]) for a in alarms]
    )
    active = [r for r in seen["rollouts"] if r["status"] not in ("completed", "rolled-back", "aborted")]
    for r in active:
        console().print(
            f"rollout {r['id']}: {r['model']}@{r['version']} {r['status']}, wave {r['wave']}: {r['reason']}"
        )


@cli.group()
def db() -> None:
    """The database."""


@db.command()
@json_option
@click.pass_obj
def upgrade(settings: Settings, as_json: bool) -> None:
    """Bring the schema to this version."""
    from lightship.home import Home

    home = Home.at(settings.home)
    home.upgrade()
    home.close()
    if as_json:
        emit({"upgraded": True})
    else:
        say("The schema is up to date.")


_GROUPS = (
    data, train, model, release, keys, device, rollout, experiment, retrain, drift, alarm, alert, audit, token, broker,
)  # fmt: skip
for _command in (_up_options(up), ingest, telemetry, dashboards, *_GROUPS):
    cli.add_command(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run `lightship`; errors become words, a code and an exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        cli.main(args=words, prog_name="lightship", standalone_mode=False)
    except LightshipError as e:
        sys.exit(fail(e, as_json="--json" in words))
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
