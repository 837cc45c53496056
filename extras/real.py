"""Real videos: CLIP ViT-L/14 features of the 1,334 videos of Charades-STA's test split.

    python -m extras.real --features DIR --annotations DIR          # every row; hours on two cores
    python -m extras.real --features DIR --annotations DIR yardsticks       # those without training
    python -m extras.real --annotations DIR priors      # random and fixed moments, all splits

DIR holds frames.int8.npy [V, T, D], scale.npy [D], offset.npy [D] and videos.txt. CLIP's text tower
is not among them, so every text tower here starts from scratch: this measures retrieval and
injection, not what joint pre-training brings. The videos are divided into five folds; each is
tested once by a model trained on the others, of whose videos a seventh is for validation. Charades-
CG is the part of it that lies within these videos. Nothing is chosen on a test fold.

Shapes: V videos, S sentences, T frames, D width of the features, W words of the vocabulary.
"""
import support  # first, for a Ctrl-C while torch is imported
import collections
import dataclasses
import json
import pathlib
import random
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import evaluate
import mmn
import retrieve
import train
from support import files, options, results
from support.errors import Mistake, reported
from support.text import markdown

FOLDS = 5
RESULTS = pathlib.Path(__file__).parent.parent / "results" / "charades-l14"
METRICS = ("R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")
CG = ("novel-word", "novel-composition", "trivial")


# ---------------------------------------------------------------------------------------- the folds

def read_frames(folder: str | pathlib.Path) -> tuple[list[str], np.ndarray]:
    """The names of the videos, and their features [V, T, D], float32."""
    folder = pathlib.Path(folder)
    try:
        parts = [np.load(folder / f"{name}.npy", allow_pickle=False)
                 for name in ("frames.int8", "scale", "offset")]
        names = (folder / "videos.txt").read_text().split()
    except (OSError, ValueError) as error:
        raise Mistake(f"{folder} does not hold the ViT-L/14 features: {error}") from error
    return names, parts[0].astype(np.float32) * parts[1] + parts[2]


def fold_of(names: list[str]) -> dict[str, int]:
    """Video -> the fold that tests it."""
    order = sorted(names)
    random.Random(0).shuffle(order)
    return {name: i % FOLDS for i, name in enumerate(order)}


def divided(rows: list[data.Sample], names: list[str]) -> tuple[list, list]:
    """Training and validation sentences: a seventh of the videos is for validation."""
    videos = sorted({row.video for row in rows} & set(names))
    held_out = set(random.Random(1).sample(videos, len(videos) // 7))
    return ([row for row in rows if row.video in videos and row.video not in held_out],
            [row for row in rows if row.video in held_out])


def samples(annotations: str, names: list[str]) -> dict[str, dict[str, list[data.Sample]]]:
    """Dataset -> split -> sentences: real-0 to real-4 are the folds, real-cg Charades-CG."""
    folds, known = fold_of(names), set(names)
    rows = [row for row in data.read_annotations("charades", "test", annotations)
            if row.video in known]
    datasets = {}
    for fold in range(FOLDS):
        train, val = divided([row for row in rows if folds[row.video] != fold], names)
        datasets[f"real-{fold}"] = {"train": train, "val": val, "test": [
            row for row in rows if folds[row.video] == fold]}
    train, val = divided(data.read_annotations("charades-cg", "train", annotations), names)
    datasets["real-cg"] = {"train": train, "val": val}
    for split in CG:
        name = {"trivial": "test"}.get(split, split)            # names that your own data may have
        datasets["real-cg"][name] = [row for row in data.read_annotations(
            "charades-cg", split, annotations) if row.video in known]
    return datasets


def build(folder: str, annotations: str, root: pathlib.Path) -> None:
    """Datasets of your own below the root, as data.py would make them, with one store for all, and
    a CLIP that consists of an untrained text tower."""
    names, frames = read_frames(folder)
    torch.manual_seed(0)
    text = clip.TextTower(49408, 77, 128, 2, 4, frames.shape[2], clip.QuickGELU)
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1 if "embedding" in name else len(parameter) ** -0.5)
    path = root / "real-0" / "clip.pt"
    files.save_tensors(path, text.state_dict())
    made = {"clip": "real-0", "sha256": files.sha256(path), "resolution": 224,
            "frames": frames.shape[1], "patch_frames": 0, "width": frames.shape[2],
            "patch_width": 0, "grid": 0, "precision": "int8, made elsewhere"}
    durations_sec = {row.video: row.duration_sec
                     for row in data.read_annotations("charades", "test", annotations)}
    store = data.FeatureStore(data.store_folder("real-0", "real-0", root), made)
    for name, x in zip(names, frames):
        store.write(name, torch.from_numpy(x).half(), None, durations_sec[name])
    store.save_manifest()
    for dataset, splits in samples(annotations, names).items():
        for split, rows in splits.items():
            data.write_jsonl(data.annotation_file(dataset, split, root), rows)
        features = data.store_folder(dataset, "real-0", root)
        features.parent.mkdir(parents=True, exist_ok=True)
        if not features.exists():
            features.symlink_to(store.folder.resolve())


# --------------------------------------------------------------------------- a linear yardstick

def bags(rows: list[data.Sample], vocabulary: dict[str, int]) -> Tensor:
    """[S, W + 1]: which words a sentence has, divided by the root of their number; and a 1."""
    x = torch.zeros(len(rows), len(vocabulary) + 1)
    for s, row in enumerate(rows):
        for word in re.findall("[a-z]+", row.sentence.lower()):
            if word in vocabulary:
                x[s, vocabulary[word]] = 1
    x = x / x.sum(1, keepdim=True).clamp(min=1).sqrt()
    x[:, -1] = 1
    return x


def frames_of(rows: list[data.Sample], store: data.FeatureStore) -> Tensor:
    """Unit frame features of each sentence's video, [S, T, D]."""
    known = {name: F.normalize(torch.from_numpy(store.read(name, "frames")).float(), dim=1)
             for name in {row.video for row in rows}}
    return torch.stack([known[row.video] for row in rows])


def moment_contrast(rows: list[data.Sample], frames: Tensor) -> Tensor:
    """Mean of the frames inside the labelled moment minus mean of those outside, [S, D]."""
    T = frames.shape[1]
    centre = (torch.arange(T) + 0.5) / T * torch.tensor([[row.duration_sec] for row in rows])
    start, end = (torch.tensor([[value] for value in values]) for values in zip(
        *((row.start_sec, row.end_sec) for row in rows)))
    inside = (centre >= start) & (centre < end)
    nearest = (centre - (start + end) / 2).abs().argmin(1, keepdim=True)
    inside = inside.scatter(1, nearest, True).float()                   # [S, T]
    weights = (inside / inside.sum(1, keepdim=True)
               - (1 - inside) / (1 - inside).sum(1, keepdim=True).clamp(min=1))
    return torch.einsum("st,std->sd", weights, frames)


def ridge(train: list[data.Sample], test: list[data.Sample], store: data.FeatureStore,
          penalty: float, shuffled: bool = False) -> Tensor:
    """Cosine of each frame with what a linear map from a bag of words to the contrast of the moment
    predicts, [S, T]; fitted in closed form on `train`. shuffled: to the sentences of others."""
    counts = collections.Counter(word for row in train
                                 for word in set(re.findall("[a-z]+", row.sentence.lower())))
    vocabulary = {word: i for i, word in enumerate(w for w, n in counts.items() if n >= 3)}
    x, y = bags(train, vocabulary), moment_contrast(train, frames_of(train, store))
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    weights = torch.linalg.solve(x.T @ x + penalty * torch.eye(x.shape[1]), x.T @ y)
    predicted = F.normalize(bags(test, vocabulary) @ weights, dim=1)    # [S, D]
    return torch.einsum("sd,std->st", predicted, frames_of(test, store))


def decoded(similarity: Tensor, rows: list[data.Sample], power: float = 0.5, smooth: int = 5,
            num_clips: int = 16, longest: float = 0.5) -> Tensor:
    """The five best moments by retrieve.contrast, [S, 5, 3]."""
    frames = F.avg_pool1d(similarity[:, None], smooth, 1, smooth // 2,
                          count_include_pad=False)[:, 0]                # [S, T]
    one = torch.ones(1, 1)
    scores = torch.cat([retrieve.zero_shot_scores(s[:, None], one, num_clips, power)
                        for s in frames])                               # [S, N, N]
    clips = torch.arange(num_clips)
    length = (clips[None] - clips[:, None] + 1) / num_clips
    scores = scores.masked_fill(length > longest, float("-inf"))
    return mmn.decode(scores, torch.tensor([row.duration_sec for row in rows]), 5)


# ------------------------------------------------------------------------------------------ the rows

TRAINED = {                                     # fields of train.Config
    "MMN": dict(method="mmn"),
    "2D-TAN": dict(method="mmn", retriever="2d-tan"),
    "`vdi`, L^vc only": dict(method="vdi", lambda_sd=0.0),
    "control: random codes, no video": dict(method="vdi-staged", stage_target="random"),
    "**`vdi-staged`**": dict(method="vdi-staged"),
}
# learning rate, text rate and epochs: chosen for MMN on the validation videos of the first fold
COMMON: dict = dict(clip="real-0", lr=3e-4, text_lr=1.0, epochs=10)


def truth_of(rows: list[data.Sample]) -> Tensor:
    return torch.tensor([[row.start_sec, row.end_sec] for row in rows])


def hits(predicted: Tensor, rows: list[data.Sample]) -> dict:
    """Metrics, and the IoU of each sentence's first moment in thousandths."""
    metrics = evaluate.recall(predicted[..., :2], truth_of(rows))
    iou = mmn.interval_iou(predicted[:, 0, :2], truth_of(rows))
    return metrics | {"iou": [round(1000 * v) for v in iou.tolist()]}


def splits_of(dataset: str) -> list[str]:
    return ["val", "test", *(CG[:2] if dataset == "real-cg" else ())]


def trained(name: str, dataset: str, root: pathlib.Path, device: str, changes: dict) -> dict:
    """One training run: split -> metrics."""
    fields = COMMON | TRAINED[name] | changes
    config = train.configure(dataset=dataset, root=str(root), device=device, **fields)
    slug = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    config = dataclasses.replace(config, out=f"runs/real/{dataset}-{slug}")

    def make() -> dict:
        train.train(config, resume=config.folder.exists())
        run, content = evaluate.load(config.folder / "ckpt.pt"), {}
        for split, videos, predicted in evaluate.answers(run, splits_of(dataset), root=str(root)):
            content[split] = hits(predicted, videos.samples)
        return {"results": content}

    about = {key: value for key, value in dataclasses.asdict(config).items()
             if key not in ("root", "device", "out", "workers")}
    return results.cached(RESULTS / f"{slug}-{dataset}.json", json.loads(json.dumps(about)),
                          make)["results"]


def yardstick(name: str, dataset: str, splits: dict, store: data.FeatureStore) -> dict:
    """A row that needs no training loop: split -> metrics."""
    train_rows, content = splits["train"], {}
    durations_sec = torch.tensor([row.duration_sec for row in train_rows])
    iou = mmn.iou_map(truth_of(train_rows), durations_sec, 16).flatten(1)
    start, end = divmod(evaluate.best_prior(iou), 16)
    for split in splits_of(dataset):
        rows = splits[split]
        durations = torch.tensor([row.duration_sec for row in rows])
        if name == "best fixed moment":
            moment = torch.stack([start * durations / 16, (end + 1) * durations / 16], 1)
            content[split] = hits(moment[:, None], rows)
        elif name == "random moment":
            drawn = np.random.default_rng(0).integers(0, 136, len(rows))
            cells = torch.ones(16, 16).triu().nonzero()[drawn]
            moment = torch.stack([cells[:, 0], cells[:, 1] + 1], 1) * durations[:, None] / 16
            content[split] = hits(moment[:, None], rows)
        else:
            similarity = ridge(train_rows, rows, store, PENALTY, name != "linear")
            content[split] = hits(decoded(similarity, rows), rows)
    return content


PENALTY = 10.0                                  # of 1, 3, 10: chosen on the validation videos
YARDSTICKS = ("random moment", "best fixed moment", "linear, other sentences' moments", "linear")


def choose(splits: dict, store: data.FeatureStore) -> str:
    """Variants of retrieve.contrast on the validation videos of the first fold, by a linear map."""
    rows, lines = splits["val"], []
    similarity = ridge(splits["train"], rows, store, PENALTY)
    for power in (0.0, 0.25, 0.5, 0.75):
        for smooth in (1, 3, 5):
            for longest in (1.0, 0.5):
                metrics = hits(decoded(similarity, rows, power, smooth, longest=longest), rows)
                lines.append([str(power), str(smooth), str(longest),
                              *(f"{metrics[name]:.1f}" for name in METRICS)])
    return markdown(["power", "frames averaged", "longest", "R@1 0.5", "R@1 0.7", "mIoU"], lines)


def priors(annotations: str) -> str:
    """A random and the best fixed moment on every published split, among MMN's candidate moments:
    no video is needed. The best is fitted on the training split."""
    lines = []
    for dataset in data.FILES:
        config = train.configure(dataset=dataset)
        cells = mmn.MomentMap(config.num_clips, 1, 1, config.pool_counts).cells

        def overlaps(split: str) -> Tensor:
            rows = data.read_annotations(dataset, split, annotations)
            durations_sec = torch.tensor([row.duration_sec for row in rows])
            return torch.cat([mmn.iou_map(moments, durations, config.num_clips).flatten(1)[:, cells]
                              for moments, durations in zip(truth_of(rows).split(1024),
                                                            durations_sec.split(1024))])

        best = evaluate.best_prior(overlaps("train"))
        for split in data.FILES[dataset]:
            iou = overlaps(split)                                       # [S, P]
            for name, values in (("random", iou), ("best fixed", iou[:, best])):
                metrics = evaluate.cell_recall(values)
                lines.append([dataset, split, name, str(len(iou)),
                              *(f"{metrics[metric]:.2f}" for metric in METRICS)])
    return markdown(["dataset", "split", "moment", "sentences", "R@1 0.5", "R@1 0.7", "mIoU"], lines)


def interval(ours: list[dict], theirs: list[dict], mu: int) -> str:
    """Difference in R@1 with its 95% interval by a bootstrap over sentences, in points."""
    a, b = (np.concatenate([np.array(each["iou"]) >= mu for each in rows]) for rows in (ours, theirs))
    difference, rng = 100.0 * (a.astype(float) - b), np.random.default_rng(0)
    drawn = difference[rng.integers(len(a), size=(2000, len(a)))].mean(1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def table(rows: dict[str, dict[str, dict]]) -> str:
    """rows: name -> dataset -> split -> metrics. Folds together: each sentence is tested once."""
    folds = [f"real-{fold}" for fold in range(FOLDS)]
    lines = []
    for name, content in rows.items():
        parts = [content[fold]["test"] for fold in folds if fold in content]
        weights = [len(part["iou"]) for part in parts]
        line = [name, *(f"{np.average([part[metric] for part in parts], weights=weights):.1f}"
                        for metric in METRICS)] if len(parts) == FOLDS else [name, "", "", ""]
        for split in CG[:2]:
            own = content.get("real-cg", {}).get(split)
            line.append(f"{own['R@1,IoU=0.5']:.1f}" if own else "")
        lines.append(line)
    text = [markdown(["", *(name.replace(",IoU=", " ") for name in METRICS),
                      *(f"{split} R@1 0.5" for split in CG[:2])], lines), ""]
    pairs = [("MMN", "linear"), ("**`vdi-staged`**", "MMN"),
             ("**`vdi-staged`**", "control: random codes, no video"), ("`vdi`, L^vc only", "MMN")]
    for a, b in pairs:
        if all(fold in rows.get(name, {}) for name in (a, b) for fold in folds):
            ours, theirs = ([rows[name][fold]["test"] for fold in folds] for name in (a, b))
            text.append(f"- {a} minus {b}: R@1 0.5 {interval(ours, theirs, 500)}, R@1 0.7 "
                        f"{interval(ours, theirs, 700)}")
    return "\n".join(text)


def main() -> None:
    arguments = options.parser("real features of Charades videos", prog="python -m extras.real")
    add = arguments.add_argument
    add("what", nargs="*", metavar="what", help="choose; yardsticks; priors; or rows by number: "
        + "; ".join(f"{i} {name}" for i, name in enumerate(TRAINED)) + " (default: all rows)")
    add("--features", help="folder of the ViT-L/14 features (priors needs none)")
    add("--annotations", required=True, help="folder of the published annotations")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_args()
    with reported():
        if given.what == ["priors"]:
            print(priors(given.annotations))
            return
        if not given.features:
            raise Mistake("name the folder of the features with --features")
        root = pathlib.Path(given.root)
        if not (root / "real-cg" / "train.jsonl").exists():
            build(given.features, given.annotations, root)
        splits = {dataset: {split: data.read_annotations(dataset, split, root)
                            for split in data.splits(dataset, root)}
                  for dataset in [*(f"real-{fold}" for fold in range(FOLDS)), "real-cg"]}
        store = data.open_store("real-0", "real-0", root)
        if given.what == ["choose"]:
            print(choose(splits["real-0"], store))
            return
        run(given, root, splits, store)


def run(given, root: pathlib.Path, splits: dict, store: data.FeatureStore) -> None:
    chosen = [int(number) for number in given.what if number.isdigit()]
    if any(number >= len(TRAINED) for number in chosen):
        raise Mistake(f"rows are numbered from 0 to {len(TRAINED) - 1}")
    rows = {}
    for name in YARDSTICKS:
        path = RESULTS / f"{re.sub('[^a-z0-9]+', '-', name)}.json"
        rows[name] = results.cached(path, {"penalty": PENALTY, "row": name}, lambda: {"results": {
            dataset: yardstick(name, dataset, own, store) for dataset, own in splits.items()}}
            )["results"]
    for number, name in enumerate(TRAINED):
        if given.what == ["yardsticks"] or chosen and number not in chosen:
            continue
        rows[name] = {dataset: trained(name, dataset, root, given.device, {})
                      for dataset in splits}
    print(table(rows))


if __name__ == "__main__":
    main()
