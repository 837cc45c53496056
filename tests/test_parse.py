"""parse.py: spaCy's noun chunks on real sentences, any string, masking, and the shapes world's own
chunks."""
import itertools
import pathlib
import re

import pytest
import spacy
import spacy.training
from spacy.tokens import Doc

import parse
import shapes

SPACY = parse.Parser()


def known(*sentences):
    """A parser that knows the chunks of these sentences: everything before the last word."""
    return parse.Parser(known={s: [(0, s.rindex(" "))] for s in sentences})


def test_every_sentence_of_the_shapes_world():
    """What the world supplies (shapes.write) is split into the noun phrase and the verb."""
    for colour, shape, pair in itertools.product(shapes.COLOURS, shapes.SHAPES, shapes.VERBS):
        for verb in pair:
            sentence = f"the {colour} {shape} {verb}"
            assert known(sentence).split(sentence) == (sentence, f"the {colour} {shape}", verb)


def test_known_chunks_need_no_pipeline_and_other_sentences_do():
    parser = known("the red circle rises")
    assert parser.name == parse.BY_CONSTRUCTION and parser.pipeline is None
    assert parser.split("the red circle rises").dynamic == "rises" and parser.pipeline is None
    assert parser.split("a person opens the door").dynamic == "opens" and parser.pipeline


@pytest.mark.parametrize("sentence, chunks", [
    ("a person opens the door.", ["a person", "the door"]),
    ("a person walks back into the room.", ["a person", "the room"]),
    ("the person sits down.", ["the person"]),
    ("She laughs.", ["She"]),
    ("  a person  opens\tthe door ", ["a person", "the door"]),
])
def test_real_sentences(sentence, chunks):
    assert [sentence[a:b] for a, b in SPACY.chunks(sentence)] == chunks


def test_many_sentences_at_once_and_one_by_one():
    sentences = ["a person opens the door.", "", "she sits down", "a person opens the door."]
    assert SPACY.all_chunks(sentences) == [parse.Parser().chunks(s) for s in sentences]
    assert SPACY.split_all(sentences) == list(map(SPACY.split, sentences))


def labelled() -> dict[str, list[tuple[str, set]]]:
    """noun_chunks.txt: name of the sample -> (sentence, its chunks as offsets)."""
    samples = {}
    path = pathlib.Path(__file__).parent / "noun_chunks.txt"
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            name = line.strip("# ").split(":")[0]
            continue
        sentence, gold = "", set()
        for piece in re.split(r"(\[[^]]*\])", line):
            if piece.startswith("["):
                gold.add((len(sentence), len(sentence) + len(piece) - 2))
            sentence += piece.strip("[]") if piece.startswith("[") else piece
        samples.setdefault(name, []).append((sentence, gold))
    return samples


@pytest.mark.parametrize("name, at_least", [("Charades-STA", 0.97), ("ActivityNet-Captions", 0.93)])
def test_exact_span_f1_on_real_sentences(name, at_least):
    """60 sentences each, labelled by hand: how well spaCy's pipeline reads such sentences."""
    sample = labelled()[name]
    predicted = [set(SPACY.chunks(sentence)) for sentence, _ in sample]
    right = sum(len(chunks & gold) for chunks, (_, gold) in zip(predicted, sample))
    total = sum(map(len, predicted)) + sum(len(gold) for _, gold in sample)
    print(f"{name}: {len(sample)} sentences, exact-span F1 {2 * right / total:.3f}")
    assert len(sample) >= 40 and 2 * right / total >= at_least


@pytest.mark.parametrize("sentence",
                         ["", "   ", "\n", "😀", "一个人打开门。", "the " * 200,
                          "a" * 5000, "!!!", "\x00", "opens", "the door", "'",
                          "a person\tthe\u00a0door",
                          "\ud800 a door", "person open a cabinet door get a cup out."])
def test_any_string_is_read(sentence):
    query = SPACY.split(sentence)
    spans = [offset for chunk in SPACY.chunks(sentence) for offset in chunk]
    assert query.full == sentence and spans == sorted(spans)
    assert all(0 <= offset <= len(sentence) for offset in spans)
    assert SPACY.halve(sentence).full == sentence


def test_masking_by_a_word():
    """Each masked stretch becomes one word; punctuation alone is no stretch of the static query."""
    parser = parse.Parser(mask="something")
    assert parser.split("a person opens the door.") == ("a person opens the door.",
                                                        "a person something the door",
                                                        "something opens something .")


def test_all_chunk_and_no_chunk_sentences_give_an_empty_query():
    for mask in ("", "something"):
        parser = parse.Parser(mask=mask)
        assert parser.split("the door.")[1:] == ("the door", "")
        assert parser.split("sits down.")[1:] == ("", "sits down.")


def test_a_random_half_of_the_words():
    """Q^h keeps 3 of 5 words in order, the rest has the other 2; the same half whenever it is asked
    for, another half of another sentence; as often each word as any other."""
    sentence = "one two three four five"
    query = SPACY.halve(sentence)
    words = query.static.split() + query.dynamic.split()
    assert len(query.static.split()) == 3 and sorted(words) == sorted(sentence.split())
    assert query == parse.Parser().halve(sentence)
    many = [SPACY.halve(f"a b c d {i}").static for i in range(2000)]
    for word in "abcd":
        assert sum(word in half.split() for half in many) / 2000 == pytest.approx(0.6, abs=0.05)
    masked = parse.Parser(mask="something").halve(sentence)
    assert [w for w in masked.static.split() if w != "something"] == query.static.split()
    assert "something something" not in masked.static + " | " + masked.dynamic
    assert SPACY.halve("opens")[1:] == ("opens", "") and SPACY.halve("")[1:] == ("", "")


class Parsed:
    """A spaCy pipeline whose dependency parse is given."""
    meta = {"lang": "en", "name": "given", "version": "1"}

    def __init__(self, **parse):
        self.vocab, self.parse = spacy.blank("en").vocab, parse

    def pipe(self, texts):
        return [Doc(self.vocab, words=text.split(" "), **self.parse) for text in texts]


def test_a_pipeline_with_a_parse_goes_through_spacys_noun_chunks():
    pipeline = Parsed(heads=[1, 2, 2, 4, 2], deps=["det", "nsubj", "ROOT", "det", "dobj"],
                      pos=["DET", "NOUN", "VERB", "DET", "NOUN"])
    parser = parse.Parser(pipeline)
    assert parser.name == "en_given 1"
    assert parser.split("a person opens the door")[1:] == ("a person the door", "opens")


def test_a_trained_pipeline_is_loaded_by_its_path(tmp_path):
    """A dependency parser and a tagger, trained here on four sentences, saved, and named by path as
    en_core_web_sm might be."""
    det, noun, verb, adp = "DET", "NOUN", "VERB", "ADP"
    rows = [("a person opens the door", [1, 2, 2, 4, 2], ["det", "nsubj", "ROOT", "det", "dobj"],
             [det, noun, verb, det, noun]),
            ("the man takes a cup", [1, 2, 2, 4, 2], ["det", "nsubj", "ROOT", "det", "dobj"],
             [det, noun, verb, det, noun]),
            ("a person sits on the chair", [1, 2, 2, 2, 5, 3],
             ["det", "nsubj", "ROOT", "prep", "det", "pobj"], [det, noun, verb, adp, det, noun]),
            ("the man walks to a door", [1, 2, 2, 2, 5, 3],
             ["det", "nsubj", "ROOT", "prep", "det", "pobj"], [det, noun, verb, adp, det, noun])]
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    examples = [spacy.training.Example(nlp.make_doc(text), Doc(
        nlp.vocab, words=text.split(), heads=heads, deps=deps, pos=pos))
        for text, heads, deps, pos in rows]
    spacy.util.fix_random_seed(0)
    nlp.initialize(lambda: examples)
    for _ in range(30):
        nlp.update(examples)
    nlp.to_disk(tmp_path / "trained")
    parser = parse.Parser(str(tmp_path / "trained"))
    assert parser.name.startswith("en_pipeline")
    assert parser.split("a person sits on the chair")[1:] == ("a person the chair", "sits on")


def test_a_pipeline_without_a_parse_is_one_sentence():
    with pytest.raises(ValueError, match="no dependency parser"):
        parse.Parser(Parsed()).chunks("a person opens the door")
    with pytest.raises(ValueError, match="no_such_pipeline"):
        parse.Parser("no_such_pipeline")


def test_case_does_not_matter():
    """CLIP reads lower case, so spaCy does, too; the places are those of the sentence."""
    parser = parse.Parser()
    for sentence in ("A Person Opens The Door", "A PERSON OPENS THE DOOR",
                     "a person opens the DOOR", "\u0130n The Kitchen She Sits Down"):
        assert parser.chunks(sentence) == parser.chunks(parse.lowered(sentence))
        assert len(parse.lowered(sentence)) == len(sentence)
    assert parser.split("A PERSON OPENS THE DOOR")[1:] == ("A PERSON THE DOOR", "OPENS")
