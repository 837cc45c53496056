"""How fast it is: figures measured in one run on one machine, so that they can be compared.

    python bench.py video --videos DIR              # decoding against encoding
    python bench.py video --videos DIR --json
    python bench.py search                          # a sentence in an index of a million moments

Weights are random: speed does not depend on them. The README's performance section is what this
prints. Left out: anything that decides whether a result is right; that is what tests are for.
"""
import argparse
import json
import os
import pathlib
import platform
import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn

import clip
import data
import retrieve
import video


def random_vit_b32(device: torch.device) -> clip.CLIP:
    """A CLIP of the sizes of ViT-B/32."""
    torch.manual_seed(0)
    visual = clip.VisionTransformer(224, 32, 768, 12, 12, 512, clip.QuickGELU)
    model = clip.CLIP(visual, 49408, 77, 512, 12, 8, 512, clip.QuickGELU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()


def seconds_of(work, device: torch.device, at_least: float = 3.0) -> float:
    """Mean seconds of `work()`, repeated for `at_least` seconds after one call that does not
    count."""
    work()
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    count, started = 0, time.perf_counter()
    while not count or time.perf_counter() - started < at_least:
        work()
        synchronise()
        count += 1
    return (time.perf_counter() - started) / count


def bench_video(options: argparse.Namespace) -> list[dict]:
    """Frames a second of the two halves of extraction: file -> frames [T, 3, 224, 224], by 32
    frames a video, and frames -> features, by batches."""
    device, T = data.pick_device(options.device), 32
    rows, good = [], {}
    for name, path in data.find_files(options.videos, data.VIDEOS).items():
        try:
            pixels, duration_sec = video.sample_frames(path, T, 224)
        except video.VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        good[name] = path
        seconds = seconds_of(lambda: video.sample_frames(path, T, 224), device, 1.0)
        rows.append({"what": f"decode {path.name} ({duration_sec:.0f} s), 1 process",
                     "frames/s": T / seconds, "videos/s": 1 / seconds})
    if not good:
        raise FileNotFoundError(f"{options.videos} holds no video that can be read")
    for workers in sorted({1, max(1, (os.cpu_count() or 2) - 1), os.cpu_count() or 2}):
        many = {f"{name} {i}": path for i in range(4 * workers) for name, path in good.items()}
        decoding = video.decode_all(many, T, 224, workers)
        next(decoding)                                  # the processes have started
        started = time.perf_counter()
        count = sum(1 for _ in decoding)
        seconds = time.perf_counter() - started
        rows.append({"what": f"decode all, {workers} processes", "frames/s": count * T / seconds,
                     "videos/s": count / seconds})
    model = random_vit_b32(device)
    precisions = ["float32"] if device.type == "cpu" else ["float32", "fp16", "bf16"]
    for precision in precisions:
        for batch in (32, 128) if device.type == "cpu" else (32, 256, 1024):
            frames = pixels.repeat(batch // T, 1, 1, 1)
            seconds = seconds_of(lambda: video.encode_frames(model, frames, batch,
                                                             video.PRECISIONS[precision]), device)
            rows.append({"what": f"encode ViT-B/32 {precision}, batch {batch}",
                         "frames/s": batch / seconds, "videos/s": batch / T / seconds})
    return rows


def bench_search(options: argparse.Namespace) -> list[dict]:
    """A sentence in an index of a million moments of random embeddings, J = 256, against reading
    the index once from memory."""
    rows, J, each = 1_000_000, 256, 136
    with tempfile.TemporaryDirectory() as folder:
        index = retrieve.Index.__new__(retrieve.Index)
        index.folder, index.mapped, n = pathlib.Path(folder), None, rows // each
        index.content = {"joint": J, "videos": {
            f"{i}.mp4": {"first": i * each, "rows": each, "duration_sec": 30.0} for i in range(n)}}
        rng = np.random.default_rng(0)
        for name in ("iou.f16", "contrastive.f16"):
            with open(index.folder / name, "wb") as file:
                for _ in range(n):
                    x = rng.standard_normal((each, J), dtype=np.float32)
                    x /= np.linalg.norm(x, axis=1, keepdims=True)
                    file.write(x.astype(np.float16).tobytes())
        spans = np.sort(rng.uniform(0, 30, (n * each, 2)).astype(np.float32), 1)
        (index.folder / "spans.f32").write_bytes(spans.tobytes())
        q = torch.nn.functional.normalize(torch.randn(2, J), dim=1)
        both = [np.memmap(index.folder / name, np.int16, "r")
                for name in ("iou.f16", "contrastive.f16")]

        def read() -> None:
            for moments in both:
                for block in np.array_split(moments, 32):
                    block.max()

        device = torch.device("cpu")
        reading = seconds_of(read, device)
        searching = seconds_of(lambda: index.search(*q), device)
        size = sum(moments.nbytes for moments in both) + spans.nbytes
    hours = n * 30 / 3600
    return [{"what": f"read {size / 1e6:.0f} MB once", "ms": 1000 * reading, "ratio": 1.0},
            {"what": f"search {n * each:,} moments ({hours:.0f} hours of video at 30 s a window)",
             "ms": 1000 * searching, "ratio": searching / reading},
            {"what": f"10,000 hours, by these figures: {size / 1e9 * 1e4 / hours:.0f} GB",
             "ms": 1000 * searching * 1e4 / hours, "ratio": searching / reading}]


BENCHES = {"video": bench_video, "search": bench_search}


def hardware(device: torch.device) -> str:
    """The machine in a line."""
    name = platform.processor() or platform.machine()
    cpu = pathlib.Path("/proc/cpuinfo")
    if cpu.exists():
        name = next((line.split(":")[1].strip() for line in cpu.read_text().splitlines()
                     if line.startswith("model name")), name)
    gpu = f", {torch.cuda.get_device_name(device)}" if device.type == "cuda" else ""
    return f"{os.cpu_count()} cores of {name}{gpu}, torch {torch.__version__}"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("bench", choices=BENCHES)
    arguments.add_argument("--videos", default="videos", help="folder of video files")
    arguments.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    arguments.add_argument("--json", action="store_true", help="print json")
    options = arguments.parse_args()
    try:
        machine = hardware(data.pick_device(options.device))
        rows = BENCHES[options.bench](options)
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if options.json:
        print(json.dumps({"bench": options.bench, "machine": machine, "rows": rows}))
        return
    print(machine)
    width = max(len(row["what"]) for row in rows)
    columns = [name for name in rows[0] if name != "what"]
    print(" " * width + "".join(f"  {name:>10}" for name in columns))
    for row in rows:
        print(row["what"].ljust(width) + "".join(f"  {row[name]:10.1f}" for name in columns))


if __name__ == "__main__":
    main()
