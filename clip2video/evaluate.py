"""Metrics of retrieval, and checkpoints. Shapes: see clip2video/__init__.py."""
import dataclasses
import json
import math
import pathlib

import torch
from torch import Tensor

import clip
from clip2video.data import Split, dataset_folder, encode, read_pixels, read_split
from clip2video.model import VARIANTS, CLIP2Video, Config, joined
from support import files
from support.errors import Mistake, reason


def ranks(similarity: Tensor, target: Tensor) -> Tensor:
    """The rank of column target[i] in row i: 1 + the columns that score higher + half of the others
    that score the same. [Q, C], [Q] -> [Q]. Mistake if a similarity is not finite."""
    if not torch.isfinite(similarity).all():
        raise Mistake("a similarity is not finite; check the features, or train with a lower --lr")
    own = similarity.gather(1, target[:, None])                         # [Q, 1]
    # - 1: the target itself scores the same
    return 1 + (similarity > own).sum(1) + ((similarity == own).sum(1) - 1) / 2


def retrieval_metrics(similarity: Tensor, video_of: Tensor | None = None) -> dict[str, float]:
    """Text to video (t2v) and video to text (v2t): recall at 1, 5, 10 in %, median and mean rank.

    similarity  [T, V]
    video_of    [T], the video of each text (default: text i describes video i). If a video has
                several texts, each is a query for videos, and a video ranks the videos' groups of
                texts by the best text of each"""
    T, V = similarity.shape
    video_of = torch.arange(T) if video_of is None else video_of
    if len(video_of) != T or not set(range(V)) <= set(video_of.tolist()):
        raise ValueError(f"{len(video_of)} entries for {T} texts do not cover {V} videos")
    # [code]: the best caption of each group; -inf is overwritten, as no group is empty
    groups = torch.full((V, V), -math.inf).to(similarity)               # [group, video]
    groups.scatter_reduce_(0, video_of[:, None].expand(T, V), similarity, "amax")
    both = {"t2v": ranks(similarity, video_of), "v2t": ranks(groups.T, torch.arange(V))}
    metrics = {}
    for direction, rank in both.items():
        rank = rank.double()                                            # [T] or [V]
        for k in (1, 5, 10):
            metrics[f"{direction} R@{k}"] = 100 * (rank <= k).double().mean().item()
        metrics[f"{direction} MedR"] = rank.quantile(0.5).item()
        metrics[f"{direction} MnR"] = rank.mean().item()
    return metrics


@torch.no_grad()
def vectors(model: CLIP2Video, split: Split, config: Config,
            device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Joined vectors of all captions [T, 2D] and videos [V, 2D], and the video of each caption [T].
    Leaves the model in evaluation mode."""
    model.eval()
    frames = split.frames                                               # [V, L, D]
    if config.train_images:             # the stored features are of the untrained tower
        frames = torch.stack([encode(model, read_pixels(config, [name]), config)
                              for name in split.videos]).float()
    sentences, video_of = [], []                                        # of T each
    for v, captions in enumerate(split.captions):
        sentences += captions
        video_of += [v] * len(captions)
    texts = []                                  # in batches of 256, to bound the memory
    for ids in clip.tokenize(sentences, config.words, True).split(256):
        texts.append(joined(model.encode_text(ids.to(device)), config.weight))
    videos = []
    for x, mask in zip(frames.split(256), split.mask.split(256)):
        videos.append(joined(model.encode_video(x.to(device), mask.to(device)), config.weight))
    return torch.cat(texts).cpu(), torch.cat(videos).cpu(), torch.tensor(video_of)


def load(path: str | pathlib.Path, root: str | None = None) -> tuple[CLIP2Video, Config, str]:
    """A ckpt.pt of `train`: the network, its settings (with another `root`, if given), the SHA-256
    of the CLIP that made the features. Executes nothing in it. Mistake for any other file."""
    if not pathlib.Path(path).is_file():
        raise Mistake(f"there is no checkpoint {path}; python -m clip2video train makes one")
    saved = files.read_tensors(path)
    try:
        config = Config(**saved["config"])
        # the towers under the names that they have in a CLIP, from which their sizes are read
        towers = {key.removeprefix("text."): value for key, value in saved["model"].items()
                  if key.startswith(("text.", "visual.", "logit_scale"))}
        temporal, align = VARIANTS[config.variant]
        # checked before they are allocated: a damaged file may claim millions
        centres = len(saved["model"].get("centres", ()))
        if config.layers > len(saved["model"]) or align and centres != config.centres:
            raise ValueError(f"its weights do not have {config.layers} layers and "
                             f"{config.centres} centres")
        visual = clip.build(towers).visual if config.train_images else None
        model = CLIP2Video(clip.build_text(towers), temporal, align, centres=config.centres,
                           layers=config.layers, visual=visual)
        model.load_state_dict(saved["model"])
        # the datasets may have moved since
        config = dataclasses.replace(config, root=root or config.root)
        return model.eval(), config, saved["clip_sha256"]
    except Exception as error:  # torch raises a dozen types for what does not fit
        raise Mistake(f"{path} is not a checkpoint of clip2video: {reason(error)}") from error


@torch.no_grad()
def evaluate_checkpoint(path: str | pathlib.Path, root: str | None, device: torch.device,
                        split: str = "test", allow_missing: bool | None = None) -> dict:
    """Metrics on the videos of a split; in a shapes world also how often a video prefers its
    caption to one with the opposite verbs, or with the events in reverse order (chance: 50).

    allow_missing    leave out videos without features (default: as in training)"""
    model, config, clip_sha256 = load(path, root)
    if allow_missing is not None:
        config = dataclasses.replace(config, allow_missing=allow_missing)
    folder = dataset_folder(config)
    part = read_split(config, split)
    if part.made["sha256"] != clip_sha256:
        raise Mistake(f"the features in {folder} come from another CLIP than the one this "
                      f"checkpoint was trained with; make them with that one")
    texts, videos, video_of = vectors(model.to(device), part, config, device)
    results = {"videos": len(videos), "captions": len(texts)}
    results.update(retrieval_metrics(texts @ videos.T, video_of))
    if (folder / "altered.json").exists():      # of a shapes world, where a video has one caption
        false_captions = json.loads((folder / "altered.json").read_text(encoding="utf-8"))
        for kind in ("direction", "order"):
            sentences = [false_captions[name][kind] for name in part.videos]
            ids = clip.tokenize(sentences, config.words, True).to(device)
            others = joined(model.encode_text(ids), config.weight).cpu()        # [V, 2D]
            ahead = (texts * videos).sum(1) - (others * videos).sum(1)  # [V]
            # a tie counts half, as in `ranks`
            preferred = (ahead > 0).double().mean() + (ahead == 0).double().mean() / 2
            results[f"{kind} recognised, %"] = 100 * preferred.item()
    return results


def table(results: dict[str, float]) -> str:
    """Results as text, a line for each metric."""
    return "\n".join(f"{name:20s} {value:8.2f}" for name, value in results.items())
