"""The help of every command and script: each flag has its default, and says where other commands have another one."""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from dataclasses import MISSING

import pytest

from tests.commands.test_docs import command_parser, product_files
from utils.files import PROJECT_ROOT

COMMANDS = ("train", "test", "predict", "export", "make_support", "check_data", "reproduce")
SCRIPTS = sorted(
    file
    for file in product_files()
    if "/" in file and "def get_args_parser" in (PROJECT_ROOT / file).read_text(encoding="utf-8")
)
OF_EACH = {  # flags of one name that mean another thing in each command, or name the command's own output
    *("--obj", "--output", "--img_size", "--support", "--maps", "--format", "--select", "--batch_size", "--shot"),
    "--support_path",
}


def flags(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.help != argparse.SUPPRESS]


@pytest.mark.parametrize("name", [*COMMANDS, *SCRIPTS])
def test_every_flag_has_a_default_or_is_required(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100000")
    words = ["-m", name.removesuffix(".py").replace("/", ".")] if "/" in name else [f"{name}.py"]
    try:
        parser, _ = command_parser(["python", *words])
    except ModuleNotFoundError as error:  # of requirements-examples.txt
        pytest.skip(str(error))
    page = parser.format_help()
    for action in flags(parser):
        if not isinstance(action, argparse._HelpAction):
            title = re.escape((action.option_strings or [action.metavar or action.dest])[0])
            (text,) = re.findall(rf"^  {title}\b(.*(?:\n {{10,}}.*)?)", page, flags=re.MULTILINE)
            assert "default" in text or "(required)" in text, f"{name} {title}: {text}"


def test_the_same_flag_has_the_same_default_or_names_the_commands_where_it_differs():
    found: dict[str, dict[str, argparse.Action]] = defaultdict(dict)
    for name in COMMANDS:
        for action in flags(command_parser(["python", f"{name}.py"])[0]):
            if hasattr(action, "field_default"):
                found[action.option_strings[0]][name] = action
    differing = {
        flag: of_commands
        for flag, of_commands in found.items()
        if len({str(action.field_default) for action in of_commands.values() if action.field_default is not MISSING})
        > 1
    }
    assert {flag for flag in differing if flag not in OF_EACH} == {"--backbone", "--scorer", "--seed", "--shots"}
    for flag in ("--backbone", "--scorer", "--shots"):
        for name, action in differing[flag].items():
            others = [
                other
                for other in differing[flag]
                if str(differing[flag][other].field_default) != str(action.field_default)
            ]
            assert any(f"{other}.py" in action.help for other in others), f"{name}.py {flag}"
    assert "test.py" in differing["--seed"]["make_support"].help
