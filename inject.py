"""Visual-Dynamic Injection: what changes in a video, for the text tower (Sec. 3.1, Eq. 1-5).

CLIP's text tower reads nouns and is blind to verbs. Two losses adapt it through the dynamic query
Q^d, the sentence without its noun chunks:

    visual context   (Eq. 1, 2)  FC(x^qd) is to be what the static query Q^s finds in the frames
    spatial dynamic  (Eq. 3-5)   two sentences are to be as similar as their videos' motions are

`temporal_change`, at the end, is the target of the method `vdi-staged`; everything before it is the
paper's letter. Nothing in this file is needed, or loaded, at inference.

    python inject.py

walks two videos of the shapes world through Eq. 1-5 before training: the shape of each result, both
losses, and frames above their heatmaps of Eq. 3, in characters.

Shapes: B videos, S sentences in the batch, T frames, D width of CLIP's joint space, D' channels of
the patch features, H x W patch grid. `video_of` [S] tells which video of the batch a sentence
belongs to. UNSPECIFIED: the feature scale; all CLIP features arrive L2-normalised over channels.
"""
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------- visual context injection

class VisualContext(nn.Module):
    """Eq. (1), Sec. 3.1: the static query asks the frames, a transformer decoder answers.

        x^qs = f^q(Q^s),   x~^qs = TransDecoder(x^qs, X^v, X^v)

    and `project`, the FC of Eq. (2). UNSPECIFIED: depth, heads, positions. The preset's layers and
    heads, no dropout, and no positions: the context is which entities there are, not when. `probe`
    asks where no query does (Table 3, "without Q")."""

    def __init__(self, width: int, layers: int, heads: int):
        super().__init__()
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, layers)
        self.project = nn.Linear(width, width)
        self.probe = nn.Parameter(torch.randn(width) * width ** -0.5)

    def forward(self, static: Tensor | None, frames: Tensor, video_of: Tensor) -> Tensor:
        """static x^qs [S, D] or None, frames X^v [B, T, D], video_of [S] -> x~^qs [S, D]."""
        if static is None:
            static = self.probe.expand(len(video_of), -1)
        return self.decoder(static[:, None], frames[video_of])[:, 0]    # [S, D]


def visual_context_loss(projected: Tensor, context: Tensor) -> Tensor:
    """Eq. (2), Sec. 3.1: the dynamic query is to carry the visual context.

        L^vc(V, Q) = || FC(x^qd) - x~^qs ||_2^2

    projected  [S, D] FC(x^qd)
    context    [S, D] x~^qs
    returns    [S], at least 0: the squared norm is a sum over D
    """
    return (projected - context).square().sum(1)


# ------------------------------------------------------------------------ spatial dynamic injection

class SpatialDynamic(nn.Module):
    """Eq. (3), (4), Sec. 3.1: where the salient entities are in each frame, read in time order.

    The FCs of Eq. (3), (4), SeqModel, and `project`, the FC of Eq. (5). UNSPECIFIED: depth, heads,
    positions. The preset's layers and heads, no dropout, learned positions: the dynamics is in the
    order of the frames. `lstm`: SeqModel is an LSTM instead (Table 3)."""

    def __init__(self, width: int, patch_width: int, grid: int, frames: int, layers: int,
                 heads: int, lstm: bool = False):
        super().__init__()
        self.frame_fc = nn.Linear(width, width)
        self.patch_fc = nn.Linear(patch_width, width)
        self.flat_fc = nn.Linear(grid * grid, width)
        self.positions = nn.Parameter(torch.randn(frames, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.sequence = (nn.LSTM(width, width, layers, batch_first=True) if lstm else
                         nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))
        self.project = nn.Linear(width, width)

    def heatmap(self, frames: Tensor, patches: Tensor) -> Tensor:
        """Eq. (3), Sec. 3.1: correlation of every patch with the whole frame.

            M_i = FC(x_i^v) . FC(X~_i^v) / sqrt(D)

        frames [B, T, D], patches [B, T, D', H, W]; returns [B, T, H, W]"""
        D = frames.shape[2]
        # UNSPECIFIED: with unit-norm features the heatmap is almost 0; inputs are scaled by sqrt(D)
        frame = self.frame_fc(frames * D ** 0.5)                        # [B, T, D]
        patch = self.patch_fc(patches.movedim(2, 4) * D ** 0.5)         # [B, T, H, W, D]
        return torch.einsum("btd,bthwd->bthw", frame, patch) / D ** 0.5

    def dynamic(self, heatmaps: Tensor) -> Tensor:
        """Eq. (4), Sec. 3.1: a vector per heatmap, a transformer encoder over them, averaged; or
        the last state of an LSTM.

            m_i = FC(Flatten(M_i)),   m~ = SeqModel({m_i})

        heatmaps [B, T, H, W]; returns [B, D]"""
        m = self.flat_fc(heatmaps.flatten(2))                           # [B, T, D]
        if isinstance(self.sequence, nn.LSTM):
            return self.sequence(m)[0][:, -1]                           # [B, D]
        return self.sequence(m + self.positions).mean(1)                # [B, D]

    def forward(self, frames: Tensor, patches: Tensor) -> Tensor:
        """frames [B, T, D], patches [B, T, D', H, W] -> m~ [B, D]."""
        return self.dynamic(self.heatmap(frames, patches))


def pairwise_cosine(x: Tensor) -> Tensor:
    """cos(x_i, x_j) of all pairs: [S, D] -> [S, S]."""
    x = F.normalize(x, dim=1)
    return x @ x.T


def spatial_dynamic_loss(dynamic: Tensor, projected: Tensor, video_of: Tensor,
                         same_video: bool = False) -> Tensor:
    """Eq. (5), Sec. 3.1, and its mean in Eq. (11): sentences relate as their videos' motions do.

        eps^v = cos(m~, m~'),   eps^q = cos(FC(x^qd), FC(x^qd')),   L^sd = (eps^v - eps^q)^2

    dynamic     [S, D] m~ of each sentence's video
    projected   [S, D] FC(x^qd)
    video_of    [S]; pairs of one video are left out, unless `same_video`
    returns     [S] in [0, 4]: mean over the other videos' sentences, 0 where there are none
    """
    # UNSPECIFIED: Eq. 11 averages over all pairs; within one video eps^v = 1 always
    pair = same_video | (video_of[:, None] != video_of[None, :])        # [S, S]
    difference = (pairwise_cosine(dynamic) - pairwise_cosine(projected)).square()  # [S, S]
    return (difference * pair).sum(1) / pair.sum(1).clamp(min=1)


def batch_variance(x: Tensor) -> Tensor:
    """Variance of the rows of [S, D], summed over D, as a share of their mean squared norm.

    1: the rows have mean 0; 0: all rows are equal, as they are when a loss has collapsed."""
    return x.var(0, unbiased=False).sum() / x.square().sum(1).mean().clamp(min=1e-12)


# ------------------------------------------------------------------------- the target of vdi-staged

def temporal_change(static: Tensor | None, frames: Tensor, moments_sec: Tensor,
                    durations_sec: Tensor, target: str = "change") -> Tensor:
    """What changes during the moment in what the static query asks for; replaces x~^qs in Eq. (2).

        a_f = softmax_f(10 cos(x^qs, x_f)),   change = sum_late a_f x_f - sum_early a_f x_f

    each sum over one half of the moment's frames, with weights that add up to 1 in that half.

    static         [S, D] x^qs of the frozen original text tower; None: all frames weigh the same
    frames         [S, T, D] frames of each sentence's video, T equal parts of its duration
    moments_sec    [S, 2]; durations_sec [S]
    target         "change"; or, to compare: "mean" of the moment, "whole": mean of the video
    returns        [S, D], without gradient
    """
    # DEVIATION: attention without parameters, which cannot collapse, in the place of TransDecoder
    # DEVIATION: only frames of the labelled moment, not the whole video; late minus early half
    T = frames.shape[1]
    centre = (torch.arange(T, device=frames.device) + 0.5) / T          # [T] share of the video
    centre = centre * durations_sec[:, None]                            # [S, T] seconds
    start, end = moments_sec[:, :1], moments_sec[:, 1:]
    middle = (start + end) / 2
    attention = torch.zeros_like(centre)                                # [S, T]
    if static is not None:
        attention = 10 * torch.einsum("sd,std->st", static, frames)

    def weighted(a: Tensor, b: Tensor) -> Tensor:
        inside = (centre >= a) & (centre < b)                           # True = frame counts
        nearest = (centre - (a + b) / 2).abs().argmin(1, keepdim=True)
        inside = inside.scatter(1, nearest, True)       # a half between two frames has the nearer
        weight = attention.masked_fill(~inside, float("-inf")).softmax(1)       # [S, T]
        return torch.einsum("st,std->sd", weight, frames)               # [S, D]

    if target == "mean":
        return weighted(start, end).detach()
    if target == "whole":
        return weighted(torch.zeros_like(start), durations_sec[:, None]).detach()
    return (weighted(middle, end) - weighted(start, middle)).detach()  # no gradient into the target


# ----------------------------------------------------------------------------------------- the walk

def characters(maps: Tensor) -> str:
    """Maps [n, H, W] side by side, from the lowest value " " to the highest "@"."""
    level = (maps - maps.min()) / (maps.max() - maps.min()) * 9.99
    return "\n".join("  ".join("".join(2 * " .:-=+*#%@"[int(v)] for v in line) for line in row)
                     for row in level.transpose(0, 1).tolist())


@torch.no_grad()
def main() -> None:
    import clip                                                 # only the walk needs these
    import command
    import parse
    import shapes

    command.parser("two videos of the shapes world through Eq. 1-5").parse_args()
    weights = pathlib.Path("data/shapes/clip.pt")               # which python train.py makes
    model = clip.load(weights) if weights.exists() else shapes.small_clip(0)
    plans = [shapes.plan_of(0, "train", i) for i in range(2)]
    rows = [(i, s.sentence) for i in range(2) for s in shapes.samples_of("", "train", plans[i])]
    video_of, queries = torch.tensor([i for i, _ in rows]), [parse.Parser("rules").split(sentence)
                                                             for _, sentence in rows]
    pixels = torch.cat([shapes.film(plan) for plan in plans])           # [B * T, 3, 32, 32]
    frames, patches = (F.normalize(y, dim=1).unflatten(0, (2, -1))
                       for y in model.encode_image(clip.normalise(pixels)))
    static, dynamic = (F.normalize(model.encode_text(clip.tokenize([q[k] for q in queries])), dim=1)
                       for k in (1, 2))
    D, grid, T = frames.shape[2], patches.shape[3], frames.shape[1]
    torch.manual_seed(0)
    context_module, dynamic_module = VisualContext(D, 1, 4), SpatialDynamic(D, D, grid, T, 1, 4)
    for layer in (dynamic_module.frame_fc, dynamic_module.patch_fc):
        nn.init.eye_(layer.weight), nn.init.zeros_(layer.bias)  # so that CLIP's own heat is seen

    context = context_module(static, frames, video_of)
    heat = dynamic_module.heatmap(frames, patches)
    motion = dynamic_module.dynamic(heat)
    losses = (visual_context_loss(context_module.project(dynamic), context),
              spatial_dynamic_loss(motion[video_of], dynamic_module.project(dynamic), video_of))
    print(f"CLIP: {weights if weights.exists() else 'untrained; python train.py trains one'}\n"
          f"Q \"{queries[0].full}\", Q^s \"{queries[0].static}\", Q^d \"{queries[0].dynamic}\", "
          f"and {len(rows) - 1} more sentences\n")
    for what, value in {
            "       frames X^v": frames, "       patches X~^v": patches,
            "       static queries x^qs": static, "       dynamic queries x^qd": dynamic,
            "Eq. 1  context x~^qs": context, "Eq. 2  L^vc": losses[0], "Eq. 3  heatmaps M": heat,
            "Eq. 4  motion m~": motion, "Eq. 5  L^sd": losses[1]}.items():
        mean = f"mean {value.mean():.4f}" if "L^" in what else ""
        print(f"{what:29s} {str(list(value.shape)):18s} {mean}".rstrip())
    seen = pixels[:T].float().mean(1, keepdim=True)                     # [T, 1, 32, 32]
    for title, maps in (("frames of the first video, one of each event", seen),
                        ("Eq. 3, FC = identity", heat[0, :, None])):
        maps = F.adaptive_avg_pool2d(maps, 2 * grid)[:, 0]
        print(f"\n{title}\n{characters(maps[[e['start'] + 2 for e in plans[0]['events']]])}")
    print("\nThe heat of Eq. 3 is no map of objects by itself (README, \"What Eq. 3-5 carry\").")


if __name__ == "__main__":
    main()
