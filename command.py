"""What do all commands share? Options from a Config, files that are whole or not there, and one
sentence and an exit status for what goes wrong.

    status 2    the user's mistake: a file, an option, an environment
    status 1    ours
    130, 143    stopped by Ctrl-C, by SIGTERM

VDI_TRACEBACK=1 in the environment shows the traceback as well.
"""
import argparse
import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
import textwrap
import traceback

try:
    import fcntl
except ImportError:
    fcntl = None

LOCK = "lock"                                   # the file that `locked` leaves in a folder

OURS = (AssertionError, AttributeError, IndexError, KeyError, NameError, NotImplementedError,
        TypeError, UnboundLocalError)


def printable(text: str, but: str = "") -> str:
    """Text without control characters but those in `but`: what a file says steers no terminal."""
    return "".join(c if c.isprintable() or c in but else c.encode("unicode_escape").decode()
                   for c in text)


def aligned(heads: list[str], rows: list[list[str]], left: int = 1) -> str:
    """A table as text: the first `left` columns begin at one place, the others end at one."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return "\n".join("  ".join(cell.ljust(width) if i < left else cell.rjust(width)
                               for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
                     for line in (heads, *rows))


# ----------------------------------------------------------------------------------------- options

class Defaults(argparse.HelpFormatter):
    """Tells the default of every option that has one."""

    def _get_help_string(self, action):
        shown = action.option_strings and str(action.default) not in ("None", "False", "",
                                                                      argparse.SUPPRESS)
        return action.help + (" (default %(default)s)" if shown else "")


def parser(text: str, **more) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=text, formatter_class=Defaults, **more)


DEVICE = dict(default="auto", help="auto, cpu, cuda, cuda:N or mps")


def option(default, text: str, choices: tuple[str, ...] = (), least: int | None = None,
           only: str = ""):
    """A field of a Config. only: with which values of another field it is read ("method vdi")."""
    text = f"{text} [{only} only]" if only else text
    return dataclasses.field(default=default, metadata={
        "help": text, "choices": choices, "least": least, "only": only})


def settings(config) -> str:
    """Every field of a Config that is not empty, in lines of 100 columns."""
    shown = (f"{name}={value}" for name, value in dataclasses.asdict(config).items() if value != "")
    return textwrap.fill("  ".join(shown), 100, break_long_words=False, break_on_hyphens=False)


def check_options(config) -> None:
    """ValueError for a field of a Config that is not what its option allows."""
    for field in dataclasses.fields(config):
        name, value = "--" + field.name.replace("_", "-"), getattr(config, field.name)
        choices, least = field.metadata.get("choices"), field.metadata.get("least")
        if choices and value not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {value!r}")
        if least is not None and value < least:
            raise ValueError(f"{name} is at least {least}")


def add_options(parser: argparse.ArgumentParser, config: type, presets: dict[str, dict],
                but: tuple[str, ...] = (), groups: dict[str, str] | None = None) -> None:
    """An option for every field, whose help tells the default and every preset's value. Only what
    is given is set. groups: first field of a group -> its title."""
    def yes_or_no(text: str) -> bool:
        return bool(("false", "true").index(text.lower()))      # ValueError for anything else

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split(",") if part)

    part = parser
    for field in dataclasses.fields(config):
        if field.name in (groups or {}):
            part = parser.add_argument_group(groups[field.name])
        if field.name not in but:
            choices = field.metadata["choices"]         # `check_options` looks at them
            values = [f"{name} {preset[field.name]!r}" for name, preset in presets.items()
                      if field.name in preset]
            part.add_argument(
                "--" + field.name.replace("_", "-"), default=argparse.SUPPRESS,
                type={bool: yes_or_no, tuple[int, ...]: numbers}.get(field.type, field.type),
                metavar="{" + ",".join(choices) + "}" if choices else
                {bool: "{true,false}", tuple[int, ...]: "N,N,..."}.get(field.type),
                help=f"{field.metadata['help']} (default "
                     f"{'; '.join([repr(field.default), *values])})")


# -------------------------------------------------------------------------------- what goes wrong

class Stopped(SystemExit):
    """Stopped by a signal, which is what the exit status tells."""

    def __init__(self, sentence: str, number: int = signal.SIGTERM):
        super().__init__(sentence)
        self.status = 128 + number


@contextlib.contextmanager
def sentences():
    """Around all that a command does: what is raised becomes a sentence on stderr and a status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # a letter that the terminal has not is escaped
            stream.reconfigure(errors="backslashreplace")
    try:
        before = signal.signal(signal.SIGTERM, _stop)
    except ValueError:                          # not the main thread
        before = None
    try:
        yield
    except KeyboardInterrupt:
        _leave("stopped; what was finished has been kept", 130)
    except Stopped as error:
        _leave(str(error.code), error.status)
    except BrokenPipeError:                     # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OURS as error:
        _leave(unexpected(error), 1)
    except Exception as error:
        if type(error).__name__ in ("MemoryError", "OutOfMemoryError") \
                or "can't allocate memory" in str(error):       # Python's, torch's of GPU and CPU
            _leave(f"error: the memory is too small; lower --batch or --workers, or for features "
                   f"and training on a GPU see --precision and --bf16 ({told(error)})", 2)
        if "Connection closed by peer" in str(error) or "Connection reset by peer" in str(error):
            _leave("error: another process of torchrun has stopped; its message says why", 2)
        place = traceback.extract_tb(error.__traceback__)[-1]
        if type(error) is RuntimeError and not place.line.startswith("raise "):
            beneath = error                     # torch hides a full disk behind an error of its own
            while beneath is not None and not isinstance(beneath, OSError):
                beneath = beneath.__cause__ or beneath.__context__
            if beneath is None:
                _leave(unexpected(error), 1)                    # a fault of ours
            error = beneath
        # what a worker of a DataLoader raised holds its traceback
        lines = str(error).strip().splitlines() or [type(error).__name__]
        _leave(f"error: {lines[-1] if 'Traceback' in str(error) else str(error)}", 2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def unexpected(error: BaseException) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return (f"error: this should not have happened, please report it: {told(error)} "
            f"({os.path.basename(place.filename)}, line {place.lineno})")


def told(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__} {(str(error).strip().splitlines() or [''])[0]}"


def _stop(number: int, frame) -> None:
    raise Stopped("stopped by SIGTERM; what was finished has been kept")


def _leave(sentence: str, status: int) -> None:
    if os.environ.get("VDI_TRACEBACK"):
        traceback.print_exc()
    print(printable(sentence, but="\n"), file=sys.stderr)
    sys.exit(status)


class Signals:
    """While this is entered, a first SIGINT or SIGTERM is only remembered, in `received`, so that
    the work at hand can be finished and saved; a second one stops at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "Signals":
        try:
            self.before = {number: signal.signal(number, self.remember)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:                      # not the main thread
            self.before = {}
        return self

    def remember(self, number: int, frame) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        # where all processes are stopped at once, torch would raise because its workers are gone
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        print("stopping after this step; a second Ctrl-C stops at once", file=sys.stderr)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def save(path: str | os.PathLike, content) -> None:
    """A file that is there whole or not at all. content: text, bytes, or what writes it."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            if callable(content):
                content(file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: pathlib.Path, resume: bool):
    """The folder of a run. FileExistsError if it holds a run already that is not to be resumed, and
    for the second of two processes that write into it; the lock ends with its process."""
    if not resume and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise FileExistsError(f"{folder} holds a run already; continue it with --resume, or "
                              f"choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            if fcntl:                           # not there on Windows
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing into {folder}; wait for it, or "
                                  f"choose another --out") from None
        for left in folder.glob(".*.tmp"):      # what a killed process was about to write
            left.unlink()
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [LOCK]:      # nothing has come of it
                (folder / LOCK).unlink()
                folder.rmdir()
            raise
