"""inject.py, Eq. 1-5, and the target of staged.py, against plain loops (values and gradients) and
by hand."""
import argparse
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import inject
import parse
import shapes
import staged

S, B, T, D, H = 5, 3, 4, 8, 2
VIDEO_OF = torch.tensor([0, 0, 1, 2, 2])


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def unit(*shape, seed=0):
    return F.normalize(random(*shape, seed=seed), dim=-1)


def agree(functions, inputs):
    """Same values, same gradients for every input."""
    results = []
    for function in functions:
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves)
        (value * random(*value.shape, seed=9)).sum().backward()
        results.append([value.detach(), *(x.grad for x in leaves)])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*results))


# ----------------------------------------------------------------------------------------- Eq. 1, 2

def attention(layer, prefix, query, memory):
    """Multi-head attention of one query, head by head. query [D], memory [T, D]."""
    m, parts = getattr(layer, prefix), []
    wq, wk, wv = m.in_proj_weight.split(D)
    bq, bk, bv = m.in_proj_bias.split(D)
    q, k, v = wq @ query + bq, memory @ wk.T + bk, memory @ wv.T + bv
    size = D // m.num_heads
    for h in range(m.num_heads):
        part = slice(h * size, (h + 1) * size)
        weights = torch.stack([q[part] @ row / math.sqrt(size) for row in k[:, part]]).softmax(0)
        parts.append(sum(w * row for w, row in zip(weights, v[:, part])))
    return m.out_proj(torch.cat(parts))


def test_visual_context_against_loops():
    """Eq. 1: self-attention over the one query, attention over the frames, perceptron; post-norm as
    in [52]."""
    torch.manual_seed(0)
    module = inject.VisualContext(D, 2, 2).double()

    def loops(static, frames):
        rows = []
        for s in range(S):
            x = static[s]
            for layer in module.decoder.layers:
                x = layer.norm1(x + attention(layer, "self_attn", x, x[None]))
                x = layer.norm2(x + attention(layer, "multihead_attn", x, frames[VIDEO_OF[s]]))
                x = layer.norm3(x + layer.linear2(F.relu(layer.linear1(x))))
            rows.append(x)
        return torch.stack(rows)

    agree((lambda static, frames: module(static, frames, VIDEO_OF), loops),
          (unit(S, D), unit(B, T, D, seed=1)))


def test_visual_context_by_hand():
    """Attention and perceptron silenced, each of the three steps is x -> LayerNorm(x + 0): (3, 1)
    has mean 2 and deviation 1, hence (1, -1), which stays."""
    module = inject.VisualContext(2, 1)
    for name, parameter in module.decoder.named_parameters():
        if "norm" not in name:
            torch.nn.init.zeros_(parameter)
    context = module(torch.tensor([[3.0, 1.0]]), torch.rand(1, 4, 2), torch.tensor([0]))
    assert context[0].tolist() == pytest.approx([1.0, -1.0], abs=1e-4)


def test_visual_context_does_not_look_at_order_or_other_videos():
    torch.manual_seed(0)
    module = inject.VisualContext(D, 1, 2).double()
    static, frames = unit(S, D), unit(B, T, D, seed=1)
    whole = module(static, frames, VIDEO_OF)
    assert torch.allclose(module(static, frames.flip(1), VIDEO_OF), whole)
    assert torch.allclose(module(static[2:3], frames[1:2], torch.tensor([0])), whole[2:3])


def test_visual_context_loss_by_hand():
    """(1, 2, 0) against (0, 0, 2): 1 + 4 + 4 = 9, a sum over D and no mean."""
    assert inject.visual_context_loss(torch.tensor([[1., 2., 0.]]),
                                      torch.tensor([[0., 0., 2.]])).tolist() == [9.0]


# ----------------------------------------------------------------------------------------- Eq. 3, 4

def spatial(seed=0):
    torch.manual_seed(seed)
    return inject.SpatialDynamic(D, 6, H, T, 2).double()


def test_heatmap_against_loops():
    module = spatial()

    def loops(frames, patches):
        heat = torch.zeros(B, T, H, H).double()
        for b, t, h, w in itertools.product(range(B), range(T), range(H), range(H)):
            frame = module.frame_fc(frames[b, t] * math.sqrt(D))
            patch = module.patch_fc(patches[b, t, :, h, w] * math.sqrt(D))
            heat[b, t, h, w] = frame @ patch / math.sqrt(D)
        return heat

    agree((module.heatmap, loops), (unit(B, T, D), random(B, T, 6, H, H, seed=1)))


def test_heatmap_by_hand():
    """FCs the identity, D = 4, x = (1, 0, 0, 0): inputs are doubled, so a patch along x gives 2 * 2
    / 2 = 2."""
    module = inject.SpatialDynamic(4, 4, 1, 1, 1)
    for fc in (module.frame_fc, module.patch_fc):
        torch.nn.init.eye_(fc.weight), torch.nn.init.zeros_(fc.bias)
    x = torch.tensor([1.0, 0, 0, 0])
    heat = module.heatmap(x.view(1, 1, 4), torch.stack([x]).view(1, 1, 4, 1, 1))
    assert heat.item() == pytest.approx(2.0)


def test_dynamic_is_the_average_of_a_transformer_encoder():
    module, heatmaps = spatial(), random(B, T, H, H)

    def loops(heatmaps):
        rows = []
        for b in range(B):
            x = torch.stack([module.flat_fc(heatmaps[b, t].flatten()) + module.positions[t]
                             for t in range(T)])
            for layer in module.sequence.layers:
                x = layer.norm1(x
                                + torch.stack([attention(layer, "self_attn", row, x) for row in x]))
                x = layer.norm2(x + layer.linear2(F.relu(layer.linear1(x))))
            rows.append(sum(x) / T)
        return torch.stack(rows)

    agree((module.dynamic, loops), (heatmaps,))
    assert not torch.allclose(module.dynamic(heatmaps.flip(1)),
                              module.dynamic(heatmaps))  # order matters


def test_dynamic_by_hand():
    """1 x 1 heatmaps 3 and -1, FC to (h, -h), SeqModel silenced to LayerNorm: (1, -1) and (-1, 1),
    whose average is 0; with heatmaps 3 and 2 both are (1, -1), and so is the average."""
    module = inject.SpatialDynamic(2, 2, 1, 2, 1)
    for name, parameter in module.sequence.named_parameters():
        if "norm" not in name:
            torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(module.positions), torch.nn.init.zeros_(module.flat_fc.bias)
    module.flat_fc.weight.data = torch.tensor([[1.0], [-1.0]])
    for heat, expected in (([3.0, -1.0], [0, 0]), ([3.0, 2.0], [1, -1])):
        dynamic = module.dynamic(torch.tensor(heat).view(1, 2, 1, 1))[0]
        assert dynamic.tolist() == pytest.approx(expected, abs=1e-4)


# -------------------------------------------------------------------------------------------- Eq. 5

def test_spatial_dynamic_loss_against_loops():
    def loops(dynamic, projected):
        rows = []
        for i in range(S):
            others = [j for j in range(S) if VIDEO_OF[j] != VIDEO_OF[i]]
            rows.append(sum((F.cosine_similarity(dynamic[i], dynamic[j], dim=0)
                             - F.cosine_similarity(projected[i], projected[j], dim=0)) ** 2
                             for j in others)
                        / len(others))
        return torch.stack(rows)

    agree((lambda m, q: inject.spatial_dynamic_loss(m, q, VIDEO_OF), loops),
          (random(S, D), random(S, D, seed=1)))


def test_spatial_dynamic_loss_by_hand():
    """Two videos moving at right angles (eps^v = 0), sentences 60 degrees apart (eps^q = 0.5): 0.25
    each."""
    dynamic = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    projected = torch.tensor([[3.0, 0.0], [0.5, math.sqrt(3) / 2]])
    assert inject.spatial_dynamic_loss(dynamic, projected,
                                       torch.tensor([0, 1])).tolist() == pytest.approx([0.25, 0.25])
    assert inject.spatial_dynamic_loss(dynamic, projected,
                                       torch.tensor([0, 0])).tolist() == [0, 0]  # one video


def test_order_of_the_batch_changes_nothing():
    order = torch.tensor([3, 0, 4, 1, 2])
    dynamic, projected = random(S, D), random(S, D, seed=1)
    whole = inject.spatial_dynamic_loss(dynamic, projected, VIDEO_OF)
    assert torch.allclose(inject.spatial_dynamic_loss(dynamic[order], projected[order],
                                                      VIDEO_OF[order]), whole[order])


def test_batch_variance_by_hand():
    """Rows (1, 0) and (-1, 0) have mean 0: 1. Equal rows: 0. Rows (2, 0) and (0, 0): variance 1 of
    a mean square 2."""
    for rows, expected in (([[1., 0.], [-1., 0.]], 1.0), ([[1., 2.], [1., 2.]], 0.0),
                           ([[2., 0.], [0., 0.]], 0.5)):
        assert inject.batch_variance(torch.tensor(rows)).item() == pytest.approx(expected)


# ---------------------------------------------------------------------------------- temporal_change

def test_temporal_change_against_loops():
    static, frames = unit(S, D), unit(S, 12, D, seed=1)
    durations = torch.tensor([12.0, 24.0, 6.0, 30.0, 10.0]).double()
    moments = torch.tensor([[0, 12], [3, 9.5], [1, 5], [7.4, 7.5], [0.1, 3.3]]).double()
    result = staged.temporal_change(static, frames, moments, durations)
    for s in range(S):
        halves = []
        start, end = moments[s].tolist()
        middle = (start + end) / 2
        for a, b in ((start, middle), (middle, end)):
            centres = [(t + 0.5) / 12 * float(durations[s]) for t in range(12)]
            inside = {t for t in range(12) if a <= centres[t] < b} | {
                min(range(12), key=lambda t: abs(centres[t] - (a + b) / 2))}
            weights = {t: math.exp(10 * float(static[s] @ frames[s, t])) for t in inside}
            halves.append(sum(w * frames[s, t] for t, w in weights.items()) / sum(weights.values()))
        assert torch.allclose(result[s], halves[1] - halves[0], atol=1e-6), s


def test_temporal_change_by_hand():
    """Four frames a, a, b, b over [0, 4): the late half is b, the early half a, whatever the query:
    b - a."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    change = staged.temporal_change(torch.tensor([[0.6, 0.8]]), torch.stack([a, a, b, b])[None],
                                    torch.tensor([[0.0, 4.0]]), torch.tensor([4.0]))
    assert change[0].tolist() == pytest.approx([-1.0, 1.0])


def test_frames_outside_the_moment_do_not_matter():
    static, frames = unit(1, D), unit(1, 12, D, seed=1)
    moment, duration = torch.tensor([[3.0, 9.0]]).double(), torch.tensor([12.0]).double()
    other = frames.clone()
    other[:, [0, 1, 2, 9, 10, 11]] = unit(1, 6, D, seed=2)
    assert torch.equal(staged.temporal_change(static, frames, moment, duration),
                       staged.temporal_change(static, other, moment, duration))


def test_no_gradient_enters_the_target():
    frames = unit(1, 12, D).requires_grad_()
    target = staged.temporal_change(unit(1, D).requires_grad_(), frames,
                                    torch.tensor([[3.0, 9.0]]).double(),
                                    torch.tensor([12.0]).double())
    assert not target.requires_grad


def test_without_a_query_all_frames_of_a_half_weigh_the_same():
    """Four frames of 1 s, the moment is the whole video: the mean of frames 2, 3 minus that of 0,
    1; "whole" is the mean of all four, whatever the moment."""
    frames = torch.randn(1, 4, 5)
    moment, duration = torch.tensor([[0.0, 4.0]]), torch.tensor([4.0])
    change = staged.temporal_change(None, frames, moment, duration)
    assert torch.allclose(change, frames[:, 2:].mean(1) - frames[:, :2].mean(1), atol=1e-6)
    part = torch.tensor([[1.0, 3.0]])
    whole = staged.temporal_change(None, frames, part, duration, "whole")
    assert torch.allclose(whole, frames.mean(1), atol=1e-6)


def test_codes_that_never_saw_a_video():
    """One per query, or one per motion: then rises and climbs share a code, falls has another."""
    class Videos:
        queries = [parse.Query("", "", f"something {verb}") for verb in ("rises", "climbs", "falls",
                                                                         "rises")]
        store = argparse.Namespace(manifest={"width": 6})

    each = staged.random_codes(Videos, 3, {})
    assert each.shape == (4, 6) and torch.equal(each[0], each[3])
    assert len({tuple(row) for row in each.tolist()}) == 3
    motions = staged.random_codes(Videos, 3, shapes.SYNONYMS)
    assert torch.equal(motions[0], motions[1]) and not torch.equal(motions[0], motions[2])


def test_a_learned_probe_asks_the_same_of_every_video():
    torch.manual_seed(0)
    module = inject.VisualContext(8, 2)
    frames, video_of = torch.randn(2, 5, 8), torch.tensor([0, 1, 1])
    answer = module(None, frames, video_of)
    asked = module(module.probe.expand(3, -1), frames, video_of)
    assert torch.equal(answer, asked) and torch.allclose(answer[1], answer[2], atol=1e-6)


def test_an_lstm_reads_the_heatmaps_in_order():
    """Its last state, by torch's LSTMCell step by step; unlike a set, turned round it differs."""
    torch.manual_seed(0)
    module = inject.SpatialDynamic(8, 8, 2, 5, 2, lstm=True)
    heat = torch.randn(3, 5, 2, 2)
    cell = torch.nn.LSTMCell(8, 8)
    cell.load_state_dict({name.removesuffix("_l0"): value
                          for name, value in module.sequence.state_dict().items()})
    m, state = module.flat_fc(heat.flatten(2)), None
    for t in range(5):
        state = cell(m[:, t], state)
    assert torch.allclose(module.dynamic(heat), state[0], atol=1e-5)
    assert not torch.allclose(module.dynamic(heat), module.dynamic(heat.flip(1)), atol=1e-3)
