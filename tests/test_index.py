"""extras/index.py and extras/search.py: search equals brute force; whatever happens to the videos
or to an update, no rows are another video's."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import filelock
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import extras.index
import extras.search
import mmn
import retrieve
from conftest import command
from extras.index import Index, update_index
from extras.search import search, search_moments
from support.errors import Mistake
from test_retrieve import HERE, SENTENCES, checkpoint, retriever, videos   # noqa: F401

INDEX, SEARCH = ("-m", "extras.index"), ("-m", "extras.search")


@pytest.fixture
def folder(videos, tmp_path):
    """Three good videos and a broken one."""
    target = tmp_path / "folder"
    target.mkdir()
    for i in range(3):
        shutil.copy(videos / f"test-000{i}.mp4", target / f"{i}.mp4")
    (target / "broken.mp4").write_bytes((target / "0.mp4").read_bytes()[:3000])
    return target


def brute_force(retriever, folder, sentence, top_k, per_video):
    """Scores every moment of every video, with its vectors rounded as in the index, and applies NMS
    to each video."""
    answers, (iou_text, contrastive_text) = [], retriever.read([sentence])
    for path in sorted(folder.glob("[0-9]*.mp4")):
        spans, iou, contrastive = retriever.moments(retriever.encode(path))
        scores = mmn.fuse(torch.sigmoid(10 * iou.half().float() @ iou_text[0]),
                          contrastive.half().float() @ contrastive_text[0])
        answers += [(path.name, retrieve.Moment(*spans[k].tolist(), scores[k].item()))
                    for k in retrieve.greedy_nms(spans, scores, per_video)]
    return sorted(answers, key=lambda answer: -answer[1].score)[:top_k]


@pytest.mark.parametrize("per_video", [1, 3])
def test_search_is_exact(retriever, checkpoint, folder, tmp_path, per_video):
    index, failed = update_index(retriever, checkpoint, folder, tmp_path / "index")
    assert list(failed) == ["broken.mp4"]
    iou, contrastive = retriever.read(SENTENCES)
    for s, sentence in enumerate(SENTENCES):
        expected = brute_force(retriever, folder, sentence, 5, per_video)
        found = search_moments(index, iou[s], contrastive[s], 5, per_video)
        assert [hit.video for hit in found] == [name for name, _ in expected]
        assert torch.allclose(torch.tensor([hit.moment for hit in found]),
                              torch.tensor([m for _, m in expected]), atol=1e-4)


# unit vectors: of a sentence, and of the direction of all moments
QUERY, AROUND = F.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(2, 16))).float())


def made(sha256="0"):
    return {"kind": "candidate moments", "checkpoint": "ckpt.pt", "sha256": sha256}


@pytest.fixture
def large(tmp_path):
    """An index of 19 videos with 100 rows each, whose scores for QUERY are nearly equal. Video 7,
    which would be best, has been removed."""
    index = Index(tmp_path / "index", made())
    rng = np.random.default_rng(3)
    for i in range(20):
        noise = torch.from_numpy(rng.normal(0, 5e-4, (2, 100, len(QUERY)))).float()
        iou, contrastive = F.normalize((QUERY if i == 7 else AROUND) + noise, dim=2).half()
        spans = torch.from_numpy(np.sort(rng.uniform(0, 30, (100, 2)))).float()
        index.add(f"{i}.mp4", pathlib.Path(f"{i}.mp4"), [0, 0],
                  {"iou": iou, "spans": spans, "contrastive": contrastive}, {})
    del index.entries["7.mp4"]
    index.save()
    return index


def all_answers(index, per_video):
    """(score, video, span) by plain loops in float64: the moments of a video, best first, without
    those that overlap a better one by IoU > 0.5, `per_video` at most; then sorted by score."""
    arrays, slices = index.load()
    iou, contrastive, spans = (arrays[name].double().numpy()
                               for name in ("iou", "contrastive", "spans"))
    query, answers = QUERY.double().numpy(), []
    scores = (0.5 * contrastive @ query + 0.5) ** 0.5 / (1 + np.exp(-10 * iou @ query))
    for name in index.entries:
        first, kept = slices[name].start, []
        for k in first + np.argsort(-scores[first:first + 100]):
            overlaps = [(min(spans[k][1], end) - max(spans[k][0], start))
                        / (max(spans[k][1], end) - min(spans[k][0], start))
                        for start, end in spans[kept]]
            if len(kept) < per_video and all(overlap <= 0.5 for overlap in overlaps):
                kept.append(k)
        answers += [(scores[k], name, tuple(spans[k])) for k in kept]
    return sorted(answers, reverse=True)


@pytest.mark.parametrize("top_k, per_video", [(1, 1), (10, 3), (30, 1), (40, 5)])
def test_search_is_exact_when_many_scores_are_nearly_equal(large, monkeypatch, top_k, per_video):
    """1,900 scores within 0.005, which float16 could not order; the 128 best of them are of so few
    videos that search has to look at more."""
    scored, nms = [], retrieve.greedy_nms
    monkeypatch.setattr(extras.search, "greedy_nms",
                        lambda spans, *rest: scored.append(len(spans)) or nms(spans, *rest))
    expected = all_answers(large, per_video)
    gaps = -np.diff([score for score, *_ in expected[:top_k + 1]])
    assert (gaps > 2e-7).all()                          # float32 cannot confuse their order
    actual = search_moments(large, QUERY, QUERY, top_k, per_video)
    assert [(hit.video, tuple(hit.moment[:2])) for hit in actual] == [
        answer[1:] for answer in expected[:top_k]]
    assert [hit.moment.score for hit in actual] == pytest.approx(
        [score for score, *_ in expected[:top_k]], abs=1e-6)
    if top_k == 30:
        assert scored[:2] == [128, 256]


def test_cosines_of_several_blocks():
    x = F.normalize(torch.randn(9000, 16, generator=torch.Generator().manual_seed(0)), dim=1).half()
    assert torch.allclose(extras.search.cosines(x, QUERY), x.float() @ QUERY, atol=1e-6)


def test_an_update_of_real_videos(retriever, checkpoint, folder, videos, tmp_path, capsys):
    update_index(retriever, checkpoint, folder, tmp_path / "index")
    (folder / "0.mp4").unlink()
    shutil.copy(videos / "test-0005.mp4", folder / "1.mp4")
    shutil.copy(videos / "test-0006.mp4", folder / "9.mp4")
    again, failed = update_index(retriever, checkpoint, folder, tmp_path / "index")
    assert list(failed) == ["broken.mp4"]
    text = capsys.readouterr()
    assert "removed: 0.mp4" in text.out and "changed: 1.mp4" in text.out + text.err
    found = search(again, retriever, SENTENCES, 6, 2)
    for sentence, hits in zip(SENTENCES, found):
        expected = brute_force(retriever, folder, sentence, 6, 2)
        assert [hit.video for hit in hits] == [name for name, _ in expected]


# ----------------------------------------------------------------------- updates of small "videos"

def encode(path):
    """The content of a file as its only row, which tells whose rows they are."""
    content = path.read_bytes()
    if content == b"bad":
        raise MemoryError
    return {"frames": torch.tensor([list(content[:4].ljust(4))])}, {"duration_sec": 1.0}


@pytest.fixture
def small(tmp_path):
    """A folder of four files that are named like videos."""
    for name in ("a.mp4", "b.mp4", "below/c.mp4", "below/d.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name[-5:].encode())
    return tmp_path / "videos"


def contents(index):
    """Name -> its row, as text."""
    arrays, slices = Index(index.folder).load()
    return {name: bytes(arrays["frames"][rows][0].tolist()).decode()
            for name, rows in slices.items()}


ALL = {"a.mp4": "a.mp", "b.mp4": "b.mp", "below/c.mp4": "c.mp", "below/d.mp4": "d.mp"}


def test_only_what_changed_is_read(small, tmp_path):
    index = Index(tmp_path / "index", made())
    assert index.update(small, encode) == {} and contents(index) == ALL
    read = []
    (small / "a.mp4").unlink()
    (small / "b.mp4").write_bytes(b"another")
    (small / "e.mp4").write_bytes(b"new!")
    index = Index(tmp_path / "index", made())
    index.update(small, lambda path: read.append(path.name) or encode(path))
    assert sorted(read) == ["b.mp4", "e.mp4"]           # by threads, in any order
    assert contents(index) == {"b.mp4": "anot", "e.mp4": "new!", "below/c.mp4": "c.mp",
                               "below/d.mp4": "d.mp"}
    # what the last update replaced is removed by the next
    index.update(small, encode)
    assert len(list(index.vectors.iterdir())) == 4


def test_a_bad_video_ends_nothing_and_forgets_nothing(small, tmp_path):
    """Out of memory, deleted, and replaced while it is read: the others are indexed, and of each
    the vectors of its earlier content are kept."""
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    (small / "a.mp4").write_bytes(b"bad")
    for name in ("b", "below/c", "below/d"):
        (small / f"{name}.mp4").write_bytes(b"new " + name[-1:].encode())

    def read(path):
        if path.name == "b.mp4":
            path.unlink()
        if path.name == "c.mp4":
            path.write_bytes(b"replaced")
        return encode(path)

    failed = index.update(small, read)
    assert failed.keys() == {"a.mp4", "b.mp4", "below/c.mp4"}
    assert failed["a.mp4"] == "MemoryError" and "was replaced" in failed["below/c.mp4"]
    assert contents(index) == ALL | {"below/d.mp4": "new "}
    # the next update sees what has become of them
    assert list(index.update(small, encode)) == ["a.mp4"]
    assert contents(index) == {"a.mp4": "a.mp", "below/c.mp4": "repl", "below/d.mp4": "new "}


def test_when_no_video_can_be_read(tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"bad")
    with pytest.raises(Mistake, match="no video in .* could be read: MemoryError"):
        Index(tmp_path / "index", made()).update(tmp_path / "videos", encode)


def test_a_folder_that_cannot_be_read_now_is_not_forgotten(small, tmp_path, capsys):
    """Empty, like the place of a disk that is not mounted; a link to nowhere; and closed. Only a
    folder that is gone, or that has lost one of its files, has been changed by its owner."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "e.mp4").write_bytes(b"e.mp4")
    (small / "link").symlink_to(tmp_path / "disk")
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    everything = ALL | {"link/e.mp4": "e.mp"}
    assert contents(index) == everything
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    (small / "below").rename(tmp_path / "mounted")
    (small / "below").mkdir()
    failed = index.update(small, encode)
    assert failed.keys() == {"below/c.mp4", "below/d.mp4", "link/e.mp4"}
    assert contents(index) == everything
    assert "its folder is closed or empty" in capsys.readouterr().out
    (small / "below").rmdir()
    (tmp_path / "mounted").rename(small / "below")
    if os.geteuid():                                    # nothing is closed to root
        for mode in (0, 0o600):                         # not even listed; or listed, but closed
            (small / "below").chmod(mode)
            assert "link/e.mp4" in index.update(small, encode)
            assert contents(index) == everything and not index.is_current("below/c.mp4")
        (small / "below").chmod(0o700)
    (small / "below" / "c.mp4").unlink()
    (small / "link").unlink()
    assert index.update(small, encode) == {}
    assert contents(index) == {name: ALL[name] for name in ("a.mp4", "b.mp4", "below/d.mp4")}


def test_an_update_sees_what_is_there_when_its_turn_comes(small, tmp_path):
    """A video that is added while it waits for another update is not taken for a deleted one."""
    index = Index(tmp_path / "index", made())
    listed = extras.index.videos_in

    def one_more(folder):
        (small / "new.mp4").write_bytes(b"new!")
        assert list(tmp_path.glob("index/.lock"))       # the lock is held already
        return listed(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extras.index, "videos_in", one_more)
        index.update(small, encode)
    assert contents(index) == ALL | {"new.mp4": "new!"}


def test_links_are_followed_once_and_names_are_normalised(small, tmp_path):
    (small / "0 link").symlink_to(small / "below")      # sorted first, but below goes by its name
    (small / "below" / "up").symlink_to(small)
    (small / "caf\u0065\u0301.mp4").write_bytes(b"nfd!")
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    assert index.entries.keys() == ALL.keys() | {"caf\u00e9.mp4"}
    assert index.path_of("caf\u00e9.mp4").read_bytes() == b"nfd!"
    (small / "caf\u00e9.mp4").write_bytes(b"both")      # beside the other, not instead of it
    index.update(small, encode)
    assert contents(index) == ALL | {"caf\u00e9.mp4": "both", "caf\u0065\u0301.mp4": "nfd!"}


def test_the_wrong_folder_empties_nothing(small, tmp_path):
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="contains no video; .* check that its disk is mounted"):
        index.update(tmp_path / "empty", encode)
    (tmp_path / "empty" / "x.mp4").write_bytes(b"x")
    with pytest.raises(Mistake, match="contains none of the 4 videos of this index"):
        index.update(tmp_path / "empty", encode)
    with pytest.raises(Mistake, match="made with another checkpoint"):
        Index(tmp_path / "index", made("1"))
    assert contents(index) == ALL
    small.rename(tmp_path / "moved")                    # the same videos in another place
    index.update(tmp_path / "moved", lambda path: 1 / 0)
    assert contents(index) == ALL


def test_an_interrupted_update_keeps_what_is_finished(small, tmp_path, monkeypatch):
    """The disk is full at the third video."""
    index = Index(tmp_path / "index", made())
    written, save = [], extras.index.files.save_arrays

    def full(path, arrays):
        written.append(path)
        if len(written) == 3:
            raise OSError("no space left on device")
        save(path, arrays)

    monkeypatch.setattr(extras.index.files, "save_arrays", full)
    with pytest.raises(OSError):
        index.update(small, encode)
    assert contents(index) == {"a.mp4": "a.mp", "b.mp4": "b.mp"}
    index.update(small, encode)
    assert contents(index) == ALL


def test_the_table_is_not_written_for_every_video(small, tmp_path, monkeypatch):
    """The table of 3,000 videos takes longer to write than the vectors of one."""
    for i in range(200):
        (small / f"{i}.mp4").write_bytes(b"%4d" % i)
    index, saves = Index(tmp_path / "index", made()), []
    monkeypatch.setattr(index, "save", lambda: saves.append(1) or Index.save(index))
    index.update(small, encode)
    assert len(contents(index)) == 204 and len(saves) <= 2


def test_a_reader_keeps_what_it_has_read(small, tmp_path):
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    reader, late = Index(tmp_path / "index"), Index(tmp_path / "index")
    before = reader.load()[0]["frames"].clone()
    (small / "a.mp4").write_bytes(b"changed")
    index.update(small, encode)
    assert torch.equal(reader.load()[0]["frames"], before) and reader.is_outdated()
    assert torch.equal(late.load()[0]["frames"], before)        # its files are still there
    assert not Index(tmp_path / "index").is_outdated()


def test_damaged_vectors(small, tmp_path):
    index = Index(tmp_path / "index", made())
    index.update(small, encode)
    path = index.vectors / index.entries["a.mp4"].file
    content = bytearray(path.read_bytes())
    content[content.index(b"a.mp"[:1])] ^= 1
    for damaged in (bytes(content), content[:50], b""):
        path.write_bytes(damaged)
        with pytest.raises(Mistake, match="is damaged .* remove it and rerun"):
            Index(tmp_path / "index").load()
    path.unlink()
    index.update(small, encode)
    assert contents(index) == ALL


def test_two_updates_at_once(retriever, checkpoint, folder, tmp_path):
    """The second waits, and says so; the rows are those of each video."""
    (tmp_path / "index").mkdir()
    arguments = [sys.executable, *INDEX, checkpoint, folder, "--out", tmp_path / "index",
                 "--device", "cpu"]
    with filelock.FileLock(tmp_path / "index" / ".lock"):
        both = [subprocess.Popen(arguments, cwd=HERE, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE, text=True) for _ in range(2)]
        for process in both:
            assert "waiting for another update" in process.stderr.readline()
    for process in both:
        text, error = process.communicate()
        assert process.returncode == 0 and "3 videos" in text, error
    found = search(Index(tmp_path / "index"), retriever, SENTENCES[:1], 10, 3)[0]
    assert [hit.video for hit in found] == [
        name for name, _ in brute_force(retriever, folder, SENTENCES[0], 10, 3)]


def test_index_commands(checkpoint, folder, tmp_path):
    first = shutil.copy(checkpoint, tmp_path / "first.pt")
    text = command(*INDEX, first, folder, "--out", tmp_path / "index")
    assert "failed: broken.mp4" in text
    assert "3 videos, 1.6 minutes of video, 408 candidate moments" in text
    first.unlink()                              # the run has been moved: the index names the place
    assert "was removed or changed" in command(*SEARCH, tmp_path / "index", "a", status=2)
    command(*INDEX, checkpoint, folder, "--out", tmp_path / "index")
    text = command(*SEARCH, tmp_path / "index", *SENTENCES, "--top", 4)
    assert text.count("score  video") == 2 and ".mp4" in text
    assert text.endswith("3 videos, 1.6 minutes of video, 408 candidate moments; scores are for "
                         "ranking only, not probabilities\n")
    answer = json.loads(command(*SEARCH, tmp_path / "index", SENTENCES[0], "--top", 4, "--json"))
    assert len(answer[0]["moments"]) == 4 and answer[0]["moments"][0]["video"].endswith(".mp4")
    (folder / answer[0]["moments"][0]["video"]).unlink()
    done = subprocess.run([sys.executable, *SEARCH, tmp_path / "index", SENTENCES[0]], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 0 and "was removed or changed since it was indexed" in done.stderr
    other = tmp_path / "other.pt"
    saved = torch.load(checkpoint, weights_only=True)
    torch.save(saved | {"epoch": 99}, other)
    assert "made with another checkpoint" in command(*INDEX, other, folder, "--out",
                                                     tmp_path / "index", status=2)
    assert "is not an index" in command(*SEARCH, tmp_path, "a", status=2)
