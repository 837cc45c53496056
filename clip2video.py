"""CLIP2Video: which of many videos does a sentence describe? (Fang et al., 2021, arXiv 2106.11097.)

    python clip2video.py train                                  # the shapes world, in minutes
    python clip2video.py ablation --seeds 3                     # what each block brings
    python clip2video.py prepare msrvtt --annotations DIR --videos DIR
    python clip2video.py train --dataset msrvtt --device cuda
    python clip2video.py evaluate runs/clip2video/shapes-both/ckpt.pt
    python clip2video.py index CKPT DIR --out index/            # a folder of videos, or what is new
    python clip2video.py search index/ "a red circle rises"
    python clip2video.py search DIR "a red circle rises" --checkpoint CKPT      # both in one

A video and a sentence become two unit vectors each: a global one, for which the temporal difference
block (TDB) puts what changes between frames among the frames, and an aligned one, for which the
temporal alignment block (TAB) assigns frames and words to shared centres. Similarity is their
weighted sum, which is one dot product of one vector each (`joined`).

It ranks whole videos; moments are mmn.py's work. `retrieve.py search --videos 100` looks for
moments only in the videos that rank best here. Left out: the plain and `sigmoid_mlp` differences of
the release, and the split of the full MSR-VTT.

Shapes: B videos or sentences, L frames, W words, D width of CLIP's joint space, K centres, N tokens
to aggregate. Masks [B, L] are bool, True = there is such a frame. [code] marks what the authors'
released inference code does.
"""
import argparse
import copy
import csv
import dataclasses
import hashlib
import json
import math
import pathlib
import pickle
import random
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm, trange

import clip
import command
import data
import evaluate
import shapes
import train as trainer
import video

HERE = pathlib.Path(__file__).parent
VARIANTS = {"mean": ("mean", False), "transformer": ("transformer", False), "tdb": ("tdb", False),
            "tab": ("transformer", True), "both": ("tdb", True)}
DATASETS = ("msrvtt", "msvd", "vatex")
option = command.option


# ---------------------------------------------------------------------------------------- the model

class Transformer(nn.Module):
    """Pre-norm, not causal, started as the first layers of CLIP's text transformer. [B, N, D]"""

    def __init__(self, text: clip.TextTower, layers: int):
        super().__init__()
        known = text.transformer.resblocks
        self.blocks = nn.ModuleList(copy.deepcopy(known[i % len(known)]) for i in range(layers))
        for block in self.blocks:
            block.ln_1.eps = block.ln_2.eps = 1e-12                     # [code]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # subtle: not -inf, which gives NaN where all keys are hidden: a video without a difference
        hidden = (~mask).to(x.dtype) * -1e6                             # [B, N]
        for block in self.blocks:
            x = block(x, hidden=hidden)
        return x


def interleave(frames: Tensor, differences: Tensor) -> Tensor:
    """f0, d0, f1, d1, ..., f(L-1): [B, L, ...] and [B, L-1, ...] -> [B, 2L-1, ...]."""
    result = frames.new_empty(len(frames), 2 * frames.shape[1] - 1, *frames.shape[2:])
    result[:, 0::2], result[:, 1::2] = frames, differences
    return result


class TemporalDifference(nn.Module):
    """TDB's tokens: the frames, and between every two of them what changes, squashed to (-1, 1); to
    each token its place and its kind are added. One block serves both vectors."""

    def __init__(self, text: clip.TextTower):
        super().__init__()
        places = text.positional_embedding.detach()
        self.places = nn.Parameter(places.clone())                      # P [77, D]
        self.kinds = nn.Parameter(places[:2].clone())                   # T: 1 = frame, 0 = change
        self.attention = Transformer(text, 1)                           # A_d
        self.norm = nn.LayerNorm(places.shape[1])                       # LN_d

    def differences(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """d_i = 2 sigmoid(LN(A_d(f_{i+1} - f_i + P_{i+1}))) - 1, [B, L-1, D], and its mask."""
        L = frames.shape[1]
        # DEVIATION: the release masks a difference by one of its two frames, which lets padding in
        both = mask[:, 1:] & mask[:, :-1]                               # [B, L-1]
        x = frames[:, 1:] - frames[:, :-1] + self.places[1:L]           # place of the later frame
        return 2 * torch.sigmoid(self.norm(self.attention(x, both))) - 1, both

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] -> 2L-1 tokens [B, 2L-1, D] and their mask."""
        L = frames.shape[1]
        if L == 1:                                                      # nothing can change
            return frames + self.places[:1] + self.kinds[1], mask
        differences, both = self.differences(frames, mask)
        # [code]: a difference has the place of the earlier frame here, of the later one above
        places = interleave(self.places[None, :L], self.places[None, :L - 1])[0]
        kinds = self.kinds[(torch.arange(2 * L - 1, device=frames.device) + 1) % 2]
        return interleave(frames, differences) + places + kinds, interleave(mask, both)


class CLIP2Video(nn.Module):
    """Text tower, TDB, TAB. `temporal` and `align` choose a variant: without `align` the similarity
    is the global one alone; TAB has difference tokens where TDB is."""

    def __init__(self, text: clip.TextTower, temporal: str = "tdb", align: bool = True,
                 centres: int = 5, layers: int = 4, scale: float = math.log(100)):
        super().__init__()
        if text.positional_embedding.shape[1] != text.text_projection.shape[1]:
            raise ValueError("CLIP2Video starts from text layers that are as wide as the joint "
                             "space; this CLIP's are not")
        D = text.text_projection.shape[1]
        self.text, self.temporal, self.align = text, temporal, align
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        if temporal == "tdb":
            self.difference = TemporalDifference(text)
        elif temporal == "transformer":
            self.places = nn.Parameter(text.positional_embedding.detach().clone())
        if temporal != "mean":
            self.transformer = Transformer(text, layers)                # A_t
        if align and temporal == "mean":
            raise ValueError("TAB comes with the temporal transformer, or with TDB")
        if align:
            self.coarse = Transformer(text, 1)                          # A_c
            self.assign = nn.Parameter(torch.randn(centres, D) * 0.125)         # W_c
            self.centres = nn.Parameter(torch.randn(centres, D) * 0.125)        # C

    def encode_video(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """CLIP's features [B, L, D], not normalised, and which are there [B, L] -> unit vectors
        v_g, v_a [B, D] (v_a is None without TAB). ValueError for a video without a frame."""
        if not mask.any(1).all():
            raise ValueError("a video has no frame; leave it out")
        frames = frames * mask[..., None]                               # whatever padding holds
        x = frames if self.temporal == "mean" else self.in_time(self.transformer, frames, mask)
        overall = F.normalize(masked_mean(F.normalize(x, dim=2), mask), dim=1)  # [B, D]
        if not self.align:
            return overall, None
        # a lower frame rate; [code] numbers its places from 0 again
        half, half_mask = frames[:, 0::2], mask[:, 0::2]                # [B, L/2, D]
        coarse = self.in_time(self.coarse, half, half_mask)
        return overall, self.aggregate(torch.cat([frames, coarse], 1),
                                       torch.cat([mask, half_mask], 1))

    def in_time(self, transformer: Transformer, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames that have seen each other, and with TDB what changes between them: [B, L, D]."""
        if self.temporal == "transformer":
            return transformer(frames + self.places[:frames.shape[1]], mask) + frames
        tokens, present = self.difference(frames, mask)                 # [B, 2L-1, D]
        return transformer(tokens, present)[:, 0::2] + frames           # differences: context only

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, W], padded with 0 -> unit vectors t_g (of the end token), t_a [B, D]."""
        end = ids.argmax(1)                                     # the end token has the largest id
        h = self.text.ln_final(self.text.states(ids)) @ self.text.text_projection       # [B, W, D]
        overall = F.normalize(h[torch.arange(len(h), device=h.device), end], dim=1)
        if not self.align:
            return overall, None
        place = torch.arange(ids.shape[1], device=ids.device)
        words = (place > 0) & (place <= end[:, None])                   # not the start token [code]
        return overall, self.aggregate(h, words)

    def aggregate(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Each token goes to the centres that it is like; a centre keeps what its tokens are beyond
        it; the mean over the centres. [B, N, D], [B, N] -> unit [B, D]."""
        share = torch.softmax(tokens @ self.assign.T, 2) * mask[..., None]      # [B, N, K]
        beyond = torch.einsum("bnk,bnd->bkd", share, tokens) \
            - share.sum(1)[..., None] * self.centres                    # [B, K, D]
        return F.normalize(F.normalize(beyond, dim=2).mean(1), dim=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def joined(overall: Tensor, aligned: Tensor | None, weight: float = 0.5) -> Tensor:
    """One unit vector [B, 2D] whose dot products are w S_g + (1-w) S_a (without the scale)."""
    if aligned is None:
        return overall
    return torch.cat([weight ** 0.5 * overall, (1 - weight) ** 0.5 * aligned], 1)


def logits(texts: tuple, videos: tuple, scale: Tensor) -> list[Tensor]:
    """S = exp(scale) t v^T for each kind of vector: [texts, videos]."""
    return [scale.exp() * t @ v.T for t, v in zip(texts, videos) if t is not None]


def symmetric_loss(similarity: Tensor) -> Tensor:
    """L_sym(S) = (CE(S) + CE(S^T)) / 2, the pairs on the diagonal. [B, B] -> []"""
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def loss(similarities: list[Tensor], weight: float = 0.5) -> Tensor:
    """L = w L_sym(S_g) + (1-w) L_sym(S_a); L_sym(S_g) alone without TAB."""
    each = [symmetric_loss(s) for s in similarities]
    return each[0] if len(each) == 1 else weight * each[0] + (1 - weight) * each[1]


# ------------------------------------------------------------------------------------------ metrics

def ranks(similarity: Tensor, target: Tensor) -> Tensor:
    """Rank of column target[i] in row i: 1 + those that score more + half of those that score the
    same. [Q, C], [Q] -> [Q]. FloatingPointError for a score that is no number."""
    if not torch.isfinite(similarity).all():
        raise FloatingPointError("a score is not finite, so that nothing can be ranked")
    own = similarity.gather(1, target[:, None])                         # [Q, 1]
    return 1 + (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2


def summary(rank: Tensor) -> dict[str, float]:
    rank = rank.double()
    return {**{f"R@{k}": 100 * (rank <= k).double().mean().item() for k in (1, 5, 10)},
            "MedR": rank.quantile(0.5).item(), "MnR": rank.mean().item()}


def retrieval_metrics(similarity: Tensor, video_of: Tensor | None = None) -> dict[str, float]:
    """Text to video and video to text: R@1, R@5, R@10, median and mean rank.

    similarity  [texts, videos]
    video_of    [texts], the video of each text (default: text i is of video i). With several texts
                a video, every text is a query for videos; and a video ranks the videos' groups of
                texts by the best text of each
    """
    T, V = similarity.shape
    video_of = torch.arange(T) if video_of is None else video_of
    if len(video_of) != T or not set(range(V)) <= set(video_of.tolist()):
        raise ValueError(f"{T} texts, {len(video_of)} of them with a video, do not cover {V} "
                         f"videos")
    groups = torch.full((V, V), -math.inf).to(similarity).scatter_reduce(
        0, video_of[:, None].expand(T, V), similarity, "amax")          # [group, video]
    directions = {"t2v": ranks(similarity, video_of), "v2t": ranks(groups.T, torch.arange(V))}
    return {f"{direction} {name}": value for direction, rank in directions.items()
            for name, value in summary(rank).items()}


# ----------------------------------------------------------------------------------------- the data

@dataclasses.dataclass
class Split:
    """Videos with their captions; features are read when asked for."""
    videos: list[str]
    captions: list[list[str]]
    store: video.FeatureStore

    def features(self) -> tuple[Tensor, Tensor]:
        """[V, L, D] and which frames are there [V, L]: those that are not are stored as zeros."""
        x = torch.stack([torch.from_numpy(self.store.read(name, "frames").astype(np.float32))
                         for name in self.videos])
        return x, (x != 0).any(2)


def read_split(config: "Config", split: str, root: str, allow_missing: bool = False) -> Split:
    """A split of a dataset that `prepare` or `build_shapes` made. Features of another CLIP or
    another number of frames, and videos without any, are an error."""
    shapes_world = config.dataset.startswith("shapes")
    folder = pathlib.Path(root) / (f"{config.dataset}-videos" if shapes_world else config.dataset)
    path = folder / f"{split}.captions.json"
    if not path.exists():
        how = "train" if shapes_world else f"prepare {config.dataset} (see --help)"
        raise FileNotFoundError(f"there is no {path}; it is made by: python clip2video.py {how}")
    captions = json.loads(path.read_text())
    store = video.FeatureStore(folder / "features" / "clip2video")
    for name, value in (("clip", config.clip), ("frames", config.frames),
                        ("stride", config.stride)):
        if store.manifest.get(name) != value:
            raise ValueError(f"the features in {store.folder} were made with {name} "
                             f"{store.manifest.get(name)!r}, not {value!r}; take that, or remove "
                             f"the folder to make them anew")
    missing = [name for name in captions if name not in store]
    if missing and not allow_missing:
        raise FileNotFoundError(f"{len(missing)} of {len(captions)} videos of {split} have no "
                                f"features, for instance {missing[0]}; --allow-missing (in train: "
                                f"--allow-missing true) goes on with a smaller gallery")
    if missing:
        print(f"{split}: without {len(missing)} of {len(captions)} videos, which have no features")
    captions = {name: texts for name, texts in captions.items() if name in store and texts}
    if not captions:
        raise FileNotFoundError(f"no video of {path} has features")
    return Split(list(captions), list(captions.values()), store)


def sample_times(config: "Config", duration_sec: float) -> np.ndarray:
    """Where a video is looked at: `frame_times`; with a stride of 0, centres of equal parts."""
    if not config.stride:
        return video.frame_centres(duration_sec, config.frames)
    return frame_times(duration_sec, config.frames, config.stride)


def frame_times(duration_sec: float, count: int = 12, stride: int = 2,
                rate: float = 5.0) -> np.ndarray:
    """The instants of at most `count` frames: of those at 5 a second every `stride`-th, and of
    these `count` that are evenly apart, first and last included [code]."""
    total = max(1, int(duration_sec * rate))
    first = np.linspace(0, total - 1, max(1, total // stride)).astype(int)
    if len(first) > count:
        first = first[np.linspace(0, len(first) - 1, count).astype(int)]
    return first / rate


def encode_file(model: clip.CLIP, path: pathlib.Path, config: "Config") -> Tensor:
    """A video file -> features [L, D] float16; the frames that a short one lacks are zeros."""
    # DEVIATION: features are made once: the image tower stays frozen, frames are not jittered
    times_sec = sample_times(config, video.probe_duration(path))
    pixels = torch.cat([clip.crop(frame[None], model.visual.resolution)
                        for frame in video.frames_at(path, times_sec)])
    x, _ = video.encode_frames(model, pixels, config.frames)
    return F.pad(x, (0, 0, 0, config.frames - len(x)))


def read_msrvtt(folder: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """MSR-VTT, 9k / 1k-A: MSRVTT_data.json, MSRVTT_train.9k.csv, MSRVTT_JSFUSION_test.csv."""
    captions: dict[str, list[str]] = {}
    for row in json.loads((folder / "MSRVTT_data.json").read_text())["sentences"]:
        captions.setdefault(row["video_id"], []).append(row["caption"])
    with open(folder / "MSRVTT_train.9k.csv", newline="") as file:
        names = [row["video_id"] for row in csv.DictReader(file)]
    with open(folder / "MSRVTT_JSFUSION_test.csv", newline="") as file:
        test = {row["video_id"]: [row["sentence"]] for row in csv.DictReader(file)}
    return {"train": {name: captions[name] for name in names}, "test": test}


class Plain(pickle.Unpickler):
    """Reads lists, dictionaries and strings; anything that would be called is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_msvd(folder: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """MSVD: raw-captions.pkl (video -> lists of words), {train,val,test}_list.txt."""
    with open(folder / "raw-captions.pkl", "rb") as file:
        captions = {name: [" ".join(words) for words in sentences]
                    for name, sentences in Plain(file).load().items()}
    names = {split: (folder / f"{split}_list.txt").read_text().split()
             for split in ("train", "val", "test")}
    return {split: {name: captions[name] for name in part} for split, part in names.items()}


def read_vatex(folder: pathlib.Path) -> dict[str, dict[str, list[str]]]:
    """VATEX: vatex_data.json (video -> {"enCap": [...]}, or the official list of {"videoID",
    "enCap"}), {train,val,test}_list.txt (test: the HGR split), and as `test1k5` the authors' own
    test1k5_sec_list.txt, whose videos are then not validated on."""
    content = json.loads((folder / "vatex_data.json").read_text())
    if isinstance(content, list):
        content = {row["videoID"]: row for row in content}
    files = {"train": "train_list.txt", "val": "val_list.txt", "test": "test_list.txt",
             "test1k5": "test1k5_sec_list.txt"}
    splits = {split: {name: content[name]["enCap"] for name in (folder / file).read_text().split()}
              for split, file in files.items() if (folder / file).exists()}
    for name in splits.get("test1k5", {}):
        splits.get("val", {}).pop(name, None)
    return splits


def prepare(dataset: str, folder: str, videos: str, options: argparse.Namespace) -> None:
    """Published files and a folder of videos -> captions and features below the root."""
    source = pathlib.Path(folder)
    try:
        splits = {"msrvtt": read_msrvtt, "msvd": read_msvd, "vatex": read_vatex}[dataset](source)
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, pickle.UnpicklingError) as e:
        raise ValueError(f"the files in {folder} are not those of {dataset}: {type(e).__name__} "
                         f"{e}") from e
    if not splits.get("train") or not splits.get("test"):
        raise ValueError(f"{folder} has no list of the training or of the test videos of {dataset}")
    for split in splits.keys() - {"train"}:
        if shared := splits["train"].keys() & splits[split].keys():
            raise ValueError(f"{len(shared)} videos are both in train and {split}, for instance "
                             f"{min(shared)}")
    if not splits.get("val"):
        # DEVIATION: MSR-VTT 9k has no validation split; a seeded tenth of its training videos
        held = data.held_out(splits["train"])
        splits["val"] = {k: v for k, v in splits["train"].items() if k in held}
        splits["train"] = {k: v for k, v in splits["train"].items() if k not in held}
    config = configure(dataset=dataset, **({"clip": options.clip} if options.clip else {}))
    files, failed = data.find_files(videos, data.VIDEOS), {}
    if not files:
        raise FileNotFoundError(f"{videos} holds no video")
    model = clip.load(config.clip, data.pick_device(options.device))
    target = pathlib.Path(options.root) / dataset
    store = video.FeatureStore(target / "features" / "clip2video",
                               made_with(config, model, options.root))
    for name in tqdm(sorted({name for part in splits.values() for name in part}), desc="features"):
        if name in store:
            continue
        try:
            if name not in files:
                raise video.VideoError(f"there is no video file named {name}")
            store.write(name, encode_file(model, files[name], config), None,
                        video.probe_duration(files[name]))
        except video.VideoError as error:       # a video that is broken trains nothing, and is told
            failed[name] = str(error)
    store.save_manifest()
    store.save_failed(failed)
    if not store.manifest["videos"]:
        raise ValueError(f"not one video of {dataset} could be read, for instance "
                         f"{next(iter(failed.values()))}")
    for split, captions in splits.items():
        kept = {name: texts for name, texts in captions.items()
                if name not in failed or split.startswith("test")}
        command.save(target / f"{split}.captions.json", json.dumps(kept))
        print(f"{split}: {len(kept)} videos, {sum(map(len, kept.values()))} captions")
    if failed:
        print(f"{len(failed)} videos have no features, see {store.folder / 'failed.txt'}")


def made_with(config: "Config", model: clip.CLIP, root: str) -> dict:
    """What a store of features says of how they were made."""
    return video.made_by(model, config.clip, clip.sha256(data.clip_file(config.clip, root)),
                         config.frames) | {"stride": config.stride}


# --------------------------------------------------------------------------- whole videos of shapes

FAMILIES = {"train": 400, "val": 50, "test": 100}       # of four videos each
OPPOSITE = {0: 1, 1: 0, 2: 3, 3: 2, 4: 5, 5: 4, 6: 6}   # of shapes.VERBS; blinking has none


def family(rng: np.random.Generator) -> list[dict]:
    """Four videos of one scene and the same two actors, of which each acts once: in this order and
    in the other, by these verbs and by their opposites. Nouns do not tell them apart."""
    while True:
        plan = shapes.script("train", rng)
        actors = list({(e["colour"], e["shape"]): e for e in plan["events"]}.values())
        verbs = [int(verb) for verb in rng.choice(6, 2, replace=False)]     # that have an opposite
        if OPPOSITE[verbs[0]] != verbs[1] and not any(
                shapes.held_out(verb, actor["shape"]) for v, actor in zip(verbs, actors)
                for verb in (v, OPPOSITE[v])):
            break
    videos = []
    for order in ((0, 1), (1, 0)):
        for turned in (False, True):
            events, clock, room = [], 0, shapes.FRAMES // 2
            for k in order:
                verb = OPPOSITE[verbs[k]] if turned else verbs[k]
                length = int(rng.integers(7, 13))
                start = clock + int(rng.integers(0, room - length - 2)) + 1
                events.append({**actors[k], "verb": verb,
                               "word": shapes.VERBS[verb][rng.integers(2)], "enter": start - 1,
                               "start": start, "end": start + length, "leave": start + length + 1,
                               **shapes.course(verb, rng)})
                clock += room
            videos.append({**plan, "events": events, "speckle": int(rng.integers(2 ** 31))})
    return videos


def describe(events: list[dict]) -> str:
    return ", then ".join(f"the {e['colour']} {e['shape']} {e['word']}" for e in events)


def altered(events: list[dict]) -> dict[str, str]:
    """The caption with every verb turned into its opposite, and with the events' order turned."""
    turned = [{**e, "word": shapes.VERBS[OPPOSITE[e["verb"]]][
        shapes.VERBS[e["verb"]].index(e["word"])]} for e in events]
    return {"direction": describe(turned), "order": describe(events[::-1])}


def build_shapes(config: "Config") -> None:
    """<root>/<dataset>-videos: captions, altered ones, and features by the world's small CLIP."""
    dataset, root = config.dataset, config.root
    shapes.build(dataset, root)
    target = pathlib.Path(root) / f"{dataset}-videos"
    model = clip.load(data.clip_file(config.clip, root))
    store = video.FeatureStore(target / "features" / "clip2video", made_with(config, model, root))
    if (target / "altered.json").exists():
        return
    instants, changed = sample_times(config, shapes.FRAMES), {}
    for part, (split, count) in enumerate(FAMILIES.items()):
        captions = {}
        for i in trange(count, desc=f"whole videos: {split}", disable=None):
            plans = family(np.random.default_rng([shapes.seed_of(dataset), 100 + part, i]))
            for k, plan in enumerate(plans):
                name = f"{split}-{i:03d}-{k}"
                store.write(name, video.encode_frames(model, shapes.film(plan, instants))[0], None,
                            shapes.FRAMES * plan["frame_sec"])
                captions[name] = [describe(plan["events"])]
                changed[name] = altered(plan["events"])
        command.save(target / f"{split}.captions.json", json.dumps(captions))
    store.save_manifest()
    command.save(target / "altered.json", json.dumps(changed))


# ----------------------------------------------------------------------------------------- training

@dataclasses.dataclass(frozen=True)
class Config:
    """All there is to choose. Defaults: MSR-VTT 9k, and CLIP4Clip's training, as published."""
    dataset: str = option("shapes", "shapes, shapes-1, ..., msrvtt, msvd or vatex")
    variant: str = option("both", "which blocks there are", tuple(VARIANTS))
    seed: int = option(42, "of weights and of the order of videos")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    root: str = option("data", "folder of datasets")
    out: str = option("", "folder of the run (empty: runs/clip2video/<dataset>-<variant>)")
    clip: str = option("ViT-B/32", "CLIP that made the features")
    frames: int = option(12, "L, frames of a video", least=1)
    words: int = option(32, "W, tokens of a sentence, with start and end", least=3)
    stride: int = option(2, "of the frames at 5 a second; 0: the centres of equal parts", least=0)
    allow_missing: bool = option(False, "true: go on without the videos that have no features")
    centres: int = option(5, "K", least=1)
    layers: int = option(4, "of the temporal transformer", least=1)
    weight: float = option(0.5, "w, of the global similarity; the aligned one has 1 - w")
    batch: int = option(128, "videos in a batch", least=1)
    together: int = option(1, "so many neighbours in the list are drawn together", least=1)
    epochs: int = option(5, "passes over all captions", least=1)
    lr: float = option(1e-4, "learning rate of the new modules")
    # DEVIATION: 1e-7 moves nothing in float32; in the authors' float16 it acted as a far larger one
    text_lr: float = option(1e-6, "learning rate of the text tower")
    weight_decay: float = option(0.2, "of AdamW, but for biases")

    def __post_init__(self):
        command.check_options(self)
        if not 0 <= self.weight <= 1:
            raise ValueError(f"--weight is between 0 and 1, not {self.weight}")
        if max(self.frames, self.words) > 77:
            raise ValueError("--frames and --words are at most 77, the places that CLIP has")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.out or f"runs/clip2video/{self.dataset}-{self.variant}")


PRESETS = {
    "msrvtt": {}, "msvd": dict(stride=1), "vatex": dict(stride=1, centres=7, epochs=23),
    # python clip2video.py train      two cores, two minutes
    "shapes": dict(clip="shapes", seed=0, frames=16, stride=0, words=40, layers=2, batch=64,
                   together=4, epochs=30, lr=1e-3, text_lr=1e-3, weight_decay=0.02)}


def preset(dataset: str) -> dict:
    family = "shapes" if dataset.startswith("shapes") else dataset
    if family not in PRESETS:
        raise ValueError(f"--dataset is shapes, shapes-1, ..., or one of {', '.join(DATASETS)}, "
                         f"not {dataset!r}")
    return PRESETS[family] | ({"clip": dataset} if family == "shapes" else {})


def configure(**given) -> Config:
    """What is given; else the preset of the dataset; else the defaults."""
    return Config(**preset(given.get("dataset", "shapes")) | given)


def build(config: Config) -> CLIP2Video:
    state = clip.read_state(data.clip_file(config.clip, config.root))
    scale = float(state.get("logit_scale", math.log(100)))
    return CLIP2Video(clip.build_text(state), *VARIANTS[config.variant], config.centres,
                      config.layers, min(scale, math.log(100)))


@torch.no_grad()
def vectors(model: CLIP2Video, part: Split, config: Config, device: torch.device
            ) -> tuple[Tensor, Tensor, Tensor]:
    """Joined vectors of all captions [T, 2D] and videos [V, 2D], and the video of each caption."""
    frames, mask = part.features()
    of = torch.tensor([v for v, texts in enumerate(part.captions) for _ in texts])
    ids = clip.tokenize([text for texts in part.captions for text in texts], config.words, True)
    model.eval()
    texts = [joined(*model.encode_text(x.to(device)), config.weight) for x in ids.split(256)]
    videos = [joined(*model.encode_video(x.to(device), m.to(device)), config.weight)
              for x, m in zip(frames.split(256), mask.split(256))]
    return torch.cat(texts).cpu(), torch.cat(videos).cpu(), of


def train(config: Config, resume: bool = False) -> dict:
    """Trains on `train`, keeps the epoch best in t2v R@1 on `val`, returns metrics of `test`."""
    with command.locked(config.folder, resume):
        if config.dataset.startswith("shapes"):
            build_shapes(config)
        with command.Signals() as signals:
            return loop(config, resume, signals)


def loop(config: Config, resume: bool, signals: command.Signals) -> dict:
    """The whole of `train`."""
    device, folder = data.pick_device(config.device), config.folder
    # the test videos are not looked at before the end, but should they be missing, it is told now
    parts = {split: read_split(config, split, config.root, config.allow_missing)
             for split in ("train", "val", "test")}
    frames, mask = parts["train"].features()
    torch.manual_seed(config.seed)
    model = build(config).to(device)
    groups = [{"params": [p for name, p in model.named_parameters()
                          if name.startswith("text.") == tower and name.endswith("bias") == bias],
               "base": config.text_lr if tower else config.lr,
               "weight_decay": 0.0 if bias else config.weight_decay}
              for tower in (True, False) for bias in (True, False)]
    # DEVIATION: AdamW corrects the bias of its moments, the BertAdam of CLIP4Clip does not
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)
    # an epoch sees as many pairs as there are captions: each video once in each of its passes
    passes = max(1, round(sum(map(len, parts["train"].captions)) / len(frames)))
    steps = passes * math.ceil(len(frames) / config.batch)
    print(f"{len(frames)} training videos, {passes} captions each, {steps} steps an epoch")
    history, first, digest = [], 0, parts["train"].store.manifest["sha256"]
    if resume and (folder / "last.pt").exists():
        saved = clip.read_torch(folder / "last.pt")
        trainer.same_configuration(saved["config"], config)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        history, first = saved["history"], saved["epoch"]
        print(f"continuing after epoch {first}")
    for epoch in range(first, config.epochs):
        draw = random.Random(1_000_003 * config.seed + epoch)
        neighbours, batches = range(0, len(frames), config.together), []
        for _ in range(passes):
            order = torch.tensor([v for start in draw.sample(neighbours, len(neighbours))
                                  for v in range(start, min(start + config.together, len(frames)))])
            batches += order.split(config.batch)
        model.train()
        total = 0.0
        for step, chosen in enumerate(tqdm(batches, desc=f"epoch {epoch + 1}", leave=False,
                                           disable=None)):
            x = (epoch + step / steps) / config.epochs
            rate = x / 0.1 if x < 0.1 else 0.5 * (1 + math.cos(math.pi * x))
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate
            # one caption of each video: no video has two in a batch, which would be wrong pairs
            texts = [draw.choice(parts["train"].captions[v]) for v in chosen.tolist()]
            ids = clip.tokenize(texts, config.words, True).to(device)
            similarities = logits(model.encode_text(ids), model.encode_video(
                frames[chosen].to(device), mask[chosen].to(device)), model.logit_scale)
            value = loss(similarities, config.weight)
            if not torch.isfinite(value):
                raise FloatingPointError(f"the loss is {value.item()} in epoch {epoch + 1}")
            optimiser.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for p in model.parameters():                    # and each by itself, as CLIP4Clip
                nn.utils.clip_grad_norm_(p, 1.0)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=math.log(100))
            total += value.item() / steps
            if signals.received:
                raise command.Stopped(f"stopped in epoch {epoch + 1}; --resume goes on after "
                                      f"epoch {epoch}", signals.received)
        texts, videos, of = vectors(model, parts["val"], config, device)
        row = {"epoch": epoch + 1, "loss": total, **retrieval_metrics(texts @ videos.T, of)}
        history.append(row)
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        best = max(history, key=lambda row: row["t2v R@1"])
        common = {"config": dataclasses.asdict(config), "epoch": epoch + 1, "history": history,
                  "model": model.state_dict(), "clip_sha256": digest}
        if best is row:
            trainer.save(folder / "ckpt.pt", common | {"versions": trainer.versions()})
        trainer.save(folder / "last.pt", common | {"optimiser": optimiser.state_dict()})
        if signals.received:
            raise command.Stopped(f"stopped after epoch {epoch + 1}; go on with --resume",
                                  signals.received)
    results = evaluate_checkpoint(folder / "ckpt.pt", config.root, device)
    command.save(folder / "results.json", json.dumps(results, indent=1))
    return results


def load(path: str | pathlib.Path, root: str | None = None) -> tuple[CLIP2Video, Config]:
    """A checkpoint of `train`. ValueError for another file."""
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; python clip2video.py train makes "
                                f"one")
    saved = clip.read_torch(path)
    try:
        config = Config(**saved["config"] | ({"root": root} if root else {}))
        text = {key.removeprefix("text."): value for key, value in saved["model"].items()
                if key.startswith("text.")}
        model = CLIP2Video(clip.build_text(text), *VARIANTS[config.variant], config.centres,
                           config.layers)
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a checkpoint of clip2video.py: "
                         f"{command.told(error)}") from error
    return model.eval(), config


@torch.no_grad()
def evaluate_checkpoint(path: str | pathlib.Path, root: str | None, device: torch.device,
                        split: str = "test", allow_missing: bool | None = None) -> dict:
    """Metrics on the videos of a split; in the shapes world also how often a video prefers its
    caption to one that differs only in the direction, or the order, of events (chance: 50)."""
    model, config = load(path, root)
    allow_missing = config.allow_missing if allow_missing is None else allow_missing
    model, part = model.to(device), read_split(config, split, config.root, allow_missing)
    if part.store.manifest["sha256"] != clip.read_torch(path)["clip_sha256"]:
        raise ValueError(f"the features in {part.store.folder} come from another CLIP than this "
                         f"checkpoint was trained with")
    texts, videos, of = vectors(model, part, config, device)
    results = {"videos": len(videos), "captions": len(texts),
               **retrieval_metrics(texts @ videos.T, of)}
    changed = part.store.folder.parent.parent / "altered.json"
    if changed.exists():
        others = json.loads(changed.read_text())
        for kind in ("direction", "order"):
            ids = clip.tokenize([others[name][kind] for name in part.videos], config.words, True)
            other = joined(*model.encode_text(ids.to(device)), config.weight).cpu()
            ahead = (texts * videos).sum(1) - (other * videos).sum(1)
            results[f"{kind} told, %"] = 100 * ((ahead > 0).double().mean()
                                                + (ahead == 0).double().mean() / 2).item()
    return results


# ----------------------------------------------------------------------------------------- ablation

def ablation(seeds: int, root: str, device: str, only_kept: bool = False) -> dict[str, list[dict]]:
    """Variant -> results of each seed (worlds and training seeds 0, 1, ...). Those not kept in
    results/clip2video/ are run, or left out if `only_kept`."""
    found = {}
    for variant in VARIANTS:
        for seed in range(seeds):
            world = f"shapes-{seed}" if seed else "shapes"
            config = configure(dataset=world, variant=variant, seed=seed, root=root, device=device)
            path = HERE / "results" / "clip2video" / f"{variant}-{seed}.json"
            kept = {k: v for k, v in dataclasses.asdict(config).items()
                    if k not in ("root", "device", "out")}
            if not path.exists() or json.loads(path.read_text())["config"] != kept:
                if only_kept:
                    continue
                started = time.time()
                results = train(config, resume=config.folder.exists())
                content = {"config": kept, "results": results, "versions": trainer.versions(),
                           "minutes": round((time.time() - started) / 60, 2)}
                command.save(path, json.dumps(content, indent=1) + "\n")
            found.setdefault(variant, []).append(json.loads(path.read_text())["results"])
    return found


def ablation_table(found: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over seeds."""
    names = {"mean": "mean pooling", "transformer": "temporal transformer", "tdb": "+ TDB",
             "tab": "+ TAB", "both": "+ TDB + TAB"}
    columns = ("t2v R@1", "t2v R@5", "t2v MedR", "v2t R@1", "direction told, %", "order told, %")
    rows = [[names[variant], *(evaluate.mean_and_deviation([r[column] for r in results])
                               for column in columns)] for variant, results in found.items()]
    counts = sorted({len(results) for results in found.values()})
    return (f"{evaluate.markdown(['', *columns], rows)}\n\n{' to '.join(map(str, counts))} seeds.")


# ------------------------------------------------------------------------------- a folder of videos

def update_index(checkpoint: str, folder: str, out: str | pathlib.Path, device: torch.device,
                 root: str | None = None) -> dict[str, str]:
    """Brings <out>/clip2video.npz in step with a folder of videos: names [V], joined vectors
    [V, 2D], size and time of change of each file [V, 2]. What is new or changed is read, what is
    gone is dropped; kept once a minute. Prints and returns file -> reason of what is unreadable."""
    model, config = load(checkpoint, root)
    files = data.video_files(folder)
    if not files:
        raise FileNotFoundError(f"{folder} holds no video")
    known = {}
    if (pathlib.Path(out) / "clip2video.npz").exists():
        ranker = Ranker(out, checkpoint=checkpoint)
        if ranker.sha256 != clip.sha256(checkpoint):
            raise ValueError(f"{out} was made with another checkpoint, {ranker.checkpoint}; choose "
                             f"another --out")
        known = {name: (row, about) for name, row, about in zip(
            ranker.names, ranker.vectors, ranker.about.tolist()) if name in files}
    path = data.clip_file(config.clip, config.root)
    images = clip.load(path, device)
    if clip.sha256(path) != clip.read_torch(checkpoint)["clip_sha256"]:
        raise ValueError(f"{path} is not the CLIP that made the features of the training")
    model, failed, saved = model.to(device), {}, time.monotonic()
    for name, file in tqdm(files.items(), desc="index", unit="video", disable=None):
        about = list(data.state_of(file).values())
        if name in known and known[name][1] == about:
            continue
        try:
            x = encode_file(images, file, config).float()[None].to(device)
            with torch.no_grad():
                row = joined(*model.encode_video(x, (x != 0).any(2)), config.weight)[0].cpu()
            known[name] = row, about
        except video.VideoError as error:
            known.pop(name, None)
            failed[name] = str(error)
            tqdm.write(command.printable(f"failed: {name}: {error}"))
        if time.monotonic() - saved > 60:
            save_vectors(out, checkpoint, known)
            saved = time.monotonic()
    if not known:
        raise ValueError(f"not one of {len(files)} videos could be read: "
                         f"{next(iter(failed.values()))}")
    save_vectors(out, checkpoint, known)
    return failed


def save_vectors(out: str | pathlib.Path, checkpoint: str | pathlib.Path,
                 known: dict[str, tuple[Tensor, list[int]]]) -> None:
    """Name -> (vector [2D], [size, time of change]) to <out>/clip2video.npz."""
    command.save(pathlib.Path(out) / "clip2video.npz", lambda file: np.savez(
        file, names=np.array(list(known)), sha256=clip.sha256(checkpoint),
        vectors=torch.stack([row for row, _ in known.values()]).numpy(),
        about=np.array([about for _, about in known.values()]),
        checkpoint=str(pathlib.Path(checkpoint).resolve())))


class Ranker:
    """An index of whole videos: `best(sentences, count)` are those that fit best."""

    def __init__(self, folder: str | pathlib.Path, device: torch.device | str = "cpu",
                 root: str | None = None, checkpoint: str | None = None):
        path = pathlib.Path(folder) / "clip2video.npz"
        if not path.exists():
            raise FileNotFoundError(f"{folder} has no vectors of whole videos; make them with: "
                                    f"python clip2video.py index CKPT DIR --out {folder}")
        try:
            with np.load(path, allow_pickle=False) as file:
                self.names, self.about = file["names"].tolist(), file["about"]
                self.vectors = torch.from_numpy(file["vectors"])
                self.checkpoint, self.sha256 = str(file["checkpoint"]), str(file["sha256"])
        except Exception as error:  # a dozen kinds for a damaged or a hostile file
            raise ValueError(f"{path} is damaged ({error}); remove it and index again") from error
        if checkpoint and clip.sha256(checkpoint) == self.sha256:       # its file may have moved
            self.checkpoint = str(checkpoint)
        if not pathlib.Path(self.checkpoint).exists() \
                or clip.sha256(self.checkpoint) != self.sha256:
            raise FileNotFoundError(f"the checkpoint of this index is gone or has changed: "
                                    f"{self.checkpoint}")
        self.model, self.config = load(self.checkpoint, root)
        self.device = torch.device(device)
        self.model.to(self.device)

    @torch.no_grad()
    def best(self, sentences: list[str], count: int) -> list[list[tuple[str, float]]]:
        """For each sentence (video, score), best first: one dot product a video."""
        if count < 1:
            raise ValueError("the number of answers is at least 1")
        if not all(sentence.strip() for sentence in sentences):
            raise ValueError("a sentence is empty; say what to look for")
        ids = clip.tokenize(sentences, self.config.words, True).to(self.device)
        texts = joined(*self.model.encode_text(ids), self.config.weight).cpu()
        scores, which = (texts @ self.vectors.T).topk(min(count, len(self.names)))
        return [[(self.names[v], s) for v, s in zip(row.tolist(), score.tolist())]
                for row, score in zip(which, scores)]


# --------------------------------------------------------------------------------- the command line

def main() -> None:
    parser = command.parser(__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        part = commands.add_parser(name, help=text, description=text,
                                   formatter_class=command.Defaults)
        part.add_argument("--device", **command.DEVICE)
        known = name in ("evaluate", "index", "search")         # where training found it
        part.add_argument("--root", default=None if known else "data",
                          help="folder of datasets" + " (not given: the training's)" * known)
        return part

    part = add("train", "train, and evaluate on the test videos")
    command.add_options(part, Config, PRESETS, but=("device", "root"))
    part.add_argument("--resume", action="store_true", help="continue the run in --out")
    part = add("prepare", "captions and features of a published dataset")
    part.add_argument("dataset", choices=DATASETS, help="which")
    part.add_argument("--annotations", required=True, help="folder of its published files")
    part.add_argument("--videos", required=True, help="folder of its video files")
    part.add_argument("--clip", help="published name or file (not given: ViT-B/32)")
    part = add("evaluate", "metrics on the test videos")
    part.add_argument("checkpoint", help="ckpt.pt of a run")
    part.add_argument("--split", default="test", help="which videos (vatex has test1k5, too)")
    part.add_argument("--allow-missing", action="store_true",
                      help="go on without the videos that have no features")
    part.add_argument("--json", action="store_true", help="print json")
    part = add("ablation", "what each block brings, on the shapes world")
    part.add_argument("--seeds", type=int, default=3, help="worlds")
    part = add("index", "index a folder of videos, or bring an index in step")
    part.add_argument("checkpoint", help="ckpt.pt of a run")
    part.add_argument("folder", help="of videos")
    part.add_argument("--out", required=True, help="folder of the index (retrieve.py's will do)")
    part = add("search", "rank the videos of an index, or of a folder, by a sentence")
    part.add_argument("index", help="folder of the index; with --checkpoint, of videos")
    part.add_argument("sentences", nargs="+", help="what to look for")
    part.add_argument("--checkpoint", help="ckpt.pt of a run: index the folder of videos first")
    part.add_argument("--top", type=int, default=10, help="answers a sentence")
    options = parser.parse_args()
    with command.sentences():
        run(options)


def run(options: argparse.Namespace) -> None:
    device = data.pick_device(options.device)
    if options.command == "train":
        given = {k: v for k, v in vars(options).items() if k not in ("command", "resume")}
        config = configure(**given)
        print(command.settings(config))
        print(table(train(config, options.resume)))
    elif options.command == "prepare":
        prepare(options.dataset, options.annotations, options.videos, options)
    elif options.command == "evaluate":
        results = evaluate_checkpoint(options.checkpoint, options.root, device, options.split,
                                      options.allow_missing)
        print(json.dumps(results) if options.json else table(results))
    elif options.command == "ablation":
        if options.seeds < 1:
            raise ValueError("--seeds is at least 1")
        print(ablation_table(ablation(options.seeds, options.root, options.device)))
    elif options.command == "index":
        update_index(options.checkpoint, options.folder, options.out, device, options.root)
    else:
        folder = options.index
        if options.checkpoint:
            both = f"{pathlib.Path(folder).resolve()}\n{clip.sha256(options.checkpoint)}"
            place = hashlib.sha256(both.encode()).hexdigest()[:16]
            folder = pathlib.Path("~/.cache/clip2video").expanduser() / place
            update_index(options.checkpoint, options.index, folder, device, options.root)
        ranker = Ranker(folder, device, options.root)
        for sentence, found in zip(options.sentences, ranker.best(options.sentences, options.top)):
            print(f"\"{command.printable(sentence)}\"")
            for k, (name, score) in enumerate(found, 1):
                print(f"{k:3d}  {score:.3f}  {command.printable(name)}")


def table(results: dict) -> str:
    return "\n".join(f"{name:20s} {value:8.2f}" for name, value in results.items())


if __name__ == "__main__":
    main()
