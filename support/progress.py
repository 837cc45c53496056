"""A training run in a folder: everything around the loop that is not the algorithm.

    run = Run(folder, config, model, optimiser, epochs, quality, resume=True)
    for epoch in run.epochs():
        for step, batch in run.steps(loader):
            ...
            run.add(losses, loss, norm)
        if run.end_epoch(metrics):                      # the best so far
            save_tensors(folder / "ckpt.pt", ...)
        run.save()

A run is saved at the end of every epoch. One that was stopped at any point continues from there
and ends with the same bits as one that was not. The folder holds last.pt (everything needed to
resume) and log.jsonl (a line for each epoch).
"""
import json
import math
import pathlib
import platform
import shutil
import subprocess
import sys
import time

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from support import files, parallel
from support.errors import Mistake, reason

ELSEWHERE = ("device", "root", "out", "workers", "allow_missing")       # may change on resuming


def new_folder(folder: pathlib.Path, resume: bool) -> None:
    """Mistake if the folder of a run already holds one that is not to be resumed. It is created
    with its first file, so that a run which fails before leaves nothing behind."""
    if folder.is_file():
        raise Mistake(f"{folder} is a file; name a folder with --out")
    if not resume and folder.exists() and any(folder.iterdir()):
        raise Mistake(f"{folder} already holds a run; continue it with --resume, or choose another "
                      f"--out")
    for leftover in folder.glob(".*.tmp"):      # a killed process was writing these
        leftover.unlink()


def same_configuration(theirs: dict, ours: dict, folder: pathlib.Path) -> None:
    """Mistake if the run in `folder` has another configuration than the one that resumes it."""
    different = [name for name in ours if name in theirs        # a newer field has its default
                 and theirs[name] != ours[name] and name not in ELSEWHERE]
    if different == ["data"]:
        raise Mistake(f"the sentences or features have changed since the run in {folder} began; "
                      f"choose another --out")
    if different:
        raise Mistake(f"{folder} holds a run with another {', '.join(different)}; resume it with "
                      f"its own settings, or choose another --out")


class Run:
    """The state of a run, and what happens between the lines of its loop.

    config      plain values, which a resumed run must share
    quality     row of the log -> number, highest for the best epoch; None if it was not validated
    patience    epochs without a better one before the run stops

    Attributes: `is_new` (nothing was resumed), `history` (rows of the log, one for each finished
    epoch), `before` (rows logged before the first epoch), `is_first` (this process logs)."""

    def __init__(self, folder: pathlib.Path, config: dict, model: nn.Module,
                 optimiser: torch.optim.Optimizer, epochs: int, quality,
                 patience: int = 10 ** 9, resume: bool = False):
        self.folder = folder
        self.config = config
        self.model = model
        self.optimiser = optimiser
        self.total = epochs
        self.quality = quality
        self.patience = patience
        self.is_first = parallel.rank() == 0
        self.history = []
        self.before = []
        self.is_new = True
        if resume:
            self.is_new = not self._restore()
        minutes = self.history[-1]["minutes"] if self.history else 0
        self.started = time.time() - 60 * minutes

    @property
    def epoch(self) -> int:
        """How many epochs are finished."""
        return len(self.history)

    def _restore(self) -> bool:
        """Reads last.pt, if there is one."""
        path = self.folder / "last.pt"
        exists = parallel.everyone(path.exists())
        if len(set(exists)) > 1:
            raise Mistake(f"only some of the processes see {path}; give all machines the same "
                          f"folder")
        if not exists[0]:
            if not (self.folder / "ckpt.pt").exists():
                return False
            path = self.folder / "ckpt.pt"      # a finished run, whose last.pt was removed
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
        print(f"resuming after epoch {self.epoch}")
        return True

    def _set_state(self, saved: dict) -> None:
        """Continues from the content of last.pt."""
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["rng"])
        set_device_rng(next(self.model.parameters()).device, saved["device rng"])
        self.history = saved["history"]
        self.before = saved["before"]
        # a damaged file fails here, not after an epoch of training
        json.dumps([float(row["minutes"]) for row in self.history] + self.before)
        self.best_epoch()

    def _write_log(self) -> None:
        rows = self.before + self.history
        files.save(self.folder / "log.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    def save(self) -> None:
        """Writes last.pt: everything needed to continue with the same bits. At the end of an epoch
        after a better checkpoint, so that no crash can lose it."""
        if not self.is_first:
            return
        device = next(self.model.parameters()).device
        files.save_tensors(self.folder / "last.pt", {
            "config": self.config, "epoch": self.epoch, "history": self.history,
            "before": self.before, "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(), "rng": torch.get_rng_state(),
            "device rng": device_rng(device)})

    def begin_with(self, rows: list[dict]) -> None:
        """Logs and saves what was done before the first epoch (stage 1 of vdi-staged)."""
        self.before = rows
        if self.is_first:
            self._write_log()
            self.save()

    def epochs(self):
        """The numbers of the remaining epochs, from 0, for as long as patience lasts."""
        while self.epoch < self.total and self.epoch - self.best_epoch() < self.patience:
            yield self.epoch

    def steps(self, loader):
        """(step, batch) of this epoch."""
        self.sums = {}
        self.length = len(loader)
        self.waited_sec = 0.0           # for the loader
        bar = tqdm(loader, desc=f"epoch {self.epoch + 1}", leave=False,
                   disable=not self.is_first or None)
        self.epoch_started = ready = time.perf_counter()
        for step, batch in enumerate(bar):
            self.waited_sec += time.perf_counter() - ready
            self.batch = batch
            yield step, batch
            ready = time.perf_counter()

    def add(self, losses: dict[str, Tensor], loss: Tensor, norm: Tensor) -> None:
        """Adds the terms of this step and their total to the means of the epoch. Mistake, naming
        the term and the videos, if one of them or the norm of the gradient is not finite."""
        values = losses | {"L": loss}
        checked = values | {"the gradient's norm": norm}
        # subtle: a GPU runs ahead of Python until Python reads a value, so all are read at once
        finite = torch.stack([value.detach().isfinite() for value in checked.values()]).tolist()
        for name, is_finite in zip(checked, finite):
            if not is_finite:
                path = self.folder / f"nonfinite-{parallel.rank()}.pt"
                files.save_tensors(path, {"term": name, "batch": self.batch._asdict()})
                raise Mistake(f"{name} is {checked[name].item()} for the videos "
                              f"{', '.join(self.batch.videos)}; the batch was saved to {path}; "
                              f"check its features, or lower --lr")
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach()

    def end_epoch(self, metrics: dict[str, float]) -> bool:
        """Logs the epoch; `metrics` are the first process's. Returns whether it is the best so far
        and this process is the one that saves it."""
        row = {"epoch": self.epoch + 1}
        for name, value in self.sums.items():
            row[name] = float(value / self.length)
        row["data %"] = 100 * self.waited_sec / (time.perf_counter() - self.epoch_started)
        row.update(metrics)
        row["minutes"] = (time.time() - self.started) / 60
        row = parallel.everyone(row)[0]         # patience must agree in all processes
        self.history.append(row)
        if not self.is_first:
            return False
        # all of it: a killed run may have logged an epoch that it had not saved
        self._write_log()
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        return self.best_epoch() == len(self.history)

    def best_epoch(self) -> int:
        """The epoch (from 1) of the highest quality, the first of several; the last one without
        validation."""
        qualities = [self.quality(row) for row in self.history]
        if not qualities or qualities[0] is None:
            return len(qualities)
        return 1 + qualities.index(max(qualities))


def device_rng(device: torch.device) -> dict[str, Tensor]:
    """The state of a device's own random generator, by kind of device (torch's is the CPU's)."""
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
    commit = ""
    if shutil.which("git"):
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                               encoding="utf-8", cwd=pathlib.Path(__file__).parent)
        commit = asked.stdout.strip()
    program = pathlib.Path(sys.argv[0])
    # a full path is that of one machine
    words = [pathlib.Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    command = " ".join([f"{program.parent.name}/{program.name}"] + words)
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "platform": platform.platform(), "commit": commit,
            "command": command}


def environment(device: torch.device) -> str:
    """The versions, the device and the number of threads in one line."""
    made = versions()
    return (f"python {made['python']}  torch {made['torch']}  numpy {made['numpy']}  commit "
            f"{made['commit'][:12] or 'unknown'}  {device}  {torch.get_num_threads()} threads")
