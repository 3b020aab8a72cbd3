"""CLI: drift, in words, before it happens, and between two files."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lightship.home import Home
from lightship.settings import Settings
from lightship_agent.contract.codes import EXIT_STATUS, DriftError, FleetError
from lightship_agent.files import write_durably

from .console import emit, json_option, say, table, with_home

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from lightship.monitoring.drift_settings import DriftSettings
    from lightship.monitoring.simulate import Seen
    from lightship.storage.models import Device


@click.group()
def drift() -> None:
    """Drift: why a device alarms or doesn't, what would be seen how soon, and two CSV files compared."""


@drift.command()
@click.argument("device_id", metavar="DEVICE")
@json_option
@with_home
def explain(home: Home, device_id: str, as_json: bool) -> None:
    """Say in words why a device did or didn't alarm, by its last verdict."""
    import msgspec

    from lightship.fleet.reconciler import drift_settings
    from lightship.monitoring.explain import explain as in_words
    from lightship.monitoring.verdict import Verdict
    from lightship.storage.models import Device

    settings = click.get_current_context().find_object(Settings)
    assert settings is not None
    with home.database.read() as session:
        row = session.get(Device, device_id)
        if row is None:
            raise FleetError("fleet.unknown-device", f"No device {device_id!r}.", remedy="See `lightship device list`.")
        stored = row.verdict.get("verdict")
        shared = _shared(session, row, drift_settings(settings))
    if not stored:
        raise DriftError("drift.unknown", f"No window of {device_id} has been judged yet.")
    sentences = [*in_words(device_id, msgspec.convert(stored, Verdict), drift_settings(settings)), *shared]
    if as_json:
        emit({"device": device_id, "level": stored["level"], "sentences": sentences, "verdict": stored})
    else:
        click.echo("\n".join(sentences))


def _shared(session: Session, device: Device, settings: DriftSettings) -> list[str]:
    """What stands of alarms that a device has a part in with others, and what all devices show together."""
    from sqlalchemy import select

    from lightship.monitoring.common_shift import facts
    from lightship.monitoring.watch_common import remembered
    from lightship.storage.models import Alarm

    of_many = Alarm.kind.in_(("fleet", "segment", "common"))
    query = select(Alarm).where(of_many, Alarm.model == device.running_model, Alarm.closed_at.is_(None))
    mine = [a.sentence for a in session.scalars(query) if device.id in a.evidence["devices"]]
    standing = [f"It has a part in this: {sentence}" for sentence in mine]
    together = remembered(session, device.running_model)
    return [*standing, facts(together, settings)] if together is not None else standing


@drift.command()
@click.option("--rows", type=click.IntRange(1), default=200, show_default=True, help="Rows per window.")
@click.option("--features", type=click.IntRange(1), default=30, show_default=True, help="Streams that are watched.")
@click.option("--reference-rows", type=click.IntRange(100), default=10_000, show_default=True, help="Training rows.")
@click.option("--window-hours", type=float, default=1.0, show_default=True, help="How long a window lasts.")
@click.option("--budget", type=float, help="False alarms per device and horizon. Default: the setting drift_budget.")
@click.option("--floor", type=float, help="Tolerated effect, w². Default: the setting drift_floor.")
@click.option("--runs", type=click.IntRange(4), default=24, show_default=True, help="Simulated devices per shift.")
@json_option
@click.pass_obj
def simulate(
    settings: Settings,
    rows: int,
    features: int,
    reference_rows: int,
    window_hours: float,
    budget: float | None,
    floor: float | None,
    runs: int,
    as_json: bool,
) -> None:
    """Tell which shift will be seen in how many hours, at this volume and budget."""
    import msgspec

    from lightship.fleet.reconciler import drift_settings
    from lightship.monitoring.simulate import DEFAULT, what_is_seen

    known = drift_settings(settings)
    known = msgspec.structs.replace(
        known,
        budget=known.budget if budget is None else budget,
        effect_floor=known.effect_floor if floor is None else floor,
    )
    found = what_is_seen(DEFAULT, known, rows=rows, streams=features, reference_rows=reference_rows, runs=runs)
    if as_json:
        emit([{**msgspec.to_builtins(f), "window_hours": window_hours} for f in found])
        return
    cells = [_hours(f, window_hours) for f in found]
    columns = ("a feature's", "w²", "ladder, computed", "warning", "90 %", "critical", "90 %")
    table(f"Hours until it is seen, {rows} rows per window, budget {known.budget:g}", columns, cells)
    say("After two weeks of healthy windows. A shift at or below the floor is tolerated by design, for ever.")


def _hours(seen: Seen, hours: float) -> tuple[object, ...]:
    times = (seen.analytic, seen.warning, seen.warning_90, seen.critical, seen.critical_90)
    return (seen.name, seen.effect, *("never" if t is None else f"{t * hours:g}" for t in times))


@drift.command()
@click.argument("reference", type=click.Path(path_type=Path))
@click.argument("current", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default="drift.html", show_default=True, help="The report.")
@click.option(
    "--alpha",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Chance of a false alarm over all columns together.",
)
@click.option("--floor", type=click.FloatRange(0), default=0.02, show_default=True, help="Tolerated effect, w².")
@click.option("--exclude", multiple=True, metavar="COLUMN", help="A column to leave out: ids, times; repeatable.")
@json_option
def compare(
    reference: Path, current: Path, out: Path, alpha: float, floor: float, exclude: tuple[str, ...], as_json: bool
) -> None:
    """Compare two CSV files of the same columns, and write an HTML report.

    Exit status: 0 no drift, 28 drift, 13 a file can't be read or has other columns, 2 wrong usage.
    """
    import msgspec

    from lightship.data.csv_loader import load_columns
    from lightship.monitoring.compare import compare as judge
    from lightship.web.compare_page import compare_page

    schema, then = load_columns(reference, leave_out=exclude)
    _, now = load_columns(current, schema=schema, leave_out=exclude)
    found = judge(then, now, schema, alpha=alpha, floor=floor)
    write_durably(out, compare_page(found, reference.name, current.name).encode())
    if as_json:
        emit({**msgspec.to_builtins(found), "report": str(out)})
    else:
        cells = [
            (c.name, c.psi, f"{c.psi_low:.3f} – {c.psi_high:.3f}", c.p_value, "drift" if c.alarm else "")
            for c in found.columns[:20]
        ]
        table("Columns", ("column", "PSI", "95 % interval", "p", ""), cells)
        say(f"{'Drift' if found.drift else 'No drift'}: {out}")
    if found.drift:
        sys.exit(EXIT_STATUS["drift"])
