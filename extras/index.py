"""An index over a folder of videos: which moment of which video does a sentence describe?

    python -m extras.index ckpt.pt DIR --out index/             # and again after a change
    python -m extras.search index/ "a person opens the door"

Neither of MMN's two embeddings of a moment depends on the sentence (Eq. 6, 9), so an index stores
those of all moments of all videos, and a search is a product with two vectors.

Shapes: R moments of an index (rows), J width of MMN's joint space.
"""
import support  # first, for a Ctrl-C while torch is imported
import bisect
import json
import math
import os
import pathlib

import torch
from torch import Tensor
from tqdm import tqdm

import clip
import mmn
import video
from retrieve import Moment, Retriever, greedy_nms
from support import files, options
from support.errors import Mistake, reported
from support.text import printable

ROUNDING = 1e-3                 # upper bound of the error of a cosine of float16 vectors


class Index:
    """The moments of many videos, in a folder:

        iou.f16, contrastive.f16    [R, J] float16: unit vectors of either head
        spans.f32                   [R, 2] float32: start and end in seconds
        videos.json                 the checkpoint, J, and for each video: file, size, modification
                                    time, first row, number of rows, duration

    Rows are appended, one video at a time, and count once videos.json names them, so an interrupted
    addition leaves no trace."""

    def __init__(self, folder: str | os.PathLike, checkpoint: str | None = None):
        self.folder = pathlib.Path(folder)
        self.table, self.mapped = self.folder / "videos.json", None
        if self.table.exists():
            self.content = self.read_table()
        elif checkpoint is None:
            raise Mistake(f"{folder} is not an index; make one with: python -m extras.index "
                          f"ckpt.pt DIR --out {folder}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.content = {"sha256": clip.sha256(checkpoint), "joint": 0, "videos": {}}
        if checkpoint and clip.sha256(checkpoint) != self.content["sha256"]:
            raise Mistake(f"{folder} was made with another checkpoint, "
                          f"{self.content['checkpoint']}; choose another --out")
        if checkpoint:                                          # its file may have moved
            self.content["checkpoint"] = str(pathlib.Path(checkpoint).resolve())

    def read_table(self) -> dict:
        """videos.json. Mistake if it is damaged."""
        try:
            content = json.loads(self.table.read_text())
            if not isinstance(content["checkpoint"], str) or not isinstance(content["sha256"], str):
                raise ValueError("invalid checkpoint")
            counts = [content["joint"]]
            for about in content["videos"].values():
                counts += [about["first"], about["rows"]]
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("invalid row count")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Mistake(f"{self.table} is damaged ({error}); remove {self.folder} and make the "
                          f"index again") from error
        return content

    def rows(self) -> int:
        return max((v["first"] + v["rows"] for v in self.content["videos"].values()), default=0)

    def save(self) -> None:
        self.mapped = None                                      # the files may have changed
        files.save(self.table, json.dumps(self.content, indent=1))

    def add(self, name: str, about: dict, spans: Tensor, iou: Tensor, contrastive: Tensor) -> None:
        first, J = self.rows(), iou.shape[1]
        for file, values in (("iou.f16", iou.half().numpy()), ("spans.f32", spans.float().numpy()),
                             ("contrastive.f16", contrastive.half().numpy())):
            path = self.folder / file
            path.touch()
            with open(path, "r+b") as out:
                out.truncate(first * values.shape[1] * values.itemsize)
                out.seek(0, os.SEEK_END)
                out.write(values.tobytes())
                out.flush()
                os.fsync(out.fileno())
        self.content["joint"] = J
        self.content["videos"][name] = about | {"first": first, "rows": len(spans)}
        self.save()

    def update(self, retriever: Retriever, folder: str | os.PathLike) -> dict[str, str]:
        """Synchronises the index with a folder of videos: reads new and changed files, drops those
        removed. Returns and prints file -> reason for those that could not be read."""
        videos = video.video_files(folder)
        indexed, failed = self.content["videos"], {}
        if not videos and indexed:
            raise Mistake(f"{folder} contains no video, but the index has {len(indexed)}; check "
                          f"that it is the right folder and that its disk is mounted (to empty "
                          f"the index, remove {self.folder})")
        if not videos:
            raise Mistake(f"{folder} contains no video; name a folder that does")
        self.content["folder"] = str(pathlib.Path(folder).resolve())
        for name in list(indexed):
            if name not in videos:
                print(printable(f"removed: {name}"))
                del indexed[name]
            elif video.state_of(videos[name]).items() - indexed[name].items():
                print(printable(f"changed: {name}"))
                del indexed[name]
        self.save()             # before `add` overwrites the rows of removed videos
        for name, path in tqdm(videos.items(), desc="index", unit="video", disable=None):
            if name in indexed:
                continue
            about = video.state_of(path)
            try:
                encoded = retriever.encode(path)
            except video.VideoError as error:
                failed[name] = str(error)
                tqdm.write(printable(f"failed: {name}: {error}"))
                continue
            self.add(name, about | {"duration_sec": encoded.duration_sec},
                     *retriever.moments(encoded))
        self.save()
        return failed

    def search(self, iou_text: Tensor, contrastive_text: Tensor, top_k: int = 10,
               per_video: int = 3, block: int = 1 << 16, among: set[str] | None = None
               ) -> list[tuple[str, Moment]]:
        """The best moments of all videos for one sentence, best first.

        Exact: a pass in float16 gives an upper bound of every moment's score, and the moments with
        the highest bounds are scored again in float32, more of them until no other moment can be
        among the answers.

        iou_text, contrastive_text  [J] unit vectors (Retriever.read)
        per_video                   answers per video at most, after NMS
        block                       rows that are multiplied at a time
        among                       search only the videos with these names
        """
        if not self.rows():
            raise Mistake(f"{self.folder} contains no video; add some with: python -m extras.index")
        iou, spans, contrastive = self.map_files()
        names, firsts = zip(*sorted(((name, about["first"]) for name, about
                                     in self.content["videos"].items()), key=lambda row: row[1]))
        bounds = self.bounds(iou_text, contrastive_text, block, among)  # [R]
        count = 128
        while True:
            count = min(count, len(bounds))
            highest, rows = bounds.topk(count)
            unseen = highest[-1]                        # no other moment can score more than this
            rows = rows[highest > -math.inf].sort().values
            scores = mmn.fuse(torch.sigmoid(mmn.SCORE_SCALE * iou[rows].float() @ iou_text),
                              contrastive[rows].float() @ contrastive_text)
            owners = [names[bisect.bisect_right(firsts, row) - 1] for row in rows.tolist()]
            best = greedy_nms(spans[rows], scores, top_k, owners, per_video)
            if count == len(bounds) or len(best) == top_k and scores[best[-1]] >= unseen:
                return [(owners[k], Moment(*spans[rows[k]].tolist(), scores[k].item()))
                        for k in best]
            count *= 2

    def map_files(self) -> list[Tensor]:
        """iou [R, J], spans [R, 2] and contrastive [R, J], memory-mapped."""
        R, J = self.rows(), self.content["joint"]
        if self.mapped is None or len(self.mapped[1]) != R:
            self.mapped = [
                torch.from_file(str(self.folder / name), False, R * n, dtype=kind).view(R, n)
                for name, n, kind in (("iou.f16", J, torch.half), ("spans.f32", 2, torch.float32),
                                      ("contrastive.f16", J, torch.half))]
        return self.mapped

    def bounds(self, iou_text: Tensor, contrastive_text: Tensor, block: int,
               among: set[str] | None) -> Tensor:
        """Upper bounds of the scores of all rows, [R]; -inf for rows of no video, or of others than
        `among`."""
        iou, _, contrastive = self.map_files()
        a, b = iou_text.half(), contrastive_text.half()
        allowed, stretches = torch.zeros(len(iou), dtype=torch.bool), []
        for name, about in self.content["videos"].items():
            if among is None or name in among:
                stretches.append((about["first"], about["first"] + about["rows"]))
                allowed[slice(*stretches[-1])] = True
        if among is None:                       # all rows in large blocks, removed videos too
            stretches = [(i, min(i + block, len(iou))) for i in range(0, len(iou), block)]
        bounds = torch.full((len(iou),), -math.inf)
        for rows in (slice(*stretch) for stretch in stretches):
            overlap = torch.sigmoid(mmn.SCORE_SCALE * (torch.mv(iou[rows], a).float() + ROUNDING))
            bounds[rows] = mmn.fuse(overlap, torch.mv(contrastive[rows], b).float() + ROUNDING)
        return bounds.masked_fill_(~allowed, -math.inf)


def summary(index: Index) -> str:
    """For instance "6 videos, 1.5 minutes of video, 816 candidate moments"."""
    videos = index.content["videos"].values()
    minutes = sum(about["duration_sec"] for about in videos) / 60
    length = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    return (f"{len(videos)} videos, {length} of video, {sum(about['rows'] for about in videos):,} "
            f"candidate moments")


def main() -> None:
    arguments = options.parser("index a folder of videos, or update its index",
                               prog="python -m extras.index")
    add = arguments.add_argument
    add("checkpoint", help="ckpt.pt of a run")
    add("folder", help="folder of videos")
    add("--out", required=True, help="folder of the index")
    add("--device", **options.DEVICE)
    add("--clip", help="file of the CLIP's weights (default: where training found them)")
    given = arguments.parse_args()
    with reported():
        if not pathlib.Path(given.folder).is_dir():
            raise Mistake(f"there is no folder {given.folder}")
        retriever = Retriever(given.checkpoint, given.device, given.clip, cache=None)
        if retriever.run.config["retriever"] != "mmn":
            raise Mistake(f"an index needs MMN, whose moments do not depend on the sentence, but "
                          f"{given.checkpoint} has another retriever; train with --retriever mmn")
        index = Index(given.out, given.checkpoint)
        index.update(retriever, given.folder)
        print(f"{given.out}: {summary(index)}")


if __name__ == "__main__":
    main()
