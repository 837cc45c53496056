"""Runs train.py and prints whether torch was restricted to deterministic algorithms."""
import torch

import train

train.main()
print("deterministic", torch.are_deterministic_algorithms_enabled())
