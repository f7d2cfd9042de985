"""What holds an adapter's virtual tokens or prefix: one module at the root of the base model, and the tables inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import nn

from . import prefixes
from .alibi import ThroughCache
from .errors import doubt
from .holder import BaseTunerLayer
from .mixed import MixedPlan, by_rows
from .positions import Shift, position_modules
from .prefixes import NotePast, Pair, Site
from .prompt_table import FILE_KEY, OwnLoss, PromptTable
from .sharding import is_dtensor, whole

NAME = "peft_prompts"
"""The holder's name in the base model."""
_TASK = "\0"
"""Stands between an adapter's name and the number of a task, where rows have tasks: no adapter's name holds it."""

Placement = Literal["prefix", "tokens"]


class Prompts(BaseTunerLayer):
    """All virtual tokens and prefixes of a model.

    Args:
        model: The base model. Its modules are referred to, not registered here.
        layers: Its attention layers that take prefixes; empty where it has none.
        shape: Number of key heads and their size.
        stack: The part of the model that these layers are in.
    """

    adapter_layer_names = ("prompt_encoder",)
    other_param_names = ("placements",)
    stands_alone = True

    def __init__(
        self,
        model: nn.Module,
        layers: list[tuple[nn.Module, Callable[..., Any] | None]],
        shape: tuple[int, int],
        stack: nn.Module,
    ) -> None:
        super().__init__()
        self.prompt_encoder = nn.ModuleDict()
        self.placements: dict[str, Placement] = {}
        self.heads, self.head_size = shape
        owner = next((m for m, _ in layers if getattr(m, "has_relative_attention_bias", False)), None)
        self.sites = [
            Site(
                m,
                self,
                i,
                eager,
                getattr(m, "config", None),
                m if getattr(m, "has_relative_attention_bias", False) else owner,
            )
            for i, (m, eager) in enumerate(layers)
        ]
        self._outside = _Outside(model, stack)
        self._handles: dict[Placement, list[Any]] = {}
        self._unfilled: dict[str, PromptTable] = {}
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to a running forward pass."""
        self._pieces: dict[str, tuple[Any, tuple[torch.Tensor, ...]]] = {}
        self._held: dict[str, tuple[torch.Tensor, ...]] = {}
        self._shared_mask: tuple[tuple[Any, ...], Any] | None = None
        self._recording: dict[int, Pair] | None = None
        self._task_plan: MixedPlan | None = None
        self._task_rows: torch.Tensor | None = None
        self.captured: dict[str, list[Pair]] = {}
        self.prepended: int | None = None
        self.is_capturing = False
        self.whole = False

    def __getstate__(self) -> dict[str, Any]:
        transient = (
            "_pieces", "_held", "_shared_mask", "_recording", "_task_plan", "_task_rows", "captured", "prepended", "is_capturing", "whole"
        )  # fmt: skip
        return {k: v for k, v in self.__dict__.items() if k not in transient}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    # -- adapters --------------------------------------------------------------------------------------------------

    def get_base_layer(self) -> nn.Module:
        return self  # it wraps nothing

    @property
    def weight(self) -> Any:
        raise AttributeError("Virtual tokens have no `weight`; their table is `prompt_encoder[name].embedding.weight`.")

    @property
    def bias(self) -> Any:
        raise AttributeError("Virtual tokens have no `bias`.")

    @property
    def is_decoder(self) -> bool:
        """Whether it is a decoder alone: then virtual tokens see only one another."""
        encoder_decoder = getattr(self._outside.model.config, "is_encoder_decoder", False)
        return (
            bool(self.sites) and not encoder_decoder and all(getattr(s.module, "is_causal", True) for s in self.sites)
        )

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the base model's embeddings; float32 where these are of no plain float type."""
        weight = self._outside.model.get_input_embeddings().weight  # type: ignore[operator]
        plain = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return weight.device, weight.dtype if plain else torch.float32

    def install(self, name: str, parts: tuple[Placement, PromptTable], first: BaseTunerLayer | None = None) -> None:
        """Add an adapter; it is frozen until it is activated."""
        placement, table = parts
        self.attach(placement)
        self.placements[name] = placement
        table.requires_grad_(False)
        table.train(self.training)
        self.prompt_encoder[name] = table

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Parameter | torch.Tensor]]:
        if name in self.prompt_encoder:
            table = self._table(name)
            for key, own in table.file_keys.items():
                tensor = table.get_parameter(own) if table.folded else _fold(table)
                yield key, f"prompt_encoder.{name}.{own}", tensor

    def training_tensors(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name in self.prompt_encoder and not self._table(name).folded:
            for key, tensor in self._table(name).state_dict(keep_vars=True).items():
                yield f"prompt_encoder.{key}", f"prompt_encoder.{name}.{key}", tensor

    def fold(self, name: str, state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        own = {key: prefix + own_key for key, own_key, _ in self.training_tensors(name)}
        if not own:
            return {}
        tensors = {key.removeprefix("prompt_encoder."): state_dict[own_key] for key, own_key in own.items()}
        with torch.no_grad():
            return {FILE_KEY: torch.func.functional_call(self._table(name), tensors, ())}

    def adjust_to(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None] | None:
        """Replace what makes the table by a plain one, where a file holds the table alone."""
        if name not in self.prompt_encoder or self._table(name).folded:
            return None
        table = self._table(name)
        inner = {k.removeprefix("prompt_encoder."): t for k, t in tensors.items() if k.startswith("prompt_encoder.")}
        if inner:
            buffers = dict(table._buffers)
            table.expect(inner)
            return lambda: table._buffers.update(buffers)
        weight = next(table.parameters())
        if table.takes_table and weight.device.type != "meta":
            self._unfilled[name] = table
        elif weight.device.type != "meta":
            doubt(
                f"The file holds the table of adapter {name!r} but not what makes it while it trains, so from now on the table itself "
                "is the parameter. An optimiser that was made before does not know it: make it anew."
            )
        plain = PromptTable(*_fold(table).shape).to(weight)
        plain.length, plain.stride, plain.loss = table.length, table.stride, table.loss
        plain.requires_grad_(weight.requires_grad).train(table.training)
        self.prompt_encoder[name] = plain

        def undo() -> None:
            self.prompt_encoder[name] = self._unfilled.pop(name, table)

        return undo

    def loaded(self, name: str) -> None:
        """Put the module that makes a table back, and let it make the table that was read."""
        table = self._unfilled.pop(name, None)
        if table is not None:
            with torch.no_grad():
                table.take(self._table(name)())
            self.prompt_encoder[name] = table

    def _table(self, name: str) -> PromptTable:
        table = self.prompt_encoder[_adapter(name)]
        assert isinstance(table, PromptTable)
        return table

    # -- what acts on a forward pass -------------------------------------------------------------------------------

    def _prefix_names(self) -> list[str]:
        """Active adapters that put keys and values in front, in order, where all rows have the same."""
        if self._disable_adapters:
            return []
        prefix = [n for n in self._active_adapter if self.placements.get(n) == "prefix"]
        return prefix + [n for n in self._active_adapter if n in self.captured]

    def _gives_prefix(self, name: str) -> bool:
        return self.placements.get(name) == "prefix" or name in self.captured

    def _length(self, name: str) -> int:
        return self.captured[name][0][0].shape[1] if name in self.captured else self._table(name).length

    def shifts(self) -> bool:
        """Whether a prefix stands in front of any row."""
        return self.longest_shift() > 0

    def longest_shift(self) -> int:
        """Number of prefix tokens in front of the longest row."""
        plan = self.plan()
        if plan is None:
            return sum(self._length(n) for n in self._prefix_names())
        return max((self._length(n) for n in set(plan.names) if self._gives_prefix(n)), default=0)

    def shift(self, rows: int, device: torch.device) -> torch.Tensor | int:
        """By how much positions are shifted: a number, or (rows, 1) in a mixed batch."""
        plan = self.plan()
        if plan is None:
            return self.longest_shift()
        lengths = [self._length(n) if self._gives_prefix(n) else 0 for n in plan.names]
        each = max(rows // len(lengths), 1)
        return torch.tensor([n for n in lengths for _ in range(each)], device=device)[:, None]

    def by_length(self, make: Callable[[int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Something that depends on the length of a row's prefix, for each row of ``x``; ``make`` gives one row of it."""
        plan = self.plan()
        if plan is None:
            return make(self.longest_shift())

        def run(name: str, rows: torch.Tensor | None) -> torch.Tensor:
            one = make(self._length(name) if self._gives_prefix(name) else 0)
            return one.expand(x.shape[0] if rows is None else rows.shape[0], *one.shape[1:])

        return by_rows(plan, x, "a prefix", run)

    def prefix(self, index: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Prefix keys and values of a layer for a batch, (batch, heads, length, size), and which of them each row sees.

        Args:
            index: Number of the layer.
            key: The layer's keys, (batch, heads, keys, size).
        """
        plan = self.plan()
        if plan is None:
            names = self._prefix_names()
            if not names:
                return None
            pairs = [self._pair(n, index, key) for n in names]
            keys, values = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in zip(*pairs, strict=True))
            return keys.expand(key.shape[0], -1, -1, -1), values.expand(key.shape[0], -1, -1, -1), None
        longest = self.longest_shift()
        if longest == 0:
            return None
        # Keys and values side by side, so that rows are gathered once; rows with shorter prefixes end in columns that are hidden.
        pairs_by_name = {n: self._pair(n, index, key) for n in set(plan.names) if self._gives_prefix(n)}

        def run(name: str, rows: torch.Tensor | None) -> torch.Tensor:
            both = (
                torch.stack(pairs_by_name[name])
                if name in pairs_by_name
                else key.new_zeros(2, key.shape[1], 0, key.shape[3])
            )
            both = nn.functional.pad(both, (0, 0, 0, longest - both.shape[2]))
            return both.expand(key.shape[0] if rows is None else rows.shape[0], *both.shape)

        keys, values = by_rows(plan, key, "a prefix", run).unbind(1)
        return keys, values, self.visible(key)

    def visible(self, x: torch.Tensor) -> torch.Tensor | None:
        """Which prefix columns each row sees, (batch, length), one tensor for all layers of a forward pass; ``None``: all of them."""
        plan = self.plan()
        if plan is None or len({self._length(n) if self._gives_prefix(n) else 0 for n in set(plan.names)}) == 1:
            return None
        longest = self.longest_shift()
        known = plan.notes.get(x.shape[0])
        if known is None or known.shape[1] != longest or known.device != x.device:
            known = torch.arange(longest, device=x.device) < self.shift(x.shape[0], x.device)
            plan.notes[x.shape[0]] = known
        return known

    # -- keys and values -------------------------------------------------------------------------------------------

    def _pair(self, name: str, index: int, like: torch.Tensor) -> Pair:
        """Keys and values of an adapter for a layer, each (heads, length, size), in the dtype of the layer's keys."""
        if name in self.captured:
            pair = self.captured[name][index]
        else:
            pieces = self._whole_table(name, index, like.dtype)
            place = self._table(name).stride * index % len(self.sites)
            if pieces is None:
                width = 2 * self.heads * self.head_size
                pieces = self._split(self._table(name).columns(place * width, (place + 1) * width))
                pair = pieces[0], pieces[1]
            else:
                pair = pieces[2 * place], pieces[2 * place + 1]
        return pair[0].to(like), pair[1].to(like)

    def _split(self, table: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The columns of a table hold key and value of the first layer, key and value of the second, …"""
        return table.view(table.shape[0], -1, self.heads, self.head_size).permute(1, 2, 0, 3).unbind(0)

    def _whole_table(self, name: str, index: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...] | None:
        """All layers' keys and values, made once by the first layer of a forward pass and dropped by the last.

        ``None`` inside a checkpointed block: it runs again by itself during the backward pass, and saves the same tensors then
        only if it depends on parameters alone.
        """
        if name in self._held and not torch.is_grad_enabled():
            return self._held[name]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            if hooked or torch._C._current_graph_task_id() != -1:
                return None
        table = self._table(name)
        state: tuple[Any, ...] = (torch.is_grad_enabled(), dtype)
        if not torch.compiler.is_compiling():
            state = (*state, *(prefixes.version(p) for p in table.parameters()))
        if index == 0:
            self._pieces[name] = state, self._split(table().to(dtype))
        known = self._pieces.get(name)
        if known is None or known[0] != state:
            return None
        if index == len(self.sites) - 1:
            del self._pieces[name]
        return known[1]

    def shared(self, index: int, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Something that all layers of a forward pass share, made by the first that asks and dropped by the last."""
        if torch.compiler.is_compiling():
            return make()
        known = self._shared_mask
        if known is None or not all(
            a is b or (not isinstance(a, torch.Tensor) and a == b) for a, b in zip(known[0], key, strict=True)
        ):
            known = self._shared_mask = key, make()
        if index == len(self.sites) - 1:
            self._shared_mask = None
        return known[1]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this context tables are made once for all calls without gradients, as the steps of generation are."""
        with torch.no_grad():
            tables = {n: self._table(n) for n, where in self.placements.items() if where == "prefix"}
            made = {n: self._split(t()) for n, t in tables.items() if not t.folded}
        before, self._held = self._held, {**self._held, **made}
        try:
            yield
        finally:
            self._held = before

    # -- recording -------------------------------------------------------------------------------------------------

    def note(self, index: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values if :meth:`record` asked for them."""
        if self._recording is not None:
            self._recording[index] = key[0], value[0]

    def record(self, run: Callable[[], Any]) -> list[Pair]:
        """Keys and values of each layer, each (heads, tokens, size), for the first row of the forward pass that ``run`` does."""
        passing = "prefix" not in self._handles
        self.attach("prefix")
        self._recording = {}
        try:
            run()
            return [self._recording[i] for i in range(len(self.sites))]
        finally:
            self._recording = None
            if passing:
                self.detach("prefix")

    def keys_values_of(self, input_ids: torch.Tensor) -> list[Pair]:
        """Keys and values that the base model itself gives tokens in each layer.

        Args:
            input_ids: The tokens, (1, tokens).
        """
        model, before = self._outside.model, self._disable_adapters
        training = [m for m in model.modules() if m.training]
        self._disable_adapters = True
        try:
            for module in training:
                module.training = False  # not eval(), to which a model may have given a meaning of its own
            with torch.no_grad():
                return self.record(lambda: self._outside.run(input_ids.to(self.device_and_dtype()[0])))
        finally:
            for module in training:
                module.training = True
            self._disable_adapters = before

    # -- virtual tokens at the input -------------------------------------------------------------------------------

    def plan(self) -> MixedPlan | None:
        """Which rows have which adapter, in a mixed batch."""
        return None if self._disable_adapters else self._task_plan or self._shared.plan

    @property
    def is_mixed(self) -> bool:
        """Whether rows of the batch have different adapters."""
        return not self._disable_adapters and self._shared.plan is not None

    @property
    def has_tasks(self) -> bool:
        """Whether any adapter has virtual tokens of its own for several tasks."""
        return any(self._table(name).tasks for name in self.prompt_encoder)

    @contextlib.contextmanager
    def by_task(self, task_ids: Any, rows: int | None, *, expands: bool) -> Iterator[None]:
        """Within this context each row of a batch has the virtual tokens of its task.

        Args:
            task_ids: Number of the task of each row, (batch,).
            rows: Number of rows, if it is known.
            expands: Whether the model may see each row several times in a row, as generation does with beams.

        Raises:
            ValueError: No adapter of the batch has tasks, or the numbers do not fit it or the batch.
        """
        if torch.compiler.is_compiling() and not self.is_mixed:
            # What the numbers are cannot be known while a graph is made: all rows are gathered at once.
            before_rows, self._task_rows = self._task_rows, torch.as_tensor(task_ids)
            try:
                yield
            finally:
                self._task_rows = before_rows
            return
        mixed = None if self._disable_adapters else self._shared.plan
        ids = _task_numbers(task_ids, rows if mixed is None else len(mixed.names))
        own = [n for n in self._active_adapter if n in self.placements]
        if not self._disable_adapters and mixed is None and len(own) > 1:
            raise ValueError(
                f"`task_ids` are given, but several adapters with virtual tokens are active: {', '.join(own)}. Activate one."
            )
        names = mixed.names if mixed is not None else (own[0] if own else "",) * len(ids)
        tasks = {n: self._table(n).tasks if n in self.placements else 0 for n in set(names)}
        if not self._disable_adapters and mixed is None and not any(tasks.values()):
            raise ValueError(NO_TASKS)
        keys = [f"{n}{_TASK}{i}" if tasks[n] else n for n, i in zip(names, ids, strict=True)]
        wrong = sorted({i for n, i in zip(names, ids, strict=True) if tasks[n] and not 0 <= i < tasks[n]})
        if wrong:
            known = min(t for t in tasks.values() if t)
            raise ValueError(f"`task_ids` holds {wrong}, but the adapter has {known} tasks: 0 to {known - 1}.")
        before, self._task_plan = self._task_plan, None if self._disable_adapters else MixedPlan(keys, expands=expands)
        try:
            yield
        finally:
            self._task_plan = before

    @property
    def rows_differ(self) -> bool:
        """Whether each row of the batch has virtual tokens of its own."""
        return self._task_rows is not None

    @contextlib.contextmanager
    def only(self, name: str) -> Iterator[None]:
        """Within this context the plan of a batch has one row, of this adapter."""
        before = self._shared.plan, self._task_plan
        if self._shared.plan is not None:
            self._shared.plan = MixedPlan([_adapter(name)])
        if self._task_plan is not None:
            self._task_plan = MixedPlan([name])
        try:
            yield
        finally:
            self._shared.plan, self._task_plan = before

    def token_names(self) -> list[str]:
        """Adapters with tokens at the input that act on the batch."""
        if self._disable_adapters:
            return []
        plan = self.plan()
        names = self._active_adapter if plan is None else dict.fromkeys(plan.names)
        return [n for n in names if self.placements.get(_adapter(n)) == "tokens"]

    def token_adapters(self) -> list[str]:
        """The same, each named once whatever the tasks of rows."""
        return list(dict.fromkeys(_adapter(n) for n in self.token_names()))

    def loss_of(self, name: str) -> OwnLoss | None:
        """An adapter's own loss, if its method has one."""
        return self._table(name).loss

    def tokens(self, name: str) -> torch.Tensor:
        """Virtual tokens of an adapter, (tokens, size); of all active ones for the empty name, and none for the plain model.

        Where each row has its own, in a compiled graph, (batch, tokens, size).
        """
        names = self.token_names() if not name else [name] if self.placements.get(_adapter(name)) == "tokens" else []
        tables = [self._table(n).tokens(_task(n) if self._task_rows is None else self._task_rows) for n in names]
        if not tables:
            return torch.empty(0, self._outside.model.get_input_embeddings().weight.shape[1])
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def token_count(self, name: str) -> int:
        """How many there are."""
        names = self.token_names() if not name else [name]
        return sum(self._table(n).length for n in names if self.placements.get(_adapter(n)) == "tokens")

    def longest_tokens(self) -> int:
        """How many the row with the most has."""
        plan = self.plan()
        return self.token_count("") if plan is None else max(self.token_count(n) for n in plan.names)

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base model's embeddings of tokens."""
        return self._outside.model.get_input_embeddings()(input_ids)

    # -- places ----------------------------------------------------------------------------------------------------

    def attach(self, what: Placement) -> None:
        """Take places in the model, if that was not done: in attention layers for prefixes, at its input for tokens."""
        if what in self._handles:
            return
        if what == "tokens":
            from .soft_prompts import hooks

            self._handles[what] = hooks(self, self._outside.model)
            if self.is_decoder:
                self.attach("prefix")  # with a cache they become one
            return
        handles = self._handles[what] = []
        for site in self.sites:
            if site.eager is None:
                handles.append(
                    site.module.register_forward_pre_hook(ThroughCache(site, self._outside.stack), with_kwargs=True)
                )
                continue
            prefixes.divert(site)
            if site.bias_owner is not None:
                handles.append(site.module.register_forward_pre_hook(NotePast(site), with_kwargs=True))
        for module in position_modules(self._outside.stack).values():
            handles.append(module.register_forward_pre_hook(Shift(self, module), with_kwargs=True))

    def detach(self, what: Placement) -> None:
        """Undo :meth:`attach`."""
        for handle in self._handles.pop(what, ()):
            handle.remove()
        if what == "prefix":
            for site in self.sites:
                if site.eager is not None:
                    prefixes.restore(site)

    def enter(self, model: nn.Module, name: str) -> None:
        """Become a part of the model."""
        setattr(model, name, self)

    def leave(self, model: nn.Module, name: str, plain: nn.Module) -> None:
        """Leave the model as it was."""
        self.let_go()
        delattr(model, name)

    def let_go(self) -> None:
        for what in list(self._handles):
            self.detach(what)


class _Outside:
    """Modules that are referred to without becoming children."""

    def __init__(self, model: Any, stack: Any) -> None:
        self.model, self.stack = model, stack

    def run(self, input_ids: torch.Tensor) -> None:
        """Run the stack alone, or, where it needs an encoder's states, the whole model."""
        if getattr(self.model.config, "is_encoder_decoder", False):
            self.model(input_ids=input_ids, decoder_input_ids=input_ids)
        else:
            self.stack(input_ids=input_ids)


__all__ = ["FILE_KEY", "NAME", "NO_TASKS", "Placement", "PromptTable", "Prompts"]

NO_TASKS = "`task_ids` is for multitask prompts; this adapter's method has none. Leave it out."


def _adapter(name: str) -> str:
    """The adapter that a row's name means."""
    return name.partition(_TASK)[0]


def _task(name: str) -> int | None:
    """The task that a row's name means, if it has one."""
    task = name.partition(_TASK)[2]
    return int(task) if task else None


def _task_numbers(task_ids: Any, rows: int | None) -> list[int]:
    """Task numbers of a batch as a list.

    Raises:
        ValueError: They are no whole numbers, or not one per row.
    """
    ids = task_ids.tolist() if isinstance(task_ids, torch.Tensor) else task_ids
    if not isinstance(ids, (list, tuple)) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(
            f"`task_ids` should be whole numbers of shape (batch,), one per row, got {task_ids!r}. For one task give "
            "torch.full((batch,), task)."
        )
    if rows is not None and len(ids) != rows:
        raise ValueError(
            f"`task_ids` has {len(ids)} numbers, but the batch has {rows} rows. Give one per row: torch.full((batch,), task) "
            "for one task."
        )
    return list(ids)


def _fold(table: PromptTable) -> torch.Tensor:
    """The virtual tokens that a table makes, as a constant; of parameters spread over processes the whole ones make it."""
    state = table.state_dict(keep_vars=True)
    with torch.no_grad():
        if not any(is_dtensor(tensor) for tensor in state.values()):
            return table()
        gathered = {key: whole(tensor, key) for key, tensor in state.items()}
        return torch.func.functional_call(table, gathered)
