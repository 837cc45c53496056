"""An index over a folder of videos: which moment of which video does a sentence describe?

    python -m extras.index DIR --out index/                     # CLIP alone, without training
    python -m extras.index ckpt.pt DIR --out index/             # with a trained model
    python -m extras.search index/ "a person opens the door"

Rerun the same command to update the index after a change. Neither of MMN's two embeddings of a
moment depends on the sentence (Eq. 6, 9), so its index stores those of all moments of all videos,
and a search is a product with two vectors. Without a checkpoint, the score of a moment is linear in
its frames (retrieve.contrast), so the index stores the frames.

Shapes: R rows of an index (moments, or frames), J width of MMN's joint space, D of CLIP's, V
videos, F frames of the longest of some videos.
"""
import bisect
import json
import math
import os
import pathlib
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import mmn
import video
from retrieve import (Moment, Retriever, ZeroShot, add_options, greedy_nms, note, retriever_of,
                      search_intervals)
from support import files, options
from support.errors import Mistake, reported
from support.text import printable

ROUNDING = 1e-3                 # upper bound of the error of a cosine of float16 vectors
FILES = {"checkpoint": {"iou.f16": torch.half, "spans.f32": torch.float32,
                        "contrastive.f16": torch.half},
         "clip": {"frames.f16": torch.half}}


class Hit(NamedTuple):
    """An answer from an index. z: as in retrieve.Answer; order: what the answers are sorted by."""
    video: str
    moment: Moment
    z: float
    order: float


class Index:
    """The moments of many videos, in a folder:

        iou.f16, contrastive.f16    [R, J] float16: unit vectors of either head
        spans.f32                   [R, 2] float32: start and end in seconds
        frames.f16                  without a checkpoint, instead: [R, D] float16 unit vectors
        videos.json                 how it was made; for each video: file, size, modification time,
                                    first row, number of rows, duration, and mean and deviation of
                                    the best scores of generic sentences

    Rows are appended, one video at a time, and count once videos.json names them, so an interrupted
    addition leaves no trace. `made`: what the index is made with (`made_with`)."""

    def __init__(self, folder: str | os.PathLike, made: dict | None = None):
        self.folder = pathlib.Path(folder)
        self.table = self.folder / "videos.json"
        self.mapped = None                                      # see map_files
        made = made or {}
        if self.table.exists():
            self.content = self.read_table()
        elif not made:
            raise Mistake(f"{folder} is not an index; make one with: python -m extras.index DIR "
                          f"--out {folder}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.content = made | {"joint": 0, "videos": {}}
        for name, value in made.items():
            # a checkpoint is identified by its SHA-256; its file may have moved
            if name != "checkpoint" and self.content.get(name) != value:
                raise Mistake(f"{folder} was made with another checkpoint or setting, "
                              f"{self.content['checkpoint']}; choose another --out")
        self.content |= made                                    # where the checkpoint is now
        self.kind = "clip" if "rate" in self.content else "checkpoint"

    def read_table(self) -> dict:
        """videos.json. Mistake if it is damaged."""
        try:
            content = json.loads(self.table.read_text(encoding="utf-8"))
            if not isinstance(content["checkpoint"], str) or not isinstance(content["sha256"], str):
                raise ValueError("invalid checkpoint")
            counts = [content["joint"]]
            for about in content["videos"].values():
                counts += [about["first"], about["rows"]]
            # subtle: `type`, because True is an int, too
            if not all(type(count) is int and count >= 0 for count in counts):
                raise ValueError("invalid row count")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Mistake(f"{self.table} is damaged ({error}); remove {self.folder} and make the "
                          f"index again") from error
        return content

    def rows(self) -> int:
        ends = [about["first"] + about["rows"] for about in self.content["videos"].values()]
        return max(ends, default=0)                             # removed videos leave gaps

    def save(self) -> None:
        self.mapped = None                                      # the files may have changed
        files.save(self.table, json.dumps(self.content, indent=1))

    def add(self, name: str, about: dict, arrays: list[Tensor]) -> None:
        """Appends the rows of a video. arrays: in the order of FILES, [rows, width] each."""
        first = self.rows()
        for (file, kind), x in zip(FILES[self.kind].items(), arrays):
            values = x.to(kind).numpy()
            with open(self.folder / file, "ab") as out:
                # overwrite rows left behind by an interrupted addition or a removed video
                out.truncate(first * values.shape[1] * values.itemsize)
                out.write(values.tobytes())
                out.flush()
                os.fsync(out.fileno())                          # on disk before the table names it
        self.content["joint"] = arrays[0].shape[1]
        self.content["videos"][name] = about | {"first": first, "rows": len(arrays[0])}
        self.save()

    def update(self, retriever: Retriever | ZeroShot, folder: str | os.PathLike) -> dict[str, str]:
        """Synchronises the index with a folder of videos: reads new and changed files, drops
        removed ones. Returns and prints file -> reason for those that could not be read."""
        videos = videos_in(folder)
        indexed = self.content["videos"]
        failed = {}
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
            about = video.state_of(path)            # first, as the file may change meanwhile
            try:
                encoded = retriever.encode(path)
            except video.VideoError as error:       # continue with the other videos
                failed[name] = str(error)
                tqdm.write(printable(f"failed: {name}: {error}"))
                continue
            # stored to compute z at search time
            generic = retriever.generic_best(encoded)                   # [G] scores
            about["duration_sec"] = encoded.duration_sec
            about["generic"] = float(generic.mean())
            about["deviation"] = float(generic.std().clamp(min=1e-9))
            if self.kind == "clip":
                self.add(name, about, [encoded.frames])                 # [F, D]
            else:
                spans, iou, contrastive = retriever.moments(encoded)    # [W * P, 2 or J]
                self.add(name, about, [iou, spans, contrastive])
        self.save()
        if failed:
            print(f"{len(failed)} of {len(videos)} videos could not be read")
        return failed

    def map_files(self) -> list[Tensor]:
        """The arrays of FILES, [R, width] each, memory-mapped. Mistake if a file is too short."""
        R = self.rows()
        if self.mapped is None or len(self.mapped[0]) != R:
            self.mapped = []
            for name, kind in FILES[self.kind].items():
                path = self.folder / name
                width = 2 if name.startswith("spans") else self.content["joint"]
                if not path.exists() or path.stat().st_size < R * width * kind.itemsize:
                    raise Mistake(f"{path} is damaged; remove {self.folder} and make the index "
                                  f"again")
                values = torch.from_file(str(path), False, R * width, dtype=kind)       # not shared
                self.mapped.append(values.view(R, width))
        return self.mapped

    def z(self, about: dict, score: float) -> float:
        """As in retrieve.Answer; nan in an index made before z was stored."""
        return (score - about.get("generic", math.nan)) / about.get("deviation", math.nan)

    def hit(self, name: str, moment: Moment) -> Hit:
        z = self.z(self.content["videos"][name], moment.score)
        return Hit(name, moment, z, order=z if self.kind == "clip" else moment.score)

    def search_frames(self, text: Tensor, top_k: int = 10, per_video: int = 3,
                      among: set[str] | None = None) -> list[Hit]:
        """The best moments of all videos for one sentence by CLIP alone, best z first: contrasts of
        different videos cannot be compared, z can. Exact: the moments of the `top_k` best videos.

        text    [D] unit vector; per_video and among as of `search`
        """
        names = [name for name in self.content["videos"] if among is None or name in among]
        if not names:
            raise Mistake(f"{self.folder} contains no video; add some with: python -m extras.index")
        blocks = self.map_files()[0].split(1 << 16)             # bounds the memory for float32
        similarity = torch.cat([block.float() @ text for block in blocks])      # [R]
        # subtle: a video whose best moment is not among the top_k cannot contribute an answer
        abouts = [self.content["videos"][name] for name in names]
        first = self.best_of(similarity, abouts, 1)[:, 0, 2]    # [V] scores
        z = torch.tensor([self.z(about, score) for about, score in zip(abouts, first.tolist())])
        chosen = z.topk(min(top_k, len(names))).indices.tolist()
        moments = self.best_of(similarity, [abouts[v] for v in chosen], per_video)
        # -inf marks missing moments: a short video may have fewer than per_video
        hits = [self.hit(names[v], Moment(*row)) for v, rows in zip(chosen, moments.tolist())
                for row in rows if row[2] > -math.inf]
        return sorted(hits, key=lambda hit: -hit.z)[:top_k]

    def best_of(self, similarity: Tensor, abouts: list[dict], top_k: int) -> Tensor:
        """The best moments of each video, [V, top_k, 3]: start and end in seconds, score. Videos
        of similar length are searched together."""
        result = torch.zeros(len(abouts), top_k, 3, dtype=torch.double)
        # sorted by length to keep the padding small
        order = sorted(range(len(abouts)), key=lambda v: abouts[v]["rows"])
        shortest_sec, longest_sec = self.content["limits_sec"]
        for i in range(0, len(order), 256):
            part = [abouts[v] for v in order[i:i + 256]]
            counts = torch.tensor([about["rows"] for about in part])            # [256]
            rows = [similarity[a["first"]:a["first"] + a["rows"]] for a in part]
            padded = pad_sequence(rows, batch_first=True)       # [256, F]
            each_sec = torch.tensor([a["duration_sec"] / a["rows"] for a in part])      # [256]
            shortest = max(1, round(shortest_sec / float(each_sec.median())))
            longest = torch.minimum((longest_sec / each_sec).long(), counts // 2).clamp(min=1)
            shortest = min(shortest, int(longest.min()))        # one for all
            best = search_intervals(padded, shortest, longest, top_k, counts)
            best[..., :2] *= each_sec[:, None, None]            # frames -> seconds
            result[order[i:i + 256]] = best
        return result

    def search(self, iou_text: Tensor, contrastive_text: Tensor, top_k: int = 10,
               per_video: int = 3, block: int = 1 << 16, among: set[str] | None = None
               ) -> list[Hit]:
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
        videos = self.content["videos"]
        names = sorted(videos, key=lambda name: videos[name]["first"])  # in the order of their rows
        firsts = [videos[name]["first"] for name in names]
        bounds = self.bounds(iou_text, contrastive_text, block, among)  # [R]
        count = 128                             # moments rescored in float32
        while True:
            count = min(count, len(bounds))
            highest, rows = bounds.topk(count)                          # [count] each
            unseen = highest[-1]                # no other moment can score more than this
            rows = rows[highest > -math.inf].sort().values              # in the order of the file
            overlap = torch.sigmoid(mmn.SCORE_SCALE * iou[rows].float() @ iou_text)
            scores = mmn.fuse(overlap, contrastive[rows].float() @ contrastive_text)
            owners = [names[bisect.bisect_right(firsts, row) - 1] for row in rows.tolist()]
            best = greedy_nms(spans[rows], scores, top_k, owners, per_video)
            # the worst answer still beats every moment that was not rescored
            complete = len(best) == top_k and scores[best[-1]] >= unseen
            if complete or count == len(bounds):
                return [self.hit(owners[k], Moment(*spans[rows[k]].tolist(), scores[k].item()))
                        for k in best]
            count *= 2

    def bounds(self, iou_text: Tensor, contrastive_text: Tensor, block: int,
               among: set[str] | None) -> Tensor:
        """Upper bounds of the scores of all rows, [R]; -inf for rows of no video, or of others than
        `among`."""
        iou, _, contrastive = self.map_files()
        a = iou_text.half()                                     # [J]
        b = contrastive_text.half()                             # [J]
        allowed = torch.zeros(len(iou), dtype=torch.bool)       # [R], True = may be an answer
        stretches = []                                          # slices of rows to read
        for name, about in self.content["videos"].items():
            if among is None or name in among:
                stretch = slice(about["first"], about["first"] + about["rows"])
                stretches.append(stretch)
                allowed[stretch] = True
        if among is None:                       # all rows in large blocks, removed videos too
            stretches = [slice(i, i + block) for i in range(0, len(iou), block)]
        bounds = torch.full((len(iou),), -math.inf)
        # subtle: the score increases with both cosines, so bounds on these bound the score
        for rows in stretches:
            cosine = torch.mv(iou[rows], a).float() + ROUNDING
            overlap = torch.sigmoid(mmn.SCORE_SCALE * cosine)
            bounds[rows] = mmn.fuse(overlap, torch.mv(contrastive[rows], b).float() + ROUNDING)
        return bounds.masked_fill_(~allowed, -math.inf)


def videos_in(folder: str | os.PathLike) -> dict[str, pathlib.Path]:
    """The videos of a folder. Mistake if there are none; a note lists the suffixes of others."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Mistake(f"there is no folder {folder}")
    videos = video.video_files(folder)
    others = sorted({path.suffix.lower() or path.name for path in folder.rglob("*")
                     if path.is_file() and path.suffix.lower() not in video.VIDEOS})
    # an unmounted disk looks like an empty folder, and would empty the index
    if not videos:
        raise Mistake(f"{folder} contains no video; pass a folder that does, and check that its "
                      f"disk is mounted (to empty an index, remove its folder)")
    if others:
        note(printable(f"files that end in {', '.join(others[:20])} are skipped"))
    return videos


def summary(index: Index) -> str:
    """For instance "6 videos, 1.5 minutes of video, 816 candidate moments"."""
    videos = index.content["videos"].values()
    rows = sum(about["rows"] for about in videos)
    minutes = sum(about["duration_sec"] for about in videos) / 60
    length = f"{minutes:.1f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"
    what = "frames" if index.kind == "clip" else "candidate moments"
    return f"{len(videos)} videos, {length} of video, {rows:,} {what}"


def made_with(retriever: Retriever | ZeroShot, checkpoint: str | None) -> dict:
    """What determines an index; another setting needs another index."""
    if checkpoint:
        return {"checkpoint": str(pathlib.Path(checkpoint).resolve()),
                "sha256": files.sha256(checkpoint)}
    return {"checkpoint": retriever.name, "sha256": retriever.digest, "rate": retriever.rate,
            "prompt": retriever.prompt, "limits_sec": list(retriever.limits_sec)}


def main() -> None:
    arguments = options.parser("index a folder of videos, or update its index",
                               usage="python -m extras.index [CKPT.pt] DIR --out INDEX",
                               prog="python -m extras.index")
    add = arguments.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="a checkpoint (or none: CLIP alone), and a "
                                                   "folder of videos")
    add("--out", required=True, help="folder of the index")
    add_options(arguments)
    given = arguments.parse_args()
    with reported():
        if len(given.inputs) > 2:
            raise Mistake("pass at most one checkpoint, and one folder of videos")
        folder = given.inputs[-1]
        checkpoint = given.inputs[0] if len(given.inputs) == 2 else None
        videos_in(folder)                       # before a download starts
        retriever = retriever_of(given, checkpoint, cache=None)
        index = Index(given.out, made_with(retriever, checkpoint))
        index.update(retriever, folder)
        print(f"{given.out}: {summary(index)}")


if __name__ == "__main__":
    main()
