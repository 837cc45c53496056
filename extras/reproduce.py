"""Every table and figure of the paper and its supplement, ours beside the paper's.

    python -m extras.reproduce table1                   # on the shapes world, three seeds
    python -m extras.reproduce table3 --dataset charades --device cuda
    python -m extras.reproduce docs                     # writes the tables into docs/ and README.md

A row of extras/tables.json is a name, a base and what it changes (fields of train.Config), and the
paper's figures; without a base, another method's figures as the paper reports them. It runs once
per seed (shapes: world and training have the same seed) and is kept in
results/<dataset>/<name>.json: configuration, metrics, log, and what each query hits. A kept row is
not run again, except with --fresh. Choices are made on validation splits; tables show test splits.
"""
import support  # first, for a Ctrl-C while torch is imported
import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import time
import types
from typing import NamedTuple

import numpy as np
import torch

import clip
import data
import evaluate
import inject
import mmn
import parse
import shapes
import staged
import train
from clip2video import train as clip2video
from extras import figures, probe, readings, zero_shot
from support import files, options, parallel, results
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
    reported), and the paper's figures by dataset."""
    name: str
    fields: dict | None
    paper: dict[str, list[float]] = {}


class Table(NamedTuple):
    """columns: "split metric"; differences: pairs of rows; original: of the original split;
    baselines: with rows for what needs no training; worlds: kinds of shapes world (as in dataset
    names), each with all rows."""
    rows: list[Row]
    columns: list[str]
    differences: list = []
    seeds: int = 3
    original: bool = False
    baselines: bool = False
    worlds: list[str] = []


def read_tables() -> dict[str, Table]:
    content = json.loads(pathlib.Path(__file__).with_name("tables.json").read_text())
    tables = {}
    for name, table in content["tables"].items():
        rows, common, worlds = [], table.pop("common", {}), table.get("worlds", [""])
        for world, (row, base, changes, *paper) in itertools.product(worlds, table.pop("rows")):
            if world:
                row, changes = f"{world}: {row}", changes | {"world": world}
            paper = paper[0] if paper else {}
            if isinstance(paper, list):                 # of Charades; on shapes for orientation
                paper = {"charades": paper}
            if "charades" in paper:
                paper = {"shapes": paper["charades"], **paper}
            fields = content["bases"][base] | common | changes if base else None
            rows.append(Row(row, fields, paper))
        step = len(rows) // len(worlds)
        table["differences"] = [[a + k * step, b + k * step] for k in range(len(worlds))
                                for a, b in table.get("differences", [])]
        tables[name] = Table(rows, **table)
    return tables


TABLES = read_tables()
MAIN = TABLES["table1"].rows


# ------------------------------------------------------------------------------------------ running

def world_of(dataset: str, seed: int) -> str:
    """The dataset of a seed: every seed has a shapes world of its own, with its own small CLIP."""
    return f"shapes-{seed}" if dataset == "shapes" and seed else dataset


def dataset_of(what: str, given: argparse.Namespace) -> str:
    """The dataset of a table. On a real one, most tables are about its compositional splits, which
    have a training split of their own."""
    original = given.dataset == "shapes" or what in TABLES and TABLES[what].original
    return given.dataset + ("" if original else "-cg")


def config_of(row: Row, dataset: str, seed: int, given: argparse.Namespace) -> train.Config | None:
    """The configuration of a row; None if it cannot be run on this dataset."""
    family, world = dataset.removesuffix("-cg"), world_of(dataset, seed)
    if row.fields is None or row.fields.get("clip") == "separate" and family not in SEPARATE:
        return None
    if "world" in row.fields and family != "shapes":
        return None
    fields = dict(row.fields, seed=seed, device=given.device, root=given.root)
    kind = fields.pop("world", "plain")                 # see shapes.World
    world = fields["dataset"] = world if kind == "plain" else f"{world}-{kind}"
    fields["select_on"] = select_on(dataset, given)
    if fields.get("clip") == "resnet":                  # the published one, or the world's own
        fields["clip"] = f"{world}-resnet" if dataset == "shapes" else "RN50"
    if fields.get("clip") == "separate":
        fields |= {"clip": SEPARATE[family], "text_clip": BERT}
    if fields.get("text_clip") == "other":              # of another CLIP of the same width
        other = world_of("shapes", (seed + 1) % 3)
        fields["text_clip"] = other if dataset == "shapes" else "ViT-B/16"
    reading = tuple(fields.pop("reading", ()))
    config = train.configure(**fields | getattr(given, "fields", {}))
    if reading:
        config = readings.Config(**vars(config), reading=reading)
    return dataclasses.replace(config, out=f"runs/reproduce/{dataset}/{name_of(config)}")


def select_on(dataset: str, given: argparse.Namespace) -> str:
    """The split that selects the epoch; with --select-on-test that of the field's protocol."""
    if not given.select_on_test:
        return "val"
    return "novel-word" if dataset.endswith("-cg") else "test"


@functools.cache
def parser_name(dataset: str, model: str) -> str:
    """The parser of a dataset's sentences, with its version."""
    if dataset.startswith("shapes") and not model:
        return parse.BY_CONSTRUCTION
    return parse.Parser(model or None).name


def choices_of(config: train.Config) -> dict:
    fields = json.loads(json.dumps(dataclasses.asdict(config)))         # with lists for tuples
    fields["parser"] = parser_name(config.dataset, config.parser)
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
    family = "shapes" if config.dataset.startswith("shapes") else config.dataset
    return RESULTS / family / f"{name_of(config)}.json"


def kept(config: train.Config) -> dict | None:
    return results.kept(file_of(config), choices_of(config))


def run(config: train.Config, fresh: bool = False) -> dict:
    """Trains and evaluates one configuration, or reads its kept result."""
    def make() -> dict:
        folder = config.folder
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "results.json").exists():
            with readings.applied(config), readings.tracked():
                train.train(config, resume=folder.exists())
        metrics = json.loads((folder / "results.json").read_text())
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        splits = [split for split in FINAL if split in metrics]
        device = parallel.pick_device(config.device)
        checkpoint = evaluate.load(folder / "ckpt.pt", device)
        if "val" not in metrics and config.select_on == "val":
            metrics |= evaluate.evaluate(checkpoint, ["val"], device=device, allow_missing=True)
        return {"results": metrics, "coverage": coverage(config),
                "hits": {query: hits(checkpoint, config, splits, query)
                         for query in evaluate.QUERIES},
                "log": [{name: float(f"{value:.4g}") for name, value in row.items()}
                        for row in log],
                "clip_sha256": checkpoint.checkpoint["clip_sha256"]}

    return results.cached(file_of(config), choices_of(config), make, fresh)


def hits(checkpoint: evaluate.Run, config: train.Config, splits: list[str],
         query: str = "full") -> dict[str, str]:
    """Split -> a digit per sentence: how many of the two HITS its first moment reaches."""
    device, digits = parallel.pick_device(config.device), {}
    for split, videos, predicted in evaluate.answers(checkpoint, splits, query, config.root, device,
                                                     True, top_k=1):
        iou = mmn.interval_iou(predicted[:, 0, :2], videos.moments_sec)
        digits[split] = "".join(str(sum(v >= mu for mu in HITS)) for v in iou.tolist())
    return digits


def run_quietly(config: train.Config, fresh: bool, threads: int) -> str:
    """`run` in a process of its own; its output goes to <name>.txt beside the run's folder."""
    torch.set_num_threads(threads)
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(config.folder.with_suffix(".txt"), "w") as file, \
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
    if TABLES[what].worlds and given.dataset != "shapes":
        raise Mistake(f"{what} compares shapes worlds; leave out --dataset")
    if given.dataset == "shapes":
        return
    can_be_shown = False
    for row, config in zip(TABLES[what].rows, configs_of(what, 0, given)):
        if config is None:
            continue
        try:
            counts = (kept(config) or {}).get("coverage") or coverage(config)
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
    """Runs what has not been kept, --jobs at a time: two cores do best with two of one thread."""
    missing = {name_of(c): c for c in configs if given.fresh or kept(c) is None}
    for config in missing.values():
        shapes.build_for(config)
    threads, started = max(1, torch.get_num_threads() // given.jobs), time.time()

    def progress(names) -> None:
        for i, name in enumerate(names, 1):
            print(f"{i} of {len(missing)}: {name}, {(time.time() - started) / 60:.1f} min",
                  file=sys.stderr, flush=True)

    if given.jobs == 1:
        progress(run_quietly(config, given.fresh, threads) for config in missing.values())
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(given.jobs, spawn) as pool:
        runs = [pool.submit(run_quietly, c, given.fresh, threads) for c in missing.values()]
        progress(future.result() for future in concurrent.futures.as_completed(runs))


def per_seed(what: str, given: argparse.Namespace, make) -> list[dict]:
    """The results of `make(seed)` for each seed, kept in results/<dataset>/<what>-<seed>.json."""
    rows = []
    for seed in seeds_of(what, given):
        path = RESULTS / given.dataset / f"{what}-{seed}.json"
        config = {"dataset": given.dataset, "seed": seed}
        content = results.cached(path, config, lambda: {"results": make(seed)}, given.fresh)
        rows.append(content["results"])
    return rows


# ---------------------------------------------------------------------------------- tables of runs

def seeds_of(what: str, given: argparse.Namespace) -> range:
    """The seeds of a table: --seeds, else five for `gain` and three for the others."""
    return range(given.seeds or (TABLES[what].seeds if what in TABLES else 3))


def configs_of(what: str, seed: int, given: argparse.Namespace) -> list[train.Config | None]:
    """The configurations of the rows of a table."""
    dataset = dataset_of(what, given)
    return [config_of(row, dataset, seed, given) for row in TABLES[what].rows]


def seeds_kept(what: str, given: argparse.Namespace) -> int:
    """For how many seeds, from 0 on, every row of a table is kept."""
    for seed in seeds_of(what, given):
        if any(config and kept(config) is None for config in configs_of(what, seed, given)):
            return seed
    return len(seeds_of(what, given))


def collect(what: str, given: argparse.Namespace) -> list[list[dict]]:
    """The kept results of a table: row -> seed -> result; no seeds for a row that was not run."""
    seeds = [[kept(config) if config else None for config in configs_of(what, seed, given)]
             for seed in seeds_of(what, given)]
    return [list(filter(None, row)) for row in zip(*seeds)]


def columns_of(what: str, given: argparse.Namespace) -> list[tuple[str, str]]:
    """(split, metric) of the columns that a dataset has. "test" is what the compositional datasets
    call trivial; accuracies need to know all events, as the shapes world does."""
    dataset, columns = dataset_of(what, given), []
    for split, metric in (column.split(" ", 1) for column in TABLES[what].columns):
        if dataset.endswith("-cg") and split == "test":
            split = "trivial"
        real = dataset == "shapes" or "accuracy" not in metric and split in (
            "val", *data.FILES[dataset])
        if real:
            columns.append((split, metric))
    return columns


def value_of(run: dict, split: str, metric: str) -> float | None:
    """A metric of a split; of the "log" the last value, None if it has none."""
    if split != "log":
        return run["results"][split][metric]
    return next((100 * line[metric] for line in reversed(run["log"]) if metric in line), None)


def hits_of(run: dict, split: str, query: str = "full") -> np.ndarray:
    """Has the first moment of each sentence IoU >= 0.5 with the true one? 1.0 or 0.0, [S]."""
    return np.array([float(int(digit) >= 1) for digit in run["hits"][query][split]])


def paired(ours: list[dict], theirs: list[dict],
           split: str) -> tuple[float, float, float, list[float]]:
    """R@1, IoU=0.5 of one row minus that of another, in points: mean over seeds, its 95% interval,
    and the difference of each seed."""
    differences = [100 * (hits_of(a, split) - hits_of(b, split)) for a, b in zip(ours, theirs)]
    means = [float(d.mean()) for d in differences]
    return float(np.mean(means)), *interval(differences), means


def margin_of(seeds: list[float]) -> float:
    """Half of the 95% interval of the mean over five worlds, by Student's t."""
    assert len(seeds) == 5
    return 2.776 * np.std(seeds, ddof=1) / 5 ** 0.5


def interval(differences: list[np.ndarray], draws: int = 2000) -> tuple[float, float]:
    """95% interval of the mean over seeds, by a bootstrap over the sentences, drawn with
    replacement within each seed. differences: of each sentence, an array per seed."""
    rng = np.random.default_rng(0)
    drawn = np.mean([d[rng.integers(len(d), size=(draws, len(d)))].mean(1) for d in differences], 0)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return low, high


def clip_alone_of(what: str, given: argparse.Namespace) -> list[dict]:
    """The metrics of CLIP alone on the dataset of a table, for each seed: query -> split ->
    metrics, among them those of a random and of the best fixed moment."""
    dataset, device = dataset_of(what, given), parallel.pick_device(given.device)

    def make(seed: int) -> dict:
        world = world_of(dataset, seed)
        shapes.build_for(train.configure(dataset=world, root=given.root))
        name = world if dataset == "shapes" else train.Config.clip
        run = zero_shot.run_of(world, name, given.root, device)
        return {query: evaluate.evaluate(run, query=query, device=device, allow_missing=True)
                for query in evaluate.QUERIES}

    return per_seed("zero-shot-cg" if dataset.endswith("-cg") else "zero-shot", given, make)


def baseline_rows(what: str, columns: list[tuple[str, str]], runs: list[dict],
                  given: argparse.Namespace) -> list[list[str]]:
    """The rows of a table that need no training. runs: a trained row's, with both baselines."""
    trained, rows = [run["results"] for run in runs], []
    alone = [content["full"] for content in clip_alone_of(what, given)]
    for name, seeds, kind in (("a random moment", trained, "random moment"),
                              ("the best fixed moment", trained, "best prior"),
                              ("CLIP alone, no training", alone, None)):
        rows.append([name])
        for split, metric in columns:
            values = [metrics[split][kind] if kind else metrics[split] for metrics in seeds]
            known = all(metric in each for each in values)
            rows[-1].append(mean_and_deviation([each[metric] for each in values]) if known else "")
    return rows


def clip_alone(given: argparse.Namespace) -> str:
    """CLIP without any training: it finds actors and is blind to their motions."""
    seeds = [content["full"] for content in clip_alone_of("table1", given)]
    metrics, rows = ["R@1,IoU=0.5", "R@1,IoU=0.7", "R@5,IoU=0.5", "mIoU"], []
    if given.dataset == "shapes":
        metrics += ["noun accuracy", "verb accuracy"]
    for split in filter(seeds[0].get, FINAL):
        cells = [[content[split][metric] for content in seeds] for metric in metrics]
        queries = np.mean([content[split]["queries"] for content in seeds])
        missing = seeds[0][split].get("queries missing", 0)             # on a real dataset
        rows.append([split, *map(mean_and_deviation, cells),
                     f"{queries:.0f}" + (f" ({missing} missing)" if missing else "")])
    heads = [metric.replace(",IoU=", " ") for metric in metrics]
    return markdown(["", *heads, "sentences per seed"], rows)


PAPER = {"shapes": ("Charades-STA", "Charades-CG novel-word"),
         "charades": ("Charades-STA", "Charades-CG novel-word"),
         "activitynet": ("ActivityNet-Captions", "ActivityNet-CG novel-word")}


def table_text(what: str, given: argparse.Namespace) -> str:
    """A table as Markdown: mean ± deviation over seeds, the paper's, paired differences."""
    table, runs = TABLES[what], collect(what, given)
    if what == "curve" and given.figures:
        figures.curve(figure_path("curve", given), runs)
    if what == "context" and given.figures and len(runs[0]) == 5:
        figures.context(figure_path("context", given), gains(table, runs))
    columns = columns_of(what, given)
    heads = [f"{split} {metric.replace(',IoU=', ' ')}".replace("log kept", "% kept")
             for split, metric in columns]
    family = given.dataset
    papers = [row.paper.get(family) for row in table.rows]
    if any(papers):
        heads.append(f"paper, {PAPER[family][not table.original]}")
    first = next(seeds for seeds in runs if seeds)
    lines = baseline_rows(what, columns, first, given) if table.baselines else []
    if any(papers):
        lines = [[*line, ""] for line in lines]
    for row, seeds, paper in zip(table.rows, runs, papers):
        if not seeds and (family == "shapes" or not paper):
            continue                                    # on shapes nothing is only reported
        name = row.name if seeds else f"{row.name} (reported" + (
            "; not run here)" if row.fields else ")")
        line = [label(name, family)]
        for split, metric in columns:
            values = [value_of(run, split, metric) for run in seeds]
            line.append(mean_and_deviation(values) if values and None not in values else "")
        if any(papers):
            line.append(" / ".join(f"{value:.2f}" for value in paper or ()))
        lines.append(line)
    minutes = sum(run["minutes"] for seeds in runs for run in seeds)
    text = [markdown(["", *heads], lines), "",
            f"{len(first)} seeds; {sizes(first, columns)}; {minutes:.0f} minutes of runs."]
    if given.select_on_test:
        text[-1] += (f" Trained on all training videos; the epoch is chosen on "
                     f"{select_on(dataset_of(what, given), given)}, a test split.")
    elif family != "shapes":
        text[-1] += (" The epoch is chosen on validation videos. Text rates and stage 1 are those "
                     "chosen on the shapes world, not tuned here.")
    for a, b in table.differences:
        if not (runs[a] and runs[b]):
            continue
        parts = []
        for split in filter(first[0]["results"].get, FINAL):
            mean, low, high, seeds = paired(runs[a], runs[b], split)
            each = ", ".join(f"{seed:+.1f}" for seed in seeds)
            if len(seeds) == 5:                     # a world is one draw, too
                margin = margin_of(seeds)
                each += f"; over worlds [{mean - margin:+.1f}, {mean + margin:+.1f}]"
            parts.append(f"{split} {mean:+.1f} [{low:+.1f}, {high:+.1f}] ({each})")
        ours, theirs = (label(table.rows[k].name, family) for k in (a, b))
        theirs = theirs.removeprefix(f"{ours.split(': ')[0]}: ")        # not the same twice
        text.append(f"- {ours} minus {theirs}: " + "; ".join(parts))
    return "\n".join(text)


def gains(table: Table, runs: list[list[dict]], split: str = "novel-word") -> dict[str, dict]:
    """Pair of rows -> kind of world -> mean difference in R@1, IoU=0.5, and half its interval."""
    content, step = {}, len(table.differences) // len(table.worlds)
    for i, (a, b) in enumerate(table.differences):
        kind = table.worlds[i // step]
        names = [table.rows[k].name.removeprefix(f"{kind}: ").strip("*").replace("`", "")
                 for k in (a, b)]
        mean, _, _, seeds = paired(runs[a], runs[b], split)
        content.setdefault(" minus ".join(names), {})[kind] = mean, margin_of(seeds)
    return content


def label(name: str, dataset: str) -> str:
    """What was tuned on the shapes world's validation split was not tuned on a real dataset."""
    return name if dataset == "shapes" else re.sub("tuned( on validation)?", "text rate 1", name)


def sizes(runs: list[dict], columns: list[tuple[str, str]]) -> str:
    """How many sentences each split has; on a real dataset also videos, and how many are missing.
    """
    parts = []
    for split in dict.fromkeys(split for split, _ in columns if split != "log"):
        queries = np.mean([run["results"][split]["queries"] for run in runs])
        parts.append(f"{split} {queries:.0f}")
        counts = runs[0].get("coverage", {}).get(split)
        if counts and not runs[0]["config"]["dataset"].startswith("shapes"):
            lost = f"{counts[3]} sentences of {counts[2]} videos missing" if counts[2] else "all"
            parts[-1] += f" of {counts[0]} videos ({lost})"
    return "sentences per seed: " + ", ".join(parts)


# ------------------------------------------------------------------------------------ other results

def figure_path(name: str, given: argparse.Namespace) -> pathlib.Path:
    folder = files.ASSETS if given.dataset == "shapes" else RESULTS / given.dataset
    return folder / f"{name}.png"


def clip_of(seed: int, given: argparse.Namespace) -> tuple[clip.CLIP, str]:
    """The CLIP of a seed's shapes world; on a real dataset the published one. And the dataset."""
    world, name = world_of(given.dataset, seed), train.Config.clip
    if given.dataset == "shapes":
        shapes.build(world, given.root)
        name = world
    return clip.load(data.clip_file(name, given.root), parallel.pick_device(given.device)), world


def s_table1(given: argparse.Namespace) -> str:
    """Supplement, Table 1: CLIP's scores by what is wrong in the wrong image."""
    def make(seed: int) -> dict:
        if given.svo:
            triplets = probe.svo_triplets(given.svo, given.images)
        else:
            triplets = {kind: probe.shape_triplets(kind, 1000, seed) for kind in probe.KINDS}
        model, _ = clip_of(seed, given)
        return {kind: probe.triplet_scores(model, part) for kind, part in triplets.items() if part}

    seeds = per_seed("s-table1-svo" if given.svo else "s-table1", given, make)
    paper = {"right": ("0.79", "0.82", "0.76", "0.86"), "wrong": ("0.21", "0.18", "0.24", "0.14"),
             "difference": ("0.59", "0.64", "0.52", "0.72"), "right ahead": ("", "", "", "")}
    kinds, rows = ("overall", *probe.KINDS), []
    for name, theirs in paper.items():
        row = [name.replace("ahead", "ahead, %")]
        for kind in kinds:
            values = []
            for content in seeds:
                parts = [part for k, part in content.items() if kind in (k, "overall")]
                if parts:
                    counts = [part["triplets"] for part in parts]
                    values.append(np.average([part[name] for part in parts], weights=counts))
            row.append(f"{np.mean(values):.2f}" if values else "no images")
        rows.append([*row, *theirs])
    return markdown(["score", *kinds, *(f"paper, {kind}" for kind in kinds)], rows)


def s_fig1(given: argparse.Namespace) -> str:
    """Supplement, Fig. 1: what the end token attends to in the last layer, by part of speech."""
    def make(seed: int) -> dict:
        model, world = clip_of(seed, given)
        sentences = sorted({s.sentence for s in data.read_annotations(world, "train", given.root)})
        words_of = (probe.shapes_words if given.dataset == "shapes"
                    else probe.spacy_words(parse.load(None)))
        weights = probe.word_weights(model, sentences, words_of)
        return {kind: {"mean": float(np.mean(values)), "words": len(values),
                       "histogram": np.histogram(np.clip(values, 0, 3), 30, (0, 3))[0].tolist()}
                for kind, values in weights.items() if values}

    seeds, kinds = per_seed("s-fig1", given, make), ("noun", "verb", "other")
    if given.figures:
        figures.weights(figure_path("s-fig1", given), {
            kind: np.sum([content[kind]["histogram"] for content in seeds], 0) for kind in kinds})
    rows = [[str(seed), *(f"{content[kind]['mean']:.2f}" for kind in kinds)]
            for seed, content in enumerate(seeds)]
    return markdown(["world", *kinds], rows)


def probes(given: argparse.Namespace) -> str:
    """What Eq. 3-5 contain: linear probes of the verb."""
    seeds = per_seed("probes", given, lambda seed: probe.verb_probes(
        clip_of(seed, given)[1], given.root))
    rows = [[name, mean_and_deviation([content[name] for content in seeds])] for name in seeds[0]]
    return markdown(["the verb is read off", "accuracy, %"], rows + [["(chance)", "14.3"]])


def between(given: argparse.Namespace) -> str:
    """How much of each target tells verbs apart, also where verbs have typical backgrounds."""
    def make(seed: int, kind: str) -> dict:
        world = world_of("shapes", seed) + kind
        shapes.build(world, given.root)
        return probe.between_verbs(world, given.root, seed)

    kinds = ("", "-context-0.9")
    worlds = [per_seed(f"between{kind}", given, functools.partial(make, kind=kind))
              for kind in kinds]
    rows = [[name, *(mean_and_deviation([content[name] for content in seeds]) for seeds in worlds)]
            for name in worlds[0][0]]
    return markdown(["target", *(f"variance between verbs, %{', ' if kind else ''}{kind[1:]}"
                                 for kind in kinds)], rows)


def verbs(given: argparse.Namespace) -> str:
    """What stage 1 does to the verbs, and what stage 2 leaves of it: cosines between the 14 verbs
    for two targets, beside the tuned MMN of `context`."""
    def make(seed: int) -> dict:
        towers, device = {}, parallel.pick_device(given.device)
        rows = {row.name.removeprefix("plain: "): row for row in TABLES["context"].rows}
        for name, row in {"MMN": "MMN, tuned on validation", "the change": "**`vdi-staged`**",
                          "random codes": "control: random codes, no video"}.items():
            config = config_of(rows[row], "shapes", seed, given)
            path = config.folder / "ckpt.pt"
            if not path.exists():
                raise Mistake(f"there is no {path}; make it with: python -m extras.reproduce "
                              f"context --fresh")
            store = data.open_store(config.dataset, config.clip, given.root, config.frames)
            text = train.start(config, store.manifest, device)[0].text
            if name == "MMN":
                towers |= {"CLIP": text, "MMN, trained": evaluate.load(path, device).text}
                continue
            videos, _ = data.training_videos(config, store, text.tokenize)
            quiet = types.SimpleNamespace(is_first=False, stop_if_asked=lambda *_, **__: None)
            staged.adapt_text_tower(text, videos["train"], config, device, quiet)
            towers |= {f"{name}, after stage 1": text,
                       f"{name}, after stage 2": evaluate.load(path, device).text}
        return {name: [[round(x, 4) for x in row] for row in probe.verb_cosines(
            text, config.dataset, given.root).tolist()] for name, text in towers.items()}

    seeds = per_seed("verbs", given, make)
    if given.figures:
        figures.verbs(figure_path("verbs", given), seeds[0])
    motion = np.arange(14) // 2                         # two words each
    kinds = {"same motion": motion[:, None] == motion,
             "opposite motion": (motion[:, None] ^ 1 == motion) & (motion < 6),
             "other": (motion[:, None] // 2 != motion // 2)}
    lines = []
    for name in seeds[0]:
        x = [np.where(np.eye(14), np.nan, content[name]) for content in seeds]
        nearest = [float((motion[np.nanargmax(each, 1)] == motion).sum()) for each in x]
        lines.append([name, *(mean_and_deviation([np.nanmean(each[pairs]) for each in x], 2)
                              for pairs in kinds.values()), mean_and_deviation(nearest)])
    return markdown(["", *(f"cosine, {kind}" for kind in kinds),
                     "nearest verb has the same motion, of 14"], lines)


def trained_heat(seed: int, given: argparse.Namespace) -> inject.SpatialDynamic:
    """SpatialDynamic as trained in the seed's `vdi` of Table 1."""
    config = config_of(MAIN[2], "shapes", seed, given)
    path = config.folder / "last.pt"
    if not path.exists():
        raise Mistake(f"there is no {path}; make it with: python -m extras.reproduce table1 "
                      f"--fresh")
    store = data.open_store(config.dataset, config.clip, given.root)
    model, _ = train.start(config, store.manifest, torch.device("cpu"))
    model.load_state_dict(files.read_tensors(path)["model"])
    return model.dynamic.eval()


@torch.no_grad()
def heat(given: argparse.Namespace) -> str:
    """Eq. 3 as a picture, and how much warmer objects are than their surroundings."""
    def make(seed: int) -> dict:
        world, trained = clip_of(seed, given)[1], trained_heat(seed, given)
        return {"before training": probe.heat_contrast(world, given.root),
                "after training `vdi`": probe.heat_contrast(world, given.root, trained)}

    seeds = per_seed("heat", given, make)
    if given.figures:
        model, world = clip_of(0, given)
        if given.video:
            name, pictures = "heat-of-a-video", figures.features_of(given.video, model)
        else:
            _, x, patches = next(probe.moments_of(world, given.root, 1))
            film = shapes.film(shapes.plan_of(0, "train", 0))
            name, pictures = "heat", (film, x, patches)
        figures.heat(figure_path(name, given), *pictures, trained_heat(0, given))
    names = ("contrast", "warmest on the actor", "random patch on the actor")
    rows = []
    for stage in seeds[0]:
        cells = [[content[stage][name] for content in seeds] for name in names]
        rows.append([stage, *(mean_and_deviation(values, 2) for values in cells)])
    return markdown(["FC of Eq. 3", "contrast (standard deviations)",
                     "warmest patch on the actor, %", "random patch, %"], rows)


def fig3(given: argparse.Namespace) -> str:
    """Fig. 3: retrieval by the whole sentence, by its static and by its dynamic half."""
    chosen, runs = (0, 1, 2, 4), collect("table1", given)
    chosen = [k for k in chosen if runs[k]]
    rates = {split: {} for split in FINAL[:3] if split in runs[0][0]["results"]}
    alone, name, rows = clip_alone_of("table1", given), "CLIP alone", [["CLIP alone"]]
    for split, methods in rates.items():
        methods[name] = [[content[query][split]["R@1,IoU=0.5"] for content in alone]
                         for query in evaluate.QUERIES]
        rows[0] += map(mean_and_deviation, methods[name])
    for k in chosen:
        rows.append([MAIN[k].name])
        for split, methods in rates.items():
            methods[MAIN[k].name] = [[100 * hits_of(run, split, query).mean() for run in runs[k]]
                                     for query in evaluate.QUERIES]
            rows[-1] += map(mean_and_deviation, methods[MAIN[k].name])
    if given.figures:
        figures.queries(figure_path("fig3", given), rates)
    heads = [f"{split}, {name}" for split in rates for name in ("Q", "Q^s", "Q^d")]
    return f"{markdown(['', *heads], rows)}\n\n{sizes(runs[chosen[0]], [*rates.items()])}."


def collapse(given: argparse.Namespace) -> str:
    """What becomes of both sides of Eq. 2 and Eq. 5, and of the verbs, in training."""
    runs = collect("table1", given)

    def log_of(k: int, kind: str) -> list[list[dict]]:
        return [[line for line in run["log"] if kind in line] for run in runs[k]]

    logs = {"mmn": log_of(0, "epoch"), "vdi": log_of(2, "epoch"), "vdi-staged": log_of(4, "epoch")}
    names = ("var FC(x^qd), Eq. 2", "var x~^qs", "var FC(x^qd), Eq. 5", "var m~")
    if given.figures:
        figures.collapse(figure_path("collapse", given), names, logs)
    parts = {"`vdi`": (logs["vdi"], (*names, "L_vc", "L_sd", "cos x^qd")),
             "`vdi-staged`, stage 1": (log_of(4, "stage"), ("var x^qd", "cos x^qd")),
             "`vdi-staged`, stage 2": (logs["vdi-staged"], ("cos x^qd",))}
    rows = []
    for title, (seeds, shown) in parts.items():
        for name in shown:
            first, last = (np.mean([log[k][name] for log in seeds]) for k in (0, -1))
            rows.append([f"{title}: {name}", f"{first:.4f}", f"{last:.4f}"])
    return markdown(["", "first", "last"], rows)


def readings_logs(given: argparse.Namespace) -> str:
    """What becomes of both sides of Eq. 2, and of the verbs, under other readings."""
    names, rows = ("L_vc", "var x~^qs", "cos x^qd"), []
    for row, runs in zip(TABLES["readings"].rows, collect("readings", given)):
        rows.append([row.name])
        for name in names:
            first, last = ([run["log"][k].get(name) for run in runs] for k in (0, -1))
            rows[-1].append("" if None in first else f"{np.mean(first):.3g} to {np.mean(last):.3g}")
    return markdown(["", *(f"{name}, epoch 1 to 30" for name in names)], rows)


def fig2(given: argparse.Namespace) -> str:
    """Fig. 2: the method."""
    _, world = clip_of(0, given)
    figures.method(figure_path("fig2", given), world, given.root)
    return "drawn: assets/fig2.png"


def blocks(given: argparse.Namespace) -> str:
    """CLIP2Video: what each of its blocks contributes."""
    return clip2video.ablation_table(clip2video.ablation(
        len(seeds_of("clip2video", given)), given.root, given.device,
        only_kept=not given.figures))


OTHERS = {"fig2": fig2, "fig3": fig3, "zero-shot": clip_alone, "s-table1": s_table1,
          "s-fig1": s_fig1, "collapse": collapse, "readings-logs": readings_logs, "probes": probes,
          "between": between, "verbs": verbs, "heat": heat, "clip2video": blocks}
FIGURES = ("fig3", "s-fig1", "collapse", "heat", "curve", "context", "verbs")  # assets/<name>.png
NEEDS = {"fig3": "table1", "collapse": "table1", "heat": "table1",      # whose runs they show
         "readings-logs": "readings", "verbs": "context"}


def result_of(what: str, given: argparse.Namespace) -> str:
    return table_text(what, given) if what in TABLES else OTHERS[what](given)


# ------------------------------------------------------------------------------------ into the docs

TEMPLATE = RESULTS / "text.md"                  # docs/results.md without its tables
MARKS = ("<!-- results: python -m extras.reproduce docs -->", "<!-- end of the results -->")


def filled(text: str, given: argparse.Namespace) -> str:
    """Each line "{{name}}" replaced by that table, over the seeds that were run."""
    def table(match: re.Match) -> str:
        name, seeds = match[1], given.seeds
        command = f"`python -m extras.reproduce {name}`"
        if name in TABLES:
            seeds = seeds_kept(name, given)
            if not seeds:
                return f"Not run yet: {command}"
        figure = f"![{name}](../assets/{name}.png)\n\n" if name in FIGURES else ""
        text = result_of(name, argparse.Namespace(**vars(given) | {"seeds": seeds}))
        return f"{figure}{text}\n\n{command}"

    return re.sub(r"^{{(.*)}}$", table, text, flags=re.M)


def linked(text: str, up: str = "") -> str:
    """Points every [`file.name`](file.py) to the line of that function or class. up: the way from
    the document to the top folder."""
    def link(match: re.Match) -> str:
        path, names = match[2], match[1].split(".")[1:]
        node = ast.parse((HERE / path).read_text())
        for name in names:
            node = next((part for part in node.body if getattr(part, "name", "") == name), None)
            if node is None:
                raise ValueError(f"a document links to {match[1]}, which does not exist in {path}")
        return f"[`{match[1]}`]({up}{path}#L{node.lineno})"

    return re.sub(r"\[`([\w.]+)`\]\((?:\.\./)?([\w/]+\.py)(?:#L\d+)?\)", link, text)


def documents(given: argparse.Namespace) -> dict[pathlib.Path, str]:
    """README.md and docs/*.md with the kept results and links to current lines."""
    before, rest = (HERE / "README.md").read_text().split(MARKS[0])
    _, after = rest.split(MARKS[1])
    table = filled("{{main}}", given)
    texts = {HERE / "docs" / "results.md": filled(TEMPLATE.read_text(), given),
             HERE / "README.md": f"{before}{MARKS[0]}\n\n{table}\n\n{MARKS[1]}{after}"}
    for path in sorted((HERE / "docs").glob("*.md")):
        texts.setdefault(path, path.read_text())
    return {path: linked(text, "" if path.parent == HERE else "../")
            for path, text in texts.items()}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    arguments = options.parser("the paper's tables and figures, ours beside the paper's",
                               prog="python -m extras.reproduce")
    add = arguments.add_argument
    add("what", nargs="+", choices=[*TABLES, *OTHERS, "docs"], metavar="what",
        help=f"{', '.join((*TABLES, *OTHERS))}; or docs: write the kept results into docs/ and "
             f"README.md")
    add("--dataset", default="shapes", choices=("shapes", "charades", "activitynet"), help="which")
    add("--seeds", type=int, help="seeds of each row (default: three; of gain five)")
    add("--device", **options.DEVICE)
    add("--root", default="data", help="folder of datasets")
    add("--jobs", type=int, help="runs at a time (default: the number of cores; 1 on a GPU)")
    add("--select-on-test", action="store_true",
        help="common practice: train on all training videos, choose the epoch on a test split")
    add("--allow-missing", action="store_true",
        help="run although videos have no features; the tables say how many")
    add("--fresh", action="store_true", help="run again what was kept (but not clip2video)")
    add("--svo", help="s-table1 on SVO-Probes: its svo_probes.csv, with --images")
    add("--images", help="folder of its images, named by their ids")
    add("--video", help="heat: draw it for this video instead of the shapes world")
    given = arguments.parse_args(argv)
    given.figures = "docs" not in given.what
    return given


def main() -> None:
    given = parse_arguments()
    with reported():
        if any(number is not None and number < 1 for number in (given.jobs, given.seeds)):
            raise Mistake("--jobs and --seeds must be at least 1")
        if "docs" in given.what:
            if len(given.what) > 1:
                raise Mistake("docs cannot be combined with tables; run it alone")
            for path, text in documents(given).items():
                files.save(path, text)
                print(f"wrote {path.relative_to(HERE)}")
            return
        reproduce(given)


def reproduce(given: argparse.Namespace) -> None:
    if bool(given.svo) != bool(given.images):
        raise Mistake("--svo and --images must be given together: the table, and its images")
    shapes_only = {"fig2", "probes", "between", "verbs", "heat", "clip2video"} & set(given.what)
    if given.dataset != "shapes" and shapes_only:
        raise Mistake(f"{', '.join(sorted(shapes_only))}: available for the shapes world only")
    if given.dataset != "shapes" and "s-table1" in given.what and not given.svo:
        raise Mistake("s-table1 is about photographs; name SVO-Probes' table with --svo and its "
                      "images with --images (--dataset shapes draws images instead)")
    tables = [name for name in (NEEDS.get(what, what) for what in given.what) if name in TABLES]
    for what in tables:
        check(what, given)
    configs = [config for what in tables for seed in seeds_of(what, given)
               for config in configs_of(what, seed, given) if config and can_run(config)]
    if given.jobs is None:
        on_gpu = parallel.pick_device(given.device).type != "cpu"
        given.jobs = 1 if on_gpu else os.cpu_count() or 1
    run_all(list(dict.fromkeys(configs)), given)
    for what in given.what:
        print(f"\n{what}, {given.dataset}\n\n{result_of(what, given)}")


if __name__ == "__main__":
    main()
