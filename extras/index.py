"""An index of the videos in a folder, which extras/search.py and clip2video search by sentences.

    python -m extras.index DIR --out index/                     # CLIP alone, without training
    python -m extras.index ckpt.pt DIR --out index/             # with a trained model
    python -m clip2video index ckpt.pt DIR --out index/         # whole videos

Rerun the same command to update the index after a change. Neither of MMN's two embeddings of a
moment depends on the sentence (Eq. 6, 9), so its index stores those of all moments of all videos,
and a search is a product with two vectors. Without a checkpoint, the score of a moment is linear in
its frames (untrained.contrast), so the index stores the frames.
"""
import functools
import hashlib
import json
import os
import pathlib
import sys
import time
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

import filelock
import torch
from torch import Tensor
from tqdm import tqdm

import video
from extras.features import read_all
from retrieve import Retriever, ZeroShot, add_options, note, retriever_of
from support import files, options
from support.errors import Mistake, reported
from support.text import printable

COMMANDS = {"videos": "python -m extras.index", "clip2video": "python -m clip2video index"}
SAVED_EVERY_SEC = 10            # more often, and the table would take longer than the vectors


class Entry(NamedTuple):
    """What the table knows of a video."""
    path: str                   # below the folder of videos
    state: list[int]            # size and modification time of the file
    file: str                   # its vectors
    rows: int                   # of each of its arrays: moments, frames, or 1
    duration_sec: float = 0.0
    mean: float = 0.0           # of the best scores of generic sentences, and
    deviation: float = 1.0      # their standard deviation, for z (retrieve.answers_of)


class Index:
    """The vectors of many videos, in a folder:

        <part>.json     what they were made with, the folder of videos, and an Entry for each
        <part>/         for each video a file of arrays [rows, width]

    An update writes new files and then replaces the table. No file ever changes, so a reader keeps
    what it has read, and rows cannot mix.

    part   "videos": moments (iou, contrastive: float16, spans: float32) or frames (float16);
           "clip2video": whole videos
    made   what the index is made with (`made_with`); None to read any
    """

    def __init__(self, folder: str | os.PathLike, made: dict | None = None, part: str = "videos"):
        self.folder = pathlib.Path(folder)
        self.table = self.folder / f"{part}.json"
        self.vectors = self.folder / part
        self.command = COMMANDS[part]
        self.made = made
        self.videos_folder = pathlib.Path()
        self.entries: dict[str, Entry] = {}                     # name, in NFC -> about the video
        self.version: list[int] = []                            # of the table that was read
        self.loaded = None                                      # see `load`
        if self.table.exists():
            self.read_table()
        elif made is None:
            raise Mistake(f"{folder} is not an index; make one with: {self.command} DIR --out "
                          f"{folder}")

    def read_table(self) -> None:
        """Reads the table. Mistake if it is damaged, or if the index was made with another
        checkpoint or setting than `made`."""
        self.version = state_of(self.table)                     # before it is read
        try:
            content = json.loads(self.table.read_text(encoding="utf-8"))
            made = dict(content["made"])
            self.videos_folder = pathlib.Path(content["folder"])
            self.entries = {name: Entry(**about) for name, about in content["videos"].items()}
            for entry in self.entries.values():
                kinds = [type(value) for value in entry]
                below = pathlib.PurePath(entry.path)            # extras/serve.py serves such files
                if (kinds != [str, list, str, int, float, float, float] or entry.rows < 0
                        or not entry.deviation > 0 or below.is_absolute() or ".." in below.parts):
                    raise ValueError("invalid entry")
            if not all(isinstance(made[name], str) for name in ("kind", "checkpoint", "sha256")):
                raise ValueError("it does not say what made it")
            if made["kind"] == "frames":                # an earlier version averaged nothing
                made.setdefault("smooth_sec", 0.0)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Mistake(f"{self.table} is damaged or of an earlier version ({error}); remove "
                          f"{self.folder} and make the index again") from error
        for name, value in (self.made or {}).items():
            # a checkpoint is identified by its SHA-256; its file may have moved
            if name != "checkpoint" and made.get(name) != value:
                raise Mistake(f"{self.folder} was made with another checkpoint or setting, "
                              f"{made['checkpoint']}; choose another --out")
        self.made = self.made or made

    def is_outdated(self) -> bool:
        """Whether an update has replaced the table since it was read."""
        return self.table.exists() and state_of(self.table) != self.version

    def save(self) -> None:
        """Replaces the table."""
        videos = {name: entry._asdict() for name, entry in self.entries.items()}
        files.save(self.table, json.dumps({"made": self.made, "folder": str(self.videos_folder),
                                           "videos": videos}, indent=1))
        self.version = state_of(self.table)
        self.loaded = None

    def update(self, folder: str | os.PathLike, encode: Callable) -> dict[str, str]:
        """Synchronises the index with a folder of videos: reads new and changed files, drops
        removed ones. Returns and prints name -> reason for those that could not be read, of which
        it keeps what it knew. Mistake if nothing could be read.

        encode   video file -> its arrays by name, [rows, width] each, and a dict of what else an
                 Entry contains
        """
        files.need("imageio_ffmpeg", "reading videos")          # now, rather than once per video
        with only_update(self.folder):
            videos = videos_in(folder)
            if self.table.exists():
                self.read_table()                               # another update may have ended
            real = pathlib.Path(folder).resolve()
            if self.entries and real != self.videos_folder and not videos.keys() & self.entries:
                raise Mistake(f"{folder} contains none of the {len(self.entries)} videos of this "
                              f"index, which is of {self.videos_folder}; choose another --out")
            self.videos_folder = real
            # another form of the same name, beside a file, changes what the file is called
            called = {path: name for name, path in videos.items()}
            self.entries = {called.get(real / entry.path, name): entry
                            for name, entry in self.entries.items()}
            named = {entry.file for entry in self.entries.values()}
            for path in self.vectors.glob("*"):
                # since the last update; its readers have read it
                if path.name not in named and path.is_file():
                    path.unlink()
            failed = self.drop_deleted(videos)
            saved = time.monotonic()
            known = {real / entry.path: entry for entry in self.entries.values()}
            results = read_all(videos, functools.partial(self.read_changed, known, encode))
            try:
                for name, result in tqdm(results, desc="index", unit="video", total=len(videos),
                                         disable=None):
                    if result.reason:                           # continue with the other videos
                        failed[name] = result.reason
                        tqdm.write(printable(f"failed: {name}: {result.reason}"))
                    elif result.value:
                        if name in self.entries:
                            tqdm.write(printable(f"changed: {name}"))
                        self.add(name, videos[name], *result.value)
                    if time.monotonic() - saved > SAVED_EVERY_SEC:
                        self.save()
                        saved = time.monotonic()
            finally:
                results.close()                                 # cancels what has not begun
                self.save()                                     # what is finished, after Ctrl-C too
        if failed and not self.entries:
            raise Mistake(f"no video in {folder} could be read: {next(iter(failed.values()))}")
        if failed:
            print(f"{len(failed)} videos could not be read")
        return failed

    def drop_deleted(self, videos: dict[str, pathlib.Path]) -> dict[str, str]:
        """Drops the videos that were deleted. Returns name -> reason for those that only cannot be
        found now."""
        missing = {}
        for name in self.entries.keys() - videos.keys():
            if is_deleted(self.path_of(name)):
                print(printable(f"removed: {name}"))
                del self.entries[name]
            else:                                               # keep what is known of it
                missing[name] = "its folder is closed or empty (is its disk mounted?)"
                print(printable(f"failed: {name}: {missing[name]}; its vectors are kept"))
        return missing

    def read_changed(self, known: dict[pathlib.Path, Entry], encode: Callable,
                     path: pathlib.Path) -> tuple | None:
        """The state of a file, and what `encode` gives of it; None if that is known already.
        VideoError if the file changes meanwhile."""
        entry = known.get(path)
        if entry and entry.state == state_of(path) and (self.vectors / entry.file).exists():
            return None
        state = state_of(path)
        arrays, about = encode(path)
        if state_of(path) != state:
            raise video.VideoError(f"{path} was replaced while it was read; rerun {self.command}")
        return state, arrays, about

    def add(self, name: str, path: pathlib.Path, state: list[int], arrays: dict[str, Tensor],
            about: dict) -> None:
        """Writes the vectors of a video. They count once the table names their file."""
        digest = hashlib.sha256(repr((name, state, self.made["sha256"])).encode()).hexdigest()
        file = f"{digest[:32]}.npz"
        files.save_arrays(self.vectors / file, {key: x.numpy() for key, x in arrays.items()})
        rows = len(next(iter(arrays.values())))
        self.entries[name] = Entry(str(path.relative_to(self.videos_folder)), state, file, rows,
                                   **about)

    def load(self) -> tuple[dict[str, Tensor], dict[str, slice]]:
        """The arrays of all videos together, [R, width] each, and the rows of each video. They are
        read once. Mistake if a file is missing or damaged."""
        if self.loaded:
            return self.loaded
        if not self.entries:
            raise Mistake(f"{self.folder} contains no video; add some with: {self.command}")
        parts: dict[str, list[Tensor]] = {}
        slices = {}
        first = 0
        for name, entry in self.entries.items():
            path = self.vectors / entry.file
            arrays = files.read_arrays(path)
            sizes = {x.shape[:1] for x in arrays.values()}
            if sizes != {(entry.rows,)} or parts and parts.keys() != arrays.keys():
                raise Mistake(f"{path} is damaged; remove it and rerun {self.command}")
            for key, x in arrays.items():
                parts.setdefault(key, []).append(torch.from_numpy(x))
            slices[name] = slice(first, first + entry.rows)
            first += entry.rows
        # subtle: pop, so that not all parts and all results are in memory at once
        self.loaded = {key: torch.cat(parts.pop(key)) for key in list(parts)}, slices
        return self.loaded

    def path_of(self, name: str) -> pathlib.Path:
        """The file of a video."""
        return self.videos_folder / self.entries[name].path

    def is_current(self, name: str) -> bool:
        """Whether the file of a video is there, and as it was indexed."""
        try:
            return state_of(self.path_of(name)) == self.entries[name].state
        except OSError:                                         # removed, or in a closed folder
            return False


def only_update(folder: pathlib.Path) -> filelock.AcquireReturnProxy:
    """Waits until no other process updates the index in this folder; for `with`."""
    folder.mkdir(parents=True, exist_ok=True)
    # the operating system releases the lock of a process that was killed
    lock = filelock.FileLock(folder / ".lock")
    try:
        return lock.acquire(timeout=0)
    except filelock.Timeout:
        print(f"note: waiting for another update of {folder} to end", file=sys.stderr)
        return lock.acquire()


def state_of(path: pathlib.Path) -> list[int]:
    """What changes when a file does: its size and modification time in nanoseconds."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def is_deleted(path: pathlib.Path) -> bool:
    """Whether a file was deleted. It was not if its folder is closed, or is empty like the place of
    a disk that is not mounted, or still lists it (a link to a file that is not there now)."""
    above = next(parent for parent in path.parents if os.path.lexists(parent))
    try:
        names = os.listdir(above)
    except OSError:
        return False
    return bool(names) and path.relative_to(above).parts[0] not in names


def videos_in(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """Name (the path below the folder, in NFC) -> file, for all videos of a folder. Mistake if
    there are none; a note lists the suffixes of other files."""
    if not os.path.isdir(folder):
        raise Mistake(f"there is no folder {folder}")
    folder = pathlib.Path(folder).resolve()
    by_name = {}                                        # name in NFC -> its files
    others = set()
    for path in files.files_below(folder):
        if path.suffix.lower() in video.VIDEOS:
            name = unicodedata.normalize("NFC", str(path.relative_to(folder)))
            by_name.setdefault(name, []).append(path)
        else:
            others.add(path.suffix.lower() or path.name)
    videos = {}
    for name, paths in by_name.items():
        videos[name] = paths[0]
        if len(paths) > 1:                      # both forms of a name, side by side: as they are
            videos |= {str(path.relative_to(folder)): path for path in paths}
    # an unmounted disk looks like an empty folder, and would empty the index
    if not videos:
        raise Mistake(f"{folder} contains no video; pass a folder that does, and check that its "
                      f"disk is mounted (to empty an index, remove its folder)")
    if others:
        note(printable(f"files that end in {', '.join(sorted(others)[:20])} are skipped"))
    return videos


# -------------------------------------------------------------------------------- the command line

def encode_video(retriever: Retriever | ZeroShot,
                 path: pathlib.Path) -> tuple[dict[str, Tensor], dict]:
    """What an index stores of a video: arrays by name, and about it."""
    encoded = retriever.encode(path)
    generic = retriever.generic_best(encoded)                           # [G] scores
    about = {"duration_sec": encoded.duration_sec, "mean": float(generic.mean()),
             "deviation": float(generic.std().clamp(min=1e-9))}
    if retriever.kind == "clip":
        return {"frames": encoded.frames.half()}, about                 # [F, D]
    spans, iou, contrastive = retriever.moments(encoded)                # [W * P, 2 or J]
    return {"iou": iou.half(), "spans": spans.float(), "contrastive": contrastive.half()}, about


def made_with(retriever: Retriever | ZeroShot, checkpoint: str | None) -> dict:
    """What determines an index; another setting needs another index."""
    if checkpoint:
        return {"kind": "candidate moments", "checkpoint": str(pathlib.Path(checkpoint).resolve()),
                "sha256": files.sha256(checkpoint)}
    return {"kind": "frames", "checkpoint": retriever.name, "sha256": retriever.digest,
            "rate": retriever.rate, "prompt": retriever.prompt,
            "limits_sec": list(retriever.limits_sec), "smooth_sec": retriever.smooth_sec}


def update_index(retriever: Retriever | ZeroShot, checkpoint: str | None, folder: str,
                 out: str) -> tuple[Index, dict[str, str]]:
    """Updates the index in `out`, see `Index.update`."""
    if checkpoint:
        retriever.image_tower                   # missing weights are no fault of the first video
    index = Index(out, made_with(retriever, checkpoint))
    return index, index.update(folder, functools.partial(encode_video, retriever))


def summary(index: Index) -> str:
    """For instance "6 videos, 1.5 minutes of video, 816 candidate moments"."""
    entries = index.entries.values()
    rows = sum(entry.rows for entry in entries)
    minutes = sum(entry.duration_sec for entry in entries) / 60
    length = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    return f"{len(entries)} videos, {length} of video, {rows:,} {index.made['kind']}"


def main() -> None:
    arguments = options.parser("index a folder of videos, or update its index",
                               usage="python -m extras.index [CKPT.pt] DIR --out INDEX",
                               prog="python -m extras.index")
    add = arguments.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="a checkpoint (or none: CLIP alone), and a "
                                                   "folder of videos")
    add("--out", required=True, help="folder of the index")
    add_options(arguments)
    given = arguments.parse_args()
    with reported():
        if len(given.inputs) > 2:
            raise Mistake("pass at most one checkpoint, and one folder of videos")
        folder = given.inputs[-1]
        checkpoint = given.inputs[0] if len(given.inputs) == 2 else None
        videos_in(folder)                       # before a download starts
        retriever = retriever_of(given, checkpoint, cache=None)
        index, _ = update_index(retriever, checkpoint, folder, given.out)
        print(f"{given.out}: {summary(index)}")


if __name__ == "__main__":
    main()
