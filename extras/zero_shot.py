"""CLIP alone, without training: how good is it, and does it know when nothing fits?

    python evaluate.py --zero-shot --dataset shapes --clip shapes       # a row of the evaluation
    python -m extras.zero_shot choose                   # which score: phi, or the scan statistic?
    python -m extras.zero_shot found                    # "nothing found": the trade-off as a curve
    python -m extras.zero_shot names DIR                # real CLIP vectors of a video and of names

Shapes: B videos, S sentences, T frames, N clips, D width of CLIP's joint space, G generic
sentences.
"""
import support  # first, for a Ctrl-C while torch is imported
import json
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import clip
import data
import evaluate
import mmn
import retrieve
import shapes
from support import options, parallel
from support.errors import Mistake, reported
from support.text import markdown


class Contrast(mmn.MomentMap):
    """`retrieve.zero_shot_scores` behind the interface of a retriever. Every moment but the whole
    video is a candidate: that has no outside."""

    def __init__(self, num_clips: int, power: float = retrieve.POWER, smooth: int = 1,
                 longest: float = 0.5):
        diagonals = min(num_clips - 2, max(1, int(num_clips * longest)) - 1)
        super().__init__(num_clips, 1, 1, (diagonals,))
        self.power, self.smooth = power, smooth

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """frames [B, T, D] and text [S, D] unit vectors, video_of [S] -> [S, N, N], 0 outside the
        candidates."""
        result = []
        for x, video in zip(text, video_of):
            seen = frames[video]
            if self.smooth > 1:
                seen = F.avg_pool1d(seen.T, self.smooth, 1, self.smooth // 2,
                                    count_include_pad=False).T
            result.append(retrieve.zero_shot_scores(seen, x[None], self.num_clips, self.power)[0])
        return self.to_map(self.at_candidates(torch.stack(result)))


def run_of(dataset: str, clip_name: str, root: str, device: torch.device,
           **variant) -> evaluate.Run:
    """A frozen CLIP as evaluate.py expects a checkpoint."""
    store = data.open_store(dataset, clip_name, root)
    path = data.clip_file(clip_name, root)
    text = clip.build_text(clip.read_state(path)).to(device)
    parser = data.parser_of(dataset, root)
    num_clips = 64 if dataset.startswith("activitynet") else 16
    config = dict(dataset=dataset, clip=clip_name, root=root, frames=store.manifest["frames"],
                  method="zero-shot", seed=0, batch=64, parser="", mask="", num_clips=num_clips)
    return evaluate.Run(config, text, Contrast(num_clips, **variant).to(device),
                        {"clip_sha256": clip.sha256(path), "parser": parser.name, "epoch": 0})


def worlds(root: str, count: int = 3) -> list[str]:
    names = [f"shapes-{seed}" if seed else "shapes" for seed in range(count)]
    for name in names:
        shapes.build(name, root)
    return names


def choose(root: str, device: torch.device) -> str:
    """R@1, IoU=0.5 and 0.7 of the variants, on the validation splits of three worlds."""
    rows, variants = [], [(power, smooth, longest) for power in (0.0, 0.25, 0.5)
                          for smooth in (1, 3) for longest in (1.0, 0.5)]
    for power, smooth, longest in variants:
        cells = []
        for split in ("val", "val-novel-word"):
            for mu in (0.5, 0.7):
                values = []
                for world in worlds(root):
                    run = run_of(world, world, root, device, power=power, smooth=smooth,
                                 longest=longest)
                    for _, videos, predicted in evaluate.answers(run, [split], device=device):
                        metrics = evaluate.recall(predicted[..., :2], videos.moments_sec)
                        values.append(metrics[f"R@1,IoU={mu}"])
                cells.append(f"{sum(values) / len(values):.1f}")
        rows.append([str(power), str(smooth), str(longest), *cells])
    return markdown(["power", "frames averaged", "longest", "val R@1 0.5", "0.7",
                     "val-novel-word R@1 0.5", "0.7"], rows)


# --------------------------------------------------------------------------------- "nothing found"

@torch.no_grad()
def z_scores(run: evaluate.Run, split: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """z of the best moment of each sentence in its own video, and in the next video of the split
    in which neither its actor nor its verb occurs; [S] each."""
    config = run.config
    store = data.open_store(config["dataset"], config["clip"], config["root"])
    rows = data.read_annotations(config["dataset"], split, config["root"])
    events = shapes.read_events(config["dataset"], config["root"])
    generic = retrieve.generic_sentences(config["dataset"])
    sentences = [*(row.sentence for row in rows), *generic]
    text = F.normalize(torch.cat([run.text.encode_text(part.to(device)) for part in
                                  clip.tokenize(sentences).split(256)]), dim=1)
    names = list(dict.fromkeys(row.video for row in rows))
    best = {}
    for name in names:
        x = torch.from_numpy(store.read(name, "frames")).float().to(device)
        scores = run.retriever.scores(F.normalize(x, dim=1)[None], text,
                                      torch.zeros(len(text), dtype=torch.long, device=device))
        best[name] = run.retriever.at_candidates(scores).amax(1).cpu()          # [S + G]
    own, other = [], []
    for i, row in enumerate(rows):
        named = next(e for e in events[row.video] if abs(e.start_sec - row.start_sec) < 1e-3)
        at = names.index(row.video)
        strangers = [name for name in names[at + 1:] + names[:at] if not any(
            e.noun == named.noun or e.verb == named.verb for e in events[name])]
        for video, values in ((row.video, own), (strangers[0] if strangers else None, other)):
            if video:
                unrelated = best[video][len(rows):]
                values.append((best[video][i] - unrelated.mean()) / unrelated.std())
    return torch.stack(own), torch.stack(other)


def found(root: str, device: torch.device, checkpoints: list[str]) -> str:
    """How often a sentence is found where it is described, and where nothing fits, by threshold."""
    runs = [(f"CLIP alone, {world}", run_of(world, world, root, device)) for world in worlds(root)]
    runs += [(path, evaluate.load(path, device)) for path in checkpoints]
    thresholds, rows = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0], []
    for name, run in runs:
        own, other = z_scores(run, "val", device)
        area = (own[:, None] > other[None]).double().mean()
        rows.append([name, f"{100 * area:.1f}", *(
            f"{100 * (own >= t).double().mean():.0f} / {100 * (other >= t).double().mean():.0f}"
            for t in thresholds)])
    return markdown(["found, %: described / nothing fits", "area under the curve",
                     *(f"z >= {t}" for t in thresholds)], rows)


def names(folder: str, shown: list[str]) -> str:
    """Where CLIP alone finds things in a video, from vectors made elsewhere: VIDEO.frames.npy
    [F, D], lvis_names.json and lvis_text.npy [1203, D]. z is over all names."""
    place = pathlib.Path(folder)
    path = next(place.glob("*.frames.npy"))
    frames, text = (F.normalize(torch.from_numpy(np.load(each)).float(), dim=1)
                    for each in (path, place / "lvis_text.npy"))
    known = json.loads((place / "lvis_names.json").read_text())
    similarity = text @ frames.T                                        # [1203, F]
    best = retrieve.search_intervals(similarity, 1, len(frames) // 2)[:, 0]     # [1203, 3]
    z = (best[:, 2] - best[:, 2].mean()) / best[:, 2].std()
    rows = []
    for k in map(known.index, shown):
        start, end = (round(float(v) / len(frames), 2) for v in best[k, :2])
        rows.append([known[k], f"{similarity[k].max():.3f}", f"{start:.2f} to {end:.2f}",
                     f"{z[k]:+.1f}", "yes" if z[k] >= retrieve.FOUND else "no"])
    return markdown(["name", "highest cosine", "moment, share of the video", "z", "found"], rows)


NAMES = ["doorknob", "poster", "cup", "bottle", "sweatshirt", "chair", "elephant", "airplane",
         "bicycle", "walking_cane"]


def main() -> None:
    arguments = options.parser("CLIP alone, without training", prog="python -m extras.zero_shot")
    add = arguments.add_argument
    add("what", choices=("choose", "found", "names"), help="the score, the threshold, an example")
    add("inputs", nargs="*", help="found: ckpt.pt of runs on shapes worlds, too; names: a folder")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_intermixed_args()
    with reported():
        device = parallel.pick_device(given.device)
        if given.what == "choose":
            print(choose(given.root, device))
        elif given.what == "found":
            print(found(given.root, device, given.inputs))
        elif len(given.inputs) != 1:
            raise Mistake("names needs the folder of the vectors")
        else:
            print(names(given.inputs[0], NAMES))


if __name__ == "__main__":
    main()
