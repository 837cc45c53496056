"""A second kind of device in plain Python, for tests of `--device` where there is no GPU.

    with simulated_device.mode() as mode:
        x = torch.ones(3, device="simulated")
        x + torch.ones(3)                       # WrongDevice, as on a GPU
        mode.synchronisations                   # Counter of the functions that waited for it

A tensor "on" it is a wrapper around a CPU tensor, with which every operation is computed. What it
shows is where tensors lie: an operation on tensors of both devices raises, unless it is one that a
GPU allows too: copies, indices on the CPU, and numbers (zero-dimensional CPU tensors) in pointwise
operations. A float64 tensor on it raises, too, as on mps. And it counts where a GPU would wait. It
shows nothing about a GPU's kernels: rounding, speed, memory, streams, and autocast, which changes
nothing here. Registered in torch once per process, in effect inside `mode` only.
"""
import collections
import contextlib
import pathlib
import sys
import unittest.mock

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

NAME, ROOT = "simulated", pathlib.Path(__file__).parent.parent
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
            aten._index_put_impl_.default}
FILLING = {aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.fill_.Tensor}
# the size of the result, or a number for Python, depends on values
WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default,
           aten.equal.default, aten.repeat_interleave.Tensor, aten._unique2.default,
           aten.bincount.default}


class WrongDevice(RuntimeError):
    """Tensors of two devices met."""


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of a device's module. `random_state` is its generator, which nothing uses."""
    random_state = torch.zeros(16, dtype=torch.uint8)

    def get_rng_state(self, device=NAME) -> torch.Tensor:
        return self.random_state.clone()

    def set_rng_state(self, state, device=NAME) -> None:
        self.random_state = state.clone()

    def get_amp_supported_dtype(self) -> list:
        return [torch.bfloat16, torch.float16]


BACKEND = Backend()
backend_registration._setup_privateuseone_for_python_backend(NAME, BACKEND)
DEVICE = torch.device(NAME, 0)
AUTOCAST = torch.library.Library("_", "IMPL")
AUTOCAST.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")


class Simulated(torch.Tensor):
    """A tensor whose data, `held`, lie on the CPU, and which says that they do not."""
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        if held.dtype == torch.float64:
            raise TypeError(f"{NAME} has no float64")           # as mps
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE)

    def __init__(self, held: torch.Tensor):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):          # saved as CPU data, as read_tensors loads it
        return self.cpu().__reduce_ex__(protocol)

    def __repr__(self, **options) -> str:
        return f"simulated({self.held!r})"

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **options):
        raise TypeError(f"can't convert {NAME} tensor to numpy")


def check(function, args: tuple, kwargs: dict) -> None:
    """WrongDevice if the operation needs tensors of one device and has some of both."""
    operands = (args[0], args[2:]) if function in INDEXING else (args, kwargs)
    tensors = [x for x in tree_leaves(operands) if isinstance(x, torch.Tensor)]
    numbers = torch.Tag.pointwise in function.tags or function in INDEXING | FILLING
    elsewhere = [x for x in tensors if not isinstance(x, Simulated) and not (
        numbers and x.ndim == 0)]
    here = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Simulated)]
    if here and elsewhere and function not in COPIES:
        raise WrongDevice(f"{function} of tensors on {NAME} and on the CPU, "
                          f"{list(elsewhere[0].shape)}")


def run(function, args: tuple, kwargs: dict):
    """Computes an operation with the data, and says on which device its result lies."""
    leaves = tree_leaves((args, kwargs))
    on_device = any(isinstance(x, Simulated) for x in leaves)
    target = kwargs.get("device")
    if not on_device and (target is None or torch.device(target).type != NAME):
        return function(*args, **kwargs)
    check(function, args, kwargs)
    to_cpu = function in COPIES and not isinstance(args[0], Simulated) and on_device or (
        target is not None and torch.device(target).type == "cpu")
    if mode.current and (to_cpu or function in WAITING or function in INDEXING and any(
            x is not None and x.dtype == torch.bool for x in args[1])):
        mode.current.count()
    inner_args, inner = tree_map_only(Simulated, lambda x: x.held, (args, kwargs))
    if target is not None:
        inner["device"] = torch.device("cpu")
        inner.pop("pin_memory", None)
    result = function(*inner_args, **inner)
    if to_cpu:
        return args[0] if function is aten.copy_.default else result
    result = tree_map_only(torch.Tensor, Simulated, result)
    if function is aten._to_copy.default:       # a copy is no view of what it copies
        return result
    return return_and_correct_aliasing(function, args, kwargs, result)


class mode(TorchDispatchMode):
    """Inside the block, factories such as torch.zeros know the device and `--device simulated`
    exists. `synchronisations` counts how often each function of the product waits."""
    current = None

    def __init__(self):
        super().__init__()
        self.synchronisations = collections.Counter()

    def count(self) -> None:
        frame = sys._getframe(1)
        while frame:
            code = frame.f_code
            path = pathlib.Path(code.co_filename)
            # not a test, nor a comprehension, which has a frame of its own before Python 3.12
            if ROOT in (path.parent, path.parent.parent) and path.parent.name != "tests" \
                    and not code.co_name.startswith("<"):
                self.synchronisations[f"{path.relative_to(ROOT)}:{code.co_name}"] += 1
                return
            frame = frame.f_back

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __enter__(self) -> "mode":
        self.patches = contextlib.ExitStack()
        make = torch.tensor

        def tensor(data, *, device=None, **more):       # torch's own bypasses the dispatcher
            if device is None or torch.device(device).type != NAME:
                return make(data, device=device, **more)
            return make(data, **more).to(device)

        self.patches.enter_context(unittest.mock.patch("torch.tensor", tensor))
        before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.patches.callback(torch.__future__.set_overwrite_module_params_on_conversion, before)
        mode.current = self
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        mode.current = None
        super().__exit__(*exception)
        self.patches.close()
