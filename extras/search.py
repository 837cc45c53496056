"""Search an index of videos (extras/index.py) by sentences.

    python -m extras.search index/ "a person opens the door"
    python -m extras.search index/ "a person opens the door" --html page.html
"""
import base64
import bisect
import json
import math
import pathlib
import sys
from typing import NamedTuple

import torch
from torch import Tensor

import clip
import mmn
from extras import show
from extras.index import Entry, Index, summary
from retrieve import FOUND, Encoded, Moment, Retriever, ZeroShot, greedy_nms
from support import files, options
from support.errors import Mistake, reported
from support.text import printable


class Hit(NamedTuple):
    """An answer from an index. z: as in retrieve.Answer; order: what the answers are sorted by."""
    video: str
    moment: Moment
    z: float
    order: float


def search(index: Index, retriever: Retriever | ZeroShot, sentences: list[str], top: int = 10,
           per_video: int = 3) -> list[list[Hit]]:
    """For each sentence the best moments, best first: `top` in all, and `per_video` of one video at
    most."""
    if retriever.kind == "clip":
        return [search_frames(index, retriever, text, top, per_video)           # [D]
                for text in retriever.text(sentences)]
    iou_text, contrastive_text = retriever.read(sentences)              # [S, J] each
    # the index is searched on the CPU
    return [search_moments(index, a, b, top, per_video)                 # [J] each
            for a, b in zip(iou_text.cpu(), contrastive_text.cpu())]


def z_of(entry: Entry, score: float) -> float:
    """As in retrieve.Answer."""
    return (score - entry.mean) / entry.deviation


# ------------------------------------------------------------------------------- with a checkpoint

def search_moments(index: Index, iou_text: Tensor, contrastive_text: Tensor, top: int,
                   per_video: int) -> list[Hit]:
    """The best moments for one sentence, best first. Exact.

    iou_text, contrastive_text  [J] unit vectors (Retriever.read)
    """
    arrays, slices = index.load()
    spans = arrays["spans"]                                             # [R, 2]
    names = list(slices)
    firsts = [rows.start for rows in slices.values()]
    overlap = torch.sigmoid(mmn.SCORE_SCALE * cosines(arrays["iou"], iou_text))
    scores = mmn.fuse(overlap, cosines(arrays["contrastive"], contrastive_text))        # [R]
    count = 128                         # moments that NMS considers, more if too few remain
    while True:
        count = min(count, len(scores))
        rows = scores.topk(count).indices.sort().values                 # in the order of the index
        owners = [names[bisect.bisect_right(firsts, row) - 1] for row in rows.tolist()]
        best = greedy_nms(spans[rows], scores[rows], top, owners, per_video)
        if len(best) == top or count == len(scores):
            break
        count *= 2
    hits = []
    for k in best:
        score = scores[rows[k]].item()
        moment = Moment(*spans[rows[k]].tolist(), score)
        hits.append(Hit(owners[k], moment, z_of(index.entries[owners[k]], score), order=score))
    return hits


def cosines(x: Tensor, text: Tensor) -> Tensor:
    """Unit vectors [R, J] in float16, and one in float32 -> [R]. In blocks that fit into a cache,
    so that memory is read once."""
    return torch.cat([block.float() @ text for block in x.split(4096)])


# ------------------------------------------------------------------------------------- CLIP alone

def search_frames(index: Index, retriever: ZeroShot, text: Tensor, top: int,
                  per_video: int) -> list[Hit]:
    """The best moments for one sentence, a unit vector [D], by CLIP alone, best z first: contrasts
    of different videos cannot be compared, z can. Exact."""
    arrays, slices = index.load()

    def best_of(name: str, count: int) -> list[list[float]]:
        """The best moments of a video, found as retrieve.py finds them."""
        duration_sec = index.entries[name].duration_sec
        frames = arrays["frames"][slices[name]].float()                 # [F, D]
        encoded = Encoded(name, duration_sec, duration_sec / len(frames), frames, starts=[0])
        return retriever.search(encoded, text[None], count)[0].tolist()

    first = {}                                          # name -> z of its best moment
    for name, entry in index.entries.items():
        [(_, _, score)] = best_of(name, 1)
        first[name] = z_of(entry, score)
    hits = []
    # a video whose best moment is not among the top contributes none
    for name in sorted(first, key=first.get, reverse=True)[:top]:
        for moment in best_of(name, per_video):
            if moment[2] > -math.inf:           # a short video may have fewer than per_video
                z = z_of(index.entries[name], moment[2])
                hits.append(Hit(name, Moment(*moment), z, order=z))
    return sorted(hits, key=lambda hit: -hit.z)[:top]


# ----------------------------------------------------------------------------------- the command

def retriever_of(index: Index, device: str) -> Retriever | ZeroShot:
    """The model that made the index. Mistake if its file was removed or changed."""
    made = index.made
    if made["kind"] == "frames":
        shortest_sec, longest_sec = made["limits_sec"]
        retriever = ZeroShot(made["checkpoint"], device, made["rate"], shortest_sec, longest_sec,
                             made["prompt"], cache=None, gelu=made["sha256"].endswith("-gelu"),
                             smooth_sec=made["smooth_sec"])
        if retriever.digest == made["sha256"]:          # the file of this name may be another
            return retriever
    else:
        checkpoint = pathlib.Path(made["checkpoint"])
        if checkpoint.exists() and clip.sha256(checkpoint) == made["sha256"]:
            return Retriever(checkpoint, device, cache=None)
    # embeddings of different weights cannot be compared
    raise Mistake(f"the checkpoint of this index was removed or changed: {made['checkpoint']}, "
                  f"SHA-256 {made['sha256']}; pass its file to: {index.command} CKPT DIR --out "
                  f"{index.folder}")


def is_found(hits: list[Hit]) -> bool:
    """Whether an answer reaches the threshold."""
    return any(hit.z >= FOUND for hit in hits)


def as_page(index: Index, sentences: list[str], results: list[list[Hit]], out: str) -> str:
    """The page of retrieve.py for answers from several videos, with a thumbnail each."""
    numbers = {}                                # video -> its place in `sources`
    sources = []                                # a video may be megabytes: each is embedded once
    sections = []
    for sentence, hits in zip(sentences, results):
        buttons = []
        for hit in hits:
            path = index.path_of(hit.video)
            middle_sec = (hit.moment.start_sec + hit.moment.end_sec) / 2
            if hit.video not in numbers:
                numbers[hit.video] = len(sources)
                sources.append(show.address_of(path, out))
            # embedded, so that the page is a single file
            picture = base64.b64encode(show.jpeg(path, middle_sec)).decode()
            buttons.append({"moment": hit.moment, "value": hit.order, "name": hit.video,
                            "source": f"#{numbers[hit.video]}",
                            "thumbnail": f"data:image/jpeg;base64,{picture}"})
        sections.append({"sentence": sentence, "found": is_found(hits), "buttons": buttons})
    return show.fill_page("Moments", f"{summary(index)}. {show.PLAYING}", sections,
                          sources=sources)


def main() -> None:
    arguments = options.parser("search an index", prog="python -m extras.search")
    add = arguments.add_argument
    add("index", help="folder of the index")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=10, help="moments per sentence")
    add("--per-video", type=int, default=3, help="moments per video at most")
    add("--device", **options.DEVICE)
    add("--json", action="store_true", help="print JSON")
    add("--html", metavar="FILE", help="write a page that plays the moments")
    given = arguments.parse_args()
    with reported():
        if min(given.top, given.per_video) < 1:
            raise Mistake("--top and --per-video must be at least 1")
        run(given)


def run(given) -> None:
    index = Index(given.index)
    index.load()                        # at once: two updates later its files may be gone
    results = search(index, retriever_of(index, given.device), given.sentences, given.top,
                     given.per_video)
    changed = set()
    for name in sorted({hit.video for hits in results for hit in hits}):
        if not index.is_current(name):
            changed.add(name)
            print(f"note: {printable(name)} was removed or changed since it was indexed; rerun "
                  f"{index.command}", file=sys.stderr)
    if given.html:
        # skip changed videos: their thumbnails would be missing or wrong
        shown = [[hit for hit in hits if hit.video not in changed] for hits in results]
        files.save(given.html, as_page(index, given.sentences, shown, given.html))
    if given.json:
        content = []
        for sentence, hits in zip(given.sentences, results):
            moments = [{"video": hit.video} | hit.moment._asdict() for hit in hits]
            content.append({"sentence": sentence, "found": is_found(hits), "moments": moments})
        print(json.dumps(content))
        return
    for sentence, hits in zip(given.sentences, results):
        print(f"\"{show.short(sentence)}\"")
        if not is_found(hits):
            print(show.NO_MATCH)
        print(f"{show.HEADS}  video")
        for rank, hit in enumerate(hits, 1):
            print(f"{show.line(rank, hit.moment)}  {printable(hit.video)}")
    end = f"{summary(index)}; scores are for ranking only, not probabilities"
    if index.made["kind"] == "frames":
        end += "; ordered by how far a moment is above unrelated sentences in its video"
    print(end)


if __name__ == "__main__":
    main()
