"""A frozen dataclass as command-line options: each field is one, its help text tells its meaning,
its default, and the value in every preset."""
import argparse
import dataclasses
import sys
import textwrap

from support.errors import Mistake

LARGEST = 2 ** 31 - 1           # of an integer option
DEVICE = dict(default="auto", help="auto, cpu, cuda, cuda:N or mps")


class Formatter(argparse.HelpFormatter):
    """Appends the default to the help of every option that has one."""

    def _get_help_string(self, action):
        hidden = ("None", "False", "", argparse.SUPPRESS)      # they tell the reader nothing
        if action.option_strings and str(action.default) not in hidden:
            return action.help + " (default %(default)s)"
        return action.help


def parser(text: str, prog: str | None = None, usage: str | None = None,
           epilog: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog, usage, text, epilog, formatter_class=Formatter)


def option(default, text: str, choices: tuple[str, ...] = (), least: int | None = None,
           only: str = ""):
    """A field of a Config. `only` names the settings that read it: "method vdi, vdi-staged"."""
    if only:
        text += f" [{only} only]"
    return dataclasses.field(default=default, metadata={
        "help": text, "choices": choices, "least": least, "only": only})


def name_of(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def settings(config) -> str:
    """Every field of a Config that is not empty, wrapped to 100 columns."""
    shown = [f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value != ""]
    # a path stays in one piece, to be copied
    return textwrap.fill("  ".join(shown), 100, break_long_words=False, break_on_hyphens=False)


def check_options(config) -> None:
    """Mistake for a field with a value that its option does not allow."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        choices = field.metadata["choices"]
        least = field.metadata["least"]
        if choices and value not in choices:
            raise Mistake(f"{name_of(field)} must be one of {', '.join(choices)}, not {value!r}")
        if least is not None and value < least:                 # 0 is a limit, too
            raise Mistake(f"{name_of(field)} must be at least {least}")
        # an arbitrary integer would be an OverflowError somewhere in torch
        if isinstance(value, int) and abs(value) > LARGEST:
            raise Mistake(f"{name_of(field)} must be between {-LARGEST} and {LARGEST}")


def add_options(parser: argparse.ArgumentParser, config: type, presets: dict[str, dict],
                without: tuple[str, ...] = (), groups: dict[str, str] | None = None) -> None:
    """Adds an option for every field. Only options that are given end up in the namespace.

    groups    first field of a group -> the group's title"""
    group = parser
    for field in dataclasses.fields(config):
        if groups and field.name in groups:
            group = parser.add_argument_group(groups[field.name])
        if field.name in without:                       # the command adds it by itself
            continue
        defaults = [repr(field.default)]
        for name, preset in presets.items():
            if field.name in preset:
                defaults.append(f"{name} {preset[field.name]!r}")
        # subtle: a string instead, if the Config's file imported annotations from __future__
        kind = field.type
        metavar = None                                  # argparse's own: the name in capitals
        if kind is bool:
            kind = yes_or_no                            # subtle: bool("false") is True
            metavar = "{true,false}"
        elif kind == tuple[int, ...]:
            kind = integers
            metavar = "N,N,..."
        elif field.metadata["choices"]:                 # `check_options` checks the value
            metavar = "{" + ",".join(field.metadata["choices"]) + "}"
        # SUPPRESS, because whether an option was given decides between it and a preset
        group.add_argument(name_of(field), type=kind, metavar=metavar, default=argparse.SUPPRESS,
                           help=f"{field.metadata['help']} (default {'; '.join(defaults)})")


def parse(parser: argparse.ArgumentParser, config: type, configure, presets: dict[str, dict],
          argv: list[str] | None, flags: dict[str, str], groups: dict[str, str]) -> tuple:
    """The Config that `configure` makes of the given options, and the value of each flag (name ->
    help). Prints a note for every given option that the chosen method does not read."""
    add_options(parser, config, presets, groups=groups)
    switches = parser.add_argument_group("switches")
    for name, text in flags.items():
        switches.add_argument(f"--{name}", action="store_true", help=text)
    given = vars(parser.parse_args(argv))
    values = {name: given.pop(name) for name in flags}  # what is left are fields of the Config
    result = configure(**given)
    for field in dataclasses.fields(config):
        only = field.metadata["only"]                   # "method vdi, vdi-staged", or empty
        if only and field.name in given:
            setting, readers = only.split(" ", 1)
            value = getattr(result, setting)
            if value not in readers.split(", "):
                print(f"note: {name_of(field)} only affects --{setting} {readers}; this run uses "
                      f"{value}", file=sys.stderr)
    return result, values


def yes_or_no(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))  # ValueError for anything else


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
