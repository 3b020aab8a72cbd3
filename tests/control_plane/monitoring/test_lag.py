"""How much a row says that the row before did not, and how many could be left out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from lightship.data.profile import reference_profile
from lightship.monitoring.drift import watch_stream
from lightship.monitoring.drift_settings import DriftSettings
from lightship.monitoring.explain import explain
from lightship.monitoring.lag import repeats
from lightship_agent.contract.profile import ReferenceProfile, WindowCounts
from lightship_agent.monitor.tally import Tally

ROWS, NAMES = 200, ("a", "temperature", "kind")
Floats = npt.NDArray[np.float32]


def drawn(seed: int, rows: int, rho: float, *, days: float = 0.0) -> Floats:
    """Three features, of which the second repeats; each window has a middle of its own."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, 3))
    for i in range(1, rows):
        x[i, 1] = rho * x[i - 1, 1] + np.sqrt(1 - rho**2) * x[i, 1]
    x[:, 0] += days * np.repeat(rng.standard_normal(rows // ROWS + 1), ROWS)[:rows]
    return x.astype(np.float32)


def profile() -> ReferenceProfile:
    return reference_profile(drawn(1, 4_000, 0.0), NAMES)


def windows(rho: float, n: int = 24, *, days: float = 0.0) -> list[WindowCounts]:
    tally, found = Tally(profile()), []
    for part in np.split(drawn(2, n * ROWS, rho, days=days), n):
        tally.count(part, np.full(ROWS, -1), np.full(ROWS, np.nan, dtype=np.float32))
        found.append(tally.take()[0])
    return found


@pytest.mark.parametrize(("rho", "every"), [(0.5, (2, 3)), (0.93, (16, 26))])
def test_the_feature_whose_rows_repeat_is_named_and_how_far_apart_they_would_help(
    rho: float, every: tuple[int, int]
) -> None:
    found = repeats([w.moments for w in windows(rho)], NAMES)
    assert found is not None
    assert found.name == "temperature"
    assert found.lag == pytest.approx(rho, abs=0.03)
    assert every[0] <= found.every <= every[1]
    assert found.lag**found.every < 0.2 <= found.lag ** (found.every - 1)


def test_what_windows_have_in_common_is_no_repetition_of_rows() -> None:
    assert repeats([w.moments for w in windows(0.0, days=1.0)], NAMES) is None


def test_of_few_rows_of_unwatched_features_and_of_windows_without_moments_nothing_is_said() -> None:
    told = [w.moments for w in windows(0.9)]
    assert repeats(told, NAMES, exclude=("temperature",)) is None
    assert repeats(told[:1], NAMES) is None
    assert repeats([None, None], NAMES) is None
    assert repeats(told, ("other", "width")) is None


def test_a_verdict_and_its_words_say_it() -> None:
    settings = DriftSettings()
    verdict, _ = watch_stream(profile(), windows(0.93), 0, settings, None, "k")
    assert verdict.calibrated is not None
    assert (verdict.calibrated.lag_name, verdict.calibrated.every > 15) == ("temperature", True)
    said = "\n".join(explain("pump-1", verdict, settings))
    assert "Rows of temperature repeat: lag-1 0.9" in said
    quiet, _ = watch_stream(profile(), windows(0.0), 0, settings, None, "k")
    assert "repeat" not in "\n".join(explain("pump-1", quiet, settings))
