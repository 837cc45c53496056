"""Annotations, splits, one's own videos, batches (paper Sec. 4.1.1).

    python data.py charades --videos DIR                        # features of Charades-STA
    python data.py mine --annotations my.jsonl --videos DIR     # one's own videos and sentences

A dataset is a folder below the root (`data/`): annotations in their published form, and features
made by video.py. Every annotation becomes a Sample. Times are seconds, a moment is [start_sec,
end_sec).

A batch is B videos with all their sentences, flattened: sentence s belongs to video `video_of[s]`
of the batch.

Shapes: B videos, S sentences in the batch, T frames, N clips, D width of CLIP's joint space.
"""
import argparse
import csv
import json
import math
import os
import pathlib
import random
import sys
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import clip
import mmn
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
    """What `clean` had to do: moments that ended after their video, and moments that were empty
    then."""
    clamped: int
    dropped: int


# -------------------------------------------------------------------------------------- annotations

# dataset -> split -> the names of its file, below the root; the first that exists is read
FILES = {
    "charades": {"train": "charades/charades_sta_train.txt",
                 "test": "charades/charades_sta_test.txt"},
    "charades-cg": {"train": "charades-cg/train.json", "novel-word": "charades-cg/novel_word.json",
                    "novel-composition": "charades-cg/novel_composition.json",
                    "trivial": "charades-cg/test_trivial.json"},
    "activitynet": {"train": "activitynet/train.json", "val": "activitynet/val_1.json",
                    "test": "activitynet/val_2.json"},
    "activitynet-cg": {"train": "activitynet-cg/train.json",
                       "novel-word": "activitynet-cg/novel_word.json",
                       "novel-composition": "activitynet-cg/novel_composition.json",
                       "trivial": "activitynet-cg/test_trivial.json"},
}
OWN_SPLITS = ("train", "val", "val-novel-word", "test", "novel-word",
              "novel-composition")  # <dataset>/<split>.jsonl


def annotation_file(dataset: str, split: str, root: str | os.PathLike) -> pathlib.Path:
    """Where the annotations of a split are, or would be. ValueError for a split that the dataset
    does not have."""
    if dataset not in FILES:
        return pathlib.Path(root) / dataset / f"{split}.jsonl"
    if split not in FILES[dataset]:
        raise ValueError(f"{dataset} has no split {split!r}; it has "
                         f"{', '.join(splits(dataset, root))}")
    return pathlib.Path(root) / FILES[dataset][split]


def splits(dataset: str, root: str | os.PathLike) -> list[str]:
    """The splits of a dataset: the published ones, or the files that one's own has."""
    if dataset in FILES:
        return list(FILES[dataset])
    return [split for split in OWN_SPLITS if annotation_file(dataset, split, root).exists()]


def read_annotations(dataset: str, split: str, root: str | os.PathLike) -> list[Sample]:
    """The cleaned samples of a split. Of Charades-STA, and of the two compositional datasets, which
    publish no validation split, `val` is a tenth of the training videos (`held_out`); `train` is
    everything published. Splits novel-word, novel-composition and trivial of charades and
    activitynet are those of charades-cg and activitynet-cg, whose training split is what belongs to
    them (train-cg)."""
    if dataset in ("charades", "activitynet") and split in ("novel-word", "novel-composition",
                                                            "trivial", "train-cg"):
        dataset, split = f"{dataset}-cg", "train" if split == "train-cg" else split
    if dataset in FILES and split == "val" and "val" not in FILES[dataset]:
        return held_out(read_annotations(dataset, "train", root))
    return clean(read_file(annotation_file(dataset, split, root)))[0]


def held_out(train: list[Sample]) -> list[Sample]:
    """The samples of a tenth of the training videos, the same tenth always."""
    # UNSPECIFIED: the paper stops early on a validation set that Charades-STA does not have
    videos = sorted({sample.video for sample in train})
    chosen = set(random.Random(0).sample(videos, max(1, len(videos) // 10)))
    return [sample for sample in train if sample.video in chosen]


def read_file(path: str | os.PathLike) -> list[Sample]:
    """An annotation file as it is published, by its form: Charades-STA text, the json of 2D-TAN,
    MMN and the compositional splits, or QVHighlights jsonl. A duration of nan means that the file
    does not tell."""
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no annotation file {path}")
    if path.suffix == ".txt":
        return read_charades(path)
    if path.suffix == ".jsonl":
        return read_jsonl(path)
    try:
        videos = json.loads(path.read_text())
        return [Sample(name, " ".join(sentence.split()), float(start), float(end),
                       float(entry["duration"]))
                for name, entry in videos.items()
                for (start, end),
                sentence in zip(entry["timestamps"], entry["sentences"], strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in the form {{video: {{duration, timestamps, "
                         f"sentences}}}}: "
                         f"{type(error).__name__} {error}") from error


def read_charades(path: pathlib.Path) -> list[Sample]:
    """Lines "VIDEO START END##sentence."; durations from the column `length` of
    Charades_v1_{train,test}.csv beside it."""
    durations = {}
    for table in ("Charades_v1_train.csv", "Charades_v1_test.csv"):
        if not (path.parent / table).exists():
            raise FileNotFoundError(f"{path.parent / table} is missing: the durations of "
                                    f"Charades-STA's videos are "
                                    f"in it (from the annotations of the Charades dataset)")
        with open(path.parent / table, newline="") as file:
            durations |= {row["id"]: float(row["length"]) for row in csv.DictReader(file)}
    samples = []
    for line in path.read_text().splitlines():
        place, sentence = line.split("##", 1)
        name, start, end = place.split()
        samples.append(Sample(name, sentence.strip(), float(start), float(end), durations[name]))
    return samples


def read_jsonl(path: pathlib.Path) -> list[Sample]:
    """QVHighlights lines; {"vid", "query", "relevant_windows"} is enough. One sample a window. All
    bad lines are named."""
    samples, bad = [], []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not str(row["query"]).strip():
                raise ValueError("the query is empty")
            for start, end in row["relevant_windows"]:
                samples.append(Sample(str(row["vid"]), str(row["query"]), float(start), float(end),
                                      float(row.get("duration", "nan"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            bad.append(f"line {number}: {type(error).__name__} {error}")
    if bad:
        raise ValueError(f"{path} has {len(bad)} bad lines: " + "; ".join(bad[:20]))
    return samples


def clean(samples: list[Sample]) -> tuple[list[Sample], Cleaned]:
    """Clamps moments to [0, duration] and drops those that are empty then. The only place where
    this happens."""
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
                         "relevant_windows": [[s.start_sec, s.end_sec]]}) + "\n" for i,
                         s in enumerate(samples)]
    path.parent.mkdir(parents=True, exist_ok=True)
    video.save_atomically(path, lambda file: file.write("".join(lines).encode()))


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
    return {name: [Event(*event) for event in events] for name,
            events in json.loads(path.read_text()).items()}


# ---------------------------------------------------------------------------- CLIP and its features

def clip_file(name: str, root: str | os.PathLike) -> str:
    """What `clip.load` is to load: the CLIP of a dataset below the root by the dataset's name, else
    `name` itself."""
    own = pathlib.Path(root) / name / "clip.pt"
    return str(own) if own.exists() else name


def store_folder(dataset: str, clip_name: str, root: str | os.PathLike) -> pathlib.Path:
    """Features of a dataset made by one CLIP. The compositional splits have the videos of the
    original dataset."""
    name = pathlib.Path(clip_name).stem if clip_name.endswith((".pt", ".bin")) else clip_name
    name = name.replace("/", "-").replace("@", "-")
    return pathlib.Path(root) / dataset.removesuffix("-cg") / "features" / name


def open_store(dataset: str, clip_name: str, root: str | os.PathLike) -> video.FeatureStore:
    """The features of a dataset; where there are none the error says which command makes them."""
    folder = store_folder(dataset, clip_name, root)
    if not (folder / "manifest.json").exists():
        published = "" if dataset in FILES else " --annotations FILE"
        raise FileNotFoundError(f"there are no features in {folder}; make them with: python "
                                f"data.py "
                                f"{dataset.removesuffix('-cg')}{published} --videos DIR --clip "
                                f"{clip_name}")
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
    iou: Tensor  # [S, N, N] overlap of every cell with the label
    index: Tensor  # [S] place of the sentence among the dataset's samples

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(*(value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                       for value in self))


class Videos(torch.utils.data.Dataset):
    """The videos of a split, each with all its sentences. Features are read when a video is asked
    for.

    `samples` (attribute) are the sentences in order of video; `queries` their (Q, Q^s, Q^d)."""

    def __init__(self, samples: list[Sample], store: video.FeatureStore, num_clips: int,
                 parser: parse.Parser,
                 patches: bool = False):
        by_video: dict[str, list[Sample]] = {}
        for sample in samples:
            by_video.setdefault(sample.video, []).append(sample)
        self.missing = [name for name in by_video if name not in store]
        self.videos = [name for name in by_video if name in store]
        if not self.videos:
            raise FileNotFoundError(f"none of the {len(by_video)} videos has features in "
                                    f"{store.folder}")
        self.samples = [sample for name in self.videos for sample in by_video[name]]
        counts = [len(by_video[name]) for name in self.videos]
        self.first = np.cumsum([0, *counts])  # sentences of video i: first[i] .. first[i + 1]
        self.store, self.patches = store, patches
        self.queries = [parser.split(sample.sentence) for sample in self.samples]
        self.tokens = torch.stack([clip.tokenize(list(half), truncate=True)
                                   for half in zip(*self.queries)])
        self.spoken = torch.tensor([[any(c.isalnum() for c in text) for text in half]
                                    for half in zip(*self.queries)])
        self.moments_sec = torch.tensor([[sample.start_sec, sample.end_sec]
                                         for sample in self.samples])
        self.durations_sec = torch.tensor([sample.duration_sec for sample in self.samples])
        self.iou = mmn.iou_map(self.moments_sec, self.durations_sec, num_clips)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor | None]:
        name = self.videos[i]
        frames = torch.from_numpy(self.store.read(name, "frames").astype(np.float32))  # [T, D]
        if not self.patches:
            return i, F.normalize(frames, dim=1), None
        patches = torch.from_numpy(self.store.read(name,
                                                   "patches").astype(np.float32))  # [T', D', H, W]
        return i, F.normalize(frames, dim=1), F.normalize(patches, dim=1)

    def collate(self, items: list[tuple[int, Tensor, Tensor | None]]) -> Batch:
        which = [range(self.first[i], self.first[i + 1]) for i, _, _ in items]
        index = torch.tensor([s for sentences in which for s in sentences])     # [S]
        video_of = torch.tensor([b for b, sentences in enumerate(which) for _ in sentences])  # [S]
        return Batch([self.videos[i] for i, _, _ in items],
                     torch.stack([frames for _, frames, _ in items]),
                     torch.stack([patches for _, _, patches in items]) if self.patches else None,
                     self.tokens[:, index], self.spoken[:, index], video_of,
                     self.moments_sec[index],
                     self.durations_sec[index], self.iou[index], index)

    def batches(self, size: int, generator: torch.Generator | None = None, workers: int = 0):
        """Batches of `size` videos: shuffled by `generator` for training, in order without one."""
        return torch.utils.data.DataLoader(self, size, shuffle=generator is not None,
                                           generator=generator,
                                           collate_fn=self.collate, num_workers=workers,
                                           persistent_workers=workers > 0)


# --------------------------------------------------------------------------------- the command line

def pick_device(name: str) -> torch.device:
    """auto, cpu, cuda, cuda:N or mps. Asking for what is not there is an error, not a fallback."""
    there = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    wanted = {"auto": there[0], "cuda": "cuda:0"}.get(name, name)
    if wanted not in there:
        raise ValueError(f"there is no device {name!r} here, there is {', '.join(there)}")
    return torch.device(wanted)


def find_videos(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """File name without its ending -> file, for all files below the folder that may be videos."""
    endings = {".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv",
               ".3gp"}
    return {path.stem: path for path in sorted(pathlib.Path(folder).rglob("*"))
            if path.suffix.lower() in endings}


def extract(names: set[str], training: set[str], videos: dict[str, pathlib.Path],
            store: video.FeatureStore, model: clip.CLIP) -> dict[str, str]:
    """Makes the features that are missing of the videos `names`; patches of those in `training`.

    Returns video -> reason for those that failed; the list is kept in failed.txt."""
    failed, T = {}, store.manifest["frames"]
    kept = video.patch_frames(T, store.manifest["patch_frames"])
    bar = tqdm(sorted(names), desc="features", unit="video", disable=None)
    for i, name in enumerate(bar):
        if name in store and (name not in training or store.path(name, "patches").exists()):
            continue
        try:
            if name not in videos:
                raise video.VideoError(f"there is no video file named {name}")
            frames, patches, duration_sec = video.encode_video(model, videos[name], T)
            store.write(name, frames, patches[kept] if name in training else None, duration_sec)
        except video.VideoError as error:
            failed[name] = str(error)
            bar.write(f"failed: {name}: {error}", file=sys.stderr)
        if i % 100 == 99:
            store.save_manifest()
    store.save_manifest()
    text = "".join(f"{name}\t{reason}\n" for name, reason in failed.items())
    video.save_atomically(store.folder / "failed.txt", lambda file: file.write(text.encode()))
    return failed


def adopt(dataset: str, split: str, path: str, videos: dict[str, pathlib.Path], root: str) -> None:
    """One's own annotation file becomes <root>/<dataset>/<split>.jsonl: durations probed where it
    does not tell them, cleaned, and what was clamped or dropped is printed. A video that cannot be
    read keeps the last end it has."""
    rows, durations = read_file(path), {}
    for name in {row.video for row in rows if math.isnan(row.duration_sec)}:
        try:
            durations[name] = video.probe_duration(videos[name])
        except (KeyError, video.VideoError):                            # `extract` will report it
            durations[name] = max(row.end_sec for row in rows if row.video == name)
    rows = [row._replace(duration_sec=durations.get(row.video, row.duration_sec)) for row in rows]
    kept, counts = clean(rows)
    if not kept:
        raise ValueError(f"{path} holds no moment")
    write_jsonl(annotation_file(dataset, split, root), kept)
    print(f"{split}: {len(kept)} sentences of {len({row.video for row in kept})} videos; "
          f"{counts.clamped} moments "
          f"clamped to their video, {counts.dropped} empty ones dropped")


def main() -> None:
    arguments = argparse.ArgumentParser(description="make the features of a dataset, or a dataset "
                                                    "of one's own videos",
                                        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("dataset",
                           help="charades, activitynet (annotations below the root), or a new name")
    arguments.add_argument("--annotations", help="one's own: json or jsonl file, see README")
    arguments.add_argument("--split", default="train", choices=OWN_SPLITS,
                           help="what --annotations is")
    arguments.add_argument("--videos", required=True,
                           help="folder of video files, named as in the annotations")
    arguments.add_argument("--clip", default="ViT-B/32",
                           help="published name, weight file, or 'shapes'")
    arguments.add_argument("--frames", type=int,
                           help="features a video (default 32; activitynet 256)")
    arguments.add_argument("--root", default="data", help="folder of datasets")
    arguments.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    options = arguments.parse_args()
    try:
        run(options)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace) -> None:
    dataset, root = options.dataset, options.root
    if not pathlib.Path(options.videos).is_dir():
        raise FileNotFoundError(f"there is no folder {options.videos}")
    if dataset.startswith("shapes") or not all(c.isalnum() or c in "-_."
                                               for c in dataset) or dataset[0] == ".":
        raise ValueError(f"{dataset!r} cannot be the name of a dataset of one's own")
    if dataset in FILES and options.annotations:
        raise ValueError(f"{dataset} has published annotations, which are read from {root}; "
                         f"--annotations is for one's own dataset")
    device, videos = pick_device(options.device), find_videos(options.videos)
    if options.annotations:
        adopt(dataset, options.split, options.annotations, videos, root)
    # the compositional splits are other sentences on the same videos: one store for both
    family = (dataset.removesuffix("-cg"), dataset.removesuffix("-cg") + "-cg")
    samples = {(name, split): read_annotations(name, split, root) for name in family
               for split in splits(name, root) if annotation_file(name, split, root).exists()}
    if not samples:
        how = "" if dataset in FILES else "; name your own with --annotations FILE"
        raise FileNotFoundError(f"{dataset} has no annotations: there is no "
                                f"{annotation_file(dataset, 'train', root)}{how}")
    path = clip_file(options.clip, root)
    if options.clip.startswith("shapes") and path == options.clip:
        raise FileNotFoundError(f"the small CLIP of {options.clip} has not been made; make it "
                                f"with: python shapes.py")
    model = clip.load(path, device)
    T = options.frames or (256 if family[0] == "activitynet" else 32)
    visual = model.visual
    width = model.text_projection.shape[1]
    patch_width = visual.layer4[-1].conv3.out_channels if isinstance(visual,
                                                                     clip.ModifiedResNet) else width
    digest = clip.sha256(clip.download(path) if path in clip.PUBLISHED else path)
    store = video.FeatureStore(store_folder(dataset, options.clip, root), {
        "clip": options.clip, "sha256": digest, "resolution": visual.resolution, "frames": T,
        "patch_frames": min(T, 32), "width": width, "patch_width": patch_width,
        "grid": visual.grid})
    names = {sample.video for rows in samples.values() for sample in rows}
    training = {sample.video for (_, split), rows in samples.items() if split == "train"
                for sample in rows}
    failed = extract(names, training, videos, store, model)
    print(f"{len(store.manifest['videos'])} videos have features in {store.folder}")
    for name, reason in failed.items():
        print(f"failed: {name}: {reason}")


if __name__ == "__main__":
    main()
