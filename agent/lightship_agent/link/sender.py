"""Link: which records go next.

Rules:
* everything after the last record sent, each once while the server keeps up;
* what the server says it misses, and what it has not acknowledged for long, goes again; how often is bounded here,
  because the hint comes by a way that is not trusted;
* no I/O of its own: the outbox keeps the records, the caller delivers them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from lightship_agent.contract.codes import WireError
from lightship_agent.contract.messages import Envelope
from lightship_agent.contract.wire import pack

from .outbox import Outbox

BATCH_RECORDS: Final = 50
#: The least time between two times of sending the same again.
RESEND_SECONDS: Final = 15.0


class Sender:
    """A cursor over the outbox.

    Args:
        outbox: what waits to be stored by the server.
        boot: the boot counter.
        started: monotonic seconds at the start of the agent.
        patience: seconds without progress after which what was sent counts as lost. It must be longer than the
            interval at which the server's acknowledgement is heard, or all would be sent many times.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        outbox: Outbox,
        boot: int,
        started: float,
        *,
        patience: float = RESEND_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._outbox = outbox
        self._boot = boot
        self._started = started
        self._patience = patience
        self._clock = clock
        self._missing: tuple[str, int] | None = None
        self._rewound = -RESEND_SECONDS
        self._begin()

    def _begin(self) -> None:
        self._epoch = self._outbox.epoch
        self._sent = self._outbox.acked
        self._pending = self._sent
        self._progress = (self._sent, self._clock())

    def next_batch(self) -> bytes | None:
        """The packed envelope to send next, or None."""
        if self._outbox.epoch != self._epoch:
            self._begin()
        self._resend_if_missed()
        self._resend_if_stalled()
        oldest, records = self._outbox.read(self._sent, BATCH_RECORDS)
        if not records or self._outbox.epoch != self._epoch:
            return None
        uptime = int((self._clock() - self._started) * 1_000)
        while True:
            envelope = Envelope(e=self._epoch, b=self._boot, us=uptime, lo=oldest, r=records)
            try:
                packed = pack(envelope)
            except WireError:
                if len(records) == 1:
                    raise  # the outbox keeps no record that fits no message
                records = records[: len(records) // 2]
                continue
            self._pending = records[-1].s
            return packed

    def sent(self) -> None:
        """The last batch was handed over; whether it was stored, the server will say."""
        self._sent = self._pending

    def missing(self, epoch: str, first: int) -> None:
        """The server says that it has nothing from `first` on, in that epoch. From any thread; a hint."""
        self._missing = (epoch, first)

    def _resend_if_missed(self) -> None:
        said, now = self._missing, self._clock()
        if said is None or now - self._rewound < RESEND_SECONDS:
            return
        self._missing = None
        epoch, first = said
        if epoch == self._epoch and self._outbox.acked < first <= self._sent:
            self._sent = first - 1
            self._rewound = now
            self._progress = (self._outbox.acked, now)

    def _resend_if_stalled(self) -> None:
        acked, since = self._progress
        if self._outbox.acked != acked or self._outbox.acked >= self._sent:
            self._progress = (self._outbox.acked, self._clock())
            self._sent = max(self._sent, self._outbox.acked)
        elif self._clock() - since > self._patience:
            self._sent = self._outbox.acked
            self._progress = (acked, self._clock())
