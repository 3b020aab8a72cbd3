"""What MLServer's types and codecs make of an agent's answers, as JSON; run as speak_triton.py is."""

import json
import sys
import urllib.error
import urllib.request

import numpy as np
import pandas as pd
from mlserver import types
from mlserver.codecs import NumpyCodec, NumpyRequestCodec, PandasCodec, StringCodec

asked = json.load(sys.stdin)
rows = np.array(asked["rows"], dtype=np.float32)


def call(path, body=None):
    data = None if body is None else body.model_dump_json(exclude_none=asked["exclude_none"]).encode()
    request = urllib.request.Request(f"http://{sys.argv[1]}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as reply:
        return reply.read()


def infer(request, path="/v2/models/pump/infer"):
    return types.InferenceResponse.model_validate_json(call(path, request))


def told(response):
    outputs = {o.name: o for o in response.outputs}
    return {
        "label": StringCodec.decode_output(outputs["label"]),
        "class": NumpyCodec.decode_output(outputs["class"]).ravel().tolist(),
        "scores": NumpyCodec.decode_output(outputs["scores"]).tolist(),
    }


def facts_of_pump():
    request = NumpyRequestCodec.encode_request(rows)
    request.inputs[0].name = "features"
    request.id = "from-mlserver"
    response = infer(request)
    chosen = types.InferenceRequest(
        inputs=request.inputs,
        outputs=[types.RequestOutput(name="scores")],
        parameters=types.Parameters(content_type="np", headers={"x": "1"}),
    )
    said = {
        "server": types.MetadataServerResponse.model_validate_json(call("/v2")).model_dump(mode="json"),
        "slash": types.MetadataServerResponse.model_validate_json(call("/v2/")).model_dump(mode="json"),
        "model": types.MetadataModelResponse.model_validate_json(call("/v2/models/pump")).model_dump(mode="json"),
        "id": response.id,
        "from": [response.model_name, response.model_version],
        "codec": told(response),
        "chosen": [o.name for o in infer(chosen).outputs],
        "index": types.RepositoryIndexResponse.model_validate_json(
            call("/v2/repository/index", types.RepositoryIndexRequest(ready=True))
        ).model_dump(mode="json"),
    }
    request.inputs[0].name = "x"
    try:
        infer(request)
    except urllib.error.HTTPError as e:
        said["error"] = [e.code, types.InferenceErrorResponse.model_validate_json(e.read()).error]
    return said


def facts_of_words():
    frame = pd.DataFrame(
        {"material": asked["materials"], "gear": ["1", "2"], "temperature": rows[:, 0], "current": rows[:, 2]}
    )
    return {"pandas": told(infer(PandasCodec.encode_request(frame)))}


json.dump({"pump": facts_of_pump, "words": facts_of_words}[asked["model"]](), sys.stdout)
