"""Readers of files and strings of others, on random edits of real inputs (seeded). Each edit is
either read or raises a Mistake, and nothing hangs or crashes.

    pytest tests/robustness/test_fuzz.py                # 300 examples of each kind, 15 videos
    pytest tests/robustness/test_fuzz.py --fuzz 10000   # 10,000 and 500
"""
import functools
import json
import random
import time

import pytest
import torch

import clip
import data
import evaluate
import mmn
import parse
import video
from conftest import decode
from extras import features
from support import files
from support.errors import Mistake


@pytest.fixture
def count(request) -> int:
    return request.config.getoption("fuzz")


TEXTS = ["a person opens the door.", "person turns on a light switch, then they sit down",
         "the \u0130stanbul caf\u00e9 \U0001f600 \u4e00\u4e2a\u4eba",
         "&lt;b&gt; &amp;amp; \x00\x1b[2J", "O'Neill's dog isn't 12,345.67% happy -- it's \"sad\"",
         "\ud800\udfff", "'s 't 're <|endoftext|>", "a\u0301\u200d\ufeff\u202e rtl",
         "THE THE the of of of", "\u0665\u2167\u00b2 \u2028 \u00a0"]
CHARADES = "AO8RW 0.0 6.9##a person is putting a book on a shelf.\n3MSZA 24.3 30.4##person turns.\n"
JSON = json.dumps({"v_1": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]],
                           "sentences": ["A young woman is seen.", " She then spins"]}})
JSONL = json.dumps({"qid": 1, "vid": "a", "query": "a man opens a door", "duration": 150.0,
                    "relevant_windows": [[3.5, 8], [9, 12.25]]}) + "\n"
PIECES = ["NaN", "Infinity", "-1", "1e309", "1e-309", "9" * 400, "null", "true", "[]", "{}", '""',
          "##", "\n", "\\u0000", "\\ud800", "../../x", "/etc/passwd", "[" * 300, '"', ",", ":", " ",
          "0x10"]


def mutated(text: str, draw: random.Random, sources: list[str]) -> str:
    """A few random edits: pieces removed, doubled, moved, inserted, replaced by another source."""
    for _ in range(draw.randint(1, 4)):
        i, j = sorted(draw.randint(0, len(text)) for _ in range(2))
        kind = draw.randrange(6)
        if kind == 0:
            text = text[:i] + text[j:]
        elif kind == 1:
            text = text[:j] + text[i:j] + text[j:]
        elif kind == 2:
            text = text[:i] + draw.choice(PIECES) + text[draw.choice((i, j)):]
        elif kind == 3:
            text = text[:i] + chr(draw.choice((draw.randrange(128), draw.randrange(0x110000)))) \
                + text[i + 1:]
        elif kind == 4:
            other = draw.choice(sources)
            text = text[:i] + other[draw.randint(0, len(other)):]
        else:
            text = text[i:j] + text[:i] + text[j:]
    return text[:3000]


@pytest.mark.parametrize("name, source", [("a.txt", CHARADES), ("a.json", JSON),
                                          ("a.jsonl", JSONL)])
def test_annotations(tmp_path, name, source, count, fault):
    (tmp_path / "Charades_v1_train.csv").write_text("id,length\nAO8RW,33.67\n3MSZA,30.96\n")
    (tmp_path / "Charades_v1_test.csv").write_text("id,length\n")
    draw, path, read = random.Random(0), tmp_path / name, 0
    for _ in range(count):
        text = mutated(source, draw, [CHARADES, JSON, JSONL])
        path.write_bytes(text.encode(errors="surrogatepass"))
        try:
            samples = data.clean(data.read_file(path))[0]
        except Mistake as error:
            assert str(error)
            continue
        read += 1
        for s in samples:
            assert 0 <= s.start_sec < s.end_sec < float("inf") and s.sentence.strip()
            with_a_folder = any(c in s.video for c in "/\\\0") or s.video.startswith(".")
            store = data.FeatureStore.__new__(data.FeatureStore)
            store.folder = tmp_path
            if with_a_folder:
                with pytest.raises(Mistake, match="cannot be the name of a video"):
                    store.path(s.video, "frames")
            else:
                assert store.path(s.video, "frames").parent == tmp_path
    assert 0 < read < count
    fault(f"a damaged annotation file ({name[1:]})", "random edits: it is read, or reported in one "
          "sentence", count)


def test_tokenizer(count, fault):
    draw = random.Random(1)
    for _ in range(count):
        text = mutated(draw.choice(TEXTS), draw, TEXTS)
        ids = clip.encode(text)
        assert all(0 <= i < 49408 for i in ids)
        assert clip.tokenize(text, truncate=True).shape == (1, 77)
        assert isinstance(decode(ids[:20]), str) or not ids
    fault("an arbitrary string in the tokenizer", "random edits of sentences: it is encoded", count)


def test_parser(count, fault):
    draw, parser, slowest = random.Random(2), parse.Parser(mask="something"), 0.0
    for _ in range(count):
        text = mutated(draw.choice(TEXTS), draw, TEXTS)
        started = time.perf_counter()
        query, half = parser.split(text), parser.halve(text)
        slowest = max(slowest, time.perf_counter() - started)
        assert query.full == text == half.full
        assert all(isinstance(part, str) for part in (*query, *half))
    assert slowest < 30         # nothing takes forever; a sentence takes a millisecond
    fault("an arbitrary string in the parser", "random edits of sentences: it is split", count)


@pytest.fixture
def tiny_checkpoint(tmp_path):
    """A checkpoint of a few kilobytes."""
    text = clip.TextTower(12, 8, 16, 1, 2, 4, clip.QuickGELU)
    for p in text.parameters():
        torch.nn.init.normal_(p)
    text.transformer.register_buffer("heads", torch.tensor(2))
    sizes = dict(width=4, num_clips=4, pool_counts=(3,), pool_kernel=2, pool_stride=2, kernel=3,
                 layers=1, hidden=4, joint=3)
    path = tmp_path / "ckpt.pt"
    files.save_tensors(path, {
        "config": {"dataset": "x", "retriever": "mmn"}, "metrics": {}, "sizes": sizes,
        "retriever": mmn.MMN(**sizes).state_dict(), "text": text.state_dict(), "window_sec": 3.0,
        "parser": "by construction", "epoch": 1})
    assert evaluate.load(path).checkpoint["epoch"] == 1
    return path


def test_checkpoints(tiny_checkpoint, tmp_path, count, fault):
    content, draw, read = tiny_checkpoint.read_bytes(), random.Random(3), 0
    path, original = tmp_path / "changed.pt", evaluate.load(tiny_checkpoint)
    for k in range(count):
        x = bytearray(content)
        for _ in range(draw.randint(1, 4)):
            i = draw.randrange(len(x))
            kind = draw.randrange(4)
            if kind == 0:
                x[i] ^= 1 << draw.randrange(8)
            elif kind == 1:
                x[i:i + draw.randint(1, 40)] = draw.randbytes(draw.randint(0, 40))
            elif kind == 2:
                x[i:i + 4] = draw.choice((b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\0"))
            elif draw.random() < 0.2:
                del x[i:]
            if not x:
                break
        path.write_bytes(x)
        try:
            run = evaluate.load(path)
        except Mistake as error:
            assert "is not a checkpoint of train.py" in str(error)
            continue
        read += 1                               # what can be read is what was written
        for module, before in ((run.text, original.text), (run.retriever, original.retriever)):
            for key, value in module.state_dict().items():
                assert torch.equal(value, before.state_dict()[key])
    assert read < count / 2
    fault("a damaged checkpoint", "random bytes changed: it is reported in one sentence, or the "
          "weights are unaffected", count)


def test_videos(published, tmp_path, count, fault):
    """Mutations of real files, decoded in two processes, so that a crash would not end the test."""
    sources = [(published / "videos" / name).read_bytes()
               for name in ("test.avi", "arm_wrestling.mp4", "flipping_a_pancake.mkv")]
    draw, count, read, failed = random.Random(4), max(15, count // 20), 0, 0
    for first in range(0, count, 50):
        paths = {}
        for k in range(first, min(first + 50, count)):
            x = bytearray(draw.choice(sources))
            for _ in range(draw.randint(1, 30)):
                # half of the damage in the headers
                i = draw.randrange(len(x) if draw.random() < 0.5 else 4096)
                x[i:i + draw.randint(1, 16)] = draw.randbytes(draw.randint(0, 16))
            if draw.random() < 0.1:
                del x[draw.randrange(len(x)):]
            paths[str(k)] = tmp_path / f"{k}.mp4"
            paths[str(k)].write_bytes(x)
        read_four = functools.partial(video.sample_frames, count=4, resolution=32)
        for name, decoded in features.read_all(paths, read_four):
            if decoded.value is None:
                failed += 1
                assert decoded.reason and "\n" not in decoded.reason.strip()
            else:
                read += 1
                frames, duration_sec = decoded.value
                assert frames.shape == (4, 3, 32, 32) and 0 < duration_sec < 1e7
            paths[name].unlink()
    assert read and failed and read + failed == count
    fault("a damaged video file", f"random bytes changed: {read} are decoded, {failed} are "
          "reported in failed.txt", count)
