"""Settings: config files and --key=value override the top-level globals of a script.

A script calls `configure(globals())`. Its settings are the lower-case names assigned before its
first function, each with a type (its annotation, else that of its default) and a trailing comment,
which `--help` shows. Its table RANGES bounds numbers: name -> (least, limit), the limit excluded.
Config files are Python and run, but only settings are taken from them.
"""

import ast
import difflib
import os
import sys
from collections import namedtuple
from inspect import ismodule
from itertools import groupby
from pathlib import Path

Setting = namedtuple("Setting", "name kinds default comment section")  # kinds: ["int", "None"]
BARE = object()  # the value of a flag by itself
defaults = {}  # path of a script -> its globals as they were before the first configure()


class Config(dict):
    """The settings of a run, name to value; `flags` holds the names typed on the command line.

    `settings` and `ranges` say what is allowed.
    """


def configure(namespace, *imported):
    """Return the Config of a script, its settings also written into `namespace`, its globals.

    `imported`: globals of further scripts whose settings this one takes too; where both name one,
    the default of `namespace` holds. The last argument wins. SystemExit has one line per fault.
    """
    settings, ranges = {}, {}
    for space in (*imported, namespace):
        settings |= read_settings(space)
        ranges |= space.get("RANGES", {})
    config = Config({name: setting.default for name, setting in settings.items()})
    config.settings, config.ranges, config.flags = settings, ranges, set()
    speaks = os.environ.get("LOCAL_RANK", "0") == "0"  # one process per machine
    if {"--help", "-h"} & set(sys.argv[1:]):
        if speaks:
            print_help(namespace["__doc__"], settings.values())
        raise SystemExit
    faults = read_arguments(sys.argv[1:], namespace, config) or range_faults(config)
    if faults:
        raise SystemExit("\n".join(f"error: {fault}" for fault in faults) if speaks else 1)
    for space in (namespace, *imported):
        space |= {name: value for name, value in config.items() if name in space}
    return config


def read_arguments(arguments, namespace, config):
    """Set in `config` what the arguments say, from left to right; return a line per fault."""
    arguments, faults = list(arguments), []
    while arguments:
        argument, given, text, place = arguments.pop(0), {}, None, ""
        if argument.startswith("-"):
            name, equals, text = argument.removeprefix("--").partition("=")
            if not equals:  # --key value, or --eval_only by itself
                text = arguments.pop(0) if arguments and not arguments[0].startswith("--") else None
            given = {name: BARE if text is None else parse(text)}
            config.flags.add(name)
        else:
            place = f"{argument}: "
            try:
                given = read_file(argument, namespace, config)
            except ValueError as fault:
                faults.append(str(fault))
        for name, value in given.items():
            try:
                config[name] = convert(name, config.settings, value, text)
            except ValueError as fault:
                faults.append(f"{place}{fault}")
    return faults


def range_faults(config):
    """Return a line for each number that is out of its range."""
    return [
        f"{name}={config[name]} must be "
        + (f"at least {least}" if config[name] < least else f"below {limit}")
        for name, (least, limit) in config.ranges.items()
        if config[name] is not None and not least <= config[name] < limit
    ]


def take_over(config, saved, keep):
    """Turn `config` into that of a resumed run; return lines on what this command changes.

    Settings come from the dict `saved`, but for this command's flags and the names in `keep`.
    Raises ValueError where `saved` holds something of another type.
    """
    lines = []
    for name, setting in config.settings.items():
        now = config[name]
        then = convert(name, config.settings, saved.get(name, now), None)
        if name not in keep and now != then:
            if name in config.flags:
                lines.append(f"{name}: {then} -> {now}")
            else:
                config[name] = then
                if now != setting.default:
                    lines.append(f"{name}: stays {then}; only --{name}={now} changes it")
    return lines


def read_settings(namespace):
    """Return {name: Setting} for a script with these globals, in the order of its source."""
    values = defaults.setdefault(namespace["__file__"], dict(namespace))
    lines = Path(namespace["__file__"]).read_text(encoding="utf-8").splitlines()
    settings, section = {}, ""
    for node in ast.parse("\n".join(lines)).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        name = getattr(getattr(node, "target", None) or getattr(node, "targets", [0])[0], "id", "")
        if not name.islower() or name.startswith("_"):
            continue
        comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        if lines[node.lineno - 2].startswith("#"):
            section = lines[node.lineno - 2].strip("#- ")
        annotation = getattr(node, "annotation", None) or ast.Name(type(values[name]).__name__)
        kinds = ast.unparse(annotation).split(" | ")
        settings[name] = Setting(name, kinds, values[name], comment, section)
    return settings


def parse(text):
    """Return the Python value that `text` denotes, or `text` itself."""
    try:
        return ast.literal_eval(text.title() if text in ("true", "false", "none") else text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def convert(name, settings, value, text):
    """Return `value` in a type of the setting `name`: 1 is a fine float, 1e4 a fine int.

    `text` is what was typed, if it was a flag: a string is taken as typed, quotes included.
    ValueError says what is allowed, or gives the closest known name.
    """
    if name not in settings:
        close = difflib.get_close_matches(name.replace("-", "_"), settings, n=1)
        raise ValueError(
            f"unknown setting {name!r}: "
            + (f"did you mean {close[0]}?" if close else "--help lists them all")
        )
    kinds = settings[name].kinds
    if value is BARE and "bool" not in kinds:
        raise ValueError(f"--{name} needs a value")
    value = True if value is BARE else value
    kind = type(value).__name__.removesuffix("Type")  # NoneType is written None
    if kind in ("int", "float") and not abs(value) <= sys.float_info.max:
        kind = "nan or infinite"
    if kind in kinds and (kind != "str" or text is None):
        return value
    for other, number in (("int", float), ("float", int)):
        if kind == other and number.__name__ in kinds and number(value) == value:
            return number(value)
    if "str" in kinds and text is not None:
        return text
    shown = " ".join(repr(value).split())[:80]
    raise ValueError(f"{name} must be {' or '.join(kinds)}, got {shown}")


def read_file(name, namespace, config):
    """Return what a config file assigns; it is looked for here, then beside the script.

    It sees the settings as they stand. Underscored names, imports and functions are helpers.
    """
    path = Path(name if os.path.isfile(name) else Path(namespace["__file__"]).parent / name)
    if not os.path.isfile(path):
        raise ValueError(f"no config file {name!r}; a setting is given as --key=value")
    scope = dict(config)
    try:
        exec(compile(path.read_bytes(), path.name, "exec"), scope)
        # What it assigned: a new name, or another object than before.
        given = {k: v for k, v in scope.items() if config.get(k, scope) is not v}
        return {k: v for k, v in given.items() if not (k[0] == "_" or callable(v) or ismodule(v))}
    except BaseException as fault:  # exit() and Ctrl-C too
        raise ValueError(" ".join(f"{name}: {type(fault).__name__}: {fault}".split())) from None


def print_help(docstring, settings):
    """Print a script's docstring and its settings under their section headings."""
    print(docstring.strip())
    for section, group in groupby(settings, key=lambda setting: setting.section):
        print(f"\n{section}")
        for setting in group:
            print(f"  --{setting.name}={setting.default!r}".ljust(38), setting.comment)
