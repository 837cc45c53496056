"""The house rules: which files there are, and which may import which."""
import ast
import dataclasses
import pathlib
import sys

import train

HERE = pathlib.Path(__file__).parent.parent
PAPER = ("clip", "parse", "inject", "mmn", "data", "train", "evaluate")
BESIDE = ("staged", "video", "shapes", "retrieve")
FOLDERS = ("support", "extras", "clip2video")


def modules() -> dict[str, pathlib.Path]:
    """Name -> file of every module of the product."""
    paths = [*HERE.glob("*.py"), *(path for name in FOLDERS for path in (HERE / name).glob("*.py"))]
    return {".".join(path.relative_to(HERE).with_suffix("").parts): path for path in paths}


def imports(path: pathlib.Path) -> set[str]:
    """The modules that a file imports, inside functions too: "a.b" for `from a import b`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def graph() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(path) & known.keys() - {name} for name, path in known.items()}


def test_eleven_files_at_the_top():
    assert {path.stem for path in HERE.glob("*.py")} == {*PAPER, *BESIDE}


def test_imports_have_no_cycle():
    edges, done = graph(), set()
    while done < edges.keys():
        free = {name for name in edges.keys() - done if edges[name] <= done}
        assert free, {name: edges[name] - done for name in edges.keys() - done}
        done |= free


def test_what_may_import_what():
    edges = graph()
    for name in (*PAPER, *BESIDE):
        others = {other for other in edges[name] if other.split(".")[0] in ("extras", "clip2video")}
        assert others <= ({"extras.show"} if name == "retrieve" else set()), name
    for name in edges:
        if name.startswith("support"):
            assert all(other.startswith("support") for other in edges[name]), name
    assert "train" not in edges["evaluate"] | edges["retrieve"]
    assert "video" not in edges["data"]


def test_inject_and_mmn_need_torch_alone():
    for name in ("inject", "mmn"):
        outside = {part.split(".")[0] for part in imports(HERE / f"{name}.py")}
        assert outside - set(sys.stdlib_module_names) == {"torch"}


def test_sizes():
    """The sizes that a reader was promised."""
    assert len(dataclasses.fields(train.Config)) <= 40
    assert len((HERE / "README.md").read_text().splitlines()) <= 250
    loop = [node for node in ast.walk(ast.parse((HERE / "train.py").read_text()))
            if isinstance(node, ast.FunctionDef) and "loss.backward()" in ast.unparse(node)]
    assert len(loop) == 1 and loop[0].end_lineno - loop[0].lineno < 50


def test_modules_are_imported_without_a_side_effect(capsys):
    for name in modules():
        if not name.endswith("__main__"):
            __import__(name)
    assert capsys.readouterr() == ("", "")
