"""How much does a verb's noun tell about the verb? In published sentences, and in shapes worlds.

    python -m extras.context --annotations DIR

In every frame of "a person opens the fridge" there may be a fridge, so a network that sees no
motion can still guess the verb. The measure is the mutual information of verb and noun in bits,
I(V; N) = sum p(v, n) log2 p(v, n) / (p(v) p(n)), the mean of their pointwise mutual information. In
a finite sample it is positive by chance, so that of permuted pairs is subtracted. Verbs with fewer
than 50 pairs are left out. For a shapes world with `--context p` the noun is the background of the
event, and the information is exact.
"""
import support  # first, for a Ctrl-C while torch is imported
import collections
from collections.abc import Iterator

import numpy as np

import data
import parse
import shapes
from support import files, options
from support.errors import Mistake, reported
from support.text import markdown

OBJECTS = ("dobj", "obj", "pobj")               # in spaCy's labels, of the verb or its preposition


def pairs_of(sentences: list[str], nlp) -> Iterator[tuple[str, str]]:
    """(verb, noun), lemmas: each verb with its object and the objects of its prepositions."""
    for doc in nlp.pipe(sentences, batch_size=512):
        for noun in doc:
            if noun.dep_ in OBJECTS and noun.pos_ in ("NOUN", "PROPN"):
                verb = noun.head.head if noun.dep_ == "pobj" else noun.head
                if verb.pos_ == "VERB":
                    yield verb.lemma_, noun.lemma_.lower()


def information(joint: np.ndarray) -> tuple[float, float]:
    """Mutual information of rows and columns of a table of counts or probabilities, and the entropy
    of the rows, in bits."""
    p = joint / joint.sum()
    rows, columns = p.sum(1, keepdims=True), p.sum(0, keepdims=True)
    seen, each = p > 0, rows[rows > 0]
    return (float((p[seen] * np.log2((p / (rows * columns))[seen])).sum()),
            float(-(each * np.log2(each)).sum()))


def shares(pairs: list[tuple[str, str]], at_least: int = 50, rounds: int = 10) -> dict[str, float]:
    """The information of a list of pairs beyond that of permuted pairs, in bits and as a share of
    the entropy of the verbs."""
    counts = collections.Counter(verb for verb, _ in pairs)
    pairs = [(verb, noun) for verb, noun in pairs if counts[verb] >= at_least]
    verbs, nouns = (np.unique(values, return_inverse=True)[1] for values in zip(*pairs))

    def of(nouns: np.ndarray) -> tuple[float, float]:
        joint = np.zeros((verbs.max() + 1, nouns.max() + 1))
        np.add.at(joint, (verbs, nouns), 1)
        return information(joint)

    rng = np.random.default_rng(0)
    total, entropy = of(nouns)
    chance = np.mean([of(rng.permutation(nouns))[0] for _ in range(rounds)])
    return {"pairs": len(pairs), "verbs": int(verbs.max()) + 1, "entropy": entropy,
            "information": total - chance, "by chance": chance,
            "share": (total - chance) / entropy}


def of_world(p: float) -> dict[str, float]:
    """Verb and background of a shapes world with `--context p`."""
    V, G = len(shapes.VERBS), len(shapes.SCENES)
    joint = np.full((V, G), (1 - p) / G)        # otherwise any background
    joint[np.arange(V), np.arange(V) % G] += p
    bits, entropy = information(joint)
    return {"verbs": V, "entropy": entropy, "information": bits, "share": bits / entropy}


def table(annotations: str) -> str:
    nlp = files.need("spacy", "parsing").load(next(filter(
        files.need("spacy", "parsing").util.is_package, parse.PIPELINES), parse.PIPELINES[0]))
    rows = {}
    for dataset, split in (("charades", "train"), ("activitynet", "train")):
        sentences = [row.sentence for row in data.read_annotations(dataset, split, annotations)]
        rows[f"{dataset}, {split}"] = shares(list(pairs_of(sentences, nlp)))
    for p in (0.0, 0.25, 0.5, 0.75, 0.9):
        rows[f"shapes world, --context {p}"] = of_world(p)
    return markdown(["", "pairs", "verbs", "H(V), bits", "I(V; N), bits", "by chance", "I / H"], [
        [name, str(row.get("pairs", "")), str(row["verbs"]),
         *(f"{row[key]:.2f}" if key in row else ""
           for key in ("entropy", "information", "by chance")), f"{100 * row['share']:.0f}%"]
        for name, row in rows.items()])


def main() -> None:
    arguments = options.parser("how much nouns tell about verbs", prog="python -m extras.context")
    arguments.add_argument("--annotations", help="folder of the published annotations")
    given = arguments.parse_args()
    with reported():
        if not given.annotations:
            raise Mistake("name the folder of the published annotations with --annotations")
        print(table(given.annotations))


if __name__ == "__main__":
    main()
