"""Fills a home with a small fleet that has lived: a good rollout, one that was rolled back, and one under way."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

from sqlalchemy.orm import Session

from lightship.home import Home
from lightship.storage import audit
from lightship.storage.models import (
    Alarm,
    Alias,
    DatasetVersion,
    DeadLetter,
    Device,
    DeviceEpoch,
    Exposure,
    ModelVersion,
    RetrainProposal,
    RolloutRow,
    Run,
    UpdateStep,
    WindowRow,
)

MODEL = "digits"
MINUTE = 60_000
Json = dict[str, Any]


def digest(version: int) -> str:
    return hashlib.sha256(f"bundle {version}".encode()).hexdigest()


def names(count: int) -> list[str]:
    return [f"meter-{i}" for i in range(1, count + 1)]


def fill(home: Home, *, now: int | None = None, devices: int = 8) -> int:
    """Write the fleet; the time it is seen at."""
    now = now or audit.now_ms()
    with home.database.write() as session:
        _registry(session, now)
        session.flush()
        for i, name in enumerate(names(devices)):
            _device(session, i, name, now)
            _windows(session, i, name, now)
        _rollouts(session, devices, now)
        _events(session, now)
    return now


def _registry(session: Session, now: int) -> None:
    data = hashlib.sha256(b"data").hexdigest()
    session.add(
        DatasetVersion(
            name="digits-train",
            version=1,
            digest=data,
            rows=1_400,
            features=64,
            target="digit",
            task="classification",
            source="digits.csv",
            parent=None,
            created_at=now - 80 * MINUTE,
        )
    )
    accuracies = {1: 0.941, 2: 0.972, 3: 0.969, 4: 0.978}
    for version, accuracy in accuracies.items():
        began = now - (75 - 15 * version) * MINUTE
        metrics = _metrics(accuracy)
        session.add(_run(f"run-{version}", data, metrics, began))
        session.flush()
        session.add(
            ModelVersion(
                model=MODEL,
                version=version,
                run_id=f"run-{version}",
                state="revoked" if version == 3 else "released",
                digest=digest(version),
                length=184_320 + 2_048 * version,
                metrics=metrics,
                forced_reason="Field trial, agreed with the plant." if version == 3 else "",
                created_at=began + 4_000,
                released_at=began + 9_000,
            )
        )
    session.add(Alias(model=MODEL, alias="champion", version=2))
    session.add(Alias(model=MODEL, alias="challenger", version=4))


def _metrics(accuracy: float) -> Json:
    classes = [
        {"label": str(c), "precision": accuracy - 0.01 * (c % 3), "recall": accuracy - 0.012 * (c % 4), "f1": accuracy}
        for c in range(10)
    ]
    rows = [{**c, "support": 36 + i % 3} for i, c in enumerate(classes)]
    values = {"accuracy": accuracy, "macro_f1": accuracy - 0.002, "balanced_accuracy": accuracy - 0.001}
    return {"task": "classification", "rows": 360, "values": values, "per_class": rows, "confusion": []}


def _run(ident: str, data: str, metrics: Json, began: int) -> Run:
    accuracy = metrics["values"]["accuracy"]
    checks = [
        {
            "name": "accuracy",
            "value": accuracy,
            "limit": 0.9,
            "holds": True,
            "sentence": f"accuracy is {accuracy:.4f}, as expected at least 0.9.",
        }
    ]
    parity = {
        "rule": "trees",
        "rows": 2_000,
        "label_flips": 0,
        "tie_flips": 1,
        "max_diff": 3.1e-6,
        "share_over": 0.0,
        "batch_diff": 0.0,
        "passed": True,
        "reasons": [],
        "failures": [],
    }
    return Run(
        id=ident,
        kind="train",
        model=MODEL,
        status="finished",
        dataset_digest=data,
        recipe={"estimator": "random-forest", "params": {"n_estimators": 60, "max_depth": 14}, "test_share": 0.2},
        recipe_digest=hashlib.sha256(b"recipe").hexdigest(),
        environment={"python": "3.11.9", "machine": "x86_64", "numpy": "2.3.1", "scikit-learn": "1.7.2"},
        environment_digest="e" * 64,
        code_revision="36e3b20c0ffee",
        seeds=[7],
        metrics=metrics,
        gate={"passed": True, "checks": checks},
        parity=parity,
        estimator_digest=None,
        started_at=began,
        ended_at=began + 3_400,
    )


def _served(i: int, now: int) -> list[tuple[int, int, int | None]]:
    """(version, from, to) of a device: 1, then 2; the first two tried 3; the first two now have 4."""
    turns = [(1, now - 58 * MINUTE, now - (42 - i) * MINUTE), (2, now - (42 - i) * MINUTE, None)]
    if i < 2:
        turns[1] = (2, now - (42 - i) * MINUTE, now - 28 * MINUTE)
        turns.append((3, now - 28 * MINUTE, now - (24 + i) * MINUTE))
        turns.append((2, now - (24 + i) * MINUTE, now - 9 * MINUTE))
        turns.append((4, now - 9 * MINUTE, None))
    return turns


def _device(session: Session, i: int, name: str, now: int) -> None:
    silent, sick = i == 4, i == 2
    turns = _served(i, now)
    version = turns[-1][0]
    refused = i == 5
    session.add(
        Device(
            id=name,
            tenant="default",
            group="plant-north" if i % 2 else "plant-south",
            labels={"line": str(1 + i % 3)},
            state="active",
            spki=hashlib.sha256(name.encode()).hexdigest(),
            cert_serial=str(1_000 + i),
            cert_not_after=now + 29 * 86_400_000,
            enrolled_at=now - 90 * MINUTE,
            last_seen=now - (21 * MINUTE if silent else 1_000 + 700 * i),
            running_model=MODEL,
            running_version=version,
            running_digest=digest(version),
            running=[
                {
                    "model": MODEL,
                    "version": version,
                    "digest": digest(version),
                    "since": turns[-1][1],
                    "requests": 48_200 + 911 * i,
                    "failures": 0,
                    "latency_ms": 0.41,
                }
            ],
            phase="idle",
            update_state="failed" if refused else "committed",
            update_code="update.golden" if refused else "",
            update_detail="3 of 16 golden rows differ by more than 1e-4." if refused else "",
            agent="0.1.0",
            onnxruntime="1.23.2",
            machine="aarch64",
            health={"cpu_percent": 11.4, "memory_self_mb": 71.2, "disk_free_mb": 20_481.0, "uptime_s": 88_240.0}
            | ({"temperature_c": 74.5} if sick else {"temperature_c": 48.0}),
            quarantined=sick,
            drift_level="critical" if sick else "warning" if i == 3 else "ok",
            verdict={"digest": digest(version), "verdict": _verdict("critical" if sick else "ok")},
        )
    )
    for turn, began, ended in turns:
        session.add(
            Exposure(
                device=name,
                digest=digest(turn),
                began_at=began,
                ended_at=ended,
                model=MODEL,
                version=turn,
                requests=((ended or now) - began) // 40,
                failures=0 if turn != 3 else 2,
            )
        )
    session.add(DeviceEpoch(device=name, epoch="a" * 16, next_seq=400 + i, lost=0, updated_at=now))
    for n, (state, at) in enumerate((("fetching", 70), ("trying", 64), ("soaking", 60), ("committed", 40))):
        failed = refused and state == "committed"
        session.add(
            UpdateStep(
                device=name,
                epoch="a" * 16,
                s=n + 1,
                at=now - 9 * MINUTE - at * 500,
                rollout="c0de0004" if i < 2 else "c0de0002",
                seq=4,
                digest=digest(version),
                state="failed" if failed else state,
                code="update.golden" if failed else "",
                detail="3 of 16 golden rows differ by more than 1e-4." if failed else "",
            )
        )


def _verdict(level: str) -> Json:
    """A verdict as the watch stores it."""
    bell = [2, 8, 21, 48, 90, 130, 152, 131, 88, 50, 20, 9, 3]
    moved = [0, 1, 2, 6, 11, 20, 38, 55, 64, 52, 30, 14, 22]
    shifts = [
        {
            "name": name,
            "kind": "feature",
            "psi": psi,
            "psi_low": psi * 0.7,
            "psi_high": psi * 1.4,
            "p_value": 1e-9,
            "level_windows": 2,
            "first_window": 38,
            "rows": 315,
            "score": psi,
            "alarm": psi > 0.5,
            "current": [*moved[:-1], 0] if psi > 0.5 else bell,
            "reference": bell,
        }
        for name, psi in (("pixel_3_4", 1.84), ("pixel_2_4", 0.92), ("pixel_5_1", 0.31))
    ]
    alarm = {"name": "pixel_3_4", "kind": "shift", "level_windows": 2, "first_window": 38, "confirmed": True}
    bad = level == "critical"
    return {
        "level": level,
        "window": 39,
        "rows": 160,
        "tested": [1, 2],
        "alarms": [alarm] if bad else [],
        "evidence": shifts if bad else [],
        "quality": [
            {
                "name": "pixel_7_7",
                "kind": "stuck",
                "rate": 1.0,
                "reference_rate": 0.31,
                "p_value": 2e-12,
                "level_windows": 1,
                "first_window": 39,
                "rows": 160,
            }
        ]
        if bad
        else [],
        "p_value": 3.2e-11 if bad else 0.44,
    }


def _windows(session: Session, i: int, name: str, now: int) -> None:
    chance = random.Random(i)  # always the same fleet
    for w in range(40):
        at = now - (57 - 1.4 * w) * MINUTE
        version = next((v for v, a, b in _served(i, now) if a <= at and (b is None or at < b)), 1)
        sick = i == 2 and w > 30
        rate = {1: 0.06, 2: 0.03, 3: 0.22, 4: 0.024}[version] + (0.2 if sick else 0.0)
        labelled = 60 if w < 38 and w % 9 != 4 else 0
        errors = sum(chance.random() < rate for _ in range(labelled))
        psi = abs(chance.gauss(0.012, 0.008)) + (0.25 * math.sqrt(w - 30) if sick else 0.0)
        level = "critical" if sick and w > 32 else "warning" if sick or (i == 3 and w == 39) else "ok"
        session.add(
            WindowRow(
                device=name,
                digest=digest(version),
                w=w,
                model=MODEL,
                version=version,
                opened_at=int(at) - 80_000,
                closed_at=int(at),
                rows=160,
                counts=b"",
                predictions=[16] * 10,
                scores=b"",
                labelled=labelled,
                errors=errors,
                judged=True,
                level=level,
                shift=psi,
            )
        )


def _rollouts(session: Session, devices: int, now: int) -> None:
    everyone = names(devices)
    waves = [everyone[:2], everyone[2:5], everyone[5:]]
    holds = "3 of 114 labels against 21 of 702 of the control"
    broken = "31 of 120 labels against 24 of 740 of the control"
    passed: Json = {
        "outcome": "inconclusive",
        "checks": [
            {
                "name": "rows",
                "outcome": "pass",
                "sentence": "Each group served at least 640 rows.",
                "numbers": {"rows": 640},
            },
            {
                "name": "errors",
                "outcome": "inconclusive",
                "sentence": f"Errors: {holds}; the rise may still be up to 5.4 points.",
                "numbers": {"canary": 0.026, "control": 0.03, "upper": 0.054, "look": 0},
            },
            {"name": "predictions", "outcome": "pass", "sentence": "Both predict alike.", "numbers": {"p": 0.61}},
            {"name": "failures", "outcome": "pass", "sentence": "No server errors in either group.", "numbers": {}},
        ],
    }
    failed: Json = {
        "outcome": "fail",
        "checks": [
            {
                "name": "errors",
                "outcome": "fail",
                "sentence": f"Errors: {broken}, which chance explains with p = 2e-14.",
                "numbers": {"canary": 0.258, "control": 0.032, "p": 2e-14},
            }
        ],
    }
    plans: tuple[tuple[Any, ...], ...] = (
        ("c0de0002", 2, 1, "completed", "Every live device runs it.", 44, 30, waves, 2, {}),
        ("c0de0003", 3, 2, "rolled-back", failed["checks"][0]["sentence"], 29, 23, waves, 0, failed),
        ("c0de0004", 4, 2, "running", f"Holding: {passed['checks'][1]['sentence']}", 10, 1, waves, 0, passed),
    )
    for ident, version, previous, status, reason, began, changed, plan_waves, wave, gate in plans:
        assigned = {d: (now - began * MINUTE) / 1_000 for w in plan_waves[: wave + 1] for d in w}
        session.add(
            RolloutRow(
                id=ident,
                model=MODEL,
                version=version,
                status=status,
                reason=reason,
                selector={"group": "", "labels": {}},
                plan={
                    "model": MODEL,
                    "version": version,
                    "digest": digest(version),
                    "previous_version": previous,
                    "waves": plan_waves,
                    "wave_specs": [{"name": n, "gate": True} for n in ("canary", "early", "rest")],
                },
                state={
                    "status": status,
                    "wave": wave,
                    "assigned_at": assigned,
                    "reason": reason,
                    "done": sorted(assigned),
                },
                gate={"taken": 0, "verdict": gate} if gate else {},
                created_by="user:ada",
                created_at=now - began * MINUTE,
                updated_at=now - changed * MINUTE,
            )
        )
        audit.append(session, actor="user:ada", verb="rollout.start", subject=ident, detail={"version": version})
        detail = {"from": "running", "to": status, "reason": reason}
        audit.append(session, actor="lightship:reconciler", verb="rollout.transition", subject=ident, detail=detail)


def _events(session: Session, now: int) -> None:
    evidence = _verdict("critical")
    sentences = (
        ("a1", "local", "meter-3", "critical", "meter-3 drifts in pixel_3_4, pixel_2_4.", evidence, 14, None),
        ("a2", "local", "meter-4", "warning", "meter-4 drifts in pixel_0_2.", {"names": ["pixel_0_2"]}, 2, None),
        (
            "a3",
            "fleet",
            "",
            "critical",
            "5 of 8 devices drift in pixel_6_1.",
            {"devices": ["meter-1", "meter-2"]},
            50,
            36,
        ),
    )
    for ident, kind, device, level, sentence, found, opened, closed in sentences:
        session.add(
            Alarm(
                id=ident,
                kind=kind,
                model=MODEL,
                digest=digest(2),
                device=device,
                level=level,
                sentence=sentence,
                evidence=found,
                opened_at=now - opened * MINUTE,
                closed_at=now - closed * MINUTE if closed else None,
            )
        )
        audit.append(session, actor="lightship:monitoring", verb="alarm.open", subject=ident, detail={"level": level})
    for ident, status, reason, version in (
        ("p1", "released", "5 of 8 devices drift in pixel_6_1. 3 devices are critical.", 4),
        ("p2", "proposed", "6 of 8 devices drift in pixel_0_2. 2 devices are critical.", 0),
    ):
        session.add(
            RetrainProposal(
                id=ident,
                model=MODEL,
                status=status,
                reason=reason,
                excluded=["meter-3"],
                since=now - 40 * MINUTE,
                version=version,
                rollout="c0de0004" if version else "",
                created_at=now - (36 if version else 1) * MINUTE,
                updated_at=now - 12 * MINUTE,
            )
        )
    session.add(
        DeadLetter(id="d1", at=now, topic="meter-9/tele", code="wire.malformed", detail="Not a device.", payload=b"?")
    )
