"""Bundles that nobody's tool would build: every byte put there by hand."""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Callable
from typing import Any, Final

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.agent.conftest import FEATURES, build, pack_bundle, training_rows
from tests.agent.runtime.graphs import grinding, hungry, looping

from lightship_agent.contract.bundle import GOLDEN, MANIFEST, MODEL, PROFILE, Golden, Rows, read_members
from lightship_agent.contract.manifest import Requires
from lightship_agent.contract.profile import ReferenceProfile, profile_features
from lightship_agent.contract.schema import Outputs
from lightship_agent.contract.wire import encode, sha256_hex

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
FLOAT: Final = TensorProto.FLOAT


# Archives -------------------------------------------------------------------------------------------------------------


def header(name: bytes, length: int, **fields: bytes) -> bytes:
    """A ustar header with a right checksum, whatever else is in it."""
    plain = {
        "name": name, "mode": b"0000644\0", "uid": b"0000000\0", "gid": b"0000000\0", "size": b"%011o\0" % length,
        "mtime": b"%011o\0" % 0, "check": b" " * 8, "kind": b"0", "link": b"", "magic": b"ustar\0", "version": b"00",
        "user": b"", "group": b"", "major": b"0000000\0", "minor": b"0000000\0", "prefix": b"", "rest": b"",
    }  # fmt: skip
    widths = (100, 8, 8, 8, 12, 12, 8, 1, 100, 6, 2, 32, 32, 8, 8, 155, 12)
    values = {**plain, **fields}.values()
    block = b"".join(value.ljust(width, b"\0")[:width] for value, width in zip(values, widths, strict=True))
    check = fields.get("check", b"%06o\0 " % sum(block))
    return block[:148] + check + block[156:]


def member(name: bytes, body: bytes, **fields: bytes) -> bytes:
    return header(name, len(body), **fields) + body + bytes(-len(body) % BLOCK)


@functools.cache
def members(version: int = 2) -> dict[str, bytes]:
    """The members of a genuine bundle, by name, manifest first."""
    return read_members(build(version, flip=True))


def archive(*parts: bytes, end: bytes = END) -> bytes:
    return b"".join(parts) + end


def genuine(*but: str) -> list[bytes]:
    """Genuine members in their order, without some."""
    return [member(name.encode(), body) for name, body in members().items() if name not in but]


def with_first(part: bytes) -> bytes:
    """Something before the manifest of a genuine bundle."""
    return archive(part, *genuine())


def with_last(part: bytes) -> bytes:
    """Something after all of a genuine bundle's members."""
    return archive(*genuine(), part)


def by_tarfile(form: int, names: dict[str, bytes], **pax: str) -> bytes:
    """What Python's own archiver writes, which extends ustar where it likes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, body in names.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            info.pax_headers = dict(pax)
            tar.addfile(info, io.BytesIO(body))
    return out.getvalue()


KINDS: Final = {
    "hard link": b"1", "symbolic link": b"2", "character device": b"3", "block device": b"4", "folder": b"5",
    "named pipe": b"6", "contiguous file": b"7", "GNU sparse file": b"S", "file of old": b"\0",
}  # fmt: skip


def of_kind(kind: bytes) -> bytes:
    """A genuine bundle whose model is no file, and points at one."""
    return archive(*genuine(MODEL), header(MODEL.encode(), 0, kind=kind, link=b"/etc/shadow"))


# Manifests ------------------------------------------------------------------------------------------------------------


def with_manifest(manifest: bytes) -> bytes:
    """A genuine bundle with other bytes for a manifest."""
    return archive(member(MANIFEST.encode(), manifest), *genuine(MANIFEST))


def manifest(**changes: Any) -> bytes:
    """A genuine bundle whose manifest says something else; a value of None takes a field out."""
    plain = {**json.loads(members()[MANIFEST]), **changes}
    return with_manifest(json.dumps({k: v for k, v in plain.items() if v is not None}).encode())


def requiring(**changes: Any) -> bytes:
    return manifest(requires={**json.loads(members()[MANIFEST])["requires"], **changes})


def with_member(name: str, body: bytes) -> bytes:
    """A genuine bundle with another member that the manifest duly lists."""
    plain = json.loads(members()[MANIFEST])
    plain["members"][name] = {"sha256": sha256_hex(body), "length": len(body)}
    parts = {**members(), MANIFEST: json.dumps(plain).encode(), name: body}
    return archive(*(member(n.encode(), b) for n, b in parts.items()))


# Models ---------------------------------------------------------------------------------------------------------------


def with_model(onnx_bytes: bytes, **requires: Any) -> bytes:
    """A regressor around any bytes."""
    rows = training_rows(8)
    return pack_bundle(
        onnx_bytes,
        Outputs(task="regression", value_output="value"),
        Golden(inputs=Rows.of(rows), values=Rows.of(rows[:, :1])),
        ReferenceProfile(rows=8, features=profile_features(rows, FEATURES)),
        version=2,
        requires=Requires(**requires),
    )


def graph(nodes: list[Any], *constants: Any, opsets: tuple[tuple[str, int], ...] = ()) -> bytes:
    """A model from features to value."""
    made = helper.make_graph(
        nodes,
        "hostile",
        [helper.make_tensor_value_info("features", FLOAT, [None, 4])],
        [helper.make_tensor_value_info("value", FLOAT, [None, 1])],
        list(constants),
    )
    imports = [helper.make_opsetid(d, v) for d, v in (("", 17), ("ai.onnx.ml", 3), *opsets)]
    return bytes(helper.make_model(made, opset_imports=imports, ir_version=8).SerializeToString())


def linear(*constants: Any, **changes: Any) -> bytes:
    """features @ w, with other constants, or another `w`."""
    weights = changes.get("w", numpy_helper.from_array(np.ones((4, 1), np.float32), "w"))
    return graph([helper.make_node("MatMul", ["features", "w"], ["value"])], weights, *constants)


def external(location: str) -> bytes:
    weights = numpy_helper.from_array(np.ones((4, 1), np.float32), "w")
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        weights.external_data.add(key=key, value=value)
    return linear(w=weights)


def giant() -> bytes:
    weights = numpy_helper.from_array(np.ones((4, 1), np.float32), "w")
    weights.dims[0] = 1 << 40
    return linear(w=weights)


def branching() -> bytes:
    bodies = [
        helper.make_graph(
            [helper.make_node("Identity", ["start"], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, FLOAT, [None, 1])],
        )
        for name in ("yes", "no")
    ]
    return graph(
        [
            helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
            helper.make_node("If", ["on"], ["value"], then_branch=bodies[0], else_branch=bodies[1]),
        ],
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array(True), "on"),
    )


def operator(name: str, domain: str, **attributes: Any) -> bytes:
    node = helper.make_node(name, ["features", "w"], ["value"], domain=domain, **attributes)
    weights = numpy_helper.from_array(np.ones((4, 1), np.float32), "w")
    return graph([node], weights, opsets=((domain, 1),) if domain else ())


def function() -> bytes:
    made = onnx.load_model_from_string(operator("Twice", "acme"))
    made.functions.append(
        helper.make_function(
            "acme", "Twice", ["a", "b"], ["c"], [helper.make_node("MatMul", ["a", "b"], ["c"])],
            [helper.make_opsetid("", 17)],
        )
    )  # fmt: skip
    return bytes(made.SerializeToString())


def tree(**lists: list[int]) -> bytes:
    """A tree that splits once, or worse."""
    plain = {
        "nodes_treeids": [0, 0, 0], "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0, 0, 0],
        "nodes_truenodeids": [1, 0, 0], "nodes_falsenodeids": [2, 0, 0], "target_ids": [0, 0],
        "target_nodeids": [1, 2], "target_treeids": [0, 0],
    }  # fmt: skip
    node = helper.make_node(
        "TreeEnsembleRegressor", ["features"], ["value"], domain="ai.onnx.ml",
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"], nodes_values=[0.5, 0.0, 0.0], target_weights=[1.0, 2.0],
        n_targets=1, **{**plain, **lists},
    )  # fmt: skip
    return graph([node])


def ballooning(elements: int) -> bytes:
    """A few bytes that ask for `elements` floats."""
    return graph(
        [
            helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
            helper.make_node("ConstantOfShape", ["size"], ["much"]),
            helper.make_node("ReduceMax", ["much"], ["most"], keepdims=0),
            helper.make_node("Add", ["start", "most"], ["value"]),
        ],
        numpy_helper.from_array(np.array([1], np.int64), "axis"),
        numpy_helper.from_array(np.array([elements], np.int64), "size"),
    )


def sparse() -> bytes:
    made = onnx.load_model_from_string(linear())
    made.graph.sparse_initializer.append(
        helper.make_sparse_tensor(
            numpy_helper.from_array(np.ones(1, np.float32), "much"),
            numpy_helper.from_array(np.zeros(1, np.int64), "at"),
            [1 << 20, 1 << 20],
        )
    )
    return bytes(made.SerializeToString())


def golden(**changes: Any) -> bytes:
    rows = training_rows(8)
    plain = {
        "inputs": {"rows": 8, "width": 4, "data": rows.tobytes()},
        "values": {"rows": 8, "width": 2, "data": bytes(64)},
        "labels": [0] * 8,
    }
    return with_member(GOLDEN, encode({**plain, **changes}))


Make = Callable[[], bytes]
_GENUINE_MODEL: Final[Make] = lambda: members()[MODEL]  # noqa: E731 - a value that is made late

#: What is refused while it is unpacked: it never gets a name in the store.
UNPACKED: Final[dict[str, tuple[Make, str]]] = {
    # names
    "a name that climbs": (lambda: with_first(member(b"../../etc/cron.d/job", b"* * *")), "bundle.malformed"),
    "a name from the root": (lambda: with_first(member(b"/etc/passwd", b"root::0:0")), "bundle.malformed"),
    "a name through a member": (lambda: with_last(member(b"model.onnx/../../x", b"x")), "bundle.malformed"),
    "a name in a folder": (lambda: with_last(member(b"lib/evil.so", b"\x7fELF")), "bundle.malformed"),
    "a dot before the name": (lambda: archive(member(b"./manifest.json", b"{}"), *genuine()), "bundle.malformed"),
    "a prefix that climbs": (
        lambda: archive(member(MANIFEST.encode(), members()[MANIFEST], prefix=b"../.."), *genuine(MANIFEST)),
        "bundle.malformed",
    ),
    "a name with a zero in it": (lambda: with_first(member(b"manifest.json\0/../x", b"{}")), "bundle.malformed"),
    "a name of other letters": (lambda: with_first(member("manifest․json".encode(), b"{}")), "bundle.malformed"),
    "no name": (lambda: with_first(member(b"", b"x")), "bundle.malformed"),
    # kinds
    **{f"a {what} for a model": (functools.partial(of_kind, kind), "bundle.malformed") for what, kind in KINDS.items()},
    "a link before the file it hides": (
        lambda: with_first(header(b"card.md", 0, kind=b"2", link=b"../../update.json")),
        "bundle.malformed",
    ),
    # extensions
    "a GNU long name": (
        lambda: by_tarfile(tarfile.GNU_FORMAT, {"a/" * 80 + "x": b"", **members()}),
        "bundle.malformed",
    ),
    "an extended header that renames": (
        lambda: by_tarfile(tarfile.PAX_FORMAT, members(), path="../../x"),
        "bundle.malformed",
    ),
    "an extended header that resizes": (
        lambda: by_tarfile(tarfile.PAX_FORMAT, members(), size="0"),
        "bundle.malformed",
    ),
    "a global header": (lambda: with_first(member(b"pax", b"16 path=../../x\n", kind=b"g")), "bundle.malformed"),
    # counts and order
    "the model twice": (lambda: with_last(member(MODEL.encode(), members()[MODEL])), "bundle.malformed"),
    "two manifests": (lambda: with_first(member(MANIFEST.encode(), b"{}")), "bundle.malformed"),
    "the manifest last": (
        lambda: archive(*genuine(MANIFEST), member(MANIFEST.encode(), members()[MANIFEST])),
        "bundle.malformed",
    ),
    "twenty thousand members": (
        lambda: archive(*(header(b"f%d" % n, 0) for n in range(20_000)), *genuine()),
        "bundle.malformed",
    ),
    "no manifest": (lambda: archive(*genuine(MANIFEST)), "bundle.malformed"),
    "no golden rows": (lambda: archive(*genuine(GOLDEN)), "bundle.malformed"),
    "a member that the manifest does not list": (lambda: with_last(member(b"card.md", b"# hello")), "bundle.manifest"),
    # sizes
    "a member longer than the archive": (
        lambda: archive(*genuine(MODEL), header(MODEL.encode(), 1 << 20)),
        "bundle.malformed",
    ),
    "a member longer than it may be": (
        lambda: archive(header(MANIFEST.encode(), 600 << 10), bytes(600 << 10)),
        "bundle.too-large",
    ),
    "a length below zero": (
        lambda: archive(*genuine(MODEL), header(MODEL.encode(), 0, size=b"\xff" * 12)),
        "bundle.malformed",
    ),
    "a length in base 256": (
        lambda: archive(*genuine(MODEL), header(MODEL.encode(), 0, size=b"\x80" + bytes(10) + b"\x01")),
        "bundle.malformed",
    ),
    "a length with a sign": (
        lambda: archive(*genuine(MODEL), header(MODEL.encode(), 0, size=b"-0000000001\0")),
        "bundle.malformed",
    ),
    "an archive cut in a header": (lambda: build(2)[:200], "bundle.malformed"),
    "an archive cut in a member": (lambda: build(2)[: 3 * BLOCK + 7], "bundle.malformed"),
    "an archive without an end": (lambda: build(2)[: -2 * BLOCK], "bundle.malformed"),
    "something after the end": (lambda: build(2) + b"#!/bin/sh\n".ljust(BLOCK, b"\0"), "bundle.malformed"),
    "something in the padding": (
        lambda: archive(*genuine(), member(b"card.md", b"x")[:-1] + b"!"),
        "bundle.malformed",
    ),
    "nothing at all": (lambda: b"", "bundle.malformed"),
    # what a header says besides
    "a set-user-id bit": (
        lambda: archive(member(MANIFEST.encode(), members()[MANIFEST], mode=b"0004755\0"), *genuine(MANIFEST)),
        "bundle.malformed",
    ),
    "an owner": (
        lambda: archive(member(MANIFEST.encode(), members()[MANIFEST], user=b"root"), *genuine(MANIFEST)),
        "bundle.malformed",
    ),
    "a wrong checksum": (
        lambda: archive(member(MANIFEST.encode(), members()[MANIFEST], check=b"000000\0 "), *genuine(MANIFEST)),
        "bundle.malformed",
    ),
    # manifests
    "a deep manifest": (lambda: with_manifest(b'{"a":' * 60_000 + b"1" + b"}" * 60_000), "bundle.manifest"),
    "a deeper manifest": (lambda: with_manifest(b"[" * 500_000), "bundle.manifest"),
    "a manifest deep where nobody looks": (
        lambda: with_manifest(members()[MANIFEST][:-1] + b',"later":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
        "bundle.manifest",
    ),
    "a wide manifest": (
        lambda: manifest(members={f"m{n}": {"sha256": "0" * 64, "length": 1} for n in range(4_000)}),
        "bundle.manifest",
    ),
    "a manifest with a number of ten thousand digits": (
        lambda: with_manifest(members()[MANIFEST].replace(b'"version":2', b'"version":' + b"9" * 10_000)),
        "bundle.manifest",
    ),
    "a manifest that is not a number": (
        lambda: with_manifest(members()[MANIFEST].replace(b'"golden_tolerance":0.0001', b'"golden_tolerance":NaN')),
        "bundle.manifest",
    ),
    "a manifest of another alphabet": (lambda: with_manifest(b'{"model":"\xff\xfe"}'), "bundle.manifest"),
    "a manifest that is a list": (lambda: with_manifest(b"[]"), "bundle.manifest"),
    "a manifest with a climbing model name": (lambda: manifest(model="../../pump"), "bundle.manifest"),
    "a manifest of version nought": (lambda: manifest(version=0), "bundle.manifest"),
    "a manifest that vouches for other bytes": (
        lambda: manifest(members={n: {"sha256": "0" * 64, "length": len(b)} for n, b in list(members().items())[1:]}),
        "bundle.digest",
    ),
    "a manifest without members": (lambda: manifest(members={}), "bundle.manifest"),
    "a manifest that lists what is above": (
        lambda: manifest(members={"../update.json": {"sha256": "0" * 64, "length": 1}}),
        "bundle.manifest",
    ),
    # other members
    "golden rows that claim more than they bring": (
        lambda: golden(inputs={"rows": 1 << 60, "width": 4, "data": b""}),
        "bundle.malformed",
    ),
    "fewer than no golden rows": (
        lambda: golden(inputs={"rows": -8, "width": -4, "data": training_rows(8).tobytes()}),
        "bundle.malformed",
    ),
    "golden rows of another width": (
        lambda: golden(inputs={"rows": 4, "width": 8, "data": bytes(128)}),
        "bundle.manifest",
    ),
    "deep golden rows": (lambda: with_member(GOLDEN, b"\x91" * 100_000), "bundle.malformed"),
    "golden rows as a pickle": (lambda: with_member(GOLDEN, b"\x80\x04cposix\nsystem\n."), "bundle.malformed"),
    "a profile of other features": (
        lambda: with_member(PROFILE, encode(ReferenceProfile(rows=1, features=()))),
        "bundle.manifest",
    ),
    "a profile that claims a list of four thousand million": (
        lambda: with_member(PROFILE, b"\x82\xa4rows\x01\xa8features\xdd\xff\xff\xff\xff"),
        "bundle.malformed",
    ),
    "a card of other letters": (lambda: with_member("card.md", b"\xff\xfe\x00"), "bundle.malformed"),
}

#: What is refused by a look at the graph, before onnxruntime sees it.
LOOKED_THROUGH: Final[dict[str, Make]] = {
    "a loop without an end": lambda: with_model(looping()),
    "a branch": lambda: with_model(branching()),
    "an operator of a foreign domain": lambda: with_model(operator("Backdoor", "acme")),
    "an operator of the runtime's own": lambda: with_model(operator("FusedMatMul", "com.microsoft")),
    "a context that names a library": lambda: with_model(
        operator("EPContext", "com.microsoft", ep_cache_context="/tmp/evil.so", embed_mode=0)
    ),
    "an operator that draws lots": lambda: with_model(
        graph([helper.make_node("RandomNormalLike", ["features"], ["value"])])
    ),
    "a function of its own": lambda: with_model(function()),
    "weights in a file above": lambda: with_model(external("../../identity/device.key")),
    "weights in a file from the root": lambda: with_model(external("/etc/shadow")),
    "weights in this process": lambda: with_model(external("/proc/self/environ")),
    "a tree with a negative feature": lambda: with_model(tree(nodes_featureids=[-1, 0, 0])),
    "a tree with a negative child": lambda: with_model(tree(nodes_truenodeids=[-7, 0, 0])),
    "a giant of a constant": lambda: with_model(giant()),
    "a giant of a sparse constant": lambda: with_model(sparse()),
    "a graph that is cut off": lambda: with_model(linear()[:-20]),
    "a graph that is two": lambda: with_model(linear() + looping()),
    "a pickle for a model": lambda: with_model(b"\x80\x04\x95\x1b\x00\x00\x00\x00\x00\x00\x00cposix\nsystem\n."),
    "a library for a model": lambda: with_model(b"\x7fELF\x02\x01\x01" + bytes(500)),
}

#: What only a trial brings to light.
TRIED: Final[dict[str, tuple[Make, str]]] = {
    "a shape that asks for 32 GB": (lambda: with_model(ballooning(1 << 33)), "update.budget"),
    "a shape that asks for a little more than its budget": (
        lambda: with_model(ballooning(1 << 26), memory_mb=128),
        "update.budget",
    ),
    "an expansion beyond the budget": (lambda: with_model(hungry(512), memory_mb=128), "update.budget"),
    "plain operators without an end": (lambda: with_model(grinding(), probe_seconds=2), "update.probe-timeout"),
    "a tree with a feature that is not there": (
        lambda: with_model(tree(nodes_featureids=[1_000_000, 0, 0])),
        "update.probe-failed",
    ),
    "a tree that is its own child": (lambda: with_model(tree(nodes_truenodeids=[0, 0, 0])), "update.probe-failed"),
    "a tree whose child is nowhere": (lambda: with_model(tree(nodes_truenodeids=[900, 0, 0])), "update.probe-failed"),
    "a graph with other ends than the manifest says": (
        lambda: with_model(_GENUINE_MODEL()),
        "update.probe-failed",
    ),
    "a graph that answers nonsense": (
        lambda: with_model(
            graph(
                [
                    helper.make_node("ReduceSum", ["features", "axis"], ["start"], keepdims=1),
                    helper.make_node("Div", ["start", "none"], ["value"]),
                ],
                numpy_helper.from_array(np.array([1], np.int64), "axis"),
                numpy_helper.from_array(np.array([0], np.float32), "none"),
            )
        ),
        "update.golden",
    ),
    "golden rows that lie": (lambda: build(2, golden_shift=0.25), "update.golden"),
    "a trial of a year": (lambda: requiring(probe_seconds=31_536_000), "bundle.incompatible"),
    "a trial without a limit": (lambda: requiring(probe_seconds=0), "bundle.incompatible"),
    "less than no memory": (lambda: requiring(memory_mb=-1), "bundle.incompatible"),
    "a contract of the future": (lambda: manifest(contract=99), "bundle.incompatible"),
    "a runtime of the future": (lambda: requiring(min_onnxruntime="99"), "bundle.incompatible"),
    "a manifest of another model": (lambda: manifest(model="valve"), "update.swap"),
    "a manifest of another version": (lambda: manifest(version=3), "update.swap"),
}
