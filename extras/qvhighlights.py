"""Scores of any system's predictions, as the QVHighlights benchmark defines them.

    python evaluate.py ckpt.pt --split test --predictions out.jsonl     # writes predictions
    python evaluate.py --predictions out.jsonl --truth test.jsonl       # scores them

Both files are json lines, one sentence each:

    predictions  {"qid": 0, "pred_relevant_windows": [[start, end, score], ...]}, best first
    truth        {"qid": 0, "relevant_windows": [[start, end], ...]}

R@1, R@5 and mIoU compare a prediction with the true moment of highest IoU. mAP is the mean over
sentences of the average precision of the first ten moments. tests/golden has predictions whose
scores by Moment-DETR's published evaluation are known.

Shapes: K predicted moments, G true moments of a sentence, S sentences; [start, end) in seconds.
"""
import json
import math
import pathlib
import statistics

import torch
from torch import Tensor

import data
import evaluate
import mmn
from support.errors import Mistake

MAP_IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))   # 0.5:0.05:0.95


# ------------------------------------------------------------------------------------------- scores

def average_precision(predicted: Tensor, truth: Tensor, iou: float) -> float:
    """AP of one sentence: in order of score, each moment is matched with the true moment of highest
    IoU that is not matched yet, if that IoU is at least `iou`. The area under the precision-recall
    curve, with precision made monotonic. predicted [K, 2], truth [G, 2]."""
    overlaps = mmn.interval_iou(predicted[:, None], truth[None])        # [K, G]
    matched = set()
    hits = []                                   # has prediction k found a true moment?
    for row in overlaps.tolist():
        free = [g for g in range(len(row)) if row[g] >= iou and g not in matched]
        if free:
            matched.add(max(free, key=lambda g: row[g]))
        hits.append(bool(free))
    hits = torch.tensor(hits).double()                                  # [K]
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    # the best precision at this recall or a higher one, as the benchmark interpolates
    monotonic = precision.flip(0).cummax(0).values.flip(0)
    return float((monotonic * hits).sum() / len(truth))


def score_predictions(predictions: list[dict], truth: list[dict]) -> dict[str, float]:
    """R@1, R@5, mIoU and mAP, in percent. Mistake if the two files do not cover the same sentences,
    or number them differently, as "vid" and "query" show."""
    answers = by_qid(predictions)
    wanted = by_qid(truth)
    check_match(answers, wanted)
    scores = []                                 # of each sentence
    for qid, row in wanted.items():
        windows = answers[qid]["pred_relevant_windows"]
        predicted = torch.tensor([window[:2] for window in windows], dtype=torch.double)
        true = torch.tensor(row["relevant_windows"], dtype=torch.double)
        score = evaluate.recall(predicted[None], true[None])
        # hits in float32, as evaluate.py counts them: an IoU may be mu in one precision only
        hits = evaluate.recall(predicted[None].float(), true[None].float())
        score |= {name: value for name, value in hits.items() if name != "mIoU"}
        values = [window[2] for window in windows[:10] if len(window) > 2]
        if len(values) == len(windows[:10]):    # the benchmark sorts by score, where there is one
            order = torch.tensor(values).argsort(descending=True, stable=True)
            predicted = predicted[order]
        precision = [100 * average_precision(predicted[:10], true, iou) for iou in MAP_IOUS]
        score["mAP"] = statistics.fmean(precision)
        score["mAP@0.5"] = precision[0]
        score["mAP@0.75"] = precision[5]
        scores.append(score)
    return {name: statistics.fmean(score[name] for score in scores) for name in scores[0]}


def check_match(answers: dict[str, dict], wanted: dict[str, dict]) -> None:
    """Mistake unless both files are about the same sentences, each with a prediction."""
    if answers.keys() != wanted.keys():
        raise Mistake(f"the predictions do not match this truth: "
                      f"{len(wanted.keys() - answers.keys())} of its {len(wanted)} sentences (qid) "
                      f"have no prediction, and {len(answers.keys() - wanted.keys())} predictions "
                      f"have no sentence")
    if not wanted:
        raise Mistake("there is no sentence to score")
    for qid, row in wanted.items():
        for name in ("vid", "query"):
            ours = " ".join(str(row.get(name, "")).split())
            theirs = " ".join(str(answers[qid].get(name, "")).split())
            if ours and theirs and ours != theirs:
                raise Mistake(f"qid {qid} is \"{theirs}\" in the predictions and \"{ours}\" in the "
                              f"truth: the two files number their sentences differently")
    empty = [qid for qid, row in answers.items() if not row["pred_relevant_windows"]]
    if empty:
        raise Mistake(f"{len(empty)} sentences have no predicted moment, for instance qid "
                      f"{empty[0]}; every sentence needs at least one")


# -------------------------------------------------------------------------------------------- files

def by_qid(rows: list[dict]) -> dict[str, dict]:
    result = {}
    for row in rows:
        qid = str(row["qid"])
        if qid in result:
            raise Mistake(f"qid {qid} occurs on two lines of one file; every sentence needs its "
                          f"own")
        result[qid] = row
    return result


def read_rows(path: str | pathlib.Path, key: str) -> list[dict]:
    """Json lines with `key` (and "qid"; without it they are numbered from 0), or an annotation file
    in its published form, numbered from 0 after cleaning. Mistake that lists the invalid lines."""
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        if key != "relevant_windows":
            raise Mistake(f"{path} is not a file of predictions, which are json lines (.jsonl)")
        samples = data.clean(data.read_file(path))[0]
        return [{"qid": i, "vid": sample.video, "query": sample.sentence,
                 "relevant_windows": sample.moments_sec} for i, sample in enumerate(samples)]

    def row(line: str) -> list[dict]:
        content = json.loads(line)
        windows = [[float(value) for value in window] for window in content[key]]
        for window in windows:
            if len(window) < 2 or not all(math.isfinite(value) for value in window):
                raise ValueError(f"{key} contains an invalid moment")
            if key == "relevant_windows" and window[1] <= window[0]:
                raise ValueError(f"{window[:2]} ends before it begins")
        if key == "relevant_windows" and not windows:
            raise ValueError("the sentence has no true moment")
        if key == "relevant_windows":           # cleaned like any annotation
            (start, end), *others = [window[:2] for window in windows]
            duration_sec = float(content.get("duration") or math.nan)
            sample = data.Sample("", "", start, end, duration_sec, tuple(map(tuple, others)))
            cleaned, _, _ = data.clean([sample])
            if not cleaned:
                return []
            windows = [list(moment) for moment in cleaned[0].moments_sec]
        kept = {name: content[name] for name in ("qid", "vid", "query") if name in content}
        kept[key] = windows
        return [kept]

    rows = data.read_lines(path, data.json_lines(path), row)
    return [{"qid": i} | row for i, row in enumerate(rows)]


def main(given) -> None:
    """evaluate.py --predictions X --truth Y"""
    if given.checkpoint or not given.predictions:
        raise Mistake("--truth scores --predictions, without a checkpoint")
    scores = score_predictions(read_rows(given.predictions, "pred_relevant_windows"),
                               read_rows(given.truth, "relevant_windows"))
    if given.json:
        print(json.dumps(scores))
        return
    for name, value in scores.items():
        print(f"{name:12s} {value:6.2f}")
