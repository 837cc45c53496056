"""What can go wrong with a run, and what is lost by it. These tests and their neighbours print the
table of docs/reliability.md at the end of pytest (`fault`)."""
import concurrent.futures
import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch

import evaluate
import mmn
from support import errors, files, progress

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = ROOT / "tests" / "programs"
SMALL = ("--epochs", "4", "--batch", "4", "--stage-steps", "6", "--device", "cpu", "--hidden", "16",
         "--joint", "16")


def run(*arguments, status: int = 0, env: dict | None = None, cwd: pathlib.Path = ROOT) -> str:
    """What a command prints to stdout or, if it fails, to stderr: then one sentence."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=600, errors="replace",
                          env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not status or done.stderr.count("error: ") == 1, done.stderr
    return done.stderr if status else done.stdout


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def log_of(folder: pathlib.Path) -> list[dict]:
    """The log without its times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").open(encoding="utf-8")]
    return [{k: v for k, v in row.items() if k not in ("minutes", "data %")} for row in rows]


# ------------------------------------------------------------------------------- stopped and killed

@pytest.fixture(scope="module")
def wholes(world, tmp_path_factory):
    """Runs that were not interrupted, by method."""
    folders = {method: tmp_path_factory.mktemp("whole") / "run" for method in ("mmn", "vdi-staged")}
    for method, folder in folders.items():
        run("train.py", "--root", world, *SMALL, "--method", method, "--out", folder,
            env={"OMP_NUM_THREADS": "1"})
    return folders


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes["vdi-staged"]


@pytest.mark.parametrize("name, number, times, method", [
    ("SIGKILL", signal.SIGKILL, 10, "vdi-staged"), ("SIGINT (Ctrl-C)", signal.SIGINT, 5, "mmn")])
def test_an_interrupted_run_ends_with_the_same_bits(world, tmp_path, wholes, fault, name, number,
                                                    times, method):
    """Each attempt is stopped at a random step, sometimes after the end of an epoch."""
    folder, whole = tmp_path / "run", wholes[method]
    most = 7                            # an epoch and stage 1 have six steps each
    out = run(PROGRAMS / "stopped.py", int(number), times, most, "--root", world, *SMALL,
              "--method", method, "--out", folder, env={"OMP_NUM_THREADS": "1"})
    statuses = [int(s) for s in out.split("statuses", 1)[1].split()]
    expected = -signal.SIGKILL if number == signal.SIGKILL else 130
    assert statuses == [expected] * times + [0] and "resuming after epoch" in out
    a, b = weights(whole), weights(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert log_of(whole) == log_of(folder)
    assert (whole / "results.json").read_bytes() == (folder / "results.json").read_bytes()
    fault(f"{name} during training", "at a random step, then `--resume`: weights, log and metrics "
          "are bit-identical to an uninterrupted run", times, "the steps since the last epoch")


def test_a_failed_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, fault):
    """A full disk when the file is opened, written (at every piece), flushed, and renamed."""
    path = tmp_path / "last.pt"
    files.save_tensors(path, {"weights": torch.arange(1000.)})
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    tried = 0

    def fails(*arguments, **more):
        raise full

    for module, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(OSError, match="No space"):
                files.save_tensors(path, {"weights": torch.zeros(1000)})
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
        tried += 1
    for after in range(0, 6000, 200):
        def write(file):
            content = bytes(5000)
            file.write(content[:after])
            if after < 5800:
                raise full
        with contextlib.suppress(OSError):
            files.save(path, write)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == (before if after < 5800 else bytes(5000))
        tried += 1
    fault("disk full while a checkpoint is written", "the write fails at every stage; the previous "
          "checkpoint is intact", tried, "the epoch that could not be written")


def test_a_file_that_cannot_grow(world, tmp_path, fault):
    """The system refuses to write more of last.pt: one sentence, and the best epoch is intact."""
    def fill_and_resume(most):
        folder = tmp_path / str(most)
        arguments = ("--root", world, *SMALL, "--method", "mmn", "--out", folder)
        message = run(PROGRAMS / "full.py", most, *arguments, status=2)
        assert "File too large" in message
        assert sorted(path.name for path in folder.iterdir()) == ["ckpt.pt", "log.jsonl"]
        assert evaluate.load(folder / "ckpt.pt").checkpoint["epoch"] == 1
        assert "another hidden" in run("train.py", *arguments, "--hidden", 8, "--resume", status=2)
        run("train.py", *arguments, "--resume", "--epochs", 4)
        assert [row["epoch"] for row in log_of(folder)] == [1, 2, 3, 4]

    sizes = (0, 5000, 100_000)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:      # both cores
        list(pool.map(fill_and_resume, sizes))
    fault("disk full in the middle of last.pt", "a limit on the size of files, then `--resume`",
          len(sizes), "the epoch that could not be written")


def test_ctrl_c_with_workers(world, tmp_path, fault):
    """A terminal sends it to the workers that read features, too, which leave it to the process
    that trains: one sentence, and the last finished epoch is intact."""
    done = subprocess.run(
        [sys.executable, PROGRAMS / "interrupted.py", "--root", world, *SMALL, "--method", "mmn",
         "--workers", "2", "--out", tmp_path / "run"], cwd=ROOT, text=True, capture_output=True,
        start_new_session=True, timeout=600, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.endswith("\ninterrupted; completed work has been saved\n"), done.stderr
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["epoch"] == 1
    fault("SIGINT (Ctrl-C) to the whole process group", "with two workers that read features", 1,
          "the steps since the last epoch")


@pytest.mark.parametrize("sentences", [1, 3000])        # in Python's buffer, and beyond it
def test_a_pipe_that_is_closed_early(sentences, fault):
    """As in `python parse.py ... | head -1`: quiet, with a shell's status for SIGPIPE."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "parse.py", *["a door"] * sentences], cwd=ROOT,
                          stdout=write, stderr=subprocess.PIPE, timeout=600)
    os.close(write)
    assert done.returncode == 141 and done.stderr == b"", done.stderr
    fault("a pipe whose reader has left, as in `| head -1`", "status 141, nothing is printed", 1)


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    progress.new_folder(tmp_path, True)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_configuration_is_rejected(world, tmp_path, whole, fault):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    message = run("train.py", "--root", world, *SMALL, "--out", whole, "--seed", "3", "--resume",
                  status=2)
    assert "another seed" in message
    assert "--resume" in run("train.py", "--root", world, *SMALL, "--out", whole, status=2)
    assert before == {path: path.read_bytes() for path in whole.iterdir()}
    fault("a folder that holds another run", "with and without `--resume`", 2)


# ------------------------------------------------------------------------------------------ numbers

def test_a_loss_that_is_not_finite_saves_its_batch(world, tmp_path, fault):
    message = run(PROGRAMS / "nan.py", "--root", world, *SMALL, "--method", "mmn", "--out",
                  tmp_path / "run", status=2)
    assert "L_iou is nan for the videos" in message and "nonfinite-0.pt" in message
    kept = torch.load(tmp_path / "run" / "nonfinite-0.pt", weights_only=True)
    assert kept["term"] == "L_iou" and kept["batch"]["frames"][0].isnan().all()
    assert all(name in message for name in kept["batch"]["videos"])
    fault("a feature that is not finite", "the message names the loss term and the videos; the "
          "batch is saved", 1, "the steps since the last epoch")


def test_scores_that_are_not_finite_stop_the_evaluation(world, tmp_path, whole):
    saved = torch.load(whole / "ckpt.pt", weights_only=True)
    saved["retriever"]["iou_text.bias"].fill_(float("nan"))
    torch.save(saved, tmp_path / "ckpt.pt")
    assert "scores are not finite" in run("evaluate.py", tmp_path / "ckpt.pt", status=2)


few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@few
@hypothesis.given(st.data())
def test_recall_equals_a_loop(data):
    """Any answers, ties, empty answers, moments that span the whole video."""
    S, K = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    instant = st.sampled_from([0.0, 1.0, 2.0, 2.5, 5.0, 10.0])

    def interval():
        return sorted((data.draw(instant), data.draw(instant)))

    predicted = torch.tensor([[interval() for _ in range(K)] for _ in range(S)])
    truth = torch.tensor([interval() for _ in range(S)])

    def iou(a, b):
        overlap = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
        union = (a[1] - a[0]) + (b[1] - b[0]) - overlap
        return overlap / union if union > 0 else 0.0

    found = evaluate.recall(predicted, truth)
    for k in (1, 5):
        for mu in (0.5, 0.7):
            hits = [max(iou(p, t) for p in row[:k]) >= mu
                    for row, t in zip(predicted.tolist(), truth.tolist())]
            assert found[f"R@{k},IoU={mu}"] == pytest.approx(100 * sum(hits) / S)


@few
@hypothesis.given(st.integers(1, 9), st.integers(1, 6), st.sampled_from([0.0, 0.3, 0.5, 1.0]),
                  st.integers(0, 10 ** 6), st.booleans())
def test_decoding_does_not_depend_on_the_batch(N, top_k, nms, seed, ties):
    """Each query has the same moments alone, in any order and in a batch; no two of them overlap by
    more than `nms`; one clip, tied scores and fewer candidates than answers are valid."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(4, N, N, generator=generator)
    scores = scores.mul(3).round() if ties else scores
    durations_sec = torch.full((4,), 10.0)
    found = mmn.decode(scores, durations_sec, top_k, nms)
    for s in (3, 1, 0, 2):
        assert torch.equal(mmn.decode(scores[s:s + 1], durations_sec[s:s + 1], top_k, nms)[0],
                           found[s])
        answers = [row for row in found[s] if row[2] > -torch.inf]
        assert 1 <= len(answers) and found[s, 0, 2] == scores[s].triu().max()
        for i, a in enumerate(answers):
            assert 0 <= a[0] < a[1] <= 10 + 1e-5
            for b in answers[:i]:
                assert nms >= 1 or mmn.interval_iou(a[:2], b[:2]) <= nms + 1e-6


@few
@hypothesis.given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 10 ** 6))
def test_one_clip_one_video_and_moments_of_the_whole_video(N, B, seed):
    """Losses are finite, and independent of the order of videos and sentences."""
    torch.manual_seed(seed)
    model = mmn.MMN(6, N, 2, 2, (N - 1,) if N > 1 else (), 3, 2, 8, 4).double().eval()
    frames, text = torch.randn(B, 2 * N, 6).double(), torch.randn(2 * B, 6).double()
    video_of = torch.arange(B).repeat(2)
    moments_sec = torch.tensor([[0.0, 8.0]]).repeat(2 * B, 1).double()
    moments_sec[B:, 1] = 3.0
    iou = model.at_candidates(mmn.iou_map(moments_sec, torch.full((2 * B,), 8.0), N))

    def losses(order):
        overlaps, contrasts = model.moments(frames)
        a, b = model.sentences(text[order])
        scores = mmn.overlap_scores(overlaps, a, video_of[order])
        return (mmn.iou_loss(scores, iou[order]) + mmn.contrastive_loss(
            contrasts, b, iou[order], video_of[order], moments_sec[order]))

    order = torch.randperm(2 * B)
    first, second = losses(torch.arange(2 * B)), losses(order)
    assert first.isfinite().all() and torch.allclose(first[order], second, atol=1e-9)


# ---------------------------------------------------------------------------------- the environment

def test_no_gpu(world, tmp_path, fault):
    message = run("train.py", "--root", world, *SMALL[:-6], "--device", "cuda:7", "--out",
                  tmp_path / "run", status=2)
    assert "device 'cuda:7' is not available" in message
    fault("a GPU that does not exist", "`--device cuda:7`", 1)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), MemoryError()])
def test_out_of_memory_names_what_to_lower(capsys, error, fault):
    with pytest.raises(SystemExit) as left, errors.reported():
        raise error
    assert left.value.code == 2 and "lower --batch" in capsys.readouterr().err
    fault("out of memory", "simulated, of Python or a GPU: the message names `--batch`", 1,
          "the steps since the last epoch")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   PermissionError(errno.EACCES, "Permission denied", "a.txt"),
                                   errors.Mistake("there is no a.txt; name a file that exists")])
def test_what_the_user_can_fix_is_one_sentence(capsys, error):
    with pytest.raises(SystemExit) as left, errors.reported():
        raise error
    assert left.value.code == 2 and capsys.readouterr().err == f"error: {error}\n"


@pytest.mark.parametrize("name", ["KeyError", "RuntimeError", "ValueError"])
def test_a_bug_shows_its_traceback(name, fault):
    """Status 1 and Python's traceback, so that a bug is not taken for a mistake of the user's."""
    done = subprocess.run([sys.executable, PROGRAMS / "bug.py", name], capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith("Traceback"), done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"{name}: ") and "bug.py" in done.stderr
    assert not any(line.startswith("error:") for line in done.stderr.splitlines())
    fault("a bug in the code", "status 1 and a traceback; a mistake has status 2 and a sentence", 1,
          "the steps since the last epoch")


def test_a_value_that_is_not_valid(world, tmp_path, fault):
    (tmp_path / "data").symlink_to(world)
    message = run(ROOT / "train.py", "--root", "data", *SMALL, "--frames", 64, status=2,
                  cwd=tmp_path)
    assert "frames" in message
    fault("an option with an invalid value", "`--frames`", 1)


def test_a_path_with_spaces_letters_and_no_utf8(world, tmp_path, whole, fault):
    """Everything in "mé 视频", the locale is C, and there is no home."""
    folder = tmp_path / "mé 视频"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "shapes").symlink_to(world / "shapes")
    env = {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "HOME": "/nonexistent",
           "PYTHONCOERCECLOCALE": "0"}
    run("train.py", "--root", folder / "data", *SMALL, "--epochs", 1, "--out", folder / "run",
        env=env)
    run("evaluate.py", folder / "run" / "ckpt.pt", env=env)
    message = run("evaluate.py", folder / "no.pt", status=2, env=env)
    assert "there is no checkpoint" in message
    fault("a path with spaces and non-Latin letters, locale C, no home directory",
          "train, evaluate, and a mistake", 3)


def test_a_folder_that_cannot_be_written(world, tmp_path, fault):
    """A file with the name of the folder (permissions do not stop root)."""
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    message = run("train.py", "--root", world, *SMALL, "--out", tmp_path / "file" / "run", status=2)
    assert "Not a directory" in message and (tmp_path / "file").read_bytes() == b"mine"
    fault("an output folder that cannot be written", "a file in its place", 1)


@pytest.mark.parametrize("module, missing, arguments, told", [
    ("extras.prepare", "imageio_ffmpeg", ("mine", "--annotations", "a.jsonl", "--videos", "videos"),
     "pip install imageio-ffmpeg"),
    ("parse", "spacy", ("a person opens the door",), "pip install"),
    ("train", "imageio_ffmpeg", (), None), ("train", "matplotlib", (), None),
    ("train", "spacy", (), None)])
def test_without_a_package(world, tmp_path, module, missing, arguments, told, fault):
    """A command that needs the package reports it; training on the shapes world needs none."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    row = {"vid": "a", "query": "a", "relevant_windows": [[0, 1]]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    arguments = arguments or ("--root", world, *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    printed = run(PROGRAMS / "without.py", module, missing, *arguments, status=2 if told else 0,
                  cwd=tmp_path if told else ROOT)
    assert not told or told in printed
    fault(f"{missing} is not installed", "the command that needs it reports it, the others run", 1)


def test_control_characters_do_not_reach_the_terminal(tmp_path, fault):
    message = run("evaluate.py", tmp_path / "\x1b[2Jckpt\x07.pt", status=2)
    assert "\x1b" not in message and "\\x1b[2Jckpt\\x07.pt" in message
    assert "\x1b" not in run("parse.py", "a person \x1b[2J opens\x9b the door")
    fault("terminal escapes in file names and sentences", "printed as text", 2)


def test_deterministic_and_the_header(world, tmp_path):
    text = run(PROGRAMS / "deterministic.py", "--root", world, *SMALL, "--epochs", 1,
               "--deterministic", "--out", tmp_path / "run")
    assert text.endswith("deterministic True\n")
    assert f"torch {torch.__version__}  numpy {numpy.__version__}  commit" in text
    assert "cpu  " in text and "threads" in text
