"""data.py, video.py and extras/prepare.py: annotations in every form, cleaning, features, batches,
and real videos."""
import http.server
import json
import math
import os
import pathlib
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import films
import mmn
import parse
import video
from conftest import HERE, command
from extras import features, prepare
from support import files
from support.errors import Mistake


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
    """[8, 12) of 10 s becomes [8, 10); [10, 12) becomes empty and is dropped; a nan duration clamps
    nothing."""
    rows = [data.Sample("v", "q", *times) for times in
            ((8, 12, 10), (10, 12, 10), (1, 2, 10), (-1, 2, 10), (5, 5, 10), (3, 99, float("nan")))]
    kept, *counts = data.clean(rows)
    assert [(s.start_sec, s.end_sec) for s in kept] == [(8, 10), (1, 2), (0, 2), (3, 99)]
    assert counts == [3, 2]                     # clamped, dropped


def test_all_invalid_lines_are_listed(tmp_path):
    good = {"vid": "v", "query": "q", "relevant_windows": [[0, 1]]}
    bad = ["{", {**good, "query": " "}, {"vid": "v"}, {**good, "relevant_windows": [[2, 1]]},
           {**good, "relevant_windows": [[0, float("inf")]]}, {**good, "duration": -1}, 7]
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps(good), ""] + [
        line if isinstance(line, str) else json.dumps(line) for line in bad]))
    with pytest.raises(Mistake) as error:
        data.read_file(tmp_path / "a.jsonl")
    lines = str(error.value).splitlines()
    assert "7 invalid entries; correct or remove them" in lines[0] and len(lines) == 8
    for number, (line, reason) in enumerate(zip(lines[1:], (
            "Expecting property name", "sentence is empty", "no 'relevant_windows'",
            "ends before it begins", "is not a valid moment", "is not a valid moment", "")), 3):
        assert line.startswith(f"  line {number}: ") and reason in line
    for content, reason in (("[1]", "is not of the form"), ("{", "is not of the form"),
                            ('{"v": {"duration": 1}}', "v: no 'timestamps'"),
                            ("\xff", "is not UTF-8 text")):
        (tmp_path / "a.json").write_bytes(content.encode("latin-1"))
        with pytest.raises(Mistake, match=reason):
            data.read_file(tmp_path / "a.json")
    with pytest.raises(Mistake, match="no annotation file"):
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


def test_statistics_are_the_papers(published):
    """Sec. 4.1.1: 6,670 videos, 16,124 queries, 30.59 s, 2.41 moments, 8.09 s; 19,811 videos,
    117.75 s, 3.63 moments, 37.14 s (and 71,957 queries, of which 4 are empty)."""
    for dataset, row in (("charades", "6670 16124 30.60 8.09 2.42 2367 4"),
                         ("activitynet", "19811 71953 117.75 37.14 3.63 506 4")):
        assert prepare.describe(dataset, published).splitlines()[-1].split()[2:] == row.split()


def test_annotations_are_installed_from_any_published_form(published, tmp_path):
    """From MMN's json, made here from the text files, in a folder named as in its repository."""
    source = tmp_path / "elsewhere" / "Charades_STA"
    source.mkdir(parents=True)
    for split in ("train", "test"):
        content = {}
        for s in data.read_annotations("charades", split, published):
            entry = content.setdefault(s.video, {"duration": s.duration_sec, "timestamps": [],
                                                 "sentences": []})
            entry["timestamps"].append([s.start_sec, s.end_sec])
            entry["sentences"].append(s.sentence)
        (source / f"charades_{split}.json").write_text(json.dumps(content), encoding="utf-8")
    prepare.install("charades", tmp_path / "root", tmp_path / "elsewhere")
    for split in ("train", "val", "test"):
        assert (sorted(data.read_annotations("charades", split, tmp_path / "root"))
                == sorted(data.read_annotations("charades", split, published)))
    with pytest.raises(Mistake, match="no annotations of activitynet: none of train"):
        prepare.install("activitynet", tmp_path / "root", tmp_path / "elsewhere")
    content.pop("AMT7R")
    (source / "charades_test.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(Mistake, match="3719 sentences of 1333 vid.* expected 3720 of 1334"):
        prepare.install("charades", tmp_path / "other", tmp_path / "elsewhere")
    assert not (tmp_path / "other").exists()


def test_missing_annotations_are_downloaded_and_verified(published, tmp_path, monkeypatch):
    """From a local server that sends the published files, then from one that does not exist."""
    requested, sources = [], prepare.SOURCES.read_text(encoding="utf-8")
    remote = "https://raw.githubusercontent.com"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            name = next(name for name, address, _ in map(str.split, sources.splitlines())
                        if address == remote + self.path)
            content = (published / name).read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = tmp_path / "sources.txt"
        local.write_text(sources.replace(remote, f"http://127.0.0.1:{server.server_port}"),
                         encoding="utf-8")
        monkeypatch.setattr(prepare, "SOURCES", local)
        for dataset in data.FILES:
            prepare.install(dataset, tmp_path, None)
            assert prepare.describe(dataset, tmp_path) == prepare.describe(dataset, published)
        assert len(requested) == len(sources.splitlines()) == 15
        prepare.install("charades", tmp_path, None)
        assert len(requested) == 15                     # already there
        server.shutdown()
    with pytest.raises(Mistake, match="by hand to .*/charades/charades_sta_train.txt"):
        prepare.install("charades", tmp_path / "offline", None)


def test_charades_validation_is_a_tenth_of_the_training_videos(published):
    train, val = (data.read_annotations("charades", split, published) for split in ("train", "val"))
    assert len({s.video for s in val}) == len({s.video for s in train}) // 10
    assert set(val) < set(train)
    assert val == data.read_annotations("charades", "val", published)


def test_unknown_split_and_missing_features_say_what_to_do(tmp_path):
    with pytest.raises(Mistake, match="charades has no split 'dev'"):
        data.read_annotations("charades", "dev", tmp_path)
    with pytest.raises(Mistake,
                       match="python data.py charades --videos DIR --clip ViT-B/32"):
        data.open_store("charades", "ViT-B/32", tmp_path)


def test_chunks_are_cached(tmp_path, monkeypatch):
    """In the folder of the dataset, if it exists: a second parser does not parse the same sentences
    again. Another pipeline has a cache of its own."""
    sentences = ["a person opens the door", "she  sits down on a chair.", ""]
    assert data.parser_of("mine", tmp_path).all_chunks(sentences)[0] == [(0, 8), (15, 23)]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    parser = data.parser_of("mine", tmp_path)
    expected = parser.all_chunks(sentences)
    cache = tmp_path / "mine" / f"chunks-{parser.name.replace(' ', '-')}-lower.json"
    assert list((tmp_path / "mine").iterdir()) == [cache]
    again = data.parser_of("mine", tmp_path, mask="something")
    monkeypatch.setattr(again.pipeline, "pipe", lambda texts: 1 / 0)
    assert again.all_chunks(sentences) == expected
    assert again.split(sentences[0]).dynamic == "something opens something"
    with pytest.raises(ZeroDivisionError):
        again.chunks("a sentence that is new")
    parser.pipeline.meta["version"] = "0.0.0"
    assert parse.Parser(parser.pipeline, cache=tmp_path / "mine").known == {}


# ----------------------------------------------------------------------------------------- features

def test_frames_are_taken_at_the_centres_of_equal_parts():
    """Ten seconds in four parts: 1.25, 3.75, 6.25, 8.75."""
    assert video.frame_centres(10, 4).tolist() == [1.25, 3.75, 6.25, 8.75]
    assert data.patch_frames(8, 4).tolist() == [1, 3, 5, 7]
    assert data.patch_frames(3, 32).tolist() == [0, 1, 2]


def make_video(path, colours, rate=10, size=(32, 48)):
    """One frame of each grey level."""
    films.film(path, films.greys(colours, size), "-c:v", "mpeg4", "-q:v", 2, "-pix_fmt", "yuv420p",
               rate=rate)


def test_a_file_that_is_not_a_video_is_reported(tmp_path):
    (tmp_path / "a.mp4").write_text("not a video", encoding="utf-8")
    with pytest.raises(data.VideoError, match="cannot be opened as a video"):
        video.probe_duration(tmp_path / "a.mp4")


def test_store_round_trip_and_mismatch(tmp_path):
    made = {"clip": "x", "sha256": "0" * 64, "frames": 4, "width": 2}
    store = data.FeatureStore(tmp_path / "f", made)
    frames = torch.randn(4, 2).half()
    store.write("v", frames, None, 8.0)
    store.save_manifest()
    again = data.FeatureStore(tmp_path / "f")
    assert "v" in again and torch.equal(torch.from_numpy(np.array(again.read("v", "frames"))),
                                        frames)
    about = again.manifest["videos"]["v"]
    checksum = about.pop("crc32")
    assert about == {"duration_sec": 8.0, "seconds_per_feature": 2.0}
    again.write("v", 2 * frames, None, 8.0)             # a run that began with the others notices
    assert again.manifest["videos"]["v"]["crc32"] != checksum
    with pytest.raises(Mistake, match="made with clip 'x', not 'y'"):
        data.FeatureStore(tmp_path / "f", {**made, "clip": "y"})
    with pytest.raises(Mistake, match="plain file name"):
        store.write("../v", frames, None, 8.0)
    with pytest.raises(data.VideoError, match="not finite"):
        store.write("w", frames * float("nan"), None, 8.0)
    with pytest.raises(data.VideoError, match="'w' have not been made"):
        store.read("w", "frames")


def test_reading_keeps_no_file_open(world):
    """A dataset has more videos than a process may have file descriptors."""
    store = data.open_store("shapes", "shapes", world)
    folder = pathlib.Path("/proc/self/fd")
    before = len(list(folder.iterdir())) if folder.exists() else 0
    features = [np.array(store.read(name, "frames")) for name in store.manifest["videos"]]
    assert len(features) == 46 and (not before or len(list(folder.iterdir())) <= before + 1)


def greys(folder, names, frames=20):
    folder.mkdir(exist_ok=True)
    for i, name in enumerate(names):
        make_video(folder / f"{name}.mp4", np.linspace(10 * i, 250 - 10 * i, frames).astype(int))


def test_extraction_resumes_and_adds_missing_patches(tmp_path, world):
    """A video of a test split gets its patches when it becomes a training video."""
    model = clip.load(world / "shapes" / "clip.pt")
    greys(tmp_path / "v", "ab")
    store = data.FeatureStore(tmp_path / "f", MADE)
    paths = files.find_files(tmp_path / "v", video.VIDEOS)
    failed = features.extract(store, model, paths, ["a", "b", "c"], set())
    assert failed == {"c": "no video file is named c"}
    listed = (store.folder / "failed.txt").read_text(encoding="utf-8")
    assert listed == "c\tno video file is named c\n"
    assert not store.path("a", "patches").exists()
    before = store.path("b", "frames").stat().st_mtime_ns
    features.extract(data.FeatureStore(tmp_path / "f"), model, paths, ["a", "b"], {"a"})
    assert store.read("a", "patches").shape == (2, 64, 4, 4)
    assert store.path("b", "frames").stat().st_mtime_ns == before


def test_a_file_that_was_removed_is_made_again(tmp_path, world):
    """As the message about a damaged one advises."""
    model = clip.load(world / "shapes" / "clip.pt")
    greys(tmp_path / "v", "a")
    paths = files.find_files(tmp_path / "v", video.VIDEOS)
    features.extract(data.FeatureStore(tmp_path / "f", MADE), model, paths, ["a"], {"a"})
    whole = contents(tmp_path / "f")
    for kind in ("frames", "patches"):
        (tmp_path / "f" / f"a.{kind}.npy").unlink()
        features.extract(data.FeatureStore(tmp_path / "f"), model, paths, ["a"], {"a"})
        assert contents(tmp_path / "f") == whole


def test_a_video_that_was_replaced_is_read_again(tmp_path, world):
    model = clip.load(world / "shapes" / "clip.pt")
    greys(tmp_path / "v", "ab")
    paths = files.find_files(tmp_path / "v", video.VIDEOS)
    features.extract(data.FeatureStore(tmp_path / "f", MADE), model, paths, ["a", "b"], set())
    before = contents(tmp_path / "f")
    make_video(tmp_path / "v" / "a.mp4", range(0, 250, 5))
    features.extract(data.FeatureStore(tmp_path / "f"), model, paths, ["a", "b"], set())
    after = contents(tmp_path / "f")
    assert before["b.frames.npy"] == after["b.frames.npy"]
    assert before["a.frames.npy"] != after["a.frames.npy"]


def test_names_with_the_ending_of_the_file(tmp_path, capsys):
    """"a.mp4" and "a" are the video a.mp4; "b.mp4" is not b.mkv, and "c.mp4" is c.mp4.mkv."""
    (tmp_path / "v").mkdir()
    for name in ("a.mp4", "b.mkv", "c.mp4.mkv", "d.v2.MTS"):
        make_video(tmp_path / "v" / "x.mp4", range(0, 200, 10))
        (tmp_path / "v" / "x.mp4").rename(tmp_path / "v" / name)
    names = ("a.mp4", "a", "b.mp4", "c.mp4", "d.v2.MTS")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(
        {"vid": name, "query": "q", "relevant_windows": [[0, 1]]}) + "\n" for name in names),
        encoding="utf-8")
    prepare.adopt("mine", "train", tmp_path / "a.jsonl",
                  files.find_files(tmp_path / "v", video.VIDEOS), tmp_path)
    samples = data.read_annotations("mine", "train", tmp_path)
    assert [sample.video for sample in samples] == ["a", "a", "b.mp4", "c.mp4", "d.v2"]
    assert "5 sentences of 4 videos" in capsys.readouterr().out
    assert [sample.duration_sec for sample in samples] == pytest.approx([2, 2, 1, 2, 2])


def leave(*arguments):
    """The exit status of data.py."""
    before, sys.argv = sys.argv, ["data.py", *map(str, arguments)]
    try:
        prepare.main()
    except SystemExit as left:
        return left.code
    finally:
        sys.argv = before
    return 0


@pytest.fixture
def no_weights(monkeypatch):
    """A CLIP that is loaded or downloaded is an error."""
    for name in ("load", "download", "read_state"):
        monkeypatch.setattr(clip, name, lambda *arguments: 1 / 0)


def test_folders_are_checked_before_a_clip_is_downloaded(tmp_path, capsys, no_weights):
    (tmp_path / "empty").mkdir()
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_text("a video", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"vid": "a", "query": "q", "duration": 9, '
                                      '"relevant_windows": [[0, 1]]}\n', encoding="utf-8")
    for arguments, told in (
            (("--annotations", tmp_path / "a.jsonl", "--videos", tmp_path / "no"), "no folder"),
            (("--annotations", tmp_path / "a.jsonl", "--videos", tmp_path / "empty"),
             "contains no video; name the folder that has them"),
            (("--annotations", tmp_path / "a.jsonl", "--features", tmp_path / "no"), "no folder"),
            (("--annotations", tmp_path / "no.jsonl", "--videos", tmp_path / "v"),
             "there is no annotation file"),
            (("--annotations", tmp_path / "v", "--videos", tmp_path / "v"),
             "there is no annotation file")):
        for dataset in ("mine", "charades") if "no annotation" not in told else ("mine",):
            assert leave(dataset, *arguments, "--root", tmp_path / "data") == 2
            shown = capsys.readouterr().err
            assert told in shown and len(shown.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_features_of_a_published_clip_need_no_weights(tmp_path, capsys, no_weights):
    """Its SHA-256 and width are known. Features of another width are refused."""
    (tmp_path / "a.jsonl").write_text('{"vid": "a", "query": "q", "duration": 9, '
                                      '"relevant_windows": [[0, 1]]}\n', encoding="utf-8")
    (tmp_path / "f").mkdir()
    arguments = ("mine", "--annotations", tmp_path / "a.jsonl", "--features", tmp_path / "f",
                 "--root", tmp_path / "data")
    assert leave(*arguments) == 2
    assert "has no features of the 1 videos" in capsys.readouterr().err
    np.save(tmp_path / "f" / "a.npy", np.random.default_rng(0).standard_normal((40, 512)))
    assert leave(*arguments, "--clip", "RN50") == 2
    assert ("has features of width 512, but those of RN50 have 1024; name the CLIP that made them "
            "with --clip") in capsys.readouterr().err
    assert leave(*arguments) == 0
    made = data.open_store("mine", "ViT-B/32", tmp_path / "data", 32).manifest
    assert made["sha256"] == clip.PUBLISHED["ViT-B/32"][0] and made["resolution"] == 224
    assert made["width"] == 512 and made["clip"] == "ViT-B/32" and list(made["videos"]) == ["a"]
    assert not (tmp_path / "data/mine/features/RN50").exists()


def test_a_dataset_with_a_typo(tmp_path, capsys):
    """Messages list the names that are known."""
    assert leave("charade", "--root", tmp_path) == 2
    assert "(known by name: charades, activitynet, " in capsys.readouterr().err
    assert leave("check", "charade", "--root", tmp_path) == 2
    assert "no features in " in capsys.readouterr().err
    with pytest.raises(Mistake, match="make them with: .*known by name: charades, .*, shapes"):
        data.open_store("charade", "ViT-B/32", tmp_path)


def test_mistakes_on_the_command_line_leave_nothing_behind(published, world, tmp_path):
    """--frames below 1; no readable video; annotations of one dataset, in its own folder, are
    installed without those of its sibling."""
    def run(*arguments, status=2):
        return command("data.py", *arguments, "--root", tmp_path / "data", status=status)

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shapes").symlink_to(world / "shapes")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_text("not a video", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"vid": "a", "query": "q\u2028r", "duration": 9, '
                                      '"relevant_windows": [[0, 1]]}\n', encoding="utf-8")
    mine = ("mine", "--annotations", tmp_path / "a.jsonl", "--videos", tmp_path / "v", "--clip",
            "shapes")
    assert "at least 1" in run(*mine, "--frames", "-1")
    assert not (tmp_path / "data" / "mine").exists()
    assert "none of 1 videos could be read" in run(*mine)
    make_video(tmp_path / "v" / "a.mp4", range(0, 200, 10))
    run(*mine, status=0)
    assert "cannot be the name of your dataset" in run("")
    done = subprocess.run([sys.executable, "data.py", "activitynet", "--annotations",
                           published / "activitynet", "--root", tmp_path / "data"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "note: activitynet-cg is skipped" in done.stderr


MADE = {"clip": "shapes", "frames": 4, "patch_frames": 2, "width": 64, "patch_width": 64, "grid": 4,
        "precision": "float32"}


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_features_do_not_depend_on_the_order(tmp_path, world):
    """Each video by a call of its own, and all of them in one: the same bytes."""
    model = clip.load(world / "shapes" / "clip.pt")
    greys(tmp_path / "v", "abcde")
    paths = files.find_files(tmp_path / "v", video.VIDEOS)
    alone, together = tmp_path / "alone", tmp_path / "together"
    for name in "ceabd":
        features.extract(data.FeatureStore(alone, MADE), model, paths, [name], {"a"})
    features.extract(data.FeatureStore(together, MADE), model, paths, list("edcba"), {"a"})
    assert contents(alone) == contents(together) and len(contents(alone)) == 8
    assert not list(prepare.file_problems(data.FeatureStore(alone)))


@pytest.mark.skipif(os.name == "nt", reason="Windows has neither SIGKILL nor process groups")
def test_killed_and_continued_or_shared_by_processes_the_store_is_the_same(tmp_path, world):
    """`python data.py` in one go; killed by SIGKILL at work and run again, several times; and as
    two processes of a cluster: the same features, byte by byte."""
    names = [f"v{i}" for i in range(12)]
    greys(tmp_path / "v", names, 150)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(
        {"vid": name, "query": "a door opens", "relevant_windows": [[0, 1]]}) + "\n"
        for name in names), encoding="utf-8")

    def start(root, **environment):
        (tmp_path / root).mkdir(exist_ok=True)
        if not (tmp_path / root / "shapes").exists():
            (tmp_path / root / "shapes").symlink_to(world / "shapes")
        return subprocess.Popen(
            [sys.executable, pathlib.Path(data.__file__), "mine", "--annotations",
             tmp_path / "a.jsonl", "--videos", tmp_path / "v", "--clip", "shapes", "--root",
             tmp_path / root, "--device", "cpu"], env=os.environ | environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)

    assert start("once").wait() == 0
    whole = contents(tmp_path / "once/mine/features/shapes")
    assert len(whole) == 2 * len(names) + 2

    folder, kills = tmp_path / "killed/mine/features/shapes", 0
    for target in (1, 4, 7):
        process = start("killed")
        while process.poll() is None and len(list(folder.glob("v*.frames.npy"))) < target:
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)          # with its decoding processes
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2 and len(list(folder.glob("v*.frames.npy"))) < len(names)
    assert start("killed").wait() == 0
    left = {name: content for name, content in contents(folder).items() if ".tmp" not in name}
    assert left == whole

    both = [start("shared", RANK=str(rank), WORLD_SIZE="2") for rank in (0, 1)]
    assert [process.wait() for process in both] == [0, 0]
    shared = tmp_path / "shared/mine/features/shapes"
    assert {k: v for k, v in contents(shared).items() if k.endswith(".npy")} == {
        k: v for k, v in whole.items() if k.endswith(".npy")}
    assert len(data.FeatureStore(shared).manifest["videos"]) == len(names)


# ---------------------------------------------------------------------------- precomputed features

def test_precomputed_features(tmp_path):
    """Ten rows for four features: those at the centres of four equal parts, 1, 3, 6 and 8."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    x = np.arange(20, dtype=np.float32).reshape(10, 2)
    np.save(folder / "a.npy", x)
    np.savez(folder / "b.npz", features=x)
    torch.save(torch.from_numpy(x), folder / "c.PT")
    np.save(folder / "wide.npy", x.reshape(5, 4))
    np.save(folder / "flat.npy", x[:, 0])
    np.save(folder / "empty.npy", x[:0])
    np.save(folder / "nan.npy", x * np.nan)
    np.save(folder / "objects.npy", np.array([{}, []], dtype=object))
    np.savez(folder / "d.npz", something=x)             # the only one, whatever its name
    torch.save(torch.nn.Parameter(torch.from_numpy(x)), folder / "e.pt")
    np.savez(folder / "other.npz", one=x, two=x[:3])
    (folder / "text.npy").write_text("not an array", encoding="utf-8")
    store = data.FeatureStore(tmp_path / "f", MADE | {"width": 2, "patch_frames": 0})
    paths = files.find_files(folder, features.FEATURES)
    failed = features.adopt_features(store, paths, [*paths, "none"], dict.fromkeys(paths, 20.0))
    assert sorted(store.manifest["videos"]) == ["a", "b", "c", "d", "e"]
    for name in "abcde":
        assert np.array_equal(store.read(name, "frames"), x[[1, 3, 6, 8]])
    for name, reason in dict(wide="width 4, but this CLIP's width is 2", flat=r"float32 \[10\]",
                             text="text", empty=r"\[0, 2\]", nan="finite", objects="Python objects",
                             other=r"several arrays.*one \[10, 2\], two \[3, 2\]",
                             none="no feature file is named none").items():
        assert re.search(reason, failed[name]), failed[name]
    with pytest.raises(Mistake, match="no patches, which the spatial dynamics .* --method mmn"):
        data.Videos([data.Sample("a", "q", 0, 1, 20.0)], store, 2,
                    parse.Parser(known={"q": []}), True)


def test_features_that_float16_would_lose(tmp_path):
    """Rows that are tiny or huge are scaled before they are rounded; zeros are refused."""
    (tmp_path / "v").mkdir()
    x = np.random.default_rng(0).normal(size=(4, 2))
    np.save(tmp_path / "v" / "tiny.npy", x * 1e-9)
    np.save(tmp_path / "v" / "huge.npy", x * [[1e9], [1], [1e-9], [1]])
    np.save(tmp_path / "v" / "zero.npy", x * 0)
    store = data.FeatureStore(tmp_path / "f", MADE | {"width": 2, "patch_frames": 0})
    paths = files.find_files(tmp_path / "v", features.FEATURES)
    failed = features.adopt_features(store, paths, list(paths), dict.fromkeys(paths, 4.0))
    assert failed == {"zero": "zero: its features are all 0"}
    direction = F.normalize(torch.from_numpy(x), dim=1)
    for name in ("tiny", "huge"):
        stored = torch.from_numpy(store.read(name, "frames")).double()
        assert torch.allclose(F.normalize(stored, dim=1), direction, atol=2e-3)


@pytest.mark.parametrize("packed", [False, True])
def test_other_forms_of_hdf5(tmp_path, packed):
    """A file for each video, and a file whose only group has all videos."""
    h5py = pytest.importorskip("h5py")
    x = np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32)
    path = tmp_path / "v"
    if packed:
        path = tmp_path / "all.h5"
        with h5py.File(path, "w") as file:
            file["charades/a"], file["charades/b"] = x, x
    else:
        path.mkdir()
        for name in "ab":
            with h5py.File(path / f"{name}.hdf5", "w") as file:
                file["group/anything"] = x
    found = features.find_features(path)
    assert found.keys() == {"a", "b"}
    for each in found.values():
        assert np.array_equal(features.read_features(each), x)


def own(path, *rows):
    """An annotation file of rows (video, moments, duration); returns its path."""
    lines = [json.dumps({"qid": f"x{i}", "vid": name, "query": f"q{i}", "duration": sec,
                         "relevant_windows": moments})
             for i, (name, moments, sec) in enumerate(rows)]
    path.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")       # as Windows' editor
    return path


def test_several_moments_of_a_sentence(tmp_path):
    """They stay together, in the file too, with the file's own numbers; the best one counts."""
    path = own(tmp_path / "a.jsonl", ("a", [[0, 2], [4, 6], [9, 12]], 10.0), ("b", [[1, 3]], 10.0))
    rows, *counts = data.clean(data.read_file(path))
    assert [row.moments_sec for row in rows] == [[(0, 2), (4, 6), (9, 10)], [(1, 3)]]
    assert counts == [1, 0]
    data.write_jsonl(tmp_path / "b.jsonl", rows)
    assert data.read_file(tmp_path / "b.jsonl") == rows and rows[0].qid == "x0"
    windows = data.windows_of(rows)
    assert windows.tolist() == [[[0, 2], [4, 6], [9, 10]], [[1, 3]] * 3]
    durations = torch.tensor([10.0, 10.0])
    each = [mmn.iou_map(windows[:, m], durations, 5) for m in range(3)]
    assert torch.equal(data.best_iou(windows, durations, 5), torch.stack(each).amax(0))
    predicted = torch.tensor([[[4.0, 6.0]], [[5.0, 6.0]]])
    assert evaluate.recall(predicted, windows) == {
        "R@1,IoU=0.5": 50, "R@1,IoU=0.7": 50, "R@5,IoU=0.5": 50, "R@5,IoU=0.7": 50, "mIoU": 50}


def test_another_true_moment_is_no_negative():
    """L_cl with two true moments: the gradient pushes neither of them away from the sentence."""
    windows = torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])
    iou = data.best_iou(windows, torch.tensor([8.0]), 4)                # 4 clips of 2 s
    cells = torch.ones(4, 4).triu().bool()
    moments = F.normalize(torch.randn(1, 8, 10, generator=torch.Generator().manual_seed(0)), dim=1)
    moments.requires_grad_()
    text = F.normalize(torch.ones(1, 8), dim=1)
    mmn.contrastive_loss(moments, text, iou[:, cells], torch.tensor([0]),
                         windows[:, 0]).sum().backward()
    pushed = (moments.grad[0].T @ text[0]) > 0                          # [10]
    true = iou[0][cells] >= 0.5
    assert true.sum() >= 2 and not pushed[true].any() and pushed[~true].all()


def test_annotations_that_cannot_be_right(tmp_path):
    """Each is one sentence, and at most ten lines are listed."""
    many = own(tmp_path / "many.jsonl", *[("a", [[3, 1]], 9.0)] * 25)
    with pytest.raises(Mistake) as caught:
        data.read_file(many)
    assert str(caught.value).count("ends before") == 10 and "and 15 more" in str(caught.value)
    two = own(tmp_path / "two.jsonl", ("a", [[0, 1]], 9.0), ("a", [[0, 1]], 12.0))
    with pytest.raises(Mistake, match="gives a two durations, 9.0 s and 12.0 s"):
        data.read_file(two)
    (tmp_path / "array.jsonl").write_text('[{"vid": "a"}]', encoding="utf-8")
    with pytest.raises(Mistake, match="contains a json array; write one object per line"):
        data.read_file(tmp_path / "array.jsonl")
    numbers = own(tmp_path / "frames.jsonl", ("a", [[250, 400]], 20.0), ("b", [[100, 180]], 20.0))
    with pytest.raises(Mistake, match="2 of 2 moments .* are they frame numbers"):
        prepare.adopt("mine", "train", numbers, {}, tmp_path)
    unknown = own(tmp_path / "null.jsonl", ("a", [[0, 1]], None))
    assert math.isnan(data.read_file(unknown)[0].duration_sec)


def test_names_in_another_form_and_with_an_ending(tmp_path):
    """NFD for NFC, and ID.mp4 where precomputed features are called ID."""
    path = own(tmp_path / "a.jsonl", ("cafe\u0301.mp4", [[0, 1]], 9.0))
    prepare.adopt("mine", "train", path, {}, tmp_path, {"caf\u00e9": tmp_path / "caf\u00e9.npy"})
    assert data.read_annotations("mine", "train", tmp_path)[0].video == "caf\u00e9"


def test_a_closed_folder_is_noted(tmp_path, capsys):
    """Here one that vanishes while its parent is listed: nothing is closed to root."""
    assert files.files_below(tmp_path / "gone") == []
    assert re.match("note: .*gone cannot be read: ", capsys.readouterr().err)


def test_splits_that_share_videos(tmp_path, capsys):
    own(tmp_path / "a.jsonl", ("a", [[0, 1]], 9.0), ("b", [[0, 1]], 9.0))
    (tmp_path / "mine").mkdir()
    for split, names in (("train", "aab"), ("val", "ac")):
        data.write_jsonl(tmp_path / "mine" / f"{split}.jsonl",
                         [data.Sample(name, "q", 0.0, 1.0, 9.0) for name in names])
    samples = data.training_samples("mine", "val", 0, tmp_path)
    assert [sample.video for sample in samples["train"]] == ["b"]
    assert "2 of 3 training sentences are left out, because their videos are in val" in \
        capsys.readouterr().out
    shutil.copy(tmp_path / "mine" / "train.jsonl", tmp_path / "mine" / "val.jsonl")
    with pytest.raises(Mistake, match="every training video of mine is in val, too"):
        data.training_samples("mine", "val", 0, tmp_path)


def test_two_clips_of_one_file_name(tmp_path, world):
    """Their features lie side by side, and a text tower is trained on those of its own CLIP; GELU
    is recorded, and not mixed with QuickGELU."""
    greys(tmp_path / "v", "ab")
    annotations = own(tmp_path / "a.jsonl", ("a", [[0, 1]], None), ("b", [[0, 1]], None))
    state = clip.read_state(world / "shapes" / "clip.pt")
    for folder, change in (("A", 0.0), ("B", 0.1)):
        (tmp_path / folder).mkdir()
        changed = {key: x + change if x.is_floating_point() else x for key, x in state.items()}
        torch.save(changed, tmp_path / folder / "pytorch_model.bin")
    common = ("--root", tmp_path / "root", "--device", "cpu")
    a, b = (tmp_path / folder / "pytorch_model.bin" for folder in "AB")
    command("data.py", "mine", "--annotations", annotations, "--videos", tmp_path / "v", "--clip",
            a, "--gelu", *common)
    train = ("train.py", "--dataset", "mine", "--method", "mmn", "--epochs", 1, *common, "--clip")
    assert "there are no features in" in command(*train, b, "--out", tmp_path / "run", status=2)
    error = command("data.py", "mine", "--videos", tmp_path / "v", "--clip", a, *common, status=2)
    assert "made with activation 'gelu', not None" in error
    command("data.py", "mine", "--videos", tmp_path / "v", "--clip", b, *common)
    assert len(list((tmp_path / "root/mine/features").iterdir())) == 2
    command(*train, a, "--out", tmp_path / "run")
    run = evaluate.load(tmp_path / "run" / "ckpt.pt")
    assert isinstance(run.text.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    # another CLIP's text tower, from a folder whose configuration says GELU
    (tmp_path / "B" / "config.json").write_text(json.dumps({
        "vision_config": {"num_attention_heads": 4},
        "text_config": {"num_attention_heads": 4, "hidden_act": "gelu"}}), encoding="utf-8")
    printed = command(*train, a, "--out", tmp_path / "other", "--text-clip", tmp_path / "B")
    assert f"text tower: {tmp_path / 'B'}, read with GELU" in printed
    # the run does not go on with other sentences
    path = tmp_path / "root/mine/train.jsonl"
    before = path.read_text(encoding="utf-8")
    path.write_text(before.replace("q1", "q2"), encoding="utf-8")
    error = command(*train, a, "--out", tmp_path / "run", "--resume", status=2)
    assert "sentences or features have changed since the run" in error
    path.write_text(before, encoding="utf-8")
    # a store that somebody has renamed
    one, other = sorted((tmp_path / "root/mine/features").iterdir())
    swapped = tmp_path / "swapped"
    one.rename(swapped), other.rename(one), swapped.rename(other)
    error = command(*train, a, "--out", tmp_path / "run2", status=2)
    assert "is not the CLIP that made these features" in error


def test_check_lists_every_problem(tmp_path, capsys):
    root = tmp_path / "data"
    store = data.FeatureStore(root / "mine/features/x", MADE)
    for name in "abcdefg":
        store.write(name, torch.randn(4, 64).half(), torch.randn(2, 64, 4, 4).half(), 8.0)
    store.save_manifest()
    rows = [data.Sample(name, "q", 0, 1, 8.0) for name in "abcdefg"]
    (root / "mine/features/stray").mkdir()                      # not a store: ignored
    data.write_jsonl(root / "mine/train.jsonl", rows)
    assert prepare.check("mine", root) and "7 videos" in capsys.readouterr().out
    np.save(store.path("a", "frames"), np.zeros((5, 64), np.float16))
    np.save(store.path("b", "patches"), np.full((2, 64, 4, 4), np.nan, np.float16))
    store.path("c", "frames").unlink()
    store.path("d", "frames").write_bytes(b"")
    store.manifest["videos"]["e"]["duration_sec"] = 9.0
    del store.manifest["videos"]["f"]
    store.path("g", "patches").unlink()
    store.save_manifest()
    assert not prepare.check(None, root)
    out = capsys.readouterr().out
    for problem in ("a.frames.npy is damaged (float16 (5, 64), not float16 (4, 64))",
                    "b.patches.npy is not",
                    "c.frames.npy is missing", "d.frames.npy is damaged",
                    "e is 9.0 s long, but its",
                    "e: its file is 9.00 s long, but its annotations say 8.00 s",
                    "f.frames.npy is not listed in any manifest",
                    "train: 1 of 7 videos have no features",
                    "train: 1 videos have no patches, for instance g"):
        assert problem in out, (problem, out)
    assert "g" not in [line.split()[0].split(".")[0].strip(":") for line in out.splitlines()[1:]]
    with pytest.raises(Mistake, match="no features in"):
        prepare.check("other", root)


def test_a_manifest_without_frames_or_width_is_damaged(tmp_path):
    store = data.FeatureStore(tmp_path / "mine/features/x", MADE)
    store.write("a", torch.randn(4, 64).half(), None, 8.0)
    store.save_manifest()
    path = store.folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for key in ("frames", "width", "videos"):
        path.write_text(json.dumps({name: content[name] for name in content if name != key}),
                        encoding="utf-8")
        message = f"manifest.json is damaged .KeyError '{key}'.; remove it"
        with pytest.raises(Mistake, match=message):
            prepare.check("mine", tmp_path)


def test_a_folder_cannot_be_overwritten(tmp_path):
    for place in ("/", tmp_path):
        with pytest.raises(Mistake, match=f"{place} is a folder; name a file in it"):
            files.save(place, "text")


def test_two_files_of_the_same_name_are_rejected(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.mp4").touch()
    with pytest.raises(Mistake, match="have the same name, a; remove one of them"):
        files.find_files(tmp_path, video.VIDEOS)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    def fail(file):
        file.write(b"half")
        raise OSError("disk full")
    (tmp_path / "x").write_bytes(b"before")
    with pytest.raises(OSError):
        files.save(tmp_path / "x", fail)
    assert (tmp_path / "x").read_bytes() == b"before" and len(list(tmp_path.iterdir())) == 1


# ------------------------------------------------------------------------------------------ batches

@pytest.fixture(scope="module")
def videos(world):
    store = data.open_store("shapes", "shapes", world)
    return data.Videos(data.read_annotations("shapes", "train", world), store, 16,
                       data.parser_of("shapes", world), patches=True)


def test_a_batch_contains_every_sentence_of_its_videos(videos):
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


def test_spawned_workers_read_the_same(videos):
    """As on macOS and Windows: everything that a worker needs can be pickled."""
    again = pickle.loads(pickle.dumps(videos))
    ours, theirs = (next(iter(v.batches(3))) for v in (videos, again))
    assert torch.equal(ours.frames, theirs.frames) and torch.equal(ours.patches, theirs.patches)


@pytest.mark.parametrize("x", [np.zeros((5, 64), np.float16), np.zeros((32, 64), np.int64),
                               np.array(["text"])])
def test_a_file_of_another_shape_is_reported_by_name(damaged, x):
    path = damaged.store.path(damaged.videos[1], "frames")
    damaged.store.path(damaged.videos[0], "frames").unlink()
    damaged.videos = damaged.videos[1:4]
    np.save(path, x)
    with pytest.raises(data.VideoError, match=rf"{path.name} is damaged .*not float16 \(32, 64\)"):
        list(damaged.batches(2))


@pytest.fixture
def damaged(world, tmp_path):
    """A split whose first video has a damaged file of features."""
    shutil.copytree(world / "shapes" / "features" / "shapes", tmp_path / "f")
    videos = data.Videos(data.read_annotations("shapes", "train", world),
                         data.FeatureStore(tmp_path / "f"), 16, data.parser_of("shapes", world))
    videos.store.path(videos.videos[0], "frames").write_bytes(b"damaged")
    return videos


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_reported_by_name(damaged, workers):
    """Also if a worker process reads it."""
    reason = f"{damaged.videos[0]}.frames.npy is damaged .*remove it and run data.py again"
    with pytest.raises(data.VideoError, match=reason):
        list(damaged.batches(4, workers=workers))


def test_a_process_without_a_share_reports_a_damaged_file(damaged):
    """Under torchrun a process may get no video of a small batch; it then reads the first one, for
    the shapes of its empty tensors."""
    assert isinstance(damaged.collate([]), data.VideoError)


def test_shuffling_is_seeded_and_complete(videos):
    orders = [[name for batch in videos.batches(5, torch.Generator().manual_seed(seed))
               for name in batch.videos]
              for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == sorted(videos.videos)


# -------------------------------------------------------------------------------------- real videos

def test_real_videos(published, world):
    """The right shapes, the same twice; durations as measured by hand."""
    model = clip.load(world / "shapes" / "clip.pt")
    for name, seconds in (("charades.mp4", 30.7), ("arm_wrestling.mp4", 10.0),
                          ("flipping_a_pancake.mkv", 10.33), ("test.avi", 6.6)):
        pixels, duration_sec = video.sample_frames(published / "videos" / name, 32, 32)
        frames, patches = video.encode_frames(model, pixels)
        assert frames.shape == (32, 64) and patches.shape == (32, 64, 4, 4)
        assert torch.isfinite(frames).all() and duration_sec == pytest.approx(seconds, abs=0.15)
        again, _ = video.sample_frames(published / "videos" / name, 32, 32)
        assert torch.equal(frames, video.encode_frames(model, again)[0])
    # one damaged packet: the pictures before and after it are shown
    pixels, duration_sec = video.sample_frames(published / "videos" / "corrupted.mp4", 32, 32)
    assert pixels.shape == (32, 3, 32, 32) and duration_sec == 5.0


def test_preprocessing_agrees_with_pillow_on_real_frames(published):
    """Bicubic resize and centre crop: within 2/255 at every pixel, 0.3/255 on average."""
    from PIL import Image                                       # comes with matplotlib
    for name in ("charades.mp4", "arm_wrestling.mp4", "flipping_a_pancake.mkv", "test.avi"):
        path = published / "videos" / name
        for frame in video.centre_frames(video.inspect(path), 5):
            image = Image.fromarray(frame.permute(1, 2, 0).numpy())
            scale = 224 / min(image.size)
            w, h = (max(224, int(side * scale)) for side in image.size)
            left, top = round((w - 224) / 2), round((h - 224) / 2)
            image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + 224, top + 224))
            expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float()
            difference = (clip.crop(frame[None], 224)[0].float() - expected).abs()
            assert difference.max() <= 2 and difference.mean() <= 0.3


def test_real_videos_by_the_command(published, world, tmp_path):
    """All are extracted, by the command and by the function with larger batches, with the same
    result; what is not a video is listed in failed.txt."""
    names = ("charades", "arm_wrestling", "flipping_a_pancake", "test", "broken")
    (tmp_path / "videos").mkdir()
    for path in (published / "videos").iterdir():
        if path.stem in names:
            (tmp_path / "videos" / path.name).symlink_to(path)
    (tmp_path / "videos" / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(
        {"vid": name, "query": "a person", "relevant_windows": [[0, 5]]}) + "\n" for name in names),
        encoding="utf-8")
    (tmp_path / "shapes").symlink_to(world / "shapes")
    result = subprocess.run(
        [sys.executable, HERE / "data.py", "mine", "--annotations", tmp_path / "a.jsonl",
         "--videos", tmp_path / "videos", "--clip", "shapes", "--root", tmp_path,
         "--device", "cpu"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "the 1 that failed (failed.txt) have 1 sentences" in result.stdout
    store = data.open_store("mine", "shapes", tmp_path)
    assert store.manifest["patch_frames"] == 32 and store.manifest["precision"] == "float32"
    assert re.match("broken\t.*broken.mp4",
                    (store.folder / "failed.txt").read_text(encoding="utf-8"))

    arrays = list(store.folder.glob("*.npy"))
    assert len(arrays) == 8
    for path in arrays:
        assert np.load(path).shape == ((32, 64) if "frames" in path.name else (32, 64, 4, 4))


# ------------------------------------------------------------------- names of datasets and of CLIPs

def test_stores_of_other_names(tmp_path, monkeypatch):
    """A dataset that only ends like a published one has its own store; a folder that only shares a
    name is no CLIP; weights may be on another machine."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "i3d").mkdir()
    root = tmp_path / "data"
    assert data.store_folder("kitchen-cg", "i3d", root) == root / "kitchen-cg/features/i3d"
    assert data.store_folder("charades-cg", "RN50", root) == root / "charades/features/RN50"
    for name in ("/elsewhere/hub-folder", "w/x.ckpt"):
        assert data.store_folder("kitchen", name, root, "0123456789").name == (
            f"{pathlib.Path(name).stem}-01234567")


def test_a_duration_on_one_line_of_a_video(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"vid": "v", "query": "a", "relevant_windows": [[1, 2]], "duration": 10}\n'
        '{"vid": "v", "query": "b", "relevant_windows": [[3, 4]]}\n', encoding="utf-8")
    prepare.adopt("mine", "test", str(tmp_path / "a.jsonl"), {}, str(tmp_path))
    rows = data.read_annotations("mine", "test", tmp_path)
    assert [row.duration_sec for row in rows] == [10.0, 10.0]
    with pytest.raises(Mistake, match="mine has no training sentences"):
        data.training_samples("mine", "val", 0, tmp_path)
