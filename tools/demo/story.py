"""Demo: the story, step by step. Each step says what is expected, does it through the commands an operator has,
looks at what the control plane then reports, and fails if that is something else.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .narrator import Narrator
from .stage import Stage, StageError
from .world import Camera, World, split_digits

MODEL = "digits"
GROUP = "meters"
DEVICES = tuple(f"meter-{i}" for i in range(1, 6))
PER_SECOND = 20.0  # images per camera
PATIENCE = 300.0  # seconds until something is given up; a busy machine takes many times longer than a quiet one
RECIPE = """\
# A forest is small, fast, and converts exactly.
estimator = "random-forest"
seed = 7
test_share = 0.25

[params]
n_estimators = 60
max_depth = 12

[gate]
accuracy = 0.9
"""
CONTROL_PLANE_FLAGS = (
    "--api-port", "0", "--device-port", "0", "--mqtt-port", "0", "--reconcile-seconds", "0.5",
    "--drift-levels", "4", "--retrain", "auto", "--retrain-min-rows", "300",
)  # fmt: skip
AGENT_FLAGS = (
    "--poll-seconds", "5", "--report-seconds", "1", "--soak-seconds", "2", "--window-rows", "50",
    "--window-min-seconds", "0", "--log-level", "info",
    "--share-labelled-rows", "200", "--share-rows-a-day", "1000000", "--share-kb-a-day", "1000000",
)  # fmt: skip


class StoryError(Exception):
    """Something else happened than was expected."""


class Story:
    """The steps, in order; each may use what the ones before made."""

    def __init__(self, stage: Stage, narrator: Narrator) -> None:
        """Nothing happens yet."""
        self.stage = stage
        self.narrator = narrator
        self.world: World | None = None
        self.cameras: dict[str, Camera] = {}
        self.events: list[dict[str, Any]] = []
        self.dirty = ""

    def play(self) -> None:
        """All of it."""
        self.train()
        self.release()
        self.start()
        self.roll_out_first()
        self.serve()
        self.local_drift()
        self.fleet_drift()
        self.retrain()
        self.bad_model()

    # The steps ------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Step 1."""
        with self._step("Train a digit reader", "accuracy ≥ 0.90 on held-out images; run and dataset recorded") as step:
            train_x, train_y, field_x, field_y = split_digits()
            self.world = World(field_x, field_y)
            data, recipe = self.stage.folder / "digits.csv", self.stage.folder / "recipe.toml"
            write_csv(data, train_x, train_y)
            recipe.write_text(RECIPE)
            self.stage.lightship("init")
            added = self.stage.lightship("data", "add", str(data), "--name", MODEL, "--target", "digit")
            self.say(f"dataset {MODEL}@1: {added['rows']} images of 8×8, digest {added['digest'][:12]}")
            self.say(f"the other {len(field_x)} images are the world: no model will learn them before it is asked")
            with self.narrator.progress("train → gate → convert in a process of its own → prove parity"):
                made = self.stage.lightship("train", MODEL, "--model", MODEL, "--recipe", str(recipe))
            classes = self.stage.lightship("model", "show", f"{MODEL}@1")["run"]["metrics"]["per_class"]
            weakest = min(classes, key=lambda c: c["f1"])
            scores = f"precision {weakest['precision']:.2f}, recall {weakest['recall']:.2f}"
            self.say(f"weakest class: {weakest['label']}, {scores}")
            accuracy = made["metrics"]["accuracy"]
            _expect(accuracy >= 0.9, f"accuracy {accuracy:.3f}")
            step.happened = f"accuracy {accuracy:.3f}, registered as version {made['version']}, run {made['run']}"

    def release(self) -> None:
        """Step 2."""
        with self._step("Convert, prove parity, sign, release", "ONNX agrees with scikit-learn on every row") as step:
            run = self.stage.lightship("model", "show", f"{MODEL}@1")["run"]
            parity = run["parity"]
            self.say(f"parity on {parity['rows']} rows (held-out, extremes, every threshold's neighbours)")
            _expect(parity["passed"] and parity["label_flips"] == 0, f"{parity['label_flips']} labels differ")
            made = self.stage.lightship("release", f"{MODEL}@1")
            listed = self.stage.lightship("release", "list")[0]
            self.say(f"bundle {made['digest'][:12]}: {listed['length']} bytes, of which {listed['transport']} travel")
            self.say("signed in a TUF repository; development keys: one per role, threshold 1, all on this machine")
            step.happened = (
                f"{parity['rows']} rows agree, largest difference {parity['max_diff']:.1e}; version 1 released"
            )

    def start(self) -> None:
        """Step 3."""
        with self._step("Start the control plane, a broker and five devices", "five devices enrol and report") as step:
            self.stage.start_control_plane(*CONTROL_PLANE_FLAGS)
            self.say(f"dashboard {self.stage.addresses['dashboard']}, broker {self.stage.addresses['broker']}")
            if self.stage.addresses["notice"]:
                self.say(self.stage.addresses["notice"])
            words = "one-use tokens, keys born on the devices, certificates"
            with self.narrator.progress(words, len(DEVICES)) as bar, ThreadPoolExecutor(2) as pool:
                for done, _ in enumerate(pool.map(lambda d: self.stage.enrol(d, GROUP), DEVICES), 1):
                    bar.update(done)
            for device in DEVICES:
                self.stage.start_agent(device, *AGENT_FLAGS)
            with self.narrator.progress("agents start"):
                self.stage.wait_for_agents()
                self._until("all devices online", lambda: len(self._online()) == len(DEVICES))
            assert self.world is not None
            for device, url in self.stage.agents.items():
                self.cameras[device] = Camera(self.world, device, url, PER_SECOND)
                self.cameras[device].start()
            how = "mutual TLS" if "mtls" in self.stage.addresses["broker"] else "TLS and a password"
            step.happened = f"{len(DEVICES)} devices online; HTTPS over mutual TLS, MQTT over {how}"

    def roll_out_first(self) -> None:
        """Step 4."""
        with self._step("Roll out version 1 in waves", "one canary, judged, then the rest") as step:
            self._mark("v1 rollout")
            rollout = self.stage.lightship("rollout", "start", f"{MODEL}@1", "--group", GROUP)
            seen = self._follow(rollout["id"])
            _expect(seen["status"] == "completed", f"{seen['status']}: {seen['reason']}")
            running = {d["id"]: d["version"] for d in self.stage.api("overview")["devices"]}
            _expect(set(running.values()) == {1}, f"devices report {running}")
            step.happened = (
                f"canary {seen['waves'][0][0]} passed its gate, then the rest; all report version 1 by digest"
            )

    def serve(self) -> None:
        """Step 5."""
        with self._step("Serve", "real images in, digits out; late labels give accuracy per device ≥ 0.85") as step:
            with self.narrator.progress("cameras look, labels trickle in"):
                self._until("labels from every device", lambda: min(self._labelled(1).values(), default=0) >= 150)
            rows = self._accuracy_rows(1)
            self.narrator.table("Version 1, from labels that came late", ["device", "labelled", "accuracy"], rows)
            worst = min(float(r[2]) for r in rows)
            _expect(worst >= 0.85, f"lowest accuracy {worst:.3f}")
            _expect(not self._open_alarms(), f"alarms without a cause: {self._open_alarms()}")
            step.happened = f"accuracy {worst:.3f} or better on every device, no drift alarm"

    def local_drift(self) -> None:
        """Step 6a."""
        self.dirty = "meter-3"
        with self._step("A dirty lens", f"{self.dirty} is flagged and quarantined; the fleet is not") as step:
            assert self.world is not None
            self._mark(f"{self.dirty}: dirty lens")
            self.world.smudged.add(self.dirty)
            with self.narrator.progress(f"{self.dirty} sees a smudge"):
                self._until("the alarm", lambda: self._device(self.dirty)["quarantined"])
            alarms = [a for a in self._open_alarms() if a["level"] == "critical"]
            _expect([a["device"] for a in alarms] == [self.dirty], f"alarms: {[a['sentence'] for a in alarms]}")
            _expect(not self.stage.api("overview")["proposals"], "a retrain was proposed for one dirty lens")
            quiet_until = len(self._windows()[self.dirty]) + 5
            with self.narrator.progress("a while later it is still the only one"):
                self._until("five more windows", lambda: len(self._windows()[self.dirty]) >= quiet_until)
            _expect(not self.stage.api("overview")["proposals"], "a retrain was proposed for one dirty lens")
            step.happened = alarms[0]["sentence"] + " Quarantined; no retrain proposed."

    def fleet_drift(self) -> None:
        """Step 6b."""
        with self._step("The light changes everywhere", "fleet drift is detected and a retrain proposed") as step:
            assert self.world is not None
            self._mark("the light changes")
            self.world.dim = True
            with self.narrator.progress("every camera sees a darker world"):
                self._until("a retrain proposal", lambda: bool(self.stage.api("overview")["proposals"]))
            fleet = [a for a in self._open_alarms() if a["kind"] == "fleet"]
            proposal = self.stage.api("overview")["proposals"][0]
            _expect(len(fleet) == 1, f"{len(fleet)} fleet alarms")
            _expect(proposal["excluded"] == [self.dirty], f"excluded: {proposal['excluded']}")
            step.happened = f"{fleet[0]['sentence']} Retrain proposed, without {self.dirty}."

    def retrain(self) -> None:
        """Step 6c."""
        expected = "challenger beats the champion, is released as version 2, passes the canary, is promoted"
        with self._step("Retrain and roll out the challenger", expected) as step:
            with self.narrator.progress("labelled feedback arrives; train, gate, convert, release"):
                self._until("version 2", self._retrained)
            self._mark("v2 rollout")
            proposal = self.stage.api("overview")["proposals"][0]
            assert self.world is not None
            self.world.later_part = True
            run = self.stage.lightship("model", "show", f"{MODEL}@2")["run"]
            for check in run["gate"]["checks"]:
                self.say(f"gate: {check['sentence']}")
            seen = self._follow(proposal["rollout"])
            _expect(seen["status"] == "completed", f"{seen['status']}: {seen['reason']}")
            champion = [v["version"] for v in self.stage.api("overview")["models"] if "champion" in v["aliases"]]
            _expect(champion == [2], f"champion is {champion}")
            with self.narrator.progress("labels for version 2 arrive"):
                self._until("labels for version 2", lambda: min(self._labelled(2).values(), default=0) >= 100)
            rows = [r for r in self._accuracy_rows(2) if r[0] != self.dirty]
            worst = min(float(r[2]) for r in rows)
            _expect(worst >= 0.85, f"lowest accuracy of version 2: {worst:.3f}")
            before = self._dim_accuracy_of_version_1()
            step.happened = (
                f"version 2 is champion everywhere; accuracy in dim light {before:.2f} → at least {worst:.2f}"
            )

    def bad_model(self) -> None:
        """Step 7."""
        expected = "forced past the gate with a reason; the canary catches it; rolled back; the fleet never saw it"
        with self._step("A bad model", expected) as step:
            train_x, train_y, _, _ = split_digits()
            corrupted = self.stage.folder / "corrupted.csv"
            write_csv(corrupted, train_x, corrupt(train_y))
            self.stage.lightship("data", "add", str(corrupted), "--name", "digits-corrupted", "--target", "digit")
            recipe = str(self.stage.folder / "recipe.toml")
            command = ("train", "digits-corrupted", "--model", MODEL, "--recipe", recipe)
            with self.narrator.progress("training on corrupted labels"):
                refused = self.stage.lightship(*command, check=False)
            _expect(refused["code"] == "gate.metric", f"the gate said {refused}")
            self.say(f"the gate refuses: {refused['error']}")
            reason = "Demo: show that the canary catches what the gate was told to ignore"
            with self.narrator.progress("forcing it past the gate, with a reason"):
                forced = self.stage.lightship(*command, "--force-reason", reason)
            _expect(forced["version"] == 3, f"version {forced['version']}")
            self.stage.lightship("release", f"{MODEL}@3")
            self._mark("v3 (bad) rollout")
            rollout = self.stage.lightship("rollout", "start", f"{MODEL}@3", "--group", GROUP)
            seen = self._follow(rollout["id"])
            _expect(seen["status"] == "rolled-back", f"{seen['status']}: {seen['reason']}")
            self._mark("v3 rolled back")
            self._until("version 2 everywhere", lambda: set(self._versions().values()) == {2})
            time.sleep(2.5)  # one more report, so that the end of the exposure is in
            spans = self.stage.api(f"models/{MODEL}/versions/3/exposures")
            canary = seen["waves"][0]
            _expect({s["device"] for s in spans} == set(canary), f"served by version 3: {spans}")
            self.say(f"the canary's gate: {seen['reason']}")
            rows = [[s["device"], f"{s['seconds']:.0f} s", s["requests"]] for s in spans]
            self.narrator.table("Ever served by version 3", ["device", "for", "images"], rows)
            audit = self.stage.lightship("audit", "--limit", "500")
            forced_events = [e for e in audit if e["verb"] == "model.register-forced"]
            _expect(
                len(forced_events) == 1 and forced_events[0]["detail"]["forced"] == reason, "the reason is not audited"
            )
            whole = self.stage.lightship("audit", "verify")
            seconds = sum(s["seconds"] for s in spans)
            step.happened = (
                f"only {', '.join(canary)} served it, for {seconds:.0f} s; rolled back to version 2; "
                f"{whole['events']} audit events, chain whole"
            )

    # What the steps look at -----------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """A line within a step."""
        self.narrator.say(text)

    def _step(self, name: str, expected: str) -> Any:
        return self.narrator.step(name, expected)

    def _mark(self, label: str) -> None:
        self.events.append({"at": time.time_ns() // 1_000_000, "label": label})

    def _until(self, what: str, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not ready():
            dead = self.stage.alive()
            if dead:
                msg = f"died: {', '.join(dead)}; see {self.stage.logs}"
                raise StageError(msg)
            if time.monotonic() > end:
                msg = f"waited {PATIENCE:.0f} s for {what}"
                raise StoryError(msg)
            time.sleep(0.3)

    def _follow(self, rollout: str) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        with self.narrator.progress("rollout") as bar:

            def over() -> bool:
                seen.update(self.stage.api(f"rollouts/{rollout}"))
                done = sum(s == "done" for s in seen["devices"].values())
                bar.update(text=f"wave {seen['wave']}/{len(seen['waves'])}, {done} devices done. {seen['reason'][:90]}")
                return seen["status"] in ("completed", "rolled-back", "aborted", "paused")

            self._until(f"rollout {rollout}", over)
        return seen

    def _online(self) -> list[str]:
        return [d["id"] for d in self.stage.api("overview")["devices"] if d["online"] and d["agent"]]

    def _device(self, device: str) -> dict[str, Any]:
        return next(d for d in self.stage.api("overview")["devices"] if d["id"] == device)

    def _versions(self) -> dict[str, int]:
        return {d["id"]: d["version"] for d in self.stage.api("overview")["devices"]}

    def _open_alarms(self) -> list[dict[str, Any]]:
        return [a for a in self.stage.api("overview")["alarms"] if not a["closed_at"]]

    def _retrained(self) -> bool:
        proposal = self.stage.api("overview")["proposals"][0]
        if proposal["status"] in ("failed", "refused"):
            msg = f"the retrain {proposal['status']}: {proposal['detail']}"
            raise StoryError(msg)
        return bool(proposal["status"] == "released")

    def _windows(self) -> dict[str, list[dict[str, Any]]]:
        windows: dict[str, list[dict[str, Any]]] = self.stage.api(f"models/{MODEL}/windows")
        return windows

    def _labelled(self, version: int) -> dict[str, int]:
        windows = self._windows()
        return {d: sum(w["labelled"] for w in windows.get(d, []) if w["version"] == version) for d in DEVICES}

    def _accuracy_rows(self, version: int) -> list[list[Any]]:
        rows = []
        for device, windows in sorted(self._windows().items()):
            mine = [w for w in windows if w["version"] == version]
            labelled, errors = sum(w["labelled"] for w in mine), sum(w["errors"] for w in mine)
            if labelled:
                rows.append([device, labelled, f"{1 - errors / labelled:.3f}"])
        return rows

    def _dim_accuracy_of_version_1(self) -> float:
        began = next(e["at"] for e in self.events if e["label"] == "the light changes")
        labelled = errors = 0
        for device, windows in self._windows().items():
            for w in windows:
                # A window that closed a moment after the change was mostly seen before it.
                if device != self.dirty and w["version"] == 1 and w["at"] > began + 4_000:
                    labelled, errors = labelled + w["labelled"], errors + w["errors"]
        return 1 - errors / labelled if labelled else float("nan")


def write_csv(path: Path, images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> None:
    """Images as a CSV an operator might have: one column per pixel, and the digit."""
    with path.open("w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow([*(f"pixel_{i // 8}_{i % 8}" for i in range(64)), "digit"])
        for image, label in zip(images, labels, strict=True):
            writer.writerow([*(int(v) for v in image), int(label)])


def corrupt(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Nearly half of the labels replaced by dice."""
    rng = np.random.default_rng(3)
    hit = rng.random(len(labels)) < 0.45
    out = labels.copy()
    out[hit] = rng.integers(0, 10, int(hit.sum()))
    return out


def _expect(holds: bool, found: str) -> None:
    if not holds:
        msg = f"expected otherwise; found: {found}"
        raise StoryError(msg)
