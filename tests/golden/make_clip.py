"""Makes clip.json: what two independent implementations output for fixed weights and inputs.

    pip install torch==2.13.0 transformers==5.23.0 ftfy regex numpy
    pip install --no-deps open_clip_torch==3.3.0
    python tests/golden/make_clip.py

Vision transformer and text tower: Hugging Face's CLIPModel. ResNet tower and tokenizer:
open_clip's. Weights come from a fixed random stream (`fill`), key by key, so that no weight file
has to be stored.
"""
import importlib.util
import json
import pathlib
import sys
import types
import zlib

import numpy as np
import torch

STRINGS = ["", "a person opens the door", "A PERSON'S  dog isn't\there!",
           "&lt;b&gt; &amp;amp; caf&eacute;",
           "âœ” No problems, schÃ¶n", "😀🎉👩‍👩‍👧 fun",
           "<|startoftext|>a<|endoftext|> b <|endoftext|>",
           "x" * 300, "supercalifragilistic" * 15, "一个人打开门。",
           "don't we'll they've I'm you're he'd it's",
           "3 4567 3.14 1,000", "naïve Åse coöperate", "\u00a0\u200b zero\u200bwidth",
           "tabs\tand\nnewlines\r\n",
           "person begins to play on a phone.", "!!! ??? ...", "ﬁ ligature Ⅷ ½",
           "İstanbul ẞ",
           "a\x00b", "\ud7ff",
           "The quick brown fox, jumps over the lazy dog; really?", "ᴀʙᴄ", "l'homme",
           "&#39;quoted&#39;"]
VIT = dict(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2,
           projection_dim=64)
# one block of a tower as in ViT-H/14: 16 heads that are not 64 wide, and GELU; the text tower's 20
# heads are 64 wide
WIDE_IMAGE = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=1,
                  num_attention_heads=16, hidden_act="gelu", image_size=32, patch_size=16)
WIDE_TEXT = dict(hidden_size=1280, intermediate_size=5120, num_hidden_layers=1,
                 num_attention_heads=20, hidden_act="gelu", vocab_size=400,
                 max_position_embeddings=77, eos_token_id=2)
RESNET = dict(layers=(1, 2, 1, 1), output_dim=32, heads=8, image_size=64, width=16)


def fill(state: dict) -> dict:
    """Weights from a fixed random stream: the key of a floating-point tensor is its seed."""
    result = {}
    for key, value in state.items():
        stream = np.random.RandomState(zlib.crc32(key.encode()))
        noise = torch.from_numpy(stream.standard_normal(tuple(value.shape))).float()
        if not value.is_floating_point():
            result[key] = value
        elif key.endswith("running_var"):
            result[key] = 1 + 0.1 * noise.abs()
        elif value.ndim == 1 and key.endswith("weight"):
            result[key] = 1 + 0.1 * noise
        else:
            result[key] = noise * (0.5 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
    return result


def images(count: int, size: int) -> torch.Tensor:
    noise = np.random.RandomState(size).standard_normal((count, 3, size, size))
    return torch.from_numpy(noise).float()


def tokens(vocabulary: int) -> torch.Tensor:
    """Five sentences of different lengths, each ended by the largest id."""
    stream, rows = np.random.RandomState(1), torch.zeros(5, 77, dtype=torch.long)
    for row, length in zip(rows, (2, 7, 20, 76, 77)):
        row[:length - 1] = torch.from_numpy(stream.randint(1, vocabulary - 1, length - 1))
        row[length - 1] = vocabulary - 1
    return rows


def load_open_clip(name: str):
    """One file of open_clip, without importing the package (which needs torchvision)."""
    folder = pathlib.Path(importlib.util.find_spec("open_clip").submodule_search_locations[0])
    package, utils = types.ModuleType("oc"), types.ModuleType("oc.utils")
    package.__path__ = [str(folder)]
    utils.freeze_batch_norm_2d = utils.feature_take_indices = None
    sys.modules.update({"oc": package, "oc.utils": utils})
    spec = importlib.util.spec_from_file_location(f"oc.{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def main() -> None:
    from transformers import CLIPConfig, CLIPModel
    config = CLIPConfig(
        text_config=VIT | dict(vocab_size=400, max_position_embeddings=77, eos_token_id=2),
        vision_config=VIT | dict(image_size=32, patch_size=8), projection_dim=64)
    model = CLIPModel(config).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()
              if "position_ids" not in key}
    model.load_state_dict(fill(model.state_dict()))
    seen = model.vision_model(images(3, 32))
    patches = model.vision_model.post_layernorm(seen.last_hidden_state[:, 1:])
    patches = model.visual_projection(patches)
    result = {"hugging_face": {
        "shapes": shapes,
        "image": model.visual_projection(seen.pooler_output).tolist(), "patches": patches.tolist(),
        "text": model.text_projection(model.text_model(tokens(400)).pooler_output).tolist()}}

    config = CLIPConfig(text_config=WIDE_TEXT, vision_config=WIDE_IMAGE, projection_dim=64)
    model = CLIPModel(config).eval()
    shapes = {key: list(value.shape) for key, value in model.state_dict().items()
              if "position_ids" not in key}
    model.load_state_dict(fill(model.state_dict()))
    result["wide"] = {
        "shapes": shapes,
        "image": model.visual_projection(model.vision_model(images(2, 32)).pooler_output).tolist(),
        "text": model.text_projection(model.text_model(tokens(400)).pooler_output).tolist()}

    resnet = load_open_clip("modified_resnet").ModifiedResNet(**RESNET).eval()
    resnet.load_state_dict(fill(resnet.state_dict()))
    x = images(2, 64)
    result["open_clip_resnet"] = {
        "shapes": {key: list(value.shape) for key, value in resnet.state_dict().items()},
        "image": resnet(x).tolist()}
    x = resnet.stem(x)
    for layer in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        x = layer(x)
    result["open_clip_resnet"]["patches"] = x.tolist()

    tokenizer = load_open_clip("tokenizer").SimpleTokenizer()
    # open_clip writes the two special tokens <start_of_text>, <end_of_text>; the ids are the same
    result["tokens"] = []
    for text in STRINGS:
        spelled = text.replace("<|startoftext|>", "<start_of_text>")
        spelled = spelled.replace("<|endoftext|>", "<end_of_text>")
        result["tokens"].append([text, tokenizer.encode(spelled)])
    path = pathlib.Path(__file__).parent / "clip.json"
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
