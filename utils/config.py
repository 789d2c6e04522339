"""Configurations: one frozen dataclass per command, whose fields are its flags.

    @dataclass(frozen=True, kw_only=True)
    class DrawConfig(Config):
        rounds: int = flag("rounds per support set", default=10, least=1, affects_results=True)

A field declares name, type, default, help and limits; `Parser` builds the command line from the fields. A configuration
is validated on creation and never changed; `dataclasses.replace` returns a changed copy. With `--config FILE`, every
command takes values from a JSON file, a record, a checkpoint or a detector file; flags on the command line take
precedence.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from utils.choices import SAFETENSORS
from utils.errors import UserError
from utils.text import decode_text

CONFIG_KEYS = ("config", "arguments")  # entries of records with the configuration; "arguments": until version 0.1
LARGEST_INTEGER = 2**63 - 1  # of torch and NumPy
CHECKPOINT_KEYS = ("recipe", "origin")  # entries of checkpoints and detector files with their record

# `affects_results` of flags that were added later: with the default, fingerprints of earlier versions remain valid
UNLESS_DEFAULT = "unless default"

AnyConfig = TypeVar("AnyConfig", bound="Config")


def flag(
    text: str,
    *,
    default: object = MISSING,
    group: str = "run",
    affects_results: bool | str = False,
    least: float | None = None,
    most: float | None = None,
    choices: Sequence[object] | None = None,
    convert: Callable[[str], object] | None = None,
    joined_by: str | None = None,
    **options: object,
) -> Any:  # noqa: ANN401, the type of the field
    """A field of a `Config`, and with it the flag of the same name.

    text: the help. default: without one, the flag is required. group: of the help page. affects_results: whether the
    value is part of the fingerprint of a run; UNLESS_DEFAULT: only if it is not the default. least, most: limits of a
    number, or of each number of a tuple. convert: converts text to a value; by default the type of the field.
    joined_by: several words may be given, which this text joins to one value. options: further arguments of
    `add_argument` (metavar, nargs, const); `spelling`, the flag if it is not the name of the field; and `aliases`,
    further flags and names in files of --config, which the help omits.
    """
    metadata = {"text": text, "group": group, "affects_results": affects_results, "least": least, "most": most}
    metadata |= {"choices": choices, "convert": convert, "joined_by": joined_by, "options": options}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Config:
    """The base of all configurations.

    given: the names that the command line or --config set. It is not a flag and not compared.

    Raises:
        UserError: a value is not among the choices or outside the limits, a number is not finite, or `check` fails.
    """

    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False, repr=False)

    def __post_init__(self) -> None:
        for field in flags_of(type(self)):
            values = getattr(self, field.name)
            for value in values if isinstance(values, tuple) else (values,):
                _check_value(field, value)
        self.check()

    def check(self) -> None:
        """Raises UserError if values contradict each other. Subclasses override it."""

    def plain(self) -> dict[str, object]:
        """All values for JSON: paths as text, tuples as lists."""
        return {field.name: _plain(getattr(self, field.name)) for field in flags_of(type(self))}

    def results_part(self) -> dict[str, object]:
        """The plain values that affect results, for the fingerprint of a run."""
        plain, affecting = self.plain(), {}
        for field in flags_of(type(self)):
            affects = field.metadata["affects_results"]
            if affects and (affects != UNLESS_DEFAULT or plain[field.name] != _plain(field.default)):
                affecting[field.name] = plain[field.name]
        return affecting

    @classmethod
    def from_plain(cls: type[AnyConfig], values: Mapping[str, object]) -> AnyConfig:
        """The configuration of plain values, as `plain` returns them; missing names get their default.

        Raises:
            UserError: a name is unknown, a value has another type, or a required one is missing.
        """
        fields = {field.name: field for field in flags_of(cls)}
        if unknown := [name for name in values if name not in fields]:
            raise UserError(f"no such setting: {', '.join(unknown)}; there are {', '.join(fields)}")
        for name, field in fields.items():
            if field.default is MISSING and name not in values:
                raise UserError(f"{_spelling(field)} is required: {field.metadata['text']}")
        converted = {name: _from_plain(cls, fields[name], value) for name, value in values.items()}
        return cls(**converted, given=frozenset(converted))


class HelpFormatter(argparse.HelpFormatter):
    """Help pages on which every flag has its default, unless its text mentions the default."""

    def add_argument(self, action: argparse.Action) -> None:
        """Adds a flag. Without a text, its default is the text."""
        action.help = action.help or f"default: {_default_text(action.default)}"
        super().add_argument(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", getattr(action, "field_default", action.default)
        if "default" in text or isinstance(action, argparse._HelpAction):
            return text
        if action.required or default is MISSING:
            return f"{text} (required)"
        if default is None and action.nargs in ("?", "*"):  # the flag may be given without a value
            return f"{text} (default: off)"
        return f"{text} (default: {_default_text(default)})"


def _default_text(default: object) -> str:
    if default in (None, ()) or default is argparse.SUPPRESS:
        return "not set"
    if isinstance(default, bool):
        return "on" if default else "off"
    return " ".join(map(str, default) if isinstance(default, tuple | list) else [str(default)]).replace("%", "%%")


class Parser(argparse.ArgumentParser, Generic[AnyConfig]):
    """The command line of a configuration. An error is one line and exit code 2, without the usage."""

    def __init__(self, kind: type[AnyConfig], description: str, epilog: str | None = None) -> None:
        required = [field for field in flags_of(kind) if field.default is MISSING]
        names = [
            f"--{field.name} {field.metadata['options'].get('metavar', field.name.upper())} " for field in required
        ]
        super().__init__(
            usage=f"%(prog)s {''.join(names)}[--FLAG VALUE ...]",
            description=description,
            epilog=epilog,
            argument_default=argparse.SUPPRESS,
            formatter_class=HelpFormatter,
            prog=_program(),
        )
        self.kind = kind
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            help="take the flags from a JSON file, or those of an earlier run from its record, checkpoint or detector; "
            "flags on the command line take precedence",
        )
        groups: dict[str, argparse._ArgumentGroup] = {}
        for field in sorted(flags_of(kind), key=lambda field: (field.default is not MISSING, _place(kind, field.name))):
            title = field.metadata["group"]
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            _add_flag(groups[title], kind, field)

    def error(self, message: str) -> NoReturn:
        """Ends the command."""
        self.exit(2, f"error: {message} ({self.prog} --help lists the flags)\n")

    def parse_config(self, argv: Sequence[str] | None = None) -> AnyConfig:
        """The configuration that a command line describes.

        Raises:
            UserError: as `Config`, or the file of --config cannot be used.
        """
        given = vars(self.parse_args(argv))
        file = given.pop("config", None)
        values = {} if file is None else read_config(file, self.kind)
        # values that argparse has converted are converted again, so that files and command lines have the same rules
        return self.kind.from_plain(values | {name: _plain(value) for name, value in given.items()})


def script_parser(docstring: str) -> argparse.ArgumentParser:
    """The command line of a script without a configuration, described by the first line of its docstring."""
    description = docstring.splitlines()[0]
    return argparse.ArgumentParser(prog=_program(), description=description, formatter_class=HelpFormatter)


def _program() -> str | None:
    """The command that starts the running script, if it is `python -m ...`; otherwise None, argparse's default."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.name}" if spec else None


def flags_of(kind: type[Config]) -> list[dataclasses.Field]:
    """The fields of a configuration that are flags."""
    return [field for field in dataclasses.fields(kind) if field.metadata]


def recorded(record: Mapping) -> dict[str, object]:
    """The configuration in a record, a checkpoint or the description of a detector; empty if there is none."""
    for key in CHECKPOINT_KEYS:
        if isinstance(record.get(key), Mapping):
            return recorded(record[key])
    return next((dict(record[key]) for key in CONFIG_KEYS if isinstance(record.get(key), Mapping)), {})


def read_config(file: Path, kind: type[Config]) -> dict[str, object]:
    """The values of a configuration in a JSON file, a record, a checkpoint or a detector file.

    Settings of other commands in a record are ignored, with a note; in a plain JSON file of settings they are errors.

    Raises:
        UserError: the file cannot be read, has no configuration, or has an unknown setting.
    """
    names, content = {field.name for field in flags_of(kind)}, _read(file)
    values = recorded(content)
    if not values and any(isinstance(value, Mapping) for value in content.values()):
        raise UserError(f"{file} holds no configuration (looked for the entry {' or '.join(CONFIG_KEYS)})")
    if not values:
        content = _renamed(content, kind)
        if unknown := sorted(set(content) - names):
            raise UserError(f"{file}: no such setting: {', '.join(unknown)}; there are {', '.join(sorted(names))}")
        return content
    values = _renamed(values, kind)
    if others := sorted(set(values) - names):
        print(f"{file}: not settings of this command, ignored: {', '.join(others)}", file=sys.stderr)
    # records hold values that were not given
    defaults = {field.name: _plain(field.default) for field in flags_of(kind)}
    return {name: value for name, value in values.items() if name in names and value not in (None, defaults[name])}


def _renamed(values: Mapping, kind: type[Config]) -> dict[str, object]:
    """The values, with aliases replaced by the names of their fields."""
    fields = {
        alias.removeprefix("--"): f.name for f in flags_of(kind) for alias in f.metadata["options"].get("aliases", ())
    }
    return {fields.get(name, name): value for name, value in values.items()}


def _read(file: Path) -> Mapping:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the configuration {file}: {error.strerror}") from error
    if content[:4] == b"PK\x03\x04" or file.suffix == SAFETENSORS:  # a torch file, or one of tensors alone
        from utils.files import load_tensors  # imports torch

        values = load_tensors(file, "file")
    else:
        try:
            values = json.loads(decode_text(content))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file} is not a JSON, checkpoint or detector file: {error}") from error
    if not isinstance(values, Mapping):
        raise UserError(f"{file} holds no configuration but {type(values).__name__}")
    return values


def _place(kind: type[Config], name: str) -> tuple[int, int]:
    """The sort key of a field on the help page: depth of its class in the hierarchy, and its number in the class."""
    declared = [list(inspect.get_annotations(base)) for base in kind.__mro__]
    depth = next(depth for depth, names in enumerate(declared) if name in names)
    return depth, declared[depth].index(name)


def _add_flag(group: argparse._ArgumentGroup, kind: type[Config], field: dataclasses.Field) -> None:
    options = dict(field.metadata["options"])
    names = [_spelling(field), *options.pop("aliases", ())]
    options.pop("spelling", None)
    base, is_tuple = _base_type(kind, field)
    text = field.metadata["text"]
    if base is bool:
        options["action"] = "store_true"
    else:
        convert = field.metadata["convert"] or (str if base is Path else base)  # "" would become the current folder
        options |= {"type": convert, "choices": field.metadata["choices"]}
        if is_tuple or field.metadata["joined_by"]:
            options.setdefault("nargs", "+")
    action = group.add_argument(names[0], dest=field.name, help=text.replace("%", "%%"), **options)
    action.field_default = field.default
    for alias in names[1:]:
        group.add_argument(alias, dest=field.name, **options | {"help": argparse.SUPPRESS})


def _spelling(field: dataclasses.Field) -> str:
    return field.metadata["options"].get("spelling", f"--{field.name}")


def _base_type(kind: type[Config], field: dataclasses.Field) -> tuple[Callable, bool]:
    """The type of a value of the field, without None, and whether the field is a tuple of them."""
    hint = _type_hints(kind)[field.name]
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    is_tuple = typing.get_origin(hint) is tuple
    return (typing.get_args(hint)[0] if is_tuple else hint), is_tuple


_type_hints = functools.cache(typing.get_type_hints)


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _from_plain(kind: type[Config], field: dataclasses.Field, value: object) -> object:
    base, is_tuple = _base_type(kind, field)
    if value is None and type(None) in typing.get_args(_type_hints(kind)[field.name]):
        return None
    if is_tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(field, base, item) for item in items)
    if field.metadata["joined_by"] and isinstance(value, list):
        value = field.metadata["joined_by"].join(map(str, value))
    return _convert(field, base, value)


def _convert(field: dataclasses.Field, base: Callable, value: object) -> object:
    if base is bool:
        if isinstance(value, bool):
            return value
        raise UserError(f"{_spelling(field)} takes true or false in a configuration file, got {value!r}")
    if value in ("", None):
        raise UserError(f"{_spelling(field)} is empty: give a value, or leave it out")
    try:
        return (field.metadata["convert"] or base)(value if isinstance(value, Path) else str(value))
    except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
        raise UserError(f"{_spelling(field)}: {value!r} is not valid ({error})") from error


def _check_value(field: dataclasses.Field, value: object) -> None:
    name, choices, least = _spelling(field), field.metadata["choices"], field.metadata["least"]
    if value is None:
        return
    if choices is not None and value not in choices:
        raise UserError(f"{name} {value}: choose from {', '.join(map(str, choices))}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value}")
    if least is not None and value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    most = field.metadata["most"] or (LARGEST_INTEGER if isinstance(value, int) else math.inf)
    if isinstance(value, int | float) and value > most:
        raise UserError(f"{name} must be at most {most}, got {value}")
