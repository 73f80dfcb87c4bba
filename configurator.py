"""Config files and arguments such as --batch_size=8 override the top-level globals of a script.

A script ends with `main(configure(globals()))`. Its settings are the lower-case globals with a
trailing comment before its first function. The type of a setting comes from its annotation or else
from its default; --help shows the comment. ALLOWED maps names of settings to a list of allowed
values or to a tuple (minimum, maximum).

Arguments are read from left to right, and the last one wins. A config file is Python code that
assigns settings; underscored names, functions and imports in it are helpers.
"""

import ast
import difflib
import os
import re
import runpy
import sys
from collections import namedtuple
from reprlib import repr as short  # bounds nested values

from engine.process import reason

Setting = namedtuple("Setting", "kinds default help")  # kinds: ["int", "None"]; help: its lines
# An optional heading, then `name: kinds = default  # comment`.
SETTING = re.compile(r"(?m)^(?:# .*\n)?([a-z]\w*)(?:: (.*?))? = (.*?) *(?:#.*)?$")
# Names from other trainers, and our setting.
OTHER_NAMES = dict(
    map(str.split, "lr learning_rate,steps max_iters,epochs max_iters,n num_samples,prompt start,"
    "length max_new_tokens,tokens max_new_tokens,layers n_layer,heads n_head".split(","))
)  # fmt: skip
PROJECT = os.path.dirname(os.path.realpath(__file__))


class Config(dict):
    """The settings of a run, name -> value."""

    def __init__(self, settings, allowed):
        super().__init__({name: setting.default for name, setting in settings.items()})
        self.settings = settings  # name -> Setting
        self.allowed = allowed  # name -> [value, ...] or (minimum, maximum)
        self.flags = set()  # names given as arguments
        self.faults = []  # a line for each mistake in an argument or a config file

    def kinds(self, name):
        return self.settings[name].kinds if name in self.settings else []

    def assign(self, name, value, source=""):
        """Set `name` to `value`, or note a fault. 1 is a valid float, 1e4 a valid int."""
        kinds = self.kinds(name)
        if "float" in kinds and type(value) is int and value.bit_length() < 64:
            value = float(value)
        elif "int" in kinds and type(value) is float and value.is_integer():
            value = int(value)
        if not kinds:
            [closest] = difflib.get_close_matches(
                OTHER_NAMES.get(name, str(name)), self.settings, n=1, cutoff=0
            )
            self.faults.append(
                f"{source}unknown setting {name!r}, the closest is {closest}; --help lists all"
            )
        elif type_name(value) not in kinds:
            self.faults.append(f"{source}{name} must be {' or '.join(kinds)}, got {short(value)}")
        else:
            self[name] = value

    def value_faults(self):
        """Yield a line for each value that is not allowed."""
        for name, allowed in self.allowed.items():
            value = self[name]
            if isinstance(allowed, list):
                if value not in allowed:
                    yield f"{name}={value!r:.80}: choose one of {allowed}"
            elif value is not None and not allowed[0] <= value <= allowed[1]:
                yield f"{name}={value} must be from {allowed[0]} to {allowed[1]}"


def type_name(value):
    return type(value).__name__.removesuffix("Type")  # NoneType is written None


def configure(namespace, *imported):
    """Return the Config of a script and write its values into `namespace`, the script's globals.

    `imported` are the globals of other scripts whose settings this script takes too; its own
    defaults come first. SystemExit has one line for each mistake.
    """
    settings = {}
    allowed = {}
    for script in (*imported, namespace):
        settings |= read_settings(script)
        allowed |= script.get("ALLOWED", {})
    config = Config(settings, allowed)
    if {"--help", "-h"} & {*sys.argv}:
        print(namespace["__doc__"], *(setting.help for setting in settings.values()), sep="\n")
        raise SystemExit
    read_arguments(config, sys.argv[1:])
    if faults := config.faults or [*config.value_faults()]:
        raise SystemExit("error: " + "\nerror: ".join(faults))
    for script in (namespace, *imported):
        script.update({name: config[name] for name in config if name in script})
    return config


def read_settings(script):
    """Return {name: Setting} of a script, from its globals, in the order of its source."""
    settings = {}
    with open(script["__file__"], encoding="utf-8") as file:
        top = re.split(r"\ndef |\nexec\(", file.read())[0]
    for match in SETTING.finditer(top):
        name, kinds, default = match.groups()
        default = eval(default, script)
        settings[name] = Setting((kinds or type_name(default)).split(" | "), default, match[0])
    return settings


def read_arguments(config, arguments):
    """Apply the arguments to `config`."""
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            read_file(config, word)
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = "True" if "bool" in config.kinds(name) else next(words, "")
        config.flags.add(name)
        config.assign(name, parse(text, config.kinds(name)))


def parse(text, kinds):
    """Return the value of the argument `text` for a setting of these kinds."""
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text, text))
    except Exception:  # no number, True, False or None
        return text
    return value if "str" not in kinds or type_name(value) in {*kinds} - {"str"} else text


def read_file(config, name):
    """Run the config file `name`, found here or in the project, and assign its settings."""
    path = name if os.path.isfile(name) else os.path.join(PROJECT, name)
    if not os.path.isfile(path):
        config.faults.append(
            f"no config file {name!r} (ends with .py?); a setting is given as --key=value"
        )
        return
    try:
        scope = runpy.run_path(path, dict(config))  # a config file may read settings
    except BaseException as fault:  # exit() and Ctrl-C too
        config.faults.append(f"{name}: {reason(fault)}")
        return
    for key, value in scope.items():
        is_helper = str(key).startswith("_") or hasattr(value, "__name__")  # a function or a module
        if not is_helper and (key not in config or config[key] != value):
            config.assign(key, value, f"{name}: ")


if __name__ == "__main__":  # a script of nanoGPT runs exec(open("configurator.py").read())
    configure(globals())
