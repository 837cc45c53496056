"""Shared by the tests: a small shapes world, the folder of published annotations and real videos,
and the table of faults."""
import os
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
torch.set_num_threads(2)

import clip                                                             # noqa: E402
import shapes                                                           # noqa: E402

SHARED = pathlib.Path(os.environ.get("VDI_SHARED",
                                     pathlib.Path(__file__).parents[2] / "shared")) / "data"


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=300, metavar="N",
                     help="examples of each kind in tests/robustness/test_fuzz.py (default 300; "
                          "videos: a twentieth, at least 15)")


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
    shapes.write(root / "shapes", shapes.shipped(), shapes.World(), counts)
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
