"""Runs train.py with --resume again and again, in child processes that each receive a signal at a
random step, until one finishes; prints their exit statuses.

    stopped.py SIGNAL TIMES STEPS [options of train.py]     # the signal comes within STEPS steps"""
import os
import random
import sys

import torch

import train

torch.set_num_threads(1)
torch.empty(1, device="meta").normal_()     # imports torch._dynamo once instead of in each child
signal_number, times, steps_at_most, *options = sys.argv[1:]
draw, statuses = random.Random(0), []


def signal_at(step: int) -> None:
    """Sends the signal to this process in its `step`-th step."""
    steps, clip_gradients = 0, train.nn.utils.clip_grad_norm_

    def count(*arguments):
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), int(signal_number))
        return clip_gradients(*arguments)

    train.nn.utils.clip_grad_norm_ = count


while len(statuses) <= int(times):
    step = draw.randint(1, int(steps_at_most))
    child = os.fork()
    if not child:
        if len(statuses) < int(times):                  # the last one is left alone
            signal_at(step)
        sys.argv = ["train.py", *options, "--resume"]
        status = 1
        try:
            train.main()
            status = 0
        except SystemExit as error:
            status = error.code or 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if statuses[-1] == 0:
        break
print("statuses", *statuses)
