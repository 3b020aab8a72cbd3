"""Models that take tensors: loaded as declared or not at all, proved on golden tensors, watched by plain numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.agent import tensored
from tests.agent.conftest import build

from lightship.convert.declared import Declared
from lightship_agent.contract.bundle import TENSORS, build_bundle, read_bundle, read_members
from lightship_agent.contract.codes import BundleError, DataError, ServingError, UpdateError
from lightship_agent.contract.manifest import Requires, manifest_bytes, parse_manifest
from lightship_agent.contract.tensors import Array, GoldenTensors, ImageRules, TensorInput, TensorOutput, TensorSpec
from lightship_agent.contract.wire import encode
from lightship_agent.runtime.golden import check_bundle
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.probe import probe

EYE = tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays())
MIRROR = tensored.bundle(tensored.mirror(), tensored.MIRROR, tensored.mirror_arrays(), name="mirror")


def test_an_image_classifier_answers_its_golden_tensors_and_knows_its_colours() -> None:
    bundle = read_bundle(EYE)
    model = load_model(bundle)

    assert check_bundle(model, bundle) < 1e-6
    found, said = model.predict_tensors({"image": tensored.as_tensor(tensored.pixels())}, ["probabilities"])
    assert said.labels is not None
    assert [tensored.COLOURS[i] for i in said.labels] == ["red", "blue"] * 3
    assert said.scores is found["probabilities"]
    assert model.bound is None


def test_every_datatype_goes_in_and_comes_out_as_it_was() -> None:
    bundle = read_bundle(MIRROR)
    model = load_model(bundle)
    arrays = tensored.mirror_arrays()
    feeds = {name: array for name, array in arrays.items() if name.startswith("in_")}

    found, said = model.predict_tensors(feeds, [o.name for o in tensored.MIRROR.outputs])

    assert check_bundle(model, bundle) == 0
    assert len(said) == 0
    for name, array in found.items():
        assert array.dtype == arrays[name].dtype
        assert np.array_equal(array, arrays[name])


def test_rows_are_no_tensors() -> None:
    with pytest.raises(ServingError, match="takes tensors by name") as caught:
        load_model(read_bundle(EYE)).predict(np.zeros((1, 4), dtype=np.float32))

    assert caught.value.code == "serving.input"


@pytest.mark.slow
def test_the_probe_tries_it_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "bundle.tar"
    path.write_bytes(EYE)

    report = probe(path, Requires())

    assert report.max_difference < 1e-6
    assert 0 < report.latency_ms_p95 < 250
    path.write_bytes(tensored.bundle(tensored.conv_net(), tensored.COLOUR, tensored.colour_arrays(), shift=0.01))
    with pytest.raises(UpdateError, match="Golden row 0") as caught:
        probe(path, Requires())
    assert caught.value.code == "update.golden"


def test_other_golden_numbers_or_flags_are_refused() -> None:
    arrays = tensored.mirror_arrays()
    arrays["out_BOOL"] = ~arrays["out_BOOL"]
    lying = tensored.bundle(tensored.mirror(), tensored.MIRROR, arrays)
    bundle = read_bundle(lying)

    with pytest.raises(UpdateError, match="'out_BOOL'") as caught:
        check_bundle(load_model(bundle), bundle)

    assert caught.value.code == "update.golden"


def changed(declared: Declared, which: str, **changes: Any) -> Declared:
    first, *others = getattr(declared, which)
    return msgspec.structs.replace(declared, **{which: (msgspec.structs.replace(first, **changes), *others)})


@pytest.mark.parametrize(
    "declared",
    [
        changed(tensored.MIRROR, "inputs", datatype="UINT8"),
        changed(tensored.MIRROR, "outputs", datatype="UINT8"),
        changed(tensored.MIRROR, "inputs", shape=(-1, 3)),
        changed(tensored.MIRROR, "inputs", shape=(-1, 2, 1)),
        changed(tensored.MIRROR, "outputs", shape=(-1,)),
        changed(tensored.MIRROR, "inputs", name="in_X"),
        changed(tensored.MIRROR, "outputs", name="out_X"),
        msgspec.structs.replace(tensored.MIRROR, inputs=tensored.MIRROR.inputs[:-1]),
        msgspec.structs.replace(tensored.COLOUR, inputs=tensored.MIRROR.inputs),
    ],
)
def test_a_graph_that_is_not_as_declared_is_refused_before_it_serves(declared: Declared) -> None:
    """The bundle is whole in itself: only the graph inside is another one."""
    bundle = read_bundle(MIRROR)
    spec = declared.spec
    manifest = msgspec.structs.replace(bundle.manifest, tensors=spec, input_schema=spec.schema())

    with pytest.raises(BundleError, match="not what the manifest says") as caught:
        load_model(msgspec.structs.replace(bundle, manifest=manifest))

    assert caught.value.code == "bundle.incompatible"


def rebuilt(data: bytes, **members: bytes | None) -> bytes:
    whole = {**read_members(data), **{k.replace("__", "."): v for k, v in members.items()}}
    manifest = parse_manifest(whole.pop("manifest.json") or b"")
    return build_bundle(manifest, {k: v for k, v in whole.items() if v is not None})


def test_golden_tensors_that_are_not_the_declared_ones_are_refused() -> None:
    good = read_bundle(EYE).tensors
    assert good is not None
    others = [
        rebuilt(EYE, tensors__msgpack=None),
        rebuilt(build(), tensors__msgpack=encode(good)),
        rebuilt(EYE, tensors__msgpack=encode(GoldenTensors(inputs=good.inputs, outputs=()))),
        rebuilt(EYE, tensors__msgpack=encode(GoldenTensors(inputs=good.outputs, outputs=good.inputs))),
    ]
    short = msgspec.structs.replace(good.inputs[0], data=good.inputs[0].data[:-1])
    few = Array.of("image", "FP32", good.inputs[0].array()[:1])
    wrong = (encode(GoldenTensors(inputs=(one,), outputs=good.outputs)) for one in (short, few))
    others += [rebuilt(EYE, tensors__msgpack=data) for data in wrong]

    for data in others:
        with pytest.raises(BundleError) as caught:
            read_bundle(data)
        assert caught.value.code in {"bundle.manifest", "bundle.malformed"}
    assert TENSORS in read_members(EYE)


def test_a_manifest_without_tensors_has_the_bytes_it_always_had() -> None:
    manifest = read_bundle(build()).manifest

    assert b"tensors" not in manifest_bytes(manifest)
    assert b'"tensors"' in manifest_bytes(read_bundle(EYE).manifest)


def test_a_manifest_whose_schema_is_not_what_is_watched_is_refused() -> None:
    manifest = read_bundle(EYE).manifest
    plain = msgspec.json.decode(manifest_bytes(manifest))
    plain["schema"]["features"][0]["name"] = "brightness"

    with pytest.raises(BundleError, match="not what is watched"):
        parse_manifest(msgspec.json.encode(plain))


IMAGE: dict[str, Any] = {"name": "i", "datatype": "FP32", "shape": (-1, 3, 4, 4)}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TensorInput(name="", datatype="FP32", shape=(-1, 2)),
        lambda: TensorInput(name="a", datatype="BYTES", shape=(-1, 2)),
        lambda: TensorInput(name="a", datatype="FP32", shape=()),
        lambda: TensorInput(name="a", datatype="FP32", shape=(1, 2)),
        lambda: TensorInput(name="a", datatype="FP32", shape=(-1, -2)),
        lambda: TensorInput(name="a", datatype="FP32", shape=(-1, 2**30)),
        lambda: TensorInput(name="a", datatype="FP32", shape=(-1,) * 9),
        lambda: TensorSpec(inputs=(), outputs=(TensorOutput(name="o", datatype="FP32", shape=(-1,)),)),
        lambda: TensorSpec(inputs=tensored.MIRROR.inputs * 2, outputs=tensored.MIRROR.outputs),
        lambda: TensorInput(**IMAGE, image=ImageRules(layout="NHWC")),
        lambda: TensorInput(**IMAGE, image=ImageRules(layout="NCHW", mean=(0.5,))),
        lambda: TensorInput(**IMAGE, image=ImageRules(layout="NCHW", std=(1.0, 0.0, 1.0))),
        lambda: TensorInput(**IMAGE, image=ImageRules(layout="NCHW", scale=float("nan"))),
        lambda: TensorInput(**{**IMAGE, "datatype": "FP64"}, image=ImageRules(layout="NCHW")),
        lambda: TensorInput(**{**IMAGE, "datatype": "UINT8"}, image=ImageRules(layout="NCHW", scale=0.5)),
        lambda: TensorInput(**{**IMAGE, "shape": (-1, 3, -1, 4)}, image=ImageRules(layout="NCHW")),
    ],
)
def test_declarations_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(DataError) as caught:
        make()

    assert caught.value.code == "data.type"


@given(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=6, max_size=6), min_size=1, max_size=5))
def test_what_is_watched_of_a_tensor_is_its_mean_spread_and_ends(values: list[list[float]]) -> None:
    spec = TensorSpec(
        inputs=(TensorInput(name="a", datatype="FP32", shape=(-1, 2, 3)),),
        outputs=(TensorOutput(name="o", datatype="FP32", shape=(-1,)),),
    )
    data = np.array(values, dtype=np.float32)

    rows = spec.watched({"a": data.reshape(-1, 2, 3)}, {})

    wide = data.astype(np.float64)
    expected = np.stack([wide.mean(axis=1), wide.std(axis=1), wide.min(axis=1), wide.max(axis=1)], axis=1)
    assert rows.dtype == np.float32
    assert np.allclose(rows, expected, rtol=1e-4, atol=1e-1)
    assert spec.schema().names == ("a_mean", "a_std", "a_min", "a_max")
