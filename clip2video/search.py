"""An index of the whole videos in a folder, and their ranking by a sentence."""
import pathlib
import time

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import clip
import data
import video
from clip2video.data import encode_file
from clip2video.evaluate import load
from clip2video.model import joined
from support import files
from support.errors import Mistake
from support.text import printable

FILE, COMMAND = "clip2video.npz", "python -m clip2video index CKPT DIR --out"
# path below the folder -> joined vector [2D], size and modification time of the file
Entries = dict[str, tuple[Tensor, list[int]]]


def update_index(checkpoint: str, folder: str, out: str | pathlib.Path, device: torch.device,
                 root: str | None = None) -> dict[str, str]:
    """Updates <out>/clip2video.npz to the videos in a folder: encodes new and changed files, drops
    removed ones, saves every minute. Prints and returns file -> reason for those that cannot be
    read. Mistake if none can be, or if the index was made with another checkpoint."""
    model, config, clip_sha256 = load(checkpoint, root)
    paths, entries = video.video_files(folder), {}
    if not paths:
        raise Mistake(f"{folder} contains no video")
    if (pathlib.Path(out) / FILE).exists():
        entries, other, digest = read_vectors(out)
        if digest != files.sha256(checkpoint):
            raise Mistake(f"{out} was made with another checkpoint, {other}; choose another --out")
    entries = {name: entry for name, entry in entries.items() if name in paths}
    model.to(device)
    images = model                              # what encodes images: its own trained tower,
    if not config.train_images:
        clip_path = data.clip_file(config.clip, config.root)
        images = clip.load(clip_path, device)   # or the CLIP from which it was trained
        if clip.sha256(clip_path) != clip_sha256:
            raise Mistake(f"{clip_path} is not the CLIP this checkpoint was trained with; pass its "
                          f"folder with --root")
    failed = {}                                 # file -> reason
    saved = time.monotonic()
    for name, path in tqdm(paths.items(), desc="index", unit="video", disable=None):
        state = list(video.state_of(path).values())     # size and modification time
        if name in entries and entries[name][1] == state:
            continue                            # its vector is up to date
        try:
            x = encode_file(images, path, config).float()[None].to(device)      # [1, L, D]
            with torch.no_grad():
                encoded = model.encode_video(x, (x != 0).any(2))
            entries[name] = (joined(encoded, config.weight)[0].cpu(), state)    # [2D]
        except data.VideoError as error:
            entries.pop(name, None)             # its vector is of the earlier content
            failed[name] = str(error)
            tqdm.write(printable(f"failed: {name}: {error}"))
        if entries and time.monotonic() - saved > 60:           # an interruption loses a minute
            save_vectors(out, checkpoint, entries)
            saved = time.monotonic()
    if not entries:
        raise Mistake(f"no video in {folder} could be read: {next(iter(failed.values()))}")
    save_vectors(out, checkpoint, entries)
    return failed


def save_vectors(out: str | pathlib.Path, checkpoint: str | pathlib.Path, entries: Entries) -> None:
    """Writes <out>/clip2video.npz."""
    vectors = torch.stack([vector for vector, _ in entries.values()])   # [V, 2D]
    states = np.array([state for _, state in entries.values()])         # [V, 2]
    files.save(pathlib.Path(out) / FILE, lambda file: np.savez(
        file, names=np.array(list(entries)), vectors=vectors.numpy(), about=states,
        checkpoint=str(pathlib.Path(checkpoint).resolve()), sha256=files.sha256(checkpoint)))


def read_vectors(folder: str | pathlib.Path) -> tuple[Entries, str, str]:
    """What `save_vectors` wrote: the entries, the checkpoint's path and its SHA-256."""
    path = pathlib.Path(folder) / FILE
    if not path.exists():
        raise Mistake(f"{folder} has no vectors of whole videos; use: {COMMAND} {folder}")
    try:
        with np.load(path, allow_pickle=False) as file:
            # strict: a damaged file may have more names than vectors
            rows = zip(torch.from_numpy(file["vectors"]), file["about"].tolist(), strict=True)
            entries = dict(zip(file["names"].tolist(), rows, strict=True))
            return entries, str(file["checkpoint"]), str(file["sha256"])
    except Exception as error:  # numpy raises a dozen types for a damaged or hostile file
        raise Mistake(f"{path} is damaged ({error}); remove it and index again") from error


class Ranker:
    """Ranks the videos of an index: their `names`, and `vectors` [V, 2D]. Mistake if there is no
    valid index, or if its checkpoint was removed or changed."""

    def __init__(self, folder: str | pathlib.Path, device: torch.device | str = "cpu",
                 root: str | None = None):
        entries, checkpoint, digest = read_vectors(folder)
        if not pathlib.Path(checkpoint).exists() or files.sha256(checkpoint) != digest:
            raise Mistake(f"the checkpoint of this index was removed or changed: {checkpoint}; "
                          f"pass its new path: {COMMAND} {folder}")
        self.names, self.device = list(entries), torch.device(device)
        self.vectors = torch.stack([vector for vector, _ in entries.values()])
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
