"""Sentence Q -> static query Q^s and dynamic query Q^d (paper Sec. 3.1, first paragraph).

The noun chunks of a sentence (a noun plus the words describing it) tell what can be seen in any one
frame; the rest tells what changes. Q^s is the sentence with all but its noun chunks masked, Q^d the
sentence with its noun chunks masked:

    Q    "a person opens the door"
    Q^s  "a person the door"
    Q^d  "opens"

    python parse.py "a person opens the door"

Chunks come from a spaCy pipeline with a dependency parse where there is one (`doc.noun_chunks`),
else from the rules below on spaCy's own tokenizer. The rules tag each token by word lists and
endings, let its neighbours correct the tag, and then take every maximal run  determiner? modifier*
noun.
"""
import argparse
import functools
import pathlib
import sys
from typing import NamedTuple

import spacy

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
                                 f"or use the "
                                 f"built-in rules with 'rules'") from error
        self.pipeline = model
        self.name = "{lang}_{name} {version}".format(**model.meta)

    def chunks(self, sentence: str) -> list[tuple[int, int]]:
        """Noun chunks as (start, end) character offsets: ordered, not overlapping. Any string is
        read."""
        if not sentence.strip():
            return []
        doc = self.pipeline(sentence)
        if self.name == "rules":
            return rule_chunks(doc)
        if not doc.has_annotation("DEP"):
            raise ValueError(f"the spaCy pipeline {self.name!r} does no dependency parse, so it "
                             f"knows no noun "
                             f"chunks; use another pipeline or 'rules'")
        return [(chunk.start_char, chunk.end_char) for chunk in doc.noun_chunks]

    def split(self, sentence: str) -> Query:
        """Q -> (Q, Q^s, Q^d)."""
        chunks = self.chunks(sentence)
        ends = [0, *(offset for chunk in chunks for offset in chunk), len(sentence)]
        pieces = [sentence[a:b].strip() for a, b in zip(ends, ends[1:])]
        rest, nouns = pieces[0::2], pieces[1::2]        # they alternate, beginning with the rest
        # UNSPECIFIED: how a word is masked (CLIP has no mask token): dropped, or one word for the
        # stretch
        static, dynamic = [], []
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

# Closed classes, whole; open classes are in assets/words.txt.
DETERMINERS = set("a an the this that these those some any each every no another all both either "
                  "neither "
                  "my your his her its our their one's many several few more most much other such"
                  .split())
PRONOUNS = set("i you he she it we they me him us them himself herself itself themselves myself "
               "yourself "
               "someone somebody anyone anybody everyone everybody something anything everything "
               "nothing "
               "nobody one another each".split())
PREPOSITIONS = set("in on at by with from into onto out of off over under up down to for through "
                   "across "
                   "around about behind before after against along among between beside besides "
                   "beneath below "
                   "above near toward towards inside outside without within during until till as "
                   "like than "
                   "past upon via per next atop while because if since when where how why whether "
                   "so "
                   "although though once and or but nor then".split())
VERBAL = set("is are was were be been being am has have had having do does did done doing can "
             "could will "
             "would shall should may might must not n't 's 're 've 'm 'll 'd who which what whom "
             "whose "
             "there here".split())


@functools.cache
def word_lists() -> dict[str, set[str]]:
    """assets/words.txt: lines "class: word word ...". Verbs are listed in their base form and get
    their endings."""
    lists: dict[str, set[str]] = {}
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if ":" in line and not line.startswith("#"):
            name, words = line.split(":", 1)
            lists.setdefault(name.strip(), set()).update(words.split())
    lists["verb"] |= {form for verb in lists["verb"] for form in inflected(verb)}
    return lists


def inflected(verb: str) -> list[str]:
    """Regular forms of a verb: opens, opened, opening; tries, tried; stopped, stopping; closes,
    closing."""
    stem = verb[:-1] if verb.endswith("e") and not verb.endswith("ee") else verb
    vowels = [c in "aeiou" for c in verb]
    double = verb[-1] if vowels[-3:] == [False, True, False] and verb[-1] not in "wxy" else ""
    if verb.endswith("y") and not vowels[-2]:
        return [verb[:-1] + "ies", verb[:-1] + "ied", verb + "ing"]
    s = "es" if verb.endswith(("s", "x", "z", "ch", "sh", "o")) else "s"
    return [verb + s, stem + double + "ed", stem + double + "ing", stem + "ed", stem + "ing"]


def tag(words: list[str]) -> list[str]:
    """One tag a word: D determiner, O pronoun, A adjective, N noun, V verb, "-" everything else."""
    lists, tags = word_lists(), []
    for i, word in enumerate(words):
        before = tags[-1] if tags else ""
        after = words[i + 1] if i + 1 < len(words) else ""
        if not any(c.isalnum() for c in word):
            tags.append("-")
        elif word in PRONOUNS and word not in DETERMINERS:
            tags.append("O")
        elif word in DETERMINERS or word.isdigit() or word in lists["number"]:
            tags.append("D")
        elif (word in PREPOSITIONS or word in VERBAL or word in lists["adverb"]
              or word.endswith("ly")):
            tags.append("-")
        elif word in lists["verb"] and word not in lists["noun"] and before not in ("D", "A"):
            tags.append("V")
        elif word in lists["adjective"]:
            tags.append("A")
        elif word in lists["verb"] and before in ("N", "O") and after not in lists["noun"]:
            tags.append("V")                            # "the person drinks", against "the drinks"
        else:
            tags.append("N")
    return tags


def rule_chunks(doc) -> list[tuple[int, int]]:
    """Noun chunks of a tokenised sentence: pronouns, and the longest runs of  D? (A | N)* N."""
    words = [token.lower_ for token in doc]
    tags, chunks, i = tag(words), [], 0
    while i < len(tags):
        if tags[i] == "O":
            chunks.append((i, i + 1))
        elif tags[i] in "DAN":
            end = i + 1
            while end < len(tags) and tags[end] in ("A",
                                                    "N") + (("D",) if tags[end - 1] == "D" else ()):
                end += 1
            last = max((k for k in range(i, end) if tags[k] == "N"), default=None)
            if last is not None:
                chunks.append((i, last + 1))
            i = end
            continue
        i += 1
    return [(doc[a].idx, doc[b - 1].idx + len(doc[b - 1])) for a, b in chunks]


def main() -> None:
    arguments = argparse.ArgumentParser(description="split sentences into static and dynamic "
                                                    "queries")
    arguments.add_argument("sentences", nargs="*",
                           help="sentences (default: one a line from standard input)")
    arguments.add_argument("--parser",
                           help="spaCy pipeline by name or path, or 'rules' (default: "
                                "en_core_web_sm "
                                            "if installed, else rules)")
    arguments.add_argument("--mask", default="",
                           help="word that stands for what is masked (default: none)")
    options = arguments.parse_args()
    try:
        parser = Parser(options.parser, options.mask)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"parser: {parser.name}")
    for sentence in options.sentences or (line.rstrip("\n") for line in sys.stdin):
        query = parser.split(sentence)
        print(f"Q    {query.full}\nQ^s  {query.static}\nQ^d  {query.dynamic}")


if __name__ == "__main__":
    main()
