"""CLI: training and registered models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from lightship.home import Home, operator
from lightship_agent.contract.codes import GateError
from lightship_agent.contract.manifest import PROVIDERS, Runtime

from .console import emit, json_option, say, stamp, table, with_home
from .data import CATEGORICAL, UNKNOWN

FORCE = click.option("--force-reason", help="Register although a metric gate fails; the reason is audited.")
GATE = click.option(
    "--gate", multiple=True, metavar="METRIC=LIMIT", help="A limit, e.g. accuracy=0.9; may be repeated."
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "int8"]),
    default="fp32",
    show_default=True,
    help="What the model on devices computes in: fp16 and int8 for networks, refused where nothing is gained.",
)
PROVIDER = click.option(
    "--provider",
    multiple=True,
    type=click.Choice(PROVIDERS),
    help="What shall compute on devices that have it, rather than the CPU; may be repeated, the best first.",
)
THREADS = click.option(
    "--threads", type=int, default=1, show_default=True, help="Threads that one prediction may take on a device."
)


@click.command()
@click.argument("dataset")
@click.option("--model", "name", required=True, help="The registered model's name.")
@click.option("--recipe", type=click.Path(path_type=Path), help="A TOML or JSON recipe.")
@click.option("--estimator", help="Instead of a recipe: e.g. random-forest, or sklearn.svm.SVC.")
@click.option("--scale", is_flag=True, help="With --estimator: standardise the features first.")
@click.option("--seed", type=int, default=0, show_default=True, help="With --estimator.")
@click.option(
    "--explain",
    type=click.Choice(["permutation", "shap", "lime"]),
    default="permutation",
    show_default=True,
    help="With --estimator: how the card's importances are found; shap and lime are extras of the control plane.",
)
@click.option("--allow-module", multiple=True, help="A package, besides scikit-learn, whose estimators are trusted.")
@PRECISION
@PROVIDER
@THREADS
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
    explain: str,
    allow_module: tuple[str, ...],
    precision: str,
    provider: tuple[str, ...],
    threads: int,
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
        if provider or threads != 1 or precision != "fp32":
            raise click.UsageError("The recipe holds precision, providers and threads; the flags go with --estimator.")
    else:
        chosen = parse_recipe(
            {
                "estimator": estimator,
                "scale": scale,
                "seed": seed,
                "gate": limits(gate),
                "explain": explain,
                "precision": precision,
                "providers": provider,
                "intra_op_threads": threads,
            }
        )
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
        show_version(views.model_version(session, version), as_json=as_json)


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
    show_version(facts, as_json=False)
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
@CATEGORICAL
@UNKNOWN
@PRECISION
@PROVIDER
@THREADS
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
    categorical: tuple[str, ...],
    unknown: str,
    precision: Literal["fp32", "fp16", "int8"],
    provider: tuple[str, ...],
    threads: int,
    gate: tuple[str, ...],
    force_reason: str | None,
    as_json: bool,
) -> None:
    """Bring your own ONNX model through the same gates."""
    from lightship.api import views
    from lightship.data.csv_loader import load_csv
    from lightship.registry.datasets import add_dataset
    from lightship.registry.pipeline import check_is_model, import_version
    from lightship.training.recipe import check_wishes

    reference = load_csv(
        csv,
        name=f"{name}-reference",
        target=target,
        task=task,  # type: ignore[arg-type]
        categorical=categorical,
        unknown=unknown,  # type: ignore[arg-type]
    )
    check_wishes(provider, threads)
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
        precision=precision,
        runtime=Runtime(providers=provider, intra_op_threads=threads),
    )
    with home.database.read() as session:
        show_version(views.model_version(session, version), as_json=as_json)


@model.command("import-tensors")
@click.argument("onnx", type=click.Path(path_type=Path))
@click.option("--model", "name", required=True, help="The registered model's name.")
@click.option(
    "--manifest", required=True, type=click.Path(path_type=Path), help="TOML: inputs, outputs, their meaning."
)
@click.option(
    "--golden", required=True, type=click.Path(path_type=Path), help=".npz: an array for each input and output."
)
@json_option
@with_home
def import_tensors_(home: Home, onnx: Path, name: str, manifest: Path, golden: Path, as_json: bool) -> None:
    """Bring an ONNX model that takes tensors or images, proved on golden rows from its makers."""
    from lightship.api import views
    from lightship.registry.tensors import import_tensors

    version = import_tensors(
        home,
        onnx=onnx,
        declared=manifest,
        golden=golden,
        model=name,
        actor=operator(),
        progress=lambda text: say(f"  {text} …"),
    )
    with home.database.read() as session:
        show_version(views.model_version(session, version), as_json=as_json)


@model.command()
@click.argument("reference")
@click.argument("rows", type=click.Path(path_type=Path))
@click.option("--permutations", type=click.IntRange(1, 10_000), default=100, show_default=True, help="Walks per row.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the walks' order.")
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, help="Features shown of each row.")
@json_option
@with_home
def explain(home: Home, reference: str, rows: Path, permutations: int, seed: int, top: int, as_json: bool) -> None:
    """Why a version answers the rows of a CSV file so. REFERENCE is name, name@3 or name@champion."""
    from lightship.registry.reasons import explain_version

    told = explain_version(home, reference, rows, permutations=permutations, seed=seed, top=top)
    if as_json:
        emit(told)
        return
    for number, one in enumerate(told["explanations"], start=1):
        cells = [(r["feature"], r["value"], f"{r['attribution']:+.4f}") for r in one["top"]]
        title = f"Row {number}: {one['target']} {one['explained']:.4f}, on the average {one['base']:.4f}"
        table(title, ("feature", "value", "share"), cells)


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


def show_version(facts: dict[str, Any], *, as_json: bool) -> None:
    """A version, in two lines or as JSON."""
    if as_json:
        emit(facts)
        return
    say(f"{facts['model']}@{facts['version']} is {facts['state']}: {_headline(facts['metrics'])}")
    say(f"bundle {facts['digest']} ({facts['length']} bytes)")


def _headline(metrics: dict[str, float]) -> str:
    return ", ".join(f"{k} {v:.4f}" for k, v in sorted(metrics.items())[:3])
