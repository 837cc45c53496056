"""Annotations, splits, features and batches (paper Sec. 4.1.1).

    python data.py charades --videos DIR        # annotations and features: see extras/prepare.py

A dataset is a folder below the root (`data/`): annotations in their published form, and a store of
features. Every annotation becomes a Sample, whose moment is [start_sec, end_sec). A batch is B
videos with all their sentences, flattened: sentence s belongs to `video_of[s]`.

Shapes: B videos, S sentences in the batch, T frames (T' with patches), N clips, D width of CLIP's
joint space, D' channels of the patch features, H x W patch grid.
"""
import csv
import hashlib
import json
import math
import os
import pathlib
import random
import time
import unicodedata
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import clip
import mmn
import parse
from support import files, loading, weights
from support.errors import Mistake, reason


class Sample(NamedTuple):
    """One sentence and the moment [start_sec, end_sec) of the video that it describes."""
    video: str
    sentence: str
    start_sec: float
    end_sec: float
    duration_sec: float
    others: tuple[tuple[float, float], ...] = ()        # further true moments (QVHighlights)
    qid: int | str | None = None                        # its number in the file, if it has one

    @property
    def moments_sec(self) -> list[tuple[float, float]]:
        """All true moments."""
        return [(self.start_sec, self.end_sec), *self.others]


class VideoError(Mistake):
    """A video, or its features, cannot be read; the message names the file and the reason."""


# -------------------------------------------------------------------------------------- annotations

# dataset -> split -> possible file names; the first that exists is read
COMPOSITIONAL = {"train": ("train.json",), "novel-word": ("novel_word.json",),
                 "novel-composition": ("novel_composition.json",),
                 "trivial": ("test_trivial.json",)}
FILES = {
    "charades": {"train": ("charades_sta_train.txt", "charades_train.json",
                           "charades_sta_train_tvr_format.jsonl"),
                 "test": ("charades_sta_test.txt", "charades_test.json",
                          "charades_sta_test_tvr_format.jsonl")},
    "activitynet": {"train": ("train.json",), "val": ("val_1.json", "val.json"),
                    "test": ("val_2.json", "test.json")},
    "charades-cg": COMPOSITIONAL,
    "activitynet-cg": COMPOSITIONAL,
}
# splits that share sentences with the original training split: refused for its checkpoints
SHARED_SPLITS = ("novel-word", "novel-composition", "trivial", "train-cg")
LEAKING = {"charades": SHARED_SPLITS, "activitynet": SHARED_SPLITS}
CSV = ("Charades_v1_train.csv", "Charades_v1_test.csv")                 # durations of Charades
OWN_SPLITS = ("train", "val", "val-novel-word", "test", "novel-word", "novel-composition",
              "coupled-novel-word")


def annotation_file(dataset: str, split: str, root: str | os.PathLike) -> pathlib.Path:
    """Where the annotations of a split are, or would be. Mistake for an unknown split."""
    folder = pathlib.Path(root) / dataset
    if dataset not in FILES:
        return folder / f"{split}.jsonl"
    if split not in FILES[dataset]:
        raise Mistake(f"{dataset} has no split {split!r}; it has {', '.join(FILES[dataset])}")
    paths = [folder / name for name in FILES[dataset][split]]
    existing = [path for path in paths if path.exists()]
    return (existing + paths)[0]


def splits(dataset: str, root: str | os.PathLike) -> list[str]:
    """The splits of a dataset: the published ones, or those of OWN_SPLITS that have a file."""
    if dataset in FILES:
        return list(FILES[dataset])
    return [split for split in OWN_SPLITS if annotation_file(dataset, split, root).exists()]


def read_annotations(dataset: str, split: str, root: str | os.PathLike) -> list[Sample]:
    """The cleaned samples of a split.

    Charades-STA and the two compositional datasets publish no validation split: `val` is then a
    tenth of the training videos (`held_out`), and `train` everything published. Splits novel-word,
    novel-composition and trivial of charades and activitynet are those of charades-cg and
    activitynet-cg, whose training split is train-cg."""
    if split in LEAKING.get(dataset, ()):
        dataset, split = f"{dataset}-cg", split.removesuffix("-cg")
    if dataset in FILES and split == "val" and "val" not in FILES[dataset]:
        train = read_annotations(dataset, "train", root)
        chosen = held_out(sample.video for sample in train)
        return [sample for sample in train if sample.video in chosen]
    return clean(read_file(annotation_file(dataset, split, root)))[0]


def held_out(videos) -> set[str]:
    """A tenth of the training videos, always the same tenth."""
    # UNSPECIFIED: the paper stops early on a validation set that Charades-STA does not have
    names = sorted(set(videos))
    return set(random.Random(0).sample(names, max(1, len(names) // 10)))


def training_samples(dataset: str, select_on: str, limit: int,
                     root: str | os.PathLike) -> dict[str, list[Sample]]:
    """`train` and the split that selects the epoch, if any, whose videos are not trained on."""
    available = splits(dataset, root)
    if dataset in FILES and "val" not in available:
        available.append("val")
    if select_on == "train" or select_on not in (*available, "val"):
        raise Mistake(f"--select-on {select_on} cannot select the epoch; the splits of {dataset} "
                      f"are {', '.join(available)}")
    samples = {split: read_annotations(dataset, split, root)
               for split in ("train", select_on) if split in available}
    if "train" not in samples:
        raise Mistake(f"{dataset} has no training sentences; add them with: python data.py "
                      f"{dataset} --annotations FILE")
    validating = {sample.video for sample in samples.get(select_on, [])}
    # or the epoch would be chosen on training videos
    free = [sample for sample in samples["train"] if sample.video not in validating]
    shared = len(samples["train"]) - len(free)
    # no note where `val` is held out of the training split on purpose
    if shared and (dataset not in FILES or select_on in FILES[dataset]):
        print(f"{shared} of {len(samples['train'])} training sentences are left out, because their "
              f"videos are in {select_on}, too; divide your videos, not your sentences, into the "
              f"two")
        if not free:
            raise Mistake(f"every training video of {dataset} is in {select_on}, too; divide the "
                          f"videos into two files")
    names = list(dict.fromkeys(sample.video for sample in free))        # each once, in order
    kept = set(names[:limit or None])
    samples["train"] = [sample for sample in free if sample.video in kept]
    return samples


def read_file(path: str | os.PathLike) -> list[Sample]:
    """An annotation file in its published form: text, json or jsonl. Unknown durations are nan."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise Mistake(f"there is no annotation file {path}")
    if path.suffix == ".txt":
        samples = read_charades(path)
    elif path.suffix == ".jsonl":
        samples = read_jsonl(path)
    else:
        samples = read_json(path)
    durations_sec: dict[str, float] = {}
    for sample in samples:
        first_sec = durations_sec.setdefault(sample.video, sample.duration_sec)
        if abs(sample.duration_sec - first_sec) > 0.01 * first_sec:     # false for nan
            raise Mistake(f"{path} gives {sample.video} two durations, {first_sec} s and "
                          f"{sample.duration_sec} s; correct one of them")
    return samples


def read_charades(path: pathlib.Path) -> list[Sample]:
    """Lines "VIDEO START END##sentence."; durations: `length` in Charades_v1_*.csv beside it."""
    durations_sec = {}
    for name in CSV:
        table = path.parent / name
        if not table.exists():
            raise Mistake(f"{table} of the Charades dataset is missing; it has the durations")
        with open(table, newline="", encoding="utf-8-sig") as file:
            try:
                durations_sec |= {row["id"]: float(row["length"]) for row in csv.DictReader(file)}
            except (KeyError, TypeError, ValueError) as error:
                raise Mistake(f"{table} has no columns id and length: {error}") from error

    def parse_line(line: str) -> list[Sample]:
        place, sentence = line.split("##", 1)
        name, start, end = place.split()
        return [to_sample(name, sentence, (start, end), durations_sec[name])]

    return read_lines(path, files.numbered_lines(path), parse_line)


def json_lines(path: pathlib.Path) -> list[tuple[int, str]]:
    """The numbered lines of a jsonl file. Mistake for a json array."""
    lines = files.numbered_lines(path)
    if lines and lines[0][1].lstrip().startswith("["):
        raise Mistake(f"{path} contains a json array; write one object per line")
    return lines


def read_jsonl(path: pathlib.Path) -> list[Sample]:
    """QVHighlights lines; {"vid", "query", "relevant_windows"} is enough."""
    def parse_line(line: str) -> list[Sample]:
        row = json.loads(line)
        if not row["relevant_windows"]:
            raise ValueError("it has no moment (relevant_windows)")
        duration_sec = row.get("duration")
        if duration_sec is None:
            duration_sec = math.nan
        moments = []
        for window in row["relevant_windows"]:
            sample = to_sample(str(row["vid"]), row["query"], window, duration_sec)
            moments.append((sample.start_sec, sample.end_sec))
            if sample.end_sec <= sample.start_sec:
                raise ValueError(f"{list(moments[-1])} ends before it begins")
        (start, end), *others = moments
        return [sample._replace(start_sec=start, end_sec=end, others=tuple(others),
                                qid=row.get("qid"))]

    return read_lines(path, json_lines(path), parse_line)


def read_json(path: pathlib.Path) -> list[Sample]:
    """2D-TAN's, MMN's and ActivityNet's form, {video: {"duration", "timestamps", "sentences"}}."""
    text = files.read_text(path)
    try:
        videos = json.loads(text).items()
    except (ValueError, AttributeError, RecursionError) as error:
        raise Mistake(f"{path} is not of the form {{video: {{duration, timestamps, sentences}}}}: "
                      f"{type(error).__name__} {error}") from error

    def parse_video(item: tuple[str, dict]) -> list[Sample]:
        name, entry = item
        pairs = zip(entry["timestamps"], entry["sentences"], strict=True)
        return [to_sample(name, sentence, window, entry["duration"]) for window, sentence in pairs]

    return read_lines(path, [(item[0], item) for item in videos], parse_video)


def to_sample(name: str, sentence: str, window, duration_sec) -> Sample:
    """A Sample from a file's values. ValueError for invalid ones."""
    start, end = [float(instant) for instant in window]
    duration = float(duration_sec)
    if not isinstance(sentence, str) or not sentence.strip():
        raise ValueError("the sentence is empty")
    if not math.isfinite(start) or not math.isfinite(end) or math.isinf(duration) or duration <= 0:
        raise ValueError(f"[{start}, {end}] of {duration} s is not a valid moment")
    # NFC: a Mac may write an accent in a name as a character of its own
    return Sample(unicodedata.normalize("NFC", name), " ".join(sentence.split()), start, end,
                  duration)


def read_lines(path: pathlib.Path, lines, read) -> list[Sample]:
    """The samples of all (number or name, line). Mistake that lists the first invalid ones."""
    samples = []
    bad = []
    for number, line in lines:
        try:
            samples += read(line)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as error:
            what = str(error)
            if isinstance(error, KeyError):
                what = f"no {error}"
            elif isinstance(error, json.JSONDecodeError):
                what = f"it is not valid json ({error})"
            # the number of a line, or the name of a video
            label = f"line {number}" if isinstance(number, int) else number
            bad.append(f"\n  {label}: {what}")
    if bad:
        more = f"\n  and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise Mistake(f"{path} has {len(bad)} invalid entries; correct or remove them:"
                      f"{''.join(bad[:10])}{more}")
    return samples


def clean(samples: list[Sample]) -> tuple[list[Sample], int, int]:
    """Clamps moments to [0, duration] and drops those that are then empty. Only this function does.
    Returns what is left, of how many sentences moments were clamped, and how many were dropped."""
    kept = []
    clamped = 0
    for sample in samples:
        is_known = not math.isnan(sample.duration_sec)
        limit = sample.duration_sec if is_known else math.inf
        inside = [(max(0.0, min(start, limit)), max(0.0, min(end, limit)))
                  for start, end in sample.moments_sec]
        clamped += inside != sample.moments_sec
        left = [(start, end) for start, end in inside if end > start]
        if left:
            (start, end), *others = left
            kept.append(sample._replace(start_sec=start, end_sec=end, others=tuple(others)))
    return kept, clamped, len(samples) - len(kept)


def write_jsonl(path: pathlib.Path, samples: list[Sample]) -> None:
    """Samples as QVHighlights lines, atomically."""
    lines = []
    for i, sample in enumerate(samples):
        row = {"qid": i if sample.qid is None else sample.qid, "query": sample.sentence,
               "vid": sample.video, "duration": sample.duration_sec,
               "relevant_windows": sample.moments_sec}
        lines.append(json.dumps(row) + "\n")
    files.save(path, "".join(lines))


def parser_of(dataset: str, root: str | os.PathLike, mask: str = "") -> parse.Parser:
    """The parser of a dataset's sentences: its chunks.json (the shapes world has one), or else
    spaCy, whose chunks are cached in its folder."""
    folder = pathlib.Path(root) / dataset
    path = folder / "chunks.json"
    if not path.exists():
        return parse.Parser(mask=mask, cache=folder)
    try:
        return parse.Parser(mask=mask, known=dict(json.loads(files.read_text(path))))
    except (ValueError, TypeError) as error:
        raise Mistake(f"{path} is damaged ({error}); remove its folder and build it "
                      f"again") from error


# ----------------------------------------------------------------------------------------- features

def clip_file(name: str, root: str | os.PathLike) -> str:
    """What `clip.load` should load: the CLIP of the dataset with that name, else `name` itself."""
    own = pathlib.Path(root) / name / "clip.pt"
    return str(own) if own.exists() else name


def is_weights(clip_name: str) -> bool:
    """Whether a --clip is a file or folder of weights, perhaps of another machine, or a name."""
    if os.sep in clip_name or clip_name.endswith((".pt", ".pth", ".bin", ".safetensors", ".ckpt")):
        return True
    try:
        return weights.file_in(clip_name).is_file()
    except Mistake:                                     # a folder that only shares the name
        return False


def store_folder(dataset: str, clip_name: str, root: str | os.PathLike,
                 digest: str = "") -> pathlib.Path:
    """Features of a dataset by one CLIP. The compositional splits use the original's videos.

    digest    SHA-256 of the CLIP (default: that of its file, if it is there)"""
    family = dataset.removesuffix("-cg") if dataset in FILES else dataset
    folder = pathlib.Path(root) / family / "features"
    named = folder / clip_name.replace("/", "-").replace("@", "-")
    is_named = clip_name in clip.PUBLISHED or not is_weights(clip_name)
    if is_named or (named / "manifest.json").exists():  # which an earlier version may have made
        return named
    name = pathlib.Path(clip_name).stem
    if not digest and os.path.exists(clip_name):
        digest = clip.sha256(clip_name)
    # an earlier version had the name alone, but two files may both be called pytorch_model.bin
    for path in sorted(folder.glob(f"{name}/manifest.json")):
        if digest in ("", read_manifest(path).get("sha256")):
            return path.parent
    made = sorted(folder.glob(f"{name}-????????"))
    if not digest and len(made) == 1:                   # the weights are on another machine
        return made[0]
    return folder / f"{name}-{digest[:8]}"


def open_store(dataset: str, clip_name: str, root: str | os.PathLike,
               frames: int | None = None, digest: str = "") -> "FeatureStore":
    """The features of a dataset by the CLIP of this name (and SHA-256). Mistake, with the command
    that makes them, if there are none, or not `frames` per video."""
    folder = store_folder(dataset, clip_name, root, digest)
    if not list(folder.glob("manifest*.json")):
        others = ", ".join(path.name for path in sorted(folder.parent.glob("*")))
        if others:
            others = f" (only those by {others}; see --clip)"
        how = f"data.py {dataset.removesuffix('-cg')} --videos DIR --clip {clip_name}"
        if dataset.startswith("shapes"):
            how = "shapes.py"
        elif dataset not in FILES:              # a dataset of the user's, or a misspelled one
            how += f" --annotations FILE (known by name: {', '.join(FILES)}, shapes)"
        raise Mistake(f"there are no features in {folder}{others}; make them with: python {how}")
    store = FeatureStore(folder)
    if frames and store.manifest["frames"] != frames:
        raise Mistake(f"{folder} has {store.manifest['frames']} features per video, not {frames}; "
                      f"change --frames")
    return store


def patch_frames(frames: int, count: int) -> np.ndarray:
    """Which of T frames keep their patch features: the middles of `count` equal parts."""
    # DEVIATION: Eq. 3 takes all frames; of ActivityNet's 256, 32, which saves 112 GB of disk
    count = min(count, frames)
    return ((np.arange(count) + 0.5) * frames / count).astype(int)


def read_manifest(path: pathlib.Path) -> dict:
    """Mistake if it is not one."""
    try:
        content = json.loads(files.read_text(path))
        content["videos"].items()               # each of these raises if it is not as expected
        int(content["frames"])
        int(content["width"])
        return content
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Mistake(f"{path} is damaged ({reason(error)}); remove it and run data.py again, "
                      f"which makes what is missing") from error


class FeatureStore:
    """A folder of features, the same for every dataset:

        <video>.frames.npy    [T, D]          float16, global features x_i^v, not normalised
        <video>.patches.npy   [T', D', H, W]  float16, patch features of T' of the T frames;
                                              training videos only
        manifest.json         how they were made, and for each video its duration and seconds per
                              feature; process r > 0 of a cluster writes manifest-r.json
        failed.txt            the videos that could not be read, with the reason

    Files get their names only when they are complete. `made` (video.made_by) is required to create
    a store, and must agree with an existing one. `part`: suffix of this process's files, "-r"."""

    def __init__(self, folder: str | os.PathLike, made: dict | None = None, part: str = ""):
        self.folder = pathlib.Path(folder)
        self.part = part
        self.saved = time.monotonic()           # when the manifest was saved last
        parts = sorted(self.folder.glob("manifest*.json"))
        if not parts and made is None:
            raise Mistake(f"there are no features in {folder}")
        self.manifest = dict(made or {}, normalised=False, videos={})
        for path in parts:
            existing = read_manifest(path)
            if made is None and not self.manifest["videos"]:
                self.manifest = dict(existing, videos={})
            if not existing["videos"]:                  # every video failed: nothing was made
                continue
            for key in [*self.manifest, "activation"]:          # absent unless GELU
                value = self.manifest.get(key)
                if key != "videos" and existing.get(key) != value:
                    raise Mistake(f"the features in {folder} were made with {key} "
                                  f"{existing.get(key)!r}, not {value!r}; remove that folder to "
                                  f"make them again")
            self.manifest["videos"] |= existing["videos"]

    def path(self, video: str, kind: str) -> pathlib.Path:
        if "/" in video or "\\" in video or "\0" in video or video.startswith("."):
            raise Mistake(f"{video!r} cannot be the name of a video: it must be a plain file name")
        return self.folder / f"{video}.{kind}.npy"

    def __contains__(self, video: str) -> bool:
        return video in self.manifest["videos"]

    def write(self, video: str, frames: Tensor, patches: Tensor | None,
              duration_sec: float, size: int | None = None) -> None:
        """Saves frames [T, D] and, unless None, patches [T', D', H, W]. They count only
        after `save_manifest`, called here every ten seconds."""
        if not (torch.isfinite(frames).all() and math.isfinite(duration_sec)):
            raise VideoError(f"{video}: its features or its duration are not finite")
        if not frames.any():
            raise VideoError(f"{video}: its features are all 0")
        files.save(self.path(video, "frames"), lambda file: np.save(file, frames.numpy()))
        if patches is not None:
            files.save(self.path(video, "patches"), lambda file: np.save(file, patches.numpy()))
        # the checksum tells a resumed run whether these are still the features it began with
        about = {"duration_sec": duration_sec, "seconds_per_feature": duration_sec / len(frames),
                 "crc32": zlib.crc32(frames.numpy().tobytes())}
        if size is not None:
            about["bytes"] = size
        self.manifest["videos"][video] = about
        if time.monotonic() - self.saved > 10:
            self.save_manifest()

    def save_manifest(self) -> None:
        """Sorted by video, so that two stores of the same features are the same bytes."""
        content = self.manifest | {"videos": dict(sorted(self.manifest["videos"].items()))}
        files.save(self.folder / f"manifest{self.part}.json", json.dumps(content, indent=1))
        self.saved = time.monotonic()

    def save_failed(self, failed: dict[str, str]) -> None:
        text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(failed.items()))
        files.save(self.folder / f"failed{self.part}.txt", text)

    def read(self, video: str, kind: str) -> np.ndarray:
        """`kind` is "frames" or "patches"; float16."""
        path = self.path(video, kind)
        made = self.manifest
        shape = (made["frames"], made["width"])
        if kind == "patches":
            grid = made.get("grid")
            shape = (made.get("patch_frames"), made.get("patch_width"), grid, grid)
        try:
            # not memory-mapped: that takes twice as long, and keeps a file descriptor
            x = np.asarray(np.load(path, allow_pickle=False))
            if x.shape != shape or x.dtype.kind != "f":
                raise ValueError(f"{x.dtype} {x.shape}, not float16 {shape}")
            return x
        except FileNotFoundError as error:
            raise VideoError(f"{path} is missing: the features of {video!r} have not been "
                             f"made") from error
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise VideoError(f"{path} is damaged ({error}); remove it and run data.py again, which "
                             f"makes what is missing") from error


# ------------------------------------------------------------------------------------------ batches

class Batch(NamedTuple):
    """B videos with all their sentences. Every tensor is on one device; see `to`."""
    # DEVIATION: the paper's batch is of video-text pairs; MMN's is of videos with all sentences
    videos: list[str]
    frames: Tensor                                                      # [B, T, D] L2-normalised
    patches: Tensor | None                              # [B, T', D', H, W] L2-normalised over D'
    tokens: Tensor                                                      # [3, S, 77] of Q, Q^s, Q^d
    spoken: Tensor                                      # [3, S] bool, True = that query has a word
    video_of: Tensor                                                    # [S]
    moments_sec: Tensor                                                 # [S, 2]
    durations_sec: Tensor                                               # [S]
    iou: Tensor                                         # [S, N, N] of every cell with the label
    index: Tensor                                       # [S] place in Videos.samples

    def to(self, device: torch.device | str) -> "Batch":
        moved = {name: value.to(device, non_blocking=True) for name, value
                 in self._asdict().items() if isinstance(value, Tensor)}
        return self._replace(**moved)


def windows_of(samples: list[Sample]) -> Tensor:
    """All true moments of sentences in seconds, [S, M, 2]; padded by repeating the first."""
    most = max((len(sample.others) for sample in samples), default=0)
    rows = []
    for sample in samples:
        moments = sample.moments_sec
        rows.append(moments + moments[:1] * (1 + most - len(moments)))
    return torch.tensor(rows).view(len(samples), 1 + most, 2)


def best_iou(windows_sec: Tensor, durations_sec: Tensor, num_clips: int) -> Tensor:
    """Eq. 7's IoU of every cell with the true moment that it overlaps most: [S, N, N]."""
    maps = [mmn.iou_map(moments_sec, durations_sec, num_clips)
            for moments_sec in windows_sec.unbind(1)]
    return torch.stack(maps).amax(0)


class Videos(Dataset):
    """The videos of a split, each with all its sentences. Features are read when they are needed.

    `samples` (attribute) are the sentences grouped by video; `queries` their (Q, Q^s, Q^d), or
    with `halve` (Q, Q^h, the rest)."""

    def __init__(self, samples: list[Sample], store: FeatureStore, num_clips: int,
                 parser: parse.Parser, patches: bool = False, halve: bool = False,
                 tokenize=clip.tokenize):
        by_video: dict[str, list[Sample]] = {}
        for sample in samples:
            by_video.setdefault(sample.video, []).append(sample)
        self.missing = [name for name in by_video if name not in store]
        self.videos = [name for name in by_video if name in store]
        if patches and not store.manifest["patch_frames"]:
            raise Mistake(f"the features in {store.folder} have no patches, which the spatial "
                          f"dynamics of Eq. 3 need; use --lambda-sd 0, --method mmn or "
                          f"vdi-staged, or make features from the videos")
        if not self.videos:
            raise Mistake(f"none of the {len(by_video)} videos has features in {store.folder}")
        self.lost = sum(len(by_video[name]) for name in self.missing)   # sentences
        self.samples = [sample for name in self.videos for sample in by_video[name]]
        counts = [len(by_video[name]) for name in self.videos]
        self.first = np.cumsum([0] + counts)    # sentences of video i: first[i]:first[i + 1]
        self.store = store
        self.num_clips = num_clips
        self.patches = patches
        sentences = [sample.sentence for sample in self.samples]
        if halve:                               # suppl. Table 5
            self.queries = [parser.halve(sentence) for sentence in sentences]
        else:
            self.queries = parser.split_all(sentences)
        tokens = []                             # of Q, Q^s, Q^d: [S, 77] each
        spoken = []                             # [S] each
        for column in zip(*self.queries):                               # three of S strings
            tokens.append(tokenize(list(column), truncate=True))
            spoken.append([parse.has_word(query) for query in column])
        self.tokens = torch.stack(tokens)                               # [3, S, 77]
        self.spoken = torch.tensor(spoken)                              # [3, S]
        self.windows_sec = windows_of(self.samples)                     # [S, M, 2]
        self.moments_sec = self.windows_sec[:, 0]                       # [S, 2]
        self.durations_sec = torch.tensor([sample.duration_sec for sample in self.samples])

    def __len__(self) -> int:
        return len(self.videos)

    def features(self, i: int, kind: str) -> Tensor:
        x = torch.from_numpy(self.store.read(self.videos[i], kind).astype(np.float32))
        return F.normalize(x, dim=1)                                    # [T, D], [T', D', H, W]

    def __getitem__(self, i: int) -> tuple[int, Tensor, Tensor | None] | VideoError:
        try:
            frames = self.features(i, "frames")                         # [T, D]
            patches = self.features(i, "patches") if self.patches else None     # [T', D', H, W]
            return i, frames, patches
        except VideoError as error:     # a value, because torch rewrites a worker's exception
            return error

    def collate(self, items: list) -> Batch | VideoError:
        some = items or [self[0]]       # no share of a small batch: shapes come from video 0
        for item in some:
            if isinstance(item, VideoError):
                return item
        index = []                              # of each sentence among all
        video_of = []                           # of each sentence among the videos of this batch
        for b, (i, _, _) in enumerate(items):
            own = range(self.first[i], self.first[i + 1])
            index += own
            video_of += [b] * len(own)
        index = torch.tensor(index, dtype=torch.long)                   # [S]
        video_of = torch.tensor(video_of, dtype=torch.long)             # [S]
        frames = torch.stack([frames for _, frames, _ in some])[:len(items)]
        patches = None
        if self.patches:
            patches = torch.stack([patches for _, _, patches in some])[:len(items)]
        iou = best_iou(self.windows_sec[index], self.durations_sec[index], self.num_clips)
        return Batch([self.videos[i] for i, _, _ in items], frames, patches,
                     self.tokens[:, index], self.spoken[:, index], video_of,
                     self.moments_sec[index], self.durations_sec[index], iou, index)

    def batches(self, size: int, generator: torch.Generator | None = None, workers: int = 0,
                device: torch.device | str = "cpu") -> loading.Loader:
        """Batches of `size` videos, on the CPU, for `device`: see loading.batches."""
        return loading.batches(self, self.collate, size, generator, workers, device)


def digest_of(videos: dict[str, Videos]) -> str:
    """A fingerprint of the sentences and features of a run, which resumes only with the same."""
    content = []
    for split, part in videos.items():
        manifest = part.store.manifest
        content.append([split, part.samples, manifest["sha256"],
                        [manifest["videos"][name] for name in part.videos]])
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def training_videos(config, store: FeatureStore, tokenize) -> tuple[dict[str, Videos], str]:
    """The videos of `training_samples` for a train.Config, and the name of the parser.
    `tokenize` as of the text tower."""
    parser = parser_of(config.dataset, config.root, mask=config.mask)
    print(f"parser: {parser.name}")
    samples = training_samples(config.dataset, config.select_on, config.limit_videos, config.root)
    videos = {}
    for split, rows in samples.items():
        patches = split == "train" and config.method == "vdi" and config.lambda_sd != 0
        videos[split] = part = Videos(rows, store, config.num_clips, parser, patches,
                                      config.context_query == "half", tokenize)
        print(f"{split}: {len(part)} videos, {len(part.samples)} sentences")
        if part.missing:
            print(f"{len(part.missing)} videos with {part.lost} sentences have no features and are "
                  f"left out")
    return videos, parser.name


if __name__ == "__main__":
    from extras import prepare
    prepare.main()
