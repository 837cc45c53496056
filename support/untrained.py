"""The score of CLIP alone, without any training, and its fusion with that of a trained retriever.

docs/zero-shot.md says how it was chosen. Shapes: S sentences, T frames, N clips, P candidate
moments.
"""
import torch
import torch.nn.functional as F
from torch import Tensor

POWER = 0.5             # exponent of the moment's size, see `contrast`
SMOOTH_SEC = 7.0        # over which cosines are averaged, chosen in docs/zero-shot.md


def smooth_sec_of(dataset: str) -> float:
    """SMOOTH_SEC, but 0 in a shapes world, whose frames have no noise."""
    return 0.0 if dataset.startswith("shapes") else SMOOTH_SEC


def smoothed(similarity: Tensor, each_sec: float | Tensor, smooth_sec: float) -> Tensor:
    """Cosines averaged over about `smooth_sec`, because single frames of real videos are noisy; in
    a short video over at most a quarter of it; towards both ends over what there is.

    similarity  [..., T], of frames `each_sec` apart (or [...], for each row)"""
    if not smooth_sec:
        return similarity
    T = similarity.shape[-1]
    half = (smooth_sec / torch.as_tensor(each_sec).cpu() / 2).long()    # frames on either side
    half = half.clamp(max=T // 8)[..., None]
    first = (torch.arange(T) - half).clamp(min=0).expand_as(similarity)
    last = (torch.arange(T) + half + 1).clamp(max=T).expand_as(similarity)
    # float64 and on the CPU, as in `contrast_map`
    sums = F.pad(similarity.cpu().double().cumsum(-1), (1, 0))          # [..., T + 1]
    mean = (sums.gather(-1, last) - sums.gather(-1, first)) / (last - first)
    return mean.to(similarity.dtype).to(similarity.device)


def contrast(total: Tensor, inside: Tensor, length: Tensor, count: int) -> Tensor:
    """How much better the frames of a moment fit than all others of the video.

        phi   = mean of s_t inside - mean of s_t outside,     s_t = cos(x_t, x^q)
        score = phi * (n_in n_out / n) ^ POWER

    phi (power 0) is what published methods without training score a moment by (TFVTG, ECCV 2024;
    TAG, 2025). With power 1/2 it is the scan statistic for a change of mean: phi in units of its
    standard error, which stops a single odd frame from winning.

    total [S, 1...], inside [S, ...] sums of s_t over all frames and over the moment's; length [...]
    its frames, of `count`. Returns [S, ...]; -inf for moments of no frame or of all frames."""
    outside = count - length                                            # frames outside
    # subtle: clamped, so that moments without an inside or outside do not divide by 0
    mean_inside = inside / length.clamp(min=1)                          # [S, ...]
    mean_outside = (total - inside) / outside.clamp(min=1)              # [S, ...]
    score = (mean_inside - mean_outside) * (length * outside / count).clamp(min=0) ** POWER
    return score.masked_fill((length < 1) | (outside < 1), float("-inf"))


def contrast_map(similarity: Tensor, num_clips: int) -> Tensor:
    """`contrast` of every cell of the 2D map, by cumulative sums.

    similarity  [S, T] cosines s_t of each sentence with the frames of its video, T >= N
    returns     [S, N, N]; -inf below the diagonal and for the whole video, which has no outside
    """
    T = similarity.shape[1]
    if T < num_clips:
        raise ValueError(f"{T} frames cannot be divided into {num_clips} clips")
    # float64, because differences of long sums lose digits; on the CPU, because mps lacks it
    sums = F.pad(similarity.cpu().double().cumsum(1), (1, 0))                   # [S, T + 1]
    edges = (torch.arange(num_clips + 1) * T / num_clips).round().long()        # [N + 1]
    length = edges[None, 1:] - edges[:-1, None]                                 # [N, N]
    inside = sums[:, None, edges[1:]] - sums[:, edges[:-1], None]               # [S, N, N]
    scores = contrast(sums[:, -1, None, None], inside, length, T)               # [S, N, N]
    return scores.to(similarity.dtype).to(similarity.device)


def standardised(scores: Tensor) -> Tensor:
    """Minus the mean of a sentence's moments, divided by their deviation. [S, P]; -inf, which marks
    a moment without a score, counts as the lowest score."""
    finite = scores.isfinite()
    lowest = scores.masked_fill(~finite, float("inf")).amin(1, keepdim=True)    # [S, 1]
    scores = torch.where(finite, scores, lowest)
    deviation = scores.std(1, keepdim=True).clamp(min=1e-9)     # 0 if all frames are the same
    return (scores - scores.mean(1, keepdim=True)) / deviation


def fuse_with_clip(trained: Tensor, alone: Tensor, weight: float) -> Tensor:
    """The trained retriever knows motions; CLIP alone knows words that training never saw.

        z(trained) + weight z(alone),   z: `standardised`

    both [S, P], scores of the same moments; returns [S, P]"""
    return standardised(trained) + weight * standardised(alone)
