"""Weight files of CLIPs as others publish them -> a state dict under OpenAI's names.

Files of torch.save and of safetensors, recognised by their first bytes; folders as Hugging Face's
hub has them, whose configuration tells what the weights do not show: the number of heads, and
whether the activation is GELU. Nothing in a file is executed.
"""
import json
import os
import pathlib

import torch
from torch import Tensor

from support import files
from support.errors import Mistake, reason

# in a folder, the first of these that it contains
FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin",
         "pytorch_model.bin")
CONFIGS = ("open_clip_config.json", "config.json")      # of open_clip, and of transformers
PREFIXES = ("module.", "_orig_mod.", "model.", "clip.")     # of DataParallel, compile, Lightning
HUB = {"openai/clip-vit-base-patch32": "ViT-B/32", "openai/clip-vit-base-patch16": "ViT-B/16",
       "openai/clip-vit-large-patch14": "ViT-L/14",
       "openai/clip-vit-large-patch14-336": "ViT-L/14@336px"}
IMAGE_HEADS, TEXT_HEADS, GELU = "visual.transformer.heads", "transformer.heads", "transformer.gelu"


def file_in(path: str | os.PathLike) -> pathlib.Path:
    """The weight file that a path names; in a folder, the first of FILES."""
    path = pathlib.Path(path)
    if not path.is_dir():
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    raise Mistake(f"{path} contains no weights: none of {', '.join(FILES)}")


def read(path: pathlib.Path) -> dict[str, Tensor]:
    """The state dict of a weight file. Mistake if it does not hold one."""
    with open(path, "rb") as file:
        start = file.read(9)
    # safetensors: the length of the header in eight bytes, then json
    if start[8:] == b"{":
        package = files.need("safetensors.torch", f"reading {path}")
        try:
            state = package.load_file(path)
        except Exception as error:  # several types for a damaged or hostile file
            raise Mistake(f"{path} is not a valid weight file: {reason(error)}") from error
    else:
        state = files.read_tensors(path)
    for wrapper in ("state_dict", "model"):             # open_clip's checkpoints, and others'
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(
            isinstance(key, str) and isinstance(x, Tensor) for key, x in state.items()):
        raise Mistake(f"{path} does not contain a state dict (a dictionary of tensors)")
    state = without_prefixes(state)
    if any(key.startswith("text_model.") for key in state):
        state = renamed(state)
    return state | configured(path.parent)


def without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same without what wrappers put before every key."""
    while True:
        common = [prefix for prefix in PREFIXES
                  if state and all(key.startswith(prefix) for key in state)]
        if not common:
            return state
        state = {key.removeprefix(common[0]): value for key, value in state.items()}


def configured(folder: pathlib.Path) -> dict[str, Tensor]:
    """What a configuration beside the weights says, under the names that clip.Transformer has for
    it."""
    for name in CONFIGS:
        if not (folder / name).is_file():
            continue
        try:
            content = json.loads(files.read_text(folder / name))
            if "model_cfg" in content:                  # open_clip's
                content = content["model_cfg"]
                image, text = content["vision_cfg"], content["text_cfg"]
                heads = image["width"] // image.get("head_width", 64), text["heads"]
                is_gelu = not content.get("quick_gelu", False)
            elif "vision_config" in content:            # transformers'
                image, text = content["vision_config"], content["text_config"]
                # its defaults, which a configuration need not repeat, are those of ViT-B/32
                heads = image.get("num_attention_heads", 12), text.get("num_attention_heads", 8)
                is_gelu = text.get("hidden_act", "quick_gelu") != "quick_gelu"
            elif content.get("model_type") == "clip_text_model":        # its text tower alone
                heads = 1, content.get("num_attention_heads", 8)        # 1: it has no image tower
                is_gelu = content.get("hidden_act", "quick_gelu") != "quick_gelu"
            else:                                       # of something else
                continue
            result = {IMAGE_HEADS: torch.tensor(int(heads[0])),
                      TEXT_HEADS: torch.tensor(int(heads[1]))}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError,
                RecursionError) as error:
            raise Mistake(f"{folder / name} is not the configuration of a CLIP: "
                          f"{reason(error)}") from error
        if is_gelu:
            result[GELU] = torch.tensor(True)
        return result
    return {}


NAMES = {"text_model.embeddings.token_embedding.": "token_embedding.",
         "text_model.embeddings.position_embedding.weight": "positional_embedding",
         "vision_model.embeddings.class_embedding": "visual.class_embedding",
         "vision_model.embeddings.patch_embedding.": "visual.conv1.",
         "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
         "text_model.final_layer_norm.": "ln_final.",
         "vision_model.pre_layrnorm.": "visual.ln_pre.",                # sic
         "vision_model.post_layernorm.": "visual.ln_post.",
         "text_model.encoder.layers.": "transformer.resblocks.",
         "vision_model.encoder.layers.": "visual.transformer.resblocks.",
         ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
         ".mlp.fc2.": ".mlp.c_proj.", ".self_attn.out_proj.": ".attn.out_proj.",
         ".self_attn.q_proj.": ".attn.in_proj_",            # q, k and v become one matrix
         "text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` under OpenAI's names. Mistake for a missing key."""
    result = {}
    for key, value in state.items():
        if key.endswith("position_ids"):                    # 0, 1, 2, ...: not a weight
            continue
        if ".self_attn.k_proj." in key or ".self_attn.v_proj." in key:
            continue                                        # joined to q_proj below
        new = key
        for theirs, ours in NAMES.items():
            new = new.replace(theirs, ours)
        if ".self_attn.q_proj." in key:
            parts = [key.replace("q_proj", f"{letter}_proj") for letter in "qkv"]
            for part in parts:
                if part not in state:
                    raise Mistake(f"these are not the weights of a CLIP: the key {part!r} is "
                                  f"missing")
            value = torch.cat([state[part] for part in parts])          # [3C, C] or [3C]
        elif key in ("text_projection.weight", "visual_projection.weight"):
            value = value.T.contiguous()                    # a Linear computes x W^T, OpenAI x W
        result[new] = value
    return result
