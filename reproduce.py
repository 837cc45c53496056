"""Every table and figure of the paper and its supplement, ours beside the paper's.

    python reproduce.py table1                          # on the shapes world, three seeds
    python reproduce.py table3 --dataset charades --device cuda
    python reproduce.py readme                          # puts the tables into README.md

A row is a set of fields of train.Config. Each row is run once per seed (shapes: world and training
have the same seed) and kept in results/<dataset>/<name>.json: configuration, metrics, log, and what
each query hits; a row that is there is not run again, unless --fresh is given. Choices are made on
validation splits; what is printed are test splits.
"""
import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import sys
import time

import numpy as np
import torch

import clip
import clip2video
import command
import data
import evaluate
import inject
import mmn
import parse
import probe
import shapes
import train
import video
from evaluate import markdown, mean_and_deviation

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
FINAL = ("test", "novel-word", "novel-composition")             # what a table shows
NOT_A_CHOICE = ("device", "root", "out", "workers")             # of Config: where, not what
HITS = (0.5, 0.7)


# ------------------------------------------------------------------------------------------ running

@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: its name, the fields of Config that make it, the paper's figures."""
    name: str
    fields: dict
    paper: tuple = ()


def world_of(dataset: str, seed: int) -> str:
    """The dataset of a seed: every seed has a shapes world of its own, with its own small CLIP."""
    return f"shapes-{seed}" if dataset == "shapes" and seed else dataset


def config_of(row: Row, dataset: str, seed: int, options: argparse.Namespace,
              what: str = "") -> train.Config:
    """The configuration of a row of table `what`. Of a real dataset most tables are about its
    compositional splits, which have a training split of their own."""
    if dataset != "shapes" and what not in ORIGINAL:
        dataset += "-cg"
    world = world_of(dataset, seed)
    fields = {**row.fields, "dataset": world, "seed": seed, "device": options.device,
              "root": options.root}
    if fields.get("clip") == "resnet":                  # the published one, or the world's own
        fields["clip"] = f"{world}-resnet" if dataset == "shapes" else "RN50"
    if fields.get("text_clip") == "other":              # of another CLIP, of the same width
        fields["text_clip"] = (world_of(dataset, (seed + 1) % 3) if dataset == "shapes"
                               else "ViT-B/16")
    config = train.configure(**fields)
    return dataclasses.replace(config, out=f"runs/reproduce/{dataset}/{name_of(config)}")


def choices_of(config: train.Config) -> dict:
    return {name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(config).items() if name not in NOT_A_CHOICE}


def name_of(config: train.Config) -> str:
    """A name that tells the method and the seed, and a hash of all that differs from the defaults
    (so that a field which is added later changes no name)."""
    default = choices_of(train.Config())
    changed = {name: value for name, value in choices_of(config).items() if value != default[name]}
    digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
    return f"{config.method}-{config.seed}-{digest[:10]}"


def kept_file(config: train.Config) -> pathlib.Path:
    family = "shapes" if config.dataset.startswith("shapes") else config.dataset
    return RESULTS / family / f"{name_of(config)}.json"


def kept(config: train.Config) -> dict | None:
    """The kept result of a configuration, if its every choice is the same."""
    path = kept_file(config)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    ours = choices_of(config)
    return content if all(ours.get(name) == value for name, value in content["config"].items()) \
        else None


def run(config: train.Config, fresh: bool = False) -> dict:
    """Trains and evaluates one configuration, or reads what was kept of it."""
    if not fresh and (content := kept(config)):
        return content
    folder, started = config.folder, time.time()
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "results.json").exists():
        train.train(config, resume=folder.exists())
    results = json.loads((folder / "results.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    content = {
        "config": choices_of(config), "results": results,
        "hits": {query: hits(folder / "ckpt.pt", config, [s for s in FINAL if s in results], query)
                 for query in evaluate.QUERIES},
        "log": [{name: float(f"{value:.4g}") for name, value in row.items()} for row in log],
        "minutes": round((time.time() - started) / 60, 2), "versions": train.versions() | {
            "threads": torch.get_num_threads()}}
    text = json.dumps(content, indent=None, separators=(",", ":")).replace(',"log":', ',\n"log":')
    command.save(kept_file(config), text + "\n")
    return content


def hits(checkpoint: pathlib.Path, config: train.Config, splits: list[str],
         query: str = "full") -> dict[str, str]:
    """Split -> a digit a sentence: how many of the two HITS its first moment reaches."""
    device, result = data.pick_device(config.device), {}
    for split, videos, predicted in evaluate.answers(evaluate.load(checkpoint, device), splits,
                                                     query, config.root, device, True, top_k=1):
        iou = mmn.interval_iou(predicted[:, 0, :2], videos.moments_sec)
        result[split] = "".join(str(sum(v >= mu for mu in HITS)) for v in iou.tolist())
    return result


def run_quietly(config: train.Config, fresh: bool, threads: int) -> str:
    """`run` in a process of its own; what it prints goes to <name>.txt beside the run's folder."""
    torch.set_num_threads(threads)
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(config.folder.with_suffix(".txt"), "w") as file, \
            contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run(config, fresh)
    return name_of(config)


def run_all(configs: list[train.Config], options: argparse.Namespace) -> None:
    """Runs what has not been kept, `--jobs` at a time: two cores do best with two of one thread."""
    missing = {name_of(c): c for c in configs if options.fresh or kept(c) is None}
    for name in sorted({config.dataset for config in missing.values()} |
                       {config.text_clip for config in missing.values()}):
        if name.startswith("shapes"):
            shapes.build(name, options.root)
    for config in missing.values():
        if config.clip == f"{config.dataset}-resnet":
            shapes.build_resnet(config.dataset, options.root)
    threads = max(1, torch.get_num_threads() // options.jobs)
    pool = concurrent.futures.ProcessPoolExecutor(options.jobs,
                                                  multiprocessing.get_context("spawn"))
    started = time.time()
    with pool:
        runs = [pool.submit(run_quietly, c, options.fresh, threads) for c in missing.values()]
        for i, future in enumerate(concurrent.futures.as_completed(runs), 1):
            print(f"{i} of {len(runs)}: {future.result()}, {(time.time() - started) / 60:.1f} min",
                  file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------- the tables

MMN = dict(method="mmn", text_lr=0.1)
TUNED = dict(method="mmn", text_lr=1.0)
VDI = dict(method="vdi", text_lr=0.1)
STAGED = dict(method="vdi-staged")
CONTROL = dict(method="vdi-staged", stage_target="random")
ONLY_VC, ONLY_SD = VDI | dict(lambda_sd=0.0), VDI | dict(lambda_vc=0.0)

MAIN = [Row("MMN, the paper's text rate", MMN, (43.85, 24.17, 39.50)),
        Row("MMN, tuned on validation", TUNED),
        Row("`vdi`: VDI to the letter", VDI, (46.47, 28.63, 41.60)),
        Row("control: random codes, no video", CONTROL),
        Row("**`vdi-staged`**", STAGED)]

TABLES = {
    "table1": MAIN,
    "table2": [Row(MAIN[0].name, MMN, (50.48, 29.65, 85.27, 60.67)), MAIN[1],
               Row(MAIN[2].name, VDI, (52.32, 31.37, 87.03, 62.30)), *MAIN[3:]],
    "table3": [
        Row("`vdi`: neither (MMN)", MMN, (43.85, 24.17, 39.50)),
        Row("`vdi`: L^vc, a learned probe", ONLY_VC | dict(context_query="none"),
            (43.12, 25.32, 39.43)),
        Row("`vdi`: L^vc, Q asks", ONLY_VC | dict(context_query="full"), (45.02, 27.63, 40.40)),
        Row("`vdi`: L^vc, Q^s asks", ONLY_VC, (45.47, 29.35, 40.61)),
        Row("`vdi`: L^sd, LSTM", ONLY_SD | dict(sequence="lstm"), (45.32, 25.76, 40.07)),
        Row("`vdi`: L^sd, transformer", ONLY_SD, (44.60, 26.06, 40.09)),
        Row("`vdi`: both", VDI, (46.47, 28.63, 41.60)),
        Row("`vdi-staged`: nothing asks", STAGED | dict(context_query="none")),
        Row("`vdi-staged`: Q asks", STAGED | dict(context_query="full")),
        Row("`vdi-staged`: Q^s asks", STAGED)],
    "s-table2": [
        Row("0, 0 (MMN)", MMN, (43.85, 24.17, 39.50)),
        *[Row(f"{vc:g}, {sd:g}", VDI | dict(lambda_vc=vc, lambda_sd=sd), paper)
          for vc, sd, paper in (
              (0.1, 0.0, (44.04, 28.35, 41.42)), (0.5, 0.0, (45.47, 29.35, 40.61)),
              (1.0, 0.0, (42.45, 24.17, 38.70)), (0.0, 0.1, (44.70, 25.61, 39.70)),
              (0.0, 0.01, (44.60, 26.06, 40.09)), (0.0, 0.001, (43.60, 25.32, 39.19)),
              (0.5, 0.1, (45.18, 27.91, 41.05)), (0.5, 0.01, (46.47, 28.63, 41.60)),
              (0.5, 0.001, (45.47, 27.31, 41.28)))]],
    "s-table3": [
        Row("L^vc consistent, L^sd relational", VDI, (46.47, 28.63, 41.60)),
        Row("both consistent", VDI | dict(sd_form="consistent"), (45.32, 28.35, 41.08)),
        Row("both relational", VDI | dict(vc_form="relational"), (38.56, 23.31, 36.20))],
    "s-table4": [
        Row("`vdi`: into Q", VDI | dict(inject_into="full"), (44.89, 26.04, 39.52)),
        Row("`vdi`: into Q^d", VDI, (46.47, 28.63, 41.60)),
        Row("`vdi-staged`: into Q", STAGED | dict(inject_into="full")),
        Row("`vdi-staged`: into Q^d", STAGED)],
    "s-table5": [
        Row("separated: MMN", MMN | dict(text_clip="other"), (41.59, 23.60, 37.90)),
        Row("separated: `vdi`, Q^s", VDI | dict(text_clip="other"), (41.29, 24.46, 38.21)),
        Row("separated: `vdi-staged`, Q^s", STAGED | dict(text_clip="other")),
        Row("no pre-training of the text: MMN", MMN | dict(text_clip="shuffled")),
        Row("no pre-training of the text: `vdi-staged`", STAGED | dict(text_clip="shuffled")),
        Row("joint: MMN", MMN, (43.85, 24.17, 39.50)),
        Row("joint: `vdi`, Q^h", VDI | dict(context_query="half"), (46.01, 27.05, 40.94)),
        Row("joint: `vdi`, Q^s", VDI, (46.47, 28.63, 41.60)),
        Row("joint: `vdi-staged`, Q^h", STAGED | dict(context_query="half")),
        Row("joint: `vdi-staged`, Q^s", STAGED)],
    "s-table6": [
        Row("ViT: MMN", MMN, (50.48, 29.65)), Row("ViT: `vdi`", VDI, (52.32, 31.37)),
        Row("ViT: `vdi-staged`", STAGED),
        Row("ResNet: MMN", MMN | dict(clip="resnet"), (52.88, 32.02)),
        Row("ResNet: `vdi`", VDI | dict(clip="resnet"), (53.98, 33.20)),
        Row("ResNet: `vdi-staged`", STAGED | dict(clip="resnet"))],
    "targets": [
        Row("none (MMN, tuned)", TUNED), Row("late minus early half of the moment", STAGED),
        *[Row(name, STAGED | dict(stage_target=target)) for name, target in (
            ("mean of the moment", "mean"), ("mean of the whole video", "whole"),
            ("the change of another sentence", "shuffled"),
            ("the change, turned at random", "rotated"),
            ("a random code for each query", "random"))]],
    "choices": [
        Row("`vdi` as it is", VDI),
        Row("masked words replaced by *something*", VDI | dict(mask="something")),
        Row("no gradient into the video's side", VDI | dict(stop_gradient="video")),
        Row("no gradient into the text's side", VDI | dict(stop_gradient="text")),
        Row("features not normalised", VDI | dict(normalise=False)),
        Row("pairs of one video kept in L^sd", VDI | dict(same_video=True)),
        Row("Eq. 10's plain product", VDI | dict(fusion="product")),
        Row("MMN's mask before exp", VDI | dict(excluded="exp0")),
        Row("`vdi-staged` as it is", STAGED),
        Row("masked words dropped", STAGED | dict(mask=""))],
    "curve": [Row(f"{count} videos: {name}", fields | dict(limit_videos=count))
              for count in (50, 100, 200, 400, 800)
              for name, fields in (("MMN, tuned", TUNED), ("`vdi-staged`", STAGED))],
    "gain": [MAIN[1], MAIN[3], MAIN[4]],
    "retrievers": [Row("MMN", TUNED), Row("MMN, `vdi-staged`", STAGED),
                   Row("2D-TAN", TUNED | dict(retriever="2d-tan", text_lr=0.3)),
                   Row("2D-TAN, `vdi-staged`", STAGED | dict(retriever="2d-tan"))],
    "tuning": [
        *[Row(f"MMN, text rate {rate:g}", MMN | dict(text_lr=rate)) for rate in (0.1, 0.3, 1.0)],
        Row("MMN, text rate 1, 60 epochs", TUNED | dict(epochs=60)),
        Row("`vdi-staged`", STAGED), Row("`vdi-staged`, 60 epochs", STAGED | dict(epochs=60)),
        *[Row(f"`vdi-staged`, {name}", STAGED | fields) for name, fields in (
            ("Q asks", dict(context_query="full")), ("Q^h asks", dict(context_query="half")),
            ("nothing asks", dict(context_query="none")), ("into Q", dict(inject_into="full")),
            ("mean of the moment", dict(stage_target="mean")),
            ("change, turned at random", dict(stage_target="rotated")),
            ("random codes", dict(stage_target="random")))]],
}
SEEDS = {"gain": 5}                                     # of a table; the others have three
METRICS = ("R@1,IoU=0.5", "R@1,IoU=0.7", "mIoU")
NOVEL = [("novel-word", metric) for metric in METRICS]
SPLITS = [(split, "R@1,IoU=0.5") for split in FINAL]
SHOWN = {                                               # what a table's columns are
    "table1": NOVEL + [("novel-composition", metric) for metric in METRICS],
    "table2": [("test", f"R@{k},IoU={mu}") for k in (1, 5) for mu in HITS],
    "targets": SPLITS + [("test", "verb accuracy"), ("novel-word", "verb accuracy")],
    "s-table5": SPLITS + [("novel-word", "noun accuracy")],
    "s-table6": [("test", "R@1,IoU=0.5"), ("test", "R@1,IoU=0.7")] + SPLITS[1:],
    "choices": SPLITS, "curve": SPLITS, "gain": SPLITS,
    "retrievers": SPLITS + [("test", "verb accuracy"), ("novel-word", "verb accuracy")],
    "tuning": [("val", "R@1,IoU=0.5"), ("val", "R@1,IoU=0.7"), ("val-novel-word", "R@1,IoU=0.5"),
               ("val-novel-word", "R@1,IoU=0.7")]}
ORIGINAL = ("table2", "s-table6")               # tables of the original split; the others: novel
BESIDE = dict.fromkeys(ORIGINAL, "Charades-STA")                    # whose figures the paper's are
PAIRS = {                                               # rows whose difference is shown
    "table1": [(4, 1), (4, 0), (4, 3), (2, 0)], "table2": [(4, 1), (2, 0)],
    "table3": [(6, 0), (9, 7), (9, 8)], "s-table3": [(0, 1), (0, 2)],
    "s-table4": [(1, 0), (3, 2)], "s-table5": [(5, 0), (9, 8)],
    "targets": [(1, k) for k in (0, 2, 3, 4, 5, 6)], "choices": [(8, 9)],
    "curve": [(2 * k + 1, 2 * k) for k in range(5)], "gain": [(2, 0), (2, 1)],
    "retrievers": [(1, 0), (3, 2)]}


# ---------------------------------------------------------------------------------------- reporting

def seeds_of(what: str, options: argparse.Namespace) -> range:
    """The seeds of a table: --seeds, else five of `gain` and three of the others."""
    return range(options.seeds or SEEDS.get(what, 3))


def seeds_kept(what: str, options: argparse.Namespace) -> int:
    """Of how many seeds, from 0 on, every row of a table has been run."""
    seeds = seeds_of(what, options)
    return next((seed for seed in seeds for row in TABLES[what]
                 if kept(config_of(row, options.dataset, seed, options, what)) is None), len(seeds))


def collect(what: str, options: argparse.Namespace) -> list[list[dict]]:
    """The kept results of a table: row -> seed -> result."""
    return [[kept(config_of(row, options.dataset, seed, options, what))
             for seed in seeds_of(what, options)] for row in TABLES[what]]


def paired(ours: list[dict], theirs: list[dict], split: str, draws: int = 2000
           ) -> tuple[float, float, float, list[float]]:
    """R@1, IoU=0.5 of one row minus that of another, in points: mean over seeds, its 95% interval
    by a bootstrap over the sentences (drawn with replacement within each seed, the same for both
    rows), and the difference of each seed."""
    rng, each = np.random.default_rng(0), []
    for a, b in zip(ours, theirs):
        a, b = (np.array([int(digit) >= 1 for digit in run["hits"]["full"][split]])
                for run in (a, b))
        each.append(100.0 * (a.astype(float) - b))
    drawn = np.mean([d[rng.integers(len(d), size=(draws, len(d)))].mean(1) for d in each], 0)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return float(np.mean([d.mean() for d in each])), low, high, [float(d.mean()) for d in each]


def draw_curve(options: argparse.Namespace) -> None:
    """assets/curve.png: R@1 over the number of training videos."""
    counts, runs = (50, 100, 200, 400, 800), collect("curve", options)
    splits, plt = [split for split in FINAL if split in runs[0][0]["results"]], video.pyplot()
    figure, axes = plt.subplots(1, len(splits), figsize=(13, 3), sharey=True)
    for cell, split in zip(axes, splits):
        for k, name in enumerate(("MMN, tuned", "vdi-staged")):
            values = np.array([[run["results"][split]["R@1,IoU=0.5"] for run in runs[2 * i + k]]
                               for i in range(len(counts))])
            cell.errorbar(counts, values.mean(1), values.std(1), label=name, capsize=3)
        cell.set(xscale="log", title=split, xlabel="training videos")
        cell.set_xticks(counts, counts)
        cell.minorticks_off()
    axes[0].set_ylabel("R@1, IoU=0.5")
    axes[0].legend()
    save_figure(figure, "curve.png", options)


def tabulate(what: str, options: argparse.Namespace) -> dict:
    """A table as data: for each row the values of all seeds, the paper's figures and the file of
    each run; and paired differences of R@1, IoU=0.5."""
    rows, runs = TABLES[what], collect(what, options)
    there = runs[0][0]["results"]
    columns = [column for column in SHOWN.get(what, NOVEL + SPLITS[:1]) if column[0] in there]
    content = {"table": what, "dataset": options.dataset, "seeds": len(runs[0]), "rows": [],
               "queries": {split: float(np.mean([r["results"][split]["queries"] for r in runs[0]]))
                           for split, _ in columns},
               "minutes": sum(r["minutes"] for row in runs for r in row), "differences": []}
    for row, results in zip(rows, runs):
        files = [kept_file(config_of(row, options.dataset, seed, options, what)).name
                 for seed in range(len(results))]
        content["rows"].append({
            "row": row.name, "paper": row.paper, "runs": files,
            "values": {f"{split} {metric}": [r["results"][split][metric] for r in results]
                       for split, metric in columns}})
    for a, b in PAIRS.get(what, []):
        content["differences"].append({"row": rows[a].name, "minus": rows[b].name, "splits": {
            split: dict(zip(("mean", "low", "high", "seeds"), paired(runs[a], runs[b], split)))
            for split in FINAL if split in there}})
    return content


def show(what: str, options: argparse.Namespace) -> str:
    """A table as Markdown: mean ± deviation over seeds, the paper's, paired differences."""
    content = tabulate(what, options)
    if what == "curve" and options.figures:
        draw_curve(options)
    paper = any(row["paper"] for row in content["rows"])
    heads = [name.replace(",IoU=", " ") for name in content["rows"][0]["values"]]
    heads += [f"paper, {BESIDE.get(what, 'Charades-CG novel-word')}"] * paper
    lines = [[row["row"], *map(mean_and_deviation, row["values"].values()),
              *[" / ".join(f"{value:.2f}" for value in row["paper"])] * paper]
             for row in content["rows"]]
    seeds = f"{content['seeds']} seed{'s' * (content['seeds'] > 1)}"
    queries = ", ".join(f"{split} {size:.0f}" for split, size in content["queries"].items())
    text = [markdown(["", *heads], lines), "",
            f"{seeds}; sentences of a seed: {queries}; {content['minutes']:.0f} minutes of runs."]
    for pair in content["differences"]:
        parts = [f"{split} {d['mean']:+.1f} [{d['low']:+.1f}, {d['high']:+.1f}] ("
                 + ", ".join(f"{seed:+.1f}" for seed in d["seeds"]) + ")"
                 for split, d in pair["splits"].items()]
        text.append(f"- {pair['row']} minus {pair['minus']}: " + "; ".join(parts))
    return "\n".join(text)


def keep(what: str, options: argparse.Namespace, make) -> dict:
    """What `make(seed)` returns for each seed, kept in results/<dataset>/<what>.json."""
    path = RESULTS / options.dataset / f"{what}.json"
    content, seeds = json.loads(path.read_text()) if path.exists() else {}, seeds_of(what, options)
    if missing := [seed for seed in seeds if options.fresh or str(seed) not in content]:
        content |= {str(seed): make(seed) for seed in missing}
        command.save(path, json.dumps(dict(sorted(content.items())), indent=1) + "\n")
    return {seed: content[str(seed)] for seed in seeds}


def clip_of(seed: int, options: argparse.Namespace) -> tuple[clip.CLIP, str]:
    """The CLIP of a seed's shapes world; of a real dataset, the published one."""
    world = world_of(options.dataset, seed)
    if options.dataset == "shapes":
        shapes.build(world, options.root)
    name = world if options.dataset == "shapes" else train.Config.clip
    return clip.load(data.clip_file(name, options.root), data.pick_device(options.device)), world


def s_table1(options: argparse.Namespace) -> str:
    """Supplement, Table 1: CLIP's scores by what is wrong in the wrong image."""
    def make(seed: int) -> dict:
        if options.svo:
            triplets = probe.svo_triplets(options.svo, options.images)
        else:
            triplets = {kind: probe.shape_triplets(kind, 1000, seed) for kind in probe.KINDS}
        model, _ = clip_of(seed, options)
        return {kind: probe.triplet_scores(model, part) for kind, part in triplets.items() if part}

    found = keep("s-table1-svo" if options.svo else "s-table1", options, make)
    paper = {"right": ("0.82", "0.76", "0.86"), "wrong": ("0.18", "0.24", "0.14"),
             "difference": ("0.64", "0.52", "0.72"), "right ahead": ("", "", "")}
    rows = []
    for name, theirs in paper.items():
        values = [[content[kind][name] for content in found.values() if kind in content]
                  for kind in probe.KINDS]
        cells = [f"{np.mean(each):.2f}" if each else "no images" for each in values]
        rows.append([name.replace("ahead", "ahead, %"), *cells, *theirs])
    return markdown(["score", *probe.KINDS, *(f"paper, {kind}" for kind in probe.KINDS)], rows)


def s_fig1(options: argparse.Namespace) -> str:
    """Supplement, Fig. 1: what the end token looks at in the last layer, by part of speech."""
    def make(seed: int) -> dict:
        model, world = clip_of(seed, options)
        sentences = sorted({s.sentence for s in data.read_annotations(world, "train",
                                                                      options.root)})
        weights = probe.word_weights(model, sentences)
        edges = np.linspace(0, 3, 31)
        return {kind: {"mean": float(np.mean(values)), "words": len(values),
                       "histogram": np.histogram(np.clip(values, 0, 3), edges)[0].tolist()}
                for kind, values in weights.items() if values}

    found, kinds = keep("s-fig1", options, make), ("noun", "verb", "other")
    if options.figures:
        plt = video.pyplot()
        figure, axes = plt.subplots(figsize=(7, 3))
        for kind in kinds:
            counts = np.sum([content[kind]["histogram"] for content in found.values()], 0)
            axes.stairs(100 * counts / counts.sum(), np.linspace(0, 3, 31), label=kind, linewidth=2)
        axes.set(xlabel="weight in the last layer (1: an even share)", ylabel="% of the words")
        axes.legend()
        save_figure(figure, "s-fig1.png", options)
    return markdown(["world", *kinds], [[str(k), *(f"{each[kind]['mean']:.2f}" for kind in kinds)]
                                        for k, each in found.items()])


def probes(options: argparse.Namespace) -> str:
    """What Eq. 3-5 carry: linear probes of the verb."""
    found = keep("probes", options, lambda seed: probe.verb_probes(
        clip_of(seed, options)[1], options.root))
    return markdown(["the verb is read off", "accuracy, %"],
                    [[name, mean_and_deviation([content[name] for content in found.values()])]
                     for name in found[0]] + [["(chance)", "14.3"]])


def trained_heat(seed: int, options: argparse.Namespace) -> inject.SpatialDynamic:
    """SpatialDynamic as the seed's `vdi` of Table 1 left it."""
    config = config_of(MAIN[2], "shapes", seed, options)
    path = config.folder / "last.pt"
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}; python reproduce.py table1 --fresh makes it")
    store = data.open_store(config.dataset, config.clip, options.root)
    model, _ = train.start(config, store, torch.device("cpu"))
    model.load_state_dict(clip.read_torch(path)["model"])
    return model.dynamic.eval()


@torch.no_grad()
def heat(options: argparse.Namespace) -> str:
    """Eq. 3 as a picture, and how much warmer objects are than what surrounds them."""
    def make(seed: int) -> dict:
        world, trained = clip_of(seed, options)[1], trained_heat(seed, options)
        return {"before training": probe.heat_contrast(world, options.root),
                "after training `vdi`": probe.heat_contrast(world, options.root, trained)}

    found = keep("heat", options, make)
    if options.figures:
        draw_heat(options)
    names = ("contrast", "warmest on the actor", "random patch on the actor")
    rows = [[stage, *(mean_and_deviation([each[stage][name] for each in found.values()], 2)
                      for name in names)] for stage in found[0]]
    return markdown(["FC of Eq. 3", "contrast (standard deviations)",
                     "warmest patch on the actor, %", "random patch, %"], rows)


def draw_heat(options: argparse.Namespace) -> None:
    """assets/heat.png: frames of a training video of world 0, and Eq. 3 on them, or of --video."""
    model, world = clip_of(0, options)
    if options.video:
        pixels, _ = video.sample_frames(options.video, 32, model.visual.resolution)
        x, patches = (torch.nn.functional.normalize(y.float(), dim=1)
                      for y in video.encode_frames(model, pixels))
    else:
        pixels = shapes.film(shapes.plan_of(0, "train", 0))
        _, x, patches = next(probe.moments_of(world, options.root, 1))
    maps = {"frame": None, "Eq. 3, FC = identity": probe.plain_heat(x, patches),
            "Eq. 3, after `vdi`": trained_heat(0, options).heatmap(x[None], patches[None])[0]}
    plt = video.pyplot()
    figure, axes = plt.subplots(3, 16, figsize=(16, 3.4))
    for (name, heatmap), line in zip(maps.items(), axes):
        for t, cell in zip(range(0, 32, 2), line):
            if heatmap is None:
                cell.imshow(pixels[t].permute(1, 2, 0))
            else:
                cell.imshow(heatmap[t], vmin=heatmap.min(), vmax=heatmap.max(), cmap="inferno")
            cell.axis("off")
        line[0].set_title(name, loc="left", fontsize=11)
    save_figure(figure, "heat-of-a-video.png" if options.video else "heat.png", options)


def fig3(options: argparse.Namespace) -> str:
    """Fig. 3: retrieval by the whole sentence, by its static and by its dynamic half."""
    rows, runs = [MAIN[k] for k in (0, 1, 2, 4)], collect("table1", options)
    runs = [runs[k] for k in (0, 1, 2, 4)]
    splits = [split for split in ("test", "novel-word") if split in runs[0][0]["results"]]

    def rates(results: list[dict], split: str, query: str) -> list[float]:
        return [100 * np.mean([int(digit) >= 1 for digit in run["hits"][query][split]])
                for run in results]

    if options.figures:
        plt = video.pyplot()
        figure, axes = plt.subplots(1, len(splits), figsize=(6 * len(splits), 3), sharey=True,
                                    squeeze=False)
        for cell, split in zip(axes[0], splits):
            for k, (row, results) in enumerate(zip(rows, runs)):
                values = [rates(results, split, query) for query in evaluate.QUERIES]
                cell.bar(np.arange(3) + 0.2 * k - 0.3, [np.mean(v) for v in values], 0.2,
                         yerr=[np.std(v) for v in values],
                         label=row.name.replace("`", "").strip("*"))
            cell.set_xticks(range(3), ["Q", "Q^s", "Q^d"])
            cell.set(title=split, ylabel="R@1, IoU=0.5")
        axes[0][-1].legend(fontsize=8)
        save_figure(figure, "fig3.png", options)
    heads = [f"{split}, {name}" for split in splits for name in ("Q", "Q^s", "Q^d")]
    return markdown(["", *heads], [
        [row.name, *(mean_and_deviation(rates(results, split, query)) for split in splits
                     for query in evaluate.QUERIES)] for row, results in zip(rows, runs)])


def collapse(options: argparse.Namespace) -> str:
    """What becomes of both sides of Eq. 2 and Eq. 5, and of the verbs, in training."""
    runs = collect("table1", options)
    plain, letter, staged = ([[row for row in run["log"] if "epoch" in row] for run in runs[k]]
                             for k in (0, 2, 4))
    first = [[row for row in run["log"] if "stage" in row] for run in runs[4]]
    names = ("var FC(x^qd), Eq. 2", "var x~^qs", "var FC(x^qd), Eq. 5", "var m~")
    if options.figures:
        plt = video.pyplot()
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 3.4))
        lines = [(left, letter, name, name) for name in names]
        lines += [(right, logs, "cos x^qd", method) for method, logs in (
            ("mmn", plain), ("vdi", letter), ("vdi-staged", staged))]
        for cell, logs, name, label in lines:
            means = [np.mean([row[name] for row in epoch]) for epoch in zip(*logs)]
            cell.plot(range(1, len(means) + 1), means, label=label)     # as long as the shortest
            cell.legend(fontsize=8)
        left.set(xlabel="epoch", yscale="log",
                 title="vdi: variance over a batch, share of the squared norm")
        right.set(xlabel="epoch (of vdi-staged: after stage 1)",
                  title="mean cosine between the verbs' x^qd")
        save_figure(figure, "collapse.png", options)
    rows = []
    for title, logs, shown in (("`vdi`", letter, (*names, "L_vc", "L_sd", "cos x^qd")),
                               ("`vdi-staged`, stage 1", first, ("var x^qd", "cos x^qd")),
                               ("`vdi-staged`, stage 2", staged, ("cos x^qd",))):
        rows += [[f"{title}: {name}", *(f"{np.mean([log[k][name] for log in logs]):.4f}"
                                        for k in (0, -1))] for name in shown]
    return markdown(["", "first", "last"], rows)


def fig2(options: argparse.Namespace) -> str:
    """Fig. 2: the method, with a video of the shapes world, as assets/fig2.json lays it out."""
    boxes, arrows = json.loads((HERE / "assets" / "fig2.json").read_text()).values()
    model, world = clip_of(0, options)
    plan = shapes.plan_of(0, "train", 0)
    row = shapes.samples_of("", "train", plan)[2]
    _, x, patches = next(probe.moments_of(world, options.root, 1))
    chosen = [event["start"] + 2 for event in plan["events"]]
    pixels, heat = shapes.film(plan).permute(0, 2, 3, 1)[chosen], probe.plain_heat(x, patches)
    overlap = mmn.iou_map(torch.tensor([[row.start_sec, row.end_sec]]),
                          torch.tensor([row.duration_sec]), 16)[0]
    overlap[torch.ones(16, 16).tril(-1) > 0] = torch.nan        # no moment ends before it begins
    plt = video.pyplot()
    figure, axes = plt.subplots(figsize=(15, 7.5))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.axvspan(35, 74, 0.17, 0.97, color="#fdf1e3", zorder=0)
    axes.text(73, 54.5, "in training only: inject.py", ha="right", color="#a05a00")
    for picture, place in ((np.hstack(pixels), (1, 17, 24, 17)), (overlap, (79, 89, 29, 18)),
                           (np.hstack(heat[chosen]), (56, 72, 29, 22.5))):
        axes.imshow(picture, extent=place, cmap="inferno", zorder=2)
    colours = {"data": "#ffffff", "kept": "#dce9f7", "inject": "#fbd9ae", "loss": "#f7c6c6"}
    for x, y, text, kind in boxes.values():
        axes.text(x, y, text.format(**parse.Parser("rules").split(row.sentence)._asdict()),
                  ha="center", va="center", ma="left" if kind == "data" else "center", zorder=3,
                  bbox=dict(boxstyle="round,pad=0.5", facecolor=colours[kind], edgecolor="#555555"))
    for arrow in arrows:
        a, b, *label = arrow.split()
        (ax, ay), (bx, by) = boxes[a][:2], boxes[b][:2]
        axes.annotate("", (bx, by), (ax, ay), zorder=1, arrowprops=dict(
            arrowstyle="-|>", color="#333333", shrinkB=24 if ax == bx else 72 if ay == by else 44))
        axes.text(ax + 0.5 * (bx - ax), ay + 0.5 * (by - ay), *label or [""], ha="center",
                  va="center", zorder=2, bbox=dict(pad=1, facecolor="white", edgecolor="none"))
    axes.set(xlim=(0, 112), ylim=(68, 6), aspect="auto")
    axes.axis("off")
    save_figure(figure, "fig2.png", options)
    return "assets/fig2.png is drawn"


def save_figure(figure, name: str, options: argparse.Namespace) -> None:
    """Into assets/, where the README shows them; of other datasets into results/<dataset>/."""
    folder = HERE / "assets" if options.dataset == "shapes" else RESULTS / options.dataset
    folder.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(folder / name, dpi=80, metadata={"Software": None})
    video.pyplot().close(figure)


def blocks(options: argparse.Namespace) -> str:
    """CLIP2Video: what each of its blocks brings."""
    return clip2video.ablation_table(clip2video.ablation(
        len(seeds_of("clip2video", options)), options.root, options.device,
        only_kept=not options.figures))


OTHERS = {"fig2": fig2, "fig3": fig3, "s-table1": s_table1, "s-fig1": s_fig1, "collapse": collapse,
          "probes": probes, "heat": heat, "clip2video": blocks}
FIGURES = ("fig3", "s-fig1", "collapse", "heat", "curve")       # assets/<name>.png
NEEDS = {"fig3": "table1", "collapse": "table1", "heat": "table1"}      # whose runs they show


# ---------------------------------------------------------------------------------- into the README

MARKS = ("<!-- results: python reproduce.py readme -->", "<!-- end of the results -->")
TEXT = HERE / "results" / "text.md"


def section(options: argparse.Namespace) -> str:
    """results/text.md, each line "{{name}}" replaced by that table, over the seeds that ran."""
    def table(name: str) -> str:
        if name in TABLES:
            seeds = seeds_kept(name, options)
            if not seeds:
                return f"Not run here yet: `python reproduce.py {name}`"
            text = show(name, argparse.Namespace(**vars(options) | {"seeds": seeds}))
        else:
            text = OTHERS[name](options)
        figure = f"![{name}](assets/{name}.png)\n\n" if name in FIGURES else ""
        return f"{figure}{text}\n\n`python reproduce.py {name}`"

    return re.sub(r"^{{(.*)}}$", lambda match: table(match[1]), TEXT.read_text(), flags=re.M)


def linked(text: str) -> str:
    """Every [`file.name`](file.py) leads to the line of that function or class."""
    def link(match: re.Match) -> str:
        file, *names = match[1].split(".")
        node = ast.parse((HERE / f"{file}.py").read_text())
        for name in names:
            node = next((part for part in node.body if getattr(part, "name", "") == name), None)
            if node is None:
                raise ValueError(f"README.md links to {match[1]}, which is not there")
        return f"[`{match[1]}`]({file}.py#L{node.lineno})"

    return re.sub(r"\[`([\w.]+)`\]\(\w+\.py(?:#L\d+)?\)", link, text)


def put_into_readme(options: argparse.Namespace) -> str:
    """Rewrites what stands between the two marks in README.md, and the links to functions."""
    path = HERE / "README.md"
    before, rest = path.read_text().split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f"{before}{MARKS[0]}\n\n{section(options)}\n{MARKS[1]}{after}"
    command.save(path, linked(text))
    return f"{path.name} has been rewritten between its marks"


def main() -> None:
    arguments = command.parser("the paper's tables and figures, ours beside the paper's")
    add = arguments.add_argument
    add("what", nargs="+", choices=[*TABLES, *OTHERS, "readme"], metavar="what",
        help=f"{', '.join((*TABLES, *OTHERS))}; or readme: put the kept results into README.md")
    add("--dataset", default="shapes", choices=("shapes", "charades", "activitynet"), help="which")
    add("--seeds", type=int, help="of each row (three, if not given; of gain five)")
    add("--device", **command.DEVICE)
    add("--root", default="data", help="folder of datasets")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time; on one GPU take 1")
    add("--fresh", action="store_true", help="run again what has been run, but not clip2video")
    add("--svo", help="s-table1 on SVO-Probes: its svo_probes.csv, with --images")
    add("--images", help="folder of its images, named by their ids")
    add("--video", help="heat: draw it for this video instead of the shapes world")
    options = arguments.parse_args()
    options.figures = True
    with command.sentences():
        if min(options.jobs, options.seeds if options.seeds is not None else 1) < 1:
            raise ValueError("--jobs and --seeds are at least 1")
        if "readme" in options.what:
            if len(options.what) > 1:
                raise ValueError("readme stands alone")
            options.figures = False
            print(put_into_readme(options))
            return
        if bool(options.svo) != bool(options.images):
            raise ValueError("--svo and --images go together: the table and the folder of images")
        worldly = {"fig2", "probes", "heat", "clip2video"} & set(options.what)
        if options.dataset != "shapes" and worldly:
            raise ValueError(f"{', '.join(sorted(worldly))}: only of the shapes world")
        tables = [name for name in (NEEDS.get(what, what) for what in options.what)
                  if name in TABLES]
        configs = [config_of(row, options.dataset, seed, options, what) for what in tables
                   for seed in seeds_of(what, options) for row in TABLES[what]]
        run_all(list(dict.fromkeys(configs)), options)
        for what in options.what:
            text = show(what, options) if what in TABLES else OTHERS[what](options)
            print(f"\n{what}, {options.dataset}\n\n{text}")
            folder = RESULTS / options.dataset / "tables"
            if what != "fig2":                          # which is a picture alone
                command.save(folder / f"{what}.md", text + "\n")
            if what in TABLES:
                command.save(folder / f"{what}.json", json.dumps(tabulate(what, options), indent=1))


if __name__ == "__main__":
    main()
