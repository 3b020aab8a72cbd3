"""Bench serving: Triton through pytriton, as its documentation tells one to write it."""

import numpy as np
from onnx_models import NAMES, PORT, all_scores, open_session
from pytriton.decorators import batch
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


def function(name):
    session = open_session(name)

    @batch
    def infer(features):
        return {"scores": all_scores(session, features)}

    return infer


if __name__ == "__main__":
    config = TritonConfig(
        http_address="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2, log_verbose=0
    )
    with Triton(config=config) as triton:
        for name in NAMES:
            triton.bind(
                model_name=name,
                infer_func=function(name),
                inputs=[Tensor(name="features", dtype=np.float32, shape=(30,))],
                outputs=[Tensor(name="scores", dtype=np.float32, shape=(2,))],
                config=ModelConfig(max_batch_size=1024),
            )
        triton.serve()
