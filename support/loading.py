"""Batches, read by worker processes while others train."""
import signal

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from support import parallel
from support.errors import Mistake


class Loader(DataLoader):
    """A DataLoader that raises the Mistake that a batch is, and a Mistake for a dead worker."""

    def __iter__(self):
        # torch imports a module for its first label; if a dead worker interrupts that, it logs a
        # traceback: so it is imported before there are workers
        with torch.profiler.record_function("batches"):
            pass
        try:
            for batch in super().__iter__():
                if isinstance(batch, Mistake):  # as a value, because torch rewrites exceptions
                    raise batch
                yield batch
        except RuntimeError as error:
            if not self.num_workers:
                raise
            raise Mistake("a process that reads features has died, perhaps because memory ran out; "
                          "lower --workers or --batch") from error


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
    more = dict(collate_fn=collate, num_workers=workers, worker_init_fn=ignore_interrupts,
                pin_memory=torch.device(device).type == "cuda")
    if generator is None:
        return Loader(items, size, **more)
    order = RandomSampler(items, generator=generator)
    return Loader(items, batch_sampler=Shares(order, size, drop_last=False), generator=generator,
                  **more)
