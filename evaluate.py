"""How good is a retriever: R@n, IoU=mu and mIoU (paper Sec. 4.1.2), for any checkpoint.

    python evaluate.py runs/shapes-vdi-staged/ckpt.pt
    python evaluate.py ckpt.pt --split test --query dynamic --json
    python evaluate.py runs/mmn-?/ckpt.pt                # mean and standard deviation over runs
    python evaluate.py ckpt.pt --split test --predictions out.jsonl     # writes its answers
    python evaluate.py --predictions out.jsonl --truth test.jsonl       # scores any system's

Two baselines stand below each result: a moment drawn at random, and the best moment that ignores
the sentence (fitted on the training split). If the dataset lists its events, the table also
says how often the answer lies in an event of the right actor, and of the right verb.

Inference needs the text tower and the retriever only; no injection module is loaded or needed.
docs/reading.ipynb computes IoU, NMS and R@5 of three moments by hand.

A hit is IoU >= mu. R@1 uses the best cell, R@5 the five best after greedy NMS (moments with
IoU > 0.5 are dropped). Shapes: S sentences, K retrieved moments, N clips, P candidate moments.
Moments are [start, end) in seconds.
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
import data
import mmn
import shapes
from support import cropped, files, options, parallel, text, untrained
from support.errors import Missing, Mistake, reason, reported

QUERIES = {"full": 0, "static": 1, "dynamic": 2}                # Q, Q^s, Q^d: rows of Batch.tokens


# ------------------------------------------------------------------------------------------ metrics

def recall(predicted: Tensor, truth: Tensor, ks: tuple[int, ...] = (1, 5),
           ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """Sec. 4.1.2: R@k, IoU=mu, the percentage of sentences with a moment of IoU >= mu among the
    first k; and the mean IoU of the first moment, in percent.

    predicted  [S, K, 2] seconds, best first; K may be less than k
    truth      [S, 2] seconds, or [S, M, 2] if a sentence has several: the best one counts
    """
    if truth.ndim == 2:
        truth = truth[:, None]                                          # [S, 1, 2]
    iou = mmn.interval_iou(predicted[:, :, None], truth[:, None]).amax(2)       # [S, K]
    # DEVIATION: an IoU of exactly mu is a hit, as in MMN's code; the paper says "larger than mu"
    result = {}
    for k in ks:
        for mu in ious:
            is_hit = (iou[:, :k] >= mu).any(1)                          # [S]
            result[f"R@{k},IoU={mu}"] = 100 * is_hit.double().mean().item()
    result["mIoU"] = 100 * iou[:, 0].double().mean().item()
    return result


def baseline_metrics(iou: Tensor, ious: tuple[float, ...] = (0.5, 0.7)) -> dict[str, float]:
    """R@1 and mIoU from IoUs: [S], one moment per sentence; [S, P], P equally likely moments."""
    result = {f"R@1,IoU={mu}": 100 * (iou >= mu).double().mean().item() for mu in ious}
    return result | {"mIoU": 100 * iou.double().mean().item()}


def candidate_iou(retriever: mmn.MomentMap, windows_sec: Tensor, durations_sec: Tensor) -> Tensor:
    """IoU of every candidate with the true moment that it overlaps most: [S, M, 2], [S] -> [S, P].
    In parts, because [S, N, N] of ActivityNet-Captions would take gigabytes."""
    cells = retriever.cells.cpu()                                       # [P], index into N*N
    parts = zip(windows_sec.split(1024), durations_sec.split(1024))
    return torch.cat([data.best_iou(*part, retriever.num_clips).flatten(1)[:, cells]
                      for part in parts])


def best_prior(iou: Tensor) -> int:
    """The cell that most often has IoU >= 0.5 (ties: by mean IoU): [S, P] -> index into P."""
    hits = (iou >= 0.5).double().mean(0)                                # [P]
    return int((hits + 1e-6 * iou.double().mean(0)).argmax())


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(tower: clip.TextTower, retriever: mmn.MomentMap, videos: data.Videos, batch: int,
            device: torch.device | str, query: str = "full", top_k: int = 5,
            frozen: clip.TextTower | None = None, weight: float = 0.0,
            smooth_sec: float = 0.0) -> Tensor:
    """Moments of all sentences, in the order of `videos.samples`: [S, top_k, 3], see mmn.decode.
    frozen: CLIP's original text tower, whose smoothed scores are added at `weight`. Leaves the
    tower and the retriever in evaluation mode."""
    tower.eval()                                # DistilBERT has dropout
    retriever.eval()                            # BatchNorm uses its running statistics
    result = []
    for b in videos.batches(batch, device=device):
        b = b.to(device)
        x = F.normalize(tower.encode_text(b.tokens[QUERIES[query]]), dim=1)     # [S, D]
        scores = retriever.scores(b.frames, x, b.video_of)              # [S, N, N]
        if not torch.isfinite(scores).all():
            raise Mistake(f"scores are not finite for a video among {', '.join(b.videos[:5])} ...; "
                          f"check the features with: python data.py check")
        if frozen is not None:
            x = F.normalize(frozen.encode_text(b.tokens[QUERIES[query]]), dim=1)
            similarity = torch.einsum("sd,std->st", x, b.frames[b.video_of])    # [S, T]
            each_sec = b.durations_sec / similarity.shape[1]                    # [S]
            similarity = untrained.smoothed(similarity, each_sec, smooth_sec)
            alone = untrained.contrast_map(similarity, retriever.num_clips)     # [S, N, N]
            scores = retriever.to_map(untrained.fuse_with_clip(
                retriever.at_candidates(scores), retriever.at_candidates(alone), weight))
        result.append(mmn.decode(scores, b.durations_sec, top_k,
                                 candidates=retriever.candidates).cpu())
    return torch.cat(result)


# -------------------------------------------------------------------------------------- checkpoints

@dataclasses.dataclass
class Run:
    """A checkpoint, ready for inference."""
    config: dict                                                # every field of train.Config
    text: clip.TextTower                                        # f^q
    retriever: mmn.MomentMap                                    # f^g
    checkpoint: dict                                            # everything else that was saved
    frozen: clip.TextTower | None = None                        # to be fused with: `add_clip`


def load(path: str | pathlib.Path, device: torch.device | str = "cpu") -> Run:
    """Reads a checkpoint of train.py. Nothing in it is executed, no injection module is read."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise Mistake(f"{path} is a folder; the checkpoint in it is {path / 'ckpt.pt'}")
    if not path.is_file():
        raise Mistake(f"there is no checkpoint {path}; name the ckpt.pt of a run of train.py")
    try:
        saved = files.read_tensors(path)
        config = saved["config"]
        sizes = saved["sizes"]
        weights = saved["retriever"]
        # what a file claims is compared with what is in it before anything is allocated
        fits = sum(sizes["pool_counts"]) < sizes["num_clips"] <= 512
        if not fits or sizes["layers"] > len(weights):
            raise ValueError(f"its weights do not have the sizes {sizes}")
        if "window_sec" not in saved or "parser" not in saved:
            raise ValueError("it lacks window_sec or parser")
        retriever = clip.fill(lambda: mmn.MMN(**sizes, convolution=cropped.Convolution), weights,
                              "this retriever")
        tower = clip.load_text(config.get("text_clip", ""), saved["text"])
    except Missing:             # a package or file of the text tower
        raise
    except Exception as error:  # torch raises a dozen types for what does not fit
        raise Mistake(f"{path} is not a checkpoint of train.py: {reason(error)}") from error
    rest = {key: value for key, value in saved.items() if key not in ("retriever", "text")}
    return Run(config, tower.to(device), retriever.to(device), rest)


CLIP_WEIGHTS = (0.0, 0.25, 0.5, 1.0, 2.0)   # of CLIP alone, from which validation chooses


def can_add_clip(run: Run) -> bool:
    """Are the frames and the tokens those of one CLIP?"""
    own_tower = run.config.get("text_clip", "") in ("", "shuffled", run.config["clip"])
    return own_tower and bool(run.checkpoint["features"]["resolution"])


def add_clip(run: Run, root: str | None, device: torch.device | str) -> None:
    """Gives `run` the text tower of its CLIP as it was before training, and so fuses the scores of
    CLIP alone into its answers. Mistake without that tower, or a weight."""
    if not can_add_clip(run):
        raise Mistake("CLIP alone can be fused only with a retriever of CLIP's own frames and text")
    if "clip_weight" not in run.checkpoint:
        raise Mistake("this checkpoint has no weight for CLIP alone, which training chooses on a "
                      "validation split; omit --fuse-clip")
    path = data.clip_file(run.config["clip"], root or run.config["root"])
    path = own_clip(run, path, "name the folder of its dataset with --root")
    activation = clip.activation_of(run.checkpoint["features"])
    run.frozen = clip.load_text(path, activation=activation).to(device)


def own_clip(run: Run, path: str, how: str) -> str | pathlib.Path:
    """`path`, if it is the CLIP of the features that a checkpoint was trained with; a published one
    is downloaded. Mistake for missing or other weights; how: what to do then."""
    # subtle: the features of other weights would give plausible but wrong answers
    digest = run.checkpoint["clip_sha256"]
    try:
        actual = clip.sha256(path)              # of a published name without a download
        if actual == digest and path in clip.PUBLISHED:
            path = clip.download(path)
    except (OSError, Mistake) as error:
        raise Mistake(f"this checkpoint needs the weights of the CLIP {run.config['clip']!r}, "
                      f"SHA-256 {digest} ({error}); {how}") from error
    if actual != digest:
        raise Mistake(f"{path} is not the CLIP this checkpoint was trained with: its SHA-256 is "
                      f"{actual}, not {digest}; {how}")
    return path


def choose_weight(run: Run, split: str, device: torch.device | str) -> float:
    """The weight of CLIP alone with the highest R@1 0.5 + R@1 0.7 on a validation split."""
    run.checkpoint["clip_weight"] = 0.0
    add_clip(run, None, device)
    reached = {}
    for weight in CLIP_WEIGHTS:
        run.checkpoint["clip_weight"] = weight
        [(_, videos, predicted)] = answers(run, [split], device=device, allow_missing=True)
        metrics = recall(predicted[..., :2], videos.windows_sec)
        reached[weight] = metrics["R@1,IoU=0.5"] + metrics["R@1,IoU=0.7"]
    run.frozen = None
    run.checkpoint["clip_weight"] = max(reached, key=reached.get)
    return run.checkpoint["clip_weight"]


def answers(run: Run, splits: list[str] | None = None, query: str = "full",
            root: str | None = None, device: torch.device | str = "cpu",
            allow_missing: bool = False, top_k: int = 5
            ) -> Iterator[tuple[str, data.Videos, Tensor]]:
    """For each split its name, its sentences and their moments [S, top_k, 3].

    splits    default: all but train (or train, if it is the only one)"""
    config = run.config
    dataset = config["dataset"]
    root = root or config["root"]
    if splits is None:
        splits = [split for split in data.splits(dataset, root) if split != "train"] or ["train"]
    store = data.open_store(dataset, config["clip"], root, config["frames"],
                            run.checkpoint["clip_sha256"])
    if store.manifest["sha256"] != run.checkpoint["clip_sha256"]:
        raise Mistake(f"the features in {store.folder} come from another CLIP (SHA-256 "
                      f"{store.manifest['sha256'][:12]}) than this checkpoint was trained with "
                      f"({run.checkpoint['clip_sha256'][:12]}); make them with that one")
    parser = data.parser_of(dataset, root, config["mask"])
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
                                     query, top_k, run.frozen,
                                     run.checkpoint.get("clip_weight", 0.0),
                                     untrained.smooth_sec_of(dataset))


def evaluate(run: Run, splits: list[str] | None = None, query: str = "full",
             root: str | None = None, device: torch.device | str = "cpu",
             allow_missing: bool = False,
             predictions: str | None = None) -> dict[str, dict]:
    """Split -> metrics. Arguments as of `answers`; `predictions`: a file for the answers to one
    split, ten moments per sentence in QVHighlights' submission form."""
    dataset = run.config["dataset"]
    root = root or run.config["root"]
    train = data.read_annotations(dataset, "train", root)
    if not train:
        raise Mistake(f"the training split of {dataset} contains no moment; add some")
    durations_sec = torch.tensor([s.duration_sec for s in train])
    prior = best_prior(candidate_iou(run.retriever, data.windows_of(train), durations_sec))
    events = shapes.read_events(dataset, root)                          # None for a real dataset
    top_k = 10 if predictions else 5            # QVHighlights' mAP looks at ten
    results = {}
    for split, videos, predicted in answers(run, splits, query, root, device, allow_missing,
                                            top_k):
        if predictions:
            write_predictions(predictions, data.read_annotations(dataset, split, root),
                              videos.samples, predicted)
        iou = candidate_iou(run.retriever, videos.windows_sec, videos.durations_sec)    # [S, P]
        metrics = {"queries": len(videos.samples)}
        if split == "train" and run.checkpoint["epoch"]:                # 0: CLIP alone
            metrics["trained on"] = True
        if videos.missing:
            metrics |= {"videos missing": len(videos.missing), "queries missing": videos.lost}
        metrics |= recall(predicted[..., :2], videos.windows_sec)
        if events:
            metrics |= shapes.event_accuracy(predicted[..., :2], videos.samples, events)
        results[split] = metrics | {"random moment": baseline_metrics(iou),
                                    "best prior": baseline_metrics(iou[:, prior])}
    return results


def write_predictions(path: str, rows: list[data.Sample], samples: list[data.Sample],
                      predicted: Tensor) -> None:
    """Answers [S, K, 3] to `samples`, the `rows` grouped by video, in QVHighlights' submission
    form; a qid that the annotations do not have is the index in `rows`."""
    numbers: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        numbers.setdefault(row.video, []).append(i)
    lines = {}
    for sample, moments in zip(samples, predicted.tolist()):
        i = numbers[sample.video].pop(0)
        qid = i if sample.qid is None else sample.qid
        # subtle: with all digits, because a rounded time may cross the IoU of a hit
        windows = [moment for moment in moments if moment[2] > -math.inf]
        lines[i] = json.dumps({"qid": qid, "query": sample.sentence, "vid": sample.video,
                               "pred_relevant_windows": windows}) + "\n"
    files.save(path, "".join(lines[i] for i in sorted(lines)))


def formatted(value: int | float | str) -> str:
    if isinstance(value, float):
        return f"{value:.2f}"
    return str(value)


def table(results: dict[str, dict]) -> str:
    """Results as text: a line for each split and for each of its two baselines."""
    columns = {}                                # name -> None: a set that keeps its order
    for metrics in results.values():
        for name, value in metrics.items():
            if type(value) in (int, float):     # not the baselines, which are lines of their own
                columns[name] = None
    rows = []
    for split, metrics in results.items():
        lines = {text.split_name(split, metrics): metrics,
                 "  random moment": metrics["random moment"],
                 "  best prior": metrics["best prior"]}
        for name, values in lines.items():
            rows.append([name] + [formatted(values.get(column, "")) for column in columns])
    return text.aligned([""] + [name.replace("IoU=", "") for name in columns], rows)


# --------------------------------------------------------------------------------- the command line

def parse_arguments():
    arguments = options.parser("evaluate checkpoints, or score the predictions of any system")
    add = arguments.add_argument
    add("checkpoint", nargs="*", help="ckpt.pt of a run; several: their mean and deviation")
    add("--predictions", metavar="JSONL",
        help="QVHighlights' form: written with a checkpoint and one --split, scored with --truth")
    add("--truth", metavar="FILE", help="jsonl in QVHighlights' form, or published annotations")
    add("--split", action="append", help="may be repeated (default: all but train)")
    add("--fuse-clip", action="store_true",
        help="add the scores of CLIP alone, at the weight that validation chose in training")
    add("--query", choices=QUERIES, default="full", help="what to retrieve by (Fig. 3)")
    add("--root", help="folder of datasets (default: the one used in training)")
    add("--device", **options.DEVICE)
    add("--allow-missing", action="store_true", help="skip videos without features")
    add("--json", action="store_true", help="print one json object per checkpoint")
    return arguments.parse_args()


def evaluate_all(given) -> None:
    """evaluate.py CHECKPOINT ..."""
    paths = given.checkpoint
    if not paths:
        raise Mistake("name a checkpoint, or --predictions and --truth")
    if given.predictions and (len(paths) > 1 or len(given.split or []) != 1):
        raise Mistake("--predictions writes the answers of one checkpoint to one --split")
    if given.predictions and pathlib.Path(given.predictions).exists():
        raise Mistake(f"{given.predictions} already exists; choose another name, or score it with "
                      f"--truth")
    device = parallel.pick_device(given.device)
    all_results = []
    methods = set()
    for path in paths:
        run = load(path, device)
        if given.fuse_clip:
            add_clip(run, given.root, device)
        results = evaluate(run, given.split, given.query, given.root, device, given.allow_missing,
                           given.predictions)
        all_results.append(results)
        title = {name: run.config[name] for name in ("dataset", "method", "seed")}
        title.update(query=given.query, epoch=run.checkpoint["epoch"],
                     parser=run.checkpoint["parser"])
        if given.fuse_clip:
            title["weight of CLIP alone"] = run.checkpoint["clip_weight"]
        methods.add(title["method"])
        if len(methods) > 1:
            raise Mistake(f"a mean needs runs of one method, not {' and '.join(sorted(methods))}")
        if given.json:
            title["splits"] = results
            print(json.dumps(title))
        elif len(paths) == 1:
            print(", ".join(f"{name} {value}" for name, value in title.items()))
            print(table(results))
    if len(paths) > 1 and not given.json:
        print(f"{len(paths)} runs of {run.config['method']}, query {given.query}: mean and "
              f"standard deviation\n{text.over_runs(all_results)}")


if __name__ == "__main__":
    with reported():
        arguments = parse_arguments()
        if arguments.truth:             # any system's answers, by QVHighlights' definitions
            from extras import qvhighlights
            qvhighlights.main(arguments)
        else:
            evaluate_all(arguments)
