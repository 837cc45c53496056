"""The annotations and features of a dataset: the command of data.py.

    python data.py charades                                     # download and count annotations
    python data.py charades --videos DIR                        # also extract features
    python data.py mine --annotations my.jsonl --videos DIR     # your own videos and sentences
    python data.py check                                        # are the features complete?

Published annotations must have the published counts. Features are extracted once; an interrupted
command continues where it stopped.
"""
import argparse
import contextlib
import math
import os
import pathlib
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

import clip
import data
import video
from data import Sample
from extras import features as features_of
from support import files, options, parallel
from support.errors import Missing, Mistake, reported
from support.text import aligned, printable

# names of the folders in the published repositories
FOLDERS = {"charades": ("Charades-STA", "Charades_STA"), "charades-cg": ("Charades-CG",),
           "activitynet": ("ActivityNet",), "activitynet-cg": ("ActivityNet_CG", "ActivityNet-CG")}
COUNTS = {                          # videos and sentences of each split, after cleaning
    "charades": {"train": (5336, 12404), "test": (1334, 3720)},
    "charades-cg": {"train": (3555, 8281), "novel-word": (580, 695),
                    "novel-composition": (2480, 3442), "trivial": (1689, 3096)},
    "activitynet": {"train": (10009, 37417), "val": (4917, 17505), "test": (4885, 17031)},
    "activitynet-cg": {"train": (9659, 36720), "novel-word": (1991, 3920),
                       "novel-composition": (4202, 12028), "trivial": (4775, 15712)},
}
SOURCES = files.ASSETS / "annotations.txt"      # lines "file below the root, address, SHA-256"


# -------------------------------------------------------------------------------------- annotations

def install(dataset: str, root: str | os.PathLike, folder: str | os.PathLike | None,
            direct: bool = True) -> None:
    """Puts the published annotations of a dataset below the root.

    They are copied from `folder` (from a subfolder named like the dataset or, if `direct`, from
    `folder` itself), under any of their published names; without `folder`, missing ones are
    downloaded. Mistake unless the counts are the published ones."""
    if folder is None:
        download(dataset, root)
        return
    source = pathlib.Path(folder)
    if not source.is_dir():                             # your own annotations are one file
        raise Mistake(f"{folder} is not a folder; the annotations of {dataset} are several files, "
                      f"and --annotations names their folder")
    place = source if direct else None                  # the sibling needs a folder of its own
    for name in reversed((dataset,) + FOLDERS[dataset]):                # so that the first one wins
        if (source / name).is_dir():
            place = source / name
    if place is None:
        raise Missing(f"{folder} contains no folder {dataset}")
    paths, wanted = [], []
    for split, names in data.FILES[dataset].items():
        wanted += names
        existing = [place / name for name in names if (place / name).exists()]
        if existing:                                    # several forms of one split: the first
            samples = data.clean(data.read_file(existing[0]))[0]
            check_counts(dataset, split, samples, existing[0])
            paths.append(existing[0])
    if not paths:
        raise Missing(f"{folder} contains no annotations of {dataset}: none of {', '.join(wanted)}")
    paths += [place / name for name in data.CSV if (place / name).exists()]     # durations
    for path in paths:                                  # only after all counts have been checked
        files.save(pathlib.Path(root) / dataset / path.name, path.read_bytes())


def download(dataset: str, root: str | os.PathLike) -> None:
    """Fetches the annotation files that are missing below the root, and verifies their SHA-256."""
    sources = {}
    for line in files.read_text(SOURCES).splitlines():
        file, address, digest = line.split()
        sources[file] = address, digest
    for split, names in data.FILES[dataset].items():
        if data.annotation_file(dataset, split, root).exists():
            continue
        wanted = [names[0]]                             # the form that SOURCES lists
        if dataset == "charades":                       # its text files have no durations
            wanted += data.CSV
        for name in wanted:
            address, digest = sources[f"{dataset}/{name}"]
            files.fetch(address, digest, pathlib.Path(root) / dataset / name)


def check_counts(dataset: str, split: str, samples: list[Sample], path: pathlib.Path) -> None:
    """Mistake unless a split has as many videos and sentences as were published."""
    counts = (len({sample.video for sample in samples}), len(samples))
    expected = COUNTS[dataset][split]                   # videos, sentences
    if counts != expected:
        raise Mistake(f"{path} is not {dataset}'s {split} as published: it has {counts[1]} "
                      f"sentences of {counts[0]} videos after cleaning, expected {expected[1]} of "
                      f"{expected[0]}; replace it by the published file")


def describe(dataset: str, root: str | os.PathLike) -> str:
    """The counts of Sec. 4.1.1 as a table, a line for each split. Mistake if one is not the
    published one. A video of two splits counts twice, as in the paper."""
    rows = {}                                           # split -> sums over its videos
    for split in data.splits(dataset, root):
        path = data.annotation_file(dataset, split, root)
        if not path.exists():                           # --annotations may lack a split
            continue
        samples, clamped, dropped = data.clean(data.read_file(path))
        if dataset in COUNTS:                           # a published dataset
            check_counts(dataset, split, samples, path)
        durations_sec = {sample.video: sample.duration_sec for sample in samples}
        moments_sec = sum(sample.end_sec - sample.start_sec for sample in samples)
        rows[split] = np.array([len(durations_sec), len(samples), sum(durations_sec.values()),
                                moments_sec, clamped, dropped])
    if not rows:
        return ""
    if len(rows) > 1:
        rows["all"] = sum(rows.values())
    lines = []
    for split, (videos, queries, seconds, moments_sec, clamped, dropped) in rows.items():
        lines.append([dataset, split, f"{videos:.0f}", f"{queries:.0f}", f"{seconds / videos:.2f}",
                      f"{moments_sec / queries:.2f}", f"{queries / videos:.2f}",
                      f"{clamped:.0f}", f"{dropped:.0f}"])
    return aligned(["dataset", "split", "videos", "queries", "video sec", "moment sec",
                    "moments per video", "clamped", "dropped"], lines, 2)


def plain_name(name: str, known: dict) -> str:
    """The name of a video as features are stored under it: "a" for "a.mp4" if that is meant.

    known   the names of video files, or of precomputed features"""
    stem, suffix = os.path.splitext(name)
    if name in known or stem not in known or suffix.lower() not in video.VIDEOS:
        return name
    path = pathlib.Path(str(known[stem]))
    if path.suffix.lower() in video.VIDEOS and path.name != name:       # b.mp4 is not b.mkv
        return name
    return stem


def adopt(dataset: str, split: str, path: str, videos: dict[str, pathlib.Path], root: str,
          features: dict | None = None) -> None:
    """Your own annotation file becomes <root>/<dataset>/<split>.jsonl: videos lose their file
    suffixes, missing durations are probed, moments cleaned, and the counts printed. A video that
    cannot be read is assumed to end with its last moment."""
    rows = data.read_file(path)
    rows = [row._replace(video=plain_name(row.video, videos or features or {})) for row in rows]
    # one line of a video may give its duration for all
    durations_sec = {row.video: row.duration_sec for row in rows
                     if not math.isnan(row.duration_sec)}
    unknown = {row.video for row in rows} - durations_sec.keys()
    if unknown and not videos:
        # with --features, --videos cannot be given
        videos_help = "" if features else ", or name their folder with --videos"
        raise Mistake(f"{path} does not give the durations of {len(unknown)} videos; add "
                      f"\"duration\" to its lines{videos_help}")
    for name in unknown:
        try:
            durations_sec[name] = video.probe_duration(videos[name])
        except (KeyError, video.VideoError):            # reported again by `extract`
            durations_sec[name] = max(row.end_sec for row in rows if row.video == name)
    rows = [row._replace(duration_sec=durations_sec.get(row.video, row.duration_sec))
            for row in rows]
    # clamping forgives a rounded end
    outside = sum(row.end_sec > 1.5 * row.duration_sec for row in rows)
    if outside > len(rows) / 2:
        raise Mistake(f"{outside} of {len(rows)} moments in {path} lie outside their video; are "
                      f"they frame numbers? They must be seconds")
    kept, clamped, dropped = data.clean(rows)
    if not kept:
        raise Mistake(f"{path} contains no moment; add some")
    data.write_jsonl(data.annotation_file(dataset, split, root), kept)
    print(f"{split}: {len(kept)} sentences of {len({row.video for row in kept})} videos; "
          f"{clamped} moments clamped to their video, {dropped} empty ones dropped")


def prepare(dataset: str, given: argparse.Namespace, videos: dict[str, pathlib.Path],
            features: dict) -> dict[str, list[Sample]]:
    """Installs the annotations, prints their counts, and returns them by dataset and split."""
    # the compositional splits are other sentences on the same videos: one store for both
    original = dataset.removesuffix("-cg")
    family = [name for name in data.FILES if name.removesuffix("-cg") == original]
    for name in family:
        try:
            install(name, given.root, given.annotations, name == dataset)
        except Missing as error:
            if name == dataset and given.annotations:
                raise
            if name == dataset:                         # a failed download
                raise Mistake(f"{error}; or name a folder that has the annotations with "
                              f"--annotations") from error
            # the sibling is optional: the chosen dataset works without it
            print(f"note: {name} is skipped: {error}", file=sys.stderr)
    if not family:                                      # a dataset of your own
        family = [dataset]
        if given.annotations:
            adopt(dataset, given.split, given.annotations, videos, given.root, features)
    samples = {}
    for name in family:
        for split in data.splits(name, given.root):
            if data.annotation_file(name, split, given.root).exists():
                samples[f"{name} {split}"] = data.read_annotations(name, split, given.root)
    if not samples:                                     # perhaps a misspelled name
        path = data.annotation_file(dataset, "train", given.root)
        raise Mistake(f"{dataset} has no annotations: there is no {path}; name your own with "
                      f"--annotations FILE (known by name: {', '.join(data.FILES)})")
    for name in family:
        print(describe(name, given.root))
    return samples


# ----------------------------------------------------------------------------------------- features

def make_features(dataset: str, samples: dict[str, list[Sample]], given: argparse.Namespace,
                  videos: dict[str, pathlib.Path], features: dict) -> None:
    """Features of all videos of `samples` (split -> rows), from video files or precomputed. Under
    torchrun, process r of n takes every n-th video."""
    rank = int(os.environ.get("RANK", 0))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    T = given.frames or (256 if dataset == "activitynet" else 32)       # as in MMN
    rows = []
    for part in samples.values():
        rows += part
    names = sorted({row.video for row in rows})         # the same order in every process
    if given.features and (given.backbone or given.clip in clip.PUBLISHED):
        # no weights are needed: the network is published, or not a CLIP
        name = given.backbone or given.clip
        made = features_of.made_elsewhere(name, given.features, features, names, T)
    else:
        device = parallel.pick_device(given.device)
        model, digest = features_of.load_clip(given.clip, given.root, device, given.gelu)
        precision = "fp16" if device.type == "cuda" else "float32"
        patches, how = min(T, 32), precision            # see data.patch_frames
        if given.features:                              # of this CLIP, computed by other code
            patches, how = 0, "made elsewhere"
        made = video.made_by(model, given.clip, digest, T, patches, how)
    # each process writes a manifest of its own, and a store reads all of them
    folder = data.store_folder(dataset, made["clip"], given.root)
    store = data.FeatureStore(folder, made, f"-{rank}" if rank else "")
    names = names[rank::processes]                      # this process's share
    if given.features:
        # from the annotations, as there are no videos to probe
        durations_sec = {row.video: row.duration_sec for row in rows}
        failed = features_of.adopt_features(store, features, names, durations_sec)
    else:
        training = set()                                # only these need patches (Eq. 3)
        for split, part in samples.items():
            if split.endswith("train"):
                training.update(row.video for row in part)
        failed = features_of.extract(store, model, videos, names, training,
                                     video.PRECISIONS[precision])
    for name, reason in sorted(failed.items()):
        print(printable(f"failed: {name}: {reason}"))   # names may hold control characters
    print(f"{len(names) - len(failed)} of {len(names)} videos have features in {store.folder}")
    if failed:
        lost = sum(row.video in failed for row in rows)
        print(f"the {len(failed)} that failed (failed.txt) have {lost} sentences")
    if names and len(failed) == len(names):
        raise Mistake(f"none of {len(names)} videos could be read, see above")


# -------------------------------------------------------------------------------------------- check

def check(which: str | None, root: str) -> bool:
    """Prints the problems of the features of a dataset (default: all). True if there are none."""
    family = which or "*"
    if which in data.FILES:                             # "-cg" splits share the original's store
        family = which.removesuffix("-cg")
    stores = sorted(path for path in pathlib.Path(root).glob(f"{family}/features/*")
                    if list(path.glob("manifest*.json")))
    if not stores:
        raise Mistake(f"there are no features in {root}/{family}/features; make them with: python "
                      f"data.py DATASET --videos DIR")
    complete = True
    for folder in stores:
        store = data.FeatureStore(folder)
        dataset = folder.parts[-3]                      # <root>/<dataset>/features/<clip>
        problems = list(file_problems(store))
        for name in (dataset, dataset + "-cg"):
            for split in data.splits(name, root):
                if data.annotation_file(name, split, root).exists():
                    problems += gaps(store, name, split, root)
        problems = list(dict.fromkeys(problems))        # a video may be in several splits
        made = ", ".join(f"{key} {store.manifest.get(key)}"
                         for key in ("clip", "frames", "precision"))
        print(f"{folder}: {len(store.manifest['videos'])} videos, {made}, {len(problems)} problems")
        for problem in problems:
            print(f"  {printable(problem)}")
        complete = complete and not problems
    return complete


def file_problems(store: data.FeatureStore) -> Iterator[str]:
    """A sentence for every file of a store that does not agree with the manifest."""
    made = store.manifest
    listed = set()
    for name, about in tqdm(made["videos"].items(), desc="check", unit="video", disable=None):
        duration_sec = about["duration_sec"]
        each_sec = about["seconds_per_feature"]
        frames_sec = each_sec * made["frames"]          # T features cover the video
        if not (0 < duration_sec < math.inf
                and math.isclose(frames_sec, duration_sec, rel_tol=1e-6)):
            yield f"{name} is {duration_sec} s long, but its features are {each_sec} s each"
        for kind in ("frames", "patches"):
            path = store.path(name, kind)
            listed.add(path)
            if kind == "patches" and not path.exists():         # `gaps` knows who needs them
                continue
            try:
                x = store.read(name, kind)              # compares the shape with the manifest
                if x.dtype != np.float16:
                    yield f"{path.name} is {x.dtype}, not float16"
                elif not np.isfinite(x).all():
                    yield f"{path.name} is not finite"
                elif not x.any():
                    yield f"{path.name} is all 0"
            except data.VideoError as error:
                yield str(error)
    # subtle: features are written before the manifest, so an interruption leaves unlisted files
    for path in sorted(set(store.folder.glob("*.npy")) - listed):
        yield (f"{path.name} is not listed in any manifest (interrupted extraction?); rerun "
               f"data.py")


def gaps(store: data.FeatureStore, dataset: str, split: str, root: str) -> Iterator[str]:
    """A sentence for everything that the annotations of a split need and a store lacks."""
    rows = data.read_annotations(dataset, split, root)
    stated_sec = {row.video: row.duration_sec for row in rows}
    videos = store.manifest["videos"]
    missing = [name for name in stated_sec if name not in videos]
    if missing:
        yield (f"{dataset} {split}: {len(missing)} of {len(stated_sec)} videos have no features "
               f"(see failed.txt)")
    bare = [name for name in stated_sec
            if name in videos and not store.path(name, "patches").exists()]
    # precomputed features have none, and only training reads them
    if split == "train" and store.manifest["patch_frames"] and bare:
        yield (f"{dataset} {split}: {len(bare)} videos have no patches, for instance {bare[0]}; "
               f"rerun data.py")
    for name, stated in stated_sec.items():
        if name not in videos:                          # counted above
            continue
        actual = videos[name]["duration_sec"]
        if abs(actual - stated) > 0.05 * stated:        # another cut: its moments are misplaced
            yield f"{name}: its file is {actual:.2f} s long, but its annotations say {stated:.2f} s"


# --------------------------------------------------------------------------------- the command line

def main() -> None:
    arguments = options.parser(
        "the annotations and features of a dataset", prog="data.py",
        epilog="torchrun --nproc-per-node 8 data.py ... divides the videos among 8 processes")
    add = arguments.add_argument
    add("dataset", help="charades, activitynet, a name for your own, or check: are all features of "
                        "all datasets (or of the one named next) complete?")
    add("which", nargs="?", help="after check: a dataset (default: all)")
    add("--annotations", help="published ones: their folder (default: download once); your own: a "
                              "json or jsonl file, see docs/data.md")
    add("--split", default="train", choices=data.OWN_SPLITS,
        help="the split to which your own --annotations belong")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--videos", help="folder of video files, named as in the annotations; "
                                         "without it no features are extracted")
    source.add_argument("--features", help="precomputed features, [L, D] per video: a folder of "
                                           ".npy, .npz (features) or .pt, or an hdf5 file")
    network = arguments.add_mutually_exclusive_group()
    network.add_argument("--clip", default="ViT-B/32",
                         help="published name, weight file, or 'shapes'")
    network.add_argument("--backbone", metavar="NAME", help="a name for the network that made the "
                         "--features, if it is not a CLIP; train.py finds them by --clip NAME")
    add("--gelu", action="store_true", help="the weights were trained with GELU, as LAION's are, "
                                            "and no config.json beside them says so")
    add("--frames", type=int, help="features per video (default 32; activitynet 256)")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_intermixed_args()           # allows "check --root DIR mine"
    with reported():
        if given.dataset == "check":
            sys.exit(0 if check(given.which, given.root) else 2)
        run(given)


def is_plain(name: str) -> bool:
    """Can this name a folder of your own? Names that begin with shapes belong to shapes.py."""
    return (name != "" and all(c.isalnum() or c in "-_." for c in name)
            and not name.startswith((".", "shapes")))


def run(given: argparse.Namespace) -> None:
    dataset = given.dataset
    if given.which:
        raise Mistake(f"unexpected argument {given.which!r}; only check takes a second name")
    if given.frames is not None and given.frames < 1:
        raise Mistake("--frames must be at least 1")
    if not is_plain(dataset):
        raise Mistake(f"{dataset!r} cannot be the name of your dataset; use letters, digits, - and "
                      f"_, and do not begin with shapes")
    if given.backbone is not None:
        # its folder must not be that of a CLIP's features
        clips = [data.store_folder("", name, "").name for name in clip.PUBLISHED]
        if not is_plain(given.backbone) or given.backbone in clips:
            raise Mistake(f"{given.backbone!r} cannot be the name of a --backbone; use letters, "
                          f"digits, - and _, and not the name of a CLIP")
        if not given.features:
            raise Mistake("--backbone names the network that made --features; add --features")
    # the folders are read before anything is downloaded, loaded or written
    videos = {}
    features = {}
    if given.videos:
        videos = files.find_files(given.videos, video.VIDEOS)
        if not videos:
            raise Mistake(f"{given.videos} contains no video; name the folder that has them")
    if given.features:
        features = features_of.find_features(given.features)
    # under torchrun, one process prints the counts
    with contextlib.redirect_stdout(None if int(os.environ.get("RANK", 0)) else sys.stdout):
        samples = prepare(dataset, given, videos, features)
    if videos or given.features:
        family = dataset.removesuffix("-cg") if dataset in data.FILES else dataset
        make_features(family, samples, given, videos, features)


if __name__ == "__main__":
    main()
