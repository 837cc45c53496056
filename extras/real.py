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
import evaluate
import mmn
from extras import zero_shot
from support import files, options, progress
from support.errors import Mistake, reported
from support.text import markdown

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


# ------------------------------------------------------------------------------- sentence -> vector

def stem(word: str) -> str:
    """A crude stem: "opening", "opens" and "opened" are one word."""
    for ending in ("ing", "ed", "es", "s"):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            word = word.removesuffix(ending)
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "sl":
        word = word[:-1]                                # "putt" of "putting"
    if len(word) > 3:
        word = word.removesuffix("e")                   # "clos" of "closing", "close"
    return word


def stems(sentence: str) -> set[str]:
    return {stem(word) for word in re.findall("[a-z]+", sentence.lower())}


class Ridge:
    """The linear map from the stems of a sentence to its CLIP vector, fitted in closed form.

    centre    sentences whose mean is taken off: what all sentences of a dataset share ("a person
              is") says nothing about one of them"""

    def __init__(self, sentences: list[str], vectors: Tensor, centre: list[str]):
        counts = collections.Counter(word for s in sentences for word in stems(s))
        words = sorted(word for word, count in counts.items() if count >= 2)
        self.number = {word: i for i, word in enumerate(words)}
        x = self.bags(sentences)                                        # [S, W]
        x_mean, y_mean = x.mean(0), vectors.mean(0)
        square = (x - x_mean).T @ (x - x_mean) + PENALTY * torch.eye(len(words))
        self.weights = torch.linalg.solve(square, (x - x_mean).T @ (vectors - y_mean))  # [W, D]
        self.mean_bag = self.bags(centre).mean(0)                       # [W]
        self.mean_vector = y_mean + (self.mean_bag - x_mean) @ self.weights     # [D]

    def bags(self, sentences: list[str]) -> Tensor:
        """[S, W]: which words a sentence has, divided by the root of their number."""
        x = torch.zeros(len(sentences), len(self.number))
        for s, sentence in enumerate(sentences):
            known = [self.number[word] for word in stems(sentence) if word in self.number]
            x[s, known] = 1
        return x / x.sum(1, keepdim=True).clamp(min=1).sqrt()

    def predict(self, sentences: list[str]) -> Tensor:
        """[S, D], minus the mean of the centre."""
        return (self.bags(sentences) - self.mean_bag) @ self.weights


def distil(sentences: list[str], targets: Tensor) -> clip.TextTower:
    """A text tower of two layers whose vectors point where the targets [S, D] do."""
    torch.manual_seed(0)
    tokens = clip.tokenize(sentences, truncate=True)                    # [S, 77]
    text = clip.TextTower(len(clip.vocabulary()[0]), 77, WIDTH, 2, WIDTH // 64, targets.shape[1],
                          clip.QuickGELU)
    for name, parameter in text.named_parameters():
        if parameter.ndim > 1:
            std = 0.1 if "embedding" in name else len(parameter) ** -0.5
            torch.nn.init.normal_(parameter, std=std)
    # only the tokens that occur are trained, as in shapes.pretrain
    used, tokens = tokens.unique(return_inverse=True)
    whole = text.token_embedding.weight.data                            # [49408, WIDTH]
    text.token_embedding = torch.nn.Embedding.from_pretrained(whole[used], freeze=False)
    targets = F.normalize(targets, dim=1)
    # the sentences of a batch are about equally long, which saves time
    batches = tokens.argmax(1).argsort().split(128)
    optimiser = torch.optim.AdamW(text.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    bar = trange(STEPS, desc="text tower", disable=None)
    for step in bar:
        rate = min((step + 1) / 50, progress.cosine(step / STEPS))
        optimiser.param_groups[0]["lr"] = 1e-3 * rate
        chosen = batches[torch.randint(len(batches), ())]
        x = F.normalize(text.encode_text(tokens[chosen]), dim=1)        # [128, D]
        loss = 1 - (x * targets[chosen]).sum(1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    print(f"text tower: 1 - cosine to its targets {loss.item():.3f}")
    whole.zero_()                               # a word that was never seen says nothing
    whole[used] = text.token_embedding.weight.data
    text.token_embedding = torch.nn.Embedding.from_pretrained(whole, freeze=False)
    return text


# ------------------------------------------------------------------------------------ the datasets

def divided(rows: list[data.Sample]) -> tuple[list[data.Sample], list[data.Sample]]:
    """Training and validation sentences: a seventh of the videos is for validation."""
    videos = sorted({row.video for row in rows})
    held_out = set(random.Random(1).sample(videos, len(videos) // 7))
    train = [row for row in rows if row.video not in held_out]
    return train, [row for row in rows if row.video in held_out]


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
        train, val = divided([row for row in rows if fold_of[row.video] != fold])
        test = [row for row in rows if fold_of[row.video] == fold]
        result[f"real-{fold}"] = {"train": train, "val": val, "test": test}
    train, val = divided(read("charades-cg", "train"))
    result["real-novel"] = {"train": train, "val": val, "test": read("charades-cg", "trivial")}
    for split in ("novel-word", "novel-composition"):
        result["real-novel"][split] = read("charades-cg", split)
    return result


def build(features: pathlib.Path, annotations: pathlib.Path, text: pathlib.Path,
          root: pathlib.Path) -> None:
    """Writes <root>/real-0 to real-4 and real-novel, with one store of features and one text tower."""
    path = root / "real-0" / "clip.pt"
    if path.exists():                           # features and checkpoints belong to this file
        raise Mistake(f"{path} exists already; remove the folders real-* to build them again")
    names = files.read_text(features / "videos.txt").split()
    frames = read_vectors(features, "frames")                           # [V, T, D]
    lines = files.read_text(text / "sentences.tsv").splitlines()
    sentences = [line.split("\t")[3] for line in lines]
    vectors = read_vectors(text, "text")                                # [S, D]
    # Charades-STA's own training sentences, of other videos and without their moments
    charades = sorted({row.sentence for row in data.read_annotations("charades", "train",
                                                                     annotations)})
    ridge = Ridge(sentences, vectors, charades)
    targets = torch.cat([vectors - ridge.mean_vector, ridge.predict(charades)])
    tower = distil(sentences + charades, targets)
    files.save_tensors(path, tower.state_dict())
    made = {"clip": "real-0", "sha256": clip.sha256(path), "resolution": 224,
            "frames": frames.shape[1], "patch_frames": 0, "width": frames.shape[2],
            "patch_width": 0, "grid": 0, "precision": "int8, made elsewhere"}
    durations_sec = {row.video: row.duration_sec
                     for row in data.read_annotations("charades", "test", annotations)}
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


# ------------------------------------------------------------------------------- the premise

# two classes of actions, and what the sentences of Charades-STA say that show them
PAIRS = (("put on a shoe", "take off a shoe", r"\bput\w* on .*shoe", r"\btak\w* off .*shoe"),
         ("put object into bag", "take object out of bag", r"\bput\w* .*\b(in|into) .*bag",
          r"\btak\w* .*\b(out of|from) .*bag"),
         ("sit down", "stand up", r"\bs(it|at)\w* down", r"\b(stand|stood|gets?|got)\w* up"),
         ("drink water", "eat meal", r"\bdrink", r"\beat"),
         ("reading", "phone call", r"\bread|\bbook", r"\bphone"))


def premise(features: pathlib.Path, annotations: pathlib.Path, text: pathlib.Path) -> str:
    """Does CLIP tell two actions apart? A line for each of PAIRS: the cosine of their mean vectors,
    and with which probability a moment of the first is nearer to the first than a moment of the
    second is (0.5 is chance), with the 95% interval of a bootstrap over moments."""
    lines = [line.split("\t") for line in
             files.read_text(text / "sentences.tsv").splitlines()]      # set, kind, class, sentence
    vectors = read_vectors(text, "text")

    def mean_of(action: str) -> Tensor:
        own = [i for i, line in enumerate(lines) if line[0] == "ntu120" and line[2] == action]
        return F.normalize(vectors[own].mean(0), dim=0)                 # [D]

    names = files.read_text(features / "videos.txt").split()
    frames_of = dict(zip(names, read_vectors(features, "frames")))      # video -> [T, D]
    rows = [row for row in data.read_annotations("charades", "test", annotations)
            if row.video in frames_of]
    moments = []
    for row in rows:
        frames = frames_of[row.video]
        first, last = (int(len(frames) * sec / row.duration_sec)
                       for sec in (row.start_sec, row.end_sec))
        moments.append(F.normalize(frames[first:max(last, first + 1)].mean(0), dim=0))
    moments = torch.stack(moments)                                      # [S, D]
    actions = sorted({line[2] for line in lines if line[0] == "ntu120"})
    means = torch.stack([mean_of(action) for action in actions])
    apart = ~torch.eye(len(actions), dtype=torch.bool)
    table = [["all pairs of actions", f"{(means @ means.T)[apart].mean():.3f}", "", ""]]
    for one, other, shows_one, shows_other in PAIRS:
        is_one = np.array([bool(re.search(shows_one, row.sentence.lower())) for row in rows])
        is_other = np.array([bool(re.search(shows_other, row.sentence.lower())) for row in rows])
        nearer = moments @ (mean_of(one) - mean_of(other))              # [S]
        a = nearer[is_one & ~is_other].numpy()
        b = nearer[is_other & ~is_one].numpy()
        rng = np.random.default_rng(0)
        drawn = [(rng.choice(a, len(a))[:, None] > rng.choice(b, len(b))).mean()
                 for _ in range(1000)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        table.append([f"{one} / {other}", f"{float(mean_of(one) @ mean_of(other)):.3f}",
                      f"{(a[:, None] > b).mean():.2f} [{low:.2f}, {high:.2f}]",
                      f"{len(a)} / {len(b)}"])
    return markdown(["", "cosine", "area under the curve", "moments"], table)


# ----------------------------------------------------------------------------------- CLIP alone

def smooth(root: pathlib.Path) -> str:
    """R@1, IoU=0.5 / 0.7 of CLIP alone on the validation videos of fold 0, by the seconds over which
    the cosines are averaged, the power of `mmn.contrast`, and the longest moment; and with and
    without the seconds chosen from it, on the test videos of the other folds."""
    run = zero_shot.run_of("real-0", "real-0", str(root), torch.device("cpu"))

    def cell(splits: list[str], smooth_sec: float, power: float, longest: float,
             without=frozenset()) -> str:
        metrics = alone(run, root, splits, smooth_sec, power, longest, without)
        return f"{metrics['R@1,IoU=0.5']:.1f} / {metrics['R@1,IoU=0.7']:.1f}"

    seconds = (0.0, 3.0, 5.0, 7.0, 9.0)
    lines = []
    for power, longest in ((0.0, 0.5), (0.25, 0.5), (0.5, 0.5), (0.75, 0.5), (0.5, 0.75),
                           (0.5, 1.0)):
        cells = [cell(["real-0 val"], smooth_sec, power, longest) for smooth_sec in seconds]
        lines.append([f"power {power}, up to {longest:.0%} of the video"] + cells)
    # the validation videos of fold 0 are test videos of other folds: they are left out
    chosen_on = {row.video for row in data.read_annotations("real-0", "val", root)}
    tests = [f"real-{fold} test" for fold in range(FOLDS)]
    before = cell(tests, 0.0, mmn.POWER, 0.5, chosen_on)
    after = cell(tests, mmn.SMOOTH_SEC, mmn.POWER, 0.5, chosen_on)
    return (markdown(["R@1 0.5 / 0.7"] + [f"{smooth_sec:.0f} s" for smooth_sec in seconds], lines)
            + f"\n\nall other videos: {before} without, {after} with "
              f"{mmn.SMOOTH_SEC:.0f} s")


@torch.no_grad()
def alone(run: evaluate.Run, root: pathlib.Path, splits: list[str], smooth_sec: float,
          power: float, longest: float, without=frozenset()) -> dict[str, float]:
    """Metrics of CLIP alone on splits ("real-0 val") taken together, `without` some videos."""
    predicted, truth = [], []
    retriever = mmn.MomentMap(16, 1, 1, (int(16 * longest) - 1,))
    for split in splits:
        dataset, split = split.split(" ")
        store = data.open_store(dataset, "real-0", root)
        rows = [row for row in data.read_annotations(dataset, split, root)
                if row.video not in without]
        videos = data.Videos(rows, store, 16, data.parser_of(dataset, root))
        for batch in videos.batches(256):
            x = F.normalize(run.text.encode_text(batch.tokens[0]), dim=1)
            similarity = torch.einsum("sd,std->st", x, batch.frames[batch.video_of])
            each_sec = batch.durations_sec / similarity.shape[1]        # [S]
            similarity = mmn.smoothed(similarity, each_sec, smooth_sec)
            scores = mmn.contrast_map(similarity, 16, power)
            predicted.append(mmn.decode(scores, batch.durations_sec,
                                        candidates=retriever.candidates))
        truth.append(videos.windows_sec)
    return evaluate.recall(torch.cat(predicted)[..., :2], torch.cat(truth), ks=(1,))


def main() -> None:
    arguments = options.parser("real videos with real CLIP text", prog="python -m extras.real")
    add = arguments.add_argument
    add("what", choices=("build", "premise", "smooth"), help="see the top of the file")
    add("--features", metavar="DIR", help="frames.int8.npy and videos.txt")
    add("--annotations", metavar="DIR", help="with charades/ and charades-cg/")
    add("--text", metavar="DIR", help="text.int8.npy and sentences.tsv")
    add("--root", default="data", help="folder of datasets")
    given = arguments.parse_args()
    with reported():
        root = pathlib.Path(given.root)
        if given.what == "smooth":
            print(smooth(root))
            return
        if not (given.features and given.annotations and given.text):
            raise Mistake(f"{given.what} needs --features, --annotations and --text")
        folders = [pathlib.Path(name) for name in (given.features, given.annotations, given.text)]
        if given.what == "build":
            build(*folders, root)
        else:
            print(premise(*folders))


if __name__ == "__main__":
    main()
