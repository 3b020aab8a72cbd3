"""The docs say what the code does: generated pages are fresh, links lead somewhere, commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tests.docs.fences import ROOT, blocks, pages

from docs_reference import commands
from docs_reference.__main__ import FOLDER, main, stale_pages
from lightship.settings import SETTINGS
from lightship_agent.contract.codes import CODES
from lightship_agent.settings import SETTINGS as AGENT_SETTINGS

LINK = re.compile(r"(?<!\!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)")
CONTROL_PLANE = ROOT / "control_plane" / "lightship"


def test_the_generated_pages_are_those_of_the_code() -> None:
    assert stale_pages(FOLDER) == [], "run `make docs`"


def test_a_page_that_differs_is_named_and_the_check_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cli.md").write_text("old")
    monkeypatch.setattr("docs_reference.__main__.FOLDER", tmp_path)

    assert main(["--check"]) == 1

    said = capsys.readouterr().out
    assert "docs/reference/cli.md is stale" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cli.md"]
    assert (tmp_path / "cli.md").read_text() == "old"


def test_a_page_without_a_source_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "forgotten.md").write_text("what the code no longer has")
    monkeypatch.setattr("docs_reference.__main__.FOLDER", tmp_path)

    assert main([]) == 0

    assert not (tmp_path / "forgotten.md").exists()
    assert stale_pages(tmp_path) == []


def test_every_audit_verb_in_the_code_is_listed() -> None:
    listed = (FOLDER / "audit.md").read_text()
    written = set()
    for path in CONTROL_PLANE.rglob("*.py"):
        written |= set(re.findall(r"""verb=["']([a-z.-]+)["']""", path.read_text()))

    assert len(written) > 10
    assert [v for v in sorted(written) if f"`{v}`" not in listed] == []


def test_every_setting_and_every_code_is_listed() -> None:
    settings, errors = (FOLDER / "settings.md").read_text(), (FOLDER / "errors.md").read_text()

    assert [s.env for s in (*SETTINGS, *AGENT_SETTINGS) if f"`{s.env}`" not in settings] == []
    assert [c for c in CODES if f"`{c}`" not in errors] == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for found in LINK.finditer(without_code(page.read_text())):
        target, _, anchor = (found[1] or found[2]).partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(found[0])
    assert broken == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_docs_are_commands_of_the_programs(page: Path) -> None:
    wrong = []
    for block in blocks(page):
        if block.language != "console":
            continue
        for command in block.commands:
            wrong += [f"{line}: {why}" for line in programs(command.text) if (why := objection(line))]
    assert wrong == []


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert objection("lightship modle list")
    assert objection("lightship model lst")
    assert objection("lightship train cells --modle cells")
    assert objection("lightship-agent run --http-prot 8501")
    assert not objection("lightship --home x release cells@1 --json")
    assert not objection("lightship-agent verify --state-dir north")


def programs(text: str) -> list[str]:
    """The calls of our programs in a shell line."""
    parts = re.split(r"\s*(?:;|&&|\|\|?)\s*", text)
    plain = (re.sub(r"^(?:sudo(?: -u \S+)? +|[A-Z_]+=\S+ +)+", "", part) for part in parts)
    return [p for p in plain if re.match(r"lightship(?:-agent)?(?: |$)", p)]


def objection(line: str) -> str:
    """What is wrong with a call, "" if nothing is."""
    name, *words = shlex.split(line)
    command = commands.lightship() if name == "lightship" else commands.lightship_agent()
    known = {"--help", "-h"}
    for option in command.options:
        known.update(option.names)
    path = [name]
    for word in words:
        if word.startswith("-"):
            if word.partition("=")[0] not in known:
                return f"{' '.join(path)} has no option {word}"
        elif word in command.below:
            command = command.below[word]
            path.append(word)
            known.update(n for o in command.options for n in o.names)
        elif command.words == ("lightship", "release"):
            command = command.below["publish"]  # `release REFERENCE` is `release publish REFERENCE`
            known.update(n for o in command.options for n in o.names)
        elif command.below and not takes_value(command, line, word):
            return f"{' '.join(path)} has no command {word}"
    return ""


def takes_value(command: commands.Command, line: str, word: str) -> bool:
    """Whether `word` is the value of an option of a group."""
    return any(f"{n} {word}" in line for o in command.options for n in o.names if o.value)


def without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", h.lower().replace("`", "")) for h in headings)
    return {h.strip().replace(" ", "-") for h in plain}
