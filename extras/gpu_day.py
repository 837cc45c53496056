"""A first day on a GPU, in one command: is it right, and how fast is it?

    python -m extras.gpu_day                            # under twenty minutes; needs no data
    python -m extras.gpu_day --videos DIR               # extraction from real videos, too
    python -m extras.gpu_day --device cpu --small       # the same code in seconds, as the tests run it

Compares the device with the CPU (towers, losses, a training step of each method, decoding) and a
resumed run with a whole one, then measures the settings of Charades-STA and ActivityNet-Captions,
and search. Weights, features and sentences are random and of true shape. Prints Markdown, writes
results/gpu/<name>.json; exit status 1 if a comparison fails.
"""
import support  # first, for a Ctrl-C while torch is imported
import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest.mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import mmn
import train
from extras import bench
from support import files, options, parallel, progress
from support.errors import reported
from support.text import markdown

HERE = pathlib.Path(__file__).parent.parent
RESULTS = HERE / "results" / "gpu"
TOLERANCE = 1e-3    # of float32 without TF32: largest difference, as a share of the largest value
METHODS = {"mmn": dict(method="mmn"), "vdi": dict(method="vdi"),
           "2d-tan": dict(method="mmn", retriever="2d-tan")}
PRECISIONS = ("float32", "TF32", "bf16")
SMALL = dict(num_clips=8, frames=16, pool_counts=(3, 2), kernel=3, layers=3, hidden=16, joint=8,
             batch=3)


# ------------------------------------------------------------------------------------- what is run

def config_of(dataset: str, small: bool, **changes) -> train.Config:
    return train.configure(dataset=dataset, **(SMALL if small else {}) | changes)


random_clip = functools.cache(bench.random_vit_b32)     # of the CPU, to be copied


def random_tokens(count: int) -> Tensor:
    """Sentences of twelve random words, [count, 77]."""
    words = torch.randint(1, 49406, (count, 12), generator=torch.Generator().manual_seed(0))
    return F.pad(F.pad(F.pad(words, (1, 0), value=49406), (0, 1), value=49407), (0, 63))


def batch_of(config: train.Config, patches: bool) -> data.Batch:
    """bench.random_batch as train.terms reads it, each query with the same number of words."""
    frames, _, video_of, iou, moments_sec = bench.random_batch(config)
    S, generator = len(video_of), torch.Generator().manual_seed(1)
    seen = F.normalize(torch.randn(config.batch, 8, 512, 7, 7, generator=generator), dim=2)
    return data.Batch([str(i) for i in range(config.batch)], frames, seen if patches else None,
                      random_tokens(3 * S).view(3, S, 77), torch.ones(3, S, dtype=torch.bool),
                      video_of, moments_sec, torch.full((S,), 30.0), iou, torch.arange(S))


def model_of(config: train.Config, small: bool) -> train.Model:
    """train.Model with a random text tower, for features as ViT-B/32 gives them."""
    text = copy.deepcopy(random_clip(small=small))
    text.visual = None
    made = {"resolution": 224, "width": 512, "patch_width": 512, "grid": 7, "patch_frames": 8}
    torch.manual_seed(0)
    return train.Model(config, text, made).train()


def one_step(model: train.Model, optimiser, batch: data.Batch, config: train.Config) -> dict:
    """The loop of train.py, without its checks. Returns the losses."""
    losses, _ = train.terms(model, batch, config)
    optimiser.zero_grad()
    train.total_loss(losses, config, 0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
    optimiser.step()
    return losses


# ------------------------------------------------------------------------------------ is it right?

def compared(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference as a share of the largest value."""
    ours, theirs = ours.detach().double().cpu(), theirs.detach().double()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def equality(device: torch.device, small: bool) -> dict[str, float]:
    """What -> its difference from the CPU's, to be at most TOLERANCE."""
    result, pair, model = {}, (torch.device("cpu"), device), random_clip(small=small)
    R, generator = model.visual.resolution, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, R, R), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for name, work in (
                ("image tower", lambda m, d: m.encode_image(clip.normalise(images.to(d)))[0]),
                ("text tower", lambda m, d: m.encode_text(random_tokens(8).to(d)))):
            result[name] = compared(*(work(copy.deepcopy(model).to(d), d) for d in pair))
    for name, changes in METHODS.items():
        config, runs = config_of("charades", small, **changes, batch=3 if small else 8), []
        batch = batch_of(config, name == "vdi")
        for d in pair:
            model = model_of(config, small).to(d)
            # plain SGD: Adam turns rounding of a vanishing gradient into a step of full size
            losses = one_step(model, torch.optim.SGD(model.parameters(), 0.1), batch.to(d), config)
            runs.append((losses, [*model.parameters()]))
        (theirs, before), (ours, after) = runs
        result |= {f"{name}: {k}": compared(v, ours[k]) for k, v in theirs.items()}
        result[f"{name}: weights after a step"] = max(map(compared, before, after))
    config = config_of("activitynet", small)
    model, N = bench.retriever_of(config), config.num_clips
    scores = torch.rand(64, N, N, generator=generator)
    result["decoding"] = compared(*(mmn.decode(
        scores.to(d), torch.full((64,), 30.0, device=d), 5, candidates=model.candidates.to(d))
        for d in pair))
    return result


def whole_runs(device: torch.device, root: str) -> tuple[dict[str, float], dict[str, float]]:
    """Of each method, two epochs on the shapes world, with deterministic algorithms: do the weights
    of a run that was interrupted after the first differ from the others (0 or 1)? And how far are
    the losses of two processes from those of one, if there are two GPUs?"""
    save, interrupted, together = progress.Run.save, {}, {}

    def save_and_stop(run: progress.Run) -> None:
        save(run)
        if run.epoch == 1:
            raise KeyboardInterrupt

    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for method in train.METHODS:
            settings = dict(dataset="shapes", method=method, device=str(device), root=root,
                            epochs=2, stage_steps=20, limit_videos=24)
            whole, parts = (train.configure(**settings, out=f"{folder}/{method}-{i}")
                            for i in range(2))
            train.train(whole)
            with unittest.mock.patch.object(progress.Run, "save", save_and_stop), \
                    contextlib.suppress(KeyboardInterrupt):
                train.train(parts)
            train.train(parts, resume=True)
            a, b = (files.read_tensors(c.folder / "last.pt") for c in (parts, whole))
            interrupted[f"{method}: resumed"] = float(any(
                not torch.equal(a["model"][k], b["model"][k]) for k in b["model"]))
            if method == "vdi" and (device.type == "cpu" or torch.cuda.device_count() > 1):
                given = settings | dict(out=f"{folder}/two", device=device.type)
                words = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc-per-node", "2", "train.py", *words],
                               check=True, stdout=sys.stderr, cwd=HERE)
                c = files.read_tensors(f"{folder}/two/last.pt")
                together = {f"two processes: {name}": abs(value / b["history"][0][name] - 1)
                            for name, value in c["history"][0].items() if name.startswith("L")}
    torch.use_deterministic_algorithms(False)
    return interrupted, together


# --------------------------------------------------------------------------------- how fast is it?

def training(device: torch.device, small: bool, at_least: float) -> list[dict]:
    """Steps and videos per second, and peak memory, of every method, dataset and precision."""
    rows = []
    for dataset, method, precision, last in itertools.product(
            ("charades", "activitynet"), METHODS, PRECISIONS, (False, True)):
        config = config_of(dataset, small, bf16=precision == "bf16", **METHODS[method])
        row = {"dataset": dataset, "method": method,
               "precision": precision + ", channels-last" * last}
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "TF32"
        model = model_of(config, small)
        if last:
            model.retriever.to(memory_format=torch.channels_last)
        model = model.to(device)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, **train.ADAMW)
        batch = batch_of(config, model.dynamic is not None).to(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(torch.OutOfMemoryError):       # the cells stay empty
            seconds = bench.seconds_of(lambda: one_step(model, optimiser, batch, config), device,
                                       at_least)
            row |= {"steps/s": 1 / seconds, "videos/s": config.batch / seconds}
        if device.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
        rows.append(row)
    return rows


@torch.no_grad()
def search(device: torch.device, rows: int, at_least: float) -> list[dict]:
    """One sentence against `rows` moments in float16, J = 256, scored as extras/index.py does."""
    generator, J = torch.Generator(device).manual_seed(0), 256
    iou, contrastive = (torch.empty(rows, J, dtype=torch.half, device=device) for _ in range(2))
    for part in (*iou.split(100_000), *contrastive.split(100_000)):
        part.copy_(F.normalize(torch.randn(part.shape, device=device, generator=generator), dim=1))
    a, b = iou[0].clone(), contrastive[0].clone()

    def best() -> Tensor:
        overlap = torch.sigmoid(mmn.SCORE_SCALE * torch.mv(iou, a).float())
        return mmn.fuse(overlap, torch.mv(contrastive, b).float()).topk(10).indices

    assert best()[0] == 0, "the moment that equals the sentence is not the best"
    seconds = bench.seconds_of(best, device, at_least)
    return [bench.row(f"search: {rows:,} moments", 1000 * seconds, "ms")]


# --------------------------------------------------------------------------------- the command line

def shown(result: dict) -> str:
    """The results as Markdown."""
    exact = {**result["equality"], **result["two processes"], **result["resume"]}
    numbers = ("steps/s", "videos/s", "GiB")
    steps = [[row["dataset"], row["method"], row["precision"],
              *(f"{row[name]:.2f}" if name in row else "" for name in numbers)]
             for row in result["training"]]
    rows = [[line["what"], f"{line['value']:.1f} {line['unit']}"] for line in
            [*result["search"], *result["extraction"]]]
    return "\n\n".join((result["machine"], markdown(
        ["against the CPU, or the whole run", "difference"],
        [[name, f"{value:.1e}"] for name, value in exact.items()]),
        markdown(["dataset", "method", "precision", *numbers], steps), markdown(["", "measured"], rows)))


def main() -> None:
    arguments = options.parser("check and measure a GPU", prog="python -m extras.gpu_day")
    add = arguments.add_argument
    add("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    add("--small", action="store_true", help="tiny sizes, which show that the code runs")
    add("--root", default="data", help="folder of datasets; the shapes world is built if need be")
    add("--videos", help="folder of video files, for extraction")
    add("--name", help="results/gpu/<name>.json (default: the name of the device)")
    given = arguments.parse_args()
    with reported():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # before the first product
        device = parallel.pick_device(given.device)
        seconds = 0.0 if given.small else 2.0
        result = {"machine": bench.hardware(device), "versions": progress.versions(),
                  "equality": equality(device, given.small)}
        result["resume"], result["two processes"] = whole_runs(device, given.root)
        result["training"] = training(device, given.small, seconds)
        result["search"] = search(device, 10_000 if given.small else 10_000_000, seconds)
        result["extraction"] = bench.bench_video(given) if given.videos else []
        name = given.name or (torch.cuda.get_device_name(device) if device.type == "cuda"
                              else device.type).replace(" ", "-")
        files.save(RESULTS / f"{name}.json", json.dumps(result, indent=1))
        print(shown(result))
        wrong = [name for part, most in (("equality", TOLERANCE), ("resume", 0),
                                         ("two processes", 20 * TOLERANCE))
                 for name, value in result[part].items() if not value <= most]
        if wrong:
            print(f"differs from the CPU, or from the whole run: {', '.join(wrong)}",
                  file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
