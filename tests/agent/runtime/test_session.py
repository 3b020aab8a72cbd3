"""How a session is made: wishes, vetoes, and what is left when a wish can't be had.

The wheel that tests run on has one provider besides the CPU, Azure's; it stands in for hardware, under a name of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from tests.agent.conftest import training_rows

from lightship_agent.contract import manifest as contract
from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.manifest import Runtime
from lightship_agent.runtime import session as module
from lightship_agent.runtime.model import load_model
from lightship_agent.runtime.ort import onnxruntime
from lightship_agent.runtime.session import PROVIDERS, Allowed, plan_session

Bundles = Callable[..., Bundle]
OTHER = "AzureExecutionProvider"


def wishing(bundle: Bundle, *providers: str, **more: Any) -> Bundle:
    runtime = Runtime(providers=providers, **more)
    return msgspec.structs.replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, runtime=runtime))


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    """xnnpack is there."""
    if OTHER not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has no provider but the CPU")
    monkeypatch.setitem(PROVIDERS, "xnnpack", OTHER)


def test_both_programs_know_the_same_providers() -> None:
    assert set(PROVIDERS) == {*contract.PROVIDERS, "cpu"}


@pytest.mark.usefixtures("hardware")
def test_what_the_manifest_wishes_for_computes_where_it_is_there(open_bundle: Bundles) -> None:
    model = load_model(wishing(open_bundle(), "cuda", "xnnpack"))
    plain = load_model(open_bundle())
    assert (model.provider, plain.provider) == ("xnnpack", "cpu")
    assert model.notes == ("cuda: not in this onnxruntime",)
    assert not model.batches_exactly
    rows = training_rows(5)
    assert np.allclose(model.predict(rows).scores, plain.predict(rows).scores)  # type: ignore[arg-type]


@pytest.mark.usefixtures("hardware")
def test_a_device_may_veto_a_provider_and_threads(open_bundle: Bundles) -> None:
    bundle = wishing(open_bundle(), "xnnpack", intra_op_threads=64)
    model = load_model(bundle, allowed=Allowed(("cpu", "cuda"), threads=1))
    assert model.provider == "cpu"
    assert model.notes == ("xnnpack: not allowed on this device", "64 threads: 1 here")


@pytest.mark.usefixtures("hardware")
def test_a_provider_that_computes_something_else_gives_way_to_the_cpu(
    open_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(wishing(open_bundle(golden_shift=0.01), "xnnpack"))
    assert model.provider == "cpu"
    (note,) = model.notes
    assert note.startswith("xnnpack: Golden row 0: expected")


def test_a_provider_that_claims_to_be_there_and_is_not_gives_way_to_the_cpu(
    open_bundle: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module.onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"]
    )
    with pytest.warns(UserWarning, match="CUDAExecutionProvider"):  # of onnxruntime's own wrapper
        model = load_model(wishing(open_bundle(), "cuda"))
    assert model.provider == "cpu"
    (note,) = model.notes
    assert note.startswith("cuda: ")
    assert model.predict(training_rows(1)).labels is not None


def test_what_a_newer_control_plane_wishes_for_is_passed_over(open_bundle: Bundles) -> None:
    model = load_model(wishing(open_bundle(), "quantum", "/lib/evil.so", graph_optimization="wild"))
    assert model.provider == "cpu"
    assert model.notes == ("quantum: unknown to this agent", "/lib/evil.so: unknown to this agent")


def test_whoever_names_the_cpu_first_gets_it() -> None:
    plan = plan_session(Runtime(providers=("cpu", "cuda")), Allowed())
    assert (plan.providers, plan.notes) == ((), ())


@pytest.mark.parametrize("threads", [-3, 0, 1])
def test_there_is_always_one_thread(threads: int) -> None:
    assert plan_session(Runtime(intra_op_threads=threads), Allowed(threads=8)).threads == 1


@pytest.mark.parametrize("level", ["all", "extended", "basic", "none"])
def test_every_level_of_optimisation_answers_alike(open_bundle: Bundles, level: str) -> None:
    rows = training_rows(4)
    model = load_model(wishing(open_bundle(), graph_optimization=level))
    assert np.allclose(model.predict(rows).scores, load_model(open_bundle()).predict(rows).scores)  # type: ignore[arg-type]


def test_the_setting_says_what_it_was_made_of() -> None:
    for said, providers in (("any", None), ("cpu", ("cpu",)), (" cuda , xnnpack", ("cuda", "xnnpack")), ("", ())):
        assert Allowed.parse(said, 2) == Allowed(providers, 2)
        assert Allowed.parse(str(Allowed.parse(said, 2)), 2) == Allowed(providers, 2)
