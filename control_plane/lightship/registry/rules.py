"""Registry: the pure rules, may this version move?

    registered ──release──▶ released ──revoke──▶ revoked

Rules: a version is registered only past its gates, or past a failed metric gate by force with a reason; parity is
never forced, because a model that computes something else on the device is another model; what is revoked stays so.
"""

from __future__ import annotations

from typing import Literal

from lightship_agent.contract.codes import GateError, RegistryError

State = Literal["registered", "released", "revoked"]
MIN_REASON = 10  # characters


def may_register(
    *,
    gate_passed: bool,
    parity_passed: bool,
    force_reason: str | None,
    failed: str,
    code: Literal["gate.metric", "gate.champion"] = "gate.metric",
) -> None:
    """Whether a run's model may become a version.

    Args:
        gate_passed: the metric gate's decision.
        parity_passed: whether ONNX agreed with the original.
        force_reason: why the operator overrides the metric gate, or None.
        failed: the gate's own words on what failed.
        code: gate.champion when nothing but the comparison with the champion failed.

    Raises:
        GateError: gate.metric, gate.champion, gate.reason-required.
    """
    if not parity_passed:
        raise GateError("gate.metric", "The ONNX model does not agree with the original; this can't be forced.")
    if gate_passed:
        return
    if force_reason is None:
        raise GateError(code, failed, remedy="Improve the model, or force it with --force-reason.")
    if len(force_reason.strip()) < MIN_REASON:
        raise GateError(
            "gate.reason-required", f"A reason of at least {MIN_REASON} characters is expected; it is audited."
        )


def next_state(state: State, act: Literal["release", "revoke"]) -> State:
    """The state after `act`.

    Raises:
        RegistryError: registry.state.
    """
    if act == "release" and state in ("registered", "released"):
        return "released"
    if act == "revoke" and state == "released":
        return "revoked"
    raise RegistryError("registry.state", f"A version that is {state} can't be {act}d.")


def may_alias(state: State, alias: str) -> None:
    """Whether `alias` may point to a version in `state`.

    Raises:
        RegistryError: registry.state.
    """
    if state == "revoked":
        raise RegistryError("registry.state", f"A revoked version can't be {alias!r}.")
    if alias == "champion" and state != "released":
        message = "Only a released version can be champion."
        raise RegistryError("registry.state", message, remedy="Run `lightship release` first.")
