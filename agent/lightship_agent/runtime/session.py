"""Runtime: how a session is made: what a manifest wishes for, what a device allows, and what this onnxruntime has.

Rules:
* wishes are names from a closed list; no option of a provider is passed on, for options name files and libraries;
* whatever is not there, not allowed or does not work is passed over with a word, and the CPU computes;
* onnxruntime itself falls back without a word where a provider's library can't be loaded: what a session says it runs
  on is what counts;
* threads never spin: an idle agent is idle;
* errors of onnxruntime stop at this file.
"""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec

from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.manifest import Runtime

from .ort import onnxruntime

CPU: Final = "cpu"
#: onnxruntime's names, by ours.
PROVIDERS: Final[dict[str, str]] = {
    CPU: "CPUExecutionProvider",
    "acl": "ACLExecutionProvider",
    "armnn": "ArmNNExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dnnl": "DnnlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    "qnn": "QNNExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "xnnpack": "XnnpackExecutionProvider",
}
_FATAL_ONLY: Final = 4  # onnxruntime's log level: we report its exceptions, it need not write to stderr as well


class Allowed(msgspec.Struct, frozen=True):
    """What a device allows. `providers` None: whatever there is; `threads` 0: as many as it has processors."""

    providers: tuple[str, ...] | None = None
    threads: int = 0

    @classmethod
    def parse(cls, providers: str, threads: int) -> Allowed:
        """Of two settings: "any", or names separated by commas, and a number."""
        names = tuple(name.strip() for name in providers.split(",") if name.strip())
        return cls(None if "any" in names else names, threads)

    def __str__(self) -> str:
        """The first setting again."""
        return "any" if self.providers is None else ",".join(self.providers)


class Plan(msgspec.Struct, frozen=True):
    """What to try, in order; the CPU is not among it."""

    providers: tuple[str, ...]
    threads: int
    optimization: str
    notes: tuple[str, ...]


def plan_session(runtime: Runtime, allowed: Allowed) -> Plan:
    """What of a manifest's wishes can be tried here, and a word on each that can't."""
    there = onnxruntime.get_available_providers()
    providers, notes = [], []
    for name in runtime.providers:
        if name == CPU:
            break
        if name not in PROVIDERS:
            notes.append(f"{name[:40]}: unknown to this agent")
        elif allowed.providers is not None and name not in allowed.providers:
            notes.append(f"{name}: not allowed on this device")
        elif PROVIDERS[name] not in there:
            notes.append(f"{name}: not in this onnxruntime")
        else:
            providers.append(name)
    most = min(allowed.threads or (os.cpu_count() or 1), os.cpu_count() or 1)
    threads = max(1, min(runtime.intra_op_threads, most))
    if threads < runtime.intra_op_threads:
        notes.append(f"{runtime.intra_op_threads} threads: {threads} here")
    return Plan(tuple(providers), threads, runtime.graph_optimization, tuple(notes))


def open_session(model: bytes, name: str, provider: str, plan: Plan) -> Any:
    """An onnxruntime session on `provider`.

    Raises:
        BundleError: bundle.incompatible.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = plan.threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = _level(plan.optimization)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = _FATAL_ONLY
    wanted = PROVIDERS[provider]
    try:
        session = onnxruntime.InferenceSession(model, options, providers=list(dict.fromkeys((wanted, PROVIDERS[CPU]))))
    except Exception as e:  # onnxruntime's exceptions share no base class
        message = f"onnxruntime {onnxruntime.__version__} can't load {name}: {e}"
        raise BundleError("bundle.incompatible", message) from e
    found = session.get_providers()
    if found[:1] != [wanted]:
        message = f"onnxruntime {onnxruntime.__version__} runs {name} on {', '.join(found)}, not on {wanted}"
        raise BundleError("bundle.incompatible", message)
    _forget_bytes(session)
    return session


def _forget_bytes(session: Any) -> None:
    """Let go of the graph's bytes, which onnxruntime's Python class keeps for a fallback that is not wanted here.

    For a forest they are a third of what the session costs.
    """
    session.disable_fallback()
    if hasattr(session, "_model_bytes"):
        session._model_bytes = None  # noqa: SLF001 - there is no public way, and nothing reads it without the fallback


def _level(name: str) -> Any:
    levels = onnxruntime.GraphOptimizationLevel
    known = {"extended": levels.ORT_ENABLE_EXTENDED, "basic": levels.ORT_ENABLE_BASIC, "none": levels.ORT_DISABLE_ALL}
    return known.get(name, levels.ORT_ENABLE_ALL)
