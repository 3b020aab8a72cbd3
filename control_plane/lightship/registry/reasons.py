"""Registry: why a registered version answers so, by the code that devices explain with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightship.data.csv_loader import load_rows
from lightship.home import Home
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.reasons import explain_rows, plain

from . import versions


def explain_version(
    home: Home, reference: str, rows: Path, *, permutations: int, seed: int, top: int
) -> dict[str, Any]:
    """What the version's model says to the rows of a CSV file, and why; as the device tells it, without its bounds.

    Raises:
        RegistryError: registry.unknown-model, registry.unknown-version.
        DataError: as `load_rows`.
        ServingError: serving.no-background, serving.runtime.
    """
    with home.database.read() as session:
        digest = versions.resolve(session, reference).digest
    model = load_model(read_bundle(home.artifacts.get(digest)))
    found = explain_rows(model, load_rows(rows, model.schema), permutations=permutations, seed=seed)
    return plain(found, model, top)
