"""Search an index of videos (extras/index.py) by sentences.

    python -m extras.search index/ "a person opens the door"
    python -m extras.search index/ "a person opens the door" --videos 100

With --videos, only the videos that CLIP2Video ranks first are searched (`python -m clip2video
index` adds its vectors to the same folder): less to read, but approximate.
"""
import support  # first, for a Ctrl-C while torch is imported
import json
import pathlib
import sys

import clip
import video
from clip2video.search import Ranker
from extras.index import Index, summary
from retrieve import Moment, Retriever, clock
from support import options
from support.errors import Mistake, reported
from support.text import printable


def ranked_videos(index: Index, sentences: list[str], count: int, device) -> list[set[str]]:
    """For each sentence the names of the `count` videos that CLIP2Video ranks first."""
    ranker = Ranker(index.folder, device)
    indexed = index.content["videos"].keys()
    if different := indexed ^ set(ranker.names):
        print(f"note: {len(different)} videos, for instance {printable(min(different))}, are in "
              f"only one of the two indexes and are skipped; update both with python -m "
              f"extras.index and python -m clip2video index", file=sys.stderr)
    return [{name for name, _ in best if name in indexed}
            for best in ranker.best(sentences, count)]


def search(index: Index, sentences: list[str], given) -> list[list[tuple[str, Moment]]]:
    """For each sentence (video, moment), best first."""
    checkpoint = pathlib.Path(index.content["checkpoint"])
    if not checkpoint.exists() or clip.sha256(checkpoint) != index.content["sha256"]:
        raise Mistake(f"the checkpoint of this index was removed or changed: {checkpoint}, SHA-256 "
                      f"{index.content['sha256']}; name its file with: python -m extras.index "
                      f"CKPT DIR --out {index.folder}")
    retriever = Retriever(checkpoint, given.device, cache=None)
    iou_text, contrastive_text = (x.cpu() for x in retriever.read(sentences))
    among = [None] * len(sentences)
    if given.videos:
        among = ranked_videos(index, sentences, given.videos, retriever.device)
    return [index.search(a, b, given.top, given.per_video, among=names)
            for a, b, names in zip(iou_text, contrastive_text, among)]


def main() -> None:
    arguments = options.parser("search an index", prog="python -m extras.search")
    add = arguments.add_argument
    add("index", help="folder of the index")
    add("sentences", nargs="+", help="what to look for")
    add("--top", type=int, default=10, help="moments per sentence")
    add("--per-video", type=int, default=3, help="moments per video at most")
    add("--videos", type=int, help="search only so many videos, those that CLIP2Video ranks first "
                                   "(default: all)")
    add("--device", **options.DEVICE)
    add("--json", action="store_true", help="print json")
    given = arguments.parse_args()
    with reported():
        if min(given.top, given.per_video, 1 if given.videos is None else given.videos) < 1:
            raise Mistake("--top, --per-video and --videos must be at least 1")
        index = Index(given.index)
        results = search(index, given.sentences, given)
        if given.json:
            print(json.dumps([{"sentence": sentence, "moments": [
                {"video": name, **moment._asdict()} for name, moment in answers]}
                for sentence, answers in zip(given.sentences, results)]))
            return
        for name in sorted({name for answers in results for name, _ in answers}):
            about = index.content["videos"][name]
            path = pathlib.Path(index.content["folder"]) / name
            if not path.is_file() or video.state_of(path).items() - about.items():
                print(f"note: {printable(name)} was removed or changed since it was indexed; run "
                      f"python -m extras.index again", file=sys.stderr)
        for sentence, answers in zip(given.sentences, results):
            print(f"\"{printable(sentence)}\"\n       start       end   score  video")
            for k, (name, m) in enumerate(answers, 1):
                print(f"{k:3d} {clock(m.start_sec):>8s}  {clock(m.end_sec):>8s}   {m.score:.3f}  "
                      f"{printable(name)}")
        print(f"{summary(index)}; scores are for ranking only, not probabilities")


if __name__ == "__main__":
    main()
