"""extras/real.py: the folds, the linear yardstick against a plain computation, and every row on
random features."""
import json

import numpy as np
import pytest
import torch

import data
from extras import real
from support.errors import Mistake


@pytest.fixture(scope="module")
def names(published):
    rows = data.read_annotations("charades", "test", published)
    return sorted({row.video for row in rows})


def test_folds_and_counts_are_the_stated_ones(names, published):
    """Every video is tested once; no video is in two parts; Charades-CG as counted by hand."""
    datasets = real.samples(str(published), names)
    tested = []
    for fold in range(5):
        parts = [{row.video for row in rows} for rows in datasets[f"real-{fold}"].values()]
        assert not any(a & b for i, a in enumerate(parts) for b in parts[:i])
        tested += sorted(parts[2])
    assert sorted(tested) == names and len(names) == 1334
    cg = datasets["real-cg"]
    training = [*cg["train"], *cg["val"]]
    assert (len(training), len({row.video for row in training})) == (1960, 729)
    assert [len(cg[split]) for split in ("novel-word", "novel-composition", "test")] == [
        173, 686, 847]
    assert not ({row.video for row in training}
                & {row.video for split in ("novel-word", "test") for row in cg[split]})


@pytest.fixture(scope="module")
def small(names, published, tmp_path_factory):
    """Random features of 40 videos, 8 frames of width 12, in the form of the published file."""
    folder, some = tmp_path_factory.mktemp("features"), names[::33][:40]
    rng = np.random.default_rng(0)
    np.save(folder / "frames.int8.npy", rng.integers(-127, 127, (40, 32, 12), dtype=np.int8))
    np.save(folder / "scale.npy", np.full(12, 0.01, np.float32))
    np.save(folder / "offset.npy", np.full(12, 0.1, np.float32))
    (folder / "videos.txt").write_text("\n".join(some) + "\n")
    return folder


def test_the_linear_map_predicts_the_contrast_of_the_moment(small, published, tmp_path):
    real.build(str(small), str(published), tmp_path)
    store = data.open_store("real-1", "real-0", tmp_path)
    train, test = (data.read_annotations("real-1", split, tmp_path) for split in ("train", "test"))
    similarity = real.ridge(train, test, store, 3.0)
    frames = real.frames_of(train, store)
    target = real.moment_contrast(train, frames)
    row, x = train[0], frames[0]
    centre = (np.arange(32) + 0.5) / 32 * row.duration_sec
    inside = torch.from_numpy((centre >= row.start_sec) & (centre < row.end_sec))
    assert torch.allclose(target[0], x[inside].mean(0) - x[~inside].mean(0), atol=1e-5)
    assert similarity.shape == (len(test), 32) and similarity.abs().max() <= 1 + 1e-5
    shuffled = real.ridge(train, test, store, 3.0, shuffled=True)
    assert not torch.allclose(similarity, shuffled)


def test_bags_by_hand():
    """Two known words of three: each counts 1 / sqrt(2); the last column is 1."""
    row = data.Sample("v", "The door opens.", 0.0, 1.0, 2.0)
    bag = real.bags([row], {"the": 0, "a": 1, "opens": 2})
    assert torch.allclose(bag, torch.tensor([[0.5 ** 0.5, 0.0, 0.5 ** 0.5, 1.0]]))


def test_every_row_runs_and_is_kept(small, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real, "FOLDS", 2)
    monkeypatch.setattr(real, "COMMON", real.COMMON | dict(
        epochs=1, hidden=8, layers=1, joint=8, stage_steps=5, batch=8))
    arguments = ["real", "--features", str(small), "--annotations", str(published), "--device",
                 "cpu"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", arguments)
        real.main()
        table = capsys.readouterr().out
        assert all(f"| {name} |" in table for name in (*real.YARDSTICKS, *real.TRAINED))
        assert "`vdi-staged`** minus MMN" in table
    assert "epoch 1" not in table                       # the second time nothing is trained
    kept = json.loads((tmp_path / "results" / "mmn-real-0.json").read_text())
    assert kept["config"]["dataset"] == "real-0" and "iou" in kept["results"]["test"]
    monkeypatch.setattr("sys.argv", ["real", "--annotations", str(published), "7", "--features",
                                     str(tmp_path)])
    with pytest.raises(SystemExit):
        real.main()
    with pytest.raises(Mistake, match="does not hold the ViT-L/14 features"):
        real.read_frames(tmp_path)
