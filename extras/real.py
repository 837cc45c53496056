"""Real videos with real CLIP text: dataset folders and a text tower for train.py and evaluate.py.

    python -m extras.real build --features DIR --annotations DIR --text DIR
    python train.py --dataset real-0 --method mmn               # a fold; real-novel: Charades-CG
    python -m extras.reproduce real real-novel

The features are those of CLIP ViT-L/14 for the 1,334 videos of Charades-STA's test split, 32 frames
each. CLIP's text tower cannot be had, but 11,594 of its vectors with their sentences can. A linear
map from stemmed words to these vectors covers other sentences, and a small text tower learns both.
It takes the place of CLIP's: data/real-0/clip.pt.

The videos are divided into five folds; each is tested once, by a model trained on the videos of the
others, a seventh of which is for validation. real-novel is Charades-CG restricted to these videos.

Shapes: V videos, S sentences, T frames, W words, D width of CLIP's joint space.
"""
import collections
import pathlib
import random
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

import clip
import data
from support import files, options
from support.errors import Mistake, reported

FOLDS = 5
PENALTY = 1.0                       # of the ridge, chosen on the validation videos of fold 0
STEPS = 1200                        # of distillation
WIDTH = 256                         # of the small tower


def read_vectors(folder: pathlib.Path, name: str) -> Tensor:
    """<name>.int8.npy * scale.npy + offset.npy, float32 [..., D], unit vectors."""
    try:
        quantised, scale, offset = (np.load(folder / f"{part}.npy", allow_pickle=False)
                                    for part in (f"{name}.int8", "scale", "offset"))
    except (OSError, ValueError) as error:
        raise Mistake(f"{folder} does not hold {name}.int8.npy, scale.npy and offset.npy: "
                      f"{error}") from error
    return F.normalize(torch.from_numpy(quantised.astype(np.float32) * scale + offset), dim=-1)


def stems(sentence: str) -> set[str]:
    """Its words without their endings: "opening", "opens" and "opened" are one."""
    found = set()
    for word in re.findall("[a-z]+", sentence.lower()):
        word = re.sub("(?<=...)(ing|ed|es|s)$", "", word)       # at least three letters remain
        word = re.sub(r"(?<=..)([^ls])\1$", r"\1", word)        # "putt" of "putting"
        found.add(re.sub("(?<=...)e$", "", word))               # "clos" of "closing", "close"
    return found


def predicted(sentences: list[str], vectors: Tensor, others: list[str]) -> Tensor:
    """Vectors [S', D] of other sentences: a linear map from the stems of a sentence to its vector,
    fitted to `sentences` and `vectors` [S, D] in closed form, as a ridge regression."""
    counts = collections.Counter(word for s in sentences for word in stems(s))
    words = sorted(word for word, count in counts.items() if count >= 2)
    number = {word: i for i, word in enumerate(words)}

    def bags(sentences: list[str]) -> Tensor:
        """[S, W]: which words a sentence has, divided by the root of their number."""
        x = torch.zeros(len(sentences), len(words))
        for s, sentence in enumerate(sentences):
            x[s, [number[word] for word in stems(sentence) if word in number]] = 1
        return x / x.sum(1, keepdim=True).clamp(min=1).sqrt()

    x = bags(sentences)
    x_mean, y_mean = x.mean(0), vectors.mean(0)
    square = (x - x_mean).T @ (x - x_mean) + PENALTY * torch.eye(len(words))
    weights = torch.linalg.solve(square, (x - x_mean).T @ (vectors - y_mean))   # [W, D]
    return bags(others) @ weights + (y_mean - x_mean @ weights)


def distil(sentences: list[str], targets: Tensor) -> clip.TextTower:
    """A text tower of two layers whose vectors point where the targets [S, D] do. Words that are in
    none of the sentences keep their random embeddings."""
    torch.manual_seed(0)
    tokens = clip.tokenize(sentences, truncate=True)                    # [S, 77]
    targets = F.normalize(targets, dim=1)
    text = clip.TextTower(len(clip.vocabulary()[0]), 77, WIDTH, 2, WIDTH // 64, targets.shape[1],
                          clip.QuickGELU)
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            std = 0.1 if "embedding" in name else len(parameter) ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    # the sentences of a batch are about equally long, which saves time
    batches = tokens.argmax(1).argsort().split(128)
    optimiser = torch.optim.AdamW(text.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    # a warm-up and a cosine; it also cycles the first beta of AdamW
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 1e-3, STEPS, pct_start=0.04)
    for _ in trange(STEPS, desc="text tower", disable=None):
        chosen = batches[torch.randint(len(batches), ())]
        x = F.normalize(text.encode_text(tokens[chosen]), dim=1)        # [128, D]
        loss = 1 - (x * targets[chosen]).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    print(f"text tower: 1 - cosine to its targets {loss.item():.3f}")
    return text


def with_validation(rows: list[data.Sample]) -> dict[str, list[data.Sample]]:
    """Sentences for training; a seventh of their videos is for validation."""
    videos = sorted({row.video for row in rows})
    held_out = set(random.Random(1).sample(videos, len(videos) // 7))
    return {"train": [row for row in rows if row.video not in held_out],
            "val": [row for row in rows if row.video in held_out]}


def datasets(annotations: pathlib.Path, names: list[str]) -> dict[str, dict[str, list]]:
    """Dataset -> split -> sentences: real-0 to real-4 are the folds, real-novel Charades-CG."""
    order = sorted(names)
    random.Random(0).shuffle(order)
    fold_of = {name: i % FOLDS for i, name in enumerate(order)}

    def read(dataset: str, split: str) -> list[data.Sample]:
        rows = data.read_annotations(dataset, split, annotations)
        return [row for row in rows if row.video in fold_of]

    rows = read("charades", "test")
    result = {}
    for fold in range(FOLDS):
        splits = with_validation([row for row in rows if fold_of[row.video] != fold])
        splits["test"] = [row for row in rows if fold_of[row.video] == fold]
        result[f"real-{fold}"] = splits
    splits = with_validation(read("charades-cg", "train"))
    splits["test"] = read("charades-cg", "trivial")
    for split in ("novel-word", "novel-composition"):
        splits[split] = read("charades-cg", split)
    result["real-novel"] = splits
    return result


def build(features: pathlib.Path, annotations: pathlib.Path, text: pathlib.Path,
          root: pathlib.Path) -> None:
    """Writes <root>/real-0 to real-4 and real-novel: one store of features, one text tower."""
    path = root / "real-0" / "clip.pt"
    if path.exists():                           # features and checkpoints belong to this file
        raise Mistake(f"{path} exists already; remove the folders real-* to build them again")
    names = files.read_text(features / "videos.txt").split()
    frames = read_vectors(features, "frames")                           # [V, T, D]
    lines = files.read_text(text / "sentences.tsv").splitlines()
    sentences = [line.split("\t")[3] for line in lines]
    vectors = read_vectors(text, "text")                                # [S, D]
    # Charades-STA's own training sentences, of other videos and without their moments
    rows = data.read_annotations("charades", "train", annotations)
    charades = sorted({row.sentence for row in rows})
    mapped = predicted(sentences, vectors, charades)
    # what all sentences of the dataset share ("a person is") says nothing about one of them
    targets = torch.cat([vectors, mapped]) - mapped.mean(0)
    files.save_tensors(path, distil(sentences + charades, targets).state_dict())
    made = {"clip": "real-0", "sha256": clip.sha256(path), "resolution": 224,
            "frames": frames.shape[1], "patch_frames": 0, "width": frames.shape[2],
            "patch_width": 0, "grid": 0, "precision": "int8, made elsewhere"}
    rows = data.read_annotations("charades", "test", annotations)
    durations_sec = {row.video: row.duration_sec for row in rows}
    store = data.FeatureStore(root / "real-0" / "features" / "real-0", made)
    for name, x in zip(names, frames):
        store.write(name, x.half(), None, durations_sec[name])
    store.save_manifest()
    for dataset, splits in datasets(annotations, names).items():
        for split, rows in splits.items():
            data.write_jsonl(root / dataset / f"{split}.jsonl", rows)
        link = root / dataset / "features"
        if not link.exists():                           # one store for all
            link.symlink_to(pathlib.Path("..", "real-0", "features"), target_is_directory=True)


def main() -> None:
    arguments = options.parser("dataset folders of real videos with real CLIP text",
                               prog="python -m extras.real")
    add = arguments.add_argument
    add("what", choices=("build",), help="write the datasets real-0 to real-4 and real-novel")
    folder = dict(type=pathlib.Path, metavar="DIR")
    add("--features", required=True, **folder, help="frames.int8.npy and videos.txt")
    add("--annotations", required=True, **folder, help="with charades/ and charades-cg/")
    add("--text", required=True, **folder, help="text.int8.npy and sentences.tsv")
    add("--root", default=pathlib.Path("data"), **folder, help="folder of datasets")
    given = arguments.parse_args()
    with reported():
        build(given.features, given.annotations, given.text, given.root)


if __name__ == "__main__":
    main()
