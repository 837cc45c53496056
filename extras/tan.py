"""2D-TAN, a second retriever f^g: does the injection help a retriever other than MMN?

The paper calls VDI "a generic formulation that can be integrated into existing VMR models", and
shows one. 2D-TAN is of an older kind: it multiplies the map of moments by the sentence before the
convolution, so that neighbouring moments are compared for this sentence, and reads one score off
each cell. It is trained on the overlap (Eq. 7) alone. Its moments depend on the sentence, so they
cannot be indexed.

    python train.py --retriever 2d-tan
    python -m extras.reproduce retrievers

"2D Temporal Adjacent Networks" (AAAI 2020). Shapes: B videos, S sentences, T frames, N clips, P
candidate moments, D width of CLIP's joint space, J width of the product, C of the convolutions.
"""
import torch.nn.functional as F
from torch import Tensor, nn

import mmn


class TAN(mmn.MomentMap):
    """Frames and sentences -> one score for each moment.

    Arguments as of mmn.MMN; `joint` is the width J in which map and sentence are multiplied."""

    def __init__(self, width: int, num_clips: int, pool_kernel: int, pool_stride: int,
                 pool_counts: tuple[int, ...], kernel: int, layers: int, hidden: int, joint: int,
                 features: int = 0):
        super().__init__(num_clips, pool_kernel, pool_stride, pool_counts, width, features)
        self.map_fc = nn.Conv2d(width, joint, 1)
        # DEVIATION: CLIP's x^q and frames; published: LSTM over words, convolution over frames
        self.text_fc = nn.Linear(width, joint)
        self.add_convolutions(joint, hidden, kernel, layers)
        self.score = nn.Conv2d(hidden, 1, 1)

    def forward(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """frames [B, T, D], text [S, D], video_of [S] -> logits of the candidates [S, P]."""
        moments = self.map_fc(self.moment_map(frames))                  # [B, J, N, N]
        x = moments[video_of] * self.text_fc(text)[:, :, None, None]    # [S, J, N, N]
        x = F.normalize(x, dim=1) * self.candidates             # 0 outside the candidates
        x = self.convolution(x, self.convs, None)                       # [S, C, N, N]
        return self.at_candidates(self.score(x))[:, 0]                  # [S, P]

    def scores(self, frames: Tensor, text: Tensor, video_of: Tensor) -> Tensor:
        """As of mmn.MMN: [S, N, N] in (0, 1), 0 outside the candidates."""
        return self.to_map(self(frames, text, video_of).sigmoid())

    def outputs(self, frames: Tensor, text: Tensor, video_of: Tensor) -> tuple[Tensor]:
        """As of mmn.MMN: a row for each sentence."""
        return self(frames, text, video_of),

    def losses(self, outputs: tuple[Tensor], iou: Tensor, video_of: Tensor, moments_sec: Tensor,
               config) -> dict[str, Tensor]:
        """Eq. (7), the only loss of 2D-TAN (MMN adopted it). Arguments as of mmn.MMN."""
        return {"L_iou": mmn.iou_loss(outputs[0].sigmoid(), iou).mean()}
