"""`make demo`: play the story, write the report, exit 0 only if every step did what it says."""

from __future__ import annotations

import argparse
import fcntl
import json
import shutil
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

from .narrator import Narrator
from .report_page import render_report
from .stage import Stage, StageError
from .story import MODEL, Story, StoryError

#: Ctrl-C, `kill`, and a terminal that is closed.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> int:
    """Play; the exit status."""
    parser = argparse.ArgumentParser(
        prog="make demo", description="The whole Lightship loop on a fleet of camera meters."
    )
    parser.add_argument("--folder", type=Path, default=Path("build/demo"), help="Where to play; emptied first.")
    parser.add_argument("--keep", action="store_true", help="Leave everything running at the end, until Ctrl-C.")
    options = parser.parse_args()
    folder: Path = options.folder.resolve()
    # Also where a shell started us with SIGINT ignored, as it does for what runs in the background.
    for number in STOPPING:
        signal.signal(number, _interrupt)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            Console(stderr=True).print(f"A demo is running in {folder} already. Stop it with Ctrl-C where it runs.")
            return 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return play(folder, keep=options.keep)


def play(folder: Path, *, keep: bool) -> int:
    """Play in `folder`."""
    narrator = Narrator()
    narrator.console.print(
        "[bold]Lightship demo[/bold]: five camera meters read digits. Nothing is simulated but the world."
    )
    stage = Stage(folder)
    story = Story(stage, narrator)
    began = time.time()
    try:
        try:
            story.play()
        except (StoryError, StageError, httpx.HTTPError) as e:
            narrator.console.print(f"\n[red]The story broke:[/red] {e}\nLogs: {stage.logs}", markup=True)
        passed = conclude(folder, story, began)
        if keep:
            wait_for_interrupt(narrator.console, stage)
    except KeyboardInterrupt:
        narrator.console.print("\nInterrupted; stopping everything.")
        return 130
    finally:
        # A second Ctrl-C must not leave processes behind.
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)
        for camera in story.cameras.values():
            camera.stop()
        stage.close()
    return 0 if passed else 1


def conclude(folder: Path, story: Story, began: float) -> bool:
    """Step 8: the summary, report.json and report.html; whether every step passed."""
    narrator = story.narrator
    steps = narrator.steps
    passed = len(steps) == 9 and all(s.passed for s in steps)
    seconds = round(time.time() - began, 1)
    narrator.console.print()
    rows = [[i, s.name, "✓" if s.passed else "✗", f"{s.seconds:.1f}", s.happened] for i, s in enumerate(steps, 1)]
    narrator.table(f"Summary, {seconds:.0f} s", ["", "step", "", "s", "what happened"], rows)
    facts = {
        "title": "Lightship demo",
        "started": int(began * 1_000),
        "seconds": seconds,
        "passed": passed,
        "model": MODEL,
        "steps": [asdict(s) for s in steps],
        "events": story.events,
        **seen_by_control_plane(story),
    }
    (folder / "report.json").write_text(json.dumps(facts, indent=1))
    (folder / "report.html").write_text(render_report(facts))
    narrator.console.print(f"\nReport: {folder / 'report.html'} and report.json beside it.")
    narrator.console.print(
        "[green]Every step did what it says.[/green]" if passed else "[red]Not every step passed.[/red]"
    )
    return passed


def seen_by_control_plane(story: Story) -> dict[str, Any]:
    """What the report's plots are made of; what can't be had any more is left out."""
    stage = story.stage
    try:
        overview = stage.api("overview")
        return {
            "broker": f"{stage.addresses['broker']} {stage.addresses['notice']}".strip(),
            "windows": stage.api(f"models/{MODEL}/windows"),
            "rollouts": overview["rollouts"],
            "versions": overview["models"],
            "alarms": overview["alarms"],
            "devices": overview["devices"],
            "exposures": {str(v): stage.api(f"models/{MODEL}/versions/{v}/exposures") for v in (1, 2, 3)},
            "drift_examples": drift_examples(overview["alarms"]),
        }
    except (httpx.HTTPError, AssertionError, KeyError):
        return {}


def drift_examples(alarms: list[dict[str, Any]], most: int = 6) -> list[dict[str, Any]]:
    """The worst features of the first local alarm and of the last: reference and current, cell by cell."""
    local = sorted((a for a in alarms if a["kind"] == "local"), key=lambda a: a["opened_at"])
    found = []
    for alarm in local[:1] + local[-1:]:
        for shift in alarm["evidence"].get("evidence", [])[: most // 2]:
            name = f"{shift['name']} on {alarm['device']} (PSI {shift['psi']:.2f})"
            found.append({"name": name, "reference": shift["reference"], "current": shift["current"]})
    return found


def wait_for_interrupt(console: Console, stage: Stage) -> None:
    """Leave it running."""
    console.print(f"\nStill running. Dashboard: {stage.addresses.get('dashboard')}   Home: {stage.home}")
    program = Path(sys.executable).with_name("lightship")
    console.print(f"Try: {program} --home {stage.home} device list    (Ctrl-C stops everything)", soft_wrap=True)
    while True:
        time.sleep(3600)


def _interrupt(_number: int, _frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
