"""How good is a retriever: R@n, IoU=mu and mIoU (paper Sec. 4.1.2), for any checkpoint.

    python evaluate.py runs/shapes-vdi-staged/ckpt.pt
    python evaluate.py ckpt.pt --split test --query dynamic --json
    python evaluate.py runs/mmn-?/ckpt.pt                # mean and standard deviation over runs
    python evaluate.py ckpt.pt --split test --predictions out.jsonl     # writes its answers
    python evaluate.py --predictions out.jsonl --truth test.jsonl       # scores any system's
    python evaluate.py --zero-shot --dataset charades --clip ViT-B/32   # CLIP alone, no training

Two baselines stand below each result: a moment drawn at random, and the best moment that ignores
the sentence (fitted on the training split). If the dataset knows all its events, the table also
says how often the answer lies in an event of the right actor, and of the right verb.

Inference needs the text tower and the retriever only; no injection module is loaded or needed.
`python -m extras.walk evaluate` computes IoU, NMS and R@5 of three moments by hand.

A hit is IoU >= mu. R@1 uses the best cell, R@5 the five best after greedy NMS (moments with
IoU > 0.5 are dropped). Shapes: S sentences, K retrieved moments, N clips, P candidate moments.
Moments are [start, end) in seconds.
"""
import support  # first, for a Ctrl-C while torch is imported
import dataclasses
import importlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import data
import mmn
from support import cropped, files, options, parallel, text
from support.errors import Missing, Mistake, reason, reported

QUERIES = {"full": 0, "static": 1, "dynamic": 2}                # Q, Q^s, Q^d: rows of Batch.tokens


# ------------------------------------------------------------------------------------------ metrics

def recall(predicted: Tensor, truth: Tensor, ks: tuple[int, ...] = (1, 5),
           ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """Sec. 4.1.2: R@k, IoU=mu, the percentage of sentences with a moment of IoU >= mu among the
    first k; and the mean IoU of the first moment, in percent.

    predicted  [S, K, 2] seconds, best first; K may be less than k
    truth      [S, 2] seconds
    """
    iou = mmn.interval_iou(predicted, truth[:, None])                   # [S, K]
    # DEVIATION: an IoU of exactly mu is a hit, as in MMN's code; the paper says "larger than mu"
    result = {f"R@{k},IoU={mu}": 100 * (iou[:, :k] >= mu).any(1).double().mean().item() for k in ks
              for mu in ious}
    return result | {"mIoU": 100 * iou[:, 0].double().mean().item()}


def cell_recall(iou: Tensor, ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """R@1 and mIoU from IoUs: [S], one moment per sentence; [S, P], P equally likely moments."""
    result = {f"R@1,IoU={mu}": 100 * (iou >= mu).double().mean().item() for mu in ious}
    return result | {"mIoU": 100 * iou.double().mean().item()}


def best_prior(iou: Tensor) -> int:
    """The cell that most often has IoU >= 0.5 (ties: by mean IoU): [S, P] -> index into P."""
    return int(((iou >= 0.5).double().mean(0) + 1e-6 * iou.double().mean(0)).argmax())


def event_accuracy(predicted: Tensor, samples: list[data.Sample],
                   events: dict[str, list[data.Event]]) -> dict[str, float]:
    """Noun and verb accuracy, percent: does the event with the highest IoU with the first answer
    have the named actor, and the named verb? Chance is 50 each in the shapes world.
    predicted [S, K, 2]."""
    noun = verb = 0
    for sample, answer in zip(samples, predicted[:, 0]):
        own = events[sample.video]
        spans = torch.tensor([[float(e.start_sec), float(e.end_sec)] for e in own])
        label = torch.tensor([sample.start_sec, sample.end_sec])
        named = own[int(mmn.interval_iou(spans, label).argmax())]
        overlap = mmn.interval_iou(spans, answer)
        if not overlap.any():                           # between two events: the nearer one
            overlap = -(spans.mean(1) - answer.mean()).abs()
        chosen = own[int(overlap.argmax())]
        noun += chosen.noun == named.noun
        verb += chosen.verb == named.verb
    return {"noun accuracy": 100 * noun / len(samples), "verb accuracy": 100 * verb / len(samples)}


# ------------------------------------------------------------------- predictions of any system

MAP_IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))   # QVHighlights: 0.5:0.05:0.95


def average_precision(predicted: Tensor, truth: Tensor, iou: float) -> float:
    """QVHighlights' AP of one sentence: in order of score, each moment is matched with the true
    moment of highest IoU that is not matched yet, if that IoU is at least `iou`. The area under the
    precision-recall curve, with precision made monotonic. predicted [K, 2], truth [G, 2]."""
    overlaps, taken, hits = mmn.interval_iou(predicted[:, None], truth[None]), set(), []
    for row in overlaps.tolist():                                       # [G]
        free = [g for g in range(len(row)) if row[g] >= iou and g not in taken]
        taken.update(sorted(free, key=lambda g: -row[g])[:1])
        hits.append(bool(free))
    hits = torch.tensor(hits).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)                   # the best at or after it
    return float((best * hits).sum() / len(truth))


def score_predictions(predictions: list[dict], truth: list[dict]) -> dict[str, float]:
    """Scores of predictions in QVHighlights' submission form, in percent: R@1 and R@5 (against the
    true moment of highest IoU), mIoU, and mAP as that benchmark defines it (the first ten moments
    of a sentence, in order of score; mean over sentences). Mistake if the two files do not cover
    the same sentences, or number them differently, as "vid" and "query" show.

    predictions  {"qid", "pred_relevant_windows": [[start, end, score], ...]}, best first
    truth        {"qid", "relevant_windows": [[start, end], ...]}
    """
    answers, wanted = by_qid(predictions), by_qid(truth)
    if answers.keys() != wanted.keys():
        lacking, others = wanted.keys() - answers.keys(), answers.keys() - wanted.keys()
        raise Mistake(f"the predictions do not match this truth: {len(lacking)} of its "
                      f"{len(wanted)} sentences (qid) have no prediction, and {len(others)} "
                      f"predictions have no sentence")
    if not wanted:
        raise Mistake("there is no sentence to score")
    for qid, row in wanted.items():
        for name in ("vid", "query"):
            ours, theirs = (" ".join(str(x.get(name, "")).split()) for x in (row, answers[qid]))
            if ours and theirs and ours != theirs:
                raise Mistake(f"qid {qid} is \"{theirs}\" in the predictions and \"{ours}\" in the "
                              f"truth: the two files number their sentences differently")
    answers = {qid: row["pred_relevant_windows"] for qid, row in answers.items()}
    if empty := [qid for qid, windows in answers.items() if not windows]:
        raise Mistake(f"{len(empty)} sentences have no predicted moment, for instance qid "
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
    result = {str(row["qid"]): row for row in rows}
    if len(result) < len(rows):
        qids = [str(row["qid"]) for row in rows]
        twice = next(qid for qid in qids if qids.count(qid) > 1)
        raise Mistake(f"qid {twice} occurs on two lines of one file; every sentence needs its own")
    return result


def read_rows(path: str | pathlib.Path, key: str) -> list[dict]:
    """Json lines with `key` (and "qid"; without it they are numbered from 0), or an annotation file
    in its published form, numbered from 0 after cleaning. Mistake that lists every invalid line."""
    path = pathlib.Path(path)
    if path.suffix != ".jsonl":
        if key != "relevant_windows":
            raise Mistake(f"{path} is not a file of predictions, which are json lines (.jsonl)")
        samples = data.clean(data.read_file(path))[0]
        return [{"qid": i, "vid": s.video, "query": s.sentence,
                 "relevant_windows": [[s.start_sec, s.end_sec]]} for i, s in enumerate(samples)]

    def row(numbered: tuple[int, str]) -> list[dict]:
        content = json.loads(numbered[1])
        windows = [[float(v) for v in window] for window in content[key]]
        if not all(len(w) >= 2 and all(map(math.isfinite, w)) for w in windows):
            raise ValueError(f"{key} contains an invalid moment")
        if key == "relevant_windows" and not windows:
            raise ValueError("the sentence has no true moment")
        return [{"qid": content.get("qid", numbered[0]), key: windows,
                 **{name: content[name] for name in ("vid", "query") if name in content}}]

    lines = enumerate(files.numbered_lines(path))
    return data.read_lines(path, ((i, (k, line)) for k, (i, line) in lines), row)


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(tower: clip.TextTower, retriever: mmn.MomentMap, videos: data.Videos, batch: int,
            device: torch.device | str, query: str = "full", top_k: int = 5) -> Tensor:
    """Moments of all sentences, in the order of `videos.samples`: [S, top_k, 3], see mmn.decode."""
    was_training = retriever.training
    tower.eval(), retriever.eval()
    result = []
    for b in videos.batches(batch, device=device):
        b = b.to(device)
        x = F.normalize(tower.encode_text(b.tokens[QUERIES[query]]), dim=1)     # [S, D]
        scores = retriever.scores(b.frames, x, b.video_of)              # [S, N, N]
        if not torch.isfinite(scores).all():
            raise Mistake(f"scores are not finite for a video among {', '.join(b.videos[:5])} ...; "
                          f"check the features with: python data.py check")
        result.append(mmn.decode(scores, b.durations_sec, top_k,
                                 candidates=retriever.candidates).cpu())
    tower.train(was_training), retriever.train(was_training)
    return torch.cat(result)


# -------------------------------------------------------------------------------------- checkpoints

@dataclasses.dataclass
class Run:
    """A checkpoint, ready for inference."""
    config: dict                                                # every field of train.Config
    text: clip.TextTower                                        # f^q
    retriever: mmn.MomentMap                                    # f^g
    checkpoint: dict                                            # everything else that was saved


def load(path: str | pathlib.Path, device: torch.device | str = "cpu") -> Run:
    """Reads a checkpoint of train.py. Nothing in it is executed, no injection module is read."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise Mistake(f"{path} is a folder; the checkpoint in it is {path / 'ckpt.pt'}")
    if not path.is_file():
        raise Mistake(f"there is no checkpoint {path}; "
                      f"{options.training_command(path, mmn.RETRIEVERS)} makes one")
    try:
        saved = files.read_tensors(path)
        config, sizes, weights, tower, *_ = (saved[key] for key in (
            "config", "sizes", "retriever", "text", "window_sec", "parser"))
        kind = mmn.retriever_class(config["retriever"])
        if not sum(sizes["pool_counts"]) < sizes["num_clips"] <= 512 \
                or not sizes["layers"] <= len(weights):
            raise ValueError(f"its weights do not have the sizes {sizes}")
        with torch.device("meta"):      # allocate nothing before all shapes are known to agree
            clip.check(kind(**sizes), weights, "this retriever")
        retriever = clip.fill(kind(**sizes), weights, "this retriever")
        tower = clip.load_text(config.get("text_clip", ""), tower)
    except Missing:             # of the text tower, a package or its configuration
        raise
    except Exception as error:  # torch raises a dozen types for what does not fit
        raise Mistake(f"{path} is not a checkpoint of train.py: {reason(error)}") from error
    rest = {key: value for key, value in saved.items() if key not in ("retriever", "text")}
    return Run(config, tower.to(device), cropped.speed_up(retriever).to(device), rest)


def answers(run: Run, splits: list[str] | None = None, query: str = "full",
            root: str | None = None, device: torch.device | str = "cpu",
            allow_missing: bool = False, parser: str | None = None, top_k: int = 5
            ) -> Iterator[tuple[str, data.Videos, Tensor]]:
    """For each split its name, its sentences and their moments [S, top_k, 3].

    splits    default: all but train (or train, if it is the only one)
    parser    default: the one used in training"""
    config = run.config
    dataset, root = config["dataset"], root or config["root"]
    if splits is None:
        splits = [split for split in data.splits(dataset, root) if split != "train"] or ["train"]
    store = data.open_store(dataset, config["clip"], root, config["frames"])
    if store.manifest["sha256"] != run.checkpoint["clip_sha256"]:
        raise Mistake(f"the features in {store.folder} come from another CLIP (SHA-256 "
                      f"{store.manifest['sha256'][:12]}) than this checkpoint was trained with "
                      f"({run.checkpoint['clip_sha256'][:12]}); make them with that one")
    parser = data.parser_of(dataset, root, parser or config["parser"], config["mask"])
    if parser.name != run.checkpoint["parser"]:
        print(f"note: this checkpoint was trained with the parser {run.checkpoint['parser']} and "
              f"is evaluated with {parser.name}", file=sys.stderr)
    for split in splits:
        if dataset not in data.FILES and split not in data.splits(dataset, root):
            raise Mistake(f"{dataset} has no split {split!r}; it has "
                          f"{', '.join(data.splits(dataset, root))}")
        if split in data.LEAKING.get(dataset, ()):
            raise Mistake(f"{split} shares sentences with the training split of {dataset}, so the "
                          f"result would mean nothing; train with --dataset {dataset}-cg")
        rows = data.read_annotations(dataset, split, root)
        if allow_missing and not any(row.video in store for row in rows):
            print(f"note: no video of {split} has features; the split is skipped", file=sys.stderr)
            continue
        videos = data.Videos(rows, store, run.retriever.num_clips, parser,
                             tokenize=run.text.tokenize)
        if videos.missing and not allow_missing:
            raise Mistake(f"{len(videos.missing)} of {len(videos.missing) + len(videos)} videos of "
                          f"{split} have no features (see {store.folder / 'failed.txt'}); "
                          f"--allow-missing skips their {videos.lost} sentences")
        yield split, videos, predict(run.text, run.retriever, videos, config["batch"], device,
                                     query, top_k)


def evaluate(run: Run, splits: list[str] | None = None, query: str = "full",
             root: str | None = None, device: torch.device | str = "cpu",
             allow_missing: bool = False, parser: str | None = None,
             predictions: str | None = None) -> dict[str, dict]:
    """Split -> metrics. Arguments as of `answers`; `predictions`: a file for the answers to one
    split, ten moments per sentence in QVHighlights' submission form."""
    dataset, root = run.config["dataset"], root or run.config["root"]
    train = data.read_annotations(dataset, "train", root)
    if not train:
        raise Mistake(f"the training split of {dataset} contains no moment; add some")
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
        metrics = {"queries": len(videos.samples)}
        if split == "train" and run.config["method"] != "zero-shot":
            metrics["trained on"] = True
        if videos.missing:
            metrics |= {"videos missing": len(videos.missing), "queries missing": videos.lost}
        metrics |= recall(predicted[..., :2], videos.moments_sec)
        if events:
            metrics |= event_accuracy(predicted[..., :2], videos.samples, events)
        results[split] = metrics | {"random moment": cell_recall(iou),
                                    "best prior": cell_recall(iou[:, prior])}
    return results


def write_predictions(path: str, rows: list[data.Sample], samples: list[data.Sample],
                      predicted: Tensor) -> None:
    """Answers [S, K, 3] to `samples`, the `rows` grouped by video; qid is the index in `rows`."""
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        numbers.setdefault(row.video, []).append(i)
    lines = {}
    for sample, moments in zip(samples, predicted.tolist()):
        qid = numbers[sample.video].pop(0)
        lines[qid] = submission(qid, sample.sentence, sample.video, moments)
    files.save(path, "".join(lines[qid] for qid in sorted(lines)))


def submission(qid: int, sentence: str, name: str, moments: list) -> str:
    """A line of QVHighlights' submission form. moments: (start_sec, end_sec, score), best first."""
    windows = [[round(v, 4) for v in moment] for moment in moments if moment[2] > -math.inf]
    return json.dumps({"qid": qid, "query": sentence, "vid": name,
                       "pred_relevant_windows": windows}) + "\n"


def table(results: dict[str, dict]) -> str:
    """Results as text: a line for each split and for each of its two baselines."""
    columns = list(dict.fromkeys(name for metrics in results.values() for name, value
                                 in metrics.items() if type(value) in (int, float)))
    rows = []
    for split, metrics in results.items():
        for name, values in ((text.split_name(split, metrics), metrics),
                             ("  random moment", metrics["random moment"]),
                             ("  best prior", metrics["best prior"])):
            cells = [values.get(column, "") for column in columns]
            rows.append([name, *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in cells)])
    return text.aligned(["", *(name.replace("IoU=", "") for name in columns)], rows)


def main() -> None:
    arguments = options.parser("evaluate checkpoints, or score the predictions of any system")
    add = arguments.add_argument
    add("checkpoint", nargs="*", help="ckpt.pt of a run; several: their mean and deviation")
    add("--predictions", metavar="JSONL",
        help="QVHighlights' form: written with a checkpoint and one --split, scored with --truth")
    add("--truth", metavar="FILE", help="jsonl in QVHighlights' form, or published annotations")
    add("--zero-shot", action="store_true", help="CLIP alone on --dataset, without a checkpoint")
    add("--dataset", help="with --zero-shot: any dataset that has features")
    add("--clip", default="ViT-B/32", help="with --zero-shot: the CLIP of these features")
    add("--split", action="append", help="may be repeated (default: all but train)")
    add("--query", choices=QUERIES, default="full", help="what to retrieve by (Fig. 3)")
    add("--root", help="folder of datasets (default: the one used in training)")
    add("--device", **options.DEVICE)
    add("--parser", help="spaCy pipeline (default: the one used in training)")
    add("--allow-missing", action="store_true", help="skip videos without features")
    add("--json", action="store_true", help="print one json object per checkpoint")
    given = arguments.parse_args()
    with reported():
        score(given) if given.truth else evaluate_all(given)


def score(given) -> None:
    """evaluate.py --predictions --truth"""
    if given.checkpoint or not given.predictions:
        raise Mistake("--truth scores --predictions, without a checkpoint")
    scores = score_predictions(read_rows(given.predictions, "pred_relevant_windows"),
                               read_rows(given.truth, "relevant_windows"))
    print(json.dumps(scores) if given.json else
          "\n".join(f"{name:12s} {value:6.2f}" for name, value in scores.items()))


def evaluate_all(given) -> None:
    """evaluate.py CHECKPOINT ..., or --zero-shot"""
    if bool(given.checkpoint) == given.zero_shot or given.zero_shot and not given.dataset:
        raise Mistake("name a checkpoint, or --predictions and --truth, or --zero-shot --dataset")
    if given.predictions and (len(given.checkpoint) > 1 or len(given.split or []) != 1):
        raise Mistake("--predictions writes the answers of one checkpoint to one --split")
    if given.predictions and pathlib.Path(given.predictions).exists():
        raise Mistake(f"{given.predictions} already exists; choose another name, or score it with "
                      f"--truth")
    device, results, methods = parallel.pick_device(given.device), [], set()
    for path in given.checkpoint or [None]:
        run = load(path, device) if path else importlib.import_module(
            "extras.zero_shot").run_of(given.dataset, given.clip, given.root or "data", device)
        results.append(evaluate(run, given.split, given.query, given.root, device,
                                given.allow_missing, given.parser, given.predictions))
        title = {name: run.config[name] for name in ("dataset", "method", "seed")} | {
            "query": given.query, "epoch": run.checkpoint["epoch"],
            "parser": given.parser or run.checkpoint["parser"]}
        methods.add(title["method"])
        if len(methods) > 1:
            raise Mistake(f"a mean needs runs of one method, not {' and '.join(sorted(methods))}")
        if given.json:
            print(json.dumps(title | {"splits": results[-1]}))
        elif len(given.checkpoint) < 2:
            print(", ".join(f"{name} {value}" for name, value in title.items()))
            print(table(results[-1]))
    if len(results) > 1 and not given.json:
        print(f"{len(results)} runs of {run.config['method']}, query {given.query}: mean and "
              f"standard deviation\n{text.over_runs(results)}")


if __name__ == "__main__":
    main()
