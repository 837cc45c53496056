"""The figures of the paper and of docs/results.md: each function draws one into a file. Those that
docs/reading.ipynb shows are drawn into given axes."""
import numpy as np
import torch
import torch.nn.functional as F

import data
import mmn
import parse
import shapes
from support import files


def queries(axes, methods: dict[str, list[list[float]]], title: str) -> None:
    """Fig. 3: R@1 by what is read. methods: method -> for Q, Q^s, Q^d the R@1 of each seed."""
    for k, (name, values) in enumerate(methods.items()):
        places = np.arange(3) + 0.16 * (k - (len(methods) - 1) / 2)     # around the ticks
        axes.bar(places, [np.mean(v) for v in values], 0.16, yerr=[np.std(v) for v in values],
                 label=name.replace("`", "").strip("*"))
    axes.set_xticks(range(3), ["Q", "Q^s", "Q^d"])
    axes.set(title=title, ylabel="R@1, IoU=0.5")


def fig3(path, rates: dict[str, dict]) -> None:
    """rates: split -> the methods of `queries`."""
    figure, axes = files.pyplot().subplots(1, len(rates), figsize=(6 * len(rates), 3), sharey=True,
                                           squeeze=False)
    for cell, (split, methods) in zip(axes[0], rates.items()):
        queries(cell, methods, split)
    axes[0][-1].legend(fontsize=8)                      # the methods are the same in all cells
    files.save_figure(figure, path)


def weights(path, histograms: dict[str, np.ndarray]) -> None:
    """Supplement, Fig. 1. histograms: part of speech -> counts of 30 bins from 0 to 3."""
    figure, axes = files.pyplot().subplots(figsize=(7, 3))
    for kind, counts in histograms.items():
        # shares, because there are twice as many other words as nouns
        axes.stairs(100 * counts / counts.sum(), np.linspace(0, 3, 31), label=kind, linewidth=2)
    axes.set(xlabel="weight in the last layer (1: an even share)", ylabel="% of the words")
    axes.legend()
    files.save_figure(figure, path)


def collapse(path, names: list[str], logs: dict[str, list[list[dict]]]) -> None:
    """Left: both sides of Eq. 2 and Eq. 5 in `vdi`; right: the cosine between verbs. logs: method
    -> seeds -> epochs."""
    figure, (left, right) = files.pyplot().subplots(1, 2, figsize=(13, 3.4))
    curves(left, mean_rows(logs["vdi"], names), names,
           "vdi: variance over a batch, share of the squared norm", log=True)
    for method, seeds in logs.items():
        curves(right, mean_rows(seeds, ["cos x^qd"]), ["cos x^qd"],
               "mean cosine between verbs (vdi-staged: after stage 1)", label=method)
    files.save_figure(figure, path)


def mean_rows(seeds: list[list[dict]], names: list[str]) -> list[dict]:
    """The means over seeds of the rows of their logs, for as many epochs as the shortest has."""
    return [{name: np.mean([row[name] for row in epoch]) for name in names}
            for epoch in zip(*seeds)]


# ------------------------------------------------------------------------------ docs/reading.ipynb

def strip(axes, pictures: torch.Tensor, title: str = "") -> None:
    """Pictures side by side: uint8 [n, 3, h, w], or maps [n, H, W]."""
    if pictures.ndim == 4:
        pictures = F.pad(pictures, (0, 1), value=255)   # a white line between two frames
        pictures = pictures.permute(0, 2, 3, 1)                         # [n, h, w + 1, 3]
    axes.imshow(np.hstack(pictures.numpy()), cmap="inferno")
    axes.set_title(title, loc="left", fontsize=10)
    axes.axis("off")


def chunks(axes, sentences: list[str], spans: list[list[tuple[int, int]]]) -> None:
    """Sentences with their noun chunks in colour; spans: start and end of each, in characters."""
    for row, (sentence, places) in enumerate(zip(sentences, spans)):
        colours = ["black"] * len(sentence)
        for start, end in places:
            colours[start:end] = ["C0"] * (end - start)
        for k, (letter, colour) in enumerate(zip(sentence, colours)):
            axes.text(k, -row, letter, family="monospace", color=colour)
    axes.set(xlim=(0, 80), ylim=(-len(sentences), 1))
    axes.axis("off")


def moments(axes, spans_sec: list, names: list[str], duration_sec: float) -> None:
    """Bars below a film strip, one row for each moment [start, end); an answer is grey."""
    for k, (start, end) in enumerate(spans_sec):
        colour = "grey" if names[k] == "answer" else f"C{k}"
        axes.barh(-k, end - start, 0.7, left=start, color=colour)
        # beside the bar, on the side that has more room
        place, side = (end, "left") if end < 0.7 * duration_sec else (start, "right")
        axes.text(place, -k, f" {names[k]} ", va="center", ha=side, fontsize=9)
    axes.set(xlim=(0, duration_sec), yticks=[], xlabel="seconds")


def matrix(axes, values: torch.Tensor, names: list[str], title: str) -> None:
    """Cosines between all pairs of `names`, [n, n]."""
    axes.imshow(values.numpy(), vmin=-0.2, vmax=1, cmap="viridis")
    for row in range(len(names)):
        for column in range(len(names)):
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center",
                      fontsize=7, color="white" if values[row, column] < 0.6 else "black")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(title, fontsize=10)


def score_map(axes, values: torch.Tensor, candidates: torch.Tensor, title: str) -> None:
    """A 2D map [N, N], blank where there is no candidate; its best cell is marked."""
    shown = values.masked_fill(~candidates, torch.nan)
    axes.imshow(shown.numpy(), cmap="viridis")
    first, last = divmod(int(values.masked_fill(~candidates, -torch.inf).argmax()), len(values))
    axes.plot(last, first, "s", markersize=9, markerfacecolor="none", color="red")
    axes.set(xlabel="last clip", ylabel="first clip")
    axes.set_title(title, fontsize=10)


def curves(axes, rows: list[dict], names: list[str], title: str, log: bool = False,
           label: str = "") -> None:
    """The values of a run's log over its epochs; label: the legend, if it is not the name."""
    for name in names:
        values = [row[name] for row in rows]
        axes.plot(range(1, len(rows) + 1), values, label=label or name)
    axes.set(xlabel="epoch", yscale="log" if log else "linear")
    axes.set_title(title, fontsize=10)
    axes.legend(fontsize=8)


# Fig. 2: name -> its place on a canvas of 112 x 68, its text, and what kind of box it is
BOXES = {
    "video": (9, 13, "a video", "data"),
    "sentence": (9, 60, "Q    {full}\nQ^s  {static}\nQ^d  {dynamic}\n(parse.py)", "data"),
    "f^v": (26, 13, "f^v: CLIP's image tower\nclip.py, frozen", "kept"),
    "f^q": (28, 60, "f^q: CLIP's text tower\nclip.py, adapted", "kept"),
    "eq1": (45, 29, "Eq. 1  TransDecoder\nQ^s asks the frames", "inject"),
    "eq2": (45, 45, "Eq. 2  L^vc: FC(x^qd) is\nto be what Q^s found", "loss"),
    "eq3": (64, 18, "Eq. 3  heatmaps\nEq. 4  SeqModel reads them", "inject"),
    "eq5": (64, 45, "Eq. 5  L^sd: queries relate\nas their videos' motions do", "loss"),
    "map": (84, 13, "all moments in a 2D map\nmmn.py", "kept"),
    "eq6": (84, 60, "Eq. 6, 9  overlap and\nalignment with the sentence", "kept"),
    "eq7": (102, 45, "Eq. 7, 8  L^iou, L^cl", "loss"),
    "eq10": (102, 60, "Eq. 10  start, end", "kept")}
ARROWS = [("video", "f^v", ""), ("sentence", "f^q", ""), ("f^v", "eq1", "X^v"),
          ("f^v", "eq3", "X~^v"), ("f^v", "map", "X^v"), ("f^q", "eq1", "x^qs"),
          ("f^q", "eq2", "x^qd"), ("f^q", "eq5", "x^qd"), ("f^q", "eq6", "x^q"),
          ("eq1", "eq2", "x~^qs"), ("eq3", "eq5", "m~"), ("map", "eq6", "X^m"),
          ("eq6", "eq7", ""), ("eq6", "eq10", "")]
COLOURS = {"data": "#ffffff", "kept": "#dce9f7", "inject": "#fbd9ae", "loss": "#f7c6c6"}


def method(path, world: str, root: str) -> None:
    """Fig. 2: the method, with the first training video of a shapes world."""
    seed, coupling = shapes.world_of(world)
    plan = shapes.plan_of(seed, "train", 0, coupling)
    sample = shapes.samples_of("train-0000", "train", plan)[2]          # any of its sentences
    query = parse.Parser(known={sample.sentence: [(0, sample.sentence.rindex(" "))]}).split(
        sample.sentence)
    chosen = [event["start"] + 2 for event in plan["events"]]           # a frame of each event
    pixels = shapes.film(plan).permute(0, 2, 3, 1)[chosen]              # [4, 32, 32, 3]
    store = data.open_store(world, world, root)
    x, patches = [F.normalize(torch.from_numpy(store.read(sample.video, kind)).float(), dim=1)
                  for kind in ("frames", "patches")]
    warmth = torch.einsum("td,tdhw->thw", x, patches)[chosen]           # Eq. 3, FC = identity
    overlap = mmn.iou_map(torch.tensor([[sample.start_sec, sample.end_sec]]),
                          torch.tensor([sample.duration_sec]), 16)[0]   # [16, 16]
    overlap[torch.ones(16, 16).tril(-1) > 0] = torch.nan        # no moment ends before it begins

    figure, axes = files.pyplot().subplots(figsize=(15, 7.5))
    figure.subplots_adjust(0, 0, 1, 1)                  # the canvas fills the figure
    axes.axvspan(35, 74, 0.17, 0.97, color="#fdf1e3", zorder=0)
    axes.text(73, 54.5, "in training only: inject.py", ha="right", color="#a05a00")
    for picture, place in ((np.hstack(pixels), (1, 17, 24, 17)), (overlap, (79, 89, 29, 18)),
                           (np.hstack(warmth), (56, 72, 29, 22.5))):
        axes.imshow(picture, extent=place, cmap="inferno", zorder=2)
    for x, y, text, kind in BOXES.values():
        axes.text(x, y, text.format(full=query.full, static=query.static, dynamic=query.dynamic),
                  ha="center", va="center", zorder=3, ma="left" if kind == "data" else "center",
                  bbox=dict(boxstyle="round,pad=0.5", facecolor=COLOURS[kind],
                            edgecolor="#555555"))
    for start, end, label in ARROWS:
        ax, ay = BOXES[start][:2]
        bx, by = BOXES[end][:2]
        margin = 44                                     # so that the arrow ends outside the box
        if ax == bx:
            margin = 24
        elif ay == by:
            margin = 72
        axes.annotate("", (bx, by), (ax, ay), zorder=1, arrowprops=dict(
            arrowstyle="-|>", color="#333333", shrinkB=margin))
        axes.text((ax + bx) / 2, (ay + by) / 2, label, ha="center", va="center", zorder=2,
                  bbox=dict(pad=1, facecolor="white", edgecolor="none"))
    axes.set(xlim=(0, 112), ylim=(68, 6), aspect="auto")
    axes.axis("off")
    files.save_figure(figure, path)
