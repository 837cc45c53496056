"""extras/index.py and extras/search.py: search equals brute force, also after changes and
interruptions."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import extras.index
import mmn
import retrieve
from conftest import command
from extras.index import Index, made_with
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
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    assert list(index.update(retriever, folder)) == ["broken.mp4"]
    iou, contrastive = retriever.read(SENTENCES)
    for s, sentence in enumerate(SENTENCES):
        expected = brute_force(retriever, folder, sentence, 5, per_video)
        for block in (7, 100, 1 << 16):
            found = index.search(iou[s], contrastive[s], top_k=5, per_video=per_video, block=block)
            assert [hit.video for hit in found] == [name for name, _ in expected]
            assert torch.allclose(torch.tensor([hit.moment for hit in found]),
                                  torch.tensor([m for _, m in expected]), atol=1e-4)


# unit vectors: of a sentence, and of the direction of all moments
QUERY, AROUND = F.normalize(torch.from_numpy(np.random.default_rng(0).normal(size=(2, 16))).float())


@pytest.fixture
def large(tmp_path):
    """An index of 20 videos with 100 rows each, whose scores for QUERY are nearly equal. Video 7,
    which would be best, has been removed."""
    (tmp_path / "ckpt.pt").write_bytes(b"any file")
    index = Index(tmp_path / "index", made_with(None, tmp_path / "ckpt.pt"))
    rng = np.random.default_rng(3)
    for i in range(20):
        noise = torch.from_numpy(rng.normal(0, 5e-4, (2, 100, len(QUERY)))).float()
        iou, contrastive = F.normalize((QUERY if i == 7 else AROUND) + noise, dim=2)
        spans = torch.from_numpy(np.sort(rng.uniform(0, 30, (100, 2)))).float()
        index.add(f"{i}.mp4", {"duration_sec": 30.0}, [iou, spans, contrastive])
    del index.content["videos"]["7.mp4"]
    index.save()
    return index


def all_answers(index, among, per_video):
    """(score, video, span) by plain loops in float64: the moments of a video, best first, without
    those that overlap a better one by IoU > 0.5, `per_video` at most; then sorted by score."""
    iou, contrastive, spans = (
        np.fromfile(index.folder / name, kind).reshape(2000, -1).astype(float) for name, kind
        in (("iou.f16", "f2"), ("contrastive.f16", "f2"), ("spans.f32", "f4")))
    query, answers = QUERY.double().numpy(), []
    scores = (0.5 * contrastive @ query + 0.5) ** 0.5 / (1 + np.exp(-10 * iou @ query))
    for name in among:
        first, kept = index.content["videos"][name]["first"], []
        for k in first + np.argsort(-scores[first:first + 100]):
            overlaps = [(min(spans[k][1], end) - max(spans[k][0], start))
                        / (max(spans[k][1], end) - min(spans[k][0], start))
                        for start, end in spans[kept]]
            if len(kept) < per_video and all(overlap <= 0.5 for overlap in overlaps):
                kept.append(k)
        answers += [(scores[k], name, tuple(spans[k])) for k in kept]
    return sorted(answers, reverse=True)


@pytest.mark.parametrize("top_k, per_video, among", [
    (1, 1, None), (10, 3, None), (30, 1, None), (40, 5, None), (10, 10, {"3.mp4", "12.mp4"}),
    (5, 1, {"0.mp4"}), (5, 3, set())])
def test_search_is_exact_when_many_scores_are_nearly_equal(large, monkeypatch, top_k, per_video,
                                                           among):
    """1,900 scores within 0.005: far more than 128 moments could be among the answers for all that
    float16 can tell, so that search has to score more and more of them again."""
    scored, nms = [], retrieve.greedy_nms
    monkeypatch.setattr(extras.index, "greedy_nms",
                        lambda spans, *rest: scored.append(len(spans)) or nms(spans, *rest))
    names = large.content["videos"] if among is None else among
    expected = all_answers(large, names, per_video)
    gaps = -np.diff([score for score, *_ in expected[:top_k + 1]])
    assert (gaps > 2e-7).all()                          # float32 cannot confuse their order
    actual = large.search(QUERY, QUERY, top_k, per_video, 300, among)
    assert [(hit.video, tuple(hit.moment[:2])) for hit in actual] == [
        answer[1:] for answer in expected[:top_k]]
    assert [hit.moment.score for hit in actual] == pytest.approx(
        [score for score, *_ in expected[:top_k]], abs=1e-6)
    if among is None:
        assert scored[:3] == [128, 256, 512]


def test_a_search_among_few_videos_reads_only_their_rows(large, monkeypatch):
    """Which is what `extras.search --videos` is for: less to read."""
    read, mv = [], torch.mv
    monkeypatch.setattr(torch, "mv", lambda x, y: read.append(len(x)) or mv(x, y))
    large.search(QUERY, QUERY, among={"3.mp4", "4.mp4", "12.mp4"})
    assert sum(read) == 2 * 300


def test_an_update_reads_only_what_changed(retriever, checkpoint, folder, videos, tmp_path,
                                           capsys):
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    index.update(retriever, folder)
    read = []
    encode = retriever.encode
    retriever.encode = lambda path: read.append(path.name) or encode(path)
    try:
        (folder / "0.mp4").unlink()
        shutil.copy(videos / "test-0005.mp4", folder / "1.mp4")
        shutil.copy(videos / "test-0006.mp4", folder / "9.mp4")
        again = Index(tmp_path / "index", made_with(retriever, checkpoint))
        again.update(retriever, folder)
    finally:
        del retriever.encode
    assert read == ["1.mp4", "9.mp4", "broken.mp4"]
    out = capsys.readouterr().out
    assert "removed: 0.mp4" in out and "changed: 1.mp4" in out
    iou, contrastive = retriever.read(SENTENCES)
    found = again.search(iou[0], contrastive[0], top_k=6, per_video=2)
    expected = brute_force(retriever, folder, SENTENCES[0], 6, 2)
    assert [hit.video for hit in found] == [name for name, _ in expected]


def test_an_interrupted_addition_leaves_no_trace(retriever, checkpoint, folder, tmp_path,
                                                 monkeypatch):
    """The disk is full after the second video's vectors have been written: the index is as before,
    and the next update completes it."""
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    save, calls = Index.save, []

    def full(self):
        calls.append(1)
        if len(calls) == 3:                                     # at the start, 0.mp4, 1.mp4
            raise OSError("no space left on device")
        save(self)

    monkeypatch.setattr(Index, "save", full)
    with pytest.raises(OSError):
        index.update(retriever, folder)
    monkeypatch.setattr(Index, "save", save)
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    assert list(index.content["videos"]) == ["0.mp4"]
    index.update(retriever, folder)
    iou, contrastive = retriever.read(SENTENCES)
    assert [hit.video for hit in index.search(iou[0], contrastive[0])] == [
        name for name, _ in brute_force(retriever, folder, SENTENCES[0], 10, 3)]


def test_an_interruption_after_a_removal_keeps_the_others(retriever, checkpoint, folder, videos,
                                                          tmp_path, monkeypatch):
    """The last video was removed, another one overwrites its rows, and the disk is full: nothing is
    found under the name of the removed one."""
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    index.update(retriever, folder)
    (folder / "2.mp4").unlink()
    shutil.copy(videos / "test-0007.mp4", folder / "7.mp4")
    monkeypatch.setattr(Index, "add", lambda self, *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        index.update(retriever, folder)
    assert list(Index(tmp_path / "index").content["videos"]) == ["0.mp4", "1.mp4"]


def test_an_empty_folder_does_not_empty_the_index(retriever, checkpoint, folder, tmp_path):
    index = Index(tmp_path / "index", made_with(retriever, checkpoint))
    index.update(retriever, folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="contains no video; .* check that its disk is mounted"):
        index.update(retriever, tmp_path / "empty")
    assert len(Index(tmp_path / "index").content["videos"]) == 3


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
