"""extras/qvhighlights.py: scores of any system's predictions, by hand and against published ones.
"""
import json
import pathlib

import pytest
import torch

import data
import evaluate
from extras import qvhighlights

GOLDEN = pathlib.Path(__file__).parent / "golden"


def test_scores_of_predictions_are_the_golden_ones():
    """tests/golden/make_predictions.py computes them by plain loops."""
    scores = qvhighlights.score_predictions(
        qvhighlights.read_rows(GOLDEN / "predictions.jsonl", "pred_relevant_windows"),
        qvhighlights.read_rows(GOLDEN / "truth.jsonl", "relevant_windows"))
    golden = json.loads((GOLDEN / "predictions.json").read_text(encoding="utf-8"))
    assert scores == pytest.approx(golden, abs=1e-6)


def test_moment_detr_through_a_dataset_of_ours(published, tmp_path):
    """Several true moments of a sentence, and the numbers of the file, survive data.py."""
    folder = published / "predictions"
    rows = data.clean(data.read_file(folder / "qvhighlights_val.jsonl"))[0]
    data.write_jsonl(tmp_path / "val.jsonl", rows)
    scores = qvhighlights.score_predictions(
        qvhighlights.read_rows(folder / "moment_detr_val_preds.jsonl", "pred_relevant_windows"),
        qvhighlights.read_rows(tmp_path / "val.jsonl", "relevant_windows"))
    assert round(scores["R@1,IoU=0.5"], 2) == 53.94 and round(scores["R@1,IoU=0.7"], 2) == 34.84


def test_average_precision_by_hand():
    """Two true moments; the answers hit the first, miss, hit the second: precision 1, 1/2, 2/3 at
    recall 1/2, 1/2, 1, so 1/2 * 1 + 1/2 * 2/3 = 0.8333. A second hit of a moment that is taken is a
    miss: 1/2 * 1."""
    truth = torch.tensor([[0.0, 10.0], [20.0, 30.0]])
    hit, miss, other = [0.0, 10.0], [40.0, 50.0], [20.0, 30.0]
    for answers, value in (([hit, miss, other], 5 / 6), ([hit, hit], 0.5), ([miss], 0.0),
                           ([other, hit], 1.0)):
        precision = qvhighlights.average_precision(torch.tensor(answers), truth, 0.5)
        assert precision == pytest.approx(value)


def test_the_published_metrics_of_moment_detr(published):
    """Its sample predictions on QVHighlights' validation split, against its own evaluator."""
    folder = published / "predictions"
    scores = qvhighlights.score_predictions(
        qvhighlights.read_rows(folder / "moment_detr_val_preds.jsonl", "pred_relevant_windows"),
        qvhighlights.read_rows(folder / "qvhighlights_val.jsonl", "relevant_windows"))
    theirs = (folder / "moment_detr_val_metrics.json").read_text(encoding="utf-8")
    theirs = json.loads(theirs)["brief"]
    for ours, name in (("R@1,IoU=0.5", "MR-full-R1@0.5"), ("R@1,IoU=0.7", "MR-full-R1@0.7"),
                       ("mAP", "MR-full-mAP"), ("mAP@0.5", "MR-full-mAP@0.5"),
                       ("mAP@0.75", "MR-full-mAP@0.75")):
        assert scores[ours] == pytest.approx(theirs[name], abs=0.005)


def test_predictions_of_other_sentences_are_refused():
    one = [{"qid": 1, "pred_relevant_windows": [[0, 1, 0.5]]}]
    with pytest.raises(ValueError, match="1 of its 1 .* have no prediction, and 1 predictions"):
        qvhighlights.score_predictions(one, [{"qid": 2, "relevant_windows": [[0, 1]]}])
    with pytest.raises(ValueError, match="no predicted moment, for instance qid 1"):
        qvhighlights.score_predictions([{"qid": 1, "pred_relevant_windows": []}],
                                   [{"qid": 1, "relevant_windows": [[0, 1]]}])


def test_every_bad_line_of_predictions_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"qid": 1}\n{"qid": 2, "pred_relevant_windows": [[1]]}\n'
                                      '{"qid": 3, "pred_relevant_windows": [[0, 1e999]]}\n[]\n',
                                      encoding="utf-8")
    with pytest.raises(ValueError, match="4 invalid entries") as error:
        qvhighlights.read_rows(tmp_path / "p.jsonl", "pred_relevant_windows")
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "line 1", "line 2", "line 3", "line 4"]


def test_published_annotations_are_truth(published):
    """The truth predicted as it is scores 100, in either form of file."""
    for name, count in (("charades/charades_sta_test.txt", 3720),
                        ("activitynet/val_2.json", 17031)):
        truth = qvhighlights.read_rows(published / name, "relevant_windows")
        assert len(truth) == count
        few = truth[:200]
        scores = qvhighlights.score_predictions(
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
    lines = (tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()
    written = [json.loads(line) for line in lines]
    assert [line["qid"] for line in written] == [row.qid for row in rows]
    for row, line in zip(rows, written):
        assert (line["vid"], line["query"]) == (row.video, row.sentence)
        assert line["pred_relevant_windows"] == [pytest.approx([row.start_sec, row.end_sec, 0.9])]
    # with all digits: the same scores as the tensors
    direct = evaluate.recall(predicted[..., :2], data.windows_of(by_video))
    scored = qvhighlights.score_predictions(
        written, [{"qid": row.qid, "relevant_windows": row.moments_sec} for row in rows])
    assert all(scored[name] == pytest.approx(value, abs=1e-4) for name, value in direct.items())


def test_details_of_the_benchmarks_definition():
    """An IoU of exactly 0.85 is a hit at 0.85: [0, 17) of [0, 20) hits at 8 of 10 thresholds. Ten
    moments are taken as they are listed, and then ordered: an eleventh with the best score is
    late."""
    truth = [{"qid": 0, "relevant_windows": [[0, 20]]}]
    score = lambda windows: qvhighlights.score_predictions(
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
        qvhighlights.score_predictions(rows, truth)
    with pytest.raises(ValueError, match="qid 0 occurs on two lines"):
        qvhighlights.score_predictions(rows + rows[:1], truth)
    with pytest.raises(ValueError, match="no sentence to score"):
        qvhighlights.score_predictions([], [])
    (tmp_path / "t.jsonl").write_text('{"qid": 0, "relevant_windows": []}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 1: the sentence has no true moment"):
        qvhighlights.read_rows(tmp_path / "t.jsonl", "relevant_windows")
    with pytest.raises(ValueError, match="is not a file of predictions"):
        qvhighlights.read_rows(tmp_path / "t.txt", "pred_relevant_windows")
    row = '{"vid": "v", "relevant_windows": [[0, 1]]}\n'
    (tmp_path / "t.jsonl").write_text(row * 2, encoding="utf-8")
    rows = qvhighlights.read_rows(tmp_path / "t.jsonl", "relevant_windows")
    assert [row["qid"] for row in rows] == [0, 1]


def test_a_hit_is_one_in_both_ways_of_scoring():
    """An IoU of exactly 0.5 in float32, as evaluate.py computes it; 0.4999999947 in float64."""
    predicted = [3.6025002002716064, 7.205000400543213]
    true = [0.9010000228881836, 8.10599994659424]
    direct = evaluate.recall(torch.tensor([[predicted]]), torch.tensor([true]))
    scores = qvhighlights.score_predictions(
        [{"qid": 0, "pred_relevant_windows": [predicted + [0.9]]}],
        [{"qid": 0, "relevant_windows": [true]}])
    for name in ("R@1,IoU=0.5", "R@5,IoU=0.5"):
        assert scores[name] == direct[name] == 100


def test_a_truth_is_cleaned_as_annotations_are(tmp_path):
    """Moments end with their video; a sentence whose moment lies behind it is left out."""
    path = tmp_path / "truth.jsonl"
    lines = ('{"qid": 1, "duration": 10, "relevant_windows": [[5, 20], [11, 12]]}\n'
             '{"qid": 2, "duration": 10, "relevant_windows": [[11, 12]]}\n')
    path.write_text(lines, encoding="utf-8")
    assert qvhighlights.read_rows(path, "relevant_windows") == [
        {"qid": 1, "relevant_windows": [[5.0, 10.0]]}]
