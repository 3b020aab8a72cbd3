"""A device refuses what it can't run, in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightship_agent.contract.bundle import Bundle
from lightship_agent.contract.codes import BundleError
from lightship_agent.contract.manifest import Manifest, Requires
from lightship_agent.runtime.compat import check_compatible, release_numbers


@pytest.fixture
def manifest(open_bundle: Callable[..., Bundle]) -> Manifest:
    return open_bundle().manifest


def check(manifest: Manifest, requires: Requires, **facts: Any) -> None:
    here: dict[str, Any] = {"agent_version": "0.2.0", "onnxruntime_version": "1.30.1", "device_class": "pi"} | facts
    check_compatible(msgspec.structs.replace(manifest, requires=requires), **here)


def test_a_device_that_has_everything_is_told_nothing(manifest: Manifest) -> None:
    check(manifest, Requires(min_agent="0.2", min_onnxruntime="1.30", device_classes=("jetson", "pi")))


@pytest.mark.parametrize(
    ("requires", "facts", "sentence"),
    [
        (Requires(min_agent="0.10.0"), {}, "needs agent 0.10.0 or newer; this device has 0.2.0"),
        (Requires(min_onnxruntime="1.31"), {}, "needs onnxruntime 1.31 or newer; this device has 1.30.1"),
        (Requires(device_classes=("jetson",)), {}, "for devices of class jetson; this device is of class pi"),
        (Requires(device_classes=("jetson",)), {"device_class": ""}, "this device is of no class"),
        (Requires(min_agent="soon"), {}, "Expected a version"),
        (Requires(probe_seconds=86_400), {}, "a trial of 86400 s; expected 1 to 600 s"),
        (Requires(probe_seconds=0), {}, "a trial of 0 s"),
        (
            Requires(memory_mb=4096),
            {"device_memory_mb": 1990.0},
            "4096 MB of memory; this device gives a trial 1 to 1990",
        ),
        (Requires(memory_mb=-1), {}, "asks for -1 MB of memory"),
    ],
)
def test_what_is_missing_is_named(manifest: Manifest, requires: Requires, facts: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BundleError, match=sentence) as refusal:
        check(manifest, requires, **facts)
    assert refusal.value.code == "bundle.incompatible"


def test_the_default_budget_fits_every_device(manifest: Manifest) -> None:
    check(manifest, Requires(), device_memory_mb=416.0)


def test_a_bundle_of_a_later_contract_asks_for_a_newer_agent(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="Upgrade the agent"):
        check(msgspec.structs.replace(manifest, contract=2), Requires())


@given(st.tuples(*[st.integers(0, 999)] * 3))
def test_versions_are_compared_as_numbers(numbers: tuple[int, int, int]) -> None:
    assert release_numbers(".".join(map(str, numbers)) + "rc1+cpu") == numbers
