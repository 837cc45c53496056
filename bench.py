"""How fast is it? Ratios measured in one run on one machine.

    python bench.py                                 # what needs no GPU, five minutes on two cores
    python bench.py step search                     # some of it
    python bench.py video --videos DIR              # extraction, of real videos
    python bench.py train --device cuda             # training at the settings of both datasets
    python bench.py stages                          # videos first, then moments in the best of them
    python bench.py --json

Each row is set against something else: the plain way of doing the same, a peer, or what the machine
can do. Where both compute something, the results are compared before any time is taken, and another
result is an error. Weights are random (speed does not depend on them). The README's section Speed
is what this prints. Left out: anything that decides whether a result is right; that is what
tests are for.
"""
import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import platform
import resource
import sys
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import clip2video
import command
import data
import mmn
import retrieve
import shapes
import train
import video


# ------------------------------------------------------------------------------------------- clocks

def seconds_of(work, device: torch.device = torch.device("cpu"), at_least: float = 3.0) -> float:
    """Mean seconds of `work()`, repeated for `at_least` seconds after one that is not counted."""
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
    """A line of the table; `ratio` is how this compares with the line named `to`."""
    return {"what": what, "value": value, "unit": unit, "ratio": ratio, "to": to}


def same(ours: Tensor, theirs: Tensor, what: str, tolerance: float = 1e-5) -> None:
    """AssertionError where two ways of computing the same do not."""
    difference = (ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)
    if not difference <= tolerance:
        raise AssertionError(f"{what}: the two ways differ by {difference:.2g}, so that comparing "
                             f"their speed says nothing")


# ------------------------------------------------------------------------------------------ queries

def queries_of(options: argparse.Namespace, *names: str) -> list[str]:
    """The sentences of published datasets, from --annotations."""
    for name in names:
        missing = [split for split in data.splits(name, options.annotations)
                   if not data.annotation_file(name, split, options.annotations).exists()]
        if missing:
            raise FileNotFoundError(f"there are no annotations of {name} in {options.annotations}; "
                                    f"get them with: python data.py {name}")
    return [sample.sentence for name in names for split in data.splits(name, options.annotations)
            for sample in data.read_annotations(name, split, options.annotations)]


def bench_tokens(options: argparse.Namespace) -> list[dict]:
    """CLIP's byte-pair encoding of all published sentences, against the same without memory."""
    sentences = queries_of(options, "charades", "activitynet")
    some = sentences[::50]

    def without() -> list[tuple[int, ...]]:
        remembered, clip.word_ids = clip.word_ids, clip.word_ids.__wrapped__
        try:
            return [clip.sentence_ids.__wrapped__(sentence) for sentence in some]
        finally:
            clip.word_ids = remembered

    if without() != [clip.sentence_ids(sentence) for sentence in some]:
        raise AssertionError("tokens: remembered sentences have other tokens")
    plain = len(some) / seconds_of(without, at_least=1.0)
    clip.sentence_ids.cache_clear(), clip.word_ids.cache_clear()
    started = time.perf_counter()
    for sentence in sentences:
        clip.sentence_ids(sentence)
    first = len(sentences) / (time.perf_counter() - started)
    again = len(sentences) / seconds_of(lambda: [clip.sentence_ids(s) for s in sentences],
                                        at_least=1.0)
    name = f"tokens: {len(sentences):,} sentences"
    return [row("tokens: byte pairs of every word anew", plain, "sentences/s"),
            row(f"{name}, words remembered", first, "sentences/s", first / plain, "anew"),
            row(f"{name}, seen before", again, "sentences/s", again / plain, "anew")]


def random_vit_b32(device: torch.device = torch.device("cpu")) -> clip.CLIP:
    """A CLIP of the sizes of ViT-B/32."""
    torch.manual_seed(0)
    visual = clip.VisionTransformer(224, 32, 768, 12, 12, 512, clip.QuickGELU)
    model = clip.CLIP(visual, 49408, 77, 512, 12, 8, 512, clip.QuickGELU)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    return model.to(device).eval()


@torch.no_grad()
def bench_text(options: argparse.Namespace) -> list[dict]:
    """The text tower on a batch's sentences, against running all 77 positions."""
    device = data.pick_device(options.device)
    model = random_vit_b32(device)

    def all_positions(tokens: Tensor) -> Tensor:
        x = model.token_embedding(tokens) + model.positional_embedding
        x = model.transformer(x, causal=True)[torch.arange(len(x)), tokens.argmax(1)]
        return model.ln_final(x) @ model.text_projection

    rows = []
    for name in ("charades", "activitynet"):
        sentences = queries_of(options, name)
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


# -------------------------------------------------------------------------------------- image tower

@torch.no_grad()
def bench_image(options: argparse.Namespace) -> list[dict]:
    """ViT-B/32 on 32 frames, float32, against Hugging Face's, and its matrix products alone."""
    transformers = video.need("transformers", "the bench image, which compares with its CLIP,")
    device, B = data.pick_device(options.device), 32
    torch.manual_seed(0)
    theirs = transformers.CLIPModel(transformers.CLIPConfig()).to(device).eval()
    ours = clip.build(clip.from_hugging_face(theirs.state_dict())).to(device)
    images = torch.randn(B, 3, 224, 224, device=device)

    def peer() -> Tensor:
        return theirs.visual_projection(theirs.vision_model(images).pooler_output)

    same(ours.encode_image(images)[0], peer(), "image tower")

    # [m, k] x [k, n] of the patches, of 12 blocks and of the projection; 12 heads of 64
    shapes = [(B * 49, 3072, 768), *[(B * 50, 768, 2304), (B * 50, 768, 768), (B * 50, 768, 3072),
                                     (B * 50, 3072, 768)] * 12, (B * 50, 768, 512)]
    pairs = [(torch.randn(m, k, device=device), torch.randn(k, n, device=device))
             for m, k, n in shapes]
    q, k = (torch.randn(B * 12, 50, 64, device=device) for _ in range(2))

    def products() -> None:
        for a, b in pairs:
            a @ b
        for _ in range(12):
            torch.bmm(torch.bmm(q, k.transpose(1, 2)), k)

    def class_token_only() -> Tensor:
        visual = ours.visual
        x = visual.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(B, 1, -1), x], 1)
        x = visual.transformer(visual.ln_pre(x + visual.positional_embedding))
        return visual.ln_post(x[:, 0]) @ visual.proj

    times = [seconds_of(work, device, 6.0) for work in
             (products, peer, class_token_only, lambda: ours.encode_image(images))]
    bound, plain, without, whole = times
    name, to = "image: ViT-B/32 float32, ", "Hugging Face"
    return [row(name + "its matrix products alone", B / bound, "images/s"),
            row(name + to, B / plain, "images/s", bound / plain, "products"),
            row(name + "ours, class token only", B / without, "images/s", plain / without, to),
            row(name + "ours, with patches", B / whole, "images/s", plain / whole, to)]


# ------------------------------------------------------------------------------------ training step

def published_losses(model: mmn.MMN, frames: Tensor, text: Tensor, video_of: Tensor, iou: Tensor,
                     moments_sec: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 6-9 by MMN's published algorithm, with the weights of `model`: the whole padded map is
    convolved, and losses are taken video by video and sentence by sentence. Two means, [] each."""
    N, k, L = model.num_clips, model.convs[0].kernel_size[0], len(model.convs)
    x = F.avg_pool1d(frames.transpose(1, 2), model.pool_kernel, model.pool_stride)
    grid = x.new_zeros(*x.shape[:2], N, N)
    for starts, ends in mmn.sparse_cells(N, model.pool_counts):
        for i, j in zip(starts.tolist(), ends.tolist()):
            grid[:, :, i, j] = x[:, :, i:j + 1].amax(2)
    x, valid = grid, model.candidates[None, None].float()
    for layer, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        pad = (k - 1) * L // 2 if layer == 0 else 0
        x = F.conv2d(x, conv.weight, conv.bias, padding=pad)
        x = F.batch_norm(x, None, None, norm.weight, norm.bias, True)
        count = F.conv2d(valid, torch.ones(1, 1, k, k), padding=pad)
        valid = (count > 0).float()
        x = F.relu(x) * valid / count.clamp(min=1)
    overlaps = F.normalize(model.iou_moment(x), dim=1)                  # [B, J, N, N]
    contrasts = F.normalize(model.contrastive_moment(x), dim=1)[:, :, model.candidates]
    iou_text, contrastive_text = model.sentences(text)
    overlap_losses, contrastive_losses = [], []
    for b in range(len(frames)):
        for s in (video_of == b).nonzero()[:, 0].tolist():
            cosines = (iou_text[s][:, None, None] * overlaps[b]).sum(0)     # [N, N]
            score = torch.sigmoid(mmn.SCORE_SCALE * cosines)
            target = ((iou[s] - 0.5) / 0.5).clamp(min=0)
            overlap_losses.append(F.binary_cross_entropy(score[model.candidates],
                                                         target[model.candidates]))
            own = iou[s][model.candidates]
            best = own.argmax()
            chosen = contrasts[b, :, best]                              # [J]
            positive = (chosen @ contrastive_text[s] - 0.4) / 0.1
            negative = (own < 0.5) & (torch.arange(len(own)) != best)
            others = torch.cat([(contrasts[b].T @ contrastive_text[s])[negative],
                                *[contrasts[c].T @ contrastive_text[s]
                                  for c in range(len(frames)) if c != b]]) / 0.1
            sentences = torch.stack([chosen @ contrastive_text[t] for t in range(len(text))
                                     if t != s and (video_of[t] != b or mmn.interval_iou(
                                         moments_sec[s], moments_sec[t]) < 0.5)]) / 0.1
            contrastive_losses.append(sum(torch.cat([positive[None], rest]).logsumexp(0) - positive
                                          for rest in (others, sentences)))
    return torch.stack(overlap_losses).mean(), torch.stack(contrastive_losses).mean()


def our_losses(model: mmn.MMN, frames: Tensor, text: Tensor, video_of: Tensor, iou: Tensor,
               moments_sec: Tensor) -> tuple[Tensor, Tensor]:
    """The same by mmn.py."""
    terms = model.losses(model.outputs(frames, text, video_of), model.at_candidates(iou), video_of,
                         moments_sec, train.Config())
    return terms["L_iou"], terms["L_cl"]


def random_batch(config: train.Config, device: torch.device, per_video: int = 2) -> tuple:
    """Features of real shape: frames, text, video_of, iou, moments_sec."""
    generator = torch.Generator().manual_seed(0)
    B, T, S = config.batch, config.frames, config.batch * per_video
    frames = F.normalize(torch.randn(B, T, 512, generator=generator), dim=2)
    text = F.normalize(torch.randn(S, 512, generator=generator), dim=1)
    video_of = torch.arange(B).repeat_interleave(per_video)
    moments_sec = (30 * torch.rand(S, 2, generator=generator)).sort(1).values
    iou = mmn.iou_map(moments_sec, torch.full((S,), 30.0), config.num_clips)
    return tuple(x.to(device) for x in (frames, text, video_of, iou, moments_sec))


def retriever_of(config: train.Config, device: torch.device) -> mmn.MMN:
    torch.manual_seed(0)
    pool = config.frames // config.num_clips
    return mmn.MMN(512, config.num_clips, pool, pool, config.pool_counts, config.kernel,
                   config.layers, config.hidden, config.joint).to(device)


def peak_gib() -> float:
    """The most memory that this process has had."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():         # subtle: ru_maxrss of a new process begins at that of its parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20


def one_step(published: bool, config: train.Config) -> tuple[Tensor, float, float, float]:
    """Losses [2], seconds of forward and of backward, and GiB that the process grew by at most."""
    batch = random_batch(config, torch.device("cpu"))
    model = retriever_of(config, torch.device("cpu"))
    before = peak_gib()
    started = time.perf_counter()
    losses = (published_losses if published else our_losses)(model, *batch)
    between = time.perf_counter()
    sum(losses).backward()
    ended = time.perf_counter()
    return (torch.stack(losses).detach(), between - started, ended - between, peak_gib() - before)


def bench_step(options: argparse.Namespace) -> list[dict]:
    """A training step of the retriever, forward and backward, at the setting of Charades-STA,
    against MMN's published algorithm; each in a process, and so with a memory, of its own."""
    config, results = train.Config(dataset="charades"), []
    for published in (True, False):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            results.append(pool.apply(one_step, (published, config)))
    (theirs, *published), (ours, *mine) = results
    same(ours, theirs, "losses of a step")
    name = f"step: {config.batch} videos, N={config.num_clips}, "
    rows = []
    for k, (what, unit) in enumerate((("forward", "s"), ("backward", "s"), ("memory", "GiB"))):
        rows += [row(f"{name}published algorithm, {what}", published[k], unit),
                 row(f"{name}ours, {what}", mine[k], unit, published[k] / mine[k], "published")]
    both = [sum(times[:2]) for times in (published, mine)]
    return rows + [row(f"{name}ours, forward and backward", both[1], "s", both[0] / both[1],
                       "published")]


def bench_loader(options: argparse.Namespace) -> list[dict]:
    """Reading a batch of features of Charades-STA's shape from disk (`data %` of a training)."""
    config = train.Config(dataset="charades")
    with tempfile.TemporaryDirectory() as folder:
        made = video.made_by(random_vit_b32(), "random", "", config.frames, 32)
        store = video.FeatureStore(pathlib.Path(folder), made)
        x, patches = torch.randn(32, 512), torch.randn(32, 512, 7, 7)
        samples = []
        for i in range(96):
            store.write(f"v{i}", x, patches, 30.0)
            samples += [data.Sample(f"v{i}", "a person opens the door", 3.0, 9.0, 30.0)] * 2
        store.save_manifest()
        rows = []
        for method, with_patches in (("mmn", False), ("vdi", True)):
            videos = data.Videos(samples, store, 16, data.parse.Parser("rules"), with_patches)
            loader = videos.batches(config.batch)
            seconds = seconds_of(lambda: [None for _ in loader]) / len(loader)
            rows.append(row(f"loader: {config.batch} videos for --method {method}, one process",
                            1000 * seconds, "ms"))
    return rows


# --------------------------------------------------------------------------------------- evaluation

def greedy_nms(moments: Tensor, scores: Tensor, top_k: int, nms: float) -> Tensor:
    """The published way: sort a query's candidates, and let each one that is left drop those after
    it that overlap it more than `nms`. [top_k, 2]"""
    moments = moments[scores.argsort(descending=True)]
    dropped = torch.zeros(len(moments), dtype=torch.bool)
    for i in range(len(moments) - 1):
        if not dropped[i]:
            dropped[i + 1:] |= mmn.interval_iou(moments[i], moments[i + 1:]) > nms
    return moments[~dropped][:top_k]


def bench_nms(options: argparse.Namespace) -> list[dict]:
    """R@5 of ActivityNet-Captions' 17,031 test queries: five moments a query out of 1,104. The time
    is scaled up from that of 256 queries of random scores."""
    model = retriever_of(train.configure(dataset="activitynet"), torch.device("cpu"))
    N, count, block = model.num_clips, 17_031, 256
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(block, N, N, generator=generator)       # the same for each block
    durations_sec = torch.full((block,), float(N))
    i, j = model.candidates.nonzero().unbind(1)
    moments = torch.stack([i, j + 1], 1).float()

    def theirs(n: int) -> Tensor:
        return torch.stack([greedy_nms(moments, s[model.candidates], 5, 0.5) for s in scores[:n]])

    def ours(n: int) -> Tensor:
        return mmn.decode(scores[:n], durations_sec[:n], 5, 0.5, model.candidates)[..., :2]

    same(ours(block), theirs(block), "moments after NMS", 0)
    plain = seconds_of(lambda: theirs(block)) / block * count
    fast = seconds_of(lambda: ours(block)) / block * count
    return [row(f"NMS: {count:,} queries, {len(moments):,} candidates, a query at a time", plain,
                "s"),
            row(f"NMS: {count:,} queries, ours", fast, "s", plain / fast, "a query at a time")]


def bench_search(options: argparse.Namespace) -> list[dict]:
    """A sentence in an index of a million random moments, J = 256, against reading it all once."""
    rows, J, each = 1_000_000, 256, 136
    with tempfile.TemporaryDirectory() as folder:
        index, n = retrieve.Index.__new__(retrieve.Index), rows // each
        index.folder, index.mapped = pathlib.Path(folder), None
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
        q = F.normalize(torch.randn(2, J, generator=torch.Generator().manual_seed(0)), dim=1)
        both = [np.memmap(index.folder / name, np.int16, "r")
                for name in ("iou.f16", "contrastive.f16")]

        def read() -> None:
            for moments in both:
                for block in np.array_split(moments, 32):
                    block.max()

        found = index.search(*q)
        moments = [torch.from_file(str(index.folder / name), False, n * each * J, dtype=torch.half)
                   .view(-1, J) for name in ("iou.f16", "contrastive.f16")]
        parts = zip(*(x.split(1 << 16) for x in moments))
        best = max(float(mmn.fuse(torch.sigmoid(mmn.SCORE_SCALE * a.float() @ q[0]),
                                  b.float() @ q[1]).max()) for a, b in parts)
        same(torch.tensor(found[0][1].score), torch.tensor(best), "best moment of a search", 1e-6)
        reading = seconds_of(read)
        searching = seconds_of(lambda: index.search(*q))
        size = sum(x.nbytes for x in both) + spans.nbytes
    hours = n * 30 / 3600
    return [row(f"search: reading {size / 1e6:.0f} MB once", 1000 * reading, "ms"),
            row(f"search: {n * each:,} moments ({hours:.0f} h of video, 30 s a window)",
                1000 * searching, "ms", reading / searching, "reading"),
            row(f"search: 10,000 h, {size / 1e9 * 1e4 / hours:.0f} GB, by these figures",
                searching * 1e4 / hours, "s")]


def whole_videos(images: clip.CLIP, world: str, split: str, config: clip2video.Config) -> Tensor:
    """The videos of a split of the shapes world as CLIP2Video samples them, [V, L, D]."""
    times = clip2video.sample_times(config, shapes.FRAMES)
    plans = (shapes.plan_of(shapes.seed_of(world), split, i) for i in range(shapes.SPLITS[split]))
    return torch.stack([video.encode_frames(images, shapes.film(plan, times))[0].float()
                        for plan in plans])


@torch.no_grad()
def bench_stages(options: argparse.Namespace) -> list[dict]:
    """Moments in the M videos only that CLIP2Video ranks first, against the exact search of all:
    the share of the exact ten best moments that is found, and the time. Sentences and videos are
    those of all splits of the shapes world but the training one."""
    model, config = clip2video.load(options.clip2video, options.root)
    retriever = retrieve.Retriever(options.moments, "cpu", cache=None)
    dataset = retriever.run.config["dataset"]
    store = data.open_store(dataset, retriever.run.config["clip"], options.root)
    if config.dataset != dataset:
        raise ValueError(f"{options.clip2video} was trained on {config.dataset}, {options.moments} "
                         f"on {dataset}; take two of one world")
    images = clip.load(data.clip_file(config.clip, options.root))
    splits = [split for split in shapes.SPLITS if split != "train"]
    samples = [sample for split in splits
               for sample in data.read_annotations(dataset, split, options.root)]
    names, sentences = list(dict.fromkeys(s.video for s in samples)), [
        sample.sentence for sample in samples[::10]]
    with tempfile.TemporaryDirectory() as folder:
        index = retrieve.Index(folder, options.moments)
        for name in names:
            about = store.manifest["videos"][name]
            x = torch.from_numpy(store.read(name, "frames").astype(np.float32))
            encoded = retrieve.Encoded(name, about["duration_sec"], about["seconds_per_feature"],
                                       F.normalize(x, dim=1), [0])
            index.add(name, {"duration_sec": about["duration_sec"]}, *retriever.moments(encoded))
        x = torch.cat([whole_videos(images, dataset, split, config) for split in splits])
        vectors = clip2video.joined(*model.encode_video(x, (x != 0).any(2)), config.weight)
        clip2video.save_vectors(folder, options.clip2video, {
            name: (row, [0, 0]) for name, row in zip(names, vectors)})
        ranker, texts = clip2video.Ranker(folder), list(zip(*retriever.read(sentences)))
        exact = [index.search(*text) for text in texts]
        plain = seconds_of(lambda: [index.search(*text) for text in texts]) / len(texts)
        rows = [row(f"stages: all {len(names)} videos", 1000 * plain, "ms/sentence")]
        for count in (10, 50, 100, 200, 400):
            def search() -> list:
                best = ranker.best(sentences, count)
                return [index.search(*text, among={name for name, _ in near})
                        for text, near in zip(texts, best)]

            shared = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(exact, search())])
            seconds = seconds_of(search) / len(texts)
            rows += [row(f"stages: best {count} videos", 1000 * seconds, "ms/sentence",
                         plain / seconds, "all"),
                     row(f"stages: best {count} videos, of the exact ten found", 100 * shared, "%")]
    return rows


# --------------------------------------------------------------------------------------- extraction

def bench_video(options: argparse.Namespace) -> list[dict]:
    """Extraction of 32 frames a video, against its halves alone: file -> frames, -> features."""
    device, T, repeats = data.pick_device(options.device), 32, 4
    precision = video.PRECISIONS["fp16" if device.type == "cuda" else "float32"]
    rows, good = [], {}
    for name, path in data.find_files(options.videos, data.VIDEOS).items():
        try:
            pixels, duration_sec = video.sample_frames(path, T, 224)
        except video.VideoError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        good[name] = path
        seconds = seconds_of(lambda: video.sample_frames(path, T, 224), at_least=1.0)
        rows.append(row(f"video: decode {path.name} ({duration_sec:.0f} s), one process",
                        T / seconds, "frames/s"))
    if not good:
        raise FileNotFoundError(f"{options.videos} holds no video that can be read")
    many = {f"{name} {i}": path for i in range(repeats) for name, path in good.items()}
    workers = max(1, (os.cpu_count() or 2) - 1)
    started = time.perf_counter()
    for _ in video.decode_all(many, T, 224, workers):
        pass
    decoding = time.perf_counter() - started
    model, batch = random_vit_b32(device), 256 if device.type == "cuda" else 32
    frames = pixels.repeat(batch // T, 1, 1, 1)
    encoding = len(many) * T / batch * seconds_of(
        lambda: video.encode_frames(model, frames, batch, precision), device, 6.0)
    made = video.made_by(model, "random", "", T, T)
    with tempfile.TemporaryDirectory() as folder:
        store = video.FeatureStore(pathlib.Path(folder), made)
        started = time.perf_counter()
        failed = video.extract(store, model, many, list(many), set(), workers, batch, precision)
        total = time.perf_counter() - started
    if failed:
        raise RuntimeError(f"{len(failed)} videos failed: {next(iter(failed.values()))}")
    n, slower = len(many) * T, max(decoding, encoding)
    return [*rows, row(f"video: decode all, {workers} processes", n / decoding, "frames/s"),
            row("video: encode alone", n / encoding, "frames/s"),
            row("video: extraction, decoding beside encoding", n / total, "frames/s",
                slower / total, "the slower half")]


# -------------------------------------------------------------------------- training, both datasets

def bench_train(options: argparse.Namespace) -> list[dict]:
    """Training steps with the text tower of ViT-B/32 on features of real shape: float32 (PyTorch's
    defaults, as in train.py), TF32 everywhere, and bfloat16, each plainly, channels last, and
    compiled; the share of the time that the convolutions' multiplications take at the speed of a
    large matrix product; and the losses of bfloat16 beside those of float32 over --steps steps."""
    device = data.pick_device(options.device)
    rows = []
    for name in options.settings.split(","):
        config = train.configure(dataset=name, device=str(device))
        videos, sentences = data.COUNTS[name]["train"] if name in data.COUNTS else (400, 1600)
        per_video = round(sentences / videos)
        losses = {}
        for precision in ("float32", "tf32", "bf16"):
            for layout in ("plain", "channels last", "compiled"):
                if device.type == "cpu" and (precision, layout) not in (("float32", "plain"),
                                                                        ("bf16", "plain")):
                    continue
                seconds, gib, bound, losses[precision] = time_training(
                    config, precision, layout, per_video, device, options.steps)
                what = f"train: {name}, {precision}, {layout}"
                minutes = seconds * math.ceil(videos / config.batch) / 60
                rows += [row(what, 1 / seconds, "steps/s", bound / seconds, "product bound"),
                         row(what, config.batch / seconds, "videos/s"),
                         row(what, minutes, "min/epoch"), row(what, gib, "GiB")]
        ours, reference = (losses[name][-10:].mean().item() for name in ("bf16", "float32"))
        what = f"train: {name}, loss after {options.steps} steps,"
        rows += [row(f"{what} float32", reference, ""),
                 row(f"{what} bf16", ours, "", ours / reference, "float32")]
    return rows


def time_training(config: train.Config, precision: str, layout: str, per_video: int,
                  device: torch.device, steps: int) -> tuple[float, float, float, Tensor]:
    """Seconds a step, peak GiB (0 on a CPU), seconds of its multiplications alone, losses."""
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    config = dataclasses.replace(config, method="mmn", bf16=precision == "bf16")
    torch.manual_seed(0)
    made = {"width": 512, "patch_width": 512, "grid": 7, "patch_frames": 32}
    model = train.Model(config, random_vit_b32(device), made).to(device)
    model.text.visual = None
    if layout == "channels last":
        model.retriever.to(memory_format=torch.channels_last)
    elif layout == "compiled":
        model.retriever.outputs = torch.compile(model.retriever.outputs)
    frames, _, video_of, iou, moments_sec = random_batch(config, device, per_video)
    S, generator = len(video_of), torch.Generator().manual_seed(0)
    tokens = torch.randint(1, 49000, (3, S, 77), generator=generator)
    tokens[..., 12], tokens[..., 13:] = 49407, 0
    batch = data.Batch([""] * config.batch, frames, None, tokens.to(device),
                       torch.ones(3, S, dtype=torch.bool, device=device), video_of, moments_sec,
                       torch.full((S,), 30.0, device=device), iou, torch.arange(S))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    losses = []

    def step() -> None:
        terms, _ = train.terms(model, batch, config)
        loss = train.total_loss(terms, config, 0)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimiser.step()
        losses.append(loss.detach())

    for _ in range(steps):
        step()
    seconds = seconds_of(step, device)
    gib = torch.cuda.max_memory_allocated() / 2 ** 30 if device.type == "cuda" else 0.0
    # multiplications of the convolutions, forward, and twice as many backward
    flops = 3 * sum(2 * config.batch * conv.weight.numel()
                    * model.retriever.get_buffer(f"weight{i}").shape[-1] ** 2
                    for i, conv in enumerate(model.retriever.convs))
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    speed = 2 * 4096 ** 3 / seconds_of(lambda: a @ a, device, 1.0)
    return seconds, gib, flops / speed, torch.stack(losses[:steps]).cpu()


# --------------------------------------------------------------------------------- the command line

BENCHES = {"tokens": bench_tokens, "text": bench_text, "image": bench_image, "step": bench_step,
           "loader": bench_loader, "nms": bench_nms, "search": bench_search, "video": bench_video,
           "train": bench_train, "stages": bench_stages}
ON_REQUEST = ("train", "stages")


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
    arguments = command.parser(__doc__.split("\n")[0])
    add = arguments.add_argument
    add("bench", nargs="*", help=f"{', '.join(BENCHES)}; all but the last two if none is named")
    add("--annotations", default="data", help="folder with the published annotations "
                                              "(tokens, text; data.py gets charades, activitynet)")
    add("--videos", default="videos", help="folder of video files (video)")
    add("--settings", default="charades,activitynet", help="train: of which presets")
    add("--steps", type=int, default=200, help="train: steps whose losses are compared")
    add("--clip2video", default="runs/clip2video/shapes-both/ckpt.pt", help="checkpoint (stages)")
    add("--moments", default="runs/shapes-vdi-staged/ckpt.pt", help="checkpoint (stages)")
    add("--root", default="data", help="folder of datasets (stages)")
    add("--device", **command.DEVICE)
    add("--json", action="store_true", help="print json")
    options = arguments.parse_args()
    if unknown := [name for name in options.bench if name not in BENCHES]:
        arguments.error(f"there is no bench {unknown[0]!r}; there are {', '.join(BENCHES)}")
    rows, failed = [], []
    with command.sentences():
        machine = hardware(data.pick_device(options.device))
        for name in options.bench or [name for name in BENCHES if name not in ON_REQUEST]:
            try:
                rows += BENCHES[name](options)
            except (ImportError, OSError, ValueError, RuntimeError) as error:
                failed.append(f"{name}: {error}")
                print(f"left out: {failed[-1]}", file=sys.stderr)
        if options.json:
            print(json.dumps({"machine": machine, "rows": rows, "left out": failed}))
        elif rows:
            print(machine)
            width = max(len(line["what"]) for line in rows)
            for line in rows:
                ratio = f"{line['ratio']:9.2f} x {line['to']}" if line["ratio"] else ""
                print(f"{line['what'].ljust(width)}  {line['value']:11,.4g} {line['unit']:11}"
                      f"{ratio}")
        if failed and options.bench:
            raise ValueError("not all that was asked for could be measured, see above")


if __name__ == "__main__":
    main()
