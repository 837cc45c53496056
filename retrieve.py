"""When does a sentence happen in a video?

    python retrieve.py video.mp4 "a person opens the door"              # CLIP alone, no training
    python retrieve.py video.mp4 "a person opens the door" --checkpoint ckpt.pt         # trained
    python retrieve.py video.mp4 "a person opens the door" --plot out.png --html out.html

    r = ZeroShot()                                              # or Retriever("ckpt.pt")
    video = r.encode("a.mp4")
    moments = r.predict(video, "a person opens the door")       # [Moment(start_sec, ...), ...]

Without a checkpoint, the answer is the moment whose frames CLIP finds closer to the sentence than
the rest of the video. CLIP recognises people and objects, but not direction or order: opening a
door looks like closing it. A checkpoint of train.py has learned the difference from labels.

Every sentence has a best moment, even one that describes nothing in the video; the answer says
whether it beats unrelated sentences. To search a folder: extras/index.py, extras/search.py.

Shapes: F frames of a video, W windows of T of them, w windows at a time, P candidate moments of a
window, S sentences, D width of CLIP's joint space, J of MMN's, N clips.
"""
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import sys
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import clip
import data
import evaluate
import mmn
import shapes
import video
from extras import show
from support import files, options, parallel, untrained
from support.errors import Mistake, reported
from support.text import printable

NMS = 0.5 + 1e-6        # drop moments whose IoU with a better one is higher (as in R@5)
LONGER = 1.5            # a video of up to this multiple of the trained length is one window
CACHE = "~/.cache/visual-dynamic-injection"
FOUND = 1.0             # z from which a sentence counts as found, see docs/zero-shot.md


class Moment(NamedTuple):
    """`score` ranks the moments of one sentence in one video; it is not a probability."""
    start_sec: float
    end_sec: float
    score: float


class Answer(NamedTuple):
    """The moments of a sentence, best first; z: how many standard deviations the best one is above
    those of unrelated sentences; found: whether z reaches the threshold FOUND."""
    sentence: str
    moments: list[Moment]
    z: float
    found: bool


class Encoded(NamedTuple):
    """A video as a retriever sees it: F features [F, D], L2-normalised, one every `each_sec`
    seconds, and the index of each window's first feature (one window without a checkpoint)."""
    path: str
    duration_sec: float
    each_sec: float
    frames: Tensor
    starts: list[int]


# --------------------------------------------------------------------------------- without training

def zero_shot_scores(frames: Tensor, text: Tensor, num_clips: int) -> Tensor:
    """`untrained.contrast_map` of a video with frozen CLIP features.

    frames   [T, D] unit vectors at the centres of T equal parts of the video, T >= N
    text     [S, D] unit vectors
    returns  [S, N, N]; -inf below the diagonal and for the whole video, which has no outside
    """
    return untrained.contrast_map(text @ frames.T, num_clips)


def search_intervals(similarity: Tensor, shortest: int, longest: int, top_k: int = 1,
                     block: int = 1 << 22) -> Tensor:
    """The best moments among all intervals of `shortest` to `longest` frames, by greedy NMS: exact,
    and in bounded memory for videos of any length.

    similarity   [S, F] cosines of each sentence with the frames of a video
    block        number of intervals scored at a time
    returns      [S, top_k, 3]: first frame, frame after the last, score; -inf if there are no more
    """
    S, n = similarity.shape
    sums = F.pad(similarity.double().cumsum(1), (1, 0))                 # [S, F + 1]
    length = torch.arange(shortest, longest + 1)                        # [L]
    total = sums[:, -1, None, None]                                     # [S, 1, 1]
    step = max(1, block // (S * len(length)))                           # B, start frames per block
    result = torch.zeros(S, top_k, 3, dtype=torch.double)
    result[..., 2] = float("-inf")
    for k in range(top_k):
        for first in range(0, n, step):
            start = torch.arange(first, min(first + step, n))[:, None]          # [B, 1]
            end = start + length                                                # [B, L]
            inside = sums[:, end.clamp(max=n)] - sums[:, start]                 # [S, B, L]
            score = untrained.contrast(total, inside, length, n)
            # subtle: intervals that run past the end have clamped, meaningless sums; drop them
            score = score.masked_fill(end > n, float("-inf"))
            spans = torch.stack([start.expand_as(end), end], -1).double()       # [B, L, 2]
            # greedy NMS: moments already chosen suppress the intervals that overlap them
            for chosen in range(k):
                overlap = mmn.interval_iou(spans, result[:, chosen, None, None, :2])
                score = score.masked_fill(overlap > NMS, float("-inf"))
            best, at = score.flatten(1).max(1)                                  # [S] each
            better = best > result[:, k, 2]                                     # [S]
            winner = torch.cat([spans.flatten(0, 1)[at], best[:, None]], 1)     # [S, 3]
            result[better, k] = winner[better]
        if result[:, k, 2].isneginf().all():                            # there are no more
            break
    return result


def best_at(similarity: Tensor, shortest: int, longest: int) -> Tensor:
    """The best score of an interval of `shortest` to `longest` frames that contains each frame.
    similarity [S, F]; returns [S, F]."""
    S, n = similarity.shape
    sums = F.pad(similarity.double().cumsum(1), (1, 0))                         # [S, F + 1]
    # best[:, i]: the best interval that contains frames i to i + length - 1
    best = torch.full((S, n - longest), float("-inf"), dtype=torch.double)
    for length in range(longest, 0, -1):
        # an interval that contains one more frame, before or after, contains these, too
        best = F.pad(best, (1, 1), value=float("-inf"))
        best = torch.maximum(best[:, 1:], best[:, :-1])                 # [S, F - length + 1]
        if length >= shortest:
            inside = sums[:, length:] - sums[:, :-length]               # [S, F - length + 1]
            score = untrained.contrast(sums[:, -1:], inside, torch.tensor(length), n)
            best = torch.maximum(best, score)
    return best


class ZeroShot:
    """A frozen CLIP, ready for videos: no training, no checkpoint.

    clip_name               a published name (downloaded once), a weight file, or a dataset's CLIP
    rate                    frames per second that are encoded
    shortest_sec, longest_sec   limits of a moment's length; never more than half the video
    prompt                  a template such as "a video of {}"
    smooth_sec              what the cosines are averaged over; None: as of untrained.smooth_sec_of
    gelu                    the weights were trained with GELU (LAION's), not with QuickGELU
    """

    def __init__(self, clip_name: str = "ViT-B/32", device: str = "auto", rate: float = 2.0,
                 shortest_sec: float = 1.0, longest_sec: float = 300.0, prompt: str = "{}",
                 cache: str | os.PathLike | None = CACHE, root: str = "data", gelu: bool = False,
                 smooth_sec: float | None = None):
        if not (0 < rate < float("inf") and 0 < shortest_sec <= longest_sec < float("inf")):
            raise Mistake("--rate, --shortest and --longest must be positive numbers, and "
                          "--shortest at most --longest")
        if prompt.count("{}") != 1:
            raise Mistake(f"the prompt must contain {{}} once, for the sentence, not {prompt!r}")
        self.kind, self.name, self.cache = "clip", clip_name, cache
        self.rate, self.prompt = rate, prompt
        self.limits_sec = (shortest_sec, longest_sec)
        path = data.clip_file(clip_name, root)
        dataset = ""                            # whose own CLIP it is
        if os.path.exists(path):                # absolute: an index works from any folder
            self.name = os.path.abspath(path)
            dataset = os.path.basename(os.path.dirname(self.name))
        if smooth_sec is None:
            smooth_sec = untrained.smooth_sec_of(dataset)
        self.smooth_sec = smooth_sec
        self.device = parallel.pick_device(device)
        self.model = clip.load(path, self.device, torch.nn.GELU if gelu else None)
        # the activation changes the features, so it is part of what identifies them
        is_gelu = hasattr(self.model.transformer, "gelu")
        self.digest = clip.sha256(path) + ("-gelu" if is_gelu else "")
        self.generic = generic_sentences(dataset)

    def encode(self, path: str | os.PathLike) -> Encoded:
        """The features of a video file, cached or extracted. VideoError if it is unreadable."""
        path = checked_video(path)
        settings = [self.digest, self.rate, "ffmpeg"]        # what decodes the frames
        frames, duration_sec = cached_features(self.cache, path, settings, self.extract)
        return Encoded(str(path), duration_sec, duration_sec / len(frames), frames, starts=[0])

    def extract(self, path: pathlib.Path) -> tuple[Tensor, float]:
        """A video file -> F features [F, D], float16, and its duration."""
        found = video.inspect(path)
        count = max(4, round(found.duration_sec * self.rate))   # a moment needs frames outside it
        return encode_file(self.model, found, count)

    @torch.no_grad()
    def text(self, sentences: list[str]) -> Tensor:
        """x^q of the sentences in the prompt, [S, D]. Mistake for an empty one."""
        prompts = [self.prompt.replace("{}", sentence) for sentence in sentences]
        tokens = checked_tokens(prompts, self.model.tokenize)
        return F.normalize(self.model.encode_text(tokens.to(self.device)), dim=1).cpu()

    def similarity(self, encoded: Encoded, text: Tensor) -> Tensor:
        """Cosines of sentences [S, D] with all frames, smoothed: [S, F]."""
        return untrained.smoothed(text @ encoded.frames.T, encoded.each_sec, self.smooth_sec)

    def search(self, encoded: Encoded, text: Tensor, top_k: int) -> Tensor:
        """`search_intervals` within the limits, in seconds: [S, top_k, 3]."""
        shortest, longest = self.limits(encoded)
        result = search_intervals(self.similarity(encoded, text), shortest, longest, top_k)
        result[..., :2] *= encoded.each_sec
        return result

    def limits(self, encoded: Encoded) -> tuple[int, int]:
        """The shortest and the longest moment, in frames."""
        shortest, longest = (max(1, round(sec / encoded.each_sec)) for sec in self.limits_sec)
        longest = max(1, min(longest, len(encoded.frames) // 2))
        return min(shortest, longest), longest

    def predict(self, encoded: Encoded, sentences: str | list[str],
                top_k: int = 5) -> list[Moment] | list[list[Moment]]:
        """The best moments, best first: a list for a sentence, a list of lists for several."""
        if isinstance(sentences, str):
            return self.predict(encoded, [sentences], top_k)[0]
        answers = []
        for rows in self.search(encoded, self.text(sentences), top_k).tolist():
            # a short video may have fewer than top_k moments; -inf marks the rest
            answers.append([Moment(*row) for row in rows if row[2] > float("-inf")])
        return answers

    @functools.cached_property
    def generic_text(self) -> Tensor:
        return self.text(self.generic)                                  # [G, D]

    def generic_best(self, encoded: Encoded) -> Tensor:
        """The best score of each generic sentence, [G]."""
        return self.search(encoded, self.generic_text, 1)[:, 0, 2]

    def curve(self, encoded: Encoded, sentences: list[str]) -> Tensor:
        """What a plot shows: the best score of a moment at each frame, [S, F]."""
        shortest, longest = self.limits(encoded)
        return best_at(self.similarity(encoded, self.text(sentences)), shortest, longest)

    def grid_sec(self, encoded: Encoded) -> float:
        """Moments start and end on multiples of this."""
        return encoded.each_sec


# --------------------------------------------------------------------------------- "nothing found"

def generic_sentences(trained_on: str) -> list[str]:
    """Unrelated sentences: of the shapes world, or of people and things in everyday videos."""
    name = "generic-shapes.txt" if trained_on.startswith("shapes") else "generic.txt"
    return (files.ASSETS / name).read_text(encoding="utf-8").split("\n")[:-1]


def answers_of(retriever, encoded: Encoded, sentences: list[str], top_k: int = 5) -> list[Answer]:
    """The moments of all sentences, and whether they fit. The best score of a sentence is compared
    with those of generic sentences on the same video, because an absolute threshold fails (CLIP
    gives "elephant" 0.21 where there is none, and "doorknob" 0.26 where there is one)."""
    generic = retriever.generic_best(encoded)                           # [G]
    mean = generic.mean()
    deviation = generic.std().clamp(min=1e-9)       # 0 if every frame of the video is the same
    answers = []
    for sentence, moments in zip(sentences, retriever.predict(encoded, list(sentences), top_k)):
        z = float("-inf")
        if moments:
            z = float((moments[0].score - mean) / deviation)
        answers.append(Answer(sentence, moments, z, found=z >= FOUND))
    return answers


# ------------------------------------------------------------------------------- a video's features

def checked_video(path: str | os.PathLike) -> pathlib.Path:
    """The path of a file. Mistake if it is a folder or does not exist."""
    path = pathlib.Path(path)
    if path.is_dir():
        raise Mistake(f"{path} is a folder; to search in it, see: python -m extras.index --help")
    if not path.is_file():
        raise Mistake(f"{path} does not exist; pass a video file")
    return path


def checked_tokens(sentences: list[str], tokenize=clip.tokenize) -> Tensor:
    """Sentences -> [S, 77]. Mistake for an empty one; a note for one that is cut off."""
    for sentence in sentences:
        if not sentence.strip():
            raise Mistake("a sentence is empty; describe what to look for")
        if len(clip.encode(sentence)) > 75:                 # plus a start and an end token: 77
            start = printable(sentence[:60])
            note(f"CLIP reads at most 77 tokens; the end of \"{start}...\" is ignored")
    return tokenize(sentences, truncate=True)


def cached_features(cache: str | os.PathLike | None, path: pathlib.Path, settings: list,
                    extract) -> tuple[Tensor, float]:
    """The features [F, D] of a video file, L2-normalised, and its duration: from the cache, under a
    hash of the file's content and of the settings of its features, or from `extract(path)`."""
    if cache:
        key = hashlib.sha256(f"{files.sha256(path)} {settings}".encode()).hexdigest()[:32]
        entry = pathlib.Path(cache).expanduser() / f"{key}.npz"
        with contextlib.suppress(Mistake, KeyError):        # missing or damaged: extracted again
            cached = files.read_arrays(entry)
            frames = torch.from_numpy(cached["frames"])
            return F.normalize(frames.float(), dim=1), float(cached["duration_sec"])
    frames, duration_sec = extract(path)
    if cache:
        try:
            files.save_arrays(entry, {"frames": frames.numpy(),
                                      "duration_sec": np.array(duration_sec)})
        except OSError as error:                            # e.g. a full disk
            print(f"note: the features were not cached: {error}", file=sys.stderr)
    # subtle: normalised after the cache's float16, so that cached and fresh features are equal
    return F.normalize(frames.float(), dim=1), duration_sec


def encode_file(model: clip.CLIP, found: video.VideoFile, count: int) -> tuple[Tensor, float]:
    """`count` frames of a video file, at the centres of equal parts -> features [F, D], float16,
    and its duration."""
    features, pixels = [], []
    # an index reads several videos at a time, in threads, and has a bar for all of them
    hidden = None if threading.current_thread() is threading.main_thread() else True
    frames = video.centre_frames(found, count)
    bar = tqdm(frames, total=count, desc=found.path.name, unit="frame", disable=hidden)
    for i, frame in enumerate(bar, 1):                                  # [3, h, w]
        share = min(frame.shape[1:]) / max(frame.shape[1:])
        if share < 0.6:                                                 # 16:9 is 0.56
            note(f"CLIP sees only the central square, {share:.0%} of the picture")
        pixels.append(clip.crop(frame[None], model.visual.resolution))      # [1, 3, R, R]
        if len(pixels) == 32 or i == count:
            features.append(video.encode_frames(model, torch.cat(pixels))[0])       # [<= 32, D]
            pixels = []
    return torch.cat(features), found.duration_sec


@functools.cache                # once, also when a whole folder is indexed
def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# -------------------------------------------------------------------------------- with a checkpoint

class Retriever:
    """A checkpoint of train.py, ready for videos. The checkpoint names its CLIP, whose image tower
    is loaded when it is needed. A video that is much longer than those the model was trained on is
    covered by windows of their length that overlap by half.

    clip_file  the weights of its CLIP, if they are not found by name
    cache      folder for the features of videos; None: no cache
    fuse_clip  order the moments of a sentence by its scores and CLIP's together; the scores that
               are shown, and whether a sentence is found, remain the checkpoint's
    """

    def __init__(self, checkpoint: str | os.PathLike, device: str = "auto",
                 clip_file: str | None = None, cache: str | os.PathLike | None = CACHE,
                 fuse_clip: bool = False):
        self.kind, self.cache, self.fuse_clip = "checkpoint", cache, fuse_clip
        self.device = parallel.pick_device(device)
        self.run = evaluate.load(checkpoint, self.device)
        self.made = self.run.checkpoint["features"]
        if not self.made["resolution"]:                     # features of another network
            raise Mistake(f"the frame features of this checkpoint come from {self.made['clip']}, "
                          f"which cannot be run on a video; use one trained on CLIP features")
        self.T, self.N = self.run.config["frames"], self.run.config["num_clips"]
        self.window_sec = self.run.checkpoint["window_sec"]
        self.clip_file = clip_file
        self.generic = generic_sentences(self.run.config["dataset"])
        if fuse_clip and not (evaluate.can_add_clip(self.run)
                              and "clip_weight" in self.run.checkpoint):
            raise Mistake(f"{checkpoint} has no weight for CLIP alone; omit --fuse-clip")

    @functools.cached_property
    def image_tower(self) -> clip.CLIP:
        """The checkpoint's CLIP, loaded when first needed. Mistake for missing or other weights."""
        path = self.clip_file or data.clip_file(self.made["clip"], self.run.config["root"])
        path = evaluate.own_clip(self.run, path, "pass its file with --clip")
        return clip.load(path, self.device, clip.activation_of(self.made))

    def encode(self, path: str | os.PathLike) -> Encoded:
        """The features of a video file, cached or extracted. VideoError if it is unreadable."""
        path = checked_video(path)
        if self.run.config["dataset"].startswith("shapes"):
            found = video.inspect(path)
            if (found.width, found.height) != (shapes.EXPORTED, shapes.EXPORTED):
                note("this checkpoint was trained on the shapes world only; its answers on this "
                     "video are meaningless (omit the checkpoint to use CLIP alone)")
        settings = [self.run.checkpoint["clip_sha256"], self.T, self.window_sec, "ffmpeg"]
        frames, duration_sec = cached_features(self.cache, path, settings, self.extract)
        last = len(frames) - self.T
        starts = list(range(0, last, max(1, self.T // 2)))
        starts.append(last)                                 # the last window ends with the video
        return Encoded(str(path), duration_sec, duration_sec / len(frames), frames, starts)

    def extract(self, path: pathlib.Path) -> tuple[Tensor, float]:
        """A video file -> F features [F, D], float16, and its duration. F is T; for a long video it
        is larger, so that the features are as dense as in training."""
        found = video.inspect(path)
        count = self.T
        if found.duration_sec > LONGER * self.window_sec:
            count = round(self.T * found.duration_sec / self.window_sec)
        return encode_file(self.image_tower, found, count)

    @torch.no_grad()
    def text(self, sentences: list[str]) -> Tensor:
        """x^q of the sentences, [S, D]. Mistake for an empty one."""
        tokens = checked_tokens(sentences, self.run.text.tokenize)
        return F.normalize(self.run.text.encode_text(tokens.to(self.device)), dim=1)

    @torch.no_grad()
    def read(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Both heads' unit vectors of the sentences: two of [S, J]."""
        return self.run.retriever.sentences(self.text(sentences))

    def windows(self, encoded: Encoded) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to 16 windows at a time: frames [w, T, D], their moments in seconds [w, P, 2]."""
        cells = self.run.retriever.cells.cpu()                          # [P], index into N*N
        corners = torch.stack([cells // self.N, cells % self.N + 1], 1)         # [P, 2] clips
        corners = corners * (self.T / self.N)                           # [P, 2] features
        for i in range(0, len(encoded.starts), 16):
            starts = encoded.starts[i:i + 16]
            frames = torch.stack([encoded.frames[s:s + self.T] for s in starts])    # [w, T, D]
            spans = torch.stack([(corners + s) * encoded.each_sec for s in starts])     # [w, P, 2]
            yield frames.to(self.device), spans.clamp(max=encoded.duration_sec)

    @torch.no_grad()
    def moments(self, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        """All moments of a video: (start, end) in seconds [W * P, 2], and both heads' unit vectors,
        two of [W * P, J]. They do not depend on the sentence."""
        all_spans, all_iou, all_contrastive = [], [], []
        for frames, spans in self.windows(encoded):                     # [w, T, D], [w, P, 2]
            iou, contrastive = self.run.retriever.moments(frames)       # [w, J, P] each
            all_spans.append(spans.flatten(0, 1))
            all_iou.append(iou.transpose(1, 2).cpu().flatten(0, 1))     # [w * P, J]
            all_contrastive.append(contrastive.transpose(1, 2).cpu().flatten(0, 1))
        return torch.cat(all_spans), torch.cat(all_iou), torch.cat(all_contrastive)

    def scores(self, encoded: Encoded, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """The spans of all moments [W * P, 2] in seconds and their scores [S, W * P]."""
        spans, iou, contrastive = self.moments(encoded)                 # [W * P, 2 or J]
        iou_text, contrastive_text = self.read(sentences)               # [S, J] each
        overlap = torch.sigmoid(mmn.SCORE_SCALE * (iou_text.cpu() @ iou.T))     # Eq. 6
        return spans, mmn.fuse(overlap, contrastive_text.cpu() @ contrastive.T)

    @torch.no_grad()
    def fused(self, encoded: Encoded, sentences: list[str], scores: Tensor) -> Tensor:
        """`scores` together with those of CLIP alone, [S, W * P]. For ranking the moments of one
        sentence only: a sum of z does not tell whether anything matches."""
        tokens = checked_tokens(sentences, self.image_tower.tokenize).to(self.device)
        text = F.normalize(self.image_tower.encode_text(tokens), dim=1)         # [S, D]
        smooth_sec = untrained.smooth_sec_of(self.run.config["dataset"])
        all_alone = []
        for frames, _ in self.windows(encoded):                         # [w, T, D]
            similarity = torch.einsum("sd,wtd->swt", text, frames)      # [S, w, T]
            similarity = untrained.smoothed(similarity, encoded.each_sec, smooth_sec)
            alone = untrained.contrast_map(similarity.flatten(0, 1), self.N)    # [S * w, N, N]
            alone = self.run.retriever.at_candidates(alone)             # [S * w, P]
            all_alone.append(alone.view(len(text), -1).cpu())
        weight = self.run.checkpoint["clip_weight"]
        return untrained.fuse_with_clip(scores, torch.cat(all_alone, 1), weight)

    def predict(self, encoded: Encoded, sentences: str | list[str],
                top_k: int = 5) -> list[Moment] | list[list[Moment]]:
        """See ZeroShot."""
        if isinstance(sentences, str):
            return self.predict(encoded, [sentences], top_k)[0]
        spans, scores = self.scores(encoded, sentences)                 # [W * P, 2], [S, W * P]
        order = scores
        if self.fuse_clip:
            order = self.fused(encoded, sentences, scores)
        answers = []
        for row, shown in zip(order, scores):
            best = greedy_nms(spans, row, top_k)
            answers.append([Moment(*spans[k].tolist(), shown[k].item()) for k in best])
        return answers

    def generic_best(self, encoded: Encoded) -> Tensor:
        """See ZeroShot."""
        return self.scores(encoded, self.generic)[1].amax(1)

    def grid_sec(self, encoded: Encoded) -> float:
        """See ZeroShot."""
        return encoded.each_sec * self.T / self.N

    def curve(self, encoded: Encoded, sentences: list[str]) -> Tensor:
        """See ZeroShot: the best score of a moment at each frame, [S, F]."""
        spans, scores = self.scores(encoded, sentences)                 # [W * P, 2], [S, W * P]
        at_sec = (torch.arange(len(encoded.frames)) + 0.5) * encoded.each_sec       # [F]
        inside = (spans[:, :1] <= at_sec) & (at_sec < spans[:, 1:])     # [W * P, F]
        return torch.stack([torch.where(inside, row[:, None], 0).amax(0) for row in scores])


def greedy_nms(spans: Tensor, scores: Tensor, top_k: int, video_of: list | None = None,
               per_video: int | None = None) -> list[int]:
    """Indices of the best moments, none of which overlaps a better one of its video by more than
    NMS; at most `per_video` of each video.

    spans [n, 2], scores [n]; video_of: the video of each moment (default: one video)"""
    chosen = []
    chosen_in = {}                                                      # video -> its indices
    for k in scores.argsort(descending=True, stable=True).tolist():
        if len(chosen) == top_k:
            break
        own = chosen_in.setdefault(video_of[k] if video_of else 0, [])
        if len(own) == per_video:
            continue
        if not own or mmn.interval_iou(spans[k], spans[own]).max() <= NMS:
            own.append(k)
            chosen.append(k)
    return chosen


# -------------------------------------------------------------------------------- the command line

def add_options(arguments) -> None:
    """The options that retrieve.py and extras/index.py share."""
    add = arguments.add_argument
    add("--device", **options.DEVICE)
    add("--clip", help="without a checkpoint: a published CLIP or a weight file (default "
                       "ViT-B/32); with one: the weight file of its CLIP")
    add = arguments.add_argument_group("without a checkpoint").add_argument
    add("--rate", type=float, default=2.0, help="frames encoded per second of video")
    add("--shortest", type=float, default=1.0, help="minimum length of a moment, seconds")
    add("--longest", type=float, default=300.0, help="maximum, seconds; at most half the video")
    add("--gelu", action="store_true", help="the weights were trained with GELU, as LAION's are")


def retriever_of(given, checkpoint: str | None, cache: str | None,
                 fuse_clip: bool = False) -> Retriever | ZeroShot:
    """The retriever that the options name."""
    if checkpoint:
        return Retriever(checkpoint, given.device, given.clip, cache, fuse_clip)
    if fuse_clip:
        raise Mistake("--fuse-clip adds CLIP to a checkpoint; name one, or omit --fuse-clip")
    return ZeroShot(given.clip or "ViT-B/32", given.device, given.rate, given.shortest,
                    given.longest, cache=cache, gelu=given.gelu)


def main() -> None:
    arguments = options.parser(
        "find the moments of a video that sentences describe",
        usage="%(prog)s [CKPT.pt] VIDEO SENTENCE [SENTENCE ...]",
        epilog="a folder of videos: python -m extras.index, then python -m extras.search")
    add = arguments.add_argument
    add("inputs", nargs="+", metavar="INPUT",
        help="a checkpoint (or none: CLIP alone), a video file, and what to look for")
    add("--checkpoint", help="ckpt.pt of a run")
    add("--fuse-clip", action="store_true", help="add the scores of CLIP alone to a checkpoint's")
    add("--top", type=int, default=5, help="moments per sentence")
    add("--cache", default=CACHE, help="folder for the features of videos; '': no cache")
    add("--json", action="store_true", help="print JSON")
    add("--plot", metavar="PNG", help="plot a film strip, scores and moments")
    add("--html", metavar="FILE", help="write a page with the video and a button for each moment")
    add("--clips", metavar="DIR", help="write each moment as an mp4 file")
    add("--padding", type=float, default=0.0, help="seconds before and after a moment in its clip")
    add_options(arguments)
    given = arguments.parse_args()
    with reported():
        run(given)


def run(given) -> None:
    if given.top < 1:
        raise Mistake(f"--top must be at least 1, not {given.top}")
    if not 0 <= given.padding < float("inf"):
        raise Mistake(f"--padding must be a number of seconds, not {given.padding}")
    inputs, checkpoint = given.inputs, given.checkpoint
    if not checkpoint and pathlib.Path(inputs[0]).suffix == ".pt":
        checkpoint, inputs = inputs[0], inputs[1:]
    if len(inputs) < 2:
        raise Mistake("pass a video and a sentence: retrieve.py video.mp4 \"a person sits down\"")
    path = inputs[0]
    sentences = inputs[1:]
    checked_video(path)                                     # before a download starts
    checked_tokens(sentences)
    retriever = retriever_of(given, checkpoint, given.cache or None, given.fuse_clip)
    encoded = retriever.encode(path)
    answers = answers_of(retriever, encoded, sentences, given.top)
    if given.json:
        print(json.dumps(show.as_json(encoded, retriever, answers)))
    else:
        print(show.as_text(encoded, retriever, answers))
    if given.plot:
        show.plot(given.plot, retriever, encoded, answers, FOUND)
    if given.html:
        show.write_page(given.html, encoded, retriever.grid_sec(encoded), answers)
    if given.clips:
        show.write_clips(given.clips, encoded, answers, given.padding)


if __name__ == "__main__":
    main()
