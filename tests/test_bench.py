"""extras/bench.py: its sizes are those it claims, and its parts run."""
import dataclasses
import re
import types

import pytest
import torch

import shapes
import train
from conftest import command
from extras import bench

CPU = torch.device("cpu")


def test_the_model_has_the_size_of_vit_b32():
    """151,277,313 parameters, as OpenAI's ViT-B/32 has."""
    model = bench.random_clip()
    assert sum(p.numel() for p in model.parameters()) == 151_277_313
    assert model.visual.grid == 7


@pytest.mark.parametrize("dataset", ["charades", "activitynet"])
def test_a_batch_is_one_of_the_published_settings(dataset):
    config = train.configure(dataset=dataset, batch=3)
    batch = bench.random_batch(config)
    assert batch.frames.shape == (3, config.frames, 512)
    assert batch.tokens.shape == (3, 6, 77) and (batch.tokens.argmax(2) == 12).all()
    assert batch.iou.shape == (6, config.num_clips, config.num_clips)
    assert batch.video_of.tolist() == [0, 0, 1, 1, 2, 2]


def test_every_step_is_timed(monkeypatch, capsys):
    """With two narrow layers: mmn, mmn with the published convolution, vdi, at both settings."""
    configure = train.configure
    monkeypatch.setattr(train, "configure", lambda **given: dataclasses.replace(
        configure(**given), num_clips=16, frames=32, pool_counts=(15,), layers=2, kernel=3,
        hidden=16))
    monkeypatch.setattr(bench, "seconds_of", lambda work: work() or 1.0)
    bench.bench_steps(CPU)
    lines = capsys.readouterr().out.splitlines()
    assert [re.split("  +", line)[0] for line in lines] == [
        f"step: {dataset}, {what}" for dataset in ("charades", "activitynet")
        for what in ("mmn, 2 videos", "mmn, published convolution", "vdi, 2 videos")]
    assert lines[1].endswith("1.00 x mmn")


def test_seconds_are_of_the_fastest_run(monkeypatch):
    timed = types.SimpleNamespace(blocked_autorange=lambda min_run_time: types.SimpleNamespace(
        times=[2.0, 1.0, min_run_time]))
    monkeypatch.setattr(bench.benchmark, "Timer", lambda *arguments, **options: timed)
    assert bench.seconds_of(print, at_least=4.0) == 1.0


def test_extraction_is_compared_with_its_slower_half(tmp_path):
    shapes.export(tmp_path, 2)
    printed = command("-m", "extras.bench", "video", "--device", "cpu", "--videos", tmp_path)
    assert re.search(r"extraction.*x the slower half", printed)


def test_mistakes_are_one_sentence(tmp_path):
    for arguments, text in ((("speed",), "choose from towers, steps, search, video"),
                            (("video", "--videos", tmp_path), "no readable video")):
        assert text in command("-m", "extras.bench", *arguments, status=2)
    assert "skipped" in command("-m", "extras.bench", "video")
