"""mmn.py, Eq. 6-10: every equation against plain loops, values and gradients, and a case worked by
hand.

Also: padding is inert, batch order and batch-mates change nothing, Eq. 10 finds the best cell, NMS
is greedy."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import mmn
from support import cropped


def small(num_clips=8, pool_counts=(7,), kernel=3, layers=2, seed=0, stride=2, **more):
    torch.manual_seed(seed)
    model = mmn.MMN(6, num_clips, stride, stride, pool_counts, kernel, layers, 10, 5, **more)
    return model.double()


def some_batch(B=3, T=16, D=6, counts=(2, 1, 3), seed=0):
    generator = torch.Generator().manual_seed(seed)
    frames = F.normalize(torch.randn(B, T, D, generator=generator, dtype=torch.double), dim=2)
    text = F.normalize(torch.randn(sum(counts), D, generator=generator, dtype=torch.double), dim=1)
    video_of = torch.tensor([b for b, count in enumerate(counts) for _ in range(count)])
    durations = (torch.rand(B, generator=generator, dtype=torch.double) * 20 + 10)[video_of]
    ends = torch.rand(sum(counts), 2, generator=generator, dtype=torch.double).sort(1)[0]
    moments = (ends
               * torch.tensor([0.9, 1.0]) + torch.tensor([0.0,
                                                          0.02])).clamp(max=1) * durations[:, None]
    return frames, text, video_of, moments, durations


# --------------------------------------------------------------------------------- intervals, cells

def test_interval_iou_by_hand():
    """[0, 4) and [2, 6): overlap 2, union 6. Apart: 0. Equal: 1. Empty against empty: 0, not
    nan."""
    a = torch.tensor([[0., 4.], [0., 1.], [3., 5.], [2., 2.]])
    b = torch.tensor([[2., 6.], [2., 3.], [3., 5.], [2., 2.]])
    assert mmn.interval_iou(a, b).tolist() == pytest.approx([1 / 3, 0, 1, 0])


def test_iou_map_by_hand():
    """N=4, 8 s: clips of 2 s. Label [2, 5): cell (1, 1) is [2, 4): 2/3. (1, 2) is [2, 6): 3/4. (0,
    3): 3/8."""
    grid = mmn.iou_map(torch.tensor([[2., 5.]]), torch.tensor([8.]), 4)[0]
    assert grid[1, 1].item() == pytest.approx(2 / 3) and grid[1, 2].item() == pytest.approx(3 / 4)
    assert grid[0, 3].item() == pytest.approx(3 / 8) and grid[2, 2].item() == pytest.approx(1 / 4)
    assert grid[3, 3] == 0 and (grid.tril(-1) == 0).all()


def test_iou_map_against_loops():
    _, _, _, moments, durations = some_batch()
    grid = mmn.iou_map(moments, durations, 8)
    for s, i, j in itertools.product(range(len(moments)), range(8), range(8)):
        a, b = i * durations[s] / 8, (j + 1) * durations[s] / 8
        overlap = max(0.0, min(b, moments[s, 1]) - max(a, moments[s, 0]))
        union = (b - a) + (moments[s, 1] - moments[s, 0]) - overlap
        assert grid[s, i, j].item() == pytest.approx(float(overlap / union) if i <= j else 0.0,
                                                     abs=1e-12)


@pytest.mark.parametrize("num_clips, pool_counts, count",
                         [(16, (15,), 136), (64, (15, 8, 8), 1104), (4, (3,), 10)])
def test_number_of_candidates(num_clips, pool_counts, count):
    """136 at N=16 and 1,104 at N=64, as published; each cell once, none below the diagonal."""
    cells = [(int(i), int(j)) for starts, ends in mmn.sparse_cells(num_clips, pool_counts) for i,
             j in zip(starts, ends)]
    assert len(cells) == len(set(cells)) == count and all(0 <= i <= j < num_clips for i, j in cells)


# ------------------------------------------------------------------------------------------ the map

@pytest.mark.parametrize("num_clips, pool_counts", [(8, (7,)), (16, (3, 2, 2)), (64, (15, 8, 8))])
def test_moment_map_is_the_maximum_over_its_clips(num_clips, pool_counts):
    model = small(num_clips, pool_counts)
    frames = some_batch(T=2 * num_clips)[0]
    grid = model.moment_map(frames)
    clips = frames.view(3, num_clips, 2, 6).mean(2)                     # average of two frames
    for i, j in itertools.product(range(num_clips), range(num_clips)):
        expected = clips[:, i:j + 1].amax(1) if model.candidates[i, j] else torch.zeros(3, 6)
        assert torch.allclose(grid[:, :, i, j], expected.to(grid.dtype)), (i, j)


def test_a_wrong_number_of_frames_is_one_sentence():
    with pytest.raises(ValueError, match="17 frames|12 frames"):
        small().moments(torch.zeros(1, 12, 6).double())


def reference_scores(model, frames, text, video_of):
    """The published algorithm with loops: pad once, convolve, divide by the number of valid
    cells."""
    N, k, L = model.num_clips, model.convs[0].kernel_size[0], len(model.convs)
    x = model.moment_map(frames)
    valid = model.candidates.double()
    for layer, (conv, norm) in enumerate(zip(model.convs, model.norms)):
        if layer == 0:
            pad = (k - 1) * L // 2
            x, valid = F.pad(x, (pad,) * 4), F.pad(valid, (pad,) * 4)
        size = valid.shape[0] - k + 1
        count = torch.zeros(size, size).double()
        for i, j in itertools.product(range(size), range(size)):
            count[i, j] = valid[i:i + k, j:j + k].sum()
        x = norm(F.conv2d(x, conv.weight, conv.bias)).relu()
        x = torch.where(count > 0, x / count.clamp(min=1), torch.zeros_like(x))
        valid = (count > 0).double()
    assert x.shape[2:] == (N, N)
    maps = []
    for head, fc in ((model.iou_moment, model.iou_text),
                     (model.contrastive_moment, model.contrastive_text)):
        m, q = head(x), fc(model.text_norm(text))
        score = torch.zeros(len(text), N, N).double()
        for s, i, j in itertools.product(range(len(text)), range(N), range(N)):
            if model.candidates[i, j]:
                score[s, i, j] = F.cosine_similarity(m[video_of[s], :, i, j], q[s], dim=0)
        maps.append(score)
    return torch.where(model.candidates, torch.sigmoid(10 * maps[0]), 0.0), maps[1]


@pytest.mark.parametrize("convolution", [cropped.Convolution, mmn.Convolution])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("num_clips, pool_counts, kernel, layers",
                         [(8, (7,), 3, 2), (8, (3, 2), 5, 3), (8, (7,), 3, 7)])
def test_scores_against_the_published_algorithm(num_clips, pool_counts, kernel, layers, training,
                                                convolution):
    """Eq. 6 and Eq. 9, values and gradients of every parameter, BatchNorm in training and in
    evaluation, and its running statistics: by mmn.Convolution and by support/cropped.py, which
    computes only the middle of the maps."""
    model = small(num_clips, pool_counts, kernel, layers, convolution=convolution).train(training)
    frames, text, video_of, _, _ = some_batch()
    weight = torch.randn(2, len(text), num_clips, num_clips,
                         generator=torch.Generator().manual_seed(3)).double()
    results = []
    for function in (model, lambda *arguments: reference_scores(model, *arguments)):
        model.zero_grad()
        for norm in model.norms:
            norm.reset_running_stats()
        scores = torch.stack(function(frames, text, video_of))
        (scores * weight).sum().backward()
        results.append([scores.detach(), *(p.grad.clone() for p in model.parameters()),
                        *(b.clone() for norm in model.norms for b in norm.buffers())])
    # the model's 1 / count is a float32 buffer, hence not 1e-12
    assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(*results))
    learned = [name for name, p in model.named_parameters() if p.grad.abs().max() > 1e-10]
    cancelled = [f"convs.{i}.bias"
                 for i in range(layers)] if training else []  # BatchNorm takes the mean off
    assert learned == [name for name, _ in model.named_parameters() if name not in cancelled]


def test_ranges_and_non_candidates():
    model = small(16, (3, 2, 2)).eval()
    frames, text, video_of, _, _ = some_batch(T=32)
    iou_scores, contrastive_scores = model(frames, text, video_of)
    inside = model.candidates.expand_as(iou_scores)
    assert (iou_scores[inside] > 0).all() and (iou_scores[inside] < 1).all()
    assert (contrastive_scores.abs() <= 1 + 1e-12).all()
    assert (iou_scores[~inside] == 0).all() and (contrastive_scores[~inside] == 0).all()


def test_batch_order_and_batch_mates_change_nothing():
    model = small().eval()
    frames, text, video_of, _, _ = some_batch()
    whole = torch.stack(model(frames, text, video_of))
    order = torch.tensor([2, 0, 1])
    back = torch.argsort(order)
    assert torch.allclose(torch.stack(model(frames[order], text, back[video_of])), whole,
                          atol=1e-12)
    for s in range(len(text)):
        b = video_of[s]
        alone = torch.stack(model(frames[b:b + 1], text[s:s + 1], torch.zeros(1, dtype=torch.long)))
        assert torch.allclose(alone, whole[:, s:s + 1], atol=1e-12)


# ------------------------------------------------------------------------------------------- losses

def test_scores_by_hand():
    """Eq. 9: cosine of (0.6, 0.8) with (1, 0) and (0, 1): 0.6 and 0.8. Eq. 6: sigmoid(6),
    sigmoid(8)."""
    moments, text = torch.eye(2)[None], torch.tensor([[0.6, 0.8]])
    cosine = mmn.cosine_scores(moments, text, torch.tensor([0]))[0].tolist()
    assert cosine == pytest.approx([0.6, 0.8])
    predicted = mmn.overlap_scores(moments, text, torch.tensor([0]))[0].tolist()
    assert predicted == pytest.approx([1 / (1 + math.exp(-6)), 1 / (1 + math.exp(-8))])


def test_iou_loss_by_hand():
    """IoU 1, 0.75, 0.4 become targets 1, 0.5, 0. With scores 0.5 everywhere every term is log 2."""
    assert mmn.iou_loss(torch.full((1, 3), 0.5),
                        torch.tensor([[1.0, 0.75, 0.4]])).item() == pytest.approx(math.log(2))
    loss = mmn.iou_loss(torch.tensor([[0.9, 0.2, 0.1]]), torch.tensor([[1.0, 0.75, 0.4]])).item()
    by_hand = -(math.log(0.9) + 0.5 * math.log(0.2) + 0.5 * math.log(0.8) + math.log(0.9)) / 3
    assert loss == pytest.approx(by_hand)


def loop_contrastive(moments, text, iou, video_of, moments_sec, tau, margin, negative_iou):
    B, _, P = moments.shape
    losses = []
    for s in range(len(text)):
        v = int(video_of[s])
        best = int(iou[s].argmax())
        positive = math.e ** 0 * torch.exp((text[s] @ moments[v, :, best] - margin) / tau)
        bottom = positive
        for b, p in itertools.product(range(B), range(P)):
            if b != v or (iou[s, p] < negative_iou and p != best):
                bottom = bottom + torch.exp(text[s] @ moments[b, :, p] / tau)
        loss = -torch.log(positive / bottom)
        bottom = positive
        for other in range(len(text)):
            a, c = moments_sec[s], moments_sec[other]
            overlap = max(0.0, float(min(a[1], c[1]) - max(a[0], c[0])))
            union = float(a[1] - a[0] + c[1] - c[0]) - overlap
            if int(video_of[other]) != v or (other != s and overlap / union < negative_iou):
                bottom = bottom + torch.exp(text[other] @ moments[v, :, best] / tau)
        losses.append(loss - torch.log(positive / bottom))
    return torch.stack(losses)


@pytest.mark.parametrize("counts", [(2, 1, 3), (1, 1, 1), (6, 0, 0)])
def test_contrastive_loss_against_loops(counts):
    """Eq. 8, values and gradients."""
    _, _, video_of, moments_sec, durations = some_batch(counts=counts)
    generator = torch.Generator().manual_seed(5)
    P = 36
    iou = mmn.iou_map(moments_sec, durations, 8).flatten(1)[:, small().cells]
    results = []
    for function in (mmn.contrastive_loss, loop_contrastive):
        generator.manual_seed(5)
        moments = F.normalize(torch.randn(3, 5, P, generator=generator).double(),
                              dim=1).requires_grad_()
        text = F.normalize(torch.randn(len(video_of), 5, generator=generator).double(),
                           dim=1).requires_grad_()
        loss = function(moments, text, iou, video_of, moments_sec, 0.1, 0.4, 0.5)
        (loss * torch.arange(1, len(loss) + 1)).sum().backward()
        results.append((loss.detach(), moments.grad, text.grad))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results))


def test_contrastive_loss_by_hand():
    """One video, P = 3, J = 1-dimensional angles: cosines 1 (positive), 0, 0.9; IoU 1, 0, 0.6; tau
    1, no margin. The 0.9 overlaps too much to be a negative: log(1 + e^-1) = 0.3133. The only
    sentence has no rival: 0."""
    moments = torch.tensor([[[1.0, 0.0, 0.9], [0.0, 1.0, (1 - 0.81) ** 0.5]]])
    arguments = torch.tensor([[1.0, 0.6 * 0, 0.6]]), torch.tensor([0]), torch.tensor([[0.0, 5.0]])
    loss = mmn.contrastive_loss(moments, torch.tensor([[1.0, 0.0]]), *arguments, tau=1.0,
                                margin=0.0)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), abs=1e-6)


def test_the_plain_product_ranks_two_negatives_first():
    """As printed in Eq. 10, cosines (0.5, 0.5) give 0.25 and (-0.6, -0.6) give 0.36, which is more;
    the fusion that is used ranks the first higher."""
    cosines = torch.tensor([0.5, -0.6])
    assert (cosines * cosines).tolist() == pytest.approx([0.25, 0.36])
    assert mmn.fuse(torch.sigmoid(10 * cosines), cosines).argmax() == 0


def test_margin_makes_it_harder():
    """With margin 0.4 the positive above counts as 0.6: log(1 + e^-0.6) = 0.4375, twice with two
    far sentences."""
    moments = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    loss = mmn.contrastive_loss(moments, torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]),
                                torch.tensor([0]),
                                torch.tensor([[0.0, 5.0]]), tau=1.0, margin=0.4)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-0.6)), abs=1e-6)


# ------------------------------------------------------------------------------------------- Eq. 10

def test_fuse_by_hand():
    """0.8 * sqrt(0.5 * 0.28 + 0.5) = 0.8 * 0.8 = 0.64; cosine -1 gives 0, and no negative beats a
    positive."""
    fused = mmn.fuse(torch.tensor([0.8, 0.5, 0.3]), torch.tensor([0.28, -1.0, 1.0]))
    assert fused.tolist() == pytest.approx([0.64, 0.0, 0.3])


def test_argmax_of_row_maxima_is_the_best_cell():
    """Eq. 10's two steps against one argmax over all cells i <= j."""
    scores = torch.rand(200, 12, 12, generator=torch.Generator().manual_seed(0))
    scores = scores.masked_fill(torch.ones(12, 12).tril(-1).bool(), float("-inf"))
    start, end = mmn.best_cell(scores)
    assert torch.equal(start * 12 + end, scores.flatten(1).argmax(1)) and (start <= end).all()


def greedy(scores, duration, top_k, nms):
    N = len(scores)
    cells = sorted(((float(scores[i, j]), i, j) for i in range(N) for j in range(i, N)),
                   reverse=True)
    kept = []
    for score, i, j in cells:
        iou = [max(0, min(j, l) + 1 - max(i, k)) / (max(j, l) + 1 - min(i, k))
               if max(i, k) <= min(j, l) else 0
               for _, k, l in kept]
        if all(value <= nms for value in iou) and len(kept) < top_k:
            kept.append((score, i, j))
    return [[i * duration / N, (j + 1) * duration / N, score] for score, i, j in kept]


@pytest.mark.parametrize("nms", [0.3, 0.5, 1.0])
def test_decode_is_greedy_nms(nms):
    scores = torch.rand(30, 10, 10, generator=torch.Generator().manual_seed(1)).double()
    durations = torch.linspace(5, 50, 30).double()
    decoded = mmn.decode(scores, durations, 5, nms)
    for s in range(30):
        expected = greedy(scores[s], float(durations[s]), 5, nms)
        assert torch.allclose(decoded[s, :len(expected)], torch.tensor(expected).double())


def test_decode_when_candidates_run_out():
    """One clip: one moment, the whole video; the other rows are empty moments that hit nothing."""
    rows = mmn.decode(torch.tensor([[[0.7]]]), torch.tensor([8.0]), 5)[0]
    assert rows[0].tolist() == pytest.approx([0, 8, 0.7])
    assert (rows[1:, :2] == 0).all() and (rows[1:, 2] == float("-inf")).all()
    assert mmn.interval_iou(rows[1:, :2], torch.tensor([0.0, 8.0])).max() == 0


def test_decode_never_returns_what_is_no_candidate():
    """All scores 0 and below: the cells that are no candidates score 0 and would win."""
    model = small(16, (3, 2, 2))
    scores = -torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(2)) * model.candidates
    decoded = mmn.decode(scores, torch.full((4,), 16.0), 5, 0.5, model.candidates)
    for start, end, _ in decoded.flatten(0, 1).tolist():
        assert model.candidates[int(start), int(end) - 1]
