"""Checks parallel.total and its gradient in two processes that import nothing else."""
import torch

from support import parallel

with parallel.processes(torch.device("cpu")):
    k = parallel.rank() + 1
    x = torch.tensor([float(k)], requires_grad=True)
    y = parallel.total(x * x)
    (k * y).sum().backward()
    assert y.item() == 5 and x.grad.item() == 6 * k, (k, y, x.grad)
