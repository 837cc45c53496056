"""How good is a retriever: R@n, IoU=mu and mIoU (paper Sec. 4.1.2), for any checkpoint.

    python evaluate.py runs/shapes-vdi-staged/ckpt.pt
    python evaluate.py ckpt.pt --split test --query dynamic --json
    python evaluate.py runs/mmn-?/ckpt.pt                # mean and standard deviation over runs
    python evaluate.py ckpt.pt --split test --predictions out.jsonl     # writes its answers
    python evaluate.py --predictions out.jsonl --truth test.jsonl       # scores any system's
    python evaluate.py --explain                        # IoU, NMS and R@5 on three moments by hand

Beside each result stand what a random moment would score, and the best moment that does not look at
the sentence (fitted on the training split), so that a number means something; and, where the world
knows all its events, how often the answer lies in one of the right actor; of the right verb.

Inference needs the text tower and the retriever only; no injection module is loaded or needed.

A hit is IoU >= mu. R@1 takes the best cell, R@5 the five best after greedy NMS (IoU > 0.5 is
dropped). Shapes: S sentences, K retrieved moments, N clips, P candidate moments. Moments are
[start, end) in seconds.
"""
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import command
import data
import mmn
import parse
import tan

QUERIES = {"full": 0, "static": 1, "dynamic": 2}                # Q, Q^s, Q^d: rows of Batch.tokens
RETRIEVERS = {"mmn": mmn.MMN, "2d-tan": tan.TAN}                # f^g


# ------------------------------------------------------------------------------------------ metrics

def recall(predicted: Tensor, truth: Tensor, ks: tuple[int, ...] = (1, 5),
           ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """Sec. 4.1.2: R@k, IoU=mu, the share of sentences with a moment of IoU >= mu among the first k;
    and the mean IoU of the first moment. Percentages.

    predicted  [S, K, 2] seconds, best first; fewer than k moments count as they are
    truth      [S, 2] seconds
    """
    iou = mmn.interval_iou(predicted, truth[:, None])                   # [S, K]
    result = {f"R@{k},IoU={mu}": 100 * (iou[:, :k] >= mu).any(1).double().mean().item() for k in ks
              for mu in ious}
    return result | {"mIoU": 100 * iou[:, 0].double().mean().item()}


def cell_recall(iou: Tensor, ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """`recall` at 1 and mIoU from IoUs: [S], a moment a sentence; [S, P], P equally likely ones."""
    result = {f"R@1,IoU={mu}": 100 * (iou >= mu).double().mean().item() for mu in ious}
    return result | {"mIoU": 100 * iou.double().mean().item()}


def best_prior(iou: Tensor) -> int:
    """The cell that hits most training moments at 0.5 whatever is asked: [S, P] -> place in P."""
    return int(((iou >= 0.5).double().mean(0) + 1e-6 * iou.double().mean(0)).argmax())


def event_accuracy(predicted: Tensor, samples: list[data.Sample],
                   events: dict[str, list[data.Event]]) -> dict[str, float]:
    """Noun and verb accuracy, percent: does the event that the first answer overlaps most have the
    named actor, and the named verb? By chance 50 each in the shapes world. predicted [S, K, 2]."""
    noun = verb = 0
    for sample, answer in zip(samples, predicted[:, 0]):
        found = events[sample.video]
        spans = torch.tensor([[float(e.start_sec), float(e.end_sec)] for e in found])
        label = torch.tensor([sample.start_sec, sample.end_sec])
        named = found[int(mmn.interval_iou(spans, label).argmax())]
        overlap = mmn.interval_iou(spans, answer)
        if not overlap.any():                           # between two events: the nearer one
            overlap = -(spans.mean(1) - answer.mean()).abs()
        chosen = found[int(overlap.argmax())]
        noun += chosen.noun == named.noun
        verb += chosen.verb == named.verb
    return {"noun accuracy": 100 * noun / len(samples), "verb accuracy": 100 * verb / len(samples)}


# ------------------------------------------------------------------- predictions of any system

MAP_IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))   # QVHighlights: 0.5:0.05:0.95


def average_precision(predicted: Tensor, truth: Tensor, iou: float) -> float:
    """QVHighlights' AP of one sentence: its moments, best first; each takes the true moment that it
    overlaps most among those not taken, if that is at least `iou`. The area under precision, made
    monotonous from the right, over recall. predicted [K, 2], truth [G, 2]; in [0, 1]."""
    overlaps, taken, hits = mmn.interval_iou(predicted[:, None], truth[None]), set(), []
    for row in overlaps.tolist():                                       # [G]
        free = [g for g in sorted(range(len(row)), key=lambda g: -row[g])
                if row[g] >= iou and g not in taken]
        taken.update(free[:1])
        hits.append(bool(free))
    hits = torch.tensor(hits).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)                   # the best at or after it
    return float((best * hits).sum() / len(truth))


def score_predictions(predictions: list[dict], truth: list[dict]) -> dict[str, float]:
    """Scores of predictions in QVHighlights' submission form, in percent: R@1 and R@5 (the true
    moment that fits best counts), mIoU, and mAP as that benchmark defines it (the first ten moments
    of a sentence, in order of score; mean over sentences). ValueError where "vid" or "query" tell
    that the two number their sentences otherwise.

    predictions  {"qid", "pred_relevant_windows": [[start, end, score], ...]}, best first
    truth        {"qid", "relevant_windows": [[start, end], ...]}
    """
    answers, wanted = by_qid(predictions), by_qid(truth)
    if answers.keys() != wanted.keys():
        lacking, others = wanted.keys() - answers.keys(), answers.keys() - wanted.keys()
        raise ValueError(f"the predictions are not those of this truth: {len(lacking)} of its "
                         f"{len(wanted)} sentences (qid) have none, and {len(others)} others have "
                         f"one")
    if not wanted:
        raise ValueError("there is no sentence to score")
    for qid, row in wanted.items():
        for name in ("vid", "query"):
            ours, theirs = (" ".join(str(x.get(name, "")).split()) for x in (row, answers[qid]))
            if ours and theirs and ours != theirs:
                raise ValueError(f"qid {qid} is \"{theirs}\" in the predictions and \"{ours}\" in "
                                 f"the truth: they number their sentences otherwise")
    answers = {qid: row["pred_relevant_windows"] for qid, row in answers.items()}
    if empty := [qid for qid, windows in answers.items() if not windows]:
        raise ValueError(f"{len(empty)} sentences have no predicted moment, for instance qid "
                         f"{empty[0]}; every sentence needs at least one")
    rows, precision = [], []
    for qid, row in wanted.items():
        predicted = torch.tensor([window[:2] for window in answers[qid]], dtype=torch.double)
        true = torch.tensor(row["relevant_windows"], dtype=torch.double)
        best = mmn.interval_iou(predicted[:, None], true[None]).amax(1)     # [K]
        rows.append([best[0].item(), best[:5].max().item()])
        scores = [window[2] for window in answers[qid][:10] if len(window) > 2]
        if len(scores) == len(predicted[:10]):
            predicted = predicted[torch.tensor(scores).argsort(descending=True, stable=True)]
        precision.append([average_precision(predicted[:10], true, iou) for iou in MAP_IOUS])
    best = torch.tensor(rows, dtype=torch.double)                       # [S, 2]
    precision = torch.tensor(precision, dtype=torch.double)             # [S, 10]
    return {**{f"R@{k},IoU={mu}": 100 * (best[:, i] >= mu).double().mean().item()
               for i, k in enumerate((1, 5)) for mu in (0.5, 0.7)},
            "mIoU": 100 * best[:, 0].mean().item(),
            "mAP": 100 * precision.mean().item(), "mAP@0.5": 100 * precision[:, 0].mean().item(),
            "mAP@0.75": 100 * precision[:, 5].mean().item()}


def by_qid(rows: list[dict]) -> dict[str, dict]:
    found = {}
    for row in rows:
        if str(row["qid"]) in found:
            raise ValueError(f"qid {row['qid']} stands in two lines of one file")
        found[str(row["qid"])] = row
    return found


def read_rows(path: str | pathlib.Path, key: str) -> list[dict]:
    """Json lines that have `key` (and "qid"; else they are numbered from 0); a Charades-STA text or
    an ActivityNet json file, numbered from 0 after cleaning. A ValueError lists every bad line."""
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        if key != "relevant_windows":
            raise ValueError(f"{path} is no file of predictions, which are json lines (.jsonl)")
        samples = data.clean(data.read_file(path))[0]
        return [{"qid": i, "vid": s.video, "query": s.sentence,
                 "relevant_windows": [[s.start_sec, s.end_sec]]} for i, s in enumerate(samples)]

    def row(numbered: tuple[int, str]) -> list[dict]:
        content = json.loads(numbered[1])
        windows = [[float(v) for v in window] for window in content[key]]
        if not all(len(w) >= 2 and all(map(math.isfinite, w)) for w in windows):
            raise ValueError(f"{key} holds what is no moment")
        if key == "relevant_windows" and not windows:
            raise ValueError("a sentence has no true moment")
        return [{"qid": content.get("qid", numbered[0]), key: windows,
                 **{name: content[name] for name in ("vid", "query") if name in content}}]

    lines = enumerate(data.numbered_lines(path))
    return data.read_lines(path, ((i, (k, line)) for k, (i, line) in lines), row)


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(text: clip.TextTower, retriever: mmn.MomentMap, videos: data.Videos, batch: int,
            device: torch.device | str, query: str = "full", top_k: int = 5,
            fusion: str = "published", normalise: bool = True) -> Tensor:
    """Moments of all sentences, in the order of `videos.samples`: [S, top_k, 3], see mmn.decode."""
    was_training = retriever.training
    text.eval(), retriever.eval()
    result = []
    for b in videos.batches(batch):
        b = b.to(device)
        x = text.encode_text(b.tokens[QUERIES[query]])                  # [S, D]
        x = F.normalize(x, dim=1) if normalise else x
        scores = retriever.scores(b.frames, x, b.video_of, fusion)      # [S, N, N]
        if not torch.isfinite(scores).all():
            raise FloatingPointError(f"scores are not finite for a video among "
                                     f"{', '.join(b.videos[:5])} ...")
        result.append(mmn.decode(scores, b.durations_sec, top_k,
                                 candidates=retriever.candidates).cpu())
    text.train(was_training), retriever.train(was_training)
    return torch.cat(result)


# -------------------------------------------------------------------------------------- checkpoints

@dataclasses.dataclass
class Run:
    """A checkpoint, ready for inference."""
    config: dict                                                # every field of train.Config
    text: clip.TextTower
    retriever: mmn.MomentMap                                    # mmn.MMN or tan.TAN
    checkpoint: dict                                            # everything else that was saved


def load(path: str | pathlib.Path, device: torch.device | str = "cpu") -> Run:
    """Reads a checkpoint of train.py, of which nothing is executed and no injection module read."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; the checkpoint in it is {path / 'ckpt.pt'}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; python train.py makes one")
    try:
        saved = clip.read_torch(path)
        config, sizes, weights, text = (saved[key] for key in ("config", "sizes", "retriever",
                                                               "text"))
        _ = saved["window_sec"], config["fusion"], config["normalise"]  # not in older files
        kind = RETRIEVERS[config["retriever"]]
        if not sum(sizes["pool_counts"]) < sizes["num_clips"] <= 512 \
                or not sizes["layers"] <= len(weights):
            raise ValueError(f"its weights are not of the sizes {sizes}")
        retriever = clip.fill(lambda: kind(**sizes), weights, "this retriever")
        text = clip.build_text(text)
    except Exception as e:      # torch raises a dozen kinds for what does not fit
        raise ValueError(f"{path} is not a checkpoint of train.py: {command.told(e)}") from e
    rest = {key: value for key, value in saved.items() if key not in ("retriever", "text")}
    return Run(config, text.to(device), retriever.to(device), rest)


def answers(run: Run, splits: list[str] | None = None, query: str = "full",
            root: str | None = None, device: torch.device | str = "cpu",
            allow_missing: bool = False, parser: str | None = None, top_k: int = 5
            ) -> Iterator[tuple[str, data.Videos, Tensor]]:
    """Of each split its name, its sentences and their moments [S, top_k, 3]. `splits`: default all
    but train (train too, if it is the only one). `parser`: default the one of the training."""
    config = run.config
    dataset, root = config["dataset"], root or config["root"]
    if splits is None:
        splits = [split for split in data.splits(dataset, root) if split != "train"] or ["train"]
    store = data.open_store(dataset, config["clip"], root)
    if store.manifest["sha256"] != run.checkpoint["clip_sha256"]:
        raise ValueError(f"the features in {store.folder} come from another CLIP than this "
                         f"checkpoint was trained with: sha256 {store.manifest['sha256'][:12]}, "
                         f"not {run.checkpoint['clip_sha256'][:12]}")
    parser = parse.Parser(parser or config["parser"] or None, config["mask"])
    if parser.name != run.checkpoint["parser"]:
        print(f"note: this checkpoint was trained with the parser {run.checkpoint['parser']}, and "
              f"is evaluated with {parser.name}", file=sys.stderr)
    for split in splits:
        if dataset not in data.FILES and split not in (known := data.splits(dataset, root)):
            raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(known)}")
        rows = data.read_annotations(dataset, split, root)
        if allow_missing and not any(row.video in store for row in rows):
            print(f"note: no video of {split} has features, so it is left out", file=sys.stderr)
            continue
        videos = data.Videos(rows, store, run.retriever.num_clips, parser,
                             normalise=config["normalise"])
        if videos.missing and not allow_missing:
            raise FileNotFoundError(f"{len(videos.missing)} of {len(videos.missing) + len(videos)} "
                                    f"videos of {split} have no features (see "
                                    f"{store.folder / 'failed.txt'}); --allow-missing leaves out "
                                    f"their {videos.lost} sentences")
        yield split, videos, predict(run.text, run.retriever, videos, config["batch"], device,
                                     query, top_k, config["fusion"], config["normalise"])


def evaluate(run: Run, splits: list[str] | None = None, query: str = "full",
             root: str | None = None, device: torch.device | str = "cpu",
             allow_missing: bool = False, parser: str | None = None,
             predictions: str | None = None) -> dict[str, dict]:
    """Split -> metrics. Arguments as of `answers`. `predictions`: a file for the answers to the one
    split, ten moments a sentence in QVHighlights' submission form."""
    dataset, root = run.config["dataset"], root or run.config["root"]
    train = data.read_annotations(dataset, "train", root)
    moments_sec = torch.tensor([[s.start_sec, s.end_sec] for s in train])
    durations_sec = torch.tensor([s.duration_sec for s in train])
    candidates = run.retriever.cells.cpu()
    prior = best_prior(mmn.iou_map(moments_sec, durations_sec,
                                   run.retriever.num_clips).flatten(1)[:, candidates])
    events, results = data.read_events(dataset, root), {}
    for split, videos, predicted in answers(run, splits, query, root, device, allow_missing,
                                            parser, 10 if predictions else 5):
        if predictions:
            write_predictions(predictions, data.read_annotations(dataset, split, root),
                              videos.samples, predicted)
        iou = torch.cat([videos.iou(part).flatten(1)[:, candidates]     # [S, P]
                         for part in torch.arange(len(videos.samples)).split(1024)])
        lost = {"videos missing": len(videos.missing), "queries missing": videos.lost}
        results[split] = {
            "queries": len(videos.samples), **(lost if videos.missing else {}),
            **recall(predicted[..., :2], videos.moments_sec),
            **(event_accuracy(predicted[..., :2], videos.samples, events) if events else {}),
            "random moment": cell_recall(iou), "best prior": cell_recall(iou[:, prior])}
    return results


def write_predictions(path: str, rows: list[data.Sample], samples: list[data.Sample],
                      predicted: Tensor) -> None:
    """Answers [S, K, 3] to `samples`, the `rows` grouped by video; qid is the place in `rows`."""
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        numbers.setdefault(row.video, []).append(i)
    lines = {}
    for sample, moments in zip(samples, predicted.tolist()):
        qid = numbers[sample.video].pop(0)
        lines[qid] = submission(qid, sample.sentence, sample.video, moments)
    command.save(path, "".join(lines[qid] for qid in sorted(lines)))


def submission(qid: int, sentence: str, name: str, moments: list) -> str:
    """A line of QVHighlights' submission form. moments: (start_sec, end_sec, score), best first."""
    windows = [[round(v, 4) for v in moment] for moment in moments if moment[2] > -math.inf]
    return json.dumps({"qid": qid, "query": sentence, "vid": name,
                       "pred_relevant_windows": windows}) + "\n"


def table(results: dict[str, dict]) -> str:
    """Results as text, a line for each split and for each of its two yardsticks."""
    columns = list(dict.fromkeys(name for metrics in results.values() for name, value
                                 in metrics.items() if isinstance(value, (int, float))))
    rows = []
    for split, metrics in results.items():
        for name, values in ((split, metrics), ("  random moment", metrics["random moment"]),
                             ("  best prior", metrics["best prior"])):
            cells = [values.get(column, "") for column in columns]
            rows.append([name, *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in cells)])
    return command.aligned(["", *(name.replace("IoU=", "") for name in columns)], rows)


def over_runs(runs: list[dict[str, dict]]) -> str:
    """Mean and standard deviation of several runs' results as text, a line a split."""
    splits = [split for split in runs[0] if all(split in run for run in runs)]
    names = [name for name, value in runs[0][splits[0]].items() if isinstance(value, float)]
    rows = [[split, *(mean_and_deviation([run[split][name] for run in runs], sign="+-")
                      for name in names)] for split in splits]
    return command.aligned(["", *(name.replace("IoU=", "") for name in names)], rows)


def mean_and_deviation(values: list[float], digits: int = 1, sign: str = "±") -> str:
    x = torch.tensor(values, dtype=torch.double)
    return f"{x.mean():.{digits}f}" + (f" {sign} {x.std():.{digits}f}" if len(x) > 1 else "")


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *rows))


def explain() -> None:
    """One sentence whose moment is 10 to 20 s, three answers, and every metric by hand."""
    truth = torch.tensor([[10.0, 20.0]])
    moments = torch.tensor([[14.0, 30.0, 0.9], [12.0, 30.0, 0.8], [9.0, 18.0, 0.3]])
    print("The sentence's moment is [10, 20) s. Three answers, best first:")
    for start, end, score in moments.tolist():
        overlap = min(end, 20) - max(start, 10)
        union = max(end, 20) - min(start, 10)
        iou = mmn.interval_iou(torch.tensor([start, end]), truth)[0]
        hits = ", ".join(f"{'a' if iou >= mu else 'no'} hit at {mu}" for mu in (0.5, 0.7))
        print(f"  [{start:2.0f}, {end:2.0f}) score {score:.1f}   overlap {overlap:2.0f} s of a "
              f"union of {union:2.0f} s: IoU {overlap:.0f} / {union:.0f} = {iou:.2f}, {hits}")
    near = mmn.interval_iou(moments[0, :2], moments[1, :2])
    print(f"NMS: the second overlaps the first by IoU {near:.2f} > 0.5 and is dropped; the third "
          f"by {mmn.interval_iou(moments[0, :2], moments[2, :2]):.2f}, and stays.")
    found = recall(moments[None, [0, 2], :2], truth)
    print("R@1 looks at the first answer that is left, R@5 at the first five, here two; in percent "
          "of all sentences, here one:")
    print("  " + "   ".join(f"{name} {value:.2f}" for name, value in found.items()))


def main() -> None:
    arguments = command.parser(__doc__.split("\n")[0])
    add = arguments.add_argument
    add("checkpoint", nargs="*", help="ckpt.pt of a run; of several the mean and deviation")
    add("--predictions", metavar="JSONL", help="QVHighlights' submission form: written with one "
                                               "checkpoint and one --split, scored with --truth")
    add("--truth", metavar="FILE", help="jsonl in QVHighlights' form, or an annotation file as "
                                        "published")
    add("--split", action="append", help="may be given again (default: all but train)")
    add("--query", choices=QUERIES, default="full", help="what to retrieve by (Fig. 3)")
    add("--root", help="folder of datasets (default: the one used in training)")
    add("--device", **command.DEVICE)
    add("--parser", help="spaCy pipeline or 'rules' (default: as in training)")
    add("--allow-missing", action="store_true", help="leave out videos without features")
    add("--json", action="store_true", help="print one json object a checkpoint")
    add("--explain", action="store_true", help="show IoU, NMS and R@5 by hand, and no more")
    options = arguments.parse_args()
    with command.sentences():
        if options.explain:
            explain()
            return
        if options.truth:
            if options.checkpoint or not options.predictions:
                raise ValueError("--truth scores --predictions, without a checkpoint")
            scores = score_predictions(read_rows(options.predictions, "pred_relevant_windows"),
                                       read_rows(options.truth, "relevant_windows"))
            print(json.dumps(scores) if options.json else
                  "\n".join(f"{name:12s} {value:6.2f}" for name, value in scores.items()))
            return
        if not options.checkpoint:
            raise ValueError("name a checkpoint, or --predictions and --truth")
        if options.predictions and (len(options.checkpoint) > 1 or len(options.split or []) != 1):
            raise ValueError("--predictions takes the answers of one checkpoint to one --split")
        if options.predictions and pathlib.Path(options.predictions).exists():
            raise FileExistsError(f"{options.predictions} is there already; to score it name its "
                                  f"--truth and no checkpoint, to write choose another name")
        device, results, methods = data.pick_device(options.device), [], set()
        for path in options.checkpoint:
            run = load(path, device)
            results.append(evaluate(run, options.split, options.query, options.root, device,
                                    options.allow_missing, options.parser, options.predictions))
            title = {name: run.config[name] for name in ("dataset", "method", "seed")} | {
                "query": options.query, "epoch": run.checkpoint["epoch"],
                "parser": options.parser or run.checkpoint["parser"]}
            methods.add(title["method"])
            if len(methods) > 1:
                raise ValueError(f"the mean is over runs of one method, not of "
                                 f"{' and '.join(sorted(methods))}")
            if options.json:
                print(json.dumps(title | {"splits": results[-1]}))
            elif len(options.checkpoint) == 1:
                print(", ".join(f"{name} {value}" for name, value in title.items()))
                print(table(results[-1]))
        if len(results) > 1 and not options.json:
            print(f"{len(results)} runs of {run.config['method']}, query {options.query}: mean and "
                  f"standard deviation\n{over_runs(results)}")


if __name__ == "__main__":
    main()
