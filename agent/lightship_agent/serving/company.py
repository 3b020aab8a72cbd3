"""Serving: the models beside the current one, as arms of an A/B in the data plane, or in the shadow.

Rules:
* it decides nothing: who stands beside, and how, comes from the updater;
* what can't be asked the same rows as the current model is not asked at all, also when the current one changes; it
  comes back with one that it is like;
* while nobody is in the shadow the hot path is what it is without shadows.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from lightship_agent.contract.assignment import Beside
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import UpdateError
from lightship_agent.contract.experiment import Shape, unlike
from lightship_agent.runtime.model import LoadedModel

from .dataplane import DataPlane
from .mirror import Challenger, Mirror
from .residents import Residents
from .split import Arm, Split


class Company:
    """Who stands beside the current models.

    Args:
        plane: what serves.
        residents: what is in memory.
        mirror: what asks those in the shadow.
        watch: called with the digests of the arms, whose answers are watched as the current model's are.
    """

    def __init__(
        self, plane: DataPlane, residents: Residents, mirror: Mirror, watch: Callable[[frozenset[str]], None]
    ) -> None:
        self._plane, self._residents, self._mirror, self._watch = plane, residents, mirror, watch
        self._beside: dict[str, tuple[Beside, LoadedModel]] = {}
        self._lock = threading.RLock()

    @property
    def digests(self) -> frozenset[str]:
        """The digests of all of them."""
        return frozenset(model.digest for _, model in self._beside.values())

    def stand(self, beside: Beside, bundle: Callable[[], Bundle]) -> None:
        """Have the bundle beside the current model, or change how it is.

        Raises:
            UpdateError: update.beside when it can't be asked what the current model is asked.
            LightshipError: serving.memory, and those of loading; then nothing changes.
        """
        with self._lock:
            before = self._beside.get(beside.experiment)
            model = before[1] if before and before[1].digest == beside.sha256 else None
            try:
                model = model or self._load(beside, bundle)
                self._check(model, beside.mode)
            except BaseException:
                self._release(beside.sha256)
                raise
            self._beside[beside.experiment] = (beside, model)
            self.arrange()

    def leave(self, experiment: str) -> None:
        """Have it beside no longer."""
        with self._lock:
            gone = self._beside.pop(experiment, None)
            self.arrange()
            if gone is not None:
                self._release(gone[1].digest)

    @contextlib.contextmanager
    def changing(self, bundle: Bundle) -> Iterator[None]:
        """While `bundle` becomes current: whoever can't be asked the same rows is not asked from now on."""
        manifest = bundle.manifest
        coming = Shape(manifest.model, manifest.input_schema, manifest.outputs, manifest.tensors or None)
        with self._lock:
            self._arrange(coming)
            try:
                yield
            finally:
                self._arrange(None)

    def arrange(self) -> None:
        """After the current model has changed, or who stands beside it."""
        with self._lock:
            self._arrange(None)

    def _load(self, beside: Beside, bundle: Callable[[], Bundle]) -> LoadedModel:
        self._residents.hold({*self.digests, beside.sha256})
        return self._residents.have(bundle())

    def _check(self, model: LoadedModel, mode: str) -> None:
        current = next((m for m in self._plane.models() if m.name == model.name), None)
        why = "Nothing is served that it could stand beside." if current is None else _unlike(current, model)
        if not why and mode == "shadow" and model.spec is not None:
            why = "Tensors are not mirrored."
        if why:
            raise UpdateError("update.beside", f"{model.name}@{model.version} can't run beside what serves: {why}")

    def _release(self, digest: str) -> None:
        """What nobody here needs any more may go from memory; what serves stays there."""
        self._residents.hold(self.digests)
        if digest not in self.digests:
            self._residents.drop(digest)

    def _arrange(self, coming: Shape | None) -> None:
        """Arms and shadows of the current models, as far as they are like them, and like one that is coming."""
        challengers, watched = [], set()
        for served in self._plane.models():
            arms = []
            for beside, model in self._beside.values():
                if _unlike(served, model) or (coming is not None and unlike(coming, _shape(model))):
                    continue
                if beside.mode == "shadow":
                    challengers.append(Challenger(beside.experiment, model, beside.share))
                elif model.digest != served.digest:
                    if not self._plane.watches(model.digest):
                        self._plane.keep(model, watched=True)
                    arms.append(Arm(beside.experiment, model.version, beside.share, beside.per_request))
                    watched.add(model.digest)
            self._plane.divide(served.name, Split(tuple(arms)) if arms else None)
        self._mirror.set(challengers)
        self._plane.mirror_to(self._mirror if challengers else None)
        self._watch(frozenset(watched))


def _unlike(current: LoadedModel, model: LoadedModel) -> str:
    if current.version == model.version and current.digest != model.digest:
        return f"Another bundle is served as version {model.version}."
    return unlike(_shape(current), _shape(model))


def _shape(model: LoadedModel) -> Shape:
    return Shape(model.name, model.schema, model.outputs, model.spec)
