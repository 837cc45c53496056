"""Readers of what others wrote, fed with what nobody wrote: seeded mutations of real inputs. Each
either reads or raises a ValueError (one sentence), and neither hangs nor crashes.

    FUZZ=1000000 pytest tests/test_fuzz.py          # more than 10,000 of each kind (videos: 500)
"""
import json
import os
import pathlib
import random
import sys
import time

import numpy as np
import pytest
import torch

import clip
import data
import evaluate
import mmn
import parse
import train
import video
from conftest import decode

HERE = pathlib.Path(__file__).parent.parent
COUNT = int(os.environ.get("FUZZ", 10_000))

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
    """A few random edits: pieces cut, doubled, moved, put in, swapped with another source."""
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
def test_annotations(tmp_path, name, source, fault):
    (tmp_path / "Charades_v1_train.csv").write_text("id,length\nAO8RW,33.67\n3MSZA,30.96\n")
    (tmp_path / "Charades_v1_test.csv").write_text("id,length\n")
    draw, path, read = random.Random(0), tmp_path / name, 0
    for _ in range(COUNT):
        text = mutated(source, draw, [CHARADES, JSON, JSONL])
        path.write_bytes(text.encode(errors="surrogatepass"))
        try:
            samples, _ = data.clean(data.read_file(path))
        except ValueError as error:
            assert str(error)
            continue
        read += 1
        for s in samples:
            assert 0 <= s.start_sec < s.end_sec < float("inf") and s.sentence.strip()
            with_a_folder = any(c in s.video for c in "/\\\0") or s.video.startswith(".")
            store = video.FeatureStore.__new__(video.FeatureStore)
            store.folder = tmp_path
            if with_a_folder:
                with pytest.raises(ValueError, match="cannot be the name of a video"):
                    store.path(s.video, "frames")
            else:
                assert store.path(s.video, "frames").parent == tmp_path
    assert 0 < read < COUNT
    fault(f"annotation file {name[1:]}", "random edits (fuzzing): read, or one sentence", COUNT)


def test_tokenizer(fault):
    draw = random.Random(1)
    for _ in range(COUNT):
        text = mutated(draw.choice(TEXTS), draw, TEXTS)
        ids = clip.encode(text)
        assert all(0 <= i < 49408 for i in ids)
        assert clip.tokenize(text, truncate=True).shape == (1, 77)
        assert isinstance(decode(ids[:20]), str) or not ids
    fault("any string, to the tokenizer", "random edits (fuzzing)", COUNT)


def test_parser(fault):
    draw, parser, slowest = random.Random(2), parse.Parser("rules", "something"), 0.0
    for _ in range(COUNT):
        text = mutated(draw.choice(TEXTS), draw, TEXTS)
        started = time.perf_counter()
        query, half = parser.split(text), parser.halve(text)
        slowest = max(slowest, time.perf_counter() - started)
        assert query.full == text == half.full
        assert all(isinstance(part, str) for part in (*query, *half))
    assert slowest < 30         # nothing takes forever; a sentence takes a millisecond
    fault("any string, to the parser", "random edits (fuzzing)", COUNT)


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
    train.save(path, {"config": {"fusion": "published", "normalise": True, "dataset": "x",
                                 "retriever": "mmn"},
                      "metrics": {}, "sizes": sizes, "retriever": mmn.MMN(**sizes).state_dict(),
                      "text": text.state_dict(), "window_sec": 3.0, "epoch": 1})
    assert evaluate.load(path).checkpoint["epoch"] == 1
    return path


def test_checkpoints(tiny_checkpoint, tmp_path, fault):
    content, draw, read = tiny_checkpoint.read_bytes(), random.Random(3), 0
    path, original = tmp_path / "changed.pt", evaluate.load(tiny_checkpoint)
    for k in range(COUNT):
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
        except ValueError as error:
            assert "is not a checkpoint of train.py" in str(error)
            continue
        read += 1                               # what is still read is what was written
        for module, before in ((run.text, original.text), (run.retriever, original.retriever)):
            for key, value in module.state_dict().items():
                assert torch.equal(value, before.state_dict()[key])
    assert read < COUNT / 2
    fault("checkpoint", "random bytes changed (fuzzing): one sentence, or the change is in what is "
          "not read", COUNT)


def test_videos(published, tmp_path, fault):
    """Mutations of real files, decoded by two processes that a crash would not take along."""
    sources = [(published / "videos" / name).read_bytes()
               for name in ("test.avi", "arm_wrestling.mp4", "flipping_a_pancake.mkv")]
    draw, count, read, failed = random.Random(4), COUNT // 20, 0, 0
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
        for name, decoded in video.decode_all(paths, 4, 32, 2):
            if decoded.frames is None:
                failed += 1
                assert decoded.reason and "\n" not in decoded.reason.strip()
            else:
                read += 1
                assert decoded.frames.shape == (4, 3, 32, 32) and 0 < decoded.duration_sec < 1e7
            paths[name].unlink()
    assert read and failed and read + failed == count
    fault("video file", f"random bytes changed (fuzzing): {read} read, {failed} end in failed.txt",
          count)


# ---------------------------------------------------------------------------- files made to do harm

class Explosion:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def peak_gib() -> float:
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc to see its memory")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2 ** 20


def leave(module, *arguments) -> int:
    """The exit status of a command, in this process."""
    before = sys.argv
    sys.argv = [f"{module.__name__}.py", *map(str, arguments)]
    try:
        module.main()
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv = before
    return 0


def huge_npy() -> bytes:
    """A header that claims [10^12, 512] numbers."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 512), }"
    head += b" " * (118 - len(head) - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(64)


def huge_torch(path: pathlib.Path) -> bytes:
    """One number that claims to be 10^12, in every place where a weight belongs."""
    torch.save({"config": {"fusion": "published", "normalise": True, "retriever": "mmn"},
                "metrics": {},
                "sizes": {}, "retriever": {}, "window_sec": 1.0,
                "text": {"token_embedding.weight": torch.zeros(1).expand(10 ** 6, 10 ** 6)}}, path)
    return path.read_bytes()


def far_apart(path: pathlib.Path) -> bytes:
    """A list of layers whose largest index is 10^9, and sizes that would take a terabyte."""
    text = {f"transformer.resblocks.{10 ** 9}.ln_1.weight": torch.zeros(4),
            "token_embedding.weight": torch.zeros(1, 10 ** 5),
            "positional_embedding": torch.zeros(1, 10 ** 5),
            "text_projection": torch.zeros(10 ** 5, 1)}
    sizes = dict(width=10 ** 5, num_clips=10 ** 5, pool_counts=(3,), pool_kernel=2, pool_stride=2,
                 kernel=3, layers=1, hidden=10 ** 5, joint=3)
    torch.save({"config": {"fusion": "published", "normalise": True, "retriever": "mmn"},
                "metrics": {},
                "sizes": sizes, "retriever": {}, "window_sec": 1.0, "text": text, **text}, path)
    return path.read_bytes()


def shared_lists(path: pathlib.Path) -> bytes:
    """A list that holds itself, as it were, 2^60 times."""
    value: list = [torch.zeros(1)]
    for _ in range(60):
        value = [value, value]
    torch.save({"config": value, "text": value}, path)
    return path.read_bytes()


def no_device(path: pathlib.Path) -> bytes:
    """A tensor of a terabyte that is nowhere."""
    torch.save({"token_embedding.weight": torch.empty(10 ** 6, 10 ** 6, device="meta")}, path)
    return path.read_bytes()


def hostile(tmp_path: pathlib.Path) -> dict[str, bytes]:
    import io
    import pickle
    import zipfile

    def one_bit(content: bytes) -> bytes:
        place = content.index(np.arange(1000, dtype=np.float32).tobytes()) + 2001
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]

    def packed(compress: int, content: bytes = pickle.dumps(Explosion(), 2)) -> bytes:
        """A pickle in the shape of torch.save, and 4 GB of zeros if compressed."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compress) as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3\n")
            if compress:
                with file.open("archive/data/0", "w", force_zip64=True) as part:
                    for _ in range(256):
                        part.write(bytes(1 << 24))
        return out.getvalue()

    torch.save({"a": torch.arange(1000.)}, tmp_path / "good.pt")
    good = (tmp_path / "good.pt").read_bytes()
    return {"pickle": pickle.dumps(Explosion()), "pickle as torch.save packs it": packed(0),
            "zip bomb": packed(zipfile.ZIP_DEFLATED), "truncated": good[:len(good) // 2],
            "flipped": bytes(b ^ 0x55 for b in good), "one bit flipped": one_bit(good),
            "empty": b"",
            "shared lists": shared_lists(tmp_path / "shared.pt"),
            "bytearray": packed(0, b"\x80\x02cbuiltins\nbytearray\nJ\x00\x2f\x68\x59\x85R."),
            "on no device": no_device(tmp_path / "meta.pt"), "text": b"no weights\n" * 9,
            "huge header (npy)": huge_npy(), "huge tensor": huge_torch(tmp_path / "huge.pt"),
            "huge sizes": far_apart(tmp_path / "far.pt"), "deep json": b"[" * 100_000,
            "json of another kind": b'{"a": [1, 2, {"b": null}]}'}


def test_hostile_files(world, tmp_path, monkeypatch, capsys, fault):
    """Every kind of hostile content in every place where a file of others is read: one sentence,
    status 2, nothing executed, less than a gigabyte."""
    import retrieve
    monkeypatch.chdir(tmp_path)
    os.symlink(HERE / "assets", tmp_path / "assets")
    contents, tried = hostile(tmp_path), 0
    (pathlib.Path("/proc/self/clear_refs")).write_text("5")     # the peak is counted from here
    before = peak_gib()
    (tmp_path / "Charades_v1_train.csv").write_text("id,length\n")
    (tmp_path / "Charades_v1_test.csv").write_text("id,length\n")
    (tmp_path / "answers.jsonl").write_text(
        '{"qid": 0, "query": "a", "vid": "v", "pred_relevant_windows": [[0, 1, 1]]}\n')
    (tmp_path / "videos").mkdir()
    rows = '{"vid": "v", "query": "a door", "relevant_windows": [[0, 1]], "duration": 9}\n'
    (tmp_path / "good.jsonl").write_text(rows)
    features = tmp_path / "features"
    features.mkdir()

    def commands(path):
        """A command for each way in which `path` is read."""
        yield evaluate, (path,)
        yield retrieve, (path, "video.mp4", "a door")
        yield data, ("mine", "--annotations", "good.jsonl", "--features", features, "--clip", path)
        for ending in (".jsonl", ".json", ".txt"):
            annotations = tmp_path / f"annotations{ending}"
            annotations.write_bytes(path.read_bytes())
            yield data, ("other", "--annotations", annotations, "--features", features, "--clip",
                         world / "shapes" / "clip.pt")
        for ending in (".npy", ".npz", ".pt"):
            for old in features.iterdir():
                old.unlink()
            (features / f"v{ending}").write_bytes(path.read_bytes())
            yield data, ("mine", "--annotations", "good.jsonl", "--features", features, "--clip",
                         world / "shapes" / "clip.pt")
        index = tmp_path / "index"
        index.mkdir(exist_ok=True)
        (index / "videos.json").write_bytes(path.read_bytes())
        yield retrieve, ("search", index, "a door")
        answers = tmp_path / "hostile.jsonl"
        answers.write_bytes(path.read_bytes())
        yield evaluate, ("--predictions", answers, "--truth", "good.jsonl")
        yield evaluate, ("--predictions", "answers.jsonl", "--truth", answers)

    for name, content in contents.items():
        path = tmp_path / "hostile.pt"
        path.write_bytes(content)
        for module, arguments in commands(path):
            status = leave(module, *arguments)
            printed, shown = capsys.readouterr()
            lines = [line for line in shown.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(lines) == 1, (name, module.__name__, arguments, shown)
            assert "Traceback" not in shown and len(lines[0]) < 1000, shown
            read = ("hostile.", "annotations.", "features/v.", "videos.json", "predictions are")
            assert any(part in printed + shown for part in read), shown     # it was this file
            assert not list(tmp_path.rglob("exploded")), (name, arguments)
            tried += 1
    assert peak_gib() - before < 1
    fault("hostile file: pickle, zip bomb, huge header, truncated, flipped",
          "in every place where a file of others is read: nothing executed, under 1 GB", tried)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "a\\b", "nul\0", ".hidden",
                                  ".."])
def test_names_that_leave_the_folder(world, tmp_path, monkeypatch, capsys, name, fault):
    """A video's name in an annotation file cannot lead elsewhere."""
    monkeypatch.chdir(tmp_path)
    row = {"vid": name, "query": "a door", "relevant_windows": [[0, 1]], "duration": 9}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "features").mkdir()
    store = video.FeatureStore.__new__(video.FeatureStore)
    store.folder = tmp_path
    with pytest.raises(ValueError, match="cannot be the name of a video"):
        store.path(name, "frames")
    before = set(tmp_path.parent.rglob("*"))
    assert leave(data, "mine", "--annotations", "a.jsonl", "--features", "features", "--clip",
                 world / "shapes" / "clip.pt") == 2
    assert "error: " in capsys.readouterr().err
    new = {path for path in set(tmp_path.parent.rglob("*")) - before if path.is_file()}
    assert all((tmp_path / "data") in path.parents for path in new)
    fault("a video's name that leads out of its folder", "../../x, absolute, NUL, hidden", 1)
