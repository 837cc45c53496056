"""Sentence Q -> static query Q^s and dynamic query Q^d (paper Sec. 3.1, first paragraph).

The noun chunks of a sentence (a noun plus the words describing it) tell what can be seen in any one
frame; the rest tells what changes. Q^s is the sentence with all but its noun chunks masked, Q^d the
sentence with its noun chunks masked:

    python parse.py "a person opens the door"

    Q    a person opens the door
         ^^^^^^^^       ^^^^^^^^        the noun chunks
    Q^s  a person the door
    Q^d  opens
    Q^h  a opens the

Q^h (supplement, Table 5) is the control: a random half of the words in place of the noun chunks.

Chunks come from a spaCy pipeline with a dependency parse where there is one (`doc.noun_chunks`),
else from the rules below on spaCy's own tokenizer. The rules tag each token by word lists and
endings, let its neighbours correct the tag, and then take every pronoun, and every longest run of
determiners, modifiers and nouns up to its last noun.
"""
import functools
import hashlib
import pathlib
import random
import re
import sys
from typing import NamedTuple

import spacy

import command

WORDS = pathlib.Path(__file__).parent / "assets" / "words.txt"


class Query(NamedTuple):
    """A sentence and its two halves; a half without a letter or digit is the empty string."""
    full: str
    static: str
    dynamic: str


class Parser:
    """Finds noun chunks and splits sentences.

    model   a spaCy pipeline object, the name or path of an installed pipeline, "rules" for the
            built-in rules, or None: en_core_web_sm if it is installed, else the rules
    mask    what stands for a masked stretch of words: "" drops it, a word replaces it
    name    (attribute) which of them is at work; checkpoints keep it
    """

    def __init__(self, model=None, mask: str = ""):
        self.mask = mask
        if model is None:
            model = "en_core_web_sm" if spacy.util.is_package("en_core_web_sm") else "rules"
        if model == "rules":
            self.pipeline, self.name = spacy.blank("en"), "rules"
            return
        if isinstance(model, str):
            try:
                model = spacy.load(model)
            except (OSError, ImportError) as error:
                raise ValueError(f"spaCy cannot load the pipeline {model!r}: {error}. Install it, "
                                 f"or use the built-in rules with 'rules'") from error
        self.pipeline = model
        self.name = "{lang}_{name} {version}".format(**model.meta)

    def chunks(self, sentence: str) -> list[tuple[int, int]]:
        """Noun chunks of any string, as (start, end) characters: ordered, not overlapping."""
        if not sentence.strip():
            return []
        doc = self.pipeline(sentence.encode("utf-8", "replace").decode())   # half a surrogate: "?"
        if self.name == "rules":
            return rule_chunks(doc)
        if not doc.has_annotation("DEP"):
            raise ValueError(f"the spaCy pipeline {self.name!r} does no dependency parse, so it "
                             f"knows no noun chunks; use another pipeline or 'rules'")
        return [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]

    def split(self, sentence: str) -> Query:
        """Q -> (Q, Q^s, Q^d): what is in a noun chunk, and the rest."""
        return self.divide(sentence, self.chunks(sentence))

    def halve(self, sentence: str) -> Query:
        """Q -> (Q, Q^h, the rest): a random half of the words, for a sentence always the same."""
        words = [word.span() for word in re.finditer(r"\S+", sentence)]
        seed = hashlib.sha256(sentence.encode("utf-8", "replace")).hexdigest()
        chosen = sorted(random.Random(seed).sample(range(len(words)), (len(words) + 1) // 2))
        spans = []
        for i in chosen:
            if i - 1 in chosen:                         # neighbours are one stretch
                spans[-1] = (spans[-1][0], words[i][1])
            else:
                spans.append(words[i])
        return self.divide(sentence, spans)

    def divide(self, sentence: str, spans: list[tuple[int, int]]) -> Query:
        """The sentence with all but the spans masked, and with the spans masked."""
        ends = [0, *(offset for span in spans for offset in span), len(sentence)]
        pieces = [sentence[a:b].strip() for a, b in zip(ends, ends[1:])]
        rest, nouns = pieces[0::2], pieces[1::2]        # they alternate, beginning with the rest
        static, dynamic = [], []
        # UNSPECIFIED: how words are masked (CLIP has no mask token): dropped, or one word for them
        for i, words in enumerate(rest):
            spoken = any(c.isalnum() for c in words)
            static.append(self.mask if spoken else "")
            dynamic.append(words)
            if i < len(nouns):
                static.append(nouns[i])
                dynamic.append(self.mask)
        has_static = any(c.isalnum() for words in nouns for c in words)
        has_dynamic = any(c.isalnum() for words in rest for c in words)
        return Query(sentence, " ".join(filter(None, static)) if has_static else "",
                     " ".join(filter(None, dynamic)) if has_dynamic else "")


# ------------------------------------------------------------------------------- the built-in rules

RECIPROCAL = (("each", "other"), ("one", "another"))
OPEN = {"N": "noun", "V": "verb", "E": "either", "A": "adjective", "R": "adverb"}


@functools.cache
def word_lists() -> dict[str, set[str]]:
    """Class -> its words: assets/words.txt, lines "class: word word ..."."""
    lists: dict[str, set[str]] = {}
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if ":" in line and not line.startswith("#"):
            name, words = line.split(":", 1)
            lists.setdefault(name, set()).update(words.split())
    return lists


def is_a(word: str, *classes: str) -> bool:
    return any(word in word_lists()[name] for name in classes)


def kind_of(word: str) -> str:
    """The open class of a word out of context (E: verb or noun)."""
    for kind, name in OPEN.items():
        if is_a(word, name):
            return kind
    if word.endswith("ly"):
        return "R"
    return "V" if word.endswith(("ing", "ed")) and len(word) > 5 else "N"


class Tagger:
    """Tags one sentence from left to right, each word by its list and its neighbours.

    D determiner or number, O pronoun, A adjective, N noun, V verb, P preposition, + a joint inside
    a chunk (possessive 's, a hyphen, "red and white"), - everything else."""

    def __init__(self, words: list[str]):
        self.words, self.kinds, self.tags = words, [kind_of(word) for word in words], []
        self.finite = False                     # has this clause its verb already?
        for i in range(len(words)):
            self.tags.append(self.closed(i) or self.open(i))

    def word(self, i: int) -> str:
        return self.words[i] if 0 <= i < len(self.words) else ""

    def last(self) -> str:
        return self.tags[-1] if self.tags else ""

    def inside(self) -> bool:
        """Has a noun phrase begun whose noun is still to come?"""
        return self.last() in ("D", "A", "+")

    def nominal(self, i: int) -> bool:
        """Could word i go on with a noun phrase?"""
        word = self.word(i)
        if not any(c.isalnum() for c in word) or is_a(
                word, "preposition", "joining", "auxiliary", "pronoun", "article"):
            return False
        if is_a(word, "quantifier"):
            return word in ("few", "many", "more", "such") and self.nominal(i + 1)
        kind, after = self.kinds[i], self.kinds[i + 1] if i + 1 < len(self.kinds) else "-"
        return (kind in "NAE" or is_a(word, "number")
                or kind == "V" and participle(word) and after in "NAE" and self.nominal(i + 1)
                or kind == "R" and word.endswith("ly") and self.nominal(i + 1))

    def takes_object(self, i: int) -> bool:
        """Does word i stand before a determiner or a pronoun, as a verb with its object does?"""
        after = self.word(i + 1)
        return is_a(after, "article", "pronoun", "quantifier")

    def closed(self, i: int) -> str:
        """The tag of a word of a closed class; "" for all others."""
        word, before, after, last = self.words[i], self.word(i - 1), self.word(i + 1), self.last()
        if word in ("'s", "'"):
            possessive = last == "N" and self.nominal(i + 1) and not after.endswith("ing")
            return "+" if possessive else "-"
        if word in ("-", "/") and last in ("N", "A", "D") and after.isalnum():
            return "+"
        if not any(c.isalnum() for c in word):
            self.finite = self.finite and word not in ".;!?"
            return "-"
        if (word, after) in RECIPROCAL:
            return "D"
        if (before, word) in RECIPROCAL:
            return "N"
        if is_a(word, "pronoun"):
            return "O"
        if is_a(word, "article"):
            return "D"
        if word == "that":
            relative = (last in ("N", "O") or not self.nominal(i + 1)
                        or last == "V" and self.kinds[i + 1] != "N")
            self.finite = self.finite and not relative
            return "-" if relative else "D"
        if word.isdigit() or is_a(word, "quantifier", "number"):
            return self.quantifier(i)
        if is_a(word, "auxiliary"):
            self.finite = True
            return "V"
        if is_a(word, "joining"):
            if word in ("and", "or") and last in ("A", "N") and kind_of(before) == "A" \
                    and self.nominal(i + 2) and self.kinds[i + 1] == "A":
                return "+"                      # "a red and white shirt"
            self.finite = self.finite and not is_a(word, "clause")
            return "-"
        if is_a(word, "preposition") and not (self.inside() and word in ("inside", "outside")):
            return "P"
        return ""

    def quantifier(self, i: int) -> str:
        """ "two men", "one of the men", "another", "both of them". """
        word, after, last = self.words[i], self.word(i + 1), self.last()
        counts = word.isdigit() or is_a(word, "number")
        if self.nominal(i + 1):
            return "D"
        if after in ("of", "-") and word not in ("more", "most", "much", "such"):
            counts |= is_a(word, "alone") or word in ("many", "several", "few")
            return "N" if counts else "-"
        if is_a(word, "alone") and not (word in ("all", "both", "each") and last in ("N", "O")):
            return "O"
        return "N" if last in ("D", "A") or word.isdigit() else "-"

    def open(self, i: int) -> str:
        """The tag of a word of an open class."""
        word, before, kind, last = self.words[i], self.word(i - 1), self.kinds[i], self.last()
        if last == "D" and is_a(word, "place") or self.inside() and kind in "NAE":
            modifies = kind == "A" or word in ("next", "last", "other")
            return "A" if modifies and self.nominal(i + 1) else "N"
        if self.inside():                       # "a smiling man", "his painting"
            return "A" if self.nominal(i + 1) else "N" if kind == "V" else "-"
        if kind == "R":
            modifies = last in ("P", "V") and word.endswith("ly") and self.nominal(i + 1)
            return "A" if modifies and self.kinds[i + 1] in "VA" and self.nominal(i + 2) else "-"
        if kind == "A":
            predicate = is_a(before, "be") and self.word(i + 1) and self.kinds[i + 1] == "E"
            if self.nominal(i + 1) and not predicate:
                return "A"
            return "N" if before in ("in", "of") else "-"       # "a man in black"
        if kind == "N":                         # an unlisted verb: "the man rejoins the woman"
            verbal = word.endswith("s") and last in ("N", "O") and self.takes_object(i)
            result = "V" if verbal and not self.finite else "N"
        else:
            result = self.verb_or_noun(i)
        self.finite |= result == "V" and (last in ("N", "O") or not word.endswith("ing"))
        return result

    def verb_or_noun(self, i: int) -> str:
        """The tag of a word that may be a verb, outside of a begun noun phrase."""
        word, before, after, last = self.words[i], self.word(i - 1), self.word(i + 1), self.last()
        has_object = self.takes_object(i)
        if self.kinds[i] == "V":                # "with painted nails" has no verb
            modifies = word.endswith("ed") and (last == "P" and before != "to" or not last)
            return "A" if modifies and self.nominal(i + 1) else "V"
        if before == "to" or last == "O" or is_a(before, "subject", "auxiliary"):
            predicate = is_a(before, "be") and not participle(word) and is_a(word, "adjective")
            return "-" if predicate else "V"
        if last == "N":
            if self.finite:
                return "V" if has_object or participle(word) else "N"
            return "V"
        if last == "P":
            gerund = has_object or is_a(after, "preposition") and after != "of"
            return "V" if word.endswith("ing") and gerund else "N"
        if last == "V":
            return "V" if word.endswith("ing") or has_object and not self.finite else "N"
        if before in ("and", "or", "then", "but"):
            earlier = next((tag for tag in reversed(self.tags[:-1]) if tag in "NV"), "")
            goes_on = before == "then" or is_a(after, "particle") or word.endswith("ing")
            follows = earlier == "V" and is_a(after, "preposition")
            return "V" if has_object or follows or goes_on and "V" in self.tags else "N"
        if participle(word) or has_object:
            return "V"
        return "V" if last and is_a(after, "preposition") and after != "of" else "N"


def participle(word: str) -> bool:
    return word.endswith(("ing", "ed"))


def rule_chunks(doc) -> list[tuple[int, int]]:
    """Noun chunks of a tokenised sentence: pronouns, and the longest runs of  D* (A | N | +)* N."""
    words = [token.lower_ for token in doc]
    tags, chunks, i = Tagger(words).tags, [], 0
    while i < len(tags):
        if tags[i] == "O":
            chunks.append((i, i + 1))
        elif tags[i] in "DAN":
            end = i + 1
            while end < len(tags) and (tags[end] in "AN+" or tags[end] == "D" and (
                    tags[end - 1] == "D" or words[end].isdigit())):
                end += 1
            last = max((k for k in range(i, end) if tags[k] == "N"), default=None)
            if last is not None and not adverbial(words, tags, i, last):
                chunks.append((i, last + 1))
            i = end
            continue
        i += 1
    return [(doc[a].idx, doc[b - 1].idx + len(doc[b - 1])) for a, b in chunks]


def adverbial(words: list[str], tags: list[str], first: int, last: int) -> bool:
    """Is the noun phrase first..last a measure of time or extent ("several times", "each day")?"""
    if not is_a(words[last], "span") or first and tags[first - 1] == "P":
        return False
    return words[first] not in ("his", "her", "their", "its", "my", "our", "your")


def main() -> None:
    arguments = command.parser("split sentences into static and dynamic queries")
    add = arguments.add_argument
    add("sentences", nargs="*", help="sentences (default: one a line from standard input)")
    add("--parser", help="spaCy pipeline by name or path, or 'rules' (default: en_core_web_sm if "
                         "installed, else rules)")
    add("--mask", default="", help="word that stands for what is masked")
    options = arguments.parse_args()
    with command.sentences():
        parser = Parser(options.parser, options.mask)
        print(f"parser: {parser.name}")
        for sentence in options.sentences or (line.rstrip("\n") for line in sys.stdin):
            line = "".join("^" if any(a <= i < b for a, b in parser.chunks(sentence)) else " "
                           for i in range(len(sentence)))
            texts = (sentence, line.rstrip(), *parser.split(sentence)[1:],
                     parser.halve(sentence).static)
            for name, text in zip(("Q", "", "Q^s", "Q^d", "Q^h"), texts):
                print(f"{name:4s} {command.printable(text)}".rstrip())


if __name__ == "__main__":
    main()
