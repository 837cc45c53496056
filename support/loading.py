"""Batches of a dataset, in order or shuffled, for one process or for each of several."""
import signal

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from support import parallel


class Loader(DataLoader):
    """A DataLoader whose batches may be exceptions, which it raises: torch would prepend a worker's
    traceback to the message of an exception that is raised in a worker."""

    def __iter__(self):
        for batch in super().__iter__():
            if isinstance(batch, Exception):
                raise batch
            yield batch


class Shares(BatchSampler):
    """Batches, of each of which a process gets its share."""

    def __iter__(self):
        return map(parallel.share, super().__iter__())


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C is for the process that trains, not for the workers that read features."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(items: Dataset, collate, size: int, generator: torch.Generator | None,
            workers: int, device: torch.device | str = "cpu") -> Loader:
    """Batches of `size` items: this process's share, shuffled; all of them in order without
    `generator`. For a GPU they lie in pinned memory, without which non_blocking copies wait."""
    pin = torch.device(device).type == "cuda"
    if generator is None:
        return Loader(items, size, collate_fn=collate, num_workers=workers, pin_memory=pin,
                      worker_init_fn=ignore_interrupts)
    order = RandomSampler(items, generator=generator)
    return Loader(items, batch_sampler=Shares(order, size, drop_last=False), generator=generator,
                  collate_fn=collate, num_workers=workers, pin_memory=pin,
                  worker_init_fn=ignore_interrupts)
