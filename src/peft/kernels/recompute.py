"""Activations that need not be kept for the backward pass, since they can be computed again from what their producer keeps.

A layer's input ``x`` is nearly always the output of an operation whose own inputs autograd keeps in any case: GELU's input, a
norm's input, both factors of ``silu(gate) · up``, the output of attention before its transpose. A kernel that needs ``x`` for
a gradient then reads them off ``x.grad_fn`` in the backward pass and runs the producer's own operation again: the same numbers bit
for bit, and no copy of ``x``.

It is done only where it is sound; everywhere else ``x`` is saved as usual:

- every operation on the way to the kept tensors is in the table below, each edge of the graph leads to output number 0, and
  ``x`` has not been changed in place;
- no hooks stand on what is read, and no default hooks for saved tensors are active (checkpointing, offloading to the CPU);
- not under ``torch.compile``, functorch, forward-mode differentiation, FSDP or ZeRO;
- the first use of a way in a layer compares the outcome with ``x`` itself; if they are not equal, the layer saves ``x`` from
  then on.

:func:`recompute_inputs` switches all of it off; so does ``PEFT_RECOMPUTE=0`` in the environment.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .modes import without_autocast

_enabled = os.environ.get("PEFT_RECOMPUTE", "1") != "0"
_MOST_OPERATIONS = 3
_KEY = "peft_recomputed"
# LayerNorm's node keeps mean and 1/deviation but not epsilon: these are tried, and the first exact one is taken.
_EPSILONS = (1e-12, 1e-5, 1e-6, 1e-7, 1e-8, 1e-3, 1e-4)


class CannotRecompute(Exception):
    """The activation has to be saved."""


@contextlib.contextmanager
def recompute_inputs(enabled: bool = True) -> Iterator[None]:
    """Switch the recomputation of layer inputs on or off inside a ``with`` block, for all threads.

    Args:
        enabled: Whether inputs may be recomputed in the backward pass instead of saved in the forward pass.
    """
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def is_enabled() -> bool:
    """Whether kernels may leave out of what they save what can be had another way."""
    return _enabled


@dataclass(frozen=True)
class Way:
    """How an activation is computed again.

    Args:
        dtype: Of the activation.
        device: Of the activation.
        eps: LayerNorm's epsilon, where one is on the way.
        norm_weight: LayerNorm's weight: another norm, perhaps with another epsilon, has another.
    """

    dtype: torch.dtype
    device: torch.device
    eps: float | None = None
    norm_weight: weakref.ref[torch.Tensor] | None = None


class Memo:
    """What a layer has learnt about its surroundings.

    Attributes:
        ways: By the names of the operations that made its input the way that was verified, or ``None`` where it was refuted.
        output_stays: Whether what follows leaves the layer's output as it is; ``None``: not known yet.
        repeats: Whether the frozen layer before gives the same output again; ``None``: not known yet.
    """

    __slots__ = ("output_stays", "repeats", "ways")

    def __init__(self) -> None:
        self.ways: dict[tuple[str, ...], Way | None] = {}
        self.output_stays: bool | None = None
        self.repeats: bool | None = None

    def __reduce__(self) -> Any:  # a copy, or another process, starts anew
        return Memo, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Memo:
        return Memo()


def way_back(x: torch.Tensor, memo: Memo) -> Way | None:
    """How ``x`` can be computed again in the backward pass, or ``None`` where it has to be saved.

    Args:
        x: An activation that is about to be used.
        memo: The memo of the layer that uses it.
    """
    node = x.grad_fn
    if not _enabled or node is None or x.output_nr != 0 or not _allowed():
        return None
    try:
        if x._version != 0:
            return None
        operations: list[str] = []
        norm = _survey(node, operations)
        found = tuple(operations)
        if found not in memo.ways or not _still_holds(memo.ways[found], x, norm):
            memo.ways[found] = _verified(x, node, found, norm)
        way = memo.ways[found]
    except CannotRecompute:
        return None
    if way is None:
        return None
    _shared(node).users += 1
    return way


def to_keep(ctx: Any, x: torch.Tensor, memo: Memo | None, needed: bool) -> torch.Tensor | None:
    """What a kernel's forward pass is to save for its first input: ``x``, or nothing where :func:`from_kept` finds it another way.

    Args:
        ctx: Of the autograd function, which remembers the way.
        x: Its first input.
        memo: The memo of the layer; ``None``: keep ``x`` in any case.
        needed: Whether the backward pass reads ``x`` at all.
    """
    ctx.way = way_back(x, memo) if needed and memo is not None else None
    return x if needed and ctx.way is None else None


def from_kept(ctx: Any, x: torch.Tensor | None) -> Any:
    """The first input in the backward pass, from what :func:`to_keep` gave; ``None`` where it was not needed."""
    return x if ctx.way is None else recompute(ctx.next_functions[0][0], ctx.way)


def output_to_keep(ctx: Any, y: torch.Tensor, memo: Memo | None, needed: bool) -> torch.Tensor | None:
    """What a kernel's forward pass is to save of its own output: itself, which costs nothing where a later operation keeps it too,
    or a copy as long as it may be changed in place afterwards.

    Args:
        ctx: Of the autograd function; :func:`watch_output` belongs into its backward pass.
        y: The output.
        memo: The memo of the layer; ``None``: keep a copy in any case.
        needed: Whether the backward pass reads it at all.
    """
    ctx.watched = None
    if not needed:
        return None
    if memo is not None and memo.output_stays is None:
        ctx.watched = memo, y.detach(), y._version  # the copy tells of changes to y, and lives for this one step
    return y if memo is not None and memo.output_stays else y.clone()


def watch_output(ctx: Any) -> None:
    """Note in the backward pass whether the output was changed since the forward pass."""
    if ctx.watched is not None:
        memo, y, version = ctx.watched
        memo.output_stays = y._version == version
        ctx.watched = None


def recompute(node: torch.autograd.graph.Node, way: Way) -> torch.Tensor:
    """Compute an activation again, in the backward pass.

    Layers that read one input share the outcome. With ``create_graph=True`` it is computed anew, connected to the graph.

    Args:
        node: The activation's producer.
        way: What :func:`way_back` said.

    Raises:
        RuntimeError: The producer's tensors are gone or have been changed since the forward pass.
    """
    try:
        if torch.is_grad_enabled():
            return _rebuild(node, way.eps)
        shared = _shared(node)
        if shared.value is None:
            shared.value, shared.left = _rebuild(node, way.eps), shared.users
        value = shared.value
        shared.left -= 1
        if shared.left <= 0:
            shared.value = None
        return value
    except (RuntimeError, CannotRecompute) as error:
        raise RuntimeError(
            "A layer's input is recomputed in the backward pass from what the operation before it has kept, and that is gone or was "
            f"changed: {error} Call the earlier backward with retain_graph=True, or save inputs instead: "
            "`with peft.helpers.recompute_inputs(False):` around the forward pass, or PEFT_RECOMPUTE=0."
        ) from error


class _Shared:
    """An activation that several layers read: in the backward pass it is computed for the first and dropped by the last."""

    __slots__ = ("left", "users", "value")

    def __init__(self) -> None:
        self.users = 0
        self.left = 0
        self.value: torch.Tensor | None = None


def _shared(node: Any) -> _Shared:
    return node.metadata.setdefault(_KEY, _Shared())


def _allowed() -> bool:
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        return False
    sharding = sys.modules.get("torch.distributed._composable_state")  # fully_shard registers its modules there
    return sharding is None or not len(sharding._module_state_mapping)


# -- the table of producers ------------------------------------------------------------------------------------------


def _kept(node: Any, name: str) -> Any:
    """A tensor that a node keeps, or ``None`` where it kept none."""
    if getattr(node, f"_raw_saved_{name}").unpack_hook is not None:
        raise CannotRecompute(f"a hook stands on what {node.name()} keeps.")
    tensor = getattr(node, f"_saved_{name}")
    if tensor is not None and (hasattr(tensor, "ds_id") or hasattr(tensor, "_fsdp_flattened")):
        raise CannotRecompute("a weight is sharded.")
    return tensor


def _child(node: Any, index: int = 0) -> Any:
    child, output = node.next_functions[index]
    if child is None or output != 0:
        raise CannotRecompute(f"an input of {node.name()} has no graph of its own.")
    return child


def _gelu(node: Any, _: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return F.gelu(_kept(node, "self"), approximate=node._saved_approximate)


def _silu(node: Any, _: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return F.silu(_kept(node, "self"))


def _layer_norm(node: Any, _: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    weight, bias = _kept(node, "weight"), _kept(node, "bias")
    if eps is None:
        raise CannotRecompute("LayerNorm's epsilon is not known.")
    return torch.native_layer_norm(_kept(node, "input"), node._saved_normalized_shape, weight, bias, eps)[0]


def _product(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    # A factor is kept only where the other one needs a gradient.
    first, second = _kept(node, "self"), _kept(node, "other")
    if first is None and second is None:
        raise CannotRecompute("neither factor is kept.")
    first = rebuild(_child(node, 0)) if first is None else first
    return first * (rebuild(_child(node, 1)) if second is None else second)


def _attention(node: Any, _: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return _kept(node, "output")


def _transpose(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    # torch keeps the numbers of dimensions unsigned: -1 reads as 2**64 - 1
    first, second = (d - 2**64 if d >= 2**63 else d for d in (node._saved_dim0, node._saved_dim1))
    return rebuild(_child(node)).transpose(first, second)


def _view(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return rebuild(_child(node)).reshape(node._input_metadata[0].shape)


def _clone(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return rebuild(_child(node)).clone(memory_format=torch.contiguous_format)


def _cast(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    meta = node._input_metadata[0]
    return rebuild(_child(node)).to(device=meta.device, dtype=meta.dtype)


def _rows(node: Any, rebuild: Callable[[Any], torch.Tensor], eps: float | None) -> torch.Tensor:
    return rebuild(_child(node)).index_select(node._saved_dim, _kept(node, "index"))


_Rule = Callable[[Any, Callable[[Any], torch.Tensor], "float | None"], torch.Tensor]
_RULES: dict[str, tuple[_Rule, int]] = {  # node: how its output is computed again, and how many operations that costs
    "GeluBackward0": (_gelu, 1),
    "SiluBackward0": (_silu, 1),
    "NativeLayerNormBackward0": (_layer_norm, 1),
    "MulBackward0": (_product, 1),
    "ScaledDotProductFlashAttentionForCpuBackward0": (_attention, 0),
    "ScaledDotProductFlashAttentionBackward0": (_attention, 0),
    "ScaledDotProductEfficientAttentionBackward0": (_attention, 0),
    "ScaledDotProductCudnnAttentionBackward0": (_attention, 0),
    "TransposeBackward0": (_transpose, 0),
    "ViewBackward0": (_view, 0),
    "UnsafeViewBackward0": (_view, 0),
    "ReshapeAliasBackward0": (_view, 0),
    "CloneBackward0": (_clone, 1),
    "ToCopyBackward0": (_cast, 1),
    "IndexSelectBackward0": (_rows, 1),
}


def _survey(node: Any, operations: list[str]) -> torch.Tensor | None:
    """List the operations on the way from a node to kept tensors; returns LayerNorm's weight if one is on it.

    Raises:
        CannotRecompute: The way does not end in kept tensors.
    """
    cost, norm = 0, None
    waiting = [node]
    while waiting:
        node = waiting.pop()
        name = node.name()
        if name not in _RULES:
            raise CannotRecompute(f"{name} is not in the table.")
        operations.append(name)
        rule, price = _RULES[name]
        cost += price
        if cost > _MOST_OPERATIONS:
            raise CannotRecompute("it would take too many operations.")
        if rule is _product:
            kept = [_kept(node, "self"), _kept(node, "other")]
            if kept[0] is None and kept[1] is None:
                raise CannotRecompute("neither factor is kept.")
            waiting += [_child(node, i) for i in range(2) if kept[i] is None]
        elif rule is _layer_norm:
            norm = _kept(node, "weight")
            if norm is None:
                raise CannotRecompute("a norm without a weight cannot be told from another.")
            for kept_name in ("input", "bias"):
                _kept(node, kept_name)
        elif rule in (_gelu, _silu):
            _kept(node, "self")
        elif rule is _attention:
            _kept(node, "output")
        else:
            waiting.append(_child(node))
    return norm


def _rebuild(node: Any, eps: float | None) -> torch.Tensor:
    def rebuild(node: Any) -> torch.Tensor:
        return _RULES[node.name()][0](node, rebuild, eps)

    with without_autocast(node._input_metadata[0].device.type):
        return rebuild(node)


def _still_holds(way: Way | None, x: torch.Tensor, norm: torch.Tensor | None) -> bool:
    if way is None:  # refuted once, refuted for ever
        return True
    known_norm = None if way.norm_weight is None else way.norm_weight()
    return way.dtype == x.dtype and way.device == x.device and known_norm is norm


def _verified(x: torch.Tensor, node: Any, operations: tuple[str, ...], norm: torch.Tensor | None) -> Way | None:
    """The way, after it has been tried; ``None`` where it does not give ``x``.

    Raises:
        CannotRecompute: Nothing can be said, since ``x`` holds NaN.
    """
    with torch.no_grad():
        for eps in _EPSILONS if norm is not None else (None,):
            again = _rebuild(node, eps)
            if again.shape == x.shape and again.dtype == x.dtype and torch.equal(again, x):
                return Way(x.dtype, x.device, eps, None if norm is None else weakref.ref(norm))
    if bool(x.isnan().any()):  # NaN differs from itself
        raise CannotRecompute("it holds NaN.")
    warnings.warn(
        f"A layer's input, made by {' of '.join(operations)}, was not the same when computed again; the layer saves it from now on.",
        stacklevel=2,
    )
    return None
