"""Prints "running" to stderr when Python begins to run the main program: put this folder on
PYTHONPATH. What happens before that is Python's own start."""
import sys


def announce(event, _):
    if event in ("cpython.run_file", "cpython.run_module"):
        print("running", file=sys.stderr, flush=True)


sys.addaudithook(announce)
