"""Every table and figure of the paper and its supplement, ours beside the paper's.

    python -m extras.reproduce table1                   # on the shapes world, three seeds
    python -m extras.reproduce table3 --dataset charades --device cuda
    python -m extras.reproduce docs                     # writes the tables into docs/ and README.md

A row is a name, the fields of train.Config that make it, and the paper's figures; a row without
fields is another method, as the paper reports it. It is run once per seed (shapes: seed k trains on
world k modulo 5), and its result is stored in results/<dataset>/<name>.json: configuration,
metrics, log, and R@1 by Q^s and Q^d. A stored row is not run again, except with --fresh. Choices
are made on validation splits; tables show test splits.

The unit of a comparison is the world: its seeds are averaged, and intervals are Student's over
worlds. Of real videos it is the fold; on a real dataset, where all seeds train on the same videos,
the seed.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import shutil
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import clip
import clip2video.model
import clip2video.train
import data
import evaluate
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
FINAL = ("test", "trivial", "novel-word", "novel-composition",  # the splits that tables show
         "coupled-novel-word")
WORLDS = 5                                                      # with a shipped CLIP each
STUDENT = (math.nan, 12.71, 4.30, 3.18, 2.78)   # 97.5% quantile of t, by degrees of freedom
R1 = "R@1,IoU=0.5"                                              # what is compared
SEPARATE = {"charades": "vgg", "activitynet": "c3d"}            # MMN's own features, by family
BERT = "distilbert-base-uncased"                                # and its text tower


class Row(NamedTuple):
    """A line of a table: its name, the fields of Config that make it (None: it is only reported),
    and the paper's figures by dataset. Without figures of its own, the shapes world shows those of
    Charades-STA, for orientation. fused: evaluated together with CLIP alone; seeds: at most so
    many."""
    name: str
    fields: dict | None = None
    charades: list[float] = []
    activitynet: list[float] = []
    shapes: list[float] = []
    fused: bool = False
    seeds: int = 1000


class Table(NamedTuple):
    """columns: "split metric"; differences: pairs of rows; original: of the original split, not of
    the compositional ones; baselines: with rows for what needs no training; seeds: how many runs of
    each row; dataset: another one than --dataset."""
    columns: list[str]
    rows: list[Row]
    differences: list[tuple[int, int]] = []
    original: bool = False
    baselines: bool = False
    seeds: int = 3
    dataset: str = ""


# ------------------------------------------------------------------------------------------- tables

# the methods; text_lr is the text tower's share of the learning rate
MMN = dict(method="mmn", text_lr=0.1)                           # as in the paper
TUNED = dict(method="mmn", text_lr=1.0)                         # chosen on validation, on shapes
VDI = dict(method="vdi", text_lr=0.1)                           # as in the paper
STAGED = dict(method="vdi-staged")                              # 0.3, chosen on validation
RANDOM = dict(STAGED, stage_target="random")                    # its control

SPLITS = ["test R@1,IoU=0.5", "novel-word R@1,IoU=0.5", "novel-composition R@1,IoU=0.5"]
ABLATION = ["novel-word R@1,IoU=0.5", "novel-word R@1,IoU=0.7", "novel-word mIoU",
            "test R@1,IoU=0.5"]

TABLES = {}
# Table 1: new scenes, words and combinations
TABLES["table1"] = Table(ABLATION[:3] + [
    "novel-composition R@1,IoU=0.5", "novel-composition R@1,IoU=0.7", "novel-composition mIoU"], [
    Row("MMN, the paper's text rate", MMN, [43.85, 24.17, 39.50], [31.05, 15.48, 33.16]),
    Row("MMN, tuned on validation", TUNED),
    Row("`vdi`: VDI as printed", VDI, [46.47, 28.63, 41.60], [32.35, 16.02, 34.32]),
    Row("control: random codes, no video", RANDOM),
    Row("**`vdi-staged`**", STAGED),
    # other methods, as the paper reports them
    Row("WSSL", None, [2.79, 0.73, 7.92], [3.09, 1.13, 7.10]),
    Row("TMN", None, [9.43, 4.96, 11.23], [9.93, 5.12, 11.38]),
    Row("TSP-PRL", None, [14.83, 2.61, 14.03], [18.05, 3.15, 14.34]),
    Row("2D-TAN", None, [29.36, 13.12, 28.47], [23.86, 10.37, 28.88]),
    Row("LGI", None, [26.48, 12.47, 27.62], [23.10, 9.03, 26.95]),
    Row("VSLNet", None, [25.60, 10.07, 30.21], [21.68, 9.94, 29.58]),
    Row("VISA", None, [42.35, 20.88, 40.18], [30.14, 15.90, 35.13]),
], differences=[(4, 1), (4, 0), (4, 3), (2, 0)], baselines=True)
MAIN = TABLES["table1"].rows[:5]                                # what is run of it

# README, the study: is anything ahead of MMN, and does it look at the video? Written down before
# its runs: ten seeds of both kinds of world, a smaller model (to afford 160 runs), and these
# differences on all test splits, novel-word first. Anything else in these tables is exploration.
# Two seeds on each of five worlds, averaged within the world.
#   injection minus MMN tuned, and minus MMN with as many steps as both stages together
#   injection minus random codes per motion, which know synonyms and no video
#   the change minus the whole video as the target; `vdi` minus MMN, both at the paper's rate
#   random codes per motion minus per word, and minus MMN tuned
#   MMN and `vdi-staged` fused with CLIP alone, minus the same without
# Learning rates were chosen on val and val-novel-word of worlds 0 and 1 without coupling, for MMN
# and for `vdi-staged` out of the same six (3e-3 or 6e-3; text rate 0.1, 0.3 or 1).
TUNED_MMN = dict(method="mmn", lr=6e-3, text_lr=0.3)
TUNED_STAGED = dict(method="vdi-staged", lr=3e-3, text_lr=0.3)
CODES = dict(TUNED_STAGED, stage_target="random")
MOTIONS = dict(TUNED_STAGED, stage_target="motions")            # synonyms share a code
WHOLE = dict(TUNED_STAGED, stage_target="whole")
SMALL = dict(hidden=96, epochs=20)
LONGER = dict(hidden=96, epochs=52)                             # 20 epochs and stage 1: 1,300 steps
STUDY = [
    Row("MMN, the paper's text rate", MMN | SMALL),
    Row("MMN, tuned on validation", TUNED_MMN | SMALL),
    Row("MMN, tuned, as many steps as both stages", TUNED_MMN | LONGER),
    Row("`vdi`: VDI as printed", VDI | SMALL),
    Row("control: a random code per word, no video", CODES | SMALL),
    Row("control: a random code per motion, no video", MOTIONS | SMALL),
    Row("`vdi-staged`, the whole video", WHOLE | SMALL),
    Row("**`vdi-staged`**, the change", TUNED_STAGED | SMALL),
    Row("MMN, tuned, fused with CLIP alone", TUNED_MMN | SMALL, fused=True),
    Row("`vdi-staged`, the change, fused with CLIP alone", TUNED_STAGED | SMALL, fused=True),
]
ASKED = [(7, 1), (7, 2), (7, 5), (6, 5), (7, 6), (5, 1), (5, 4), (3, 0), (8, 1), (9, 7)]
TABLES["main"] = Table(SPLITS, STUDY[:8], baselines=True, seeds=10)        # in the README
TABLES["study"] = Table(SPLITS, STUDY, ASKED, baselines=True, seeds=10)
# the same in worlds whose nouns tell as much about the verb as those of Charades-STA, 48%
TABLES["coupled"] = Table(SPLITS + ["coupled-novel-word R@1,IoU=0.5"], STUDY, ASKED, baselines=True,
                          seeds=10, dataset="shapes-p87")

# real videos with real CLIP text (extras/real.py). The learning rates are those that an archived
# study chose for both methods on the validation videos of fold 0 (docs/archive.md). Written down
# before the runs: two seeds on each of five folds, averaged within the fold (one where seeds=WORLDS
# stands, so that all runs take two hours), and these differences
SHORT = dict(lr=3e-4, text_lr=1.0, hidden=96, epochs=10)
REAL_MMN = dict(method="mmn", **SHORT)
REAL_STAGED = dict(method="vdi-staged", **SHORT)
REAL = [
    Row("MMN", REAL_MMN),
    Row("MMN, no pre-training of the text", REAL_MMN | dict(text_clip="shuffled"), seeds=WORLDS),
    # these features have no patches
    Row("`vdi` without L^sd", dict(method="vdi", lambda_sd=0.0, **SHORT), seeds=WORLDS),
    Row("control: a random code per query, no video", REAL_STAGED | dict(stage_target="random"),
        seeds=WORLDS),
    Row("`vdi-staged`, the whole video", REAL_STAGED | dict(stage_target="whole"), seeds=WORLDS),
    Row("**`vdi-staged`**, the change", REAL_STAGED),
    Row("MMN, fused with CLIP alone", REAL_MMN, fused=True),
    Row("`vdi-staged`, fused with CLIP alone", REAL_STAGED, fused=True),
]
TABLES["real"] = Table(["test R@1,IoU=0.5", "test R@1,IoU=0.7", "test mIoU"], REAL,
                       [(5, 0), (5, 3), (5, 4), (2, 0), (0, 1), (6, 0), (7, 5)], baselines=True,
                       seeds=10, dataset="real")
TABLES["real-novel"] = Table(SPLITS, [REAL[0]] + REAL[5:], [(1, 0), (2, 0), (3, 1)],
                             baselines=True, seeds=3, dataset="real-novel")

# Table 2: the original split
TABLES["table2"] = Table([
    "test R@1,IoU=0.5", "test R@1,IoU=0.7", "test R@5,IoU=0.5", "test R@5,IoU=0.7"], [
    Row("MMN, the paper's text rate", MMN,
        [50.48, 29.65, 85.27, 60.67], [46.89, 27.26, 78.32, 63.47]),
    Row("MMN, tuned on validation", TUNED),
    Row("`vdi`: VDI as printed", VDI, [52.32, 31.37, 87.03, 62.30], [48.09, 28.76, 79.69, 64.88]),
    Row("control: random codes, no video", RANDOM),
    Row("**`vdi-staged`**", STAGED),
    Row("MMN, VGG or C3D and DistilBERT", dict(MMN, clip="separate"),
        [47.31, 27.28, 83.74, 58.41], [48.59, 29.26, 79.50, 64.76]),
    # other methods, as the paper reports them
    Row("VideoBert", None, [32.70, 19.50, 68.10, 46.20], [37.20, 21.00, 66.70, 53.60]),
    Row("MIL-NCE", None, [37.00, 21.20, 74.30, 50.40], [41.80, 24.50, 73.50, 57.70]),
    Row("LocVTP", None, [43.60, 26.30, 81.90, 55.30], [48.20, 30.50, 80.10, 64.70]),
    Row("MGSL", None, [63.98, 41.03, 93.21, 63.85], [51.87, 31.42, 82.60, 66.71]),
    Row("D-TSG", None, [65.05, 42.77, 94.42, 65.16], [54.29, 33.64, 86.58, 69.36]),
    Row("2D-TAN", None, [39.70, 23.31, 80.32, 51.26], [44.51, 26.54, 77.13, 61.96]),
    Row("VSL-Net", None, [39.20, 20.80], [43.22, 26.16]),       # reports R@1 only, like DCM
    Row("CBLN", None, [43.67, 24.44, 88.39, 56.49], [48.12, 27.60, 79.32, 63.41]),
    Row("DCM", None, [47.80, 28.00], [44.90, 27.70]),
    Row("DRN", None, [42.90, 23.68, 87.80, 54.87], [45.45, 24.36, 77.97, 50.30]),
], original=True, baselines=True)

# Table 3: which part does what
TABLES["table3"] = Table(ABLATION, [
    Row("`vdi`: neither (MMN)", MMN, [43.85, 24.17, 39.50]),
    Row("`vdi`: L^vc, a learned probe", dict(VDI, lambda_sd=0.0, context_query="none"),
        [43.12, 25.32, 39.43]),
    Row("`vdi`: L^vc, Q attends", dict(VDI, lambda_sd=0.0, context_query="full"),
        [45.02, 27.63, 40.40]),
    Row("`vdi`: L^vc, Q^s attends", dict(VDI, lambda_sd=0.0), [45.47, 29.35, 40.61]),
    Row("`vdi`: L^sd, LSTM", dict(VDI, lambda_vc=0.0, sequence="lstm"), [45.32, 25.76, 40.07]),
    Row("`vdi`: L^sd, transformer", dict(VDI, lambda_vc=0.0), [44.60, 26.06, 40.09]),
    Row("`vdi`: both", VDI, [46.47, 28.63, 41.60]),             # the paper's method
    Row("`vdi-staged`: no query", dict(STAGED, context_query="none")),
    Row("`vdi-staged`: Q attends", dict(STAGED, context_query="full")),
    Row("`vdi-staged`: Q^s attends", STAGED),
], differences=[(1, 0), (3, 1), (9, 7), (9, 8)])

# supplement, Table 2: the weights of both losses, lambda_vc and lambda_sd
TABLES["s-table2"] = Table(ABLATION, [
    Row("0, 0 (MMN)", MMN, [43.85, 24.17, 39.50]),
    Row("0.1, 0", dict(VDI, lambda_vc=0.1, lambda_sd=0.0), [44.04, 28.35, 41.42]),
    Row("0.5, 0", dict(VDI, lambda_vc=0.5, lambda_sd=0.0), [45.47, 29.35, 40.61]),
    Row("1, 0", dict(VDI, lambda_vc=1.0, lambda_sd=0.0), [42.45, 24.17, 38.70]),
    Row("0, 0.1", dict(VDI, lambda_vc=0.0, lambda_sd=0.1), [44.70, 25.61, 39.70]),
    Row("0, 0.01", dict(VDI, lambda_vc=0.0, lambda_sd=0.01), [44.60, 26.06, 40.09]),
    Row("0, 0.001", dict(VDI, lambda_vc=0.0, lambda_sd=0.001), [43.60, 25.32, 39.19]),
    Row("0.5, 0.1", dict(VDI, lambda_vc=0.5, lambda_sd=0.1), [45.18, 27.91, 41.05]),
    Row("0.5, 0.01", dict(VDI, lambda_vc=0.5, lambda_sd=0.01), [46.47, 28.63, 41.60]),  # as chosen
    Row("0.5, 0.001", dict(VDI, lambda_vc=0.5, lambda_sd=0.001), [45.47, 27.31, 41.28]),
], differences=[(3, 0)])

# supplement, Table 3: the forms of both losses
TABLES["s-table3"] = Table(ABLATION, [
    Row("L^vc consistent, L^sd relational", VDI, [46.47, 28.63, 41.60]),        # Eq. 2 and Eq. 5
    Row("both consistent", dict(VDI, forms="con-con"), [45.32, 28.35, 41.08]),
    Row("both relational", dict(VDI, forms="rel-rel"), [38.56, 23.31, 36.20]),
], differences=[(0, 1), (0, 2)])

# supplement, Table 4: which words to inject into
TABLES["s-table4"] = Table(ABLATION, [
    Row("`vdi`: into Q", dict(VDI, inject_into="full"), [44.89, 26.04, 39.52]),
    Row("`vdi`: into Q^d", VDI, [46.47, 28.63, 41.60]),
    Row("`vdi-staged`: into Q", dict(STAGED, inject_into="full")),
    Row("`vdi-staged`: into Q^d", STAGED),
], differences=[(1, 0), (3, 2)])

# supplement, Table 5: joint and separate pre-training, and what attends. On shapes another CLIP's
# text tower stands for separate networks, which have the paper's figures on a real dataset
TABLES["s-table5"] = Table(SPLITS + ["novel-word noun accuracy"], [
    Row("another CLIP's text tower: MMN", dict(MMN, text_clip="other"),
        shapes=[41.59, 23.60, 37.90]),
    Row("another CLIP's text tower: `vdi`, Q^s", dict(VDI, text_clip="other"),
        shapes=[41.29, 24.46, 38.21]),
    Row("another CLIP's text tower: `vdi-staged`, Q^s", dict(STAGED, text_clip="other")),
    Row("no pre-training of the text: MMN", dict(MMN, text_clip="shuffled")),
    Row("no pre-training of the text: `vdi-staged`", dict(STAGED, text_clip="shuffled")),
    Row("joint: MMN", MMN, [43.85, 24.17, 39.50]),
    Row("joint: `vdi`, Q^h", dict(VDI, context_query="half"), [46.01, 27.05, 40.94]),
    Row("joint: `vdi`, Q^s", VDI, [46.47, 28.63, 41.60]),
    Row("joint: `vdi-staged`, Q^h", dict(STAGED, context_query="half")),
    Row("joint: `vdi-staged`, Q^s", STAGED),
    Row("separate, VGG or C3D and DistilBERT: MMN", dict(MMN, clip="separate"),
        [41.59, 23.60, 37.90]),
    Row("separate, VGG or C3D and DistilBERT: `vdi` without L^sd, Q^s",
        dict(VDI, clip="separate", lambda_sd=0.0), [41.29, 24.46, 38.21]),
], differences=[(5, 0), (9, 2), (9, 8), (3, 5)])

# supplement, Table 6: backbones
TABLES["s-table6"] = Table(["test R@1,IoU=0.5", "test R@1,IoU=0.7"] + SPLITS[1:], [
    Row("ViT: MMN", MMN, [50.48, 29.65]),
    Row("ViT: `vdi`", VDI, [52.32, 31.37]),
    Row("ViT: `vdi-staged`", STAGED),
    Row("ResNet: MMN", dict(MMN, clip="resnet"), [52.88, 32.02]),
    Row("ResNet: `vdi`", dict(VDI, clip="resnet"), [53.98, 33.20]),
    Row("ResNet: `vdi-staged`", dict(STAGED, clip="resnet")),
    Row("VGG or C3D and DistilBERT, separate: MMN", dict(MMN, clip="separate"), [47.31, 27.28]),
], original=True, differences=[(3, 0), (5, 2), (4, 3), (5, 3)])

# ours: how words are masked
TABLES["choices"] = Table(SPLITS, [
    Row("`vdi`: masked words dropped", VDI),
    Row("`vdi`: masked words replaced by *something*", dict(VDI, mask="something")),
    Row("`vdi-staged`: masked words replaced by *something*", STAGED),
    Row("`vdi-staged`: masked words dropped", dict(STAGED, mask="")),
], differences=[(0, 1), (2, 3)])


# --------------------------------------------------------------------------- rows to configurations

def world_of(dataset: str, seed: int) -> str:
    """The dataset of a seed; of shapes a world, with its own small CLIP."""
    if dataset.startswith("shapes"):
        _, coupling = shapes.world_of(dataset)
        return shapes.name_of(seed % WORLDS, coupling)
    if dataset == "real":                               # five folds, see extras/real.py
        return f"real-{seed % WORLDS}"
    return dataset


def dataset_of(what: str, given: argparse.Namespace) -> str:
    """The dataset of a table. On a real one, most tables are about its compositional splits, which
    have a training split of their own."""
    if TABLES[what].dataset:
        return TABLES[what].dataset
    # a shapes world has all splits at once
    if given.dataset == "shapes" or TABLES[what].original:
        return given.dataset
    return given.dataset + "-cg"


def config_of(row: Row, dataset: str, seed: int, given: argparse.Namespace) -> train.Config | None:
    """The configuration of a row; None if it cannot be run on this dataset."""
    if row.fields is None:
        return None
    fields = dict(row.fields, dataset=world_of(dataset, seed), seed=seed, device=given.device,
                  root=given.root, select_on=select_on(dataset, given))
    family = dataset.removesuffix("-cg")
    if dataset.startswith("real"):
        fields["clip"] = "real-0"                       # all folds have one text tower
    if fields.get("clip") == "separate":
        if family not in SEPARATE:                      # shapes has no features of another network
            return None
        fields["clip"] = SEPARATE[family]
        fields["text_clip"] = BERT
    elif fields.get("clip") == "resnet":
        fields["clip"] = "RN50"
        if given.dataset == "shapes":                   # see shapes.build_for
            fields["clip"] = f"{fields['dataset']}-resnet"
    elif fields.get("text_clip") == "other":            # of the same width, trained on other images
        fields["text_clip"] = "ViT-B/16"
        if given.dataset == "shapes":
            fields["text_clip"] = world_of("shapes", (seed + 1) % 3)
    config = train.configure(**fields)
    # the folder of the run is named by all choices: two rows never share one
    return dataclasses.replace(config, out=f"runs/reproduce/{dataset}/{name_of(config)}")


def configs_of(what: str, seed: int, given: argparse.Namespace) -> list[train.Config | None]:
    """The configurations of the rows of a table."""
    dataset = dataset_of(what, given)
    return [config_of(row, dataset, seed, given) for row in TABLES[what].rows]


def select_on(dataset: str, given: argparse.Namespace) -> str:
    """The split that selects the epoch; with --select-on-test that of the field's protocol."""
    if not given.select_on_test:
        return "val"
    if dataset.endswith("-cg"):
        return "novel-word"
    return "test"


# ----------------------------------------------------------------------------------- stored results

@functools.cache                                        # spaCy takes seconds to load
def parser_name(dataset: str) -> str:
    """The parser of a dataset's sentences, with its version."""
    if dataset.startswith("shapes"):
        return parse.BY_CONSTRUCTION
    return parse.Parser().name


def choices_of(config: train.Config) -> dict:
    """What determines a result, as json holds it."""
    fields = json.loads(json.dumps(dataclasses.asdict(config)))         # with lists for tuples
    fields["parser"] = parser_name(config.dataset)      # another version may divide otherwise
    return {name: value for name, value in fields.items() if name not in NOT_A_CHOICE}


def name_of(config: train.Config) -> str:
    """The method, the seed, and a hash of everything that differs from the defaults, so that a
    field that is added later changes no name."""
    # subtle: of Config, not of the preset, so that a changed preset is another name
    defaults = json.loads(json.dumps(dataclasses.asdict(train.Config())))
    changed = {name: value for name, value in choices_of(config).items()
               if value != defaults.get(name)}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{config.method}-{config.seed}-{digest[:10]}"


def file_of(config: train.Config, fused: bool = False) -> pathlib.Path:
    family = config.dataset
    for many in ("shapes", "real"):                     # one folder for all worlds or folds
        if family.startswith(many):
            family = many
    name = name_of(config)
    if fused:
        name += "-fused"
    return RESULTS / family / f"{name}.json"


def stored_at(path: pathlib.Path, choices: dict) -> dict | None:
    """The content of a result file, if it was made with these choices. A choice that the file does
    not have was added later."""
    if not path.exists():
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    # the name has only a part of the hash, and `per_seed` has none
    for name, value in content["config"].items():
        if choices.get(name) != value:
            return None
    return content


def stored(config: train.Config, fused: bool = False) -> dict | None:
    return stored_at(file_of(config, fused), choices_of(config))


def cached(path: pathlib.Path, choices: dict, make, fresh: bool = False) -> dict:
    """The stored result, or else that of `make()`, a dict, which is then stored with the choices,
    versions and minutes."""
    content = None if fresh else stored_at(path, choices)
    if content is None:
        started = time.time()
        content = {"config": choices}
        content.update(make())
        content["minutes"] = round((time.time() - started) / 60, 2)
        content["versions"] = progress.versions() | {"threads": torch.get_num_threads()}
        # a line for the results, one for the log: differences between two commits stay readable
        text = json.dumps(content, separators=(",", ":")).replace(',"log":', ',\n"log":')
        files.save(path, text + "\n")
    return content


def per_seed(what: str, given: argparse.Namespace, make, seeds: int = 3) -> list[dict]:
    """`make(seed)` for each seed, stored in results/<dataset>/<what>-<seed>.json."""
    results = []
    for seed in range(given.seeds or seeds):
        path = RESULTS / given.dataset / f"{what}-{seed}.json"
        choices = {"dataset": given.dataset, "seed": seed}
        content = cached(path, choices, lambda: {"results": make(seed)}, given.fresh)
        results.append(content["results"])
    return results


def collect(what: str, given: argparse.Namespace) -> list[list[dict]]:
    """The stored results of a table: row -> seed -> result; no seeds for a row that was not run."""
    rows = [[] for _ in TABLES[what].rows]
    for seed in range(given.seeds or TABLES[what].seeds):
        for row, config, runs in zip(TABLES[what].rows, configs_of(what, seed, given), rows):
            if config is None or seed >= row.seeds:
                continue
            result = stored(config, row.fused)
            if result:
                runs.append(result)
            elif given.dataset == "shapes":             # a real one may lack a row's features
                raise Mistake(f"{what} is incomplete; run: python -m extras.reproduce {what}")
    return rows


# ------------------------------------------------------------------------------------------ running

def run(config: train.Config, fresh: bool = False, fused: bool = False) -> dict:
    """Trains and evaluates one configuration, or reads its stored result. fused: together with CLIP
    alone; the training is that of the same configuration without."""
    folder = config.folder

    def make() -> dict:
        if fresh and not fused:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "results.json").exists():
            train.train(config, resume=folder.exists())         # of an interrupted run
        metrics = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        log = []                                        # rounded: there are thousands of values
        for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
            log.append({name: float(f"{value:.4g}") for name, value in json.loads(line).items()})
        device = parallel.pick_device(config.device)
        checkpoint = evaluate.load(folder / "ckpt.pt", device)
        if fused:
            log = []                                    # it is in the other file
            evaluate.add_clip(checkpoint, config.root, device)
            metrics = evaluate.evaluate(checkpoint, device=device, allow_missing=True)
        if "val" not in metrics and config.select_on == "val":  # a real dataset's is held out
            metrics |= evaluate.evaluate(checkpoint, ["val"], device=device, allow_missing=True)
        halves = {}
        if not fused:                                   # for Fig. 3
            splits = [split for split in FINAL if split in metrics]
            for query in ("static", "dynamic"):
                found = evaluate.evaluate(checkpoint, splits, query, config.root, device,
                                          allow_missing=True)
                halves[query] = {split: found[split][R1] for split in splits}
        return {"results": metrics, "coverage": coverage(config), "halves": halves, "log": log,
                "clip_sha256": checkpoint.checkpoint["clip_sha256"],
                "clip_weight": checkpoint.checkpoint.get("clip_weight")}

    return cached(file_of(config, fused), choices_of(config), make, fresh)


def run_quietly(config: train.Config, fused: bool, fresh: bool, threads: int) -> None:
    """`run` in a process of its own; its output goes to <name>.txt beside the run's folder."""
    torch.set_num_threads(threads)
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(config.folder.with_suffix(".txt"), "w", encoding="utf-8") as file, \
            contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run(config, fresh, fused)


def coverage(config: train.Config) -> dict[str, list[int]]:
    """Split -> videos and sentences with features, and videos and sentences without."""
    store = data.open_store(config.dataset, config.clip, config.root, config.frames)
    counts = {}
    for split in data.splits(config.dataset, config.root):
        rows = data.read_annotations(config.dataset, split, config.root)
        missing = [row.video for row in rows if row.video not in store]         # one per sentence
        videos = {row.video for row in rows}
        counts[split] = [len(videos) - len(set(missing)), len(rows) - len(missing),
                         len(set(missing)), len(missing)]
    return counts


def can_run(row: Row, config: train.Config, given: argparse.Namespace) -> bool:
    """Does it have features? A note if there are none. Mistake, before anything is trained, if some
    videos have none."""
    if given.dataset == "shapes":                       # makes its own
        return True
    try:
        result = stored(config) or {}
        # what is stored was run on the features of then
        counts = result.get("coverage") or coverage(config)
    except Mistake as error:                            # its features have not been made
        print(f"note: \"{row.name}\" is not run: {error}", file=sys.stderr)
        return False
    lost = []
    for split, (_, _, videos, sentences) in counts.items():
        if videos:
            lost.append(f"{videos} videos ({sentences} sentences) of {split}")
    if lost and not given.allow_missing:
        raise Mistake(f"{' and '.join(lost)} have no features, so the results could not be "
                      f"compared with the paper's; make them, or use --allow-missing")
    return True


def runnable(what: str, given: argparse.Namespace) -> list[tuple[train.Config, bool]]:
    """The configurations of a table, seed by seed, and whether they are fused. Mistake for a table
    without a row."""
    dataset = dataset_of(what, given)
    rows = []
    for row, config in zip(TABLES[what].rows, configs_of(what, 0, given)):
        if config and can_run(row, config, given):
            rows.append(row)
    if not rows:
        raise Mistake(f"no row of {what} can be run: see above")
    configs = []
    for seed in range(given.seeds or TABLES[what].seeds):
        configs += [(config_of(row, dataset, seed, given), row.fused) for row in rows
                    if seed < row.seeds]
    return configs


def run_all(configs: list[tuple[train.Config, bool]], given: argparse.Namespace) -> None:
    """Runs what is not stored, --jobs at a time: two cores do best with two of one thread."""
    # by file, because tables share rows
    missing = {file_of(config, fused): (config, fused) for config, fused in configs
               if given.fresh or stored(config, fused) is None}
    for config, _ in missing.values():                  # before two processes build the same world
        shapes.build_for(config)
    threads = max(1, torch.get_num_threads() // given.jobs)     # of each run
    # spawned, because a forked process cannot use torch's threads safely
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, spawn) as pool:
        run_each = map if given.jobs == 1 else pool.map
        # those that only evaluate come last, when what they evaluate has been trained
        for wanted in (False, True):
            now = [config for config, fused in missing.values() if fused == wanted]
            work = functools.partial(run_quietly, fused=wanted, fresh=given.fresh, threads=threads)
            for _ in tqdm(run_each(work, now), total=len(now), desc="runs", disable=None):
                pass                                    # raises what a run raised


# ---------------------------------------------------------------------------------- tables of runs

def columns_of(what: str, given: argparse.Namespace) -> list[tuple[str, str]]:
    """(split, metric) of the columns that a dataset has. "test" is what the compositional datasets
    call trivial; accuracies need to know all events, as the shapes world does."""
    dataset = dataset_of(what, given)
    columns = []
    for column in TABLES[what].columns:
        split, metric = column.split(" ", 1)            # "test verb accuracy"
        if dataset.endswith("-cg") and split == "test":
            split = "trivial"
        if dataset in data.FILES and ("accuracy" in metric or
                                          split not in data.FILES[dataset]):
            continue
        columns.append((split, metric))
    return columns


def per_world(values: list[float]) -> list[float]:
    """One value per seed -> one per world, the mean of its seeds."""
    return [statistics.fmean(values[world::WORLDS]) for world in range(min(WORLDS, len(values)))]


def paired(ours: list[dict], theirs: list[dict], split: str) -> tuple[float, float, list[float]]:
    """R@1, IoU=0.5 of one row minus that of another, in points: mean over worlds, half the width of
    its 95% interval (Student's; NaN for a single world), and the difference in each world; over the
    seeds that both rows have."""
    differences = []
    for one, other in zip(ours, theirs):
        a, b = one["results"][split], other["results"][split]
        if a["queries"] != b["queries"]:
            raise Mistake(f"two rows have other sentences of {split}; make the missing features")
        # rounded: 6.05 is 6.0 or 6.1 by the last bits of a difference of two floats
        differences.append(round(a[R1] - b[R1], 6))
    worlds = per_world(differences)
    half = math.nan
    if len(worlds) > 1:
        half = STUDENT[len(worlds) - 1] * statistics.stdev(worlds) / math.sqrt(len(worlds))
    return statistics.fmean(worlds), half, worlds


def clip_name(dataset: str, given: argparse.Namespace) -> str:
    """A shapes world's own small CLIP, which is built if need be; that of all folds of real videos;
    else the published one."""
    if dataset.startswith("shapes"):
        shapes.build(dataset, given.root)
        return dataset
    if dataset.startswith("real"):
        return "real-0"
    return train.Config.clip


def clip_alone_of(what: str, given: argparse.Namespace) -> list[dict]:
    """The metrics of CLIP alone on the dataset of a table, for each seed: query -> split ->
    metrics, among them those of a random and of the best fixed moment."""
    dataset = dataset_of(what, given)
    device = parallel.pick_device(given.device)

    def make(seed: int) -> dict:
        world = world_of(dataset, seed)
        alone = zero_shot.run_of(world, clip_name(world, given), given.root, device)
        return {query: evaluate.evaluate(alone, query=query, device=device, allow_missing=True)
                for query in evaluate.QUERIES}

    return per_seed(f"zero-shot-{dataset}", given, make, min(TABLES[what].seeds, WORLDS))


def cells(columns: list[tuple[str, str]], results: list[dict], part: str = "") -> list[str]:
    """Mean and deviation of each column over worlds, empty for what has no such metric. results:
    split -> metrics, for each seed; part: of the metrics, a baseline's."""
    texts = []
    for split, metric in columns:
        values = []
        for result in results:
            metrics = result[split]
            if part:
                metrics = metrics[part]
            if metric in metrics:                       # baselines have no R@5
                values.append(metrics[metric])
        texts.append(mean_and_deviation(per_world(values)) if values else "")
    return texts


PAPER = {"shapes": ("Charades-STA", "Charades-CG novel-word"),  # original split, compositional
         "charades": ("Charades-STA", "Charades-CG novel-word"),
         "activitynet": ("ActivityNet-Captions", "ActivityNet-CG novel-word")}


def table_text(what: str, given: argparse.Namespace) -> str:
    """A table as Markdown: mean ± deviation over worlds, the paper's, paired differences."""
    table = TABLES[what]
    runs = collect(what, given)                         # row -> seed -> result
    first = next(seeds for seeds in runs if seeds)      # any row that was run
    columns = columns_of(what, given)
    heads = [""] + [f"{split} {metric.replace(',IoU=', ' ')}" for split, metric in columns]
    lines = []
    if table.baselines:
        trained = [run["results"] for run in first]     # these hold both baselines, too
        alone = [content["full"] for content in clip_alone_of(what, given)]
        lines.append(["a random moment"] + cells(columns, trained, "random moment") + [""])
        lines.append(["the best fixed moment"] + cells(columns, trained, "best prior") + [""])
        lines.append(["CLIP alone, no training"] + cells(columns, alone) + [""])
    for row, seeds in zip(table.rows, runs):
        paper = getattr(row, given.dataset)             # a field of Row for each dataset
        if given.dataset == "shapes" and not paper:
            paper = row.charades                        # for orientation
        if not seeds and (given.dataset == "shapes" or not paper):
            continue                                    # on shapes nothing is only reported
        line = [title_of(row, seeds, given)] + cells(columns, [run["results"] for run in seeds])
        lines.append(line + [" / ".join(f"{value:.2f}" for value in paper)])
    if any(line[-1] for line in lines):                 # a column for the paper, if it has figures
        heads.append(f"paper, {PAPER[given.dataset][not table.original]}")
    else:
        lines = [line[:-1] for line in lines]
    minutes = sum(sum(run["minutes"] for run in seeds) for seeds in runs)
    counts = sorted({len(seeds) for seeds in runs if seeds})
    text = [markdown(heads, lines), "", f"{' or '.join(map(str, counts))} seeds; "
            f"{sizes(first, columns)}; "
            f"{minutes:.0f} minutes of runs.{protocol(what, given)}"]
    for a, b in table.differences:
        if runs[a] and runs[b]:
            ours = title_of(table.rows[a], runs[a], given)
            theirs = title_of(table.rows[b], runs[b], given)
            theirs = theirs.removeprefix(f"{ours.split(': ')[0]}: ")    # not the same twice
            text.append(f"- {ours} minus {theirs}: {difference(runs[a], runs[b])}")
    return "\n".join(text)


def title_of(row: Row, seeds: list[dict], given: argparse.Namespace) -> str:
    """A row's name. What was tuned on the shapes world's validation split was not tuned on a real
    dataset."""
    name = row.name
    if given.dataset != "shapes":
        name = re.sub("tuned( on validation)?", "text rate 1", name)
    if seeds:
        return name
    if row.fields:
        return f"{name} (reported; not run here)"
    return f"{name} (reported)"


def difference(ours: list[dict], theirs: list[dict]) -> str:
    """One row minus another on every test split, with the interval and each world."""
    parts = []
    for split in FINAL:
        if split in ours[0]["results"]:
            mean, half, worlds = paired(ours, theirs, split)
            each = ", ".join(f"{world:+.1f}" for world in worlds)
            parts.append(f"{split} {mean:+.1f} ± {half:.1f} ({each})")
    return "; ".join(parts)


def sizes(runs: list[dict], columns: list[tuple[str, str]]) -> str:
    """How many sentences each split has; on a real dataset also videos, and how many are missing.
    """
    parts = []
    for split in dict.fromkeys(split for split, _ in columns):          # each once, in order
        queries = np.mean([run["results"][split]["queries"] for run in runs])
        part = f"{split} {queries:.0f}"
        counts = runs[0].get("coverage", {}).get(split)
        if counts and not runs[0]["config"]["dataset"].startswith("shapes"):
            videos, _, lost_videos, lost_sentences = counts
            lost = "all"
            if lost_videos:
                lost = f"{lost_sentences} sentences of {lost_videos} videos missing"
            part += f" of {videos} videos ({lost})"
        parts.append(part)
    return "sentences per seed: " + ", ".join(parts)


def protocol(what: str, given: argparse.Namespace) -> str:
    """What selected the epoch, where that is not as docs/results.md says."""
    if given.select_on_test:
        split = select_on(dataset_of(what, given), given)
        return f" Trained on all training videos; the epoch is chosen on {split}, a test split."
    if given.dataset != "shapes":
        return (" The epoch is chosen on validation videos. Text rates and stage 1 are those "
                "chosen on the shapes world, not tuned here.")
    return ""


# ------------------------------------------------------------------------------------ other results

def figure_path(name: str, given: argparse.Namespace) -> pathlib.Path:
    if given.dataset == "shapes":
        return files.ASSETS / f"{name}.png"
    return RESULTS / given.dataset / f"{name}.png"


def clip_of(seed: int, given: argparse.Namespace) -> tuple[clip.CLIP, str]:
    """The CLIP of a seed's dataset, and that dataset."""
    world = world_of(given.dataset, seed)
    path = data.clip_file(clip_name(world, given), given.root)
    return clip.load(path, parallel.pick_device(given.device)), world


def clip_alone(given: argparse.Namespace) -> str:
    """CLIP without any training: it finds actors and is blind to their motions."""
    seeds = [content["full"] for content in clip_alone_of("table1", given)]
    metrics = [R1, "R@1,IoU=0.7", "R@5,IoU=0.5", "mIoU"]
    if given.dataset == "shapes":
        metrics += ["noun accuracy", "verb accuracy"]
    rows = []
    for split in FINAL:
        if split not in seeds[0]:
            continue
        row = [split] + cells([(split, metric) for metric in metrics], seeds)
        queries = np.mean([content[split]["queries"] for content in seeds])
        missing = seeds[0][split].get("queries missing", 0)             # on a real dataset
        row.append(f"{queries:.0f}")
        if missing:
            row[-1] += f" ({missing} missing)"
        rows.append(row)
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

    name = "s-table1-svo" if given.svo else "s-table1"
    seeds = per_seed(name, given, make)
    # the paper's: overall, subject, verb, object
    paper = {"right": ["0.79", "0.82", "0.76", "0.86"], "wrong": ["0.21", "0.18", "0.24", "0.14"],
             "difference": ["0.59", "0.64", "0.52", "0.72"], "right ahead": [""] * 4}
    kinds = ["overall"] + list(probe.KINDS)
    rows = []
    for score, theirs in paper.items():
        row = [score.replace("ahead", "ahead, %")]
        for kind in kinds:
            means = []
            for content in seeds:
                parts = list(content.values())          # all kinds, weighted by their numbers
                if kind != "overall":
                    parts = [content[kind]] if kind in content else []  # SVO-Probes may lack it
                if parts:
                    means.append(np.average([part[score] for part in parts],
                                            weights=[part["triplets"] for part in parts]))
            row.append(f"{np.mean(means):.2f}" if means else "no images")
        rows.append(row + theirs)
    return markdown(["score"] + kinds + [f"paper, {kind}" for kind in kinds], rows)


def s_fig1(given: argparse.Namespace) -> str:
    """Supplement, Fig. 1: what the end token attends to in the last layer, by part of speech."""
    def make(seed: int) -> dict:
        model, world = clip_of(seed, given)
        sentences = sorted({s.sentence for s in data.read_annotations(world, "train", given.root)})
        words_of = probe.shapes_words                   # by their places, which it knows
        if given.dataset != "shapes":
            words_of = functools.partial(probe.spacy_words, parse.load(None))
        content = {}
        for kind, values in probe.word_weights(model, sentences, words_of).items():
            if values:
                # subtle: what is above 3 is counted in the last bin, not lost
                counts, _ = np.histogram(np.clip(values, 0, 3), 30, (0, 3))     # [30]
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
    alone = clip_alone_of("table1", given)
    chosen = [k for k in (0, 1, 2, 4) if runs[k]]       # both MMN, `vdi`, `vdi-staged`
    first = runs[chosen[0]]
    splits = [split for split in FINAL[:3] if split in first[0]["results"]]
    rates = {}                          # split -> method -> for Q, Q^s, Q^d the R@1 of each seed
    for split in splits:
        rates[split] = {"CLIP alone": [[content[query][split][R1] for content in alone]
                                       for query in evaluate.QUERIES]}
        for k in chosen:
            full = [run["results"][split][R1] for run in runs[k]]
            halves = [[run["halves"][query][split] for run in runs[k]]
                      for query in ("static", "dynamic")]
            rates[split][MAIN[k].name] = [full] + halves
    if given.figures:
        figures.fig3(figure_path("fig3", given), rates)
    heads = [""]
    for split in splits:
        heads += [f"{split}, Q", f"{split}, Q^s", f"{split}, Q^d"]
    rows = []
    for method in rates[splits[0]]:
        row = [method]
        for split in splits:
            row += [mean_and_deviation(values) for values in rates[split][method]]
        rows.append(row)
    return f"{markdown(heads, rows)}\n\n{sizes(first, [(split, '') for split in splits])}."


def collapse(given: argparse.Namespace) -> str:
    """What becomes of both sides of Eq. 2 and Eq. 5, and of the verbs, in training."""
    runs = collect("table1", given)

    def log_of(k: int, kind: str) -> list[list[dict]]:
        """Seed -> the lines of row k's log that are of an "epoch", or of steps of a "stage"."""
        return [[line for line in run["log"] if kind in line] for run in runs[k]]

    logs = {"mmn": log_of(0, "epoch"), "vdi": log_of(2, "epoch"), "vdi-staged": log_of(4, "epoch")}
    sides = ["var FC(x^qd), Eq. 2", "var x~^qs", "var FC(x^qd), Eq. 5", "var m~"]
    if given.figures:
        figures.collapse(figure_path("collapse", given), sides, logs)
    rows = []
    for title, seeds, names in (
            ("`vdi`", logs["vdi"], sides + ["L_vc", "L_sd", "cos x^qd"]),
            ("`vdi-staged`, stage 1", log_of(4, "stage"), ["var x^qd", "cos x^qd"]),
            ("`vdi-staged`, stage 2", logs["vdi-staged"], ["cos x^qd"])):
        for name in names:
            # the last line of each, for a run may stop early
            first = np.mean([log[0][name] for log in seeds])
            last = np.mean([log[-1][name] for log in seeds])
            rows.append([f"{title}: {name}", f"{first:.4f}", f"{last:.4f}"])
    return markdown(["", "first", "last"], rows)


def fig2(given: argparse.Namespace) -> str:
    """Fig. 2: the method."""
    _, world = clip_of(0, given)
    figures.method(figure_path("fig2", given), world, given.root)
    return "drawn: assets/fig2.png"


BLOCKS = {"mean": "mean pooling", "transformer": "temporal transformer", "tdb": "+ TDB",
          "tab": "+ TAB", "both": "+ TDB + TAB"}        # of clip2video.model.VARIANTS
METRICS = ["t2v R@1", "t2v R@5", "t2v MedR", "v2t R@1", "direction recognised, %",
           "order recognised, %"]


def blocks(given: argparse.Namespace) -> str:
    """CLIP2Video: what each of its blocks contributes. Test metrics of every variant and seed."""
    seeds = range(given.seeds or 3)
    rows = []
    for variant, name in BLOCKS.items():
        results = []
        for seed in seeds:
            config = clip2video.model.configure(dataset=world_of("shapes", seed), variant=variant,
                                                seed=seed, root=given.root, device=given.device)
            choices = {name: value for name, value in dataclasses.asdict(config).items()
                       if name not in NOT_A_CHOICE}

            def make() -> dict:
                return {"results": clip2video.train.train(config, resume=config.folder.exists())}

            path = RESULTS / "clip2video" / f"{variant}-{seed}.json"
            if not given.figures and stored_at(path, choices) is None:  # docs trains nothing
                raise Mistake("clip2video is incomplete; run: python -m extras.reproduce "
                              "clip2video")
            results.append(cached(path, choices, make)["results"])
        rows.append([name] + [mean_and_deviation([result[metric] for result in results])
                              for metric in METRICS])
    return f"{markdown([''] + METRICS, rows)}\n\n{len(seeds)} seeds."


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
# "[`mmn.fuse`](../mmn.py#L307)"
LINK = re.compile(r"\[`([\w.]+)`\]\(((?:\.\./)?)([\w/]+\.py)(?:#L\d+)?\)")


def filled(text: str, given: argparse.Namespace) -> str:
    """A document with the tables between its marks. Those with a figure are in docs/."""
    def table(match: re.Match) -> str:
        name = match[1]
        parts = [f"<!-- {name} -->"]
        if name in FIGURES:
            parts.append(f"![{name}](../assets/{name}.png)")
        parts.append(result_of(name, given))
        parts.append(f"`python -m extras.reproduce {name}`")
        return "\n\n".join(parts + ["<!-- end -->"])

    return PLACE.sub(table, text)


def linked(text: str) -> str:
    """Points every [`file.name`](file.py) to the line of that function or class."""
    def link(match: re.Match) -> str:
        path = match[3]
        # parsed, not imported: a link needs the line only
        node = ast.parse((HERE / path).read_text(encoding="utf-8"))
        for name in match[1].split(".")[1:]:            # "mmn.MMN.scores": a class, then its method
            parts = [part for part in node.body if getattr(part, "name", "") == name]
            if not parts:
                raise ValueError(f"a document links to {match[1]}, which does not exist in {path}")
            node = parts[0]
        return f"[`{match[1]}`]({match[2]}{path}#L{node.lineno})"

    return LINK.sub(link, text)


def documents(given: argparse.Namespace) -> dict[pathlib.Path, str]:
    """README.md and docs/*.md with the stored results and links to current lines."""
    texts = {}
    for path in [HERE / "README.md"] + sorted((HERE / "docs").glob("*.md")):
        texts[path] = linked(filled(path.read_text(encoding="utf-8"), given))
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
    add("--seeds", type=int, help="seeds of each row (default: as in the table, mostly three)")
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
    given.figures = "docs" not in given.what            # docs only fills in the tables
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
        # all are made before the first is written
        for path, text in documents(given).items():
            files.save(path, text)
            print(f"wrote {path.relative_to(HERE)}")


def reproduce(given: argparse.Namespace) -> None:
    """Runs what the chosen tables and figures need, and prints them."""
    if given.dataset != "shapes":
        for what in given.what:
            own = what in TABLES and TABLES[what].dataset
            if own or what in ("main", "study", "fig2", "clip2video"):
                raise Mistake(f"{what} has a dataset of its own; omit --dataset")
        if "s-table1" in given.what and not given.svo:
            raise Mistake("s-table1 is about photographs; name the folder of SVO-Probes' table and "
                          "images with --svo (--dataset shapes draws images instead)")
    configs = []
    for what in given.what:
        what = NEEDS.get(what, what)                    # a figure shows another table's runs
        if what in TABLES:
            configs += runnable(what, given)
    if given.jobs is None:
        given.jobs = os.cpu_count() or 1
        if parallel.pick_device(given.device).type != "cpu":
            given.jobs = 1                              # a second run would only wait for the GPU
    run_all(configs, given)
    for what in given.what:
        print(f"\n{what}, {given.dataset}\n\n{result_of(what, given)}")


if __name__ == "__main__":
    main()
