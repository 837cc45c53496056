"""What CLIP's features contain, before a retriever is trained on them (extras/reproduce.py).

    triplets       supplement, Table 1: does a wrong subject, verb or object lower CLIP's score?
    word_weights   supplement, Fig. 1: which words does the end token of a sentence attend to?

Both work with any CLIP. Shapes: S sentences, T frames, D width of CLIP's joint space, H x W patch
grid, L words.
"""
import csv
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import shapes
import video
from support.errors import Mistake

# ------------------------------------------------------------------------------ supplement, Table 1

KINDS = ("subject", "verb", "object")


def shape_triplets(kind: str, count: int, seed: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(sentence, right image, wrong image), images uint8 [32, 32, 3]. The wrong image has another
    object (subject), the same object in another motion (verb), or on another ground (object)."""
    rng = np.random.default_rng([seed, KINDS.index(kind), 7])           # not that of any video

    def image(colour: str, shape: str, verb: int, scene: str) -> np.ndarray:
        way = shapes.course(verb, rng)
        progress = rng.uniform(0.2, 0.8)                # somewhere in the middle of the motion
        # between where the motion starts and where it ends
        x, y, r = (a + (b - a) * progress for a, b in zip(way["from"], way["to"]))
        frame = shapes.ground(scene, 1, rng)
        shapes.draw(frame, colour, shape, x, y, r)
        return shapes.to_uint8(frame)[0]

    def two_of(options) -> list:
        return rng.choice(options, 2, replace=False).tolist()

    result = []
    for _ in range(count):
        colour, other_colour = two_of(list(shapes.COLOURS))
        shape, other_shape = two_of(shapes.SHAPES)
        scene, other_scene = two_of(list(shapes.SCENES))
        verb, other_verb = two_of(len(shapes.VERBS))                    # of synonyms, one
        right = image(colour, shape, verb, scene)
        if kind == "subject":
            wrong = image(other_colour, other_shape, verb, scene)
        elif kind == "verb":
            wrong = image(colour, shape, other_verb, scene)
        else:
            wrong = image(colour, shape, verb, other_scene)
        sentence = f"a {colour} {shape} {shapes.VERBS[verb][0]} on the {scene}"
        result.append((sentence, right, wrong))
    return result


def svo_triplets(folder: str) -> dict[str, list[tuple[str, str, str]]]:
    """SVO-Probes: kind -> (sentence, file of the right image, file of the wrong image), for rows
    whose images are in the folder, named by id, beside svo_probes.csv as published."""
    table = pathlib.Path(folder, "svo_probes.csv")
    if not table.is_file():
        raise Mistake(f"{folder} does not contain svo_probes.csv; name the folder that has it")
    paths = {path.stem: str(path) for path in pathlib.Path(folder).iterdir()}   # by image id
    result = {kind: [] for kind in KINDS}
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "pos_image_id" not in (rows.fieldnames or ()):
            raise Mistake(f"{table} is not svo_probes.csv: it has no column pos_image_id")
        for row in rows:
            right = paths.get(row["pos_image_id"])
            wrong = paths.get(row["neg_image_id"])
            if right is None or wrong is None:          # many have vanished from the web
                continue
            for kind, column in zip(KINDS, ("subj_neg", "verb_neg", "obj_neg")):
                if row[column].lower() == "true":
                    result[kind].append((row["sentence"], right, wrong))
    if not any(result.values()):
        raise Mistake(f"{folder} does not contain both images of any row of {table.name}; name "
                      f"them by pos_image_id and neg_image_id")
    return result


@torch.no_grad()
def triplet_scores(model: clip.CLIP, triplets: list, batch: int = 256) -> dict[str, float]:
    """Mean softmax score of the right and the wrong image; how often the right one wins, %."""
    device = model.logit_scale.device

    def pixels(image) -> Tensor:
        if isinstance(image, str):              # ffmpeg reads an image as a video of one frame
            frame = next(video.centre_frames(video.inspect(image), 1))
        else:
            frame = torch.from_numpy(image).permute(2, 0, 1)
        return clip.crop(frame[None], model.visual.resolution)

    right = []
    for i in range(0, len(triplets), batch):
        part = triplets[i:i + batch]                    # (sentence, right image, wrong image)
        sentences = [triplet[0] for triplet in part]
        q = model.encode_text(clip.tokenize(sentences, truncate=True).to(device))   # [batch, D]
        scores = []
        for k in (1, 2):
            frames = torch.cat([pixels(triplet[k]) for triplet in part]).to(device)
            x, _ = model.encode_image(clip.normalise(frames))                       # [batch, D]
            scores.append(F.cosine_similarity(q, x))
        # UNSPECIFIED: how suppl. Table 1 makes scores of cosines; CLIP's softmax over both images
        logits = model.logit_scale.exp() * torch.stack(scores, 1)                   # [batch, 2]
        right.append(logits.softmax(1)[:, 0].cpu())
    right = torch.cat(right)
    mean = right.mean().item()
    return {"right": mean, "wrong": 1 - mean, "difference": 2 * mean - 1,
            "right ahead": 100 * (right > 0.5).double().mean().item(), "triplets": len(right)}


# ------------------------------------------------------------------------------- supplement, Fig. 1

@torch.no_grad()
def end_token_attention(text: clip.TextTower, tokens: Tensor) -> Tensor:
    """The end token's attention in the last layer, mean over heads: ids [S, L] -> [S, L], sum 1."""
    end = tokens.argmax(1)                              # the end token has the largest id
    L = int(end.max()) + 1
    x = text.token_embedding(tokens[:, :L]) + text.positional_embedding[:L]
    for block in text.transformer.resblocks[:-1]:
        x = block(x, causal=True)
    last = text.transformer.resblocks[-1]
    # clip.Attention does not return its weights; the class that it extends does
    x = last.ln_1(x).transpose(0, 1)                                    # [L, S, C]
    query = x[end, torch.arange(len(end))][None]                        # [1, S, C]
    after = torch.arange(L, device=x.device) > end[:, None]             # True = after the end
    _, weights = nn.MultiheadAttention.forward(last.attn, query, x, x, key_padding_mask=after)
    return weights[:, 0]                                                # [S, L], mean over heads


def shapes_words(sentence: str) -> list[tuple[str, str]]:
    """The words with their part of speech: the last is the verb, the one before it the noun."""
    words = sentence.split()
    return list(zip(words, ["other"] * (len(words) - 2) + ["noun", "verb"]))


def spacy_words(pipeline, sentence: str) -> list[tuple[str, str]]:
    """The same for any sentence, by a spaCy pipeline."""
    kinds = {"NOUN": "noun", "PROPN": "noun", "PRON": "noun", "VERB": "verb", "AUX": "verb"}
    return [(token.text, kinds.get(token.pos_, "other"))
            for token in pipeline(sentence) if not token.is_space]


def word_weights(text: clip.TextTower, sentences: list[str], words_of) -> dict[str, list[float]]:
    """Part of speech -> the weights of all such words: the share of the end token's attention that
    a word's tokens get, times the number of words, so that 1 is an even share."""
    device = text.text_projection.device
    weights = {"noun": [], "verb": [], "other": []}
    for start in range(0, len(sentences), 512):
        part = sentences[start:start + 512]
        attention = end_token_attention(text, clip.tokenize(part, truncate=True).to(device)).cpu()
        for sentence, row in zip(part, attention):
            place = 1                                   # after the start token
            shares = []
            for word, kind in words_of(sentence):
                size = len(clip.encode(word))
                shares.append((kind, row[place:place + size].sum().item()))
                place += size
            # UNSPECIFIED: what suppl. Fig. 1 calls the weight of a word; see above
            total = sum(share for _, share in shares)   # without start and end token
            for kind, share in shares:
                weights[kind].append(share / total * len(shares))
    return weights
