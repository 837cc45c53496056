"""How good is a retriever: R@n, IoU=mu and mIoU (paper Sec. 4.1.2), for any checkpoint.

    python evaluate.py runs/shapes-vdi-staged/ckpt.pt
    python evaluate.py ckpt.pt --split test --query dynamic --json
    python evaluate.py runs/table/mmn-?/ckpt.pt          # mean and standard deviation over runs

Beside each result stand what a random moment would score, and the best moment that does not look at
the sentence (fitted on the training split), so that a number means something; and, where the world
knows all events of its videos, how often the answer lies in an event of the right actor and of the
right verb.

Inference needs the text tower and MMN only; no injection module is loaded, or in need of it.

A hit is IoU >= mu. R@1 takes the best cell, R@5 the five best after greedy NMS (IoU > 0.5 is
dropped). Shapes: S sentences, K retrieved moments, N clips, P candidate moments. Moments are
[start, end) in seconds.
"""
import argparse
import dataclasses
import json
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import data
import mmn
import parse

QUERIES = {"full": 0, "static": 1, "dynamic": 2}                # Q, Q^s, Q^d: rows of Batch.tokens


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
    """The same for answers that are cells, from their IoU [S] or the IoU of several equally likely
    ones [S, P]."""
    result = {f"R@1,IoU={mu}": 100 * (iou >= mu).double().mean().item() for mu in ious}
    return result | {"mIoU": 100 * iou.double().mean().item()}


def best_prior(iou: Tensor) -> int:
    """The cell that hits most of the training moments at IoU 0.5, whatever the sentence: [S, P] ->
    index into P."""
    return int(((iou >= 0.5).double().mean(0) + 1e-6 * iou.double().mean(0)).argmax())


def event_accuracy(predicted: Tensor, samples: list[data.Sample],
                   events: dict[str, list[data.Event]]) -> dict[str, float]:
    """Noun accuracy and verb accuracy in percent: is the event that overlaps most with the first
    answer one of the named actor; one of the named verb? By chance 50 each in the shapes world.
    predicted [S, K, 2]."""
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


# --------------------------------------------------------------------------------------- prediction

@torch.no_grad()
def predict(text: clip.TextTower, retriever: mmn.MMN, videos: data.Videos, batch: int,
            device: torch.device | str, query: str = "full", top_k: int = 5,
            fusion: str = "published", normalise: bool = True) -> Tensor:
    """Moments for all sentences of `videos`, in the order of `videos.samples`: [S, top_k, 3], see
    mmn.decode."""
    fuse = {"published": mmn.fuse, "product": mmn.plain_product}[fusion]
    was_training = retriever.training
    text.eval(), retriever.eval()
    result = []
    for b in videos.batches(batch):
        b = b.to(device)
        x = text.encode_text(b.tokens[QUERIES[query]])                  # [S, D]
        x = F.normalize(x, dim=1) if normalise else x
        scores = fuse(*retriever(b.frames, x, b.video_of))              # [S, N, N]
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
    retriever: mmn.MMN
    metrics: dict  # of the epoch that was kept, on the split that chose it
    checkpoint: dict                                            # everything else that was saved


def load(path: str | pathlib.Path, device: torch.device | str = "cpu") -> Run:
    """Reads a checkpoint of train.py. Nothing in the file is executed. The injection modules stay
    unread."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; python train.py makes one")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        config, metrics = saved["config"], saved["metrics"]
        sizes, weights, text = saved["mmn_sizes"], saved["mmn"], saved["text"]
    except Exception as error:  # torch raises a dozen kinds for a damaged or a hostile file
        raise ValueError(f"{path} is not a checkpoint of train.py: {type(error).__name__} "
                         f"{str(error).splitlines()[0] if str(error) else ''}") from error
    retriever = mmn.MMN(**sizes)
    retriever.load_state_dict(weights)
    rest = {key: value for key, value in saved.items() if key not in ("mmn", "text")}
    return Run(config, clip.build_text(text).to(device), retriever.to(device).eval(), metrics, rest)


def evaluate(run: Run, splits: list[str] | None = None, query: str = "full",
             root: str | None = None, device: torch.device | str = "cpu",
             allow_missing: bool = False, parser: str | None = None) -> dict[str, dict]:
    """Split -> metrics. `splits`: default all but train (train too, if it is the only one).
    `parser`: default the one of the training."""
    config = run.config
    root = root or config["root"]
    dataset = config["dataset"]
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
    N = run.retriever.num_clips
    train = data.read_annotations(dataset, "train", root)
    moments_sec = torch.tensor([[s.start_sec, s.end_sec] for s in train])
    durations_sec = torch.tensor([s.duration_sec for s in train])
    candidates = run.retriever.cells.cpu()
    prior = best_prior(mmn.iou_map(moments_sec, durations_sec, N).flatten(1)[:, candidates])
    events = data.read_events(dataset, root)
    results = {}
    for split in splits:
        rows = data.read_annotations(dataset, split, root)
        if allow_missing and not any(row.video in store for row in rows):
            print(f"note: no video of {split} has features, so it is left out", file=sys.stderr)
            continue
        videos = data.Videos(rows, store, N, parser, normalise=config["normalise"])
        if videos.missing and not allow_missing:
            raise FileNotFoundError(f"{len(videos.missing)} of {len(videos.missing) + len(videos)} "
                                    f"videos of {split} have no features (see "
                                    f"{store.folder / 'failed.txt'}); --allow-missing leaves out "
                                    f"their {videos.lost} sentences")
        predicted = predict(run.text, run.retriever, videos, config["batch"], device, query,
                            fusion=config["fusion"], normalise=config["normalise"])
        iou = videos.iou.flatten(1)[:, candidates]                      # [S, P]
        results[split] = {
            "queries": len(videos.samples),
            **({"videos missing": len(videos.missing), "queries missing": videos.lost}
               if videos.missing else {}),
            **recall(predicted[..., :2], videos.moments_sec),
            **(event_accuracy(predicted[..., :2], videos.samples, events) if events else {}),
            "random moment": cell_recall(iou), "best prior": cell_recall(iou[:, prior])}
    return results


def table(results: dict[str, dict]) -> str:
    """Results as text, a line for each split and for each of its two yardsticks."""
    columns = list(dict.fromkeys(name for metrics in results.values() for name, value
                                 in metrics.items() if isinstance(value, (int, float))))
    width = max(map(len, [*results, "  random moment"]))
    lines = [" " * width + "".join(f"  {name.replace('IoU=', '')}" for name in columns)]
    for split, metrics in results.items():
        rows = {split: metrics, "  random moment": metrics["random moment"],
                "  best prior": metrics["best prior"]}
        for name, values in rows.items():
            cells = ["" if c not in values else f"{values[c]:.2f}" if isinstance(values[c], float)
                     else str(values[c])
                     for c in columns]
            lines.append(name.ljust(width) + "".join(f"  {cell:>{len(c.replace('IoU=', ''))}}"
                                                     for c, cell in zip(columns, cells)))
    return "\n".join(lines)


def over_runs(runs: list[dict[str, dict]]) -> str:
    """Mean and standard deviation of several runs' results as text, a line a split."""
    splits = [split for split in runs[0] if all(split in run for run in runs)]
    names = [name for name, value in runs[0][splits[0]].items() if isinstance(value, float)]
    width = max(map(len, runs[0]))
    lines = [" " * width + "".join(f"  {name.replace('IoU=', ''):>14}" for name in names)]
    for split in splits:
        values = torch.tensor([[run[split][name] for name in names] for run in runs])
        cells = (f"{mean:6.1f} +- {std:3.1f}" for mean, std in zip(values.mean(0), values.std(0)))
        lines.append(split.ljust(width) + "".join(f"  {cell:>14}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("checkpoint", nargs="+",
                           help="ckpt.pt of a run; of several the mean and standard deviation")
    arguments.add_argument("--split", action="append",
                           help="a split, may be given again (default: all but train)")
    arguments.add_argument("--query", choices=QUERIES, default="full",
                           help="what to retrieve by (Fig. 3)")
    arguments.add_argument("--root",
                           help="folder of datasets (default: the one used in training)")
    arguments.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arguments.add_argument("--parser", help="spaCy pipeline or 'rules' (default: as in training)")
    arguments.add_argument("--allow-missing", action="store_true",
                           help="leave out videos without features")
    arguments.add_argument("--json", action="store_true", help="print one json object a checkpoint")
    options = arguments.parse_args()
    try:
        device, results, methods = data.pick_device(options.device), [], set()
        for path in options.checkpoint:
            run = load(path, device)
            results.append(evaluate(run, options.split, options.query, options.root, device,
                                    options.allow_missing, options.parser))
            title = {name: run.config[name] for name in ("dataset", "method", "seed")}
            methods.add(run.config["method"])
            if len(methods) > 1:
                raise ValueError("the mean is over runs of one method, not of "
                                 + " and ".join(sorted(methods)))
            title |= {"query": options.query, "epoch": run.checkpoint["epoch"],
                      "parser": options.parser or run.checkpoint["parser"]}
            if options.json:
                print(json.dumps(title | {"splits": results[-1]}))
            elif len(options.checkpoint) == 1:
                print(", ".join(f"{name} {value}" for name, value in title.items()))
                print(table(results[-1]))
        if len(results) > 1 and not options.json:
            print(f"{len(results)} runs of {run.config['method']}, query {options.query}: mean and "
                  f"standard deviation\n{over_runs(results)}")
    except (OSError, ValueError, RuntimeError, FloatingPointError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
