"""Reads the settings from a YAML file, the environment and flags; writes them as YAML and as --help.

Order: config.py's default < YAML < environment < flag. Knows no key by name: config.py's tree says which exist. Must not import
torch or act on a setting.
"""

from __future__ import annotations

import os
import re
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from atomic import write_text_atomic
from config import ALIASES, GROUPS, KEYS, Config, Given, Row, Rows, keys_of, place, resolve
from errors import UserError
from setting_keys import KINDS, Key, Unfit, nearest, setting, show

DEFAULT_FILE = Path(__file__).resolve().parent / "config.yaml"


@dataclass(frozen=True)
class Options:
    """What a command line may ask for besides settings; never in YAML."""

    resume: bool = setting(False, "Go on with the newest unfinished run.")
    resume_path: Path | None = setting(None, "Go on with the run or checkpoint at this path.")
    state_dict_path: Path | None = setting(None, "Start from a checkpoint's weights: its folder, its model.pt or a link to it;"
                                           " with inference_only also an ensemble's folder.")  # fmt: skip
    inference_only: bool = setting(False, "Evaluate the checkpoint of --state_dict_path on the test split, without training.")
    estimate: bool = setting(False, "Say how much memory and disk the run will take and whether it fits, and stop.")
    doctor: bool = setting(False, "Look over environment, paths, settings and data, a line a check with the remedy, and stop.")
    json: bool = setting(False, "With doctor: print JSON.")
    dry_run: bool = setting(False, "Do everything up to one update and one batch of the evaluation, keep no file, and stop.")
    allow_other_data: bool = setting(
        False, "Take the checkpoint of state_dict_path or resume though its items are numbered otherwise than the data's."
    )
    overwrite: bool = setting(False, "Let a new run write into another run's folder.")
    debug: bool = setting(False, "Show the traceback of any failure.")
    write_config: bool = setting(False, "Write config.yaml (or --config FILE) anew from config.py and the flags given, and stop.")
    print_config: bool = setting(False, "Print each setting with its origin, and stop.")


_CONFIG_FLAG = Key("", "config", "Path | None", None, "Settings file, in place of config.yaml.")
_OPTIONS: dict[str, Key] = {key.name: key for key in (_CONFIG_FLAG, *keys_of("", Options))}
_FLAGS: dict[str, Key] = KEYS | ALIASES | _OPTIONS


@dataclass(frozen=True)
class ParsedArguments:
    """A command line understood.

    config_file: the YAML file that was read, if any. origins: {key: "default" | "config.yaml:12" | "environment BATCH_SIZE" |
    "flag --lr"} of every key. flags: keys given as flags.
    """

    config: Config
    config_file: Path | None
    options: Options
    origins: dict[str, str]
    flags: frozenset[str]


def load_config(argv: Sequence[str], environ: Mapping[str, str] | None = None, default_file: Path = DEFAULT_FILE) -> ParsedArguments:
    """The settings of a command line (without the program's name) over those of `environ` (default: os.environ) over those of the file.

    The file is --config's, else `default_file` where it exists. UserError lists every mistake of all sources, one line each.
    --help prints and exits with status 0.
    """
    if any(word in ("--help", "-h") for word in argv):
        print(help_text())
        raise SystemExit(0)
    problems: list[str] = []
    flags = _read_flags(argv, problems)
    options = _read_options([flag for flag in flags if not flag.key.group], problems)
    named = options.pop("config", None)
    file = named or (default_file if default_file.is_file() else None)
    given: list[Given] = []
    # A file that is to be written anew mirrors config.py, so neither the old one, faulty or not, nor this shell's variables count.
    if not options.get("write_config"):
        if file is not None:
            where = str(file) if named else file.name
            try:
                given += place(read_yaml(file, where), where, problems)
            except UserError as error:
                problems.append(str(error))
        given += _read_environment(os.environ if environ is None else environ)
    given += [flag for flag in flags if flag.key.group]
    config, origins = resolve(given, problems)
    return ParsedArguments(config, file, Options(**options), origins, frozenset(flag.key.name for flag in flags if flag.key.group))


# ------------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's numbers: 1.1 reads 1e-3 as text, 010 as 8, 1:30 as 90 and 2024-01-01 as a date."""

    yaml_implicit_resolvers: dict = {}


for _tag, _first, _pattern in (
    ("bool", list("yYnNtTfFoO"), r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"),
    ("int", list("-+0123456789"), r"[-+]?[0-9]+(_[0-9]+)*"),
    ("float", list("-+.0123456789"), r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"),
    ("null", ["~", "n", "N", ""], r"~|null|Null|NULL|"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def read_yaml(path: Path, where: str) -> Rows:
    """The groups of a settings file with their keys, lines and plain values; a repeated key comes twice.

    where: the file's name in messages. UserError where it cannot be read, is no YAML or no mapping.
    """
    if not path.is_file():
        raise UserError(f"--config {where}: {'is a folder' if path.is_dir() else 'no such file'}; expected a YAML file like config.yaml.")
    try:
        loader = _Loader(path.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        if isinstance(node, yaml.MappingNode):
            return _rows(loader, node, depth=2)
        found = None if node is None else loader.construct_document(node)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}.") from None
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not readable as YAML: {error.problem or error.context}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as YAML: {str(error).splitlines()[0]}.") from None
    if found is not None:
        raise UserError(f"{where}:{node.start_mark.line + 1}: expected groups of settings ({', '.join(GROUPS)}), found {show(found)}.")
    return Rows()


def _rows(loader: _Loader, node: yaml.MappingNode, depth: int) -> Rows:
    rows = []
    for name, content in node.value:
        nested = depth > 1 and content.tag == "tag:yaml.org,2002:map"
        value = _rows(loader, content, depth - 1) if nested else loader.construct_object(content, deep=True)
        rows.append(Row(name.value if isinstance(name, yaml.ScalarNode) else "a list or mapping", value, name.start_mark.line + 1))
    return Rows(rows)


# ------------------------------------------------------------------------------------------------ environment and flags


def _read_environment(environ: Mapping[str, str]) -> list[Given]:
    """Values of the variables that stand for keys; an empty one counts as unset."""
    return [Given(key, _from_text(key, [environ[key.env]]), f"environment {key.env}") for key in KEYS.values() if environ.get(key.env)]


def _read_flags(argv: Sequence[str], problems: list[str]) -> list[Given]:
    """Keys and options in the order given. A flag given twice: the last counts, so that a script can append to a command."""
    calls: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            calls.append((flag, [value] if has_value else []))
        elif calls:
            calls[-1][1].append(word)
        else:
            problems.append(f"unexpected argument {word!r}; a value follows its flag, as in --batch_size 64.")
    given: list[Given] = []
    spelled: dict[str, str] = {}
    for flag, words in calls:
        name = flag[2:]
        negated = name.startswith("no-") and getattr(_FLAGS.get(name[3:]), "kind", "") == "bool"
        key = _FLAGS.get(name[3:] if negated else name)
        if key is None:
            problems.append(_unknown_flag(name))
            continue
        first = spelled.setdefault(key.name, key.name if negated else name)
        if first != (key.name if negated else name):
            problems.append(f"flag --{first} and flag --{name} are the same key, {key.path}; give one of them.")
        if not words and key.kind != "bool":
            problems.append(f"flag {flag}: its value is missing; expected {flag} {KINDS[key.kind].short}.")
            continue
        taken = len(words) if key.is_list else 0 if negated else 1
        problems += [f"flag {flag}: unexpected argument {word!r} behind it." for word in words[taken:]]
        given.append(Given(key, False if negated else _from_text(key, words[:taken]), f"flag {flag}"))
    return given


def _unknown_flag(name: str) -> str:
    bools = [key.name for key in _FLAGS.values() if key.kind == "bool"]
    negated = name.startswith(("no-", "no_"))
    close = nearest(name[3:], bools) if negated else nearest(name, [*_FLAGS, "help"])
    remedy = f"the nearest is {'--no-' if negated else '--'}{close}" if close else "`python main.py --help` lists all"
    return f"unknown flag --{name}; {remedy}."


_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _from_text(key: Key, words: Sequence[str]) -> object:
    """The value that the words of a flag or variable stand for; words that cannot be read are left to Key.read to refuse."""
    if key.kind == "bool":
        return _TRUTH.get(words[0].strip().lower(), words[0]) if words else True
    if key.is_list:
        parts = [part for word in words for part in word.split(",") if part]
        kind = int if "int" in key.kind else float if "float" in key.kind else str
        return parts[0] if parts in (["auto"], ["none"]) else [_number(kind, part) for part in parts]
    return _number({"int": int, "float": float}.get(key.kind, str), words[0])


def _number(convert: Callable[[str], object], text: str) -> object:
    try:
        return convert(text)
    except ValueError:
        return text


def _read_options(given: list[Given], problems: list[str]) -> dict[str, object]:
    values = {}
    for key, value, origin in given:
        try:
            values[key.name] = key.read(value)
        except Unfit as unfit:
            problems.append(f"{origin}: {key.name} {unfit}")
    return values


# ------------------------------------------------------------------------------------------------ what a person reads


def dump_yaml(config: Config) -> str:
    """config.yaml's text: groups and keys in the tree's order, each below its documentation; loading it gives `config` again."""
    lines = ["# All settings, written from config.py by `python main.py --write_config`; edit the values.",
             "# An environment variable takes the place of a value here, and a flag (--batch_size 64) that of both."]  # fmt: skip
    for group, cls in GROUPS.items():
        lines += ["", f"# {cls.__doc__}", f"{group}:"]
        for key in keys_of(group, cls):
            lines += textwrap.wrap(key.describe(), 138, initial_indent="  # ", subsequent_indent="  # ")
            lines.append(f"  {key.name}: {_scalar(config.get(key.name))}")
    return "\n".join(lines) + "\n"


def write_config(parsed: ParsedArguments) -> Path:
    """--write_config: put the file of settings in place, at once or not at all; the old one is kept as FILE.bak. Returns its path."""
    path = parsed.config_file or DEFAULT_FILE
    text = dump_yaml(parsed.config)
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") != text:
        shutil.copy2(path, f"{path}.bak")
    write_text_atomic(path, text)
    return path


def print_config(parsed: ParsedArguments) -> str:
    """--print_config's text: YAML of the settings in effect, with each value's origin as a comment."""
    lines = []
    for group, cls in GROUPS.items():
        lines.append(f"{group}:")
        entries = [(f"  {key.name}: {_scalar(parsed.config.get(key.name))}", parsed.origins[key.name]) for key in keys_of(group, cls)]
        width = min(40, max(len(entry) for entry, _ in entries))
        lines += [f"{entry:<{width}}  # {origin}" for entry, origin in entries]
    return "\n".join(lines)


# Text that any YAML reader takes for text without quotes; other text is quoted.
_PLAIN = re.compile(r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)(?:[a-z_/]|\./)(?:[\w./@+:-]*[\w./@+-])?", re.ASCII | re.IGNORECASE)


def _scalar(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):
        text = repr(value)
        # YAML 1.1 needs the point: 1e-05 is text there.
        return text.replace("e", ".0e") if "e" in text and "." not in text else text
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08X}" for c in value) + '"'
    return str(value)


_HELP_HEAD = """usage: python main.py [--config FILE] [--KEY VALUE ...]

Makes the store where it is missing, trains, evaluates and reports.

examples:
  python main.py --batch_size 64 --lr 0.0005 --num_epochs 20
  python main.py --data_path data/beauty --config configs/public.yaml
  python main.py --inference_only --state_dict_path checkpoints/RUN/best_model.pt

Order: default < config.yaml (or --config FILE) < environment variable < flag. A bool takes --norm_first, --norm_first false and
--no-norm_first. A flag given twice: the last counts. Exit status: 0 done, 1 failed while running, 2 a mistake of yours, 130 interrupted.
"""


def help_text() -> str:
    """--help: examples, options, then every key in config.yaml's groups and order, with documentation and default; under 140 columns."""
    parts = [_HELP_HEAD]
    groups = [(f"{group}: {cls.__doc__}", keys_of(group, cls)) for group, cls in GROUPS.items()]
    for title, keys in [("options (not in YAML)", list(_OPTIONS.values())), *groups]:
        parts.append(title)
        for key in keys:
            head = f"  --{key.name} {KINDS[key.kind].short}"
            default = f" Default: {_scalar(key.default)}." if key.group else ""
            head = f"{head:<30}" if len(head) < 30 else head + "\n" + " " * 30
            parts.append(textwrap.indent(textwrap.fill(key.describe() + default, 106), " " * 30).replace(" " * 30, head, 1))
        parts.append("")
    parts.append("  --help, -h                  This text.")
    return "\n".join(parts)
