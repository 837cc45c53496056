"""Training: Eq. 11 and Algorithm 1 of the paper (Sec. 3.2), as one loop.

    python train.py                                     # builds the shapes world, trains on it
    python train.py --method mmn --seed 1 --out runs/x  # every field of Config is an option
    python train.py --dataset charades --device cuda    # the paper's run, once it has features
    torchrun --nproc-per-node 8 train.py ...            # the same run in eight processes

Methods: `mmn` is the retriever alone; `vdi` adds Eq. 1-5 as printed, all in one sum (Eq. 11);
`vdi-staged` adapts the text tower first, as Algorithm 1 orders it, to a target that cannot collapse
(staged.py), and then trains the retriever with it. Shapes: as in mmn.py and inject.py.

A run is a folder: ckpt.pt (the best epoch on the validation split, all that evaluate.py needs),
last.pt (for --resume), log.jsonl, results.json. support/progress.py resumes, logs and saves.
"""
import dataclasses
import json
import pathlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import evaluate
import inject
import mmn
import shapes
import staged
from support import cropped, files, options, parallel, progress
from support.errors import Mistake, reported
from support.options import option

METHODS = ("mmn", "vdi", "vdi-staged")
VDI = "method vdi"                          # the methods that read an option
STAGED = "method vdi-staged"
INJECTION = "method vdi, vdi-staged"


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. Defaults: the paper's for Charades-STA; see PRESETS."""
    dataset: str = option("shapes", "charades[-cg], activitynet[-cg], shapes[-1, ...] or your own")
    method: str = option("vdi", "what to train", METHODS)
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    out: str = option("", "folder of the run (empty: runs/<dataset>-<method>)")
    seed: int = option(0, "seed of weights, data order and targets")
    root: str = option("data", "folder of datasets")
    clip: str = option("ViT-B/32", "which features to use: a CLIP (name or file), a dataset's own "
                       "CLIP, or a --backbone")
    text_clip: str = option("", "another text tower: a CLIP, DistilBERT, or shuffled (permuted)")
    mask: str = option("", "replaces masked words (empty: drop them; vdi-staged: something)")
    limit_videos: int = option(0, "train on the first N videos only (0 = all)", least=0)
    select_on: str = option("val", "split that selects the epoch ('test' is common practice)")
    workers: int = option(0, "processes that read features", least=0)
    # the retriever (MMN's published settings)
    num_clips: int = option(16, "N, side of the 2D map", least=1)
    frames: int = option(32, "T, features per video; T / N are averaged to a clip", least=1)
    pool_counts: tuple[int, ...] = option((15,), "diagonals per level, each level twice as coarse")
    kernel: int = option(5, "size of the convolutions over the map", least=1)
    layers: int = option(8, "number of these convolutions", least=1)
    hidden: int = option(512, "their width", least=1)
    joint: int = option(256, "J, width of the joint space", least=1)
    # the losses, Eq. 11; lambda_vc and lambda_sd: Sec. 4.1.3
    lambda_cl: float = option(0.05, "weight of Eq. 8")
    margin: float = option(0.4, "margin on the positive of Eq. 8")
    cl_decay_epoch: int = option(7, "epochs until lambda_cl drops to a hundredth")
    lambda_vc: float = option(0.5, "weight of Eq. 2", only=VDI)
    lambda_sd: float = option(0.01, "weight of Eq. 5", only=VDI)
    # what the paper's tables compare; the defaults are the paper's method
    context_query: str = option("static", "what attends to the frames: Q^s, Q, Q^h, or none (a "
                                "probe)", ("static", "full", "half", "none"), only=INJECTION)
    inject_into: str = option("dynamic", "what is adapted: Q^d or Q", ("dynamic", "full"),
                              only=INJECTION)
    sequence: str = option("transformer", "SeqModel of Eq. 4", ("transformer", "lstm"), only=VDI)
    forms: str = option("con-rel", "consistent or relational Eq. 2 and Eq. 5",
                        ("con-rel", "con-con", "rel-rel"), only=VDI)
    # optimisation; lr and text_lr: Sec. 4.1.3
    lr: float = option(1e-4, "learning rate of everything but the text tower")
    text_lr: float = option(0.1, "learning rate of the text tower as a share of lr")
    text_from_epoch: int = option(4, "epochs at the start in which the text tower is frozen")
    batch: int = option(48, "videos in a batch, each with all its sentences", least=1)
    epochs: int = option(18, "passes over the training videos", least=1)
    milestones: tuple[int, ...] = option((8, 13), "epochs that cut lr to a tenth; none: cosine")
    # UNSPECIFIED: when to stop early
    patience: int = option(5, "epochs without a better validation result before the run stops")
    stage_steps: int = option(800, "steps of stage 1", least=1, only=STAGED)
    stage_target: str = option("change", "target (staged.py)", staged.TARGETS, only=STAGED)

    def __post_init__(self):
        options.check_options(self)
        if not self.lr > 0:
            raise Mistake("--lr must be positive")
        if self.kernel % 2 == 0:
            raise Mistake(f"--kernel must be odd, not {self.kernel}")
        if sum(count * 2 ** i for i, count in enumerate(self.pool_counts)) >= self.num_clips:
            raise Mistake(f"--pool-counts {self.pool_counts} has moments longer than the video")
        if self.frames % self.num_clips:
            raise Mistake(f"--frames must be a multiple of --num-clips, {self.num_clips}")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.out or f"runs/{self.dataset}-{self.method}")


# UNSPECIFIED: lambda_iou, lambda_cl, epochs, milestones, betas, decay, clipping: MMN's settings
LAMBDA_IOU = 1.0                            # weight of Eq. 7 (MMN's published settings)
CLIP_NORM = 5.0                             # largest norm of the gradient (the same)
ADAMW = dict(betas=(0.9, 0.99), weight_decay=1e-5, fused=True)          # (the same)

PRESETS = {
    # python train.py --dataset charades --device cuda     the paper's run
    "charades": {},
    # python train.py --dataset activitynet --device cuda
    "activitynet": dict(num_clips=64, frames=256, pool_counts=(15, 8, 8), kernel=9, layers=4,
                        lambda_cl=0.1, margin=0.3, lr=8e-4, milestones=(7, 15), cl_decay_epoch=6),
    # python train.py     two CPU cores, 80 seconds, building the world included
    "shapes": dict(method="vdi-staged", kernel=3, layers=2, hidden=192, joint=128, lambda_cl=0.5,
                   lr=3e-3, text_lr=0.3, text_from_epoch=0, batch=16, epochs=30, milestones=(),
                   cl_decay_epoch=1000, patience=1000, limit_videos=400),
}


def preset(dataset: str) -> dict:
    """The fields that differ from the defaults; for your own datasets those of the shapes world."""
    family = dataset.removesuffix("-cg")
    if dataset.startswith("shapes"):            # every shapes world has a CLIP of its own
        return PRESETS["shapes"] | {"clip": dataset}
    if family in PRESETS:
        return PRESETS[family]
    return PRESETS["shapes"] | {"limit_videos": 0}


def configure(**given) -> Config:
    """The given fields; else the preset of the dataset; else the defaults."""
    given.setdefault("dataset", "shapes")
    fields = preset(given["dataset"]) | given
    if fields.get("method") == "vdi-staged":    # the other methods drop masked words
        fields.setdefault("mask", "something")
    return Config(**fields)


# ----------------------------------------------------------------------------- Eq. 11 and its terms

class Model(nn.Module):
    """f^q, f^g and the two injections, of which inference needs the first two. made: how the
    features were made (video.made_by)."""

    def __init__(self, config: Config, text: clip.TextTower, made: dict):
        super().__init__()
        width = text.output                                             # D
        pool = config.frames // config.num_clips                        # frames per clip
        self.sizes = dict(width=width, num_clips=config.num_clips, pool_kernel=pool,
                          pool_stride=pool, pool_counts=config.pool_counts, kernel=config.kernel,
                          layers=config.layers, hidden=config.hidden, joint=config.joint)
        # UNSPECIFIED: how frames and text of different widths meet: MMN's linear layer
        if not made["resolution"] or made["width"] != width:    # resolution 0: another network
            self.sizes["features"] = made["width"]
        self.text = text                                                # f^q
        self.retriever = mmn.MMN(**self.sizes, convolution=cropped.Convolution)         # f^g
        self.context = None                                             # Eq. 1, 2
        self.dynamic = None                                             # Eq. 3-5
        if config.method == "vdi":
            # UNSPECIFIED: the number of heads; 64 wide as in CLIP, but at least 4
            heads = max(4, width // 64)
            self.context = inject.VisualContext(width, heads)
            if config.lambda_sd and made["patch_frames"]:   # without patches data.Videos complains
                self.dynamic = inject.SpatialDynamic(
                    width, made["patch_width"], made["grid"], made["patch_frames"], heads,
                    lstm=config.sequence == "lstm")


class Queries(NamedTuple):
    """The sentences of a batch as features, in the roles that the paper's tables vary."""
    full: Tensor                # [S, D] x^q, by which MMN retrieves
    attending: Tensor | None    # [S, D] x^qs, which attends to the frames; None: a probe
    adapted: Tensor | None      # [S, D] x^qd, into which is injected; None without injection
    has_adapted: Tensor | None  # [S] bool, True = the adapted query has a word
    has_both: Tensor | None     # [S] bool, True = the static query has one, too


def encode_queries(model: Model, batch: data.Batch, config: Config) -> Queries:
    """x = f^q(Q), L2-normalised, for all sentences of this process's share of the batch."""
    injects = model.context is not None
    tokens = batch.tokens if injects else batch.tokens[:1]              # [3 or 1, S, 77]
    x = F.normalize(model.text.encode_text(tokens.flatten(0, 1)), dim=1)
    x = x.unflatten(0, (len(tokens), -1))                               # [3 or 1, S, D]
    if not injects:
        return Queries(x[0], None, None, None, None)
    # UNSPECIFIED: x^qs is of the adapted tower and has a gradient
    row = staged.QUERIES[config.context_query]          # Table 3; Q^h is in the place of Q^s
    attending = None if row is None else x[row]
    row = staged.QUERIES[config.inject_into]            # suppl. Table 4
    # UNSPECIFIED: what an empty query means; it has no term in Eq. 2 and 5, which are means over
    # the others. Q^s must have a word even where Q asks: Table 3's rows train on the same sentences
    has_adapted = batch.spoken[row]                                     # [S]
    return Queries(x[0], attending, x[row], has_adapted, batch.spoken[1] & has_adapted)


def terms(model: Model, batch: data.Batch, config: Config) -> dict[str, Tensor]:
    """The terms of Eq. (11), each a mean over the sentences that have it, under the names of their
    equations; and the variances of both sides of Eq. (2) and Eq. (5), which show whether they have
    collapsed.

    `batch` is this process's share; the losses are those of all processes' shares together, with
    all their negatives: that is what `parallel.gather` is for."""
    queries = encode_queries(model, batch, config)
    counts = parallel.gather(torch.tensor([len(batch.videos)], device=batch.frames.device))
    videos_before = counts[:parallel.rank()].sum()              # in the shares before this one
    video_of = parallel.gather(batch.video_of + videos_before)          # [S of all shares]
    losses = retrieval_terms(model, batch, queries, video_of, config)
    if model.context is not None and config.lambda_vc:
        losses.update(context_term(model, batch, queries, video_of, config))
    if model.context is not None and config.lambda_sd:
        losses.update(dynamic_term(model, batch, queries, video_of, config))
    return losses


def retrieval_terms(model: Model, batch: data.Batch, queries: Queries, video_of: Tensor,
                    config: Config) -> dict[str, Tensor]:
    """L^iou of Eq. (7) and L^cl of Eq. (8), which train the moment retriever."""
    moments = [parallel.gather(x) for x in model.retriever.moments(batch.frames)]   # [B, J, P]
    texts = [parallel.gather(x) for x in model.retriever.sentences(queries.full)]   # [S, J]
    iou = parallel.gather(model.retriever.at_candidates(batch.iou))     # [S, P]
    moments_sec = parallel.gather(batch.moments_sec)                    # [S, 2]
    scores = mmn.overlap_scores(moments[0], texts[0], video_of)         # Eq. 6 [S, P]
    contrastive = mmn.contrastive_loss(moments[1], texts[1], iou, video_of, moments_sec,
                                       margin=config.margin)            # [S]
    return {"L_iou": mmn.iou_loss(scores, iou).mean(), "L_cl": contrastive.mean()}


def context_term(model: Model, batch: data.Batch, queries: Queries, video_of: Tensor,
                 config: Config) -> dict[str, Tensor]:
    """L^vc of Eq. (2): the dynamic query should carry what the static query finds in the video."""
    frames = model.retriever.project(batch.frames)                      # [B, T, D]
    context = parallel.gather(model.context(queries.attending, frames, batch.video_of))    # x~^qs
    projected = parallel.gather(model.context.project(queries.adapted))     # FC(x^qd) [S, D]
    has_both = parallel.gather(queries.has_both)                        # [S]
    form = config.forms.split("-")[0]                                   # suppl. Table 3
    loss = injection_loss(form, projected, context, video_of, has_both)
    return {"L_vc": loss.sum() / has_both.sum().clamp(min=1),
            "var FC(x^qd), Eq. 2": inject.batch_variance(projected.detach()),
            "var x~^qs": inject.batch_variance(context.detach())}


def dynamic_term(model: Model, batch: data.Batch, queries: Queries, video_of: Tensor,
                 config: Config) -> dict[str, Tensor]:
    """L^sd of Eq. (5): two sentences should be as similar as the motions in their videos."""
    frames = model.retriever.project(batch.frames)                      # [B, T, D]
    which = data.patch_frames(frames.shape[1], batch.patches.shape[1])  # the T' with patches
    motion = model.dynamic(frames[:, which], batch.patches)             # m~ [B, D]
    motion = parallel.gather(motion[batch.video_of])                    # [S, D]
    projected = parallel.gather(model.dynamic.project(queries.adapted))     # FC(x^qd) [S, D]
    has_adapted = parallel.gather(queries.has_adapted)                  # [S]
    form = config.forms.split("-")[1]                                   # suppl. Table 3
    loss = injection_loss(form, projected, motion, video_of, has_adapted)
    return {"L_sd": loss.sum() / has_adapted.sum().clamp(min=1),
            "var FC(x^qd), Eq. 5": inject.batch_variance(projected.detach()),
            "var m~": inject.batch_variance(motion.detach())}


def injection_loss(form: str, projected: Tensor, seen: Tensor, video_of: Tensor,
                   which: Tensor) -> Tensor:
    """Eq. (2)'s squared distance ("con") or Eq. (5)'s difference of cosines ("rel"), of the
    sentences `which` [S] bool; supplement Table 3 swaps them. Each side [S, D]."""
    rows = which.nonzero()[:, 0]        # a mask would make a GPU wait at each of its uses
    if form == "con":
        return inject.visual_context_loss(projected[rows], seen[rows])
    return inject.spatial_dynamic_loss(seen[rows], projected[rows], video_of[rows])


def total_loss(losses: dict[str, Tensor], config: Config, epoch: int) -> Tensor:
    """Eq. (11), Sec. 3.2: the sum of all terms, each a mean over the sentences that have it.

        L = lambda^iou L^iou + lambda^cl L^cl + lambda^vc L^vc + lambda^sd L^sd
    """
    decay = 0.01 if epoch >= config.cl_decay_epoch else 1.0     # DEVIATION: MMN's code, not Eq. 11
    weights = {"L_iou": LAMBDA_IOU, "L_cl": config.lambda_cl * decay, "L_vc": config.lambda_vc,
               "L_sd": config.lambda_sd}
    # `losses` also holds the variances for the log, and lacks the terms of weight 0
    return sum(weights[name] * losses[name] for name in weights if name in losses)


# -------------------------------------------------------------------------------------- Algorithm 1

def set_learning_rate(optimiser: torch.optim.Optimizer, config: Config, epochs: float) -> None:
    """After `epochs`: a cosine to 0, or a tenth per milestone."""
    factor = 0.1 ** sum(epochs >= milestone for milestone in config.milestones)
    if not config.milestones:
        factor = progress.cosine(epochs / config.epochs)
    for group in optimiser.param_groups:
        group["lr"] = group["base"] * factor


def quality(row: dict) -> float | None:
    """What selects the epoch. None without a validation split: the last epoch is kept."""
    # UNSPECIFIED: which metric stops early; the sum of the two that the paper reports
    if "R@1,IoU=0.5" not in row:
        return None
    return row["R@1,IoU=0.5"] + row["R@1,IoU=0.7"]


def start(config: Config, made: dict, device: torch.device) -> tuple[Model, torch.optim.Optimizer]:
    """The model before the first step, and the optimiser of Eq. (11)."""
    torch.manual_seed(config.seed)
    source = config.text_clip
    if source in ("", "shuffled"):
        source = config.clip                    # the text tower of the features' own CLIP
    if not made["resolution"] and source == config.clip:
        raise Mistake(f"{config.clip} has no text tower; add --text-clip distilbert-base-uncased")
    path = data.clip_file(source, config.root)
    activation = None
    if source == config.clip:
        if clip.sha256(path) != made["sha256"]:
            raise Mistake(f"{path} is not the CLIP that made these features; pass the right file "
                          f"with --clip, or make the features again with data.py")
        activation = clip.activation_of(made)
    text = clip.load_text(path, activation=activation)
    if source != config.clip and isinstance(text, clip.TextTower):      # not a DistilBERT
        name = "GELU" if hasattr(text.transformer, "gelu") else "QuickGELU"
        print(f"text tower: {source}, read with {name} (a config.json beside it decides)")
    if config.text_clip == "shuffled":          # permuted: the same values, no knowledge
        for p in text.parameters():
            p.data = p.data.flatten()[torch.randperm(p.numel())].view_as(p)
    model = Model(config, text, made).to(device)
    others = [p for name, p in model.named_parameters() if not name.startswith("text.")]
    groups = [{"params": list(model.text.parameters()), "base": config.lr * config.text_lr},
              {"params": others, "base": config.lr}]            # DEVIATION: f^g is trained, too
    return model, torch.optim.AdamW(groups, lr=config.lr, **ADAMW)


def validate(model: Model, videos: dict[str, data.Videos], config: Config,
             device: torch.device) -> dict[str, float]:
    """Metrics of one epoch, computed by the first process only."""
    if parallel.rank():
        return {}
    row = {"cos x^qd": staged.query_cosine(model.text, videos["train"], device)}
    if config.select_on in videos:
        split = videos[config.select_on]
        predicted = evaluate.predict(model.text, model.retriever, split, config.batch, device)
        row |= evaluate.recall(predicted[..., :2], split.windows_sec)
    return row


def shuffle(seed: int, epoch: int) -> torch.Generator:
    """Draws the order of the videos; a new one for each epoch, so that a run can resume."""
    return torch.Generator().manual_seed(1_000_003 * seed + epoch)


def algorithm_1(config: Config, resume: bool) -> None:
    """Algorithm 1: stage 1 of vdi-staged, then the loop."""
    device = parallel.pick_device(config.device)
    store = data.open_store(config.dataset, config.clip, config.root, config.frames)
    model, optimiser = start(config, store.manifest, device)
    videos, parser = data.training_videos(config, store, model.text.tokenize)
    fixed = dataclasses.asdict(config) | {"data": data.digest_of(videos)}   # must match
    run = progress.Run(config.folder, fixed, model, optimiser, config.epochs, quality,
                       config.patience, resume)
    if run.is_new and config.method == "vdi-staged":
        run.begin_with(staged.adapt_text_tower(model.text, videos["train"], config, device))

    for epoch in run.epochs():                                  # those left, while patience lasts
        model.train()
        # UNSPECIFIED: whether the text tower waits; MMN freezes it for the first epochs
        model.text.requires_grad_(epoch >= config.text_from_epoch)
        loader = videos["train"].batches(config.batch, shuffle(config.seed, epoch), config.workers,
                                         device)
        for step, batch in run.steps(loader):
            batch = batch.to(device)
            set_learning_rate(optimiser, config, epoch + step / len(loader))

            # DEVIATION: Eq. 11, one sum and one step; Algorithm 1 first adapts f^q by Eq. 2 and 5,
            # then encodes Q again and optimises f^g
            losses = terms(model, batch, config)                # Eq. 2, 5, 7, 8
            loss = total_loss(losses, config, epoch)            # Eq. 11

            optimiser.zero_grad()
            loss.backward()
            parallel.sum_gradients(model)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimiser.step()
            run.add(losses, loss, norm)                 # for the log; not finite: the run stops
        if run.end_epoch(validate(model, videos, config, device)):      # the best so far
            save_checkpoint(config, model, run.history, videos["train"], parser)
        run.save()                                      # from which --resume continues


def save_checkpoint(config: Config, model: Model, history: list[dict], train_videos: data.Videos,
                    parser: str) -> None:
    """ckpt.pt: everything that evaluate.py and retrieve.py need, also on another machine."""
    made = dict(train_videos.store.manifest)
    del made["videos"]
    files.save_tensors(config.folder / "ckpt.pt", {
        "config": dataclasses.asdict(config), "epoch": len(history), "history": history,
        "metrics": history[-1], "sizes": model.sizes, "retriever": model.retriever.state_dict(),
        "text": model.text.state_dict(), "clip_sha256": made["sha256"], "features": made,
        "window_sec": float(train_videos.durations_sec.quantile(0.95)), "parser": parser,
        "versions": progress.versions()})


def train(config: Config, resume: bool = False) -> dict[str, dict]:
    """One run, in config.folder. Returns the results of the selected epoch (the first process)."""
    is_first = parallel.rank() == 0
    if is_first:
        progress.new_folder(config.folder, resume)
        shapes.build_for(config)
    parallel.wait()
    algorithm_1(config, resume)
    if not is_first:
        return {}
    device = parallel.pick_device(config.device)
    run = evaluate.load(config.folder / "ckpt.pt", device)
    if quality(run.checkpoint["metrics"]) is not None and evaluate.can_add_clip(run):
        saved = files.read_tensors(config.folder / "ckpt.pt")
        saved["clip_weight"] = evaluate.choose_weight(run, config.select_on, device)
        files.save_tensors(config.folder / "ckpt.pt", saved)
    results = evaluate.evaluate(run, device=device, allow_missing=True)
    files.save(config.folder / "results.json", json.dumps(results, indent=1))
    selected = f"best on {config.select_on}"
    if quality(run.checkpoint["metrics"]) is None:
        selected = "the last"                           # there is no validation split
    print(f"epoch {run.checkpoint['epoch']}, {selected}\n{evaluate.table(results)}")
    return results


# --------------------------------------------------------------------------------- the command line

def parse_arguments(argv: list[str] | None = None) -> tuple[Config, dict]:
    """The configuration, and the flags `resume` and `deterministic`."""
    parser = options.parser("train a moment retriever; without options, on the shapes world",
                            usage="%(prog)s --dataset charades --device cuda")
    return options.parse(parser, Config, configure, PRESETS, argv, flags={
        "resume": "continue the run in --out",
        "deterministic": "use deterministic algorithms only (slower on CUDA)"}, groups={
        "dataset": "start here", "root": "data", "num_clips": "the retriever",
        "lambda_cl": "the losses, Eq. 11", "context_query": "what the paper's tables compare",
        "lr": "optimisation", "stage_steps": "stage 1 of vdi-staged"})


def main() -> None:
    with reported():
        config, flags = parse_arguments()
        device = parallel.pick_device(config.device)
        with parallel.processes(device, flags["deterministic"]):
            print(options.settings(config))
            print(progress.environment(device))
            train(config, flags["resume"])


if __name__ == "__main__":
    main()
