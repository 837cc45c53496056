"""Prints a line to stderr when the main program begins to import torch. Python runs this file at
its start if the folder is on PYTHONPATH."""
import sys


def announce(event, arguments):
    if event == "import" and arguments[0] == "torch":
        print("importing torch", file=sys.stderr, flush=True)


sys.addaudithook(announce)
