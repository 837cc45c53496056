"""The paper's datasets as test_reproduce.py rehearses its tables on them: the first videos of every
published split with their real sentences and moments, random features of true shape, and CLIPs of
true joint width with one layer. The numbers mean nothing; what counts is that no row fails after
others were trained for hours, and what every table says about itself.
"""
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import clip
import data
import video
from extras import probe, reproduce
from support import files

SMALL = dict(epochs=1, batch=8, kernel=3, hidden=16, layers=1, joint=16, stage_steps=20)
DATASETS = {"charades": 32, "activitynet": 256}                 # T, features per video
CLIPS = ("ViT-B/32", "ViT-B/16", "RN50")
SHAPES_ONLY = ("main", "study", "coupled", "real", "real-novel", "fig2", "clip2video")


def small_clip(name: str) -> clip.CLIP:
    """A CLIP of the joint width and patch grid of `name`, with random weights."""
    if name == "RN50":
        output, visual = 1024, clip.ModifiedResNet(224, (1, 1, 1, 1), 64, 32, 1024)
    else:
        output, visual = 512, clip.VisionTransformer(224, 32, 64, 1, 1, 512, clip.QuickGELU)
    model = clip.CLIP(visual, 49408, 77, 64, 1, 1, output, clip.QuickGELU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model


def first_videos(dataset: str, root: pathlib.Path, annotations: str, count: int) -> set[str]:
    """Writes the first `count` videos of each split with their sentences below the root. Returns
    all of them."""
    names = set()
    for split, published in data.FILES[dataset].items():
        file = next(name for name in published if name.endswith(".json"))
        videos: dict[str, dict] = {}
        for sample in data.read_annotations(dataset, split, annotations):
            if sample.video not in videos and len(videos) == count:
                continue
            entry = videos.setdefault(sample.video, {"duration": sample.duration_sec,
                                                     "timestamps": [], "sentences": []})
            entry["timestamps"].append([sample.start_sec, sample.end_sec])
            entry["sentences"].append(sample.sentence)
        files.save(root / dataset / file, json.dumps(videos))
        names |= videos.keys()
    return names


def build(root: pathlib.Path, annotations: str, count: int) -> None:
    """Annotations, CLIPs and features of both datasets and their compositional splits."""
    torch.manual_seed(0)
    for name in CLIPS:
        model = small_clip(name)
        files.save_tensors(root / name / "clip.pt", model.state_dict())
        for dataset, frames in DATASETS.items():
            videos = set()
            for part in (dataset, dataset + "-cg"):
                videos |= first_videos(part, root, annotations, count)
            if name == "ViT-B/16":                              # only its text tower is used
                continue
            made = video.made_by(model, name, files.sha256(root / name / "clip.pt"), frames, 32)
            store = data.FeatureStore(data.store_folder(dataset, name, root), made)
            shape = 32, made["patch_width"], made["grid"], made["grid"]
            for each in sorted(videos):
                store.write(each, torch.randn(frames, made["width"]).half(),
                            torch.randn(shape).half(), 30.0)
            store.save_manifest()


def separate(root: pathlib.Path) -> None:
    """Features of the width of VGG and C3D, and a small DistilBERT where transformers finds it."""
    for dataset, frames in DATASETS.items():
        name, width = reproduce.SEPARATE[dataset], {"charades": 4096, "activitynet": 500}[dataset]
        store = data.FeatureStore(data.store_folder(dataset, name, root), {
            "clip": name, "sha256": "", "resolution": 0, "frames": frames, "patch_frames": 0,
            "width": width, "patch_width": 0, "grid": 0, "precision": "made elsewhere"})
        for path in data.store_folder(dataset, CLIPS[0], root).glob("*.frames.npy"):
            store.write(path.name.removesuffix(".frames.npy"), torch.randn(frames, width).half(),
                        None, 30.0)
        store.save_manifest()
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "person", "a", "the", "door", "opens"]
    config = transformers.DistilBertConfig(vocab_size=len(words), dim=64, n_layers=1, n_heads=2,
                                           hidden_dim=64)
    transformers.DistilBertModel(config).save_pretrained(reproduce.BERT)
    files.save(f"{reproduce.BERT}/vocab.txt", "\n".join(words) + "\n")


def svo(folder: pathlib.Path) -> None:
    """SVO-Probes' table and images, of noise: one triplet of each kind."""
    folder.mkdir(parents=True)
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.png")
    columns = ["sentence", "pos_image_id", "neg_image_id", "subj_neg", "verb_neg", "obj_neg"]
    rows = [["A dog runs.", "0", "1", *(str(kind == other) for other in probe.KINDS)]
            for kind in probe.KINDS]
    files.save(folder / "svo_probes.csv", "".join(",".join(row) + "\n" for row in (columns, *rows)))
