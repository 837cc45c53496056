"""A video file -> frames -> CLIP features (f^v, paper Sec. 3), for one video and for a dataset.

A video is T frames: those that a viewer sees at the centres of T equal parts of its duration, so
that frame rate and length do not matter. The `ffmpeg` program reads the files, as most players do
(PyPI's imageio-ffmpeg carries one), in a process of its own for each video. The image tower is
frozen (Sec. 4.1.3): features are made once, and kept in a data.FeatureStore.

    duration_sec = video.probe_duration("a.mp4")
    frames, duration_sec = video.sample_frames("a.mp4", 32, 224)        # uint8 [32, 3, 224, 224]

Shapes: T frames, D width of CLIP's joint space, D' channels of the patch features, H x W patch
grid, R resolution, h x w a frame as displayed.
"""
import fractions
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import clip
from data import VideoError
from support import ffmpeg
from support.text import printable

VIDEOS = {".mp4", ".mkv", ".avi", ".webm", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp",
          ".ts", ".mts", ".m2ts", ".ogv"}


# ------------------------------------------------------------------------------- what a file holds

MAX_ASPECT = 8                  # aspect ratio beyond which only the middle is read
MAX_LOST = 0.1                  # share of a video that may be damaged


class VideoFile(NamedTuple):
    """What `inspect` finds out."""
    path: pathlib.Path
    duration_sec: float                 # as a player shows it
    width: int                          # as displayed, at most MAX_ASPECT times the height
    height: int
    codec: str
    filters: str                        # ffmpeg: decoded -> displayed frames
    packets_sec: np.ndarray             # [n, 3] its packets, see `ffmpeg.packet_times`
    container: str                      # as ffmpeg calls it, for instance "matroska,webm"
    opening: list[str]                  # ffmpeg's options that open it


def inspect(path: str | os.PathLike, whole: bool = True) -> VideoFile:
    """Reads all packets of a file, and decodes one frame; the first packet alone, which takes no
    time in a long film, if it is not `whole`. VideoError if it is not a video."""
    listed = ["-map", "0:a?"] if whole else ["-frames:v", "1"]
    # the first output lists packets without decoding; the second is the stream that a player shows
    run = ffmpeg.Ffmpeg(ffmpeg.reading(path) + ["-map", "0:V?"] + listed + [
        "-c", "copy", "-f", "framecrc", "-",
        "-an", "-sn", "-dn", "-frames:v", "1", "-f", "null", "-"])
    listing = run.read_all().decode()
    report = "\n".join(run.lines)
    if run.has_hung:
        raise VideoError(f"{path} cannot be read: ffmpeg gave no answer in {ffmpeg.SILENCE_SEC} s")
    container = re.search(r"(?m)^Input #0, (\S+), from ", report)
    if container is None:
        raise VideoError(f"{path} cannot be opened as a video: {run.reason()}")
    # subtle: whole lines, because titles and names of files are in the report, too
    shown = re.search(r"(?m)^  Stream #0:(\d+) -> #1:0 \((\w+)", report)
    copied = dict(re.findall(r"(?m)^  Stream #0:(\d+) -> #0:(\d+)", report))
    if shown is None or shown[1] not in copied:         # "0:V" leaves out cover pictures
        cover = ", only a cover picture" if shown else ""
        raise VideoError(f"{path} has no video stream{cover}")
    times_sec = ffmpeg.packet_times(listing)
    frame = re.search(r"(?m)^  Stream #1:0.*?: Video: wrapped_avframe, \w+(\(.*?\))?,? ?"
                      r"(\d+)x(\d+)(?: \[SAR (\d+):(\d+))?", report)
    if frame is None or whole and copied[shown[1]] not in times_sec:
        raise VideoError(f"{path} cannot be decoded: no frame could be read")
    pixel_aspect = 1.0
    if frame[4]:
        pixel_aspect = int(frame[4]) / int(frame[5])
    width, height, filters = displayed(int(frame[2]), int(frame[3]), pixel_aspect, frame[1] or "")
    packets_sec = times_sec.get(copied[shown[1]], np.zeros((0, 3)))
    if len(packets_sec) and packets_sec[-1, 1] == packets_sec[-1, 0]:
        # WMV does not say how long its last picture stands: as long as the one before
        packets_sec[-1, 1] += np.diff(packets_sec[-2:, 0]).sum() or 0.04
    end_sec = max((rows[:, 1].max() for rows in times_sec.values()), default=0.0)
    opening = ffmpeg.reading(path)
    if shown[2] == "theora":            # its threaded decoder is not deterministic
        opening = ["-threads", "1"] + opening
    return VideoFile(pathlib.Path(path), float(end_sec), width, height, shown[2], filters,
                     packets_sec, container[1], opening)


def displayed(w: int, h: int, pixel_aspect: float, colours: str) -> tuple[int, int, str]:
    """Width and height of a frame as displayed, and the filters that make it of a decoded one.

    colours    ffmpeg's description: "(tv, bt709, progressive)" """
    filters = []
    # a strip of 16384 x 2 pixels would become gigabytes when its short side is enlarged to CLIP's
    cropped_w = min(w, max(1, round(MAX_ASPECT * h / pixel_aspect)))
    cropped_h = min(h, max(1, round(MAX_ASPECT * w * pixel_aspect)))
    if (cropped_w, cropped_h) != (w, h):
        filters.append(f"crop={cropped_w}:{cropped_h}")
    if "smpte2084" in colours or "arib-std-b67" in colours:     # HDR: tone-mapped to SDR
        if "unknown" in colours:
            filters.append("setparams=colorspace=bt2020nc:color_primaries=bt2020")
        if cropped_w % 2 or cropped_h % 2:              # zscale needs even sides
            filters.append("format=yuv444p10le")
        filters += ["zscale=t=linear:npl=203", "format=gbrpf32le", "zscale=p=bt709",
                    "tonemap=hable:desat=0", "zscale=t=bt709:m=bt709:r=tv", "format=yuv444p"]
    matrix = "auto"
    tag = colours.split("/")[0]                         # matrix/primaries/transfer, or one for all
    is_tagged = "bt" in tag or "smpte" in tag
    if not is_tagged and min(w, h) >= 720:              # players assume BT.709 for untagged HD
        matrix = "bt709"
    width = max(1, round(cropped_w * pixel_aspect))
    filters.append(f"scale={width}:{cropped_h}:in_color_matrix={matrix}")
    return width, cropped_h, ",".join(filters)


def lost_sec(packets_sec: np.ndarray, decoded_sec: np.ndarray) -> float:
    """For how long the packets of a video gave no frame. Both [n, 3], see `ffmpeg.packet_times`."""
    # an empty packet repeats the picture before it
    starts = packets_sec[packets_sec[:, 2] > 0, 0]
    # the gaps between two frames, before the first and after the last
    edges = np.concatenate([[starts[0]], decoded_sec[:, 0], [packets_sec[-1, 1]]])
    tolerance = 1e-3                                    # the two listings round differently
    first = np.searchsorted(starts, edges[:-1] + tolerance)
    after = np.searchsorted(starts, edges[1:] - tolerance)
    inside = np.maximum(after - first, 0)               # packets strictly within each gap
    # a packet more is normal: two fields make a frame, and times in an MPEG-PS are rough
    steps = np.diff(edges)
    is_lost = steps > 2.5 * np.median(np.diff(starts, append=packets_sec[-1, 1]))
    share = np.where(is_lost & (inside > 1), inside / (inside + 1), 0.0)
    return float((steps * share).sum())


# ---------------------------------------------------------------------------------- video -> frames

def frame_centres(duration_sec: float, count: int) -> np.ndarray:
    """The centres of `count` equal parts of a video, in seconds."""
    return (np.arange(count) + 0.5) * duration_sec / count


def probe_duration(path: str | os.PathLike) -> float:
    """Duration in seconds, as a player shows it: to the end of the last packet of sound or picture,
    whatever the header claims. VideoError if it is not a video."""
    return inspect(path).duration_sec


def shifted(by_sec: float, is_last: bool = False) -> str:
    """Filters that begin a video's clock at an instant and repeat its last frame for ever; with
    `is_last`, the last one that begins by that instant."""
    # subtle: in finer ticks, because setpts rounds towards 0, and a tick may be a whole frame
    filters = f"settb='max(intb/1000,1e-9)',setpts=PTS-{by_sec!r}/TB"
    if is_last:
        filters += ",trim=end=0.0001"
    return f"{filters},tpad=stop=-1:stop_mode=clone"


def frames_every(video: VideoFile, first_sec: float, step_sec: float,
                 count: int) -> Iterator[Tensor]:
    """The frames on screen at `count` instants from `first_sec` on, `step_sec` apart: uint8
    [3, h, w], RGB, as displayed. VideoError if there is none, or if more than MAX_LOST of the video
    cannot be decoded; less is noted."""
    # after the end, the last picture
    first_sec = float(min(first_sec, video.packets_sec[-1, 0]))
    rate = 1 / fractions.Fraction(step_sec).limit_denominator(1_000_000)
    # frame k is the last one that begins by first_sec + k * step_sec
    sampled = (f"{shifted(first_sec)},fps={rate.numerator}/{rate.denominator}:start_time=0:round=up"
               f",{video.filters}")
    streams = ["-an", "-sn", "-dn"]                     # no sound, subtitles or data
    options = ["-v", "error"] + video.opening + streams + [
        "-vf", sampled, "-frames:v", str(count), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    options += streams + ["-fps_mode", "passthrough", "-c:v", "wrapped_avframe", "-f", "framecrc"]
    size = 3 * video.width * video.height
    with tempfile.TemporaryDirectory() as folder:
        listing = pathlib.Path(folder, "decoded")       # the times of all decoded frames
        run = ffmpeg.Ffmpeg(options + [str(listing)] + ffmpeg.WITH_SOUND,
                            ffmpeg.SILENCE_SEC + 10 * step_sec)
        done = 0
        try:
            while done < count:
                raw = run.read(size)
                if len(raw) < size:
                    break
                picture = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
                yield picture.view(video.height, video.width, 3).permute(2, 0, 1)
                done += 1
            run.read_all()                              # the program decodes to the end
        finally:
            run.close()
        if run.has_hung:
            raise VideoError(f"{video.path} cannot be read: ffmpeg gave no frame in "
                             f"{run.silence_sec:.0f} s")
        if done < count:
            raise VideoError(f"{video.path} cannot be decoded: {run.reason()}")
        decoded = ffmpeg.packet_times(listing.read_text(encoding="utf-8"))
    lost = lost_sec(video.packets_sec, decoded["0"])
    if lost > MAX_LOST * video.duration_sec:
        raise VideoError(f"{video.path} is damaged: {lost:.1f} s of its "
                         f"{video.duration_sec:.1f} s cannot be decoded")
    if lost > 0:
        print(printable(f"note: {video.path}: {lost:.1f} s of {video.duration_sec:.1f} s cannot be "
                        f"decoded; the previous picture is shown"), file=sys.stderr)


def centre_frames(video: VideoFile, count: int) -> Iterator[Tensor]:
    """The frames on screen at the centres of `count` equal parts, see `frames_every`."""
    # UNSPECIFIED: which frames; MMN averages the features of all frames of a part
    step_sec = video.duration_sec / count
    return frames_every(video, step_sec / 2, step_sec, count)


def sample_frames(path: str | os.PathLike, count: int,
                  resolution: int) -> tuple[Tensor, float]:
    """A video file -> T frames as CLIP sees them, uint8 [T, 3, R, R], and its duration, seconds.
    VideoError if it cannot be read."""
    video = inspect(path)
    frames = [clip.crop(frame[None], resolution) for frame in centre_frames(video, count)]
    return torch.cat(frames), video.duration_sec


def write_video(path: str | os.PathLike, frames: Tensor, rate: fractions.Fraction) -> None:
    """Frames uint8 [n, 3, h, w], of even sides -> an H.264 file at `rate` frames/s."""
    h, w = frames.shape[2:]
    run = ffmpeg.Ffmpeg([
        "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}", "-r", str(rate),
        "-i", "-", "-c:v", "libx264", "-crf", "12", "-pix_fmt", "yuv420p", "-y",
        "file:" + os.path.abspath(path)], ffmpeg.SILENCE_SEC + len(frames), stdin=subprocess.PIPE)
    run.process.stdin.write(frames.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
    run.process.stdin.close()
    if run.finish():
        raise VideoError(f"{path} could not be written: {run.reason()}")


# ------------------------------------------------------------------------------- frames -> features

PRECISIONS = {"float32": torch.float32, "fp16": torch.float16}  # by their names in a manifest
TOWER = threading.Lock()        # threads take turns: a batch uses all cores


@torch.no_grad()
def encode_frames(model: clip.CLIP, pixels: Tensor, batch: int = 32,
                  precision: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """uint8 [T, 3, R, R] -> frame features [T, D], patches [T, D', H, W], float16, on the CPU."""
    device = model.logit_scale.device
    frames, patches = [], []
    for part in pixels.split(batch):
        # subtle: a matrix product of another shape may round differently, so every batch is full
        part = F.pad(part, (0, 0) * 3 + (0, batch - len(part))).to(device)      # [batch, 3, R, R]
        with TOWER, torch.autocast(device.type, precision, enabled=precision != torch.float32):
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
    made = {"clip": name, "sha256": digest, "resolution": model.visual.resolution,
            "frames": frames, "patch_frames": patch_frames, "width": width,
            "patch_width": patch_width, "grid": grid, "precision": precision}
    if hasattr(model.transformer, "gelu"):              # OpenAI's have QuickGELU
        made["activation"] = "gelu"
    return made
