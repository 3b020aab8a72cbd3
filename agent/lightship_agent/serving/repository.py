"""Serving: the model repository extension of the Open Inference Protocol: what is here, and what of it is in memory.

Rules:
* the index lists what the store holds and what is in memory, each with its state and, where it does not answer, why;
* loading and unloading are off unless the device's settings allow them, for they take memory from what serves;
* a client names a model and a version, never a path, bytes or a configuration: what is loaded comes from the device's
  own store, where it got by signature, and is read there by its digest;
* what failed on this device and was not forgiven, what is not released any more, and what is still being tried is not
  loaded, whoever asks;
* what serves, or is needed beside it, is not unloaded: which version is current is decided by assignment alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import LightshipError, ServingError, StorageError

from .dataplane import DataPlane
from .residents import Residents

#: What Triton's clients send along, and what means nothing here.
_IGNORED: Final = frozenset({"unload_dependents"})


class Shelved(msgspec.Struct, frozen=True):
    """A bundle that the device's store holds. `barred` says why it may not be loaded; "" that it may."""

    model: str
    version: int
    digest: str
    barred: str = ""


class IndexRow(msgspec.Struct, frozen=True):
    """A version of a model, as the protocol lists it."""

    name: str
    version: str
    state: str  # READY or UNAVAILABLE
    reason: str


class Change(msgspec.Struct):
    """The body of a load or unload."""

    parameters: dict[str, msgspec.Raw] = {}


class Repository:
    """The shelf and the memory of one device."""

    def __init__(
        self,
        plane: DataPlane,
        residents: Residents,
        *,
        shelf: Callable[[], Sequence[Shelved]],
        read: Callable[[str], Bundle],
        is_open: bool,
    ) -> None:
        """Nothing is asked yet.

        Args:
            plane: what answers.
            residents: what is in memory.
            shelf: the bundles in the store.
            read: the bundle of a digest, verified anew; raises LightshipError.
            is_open: whether clients may load and unload.
        """
        self._plane, self._residents = plane, residents
        self._shelf, self._read, self._is_open = shelf, read, is_open

    @classmethod
    def of(cls, plane: DataPlane) -> Repository:
        """Of what is in memory, and nothing else."""

        def read(digest: str) -> Bundle:
            raise StorageError("storage.corrupt", f"Bundle {digest[:12]} is not in the store.")

        return cls(plane, Residents(plane), shelf=tuple, read=read, is_open=False)

    def index(self, *, ready: bool = False) -> list[IndexRow]:
        """Every version that is here, only those that answer where `ready`; current ones first."""
        serving = {m.digest for m in self._plane.models()}
        resident = sorted(self._plane.resident(), key=lambda m: m.digest not in serving)
        rows = [
            IndexRow(m.name, str(m.version), "READY", "" if m.digest in serving else "answers by version")
            for m in resident
        ]
        if ready:
            return rows
        here = {m.digest for m in resident}
        idle = [one for one in self._shelf() if one.digest not in here]
        return rows + [
            IndexRow(one.model, str(one.version), "UNAVAILABLE", one.barred or "on disk, not in memory") for one in idle
        ]

    def load(self, name: str, body: bytes) -> None:
        """Have the version that `body` names in memory; without one, the current version is there already.

        Raises:
            ServingError: serving.not-allowed, serving.malformed, serving.unknown-model, serving.memory,
                serving.runtime.
        """
        version = self._asked(body)
        if any(m.name == name and version in (None, str(m.version)) for m in self._plane.resident()):
            return
        shelved = [one for one in self._shelf() if one.model == name and version in (None, str(one.version))]
        if not shelved:
            what = name[:64] if version is None else f"{name[:64]}@{version[:20]}"
            message = f"The store holds no {what}; see /v2/repository/index."
            raise ServingError("serving.unknown-model", message, remedy="Assign it from the control plane.")
        barred = [one.barred for one in shelved if one.barred]
        if len(barred) == len(shelved):
            raise ServingError("serving.not-allowed", f"{name}@{shelved[0].version} may not be loaded: {barred[0]}.")
        chosen = max((one for one in shelved if not one.barred), key=lambda one: one.version)
        try:
            self._residents.load(self._read(chosen.digest))
        except ServingError:
            raise
        except LightshipError as e:
            raise ServingError("serving.runtime", f"{name}@{chosen.version} can't be loaded: {e.code}: {e}") from e

    def unload(self, name: str, body: bytes) -> None:
        """Let go of the version that `body` names; without one, of every version that is not needed.

        Raises:
            ServingError: serving.not-allowed, serving.malformed, serving.unknown-model, serving.in-use.
        """
        version = self._asked(body)
        found = [m for m in self._plane.resident() if m.name == name and version in (None, str(m.version))]
        if not found:
            raise ServingError("serving.unknown-model", f"No such version of {name[:64]!r} is in memory.")
        busy = {one.digest for one in self._residents.residents() if one.busy}
        idle = [m for m in found if m.digest not in busy]
        if not idle:
            message = f"{name}@{found[0].version} serves, or is needed beside what serves."
            raise ServingError("serving.in-use", message, remedy="Assign another version from the control plane.")
        for model in idle:
            self._residents.drop(model.digest)

    def _asked(self, body: bytes) -> str | None:
        """The version a client names, once it may name any."""
        if not self._is_open:
            message = "Clients may not load and unload models on this device."
            raise ServingError("serving.not-allowed", message, remedy="Set LIGHTSHIP_AGENT_MODEL_CONTROL=explicit.")
        try:
            given = msgspec.json.decode(body or b"{}", type=Change).parameters
            version = msgspec.json.decode(given.pop("version", msgspec.Raw(b"null")), type=str | int | None)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise ServingError("serving.malformed", f"Expected parameters with a version: {e}.") from e
        unknown = sorted(given.keys() - _IGNORED)
        if unknown:
            message = f"Expected no parameter but version, found {unknown[0][:64]!r}; a device loads what it holds."
            raise ServingError("serving.malformed", message)
        return None if version is None else str(version)
