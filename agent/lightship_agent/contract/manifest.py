"""Contract: the manifest inside every bundle.

Rules:
* it is the first member of the bundle, and names every other member with its sha256 and length;
* unknown fields are kept, so an old agent can store and pass on what a newer control plane wrote;
* `runtime` are wishes of how a session is made: a closed list of names and numbers, none of which can name a file or a
  library. A device takes what it has and allows; what it does not know it passes over;
* `requires` is checked by the rollout planner before download and by the agent again before trying.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from .codes import BundleError, DataError, InvalidNameError
from .names import check_name
from .schema import FeatureSchema, Outputs
from .tensors import TensorSpec
from .wire import canonical_json

MAX_MANIFEST: Final = 512 * 1024  # bytes


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the bundle."""

    sha256: str
    length: int


class Requires(msgspec.Struct, frozen=True, kw_only=True):
    """What a device must have to run the model."""

    min_agent: str = "0.1.0"
    min_onnxruntime: str = "1.27"
    ir_version: int = 8
    opset: int = 17
    ml_opset: int = 3
    ops: tuple[str, ...] = ()
    device_classes: tuple[str, ...] = ()  # empty: any
    memory_mb: int = 512  # address space of the probe process above its start
    latency_ms: float = 250.0  # p95 of one row on the device
    probe_seconds: int = 60  # wall time


#: What may compute instead of the CPU, by the names a manifest uses.
PROVIDERS: Final = ("acl", "armnn", "coreml", "cuda", "dnnl", "openvino", "qnn", "tensorrt", "xnnpack")
OPTIMIZATIONS: Final = ("all", "extended", "basic", "none")


class Runtime(msgspec.Struct, frozen=True, kw_only=True):
    """How a device shall make the session."""

    providers: tuple[str, ...] = ()  # of PROVIDERS, the best first; the CPU is what is left
    intra_op_threads: int = 1
    graph_optimization: str = "all"  # of OPTIMIZATIONS
    precision: str = "fp32"  # what the graph computes in: fp32, fp16 or int8


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model comes from."""

    dataset_digest: str
    recipe_digest: str = ""
    code_revision: str = ""
    environment_digest: str = ""
    seeds: tuple[int, ...] = ()
    run: str = ""
    parent: str = ""  # "name@version" of the champion it was trained to replace


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The parsed manifest; `extra` keeps fields this version does not know."""

    model: str
    version: int
    created: str  # RFC 3339, UTC; that of the run, so that the same inputs give the same bytes
    input_schema: FeatureSchema = msgspec.field(name="schema")
    outputs: Outputs
    requires: Requires
    runtime: Runtime = Runtime()
    provenance: Provenance
    members: dict[str, Member]
    contract: int = 1
    golden_tolerance: float = 1e-4
    metrics: dict[str, float] = {}
    importances: dict[str, float] = {}
    #: Of a model that takes tensors; its schema is then what is watched of them. Absent from older manifests.
    tensors: TensorSpec | msgspec.UnsetType = msgspec.UNSET
    extra: dict[str, Any] = {}

    def __post_init__(self) -> None:
        """Names and numbers are sane.

        Raises:
            InvalidNameError: name.invalid.
            DataError: data.type.
        """
        check_name("model name", self.model)
        if (self.outputs.task == "tensors") > bool(self.tensors):
            raise DataError("data.type", "A model of the task tensors declares them.")
        if self.tensors and self.input_schema.names != self.tensors.schema().names:
            raise DataError("data.type", "The schema is not what is watched of the declared tensors.")


_KNOWN: Final = frozenset(f.encode_name for f in msgspec.structs.fields(Manifest)) - {"extra"}


def manifest_bytes(manifest: Manifest) -> bytes:
    """Canonical JSON, unknown fields included at their place."""
    plain: dict[str, Any] = msgspec.to_builtins(manifest)
    extra = plain.pop("extra")
    return canonical_json({**extra, **plain})


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`.

    Raises:
        BundleError: bundle.too-large, bundle.manifest.
    """
    if len(data) > MAX_MANIFEST:
        raise BundleError("bundle.too-large", f"Manifest: expected at most {MAX_MANIFEST} bytes, found {len(data)}.")
    try:
        plain = msgspec.json.decode(data, type=dict[str, Any])
        known = {k: v for k, v in plain.items() if k in _KNOWN}
        known["extra"] = {k: v for k, v in plain.items() if k not in _KNOWN}
        manifest = msgspec.convert(known, Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, InvalidNameError, DataError) as e:
        raise BundleError("bundle.manifest", f"The manifest is malformed: {e}.") from e
    if manifest.version < 1 or manifest.contract < 1:
        raise BundleError("bundle.manifest", "Manifest: version and contract count from 1.")
    return manifest
