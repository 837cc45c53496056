"""The equations on small examples, printed as characters: the fastest way into each file.

    python -m extras.walk inject        # two videos through Eq. 1-5
    python -m extras.walk mmn           # a map of 6 clips, read by Eq. 10
    python -m extras.walk evaluate      # IoU, NMS and R@1 by hand
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import evaluate
import inject
import mmn
import parse
import shapes
from support import options


def characters(maps: Tensor) -> str:
    """Maps [n, H, W] side by side, from the lowest value " " to the highest "@"."""
    levels = (maps - maps.min()) / (maps.max() - maps.min()) * 9.99
    lines = []
    for row in levels.transpose(0, 1).tolist():                         # n lists of W numbers
        pictures = ["".join(2 * " .:-=+*#%@"[int(level)] for level in line) for line in row]
        lines.append("  ".join(pictures))
    return "\n".join(lines)


@torch.no_grad()
def walk_inject() -> None:
    """Two videos of the shapes world through the shipped CLIP and Eq. 1-5, before training."""
    model = shapes.shipped()
    plans = [shapes.plan_of(0, "train", i) for i in range(2)]
    samples = shapes.samples_of("", "train", plans[0]) + shapes.samples_of("", "train", plans[1])
    sentences = [sample.sentence for sample in samples]
    video_of = torch.arange(2).repeat_interleave(len(samples) // 2)     # [S], as many of each video
    # in this world everything before the last word, the verb, is a noun chunk
    chunks = {sentence: [(0, sentence.rindex(" "))] for sentence in sentences}
    queries = parse.Parser(known=chunks).split_all(sentences)
    print(f"Q \"{queries[0].full}\", Q^s \"{queries[0].static}\", Q^d \"{queries[0].dynamic}\", "
          f"and {len(queries) - 1} more sentences\n")
    pixels = torch.cat([shapes.film(plan) for plan in plans])           # [B * T, 3, 32, 32]
    x, patches = model.encode_image(clip.normalise(pixels))
    frames = F.normalize(x, dim=1).unflatten(0, (2, -1))                # [B, T, D]
    patches = F.normalize(patches, dim=1).unflatten(0, (2, -1))         # [B, T, D, H, W]
    static = F.normalize(model.encode_text(clip.tokenize([q.static for q in queries])), dim=1)
    dynamic = F.normalize(model.encode_text(clip.tokenize([q.dynamic for q in queries])), dim=1)
    torch.manual_seed(0)
    context_module = inject.VisualContext(width=64, heads=4)
    dynamic_module = inject.SpatialDynamic(width=64, patch_width=64, grid=4, frames=32, heads=4)
    for layer in (dynamic_module.frame_fc, dynamic_module.patch_fc):
        nn.init.eye_(layer.weight)              # to show CLIP's own heat
        nn.init.zeros_(layer.bias)
    context = context_module(static, frames, video_of)
    heat = dynamic_module.heatmap(frames, patches)
    motion = dynamic_module.dynamic(heat)
    context_loss = inject.visual_context_loss(context_module.project(dynamic), context)
    dynamic_loss = inject.spatial_dynamic_loss(motion[video_of], dynamic_module.project(dynamic),
                                               video_of)
    for name, value in (("       frames X^v", frames), ("       patches X~^v", patches),
                        ("       queries x^qs", static), ("       queries x^qd", dynamic),
                        ("Eq. 1  context x~^qs", context), ("Eq. 2  L^vc", context_loss),
                        ("Eq. 3  heatmaps M", heat), ("Eq. 4  motion m~", motion),
                        ("Eq. 5  L^sd", dynamic_loss)):
        print(f"{name:24s} {str(list(value.shape)):18s} mean {value.mean():7.4f}")
    middles = [event["start"] + 2 for event in plans[0]["events"]]      # a frame of each event
    grey = F.adaptive_avg_pool2d(pixels[middles].float().mean(1), 8)     # [n, 2H, 2W]
    warm = F.adaptive_avg_pool2d(heat[0, middles], 8)            # as large as the frames
    print(f"\nframes of the first video, one of each event\n{characters(grey)}")
    print(f"\nEq. 3, FC = identity\n{characters(warm)}")
    print("\nThe heat of Eq. 3 is not a map of objects by itself (docs/results.md).")


def walk_mmn() -> None:
    """A map of 6 clips: its candidate moments, their scores, and how Eq. (10) reads the answers."""
    N = 6
    duration_sec = torch.tensor([60.0])
    candidates = mmn.MomentMap(N, 1, 1, pool_counts=(2, 1)).candidates  # [N, N]

    def show(title: str, grid: Tensor) -> None:
        print(f"\n{title}\n         last clip" + "".join(f"{j:6d}" for j in range(N)))
        for i in range(N):
            cells = [f"{grid[i, j]:6.2f}" if candidates[i, j] else "     ." for j in range(N)]
            print(f"first clip {i}      " + "".join(cells))

    print("6 clips of 10 s; cell (i, j) is [10 i, 10 (j + 1)) s. Candidates: the diagonal, the 2")
    print("next to it, and every second cell of 1 further out. \".\" is not a candidate.")
    overlap = mmn.iou_map(torch.tensor([[18.0, 41.0]]), duration_sec, N)        # [1, N, N]
    show("Eq. 7, y^iou: overlap with the labelled moment, 18 to 41 s", overlap[0])
    # the label with noise takes the place of a trained retriever
    noise = torch.randn(2, N, N, generator=torch.Generator().manual_seed(0))
    iou_scores = torch.sigmoid(8 * overlap - 4 + noise[0])
    contrastive_scores = torch.tanh(2 * overlap - 1 + 0.3 * noise[1])
    show("Eq. 6, Y~iou, of a good retriever, in (0, 1)", iou_scores[0])
    show("Eq. 9, Y~cl, of the same, in [-1, 1]", contrastive_scores[0])
    scores = mmn.fuse(iou_scores, contrastive_scores).masked_fill(~candidates, float("-inf"))
    show("Eq. 10, Y~ = Y~iou sqrt(0.5 Y~cl + 0.5)", scores[0])
    start, end = mmn.best_cell(scores)
    print("\ncmax, the best of each row:  " + "".join(f"{v:6.2f}" for v in scores[0].amax(1)))
    print(f"t~s = {start.item()} is the best row, t~e = {end.item()} its best cell; the best "
          f"moments, none of which overlaps a better one by IoU > 0.5:")
    for start, end, score in mmn.decode(scores, duration_sec, 3, 0.5, candidates)[0].tolist():
        print(f"  {start:4.0f} to {end:2.0f} s, score {score:.2f}")


def walk_evaluate() -> None:
    """One sentence whose moment is 10 to 20 s, three answers, and every metric by hand."""
    truth = torch.tensor([[10.0, 20.0]])
    moments = torch.tensor([[14.0, 30.0], [12.0, 30.0], [9.0, 18.0]])
    print("The sentence's moment is [10, 20) s. Three answers, best first:")
    for (start, end), iou in zip(moments.tolist(), mmn.interval_iou(moments, truth)):
        overlap = min(end, 20) - max(start, 10)
        union = max(end, 20) - min(start, 10)
        print(f"  [{start:2.0f}, {end:2.0f})   overlap {overlap:2.0f} s, union {union:2.0f} s, "
              f"IoU {overlap:.0f} / {union:.0f} = {iou:.2f}")
    near = mmn.interval_iou(moments[0], moments)                        # [3] with the best answer
    print(f"NMS: the second overlaps the first by IoU {near[1]:.2f} > 0.5 and is dropped; the "
          f"third, by {near[2]:.2f}, stays.")
    metrics = evaluate.recall(moments[None, [0, 2]], truth)
    print("R@1 looks at the first remaining answer, R@5 at the first five, here two:")
    print("  " + "   ".join(f"{name} {value:.2f}" for name, value in metrics.items()))


def main() -> None:
    parser = options.parser("the equations on small examples", prog="python -m extras.walk")
    parser.add_argument("walk", choices=("inject", "mmn", "evaluate"), help="the file to explain")
    given = parser.parse_args()
    if given.walk == "inject":
        walk_inject()
    elif given.walk == "mmn":
        walk_mmn()
    else:
        walk_evaluate()


if __name__ == "__main__":
    main()
