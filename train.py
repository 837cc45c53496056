"""Training: Eq. 11 and Algorithm 1 of the paper (Sec. 3.2), as one loop.

    python train.py                                     # builds the shapes world, trains on it
    python train.py --method mmn --seed 1 --out runs/x  # every field of Config is an option
    python train.py --dataset charades --device cuda    # the paper's run, once features are there
    torchrun --nproc-per-node 8 train.py ...            # the same run by eight processes

Methods: `mmn` is the retriever alone; `vdi` adds Eq. 1-5 to the letter, all in one sum (Eq. 11);
`vdi-staged` adapts the text tower first, as Algorithm 1 orders it, to a target that cannot
collapse, and then trains the retriever.

A run is a folder: ckpt.pt (the best epoch on the validation split; with the features all that
evaluate.py needs), last.pt (for --resume), log.jsonl (a line for each epoch and for every 50th step
of stage 1), results.json.
"""
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import command
import data
import evaluate
import inject
import mmn
import parallel
import parse
import shapes
import video

METHODS = ("mmn", "vdi", "vdi-staged")
option = command.option


@dataclasses.dataclass(frozen=True)
class Config:
    """All there is to choose. Defaults: the paper's settings for Charades-STA; see PRESETS."""
    dataset: str = option("shapes", "charades, charades-cg, activitynet, activitynet-cg, shapes, "
                                    "shapes-1, ..., or one's own below the root")
    method: str = option("vdi", "mmn, vdi or vdi-staged", METHODS)
    seed: int = option(0, "of weights, data order and targets")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    root: str = option("data", "folder of datasets")
    out: str = option("", "folder of the run (empty: runs/<dataset>-<method>, and the retriever "
                          "where it is not mmn)")
    clip: str = option("ViT-B/32", "CLIP that made the features: a published name, a file, or a "
                                   "dataset that has one")
    text_clip: str = option("", "CLIP whose text tower is taken instead: separated pre-training "
                                "(suppl. Table 5); shuffled: its own, each weight matrix permuted")
    parser: str = option("", "spaCy pipeline or 'rules' (empty: en_core_web_sm if installed, else "
                             "rules)")
    mask: str = option("", "word that stands for masked words (empty: they are dropped; "
                           "vdi-staged: something)")
    # the retriever (MMN's published settings)
    retriever: str = option("mmn", "mmn, or 2d-tan (tan.py)", tuple(evaluate.RETRIEVERS))
    num_clips: int = option(16, "N, side of the 2D map", least=1)
    frames: int = option(32, "T, features of a video; T / N are averaged to a clip", least=1)
    pool_counts: tuple[int, ...] = option((15,), "diagonals of the map per level, each level twice "
                                                 "as coarse")
    kernel: int = option(5, "size of the convolutions over the map", least=1)
    layers: int = option(8, "number of these convolutions", least=1)
    hidden: int = option(512, "their width", least=1)
    joint: int = option(256, "J, width of the joint space", least=1)
    # the losses, Eq. 11
    lambda_iou: float = option(1.0, "weight of Eq. 7")
    lambda_cl: float = option(0.05, "weight of Eq. 8", only="retriever mmn")
    lambda_vc: float = option(0.5, "weight of Eq. 2 (Sec. 4.1.3)", only="method vdi")
    lambda_sd: float = option(0.01, "weight of Eq. 5 (Sec. 4.1.3)", only="method vdi")
    tau: float = option(0.1, "temperature of Eq. 8", only="retriever mmn")
    margin: float = option(0.4, "margin on the positive of Eq. 8", only="retriever mmn")
    cl_decay_epoch: int = option(7, "epochs of Eq. 8 at full weight; then a hundredth (MMN)",
                                 only="retriever mmn")
    inject_layers: int = option(1, "layers of TransDecoder (Eq. 1) and SeqModel (Eq. 4)", least=1,
                                only="method vdi")
    inject_heads: int = option(8, "heads of both", least=1, only="method vdi")
    # what the paper's tables compare; the defaults are its letter
    context_query: str = option(
        "static", "what asks the frames in Eq. 1 and stage 1: static (Q^s), full (Q), half (Q^h) "
        "or none (a learned probe; in stage 1 all frames weigh the same)",
        ("static", "full", "half", "none"), only="method vdi, vdi-staged")
    inject_into: str = option(
        "dynamic", "what Eq. 2, Eq. 5 and stage 1 adapt: dynamic (Q^d) or full (Q)",
        ("dynamic", "full"), only="method vdi, vdi-staged")
    sequence: str = option(
        "transformer", "SeqModel of Eq. 4", ("transformer", "lstm"), only="method vdi")
    vc_form: str = option("consistent", "Eq. 2: consistent, or relational like Eq. 5",
                          ("consistent", "relational"), only="method vdi")
    sd_form: str = option("relational", "Eq. 5: relational, or consistent like Eq. 2",
                          ("relational", "consistent"), only="method vdi")
    stop_gradient: str = option("none", "side of Eq. 2 and Eq. 5 that gets no gradient",
                                ("none", "video", "text"), only="method vdi")
    same_video: bool = option(False, "keep pairs of one video in Eq. 5", only="method vdi")
    normalise: bool = option(True, "L2-normalise CLIP's features before every use")
    fusion: str = option("published", "Eq. 10: published (MMN's), or product as printed",
                         tuple(mmn.FUSIONS), only="retriever mmn")
    excluded: str = option(
        "out", "pairs that are neither positive nor negative in Eq. 8: out, or exp0 as in MMN's "
        "code", tuple(mmn.EXCLUDED), only="retriever mmn")
    # the optimiser: AdamW, betas (0.9, 0.99)
    lr: float = option(1e-4, "learning rate of everything but the text tower (Sec. 4.1.3)")
    text_lr: float = option(0.1, "learning rate of the text tower as a share of it (Sec. 4.1.3)")
    text_from_epoch: int = option(4, "epochs at the start in which the text tower is frozen")
    weight_decay: float = option(1e-5, "of AdamW")
    batch: int = option(48, "videos in a batch, each with all its sentences", least=1)
    epochs: int = option(18, "passes over the training videos", least=1)
    milestones: tuple[int, ...] = option((8, 13), "numbers of epochs after which the learning "
                                                  "rate falls to a tenth; none: cosine")
    clip_norm: float = option(5.0, "largest norm of the gradient")
    patience: int = option(5, "epochs without a better validation result before the run stops")
    limit_videos: int = option(0, "train on the first so many videos only (0: all)", least=0)
    select_on: str = option("val", "split that chooses the epoch ('test' is the field's habit)")
    bf16: bool = option(False, "bfloat16 autocast in both towers of the loop; weights and losses "
                               "stay float32")
    deterministic: bool = option(False, "only algorithms that give the same bits each time (on "
                                        "CUDA slower; on a CPU all are)")
    compile: bool = option(False, "torch.compile the retriever")
    workers: int = option(0, "processes that read features")
    # vdi-staged, stage 1
    stage_steps: int = option(800, "steps of stage 1", least=1, only="method vdi-staged")
    stage_lr: float = option(1e-3, "learning rate of the text tower in stage 1",
                             only="method vdi-staged")
    stage_batch: int = option(64, "sentences in a batch of stage 1", least=1,
                              only="method vdi-staged")
    stage_target: str = option(
        "change", "change: late minus early half of the moment; mean of the moment; whole: mean of "
        "the video; shuffled: the change of another sentence; rotated: the change, turned at "
        "random; random: a random code for each dynamic query. The last three are controls: the "
        "last sees no video", ("change", "mean", "whole", "shuffled", "rotated", "random"),
        only="method vdi-staged")

    def __post_init__(self):
        command.check_options(self)
        for name in ("lr", "tau", "clip_norm", "stage_lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name.replace('_', '-')} is more than 0")
        if self.kernel % 2 == 0:
            raise ValueError(f"--kernel is odd, not {self.kernel}")
        if sum(count * 2 ** i for i, count in enumerate(self.pool_counts)) >= self.num_clips:
            raise ValueError(f"--pool-counts {self.pool_counts} asks for moments longer than "
                             f"--num-clips {self.num_clips}")
        if self.frames % self.num_clips:
            raise ValueError(f"--frames {self.frames} has to be a multiple of --num-clips "
                             f"{self.num_clips}")

    @property
    def folder(self) -> pathlib.Path:
        other = "" if self.retriever == "mmn" else f"-{self.retriever}"
        return pathlib.Path(self.out or f"runs/{self.dataset}-{self.method}{other}")


PRESETS = {
    # python train.py --dataset charades --device cuda     the paper's run, once features are there
    "charades": {},
    # python train.py --dataset activitynet --device cuda
    "activitynet": dict(num_clips=64, frames=256, pool_counts=(15, 8, 8), kernel=9, layers=4,
                        lambda_cl=0.1, margin=0.3, lr=8e-4, milestones=(7, 15), cl_decay_epoch=6),
    # python train.py     two cores, four minutes with the building of the world
    "shapes": dict(method="vdi-staged", kernel=3, layers=2, hidden=192, joint=128, inject_heads=4,
                   lambda_cl=0.5, lr=3e-3, text_lr=0.3, text_from_epoch=0, batch=16, epochs=30,
                   milestones=(), cl_decay_epoch=1000, patience=1000, limit_videos=400),
    # python train.py --retriever 2d-tan     without BatchNorm it learns slower; widths as published
    "shapes 2d-tan": dict(lr=1e-3, epochs=60),
    "charades 2d-tan": dict(joint=512),
    "activitynet 2d-tan": dict(joint=512, lr=1e-4),
}


def preset(dataset: str, retriever: str = "mmn") -> dict:
    """Fields that differ from the defaults. One's own dataset takes those of shapes, CLIP too."""
    family, own = dataset.removesuffix("-cg"), {}
    if family not in PRESETS or family == "shapes":
        own = {"clip": dataset} if dataset.startswith("shapes") else {"clip": "shapes",
                                                                      "limit_videos": 0}
        family = "shapes"
    return {**PRESETS[family], **own, **PRESETS.get(f"{family} {retriever}", {})}


def configure(**given) -> Config:
    """What is given; else the preset of the dataset and the retriever; else the defaults."""
    dataset = given.get("dataset", "shapes")
    fields = {"dataset": dataset, **preset(dataset, given.get("retriever", "mmn")), **given}
    if fields.get("method") == "vdi-staged":    # with the others masked words are dropped
        fields.setdefault("mask", "something")
    return Config(**fields)


# ----------------------------------------------------------------------------- Eq. 11 and its terms

class Model(nn.Module):
    """f^q, f^g and the two injections. Only the first two are needed at inference."""

    def __init__(self, config: Config, text: clip.TextTower, made: dict):
        super().__init__()
        pool = config.frames // config.num_clips
        self.sizes = dict(width=made["width"], num_clips=config.num_clips, pool_kernel=pool,
                          pool_stride=pool, pool_counts=config.pool_counts, kernel=config.kernel,
                          layers=config.layers, hidden=config.hidden, joint=config.joint)
        self.text = text                                                # f^q
        self.retriever = evaluate.RETRIEVERS[config.retriever](**self.sizes)    # f^g
        self.context = self.dynamic = None
        if config.method == "vdi":                      # DEVIATION: vdi-staged leaves L^sd out
            if made["width"] % config.inject_heads:
                raise ValueError(f"--inject-heads {config.inject_heads} does not divide the width "
                                 f"{made['width']} of the features")
            self.context = inject.VisualContext(made["width"], config.inject_layers,
                                                config.inject_heads)
            self.dynamic = inject.SpatialDynamic(made["width"], made["patch_width"], made["grid"],
                                                 made["patch_frames"], config.inject_layers,
                                                 config.inject_heads, config.sequence == "lstm")


def terms(model: Model, batch: data.Batch,
          config: Config) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The terms of Eq. (11), each a mean over the batch, under the names of their equations; and
    the variances of both sides of Eq. (2) and Eq. (5), which show whether they have collapsed.

    `batch` is this process's share; the losses are those of all processes' shares together."""
    S = len(batch.video_of)
    queries = batch.tokens if model.context is not None else batch.tokens[:1]
    with torch.autocast(batch.frames.device.type, torch.bfloat16, enabled=config.bf16):
        x = model.text.encode_text(queries.flatten(0, 1))               # [S or 3 S, D]
        x = F.normalize(x, dim=1) if config.normalise else x
        outputs = model.retriever.outputs(batch.frames, x[:S], batch.video_of)
    before = sum(parallel.everyone(len(batch.videos))[:parallel.rank()])    # videos before mine
    video_of = parallel.gather(batch.video_of + before)                 # [S]
    iou = model.retriever.at_candidates(batch.iou)                      # [S, P]
    result = model.retriever.losses(tuple(parallel.gather(y.float()) for y in outputs),
                                    parallel.gather(iou), video_of,
                                    parallel.gather(batch.moments_sec), config)
    if model.context is None:
        return result, {}

    full, static, dynamic = x.float().view(3, S, x.shape[1])            # x^q, x^qs, x^qd [S, D]
    asking = {"full": full, "none": None}.get(config.context_query, static)
    adapted, spoken = ((full, batch.spoken[0]) if config.inject_into == "full"
                       else (dynamic, batch.spoken[2]))
    spoken, static_spoken = map(parallel.gather, (spoken, batch.spoken[1]))     # [S]

    def of_all(y: Tensor, side: str) -> Tensor:
        y = parallel.gather(y)
        return y.detach() if config.stop_gradient == side else y

    forms = {"consistent": lambda query, seen, _: inject.visual_context_loss(query, seen),
             "relational": lambda query, seen, video_of: inject.spatial_dynamic_loss(
                 seen, query, video_of, config.same_video)}
    spread = {}
    # UNSPECIFIED: what an empty query means; it has no term in Eq. 2, nor in Eq. 5
    if config.lambda_vc:
        has_both = static_spoken & spoken                               # [S]
        context = of_all(model.context(asking, batch.frames, batch.video_of), "video")  # x~^qs
        projected = of_all(model.context.project(adapted), "text")      # FC(x^qd) [S, D]
        loss = forms[config.vc_form](projected[has_both], context[has_both], video_of[has_both])
        result["L_vc"] = loss.sum() / has_both.sum().clamp(min=1)
        spread |= {"var FC(x^qd), Eq. 2": projected, "var x~^qs": context}
    if config.lambda_sd:
        which = video.patch_frames(batch.frames.shape[1], batch.patches.shape[1])
        motion = model.dynamic(batch.frames[:, which], batch.patches)[batch.video_of]  # m~ [S, D]
        motion = of_all(motion, "video")
        projected = of_all(model.dynamic.project(adapted), "text")      # FC(x^qd) [S, D]
        loss = forms[config.sd_form](projected[spoken], motion[spoken], video_of[spoken])
        result["L_sd"] = loss.sum() / spoken.sum().clamp(min=1)
        spread |= {"var FC(x^qd), Eq. 5": projected, "var m~": motion}
    return result, {name: inject.batch_variance(value.detach()) for name, value in spread.items()}


def total_loss(terms: dict[str, Tensor], config: Config, epoch: int) -> Tensor:
    """Eq. (11), Sec. 3.2: the sum of all terms, each a batch mean.

        L = lambda^iou L^iou + lambda^cl L^cl + lambda^vc L^vc + lambda^sd L^sd
    """
    cl = config.lambda_cl * (0.01 if epoch >= config.cl_decay_epoch else 1.0)
    weights = {"L_iou": config.lambda_iou, "L_cl": cl, "L_vc": config.lambda_vc,
               "L_sd": config.lambda_sd}
    return sum(weights[name] * value for name, value in terms.items())


def check_finite(terms: dict[str, Tensor], batch: data.Batch, folder: pathlib.Path) -> None:
    """Stops the run, all processes alike, where a term is not finite, and saves the batch."""
    for name, value in terms.items():
        if not torch.isfinite(value):
            videos = [video for part in parallel.everyone(batch.videos) for video in part]
            path = folder / f"nonfinite-{parallel.rank()}.pt"
            save(path, {"term": name, "batch": batch._asdict()})
            raise FloatingPointError(f"{name} is {value.item()} for the videos "
                                     f"{', '.join(videos)}; the batch is in {path}")


@torch.no_grad()
def query_cosine(text: clip.TextTower, videos: data.Videos, device: torch.device) -> float:
    """Mean cosine between dynamic queries (the first 64 different ones): 1 = all verbs are one."""
    different = list(dict.fromkeys(query.dynamic for query in videos.queries if query.dynamic))[:64]
    if len(different) < 2:
        return 1.0
    x = text.encode_text(clip.tokenize(different, truncate=True).to(device))
    return inject.pairwise_cosine(x)[~torch.eye(len(x), dtype=torch.bool, device=device)] \
        .mean().item()


# ------------------------------------------------------------------------------ vdi-staged, stage 1

@torch.no_grad()
def stage_targets(text: clip.TextTower, videos: data.Videos, config: Config,
                  device: torch.device) -> tuple[Tensor, Tensor]:
    """What each sentence's x^qd is to become in stage 1, [S, D]; and the places of the sentences
    that have both halves, [S'].

    inject.temporal_change (or a control), minus its mean over those sentences and divided by its
    root mean square over them."""
    which = {"full": 0, "none": None}.get(config.context_query, 1)
    static = torch.cat([text.encode_text(part.to(device))               # x^qs of the original tower
                        for part in videos.tokens[which or 0].split(1024)])
    static, target = F.normalize(static, dim=1), []                     # [S, D]
    for batch in videos.batches(64):
        batch = batch.to(device)
        asking = None if which is None else static[batch.index]
        target.append(inject.temporal_change(
            asking, batch.frames[batch.video_of], batch.moments_sec, batch.durations_sec,
            config.stage_target))
    target = torch.cat(target)                                          # [S, D]
    generator = torch.Generator().manual_seed(config.seed)
    if config.stage_target == "random":                         # the control: no video in it at all
        dynamic = dict.fromkeys(query.dynamic for query in videos.queries)
        codes = {query: i for i, query in enumerate(dynamic)}
        table = torch.randn(len(codes), target.shape[1], generator=generator)
        target = table[[codes[q.dynamic] for q in videos.queries]].to(device)
    elif config.stage_target == "shuffled":                             # another sentence's video
        target = target[torch.randperm(len(target), generator=generator)]
    elif config.stage_target == "rotated":
        turn = torch.linalg.qr(torch.randn(target.shape[1], target.shape[1], generator=generator))
        target = target @ turn.Q.to(device)
    into = 0 if config.inject_into == "full" else 2
    usable = (videos.spoken[1] & videos.spoken[into]).nonzero()[:, 0]
    if len(usable) < 2:
        raise ValueError("fewer than two training sentences have both a noun chunk and other "
                         "words, so there is nothing to inject; use --method mmn")
    target = target - target[usable].mean(0)
    # DEVIATION: standardised, so that no constant fits it
    return target / target[usable].square().mean().sqrt().clamp(min=1e-6), usable


def adapt_text_tower(text: clip.TextTower, videos: data.Videos, config: Config,
                     device: torch.device, signals: command.Signals) -> list[dict]:
    """Algorithm 1, line "Adapts the textual encoder f^q", as a stage of its own. Returns a log.

    Eq. (2) with another target: || f^q(Q^d) - target ||^2, see `stage_targets`."""
    target, usable = stage_targets(text, videos, config, device)
    into = 0 if config.inject_into == "full" else 2
    if config.stage_batch < parallel.size():
        raise ValueError(f"--stage-batch {config.stage_batch} leaves some of {parallel.size()} "
                         f"processes without a sentence")
    # DEVIATION: an optimiser of its own; in one sum the size of this term starves the others
    optimiser = torch.optim.AdamW(text.parameters(), lr=config.stage_lr, betas=(0.9, 0.99),
                                  weight_decay=config.weight_decay, fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    log = []
    for step in (bar := tqdm(range(config.stage_steps), desc="stage 1: text tower",
                             disable=parallel.rank() > 0 or None)):
        rate = min((step + 1) / 20, (1 + math.cos(math.pi * step / config.stage_steps)) / 2)
        optimiser.param_groups[0]["lr"] = config.stage_lr * rate
        chosen = usable[torch.randint(len(usable), (config.stage_batch,), generator=generator)]
        # DEVIATION: no FC, and x^qd as it is: nothing stands between the target and the tower
        tokens = videos.tokens[into, parallel.share(chosen)].to(device)
        x = parallel.gather(text.encode_text(tokens))                   # x^qd [S, D]
        loss = inject.visual_context_loss(x, target[chosen]).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"L_vc is {loss.item()} in step {step} of stage 1")
        optimiser.zero_grad()
        loss.backward()
        parallel.sum_gradients(text)
        nn.utils.clip_grad_norm_(text.parameters(), config.clip_norm)
        optimiser.step()
        if step % 50 == 0 or step == config.stage_steps - 1:
            log.append({"step": step, "L_vc": loss.item(),
                        "var x^qd": inject.batch_variance(x.detach()).item(),
                        "var target": inject.batch_variance(target[chosen]).item(),
                        "cos x^qd": query_cosine(text, videos, device)})
            bar.set_postfix(L_vc=f"{loss.item():.2f}")
        if any(parallel.everyone(signals.received)):
            raise command.Stopped("stopped in stage 1, of which nothing is kept; --resume starts "
                                  "it again", signals.received or signal.SIGTERM)
    first, last = log[0], log[-1]
    print(f"stage 1, {config.stage_steps} steps: |x^qd - target|^2 {first['L_vc']:.4g} -> "
          f"{last['L_vc']:.4g}, cos x^qd {first['cos x^qd']:.4g} -> {last['cos x^qd']:.4g}")
    return log


# -------------------------------------------------------------------------------------- Algorithm 1

def learning_rate(config: Config, progress: float) -> float:
    """Factor on the rates after `progress` epochs: a cosine to 0, or a tenth at each milestone."""
    if not config.milestones:
        return (1 + math.cos(math.pi * progress / config.epochs)) / 2
    return 0.1 ** sum(progress >= milestone for milestone in config.milestones)


def train(config: Config, resume: bool = False) -> dict[str, dict]:
    """One run, left in config.folder. The first process returns what the kept epoch scores."""
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    alone = parallel.rank() == 0
    with command.locked(config.folder, resume) if alone else contextlib.nullcontext():
        if alone:
            for world in (config.dataset, config.text_clip):
                if world.startswith("shapes"):
                    shapes.build(world, config.root)
            if config.clip == f"{config.dataset}-resnet":
                shapes.build_resnet(config.dataset, config.root)
        parallel.wait()
        with command.Signals() as signals:
            return algorithm_1(config, resume, signals)


def read_videos(config: Config, parser: parse.Parser,
                store: video.FeatureStore) -> dict[str, data.Videos]:
    """The training videos, and those that choose the epoch, if any, which are not trained on."""
    there = [*data.splits(config.dataset, config.root),
             *(["val"] if config.dataset in data.FILES else [])]
    if config.select_on == "train" or config.select_on not in (*there, "val"):
        raise ValueError(f"--select-on {config.select_on} cannot choose the epoch; the splits of "
                         f"{config.dataset} are {', '.join(there)}")
    samples = {split: data.read_annotations(config.dataset, split, config.root)
               for split in ("train", config.select_on) if split in there}
    chosen = {sample.video for sample in samples.get(config.select_on, [])}
    names = list(dict.fromkeys(sample.video for sample in samples["train"]
                               if sample.video not in chosen))
    names = set(names[:config.limit_videos] if config.limit_videos else names)
    samples["train"] = [sample for sample in samples["train"] if sample.video in names]
    videos = {split: data.Videos(rows, store, config.num_clips, parser,
                                 split == "train" and config.method == "vdi",
                                 config.context_query == "half", config.normalise)
              for split, rows in samples.items()}
    print(f"parser: {parser.name}")
    for split, part in videos.items():
        print(f"{split}: {len(part)} videos, {len(part.samples)} sentences"
              + (f" ({len(part.missing)} videos with {part.lost} sentences have no features and "
                 f"are left out)" if part.missing else ""))
    return videos


def start(config: Config, store: video.FeatureStore,
          device: torch.device) -> tuple[Model, torch.optim.Optimizer]:
    """The model before any step, and the optimiser of Eq. (11)."""
    torch.manual_seed(config.seed)
    source = config.clip if config.text_clip in ("", "shuffled") else config.text_clip
    text = clip.build_text(clip.read_state(data.clip_file(source, config.root)))
    if config.text_clip == "shuffled":
        for p in text.parameters():                             # the same numbers, and no knowledge
            p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    model = Model(config, text, store.manifest).to(device)
    if config.compile:
        model.retriever.outputs = torch.compile(model.retriever.outputs)
    groups = [{"params": list(model.text.parameters()), "base": config.lr * config.text_lr},
              {"params": [p for n, p in model.named_parameters() if not n.startswith("text.")],
               "base": config.lr}]
    return model, torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.99),
                                    weight_decay=config.weight_decay, fused=True)


def algorithm_1(config: Config, resume: bool, signals: command.Signals) -> dict[str, dict]:
    """Algorithm 1: stage 1 where the method has one, then the loop."""
    device, folder = data.pick_device(config.device), config.folder
    first_process = parallel.rank() == 0                        # which alone writes and validates
    parser = parse.Parser(config.parser or None, config.mask)
    store = data.open_store(config.dataset, config.clip, config.root)
    videos = read_videos(config, parser, store)
    model, optimiser = start(config, store, device)
    # `done` steps of epoch `first` are behind us; `sums` is what they add to its row of the log
    history, staged, first, done, sums = [], [], 0, 0, {}
    there = parallel.everyone((folder / "last.pt").exists())
    if len(set(there)) > 1:
        raise FileNotFoundError(f"{folder / 'last.pt'} is there for some processes only; give all "
                                f"machines the same folder")
    if resume and not there[0] and (folder / "ckpt.pt").exists():
        same_configuration(clip.read_torch(folder / "ckpt.pt")["config"], config)
    if resume and there[0]:
        saved = clip.read_torch(folder / "last.pt")
        same_configuration(saved["config"], config)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        torch.set_rng_state(saved["rng"])
        history, staged, first = saved["history"], saved["staged"], saved["epoch"]
        done = saved["done"]
        sums = {name: value.to(device) for name, value in saved["sums"].items()}
        print(f"continuing after epoch {first}" + (f" and {done} steps" if done else ""))
    elif config.method == "vdi-staged":
        staged = [{"stage": 1, **row}
                  for row in adapt_text_tower(model.text, videos["train"], config, device, signals)]

    def keep(epoch: int, done: int = 0) -> None:
        """last.pt: all that it takes to go on from here, to the same bits."""
        save(folder / "last.pt", {
            "config": dataclasses.asdict(config), "epoch": epoch, "done": done, "sums": sums,
            "history": history, "staged": staged, "model": model.state_dict(),
            "optimiser": optimiser.state_dict(), "rng": torch.get_rng_state()})

    def stop_if_told(epoch: int) -> None:
        if any(parallel.everyone(signals.received)):
            if first_process:
                keep(epoch, done)
            raise command.Stopped(f"stopped after {done} steps of epoch {epoch + 1}; go on with "
                                  f"--resume", signals.received or signal.SIGTERM)

    if first_process and (resume or staged):
        if staged and not history and not done:
            keep(0)
        text = "".join(json.dumps(row) + "\n" for row in (*staged, *history))
        # without what a killed run added after its checkpoint: it comes again
        command.save(folder / "log.jsonl", text)
    started = time.time() - 60 * (history[-1]["minutes"] if history else 0)
    for epoch in range(first, config.epochs):
        if len(history) - best_epoch(history) >= config.patience:
            break
        model.train()
        # UNSPECIFIED: whether the text tower waits; MMN freezes it for the first epochs
        model.text.requires_grad_(epoch >= config.text_from_epoch)
        shuffle = torch.Generator().manual_seed(1_000_003 * config.seed + epoch)
        loader = videos["train"].batches(config.batch, shuffle, config.workers)
        waited_sec, ready = 0.0, (epoch_started := time.perf_counter())
        batches = tqdm(loader, desc=f"epoch {epoch + 1}", leave=False,
                       disable=not first_process or None)
        for step, batch in enumerate(until_stopped(batches, signals)):
            waited_sec += time.perf_counter() - ready
            if step < done:                                     # before the run was stopped
                waited_sec, ready = 0.0, (epoch_started := time.perf_counter())
                continue
            batch = batch.to(device)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * learning_rate(config, epoch + step / len(loader))
            parts, spread = terms(model, batch, config)
            check_finite(parts, batch, folder)
            loss = total_loss(parts, config, epoch)
            optimiser.zero_grad()
            loss.backward()
            parallel.sum_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            if norm.isfinite():
                optimiser.step()
            elif not config.bf16:                               # under autocast it is skipped
                check_finite({"the gradient's norm": norm}, batch, folder)
            for name, value in {**parts, **spread, "L": loss,
                                "skipped": (~norm.isfinite()).float()}.items():
                sums[name] = sums.get(name, 0.0) + value.detach()
            done = step + 1
            stop_if_told(epoch)
            ready = time.perf_counter()
        stop_if_told(epoch)
        skipped = int(sums.pop("skipped"))
        row = {"epoch": epoch + 1, **({"skipped": skipped} if skipped else {}),
               **{name: (value / len(loader)).item() for name, value in sums.items()},
               "data %": 100 * waited_sec / (time.perf_counter() - epoch_started),
               "cos x^qd": query_cosine(model.text, videos["train"], device)}
        if config.select_on in videos and first_process:
            predicted = evaluate.predict(model.text, model.retriever, videos[config.select_on],
                                         config.batch, device, fusion=config.fusion,
                                         normalise=config.normalise)
            row |= evaluate.recall(predicted[..., :2], videos[config.select_on].moments_sec)
        row["minutes"] = (time.time() - started) / 60
        history.append(row := parallel.everyone(row)[0])
        done, sums = 0, {}
        if not first_process:
            continue
        with open(folder / "log.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        tqdm.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
        if best_epoch(history) == len(history):
            made = {key: value for key, value in store.manifest.items() if key != "videos"}
            save(folder / "ckpt.pt", {
                "config": dataclasses.asdict(config), "epoch": epoch + 1, "history": history,
                "metrics": row, "sizes": model.sizes, "retriever": model.retriever.state_dict(),
                "text": model.text.state_dict(), "clip_sha256": made["sha256"], "features": made,
                "window_sec": float(videos["train"].durations_sec.quantile(0.95)),
                "parser": parser.name, "versions": versions()})
        keep(epoch + 1)

    if not first_process:
        return {}
    run = evaluate.load(folder / "ckpt.pt", device)
    results = evaluate.evaluate(run, device=device, allow_missing=True)
    command.save(folder / "results.json", json.dumps(results, indent=1))
    chosen = f"chosen on {config.select_on}"
    print(f"epoch {run.checkpoint['epoch']} of {len(history)}, "
          + (chosen if config.select_on in videos else "the last: there is no validation split"))
    print(evaluate.table(results))
    return results


def until_stopped(batches, signals: command.Signals):
    """All batches; or those up to a signal that stopped the processes which read them, too."""
    try:
        yield from batches
    except RuntimeError:
        if not signals.received:
            raise


def same_configuration(theirs: dict, config: Config) -> None:
    """ValueError where a run that is to be resumed has another configuration."""
    ours = dataclasses.asdict(config)
    other = [name for name in ours if theirs.get(name) != ours[name] and name not in
             ("device", "root", "out", "workers", "compile", "deterministic")]
    if other:
        raise ValueError(f"{config.folder} holds a run with another {', '.join(other)}; resume it "
                         f"with its own settings, or choose another --out")


def best_epoch(history: list[dict]) -> int:
    """The epoch (from 1) highest in R@1, IoU=0.5 plus R@1, IoU=0.7; the last without validation."""
    if not history or "R@1,IoU=0.5" not in history[0]:
        return len(history)
    # UNSPECIFIED: which metric stops early; the sum of the two that the paper reports
    quality = [row["R@1,IoU=0.5"] + row["R@1,IoU=0.7"] for row in history]
    return 1 + quality.index(max(quality))


def save(path: pathlib.Path, content: dict) -> None:
    command.save(path, lambda file: torch.save(content, file))


def versions() -> dict[str, str]:
    here = pathlib.Path(__file__).parent
    asked = ["git", "rev-parse", "HEAD"] if shutil.which("git") else ["true"]
    commit = subprocess.run(asked, cwd=here, capture_output=True, text=True)
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "numpy": np.__version__, "platform": platform.platform(),
            "commit": commit.stdout.strip(), "command": " ".join(sys.argv)}


# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None = None) -> tuple[Config, bool]:
    """Options from the fields of Config, and whether to resume."""
    parser = command.parser(__doc__.split("\n")[0],
                            usage="%(prog)s [--option value ...] [--resume]")
    command.add_options(parser, Config, PRESETS, groups={
        "dataset": "the run", "retriever": "the retriever", "lambda_iou": "the losses, Eq. 11",
        "context_query": "what the paper's tables compare", "lr": "the optimiser, and how long",
        "stage_steps": "stage 1"})
    parser.add_argument("--resume", action="store_true", help="continue the run in --out")
    given = vars(parser.parse_args(argv))
    resume, config = given.pop("resume"), configure(**given)
    for field in dataclasses.fields(Config):
        kind, _, names = field.metadata.get("only", "").partition(" ")
        if field.name in given and kind and getattr(config, kind) not in names.split(", "):
            print(f"note: --{field.name.replace('_', '-')} is read by --{kind} {names} only, and "
                  f"this is {getattr(config, kind)}", file=sys.stderr)
    return config, resume


def main() -> None:
    with command.sentences():
        config, resume = parse_arguments()
        with parallel.processes(data.pick_device(config.device)):
            print(command.settings(config))
            made = versions()
            print(f"python {made['python']}  torch {made['torch']}  commit "
                  f"{made['commit'][:12] or 'unknown'}  {data.pick_device(config.device)}  "
                  f"{torch.get_num_threads()} threads")
            train(config, resume)


if __name__ == "__main__":
    main()
