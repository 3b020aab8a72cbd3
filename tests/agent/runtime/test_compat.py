"""A device refuses what it can't run, in a sentence."""

from __future__ import annotations

from collections.abc import Callable

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


def check(manifest: Manifest, requires: Requires, **facts: str) -> None:
    here = {"agent_version": "0.2.0", "onnxruntime_version": "1.30.1", "device_class": "pi"} | facts
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
    ],
)
def test_what_is_missing_is_named(manifest: Manifest, requires: Requires, facts: dict[str, str], sentence: str) -> None:
    with pytest.raises(BundleError, match=sentence) as refusal:
        check(manifest, requires, **facts)
    assert refusal.value.code == "bundle.incompatible"


def test_a_bundle_of_a_later_contract_asks_for_a_newer_agent(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="Upgrade the agent"):
        check(msgspec.structs.replace(manifest, contract=2), Requires())


@given(st.tuples(*[st.integers(0, 999)] * 3))
def test_versions_are_compared_as_numbers(numbers: tuple[int, int, int]) -> None:
    assert release_numbers(".".join(map(str, numbers)) + "rc1+cpu") == numbers
