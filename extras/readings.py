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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import inject
import staged
import train


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


@contextlib.contextmanager
def tracked():
    """Within the block, the log of `vdi-staged` says after each epoch what is left of stage 1: the
    squared cosine between the features of all dynamic queries, each minus their mean, at that point
    and right after stage 1."""
    adapt, validate, injected = staged.adapt_text_tower, train.validate, []

    def adapt_and_remember(text, videos, config, device, run):
        log = adapt(text, videos, config, device, run)
        injected[:] = [verbs_apart(text, videos, device)]
        return log

    def validate_and_compare(model, videos, config, device):
        row = validate(model, videos, config, device)
        if row and injected:
            now = verbs_apart(model.text, videos["train"], device)
            row["kept of stage 1"] = F.cosine_similarity(now, injected[0], dim=0).square().item()
        return row

    staged.adapt_text_tower, train.validate = adapt_and_remember, validate_and_compare
    try:
        yield
    finally:
        staged.adapt_text_tower, train.validate = adapt, validate


@torch.no_grad()
def verbs_apart(text: nn.Module, videos: data.Videos, device: torch.device) -> Tensor:
    """Features of the different dynamic queries (64 at most), minus their mean, in a row, [K D]."""
    queries = list(dict.fromkeys(query.dynamic for query in videos.queries if query.dynamic))[:64]
    x = text.encode_text(text.tokenize(queries, truncate=True).to(device))
    return (x - x.mean(0)).flatten()


def mean_loss(projected: Tensor, context: Tensor) -> Tensor:
    """Eq. (2), averaged over D. Arguments as of inject.visual_context_loss."""
    return (projected - context).square().mean(1)
