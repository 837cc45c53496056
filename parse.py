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
ARTICLES = set("a an the my your his its our their every no one's".split())
QUANTIFIERS = set("this that these those some any each another all both either neither many "
                  "several "
                  "few more most much such her one enough".split())     # determiners before a noun
PRONOUNS = set("i you he she it we they me him us them himself herself itself themselves themself "
               "myself yourself ourselves oneself someone somebody anyone anybody everyone "
               "everybody "
               "something anything everything nothing nobody mine yours hers theirs".split())
ALONE = set("this these those one some another her all both each others".split())   # chunks alone
PREPOSITIONS = set("in on at by with from into onto of for to through across around about behind "
                   "before after against along among between beside besides beneath below above "
                   "near "
                   "toward towards inside outside without within during until till like than past "
                   "upon via per atop under underneath alongside throughout amongst over down up "
                   "off "
                   "out opposite".split())
JOINING = set("and or but nor so while because if since when where how why whether although though "
              "once as then there here who which what whom whose not n't please".split())
BE = set("is are was were be been being am 's 're get gets getting got".split())
AUXILIARY = BE | set("has have had having do does did can could will would shall should may might "
                     "must "
                     "'ve 'll 'd 'm wo ca".split())
SUBJECTS = set("i you he she it we they who which that someone somebody everyone people there".split())
SPANS = set("time times day days moment moments while bit way minute minutes second seconds hour "
            "hours "
            "night morning inch inches".split())                # heads of adverbial noun phrases


@functools.cache
def word_lists() -> dict[str, set[str]]:
    """assets/words.txt: lines "class: word word ..."."""
    lists: dict[str, set[str]] = {}
    for line in WORDS.read_text(encoding="utf-8").splitlines():
        if ":" in line and not line.startswith("#"):
            name, words = line.split(":", 1)
            lists.setdefault(name, set()).update(words.split())
    return lists


def kind_of(word: str) -> str:
    """The open class of a word out of context: V verb, E verb or noun, A adjective, R adverb, N
    noun."""
    lists = word_lists()
    for kind, name in (("N", "noun"), ("V", "verb"), ("E", "either"), ("A", "adjective"),
                       ("R", "adverb")):
        if word in lists[name]:
            return kind
    if word.endswith("ly"):
        return "R"
    return "V" if word.endswith(("ing", "ed")) and len(word) > 5 else "N"


def tag(words: list[str]) -> list[str]:
    """One tag a word: D determiner or number, O pronoun, A adjective, N noun, V verb, P
    preposition, + a joint inside a chunk (possessive 's, hyphen), "-" everything else."""
    kinds, tags = [kind_of(word) for word in words], []
    numbers, finite = word_lists()["number"], False     # finite: this clause has its verb already

    def nominal(i: int) -> bool:
        """Could a noun phrase go on with word i?"""
        if i >= len(words) or not any(c.isalnum() for c in words[i]):
            return False
        word = words[i]
        if word in PREPOSITIONS or word in JOINING or word in AUXILIARY or word in PRONOUNS or word in ARTICLES:
            return False
        if word in QUANTIFIERS:
            return word in ("few", "many", "more", "such") and nominal(i + 1)
        return kinds[i] in "NAE" or word in numbers or (
            kinds[i] == "V" and word.endswith(("ing", "ed")) and i + 1 < len(words)
            and kinds[i + 1] in "NAE"
            and nominal(i + 1)) or (kinds[i] == "R" and word.endswith("ly") and nominal(i + 1))

    for i, word in enumerate(words):
        before, after = (words[i - 1] if i else ""), (words[i + 1] if i + 1 < len(words) else "")
        last = tags[-1] if tags else ""
        inside = last in ("D", "A", "+")                                # a noun is still to come
        kind = kinds[i]
        if word == "'s" or word == "'":
            tags.append("+" if last == "N" and nominal(i + 1) and not after.endswith("ing")
                        else "-")
        elif word in ("-", "/") and last in ("N", "A", "D") and after.isalnum():
            tags.append("+")
        elif not any(c.isalnum() for c in word):
            tags.append("-")
            if word in ".;!?":
                finite = False
        elif (before, word) in (("each", "other"), ("one", "another")):
            tags.append("N")
        elif (word, after) in (("each", "other"), ("one", "another")):
            tags.append("D")
        elif word in PRONOUNS:
            tags.append("O")
        elif word in ARTICLES:
            tags.append("D")
        elif word == "that":
            relative = last in ("N",
                                "O") or not nominal(i + 1) or last == "V" and kinds[i + 1] != "N"
            tags.append("-" if relative else "D")
            finite = finite and not relative
        elif word in QUANTIFIERS or word in numbers or word.isdigit():
            if nominal(i + 1) or after in ("of",
                                           "-") and word not in ("more", "most", "much", "such"):
                tags.append("D" if nominal(i + 1) else "N" if word in numbers or word in ALONE
                            or word.isdigit() or word in ("many", "several", "few") else "-")
            else:
                tags.append("O" if word in ALONE and not (word in ("all", "both", "each") and
                                                          last in ("N", "O")) else
                            "N" if last in ("D", "A") or word.isdigit() else "-")
        elif word in AUXILIARY:
            tags.append("V")
            finite = True
        elif word in JOINING:
            tags.append("-")
            if word in ("and", "or") and last in ("A",
                                                  "N") and i + 2 < len(words) and kinds[i + 1] == "A" \
                    and kind_of(before) == "A" and nominal(i + 2):
                tags[-1] = "+"                                          # "a red and white shirt"
            elif word in ("who", "which", "while", "when", "where", "as", "then", "and", "but",
                          "because"):
                finite = False
        elif word in PREPOSITIONS and not (inside and kind in "NA"
                                           and word in ("inside", "outside")):
            tags.append("P")
        elif word in ("next", "same", "last", "first", "second", "front", "back", "right", "left",
                      "top",
                      "other", "own", "middle",
                      "bottom") and last == "D" or inside and kind in "NAE":
            tags.append("A" if (kind == "A" or word in ("next", "last", "other"))
                        and nominal(i + 1) or
                        kind == "A" and last == "A" and nominal(i + 1) else
                        "N" if kind != "A" or word not in ("able", "ready") else "A")
        elif inside and kind == "V":
            tags.append("A" if nominal(i + 1) else "N")
        elif inside and kind == "R":
            tags.append("A" if nominal(i + 1) else "-")
        elif kind == "R":
            tags.append("A" if word.endswith("ly") and last in ("P", "V") and nominal(i + 1)
                        and kinds[i + 1] in "VA" and nominal(i + 2) else "-")
        elif kind == "A":
            tags.append("A" if nominal(i + 1)
                        and not (last == "V" and before in BE and kinds[i + 1] == "E")
                        else "N" if last == "P" and before in ("in", "of") else "-")
        elif kind in "VE":
            tags.append(verb_or_noun(words, kinds, tags, i, finite, nominal))
            finite = finite or tags[-1] == "V" and not (word.endswith("ing")
                                                        and not (last in ("N", "O")))
        else:
            tags.append("N")
    return tags


def verb_or_noun(words, kinds, tags, i, finite, nominal) -> str:
    """The tag of a word that may be a verb, outside of a begun noun phrase."""
    word, before = words[i], words[i - 1] if i else ""
    after, last = (words[i + 1] if i + 1 < len(words) else ""), tags[-1] if tags else ""
    participle = word.endswith(("ing", "ed"))
    object_follows = after in ARTICLES or after in PRONOUNS or after in QUANTIFIERS
    if kinds[i] == "V":
        if participle and last == "P" and before != "to" and nominal(i + 1) and word.endswith("ed"):
            return "A"                                                  # "with painted nails"
        if word.endswith("ed") and not last and nominal(i + 1):
            return "A"
        return "V"
    if before == "to" or before in SUBJECTS or last == "O":
        return "V" if not (before == "to" and nominal(i + 1) and kinds[i + 1] == "N" and i + 2
                           == len(words)
                           and False) else "N"
    if before in AUXILIARY:
        return "V" if participle or before not in BE else ("-" if word in word_lists()["adjective"]
                                                           else "V")
    if last == "N":
        if finite and not object_follows:
            return "N" if not participle else "V"
        if object_follows or after in PREPOSITIONS or not after.isalnum():
            return "V" if not finite or participle or object_follows else "N"
        return "V" if not finite else "N"
    if last == "P":
        return "V" if word.endswith("ing") and (object_follows or after in PREPOSITIONS
                                                and after != "of") else "N"
    if last == "V":
        return "V" if word.endswith("ing") else "V" if object_follows and not finite else "N"
    if last == "-" and before in ("and", "or", "then", "but"):
        earlier = next((t for t in reversed(tags[:-1]) if t in "NV"), "")
        if object_follows or after in PREPOSITIONS and earlier == "V":
            return "V"
        return "V" if earlier == "V" and before == "then" else "N"
    if not last:
        return "V" if participle or object_follows else "N"
    return "V" if participle or object_follows or after in PREPOSITIONS and after != "of" else "N"


def rule_chunks(doc) -> list[tuple[int, int]]:
    """Noun chunks of a tokenised sentence: pronouns, and the longest runs of  D* (A | N | +)* N."""
    words = [token.lower_ for token in doc]
    tags, chunks, i = tag(words), [], 0
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
    if words[last] not in SPANS or first and tags[first - 1] == "P":
        return False
    return words[first] not in ("his", "her", "their", "its", "my", "our", "your")


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
