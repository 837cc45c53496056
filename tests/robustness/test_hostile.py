"""Files made to do harm, in every place where a file of others is read: nothing in them is
executed, no memory is allocated for what they only claim, and the user gets one sentence. And
files of a dataset that are damaged."""
import io
import json
import os
import pathlib
import pickle
import runpy
import shutil
import sys
import zipfile

import numpy as np
import pytest
import torch

import clip
import data

ROOT = pathlib.Path(__file__).parents[2]


class Explosion:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def peak_gib() -> float:
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc to see its memory")
    return int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) / 2 ** 20


def leave(module: str, *arguments) -> int:
    """The exit status of a command, in this process."""
    before = sys.argv
    sys.argv = [module, *map(str, arguments)]
    try:
        runpy.run_module(module, run_name="__main__")
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


def checkpoint(text: dict, sizes: dict, **more) -> dict:
    """What train.py saves, so far as evaluate.load reads it."""
    return {"config": {"retriever": "mmn"}, "metrics": {}, "sizes": sizes, "retriever": {},
            "window_sec": 1.0, "parser": "by construction", "text": text, **more}


def huge_torch(path: pathlib.Path) -> bytes:
    """One number that claims to be 10^12, where a weight belongs."""
    text = {"token_embedding.weight": torch.zeros(1).expand(10 ** 6, 10 ** 6)}
    torch.save(checkpoint(text, {}), path)
    return path.read_bytes()


def far_apart(path: pathlib.Path) -> bytes:
    """A list of layers whose largest index is 10^9, and sizes that would take a terabyte."""
    text = {f"transformer.resblocks.{10 ** 9}.ln_1.weight": torch.zeros(4),
            "token_embedding.weight": torch.zeros(1, 10 ** 5),
            "positional_embedding": torch.zeros(1, 10 ** 5),
            "text_projection": torch.zeros(10 ** 5, 1)}
    sizes = dict(width=10 ** 5, num_clips=10 ** 5, pool_counts=(3,), pool_kernel=2, pool_stride=2,
                 kernel=3, layers=1, hidden=10 ** 5, joint=3)
    torch.save(checkpoint(text, sizes, **text), path)
    return path.read_bytes()


def many_candidates(path: pathlib.Path) -> bytes:
    """Sizes that pass for those of a retriever, but whose weights would take a terabyte."""
    sizes = dict(width=10 ** 5, num_clips=512, pool_counts=(511,), pool_kernel=2, pool_stride=2,
                 kernel=301, layers=0, hidden=10 ** 6, joint=10 ** 6)
    torch.save(checkpoint({}, sizes), path)
    return path.read_bytes()


def many_centres(path: pathlib.Path) -> bytes:
    """A checkpoint of clip2video whose settings would take two gigabytes, or a minute."""
    text = clip.TextTower(12, 8, 16, 1, 2, 16, clip.QuickGELU)
    text.transformer.register_buffer("heads", torch.tensor(2))
    state = {f"text.{key}": value for key, value in text.state_dict().items()}
    config = {"variant": "both", "centres": 15_000_000, "layers": 10_000}
    torch.save({"config": config, "model": state, "clip_sha256": "0" * 64}, path)
    return path.read_bytes()


def shared_lists(path: pathlib.Path) -> bytes:
    """A list that contains itself 2^60 times, so to speak."""
    value: list = [torch.zeros(1)]
    for _ in range(60):
        value = [value, value]
    torch.save({"config": value, "text": value}, path)
    return path.read_bytes()


def no_device(path: pathlib.Path) -> bytes:
    """A tensor of a terabyte on no device."""
    torch.save({"token_embedding.weight": torch.empty(10 ** 6, 10 ** 6, device="meta")}, path)
    return path.read_bytes()


def hostile(tmp_path: pathlib.Path) -> dict[str, bytes]:
    def one_bit(content: bytes) -> bytes:
        place = content.index(np.arange(1000, dtype=np.float32).tobytes()) + 2001
        return content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]

    def packed(compress: int, content: bytes = pickle.dumps(Explosion(), 2)) -> bytes:
        """A pickle in the form of torch.save, with 4 GB of zeros if compressed."""
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", compress, compresslevel=1) as file:
            file.writestr("archive/data.pkl", content)
            file.writestr("archive/version", "3\n")
            if compress:
                with file.open("archive/data/0", "w", force_zip64=True) as part:
                    for _ in range(256):
                        part.write(bytes(1 << 24))
            for part in file.infolist():
                part.external_attr = 0          # as torch.save leaves it
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
            "huge sizes": far_apart(tmp_path / "far.pt"),
            "huge weights": many_candidates(tmp_path / "many.pt"),
            "deep json": b"[" * 100_000, "json of another kind": b'{"a": [1, 2, {"b": null}]}',
            "huge settings": many_centres(tmp_path / "centres.pt")}


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
def test_hostile_files(world, tmp_path, monkeypatch, capsys, fault):
    """Every kind of hostile content in every place where a file of others is read: one sentence,
    status 2, nothing executed, less than a gigabyte."""
    monkeypatch.chdir(tmp_path)
    os.symlink(ROOT / "assets", tmp_path / "assets")
    contents, tried = hostile(tmp_path), 0
    pathlib.Path("/proc/self/clear_refs").write_bytes(b"5")     # the peak is counted from here
    before = peak_gib()
    (tmp_path / "Charades_v1_train.csv").write_bytes(b"id,length\n")
    (tmp_path / "Charades_v1_test.csv").write_bytes(b"id,length\n")
    (tmp_path / "answers.jsonl").write_bytes(
        b'{"qid": 0, "query": "a", "vid": "v", "pred_relevant_windows": [[0, 1, 1]]}\n')
    (tmp_path / "videos").mkdir()
    (tmp_path / "video.mp4").touch()        # retrieve.py looks for it before it reads a checkpoint
    rows = '{"vid": "v", "query": "a door", "relevant_windows": [[0, 1]], "duration": 9}\n'
    (tmp_path / "good.jsonl").write_text(rows, encoding="utf-8")
    features = tmp_path / "features"
    features.mkdir()

    def commands(path):
        """A command for each way in which `path` is read."""
        yield "evaluate", (path,)
        yield "retrieve", (path, "video.mp4", "a door")
        yield "clip2video", ("evaluate", path)
        yield "data", ("mine", "--annotations", "good.jsonl", "--features", features, "--clip",
                       path)
        for ending in (".jsonl", ".json", ".txt"):
            annotations = tmp_path / f"annotations{ending}"
            annotations.write_bytes(path.read_bytes())
            yield "data", ("other", "--annotations", annotations, "--features", features, "--clip",
                           world / "shapes" / "clip.pt")
        for ending in (".npy", ".npz", ".pt"):
            for old in features.iterdir():
                old.unlink()
            (features / f"v{ending}").write_bytes(path.read_bytes())
            yield "data", ("mine", "--annotations", "good.jsonl", "--features", features, "--clip",
                           world / "shapes" / "clip.pt")
        index = tmp_path / "index"
        index.mkdir(exist_ok=True)
        (index / "videos.json").write_bytes(path.read_bytes())
        yield "extras.search", (index, "a door")
        (index / "clip2video.json").write_bytes(path.read_bytes())
        yield "clip2video", ("search", index, "a door")
        answers = tmp_path / "hostile.jsonl"
        answers.write_bytes(path.read_bytes())
        yield "evaluate", ("--predictions", answers, "--truth", "good.jsonl")
        yield "evaluate", ("--predictions", "answers.jsonl", "--truth", answers)

    for name, content in contents.items():
        path = tmp_path / "hostile.pt"
        path.write_bytes(content)
        for module, arguments in commands(path):
            status = leave(module, *arguments)
            printed, shown = capsys.readouterr()
            lines = [line for line in shown.splitlines() if line.startswith("error: ")]
            assert status == 2 and len(lines) == 1, (name, module, arguments, shown)
            assert "Traceback" not in shown and len(lines[0]) < 1000, shown
            read = ("hostile.", "annotations.", "features/v.", "videos.json", "clip2video.json",
                    "the predictions do not match", "not the weights of a CLIP")
            assert any(part in printed + shown for part in read), shown     # it was this file
            assert not list(tmp_path.rglob("exploded")), (name, arguments)
            tried += 1
            assert peak_gib() - before < 1, (name, module, arguments)
    fault("a hostile file: pickle, zip bomb, huge header, huge sizes, truncated, flipped",
          "in every place where a file of others is read: one sentence, nothing is executed, less "
          "than 1 GB is allocated", tried)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "a\\b", "nul\0", ".hidden",
                                  ".."])
def test_names_that_leave_the_folder(world, tmp_path, monkeypatch, capsys, name, fault):
    """A video's name in an annotation file cannot lead to another folder."""
    monkeypatch.chdir(tmp_path)
    row = {"vid": name, "query": "a door", "relevant_windows": [[0, 1]], "duration": 9}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "features").mkdir()
    store = data.FeatureStore.__new__(data.FeatureStore)
    store.folder = tmp_path
    with pytest.raises(ValueError, match="cannot be the name of a video"):
        store.path(name, "frames")
    before = set(tmp_path.parent.rglob("*"))
    assert leave("data", "mine", "--annotations", "a.jsonl", "--features", "features", "--clip",
                 world / "shapes" / "clip.pt") == 2
    assert "error: " in capsys.readouterr().err
    new = {path for path in set(tmp_path.parent.rglob("*")) - before if path.is_file()}
    assert all((tmp_path / "data") in path.parents for path in new)
    fault("a video name that leads out of its folder", "`../../x`, absolute, NUL, hidden", 1)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["train.jsonl", "events.json", "chunks.json", "manifest.json"])
def test_damaged_files_of_a_dataset(world, tmp_path, capsys, name, fault):
    """The sentence names the file."""
    shutil.copytree(world / "shapes", tmp_path / "data" / "shapes")
    path = next((tmp_path / "data" / "shapes").rglob(name))
    path.write_bytes(path.read_bytes()[:-2])
    assert leave("train", "--root", tmp_path / "data", "--method", "mmn", "--epochs", 1, "--hidden",
                 16, "--joint", 16, "--device", "cpu", "--out", tmp_path / "run") == 2
    shown = capsys.readouterr().err
    assert shown.count("error: ") == 1 and name in shown
    fault("a damaged file of a dataset", "annotations, events, noun chunks or manifest, truncated: "
          "one sentence that names the file", 1)
