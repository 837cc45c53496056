"""What can go wrong with a run, and what is lost by it. The table that pytest prints at its end,
and that stands in the README, is made of these tests (`fault`)."""
import contextlib
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import command
import evaluate
import mmn
import train

HERE = pathlib.Path(__file__).parent.parent
SMALL = ("--epochs", "4", "--batch", "4", "--stage-steps", "6", "--device", "cpu", "--hidden", "16",
         "--joint", "16")

# Runs train.py again and again in children of one process, each stopped at a step drawn at random,
# until one ends. Prints the exit statuses.
STOPPED = """
import os, random, signal, sys
import torch
torch.set_num_threads(1)
import command, train
number, most, steps_at_most, *argv = sys.argv[1:]
draw, statuses = random.Random(0), []
while len(statuses) <= int(most):
    when = draw.randint(1, int(steps_at_most)) if len(statuses) < int(most) else 10 ** 9
    child = os.fork()
    if not child:
        steps, clip_norm = [0], train.nn.utils.clip_grad_norm_
        def count(*arguments):
            steps[0] += 1
            if steps[0] == when:
                os.kill(os.getpid(), int(number))
            return clip_norm(*arguments)
        train.nn.utils.clip_grad_norm_ = count
        sys.argv = ["train.py", *argv, "--resume"]
        try:
            train.main()
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code or 0)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    statuses.append(os.waitstatus_to_exitcode(status))
    if statuses[-1] == 0:
        break
print("statuses", *statuses)
"""


def run(*arguments, status: int = 0, env: dict | None = None, cwd: pathlib.Path = HERE) -> str:
    """What a command prints to stderr (to stdout, where it succeeds). A failure is one sentence."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True,
                          text=True, timeout=600, errors="replace",
                          env={**os.environ, **(env or {})})
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert not status or done.stderr.count("error: ") == 1, done.stderr
    return done.stderr if status else done.stdout


def weights(folder: pathlib.Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "last.pt", weights_only=True)["model"]


def log_of(folder: pathlib.Path) -> list[dict]:
    """The log without its times."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("minutes", "data %")} for row in rows]


# ------------------------------------------------------------------------------- stopped and killed

@pytest.fixture(scope="module")
def wholes(world, tmp_path_factory):
    """Runs that nothing stopped, by method."""
    folders = {method: tmp_path_factory.mktemp("whole") / "run" for method in ("mmn", "vdi-staged")}
    for method, folder in folders.items():
        run("train.py", "--root", world, *SMALL, "--method", method, "--out", folder,
            env={"OMP_NUM_THREADS": "1"})
    return folders


@pytest.fixture(scope="module")
def whole(wholes):
    return wholes["vdi-staged"]


@pytest.mark.parametrize("name, number, times, method", [
    ("SIGKILL", signal.SIGKILL, 10, "vdi-staged"), ("SIGTERM", signal.SIGTERM, 5, "mmn"),
    ("SIGINT (Ctrl-C)", signal.SIGINT, 5, "mmn"), ("SIGTERM", signal.SIGTERM, 1, "vdi-staged")])
def test_a_stopped_run_ends_in_the_same_bits(world, tmp_path, wholes, fault, name, number, times,
                                             method):
    folder, whole = tmp_path / "run", wholes[method]
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    # an epoch and stage 1 have six steps each: SIGKILL, after which an epoch begins anew, may come
    # after it; the others come within
    most = 7 if number == signal.SIGKILL else 5
    out = run(script, int(number), times, most, "--root", world, *SMALL, "--method", method,
              "--out", folder, env={"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"})
    assert (" and 4 steps" in out) == (method == "mmn")         # went on in the midst of an epoch
    statuses = [int(s) for s in out.split("statuses", 1)[1].split()]
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    assert statuses[-1] == 0 and statuses[:-1] == [expected] * times
    a, b = weights(whole), weights(folder)
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert log_of(whole) == log_of(folder)
    assert (whole / "results.json").read_text() == (folder / "results.json").read_text()
    lost = ("the steps since the last epoch" if number == signal.SIGKILL else "nothing"
            if method == "mmn" else "stage 1, which begins again")
    where = "in stage 1" if "stage 1" in lost else "during training"
    fault(f"{name} {where}", "at a random step, then --resume: same weights, log and metrics to "
          "the bit", len(statuses) - 1, lost)


def test_a_write_that_fails_leaves_the_checkpoint_before_it(tmp_path, monkeypatch, fault):
    """A full disk when the file is opened, written (at every piece), flushed, and renamed."""
    path = tmp_path / "last.pt"
    train.save(path, {"weights": torch.arange(1000.)})
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    tried = 0

    def fails(*arguments, **more):
        raise full

    for module, name in ((os, "fsync"), (os, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(OSError, match="No space"):
                train.save(path, {"weights": torch.zeros(1000)})
        assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
        tried += 1
    for after in range(0, 6000, 200):
        def write(file):
            content = bytes(5000)
            file.write(content[:after])
            if after < 5800:
                raise full
        with contextlib.suppress(OSError):
            command.save(path, write)
        assert list(tmp_path.iterdir()) == [path]
        assert path.read_bytes() == (before if after < 5800 else bytes(5000))
        tried += 1
    fault("disk full while a checkpoint is written", "the write fails at every stage; the one "
          "before it is whole", tried, "the epoch that could not be written")


FULL = """
import resource, signal, sys
import command
most = int(sys.argv.pop(1))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save = command.save
def small(path, write):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most if path.name == "last.pt" else -1, -1))
    save(path, write)
command.save = small
import train
train.main()
"""


@pytest.mark.parametrize("most", [0, 5000, 100_000])
def test_a_file_that_may_not_grow(world, tmp_path, most, fault):
    """The system refuses to write on within torch.save: one sentence, and the epoch before is
    whole."""
    (tmp_path / "full.py").write_text(FULL)
    arguments = ("--root", world, *SMALL, "--method", "mmn", "--out", tmp_path / "run")
    message = run(tmp_path / "full.py", most, *arguments, status=2, env={"PYTHONPATH": str(HERE)})
    assert "File too large" in message
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "ckpt.pt", "lock", "log.jsonl"]
    assert evaluate.load(tmp_path / "run" / "ckpt.pt").checkpoint["epoch"] == 1
    assert "another hidden" in run("train.py", *arguments, "--hidden", 8, "--resume", status=2)
    run("train.py", *arguments, "--resume", "--epochs", 4)
    assert [row["epoch"] for row in log_of(tmp_path / "run")] == [1, 2, 3, 4]
    fault("disk full within torch.save", "the system lets the file grow no more; then --resume", 1)


def test_signal_to_the_whole_group_with_workers(world, tmp_path):
    """As torchrun and batch systems send it: the processes that read features leave it to the one
    that trains, which saves."""
    process = subprocess.Popen(
        [sys.executable, "train.py", "--root", str(world), *SMALL, "--method", "mmn", "--workers",
         "2", "--epochs", "400", "--out", str(tmp_path / "run")], cwd=HERE, text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    until = time.time() + 240
    while not (tmp_path / "run" / "last.pt").exists() and time.time() < until:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, shown = process.communicate(timeout=120)
    assert process.returncode == 143 and "go on with --resume" in shown, shown
    saved = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert saved["epoch"] >= 1 and 0 <= saved["done"] <= 6


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    (tmp_path / ".last.pt.123.tmp").write_bytes(b"half")
    with command.locked(tmp_path, True):
        assert [path.name for path in tmp_path.iterdir()] == [command.LOCK]


def test_two_processes_on_one_folder(world, tmp_path, fault):
    """The first has the folder, the second says so, also where both are told to resume."""
    with command.locked(tmp_path / "run", False):
        message = run("train.py", "--root", world, *SMALL, "--out", tmp_path / "run", "--resume",
                      status=2)
    assert "another process is writing into" in message
    assert [p.name for p in (tmp_path / "run").iterdir()] == [command.LOCK]
    fault("two runs into one folder", "both started; one wins, the other says why", 1)


def test_a_folder_of_another_configuration_is_refused(world, tmp_path, whole, fault):
    before = {path: path.read_bytes() for path in whole.iterdir()}
    message = run("train.py", "--root", world, *SMALL, "--out", whole, "--seed", "3", "--resume",
                  status=2)
    assert "another seed" in message
    assert "--resume" in run("train.py", "--root", world, *SMALL, "--out", whole, status=2)
    assert before == {path: path.read_bytes() for path in whole.iterdir()}
    fault("a folder that holds another run", "with and without --resume", 2)


# ------------------------------------------------------------------------------------------ numbers

def test_a_loss_that_is_not_finite_leaves_its_batch(world, tmp_path, fault):
    root = tmp_path / "data"
    root.mkdir()
    (root / "shapes").symlink_to(world / "shapes")
    script = tmp_path / "nan.py"
    script.write_text("import data, train\n"
                      "collate = data.Videos.collate\n"
                      "def broken(self, items):\n"
                      "    batch = collate(self, items)\n"
                      "    if self.store is not None and len(items) == 4:\n"
                      "        batch.frames[0] = float('nan')\n"
                      "    return batch\n"
                      "data.Videos.collate = broken\n"
                      "train.main()\n")
    message = run(script, "--root", root, *SMALL, "--method", "mmn", "--out", tmp_path / "run",
                  status=2, env={"PYTHONPATH": str(HERE)})
    assert "L_iou is nan for the videos" in message and "nonfinite-0.pt" in message
    kept = torch.load(tmp_path / "run" / "nonfinite-0.pt", weights_only=True)
    assert kept["term"] == "L_iou" and kept["batch"]["frames"][0].isnan().all()
    assert all(name in message for name in kept["batch"]["videos"])
    fault("a feature that is no number", "the term and the videos are named, the batch is kept", 1)


def test_scores_that_are_not_finite_stop_the_evaluation(world, tmp_path, whole):
    saved = torch.load(whole / "ckpt.pt", weights_only=True)
    saved["retriever"]["iou_text.bias"].fill_(float("nan"))
    torch.save(saved, tmp_path / "ckpt.pt")
    assert "scores are not finite" in run("evaluate.py", tmp_path / "ckpt.pt", status=2)


few = hypothesis.settings(max_examples=60, deadline=None, derandomize=True)


@few
@hypothesis.given(st.data())
def test_recall_equals_a_loop(data):
    """Any answers, ties, empty answers, moments of the whole video."""
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
def test_decoding_does_not_depend_on_batch_mates(N, top_k, nms, seed, ties):
    """Each query alone, in any order and among others has the same moments; no two of them overlap
    by more than `nms`; one clip, tied scores, and fewer candidates than answers are fine."""
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
    assert "there is no device 'cuda:7' here" in message
    fault("a GPU that is not there", "--device cuda:7", 1)


def test_out_of_memory_names_what_to_lower(capsys):
    with pytest.raises(SystemExit) as error, command.sentences():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    assert error.value.code == 2 and "lower --batch" in capsys.readouterr().err


def test_a_fault_of_ours_is_told_from_a_mistake(capsys, monkeypatch):
    """Status 1 and the place in the code; the traceback is there for whoever asks for it."""
    for work in (lambda: {}["key"], lambda: torch.ones(2) @ torch.ones(3)):
        with pytest.raises(SystemExit) as error, command.sentences():
            work()
        shown = capsys.readouterr().err
        assert error.value.code == 1 and "should not have happened" in shown
        assert "test_faults.py, line" in shown and "Traceback" not in shown
    monkeypatch.setenv("VDI_TRACEBACK", "1")
    with pytest.raises(SystemExit), command.sentences():
        {}["key"]
    assert "Traceback" in capsys.readouterr().err


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
    fault("path with spaces and other letters, locale C, no home", "train, evaluate, a mistake", 3)


def test_a_folder_that_cannot_be_written(world, tmp_path, fault):
    """A file stands where the folder should be (permissions do not stop root)."""
    (tmp_path / "file").write_text("mine")
    message = run("train.py", "--root", world, *SMALL, "--out", tmp_path / "file" / "run", status=2)
    assert "Not a directory" in message and (tmp_path / "file").read_text() == "mine"
    fault("a folder that cannot be written", "a file in its place", 1)


WITHOUT = """
import sys
missing = sys.argv[1]
class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == missing:
            raise ImportError("No module named " + name)
sys.meta_path.insert(0, Blocked())
import {0}
sys.argv[:2] = ["{0}.py"]
{0}.main()
"""


@pytest.mark.parametrize("module, missing, arguments, told", [
    ("data", "av", ("mine", "--annotations", "a.jsonl", "--videos", "videos"), "pip install av"),
    ("shapes", "matplotlib", ("--show", "a.png"), "pip install matplotlib"),
    ("train", "av", (), None), ("train", "matplotlib", (), None)])
def test_without_a_package(world, tmp_path, module, missing, arguments, told, fault):
    """What needs the package says so; training needs neither."""
    (tmp_path / "without.py").write_text(WITHOUT.format(module))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "a.jsonl").write_text('{"vid": "a", "query": "a", "relevant_windows": [[0, 1]]}\n')
    arguments = arguments or ("--root", world, *SMALL, "--epochs", 1, "--out", tmp_path / "run")
    printed = run(tmp_path / "without.py", missing, *arguments, status=2 if told else 0,
                  env={"PYTHONPATH": str(HERE)}, cwd=tmp_path if told else HERE)
    assert not told or told in printed
    fault(f"Python without {missing}", "the command that needs it says so, the others run", 1)


def test_control_characters_do_not_reach_the_terminal(tmp_path, fault):
    message = run("evaluate.py", tmp_path / "\x1b[2Jckpt\x07.pt", status=2)
    assert "\x1b" not in message and "\\x1b[2Jckpt\\x07.pt" in message
    assert "\x1b" not in run("parse.py", "a person \x1b[2J opens\x9b the door")
    fault("terminal escapes in names and sentences", "shown as text", 2)


def test_deterministic_and_the_header(world, tmp_path):
    text = run("train.py", "--root", world, *SMALL, "--epochs", 1, "--deterministic", "true",
               "--out", tmp_path / "run")
    assert "deterministic=True" in text and f"torch {torch.__version__}  commit" in text
    assert "cpu  " in text and "threads" in text
