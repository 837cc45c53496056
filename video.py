"""A video file -> frames -> CLIP features (f^v, paper Sec. 3), for one video and for a dataset.

A video is T frames at the centres of T equal parts of its duration, found by timestamp, so that
frame rate and length do not matter. The image tower is frozen (Sec. 4.1.3), so features are
extracted once and stored in a data.FeatureStore. `python -m extras.walk video FILE` shows which
frames are sampled.

Shapes: T frames, D width of CLIP's joint space, D' channels of the patch features, H x W patch
grid, R resolution, L precomputed features of a video.
"""
import collections
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import signal
import time
import zipfile
from collections.abc import Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import clip
from data import FeatureStore, VideoError, patch_frames
from support import files
from support.errors import Mistake, reason

# -------------------------------------------------------------------------------- folders of videos

VIDEOS = {".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp",
          ".ts", ".mts", ".m2ts"}


def video_files(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Path relative to the folder -> file, for all videos in it."""
    return {str(path.relative_to(folder)): path for path in sorted(pathlib.Path(folder).rglob("*"))
            if path.suffix.lower() in VIDEOS and path.is_file()}


def find_files(folder: str | os.PathLike, endings: set[str]) -> dict[str, pathlib.Path]:
    """File name without suffix -> file, for all files with these suffixes below a folder. Mistake
    if two share a name, since annotations name videos without folder and suffix."""
    if not pathlib.Path(folder).is_dir():
        raise Mistake(f"there is no folder {folder}")
    result: dict[str, pathlib.Path] = {}
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if path.suffix.lower() in endings and path.is_file():
            other = result.setdefault(path.stem, path)
            if other != path:
                raise Mistake(f"{other} and {path} have the same name, {path.stem}; remove one of "
                              f"them from {folder}")
    return result


def state_of(path: pathlib.Path) -> dict[str, int]:
    """Size and modification time, to notice that a file was replaced."""
    stat = path.stat()
    return {"size": stat.st_size, "changed_ns": stat.st_mtime_ns}


# ---------------------------------------------------------------------------------- video -> frames

def frame_centres(duration_sec: float, count: int) -> np.ndarray:
    """The centres of `count` equal parts of a video, in seconds."""
    return (np.arange(count) + 0.5) * duration_sec / count


def pyav():
    return files.need("av", "reading videos")


def open_video(path: str | os.PathLike):
    av = pyav()
    try:
        # subtle: absolute, because FFmpeg reads "12:30.mp4" as a URL with the scheme "12"
        container = av.open(os.path.abspath(str(path)))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be opened as a video: {error.strerror}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    stream = container.streams.video[0]
    if multiprocessing.parent_process():                # this is a worker: one core each
        stream.codec_context.thread_count = 1
    else:
        stream.thread_type = "AUTO"                     # frames in parallel, not only slices
    return container


def decoded(container) -> Iterator[tuple[float, object]]:
    """(seconds since the first frame, frame) of all frames, in order. av.FFmpegError if damaged."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    first_sec = None
    for i, frame in enumerate(container.decode(stream)):
        time_sec = frame.time
        if time_sec is None:                            # raw streams have no timestamps
            time_sec = i / rate
        if first_sec is None:                           # a cut-out clip may start at any timestamp
            first_sec = time_sec
        yield time_sec - first_sec, frame


def probe_duration(path: str | os.PathLike) -> float:
    """Duration in seconds: the video stream's, the container's, or that of all decoded frames."""
    av = pyav()
    with open_video(path) as container:
        stream = container.streams.video[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        if container.duration:
            return container.duration / 1e6             # the container counts microseconds
        times_sec = []
        with contextlib.suppress(av.FFmpegError):       # damage is reported by `frames_at`
            times_sec = [time_sec for time_sec, _ in tqdm(decoded(container), desc="duration",
                                                          unit="frame", disable=None)]
        if not times_sec:
            raise VideoError(f"{path} cannot be decoded: no frame could be read")
        if len(times_sec) == 1:
            return 0.04                                 # one frame at 25 frames/s
        # the last frame stays on screen for as long as the others did on average
        return times_sec[-1] + times_sec[-1] / (len(times_sec) - 1)


TOLERATED = 0.9     # share of a video that must decode; its last frame replaces a missing end


def frames_at(path: str | os.PathLike, times_sec: np.ndarray) -> Iterator[Tensor]:
    """For each instant (ascending) the frame on screen, that is, the last one that begins no later:
    uint8 [3, h, w], RGB. Decodes in one pass. VideoError if the frames end before `TOLERATED` of
    the last instant: the file is damaged, or shorter than its header claims."""
    av = pyav()
    wanted = 0                                          # index of the next instant
    last = None                                         # the frame on screen
    end_sec = 0.0
    damage = "the file ends there"
    with open_video(path) as container:
        try:
            for time_sec, frame in decoded(container):
                # the previous frame was on screen until now, perhaps for several instants
                while last is not None and wanted < len(times_sec) and times_sec[wanted] < time_sec:
                    yield to_rgb(last)
                    wanted += 1
                last, end_sec = frame, time_sec
                if wanted == len(times_sec):
                    return
        except av.FFmpegError as error:
            damage = error.strerror
        if last is None:
            raise VideoError(f"{path} cannot be decoded: no frame could be read ({damage})")
        if getattr(last, "duration", None) and last.time_base:          # old PyAV has none
            end_sec += float(last.duration * last.time_base)
        if end_sec < TOLERATED * times_sec[-1]:
            raise VideoError(f"{path} is damaged: its frames end at {end_sec:.1f} s, before the "
                             f"{times_sec[-1]:.1f} s to be sampled ({damage})")
        for _ in range(wanted, len(times_sec)):         # nothing replaces the last frame
            yield to_rgb(last)


def to_rgb(frame) -> Tensor:
    """A decoded frame of any pixel format, rotated upright: uint8 [3, h, w]."""
    # phones store a video as the sensor saw it, and the angle beside it
    image = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


def write_video(path: str | os.PathLike, frames: Iterator[Tensor], rate, quality: int = 23) -> None:
    """Frames uint8 [3, h, w] -> an H.264 file at `rate` frames/s. quality: 0 is lossless."""
    av = pyav()
    stream = None
    with av.open(str(path), "w") as target:
        for frame in frames:
            h, w = (side // 2 * 2 for side in frame.shape[1:])          # yuv420p needs even sides
            if stream is None:                          # the first frame tells the size
                stream = target.add_stream("libx264", rate=rate, options={"crf": str(quality)})
                stream.height, stream.width = h, w
                stream.pix_fmt = "yuv420p"              # the format that every player reads
            image = np.ascontiguousarray(frame[:, :h, :w].permute(1, 2, 0).numpy())
            target.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        target.mux(stream.encode())                     # flush the frames that the encoder holds


def sample_frames(path: str | os.PathLike, count: int, resolution: int,
                  instants=frame_centres) -> tuple[Tensor, float]:
    """A video file -> T frames as CLIP sees them, uint8 [T, 3, R, R], and its duration in seconds.

    instants    (duration in seconds, count) -> the instants to sample, in seconds"""
    duration_sec = probe_duration(path)
    times_sec = instants(duration_sec, count)
    # cropped one by one, so that a long 4K video needs little memory
    frames = [clip.crop(frame[None], resolution) for frame in frames_at(path, times_sec)]
    return torch.cat(frames), duration_sec


# ------------------------------------------------------------------------------- frames -> features

PRECISIONS = {"float32": torch.float32, "fp16": torch.float16}  # by their names in a manifest


@torch.no_grad()
def encode_frames(model: clip.CLIP, pixels: Tensor, batch: int = 32,
                  precision: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """uint8 [T, 3, R, R] -> frame features [T, D], patches [T, D', H, W], float16, on the CPU."""
    device = model.logit_scale.device
    frames, patches = [], []
    for part in pixels.split(batch):
        # subtle: a matrix product of another shape may round differently, so every batch is full
        part = F.pad(part, (0, 0) * 3 + (0, batch - len(part))).to(device)      # [batch, 3, R, R]
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            x, y = model.encode_image(clip.normalise(part))
        frames.append(x.half().cpu())                                   # [batch, D]
        patches.append(y.half().cpu())                                  # [batch, D', H, W]
    return torch.cat(frames)[:len(pixels)], torch.cat(patches)[:len(pixels)]


def made_by(model: clip.CLIP, name: str, digest: str, frames: int, patch_frames: int = 0,
            precision: str = "float32") -> dict:
    """How features are made, for the manifest: the CLIP, T frames, patches of T' of them (D'
    channels, H = W)."""
    width = model.text_projection.shape[1]                              # D
    patch_width = grid = 0
    if patch_frames:
        grid = model.visual.grid
        patch_width = width                             # a ViT's patches are in the joint space
        if isinstance(model.visual, clip.ModifiedResNet):
            patch_width = model.visual.layer4[-1].conv3.out_channels    # its last feature map
    return {"clip": name, "sha256": digest, "resolution": model.visual.resolution,
            "frames": frames, "patch_frames": patch_frames, "width": width,
            "patch_width": patch_width, "grid": grid, "precision": precision}


# ------------------------------------------------------------------------- many videos -> the store

class Decoded(NamedTuple):
    """What a decoding process returns. If decoding failed, `frames` is None and `reason` is set."""
    frames: np.ndarray | None                                           # uint8 [T, 3, R, R]
    duration_sec: float
    reason: str = ""


def attempt(path: str | os.PathLike, count: int, resolution: int,
            instants=frame_centres) -> Decoded:
    """`sample_frames`, except that any exception becomes the reason."""
    try:
        pixels, duration_sec = sample_frames(path, count, resolution, instants)
        return Decoded(pixels.numpy(), duration_sec)
    except Exception as error:  # of any type: one bad video must not end a long extraction
        return Decoded(None, math.nan, str(error) or type(error).__name__)


def start_worker() -> None:
    torch.set_num_threads(1)                            # there is a worker for every core
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # on Ctrl-C the parent stops its workers


def decode_in_pool(paths: dict[str, pathlib.Path], count: int, resolution: int, workers: int,
                   instants) -> Iterator[tuple[str, Decoded]]:
    """Videos in order, 2 * workers of them in flight. BrokenProcessPool if a process dies."""
    # spawned, because a forked process cannot use CUDA or torch's threads safely
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker)
    pending = collections.deque()
    try:
        # subtle: a copy, because `decode_all` removes a video from `paths` when it has its frames
        for name, path in list(paths.items()):
            pending.append((name, pool.submit(attempt, path, count, resolution, instants)))
            if len(pending) == 2 * workers:             # bounds the frames held in memory
                first, future = pending.popleft()
                yield first, future.result()
        for name, future in pending:
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def decode_all(paths: dict[str, pathlib.Path], count: int, resolution: int, workers: int,
               instants=frame_centres) -> Iterator[tuple[str, Decoded]]:
    """All videos in order, decoded by `workers` processes (0: in this process). A video that
    crashes its process is identified by retrying those in flight one at a time."""
    if not workers:
        for name, path in paths.items():
            yield name, attempt(path, count, resolution, instants)
        return
    left = dict(paths)
    while left:
        try:
            for name, result in decode_in_pool(left, count, resolution, workers, instants):
                del left[name]
                yield name, result
        except BrokenProcessPool:
            for name in list(left)[:2 * workers]:
                alone = {name: left.pop(name)}
                try:
                    yield from decode_in_pool(alone, count, resolution, 1, instants)
                except BrokenProcessPool:
                    yield name, Decoded(None, math.nan,
                                        f"{alone[name]} crashes the process that decodes it")


def missing(store: FeatureStore, videos: dict[str, pathlib.Path], names: list[str],
            training: set[str], failed: dict[str, str]) -> tuple[dict, dict[str, int]]:
    """The videos without up-to-date features: name -> file and name -> size in bytes. Those without
    a file are added to `failed`."""
    paths, sizes = {}, {}
    for name in names:
        stored = name in store and store.path(name, "frames").exists()
        if name in training:
            stored = stored and store.path(name, "patches").exists()
        if name in videos:
            size = os.path.getsize(videos[name])
            # another size: the file was replaced. Older manifests have no sizes.
            if not stored or store.manifest["videos"][name].get("bytes", size) != size:
                paths[name], sizes[name] = videos[name], size
        elif not stored:
            failed[name] = f"no video file is named {name}"
    return paths, sizes


def extract(store: FeatureStore, model: clip.CLIP, videos: dict[str, pathlib.Path],
            names: list[str], training: set[str], workers: int = 0, batch: int = 32,
            precision: torch.dtype = torch.float32) -> dict[str, str]:
    """Extracts the missing features of the videos `names`, with patches for those in `training`.
    Encodes batches of `batch` frames across videos. Returns video -> reason for those that failed,
    and writes it to failed.txt. Can be interrupted at any point: the next call continues."""
    pyav()                                              # fail now rather than once per video
    T = store.manifest["frames"]
    kept = patch_frames(T, store.manifest["patch_frames"])              # [T']
    failed = {}
    paths, sizes = missing(store, videos, names, training, failed)
    group = []                                          # (name, Decoded) that await encoding
    waited_sec = 0.0
    started = time.monotonic()
    decoding = decode_all(paths, T, model.visual.resolution, workers)
    bar = tqdm(total=len(paths), desc="features", unit="video", disable=None)
    try:
        while True:
            since = time.monotonic()
            name, decoded = next(decoding, (None, None))                # None: that was the last
            waited_sec += time.monotonic() - since
            if decoded and decoded.frames is not None:
                group.append((name, decoded))
            elif decoded:
                failed[name] = decoded.reason
            if group and (decoded is None or len(group) * T >= batch):
                pixels = torch.from_numpy(np.concatenate([each.frames for _, each in group]))
                x, patches = encode_frames(model, pixels, batch, precision)
                for (name, each), a, b in zip(group, x.split(T), patches.split(T)):
                    b = b[kept] if name in training else None           # [T', D', H, W]
                    try:
                        store.write(name, a, b, each.duration_sec, sizes[name])
                    except VideoError as error:         # its features are not finite
                        failed[name] = str(error)
                group.clear()
            if decoded is None:
                break
            bar.update()
    finally:
        decoding.close()                                # stops the workers
        bar.close()
        store.save_manifest()                           # of what is finished, after Ctrl-C too
    store.save_failed(failed)
    if paths:
        seconds = time.monotonic() - started
        print(f"{len(paths)} videos in {seconds:.1f} s: {len(paths) / seconds:.2f} videos/s, "
              f"{waited_sec / seconds:.0%} of the time waiting for the decoder")
    return failed


# ---------------------------------------------------------------------------- precomputed features

FEATURES = {".npy", ".npz", ".pt"}
LARGEST = 1 << 30   # bytes of a packed file of features, when unpacked


class Entry(NamedTuple):
    """The features of one video in an open hdf5 file: a dataset [L, D], as 2D-TAN and MMN publish
    Charades-STA's, or a group with the dataset c3d_features, as they publish ActivityNet's."""
    file: Mapping
    name: str

    def __str__(self) -> str:
        return f"{self.name} in {self.file.filename}"

    def read(self) -> np.ndarray:
        x = self.file[self.name]
        if isinstance(x, Mapping):                      # a group
            x = x["c3d_features"]
        if x.nbytes > LARGEST:
            raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
        return np.asarray(x[()])


def find_features(path: str | os.PathLike) -> dict[str, pathlib.Path | Entry]:
    """Video -> its features: the files of a folder, or the entries of an hdf5 file."""
    if pathlib.Path(path).suffix.lower() not in (".hdf5", ".h5"):
        return find_files(path, FEATURES)
    h5py = files.need("h5py", "reading hdf5")
    try:
        file = h5py.File(path, "r")
        return {name: Entry(file, name) for name in file}
    except Exception as error:  # several types for a damaged or hostile file
        raise Mistake(f"{path} cannot be read as hdf5: {reason(error)}") from error


def read_features(path: pathlib.Path | Entry) -> np.ndarray:
    """Precomputed features [L, D]: .npy, .npz (its array `features`), .pt, or an hdf5 entry."""
    try:
        if isinstance(path, Entry):
            x = path.read()
        elif path.suffix.lower() == ".pt":
            x = files.read_tensors(path).float().numpy()
        elif path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:      # before numpy unpacks a zip bomb
                if sum(part.file_size for part in archive.infolist()) > LARGEST:
                    raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
            with np.load(path, allow_pickle=False) as file:
                x = file["features"]
        else:
            # memory-mapped, so that a header cannot claim more than the file holds
            x = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:  # a dozen types for a damaged or hostile file
        raise VideoError(f"{path} cannot be read as features: {reason(error)}") from error
    if x.ndim != 2 or not len(x) or x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise VideoError(f"{path} contains {x.dtype} {list(x.shape)}, not finite numbers [L, D]")
    return x


def made_elsewhere(name: str, path: str | os.PathLike, features: dict[str, pathlib.Path | Entry],
                   names: list[str], frames: int) -> dict:
    """`made_by` for precomputed features, either of a published CLIP, whose weights are not needed,
    or of another network, which resolution 0 marks. Their width is that of the first video of
    `names` that can be read; Mistake if there is none, or if it is not that CLIP's."""
    width = 0
    for video in names:
        with contextlib.suppress(KeyError, VideoError):         # `adopt_features` reports it
            width = read_features(features[video]).shape[1]             # D
            break
    if not width:
        raise Mistake(f"{path} has no features of the {len(names)} videos of this dataset that can "
                      f"be read")
    resolution = 0
    # the digest only has to tell one set of features from another
    if name in clip.PUBLISHED:
        digest, _, expected, resolution = clip.PUBLISHED[name]
        if width != expected:
            raise Mistake(f"{path} has features of width {width}, but those of {name} have "
                          f"{expected}; name the CLIP that made them with --clip")
    elif pathlib.Path(path).is_dir():
        sizes = sorted((each.name, each.stat().st_size) for each in features.values())
        digest = hashlib.sha256(json.dumps(sizes).encode()).hexdigest()
    else:
        digest = files.sha256(path)
    return {"clip": name, "sha256": digest, "resolution": resolution, "frames": frames,
            "patch_frames": 0, "width": width, "patch_width": 0, "grid": 0,
            "precision": "made elsewhere"}


def stretch_means(x: np.ndarray, count: int) -> np.ndarray:
    """[L, D] -> [T, D]: the mean of the unit rows of each of T equal parts, or one row where a part
    is empty, as in MMN's code (which leaves out the last row)."""
    x = x.astype(np.float32)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)     # [L, D]
    bounds = np.round(np.arange(count + 1) * len(x) / count).astype(int)    # [T + 1]
    starts = np.minimum(bounds[:-1], len(x) - 1)                            # [T]
    return np.stack([x[a:max(a + 1, b)].mean(0) for a, b in zip(starts, bounds[1:])])


def adopt_features(store: FeatureStore, paths: dict[str, pathlib.Path | Entry], names: list[str],
                   durations_sec: dict[str, float]) -> dict[str, str]:
    """Adds precomputed features to the store: L rows become T. Returns video -> reason for those
    that failed."""
    T, D = store.manifest["frames"], store.manifest["width"]
    foreign = store.manifest.get("resolution") == 0     # not a CLIP's
    failed, each_sec = {}, []
    for name in tqdm(names, desc="features", unit="video", disable=None):
        try:
            if name not in paths:
                raise VideoError(f"no feature file is named {name}")
            x = read_features(paths[name])
            if x.shape[1] != D:
                whose = "that of the others" if foreign else "this CLIP's width"
                raise VideoError(f"{paths[name]} has features of width {x.shape[1]}, but {whose} "
                                 f"is {D}")
            each_sec.append(durations_sec[name] / len(x))
            if foreign:
                # DEVIATION: MMN's means of T parts are normalised again, in data.Videos
                x = stretch_means(x, T)                                 # [T, D]
            else:
                # the rows at the centres of T equal parts, which is how `extract` samples a video
                x = x[frame_centres(len(x), T).astype(int)]             # [T, D]
            store.write(name, torch.from_numpy(x.astype(np.float16)), None, durations_sec[name])
        except VideoError as error:
            failed[name] = str(error)
    store.save_manifest()
    store.save_failed(failed)
    if each_sec:
        print(f"seconds per feature: {min(each_sec):.2f} to {max(each_sec):.2f}, median "
              f"{np.median(each_sec):.2f}")
    return failed
