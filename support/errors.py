"""How a command ends. What the user can fix is a `Mistake`: one sentence, exit status 2. Anything
else is a bug and shows Python's traceback, exit status 1. 130 and 143: stopped by Ctrl-C, SIGTERM.

This file does not import torch, so a Ctrl-C while torch is still being imported is one line, too.
"""
import contextlib
import os
import pathlib
import signal
import sys

from support.text import printable


class Mistake(ValueError):
    """Something the user can fix. The message is one sentence that says what to do."""


class Missing(Mistake):
    """A file that another source may have: it is not in a folder, or could not be downloaded. Or a
    package that is not installed."""


class Stopped(SystemExit):
    """Stopped by a signal, whose number determines the exit status."""

    def __init__(self, sentence: str, number: int = signal.SIGTERM):
        super().__init__(sentence)
        self.status = 128 + number


@contextlib.contextmanager
def reported():
    """Wraps the whole of a command: turns exceptions into one sentence and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # escape what the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        before = signal.signal(signal.SIGTERM, _raise_stopped)
        if signal.getsignal(signal.SIGINT) is leave_quietly:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except ValueError:                          # only the main thread can handle signals
        before = None
    try:
        yield
    except KeyboardInterrupt:
        _leave("stopped; everything that was finished has been kept", 130)
    except Stopped as error:
        _leave(str(error.code), error.status)
    except BrokenPipeError:                     # the reader of our output, e.g. `head`, has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (Mistake, OSError) as error:         # OSError: a full disk, a missing permission
        _leave(f"error: {error}", 2)
    except (MemoryError, RuntimeError) as error:
        # by name, because torch.OutOfMemoryError cannot be named without importing torch
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        _leave("error: out of memory; lower --batch or --workers, or use a smaller number format "
               "(--bf16 true in train.py, --precision in data.py)", 2)
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def naming(path: str | os.PathLike):
    """Around the reading of a file: a Mistake that does not name the file begins with its name."""
    try:
        yield
    except Mistake as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def reason(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    return f"{type(error).__name__} {(str(error).strip().splitlines() or [''])[0]}".strip()


def _raise_stopped(number: int, frame) -> None:
    raise Stopped("stopped by SIGTERM; everything that was finished has been kept")


def _leave(sentence: str, status: int) -> None:
    print(printable(sentence, keep="\n"), file=sys.stderr)
    sys.exit(status)


def leave_quietly(number: int, frame) -> None:
    """A Ctrl-C while a command imports torch, which may swallow or wrap a KeyboardInterrupt."""
    os.write(2, b"stopped\n")
    os._exit(130)


# Commands import `support` before torch for this; `reported` brings Python's own handler back. A
# program of yours that imports these files keeps its handler.
_program = pathlib.Path(getattr(sys.modules["__main__"], "__file__", None) or "")
_home = pathlib.Path(__file__).parent.parent
if _program.resolve().parent in (_home, _home / "extras", _home / "clip2video"):
    signal.signal(signal.SIGINT, leave_quietly)
