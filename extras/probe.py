"""What CLIP's features and Eq. 3-5 contain, before a retriever is trained on them.

    triplets       supplement, Table 1: does a wrong subject, verb or object lower CLIP's score?
    word_weights   supplement, Fig. 1: which words does the end token of a sentence attend to?
    verb_probes    can the verb of a moment be read off the heatmaps of Eq. 3, and off Eq. 4?
    heat_contrast  Eq. 3: is it warmer on objects than elsewhere?
    between_verbs  how much of a target's variance tells verbs apart?

All five are run by extras/reproduce.py. The first two work with any CLIP; the others need to know
which objects are where, as only the shapes world does.

Shapes: V videos, S sentences, T frames, D width of CLIP's joint space, H x W patch grid, L words.
"""
import csv
import math
import pathlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import clip
import data
import inject
import shapes
import staged
import video
from support.errors import Mistake

# ------------------------------------------------------------------------------ supplement, Table 1

KINDS = ("subject", "verb", "object")


def shape_triplets(kind: str, count: int, seed: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """(sentence, right image, wrong image), images uint8 [32, 32, 3]. The wrong image has another
    object (subject), the same object in another motion (verb), or on another ground (object)."""
    rng = np.random.default_rng([seed, KINDS.index(kind), 7])

    def image(colour, shape, verb, scene) -> np.ndarray:
        way, progress = shapes.course(verb, rng), rng.uniform(0.2, 0.8)
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
        verb, other_verb = two_of(len(shapes.VERBS))
        right = image(colour, shape, verb, scene)
        wrong = image(*{"subject": (other_colour, other_shape, verb, scene),
                        "verb": (colour, shape, other_verb, scene),
                        "object": (colour, shape, verb, other_scene)}[kind])
        result.append((f"a {colour} {shape} {shapes.VERBS[verb][0]} on the {scene}", right, wrong))
    return result


def svo_triplets(table: str, images: str) -> dict[str, list[tuple[str, str, str]]]:
    """SVO-Probes: kind -> (sentence, file of the right image, file of the wrong image), for rows
    whose images are in the folder, named by id. `table` is svo_probes.csv as published."""
    files = {path.stem: str(path) for path in pathlib.Path(images).iterdir()}
    result = {kind: [] for kind in KINDS}
    with open(table, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if "pos_image_id" not in (rows.fieldnames or ()):
            raise Mistake(f"{table} is not svo_probes.csv: it has no column pos_image_id")
        for row in rows:
            pair = files.get(row["pos_image_id"]), files.get(row["neg_image_id"])
            for kind, column in zip(KINDS, ("subj_neg", "verb_neg", "obj_neg")):
                if row[column].lower() == "true" and all(pair):
                    result[kind].append((row["sentence"], *pair))
    if not any(result.values()):
        raise Mistake(f"{images} does not contain both images of any row of {table}; name them by "
                      f"pos_image_id and neg_image_id")
    return result


@torch.no_grad()
def triplet_scores(model: clip.CLIP, triplets: list, batch: int = 256) -> dict[str, float]:
    """Mean softmax score of the right and the wrong image; how often the right one wins, %."""
    device = model.logit_scale.device

    def pixels(image) -> Tensor:
        if isinstance(image, str):              # PyAV reads an image as a video of one frame
            frame = next(video.frames_at(image, np.zeros(1)))
        else:
            frame = torch.from_numpy(image).permute(2, 0, 1)
        return clip.crop(frame[None], model.visual.resolution)

    right = []
    for i in range(0, len(triplets), batch):
        sentences, *pair = zip(*triplets[i:i + batch])
        q = model.encode_text(clip.tokenize(list(sentences), truncate=True).to(device))
        scores = []
        for images in pair:                     # the right ones, the wrong ones
            frames = torch.cat([pixels(image) for image in images]).to(device)
            x, _ = model.encode_image(clip.normalise(frames))
            scores.append(F.cosine_similarity(q, x))
        right.append((model.logit_scale.exp() * torch.stack(scores, 1)).softmax(1)[:, 0].cpu())
    right = torch.cat(right)
    mean = right.mean().item()
    return {"right": mean, "wrong": 1 - mean, "difference": 2 * mean - 1,
            "right ahead": 100 * (right > 0.5).double().mean().item(), "triplets": len(right)}


# ------------------------------------------------------------------------------- supplement, Fig. 1

@torch.no_grad()
def end_token_attention(text: clip.TextTower, tokens: Tensor) -> Tensor:
    """The end token's attention in the last layer, mean over heads: ids [S, L] -> [S, L], sum 1."""
    end = tokens.argmax(1)
    L = int(end.max()) + 1
    x = text.token_embedding(tokens[:, :L]) + text.positional_embedding[:L]
    for block in text.transformer.resblocks[:-1]:
        x = block(x, causal=True)
    last = text.transformer.resblocks[-1]
    C, heads = x.shape[2], last.attn.num_heads
    q, k, _ = F.linear(last.ln_1(x), last.attn.in_proj_weight,
                       last.attn.in_proj_bias).split(C, dim=2)
    q = q[torch.arange(len(x)), end].unflatten(1, (heads, -1))          # [S, heads, C/heads]
    k = k.unflatten(2, (heads, -1))                                     # [S, L, heads, C/heads]
    logits = torch.einsum("shc,slhc->shl", q, k) / math.sqrt(C // heads)
    seen = torch.arange(L, device=x.device) <= end[:, None]             # True = not after the end
    return logits.masked_fill(~seen[:, None], float("-inf")).softmax(2).mean(1)


def shapes_words(sentence: str) -> list[tuple[str, str]]:
    """The words with their part of speech: the last is the verb, the one before it the noun."""
    words = sentence.split()
    return list(zip(words, ["other"] * (len(words) - 2) + ["noun", "verb"]))


def spacy_words(pipeline):
    """The same for any sentence."""
    kinds = {"NOUN": "noun", "PROPN": "noun", "PRON": "noun", "VERB": "verb", "AUX": "verb"}
    return lambda sentence: [(token.text, kinds.get(token.pos_, "other"))
                             for token in pipeline(sentence) if not token.is_space]


def word_weights(text: clip.TextTower, sentences: list[str], words_of) -> dict[str, list[float]]:
    """Part of speech -> the weights of all such words: the share of the end token's attention that
    a word's tokens get, times the number of words, so that 1 is an even share."""
    device, weights = text.text_projection.device, {"noun": [], "verb": [], "other": []}
    for start in range(0, len(sentences), 512):
        part = sentences[start:start + 512]
        attention = end_token_attention(text, clip.tokenize(part, truncate=True).to(device)).cpu()
        for sentence, row in zip(part, attention):
            place, shares = 1, []                                       # after the start token
            for word, kind in words_of(sentence):
                size = len(clip.encode(word))
                shares.append((kind, row[place:place + size].sum().item()))
                place += size
            total = sum(share for _, share in shares)
            for kind, share in shares:
                weights[kind].append(share / total * len(shares))
    return weights


# ----------------------------------------------------------------------------- what Eq. 3-5 contain

def true_mask(event: dict, times: np.ndarray, grid: int) -> Tensor:
    """Share of each patch that the actor of an event covers: [T, H, W]."""
    stage = np.zeros((len(times), shapes.SIZE, shapes.SIZE, 3), dtype=np.float32)
    shapes.draw(stage, event["colour"], event["shape"], *shapes.whereabouts(event, times))
    painted = torch.from_numpy(stage.sum(3) > 0).float()                # [T, 32, 32]
    return F.adaptive_avg_pool2d(painted, grid)


def moments_of(world: str, root: str, count: int):
    """Each event of `count` videos, its frames [T, D] and patches [T, D', H, W], normalised."""
    store = data.open_store(world, world, root)
    for i in range(count):
        name = f"train-{i:04d}"
        plan = shapes.plan_of(shapes.seed_of(world), "train", i)
        frames, patches = (F.normalize(torch.from_numpy(
            store.read(name, kind).astype(np.float32)), dim=1) for kind in ("frames", "patches"))
        for event in plan["events"]:
            yield event, frames, patches


def plain_heat(frames: Tensor, patches: Tensor) -> Tensor:
    """Eq. 3 with the identity for both FC: [T, D], [T, D, H, W] -> [T, H, W]."""
    return torch.einsum("td,tdhw->thw", frames, patches) * frames.shape[1] ** 0.5


def linear_probe(x: Tensor, y: Tensor, classes: int, steps: int = 300) -> float:
    """Accuracy, %, of a linear classifier of x [S, K], fitted on the first half, on the second."""
    half = len(x) // 2
    x = (x - x[:half].mean(0)) / x[:half].std(0).clamp(min=1e-6)
    torch.manual_seed(0)
    layer = nn.Linear(x.shape[1], classes)
    optimiser = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(steps):
        loss = F.cross_entropy(layer(x[:half]), y[:half])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return 100 * (layer(x[half:]).argmax(1) == y[half:]).double().mean().item()


@torch.no_grad()
def _sequence(heat: Tensor, lstm: bool, seed: int) -> Tensor:
    """Eq. 4 by untrained modules: heat [S, T, H, W] -> m~ [S, 64]."""
    torch.manual_seed(seed)
    module = inject.SpatialDynamic(64, 64, heat.shape[2], heat.shape[1], 4, lstm)
    return torch.cat([module.dynamic(part) for part in heat.split(256)])


def verb_probes(world: str, root: str, count: int = 800, frames: int = 8) -> dict[str, float]:
    """Accuracy, %, with which a linear probe reads the verb (chance 14) off the heatmaps of Eq. 3,
    and off Eq. 4 with untrained modules; for the moment (8 frames of it) and the whole video."""
    heat, mask, whole, verbs = [], [], [], []
    for event, x, patches in moments_of(world, root, count):
        times = event["start"] + video.frame_centres(event["end"] - event["start"], frames)
        index = torch.from_numpy(np.clip(times.astype(int), 0, len(x) - 1))
        all_heat = plain_heat(x, patches)
        heat.append(all_heat[index])
        whole.append(all_heat)
        mask.append(true_mask(event, index.numpy() + 0.5, patches.shape[2]))
        verbs.append(event["verb"])
    read = {"moment, true mask of the actor": torch.stack(mask).flatten(1)}
    for what, maps in (("moment", torch.stack(heat)), ("whole video", torch.stack(whole))):
        standard = (maps - maps.mean()) / maps.std()
        read |= {f"{what}, heat sequence": maps.flatten(1),
                 f"{what}, LSTM over heat": _sequence(standard, True, 0),
                 f"{what}, averaged transformer over heat": _sequence(standard, False, 0)}
    return {name: linear_probe(x, torch.tensor(verbs), len(shapes.VERBS))
            for name, x in read.items()}


@torch.no_grad()
def heat_contrast(world: str, root: str, trained: inject.SpatialDynamic | None = None,
                  count: int = 200) -> dict[str, float]:
    """Eq. 3 on frames that show an actor: mean heat on its patches minus mean heat elsewhere, in
    standard deviations; and how often (%) the warmest patch, and a random one, shows part of the
    actor. Without `trained`, both FC are the identity."""
    contrasts, on_object, by_chance = [], [], []
    for event, x, patches in moments_of(world, root, count):
        heat = (plain_heat(x, patches) if trained is None
                else trained.heatmap(x[None], patches[None])[0])        # [T, H, W]
        mask = true_mask(event, np.arange(len(x)) + 0.5, patches.shape[2])
        seen = mask.flatten(1).sum(1) > 0.5
        for warm, covered in zip(heat[seen].flatten(1), mask[seen].flatten(1)):
            inside = (warm * covered).sum() / covered.sum()
            outside = (warm * (1 - covered)).sum() / (1 - covered).sum()
            contrasts.append(((inside - outside) / warm.std()).item())
            on_object.append(covered[warm.argmax()].item() > 0)
            by_chance.append((covered > 0).double().mean().item())
    return {"contrast": float(np.mean(contrasts)), "warmest on the actor": 100 * np.mean(on_object),
            "random patch on the actor": 100 * np.mean(by_chance), "frames": len(contrasts)}


@torch.no_grad()
def between_verbs(world: str, root: str, seed: int) -> dict[str, float]:
    """For each target that stage 1 or Eq. 2 could have: the share of its variance over the training
    sentences that lies between the seven motions, in percent."""
    store = data.open_store(world, world, root)
    rows = data.read_annotations(world, "train", root)
    model = clip.load(data.clip_file(world, root))
    queries = data.parser_of(world, root).split_all([row.sentence for row in rows])
    static = F.normalize(torch.cat([model.encode_text(part) for part in clip.tokenize(
        [query.static for query in queries]).split(1024)]), dim=1)      # x^qs [S, D]
    names = {row.video: i for i, row in enumerate({row.video: row for row in rows}.values())}
    frames = F.normalize(torch.stack([torch.from_numpy(store.read(name, "frames")).float()
                                      for name in names]), dim=2)       # [B, T, D]
    video_of = torch.tensor([names[row.video] for row in rows])
    moments_sec = torch.tensor([[row.start_sec, row.end_sec] for row in rows])
    durations_sec = torch.tensor([row.duration_sec for row in rows])
    torch.manual_seed(seed)
    context = inject.VisualContext(static.shape[1], 4)
    targets = {"x~^qs of Eq. 1, untrained": context(static, frames, video_of)}
    for target in ("change", "mean", "whole"):
        targets[TARGETS[target]] = staged.temporal_change(
            static, frames[video_of], moments_sec, durations_sec, target)
    motion = {word: i for i, pair in enumerate(shapes.VERBS) for word in pair}
    verbs = torch.tensor([motion[query.full.split()[-1]] for query in queries])
    return {name: 100 * share_between(x, verbs) for name, x in targets.items()}


@torch.no_grad()
def verb_cosines(text: clip.TextTower, world: str, root: str) -> Tensor:
    """Cosines between the dynamic queries of the 14 verbs, in the order of shapes.VERBS: synonyms
    first, then opposites, [14, 14]."""
    sentences = [f"the red circle {word}" for pair in shapes.VERBS for word in pair]
    queries = [query.dynamic for query in data.parser_of(world, root).split_all(sentences)]
    device = text.token_embedding.weight.device
    return inject.pairwise_cosine(text.encode_text(text.tokenize(queries).to(device)))


TARGETS = {"change": "late minus early half of the moment", "mean": "mean of the moment",
           "whole": "mean of the whole video"}


def share_between(x: Tensor, groups: Tensor) -> float:
    """Variance of the means of the groups, weighted by their sizes, as a share of that of x.
    x [S, D], groups [S]."""
    centred, between = x - x.mean(0), 0.0
    for group in groups.unique():
        members = centred[groups == group]
        between += len(members) * members.mean(0).square().sum()
    return float(between / centred.square().sum())
