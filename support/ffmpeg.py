"""The ffmpeg program, as most players use it: run, watched, and listened to.

PyPI's imageio-ffmpeg carries one. It reads untrusted files: no network, no other files, a bound
on memory and on time without output, no shell.
"""
import fractions
import os
import subprocess
import threading

import numpy as np

from support import files
from support.text import printable

SILENCE_SEC = 60                # a program that is silent for so long is stopped
LARGEST = 1 << 26               # pixels of a frame; 8K has half as many
# formats that hold pictures themselves; playlists, which name other files, are not among them
FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,gif,h264,"
           "hevc,m4v,ivf,mjpeg,mxf,nut,dv,yuv4mpegpipe,image2,png_pipe,jpeg_pipe,bmp_pipe,"
           "webp_pipe,mp3,wav,aac,flac")

# an output that is thrown away. A transport stream's clock begins with the first stream in use, so
# without it the pictures would begin at 0 where the sound comes first.
WITH_SOUND = ["-map", "0:V", "-map", "0:a?", "-c", "copy", "-f", "null", "-"]
UNKNOWN = -1 << 63              # a packet without a time
DISCARDED = 4                   # flag of a packet that an edit list cuts off: it is never shown


class Ffmpeg:
    """One run of the program: `read` its standard output; `lines` collects what it reports."""

    def __init__(self, arguments: list[str], silence_sec: float = SILENCE_SEC,
                 stdin: int = subprocess.DEVNULL):
        ffmpeg = files.need("imageio_ffmpeg", "reading videos").get_ffmpeg_exe()
        # bytes, because a file name need not be UTF-8; a list, so that no shell reads it
        command = [os.fsencode(part) for part in [ffmpeg, "-hide_banner", "-nostdin"] + arguments]
        self.process = subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE)
        self.silence_sec = silence_sec
        self.has_hung = False
        self.lines: list[str] = []
        self.reporter = threading.Thread(target=self._collect, daemon=True)
        self.reporter.start()

    def _collect(self) -> None:
        for line in self.process.stderr:
            text = line.decode("utf-8", "replace").rstrip()
            if "Last message repeated" not in text:
                self.lines.append(text)

    def _give_up(self) -> None:
        self.has_hung = True
        self.process.kill()

    def read(self, size: int) -> bytes:
        """`size` bytes; fewer at the end."""
        timer = threading.Timer(self.silence_sec, self._give_up)
        timer.start()
        try:
            return self.process.stdout.read(size)
        finally:
            timer.cancel()

    def read_all(self) -> bytes:
        """What is left, in blocks, to the end of the program: a long film may take minutes, but not
        silently."""
        blocks = []
        try:
            while not blocks or blocks[-1]:
                blocks.append(self.read(1 << 16))
            self.process.wait()
        finally:
            self.close()
        return b"".join(blocks)

    def reason(self) -> str:
        """The last thing that it reported."""
        for line in self.lines[-1:]:
            return printable(line.split("] ")[-1])
        return "no frame could be read"

    def finish(self) -> int:
        """Waits for the end of the program; returns its status."""
        self.read_all()
        return self.process.returncode

    def close(self) -> None:
        """Ends the program, if it has not ended by itself."""
        self.process.kill()
        self.process.stdout.close()
        self.process.wait()
        self.reporter.join()
        self.process.stderr.close()


def reading(path: str | os.PathLike) -> list[str]:
    """Options that open an untrusted file: no network, no other files, a bound on memory."""
    # "file:", because a name may begin with a dash or contain a colon
    return ["-protocol_whitelist", "file,pipe", "-format_whitelist", FORMATS,
            "-max_pixels", str(LARGEST), "-i", "file:" + os.path.abspath(path)]


def packet_times(text: str) -> dict[str, np.ndarray]:
    """Start and end of every packet in seconds, and its size in bytes, of each stream of a framecrc
    listing: [n, 3]."""
    tick_sec = {}
    times = {}
    for line in text.splitlines():
        fields = line.replace(",", " ").split()         # stream, dts, pts, duration, size, checksum
        if line.startswith("#tb"):                      # "#tb 0: 1/1000"
            stream = fields[1].rstrip(":")
            tick_sec[stream] = float(fractions.Fraction(fields[2]))
            times[stream] = []
        elif not line.startswith("#") and len(fields) >= 6:
            flags = [int(field[2:], 16) for field in fields[6:] if field.startswith("F=")]
            if flags and flags[0] & DISCARDED:
                continue
            start = int(fields[2])
            if start == UNKNOWN:                        # AVI has decoding times only
                start = int(fields[1])
            end = start + int(fields[3])
            tick = tick_sec[fields[0]]
            times[fields[0]].append((start * tick, end * tick, int(fields[4])))
    return {stream: np.array(sorted(rows)) for stream, rows in times.items() if rows}
