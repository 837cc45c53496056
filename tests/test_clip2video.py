"""CLIP2Video: its blocks, its metrics, its commands."""
import copy
import csv
import functools
import json
import math
import pathlib
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data as root_data
import shapes
import video
from conftest import command
from clip2video import data, evaluate, model as network, search, train
from support.errors import Mistake

HERE = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def text():
    torch.manual_seed(0)
    tower = clip.TextTower(49408, 77, 16, 3, 2, 16, clip.QuickGELU)
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return tower


def model_of(text, variant="both", seed=0, **changes):
    torch.manual_seed(seed)
    return network.CLIP2Video(copy.deepcopy(text), *network.VARIANTS[variant], **changes).eval()


def some_frames(B=3, L=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, L, 16, generator=generator), torch.ones(B, L, dtype=torch.bool)


def test_interleave_places_and_kinds():
    """f0 d0 f1 d1 f2; of 12 frames 23 tokens with places 0,0,1,1,...,11, kinds 1,0,...,1."""
    frames, changes = torch.tensor([[[0.], [1.], [2.]]]), torch.tensor([[[10.], [11.]]])
    assert network.interleave(frames, changes).flatten().tolist() == [0, 10, 1, 11, 2]
    place = torch.arange(12)[None]
    assert network.interleave(place, place[:, :11])[0].tolist() == [
        p for i in range(11) for p in (i, i)] + [11]


def test_shapes_and_what_is_added(text):
    """23 tokens for 12 frames, 11 for the halved ones; 18 visual tokens for K = 5 and 7; and the
    places and kinds that are on them."""
    model, (frames, mask) = model_of(text), some_frames()
    tokens, present = model.difference(frames, mask)
    assert tokens.shape == (3, 23, 16) and present.shape == (3, 23) and present.all()
    assert model.difference(frames[:, 0::2], mask[:, 0::2])[0].shape == (3, 11, 16)
    with torch.no_grad():
        changes, _ = model.difference.differences(frames, mask)
        P, T = model.difference.places, model.difference.kinds
        for i in range(12):
            assert torch.allclose(tokens[:, 2 * i], frames[:, i] + P[i] + T[1], atol=1e-6)
        for i in range(11):
            assert torch.allclose(tokens[:, 2 * i + 1], changes[:, i] + P[i] + T[0], atol=1e-6)
    seen = []
    for K in (5, 7):
        other = model_of(text, centres=K)
        aggregate, other.aggregate = other.aggregate, lambda x, m: (seen.append(x.shape[1]),
                                                                    aggregate(x, m))[1]
        overall, aligned = other.encode_video(frames, mask)
        assert aligned.shape == (3, 16) and other.centres.shape == (K, 16)
        assert torch.allclose(overall.norm(dim=1), torch.ones(3))
        assert torch.allclose(aligned.norm(dim=1), torch.ones(3))
    assert seen == [18, 18]


def test_initialisation_is_clips(text):
    """P and T from the places of the text tower, A_t from its layers, A_d and A_c from its first;
    copied, not tied; LayerNorm's epsilon 1e-12."""
    model = model_of(text)
    d = model.difference
    assert torch.equal(d.places, text.positional_embedding)
    assert torch.equal(d.kinds, text.positional_embedding[:2])
    known = text.transformer.resblocks
    for block, source in [(d.attention.blocks[0], known[0]), (model.coarse.blocks[0], known[0]),
                          *zip(model.transformer.blocks, [known[i % 3] for i in range(4)])]:
        assert all(torch.equal(a, b) for a, b in zip(block.parameters(), source.parameters()))
        assert block.ln_1.eps == block.ln_2.eps == 1e-12
    assert all(a is not b for a in model.transformer.parameters() for b in text.parameters())
    assert text.transformer.resblocks[0].ln_1.eps == 1e-5
    assert len(model.transformer.blocks) == 4 and len(model.coarse.blocks) == 1


def test_differences_lie_between_minus_one_and_one(text):
    model = model_of(text)
    for frames in (100 * some_frames()[0], torch.ones(2, 12, 16)):      # also where nothing changes
        mask = torch.ones(frames.shape[:2], dtype=torch.bool)
        changes, _ = model.difference.differences(frames, mask)
        assert changes.isfinite().all() and changes.abs().max() <= 1
        assert all(v.isfinite().all() for v in model.encode_video(frames, mask))


@pytest.mark.parametrize("variant", network.VARIANTS)
def test_padding_and_batch_mates_change_nothing(text, variant):
    """Videos of 1, 2, 3, 7 and 12 frames: alone and unpadded, or among others with noise behind
    their end, 1e-5."""
    model, (frames, _) = model_of(text, variant), some_frames(5)
    lengths = (1, 2, 3, 7, 12)
    mask = torch.arange(12)[None] < torch.tensor(lengths)[:, None]
    noise = some_frames(5, seed=9)[0] * 50
    together = model.encode_video(torch.where(mask[..., None], frames, noise), mask)
    for b, L in enumerate(lengths):
        alone = model.encode_video(frames[b:b + 1, :L], mask[b:b + 1, :L])
        for one, all_of_them in zip(alone, together):
            assert one is None or torch.allclose(one[0], all_of_them[b], atol=1e-5), (variant, L)


def test_a_video_without_a_frame_is_an_error(text):
    frames, mask = some_frames(2)
    mask[1] = False
    with pytest.raises(ValueError, match="no frame"):
        model_of(text).encode_video(frames, mask)


def test_the_difference_block_by_plain_steps(text):
    """v_g of one video, step by step as the specification has it."""
    model, (frames, mask) = model_of(text, "tdb"), some_frames(1, 4)
    d, f = model.difference, frames[0]

    def layer(block, x):                        # pre-norm, no mask, two heads of eight
        def attend(x):
            q, k, v = (x @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, 1)
            heads = []
            for h in (slice(0, 8), slice(8, 16)):
                weights = torch.softmax(q[:, h] @ k[:, h].T / math.sqrt(8), 1)
                heads.append(weights @ v[:, h])
            return block.attn.out_proj(torch.cat(heads, 1))
        norm = lambda ln, x: F.layer_norm(x, (16,), ln.weight, ln.bias, 1e-12)
        x = x + attend(norm(block.ln_1, x))
        h = block.mlp.c_fc(norm(block.ln_2, x))
        return x + block.mlp.c_proj(h * torch.sigmoid(1.702 * h))

    with torch.no_grad():
        change = torch.stack([f[i + 1] - f[i] + d.places[i + 1] for i in range(3)])
        change = 2 * torch.sigmoid(d.norm(layer(d.attention.blocks[0], change))) - 1
        x = []
        for i in range(4):
            x.append(f[i] + d.places[i] + d.kinds[1])
            if i < 3:
                x.append(change[i] + d.places[i] + d.kinds[0])
        x = torch.stack(x)
        for block in model.transformer.blocks:
            x = layer(block, x)
        v = torch.stack([(x[2 * i] + f[i]) / (x[2 * i] + f[i]).norm() for i in range(4)]).mean(0)
        assert torch.allclose(model.encode_video(frames, mask)[0][0], v / v.norm(), atol=1e-5)


def test_aggregation_by_loops_and_in_any_order(text):
    """Each centre sums what its tokens are beyond it; the order of tokens, and masked ones, change
    nothing."""
    model = model_of(text)
    x, mask = torch.randn(2, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    mask[1, 5:] = False
    with torch.no_grad():
        found = model.aggregate(x, mask)
        for b in range(2):
            kept = [x[b, n] for n in range(9) if mask[b, n]]
            rows = torch.zeros(5, 16)
            for token in kept:
                share = torch.softmax(model.assign @ token, 0)
                for k in range(5):
                    rows[k] += share[k] * (token - model.centres[k])
            u = (rows / rows.norm(dim=1, keepdim=True)).mean(0)
            assert torch.allclose(found[b], u / u.norm(), atol=1e-5)
        order = torch.randperm(9)
        assert torch.allclose(model.aggregate(x[:, order], mask[:, order]), found, atol=1e-5)


def test_words_are_what_is_between_start_and_padding(text):
    """The start token and the padding have no share in t_a; padding (id 0, which is "!") to any
    length changes nothing; the end token counts."""
    model = model_of(text)
    ids = clip.tokenize(["a person opens the door", "a dog"], 32)
    with torch.no_grad():
        overall, aligned = model.encode_text(ids)
        again = model.encode_text(clip.tokenize(["a person opens the door", "a dog"], 20))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip((overall, aligned), again))
        h = model.text.ln_final(model.text.states(ids)) @ model.text.text_projection
        words = torch.zeros(2, 32, dtype=torch.bool)
        words[0, 1:7] = words[1, 1:4] = True            # five words and the end; two and the end
        assert torch.allclose(model.aggregate(h, words), aligned, atol=1e-6)
        assert torch.allclose(F.normalize(model.text.encode_text(ids), dim=1), overall, atol=1e-5)


def test_loss_by_hand_and_its_symmetry():
    """A certain diagonal costs nothing. [[1, 0], [0, 0]]: rows log(1 + e^-1) and log 2, columns the
    same, so (0.3133 + 0.6931) / 2 = 0.5032."""
    assert shapes.contrastive_loss(100 * torch.eye(4)).item() == pytest.approx(0, abs=1e-6)
    S = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert shapes.contrastive_loss(S).item() == pytest.approx(0.5032, abs=1e-4)
    S = torch.randn(5, 5)
    assert torch.isclose(shapes.contrastive_loss(S), shapes.contrastive_loss(S.T))
    a, b = torch.randn(3, 3), torch.randn(3, 3)
    expected = 0.25 * shapes.contrastive_loss(a) + 0.75 * shapes.contrastive_loss(b)
    assert torch.isclose(network.loss([a, b], 0.25), expected)


def test_gradients_reach_every_new_weight(text):
    model, (frames, mask) = model_of(text).train(), some_frames(4)
    ids = clip.tokenize(["a dog", "a cat runs", "the door opens", "red"], 32)
    network.loss(network.logits(model.encode_text(ids), model.encode_video(frames, mask),
                                model.logit_scale)).backward()
    d = model.difference
    for p in (model.assign, model.centres, d.kinds, d.norm.weight, model.logit_scale,
              *d.attention.parameters(), *model.transformer.parameters(),
              *model.coarse.parameters()):
        assert p.grad.abs().max() > 0
    assert d.places.grad[:12].abs().max() > 0 and d.places.grad[12:].abs().max() == 0
    assert model.text.text_projection.grad.abs().max() > 0


def test_one_vector_holds_both_similarities(text):
    model, (frames, mask) = model_of(text), some_frames()
    ids = clip.tokenize(["a dog", "a cat runs"], 32)
    with torch.no_grad():
        t, v = model.encode_text(ids), model.encode_video(frames, mask)
        for w in (0.5, 0.3):
            both = network.joined(t, w) @ network.joined(v, w).T
            assert torch.allclose(both, w * t[0] @ v[0].T + (1 - w) * t[1] @ v[1].T, atol=1e-6)
            assert torch.allclose(network.joined(v, w).norm(dim=1), torch.ones(3))


# ------------------------------------------------------------------------------------------ metrics

def test_ranks_by_hand():
    """Rows: first; tied with one other: 1.5; last of three. All the same of four: 2.5."""
    S = torch.tensor([[3., 1., 2.], [5., 5., 1.], [3., 2., 1.]])
    assert evaluate.ranks(S, torch.arange(3)).tolist() == [1, 1.5, 3]
    assert evaluate.ranks(torch.zeros(4, 4), torch.arange(4)).tolist() == [2.5] * 4
    found = evaluate.retrieval_metrics(S)
    assert found["t2v R@1"] == pytest.approx(100 / 3) and found["t2v R@5"] == 100
    assert found["t2v MedR"] == 1.5 and found["t2v MnR"] == pytest.approx(5.5 / 3)
    for bad in (float("nan"), float("inf")):
        with pytest.raises(Mistake, match="not finite"):
            evaluate.retrieval_metrics(torch.tensor([[1.0, bad], [0.0, 1.0]]))
    with pytest.raises(ValueError, match="do not cover"):
        evaluate.retrieval_metrics(torch.zeros(3, 2), torch.tensor([0, 0, 0]))


def test_several_captions_a_video_against_loops():
    """Groups of 3, 1 and 4 captions: text to video for each caption, video to text by the best
    caption of each group."""
    generator = torch.Generator().manual_seed(1)
    S, of = torch.rand(8, 3, generator=generator), torch.tensor([0, 0, 0, 1, 2, 2, 2, 2])
    t2v = [1 + sum(S[t, v] > S[t, of[t]] for v in range(3)).item() for t in range(8)]
    best = [[max(S[t, v].item() for t in range(8) if of[t] == g) for g in range(3)]
            for v in range(3)]
    v2t = [1 + sum(best[v][g] > best[v][v] for g in range(3)) for v in range(3)]
    found = evaluate.retrieval_metrics(S, of)
    for name, rank in (("t2v", t2v), ("v2t", v2t)):
        assert found[f"{name} R@1"] == pytest.approx(100 * np.mean([r <= 1 for r in rank]))
        assert found[f"{name} MnR"] == pytest.approx(np.mean(rank))
        assert found[f"{name} MedR"] == pytest.approx(np.median(rank))


# ----------------------------------------------------------------------------------------- the data

def frame_times(duration_sec, count=12, stride=2):
    times_sec = data.candidate_times(duration_sec, count, stride)
    return times_sec[data.choose(len(times_sec), count, stride)]


def test_sampling_of_frames():
    """10 s at 5 a second are 50 pictures, every second of them 25: 12 evenly apart, first and last
    included. 3 s: 15, of which 7: all of them. Shorter than a picture: one."""
    times = frame_times(10, 12, 2)
    first = np.linspace(0, 49, 25).astype(int)
    assert times.tolist() == (first[np.linspace(0, 24, 12).astype(int)] / 5).tolist()
    assert times[0] == 0 and times[-1] == 49 / 5 and len(times) == 12
    assert len(frame_times(3, 12, 2)) == 7
    assert len(frame_times(10, 12, 1)) == 12
    assert frame_times(0.1).tolist() == [0]


def test_families_differ_in_motion_only():
    """Four videos of the same two actors: four captions, which noun words do not tell apart; the
    altered captions are those of the siblings, up to synonyms."""
    for seed in range(5):
        plans = data.family(np.random.default_rng(seed))
        captions = [data.describe(p["events"]) for p in plans]
        assert len(set(captions)) == 4
        actors = {frozenset((e["colour"], e["shape"]) for e in p["events"]) for p in plans}
        assert len(actors) == 1
        meant = [[(e["colour"], e["verb"]) for e in p["events"]] for p in plans]
        verbs = {word: k for k, pair in enumerate(shapes.VERBS) for word in pair}
        for k, plan in enumerate(plans):
            for kind, sibling in (("direction", k ^ 1), ("order", (k + 2) % 4)):
                told = [(part.split()[1], verbs[part.split()[-1]])
                        for part in data.altered(plan["events"])[kind].split(", then ")]
                assert told == meant[sibling], kind
            for event in plan["events"]:
                assert not shapes.held_out(event["verb"], event["shape"])
                assert 0 <= event["enter"] < event["start"] < event["end"] < event["leave"] <= 33


def write_json(path: pathlib.Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def published_files(folder: pathlib.Path) -> None:
    """The three datasets in their published forms, of three videos."""
    names = ["a", "b", "c"]
    sentences = [{"video_id": n, "caption": f"{n} caption {k}", "sen_id": k}
                 for n in names for k in range(2)]
    write_json(folder / "MSRVTT_data.json", {"videos": [], "sentences": sentences})
    (folder / "MSRVTT_train.9k.csv").write_text("video_id\na\nb\n", encoding="utf-8")
    with open(folder / "MSRVTT_JSFUSION_test.csv", "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerows([["key", "vid_key", "video_id", "sentence"], ["r", "m", "c", "a test, yes"]])
    (folder / "raw-captions.pkl").write_bytes(pickle.dumps({n: [["a", n], ["two"]] for n in names}))
    for split, name in zip(("train", "val", "test"), names):
        (folder / f"{split}_list.txt").write_text(name + "\n", encoding="utf-8")
    write_json(folder / "vatex_data.json",
               [{"videoID": n, "enCap": ["one", "two"], "chCap": []} for n in names])


def test_published_forms(tmp_path):
    published_files(tmp_path)
    msrvtt = data.read_msrvtt(tmp_path)
    assert msrvtt == {"train": {"a": ["a caption 0", "a caption 1"],
                                "b": ["b caption 0", "b caption 1"]},
                      "test": {"c": ["a test, yes"]}}
    assert data.read_msvd(tmp_path) == {"train": {"a": ["a a", "two"]},
                                        "val": {"b": ["a b", "two"]},
                                        "test": {"c": ["a c", "two"]}}
    assert data.read_vatex(tmp_path)["test"] == {"c": ["one", "two"]}
    write_json(tmp_path / "vatex_data.json",
               {"a": {"enCap": ["x"]}, "b": {"enCap": []}, "c": {"enCap": ["z"]}})
    assert data.read_vatex(tmp_path)["train"] == {"a": ["x"]}


def test_a_pickle_of_captions_cannot_execute_anything(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    published_files(tmp_path)

    class Explosion:
        def __reduce__(self):
            return pathlib.Path.touch, (pathlib.Path("exploded"),)

    (tmp_path / "raw-captions.pkl").write_bytes(pickle.dumps({"a": Explosion()}))
    with pytest.raises(Mistake, match="it asks for"):
        data.read_published("msvd", tmp_path)
    assert not (tmp_path / "exploded").exists()


# ------------------------------------------------------------------------------------- the commands

run = functools.partial(command, "-m", "clip2video")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """Three families are enough to see the commands work."""
    root = tmp_path_factory.mktemp("c2v")
    (root / "shapes").symlink_to(world / "shapes")
    families, data.FAMILIES = data.FAMILIES, {"train": 6, "val": 2, "test": 3}
    data.build_shapes(network.configure(root=str(root)))
    data.FAMILIES = families
    text = run("train", "--root", root, "--epochs", 2, "--device", "cpu", "--out", root / "run")
    return root, text


def killed_after(epochs: int, *arguments) -> None:
    """Runs `python -m clip2video` in a process that ends as soon as last.pt holds these epochs."""
    program = HERE / "tests" / "programs" / "stop_clip2video.py"
    command(program, epochs, *arguments, status=9)


def same_weights(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Do the runs in two folders have the same weights, bit for bit, and the same metrics?"""
    one, two = (torch.load(path / "last.pt", weights_only=True)["model"] for path in (a, b))
    assert one.keys() == two.keys()
    metrics = [(path / "results.json").read_text(encoding="utf-8") for path in (a, b)]
    return all(torch.equal(one[key], two[key]) for key in one) and metrics[0] == metrics[1]


def test_train_evaluate_and_resume(trained, tmp_path):
    root, text = trained
    assert "t2v R@1" in text and "direction recognised, %" in text and "epoch 2" in text
    shown = run("evaluate", root / "run" / "ckpt.pt")
    assert shown.strip() in text
    assert json.loads(run("evaluate", root / "run" / "ckpt.pt", "--json")) \
        == json.loads((root / "run" / "results.json").read_text(encoding="utf-8"))
    assert "already holds a run" in run("train", "--root", root, "--out", root / "run", status=2)
    arguments = ("train", "--root", root, "--epochs", 2, "--device", "cpu", "--out",
                 tmp_path / "run")
    killed_after(1, *arguments)
    assert "resuming after epoch 1" in run(*arguments, "--resume")
    assert same_weights(root / "run", tmp_path / "run")
    assert "another seed" in run(*arguments, "--seed", 5, "--resume", status=2)


def log_rows(folder: pathlib.Path) -> list[dict]:
    """The rows of a run's log without the measured times."""
    rows = []
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        rows.append({key: value for key, value in json.loads(line).items()
                     if key not in ("minutes", "data %")})
    return rows


def test_killed_after_an_epoch(trained, tmp_path):
    """The resumed run ends with the same bits as one that was not killed, and logs the same."""
    root, _ = trained
    arguments = ("train", "--root", root, "--epochs", 3, "--batch", 8, "--device", "cpu", "--out")
    assert "24 captions, 3 steps per epoch" in run(*arguments, tmp_path / "whole")
    killed_after(2, *arguments, tmp_path / "parts")
    assert not (tmp_path / "parts" / "results.json").exists()
    assert "resuming after epoch 2" in run(*arguments, tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    rows = log_rows(tmp_path / "whole")
    assert rows == log_rows(tmp_path / "parts") and len(rows) == 3


def made_by(config):
    """What features of the CLIP of a configuration say about it."""
    return {"sha256": clip.sha256(root_data.clip_file(config.clip, config.root))}


def test_search_a_folder_of_videos(trained, tmp_path):
    """Index, search, and moments in the best videos only."""
    root, _ = trained
    shapes.export(tmp_path / "videos", 3)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    first = shutil.copy(root / "run" / "ckpt.pt", tmp_path / "first.pt")
    text = run("index", first, tmp_path / "videos", "--out", tmp_path / "index")
    assert "failed: broken.mp4" in text
    first.unlink()                                      # the run has been moved: index tells where
    assert "was removed or changed" in run("search", tmp_path / "index", "a", status=2)
    run("index", root / "run" / "ckpt.pt", tmp_path / "videos", "--out",
        tmp_path / "index")
    text = run("search", tmp_path / "index", "a red circle rises", "--top", 2)
    assert text.count(".mp4") == 2 and '"a red circle rises"' in text
    ranker = search.Ranker(tmp_path / "index")
    assert sorted(ranker.names) == ["test-0000.mp4", "test-0001.mp4", "test-0002.mp4"]
    # again: new files are read, removed ones dropped, and another checkpoint is refused
    (tmp_path / "videos" / "test-0001.mp4").unlink()
    shutil.copy(tmp_path / "videos" / "test-0000.mp4", tmp_path / "videos" / "new.mp4")
    before = (tmp_path / "index" / "clip2video.json").stat().st_mtime_ns
    run("index", root / "run" / "ckpt.pt", tmp_path / "videos", "--out",
        tmp_path / "index")
    again = search.Ranker(tmp_path / "index")
    assert sorted(again.names) == ["new.mp4", "test-0000.mp4", "test-0002.mp4"]
    assert (tmp_path / "index" / "clip2video.json").stat().st_mtime_ns > before
    for name in ("test-0000.mp4", "test-0002.mp4"):
        assert torch.equal(again.vectors[again.names.index(name)],
                           ranker.vectors[ranker.names.index(name)])
    assert torch.allclose(again.vectors[again.names.index("new.mp4")],
                          ranker.vectors[ranker.names.index("test-0000.mp4")], atol=1e-5)
    torch.save(torch.load(root / "run" / "ckpt.pt", weights_only=True) | {"epoch": 0},
               tmp_path / "other.pt")
    assert "another checkpoint" in run("index", tmp_path / "other.pt", tmp_path / "videos", "--out",
                                       tmp_path / "index", status=2)
    text = run("search", tmp_path / "index", "a red circle", "--top", 1)
    assert "  1  " in text and "  2  " not in text
    for arguments in ((), ("--top", 0)):
        assert run("search", tmp_path / "index", "" if not arguments else "a",
                   *arguments, status=2)
    (name, score), *_ = ranker.best(["the blue bar falls"], 3)[0]
    with torch.no_grad():
        t = network.joined(ranker.model.encode_text(clip.tokenize("the blue bar falls", 40)))
    assert score == pytest.approx((t @ ranker.vectors[ranker.names.index(name)]).item(), abs=1e-5)
    assert "is not an index; make one with: python -m clip2video index" in run(
        "search", tmp_path, "a", status=2)


def test_features_of_another_clip_or_sampling_are_refused(trained, tmp_path):
    root, _ = trained
    file = root / "shapes-videos" / "features" / "clip2video" / "manifest.json"
    before = file.read_text(encoding="utf-8")
    write_json(file, json.loads(before) | {"sha256": "0" * 64})
    assert "come from another CLIP" in run("evaluate", root / "run" / "ckpt.pt", status=2)
    file.write_text(before, encoding="utf-8")
    for option, value in (("--frames", 12), ("--stride", 2), ("--clip", "ViT-B/32")):
        message = run("train", "--root", root, option, value, "--out",
                      tmp_path / "run", status=2)
        assert "made with" in message or "neither a weight file" in message \
            or "could not be downloaded" in message, message
    for option, value, message in (
            ("--weight", 2, "between 0 and 1"), ("--words", 100, "at most 77"),
            ("--epochs", 0, "at least 1"), ("--variant", "x", "must be one of")):
        assert message in run("train", "--root", root, option, value, status=2)


def test_an_epoch_sees_every_caption_once(trained, tmp_path):
    """Two captions a video are two passes, in which no batch has a video twice."""
    root, _ = trained
    shutil.copytree(root / "shapes-videos", tmp_path / "shapes-videos")
    (tmp_path / "shapes").symlink_to(root / "shapes")
    path = tmp_path / "shapes-videos" / "train.captions.json"
    captions = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {name: texts + ["again"] for name, texts in captions.items()})
    text = run("train", "--root", tmp_path, "--epochs", 1, "--batch", 8, "--out",
               tmp_path / "run", "--device", "cpu")
    assert "24 training videos, 48 captions, 6 steps per epoch" in text


def test_prepare(tmp_path, world, published):
    """Three short real videos as MSVD. A broken one in test is reported, and stops a training."""
    published_files(tmp_path)
    (tmp_path / "videos").mkdir()
    for name in "ab":
        shutil.copy(published / "videos" / "test.avi", tmp_path / "videos" / f"{name}.avi")
    (tmp_path / "videos" / "c.avi").write_bytes(b"no video")
    arguments = ("prepare", "msvd", "--annotations", tmp_path, "--videos", tmp_path / "videos",
                 "--clip", "shapes", "--device", "cpu", "--root")
    assert "the small CLIP of shapes does not exist" in run(*arguments, tmp_path, status=2)
    root = tmp_path / "data"
    root.mkdir()
    (root / "shapes").symlink_to(world / "shapes")
    text = run(*arguments, root)
    assert "train: 1 videos, 2 captions" in text and "1 videos have no features" in text
    store = root / "msvd" / "features" / "clip2video"
    assert "cannot be opened as a video" in (store / "failed.txt").read_text(encoding="utf-8")
    arguments += (root,)
    train = ("train", "--dataset", "msvd", "--root", root, "--clip", "shapes", "--epochs", 1,
             "--device", "cpu", "--out", tmp_path / "run")
    assert "1 of 1 videos of test have no features" in run(*train, status=2)
    shutil.copy(tmp_path / "videos" / "a.avi", tmp_path / "videos" / "c.avi")
    run(*arguments)
    assert "t2v R@1" in run(*train)
    trained = (*train[:-1], tmp_path / "trained", "--train-images", "true")
    assert "1 of 1 videos of train have no features or no pixels" in run(*trained, status=2)
    run(*arguments, "--train-images")
    assert "t2v R@1" in run(*trained)
    (tmp_path / "test_list.txt").write_text("a\n", encoding="utf-8")
    assert "both in train and test" in run(*arguments, status=2)
    (tmp_path / "raw-captions.pkl").write_bytes(b"no pickle")
    assert "does not contain the files of msvd" in run(*arguments, status=2)


def test_a_checkpoint_of_another_kind(trained, world):
    assert "is not a" in run("evaluate", world / "shapes" / "clip.pt", status=2)
    assert "there is no checkpoint" in run("evaluate", "nothing.pt", status=2)


def test_short_videos_and_stored_zeros(tmp_path, published):
    """A video of fewer pictures than L is padded with zeros, which are taken for what they are."""
    model = clip.build(shapes.pretrain(0, steps=1, count=64, rounds=1).state_dict())
    config = network.Config(frames=40, stride=2)
    x = data.encode_file(model, published / "videos" / "test.avi", config)
    times = frame_times(video.probe_duration(published / "videos" / "test.avi"), 40, 2)
    assert x.shape == (40, 64) and len(times) < 40
    assert ((x != 0).any(1) == (torch.arange(40) < len(times))).all()


# ------------------------------------------------------------------------- training the image tower

@pytest.fixture(scope="module")
def pixels(world, tmp_path_factory):
    """A root whose whole videos have pixels, and the settings of a run there."""
    root = tmp_path_factory.mktemp("pixels")
    (root / "shapes").symlink_to(world / "shapes")
    config = network.configure(root=str(root), train_images=True, device="cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "FAMILIES", {"train": 4, "val": 1, "test": 1})
        data.build_shapes(network.configure(root=str(root)))
        data.build_shapes(config)                               # adds the pixels to the features
    return root, config


def test_jitter_stays_within_its_part():
    """Stride 0: one of the three candidates of each part, all of which occur; without a draw the
    second, its centre. By stride: 75 candidates are 6 apart, so that 3 before to 2 after occur, but
    the ends stay; 37 are 3 apart, which the release does not jitter."""
    assert data.candidate_times(12, 4, 0).tolist() == [.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5,
                                                       9.5, 10.5, 11.5]
    assert data.choose(12, 4, 0).tolist() == [1, 4, 7, 10]
    drawn = np.array([data.choose(12, 4, 0, random.Random(k)) for k in range(50)])
    assert (drawn // 3 == np.arange(4)).all() and set(drawn[:, 2]) == {6, 7, 8}
    centres = data.choose(75, 12, 2)
    moved = np.array([data.choose(75, 12, 2, random.Random(k)) for k in range(100)]) - centres
    assert set(moved[:, 1:-1].flat) == {-3, -2, -1, 0, 1, 2} and not moved[:, [0, -1]].any()
    for total, count in ((37, 12), (5, 12), (1, 12), (75, 1), (75, 2)):
        unmoved = data.choose(total, count, 2)
        assert (data.choose(total, count, 2, random.Random(0)) == unmoved).all()


def test_jitter_depends_on_the_draw_only(pixels):
    _, config = pixels
    names = ["train-000-0", "train-003-1"]
    one, again, other = (data.read_pixels(config, names, random.Random(f"0 {epoch} 0"))
                         for epoch in (0, 0, 1))
    assert one.shape == (32, 3, 32, 32) and one.dtype == torch.uint8
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert torch.equal(data.read_pixels(config, names[1:]), data.read_pixels(config, names)[16:])


def test_an_untrained_tower_gives_the_stored_features(pixels):
    """To float16's rounding: the stored ones were computed in batches of 32."""
    _, config = pixels
    model, _ = train.start(config, made_by(config), torch.device("cpu"))
    split = data.read_split(config, "val")
    for v, name in enumerate(split.videos):
        x = data.encode(model.eval(), data.read_pixels(config, [name]), config).float()
        assert torch.allclose(x, split.frames[v], atol=2e-3, rtol=2e-3)
    x = model.encode_pixels(data.read_pixels(config, split.videos), split.mask)
    assert torch.allclose(x, split.frames, atol=2e-3, rtol=2e-3)


def test_the_image_tower_is_clips(pixels):
    """`encode_image` is, to the bit, the tower's forward pass over 64 images at a time."""
    _, config = pixels
    model, _ = train.start(config, made_by(config), torch.device("cpu"))
    images = clip.normalise(data.read_pixels(config, ["val-000-0"])).repeat(6, 1, 1, 1)
    assert len(images) > 64
    parts = [model.visual(part) for part in images.split(64)]
    for one, two in zip(model.encode_image(images), zip(*parts)):
        assert torch.equal(one, torch.cat(two))


def test_gradients_of_the_image_tower(pixels):
    """The same with recomputation and without, and not 0 for any weight; padding is inert."""
    _, config = pixels
    gradients = []
    for recompute in (True, False):
        model, optimiser = train.start(config, made_by(config), torch.device("cpu"))
        if not recompute:
            model.encode_image = model.visual
        names, mask = ["train-000-0", "train-001-0"], torch.ones(2, 16, dtype=torch.bool)
        frames, mask[1, 9:] = data.read_pixels(config, names), False
        x = model.encode_pixels(frames[mask.flatten()], mask)
        assert not x[1, 9:].any()
        ids = clip.tokenize(["a red circle rises", "a bar falls"], 40)
        network.loss(network.logits(model.encode_text(ids), model.encode_video(x, mask),
                                    model.logit_scale)).backward()
        gradients.append({name: p.grad for name, p in model.visual.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        assert torch.allclose(gradient, gradients[1][name], atol=1e-5), name
    before = copy.deepcopy(model.visual.state_dict())
    optimiser.step()
    assert all(not torch.equal(value, before[name]) for name, value
               in model.visual.state_dict().items() if value.is_floating_point())
    tower = {id(p) for p in model.visual.parameters()}
    assert all(group["base"] == config.text_lr for group in optimiser.param_groups
               if tower & {id(p) for p in group["params"]})


def test_train_the_image_tower_resume_and_search(pixels, world, tmp_path):
    """Killed after an epoch and resumed: the same bits. The checkpoint holds a tower that moved,
    and it alone encodes: index gives a video the vector that the checkpoint does, without the
    CLIP's file."""
    root, _ = pixels
    arguments = ("train", "--root", root, "--epochs", 2, "--batch", 8, "--device", "cpu",
                 "--train-images", "true", "--out")
    text = run(*arguments, tmp_path / "whole")
    killed_after(1, *arguments, tmp_path / "parts")
    assert "resuming after epoch 1" in run(*arguments, tmp_path / "parts", "--resume")
    assert same_weights(tmp_path / "whole", tmp_path / "parts")

    checkpoint = tmp_path / "whole" / "ckpt.pt"
    assert run("evaluate", checkpoint).strip() in text
    model, config, _ = evaluate.load(checkpoint)
    start = clip.read_state(world / "shapes" / "clip.pt")
    assert all(not torch.equal(value, start[f"visual.{name}"]) for name, value
               in model.visual.state_dict().items() if value.is_floating_point())
    shapes.export(tmp_path / "videos", 1)
    run("index", checkpoint, tmp_path / "videos", "--out", tmp_path / "index", "--root", tmp_path)
    x = data.encode_file(model, tmp_path / "videos" / "test-0000.mp4", config).float()[None]
    with torch.no_grad():
        vector = network.joined(model.encode_video(x, (x != 0).any(2)))
    assert torch.allclose(search.Ranker(tmp_path / "index").vectors[0], vector[0],
                          atol=1e-5)
    (root / "shapes-videos/features/clip2video/pixels/test-000-0.npy").write_bytes(b"no frames")
    assert "test-000-0.npy is damaged" in run("evaluate", checkpoint, status=2)


def test_only_a_vit_is_trained(text):
    resnet = shapes.small_clip(0, resnet=True).visual
    with pytest.raises(Mistake, match="is a ViT, not a ResNet"):
        network.CLIP2Video(copy.deepcopy(text), visual=resnet)
