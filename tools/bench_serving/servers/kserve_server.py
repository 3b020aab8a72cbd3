"""Bench serving: KServe's SDK, as its documentation tells one to write a custom model."""

from kserve import InferOutput, InferResponse, Model, ModelServer
from kserve.utils.utils import generate_uuid
from onnx_models import NAMES, PORT, all_scores, open_session


class OnnxModel(Model):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._session = open_session(name)
        self.ready = True

    async def predict(self, payload, headers=None, response_headers=None):
        found = all_scores(self._session, payload.inputs[0].as_numpy())
        output = InferOutput("scores", list(found.shape), "FP32", data=found.ravel().tolist())
        return InferResponse(payload.id or generate_uuid(), self.name, [output])


if __name__ == "__main__":
    server = ModelServer(http_port=PORT, workers=1, enable_grpc=False, access_log_format=None)
    server.start([OnnxModel(name) for name in NAMES])
