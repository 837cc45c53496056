"""`vdi-staged`: our variant of the injection, which cannot collapse.

As printed, Eq. 2 can be minimised by constants, because FC and TransDecoder are trained, too, and
Eq. 5 is almost minimised before training. This variant keeps the idea (the dynamic query should say
what changes in the video) and departs from the paper as follows:

    as printed (`vdi`)                `vdi-staged`                       why
    one sum, one optimiser (Eq. 11)   stage 1: the text tower alone,     in one sum the large term
                                      own optimiser; then MMN with it    starves the others
    a trained TransDecoder attends    attention by cosine, without       no parameters that could
    to the whole video (Eq. 1)        parameters, within the moment      make it constant
    its output x~^qs                  late half minus early half,        a change, not a mixture of
                                      without gradient                   what can be seen
    FC(x^qd) against x~^qs (Eq. 2)    x^qd itself, against the target    no constant fits a target
                                      standardised over sentences        of variance 1
    L^sd (Eq. 3-5)                    left out                           it starts minimised
    masked words are dropped          replaced by "something"            the rest keeps its place

The labelled moments are those that MMN is trained with anyway. The controls have never seen a
video: `random`, a code for each query, and `motions`, which gives synonyms the same code.

Shapes: S sentences, T frames, D width of CLIP's joint space.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import clip
import data
import inject
import shapes
from support import parallel, progress
from support.errors import Mistake

TARGETS = ("change", "whole", "random", "motions")
LR = 1e-3                           # of stage 1; the rest of AdamW's settings are train.py's
BATCH = 64                          # sentences
QUERIES = {"full": 0, "none": None, "static": 1, "half": 1, "dynamic": 2}   # rows of Videos.tokens


def temporal_change(static: Tensor | None, frames: Tensor, moments_sec: Tensor,
                    durations_sec: Tensor, target: str = "change") -> Tensor:
    """What changes during the moment in the parts that the static query attends to.

        a_f = softmax_f(10 cos(x^qs, x_f)),   change = sum_late a_f x_f - sum_early a_f x_f

    each sum over one half of the moment's frames, with weights that add up to 1 in that half.

    static         [S, D] x^qs of the original text tower; None: all frames have the same weight
    frames         [S, T, D] frames of each sentence's video, T equal parts of its duration
    moments_sec    [S, 2]; durations_sec [S]
    target         "change"; or for comparison "whole", the attended mean of the whole video
    returns        [S, D], without gradient
    """
    # DEVIATION: attention without parameters, which cannot collapse, replaces TransDecoder
    # DEVIATION: only frames of the labelled moment, not the whole video; late minus early half
    T = frames.shape[1]
    centre = (torch.arange(T, device=frames.device) + 0.5) / T          # [T] share of the video
    centre = centre * durations_sec[:, None]                            # [S, T] seconds
    start = moments_sec[:, :1]                                          # [S, 1]
    end = moments_sec[:, 1:]                                            # [S, 1]
    middle = (start + end) / 2
    attention = torch.zeros_like(centre)                                # [S, T]
    if static is not None:
        attention = 10 * torch.einsum("sd,std->st", static, frames)

    def weighted(a: Tensor, b: Tensor) -> Tensor:
        inside = (centre >= a) & (centre < b)                           # True = frame counts
        # a half that lies between two frames gets the nearest one
        nearest = (centre - (a + b) / 2).abs().argmin(1, keepdim=True)
        inside = inside.scatter(1, nearest, True)
        weight = attention.masked_fill(~inside, float("-inf")).softmax(1)       # [S, T]
        return torch.einsum("st,std->sd", weight, frames)               # [S, D]

    if target == "whole":
        return weighted(torch.zeros_like(start), durations_sec[:, None]).detach()
    return (weighted(middle, end) - weighted(start, middle)).detach()


@torch.no_grad()
def stage_targets(text: clip.TextTower, videos: data.Videos, config,
                  device: torch.device) -> tuple[Tensor, Tensor]:
    """The target of each sentence's x^qd in stage 1, [S, D], and the indices of the sentences that
    have both a static and a dynamic query, [S'].

    `temporal_change` (or the control), standardised over those sentences: minus its mean, divided
    by its root mean square."""
    if config.stage_target in ("random", "motions"):
        alike = {}
        if config.stage_target == "motions":
            if not config.dataset.startswith("shapes"):
                raise Mistake("--stage-target motions knows the synonyms of the shapes world only; "
                              "use random")
            alike = shapes.SYNONYMS
        target = random_codes(videos, config.seed, alike).to(device)    # [S, D]
    else:
        target = video_targets(text, videos, config, device)            # [S, D]
    into = QUERIES[config.inject_into]
    usable = (videos.spoken[1] & videos.spoken[into]).nonzero()[:, 0]
    if len(usable) < 2:
        raise Mistake("fewer than two training sentences have both a noun chunk and other words, "
                      "so there is nothing to inject; use --method mmn")
    target = target - target[usable].mean(0)
    # DEVIATION: standardised, so that no constant fits it
    return target / target[usable].square().mean().sqrt().clamp(min=1e-6), usable


def video_targets(text: clip.TextTower, videos: data.Videos, config,
                  device: torch.device) -> Tensor:
    """`temporal_change` for every sentence, [S, D]."""
    row = QUERIES[config.context_query]
    static = None                               # no query: all frames have the same weight
    if row is not None:
        static = torch.cat([text.encode_text(part.to(device))           # x^qs of the original tower
                            for part in videos.tokens[row].split(1024)])
        static = F.normalize(static, dim=1)                             # [S, D]
    targets = []
    for batch in videos.batches(64, device=device):
        batch = batch.to(device)
        attending = None if static is None else static[batch.index]
        targets.append(temporal_change(attending, batch.frames[batch.video_of], batch.moments_sec,
                                       batch.durations_sec, config.stage_target))
    return torch.cat(targets)


def random_codes(videos: data.Videos, seed: int, alike: dict[str, str]) -> Tensor:
    """The controls, which use no video at all: a random code for each dynamic query, [S, D].
    alike: synonym -> the word whose code it shares."""
    generator = torch.Generator().manual_seed(seed)
    queries = []
    for query in videos.queries:
        queries.append(" ".join(alike.get(word, word) for word in query.dynamic.split()))
    number_of = {}                      # dynamic query -> its number, in order of appearance
    for query in queries:
        number_of.setdefault(query, len(number_of))
    width = videos.store.manifest["width"]                              # D
    codes = torch.randn(len(number_of), width, generator=generator)
    return codes[[number_of[query] for query in queries]]


@torch.no_grad()
def query_cosine(text: clip.TextTower, videos: data.Videos, device: torch.device) -> float:
    """Mean cosine between dynamic queries (the first 64 different ones); 1 means that verbs are
    indistinguishable."""
    different = list(dict.fromkeys(query.dynamic for query in videos.queries if query.dynamic))[:64]
    if len(different) < 2:
        return 1.0
    text.eval()                                 # DistilBERT has dropout
    x = text.encode_text(text.tokenize(different, truncate=True).to(device))
    pairs = ~torch.eye(len(x), dtype=torch.bool, device=device)
    return inject.pairwise_cosine(x)[pairs].mean().item()


def adapt_text_tower(text: clip.TextTower, videos: data.Videos, config,
                     device: torch.device) -> list[dict]:
    """Algorithm 1, line "Adapts the textual encoder f^q", as a stage of its own. Returns its log.

    Eq. (2) with another target: || f^q(Q^d) - target ||^2, see `stage_targets`."""
    made = videos.store.manifest
    one_space = isinstance(text, clip.TextTower) and made["width"] == text.output
    if not (made["resolution"] and one_space):
        raise Mistake("vdi-staged compares frames with sentences, which needs a CLIP for both; use "
                      "--method mmn, or vdi with --lambda-sd 0")
    target, usable = stage_targets(text, videos, config, device)
    into = QUERIES[config.inject_into]
    # DEVIATION: an optimiser of its own; in one sum the size of this term starves the others
    optimiser = torch.optim.AdamW(text.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=1e-5,
                                  fused=True)
    generator = torch.Generator().manual_seed(config.seed)
    log = []
    bar = tqdm(range(config.stage_steps), desc="stage 1: text tower",
               disable=parallel.rank() > 0 or None)
    for step in bar:
        warm_up = (step + 1) / 20
        decay = progress.cosine(step / config.stage_steps)
        optimiser.param_groups[0]["lr"] = LR * min(warm_up, decay)
        chosen = usable[torch.randint(len(usable), (BATCH,), generator=generator)]
        # DEVIATION: x^qd as it is, without FC: nothing stands between the target and the tower
        tokens = videos.tokens[into, parallel.share(chosen)].to(device)
        x = parallel.gather(text.encode_text(tokens))                   # x^qd [BATCH, D]
        loss = inject.visual_context_loss(x, target[chosen]).mean()
        if not torch.isfinite(loss):
            raise Mistake(f"the loss is {loss.item()} in step {step} of stage 1; check the "
                          f"features with: python data.py check")
        optimiser.zero_grad()
        loss.backward()
        parallel.sum_gradients(text)
        nn.utils.clip_grad_norm_(text.parameters(), 5.0)
        optimiser.step()
        if step % 50 == 0 or step == config.stage_steps - 1:
            log.append({"stage": 1, "step": step, "L_vc": loss.item(),
                        "var x^qd": inject.batch_variance(x.detach()).item(),
                        "var target": inject.batch_variance(target[chosen]).item(),
                        "cos x^qd": query_cosine(text, videos, device)})
            bar.set_postfix(L_vc=f"{loss.item():.2f}")
    first = log[0]
    last = log[-1]
    print(f"stage 1, {config.stage_steps} steps: |x^qd - target|^2 {first['L_vc']:.4g} -> "
          f"{last['L_vc']:.4g}, cos x^qd {first['cos x^qd']:.4g} -> {last['cos x^qd']:.4g}")
    return log
