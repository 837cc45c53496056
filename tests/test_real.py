"""extras/real.py: the folds, the linear baseline against a plain computation, and every row on
random features."""
import json
import re

import numpy as np
import pytest
import torch

import clip
import data
import mmn
from extras import real
from support import files
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
    predicted = real.ridge(train, test, store)
    frames = real.frames_of(train, store)
    target = real.moment_contrast(train, frames)
    row, x = train[0], frames[0]
    centre = (np.arange(32) + 0.5) / 32 * row.duration_sec
    inside = torch.from_numpy((centre >= row.start_sec) & (centre < row.end_sec))
    assert torch.allclose(target[0], x[inside].mean(0) - x[~inside].mean(0), atol=1e-5)
    assert predicted.shape == (len(test), 12)
    assert torch.allclose(predicted.norm(dim=1), torch.ones(len(test)), atol=1e-5)
    assert not torch.allclose(predicted, real.ridge(train, test, store, shuffled=True))
    # a sentence that points at the second quarter of each video finds it
    frames = real.frames_of(test, store)
    planted = frames[:, 8:16].mean(1) - frames.mean(1)
    found = real.decoded(torch.nn.functional.normalize(planted, dim=1), test, store, smooth=1)
    quarter = torch.tensor([[0.25, 0.5]]) * torch.tensor([[row.duration_sec] for row in test])
    assert (mmn.interval_iou(found[:, 0, :2], quarter) > 0.5).float().mean() > 0.8   # noise: 0.06


def test_bags_by_hand():
    """Two known words of three: each counts 1 / sqrt(2); the last column is 1."""
    row = data.Sample("v", "The door opens.", 0.0, 1.0, 2.0)
    bag = real.bags([row], {"the": 0, "a": 1, "opens": 2})
    assert torch.allclose(bag, torch.tensor([[0.5 ** 0.5, 0.0, 0.5 ** 0.5, 1.0]]))


def test_every_row_runs_and_is_kept(small, published, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(real, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real, "FOLDS", 2)
    rows = ("MMN", "**`vdi-staged`**")                  # two, for the time it takes
    monkeypatch.setattr(real, "TRAINED", {name: real.TRAINED[name] for name in rows})
    monkeypatch.setattr(real, "COMMON", real.COMMON | dict(
        hidden=8, layers=1, joint=8, stage_steps=5, batch=8))
    monkeypatch.setattr(real, "TRIED", (real.Rates(1e-3, 0.3, 1), real.Rates(1e-9, 1.0, 1)))
    rng = np.random.default_rng(0)
    monkeypatch.setattr(real, "word_vectors", lambda pipeline: {
        word: rng.normal(size=300) for word in ("person", "door", "the", "opens")})
    arguments = ["real", "--features", str(small), "--annotations", str(published), "--device",
                 "cpu", "--vectors", "any"]
    for _ in range(2):
        monkeypatch.setattr("sys.argv", arguments)
        real.main()
        table = capsys.readouterr().out
        assert all(f"| {name} |" in table for name in (*real.BASELINES, *real.TRAINED))
        assert "| **`vdi-staged`** minus MMN | " in table
    assert "epoch 1" not in table                       # the second time nothing is trained
    tried = {rates: json.loads(real.tried_file("MMN", rates).read_text())["results"]
             for rates in real.TRIED}
    best = max(real.TRIED, key=lambda rates: sum(tried[rates][m] for m in real.METRICS[:2]))
    kept = json.loads((tmp_path / "results" / "mmn-real-0.json").read_text())
    assert tuple(kept["config"][name] for name in best._fields) == best
    assert kept["config"]["dataset"] == "real-0" and "iou" in kept["results"]["test"]
    assert len(kept["queries"]["dynamic"]["test"]["iou"]) == len(kept["results"]["test"]["iou"])
    monkeypatch.setattr("sys.argv", ["real", "tried"])
    real.main()
    assert capsys.readouterr().out.count("| 0.001 | 0.3 | 1 | 1 |") == len(real.TRAINED)
    monkeypatch.setattr("sys.argv", ["real", "kept"])
    real.main()
    assert len(re.findall(r"^\| MMN \|( [0-9.]+ \|){3}$", capsys.readouterr().out, re.M)) == 1
    splits = {f"real-{fold}": {"test": data.read_annotations(
        f"real-{fold}", "test", tmp_path / "data")} for fold in range(2)}
    lines = real.verbs(splits, real.kept(), at_least=5).splitlines()[2:]
    assert lines and all(int(line.split("|")[2]) >= 5 for line in lines)
    monkeypatch.setattr("sys.argv", ["real", "--annotations", str(published), "7", "--features",
                                     str(tmp_path)])
    with pytest.raises(SystemExit):
        real.main()
    with pytest.raises(Mistake, match="does not hold the ViT-L/14 features"):
        real.read_frames(tmp_path)


def test_the_document_shows_the_kept_results(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["real", "kept"])
    real.main()
    shown = capsys.readouterr().out.strip().split("\n\n")
    document = (real.RESULTS.parents[1] / "docs" / "real.md").read_text()
    assert len(shown) == 3 and all(table in document for table in shown)
    monkeypatch.setattr("sys.argv", ["real", "tried"])
    real.main()
    assert capsys.readouterr().out.strip() in document


def test_word_vectors_become_token_embeddings(tmp_path, monkeypatch):
    """300 wide, on a line: the first component keeps their order, the others are nearly 0; the rest
    of the tower stays."""
    torch.manual_seed(0)
    text = clip.TextTower(49408, 77, 64, 1, 1, 8, clip.QuickGELU)
    files.save_tensors(tmp_path / "real-0" / "clip.pt", text.state_dict())
    line = np.random.default_rng(0).normal(size=300)
    words = ("a", "person", "opens", "the", "door")
    real.build_vectors({word: k * line for k, word in enumerate(words)}, tmp_path)
    made = clip.read_state(tmp_path / "real-vectors" / "clip.pt")
    ids = [clip.vocabulary()[0][f"{word}</w>"] for word in words]
    x, old = made["token_embedding.weight"], text.token_embedding.weight.detach()
    steps = x[ids][1:, 0] - x[ids][:-1, 0]
    assert torch.allclose(steps, steps[0].expand(4), rtol=1e-3) and x[ids][:, 1:].abs().max() < 1e-3
    others = torch.ones(49408, dtype=bool)
    others[ids] = False
    assert torch.equal(x[others], old[others])
    # the mean of a sentence's vectors, by the root of their number; unknown words do not count
    row = data.Sample("v", "The door squeaks.", 0.0, 1.0, 2.0)
    mean = real.mean_vectors([row], {"the": np.array([1.0, 0.0]), "door": np.array([1.0, 2.0])})
    assert torch.allclose(mean, torch.tensor([[2.0, 2.0]]) / 2 ** 0.5)


def test_kept_iou_have_the_same_hits_as_the_metrics():
    """Sentences whose IoU is just below, at, and just above both thresholds."""
    iou = torch.tensor([0.5, 0.7]).repeat_interleave(7) + torch.tensor(
        [-1e-3, -3e-4, -6e-8, 0, 6e-8, 3e-4, 1e-3]).repeat(2)
    rows = [data.Sample("v", "x", 0.0, 1.0, 2.0)] * len(iou)
    predicted = torch.stack([torch.zeros(len(iou)), iou], 1)[:, None]   # [0, iou) in [0, 1)
    kept = real.metrics_of(predicted, rows)
    for mu in (0.5, 0.7):
        assert 100 * np.mean(np.array(kept["iou"]) >= 1000 * mu) == kept[f"R@1,IoU={mu}"]
