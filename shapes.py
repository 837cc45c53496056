"""The shapes world: a dataset that needs no download, and a small CLIP trained on its stills.

On a dark ground, coloured shapes rise, fall, advance, retreat, grow, shrink or blink. A query such
as "the red circle rises" names one actor and one motion of a video in which two actors perform two
motions each, in random order: nouns alone match every second event, and so do verbs alone.

    python shapes.py                                    # data/shapes: small CLIP, videos, features
    python shapes.py --seed 1                           # data/shapes-1: another world, another CLIP
    python shapes.py --coupling 0.9                     # data/shapes-p90: motions go with shapes
    python shapes.py --pretrain FILE                    # retrain a world's small CLIP

The small CLIP is pre-trained as CLIP was, on captioned images. A still cannot show a motion, so the
verbs in its captions are random and its text tower learns to ignore verbs, which is the premise of
the paper (Sec. 1). Three colours and three shapes occur in stills only; videos of them are the
novel-word split. Two in seven verb-shape pairs occur in no training video; they are the
novel-composition split. All files have the same formats as those of a real dataset.

In real sentences nouns go with verbs: doors open, sandwiches are eaten. With --coupling p, every
shape goes with two motions, and with probability p the actors of a video perform those of their
shapes. novel-composition and novel-word are unchanged; coupled-novel-word is coupled, too.

Rounding differs between machines, and pre-training amplifies the difference. Every run on worlds 0
to 4 therefore starts from a shipped CLIP (assets/small-clip-0.pt to -4.pt).

Lengths are in pixels of a 32 x 32 frame, y pointing down. Times in a script are in frame lengths,
32 per video; names that end in `_sec`, and the function `seconds`, are in seconds.
"""
import fractions
import json
import math
import os
import pathlib
import re
import shutil
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import trange

import clip
import data
import mmn
import video
from support import files, options, progress
from support.errors import Mistake, reported

SIZE = 32                                               # side of a frame, pixels
EXPORTED = 256                                          # side of a frame of an exported mp4
FRAMES = 32                                             # T: sampled frames per video
SCENES = {"sand": (52, 44, 20), "grass": (10, 44, 14), "night": (12, 10, 34), "snow": (52, 54, 60),
          "water": (8, 32, 56), "road": (34, 34, 34)}   # dark, so that every colour stands out
COLOURS = {"red": (230, 40, 40), "green": (50, 200, 60), "blue": (60, 90, 250),
           "yellow": (240, 230, 60), "white": (250, 250, 250), "pink": (250, 140, 190),
           "brown": (140, 85, 40), "grey": (140, 140, 140), "beige": (235, 210, 170),
           "maroon": (140, 20, 50), "olive": (140, 140, 30), "teal": (20, 140, 125),
           "orange": (250, 140, 20), "purple": (150, 50, 210), "cyan": (60, 225, 230)}
SHAPES = ("circle", "square", "triangle", "cross", "bar", "star", "heart", "moon", "ring",
          "diamond", "pillar")
NOVEL_COLOURS = ("orange", "purple", "cyan")
NOVEL_SHAPES = ("ring", "diamond", "pillar")
VERBS = (("rises", "climbs"), ("falls", "drops"), ("advances", "proceeds"),
         ("retreats", "withdraws"), ("grows", "expands"), ("shrinks", "contracts"),
         ("blinks", "flashes"))                         # two synonyms per motion
SYNONYMS = {second: first for first, second in VERBS}
MOVES = {"rises": (0, -1), "falls": (0, 1), "advances": (1, 0), "retreats": (-1, 0)}
SIZES = {"grows": (2.5, 6.5), "shrinks": (6.5, 2.5)}    # first and last radius
SPLITS = {"train": 800, "val": 150, "test": 150, "novel-word": 150, "novel-composition": 300,
          "val-novel-word": 150}  # videos; hyperparameters are chosen on the two val splits only
COUPLED_SPLITS = SPLITS | {"coupled-novel-word": 150}   # of a world whose motions go with shapes
SHIPPED_SHA256 = (                                      # assets/small-clip-<seed>.pt
    "6cb068bec2c625764e0e0de4d6dfbef280c2083fcdd0cc05548c17a68424f705",
    "e4cd9166d9b08ad55d999a706246caf163c6ad5617dc80e9f8774139e1868269",
    "a87c32c875de3c17fb230c6ba6d9a1e480ea6b3b533e009008070b6693f91dd0",
    "1b68c58ccae805d9c30d1a85c3b89701137c71b6ee9bff18beac5c3987fc1a38",
    "8d62a9449b95f837154907fd6dbc28a700bc0f7270f29626a3852115d9fe1378")


# ------------------------------------------------------------------------------------------ drawing

def box(x: np.ndarray, y: np.ndarray, w: np.ndarray, h: np.ndarray) -> np.ndarray:
    """Signed distance of points to a box of half width w and half height h around (0, 0)."""
    return np.maximum(abs(x) - w, abs(y) - h)


def distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Rough signed distance (pixels, negative inside) of points to a shape of radius r at (0, 0).
    The maximum of two distances is an intersection, the minimum a union."""
    if shape == "circle":
        return np.hypot(x, y) - r
    if shape == "square":
        return box(x, y, 0.85 * r, 0.85 * r)
    if shape == "triangle":                             # the base, and two sides of slope 2
        return np.maximum(y - 0.8 * r, (2 * abs(x) - y - 1.1 * r) / math.sqrt(5))
    if shape == "cross":
        return np.minimum(box(x, y, r, 0.3 * r), box(x, y, 0.3 * r, r))
    if shape == "bar":
        return box(x, y, 1.2 * r, 0.4 * r)
    if shape == "pillar":
        return box(x, y, 0.4 * r, 1.2 * r)
    if shape == "star":
        spike = 2 * (np.arctan2(x, -y) * 5 / (2 * math.pi) % 1) - 1     # -1 and 1 at five points
        return np.hypot(x, y) - r * (0.55 + 0.65 * abs(spike))
    if shape == "heart":                                # two discs above, a wedge below
        discs = np.hypot(abs(x) - 0.5 * r, y + 0.4 * r) - 0.55 * r
        wedge = np.maximum(-y - 0.4 * r, (1.2 * abs(x) + y - r) / 1.6)
        return np.minimum(discs, wedge)
    if shape == "moon":                                 # a disc minus a shifted one
        return np.maximum(np.hypot(x, y) - r, 0.85 * r - np.hypot(x - 0.55 * r, y))
    if shape == "ring":
        return abs(np.hypot(x, y) - 0.8 * r) - 0.25 * r
    return (abs(x) / 0.8 + abs(y) / 1.2 - r) / 1.5      # diamond


def draw(frames: np.ndarray, colour: str, shape: str, x, y, r, visible=True) -> None:
    """Paints an object into float frames [n, 32, 32, 3]; x, y, r, visible: [n], or one for all."""
    # each [n, 1, 1], to broadcast over the pixels
    x, y, r, visible = (np.broadcast_to(v, len(frames))[:, None, None] for v in (x, y, r, visible))
    centre = np.arange(SIZE) + 0.5                      # of the pixels of a row or column
    away = distance(shape, centre[None, None, :] - x, centre[None, :, None] - y, r)
    # anti-aliased: a pixel that the outline crosses is covered in part
    inside = (np.clip(0.5 - away, 0, 1) * visible)[..., None]           # [n, 32, 32, 1]
    frames += inside * (np.array(COLOURS[colour], dtype=np.float32) - frames)


def ground(scene: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n equal frames of a speckled ground, float [n, 32, 32, 3]."""
    speckle = rng.normal(0, 5, (SIZE, SIZE, 1))         # the same in all three channels
    return np.repeat((np.array(SCENES[scene]) + speckle)[None], n, 0).astype(np.float32)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames, 0, 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------- stills

def still(rng: np.random.Generator,
          objects: int | None = None) -> tuple[np.ndarray, str, list[dict]]:
    """One image [32, 32, 3], its caption, and its objects (colour, shape, x, y, r). By default
    there are one or two objects."""
    scene = rng.choice(list(SCENES))
    image = ground(scene, 1, rng)                                       # [1, 32, 32, 3]
    phrases, things = [], []
    for _ in range(objects or rng.choice((1, 2), p=(0.7, 0.3))):
        # objects keep apart; after 20 tries an overlap is accepted, so that this always ends
        for _ in range(20):
            x, y = rng.uniform(5, SIZE - 5, 2)
            if all(math.hypot(x - t["x"], y - t["y"]) > 10 for t in things):
                break
        colour = rng.choice(list(COLOURS))
        shape = rng.choice(SHAPES)
        r = rng.uniform(2.5, 6.5)                       # the sizes between which videos grow
        thing = {"colour": colour, "shape": shape, "x": x, "y": y, "r": r}
        draw(image, colour, shape, x, y, r)
        phrases.append(phrase(thing, rng))
        things.append(thing)
    caption = " and ".join(phrases)
    if rng.random() < 0.3:
        caption += f" on the {scene}"
    return to_uint8(image)[0], caption, things


def phrase(thing: dict, rng: np.random.Generator) -> str:
    """An object in words. As on the web, a caption mentions only some of what the image shows (or
    colours alone would identify it), and its verb, if any, is a guess."""
    words = ["a"]                                       # e.g. "a small red star falls at the top"
    if rng.random() < 0.5:
        words.append("small" if thing["r"] < 4.5 else "large")
    if rng.random() < 0.6:
        words.append(thing["colour"])
    words.append(thing["shape"])
    if rng.random() < 0.5:
        words.append(rng.choice(np.ravel(VERBS)))
    if rng.random() < 0.8:
        side = "left" if thing["x"] < SIZE / 2 else "right"
        height = "top" if thing["y"] < SIZE / 2 else "bottom"
        # one side or both: "on the left", "at the top", "at the top left"
        places = (f"on the {side}", f"at the {height}", f"at the {height} {side}")
        words.append(places[rng.integers(3)])
    return " ".join(words)


# ----------------------------------------------------------------------------------- the small CLIP

def small_clip(seed: int, resnet: bool = False) -> clip.CLIP:
    """A CLIP of width 64 with random weights: a ViT behind a convolutional stem, or a ResNet that
    sees the 32 x 32 frames at 64 x 64; and a causal text tower. The joint width is 64, too."""
    torch.manual_seed(seed)
    width, heads, layers = 64, 4, 2
    if resnet:
        visual = clip.ModifiedResNet(2 * SIZE, (1, 1, 1, 1), 16, 8, width)
        initial = [(visual.attnpool.positional_embedding, 0.1)]
    else:
        # a plain patch embedding learns neither shape nor place at this size, hence the stem
        visual = clip.VisionTransformer(SIZE, 2, width, layers, heads, width, clip.QuickGELU,
                                        stem=(24, 48))
        initial = [(visual.class_embedding, 0.4), (visual.positional_embedding, 0.4),
                   (visual.proj, width ** -0.5)]
    model = clip.CLIP(visual, len(clip.vocabulary()[0]), 77, width, layers, heads, width,
                      clip.QuickGELU)
    initial += [(model.token_embedding.weight, 0.4), (model.positional_embedding, 0.1),
                (model.text_projection, width ** -0.5)]
    # larger standard deviations than OpenAI's, or shape and place would not be learned
    for parameter, std in initial:
        torch.nn.init.normal_(parameter, std=std)
    return model


def contrastive_loss(logits: Tensor) -> Tensor:
    """CLIP's loss: each row picks its column, each column its row. (CE(S) + CE(S^T)) / 2, nats.

    logits    [B, B] scaled cosines; the matching pairs are on the diagonal"""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def pretrain(seed: int, steps: int = 3000, count: int = 24_000, batch: int = 128,
             rounds: int = 3, resnet: bool = False) -> clip.CLIP:
    """Trains the small CLIP on `count` stills (two minutes). If the result misses its gates (rare),
    it is trained for another round; `rounds` at most."""
    rng = np.random.default_rng([seed, 0])
    stills = [still(rng) for _ in trange(count, desc="stills", disable=None)]
    images = np.stack([image for image, _, _ in stills])                # [count, 32, 32, 3]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)               # [count, 3, 32, 32]
    tokens = clip.tokenize([caption for _, caption, _ in stills])       # [count, 77]
    model = small_clip(seed, resnet)
    generator = torch.Generator().manual_seed(seed)     # of the batches
    for _ in range(rounds):
        train_round(model.train(), images, tokens, steps, batch, generator)
        model.eval()
        missed = missed_gates(zero_shot(model, seed))
        if not missed:
            break
        print(f"the small CLIP missed its gates ({', '.join(missed)}); training another round")
    return model


def train_round(model: clip.CLIP, images: Tensor, tokens: Tensor, steps: int, batch: int,
                generator: torch.Generator) -> None:
    """AdamW at 2e-3 with warm-up and a cosine schedule; batches are drawn with replacement."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98),
                                  weight_decay=0.02, fused=True)
    bar = trange(steps, desc="small CLIP", disable=None)
    for step in bar:
        # 50 steps of warm-up: AdamW's first steps have full size whatever the gradient, because
        # its running averages have seen little yet
        rate = min((step + 1) / 50, progress.cosine(step / steps))
        optimiser.param_groups[0]["lr"] = 2e-3 * rate
        chosen = torch.randint(len(images), (batch,), generator=generator)      # [B]
        x, _ = model.encode_image(clip.preprocess(images[chosen], model.visual.resolution))
        q = model.encode_text(tokens[chosen])                           # [B, D]
        scaled = model.logit_scale.exp() * F.normalize(x, dim=-1)       # [B, D]
        loss = contrastive_loss(scaled @ F.normalize(q, dim=-1).T)      # of [B, B]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        model.logit_scale.data.clamp_(max=math.log(100))                # as CLIP does
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")


GATES = {"colour": 0.9, "shape": 0.6, "left or right": 0.95}    # least zero-shot accuracies


@torch.no_grad()
def zero_shot(model: clip.CLIP, seed: int, count: int = 1000) -> dict[str, float]:
    """Zero-shot accuracy of the small CLIP on new stills of one object: which of 15 colours, 11
    shapes and 2 sides, with the rest of the caption true. And the mean cosine between verbs in
    "a red circle <verb>"; 1 means that they are indistinguishable."""
    rng = np.random.default_rng([seed, 99])             # `pretrain` uses [seed, 0]
    stills = [still(rng, 1) for _ in range(count)]
    things = [objects[0] for _, _, objects in stills]
    images = np.stack([image for image, _, _ in stills])                # [count, 32, 32, 3]
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    x, _ = model.encode_image(clip.preprocess(images, model.visual.resolution))
    x = F.normalize(x, dim=1)                                           # [count, D]

    def read(sentences: list[str]) -> Tensor:
        return F.normalize(model.encode_text(clip.tokenize(sentences)), dim=1)

    def accuracy(form: str, words: list[str], answers: list[str]) -> float:
        # every still with every word, so that only the word decides
        q = [read([form.format(word, thing) for thing in things]) for word in words]
        chosen = torch.einsum("cd,cod->co", x, torch.stack(q, 1)).argmax(1)     # [count]
        correct = torch.tensor([words.index(answer) for answer in answers])
        return (chosen == correct).float().mean().item()

    verbs = read([f"a red circle {first}" for first, _ in VERBS])       # [7, D]
    apart = ~torch.eye(len(VERBS), dtype=torch.bool)                    # a verb with itself is 1
    colours = [thing["colour"] for thing in things]
    shapes = [thing["shape"] for thing in things]
    sides = ["left" if thing["x"] < SIZE / 2 else "right" for thing in things]
    return {"colour": accuracy("a {0} {1[shape]}", list(COLOURS), colours),
            "shape": accuracy("a {1[colour]} {0}", list(SHAPES), shapes),
            "left or right": accuracy("a {1[colour]} {1[shape]} on the {0}", ["left", "right"],
                                      sides),
            "verb cosine": (verbs @ verbs.T)[apart].mean().item()}


def missed_gates(accuracies: dict[str, float]) -> list[str]:
    return [f"{name} {accuracies[name]:.3f} < {gate}" for name, gate in GATES.items()
            if accuracies[name] < gate]


# ------------------------------------------------------------------------------------------- videos

def held_out(verb: int, shape: str) -> bool:
    """Does this pair occur in no training video? True for two in seven verbs of each shape."""
    return (verb + 2 * SHAPES.index(shape)) % 7 in (0, 1)


def goes_with(verb: int, shape: str) -> bool:
    """Does this motion go with this shape? True for two in seven, none of which is held out."""
    return (verb + 2 * SHAPES.index(shape)) % 7 in (3, 4)


def plan_of(seed: int, split: str, i: int, coupling: float = 0.0) -> dict:
    """The script of video i of a split, which does not depend on any other video's."""
    rng = np.random.default_rng([seed, list(COUPLED_SPLITS).index(split) + 1, i])
    if split in ("novel-word", "val-novel-word", "novel-composition"):
        coupling = 0.0                                  # the same videos as without coupling
    return script(split, rng, coupling)


def script(split: str, rng: np.random.Generator, coupling: float = 0.0) -> dict:
    """One video, before it is drawn: two actors, two verbs, four events in random order. Between
    them a bystander is visible, which does nothing. A frame length is "frame_sec" seconds.

    With probability `coupling`, each actor performs the two verbs that go with its shape."""
    old_colours = [c for c in COLOURS if c not in NOVEL_COLOURS]
    old_shapes = [s for s in SHAPES if s not in NOVEL_SHAPES]
    novel = split.endswith("novel-word")                # its val split, too
    while True:
        colours = rng.choice(NOVEL_COLOURS if novel else old_colours, 2, replace=False)
        shapes = rng.choice(NOVEL_SHAPES if novel else old_shapes, 2, replace=False)
        verbs = rng.choice(len(VERBS), 2, replace=False)
        unseen = sum(held_out(v, s) for v in verbs for s in shapes)     # 0 to 4
        wanted = unseen >= 2 if split == "novel-composition" else unseen == 0
        if novel or wanted:
            break
    verbs_of = [verbs, verbs]                           # of each actor
    if coupling and rng.random() < coupling:
        verbs_of = [[v for v in range(len(VERBS)) if goes_with(v, s)] for s in shapes]
    # the bystander shares neither colour nor shape with an actor, so no query can mean it
    others = [(c, s) for c in old_colours for s in old_shapes
              if c not in colours and s not in shapes]
    colour, shape = others[rng.integers(len(others))]
    bystander = {"colour": colour, "shape": shape, "x": rng.uniform(6, SIZE - 6),
                 "y": rng.uniform(6, SIZE - 6), "r": rng.uniform(3.5, 5)}

    spare = -1
    while spare < 0:                                    # until four events fit into the video
        action = rng.integers(4, 9, 4)                  # frames that each event takes
        linger = rng.integers(0, 3, (4, 2))             # and that its actor waits before and after
        spare = FRAMES - action.sum() - linger.sum()
    cuts = np.sort(rng.integers(0, spare + 1, 4))
    gaps = np.diff(cuts, prepend=0, append=spare)       # [5] spare frames around the events
    events = []
    clock = 0
    for k, which in enumerate(rng.permutation(4)):      # each actor performs each verb once
        actor = which // 2
        verb = int(verbs_of[actor][which % 2])
        enter = clock + int(gaps[k])
        start = enter + int(linger[k, 0])
        end = start + int(action[k])
        clock = end + int(linger[k, 1])
        event = {"colour": str(colours[actor]), "shape": str(shapes[actor]), "verb": verb,
                 "word": VERBS[verb][rng.integers(2)], "enter": enter, "start": start, "end": end,
                 "leave": clock}
        event.update(course(verb, rng))
        events.append(event)
    return {"scene": str(rng.choice(list(SCENES))), "speckle": int(rng.integers(2 ** 31)),
            "events": events, "bystander": bystander,
            "frame_sec": rng.uniform(0.75, 1.25)}       # so that durations differ: 24 to 40 s


def course(verb: int, rng: np.random.Generator) -> dict:
    """Start and end position of an event, {"from": [x, y, r], "to": [x, y, r]}, in the frame."""
    motion = VERBS[verb][0]
    right, down = MOVES.get(motion, (0, 0))
    while True:                                         # until it ends in the frame, too
        x, y = rng.uniform(5.5, SIZE - 5.5, 2)
        r = rng.uniform(3.5, 5)
        way = rng.uniform(9, 15)
        first, last = SIZES.get(motion, (r, r))
        a = [x, y, first]
        b = [x + right * way, y + down * way, last]
        if all(5 <= v <= SIZE - 5 for v in b[:2]):
            return {"from": a, "to": b}


def film(plan: dict, times: np.ndarray = np.arange(FRAMES) + 0.5) -> Tensor:
    """The video of a script at these instants (in frame lengths, [n]; by default the centres of all
    of them): uint8 [n, 3, 32, 32]."""
    frames = ground(plan["scene"], len(times), np.random.default_rng(plan["speckle"]))
    on_stage = [(times >= e["enter"]) & (times < e["leave"]) for e in plan["events"]]
    idle = ~np.any(on_stage, 0)                                         # [n] no actor is visible
    draw(frames, **plan["bystander"], visible=idle)
    for event, visible in zip(plan["events"], on_stage):
        # the actor stands still while it lingers, before and after the event
        share = np.clip((times - event["start"]) / (event["end"] - event["start"]), 0, 1)[:, None]
        x, y, r = (np.array(event["from"]) * (1 - share) + np.array(event["to"]) * share).T
        if VERBS[event["verb"]][0] == "blinks":                 # dark in every other frame length
            acting = (times >= event["start"]) & (times < event["end"])
            visible = visible & (~acting | (np.floor(times - event["start"]) % 2 == 1))
        draw(frames, event["colour"], event["shape"], x, y, r, visible)
    return torch.from_numpy(to_uint8(frames)).permute(0, 3, 1, 2)


def samples_of(name: str, split: str, plan: dict) -> list[data.Sample]:
    """The sentences of a video: its four events; in novel-composition the held-out ones only."""
    samples = []
    for e in plan["events"]:
        if split != "novel-composition" or held_out(e["verb"], e["shape"]):
            sentence = f"the {e['colour']} {e['shape']} {e['word']}"
            samples.append(data.Sample(name, sentence, seconds(e["start"], plan),
                                       seconds(e["end"], plan), seconds(FRAMES, plan)))
    return samples


def seconds(frame_lengths: int, plan: dict) -> float:
    return round(frame_lengths * plan["frame_sec"], 3)


# ------------------------------------------------------------------------------------------- events

class Event(NamedTuple):
    """What happens in a video: who does what, when."""
    start_sec: float
    end_sec: float
    noun: str
    verb: str                                           # the first of two synonyms


def read_events(dataset: str, root: str | os.PathLike) -> dict[str, list[Event]] | None:
    """All events of each video (events.json). None for a dataset that does not list its events."""
    path = pathlib.Path(root) / dataset / "events.json"
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise Mistake(f"{path} is damaged ({error}); remove its folder and rebuild it") from error
    return {name: [Event._make(row) for row in rows] for name, rows in content.items()}


def event_accuracy(predicted: Tensor, samples: list[data.Sample],
                   events: dict[str, list[Event]]) -> dict[str, float]:
    """Noun and verb accuracy, percent: does the event that overlaps the first answer most have the
    named actor, and the named verb? Chance is 50 each.

    predicted    [S, K, 2] moments in seconds, best first"""
    noun = verb = 0                                     # sentences answered correctly
    for sample, answer in zip(samples, predicted[:, 0]):
        own = events[sample.video]
        spans = torch.tensor([[float(e.start_sec), float(e.end_sec)] for e in own])     # [4, 2]
        label = torch.tensor([sample.start_sec, sample.end_sec])
        named = own[int(mmn.interval_iou(spans, label).argmax())]
        overlap = mmn.interval_iou(spans, answer)                       # [4]
        if not overlap.any():                           # between two events: the nearer one
            overlap = -(spans.mean(1) - answer.mean()).abs()
        chosen = own[int(overlap.argmax())]
        noun += chosen.noun == named.noun
        verb += chosen.verb == named.verb
    return {"noun accuracy": 100 * noun / len(samples), "verb accuracy": 100 * verb / len(samples)}


# -------------------------------------------------------------------------------------- the dataset

def world_of(dataset: str) -> tuple[int, float]:
    """Seed and coupling: "shapes" -> (0, 0.0), "shapes-3-p90" -> (3, 0.9). Mistake for any other
    name."""
    match = re.fullmatch(r"shapes(?:-(\d+))?(?:-p(\d\d|100))?", dataset, re.ASCII)
    if not match or int(match[1] or 0) > options.LARGEST:
        raise Mistake(f"{dataset!r} is not a shapes world; use shapes, shapes-1, shapes-p87, ...")
    return int(match[1] or 0), int(match[2] or 0) / 100


def name_of(seed: int, coupling: float = 0.0) -> str:
    """The name of a world's dataset; the inverse of `world_of`."""
    name = "shapes"
    if seed:
        name += f"-{seed}"
    if coupling:
        name += f"-p{round(100 * coupling):02d}"
    return name


def build(dataset: str = "shapes", root: str | os.PathLike = "data") -> None:
    """Writes <root>/<dataset> unless it exists (one minute, and two more to pre-train a CLIP). The
    folder gets its name when it is complete, so an interrupted build is simply repeated."""
    seed, coupling = world_of(dataset)
    target = pathlib.Path(root) / dataset
    if (target / "chunks.json").exists():
        return
    if target.exists():                                 # made by something else
        raise Mistake(f"{target} is not a complete shapes world; remove it to build it again")
    print(f"building {target}: drawing and encoding videos")
    counts = COUPLED_SPLITS if coupling else SPLITS
    write(target, pretrained(seed), seed, counts, coupling)


def build_for(config) -> None:
    """Builds the shapes worlds that a train.Config needs; and if it asks for "<dataset>-resnet", a
    second CLIP of that world, with a ResNet image tower (supplement, Table 6), and its features."""
    for name in (config.dataset, config.text_clip):
        if name.startswith("shapes"):
            build(name, config.root)
    name = f"{config.dataset}-resnet"
    if config.clip == name:                             # same videos, another image tower
        seed, coupling = world_of(config.dataset)
        file = pathlib.Path(config.root) / name / "clip.pt"
        if not file.exists():
            files.save_tensors(file, pretrained(seed, resnet=True).state_dict())
        folder = data.store_folder(config.dataset, name, config.root)
        counts = COUPLED_SPLITS if coupling else SPLITS
        encode(folder, file, name, seed, counts, coupling)


def pretrained(seed: int, resnet: bool = False) -> clip.CLIP:
    """The small CLIP of a world: the shipped one, or trained now. Prints its zero-shot accuracy.
    Mistake if it misses a gate."""
    if seed < len(SHIPPED_SHA256) and not resnet:
        model = shipped(seed)
    else:
        print("pre-training a small CLIP on stills")
        model = pretrain(seed, resnet=resnet)
    accuracies = zero_shot(model, seed)
    print("small CLIP, zero-shot: "
          + ", ".join(f"{name} {value:.3f}" for name, value in accuracies.items()))
    missed = missed_gates(accuracies)
    if missed:
        raise Mistake(f"the small CLIP of seed {seed} missed its gates ({', '.join(missed)}); use "
                      f"another seed, for instance --dataset shapes-{seed + 1}")
    return model


def ship(path: str, model: clip.CLIP) -> None:
    """Writes a small CLIP without the embeddings of words that never occur (1 MB instead of 14)."""
    rng = np.random.default_rng([0, 0])
    captions = [still(rng)[1] for _ in range(2000)]     # enough to see every word
    # sentences, unlike captions, have "something", commas and "then"
    captions.append("something , then")
    used = clip.tokenize(captions).unique()
    state = model.state_dict()
    state["token_embedding.weight"] = state["token_embedding.weight"][used]
    files.save_tensors(path, {"used": used, "state": state})


def shipped(seed: int) -> clip.CLIP:
    """The small CLIP of a world. Words that never occur have zero embeddings."""
    path = files.ASSETS / f"small-clip-{seed}.pt"
    if files.sha256(path) != SHIPPED_SHA256[seed]:
        raise Mistake(f"{path} is damaged: its SHA-256 is not {SHIPPED_SHA256[seed]}; restore it "
                      f"with git checkout")
    content = files.read_tensors(path)
    state = content["state"]
    rows = state["token_embedding.weight"]                              # [some 60, D]
    whole = torch.zeros(len(clip.vocabulary()[0]), rows.shape[1])       # [49408, D]
    whole[content["used"]] = rows
    state["token_embedding.weight"] = whole
    return clip.build(state)


def encode(folder: pathlib.Path, file: pathlib.Path, name: str, seed: int,
           counts: dict[str, int], coupling: float = 0.0) -> None:
    """Draws the videos of a world and stores their features by the CLIP in `file`, named `name`."""
    model = clip.load(file)
    store = data.FeatureStore(folder, video.made_by(model, name, clip.sha256(file), FRAMES, FRAMES))
    for split, count in counts.items():
        for i in trange(count, desc=f"videos: {split}", disable=None):
            if f"{split}-{i:04d}" in store:             # by a build that was interrupted
                continue
            plan = plan_of(seed, split, i, coupling)
            pixels = clip.crop(film(plan), model.visual.resolution)
            frames, patches = video.encode_frames(model, pixels)
            if split != "train":                        # Eq. 3 is part of training only
                patches = None
            store.write(f"{split}-{i:04d}", frames, patches, seconds(FRAMES, plan))
    store.save_manifest()


def write(target: pathlib.Path, model: clip.CLIP, seed: int, counts: dict[str, int],
          coupling: float = 0.0) -> None:
    """The dataset of a small CLIP: clip.pt, <split>.jsonl, events.json, chunks.json, features.
    counts: videos per split."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        files.save_tensors(folder / "clip.pt", model.state_dict())
        encode(folder / "features" / target.name, folder / "clip.pt", target.name, seed, counts,
               coupling)
        events, chunks = {}, {}
        for split, count in counts.items():
            samples = []
            for i in range(count):
                name = f"{split}-{i:04d}"
                plan = plan_of(seed, split, i, coupling)
                samples += samples_of(name, split, plan)
                events[name] = [Event(seconds(e["start"], plan), seconds(e["end"], plan),
                                      f"{e['colour']} {e['shape']}", VERBS[e["verb"]][0])
                                for e in plan["events"]]
            data.write_jsonl(folder / f"{split}.jsonl", samples)
            for s in samples:                           # the noun chunk ends before the verb
                chunks[s.sentence] = [(0, s.sentence.rindex(" "))]
        (folder / "events.json").write_text(json.dumps(events), encoding="utf-8")
        (folder / "chunks.json").write_text(json.dumps(chunks), encoding="utf-8")
        os.replace(folder, target)                      # atomic: never half a dataset
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(folder: str | os.PathLike, count: int, seed: int = 0, coupling: float = 0.0) -> None:
    """Test videos as mp4, enlarged to EXPORTED pixels, each frame repeated eight times; and
    annotations.jsonl with their sentences and moments."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in trange(count, desc="export", disable=None):
        name = f"test-{i:04d}"
        plan = plan_of(seed, "test", i, coupling)
        frames = F.interpolate(film(plan), EXPORTED).repeat_interleave(8, 0)
        # a frame rate in a file is a fraction, and some players reject large denominators
        pace = fractions.Fraction(plan["frame_sec"]).limit_denominator(10_000) / 8
        video.write_video(folder / f"{name}.mp4", frames, 1 / pace)
        samples += samples_of(name, "test", plan)
    data.write_jsonl(folder / "annotations.jsonl", samples)


def main() -> None:
    arguments = options.parser("build a shapes world, or export its videos")
    add = arguments.add_argument
    add("--seed", type=int, default=0, help="seed of the world")
    add("--root", default="data", help="folder of datasets")
    add("--export", metavar="DIR", help="write test videos as mp4, with sentences, instead")
    add("-n", type=int, default=5, help="number of videos that --export writes")
    add("--coupling", type=float, default=0.0, help="probability that motions go with shapes")
    add("--pretrain", metavar="FILE", help="train the world's small CLIP instead, into FILE")
    given = arguments.parse_args()
    with reported():
        if not 0 <= given.seed <= options.LARGEST:
            raise Mistake(f"--seed must be between 0 and {options.LARGEST}")
        if not 0 <= given.coupling <= 1 or round(given.coupling, 2) != given.coupling:
            raise Mistake("--coupling must be between 0 and 1, with at most two decimals")
        if given.export:
            export(given.export, given.n, given.seed, coupling=given.coupling)
            print(f"wrote {given.n} videos and annotations.jsonl to {given.export}")
        elif given.pretrain:
            ship(given.pretrain, pretrain(given.seed))
            print(f"wrote {given.pretrain}, SHA-256 {files.sha256(given.pretrain)}")
        else:
            build(name_of(given.seed, given.coupling), given.root)


if __name__ == "__main__":
    main()
