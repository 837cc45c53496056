"""DistilBERT as the text tower f^q: MMN as published, whose sentences and frames come from two
networks that were never trained together (the paper's "separated" setting).

    python data.py charades --features vgg_rgb_features.hdf5 --backbone vgg
    python train.py --dataset charades --method mmn --clip vgg --text-clip distilbert-base-uncased

`--text-clip` may also be a folder with a DistilBERT's config, weights and tokenizer. Evaluation
takes the weights from the checkpoint, but reads config and tokenizer by that name again.

Shapes: S sentences, L tokens (77 at most), D width of DistilBERT (768).
"""
import pathlib

import torch
from torch import Tensor, nn

from support import files
from support.errors import Missing, Mistake, reason


class DistilBert(nn.Module):
    """The interface of clip.TextTower: `tokenize`, `encode_text` and `output`, the width D."""

    def __init__(self, bert: nn.Module, tokenizer):
        super().__init__()
        self.bert, self.tokenizer, self.output = bert, tokenizer, bert.config.dim
        # UNSPECIFIED: the longest sentence; CLIP's 77 tokens (MMN's code has no limit of its own)
        self.length = min(77, bert.config.max_position_embeddings)

    def tokenize(self, texts: list[str], truncate: bool = False) -> Tensor:
        """Sentences -> LongTensor [S, 77]: [CLS], word pieces, [SEP], zeros. Mistake for more than
        77 tokens; with truncate=True [SEP] is kept."""
        tokens = torch.zeros(len(texts), self.length, dtype=torch.long)
        # the tokenizer's own padding would stop at the longest sentence of these
        rows = self.tokenizer(texts, truncation=truncate, max_length=self.length)["input_ids"]
        for row, text, ids in zip(tokens, texts, rows):
            if len(ids) > self.length:
                raise Mistake(f"this sentence has {len(ids)} tokens and DistilBERT reads "
                              f"{self.length}; shorten it or pass truncate=True: {text[:60]!r}")
            row[:len(ids)] = torch.tensor(ids)                          # the id of [PAD] is 0
        return tokens

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Token ids [S, L] -> [S, D], not normalised: the mean of the last states of the tokens,
        including [CLS] and [SEP], without padding, as in MMN's code."""
        if not len(tokens):
            return self.bert.embeddings.word_embeddings.weight.new_zeros(0, self.output)
        spoken = tokens != 0                                            # True = not padding
        L = int(spoken.sum(1).max())    # exact: padding behind the longest sentence changes nothing
        spoken = spoken[:, :L]
        x = self.bert(tokens[:, :L], attention_mask=spoken.long()).last_hidden_state    # [S, L, D]
        return (x * spoken[:, :, None]).sum(1) / spoken.sum(1, keepdim=True)            # [S, D]


def is_distilbert(name: str) -> bool:
    """Whether a --text-clip is a DistilBERT: by its name, or by the configuration in its folder."""
    path = pathlib.Path(name)
    if not name or not (path / "config.json").is_file():        # no name: the features' own CLIP
        return path.name.startswith("distilbert")
    text = files.read_text(path / "config.json")
    # those of a CLIP, of its text tower alone, and timm's, beside open_clip's own
    return not ("vision_config" in text or "clip_text_model" in text
                or (path / "open_clip_config.json").is_file())


def load(name: str, state: dict[str, Tensor] | None = None) -> DistilBert:
    """By name or folder, in float32 and evaluation mode, with its own weights or with `state`.
    Missing if it cannot be read or is another model."""
    transformers = files.need("transformers", "DistilBERT")
    try:
        config = transformers.AutoConfig.from_pretrained(name)          # downloaded once
        if config.model_type != "distilbert":
            raise ValueError(f"it is a {config.model_type}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if state is None:
            bert = transformers.DistilBertModel.from_pretrained(name)
            return DistilBert(bert, tokenizer).float().eval()
    except Exception as error:  # of a dozen types, for a folder, the network, or a damaged file
        raise Missing(f"{name} cannot be read as a DistilBERT: {reason(error)}") from error
    tower = DistilBert(transformers.DistilBertModel(config), tokenizer)
    try:
        tower.load_state_dict(state, strict=True)
    except RuntimeError as error:       # it lists the keys, one per line, perhaps a hundred of them
        listed = " ".join(str(error).split())[:300]
        raise Mistake(f"these are not the weights of this DistilBERT: {listed}") from error
    return tower.eval()
