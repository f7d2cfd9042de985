"""Counts the bytes that an autograd graph keeps for its backward pass: exact, repeatable and without hooks.

The graph is walked from the loss along `grad_fn.next_functions`. Every node shows what it saved as `_raw_saved_*`
(for a custom `autograd.Function`: `_raw_saved_tensors`). A storage counts once, at its full size, however many nodes
or views share it. What a node holds in other ways counts too: tensors set as attributes of `ctx`, tensors that
a saved-tensor hook packed, and the inputs that activation checkpointing keeps inside its unpack hook. Unpack hooks
are never called, so counting neither recomputes nor copies anything.

Not seen: what PyTorch's own C++ nodes keep without showing it to Python (sizes, strides, random seeds: some bytes).
"""

from __future__ import annotations

import functools
import types
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch._C._autograd import SavedTensor
from torch.autograd.graph import Node


def saved_bytes(outputs: torch.Tensor | Iterable[torch.Tensor], exclude: Iterable[torch.Tensor] = ()) -> int:
    """Bytes of all unique storages that the graph behind `outputs` holds.

    Args:
        outputs: A tensor, or several, with a live graph: usually the loss.
        exclude: Tensors whose storages do not count, usually `model.parameters()`.

    Returns:
        The number of bytes.

    Raises:
        ValueError: An output has no graph, or a part of the graph was freed by a backward pass.
    """
    return sum(saved_by_node(outputs, exclude).values())


def saved_by_node(outputs: torch.Tensor | Iterable[torch.Tensor], exclude: Iterable[torch.Tensor] = ()) -> Counter[str]:
    """The same bytes by kind of node, each storage under the first node that is met holding it.

    Args:
        outputs: A tensor, or several, with a live graph.
        exclude: Tensors whose storages do not count.

    Returns:
        Bytes by node name, for example `{"GeluBackward0": 4194304}`.

    Raises:
        ValueError: An output has no graph, or a part of the graph was freed by a backward pass.
    """
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    for output in outputs:
        if output.grad_fn is None:
            raise ValueError("an output has no autograd graph: it does not require grad, or it is a leaf")
    counted = {tensor.untyped_storage()._cdata for tensor in exclude}
    bytes_by_node: Counter[str] = Counter()
    # Python wrappers of nodes and saved tensors live only as long as somebody keeps them, and ids are used again:
    # `seen` keeps every object until the end.
    seen: dict[int, object] = {}
    queue: deque[tuple[object, str]] = deque((output.grad_fn, "") for output in outputs)
    while queue:
        held, holder = queue.popleft()
        if id(held) in seen:
            continue
        seen[id(held)] = held
        if isinstance(held, torch.Tensor):
            storage = held.untyped_storage()
            if storage._cdata not in counted:
                counted.add(storage._cdata)
                bytes_by_node[holder] += storage.nbytes()
            if held.grad_fn is not None:
                queue.append((held.grad_fn, holder))
            continue
        if isinstance(held, Node):
            holder = held.name()
        queue.extend((part, holder) for part in _parts(held))
    return bytes_by_node


def _parts(held: object) -> Iterator[object]:
    """What an object keeps alive, one step down; modules, classes and plain values keep nothing that counts."""
    if isinstance(held, Node):
        yield from (node for node, _ in held.next_functions if node is not None)
        yield from _saved_by(held)
        yield from getattr(held, "__dict__", {}).values()
    elif isinstance(held, SavedTensor):
        yield from (held.data, held.unpack_hook)  # type: ignore[attr-defined]  # missing in torch's stubs
    elif isinstance(held, types.FunctionType):
        yield from (cell.cell_contents for cell in held.__closure__ or () if not _is_empty(cell))
    elif isinstance(held, types.MethodType):
        yield held.__self__
    elif isinstance(held, functools.partial):
        yield from (held.func, *held.args, *held.keywords.values())
    elif isinstance(held, Mapping):
        yield from held.values()
    elif isinstance(held, list | tuple | set | frozenset):
        yield from held
    elif not isinstance(held, torch.nn.Module | types.ModuleType | type):
        yield from getattr(held, "__dict__", {}).values()


def _saved_by(node: Node) -> Iterator[SavedTensor]:
    """The saved tensors of a node, still packed."""
    for name in dir(node):
        if not name.startswith("_raw_saved_"):
            continue
        try:
            raw = getattr(node, name)
            for saved in raw if isinstance(raw, tuple) else (raw,):
                yield saved
                if saved.data is None and saved.unpack_hook is None and name != "_raw_saved_tensors":
                    # An unused slot and a freed one look alike here: reading it unpacked tells, and raises if freed.
                    getattr(node, name.removeprefix("_raw"))
        except RuntimeError as error:
            raise ValueError("the graph was already freed: count what it saved before calling backward()") from error


def _is_empty(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the test
    except ValueError:
        return True
    return False
