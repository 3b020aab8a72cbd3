"""CLI: training, registered models, releases."""

from __future__ import annotations

import re
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import GateError

from .console import emit, json_option, say, stamp, table, with_home

FORCE = click.option("--force-reason", help="Register although a metric gate fails; the reason is audited.")
GATE = click.option(
    "--gate", multiple=True, metavar="METRIC=LIMIT", help="A limit, e.g. accuracy=0.9; may be repeated."
)


@click.command()
@click.argument("dataset")
@click.option("--model", "name", required=True, help="The registered model's name.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A TOML or JSON recipe.")
@click.option("--estimator", help="Instead of a recipe: e.g. random-forest, or sklearn.svm.SVC.")
@click.option("--scale", is_flag=True, help="With --estimator: standardise the features first.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --estimator.")
@click.option("--allow-module", multiple=True, help="A package, besides scikit-learn, whose estimators are trusted.")
@GATE
@FORCE
@json_option
@with_home
def train(
    home: Home,
    dataset: str,
    name: str,
    recipe: Path | None,
    estimator: str | None,
    scale: bool,
    seed: int,
    allow_module: tuple[str, ...],
    gate: tuple[str, ...],
    force_reason: str | None,
    as_json: bool,
) -> None:
    """Train on DATASET, gate, convert, prove parity, and register the next version of a model."""
    from lightship.api import views
    from lightship.registry.pipeline import train_version
    from lightship.training.recipe import load_recipe, parse_recipe

    if (recipe is None) == (estimator is None):
        raise click.UsageError("Give either --recipe or --estimator.")
    if recipe is not None:
        chosen = load_recipe(recipe)
        if gate:
            raise click.UsageError("The recipe holds the gate; --gate goes with --estimator.")
    else:
        chosen = parse_recipe({"estimator": estimator, "scale": scale, "seed": seed, "gate": limits(gate)})
    version = train_version(
        home,
        dataset=dataset,
        recipe=chosen,
        model=name,
        actor=operator(),
        force_reason=force_reason,
        progress=lambda text: say(f"  {text} …"),
        allow_modules=allow_module,
    )
    with home.database.read() as session:
        _show_version(views.model_version(session, version), as_json=as_json)


@click.group()
def model() -> None:
    """Registered models, their versions and aliases."""


@model.command("list")
@click.argument("name", default="")
@json_option
@with_home
def list_(home: Home, name: str, as_json: bool) -> None:
    """All versions, or those of one model."""
    from lightship.api import views

    with home.database.read() as session:
        rows = views.models(session, name)
    if as_json:
        emit(rows)
        return
    cells = [
        (
            f"{r['model']}@{r['version']}",
            r["state"],
            r["aliases"],
            _headline(r["metrics"]),
            r["digest"][:12],
            r["forced_reason"],
        )
        for r in rows
    ]
    table("Models", ("version", "state", "aliases", "metrics", "bundle", "forced because"), cells)


@model.command()
@click.argument("reference")
@json_option
@with_home
def show(home: Home, reference: str, as_json: bool) -> None:
    """A version with its run. REFERENCE is name, name@3 or name@champion."""
    from lightship.api import views
    from lightship.registry import versions
    from lightship.storage.models import Run

    with home.database.read() as session:
        row = versions.resolve(session, reference)
        stored = session.get(Run, row.run_id)
        assert stored is not None
        facts = {**views.model_version(session, row), "run": views.run(stored)}
    if as_json:
        emit(facts)
        return
    _show_version(facts, as_json=False)
    for check in facts["run"]["gate"].get("checks", []):
        say(f"gate   {'holds ' if check['holds'] else 'FAILED'} {check['sentence']}")
    run, parity = facts["run"], facts["run"]["parity"]
    differ = f"{parity['label_flips']} labels differ, largest difference {parity['max_diff']:.1e}"
    say(f"parity {parity['rows']} rows, {differ}")
    say(f"run    {run['id']} on {run['dataset_digest'][:12]}, code {run['code_revision'][:12]}")
    cells = [
        (c["label"], c["precision"], c["recall"], c["f1"], c["support"])
        for c in facts["run"]["metrics"].get("per_class", [])
    ]
    if cells:
        table("Classes", ("class", "precision", "recall", "f1", "rows"), cells)


@model.command()
@click.argument("reference")
@click.argument("alias")
@json_option
@with_home
def alias(home: Home, reference: str, alias: str, as_json: bool) -> None:
    """Point ALIAS (champion, challenger, or your own) to a version."""
    from lightship.registry import versions

    with home.database.write() as session:
        row = versions.resolve(session, reference)
        versions.set_alias(session, row.model, alias, row.version, actor=operator())
    if as_json:
        emit({"model": row.model, "alias": alias, "version": row.version})
    else:
        say(f"{row.model}@{alias} is version {row.version}.")


@model.command("import")
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--model", "name", required=True, help="The registered model's name.")
@click.option("--data", "csv", required=True, type=click.Path(path_type=Path), help="Reference rows with their truth.")
@click.option("--target", required=True, help="The column that holds the truth.")
@click.option("--task", type=click.Choice(["auto", "classification", "regression"]), default="auto", show_default=True)
@GATE
@FORCE
@json_option
@with_home
def import_(
    home: Home,
    onnx: Path,
    name: str,
    csv: Path,
    target: str,
    task: str,
    gate: tuple[str, ...],
    force_reason: str | None,
    as_json: bool,
) -> None:
    """Bring your own ONNX model through the same gates."""
    from lightship.api import views
    from lightship.data.csv_loader import load_csv
    from lightship.registry.datasets import add_dataset
    from lightship.registry.pipeline import check_is_model, import_version

    reference = load_csv(csv, name=f"{name}-reference", target=target, task=task)  # type: ignore[arg-type]
    check_is_model(onnx)
    add_dataset(home, reference, source=csv.name, parent=None, actor=operator())
    version = import_version(
        home,
        onnx=onnx,
        reference=reference,
        model=name,
        gate=limits(gate),
        actor=operator(),
        force_reason=force_reason,
        progress=lambda text: say(f"  {text} …"),
    )
    with home.database.read() as session:
        _show_version(views.model_version(session, version), as_json=as_json)


@model.command()
@click.argument("reference")
@json_option
@with_home
def exposure(home: Home, reference: str, as_json: bool) -> None:
    """Who was ever served by a version, and for how long."""
    from lightship.api import views
    from lightship.registry import versions

    with home.database.read() as session:
        row = versions.resolve(session, reference)
        spans = views.exposures(session, row.model, row.version)
    if as_json:
        emit(spans)
        return
    cells = [
        (s["device"], stamp(s["began_at"]), stamp(s["ended_at"]), s["seconds"], s["requests"], s["failures"])
        for s in spans
    ]
    table(f"Served by {row.model}@{row.version}", ("device", "from", "to", "seconds", "rows", "failures"), cells)


class _PublishByDefault(click.Group):
    """`lightship release digits@1` means `lightship release publish digits@1`."""

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
            args = ["publish", *args]
        return super().resolve_command(context, args)


@click.group(cls=_PublishByDefault)
def release() -> None:
    """Sign and publish versions (`release REFERENCE`), list and revoke them."""


@release.command()
@click.argument("reference")
@click.option(
    "--deltas/--no-deltas", default=True, show_default=True, help="Make patches from what devices run, where they pay."
)
@json_option
@with_home
def publish(home: Home, reference: str, deltas: bool, as_json: bool) -> None:
    """Sign a version's bundle and publish it in the release repository."""
    from lightship.api import views
    from lightship.registry.release import release as release_version

    row = release_version(home, reference, actor=operator(), deltas=deltas, progress=lambda text: say(f"  {text} …"))
    with home.database.read() as session:
        _show_version(views.model_version(session, row), as_json=as_json)


@release.command("list")
@json_option
@with_home
def released(home: Home, as_json: bool) -> None:
    """What the signed repository lists."""
    rows = home.releases.released()
    if as_json:
        emit([{"path": r.path, "sha256": r.sha256, "length": r.length, "transport": r.transport_length} for r in rows])
        return
    cells = [(r.path, r.sha256[:12], r.length, r.transport_length) for r in rows]
    table("Released bundles", ("path", "sha256", "bytes", "bytes sent"), cells)


@release.command()
@click.argument("reference")
@click.option("--reason", required=True, help="Why; it is audited.")
@json_option
@with_home
def revoke(home: Home, reference: str, reason: str, as_json: bool) -> None:
    """De-list a version: no device accepts it any more."""
    from lightship.api import views
    from lightship.registry.release import revoke as revoke_version

    row = revoke_version(home, reference, actor=operator(), reason=reason)
    with home.database.read() as session:
        _show_version(views.model_version(session, row), as_json=as_json)


class _Life(click.ParamType[timedelta]):
    """`30d`, `36h` or `90min` as a time span."""

    name = "TIME"
    _UNITS: ClassVar = {"d": "days", "h": "hours", "min": "minutes"}

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        """Raise a usage error for anything else."""
        if isinstance(value, timedelta):
            return value
        match = re.fullmatch(r"([1-9][0-9]{0,4})(d|h|min)", str(value))
        if match is None:
            self.fail(f"expected a time such as 30d, 36h or 90min, found {value!r}.", param, ctx)
        return timedelta(**{self._UNITS[match[2]]: int(match[1])})


@release.command("export")
@click.option("--device", "devices", multiple=True, help="A device the file is for; may be repeated.")
@click.option("--group", default="", help="All active devices of this group.")
@click.option("--expires", type=_Life(), default="30d", show_default=True, help="How long the file is good: 30d, 36h.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The file, for instance on a stick."
)
@json_option
@with_home
def export_(home: Home, devices: tuple[str, ...], group: str, expires: timedelta, output: Path, as_json: bool) -> None:
    """Write one signed file that brings devices without a network what they are assigned."""
    from lightship.fleet.export import export

    if not devices and not group:
        raise click.UsageError("Give --device, which may be repeated, or --group.")
    made = export(
        home,
        output,
        devices=devices,
        group=group,
        life=expires,
        actor=operator(),
        progress=lambda text: say(f"  {text} …"),
    )
    facts = {
        "file": str(made.path),
        "bytes": made.size,
        "until": made.until.isoformat(),
        "devices": list(made.devices),
        "bundles": list(made.bundles),
    }
    if as_json:
        emit(facts)
        return
    until = f"{made.until:%Y-%m-%d %H:%M} UTC"
    say(f"{made.path}: {made.size / 1e6:.1f} MB, for {len(made.devices)} device(s), good until {until}.")
    say(f"On each of them: lightship-agent import {made.path.name}")


def limits(gate: tuple[str, ...]) -> dict[str, float]:
    """`accuracy=0.9` as a number by name.

    Raises:
        GateError: gate.metric.
    """
    found = {}
    for text in gate:
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError as e:
            raise GateError("gate.metric", f"Expected METRIC=LIMIT, found {text!r}.") from e
    return found


def _show_version(facts: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(facts)
        return
    say(f"{facts['model']}@{facts['version']} is {facts['state']}: {_headline(facts['metrics'])}")
    say(f"bundle {facts['digest']} ({facts['length']} bytes)")


def _headline(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in sorted(metrics.items())[:3])
