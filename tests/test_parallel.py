"""Several processes do what one does."""
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent.parent

STEP = """
import sys, torch
import clip, data, parallel, parse, train
world, out, training = sys.argv[1], sys.argv[2], sys.argv[3] == "training"
torch.set_num_threads(1)
results = {}
with parallel.processes(torch.device("cpu")):
    for count, changes in ((6, {}), (5, dict(sequence="lstm", layers=4, context_query="none")),
                           (1, {}), (1, dict(sequence="lstm")), (5, dict(retriever="2d-tan")),
                           (1, dict(retriever="2d-tan"))):
        config = train.Config(**{"dataset": "shapes", **train.preset("shapes"), "root": world,
                                 "method": "vdi", "lambda_sd": 1.0, **changes})
        store = data.open_store("shapes", "shapes", world)
        videos = data.Videos(data.read_annotations("shapes", "train", world), store, 16,
                             parse.Parser("rules"), True)
        torch.manual_seed(0)
        text = clip.build_text(clip.read_state(f"{world}/shapes/clip.pt"))
        model = train.Model(config, text, store.manifest).train(training)
        batch = next(iter(videos.batches(count, torch.Generator().manual_seed(5))))
        terms, spread = train.terms(model, batch, config)
        train.total_loss(terms, config, 0).backward()
        parallel.sum_gradients(model)
        results[f"{count} {changes}"] = {
            "videos": batch.videos, "terms": terms, "spread": spread,
            "gradients": {name: p.grad for name, p in model.named_parameters()},
            "statistics": {name: b for name, b in model.named_buffers() if "running" in name}}
    if parallel.rank() == 0:
        torch.save(results, out)
    print("printed by", parallel.rank())
"""


def torchrun(processes: int, *arguments, status: int = 0) -> str:
    """What `processes` processes print on one machine, without torchrun where it is one."""
    many = (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
            if processes > 1 else [])
    done = subprocess.run([sys.executable, *many, *map(str, arguments)], cwd=HERE, text=True,
                          capture_output=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def difference(a, b) -> float:
    """Largest difference of two nested dictionaries of tensors, each as a share of its largest
    value, or of a millionth where that is larger. No gradient is zero."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        return max([difference(a[key], b[key]) for key in a], default=0.0)
    a, b = (torch.zeros(()) if x is None else x for x in (a, b))
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-6)).item()


@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_two_processes_compute_the_losses_and_gradients_of_one(world, tmp_path, mode):
    """All terms of Eq. 11 over batches of 6, 5 and 1 videos (of which one process has 3, 2 and
    none), every gradient, and BatchNorm's statistics: equal to 1e-5, and no gradient is off by a
    hundredth of itself."""
    (tmp_path / "step.py").write_text(STEP)
    for processes in (1, 2):
        printed = torchrun(processes, tmp_path / "step.py", world, tmp_path / f"{processes}.pt",
                           mode)
        assert printed == "printed by 0\n"
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    assert [len(case["videos"]) for case in one.values()] == [6, 5, 1, 1, 5, 1]
    assert [len(case["videos"]) for case in two.values()] == [3, 2, 0, 0, 2, 0]
    assert all(video in one[name]["videos"] for name in two for video in two[name]["videos"])
    for name in one:
        for case in (one, two):                 # what BatchNorm takes off has no gradient but noise
            for key in [key for key in case[name]["gradients"] if mode == "training"
                        and "retriever.norms.0.weight" in case[name]["gradients"]
                        and key.startswith("retriever.convs") and key.endswith("bias")]:
                assert case[name]["gradients"].pop(key).abs().max() < 1e-4
        for part in ("terms", "spread", "gradients", "statistics"):
            small = 1e-2 if part == "gradients" else 1e-5
            assert difference(one[name][part], two[name][part]) < small, (name, part)
        for key, a in one[name]["gradients"].items():
            b = two[name]["gradients"][key]
            assert a is None or (a - b).abs().max() < 1e-5 * max(1, a.abs().max()), (name, key)
        assert all(g.abs().max() > 0 for key, g in one[name]["gradients"].items()
                   if key.startswith("retriever.iou"))


def test_a_run_of_two_processes_goes_on_with_one(world, tmp_path):
    """Two epochs by two processes, the third by one: as three epochs by one, up to rounding, and
    one line an epoch."""
    options = ("--method", "vdi", "--root", world, "--epochs", 3, "--device", "cpu", "--batch", 7)
    torchrun(1, "train.py", *options, "--out", tmp_path / "whole")
    script = tmp_path / "killed.py"
    script.write_text("import train\n"
                      "keep = train.save\n"
                      "def stop(path, content):\n"
                      "    keep(path, content)\n"
                      "    if path.name == 'last.pt' and content['epoch'] == 2:\n"
                      "        raise SystemExit(1)\n"
                      "train.save = stop\n"
                      "train.main()\n")
    torchrun(2, script, *options, "--out", tmp_path / "parts", status=1)
    printed = torchrun(1, "train.py", *options, "--out", tmp_path / "parts", "--resume")
    assert "continuing after epoch 2" in printed and not (tmp_path / "parts" / "2").exists()
    logs = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("whole", "parts")]
    assert [[row["epoch"] for row in log] for log in logs] == [[1, 2, 3], [1, 2, 3]]
    for one, two in zip(*logs):
        for name in ("L_iou", "L_cl", "L_vc", "L_sd", "L"):
            assert one[name] == pytest.approx(two[name], rel=2e-2), (one["epoch"], name)


def test_the_sum_over_processes_by_itself(tmp_path):
    """x = 1 and 2: the sum of squares is 5 for both; with losses 1 * sum and 2 * sum its gradient
    in x is (1 + 2) * 2x. In processes that import nothing else."""
    (tmp_path / "sum.py").write_text(
        "import torch, parallel\n"
        "with parallel.processes(torch.device('cpu')):\n"
        "    k = parallel.rank() + 1\n"
        "    x = torch.tensor([float(k)], requires_grad=True)\n"
        "    y = parallel.total(x * x)\n"
        "    (k * y).sum().backward()\n"
        "    assert y.item() == 5 and x.grad.item() == 6 * k, (k, y, x.grad)\n")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node", "2",
                           str(tmp_path / "sum.py")], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
