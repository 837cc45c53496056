"""A frozen dataclass as command-line options: each field is one, its help text tells its meaning,
its default, and the value in every preset."""
import argparse
import dataclasses
import pathlib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable

from support.errors import Mistake


class Formatter(argparse.HelpFormatter):
    """Appends the default to the help of every option that has one."""

    def _get_help_string(self, action):
        hidden = ("None", "False", "", argparse.SUPPRESS)
        if action.option_strings and str(action.default) not in hidden:
            return action.help + " (default %(default)s)"
        return action.help


def parser(text: str, **more) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=Formatter, **more)


LARGEST = 2 ** 31 - 1           # of an integer option; torch cannot seed from arbitrary ones
DEVICE = dict(default="auto", help="auto, cpu, cuda, cuda:N or mps")


def option(default, text: str, choices: tuple[str, ...] = (), least: int | None = None,
           only: str = ""):
    """A field of a Config. `only` names the settings that read it: "method vdi, vdi-staged"."""
    text = f"{text} [{only} only]" if only else text
    return dataclasses.field(default=default, metadata={
        "help": text, "choices": choices, "least": least, "only": only})


def name_of(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def settings(config) -> str:
    """Every field of a Config that is not empty, wrapped to 100 columns."""
    shown = (f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value != "")
    return textwrap.fill("  ".join(shown), 100, break_long_words=False, break_on_hyphens=False)


def training_command(checkpoint: pathlib.Path, retrievers=()) -> str:
    """The train.py command whose run is the folder of a checkpoint, as far as its name tells:
    <dataset>-<method> or <dataset>-<method>-<retriever>, in runs/ unless it is --out."""
    folder, arguments = checkpoint.parent, ["python", "train.py"]
    if checkpoint.name != "ckpt.pt" or not folder.name:
        return shlex.join(arguments)
    name = re.fullmatch(rf"(.+?)-(mmn|vdi|vdi-staged)(?:-({'|'.join(retrievers)}))?", folder.name)
    if name:
        arguments += ["--dataset", name[1], "--method", name[2]]
        arguments += ["--retriever", name[3]] if name[3] else []
    if not name or folder.parent != pathlib.Path("runs"):
        arguments += ["--out", str(folder)]
    return shlex.join(arguments)


def check_options(config) -> None:
    """Mistake for a field with a value that its option does not allow."""
    for field in dataclasses.fields(config):
        value, choices = getattr(config, field.name), field.metadata.get("choices")
        if choices and value not in choices:
            raise Mistake(f"{name_of(field)} must be one of {', '.join(choices)}, not {value!r}")
        if field.metadata.get("least") is not None and value < field.metadata["least"]:
            raise Mistake(f"{name_of(field)} must be at least {field.metadata['least']}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise Mistake(f"{name_of(field)} must be between {-LARGEST} and {LARGEST}")


def unread(config, given: dict) -> list[str]:
    """A note for every given option that the chosen method or retriever does not read."""
    notes = []
    for field in dataclasses.fields(config):
        setting, _, values = field.metadata.get("only", "").partition(" ")
        if field.name in given and setting and getattr(config, setting) not in values.split(", "):
            notes.append(f"note: {name_of(field)} only affects --{setting} {values}; this run uses "
                         f"{getattr(config, setting)}")
    return notes


def add_options(parser: argparse.ArgumentParser, config: type, presets: dict[str, dict],
                without: tuple[str, ...] = (), groups: dict[str, str] | None = None) -> None:
    """Adds an option for every field. Only options that are given end up in the namespace.

    groups    first field of a group -> the group's title"""
    group = parser
    for field in dataclasses.fields(config):
        if field.name in (groups or {}):
            group = parser.add_argument_group(groups[field.name])
        if field.name in without:
            continue
        values = [repr(field.default)] + [f"{name} {preset[field.name]!r}" for name, preset
                                          in presets.items() if field.name in preset]
        kind, metavar = field.type, None
        if kind is bool:
            kind, metavar = yes_or_no, "{true,false}"
        elif kind == tuple[int, ...]:
            kind, metavar = integers, "N,N,..."
        elif field.metadata["choices"]:                 # checked by `check_options`
            metavar = "{" + ",".join(field.metadata["choices"]) + "}"
        group.add_argument(name_of(field), type=kind, metavar=metavar, default=argparse.SUPPRESS,
                           help=f"{field.metadata['help']} (default {'; '.join(values)})")


def parse(parser: argparse.ArgumentParser, config: type, configure, presets: dict[str, dict],
          argv: list[str] | None, flags: dict[str, str], **more) -> tuple:
    """The Config that `configure` makes of the given options, and the value of each flag (name ->
    help). Notes options that have no effect."""
    add_options(parser, config, presets, **more)
    switches = parser.add_argument_group("switches")
    for name, text in flags.items():
        switches.add_argument(f"--{name}", action="store_true", help=text)
    given = vars(parser.parse_args(argv))
    values = {name: given.pop(name) for name in flags}
    result = configure(**given)
    for note in unread(result, given):
        print(note, file=sys.stderr)
    return result, values


def yes_or_no(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))  # ValueError for anything else


def integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)
