"""Every fuzz target, briefly: foreign bytes end in a value or in one of the errors that were promised."""

from __future__ import annotations

import base64
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

import reliability_page
from fuzz.__main__ import section
from fuzz.mutate import MAX_GROWTH, Mutator
from fuzz.play import Result, play
from fuzz.targets import TARGETS, Target, plain
from lightship_agent.contract.codes import LightshipError, WireError

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.name.replace(" ", "-"))
def test_foreign_bytes_are_refused_as_promised(target: Target) -> None:
    result = play(target, seconds=20, most=300, seed=20261125)

    assert result.failures == []
    assert result.executions >= 50
    assert result.accepted + sum(result.refused.values()) == result.executions


def _of_no_known_version(pem: bytes) -> bytes:
    """The certificate, whose version is 34."""
    der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
    odd = der.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x22", 1)
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(odd) + b"-----END CERTIFICATE-----\n"


@pytest.mark.parametrize(
    ("name", "found", "code"),
    [
        ("enrolment answer", lambda _: b'{"chain":"\xff"}', "link.status"),
        ("answer of the control plane", lambda _: b'{"code":"\xff","error":"no"}', None),
        ("CA certificate", _of_no_known_version, "enrol.pin"),
    ],
)
def test_what_a_run_once_found_stays_found(name: str, found: Callable[[bytes], bytes], code: str | None) -> None:
    target = next(t for t in TARGETS if t.name == name)
    with target.open() as (seeds, run):
        data = found(seeds[0])
        if code is None:
            run(data)
        else:
            with pytest.raises(LightshipError) as refusal:
                run(data)
            assert refusal.value.code == code


def _explodes(data: bytes) -> None:
    if data != b'{"a":1}':
        raise ValueError("nobody foresaw this")


def _has_another_code(data: bytes) -> None:
    if data != b'{"a":1}':
        raise WireError("wire.malformed", "no")


@pytest.mark.parametrize(("parser", "words"), [(_explodes, "ValueError"), (_has_another_code, "wire.malformed")])
def test_what_was_not_promised_is_a_failure_whose_input_is_kept(tmp_path: Path, parser: object, words: str) -> None:
    bad = Target("bad one", "nowhere", ("bundle.",), partial(plain, lambda: [b'{"a":1}'], parser))  # type: ignore[arg-type]

    result = play(bad, seconds=5, most=200, seed=1, keep=tmp_path)

    assert result.failures
    assert all(words in f for f in result.failures)
    assert len(list(tmp_path.iterdir())) > 1
    told = section([Result(target=TARGETS[0].name, seed=1, failures=result.failures)], 1.0)
    assert f"{len(result.failures)} failures" in told


def test_an_input_is_known_by_its_seed_and_its_number() -> None:
    first, second, other = (Mutator(seed, [b'{"a":[1,2,{"b":"c"}]}', b"bytes"]) for seed in (7, 7, 8))

    inputs = [first.next() for _ in range(200)]

    assert inputs == [second.next() for _ in range(200)]
    assert inputs != [other.next() for _ in range(200)]
    assert len(set(inputs)) > 100


def test_inputs_do_not_grow_without_end() -> None:
    seed = random.Random(1).randbytes(1_000)
    mutator = Mutator(3, [seed])

    assert max(len(mutator.next()) for _ in range(2_000)) < 10 * MAX_GROWTH


def test_the_page_has_every_target_and_no_failure() -> None:
    part = PAGE.partition("<!-- fuzz: generated -->")[2].partition("<!-- fuzz: end -->")[0]
    rows = [line.split(" | ") for line in part.splitlines() if line.startswith("| ")][2:]

    assert [row[0].removeprefix("| ") for row in rows] == [t.name for t in TARGETS]
    assert {row[-1].removesuffix(" |") for row in rows} == {"0"}
    assert sum(int(row[3].replace(",", "")) for row in rows) >= 200_000


def test_a_section_is_replaced_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "before\n<!-- x: generated -->\nold\n<!-- x: end -->\nafter\n<!-- y: generated -->\n<!-- y: end -->\n"
    )

    reliability_page.put("x", "new", page)
    reliability_page.put("y", reliability_page.table(("a", "b"), [("1|2", "3")]), page)

    assert page.read_text() == (
        "before\n<!-- x: generated -->\n\nnew\n\n<!-- x: end -->\nafter\n"
        "<!-- y: generated -->\n\n| a | b |\n| --- | --- |\n| 1\\|2 | 3 |\n\n<!-- y: end -->\n"
    )
    with pytest.raises(ValueError, match="no section 'z'"):
        reliability_page.put("z", "new", page)
