"""`make fuzz`: every target in a process of its own, two at a time; exit 0 only if none failed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

import reliability_page

from .play import Result, limit_memory, play
from .targets import TARGETS, Target

SECTION: Final = "fuzz"


def main(arguments: list[str] | None = None) -> int:
    """Fuzz what is asked for; the exit status."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Foreign bytes for every parser.")
    parser.add_argument("--seconds", type=float, default=30.0, help="For each target.")
    parser.add_argument("--only", default="", help="Targets whose name has these words.")
    parser.add_argument("--seed", type=int, default=0, help="Of the inputs; 0: of the day.")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="Where inputs of failures are kept.")
    parser.add_argument("--here", default="", help="This target, in this process; JSON on standard output.")
    options = parser.parse_args(arguments)
    seed = options.seed or datetime.now(UTC).toordinal()
    chosen = [t for t in TARGETS if options.only.lower() in t.name.lower()]
    if options.here:
        limit_memory()
        target = next(t for t in TARGETS if t.name == options.here)
        result = play(target, seconds=options.seconds, seed=seed, keep=options.folder)
        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
        return 0
    results = _all(chosen, options.seconds, seed, options.folder)
    if not options.only and len(results) == len(TARGETS):
        reliability_page.put(SECTION, section(results, options.seconds))
    failures = sum(len(r.failures) for r in results)
    print(f"{len(results)} targets, {sum(r.executions for r in results):,} executions, {failures} failures")
    return 1 if failures or not results else 0


def _all(targets: list[Target], seconds: float, seed: int, folder: Path) -> list[Result]:
    lock = threading.Lock()

    def one(target: Target) -> Result:
        result = _apart(target, seconds, seed, folder)
        with lock:
            print(f"{result.executions:9,}  {len(result.failures)} failures  {target.name}", flush=True)
            for words in result.failures[:5]:
                print(f"           {words}", flush=True)
        return result

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, targets))


def _apart(target: Target, seconds: float, seed: int, folder: Path) -> Result:
    command = [sys.executable, "-m", "fuzz", "--here", target.name, "--seconds", str(seconds)]
    words = [*command, "--seed", str(seed), "--folder", str(folder)]
    try:
        done = subprocess.run(words, capture_output=True, timeout=seconds * 3 + 120, check=False)
    except subprocess.TimeoutExpired:
        return Result(target=target.name, seed=seed, failures=["an input hangs"])
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return Result(target=target.name, seed=seed, failures=[f"the process ended with {done.returncode}: {last}"])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Result)


def section(results: list[Result], seconds: float) -> str:
    """The text of the section."""
    total, failures = sum(r.executions for r in results), sum(len(r.failures) for r in results)
    facts = (
        f"**{total:,} executions of {len(results)} targets, {failures} failures.** "
        f"`make fuzz FUZZ_SECONDS={seconds:g}`, {datetime.now(UTC):%Y-%m-%d}, seed {results[0].seed}."
    )
    of = {t.name: t for t in TARGETS}
    rows = [
        (
            r.target,
            of[r.target].code,
            "before" if of[r.target].before else "after",
            f"{r.executions:,}",
            f"{r.accepted:,}",
            ", ".join(f"`{code}` {n:,}" for code, n in list(r.refused.items())[:6]) or "–",
            f"{r.slowest_ms:g} ms",
            str(len(r.failures)),
        )
        for r in results
    ]
    columns = ("what", "code", "signature", "executions", "accepted", "refused as", "slowest", "failures")
    return f"{facts}\n\n{reliability_page.table(columns, rows)}"


if __name__ == "__main__":
    sys.exit(main())
