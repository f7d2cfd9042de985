"""What holds an adapter's virtual tokens or prefix: one module at the root of the base model, and the tables inside it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from . import prefixes
from .alibi import ThroughCache
from .errors import doubt
from .holder import BaseTunerLayer
from .mixed import MixedPlan, Names, adapters_of, by_rows
from .positions import Shift, position_modules
from .prefixes import NotePast, Pair, Site
from .prompt_table import ACTIVE, CROSS, FILE_KEY, MAIN, Layout, OwnLoss, PromptTable, Where
from .sharding import is_dtensor, whole
from .task_rows import NO_TASKS, adapter_of, task_numbers, task_of, with_task, without_tasks
from .windows import Clock

NAME = "peft_prompts"
"""The holder's name in the base model."""

Placement = Literal["prefix", "tokens"]


class Prompts(BaseTunerLayer):
    """All virtual tokens and prefixes of a model.

    Args:
        model: The base model. Its modules are referred to, not registered here.
        layers: Its attention layers that take prefixes, by part of the model.
        shape: Number of key heads and their size.
        stacks: The parts of the model that run these layers.
    """

    adapter_layer_names = ("prompt_encoder",)
    other_param_names = ("placements",)
    stands_alone = True

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Sequence[tuple[nn.Module, Callable[..., Any] | None]]],
        shape: tuple[int, int],
        stacks: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.prompt_encoder = nn.ModuleDict()
        self.placements: dict[str, Placement] = {}
        self.heads, self.head_size = shape
        self.sites: dict[str, list[Site]] = {}
        for part, found in layers.items():
            owner = next((m for m, _ in found if getattr(m, "has_relative_attention_bias", False)), None)
            self.sites[part] = [
                Site(
                    m,
                    self,
                    i,
                    eager,
                    getattr(m, "config", None),
                    m if getattr(m, "has_relative_attention_bias", False) else owner,
                    part,
                )
                for i, (m, eager) in enumerate(found)
            ]
        self._outside = _Outside(model, stacks)
        self._handles: dict[str, list[Any]] = {}
        self._unfilled: dict[str, PromptTable] = {}
        self._forget()

    def _forget(self) -> None:
        """Drop what belongs to a running forward pass."""
        self._pieces: dict[tuple[str, str], tuple[Any, tuple[Pair, ...]]] = {}
        self._held: dict[str, tuple[Pair, ...]] = {}
        self._shared_masks: dict[tuple[str, int], tuple[tuple[Any, ...], Any]] = {}
        self._recording: dict[Where, Pair] | None = None
        self._task_plan: MixedPlan | None = None
        self._task_rows: torch.Tensor | None = None
        self.captured: dict[Names, list[Pair]] = {}
        self.prepended: int | None = None
        self.clock = Clock()
        self.is_capturing = False
        self.whole = False

    def __getstate__(self) -> dict[str, Any]:
        transient = (
            "_pieces", "_held", "_shared_masks", "_recording", "_task_plan", "_task_rows", "captured", "prepended", "clock", "is_capturing",
            "whole",
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
        sites = self.sites[MAIN]
        return bool(sites) and not encoder_decoder and all(getattr(s.module, "is_causal", True) for s in sites)

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Device and dtype of the base model's embeddings; float32 where these are of no plain float type."""
        weight = self._outside.model.get_input_embeddings().weight  # type: ignore[operator]
        plain = weight.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        return weight.device, weight.dtype if plain else torch.float32

    def install(self, name: str, parts: tuple[Placement, PromptTable], first: BaseTunerLayer | None = None) -> None:
        """Add an adapter; it is frozen until it is activated."""
        placement, table = parts
        for what in (placement,) if table.layout is None else table.layout.reach:
            self.attach(what)
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
        plain.length, plain.layout, plain.loss = table.length, table.layout, table.loss
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
        table = self.prompt_encoder[adapter_of(name)]
        assert isinstance(table, PromptTable)
        return table

    # -- what acts on a forward pass -------------------------------------------------------------------------------

    def _names(self, names: Names) -> Sequence[str]:
        """The adapters that act on rows."""
        if names != ACTIVE:
            return adapters_of(names)
        return [] if self._disable_adapters else self._active_adapter

    def _prefixes(self, names: Names) -> list[str]:
        """Those of them that put keys and values of their own in front, in order."""
        return [n for n in self._names(names) if self.placements.get(adapter_of(n)) == "prefix"]

    def _kinds(self) -> Sequence[Names]:
        """What acts on rows, each once."""
        plan = self.plan()
        return (ACTIVE,) if plan is None else plan.kinds

    def _layout(self, name: str) -> Layout:
        layout = self._table(name).layout
        assert layout is not None
        return layout

    def _captured_length(self, names: Names) -> int:
        return self.captured[names][0][0].shape[1] if names in self.captured else 0

    def _length(self, site: Site, names: Names) -> int:
        """Number of prefix tokens in front of rows in a layer."""
        own = sum(self._layout(n).length(site.where) for n in self._prefixes(names))
        return own + (self._captured_length(names) if site.part == MAIN else 0)

    def _reach(self, stack: str, names: Names) -> int:
        """By how much positions of rows are shifted in a stack: each adapter counts with its longest prefix there."""
        own = sum(self._layout(n).reach.get(stack, 0) for n in self._prefixes(names))
        return own + (self._captured_length(names) if stack == MAIN else 0)

    def longest_shift(self, stack: str) -> int:
        """By how much positions of the row with the most prefix tokens are shifted."""
        return max([0, *(self._reach(stack, names) for names in self._kinds())])

    def shift(self, stack: str, rows: int, device: torch.device) -> torch.Tensor | int:
        """By how much positions are shifted: a number, or (rows, 1) in a mixed batch."""
        if self.plan() is None:
            return self.longest_shift(stack)
        return self._of_rows(lambda names: self._reach(stack, names), rows, device)

    def _of_rows(self, number: Callable[[Names], int], rows: int, device: torch.device) -> torch.Tensor:
        """A number for each row of a mixed batch, (rows, 1)."""
        plan = self.plan()
        assert plan is not None
        known = {names: number(names) for names in plan.kinds}
        each = max(rows // len(plan.names), 1)
        return torch.tensor([known[n] for n in plan.names for _ in range(each)], device=device)[:, None]

    def longest(self, site: Site) -> int:
        """Number of prefix tokens in front of the row that has the most in a layer."""
        return max([0, *(self._length(site, names) for names in self._kinds())])

    def by_length(self, site: Site, make: Callable[[int], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        """Something that depends on the length of a row's prefix in a layer, for each row of ``x``; ``make`` gives one row of it."""
        plan = self.plan()
        if plan is None:
            return make(self.longest(site))

        def run(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            one = make(self._length(site, names))
            return one.expand(x.shape[0] if rows is None else rows.shape[0], *one.shape[1:])

        return by_rows(plan, x, "a prefix", run)

    def prefix(self, site: Site, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """Prefix keys and values of a layer, and which of them each row sees.

        They are (batch, heads, length, size), or, where all rows have the same, (1, heads, length, size).

        Args:
            site: The layer.
            key: The layer's keys, (batch, heads, keys, size).
        """
        plan = self.plan()
        if plan is None:
            pairs = self._pairs(ACTIVE, site, key, {})
            if not pairs:
                return None
            keys, values = (torch.cat(p, dim=1) if len(p) > 1 else p[0] for p in zip(*pairs, strict=True))
            return keys[None], values[None], None
        longest = self.longest(site)
        if longest == 0:
            return None
        made: dict[str, Pair] = {}
        # Keys and values side by side, so that rows are gathered once; rows with shorter prefixes end in columns that are hidden.
        side_by_side = {n: [torch.stack(pair) for pair in self._pairs(n, site, key, made)] for n in plan.kinds}

        def run(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            parts = side_by_side[names] or [key.new_zeros(2, key.shape[1], 0, key.shape[3])]
            both = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
            both = nn.functional.pad(both, (0, 0, 0, longest - both.shape[2]))
            return both.expand(key.shape[0] if rows is None else rows.shape[0], *both.shape)

        keys, values = by_rows(plan, key, "a prefix", run).unbind(1)
        return keys, values, self.visible(site, key)

    def visible(self, site: Site, x: torch.Tensor) -> torch.Tensor | None:
        """Which prefix columns each row sees, (batch, length), one tensor for all layers alike in a forward pass; ``None``: all of them."""
        plan = self.plan()
        if plan is None:
            return None
        lengths = tuple(self._length(site, names) for names in plan.kinds)
        if len(set(lengths)) <= 1:
            return None
        key = (lengths, x.shape[0], x.device)
        if key not in plan.notes:
            columns = torch.arange(max(lengths), device=x.device)
            plan.notes[key] = columns < self._of_rows(lambda names: self._length(site, names), x.shape[0], x.device)
        return plan.notes[key]

    # -- keys and values -------------------------------------------------------------------------------------------

    def _pairs(self, names: Names, site: Site, like: torch.Tensor, made: dict[str, Pair]) -> list[Pair]:
        """Keys and values of each adapter in front of rows in a layer, each (heads, length, size), in the dtype of the layer's keys.

        Args:
            names: What acts on the rows.
            site: The layer.
            like: The layer's keys.
            made: Those of single adapters, where they were made before; those made here are added.
        """
        found = []
        for name in self._prefixes(names):
            table = self._table(name)
            assert table.layout is not None
            place = table.layout.places.get(site.where)
            if place is None:
                continue
            if name not in made:
                pairs = self._whole_table(name, table, table.layout, site, like.dtype)
                made[name] = self._as_pair(table.piece(place)) if pairs is None else pairs[place]
            found.append(made[name])
        if site.part == MAIN and names in self.captured:
            found.append(self.captured[names][site.index])
        return [(key.to(like), value.to(like)) for key, value in found]

    def _as_pair(self, piece: torch.Tensor) -> Pair:
        """What a place of a table holds, (length, 2 · key size), as keys and values."""
        key, value = piece.view(piece.shape[0], 2, self.heads, self.head_size).permute(1, 2, 0, 3).unbind(0)
        return key, value

    def _split(self, layout: Layout, table: torch.Tensor) -> tuple[Pair, ...]:
        """Keys and values of each place."""
        if layout.flat:
            return tuple(self._as_pair(piece) for piece in layout.split(table))
        both = table.view(table.shape[0], -1, self.heads, self.head_size).permute(1, 2, 0, 3).unbind(0)
        return tuple(zip(both[::2], both[1::2], strict=True))

    def _whole_table(
        self, name: str, table: PromptTable, layout: Layout, site: Site, dtype: torch.dtype
    ) -> tuple[Pair, ...] | None:
        """All places' keys and values, made once by the first layer of a stack that asks and dropped by the last.

        ``None`` inside a checkpointed block: it runs again by itself during the backward pass, and saves the same tensors then
        only if it depends on parameters alone.
        """
        if name in self._held and not torch.is_grad_enabled():
            return self._held[name]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hooked = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            if hooked or torch._C._current_graph_task_id() != -1:
                return None
        first, last = layout.turns[site.stack]
        state: tuple[Any, ...] = (torch.is_grad_enabled(), dtype)
        if not torch.compiler.is_compiling():
            state = (*state, *(prefixes.version(p) for p in table.parameters()))
        if site.order == first:
            self._pieces[name, site.stack] = state, self._split(layout, table().to(dtype))
        known = self._pieces.get((name, site.stack))
        if known is None or known[0] != state:
            return None
        if site.order == last:
            del self._pieces[name, site.stack]
        return known[1]

    def shared(self, site: Site, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """Something that all layers of a part share in a forward pass, where their prefixes are of one length.

        The first that asks makes it, and the last drops it.

        Args:
            site: The layer.
            key: What it depends on, the length of the prefix in third place.
            make: Makes it.
        """
        slot = site.part, key[2]
        known = self._shared_masks.get(slot)
        if known is None or not all(
            a is b or (not isinstance(a, torch.Tensor) and a == b) for a, b in zip(known[0], key, strict=True)
        ):
            known = self._shared_masks[slot] = key, make()
        if site.index == len(self.sites[site.part]) - 1:
            self._shared_masks = {s: kept for s, kept in self._shared_masks.items() if s[0] != site.part}
        return known[1]

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within this context tables are made once for all calls without gradients, as the steps of generation are."""
        with torch.no_grad():
            tables = {n: self._table(n) for n, where in self.placements.items() if where == "prefix"}
            made = {n: self._split(self._layout(n), t()) for n, t in tables.items() if not t.folded}
        before, self._held = self._held, {**self._held, **made}
        try:
            yield
        finally:
            self._held = before

    # -- recording -------------------------------------------------------------------------------------------------

    def note(self, site: Site, key: torch.Tensor, value: torch.Tensor) -> None:
        """Keep a layer's keys and values if :meth:`record` asked for them."""
        if self._recording is not None:
            self._recording[site.where] = key, value

    def record(self, run: Callable[[], Any], parts: Iterable[str] = (MAIN,)) -> dict[Where, Pair]:
        """Keys and values of layers, each (batch, heads, tokens, size), in the forward pass that ``run`` does.

        Args:
            run: Does it.
            parts: The parts of the model whose layers are asked.
        """
        passing = [part for part in parts if part not in self._handles]
        for part in passing:
            self.attach(part)
        self._recording = {}
        try:
            run()
            return self._recording
        finally:
            self._recording = None
            for part in passing:
                self.detach(part)

    def keys_values_of(self, input_ids: torch.Tensor, parts: Iterable[str] = (MAIN,)) -> dict[Where, Pair]:
        """Keys and values that the base model itself gives tokens in each layer, (heads, tokens, size).

        Args:
            input_ids: The tokens, (1, tokens).
            parts: The parts of the model whose layers are asked.
        """
        model, before = self._outside.model, self._disable_adapters
        training = [m for m in model.modules() if m.training]
        self._disable_adapters = True
        try:
            for module in training:
                module.training = False  # not eval(), to which a model may have given a meaning of its own
            with torch.no_grad():
                found = self.record(lambda: self._outside.run(input_ids.to(self.device_and_dtype()[0])), parts)
            return {where: (key[0], value[0]) for where, (key, value) in found.items()}
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
        ids = task_numbers(task_ids, rows if mixed is None else len(mixed.names))
        own = [n for n in self._active_adapter if n in self.placements]
        if not self._disable_adapters and mixed is None and len(own) > 1:
            raise ValueError(
                f"`task_ids` are given, but several adapters with virtual tokens are active: {', '.join(own)}. Activate one."
            )
        names = mixed.names if mixed is not None else (own[0] if own else ACTIVE,) * len(ids)
        adapters = {n for one in names for n in adapters_of(one)}
        tasks = {n: self._table(n).tasks if n in self.placements else 0 for n in adapters}
        if not self._disable_adapters and mixed is None and not any(tasks.values()):
            raise ValueError(NO_TASKS)
        # Several adapters that act on a row all read its number.
        counts = [[tasks[n] for n in adapters_of(one) if tasks[n]] for one in names]
        wrong = sorted({i for i, here in zip(ids, counts, strict=True) if here and not 0 <= i < min(here)})
        if wrong:
            known = min(t for t in tasks.values() if t)
            raise ValueError(f"`task_ids` holds {wrong}, but the adapter has {known} tasks: 0 to {known - 1}.")
        keys = [with_task(one, i, tasks) for one, i in zip(names, ids, strict=True)]
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
    def only(self, rows: Sequence[Names]) -> Iterator[None]:
        """Within this context the plan of a batch, if it has one, has these rows."""
        before = self._shared.plan, self._task_plan
        if self._shared.plan is not None:
            self._shared.plan = MixedPlan([without_tasks(names) for names in rows])
        if self._task_plan is not None:
            self._task_plan = MixedPlan(rows)
        try:
            yield
        finally:
            self._shared.plan, self._task_plan = before

    def token_names(self, names: Names) -> list[str]:
        """Those among the adapters that act on rows that have tokens at the input."""
        return [n for n in self._names(names) if self.placements.get(adapter_of(n)) == "tokens"]

    def token_kinds(self) -> list[Names]:
        """What acts on rows, each once, where there are tokens at the input in it."""
        return [names for names in self._kinds() if self.token_names(names)]

    def token_adapters(self) -> list[str]:
        """All adapters with tokens at the input that act on any row, each once whatever the tasks of rows."""
        return list(dict.fromkeys(adapter_of(n) for names in self._kinds() for n in self.token_names(names)))

    def loss_of(self, name: str) -> OwnLoss | None:
        """An adapter's own loss, if its method has one."""
        return self._table(name).loss

    def tokens(self, names: Names) -> torch.Tensor:
        """Virtual tokens of rows, (tokens, size); where each row has its own, in a compiled graph, (batch, tokens, size)."""
        tables = [
            self._table(n).tokens(task_of(n) if self._task_rows is None else self._task_rows)
            for n in self.token_names(names)
        ]
        if not tables:
            return torch.empty(0, self._outside.model.get_input_embeddings().weight.shape[1])
        return tables[0] if len(tables) == 1 else torch.cat(tables)

    def token_count(self, names: Names) -> int:
        """How many there are."""
        return sum(self._table(n).length for n in self.token_names(names))

    def longest_tokens(self) -> int:
        """How many the row with the most has."""
        return max([0, *(self.token_count(names) for names in self._kinds())])

    def embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The base model's embeddings of tokens."""
        return self._outside.model.get_input_embeddings()(input_ids)

    # -- places ----------------------------------------------------------------------------------------------------

    def attach(self, what: str) -> None:
        """Take places in the model, if that was not done: in attention layers of a part for prefixes, at its input for ``"tokens"``."""
        if what in self._handles:
            return
        if what == "tokens":
            from .soft_prompts import hooks

            self._handles[what] = hooks(self, self._outside.model)
            if self.is_decoder:
                self.attach(MAIN)  # with a cache they become a prefix
            return
        handles = self._handles[what] = []
        for site in self.sites[what]:
            if site.eager is None:
                handles.append(
                    site.module.register_forward_pre_hook(
                        ThroughCache(site, self._outside.stacks[what]), with_kwargs=True
                    )
                )
                continue
            prefixes.divert(site)
            if site.bias_owner is not None:
                handles.append(site.module.register_forward_pre_hook(NotePast(site), with_kwargs=True))
        if what == CROSS:
            return  # it knows no positions
        for module in position_modules(self._outside.stacks[what]).values():
            shift = Shift(self, module, what)
            handles.append(module.register_forward_pre_hook(shift, with_kwargs=True))
            if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
                handles.append(module.register_forward_hook(shift.as_rows))

    def detach(self, what: str) -> None:
        """Undo :meth:`attach`."""
        for handle in self._handles.pop(what, ()):
            handle.remove()
        for site in self.sites.get(what, ()):
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

    def __init__(self, model: Any, stacks: Mapping[str, Any]) -> None:
        self.model, self.stacks = model, stacks

    def run(self, input_ids: torch.Tensor) -> None:
        """Run the stack alone, or, where it needs an encoder's states, the whole model."""
        if getattr(self.model.config, "is_encoder_decoder", False):
            self.model(input_ids=input_ids, decoder_input_ids=input_ids)
        else:
            self.stacks[MAIN](input_ids=input_ids)


def _fold(table: PromptTable) -> torch.Tensor:
    """The virtual tokens that a table makes, as a constant; of parameters spread over processes the whole ones make it."""
    state = table.state_dict(keep_vars=True)
    with torch.no_grad():
        if not any(is_dtensor(tensor) for tensor in state.values()):
            return table()
        gathered = {key: whole(tensor, key) for key, tensor in state.items()}
        return torch.func.functional_call(table, gathered)


__all__ = ["FILE_KEY", "NAME", "Placement", "PromptTable", "Prompts"]
