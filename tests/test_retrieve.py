"""retrieve.py: short and long videos, the command line, and the page in a real browser. For the
index see test_index.py."""
import functools
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request

import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import films
import mmn
import retrieve
import shapes
import train
import video
from conftest import command
from extras import show
from support.errors import Mistake
from support.text import printable

HERE = pathlib.Path(__file__).parent.parent
SENTENCES = ["the green circle blinks", "the maroon heart rises"]


@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    """A run of three epochs: it has learned little, but its answers are the same everywhere."""
    folder = tmp_path_factory.mktemp("run") / "r"
    config = train.Config(**{"dataset": "shapes", **train.preset("shapes"), "method": "mmn",
                             "root": str(world), "epochs": 3, "device": "cpu", "out": str(folder)})
    train.train(config)
    return folder / "ckpt.pt"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Ten videos of the test split of the shapes world, as mp4."""
    folder = tmp_path_factory.mktemp("videos")
    shapes.export(folder, 10)
    return folder


@pytest.fixture(scope="module")
def retriever(checkpoint, tmp_path_factory):
    return retrieve.Retriever(checkpoint, "cpu", cache=tmp_path_factory.mktemp("cache"))


run = functools.partial(command, "retrieve.py")


def looped(source, out, times):
    """A video file that repeats another one `times` times, or its first frames (times below 1)."""
    if times >= 1:
        films.ffmpeg("-stream_loop", int(times) - 1, "-i", source, "-c", "copy", out)
    else:
        films.ffmpeg("-i", source, "-t", video.probe_duration(source) * times, "-c:v", "libx264",
                     "-preset", "ultrafast", out)
    return out


# ---------------------------------------------------------------------------------------- one video

def test_a_video_file_gives_the_moment_that_stored_features_give(retriever, videos, world):
    """The same model on the exported mp4 and on features made from the frames as drawn: the two
    answers overlap by IoU >= 0.9 for 34 of 40 sentences (after three epochs of training)."""
    model = clip.load(world / "shapes" / "clip.pt")
    rows = data.read_file(videos / "annotations.jsonl")
    agree = []
    for i in range(10):
        name = f"test-{i:04d}"
        pixels = shapes.film(shapes.plan_of(0, "test", i))
        x = F.normalize(video.encode_frames(model, pixels)[0].float(), dim=1)
        sentences = [row.sentence for row in rows if row.video == name]
        duration_sec = next(row.duration_sec for row in rows if row.video == name)
        stored = retrieve.Encoded(name, duration_sec, duration_sec / 32, x, [0])
        ours = retriever.predict(retriever.encode(videos / f"{name}.mp4"), sentences, 1)
        theirs = retriever.predict(stored, sentences, 1)
        agree += [float(mmn.interval_iou(torch.tensor(a[0][:2]), torch.tensor(b[0][:2]))) >= 0.9
                  for a, b in zip(ours, theirs)]
    assert len(agree) == 40 and sum(agree) >= 34


def test_answers_are_those_of_the_evaluation(retriever, checkpoint, videos):
    """`predict` against mmn.fuse and mmn.decode."""
    encoded = retriever.encode(videos / "test-0000.mp4")
    run = evaluate.load(checkpoint)
    x = F.normalize(run.text.encode_text(clip.tokenize(SENTENCES)), dim=1)
    scores = mmn.fuse(*run.retriever(encoded.frames[None], x, torch.zeros(2, dtype=torch.long)))
    expected = mmn.decode(scores, torch.full((2,), encoded.duration_sec), 5,
                          candidates=run.retriever.candidates)
    assert torch.allclose(torch.tensor(retriever.predict(encoded, SENTENCES)), expected, atol=1e-4)
    alone = retriever.predict(encoded, SENTENCES[0])
    assert torch.allclose(torch.tensor(alone), expected[0], atol=1e-4)


def test_a_cached_video_is_not_read_again(retriever, videos, tmp_path, monkeypatch):
    first = retriever.encode(videos / "test-0001.mp4")
    shutil.copy(videos / "test-0001.mp4", tmp_path / "other name.mp4")
    monkeypatch.setattr(retriever, "extract", lambda path: 1 / 0)
    again = retriever.encode(tmp_path / "other name.mp4")       # the key is the content
    assert torch.equal(first.frames, again.frames) and first.duration_sec == again.duration_sec
    with pytest.raises(ZeroDivisionError):
        retriever.encode(looped(videos / "test-0001.mp4", tmp_path / "more.mp4", 2))


@pytest.mark.parametrize("times, windows", [(0.006, 1), (0.1, 1), (1, 1), (5, None)])
def test_any_length(retriever, videos, tmp_path, times, windows):
    """From 0.2 s to five times the trained length; moments lie within the video, ordered by score,
    and no two overlap by IoU > 0.5."""
    path = looped(videos / "test-0002.mp4", tmp_path / "a.mp4", times)
    encoded = retriever.encode(path)
    assert windows is None or len(encoded.starts) == windows
    moments = retriever.predict(encoded, SENTENCES[0])
    assert len(moments) == 5 or times < 0.1
    for m in moments:
        assert 0 <= m.start_sec < m.end_sec <= encoded.duration_sec and 0 <= m.score < 1
    assert sorted(moments, key=lambda m: -m.score) == moments
    for i, a in enumerate(moments):
        for b in moments[:i]:
            assert mmn.interval_iou(torch.tensor(a[:2]), torch.tensor(b[:2])) <= 0.5 + 1e-6


def test_a_long_video_is_sampled_as_densely_as_in_training(retriever, videos, tmp_path):
    """And to its end. Five times the length: every feature lies in a window, windows overlap by
    half, and the seconds per feature are those of training."""
    encoded = retriever.encode(looped(videos / "test-0003.mp4", tmp_path / "a.mp4", 5))
    covered = set()
    for start in encoded.starts:
        covered |= set(range(start, start + retriever.T))
    assert covered == set(range(len(encoded.frames)))
    assert max(b - a for a, b in zip(encoded.starts, encoded.starts[1:])) <= retriever.T // 2
    assert encoded.each_sec == pytest.approx(retriever.window_sec / retriever.T, rel=0.02)


def test_mistakes_are_reported_in_one_sentence(retriever, checkpoint, videos, world, tmp_path):
    with pytest.raises(Mistake, match="is a folder; .* see: python -m extras.index --help"):
        retriever.encode(videos)
    good = videos / "test-0000.mp4"
    (tmp_path / "text.mp4").write_bytes(b"not a video")
    assert "cannot be opened" in run(checkpoint, tmp_path / "text.mp4", "a", status=2)
    assert "none.mp4 does not exist" in run(checkpoint, tmp_path / "none.mp4", "a", status=2)
    assert "a sentence is empty" in run(checkpoint, good, "a", " ", status=2)
    assert "--top must be at least 1" in run(checkpoint, good, "a", "--top", 0, status=2)
    assert "there is no checkpoint" in run(tmp_path / "none.pt", good, "a", status=2)
    other = torch.load(world / "shapes" / "clip.pt", weights_only=True)
    torch.save({key: value + 1 for key, value in other.items()}, tmp_path / "clip.pt")
    error = run(checkpoint, good, "a", "--clip", tmp_path / "clip.pt", "--cache", "", status=2)
    digest = clip.sha256(world / "shapes" / "clip.pt")
    assert "is not the CLIP this checkpoint was trained with" in error and digest in error
    error = run(checkpoint, good, "a", "--clip", tmp_path / "gone.pt", "--cache", "", status=2)
    assert "needs the weights of the CLIP 'shapes'" in error and digest in error


def test_command_line(checkpoint, videos, tmp_path):
    good = videos / "test-0000.mp4"
    dollars = r"pays $5 \foo and $3, " + "word " * 100          # not a formula in the plot
    text = run(checkpoint, good, *SENTENCES, dollars, "--top", 3, "--cache", "",
               "--plot", tmp_path / "out.png", "--clips", tmp_path / "clips")
    assert text.count("for ranking only; not a probability") == 3 and "on a grid of 2.15 s" in text
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    answer = json.loads(run(checkpoint, good, *SENTENCES, "--top", 3, "--cache", "", "--json"))
    assert [result["sentence"] for result in answer["results"]] == SENTENCES
    for result in answer["results"]:
        assert len(result["moments"]) == 3
        for moment in result["moments"]:
            times = f"{show.clock(moment['start_sec']):>8s}  {show.clock(moment['end_sec']):>8s}"
            assert f"{times}   {moment['score']:.3f}" in text
    for moment in (m for result in answer["results"] for m in result["moments"]):
        start, end = moment["start_sec"], moment["end_sec"]
        path = tmp_path / "clips" / f"test-0000-0m{start:04.1f}s-0m{end:04.1f}s.mp4"
        assert video.probe_duration(path) == pytest.approx(end - start, abs=0.3)


def test_clock_and_control_characters():
    assert [show.clock(s) for s in (0, 3.84, 59.96, 61.5, 3599.99, 7322.2)] == [
        "0:00.0", "0:03.8", "1:00.0", "1:01.5", "1:00:00.0", "2:02:02.2"]
    assert printable("a\x1b[31mb\u202ec") == "a\\x1b[31mb\\u202ec"


def test_clips_overwrite_nothing_and_keep_the_duration(videos, tmp_path):
    """A video that shows one frame for 20 s: a clip of it is as long as its moment, although no
    frame begins in it; and existing files are kept."""
    path = tmp_path / "still: 12:30.mkv"                        # a name that is not a URL
    films.film(path, films.greys([99, 99]), "-c:v", "ffv1", rate="1/20")
    encoded = retrieve.Encoded(str(path), 40.0, 1.0, torch.zeros(1, 1), [0])
    answers = [retrieve.Answer("a", [retrieve.Moment(2.0, 12.0, 0.5)], 2.0, True)]
    out, = show.write_clips(tmp_path / "clips", encoded, answers)
    assert video.probe_duration(out) == pytest.approx(10, abs=0.2)
    before = out.read_bytes()
    with pytest.raises(Mistake, match="choose another folder"):
        show.write_clips(tmp_path / "clips", encoded, answers)
    assert out.read_bytes() == before
    # a thumbnail of an instant after which no picture begins
    assert all(show.jpeg(path, time_sec)[:2] == b"\xff\xd8" for time_sec in (1.0, 39.9))
    # padding ends with the video
    out, = show.write_clips(tmp_path / "clips", encoded, answers, padding_sec=4)
    assert out.name.endswith("-0m00.0s-0m16.0s.mp4")
    assert video.probe_duration(out) == pytest.approx(16, abs=0.2)


def test_a_damaged_cache_is_made_again(retriever, videos):
    first = retriever.encode(videos / "test-0008.mp4")
    kept = max(retriever.cache.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    for content in (b"", kept.read_bytes()[:100]):
        kept.write_bytes(content)
        assert torch.equal(retriever.encode(videos / "test-0008.mp4").frames, first.frames)


def test_a_checkpoint_knows_what_it_was_trained_on(retriever, videos, tmp_path, capsys):
    """On a video of another size than the exported ones, made or cached, a note says so, once."""
    for path, said in ((videos / "test-0009.mp4", 0), (tmp_path / "other.mp4", 1)):
        if said:
            films.film(path, films.greys([0] * 8, (96, 128)), rate=4)
        for _ in range(2):
            retrieve.note.cache_clear()
            retriever.encode(path), retriever.encode(path)
            assert capsys.readouterr().err.count("trained on the shapes world only") == said


# ----------------------------------------------------------------------------------------- the page

def page(videos, folder, sentences=("the <b>red</b> circle & \"more\"",)):
    encoded = retrieve.Encoded(str(videos / "test-0000.mp4"), 34.46, 1.08, torch.zeros(1, 1), [0])
    moments = [retrieve.Moment(8.616, 10.616, 0.5), retrieve.Moment(20.0, 22.5, 0.25)]
    answers = [retrieve.Answer(sentence, moments, 2.0, True) for sentence in sentences]
    show.write_page(folder / "out.html", encoded, 2.15, answers)
    return (folder / "out.html").read_text(encoding="utf-8")


def test_sentences_are_escaped_in_the_page(videos, tmp_path):
    text = page(videos, tmp_path)
    assert "the &lt;b&gt;red&lt;/b&gt; circle &amp; &#34;more&#34;" in text and "<b>" not in text
    assert "http" not in text.replace("http-equiv", "")         # nothing is fetched


class Browser:
    """Headless Chromium by WebDriver."""

    def __init__(self, folder):
        self.driver = subprocess.Popen(["chromedriver", "--port=9515", "--silent"],
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(100):
            try:
                self.call("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-background-networking", "--mute-audio", f"--user-data-dir={folder}"]
        self.session = "/session/" + self.call("POST", "/session", {"capabilities": {
            "alwaysMatch": {"goog:chromeOptions": {"args": flags}}}})["sessionId"]

    def call(self, method, path, content=None):
        body = None if content is None else json.dumps(content).encode()
        request = urllib.request.Request(f"http://127.0.0.1:9515{path}", body, method=method)
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.loads(reply.read())["value"]

    def run(self, script):
        return self.call("POST", f"{self.session}/execute/sync", {"script": script, "args": []})

    def close(self):
        self.call("DELETE", self.session)
        self.driver.terminate()
        self.driver.wait()


@pytest.mark.skipif(not shutil.which("chromedriver"),
                    reason="Chromium and chromedriver are not installed (Debian: chromium-driver)")
def test_a_click_plays_the_moment_and_stops_at_its_end(videos, tmp_path):
    """From the file system, with a real click, and with the keyboard."""
    page(videos, tmp_path)
    browser = Browser(tmp_path / "profile")
    try:
        browser.call("POST", f"{browser.session}/url", {"url": f"file://{tmp_path}/out.html"})
        state = "const v = document.querySelector('video'); return [v.currentTime, v.paused]"
        for _ in range(100):
            if browser.run("return document.querySelector('video').readyState") >= 2:
                break
            time.sleep(0.1)
        assert browser.run(state) == [0, True]
        buttons = [next(iter(b.values())) for b in browser.call(
            "POST", f"{browser.session}/elements", {"using": "css selector", "value": "button"})]
        browser.call("POST", f"{browser.session}/element/{buttons[0]}/click", {})
        time.sleep(0.7)
        now, paused = browser.run(state)
        assert 8.6 <= now < 10.6 and not paused
        time.sleep(3)
        now, paused = browser.run(state)
        assert paused and 10.6 <= now < 11.3
        browser.call("POST", f"{browser.session}/element/{buttons[1]}/value", {"text": "\ue007"})
        time.sleep(0.5)
        assert 20.0 <= browser.run(state)[0] < 22.5
        assert browser.run("return [...document.querySelectorAll('button')].map("
                           "b => b.getAttribute('aria-pressed'))") == ["false", "true"]
    finally:
        browser.close()
