"""Several processes compute what one does (support/parallel.py)."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = ROOT / "tests" / "programs"


def torchrun(processes: int, *arguments, status: int = 0, stderr: bool = False) -> str:
    """What `processes` processes print on one machine; a single one runs without torchrun."""
    many = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            if processes > 1 else [])
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *many, *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, timeout=600, env=env, encoding="utf-8")
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if stderr else done.stdout


def difference(a, b) -> float:
    """Largest difference of two nested dictionaries of tensors, each as a share of its largest
    value, or of a millionth if that is larger. No gradient is zero."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max([difference(a[key], b[key]) for key in a], default=0.0)
    a, b = (torch.zeros(()) if x is None else x for x in (a, b))
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_two_processes_compute_the_losses_and_gradients_of_one(world, tmp_path, mode):
    """All terms of Eq. 11 over batches of 6, 5 and 1 videos (of which one process has 3, 2 and
    none), every gradient, and BatchNorm's statistics: equal to 1e-5, and no gradient is off by more
    than a hundredth of itself."""
    for processes in (1, 2):
        printed = torchrun(processes, PROGRAMS / "step.py", world, tmp_path / f"{processes}.pt",
                           mode)
        assert printed == "printed by 0\n"
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert [len(case["videos"]) for case in one.values()] == [6, 5, 1, 1]
    assert [len(case["videos"]) for case in two.values()] == [3, 2, 0, 0]
    assert all(video in one[name]["videos"] for name in two for video in two[name]["videos"])
    for name in one:
        for case in (one, two):         # BatchNorm subtracts these biases: their gradient is noise
            for key in [key for key in case[name]["gradients"] if mode == "training"
                        and "retriever.norms.0.weight" in case[name]["gradients"]
                        and key.startswith("retriever.convs") and key.endswith("bias")]:
                assert case[name]["gradients"].pop(key).abs().max() < 1e-4
        for part in ("terms", "gradients", "statistics"):
            small = 1e-2 if part == "gradients" else 1e-5
            assert difference(one[name][part], two[name][part]) < small, (name, part)
        for key, a in one[name]["gradients"].items():
            b = two[name]["gradients"][key]
            assert a is None or (a - b).abs().max() < 1e-5 * max(1, a.abs().max()), (name, key)
        assert all(g.abs().max() > 0 for key, g in one[name]["gradients"].items()
                   if key.startswith("retriever.iou"))


def test_a_run_of_two_processes_is_resumed_by_one(world, tmp_path):
    """Two epochs by two processes, the third by one: as three epochs by one, up to rounding, and
    one line of the log for each epoch."""
    options = ("--method", "vdi", "--root", world, "--epochs", 3, "--device", "cpu", "--batch", 7)
    torchrun(1, "train.py", *options, "--out", tmp_path / "whole")
    torchrun(2, PROGRAMS / "stop_after_save.py", 2, *options, "--out", tmp_path / "parts",
             status=1)
    printed = torchrun(1, "train.py", *options, "--out", tmp_path / "parts", "--resume")
    assert "resuming after epoch 2" in printed and not (tmp_path / "parts" / "2").exists()
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").open(encoding="utf-8")]
            for name in ("whole", "parts")]
    assert [[row["epoch"] for row in log] for log in logs] == [[1, 2, 3], [1, 2, 3]]
    for one, two in zip(*logs):
        for name in ("L_iou", "L_cl", "L_vc", "L_sd", "L"):
            assert one[name] == pytest.approx(two[name], rel=2e-2), (one["epoch"], name)


def test_the_sum_over_processes_by_itself():
    """x = 1 and 2: the sum of squares is 5 for both; with losses 1 * sum and 2 * sum its gradient
    in x is (1 + 2) * 2x. In processes that import nothing else."""
    assert "Warning" not in torchrun(2, PROGRAMS / "sum.py", stderr=True)
