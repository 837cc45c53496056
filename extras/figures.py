"""The figures of the paper and of docs/results.md: each function draws one into a file."""
import json

import numpy as np
import torch
import torch.nn.functional as F

import mmn
import parse
import shapes
import video
from extras import probe
from support import files


def save(figure, path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not figure.get_layout_engine():
        figure.tight_layout()
    files.save_figure(figure, path, metadata={"Software": None})


def curve(path, runs: list[list[dict]]) -> None:
    """R@1 over the number of training videos. runs: rows (MMN, vdi-staged per count) -> seeds."""
    counts = [row[0]["config"]["limit_videos"] for row in runs[::2]]
    splits, plt = list(runs[0][0]["hits"]["full"]), files.pyplot()
    figure, axes = plt.subplots(1, len(splits), figsize=(13, 3), sharey=True)
    for cell, split in zip(axes, splits):
        for k, name in enumerate(("MMN, tuned", "vdi-staged")):
            values = np.array([[run["results"][split]["R@1,IoU=0.5"] for run in row]
                               for row in runs[k::2]])
            cell.errorbar(counts, values.mean(1), values.std(1), label=name, capsize=3)
        cell.set(xscale="log", title=split, xlabel="training videos")
        cell.set_xticks(counts, counts)
        cell.minorticks_off()
    axes[0].set_ylabel("R@1, IoU=0.5")
    axes[0].legend()
    save(figure, path)


def context(path, gains: dict[str, dict[str, tuple[float, float]]]) -> None:
    """Differences on novel words by kind of world. gains: see reproduce.gains."""
    figure, axes = files.pyplot().subplots(figsize=(7.5, 4.2), layout="constrained")
    for k, (name, kinds) in enumerate(gains.items()):
        means, margins = zip(*kinds.values())
        axes.errorbar(np.arange(len(means)) + 0.12 * (k - 1), means, margins, fmt="o", capsize=3,
                      label=name)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(kinds)), kinds)
    axes.set(ylabel="R@1, IoU=0.5, points", title="novel words: mean and 95% interval, 5 worlds")
    figure.legend(fontsize=8, loc="outside lower center")
    save(figure, path)


def verbs(path, cosines: dict[str, list[list[float]]]) -> None:
    """Cosines between the 14 verbs by target and stage. cosines: name -> [14, 14]."""
    words = [word for pair in shapes.VERBS for word in pair]
    figure, axes = files.pyplot().subplots(2, 3, figsize=(10, 7), sharex=True, sharey=True,
                                           layout="constrained")
    for cell, (name, matrix) in zip(axes.T.flat, cosines.items()):
        picture = cell.imshow(matrix, cmap="RdBu_r", vmin=-1, vmax=1)
        cell.set_title(name, fontsize=10)
        cell.set_xticks(range(14), words, rotation=90, fontsize=8)
        cell.set_yticks(range(14), words, fontsize=8)
    figure.colorbar(picture, ax=axes, shrink=0.5, label="cosine")
    save(figure, path)


def queries(path, rates: dict[str, dict[str, list[list[float]]]]) -> None:
    """Fig. 3. rates: split -> method -> for Q, Q^s, Q^d the R@1 of each seed."""
    plt = files.pyplot()
    figure, axes = plt.subplots(1, len(rates), figsize=(6 * len(rates), 3), sharey=True,
                                squeeze=False)
    for cell, (split, methods) in zip(axes[0], rates.items()):
        for k, (name, values) in enumerate(methods.items()):
            cell.bar(np.arange(3) + 0.16 * k - 0.32, [np.mean(v) for v in values], 0.16,
                     yerr=[np.std(v) for v in values], label=name.replace("`", "").strip("*"))
        cell.set_xticks(range(3), ["Q", "Q^s", "Q^d"])
        cell.set(title=split, ylabel="R@1, IoU=0.5")
    axes[0][-1].legend(fontsize=8)
    save(figure, path)


def weights(path, histograms: dict[str, np.ndarray]) -> None:
    """Supplement, Fig. 1. histograms: part of speech -> counts of 30 bins from 0 to 3."""
    figure, axes = files.pyplot().subplots(figsize=(7, 3))
    for kind, counts in histograms.items():
        axes.stairs(100 * counts / counts.sum(), np.linspace(0, 3, 31), label=kind, linewidth=2)
    axes.set(xlabel="weight in the last layer (1: an even share)", ylabel="% of the words")
    axes.legend()
    save(figure, path)


def collapse(path, names: tuple[str, ...], logs: dict[str, list[list[dict]]]) -> None:
    """Left: both sides of Eq. 2 and Eq. 5 in `vdi`; right: the cosine between verbs. logs: method
    -> seeds -> epochs."""
    figure, (left, right) = files.pyplot().subplots(1, 2, figsize=(13, 3.4))
    lines = [(left, logs["vdi"], name, name) for name in names]
    lines += [(right, seeds, "cos x^qd", method) for method, seeds in logs.items()]
    for axes, seeds, name, label in lines:
        # as many epochs as the shortest run has
        means = [np.mean([row[name] for row in epoch]) for epoch in zip(*seeds)]
        axes.plot(range(1, len(means) + 1), means, label=label)
        axes.legend(fontsize=8)
    left.set(xlabel="epoch", yscale="log",
             title="vdi: variance over a batch, share of the squared norm")
    right.set(xlabel="epoch (vdi-staged: after stage 1)", title="mean cosine between verbs, x^qd")
    save(figure, path)


def heat(path, pixels, x, patches, trained) -> None:
    """Eq. 3 on the frames of a video. pixels [32, 3, R, R], features x, patches; trained: a module
    inject.SpatialDynamic."""
    maps = {"frame": pixels.permute(0, 2, 3, 1),
            "Eq. 3, FC = identity": probe.plain_heat(x, patches),
            "Eq. 3, after `vdi`": trained.heatmap(x[None], patches[None])[0]}
    figure, axes = files.pyplot().subplots(3, 16, figsize=(16, 3.4))
    for (name, pictures), line in zip(maps.items(), axes):
        low, high = pictures.min(), pictures.max()      # imshow ignores them for colour images
        for t, cell in zip(range(0, 32, 2), line):
            cell.imshow(pictures[t], vmin=low, vmax=high, cmap="inferno")
            cell.axis("off")
        line[0].set_title(name, loc="left", fontsize=11)
    save(figure, path)


def features_of(path: str, model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels and normalised features of 32 frames of a video file."""
    pixels, _ = video.sample_frames(path, 32, model.visual.resolution)
    x, patches = video.encode_frames(model, pixels)
    return pixels, F.normalize(x.float(), dim=1), F.normalize(patches.float(), dim=1)


def method(path, world: str, root: str) -> None:
    """Fig. 2: the method, with a video of the shapes world, laid out by assets/fig2.json."""
    boxes, arrows = json.loads((files.ASSETS / "fig2.json").read_text()).values()
    plan = shapes.plan_of(0, "train", 0)
    row = shapes.samples_of("", "train", plan)[2]
    query = parse.Parser(known={row.sentence: [(0, row.sentence.rindex(" "))]}).split(row.sentence)
    _, x, patches = next(probe.moments_of(world, root, 1))
    chosen = [event["start"] + 2 for event in plan["events"]]
    pixels, warmth = shapes.film(plan).permute(0, 2, 3, 1)[chosen], probe.plain_heat(x, patches)
    overlap = mmn.iou_map(torch.tensor([[row.start_sec, row.end_sec]]),
                          torch.tensor([row.duration_sec]), 16)[0]
    overlap[torch.ones(16, 16).tril(-1) > 0] = torch.nan        # no moment ends before it begins
    figure, axes = files.pyplot().subplots(figsize=(15, 7.5))
    figure.subplots_adjust(0, 0, 1, 1)
    axes.axvspan(35, 74, 0.17, 0.97, color="#fdf1e3", zorder=0)
    axes.text(73, 54.5, "in training only: inject.py", ha="right", color="#a05a00")
    for picture, place in ((np.hstack(pixels), (1, 17, 24, 17)), (overlap, (79, 89, 29, 18)),
                           (np.hstack(warmth[chosen]), (56, 72, 29, 22.5))):
        axes.imshow(picture, extent=place, cmap="inferno", zorder=2)
    colours = {"data": "#ffffff", "kept": "#dce9f7", "inject": "#fbd9ae", "loss": "#f7c6c6"}
    for x, y, text, kind in boxes.values():
        axes.text(x, y, text.format(**query._asdict()), ha="center", va="center", zorder=3,
                  ma="left" if kind == "data" else "center",
                  bbox=dict(boxstyle="round,pad=0.5", facecolor=colours[kind], edgecolor="#555555"))
    for arrow in arrows:
        a, b, *label = arrow.split()
        (ax, ay), (bx, by) = boxes[a][:2], boxes[b][:2]
        margin = 44
        if ax == bx:
            margin = 24
        elif ay == by:
            margin = 72
        axes.annotate("", (bx, by), (ax, ay), zorder=1, arrowprops=dict(
            arrowstyle="-|>", color="#333333", shrinkB=margin))
        axes.text(ax + 0.5 * (bx - ax), ay + 0.5 * (by - ay), "".join(label), ha="center",
                  va="center", zorder=2, bbox=dict(pad=1, facecolor="white", edgecolor="none"))
    axes.set(xlim=(0, 112), ylim=(68, 6), aspect="auto")
    axes.axis("off")
    save(figure, path)
