"""Bench serving: a runtime for MLServer, as its documentation tells one to write it."""

from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from onnx_models import all_scores, open_session


class OnnxRuntime(MLModel):
    async def load(self) -> bool:
        self._session = open_session(self.name)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        rows = self.decode(payload.inputs[0], default_codec=NumpyCodec)
        found = all_scores(self._session, rows.astype("float32"))
        output = NumpyCodec.encode_output("scores", found)
        return InferenceResponse(model_name=self.name, outputs=[output])
