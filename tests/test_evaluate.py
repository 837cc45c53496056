"""evaluate.py: the metrics by hand and against loops, and their limits."""
import pytest
import torch

import evaluate
from support import parallel, text


def test_recall_by_hand():
    """Truth [0, 10). First answers [0, 5): 0.5 exactly, a hit at 0.5; [0, 8): 0.8; [20, 30): 0. Of
    the last the second answer is perfect. R@1: 2/3 at 0.5, 1/3 at 0.7; R@5: 1 and 2/3; mIoU (0.5 +
    0.8 + 0) / 3."""
    predicted = torch.tensor([[[0., 5.], [20., 30.]], [[0., 8.], [0., 1.]],
                              [[20., 30.], [0., 10.]]])
    result = evaluate.recall(predicted, torch.tensor([[0., 10.]] * 3))
    assert result == pytest.approx({"R@1,IoU=0.5": 200 / 3, "R@1,IoU=0.7": 100 / 3,
                                    "R@5,IoU=0.5": 100,
                                    "R@5,IoU=0.7": 200 / 3, "mIoU": 130 / 3})


def test_recall_against_loops():
    generator = torch.Generator().manual_seed(0)
    predicted = (torch.rand(50, 5, 2, generator=generator) * 30).sort(2)[0]
    truth = (torch.rand(50, 2, generator=generator) * 30).sort(1)[0]
    result = evaluate.recall(predicted, truth, (1, 3, 5), (0.1, 0.3))
    for k in (1, 3, 5):
        for mu in (0.1, 0.3):
            hits = 0
            for s in range(50):
                ious = []
                for a, b in predicted[s, :k].tolist():
                    c, d = truth[s].tolist()
                    overlap = max(0, min(b, d) - max(a, c))
                    ious.append(overlap / (b - a + d - c - overlap))
                hits += max(ious) >= mu
            assert result[f"R@{k},IoU={mu}"] == pytest.approx(100 * hits / 50)


def test_limits_of_recall():
    truth = torch.tensor([[1., 4.], [0., 2.]])
    perfect = evaluate.recall(truth[:, None], truth)
    assert set(perfect.values()) == {100.0}                     # one moment each, though k = 5
    nothing = evaluate.recall(torch.zeros(2, 5, 2), truth)
    assert set(nothing.values()) == {0.0}                               # empty moments hit nothing


def test_prior_and_random_moment_by_hand():
    """Two sentences, three cells. Cell 1 hits both at 0.5, cells 0 and 2 one each. A random cell
    hits 4 of 6."""
    iou = torch.tensor([[0.9, 0.6, 0.1], [0.2, 0.5, 0.8]])
    assert evaluate.best_prior(iou) == 1
    assert evaluate.baseline_metrics(iou)["R@1,IoU=0.5"] == pytest.approx(400 / 6)
    assert evaluate.baseline_metrics(iou[:, 1])["mIoU"] == pytest.approx(55)


def test_a_device_that_is_not_there_is_an_error():
    assert parallel.pick_device("cpu") == torch.device("cpu")
    for name in ("nonsense", *(() if torch.cuda.is_available() else ("cuda", "cuda:1"))):
        with pytest.raises(ValueError, match="is not available"):
            parallel.pick_device(name)


def test_over_runs_by_hand():
    """60 and 70: mean 65, standard deviation sqrt(50) = 7.1."""
    runs = [{"test": {"queries": 5, "mIoU": value, "best prior": {}}} for value in (60.0, 70.0)]
    assert "65.0 +- 7.1" in text.over_runs(runs)


def test_means_over_runs_of_different_splits():
    one = {"test": {"mIoU": 40.0, "noun accuracy": 90.0}}
    two = {"test": {"mIoU": 42.0}, "val": {"mIoU": 1.0}}
    for runs in ([one, two], [two, one]):
        printed = text.over_runs(runs)
        assert "41.0 +- 1.4" in printed and "noun" not in printed
    assert "no split" in text.over_runs([one, {"val": {"mIoU": 1.0}}])
