"""Hugging Face's names for the weights of a CLIP (ViT only) -> OpenAI's."""
import torch
from torch import Tensor

from support.errors import Mistake


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a `CLIPModel` under OpenAI's names. Mistake for a missing key."""
    names = {"text_model.embeddings.token_embedding.": "token_embedding.",
             "text_model.embeddings.position_embedding.weight": "positional_embedding",
             "vision_model.embeddings.class_embedding": "visual.class_embedding",
             "vision_model.embeddings.patch_embedding.": "visual.conv1.",
             "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
             "text_model.final_layer_norm.": "ln_final.",
             "vision_model.pre_layrnorm.": "visual.ln_pre.",
             "vision_model.post_layernorm.": "visual.ln_post.",
             "text_model.encoder.layers.": "transformer.resblocks.",
             "vision_model.encoder.layers.": "visual.transformer.resblocks.",
             ".layer_norm1.": ".ln_1.", ".layer_norm2.": ".ln_2.", ".mlp.fc1.": ".mlp.c_fc.",
             ".mlp.fc2.": ".mlp.c_proj.", ".self_attn.out_proj.": ".attn.out_proj."}
    result = {}
    for key, value in state.items():
        if key.endswith("position_ids"):
            continue
        if key in ("text_projection.weight", "visual_projection.weight"):
            result["text_projection" if key[0] == "t" else "visual.proj"] = value.T.contiguous()
            continue
        if ".self_attn.k_proj." in key or ".self_attn.v_proj." in key:
            continue                                                    # joined below with q_proj
        new = key
        for old_part, new_part in names.items():
            new = new.replace(old_part, new_part)
        if ".self_attn.q_proj." in key:
            parts = [key.replace("q_proj", f"{p}_proj") for p in "qkv"]
            if missing := [name for name in parts if name not in state]:
                raise Mistake(f"these are not the weights of a CLIP: the key {missing[0]!r} is "
                              f"missing")
            value = torch.cat([state[name] for name in parts])
            new = new.replace(".self_attn.q_proj.", ".attn.in_proj_")
        result[new] = value
    return result
