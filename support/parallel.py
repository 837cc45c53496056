"""Devices, and several processes that train as one.

    torchrun --nproc-per-node 8 train.py --dataset charades --device cuda

Every process holds all weights and computes the features of its own share of a batch. `gather`
concatenates the rows of all processes, so that each process computes the loss of the whole batch,
with all its negatives (Eq. 8) and pairs (Eq. 5). Gradients flow back into a process's own rows
only; `sum_gradients` adds them up, which is the gradient that one process would have computed.
Without torchrun all of this does nothing.
"""
import contextlib
import datetime
import os

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.errors import Mistake


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Mistake if it is not available: there is no silent fallback.
    Under torchrun, each process gets a GPU of its own. Sets the precision of float32 on a GPU."""
    available = [f"cuda:{i}" for i in range(torch.cuda.device_count())]     # best ones first
    if available and name in ("auto", "cuda"):              # the one that torchrun assigns
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        name = available[0]
    if name not in available:                   # "cuda" too, on a machine without a GPU
        raise Mistake(f"device {name!r} is not available; available: {', '.join(available)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)           # pinned memory and NCCL use the current one
        # without TF32, which drops 13 of 23 bits: results equal the CPU's up to rounding
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    return device


def rank() -> int:
    """The number of this process. Only number 0 writes and prints."""
    if size() > 1:
        return dist.get_rank()
    return 0


def size() -> int:
    """The number of processes."""
    if dist.is_available() and dist.is_initialized():       # not every build of torch has it
        return dist.get_world_size()
    return 1


@contextlib.contextmanager
def processes(device: torch.device, deterministic: bool = False):
    """Joins the processes that torchrun started; all but the first are silent inside the block."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS requires it
        torch.use_deterministic_algorithms(True)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:           # torchrun sets it
        yield
        return
    backend = "gloo"                            # between CPUs
    if device.type == "cuda":
        backend = "nccl"                        # between GPUs
    # one process may validate, or build the shapes world, while the others wait
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))
    try:
        if rank() == 0:
            yield
        else:
            with contextlib.redirect_stdout(None):
                yield
    finally:
        dist.destroy_process_group()


def wait() -> None:
    """Returns when all processes have arrived here."""
    if size() > 1:
        dist.barrier()


def share(rows) -> list:
    """This process's part of a list or tensor, possibly empty. Parts are contiguous, so that
    `gather` keeps the order."""
    bounds = np.linspace(0, len(rows), size() + 1).astype(int)      # sizes differ by one at most
    return rows[bounds[rank()]:bounds[rank() + 1]]


def everyone(value) -> list:
    """The values of all processes, in order: anything that can be pickled."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, [n, ...] -> [sum of n, ...]. Gradients reach this process's own
    rows only."""
    if size() == 1:
        return x
    # number of rows of each process
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    # all_gather needs tensors of one size, so each is padded to the longest
    sent = x.new_zeros((int(max(counts)),) + x.shape[1:])           # [most, ...]
    sent[:len(x)] = x.detach()
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent)
    parts = [part[:int(count)] for part, count in zip(received, counts)]
    parts[rank()] = x                           # what was received has no gradient
    return torch.cat(parts)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()                           # all_reduce overwrites its argument
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        dist.all_reduce(gradient)               # every process's loss depends on this sum
        return gradient


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, with gradients into all of them."""
    if size() == 1:
        return x
    return _Sum.apply(x)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes."""
    if size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        if p.grad is None:                      # a process without a video may not use all weights
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)                       # one transfer is faster than one per parameter
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
