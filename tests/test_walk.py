"""extras/walk.py and parse.py: what they print, without a download and without a dataset."""
import functools
import pathlib
import re
import textwrap

import parse
from conftest import command

HERE = pathlib.Path(__file__).parent.parent


walk = functools.partial(command, "-m", "extras.walk")


def test_parse_underlines_the_chunks(tmp_path):
    name = parse.Parser().name
    lines = command(HERE / "parse.py", "the person opens the door.", cwd=tmp_path).splitlines()
    assert lines[:5] == [f"parser: {name}", "Q    the person opens the door.",
                         "     ^^^^^^^^^^       ^^^^^^^^", "Q^s  the person the door",
                         "Q^d  opens ."]
    printed = command(HERE / "parse.py", "a person opens the door", cwd=tmp_path)
    documented = textwrap.dedent(parse.__doc__.split('door"\n\n')[1].split("\n\n")[0])
    assert printed == f"parser: {name}\n{re.sub(' *the noun chunks', '', documented)}\n"


def test_inject_walks_from_frames_to_both_losses(tmp_path):
    """The shapes of Eq. 1-5 in order, for 8 sentences of 2 videos, and two rows of pictures."""
    printed = walk("inject", cwd=tmp_path)
    assert re.findall(r"Eq. (\d) .*?(\[.*?\])", printed) == [
        ("1", "[8, 64]"), ("2", "[8]"), ("3", "[2, 32, 4, 4]"), ("4", "[2, 64]"), ("5", "[8]")]
    frames, heat = printed.split("frames of the first video")[1].split("Eq. 3, FC = identity\n")
    heat, rest = heat.split("\n\n")
    assert "@" in frames and "@" in heat and len(heat.splitlines()) == 8
    assert "not a map of objects" in rest


def test_mmn_shows_how_the_map_is_decoded(tmp_path):
    """16 candidates of 6 clips: 6 + 5 + 4 on three diagonals, and one further out; the best cell is
    the one whose row and column are printed."""
    printed = walk("mmn", cwd=tmp_path)
    scores = printed.split("Eq. 10, Y~")[1].split("cmax")[0]
    cells = re.findall(r"first clip (\d) (.*)", scores)
    values = [[float(v) if v != "." else -1 for v in row.split()] for _, row in cells]
    assert sum(v >= 0 for row in values for v in row) == 6 + 5 + 4 + 1
    start, end = map(int, re.search(r"t~s = (\d).*t~e = (\d)", printed).groups())
    assert values[start][end] == max(map(max, values))
    assert f"{10 * start:4d} to {10 * (end + 1)} s, score {values[start][end]:.2f}" in printed


def test_evaluate_explains_by_hand(tmp_path):
    """IoU 6 / 20, 8 / 20, 8 / 11; the second answer is dropped by NMS, the third is the hit."""
    printed = walk("evaluate", cwd=tmp_path)
    assert re.findall(r"IoU \d+ / \d+ = (\d.\d\d)", printed) == ["0.30", "0.40", "0.73"]
    assert "first by IoU 0.89 > 0.5 and is dropped; the third, by 0.19, stays" in printed
    assert "R@1,IoU=0.5 0.00   R@1,IoU=0.7 0.00   R@5,IoU=0.5 100.00" in printed
