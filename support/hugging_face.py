"""Hugging Face's names for the weights of a CLIP (ViT only) -> OpenAI's."""
import torch
from torch import Tensor

from support.errors import Mistake

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
