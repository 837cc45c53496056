"""The separated setting: frames of another network than a CLIP, DistilBERT as the text tower."""
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import clip
import data
import evaluate
import mmn
import retrieve
import train
import video
from extras import features as elsewhere
from extras import prepare
from support.distilbert import DistilBert, is_distilbert
from support import progress
from support.errors import Mistake

h5py = pytest.importorskip("h5py")
transformers = pytest.importorskip("transformers")

WORDS = "a person opens closes the door box red big slowly".split()
T, WIDTH = 8, 40
SIZES = dict(num_clips=4, frames=T, pool_counts=(3,), kernel=3, layers=1, hidden=16, joint=8,
             batch=4, epochs=2, milestones=(), text_from_epoch=1, patience=9, device="cpu")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a random DistilBERT of width 32 and a vocabulary of 15 tokens."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = transformers.DistilBertConfig(vocab_size=15, dim=32, n_layers=2, n_heads=2,
                                           hidden_dim=64, max_position_embeddings=80)
    transformers.DistilBertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]",
                                                 *WORDS]) + "\n")
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A dataset `mine` of 12 videos, four of them for validation, that knows its noun chunks, and
    features.hdf5 in both published forms: 40 wide, 5 to 16 rows (two videos have fewer than T)."""
    root = tmp_path_factory.mktemp("data")
    random, chunks = np.random.default_rng(0), {}
    with h5py.File(root / "features.hdf5", "w") as file:
        for i in range(12):
            x = random.standard_normal((5 + i, WIDTH)).astype(np.float32)
            if i % 2:
                file[f"v{i}"] = x
            else:
                file.create_group(f"v{i}")["c3d_features"] = x
    for split, numbers in (("train", range(8)), ("val", range(8, 12))):
        rows = []
        for i in numbers:
            for verb in ("opens", "closes", "slowly"):
                sentence = f"a person {verb} the door" if verb != "slowly" else "slowly"
                chunks[sentence] = [[0, 8], [len(sentence) - 8, len(sentence)]] \
                    if verb != "slowly" else []
                rows.append(data.Sample(f"v{i}", sentence, 2.0 * (verb == "closes"), 8.0, 16.0))
        data.write_jsonl(root / "mine" / f"{split}.jsonl", rows)
    (root / "mine" / "chunks.json").write_text(json.dumps(chunks))
    adopt(root, "--backbone", "vgg")
    return root


def adopt(root, *arguments, features="features.hdf5", dataset="mine"):
    before = sys.argv
    sys.argv = ["data.py", dataset, "--features", str(root / features), "--root", str(root),
                "--frames", str(T), "--device", "cpu", *arguments]
    try:
        prepare.main()
    finally:
        sys.argv = before


def config(root, out, **changes):
    return train.configure(root=str(root), out=str(out), **{
        "dataset": "mine", "clip": "vgg", "method": "mmn"} | SIZES | changes)


# ----------------------------------------------------------------------------------------- features

def test_stretches_are_averaged_as_in_a_plain_loop():
    """MMN's avgfeats with bounds round(i L / T), up to its last row."""
    for L, count in ((16, 8), (13, 8), (5, 8), (1, 4), (7, 7)):
        x = np.random.default_rng(L).standard_normal((L, 3)).astype(np.float32)
        expected = []
        for i in range(count):
            a, b = round(i / count * L), round((i + 1) / count * L)
            rows = x[a:b] if a < b else x[min(a, L - 1):][:1]
            expected.append(sum(row / np.sqrt((row ** 2).sum()) for row in rows) / len(rows))
        assert np.allclose(elsewhere.stretch_means(x, count), expected, atol=1e-6)


def test_hdf5_of_both_forms_becomes_a_store(root, capsys):
    store = data.open_store("mine", "vgg", root, T)
    made = {key: value for key, value in store.manifest.items() if key != "videos"}
    assert made == {"clip": "vgg", "resolution": 0, "width": WIDTH, "frames": T, "patch_frames": 0,
                    "patch_width": 0, "grid": 0, "precision": "made elsewhere",
                    "sha256": clip.sha256(root / "features.hdf5"), "normalised": False}
    assert len(store.manifest["videos"]) == 12 and prepare.check("mine", root)
    with h5py.File(root / "features.hdf5") as file:
        for name, x in (("v1", file["v1"][()]), ("v2", file["v2"]["c3d_features"][()])):
            assert np.allclose(store.read(name, "frames"), elsewhere.stretch_means(x, T), atol=1e-3)


def test_a_clips_features_from_hdf5_are_the_rows_at_the_centres(world, tmp_path):
    """And a folder with another network's, whose digest is that of names and sizes."""
    x = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["v"] = x
    data.write_jsonl(tmp_path / "mine/train.jsonl", [data.Sample("v", "a door opens", 0, 1, 8.0)])
    (tmp_path / "npy").mkdir()
    np.save(tmp_path / "npy" / "v.npy", x)
    adopt(tmp_path, "--clip", str(world / "shapes" / "clip.pt"), features="f.h5")
    store = data.open_store("mine", "clip.pt", tmp_path, T)
    assert np.array_equal(store.read("v", "frames"), x[1::2]) and store.manifest["resolution"] == 32
    adopt(tmp_path, "--backbone", "other", features="npy")
    one = data.open_store("mine", "other", tmp_path, T).manifest
    assert one["width"] == 64 and len(one["sha256"]) == 64


def test_damaged_and_hostile_hdf5(root, tmp_path):
    (tmp_path / "text.hdf5").write_text("not hdf5")
    for path in (tmp_path / "text.hdf5", tmp_path / "none.hdf5"):
        with pytest.raises(Mistake, match="cannot be read as hdf5"):
            elsewhere.find_features(path)
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["flat"], file["nan"], file["word"] = np.ones(4), np.full((2, 4), np.nan), "text"
        file["good"], file["wide"] = np.ones((2, 4)), np.ones((2, 5))
        file.create_group("empty")
        file.create_dataset("huge", shape=(1 << 40, 4), chunks=(1, 4), dtype="f4")
        file["gone"] = h5py.SoftLink("/nowhere")
        file["type"] = np.dtype("f4")
    features = elsewhere.find_features(tmp_path / "a.hdf5")
    names = [*sorted(features), "none"]
    made = elsewhere.made_elsewhere("x", tmp_path / "a.hdf5", features, names, T)
    store = data.FeatureStore(tmp_path / "store", made)
    failed = elsewhere.adopt_features(store, features, names, dict.fromkeys(names, 4.0))
    assert list(store.manifest["videos"]) == ["good"]
    assert failed.keys() == set(names) - {"good"}
    assert "width 5, but that of the others is 4" in failed["wide"]
    assert "MiB" in failed["huge"] and "nothing" in failed["empty"]
    assert all("\n" not in text for text in failed.values())
    whole = (root / "features.hdf5").read_bytes()
    for cut in range(1, 20):
        (tmp_path / "cut.hdf5").write_bytes(whole[:len(whole) * cut // 20])
        try:
            for entry in elsewhere.find_features(tmp_path / "cut.hdf5").values():
                elsewhere.read_features(entry)
        except Mistake as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("arguments, message", [
    (("--backbone", "a/b"), "cannot be the name of a --backbone"),
    (("--backbone", ""), "cannot be the name of a --backbone"),
    (("--backbone", "ViT-B-32"), "cannot be the name of a --backbone"),
    (("--backbone", "vgg", "--clip", "ViT-B/32"), "not allowed with"),
    (("--backbone", "none"), "has no features of the 12 videos")])
def test_mistakes_of_the_command(root, tmp_path, capsys, arguments, message):
    np.save(tmp_path / "other.npy", np.ones((2, 3)))
    with pytest.raises(SystemExit) as status:
        adopt(root, *arguments, features=tmp_path)
    assert status.value.code == 2 and message in capsys.readouterr().err


def test_a_backbone_needs_features(root, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["data.py", "mine", "--backbone", "vgg", "--root", str(root)])
    with pytest.raises(SystemExit):
        prepare.main()
    assert "add --features" in capsys.readouterr().err


# --------------------------------------------------------------------------------------- DistilBERT

def test_mean_over_the_tokens_as_in_a_plain_loop(bert):
    tower = clip.load_text(str(bert))
    assert isinstance(tower, DistilBert) and tower.output == 32 and not tower.training
    texts = ["a person opens the door", "", "the red box", "unknown words here"]
    tokens = tower.tokenize(texts)
    assert tokens.shape == (4, 77) and tokens[1].tolist() == [2, 3] + [0] * 75
    assert tokens[0, :7].tolist() == [2, 5, 6, 7, 9, 10, 3]
    with torch.no_grad():
        x = tower.encode_text(tokens)
        for row, text in zip(x, texts):
            ids = tower.tokenizer(text, return_tensors="pt")["input_ids"]           # no padding
            states = tower.bert(ids).last_hidden_state[0]
            assert torch.allclose(row, sum(states) / len(states), atol=1e-5)
        assert torch.allclose(x[:1], tower.encode_text(tokens[:1]), atol=1e-5)
        assert tower.encode_text(tokens[:0]).shape == (0, 32)
    long = ["door " * 200]
    cut = tower.tokenize(long, truncate=True)
    assert cut[0, 0] == 2 and cut[0, -1] == 3 and (cut != 0).all()
    with pytest.raises(Mistake, match="202 tokens and DistilBERT reads 77"):
        tower.tokenize(long)


def test_the_tower_from_its_saved_weights(bert, tmp_path):
    tower = clip.load_text(str(bert))
    with torch.no_grad():
        tower.bert.embeddings.word_embeddings.weight += 1
    again = clip.load_text(str(bert), tower.state_dict())
    tokens = tower.tokenize(["a box"])
    assert torch.equal(again.encode_text(tokens), tower.encode_text(tokens))
    state = dict(tower.state_dict())
    state.pop("bert.embeddings.word_embeddings.weight")
    key = "bert.embeddings.word_embeddings.weight"
    for changed in (state, tower.state_dict() | {key: torch.zeros(3, 3)}):      # missing, misshapen
        with pytest.raises(Mistake, match=f"not the weights of this DistilBERT.*{key}"):
            clip.load_text(str(bert), changed)
    with pytest.raises(Mistake, match="not the weights of this DistilBERT.*extra"):
        clip.load_text(str(bert), tower.state_dict() | {"extra": torch.zeros(1)})
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(Mistake, match="cannot be read as a DistilBERT: ValueError it is a gpt2"):
        clip.load_text(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Mistake, match="cannot be read as a DistilBERT"):
        clip.load_text(str(tmp_path))


# --------------------------------------------------------------------------------- the linear layer

def test_the_linear_layer_of_the_frames():
    sizes = dict(width=6, num_clips=4, pool_kernel=2, pool_stride=2, pool_counts=(3,), kernel=3,
                 layers=1, hidden=5, joint=3)
    torch.manual_seed(0)
    plain = mmn.MMN(**sizes)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    same = mmn.MMN(**sizes, features=0)
    assert torch.equal(torch.rand(1), drawn)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(),
                                                 same.state_dict().values(), strict=True))
    assert not any("frame_fc" in key for key in plain.state_dict())
    frames = torch.randn(2, 8, 9)
    assert plain.project(frames) is frames
    model = mmn.MMN(**sizes, features=9)
    weight, bias = model.frame_fc.weight.detach(), model.frame_fc.bias.detach()
    for b in range(2):
        for t in range(8):
            expected = [max(0.0, float(bias[d] + sum(weight[d, w] * frames[b, t, w]
                                                     for w in range(9)))) for d in range(6)]
            assert torch.allclose(model.project(frames)[b, t], torch.tensor(expected), atol=1e-5)
    # the cell of a single clip holds the mean of its two frames
    assert torch.allclose(model.moment_map(frames)[0, :, 1, 1],
                          model.project(frames)[0, 2:4].mean(0), atol=1e-6)
    conv = F.conv1d(frames.transpose(1, 2), weight[:, :, None], bias).relu()    # MMN's featpool.py
    assert torch.allclose(model.project(frames), conv.transpose(1, 2), atol=1e-5)


# ------------------------------------------------------------------------------- train and evaluate

def test_mmn_trains_is_evaluated_and_resumes(root, bert, tmp_path, monkeypatch):
    settings = config(root, tmp_path / "whole", text_clip=str(bert))
    results = train.train(settings)
    run = evaluate.load(tmp_path / "whole" / "ckpt.pt")
    assert run.checkpoint["sizes"]["features"] == WIDTH and isinstance(run.text, DistilBert)
    assert evaluate.evaluate(run) == results and results["val"]["queries"] == 12
    state = run.text.state_dict()
    before = clip.load_text(str(bert)).state_dict()
    if run.checkpoint["epoch"] == 2:            # the second epoch trains the text tower
        assert any(not torch.equal(state[key], before[key]) for key in state)

    add = progress.Run.add

    def stop(self, *values):                    # Ctrl-C in the first step of the second epoch
        add(self, *values)
        if self.epoch == 1:
            raise KeyboardInterrupt
    monkeypatch.setattr(progress.Run, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        train.train(config(root, tmp_path / "parts", text_clip=str(bert)))
    monkeypatch.undo()
    assert train.train(config(root, tmp_path / "parts", text_clip=str(bert)), True) == results
    a, b = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
            for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)

    saved = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    saved["config"]["text_clip"] = str(tmp_path / "distilbert-gone")
    torch.save(saved, tmp_path / "moved.pt")
    with pytest.raises(Mistake, match="^.*distilbert-gone cannot be read as a DistilBERT"):
        evaluate.load(tmp_path / "moved.pt")
    with pytest.raises(Mistake, match="come from vgg, which cannot be run on a video"):
        retrieve.Retriever(tmp_path / "whole" / "ckpt.pt", "cpu")


def test_vdi_attends_to_the_projected_frames(root, bert, tmp_path):
    train.train(config(root, tmp_path / "r", text_clip=str(bert), method="vdi", lambda_sd=0.0,
                       epochs=1))
    lines = (tmp_path / "r" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [json.loads(line) for line in lines]
    assert log[0]["L_vc"] > 0 and "L_sd" not in log[0]
    model = torch.load(tmp_path / "r" / "last.pt", weights_only=True)["model"]
    assert not any(key.startswith("dynamic.") for key in model)
    assert model["context.project.weight"].shape == (32, 32)
    run = evaluate.load(tmp_path / "r" / "ckpt.pt")
    assert evaluate.evaluate(run, query="static")["val"]["queries"] == 12   # "slowly" has no Q^s


def test_vdi_without_eq_5_needs_no_patches_of_a_clip(world, tmp_path):
    """Features of the small CLIP, made elsewhere."""
    store = data.open_store("shapes", "shapes", world)
    names = list(store.manifest["videos"])[:6]
    (tmp_path / "npy").mkdir()
    for name in names:
        np.save(tmp_path / "npy" / f"{name}.npy", store.read(name, "frames"))
    data.write_jsonl(tmp_path / "mine/train.jsonl",
                     [data.Sample(name, "a door opens", 0, 1, 8.0) for name in names])
    (tmp_path / "mine/chunks.json").write_text('{"a door opens": [[0, 6]]}')
    path = str(world / "shapes" / "clip.pt")
    adopt(tmp_path, "--clip", path, features="npy")
    settings = dict(method="vdi", epochs=1, clip=path)
    with pytest.raises(Mistake, match="--lambda-sd 0"):
        train.train(config(tmp_path, tmp_path / "a", **settings))
    train.train(config(tmp_path, tmp_path / "a", **settings, lambda_sd=0.0))
    sizes = evaluate.load(tmp_path / "a" / "ckpt.pt").checkpoint["sizes"]
    assert "features" not in sizes and sizes["width"] == 64


def test_a_clips_frames_with_distilbert(world, bert, tmp_path):
    """All of Eq. 1-5, on frames that the linear layer maps to the width of DistilBERT."""
    settings = config(world, tmp_path, dataset="shapes", clip="shapes", method="vdi",
                      text_clip=str(bert), frames=32)
    store = data.open_store("shapes", "shapes", world)
    model, _ = train.start(settings, store.manifest, torch.device("cpu"))
    videos, _ = data.training_videos(settings, store, model.text.tokenize)
    losses = train.terms(model, next(iter(videos["train"].batches(4))), settings)
    assert {"L_iou", "L_cl", "L_vc", "L_sd"} < losses.keys()
    assert all(value.isfinite() for value in losses.values())
    losses["L_sd"].backward()
    assert model.retriever.frame_fc.weight.grad.abs().max() > 0


def test_mistakes_of_training(root, bert, tmp_path):
    for changes, message in (
            (dict(), "vgg has no text tower; add --text-clip distilbert"),
            (dict(text_clip="shuffled"), "vgg has no text tower"),
            (dict(text_clip=str(bert), method="vdi"), "no patches.* use --lambda-sd 0"),
            (dict(text_clip=str(bert), method="vdi-staged"), "needs a CLIP for both"),
            (dict(text_clip=str(tmp_path / "distilbert-none")), "cannot be read as a DistilBERT")):
        with pytest.raises(Mistake, match=message):
            train.train(config(root, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()


def test_a_config_beside_the_work_is_nobodys(tmp_path, monkeypatch):
    """A checkpoint without another text tower names none, whatever lies in the current folder."""
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert not is_distilbert("")
