"""shapes.py: the world is what its description says, and the same every time."""
import itertools
import math
import sys

import numpy as np
import pytest
import torch

import clip
import data
import shapes
from support.errors import Mistake


def plans(split, count=60):
    part = list(shapes.SPLITS).index(split) + 1
    return [shapes.script(split, np.random.default_rng([0, part, i])) for i in range(count)]


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_two_actors_and_two_verbs_make_four_events(split):
    """So nouns alone, or verbs alone, find the moment half of the time."""
    for plan in plans(split):
        pairs = {((e["colour"], e["shape"]), e["verb"]) for e in plan["events"]}
        actors, verbs = {actor for actor, _ in pairs}, {verb for _, verb in pairs}
        assert pairs == set(itertools.product(actors, verbs)) and len(actors) == len(verbs) == 2
        order = sorted(plan["events"], key=lambda e: e["enter"])
        assert all(e["enter"] <= e["start"] < e["end"] <= e["leave"] <= shapes.FRAMES
                   for e in order)
        assert all(a["leave"] <= b["enter"] for a, b in zip(order, order[1:]))
        assert all(4 <= e["end"] - e["start"] <= 8 for e in order)


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_novel_words_and_pairs_are_in_no_training_video(split):
    for plan in plans(split):
        for e in plan["events"]:
            novel = split.endswith("novel-word")
            assert (e["colour"] in shapes.NOVEL_COLOURS) == novel
            assert (e["shape"] in shapes.NOVEL_SHAPES) == novel
        asked = [e for e in plan["events"] if shapes.held_out(e["verb"], e["shape"])]
        if split == "novel-composition":
            assert len(shapes.samples_of("v", split, plan)) == len(asked) >= 2
        elif not split.endswith("novel-word"):
            assert not asked and len(shapes.samples_of("v", split, plan)) == 4


def test_motions_go_with_shapes():
    """At 1, each actor performs the two motions of its shape; at 0.87, a noun tells as much about
    its verb as in Charades-STA (48% of the entropy, minus what permuted pairs give)."""
    for split in ("train", "test", "coupled-novel-word"):
        for i in range(20):
            events = shapes.plan_of(0, split, i, 1.0)["events"]
            assert all(shapes.goes_with(e["verb"], e["shape"]) for e in events)
            assert len({(e["shape"], e["colour"], e["verb"]) for e in events}) == 4
    for shape in shapes.SHAPES:
        own = [verb for verb in range(7) if shapes.goes_with(verb, shape)]
        assert len(own) == 2 and not any(shapes.held_out(verb, shape) for verb in own)
    for split in ("novel-word", "novel-composition", "val-novel-word"):     # break the pairs
        assert shapes.plan_of(0, split, 3, 0.87) == shapes.plan_of(0, split, 3)

    def entropy(counts):
        shares = counts[counts > 0] / counts.sum()
        return -(shares * np.log2(shares)).sum()

    def told(pairs):
        counts = np.zeros((len(shapes.SHAPES), len(shapes.VERBS)))
        np.add.at(counts, tuple(pairs.T), 1)
        bits = entropy(counts.sum(0)) + entropy(counts.sum(1)) - entropy(counts)
        return bits / entropy(counts.sum(0))

    pairs = np.array([(shapes.SHAPES.index(e["shape"]), e["verb"]) for i in range(400)
                      for e in shapes.plan_of(0, "train", i, 0.87)["events"]])
    permuted = pairs.copy()
    np.random.default_rng(0).shuffle(permuted[:, 1])
    assert told(pairs) - told(permuted) == pytest.approx(0.48, abs=0.02)


@pytest.mark.parametrize("seed", range(5))
def test_the_shipped_clips_pass_their_gates(seed):
    assert not shapes.missed_gates(shapes.zero_shot(shapes.shipped(seed), seed))


def test_what_is_drawn():
    """Red grows, blue falls, green blinks in every other frame; the bystander is visible in the
    gaps only."""
    event = {"shape": "circle", "word": "", "enter": 2, "start": 4, "end": 8, "leave": 10}
    for colour, verb, a, b in (("red", 4, (16, 16, 2.5), (16, 16, 6.5)),
                               ("blue", 1, (16, 8, 4), (16, 22, 4)),
                               ("green", 6, (16, 16, 4), (16, 16, 4))):
        plan = {"scene": "night", "speckle": 0, "frame_sec": 1.0,
                "events": [{**event, "colour": colour, "verb": verb, "from": a, "to": b}],
                "bystander": {"colour": "white", "shape": "square", "x": 16, "y": 16, "r": 5}}
        frames = shapes.film(plan, np.arange(12) + 0.5).permute(0, 2, 3, 1).numpy().astype(int)
        channel = {"red": 0, "green": 1, "blue": 2}[colour]
        bright = frames[..., channel] > 150                             # [12, 32, 32]
        white = (frames.min(3) > 150).any((1, 2))
        assert white.tolist() == [True] * 2 + [False] * 8 + [True] * 2
        size, height = bright.sum((1, 2)), [np.nonzero(frame)[0].mean() if frame.any() else None
                                            for frame in bright]
        if colour == "red":
            assert size[2] == size[3] < size[4] < size[5] < size[6] < size[7] < size[8] == size[9]
        if colour == "blue":
            assert height[3] < height[4] < height[5] < height[6] < height[7] < height[8]
        if colour == "green":
            assert (size[2:10] > 0).tolist() == [True, True, False, True, False, True, True, True]


def test_a_verb_says_nothing_in_a_caption():
    """About half of the phrases in captions have a verb, and all fourteen are about as frequent."""
    rng = np.random.default_rng(0)
    captions = [shapes.still(rng)[1] for _ in range(3000)]
    phrases = [words for caption in captions for words in caption.split(" and ")]
    counts = [sum(f" {verb}" in phrase for phrase in phrases) for pair in shapes.VERBS
              for verb in pair]
    assert sum(counts) / len(phrases) == pytest.approx(0.5, abs=0.05)
    assert max(counts) < 1.6 * min(counts)


def test_the_same_seed_makes_the_same_world(world, tmp_path):
    model = clip.load(world / "shapes" / "clip.pt")
    for name in ("a", "b"):
        shapes.write(tmp_path / name / "shapes", model, 3, {"train": 3, "test": 2})
    files = [sorted(p.relative_to(tmp_path / name) for p in (tmp_path / name).rglob("*")
                    if p.is_file())
             for name in "ab"]
    # frames of five videos, patches of the three for training, two splits; clip, events, chunks,
    # manifest
    assert files[0] == files[1] and len(files[0]) == 5 + 3 + 2 + 4
    for path in files[0]:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    one, two = (shapes.pretrain(5, steps=3, count=150, rounds=1).state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_nothing_downstream_knows_that_it_is_a_toy(world):
    """Annotations, features and CLIP are read by the same functions as those of a real dataset."""
    samples = data.read_annotations("shapes", "test", world)
    assert all(0 <= s.start_sec < s.end_sec <= s.duration_sec
               for s in samples) and len(samples) == 24
    store = data.open_store("shapes", "shapes", world)
    assert store.manifest["sha256"] == clip.sha256(world / "shapes" / "clip.pt")
    assert set(shapes.read_events("shapes", world)) == set(store.manifest["videos"])
    assert clip.load(world / "shapes"
                     / "clip.pt").visual.resolution == store.manifest["resolution"] == 32


def test_names_and_seeds():
    for name, seed, coupling in (("shapes", 0, 0), ("shapes-12", 12, 0), ("shapes-p05", 0, 0.05),
                                 ("shapes-3-p87", 3, 0.87), ("shapes-p100", 0, 1)):
        assert shapes.world_of(name) == (seed, coupling)
        assert shapes.name_of(seed, coupling) == name
    for name in ("shapes-x", "shapes--1", "shapes-\u00b2", f"shapes-{10 ** 30}", "shapes-1\n",
                 "shapes-context-0.9"):
        with pytest.raises(Mistake, match="is not a shapes world"):
            shapes.world_of(name)


def test_contrastive_loss_by_hand():
    """Scores (2, 0; 1, 1). Rows: log(1 + e^-2) and log 2. Columns: log(1 + e^-1), log(1 + e^-1)."""
    loss = shapes.contrastive_loss(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
    rows = (math.log1p(math.exp(-2)) + math.log(2)) / 2
    assert loss.item() == pytest.approx((rows + math.log1p(math.exp(-1))) / 2)


def test_event_accuracy_by_hand():
    """Events 0-4 A up, 4-8 A down, 10-14 B up. The query names A up. The three answers hit A up, A
    down, and the gap nearest to B up."""
    events = {"v": [shapes.Event(0, 4, "A", "up"), shapes.Event(4, 8, "A", "down"),
                    shapes.Event(10, 14, "B", "up")]}
    samples = [data.Sample("v", "A up", 0.0, 4.0, 20.0)] * 3
    answers = torch.tensor([[[0.0, 3.0]], [[4.5, 9.0]], [[15.0, 16.0]]])
    assert shapes.event_accuracy(answers, samples, events) == pytest.approx(
        {"noun accuracy": 200 / 3, "verb accuracy": 200 / 3})


def test_events_are_read_back(world, tmp_path):
    """In seconds, as in the script. None for a dataset without events.json; a truncated one is
    reported."""
    plan = shapes.plan_of(0, "test", 2)
    for event, drawn in zip(shapes.read_events("shapes", world)["test-0002"], plan["events"]):
        assert event.verb == shapes.VERBS[drawn["verb"]][0]
        assert event.noun == f"{drawn['colour']} {drawn['shape']}"
        assert event.end_sec == round(drawn["end"] * plan["frame_sec"], 3)
    assert shapes.read_events("mine", tmp_path) is None
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "events.json").write_text('{"v": [[0, 1', encoding="utf-8")
    with pytest.raises(Mistake, match="events.json is damaged .* rebuild it"):
        shapes.read_events("mine", tmp_path)


@pytest.mark.parametrize("seed", [-1, 10 ** 30])
def test_a_seed_out_of_range_is_one_sentence(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--seed", str(seed), "--root", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        shapes.main()
    assert left.value.code == 2 and "error: --seed must be between 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("coupling", ["-0.1", "1.5", "0.875", "nan"])
def test_a_coupling_out_of_range_is_one_sentence(coupling, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shapes.py", f"--coupling={coupling}", "--root",
                                      str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        shapes.main()
    assert left.value.code == 2 and "error: --coupling must be" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gates():
    accuracies = {"colour": 0.95, "shape": 0.5, "left or right": 0.99, "verb cosine": 1.0}
    assert shapes.missed_gates(accuracies) == ["shape 0.500 < 0.6"]
