"""Every table and figure of the paper and its supplement, ours beside the paper's.

    python -m extras.reproduce table1                   # on the shapes world, three seeds
    python -m extras.reproduce table3 --dataset charades --device cuda
    python -m extras.reproduce docs                     # writes the tables into docs/ and README.md

A row is a name, the fields of train.Config that make it, and the paper's figures; a row without
fields is another method's, as the paper reports it. It runs once per seed (shapes: world and
training have the same seed), and its result is stored in results/<dataset>/<name>.json:
configuration, metrics, log, and what each query hits. A stored row is not run again, except with
--fresh. Choices are made on validation splits; tables show test splits.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import time
from typing import NamedTuple

import numpy as np
import torch

import clip
import clip2video.model
import clip2video.train
import data
import evaluate
import mmn
import parse
import shapes
import train
from extras import figures, probe, zero_shot
from support import files, options, parallel, progress
from support.errors import Mistake, reported
from support.text import markdown, mean_and_deviation

HERE = pathlib.Path(__file__).parent.parent
RESULTS = HERE / "results"
NOT_A_CHOICE = ("device", "root", "out", "workers")             # of Config: where, not what
FINAL = ("test", "trivial", "novel-word", "novel-composition")  # the splits that tables show
HITS = (0.5, 0.7)                                               # IoU thresholds
SEPARATE = {"charades": "vgg", "activitynet": "c3d"}            # MMN's own features, by family
BERT = "distilbert-base-uncased"                                # and its text tower


class Row(NamedTuple):
    """A line of a table: its name, the fields of Config that make it (None: it is not run, only
    reported), and the paper's figures. Without figures of its own, the shapes world shows those of
    Charades-STA, for orientation."""
    name: str
    fields: dict | None
    charades: list[float] = []
    activitynet: list[float] = []
    shapes: list[float] = []

    def paper(self, dataset: str) -> list[float]:
        if dataset == "activitynet":
            return self.activitynet
        if dataset == "shapes" and self.shapes:
            return self.shapes
        return self.charades


class Table(NamedTuple):
    """columns: "split metric IoU"; differences: pairs of rows; original: of the original split;
    baselines: with rows for what needs no training."""
    columns: list[str]
    rows: list[Row]
    differences: list[tuple[int, int]] = []
    original: bool = False
    baselines: bool = False


# the methods; "text_lr" is the text tower's share of the learning rate
MMN = dict(method="mmn", text_lr=0.1)                           # as in the paper
TUNED = dict(method="mmn", text_lr=1.0)                         # chosen on validation
VDI = dict(method="vdi", text_lr=0.1)
STAGED = dict(method="vdi-staged")

TABLES = {
    # README: the main rows
    "main": Table(
        columns=["test R@1 0.5", "novel-word R@1 0.5", "novel-composition R@1 0.5"],
        baselines=True,
        rows=[
            Row("MMN, the paper's text rate", MMN),
            Row("MMN, tuned on validation", TUNED),
            Row("`vdi`: VDI as printed", VDI),
            Row("control: random codes, no video", STAGED | dict(stage_target="random")),
            Row("**`vdi-staged`**", STAGED),
        ]),
    # Table 1: new scenes, words and combinations
    "table1": Table(
        columns=["novel-word R@1 0.5", "novel-word R@1 0.7", "novel-word mIoU",
                 "novel-composition R@1 0.5", "novel-composition R@1 0.7",
                 "novel-composition mIoU"],
        differences=[(4, 1), (4, 0), (4, 3), (2, 0)], baselines=True,
        rows=[
            Row("MMN, the paper's text rate", MMN,
                charades=[43.85, 24.17, 39.5], activitynet=[31.05, 15.48, 33.16]),
            Row("MMN, tuned on validation", TUNED),
            Row("`vdi`: VDI as printed", VDI,
                charades=[46.47, 28.63, 41.6], activitynet=[32.35, 16.02, 34.32]),
            Row("control: random codes, no video", STAGED | dict(stage_target="random")),
            Row("**`vdi-staged`**", STAGED),
            Row("WSSL", None, charades=[2.79, 0.73, 7.92], activitynet=[3.09, 1.13, 7.1]),
            Row("TMN", None, charades=[9.43, 4.96, 11.23], activitynet=[9.93, 5.12, 11.38]),
            Row("TSP-PRL", None, charades=[14.83, 2.61, 14.03], activitynet=[18.05, 3.15, 14.34]),
            Row("2D-TAN", None, charades=[29.36, 13.12, 28.47], activitynet=[23.86, 10.37, 28.88]),
            Row("LGI", None, charades=[26.48, 12.47, 27.62], activitynet=[23.1, 9.03, 26.95]),
            Row("VSLNet", None, charades=[25.6, 10.07, 30.21], activitynet=[21.68, 9.94, 29.58]),
            Row("VISA", None, charades=[42.35, 20.88, 40.18], activitynet=[30.14, 15.9, 35.13]),
        ]),
    # Table 2: the original split
    "table2": Table(
        columns=["test R@1 0.5", "test R@1 0.7", "test R@5 0.5", "test R@5 0.7"],
        original=True, baselines=True,
        rows=[
            Row("MMN, the paper's text rate", MMN,
                charades=[50.48, 29.65, 85.27, 60.67], activitynet=[46.89, 27.26, 78.32, 63.47]),
            Row("MMN, tuned on validation", TUNED),
            Row("`vdi`: VDI as printed", VDI,
                charades=[52.32, 31.37, 87.03, 62.3], activitynet=[48.09, 28.76, 79.69, 64.88]),
            Row("control: random codes, no video", STAGED | dict(stage_target="random")),
            Row("**`vdi-staged`**", STAGED),
            Row("MMN, VGG or C3D and DistilBERT", MMN | dict(clip="separate"),
                charades=[47.31, 27.28, 83.74, 58.41], activitynet=[48.59, 29.26, 79.5, 64.76]),
            Row("VideoBert", None,
                charades=[32.7, 19.5, 68.1, 46.2], activitynet=[37.2, 21.0, 66.7, 53.6]),
            Row("MIL-NCE", None,
                charades=[37.0, 21.2, 74.3, 50.4], activitynet=[41.8, 24.5, 73.5, 57.7]),
            Row("LocVTP", None,
                charades=[43.6, 26.3, 81.9, 55.3], activitynet=[48.2, 30.5, 80.1, 64.7]),
            Row("MGSL", None,
                charades=[63.98, 41.03, 93.21, 63.85], activitynet=[51.87, 31.42, 82.6, 66.71]),
            Row("D-TSG", None,
                charades=[65.05, 42.77, 94.42, 65.16], activitynet=[54.29, 33.64, 86.58, 69.36]),
            Row("2D-TAN", None,
                charades=[39.7, 23.31, 80.32, 51.26], activitynet=[44.51, 26.54, 77.13, 61.96]),
            Row("VSL-Net", None, charades=[39.2, 20.8], activitynet=[43.22, 26.16]),
            Row("CBLN", None,
                charades=[43.67, 24.44, 88.39, 56.49], activitynet=[48.12, 27.6, 79.32, 63.41]),
            Row("DCM", None, charades=[47.8, 28.0], activitynet=[44.9, 27.7]),
            Row("DRN", None,
                charades=[42.9, 23.68, 87.8, 54.87], activitynet=[45.45, 24.36, 77.97, 50.3]),
        ]),
    # Table 3: which part does what
    "table3": Table(
        columns=["novel-word R@1 0.5", "novel-word R@1 0.7", "novel-word mIoU", "test R@1 0.5"],
        differences=[(9, 7), (9, 8)],
        rows=[
            Row("`vdi`: neither (MMN)", MMN, charades=[43.85, 24.17, 39.5]),
            Row("`vdi`: L^vc, a learned probe", VDI | dict(lambda_sd=0.0, context_query="none"),
                charades=[43.12, 25.32, 39.43]),
            Row("`vdi`: L^vc, Q attends", VDI | dict(lambda_sd=0.0, context_query="full"),
                charades=[45.02, 27.63, 40.4]),
            Row("`vdi`: L^vc, Q^s attends", VDI | dict(lambda_sd=0.0),
                charades=[45.47, 29.35, 40.61]),
            Row("`vdi`: L^sd, LSTM", VDI | dict(lambda_vc=0.0, sequence="lstm"),
                charades=[45.32, 25.76, 40.07]),
            Row("`vdi`: L^sd, transformer", VDI | dict(lambda_vc=0.0),
                charades=[44.6, 26.06, 40.09]),
            Row("`vdi`: both", VDI, charades=[46.47, 28.63, 41.6]),
            Row("`vdi-staged`: no query", STAGED | dict(context_query="none")),
            Row("`vdi-staged`: Q attends", STAGED | dict(context_query="full")),
            Row("`vdi-staged`: Q^s attends", STAGED),
        ]),
    # supplement, Table 2: the weights of both losses
    "s-table2": Table(
        columns=["novel-word R@1 0.5", "novel-word R@1 0.7", "novel-word mIoU", "test R@1 0.5"],
        rows=[
            Row("0, 0 (MMN)", MMN, charades=[43.85, 24.17, 39.5]),
            Row("0.1, 0", VDI | dict(lambda_vc=0.1, lambda_sd=0.0), charades=[44.04, 28.35, 41.42]),
            Row("0.5, 0", VDI | dict(lambda_vc=0.5, lambda_sd=0.0), charades=[45.47, 29.35, 40.61]),
            Row("1, 0", VDI | dict(lambda_vc=1.0, lambda_sd=0.0), charades=[42.45, 24.17, 38.7]),
            Row("0, 0.1", VDI | dict(lambda_vc=0.0, lambda_sd=0.1), charades=[44.7, 25.61, 39.7]),
            Row("0, 0.01", VDI | dict(lambda_vc=0.0, lambda_sd=0.01),
                charades=[44.6, 26.06, 40.09]),
            Row("0, 0.001", VDI | dict(lambda_vc=0.0, lambda_sd=0.001),
                charades=[43.6, 25.32, 39.19]),
            Row("0.5, 0.1", VDI | dict(lambda_vc=0.5, lambda_sd=0.1),
                charades=[45.18, 27.91, 41.05]),
            Row("0.5, 0.01", VDI | dict(lambda_vc=0.5, lambda_sd=0.01),
                charades=[46.47, 28.63, 41.6]),
            Row("0.5, 0.001", VDI | dict(lambda_vc=0.5, lambda_sd=0.001),
                charades=[45.47, 27.31, 41.28]),
        ]),
    # supplement, Table 3: the forms of both losses
    "s-table3": Table(
        columns=["novel-word R@1 0.5", "novel-word R@1 0.7", "novel-word mIoU", "test R@1 0.5"],
        differences=[(0, 1), (0, 2)],
        rows=[
            Row("L^vc consistent, L^sd relational", VDI, charades=[46.47, 28.63, 41.6]),
            Row("both consistent", VDI | dict(forms="con-con"), charades=[45.32, 28.35, 41.08]),
            Row("both relational", VDI | dict(forms="rel-rel"), charades=[38.56, 23.31, 36.2]),
        ]),
    # supplement, Table 4: which words to inject into
    "s-table4": Table(
        columns=["novel-word R@1 0.5", "novel-word R@1 0.7", "novel-word mIoU", "test R@1 0.5"],
        differences=[(1, 0), (3, 2)],
        rows=[
            Row("`vdi`: into Q", VDI | dict(inject_into="full"), charades=[44.89, 26.04, 39.52]),
            Row("`vdi`: into Q^d", VDI, charades=[46.47, 28.63, 41.6]),
            Row("`vdi-staged`: into Q", STAGED | dict(inject_into="full")),
            Row("`vdi-staged`: into Q^d", STAGED),
        ]),
    # supplement, Table 5: joint and separate pre-training, and what attends
    "s-table5": Table(
        columns=["test R@1 0.5", "novel-word R@1 0.5", "novel-composition R@1 0.5",
                 "novel-word noun accuracy"],
        differences=[(5, 0), (9, 8)],
        rows=[
            Row("another CLIP's text tower: MMN", MMN | dict(text_clip="other"),
                shapes=[41.59, 23.6, 37.9]),
            Row("another CLIP's text tower: `vdi`, Q^s", VDI | dict(text_clip="other"),
                shapes=[41.29, 24.46, 38.21]),
            Row("another CLIP's text tower: `vdi-staged`, Q^s", STAGED | dict(text_clip="other")),
            Row("no pre-training of the text: MMN", MMN | dict(text_clip="shuffled")),
            Row("no pre-training of the text: `vdi-staged`", STAGED | dict(text_clip="shuffled")),
            Row("joint: MMN", MMN, charades=[43.85, 24.17, 39.5]),
            Row("joint: `vdi`, Q^h", VDI | dict(context_query="half"),
                charades=[46.01, 27.05, 40.94]),
            Row("joint: `vdi`, Q^s", VDI, charades=[46.47, 28.63, 41.6]),
            Row("joint: `vdi-staged`, Q^h", STAGED | dict(context_query="half")),
            Row("joint: `vdi-staged`, Q^s", STAGED),
            Row("separate, VGG or C3D and DistilBERT: MMN", MMN | dict(clip="separate"),
                charades=[41.59, 23.6, 37.9]),
            Row("separate, VGG or C3D and DistilBERT: `vdi` without L^sd, Q^s",
                VDI | dict(clip="separate", lambda_sd=0.0),
                charades=[41.29, 24.46, 38.21]),
        ]),
    # supplement, Table 6: backbones
    "s-table6": Table(
        columns=["test R@1 0.5", "test R@1 0.7", "novel-word R@1 0.5", "novel-composition R@1 0.5"],
        original=True,
        rows=[
            Row("ViT: MMN", MMN, charades=[50.48, 29.65]),
            Row("ViT: `vdi`", VDI, charades=[52.32, 31.37]),
            Row("ViT: `vdi-staged`", STAGED),
            Row("ResNet: MMN", MMN | dict(clip="resnet"), charades=[52.88, 32.02]),
            Row("ResNet: `vdi`", VDI | dict(clip="resnet"), charades=[53.98, 33.2]),
            Row("ResNet: `vdi-staged`", STAGED | dict(clip="resnet")),
            Row("VGG or C3D and DistilBERT, separate: MMN", MMN | dict(clip="separate"),
                charades=[47.31, 27.28]),
        ]),
    # ours: the target of stage 1
    "targets": Table(
        columns=["test R@1 0.5", "novel-word R@1 0.5", "novel-composition R@1 0.5",
                 "test verb accuracy", "novel-word verb accuracy"],
        differences=[(1, 2), (1, 3)],
        rows=[
            Row("none (MMN, tuned)", TUNED),
            Row("late minus early half of the moment", STAGED),
            Row("mean of the whole video", STAGED | dict(stage_target="whole")),
            Row("a random code for each query", STAGED | dict(stage_target="random")),
        ]),
    # ours: how words are masked
    "choices": Table(
        columns=["test R@1 0.5", "novel-word R@1 0.5", "novel-composition R@1 0.5"],
        differences=[(2, 3)],
        rows=[
            Row("`vdi`: masked words dropped", VDI),
            Row("`vdi`: masked words replaced by *something*", VDI | dict(mask="something")),
            Row("`vdi-staged`: masked words replaced by *something*", STAGED),
            Row("`vdi-staged`: masked words dropped", STAGED | dict(mask="")),
        ]),
}
MAIN = TABLES["table1"].rows


# ------------------------------------------------------------------------------------------ running

def world_of(dataset: str, seed: int) -> str:
    """The dataset of a seed: every seed has a shapes world of its own, with its own small CLIP."""
    if dataset == "shapes":
        return shapes.name_of(seed)
    return dataset


def dataset_of(what: str, given: argparse.Namespace) -> str:
    """The dataset of a table. On a real one, most tables are about its compositional splits, which
    have a training split of their own."""
    if given.dataset == "shapes" or what in TABLES and TABLES[what].original:
        return given.dataset
    return given.dataset + "-cg"


def config_of(row: Row, dataset: str, seed: int, given: argparse.Namespace) -> train.Config | None:
    """The configuration of a row; None if it cannot be run on this dataset."""
    family = dataset.removesuffix("-cg")
    if row.fields is None or row.fields.get("clip") == "separate" and family not in SEPARATE:
        return None
    fields = dict(row.fields, seed=seed, device=given.device, root=given.root)
    fields["dataset"] = world_of(dataset, seed)
    fields["select_on"] = select_on(dataset, given)
    if fields.get("clip") == "resnet":                  # the published one, or the world's own
        fields["clip"] = "RN50"
        if dataset == "shapes":
            fields["clip"] = f"{fields['dataset']}-resnet"
    if fields.get("clip") == "separate":
        fields["clip"] = SEPARATE[family]
        fields["text_clip"] = BERT
    if fields.get("text_clip") == "other":              # of another CLIP of the same width
        fields["text_clip"] = "ViT-B/16"
        if dataset == "shapes":
            fields["text_clip"] = world_of("shapes", (seed + 1) % 3)
    fields.update(getattr(given, "fields", {}))         # a test's smaller sizes
    config = train.configure(**fields)
    return dataclasses.replace(config, out=f"runs/reproduce/{dataset}/{name_of(config)}")


def select_on(dataset: str, given: argparse.Namespace) -> str:
    """The split that selects the epoch; with --select-on-test that of the field's protocol."""
    if not given.select_on_test:
        return "val"
    if dataset.endswith("-cg"):
        return "novel-word"
    return "test"


@functools.cache
def parser_name(dataset: str) -> str:
    """The parser of a dataset's sentences, with its version."""
    if dataset.startswith("shapes"):
        return parse.BY_CONSTRUCTION
    return parse.Parser().name


def choices_of(config: train.Config) -> dict:
    """What determines a result, as json holds it."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))         # with lists for tuples
    fields["parser"] = parser_name(config.dataset)
    return {name: value for name, value in fields.items() if name not in NOT_A_CHOICE}


def name_of(config: train.Config) -> str:
    """The method, the seed, and a hash of everything that differs from the defaults, so that a
    field that is added later changes no name."""
    defaults = json.loads(json.dumps(dataclasses.asdict(train.Config())))
    changed = {name: value for name, value in choices_of(config).items()
               if value != defaults.get(name)}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{config.method}-{config.seed}-{digest[:10]}"


def file_of(config: train.Config) -> pathlib.Path:
    family = config.dataset
    if family.startswith("shapes"):
        family = "shapes"
    return RESULTS / family / f"{name_of(config)}.json"


def stored_at(path: pathlib.Path, choices: dict) -> dict | None:
    """The content of a result file, if it was made with these choices. A choice that the file does
    not have was added later."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    same = all(choices.get(name) == value for name, value in content["config"].items())
    return content if same else None


def stored(config: train.Config) -> dict | None:
    return stored_at(file_of(config), choices_of(config))


def cached(path: pathlib.Path, choices: dict, make, fresh: bool = False) -> dict:
    """The stored result, or else that of `make()`, a dict, which is then stored with the choices,
    versions and minutes."""
    if not fresh:
        content = stored_at(path, choices)
        if content is not None:
            return content
    started = time.time()
    content = {"config": choices}
    content.update(make())
    content["minutes"] = round((time.time() - started) / 60, 2)
    content["versions"] = progress.versions() | {"threads": torch.get_num_threads()}
    # one line for the results, one for the log: differences between two commits stay readable
    text = json.dumps(content, separators=(",", ":")).replace(',"log":', ',\n"log":')
    files.save(path, text + "\n")
    return content


def run(config: train.Config, fresh: bool = False) -> dict:
    """Trains and evaluates one configuration, or reads its stored result."""
    def make() -> dict:
        folder = config.folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "results.json").exists():
            train.train(config, resume=folder.exists())
        metrics = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        log = []
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            log.append({name: float(f"{value:.4g}") for name, value in json.loads(line).items()})
        device = parallel.pick_device(config.device)
        checkpoint = evaluate.load(folder / "ckpt.pt", device)
        if "val" not in metrics and config.select_on == "val":
            metrics |= evaluate.evaluate(checkpoint, ["val"], device=device, allow_missing=True)
        splits = [split for split in FINAL if split in metrics]
        return {"results": metrics, "coverage": coverage(config),
                "hits": {query: hits(checkpoint, config, splits, query)
                         for query in evaluate.QUERIES},
                "log": log, "clip_sha256": checkpoint.checkpoint["clip_sha256"]}

    return cached(file_of(config), choices_of(config), make, fresh)


def hits(checkpoint: evaluate.Run, config: train.Config, splits: list[str],
         query: str = "full") -> dict[str, str]:
    """Split -> a digit per sentence: how many of the two HITS its first moment reaches."""
    device = parallel.pick_device(config.device)
    digits = {}
    for split, videos, predicted in evaluate.answers(checkpoint, splits, query, config.root, device,
                                                     allow_missing=True, top_k=1):
        iou = mmn.interval_iou(predicted[:, 0, :2], videos.moments_sec)         # [S]
        reached = sum((iou >= mu).int() for mu in HITS)                         # [S]
        digits[split] = "".join(str(number) for number in reached.tolist())
    return digits


def run_quietly(config: train.Config, fresh: bool, threads: int) -> str:
    """`run` in a process of its own; its output goes to <name>.txt beside the run's folder."""
    torch.set_num_threads(threads)
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(config.folder.with_suffix(".txt"), "w", encoding="utf-8") as file, \
            contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run(config, fresh)
    return name_of(config)


def coverage(config: train.Config) -> dict[str, list[int]]:
    """Split -> videos and sentences with features, and videos and sentences without."""
    store = data.open_store(config.dataset, config.clip, config.root, config.frames)
    counts = {}
    for split in data.splits(config.dataset, config.root):
        rows = data.read_annotations(config.dataset, split, config.root)
        missing = [row.video for row in rows if row.video not in store]
        videos = {row.video for row in rows}
        counts[split] = [len(videos) - len(set(missing)), len(rows) - len(missing),
                         len(set(missing)), len(missing)]
    return counts


def check(what: str, given: argparse.Namespace) -> None:
    """Mistake, before anything is trained, for a table that could not be shown in the end."""
    if given.dataset == "shapes":
        return
    can_be_shown = False
    for row, config in zip(TABLES[what].rows, configs_of(what, 0, given)):
        if config is None:
            continue
        try:
            counts = (stored(config) or {}).get("coverage") or coverage(config)
        except Mistake as error:                        # its features have not been made
            print(f"note: \"{row.name}\" is not run: {error}", file=sys.stderr)
            continue
        can_be_shown = True
        lost = [f"{videos} videos ({sentences} sentences) of {split}"
                for split, (_, _, videos, sentences) in counts.items() if videos]
        if lost and not given.allow_missing:
            raise Mistake(f"{' and '.join(lost)} have no features, so the results could not be "
                          f"compared with the paper's; make them, or use --allow-missing")
    if not can_be_shown:
        raise Mistake(f"no row of {what} can be run: see above")


def can_run(config: train.Config) -> bool:
    """Does it have features? The shapes world makes its own."""
    store = data.store_folder(config.dataset, config.clip, config.root)
    return config.dataset.startswith("shapes") or any(store.glob("manifest*.json"))


def run_all(configs: list[train.Config], given: argparse.Namespace) -> None:
    """Runs what is not stored, --jobs at a time: two cores do best with two of one thread."""
    missing = {name_of(config): config for config in configs
               if given.fresh or stored(config) is None}
    for config in missing.values():
        shapes.build_for(config)
    threads = max(1, torch.get_num_threads() // given.jobs)
    started = time.time()

    def report(number: int, name: str) -> None:
        print(f"{number} of {len(missing)}: {name}, {(time.time() - started) / 60:.1f} min",
              file=sys.stderr, flush=True)

    if given.jobs == 1:
        for number, config in enumerate(missing.values(), 1):
            report(number, run_quietly(config, given.fresh, threads))
        return
    # spawned, because a forked process cannot use torch's threads safely
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, spawn) as pool:
        runs = [pool.submit(run_quietly, config, given.fresh, threads)
                for config in missing.values()]
        for number, future in enumerate(concurrent.futures.as_completed(runs), 1):
            report(number, future.result())


def per_seed(what: str, given: argparse.Namespace, make) -> list[dict]:
    """The results of `make(seed)` for each seed, stored in results/<dataset>/<what>-<seed>.json."""
    rows = []
    for seed in seeds_of(given):
        path = RESULTS / given.dataset / f"{what}-{seed}.json"
        choices = {"dataset": given.dataset, "seed": seed}
        make_one = functools.partial(make, seed)
        content = cached(path, choices, lambda: {"results": make_one()}, given.fresh)
        rows.append(content["results"])
    return rows


# ---------------------------------------------------------------------------------- tables of runs

def seeds_of(given: argparse.Namespace) -> range:
    return range(given.seeds or 3)


def configs_of(what: str, seed: int, given: argparse.Namespace) -> list[train.Config | None]:
    """The configurations of the rows of a table."""
    dataset = dataset_of(what, given)
    return [config_of(row, dataset, seed, given) for row in TABLES[what].rows]


def seeds_stored(what: str, given: argparse.Namespace) -> int:
    """For how many seeds, from 0 on, every row of a table is stored."""
    for seed in seeds_of(given):
        for config in configs_of(what, seed, given):
            if config and stored(config) is None:
                return seed
    return len(seeds_of(given))


def collect(what: str, given: argparse.Namespace) -> list[list[dict]]:
    """The stored results of a table: row -> seed -> result; no seeds for a row that was not run."""
    rows = [[] for _ in TABLES[what].rows]
    for seed in seeds_of(given):
        for row, config in zip(rows, configs_of(what, seed, given)):
            result = stored(config) if config else None
            if result:
                row.append(result)
    return rows


def columns_of(what: str, given: argparse.Namespace) -> list[tuple[str, str]]:
    """(split, metric) of the columns that a dataset has. "test" is what the compositional datasets
    call trivial; accuracies need to know all events, as the shapes world does."""
    dataset = dataset_of(what, given)
    columns = []
    for column in TABLES[what].columns:
        split, metric = column.split(" ", 1)
        metric = re.sub(r"(R@\d) ", r"\1,IoU=", metric)         # "R@1 0.5" -> "R@1,IoU=0.5"
        if dataset.endswith("-cg") and split == "test":
            split = "trivial"
        if dataset != "shapes":
            if "accuracy" in metric or split != "val" and split not in data.FILES[dataset]:
                continue
        columns.append((split, metric))
    return columns


def hits_of(result: dict, split: str, query: str = "full") -> np.ndarray:
    """Has the first moment of each sentence IoU >= 0.5 with the true one? 1.0 or 0.0, [S]."""
    return np.array([float(int(digit) >= 1) for digit in result["hits"][query][split]])


def paired(ours: list[dict], theirs: list[dict],
           split: str) -> tuple[float, float, float, list[float]]:
    """R@1, IoU=0.5 of one row minus that of another, in points: mean over seeds, its 95% interval
    (low, high), and the difference of each seed."""
    differences = [100 * (hits_of(a, split) - hits_of(b, split)) for a, b in zip(ours, theirs)]
    means = [float(d.mean()) for d in differences]
    low, high = interval(differences)
    return float(np.mean(means)), low, high, means


def interval(differences: list[np.ndarray], draws: int = 2000) -> tuple[float, float]:
    """95% interval of the mean over seeds, by a bootstrap over the sentences, drawn with
    replacement within each seed. differences: of each sentence, an array per seed."""
    rng = np.random.default_rng(0)
    drawn = []                                          # a mean per draw, for each seed
    for d in differences:
        chosen = rng.integers(len(d), size=(draws, len(d)))
        drawn.append(d[chosen].mean(1))
    low, high = np.percentile(np.mean(drawn, 0), (2.5, 97.5))
    return low, high


def clip_alone_of(what: str, given: argparse.Namespace) -> list[dict]:
    """The metrics of CLIP alone on the dataset of a table, for each seed: query -> split ->
    metrics, among them those of a random and of the best fixed moment."""
    dataset = dataset_of(what, given)
    device = parallel.pick_device(given.device)

    def make(seed: int) -> dict:
        world = world_of(dataset, seed)
        shapes.build_for(train.configure(dataset=world, root=given.root))
        name = train.Config.clip
        if dataset == "shapes":
            name = world                                # a world's own small CLIP
        alone = zero_shot.run_of(world, name, given.root, device)
        return {query: evaluate.evaluate(alone, query=query, device=device, allow_missing=True)
                for query in evaluate.QUERIES}

    name = "zero-shot-cg" if dataset.endswith("-cg") else "zero-shot"
    return per_seed(name, given, make)


def baseline_rows(what: str, columns: list[tuple[str, str]], runs: list[dict],
                  given: argparse.Namespace) -> list[list[str]]:
    """The rows of a table that need no training. runs: a trained row's, with both baselines."""
    trained = [run["results"] for run in runs]
    alone = [content["full"] for content in clip_alone_of(what, given)]
    rows = []
    for name, seeds, kind in (("a random moment", trained, "random moment"),
                              ("the best fixed moment", trained, "best prior"),
                              ("CLIP alone, no training", alone, None)):
        rows.append([name])
        for split, metric in columns:
            values = [metrics[split] for metrics in seeds]
            if kind:
                values = [each[kind] for each in values]
            cell = ""                                   # baselines have no R@5
            if all(metric in each for each in values):
                cell = mean_and_deviation([each[metric] for each in values])
            rows[-1].append(cell)
    return rows


PAPER = {"shapes": ("Charades-STA", "Charades-CG novel-word"),
         "charades": ("Charades-STA", "Charades-CG novel-word"),
         "activitynet": ("ActivityNet-Captions", "ActivityNet-CG novel-word")}


def table_text(what: str, given: argparse.Namespace) -> str:
    """A table as Markdown: mean ± deviation over seeds, the paper's, paired differences."""
    table = TABLES[what]
    runs = collect(what, given)
    columns = columns_of(what, given)
    papers = [row.paper(given.dataset) for row in table.rows]
    first = next(seeds for seeds in runs if seeds)
    heads = [""] + [f"{split} {metric.replace(',IoU=', ' ')}" for split, metric in columns]
    lines = []
    if table.baselines:
        lines = baseline_rows(what, columns, first, given)
    for row, seeds, paper in zip(table.rows, runs, papers):
        if not seeds and (given.dataset == "shapes" or not paper):
            continue                                    # on shapes nothing is only reported
        lines.append([row_title(row, seeds, given.dataset)])
        for split, metric in columns:
            cell = ""
            if seeds:
                cell = mean_and_deviation([run["results"][split][metric] for run in seeds])
            lines[-1].append(cell)
        lines[-1].append(" / ".join(f"{value:.2f}" for value in paper))
    if any(papers):
        heads.append(f"paper, {PAPER[given.dataset][not table.original]}")
    # a column for the paper in all lines, or in none
    lines = [(line + [""])[:len(heads)] for line in lines]
    text = [markdown(heads, lines), "", provenance(what, runs, columns, given)]
    for a, b in table.differences:
        if runs[a] and runs[b]:
            text.append(difference_text(table, runs, a, b, given))
    return "\n".join(text)


def row_title(row: Row, seeds: list[dict], dataset: str) -> str:
    name = label(row.name, dataset)
    if seeds:
        return name
    return f"{name} (reported{'; not run here' if row.fields else ''})"


def label(name: str, dataset: str) -> str:
    """What was tuned on the shapes world's validation split was not tuned on a real dataset."""
    if dataset == "shapes":
        return name
    return re.sub("tuned( on validation)?", "text rate 1", name)


def provenance(what: str, runs: list[list[dict]], columns: list[tuple[str, str]],
               given: argparse.Namespace) -> str:
    """The sentences below a table: seeds, sizes, time, and what selected the epoch."""
    first = next(seeds for seeds in runs if seeds)
    minutes = sum(sum(run["minutes"] for run in seeds) for seeds in runs)
    text = f"{len(first)} seeds; {sizes(first, columns)}; {minutes:.0f} minutes of runs."
    if given.select_on_test:
        text += (f" Trained on all training videos; the epoch is chosen on "
                 f"{select_on(dataset_of(what, given), given)}, a test split.")
    elif given.dataset != "shapes":
        text += (" The epoch is chosen on validation videos. Text rates and stage 1 are those "
                 "chosen on the shapes world, not tuned here.")
    return text


def difference_text(table: Table, runs: list[list[dict]], a: int, b: int,
                    given: argparse.Namespace) -> str:
    """Row a minus row b on every test split, with interval and each seed."""
    parts = []
    for split in FINAL:
        if split not in runs[a][0]["results"]:
            continue
        mean, low, high, seeds = paired(runs[a], runs[b], split)
        each = ", ".join(f"{seed:+.1f}" for seed in seeds)
        parts.append(f"{split} {mean:+.1f} [{low:+.1f}, {high:+.1f}] ({each})")
    ours = label(table.rows[a].name, given.dataset)
    theirs = label(table.rows[b].name, given.dataset)
    theirs = theirs.removeprefix(f"{ours.split(': ')[0]}: ")            # not the same twice
    return f"- {ours} minus {theirs}: " + "; ".join(parts)


def sizes(runs: list[dict], columns: list[tuple[str, str]]) -> str:
    """How many sentences each split has; on a real dataset also videos, and how many are missing.
    """
    parts = []
    for split in dict.fromkeys(split for split, _ in columns):
        queries = np.mean([run["results"][split]["queries"] for run in runs])
        parts.append(f"{split} {queries:.0f}")
        counts = runs[0].get("coverage", {}).get(split)
        if counts and not runs[0]["config"]["dataset"].startswith("shapes"):
            videos, _, lost_videos, lost_sentences = counts
            lost = "all"
            if lost_videos:
                lost = f"{lost_sentences} sentences of {lost_videos} videos missing"
            parts[-1] += f" of {videos} videos ({lost})"
    return "sentences per seed: " + ", ".join(parts)


# ------------------------------------------------------------------------------------ other results

def figure_path(name: str, given: argparse.Namespace) -> pathlib.Path:
    if given.dataset == "shapes":
        return files.ASSETS / f"{name}.png"
    return RESULTS / given.dataset / f"{name}.png"


def clip_of(seed: int, given: argparse.Namespace) -> tuple[clip.CLIP, str]:
    """The CLIP of a seed's shapes world; on a real dataset the published one. And the dataset."""
    world = world_of(given.dataset, seed)
    name = train.Config.clip
    if given.dataset == "shapes":
        shapes.build(world, given.root)
        name = world
    return clip.load(data.clip_file(name, given.root), parallel.pick_device(given.device)), world


def clip_alone(given: argparse.Namespace) -> str:
    """CLIP without any training: it finds actors and is blind to their motions."""
    seeds = [content["full"] for content in clip_alone_of("table1", given)]
    metrics = ["R@1,IoU=0.5", "R@1,IoU=0.7", "R@5,IoU=0.5", "mIoU"]
    if given.dataset == "shapes":
        metrics += ["noun accuracy", "verb accuracy"]
    rows = []
    for split in FINAL:
        if split not in seeds[0]:
            continue
        rows.append([split])
        for metric in metrics:
            rows[-1].append(mean_and_deviation([content[split][metric] for content in seeds]))
        queries = np.mean([content[split]["queries"] for content in seeds])
        missing = seeds[0][split].get("queries missing", 0)             # on a real dataset
        rows[-1].append(f"{queries:.0f}" + (f" ({missing} missing)" if missing else ""))
    heads = [""] + [metric.replace(",IoU=", " ") for metric in metrics] + ["sentences per seed"]
    return markdown(heads, rows)


def s_table1(given: argparse.Namespace) -> str:
    """Supplement, Table 1: CLIP's scores by what is wrong in the wrong image."""
    def make(seed: int) -> dict:
        if given.svo:
            triplets = probe.svo_triplets(given.svo)
        else:
            triplets = {kind: probe.shape_triplets(kind, 1000, seed) for kind in probe.KINDS}
        model, _ = clip_of(seed, given)
        return {kind: probe.triplet_scores(model, part) for kind, part in triplets.items() if part}

    seeds = per_seed("s-table1-svo" if given.svo else "s-table1", given, make)
    paper = {"right": ["0.79", "0.82", "0.76", "0.86"], "wrong": ["0.21", "0.18", "0.24", "0.14"],
             "difference": ["0.59", "0.64", "0.52", "0.72"], "right ahead": [""] * 4}
    kinds = ["overall"] + list(probe.KINDS)
    rows = []
    for name, theirs in paper.items():
        rows.append([name.replace("ahead", "ahead, %")])
        for kind in kinds:
            means = [overall(content, kind, name) for content in seeds]
            means = [mean for mean in means if mean is not None]
            rows[-1].append(f"{np.mean(means):.2f}" if means else "no images")
        rows[-1] += theirs
    heads = ["score"] + kinds + [f"paper, {kind}" for kind in kinds]
    return markdown(heads, rows)


def overall(content: dict[str, dict], kind: str, name: str) -> float | None:
    """A score of one kind of triplet, or of all, weighted by their numbers; None without any."""
    parts = [part for each, part in content.items() if kind in (each, "overall")]
    if not parts:
        return None
    return np.average([part[name] for part in parts], weights=[part["triplets"] for part in parts])


def s_fig1(given: argparse.Namespace) -> str:
    """Supplement, Fig. 1: what the end token attends to in the last layer, by part of speech."""
    def make(seed: int) -> dict:
        model, world = clip_of(seed, given)
        sentences = sorted({s.sentence for s in data.read_annotations(world, "train", given.root)})
        words_of = probe.shapes_words
        if given.dataset != "shapes":
            words_of = probe.spacy_words(parse.load(None))
        weights = probe.word_weights(model, sentences, words_of)
        content = {}
        for kind, values in weights.items():
            if values:
                counts, _ = np.histogram(np.clip(values, 0, 3), 30, (0, 3))
                content[kind] = {"mean": float(np.mean(values)), "words": len(values),
                                 "histogram": counts.tolist()}
        return content

    seeds = per_seed("s-fig1", given, make)
    kinds = ["noun", "verb", "other"]
    if given.figures:
        figures.weights(figure_path("s-fig1", given), {
            kind: np.sum([content[kind]["histogram"] for content in seeds], 0) for kind in kinds})
    rows = []
    for seed, content in enumerate(seeds):
        rows.append([str(seed)] + [f"{content[kind]['mean']:.2f}" for kind in kinds])
    return markdown(["world"] + kinds, rows)


def fig3(given: argparse.Namespace) -> str:
    """Fig. 3: retrieval by the whole sentence, by its static and by its dynamic half."""
    runs = collect("table1", given)
    chosen = [k for k in (0, 1, 2, 4) if runs[k]]
    splits = [split for split in FINAL[:3] if split in runs[chosen[0]][0]["results"]]
    alone = clip_alone_of("table1", given)
    rates = {}                          # split -> method -> for Q, Q^s, Q^d the R@1 of each seed
    for split in splits:
        rates[split] = {"CLIP alone": [[content[query][split]["R@1,IoU=0.5"] for content in alone]
                                       for query in evaluate.QUERIES]}
        for k in chosen:
            rates[split][MAIN[k].name] = [
                [100 * hits_of(run, split, query).mean() for run in runs[k]]
                for query in evaluate.QUERIES]
    if given.figures:
        figures.queries(figure_path("fig3", given), rates)
    rows = []
    for method in rates[splits[0]]:
        rows.append([method])
        for split in splits:
            rows[-1] += [mean_and_deviation(values) for values in rates[split][method]]
    heads = [""]
    for split in splits:
        heads += [f"{split}, {name}" for name in ("Q", "Q^s", "Q^d")]
    columns = [(split, "") for split in splits]
    return f"{markdown(heads, rows)}\n\n{sizes(runs[chosen[0]], columns)}."


def collapse(given: argparse.Namespace) -> str:
    """What becomes of both sides of Eq. 2 and Eq. 5, and of the verbs, in training."""
    runs = collect("table1", given)

    def log_of(k: int, kind: str) -> list[list[dict]]:
        """The rows of row k's logs that are of epochs, or of steps of stage 1."""
        return [[line for line in run["log"] if kind in line] for run in runs[k]]

    logs = {"mmn": log_of(0, "epoch"), "vdi": log_of(2, "epoch"), "vdi-staged": log_of(4, "epoch")}
    names = ["var FC(x^qd), Eq. 2", "var x~^qs", "var FC(x^qd), Eq. 5", "var m~"]
    if given.figures:
        figures.collapse(figure_path("collapse", given), names, logs)
    parts = {"`vdi`": (logs["vdi"], names + ["L_vc", "L_sd", "cos x^qd"]),
             "`vdi-staged`, stage 1": (log_of(4, "stage"), ["var x^qd", "cos x^qd"]),
             "`vdi-staged`, stage 2": (logs["vdi-staged"], ["cos x^qd"])}
    rows = []
    for title, (seeds, shown) in parts.items():
        for name in shown:
            first = np.mean([log[0][name] for log in seeds])
            last = np.mean([log[-1][name] for log in seeds])
            rows.append([f"{title}: {name}", f"{first:.4f}", f"{last:.4f}"])
    return markdown(["", "first", "last"], rows)


def fig2(given: argparse.Namespace) -> str:
    """Fig. 2: the method."""
    _, world = clip_of(0, given)
    figures.method(figure_path("fig2", given), world, given.root)
    return "drawn: assets/fig2.png"


def blocks(given: argparse.Namespace) -> str:
    """CLIP2Video: what each of its blocks contributes. Test metrics of every variant and seed."""
    names = {"mean": "mean pooling", "transformer": "temporal transformer", "tdb": "+ TDB",
             "tab": "+ TAB", "both": "+ TDB + TAB"}
    columns = ["t2v R@1", "t2v R@5", "t2v MedR", "v2t R@1", "direction recognised, %",
               "order recognised, %"]
    rows = []
    counts = set()
    for variant in clip2video.model.VARIANTS:
        results = []
        for seed in seeds_of(given):
            config = clip2video.model.configure(dataset=world_of("shapes", seed), variant=variant,
                                                seed=seed, root=given.root, device=given.device)
            choices = {name: value for name, value in dataclasses.asdict(config).items()
                       if name not in ("root", "device", "out")}
            path = RESULTS / "clip2video" / f"{variant}-{seed}.json"
            if not given.figures and stored_at(path, choices) is None:
                continue                                # for the documents nothing is trained
            train_it = functools.partial(clip2video.train.train, config, config.folder.exists())
            results.append(cached(path, choices, lambda: {"results": train_it()})["results"])
        counts.add(len(results))
        rows.append([names[variant]])
        rows[-1] += [mean_and_deviation([run[column] for run in results]) for column in columns]
    seeds = " to ".join(str(count) for count in sorted(counts))
    return f"{markdown([''] + columns, rows)}\n\n{seeds} seeds."


OTHERS = {"fig2": fig2, "fig3": fig3, "zero-shot": clip_alone, "s-table1": s_table1,
          "s-fig1": s_fig1, "collapse": collapse, "clip2video": blocks}
FIGURES = ("fig3", "s-fig1", "collapse")                # assets/<name>.png
NEEDS = {"fig3": "table1", "collapse": "table1"}        # whose runs they show


def result_of(what: str, given: argparse.Namespace) -> str:
    if what in TABLES:
        return table_text(what, given)
    return OTHERS[what](given)


# ------------------------------------------------------------------------------------ into the docs

# "<!-- table1 -->", the table, "<!-- end -->"
PLACE = re.compile(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", re.S)


def filled(text: str, given: argparse.Namespace, figures_at: str) -> str:
    """A document with the tables between its marks, over the seeds that were run."""
    def table(match: re.Match) -> str:
        name = match[1]
        seeds = given.seeds
        parts = [f"<!-- {name} -->"]
        if name in TABLES:
            seeds = seeds_stored(name, given)
        if name in TABLES and not seeds:
            parts.append(f"Not run yet: `python -m extras.reproduce {name}`")
        else:
            if name in FIGURES:
                parts.append(f"![{name}]({figures_at}/{name}.png)")
            parts.append(result_of(name, argparse.Namespace(**dict(vars(given), seeds=seeds))))
            parts.append(f"`python -m extras.reproduce {name}`")
        return "\n\n".join(parts + ["<!-- end -->"])

    return PLACE.sub(table, text)


def linked(text: str, up: str = "") -> str:
    """Points every [`file.name`](file.py) to the line of that function or class. up: the way from
    the document to the top folder."""
    def link(match: re.Match) -> str:
        path = match[2]
        node = ast.parse((HERE / path).read_text(encoding="utf-8"))
        for name in match[1].split(".")[1:]:
            parts = [part for part in node.body if getattr(part, "name", "") == name]
            if not parts:
                raise ValueError(f"a document links to {match[1]}, which does not exist in {path}")
            node = parts[0]
        return f"[`{match[1]}`]({up}{path}#L{node.lineno})"

    return re.sub(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)(?:#L\d+)?\)", link, text)


def documents(given: argparse.Namespace) -> dict[pathlib.Path, str]:
    """README.md and docs/*.md with the stored results and links to current lines."""
    texts = {}
    for path in [HERE / "README.md"] + sorted((HERE / "docs").glob("*.md")):
        up = "" if path.parent == HERE else "../"
        text = filled(path.read_text(encoding="utf-8"), given, f"{up}assets")
        texts[path] = linked(text, up)
    return texts


# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    arguments = options.parser("the paper's tables and figures, ours beside the paper's",
                               prog="python -m extras.reproduce")
    names = list(TABLES) + list(OTHERS)
    add = arguments.add_argument
    add("what", nargs="+", choices=names + ["docs"], metavar="what",
        help=f"{', '.join(names)}; or docs: write the stored results into docs/ and README.md")
    add("--dataset", default="shapes", choices=("shapes", "charades", "activitynet"), help="which")
    add("--seeds", type=int, help="seeds of each row (default: three)")
    add("--device", **options.DEVICE)
    add("--root", default="data", help="folder of datasets")
    add("--jobs", type=int, help="runs at a time (default: the number of cores; 1 on a GPU)")
    add("--select-on-test", action="store_true",
        help="common practice: train on all training videos, choose the epoch on a test split")
    add("--allow-missing", action="store_true",
        help="run although videos have no features; the tables say how many")
    add("--fresh", action="store_true", help="run again what is stored (but not clip2video)")
    add("--svo", metavar="DIR",
        help="s-table1 on SVO-Probes: a folder with svo_probes.csv and its images, named by id")
    given = arguments.parse_args(argv)
    given.figures = "docs" not in given.what
    return given


def main() -> None:
    given = parse_arguments()
    with reported():
        for number in (given.jobs, given.seeds):
            if number is not None and number < 1:
                raise Mistake("--jobs and --seeds must be at least 1")
        if "docs" not in given.what:
            reproduce(given)
            return
        if len(given.what) > 1:
            raise Mistake("docs cannot be combined with tables; run it alone")
        for path, text in documents(given).items():
            files.save(path, text)
            print(f"wrote {path.relative_to(HERE)}")


def reproduce(given: argparse.Namespace) -> None:
    shapes_only = {"fig2", "clip2video"} & set(given.what)
    if given.dataset != "shapes" and shapes_only:
        raise Mistake(f"{', '.join(sorted(shapes_only))}: available for the shapes world only")
    if given.dataset != "shapes" and "s-table1" in given.what and not given.svo:
        raise Mistake("s-table1 is about photographs; name the folder of SVO-Probes' table and "
                      "images with --svo (--dataset shapes draws images instead)")
    tables = [NEEDS.get(what, what) for what in given.what]
    tables = [what for what in tables if what in TABLES]
    configs = {}                                        # an ordered set
    for what in tables:
        check(what, given)
        for seed in seeds_of(given):
            for config in configs_of(what, seed, given):
                if config and can_run(config):
                    configs[config] = None
    if given.jobs is None:
        given.jobs = os.cpu_count() or 1
        if parallel.pick_device(given.device).type != "cpu":
            given.jobs = 1
    run_all(list(configs), given)
    for what in given.what:
        print(f"\n{what}, {given.dataset}\n\n{result_of(what, given)}")


if __name__ == "__main__":
    main()
