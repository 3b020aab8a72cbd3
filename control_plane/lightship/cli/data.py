"""CLI: datasets."""

from __future__ import annotations

from pathlib import Path

import click

from lightship.home import Home, operator

from .console import emit, json_option, say, stamp, table, with_home

CATEGORICAL = click.option(
    "--categorical",
    multiple=True,
    metavar="COLUMN",
    help="A column of categories that look like numbers, or of 101 to 4096 words; repeatable.",
)
UNKNOWN = click.option(
    "--unknown",
    type=click.Choice(["error", "code"]),
    default="error",
    show_default=True,
    help="A word that is in none of these rows is refused on devices, or becomes a number of its own.",
)


@click.group()
def data() -> None:
    """Datasets: content-addressed versions with a schema."""


@data.command()
@click.argument("csv", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The dataset's name.")
@click.option("--target", required=True, help="The column to predict.")
@click.option("--task", type=click.Choice(["auto", "classification", "regression"]), default="auto", show_default=True)
@click.option("--allow-missing", is_flag=True, help="Empty cells are allowed; the model must then handle them.")
@CATEGORICAL
@UNKNOWN
@json_option
@with_home
def add(
    home: Home,
    csv: Path,
    name: str,
    target: str,
    task: str,
    allow_missing: bool,
    categorical: tuple[str, ...],
    unknown: str,
    as_json: bool,
) -> None:
    """Add a CSV file as the next version of a dataset. Columns of words, at most 100 of them, become categories."""
    from lightship.api import views
    from lightship.data.csv_loader import load_csv
    from lightship.registry.datasets import add_dataset

    dataset = load_csv(
        csv,
        name=name,
        target=target,
        task=task,  # type: ignore[arg-type]
        allow_missing=allow_missing,
        categorical=categorical,
        unknown=unknown,  # type: ignore[arg-type]
    )
    row = add_dataset(home, dataset, source=csv.name, parent=None, actor=operator())
    if as_json:
        emit(views.dataset(row))
        return
    say(f"{row.name}@{row.version}: {row.rows} rows, {row.features} features, {row.task} of {row.target!r}")
    worded = [f"{f.name} ({len(f.levels)})" for f in dataset.schema.features if f.is_categorical]
    if worded:
        say(f"categories: {', '.join(worded)}")
    say(f"digest {row.digest}")


@data.command("list")
@json_option
@with_home
def list_(home: Home, as_json: bool) -> None:
    """All dataset versions."""
    from lightship.api import views
    from lightship.registry.datasets import listed

    with home.database.read() as session:
        rows = [views.dataset(r) for r in listed(session)]
    if as_json:
        emit(rows)
        return
    cells = [
        (f"{r['name']}@{r['version']}", r["rows"], r["features"], r["task"], r["digest"][:12], r["source"])
        for r in rows
    ]
    table("Datasets", ("dataset", "rows", "features", "task", "digest", "source"), cells)


@data.command()
@click.argument("dataset")
@json_option
@with_home
def show(home: Home, dataset: str, as_json: bool) -> None:
    """A dataset's features, and what their values look like. DATASET is name, name@2 or a digest."""
    import msgspec

    from lightship.api import views
    from lightship.data.summary import summarise
    from lightship.registry.datasets import resolve_dataset

    with home.database.read() as session:
        row = resolve_dataset(session, dataset)
    summary = summarise(home.datasets.get(row.digest))
    if as_json:
        emit({**views.dataset(row), "summary": msgspec.to_builtins(summary)})
        return
    say(f"{row.name}@{row.version}, {row.rows} rows, added {stamp(row.created_at)}, digest {row.digest}")
    cells = [(f.name, f.title, f.low, f.mean, f.high, f.missing, f.distinct) for f in summary.features]
    table("Features", ("feature", "column", "min", "mean", "max", "missing", "distinct"), cells)
    worded = [(f.name, len(f.categories), ", ".join(f.categories)) for f in summary.features if f.categories]
    if worded:
        table("Categories", ("feature", "categories", "words"), worded)
    if summary.classes:
        table(f"Target {row.target}", ("class", "rows"), list(summary.classes.items()))


@data.command()
@click.argument("name", type=click.Choice(["wine", "breast-cancer", "digits", "iris"]))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The CSV file to write.")
@json_option
def example(name: str, out: Path, as_json: bool) -> None:
    """Write one of scikit-learn's bundled datasets as CSV, to try things with."""
    from lightship.data.examples import write_example

    rows = write_example(name, out)
    if as_json:
        emit({"path": str(out), "rows": rows, "target": "target"})
    else:
        say(f"{rows} rows in {out}; the target column is 'target'.")
