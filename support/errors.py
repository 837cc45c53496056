"""How a command ends. What the user can fix is a `Mistake`: one sentence, exit status 2. Anything
else is a bug and shows Python's traceback, exit status 1. Ctrl-C has exit status 130.
"""
import contextlib
import os
import sys

import torch

from support.text import printable


class Mistake(ValueError):
    """Something the user can fix. The message is one sentence that says what to do."""


class Missing(Mistake):
    """A file that another source may have: it is not in a folder, or could not be downloaded. Or a
    package that is not installed."""


@contextlib.contextmanager
def reported():
    """Wraps the whole of a command: turns exceptions into one sentence and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):      # escape what the terminal's encoding cannot show
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()                      # a closed pipe shows here, not at Python's exit
    except KeyboardInterrupt:
        _leave("interrupted; completed work has been saved", 130)
    except BrokenPipeError:                     # the reader of our output, e.g. `head`, has left
        # subtle: Python flushes stdout once more at its exit, which must not fail again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)                           # as a shell reports SIGPIPE
    except (Mistake, OSError) as error:         # OSError: a full disk, a missing permission
        _leave(f"error: {error}", 2)
    except (torch.OutOfMemoryError, MemoryError):
        _leave("error: out of memory; lower --batch of train.py, or use --device cpu", 2)


@contextlib.contextmanager
def naming(path: str | os.PathLike):
    """Around what reads the content of a file: a Mistake begins with the name of the file."""
    try:
        yield
    except Mistake as error:
        raise Mistake(f"{path}: {error}") from error


def reason(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__} {lines[0].strip()}"


def _leave(sentence: str, status: int) -> None:
    # the sentence may quote a file name or a line of somebody else's file
    print(printable(sentence, keep="\n"), file=sys.stderr)
    sys.exit(status)
