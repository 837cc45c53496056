"""Captions and frame features of whole videos. Shapes: see clip2video/__init__.py.

A dataset is a folder below the root: <split>.captions.json (the captions of each video) and a store
of features. `prepare` makes it from a published dataset, `build_shapes` from a shapes world."""
import csv
import dataclasses
import functools
import json
import pathlib
import pickle
import random
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

import clip
import data
import shapes
import video
from clip2video.model import Config
from extras import features
from support import files, parallel
from support.errors import Mistake, reason


class Split(NamedTuple):
    """V videos with their captions and features. Frames that a video lacks are zeros."""
    videos: list[str]
    captions: list[list[str]]
    frames: Tensor                                                      # [V, L, D]
    mask: Tensor                                                        # [V, L]
    made: dict                                          # how the features were made: video.made_by


def dataset_folder(config: Config) -> pathlib.Path:
    """<root>/<dataset>; the whole videos of shapes are in <root>/shapes-videos."""
    suffix = "-videos" if config.dataset.startswith("shapes") else ""   # shapes/ is train.py's
    return pathlib.Path(config.root) / f"{config.dataset}{suffix}"


def read_split(config: Config, split: str) -> Split:
    """A split from its folder. Mistake for features of another CLIP or of other frames, and for
    videos without features, unless config.allow_missing leaves them out."""
    path = dataset_folder(config) / f"{split}.captions.json"
    if not path.exists():
        raise Mistake(f"{path} does not exist; python -m clip2video prepare makes it (for shapes: "
                      f"train)")
    captions = json.loads(path.read_text(encoding="utf-8"))     # video -> its captions
    store = data.FeatureStore(path.parent / "features" / "clip2video")
    for name in ("clip", "frames", "stride"):
        if store.manifest.get(name) != getattr(config, name):
            raise Mistake(f"the features in {store.folder} were made with --{name} "
                          f"{store.manifest.get(name)}; use that, or remove the folder")
    missing = [name for name in captions if not complete(store, name, config)]
    if missing:
        note = f"{len(missing)} of {len(captions)} videos of {split} have no features"
        if config.train_images:
            note += " or no pixels (prepare --train-images)"
        if not config.allow_missing:
            raise Mistake(f"{note}, for instance {missing[0]}; --allow-missing (of train: "
                          f"--allow-missing true) leaves them out, which makes the task easier")
        print(f"{note} and are left out")
    captions = {name: texts for name, texts in captions.items()
                if complete(store, name, config) and texts}
    if not captions:
        raise Mistake(f"no video in {path} has a caption and features; prepare the dataset again")
    x = torch.stack([torch.from_numpy(store.read(name, "frames")).float() for name in captions])
    mask = (x != 0).any(2)                      # padding frames are zeros, real features never
    return Split(list(captions), list(captions.values()), x, mask, store.manifest)


def candidate_times(duration_sec: float, count: int = 12, stride: int = 2) -> np.ndarray:
    """The instants that jitter draws from, in seconds: every `stride`-th of 5 frames per second
    [code]. Stride 0: the centres of the thirds of `count` equal parts."""
    if not stride:
        third_sec = duration_sec / count / 3
        centres_sec = video.frame_centres(duration_sec, count)
        return np.add.outer(centres_sec, (-third_sec, 0, third_sec)).ravel()    # [3 count]
    # subtle: `stride` divides the number of instants; it is not a step, so that both ends stay
    total = max(1, int(duration_sec * 5.0))
    return np.linspace(0, total - 1, max(1, total // stride)).astype(int) / 5.0


def choose(total: int, count: int, stride: int, draw: random.Random | None = None) -> np.ndarray:
    """Which of a video's `total` candidates become its frames: `count` at equal distances, with
    both ends [code]. Stride 0: the centres of the parts.

    draw    jitters them: any third of its part; else all but the ends by up to half the distance,
            if that half is more than 2 candidates [code]"""
    if not stride:
        thirds = [1] * count                    # the middle one of each part
        if draw:
            thirds = [draw.randrange(3) for _ in range(count)]
        return 3 * np.arange(count) + thirds
    chosen = np.linspace(0, total - 1, min(count, total)).astype(int)
    if draw and len(chosen) > 2:
        half = int(chosen[1] - chosen[0]) // 2
        if half > 2:                            # randrange excludes its upper bound [code]
            chosen[1:-1] += [draw.randrange(-half, half) for _ in chosen[1:-1]]
    return chosen


def encode(model: clip.CLIP, pixels: Tensor, config: Config) -> Tensor:
    """A video's frames, uint8 [n, 3, R, R] -> features [L, D] float16, padded with zeros."""
    x, _ = video.encode_frames(model, pixels, config.frames)
    return F.pad(x, (0, 0, 0, config.frames - len(x)))


def read_file(path: pathlib.Path, config: Config, resolution: int) -> tuple[Tensor, float]:
    """A video file -> the chosen frames, or with config.train_images all candidates,
    uint8 [n, 3, R, R], and its duration in seconds. VideoError if it cannot be read."""
    found = video.inspect(path)
    times_sec = candidate_times(found.duration_sec, config.frames, config.stride)
    if not config.train_images:
        times_sec = times_sec[choose(len(times_sec), config.frames, config.stride)]
    first_sec = 0.0
    step_sec = 0.2                                      # 5 frames per second [code]
    if not config.stride:                               # the centres of thirds of parts
        step_sec = found.duration_sec / config.frames / 3
        first_sec = step_sec / 2
    places = np.round((times_sec - first_sec) / step_sec).astype(int)   # in steps
    wanted = set(places.tolist())
    frames = []
    for place, frame in enumerate(video.frames_every(found, first_sec, step_sec, places[-1] + 1)):
        if place in wanted:
            frames.append(clip.crop(frame[None], resolution))
    return torch.cat(frames), found.duration_sec


def encode_file(model: clip.CLIP, path: pathlib.Path, config: Config) -> Tensor:
    """A video file -> features [L, D] float16, padded with zeros. VideoError if it is damaged."""
    # DEVIATION: features are made once: the image tower stays frozen, frames are not jittered;
    # the authors' way is --train-images
    config = dataclasses.replace(config, train_images=False)            # no candidates
    pixels, _ = read_file(path, config, model.visual.resolution)
    return encode(model, pixels, config)


# ----------------------------------------------------------------- pixels, to train the image tower

def pixel_file(config: Config, name: str) -> pathlib.Path:
    """The candidates of a video, uint8 [total, 3, R, R], beside its features, whose manifest
    records how both were made."""
    return dataset_folder(config) / "features" / "clip2video" / "pixels" / f"{name}.npy"


def save_pixels(config: Config, name: str, pixels: np.ndarray) -> None:
    files.save(pixel_file(config, name), lambda file: np.save(file, pixels))


def read_pixels(config: Config, names: list[str], draw: random.Random | None = None) -> Tensor:
    """The frames of these videos, one after the other, jittered if there is a `draw`: uint8
    [n, 3, R, R]. VideoError if a file is damaged."""
    frames = []
    for name in names:
        try:
            # memory-mapped: reads the chosen frames only
            pixels = np.load(pixel_file(config, name), mmap_mode="r", allow_pickle=False)
            frames.append(pixels[choose(len(pixels), config.frames, config.stride, draw)])
        except Exception as error:  # numpy raises a dozen types for a damaged file
            raise data.VideoError(f"{pixel_file(config, name)} is damaged ({reason(error)}); "
                                  f"remove it and prepare the dataset again") from error
    return torch.from_numpy(np.concatenate(frames))


def complete(store: data.FeatureStore, name: str, config: Config) -> bool:
    """Whether the store has what training on this video needs."""
    return name in store and (not config.train_images or pixel_file(config, name).exists())


def open_store(config: Config, model: clip.CLIP) -> data.FeatureStore:
    """The dataset's store of features, created if need be."""
    digest = clip.sha256(data.clip_file(config.clip, config.root))
    made = video.made_by(model, config.clip, digest, config.frames) | {"stride": config.stride}
    return data.FeatureStore(dataset_folder(config) / "features" / "clip2video", made)


# ------------------------------------------------------------------------------- published datasets

Captions = dict[str, dict[str, list[str]]]                      # split -> video -> its captions


def read_msrvtt(folder: pathlib.Path) -> Captions:
    """MSR-VTT, 9k / 1k-A: MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv."""
    captions: dict[str, list[str]] = {}
    for row in json.loads(files.read_text(folder / "MSRVTT_data.json"))["sentences"]:
        captions.setdefault(row["video_id"], []).append(row["caption"])
    with open(folder / "MSRVTT_train.9k.csv", newline="", encoding="utf-8") as file:
        train = {row["video_id"]: captions[row["video_id"]] for row in csv.DictReader(file)}
    # a video of 1k-A has 20 captions, too, but is tested with the one in this file
    with open(folder / "MSRVTT_JSFUSION_test.csv", newline="", encoding="utf-8") as file:
        test = {row["video_id"]: [row["sentence"]] for row in csv.DictReader(file)}
    return {"train": train, "test": test}


class PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries and strings; a pickle that would call anything is refused."""

    def find_class(self, module, name):
        # subtle: lists and strings have opcodes of their own; only what executes asks for names
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_msvd(folder: pathlib.Path) -> Captions:
    """MSVD: raw-captions.pkl (video -> lists of words), {train,val,test}_list.txt."""
    with open(folder / "raw-captions.pkl", "rb") as file:
        words = PlainUnpickler(file).load()
    splits = {}
    for split in ("train", "val", "test"):
        names = files.read_text(folder / f"{split}_list.txt").split()
        splits[split] = {name: list(map(" ".join, words[name])) for name in names}
    return splits


def read_vatex(folder: pathlib.Path) -> Captions:
    """VATEX: vatex_data.json (video -> {"enCap": [...]}, or the official list of {"videoID",
    "enCap"}), {train,val,test}_list.txt (test: the HGR split), and as `test1k5` the authors' own
    test1k5_sec_list.txt, whose videos are then removed from val."""
    content = json.loads(files.read_text(folder / "vatex_data.json"))
    if isinstance(content, list):
        content = {row["videoID"]: row for row in content}
    lists = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt",
             "test1k5": "test1k5_sec_list.txt"}
    splits = {}
    for split, file in lists.items():
        if (folder / file).exists():
            names = files.read_text(folder / file).split()
            splits[split] = {name: content[name]["enCap"] for name in names}
    # half of the authors' test videos are in the HGR split's val: select on none of them
    for name in splits.get("test1k5", {}):
        splits.get("val", {}).pop(name, None)
    return splits


READERS = {"msrvtt": read_msrvtt, "msvd": read_msvd, "vatex": read_vatex}


def read_published(dataset: str, folder: str | pathlib.Path) -> Captions:
    """All captions, always with a validation split. Mistake for missing or damaged files, and for
    videos that are both in train and in another split."""
    try:
        splits = READERS[dataset](pathlib.Path(folder))
    except Exception as error:  # of a dozen types for a missing or damaged file
        raise Mistake(f"{folder} does not contain the files of {dataset}: "
                      f"{reason(error)}") from error
    if not splits.get("train") or not splits.get("test"):
        raise Mistake(f"{folder} lists no training or no test videos of {dataset}")
    train = splits["train"]
    for split in splits.keys() - {"train"}:
        shared = train.keys() & splits[split].keys()
        if shared:
            raise Mistake(f"{len(shared)} videos are both in train and {split}, for instance "
                          f"{min(shared)}; remove them from one of the lists")
    if not splits.get("val"):
        # DEVIATION: MSR-VTT 9k has no validation split; a seeded tenth of its training videos
        validating = data.held_out(train)
        splits["val"] = {name: train[name] for name in train if name in validating}
        splits["train"] = {name: train[name] for name in train if name not in validating}
    return splits


def prepare(config: Config, annotations: str, videos: str, gelu: bool = False) -> None:
    """Published annotations and a folder of videos -> captions and features below the root, with
    config.train_images also pixels. Can be interrupted: the next call continues. Mistake if a
    folder lacks what it should contain."""
    files.need("imageio_ffmpeg", "reading videos")
    splits = read_published(config.dataset, annotations)
    video_files = files.find_files(videos, video.VIDEOS)        # name -> file
    device = parallel.pick_device(config.device)
    model, _ = features.load_clip(config.clip, config.root, device, gelu)
    store = open_store(config, model)
    paths, failed = {}, {}                      # video -> its file; video -> reason
    for name in sorted(set().union(*splits.values())):  # test and test1k5 share videos
        if complete(store, name, config):       # by an earlier call, which was interrupted
            continue
        if name in video_files:
            paths[name] = video_files[name]
        else:
            failed[name] = f"no video file is named {name}"
    read = functools.partial(read_file, config=config, resolution=model.visual.resolution)

    def write(name: str, decoded: tuple[Tensor, float]) -> None:
        pixels, duration_sec = decoded                                  # [n, 3, R, R]
        if config.train_images:
            save_pixels(config, name, pixels.numpy())
            pixels = pixels[choose(len(pixels), config.frames, config.stride)]
        store.write(name, encode(model, pixels, config), None, duration_sec)

    features.store_all(store, paths, read, write, failed)
    if not store.manifest["videos"]:
        raise Mistake(f"no video of {config.dataset} could be read: {next(iter(failed.values()))}")
    for split, captions in splits.items():
        # unreadable videos are dropped, but from test only with --allow-missing
        kept = {name: texts for name, texts in captions.items()
                if name not in failed or split.startswith("test")}
        files.save(dataset_folder(config) / f"{split}.captions.json", json.dumps(kept))
        print(f"{split}: {len(kept)} videos, {sum(len(texts) for texts in kept.values())} captions")
    if failed:
        print(f"{len(failed)} videos have no features, see {store.folder / 'failed.txt'}")


# ------------------------------------------------------------------- whole videos of a shapes world

FAMILIES = {"train": 400, "val": 50, "test": 100}       # of four videos each
OPPOSITE = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 6}   # of shapes.VERBS; blinking has none


def family(rng: np.random.Generator) -> list[dict]:
    """The scripts of four videos of one scene and the same two actors, each of which acts once: in
    either order, and by their verbs or by the opposites. Nouns do not distinguish them."""
    while True:
        plan = shapes.script("train", rng)
        # the scene and the looks of two actors; what they do is replaced below
        actors = list({(e["colour"], e["shape"]): e for e in plan["events"]}.values())
        verbs = [int(verb) for verb in rng.choice(6, 2, replace=False)]     # that have an opposite
        opposites = [OPPOSITE[verb] for verb in verbs]
        novel = [shapes.held_out(verb, actor["shape"])
                 for verb, actor in zip(verbs + opposites, actors + actors)]
        # two opposite verbs would give all four captions the same set of words
        if opposites[0] != verbs[1] and not any(novel):
            break
    plans = []
    for order in ((0, 1), (1, 0)):
        for motions in (verbs, opposites):
            events = [act(actors[k], motions[k], half, rng) for half, k in enumerate(order)]
            speckle = int(rng.integers(2 ** 31))        # the seed of this video's noise
            plans.append(dict(plan, events=events, speckle=speckle))
    return plans


def act(actor: dict, verb: int, half: int, rng: np.random.Generator) -> dict:
    """An event of shapes.script: an actor's only motion, in the first (0) or second half (1)."""
    # subtle: the order of the draws is that of the stored worlds
    length, available = int(rng.integers(7, 13)), shapes.FRAMES // 2            # in frames
    start = half * available + int(rng.integers(0, available - length - 2)) + 1
    word = shapes.VERBS[verb][rng.integers(2)]  # one of two synonyms
    event = dict(actor, verb=verb, word=word, enter=start - 1, start=start, end=start + length,
                 leave=start + length + 1)
    return event | shapes.course(verb, rng)


def describe(events: list[dict]) -> str:
    """The caption: "the red circle rises, then the blue bar falls"."""
    return ", then ".join(f"the {e['colour']} {e['shape']} {e['word']}" for e in events)


def altered(events: list[dict]) -> dict[str, str]:
    """Two false captions: all verbs replaced by their opposites; the events in reverse order."""
    opposites = []
    for event in events:
        synonym = shapes.VERBS[event["verb"]].index(event["word"])
        opposites.append(dict(event, word=shapes.VERBS[OPPOSITE[event["verb"]]][synonym]))
    return {"direction": describe(opposites), "order": describe(events[::-1])}


def build_shapes(config: Config) -> None:
    """Builds <root>/<dataset>-videos unless it exists: captions, false captions (altered.json) and
    features by the world's small CLIP, with config.train_images also pixels; before that, if need
    be, the world itself."""
    shapes.build(config.dataset, config.root)
    folder, model = dataset_folder(config), clip.load(data.clip_file(config.clip, config.root))
    store = open_store(config, model)
    path = folder / "altered.json"              # is written last
    if path.exists():
        names = json.loads(path.read_text(encoding="utf-8"))
        if not config.train_images or all(pixel_file(config, name).exists() for name in names):
            return
    candidates = candidate_times(shapes.FRAMES, config.frames, config.stride)   # in frame lengths
    chosen = choose(len(candidates), config.frames, config.stride)
    false_captions = {}
    for number, (split, count) in enumerate(FAMILIES.items()):
        captions = {}                           # video -> its only caption
        for i in trange(count, desc=f"whole videos: {split}", disable=None):
            rng = np.random.default_rng([shapes.world_of(config.dataset)[0], 100 + number, i])
            for k, plan in enumerate(family(rng)):
                name = f"{split}-{i:03d}-{k}"
                frames = shapes.film(plan, candidates[chosen])
                if config.train_images:
                    pixels = shapes.film(plan, candidates)
                    pixels[chosen] = frames     # subtle: noise depends on the number of frames
                    save_pixels(config, name, pixels.numpy())
                if name not in store:
                    x, _ = video.encode_frames(model, frames)
                    store.write(name, x, None, shapes.FRAMES * plan["frame_sec"])
                captions[name] = [describe(plan["events"])]
                false_captions[name] = altered(plan["events"])
        files.save(folder / f"{split}.captions.json", json.dumps(captions))
    store.save_manifest()
    files.save(path, json.dumps(false_captions))
