"""The manual page knows every verb, option and exit code of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path

from virtmount import cli, errors

PAGE = (Path(__file__).parents[2] / "docs" / "virtmount.8").read_text()


def parsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("no verbs")


def test_every_verb_and_option_is_described() -> None:
    for verb, parser in parsers(cli._parser()).items():
        assert f".Cm {verb}" in PAGE
        for action in parser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option.removeprefix("-") in PAGE, (verb, option)


def test_every_exit_code_is_described() -> None:
    def tree(kind: type[errors.VirtmountError]) -> set[int]:
        return {kind.exit_code}.union(*(tree(child) for child in kind.__subclasses__()))

    for code in tree(errors.VirtmountError):
        assert f"\n.It {code}\n" in PAGE
