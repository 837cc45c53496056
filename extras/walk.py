"""The equations and the data on small examples, in characters: the fastest way into each file.

    python -m extras.walk inject                                # two videos through Eq. 1-5
    python -m extras.walk mmn                                   # a map of 6 clips, read by Eq. 10
    python -m extras.walk evaluate                              # IoU, NMS and R@5 by hand
    python -m extras.walk video FILE                            # which frames would be sampled
    python -m extras.walk clip IMAGE "a text" "another text"    # what CLIP finds similar
"""
import support  # first, for a Ctrl-C while torch is imported
import os
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip as clip_module
import evaluate as evaluate_module
import inject as inject_module
import mmn as mmn_module
import parse
import shapes
import video as video_module
from support import options
from support.errors import Mistake, reported
from support.text import printable

WEIGHTS = "data/shapes/clip.pt"                 # made by python train.py


def characters(maps: Tensor) -> str:
    """Maps [n, H, W] side by side, from the lowest value " " to the highest "@"."""
    levels = (maps - maps.min()) / (maps.max() - maps.min()) * 9.99
    lines = []
    for row in levels.transpose(0, 1).tolist():                         # n lists of W numbers
        pictures = ["".join(2 * " .:-=+*#%@"[int(level)] for level in line) for line in row]
        lines.append("  ".join(pictures))
    return "\n".join(lines)


@torch.no_grad()
def inject(given) -> None:
    """Two videos of the shapes world through Eq. 1-5, before training."""
    exists = pathlib.Path(WEIGHTS).exists()
    model = clip_module.load(WEIGHTS) if exists else shapes.small_clip(0)
    plans = [shapes.plan_of(0, "train", i) for i in range(2)]
    rows = [(i, s.sentence) for i in range(2) for s in shapes.samples_of("", "train", plans[i])]
    video_of = torch.tensor([i for i, _ in rows])
    parser = parse.Parser(known={s: [(0, s.rindex(" "))] for _, s in rows})
    queries = parser.split_all([sentence for _, sentence in rows])
    pixels = torch.cat([shapes.film(plan) for plan in plans])           # [B * T, 3, 32, 32]
    frames, patches = (F.normalize(y, dim=1).unflatten(0, (2, -1))
                       for y in model.encode_image(clip_module.normalise(pixels)))
    static, dynamic = (F.normalize(model.encode_text(clip_module.tokenize([q[k] for q in queries])),
                                   dim=1) for k in (1, 2))
    D, grid, T = frames.shape[2], patches.shape[3], frames.shape[1]
    torch.manual_seed(0)
    context_module = inject_module.VisualContext(D, 4)
    dynamic_module = inject_module.SpatialDynamic(D, D, grid, T, 4)
    for layer in (dynamic_module.frame_fc, dynamic_module.patch_fc):
        nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)  # to show CLIP's own heat

    context = context_module(static, frames, video_of)
    heat = dynamic_module.heatmap(frames, patches)
    motion = dynamic_module.dynamic(heat)
    context_loss = inject_module.visual_context_loss(context_module.project(dynamic), context)
    dynamic_loss = inject_module.spatial_dynamic_loss(
        motion[video_of], dynamic_module.project(dynamic), video_of)
    print(f"CLIP: {WEIGHTS if exists else 'untrained; python train.py makes a trained one'}\n"
          f"Q \"{queries[0].full}\", Q^s \"{queries[0].static}\", Q^d \"{queries[0].dynamic}\", "
          f"and {len(rows) - 1} more sentences\n")
    for what, value in {
            "       frames X^v": frames, "       patches X~^v": patches,
            "       static queries x^qs": static, "       dynamic queries x^qd": dynamic,
            "Eq. 1  context x~^qs": context, "Eq. 2  L^vc": context_loss,
            "Eq. 3  heatmaps M": heat, "Eq. 4  motion m~": motion,
            "Eq. 5  L^sd": dynamic_loss}.items():
        mean = f"mean {value.mean():.4f}" if "L^" in what else ""
        print(f"{what:29s} {str(list(value.shape)):18s} {mean}".rstrip())
    grey = pixels[:T].float().mean(1, keepdim=True)                     # [T, 1, 32, 32]
    for title, maps in (("frames of the first video, one of each event", grey),
                        ("Eq. 3, FC = identity", heat[0, :, None])):
        maps = F.adaptive_avg_pool2d(maps, 2 * grid)[:, 0]
        print(f"\n{title}\n{characters(maps[[e['start'] + 2 for e in plans[0]['events']]])}")
    print("\nThe heat of Eq. 3 is not a map of objects by itself (docs/results.md).")


def mmn(given) -> None:
    """A map of 6 clips: its candidate moments, their scores, and how Eq. (10) reads the answers."""
    N, pool_counts, duration_sec = 6, (2, 1), torch.tensor([60.0])
    candidates = mmn_module.MomentMap(N, 1, 1, pool_counts).candidates

    def show(title: str, grid: Tensor) -> None:
        print(f"\n{title}\n         last clip" + "".join(f"{j:6d}" for j in range(N)))
        for i, row in enumerate(grid.tolist()):
            print(f"first clip {i}      " + "".join(f"{v:6.2f}" if candidates[i, j] else "     ."
                                                     for j, v in enumerate(row)))

    print(f"{N} clips of 10 s; cell (i, j) is the moment [10 i, 10 (j + 1)) s. Candidates with "
          f"pool_counts={pool_counts}: the\ndiagonal, the 2 next to it, and every second cell of 1 "
          f"further out. \".\" is not a candidate.")
    overlap = mmn_module.iou_map(torch.tensor([[18.0, 41.0]]), duration_sec, N)     # [1, N, N]
    show("Eq. 7, y^iou: overlap with the labelled moment, 18 to 41 s", overlap[0])
    # instead of a trained retriever: the label, and noise
    noise = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0))
    iou_scores = torch.sigmoid(8 * overlap - 4 + noise[0])
    contrastive_scores = torch.tanh(2 * overlap - 1 + 0.3 * noise[1])
    show("Eq. 6, Y~iou, of a good retriever, in (0, 1)", iou_scores[0])
    show("Eq. 9, Y~cl, of the same, in [-1, 1]", contrastive_scores[0])
    scores = mmn_module.fuse(iou_scores, contrastive_scores).masked_fill(~candidates,
                                                                         float("-inf"))
    show("Eq. 10, Y~ = Y~iou sqrt(0.5 Y~cl + 0.5)", scores[0])
    start, end = mmn_module.best_cell(scores)
    print("\ncmax, the best of each row:  " + "".join(f"{v:6.2f}" for v in scores[0].amax(1))
          + f"\nt~s = {start.item()} is the best row, t~e = {end.item()} its best cell; the best "
            f"moments, none of which overlaps a better one by IoU > 0.5:")
    for start_sec, end_sec, score in mmn_module.decode(scores, duration_sec, 3, 0.5,
                                                       candidates)[0].tolist():
        print(f"  {start_sec:4.0f} to {end_sec:2.0f} s, score {score:.2f}")


def evaluate(given) -> None:
    """One sentence whose moment is 10 to 20 s, three answers, and every metric by hand."""
    iou_of = mmn_module.interval_iou
    truth = torch.tensor([[10.0, 20.0]])
    moments = torch.tensor([[14.0, 30.0, 0.9], [12.0, 30.0, 0.8], [9.0, 18.0, 0.3]])
    print("The sentence's moment is [10, 20) s. Three answers, best first:")
    for start, end, score in moments.tolist():
        overlap = min(end, 20) - max(start, 10)
        union = max(end, 20) - min(start, 10)
        iou = iou_of(torch.tensor([start, end]), truth)[0]
        hits = ", ".join(f"{'a' if iou >= mu else 'no'} hit at {mu}" for mu in (0.5, 0.7))
        print(f"  [{start:2.0f}, {end:2.0f}) score {score:.1f}   overlap {overlap:2.0f} s of a "
              f"union of {union:2.0f} s: IoU {overlap:.0f} / {union:.0f} = {iou:.2f}, {hits}")
    print(f"NMS: the second overlaps the first by IoU {iou_of(moments[0, :2], moments[1, :2]):.2f} "
          f"> 0.5 and is dropped; the third by {iou_of(moments[0, :2], moments[2, :2]):.2f}, and "
          f"stays.")
    metrics = evaluate_module.recall(moments[None, [0, 2], :2], truth)
    print("R@1 looks at the first remaining answer, R@5 at the first five, here two; in percent of "
          "all sentences, here one:")
    print("  " + "   ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


def video(given) -> None:
    """What a video file is, which of its frames would be sampled, and how they would be cropped."""
    if min(given.frames, given.resolution) < 1:
        raise Mistake("--frames and --resolution must be at least 1")
    duration_sec = video_module.probe_duration(given.file)
    with video_module.open_video(given.file) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 25)
        codec = stream.codec_context.name
    h, w = next(video_module.frames_at(given.file, np.zeros(1))).shape[1:]
    print(f"{printable(given.file)}: {codec}, {w} x {h}, {rate:.2f} frames/s, {duration_sec:.2f} s")
    T, R = given.frames, given.resolution
    times_sec = video_module.frame_centres(duration_sec, T)
    print(f"{T} parts of {duration_sec / T:.2f} s; the frame on screen at the centre of each "
          f"(numbered by the mean frame rate):")
    for i in range(0, T, 8):
        line = "  ".join(f"{t:9.2f} s #{int(t * rate):<4d}" for t in times_sec[i:i + 8])
        print(line.rstrip())
    short, long = sorted((h, w))
    print(f"short side of {short} to {R}, then the centre {R} x {R}: {100 * short / long:.0f}% of "
          f"the picture")


@torch.no_grad()
def clip(given) -> None:
    """Cosine of an image (or a video's first frame) with each text, and of the texts with each
    other."""
    if given.weights not in clip_module.PUBLISHED and not os.path.exists(given.weights):
        raise Mistake(f"there is no {given.weights}; python shapes.py makes {WEIGHTS}, or use "
                      f"--weights ViT-B/32")
    model = clip_module.load(given.weights)
    frame = next(video_module.frames_at(given.image, [0.0]))
    x, patches = model.encode_image(clip_module.preprocess(frame[None], model.visual.resolution))
    q = F.normalize(model.encode_text(clip_module.tokenize(given.texts, truncate=True)), dim=1)
    print(f"image {list(frame.shape)} -> x {list(x.shape)}, patches {list(patches.shape)}")
    cosines = (q @ F.normalize(x, dim=1).T)[:, 0]                       # [S]
    shares = (model.logit_scale.exp() * cosines).softmax(0)
    print("cosine with the image, share (softmax over the texts), cosine with each text")
    for text, cosine, share, row in zip(given.texts, cosines, shares, q @ q.T):
        print(f"{cosine:7.3f} {share:7.3f}   " + " ".join(f"{v:6.3f}" for v in row)
              + f"   {printable(text)}")


def main() -> None:
    parser = options.parser("the equations and the data on small examples",
                            prog="python -m extras.walk")
    walks = parser.add_subparsers(dest="walk", required=True)
    commands = {}
    for function in (inject, mmn, evaluate, video, clip):
        text = function.__doc__.split("\n\n")[0]
        command = walks.add_parser(function.__name__, help=text, description=text,
                                   formatter_class=options.Formatter)
        command.set_defaults(function=function)
        commands[function.__name__] = command
    commands["video"].add_argument("file", help="a video")
    commands["video"].add_argument("--frames", type=int, default=32, help="T, frames to sample")
    commands["video"].add_argument("--resolution", type=int, default=224,
                                   help="R, side of CLIP's images")
    commands["clip"].add_argument("image", help="an image, or a video, whose first frame is used")
    commands["clip"].add_argument("texts", nargs="+", help="what it may show")
    commands["clip"].add_argument("--weights", default=WEIGHTS,
                                  help="a weight file, or a published name")
    given = parser.parse_args()
    with reported():
        given.function(given)


if __name__ == "__main__":
    main()
