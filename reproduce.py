"""Every table and figure of the paper and its supplement, ours beside the paper's.

    python reproduce.py table1                          # on the shapes world, three seeds
    python reproduce.py table3 --dataset charades --device cuda
    python reproduce.py readme                          # puts the tables into README.md

A row is a set of fields of train.Config. Each row is run once per seed (shapes: world and training
have the same seed) and kept in results/<dataset>/<name>.json with its configuration, metrics, log,
and hits a query; a row that is there is not run again, unless --fresh is given. Choices are made on
validation splits; what is printed are test splits.
"""
import argparse
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import sys
import time

import numpy as np
import torch

import data
import evaluate
import parse
import train
import video

HERE = pathlib.Path(__file__).parent
RESULTS = HERE / "results"
FINAL = ("test", "novel-word", "novel-composition")             # what a table shows
NOT_A_CHOICE = ("device", "root", "out", "workers")             # of Config: where, not what
HITS = (0.5, 0.7)


# ------------------------------------------------------------------------------------------- running

@dataclasses.dataclass(frozen=True)
class Row:
    """A line of a table: its name, the fields of Config that make it, the paper's figures."""
    name: str
    fields: dict
    paper: tuple = ()


def world_of(dataset: str, seed: int) -> str:
    """The dataset of a seed: every seed has a shapes world of its own, with its own small CLIP."""
    return f"shapes-{seed}" if dataset == "shapes" and seed else dataset


def config_of(row: Row, dataset: str, seed: int, options: argparse.Namespace) -> train.Config:
    world = world_of(dataset, seed)
    fields = {"dataset": world, **train.preset(dataset if dataset != "shapes" else world),
              **row.fields, "seed": seed, "device": options.device, "root": options.root}
    if fields.get("text_clip") == "other":              # the tower of another world's CLIP
        fields["text_clip"] = world_of(dataset, (seed + 1) % 3)
    fields.setdefault("mask", train.MASKS.get(fields.get("method"), ""))
    config = train.Config(**fields)
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
    path = kept_file(config)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=None, separators=(",", ":")).replace(',"log":', ',\n"log":')
    video.save_atomically(path, lambda file: file.write((text + "\n").encode()))
    return content


def hits(checkpoint: pathlib.Path, config: train.Config, splits: list[str],
         query: str = "full") -> dict[str, str]:
    """Split -> a digit a sentence: how many of the thresholds 0.5 and 0.7 its first moment reaches,
    retrieved by Q, Q^s or Q^d."""
    device = data.pick_device(config.device)
    model = evaluate.load(checkpoint, device)
    store = data.open_store(config.dataset, config.clip, config.root)
    parser = parse.Parser(config.parser or None, config.mask)
    result = {}
    for split in splits:
        rows = data.read_annotations(config.dataset, split, config.root)
        videos = data.Videos(rows, store, config.num_clips, parser, normalise=config.normalise)
        predicted = evaluate.predict(model.text, model.retriever, videos, config.batch, device,
                                     query, 1, config.fusion, config.normalise)
        iou = evaluate.mmn.interval_iou(predicted[:, 0, :2], videos.moments_sec)
        result[split] = "".join(str(sum(v >= mu for mu in HITS)) for v in iou.tolist())
    return result


def run_quietly(config: train.Config, fresh: bool, threads: int) -> str:
    """`run` in a process of its own; what it prints goes to stdout.txt in the run's folder."""
    torch.set_num_threads(threads)
    config.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(config.folder.with_suffix(".txt"), "w") as file, \
            contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run(config, fresh)
    return name_of(config)


def run_all(configs: list[train.Config], options: argparse.Namespace) -> None:
    """Runs what has not been kept, `--jobs` at a time. Small models use two cores best as two runs
    of one thread each."""
    missing = {name_of(c): c for c in configs if options.fresh or kept(c) is None}
    for name in sorted({config.dataset for config in missing.values()} |
                       {config.text_clip for config in missing.values()}):
        if name.startswith("shapes"):
            train.shapes.build(name, options.root)
    threads = max(1, torch.get_num_threads() // options.jobs)
    pool = concurrent.futures.ProcessPoolExecutor(options.jobs,
                                                  multiprocessing.get_context("spawn"))
    started = time.time()
    with pool:
        runs = [pool.submit(run_quietly, c, options.fresh, threads) for c in missing.values()]
        for i, future in enumerate(concurrent.futures.as_completed(runs), 1):
            print(f"{i} of {len(runs)}: {future.result()}, {(time.time() - started) / 60:.1f} min",
                  file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------- the tables

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
}
SEEDS = {"gain": 5}                                     # of a table; the others have three


def main() -> None:
    arguments = argparse.ArgumentParser(
        description="the paper's tables and figures, ours beside the paper's",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    arguments.add_argument("what", nargs="+", choices=[*TABLES])
    arguments.add_argument("--dataset", default="shapes", help="shapes, charades or activitynet")
    arguments.add_argument("--seeds", type=int, help="of each row (default 3; gain 5)")
    arguments.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arguments.add_argument("--root", default="data", help="folder of datasets")
    arguments.add_argument("--jobs", type=int, default=os.cpu_count() or 1,
                           help="runs at a time; on one GPU take 1")
    arguments.add_argument("--fresh", action="store_true", help="run again what has been run")
    options = arguments.parse_args()
    configs = [config_of(row, options.dataset, seed, options) for what in options.what
               for seed in range(options.seeds or SEEDS.get(what, 3)) for row in TABLES[what]]
    run_all(list(dict.fromkeys(configs)), options)


if __name__ == "__main__":
    main()
