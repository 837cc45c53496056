"""extras/real.py: folds that share no video, and a text tower from sentences with CLIP vectors."""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import train
from conftest import SHARED
from extras import real

WIDTH = 16


def test_stems():
    groups = (("opens", "opening", "opened"), ("putting", "puts", "put"), ("shoes", "shoe"),
              ("closes", "closing", "close"))
    for words in groups:
        assert len(real.stems(" ".join(words))) == 1, words
    assert real.stems("A glass is") == {"a", "glas", "is"}


def test_the_ridge_finds_a_linear_map():
    """Vectors that are a sum of a vector per word, over the root of the number of words: other
    sentences of these words are predicted."""
    torch.manual_seed(0)
    words = [f"w{letter}" for letter in "abcdefghij"]
    of = dict(zip(words, torch.randn(10, WIDTH)))
    rng = np.random.default_rng(0)
    sentences = [" ".join(rng.choice(words, 3, replace=False)) for _ in range(400)]
    vectors = torch.stack([sum(of[word] for word in s.split()) / 3 ** 0.5 for s in sentences])
    expected = torch.stack([sum(of[word] for word in s.split()) / 3 ** 0.5
                            for s in ("wa wb wc", "wj wi wa")])
    actual = real.predicted(sentences, vectors, ["wa wb wc", "wj wi wa", "unknown words"])
    assert torch.allclose(actual[:2], expected, atol=0.1) and actual.shape == (3, WIDTH)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Datasets of 60 real names with random features."""
    if not (SHARED / "charades-clip-l14").exists():
        pytest.skip(f"{SHARED} does not have the features of Charades videos")
    folder = tmp_path_factory.mktemp("real")
    rng = np.random.default_rng(0)
    names = (SHARED / "charades-clip-l14" / "videos.txt").read_text(encoding="utf-8").split()[:200]
    for name, shape in (("frames", (200, 32, WIDTH)), ("text", (30, WIDTH))):
        (folder / name).mkdir()
        np.save(folder / name / f"{name}.int8.npy", rng.integers(-99, 99, shape, dtype=np.int8))
        np.save(folder / name / "scale.npy", np.ones(WIDTH, np.float32))
        np.save(folder / name / "offset.npy", np.zeros(WIDTH, np.float32))
    (folder / "frames" / "videos.txt").write_text("\n".join(names), encoding="utf-8")
    lines = [f"x\ty\tz\ta person opens door number {i % 7} now" for i in range(30)]
    (folder / "text" / "sentences.tsv").write_text("\n".join(lines), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real, "STEPS", 3)
        patch.setattr(real, "WIDTH", 64)
        real.build(folder / "frames", SHARED, folder / "text", folder / "data")
    return folder / "data"


def test_each_video_is_tested_once_and_never_trained_on(root):
    tested = []
    for fold in range(real.FOLDS):
        videos = {split: {row.video for row in data.read_annotations(f"real-{fold}", split, root)}
                  for split in ("train", "val", "test")}
        assert not videos["test"] & (videos["train"] | videos["val"])
        assert not videos["train"] & videos["val"] and len(videos["val"]) > 15
        tested += sorted(videos["test"])
    assert len(tested) == len(set(tested)) == 200
    novel = {split: {row.video for row in data.read_annotations("real-novel", split, root)}
             for split in ("train", "val", "test", "novel-word", "novel-composition")}
    trained = novel["train"] | novel["val"]
    assert not trained & (novel["novel-word"] | novel["novel-composition"])


def test_a_fold_trains_by_the_ordinary_path(root, tmp_path):
    """MMN on features of CLIP's kind, and its fusion with the small text tower alone."""
    config = train.configure(dataset="real-1", clip="real-0", method="mmn", epochs=1, hidden=8,
                             joint=8, device="cpu", root=str(root), out=str(tmp_path / "run"))
    train.train(config)
    results = json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert set(results) == {"val", "test"}
    run = evaluate.load(tmp_path / "run" / "ckpt.pt")
    evaluate.add_clip(run, str(root), "cpu")
    fused = evaluate.evaluate(run, ["test"], root=str(root))
    assert fused["test"]["queries"] == results["test"]["queries"]
    tower = clip.load_text(str(root / "real-0" / "clip.pt"))
    x = F.normalize(tower.encode_text(tower.tokenize(["a person opens a door"])), dim=1)
    assert x.shape == (1, WIDTH)
