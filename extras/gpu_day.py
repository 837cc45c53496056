"""A first day on a GPU, in one command: is it right, and how fast is it?

    python -m extras.gpu_day                            # under twenty minutes; needs no data
    python -m extras.gpu_day --videos DIR               # extraction from real videos, too
    python -m extras.gpu_day --device cpu --small       # the same code, in half a minute

Compares the device with the CPU (towers, losses, a training step of each method, decoding) and a
resumed run with a whole one, then measures the settings of Charades-STA and ActivityNet-Captions,
and search. Weights, features and sentences are random and of true shape. Prints Markdown, writes
results/gpu/<name>.json. What fails is listed at the end, and the exit status is 1.
"""
import support  # first, for a Ctrl-C while torch is imported
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
import mmn
import train
from extras import bench
from support import files, options, parallel, progress
from support.errors import reason, reported
from support.text import markdown

HERE = pathlib.Path(__file__).parent.parent
RESULTS = HERE / "results" / "gpu"
TOLERANCE = 1e-3    # of float32 without TF32: largest difference, as a share of the largest value
METHODS = {"mmn": dict(method="mmn"), "vdi": {}, "2d-tan": dict(method="mmn", retriever="2d-tan")}
SMALL = dict(num_clips=8, frames=16, pool_counts=(3, 2), kernel=3, layers=3, hidden=16, batch=3)


# ------------------------------------------------------------------------------------- what is run

random_clip = functools.cache(bench.random_vit_b32)     # on the CPU, to be copied


def sized(small: bool, **fields) -> train.Config:
    return train.configure(**(SMALL if small else {}) | fields)


def model_of(config: train.Config, small: bool) -> train.Model:
    """train.Model with a random text tower, for features as ViT-B/32 gives them."""
    text = copy.deepcopy(random_clip(small=small))
    text.visual = None
    made = {"resolution": 224, "width": 512, "patch_width": 512, "grid": 7, "patch_frames": 8}
    torch.manual_seed(0)
    return train.Model(config, text, made).train()


def one_step(model: train.Model, optimiser, batch, config: train.Config) -> dict:
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
    theirs, ours = theirs.detach().double(), ours.detach().double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-12))


def equality(device: torch.device, small: bool) -> dict[str, float]:
    """What -> its difference from the CPU's, to be at most TOLERANCE."""
    result, pair, model = {}, (torch.device("cpu"), device), random_clip(small=small)
    R, generator = model.visual.resolution, torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, R, R), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        for name, work in (
                ("image tower", lambda m, d: m.encode_image(clip.normalise(images.to(d)))[0]),
                ("text tower", lambda m, d: m.encode_text(bench.random_tokens(8).to(d)))):
            result[name] = compared(*(work(copy.deepcopy(model).to(d), d) for d in pair))
    for name, changes in METHODS.items():
        config, runs = sized(small, dataset="charades", batch=4, **changes), []
        batch = bench.whole_batch(config, name == "vdi")
        for d in pair:
            model = model_of(config, small).to(d)
            # plain SGD: Adam turns rounding of a vanishing gradient into a step of full size
            losses = one_step(model, torch.optim.SGD(model.parameters(), 0.1), batch.to(d), config)
            runs.append((losses, [*model.parameters()]))
        (theirs, before), (ours, after) = runs
        result |= {f"{name}: {k}": compared(v, ours[k]) for k, v in theirs.items()}
        result[f"{name}: weights after a step"] = max(map(compared, before, after))
    config = sized(small, dataset="activitynet")
    model, N = bench.retriever_of(config), config.num_clips
    scores = torch.rand(64, N, N, generator=generator)
    result["decoding"] = compared(*(mmn.decode(
        scores.to(d), torch.full((64,), 30.0, device=d), 5, candidates=model.candidates.to(d))
        for d in pair))
    return result


def whole_runs(device: torch.device, root: str) -> dict[str, float]:
    """Two epochs of each method on the shapes world: 0 if a run that was interrupted after the
    first ends with the bits of one that was not, else 1 (deterministic algorithms). And, with two
    GPUs or none, how far the losses of two processes are from those of one."""
    save, result = progress.Run.save, {}

    def save_and_stop(run: progress.Run) -> None:
        save(run)
        if run.epoch == 1:
            raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for method in train.METHODS:
            settings = dict(dataset="shapes", method=method, root=root, epochs=2, stage_steps=20,
                            limit_videos=24)
            whole, parts = (train.configure(**settings, device=str(device),
                                            out=f"{folder}/{method}-{i}") for i in range(2))
            train.train(whole)
            with unittest.mock.patch.object(progress.Run, "save", save_and_stop), \
                    contextlib.suppress(KeyboardInterrupt):
                train.train(parts)
            train.train(parts, resume=True)
            a, b = (files.read_tensors(c.folder / "last.pt") for c in (parts, whole))
            result[f"{method}: resumed"] = float(any(
                not torch.equal(a["model"][name], value) for name, value in b["model"].items()))
            if method == "vdi" and (device.type == "cpu" or torch.cuda.device_count() > 1):
                given = settings | dict(device=device.type, out=f"{folder}/two")
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                "--nproc-per-node", "2", "train.py", *(
                                    f"--{name.replace('_', '-')}={v}" for name, v in given.items())
                                ], check=True, capture_output=True, cwd=HERE)
                log = files.read_tensors(f"{folder}/two/last.pt")["history"][0]
                result |= {f"two processes: {name}": abs(log[name] / value - 1)
                           for name, value in b["history"][0].items() if name.startswith("L")}
    return result


# --------------------------------------------------------------------------------- how fast is it?

def training(device: torch.device, small: bool, at_least: float) -> list[dict]:
    """Steps and videos per second, and peak memory, of every method, dataset and precision."""
    rows = []
    for dataset, method, precision, last in itertools.product(
            ("charades", "activitynet"), METHODS, ("float32", "TF32", "bf16"), (False, True)):
        config = sized(small, dataset=dataset, bf16=precision == "bf16", **METHODS[method])
        kind = precision + (", channels-last" if last else "")
        rows.append(row := {"dataset": dataset, "method": method, "precision": kind})
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        torch.backends.cudnn.allow_tf32 = precision == "TF32"
        model = model_of(config, small).to(device)
        if last:
            model.retriever.to(memory_format=torch.channels_last)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, **train.ADAMW)
        batch = bench.whole_batch(config, model.dynamic is not None).to(device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with contextlib.suppress(torch.OutOfMemoryError):       # the cells stay empty
            row["steps/s"] = 1 / bench.seconds_of(
                lambda: one_step(model, optimiser, batch, config), device, at_least)
            row["videos/s"] = config.batch * row["steps/s"]
        if device.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated() / 2 ** 30
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
    names = ("dataset", "method", "precision", "steps/s", "videos/s", "GiB")
    steps = [[value if isinstance(value := row.get(name, ""), str) else f"{value:.2f}"
              for name in names] for row in result["training"]]
    return "\n\n".join((
        result["machine"],
        markdown(["compared", "difference"], [[name, f"{value:.1e}"] for name, value in
                                              (result["equality"] | result["runs"]).items()]),
        markdown([*names], steps),
        markdown(["speed", ""], [[line["what"], f"{line['value']:.1f} {line['unit']}"]
                                 for line in [*result["search"], *result["extraction"]]])))


def main() -> None:
    arguments = options.parser("check and measure a GPU", prog="python -m extras.gpu_day")
    add = arguments.add_argument
    add("--device", default="cuda", help="cuda, cuda:N, mps or cpu")
    add("--small", action="store_true", help="tiny sizes, which show that the code runs")
    add("--root", default="data", help="folder of datasets; the shapes world is built there")
    add("--videos", help="folder of video files, for extraction")
    given = arguments.parse_args()
    with reported():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # before the first product
        device = parallel.pick_device(given.device)
        small, seconds = given.small, 0.0 if given.small else 2.0
        result = {"machine": bench.hardware(device), "versions": progress.versions(), "failed": {},
                  "equality": {}, "runs": {}, "training": [], "search": [], "extraction": []}
        for name, work in {
                "equality": lambda: equality(device, small),
                "runs": lambda: whole_runs(device, given.root),
                "training": lambda: training(device, small, seconds),
                "search": lambda: search(device, 10_000 if small else 10_000_000, seconds),
                "extraction": lambda: bench.bench_video(given) if given.videos else []}.items():
            parallel.pick_device(given.device)          # float32 without TF32 again
            torch.use_deterministic_algorithms(name == "runs")
            try:
                result[name] = work()
            except Exception as error:                  # of any type; the others still run
                result["failed"][name] = reason(error)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        files.save(RESULTS / f"{name.replace(' ', '-')}.json", json.dumps(result, indent=1))
        print(shown(result))
        wrong = [f"{name}: {text}" for name, text in result["failed"].items()]
        wrong += [f"{name} differs by {value:.1e}" for name, value in
                  (result["equality"] | result["runs"]).items() if not value <= TOLERANCE]
        if wrong:
            print("\n".join(["failed:", *wrong]), file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
