"""Your video and your sentence: when does it happen?

    python retrieve.py ckpt.pt video.mp4 "a person opens the door" "she sits down"
    python retrieve.py ckpt.pt video.mp4 "a person opens the door" --plot out.png --html out.html

    r = Retriever("ckpt.pt")
    video = r.encode("a.mp4")
    moments = r.predict(video, "a person opens the door")       # [Moment(start_sec, ...), ...]

For a folder of videos see extras/index.py and extras/search.py.

The checkpoint names its CLIP, whose image tower is loaded; the features of a video are cached under
a hash of the file's content and of the extractor. A video that is much longer than those the model
was trained on is covered by windows of their length that overlap by half.

Shapes: F features of a video, W windows of T of them, P candidate moments of a window, S sentences,
J width of MMN's joint space.
"""
import support  # first, for a Ctrl-C while torch is imported
import base64
import hashlib
import html
import json
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
import data
import evaluate
import mmn
import video
from support import files, options, parallel
from support.errors import Mistake, reported
from support.text import printable

NMS = 0.5 + 1e-6        # drop moments with a higher IoU with a better one (as in R@5)
LONGER = 1.5            # a video of up to so many times the trained length is one window


class Moment(NamedTuple):
    """An answer. `score`, in [0, 1), is for ranking the moments of one checkpoint only; it is not a
    probability."""
    start_sec: float
    end_sec: float
    score: float


class Encoded(NamedTuple):
    """A video as the retriever sees it: F features [F, D], L2-normalised, one every `each_sec`
    seconds, and the index of each window's first feature."""
    path: str
    duration_sec: float
    each_sec: float
    frames: Tensor
    starts: list[int]


class Retriever:
    """A checkpoint of train.py, ready for videos.

    clip_file  the weights of its CLIP, if they are not found by name
    cache      folder for the features of videos; None: no cache
    """

    def __init__(self, checkpoint: str | os.PathLike, device: str = "auto",
                 clip_file: str | None = None,
                 cache: str | os.PathLike | None = "~/.cache/visual-dynamic-injection"):
        self.device = parallel.pick_device(device)
        self.run = evaluate.load(checkpoint, self.device)
        self.made, config = self.run.checkpoint["features"], self.run.config
        if not self.made["resolution"]:
            raise Mistake(f"the frame features of this checkpoint come from {self.made['clip']}, "
                          f"which cannot be run on a video here; use one trained on a CLIP's")
        self.T, self.N = config["frames"], config["num_clips"]
        self.window_sec = self.run.checkpoint["window_sec"]
        self.cache = pathlib.Path(cache).expanduser() if cache else None
        self.image_tower, self.clip_file = None, clip_file

    def load_image_tower(self) -> clip.CLIP:
        """The checkpoint's CLIP, loaded when first needed. Mistake, naming the weights, if they are
        missing or others."""
        if self.image_tower is not None:
            return self.image_tower
        name, digest = self.made["clip"], self.run.checkpoint["clip_sha256"]
        path = self.clip_file or data.clip_file(name, self.run.config["root"])
        try:
            path = clip.download(path) if path in clip.PUBLISHED else path
            actual = clip.sha256(path)
        except (OSError, Mistake) as error:
            raise Mistake(f"this checkpoint needs the weights of the CLIP {name!r}, SHA-256 "
                          f"{digest}, which are not where they were in training (root "
                          f"{self.run.config['root']}, {error}); name their file with "
                          f"--clip") from error
        if actual != digest:
            raise Mistake(f"{path} is another CLIP than the one this checkpoint was trained with: "
                          f"its SHA-256 is {actual}, not {digest}; name the right file with --clip")
        self.image_tower = clip.load(path, self.device)
        return self.image_tower

    def encode(self, path: str | os.PathLike) -> Encoded:
        """The features of a video file, cached or made. VideoError if it cannot be read."""
        path = pathlib.Path(path)
        if path.is_dir():
            raise Mistake(f"{path} is a folder; to search the videos in it, see: python -m "
                          f"extras.index --help")
        if not path.is_file():
            raise Mistake(f"there is no video {path}")
        kept = self.cache / f"{self.key(path)}.npz" if self.cache else None
        frames = None
        if kept and kept.exists():
            try:
                with np.load(kept, allow_pickle=False) as file:
                    frames = torch.from_numpy(file["frames"])
                    duration_sec = float(file["duration_sec"])
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                frames = None                           # damaged: made again
        if frames is None:
            frames, duration_sec = self.extract(path)
            if kept:
                try:
                    files.save(kept, lambda file: np.savez(
                        file, frames=frames.numpy(), duration_sec=duration_sec))
                except OSError as error:
                    print(f"note: the features were not cached: {error}", file=sys.stderr)
        frames = F.normalize(frames.float(), dim=1)
        last = len(frames) - self.T
        starts = [*range(0, last, max(1, self.T // 2)), last] if last else [0]
        return Encoded(str(path), duration_sec, duration_sec / len(frames), frames, starts)

    def key(self, path: pathlib.Path) -> str:
        """A hash of the file's content and of everything that determines its features."""
        extractor = [self.run.checkpoint["clip_sha256"], self.T, self.window_sec]
        return hashlib.sha256(f"{clip.sha256(path)} {extractor}".encode()).hexdigest()[:32]

    def extract(self, path: pathlib.Path) -> tuple[Tensor, float]:
        """A video file -> F features [F, D], float16, and its duration. F is T; for a long video it
        is larger, so that the features are as dense as in training."""
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
        """x^q of the sentences, [S, D]. Mistake for an empty one."""
        for sentence in sentences:
            if not sentence.strip():
                raise Mistake("a sentence is empty; say what to look for")
            if len(clip.encode(sentence)) > 75:
                print(f"note: the text tower reads 77 tokens, so the end of \"{sentence[:60]}...\" "
                      f"is ignored", file=sys.stderr)
        tokens = self.run.text.tokenize(sentences, truncate=True)
        x = self.run.text.encode_text(tokens.to(self.device))
        return F.normalize(x, dim=1)

    @torch.no_grad()
    def read(self, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """Both heads' unit vectors of the sentences: two of [S, J]. MMN only."""
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
        two of [W * P, J]. MMN only, whose moments do not depend on the sentence."""
        parts = [(spans, *(x.transpose(1, 2).cpu() for x in self.run.retriever.moments(frames)))
                 for frames, spans in self.windows(encoded)]            # [w, P, 2], [w, P, J] twice
        return tuple(torch.cat(x).flatten(0, 1) for x in zip(*parts))

    @torch.no_grad()
    def scores(self, encoded: Encoded, sentences: list[str]) -> tuple[Tensor, Tensor]:
        """The spans of all moments [W * P, 2] in seconds and their scores [S, W * P]."""
        text, model, all_spans, all_scores = self.text(sentences), self.run.retriever, [], []
        for frames, spans in self.windows(encoded):                     # [w, T, D], [w, P, 2]
            video_of = torch.arange(len(frames), device=self.device).repeat(len(text))  # [S * w]
            scores = model.scores(frames, text.repeat_interleave(len(frames), 0),
                                  video_of)                             # [S * w, N, N]
            all_spans.append(spans.flatten(0, 1))
            all_scores.append(model.at_candidates(scores).view(len(text), -1).cpu())
        return torch.cat(all_spans), torch.cat(all_scores, 1)

    def predict(self, encoded: Encoded, sentences: str | list[str],
                top_k: int = 5) -> list[Moment] | list[list[Moment]]:
        """The best moments, best first: a list for a sentence, a list of lists for several."""
        several = [sentences] if isinstance(sentences, str) else list(sentences)
        spans, scores = self.scores(encoded, several)
        answers = [[Moment(*spans[k].tolist(), row[k].item())
                    for k in greedy_nms(spans, row, top_k)] for row in scores]
        return answers[0] if isinstance(sentences, str) else answers


def greedy_nms(spans: Tensor, scores: Tensor, top_k: int, video_of: list | None = None,
               per_video: int | None = None) -> list[int]:
    """Indices of the best moments, none of which overlaps a better one of its video by more than
    NMS; at most `per_video` of each video.

    spans [n, 2], scores [n]; video_of: the video of each moment (default: one video)"""
    chosen, chosen_in = [], {}
    for k in scores.argsort(descending=True, stable=True).tolist():
        if len(chosen) == top_k:
            break
        own = chosen_in.setdefault(video_of[k] if video_of else None, [])
        if len(own) == per_video:
            continue
        if not own or mmn.interval_iou(spans[k], spans[own]).max() <= NMS:
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
    name, length = printable(encoded.path), clock(encoded.duration_sec)
    lines = [f"{name}, {length} long; moments start and end on a grid of {resolution_sec:.2f} s"]
    for sentence, moments in zip(sentences, answers):
        lines += ["", f"\"{printable(sentence)}\"",
                  "       start       end   score (for ranking only; not a probability)"]
        lines += [f"{k:3d} {clock(m.start_sec):>8s}  {clock(m.end_sec):>8s}   {m.score:.3f}"
                  for k, m in enumerate(moments, 1)]
    return "\n".join(lines)


def plot(path: str, retriever: Retriever, encoded: Encoded, sentences: list[str],
         answers: list[list[Moment]]) -> None:
    """A film strip; and for each sentence the score over time, the moments as bars, and the 2D map
    of the window with the best one, whose cell is marked."""
    plt = files.pyplot()
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
        curve.set_title(f"\"{printable(sentence)}\": best score of a moment at each "
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
    files.save_figure(figure, path)


PAGE = files.ASSETS / "page.html"
EMBEDDED = 32 * 2 ** 20         # a larger video is linked from the page instead of embedded in it


def as_page(out: str, encoded: Encoded, resolution_sec: float, sentences: list[str],
            answers: list[list[Moment]]) -> str:
    """One html page with the video, the sentences, and a button for each moment."""
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
                        f"{html.escape(printable(sentence))}</h2>\n{buttons}</section>")
    return string.Template(PAGE.read_text(encoding="utf-8")).substitute(
        name=html.escape(printable(path.name)), source=html.escape(source),
        resolution=f"{resolution_sec:.2f}", sections="\n".join(sections))


def write_clips(folder: str, path: str, answers: list[list[Moment]]) -> list[pathlib.Path]:
    """Each moment as an mp4 file: <video>-<sentence>-<rank>.mp4, both numbered from 1."""
    folder, stem = pathlib.Path(folder), pathlib.Path(path).stem
    moments = {folder / f"{stem}-{i}-{k}.mp4": moment for i, row in enumerate(answers, 1)
               for k, moment in enumerate(row, 1)}
    for out in moments:
        if out.exists():
            raise Mistake(f"{out} already exists; choose another folder for --clips")
    folder.mkdir(parents=True, exist_ok=True)
    with video.open_video(path) as source:
        rate = min(60, max(10, round(source.streams.video[0].average_rate or 25)))
    for out, moment in moments.items():
        times_sec = np.arange(moment.start_sec, moment.end_sec, 1 / rate)
        video.write_video(out, video.frames_at(path, times_sec), rate)
    return list(moments)


# -------------------------------------------------------------------------------- the command line

def main() -> None:
    arguments = options.parser(
        "find the moments of a video that sentences describe",
        epilog="a folder of videos: python -m extras.index, then python -m extras.search")
    add = arguments.add_argument
    add("checkpoint", help="ckpt.pt of a run")
    add("video", help="a video file")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=5, help="moments per sentence")
    add("--device", **options.DEVICE)
    add("--clip", help="file of the CLIP's weights (default: where training found them)")
    add("--cache", default="~/.cache/visual-dynamic-injection",
        help="folder for the features of videos; '': no cache")
    add("--json", action="store_true", help="print json")
    add("--jsonl", metavar="FILE", help="write QVHighlights' submission form")
    add("--plot", metavar="PNG", help="draw film strip, scores, 2D map, moments")
    add("--html", metavar="FILE", help="write a page with the video and a button for each moment")
    add("--clips", metavar="DIR", help="write each moment as an mp4 file")
    given = arguments.parse_args()
    with reported():
        run(given)


def run(given) -> None:
    if given.top < 1:
        raise Mistake(f"--top must be at least 1, not {given.top}")
    retriever = Retriever(given.checkpoint, given.device, given.clip, given.cache or None)
    encoded = retriever.encode(given.video)
    answers = retriever.predict(encoded, given.sentences, given.top)
    resolution_sec = encoded.each_sec * retriever.T / retriever.N
    if given.json:
        results = [{"sentence": sentence, "moments": [m._asdict() for m in moments]}
                   for sentence, moments in zip(given.sentences, answers)]
        print(json.dumps({"video": given.video, "duration_sec": encoded.duration_sec,
                          "resolution_sec": resolution_sec, "results": results}))
    else:
        print(as_text(encoded, resolution_sec, given.sentences, answers))
    if given.jsonl:
        name, rows = pathlib.Path(given.video).stem, zip(given.sentences, answers)
        files.save(given.jsonl, "".join(evaluate.submission(i, sentence, name, moments)
                                        for i, (sentence, moments) in enumerate(rows)))
    if given.plot:
        plot(given.plot, retriever, encoded, given.sentences, answers)
    if given.html:
        files.save(given.html, as_page(given.html, encoded, resolution_sec, given.sentences,
                                       answers))
    if given.clips:
        write_clips(given.clips, given.video, answers)


if __name__ == "__main__":
    main()
