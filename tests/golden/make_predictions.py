"""Makes predictions.jsonl, truth.jsonl and predictions.json, test_qvhighlights.py's golden files:
random moments, and their scores by plain loops written after QVHighlights' definition of them,
without a line of extras/qvhighlights.py.

    python tests/golden/make_predictions.py
"""
import json
import pathlib
import random

HERE = pathlib.Path(__file__).parent


def iou(a, b):
    inside = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return inside / (max(a[1], b[1]) - min(a[0], b[0])) if inside else 0.0


def interpolated_area(hits, true_count):
    """Area under the precision-recall curve whose precision never rises again to the right."""
    recall, precision, found = [0.0], [0.0], 0
    for i, hit in enumerate(hits, 1):
        found += hit
        recall.append(found / true_count)
        precision.append(found / i)
    recall.append(1.0)
    precision.append(0.0)
    for i in range(len(precision) - 2, -1, -1):
        precision[i] = max(precision[i], precision[i + 1])
    return sum((recall[i] - recall[i - 1]) * precision[i] for i in range(1, len(recall))
               if recall[i] != recall[i - 1])


def average_precision(predicted, true, threshold):
    taken, hits = set(), []
    for moment in predicted:
        order = sorted(range(len(true)), key=lambda g: iou(moment, true[g]), reverse=True)
        hit = False
        for g in order:
            if iou(moment, true[g]) < threshold:
                break
            if g not in taken:
                taken.add(g)
                hit = True
                break
        hits.append(hit)
    return interpolated_area(hits, len(true))


def main():
    rng = random.Random(0)
    predictions, truth = [], []
    for qid in range(40):
        true = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            start = rng.uniform(0, 120)
            true.append([round(start, 2), round(start + rng.uniform(2, 30), 2)])
        windows = []
        for _ in range(rng.choice((1, 5, 10, 14))):
            near = rng.choice(true)
            start = max(0.0, near[0] + rng.gauss(0, 4))
            end = start + (near[1] - near[0]) * rng.uniform(0.6, 1.5)
            windows.append([round(start, 2), round(end, 2), round(rng.random(), 4)])
        windows.sort(key=lambda w: -w[2])
        predictions.append({"qid": qid, "query": "q", "vid": f"v{qid}",
                            "pred_relevant_windows": windows})
        truth.append({"qid": qid, "query": "q", "vid": f"v{qid}", "duration": 150,
                      "relevant_windows": true})
    scores = {}
    for k in (1, 5):
        for threshold in (0.5, 0.7):
            scores[f"R@{k},IoU={threshold}"] = 100 * sum(
                any(iou(w, t) >= threshold for w in p["pred_relevant_windows"][:k]
                    for t in g["relevant_windows"]) for p, g in zip(predictions, truth)) / 40
    scores["mIoU"] = 100 * sum(max(iou(p["pred_relevant_windows"][0], t)
                                   for t in g["relevant_windows"])
                               for p, g in zip(predictions, truth)) / 40
    mean = {round(0.5 + 0.05 * i, 2): 100 * sum(
        average_precision(p["pred_relevant_windows"][:10], g["relevant_windows"], 0.5 + 0.05 * i)
        for p, g in zip(predictions, truth)) / 40 for i in range(10)}
    scores |= {"mAP": sum(mean.values()) / 10, "mAP@0.5": mean[0.5], "mAP@0.75": mean[0.75]}
    for name, rows in (("predictions", predictions), ("truth", truth)):
        (HERE / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (HERE / "predictions.json").write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    main()
