"""What tritonclient gets from an agent, as JSON; run in the clients' own environment with the address as argument."""

import json
import sys

import numpy as np
import tritonclient.http as triton

asked = json.load(sys.stdin)
rows = np.array(asked["rows"], dtype=np.float32)
client = triton.InferenceServerClient(sys.argv[1])
names = ("label", "class", "scores")


def tensor(data, datatype="FP32", name="features", binary=True):
    made = triton.InferInput(name, list(data.shape), datatype)
    made.set_data_from_numpy(data, binary_data=binary)
    return made


def told(result):
    return {name: result.as_numpy(name).tolist() for name in names if result.as_numpy(name) is not None}


def words(data):
    return {k: [w.decode() if isinstance(w, bytes) else w for w in v] if k == "label" else v for k, v in data.items()}


def infer(*inputs, **more):
    return words(told(client.infer("pump", list(inputs), **more)))


def refused(do):
    try:
        do()
    except triton.InferenceServerException as e:
        return [e.status(), e.message()]
    return None


def facts_of_pump():
    said = {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model ready": [client.is_model_ready("pump"), client.is_model_ready("pump", "1")],
        "other ready": [client.is_model_ready("fan"), client.is_model_ready("pump", "9")],
        "server": client.get_server_metadata(),
        "model": client.get_model_metadata("pump", "1"),
        "index": client.get_model_repository_index(),
        "binary": infer(tensor(rows)),
        "json in": infer(tensor(rows, binary=False)),
        "by version": infer(tensor(rows), model_version="1"),
    }
    wanted = [triton.InferRequestedOutput("scores", binary_data=False), triton.InferRequestedOutput("label")]
    chosen = client.infer("pump", [tensor(rows)], outputs=wanted, request_id="wish-7", parameters={"site": "north"})
    said["chosen"] = [chosen.get_response()["id"], [o["name"] for o in chosen.get_response()["outputs"]]]
    said["chosen scores"] = chosen.as_numpy("scores").tolist()
    said["chosen label"] = [word.decode() for word in chosen.as_numpy("label")]
    many = np.repeat(rows, 200, axis=0)
    for algorithm in ("gzip", "deflate"):
        how = {"request_compression_algorithm": algorithm, "response_compression_algorithm": algorithm}
        plain = [triton.InferRequestedOutput(name, binary_data=False) for name in names]
        said[algorithm] = [
            infer(tensor(many), **how) == infer(tensor(many)),
            infer(tensor(many, binary=False), outputs=plain, **how) == infer(tensor(many)),
        ]
    said["datatypes"] = {}
    ones = np.array([[0, 1, 1, 0], [1, 0, 1, 1]])
    for datatype, kind in asked["datatypes"].items():
        data = ones.astype(kind)
        ways = [infer(tensor(data, datatype))]
        if datatype != "FP16":
            ways.append(infer(tensor(data, datatype, binary=False)))
        said["datatypes"][datatype] = ways
    said["async"] = words(told(client.async_infer("pump", [tensor(rows)]).get_result()))
    said["refused"] = {
        "shape": refused(lambda: infer(tensor(rows[:, :3]))),
        "name": refused(lambda: infer(tensor(rows, name="x"))),
        "words": refused(lambda: infer(tensor(rows.astype("S"), "BYTES"))),
        "gap": refused(lambda: infer(tensor(rows * np.float32("nan")))),
        "model": refused(lambda: client.infer("fan", [tensor(rows)])),
        "version": refused(lambda: client.infer("pump", [tensor(rows)], model_version="9")),
        "output": refused(lambda: infer(tensor(rows), outputs=[triton.InferRequestedOutput("odds")])),
    }
    said["statistics"] = [
        client.get_inference_statistics(),
        client.get_inference_statistics("pump"),
        client.get_inference_statistics("pump", "1"),
    ]
    return said


def facts_of_words():
    columns = {
        "temperature": (rows[:, 0], "FP32"),
        "material": (np.array(asked["materials"], dtype=object), "BYTES"),
        "current": (rows[:, 2].astype(np.float64), "FP64"),
        "gear": (np.array([["1"], ["2"]], dtype=object), "BYTES"),
    }
    return {
        "inputs": client.get_model_metadata("pump")["inputs"],
        "binary": infer(*(tensor(data, kind, name) for name, (data, kind) in columns.items())),
        "json": infer(*(tensor(data, kind, name, binary=False) for name, (data, kind) in columns.items())),
    }


json.dump({"pump": facts_of_pump, "words": facts_of_words}[asked["model"]](), sys.stdout)
