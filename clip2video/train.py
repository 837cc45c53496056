"""Training. Shapes: see clip2video/__init__.py.

A run is a folder: ckpt.pt (the best epoch), results.json, and what support/progress.py writes."""
import dataclasses
import json
import random
from typing import NamedTuple

import torch
from torch import Tensor, nn

import clip
import data
from clip2video.data import Split, build_shapes, read_pixels, read_split
from clip2video.evaluate import evaluate_checkpoint, retrieval_metrics, vectors
from clip2video.model import MAX_SCALE, VARIANTS, CLIP2Video, Config, logits, loss
from support import files, parallel, progress
from support.errors import Mistake


class Batch(NamedTuple):
    """B videos with one caption each: two captions of a video would be negatives of each other."""
    videos: list[str]
    captions: list[str]
    index: Tensor                                               # [B] of the videos in their split


def batches_of_epoch(split: Split, config: Config, epoch: int) -> list[Batch]:
    """The shuffled batches of an epoch, which depend on the seed and the epoch only. There are as
    many pairs as captions: in each of the epoch's passes every video occurs once."""
    V = len(split.videos)
    draw = random.Random(1_000_003 * config.seed + epoch)
    starts = range(0, V, config.together)
    passes = max(1, round(sum(map(len, split.captions)) / V))
    indices, batches = [], []                   # of each batch: its videos
    for _ in range(passes):
        order = []
        for start in draw.sample(starts, len(starts)):          # neighbours stay together
            order += range(start, min(start + config.together, V))
        # subtle: cut per pass, so that no batch holds a video twice
        indices += [order[i:i + config.batch] for i in range(0, V, config.batch)]
    for index in indices:
        captions = [draw.choice(split.captions[v]) for v in index]
        batches.append(Batch([split.videos[v] for v in index], captions, torch.tensor(index)))
    return batches


def start(config: Config, made: dict,
          device: torch.device) -> tuple[CLIP2Video, torch.optim.Optimizer]:
    """The model before the first step, and its optimiser. made: Split.made."""
    path = data.clip_file(config.clip, config.root)
    if clip.sha256(path) != made["sha256"]:
        raise Mistake(f"{path} is not the CLIP that made these features; pass the right file with "
                      f"--clip, or prepare the dataset again")
    state = clip.read_state(path)
    activation = clip.activation_of(made)
    visual = clip.build(state, activation).visual if config.train_images else None
    # subtle: after the image tower has drawn, so that new modules start the same without it
    torch.manual_seed(config.seed)
    temporal, align = VARIANTS[config.variant]
    scale = min(float(state.get("logit_scale", MAX_SCALE)), MAX_SCALE)  # CLIP's own, if it has one
    model = CLIP2Video(clip.build_text(state, activation), temporal, align, centres=config.centres,
                       layers=config.layers, scale=scale, visual=visual).to(device)
    groups = []
    for in_tower, lr in ((True, config.text_lr), (False, config.lr)):
        for is_bias, decay in ((True, 0.0), (False, config.weight_decay)):
            group = {"base": lr, "weight_decay": decay, "params": []}
            for name, p in model.named_parameters():
                if name.startswith(("text.", "visual.")) == in_tower \
                        and name.endswith("bias") == is_bias:
                    group["params"].append(p)
            groups.append(group)
    # DEVIATION: AdamW corrects the bias of its moments, the BertAdam of CLIP4Clip does not
    return model, torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6, fused=True)


def loop(config: Config, resume: bool) -> None:
    """The training loop. It keeps the epoch with the best t2v R@1 on the validation split."""
    device = parallel.pick_device(config.device)
    training = read_split(config, "train")
    validation = read_split(config, "val")
    read_split(config, "test")                  # fails now, not after the training
    steps = len(batches_of_epoch(training, config, epoch=0))
    print(f"{len(training.videos)} training videos, {sum(map(len, training.captions))} captions, "
          f"{steps} steps per epoch")
    model, optimiser = start(config, training.made, device)
    run = progress.Run(config.folder, dataclasses.asdict(config), model, optimiser, config.epochs,
                       lambda row: row["t2v R@1"], resume=resume)

    for epoch in run.epochs():                                          # those left
        model.train()
        batches = batches_of_epoch(training, config, epoch)
        for step, batch in run.steps(batches):
            done = (epoch + step / len(batches)) / config.epochs
            # CLIP4Clip's schedule: a linear warm-up, then a cosine, which counts from the start
            rate = done / 0.1 if done < 0.1 else progress.cosine(done)
            for group in optimiser.param_groups:
                group["lr"] = group["base"] * rate
            ids = clip.tokenize(batch.captions, config.words, True).to(device)      # [B, W]
            texts = model.encode_text(ids)
            frames = training.frames[batch.index]                               # [B, L, D]
            mask = training.mask[batch.index].to(device)                        # [B, L]
            if config.train_images:
                # jittered by the step's own seed, so that a resumed run repeats it
                draw = random.Random(f"{config.seed} {epoch} {step}")
                pixels = read_pixels(config, batch.videos, draw).to(device)
                frames = model.encode_pixels(pixels, mask)
            videos = model.encode_video(frames.to(device), mask)
            value = loss(logits(texts, videos, model.logit_scale), config.weight)

            optimiser.zero_grad()
            value.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for p in model.parameters():                # and each by itself, as CLIP4Clip does
                nn.utils.clip_grad_norm_(p, 1.0)
            optimiser.step()
            with torch.no_grad():
                model.logit_scale.clamp_(max=MAX_SCALE)         # CLIP4Clip, after each step
            run.add({}, value, norm)                    # for the log; not finite: the run stops
        texts, videos, video_of = vectors(model, validation, config, device)
        if run.end_epoch(retrieval_metrics(texts @ videos.T, video_of)):        # the best so far
            files.save_tensors(config.folder / "ckpt.pt", {
                "config": dataclasses.asdict(config), "epoch": epoch + 1, "history": run.history,
                "model": model.state_dict(), "versions": progress.versions(),
                "clip_sha256": training.made["sha256"]})
        run.save()                                      # from which --resume continues


def train(config: Config, resume: bool = False) -> dict:
    """One run, in config.folder. Returns the metrics of the selected epoch on the test videos."""
    progress.new_folder(config.folder, resume)
    if config.dataset.startswith("shapes"):
        build_shapes(config)
    loop(config, resume)
    metrics = evaluate_checkpoint(config.folder / "ckpt.pt", config.root,
                                  parallel.pick_device(config.device))
    files.save(config.folder / "results.json", json.dumps(metrics, indent=1))
    return metrics
