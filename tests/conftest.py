"""Shared by the tests: a small shapes world, the folder of published annotations and real videos,
and the table of faults."""
import contextlib
import io
import os
import pathlib
import runpy
import subprocess
import sys

import pytest
import torch

HERE = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(HERE))
# for this process only: in the programs that tests start, torch's own files would warn
os.environ.pop("PYTHONWARNDEFAULTENCODING", None)
torch.set_num_threads(2)

import clip                                                             # noqa: E402
import shapes                                                           # noqa: E402

SHARED = pathlib.Path(os.environ.get("VDI_SHARED",
                                     pathlib.Path(__file__).parents[2] / "shared")) / "data"


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=300, metavar="N",
                     help="examples of each kind in tests/robustness/test_fuzz.py (default 300; "
                          "videos: a twentieth, at least 15)")
    parser.addoption("--device", default="", metavar="NAME",
                     help="cuda, cuda:N or mps: the device that tests/test_device.py compares with "
                          "the CPU (default: a simulated one)")


INSIDE = ("evaluate.py", "retrieve.py", "-m extras.index", "-m extras.search",
          "-m clip2video evaluate", "-m clip2video index", "-m clip2video search")


def command(*arguments, status: int = 0, cwd: str | pathlib.Path = HERE,
            env: dict[str, str] | None = None) -> str:
    """What `python ...` prints to stdout or, with another status, to stderr; with status 2 one
    sentence, after any notes. Where no training can start, the command runs in this process, which
    spares it the imports."""
    words, env = [str(word) for word in arguments], {"PYTHONPATH": str(HERE), **(env or {})}
    if status == 2 or " ".join(words).startswith(INSIDE):
        code, out, err = in_this_process(words, cwd, env)
    else:
        done = subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True,
                              timeout=600, env=os.environ | env)
        code, out, err = done.returncode, done.stdout, done.stderr
    assert code == status, out + err
    assert "Traceback" not in err, err
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    assert status != 2 or lines and lines[0].startswith("error: "), err
    return err if status else out


def in_this_process(words: list[str], cwd, env: dict[str, str]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a program file or, after "-m", of a module."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in env.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", words[1:] if words[0] == "-m" else words)
        program = pathlib.Path(cwd, words[0])
        patch.chdir(cwd)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                if words[0] == "-m":
                    runpy.run_module(words[1], run_name="__main__", alter_sys=True)
                else:
                    runpy.run_path(str(program), run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code or 0
    return code, out.getvalue(), err.getvalue()


def decode(ids) -> str:
    """Text of token ids, special tokens as spaces: the inverse of `clip.encode` up to spaces and
    case."""
    tokens, byte_of = list(clip.vocabulary()[0]), {c: b for b, c in clip.byte_alphabet().items()}
    text = "".join(tokens[i] for i in ids)
    for part in (clip.START, clip.END, "</w>"):
        text = text.replace(part, " ")
    return b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode()
                    for c in text).decode("utf-8", "replace")


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> pathlib.Path:
    """A root that holds a world of 24 training videos, with the shipped small CLIP."""
    root = tmp_path_factory.mktemp("data")
    counts = {"train": 24, "val": 6, "test": 6, "novel-word": 4, "novel-composition": 6}
    shapes.write(root / "shapes", shapes.shipped(0), 0, counts)
    return root


@pytest.fixture(scope="session")
def published() -> pathlib.Path:
    """The published annotations and the real videos, laid out as the root of
    `data.read_annotations`."""
    if not (SHARED / "README.md").exists():
        pytest.skip(f"the published annotations are not in {SHARED} (set VDI_SHARED to their "
                    f"folder)")
    return SHARED


@pytest.fixture
def fault(record_property):
    """fault(what, how, times, lost): a row of the table of faults."""
    return lambda what, how, times, lost="nothing": record_property(
        "fault", (what, how, times, lost))


def pytest_terminal_summary(terminalreporter):
    """The table of faults: what was provoked, how often, and what it cost."""
    rows: dict[tuple, int] = {}
    for report in terminalreporter.getreports("passed"):
        for key, value in report.user_properties:
            if key == "fault":
                what, how, times, lost = value
                rows[what, how, lost] = rows.get((what, how, lost), 0) + times
    if rows:
        terminalreporter.write_line("\n| fault | how it is provoked | times | what is lost |\n"
                                    "|---|---|---|---|")
        for (what, how, lost), times in rows.items():
            terminalreporter.write_line(f"| {what} | {how} | {times:,} | {lost} |")
