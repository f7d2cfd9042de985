"""Mixed batches: each row has its own adapter or adapters, planned once per forward pass and read by every adapted layer."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..kernels.workspace import side_by_side
from .errors import did_you_mean, shorten
from .flags import FlagIndex

BASE = "__base__"
_FIRST_SLOT = 16
"""Of the workspace: kernels, which run while a layer's adapters lie side by side, use those before."""

Names = str | tuple[str, ...]
"""What acts on a row: one adapter, or several together, in order."""


def adapters_of(names: Names) -> tuple[str, ...]:
    """The single adapters that act on a row."""
    return (names,) if isinstance(names, str) else names


class Shared:
    """What all adapted layers of one model share while it runs."""

    def __init__(self) -> None:
        self.plan: MixedPlan | None = None
        self.flags = FlagIndex()


class Groups:
    """The rows of a layer's input, sorted by adapter into groups of equal size, so that all adapters act in one product.

    Args:
        rows: Row numbers of each adapter.
        total: Number of all rows.
        device: Where they are.
        lasting: Whether each layer is called again and again, so that what it makes of its adapters is worth keeping.
    """

    def __init__(
        self, rows: Mapping[str, torch.Tensor], total: int, device: torch.device, lasting: bool = False
    ) -> None:
        self.names = tuple(rows)
        self.lasting = lasting
        self.size = max(len(index) for index in rows.values())
        self.is_even = len(rows) * self.size <= 2 * total
        """Whether filling smaller groups up costs less than twice the rows."""
        padded = torch.zeros(len(rows), self.size, dtype=torch.long, device=device)
        place = torch.empty(total, dtype=torch.long, device=device)
        for number, index in enumerate(rows.values()):
            padded[number, : len(index)] = index
            place[index] = torch.arange(len(index), device=device) + number * self.size
        self.padded, self.place = padded.flatten(), place
        self.number = place // self.size
        """Of each row: which group it is in."""
        self.notes: dict[Any, Any] = {}

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """Rows, (rows, …, features), as (groups, size · positions, features)."""
        return x.index_select(0, self.padded).reshape(len(self.names), -1, x.shape[-1])

    def join(self, parts: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inverse: (groups, size · positions, features) as rows of this shape."""
        return parts.reshape(len(self.names) * self.size, *shape[1:]).index_select(0, self.place)

    def spread(self, values: torch.Tensor, names: Sequence[str], filling: float = 0.0) -> torch.Tensor:
        """What some adapters have, (adapters, …), as (groups, …) with a filling for the other groups."""
        if len(names) == len(self.names):
            return values
        known = [self.names.index(name) for name in names]
        spread = values.new_full((len(self.names), *values.shape[1:]), filling)
        return spread.index_copy_(0, torch.tensor(known, device=values.device), values)

    def of_rows(self, values: torch.Tensor, dims: int) -> torch.Tensor:
        """For each row what its group has, (groups, features), shaped to broadcast against rows of so many dimensions."""
        chosen = values.index_select(0, self.number)
        return chosen.view(chosen.shape[0], *(1,) * (dims - 2), chosen.shape[-1])

    def lay(self, tensors: Sequence[torch.Tensor], slot: int) -> torch.Tensor:
        """Tensors of several adapters side by side, (adapters, …), valid as long as what :meth:`once` keeps.

        Args:
            tensors: Of one shape.
            slot: A number, other than that of what the layer lays side by side beside it.
        """
        return side_by_side(tensors, None if self.lasting else _FIRST_SLOT + slot)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What a layer makes of its adapters, kept for all calls of one generation, or else until :meth:`end`."""
        if key not in self.notes:
            self.notes[key] = make()
        return self.notes[key]

    def end(self) -> None:
        """A layer has done its work."""
        if not self.lasting:
            self.notes.clear()


class MixedPlan:
    """Which rows of a batch go through which adapter.

    Args:
        names: One adapter per row, or several that act on it together; ``"__base__"`` is the plain model.
        expands: For a generation: layers are called again and again, and may see each row several times in a row, as with beams.
    """

    def __init__(self, names: Sequence[Names], *, expands: bool = False) -> None:
        self.names = tuple(names)
        self.kinds = tuple(dict.fromkeys(self.names))
        """What acts on rows, each once."""
        self.adapters = tuple(dict.fromkeys(name for names in self.kinds for name in adapters_of(names)))
        """All adapters that act on any row."""
        self.expands = expands
        self._rows: dict[Names, list[int]] = {}
        for row, name in enumerate(self.names):
            self._rows.setdefault(name, []).append(row)
        self._index: dict[tuple[int, torch.device], dict[Names, torch.Tensor]] = {}
        self._groups: dict[tuple[int, torch.device], Groups] = {}
        self.notes: dict[Any, torch.Tensor] = {}
        """What layers work out once for a plan."""

    @property
    def only(self) -> str | None:
        """The adapter of all rows, where they have the same one."""
        return self.names[0] if len(self._rows) == 1 and isinstance(self.names[0], str) else None

    def groups(self, x: torch.Tensor, where: str) -> Groups | None:
        """Rows sorted into groups of equal size, or ``None`` where there is one adapter, groups are too uneven, or rows have several.

        Args:
            x: The input, as for :meth:`rows`.
            where: What asks, for the message.
        """
        rows = self.rows(x, where)
        single = {names: index for names, index in rows.items() if isinstance(names, str)}
        if len(rows) == 1 or len(single) < len(rows):
            return None
        key = (x.shape[0], x.device)
        if key not in self._groups:
            self._groups[key] = Groups(single, x.shape[0], x.device, lasting=self.expands)
        return self._groups[key] if self._groups[key].is_even else None

    def rows(self, x: torch.Tensor, where: str) -> dict[Names, torch.Tensor]:
        """Row numbers in a layer's input of each adapter, or of several together.

        Args:
            x: The input, whose first dimension is the batch, or batch times positions for 2-D inputs.
            where: What asks, for the message.

        Raises:
            ValueError: The input has no such rows.
        """
        found, planned = x.shape[0], len(self.names)
        factor, rest = divmod(found, planned)
        if rest or factor < 1 or (factor > 1 and not self.expands and x.dim() != 2):
            raise ValueError(
                f"`adapter_names` has {planned} names, but {where} sees {found} rows (input of shape {tuple(x.shape)}). "
                "Give one name per row of the batch; layers that regroup rows cannot take part in a mixed batch."
            )
        key = (factor, x.device)
        if key not in self._index:
            self._index[key] = {
                name: torch.tensor([r * factor + i for r in rows for i in range(factor)], device=x.device)
                for name, rows in self._rows.items()
            }
        return self._index[key]


def by_rows(
    plan: MixedPlan, x: torch.Tensor, where: str, run: Callable[[Any, torch.Tensor | None], torch.Tensor]
) -> torch.Tensor:
    """Run each group of rows by its adapter, or by several together, and put the results back into the batch's order.

    Args:
        plan: The plan.
        x: The layer's input.
        where: What asks, for messages.
        run: Called with what acts on rows (:data:`Names`) and their numbers (``None``: all rows); gives the output of these rows.
    """
    groups = plan.rows(x, where)
    if len(groups) == 1:
        return run(next(iter(groups)), None)
    outputs = [run(name, index) for name, index in groups.items()]
    if len({o.shape[1:] for o in outputs}) > 1:
        shapes = {name: tuple(o.shape[1:]) for name, o in zip(groups, outputs, strict=True)}
        raise ValueError(f"The adapters of this batch give outputs of different shapes in {where}: {shapes}.")
    order = torch.argsort(torch.cat(list(groups.values())))
    return torch.cat(outputs).index_select(0, order)


def check_names(names: Any, known: Iterable[str], batch_size: int | None) -> list[Names]:
    """Check ``adapter_names`` of a call.

    Args:
        names: A list with one entry for each row: a name, or a tuple or list of names that act on the row together.
        known: The adapters that there are.
        batch_size: Number of rows, where that is known.

    Returns:
        A name or a tuple of several for each row.

    Raises:
        ValueError: Not such a list, an unknown name, or names that cannot act together.
    """
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(_is_entry(n) for n in names):
        raise ValueError(
            f"`adapter_names` should be a list with one adapter name per row of the batch, or a tuple of names for a row that several "
            f"adapters act on together, got {names!r}."
        )
    entries = [n if isinstance(n, str) else tuple(n) if len(n) > 1 else n[0] for n in names]
    known = list(known)
    unknown = sorted({n for entry in entries for n in adapters_of(entry) if n not in known and n != BASE})
    if unknown:
        raise ValueError(
            f"`adapter_names` holds unknown adapters: {shorten(unknown)}{did_you_mean(unknown[0], known)}. "
            f"Loaded: {', '.join(known)}; {BASE!r} is the plain model."
        )
    for entry in {e for e in entries if not isinstance(e, str)}:
        if BASE in entry:
            raise ValueError(f"`adapter_names` holds {entry!r}, but {BASE!r} is the plain model: leave it out there.")
        if len(set(entry)) < len(entry):
            raise ValueError(f"`adapter_names` holds {entry!r}, which names an adapter twice. Name each once.")
    if batch_size is not None and batch_size != len(entries):
        raise ValueError(
            f"`adapter_names` has {len(entries)} names, but the batch has {batch_size} rows. Give one name per row, or a tuple of "
            "names for a row that several adapters act on."
        )
    return entries


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, str):
        return True
    return isinstance(entry, (tuple, list)) and len(entry) > 0 and all(isinstance(n, str) for n in entry)


def batch_size_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Number of rows of a model call, read off its first tensor, or ``None`` where there is none."""
    for name in ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "inputs"):
        if isinstance(kwargs.get(name), torch.Tensor):
            return kwargs[name].shape[0]
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.dim() > 0:
            return value.shape[0]
    return None


@contextlib.contextmanager
def planned(model: nn.Module, shared: Shared, plan: MixedPlan) -> Iterator[None]:
    """Within this context the adapted layers of ``model`` follow the plan.

    Checkpointed blocks run again during backward, after the context has ended, so their function is bound to the plan. Without a
    graph nothing runs again.
    """
    before = shared.plan
    bound: list[tuple[nn.Module, Any]] = []
    for module in model.modules() if torch.is_grad_enabled() else ():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is not None and getattr(module, "gradient_checkpointing", False):
            bound.append((module, function))
            planned_function = functools.partial(_checkpoint_planned, function, shared, plan)
            module.__dict__["_gradient_checkpointing_func"] = planned_function
    shared.plan = plan
    try:
        yield
    finally:
        shared.plan = before
        for module, function in bound:
            module.__dict__["_gradient_checkpointing_func"] = function


def _checkpoint_planned(checkpoint: Any, shared: Shared, plan: MixedPlan, function: Any, *args: Any, **kw: Any) -> Any:
    def run(*inner: Any, **inner_kw: Any) -> Any:
        before = shared.plan
        shared.plan = plan
        try:
            return function(*inner, **inner_kw)
        finally:
            shared.plan = before

    return checkpoint(run, *args, **kw)
