"""CLIP: the image-text model that everything here starts from (paper: f^v and f^q, Sec. 3).

Listed in the order in which data flows through it: text -> tokens (BPE), frames -> pixels, the two
image towers (ViT, ModifiedResNet), the causal text tower, and the loading of weights. The modules
have OpenAI's parameter names, so that a published state dict loads without renaming.

Left out: training of the large models, and half precision (everything here is float32; callers may
use autocast). The activation comes from a config.json beside the weights or an argument of `load`.

    import clip
    model = clip.load("ViT-B/32")                                       # downloads 338 MB once
    x, patches = model.encode_image(clip.preprocess(frames, 224))       # frames: uint8 [T, 3, h, w]
    q = model.encode_text(clip.tokenize("a person opens the door"))

Shapes: B images or sentences, L words (77 at most), C width of a tower, D width of the joint space,
D' channels of the patch features, H x W patch grid, R input resolution.
"""
import difflib
import functools
import gzip
import html
import os
import pathlib
import sys
import zipfile

import ftfy
import regex
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support import distilbert, files, weights
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
    # subtle: printable ones come first, and a token's id is its place in the vocabulary
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable}
    alphabet.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return alphabet


@functools.cache
def vocabulary() -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """token -> id, and pair of tokens -> its rank: pairs are merged in the order of the file."""
    lines = gzip.decompress(MERGES.read_bytes()).decode("utf-8").split("\n")
    # the file continues; CLIP uses only its first 48,894 merges, as OpenAI's code counts them
    merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]
    tokens = list(byte_alphabet().values())                             # 256 bytes,
    tokens += [letter + "</w>" for letter in tokens]                    # again at a word's end,
    tokens += ["".join(pair) for pair in merges]                        # 48,894 merges,
    tokens += [START, END]                                              # in all 49,408
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    return ids, ranks


@functools.lru_cache(maxsize=2 ** 18)
def word_ids(word: str) -> tuple[int, ...]:
    """Byte-pair encoding of one word: merge the adjacent pair of lowest rank until none is left."""
    ids, ranks = vocabulary()
    if word in (START, END):
        return (ids[word],)
    letters = [byte_alphabet()[byte] for byte in word.encode("utf-8")]
    parts = letters[:-1] + [letters[-1] + "</w>"]       # "door" -> d, o, o, r</w>
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:                           # no adjacent pair is left to merge
            break
        merged = []
        i = 0
        while i < len(parts):
            if tuple(parts[i:i + 2]) == best:           # every occurrence is merged, left to right
                merged.append(parts[i] + parts[i + 1])
                i += 2
            else:
                merged.append(parts[i])
                i += 1
        parts = merged
    return tuple(ids[part] for part in parts)


def encode(text: str) -> list[int]:
    """Token ids of any string, without start and end. `encode("a person")` is [320, 2533]."""
    # twice, as in OpenAI's code: captions from the web contain "&amp;amp;"
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    text = regex.sub(r"\s+", " ", text).strip().lower()
    ids = []
    for word in WORD.findall(text):
        ids += word_ids(word)           # cached: sentences share most of their words
    return ids


def tokenize(texts: str | list[str], context_length: int = 77, truncate: bool = False) -> Tensor:
    """Sentences -> LongTensor [len(texts), context_length]: start token, words, end token, zeros.

    Mistake for more than `context_length` tokens; with truncate=True the end token is kept."""
    texts = [texts] if isinstance(texts, str) else texts
    tokens, _ = vocabulary()
    result = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in enumerate(texts):
        ids = [tokens[START]] + encode(text) + [tokens[END]]
        if len(ids) > context_length:
            if not truncate:
                raise Mistake(f"this sentence has {len(ids)} tokens and CLIP reads "
                              f"{context_length}; shorten it or pass truncate=True: {text[:60]!r}")
            # the end token stays: the sentence's feature is read at its place
            ids = ids[:context_length - 1] + [tokens[END]]
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
        # subtle: on uint8 this matches Pillow, which rounds after each of the two passes
        frames = F.interpolate(frames, size, mode="bicubic", antialias=True)
    top = round((size[0] - resolution) / 2)
    left = round((size[1] - resolution) / 2)
    return frames[:, :, top:top + resolution, left:left + resolution]   # [T, 3, R, R]


def normalise(pixels: Tensor) -> Tensor:
    """uint8 [T, 3, R, R] -> float of the same shape, as CLIP was trained: mean 0, deviation 1."""
    mean = torch.tensor(PIXEL_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=pixels.device).view(3, 1, 1)
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
        bias = None if hidden is None else hidden[:, None, None]        # [B, 1, 1, L]
        x = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal)     # [B, heads, L, *]
        return self.out_proj(x.transpose(1, 2).reshape(B, L, C))        # [B, L, C]


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
    """A stack of blocks. Its state dict also records what shapes cannot show: the number of heads,
    if they are not 64 wide, and GELU."""

    def __init__(self, width: int, layers: int, heads: int, activation: type[nn.Module]):
        super().__init__()
        if heads != width // 64:
            self.register_buffer("heads", torch.tensor(heads))
        if activation is nn.GELU:
            self.register_buffer("gelu", torch.tensor(True))
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
        self.stem = nn.ModuleList()
        channels = 3
        for planes in stem:
            self.stem.append(nn.Conv2d(channels, planes, 3, stride=2, padding=1))
            channels = planes
        self.conv1 = nn.Conv2d(channels, width, patch, stride=patch, bias=False)
        # uninitialised: the weights are loaded, or drawn by shapes.small_clip
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(self.grid ** 2 + 1, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.empty(width, output))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, R, R] -> global feature [B, D] (class token), patch features [B, D, H, W]."""
        x = images
        for convolution in self.stem:                                   # none in OpenAI's models
            x = F.relu(convolution(x))
        x = self.conv1(x).flatten(2).transpose(1, 2)                    # [B, HW, C]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)       # [B, 1 + HW, C]
        x = self.transformer(self.ln_pre(x + self.positional_embedding))
        # UNSPECIFIED: which patch features; the last layer's, treated as the class token is
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
        x = F.relu(self.bn1(self.conv1(x)))                             # [B, planes, H, W]
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(F.avg_pool2d(x, self.stride)))          # [B, 4 planes, H/s, W/s]
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
        x = torch.cat([x.mean(1, keepdim=True), x], 1)                  # [B, L = 1 + HW, C]
        x = x + self.positional_embedding
        q = self.q_proj(x[:, :1]).unflatten(2, (self.heads, -1)).transpose(1, 2)    # of the mean
        k = self.k_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)       # [B, heads, L, *]
        v = self.v_proj(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        x = F.scaled_dot_product_attention(q, k, v)                     # [B, heads, 1, C/heads]
        return self.c_proj(x.flatten(1))                                # [B, D]


class ModifiedResNet(nn.Module):
    """ResNet image tower: three convolutions, average pools for strides, attention pooling."""

    def __init__(self, resolution: int, layers: tuple[int, ...], width: int, heads: int,
                 output: int):
        super().__init__()
        self.resolution = resolution
        self.grid = resolution // 32                                    # H = W
        self.conv1 = nn.Conv2d(3, width // 2, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width // 2)
        self.conv2 = nn.Conv2d(width // 2, width // 2, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width // 2)
        self.conv3 = nn.Conv2d(width // 2, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)
        channels = width
        for i, blocks in enumerate(layers):
            planes = width * 2 ** i
            stage = nn.Sequential()
            for j in range(blocks):
                halved = i > 0 and j == 0       # every stage but the first halves the map
                stage.append(Bottleneck(channels, planes, stride=2 if halved else 1))
                channels = 4 * planes
            self.add_module(f"layer{i + 1}", stage)
        self.attnpool = AttentionPool(self.grid, channels, heads, output)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, R, R] -> global feature [B, D] (attention pool), last map [B, D', H, W]."""
        x = F.relu(self.bn1(self.conv1(images)))                        # [B, C/2, R/2, R/2]
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)            # [B, C, R/4, R/4]
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))       # [B, 32C, R/32, R/32]
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

    def tokenize(self, texts: str | list[str], truncate: bool = False) -> Tensor:
        """Sentences -> what `encode_text` reads: as many tokens as the tower has positions, but 77
        at most. Mistake for weights that were trained with another tokenizer."""
        ours = len(vocabulary()[0])
        theirs = len(self.token_embedding.weight)
        if not ours <= theirs <= ours + 100:            # a few added tokens are allowed
            raise Mistake(f"this CLIP knows {theirs:,} tokens, not {ours:,}: it was trained with "
                          f"another tokenizer, which is not available here")
        return tokenize(texts, min(77, len(self.positional_embedding)), truncate)

    def states(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L <= 77] -> the state of every position, [B, L, C]; the feature is
        `ln_final(state) @ text_projection`."""
        L = tokens.shape[1]
        x = self.token_embedding(tokens) + self.positional_embedding[:L]        # [B, L, C]
        return self.transformer(x, causal=True)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [B, L <= 77] -> [B, D], not normalised. An empty batch gives [0, D]."""
        if not len(tokens):             # argmax and max below do not accept an empty tensor
            return self.text_projection.new_zeros(0, self.output)
        end = tokens.argmax(1)  # the end token has the largest id; argmax takes the first
        L = int(end.max()) + 1  # exact: the mask hides what follows the end token
        rows = torch.arange(len(tokens), device=tokens.device)
        x = self.states(tokens[:, :L])[rows, end]                       # [B, C]
        return self.ln_final(x) @ self.text_projection                  # [B, D]


class CLIP(TextTower):
    """Both towers; `visual` is a VisionTransformer or a ModifiedResNet."""

    def __init__(self, visual: nn.Module, vocabulary_size: int, context_length: int, width: int,
                 layers: int, heads: int, output: int, activation: type[nn.Module]):
        super().__init__(vocabulary_size, context_length, width, layers, heads, output, activation)
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())   # log of 1 / temperature

    def encode_image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, 3, R, R] -> (x [B, D], patches [B, D', H, W]), not normalised, in one pass."""
        R = self.visual.resolution
        if tuple(images.shape[1:]) != (3, R, R):
            raise Mistake(f"this CLIP reads images [B, 3, {R}, {R}], not {list(images.shape)}; "
                          f"use clip.preprocess(frames, {R})")
        return self.visual(images)


# ------------------------------------------------------------------------------------------ weights

# name -> SHA-256 of the file (which is also in its address), width D, resolution R
PUBLISHED = {
    "RN50": ("afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762", 1024, 224),
    "RN101": ("8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599", 512, 224),
    "RN50x4": ("7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd", 640, 288),
    "RN50x16": ("52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa", 768, 384),
    "RN50x64": ("be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c", 1024, 448),
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", 512, 224),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", 512, 224),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", 768, 224),
    "ViT-L/14@336px":
        ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", 768, 336),
}
ADDRESS = "https://openaipublic.azureedge.net/clip/models"
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")  # in some files


def sha256(path: str | os.PathLike) -> str:
    """Hexadecimal SHA-256 of a file, or of the weights of a published name."""
    return PUBLISHED[path][0] if path in PUBLISHED else files.sha256(weights.file_in(path))


def download(name: str, folder: str | os.PathLike = "~/.cache/clip") -> pathlib.Path:
    """The verified file of a published model; downloaded to `folder` unless it is there."""
    digest = PUBLISHED[name][0]
    file = name.replace("/", "-").replace("@", "-") + ".pt"
    path = pathlib.Path(folder).expanduser() / file
    if not path.exists():
        print(f"note: downloading CLIP {name} to {path}, once", file=sys.stderr)
    return files.fetch(f"{ADDRESS}/{digest}/{file}", digest, path)


def read_state(path: str | os.PathLike) -> dict[str, Tensor]:
    """The state dict of a weight file or a published model, under OpenAI's names. Nothing in the
    file is executed: files.read_tensors reads what torch.save wrote, and a TorchScript archive is
    opened only if its SHA-256 is one of OpenAI's."""
    path = download(path) if path in PUBLISHED else weights.file_in(path)
    if not path.is_file():
        near = difflib.get_close_matches(str(path), PUBLISHED, 1)
        meant = weights.HUB.get(str(path), "".join(near))
        question = f" (did you mean {meant}?)" if meant else ""
        raise Mistake(f"{path} is neither a weight file nor the name of a published CLIP"
                      f"{question}: {', '.join(PUBLISHED)}")
    if zipfile.is_zipfile(path) and any("/code/" in n for n in zipfile.ZipFile(path).namelist()):
        if sha256(path) not in [model[0] for model in PUBLISHED.values()]:
            raise Mistake(f"{path} is a TorchScript archive, which contains code, and its SHA-256 "
                          f"is not that of a published CLIP; save its state dict with torch.save "
                          f"and load that")
        return torch.jit.load(path, map_location="cpu").state_dict()
    return weights.read(path)


def load(name_or_path: str | os.PathLike, device: str | torch.device = "cpu",
         activation: type[nn.Module] | None = None) -> CLIP:
    """A CLIP in float32 and evaluation mode, by a published name (downloaded once), or from a file
    or folder: OpenAI's archive, a plain or open_clip state dict, Hugging Face's files (see
    support/weights.py)."""
    state = read_state(name_or_path)            # its own errors name the file
    with naming(name_or_path):
        return build(state, activation).to(device)


def load_text(name: str, state: dict[str, Tensor] | None = None,
              activation: type[nn.Module] | None = None) -> nn.Module:
    """f^q of a CLIP (as in `load`) or a DistilBERT, with its own weights or with `state`."""
    if distilbert.is_distilbert(name):
        return distilbert.load(name, state)
    if state is not None:
        return build_text(state, activation)
    state = read_state(name)
    with naming(name):
        return build_text(state, activation)


def build(state: dict[str, Tensor], activation: type[nn.Module] | None = None) -> CLIP:
    """A CLIP in float32 and evaluation mode, its sizes read off a state dict with OpenAI's keys.

    Mistake, naming the key, if the weights are not a CLIP's. The activation cannot be read off the
    weights: pass nn.GELU for models trained with it (LAION's), unless the state dict says so."""
    state, activation = prepared(state, activation)
    return fill(lambda: empty_model(state, activation), state)


def build_text(state: dict[str, Tensor],
               activation: type[nn.Module] | None = None) -> TextTower:
    """The text tower alone, from a state dict with or without an image tower; see `build`."""
    state = {key: value for key, value in state.items()
             if not key.startswith("visual.") and key != "logit_scale"}
    state, activation = prepared(state, activation)
    return fill(lambda: TextTower(**text_sizes(state), activation=activation), state)


def activation_of(made: dict) -> type[nn.Module]:
    """The activation of the CLIP that made these features (video.made_by)."""
    return nn.GELU if made.get("activation") == "gelu" else QuickGELU


def prepared(state: dict[str, Tensor], activation: type[nn.Module] | None
             ) -> tuple[dict[str, Tensor], type[nn.Module]]:
    """The weights with exactly the buffers that `Transformer` will register, and the activation."""
    state = {key: value for key, value in state.items() if key not in NOT_WEIGHTS}
    if activation is None:
        activation = nn.GELU if "transformer.gelu" in state else QuickGELU
    widths = {}
    if "token_embedding.weight" in state:
        widths["transformer"] = state["token_embedding.weight"].shape[1]
    is_resnet = "visual.layer1.0.conv1.weight" in state         # which has no transformer
    if "visual.conv1.weight" in state and not is_resnet:
        widths["visual.transformer"] = len(state["visual.conv1.weight"])
    heads = {tower: heads_of(state, tower, width) for tower, width in widths.items()}
    for tower in ("transformer", "visual.transformer"):
        state.pop(f"{tower}.heads", None)
        state.pop(f"{tower}.gelu", None)
    for tower, width in widths.items():
        if heads[tower] != width // 64:
            state[f"{tower}.heads"] = torch.tensor(heads[tower])
        if activation is nn.GELU:
            state[f"{tower}.gelu"] = torch.tensor(True)
    return state, activation


def empty_model(state: dict[str, Tensor], activation: type[nn.Module]) -> CLIP:
    """A CLIP of the sizes of these weights, before they are loaded."""
    output = shape_of(state, "text_projection")[1]                                  # D
    if "visual.layer1.0.conv1.weight" in state:
        positions = shape_of(state, "visual.attnpool.positional_embedding")[0]      # 1 + HW
        width = len(state["visual.layer1.0.conv1.weight"])
        layers = tuple(count(state, f"visual.layer{i}.") for i in (1, 2, 3, 4))
        visual = ModifiedResNet(resolution=32 * round((positions - 1) ** 0.5), layers=layers,
                                width=width, heads=max(1, width // 2), output=output)
    else:
        width, _, patch = shape_of(state, "visual.conv1.weight")[:3]
        positions = shape_of(state, "visual.positional_embedding")[0]               # 1 + HW
        stem = []
        while f"visual.stem.{len(stem)}.weight" in state:
            stem.append(len(state[f"visual.stem.{len(stem)}.weight"]))
        pixels = patch * 2 ** len(stem)                 # width of a patch
        visual = VisionTransformer(
            resolution=pixels * round((positions - 1) ** 0.5), patch=patch, width=width,
            layers=count(state, "visual.transformer.resblocks."),
            heads=heads_of(state, "visual.transformer", width), output=output,
            activation=activation, stem=tuple(stem))
    return CLIP(visual, **text_sizes(state), activation=activation)


def text_sizes(state: dict[str, Tensor]) -> dict[str, int]:
    """The arguments of a TextTower with these weights."""
    vocabulary_size, width = shape_of(state, "token_embedding.weight")
    return dict(vocabulary_size=vocabulary_size, width=width,
                context_length=shape_of(state, "positional_embedding")[0],
                layers=count(state, "transformer.resblocks."),
                heads=heads_of(state, "transformer", width),
                output=shape_of(state, "text_projection")[1])


# width -> heads of published image towers whose heads are not 64 wide: H/14, g/14, bigG/14, e/14
WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16, 1792: 16}


def heads_of(state: dict[str, Tensor], tower: str, width: int) -> int:
    """The number of heads of a tower of this width. Mistake if it is unknown."""
    heads = width // 64
    if f"{tower}.heads" in state:
        heads = int(state[f"{tower}.heads"])
    elif tower == "visual.transformer" and width > 1024:
        if width not in WIDE_HEADS:
            raise Mistake(f"these weights do not tell how many heads an image tower of width "
                          f"{width} has; put their config.json beside them")
        heads = WIDE_HEADS[width]
    if heads < 1 or width % heads:
        raise Mistake(f"these are not the weights of a CLIP: {heads} heads of width {width}")
    return heads


def shape_of(state: dict[str, Tensor], key: str) -> torch.Size:
    if key not in state:
        raise Mistake(f"these are not the weights of a CLIP: the key {key!r} is missing")
    return state[key].shape


def count(state: dict[str, Tensor], prefix: str) -> int:
    """Number of modules in the list `prefix`."""
    return len({key[len(prefix):].split(".")[0] for key in state if key.startswith(prefix)})


def fill(make, state: dict[str, Tensor], what: str = "a CLIP") -> nn.Module:
    """The model that `make()` gives with these weights, as float32 and in evaluation mode. Mistake,
    naming the keys, if they do not fit."""
    # subtle: a plain dict drops torch's metadata, which would carry assign=True to the second load;
    # torch itself adds num_batches_tracked, which some files lack
    state = dict(state)
    try:
        with torch.device("meta"):      # allocates nothing before all shapes are known to agree
            make().load_state_dict(state, assign=True)
        model = make()
        model.load_state_dict(state)                    # a copy: half precision becomes float32
    except RuntimeError as error:       # it lists the keys, one per line, perhaps a hundred of them
        listed = " ".join(str(error).split("\n", 1)[-1].split())[:300]
        raise Mistake(f"these are not the weights of {what}: {listed}") from error
    return model.eval()
