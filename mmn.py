"""MMN, the moment retriever f^g (paper Sec. 3.1 "Video Moment Retrieval", Eq. 6-10).

All moments [i, j+1) of N clips lie on a 2D map. A convolution over the map lets neighbouring
moments exchange information, and two heads compare each moment with the sentence by cosine: one
learns the overlap with the labelled moment (Eq. 6, 7), the other to tell the moment from other
moments and other sentences (Eq. 8, 9). The product of their scores is the answer (Eq. 10).

MMN is the Mutual Matching Network of "Negative Sample Matters" (AAAI 2022). As in the paper, its
linear layer before the pooling is left out, so that the map holds CLIP's features as they are; only
the frames of another network need it.
docs/reading.ipynb draws the maps of a video and shows how Eq. (10) reads the answer off them.

Shapes: B videos, S sentences in the batch, T frames, N clips, P candidate moments, D width of
CLIP's joint space, C width of the convolutions, J joint space of the two heads. Intervals are
[start, end) in seconds; clip i is [i, i+1) * duration / N, and cell (i, j) of the map, i <= j, is
the moment [i, j+1) * duration / N.
"""
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCORE_SCALE = 10.0      # of the IoU head: score = sigmoid(10 cos) (MMN's published code)
TAU = 0.1               # temperature of Eq. 8 (MMN's published settings, both datasets)


# ------------------------------------------------------------------------------ intervals and cells

def interval_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of intervals [..., 2] (start, end), broadcast against each other. 0 if both are empty."""
    a_start, a_end = a.unbind(-1)
    b_start, b_end = b.unbind(-1)
    overlap = (torch.minimum(a_end, b_end) - torch.maximum(a_start, b_start)).clamp(min=0)
    union = (a_end - a_start) + (b_end - b_start) - overlap
    # subtle: clamped, because both intervals may be empty, and 0 / 0 is NaN
    return overlap / union.clamp(min=1e-9)


def iou_map(moments_sec: Tensor, durations_sec: Tensor, num_clips: int) -> Tensor:
    """y^iou of Eq. (7): IoU of every cell with the labelled moment.

    moments_sec    [S, 2]  start, end
    durations_sec  [S]
    returns        [S, N, N] in [0, 1]; 0 below the diagonal
    """
    clip = torch.arange(num_clips, device=moments_sec.device)
    first = clip[:, None].expand(num_clips, num_clips)                  # i of cell (i, j)
    last = clip[None, :].expand(num_clips, num_clips)                   # j
    cells = torch.stack([first, last + 1], -1)                          # [N, N, 2] clips
    cells = cells * (durations_sec / num_clips)[:, None, None, None]    # [S, N, N, 2]
    return interval_iou(cells, moments_sec[:, None, None, :]).triu()


def sparse_cells(num_clips: int, pool_counts: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
    """The candidate moments, diagonal by diagonal: (starts, ends), in clips, both inclusive.

    The main diagonal holds the single clips. Level l = 0, 1, ... then adds pool_counts[l] diagonals
    that are 2^l apart, on each of them every 2^l-th cell: long moments are sampled coarsely."""
    # DEVIATION: MMN's sparse candidates; the paper enumerates all pairs of frames
    clips = torch.arange(num_clips)
    diagonals = [(clips, clips)]
    offset = 0                                  # of the diagonal: clips in a moment, minus one
    for level, count in enumerate(pool_counts):
        for _ in range(count):
            offset += 2 ** level
            starts = torch.arange(0, num_clips - offset, 2 ** level)
            diagonals.append((starts, starts + offset))
    return diagonals


# ---------------------------------------------------------------------------------------- the model

class Convolution(nn.Module):
    """The proposal convolution, as published: the first layer pads for all layers; each then
    shrinks the map, finally to N x N. After each layer the output is multiplied by
    1 / (number of valid cells under the kernel), or 0 where there is none; a cell is valid for the
    next layer where that number was not 0.

    train.py and evaluate.py pass MMN another class, support/cropped.py, which computes the same in
    less time. The weights belong to MMN, so that both can use them."""

    def __init__(self, candidates: Tensor, kernel: int, layers: int):
        super().__init__()
        self.padding = [(kernel - 1) * layers // 2] + [0] * (layers - 1)
        valid = candidates[None, None].float()                          # [1, 1, N, N]
        window = torch.ones(1, 1, kernel, kernel)
        for i in range(layers):
            count = F.conv2d(valid, window, padding=self.padding[i])
            valid = (count > 0).float()
            self.register_buffer(f"weight{i}", valid / count.clamp(min=1), persistent=False)

    def forward(self, x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
        """[B, D, N, N] -> [B, C, N, N]."""
        for i, conv in enumerate(convs):
            x = F.conv2d(x, conv.weight, conv.bias, padding=self.padding[i])
            x = norms[i](x)
            x = F.relu(x) * self.get_buffer(f"weight{i}")
        return x


class MomentMap(nn.Module):
    """The 2D map: its candidate moments, and their features before any convolution.

    num_clips    N; pool_kernel and pool_stride average T frames to N clips
    pool_counts  diagonals per level of the sparse map, see `sparse_cells`
    features     width of frames of another network, mapped to D = width; 0: CLIP's, of width D
    """

    def __init__(self, num_clips: int, pool_kernel: int, pool_stride: int,
                 pool_counts: tuple[int, ...], width: int = 0, features: int = 0):
        super().__init__()
        self.frame_fc = nn.Linear(features, width) if features else None
        self.num_clips = num_clips
        self.pool_kernel = pool_kernel
        self.pool_stride = pool_stride
        self.pool_counts = tuple(pool_counts)
        diagonals = sparse_cells(num_clips, self.pool_counts)
        starts = torch.cat([start for start, _ in diagonals])           # [P] clips
        ends = torch.cat([end for _, end in diagonals])
        # buffers move with the model to its device; checkpoints need not hold constants
        self.register_buffer("cells", starts * num_clips + ends,
                             persistent=False)                          # [P], index into N*N
        candidates = torch.zeros(num_clips, num_clips, dtype=torch.bool)
        candidates[starts, ends] = True
        self.register_buffer("candidates", candidates, persistent=False)  # [N, N], True = a moment

    def project(self, frames: Tensor) -> Tensor:
        """Frames as the map takes them: [B, T, features] -> [B, T, D]; CLIP's as they are."""
        return F.relu(self.frame_fc(frames)) if self.frame_fc else frames

    def moment_map(self, frames: Tensor) -> Tensor:
        """X^m before convolution; cell (i, j): max over clips i..j. [B, T, D] -> [B, D, N, N].
        ValueError for a number of frames that does not pool to N clips."""
        x = self.project(frames).transpose(1, 2)                        # [B, D, T]
        x = F.avg_pool1d(x, self.pool_kernel, self.pool_stride)         # [B, D, N]
        if x.shape[2] != self.num_clips:
            raise ValueError(f"{frames.shape[1]} frames pool to {x.shape[2]} clips, but this model "
                             f"has {self.num_clips}; sample as many frames as in training")
        # UNSPECIFIED: the feature of a segment; the maximum over its clips, as in MMN's code
        diagonals = [x]
        for level, count in enumerate(self.pool_counts):
            for step in range(count):
                if level and step == 0:         # a new level: drop every other moment
                    x = F.max_pool1d(x, 3, 2)
                else:                           # one step further out: 2^level clips longer
                    x = F.max_pool1d(x, 2, 1)
                diagonals.append(x)             # [B, D, moments on this diagonal]
        return self.to_map(torch.cat(diagonals, 2))                     # [B, D, N, N]

    def to_map(self, values: Tensor) -> Tensor:
        """Values of the candidates [..., P] -> [..., N, N], 0 elsewhere."""
        N = self.num_clips
        grid = values.new_zeros(values.shape[:-1] + (N * N,))           # [..., N * N]
        return grid.index_copy(-1, self.cells, values).unflatten(-1, (self.num_clips, -1))

    def at_candidates(self, grid: Tensor) -> Tensor:
        """The inverse of `to_map`: [..., N, N] -> [..., P]."""
        return grid.flatten(-2)[..., self.cells]


class MMN(MomentMap):
    """Frames and sentences -> the two score maps of Eq. (6) and Eq. (9).

    width    D of the sentence features, and of CLIP's frames, which enter the map as they are
    num_clips, pool_kernel, pool_stride, pool_counts, features   as of MomentMap
    kernel, layers, hidden, joint   size, number and width C of the convolutions; J of the heads
    convolution                     what runs them
    """

    def __init__(self, width: int, num_clips: int, pool_kernel: int, pool_stride: int,
                 pool_counts: tuple[int, ...], kernel: int, layers: int, hidden: int, joint: int,
                 features: int = 0, convolution: type[nn.Module] = Convolution):
        super().__init__(num_clips, pool_kernel, pool_stride, pool_counts, width, features)
        inputs = [width] + [hidden] * (layers - 1)
        self.convs = nn.ModuleList(nn.Conv2d(channels, hidden, kernel) for channels in inputs)
        self.convolution = convolution(self.candidates, kernel, layers)     # runs convs and norms
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden) for _ in range(layers))
        self.iou_moment = nn.Conv2d(hidden, joint, 1)
        self.contrastive_moment = nn.Conv2d(hidden, joint, 1)
        self.text_norm = nn.LayerNorm(width)
        self.iou_text = nn.Linear(width, joint)
        self.contrastive_text = nn.Linear(width, joint)

    def moments(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of every candidate moment for both heads: [B, T, D] -> two of [B, J, P]."""
        x = self.convolution(self.moment_map(frames), self.convs, self.norms)   # [B, C, N, N]
        x = self.at_candidates(x).unsqueeze(3)                          # [B, C, P, 1]
        return (F.normalize(self.iou_moment(x).squeeze(3), dim=1),
                F.normalize(self.contrastive_moment(x).squeeze(3), dim=1))

    def sentences(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of every sentence for both heads: [S, D] -> two of [S, J]."""
        # DEVIATION: a LayerNorm before the FC of Eq. (6) and (8), as in MMN's code
        text = self.text_norm(text)
        return (F.normalize(self.iou_text(text), dim=1),
                F.normalize(self.contrastive_text(text), dim=1))

    def forward(self, frames: Tensor, text: Tensor, video_of: Tensor) -> tuple[Tensor, Tensor]:
        """frames [B, T, D], text [S, D], video_of [S] -> (iou_scores [S, N, N] in (0, 1),
        contrastive_scores [S, N, N] in [-1, 1]): each sentence against the moments of its own
        video; 0 where there is no candidate."""
        iou_moments, contrastive_moments = self.moments(frames)         # [B, J, P] each
        iou_text, contrastive_text = self.sentences(text)               # [S, J] each
        return (self.to_map(overlap_scores(iou_moments, iou_text, video_of)),
                self.to_map(cosine_scores(contrastive_moments, contrastive_text, video_of)))

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """Eq. (10), first line: what ranks the moments, [S, N, N]. Arguments as in `forward`."""
        iou_scores, contrastive_scores = self(frames, text, video_of)
        return fuse(iou_scores, contrastive_scores)


# ------------------------------------------------------------------------------------ the equations

def cosine_scores(moments: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
    """Eq. (9), Sec. 3.1: cosine of a sentence with its video's moments, in the contrastive space.

        Y~cl = cos(x~q, X~m)

    moments [B, J, P] and text [S, J] unit vectors, video_of [S]; returns [S, P] in [-1, 1]"""
    return torch.bmm(text[:, None], moments[video_of])[:, 0]


def overlap_scores(moments: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
    """Eq. (6), Sec. 3.1: predicted overlap of each moment with what the sentence describes.

        Y~iou = cos(FC(x^q), Conv1D(X^m)),  then sigmoid(10 Y~iou)

    Arguments as of `cosine_scores`; returns [S, P] in (0, 1)"""
    # UNSPECIFIED: the BCE of Eq. (7) cannot take a cosine; scaled and squashed as in MMN's code
    return torch.sigmoid(SCORE_SCALE * cosine_scores(moments, text, video_of))


def iou_loss(scores: Tensor, iou: Tensor) -> Tensor:
    """Eq. (7), Sec. 3.1: binary cross-entropy between predicted and true overlap.

        L^iou = BCE(Y^iou, Y~iou),  here with max(0, (Y^iou - 0.5) / 0.5)

    scores   [S, P] in (0, 1), candidates only
    iou      [S, P] in [0, 1]
    returns  [S] nats, mean over the candidates"""
    # DEVIATION: Eq. (7) takes the overlap itself; scaled as in MMN's code, and at least 0
    target = ((iou - 0.5) / 0.5).clamp(min=0)
    # subtle: BCE aborts on NaN (on a GPU for good); a NaN loss stops the run, naming the term
    bad = scores.isnan()
    loss = F.binary_cross_entropy(scores.masked_fill(bad, 0.5), target, reduction="none")
    return loss.masked_fill(bad, float("nan")).mean(1)


def contrastive_loss(moments: Tensor, text: Tensor, iou: Tensor, video_of: Tensor,
                     moments_sec: Tensor, tau: float = TAU, margin: float = 0.4,
                     negative_iou: float = 0.5) -> Tensor:
    """Eq. (8), Sec. 3.1: a sentence picks its moment, a moment its sentence, out of its negatives.

        p^m = exp((cos(m, q) - margin) / tau) / (the same + sum over X^m- of exp(cos(m', q) / tau))
        p^q = exp((cos(m, q) - margin) / tau) / (the same + sum over X^q- of exp(cos(m, q') / tau))
        L^cl = -log p^m - log p^q

    m is the candidate with the highest IoU. X^m-: all candidates of the other videos, and those of
    the same video with an IoU below `negative_iou`. X^q-: the sentences of the other videos, and
    those of the same video whose labels overlap less than that. cos as in Eq. (9).

    moments      [B, J, P] unit vectors
    text         [S, J] unit vectors
    iou          [S, P] overlap of the candidates of a sentence's own video with its label
    video_of     [S]
    moments_sec  [S, 2] labels, start and end
    returns      [S] nats
    """
    S, P = iou.shape
    sentence = torch.arange(S, device=iou.device)
    positive = iou.argmax(1)                                            # [S] m of each sentence

    # UNSPECIFIED: which moments and sentences are negatives; MMN's, see above
    # p^m: the sentence picks its moment
    similarity = torch.einsum("sj,bjp->sbp", text, moments)             # [S, B, P]
    allowed = torch.ones_like(similarity, dtype=torch.bool)             # True = in the denominator
    allowed[sentence, video_of] = iou < negative_iou
    allowed[sentence, video_of, positive] = True
    shift = torch.zeros_like(similarity)
    # DEVIATION: Eq. (8) has no margin; MMN's code subtracts one from the positive
    shift[sentence, video_of, positive] = margin
    # DEVIATION: masked before the softmax; MMN's code multiplies this half's mask in before exp
    logits = ((similarity - shift) / tau).masked_fill(~allowed, float("-inf"))  # [S, B, P]
    loss = F.cross_entropy(logits.flatten(1), video_of * P + positive, reduction="none")

    # p^q: the moment picks its sentence
    chosen = moments[video_of, :, positive]                             # [S, J]
    similarity = chosen @ text.T - margin * torch.eye(S, device=iou.device)     # [S, S]
    same_video = video_of[:, None] == video_of[None, :]                 # [S, S]
    overlap = interval_iou(moments_sec[:, None], moments_sec[None, :])  # [S, S]
    itself = sentence[:, None] == sentence[None, :]
    allowed = ~same_video | (overlap < negative_iou) | itself           # [S, S]
    logits = (similarity / tau).masked_fill(~allowed, float("-inf"))
    return loss + F.cross_entropy(logits, sentence, reduction="none")


def fuse(iou_scores: Tensor, contrastive_scores: Tensor) -> Tensor:
    """Eq. (10), first line, Sec. 3.1: the Hadamard product of the two predictions.

        Y~ = Y~iou * sqrt(0.5 Y~cl + 0.5)

    Any shape, iou_scores in (0, 1) and contrastive_scores in [-1, 1]; returns scores in [0, 1),
    for ranking only: they are not probabilities."""
    # DEVIATION: as printed, a product of two cosines ranks two negatives first; MMN's fusion
    return iou_scores * (0.5 * contrastive_scores + 0.5).clamp(min=0).sqrt()


def best_cell(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. (10), second line, Sec. 3.1: start and end of the best moment, in clips, both inclusive.

        t~s = argmax(cmax(Y~)),  t~e = argmax(y~_{t~s})

    scores [S, N, N] with -inf in cells that are no candidates; returns two LongTensors [S]"""
    start = scores.amax(2).argmax(1)                            # row maxima, then the best row
    return start, scores[torch.arange(len(scores), device=scores.device), start].argmax(1)


@functools.lru_cache(maxsize=8)
def near_cells(num_clips: int, nms: float, device: torch.device) -> Tensor:
    """[N*N, N*N] bool, True = the IoU of two cells is above `nms`, or they are the same cell. Row
    i*N+j is cell (i, j)."""
    clip = torch.arange(num_clips, device=device)
    cells = torch.stack([clip.repeat_interleave(num_clips), clip.repeat(num_clips) + 1], 1).float()
    near = interval_iou(cells[:, None], cells[None, :]) > nms
    return near.fill_diagonal_(True)


def decode(scores: Tensor, durations_sec: Tensor, top_k: int = 1, nms: float = 0.5,
           candidates: Tensor | None = None) -> Tensor:
    """The top_k best moments by greedy NMS: take the best cell (Eq. 10), drop all cells that
    overlap it by more than `nms`, repeat.

    scores         [S, N, N]
    durations_sec  [S]
    candidates     [N, N] bool, True = a moment (default: all cells i <= j)
    returns        [S, top_k, 3]: start_sec, end_sec, score, best first. If there are fewer than
                   top_k moments, the last rows are (0, 0, -inf): empty, they overlap nothing.
    """
    S, N = scores.shape[:2]
    if candidates is None:
        candidates = torch.ones(N, N, dtype=torch.bool, device=scores.device).triu()
    # UNSPECIFIED: how the five moments of R@5 are chosen; by NMS, as in MMN's code
    # -inf, not 0: a candidate may score exactly 0 and still be the best
    remaining = scores.masked_fill(~candidates, float("-inf"))          # [S, N, N]
    result = scores.new_zeros(S, top_k, 3)
    for k in range(top_k):
        start, end = best_cell(remaining)
        best = remaining[torch.arange(S, device=scores.device), start, end]     # [S]
        found = best > float("-inf")
        interval = torch.stack([start, end + 1], 1) * (durations_sec / N)[:, None]  # [S, 2]
        result[:, k, :2] = torch.where(found[:, None], interval.to(scores.dtype), 0)
        result[:, k, 2] = best
        if k + 1 < top_k:
            near = near_cells(N, nms, scores.device)[start * N + end].unflatten(1, (N, N))
            remaining.masked_fill_(near, float("-inf"))
    return result
