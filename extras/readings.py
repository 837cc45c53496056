"""Other readings of Eq. 1-5, as literal as that of inject.py, each a row of
`python -m extras.reproduce readings`.

    printed     as in inject.py
    mean        Eq. 2: the squared norm is averaged over D instead of summed. With the decoder's
                last LayerNorm the sum starts at D = 512, and dominates Eq. 11
    bare        Eq. 1: TransDecoder is one cross-attention, without residual, norm or feed-forward
    detached    "we only update the parameters of the text encoder": x^qs asks without gradient, so
                that L^vc and L^sd reach the text tower through x^qd alone
    fixed       no gradient into the video's side: x~^qs and m~ are targets

Shapes: S sentences, B videos, T frames, D width of CLIP's joint space.
"""
import contextlib
import dataclasses

from torch import Tensor, nn

import inject
import train

READINGS = ("printed", "mean", "bare", "detached", "fixed")


@dataclasses.dataclass(frozen=True)
class Config(train.Config):
    """A train.Config, and the readings that apply."""
    reading: tuple[str, ...] = ()


class Context(inject.VisualContext):
    """Eq. (1) by the readings `reading`; arguments as of inject.VisualContext."""
    reading: tuple[str, ...] = ()

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        if "bare" in self.reading:
            self.decoder = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, static: Tensor, frames: Tensor, video_of: Tensor) -> Tensor:
        static = static.detach() if "detached" in self.reading else static
        if "bare" in self.reading:
            seen = frames[video_of]                                     # [S, T, D]
            context = self.decoder(static[:, None], seen, seen, need_weights=False)[0][:, 0]
        else:
            context = super().forward(static, frames, video_of)
        return context.detach() if "fixed" in self.reading else context


class FixedDynamic(inject.SpatialDynamic):
    """Eq. (4) without gradient."""

    def forward(self, frames: Tensor, patches: Tensor) -> Tensor:
        return super().forward(frames, patches).detach()


@contextlib.contextmanager
def applied(config: train.Config):
    """Within the block, train.py trains by the readings of `config`, if it has any."""
    reading = getattr(config, "reading", ())
    originals = inject.VisualContext, inject.SpatialDynamic, inject.visual_context_loss
    if reading:
        inject.VisualContext = type("Context", (Context,), {"reading": reading})
    if "fixed" in reading:
        inject.SpatialDynamic = FixedDynamic
    if "mean" in reading:
        inject.visual_context_loss = mean_loss
    try:
        yield
    finally:
        inject.VisualContext, inject.SpatialDynamic, inject.visual_context_loss = originals


def mean_loss(projected: Tensor, context: Tensor) -> Tensor:
    """Eq. (2), averaged over D. Arguments as of inject.visual_context_loss."""
    return (projected - context).square().mean(1)
