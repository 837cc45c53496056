"""2D-TAN, a second retriever f^g: does the injection help another one than MMN?

The paper calls VDI "a generic formulation that can be integrated into existing VMR models", and
shows one. This is another, of an older kind: the map of moments is multiplied by the sentence
first and convolved then, so that neighbouring moments are compared for this sentence, and one score
is read off each cell. It is taught the overlap (Eq. 7) alone. Nothing of it can be known before the
sentence is, so no index can be made with it.

    python train.py --retriever 2d-tan
    python reproduce.py retrievers

"2D Temporal Adjacent Networks" (AAAI 2020): its network, with CLIP's x^q in the place of its LSTM
and CLIP's frames as they are, as in mmn.py. Shapes: B videos, S sentences, T frames, N clips, P
candidate moments, D width of CLIP's joint space, J width of the product, C of the convolutions.
"""
import torch.nn.functional as F
from torch import Tensor, nn

import mmn


class TAN(mmn.MomentMap):
    """Frames and sentences -> one score a moment.

    Arguments as of mmn.MMN; `joint` is the width J in which map and sentence are multiplied."""

    def __init__(self, width: int, num_clips: int, pool_kernel: int, pool_stride: int,
                 pool_counts: tuple[int, ...], kernel: int, layers: int, hidden: int, joint: int):
        super().__init__(num_clips, pool_kernel, pool_stride, pool_counts)
        self.map_fc = nn.Conv2d(width, joint, 1)
        # DEVIATION: CLIP's x^q and frames; published: LSTM over words, convolution over frames
        self.text_fc = nn.Linear(width, joint)
        self.add_convolutions(joint, hidden, kernel, layers)
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """frames [B, T, D], text [S, D], video_of [S] -> logits of the candidates [S, P]."""
        moments = self.map_fc(self.moment_map(frames))                  # [B, J, N, N]
        x = moments[video_of] * self.text_fc(text)[:, :, None, None]    # [S, J, N, N]
        x = F.normalize(x, dim=1) * self.candidates                     # 0 where no moment is
        for i, conv in enumerate(self.convs):
            x = F.relu(conv(x)) * self.get_buffer(f"weight{i}")         # [S, C, n, n]
        return self.at_candidates(self.score(x))[:, 0]                  # [S, P]

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor, fusion: str = "") -> Tensor:
        """What ranks the moments: [S, N, N] in (0, 1), 0 where there is none. Nothing to fuse."""
        return self.to_map(self(frames, text, video_of).sigmoid())

    def outputs(self, frames: Tensor, text: Tensor, video_of: Tensor) -> tuple[Tensor]:
        """As of mmn.MMN: a row a sentence."""
        return self(frames, text, video_of),

    def losses(self, outputs: tuple[Tensor], iou: Tensor, video_of: Tensor, moments_sec: Tensor,
               config) -> dict[str, Tensor]:
        """Eq. (7), the only loss of 2D-TAN (MMN took it over). Arguments as of mmn.MMN."""
        return {"L_iou": mmn.iou_loss(outputs[0].sigmoid(), iou).mean()}
