"""Tensors and images over the protocol: what they become, what is answered, what is refused."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from tests.agent import tensored

from lightship.convert.declared import Declared
from lightship_agent.contract.bundle import read_bundle
from lightship_agent.contract.codes import ServingError
from lightship_agent.contract.tensors import DTYPES, ImageRules
from lightship_agent.monitor.monitor import Monitor
from lightship_agent.runtime.model import load_model
from lightship_agent.serving.dataplane import DataPlane, Observe
from lightship_agent.serving.http import HttpApp, create_app
from lightship_agent.serving.http1 import Reply, Request
from lightship_agent.serving.images import MAX_PIXELS, image_tensor
from lightship_agent.serving.oip import model_metadata
from lightship_agent.serving.tensors import Tensor

EYE = load_model(read_bundle(tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays())))
MIRROR = load_model(
    read_bundle(tensored.bundle(tensored.mirror(), tensored.MIRROR, tensored.mirror_arrays(), name="mirror"))
)
PIXELS = tensored.pixels()


def app_of(observe: Observe | None = None, **watching: Any) -> HttpApp:
    plane = DataPlane(observe or (lambda *_: None), **watching)
    for model in (EYE, MIRROR):
        plane.install(model)
    return create_app(plane, status=dict, metrics=str)


def post(app: HttpApp, path: str, body: bytes, **headers: bytes) -> Reply:
    named = {k.replace("_", "-").encode(): v for k, v in headers.items()}
    outcome = app.respond(Request(b"POST", path.encode(), named, body, True))
    if isinstance(outcome, Reply):
        return outcome

    async def wait() -> Reply:
        return await outcome

    return asyncio.run(wait())


def infer(app: HttpApp, model: str, tensors: list[dict[str, Any]], blobs: bytes = b"", **more: Any) -> tuple[int, Any]:
    text = json.dumps({"inputs": tensors, **more}).encode()
    headers = {"inference_header_content_length": b"%d" % len(text)} if blobs else {}
    reply = post(app, f"/v2/models/{model}/infer", text + blobs, **headers)
    return reply.status, msgspec.json.decode(reply.body) if reply.content_type == b"application/json" else reply


def told(name: str, datatype: str, array: npt.NDArray[Any]) -> tuple[dict[str, Any], bytes]:
    blob = array.astype(DTYPES[datatype]).tobytes()
    size = {"binary_data_size": len(blob)}
    return {"name": name, "datatype": datatype, "shape": list(array.shape), "parameters": size}, blob


def outputs(answer: Any) -> dict[str, Any]:
    return {o["name"]: o["data"] for o in answer["outputs"]}


def expected_scores() -> npt.NDArray[Any]:
    found, _ = EYE.predict_tensors({"image": tensored.as_tensor(PIXELS)}, ["probabilities"])
    return found["probabilities"]


def mirror_inputs(*but: str) -> dict[str, npt.NDArray[Any]]:
    return {n: a for n, a in tensored.mirror_arrays().items() if n.startswith("in_") and n not in but}


# Tensors --------------------------------------------------------------------------------------------------------------


def test_every_datatype_goes_through_in_binary_and_in_json() -> None:
    app, arrays = app_of(), tensored.mirror_arrays()
    binary = [told(name, name[3:], array) for name, array in mirror_inputs().items()]
    plain = [
        {"name": n, "datatype": n[3:], "shape": list(a.shape), "data": a.tolist()} if n != "in_FP16" else None
        for n, a in mirror_inputs().items()
    ]
    half, blob = told("in_FP16", "FP16", arrays["in_FP16"])
    wanted = [{"name": o.name} for o in tensored.MIRROR.outputs if o.datatype != "FP16"]

    first = infer(app, "mirror", [t for t, _ in binary], b"".join(b for _, b in binary), outputs=wanted)
    second = infer(app, "mirror", [p or half for p in plain], blob, outputs=wanted)

    for status, answer in (first, second):
        assert status == 200, answer
        for name, data in outputs(answer).items():
            assert data == arrays[name].ravel().tolist()


def test_half_floats_come_back_as_binary_and_are_refused_in_json() -> None:
    app, arrays = app_of(), tensored.mirror_arrays()
    tensors = [told(name, name[3:], array) for name, array in mirror_inputs().items()]
    described, blobs = [t for t, _ in tensors], b"".join(b for _, b in tensors)

    status, answer = infer(app, "mirror", described, blobs, outputs=[{"name": "out_FP16"}])
    assert (status, answer["code"]) == (400, "serving.output")
    assert app.plane.errors()["serving.output"] == 1

    wanted = [{"name": "out_FP16", "parameters": {"binary_data": True}}]
    status, reply = infer(app, "mirror", described, blobs, outputs=wanted)
    length = int(dict(reply.headers)[b"inference-header-content-length"])
    assert status == 200
    assert reply.body[length:] == arrays["out_FP16"].tobytes()


def test_the_described_tensors_are_the_declared_ones() -> None:
    eye, mirror = model_metadata(EYE), model_metadata(MIRROR)

    assert eye["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}]
    assert [o["name"] for o in eye["outputs"]] == ["probabilities", "label", "class"]
    assert eye["parameters"]["images"] == {"image": ["PNG", "JPEG", "FP32 [-1, 3, 8, 8]"]}
    assert [i["datatype"] for i in mirror["inputs"]] == list(tensored.KINDS)
    assert mirror["outputs"][-1] == {"name": "sums", "datatype": "FP64", "shape": [-1]}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"name": "in_X"}, "serving.input"),
        ({"datatype": "FP32"}, "serving.input"),
        ({"shape": [2, 2], "data": [0.5, 1.0, 1.0]}, "serving.input"),
        ({"shape": [4], "data": [0.5, 1.0, 1.0, 2.0]}, "serving.input"),
        ({"shape": [2, 2], "data": [0.5, None, 1.0, 2.0]}, "serving.input"),
        ({"shape": [1, 2], "data": [0.5, 1.0]}, "serving.input"),
        ({"shape": [0, 2], "data": []}, "serving.input"),
        ({"shape": [70_000, 1], "data": []}, "serving.too-large"),
        ({"datatype": "BYTES", "data": ["a", "b", "c", "d"]}, "serving.input"),
    ],
)
def test_tensors_that_are_not_as_declared_are_refused_counted_and_noted(change: dict[str, Any], code: str) -> None:
    refused: list[int] = []
    app = app_of(refused=lambda _model, rows, *_: refused.append(rows))
    good = {"name": "in_FP64", "datatype": "FP64", "shape": [3, 2], "data": [0.5] * 6}
    others = [told(name, name[3:], array) for name, array in mirror_inputs("in_FP64").items()]

    status, answer = infer(app, "mirror", [*(t for t, _ in others), {**good, **change}], b"".join(b for _, b in others))

    assert (status, answer["code"]) == (413 if code == "serving.too-large" else 400, code), answer
    assert app.plane.errors()[code] == 1
    assert app.plane.stats("mirror")[0].requests == 0


def test_an_input_that_is_not_there_or_twice_is_refused() -> None:
    app = app_of()
    tensors = [told(name, name[3:], array) for name, array in mirror_inputs("in_BOOL").items()]

    status, answer = infer(app, "mirror", [t for t, _ in tensors], b"".join(b for _, b in tensors))

    assert (status, answer["code"]) == (400, "serving.input")
    assert "'in_BOOL'" in answer["error"]


def test_what_is_watched_are_plain_numbers_and_the_label() -> None:
    monitor = Monitor(6)
    app = app_of(monitor.observe)
    tensor, blob = told("image", "UINT8", PIXELS)

    assert infer(app, "eye", [tensor], blob)[0] == 200

    windows = [r for r in monitor.collect(1_000) if type(r).__name__ == "Window"]
    assert len(windows) == 1
    assert (windows[0].rows, tuple(windows[0].content().predictions)) == (6, (3, 3))


# Images ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["raw", "one", "as the graph takes it"])
def test_raw_pixels_and_ready_tensors_need_no_library(way: str) -> None:
    app = app_of()
    array, datatype, rows = PIXELS, "UINT8", 6
    if way == "one":
        array, rows = PIXELS[0], 1
    elif way == "as the graph takes it":
        array, datatype = tensored.as_tensor(PIXELS), "FP32"
    tensor, blob = told("image", datatype, array)

    status, answer = infer(app, "eye", [tensor], blob)

    assert status == 200, answer
    assert outputs(answer)["label"] == (["red", "blue"] * 3)[:rows]
    assert np.allclose(outputs(answer)["probabilities"], expected_scores()[:rows].ravel(), atol=1e-6)


@pytest.mark.parametrize(
    ("datatype", "shape"),
    [
        ("UINT8", (1, 8, 8, 4)),
        ("UINT8", (1, 3, 8, 8)),
        ("UINT8", (8, 8)),
        ("INT8", (1, 8, 8, 3)),
        ("FP32", (1, 8, 8, 3)),
    ],
)
def test_pixels_of_another_kind_are_refused(datatype: str, shape: tuple[int, ...]) -> None:
    app = app_of()
    tensor, blob = told("image", datatype, np.zeros(shape))

    status, answer = infer(app, "eye", [tensor], blob)

    assert (status, answer["code"]) == (400, "serving.input")
    assert "'image' is an image: expected UINT8" in answer["error"]


def test_without_the_library_the_refusal_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)

    reply = post(app_of(), "/v2/models/eye/predict", b"\x89PNG", content_type=b"image/png")

    assert (reply.status, msgspec.json.decode(reply.body)["code"]) == (400, "serving.input")
    assert b"lightship-agent[images]" in reply.body


def test_the_library_is_loaded_by_the_first_image_and_not_before() -> None:
    program = "import sys, lightship_agent.app, lightship_agent.serving.images; sys.exit('PIL' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["text/plain", "image/gif", "application/json", ""])
def test_the_convenience_route_of_an_image_model_takes_images_only(kind: str) -> None:
    reply = post(app_of(), "/v2/models/eye/predict", b"{}", content_type=kind.encode())

    assert (reply.status, msgspec.json.decode(reply.body)["code"]) == (400, "serving.input")


def test_a_model_of_tensors_has_no_convenience_route() -> None:
    reply = post(app_of(), "/v2/models/mirror/predict", b"x", content_type=b"image/png")

    assert (reply.status, msgspec.json.decode(reply.body)["code"]) == (400, "serving.input")
    assert b"ask for" in reply.body


def encoded(pixels: npt.NDArray[np.uint8], kind: str = "PNG", **how: Any) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


def tensor_of(data: list[Any], declared: Declared = tensored.COLOUR, **rules: Any) -> npt.NDArray[Any]:
    base = declared.inputs[0]
    made = msgspec.structs.replace(base, image=msgspec.structs.replace(base.image or None, **rules))  # type: ignore[type-var]
    return image_tensor(Tensor("image", "BYTES", (len(data),), data), made)


@pytest.mark.extras("PIL")
def test_png_in_binary_in_base64_and_as_a_body_is_what_its_pixels_are() -> None:
    app = app_of()
    files = [encoded(one) for one in PIXELS]
    blob = b"".join(struct.pack("<I", len(f)) + f for f in files)
    binary = {"name": "image", "datatype": "BYTES", "shape": [6], "parameters": {"binary_data_size": len(blob)}}
    text = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [6, 1],
        "data": [base64.b64encode(f).decode() for f in files],
    }

    for status, answer in (infer(app, "eye", [binary], blob), infer(app, "eye", [text])):
        assert status == 200, answer
        assert np.allclose(outputs(answer)["probabilities"], expected_scores().ravel(), atol=1e-6)

    reply = post(app, "/v2/models/eye/predict", files[1], content_type=b"image/png", x_request_id=b"cam-1")
    said = msgspec.json.decode(reply.body)
    assert (said["label"], said["id"], said["model"], said["version"]) == ("blue", "cam-1", "eye", 1)
    assert np.allclose([said["scores"][c] for c in tensored.COLOURS], expected_scores()[1], atol=1e-6)


@pytest.mark.extras("PIL")
def test_jpeg_and_other_sizes_are_drawn_to_the_declared_size() -> None:
    app = app_of()
    large = np.repeat(np.repeat(PIXELS[0], 4, axis=0), 8, axis=1)

    for data, kind in ((encoded(large, "JPEG"), b"image/jpeg"), (encoded(large), b"image/png")):
        reply = post(app, "/v2/models/eye/predict", data, content_type=kind)
        assert msgspec.json.decode(reply.body)["label"] == "red"


@pytest.mark.extras("PIL")
def test_an_image_of_another_size_is_refused_stretched_or_cut_in_the_middle_as_declared() -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 8:16] = 255  # white in the middle, black at both sides

    assert tensor_of([encoded(wide)], resize="crop").mean() == pytest.approx((1 - 0.5) / 0.25)
    assert tensor_of([encoded(wide)], resize="stretch").mean() < 1
    with pytest.raises(ServingError, match="expected an image of 8 × 8, found 24 × 8"):
        tensor_of([encoded(wide)], resize="no")


@pytest.mark.extras("PIL")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_other_ways_to_store_8_bits_are_read(mode: str) -> None:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(PIXELS[0]).convert(mode).save(out, "PNG")

    assert tensor_of([out.getvalue()]).shape == (1, 3, 8, 8)


def bomb(width: int, height: int) -> bytes:
    """A small PNG that says it is a large one."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.extras("PIL")
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "serving.input"),
        (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", "serving.input"),
        (b"\x89PNG\r\n\x1a\n" + b"\xff" * 40, "serving.input"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 40, "serving.input"),
        ("not base64!", "serving.input"),
        (None, "serving.input"),
        (bomb(8, 8)[:-30], "serving.input"),
        (bomb(5_000, 5_000), "serving.too-large"),
        (bomb(60_000, 60_000), "serving.input"),
    ],
)
def test_files_that_are_no_images_or_too_large_are_refused(data: Any, code: str) -> None:
    assert MAX_PIXELS < 5_000 * 5_000

    with pytest.raises(ServingError) as caught:
        tensor_of([data])

    assert caught.value.code == code


@pytest.mark.extras("PIL")
def test_sixteen_bits_a_channel_are_not_guessed_at() -> None:

    with pytest.raises(ServingError, match="8 bits a channel"):
        tensor_of([encoded(np.zeros((8, 8), dtype=np.uint16))])  # type: ignore[arg-type]


@pytest.mark.extras("PIL")
def test_a_truncated_image_is_refused_whole() -> None:
    data = encoded(np.random.default_rng(2).integers(0, 255, (64, 64, 3)).astype(np.uint8))

    with pytest.raises(ServingError):
        tensor_of([data[: len(data) // 2]])


def test_many_small_files_that_become_large_tensors_are_refused_before_the_first_is_decoded() -> None:
    base = msgspec.structs.replace(tensored.COLOUR.inputs[0], shape=(-1, 3, 512, 512))

    with pytest.raises(ServingError) as caught:
        image_tensor(Tensor("image", "BYTES", (30,), [b"x"] * 30), base)

    assert caught.value.code == "serving.too-large"


def test_grey_images_and_integers_are_left_as_they_are() -> None:
    base = tensored.COLOUR.inputs[0]
    rules = ImageRules(layout="NHWC")
    grey = msgspec.structs.replace(base, datatype="UINT8", shape=(-1, 8, 8, 1), image=rules)

    pixels = PIXELS[:, :, :, :1]

    found = image_tensor(Tensor("image", "UINT8", pixels.shape, pixels), grey)
    assert found.dtype == np.uint8
    assert np.array_equal(found, pixels)
