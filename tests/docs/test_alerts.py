"""The operators' guide on alerts: its recipe checks real signatures, its kinds and settings are those of the code."""

from __future__ import annotations

import re
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from tests.docs.fences import ROOT, blocks

from lightship.alerting import signature
from lightship.alerting.decide import TOGETHER
from lightship.alerting.routes import parse
from lightship.settings import SETTINGS

GUIDE = ROOT / "docs" / "operators-guide.md"
BODY = b'{"id": "a.1"}'


@pytest.fixture
def is_genuine() -> Callable[[bytes, dict[str, str], bytes], bool]:
    (recipe,) = (b for b in blocks(GUIDE) if b.file == "verify.py")
    found: dict[str, Any] = {}
    exec(compile(recipe.body, "verify.py", "exec"), found)
    return cast("Callable[[bytes, dict[str, str], bytes], bool]", found["is_genuine"])


def test_the_recipe_takes_what_we_sign_and_nothing_that_was_changed_or_is_old(
    is_genuine: Callable[[bytes, dict[str, str], bytes], bool],
) -> None:
    now = int(time.time())
    headers = signature.headers(b"key", "a.1", BODY, now)

    assert is_genuine(b"key", headers, BODY)
    assert not is_genuine(b"key", headers, BODY + b" ")
    assert not is_genuine(b"other", headers, BODY)
    assert not is_genuine(b"key", {**headers, "webhook-id": "a.2"}, BODY)
    for moved in (now - 301, now + 303):
        assert not is_genuine(b"key", signature.headers(b"key", "a.1", BODY, moved), BODY)
        assert not is_genuine(b"key", {**headers, "webhook-timestamp": str(moved)}, BODY)


def test_we_sign_the_example_of_the_specification_as_it_does() -> None:
    key = signature.key_of(b"whsec_plJ3nmyCDGBKInavdOK15jsl")
    found = signature.headers(key, "msg_loFOjxBNrRLzqYUf", b'{"event_type":"ping","data":{"success":true}}', 1731705121)
    assert found["webhook-signature"] == "v1,rAvfW3dJ/X/qxhsaXPOyyCGmRKsaKWcsNccKXlIktD0="


def test_the_settings_of_the_example_are_settings() -> None:
    (example,) = (b for b in blocks(GUIDE) if b.language == "toml" and "alert_webhook_url" in b.body)
    values = tomllib.loads(example.body)
    assert set(values) <= {s.name for s in SETTINGS}
    assert len(parse(values["alert_routes"], ["webhook", "mail", "alertmanager"])) == 3


def test_every_kind_is_in_the_table() -> None:
    section = GUIDE.read_text().partition("\n## Alerts\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]+`) \|", section, flags=re.MULTILINE)
    named = set(re.findall(r"`([a-z-]+)`", " ".join(rows)))
    source = Path(signature.__file__).with_name("findings.py").read_text()
    kinds = set(re.findall(r'kind="([a-z-]+)"', source)) | set(TOGETHER)
    assert kinds <= named
