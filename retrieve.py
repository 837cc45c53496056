"""Your video and your sentence: when does it happen? And: in which of many videos?

    python retrieve.py ckpt.pt video.mp4 "a person opens the door" "she sits down"
    python retrieve.py ckpt.pt video.mp4 "a person opens the door" --plot out.png --html out.html
    python retrieve.py index ckpt.pt DIR --out index/           # once for a folder of videos
    python retrieve.py search index/ "a person opens the door"

    r = Retriever("ckpt.pt")
    video = r.encode("a.mp4")
    moments = r.predict(video, "a person opens the door")       # [Moment(start_sec, ...), ...]

The image tower is rebuilt from what the checkpoint says, and the features of a video are kept in a
cache under a key of the file's content and of the extractor. A video that is much longer than those
the model was trained on is covered by windows of their length that overlap by half.

Neither of MMN's two embeddings of a moment depends on the sentence (Eq. 6, 9), so an index holds
those of all moments of all videos, and a search is a product with two vectors.

Shapes: F features of a video, W windows of T of them, P candidate moments of a window, S sentences,
R moments of an index (rows), J width of MMN's joint space.
"""
import base64
import bisect
import hashlib
import html
import json
import math
import mimetypes
import os
import pathlib
import string
import sys
import urllib.parse
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import clip
import command
import data
import evaluate
import mmn
import video

NMS = 0.5 + 1e-6                # moments that overlap a better one by more are left out (as in R@5)
ROUNDING = 1e-3                 # a cosine of float16 vectors is off by this much at most
LONGER = 1.5                    # a video up to so many times the trained length is one window


class Moment(NamedTuple):
    """An answer. `score` ranks the moments of one checkpoint, in [0, 1); it is no probability."""
    start_sec: float
    end_sec: float
    score: float


class Encoded(NamedTuple):
    """A video as the retriever sees it: F features [F, D], L2-normalised, each for `each_sec`
    seconds, and the feature at which each window of T begins."""
    path: str
    duration_sec: float
    each_sec: float
    frames: Tensor
    starts: list[int]


class Retriever:
    """A checkpoint of train.py, ready for videos.

    clip_file  the weights of its CLIP, where they are not found by name
    cache      folder of features of videos; None: no cache
    """

    def __init__(self, checkpoint: str | os.PathLike, device: str = "auto",
                 clip_file: str | None = None,
                 cache: str | os.PathLike | None = "~/.cache/visual-dynamic-injection"):
        self.device = data.pick_device(device)
        self.run = evaluate.load(checkpoint, self.device)
        self.made, config = self.run.checkpoint["features"], self.run.config
        self.T, self.N = config["frames"], config["num_clips"]
        self.window_sec = self.run.checkpoint["window_sec"]
        self.cache = pathlib.Path(cache).expanduser() if cache else None
        self.image_tower, self.clip_file = None, clip_file

    def load_image_tower(self) -> clip.CLIP:
        """The checkpoint's CLIP, loaded when first needed. Errors name the missing weights."""
        if self.image_tower is not None:
            return self.image_tower
        name, digest = self.made["clip"], self.run.checkpoint["clip_sha256"]
        path = self.clip_file or data.clip_file(name, self.run.config["root"])
        try:
            path = clip.download(path) if path in clip.PUBLISHED else path
            found = clip.sha256(path)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"this checkpoint needs the weights of the CLIP {name!r}, "
                                    f"SHA-256 {digest}, which are not where they were in training "
                                    f"(root {self.run.config['root']}, {error}); name their file "
                                    f"with --clip") from error
        if found != digest:
            raise ValueError(f"{path} is another CLIP than the one this checkpoint was trained "
                             f"with: its SHA-256 is {found}, not {digest}; name the right file "
                             f"with --clip")
        self.image_tower = clip.load(path, self.device)
        return self.image_tower

    def encode(self, path: str | os.PathLike) -> Encoded:
        """The features of a video file, from the cache or made. VideoError for what is no video."""
        path = pathlib.Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; for the videos in it see retrieve.py "
                                    f"index --help")
        if not path.is_file():
            raise FileNotFoundError(f"there is no video {path}")
        kept = self.cache / f"{self.key(path)}.npz" if self.cache else None
        frames = None
        if kept and kept.exists():
            try:
                with np.load(kept, allow_pickle=False) as file:
                    frames = torch.from_numpy(file["frames"])
                    duration_sec = float(file["duration_sec"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                frames = None                                           # damaged: made anew
        if frames is None:
            frames, duration_sec = self.extract(path)
            if kept:
                try:
                    command.save(kept, lambda file: np.savez(
                        file, frames=frames.numpy(), duration_sec=duration_sec))
                except OSError as error:
                    print(f"note: the features are not kept: {error}", file=sys.stderr)
        frames = frames.float()
        frames = F.normalize(frames, dim=1) if self.run.config["normalise"] else frames
        last = len(frames) - self.T
        starts = [*range(0, last, max(1, self.T // 2)), last] if last else [0]
        return Encoded(str(path), duration_sec, duration_sec / len(frames), frames, starts)

    def key(self, path: pathlib.Path) -> str:
        """Of the content of a file and of all that decides its features."""
        extractor = [self.run.checkpoint["clip_sha256"], self.T, self.window_sec]
        return hashlib.sha256(f"{clip.sha256(path)} {extractor}".encode()).hexdigest()[:32]

    def extract(self, path: pathlib.Path) -> tuple[Tensor, float]:
        """A video file -> F features [F, D], float16, and its duration. F is T, or for a long video
        as many as keep the features as dense as in training."""
        model = self.load_image_tower()
        duration_sec = video.probe_duration(path)
        count = self.T
        if duration_sec > LONGER * self.window_sec:
            count = round(self.T * duration_sec / self.window_sec)
        features, pixels = [], []
        times_sec = video.frame_centres(duration_sec, count)
        bar = tqdm(video.frames_at(path, times_sec), total=count, desc=path.name, unit="frame",
                   disable=None)
        for frame in bar:
            pixels.append(clip.crop(frame[None], model.visual.resolution))
            if len(pixels) == 32 or len(features) * 32 + len(pixels) == count:
                features.append(video.encode_frames(model, torch.cat(pixels))[0])
                pixels = []
        return torch.cat(features), duration_sec

    @torch.no_grad()
    def text(self, sentences: list[str]) -> Tensor:
        """x^q of the sentences, [S, D]. ValueError for an empty one."""
        for sentence in sentences:
            if not sentence.strip():
                raise ValueError("a sentence is empty; say what to look for")
            if len(clip.encode(sentence)) > 75:
                print(f"note: CLIP reads 77 tokens, so the end of \"{sentence[:60]}...\" is cut "
                      f"off", file=sys.stderr)
        x = self.run.text.encode_text(clip.tokenize(sentences, truncate=True).to(self.device))
        return F.normalize(x, dim=1) if self.run.config["normalise"] else x

    @torch.no_grad()
    def read(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Both heads' unit vectors of the sentences: two of [S, J]. Of MMN only."""
        return self.run.retriever.sentences(self.text(sentences))

    def windows(self, encoded: Encoded) -> Iterator[tuple[Tensor, Tensor]]:
        """Up to 16 windows at a time: frames [w, T, D], their moments in seconds [w, P, 2]."""
        cells = self.run.retriever.cells.cpu()
        corners = torch.stack([cells // self.N, cells % self.N + 1], 1)         # [P, 2] clips
        corners = corners * (self.T / self.N)                                   # features
        for i in range(0, len(encoded.starts), 16):
            starts = encoded.starts[i:i + 16]
            spans = torch.stack([(corners + s) * encoded.each_sec for s in starts])
            yield (torch.stack([encoded.frames[s:s + self.T] for s in starts]).to(self.device),
                   spans.clamp(max=encoded.duration_sec))

    @torch.no_grad()
    def moments(self, encoded: Encoded) -> tuple[Tensor, Tensor, Tensor]:
        """All moments of a video: (start, end) in seconds [W * P, 2], and both heads' unit vectors,
        two of [W * P, J]. Of MMN only, whose moments do not depend on a sentence."""
        parts = [(spans, *(x.transpose(1, 2).cpu() for x in self.run.retriever.moments(frames)))
                 for frames, spans in self.windows(encoded)]            # [w, P, 2], [w, P, J] twice
        return tuple(torch.cat(x).flatten(0, 1) for x in zip(*parts))

    @torch.no_grad()
    def scores(self, encoded: Encoded, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """The spans of all moments [W * P, 2] in seconds and their scores [S, W * P]."""
        text, model, all_spans, all_scores = self.text(sentences), self.run.retriever, [], []
        for frames, spans in self.windows(encoded):                     # [w, T, D], [w, P, 2]
            video_of = torch.arange(len(frames), device=self.device).repeat(len(text))  # [S * w]
            scores = model.scores(frames, text.repeat_interleave(len(frames), 0), video_of,
                                  self.run.config["fusion"])            # [S * w, N, N]
            all_spans.append(spans.flatten(0, 1))
            all_scores.append(model.at_candidates(scores).view(len(text), -1).cpu())
        return torch.cat(all_spans), torch.cat(all_scores, 1)

    def predict(self, encoded: Encoded, sentences: str | list[str],
                top_k: int = 5) -> list[Moment] | list[list[Moment]]:
        """The best moments, best first: a list for one sentence, a list of lists for several."""
        several = [sentences] if isinstance(sentences, str) else list(sentences)
        spans, scores = self.scores(encoded, several)
        answers = [[Moment(*spans[k].tolist(), row[k].item())
                    for k in greedy_nms(spans, row, top_k)] for row in scores]
        return answers[0] if isinstance(sentences, str) else answers


def greedy_nms(spans: Tensor, scores: Tensor, top_k: int, video_of: list | None = None,
               per_video: int | None = None) -> list[int]:
    """Indices of the best moments, each overlapping no better one of its video by more than NMS, at
    most `per_video` of a video. spans [n, 2], scores [n]; video_of [n] (default: one video)."""
    chosen, of = [], {}
    for k in scores.argsort(descending=True, stable=True).tolist():
        if len(chosen) == top_k:
            break
        own = of.setdefault(video_of and video_of[k], [])
        if len(own) != per_video and (not own or mmn.interval_iou(spans[k],
                                                                  spans[own]).max() <= NMS):
            own.append(k)
            chosen.append(k)
    return chosen


# -------------------------------------------------------------------------------------- the answers

def clock(seconds: float) -> str:
    """m:ss.s, or h:mm:ss.s."""
    tenths = round(10 * seconds)
    hours, minutes, rest = tenths // 36000, tenths // 600 % 60, tenths % 600 / 10
    return f"{hours}:{minutes:02d}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def as_text(encoded: Encoded, resolution_sec: float, sentences: list[str],
            answers: list[list[Moment]]) -> str:
    name, length = command.printable(encoded.path), clock(encoded.duration_sec)
    lines = [f"{name}, {length} long; moments begin and end on steps of {resolution_sec:.2f} s"]
    for sentence, moments in zip(sentences, answers):
        lines += ["", f"\"{command.printable(sentence)}\"",
                  "       start       end   score (a rank, no probability)"]
        lines += [f"{k:3d} {clock(m.start_sec):>8s}  {clock(m.end_sec):>8s}   {m.score:.3f}"
                  for k, m in enumerate(moments, 1)]
    return "\n".join(lines)


def plot(path: str, retriever: Retriever, encoded: Encoded, sentences: list[str],
         answers: list[list[Moment]]) -> None:
    """A film strip; and for each sentence the score over time, the moments as bars, and the 2D map
    of the window that holds the best one, with its cell."""
    plt = video.pyplot()
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    spans, scores = retriever.scores(encoded, sentences)
    N, windows, rows = retriever.N, len(encoded.starts), len(sentences)
    figure = plt.figure(figsize=(13, 1.9 + 2.6 * rows))
    grid = figure.add_gridspec(rows + 1, 2, width_ratios=(4, 1), height_ratios=[1.1] + [2] * rows)
    strip = figure.add_subplot(grid[0, 0])
    times_sec = video.frame_centres(encoded.duration_sec, 9)
    frames = [clip.crop(frame[None], 96)[0].permute(1, 2, 0).numpy()
              for frame in video.frames_at(encoded.path, times_sec)]
    strip.imshow(np.concatenate(frames, 1), extent=(0, encoded.duration_sec, 0, 1), aspect="auto")
    strip.set(yticks=[], xticks=[])
    strip.set_title(pathlib.Path(encoded.path).name, loc="left", parse_math=False)
    at = torch.from_numpy(video.frame_centres(encoded.duration_sec, 400))
    inside = (spans[:, :1] <= at) & (at < spans[:, 1:])                 # [W * P, 400]
    for i, (sentence, moments) in enumerate(zip(sentences, answers)):
        curve = figure.add_subplot(grid[i + 1, 0])
        best = torch.where(inside, scores[i][:, None], 0).amax(0)
        top = max(1e-9, scores[i].max().item())
        curve.plot(at, best / top, color="black", linewidth=1)
        for k, moment in enumerate(moments):
            curve.barh(-0.09 * (k + 1), moment.end_sec - moment.start_sec, 0.07, moment.start_sec,
                       color=f"C{k}")
            curve.text(moment.end_sec, -0.09 * (k + 1), f" {k + 1}", va="center", fontsize=8)
        curve.set(xlim=(0, encoded.duration_sec), ylim=(-0.09 * (len(moments) + 1), 1.02))
        curve.set_yticks((0, 0.5, 1), [f"{share * top:.2g}" for share in (0, 0.5, 1)])
        curve.set_title(f"\"{command.printable(sentence)}\": best score of a moment at each "
                        f"instant", loc="left", fontsize=10, parse_math=False)
        curve.set_xlabel("seconds")
        picture = figure.add_subplot(grid[i + 1, 1])
        winner = int(scores[i].argmax())
        window, cell = divmod(winner, len(spans) // windows)
        shown = np.full(N * N, np.nan)
        cells = retriever.run.retriever.cells.cpu()
        shown[cells] = scores[i].unflatten(0, (windows, -1))[window]
        picture.imshow(shown.reshape(N, N), vmin=0, vmax=top, cmap="viridis")
        start, end = divmod(int(cells[cell]), N)
        picture.plot(end, start, "s", markersize=9, markerfacecolor="none", color="red")
        picture.set(xlabel="last clip", ylabel="first clip", xticks=(0, N - 1), yticks=(0, N - 1))
        if windows > 1:
            picture.set_title(f"window {window + 1} of {windows}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


PAGE = pathlib.Path(__file__).parent / "assets" / "page.html"
EMBEDDED = 32 * 2 ** 20         # a larger video is not copied into the page but named by it


def as_page(out: str, encoded: Encoded, resolution_sec: float, sentences: list[str],
            answers: list[list[Moment]]) -> str:
    """One html page with the video, the sentences, and a button a moment."""
    path = pathlib.Path(encoded.path)
    kind = mimetypes.guess_type(path.name)[0] or "video/mp4"
    if path.stat().st_size <= EMBEDDED:
        source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    else:
        source = urllib.parse.quote(os.path.relpath(path, pathlib.Path(out).resolve().parent))
    sections = []
    for i, (sentence, moments) in enumerate(zip(sentences, answers)):
        buttons = "\n".join(
            f"<button type=\"button\" aria-pressed=\"false\" data-start=\"{m.start_sec:.3f}\" "
            f"data-end=\"{m.end_sec:.3f}\">{clock(m.start_sec)} to {clock(m.end_sec)} "
            f"(score {m.score:.2f})</button>" for m in moments)
        sections.append(f"<section aria-labelledby=\"s{i}\"><h2 id=\"s{i}\">"
                        f"{html.escape(command.printable(sentence))}</h2>\n{buttons}</section>")
    return string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        name=html.escape(command.printable(path.name)), source=html.escape(source),
        resolution=f"{resolution_sec:.2f}", sections="\n".join(sections))


def write_clips(folder: str, path: str, answers: list[list[Moment]]) -> list[pathlib.Path]:
    """Each moment as an mp4 of its own: <video>-<sentence>-<rank>.mp4, both from 1."""
    folder, stem = pathlib.Path(folder), pathlib.Path(path).stem
    moments = {folder / f"{stem}-{i}-{k}.mp4": moment for i, row in enumerate(answers, 1)
               for k, moment in enumerate(row, 1)}
    for out in moments:
        if out.exists():
            raise FileExistsError(f"{out} is there already; choose another folder for --clips")
    folder.mkdir(parents=True, exist_ok=True)
    with video.open_video(path) as source:
        rate = min(60, max(10, round(source.streams.video[0].average_rate or 25)))
    for out, moment in moments.items():
        times_sec = np.arange(moment.start_sec, moment.end_sec, 1 / rate)
        video.write_video(out, video.frames_at(path, times_sec), rate)
    return list(moments)


# ------------------------------------------------------------------------------------ many videos

class Index:
    """The moments of many videos, in a folder:

        iou.f16, contrastive.f16    [R, J] float16: unit vectors of either head
        spans.f32                   [R, 2] float32: start and end in seconds
        videos.json                 the checkpoint, J, and for each video: file, size, time of
                                    change, first row, number of rows, duration

    Rows are added at the end, one video at a time; what videos.json does not name does not exist,
    so an interrupted addition leaves nothing."""

    def __init__(self, folder: str | os.PathLike, checkpoint: str | None = None):
        self.folder = pathlib.Path(folder)
        self.table, self.mapped = self.folder / "videos.json", None
        if self.table.exists():
            try:
                self.content = json.loads(self.table.read_text())
                _ = str(self.content["checkpoint"]) + self.content["sha256"]
                places = [(about["first"], about["rows"], self.content["joint"])
                          for about in self.content["videos"].values()]
                if not all(type(n) is int and n >= 0 for place in places for n in place):
                    raise ValueError("a number of rows is none")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{self.table} is damaged ({error}); remove {folder} and index "
                                 f"again") from error
        elif checkpoint is None:
            raise FileNotFoundError(f"{folder} is no index; make one with: python retrieve.py "
                                    f"index ckpt.pt DIR --out {folder}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.content = {"sha256": clip.sha256(checkpoint), "joint": 0, "videos": {}}
        if checkpoint and clip.sha256(checkpoint) != self.content["sha256"]:
            raise ValueError(f"{folder} was made with another checkpoint, "
                             f"{self.content['checkpoint']}; choose another --out")
        if checkpoint:                                          # its file may have moved
            self.content["checkpoint"] = str(pathlib.Path(checkpoint).resolve())

    def rows(self) -> int:
        return max((v["first"] + v["rows"] for v in self.content["videos"].values()), default=0)

    def save(self) -> None:
        self.mapped = None                                      # the files may have changed
        command.save(self.table, json.dumps(self.content, indent=1))

    def add(self, name: str, about: dict, spans: Tensor, iou: Tensor, contrastive: Tensor) -> None:
        first, J = self.rows(), iou.shape[1]
        for file, values in (("iou.f16", iou.half().numpy()), ("spans.f32", spans.float().numpy()),
                             ("contrastive.f16", contrastive.half().numpy())):
            path = self.folder / file
            path.touch()
            with open(path, "r+b") as out:
                out.truncate(first * values.shape[1] * values.itemsize)
                out.seek(0, os.SEEK_END)
                out.write(values.tobytes())
                out.flush()
                os.fsync(out.fileno())
        self.content["joint"] = J
        self.content["videos"][name] = about | {"first": first, "rows": len(spans)}
        self.save()

    def update(self, retriever: Retriever, folder: str | os.PathLike) -> dict[str, str]:
        """Brings the index in step with a folder of videos: new and changed files are read, those
        that are gone are left out. Prints and returns file -> reason of what is not read."""
        files = data.video_files(folder)
        known, failed = self.content["videos"], {}
        if known and not files:
            raise FileNotFoundError(f"{folder} holds no video, and the index holds {len(known)}: "
                                    f"is it the right folder, and is its disk there? To empty "
                                    f"the index remove {self.folder}")
        self.content["folder"] = str(pathlib.Path(folder).resolve())
        for name in list(known):
            same = name in files and not data.state_of(files[name]).items() - known[name].items()
            if not same:
                print(command.printable(f"{'changed' if name in files else 'gone'}: {name}"))
                del known[name]
        self.save()             # before `add` writes over the rows of what is gone
        for name, path in tqdm(files.items(), desc="index", unit="video", disable=None):
            if name in known:
                continue
            about = data.state_of(path)
            try:
                encoded = retriever.encode(path)
            except video.VideoError as error:
                failed[name] = str(error)
                tqdm.write(command.printable(f"failed: {name}: {error}"))
                continue
            self.add(name, about | {"duration_sec": encoded.duration_sec},
                     *retriever.moments(encoded))
        self.save()
        return failed

    def search(self, iou_text: Tensor, contrastive_text: Tensor, top_k: int = 10,
               per_video: int = 3, block: int = 1 << 16, among: set[str] | None = None
               ) -> list[tuple[str, Moment]]:
        """The best moments of all videos for one sentence, best first.

        Exact: a pass in float16, in blocks of rows, gives each moment the best score it could have
        within the rounding; those that could be among the answers are scored again in float32.

        iou_text, contrastive_text  [J] unit vectors (Retriever.read)
        per_video                   answers of one video at most, after NMS
        among                       look only in the videos of these names
        """
        rows, J = self.rows(), self.content["joint"]
        if not rows:
            raise ValueError(f"{self.folder} holds no video")
        if self.mapped is None or len(self.mapped[1]) != rows:
            self.mapped = [
                torch.from_file(str(self.folder / name), False, rows * n, dtype=kind).view(rows, n)
                for name, n, kind in (("iou.f16", J, torch.half), ("spans.f32", 2, torch.float32),
                                      ("contrastive.f16", J, torch.half))]
        iou, spans, contrastive = self.mapped
        videos = sorted((about["first"], about["first"] + about["rows"], name)
                        for name, about in self.content["videos"].items())
        firsts, _, names = zip(*videos)

        def answers(which: Tensor) -> list[tuple[str, Moment]]:
            """The best of the rows `which`, after NMS."""
            scores = mmn.fuse(torch.sigmoid(mmn.SCORE_SCALE * iou[which].float() @ iou_text),
                              contrastive[which].float() @ contrastive_text)
            owner = [names[bisect.bisect_right(firsts, row) - 1] for row in which.tolist()]
            return [(owner[k], Moment(*spans[which[k]].tolist(), scores[k].item()))
                    for k in greedy_nms(spans[which], scores, top_k, owner, per_video)]

        a, b = iou_text.half(), contrastive_text.half()
        bounds = torch.full((-(-rows // 64) * 64,), -math.inf)
        stretches = []                          # of rows that lie side by side
        for start, end, name in videos:
            if among is None or name in among:
                if stretches and stretches[-1][1] == start:
                    stretches[-1][1] = end
                else:
                    stretches.append([start, end])
        for start, end in stretches:
            for first in range(start, end, block):
                part = slice(first, min(first + block, end))
                bounds[part] = mmn.fuse(
                    torch.sigmoid(mmn.SCORE_SCALE * (torch.mv(iou[part], a).float() + ROUNDING)),
                    torch.mv(contrastive[part], b).float() + ROUNDING)
        highest = bounds.view(-1, 64).amax(1)                   # of every 64 rows: fewer to sort
        looked = 128
        while True:
            # no moment that is not looked at can score as much as `unseen`
            unseen = (highest.topk(looked).values[-1].item() if looked < len(highest)
                      else -math.inf)
            found = answers(((bounds >= unseen) & (bounds > -math.inf)).nonzero()[:, 0])
            if unseen == -math.inf or len(found) == top_k and found[-1][1].score >= unseen:
                return found
            looked *= 4


# -------------------------------------------------------------------------------- the command line

def main_index(argv: list[str]) -> None:
    arguments = command.parser("index a folder of videos, or bring an index in step",
                               prog="retrieve.py index")
    add = arguments.add_argument
    add("checkpoint", help="ckpt.pt of a run")
    add("folder", help="folder of videos")
    add("--out", required=True, help="folder of the index")
    add("--device", **command.DEVICE)
    add("--clip", help="file of the CLIP's weights (default: where training found them)")
    options = arguments.parse_args(argv)
    if not pathlib.Path(options.folder).is_dir():
        raise FileNotFoundError(f"there is no folder {options.folder}")
    retriever = Retriever(options.checkpoint, options.device, options.clip, cache=None)
    if (retriever.run.config["retriever"], retriever.run.config["fusion"]) != ("mmn", "published"):
        raise ValueError(f"an index is searched by MMN's two vectors and its published fusion, and "
                         f"{options.checkpoint} has another retriever or another fusion")
    index = Index(options.out, options.checkpoint)
    index.update(retriever, options.folder)
    known = index.content["videos"].values()
    hours = sum(about["duration_sec"] for about in known) / 3600
    print(f"{options.out}: {sum(about['rows'] for about in known)} moments of {len(known)} videos, "
          f"{hours:.2f} hours")


def main_search(argv: list[str]) -> None:
    arguments = command.parser("search an index", prog="retrieve.py search")
    add = arguments.add_argument
    add("index", help="folder of the index")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=10, help="answers a sentence")
    add("--per-video", type=int, default=3, help="answers of one video at most")
    add("--videos", type=int, help="look in so many videos only, those that CLIP2Video ranks first "
                                   "(clip2video.py index CKPT DIR --out INDEX); not given: in all")
    add("--device", **command.DEVICE)
    add("--json", action="store_true", help="print json")
    options = arguments.parse_args(argv)
    if min(options.top, options.per_video, 1 if options.videos is None else options.videos) < 1:
        raise ValueError("--top, --per-video and --videos are at least 1")
    index = Index(options.index)
    checkpoint = index.content["checkpoint"]
    if not pathlib.Path(checkpoint).exists() or clip.sha256(checkpoint) != index.content["sha256"]:
        raise FileNotFoundError(f"the checkpoint of this index is gone or has changed: "
                                f"{checkpoint}, SHA-256 {index.content['sha256']}")
    retriever = Retriever(checkpoint, options.device, cache=None)
    iou_text, contrastive_text = (x.cpu() for x in retriever.read(options.sentences))
    among = [None] * len(options.sentences)
    if options.videos:
        import clip2video                       # only who asks for it needs it
        ranked = clip2video.Ranker(options.index, retriever.device)
        known = index.content["videos"].keys()
        if apart := known ^ set(ranked.names):
            print(f"note: {len(apart)} videos are only in one of both indexes, for instance "
                  f"{command.printable(min(apart))}; they are not looked at. Bring both in step "
                  f"with retrieve.py index and clip2video.py index", file=sys.stderr)
        among = [{name for name, _ in best if name in known}
                 for best in ranked.best(options.sentences, options.videos)]
    results = [index.search(a, b, options.top, options.per_video, among=names)
               for a, b, names in zip(iou_text, contrastive_text, among)]
    if options.json:
        print(json.dumps([{"sentence": sentence, "moments": [
            {"video": name, **moment._asdict()} for name, moment in answers]}
            for sentence, answers in zip(options.sentences, results)]))
        return
    folder = pathlib.Path(index.content["folder"])
    for name in sorted({name for answers in results for name, _ in answers}):
        known, path = index.content["videos"][name], folder / name
        if not path.is_file() or data.state_of(path).items() - known.items():
            print(f"note: {name} is gone or has changed since it was indexed; run index again",
                  file=sys.stderr)
    for sentence, answers in zip(options.sentences, results):
        print(f"\"{command.printable(sentence)}\"\n       start       end   score (a rank)  video")
        for k, (name, m) in enumerate(answers, 1):
            print(f"{k:3d} {clock(m.start_sec):>8s}  {clock(m.end_sec):>8s}   {m.score:.3f}"
                  f"           {command.printable(name)}")


def main_video(argv: list[str]) -> None:
    arguments = command.parser(
        "find the moments of a video that sentences describe", prog="retrieve.py",
        epilog="also: retrieve.py index CKPT DIR --out INDEX; retrieve.py search INDEX SENTENCE")
    add = arguments.add_argument
    add("checkpoint", help="ckpt.pt of a run")
    add("video", help="a video file")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=5, help="moments a sentence")
    add("--device", **command.DEVICE)
    add("--clip", help="file of the CLIP's weights (default: where training found them)")
    add("--cache", default="~/.cache/visual-dynamic-injection",
        help="folder of features of videos that were read before; '' keeps none")
    add("--json", action="store_true", help="print json")
    add("--jsonl", metavar="FILE", help="write QVHighlights' submission form")
    add("--plot", metavar="PNG", help="draw film strip, scores, 2D map, moments")
    add("--html", metavar="FILE", help="write a page with the video and a button a moment")
    add("--clips", metavar="DIR", help="write each moment as an mp4")
    options = arguments.parse_args(argv)
    if options.top < 1:
        raise ValueError(f"--top {options.top} asks for no moment")
    retriever = Retriever(options.checkpoint, options.device, options.clip, options.cache or None)
    encoded = retriever.encode(options.video)
    answers = retriever.predict(encoded, options.sentences, options.top)
    resolution_sec = encoded.each_sec * retriever.T / retriever.N
    if options.json:
        print(json.dumps({"video": options.video, "duration_sec": encoded.duration_sec,
                          "resolution_sec": resolution_sec, "results": [
                              {"sentence": sentence, "moments": [m._asdict() for m in moments]}
                              for sentence, moments in zip(options.sentences, answers)]}))
    else:
        print(as_text(encoded, resolution_sec, options.sentences, answers))
    if options.jsonl:
        name, rows = pathlib.Path(options.video).stem, zip(options.sentences, answers)
        command.save(options.jsonl, "".join(evaluate.submission(i, sentence, name, moments)
                                            for i, (sentence, moments) in enumerate(rows)))
    if options.plot:
        plot(options.plot, retriever, encoded, options.sentences, answers)
    if options.html:
        command.save(options.html, as_page(options.html, encoded, resolution_sec,
                                           options.sentences, answers))
    if options.clips:
        write_clips(options.clips, options.video, answers)


def main() -> None:
    chosen = {"index": main_index, "search": main_search}.get("".join(sys.argv[1:2]))
    with command.sentences():
        chosen(sys.argv[2:]) if chosen else main_video(sys.argv[1:])


if __name__ == "__main__":
    main()
