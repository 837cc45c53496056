"""The annotations and features of a dataset: the command of data.py.

    python data.py charades                                     # annotations: downloaded, counted
    python data.py charades --videos DIR                        # and features of the videos
    python data.py mine --annotations my.jsonl --videos DIR     # your own videos and sentences
    python data.py check                                        # are the features complete?

Published annotations must have the published counts. Features are made once; the command can be
interrupted and continues where it stopped.
"""
import support  # first, for a Ctrl-C while torch is imported
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
from support import files, options, parallel
from support.errors import Missing, Mistake, reported
from support.text import aligned, printable

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
    target = pathlib.Path(root) / dataset
    if folder is None:
        sources = {file: rest for file, *rest in map(str.split, SOURCES.read_text().splitlines())}
        for split, names in data.FILES[dataset].items():
            if not data.annotation_file(dataset, split, root).exists():
                for name in (names[0], *(data.CSV if dataset == "charades" else ())):
                    files.fetch(*sources[f"{dataset}/{name}"], target / name)
        return
    source = pathlib.Path(folder)
    if not source.is_dir():
        raise Mistake(f"{folder} is not a folder; the annotations of {dataset} are several files, "
                      f"and --annotations names their folder")
    places = [source / name for name in (dataset, *FOLDERS[dataset])]
    place = next((place for place in places if place.is_dir()), source if direct else None)
    if place is None:
        raise Missing(f"{folder} contains no folder {dataset}")
    existing = {split: next((place / name for name in names if (place / name).exists()), None)
                for split, names in data.FILES[dataset].items()}
    if not any(existing.values()):
        names = [name for names in data.FILES[dataset].values() for name in names]
        raise Missing(f"{folder} contains no annotations of {dataset}: none of {', '.join(names)}")
    for split, path in existing.items():
        if path:
            check_counts(dataset, split, data.clean(data.read_file(path))[0], path)
    for path in [*filter(None, existing.values()), *(place / name for name in data.CSV)]:
        if path.exists():
            files.save(target / path.name, path.read_bytes())


def check_counts(dataset: str, split: str, samples: list[Sample], path: pathlib.Path) -> None:
    """Mistake unless a split has as many videos and sentences as were published."""
    counts = len({sample.video for sample in samples}), len(samples)
    if counts != COUNTS[dataset][split]:
        raise Mistake(f"{path} is not {dataset}'s {split} as published: it has {counts[1]} "
                      f"sentences of {counts[0]} videos after cleaning, expected "
                      f"{COUNTS[dataset][split][1]} of {COUNTS[dataset][split][0]}; replace it by "
                      f"the published file")


def describe(dataset: str, root: str | os.PathLike) -> str:
    """The counts of Sec. 4.1.1 as a table, a line for each split. Mistake if one is not the
    published one. A video of two splits counts twice, as in the paper."""
    rows = {}
    for split in data.splits(dataset, root):
        path = data.annotation_file(dataset, split, root)
        if not path.exists():
            continue
        samples, cleaned = data.clean(data.read_file(path))
        if dataset in COUNTS:
            check_counts(dataset, split, samples, path)
        durations_sec = {sample.video: sample.duration_sec for sample in samples}
        rows[split] = np.array([len(durations_sec), len(samples), sum(durations_sec.values()),
                                sum(s.end_sec - s.start_sec for s in samples), *cleaned])
    if len(rows) > 1:
        rows["all"] = sum(rows.values())
    if not rows:
        return ""
    lines = []
    for split, (videos, queries, seconds, moments_sec, *cleaned) in rows.items():
        lines.append([dataset, split, f"{videos:.0f}", f"{queries:.0f}", f"{seconds / videos:.2f}",
                      f"{moments_sec / queries:.2f}", f"{queries / videos:.2f}",
                      *(f"{count:.0f}" for count in cleaned)])
    return aligned(["dataset", "split", "videos", "queries", "video sec", "moment sec",
                    "moments per video", "clamped", "dropped"], lines, 2)


def plain_name(name: str, videos: dict[str, pathlib.Path]) -> str:
    """The name of a video as features are stored under it: "a" for "a.mp4" if that is a file."""
    stem = pathlib.Path(name).stem
    return stem if name not in videos and stem in videos and videos[stem].name == name else name


def adopt(dataset: str, split: str, path: str, videos: dict[str, pathlib.Path], root: str,
          features: bool = False) -> None:
    """Your own annotation file becomes <root>/<dataset>/<split>.jsonl: videos lose their file
    endings, missing durations are probed, moments cleaned, and the counts printed. A video that
    cannot be read is assumed to end with its last moment."""
    rows, durations_sec = data.read_file(path), {}
    rows = [row._replace(video=plain_name(row.video, videos)) for row in rows]
    unknown = {row.video for row in rows if math.isnan(row.duration_sec)}
    if unknown and not videos:
        videos_help = "" if features else ", or name their folder with --videos"
        raise Mistake(f"{path} does not give the durations of {len(unknown)} videos; add "
                      f"\"duration\" to its lines{videos_help}")
    for name in unknown:
        try:
            durations_sec[name] = video.probe_duration(videos[name])
        except (KeyError, video.VideoError):                    # `video.extract` reports it
            durations_sec[name] = max(row.end_sec for row in rows if row.video == name)
    rows = [row._replace(duration_sec=durations_sec.get(row.video, row.duration_sec))
            for row in rows]
    kept, counts = data.clean(rows)
    if not kept:
        raise Mistake(f"{path} contains no moment; add some")
    data.write_jsonl(data.annotation_file(dataset, split, root), kept)
    print(f"{split}: {len(kept)} sentences of {len({row.video for row in kept})} videos; "
          f"{counts.clamped} moments clamped to their video, {counts.dropped} empty ones dropped")


def prepare(dataset: str, given: argparse.Namespace,
            videos: dict[str, pathlib.Path]) -> dict[str, list[Sample]]:
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
            if name == dataset:
                raise Mistake(f"{error}; or name a folder that has the annotations with "
                              f"--annotations") from error
            print(f"note: {name} is skipped: {error}", file=sys.stderr)
    if not family and given.annotations:
        adopt(dataset, given.split, given.annotations, videos, given.root, bool(given.features))
    samples = {}
    for name in family or [dataset]:
        for split in data.splits(name, given.root):
            if data.annotation_file(name, split, given.root).exists():
                samples[f"{name} {split}"] = data.read_annotations(name, split, given.root)
    if not samples:
        path = data.annotation_file(dataset, "train", given.root)
        meant = files.did_you_mean(dataset, given.root, data.FILES)
        raise Mistake(f"{dataset} has no annotations: there is no {path}; {meant}name your own "
                      f"with --annotations FILE")
    for name in family or [dataset]:
        print(describe(name, given.root))
    return samples


# ----------------------------------------------------------------------------------------- features

def make_features(dataset: str, samples: dict[str, list[Sample]], given: argparse.Namespace,
                  videos: dict[str, pathlib.Path], features: dict) -> None:
    """Features of all videos of `samples` (split -> rows), from video files or made elsewhere.
    Under torchrun, process r of n takes every n-th video."""
    rank, processes = parallel.number_from("RANK", 0), parallel.number_from("WORLD_SIZE", 1)
    T = given.frames or (256 if dataset == "activitynet" else 32)
    rows = [sample for part in samples.values() for sample in part]
    names = sorted({sample.video for sample in rows})
    if given.features and (given.backbone or given.clip in clip.PUBLISHED):
        made = video.made_elsewhere(given.backbone or given.clip, given.features, features, names,
                                    T)
    else:
        device = parallel.pick_device(given.device)
        path = data.clip_file(given.clip, given.root)
        if given.clip.startswith("shapes") and path == given.clip:
            raise Mistake(f"the small CLIP of {given.clip} does not exist; make it with: python "
                          f"shapes.py")
        model = clip.load(path, device)
        precision = given.precision or ("fp16" if device.type == "cuda" else "float32")
        # DEVIATION: Eq. 3-4 see at most 32 of ActivityNet's 256 frames, which saves 112 GB of disk
        patches, how = min(T, given.patch_frames), precision
        if given.features:
            patches, how = 0, "made elsewhere"
        made = video.made_by(model, given.clip, clip.sha256(path), T, patches, how)
    store = data.FeatureStore(data.store_folder(dataset, made["clip"], given.root), made,
                              f"-{rank}" if rank else "")
    names = names[rank::processes]
    if given.features:
        durations_sec = {sample.video: sample.duration_sec for sample in rows}
        failed = video.adopt_features(store, features, names, durations_sec)
    else:
        training = {sample.video for split, part in samples.items() for sample in part
                    if split.endswith("train")}
        workers = max(1, (os.cpu_count() or 2) - 1) if given.workers is None else given.workers
        failed = video.extract(store, model, videos, names, training, workers,
                               given.batch or (256 if device.type == "cuda" else 32),
                               video.PRECISIONS[precision])
    for name, reason in sorted(failed.items()):
        print(printable(f"failed: {name}: {reason}"))
    print(f"{len(names) - len(failed)} of {len(names)} videos have features in {store.folder}")
    if failed:
        lost = sum(sample.video in failed for sample in rows)
        print(f"the {len(failed)} that failed (failed.txt) have {lost} sentences")
    if names and len(failed) == len(names):
        raise Mistake(f"none of {len(names)} videos could be read, see above")


# -------------------------------------------------------------------------------------------- check

def check(which: str | None, root: str) -> bool:
    """Prints the problems of the features of a dataset (default: of all). Are there none?"""
    family = which.removesuffix("-cg") if which in data.FILES else which
    stores = sorted(path for path in pathlib.Path(root).glob(f"{family or '*'}/features/*")
                    if list(path.glob("manifest*.json")))
    if not stores:
        meant = files.did_you_mean(which, root, data.FILES) if which else ""
        raise Mistake(f"there are no features in {root}/{family or '*'}/features; {meant}make them "
                      f"with: python data.py DATASET --videos DIR")
    well = True
    for folder in stores:
        store, dataset = data.FeatureStore(folder), folder.parts[-3]
        problems = list(file_problems(store))
        for name in (dataset, dataset + "-cg"):
            for split in data.splits(name, root):
                if data.annotation_file(name, split, root).exists():
                    problems += gaps(store, name, split, root)
        problems = list(dict.fromkeys(problems))        # a video may be in several splits
        made = ", ".join(f"{key} {store.manifest.get(key)}"
                         for key in ("clip", "frames", "precision"))
        print(f"{folder}: {len(store.manifest['videos'])} videos, {made}, {len(problems)} problems")
        print("".join(f"  {printable(problem)}\n" for problem in problems), end="")
        well = well and not problems
    return well


def file_problems(store: data.FeatureStore) -> Iterator[str]:
    """A sentence for every file of a store that is not as the manifest says."""
    made, known = store.manifest, set()
    for name, about in tqdm(made["videos"].items(), desc="check", unit="video", disable=None):
        duration_sec, each_sec = about["duration_sec"], about["seconds_per_feature"]
        if not (0 < duration_sec < math.inf
                and math.isclose(each_sec * made["frames"], duration_sec, rel_tol=1e-6)):
            yield f"{name} is {duration_sec} s long, but its features are {each_sec} s each"
        for kind in ("frames", "patches"):
            known.add(path := store.path(name, kind))
            if kind == "patches" and not path.exists():
                continue
            try:
                x = store.read(name, kind)
                if x.dtype != np.float16:
                    yield f"{path.name} is {x.dtype}, not float16"
                elif not np.isfinite(x).all():
                    yield f"{path.name} is not finite"
            except data.VideoError as error:
                yield str(error)
    for path in sorted(set(store.folder.glob("*.npy")) - known):
        yield f"{path.name} is in no manifest: it was interrupted; run data.py again"


def gaps(store: data.FeatureStore, dataset: str, split: str, root: str) -> Iterator[str]:
    """A sentence for everything that the annotations of a split need and a store lacks."""
    stated_sec = {row.video: row.duration_sec
                  for row in data.read_annotations(dataset, split, root)}
    videos = store.manifest["videos"]
    missing = [name for name in stated_sec if name not in videos]
    if missing:
        yield (f"{dataset} {split}: {len(missing)} of {len(stated_sec)} videos have no features "
               f"(see failed.txt)")
    bare = [name for name in stated_sec if name in videos
            and not store.path(name, "patches").exists()]
    if split == "train" and store.manifest["patch_frames"] and bare:
        yield (f"{dataset} {split}: {len(bare)} videos have no patches, for instance {bare[0]}; "
               f"run data.py again")
    for name, stated in stated_sec.items():
        actual = videos[name]["duration_sec"] if name in videos else stated
        if abs(actual - stated) > 0.05 * stated:
            yield f"{name}: its file is {actual:.2f} s long, but its annotations say {stated:.2f} s"


# --------------------------------------------------------------------------------- the command line

def main() -> None:
    arguments = options.parser(
        "the annotations and features of a dataset", prog="data.py",
        epilog="torchrun --nproc-per-node 8 data.py ... divides the videos among 8 processes")
    add = arguments.add_argument
    add("dataset", help="charades, activitynet, a name for your own, or check: are the features of "
                        "all datasets (or of the one named next) complete?")
    add("which", nargs="?", help="after check: a dataset (default: all)")
    add("--annotations", help="published: the folder that has them (default: download once); your "
                              "own: a json or jsonl file, see docs/data.md")
    add("--split", default="train", choices=data.OWN_SPLITS,
        help="the split that your own --annotations are")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--videos", help="folder of video files, named as in the annotations; "
                                         "without it no features are made")
    source.add_argument("--features", help="features made elsewhere, [L, D] per video: a folder "
                                           "of .npy, .npz (features) or .pt, or an hdf5 file")
    network = arguments.add_mutually_exclusive_group()
    network.add_argument("--clip", default="ViT-B/32",
                         help="published name, weight file, or 'shapes'")
    network.add_argument("--backbone", metavar="NAME", help="the --features are of a network that "
                         "is not a CLIP, any width; train.py finds them by this name: --clip NAME")
    add("--frames", type=int, help="features per video (default 32; activitynet 256)")
    add("--patch-frames", type=int, default=32,
        help="of these, keep the patch features of so many (training videos; 50 KB each)")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    add("--precision", choices=video.PRECISIONS,
        help="of the image tower (default fp16 on cuda, else float32)")
    add("--workers", type=int,
        help="decoding processes (default: the number of cores minus one; 0: none)")
    add("--batch", type=int, help="frames per batch (default 256 on cuda, else 32)")
    given = arguments.parse_intermixed_args()
    with reported():
        if given.dataset == "check":
            sys.exit(0 if check(given.which, given.root) else 2)
        run(given)


def is_plain(name: str) -> bool:
    """Can this be the name of a folder of your own, beside those of shapes.py?"""
    return (name != "" and all(c.isalnum() or c in "-_." for c in name)
            and not name.startswith((".", "shapes")))


def run(given: argparse.Namespace) -> None:
    dataset = given.dataset
    if given.which:
        raise Mistake(f"unexpected argument {given.which!r}; only check takes a second name")
    if any(number is not None and number < 1
           for number in (given.frames, given.batch, given.patch_frames)):
        raise Mistake("--frames, --patch-frames and --batch must be at least 1")
    if given.workers is not None and given.workers < 0:
        raise Mistake("--workers must be at least 0")
    if not is_plain(dataset):
        raise Mistake(f"{dataset!r} cannot be the name of your dataset; use letters, digits, - and "
                      f"_, and do not begin with shapes")
    if given.backbone is not None:
        clips = [data.store_folder("", name, "").name for name in clip.PUBLISHED]
        if not is_plain(given.backbone) or given.backbone in clips:
            raise Mistake(f"{given.backbone!r} cannot be the name of a --backbone; use letters, "
                          f"digits, - and _, and not the name of a CLIP")
        if not given.features:
            raise Mistake("--backbone names the network that made --features; add --features")
    # before anything is downloaded, loaded or written
    videos = video.find_files(given.videos, video.VIDEOS) if given.videos else {}
    features = video.find_features(given.features) if given.features else {}
    if given.videos and not videos:
        raise Mistake(f"{given.videos} contains no video; name the folder that has them")
    with contextlib.redirect_stdout(None if parallel.number_from("RANK", 0) else sys.stdout):
        samples = prepare(dataset, given, videos)
    if videos or given.features:
        family = dataset.removesuffix("-cg") if dataset in data.FILES else dataset
        make_features(family, samples, given, videos, features)


if __name__ == "__main__":
    main()
