"""Small video files for tests, written by the ffmpeg program."""
import os
import pathlib
import subprocess

import imageio_ffmpeg
import numpy as np

FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


def ffmpeg(*arguments) -> None:
    subprocess.run([FFMPEG, "-v", "error", "-y", *(os.fspath(a) if isinstance(a, pathlib.Path)
                                                   else str(a) for a in arguments)], check=True)


def film(path: pathlib.Path, images: np.ndarray, *options, rate=10) -> pathlib.Path:
    """Images uint8 [n, h, w, 3] -> a video file; options of the program before the output."""
    n, h, w, _ = images.shape
    command = [FFMPEG, "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{w}x{h}",
               "-r", str(rate), "-i", "-", *map(str, options), f"file:{path}"]
    subprocess.run(command, input=np.ascontiguousarray(images).tobytes(), check=True)
    return path


def greys(levels, size=(32, 48)) -> np.ndarray:
    """One image of each grey level, [n, h, w, 3]."""
    levels = (np.asarray(list(levels)).astype(int) % 256).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (len(levels), *size, 3))
