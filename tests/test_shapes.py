"""shapes.py: the world is what its description says, and the same every time."""
import itertools
import sys

import numpy as np
import pytest
import torch

import clip
import data
import shapes


def plans(split, count=60):
    part = list(shapes.SPLITS).index(split) + 1
    return [shapes.script(split, np.random.default_rng([0, part, i])) for i in range(count)]


@pytest.mark.parametrize("split", shapes.SPLITS)
def test_two_actors_and_two_verbs_make_four_events(split):
    """So that nouns alone, and verbs alone, find the moment half of the time."""
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
def test_what_is_novel_is_in_no_training_video(split):
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


def test_what_is_drawn():
    """Red grows, blue falls, green blinks in every other frame; the bystander is there in the gaps
    only."""
    event = {"shape": "circle", "word": "", "enter": 2, "start": 4, "end": 8, "leave": 10}
    for colour, verb, a, b in (("red", 4, (16, 16, 2.5), (16, 16, 6.5)),
                               ("blue", 1, (16, 8, 4), (16, 22, 4)),
                               ("green", 6, (16, 16, 4), (16, 16, 4))):
        plan = {"scene": "night", "speckle": 0, "frame_sec": 1.0,
                "events": [{**event, "colour": colour, "verb": verb, "from": a, "to": b}],
                "bystander": {"colour": "white", "shape": "square", "x": 16, "y": 16, "r": 5}}
        frames = shapes.render(plan, np.arange(12) + 0.5).astype(int)
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
    """In about half of the phrases of captions there is a verb, each of the fourteen about as
    often."""
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
        shapes.write(tmp_path / name / "shapes", model, shapes.World(3), {"train": 3, "test": 2})
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
    assert set(data.read_events("shapes", world)) == set(store.manifest["videos"])
    assert clip.load(world / "shapes"
                     / "clip.pt").visual.resolution == store.manifest["resolution"] == 32


def test_names_and_seeds():
    for name, world in {"shapes": (0, "context", 0), "shapes-12": (12, "context", 0),
                        "shapes-context-0.9": (0, "context", 0.9),
                        "shapes-3-random-0.25": (3, "random", 0.25)}.items():
        assert shapes.world_of(name) == world and shapes.name_of(shapes.World(*world)) == name
    with pytest.raises(ValueError, match="is not a shapes world"):
        shapes.world_of("shapes-x")
    for name in ("shapes--1", "shapes-\u00b2", f"shapes-{10 ** 30}", "shapes-context",
                 "shapes-1-0.9", "shapes-context-1.5"):
        with pytest.raises(ValueError, match="is not a shapes world"):
            shapes.world_of(name)


def test_a_context_changes_the_grounds_and_nothing_else():
    """World 5: its events, whatever their grounds; which grounds; and the pixels."""
    def events(*world):
        return [event for i in range(60) for event in shapes.plan_of(
            shapes.World(5, *world), "novel-word", i)["events"]]

    without = [{key: value for key, value in event.items() if key != "scene"}
               for event in events("context", 0.9)]
    assert without == events("context", 0.0) == events()
    scenes = list(shapes.SCENES)
    for kind, p, typical in (("context", 0.9, 1), ("context", 0.5, 1), ("random", 0.9, 1 / 6)):
        own = [event for event in events(kind, p) if "scene" in event]
        assert len(own) / 240 == pytest.approx(p, abs=0.07)
        assert np.mean([event["scene"] == scenes[event["verb"] % 6] for event in own]
                       ) == pytest.approx(typical, abs=0.06)

    plan = shapes.plan_of(shapes.World(5, "context", 1.0), "train", 0)
    frames, rng = shapes.render(plan, np.arange(32) + 0.5), np.random.default_rng(plan["speckle"])
    speckle = frames[:, 0, 0].astype(int) - rng.normal(0, 5, (32, 32, 1))[0, 0].round().astype(int)
    for t in range(32):
        begun = [event for event in plan["events"] if event["enter"] <= t + 0.5]
        scene = begun[-1]["scene"] if begun else plan["scene"]
        assert abs(speckle[t] - shapes.SCENES[scene]).max() <= 1, t


@pytest.mark.parametrize("seed", [-1, 10 ** 30])
def test_a_seed_out_of_range_is_one_sentence(seed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["shapes.py", "--seed", str(seed), "--show",
                                      str(tmp_path / "x.png")])
    with pytest.raises(SystemExit) as left:
        shapes.main()
    assert left.value.code == 2 and "error: --seed must be between 0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_gates():
    knows = {"colour": 0.95, "shape": 0.5, "left or right": 0.99, "verb cosine": 1.0}
    assert shapes.missed_gates(knows) == ["shape 0.500 < 0.6"]


def test_contact_sheet(tmp_path):
    shapes.show(str(tmp_path / "world.png"), shapes.World())
    assert (tmp_path / "world.png").read_bytes().startswith(b"\x89PNG")
