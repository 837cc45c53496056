"""The shapes world: the dataset that needs no download, and a small CLIP trained on its stills.

On a dark ground, coloured shapes rise, fall, advance, retreat, grow, shrink or blink. A query such
as "the red circle rises" names one actor and one motion of a video in which two actors perform two
motions each, in some order: nouns alone match every second event, and so do verbs alone.

    python shapes.py                                    # data/shapes: small CLIP, videos, features
    python shapes.py --seed 1                           # data/shapes-1: another world, another CLIP
    python shapes.py --context 0.9                      # shapes-context-0.9: see below
    python shapes.py --show world.png                   # videos and stills on one sheet
    python shapes.py --pretrain assets/small-clip.pt    # world 0's small CLIP, from its stills

The small CLIP is pre-trained as CLIP was, on images with captions in which a verb says nothing (a
still cannot show it), so that its text tower ignores verbs, which is the premise of the paper (Sec.
1). Three colours and three shapes occur in stills only; videos with them are the novel-word split.
Two in seven pairs of a verb and a shape are in no training video: they are the novel-composition
split. Annotations, features and CLIP weights are written in the form of a real dataset's.

In this world verbs are independent of everything that a frame shows. With `--context p` an event
takes place on the background typical of its verb with probability p, as people swim in water; with
`--random p` on any, a control in which the background also changes with each event.

Rounding differs between machines, and pre-training amplifies it. So that everybody starts from the
same weights, the small CLIP of world 0 is shipped (assets/small-clip.pt).

Lengths are in pixels of a 32 x 32 frame with y downwards. Times in a script are in frame lengths,
of which a video has 32; those that end in `_sec`, and those of `seconds`, are in seconds.
"""
from support.generated import Event, read_events
import fractions
import json
import math
import os
import pathlib
import re
import shutil
import textwrap
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
FRAMES = 32                                             # T: frames that are sampled per video
SCENES = {"sand": (52, 44, 20), "grass": (10, 44, 14), "night": (12, 10, 34), "snow": (52, 54, 60),
          "water": (8, 32, 56), "road": (34, 34, 34)}
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
         ("blinks", "flashes"))
SPLITS = {"train": 800, "val": 150, "test": 150, "novel-word": 150, "novel-composition": 300,
          "val-novel-word": 150}  # choices are made on the two val splits only
SHIPPED = files.ASSETS / "small-clip.pt"                # the small CLIP of world 0
SHIPPED_SHA256 = "6cb068bec2c625764e0e0de4d6dfbef280c2083fcdd0cc05548c17a68424f705"


# ------------------------------------------------------------------------------------------ drawing

def distance(shape: str, x: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Rough signed distance (pixels, negative inside) of points to a shape of radius r at 0, 0."""
    box = lambda w, h: np.maximum(abs(x) - w, abs(y) - h)
    spike = 2 * (np.arctan2(x, -y) * 5 / (2 * math.pi) % 1) - 1         # -1 and 1 at five points
    return {"circle": lambda: np.hypot(x, y) - r, "square": lambda: box(0.85 * r, 0.85 * r),
            "triangle": lambda: np.maximum(y - 0.8 * r, (2 * abs(x) - y - 1.1 * r) / math.sqrt(5)),
            "cross": lambda: np.minimum(box(r, 0.3 * r), box(0.3 * r, r)),
            "bar": lambda: box(1.2 * r, 0.4 * r), "pillar": lambda: box(0.4 * r, 1.2 * r),
            "star": lambda: np.hypot(x, y) - r * (0.55 + 0.65 * abs(spike)),
            "heart": lambda: np.minimum(np.hypot(abs(x) - 0.5 * r, y + 0.4 * r) - 0.55 * r,
                                        np.maximum(-y - 0.4 * r, (1.2 * abs(x) + y - r) / 1.6)),
            "moon": lambda: np.maximum(np.hypot(x, y) - r, 0.85 * r - np.hypot(x - 0.55 * r, y)),
            "ring": lambda: abs(np.hypot(x, y) - 0.8 * r) - 0.25 * r,
            "diamond": lambda: (abs(x) / 0.8 + abs(y) / 1.2 - r) / 1.5}[shape]()


def draw(frames: np.ndarray, colour: str, shape: str, x, y, r, visible=True) -> None:
    """Paints an object into float frames [n, 32, 32, 3]; x, y, r, visible: [n], or one for all."""
    x, y, r, visible = (np.broadcast_to(v, len(frames))[:, None, None] for v in (x, y, r, visible))
    centre = np.arange(SIZE) + 0.5
    away = distance(shape, centre[None, None, :] - x, centre[None, :, None] - y, r)
    inside = (np.clip(0.5 - away, 0, 1) * visible)[..., None]           # [n, 32, 32, 1]
    frames += inside * (np.array(COLOURS[colour], dtype=np.float32) - frames)


def ground(scene: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n equal frames of a speckled ground, float [n, 32, 32, 3]."""
    speckle = rng.normal(0, 5, (SIZE, SIZE, 1))
    return np.repeat((np.array(SCENES[scene]) + speckle)[None], n, 0).astype(np.float32)


def to_uint8(frames: np.ndarray) -> np.ndarray:
    return np.clip(frames, 0, 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------- stills

def still(rng: np.random.Generator,
          objects: int | None = None) -> tuple[np.ndarray, str, list[dict]]:
    """One image [32, 32, 3], its caption, and the objects in it (colour, shape, x, y, r).
    As on the web a caption tells only some of what there is, and its verb, if any, is a guess."""
    scene = rng.choice(list(SCENES))
    image, phrases, things = ground(scene, 1, rng), [], []
    for _ in range(objects or rng.choice((1, 2), p=(0.7, 0.3))):
        for _ in range(20):                                     # objects keep apart if they can
            x, y = rng.uniform(5, SIZE - 5, 2)
            if all(math.hypot(x - t["x"], y - t["y"]) > 10 for t in things):
                break
        thing = {"colour": rng.choice(list(COLOURS)), "shape": rng.choice(SHAPES), "x": x, "y": y,
                 "r": rng.uniform(2.5, 6.5)}
        draw(image, **thing)
        words = ["a"]
        if rng.random() < 0.5:
            words.append("small" if thing["r"] < 4.5 else "large")
        if rng.random() < 0.6:
            words.append(thing["colour"])
        words.append(thing["shape"])
        if rng.random() < 0.5:
            words.append(rng.choice([word for pair in VERBS for word in pair]))
        if rng.random() < 0.8:
            across = "on the left" if x < SIZE / 2 else "on the right"
            upright = "at the top" if y < SIZE / 2 else "at the bottom"
            both = f"{upright} {across.split()[-1]}"                    # "at the top left"
            words.append((across, upright, both)[rng.integers(3)])
        phrases.append(" ".join(words))
        things.append(thing)
    caption = " and ".join(phrases) + (f" on the {scene}" if rng.random() < 0.3 else "")
    return to_uint8(image)[0], caption, things


# ----------------------------------------------------------------------------------- the small CLIP

def small_clip(seed: int, resnet: bool = False) -> clip.CLIP:
    """A ViT of width 64 behind a convolutional stem, or a ResNet of width 16 that sees the 32 x 32
    frames at 64 x 64; and a causal text tower of width 64; joint width 64."""
    torch.manual_seed(seed)
    width, heads, layers = 64, 4, 2
    # initial embeddings are larger than OpenAI's, or shape and place would not be learned
    if resnet:
        visual = clip.ModifiedResNet(2 * SIZE, (1, 1, 1, 1), 16, 8, width)
        drawn = [(visual.attnpool.positional_embedding, 0.1)]
    else:
        visual = clip.VisionTransformer(SIZE, 2, width, layers, heads, width, clip.QuickGELU,
                                        stem=(24, 48))
        drawn = [(visual.class_embedding, 0.4), (visual.positional_embedding, 0.4),
                 (visual.proj, width ** -0.5)]
    model = clip.CLIP(visual, len(clip.vocabulary()[0]), 77, width, layers, heads, width,
                      clip.QuickGELU)
    for parameter, std in (*drawn, (model.token_embedding.weight, 0.4),
                           (model.positional_embedding, 0.1),
                           (model.text_projection, width ** -0.5)):
        torch.nn.init.normal_(parameter, std=std)
    return model


def pretrain(seed: int, steps: int = 3000, count: int = 24_000, batch: int = 128,
             rounds: int = 3, resnet: bool = False) -> clip.CLIP:
    """Trains the small CLIP on `count` stills (two minutes): AdamW 2e-3, warm-up 50 steps, cosine.
    If the result misses its gates (rare), it is trained for another round; `rounds` at most."""
    rng = np.random.default_rng([seed, 0])
    images, captions, _ = zip(*[still(rng) for _ in trange(count, desc="stills", disable=None)])
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    tokens = clip.tokenize(list(captions))
    # Of 49,408 tokens some 60 occur: they are trained as a table of their own, in the same order,
    # so that the end token still has the largest id.
    used, tokens = tokens.unique(return_inverse=True)
    model = small_clip(seed, resnet)
    whole = model.token_embedding.weight.data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(rounds):
        model.train()
        model.token_embedding = torch.nn.Embedding.from_pretrained(whole[used], freeze=False)
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98),
                                      weight_decay=0.02, fused=True)
        for step in (bar := trange(steps, desc="small CLIP", disable=None)):
            rate = min((step + 1) / 50, progress.cosine(step / steps))
            optimiser.param_groups[0]["lr"] = 2e-3 * rate
            chosen = torch.randint(count, (batch,), generator=generator)
            x, _ = model.encode_image(clip.preprocess(images[chosen], model.visual.resolution))
            q = model.encode_text(tokens[chosen])
            scaled = model.logit_scale.exp() * F.normalize(x, dim=-1)
            loss = clip.contrastive_loss(scaled @ F.normalize(q, dim=-1).T)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            model.logit_scale.data.clamp_(max=math.log(100))
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.2f}")
        whole[used] = model.token_embedding.weight.data
        model.eval()
        model.token_embedding = torch.nn.Embedding.from_pretrained(whole, freeze=False)
        if not (missed := missed_gates(zero_shot(model, seed))):
            break
        print(f"it missed its gates ({', '.join(missed)}); training for another round")
    return model


GATES = {"colour": 0.9, "shape": 0.6, "left or right": 0.95}


@torch.no_grad()
def zero_shot(model: clip.CLIP, seed: int, count: int = 1000) -> dict[str, float]:
    """Zero-shot accuracy of the small CLIP on new stills of one object: which of fifteen colours,
    eleven shapes and two sides, the rest of the caption being true; and the mean cosine between
    verbs in "a red circle <verb>", which is near 1 if the text tower ignores them."""
    rng = np.random.default_rng([seed, 99])
    stills = [still(rng, 1) for _ in range(count)]
    things = [thing for _, _, (thing,) in stills]
    images = torch.from_numpy(np.stack([image for image, _, _ in stills])).permute(0, 3, 1, 2)
    x, _ = model.encode_image(clip.preprocess(images, model.visual.resolution))
    x = F.normalize(x, dim=1)                                           # [count, D]

    def read(sentences: list[str]) -> Tensor:
        return F.normalize(model.encode_text(clip.tokenize(sentences)), dim=1)

    def accuracy(phrase: str, words: list[str], answers: list[str]) -> float:
        q = [read([phrase.format(word, **thing) for thing in things]) for word in words]
        chosen = torch.einsum("cd,cod->co", x, torch.stack(q, 1)).argmax(1)     # [count]
        correct = torch.tensor([words.index(answer) for answer in answers])
        return (chosen == correct).float().mean().item()

    verbs = read([f"a red circle {first}" for first, _ in VERBS])       # [7, D]
    apart = ~torch.eye(len(VERBS), dtype=torch.bool)
    sides = ["left" if thing["x"] < SIZE / 2 else "right" for thing in things]
    return {"colour": accuracy("a {0} {shape}", list(COLOURS), [t["colour"] for t in things]),
            "shape": accuracy("a {colour} {0}", list(SHAPES), [t["shape"] for t in things]),
            "left or right": accuracy("a {colour} {shape} on the {0}", ["left", "right"], sides),
            "verb cosine": (verbs @ verbs.T)[apart].mean().item()}


def missed_gates(knows: dict[str, float]) -> list[str]:
    return [f"{name} {knows[name]:.3f} < {gate}" for name, gate in GATES.items()
            if knows[name] < gate]


# ------------------------------------------------------------------------------------------- videos

def held_out(verb: int, shape: str) -> bool:
    """Pairs of verb and shape that occur in no training video: two verbs in seven per shape."""
    return (verb + 2 * SHAPES.index(shape)) % 7 in (0, 1)


class World(NamedTuple):
    """What a dataset's name says: "shapes-1-context-0.9" is seed 1 with `--context 0.9`."""
    seed: int = 0
    kind: str = "context"           # or "random": how an event's background is chosen
    share: float = 0.0              # with which probability it is not the video's


def script(split: str, rng: np.random.Generator) -> dict:
    """One video, before it is drawn: two actors, two verbs, four events in random order. Between
    them a bystander is visible, which does nothing. A frame length is "frame_sec" seconds."""
    old_colours = [c for c in COLOURS if c not in NOVEL_COLOURS]
    old_shapes = [s for s in SHAPES if s not in NOVEL_SHAPES]
    novel = split.endswith("novel-word")
    while True:
        colours = rng.choice(NOVEL_COLOURS if novel else old_colours, 2, replace=False)
        shapes = rng.choice(NOVEL_SHAPES if novel else old_shapes, 2, replace=False)
        verbs = rng.choice(len(VERBS), 2, replace=False)
        unseen = sum(held_out(v, s) for v in verbs for s in shapes)
        if novel or (unseen >= 2 if split == "novel-composition" else unseen == 0):
            break
    others = [(c, s) for c in old_colours for s in old_shapes
              if c not in colours and s not in shapes]
    bystander = dict(zip(("colour", "shape"), others[rng.integers(len(others))]),
                     x=rng.uniform(6, SIZE - 6), y=rng.uniform(6, SIZE - 6), r=rng.uniform(3.5, 5))
    spare = -1
    while spare < 0:
        action = rng.integers(4, 9, 4)                                  # frames each event takes
        linger = rng.integers(0, 3, (4, 2))                             # before and after it
        spare = FRAMES - action.sum() - linger.sum()
    gaps = np.diff([0, *np.sort(rng.integers(0, spare + 1, 4)), spare])
    events, clock = [], 0
    for k, which in enumerate(rng.permutation(4)):
        actor, verb = which // 2, int(verbs[which % 2])
        enter = clock + int(gaps[k])
        start = enter + int(linger[k, 0])
        end = start + int(action[k])
        clock = end + int(linger[k, 1])
        events.append({"colour": str(colours[actor]), "shape": str(shapes[actor]), "verb": verb,
                       "word": VERBS[verb][rng.integers(2)], "enter": enter, "start": start,
                       "end": end, "leave": clock, **course(verb, rng)})
    return {"scene": str(rng.choice(list(SCENES))), "speckle": int(rng.integers(2 ** 31)),
            "events": events, "bystander": bystander, "frame_sec": rng.uniform(0.75, 1.25)}


def course(verb: int, rng: np.random.Generator) -> dict:
    """Start and end position of an event, {"from": (x, y, r), "to": (x, y, r)}, in the frame."""
    while True:
        x, y = rng.uniform(5.5, SIZE - 5.5, 2)
        r, way = rng.uniform(3.5, 5), rng.uniform(9, 15)
        a = [x, y, {4: 2.5, 5: 6.5}.get(verb, r)]
        b = [[x, y - way, r], [x, y + way, r], [x + way, y, r], [x - way, y, r],
             [x, y, 6.5], [x, y, 2.5], a][verb]
        if all(5 <= v <= SIZE - 5 for v in b[:2]):
            return {"from": a, "to": b}


def plan_of(world: World, split: str, i: int) -> dict:
    """The script of video i of a split; worlds of one seed differ only in their backgrounds."""
    key = [world.seed, list(SPLITS).index(split) + 1, i]
    plan = script(split, np.random.default_rng(key))
    rng, scenes = np.random.default_rng([*key, 1]), list(SCENES)
    for event in plan["events"]:
        is_own, drawn = rng.random() < world.share, str(rng.choice(scenes))
        typical = scenes[event["verb"] % len(scenes)]
        if is_own:
            event["scene"] = typical if world.kind == "context" else drawn
    return plan


def whereabouts(event: dict, times: np.ndarray) -> tuple[np.ndarray, ...]:
    """The actor of an event at these instants (in frame lengths, [n]): x, y, r, visible [n]."""
    progress = np.clip((times - event["start"]) / (event["end"] - event["start"]), 0, 1)[:, None]
    x, y, r = (np.array(event["from"]) * (1 - progress) + np.array(event["to"]) * progress).T
    visible = (times >= event["enter"]) & (times < event["leave"])
    if VERBS[event["verb"]][0] == "blinks":                     # dark in every other frame length
        acting = (times >= event["start"]) & (times < event["end"])
        visible &= ~acting | (np.floor(times - event["start"]) % 2 == 1)
    return x, y, r, visible


def render(plan: dict, times: np.ndarray) -> np.ndarray:
    """The video of a script at these instants (in frame lengths, [n]): uint8 [n, 32, 32, 3]."""
    frames = ground(plan["scene"], len(times), np.random.default_rng(plan["speckle"]))
    for event in plan["events"]:                # its background stays until the next enters
        later = times >= event["enter"]
        scene, rng = event.get("scene", plan["scene"]), np.random.default_rng(plan["speckle"])
        frames[later] = ground(scene, later.sum(), rng)
    on_stage = [(times >= e["enter"]) & (times < e["leave"]) for e in plan["events"]]
    draw(frames, **plan["bystander"], visible=~np.any(on_stage, 0))
    for event in plan["events"]:
        draw(frames, event["colour"], event["shape"], *whereabouts(event, times))
    return to_uint8(frames)


def film(plan: dict, times: np.ndarray = np.arange(FRAMES) + 0.5) -> Tensor:
    """`render` for CLIP, by default at the 32 frame lengths' middles: uint8 [n, 3, 32, 32]."""
    return torch.from_numpy(render(plan, times)).permute(0, 3, 1, 2)


def samples_of(name: str, split: str, plan: dict) -> list[data.Sample]:
    """The sentences of a video: its four events; of novel compositions those that are novel."""
    return [data.Sample(name, f"the {e['colour']} {e['shape']} {e['word']}",
                        seconds(e["start"], plan), seconds(e["end"], plan), seconds(FRAMES, plan))
            for e in plan["events"]
            if split != "novel-composition" or held_out(e["verb"], e["shape"])]


def seconds(frame_lengths: int, plan: dict) -> float:
    return round(frame_lengths * plan["frame_sec"], 3)


def event_accuracy(predicted: Tensor, samples: list[data.Sample],
                   events: dict[str, list[Event]]) -> dict[str, float]:
    """Noun and verb accuracy, percent: does the event with the highest IoU with the first answer
    have the named actor, and the named verb? Chance is 50 each in the shapes world.
    predicted [S, K, 2]."""
    noun = verb = 0
    for sample, answer in zip(samples, predicted[:, 0]):
        own = events[sample.video]
        spans = torch.tensor([[float(e.start_sec), float(e.end_sec)] for e in own])
        label = torch.tensor([sample.start_sec, sample.end_sec])
        named = own[int(mmn.interval_iou(spans, label).argmax())]
        overlap = mmn.interval_iou(spans, answer)
        if not overlap.any():                           # between two events: the nearer one
            overlap = -(spans.mean(1) - answer.mean()).abs()
        chosen = own[int(overlap.argmax())]
        noun += chosen.noun == named.noun
        verb += chosen.verb == named.verb
    return {"noun accuracy": 100 * noun / len(samples), "verb accuracy": 100 * verb / len(samples)}


# -------------------------------------------------------------------------------------- the dataset

def build(dataset: str = "shapes", root: str | os.PathLike = "data") -> None:
    """Writes <root>/<dataset> unless it exists (one minute, and two more to pre-train a CLIP). The
    folder gets its name when it is complete, so an interrupted build is simply repeated."""
    target, world = pathlib.Path(root) / dataset, world_of(dataset)
    if (target / "chunks.json").exists():
        return
    if target.exists():
        raise Mistake(f"{target} was built by an earlier version; remove it to build it again")
    plain = target.with_name(name_of(World(world.seed))) / "clip.pt"    # stills have no events
    print(f"building {target}: drawing and encoding videos" + (
        ", after pre-training a small CLIP on stills" if world.seed and not plain.exists() else ""))
    write(target, clip.load(plain) if plain.exists() else pretrained(world.seed), world, SPLITS)


def build_for(config) -> None:
    """Builds the shapes worlds that a train.Config needs; and if it asks for "<dataset>-resnet", a
    second CLIP of that world, with a ResNet image tower (supplement, Table 6), and its features."""
    for name in (config.dataset, config.text_clip):
        if name.startswith("shapes"):
            build(name, config.root)
    name = f"{config.dataset}-resnet"
    if config.clip == name:
        world, file = world_of(config.dataset), pathlib.Path(config.root) / name / "clip.pt"
        if not file.exists():
            print(f"building {file}: pre-training a small CLIP with a ResNet on stills")
            files.save_tensors(file, pretrained(world.seed, resnet=True).state_dict())
        folder = data.store_folder(config.dataset, name, config.root)
        encode(folder, file, name, world, SPLITS)


def pretrained(seed: int, resnet: bool = False) -> clip.CLIP:
    """The small CLIP of a world: the shipped one, or trained now. Prints its zero-shot accuracy.
    Mistake if it misses a gate."""
    model = shipped() if seed == 0 and not resnet else pretrain(seed, resnet=resnet)
    knows = zero_shot(model, seed)
    print("small CLIP, zero-shot: "
          + ", ".join(f"{name} {value:.3f}" for name, value in knows.items()))
    if missed := missed_gates(knows):
        raise Mistake(f"the small CLIP of seed {seed} missed its gates ({', '.join(missed)}); use "
                      f"another seed, for instance --dataset shapes-{seed + 1}")
    return model


def ship(path: str, model: clip.CLIP) -> None:
    """Writes a small CLIP without the embeddings of words that never occur (1 MB instead of 14)."""
    rng, state = np.random.default_rng([0, 0]), model.state_dict()
    captions = [still(rng)[1] for _ in range(2000)]
    # sentences, unlike captions, have "something", commas and "then"
    used = clip.tokenize([*captions, "something , then"]).unique()
    state["token_embedding.weight"] = state["token_embedding.weight"][used]
    files.save_tensors(path, {"used": used, "state": state})


def shipped() -> clip.CLIP:
    """The small CLIP of world 0. Words that never occur have zero embeddings."""
    if files.sha256(SHIPPED) != SHIPPED_SHA256:
        raise Mistake(f"{SHIPPED} is damaged: its SHA-256 is not {SHIPPED_SHA256}; restore it with "
                      f"git checkout")
    content = files.read_tensors(SHIPPED)
    rows = content["state"]["token_embedding.weight"]
    whole = torch.zeros(len(clip.vocabulary()[0]), rows.shape[1])
    whole[content["used"]] = rows
    return clip.build(content["state"] | {"token_embedding.weight": whole})


def encode(folder: pathlib.Path, file: pathlib.Path, name: str, world: World,
           counts: dict[str, int]) -> None:
    """Draws the videos of a world and stores their features by the CLIP in `file`, named `name`."""
    model = clip.load(file)
    store = data.FeatureStore(folder, video.made_by(model, name, clip.sha256(file), FRAMES, FRAMES))
    for split, count in counts.items():
        for i in trange(count, desc=f"videos: {split}", disable=None):
            if f"{split}-{i:04d}" in store:             # by a build that was interrupted
                continue
            plan = plan_of(world, split, i)
            pixels = clip.crop(film(plan), model.visual.resolution)
            frames, patches = video.encode_frames(model, pixels)
            store.write(f"{split}-{i:04d}", frames, patches if split == "train" else None,
                        seconds(FRAMES, plan))
    store.save_manifest()


def write(target: pathlib.Path, model: clip.CLIP, world: World, counts: dict[str, int]) -> None:
    """The dataset of a small CLIP: clip.pt, <split>.jsonl, events.json, chunks.json, features.
    counts: videos per split."""
    folder = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    folder.mkdir(parents=True)
    try:
        files.save_tensors(folder / "clip.pt", model.state_dict())
        encode(folder / "features" / target.name, folder / "clip.pt", target.name, world, counts)
        events, chunks = {}, {}
        for split, count in counts.items():
            samples = []
            for i in range(count):
                name, plan = f"{split}-{i:04d}", plan_of(world, split, i)
                samples += samples_of(name, split, plan)
                events[name] = [(seconds(e["start"], plan), seconds(e["end"], plan),
                                 f"{e['colour']} {e['shape']}", VERBS[e["verb"]][0])
                                for e in plan["events"]]
            data.write_jsonl(folder / f"{split}.jsonl", samples)
            # the noun chunk is everything before the verb
            chunks |= {s.sentence: [(0, s.sentence.rindex(" "))] for s in samples}
        (folder / "events.json").write_text(json.dumps(events))
        (folder / "chunks.json").write_text(json.dumps(chunks))
        os.replace(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def export(folder: str | os.PathLike, count: int, world: World = World(), split: str = "test",
           side: int = 256, rate: int = 8) -> None:
    """Videos of a split as mp4, enlarged to `side` pixels, each frame repeated `rate` times; and
    annotations.jsonl with their sentences and moments."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in trange(count, desc="export", disable=None):
        name, plan = f"{split}-{i:04d}", plan_of(world, split, i)
        frames = F.interpolate(film(plan), side).repeat_interleave(rate, 0)
        pace = fractions.Fraction(plan["frame_sec"]).limit_denominator(10_000) / rate
        video.write_video(folder / f"{name}.mp4", frames, 1 / pace, quality=12)
        samples += samples_of(name, split, plan)
    data.write_jsonl(folder / "annotations.jsonl", samples)


def is_exported(frame: Tensor) -> bool:
    """Is a frame [3, h, w] of the size that `export` writes?"""
    return tuple(frame.shape[1:]) == (256, 256)


NAME = re.compile(r"shapes(-(?P<seed>\d+))?(-(?P<kind>context|random)-(?P<share>0\.\d+|1))?",
                  re.ASCII)


def world_of(dataset: str) -> World:
    """"shapes" -> seed 0, "shapes-3" -> seed 3, "shapes-3-random-0.9" -> see World."""
    match = NAME.fullmatch(dataset)
    if not match or int(match["seed"] or 0) > options.LARGEST:
        raise Mistake(f"{dataset!r} is not a shapes world; use shapes, shapes-1, shapes-2, ..., or "
                      f"shapes-1-context-0.9 (see shapes.py --help)")
    return World(int(match["seed"] or 0), match["kind"] or "context", float(match["share"] or 0))


def name_of(world: World) -> str:
    """The name of its dataset."""
    ground = f"-{world.kind}-{world.share:g}" if world.share else ""
    return "shapes" + (f"-{world.seed}" if world.seed else "") + ground


def show(path: str, world: World) -> None:
    """A contact sheet: a video of three splits, every second frame, and eight captioned stills."""
    figure = files.pyplot().figure(figsize=(16, 8))
    for row, split in enumerate(("train", "novel-word", "novel-composition")):
        plan = plan_of(world, split, 0)
        axes = figure.add_axes((0.01, 0.78 - 0.22 * row, 0.98, 0.16))
        frames = render(plan, np.arange(0, FRAMES, 2) + 0.5)
        frames = np.pad(frames, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
        axes.imshow(np.concatenate(frames, 1), extent=(0, FRAMES, 0, 2), interpolation="nearest")
        axes.set_title(f"{split}, every second of {FRAMES} frames", fontsize=11, loc="left", pad=14)
        axes.axis("off")
        sentences = [sample.sentence for sample in samples_of("", "train", plan)]
        for k, (e, sentence) in enumerate(zip(plan["events"], sentences)):
            axes.plot([e["start"], e["end"]], [2.08, 2.08], linewidth=4, color=f"C{k}",
                      solid_capstyle="butt", clip_on=False)
            axes.text(e["start"], 2.2, sentence, fontsize=9, color=f"C{k}")
    rng = np.random.default_rng([world.seed, 0])
    for i in range(8):
        image, caption, _ = still(rng)
        axes = figure.add_axes((0.01 + 0.1235 * i, 0.09, 0.11, 0.17))
        axes.imshow(image, interpolation="nearest")
        axes.axis("off")
        axes.set_title(textwrap.fill(caption, 24), fontsize=8, y=-0.08, va="top")
    files.save_figure(figure, path)


def main() -> None:
    arguments = options.parser("build a shapes world, or show one")
    add = arguments.add_argument
    add("--seed", type=int, default=0, help="seed of the world")
    for kind, which in (("context", "its verb's background"), ("random", "any background")):
        add(f"--{kind}", type=float, default=0.0, metavar="P",
            help=f"probability that an event takes place on {which}, not the video's")
    add("--root", default="data", help="folder of datasets")
    add("--show", metavar="PNG", help="draw a contact sheet instead of building")
    add("--export", metavar="DIR", help="write test videos as mp4, with sentences, instead")
    add("-n", type=int, default=5, help="how many videos --export writes")
    add("--pretrain", metavar="FILE", help="train world 0's small CLIP instead")
    given = arguments.parse_args()
    with reported():
        if not 0 <= given.seed <= options.LARGEST:
            raise Mistake(f"--seed must be between 0 and {options.LARGEST}")
        if given.context and given.random or not 0 <= given.context + given.random <= 1:
            raise Mistake("give --context or --random, a probability between 0 and 1")
        kind = "random" if given.random else "context"
        world = World(given.seed, kind, given.context + given.random)
        if given.show:
            show(given.show, world)
            print(f"wrote {given.show}")
        elif given.export:
            export(given.export, given.n, world)
            print(f"wrote {given.n} videos and annotations.jsonl to {given.export}")
        elif given.pretrain:
            ship(given.pretrain, pretrain(0))
            print(f"wrote {given.pretrain}, SHA-256 {files.sha256(given.pretrain)}")
        else:
            build(name_of(world), given.root)


if __name__ == "__main__":
    main()
