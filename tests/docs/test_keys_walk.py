"""The operator's guide walks through the keys: its commands are typed, in order, and answer as it says."""

from __future__ import annotations

import re
from contextlib import closing
from pathlib import Path

import pytest
from tests.control_plane.things import register
from tests.docs.fences import ROOT, blocks
from tests.docs.test_tutorial import Reader

from lightship.home import Home

GUIDE = ROOT / "docs" / "operators-guide.md"


@pytest.mark.slow
def test_the_walk_through_the_keys_works_word_for_word(tmp_path: Path) -> None:
    (section,) = re.findall(r"^## Keys\n.*?(?=^## )", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    page = tmp_path / "section.md"
    page.write_text(section)
    reader = Reader(tmp_path)
    for block in blocks(page):
        if "lightship release pump@1" in block.body:
            with closing(Home.open(tmp_path / "server")) as home:
                register(home, 1, released=False)
        reader.follow(block)
    assert reader.stop() == []

    with closing(Home.open(tmp_path / "server")) as home:
        assert [r.path for r in home.releases.released()] == ["bundles/pump/1.tar"]
        assert {h.role for h in home.keys.held()} == {"snapshot", "timestamp", "director"}
        assert (home.releases.version("root"), home.releases.version("releases")) == (3, 3)
