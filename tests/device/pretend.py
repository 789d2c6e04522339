"""A CUDA device that computes nothing, on a machine without CUDA: devices, shapes and dtypes are known, waits counted.

`PretendCuda` is a dispatch mode. Operations on CPU tensors are computed. Those on CUDA tensors run under torch's
FakeTensorMode: the result has a shape and a device, and an operation on tensors of two devices raises. What the device
would return to the host is invented: a ramp from 0.1 to 1.

`waits` counts where a real host would wait for the device:
- scalars that are read: item(), tolist(), bool() of a tensor, torch.equal,
- nonzero and indices of bool, whose number of results the host must know,
- copies from the device, and copies to the device from memory that is not pinned, also as an index or a constant,
- functions that check their result on the host, such as eigh,
- torch.cuda.synchronize and Event.synchronize.

Backward passes do not run here: `Tensor.backward` gives each parameter a gradient without computing it.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from scorers.maps import score_map_matrix
from scorers.views import _view_grids
from utils.files import PROJECT_ROOT

aten = torch.ops.aten
CHECKED_ON_HOST = {aten._linalg_eigh.default, aten._linalg_svd.default, aten._linalg_check_errors.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Fake(FakeTensorMode):
    """The one mode of all tensors on the pretended device; copies of networks keep it."""

    def __deepcopy__(self, _memo: dict) -> Fake:
        return self


FAKE = Fake()


class Event:
    """torch.cuda.Event of a device that has always finished."""

    def __init__(self, enable_timing: bool = False) -> None:
        pass

    def record(self, _stream: object = None) -> None:
        """Nothing to record."""

    def query(self) -> bool:
        """Everything is finished."""
        return True

    def elapsed_time(self, _end: Event) -> float:
        """A millisecond."""
        return 1.0


class PretendCuda(TorchDispatchMode):
    """See the module. waits: number of waits by cause and line of the project's code.

    free, of_image: bytes of memory that are free, and that a network pass of one image takes.
    """

    free, of_image = 8 * 2**30, 16 * 2**20

    def __init__(self) -> None:
        super().__init__()
        self.waits, self.pinned = Counter(), {}
        self._patches = pytest.MonkeyPatch()
        self._only_cpu = False

    def __enter__(self) -> PretendCuda:
        cuda = torch.cuda
        self._patches.setattr(cuda, "_lazy_init", lambda: None)
        self._patches.setattr(cuda, "synchronize", lambda *_: self._wait("synchronize"))
        self._patches.setattr(cuda, "current_stream", lambda *_: None)
        self._patches.setattr(cuda, "is_bf16_supported", lambda *_, **__: True)
        self._patches.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        self._patches.setattr(cuda, "get_device_name", lambda *_: "pretended")
        self._patches.setattr(cuda, "mem_get_info", lambda *_: (self.free, self.free))
        self._patches.setattr(cuda, "max_memory_allocated", lambda *_: self.of_image)
        for name in ("memory_reserved", "memory_allocated", "reset_peak_memory_stats"):
            self._patches.setattr(cuda, name, lambda *_: 0)
        waiting = {"synchronize": lambda _: self._wait("Event.synchronize")}
        self._patches.setattr(cuda, "Event", type("WaitingEvent", (Event,), waiting))
        self._patches.setattr(torch.Tensor, "backward", give_gradients)
        self._patches.setattr(torch.nn.Module, "_apply", convert_module)
        self._patches.setattr(FakeTensor, "__deepcopy__", copy_tensor, raising=False)
        save = torch.save
        self._patches.setattr(torch, "save", lambda content, file: save(tree_map(to_host, content), file))
        forget_constants()
        torch._C._ensureCUDADeviceGuardSet()  # "cuda" without a number is device 0, also where there is none
        self._only_cpu = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # constants are made on the CPU, then copied: both are seen here
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._only_cpu)
        self._patches.undo()
        forget_constants()

    @property
    def total(self) -> int:
        """The number of waits."""
        return sum(self.waits.values())

    def _wait(self, cause: str) -> None:
        ours = [line for line in traceback.extract_stack() if line.filename.startswith(str(PROJECT_ROOT))]
        ours = [line for line in ours if line.filename != __file__]
        place = f"{ours[-1].filename.removeprefix(str(PROJECT_ROOT) + '/')}:{ours[-1].lineno}" if ours else "?"
        self.waits[f"{cause} at {place}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Runs `func` for real where no CUDA tensor takes part, else on the pretended device."""
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        if func is aten.is_pinned.default:
            return _storage(args[0]) in self.pinned
        if func is aten._pin_memory.default:
            copy = args[0].clone(memory_format=torch.preserve_format)
            self.pinned[_storage(copy)] = copy  # kept, so that no other tensor gets its address
            return copy
        on_cuda = any(isinstance(leaf, FakeTensor) for leaf in leaves)
        to_cuda = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not (on_cuda or to_cuda):
            return func(*args, **kwargs)
        return self._on_device(func, args, kwargs, leaves)

    def _on_device(self, func, args, kwargs, leaves):
        if func is aten._local_scalar_dense.default:
            self._wait("a scalar is read")
            return torch.ones((), dtype=args[0].dtype).item()
        if func is aten.equal.default:
            self._wait("equal")
            return False
        if func is aten.nonzero.default:
            self._wait("nonzero")
            return self._run(aten.zeros.default, ((args[0].numel(), args[0].dim()),), _long_on(args[0]))
        if func in CHECKED_ON_HOST:
            self._wait(str(func))
        if func is aten._to_copy.default and not isinstance(args[0], FakeTensor):
            self._count_upload(args[0], kwargs.get("non_blocking", False))
        if func is aten._to_copy.default and isinstance(args[0], FakeTensor) and _to_cpu(kwargs):
            return self._download(args[0], kwargs)
        if func is aten.copy_.default:
            return self._copy(*args, **kwargs)
        if func is aten._fused_sgd_.default:  # changes parameters in place
            assert all(leaf.device.type == "cuda" for leaf in leaves if isinstance(leaf, torch.Tensor))
            return None
        if func in INDEXING:
            args = (args[0], [self._index(index) for index in args[1]], *args[2:])
        return self._run(func, args, kwargs)

    def _run(self, func, args, kwargs):
        if any(map(_is_real, tree_leaves((args, kwargs)))):
            args, kwargs = tree_map(lambda leaf: FAKE.from_tensor(leaf) if _is_real(leaf) else leaf, (args, kwargs))
        with FAKE:
            return func(*args, **kwargs)

    def _count_upload(self, source: torch.Tensor, non_blocking: bool) -> None:
        if not (non_blocking and _storage(source) in self.pinned):
            self._wait("copy to the device")

    def _download(self, source: FakeTensor, kwargs: dict) -> torch.Tensor:
        if not kwargs.get("non_blocking", False):
            self._wait("copy to the host")
        dtype = kwargs.get("dtype") or source.dtype
        ramp = torch.linspace(0.1, 1, max(1, source.numel()))[: source.numel()]
        return ramp.view(source.shape).to(dtype)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(target, FakeTensor) and isinstance(source, FakeTensor):
            return self._run(aten.copy_.default, (target, source), {})
        if isinstance(target, FakeTensor):
            self._count_upload(source, non_blocking)
            return target
        self._wait("copy to the host")
        return target

    def _index(self, index: torch.Tensor | None) -> torch.Tensor | None:
        """An index as numbers; one of bool selects everything here."""
        if index is None:
            return None
        if not isinstance(index, FakeTensor):
            self._wait("an index is copied to the device")
        if index.dtype is torch.bool:
            self._wait("an index of bool")
            return self._run(aten.zeros.default, ((index.numel(),),), _long_on(index))
        return index


def forget_constants() -> None:
    """Empties the caches of constants on devices."""
    _view_grids.cache_clear()
    score_map_matrix.cache_clear()


def convert_module(module: torch.nn.Module, function: Callable, recurse: bool = True) -> torch.nn.Module:
    """Stands for Module._apply, which cannot exchange the parameters of a copied module for ones that are pretended."""
    for part in module.modules() if recurse else [module]:
        for name, parameter in part._parameters.items():
            if parameter is not None:
                with torch.no_grad():
                    part._parameters[name] = torch.nn.Parameter(function(parameter), parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = function(buffer)
    return module


def copy_tensor(tensor: torch.Tensor, _memo: dict) -> torch.Tensor:
    """Stands for Tensor.__deepcopy__, which asks for the address of the memory."""
    copy = tensor.detach().clone()
    return torch.nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else copy


def to_host(leaf: object) -> object:
    """Tensors as on the CPU, other values as they are."""
    return leaf.cpu() if isinstance(leaf, FakeTensor) else leaf


def give_gradients(loss: torch.Tensor, *_: object) -> None:
    """Stands for loss.backward(): every parameter that the loss depends on gets a gradient, without any computation."""
    todo, seen = [loss.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            node.variable.grad = torch.zeros_like(node.variable)
        todo += [following for following, _ in node.next_functions]


def _is_real(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _to_cpu(kwargs: dict) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu"


def _long_on(tensor: torch.Tensor) -> dict:
    return {"dtype": torch.int64, "device": torch.device("cuda:0")}
