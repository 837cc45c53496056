"""How do many processes train as one?

    torchrun --nproc-per-node 8 train.py --dataset charades --device cuda

Every process holds all weights and computes the rows of its own share of a batch: features of its
videos, of their sentences. `gather` puts the rows of all processes together, so that each computes
the loss of the whole batch, with all its negatives (Eq. 8) and pairs (Eq. 5). Each then sends that
loss back into its own rows only; `sum_gradients` adds up what they found, which is the gradient
that one process would have computed. Without torchrun nothing here does anything.
"""
import contextlib
import datetime
import os
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    """Which process this is. Number 0 alone writes and prints."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def processes(device: torch.device):
    """Joins the processes that torchrun started, for the time of the block, in which all but the
    first are silent. Each takes a GPU of its own where `device` is one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # one process may validate, or build the shapes world, while the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=2))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(
                nowhere if rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Until all processes are here."""
    if size() > 1:
        dist.barrier()


def share(rows) -> list:
    """This process's part of a list or tensor, maybe empty: neighbours, so `gather` keeps order."""
    bounds = np.linspace(0, len(rows), size() + 1).astype(int)
    return rows[bounds[rank()]:bounds[rank() + 1]]


def everyone(value) -> list:
    """The values of all processes, in order: anything that can be pickled."""
    if size() == 1:
        return [value]
    values = [None] * size()
    dist.all_gather_object(values, value)
    return values


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, [n, ...] -> [sum of n, ...]. Gradients flow into one's own."""
    if size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = int(max(counts))
    sent = x.detach().new_zeros(most, *x.shape[1:])
    sent[:len(x)] = x.detach()
    # bytes, because not every backend can send every type
    sent = sent.contiguous().view(most, -1).view(torch.uint8)
    parts = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(parts, sent)
    parts = [part.view(x.dtype).view(most, *x.shape[1:])[:int(n)] for part, n in zip(parts, counts)]
    parts[rank()] = x
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)               # what the rows of every process did with the sum
        return gradient


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, with gradients into all of them."""
    return x if size() == 1 else _Sum.apply(x)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, in one transfer."""
    if size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    every = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                       for p in parameters])
    dist.all_reduce(every)
    for p, gradient in zip(parameters, every.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
