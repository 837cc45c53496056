"""Raises an exception that is not the user's mistake, as a command would: bug.py TYPE."""
import sys

import torch

from support.errors import reported

with reported():
    if sys.argv[1] == "KeyError":
        {}["key"]
    if sys.argv[1] == "ValueError":
        int("ten")
    torch.ones(2) @ torch.ones(3)                       # RuntimeError
