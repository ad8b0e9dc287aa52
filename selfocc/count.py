"""What a training step asks of a GPU, counted where there is none: python -m selfocc.bench --count.

The step of training.py runs on device "meta", whose tensors have shapes and no memory; they stand
for those of a GPU, and what is on the CPU for what is there as well in a real run. Triton kernels
are written down by `kernels.dispatch.record`, not launched. Counted are

- operations: of PyTorch, but those that only name, shape or allocate, and launches of Triton;
- waits: where the host would wait until the GPU is done, each with the line of this repository that
  waits. That is when numbers come back from the GPU (`item`, `bool`, masks as indices, `nonzero`),
  when some go there from memory that is not page-locked (`torch.tensor`, lists as indices), and
  where matrices are inverted or decomposed by libraries that may wait. train.py waits besides,
  every ten steps and when it keeps something;
- bytes saved for the backward pass: every storage once, without parameters and their buffers, and
  what functions keep past autograd.

What numbers decide is taken as large as it may be: all of a mask is true. Autocast is that of CUDA,
copied here: "meta" has none. One host operation may launch several kernels (a convolution, the
norms of many tensors), so that a profiler shows more launches.
"""

import sys
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import cycle
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels import dispatch
from selfocc.batch import Batch
from selfocc.config import Config
from selfocc.model import SelfOcc
from selfocc.training import Passes, make_optimizer, training_step

ROOT = Path(__file__).parents[1]
META = torch.device("meta")
ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh"}
ALLOCATE |= {"_unsafe_view", "_reshape_alias", "is_same_size", "is_pinned"}
# whose results have as many numbers as values decide, that look at values on the host, or decompose
DECIDED = {"masked_select", "unique_consecutive", "_unique2", "unique_dim", "bincount", "equal"}
DECIDED |= {"linalg_inv_ex", "linalg_solve_ex", "_linalg_solve_ex", "_linalg_det", "linalg_qr"}
# what autocast computes in half precision on CUDA, and what in float32, of all that is used here
HALF = {"linear", "conv2d", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "einsum"}
FULL = {"layer_norm", "group_norm", "softplus", "softmax", "log_softmax", "sum", "prod", "cumsum"}
FULL |= {"exp", "expm1", "log", "log1p", "pow", "__pow__", "reciprocal", "rsqrt", "norm"}


@dataclass
class Count:
    """Of one training step."""

    operations: Counter[str] = field(default_factory=Counter)  # of PyTorch, by name
    launches: Counter[str] = field(default_factory=Counter)  # of Triton, by kernel
    waits: Counter[tuple[str, str]] = field(default_factory=Counter)  # by (file:line, operation)
    saved: int = 0  # bytes for the backward pass

    @property
    def host(self) -> int:
        """Operations of both kinds."""
        return self.operations.total() + self.launches.total()


def count_step(settings: Config, batches: list[Batch]) -> Count:
    """The second training step of a new model: the first makes what is made once.

    batches: on the CPU, for that step and the one before.
    """
    model = SelfOcc(settings).to(META).train()
    passes, optimizer = Passes(settings, model), make_optimizer(model, settings.optim)
    counting = _Operators()
    with _counted(counting) as functions, dispatch.record() as launches:
        pinned = cycle([batch.pin_memory() for batch in batches])
        training_step(passes, optimizer, pinned, 0)
        functions.count = counting.count = Count()
        launches.clear()
        with _saved(model, counting.count):
            training_step(passes, optimizer, pinned, 1)
    counting.count.launches.update(launch.kernel.__name__ for launch in launches)
    return counting.count


@contextmanager
def _counted(counting: "_Operators"):
    """Inside, both modes are on, and PyTorch takes "meta" for a GPU with autocast."""
    autocast, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    functions = _Functions(counting.count, counting.pinned)

    def stand_in(kind: str) -> str:
        return "cpu" if kind == "meta" else kind

    def begin(kind: str, *arguments, **options):
        if not enabled("cpu"):
            functions.cast.clear()  # weights are cast once in a block
        return autocast(stand_in(kind), *arguments, **options)

    replaced = {
        (torch, "autocast"): begin,
        (torch, "is_autocast_enabled"): lambda kind=None: enabled(stand_in(kind or "cpu")),
        (torch, "get_autocast_dtype"): lambda kind: dtype(stand_in(kind)),
        (dispatch, "_AUTOCAST"): {"meta"},
        (torch.utils._foreach_utils, "_get_foreach_kernels_supported_devices"): lambda: ["meta"],
        (import_module("torch.optim.optimizer"), "_get_fused_kernels_supported_devices"): lambda: [
            "meta"
        ],
    }
    with ExitStack() as stack:
        for (module, name), function in replaced.items():
            stack.enter_context(patch.object(module, name, function))
        stack.enter_context(functions)
        stack.enter_context(counting)
        yield functions


@contextmanager
def _saved(model: nn.Module, count: Count):
    """Inside, what is saved for the backward pass is added up."""
    known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    kept = []  # so that no other storage gets its place

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_meta and storage._cdata not in known:
            known.add(storage._cdata)
            kept.append(storage)
            count.saved += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


def _place() -> str:
    """file:line of the innermost call in this repository, but this file."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and path.is_relative_to(ROOT):
            return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


class _Functions(TorchFunctionMode):
    """What shows in Python only: autocast, which device is a GPU, and numbers that go there."""

    def __init__(self, count: Count, pinned: dict[int, Tensor]):
        super().__init__()
        self.count, self.pinned = count, pinned
        self.cast: dict[int, tuple[Tensor, Tensor]] = {}  # weights in half precision

    def __torch_function__(self, function, types, arguments=(), options=None):
        name, options, first = function.__name__, options or {}, (*arguments, None)[0]
        if function == Tensor.is_cuda.__get__:
            return first.is_meta
        if function is Tensor.pin_memory:
            self.pinned[first.untyped_storage().data_ptr()] = first
            return first
        if function is Tensor.backward:  # with what it calls seen as well
            start = partial(_engine_run_backward, allow_unreachable=True, accumulate_grad=True)
            with self:
                return start((first,), (torch.ones_like(first),), False, False, ())
        if function is nn.functional.dropout and first.is_meta:
            p, training = (*arguments, *options.values())[1:3]
            return torch.native_dropout(first, p, training)[0] if training and p else first
        if torch.is_autocast_enabled("cpu") and name in HALF | FULL:
            to = torch.get_autocast_dtype("cpu") if name in HALF else torch.float32
            arguments, options = tree_map_only(
                Tensor, lambda x: self._cast(x, to), (arguments, options)
            )
        result = function(*arguments, **options)
        if name in ("tensor", "as_tensor", "new_tensor"):
            copied = isinstance(arguments[name == "new_tensor"], Tensor)  # which operators show
            if isinstance(result, Tensor) and result.is_meta and not copied:
                self.count.waits[_place(), f"{name} of numbers"] += 1
        elif name in ("__getitem__", "__setitem__") and first.is_meta:
            index = arguments[1] if isinstance(arguments[1], tuple) else (arguments[1],)
            if any(isinstance(i, list) for i in index):
                self.count.waits[_place(), "a list as index"] += 1
        return result

    def _cast(self, x: Tensor, to: torch.dtype) -> Tensor:
        if not (x.is_meta and x.dtype in (torch.float32, torch.bfloat16)) or x.dtype == to:
            return x
        if not (x.is_leaf and x.requires_grad and torch.is_autocast_cache_enabled()):
            return x.to(to)
        if id(x) not in self.cast:
            self.cast[id(x)] = x, x.to(to)
        return self.cast[id(x)][1]


class _Operators(TorchDispatchMode):
    """Counts; does what "meta" cannot; runs the code of our operators instead of asking shapes."""

    def __init__(self):
        super().__init__()
        self.count, self.pinned = Count(), {}

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options, name = options or {}, operator._schema.name
        own = OPDEFS.get(name)
        if own is not None:
            with self:
                return own._init_fn(*arguments, **options)
        if torch.is_inference_mode_enabled():  # what autograd would have taken apart
            with self:
                result = operator.decompose(*arguments, **options)
            if result is not NotImplemented:
                return result
        name = name.removeprefix("aten::")
        given = [x for x in tree_leaves((arguments, options)) if isinstance(x, Tensor)]
        on_gpu = [x for x in given if x.is_meta]
        if on_gpu:
            result, waits = self._done(operator, name, arguments, options, given)
        else:
            result, waits = operator(*arguments, **options), False
            on_gpu = [x for x in tree_leaves(result) if isinstance(x, Tensor) and x.is_meta]
            if on_gpu and given:
                waits = not self._beside(given[0], options)
        changed = [r.alias_info for r in operator._schema.returns]
        view = bool(changed) and all(info is not None and not info.is_write for info in changed)
        if on_gpu and not view and name not in ALLOCATE:
            self.count.operations[name] += 1
        if waits:
            self.count.waits[_place(), name] += 1
        return result

    def _done(self, operator, name, arguments, options, given) -> tuple[object, bool]:
        """The result of an operator that gets tensors on "meta", and whether the host waits."""
        first = arguments[0]
        if name == "_local_scalar_dense":
            return torch.ones((), dtype=first.dtype).item(), True
        if name == "nonzero":
            return first.new_empty(first.numel(), first.ndim, dtype=torch.int64), True
        if name == "_to_copy" and options.get("device", META).type == "cpu":
            return torch.ones(first.shape, dtype=options.get("dtype") or first.dtype), True
        if name == "copy_" and arguments[1].device != first.device:
            late = dict(enumerate(arguments)).get(2, options.get("non_blocking"))
            return first, not self._beside(arguments[1], {"non_blocking": late})
        if name in ("index", "index_put_", "_index_put_impl_"):
            read = [i for i in arguments[1] if i is not None]
            filled = name != "index" and arguments[2].numel() == 1  # which needs no indices
            waits = any(not i.is_meta or (_is_mask(i) and not filled) for i in read)
            if name != "index":
                return first, waits
            indices = [found for i in arguments[1] for found in _as_found(i)]
            return operator(first, indices), waits
        if name == "_fused_adamw_":
            return None, False
        return operator(*arguments, **options), name in DECIDED

    def _beside(self, x: Tensor, options: dict) -> bool:
        """Whether a copy to the GPU runs beside what the host does."""
        page_locked = x.untyped_storage().data_ptr() in self.pinned
        return bool(options.get("non_blocking")) and page_locked


def _is_mask(index: Tensor) -> bool:
    return index.dtype in (torch.bool, torch.uint8)


def _as_found(index: Tensor | None) -> list[Tensor | None]:
    """A mask as the indices of its elements, all of which are true."""
    if index is None or not _is_mask(index):
        return [index]
    return [index.new_empty(index.numel(), dtype=torch.int64)] * index.ndim
