"""Annotations, splits, one's own videos, batches (paper Sec. 4.1.1).

    python data.py charades                                     # annotations: fetched and counted
    python data.py charades --videos DIR                        # and features of the videos
    python data.py mine --annotations my.jsonl --videos DIR     # one's own videos and sentences
    python data.py check                                        # are the features in order?

A dataset is a folder below the root (`data/`): annotations in their published form, and features
made by video.py. Every annotation becomes a Sample. A moment is [start_sec, end_sec).

A batch is B videos with all their sentences, flattened: sentence s belongs to `video_of[s]`.

Shapes: B videos, S sentences in the batch, T frames, N clips, D width of CLIP's joint space.
"""
import argparse
import contextlib
import csv
import json
import math
import os
import pathlib
import random
import signal
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import command
import mmn
import parallel
import parse
import video


class Sample(NamedTuple):
    """One sentence and the moment [start_sec, end_sec) of the video that it describes."""
    video: str
    sentence: str
    start_sec: float
    end_sec: float
    duration_sec: float


class Cleaned(NamedTuple):
    """What `clean` did: moments cut to their video, and moments of which nothing was left."""
    clamped: int
    dropped: int


# -------------------------------------------------------------------------------------- annotations

# dataset -> split -> the names its file goes by; the first that exists is read
FILES = {
    "charades": {split: (f"charades_sta_{split}.txt", f"charades_{split}.json",
                         f"charades_sta_{split}_tvr_format.jsonl") for split in ("train", "test")},
    "activitynet": {"train": ("train.json",), "val": ("val_1.json", "val.json"),
                    "test": ("val_2.json", "test.json")},
    **dict.fromkeys(("charades-cg", "activitynet-cg"), {
        "train": ("train.json",), "novel-word": ("novel_word.json",),
        "novel-composition": ("novel_composition.json",), "trivial": ("test_trivial.json",)})}
FOLDERS = {"charades": ("Charades-STA", "Charades_STA"), "charades-cg": ("Charades-CG",),
           "activitynet": ("ActivityNet",), "activitynet-cg": ("ActivityNet_CG", "ActivityNet-CG")}
CSV = ("Charades_v1_train.csv", "Charades_v1_test.csv")                 # durations of Charades
COUNTS = {                          # videos and sentences of each split, after cleaning
    "charades": {"train": (5336, 12404), "test": (1334, 3720)},
    "charades-cg": {"train": (3555, 8281), "novel-word": (580, 695),
                    "novel-composition": (2480, 3442), "trivial": (1689, 3096)},
    "activitynet": {"train": (10009, 37417), "val": (4917, 17505), "test": (4885, 17031)},
    "activitynet-cg": {"train": (9659, 36720), "novel-word": (1991, 3920),
                       "novel-composition": (4202, 12028), "trivial": (4775, 15712)},
}
# lines "file below the root, address, SHA-256"
SOURCES = pathlib.Path(__file__).parent / "assets" / "annotations.txt"
OWN_SPLITS = ("train", "val", "val-novel-word", "test", "novel-word", "novel-composition")


def annotation_file(dataset: str, split: str, root: str | os.PathLike) -> pathlib.Path:
    """Where the annotations of a split are, or would be: <root>/<dataset>/<split>.jsonl for one's
    own. ValueError for a split that the dataset does not have."""
    folder = pathlib.Path(root) / dataset
    if dataset not in FILES:
        return folder / f"{split}.jsonl"
    if split not in FILES[dataset]:
        raise ValueError(f"{dataset} has no split {split!r}; it has "
                         f"{', '.join(splits(dataset, root))}")
    names = FILES[dataset][split]
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def splits(dataset: str, root: str | os.PathLike) -> list[str]:
    """The splits of a dataset: the published ones, or the files that one's own has."""
    if dataset in FILES:
        return list(FILES[dataset])
    return [split for split in OWN_SPLITS if annotation_file(dataset, split, root).exists()]


def read_annotations(dataset: str, split: str, root: str | os.PathLike) -> list[Sample]:
    """The cleaned samples of a split. Of Charades-STA, and of the two compositional datasets, which
    publish no validation split, `val` is a tenth of the training videos (`held_out`); `train` is
    everything published. Splits novel-word, novel-composition and trivial of charades and
    activitynet are those of charades-cg and activitynet-cg, whose training split is train-cg."""
    if dataset in ("charades", "activitynet") and split in ("novel-word", "novel-composition",
                                                            "trivial", "train-cg"):
        dataset, split = f"{dataset}-cg", "train" if split == "train-cg" else split
    if dataset in FILES and split == "val" and "val" not in FILES[dataset]:
        train = read_annotations(dataset, "train", root)
        chosen = held_out(sample.video for sample in train)
        return [sample for sample in train if sample.video in chosen]
    return clean(read_file(annotation_file(dataset, split, root)))[0]


def held_out(videos) -> set[str]:
    """A tenth of the training videos, the same tenth always."""
    # UNSPECIFIED: the paper stops early on a validation set that Charades-STA does not have
    names = sorted(set(videos))
    return set(random.Random(0).sample(names, max(1, len(names) // 10)))


def read_file(path: str | os.PathLike) -> list[Sample]:
    """An annotation file as it is published, by its form: Charades-STA text, the json of 2D-TAN,
    MMN and the compositional splits, or QVHighlights jsonl. A duration it does not tell is nan."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no annotation file {path}")
    return {".txt": read_charades, ".jsonl": read_jsonl}.get(path.suffix, read_json)(path)


def read_text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error


def numbered_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """(number from 1, line) of all lines that are not empty."""
    return [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()]


def read_charades(path: pathlib.Path) -> list[Sample]:
    """Lines "VIDEO START END##sentence."; durations: `length` in Charades_v1_*.csv beside it."""
    durations_sec = {}
    for table in (path.parent / name for name in CSV):
        if not table.exists():
            raise FileNotFoundError(f"{table} is missing: the durations of Charades-STA's videos "
                                    f"are in it (from the annotations of the Charades dataset)")
        with open(table, newline="", encoding="utf-8") as file:
            try:
                durations_sec |= {row["id"]: float(row["length"]) for row in csv.DictReader(file)}
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{table} has no columns id and length: {error}") from error

    def sample(line: str) -> list[Sample]:
        place, sentence = line.split("##", 1)
        name, start, end = place.split()
        return [to_sample(name, sentence, (start, end), durations_sec[name])]

    return read_lines(path, numbered_lines(path), sample)


def read_jsonl(path: pathlib.Path) -> list[Sample]:
    """QVHighlights lines; {"vid", "query", "relevant_windows"} is enough. One sample a window."""
    def samples(line: str) -> list[Sample]:
        row = json.loads(line)
        if not row["relevant_windows"]:
            raise ValueError("it has no moment (relevant_windows)")
        found = [to_sample(str(row["vid"]), row["query"], window, row.get("duration", math.nan))
                 for window in row["relevant_windows"]]
        for sample in found:
            if sample.end_sec <= sample.start_sec:
                raise ValueError(f"[{sample.start_sec}, {sample.end_sec}] ends before it begins")
        return found

    return read_lines(path, numbered_lines(path), samples)


def read_json(path: pathlib.Path) -> list[Sample]:
    """2D-TAN's, MMN's and ActivityNet's form, {video: {"duration", "timestamps", "sentences"}}."""
    text = read_text(path)
    try:
        videos = json.loads(text).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not in the form {{video: {{duration, timestamps, "
                         f"sentences}}}}: {type(error).__name__} {error}") from error

    def samples(item: tuple[str, dict]) -> list[Sample]:
        name, entry = item
        return [to_sample(name, sentence, window, entry["duration"]) for window, sentence
                in zip(entry["timestamps"], entry["sentences"], strict=True)]

    return read_lines(path, ((name, (name, entry)) for name, entry in videos), samples)


def to_sample(name: str, sentence: str, window, duration_sec) -> Sample:
    """A Sample of what a file says. ValueError for what cannot be meant."""
    start, end = (float(instant) for instant in window)
    duration = float(duration_sec)
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError("the sentence is empty")
    if not math.isfinite(start) or not math.isfinite(end) or math.isinf(duration) or duration <= 0:
        raise ValueError(f"[{start}, {end}] of {duration} s is no stretch of time")
    return Sample(name, " ".join(sentence.split()), start, end, duration)


def read_lines(path: pathlib.Path, lines, read) -> list[Sample]:
    """The samples of all (number or name, line); a ValueError that lists every bad one."""
    samples, bad = [], []
    for number, line in lines:
        try:
            samples += read(line)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            if isinstance(error, json.JSONDecodeError):
                what = f"it is no json ({error})"
            bad.append(f"\n  {'line ' * isinstance(number, int)}{number}: {what}")
    if bad:
        raise ValueError(f"{path} has {len(bad)} entries that cannot be read:{''.join(bad)}")
    return samples


def clean(samples: list[Sample]) -> tuple[list[Sample], Cleaned]:
    """Clamps moments to [0, duration] and drops those that are empty then. No other place does."""
    kept, clamped = [], 0
    for sample in samples:
        limit = sample.duration_sec if sample.duration_sec == sample.duration_sec else float("inf")
        start, end = max(0.0, min(sample.start_sec, limit)), max(0.0, min(sample.end_sec, limit))
        clamped += (start, end) != (sample.start_sec, sample.end_sec)
        if end > start:
            kept.append(sample._replace(start_sec=start, end_sec=end))
    return kept, Cleaned(clamped, len(samples) - len(kept))


def write_jsonl(path: pathlib.Path, samples: list[Sample]) -> None:
    """Samples as QVHighlights lines, atomically."""
    lines = [json.dumps({"qid": i, "query": s.sentence, "vid": s.video, "duration": s.duration_sec,
                         "relevant_windows": [[s.start_sec, s.end_sec]]}) + "\n"
             for i, s in enumerate(samples)]
    command.save(path, "".join(lines))


def install(dataset: str, root: str | os.PathLike, folder: str | os.PathLike | None,
            direct: bool = True) -> None:
    """The published annotations of a dataset, put below the root: copied from `folder` (from a
    subfolder named like the dataset, or, if `direct`, from `folder` itself), under any published
    name; without `folder`, what is missing is fetched. Counts must be the published ones."""
    target = pathlib.Path(root) / dataset
    if folder is None:
        sources = {file: rest for file, *rest in map(str.split, SOURCES.read_text().splitlines())}
        for split, names in FILES[dataset].items():
            if not annotation_file(dataset, split, root).exists():
                for name in (names[0], *(CSV if dataset == "charades" else ())):
                    clip.fetch(*sources[f"{dataset}/{name}"], target / name)
        return
    source = pathlib.Path(folder)
    if not source.is_dir():
        raise NotADirectoryError(f"{folder} is no folder; the annotations of {dataset} are several "
                                 f"files, and --annotations names their folder")
    places = [source / name for name in (dataset, *FOLDERS[dataset])]
    place = next((place for place in places if place.is_dir()), source if direct else None)
    if place is None:
        raise FileNotFoundError(f"{folder} holds no folder {dataset}")
    found = {split: next((place / name for name in names if (place / name).exists()), None)
             for split, names in FILES[dataset].items()}
    if not any(found.values()):
        raise FileNotFoundError(f"{folder} holds no annotations of {dataset}: none of "
                                f"{', '.join(name for n in FILES[dataset].values() for name in n)}")
    for split, path in found.items():
        if path:
            check_counts(dataset, split, clean(read_file(path))[0], path)
    for path in [*filter(None, found.values()), *(place / name for name in CSV)]:
        if path.exists():
            command.save(target / path.name, path.read_bytes())


def check_counts(dataset: str, split: str, samples: list[Sample], path: pathlib.Path) -> None:
    """ValueError unless a split has as many videos and sentences as were published."""
    counts = len({sample.video for sample in samples}), len(samples)
    if counts != COUNTS[dataset][split]:
        raise ValueError(f"{path} is not {dataset}'s {split} as published: it has {counts[1]} "
                         f"sentences of {counts[0]} videos after cleaning, and should have "
                         f"{COUNTS[dataset][split][1]} of {COUNTS[dataset][split][0]}")


def describe(dataset: str, root: str | os.PathLike) -> str:
    """The counts of Sec. 4.1.1 as a table, a line a split; ValueError where a published count is
    missed. A video that two splits hold counts twice, as in the paper."""
    parts = {}
    for split in splits(dataset, root):
        path = annotation_file(dataset, split, root)
        if not path.exists():
            continue
        samples, cleaned = clean(read_file(path))
        if dataset in COUNTS:
            check_counts(dataset, split, samples, path)
        durations_sec = {sample.video: sample.duration_sec for sample in samples}
        parts[split] = np.array([len(durations_sec), len(samples), sum(durations_sec.values()),
                                 sum(s.end_sec - s.start_sec for s in samples), *cleaned])
    if len(parts) > 1:
        parts["all"] = sum(parts.values())
    return "" if not parts else command.aligned(
        ["dataset", "split", "videos", "queries", "video sec", "moment sec", "moments per video",
         "clamped", "dropped"],
        [[dataset, split, f"{videos:.0f}", f"{queries:.0f}", f"{seconds / videos:.2f}",
          f"{moments_sec / queries:.2f}", f"{queries / videos:.2f}", *(f"{n:.0f}" for n in cleaned)]
         for split, (videos, queries, seconds, moments_sec, *cleaned) in parts.items()], 2)


class Event(NamedTuple):
    """What happens in a video of the shapes world: who does what, when."""
    start_sec: float
    end_sec: float
    noun: str
    verb: str


def read_events(dataset: str, root: str | os.PathLike) -> dict[str, list[Event]] | None:
    """All events of each video, where the world knows them (events.json); else None."""
    path = pathlib.Path(root) / dataset / "events.json"
    if not path.exists():
        return None
    return {name: [Event(*event) for event in events]
            for name, events in json.loads(path.read_text()).items()}


# ---------------------------------------------------------------------------- CLIP and its features

def clip_file(name: str, root: str | os.PathLike) -> str:
    """What `clip.load` is to load: the CLIP of the dataset of that name, else `name` itself."""
    own = pathlib.Path(root) / name / "clip.pt"
    return str(own) if own.exists() else name


def store_folder(dataset: str, clip_name: str, root: str | os.PathLike) -> pathlib.Path:
    """Features of a dataset by one CLIP. Compositional splits have the original's videos."""
    name = pathlib.Path(clip_name).stem if clip_name.endswith((".pt", ".bin")) else clip_name
    name = name.replace("/", "-").replace("@", "-")
    return pathlib.Path(root) / dataset.removesuffix("-cg") / "features" / name


def open_store(dataset: str, clip_name: str, root: str | os.PathLike) -> video.FeatureStore:
    """The features of a dataset; where there are none the error says which command makes them."""
    folder = store_folder(dataset, clip_name, root)
    if not list(folder.glob("manifest*.json")):
        there = ", ".join(path.name for path in sorted(folder.parent.glob("*")))
        known = f" (there are those of {there})" if there else ""
        own = "" if dataset in FILES else f" --annotations FILE (published: {', '.join(FILES)})"
        how = "shapes.py" if dataset.startswith("shapes") else (
            f"data.py {dataset.removesuffix('-cg')} --videos DIR --clip {clip_name}{own}")
        raise FileNotFoundError(f"there are no features in {folder}{known}; make them with: python "
                                f"{how}")
    return video.FeatureStore(folder)


# ------------------------------------------------------------------------------------------ batches

class Batch(NamedTuple):
    """B videos with all their sentences. Every tensor is on one device; see `to`."""
    # UNSPECIFIED: the paper's batch is of video-text pairs; MMN's is of videos with all sentences
    videos: list[str]
    frames: Tensor                                                      # [B, T, D] L2-normalised
    patches: Tensor | None                              # [B, T', D', H, W] L2-normalised over D'
    tokens: Tensor                                                      # [3, S, 77] of Q, Q^s, Q^d
    spoken: Tensor                                      # [3, S] bool, True = that query has a word
    video_of: Tensor                                                    # [S]
    moments_sec: Tensor                                                 # [S, 2]
    durations_sec: Tensor                                               # [S]
    iou: Tensor                                         # [S, N, N] of every cell with the label
    index: Tensor                                       # [S] place among the dataset's samples

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                       for value in self))


def stay(worker: int) -> None:
    """Ctrl-C is for the process that trains, not for those that read features."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Shares(torch.utils.data.BatchSampler):
    """Batches, of each of which a process gets its share."""

    def __iter__(self):
        return map(parallel.share, super().__iter__())


class Videos(torch.utils.data.Dataset):
    """The videos of a split, each with all its sentences. Features are read when asked for.

    `samples` (attribute) are the sentences in order of video; `queries` their (Q, Q^s, Q^d), or
    with `halve` (Q, Q^h, the rest). Without `normalise` features stay as CLIP gives them."""

    def __init__(self, samples: list[Sample], store: video.FeatureStore, num_clips: int,
                 parser: parse.Parser, patches: bool = False, halve: bool = False,
                 normalise: bool = True):
        by_video: dict[str, list[Sample]] = {}
        for sample in samples:
            by_video.setdefault(sample.video, []).append(sample)
        self.missing = [name for name in by_video if name not in store]
        self.videos = [name for name in by_video if name in store]
        if patches and not store.manifest["patch_frames"]:
            raise ValueError(f"the features in {store.folder} have no patches, which spatial "
                             f"dynamics (Eq. 3) looks at; use --method mmn or vdi-staged, or make "
                             f"them from the videos")
        if not self.videos:
            raise FileNotFoundError(f"none of the {len(by_video)} videos has features in "
                                    f"{store.folder}")
        self.lost = sum(len(by_video[name]) for name in self.missing)   # sentences
        self.samples = [sample for name in self.videos for sample in by_video[name]]
        counts = [len(by_video[name]) for name in self.videos]
        self.first = np.cumsum([0, *counts])  # sentences of video i: first[i] .. first[i + 1]
        self.store, self.patches = store, patches
        divide = parser.halve if halve else parser.split
        self.queries = [divide(sample.sentence) for sample in self.samples]
        self.normalise = normalise
        self.tokens = torch.stack([clip.tokenize(list(half), truncate=True)
                                   for half in zip(*self.queries)])
        self.spoken = torch.tensor([[any(c.isalnum() for c in text) for text in half]
                                    for half in zip(*self.queries)])
        self.moments_sec = torch.tensor([[sample.start_sec, sample.end_sec]
                                         for sample in self.samples])
        self.durations_sec = torch.tensor([sample.duration_sec for sample in self.samples])
        self.num_clips = num_clips

    def iou(self, index: Tensor) -> Tensor:
        """[len(index), N, N] of sentences by place in `samples`: too large for all of them."""
        return mmn.iou_map(self.moments_sec[index], self.durations_sec[index], self.num_clips)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor | None]:
        name = self.videos[i]
        kinds = ("frames", "patches") if self.patches else ("frames",)
        x = [torch.from_numpy(self.store.read(name, kind).astype(np.float32)) for kind in kinds]
        if self.normalise:
            x = [F.normalize(features, dim=1) for features in x]    # [T, D], [T', D', H, W]
        return i, x[0], x[1] if self.patches else None

    def collate(self, items: list[tuple[int, Tensor, Tensor | None]]) -> Batch:
        some = items or [self[0]]       # a process may have no share of a small batch
        which = [range(self.first[i], self.first[i + 1]) for i, _, _ in items]
        index = torch.tensor([s for sentences in which for s in sentences], dtype=torch.long)
        video_of = torch.tensor([b for b, sentences in enumerate(which) for _ in sentences],
                                dtype=torch.long)                       # [S]
        frames, patches = (torch.stack(part)[:len(items)] if part[0] is not None else None
                           for part in list(zip(*some))[1:])
        return Batch([self.videos[i] for i, _, _ in items], frames, patches,
                     self.tokens[:, index], self.spoken[:, index], video_of,
                     self.moments_sec[index], self.durations_sec[index], self.iou(index), index)

    def batches(self, size: int, generator: torch.Generator | None = None, workers: int = 0):
        """Batches of `size` videos: this process's share, shuffled; without `generator` all."""
        if generator is None:
            return torch.utils.data.DataLoader(self, size, collate_fn=self.collate,
                                               num_workers=workers, worker_init_fn=stay)
        order = torch.utils.data.RandomSampler(self, generator=generator)
        return torch.utils.data.DataLoader(
            self, batch_sampler=Shares(order, size, drop_last=False), generator=generator,
            collate_fn=self.collate, num_workers=workers, worker_init_fn=stay)


# --------------------------------------------------------------------------------- the command line

def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Asking for what is not there is an error, not a fallback.
    Each process of torchrun has a GPU of its own."""
    cuda = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there = cuda + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    wanted = {"auto": own if cuda else there[0], "cuda": own}.get(name, name)
    if wanted not in there:
        raise ValueError(f"there is no device {name!r} here, there is {', '.join(there)}")
    return torch.device(wanted)


VIDEOS = {".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp"}
FEATURES = {".npy", ".npz", ".pt"}


def video_files(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Path below the folder -> file, for all videos in it."""
    return {str(path.relative_to(folder)): path for path in sorted(pathlib.Path(folder).rglob("*"))
            if path.suffix.lower() in VIDEOS and path.is_file()}


def state_of(path: pathlib.Path) -> dict[str, int]:
    """What tells that a file has changed."""
    stat = path.stat()
    return {"size": stat.st_size, "changed_ns": stat.st_mtime_ns}


def find_files(folder: str | os.PathLike, endings: set[str]) -> dict[str, pathlib.Path]:
    """File name without ending -> file, of all such in a folder. ValueError if two share a name."""
    if not pathlib.Path(folder).is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found: dict[str, pathlib.Path] = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.suffix.lower() in endings and path.is_file():
            if path.stem in found:
                raise ValueError(f"{found[path.stem]} and {path} have one name, {path.stem}: which "
                                 f"is meant? Remove one of them from {folder}")
            found[path.stem] = path
    return found


def adopt(dataset: str, split: str, path: str, videos: dict[str, pathlib.Path], root: str,
          features: bool = False) -> None:
    """One's own annotation file becomes <root>/<dataset>/<split>.jsonl: durations probed where it
    does not tell them, cleaned, and what was clamped or dropped is printed. A video that cannot be
    read is taken to end with its last moment."""
    rows, durations_sec = read_file(path), {}
    untold = {row.video for row in rows if math.isnan(row.duration_sec)}
    if untold and not videos:
        raise ValueError(f"{path} does not tell how long {len(untold)} videos are; add "
                         f"\"duration\" to its lines" + ("" if features else
                                                        ", or name their folder with --videos"))
    for name in untold:
        try:
            durations_sec[name] = video.probe_duration(videos[name])
        except (KeyError, video.VideoError):                    # `video.extract` will report it
            durations_sec[name] = max(row.end_sec for row in rows if row.video == name)
    rows = [row._replace(duration_sec=durations_sec.get(row.video, row.duration_sec))
            for row in rows]
    kept, counts = clean(rows)
    if not kept:
        raise ValueError(f"{path} holds no moment")
    write_jsonl(annotation_file(dataset, split, root), kept)
    print(f"{split}: {len(kept)} sentences of {len({row.video for row in kept})} videos; "
          f"{counts.clamped} moments clamped to their video, {counts.dropped} empty ones dropped")


def make_features(dataset: str, samples: dict[str, list[Sample]],
                  options: argparse.Namespace) -> None:
    """Features of all videos of `samples` (split -> rows), from video files or made elsewhere.
    Under torchrun each process takes every n-th video."""
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(options.device)
    path = clip_file(options.clip, options.root)
    if options.clip.startswith("shapes") and path == options.clip:
        raise FileNotFoundError(f"the small CLIP of {options.clip} has not been made; make it "
                                f"with: python shapes.py")
    model = clip.load(path, device)
    precision = options.precision or ("fp16" if device.type == "cuda" else "float32")
    T = options.frames or (256 if dataset == "activitynet" else 32)
    made = video.made_by(model, options.clip, clip.sha256(path), T,
                         *((0, "made elsewhere") if options.features else (min(T, 32), precision)))
    store = video.FeatureStore(store_folder(dataset, options.clip, options.root), made,
                               f"-{rank}" if rank else "")
    rows = [sample for part in samples.values() for sample in part]
    names = sorted({sample.video for sample in rows})[rank::processes]
    if options.features:
        files = find_files(options.features, FEATURES)
        durations_sec = {sample.video: sample.duration_sec for sample in rows}
        failed = video.adopt_features(store, files, names, durations_sec)
    else:
        training = {sample.video for split, part in samples.items() for sample in part
                    if split.endswith("train")}
        workers = max(1, (os.cpu_count() or 2) - 1) if options.workers is None else options.workers
        failed = video.extract(store, model, find_files(options.videos, VIDEOS), names, training,
                               workers, options.batch or (256 if device.type == "cuda" else 32),
                               video.PRECISIONS[precision])
    for name, reason in sorted(failed.items()):
        print(command.printable(f"failed: {name}: {reason}"))
    lost = sum(sample.video in failed for sample in rows)
    print(f"{len(names) - len(failed)} of {len(names)} videos have features in {store.folder}"
          + (f"; without the {len(failed)} that failed (failed.txt) {lost} sentences are lost"
             if failed else ""))
    if names and len(failed) == len(names):
        raise ValueError(f"not one of {len(names)} videos could be read, see above")


def check(which: str | None, root: str) -> bool:
    """Prints what is wrong with the features of a dataset, or of all there are. Is all well?"""
    which = which.removesuffix("-cg") if which in FILES else which
    stores = sorted(path for path in pathlib.Path(root).glob(f"{which or '*'}/features/*")
                    if list(path.glob("manifest*.json")))
    if not stores:
        raise FileNotFoundError(f"there are no features in {root}/{which or '*'}/features")
    well = True
    for folder in stores:
        store, dataset = video.FeatureStore(folder), folder.parts[-3]
        problems = [*store.problems(), *(
            problem for name in (dataset, dataset + "-cg") for split in splits(name, root)
            if annotation_file(name, split, root).exists()
            for problem in gaps(store, name, split, root))]
        problems = list(dict.fromkeys(problems))        # a video may be in several splits
        made = ", ".join(f"{key} {store.manifest.get(key)}"
                         for key in ("clip", "frames", "precision"))
        print(f"{folder}: {len(store.manifest['videos'])} videos, {made}, {len(problems)} problems")
        print("".join(f"  {command.printable(problem)}\n" for problem in problems), end="")
        well &= not problems
    return well


def gaps(store: video.FeatureStore, dataset: str, split: str, root: str):
    """A sentence for what the annotations of a split ask of a store and do not find."""
    stated_sec = {row.video: row.duration_sec for row in read_annotations(dataset, split, root)}
    known = store.manifest["videos"]
    missing = [name for name in stated_sec if name not in known]
    if missing:
        yield (f"{dataset} {split}: {len(missing)} of {len(stated_sec)} videos have no features "
               f"(see failed.txt)")
    bare = [name for name in stated_sec if name in known
            and not store.path(name, "patches").exists()]
    if split == "train" and store.manifest["patch_frames"] and bare:
        yield (f"{dataset} {split}: {len(bare)} videos have no patches, for instance {bare[0]}; "
               f"run data.py again")
    for name, stated in stated_sec.items():
        found = known[name]["duration_sec"] if name in known else stated
        if abs(found - stated) > 0.05 * stated:
            yield (f"{name}: its file is {found:.2f} s long, and its annotations say "
                   f"{stated:.2f} s")


def main() -> None:
    arguments = command.parser(
        "the annotations and features of a dataset",
        epilog="torchrun --nproc-per-node 8 data.py ... shares the videos among 8 processes")
    add = arguments.add_argument
    add("dataset", help="charades, activitynet, a name for one's own, or check: are the features "
                        "of all datasets (or of the one named next) in order?")
    add("which", nargs="?", help="after check: a dataset (default: all)")
    add("--annotations", help="published: a folder that has them (default: fetched, once); one's "
                              "own: a json or jsonl file, see README")
    add("--split", default="train", choices=OWN_SPLITS, help="what one's own --annotations are")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--videos", help="folder of video files, named as in the annotations; "
                                         "without it no features are made")
    source.add_argument("--features", help="folder of features made elsewhere by the same CLIP, "
                                           "[L, D] a video: .npy, .npz (features) or .pt")
    add("--clip", default="ViT-B/32", help="published name, weight file, or 'shapes'")
    add("--frames", type=int, help="features a video (default 32; activitynet 256)")
    add("--root", default="data", help="folder of datasets")
    add("--device", **command.DEVICE)
    add("--precision", choices=video.PRECISIONS,
        help="of the image tower (default fp16 on cuda, else float32)")
    add("--workers", type=int,
        help="processes that decode (default: the number of cores less one; 0: none)")
    add("--batch", type=int, help="frames in a batch (default 256 on cuda, else 32)")
    options = arguments.parse_intermixed_args()
    with command.sentences():
        if options.dataset == "check":
            sys.exit(0 if check(options.which, options.root) else 2)
        run(options)


def run(options: argparse.Namespace) -> None:
    dataset = options.dataset
    if options.which:
        raise ValueError(f"{options.which!r} is one name too many; only check is followed by one")
    if any(number is not None and number < 1 for number in (options.frames, options.batch)):
        raise ValueError("--frames and --batch are at least 1")
    plain = all(c.isalnum() or c in "-_." for c in dataset)
    if not dataset or not plain or dataset.startswith((".", "shapes")):
        raise ValueError(f"{dataset!r} cannot be the name of a dataset of one's own")
    with contextlib.redirect_stdout(None if int(os.environ.get("RANK", 0)) else sys.stdout):
        samples = prepare(dataset, options)
    if options.videos or options.features:
        family = dataset.removesuffix("-cg") if dataset in FILES else dataset
        make_features(family, samples, options)


def prepare(dataset: str, options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Installs the annotations, prints what they are, and returns them by dataset and split."""
    root = options.root
    # the compositional splits are other sentences on the same videos: one store for both
    family = [name for name in FILES if name.removesuffix("-cg") == dataset.removesuffix("-cg")]
    for name in family:
        try:
            install(name, root, options.annotations, name == dataset)
        except (FileNotFoundError, RuntimeError) as error:
            if name == dataset:
                raise RuntimeError(f"{error}; or name a folder that has the annotations with "
                                   f"--annotations") from error
            print(f"note: {name} is left out: {error}", file=sys.stderr)
    if not family and options.annotations:
        videos = find_files(options.videos, VIDEOS) if options.videos else {}
        adopt(dataset, options.split, options.annotations, videos, root, bool(options.features))
    samples = {f"{name} {split}": read_annotations(name, split, root)
               for name in family or [dataset] for split in splits(name, root)
               if annotation_file(name, split, root).exists()}
    if not samples:
        path = annotation_file(dataset, "train", root)
        raise FileNotFoundError(f"{dataset} has no annotations: there is no {path}; name your own "
                                f"with --annotations FILE")
    for name in family or [dataset]:
        print(describe(name, root))
    return samples


if __name__ == "__main__":
    main()
