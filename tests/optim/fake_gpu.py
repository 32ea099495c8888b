"""A GPU that is not there: what a step launches, reads and copies, seen without one.

Tensors are fake ones on "cuda": they have a device, a shape and strides, no numbers. Whatever asks for a number fails.
The launchers are those of the GPU; in place of a Triton kernel only its name is noted.
"""

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fsam_triton.buffers.lanes import Lanes
from fsam_triton.kernels import segments
from fsam_triton.optim.optimizer import FusedOptimizer

triton = pytest.importorskip("triton")
DEVICE = torch.device("cuda", 0)
READS = (DataDependentOutputException, DynamicOutputShapeException)
aten = torch.ops.aten
# They give a view, or memory that nobody has written yet: nothing runs on the device.
_VIEWS = {"alias", "as_strided", "detach", "expand", "select", "slice", "split", "split_with_sizes", "squeeze", "t"}
_VIEWS |= {"unbind", "unsqueeze", "view", "_unsafe_view", "_reshape_alias", "permute", "transpose", "lift_fresh"}
_FREE = _VIEWS | {"device", "empty", "empty_like", "empty_strided", "set_", "is_pinned", "_pin_memory", "resize_"}


@dataclass
class Trace:
    """What happened on the device.

    Attributes:
        launches: names of kernels and operators that run there, in their order; copies from the host as "upload".
        faults: what a captured CUDA graph could not hold, or what would make the host wait.
    """

    launches: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class FakeGPU(TorchDispatchMode):
    """Inside, tensors can be made on `DEVICE`; `trace` collects what is done with them.

    While `capturing` is True, it is as if a CUDA graph was captured, when no pinned memory can be had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trace, self.capturing = Trace(), False
        self._addresses: dict[int, int] = {}
        self._next = itertools.count(1)

    def __enter__(self) -> "FakeGPU":
        self._stack = contextlib.ExitStack()
        patch = self._stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        patch.setattr(Tensor, "data_ptr", lambda tensor: self._address(tensor))
        patch.setattr(Tensor, "pin_memory", lambda tensor: self._pin(tensor))
        patch.setattr(Tensor, "is_pinned", lambda tensor: getattr(tensor, "in_pinned_memory", False))
        patch.setattr(torch, "isfinite", lambda tensor: tensor.abs() != float("inf"))
        # Without the guard of the device, which a PyTorch without CUDA does not have.
        self._stack.enter_context(_Items())
        patch.setattr(Tensor, "__invert__", lambda tensor: torch.bitwise_not(tensor))
        patch.setattr(Tensor, "copy_", lambda tensor, *args, **kwargs: aten.copy_(tensor, *args, **kwargs))
        patch.setattr(segments, "_address_of", self._address)
        # A fake storage has no parts.
        patch.setattr(Lanes, "shown", lambda lanes, name, i: lanes.views(name)[i].detach())
        patch.setattr(triton.JITFunction, "run", lambda kernel, *args, **kwargs: self._launch(kernel, *args, **kwargs))
        # Fake tensors are not of the type Tensor.
        patch.setattr(FusedOptimizer, "_check_parameters", lambda optimizer, group: None)
        self._stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    @contextlib.contextmanager
    def tracing(self) -> Iterator[Trace]:
        """A trace of the block alone."""
        before, self.trace = self.trace, Trace()
        yield self.trace
        self.trace = before

    def _address(self, tensor: Tensor) -> int:
        # Far apart, so that none overlaps another.
        storage = tensor.untyped_storage()._cdata
        start = self._addresses.setdefault(storage, next(self._next) << 40)
        return start + tensor.storage_offset() * tensor.element_size()

    def _pin(self, tensor: Tensor) -> Tensor:
        if self.capturing:
            self.trace.faults.append("pinned memory is asked for in a capture")
        out = tensor.clone()
        out.in_pinned_memory = True
        return out

    def _launch(self, kernel: Any, *args: Any, **kwargs: Any) -> None:
        self.trace.launches.append(kernel.__name__)
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.device != DEVICE:
                self.trace.faults.append(f"{kernel.__name__} is given a tensor of the host")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[1]
        try:
            out = func(*args, **kwargs)
        except READS:
            self.trace.faults.append(f"{name} reads from the device")
            raise
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        devices = {tensor.device for tensor in (*given, *results) if not tensor.is_meta}
        if DEVICE not in devices:
            return out
        if len(devices) > 1:
            self._note_transfer(name, args, kwargs, results)
        elif name not in _FREE:
            self.trace.launches.append(name)
        return out

    def _note_transfer(self, name: str, args: Any, kwargs: Any, results: list[Tensor]) -> None:
        source = args[1] if name == "copy_" else args[0]
        patient = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        is_copy = name in ("_to_copy", "copy_")
        if is_copy and source.is_pinned() and patient:
            self.trace.launches.append("upload")
        else:
            self.trace.faults.append(f"{name} from {source.device} to {results[0].device}: not from pinned memory")


class _Items(TorchFunctionMode):
    """Inside, `tensor[index]` is `_item`.

    Setting `Tensor.__getitem__` instead would leave the type a sequence for good, also once it is deleted again, and
    `torch.tensor` would then ask numbers in a list for their length.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_item if func is Tensor.__getitem__ else func)(*args, **(kwargs or {}))


def _item(tensor: Tensor, index: Any) -> Tensor:
    """`tensor[index]`."""
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if isinstance(one, int):
            tensor = tensor.select(dim, one)
            continue
        if one is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(one, Tensor):
            tensor = aten.index.Tensor(tensor, [None] * dim + [one])
        else:
            tensor = aten.slice.Tensor(tensor, dim, one.start, one.stop, one.step or 1)
        dim += 1
    return tensor
