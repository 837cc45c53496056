"""An index of the whole videos in a folder, and their ranking by a sentence."""
import functools
import pathlib

import torch
from torch import Tensor

import clip
import data
from clip2video.data import encode_file
from clip2video.evaluate import load
from clip2video.model import CLIP2Video, Config, joined
from extras.index import Index
from support import files
from support.errors import Mistake


def update_index(checkpoint: str, folder: str, out: str | pathlib.Path, device: torch.device,
                 root: str | None = None) -> dict[str, str]:
    """Updates the index in `out` to the videos in a folder, see `extras.index.Index.update`."""
    model, config, clip_sha256 = load(checkpoint, root)
    model.to(device)
    images = model                              # what encodes images: its own trained tower,
    if not config.train_images:
        clip_path = data.clip_file(config.clip, config.root)
        # or the CLIP from which it was trained
        images = clip.load(clip_path, device, type(model.text.transformer.resblocks[0].mlp.gelu))
        if clip.sha256(clip_path) != clip_sha256:
            raise Mistake(f"{clip_path} is not the CLIP this checkpoint was trained with; pass its "
                          f"folder with --root")
    made = {"kind": "whole videos", "checkpoint": str(pathlib.Path(checkpoint).resolve()),
            "sha256": files.sha256(checkpoint)}
    encode = functools.partial(encode_video, model, images, config)
    return Index(out, made, "clip2video").update(folder, encode)


@torch.no_grad()
def encode_video(model: CLIP2Video, images: clip.CLIP, config: Config,
                 path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """The joined vector of a video file, [1, 2D], as an index stores it."""
    x = encode_file(images, path, config).float()[None].to(model.logit_scale.device)    # [1, L, D]
    encoded = model.encode_video(x, (x != 0).any(2))
    return {"vector": joined(encoded, config.weight).cpu()}, {}


class Ranker:
    """Ranks the videos of an index: their `names`, and `vectors` [V, 2D]. Mistake if there is no
    valid index, or if its checkpoint was removed or changed."""

    def __init__(self, folder: str | pathlib.Path, device: torch.device | str = "cpu",
                 root: str | None = None):
        index = Index(folder, part="clip2video")
        checkpoint = pathlib.Path(index.made["checkpoint"])
        if not checkpoint.exists() or files.sha256(checkpoint) != index.made["sha256"]:
            raise Mistake(f"the checkpoint of this index was removed or changed: {checkpoint}; "
                          f"pass its new path: {index.command} CKPT DIR --out {folder}")
        self.names, self.device = list(index.entries), torch.device(device)
        self.vectors = index.load()[0]["vector"]
        self.model, self.config, _ = load(checkpoint, root)
        self.model.to(self.device)

    @torch.no_grad()
    def best(self, sentences: list[str], count: int) -> list[list[tuple[str, float]]]:
        """For each sentence the `count` best (video, cosine), best first. Mistake for an empty
        sentence."""
        if count < 1:
            raise Mistake("the number of answers must be at least 1")
        if not all(sentence.strip() for sentence in sentences):
            raise Mistake("a sentence is empty; say what to look for")
        ids = clip.tokenize(sentences, self.config.words, True).to(self.device)
        texts = joined(self.model.encode_text(ids), self.config.weight).cpu()       # [T, 2D]
        answers = []
        # both sides are unit vectors, so the products are cosines
        for scores in texts @ self.vectors.T:                           # [V]
            values, indices = scores.topk(min(count, len(self.names)))
            names = [self.names[v] for v in indices.tolist()]
            answers.append(list(zip(names, values.tolist())))
        return answers
