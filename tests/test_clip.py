"""clip.py against independent implementations (golden/make_clip.py), and the loading of weights.

Proofs: the towers agree with Hugging Face's and open_clip's to 1e-5, and token ids are identical;
running the text tower only up to the longest sentence changes nothing; a wrong or hostile file is
reported in one sentence, and so is every failed download."""
import hashlib
import http.server
import importlib.util
import json
import pathlib
import pickle
import threading

import numpy as np
import pytest
import torch

import clip
from conftest import decode
from support import weights as hugging_face
from support.errors import Mistake

FOLDER = pathlib.Path(__file__).parent / "golden"
GOLDEN = json.loads((FOLDER / "clip.json").read_text(encoding="utf-8"))
spec = importlib.util.spec_from_file_location("make_clip", FOLDER / "make_clip.py")
make_clip = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_clip)


def hugging_face_state() -> dict:
    return make_clip.fill({key: torch.empty(shape) for key,
                           shape in GOLDEN["hugging_face"]["shapes"].items()})


@pytest.fixture(scope="module")
def state():
    return hugging_face.renamed(hugging_face_state())


@pytest.fixture(scope="module")
def model(state):
    return clip.build(state)


def close(actual, expected):
    expected = torch.tensor(expected)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


# ---------------------------------------------------------------------------------------- tokenizer

@pytest.mark.parametrize("text, ids", GOLDEN["tokens"], ids=lambda value: repr(value)[:20])
def test_tokens_are_those_of_the_published_tokenizer(text, ids):
    assert clip.encode(text) == ids


def test_tokenize_pads_with_zeros_between_start_and_end():
    """[start] a person [end] 0 ...; ids 320 and 2533 are the published ones."""
    rows = clip.tokenize(["a person", ""])
    assert rows.shape == (2, 77) and rows.dtype == torch.long
    assert rows[0, :5].tolist() == [49406, 320, 2533, 49407, 0]
    assert rows[1, :3].tolist() == [49406, 49407, 0]
    assert torch.equal(clip.tokenize("a person"), rows[:1])


def test_tokenize_rejects_long_sentences_unless_asked_to_truncate():
    with pytest.raises(Mistake, match="78 tokens .* truncate=True"):
        clip.tokenize("a " * 76)
    assert clip.tokenize("a " * 75)[0, -1] == 49407                     # exactly 77
    cut = clip.tokenize("a " * 500, truncate=True)[0]
    assert cut[-1] == 49407 and (cut[1:-1] == 320).all()


def test_decode_inverts_encode():
    text = "a person's café 😀 opens the door ."
    again = decode(clip.encode(text))
    assert again.split() == "a person 's café 😀 opens the door .".split()


# ------------------------------------------------------------------------------------------- towers

@torch.no_grad()
def test_vision_transformer_equals_hugging_face(model):
    x, patches = model.encode_image(make_clip.images(3, 32))
    close(x, GOLDEN["hugging_face"]["image"])
    close(patches.flatten(2).transpose(1, 2), GOLDEN["hugging_face"]["patches"])
    assert patches.shape == (3, 64, 4, 4)


@torch.no_grad()
def test_text_tower_equals_hugging_face(model):
    close(model.encode_text(make_clip.tokens(400)), GOLDEN["hugging_face"]["text"])


@torch.no_grad()
def test_resnet_tower_equals_open_clip():
    golden = GOLDEN["open_clip_resnet"]
    weights = make_clip.fill({key: torch.empty(shape,
                                               dtype=torch.long if key.endswith("tracked")
                                               else torch.float32)
                              for key, shape in golden["shapes"].items()})
    tower = clip.ModifiedResNet(64, (1, 2, 1, 1), 16, 8, 32).eval()
    tower.load_state_dict(weights)
    x, patches = tower(make_clip.images(2, 64))
    close(x, golden["image"])
    close(patches, golden["patches"])


@torch.no_grad()
def test_positions_after_the_longest_sentence_do_not_matter(model):
    tokens = make_clip.tokens(400)
    together = model.encode_text(tokens)
    for i in range(len(tokens)):
        close(model.encode_text(tokens[i:i + 1]), together[i:i + 1].tolist())
    assert model.encode_text(tokens[:0]).shape == (0, 64)


def test_quick_gelu_is_not_gelu(model):
    """x sigmoid(1.702 x) at 1: 1 / (1 + e^-1.702) = 0.845796; GELU would give 0.841345."""
    assert clip.QuickGELU()(torch.tensor(1.0)).item() == pytest.approx(0.845796, abs=1e-6)
    gelu = clip.build(hugging_face.renamed(hugging_face_state()), torch.nn.GELU)
    with torch.no_grad():
        a, b = (tower.encode_text(make_clip.tokens(400)) for tower in (gelu, model))
    assert (a - b).abs().max() > 1e-3


def test_image_of_the_wrong_size_is_one_sentence(model):
    with pytest.raises(Mistake, match=r"reads images \[B, 3, 32, 32\]"):
        model.encode_image(torch.zeros(1, 3, 64, 64))


# ------------------------------------------------------------------------------------ preprocessing

def test_preprocess_crops_the_centre_and_normalises():
    """A frame already 4 high: only the middle 4 of 8 columns stay. Mean and standard deviation are
    CLIP's."""
    frames = torch.zeros(1, 3, 4, 8, dtype=torch.uint8)
    frames[..., 2:6] = 255
    x = clip.preprocess(frames, 4)
    assert x.shape == (1, 3, 4, 4)
    expected = [(1 - m) / s for m, s in zip(clip.PIXEL_MEAN, clip.PIXEL_STD)]
    assert torch.allclose(x, torch.tensor(expected).view(1, 3, 1, 1).expand_as(x))


def test_preprocess_agrees_with_pillow():
    """Bicubic resize of a real-sized noisy frame and centre crop: at most 2/255 apart anywhere,
    0.3/255 on average."""
    from PIL import Image
    for h, w in ((270, 480), (480, 270), (100, 90), (224, 224), (333, 1000)):
        base = np.random.RandomState(h).randint(0, 256, (h // 8 + 1, w // 8 + 1, 3), dtype=np.uint8)
        frame = np.asarray(Image.fromarray(base).resize((w, h), Image.BICUBIC))
        scale = 224 / min(h, w)
        image = Image.fromarray(frame).resize((max(224, int(w * scale)), max(224, int(h * scale))),
                                              Image.BICUBIC)
        left, top = round((image.width - 224) / 2), round((image.height - 224) / 2)
        expected = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
        x = clip.preprocess(torch.from_numpy(frame.copy()).permute(2, 0, 1)[None], 224)[0]
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (clip.PIXEL_MEAN, clip.PIXEL_STD))
        actual = ((x * std + mean) * 255).permute(1, 2, 0).numpy()
        assert abs(actual - expected).max() <= 2.01 and abs(actual - expected).mean() <= 0.3, (h, w)


def test_preprocess_rejects_what_is_not_a_frame():
    with pytest.raises(Mistake, match="uint8"):
        clip.preprocess(torch.zeros(1, 3, 4, 4), 4)


# ------------------------------------------------------------------------------------------ weights

def test_build_names_the_missing_key(state):
    for key in ("token_embedding.weight", "visual.proj",
                "visual.transformer.resblocks.1.mlp.c_fc.bias"):
        with pytest.raises(Mistake, match=f"(?i)missing.*{key}|{key}.*missing"):
            clip.build({k: v for k, v in state.items() if k != key})
    with pytest.raises(Mistake, match="Unexpected.*extra"):
        clip.build({**state, "extra": torch.zeros(1)})
    with pytest.raises(Mistake, match="size mismatch for ln_final.weight"):
        clip.build({**state, "ln_final.weight": torch.zeros(3)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_filled_weights_are_a_copy_in_float32(dtype):
    """Also of a state dict with torch's metadata, as `torch.load` gives it."""
    state = torch.nn.Linear(2, 2).to(dtype).state_dict()
    before = state["bias"].clone()
    filled = clip.fill(lambda: torch.nn.Linear(2, 2), state)
    assert filled.weight.dtype == torch.float32 and torch.equal(filled.bias, before.float())
    torch.nn.init.zeros_(filled.bias)
    assert torch.equal(state["bias"], before)


def test_sizes_of_the_published_models_are_read_off():
    """From the shapes of ViT-B/32's and RN50's state dicts, without their weights."""
    with torch.device("meta"):
        vit = clip.CLIP(clip.VisionTransformer(224, 32, 768, 12, 12, 512, clip.QuickGELU),
                        49408, 77, 512, 12, 8, 512, clip.QuickGELU)
        rn50 = clip.CLIP(clip.ModifiedResNet(224, (3, 4, 6, 3), 64, 32, 1024),
                         49408, 77, 512, 12, 8, 1024, clip.QuickGELU)
    assert sum(p.numel() for p in vit.parameters()) == 151_277_313      # as published
    assert sum(p.numel() for p in rn50.parameters()) == 102_007_137
    for original in (vit, rn50):
        built = clip.build({k: torch.zeros(v.shape) for k, v in original.state_dict().items()})
        assert built.visual.resolution == 224 and built.visual.grid == 7
        assert {k: v.shape for k, v in built.state_dict().items()} == \
            {k: v.shape for k, v in original.state_dict().items()}


def test_what_is_known_of_the_published_models_without_their_weights():
    """Width of the joint space and resolution: clip/model.py's build_model on OpenAI's archives."""
    assert {name: tuple(sizes) for name, (_, *sizes) in clip.PUBLISHED.items()} == {
        "RN50": (1024, 224), "RN101": (512, 224), "RN50x4": (640, 288), "RN50x16": (768, 384),
        "RN50x64": (1024, 448), "ViT-B/32": (512, 224), "ViT-B/16": (512, 224),
        "ViT-L/14": (768, 224), "ViT-L/14@336px": (768, 336)}


def test_a_file_that_does_not_fit_is_named(tmp_path, state):
    torch.save({key: value for key, value in state.items() if key != "ln_final.bias"},
               tmp_path / "x.pt")
    for load in (clip.load, lambda path: clip.load_text(str(path))):
        with pytest.raises(Mistake, match="x.pt: these are not the weights of a CLIP: Missing "
                                          "key.*ln_final.bias"):
            load(tmp_path / "x.pt")


def test_text_tower_alone_is_the_same(model, state):
    text = clip.build_text({k: v for k, v in state.items() if not k.startswith("visual.")})
    with torch.no_grad():
        assert torch.equal(text.encode_text(make_clip.tokens(400)),
                           model.encode_text(make_clip.tokens(400)))


def test_archive_entries_that_are_not_weights_are_ignored(state):
    extra = {name: torch.tensor(32) for name in clip.NOT_WEIGHTS}
    for build in (clip.build, clip.build_text):
        build({**state, **extra})


def test_a_published_name_is_downloaded(tmp_path, state, monkeypatch):
    """By every command: `read_state` takes names as `load` does."""
    torch.save(state, tmp_path / "tiny.pt")
    monkeypatch.setitem(clip.PUBLISHED, "tiny", (clip.sha256(tmp_path / "tiny.pt"),))
    monkeypatch.setattr(clip, "download", lambda name: tmp_path / f"{name}.pt")
    assert clip.read_state("tiny").keys() == state.keys() == clip.load("tiny").state_dict().keys()


def test_file_forms(tmp_path, state, model):
    """A plain state dict, open_clip's wrapping, half precision, and Hugging Face's names give the
    same model."""
    forms = {"plain": state,
             "open_clip": {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
             "hugging_face": hugging_face_state(),
             "openai": {**state, "input_resolution": torch.tensor(32),
                        "context_length": torch.tensor(77),
                        "vocab_size": torch.tensor(400)}}
    for name, content in forms.items():
        torch.save(content, tmp_path / name)
        loaded = clip.load(tmp_path / name)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), (name, key)
    torch.save({k: v.half() for k, v in state.items()}, tmp_path / "half")
    assert clip.load(tmp_path / "half").ln_final.weight.dtype == torch.float32


def test_every_form_in_which_weights_are_published(tmp_path, state, model):
    """Recognised by their first bytes, whatever the name; with the prefixes of wrappers."""
    safetensors = pytest.importorskip("safetensors.torch")
    hub = tmp_path / "clip-vit"
    hub.mkdir()
    safetensors.save_file(hugging_face_state(), hub / "model.safetensors")
    (hub / "config.json").write_text(json.dumps({
        "vision_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"},
        "text_config": {"num_attention_heads": 2, "hidden_act": "quick_gelu"}}), encoding="utf-8")
    safetensors.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "open.bin")
    torch.save(state, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    for i, prefix in enumerate(("module.", "_orig_mod.", "model.", "clip.", "model.module.")):
        torch.save({prefix + key: value for key, value in state.items()}, tmp_path / f"{i}.pt")
    paths = [hub, hub / "model.safetensors", tmp_path / "open.bin", tmp_path / "old.safetensors"]
    for path in paths + sorted(tmp_path.glob("?.pt")):
        loaded = clip.load(path)
        for key, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value), (path, key)
    assert clip.sha256(hub) == clip.sha256(hub / "model.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Mistake, match="contains no weights: none of .*model.safetensors"):
        clip.load(tmp_path / "empty")


def test_heads_and_activation_that_the_weights_do_not_show(tmp_path, state):
    """From the configuration beside them, and then in the state dict; else as published."""
    image, text = torch.randn(1, 3, 32, 32), make_clip.tokens(400)
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name, content in (
            ("config.json", {"vision_config": {"num_attention_heads": 4},
                             "text_config": {"num_attention_heads": 8, "hidden_act": "gelu"}}),
            ("open_clip_config.json", {"model_cfg": {
                "vision_cfg": {"width": 128, "head_width": 32},
                "text_cfg": {"width": 128, "heads": 8}}})):
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        model = clip.load(tmp_path)
        assert model.visual.transformer.resblocks[0].attn.num_heads == 4
        assert model.transformer.resblocks[0].attn.num_heads == 8
        assert isinstance(model.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
        # the state dict says so, too: a checkpoint of train.py needs no configuration
        again = clip.build(model.state_dict())
        with torch.no_grad():
            assert torch.equal(again.encode_text(text), model.encode_text(text))
            assert torch.equal(again.encode_image(image)[0], model.encode_image(image)[0])
            tower = clip.build_text(model.state_dict())
            assert torch.equal(tower.encode_text(text), model.encode_text(text))
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text('{"vision_config": {}}', encoding="utf-8")
    with pytest.raises(Mistake, match="is not the configuration of a CLIP: KeyError"):
        clip.load(tmp_path)


def test_wide_towers_with_gelu_equal_hugging_face(tmp_path):
    """One block of a tower of width 1280: 16 heads without a word, and GELU by its config.json."""
    golden = GOLDEN["wide"]
    state = make_clip.fill({key: torch.empty(shape) for key, shape in golden["shapes"].items()})
    torch.save(state, tmp_path / "pytorch_model.bin")
    for content, activation in (({"vision_config": make_clip.WIDE_IMAGE,
                                  "text_config": make_clip.WIDE_TEXT}, None),
                                (None, torch.nn.GELU)):
        if content:
            (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
        else:
            (tmp_path / "config.json").unlink()
        model = clip.load(tmp_path, activation=activation)
        with torch.no_grad():
            close(model.encode_image(make_clip.images(2, 32))[0], golden["image"])
            close(model.encode_text(make_clip.tokens(400)), golden["text"])


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16),
                                          (1664, 16)])
def test_published_numbers_of_heads(width, heads):
    """ViT-H/14, g/14 and bigG/14 have 16 heads that are not 64 wide; text towers always are."""
    assert clip.heads_of({}, "visual.transformer", width) == heads
    assert clip.heads_of({}, "transformer", 1280) == 20
    with pytest.raises(Mistake, match="do not tell how many heads .* width 1536"):
        clip.heads_of({}, "visual.transformer", 1536)


def test_another_tokenizer_is_refused_and_fewer_positions_are_used(state):
    wide = clip.vocabulary()[0]
    for words in (901_629, 32_000):
        tower = clip.build_text({**state, "token_embedding.weight": torch.zeros(words, 128)})
        with pytest.raises(Mistake, match="it was trained with another tokenizer"):
            tower.tokenize("a door")
    short = clip.build_text({**state, "token_embedding.weight": torch.zeros(len(wide) + 2, 128),
                             "positional_embedding": torch.zeros(32, 128)})
    tokens = short.tokenize("a " * 60, truncate=True)
    assert tokens.shape == (1, 32) and short.encode_text(tokens).shape == (1, 64)


def test_names_that_are_nearly_right():
    for name, meant in (("ViT-B-32", "ViT-B/32"), ("openai/clip-vit-large-patch14", "ViT-L/14")):
        with pytest.raises(Mistake, match=f"did you mean {meant}"):
            clip.load(name)


def test_what_is_not_only_weights_is_named(tmp_path):
    import argparse
    tensor = torch.zeros(3)
    for content, name in (({"state_dict": {"a": tensor}, "args": argparse.Namespace(x=1)},
                           "argparse.Namespace"),
                          (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
                          ({"a": tensor, "loss": np.float64(3)}, "numpy")):
        for new in (True, False):
            torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=new)
            with pytest.raises(Mistake, match=f"it contains a {name}.*, not only tensors; save"):
                clip.load(tmp_path / "x.pt")


def test_torchscript_only_after_its_checksum_matched(tmp_path, model, monkeypatch):
    """An archive that contains code is opened only if its SHA-256 is a published one."""
    path = tmp_path / "ViT-B-32.pt"
    images = make_clip.images(1, 32)

    class Image(torch.nn.Module):
        def __init__(self):
            super().__init__()
            for name, child in model.named_children():
                self.add_module(name, child)
            for name, parameter in model.named_parameters(recurse=False):
                self.register_parameter(name, parameter)

        def forward(self, x):
            return self.visual(x)

    torch.jit.trace(Image(), images, check_trace=False).save(str(path))
    with pytest.raises(Mistake, match="contains code"):
        clip.load(path)
    monkeypatch.setitem(clip.PUBLISHED, "tiny", (clip.sha256(path),))
    with torch.no_grad():
        assert torch.equal(clip.load(path).encode_image(images)[0], model.encode_image(images)[0])


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("exploded"),)


def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"token_embedding.weight": Bomb()}, "bomb.pt")
    pathlib.Path("plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("bomb.pt", "plain.pt"):
        with pytest.raises(Mistake, match="not a valid weight file"):
            clip.load(name)
    assert not pathlib.Path("exploded").exists()
    pathlib.Path("text.pt").write_text("not weights", encoding="utf-8")
    with pytest.raises(Mistake, match="not a valid weight file"):
        clip.load("text.pt")
    torch.save([1, 2], "list.pt")
    with pytest.raises(Mistake, match="does not contain a state dict"):
        clip.load("list.pt")
    with pytest.raises(Mistake, match="ViT-B/32"):
        clip.load("ViT-B-33")


# -------------------------------------------------------------------------------------- downloading

@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server that sends `content`, and breaks the connection after `limit` bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        content, limit, requests = bytes(range(256)) * 9000, None, []
        status, place = None, None

        def do_GET(self):
            self.requests.append(self.path)
            if self.status and not self.path.startswith("/elsewhere"):
                self.send_response(self.status)
                self.send_header("Location", f"{self.place}/elsewhere")
                self.end_headers()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content)))
            self.end_headers()
            self.wfile.write(self.content[:self.limit])

        def log_message(self, *args):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setattr(clip, "ADDRESS", f"http://127.0.0.1:{httpd.server_port}")
    digest = hashlib.sha256(Handler.content).hexdigest()
    monkeypatch.setitem(clip.PUBLISHED, "tiny", (digest,))
    yield Handler
    httpd.shutdown()


def test_a_download_gets_its_name_once_verified(server, tmp_path, monkeypatch, fault):
    """A connection that breaks and other bytes leave nothing behind; then it succeeds."""
    for name, value in (("limit", 1_500_000), ("content", b"something else")):
        with monkeypatch.context() as patch:
            patch.setattr(server, name, value)
            with pytest.raises(Mistake, match="invalid hash value.*by hand to .*tiny.pt"):
                clip.download("tiny", tmp_path)
        assert list(tmp_path.iterdir()) == []
    path = clip.download("tiny", tmp_path)
    assert path.read_bytes() == server.content and list(tmp_path.iterdir()) == [path]
    before = len(server.requests)
    clip.download("tiny", tmp_path)
    assert len(server.requests) == before                       # already there: not requested again
    path.write_bytes(b"damaged later")
    assert clip.download("tiny", tmp_path).read_bytes() == server.content
    fault("download: broken connection, wrong bytes", "a server on this machine; removed, never "
          "used", 2)


@pytest.mark.parametrize("status", [404, 403, 500])
def test_a_file_that_the_server_lacks(server, tmp_path, monkeypatch, status, fault):
    monkeypatch.setattr(server, "status", status)
    with pytest.raises(Mistake, match=f"{status}.*download it by hand to .*tiny.pt"):
        clip.download("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
    fault("download: 404, 403, 500", "a server on this machine", 1)


def test_a_redirection_is_verified_like_everything_else(server, tmp_path, monkeypatch, fault):
    """Even to plain http: what arrives is used only if its SHA-256 is right."""
    monkeypatch.setattr(server, "status", 302)
    monkeypatch.setattr(server, "place", clip.ADDRESS)
    assert clip.download("tiny", tmp_path).read_bytes() == server.content
    (tmp_path / "tiny.pt").unlink()
    monkeypatch.setattr(server, "content", b"something else")
    with pytest.raises(Mistake, match="invalid hash value"):
        clip.download("tiny", tmp_path)
    assert list(tmp_path.iterdir()) == []
    fault("download: redirected to http", "used only with the right SHA-256", 2)


def test_offline_the_manual_download_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(Mistake, match="download it by hand to .*ViT-B-32.pt"):
        clip.download("ViT-B/32", tmp_path)


def test_weights_that_only_look_like_some(tmp_path, state):
    """Keys that are not names, sparse tensors, and a configuration with absurd numbers."""
    torch.save({0: torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(Mistake, match="does not contain a state dict"):
        clip.load(tmp_path / "a.pt")
    sparse = {key: x.to_sparse() if key == "text_projection" else x for key, x in state.items()}
    with pytest.raises(Mistake, match="these are not the weights of a CLIP"):
        clip.build(sparse)
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"vision_config": {"num_attention_heads": 1e400}, '
                                          '"text_config": {}}', encoding="utf-8")
    with pytest.raises(Mistake, match="is not the configuration of a CLIP"):
        clip.load(tmp_path / "pytorch_model.bin")
