"""The baselines of bench.py compute what they are set against."""
import dataclasses
import pathlib
import subprocess
import sys

import torch

import bench
import mmn
import train

HERE = pathlib.Path(__file__).parent.parent
CPU = torch.device("cpu")


def test_the_published_algorithm_has_our_losses_and_gradients():
    """Five layers, of which two are cropped; three videos with two sentences each."""
    config = dataclasses.replace(train.Config(), num_clips=8, frames=16, pool_counts=(3, 2),
                                 kernel=3, layers=5, hidden=12, joint=8, batch=3)
    batch, results = bench.random_batch(config, CPU), []
    for losses in (bench.published_losses, bench.our_losses):
        model = bench.retriever_of(config, CPU)
        values = losses(model, *batch)
        sum(values).backward()
        results.append([*values, *(p.grad for name, p in model.named_parameters()
                                   if not name.startswith("convs") or "weight" in name)])
    for ours, theirs in zip(*results):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_greedy_nms_of_one_query():
    """[0, 4) drops [0, 3) (IoU 0.75) and keeps [2, 6) (IoU 1/3)."""
    moments = torch.tensor([[0., 3.], [2., 6.], [0., 4.], [8., 9.]])
    kept = bench.greedy_nms(moments, torch.tensor([0.8, 0.7, 0.9, 0.1]), 2, 0.5)
    assert kept.tolist() == [[0, 4], [2, 6]]
    assert mmn.interval_iou(moments[0], moments[2]).item() == 0.75


def test_mistakes_are_one_sentence(tmp_path):
    for arguments, status, text in ((("speed",), 2, "there is no bench 'speed'"),
                                    (("tokens", "--annotations", tmp_path), 2,
                                     "get them with: python data.py charades")):
        done = subprocess.run([sys.executable, "bench.py", *map(str, arguments)], cwd=HERE,
                              capture_output=True, text=True)
        assert done.returncode == status and text in done.stderr
        assert "Traceback" not in done.stderr
