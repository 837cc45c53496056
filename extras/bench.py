"""How fast is it, on the CPU or on a GPU? Compare the ratios of one run, not the times of two.

    python -m extras.bench --device cpu                 # a few minutes on two cores
    python -m extras.bench --device cuda                # with the published batch size
    python -m extras.bench towers search                # some of it
    python -m extras.bench --videos DIR                 # with extraction from these videos

Weights and features are random, in the sizes of ViT-B/32 and of the published settings. Whether a
GPU computes the same as the CPU is tested by: pytest --device cuda tests/test_device.py
"""
import functools
import os
import platform
import tempfile
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import benchmark

import clip
import data
import mmn
import retrieve
import train
import video
from extras import features
from extras.search import cosines
from support import files, options, parallel
from support.errors import Mistake, reported

BENCHMARKS = ("towers", "steps", "search", "video")


def seconds_of(work, at_least: float = 3.0) -> float:
    """The fastest of the runs of `work()` in `at_least` seconds, after a warm-up."""
    # waits for a GPU; without num_threads it would measure a single thread
    timer = benchmark.Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    times = timer.blocked_autorange(min_run_time=at_least).times
    return min(times)               # not the mean: other programs can only slow a run down


def report(what: str, value: float, unit: str, comparison: str = "") -> None:
    print(f"{what:54s} {value:9,.4g} {unit:11s} {comparison}".rstrip(), flush=True)


def random_clip() -> clip.CLIP:
    """A CLIP of ViT-B/32's size."""
    torch.manual_seed(0)
    visual = clip.VisionTransformer(resolution=224, patch=32, width=768, layers=12, heads=12,
                                    output=512, activation=clip.QuickGELU)
    model = clip.CLIP(visual, 49408, 77, 512, 12, 8, 512, clip.QuickGELU)   # 12 layers, 8 heads
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.eval()


def random_batch(config: train.Config) -> data.Batch:
    """A batch of the size of `config`, with two sentences per video."""
    torch.manual_seed(0)
    B = config.batch
    S = 2 * B
    moments_sec = (30 * torch.rand(S, 2)).sort(1).values                # [S, 2]
    durations_sec = torch.full((S,), 30.0)
    return data.Batch(
        videos=[f"video {i}" for i in range(B)],
        frames=F.normalize(torch.randn(B, config.frames, 512), dim=2),  # [B, T, D]
        patches=F.normalize(torch.randn(B, 32, 512, 7, 7), dim=2),      # [B, T', D', H, W]
        tokens=clip.tokenize(["door " * 11] * 3 * S).view(3, S, 77),
        spoken=torch.ones(3, S, dtype=torch.bool),
        video_of=torch.arange(B).repeat_interleave(2),                  # [S]
        moments_sec=moments_sec,
        durations_sec=durations_sec,
        iou=mmn.iou_map(moments_sec, durations_sec, config.num_clips),  # [S, N, N]
        index=torch.arange(S))


def random_model(config: train.Config) -> train.Model:
    """The model that train.py would train, for features of ViT-B/32."""
    text = random_clip()
    text.visual = None              # frozen; its features are read from the store
    made = {"resolution": 224, "width": 512, "patch_width": 512, "grid": 7, "patch_frames": 32}
    return train.Model(config, text, made).train()


@torch.no_grad()
def bench_towers(device: torch.device) -> None:
    """The image tower, and the text tower on sentences of usual and of full length."""
    count = 64                      # frames, and sentences
    model = random_clip().to(device)
    images = torch.rand(count, 3, 224, 224, device=device)
    seconds = seconds_of(lambda: model.encode_image(images))            # features and patches
    report("towers: image tower", count / seconds, "frames/s")
    seconds = {}
    for words in (75, 11):          # as many as CLIP reads; a usual sentence
        tokens = clip.tokenize(["door " * words] * count).to(device)    # [64, 77]
        seconds[words] = seconds_of(lambda: model.encode_text(tokens))
        report(f"towers: text tower, {words + 2} tokens", count / seconds[words], "sentences/s",
               f"{seconds[75] / seconds[words]:.2f} x 77 tokens")


def bench_steps(device: torch.device) -> None:
    """A training step at both published settings. That of mmn is also stage 2 of vdi-staged, and is
    compared with itself with the published convolution instead of support/cropped.py."""
    B = 2                                   # on the CPU, where 48 videos take minutes
    if device.type == "cuda":
        B = 48                              # as published
    for dataset in ("charades", "activitynet"):
        for method in ("mmn", "vdi"):
            config = train.configure(dataset=dataset, method=method, batch=B)
            model = random_model(config).to(device)
            batch = random_batch(config).to(device)
            optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, **train.ADAMW)

            def step() -> None:             # as in train.py, without its checks
                losses = train.terms(model, batch, config)
                optimiser.zero_grad()
                train.total_loss(losses, config, epoch=0).backward()
                optimiser.step()

            seconds = seconds_of(step)
            report(f"step: {dataset}, {method}, {B} videos", seconds, "s")
            if method == "mmn":
                cells = model.retriever.candidates.cpu()                # [N, N]
                convolution = mmn.Convolution(cells, config.kernel, config.layers)
                model.retriever.convolution = convolution.to(device)
                published_seconds = seconds_of(step)
                report(f"step: {dataset}, mmn, published convolution", published_seconds, "s",
                       f"{published_seconds / seconds:.2f} x mmn")


@torch.no_grad()
def bench_search(device: torch.device) -> None:
    """One sentence against many moments of MMN in float16, as an index stores them (J = 256). And
    CLIP alone against all intervals of a video of two hours, which runs on the CPU."""
    count = 500_000                         # 256 MB for each head, more than a cache holds
    iou = F.normalize(torch.randn(count, 256, device=device), dim=1).half()             # [R, J]
    contrastive = F.normalize(torch.randn(count, 256, device=device), dim=1).half()     # [R, J]

    def best() -> Tensor:
        overlap = torch.sigmoid(mmn.SCORE_SCALE * cosines(iou, iou[0].float()))         # [R]
        return mmn.fuse(overlap, cosines(contrastive, contrastive[0].float())).topk(10).indices

    seconds = seconds_of(best)              # twice a pass over 256 MB; the rest is small
    report(f"search: ten best of {count:,} moments", 1000 * seconds, "ms")
    similarity = torch.randn(1, 2 * 60 * 60 * 2)        # two hours at two frames per second
    seconds = seconds_of(lambda: retrieve.search_intervals(similarity, 2, 600))
    report("search: CLIP alone, a video of 2 h (cpu)", 1000 * seconds, "ms")


def bench_video(device: torch.device, folder: str) -> None:
    """Extraction of 32 frames per video, against the slower of its halves."""
    T = 32
    paths = files.find_files(folder, video.VIDEOS)
    read = functools.partial(video.sample_frames, count=T, resolution=224)
    started = time.perf_counter()
    decoded = [result.value for _, result in features.read_all(paths, read) if result.value]
    decoding = time.perf_counter() - started
    if not decoded:
        raise Mistake(f"{folder} contains no readable video; name another folder with --videos")
    model = random_clip().to(device)                                    # reads 224 x 224 pixels
    pixels, _ = decoded[0]                                              # [T, 3, R, R]
    precision = torch.float16 if device.type == "cuda" else torch.float32      # as in data.py
    encoding = len(decoded) * seconds_of(lambda: video.encode_frames(model, pixels, T, precision))
    with tempfile.TemporaryDirectory() as target:
        store = data.FeatureStore(target, video.made_by(model, "random", "", T))
        started = time.perf_counter()
        features.extract(store, model, paths, list(paths), set(), precision)
        extraction = time.perf_counter() - started
    report("video: decoding", len(decoded) / decoding, "videos/s")
    report("video: encoding", len(decoded) / encoding, "videos/s")
    report("video: extraction, decoding beside encoding", len(decoded) / extraction, "videos/s",
           f"{max(decoding, encoding) / extraction:.2f} x the slower half")


def main() -> None:
    parser = options.parser("measure the speed, in ratios", prog="python -m extras.bench")
    parser.add_argument("names", nargs="*", default=BENCHMARKS, metavar="benchmark",
                        help=f"{', '.join(BENCHMARKS)} (default: all)")
    parser.add_argument("--device", **options.DEVICE)
    parser.add_argument("--videos", help="folder of video files, for the benchmark video")
    given = parser.parse_args()
    with reported():
        if not set(given.names) <= set(BENCHMARKS):
            raise Mistake(f"unknown benchmark; choose from {', '.join(BENCHMARKS)}")
        device = parallel.pick_device(given.device)
        print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
              f"{torch.get_num_threads()} threads, torch {torch.__version__}, device {device}")
        if device.type == "cuda":
            print(torch.cuda.get_device_name(device))
        if "towers" in given.names:
            bench_towers(device)
        if "steps" in given.names:
            bench_steps(device)
        if "search" in given.names:
            bench_search(device)
        if "video" in given.names and given.videos:
            bench_video(device, given.videos)
        elif "video" in given.names:
            print("video: skipped, because it needs a folder of videos; name one with --videos")


if __name__ == "__main__":
    main()
