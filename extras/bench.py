"""How fast is it? Ratios measured in one run on one machine.

    python -m extras.bench                              # seven minutes on two cores
    python -m extras.bench step search                  # some of it
    python -m extras.bench video --videos DIR           # extraction, from real videos

Each row is compared with the plain way of doing the same, or with what the machine can do. A
different result is an error. Weights are random, because speed does not depend on them.
"""
import support  # first, for a Ctrl-C while torch is imported
import argparse
import json
import math
import multiprocessing
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import mmn
import train
import video
from extras.index import Index
from retrieve import contrast, search_intervals
from support import cropped, options, parallel
from support.errors import Mistake, reported


def seconds_of(work, device: torch.device = torch.device("cpu"), at_least: float = 3.0) -> float:
    """Mean seconds of `work()`, repeated for `at_least` seconds after one warm-up run."""
    work()
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < at_least:
        work()
        synchronise()
        count += 1
    return (time.perf_counter() - started) / count


def row(what: str, value: float, unit: str, ratio: float | None = None, to: str = "") -> dict:
    """A line of the table; `ratio` compares it with the line named `to`, above 1 is better."""
    return dict(what=what, value=value, unit=unit, ratio=ratio, to=to)


def same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """AssertionError if two ways of computing the same differ."""
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    assert difference <= tolerance, f"{what}: the two ways differ by {difference:.2g}"


def random_vit_b32(device: torch.device = torch.device("cpu"), small: bool = False) -> clip.CLIP:
    """A CLIP of the size of ViT-B/32; `small`: of two narrow layers, with features as wide."""
    torch.manual_seed(0)
    resolution, patch, width, layers, C = (32, 8, 64, 2, 64) if small else (224, 32, 768, 12, 512)
    visual = clip.VisionTransformer(resolution, patch, width, layers, width // 64, 512,
                                    clip.QuickGELU)
    model = clip.CLIP(visual, 49408, 77, C, layers, C // 64, 512, clip.QuickGELU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()


@torch.no_grad()
def bench_text(given: argparse.Namespace) -> list[dict]:
    """The text tower on the sentences of a batch, against running all 77 positions."""
    device = parallel.pick_device(given.device)
    model = random_vit_b32(device)

    def all_positions(tokens: Tensor) -> Tensor:
        x = model.states(tokens)[torch.arange(len(tokens)), tokens.argmax(1)]
        return model.ln_final(x) @ model.text_projection

    rows = []
    for name in ("charades", "activitynet"):
        sentences = [s.sentence for s in data.read_annotations(name, "train", given.annotations)]
        chosen = np.random.default_rng(0).choice(len(sentences), 112, replace=False)
        tokens = clip.tokenize([sentences[i] for i in chosen], truncate=True).to(device)
        same(model.encode_text(tokens), all_positions(tokens), "text tower")
        plain = seconds_of(lambda: all_positions(tokens), device)
        ours = seconds_of(lambda: model.encode_text(tokens), device)
        L = int(tokens.argmax(1).max()) + 1
        rows += [row(f"text: {name}, 112 sentences, 77 positions", 1000 * plain, "ms"),
                 row(f"text: {name}, to the last end token ({L})", 1000 * ours, "ms",
                     plain / ours, "77")]
    return rows


def random_batch(config: train.Config) -> tuple[Tensor, ...]:
    """Features of real shape, two sentences per video: frames, text, video_of, iou, moments_sec."""
    generator, B, S = torch.Generator().manual_seed(0), config.batch, 2 * config.batch
    frames = F.normalize(torch.randn(B, config.frames, 512, generator=generator), dim=2)
    text = F.normalize(torch.randn(S, 512, generator=generator), dim=1)
    moments_sec = (30 * torch.rand(S, 2, generator=generator)).sort(1).values
    iou = mmn.iou_map(moments_sec, torch.full((S,), 30.0), config.num_clips)
    return frames, text, torch.arange(B).repeat_interleave(2), iou, moments_sec


def random_tokens(count: int) -> Tensor:
    """Sentences of twelve random words, [count, 77]."""
    words = torch.randint(1, 49406, (count, 12), generator=torch.Generator().manual_seed(0))
    return F.pad(F.pad(F.pad(words, (1, 0), value=49406), (0, 1), value=49407), (0, 63))


def whole_batch(config: train.Config, patches: bool) -> data.Batch:
    """random_batch as train.terms reads it, each query with the same number of words."""
    frames, _, video_of, iou, moments_sec = random_batch(config)
    S, generator = len(video_of), torch.Generator().manual_seed(1)
    seen = F.normalize(torch.randn(config.batch, 8, 512, 7, 7, generator=generator), dim=2)
    return data.Batch([str(i) for i in range(config.batch)], frames, seen if patches else None,
                      random_tokens(3 * S).view(3, S, 77), torch.ones(3, S, dtype=torch.bool),
                      video_of, moments_sec, torch.full((S,), 30.0), iou, torch.arange(S))


def retriever_of(config: train.Config) -> mmn.MMN:
    torch.manual_seed(0)
    pool = config.frames // config.num_clips
    return mmn.MMN(512, config.num_clips, pool, pool, config.pool_counts, config.kernel,
                   config.layers, config.hidden, config.joint)


def one_step(published: bool, config: train.Config) -> tuple[Tensor, float, float, float]:
    """Losses [2], seconds of forward and backward, and the peak memory of this process in GiB."""
    frames, text, video_of, iou, moments_sec = random_batch(config)
    model = retriever_of(config)
    if not published:
        cropped.speed_up(model)
    started = time.perf_counter()
    losses = model.losses(model.outputs(frames, text, video_of), model.at_candidates(iou), video_of,
                          moments_sec, config).values()
    between = time.perf_counter()
    sum(losses).backward()
    ended = time.perf_counter()
    status = pathlib.Path("/proc/self/status").read_text()      # ru_maxrss starts at the parent's
    gib = int(status.split("VmHWM:")[1].split()[0]) / 2 ** 20
    return torch.stack([*losses]).detach(), between - started, ended - between, gib


def bench_step(given: argparse.Namespace) -> list[dict]:
    """A training step of the retriever at the setting of Charades-STA: support/cropped.py against
    the published convolution of mmn.py, each in a process, and so with a memory, of its own."""
    config, results = train.Config(dataset="charades"), []
    for published in (True, False):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(one_step, (published, config)))
    (theirs, *published), (ours, *mine) = results
    same(ours, theirs, "losses of a step")
    rows = []
    for k, (what, unit) in enumerate((("forward", "s"), ("backward", "s"), ("memory", "GiB"))):
        rows += [row(f"step: published convolution, {what}", published[k], unit),
                 row(f"step: ours, {what}", mine[k], unit, published[k] / mine[k], "published")]
    return rows


def greedy_nms(moments: Tensor, scores: Tensor, top_k: int, nms: float) -> Tensor:
    """The published way: sort a query's candidates, and let each remaining one drop those after it
    that overlap it by more than `nms`. [top_k, 2]"""
    moments = moments[scores.argsort(descending=True)]
    dropped = torch.zeros(len(moments), dtype=torch.bool)
    for i in range(len(moments) - 1):
        if not dropped[i]:
            dropped[i + 1:] |= mmn.interval_iou(moments[i], moments[i + 1:]) > nms
    return moments[~dropped][:top_k]


def bench_nms(given: argparse.Namespace) -> list[dict]:
    """The five best of ActivityNet-Captions' 1,104 candidates, for 256 queries."""
    model = retriever_of(train.configure(dataset="activitynet"))
    scores = torch.rand(256, 64, 64, generator=torch.Generator().manual_seed(0))
    durations_sec = torch.full((256,), 64.0)
    i, j = model.candidates.nonzero().unbind(1)
    moments = torch.stack([i, j + 1], 1).float()

    def theirs() -> Tensor:
        return torch.stack([greedy_nms(moments, s[model.candidates], 5, 0.5) for s in scores])

    def ours() -> Tensor:
        return mmn.decode(scores, durations_sec, 5, 0.5, model.candidates)[..., :2]

    same(ours(), theirs(), "moments after NMS", 0)
    plain, fast = seconds_of(theirs), seconds_of(ours)
    return [row("NMS: 256 queries, 1,104 candidates, one query at a time", 1000 * plain, "ms"),
            row("NMS: 256 queries, ours", 1000 * fast, "ms", plain / fast, "one at a time")]


def bench_search(given: argparse.Namespace) -> list[dict]:
    """A sentence in an index of a million random moments, J = 256, against reading it once."""
    J, each, count = 256, 136, 7352
    with tempfile.TemporaryDirectory() as folder:
        index = Index.__new__(Index)
        index.folder, index.mapped, index.kind = pathlib.Path(folder), None, "checkpoint"
        index.content = {"joint": J, "videos": {
            f"{i}.mp4": {"first": i * each, "rows": each} for i in range(count)}}
        rng = np.random.default_rng(0)
        for name in ("iou.f16", "contrastive.f16"):
            with open(index.folder / name, "wb") as file:
                for _ in range(count):
                    x = rng.standard_normal((each, J), dtype=np.float32)
                    x /= np.linalg.norm(x, axis=1, keepdims=True)
                    file.write(x.astype(np.float16).tobytes())
        spans = np.sort(rng.uniform(0, 30, (count * each, 2)).astype(np.float32), 1)
        (index.folder / "spans.f32").write_bytes(spans.tobytes())
        q = F.normalize(torch.randn(2, J, generator=torch.Generator().manual_seed(0)), dim=1)
        iou, _, contrastive = index.map_files()
        best = max(float(mmn.fuse(torch.sigmoid(mmn.SCORE_SCALE * a.float() @ q[0]),
                                  b.float() @ q[1]).max())
                   for a, b in zip(iou.split(1 << 16), contrastive.split(1 << 16)))
        ours = index.search(*q)[0].moment.score
        same(torch.tensor(ours), torch.tensor(best), "best moment", 1e-6)
        raw = [x.view(torch.int16).numpy() for x in (iou, contrastive)]
        reading = seconds_of(lambda: [part.max() for x in raw for part in np.array_split(x, 32)])
        searching = seconds_of(lambda: index.search(*q))
    return [row("search: reading the index once", 1000 * reading, "ms"),
            row(f"search: {count * each:,} moments (61 h of video)", 1000 * searching, "ms",
                reading / searching, "reading")]


def bench_zero_shot(given: argparse.Namespace) -> list[dict]:
    """CLIP alone: a folder of videos of 30 s, and one video of two hours, at two frames per second,
    against averaging the cosines of every moment."""
    rows = []
    for what, videos, frames, longest in (("61 h in 7,352 videos", 7352, 60, 30),
                                          ("one video of 2 h", 1, 14_400, 600)):
        x = F.normalize(torch.randn(videos * frames, 512), dim=1)
        q, halves = F.normalize(torch.randn(512), dim=0), x.half()
        moments = videos * sum(frames - k + 1 for k in range(2, longest + 1))

        def search() -> Tensor:
            similarity = torch.cat([part.float() @ q for part in halves.split(1 << 16)])
            return torch.cat([search_intervals(part, 2, longest) for part in
                              similarity.view(videos, frames).split(256)])

        def averages() -> Tensor:
            similarity = torch.cat([part.float() @ q for part in halves.split(1 << 16)])
            similarity = similarity.view(videos, 1, frames).double()
            total, best = similarity.sum(2), torch.full((videos,), -math.inf, dtype=torch.double)
            for k in range(2, longest + 1):
                inside = k * F.avg_pool1d(similarity, k, 1)[:, 0]
                best = best.maximum(contrast(total, inside, torch.tensor(k), frames).amax(1))
            return best

        same(search()[:, 0, 2], averages(), "best moments", 1e-9)
        plain, ours = seconds_of(averages), seconds_of(search)
        rows += [row(f"zero-shot: {what}, averages", 1000 * plain, "ms"),
                 row(f"zero-shot: {what}, {moments:,} moments", 1000 * ours, "ms", plain / ours,
                     "averages")]
    return rows


def bench_video(given: argparse.Namespace) -> list[dict]:
    """Extraction of 32 frames per video, against its halves: file -> frames, frames -> features."""
    device, T = parallel.pick_device(given.device), 32
    precision = video.PRECISIONS["fp16" if device.type == "cuda" else "float32"]
    good = {}
    for name, path in video.find_files(given.videos, video.VIDEOS).items():
        decoded = video.attempt(path, T, 224)
        if decoded.frames is None:
            print(f"skipped: {decoded.reason}", file=sys.stderr)
        else:
            good[name], pixels = path, torch.from_numpy(decoded.frames)
    if not good:
        raise Mistake(f"{given.videos} contains no readable video; name a folder with --videos")
    many = {f"{name} {i}": path for i in range(4) for name, path in good.items()}
    workers, frames = max(1, (os.cpu_count() or 2) - 1), len(many) * T
    started = time.perf_counter()
    for _ in video.decode_all(many, T, 224, workers):
        pass
    decoding = time.perf_counter() - started
    model, batch = random_vit_b32(device), 256 if device.type == "cuda" else 32
    images = pixels.repeat(batch // T, 1, 1, 1)
    encoding = frames / batch * seconds_of(
        lambda: video.encode_frames(model, images, batch, precision), device, 6.0)
    with tempfile.TemporaryDirectory() as folder:
        store = data.FeatureStore(folder, video.made_by(model, "random", "", T, T))
        started = time.perf_counter()
        video.extract(store, model, many, list(many), set(), workers, batch, precision)
        total = time.perf_counter() - started
    return [row(f"video: decode, {workers} processes", frames / decoding, "frames/s"),
            row("video: encode, ViT-B/32", frames / encoding, "frames/s"),
            row("video: extraction, decoding beside encoding", frames / total, "frames/s",
                max(decoding, encoding) / total, "the slower half")]


BENCHES = {"text": bench_text, "step": bench_step, "nms": bench_nms, "search": bench_search,
           "zero-shot": bench_zero_shot, "video": bench_video}


def hardware(device: torch.device) -> str:
    """The machine in one line."""
    name, cpu = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    if cpu.exists():
        name = cpu.read_text().split("model name")[1].split("\n")[0].strip("\t: ")
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{os.cpu_count()} cores of {name}{gpu}, torch {torch.__version__}"


def main() -> None:
    arguments = options.parser("speed, in ratios", prog="python -m extras.bench")
    add = arguments.add_argument
    add("bench", nargs="*", help=f"{', '.join(BENCHES)} (default: all)")
    add("--annotations", default="data", help="folder with the published annotations, for text "
                                              "(from: python data.py charades, activitynet)")
    add("--videos", default="videos", help="folder of video files, for video")
    add("--device", **options.DEVICE)
    add("--json", action="store_true", help="print json")
    given = arguments.parse_args()
    with reported():
        if unknown := set(given.bench) - BENCHES.keys():
            raise Mistake(f"there is no benchmark {min(unknown)!r}; choose from "
                          f"{', '.join(BENCHES)}")
        rows, machine = [], hardware(parallel.pick_device(given.device))
        for name in given.bench or BENCHES:
            try:
                rows += BENCHES[name](given)
            except Mistake as error:
                if given.bench:
                    raise
                print(f"skipped: {name}: {error}", file=sys.stderr)
        if given.json:
            print(json.dumps({"machine": machine, "rows": rows}))
            return
        print(machine)
        for line in rows:
            ratio = f"{line['ratio']:9.2f} x {line['to']}" if line["ratio"] else ""
            print(f"{line['what']:56s}  {line['value']:9,.4g} {line['unit']:9}{ratio}".rstrip())


if __name__ == "__main__":
    main()
