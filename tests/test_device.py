"""`--device` where there is no GPU: everything that runs on one, on the simulated device
(simulated_device.py), gives the results of the CPU. Each case then removes single moves between
devices from the code, and shows that it would have noticed."""
import argparse
import contextlib
import dataclasses
import inspect
import json
import shutil
import sys
import textwrap
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils.data._utils.pin_memory import pin_memory

import clip
import clip2video.data
import clip2video.evaluate
import clip2video.model
import clip2video.search
import clip2video.train
import data
import evaluate
import mmn
import retrieve
import shapes
import simulated_device
import staged
import train
import video
from extras import gpu_day, index, probe, readings, reproduce, search, zero_shot
from simulated_device import BACKEND, DEVICE, NAME, WrongDevice
from support import errors, parallel, progress

SENTENCES = ["the green circle blinks", "the maroon heart rises"]
PICK = parallel.pick_device


@pytest.fixture
def device(monkeypatch):
    """The simulated device, under the name `--device simulated`."""
    monkeypatch.setattr(parallel, "pick_device",
                        lambda name: DEVICE if name.startswith(NAME) else PICK(name))
    with simulated_device.mode() as mode:
        yield mode


@contextlib.contextmanager
def without(owner, name: str, text: str, instead: str = ""):
    """A planted fault: the function `name` of a module or class without `text`."""
    function = getattr(owner, name)
    source = textwrap.dedent(inspect.getsource(function))
    assert text in source, f"{name} no longer contains {text}"
    scope = {}
    code = compile(source.replace(text, instead), inspect.getsourcefile(function), "exec")
    exec(code, sys.modules[function.__module__].__dict__, scope)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, scope[name])
        yield


def is_caught(work, owner, name: str, text: str, instead: str = "") -> None:
    """Does `work` fail without `text` because a tensor is on the wrong device?"""
    with without(owner, name, text, instead), pytest.raises(
            (WrongDevice, TypeError), match=NAME):
        work()


def close(ours, theirs, tolerance: float = 1e-4) -> None:
    """Nested results are equal up to rounding, and ours hold nothing on the device."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, torch.Tensor):
        assert ours.device.type == "cpu" and torch.allclose(ours.double(), theirs.double(),
                                                            atol=tolerance, rtol=tolerance)
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for pair in zip(ours, theirs):
            close(*pair, tolerance)
    else:
        assert ours == (pytest.approx(theirs, abs=tolerance, rel=tolerance)
                        if isinstance(theirs, float) else theirs)


# -------------------------------------------------------------------------------- the device itself

def test_tensors_of_two_devices_do_not_meet(device):
    here, there = torch.arange(6.).view(2, 3), torch.arange(6.).view(2, 3).to(NAME)
    i = torch.tensor([1, 0])
    for work in (lambda: here + there, lambda: here @ there.T, lambda: torch.cat([here, there]),
                 lambda: here[i.to(NAME)], lambda: torch.stack([here[0, 0], there[0, 0]]),
                 lambda: F.linear(there, here), lambda: here.add_(there),
                 lambda: there.index_copy(0, i, there), lambda: there.gather(1, i[:, None]),
                 lambda: there.__setitem__(i, here)):
        with pytest.raises(WrongDevice):
            work()
    with pytest.raises(TypeError):
        there.numpy()
    # what a GPU allows, too
    for x in (there * torch.tensor(2.0), there[i], there.clone().copy_(here), there.double()):
        assert x.device == DEVICE
    assert there[i].cpu().tolist() == here[i].tolist() == there[i].tolist()
    assert here.clone().copy_(there).device.type == "cpu"
    there[i, 0] = torch.tensor(7.0)
    assert there[:, 0].tolist() == [7, 7] and torch.zeros(2, device=NAME).device == DEVICE


def test_what_waits_is_counted(device):
    x = torch.ones(3, device=NAME)
    evaluate.cell_recall(x)                     # .item() three times
    assert device.synchronisations == {"evaluate.py:cell_recall": 3}


# ----------------------------------------------------------------------------------------- training

def settings(world, out, device, method="vdi", **changes):
    return train.configure(**{"dataset": "shapes", "method": method, "root": str(world),
                              "epochs": 1, "batch": 8, "stage_steps": 5, "device": device,
                              "out": str(out), **changes})


def trained(config, resume: bool = False) -> dict:
    """What a run ends with, without its times."""
    torch.manual_seed(0)
    results = train.train(config, resume)
    rows = [json.loads(line) for line in (config.folder / "log.jsonl").read_text().splitlines()]
    return {"log": [{name: float(value) for name, value in row.items()
                     if name.startswith(("L", "var", "cos"))} for row in rows],
            "splits": list(results)}


MOVES = {   # where one move too few must be noticed
    "mmn": [(data.Batch, "to", "value.to(device, non_blocking=True)", "value"),
            (train, "start", ".to(device)")],
    "vdi": [(data.Batch, "to", "value.to(device, non_blocking=True)", "value"),
            (mmn, "contrastive_loss", "margin * torch.eye(S, device=iou.device)",
             "margin * torch.eye(S)")],
    "2d-tan": [(data.Batch, "to", "value.to(device, non_blocking=True)", "value"),
               (evaluate, "predict", "b.tokens[QUERIES[query]]", "b.tokens[QUERIES[query]].cpu()")],
    "change": [(staged, "stage_targets", "part.to(device)", "part"),
               (staged, "temporal_change", ", device=frames.device"),
               (staged, "query_cosine", "truncate=True).to(device)", "truncate=True)")],
    "random": [(staged, "control", "].to(target.device)", "]")],
    "rotated": [(staged, "control", "rotation.to(target.device)", "rotation")],
    "shuffled": [(staged, "adapt_text_tower", "parallel.share(chosen)].to(device)",
                  "parallel.share(chosen)]")],
    "mean": [(staged, "temporal_change", ", device=frames.device")],
    "whole": [(staged, "stage_targets", "batch = batch.to(device)", "pass")],
}
RUNS = {"mmn": dict(method="mmn"), "vdi": dict(), "2d-tan": dict(method="mmn", retriever="2d-tan"),
        **{target: dict(method="vdi-staged", stage_target=target) for target in staged.TARGETS}}


@pytest.mark.parametrize("name", RUNS)
def test_training(world, tmp_path, device, name):
    """An epoch has the losses of the CPU's, up to rounding."""
    ours, theirs = (trained(settings(world, tmp_path / kind, kind, **RUNS[name]))
                    for kind in (NAME, "cpu"))
    close(ours, theirs, 1e-3)
    for i, (owner, function, text, *instead) in enumerate(MOVES[name]):
        is_caught(lambda: trained(settings(world, tmp_path / f"{i}", NAME, **RUNS[name])),
                  owner, function, text, *instead)


def test_a_step_of_every_row_of_every_table(world, device):
    """Stage 1's target and the losses with their gradients, on the world's own CLIP and features
    (without the LSTM, which this device lacks)."""
    given = reproduce.parse_arguments(["table1", "--root", str(world), "--device", NAME])
    steps = {}
    for what in reproduce.TABLES:
        for config in filter(None, reproduce.configs_of(what, 0, given)):
            text = config.text_clip if config.text_clip == "shuffled" else ""
            config = dataclasses.replace(config, dataset="shapes", clip="shapes", text_clip=text,
                                         lr=1.0, text_lr=1.0, epochs=1, text_from_epoch=0,
                                         limit_videos=4, batch=4, out="")
            if config.sequence != "lstm":
                steps[repr(config)] = config
    store = data.open_store("shapes", "shapes", str(world))
    assert len(steps) >= 30
    for config in steps.values():
        with readings.applied(config):
            model, _ = train.start(config, store.manifest, DEVICE)
            videos = data.training_videos(config, store, model.text.tokenize)[0]["train"]
            if config.method == "vdi-staged":
                assert staged.stage_targets(model.text, videos, config, DEVICE)[0].device == DEVICE
            losses, _ = train.terms(model, next(iter(videos.batches(4))).to(DEVICE), config)
            train.total_loss(losses, config, 0).backward()
            assert all(torch.isfinite(loss.cpu()) for loss in losses.values())


@pytest.mark.parametrize("first, second", [(NAME, "cpu"), ("cpu", NAME), (NAME, NAME)])
def test_resuming_on_another_kind_of_device(world, tmp_path, device, monkeypatch, first, second):
    """The second of two epochs elsewhere: the losses of a whole run; and the state of the device's
    random generator comes back on its own kind only."""
    whole = trained(settings(world, tmp_path / "whole", "cpu", epochs=2))
    save, state = progress.Run.save, torch.arange(16, dtype=torch.uint8)

    def save_and_stop(run):
        save(run)
        if run.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(BACKEND, "random_state", state, raising=False)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(progress.Run, "save", save_and_stop)
        trained(settings(world, tmp_path / "parts", first, epochs=2))
    BACKEND.random_state = torch.zeros(16, dtype=torch.uint8)
    resumed = settings(world, tmp_path / "parts", second, epochs=2)
    close(trained(resumed, resume=True), whole, 1e-3)
    assert BACKEND.random_state.any() == (first == second)


def test_a_checkpoint_from_the_other_device(world, tmp_path, device):
    """What the device saved is what the CPU loads, and the other way round."""
    predictions = {}
    for kind in (NAME, "cpu"):
        trained(settings(world, tmp_path / kind, kind))
        saved = torch.load(tmp_path / kind / "ckpt.pt", weights_only=True)
        assert {x.device.type for x in saved["retriever"].values()} == {"cpu"}
        for other in (DEVICE, "cpu"):
            run = evaluate.load(tmp_path / kind / "ckpt.pt", other)
            assert run.retriever.cells.device.type == torch.device(other).type
            predictions[kind, str(other)] = [predicted for _, _, predicted
                                             in evaluate.answers(run, ["val"], device=other)]
    for kind in (NAME, "cpu"):
        close(predictions[kind, str(DEVICE)], predictions[kind, "cpu"])
    is_caught(lambda: evaluate.evaluate(evaluate.load(tmp_path / "cpu" / "ckpt.pt", DEVICE)),
              evaluate, "predict", "b = b.to(device)", "pass")


WAITS = {   # per step: for the length of the longest sentence, for the losses, for Eq. 2 and Eq. 5
    "mmn": (1, 1, 0), "2d-tan": (1, 1, 0), "vdi": (1, 1, 2)}


@pytest.mark.parametrize("name", WAITS)
def test_how_often_a_step_waits(world, tmp_path, device, monkeypatch, name):
    """Python reads a value of the device two to four times per step, and adding one is noticed."""
    def waits() -> dict:
        device.synchronisations.clear()
        with monkeypatch.context() as patch:
            patch.setattr(train, "validate", lambda *arguments: {})
            patch.setattr(progress.Run, "save", lambda run: device.synchronisations.clear())
            steps, counts = progress.Run.end_epoch, {}
            patch.setattr(progress.Run, "end_epoch", lambda run, metrics: (
                counts.update(device.synchronisations), steps(run, metrics))[1])
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
            train.train(settings(world, tmp_path / "run", NAME, **RUNS[name]))
        return counts

    lengths, losses, injections = (3 * n for n in WAITS[name])          # three steps
    expected = {"clip.py:encode_text": lengths, "support/progress.py:is_finite": losses,
                **({"train.py:injection_loss": injections} if injections else {})}
    assert waits() == expected
    with without(progress.Run, "add", "value.detach()", "value.item()"):
        assert waits()["support/progress.py:add"] >= 6


# ------------------------------------------------------------------------- evaluation and retrieval

@pytest.fixture(scope="module")
def checkpoint(world, tmp_path_factory):
    config = settings(world, tmp_path_factory.mktemp("run") / "r", "cpu", "mmn")
    train.train(config)
    return config.folder / "ckpt.pt"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three short videos of the shapes world, as mp4."""
    folder = tmp_path_factory.mktemp("videos")
    shapes.export(folder, 3)
    return folder


def test_evaluation_and_clip_alone(world, checkpoint, device):
    """evaluate.py of a checkpoint and of CLIP alone, and extras/zero_shot.py found."""
    def all_three(kind) -> list:
        return [evaluate.evaluate(evaluate.load(checkpoint, kind), device=kind),
                evaluate.evaluate(zero_shot.run_of("shapes", "shapes", str(world), kind),
                                  ["val"], device=kind),
                list(zero_shot.z_scores(zero_shot.run_of("shapes", "shapes", str(world), kind),
                                        "val", kind))]

    close(all_three(DEVICE), all_three(torch.device("cpu")), 1e-3)
    for owner, name, text, *instead in (
            (evaluate, "evaluate", "run.retriever.cells.cpu()", "run.retriever.cells"),
            (evaluate, "predict", "candidates=retriever.candidates).cpu()",
             "candidates=retriever.candidates)"),
            (retrieve, "zero_shot_scores", ".to(frames.device)", ""),
            (zero_shot, "z_scores", ".float().to(device)", ".float()"),
            (zero_shot, "run_of", "clip.read_state(path)).to(device)", "clip.read_state(path))")):
        is_caught(lambda: all_three(DEVICE), owner, name, text, *instead)


def test_extraction(world, videos, tmp_path, device):
    """video.extract writes the same features, with patches."""
    def features(kind, folder) -> list:
        model = clip.load(world / "shapes" / "clip.pt", kind)
        store = data.FeatureStore(folder, video.made_by(model, "shapes", "", 8, 2))
        paths = video.find_files(videos, video.VIDEOS)
        assert video.extract(store, model, paths, list(paths), set(paths)) == {}
        return [torch.from_numpy(store.read(name, part)) for name in paths
                for part in ("frames", "patches")]

    close(features(DEVICE, tmp_path / "a"), features("cpu", tmp_path / "b"), 2e-3)
    for i, (text, instead) in enumerate((("y.half().cpu()", "y.half()"), (".to(device)", ""))):
        is_caught(lambda: features(DEVICE, tmp_path / f"{i}"), video, "encode_frames", text,
                  instead)
    is_caught(lambda: features(DEVICE, tmp_path / "c"), clip, "normalise",
              ", device=pixels.device")


def test_retrieval_index_and_search(world, checkpoint, videos, tmp_path, device):
    """retrieve.py, extras/index.py and extras/search.py, with a checkpoint and by CLIP alone."""
    def all_of_it(kind, folder) -> list:
        results = []
        for retriever, made in (
                (retrieve.Retriever(checkpoint, kind, cache=None), str(checkpoint)),
                (retrieve.ZeroShot("shapes", kind, cache=None, root=str(world)), None)):
            encoded = retriever.encode(videos / "test-0000.mp4")
            results += [[list(moment) for answer in retrieve.answers_of(
                retriever, encoded, SENTENCES, 2) for moment in answer.moments],
                retriever.curve(encoded, SENTENCES)]
            own = index.Index(folder / retriever.kind, index.made_with(retriever, made))
            assert own.update(retriever, videos) == {}
            results.append([list(hit.moment) for hits in search.search(own, retriever, SENTENCES, 3)
                            for hit in hits])
        return results

    close(all_of_it(NAME, tmp_path / "a"), all_of_it("cpu", tmp_path / "b"), 5e-3)
    for i, (owner, name, text, instead) in enumerate((
            (retrieve.Retriever, "windows", ".to(self.device)", ""),
            (retrieve.Retriever, "text", ".to(self.device)", ""),
            (retrieve.Retriever, "scores", ".cpu())", ")"),
            (retrieve.Retriever, "moments", "transpose(1, 2).cpu()", "transpose(1, 2)"),
            (retrieve.ZeroShot, "text", ".to(self.device)", ""),
            (retrieve.ZeroShot, "text", "dim=1).cpu()", "dim=1)"),
            (search, "search", "contrastive_text.cpu()", "contrastive_text"))):
        is_caught(lambda: all_of_it(NAME, tmp_path / f"{i}"), owner, name, text, instead)


def test_clip2video(world, tmp_path, device, monkeypatch):
    """Training, with the image tower, too, and evaluation; index and ranking."""
    monkeypatch.setattr(clip2video.data, "FAMILIES", {"train": 4, "val": 2, "test": 2})
    (tmp_path / "shapes").symlink_to(world / "shapes")
    shapes.export(tmp_path / "videos", 2)

    def all_of_it(kind, folder, images: bool) -> list:
        config = clip2video.model.configure(
            root=str(tmp_path), device=str(kind), out=str(folder), epochs=1, batch=8, frames=4,
            train_images=images)
        metrics = clip2video.train.train(config)
        clip2video.search.update_index(folder / "ckpt.pt", tmp_path / "videos", folder / "index",
                                       kind, str(tmp_path))
        ranker = clip2video.search.Ranker(folder / "index", kind, str(tmp_path))
        return [metrics["videos"], json.loads((folder / "log.jsonl").read_text())["L"],
                [score for best in ranker.best(SENTENCES, 2) for _, score in best]]

    for images in (False, True):
        close(*(all_of_it(kind, tmp_path / f"{kind.type}{images}", images)
                for kind in (DEVICE, torch.device("cpu"))), 1e-3)
    for i, (images, owner, name, text, instead) in enumerate((
            (False, clip2video.train, "loop", "frames.to(device)", "frames"),
            (False, clip2video.train, "loop", "training.mask[batch.index].to(device)",
             "training.mask[batch.index]"),
            (True, clip2video.train, "loop", "draw).to(device)", "draw)"),
            (False, clip2video.train, "vectors", "ids.to(device)", "ids"),
            (False, clip2video.train, "vectors", "torch.cat(texts).cpu()", "torch.cat(texts)"),
            (False, clip2video.search, "update_index", "[None].to(device)", "[None]"))):
        is_caught(lambda: all_of_it(DEVICE, tmp_path / f"fault{i}", images), owner, name, text,
                  instead)


def test_probes_and_tables(world, tmp_path, device, monkeypatch):
    """Supplement, Table 1 and Fig. 1, a row of Table 1, and CLIP alone, as extras/reproduce.py
    makes them."""
    triplets = probe.shape_triplets
    monkeypatch.setattr(probe, "shape_triplets", lambda kind, count, seed: triplets(kind, 12, seed))
    monkeypatch.chdir(tmp_path)

    def tables(kind) -> list:
        monkeypatch.setattr(reproduce, "RESULTS", tmp_path / f"results-{kind}")
        given = argparse.Namespace(dataset="shapes", seeds=1, device=kind, root=str(world), jobs=1,
                                   fresh=False, svo=None, images=None, video=None, figures=False,
                                   select_on_test=False, allow_missing=False)
        row = reproduce.Row("x", dict(method="vdi", epochs=1))
        config = reproduce.config_of(row, "shapes", 0, given)
        shutil.rmtree(config.folder, ignore_errors=True)
        return [reproduce.s_table1(given), reproduce.s_fig1(given), reproduce.clip_alone(given),
                reproduce.run(config)["results"]["val"]["queries"]]

    assert tables(NAME) == tables("cpu")
    for owner, name, text, instead in (
            (probe, "triplet_scores", "for image in images]).to(device)", "for image in images])"),
            (probe, "end_token_attention", ", device=x.device", ""),
            (probe, "word_weights", "truncate=True).to(device)", "truncate=True)")):
        shutil.rmtree(tmp_path / f"results-{NAME}", ignore_errors=True)
        is_caught(lambda: tables(NAME), owner, name, text, instead)


# ------------------------------------------------------------------ what a GPU does otherwise

def test_out_of_memory_on_the_device(world, tmp_path, device, monkeypatch, capsys):
    """One sentence that names what to lower."""
    run = simulated_device.run

    def too_large(function, *arguments):
        if function is torch.ops.aten.convolution.default:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return run(function, *arguments)

    monkeypatch.setattr(simulated_device, "run", too_large)
    monkeypatch.setattr(sys, "argv", ["train.py", "--root", str(world), "--device", NAME,
                                      "--method", "mmn", "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as left:
        train.main()
    assert left.value.code == 2 and "out of memory; lower --batch" in capsys.readouterr().err


def test_batches_for_a_gpu_are_pinned(world, monkeypatch):
    """Pinning keeps everything of a batch; the CPU's and the simulated device's are not pinned."""
    store = data.open_store("shapes", "shapes", world)
    split = data.Videos(data.read_annotations("shapes", "val", world), store, 16,
                        data.parser_of("shapes", world))
    assert split.batches(4, device="cuda:1").pin_memory
    assert not split.batches(4).pin_memory and not split.batches(4, device=DEVICE).pin_memory
    seen = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x, *a: seen.append(x) or x)
    batch = next(iter(split.batches(4)))
    pinned = pin_memory(batch)
    assert isinstance(pinned, data.Batch) and pinned.videos == batch.videos
    assert len(seen) == sum(isinstance(value, torch.Tensor) for value in batch) == 8
    # training, evaluation and stage 1 ask for it
    asked = []
    monkeypatch.setattr(data.loading, "batches", lambda *a: asked.append(a[-1]) or [])
    split.batches(4, None, 0, torch.device("cuda", 1))
    assert asked == [torch.device("cuda", 1)]


def test_a_gpu_for_each_process(monkeypatch):
    """LOCAL_RANK chooses the GPU, which becomes torch's current one, in full float32; NCCL joins
    the processes of GPUs, gloo those of CPUs. All three devices have the fused optimiser."""
    current, joined = [], []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for name in ("auto", "cuda", "cuda:3"):
        parallel.pick_device(name)
    assert current == [torch.device("cuda", i) for i in (2, 2, 3)]
    assert not torch.backends.cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    with pytest.raises(errors.Mistake, match="'cuda:4' is not available"):
        parallel.pick_device("cuda:4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda name, **more: joined.append(name))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for kind in ("cuda", "cpu"):
        with parallel.processes(torch.device(kind)):
            pass
    assert joined == ["nccl", "gloo"]
    assert {"cpu", "cuda", "mps"} <= set(_get_fused_kernels_supported_devices())


def test_the_random_state_of_a_gpu_is_kept_by_kind(monkeypatch):
    """cuda's is restored on cuda only; the CPU's is torch's own."""
    states = {"cuda": torch.ones(16, dtype=torch.uint8)}
    module = types.SimpleNamespace(get_rng_state=lambda: states["cuda"],
                                   set_rng_state=lambda state: states.update(now=state))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    saved = progress.device_rng(torch.device("cuda", 1))
    assert saved.keys() == {"cuda"} and progress.device_rng(torch.device("cpu")) == {}
    progress.set_device_rng(torch.device("mps"), saved)
    assert "now" not in states
    progress.set_device_rng(torch.device("cuda", 0), saved)
    assert torch.equal(states["now"], saved["cuda"])


def test_bfloat16_in_both_towers_and_the_retriever(world):
    """By the CPU's autocast: the towers and the convolutions compute in bfloat16, losses and
    gradients are float32 and near those without it."""
    results = {}
    for bf16 in (False, True):
        config = settings(world, "unused", "cpu", bf16=bf16)
        store = data.open_store("shapes", "shapes", world)
        model, _ = train.start(config, store.manifest, torch.device("cpu"))
        split = data.Videos(data.read_annotations("shapes", "train", world), store, 16,
                            data.parser_of("shapes", world), True)
        seen = {}
        for name, module in (("text", model.text.transformer.resblocks[0].mlp),
                             ("head", model.retriever.iou_moment)):
            module.register_forward_hook(
                lambda module, _, output, name=name: seen.update({name: output.dtype}))
        losses, _ = train.terms(model, next(iter(split.batches(6))), config)
        train.total_loss(losses, config, 0).backward()
        expected = torch.bfloat16 if bf16 else torch.float32
        assert seen == {"text": expected, "head": expected}
        assert {value.dtype for value in losses.values()} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        tower = clip.load(world / "shapes" / "clip.pt")
        pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0),
                               dtype=torch.uint8)
        x, _ = video.encode_frames(tower, pixels, 4, torch.bfloat16 if bf16 else torch.float32)
        results[bf16] = {**{k: v.item() for k, v in losses.items()}, "x": x.float()}
        half, _ = video.encode_frames(tower, pixels, 4, torch.float16)      # --precision fp16
        assert F.cosine_similarity(half.float(), x.float()).min() > 0.999
    ours, theirs = results[True], results[False]
    assert F.cosine_similarity(ours.pop("x"), theirs.pop("x")).min() > 0.999
    assert ours == pytest.approx(theirs, rel=2e-2) and ours != theirs


def test_gpu_day(world, tmp_path, monkeypatch, capsys):
    """On the CPU, on its smallest scale: no difference, a row for each setting; and a part that
    fails is listed, while the others run."""
    monkeypatch.setattr(gpu_day, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu_day", "--device", "cpu", "--small", "--root",
                                      str(world)])
    gpu_day.main()
    result = json.loads((tmp_path / "cpu.json").read_text())
    assert len(result["equality"]) == 13 and not any(result["equality"].values())
    assert len(result["runs"]) == 8 and max(result["runs"].values()) < 1e-5
    assert len(result["training"]) == 36 and all(row["steps/s"] > 0 for row in result["training"])
    assert "| activitynet | 2d-tan | bf16, channels-last |" in capsys.readouterr().out
    monkeypatch.setattr(gpu_day, "whole_runs", lambda *arguments: {"x": 1.0})
    monkeypatch.setattr(gpu_day, "training", lambda *arguments: 1 / 0)
    with pytest.raises(SystemExit):
        gpu_day.main()
    shown = capsys.readouterr().err
    assert "training: ZeroDivisionError" in shown and "x differs by 1.0e+00" in shown


def test_gpu_day_compares_two_devices(device, monkeypatch):
    """Its comparisons on the simulated device; a product that is 1 % too large is noticed."""
    assert max(gpu_day.equality(DEVICE, small=True).values()) < gpu_day.TOLERANCE
    run = simulated_device.run

    def wrong(function, args, kwargs):
        result = run(function, args, kwargs)
        if function is torch.ops.aten.mm.default and isinstance(result, simulated_device.Simulated):
            result.held.mul_(1.01)
        return result

    monkeypatch.setattr(simulated_device, "run", wrong)
    assert max(gpu_day.equality(DEVICE, small=True).values()) > gpu_day.TOLERANCE
