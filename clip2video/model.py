"""The settings, the network, its similarities and its loss. Shapes: see clip2video/__init__.py."""
import copy
import dataclasses
import math
import pathlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import clip
import shapes
from support.errors import Mistake
from support.options import check_options, option

# variant -> what relates the frames to each other, and whether there is a TAB
VARIANTS = {"mean": ("mean", False), "transformer": ("transformer", False), "tdb": ("tdb", False),
            "tab": ("transformer", True), "both": ("tdb", True)}
MAX_SCALE = math.log(100)       # of the log of the similarities' factor, as in CLIP


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings. Defaults: MSR-VTT 9k, with CLIP4Clip's published training; see PRESETS."""
    dataset: str = option("shapes", "shapes, shapes-1, ..., msrvtt, msvd or vatex")
    variant: str = option("both", "which blocks the network has", tuple(VARIANTS))
    seed: int = option(42, "seed of the weights and of the order of videos")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    root: str = option("data", "folder of all datasets")
    out: str = option("", "folder of the run (empty: runs/clip2video/<dataset>-<variant>)")
    clip: str = option("ViT-B/32", "CLIP that made the features (name or file)")
    frames: int = option(12, "L, frames per video", least=1)
    words: int = option(32, "W, tokens per sentence, with start and end", least=3)
    stride: int = option(2, "every N-th of 5 frames per second; 0: centres of equal parts", least=0)
    allow_missing: bool = option(False, "leave out videos without features")
    centres: int = option(5, "K, centres of the TAB", least=1)
    layers: int = option(4, "layers of the temporal transformer", least=1)
    weight: float = option(0.5, "w, weight of the global similarity (aligned: 1 - w)")
    batch: int = option(128, "videos in a batch", least=1)
    together: int = option(1, "put N neighbours in the list into the same batch", least=1)
    epochs: int = option(5, "passes over all captions", least=1)
    lr: float = option(1e-4, "learning rate of the new modules")
    # DEVIATION: 1e-7 moves nothing in float32; in the authors' float16 it acted as a far larger one
    text_lr: float = option(1e-6, "learning rate of the towers")
    weight_decay: float = option(0.2, "weight decay of AdamW, except for biases")
    train_images: bool = option(False, "also train the image tower, on jittered frames")

    def __post_init__(self):
        check_options(self)
        if not 0 <= self.weight <= 1:
            raise Mistake(f"--weight must be between 0 and 1, not {self.weight}")
        if max(self.frames, self.words) > 77:           # frames have positions of the text tower
            raise Mistake("--frames and --words must be at most 77, CLIP's number of positions")

    @property
    def folder(self) -> pathlib.Path:
        return pathlib.Path(self.out or f"runs/clip2video/{self.dataset}-{self.variant}")


PRESETS = {
    "msrvtt": {},
    "msvd": dict(stride=1),                                             # [code]
    "vatex": dict(stride=1, centres=7, epochs=23),      # [code]; epochs: of its checkpoint's name
    # python -m clip2video train     two CPU cores, about two minutes
    "shapes": dict(clip="shapes", seed=0, frames=16, stride=0, words=40, layers=2, batch=64,
                   together=4, epochs=30, lr=1e-3, text_lr=1e-3, weight_decay=0.02)}


def configure(**given) -> Config:
    """The given fields; else the dataset's preset (Mistake if it is unknown); else the defaults."""
    dataset = given.get("dataset", "shapes")
    family = "shapes" if dataset.startswith("shapes") else dataset
    if family not in PRESETS:
        raise Mistake(f"--dataset must be {', '.join(PRESETS)} or shapes-N, not {dataset!r}")
    if family == "shapes":                      # each shapes world has a small CLIP of its own
        given.setdefault("clip", dataset)
    return Config(**PRESETS[family] | given)


class Transformer(nn.Module):
    """A pre-norm transformer without a causal mask, initialised with the first layers of CLIP's
    text transformer. [B, N, D], mask [B, N] -> [B, N, D]"""

    def __init__(self, text: clip.TextTower, layers: int):
        super().__init__()
        source = text.transformer.resblocks
        self.blocks = nn.ModuleList(copy.deepcopy(source[i % len(source)]) for i in range(layers))
        for block in self.blocks:
            block.ln_1.eps = block.ln_2.eps = 1e-12                     # [code]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        # subtle: -inf would give NaN where all keys are hidden, in a video without a difference
        hidden = (~mask).to(x.dtype) * -1e6                             # [B, N]
        for block in self.blocks:
            x = block(x, hidden=hidden)
        return x


def interleave(frames: Tensor, differences: Tensor) -> Tensor:
    """f0, d0, f1, d1, ..., f(L-1): [B, L, ...] and [B, L-1, ...] -> [B, 2L-1, ...]."""
    pairs = torch.stack([frames[:, :-1], differences], 2).flatten(1, 2)         # [B, 2L-2, ...]
    return torch.cat([pairs, frames[:, -1:]], 1)


class TemporalDifference(nn.Module):
    """TDB's tokens: the frames, and between each two of them their difference, squashed to (-1, 1),
    each with an embedding of its position and of its type. Both vectors of a video share it."""

    def __init__(self, text: clip.TextTower):
        super().__init__()
        places = text.positional_embedding.detach()
        self.places = nn.Parameter(places.clone())                      # P [77, D]
        # [code]: the first two positions of the text tower serve as the types, too
        self.kinds = nn.Parameter(places[:2].clone())           # T: 1 = frame, 0 = difference
        self.attention = Transformer(text, 1)                           # A_d
        self.norm = nn.LayerNorm(places.shape[1])                       # LN_d

    def differences(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """d_i = 2 sigmoid(LN_d(A_d(f_{i+1} - f_i + P_{i+1}))) - 1, [B, L-1, D]; mask [B, L-1]."""
        L = frames.shape[1]
        # DEVIATION: the release masks a difference by one of its two frames, so padding leaks in
        both = mask[:, 1:] & mask[:, :-1]                               # [B, L-1]
        x = frames[:, 1:] - frames[:, :-1] + self.places[1:L]   # position of the later frame
        x = self.norm(self.attention(x, both))                          # [B, L-1, D]
        return 2 * torch.sigmoid(x) - 1, both

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L, D] -> tokens [B, 2L-1, D] and their mask [B, 2L-1]."""
        L = frames.shape[1]
        if L == 1:                                                      # there is no difference
            return frames + self.places[:1] + self.kinds[1], mask
        differences, both = self.differences(frames, mask)
        # [code]: a difference has the position of the earlier frame here, of the later one above
        places = interleave(self.places[None, :L], self.places[None, :L - 1])[0]    # [2L-1, D]
        kinds = self.kinds[(torch.arange(2 * L - 1, device=frames.device) + 1) % 2]     # 1, 0, ...
        return interleave(frames, differences) + places + kinds, interleave(mask, both)


class CLIP2Video(nn.Module):
    """The network. `temporal` and `align` (adds TAB): see VARIANTS; `scale`: initial log of the
    factor of the similarities; `visual`: the image tower, if it is trained. Mistake if the text
    tower is not as wide as the joint space, or if the image tower is not a ViT."""

    def __init__(self, text: clip.TextTower, temporal: str = "tdb", align: bool = True,
                 centres: int = 5, layers: int = 4, scale: float = MAX_SCALE,
                 visual: nn.Module | None = None):
        super().__init__()
        width, D = text.text_projection.shape
        if width != D:
            raise Mistake(f"use another CLIP: this one's text tower (width {width}) is not as wide "
                          f"as its joint space ({D})")
        self.text = text
        self.temporal = temporal
        self.align = align
        self.visual = visual
        # computed twice (`encode_image`), it would update its BatchNorm twice
        if isinstance(visual, clip.ModifiedResNet):
            raise Mistake("--train-images needs a CLIP whose image tower is a ViT, not a ResNet")
        self.logit_scale = nn.Parameter(torch.tensor(scale))
        if temporal == "tdb":
            self.difference = TemporalDifference(text)
        elif temporal == "transformer":
            self.places = nn.Parameter(text.positional_embedding.detach().clone())
        if temporal != "mean":
            self.transformer = Transformer(text, layers)                # A_t
        if align:
            self.coarse = Transformer(text, 1)                          # A_c
            # [code]: N(0, 1/64); both are shared by videos and sentences
            self.assign = nn.Parameter(torch.randn(centres, D) * 0.125)         # W_c [K, D]
            self.centres = nn.Parameter(torch.randn(centres, D) * 0.125)        # C [K, D]

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The trained tower in less memory: [B, 3, R, R] -> [B, D], patches [B, D, H, W]. Of 64
        images at a time only the result is kept; the rest is computed again in the backward pass.
        """
        parts = [checkpoint(self.visual, part, use_reentrant=False) for part in images.split(64)]
        x, patches = zip(*parts)
        return torch.cat(x), torch.cat(patches)

    def encode_pixels(self, pixels: Tensor, mask: Tensor) -> Tensor:
        """The frames that exist, uint8 [mask.sum(), 3, R, R] -> features [B, L, D], else 0."""
        x, _ = self.encode_image(clip.normalise(pixels))
        frames = x.new_zeros(mask.shape + x.shape[1:])
        frames[mask] = x
        return frames                                                   # [B, L, D]

    def encode_video(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """CLIP's features [B, L, D], not normalised, and their mask [B, L] -> unit vectors v_g, v_a
        [B, D] (v_a is None without TAB). Mistake for a video without a frame."""
        if not mask.any(1).all():
            raise Mistake("a video has no frame; leave it out")
        frames = frames * mask[..., None]                               # padding becomes 0
        x = frames if self.temporal == "mean" else self.in_time(self.transformer, frames, mask)
        x = F.normalize(x, dim=2) * mask[..., None]                     # [B, L, D]
        overall = F.normalize(x.sum(1) / mask.sum(1, keepdim=True), dim=1)      # [B, D]
        if not self.align:
            return overall, None
        # half the frame rate; [code] numbers these positions from 0 again
        half, half_mask = frames[:, 0::2], mask[:, 0::2]                # [B, L/2, D]
        coarse = self.in_time(self.coarse, half, half_mask)             # [B, L/2, D]
        # [code]: at the full rate CLIP's own features, without temporal attention
        tokens = torch.cat([frames, coarse], 1)                         # [B, L + L/2, D]
        return overall, self.aggregate(tokens, torch.cat([mask, half_mask], 1))

    def in_time(self, transformer: Transformer, frames: Tensor, mask: Tensor) -> Tensor:
        """Frames after attention among themselves and, with TDB, to differences: [B, L, D]."""
        if self.temporal == "transformer":
            return transformer(frames + self.places[:frames.shape[1]], mask) + frames
        tokens, token_mask = self.difference(frames, mask)              # [B, 2L-1, D]
        return transformer(tokens, token_mask)[:, 0::2] + frames        # differences: context only

    def encode_text(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Token ids [B, W], padded with 0 -> unit vectors t_g (of the end token), t_a [B, D]."""
        end = ids.argmax(1)                                     # the end token has the largest id
        h = self.text.ln_final(self.text.states(ids)) @ self.text.text_projection       # [B, W, D]
        overall = F.normalize(h[torch.arange(len(h), device=h.device), end], dim=1)
        if not self.align:
            return overall, None
        position = torch.arange(ids.shape[1], device=ids.device)
        words = (position > 0) & (position <= end[:, None])     # without the start token [code]
        return overall, self.aggregate(h, words)

    def aggregate(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """TAB, like NetVLAD: assigns tokens softly to centres, sums each centre's residuals, and
        takes the mean over centres. [B, N, D], mask [B, N] -> unit vectors [B, D]."""
        # subtle: the softmax is over centres, so a masked token is removed after it, not before
        share = torch.softmax(tokens @ self.assign.T, 2) * mask[..., None]      # [B, N, K]
        # sum_n share[n, k] (token[n] - centre[k]), without a tensor [B, N, K, D]
        residuals = torch.einsum("bnk,bnd->bkd", share, tokens)         # [B, K, D]
        residuals = residuals - share.sum(1)[..., None] * self.centres
        return F.normalize(F.normalize(residuals, dim=2).mean(1), dim=1)


def joined(encoded: tuple[Tensor, Tensor | None], weight: float = 0.5) -> Tensor:
    """What an encoder returns as one unit vector [B, 2D] ([B, D] without TAB). Dot products of such
    vectors are w S_g + (1-w) S_a, without the scale."""
    overall, aligned = encoded
    if aligned is None:
        return overall
    # square roots, because a dot product multiplies the factors of both sides
    return torch.cat([weight ** 0.5 * overall, (1 - weight) ** 0.5 * aligned], 1)


def logits(texts: tuple, videos: tuple, scale: Tensor) -> list[Tensor]:
    """S_g and, with TAB, S_a: exp(scale) t v^T, [T, V] each. Arguments as the encoders return."""
    return [scale.exp() * t @ v.T for t, v in zip(texts, videos) if t is not None]


def loss(similarities: list[Tensor], weight: float = 0.5) -> Tensor:
    """L = w L_sym(S_g) + (1-w) L_sym(S_a); L_sym(S_g) alone without TAB. Each [B, B], the logits of
    text i and video j. L_sym(S) = (CE(S) + CE(S^T)) / 2 is CLIP's."""
    losses = [shapes.contrastive_loss(similarity) for similarity in similarities]
    if len(losses) == 1:
        return losses[0]
    return weight * losses[0] + (1 - weight) * losses[1]
