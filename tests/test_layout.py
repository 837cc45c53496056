"""The house rules: which files there are, which may import which, and how long they may be."""
import ast
import collections
import dataclasses
import importlib.metadata
import io
import pathlib
import sys
import tokenize

from packaging.specifiers import SpecifierSet

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
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    # what a file imports only when it is the command (`if __name__ == "__main__"`) is left out
    tree.body = [node for node in tree.body if not (
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'")]
    for node in ast.walk(tree):
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


# lines of each part of the product; a part may not grow beyond its budget. Plain lines with
# comments that give reasons are about a tenth more than compressed ones: the price of what follows
LINES = {"the seven": 2803, "the eleven": 4540, "support": 1509, "extras": 3899, "clip2video": 1115,
         "product": 11063}
OPTIONS = 141                   # of all commands and configurations
DENSE_PER_1000 = 25             # dense constructs per 1,000 lines of code, see `dense_constructs`
CODE_LINES_PER_COMMENT = 8
REQUIREMENTS = 10


def part_of(name: str) -> list[str]:
    """The parts of the product that a module counts for."""
    folder = name.split(".")[0]
    if folder in FOLDERS:
        return [folder, "product"]
    return ["the eleven", "product"] + ["the seven"] * (name in PAPER)


def is_comprehension(node: ast.AST) -> bool:
    return isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp))


def dense_constructs(tree: ast.AST) -> collections.Counter:
    """What makes a line hard to read, by kind: spreads (`*` and `**`), conditional expressions,
    lambdas, walruses, comprehensions inside comprehensions, `a, b = x, y`, comparisons as
    factors."""
    counts = collections.Counter()
    for node in ast.walk(tree):
        counts["spread"] += isinstance(node, ast.Starred)
        counts["spread"] += isinstance(node, ast.Dict) and None in node.keys
        counts["spread"] += isinstance(node, ast.keyword) and node.arg is None
        counts["conditional expression"] += isinstance(node, ast.IfExp)
        counts["lambda"] += isinstance(node, ast.Lambda)
        counts["walrus"] += isinstance(node, ast.NamedExpr)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            counts["tuple assignment"] += isinstance(node.targets[0], ast.Tuple)
        if is_comprehension(node):
            nested = any(is_comprehension(inner) for inner in ast.walk(node) if inner is not node)
            counts["nested comprehension"] += nested or len(node.generators) > 1
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            factors = (node.left, node.right)
            counts["comparison as a factor"] += any(
                isinstance(side, (ast.Compare, ast.BoolOp)) for side in factors)
    return counts


def code_and_comments(text: str) -> tuple[int, int]:
    """Lines of code, and comments: those on lines of their own and those behind code."""
    lines = [line.strip() for line in text.splitlines()]
    code = sum(bool(line) and not line.startswith("#") for line in lines)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return code, sum(token.type == tokenize.COMMENT for token in tokens)


def options_of(tree: ast.AST, path: pathlib.Path) -> int:
    """Calls that add an option, and the fields of a Config, each of which is one."""
    count = 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            first = str(node.args[0].value)
            count += called == "add_argument" and first[:1].islower()
            count += called in ("add", "add_argument") and first.startswith("--")
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            count += sum(isinstance(item, ast.AnnAssign) for item in node.body)
    return count


def test_budgets():
    """The sizes and the density that a reader was promised. `pytest -s` prints where we stand."""
    lines, options, dense, code, comments = collections.Counter(), 0, 0, 0, 0
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        for part in part_of(name):
            lines[part] += len(text.splitlines())
        more = code_and_comments(text)
        code += more[0]
        comments += more[1]
        options += options_of(tree, path)
        dense += dense_constructs(tree).total()
    requirements = (HERE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    found = {f"lines of {part}": (lines[part], limit) for part, limit in LINES.items()}
    found["options"] = options, OPTIONS
    found["dense constructs per 1,000 lines of code"] = 1000 * dense / code, DENSE_PER_1000
    found["lines of code per comment"] = code / comments, CODE_LINES_PER_COMMENT
    found["requirements"] = len([line for line in requirements if line]), REQUIREMENTS
    for what, (value, limit) in found.items():
        print(f"{what:42s} {value:7.0f} of {limit}")
    over = {what: pair for what, pair in found.items() if pair[0] > pair[1] + 0.5}
    assert not over, over


def test_readme_loop_and_config():
    assert len(dataclasses.fields(train.Config)) <= 40
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    assert len(readme.splitlines()) <= 250 and len(readme.encode()) <= 16_384
    loop = [node for node in ast.walk(ast.parse((HERE / "train.py").read_text(encoding="utf-8")))
            if isinstance(node, ast.FunctionDef) and "loss.backward()" in ast.unparse(node)]
    assert len(loop) == 1 and loop[0].end_lineno - loop[0].lineno < 50


LOWEST_PYTHON = (3, 10)          # as README says


def test_the_lowest_python():
    """The syntax, and the pinned requirements, exist for it. (Others resolve to older versions.)"""
    for path in modules().values():
        ast.parse(path.read_text(encoding="utf-8"), feature_version=LOWEST_PYTHON)
    lowest = ".".join(map(str, LOWEST_PYTHON))
    assert f"Python {lowest} or later" in (HERE / "README.md").read_text(encoding="utf-8")
    for line in (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines():
        if "==" in line:
            needed = importlib.metadata.metadata(line.split("==")[0])["Requires-Python"]
            assert not needed or SpecifierSet(needed).contains(f"{lowest}.0"), (line, needed)


OURS = (*PAPER, *BESIDE, *FOLDERS)


def test_no_hidden_imports():
    """No import of our own files behind a string, which the graph above would not see."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                hidden = called in ("import_module", "__import__", "run_module", "run_path",
                                    "resolve_name", "need")
                strings = [part.value for part in ast.walk(node)
                           if isinstance(part, ast.Constant) and isinstance(part.value, str)]
                ours = [text for text in strings if text.split(".")[0] in OURS]
                assert not (hidden and ours), f"{name} hides an import of {ours}"


def test_text_files_name_their_encoding():
    """What `open`, `read_text` and `write_text` assume otherwise depends on the machine."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            binary = any(isinstance(part, ast.Constant) and part.value in ("rb", "wb", "ab")
                         for part in node.args)
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            is_open = isinstance(node.func, ast.Name) and called == "open" and not binary
            if is_open or called in ("write_text",) or called == "read_text" and not node.args:
                assert named, f"{name}, line {node.lineno}: name the encoding"


def test_modules_are_imported_without_a_side_effect(capsys):
    for name in modules():
        if not name.endswith("__main__"):
            __import__(name)
    assert capsys.readouterr() == ("", "")
