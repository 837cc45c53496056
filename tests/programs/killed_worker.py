"""Runs train.py; the first process that reads features is killed, as by a system without memory."""
import os
import signal

import torch

import data
import train

features = data.Videos.features


def killed(self, i, kind):
    if torch.utils.data.get_worker_info() is not None:
        os.kill(os.getpid(), signal.SIGKILL)
    return features(self, i, kind)


data.Videos.features = killed
train.main()
