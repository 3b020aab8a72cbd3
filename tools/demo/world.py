"""Demo: the physical world. Camera meters look at digits that the model has never seen.

Rules: the images are scikit-learn's handwritten digits, those that were kept from training; the world deals each
camera its own order without repeating an image within a pass, and before and after the retrain from different parts,
so that no model is ever served an image it learnt from.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.float32]
FIELD_ROWS = 1_097
LABEL_SHARE = 0.5
LABEL_DELAY = (0.5, 2.5)  # s


def split_digits() -> tuple[Image, npt.NDArray[np.int64], Image, npt.NDArray[np.int64]]:
    """Training images and labels, field images and labels: float32 `[n, 64]`, 0..16, and int64 `[n]`."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train_x, field_x, train_y, field_y = train_test_split(
        images.astype(np.float32), labels, test_size=FIELD_ROWS, stratify=labels, random_state=1
    )
    return train_x, train_y, field_x, field_y


@dataclass
class World:
    """Light and lenses, which the story changes."""

    images: Image
    labels: npt.NDArray[np.int64]
    dim: bool = False
    smudged: set[str] = field(default_factory=set)
    later_part: bool = False

    def pool(self) -> range:
        """The images that may be dealt now."""
        cut = int(len(self.images) * 0.6)
        return range(cut, len(self.images)) if self.later_part else range(cut)

    def look(self, device: str, index: int, rng: random.Random) -> list[float]:
        """What the camera of `device` sees of image `index`: 64 whole numbers from 0 to 16."""
        seen = self.images[index].reshape(8, 8).copy()
        if self.dim:
            noise = np.array([rng.gauss(0, 0.4) for _ in range(64)]).reshape(8, 8)
            seen = seen * 0.45 + 2.0 + noise
        if device in self.smudged:
            seen[2:6, 3:7] = seen[2:6, 3:7] * 0.35 + 5.0
        rounded: list[float] = np.clip(np.round(seen), 0, 16).ravel().tolist()
        return rounded


class Camera(threading.Thread):
    """One camera: shows images to its agent over the Open Inference Protocol, and sends labels late for some."""

    def __init__(self, world: World, device: str, url: str, per_second: float) -> None:
        """Prepare; `start` begins to look."""
        super().__init__(name=f"camera-{device}", daemon=True)
        self._world, self._device, self._url = world, device, url
        self._period = 1 / per_second
        self._rng = random.Random(device)
        self._stopped = threading.Event()
        self._late: deque[tuple[float, str, str]] = deque()
        self._deck: list[int] = []
        self._pool = range(0)
        self.answers: dict[int, list[int]] = defaultdict(lambda: [0, 0])  # version -> [right, all]
        self.errors = 0

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self.join(timeout=5)

    def run(self) -> None:
        """Look, ask, count, and send the labels that are due."""
        serial = 0
        with httpx.Client(base_url=self._url, timeout=5.0) as http:
            while not self._stopped.is_set():
                began = time.monotonic()
                serial += 1
                try:
                    self._ask(http, f"{self._device}-{serial}")
                    self._send_labels(http)
                except httpx.HTTPError:
                    self.errors += 1
                self._stopped.wait(max(0.0, self._period - (time.monotonic() - began)))

    def _ask(self, http: httpx.Client, request_id: str) -> None:
        index = self._deal()
        tensor = {
            "name": "features",
            "shape": [1, 64],
            "datatype": "FP32",
            "data": self._world.look(self._device, index, self._rng),
        }
        reply = http.post("/v2/models/digits/infer", json={"id": request_id, "inputs": [tensor]})
        if reply.status_code in {503, 404}:
            return  # no model yet
        if reply.status_code != 200:
            self.errors += 1
            return
        answer: dict[str, Any] = reply.json()
        digit = next(o["data"][0] for o in answer["outputs"] if o["name"] == "label")
        truth = str(self._world.labels[index])
        tally = self.answers[int(answer["model_version"])]
        tally[0] += digit == truth
        tally[1] += 1
        if self._rng.random() < LABEL_SHARE:
            self._late.append((time.monotonic() + self._rng.uniform(*LABEL_DELAY), request_id, truth))

    def _send_labels(self, http: httpx.Client) -> None:
        due = [item for item in self._late if item[0] <= time.monotonic()]
        if len(due) < 5:
            return
        self._late = deque(item for item in self._late if item not in due)
        labels = [{"id": request_id, "label": label} for _, request_id, label in due]
        http.post("/v2/models/digits/feedback", json=labels)

    def _deal(self) -> int:
        pool = self._world.pool()
        if not self._deck or pool != self._pool:
            self._pool = pool
            self._deck = list(pool)
            self._rng.shuffle(self._deck)
        return self._deck.pop()
