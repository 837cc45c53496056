"""CLIP alone, without any training, evaluated as a trained retriever is.

    python -m extras.zero_shot --dataset charades --clip ViT-B/32

Shapes: B videos, S sentences, T frames, N clips, D width of CLIP's joint space.
"""
import torch
from torch import Tensor

import clip
import data
import evaluate
import mmn
import retrieve
from support import options, parallel
from support.errors import reported


class Contrast(mmn.MomentMap):
    """`retrieve.zero_shot_scores` in the place of a trained retriever. Moments may be half as long
    as the video: a longer one has too little outside to be compared with."""

    def __init__(self, num_clips: int):
        diagonals = max(1, num_clips // 2 - 1)          # the main one has moments of one clip
        super().__init__(num_clips, pool_kernel=1, pool_stride=1, pool_counts=(diagonals,))

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """frames [B, T, D] and text [S, D] unit vectors, video_of [S] -> [S, N, N], 0 outside the
        candidates."""
        result = []
        for x, video in zip(text, video_of):            # one by one, as retrieve.py does
            result.append(retrieve.zero_shot_scores(frames[video], x[None], self.num_clips)[0])
        # through the candidates, because what is not one is -inf
        return self.to_map(self.at_candidates(torch.stack(result)))


def run_of(dataset: str, clip_name: str, root: str, device: torch.device) -> evaluate.Run:
    """A frozen CLIP as evaluate.py expects a checkpoint."""
    store = data.open_store(dataset, clip_name, root)
    path = data.clip_file(clip_name, root)
    text = clip.build_text(clip.read_state(path)).to(device)            # f^q, without images
    parser = data.parser_of(dataset, root)
    num_clips = 16                                      # as the paper's retriever, per dataset
    if dataset.startswith("activitynet"):
        num_clips = 64
    config = dict(dataset=dataset, clip=clip_name, root=root, frames=store.manifest["frames"],
                  method="zero-shot", seed=0, batch=64, mask="", num_clips=num_clips)
    # a checkpoint's sha256 and parser, with which evaluate.py compares its features and sentences
    return evaluate.Run(config, text, Contrast(num_clips).to(device),
                        {"clip_sha256": clip.sha256(path), "parser": parser.name, "epoch": 0})


def main() -> None:
    arguments = options.parser("evaluate CLIP alone, without training",
                               prog="python -m extras.zero_shot")
    add = arguments.add_argument
    add("--dataset", default="shapes", help="any dataset that has features")
    add("--clip", default="shapes", help="the CLIP of these features")
    add("--root", default="data", help="folder of datasets")
    add("--device", **options.DEVICE)
    given = arguments.parse_args()
    with reported():
        device = parallel.pick_device(given.device)
        run = run_of(given.dataset, given.clip, given.root, device)
        # what has no features is left out, and counted in the table
        results = evaluate.evaluate(run, device=device, allow_missing=True)
        print(f"dataset {given.dataset}, clip {given.clip}, without training")
        print(evaluate.table(results))


if __name__ == "__main__":
    main()
