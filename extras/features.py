"""Features of many videos: extracted from their files, or made elsewhere; a store of them.

    python data.py charades --videos DIR
    python data.py charades --features DIR --clip ViT-B/32              # .npy, .npz or .pt
    python data.py charades --features vgg_rgb_features.hdf5 --backbone vgg

Shapes: T frames of a video, R resolution, D width of CLIP's joint space, L features of a video as
they were made elsewhere.
"""
import collections
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import clip
import video
from data import FeatureStore, VideoError, clip_file, patch_frames
from support import files
from support.errors import Mistake, reason
from video import frame_centres


def load_clip(name: str, root: str | os.PathLike, device: torch.device,
              gelu: bool) -> tuple[clip.CLIP, str]:
    """The CLIP that --clip and --gelu name, and its SHA-256. Mistake if it cannot be loaded, or has
    another tokenizer."""
    path = clip_file(name, root)
    if name.startswith("shapes") and path == name:
        raise Mistake(f"the small CLIP of {name} does not exist; make it with: python shapes.py")
    model = clip.load(path, device, nn.GELU if gelu else None)
    model.tokenize("")                                  # a Mistake if it has another tokenizer
    return model, clip.sha256(path)


# ------------------------------------------------------------------------- many videos -> the store

class Result(NamedTuple):
    """What `read_all` gives of a file: what `read` returned, or None and the reason."""
    value: Any
    reason: str = ""


def attempt(read: Callable, path: pathlib.Path) -> Result:
    """`read(path)`; any exception becomes the reason."""
    try:
        return Result(read(path))
    except (Mistake, OSError) as error:
        return Result(None, str(error) or reason(error))
    except Exception as error:  # of any type: one bad file must not end the work on all others
        return Result(None, reason(error))


def read_all(paths: dict[str, pathlib.Path], read: Callable) -> Iterator[tuple[str, Result]]:
    """`attempt` for all files, in order; as many at a time as there are cores, each in a thread
    that mostly waits for a process of its own."""
    workers = os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers)
    pending = collections.deque()
    try:
        for name, path in paths.items():
            pending.append((name, pool.submit(attempt, read, path)))
            if len(pending) == 2 * workers:             # bounds the results held in memory
                first, future = pending.popleft()
                yield first, future.result()
        for name, future in pending:
            yield name, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


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


def store_all(store: FeatureStore, paths: dict[str, pathlib.Path], read: Callable,
              write: Callable, failed: dict[str, str]) -> None:
    """Reads all files, and calls write(name, what was read), which encodes and stores it. Adds the
    videos that cannot be read to `failed` (name -> reason), and writes it to failed.txt."""
    results = read_all(paths, read)
    try:
        for name, result in tqdm(results, desc="features", unit="video", total=len(paths),
                                 disable=None):
            try:
                if result.reason:
                    raise VideoError(result.reason)
                write(name, result.value)
            except VideoError as error:                 # or its features are not finite
                failed[name] = str(error)
    finally:
        results.close()                                 # cancels what has not begun
        store.save_manifest()                           # of what is finished, after Ctrl-C too
    store.save_failed(failed)


def extract(store: FeatureStore, model: clip.CLIP, videos: dict[str, pathlib.Path],
            names: list[str], training: set[str],
            precision: torch.dtype = torch.float32) -> dict[str, str]:
    """Extracts the missing features of the videos `names`, with patches for those in `training`.
    Returns video -> reason for those that failed. Can be interrupted at any point: the next call
    continues."""
    files.need("imageio_ffmpeg", "reading videos")      # fail now rather than once per video
    T = store.manifest["frames"]
    kept = patch_frames(T, store.manifest["patch_frames"])              # [T']
    failed = {}
    paths, sizes = missing(store, videos, names, training, failed)

    def write(name: str, decoded: tuple[Tensor, float]) -> None:
        pixels, duration_sec = decoded                                  # [T, 3, R, R]
        frames, patches = video.encode_frames(model, pixels, precision=precision)
        patches = patches[kept] if name in training else None           # [T', D', H, W]
        store.write(name, frames, patches, duration_sec, sizes[name])

    read = functools.partial(video.sample_frames, count=T, resolution=model.visual.resolution)
    store_all(store, paths, read, write, failed)
    return failed


# -------------------------------------------------------------------------- features made elsewhere

FEATURES = {".npy", ".npz", ".pt", ".hdf5", ".h5"}
LARGEST = 1 << 30   # bytes of a packed file of features, when unpacked


class Entry(NamedTuple):
    """The features of one video in an open hdf5 file: a dataset [L, D], as 2D-TAN and MMN publish
    Charades-STA's, or a group with one, as they publish ActivityNet's."""
    file: Mapping
    name: str

    def __str__(self) -> str:
        return f"{self.name} in {self.file.file.filename}"      # of the group's file


def open_hdf5(path: str | os.PathLike) -> Mapping:
    h5py = files.need("h5py", "reading hdf5")
    try:
        return h5py.File(path, "r")
    except Exception as error:  # several types for a damaged or hostile file
        raise Mistake(f"{path} cannot be read as hdf5: {reason(error)}") from error


def find_features(path: str | os.PathLike) -> dict[str, pathlib.Path | Entry]:
    """Video -> its features: the files of a folder, or the entries of an hdf5 file."""
    if pathlib.Path(path).suffix.lower() not in (".hdf5", ".h5"):
        return files.find_files(path, FEATURES)
    file = open_hdf5(path)
    if len(file) == 1:                                  # a group of all videos
        (only,) = file.values()
        if isinstance(only, Mapping) and all(isinstance(x, Mapping) or x.ndim == 2
                                             for x in only.values()) and len(only) > 1:
            return {name: Entry(only, name) for name in only}
    return {name: Entry(file, name) for name in file}


def only_array(arrays: Mapping, what: str):
    """The features among named arrays: those called features or c3d_features, or the only ones.
    ValueError that lists what is there."""
    while isinstance(arrays, Mapping):
        names = [name for name in ("features", "c3d_features") if name in arrays]
        names = names or list(arrays)
        if len(names) != 1:
            found = ", ".join(f"{name} {list(getattr(arrays[name], 'shape', []))}"
                              for name in names[:10])
            raise ValueError(f"{what} contains several arrays, none of which is called features: "
                             f"{found or 'nothing'}")
        arrays = arrays[names[0]]
    return arrays


def read_features(path: pathlib.Path | Entry) -> np.ndarray:
    """Precomputed features [L, D]: an array, or the only one, of a .npy, .npz, .pt or hdf5 file.
    VideoError for anything else."""
    try:
        if isinstance(path, Entry):
            x = unpacked(only_array(path.file[path.name], str(path)))
        elif path.suffix.lower() in (".hdf5", ".h5"):
            with open_hdf5(path) as file:
                x = unpacked(only_array(file, path.name))
        elif path.suffix.lower() == ".pt":
            x = only_array(files.read_tensors(path), path.name)
            if not isinstance(x, Tensor):
                raise ValueError(f"it contains a {type(x).__name__}, not a tensor")
            x = x.detach().float().numpy()              # a saved tensor may require gradients
        elif path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:      # before numpy unpacks a zip bomb
                if sum(part.file_size for part in archive.infolist()) > LARGEST:
                    raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
            with np.load(path, allow_pickle=False) as file:
                x = only_array({name: file[name] for name in file.files}, path.name)
        else:
            # memory-mapped, so that a header cannot claim more than the file holds
            x = np.array(np.load(path, mmap_mode="r", allow_pickle=False))
    except ValueError as error:                         # ours, or numpy's
        raise VideoError(f"{path} cannot be read as features: {error}") from error
    except Exception as error:  # a dozen types for a damaged or hostile file
        raise VideoError(f"{path} cannot be read as features: {reason(error)}") from error
    if x.ndim != 2 or not len(x) or x.dtype.kind not in "fiu" or not np.isfinite(x).all():
        raise VideoError(f"{path} contains {x.dtype} {list(x.shape)}, not finite numbers [L, D]")
    return x


def unpacked(x) -> np.ndarray:
    """A dataset of an hdf5 file."""
    if x.nbytes > LARGEST:
        raise ValueError(f"it unpacks to more than {LARGEST >> 20} MiB")
    return np.asarray(x[()])


def made_elsewhere(name: str, path: str | os.PathLike, features: dict[str, pathlib.Path | Entry],
                   names: list[str], frames: int) -> dict:
    """`made_by` for precomputed features, either of a published CLIP, whose weights are not needed,
    or of another network, which resolution 0 marks. Their width is that of the first video of
    `names` that can be read; Mistake if there is none, or if it is not that CLIP's."""
    width = 0
    for name_of_video in names:
        with contextlib.suppress(KeyError, VideoError):         # `adopt_features` reports it
            width = read_features(features[name_of_video]).shape[1]             # D
            break
    if not width:
        raise Mistake(f"{path} has no features of the {len(names)} videos of this dataset that can "
                      f"be read")
    resolution = 0
    # the digest only has to tell one set of features from another
    if name in clip.PUBLISHED:
        digest, expected, resolution = clip.PUBLISHED[name]
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
            # rows that float16 would lose; their direction is what counts (data.Videos)
            largest = np.abs(x).max(1, keepdims=True)                   # [T, 1]
            is_lost = (0 < largest) & (largest < 1e-3) | (largest > 1e4)
            x = x / np.where(is_lost, largest, 1)                       # [T, D]
            store.write(name, torch.from_numpy(x.astype(np.float16)), None, durations_sec[name])
        except VideoError as error:
            failed[name] = str(error)
    store.save_manifest()
    store.save_failed(failed)
    if each_sec:
        print(f"seconds per feature: {min(each_sec):.2f} to {max(each_sec):.2f}, median "
              f"{np.median(each_sec):.2f}")
    return failed
