"""A broker that takes reports and gives them to nobody is found out, and reports go another way."""

from __future__ import annotations

import pytest

from lightship_agent.link.way import AGAIN_SECONDS, STALLS, Way


def test_after_so_many_waits_without_an_acknowledgement_reports_go_over_https_and_later_mqtt_again() -> None:
    way = Way(915.0)
    assert [way.look(stalls, 10.0, 1_000.0) for stalls in range(STALLS)] == [False] * STALLS
    assert not way.unheard(1_000.0)
    assert way.look(STALLS, 10.0, 1_000.0)
    assert way.unheard(1_000.0 + AGAIN_SECONDS - 1)
    assert not way.look(STALLS + 1, 10.0, 1_100.0)  # it is said once
    assert not way.unheard(1_000.0 + AGAIN_SECONDS)


@pytest.mark.parametrize("ago", [916.0, 1.7e9])
def test_while_the_control_plane_answers_nothing_the_broker_is_not_to_blame(ago: float) -> None:
    way = Way(915.0)
    assert not way.look(STALLS + 5, ago, 1_000.0)
    assert not way.unheard(1_000.0)
