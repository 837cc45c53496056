"""video.py and data.py: annotations in every form, cleaning, features, batches, and real videos."""
import json
import pathlib

import numpy as np
import pytest
import torch

import clip
import data
import mmn
import parse
import video


# -------------------------------------------------------------------------------------- annotations

def test_forms_of_annotation_files(tmp_path):
    sample = data.Sample("V1", "a person sits.", 1.0, 4.0, 10.0)
    (tmp_path / "a.json").write_text(json.dumps({"V1": {"duration": 10.0, "timestamps": [[1, 4]],
                                                        "sentences": ["  a person  sits."]}}))
    (tmp_path / "a.jsonl").write_text(json.dumps({"vid": "V1", "query": "a person sits.",
                                                  "duration": 10,
                                                  "relevant_windows": [[1, 4]]}) + "\n\n")
    (tmp_path / "a.txt").write_text("V1 1.0 4.0##a person sits.\n")
    for name in ("Charades_v1_train.csv", "Charades_v1_test.csv"):
        (tmp_path / name).write_text("id,length\nV1,10.0\n")
    for name in ("a.json", "a.jsonl", "a.txt"):
        assert data.read_file(tmp_path / name) == [sample]


def test_cleaning_clamps_and_drops():
    """[8, 12) of 10 s becomes [8, 10); [10, 12) becomes empty and goes; nan duration: nothing is
    known to clamp to."""
    rows = [data.Sample("v", "q", *times) for times in
            ((8, 12, 10), (10, 12, 10), (1, 2, 10), (-1, 2, 10), (5, 5, 10), (3, 99, float("nan")))]
    kept, counts = data.clean(rows)
    assert [(s.start_sec, s.end_sec) for s in kept] == [(8, 10), (1, 2), (0, 2), (3, 99)]
    assert counts == data.Cleaned(clamped=3, dropped=2)


def test_all_bad_lines_are_named(tmp_path):
    good = {"vid": "v", "query": "q", "relevant_windows": [[0, 1]]}
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(good), "{",
                                                 json.dumps({**good, "query": " "}),
                                                 json.dumps({"vid": "v"})]))
    with pytest.raises(ValueError, match="3 bad lines: line 2: .*; line 3: .*empty; line 4: "):
        data.read_file(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match="is not in the form"):
        data.read_file(tmp_path / "a.json")
    with pytest.raises(FileNotFoundError, match="no annotation file"):
        data.read_file(tmp_path / "b.json")


@pytest.mark.parametrize("dataset, split, count", [
    ("charades", "train", 12404), ("charades", "test", 3720), ("charades-cg", "train", 8281),
    ("charades", "train-cg", 8281), ("charades", "novel-word", 695),
    ("charades", "novel-composition", 3442),
    ("charades-cg", "trivial", 3096), ("activitynet", "train", 37417),
    ("activitynet", "val", 17505),
    ("activitynet", "test", 17031)])
def test_published_counts(published, dataset, split, count):
    samples = data.read_annotations(dataset, split, published)
    assert len(samples) == count
    assert all(0 <= s.start_sec < s.end_sec <= s.duration_sec for s in samples)


def test_charades_validation_is_a_tenth_of_the_training_videos(published):
    train, val = (data.read_annotations("charades", split, published) for split in ("train", "val"))
    assert len({s.video for s in val}) == len({s.video
                                               for s in train}) // 10 and set(val) < set(train)
    assert val == data.read_annotations("charades", "val", published)


def test_unknown_split_and_missing_features_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="charades has no split 'dev'"):
        data.read_annotations("charades", "dev", tmp_path)
    with pytest.raises(FileNotFoundError,
                       match="python data.py charades --videos DIR --clip ViT-B/32"):
        data.open_store("charades", "ViT-B/32", tmp_path)


# ----------------------------------------------------------------------------------------- features

def test_frames_are_taken_at_the_centres_of_equal_parts():
    """Ten seconds in four parts: 1.25, 3.75, 6.25, 8.75."""
    assert video.frame_centres(10, 4).tolist() == [1.25, 3.75, 6.25, 8.75]
    assert video.patch_frames(8, 4).tolist() == [1, 3, 5, 7]
    assert video.patch_frames(3, 32).tolist() == [0, 1, 2]


def make_video(path, colours, rate=10, size=(32, 48)):
    """One frame of each grey level."""
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        for colour in colours:
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), colour, dtype=np.uint8),
                                               format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_the_frame_on_show_at_an_instant(tmp_path):
    """Ten frames a second: at 0.35 s frame 3 is on show, also when asked twice, and the last one
    for ever."""
    make_video(tmp_path / "a.mp4", range(0, 200, 10))
    assert video.probe_duration(tmp_path / "a.mp4") == pytest.approx(2.0)
    frames = list(video.frames_at(tmp_path / "a.mp4", np.array([0.0, 0.05, 0.35, 0.36, 1.95, 7.0])))
    assert [frame.shape for frame in frames] == [(3, 32, 48)] * 6
    levels = [frame.float().mean().item() for frame in frames]
    assert levels == pytest.approx([0, 0, 30, 30, 190, 190], abs=4)


def test_a_video_of_one_frame(tmp_path):
    make_video(tmp_path / "a.mp4", [50])
    frames = list(video.frames_at(tmp_path / "a.mp4",
                                  video.frame_centres(video.probe_duration(tmp_path / "a.mp4"), 5)))
    assert len(frames) == 5


def test_what_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / "a.mp4").write_text("no video")
    with pytest.raises(video.VideoError, match="cannot be opened as a video"):
        video.probe_duration(tmp_path / "a.mp4")


def test_store_round_trip_and_mismatch(tmp_path):
    made = {"clip": "x", "sha256": "0" * 64, "frames": 4, "width": 2}
    store = video.FeatureStore(tmp_path / "f", made)
    frames = torch.randn(4, 2).half()
    store.write("v", frames, None, 8.0)
    store.save_manifest()
    again = video.FeatureStore(tmp_path / "f")
    assert "v" in again and torch.equal(torch.from_numpy(np.array(again.read("v", "frames"))),
                                        frames)
    assert again.manifest["videos"]["v"] == {"duration_sec": 8.0, "seconds_per_feature": 2.0}
    with pytest.raises(ValueError, match="made with clip 'x', not 'y'"):
        video.FeatureStore(tmp_path / "f", {**made, "clip": "y"})
    with pytest.raises(ValueError, match="plain file name"):
        store.write("../v", frames, None, 8.0)
    with pytest.raises(video.VideoError, match="not finite"):
        store.write("w", frames * float("nan"), None, 8.0)
    with pytest.raises(FileNotFoundError, match="'w' have not been made"):
        store.read("w", "frames")


def test_reading_keeps_no_file_open(world):
    """There are more videos than file descriptors."""
    store = data.open_store("shapes", "shapes", world)
    folder = pathlib.Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.exists() else 0
    features = [np.array(store.read(name, "frames")) for name in store.manifest["videos"]]
    assert len(features) == 46 and (not before or len(list(folder.iterdir())) <= before + 1)


def test_extraction_resumes_and_adds_missing_patches(tmp_path, world):
    """A video first seen in a test split gets its patches when it becomes a training video."""
    model = clip.load(world / "shapes" / "clip.pt")
    (tmp_path / "v").mkdir()
    for name in ("a", "b"):
        make_video(tmp_path / "v" / f"{name}.mp4", range(0, 200, 10))
    store = video.FeatureStore(tmp_path / "f", {"frames": 4, "patch_frames": 2})
    found = data.find_videos(tmp_path / "v")
    failed = data.extract({"a", "b", "c"}, set(), found, store, model)
    assert failed == {"c": "there is no video file named c"}
    assert not store.path("a", "patches").exists()
    before = store.path("b", "frames").stat().st_mtime_ns
    data.extract({"a", "b"}, {"a"}, found, video.FeatureStore(tmp_path / "f"), model)
    assert store.read("a", "patches").shape == (2, 64, 4, 4)
    assert store.path("b", "frames").stat().st_mtime_ns == before


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(OSError):
        video.save_atomically(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------ batches

@pytest.fixture(scope="module")
def videos(world):
    store = data.open_store("shapes", "shapes", world)
    return data.Videos(data.read_annotations("shapes", "train", world), store, 16,
                       parse.Parser("rules"), patches=True)


def test_a_batch_holds_every_sentence_of_its_videos(videos):
    batch = next(iter(videos.batches(5)))
    assert batch.frames.shape == (5, 32, 64) and batch.patches.shape == (5, 32, 64, 4, 4)
    assert torch.allclose(batch.frames.norm(dim=2), torch.ones(5, 32), atol=1e-5)
    assert torch.allclose(batch.patches.norm(dim=2), torch.ones(5, 32, 4, 4), atol=1e-5)
    for s, (index, b) in enumerate(zip(batch.index.tolist(), batch.video_of.tolist())):
        sample = videos.samples[index]
        assert sample.video == batch.videos[b]
        assert batch.moments_sec[s].tolist() == pytest.approx([sample.start_sec, sample.end_sec])
        for half, text in enumerate(videos.queries[index]):
            assert torch.equal(batch.tokens[half, s], clip.tokenize(text)[0])
    assert torch.equal(batch.iou, mmn.iou_map(batch.moments_sec, batch.durations_sec, 16))


def test_shuffling_is_seeded_and_complete(videos):
    orders = [[name for batch in videos.batches(5, torch.Generator().manual_seed(seed))
               for name in batch.videos]
              for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(videos.videos)


# -------------------------------------------------------------------------------------- real videos

def test_real_videos(published, world):
    """Right shapes, the same twice, the same in any batch; durations as probed by hand; a broken
    file is one sentence."""
    model = clip.load(world / "shapes" / "clip.pt")
    for name, seconds in (("charades.mp4", 30.7), ("arm_wrestling.mp4", 10.0),
                          ("flipping_a_pancake.mkv", 10.33),
                          ("test.avi", 6.6)):
        frames, patches, duration_sec = video.encode_video(model, published / "videos" / name, 32)
        assert frames.shape == (32, 64) and patches.shape == (32, 64, 4, 4)
        assert torch.isfinite(frames).all() and duration_sec == pytest.approx(seconds, abs=0.15)
        assert torch.equal(frames, video.encode_video(model, published / "videos" / name, 32)[0])
    with pytest.raises(video.VideoError, match="corrupted.mp4"):
        video.encode_video(model, published / "videos" / "corrupted.mp4", 32)
