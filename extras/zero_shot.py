"""CLIP alone, without training, as a row of the evaluation.

    python -m extras.zero_shot --dataset shapes --clip shapes
    python -m extras.zero_shot --dataset charades               # with ViT-B/32

`untrained.contrast_map` takes the place of a trained retriever; evaluate.py does the rest.
docs/zero-shot.md says how the score and the threshold FOUND were chosen.

Shapes: B videos, S sentences, T frames, N clips, D width of CLIP's joint space.
"""
import statistics

import torch
from torch import Tensor

import clip
import data
import evaluate
import mmn
from support import options, parallel, untrained
from support.errors import Mistake, reported


class Contrast(mmn.MomentMap):
    """`untrained.contrast_map` behind the interface of a retriever. The candidates are all moments
    of up to half the video, as in retrieve.py. Cosines of frames `each_sec` apart are averaged over
    `smooth_sec`."""

    def __init__(self, num_clips: int, each_sec: float = 1.0, smooth_sec: float = 0.0):
        # the diagonals above the main one, which are the moments of 2 to N/2 clips
        super().__init__(num_clips, pool_kernel=1, pool_stride=1,
                         pool_counts=(num_clips // 2 - 1,))
        self.each_sec = each_sec
        self.smooth_sec = smooth_sec

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """frames [B, T, D] and text [S, D] unit vectors, video_of [S] -> [S, N, N], 0 outside the
        candidates."""
        similarity = torch.einsum("sd,std->st", text, frames[video_of])         # [S, T]
        similarity = untrained.smoothed(similarity, self.each_sec, self.smooth_sec)
        scores = untrained.contrast_map(similarity, self.num_clips)     # [S, N, N]
        # -inf marks moments without a score; 0, as in MMN, keeps the whole map finite
        return self.to_map(self.at_candidates(scores))


def run_of(dataset: str, clip_name: str, root: str, device: torch.device) -> evaluate.Run:
    """A frozen CLIP as evaluate.py expects a checkpoint."""
    store = data.open_store(dataset, clip_name, root)
    path = data.clip_file(clip_name, root)
    # only the text tower is needed, because the frames are already encoded
    text = clip.load_text(path, activation=clip.activation_of(store.manifest)).to(device)
    parser = data.parser_of(dataset, root)
    num_clips = 16
    if dataset.startswith("activitynet"):       # N as in the presets of train.py
        num_clips = 64
    config = {"dataset": dataset, "clip": clip_name, "root": root, "method": "zero-shot",
              "frames": store.manifest["frames"], "num_clips": num_clips, "batch": 64,
              "mask": "", "seed": 0}            # "": masked words are dropped
    checkpoint = {"clip_sha256": clip.sha256(path), "parser": parser.name, "epoch": 0}
    # one rate for all videos: a retriever does not know their durations
    rates_sec = [about["seconds_per_feature"] for about in store.manifest["videos"].values()]
    if not rates_sec:
        raise Mistake(f"no video of {dataset} has features in {store.folder}")
    retriever = Contrast(num_clips, statistics.median(rates_sec),
                         untrained.smooth_sec_of(dataset))
    return evaluate.Run(config, text, retriever.to(device), checkpoint)


def main() -> None:
    arguments = options.parser("CLIP alone, without training", prog="python -m extras.zero_shot")
    add = arguments.add_argument
    add("--dataset", required=True, help="any dataset that has features")
    add("--clip", default="ViT-B/32", help="the CLIP that made these features")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_args()
    with reported():
        device = parallel.pick_device(given.device)
        run = run_of(given.dataset, given.clip, given.root, device)
        results = evaluate.evaluate(run, device=device)
        # the title line of evaluate.py; nothing was trained, so seed and epoch are 0
        print(f"dataset {given.dataset}, method zero-shot, seed 0, query full, epoch 0, "
              f"parser {run.checkpoint['parser']}")
        print(evaluate.table(results))


if __name__ == "__main__":
    main()
