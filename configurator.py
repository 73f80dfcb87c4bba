"""Settings: config files and --key=value override the top-level globals of a script.

A script calls `configure(globals())`. Its settings are the lower-case names assigned before its
first function, each with a type (its annotation, else that of its default) and a trailing comment,
which `--help` shows. Config files are Python and run, but only settings are taken from them.
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


def configure(namespace, *imported):
    """Return all settings, name to value, after writing them into `namespace`, a script's globals.

    `imported`: globals of further scripts whose settings this one takes too; where both name one,
    the default of `namespace` holds. The last argument wins. SystemExit has one line per fault.
    """
    settings, speaks = {}, os.environ.get("LOCAL_RANK", "0") == "0"  # one process per machine
    for space in (*imported, namespace):
        settings |= read_settings(space["__file__"])
    arguments, flags, faults = sys.argv[1:], set(), []
    if {"--help", "-h"} & set(arguments):
        raise SystemExit(print_help(namespace["__doc__"], settings.values()) if speaks else 0)
    config = {name: setting.default for name, setting in settings.items()}
    while arguments:
        argument, text, place = arguments.pop(0), None, ""
        if argument.startswith("-"):
            name, equals, text = argument.removeprefix("--").partition("=")
            if not equals:  # --key value, or --eval_only by itself
                text = arguments.pop(0) if arguments and arguments[0][:2] != "--" else None
            given = {name: BARE if text is None else parse(text)}
            flags.add(name)
        else:
            try:
                given, place = read_file(argument, namespace, config), f"{argument}: "
            except ValueError as fault:
                given, faults = {}, [*faults, f"error: {fault}"]
        for name, value in given.items():
            try:
                config[name] = convert(name, settings, value, text)
            except ValueError as fault:
                faults.append(f"error: {place}{fault}")
    if faults:
        raise SystemExit("\n".join(faults) if speaks else 1)
    for space in (namespace, *imported):
        space |= {k: v for k, v in config.items() if k in space} | {"_flags": flags}
    return config


def restore(namespace, saved, config, keep):
    """Turn `config` into that of a resumed run, in `namespace` too; return lines to print.

    Settings come from `saved`, but this command's flags and the names in `keep` stay as they are.
    """
    lines, settings = [], read_settings(namespace["__file__"])
    for name, setting in settings.items():
        now, then = config[name], convert(name, settings, saved.get(name, config[name]), None)
        if name in keep or now == then:
            continue
        if name in namespace["_flags"]:
            lines.append(f"{name}: {then} -> {now}")
        elif now != setting.default:
            lines.append(f"{name}: stays {then}; only --{name}={now} changes it")
        if name not in namespace["_flags"]:
            config[name] = namespace[name] = then
    return lines


def read_settings(path):
    """Return {name: Setting} for the script at `path`, in the order of its source."""
    source = Path(path).read_text(encoding="utf-8")
    lines, settings, section = source.splitlines(), {}, ""
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            break
        target = getattr(node, "target", None) or getattr(node, "targets", [None])[0]
        if not isinstance(target, ast.Name) or not target.id.islower() or target.id[0] == "_":
            continue
        default = eval(ast.unparse(node.value), {})  # a literal, or a product such as 5 * 8
        kinds = ast.unparse(getattr(node, "annotation", None) or ast.Name(type(default).__name__))
        comment = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")[2].strip()
        if lines[node.lineno - 2].startswith("#"):
            section = lines[node.lineno - 2].strip("#- ")
        settings[target.id] = Setting(target.id, kinds.split(" | "), default, comment, section)
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
        hint = f"did you mean {close[0]}?" if close else "--help lists them all"
        raise ValueError(f"unknown setting {name!r}: {hint}")
    kinds = settings[name].kinds
    if value is BARE and "bool" not in kinds:
        raise ValueError(f"--{name} needs a value")
    value = True if value is BARE else value
    kind = type(value).__name__.removesuffix("Type")  # NoneType is written None
    if kind in ("int", "float") and not abs(value) <= sys.float_info.max:
        kind = "nan or infinite"
    if kind in kinds and (kind != "str" or text is None):
        return value
    other = {"int": float, "float": int}.get(kind)
    if other and other.__name__ in kinds and other(value) == value:
        return other(value)
    if "str" in kinds and text is not None:
        return text
    shown = " ".join(repr(value).split())[:80]
    raise ValueError(f"{name} must be {' or '.join(kinds)}, got {shown}")


def read_file(name, namespace, config):
    """Return what a config file, looked for here, then beside the script, assigns.

    It sees the settings as they stand. Underscored names, imports and functions are helpers.
    """
    path = Path(name if os.path.isfile(name) else Path(namespace["__file__"]).parent / name)
    if not os.path.isfile(path):
        raise ValueError(f"no config file {name!r}; a setting is given as --key=value")
    scope = dict(config)
    try:
        exec(compile(path.read_bytes(), path.name, "exec"), scope)
        changed = {k: v for k, v in scope.items() if config.get(k, scope) is not v}
        return {k: v for k, v in changed.items() if not (k[0] == "_" or callable(v) or ismodule(v))}
    except BaseException as fault:  # exit() and Ctrl-C too
        reason = " ".join(str(fault).split())
        raise ValueError(f"{name}: {type(fault).__name__}: {reason}") from None


def print_help(docstring, settings):
    """Print a script's docstring and its settings under their section headings."""
    print(docstring.strip())
    for section, group in groupby(settings, key=lambda setting: setting.section):
        print(f"\n{section}")
        for setting in group:
            print(f"  --{setting.name}={setting.default!r}".ljust(38), setting.comment)
