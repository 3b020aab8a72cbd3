"""Commands: both command lines as trees, for the page and for the test that checks what the docs tell people to type.

Rules: one shape for click and argparse; what is listed is what parses.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import click

from lightship.cli import cli
from lightship_agent.cli import build_parser


@dataclass(frozen=True)
class Option:
    """An option or an argument."""

    names: tuple[str, ...]  # empty for an argument
    value: str  # metavar; "" for a flag
    help: str
    default: str
    required: bool


@dataclass(frozen=True)
class Command:
    """A command and what is below it."""

    words: tuple[str, ...]
    help: str
    options: tuple[Option, ...]
    below: dict[str, Command] = field(default_factory=dict)

    def walk(self) -> Iterator[Command]:
        """This command and all below it, depth first."""
        yield self
        for command in self.below.values():
            yield from command.walk()


def lightship() -> Command:
    """The control plane's command line."""
    return _from_click(cli, ("lightship",))


def lightship_agent() -> Command:
    """The agent's command line."""
    return _from_argparse(build_parser(), ("lightship-agent",))


def _from_click(command: click.Command, words: tuple[str, ...]) -> Command:
    context = click.Context(command, info_name=words[-1])
    options = tuple(_click_option(p, context) for p in command.params)
    below = {}
    if isinstance(command, click.Group):
        below = {name: _from_click(command.commands[name], (*words, name)) for name in sorted(command.commands)}
    return Command(words, " ".join((command.help or "").split()), options, below)


def _click_option(parameter: click.Parameter, context: click.Context) -> Option:
    if isinstance(parameter, click.Argument):
        return Option((), parameter.make_metavar(context), "", "", parameter.required)
    assert isinstance(parameter, click.Option)
    flag = parameter.is_flag
    value = "" if flag else parameter.make_metavar(context)
    names = (*parameter.opts, *parameter.secondary_opts)
    default = str(parameter.default) if parameter.show_default and parameter.default is not None else ""
    if flag and parameter.secondary_opts:
        default = parameter.opts[0] if parameter.default else parameter.secondary_opts[0]
    return Option(names, value, parameter.help or "", default, parameter.required)


def _from_argparse(parser: argparse.ArgumentParser, words: tuple[str, ...]) -> Command:
    actions: list[Any] = parser._actions  # noqa: SLF001 - argparse has no public way to list what it parses
    below: dict[str, Command] = {}
    options = []
    for action in actions:
        if isinstance(action.choices, dict):
            below = {name: _from_argparse(p, (*words, name)) for name, p in action.choices.items()}
        elif not isinstance(action, argparse._HelpAction):  # noqa: SLF001 - as above
            options.append(_argparse_option(action))
    return Command(words, parser.description or "", tuple(options), below)


def _argparse_option(action: argparse.Action) -> Option:
    flag = action.nargs == 0
    value = "" if flag else (action.metavar if isinstance(action.metavar, str) else action.dest.upper())
    if not action.option_strings:
        value = f"[{value}]" if action.nargs == "?" else value
    return Option(tuple(action.option_strings), value, action.help or "", "", action.required)
