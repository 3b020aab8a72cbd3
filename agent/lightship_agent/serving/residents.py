"""Serving: the models in memory, and what the data plane may answer with; the adapter beside `runtime.residency`.

Rules:
* a load that has no room is refused before it begins, and what serves goes on;
* a model's size is what this process holds more after its loading (PSS, trimmed) than before, and at least the size of
  its graph: other threads work meanwhile, so it is a good guess and no account;
* while an update soaks, what served before stays, whatever its name: going back is one assignment;
* memory is given back after a load at once, by the thread that loaded; after a drop with the next `tidy`, when the last
  request that used the model is over. Both are off the way of requests.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import msgspec

from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import LightshipError, ServingError, UpdateError
from lightship_agent.runtime.memory import available_bytes, own_bytes, trim_memory
from lightship_agent.runtime.model import LoadedModel, load_model
from lightship_agent.runtime.residency import Need, Resident, estimate, make_room, surplus

from .dataplane import DataPlane

log = logging.getLogger(__name__)


class _Entry(msgspec.Struct, frozen=True):
    model: LoadedModel
    size: int  # bytes
    since: float  # monotonic seconds


class Residents:
    """Models in memory by digest. Safe to call from several threads; one load at a time."""

    def __init__(
        self,
        plane: DataPlane,
        *,
        budget: int = 0,
        spare: int = 1,
        load: Callable[[Bundle], LoadedModel] = load_model,
        available: Callable[[], int | None] = available_bytes,
    ) -> None:
        """Nothing is in memory yet.

        Args:
            plane: what answers with them.
            budget: bytes for all models; 0: as much as the device has.
            spare: how many models that nobody needs stay, to be gone back to.
            load: makes a model of a bundle.
            available: bytes that this process may still take.
        """
        self._plane = plane
        self._budget, self._spare = budget, spare
        self._load_model, self._available = load, available
        self._entries: dict[str, _Entry] = {}  # replaced whole, so that reading needs no lock
        self._soaking: frozenset[str] = frozenset()  # what served before the last swap, until that is settled
        self._held: frozenset[str] = frozenset()
        self._known: dict[str, int] = {}  # sizes that were measured, also of models that have gone
        self._untidy = False
        self._lock = threading.RLock()

    # What an update does --------------------------------------------------------------------------------------------

    def serve(self, bundle: Bundle) -> LoadedModel:
        """Serve it, and nothing else, from now on; what was served before stays in memory until `settle`.

        Raises:
            LightshipError: serving.memory, and those of `load_model`; then what serves goes on.
            UpdateError: update.swap.
        """
        with self._lock:
            model = msgspec.structs.replace(self._resident(bundle), since_ms=_now_ms())
            before = self._plane.models()
            self._soaking = frozenset(m.digest for m in before)
            self._plane.install(model)
            for other in before:
                # A device runs the one model it was told to run, also when the next one has another name.
                if other.name != model.name:
                    self._plane.remove(other.name)
            return model

    def settle(self, keep: Collection[str]) -> None:
        """An update came to its end: of the digests that are not busy, only these may stay, and of them the spare."""
        with self._lock:
            self._soaking = frozenset()
            for one in self.residents():
                if one.digest not in keep and not one.busy:
                    self.drop(one.digest)
            for digest in surplus(self.residents(), self._spare):
                self.drop(digest)

    def serve_nothing(self) -> None:
        """Stop serving: there is no model to go back to."""
        with self._lock:
            for name in {m.name for m in (*self._plane.models(), *self._plane.resident())}:
                self._plane.remove(name)
            self._entries, self._soaking, self._untidy = {}, frozenset(), True

    # What stands beside ---------------------------------------------------------------------------------------------

    def hold(self, digests: Collection[str]) -> None:
        """These are needed beside what serves, by a shadow or a share: they stay. Replaces what was held before."""
        self._held = frozenset(digests)

    def have(self, bundle: Bundle) -> LoadedModel:
        """Have it in memory, and nobody who asks for its version is answered by it.

        Raises:
            LightshipError: as `serve`; then nothing changes.
        """
        with self._lock:
            return self._resident(bundle)

    def load(self, bundle: Bundle, *, watched: bool = False) -> LoadedModel:
        """Have it in memory beside what serves: it answers whoever asks for its version.

        Args:
            bundle: verified.
            watched: whether its answers are watched for drift.

        Raises:
            LightshipError: as `serve`; then nothing changes.
        """
        with self._lock:
            model = self._resident(bundle)
            self._plane.keep(model, watched=watched)
            return model

    def drop(self, digest: str) -> bool:
        """Let go of a model that does not serve; False when it serves, or is not here."""
        with self._lock:
            if digest not in self._entries or digest in {m.digest for m in self._plane.models()}:
                return False
            self._plane.drop(digest)
            self._entries = {d: e for d, e in self._entries.items() if d != digest}
            self._untidy = True
            log.info("no longer in memory: %s", digest[:12])
            return True

    def tidy(self) -> bool:
        """Give back the memory of what was dropped since the last call; whether there was anything."""
        if not self._untidy:
            return False
        self._untidy = False
        trim_memory()
        return True

    def residents(self) -> tuple[Resident, ...]:
        """What is in memory."""
        asked = {s.model.digest: s.used for s in self._plane.stats()}
        busy = {m.digest for m in self._plane.models()} | self._soaking | self._held
        return tuple(
            Resident(digest, entry.size, asked.get(digest, entry.since), digest in busy)
            for digest, entry in self._entries.items()
        )

    def loaded(self) -> tuple[tuple[LoadedModel, Resident], ...]:
        """The models in memory, each with what is known of its stay."""
        entries = self._entries
        return tuple((entries[r.digest].model, r) for r in self.residents() if r.digest in entries)

    def view(self) -> list[dict[str, Any]]:
        """The same in plain words, for the status."""
        return [
            {
                "model": model.name,
                "version": model.version,
                "digest": model.digest,
                "provider": model.provider,
                "precision": model.precision,
                "notes": list(model.notes),
                "memory_kb": one.size >> 10,
                "needed": one.busy,
            }
            for model, one in self.loaded()
        ]

    def _resident(self, bundle: Bundle) -> LoadedModel:
        entry = self._entries.get(bundle.digest)
        if entry is not None:
            return entry.model
        guess = estimate(bundle.model)
        self._make_room(Need(self._known.get(bundle.digest, guess.settled), guess.peak), self._available())
        held = own_bytes()
        try:
            model = self._load_model(bundle)
        except LightshipError:
            raise
        except Exception as e:  # whatever the runtime raises, the old model must go on serving
            raise UpdateError("update.swap", f"The model can't be loaded: {type(e).__name__}: {e}.") from e
        finally:
            trim_memory()
        holds = own_bytes()
        size = max(len(bundle.model), 0 if held is None or holds is None else holds - held)
        self._known[bundle.digest] = size
        try:
            self._make_room(Need(size, 0), None)
        except ServingError:
            self._untidy = True
            raise
        self._entries = {**self._entries, bundle.digest: _Entry(model, size, time.monotonic())}
        log.info("in memory: %s version %d (%s), about %d kB", model.name, model.version, model.digest[:12], size >> 10)
        return model

    def _make_room(self, need: Need, available: int | None) -> None:
        for digest in make_room(self.residents(), need, budget=self._budget, available=available):
            self.drop(digest)
        if available is not None:
            self.tidy()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
