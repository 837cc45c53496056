"""A video file -> frames -> CLIP features, and the store that keeps them (f^v, paper Sec. 3).

A video is T frames at the centres of T equal parts of its duration, found by timestamp, so that
frame rate and length do not matter. The image tower is frozen (Sec. 4.1.3): features are made once.

    python video.py FILE

prints what the file is, and which of its frames would be sampled and how they would be cropped.

The store is a folder, the same for every dataset:

    <video>.frames.npy    [T, D]          float16, global features x_i^v, not normalised
    <video>.patches.npy   [T', D', H, W]  float16, patch features, T' of the T frames; training
                                          videos only
    manifest.json         how they were made, and for each video its duration and seconds per
                          feature; a cluster's process r > 0 writes manifest-r.json beside it
    failed.txt            the videos that could not be read, with the reason

Files get their names only when they are complete.

Shapes: T frames, D width of CLIP's joint space, D' channels of the patch features, H x W patch
grid, R resolution, L features of a video made elsewhere.
"""
import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import importlib
import json
import math
import multiprocessing
import os
import pathlib
import signal
import time
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


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the reason."""


# ---------------------------------------------------------------------------------- video -> frames

def frame_centres(duration_sec: float, count: int) -> np.ndarray:
    """Where a video is looked at: the centres of `count` equal parts of its duration, seconds."""
    return (np.arange(count) + 0.5) * duration_sec / count


def need(package: str, what: str):
    """A package that only some commands need; RuntimeError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise RuntimeError(f"{what} needs {package}: pip install {package}") from error


def pyav():
    return need("av", "reading videos")


def pyplot():
    """matplotlib.pyplot, which draws into files."""
    need("matplotlib", "drawing").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def open_video(path: str | os.PathLike):
    av = pyav()
    try:
        container = av.open(os.path.abspath(str(path)))         # "12:30.mp4" is no address
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be opened as a video: {error.strerror}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    if multiprocessing.parent_process():            # the workers share the cores among themselves
        container.streams.video[0].codec_context.thread_count = 1
    else:
        container.streams.video[0].thread_type = "AUTO"
    return container


def decoded(container) -> Iterator[tuple[float, object]]:
    """(seconds since the first frame, frame) of all frames, in order. av.FFmpegError: damaged."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    first, count = None, 0
    for frame in container.decode(stream):
        time_sec = frame.time if frame.time is not None else count / rate
        first = time_sec if first is None else first
        count += 1
        yield time_sec - first, frame


def probe_duration(path: str | os.PathLike) -> float:
    """Duration in seconds: the video stream's, else the container's, else by decoding it all."""
    av = pyav()
    with open_video(path) as container:
        stream = container.streams.video[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6                     # the container counts microseconds
        times = []
        with contextlib.suppress(av.FFmpegError):       # the reading of the frames will tell
            times = [time_sec for time_sec, _ in decoded(container)]
        if not times:
            raise VideoError(f"{path} does not decode: not one frame could be read")
        return times[-1] + (times[-1] / (len(times) - 1) if len(times) > 1 else 0.04)


LARGEST = 1 << 30   # bytes of a packed file of features, unpacked
TOLERATED = 0.9     # share of a video that has to decode; its last frame stands for a missing end


def frames_at(path: str | os.PathLike, times_sec: np.ndarray) -> Iterator[Tensor]:
    """For each instant (ascending) the last frame that begins no later: uint8 [3, h, w], RGB.

    Decodes in one pass. VideoError where the frames end before `TOLERATED` of the last instant,
    because the file is damaged or its header claims more than it holds."""
    av = pyav()
    wanted, last, end_sec, damage = 0, None, 0.0, "the file ends there"
    with open_video(path) as container:
        try:
            for time_sec, frame in decoded(container):
                while last is not None and wanted < len(times_sec) and times_sec[wanted] < time_sec:
                    yield to_rgb(last)
                    wanted += 1
                last, end_sec = frame, time_sec
                if wanted == len(times_sec):
                    return
        except av.FFmpegError as error:
            damage = error.strerror
        if last is None:
            raise VideoError(f"{path} does not decode: not one frame could be read ({damage})")
        if getattr(last, "duration", None) and last.time_base:
            end_sec += float(last.duration * last.time_base)
        if end_sec < TOLERATED * times_sec[-1]:
            raise VideoError(f"{path} is damaged: its frames end at {end_sec:.1f} s, and "
                             f"{times_sec[-1]:.1f} s is asked for ({damage})")
        for _ in range(wanted, len(times_sec)):
            yield to_rgb(last)


def to_rgb(frame) -> Tensor:
    """A decoded frame, any pixel format, turned upright: uint8 [3, h, w]."""
    image = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def write_video(path: str | os.PathLike, frames: Iterator[Tensor], rate, quality: int = 23) -> None:
    """Frames uint8 [3, h, w] -> a video file (H.264) of `rate` a second. quality: 0 is lossless."""
    av, stream = pyav(), None
    with av.open(str(path), "w") as target:
        for frame in frames:
            h, w = (side // 2 * 2 for side in frame.shape[1:])          # H.264 wants even sides
            if stream is None:
                stream = target.add_stream("libx264", rate=rate, options={"crf": str(quality)})
                stream.height, stream.width, stream.pix_fmt = h, w, "yuv420p"
            image = np.ascontiguousarray(frame[:, :h, :w].permute(1, 2, 0).numpy())
            target.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        target.mux(stream.encode())


def sample_frames(path: str | os.PathLike, count: int, resolution: int) -> tuple[Tensor, float]:
    """A video file -> T frames as CLIP sees them, uint8 [T, 3, R, R], and its duration, seconds."""
    duration_sec = probe_duration(path)
    frames = [clip.crop(frame[None], resolution)
              for frame in frames_at(path, frame_centres(duration_sec, count))]
    return torch.cat(frames), duration_sec


# ------------------------------------------------------------------------------- frames -> features

PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@torch.no_grad()
def encode_frames(model: clip.CLIP, pixels: Tensor, batch: int = 32,
                  precision: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """uint8 [T, 3, R, R] -> features of frames [T, D], patches [T, D', H, W], float16, on CPU."""
    device = model.logit_scale.device
    done = []
    for part in pixels.split(batch):
        # subtle: a matrix product of another shape may round otherwise, so every batch is full
        part = F.pad(part, (0, 0) * 3 + (0, batch - len(part))).to(device)
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            done.append([y.half().cpu() for y in model.encode_image(clip.normalise(part))])
    x, patches = (torch.cat(y)[:len(pixels)] for y in zip(*done))
    return x, patches


def patch_frames(frames: int, count: int) -> np.ndarray:
    """Which of T frames keep their patch features: the middles of `count` parts (of fewer, all)."""
    count = min(count, frames)
    return ((np.arange(count) + 0.5) * frames / count).astype(int)


# -------------------------------------------------------------------------------- the feature store

def made_by(model: clip.CLIP, name: str, digest: str, frames: int, patch_frames: int = 0,
            precision: str = "float32") -> dict:
    """How features are made: by which CLIP, of T frames, patches of T' (D' channels, H = W)."""
    visual, width = model.visual, model.text_projection.shape[1]
    resnet = isinstance(visual, clip.ModifiedResNet)
    patch_width = visual.layer4[-1].conv3.out_channels if resnet else width
    return {"clip": name, "sha256": digest, "resolution": visual.resolution, "frames": frames,
            "patch_frames": patch_frames, "width": width,
            "patch_width": patch_width if patch_frames else 0,
            "grid": visual.grid if patch_frames else 0, "precision": precision}


class FeatureStore:
    """The folder of features described at the top.

    `made` (`made_by`) is required to create a store, and must agree with one that exists. `part` is
    "-r" in process r of several that fill one store."""

    def __init__(self, folder: str | os.PathLike, made: dict | None = None, part: str = ""):
        self.folder, self.part, self.saved = pathlib.Path(folder), part, time.monotonic()
        parts = sorted(self.folder.glob("manifest*.json"))
        if not parts and made is None:
            raise FileNotFoundError(f"there are no features in {folder}")
        self.manifest = {**(made or {}), "normalised": False, "videos": {}}
        for path in parts:
            try:
                there = json.loads(path.read_text())
                there["videos"].items()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged ({error}); remove it and run data.py again, "
                                 f"which makes what is missing") from error
            if made is None and not self.manifest["videos"]:
                self.manifest = {**there, "videos": {}}
            if not there["videos"]:                     # every video failed: nothing was made
                continue
            for key, value in self.manifest.items():
                if key != "videos" and there.get(key) != value:
                    raise ValueError(f"the features in {folder} were made with {key} "
                                     f"{there.get(key)!r}, not {value!r}; remove that folder to "
                                     f"make them anew")
            self.manifest["videos"] |= there["videos"]

    def path(self, video: str, kind: str) -> pathlib.Path:
        if "/" in video or "\\" in video or "\0" in video or video.startswith("."):
            raise ValueError(f"{video!r} cannot be the name of a video: it has to be a plain file "
                             f"name")
        return self.folder / f"{video}.{kind}.npy"

    def __contains__(self, video: str) -> bool:
        return video in self.manifest["videos"]

    def has(self, video: str, patches: bool, size: int | None) -> bool:
        """Are all files of a video there, made from a video file of this size in bytes?"""
        kinds = ("frames", "patches") if patches else ("frames",)
        return (video in self and all(self.path(video, kind).exists() for kind in kinds)
                and (size is None or self.manifest["videos"][video].get("bytes", size) == size))

    def write(self, video: str, frames: Tensor, patches: Tensor | None,
              duration_sec: float, size: int | None = None) -> None:
        """Keeps frames [T, D] and, unless None, patches [T', D', H, W]; `save_manifest` makes them
        known, as this does every ten seconds. `size` is that of the video file in bytes."""
        if not (torch.isfinite(frames).all() and math.isfinite(duration_sec)):
            raise VideoError(f"{video}: its features or its duration are not finite")
        command.save(self.path(video, "frames"), lambda file: np.save(file, frames.numpy()))
        if patches is not None:
            command.save(self.path(video, "patches"), lambda file: np.save(file, patches.numpy()))
        self.manifest["videos"][video] = {"duration_sec": duration_sec,
                                          "seconds_per_feature": duration_sec / len(frames),
                                          **({"bytes": size} if size is not None else {})}
        if time.monotonic() - self.saved > 10:
            self.save_manifest()

    def save_manifest(self) -> None:
        """Videos in order of name: two stores of the same features are the same bytes."""
        content = self.manifest | {"videos": dict(sorted(self.manifest["videos"].items()))}
        command.save(self.folder / f"manifest{self.part}.json", json.dumps(content, indent=1))
        self.saved = time.monotonic()

    def save_failed(self, failed: dict[str, str]) -> None:
        text = "".join(f"{name}\t{reason}\n" for name, reason in sorted(failed.items()))
        command.save(self.folder / f"failed{self.part}.txt", text)

    def read(self, video: str, kind: str) -> np.ndarray:
        """`kind` is "frames" or "patches"; float16."""
        path = self.path(video, kind)
        try:
            # read, not mapped: a map takes twice as long, and a kept one keeps a file descriptor
            return np.load(path, allow_pickle=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} is missing: the features of {video!r} have not been "
                                    f"made") from error
        except (OSError, ValueError, EOFError, MemoryError) as error:
            raise VideoError(f"{path} is damaged ({error}): remove it and run data.py again, which "
                             f"makes what is missing") from error

    def problems(self) -> Iterator[str]:
        """A sentence for everything that is wrong with the features, in one pass over all files."""
        made = self.manifest
        shapes = {"frames": (made["frames"], made["width"]),
                  "patches": (made["patch_frames"], made["patch_width"], *[made["grid"]] * 2)}
        known = set()
        for name, about in tqdm(made["videos"].items(), desc="check", unit="video", disable=None):
            duration_sec, each_sec = about["duration_sec"], about["seconds_per_feature"]
            if not (0 < duration_sec < math.inf
                    and math.isclose(each_sec * made["frames"], duration_sec, rel_tol=1e-6)):
                yield f"{name} is {duration_sec} s long, and its features are {each_sec} s each"
            for kind, shape in shapes.items():
                known.add(path := self.path(name, kind))
                if kind == "patches" and not path.exists():
                    continue
                try:
                    x = self.read(name, kind)
                    if x.shape != shape or x.dtype != np.float16:
                        yield f"{path.name} is {x.dtype} {x.shape}, not float16 {shape}"
                    elif not np.isfinite(x).all():
                        yield f"{path.name} is not finite"
                except (OSError, ValueError) as error:
                    yield str(error)
        for path in sorted(set(self.folder.glob("*.npy")) - known):
            yield f"{path.name} is in no manifest; its making was interrupted: make it again"


# ------------------------------------------------------------------------- many videos -> the store

class Decoded(NamedTuple):
    """What a decoding process sends back; without `frames`, the reason why."""
    frames: np.ndarray | None                                           # uint8 [T, 3, R, R]
    duration_sec: float
    reason: str = ""


def attempt(path: str | os.PathLike, count: int, resolution: int) -> Decoded:
    """`sample_frames`; whatever it raises becomes the reason."""
    try:
        pixels, duration_sec = sample_frames(path, count, resolution)
        return Decoded(pixels.numpy(), duration_sec)
    except Exception as error:      # a decoder raises what it likes; one video must not end a night
        return Decoded(None, math.nan, str(error) or type(error).__name__)


def be_a_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # the parent stops its workers


def decode_in_pool(paths: dict[str, pathlib.Path], count: int, resolution: int,
                   workers: int) -> Iterator[tuple[str, Decoded]]:
    """Videos in order, 2 * workers of them under way. BrokenProcessPool if a process dies."""
    pool = concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"),
                                                  be_a_worker)
    jobs, flying = iter(list(paths.items())), collections.deque()
    try:
        while True:
            while len(flying) < 2 * workers and (job := next(jobs, None)):
                flying.append((job[0], pool.submit(attempt, job[1], count, resolution)))
            if not flying:
                return
            name, future = flying.popleft()
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode_all(paths: dict[str, pathlib.Path], count: int, resolution: int,
               workers: int) -> Iterator[tuple[str, Decoded]]:
    """All videos in order, decoded by `workers` processes, or in this one if there are none. The
    video that kills its process is found by trying those that were under way one at a time."""
    if not workers:
        for name, path in paths.items():
            yield name, attempt(path, count, resolution)
        return
    left = dict(paths)
    while left:
        try:
            for name, result in decode_in_pool(left, count, resolution, workers):
                del left[name]
                yield name, result
        except concurrent.futures.process.BrokenProcessPool:
            for name in list(left)[:2 * workers]:
                alone = {name: left.pop(name)}
                try:
                    yield from decode_in_pool(alone, count, resolution, 1)
                except concurrent.futures.process.BrokenProcessPool:
                    yield name, Decoded(None, math.nan,
                                        f"{alone[name]} kills the process that decodes it")


def extract(store: FeatureStore, model: clip.CLIP, videos: dict[str, pathlib.Path],
            names: list[str], training: set[str], workers: int = 0, batch: int = 32,
            precision: torch.dtype = torch.float32) -> dict[str, str]:
    """Makes the missing features of the videos `names`, with patches of those in `training`.

    Encodes batches of `batch` frames across videos. Returns video -> reason for those that failed;
    the list is kept in failed.txt. Can be stopped at any point: the next call goes on."""
    pyav()
    T, R = store.manifest["frames"], model.visual.resolution
    kept = patch_frames(T, store.manifest["patch_frames"])
    sizes = {name: os.path.getsize(str(videos[name])) for name in names if name in videos}
    missing = [name for name in names if not store.has(name, name in training, sizes.get(name))]
    failed = {name: f"there is no video file named {name}" for name in missing
              if name not in videos}
    paths = {name: videos[name] for name in missing if name in videos}
    group, waited_sec, started = [], 0.0, time.monotonic()
    decoding = decode_all(paths, T, R, workers)
    bar = tqdm(total=len(paths), desc="features", unit="video", disable=None)
    try:
        while True:
            since = time.monotonic()
            name, decoded = next(decoding, (None, None))
            waited_sec += time.monotonic() - since
            if decoded and decoded.frames is not None:
                group.append((name, decoded))
            elif decoded:
                failed[name] = decoded.reason
            if group and (decoded is None or len(group) * T >= batch):
                pixels = torch.from_numpy(np.concatenate([each.frames for _, each in group]))
                x, patches = encode_frames(model, pixels, batch, precision)
                for (name, each), a, b in zip(group, x.split(T), patches.split(T)):
                    try:
                        store.write(name, a, b[kept] if name in training else None,
                                    each.duration_sec, sizes[name])
                    except VideoError as error:
                        failed[name] = str(error)
                group.clear()
            if decoded is None:
                break
            bar.update()
    finally:
        decoding.close()
        bar.close()
        store.save_manifest()
    store.save_failed(failed)
    if paths:
        seconds = time.monotonic() - started
        print(f"{len(paths)} videos in {seconds:.1f} s: {len(paths) / seconds:.2f} videos/s, "
              f"{waited_sec / seconds:.0%} of the time waiting for the decoder")
    return failed


# ------------------------------------------------------------------------- features made elsewhere

def read_features(path: str | os.PathLike) -> np.ndarray:
    """Features made elsewhere, [L, D]: .npy, .npz (its array `features`) or .pt; or VideoError."""
    path = pathlib.Path(path)
    try:
        if path.suffix.lower() == ".pt":
            x = clip.read_torch(path).float().numpy()
        elif path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                if sum(part.file_size for part in archive.infolist()) > LARGEST:
                    raise ValueError(f"unpacked it would be larger than {LARGEST >> 20} MiB")
            with np.load(path, allow_pickle=False) as file:
                x = file["features"]
        else:
            # mapped, so that a header cannot claim more than the file holds
            x = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a dozen kinds for a damaged or a hostile file
        raise VideoError(f"{path} cannot be read as features: {command.told(error)}") from error
    if x.ndim != 2 or not len(x) or x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise VideoError(f"{path} holds {x.dtype} {list(x.shape)}, and not finite numbers [L, D]")
    return x


def adopt_features(store: FeatureStore, files: dict[str, pathlib.Path], names: list[str],
                   durations_sec: dict[str, float]) -> dict[str, str]:
    """Features made elsewhere become those of the store: T of the L rows, those at the centres of T
    equal parts. Returns video -> reason for those that cannot."""
    T, D = store.manifest["frames"], store.manifest["width"]
    failed, each_sec = {}, []
    for name in tqdm(names, desc="features", unit="video", disable=None):
        try:
            if name not in files:
                raise VideoError(f"there is no file of features named {name}")
            x = read_features(files[name])
            if x.shape[1] != D:
                raise VideoError(f"{files[name]} has features of {x.shape[1]} numbers, and this "
                                 f"CLIP of {D}")
            each_sec.append(durations_sec[name] / len(x))
            chosen = frame_centres(len(x), T).astype(int)
            store.write(name, torch.from_numpy(x[chosen].astype(np.float16)), None,
                        durations_sec[name])
        except VideoError as error:
            failed[name] = str(error)
    store.save_manifest()
    store.save_failed(failed)
    if each_sec:
        print(f"a feature stands for {min(each_sec):.2f} to {max(each_sec):.2f} s, "
              f"{np.median(each_sec):.2f} s in the middle")
    return failed


def main() -> None:
    arguments = command.parser("what would be sampled of a video")
    arguments.add_argument("file", help="a video")
    arguments.add_argument("--frames", type=int, default=32, help="T, how many are sampled")
    arguments.add_argument("--resolution", type=int, default=224, help="R, side of CLIP's images")
    options = arguments.parse_args()
    with command.sentences():
        if min(options.frames, options.resolution) < 1:
            raise ValueError("--frames and --resolution are at least 1")
        duration_sec = probe_duration(options.file)
        with open_video(options.file) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or stream.guessed_rate or 25)
            name = stream.codec_context.name
        h, w = next(frames_at(options.file, np.zeros(1))).shape[1:]
        print(f"{command.printable(options.file)}: {name}, {w} x {h}, {rate:.2f} frames/s, "
              f"{duration_sec:.2f} s")
        T, R = options.frames, options.resolution
        times_sec = frame_centres(duration_sec, T)
        print(f"{T} parts of {duration_sec / T:.2f} s; at the centre of each, the frame on show "
              f"(numbers by the mean rate):")
        for i in range(0, T, 8):
            line = "  ".join(f"{t:9.2f} s #{int(t * rate):<4d}" for t in times_sec[i:i + 8])
            print(line.rstrip())
        short, long = sorted((h, w))
        print(f"short side of {short} to {R}, then the middle {R} x {R}: "
              f"{100 * short / long:.0f}% of the picture")


if __name__ == "__main__":
    main()
