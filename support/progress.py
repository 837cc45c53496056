"""A training run in a folder: everything around the loop that is not the algorithm.

    run = Run(folder, config, model, optimiser, epochs, quality, resume=True)
    for epoch in run.epochs():
        for step, batch in run.steps(loader):
            ...
            run.add(losses)
        if run.end_epoch(metrics):                      # the best so far
            save_tensors(folder / "ckpt.pt", ...)

A run can be interrupted at any step and then ends with the same bits as one that was not: Ctrl-C
and SIGTERM finish the step and save, after SIGKILL the epoch starts again. The folder holds last.pt
(everything needed to resume), log.jsonl (a line for each epoch) and a lock.
"""
import contextlib
import json
import math
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import files, parallel
from support.errors import Mistake, Stopped, reason

try:
    import fcntl
except ImportError:                             # Windows
    fcntl = None

LOCK = "lock"
ELSEWHERE = ("device", "root", "out", "workers", "allow_missing")       # may change on resuming


class Signals:
    """Inside the block, the first SIGINT or SIGTERM is only recorded in `received`, so that the
    current step can be finished and saved; a second one stops at once."""

    def __init__(self):
        self.received = 0

    def __enter__(self) -> "Signals":
        try:
            self.before = {number: signal.signal(number, self.remember)
                           for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:                      # only the main thread can handle signals
            self.before = {}
        return self

    def remember(self, number: int, frame) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
        # a signal to the whole group also ends the DataLoader's workers; torch must not raise then
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        print("stopping after this step; press Ctrl-C again to stop at once", file=sys.stderr)

    def __exit__(self, *exception) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def locked(folder: pathlib.Path, resume: bool):
    """The folder of a run, for one process at a time. Mistake if it already holds a run that is not
    to be resumed, or if another process writes to it. The lock ends with the process."""
    if not resume and folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
        raise Mistake(f"{folder} already holds a run; continue it with --resume, or choose another "
                      f"--out")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"another process is writing to {folder}; wait for it, or choose another "
                          f"--out") from None
        for left in folder.glob(".*.tmp"):      # a killed process was writing these
            left.unlink()
        try:
            yield
        except BaseException:
            if [path.name for path in folder.iterdir()] == [LOCK]:      # nothing was written
                (folder / LOCK).unlink()
                folder.rmdir()
            raise


def same_configuration(theirs: dict, ours: dict, folder: pathlib.Path) -> None:
    """Mistake if the run in `folder` has another configuration than the one that resumes it."""
    different = [name for name in ours if name in theirs        # a newer field has its default
                 and theirs[name] != ours[name] and name not in ELSEWHERE]
    if different:
        raise Mistake(f"{folder} holds a run with another {', '.join(different)}; resume it with "
                      f"its own settings, or choose another --out")


class Run:
    """The state of a run, and what happens between the lines of its loop.

    config      plain values, which a resumed run must share
    quality     row of the log -> number, highest for the best epoch; None if it was not validated
    patience    epochs without a better one before the run stops
    reduced     True: a step whose gradient overflows is skipped and counted; False: it is an error

    `is_new` (attribute): nothing was resumed. The attributes of train.py's loop: `history` (a row
    for each finished epoch), `epoch` and `done` (steps of it that are behind us)."""

    def __init__(self, folder: pathlib.Path, config: dict, model: nn.Module,
                 optimiser: torch.optim.Optimizer, epochs: int, quality, patience: int = 10 ** 9,
                 resume: bool = False, reduced: bool = False, signals: Signals | None = None):
        self.folder, self.config, self.model, self.optimiser = folder, config, model, optimiser
        self.total, self.quality, self.patience, self.reduced = epochs, quality, patience, reduced
        self.signals, self.is_first = signals or Signals(), parallel.rank() == 0
        self.history, self.before = [], []
        self.epoch, self.done, self.skipped, self.sums = 0, 0, 0, {}
        self.is_new = not (resume and self._restore())
        if self.is_first and resume:
            self._rewrite_log()
        minutes = self.history[-1]["minutes"] if self.history else 0
        self.started = time.time() - 60 * minutes

    def _restore(self) -> bool:
        """Reads last.pt, if there is one."""
        path = self.folder / "last.pt"
        exists = parallel.everyone(path.exists())
        if len(set(exists)) > 1:
            raise Mistake(f"only some of the processes see {path}; give all machines the same "
                          f"folder")
        if not exists[0]:
            path = self.folder / "ckpt.pt"
            if not path.exists():
                return False
        saved = files.read_tensors(path)
        try:
            same_configuration(saved["config"], self.config, self.folder)
            if not exists[0]:
                return False
            self._set_state(saved)
        except Mistake:
            raise
        except Exception as error:      # torch raises several types for what does not fit
            raise Mistake(f"{path} is not of a run that can be resumed here: {reason(error)}; "
                          f"choose another --out") from error
        print(f"resuming after epoch {self.epoch}"
              + (f" and {self.done} steps" if self.done else ""))
        return True

    def _set_state(self, saved: dict) -> None:
        """Continues from the content of last.pt."""
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        device = next(self.model.parameters()).device
        torch.set_rng_state(saved["rng"])
        set_device_rng(device, saved.get("device rng", {}))
        self.history, self.before = saved["history"], saved["before"]
        self.epoch, self.done, self.skipped = saved["epoch"], saved["done"], saved["skipped"]
        self.sums = {name: value.to(device) for name, value in saved["sums"].items()}
        json.dumps([float(row["minutes"]) for row in self.history] + self.before)
        self.best_epoch()

    def _rewrite_log(self) -> None:
        """Drops what a killed run logged after its last checkpoint: it will be logged again."""
        rows = (*self.before, *self.history)
        files.save(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save(self) -> None:
        """Writes last.pt: everything needed to continue with the same bits."""
        if self.is_first:
            files.save_tensors(self.folder / "last.pt", {
                "config": self.config, "epoch": self.epoch, "done": self.done,
                "skipped": self.skipped, "sums": self.sums, "history": self.history,
                "before": self.before, "model": self.model.state_dict(),
                "optimiser": self.optimiser.state_dict(), "rng": torch.get_rng_state(),
                "device rng": device_rng(next(self.model.parameters()).device)})

    def begin_with(self, rows: list[dict]) -> None:
        """Logs and saves what was done before the first epoch (stage 1 of vdi-staged)."""
        self.before = rows
        if self.is_first:
            self._rewrite_log()
            self.save()

    def stop_if_asked(self, sentence: str = "", save: bool = True) -> None:
        """Ends the run, in all processes alike, if one of them received a signal."""
        if any(parallel.everyone(self.signals.received)):
            if save:
                self.save()
            raise Stopped(sentence or f"stopped after {self.done} steps of epoch {self.epoch + 1}; "
                          f"continue with --resume", self.signals.received or signal.SIGTERM)

    def epochs(self):
        """The numbers of the epochs that are left, from 0, for as long as patience lasts."""
        for self.epoch in range(self.epoch, self.total):
            if len(self.history) - self.best_epoch() >= self.patience:
                return
            yield self.epoch
            # after the loop body has saved a better checkpoint, so that no crash can lose it
            self.epoch += 1
            self.save()

    def steps(self, loader):
        """(step, batch) of the steps of this epoch that are left."""
        self.waited_sec, self.length = 0.0, len(loader)
        bar = tqdm(loader, desc=f"epoch {self.epoch + 1}", leave=False,
                   disable=not self.is_first or None)
        ready = self.epoch_started = time.perf_counter()
        for step, batch in enumerate(self._until_stopped(bar)):
            if step < self.done:                        # done before the run was interrupted
                ready = self.epoch_started = time.perf_counter()
                continue
            self.waited_sec += time.perf_counter() - ready
            self.batch = batch
            yield step, batch
            self.done = step + 1
            self.stop_if_asked()
            ready = time.perf_counter()
        self.stop_if_asked()

    def _until_stopped(self, batches):
        """All batches, or those up to a signal that also ended the workers that read them."""
        try:
            yield from batches
        except (RuntimeError, Mistake):
            if not self.signals.received:
                raise

    def is_finite(self, losses: dict[str, Tensor], norm: Tensor) -> bool:
        """Are the losses and the norm of the gradient finite? If not, the run stops, naming the
        term and the videos. In reduced precision a step is skipped if only the norm is not."""
        values = {**losses, "the gradient's norm": norm}
        # subtle: a GPU runs ahead of Python until Python reads a value, so all are read at once
        finite = torch.stack([value.detach().isfinite() for value in values.values()]).tolist()
        for (name, value), good in zip(values.items(), finite):
            if not good and (name in losses or not self.reduced):
                self._fail(name, value)
        self.skipped += not finite[-1]
        return finite[-1]

    def _fail(self, name: str, value: Tensor) -> None:
        path = self.folder / f"nonfinite-{parallel.rank()}.pt"
        videos = [video for part in parallel.everyone(self.batch.videos) for video in part]
        files.save_tensors(path, {"term": name, "batch": self.batch._asdict()})
        raise Mistake(f"{name} is {value.item()} for the videos {', '.join(videos)}; the batch was "
                      f"saved to {path}; check its features, or lower --lr")

    def add(self, values: dict[str, Tensor]) -> None:
        """Adds this step's values to the means of the epoch."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def end_epoch(self, metrics: dict[str, float]) -> bool:
        """Logs the epoch; `metrics` are the first process's. Is it the best so far, and is this the
        process that saves it?"""
        row = {"epoch": self.epoch + 1}
        if self.skipped:
            row["skipped"] = self.skipped
        row |= {name: float(value / self.length) for name, value in self.sums.items()}
        row["data %"] = 100 * self.waited_sec / (time.perf_counter() - self.epoch_started)
        row |= metrics | {"minutes": (time.time() - self.started) / 60}
        self.history.append(row := parallel.everyone(row)[0])
        self.done, self.sums, self.skipped = 0, {}, 0
        if not self.is_first:
            return False
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        return self.best_epoch() == len(self.history)

    def best_epoch(self) -> int:
        """The epoch (from 1) of the highest quality, the first of several; without validation the
        last."""
        qualities = [self.quality(row) for row in self.history]
        if not qualities or qualities[0] is None:
            return len(qualities)
        return 1 + qualities.index(max(qualities))


def device_rng(device: torch.device) -> dict[str, Tensor]:
    """The state of a device's own random generator, which dropout uses, by kind of device. That of
    the CPU is torch's."""
    if device.type == "cpu":
        return {}
    return {device.type: torch.get_device_module(device).get_rng_state()}


def set_device_rng(device: torch.device, states: dict[str, Tensor]) -> None:
    """Restores it, if the run was on this kind of device."""
    if device.type in states:
        torch.get_device_module(device).set_rng_state(states[device.type])


def cosine(progress: float) -> float:
    """A half cosine from 1 at progress 0 to 0 at progress 1, for learning rates."""
    return (1 + math.cos(math.pi * progress)) / 2


def versions() -> dict[str, str]:
    """What a result depends on besides its configuration."""
    commit, program = "", pathlib.Path(sys.argv[0])
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                               cwd=pathlib.Path(__file__).parent)
        commit = asked.stdout.strip()
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "platform": platform.platform(), "commit": commit,
            "command": " ".join([f"{program.parent.name}/{program.name}", *sys.argv[1:]])}


def environment(device: torch.device) -> str:
    """The same in a line."""
    made = versions()
    return (f"python {made['python']}  torch {made['torch']}  commit "
            f"{made['commit'][:12] or 'unknown'}  {device}  {torch.get_num_threads()} threads")
