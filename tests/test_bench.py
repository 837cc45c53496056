"""What extras/bench.py compares computes the same."""
import dataclasses

import pytest
import torch

import mmn
import train
from conftest import command
from extras import bench


def test_both_steps_have_the_same_losses():
    """Five layers, of which two are cropped; three videos with two sentences each."""
    config = dataclasses.replace(train.Config(), num_clips=8, frames=16, pool_counts=(3, 2),
                                 kernel=3, layers=5, hidden=12, joint=8, batch=3)
    (theirs, *_), (ours, *_) = (bench.one_step(published, config) for published in (True, False))
    assert len(ours) == 2 and torch.allclose(ours, theirs, atol=1e-5)
    with pytest.raises(AssertionError, match="x: the two ways differ by"):
        bench.same(ours + 0.1, theirs, "x")


def test_greedy_nms_of_one_query():
    """[0, 4) drops [0, 3) (IoU 0.75) and keeps [2, 6) (IoU 1/3)."""
    moments = torch.tensor([[0., 3.], [2., 6.], [0., 4.], [8., 9.]])
    kept = bench.greedy_nms(moments, torch.tensor([0.8, 0.7, 0.9, 0.1]), 2, 0.5)
    assert kept.tolist() == [[0, 4], [2, 6]]
    assert mmn.interval_iou(moments[0], moments[2]).item() == 0.75


def test_mistakes_are_one_sentence(tmp_path):
    for arguments, text in ((("speed",), "there is no benchmark 'speed'"),
                            (("text", "--annotations", tmp_path), "there is no annotation file")):
        assert text in command("-m", "extras.bench", *arguments, status=2)
