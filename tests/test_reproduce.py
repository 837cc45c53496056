"""extras/reproduce.py and extras/probe.py: which results are stored and when they count, the
bootstrap, the documents, and each probe against an independent computation."""
import argparse
import ast
import dataclasses
import functools
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import clip
import data
import evaluate
import parse
import rehearsal
import shapes
import train
from extras import probe, reproduce
from support.errors import Mistake


@pytest.fixture
def options(world, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    return reproduce.parse_arguments(["docs", "--seeds", "1", "--device", "cpu", "--root",
                                      str(world)])


# ----------------------------------------------------------------------------------- what is stored

def test_a_row_is_run_once_and_only_for_the_same_choices(options, tmp_path, capsys):
    row = reproduce.Row("x", dict(method="mmn", epochs=1))
    config = reproduce.config_of(row, "shapes", 0, options)
    content = reproduce.run(config)
    written = json.loads(reproduce.file_of(config).read_text(encoding="utf-8"))
    assert content == reproduce.stored(config) == written
    assert set(content["results"]) == {"val", "test", "novel-word", "novel-composition"}
    checkpoint = evaluate.load(config.folder / "ckpt.pt")
    assert set(content["halves"]) == {"static", "dynamic"}
    for query, halves in content["halves"].items():
        assert set(halves) == set(content["results"]) - {"val"}
        expected = evaluate.evaluate(checkpoint, ["test"], query)["test"]["R@1,IoU=0.5"]
        assert halves["test"] == expected
    capsys.readouterr()
    assert reproduce.run(config) == content and "epoch" not in capsys.readouterr().out
    for change in (dict(seed=1), dict(epochs=2), dict(mask="something")):
        other = dataclasses.replace(config, **change)
        assert reproduce.stored(other) is None
    elsewhere = dataclasses.replace(config, device="auto", root="x", out="y")
    assert reproduce.stored(elsewhere) == content


def test_what_is_made_afresh_leaves_the_other_seeds(options):
    options.seeds = 3
    assert reproduce.per_seed("x", options, lambda seed: [seed]) == [[0], [1], [2]]
    options.seeds, options.fresh = 1, True
    assert reproduce.per_seed("x", options, lambda seed: [9]) == [[9]]
    options.seeds, options.fresh = 3, False
    assert reproduce.per_seed("x", options, lambda seed: [7]) == [[9], [1], [2]]


@pytest.mark.parametrize("arguments, sentence", [
    (["docs", "table1"], "run it alone"), (["table1", "--seeds", "0"], "at least 1"),
    (["table1", "--jobs", "0"], "at least 1"),
    (["fig2", "--dataset", "charades"], "omit --dataset"),
    (["coupled", "--dataset", "charades"], "omit --dataset")])
def test_mistakes_end_in_a_sentence(arguments, sentence, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as error:
        reproduce.main()
    assert error.value.code == 2 and sentence in capsys.readouterr().err


def test_a_field_that_is_added_later_changes_no_name(options, monkeypatch):
    config = reproduce.config_of(reproduce.MAIN[4], "shapes", 2, options)
    name = reproduce.name_of(config)
    more = dataclasses.make_dataclass("More", [("another", int, train.option(3, "x"))],
                                      bases=(train.Config,), frozen=True)
    monkeypatch.setattr(train, "Config", more)
    assert reproduce.name_of(more(**dataclasses.asdict(config))) == name
    assert config.dataset == "shapes-2" and config.clip == "shapes-2" and config.seed == 2


def test_every_row_is_a_configuration(options):
    """And no table has two rows that are one."""
    for what in reproduce.TABLES:
        configs = reproduce.configs_of(what, 0, options)
        paths = [reproduce.file_of(config, row.fused)
                 for row, config in zip(reproduce.TABLES[what].rows, configs) if config]
        assert len(set(paths)) == len(paths) >= 3, what


def real(dataset: str, *more: str) -> argparse.Namespace:
    return reproduce.parse_arguments(["table1", "--dataset", dataset, "--seeds", "1", "--device",
                                      "cpu", "--jobs", "1", *more])


def test_a_real_dataset_has_its_own_training_split_columns_and_features():
    for dataset, separate in (("charades", "vgg"), ("activitynet", "c3d")):
        given = real(dataset)
        for what, table in reproduce.TABLES.items():
            if table.dataset:                           # not the given one
                continue
            configs = reproduce.configs_of(what, 0, given)
            for row, config in zip(table.rows, configs):
                assert (config is None) == (row.fields is None)
                if config:
                    assert config.dataset.endswith("-cg") == (what not in ("table2", "s-table6"))
                if config and row.fields.get("clip") == "separate":
                    assert config.clip == separate and config.text_clip == reproduce.BERT
            splits = {split for split, _ in reproduce.columns_of(what, given)}
            assert splits and splits <= {"val", *data.FILES[reproduce.dataset_of(what, given)]}
            assert not any("accuracy" in metric for _, metric in reproduce.columns_of(what, given))
    assert reproduce.columns_of("table2", real("charades"))[0] == ("test", "R@1,IoU=0.5")
    chosen = real("charades", "--select-on-test")
    assert {c.select_on for c in reproduce.configs_of("table2", 0, chosen) if c} == {"test"}
    assert {c.select_on for c in reproduce.configs_of("table1", 0, chosen) if c} == {"novel-word"}


@pytest.mark.parametrize("what, dataset, figures", [
    ("table1", "charades", "43.85 / 24.17 / 39.50"), ("table1", "activitynet", "31.05 / 15.48"),
    ("table2", "charades", "52.32 / 31.37 / 87.03"), ("table2", "activitynet", "48.09 / 28.76")])
def test_the_papers_figures_stand_beside_the_same_dataset(what, dataset, figures, monkeypatch):
    """With made-up results: what a table says about itself."""
    given, splits = real(dataset), ("test", "trivial", "novel-word", "novel-composition")
    metrics = {"queries": 4, "mIoU": 1.0} | {f"R@{k},IoU={mu}": 25.0 for k in (1, 5)
                                             for mu in (0.5, 0.7)}
    lowest = {"R@1,IoU=0.5": 5.0, "R@1,IoU=0.7": 1.0, "mIoU": 9.0}
    metrics |= {"random moment": lowest, "best prior": lowest}
    run = {"results": dict.fromkeys(splits, metrics), "minutes": 1.0,
           "config": {"dataset": dataset},
           "coverage": dict.fromkeys(splits, [3, 4, 1, 2])}
    monkeypatch.setattr(reproduce, "collect", lambda what, given: [
        [run] if config else [] for config in reproduce.configs_of(what, 0, given)])
    monkeypatch.setattr(reproduce, "clip_alone_of",
                        lambda *_: [{"full": dict.fromkeys(splits, metrics)}])
    text = reproduce.table_text(what, given)
    assert re.search(r"^\| a random moment \| 5.0 \| 1.0 \|", text, flags=re.M)
    assert re.search(r"^\| CLIP alone, no training \| 25.0 \|", text, flags=re.M)
    other = {"charades": "ActivityNet", "activitynet": "Charades"}[dataset]
    assert figures in text and other not in text
    assert "MMN, text rate 1 |" in text and "tuned on validation" not in text
    assert "(reported) |" in text and "25.0" not in text.split("(reported)")[-1].split("\n")[0]
    assert "of 3 videos (2 sentences of 1 videos missing)" in text
    assert "not tuned here" in text
    text = reproduce.table_text(what, real(dataset, "--select-on-test"))
    assert "the epoch is chosen on" in text and "a test split" in text


@pytest.fixture(scope="module")
def rehearsed(published, tmp_path_factory):
    """Charades-STA and Charades-CG, three videos of each split, with random features."""
    folder = tmp_path_factory.mktemp("rehearsed")
    patch = pytest.MonkeyPatch()
    patch.setattr(rehearsal, "DATASETS", {"charades": 32})
    rehearsal.build(folder / "data", str(published), 3)
    patch.undo()
    return folder


@pytest.fixture
def rehearse(rehearsed, tmp_path, monkeypatch):
    """rehearse(*arguments): `python -m extras.reproduce` on them, on the smallest scale."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    monkeypatch.setitem(train.PRESETS, "charades", rehearsal.SMALL)

    def run(*arguments: str) -> None:
        reproduce.reproduce(reproduce.parse_arguments([
            *arguments, "--dataset", "charades", "--seeds", "1", "--device", "cpu", "--jobs", "1",
            "--root", str(rehearsed / "data")]))
    return run


@pytest.fixture
def one_thread():
    """Threads that wait for each other make networks this small several times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.rehearsal
@pytest.mark.parametrize("dataset, count", [("charades", 4), ("activitynet", 2)])
def test_every_row_of_every_table_runs_to_the_end(dataset, count, published, one_thread, tmp_path,
                                                  monkeypatch, capsys):
    """On a few videos of each split, one epoch each: no row fails after others were trained for
    hours, and every table has a line for each of its rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rehearsal, "DATASETS", {dataset: rehearsal.DATASETS[dataset]})
    monkeypatch.setitem(train.PRESETS, dataset, train.PRESETS[dataset] | rehearsal.SMALL)
    # each run loads spaCy seven times, which takes longer than everything else in it
    monkeypatch.setattr(parse, "load", functools.cache(parse.load))
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")
    root = tmp_path / "data"
    rehearsal.build(root, str(published), count)
    rehearsal.separate(root)
    rehearsal.svo(tmp_path / "svo")
    tables = [what for what in (*reproduce.TABLES, *reproduce.OTHERS)
              if what not in rehearsal.SHAPES_ONLY]
    for what in tables:
        more = ["--svo", "svo"] if what == "s-table1" else []
        given = real(dataset, "--root", str(root), *more)
        given.what = [what]
        reproduce.reproduce(given)
        text = capsys.readouterr().out
        assert f"\n{what}, {dataset}\n" in text
        if what in reproduce.TABLES:
            lines = [line for line in text.splitlines() if re.match(r"\| \S.*\d\.\d \|", line)]
            rows = [row for row in reproduce.TABLES[what].rows if row.fields]
            assert len(lines) >= len(rows) and "not run here" not in text, text


def test_what_could_not_be_shown_is_refused_before_training(rehearse, rehearsed, monkeypatch,
                                                            capsys):
    def unreachable(*_):
        raise AssertionError("trained")

    monkeypatch.setattr(reproduce, "run_all", unreachable)
    with pytest.raises(Mistake, match="s-table1 is about photographs"):
        rehearse("s-table1")
    with pytest.raises(Mistake, match="no row of x can be run"):
        monkeypatch.setitem(reproduce.TABLES, "x", reproduce.TABLES["table2"]._replace(
            rows=[row for row in reproduce.TABLES["table2"].rows
                  if row.fields and row.fields.get("clip") == "separate"]))
        rehearse("x")
    assert "is not run: there are no features in" in capsys.readouterr().err
    path = next((rehearsed / "data" / "charades" / "features" / "ViT-B-32").glob("manifest.json"))
    content = path.read_text(encoding="utf-8")
    manifest = json.loads(content)
    del manifest["videos"][data.read_annotations("charades", "test", rehearsed / "data")[0].video]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    try:
        with pytest.raises(Mistake, match=r"1 videos \(\d+ sentences\) of test have no features"):
            rehearse("table2")
        with pytest.raises(AssertionError, match="trained"):
            rehearse("table2", "--allow-missing")
        stored = {"coverage": {"test": [2, 4, 1, 3]}}
        monkeypatch.setattr(reproduce, "stored", lambda *_: stored)
        with pytest.raises(Mistake, match=r"1 videos \(3 sentences\) of test have no features"):
            rehearse("table2")                          # also of what is stored
    finally:
        path.write_text(content, encoding="utf-8")


@pytest.mark.parametrize("device, jobs", [("cpu", os.cpu_count()), ("cuda:0", 1)])
def test_one_run_at_a_time_on_a_gpu(device, jobs, options, monkeypatch):
    seen = []
    monkeypatch.setattr(reproduce.parallel, "pick_device", lambda name: torch.device(device))
    monkeypatch.setattr(reproduce, "run_all", lambda configs, given: seen.append(given.jobs))
    monkeypatch.setattr(reproduce, "result_of", lambda what, given: "")
    options.what, options.jobs = ["table3"], None
    reproduce.reproduce(options)
    assert seen == [jobs]


def test_a_checkpoint_is_not_evaluated_on_sentences_that_it_may_have_seen(rehearsed, tmp_path):
    """Three quarters of Charades-CG's novel-word sentences are in Charades-STA's training split."""
    config = train.configure(dataset="charades", method="mmn", root=str(rehearsed / "data"),
                             device="cpu", out=str(tmp_path / "run"), **rehearsal.SMALL)
    train.train(config)
    run = evaluate.load(tmp_path / "run" / "ckpt.pt")
    for split in ("novel-word", "novel-composition", "trivial", "train-cg"):
        assert data.read_annotations("charades", split, rehearsed / "data")
        with pytest.raises(Mistake, match="train with --dataset charades-cg"):
            evaluate.evaluate(run, [split])


def test_the_overall_column_weighs_kinds_by_their_triplets(options, monkeypatch):
    """3 verbs at 0.5 and 1 object at 0.9: (3 * 0.5 + 0.9) / 4 = 0.60."""
    parts = {kind: {"right": right, "wrong": 1 - right, "difference": 2 * right - 1,
                    "right ahead": 0.0, "triplets": count}
             for kind, right, count in (("verb", 0.5, 3), ("object", 0.9, 1))}
    monkeypatch.setattr(reproduce, "per_seed", lambda *_: [parts])
    line = reproduce.s_table1(options).split("\n")[2]
    assert line == "| right | 0.60 | no images | 0.50 | 0.90 | 0.79 | 0.82 | 0.76 | 0.86 |"


# -------------------------------------------------------------------------------------- differences

def runs_of(*rates: float) -> list[dict]:
    return [{"results": {"test": {"R@1,IoU=0.5": rate, "queries": 4}}} for rate in rates]


def test_a_difference_by_hand():
    """Two worlds: +50 and -25 points, +12.5 in the mean, standard deviation 75 / sqrt(2), and
    12.71 * 75 / sqrt(2) / sqrt(2) = 476.6."""
    mean, half, worlds = reproduce.paired(runs_of(75, 25), runs_of(25, 50), "test")
    assert (mean, worlds) == (12.5, [50.0, -25.0]) and half == pytest.approx(12.71 * 37.5)
    assert math.isnan(reproduce.paired(runs_of(100), runs_of(0), "test")[1])
    fewer = [{"results": {"test": {"R@1,IoU=0.5": 0.0, "queries": 3}}}]
    with pytest.raises(Mistake, match="other sentences of test"):
        reproduce.paired(runs_of(100), fewer, "test")


def test_the_seeds_of_a_world_are_averaged():
    """Ten seeds on five worlds: seeds 0 and 5 share a world."""
    ours = runs_of(100, 0, 0, 0, 0, 0, 0, 0, 0, 50)
    mean, half, worlds = reproduce.paired(ours, runs_of(*[0] * 10), "test")
    assert worlds == [50.0, 0.0, 0.0, 0.0, 25.0] and mean == 15.0
    assert half == pytest.approx(2.78 * np.std(worlds, ddof=1) / math.sqrt(5))
    assert reproduce.world_of("shapes", 7) == "shapes-2"
    assert reproduce.world_of("shapes-p87", 5) == "shapes-p87"
    assert reproduce.world_of("charades", 7) == "charades"


def test_an_incomplete_table_is_refused(options, monkeypatch):
    """Of two rows, the second was run for seed 0 only: means over different seeds would mislead."""
    rows = reproduce.MAIN[:2]
    monkeypatch.setitem(reproduce.TABLES, "main", reproduce.TABLES["main"]._replace(rows=rows))
    ran = {(rows[0].name, 0), (rows[0].name, 1), (rows[1].name, 0)}
    monkeypatch.setattr(reproduce, "config_of", lambda row, dataset, seed, *_: (row.name, seed))
    monkeypatch.setattr(reproduce, "stored", lambda config, _: config if config in ran else None)
    assert reproduce.collect("main", options) == [[(rows[0].name, 0)], [(rows[1].name, 0)]]
    options.seeds = 2
    with monkeypatch.context() as patch:                # a row of which one seed is enough
        less = [rows[0], rows[1]._replace(seeds=1)]
        patch.setitem(reproduce.TABLES, "main", reproduce.TABLES["main"]._replace(rows=less))
        assert [len(seeds) for seeds in reproduce.collect("main", options)] == [2, 1]
    with pytest.raises(Mistake, match="main is incomplete; run: python -m extras.reproduce main"):
        reproduce.collect("main", options)


def test_the_documents_are_in_step_with_the_results_and_the_code():
    """README.md and docs/ are what `python -m extras.reproduce docs` would write now, and every
    table and figure with stored results stands in one of them."""
    documents = reproduce.documents(reproduce.parse_arguments(["docs"]))
    assert len(documents) >= 6
    for path, text in documents.items():
        before = path.read_text(encoding="utf-8")
        assert before == text, f"{path.name}: run python -m extras.reproduce docs"
    shown = reproduce.PLACE.findall("\n".join(documents.values()))
    assert set(shown) == {*reproduce.TABLES, *reproduce.OTHERS} - {"fig2"}
    assert len(shown) == len(set(shown))


def test_every_departure_has_a_row():
    """Each DEVIATION and UNSPECIFIED in the code has a row in docs/departures.md under the function
    or class that it is in; a DEVIATION in a row that says so."""
    document = (reproduce.HERE / "docs" / "departures.md").read_text(encoding="utf-8")
    rows = [line for line in document.split("\n") if line.startswith("|")]
    marks = 0
    for path in sorted(reproduce.HERE.rglob("*.py")):
        parts = path.relative_to(reproduce.HERE).with_suffix("").parts
        if parts[0] in ("tests", "data", "runs"):
            continue
        lines = path.read_text(encoding="utf-8").split("\n")
        tree = ast.parse("\n".join(lines))
        for i, line in enumerate(lines, 1):
            if "DEVIATION" not in line and "UNSPECIFIED" not in line:
                continue
            around = [node for node in ast.walk(tree)
                      if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                      and node.lineno <= i <= node.end_lineno]
            names = [".".join((*parts, node.name)) for node in around]
            word = "DEVIATION" if "DEVIATION" in line else ""
            assert not names or any(word in row and re.search(rf"`{re.escape(name)}[`.]", row)
                                    for row in rows for name in names), (path.name, i, names)
            marks += bool(names)
    assert marks > 20


def test_links_to_functions_lead_to_their_lines():
    """Each of the 20 and more links of README.md ends in the line that defines what it names."""
    text = (reproduce.HERE / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\[`[\w.]*?(\w+)`\]\(([\w/]+\.py)#L(\d+)\)", text)
    assert len(links) > 20 and reproduce.linked(text) == text
    for name, file, line in links:
        lines = (reproduce.HERE / file).read_text(encoding="utf-8").split("\n")
        assert re.match(rf"\s*(def|class) {name}\b", lines[int(line) - 1])
    with pytest.raises(ValueError, match="links to mmn.nothing, which does not exist"):
        reproduce.linked("[`mmn.nothing`](mmn.py)")


# ------------------------------------------------------------------------------------------- probes

def test_end_token_attention_is_that_of_multihead_attention(world):
    """The last layer's attention, by torch's own module, averaged over its heads."""
    model = clip.load(world / "shapes" / "clip.pt")
    sentences = ["the red circle rises", "the blue star", "blinks"]
    tokens = clip.tokenize(sentences)
    ours = probe.end_token_attention(model, tokens)
    for i in range(3):
        end = int(tokens[i].argmax())
        x = model.token_embedding(tokens[i:i + 1, :end + 1]) + model.positional_embedding[:end + 1]
        for block in model.transformer.resblocks[:-1]:
            x = block(x, causal=True)
        last = model.transformer.resblocks[-1]
        reference = torch.nn.MultiheadAttention(64, last.attn.num_heads, batch_first=True)
        reference.load_state_dict(last.attn.state_dict())
        x = last.ln_1(x)
        _, weights = reference(x[:, -1:], x, x, average_attn_weights=True)
        assert torch.allclose(ours[i, :end + 1], weights[0, 0], atol=1e-5)
        assert ours[i, end + 1:].abs().sum() == 0


def test_word_weights_are_shares(world):
    """Of each sentence the weights have the mean 1; "the red circle rises": one noun, one verb."""
    model = clip.load(world / "shapes" / "clip.pt")
    weights = probe.word_weights(model, ["the red circle rises"] * 3, probe.shapes_words)
    assert {kind: len(values) for kind, values in weights.items()} == dict(noun=3, verb=3, other=6)
    assert sum(map(sum, weights.values())) == pytest.approx(3 * 4, abs=1e-4)


@pytest.mark.parametrize("kind", probe.KINDS)
def test_triplets_differ_in_what_they_say(kind):
    """The wrong image of the kind "object" has another ground, the others have the same one."""
    for sentence, right, wrong in probe.shape_triplets(kind, 20, 0):
        scene = np.array(shapes.SCENES[sentence.split()[-1]])
        near = [np.abs(np.median(image.reshape(-1, 3), 0) - scene).max() < 8
                for image in (right, wrong)]
        assert near == [True, kind != "object"] and not np.array_equal(right, wrong)


def test_a_clip_that_knows_scores_all_and_one_that_does_not_none(world):
    """A wrong image equal to the right one scores a half."""
    model = clip.load(world / "shapes" / "clip.pt")
    same = [(sentence, right, right) for sentence, right, _ in probe.shape_triplets("verb", 9, 0)]
    scores = probe.triplet_scores(model, same)
    assert scores["right"] == pytest.approx(0.5) and scores["difference"] == pytest.approx(0)


def test_svo_probes_are_read_from_their_csv(world, tmp_path):
    for number in (1, 2):
        image = np.full((40, 60, 3), 100 * number, np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    (tmp_path / "svo_probes.csv").write_text(
        "sentence,pos_image_id,neg_image_id,subj_neg,verb_neg,obj_neg\n"
        "A person walks.,1,2,False,True,False\nA dog runs.,1,3,True,False,False\n",
        encoding="utf-8")
    triplets = probe.svo_triplets(str(tmp_path))
    assert {kind: len(part) for kind, part in triplets.items()} == dict(subject=0, verb=1, object=0)
    scores = probe.triplet_scores(clip.load(world / "shapes" / "clip.pt"), triplets["verb"])
    assert scores["triplets"] == 1 and 0 <= scores["right"] <= 1
