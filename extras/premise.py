"""The premise on real videos: CLIP sees what is there, not which way it moves.

    python -m extras.premise --features DIR --annotations DIR --text DIR

For pairs of actions: the cosine of their mean text vectors; how far the frames of labelled moments
lie toward the one or the other; and with which probability a moment of the first lies nearer to the
first than a moment of the second does (0.5 is chance), with the 95% interval of a bootstrap over
moments. Prints a table and draws assets/premise.png.
"""
import pathlib
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
from extras.real import read_vectors
from support import files, options
from support.errors import reported
from support.text import markdown

# two actions, and regular expressions that find the sentences of their moments
PAIRS = (("put on a shoe", "take off a shoe", r"\bput\w* on .*shoe", r"\btak\w* off .*shoe"),
         ("put object into bag", "take object out of bag", r"\bput\w* .*\b(in|into) .*bag",
          r"\btak\w* .*\b(out of|from) .*bag"),
         ("sit down", "stand up", r"\bs(it|at)\w* down", r"\b(stand|stood|gets?|got)\w* up"),
         ("drink water", "eat meal", r"\bdrink", r"\beat"),
         ("reading", "phone call", r"\bread|\bbook", r"\bphone"))
DRAWN = (0, 2, 3)                                       # of these


def moments_of(features: pathlib.Path, annotations: pathlib.Path) -> tuple[list[str], Tensor]:
    """The sentences of Charades-STA's test split and the mean frame of each moment [S, D]."""
    names = files.read_text(features / "videos.txt").split()
    frames_of = dict(zip(names, read_vectors(features, "frames")))      # video -> [T, D]
    sentences, moments = [], []
    for row in data.read_annotations("charades", "test", annotations):
        if row.video not in frames_of:
            continue
        frames = frames_of[row.video]
        first, last = (int(len(frames) * sec / row.duration_sec)
                       for sec in (row.start_sec, row.end_sec))
        sentences.append(row.sentence.lower())
        moments.append(F.normalize(frames[first:max(last, first + 1)].mean(0), dim=0))
    return sentences, torch.stack(moments)


def main() -> None:
    arguments = options.parser(__doc__.splitlines()[0], prog="python -m extras.premise")
    for name in ("--features", "--annotations", "--text"):
        arguments.add_argument(name, type=pathlib.Path, metavar="DIR", required=True)
    given = arguments.parse_args()
    with reported():
        run(given.features, given.annotations, given.text)


def run(features: pathlib.Path, annotations: pathlib.Path, text: pathlib.Path) -> None:
    lines = [line.split("\t") for line in
             files.read_text(text / "sentences.tsv").splitlines()]      # set, kind, class, sentence
    vectors = read_vectors(text, "text")
    means = {}                                          # action -> [D], of 60 sentences
    for action in sorted({line[2] for line in lines if line[0] == "ntu120"}):
        own = [i for i, line in enumerate(lines) if line[0] == "ntu120" and line[2] == action]
        means[action] = F.normalize(vectors[own].mean(0), dim=0)
    every = torch.stack(list(means.values()))
    apart = ~torch.eye(len(every), dtype=torch.bool)
    table = [["all pairs of actions", f"{(every @ every.T)[apart].mean():.3f}", "", ""]]
    sentences, moments = moments_of(features, annotations)
    figure, axes = files.pyplot().subplots(1, len(DRAWN), figsize=(13, 2.8))
    for k, (one, other, shows_one, shows_other) in enumerate(PAIRS):
        is_one = np.array([bool(re.search(shows_one, sentence)) for sentence in sentences])
        is_other = np.array([bool(re.search(shows_other, sentence)) for sentence in sentences])
        nearer = (moments @ (means[one] - means[other])).numpy()        # [S]
        a = nearer[is_one & ~is_other]
        b = nearer[is_other & ~is_one]
        rng = np.random.default_rng(0)
        drawn = [(rng.choice(a, len(a))[:, None] > rng.choice(b, len(b))).mean()
                 for _ in range(1000)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        area = (a[:, None] > b).mean()
        table.append([f"{one} / {other}", f"{float(means[one] @ means[other]):.3f}",
                      f"{area:.2f} [{low:.2f}, {high:.2f}]", f"{len(a)} / {len(b)}"])
        if k in DRAWN:
            cell = axes[DRAWN.index(k)]
            bins = np.linspace(min(a.min(), b.min()), max(a.max(), b.max()), 13)
            for values, action in ((a, one), (b, other)):
                shares = np.full(len(values), 100 / len(values))
                cell.hist(values, bins, weights=shares, histtype="stepfilled", alpha=0.5,
                          label=action)
            cell.set_title(f"area under the curve {area:.2f}", fontsize=10)
            cell.set_xlabel(f"cosine with \"{one}\" minus cosine with \"{other}\"", fontsize=8)
            cell.locator_params("x", nbins=5)
            cell.margins(y=0.4)                         # room for the legend
            cell.legend(fontsize=8, loc="upper left")
    axes[0].set_ylabel("% of the moments")
    files.save_figure(figure, files.ASSETS / "premise.png")
    print(markdown(["", "cosine", "area under the curve", "moments"], table))


if __name__ == "__main__":
    main()
