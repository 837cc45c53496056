"""Moments by CLIP alone: the scores against plain loops, the exact search, the index and its
server, and what "nothing found" means."""
import contextlib
import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse

import pytest
import torch
import torch.nn.functional as F

import clip
import evaluate
import mmn
import retrieve
import video
from extras import search as search_command
from extras import serve, show, zero_shot
from extras.index import Index, made_with, update_index
from support import untrained
from support.errors import Mistake
from conftest import command
from test_retrieve import HERE, Browser, checkpoint, run, videos        # noqa: F401


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def plain(similarity, start, end):
    """The score of frames [start, end), by the words of its definition."""
    values = [float(s) for s in similarity]
    inside, outside = values[start:end], values[:start] + values[end:]
    if not inside or not outside:
        return -math.inf
    phi = sum(inside) / len(inside) - sum(outside) / len(outside)
    return phi * (len(inside) * len(outside) / len(values)) ** 0.5


@pytest.mark.parametrize("T, N", [(8, 4), (10, 4), (4, 4), (7, 3)])
def test_scores_are_the_contrast_of_each_moment(T, N):
    frames, text = unit(T, 6), unit(3, 6, seed=1)
    scores = retrieve.zero_shot_scores(frames, text, N)
    edges = [round(i * T / N) for i in range(N + 1)]
    for s in range(3):
        similarity = (frames @ text[s]).tolist()
        for i in range(N):
            for j in range(N):
                expected = plain(similarity, edges[i], edges[j + 1]) if j >= i else -math.inf
                assert scores[s, i, j] == pytest.approx(expected, abs=1e-5)
    assert scores[0, 0, N - 1] == -math.inf             # the whole video has no outside


def test_contrast_by_hand():
    """Cosines 0.3, 0.3, 0.1, 0.1: the first half has phi = 0.2, and 0.2 * sqrt(2 * 2 / 4) = 0.2;
    the first frame alone phi = 0.3 - 0.5 / 3 = 0.1333, times sqrt(1 * 3 / 4) = 0.1155."""
    text = torch.tensor([[1.0, 0.0]])
    frames = torch.tensor([[c, math.sqrt(1 - c * c)] for c in (0.3, 0.3, 0.1, 0.1)])
    scores = retrieve.zero_shot_scores(frames, text, 4)[0]
    assert scores[0, 1] == pytest.approx(0.2, abs=1e-6)
    assert scores[0, 0] == pytest.approx(0.1155, abs=1e-4)


def test_too_few_frames_are_an_error():
    with pytest.raises(ValueError, match="3 frames cannot be divided into 4 clips"):
        retrieve.zero_shot_scores(unit(3, 5), unit(1, 5), 4)


def brute_force(similarity, shortest, longest, top_k):
    """Greedy NMS over all intervals by plain loops."""
    n = len(similarity)
    spans = [(a, b) for a in range(n) for b in range(a + 1, n + 1)
             if shortest <= b - a <= longest and b - a < n]
    left = sorted(((plain(similarity, a, b), a, b) for a, b in spans), reverse=True)
    kept = []
    for score, a, b in left:
        if len(kept) < top_k and all((min(b, d) - max(a, c)) / (max(b, d) - min(a, c)) <= 0.5
                                     for _, c, d in kept):
            kept.append((score, a, b))
    return kept


@pytest.mark.parametrize("block", [1, 50, 1 << 22])
@pytest.mark.parametrize("shortest, longest", [(1, 20), (3, 7), (1, 1), (5, 100)])
def test_the_search_is_exact(shortest, longest, block):
    """In one block, and in many."""
    similarity = torch.rand(2, 20, generator=torch.Generator().manual_seed(2))
    found = retrieve.search_intervals(similarity, shortest, longest, 4, block)
    for row, best in zip(similarity, found):
        expected = brute_force(row.tolist(), shortest, longest, 4)
        actual = [moment for moment in best.tolist() if moment[2] > -math.inf]
        assert [(a, b) for a, b, _ in actual] == [(a, b) for _, a, b in expected]
        assert [m[2] for m in actual] == pytest.approx([score for score, *_ in expected])


@pytest.mark.parametrize("shortest, longest", [(1, 11), (3, 6), (2, 2)])
def test_the_best_score_at_each_frame(shortest, longest):
    similarity = torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    best = retrieve.best_at(similarity, shortest, longest)
    for row, values in zip(similarity, best):
        for t in range(12):
            expected = max((plain(row, a, b) for a in range(t + 1) for b in range(t + 1, 13)
                            if shortest <= b - a <= longest), default=-math.inf)
            assert values[t] == pytest.approx(expected)


@pytest.mark.parametrize("frames, half", [(12, 1), (40, 3), (4, 7)])
def test_cosines_are_averaged_over_seconds(frames, half):
    """Frames every half second: `half` frames on either side, fewer towards both ends, and at most
    an eighth of the video."""
    x = unit(2, frames)
    smooth = untrained.smoothed(x, 0.5, half + 0.2)
    half = min(half, frames // 8)
    for i in range(frames):
        near = x[:, max(0, i - half):i + half + 1]
        assert torch.allclose(smooth[:, i], near.mean(1), atol=1e-6)
    assert torch.equal(untrained.smoothed(x, 0.5, 0.0), x)
    both = untrained.smoothed(x, torch.tensor([0.5, 1e9]), half + 0.2)     # a rate for each row
    assert torch.equal(both[0], smooth[0]) and torch.allclose(both[1], x[1], atol=1e-6)


@pytest.mark.parametrize("seconds", [4, 6, 8, 10, 14, 30])
def test_an_event_in_the_middle_is_found_after_smoothing(seconds):
    """Two frames per second; the event covers the middle quarter. The answer overlaps it, and is
    not at an end of the video, where fewer frames are averaged."""
    frames = 2 * seconds
    similarity = torch.zeros(1, frames)
    first, last = frames * 3 // 8, frames * 5 // 8 + 1
    similarity[:, first:last] = 1
    smooth = untrained.smoothed(similarity, 0.5, untrained.SMOOTH_SEC)
    start, end, _ = retrieve.search_intervals(smooth, 2, frames // 2)[0, 0].tolist()
    assert mmn.interval_iou(torch.tensor([start, end]), torch.tensor([first, last])) >= 0.5


def test_more_moments_are_wanted_than_there_are():
    found = retrieve.search_intervals(torch.rand(1, 20), 1, 10, 100_000)
    assert found.shape == (1, 100_000, 3) and found[0, -1, 2] == -math.inf


def test_a_planted_moment_is_found():
    """Frames 30 to 44 of 200 point to the sentence; the others are noise."""
    text = unit(1, 32)
    frames = unit(200, 32, seed=1)
    frames[30:45] = F.normalize(frames[30:45] + text, dim=1)
    start, end, _ = retrieve.search_intervals(text @ frames.T, 1, 100)[0, 0].tolist()
    assert abs(start - 30) <= 1 and abs(end - 45) <= 1


# ----------------------------------------------------------------------------------- the evaluation

def test_the_evaluation_uses_the_same_scores(world):
    run = zero_shot.run_of("shapes", "shapes", str(world), torch.device("cpu"))
    frames, text, video_of = unit(2, 32, 64), unit(3, 64, seed=1), torch.tensor([1, 0, 1])
    scores = run.retriever.scores(frames, text, video_of)
    for s, row in enumerate(video_of):
        expected = retrieve.zero_shot_scores(frames[row], text[s:s + 1], 16)[0]
        inside = run.retriever.candidates
        assert torch.allclose(scores[s][inside], expected[inside]) and not scores[s][~inside].any()
    lengths = [int(j - i + 1) for i, j in run.retriever.candidates.nonzero()]
    assert max(lengths) == 8 and len(lengths) == sum(16 - i for i in range(8))


def test_the_row_of_the_evaluation(world, capsys, monkeypatch):
    """The command prints what evaluate.py computes of this run."""
    monkeypatch.setattr(sys, "argv", ["extras/zero_shot.py", "--dataset", "shapes", "--clip",
                                      "shapes", "--root", str(world), "--device", "cpu"])
    zero_shot.main()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == ("dataset shapes, method zero-shot, seed 0, query full, epoch 0, "
                     "parser by construction")
    run = zero_shot.run_of("shapes", "shapes", str(world), torch.device("cpu"))
    results = evaluate.evaluate(run)
    assert lines == evaluate.table(results).splitlines()
    assert results["test"]["queries"] == 24 and "train" not in results


def test_the_fusion_by_hand():
    """Three moments: z = (-1, 0, 1) and, with -inf as the lowest, (0.577, 0.577, -1.155)."""
    trained = torch.tensor([[0.1, 0.2, 0.3]])
    alone = torch.tensor([[4.0, 4.0, float("-inf")]])
    fused = untrained.fuse_with_clip(trained, alone, 0.0)
    assert torch.allclose(fused, torch.tensor([[-1.0, 0, 1]]))
    alone = torch.tensor([[5.0, 4.0, float("-inf")]])
    z = torch.tensor([[2.0, -1, -1]]) / 3 ** 0.5
    fused = untrained.fuse_with_clip(trained, alone, 0.5)
    assert torch.allclose(fused, torch.tensor([[-1.0, 0, 1]]) + 0.5 * z)
    assert untrained.standardised(torch.zeros(1, 4)).tolist() == [[0.0] * 4]


def test_a_checkpoint_fused_with_its_clip(world, checkpoint, videos, tmp_path):     # noqa: F811
    """By evaluate.py and by retrieve.py, with the weight of the checkpoint."""
    trained = evaluate.load(checkpoint)
    assert trained.checkpoint["clip_weight"] in evaluate.CLIP_WEIGHTS
    [(_, samples, before)] = evaluate.answers(trained, ["test"], root=str(world))
    evaluate.add_clip(trained, str(world), "cpu")
    cells = trained.retriever.candidates
    [batch] = samples.batches(100)
    with torch.no_grad():
        x = F.normalize(trained.text.encode_text(batch.tokens[0]), dim=1)
        ours = trained.retriever.scores(batch.frames, x, batch.video_of)[:, cells]
        x = F.normalize(trained.frozen.encode_text(batch.tokens[0]), dim=1)
    alone = torch.stack([retrieve.zero_shot_scores(batch.frames[video], q[None], 16)[0]
                         for q, video in zip(x, batch.video_of)])[:, cells]
    for weight in (0.0, 0.5):
        trained.checkpoint["clip_weight"] = weight
        [(_, _, after)] = evaluate.answers(trained, ["test"], root=str(world))
        best = untrained.fuse_with_clip(ours, alone, weight).amax(1)
        assert torch.allclose(after[:, 0, 2], best, atol=1e-4)
        assert bool((after[:, 0, :2] == before[:, 0, :2]).all()) == (weight == 0)
    one = retrieve.Retriever(checkpoint, "cpu", cache=None)
    both = retrieve.Retriever(checkpoint, "cpu", cache=None, fuse_clip=True)
    encoded = one.encode(videos / "test-0000.mp4")
    sentences = ["the green circle blinks", "the maroon heart rises"]
    spans, scores = one.scores(encoded, sentences)
    x = F.normalize(both.image_tower.encode_text(clip.tokenize(sentences)), dim=1)
    alone = untrained.contrast_map(x @ encoded.frames.T, 16)
    alone = one.run.retriever.at_candidates(alone)
    both.run.checkpoint["clip_weight"] = 0.5
    expected = untrained.fuse_with_clip(scores, alone, 0.5)
    assert torch.allclose(both.fused(encoded, sentences, scores), expected, atol=1e-4)
    # the order is that of the sum; the score that is shown is the checkpoint's, and so is z
    for row, shown, moments in zip(expected, scores, both.predict(encoded, sentences, 3)):
        assert moments[0].score == pytest.approx(float(shown[row.argmax()]), abs=1e-5)
    assert torch.allclose(both.generic_best(encoded), one.generic_best(encoded))
    text = run(checkpoint, videos / "test-0000.mp4", *sentences, "--fuse-clip", "--cache", "")
    assert text.count("for ranking only") == 2
    run(videos / "test-0000.mp4", *sentences, "--fuse-clip", "--cache", "", status=2)
    text = command("evaluate.py", checkpoint, "--fuse-clip", "--split", "test", "--root", world)
    assert f"weight of CLIP alone {one.run.checkpoint['clip_weight']}" in text
    old = torch.load(checkpoint, weights_only=True)
    del old["clip_weight"]
    torch.save(old, tmp_path / "old.pt")
    for program in ("evaluate.py", "retrieve.py"):
        inputs = ["--root", world]
        if program == "retrieve.py":
            inputs = [videos / "test-0000.mp4", "a", "--cache", ""]
        error = command(program, tmp_path / "old.pt", *inputs, "--fuse-clip", status=2)
        assert "no weight for CLIP alone" in error
    elsewhere = command("evaluate.py", checkpoint, "--fuse-clip", "--root", tmp_path, status=2)
    assert "--root" in elsewhere


# ------------------------------------------------------------------------------------- a video file

@pytest.fixture(scope="module")
def retriever(world, tmp_path_factory):                                 # noqa: F811
    """CLIP alone, with the world's small CLIP."""
    return retrieve.ZeroShot("shapes", "cpu", cache=tmp_path_factory.mktemp("cache"),
                             root=str(world), smooth_sec=2.0)


def test_any_length_and_both_limits(retriever, videos):                 # noqa: F811
    encoded = retriever.encode(videos / "test-0000.mp4")
    assert len(encoded.frames) == round(encoded.duration_sec * 2)
    moments = retriever.predict(encoded, "the red circle rises")
    assert len(moments) == 5 and moments == sorted(moments, key=lambda m: -m.score)
    for m in moments:
        assert 0 <= m.start_sec < m.end_sec <= encoded.duration_sec + 1e-6
        assert 0.9 < m.end_sec - m.start_sec <= encoded.duration_sec / 2 + 1e-6
    curve = retriever.curve(encoded, ["the red circle rises"])[0]
    assert float(curve.max()) == pytest.approx(moments[0].score)


def test_nothing_found(retriever, videos, monkeypatch):                 # noqa: F811
    """z is the best score in units of those of the generic sentences; a generic sentence that is
    the best of them all is found, and the worst is not."""
    encoded = retriever.encode(videos / "test-0001.mp4")
    generic = retriever.generic_best(encoded)
    assert len(generic) == len(retriever.generic) == 40
    best, worst = int(generic.argmax()), int(generic.argmin())
    sentences = [retriever.generic[best], retriever.generic[worst]]
    answers = retrieve.answers_of(retriever, encoded, sentences)
    for answer, k in zip(answers, (best, worst)):
        z = (generic[k] - generic.mean()) / generic.std()
        assert answer.z == pytest.approx(float(z), abs=1e-4) and answer.found == (z >= 1.0)
    assert [answer.found for answer in answers] == [True, False]
    text = show.as_text(encoded, retriever, answers)
    assert text.count("no moment matches; closest candidates:") == 1
    content = show.as_json(encoded, retriever, answers)
    assert [result["found"] for result in content["results"]] == [True, False]


def test_the_activation_is_part_of_what_made_the_features(world, videos, tmp_path):     # noqa: F811
    plain, other = (retrieve.ZeroShot("shapes", "cpu", cache=tmp_path, root=str(world), gelu=gelu)
                    for gelu in (False, True))
    path = videos / "test-0000.mp4"
    assert not torch.allclose(plain.encode(path).frames, other.encode(path).frames)
    assert len(list(tmp_path.iterdir())) == 2 and plain.digest != other.digest


def test_the_prompt_surrounds_the_sentence(world, retriever):
    prompted = retrieve.ZeroShot("shapes", "cpu", prompt="a video of {}", cache=None,
                                 root=str(world))
    assert torch.equal(prompted.text(["a door"]), retriever.text(["a video of a door"]))
    with pytest.raises(Mistake, match="must contain {} once"):
        retrieve.ZeroShot("shapes", "cpu", prompt="a video", root=str(world))


def test_both_lists_of_generic_sentences():
    for name in ("ViT-B/32", "shapes-1"):
        sentences = retrieve.generic_sentences(name)
        assert len(set(sentences)) == len(sentences) == 40 and all(sentences)


def test_command_line_without_a_checkpoint(world, videos, tmp_path):    # noqa: F811
    small = world / "shapes" / "clip.pt"
    film, options = videos / "test-0000.mp4", ("--clip", small, "--cache", "")
    long = "the red circle " * 40
    text = run(film, "the red circle rises", long, *options, "--top", 2, "--plot",
               tmp_path / "out.png", "--html", tmp_path / "out.html")
    assert "not direction or order" in text and "on a grid of 0.50 s" in text
    assert long.strip() not in text                     # a long sentence is not printed back whole
    assert (tmp_path / "out.png").stat().st_size > 10_000
    answer = json.loads(run(film, "the red circle rises", *options, "--json"))
    assert answer["scorer"] == "clip" and len(answer["results"][0]["moments"]) == 5
    for more, sentence in ((("--rate", 0), "must be positive numbers"),
                           (("--rate", "inf"), "must be positive numbers"),
                           (("--longest", "inf"), "must be positive numbers"),
                           (("--shortest", 9, "--longest", 3), "--shortest at most")):
        assert sentence in run(film, "a", *options, *more, status=2)
    assert "pass a video and a sentence" in run(film, *options, status=2)
    # before a download would start
    assert "no.mp4 does not exist" in run(tmp_path / "no.mp4", "a", "--clip", "RN50", status=2)


def test_what_a_browser_cannot_play_is_said(videos, tmp_path):          # noqa: F811
    assert show.unplayable(videos / "test-0000.mp4") == ""
    other = shutil.copy(videos / "test-0000.mp4", tmp_path / "a.mkv")
    assert "many browsers cannot play" in show.unplayable(other)


# --------------------------------------------------------------------------------- index and server

@pytest.fixture(scope="module")
def index(retriever, videos, tmp_path_factory):                         # noqa: F811
    """Four videos of different lengths, and a file of another kind."""
    folder = tmp_path_factory.mktemp("folder")
    for i in range(4):
        shutil.copy(videos / f"test-000{i}.mp4", folder / f"{i} <b>.mp4")
    (folder / "notes.txt").write_bytes(b"no video")
    index, failed = update_index(retriever, None, folder, tmp_path_factory.mktemp("index") / "i")
    assert not failed
    return index


@pytest.mark.parametrize("top, per_video", [(1, 1), (5, 2), (12, 3), (50, 4)])
def test_search_without_a_checkpoint_is_exact(index, retriever, top, per_video):
    """Against every video by itself, with its frames rounded as in the index."""
    for sentence in ("the red circle rises", "the pink heart drops"):
        found = search_command.search(index, retriever, [sentence], top, per_video)[0]
        expected, text = [], retriever.text([sentence])
        arrays, slices = index.load()
        for name, entry in index.entries.items():
            frames = arrays["frames"][slices[name]].float()
            encoded = retrieve.Encoded(name, entry.duration_sec, entry.duration_sec / len(frames),
                                       frames, [0])
            for start, end, score in retriever.search(encoded, text,
                                                      per_video)[0].tolist():
                expected.append(((score - entry.mean) / entry.deviation, name, start, end))
        expected = sorted(expected, reverse=True)[:top]
        assert [hit.video for hit in found] == [name for _, name, *_ in expected]
        assert [hit.z for hit in found] == pytest.approx([z for z, *_ in expected], abs=1e-5)
        assert [hit.moment[:2] for hit in found] == [pytest.approx(e[2:], abs=1e-5)
                                                     for e in expected]


def test_an_index_of_other_settings_is_refused(index, retriever):
    made = made_with(retriever, None)
    with pytest.raises(Mistake, match="another checkpoint or setting"):
        Index(index.folder, made | {"rate": 4.0})
    with pytest.raises(Mistake, match="another checkpoint or setting"):
        Index(index.folder, made | {"sha256": "0"})


def test_the_page_of_a_folder(index, retriever, tmp_path):
    hits = search_command.search(index, retriever, ["<script>"], 3)
    text = search_command.as_page(index, ["<script>"], hits, tmp_path / "page.html")
    assert "&lt;script&gt;" in text and "<b>" not in text and "&lt;b&gt;.mp4" in text
    assert text.count("data:image/jpeg") == 3
    # several moments of a video embed it once
    shown = {hit.video for hit in hits[0]}
    assert text.count("data:video/") == len(shown) and text.count('data-source="#') == 3


def test_where_nobody_can_listen():
    for port in (0, 70_000):
        with pytest.raises(Mistake, match="between 1 and 65535"):
            serve.check_address("127.0.0.1", port)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Mistake, match=f"cannot listen on port {port} of 127.0.0.1"):
            serve.check_address("127.0.0.1", port)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to a process there")
def test_ctrl_c_ends_the_server(index):
    pytest.importorskip("uvicorn")
    server = subprocess.Popen([sys.executable, "-m", "extras.serve", index.folder, "--port", "8766",
                               "--device", "cpu"], cwd=HERE, stdout=subprocess.PIPE, text=True)
    assert "open http://127.0.0.1:8766" in server.stdout.readline()
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 8766)).close()
            break
        time.sleep(0.1)
    server.send_signal(signal.SIGINT)
    assert server.wait(timeout=30) == 130


@pytest.fixture
def client(index, retriever):
    testclient = pytest.importorskip("starlette.testclient")
    return testclient.TestClient(serve.application(index, retriever, ["127.0.0.1", "localhost"]),
                                 base_url="http://127.0.0.1")


def test_the_server_serves_the_page_and_the_indexed_videos_only(client, index):
    text = client.get("/").text
    assert "4 videos" in text and "type=\"search\"" in text and "data-source=" not in text
    text = client.get("/", params={"q": "the <i>red</i> circle"}).text
    assert "&lt;i&gt;red&lt;/i&gt;" in text and "<i>" not in text
    assert text.count("data-source=\"/video/") == 10
    assert client.get("/", params={"q": "x" * 10_000}).text.count("x" * 301) == 0
    name = list(index.entries)[1]
    key = index.entries[name].file
    whole = client.get(f"/video/{key}")
    assert whole.content == index.path_of(name).read_bytes()
    part = client.get(f"/video/{key}", headers={"Range": "bytes=100-199"})
    assert part.status_code == 206 and part.content == whole.content[100:200]
    assert client.get(f"/frame/{key}/1500").content[:3] == b"\xff\xd8\xff"
    for address in ("/video/4", "/video/-1", "/video/..%2f..%2fetc%2fpasswd", "/notes.txt",
                    "/videos.json", "/frame/9/0"):
        assert client.get(address).status_code == 404, address


def test_the_server_cuts_a_clip(client, index, tmp_path):
    """From the start and end in the page; the end may be rounded beyond the video's."""
    name, entry = next(iter(index.entries.items()))
    address = f"/clip/{entry.file}"
    reply = client.get(f"{address}/1/2.5")
    (tmp_path / "clip.mp4").write_bytes(reply.content)
    assert abs(video.probe_duration(tmp_path / "clip.mp4") - 1.5) < 0.1
    expected = f"{index.path_of(name).stem}-0m01.0s-0m02.5s.mp4"
    header = urllib.parse.unquote(reply.headers["content-disposition"])
    assert header == f"attachment; filename*=utf-8''{expected}"
    late = entry.duration_sec
    assert client.get(f"{address}/{late - 1}/{late + 0.04}").status_code == 200
    for wrong, status in (("2/1", 400), ("1000/2000", 400), ("x/1", 404), ("-1/1", 404),
                          ("nan/1", 404), ("1", 404)):
        assert client.get(f"{address}/{wrong}").status_code == status, wrong
    assert client.get("/clip/4/0/1").status_code == 404


def test_a_video_that_cannot_be_cut_is_not_named(client, index, monkeypatch, capsys):
    def broken(path, *_):
        raise video.VideoError(f"{path} is damaged")

    monkeypatch.setattr(show, "cut", broken)
    name, entry = next(iter(index.entries.items()))
    reply = client.get(f"/clip/{entry.file}/0/1")
    assert (reply.status_code, reply.text) == (404, "this video cannot be read")
    assert f"{index.path_of(name)} is damaged" in capsys.readouterr().err


def test_the_server_notices_an_update(index, retriever, tmp_path):
    """A video more, one replaced, and an index that was made with other settings: it goes on with
    what it has read."""
    testclient = pytest.importorskip("starlette.testclient")
    folder, own = tmp_path / "videos", tmp_path / "index"
    shutil.copytree(index.videos_folder, folder)
    served, _ = update_index(retriever, None, folder, own)
    client = testclient.TestClient(serve.application(served, retriever, ["127.0.0.1"]),
                                   base_url="http://127.0.0.1")
    old = client.get("/", params={"q": "the red circle"}).text
    first, second = (index.path_of(name).name for name in list(index.entries)[:2])
    key = served.entries[first].file
    shutil.copy(folder / second, folder / first)
    assert client.get(f"/video/{key}").status_code == 404       # it shows another video now
    shutil.copy(folder / second, folder / "more.mp4")
    update_index(retriever, None, folder, own)
    assert client.get(f"/video/{key}").status_code == 404
    new = client.get("/", params={"q": "the red circle"}).text
    assert "4 videos" in old and "5 videos" in new
    content = json.loads((own / "videos.json").read_text(encoding="utf-8"))
    content["made"]["sha256"] = "0"
    (own / "videos.json").write_text(json.dumps(content), encoding="utf-8")
    assert client.get("/", params={"q": "the red circle"}).text == new


def test_a_relative_clip_is_found_from_another_folder(world, tmp_path, monkeypatch, videos,  # noqa
                                                      capsys):
    monkeypatch.chdir(world)
    (tmp_path / "videos").mkdir()
    shutil.copy(videos / "test-0000.mp4", tmp_path / "videos")
    relative = retrieve.ZeroShot("shapes/clip.pt", "cpu", cache=None)
    index, _ = update_index(relative, None, tmp_path / "videos", tmp_path / "index")
    monkeypatch.chdir(tmp_path)
    assert search_command.retriever_of(Index("index"), "cpu").digest == relative.digest


def test_another_host_header_is_refused(client):
    """A page of another site cannot read the answers by pointing its name to this machine."""
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Host": "localhost:8000"}).status_code == 200


@pytest.mark.skipif(not shutil.which("chromedriver"),
                    reason="Chromium and chromedriver are not installed (Debian: chromium-driver)")
def test_search_and_play_in_a_browser(index, world, tmp_path):
    """Typed with real keys; a click plays the moment; Enter on the next button plays that one."""
    folder = index.folder
    server = subprocess.Popen([sys.executable, "-m", "extras.serve", folder, "--port", "8765",
                               "--device", "cpu"], cwd=HERE, stdout=subprocess.PIPE, text=True)
    browser = Browser(tmp_path / "profile")
    try:
        assert "open http://127.0.0.1:8765" in server.stdout.readline()
        for _ in range(100):
            browser.call("POST", f"{browser.session}/url", {"url": "http://127.0.0.1:8765"})
            if browser.run("return document.querySelectorAll('input').length"):
                break
            time.sleep(0.1)
        find = lambda css: [next(iter(e.values())) for e in browser.call(       # noqa: E731
            "POST", f"{browser.session}/elements", {"using": "css selector", "value": css})]
        browser.call("POST", f"{browser.session}/element/{find('input')[0]}/value",
                     {"text": "the red circle rises\ue007"})
        for _ in range(100):
            if buttons := find("section button"):
                break
            time.sleep(0.1)
        start = float(browser.run("return document.querySelector('section button').dataset.start"))
        browser.call("POST", f"{browser.session}/element/{buttons[0]}/click", {})
        state = "const v = document.querySelector('video'); return [v.currentTime, v.paused, v.src]"
        for _ in range(100):
            now, paused, source = browser.run(state)
            if not paused and now >= start:
                break
            time.sleep(0.1)
        assert not paused and start <= now < start + 10 and "/video/" in source
        fields = browser.run("const e = document.getElementById('clip').elements; "
                             "return [e.start.value, e.end.value]")
        assert float(fields[0]) == pytest.approx(start, abs=0.06) and find("#clip [type=number]")
        browser.call("POST", f"{browser.session}/chromium/send_command", {
            "cmd": "Browser.setDownloadBehavior",
            "params": {"behavior": "allow", "downloadPath": str(tmp_path / "clips")}})
        browser.run(f"document.getElementById('clip').elements.end.value = {start + 2.5:.1f}")
        browser.call("POST", f"{browser.session}/element/{find('#clip button')[1]}/click", {})
        for _ in range(100):
            if clips := list((tmp_path / "clips").glob("*.mp4")):
                break
            time.sleep(0.1)
        assert video.probe_duration(clips[0]) == pytest.approx(2.5, abs=0.2)
        browser.call("POST", f"{browser.session}/element/{buttons[1]}/value", {"text": "\ue007"})
        time.sleep(0.3)
        assert browser.run("return [...document.querySelectorAll('section button')].map("
                           "b => b.getAttribute('aria-pressed'))")[:2] == ["false", "true"]
        assert browser.run("return [...document.querySelectorAll('img')].every("
                           "i => !i.complete || i.naturalWidth > 0)")
    finally:
        browser.close()
        server.terminate()
        server.wait()
