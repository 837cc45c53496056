"""Search an index of videos (extras/index.py) by sentences.

    python -m extras.search index/ "a person opens the door"
    python -m extras.search index/ "a person opens the door" --html page.html
    python -m extras.search index/ "a person opens the door" --videos 100

With --videos, only the videos that CLIP2Video ranks first are searched (`python -m clip2video
index` adds its vectors to the same folder): less to read, but approximate.
"""
import base64
import json
import pathlib
import sys

import clip
import video
from clip2video.search import Ranker
from extras import show
from extras.index import Hit, Index, summary
from retrieve import FOUND, Retriever, ZeroShot
from support import files, options
from support.errors import Mistake, reported
from support.text import printable


def ranked_videos(index: Index, sentences: list[str], count: int, device) -> list[set[str]]:
    """For each sentence the names of the `count` videos that CLIP2Video ranks first."""
    ranker = Ranker(index.folder, device)
    indexed = index.content["videos"].keys()
    different = indexed ^ set(ranker.names)             # in one of the two only
    if different:
        print(f"note: {len(different)} videos, for instance {printable(min(different))}, are in "
              f"only one of the two indexes and are skipped; update both with python -m "
              f"extras.index and python -m clip2video index", file=sys.stderr)
    return [{name for name, _ in best if name in indexed}
            for best in ranker.best(sentences, count)]  # pairs of name and score


def retriever_of(index: Index, device: str) -> Retriever | ZeroShot:
    """The model that made the index. Mistake if its file was removed or changed."""
    made = index.content
    if index.kind == "clip":
        shortest_sec, longest_sec = made["limits_sec"]
        retriever = ZeroShot(made["checkpoint"], device, made["rate"], shortest_sec, longest_sec,
                             made["prompt"], cache=None, gelu=made["sha256"].endswith("-gelu"))
        if retriever.digest == made["sha256"]:          # the file of this name may be another
            return retriever
    else:
        checkpoint = pathlib.Path(made["checkpoint"])
        if checkpoint.exists() and clip.sha256(checkpoint) == made["sha256"]:
            return Retriever(checkpoint, device, cache=None)
    # embeddings of different weights cannot be compared
    raise Mistake(f"the checkpoint of this index was removed or changed: {made['checkpoint']}, "
                  f"SHA-256 {made['sha256']}; pass its file to: python -m extras.index CKPT DIR "
                  f"--out {index.folder}")


def search(index: Index, retriever, sentences: list[str], top: int = 10, per_video: int = 3,
           videos: int | None = None) -> list[list[Hit]]:
    """For each sentence the best moments, best first."""
    among = [None] * len(sentences)                     # None: all videos
    if videos:
        among = ranked_videos(index, sentences, videos, retriever.device)
    results = []
    if index.kind == "clip":
        for text, names in zip(retriever.text(sentences), among):       # [D]
            results.append(index.search_frames(text, top, per_video, among=names))
        return results
    iou_text, contrastive_text = retriever.read(sentences)              # [S, J] each
    # the index is searched on the CPU
    for a, b, names in zip(iou_text.cpu(), contrastive_text.cpu(), among):      # [J] each
        results.append(index.search(a, b, top, per_video, among=names))
    return results


def is_found(hits: list[Hit]) -> bool:
    """Whether an answer reaches the threshold."""
    # subtle: not "z >= FOUND", because z is nan in an index made before z was stored
    return any(not hit.z < FOUND for hit in hits)      # no hits: not found


def as_page(index: Index, sentences: list[str], results: list[list[Hit]], out: str) -> str:
    """The page of retrieve.py for answers from several videos, with a thumbnail each."""
    folder = pathlib.Path(index.content["folder"])
    numbers = {}                                # video -> its place in `sources`
    sources = []                                # a video may be megabytes: each is embedded once
    sections = []
    for sentence, hits in zip(sentences, results):
        buttons = []
        for hit in hits:
            path = folder / hit.video
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
    add("--videos", type=int, help="search the N videos that CLIP2Video ranks first (default: all)")
    add("--device", **options.DEVICE)
    add("--json", action="store_true", help="print JSON")
    add("--html", metavar="FILE", help="write a page that plays the moments")
    given = arguments.parse_args()
    with reported():
        if min(given.top, given.per_video, 1 if given.videos is None else given.videos) < 1:
            raise Mistake("--top, --per-video and --videos must be at least 1")
        run(given)


def run(given) -> None:
    index = Index(given.index)
    results = search(index, retriever_of(index, given.device), given.sentences, given.top,
                     given.per_video, given.videos)
    changed = set()
    for name in sorted({hit.video for hits in results for hit in hits}):
        path = pathlib.Path(index.content["folder"]) / name
        stored = index.content["videos"][name]          # its size and time when it was indexed
        if not path.is_file() or video.state_of(path).items() - stored.items():
            changed.add(name)
            print(f"note: {printable(name)} was removed or changed since it was indexed; rerun "
                  f"python -m extras.index", file=sys.stderr)
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
    if index.kind == "clip":
        end += "; ordered by how far a moment is above unrelated sentences in its video"
    print(end)


if __name__ == "__main__":
    main()
