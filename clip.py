"""CLIP: the image-text model that everything here starts from (paper: f^v and f^q, Sec. 3).

In the order of the data: text -> tokens (BPE), frames -> pixels, the two image towers (ViT,
ModifiedResNet), the causal text tower, and the loading of weights. The module tree uses OpenAI's
parameter names, so that a published state dict loads without renaming.

Left out: training of the large models, and half precision (everything here is float32; callers may
use autocast). The activation is not guessed from a file's name: it is an argument of `load`.

    import clip
    model = clip.load("ViT-B/32")                                       # downloads 338 MB once
    x, patches = model.encode_image(clip.preprocess(frames, 224))       # frames: uint8 [T, 3, h, w]
    q = model.encode_text(clip.tokenize("a person opens the door"))

`python -m extras.walk clip IMAGE "the red circle rises" "the red circle falls"` prints the cosines
of an image with texts, and of the texts with each other: that of two verbs is near 1, which is what
the paper sets out to change.

Shapes: B images or sentences, L words (77 at most), C width of a tower, D width of the joint space,
D' channels of the patch features, H x W patch grid, R input resolution.
"""
import functools
import gzip
import html
import os
import pathlib
import pkgutil
import zipfile

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import files, hugging_face
from support.errors import Mistake, naming

# ----------------------------------------------------------------------------------- text -> tokens

MERGES = files.ASSETS / "bpe_simple_vocab_16e6.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"
WORD = regex.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|"
                     r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)


@functools.cache
def byte_alphabet() -> dict[int, str]:
    """Each of the 256 bytes as one printable character, in the order of CLIP's vocabulary.

    Printable Latin-1 bytes represent themselves; the other 68 get the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable},
            **{byte: chr(256 + i) for i, byte in enumerate(others)}}


@functools.cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """(token -> id, pair -> rank): 256 bytes, again at a word's end, 48,894 merges, 2 special."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]
    letters = list(byte_alphabet().values())
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges), START, END]
    return ({token: i for i, token in enumerate(tokens)},
            {pair: rank for rank, pair in enumerate(merges)})


@functools.lru_cache(maxsize=2 ** 18)
def word_ids(word: str) -> tuple[int, ...]:
    """Byte-pair encoding of one word: merge the adjacent pair of lowest rank until none is left."""
    ids, ranks = vocabulary()
    if word in (START, END):
        return (ids[word],)
    letters = [byte_alphabet()[byte] for byte in word.encode("utf-8")]
    parts = letters[:-1] + [letters[-1] + "</w>"]
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        merged, i = [], 0
        while i < len(parts):
            if tuple(parts[i:i + 2]) == best:
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return tuple(ids[part] for part in parts)


def encode(text: str) -> list[int]:
    """Token ids of any string, without start and end. `encode("a person")` is [320, 2533]."""
    return list(sentence_ids(text))


@functools.lru_cache(maxsize=2 ** 17)
def sentence_ids(text: str) -> tuple[int, ...]:
    """`encode`, cached: every epoch and every table tokenizes the same sentences again."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    return tuple(i for word in WORD.findall(text) for i in word_ids(word))


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Sentences -> LongTensor [len(texts), context_length]: start token, words, end token, zeros.

    Mistake for more than `context_length` tokens; with truncate=True the end token is kept."""
    texts = [texts] if isinstance(texts, str) else texts
    start, end = vocabulary()[0][START], vocabulary()[0][END]
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [start, *sentence_ids(text), end]
        if len(ids) > context_length:
            if not truncate:
                raise Mistake(f"this sentence has {len(ids)} tokens and CLIP reads "
                              f"{context_length}; shorten it or pass truncate=True: "
                              f"{text[:60]!r}")
            ids = ids[:context_length - 1] + [end]
        result[row, :len(ids)] = torch.tensor(ids)
    return result


# --------------------------------------------------------------------------------- frames -> pixels

PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)        # of CLIP's training images, RGB in [0, 1]
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)


def crop(frames: Tensor, resolution: int) -> Tensor:
    """uint8 [T, 3, h, w] RGB -> uint8 [T, 3, R, R]: short side to R (bicubic), then the centre."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
        raise Mistake(f"frames must be uint8 [T, 3, h, w], not {frames.dtype} "
                      f"{list(frames.shape)}")
    h, w = frames.shape[2:]
    size = [max(resolution, int(resolution * side / min(h, w))) for side in (h, w)]
    if size != [h, w]:
        # subtle: on uint8 this computes as Pillow does, rounding after each of the two directions
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
    top, left = (round((side - resolution) / 2) for side in size)
    return frames[:, :, top:top + resolution, left:left + resolution]


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [T, 3, R, R] -> float of the same shape, as CLIP was trained: mean 0, deviation 1."""
    mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1)
                 for v in (PIXEL_MEAN, PIXEL_STD))
    return (pixels / 255 - mean) / std


def preprocess(frames: Tensor, resolution: int) -> Tensor:
    """uint8 [T, 3, h, w] RGB -> float [T, 3, R, R]: `crop`, then `normalise`."""
    return normalise(crop(frames, resolution))


# ------------------------------------------------------------------------------------------- towers

class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x). OpenAI's CLIP was trained with it; GELU gives different features."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.MultiheadAttention):
    """nn.MultiheadAttention's parameters and names, computed by scaled_dot_product_attention."""

    def forward(self, x: Tensor, causal: bool = False, hidden: Tensor | None = None) -> Tensor:
        B, L, C = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)       # [B, L, 3C]
        q, k, v = qkv.view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # [B, heads, L, *]
        # `hidden` [B, L] (clip2video's): added to the keys' logits, 0 or very negative to hide
        bias = None if hidden is None else hidden[:, None, None]
        x = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, C))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP of four times the width."""

    def __init__(self, width: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", activation())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False, hidden: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal, hidden)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks. Heads are 64 wide; another number of heads is in the state dict."""

    def __init__(self, width: int, layers: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        if heads != width // 64:
            self.register_buffer("heads", torch.tensor(heads))
        self.resblocks = nn.ModuleList(Block(width, heads, activation) for _ in range(layers))

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        for block in self.resblocks:
            x = block(x, causal)
        return x


class VisionTransformer(nn.Module):
    """ViT image tower. `stem` (widths of stride-2 convolutions before the patch embedding) is for
    the shapes world: at 32 x 32 pixels a plain patch embedding learns neither shape nor place."""

    def __init__(self, resolution: int, patch: int, width: int, layers: int, heads: int,
                 output: int, activation: type[nn.Module], stem: tuple[int, ...] = ()):
        super().__init__()
        self.resolution = resolution
        self.grid = resolution // 2 ** len(stem) // patch               # H = W
        self.stem = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                  for a, b in zip((3, *stem), stem))
        self.conv1 = nn.Conv2d(stem[-1] if stem else 3, width, patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, R, R] -> global feature [B, D] (class token), patch features [B, D, H, W]."""
        x = images
        for convolution in self.stem:
            x = F.relu(convolution(x))
        x = self.conv1(x).flatten(2).transpose(1, 2)                    # [B, HW, C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)       # [B, 1 + HW, C]
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        x = self.ln_post(x) @ self.proj                                 # [B, 1 + HW, D]
        return x[:, 0], x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))


class Bottleneck(nn.Module):
    """ResNet block. Strides are average pools: before conv3, and in the shortcut."""

    def __init__(self, channels: int, planes: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(channels, planes, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.conv3 = nn.Conv2d(planes, 4 * planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or channels != 4 * planes:
            self.downsample = nn.Sequential(nn.Conv2d(channels, 4 * planes, 1, bias=False),
                                            nn.BatchNorm2d(4 * planes))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(F.avg_pool2d(x, self.stride))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(F.avg_pool2d(x, self.stride)))
        return F.relu(x + shortcut)


class AttentionPool(nn.Module):
    """One attention step over the map, whose only query is the map's mean."""

    def __init__(self, grid: int, width: int, heads: int, output: int):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.empty(grid ** 2 + 1, width))
        self.k_proj = nn.Linear(width, width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.c_proj = nn.Linear(width, output)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)                                # [B, HW, C]
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding  # [B, 1 + HW, C]
        q, k, v = (f(y).unflatten(2, (self.heads, -1)).transpose(1, 2)  # [B, heads, *, C/heads]
                   for f, y in ((self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x)))
        x = F.scaled_dot_product_attention(q, k, v)                     # [B, heads, 1, C/heads]
        return self.c_proj(x.flatten(1))                                # [B, D]


class ModifiedResNet(nn.Module):
    """ResNet image tower: three convolutions, average pools for strides, attention pooling."""

    def __init__(self, resolution: int, layers: tuple[int, ...], width: int, heads: int,
                 output: int):
        super().__init__()
        self.resolution, self.grid = resolution, resolution // 32
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for i, blocks in enumerate(layers):
            planes = width * 2 ** i
            first = Bottleneck(channels, planes, 1 if i == 0 else 2)
            channels = 4 * planes
            rest = [Bottleneck(channels, planes, 1) for _ in range(blocks - 1)]
            self.add_module(f"layer{i + 1}", nn.Sequential(first, *rest))
        self.attnpool = AttentionPool(self.grid, channels, heads, output)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, R, R] -> global feature [B, D] (attention pool), last map [B, D', H, W]."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.attnpool(x), x


class TextTower(nn.Module):
    """f^q: tokens -> sentence feature, read at the end token of a causal transformer."""

    def __init__(self, vocabulary_size: int, context_length: int, width: int, layers: int,
                 heads: int, output: int, activation: type[nn.Module]):
        super().__init__()
        self.token_embedding = nn.Embedding(vocabulary_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(context_length, width))
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, output))
        self.output = output

    tokenize = staticmethod(tokenize)                   # sentences -> what `encode_text` reads

    def states(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L <= 77] -> the state of every position, [B, L, C], of which
        `ln_final(state) @ text_projection` is the feature."""
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]
        return self.transformer(x, causal=True)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L <= 77] -> [B, D], not normalised. An empty batch gives [0, D]."""
        if not len(tokens):
            return self.text_projection.new_zeros(0, self.output)
        end = tokens.argmax(1)  # the end token has the largest id; the first one counts
        L = int(end.max()) + 1  # exact: nothing after the end token can be seen by it
        x = self.states(tokens[:, :L])[torch.arange(len(tokens), device=tokens.device), end]
        return self.ln_final(x) @ self.text_projection                  # [B, D]


class CLIP(TextTower):
    """Both towers; `visual` is a VisionTransformer or a ModifiedResNet."""

    def __init__(self, visual: nn.Module, *text_sizes):
        super().__init__(*text_sizes)
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, R, R] -> (x [B, D], patches [B, D', H, W]), not normalised, in one pass."""
        R = self.visual.resolution
        if tuple(images.shape[1:]) != (3, R, R):
            raise Mistake(f"this CLIP reads images [B, 3, {R}, {R}], not {list(images.shape)}; "
                          f"use clip.preprocess(frames, {R})")
        return self.visual(images)


def contrastive_loss(logits: Tensor) -> Tensor:
    """CLIP's loss: each row picks its column, each column its row, of [B, B] scaled cosines whose
    diagonal holds the pairs. (CE(S) + CE(S^T)) / 2, nats."""
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ------------------------------------------------------------------------------------------ weights

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in some files


def build_text(state: dict[str, Tensor], activation: type[nn.Module] = QuickGELU) -> TextTower:
    """The text tower alone, from a state dict with or without an image tower; see `build`."""
    state = {key: value for key, value in state.items()
             if not key.startswith("visual.") and key not in ("logit_scale", *NOT_WEIGHTS)}
    return fill(TextTower(*_text_sizes(state, activation)), state)


# text towers of other networks, by the start of their name, or a folder with config.json
TOWERS = {"distilbert": "extras.distilbert.DistilBert"}


def load_text(name: str, state: dict[str, Tensor] | None = None) -> nn.Module:
    """f^q of a CLIP (as of `load`) or of TOWERS, with the weights of that name or with `state`."""
    path = pathlib.Path(name)
    for start, place in TOWERS.items():
        if path.name.startswith(start) or (path / "config.json").is_file():
            return pkgutil.resolve_name(place).load(name, state)
    with naming(name):
        return build_text(read_state(name) if state is None else state)


def build(state: dict[str, Tensor], activation: type[nn.Module] = QuickGELU) -> CLIP:
    """A CLIP in float32 and evaluation mode, its sizes read off a state dict with OpenAI's keys.

    Mistake, naming the key, if the weights are not a CLIP's. The activation cannot be read off the
    weights: pass nn.GELU for models trained with it (LAION's)."""
    known = {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    sizes = _text_sizes(known, activation)
    output = _get(known, "text_projection").shape[1]
    if "visual.layer1.0.conv1.weight" in known:
        grid = round((len(_get(known, "visual.attnpool.positional_embedding")) - 1) ** 0.5)
        layers = tuple(_count(known, f"visual.layer{i}.") for i in (1, 2, 3, 4))
        width = len(known["visual.layer1.0.conv1.weight"])
        visual = functools.partial(ModifiedResNet, 32 * grid, layers, width,
                                   max(1, width * 32 // 64), output)
    else:
        width, channels, patch = _get(known, "visual.conv1.weight").shape[:3]
        grid = round((len(_get(known, "visual.positional_embedding")) - 1) ** 0.5)
        stem = tuple(len(known[f"visual.stem.{i}.weight"])
                     for i in range(_count(known, "visual.stem.")))
        heads = _heads(known, "visual.transformer.heads", width)
        visual = functools.partial(VisionTransformer, grid * patch * 2 ** len(stem), patch, width,
                                   _count(known, "visual.transformer.resblocks."), heads, output,
                                   activation, stem)
    return fill(CLIP(visual(), *sizes), known)


def _text_sizes(state: dict[str, Tensor], activation: type[nn.Module]) -> tuple:
    vocabulary_size, width = _get(state, "token_embedding.weight").shape
    heads = _heads(state, "transformer.heads", width)
    return (vocabulary_size, len(_get(state, "positional_embedding")), width,
            _count(state, "transformer.resblocks."), heads, _get(state, "text_projection").shape[1],
            activation)


def _heads(state: dict[str, Tensor], key: str, width: int) -> int:
    heads = int(state.get(key, width // 64))
    if heads < 1 or width % heads:
        raise Mistake(f"these are not the weights of a CLIP: {heads} heads of width {width}")
    return heads


def _get(state: dict[str, Tensor], key: str, what: str = "a CLIP") -> Tensor:
    if key not in state:
        raise Mistake(f"these are not the weights of {what}: the key {key!r} is missing")
    return state[key]


def _count(state: dict[str, Tensor], prefix: str) -> int:
    """Number of modules in the list `prefix`."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def fill(model, state: dict[str, Tensor], what: str = "a CLIP") -> nn.Module:
    """The model with these weights as float32, in evaluation mode. Mistake
    for a missing, unknown or misshapen key."""
    expected = model.state_dict()
    for key, value in expected.items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.tensor(0))
        elif _get(state, key, what).shape != value.shape:
            raise Mistake(f"these are not the weights of {what}: {key!r} has shape "
                          f"{list(state[key].shape)}, expected {list(value.shape)}")
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise Mistake(f"these are not the weights of {what}: the key {unknown[0]!r} is unknown")
    model.load_state_dict({key: value.float() if value.is_floating_point() else value
                           for key, value in state.items()})
    return model.eval()


ADDRESS = "https://openaipublic.azureedge.net/clip/models"
# lines "name, SHA-256 of the file (which is also in its address), file name, D, resolution"
PUBLISHED = {name: (digest, file, int(D), int(R)) for name, digest, file, D, R in map(
    str.split, (files.ASSETS / "clip.txt").read_text().splitlines())}


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, or of the weights of a published name."""
    return PUBLISHED[path][0] if path in PUBLISHED else files.sha256(path)


def download(name: str, folder: str | os.PathLike | None = None) -> pathlib.Path:
    """The verified file of a published model; downloaded to `folder` (~/.cache/clip) if need be."""
    digest, file_name, *_ = PUBLISHED[name]
    folder = pathlib.Path(folder or "~/.cache/clip").expanduser()
    return files.fetch(f"{ADDRESS}/{digest}/{file_name}", digest, folder / file_name)


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a weight file or a published model, under OpenAI's names. Nothing in the
    file is executed: files.read_tensors reads what torch.save wrote, and a TorchScript archive is
    opened only if its SHA-256 is one of OpenAI's."""
    path = download(path) if path in PUBLISHED else pathlib.Path(path)
    if not path.is_file():
        raise Mistake(f"{path} is neither a weight file nor the name of a published "
                      f"CLIP: {', '.join(PUBLISHED)}")
    if zipfile.is_zipfile(path) and any("/code/" in n for n in zipfile.ZipFile(path).namelist()):
        if sha256(path) not in {digest for digest, *_ in PUBLISHED.values()}:
            raise Mistake(f"{path} is a TorchScript archive, which contains code, and its SHA-256 "
                          f"is not that of a published CLIP; save its state dict with torch.save "
                          f"and load that")
        return torch.jit.load(path, map_location="cpu").state_dict()
    state = files.read_tensors(path)
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise Mistake(f"{path} does not contain a state dict (a dictionary of tensors)")
    state = {key.removeprefix("module."): value for key, value in state.items()}
    foreign = any(key.startswith("text_model.") for key in state)
    return hugging_face.renamed(state) if foreign else state


def load(name_or_path: str | os.PathLike, device: str | torch.device = "cpu",
         activation: type[nn.Module] = QuickGELU) -> CLIP:
    """A CLIP in float32 and evaluation mode, by a published name (downloaded once) or from a file:
    OpenAI's archive, a plain or open_clip state dict, Hugging Face's pytorch_model.bin."""
    with naming(name_or_path):
        return build(read_state(name_or_path), activation).to(device)
