"""`--device`: what runs on another device gives the results of the CPU. Without options the device
is simulated (simulated_device.py); with `pytest --device cuda tests/test_device.py` it is a GPU."""
import dataclasses
import json
import sys
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._foreach_utils import _get_fused_kernels_supported_devices
from torch.utils.data._utils.pin_memory import pin_memory

import clip
import data
import evaluate
import mmn
import retrieve
import shapes
import simulated_device
import staged
import train
import video
from extras import features as elsewhere
from extras import bench, index, probe, search, zero_shot
from simulated_device import BACKEND, DEVICE, NAME, WrongDevice
from support import errors, files, parallel, progress

CPU = torch.device("cpu")
SENTENCES = ["the green circle blinks", "the maroon heart rises"]
PICK = parallel.pick_device


@pytest.fixture
def simulated(monkeypatch):
    """The simulated device, under the name `--device simulated`."""
    monkeypatch.setattr(parallel, "pick_device",
                        lambda name: DEVICE if name.startswith(NAME) else PICK(name))
    with simulated_device.mode() as mode:
        yield mode


@pytest.fixture
def device(request) -> torch.device:
    """The device that is compared with the CPU."""
    if request.config.getoption("--device"):
        return PICK(request.config.getoption("--device"))
    request.getfixturevalue("simulated")
    return DEVICE


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


def near(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-3) -> None:
    """Equal up to the rounding of float32 without TF32, as a share of the largest value."""
    difference = (ours.detach().cpu() - theirs.detach()).abs().max()
    assert difference <= tolerance * theirs.detach().abs().max().clamp(min=1e-6)


# -------------------------------------------------------------------------------- the device itself

def test_tensors_of_two_devices_do_not_meet(simulated):
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
    for x in (there * torch.tensor(2.0), there[i], there.clone().copy_(here), there.half()):
        assert x.device == DEVICE
    assert there[i].cpu().tolist() == here[i].tolist() == there[i].tolist()
    assert here.clone().copy_(there).device.type == "cpu"
    there[i, 0] = torch.tensor(7.0)
    assert there[:, 0].tolist() == [7, 7] and torch.zeros(2, device=NAME).device == DEVICE


def test_there_is_no_float64(simulated):
    """As on mps. Nothing computes in it on the device, and the CPU still may."""
    x = torch.ones(3, device=NAME)
    for work in (lambda: x.double(), lambda: torch.ones(3, dtype=torch.double).to(NAME),
                 lambda: torch.zeros(3, dtype=torch.double, device=NAME)):
        with pytest.raises(TypeError, match="float64"):
            work()
    assert x.cpu().double().dtype == torch.double


def test_what_waits_is_counted(simulated):
    """encode_text reads the length of the longest sentence."""
    model = shapes.shipped(0).to(NAME)
    model.encode_text(clip.tokenize(SENTENCES).to(NAME))
    assert simulated.synchronisations == {"clip.py:encode_text": 1}


# ------------------------------------------------------------------ towers, losses, steps, decoding

@pytest.fixture
def is_real(request) -> bool:
    """Is it worth comparing the published sizes? The simulated device only knows where tensors are.
    """
    return bool(request.config.getoption("--device"))


def encoded_by_both_towers(device: torch.device, is_real: bool) -> list[torch.Tensor]:
    model = (bench.random_clip() if is_real else shapes.shipped(0)).to(device)
    R = model.visual.resolution
    images = torch.randint(0, 256, (4, 3, R, R), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return [*model.encode_image(clip.normalise(images.to(device))),
                model.encode_text(clip.tokenize(SENTENCES).to(device))]


def test_towers(device, is_real):
    """Frames, patches and sentences, of random images."""
    for ours, theirs in zip(encoded_by_both_towers(device, is_real),
                            encoded_by_both_towers(CPU, is_real)):
        near(ours, theirs)


def test_a_wrong_product_is_noticed(simulated, monkeypatch):
    """One that is 1 % too large."""
    run = simulated_device.run

    def wrong(function, args, kwargs):
        result = run(function, args, kwargs)
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) \
                and isinstance(result, simulated_device.Simulated):
            result.held.mul_(1.01)
        return result

    monkeypatch.setattr(simulated_device, "run", wrong)
    with pytest.raises(AssertionError):
        test_towers(DEVICE, is_real=False)


def one_step(config: train.Config, device: torch.device) -> tuple[dict, list[torch.Tensor]]:
    """The terms of Eq. 11 and the weights after a step, with random features and sentences."""
    batch = bench.random_batch(config)
    words = torch.randint(1, 49406, batch.tokens[..., 1:12].shape)
    batch.tokens[..., 1:12] = words             # bench's sentences are all the same
    batch = batch.to(device)
    model = bench.random_model(config).to(device)
    # plain SGD: Adam turns the rounding of a vanishing gradient into a step of full size
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    losses = train.terms(model, batch, config)
    train.total_loss(losses, config, epoch=0).backward()
    nn.utils.clip_grad_norm_(model.parameters(), train.CLIP_NORM)
    optimiser.step()
    return losses, list(model.parameters())


@pytest.mark.parametrize("method", ["mmn", "vdi"])
def test_a_step(device, is_real, method):
    """At the setting of Charades-STA; on the simulated device with two narrow layers."""
    config = train.configure(dataset="charades", method=method, batch=4)
    if not is_real:
        config = dataclasses.replace(config, layers=2, hidden=16, batch=2)
    ours, weights = one_step(config, device)
    theirs, expected = one_step(config, CPU)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        near(ours[name], value)
    for x, y in zip(weights, expected):
        near(x, y)


def test_decoding(device):
    """The five best of ActivityNet-Captions' 1,104 candidates, for 64 queries."""
    config = train.configure(dataset="activitynet")
    candidates = mmn.MomentMap(config.num_clips, 4, 4, config.pool_counts).candidates
    assert candidates.sum() == 1104
    scores = torch.rand(64, 64, 64, generator=torch.Generator().manual_seed(0))
    durations_sec = torch.full((64,), 30.0)
    ours = mmn.decode(scores.to(device), durations_sec.to(device), 5,
                      candidates=candidates.to(device))
    near(ours, mmn.decode(scores, durations_sec, 5, candidates=candidates), 1e-6)


# ----------------------------------------------------------------------------------------- training

def settings(world, out, device, method="vdi", **changes):
    return train.configure(**{"dataset": "shapes", "method": method, "root": str(world),
                              "epochs": 1, "batch": 8, "stage_steps": 5, "device": str(device),
                              "out": str(out), **changes})


def trained(config, resume: bool = False) -> dict:
    """What a run ends with, without its times."""
    torch.manual_seed(0)
    results = train.train(config, resume)
    log = (config.folder / "log.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in log.splitlines()]
    return {"log": [{name: float(value) for name, value in row.items()
                     if name.startswith(("L", "var", "cos"))} for row in rows],
            "splits": list(results)}


RUNS = {"mmn": dict(method="mmn"), "vdi": dict()}
for target in staged.TARGETS:
    RUNS[target] = dict(method="vdi-staged", stage_target=target)


@pytest.mark.parametrize("name", RUNS)
def test_training(world, tmp_path, device, name):
    """An epoch has the losses of the CPU's, up to rounding."""
    ours = trained(settings(world, tmp_path / "ours", device, **RUNS[name]))
    close(ours, trained(settings(world, tmp_path / "theirs", CPU, **RUNS[name])), 1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_a_missing_move_is_noticed(world, tmp_path, simulated, monkeypatch, name):
    """Batches that stay on the CPU end every kind of run."""
    monkeypatch.setattr(data.Batch, "to", lambda batch, device: batch)
    with pytest.raises(WrongDevice, match=NAME):
        trained(settings(world, tmp_path / "run", DEVICE, **RUNS[name]))


@pytest.mark.parametrize("changes", [
    dict(context_query="full"), dict(context_query="none"), dict(context_query="half"),
    dict(inject_into="full"), dict(forms="con-con"), dict(forms="rel-rel"), dict(lambda_sd=0.0),
    dict(lambda_vc=0.0), dict(mask="something"), dict(text_clip="shuffled"),
    dict(method="vdi-staged", context_query="none"),
    dict(method="vdi-staged", inject_into="full")], ids=str)
def test_a_step_of_what_the_tables_compare(world, device, changes):
    """Stage 1's target and the losses with their gradients, on the world's own CLIP and features
    (without the LSTM, which the simulated device lacks)."""
    config = settings(world, "unused", device, **changes)
    store = data.open_store("shapes", "shapes", str(world))
    model, _ = train.start(config, store.manifest, device)
    videos = data.training_videos(config, store, model.text.tokenize)[0]["train"]
    if config.method == "vdi-staged":
        target, _ = staged.stage_targets(model.text, videos, config, device)
        assert target.device.type == device.type
    losses = train.terms(model, next(iter(videos.batches(4))).to(device), config)
    train.total_loss(losses, config, 0).backward()
    assert all(torch.isfinite(loss.cpu()) for loss in losses.values())


@pytest.mark.parametrize("first, second", [(NAME, "cpu"), ("cpu", NAME), (NAME, NAME)])
def test_resuming_on_another_kind_of_device(world, tmp_path, simulated, monkeypatch, first, second):
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
    for kind, folder in ((device, tmp_path / "ours"), (CPU, tmp_path / "theirs")):
        trained(settings(world, folder, kind))
        saved = torch.load(folder / "ckpt.pt", weights_only=True)
        assert {x.device.type for x in saved["retriever"].values()} == {"cpu"}
        predictions = []
        for other in (device, CPU):
            run = evaluate.load(folder / "ckpt.pt", other)
            assert run.retriever.cells.device.type == other.type
            predictions.append([predicted for _, _, predicted
                                in evaluate.answers(run, ["val"], device=other)])
        close(predictions[0], predictions[1])


@pytest.mark.parametrize("name, injections", [("mmn", 0), ("vdi", 2)])
def test_how_often_a_step_waits(world, tmp_path, simulated, monkeypatch, name, injections):
    """In each of three steps Python reads the length of the longest sentence and whether all losses
    are finite; vdi reads two more, the sentences of Eq. 2 and of Eq. 5."""
    steps = []
    add = progress.Run.add

    def add_and_count(run, *values):
        add(run, *values)
        counts = {}
        for place, count in simulated.synchronisations.items():
            file = place.split(":")[0]
            counts[file] = counts.get(file, 0) + count
        steps.append(counts)
        simulated.synchronisations.clear()

    def steps_of(run, loader, original=progress.Run.steps):
        simulated.synchronisations.clear()
        return original(run, loader)

    monkeypatch.setattr(progress.Run, "add", add_and_count)
    monkeypatch.setattr(progress.Run, "steps", steps_of)
    train.train(settings(world, tmp_path / "run", DEVICE, **RUNS[name]))
    expected = {"clip.py": 1, "support/progress.py": 1}
    if injections:
        expected["train.py"] = injections
    assert steps == [expected] * 3


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
    """evaluate.py of a checkpoint and of CLIP alone."""
    def both(kind) -> list:
        return [evaluate.evaluate(evaluate.load(checkpoint, kind), device=kind),
                evaluate.evaluate(zero_shot.run_of("shapes", "shapes", str(world), kind),
                                  ["val"], device=kind)]

    close(both(device), both(CPU), 1e-3)


def test_zero_shot_scores(device):
    """Computed in float64, which the device need not have; they come back where the frames are."""
    frames = F.normalize(torch.randn(32, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    ours = retrieve.zero_shot_scores(frames.to(device), frames[:3].to(device), 16)
    assert ours.device.type == device.type and ours.dtype == torch.float32
    assert torch.equal(ours.cpu(), retrieve.zero_shot_scores(frames, frames[:3], 16))


def test_extraction(world, videos, tmp_path, device):
    """features.extract writes the same features, with patches."""
    def features(kind, folder) -> list:
        model = clip.load(world / "shapes" / "clip.pt", kind)
        store = data.FeatureStore(folder, video.made_by(model, "shapes", "", 8, 2))
        paths = files.find_files(videos, video.VIDEOS)
        assert elsewhere.extract(store, model, paths, list(paths), set(paths)) == {}
        return [torch.from_numpy(store.read(name, part)) for name in paths
                for part in ("frames", "patches")]

    close(features(device, tmp_path / "a"), features(CPU, tmp_path / "b"), 2e-3)


def one_by_one(paths, read):
    """As `features.read_all`, in this thread: the simulated device is that of a thread."""
    for name, path in paths.items():
        yield name, elsewhere.attempt(read, path)


def test_retrieval_index_and_search(world, checkpoint, videos, tmp_path, device, monkeypatch):
    """retrieve.py, extras/index.py and extras/search.py, with a checkpoint and by CLIP alone."""
    monkeypatch.setattr(index, "read_all", one_by_one)

    def all_of_it(kind: str, folder) -> list:
        results = []
        for retriever, made in (
                (retrieve.Retriever(checkpoint, kind, cache=None), str(checkpoint)),
                (retrieve.ZeroShot("shapes", kind, cache=None, root=str(world)), None)):
            encoded = retriever.encode(videos / "test-0000.mp4")
            results += [[list(moment) for answer in retrieve.answers_of(
                retriever, encoded, SENTENCES, 2) for moment in answer.moments],
                retriever.curve(encoded, SENTENCES)]
            own, failed = index.update_index(retriever, made, videos, folder / retriever.kind)
            assert not failed
            results.append([list(hit.moment) for hits in search.search(own, retriever, SENTENCES, 3)
                            for hit in hits])
        return results

    close(all_of_it(str(device), tmp_path / "a"), all_of_it("cpu", tmp_path / "b"), 5e-3)


def test_clip2video(world, tmp_path, device, monkeypatch):
    """Training, with the image tower, too, and evaluation; index and ranking."""
    import clip2video.data
    import clip2video.model
    import clip2video.search
    import clip2video.train
    monkeypatch.setattr(clip2video.data, "FAMILIES", {"train": 4, "val": 2, "test": 2})
    monkeypatch.setattr(index, "read_all", one_by_one)
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
        return [metrics["videos"],
                json.loads((folder / "log.jsonl").read_text(encoding="utf-8"))["L"],
                [score for best in ranker.best(SENTENCES, 2) for _, score in best]]

    for images in (False, True):
        close(*(all_of_it(kind, tmp_path / f"{kind.type}{images}", images)
                for kind in (device, CPU)), 1e-3)


def test_probes(world, device):
    """Supplement, Table 1 and Fig. 1."""
    def both(kind) -> list:
        model = clip.load(world / "shapes" / "clip.pt", kind)
        return [probe.triplet_scores(model, probe.shape_triplets("verb", 12, 0)),
                probe.word_weights(model, SENTENCES, probe.shapes_words)]

    close(both(device), both(CPU), 1e-3)


# ------------------------------------------------------------------ what a GPU does otherwise

def test_out_of_memory_on_the_device(world, tmp_path, simulated, monkeypatch, capsys):
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


def test_half_precision_extraction(world):
    """`video.encode_frames` in bfloat16 and float16, by the CPU's autocast, is near float32."""
    tower = clip.load(world / "shapes" / "clip.pt")
    pixels = torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0),
                           dtype=torch.uint8)
    exact, _ = video.encode_frames(tower, pixels, 4, torch.float32)
    for precision in (torch.bfloat16, torch.float16):
        x, _ = video.encode_frames(tower, pixels, 4, precision)
        assert not torch.equal(x, exact)
        assert F.cosine_similarity(x.float(), exact.float()).min() > 0.999
