"""CLI: experiments, a version beside the champion: in its shadow, or for a share of the keys."""

from __future__ import annotations

from typing import Any

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import FleetError

from .console import emit, json_option, say, stamp, table, with_home


@click.group()
def experiment() -> None:
    """Experiments beside the champion: start, list, show, stop."""


@experiment.command()
@click.argument("group")
@click.argument("reference", metavar="MODEL@VERSION")
@click.option("--shadow", is_flag=True, help="Ask it what the champion is asked; nobody hears its answers.")
@click.option("--share", type=float, help="Of the keys that it answers; with --shadow, of the rows that it is asked.")
@click.option("--per-request", is_flag=True, help="Deal out requests without a key too, each for itself.")
@click.option("--name", default="", help="A name to call it by.")
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def start(
    home: Home,
    group: str,
    reference: str,
    shadow: bool,
    share: float | None,
    per_request: bool,
    name: str,
    reason: str,
    as_json: bool,
) -> None:
    """Run a released version beside the champion on the devices of a group; `lightship up` has them told."""
    from lightship.fleet import comparison, experiments
    from lightship.registry.bundles import BundleCache

    if not shadow and share is None:
        message = "Expected --shadow, or the share of the keys that it answers."
        raise FleetError("fleet.experiment-spec", message, remedy="Add --shadow or --share 0.1.")
    wish = experiments.Wish(
        group=group,
        reference=reference,
        mode="shadow" if shadow else "ab",
        share=1.0 if share is None else share,
        per_request=per_request,
        name=name,
        reason=reason,
    )
    with home.database.write() as session:
        row = experiments.start(session, wish, BundleCache(home.artifacts), actor=operator())
        seen = comparison.summary(row)
    if as_json:
        emit(seen)
    else:
        say(f"Experiment {seen['id']}: {seen['model']}@{seen['version']} {_how(seen)} on {seen['group']}.")
        say(f"See what it shows: lightship experiment show {seen['id']}")


@experiment.command(name="list")
@json_option
@with_home
def list_(home: Home, as_json: bool) -> None:
    """All experiments, the newest first."""
    from lightship.fleet import comparison, experiments

    with home.database.read() as session:
        rows = [comparison.summary(row) for row in experiments.newest(session)]
    if as_json:
        emit(rows)
        return
    cells = [
        (r["id"], r["name"], r["group"], f"{r['model']}@{r['version']}", _how(r), r["status"], stamp(r["created_at"]))
        for r in rows
    ]
    table("Experiments", ("id", "name", "group", "version", "how", "status", "started"), cells)


@experiment.command()
@click.argument("which", metavar="EXPERIMENT")
@json_option
@with_home
def show(home: Home, which: str, as_json: bool) -> None:
    """What an experiment has shown so far."""
    from lightship.fleet import comparison, experiments
    from lightship.registry.bundles import BundleCache

    with home.database.read() as session:
        seen = comparison.view(session, experiments.get(session, which), BundleCache(home.artifacts))
    if as_json:
        emit(seen)
        return
    say(f"{seen['model']}@{seen['version']} {_how(seen)} on {seen['group']}: {seen['status']} {seen['ended_because']}")
    table("Devices", ("device", "state", "code"), [(d, s["state"], s["code"]) for d, s in seen["devices"].items()])
    found = [(name, seen[name]) for name in ("champion", "challenger") if seen[name]]
    cells = [
        (
            name,
            arm["devices"],
            arm["rows"],
            arm["failures"],
            _rate(arm["error_rate"], arm["error_interval"]),
            arm["labelled"],
            _number(arm["latency_p95_ms"]),
        )
        for name, arm in found
    ]
    table("Arms", ("arm", "devices", "rows", "server errors", "errs", "labelled", "p95 ms"), cells)
    if seen["agreement"]:
        _show_agreement(seen["agreement"])
    if seen["comparison"]:
        say(seen["comparison"]["sentence"])


@experiment.command()
@click.argument("which", metavar="EXPERIMENT")
@click.option("--reason", default="", help="Why; it is audited.")
@json_option
@with_home
def stop(home: Home, which: str, reason: str, as_json: bool) -> None:
    """End an experiment; devices forget the version that ran beside."""
    from lightship.fleet import comparison, experiments

    with home.database.write() as session:
        row = experiments.get(session, which)
        seen = comparison.summary(experiments.stop(session, row.id, actor=operator(), reason=reason))
    if as_json:
        emit(seen)
    else:
        say(f"Experiment {seen['id']} has ended.")


def _show_agreement(seen: dict[str, Any]) -> None:
    latency = seen["latency_ms"] or {"p50": None, "p95": None}
    say(
        f"The challenger agreed in {_rate(seen['agreement'], seen['interval'])} of {seen['rows']} rows; it failed at "
        f"{seen['failures']}, and {seen['dropped']} were not asked because it was busy."
    )
    say(
        f"Scores differ by {_number(seen['difference_mean'])} on average, {_number(seen['difference_max'])} at most; "
        f"a row takes it up to {_number(latency['p95'])} ms (p95)."
    )
    cells = [(c["champion"], c["challenger"], c["rows"]) for c in seen["confusion"]]
    if cells:
        table("They disagree", ("champion says", "challenger says", "rows"), cells)


def _how(seen: dict[str, Any]) -> str:
    share = f"{seen['share']:.1%}"
    if seen["mode"] == "shadow":
        return "in the shadow" if seen["share"] == 1 else f"in the shadow of {share} of the rows"
    return f"answers {share} of the keys" + (" and of requests without one" if seen["per_request"] else "")


def _rate(rate: float | None, interval: list[float] | None) -> str:
    return "–" if rate is None or interval is None else f"{rate:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
