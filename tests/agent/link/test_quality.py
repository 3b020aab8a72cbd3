"""The time to the broker's answer is smoothed, and numbers of an earlier session mean nothing."""

from __future__ import annotations

from lightship_agent.link.quality import LinkQuality


def test_the_first_answer_is_the_rtt_and_later_ones_move_it_by_an_eighth() -> None:
    link = LinkQuality()
    link.connected()
    link.sent(1, 10.0)
    link.answered(1, 10.08)
    assert link.numbers() == {"link_connections": 1, "link_rtt_ms": 80.0}

    link.sent(2, 20.0)
    link.answered(2, 20.16)

    assert link.numbers()["link_rtt_ms"] == 90.0


def test_an_answer_to_a_number_of_the_session_before_is_none() -> None:
    link = LinkQuality()
    link.connected()
    link.sent(1, 10.0)
    link.connected()

    link.answered(1, 99.0)
    link.answered(7, 99.0)

    assert link.numbers() == {"link_connections": 2}


def test_a_broker_that_never_answers_does_not_fill_the_memory() -> None:
    link = LinkQuality()
    for number in range(10_000):
        link.sent(number, 0.0)

    assert len(link._under_way) <= 100
