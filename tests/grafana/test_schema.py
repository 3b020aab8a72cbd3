"""The dashboards, by Grafana's own schema: its published types, and a compiler that knows them.

Grafana itself is not to be had as a package; what it can import is what these types describe.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import pytest
from tests.control_plane.dashboards.files import DASHBOARDS, dashboard

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
_PANELS: Final = {"stat": "Stat", "timeseries": "TimeSeries", "bargauge": "BarGauge", "table": "Table"}
#: JSON has no enumerations: their values are what they are called in TypeScript.
_HEAD: Final = """
import type { Dashboard, DataQuery, GraphFieldConfig } from '@grafana/schema';
type Plain<T> = T extends string ? `${T}` : T extends (infer U)[] ? Plain<U>[]
  : T extends object ? { [K in keyof T]: Plain<T[K]> } : T;
"""


@pytest.fixture(scope="module")
def schema() -> Path:
    """A folder with the schema and the compiler, made once from the hashed lock."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    name = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:12]
    folder = ROOT / "build" / "grafana" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            for file in ("package.json", "package-lock.json"):
                shutil.copy(HERE / file, folder)
            words = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
            if done.returncode != 0:
                pytest.skip(f"Grafana's schema can't be installed here; npm says: {done.stderr.strip()[-300:]}")
            (folder / ".ready").touch()
    return folder


def objections(schema: Path, tmp_path: Path, boards: dict[str, dict[str, Any]]) -> str:
    """What the compiler says of them, "" if nothing."""
    lines = [_HEAD]
    for kind, name in _PANELS.items():
        lines.append(
            f"import type {{ Options as {kind} }} from "
            f"'@grafana/schema/dist/esm/raw/composable/{kind}/panelcfg/x/{name}PanelCfg_types.gen';"
        )
    for name, board in boards.items():
        lines += _typed(name.replace("-", "_"), board)
    source = tmp_path / "check.ts"
    source.write_text("\n".join(lines))
    (tmp_path / "node_modules").symlink_to(schema / "node_modules")
    words = ["node", schema / "node_modules" / "typescript" / "bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck"]
    words += ["--module", "esnext", "--moduleResolution", "bundler", "--target", "es2022", source]
    done = subprocess.run(list(map(str, words)), cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout


def _typed(name: str, board: dict[str, Any]) -> list[str]:
    """Constants with the types that the schema gives them; of queries it knows only what all data sources share."""
    board = json.loads(json.dumps(board))
    for annotation in board["annotations"]["list"]:
        annotation["target"] = {"refId": annotation["target"]["refId"]}
    found = [f"export const {name}: Plain<Dashboard> = {json.dumps(board)};"]
    for panel in board["panels"]:
        of = f"{name}_{panel['id']}"
        if panel["type"] != "row":
            found.append(f"export const {of}: Plain<{panel['type']}> = {json.dumps(panel['options'])};")
            targets = [{k: t[k] for k in ("refId", "datasource")} for t in panel["targets"]]
            found.append(f"export const {of}_targets: Plain<DataQuery>[] = {json.dumps(targets)};")
        if custom := panel.get("fieldConfig", {}).get("defaults", {}).get("custom"):
            found.append(f"export const {of}_custom: Plain<GraphFieldConfig> = {json.dumps(custom)};")
    return found


@pytest.mark.slow
def test_every_dashboard_is_what_grafanas_schema_describes(schema: Path, tmp_path: Path) -> None:
    assert objections(schema, tmp_path, {p.stem: dashboard(p) for p in DASHBOARDS}) == ""


@pytest.mark.slow
def test_a_dashboard_that_is_not_is_noticed(schema: Path, tmp_path: Path) -> None:
    board = dashboard(DASHBOARDS[0])
    board["panels"][1]["options"]["colorMode"] = "rainbow"
    board["panels"][1]["gridPos"]["width"] = 3

    said = objections(schema, tmp_path, {"fleet": board})

    assert '"rainbow"' in said
    assert '"width"' in said
