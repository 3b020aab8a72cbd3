"""CLI: rules for Prometheus and dashboards for Grafana, as files to copy."""

from __future__ import annotations

from pathlib import Path

import click

from .console import emit, json_option, say


@click.group()
def dashboards() -> None:
    """Prometheus rules, an Alertmanager route and Grafana dashboards, as files."""


@dashboards.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite files that differ from ours.")
@json_option
def export(folder: Path, force: bool, as_json: bool) -> None:
    """Write them below FOLDER."""
    from lightship.dashboards.export import export as write

    written = write(folder, force=force)
    if as_json:
        emit({"written": [str(p) for p in written]})
    else:
        say("\n".join(str(p) for p in written))
