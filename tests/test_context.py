"""extras/context.py: mutual information by hand, pairs of a parsed sentence, permuted nouns."""
import math

import numpy as np
import pytest

import parse
from extras import context


def test_information_by_hand():
    """A noun that names the verb tells all of it; an independent noun nothing; and a table between,
    1/2 log2(4/3) + 1/4 log2(2/3) + 1/4 log2 2."""
    assert context.information(np.eye(4)) == pytest.approx((2.0, 2.0))
    assert context.information(np.ones((2, 3))) == pytest.approx((0.0, 1.0))
    found, entropy = context.information(np.array([[2.0, 0.0], [1.0, 1.0]]))
    assert found == pytest.approx(0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25)
    assert entropy == pytest.approx(1.0)


def test_a_shapes_world_without_context_tells_nothing():
    assert context.of_world(0.0)["information"] == pytest.approx(0.0)
    # seven verbs on six grounds: all but which of the two that share one
    assert context.of_world(1.0)["information"] == pytest.approx(math.log2(7) - 2 / 7)


def test_permuted_nouns_measure_chance():
    """Ten verbs, ten nouns, 1,000 pairs. Independent: 81 / (2 1000 ln 2) bits by chance, nothing
    beyond. Paired: all."""
    rng = np.random.default_rng(0)
    verbs, nouns = rng.integers(0, 10, (2, 1000))
    names = lambda v, n: [(f"verb{a}", f"noun{b}") for a, b in zip(v, n)]
    alone, paired = context.shares(names(verbs, nouns)), context.shares(names(verbs, verbs))
    assert abs(alone["information"]) < 0.02
    assert alone["by chance"] == pytest.approx(81 / 2000 / math.log(2), rel=0.2)
    assert paired["share"] > 0.97 - alone["by chance"] / alone["entropy"]
    rare = context.shares(names(verbs, verbs) + [("rare", "noun")] * 49)
    assert rare["verbs"] == 10 and rare["pairs"] == 1000


def test_pairs_of_a_sentence():
    nlp = parse.files.need("spacy", "parsing").load(next(filter(
        parse.files.need("spacy", "parsing").util.is_package, parse.PIPELINES)))
    pairs = list(context.pairs_of(["A person puts the book on a shelf.", "The man laughs."], nlp))
    assert pairs == [("put", "book"), ("put", "shelf")]
