"""evaluate.py: the metrics by hand and against loops, and their limits."""
import json
import pathlib

import pytest
import torch

import data
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
    assert evaluate.cell_recall(iou)["R@1,IoU=0.5"] == pytest.approx(400 / 6)
    assert evaluate.cell_recall(iou[:, 1])["mIoU"] == pytest.approx(55)


def test_a_device_that_is_not_there_is_an_error():
    assert parallel.pick_device("cpu") == torch.device("cpu")
    for name in ("nonsense", *(() if torch.cuda.is_available() else ("cuda", "cuda:1"))):
        with pytest.raises(ValueError, match="is not available"):
            parallel.pick_device(name)


def test_over_runs_by_hand():
    """60 and 70: mean 65, standard deviation sqrt(50) = 7.1."""
    runs = [{"test": {"queries": 5, "mIoU": value, "best prior": {}}} for value in (60.0, 70.0)]
    assert "65.0 +- 7.1" in text.over_runs(runs)


# ----------------------------------------------------------------------- predictions of any system

GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_scores_of_predictions_are_the_golden_ones():
    """tests/golden/make_predictions.py computes them by plain loops."""
    scores = evaluate.score_predictions(
        evaluate.read_rows(GOLDEN / "predictions.jsonl", "pred_relevant_windows"),
        evaluate.read_rows(GOLDEN / "truth.jsonl", "relevant_windows"))
    assert scores == pytest.approx(json.loads((GOLDEN / "predictions.json").read_text()), abs=1e-6)


def test_average_precision_by_hand():
    """Two true moments; the answers hit the first, miss, hit the second: precision 1, 1/2, 2/3 at
    recall 1/2, 1/2, 1, so 1/2 * 1 + 1/2 * 2/3 = 0.8333. A second hit of a moment that is taken is a
    miss: 1/2 * 1."""
    truth = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    hit, miss, other = [0.0, 10.0], [40.0, 50.0], [20.0, 30.0]
    for answers, value in (([hit, miss, other], 5 / 6), ([hit, hit], 0.5), ([miss], 0.0),
                           ([other, hit], 1.0)):
        assert evaluate.average_precision(torch.tensor(answers), truth, 0.5) == pytest.approx(value)


def test_the_published_metrics_of_moment_detr(published):
    """Its sample predictions on QVHighlights' validation split, against its own evaluator."""
    folder = published / "predictions"
    scores = evaluate.score_predictions(
        evaluate.read_rows(folder / "moment_detr_val_preds.jsonl", "pred_relevant_windows"),
        evaluate.read_rows(folder / "qvhighlights_val.jsonl", "relevant_windows"))
    theirs = json.loads((folder / "moment_detr_val_metrics.json").read_text())["brief"]
    for ours, name in (("R@1,IoU=0.5", "MR-full-R1@0.5"), ("R@1,IoU=0.7", "MR-full-R1@0.7"),
                       ("mAP", "MR-full-mAP"), ("mAP@0.5", "MR-full-mAP@0.5"),
                       ("mAP@0.75", "MR-full-mAP@0.75")):
        assert scores[ours] == pytest.approx(theirs[name], abs=0.005)


def test_predictions_of_other_sentences_are_refused():
    one = [{"qid": 1, "pred_relevant_windows": [[0, 1, 0.5]]}]
    with pytest.raises(ValueError, match="1 of its 1 .* have no prediction, and 1 predictions"):
        evaluate.score_predictions(one, [{"qid": 2, "relevant_windows": [[0, 1]]}])
    with pytest.raises(ValueError, match="no predicted moment, for instance qid 1"):
        evaluate.score_predictions([{"qid": 1, "pred_relevant_windows": []}],
                                   [{"qid": 1, "relevant_windows": [[0, 1]]}])


def test_every_bad_line_of_predictions_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"qid": 1}\n{"qid": 2, "pred_relevant_windows": [[1]]}\n'
                                      '{"qid": 3, "pred_relevant_windows": [[0, 1e999]]}\n[]\n')
    with pytest.raises(ValueError, match="4 invalid entries") as error:
        evaluate.read_rows(tmp_path / "p.jsonl", "pred_relevant_windows")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "line 1", "line 2", "line 3", "line 4"]


def test_published_annotations_are_truth(published):
    """The truth predicted as it is scores 100, in either form of file."""
    for name, count in (("charades/charades_sta_test.txt", 3720),
                        ("activitynet/val_2.json", 17031)):
        truth = evaluate.read_rows(published / name, "relevant_windows")
        assert len(truth) == count
        few = truth[:200]
        scores = evaluate.score_predictions(
            [{"qid": row["qid"], "pred_relevant_windows": row["relevant_windows"]} for row in few],
            few)
        assert all(value == pytest.approx(100) for value in scores.values())


def test_a_checkpoint_writes_what_scores_the_same(world, tmp_path):
    """Grouped by video for the model, numbered as in the file for the reader."""
    rows = data.read_annotations("shapes", "test", world)
    rows = rows[::2] + rows[1::2]                               # sentences of a video lie apart
    by_video = sorted(rows, key=lambda row: [r.video for r in rows].index(row.video))
    predicted = torch.tensor([[[row.start_sec, row.end_sec, 0.9], [0.0, 0.0, float("-inf")]]
                              for row in by_video])
    evaluate.write_predictions(str(tmp_path / "p.jsonl"), rows, by_video, predicted)
    written = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["qid"] for line in written] == list(range(len(rows)))
    for row, line in zip(rows, written):
        assert (line["vid"], line["query"]) == (row.video, row.sentence)
        assert line["pred_relevant_windows"] == [pytest.approx([row.start_sec, row.end_sec, 0.9])]


def test_details_of_the_benchmarks_definition():
    """An IoU of exactly 0.85 is a hit at 0.85: [0, 17) of [0, 20) hits at 8 of 10 thresholds. Ten
    moments are taken as they are listed, and then ordered: an eleventh with the best score is
    late."""
    truth = [{"qid": 0, "relevant_windows": [[0, 20]]}]
    score = lambda windows: evaluate.score_predictions(
        [{"qid": 0, "pred_relevant_windows": windows}], truth)["mAP"]
    assert score([[0, 17, 1.0]]) == pytest.approx(80)
    misses = [[50 + i, 60 + i, 0.1] for i in range(10)]
    assert score([*misses, [0, 20, 0.9]]) == 0
    assert score([*misses[:9], [0, 20, 0.9]]) == pytest.approx(100)


def test_numbering_is_checked(tmp_path):
    rows = [{"qid": i, "query": f"q{i}", "vid": "v", "pred_relevant_windows": [[0, 1, 1.0]]}
            for i in range(3)]
    truth = [{"qid": i, "query": f"q{2 - i}", "vid": "v", "relevant_windows": [[0, 1]]}
             for i in range(3)]
    with pytest.raises(ValueError, match="number their sentences differently"):
        evaluate.score_predictions(rows, truth)
    with pytest.raises(ValueError, match="qid 0 occurs on two lines"):
        evaluate.score_predictions(rows + rows[:1], truth)
    with pytest.raises(ValueError, match="no sentence to score"):
        evaluate.score_predictions([], [])
    (tmp_path / "t.jsonl").write_text('{"qid": 0, "relevant_windows": []}\n')
    with pytest.raises(ValueError, match="line 1: the sentence has no true moment"):
        evaluate.read_rows(tmp_path / "t.jsonl", "relevant_windows")
    with pytest.raises(ValueError, match="is not a file of predictions"):
        evaluate.read_rows(tmp_path / "t.txt", "pred_relevant_windows")
    (tmp_path / "t.jsonl").write_text('{"vid": "v", "relevant_windows": [[0, 1]]}\n' * 2)
    rows = evaluate.read_rows(tmp_path / "t.jsonl", "relevant_windows")
    assert [row["qid"] for row in rows] == [0, 1]
