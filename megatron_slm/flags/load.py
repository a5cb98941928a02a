"""Parses a run's configuration: flags over a YAML file with the same names; unknown names raise an error.

jsonargparse parses and type-checks the values. The flags are generated from the sections' fields, so that the command
line, the YAML file, `--help` and the saved configuration share one schema.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import enum
import functools
import inspect
import re
import textwrap
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from megatron_slm.config.rules import flag
from megatron_slm.config.run import RunConfig
from megatron_slm.deprecation import FLAGS, current_name
from megatron_slm.errors import ConfigError
from megatron_slm.flags.unknown_flags import repeated_flags, unknown_flags

SECTIONS: dict[str, type] = typing.get_type_hints(RunConfig)
ALIASES = {
    "num_key_value_heads": "num_query_groups",  # Megatron-DeepSpeed's name
    "layernorm_epsilon": "norm_epsilon",
    "rope_theta": "rotary_base",
    "skip_train": "eval_only",
}
_OWN_FLAGS = (
    "--config",
    "--dry-run",
    "--no-dry-run",
    "--without-files",
    "--no-without-files",
    "--local-rank",
    "--help",
)
_TYPES: dict[object, tuple[str, str]] = {
    int: ("INT", "be a whole number"),
    float: ("FLOAT", "be a number"),
    str: ("STR", "be text"),
    bool: ("BOOL", "be true or false"),
    dict: ("JSON", "be a JSON object"),
}
"""Placeholder in `--help` and rule of each type of a value."""


class DryRun(enum.IntEnum):
    """Kind of dry run; NO is false."""

    NO = 0
    WITH_FILES = 1
    """Requires weights, tokenizer and corpora."""
    WITHOUT_FILES = 2
    """Requires only the configuration."""


class _HelpFormatter(DefaultHelpFormatter):
    """Wraps each line of a help text by itself and appends the default."""

    def _expand_help(self, action: argparse.Action) -> str:
        text, *table = (action.help or "").split("\n")
        default = action.default
        if isinstance(default, list):
            default = " ".join(map(str, default))
        if default not in ("", argparse.SUPPRESS) and not (default is None or default is False):
            text += f" Default: {default}."
        return "\n".join([text, *table])

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in textwrap.wrap(line, width, break_on_hyphens=False)]


class _Parser(ArgumentParser):
    """An argument parser that raises `ConfigError`."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        words = " ".join(message.split())
        named = re.search(r'[Pp]arser key "([^"]+)":? ?(.*)', words)
        if named is None:
            raise ConfigError("command line", words, "contain only known flags and their values", "see --help")
        given = re.search(r"(?:Given value|Got value): (.*)", named[2])
        name, hint = named[1], _hints().get(named[1])
        rule = "have the flag's type" if hint is None else _type_rule(hint)
        raise ConfigError(flag(name), given[1] if given else named[2], rule, f"see {flag(name)} in --help")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}


def _hints() -> dict[str, Any]:
    """Type of every field."""
    return {name: hint for section in SECTIONS.values() for name, hint in typing.get_type_hints(section).items()}


def _is_list(hint: Any) -> bool:
    return typing.get_origin(hint) is list


def _value_type(hint: Any) -> Any:
    """Return the type of a given value: without None, and of one item of a list."""
    if _is_list(hint):
        return typing.get_args(hint)[0]
    inner = [one for one in typing.get_args(hint) if one is not type(None)]
    return inner[0] if type(None) in typing.get_args(hint) else hint


def _choices(hint: Any) -> tuple[Any, ...]:
    value_type = _value_type(hint)
    return typing.get_args(value_type) if typing.get_origin(value_type) is Literal else ()


def _type_rule(hint: Any) -> str:
    choices, value_type = _choices(hint), _value_type(hint)
    if choices:
        return f"be one of {', '.join(map(str, choices))}"
    return _TYPES[typing.get_origin(value_type) or value_type][1]


def _placeholder(hint: Any) -> str:
    choices, value_type = _choices(hint), _value_type(hint)
    if choices:
        return "{" + ",".join(map(str, choices)) + "}"
    return _TYPES[typing.get_origin(value_type) or value_type][0]


def known_flags() -> list[str]:
    """Return every flag of a run."""
    return [flag(name) for name in _fields()] + list(_OWN_FLAGS)


@functools.cache
def _built_parser() -> _Parser:
    parser = _Parser(
        prog="pretrain_slm.py",
        usage="%(prog)s --config FILE [flags]",
        description="Train a Llama-type model with Selective Language Modeling: only on the tokens worth learning.",
        formatter_class=_HelpFormatter,
        add_help=False,
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("-h", "--help", action="help", help="Show this help and exit.")
    parser.add_argument("--config", type=str, metavar="FILE", help="YAML file of flags, by the names below.")
    parser.add_argument(
        "--dry-run",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=False,
        help="Validate everything, print the layout and the batch sizes, and exit.",
    )
    parser.add_argument(
        "--without-files",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=False,
        help="With --dry-run: use the configuration alone, without weights, tokenizer and corpora.",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, default=0, metavar="INT", help="Set by the launcher; ignored."
    )
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name.replace("_", " "), inspect.getdoc(section))
        hints = typing.get_type_hints(section)
        docs = {p.arg_name: p.description for p in parse_from_object(section).params}
        for f in dataclasses.fields(section):
            _add_flag(group, f, hints[f.name], docs[f.name] or "")
    return parser


def _add_flag(group: Any, f: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    if default is dataclasses.MISSING:
        default = None
    text = " ".join(doc.split())
    if "choices_help" in f.metadata:
        text += "\n" + f.metadata["choices_help"]
    options = {"default": default, "help": text}
    if _value_type(hint) is bool:
        group.add_argument(flag(f.name), action=ActionYesNo(yes_prefix="", no_prefix="no-"), **options)
    elif _is_list(hint):
        group.add_argument(flag(f.name), type=_value_type(hint), nargs="+", metavar=_placeholder(hint), **options)
    else:
        group.add_argument(flag(f.name), type=hint, metavar=_placeholder(hint), **options)


def _known_name(name: str) -> str | None:
    """Return the field of a name as typed, with dashes or underscores; None if there is none."""
    plain = name.lstrip("-").replace("-", "_")
    plain = ALIASES.get(plain, plain)
    if plain in FLAGS:
        plain = current_name(name, FLAGS[plain], kind="flag", show=flag)
    return plain if plain in _fields() else None


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError("--config", path, f"be a readable file ({error.strerror})", "check the path") from error
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise ConfigError("--config", path, f"be a YAML file ({where})", "correct the line it names") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError("--config", path, "map flag names to values", "write one `name: value` per line")
    fields = {str(name): _known_name(str(name)) for name in loaded}
    if unknown := [name for name, field in fields.items() if field is None]:
        raise unknown_flags(f"{path}: key", unknown, map(flag, _fields()))
    return {field: loaded[name] for name, field in fields.items() if field is not None}


def _normalize_flags(argv: Sequence[str]) -> list[str]:
    """Replace underscores and aliases in flag names.

    Raises:
        ConfigError: unknown names (lists all of them, each with its fix), or names used twice.
    """
    hints = _hints()
    out: list[str] = []
    unknown: list[str] = []
    uses: Counter[str] = Counter()
    for word in argv:
        if not word.startswith("--"):
            out.append(_as_value(word))
            continue
        typed, equals, value = word.partition("=")
        name = _known_flag(typed)
        if name is None:
            unknown.append(typed)
            continue
        uses[name if name in _OWN_FLAGS else "--" + name[2:].removeprefix("no-")] += 1
        if equals and _is_list(hints.get(name[2:].replace("-", "_"))):
            out += [name, _as_value(value)]  # argparse would take no further value after an equals sign
        else:
            out.append(name + equals + value)
    if unknown:
        raise unknown_flags("flag", unknown, map(flag, _fields()))
    if repeated := [name for name, count in uses.items() if count > 1]:
        raise repeated_flags(repeated)
    return out


def _known_flag(typed: str) -> str | None:
    """Return the flag that the parser knows for a flag as typed; None for an unknown one."""
    if flag(typed[2:]) in _OWN_FLAGS:
        return flag(typed[2:])
    if (field := _known_name(typed)) is not None:
        return flag(field)
    if typed[2:5] in ("no-", "no_") and (field := _known_name(typed[5:])) is not None:
        return "--no-" + flag(field)[2:]
    return None


def _as_value(word: str) -> str:
    """Mark a word that starts with a dash as a value, not a flag (the score `-loss`), by a space before it."""
    return " " + word if re.match(r"-[^\d.]", word) and word != "-h" else word


def parse(argv: Sequence[str], *, train_iters: int | None = None) -> tuple[RunConfig, DryRun]:
    """Parse the run's configuration from the command line and the YAML file of --config.

    Args:
        train_iters: default of --train-iters, for tools that inspect a run.

    Returns:
        the configuration and the kind of dry run.

    Raises:
        ConfigError: an unknown name (suggests the nearest one), or a value of the wrong type or out of range.
    """
    words = _normalize_flags(argv)
    parser = copy.deepcopy(_built_parser())  # a YAML file's values become its defaults
    path = _yaml_path(words)
    if path is not None:
        parser.set_defaults(_typed(parser, _read_yaml(path), path))
    values = vars(parser.parse_args(words))
    if values["train_iters"] is None:
        values["train_iters"] = 1 if values["eval_only"] else train_iters
    if values["train_iters"] is None:
        fix = "set the number of steps, on the command line or in the YAML file"
        raise ConfigError.missing("--train-iters", "every run", fix)
    return _assemble(values), _dry_run(values)


def _dry_run(values: Mapping[str, Any]) -> DryRun:
    if values["without_files"] and not values["dry_run"]:
        raise ConfigError.missing("--dry-run", "--without-files", "add --dry-run, or remove --without-files")
    if values["without_files"]:
        return DryRun.WITHOUT_FILES
    return DryRun.WITH_FILES if values["dry_run"] else DryRun.NO


def _yaml_path(words: Sequence[str]) -> str | None:
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == "--config":
            return following
        if word.startswith("--config="):
            return word.partition("=")[2]
    return None


def _typed(parser: _Parser, values: dict[str, Any], path: str) -> dict[str, Any]:
    """Check the YAML's values against the flags' types; one by one where they are not sound, to name the field."""
    hints, written = _hints(), dict(values)
    for name, value in written.items():
        if _is_list(hints[name]) and not isinstance(value, list):
            values[name] = value.split() if isinstance(value, str) else [value]
        if hints[name] == list[str]:  # the weights of a blend are numbers in YAML
            values[name] = [str(x) if isinstance(x, (int, float)) else x for x in values[name]]
        if isinstance(value, str) and hints[name] in (float, float | None):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 (no dot) as a string
                values[name] = float(value)
    try:
        parser.parse_object(dict(values))
    except ConfigError:
        for name, value in written.items():
            try:
                parser.parse_object({name: values[name]})
            except ConfigError as error:
                field, fix = f"{path}: {flag(name)[2:]}", f"see {flag(name)} in --help"
                raise ConfigError(field, value, _type_rule(hints[name]), fix) from error
        raise
    return values


def _assemble(values: Mapping[str, Any]) -> RunConfig:
    built = {}
    for name, section in SECTIONS.items():
        built[name] = section(**{f.name: _without_space(values[f.name]) for f in dataclasses.fields(section)})
    return RunConfig(**built)


def _without_space(value: Any) -> Any:
    """Undo `_as_value`."""
    if isinstance(value, list):
        return [_without_space(item) for item in value]
    return value[1:] if isinstance(value, str) and value.startswith(" -") else value


def to_flat_dict(config: RunConfig) -> dict[str, Any]:
    """Return every field by its flag name, as in the YAML file; parsing it yields the same configuration."""
    return {
        flag(f.name)[2:]: getattr(getattr(config, name), f.name)
        for name, section in SECTIONS.items()
        for f in dataclasses.fields(section)
    }


def write_yaml(config: RunConfig, path: Path) -> None:
    """Write the resolved configuration; `--config` with the file repeats the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_flat_dict(config), sort_keys=False))
