"""Reading a run's configuration: YAML by flag name, the command line over it, unknown names refused.

jsonargparse parses and type-checks the values; the flags are made from the sections' fields, so that the
command line, the YAML file, `--help` and the written configuration are one schema.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import inspect
import re
import textwrap
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml
from docstring_parser import parse_from_object
from jsonargparse import ActionYesNo, ArgumentParser

from megatron_slm.config import run as sections
from megatron_slm.errors import ConfigError

SECTIONS: dict[str, type] = typing.get_type_hints(sections.RunConfig)
ALIASES = {
    "num_key_value_heads": "num_query_groups",  # Megatron-DeepSpeed's name
    "layernorm_epsilon": "norm_epsilon",
    "rope_theta": "rotary_base",
}
_Section = TypeVar("_Section")


class DryRun(enum.IntEnum):
    """What a dry run looks at; a run that is none is false."""

    NO = 0
    WITH_FILES = 1
    """Weights, tokenizer and corpora must be there."""
    WITHOUT_FILES = 2
    """Nothing but the configuration is."""


class _Parser(ArgumentParser):
    """An argument parser whose errors are `ConfigError`s."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        words = " ".join(message.split())
        named = re.search(r'[Pp]arser key "([^"]+)":? ?(.*)', words)
        if named is None:
            raise ConfigError("command line", words, "is a list of known flags and their values", "see --help")
        given = re.search(r"(?:Given value|Got value): (.*)", named[2])
        flag = "--" + named[1].replace("_", "-")
        raise ConfigError(flag, given[1] if given else named[2], "has its flag's type", f"see {flag} in --help")


def _fields() -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}


def _parser() -> _Parser:
    parser = _Parser(
        prog="pretrain_slm.py",
        usage="%(prog)s --config FILE [flags]",
        description="Train a Llama-type model on the tokens worth learning (Selective Language Modeling).",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("--config", type=str, help="YAML file with any of the flags below, by the same names.")
    parser.add_argument(
        "--dry-run",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=False,
        help="Check everything, print the layout and the batch arithmetic, and exit.",
    )
    parser.add_argument(
        "--without-files",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=False,
        help="With --dry-run: before weights, tokenizer and corpora are there, from the configuration alone.",
    )
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="Set by the launcher; not used.")
    for name, section in SECTIONS.items():
        group = parser.add_argument_group(name, inspect.getdoc(section))
        hints = typing.get_type_hints(section)
        docs = {p.arg_name: p.description for p in parse_from_object(section).params}
        for f in dataclasses.fields(section):
            _add_flag(group, f, hints[f.name], docs[f.name] or "")
    return parser


def _add_flag(group: Any, f: dataclasses.Field[Any], hint: Any, doc: str) -> None:
    flag = "--" + f.name.replace("_", "-")
    default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
    required = default is dataclasses.MISSING
    text = textwrap.dedent(doc).strip()
    if hint is bool or hint == bool | None:
        group.add_argument(flag, action=ActionYesNo(yes_prefix="", no_prefix="no-"), default=default, help=text)
    elif typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        group.add_argument(flag, type=item, nargs="+", default=default, help=text)
    else:
        group.add_argument(flag, type=hint, default=None if required else default, required=False, help=text)


def _known_name(name: str, *, source: str) -> str:
    plain = name.lstrip("-").replace("-", "_")
    plain = ALIASES.get(plain, plain)
    names = _fields()
    if plain in names:
        return plain
    near = difflib.get_close_matches(plain, names, n=1, cutoff=0.5)
    hint = f"did you mean --{near[0].replace('_', '-')}?" if near else "see --help for the known names"
    raise ConfigError(source, name, "is a known name", hint)


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError("--config", path, f"is a readable file ({error.strerror})", "check the path") from error
    except yaml.YAMLError as error:
        where = str(error).replace("\n", " ")
        raise ConfigError("--config", path, f"is a YAML file ({where})", "correct the line named") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, Mapping):
        raise ConfigError("--config", path, "is a mapping of flag names to values", "write one `name: value` a line")
    return {_known_name(str(name), source=path): value for name, value in loaded.items()}


def _normalize_flags(argv: Sequence[str]) -> list[str]:
    """Accept underscores and aliases in flag names, and refuse the unknown ones by their nearest name."""
    own = {"--config", "--dry-run", "--no-dry-run", "--without-files", "--no-without-files", "--local-rank", "--help"}
    names, lists, out = _fields(), _list_fields(), []
    for word in argv:
        if not word.startswith("--"):
            out.append(_as_value(word))
            continue
        flag, equals, value = word.partition("=")
        flag = "--" + flag[2:].replace("_", "-")
        if flag not in own:
            plain = flag[2:]
            no = plain.startswith("no-") and plain.replace("-", "_") not in names
            flag = "--" + "no-" * no + _known_name(plain[3:] if no else plain, source="flag").replace("_", "-")
        if equals and flag[2:].replace("-", "_") in lists:
            out += [flag, _as_value(value)]  # argparse would take no further value after an equals sign
        else:
            out.append(flag + equals + value)
    return out


def _as_value(word: str) -> str:
    """A value as argparse takes it for one: a space before a dash that starts a word (the score `-loss`)."""
    return " " + word if re.match(r"-[^\d.]", word) and word != "-h" else word


def _list_fields() -> set[str]:
    hints = {n: h for section in SECTIONS.values() for n, h in typing.get_type_hints(section).items()}
    return {name for name, hint in hints.items() if typing.get_origin(hint) is list}


def parse(argv: Sequence[str], *, train_iters: int | None = None) -> tuple[sections.RunConfig, DryRun]:
    """The run's configuration from the command line and the YAML file it names.

    Args:
        train_iters: for tools that look at a run, where neither says how long it is.

    Returns:
        the configuration, and which dry run is asked for, if any.

    Raises:
        ConfigError: an unknown name (with the nearest known one), a value of the wrong type or out of range.
    """
    words = _normalize_flags(argv)
    parser = _parser()
    path = _yaml_path(words)
    if path is not None:
        parser.set_defaults(_typed(parser, _read_yaml(path), path))
    values = vars(parser.parse_args(words))
    if values["train_iters"] is None:
        values["train_iters"] = train_iters
    if values["train_iters"] is None:
        raise ConfigError("--train-iters", None, "is given", "give the number of steps, on the command line or in YAML")
    if values["without_files"] and not values["dry_run"]:
        raise ConfigError("--without-files", True, "goes with --dry-run", "add --dry-run")
    return _assemble(values), DryRun(values["dry_run"] + values["without_files"])


def _yaml_path(words: Sequence[str]) -> str | None:
    paths = []
    for word, following in zip(words, [*words, None][1:], strict=True):
        if word == "--config":
            paths.append(following)
        elif word.startswith("--config="):
            paths.append(word.partition("=")[2])
    if len(paths) > 1:
        raise ConfigError("--config", paths, "is given once", "put the flags into one file, or on the command line")
    return paths[0] if paths else None


def _typed(parser: _Parser, values: dict[str, Any], path: str) -> dict[str, Any]:
    """Check the YAML's values against the flags' types one by one, so that the error names the field."""
    hints = {n: h for section in SECTIONS.values() for n, h in typing.get_type_hints(section).items()}
    for name, value in values.items():
        if typing.get_origin(hints[name]) is list and not isinstance(value, list):
            values[name] = value.split() if isinstance(value, str) else [value]
        if hints[name] == list[str]:  # the weights of a blend are numbers in YAML
            values[name] = [str(x) if isinstance(x, (int, float)) else x for x in values[name]]
        if isinstance(value, str) and hints[name] in (float, float | None):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-4 (no dot) as a string
                values[name] = float(value)
        try:
            parser.parse_object({name: values[name]})
        except ConfigError as error:
            raise ConfigError(f"{name} in {path}", value, error.rule, error.fix) from error
    return values


def _assemble(values: Mapping[str, Any]) -> sections.RunConfig:
    built = {}
    for name, section in SECTIONS.items():
        built[name] = section(**{f.name: _without_space(values[f.name]) for f in dataclasses.fields(section)})
    return sections.RunConfig(**built)


def _without_space(value: Any) -> Any:
    """Undo `_as_value`."""
    if isinstance(value, list):
        return [_without_space(item) for item in value]
    return value[1:] if isinstance(value, str) and value.startswith(" -") else value


def to_flat_dict(config: sections.RunConfig) -> dict[str, Any]:
    """Every field by its flag name, as YAML writes it; reading it back gives the same configuration."""
    return {
        f.name.replace("_", "-"): getattr(getattr(config, name), f.name)
        for name, section in SECTIONS.items()
        for f in dataclasses.fields(section)
    }


def write_yaml(config: sections.RunConfig, path: Path) -> None:
    """Write the resolved configuration, so that `--config` on it repeats the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(to_flat_dict(config), sort_keys=False))
