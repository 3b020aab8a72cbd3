"""Bench serving: LitServe, as its documentation tells one to write it."""

import litserve
from onnx_models import NAMES, PORT, open_session, scores


class OnnxApi(litserve.LitAPI):
    def __init__(self, name: str) -> None:
        super().__init__(api_path=f"/{name}/predict")
        self._name = name

    def setup(self, device):
        self._session = open_session(self._name)

    def decode_request(self, request):
        return request["features"]

    def predict(self, features):
        return scores(self._session, features)

    def encode_response(self, found):
        return {"label": found.index(max(found)), "scores": found}


if __name__ == "__main__":
    apis = [OnnxApi(name) for name in NAMES]
    server = litserve.LitServer(apis, accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=PORT, num_api_servers=1, generate_client_file=False, log_level="warning")
