"""Visual-Dynamic Injection: teaching the text tower what changes in a video (Sec. 3.1, Eq. 1-5).

CLIP's text tower reads nouns and barely distinguishes verbs. Two losses adapt it through the
dynamic query Q^d, the sentence without its noun chunks:

    visual context   (Eq. 1, 2)  FC(x^qd) should equal what the static query Q^s finds in the frames
    spatial dynamic  (Eq. 3-5)   two sentences should be as similar as the motion in their videos

This file is the paper as printed; staged.py is our variant that cannot collapse. Nothing here is
needed, or loaded, at inference. docs/reading.ipynb walks a video through Eq. 1-5, with pictures.

Shapes: B videos, S sentences in the batch, T frames (in Eq. 3-5 those with patches), D width of
CLIP's joint space, D' channels of the patch features, H x W patch grid. `video_of` [S] is the video
of a sentence. UNSPECIFIED: the feature scale; CLIP features arrive L2-normalised over channels.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


# ------------------------------------------------------------------------- visual context injection

class VisualContext(nn.Module):
    """Eq. (1), Sec. 3.1: the static query attends to the frames through a transformer decoder.

        x^qs = f^q(Q^s),   x~^qs = TransDecoder(x^qs, X^v, X^v)

    and `project`, the FC of Eq. (2). UNSPECIFIED: depth, heads, positions. One layer, no dropout,
    and no positions: the context is which entities there are, not when. UNSPECIFIED: the form of
    the layer; torch's: post-norm, with self-attention of the one query. UNSPECIFIED: what attends
    in Table 3's row without a query; `probe`, a learned one."""

    def __init__(self, width: int, heads: int, layers: int = 1):
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
    """Eq. (2), Sec. 3.1: the dynamic query should carry the visual context.

        L^vc(V, Q) = || FC(x^qd) - x~^qs ||_2^2

    projected  [S, D] FC(x^qd)
    context    [S, D] x~^qs
    returns    [S], at least 0: the squared norm is a sum over D
    """
    return (projected - context).square().sum(1)


# ------------------------------------------------------------------------ spatial dynamic injection

class SpatialDynamic(nn.Module):
    """Eq. (3), (4), Sec. 3.1: where the salient entities are in each frame, read in temporal order.

    The FCs of Eq. (3), (4), SeqModel, and `project`, the FC of Eq. (5). UNSPECIFIED: whether the
    paper's one symbol FC is one layer; each is one of its own here, with a bias. UNSPECIFIED:
    depth, heads, positions. One layer, no dropout, learned positions, because the dynamics lie in
    the order of the frames. `lstm`: SeqModel is an LSTM instead (Table 3)."""

    def __init__(self, width: int, patch_width: int, grid: int, frames: int, heads: int,
                 lstm: bool = False, layers: int = 1):
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
        """Eq. (4), Sec. 3.1: one vector per heatmap, a transformer encoder over them, averaged (or
        the last state of an LSTM).

            m_i = FC(Flatten(M_i)),   m~ = SeqModel({m_i})

        heatmaps [B, T, H, W]; returns [B, D]"""
        m = self.flat_fc(heatmaps.flatten(2))                           # [B, T, D]
        # UNSPECIFIED: how an LSTM's outputs become one vector; its last state
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


def spatial_dynamic_loss(motion: Tensor, projected: Tensor, video_of: Tensor) -> Tensor:
    """Eq. (5), Sec. 3.1, and its mean in Eq. (11): sentences relate as the motions of their videos.

        eps^v = cos(m~, m~'),   eps^q = cos(FC(x^qd), FC(x^qd')),   L^sd = (eps^v - eps^q)^2

    motion      [S, D] m~ of each sentence's video
    projected   [S, D] FC(x^qd)
    video_of    [S]; pairs of the same video are left out
    returns     [S] in [0, 4]: mean over the other videos' sentences, 0 where there are none
    """
    # DEVIATION: Eq. 11 averages over all pairs; within one video eps^v = 1 always
    pair = video_of[:, None] != video_of[None, :]                       # [S, S]
    difference = (pairwise_cosine(motion) - pairwise_cosine(projected)).square()   # [S, S]
    return (difference * pair).sum(1) / pair.sum(1).clamp(min=1)


def batch_variance(x: Tensor) -> Tensor:
    """Variance of the rows of [S, D], summed over D, as a share of their mean squared norm.

    1: the rows have mean 0; 0: all rows are equal, which is how a collapsed loss looks."""
    return x.var(0, unbiased=False).sum() / x.square().sum(1).mean().clamp(min=1e-12)
