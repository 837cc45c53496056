"""Devices, and many processes that train as one.

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
import sys

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from support.errors import Mistake


def number_from(variable: str, default: int) -> int:
    """RANK or WORLD_SIZE, as torchrun sets it. Mistake if it cannot be one."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < default:
        raise Mistake(f"the environment variable {variable} must be a number as torchrun sets it, "
                      f"not {text!r}; unset it")
    return int(text)


def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Mistake if it is not available: there is no silent fallback.
    Under torchrun, each process gets a GPU of its own. Sets the precision of float32 on a GPU."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    available = [*gpus, "cpu"]
    if torch.backends.mps.is_available():
        available.insert(len(gpus), "mps")
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name == "auto":
        name = own if gpus else available[0]
    elif name == "cuda":
        name = own if gpus else "cuda"
    if name not in available:
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
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def size() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def processes(device: torch.device, deterministic: bool = False):
    """Joins the processes that torchrun started; all but the first are silent inside the block."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if number_from("WORLD_SIZE", 1) == 1:
        yield
        return
    # one process may validate, or build the shapes world, while the others wait
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                            timeout=datetime.timedelta(hours=2))
    try:
        with open(os.devnull, "w") as silence, contextlib.redirect_stdout(
                silence if rank() else sys.stdout):
            yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def connected():
    """Around every exchange between processes: it fails when another process has ended."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise Mistake("another process of torchrun has stopped; its message says why") from error


def wait() -> None:
    """Returns when all processes have arrived here."""
    if size() > 1:
        with connected():
            dist.barrier()


def share(rows) -> list:
    """This process's part of a list or tensor, possibly empty. Parts are contiguous, so that
    `gather` keeps the order."""
    bounds = np.linspace(0, len(rows), size() + 1).astype(int)
    return rows[bounds[rank()]:bounds[rank() + 1]]


def everyone(value) -> list:
    """The values of all processes, in order: anything that can be pickled."""
    if size() == 1:
        return [value]
    values = [None] * size()
    with connected():
        dist.all_gather_object(values, value)
    return values


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, [n, ...] -> [sum of n, ...]. Gradients reach this process's own
    rows only."""
    if size() == 1:
        return x
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(size())]
    with connected():
        dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    most = int(max(counts))
    sent = x.detach().new_zeros(most, *x.shape[1:])
    sent[:len(x)] = x.detach()
    # as bytes, because not every backend can send every type
    sent = sent.contiguous().view(most, -1).view(torch.uint8)
    parts = [torch.empty_like(sent) for _ in counts]
    with connected():
        dist.all_gather(parts, sent)
    parts = [part.view(x.dtype).view(most, *x.shape[1:])[:int(n)] for part, n in zip(parts, counts)]
    parts[rank()] = x
    return torch.cat(parts)


def _all_reduce(x: Tensor) -> Tensor:
    with connected():
        dist.all_reduce(x)
    return x


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return _all_reduce(x.clone())

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _all_reduce(gradient.clone())    # every process's loss depends on this sum


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, with gradients into all of them."""
    return x if size() == 1 else _Sum.apply(x)


def sum_gradients(model: nn.Module) -> None:
    """Adds up the gradients of all processes, in one transfer."""
    if size() == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])
    _all_reduce(flat)
    for p, gradient in zip(parameters, flat.split([p.numel() for p in parameters])):
        p.grad = gradient.view_as(p)
