"""Runs train.py and sends SIGINT to its whole process group, as a terminal does, in the second
epoch, at a step by which both workers that read features have begun."""
import os
import signal

import train
from support import progress

steps = progress.Run.steps


def interrupted(self, loader):
    for step, batch in steps(self, loader):
        if self.epoch == 1 and step == 2:
            os.killpg(0, signal.SIGINT)
        yield step, batch


progress.Run.steps = interrupted
train.main()
