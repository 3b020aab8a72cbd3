"""The monitor as the agent uses it: observe in requests, collect once a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from tests.agent.conftest import Floats, training_rows

from lightship.data.profile import reference_profile
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.messages import AnyRecord, Envelope, Fault, LabelledRows, Labels, Window
from lightship_agent.contract.profile import Binner
from lightship_agent.contract.quality import QualityCount
from lightship_agent.contract.wire import decode, encode, pack
from lightship_agent.monitor.monitor import Monitor, StandingFault
from lightship_agent.monitor.stream import StreamMonitor
from lightship_agent.monitor.tally import Tally
from lightship_agent.runtime.model import LoadedModel

Models = Callable[..., LoadedModel]


def observe(monitor: Monitor, model: LoadedModel, rows: Floats, name: str) -> None:
    monitor.observe(model, rows, model.predict(rows), name)


def windows(records: list[AnyRecord]) -> list[Window]:
    return [r for r in records if isinstance(r, Window)]


def test_rows_become_windows_and_the_rest_waits(make_model: Models) -> None:
    monitor, model, rows = Monitor(100), make_model(), training_rows(250)
    for i in range(50):
        observe(monitor, model, rows[i : i + 1], f"one-{i}")
    observe(monitor, model, rows[50:], "many")

    closed = windows(monitor.collect(5_000))

    assert [(w.w, w.rows, w.digest, w.opened, w.t) for w in closed] == [
        (0, 100, model.digest, 5_000, 5_000),
        (1, 100, model.digest, 5_000, 5_000),
    ]
    counts = np.sum([w.content().counts for w in closed], axis=0)
    assert counts.tolist() == Binner(model.profile.features).count(rows[:200]).tolist()
    assert monitor.collect(6_000) == []


def test_what_is_reported_travels(make_model: Models) -> None:
    monitor, model = Monitor(10, share_rows=3), make_model()
    observe(monitor, model, training_rows(10), "r")
    monitor.feedback("pump", "r:3", "worn")
    records = monitor.collect(1)
    envelope = Envelope(e="0" * 16, b=1, us=1, lo=1, r=tuple(records))
    assert decode(encode(envelope), Envelope) == envelope
    assert [type(r) for r in records] == [Window, Labels, LabelledRows]


def test_two_that_answer_beside_each_other_close_nobodys_window(make_model: Models) -> None:
    monitor, champion, arm = Monitor(100), make_model(1), make_model(2, flip=True)
    monitor.watch_beside(frozenset({arm.digest}))
    for i in range(60):
        for model in (champion, arm):
            observe(monitor, model, training_rows(i + 1)[i:], f"{model.version}-{i}")
        assert windows(monitor.collect(i)) == []

    monitor.watch_beside(frozenset())
    observe(monitor, champion, training_rows(1), "after")

    closed = windows(monitor.collect(100))
    assert [(w.digest, w.rows) for w in closed] == [(arm.digest, 60)]


def test_a_swap_closes_the_old_window_and_starts_a_new_stream(make_model: Models) -> None:
    monitor, old, new = Monitor(100), make_model(1), make_model(2, flip=True)
    observe(monitor, old, training_rows(30), "a")
    observe(monitor, new, training_rows(100), "b")
    found = {(w.digest, w.w): w.rows for w in windows(monitor.collect(1))}
    assert found == {(old.digest, 0): 30, (new.digest, 0): 100}


def test_a_bundle_that_comes_back_never_reuses_a_window_number(make_model: Models) -> None:
    monitor, old, new = Monitor(100), make_model(1), make_model(2, flip=True)
    numbers = []
    for turn in range(6):
        model = (old, new)[turn % 2]
        observe(monitor, model, training_rows(10), f"t{turn}")
        for _ in range(3):  # the replaced stream is flushed, then let go
            numbers += [(w.digest, w.w) for w in windows(monitor.collect(turn))]
    numbers += [(w.digest, w.w) for w in windows(monitor.flush(9))]
    assert len(numbers) == len(set(numbers)) == 6
    assert sorted(w for digest, w in numbers if digest == old.digest) == [0, 1, 2]


def test_labels_for_the_old_model_still_find_their_window_after_a_swap(make_model: Models) -> None:
    monitor, old, new = Monitor(100), make_model(1), make_model(2, flip=True)
    observe(monitor, old, training_rows(1), "before")
    for turn in range(4):
        observe(monitor, new, training_rows(1), f"after-{turn}")
        monitor.collect(turn)

    label = old.outputs.labels[1 - int(old.predict(training_rows(1)).labels.item())]  # type: ignore[union-attr]
    assert monitor.feedback("pump", "before", label)

    (record,) = [r for r in monitor.collect(9) if isinstance(r, Labels)]
    assert (record.digest, record.w, record.labelled, record.errors) == (old.digest, 0, 1, 1)


def test_a_label_may_come_before_anything_was_collected_and_waits_for_its_window(make_model: Models) -> None:
    monitor, model = Monitor(2), make_model()
    observe(monitor, model, training_rows(1), "first")
    assert monitor.feedback("pump", "first", "worn")
    assert monitor.collect(1) == []
    observe(monitor, model, training_rows(1), "second")
    assert [type(r) for r in monitor.collect(2)] == [Window, Labels]


@pytest.mark.parametrize(("model", "name"), [("fan", "a"), ("pump", "b")])
def test_feedback_for_what_was_never_predicted_is_refused(make_model: Models, model: str, name: str) -> None:
    monitor = Monitor(10)
    observe(monitor, make_model(), training_rows(1), "a")
    with pytest.raises(ServingError) as refusal:
        monitor.feedback(model, name, "worn")
    assert refusal.value.code == "serving.unknown-prediction"


def test_an_old_window_is_closed_with_the_rows_it_has(make_model: Models) -> None:
    monitor, model = Monitor(1_000, max_age_ms=60_000), make_model()
    observe(monitor, model, training_rows(5), "a")
    assert monitor.collect(30_000) == []
    (window,) = windows(monitor.collect(95_000))
    assert (window.rows, window.w) == (5, 0)


def test_rows_beyond_the_ring_are_counted_as_dropped(make_model: Models) -> None:
    monitor, model = Monitor(10, ring_rows=16), make_model()
    for i in range(40):
        observe(monitor, model, training_rows(1), f"r{i}")
    assert len(windows(monitor.collect(1))) == 1
    assert monitor.dropped_rows == 24
    with pytest.raises(ServingError):
        monitor.feedback("pump", "r0", "worn")
    assert monitor.feedback("pump", "r39", "worn")


def test_refused_rows_are_reported(make_model: Models) -> None:
    monitor, model = Monitor(10), make_model()
    monitor.refused(model, 4)
    observe(monitor, model, training_rows(10), "r")
    (window,) = windows(monitor.collect(1))
    assert window.invalid == 4


def test_refused_rows_are_reported_by_what_was_wrong_with_them(make_model: Models) -> None:
    monitor, model = Monitor(10), make_model()
    monitor.refused(model, 2, np.array([[1, 1, np.nan, 1], [1, np.inf, 1, 1]]))
    monitor.refused(model, 1, "no rows at all")
    observe(monitor, model, training_rows(10), "r")
    (window,) = windows(monitor.collect(1))
    assert window.invalid == 3
    assert window.quality == (
        QualityCount("infinite", 1, 1),
        QualityCount("missing", 2, 1),
        QualityCount("type", -1, 1),
    )


def test_a_stuck_sensor_is_told_at_once_and_over_when_it_moves_again(make_model: Models) -> None:
    monitor, model = Monitor(100), make_model()
    stuck = training_rows(100)
    stuck[:, 1] = 0.5
    told: list[list[tuple[str, str, bool]]] = []
    standing = []
    for rows in (training_rows(100), stuck, stuck, training_rows(100), training_rows(100)):
        observe(monitor, model, rows, "r")
        records = monitor.collect(1)
        told.append([(r.kind, r.feature, r.raised) for r in records if isinstance(r, Fault)])
        standing.append(monitor.faults())
    fault = StandingFault("pump", "vibration", "stuck")
    assert told == [[], [("stuck", "vibration", True)], [], [], [("stuck", "vibration", False)]]
    assert standing == [(), (fault,), (fault,), (fault,), ()]
    assert fault.code == "data.stuck"


def test_a_fault_of_a_model_that_no_longer_serves_does_not_stand(make_model: Models) -> None:
    monitor, old, new = Monitor(100), make_model(), make_model(2, flip=True)
    stuck = training_rows(100)
    stuck[:, 1] = 0.5
    observe(monitor, old, stuck, "r")
    monitor.collect(1)
    assert monitor.faults()
    observe(monitor, new, training_rows(1), "s")
    monitor.collect(2)
    assert monitor.faults() == ()


def test_a_clock_that_is_set_back_is_counted_in_the_window_that_was_open(make_model: Models) -> None:
    monitor, model = Monitor(10), make_model()
    observe(monitor, model, training_rows(5), "r")
    monitor.collect(1_000_000)
    monitor.collect(999_500)
    monitor.collect(400_000)
    observe(monitor, model, training_rows(5), "s")
    (first,) = windows(monitor.collect(400_001))
    assert first.quality == (QualityCount("clock", -1, 1),)
    observe(monitor, model, training_rows(10), "t")
    assert windows(monitor.collect(400_002))[0].quality == ()


def test_a_regressors_labels_become_residuals(make_model: Models) -> None:
    monitor, model = Monitor(10), make_model(kind="regressor")
    observe(monitor, model, training_rows(10), "r")
    values = model.predict(training_rows(10)).values
    assert values is not None
    monitor.collect(1)
    assert monitor.feedback("pump", "r:3", repr(float(values[3, 0])))
    assert monitor.feedback("pump", "r:4", repr(float(values[4, 0]) + 50))
    (told,) = monitor.collect(2)
    assert isinstance(told, Labels)
    assert (told.w, told.labelled, told.errors) == (0, 2, 1)
    assert (sum(told.residuals), told.residuals[-2], told.residual_sums) == (2, 1, (127, 127**2))


def test_counting_costs_a_small_multiple_of_its_bins_and_remembers_little(make_model: Models) -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1_000, 30)).astype(np.float32)
    profile = reference_profile(rng.normal(size=(5_000, 30)).astype(np.float32), [f"f{i}" for i in range(30)])
    tally, binner = Tally(profile), Binner(profile.features)
    labels, tops = np.full(1_000, -1), np.full(1_000, np.nan, np.float32)

    def cost(work: Callable[[], object]) -> float:
        best = float("inf")
        for _ in range(7):
            begun = time.process_time()
            for _ in range(20):
                work()
            best = min(best, (time.process_time() - begun) / 20)
        return best * 1_000

    bins = cost(lambda: binner.count(rows))
    whole = cost(lambda: tally.count(rows, labels, tops))
    print(f"1000 × 30: bins {bins:.2f} ms, all {whole:.2f} ms, {whole / bins:.1f} times")
    assert whole < 8 * bins
    assert tally.state_bytes <= 12_000


@pytest.mark.parametrize(("rows", "bound"), [(200, 1_328), (1_000, 1_400), (5_000, 1_536), (20_000, 1_536)])
def test_a_window_of_thirty_features_travels_in_few_bytes(make_model: Models, rows: int, bound: int) -> None:
    rng = np.random.default_rng(0)
    names = [f"feature_{i}" for i in range(30)]
    predicted = rng.integers(0, 2, 5_000)
    scores = rng.dirichlet([1, 1], 5_000).astype(np.float32)
    profile = reference_profile(
        rng.normal(size=(5_000, 30)).astype(np.float32), names, predicted, scores, ("healthy", "worn")
    )
    stream = StreamMonitor(msgspec.structs.replace(make_model(), profile=profile), rows)
    seen = rng.normal(size=(rows, 30)).astype(np.float32)

    (window,) = stream.push(seen, rng.integers(0, 2, rows), rng.random(rows).astype(np.float32), 1_700_000_000_000)

    packed = len(pack(Envelope(e="0123456789abcdef", b=3, us=123_456, lo=1, r=(window,))))
    print(f"{rows} rows × 30 features: {packed} bytes")
    assert window.moments is not None
    assert packed <= bound


def test_a_regressor_is_watched_by_its_inputs(make_model: Models) -> None:
    monitor, model = Monitor(10), make_model(kind="regressor")
    observe(monitor, model, training_rows(10), "r")
    (window,) = windows(monitor.collect(1))
    assert (window.predictions, window.scores) == ((), ())
    assert sum(window.content().counts) == 40


def test_window_numbers_go_on_after_a_restart(make_model: Models) -> None:
    first, model = Monitor(10), make_model()
    observe(first, model, training_rows(25), "a")
    first.collect(1)
    assert first.positions() == {model.digest: 3}  # window 2 was open, and is not used again

    second = Monitor(10, resume=first.positions())
    observe(second, model, training_rows(10), "b")
    assert [w.w for w in windows(second.collect(2))] == [3]


def test_the_cost_of_observing_is_shown(make_model: Models) -> None:
    monitor, model, row = Monitor(256), make_model(), training_rows(1)
    prediction = model.predict(row)
    best = float("inf")
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(1_000):
            monitor.observe(model, row, prediction, "id")
        best = min(best, (time.perf_counter() - begun) * 1_000)
    print(f"observe: {best:.2f} µs a row")
    assert monitor.dropped_rows > 0
