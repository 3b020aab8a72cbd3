"""Bench serving: BentoML, as its documentation tells one to write a service."""

import bentoml
from onnx_models import NAMES, open_session, scores


@bentoml.service(workers=1, traffic={"timeout": 60})
class Scorer:
    def __init__(self) -> None:
        self._sessions = {name: open_session(name) for name in NAMES}

    @bentoml.api(route="/predict")
    async def predict(self, model: str, features: list[float]) -> dict:
        found = scores(self._sessions[model], features)
        return {"label": found.index(max(found)), "scores": found}
