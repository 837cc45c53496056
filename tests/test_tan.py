"""The second retriever: against plain loops, and in the places where MMN stands."""
import pytest
import torch
import torch.nn.functional as F

import evaluate
import mmn
import retrieve
import shapes
import train
from conftest import command
from extras import tan
from support import cropped


def small(layers: int = 2, kernel: int = 3) -> tan.TAN:
    torch.manual_seed(0)
    return cropped.speed_up(tan.TAN(5, 6, 2, 2, (2, 1), kernel, layers, 4, 3))


def by_loops(model: tan.TAN, frames, text, video_of):
    """2D-TAN as published: the whole padded map is convolved, a sentence at a time."""
    kernel, layers, N = model.convs[0].kernel_size[0], len(model.convs), model.num_clips
    logits = []
    for s, b in enumerate(video_of.tolist()):
        clips = frames[b].view(N, -1, frames.shape[2]).mean(1)          # [N, D]
        grid = torch.zeros(1, model.map_fc.out_channels, N, N)
        for i, j in model.candidates.nonzero().tolist():
            moment = clips[i:j + 1].amax(0)
            product = (model.map_fc.weight[:, :, 0, 0] @ moment + model.map_fc.bias) \
                * (model.text_fc.weight @ text[s] + model.text_fc.bias)
            grid[0, :, i, j] = product / product.norm()
        valid = model.candidates[None, None].float()
        for i, conv in enumerate(model.convs):
            padding = (kernel - 1) * layers // 2 if i == 0 else 0       # all of it in the first
            count = F.conv2d(valid, torch.ones(1, 1, kernel, kernel), padding=padding)
            valid = (count > 0).float()
            grid = F.relu(F.conv2d(grid, conv.weight, conv.bias, padding=padding))
            grid = grid * valid / count.clamp(min=1)
        scores = F.conv2d(grid, model.score.weight, model.score.bias)[0, 0]
        logits.append(torch.stack([scores[i, j] for i, j in zip(model.cells // N,
                                                                model.cells % N)]))
    return torch.stack(logits)


@pytest.mark.parametrize("layers, kernel", [(1, 3), (2, 3), (3, 5)])
def test_against_loops(layers, kernel):
    """Values and gradients, three sentences of two videos."""
    model = small(layers, kernel)
    frames, text = torch.randn(2, 12, 5), torch.randn(3, 5, requires_grad=True)
    video_of, iou = torch.tensor([0, 1, 1]), torch.rand(3, len(model.cells))
    grads = []
    for logits in (model(frames, text, video_of), by_loops(model, frames, text, video_of)):
        loss = mmn.iou_loss(logits.sigmoid(), iou).mean()
        grads.append((logits, *torch.autograd.grad(loss, [text, *model.parameters()])))
    for ours, theirs in zip(*grads):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_a_sentence_sees_its_own_video_only():
    """Batched is single, and what the other video shows does not matter."""
    model = small()
    frames, text, video_of = torch.randn(2, 12, 5), torch.randn(3, 5), torch.tensor([0, 1, 1])
    scores = model.scores(frames, text, video_of)
    assert scores.shape == (3, 6, 6) and not scores[:, ~model.candidates].any()
    for s, b in enumerate(video_of.tolist()):
        alone = model.scores(frames[b:b + 1], text[s:s + 1], torch.tensor([0]))
        torch.testing.assert_close(scores[s:s + 1], alone, atol=1e-6, rtol=0)


def test_planted_moments_are_found():
    """A video of two actors, each in half of it: after 60 steps the named one is found, always."""
    torch.manual_seed(0)
    model = tan.TAN(8, 4, 1, 1, (3,), 3, 2, 16, 16)
    frames = torch.randn(8, 4, 8) * 0.1
    which = torch.arange(8).repeat_interleave(2)
    half = torch.tensor([0, 1]).repeat(8)                               # the actor of each sentence
    first = torch.arange(8) % 2                                         # who comes first
    for b in range(8):
        frames[b, :2, first[b]] += 1
        frames[b, 2:, 1 - first[b]] += 1
    text = F.one_hot(half, 8).float()
    start = torch.where(half == first[which], 0.0, 2.0)
    moments_sec = torch.stack([start, start + 2], 1)
    iou = model.at_candidates(mmn.iou_map(moments_sec, torch.full((16,), 4.0), 4))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        loss = model.losses(model.outputs(frames, text, which), iou, which, moments_sec, None)
        optimiser.zero_grad()
        loss["L_iou"].backward()
        optimiser.step()
    found = mmn.decode(model.scores(frames, text, which), torch.full((16,), 4.0), 1, 0.5,
                       model.candidates)
    assert evaluate.recall(found[..., :2].detach(), moments_sec)["R@1,IoU=0.7"] == 100


def test_it_stands_where_mmn_stands(world, tmp_path):
    """Training with all injections, evaluation, a video file; an index is refused in a sentence."""
    config = train.Config(**{"dataset": "shapes", **train.preset("shapes"), "method": "vdi",
                             "retriever": "2d-tan", "root": str(world), "epochs": 2,
                             "device": "cpu", "out": str(tmp_path / "run")})
    results = train.train(config)
    assert results["test"]["R@5,IoU=0.5"] > 0
    checkpoint = tmp_path / "run" / "ckpt.pt"
    run = evaluate.load(checkpoint)
    assert isinstance(run.retriever, tan.TAN)
    assert evaluate.evaluate(run)["test"] == results["test"]
    shapes.export(tmp_path / "videos", 1)
    retriever = retrieve.Retriever(checkpoint, "cpu", cache=None)
    encoded = retriever.encode(tmp_path / "videos" / "test-0000.mp4")
    sentences = ["the red circle rises", "the green bar falls"]
    both = retriever.predict(encoded, sentences)
    assert both == [retriever.predict(encoded, sentence) for sentence in sentences]
    assert "has another retriever" in command("-m", "extras.index", checkpoint, tmp_path / "videos",
                                              "--out", tmp_path / "index", status=2)
    assert not (tmp_path / "index").exists()
