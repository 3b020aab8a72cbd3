"""What KServe's client gets from an agent, as JSON; run as speak_triton.py is."""

import asyncio
import json
import sys

import httpx
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

asked = json.load(sys.stdin)
rows = np.array(asked["rows"], dtype=np.float32)
base = f"http://{sys.argv[1]}"


def tensor(data, datatype="FP32", name="features", binary=False):
    made = InferInput(name, list(data.shape), datatype)
    made.set_data_from_numpy(data, binary_data=binary)
    return made


def told(response):
    return {output.name: output.as_numpy().tolist() for output in response.outputs}


def request(*inputs, **more):
    return InferRequest(model_name="pump", infer_inputs=list(inputs), **more)


async def refused(coroutine):
    try:
        await coroutine
    except httpx.HTTPStatusError as e:
        return [e.response.status_code, str(e)]
    return None


async def facts_of_pump(client):
    wanted = [RequestedOutput("scores", {"binary_data": True})]
    chosen = await client.infer(base, request(tensor(rows), request_outputs=wanted, request_id="k-1"), "pump")
    return {
        "live": await client.is_server_live(base),
        "ready": [await client.is_server_ready(base), await client.is_model_ready(base, "pump")],
        "other ready": await client.is_model_ready(base, "fan"),
        "json": told(await client.infer(base, request(tensor(rows)), "pump")),
        "binary": told(await client.infer(base, request(tensor(rows, binary=True)), "pump")),
        "chosen": [chosen.id, told(chosen)],
        "refused": [
            await refused(client.infer(base, request(tensor(rows[:, :3])), "pump")),
            await refused(client.infer(base, request(tensor(rows)), "fan")),
        ],
    }


async def facts_of_words(client):
    def columns(binary):
        return [
            tensor(rows[:, 0], name="temperature", binary=binary),
            tensor(np.array(asked["materials"], dtype=np.object_), "BYTES", "material", binary),
            tensor(rows[:, 2], name="current", binary=binary),
            tensor(np.array(["1", "2"], dtype=np.object_), "BYTES", "gear", binary),
        ]

    return {
        "json": told(await client.infer(base, request(*columns(False)), "pump")),
        "binary": told(await client.infer(base, request(*columns(True)), "pump")),
    }


async def main():
    async with InferenceRESTClient(RESTConfig(protocol="v2", retries=1)) as client:
        return await {"pump": facts_of_pump, "words": facts_of_words}[asked["model"]](client)


json.dump(asyncio.run(main()), sys.stdout)
