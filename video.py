"""A video file -> frames -> CLIP features, and the store that keeps them (f^v of the paper, Sec.
3).

A video is T frames at the centres of T equal parts of its duration, found by timestamp, so that
frame rate and length do not matter. The image tower is frozen (paper Sec. 4.1.3), so features are
computed once.

The store is a folder, the same for every dataset:

    <video>.frames.npy    [T, D]          float16, global features x_i^v, not normalised
    <video>.patches.npy   [T', D', H, W]  float16, patch features, T' of the T frames; training
                          videos only
    manifest.json         how they were made, and for each video its duration and seconds per
                          feature

Files get their names only when they are complete.

Shapes: T frames, D width of CLIP's joint space, D' channels of the patch features, H x W patch
grid.
"""
import contextlib
import json
import os
import pathlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

import clip


class VideoError(ValueError):
    """A video that cannot be read; the message names the file and the reason."""


# ---------------------------------------------------------------------------------- video -> frames

def frame_centres(duration_sec: float, count: int) -> np.ndarray:
    """The instants at which a video is looked at: centres of `count` equal parts of its duration,
    in seconds."""
    return (np.arange(count) + 0.5) * duration_sec / count


def pyav():
    """The package PyAV; RuntimeError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise RuntimeError("reading videos needs PyAV: pip install av") from error
    return av


def open_video(path: str | os.PathLike):
    av = pyav()
    try:
        container = av.open(str(path))
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path} cannot be opened as a video: {error}") from error
    if not container.streams.video:
        container.close()
        raise VideoError(f"{path} has no video stream")
    container.streams.video[0].thread_type = "AUTO"
    return container


def decoded(container) -> Iterator[tuple[float, object]]:
    """(seconds since the first frame, frame) of all frames, in order. av.FFmpegError where the file
    is damaged."""
    stream = container.streams.video[0]
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    first, count = None, 0
    for frame in container.decode(stream):
        time_sec = frame.time if frame.time is not None else count / rate
        first = time_sec if first is None else first
        count += 1
        yield time_sec - first, frame


def probe_duration(path: str | os.PathLike) -> float:
    """Duration in seconds: the video stream's, else the container's, else by decoding the whole
    file."""
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


TOLERATED = 0.9     # share of a video that has to decode; its last frame stands for a damaged end


def frames_at(path: str | os.PathLike, times_sec: np.ndarray) -> Iterator[Tensor]:
    """For each instant (ascending) the frame on show: the last one that begins no later. uint8 [3,
    h, w], RGB.

    Decodes in one pass. VideoError where the file is damaged before `TOLERATED` of the last
    instant."""
    av = pyav()
    wanted, last, time_sec = 0, None, 0.0
    with open_video(path) as container:
        try:
            for time_sec, frame in decoded(container):
                while last is not None and wanted < len(times_sec) and times_sec[wanted] < time_sec:
                    yield to_rgb(last)
                    wanted += 1
                last = frame
                if wanted == len(times_sec):
                    return
        except av.FFmpegError as error:
            if time_sec < TOLERATED * times_sec[-1]:
                raise VideoError(f"{path} is damaged: decoding stops at {time_sec:.1f} s, before "
                                 f"{times_sec[-1]:.1f} s ({error.strerror})") from error
        if last is None:
            raise VideoError(f"{path} does not decode: not one frame could be read")
        for _ in range(wanted, len(times_sec)):
            yield to_rgb(last)


def to_rgb(frame) -> Tensor:
    """A decoded frame, any pixel format, turned upright: uint8 [3, h, w]."""
    image = np.rot90(frame.to_ndarray(format="rgb24"), round(getattr(frame, "rotation", 0) / 90))
    return torch.from_numpy(image.copy()).permute(2, 0, 1)


# ------------------------------------------------------------------------------- frames -> features

@torch.no_grad()
def encode_pixels(model: clip.CLIP, pixels: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """Preprocessed frames [T, 3, R, R] -> frame features [T, D], patch features [T, D', H, W],
    float16, on the CPU."""
    device = model.logit_scale.device
    done = [[y.half().cpu() for y in model.encode_image(part.to(device))]
            for part in pixels.split(batch)]
    return torch.cat([x for x, _ in done]), torch.cat([patches for _, patches in done])


def encode_video(model: clip.CLIP, path: str | os.PathLike,
                 frames: int) -> tuple[Tensor, Tensor, float]:
    """A video file -> frame features [T, D], patch features [T, D', H, W], duration in seconds."""
    duration_sec = probe_duration(path)
    pixels = torch.cat([clip.preprocess(frame[None], model.visual.resolution)
                        for frame in frames_at(path, frame_centres(duration_sec, frames))])
    return *encode_pixels(model, pixels), duration_sec


def patch_frames(frames: int, count: int) -> np.ndarray:
    """Which of T frames keep their patch features: the middles of `count` equal parts (all, if
    there are fewer)."""
    count = min(count, frames)
    return ((np.arange(count) + 0.5) * frames / count).astype(int)


# -------------------------------------------------------------------------------- the feature store

def save_atomically(path: pathlib.Path, write) -> None:
    """`write(file)` into a temporary file beside `path`, which takes the name `path` only when it
    is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class FeatureStore:
    """The folder of features described at the top. Reading is by memory map.

    `made` says how the features were made: clip, sha256, resolution, frames (T), patch_frames (T'),
    width (D), patch_width (D'), grid (H = W). It is required to create a store, and must agree with
    one that exists."""

    def __init__(self, folder: str | os.PathLike, made: dict | None = None):
        self.folder = pathlib.Path(folder)
        manifest = self.folder / "manifest.json"
        if manifest.exists():
            self.manifest = json.loads(manifest.read_text())
            for key, value in (made or {}).items():
                if self.manifest[key] != value:
                    raise ValueError(f"the features in {folder} were made with {key} "
                                     f"{self.manifest[key]!r}, not "
                                     f"{value!r}; remove that folder to make them anew")
        elif made is None:
            raise FileNotFoundError(f"there are no features in {folder}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.manifest = {**made, "normalised": False, "videos": {}}

    def path(self, video: str, kind: str) -> pathlib.Path:
        if "/" in video or "\\" in video or "\0" in video or video.startswith("."):
            raise ValueError(f"{video!r} cannot be the name of a video: it has to be a plain file "
                             f"name")
        return self.folder / f"{video}.{kind}.npy"

    def __contains__(self, video: str) -> bool:
        return video in self.manifest["videos"]

    def write(self, video: str, frames: Tensor, patches: Tensor | None,
              duration_sec: float) -> None:
        """Keeps frames [T, D] and, unless None, patches [T', D', H, W]. `save_manifest` makes it
        known."""
        if not torch.isfinite(frames).all():
            raise VideoError(f"{video}: its features are not finite")
        save_atomically(self.path(video, "frames"), lambda file: np.save(file, frames.numpy()))
        if patches is not None:
            save_atomically(self.path(video, "patches"),
                            lambda file: np.save(file, patches.numpy()))
        self.manifest["videos"][video] = {"duration_sec": duration_sec,
                                          "seconds_per_feature": duration_sec / len(frames)}

    def save_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        save_atomically(self.folder / "manifest.json", lambda file: file.write(text.encode()))

    def read(self, video: str, kind: str) -> np.ndarray:
        """`kind` is "frames" or "patches"; float16, memory-mapped."""
        path = self.path(video, kind)
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: the features of {video!r} have not been "
                                    f"made")
        # subtle: a map that is kept keeps a file descriptor; there are more videos than descriptors
        return np.load(path, mmap_mode="r", allow_pickle=False)
