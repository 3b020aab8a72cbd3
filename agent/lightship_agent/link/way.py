"""Link: by which way reports go. Pure.

Rules:
* MQTT, while the control plane acknowledges what the broker takes;
* a broker that takes reports and gives them to nobody looks well to a device. Where so many times in a row nothing was
  acknowledged, although the control plane answers over HTTPS, reports go that way: it says at once what is stored;
* after some hours MQTT is tried again: the broker may have been mended.
"""

from __future__ import annotations

from typing import Final

#: Waits for an acknowledgement in a row, each of the sender's patience, before the broker is believed no more.
STALLS: Final = 3
#: For so long reports go over HTTPS then.
AGAIN_SECONDS: Final = 6 * 3_600.0


class Way:
    """Remembers until when reports go over HTTPS.

    Args:
        patience: seconds; the control plane answers if it did so within the last of them.
    """

    def __init__(self, patience: float) -> None:
        """All is well."""
        self._patience = patience
        self._until = float("-inf")  # monotonic seconds

    def unheard(self, now: float) -> bool:
        """Whether nobody seems to hear what the broker takes."""
        return now < self._until

    def look(self, stalls: int, answered_ago: float, now: float) -> bool:
        """Whether that is so from now on, and was not before.

        Args:
            stalls: waits in a row in which nothing was acknowledged.
            answered_ago: seconds since the control plane answered over HTTPS.
            now: monotonic seconds.
        """
        if stalls < STALLS or answered_ago > self._patience or self.unheard(now):
            return False
        self._until = now + AGAIN_SECONDS
        return True
