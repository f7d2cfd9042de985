"""The adapted layer: a base layer, the adapters on it, and everything that does not depend on the method.

A weight method subclasses :class:`AdapterLayer` and says only what is its own: slots, shapes, start, ΔW and, optionally, a
faster way to apply it than through ΔW.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..kernels.recompute import Memo
from . import merging
from .blocks import Attachment
from .errors import PeftError, doubt
from .holder import BaseTunerLayer
from .kinds import LayerKind, Vector, kind_of
from .mixed import Groups, MixedPlan, Names, adapters_of, by_rows
from .sharding import is_dtensor

HALF = (torch.float16, torch.bfloat16)


@dataclass
class Parts:
    """One adapter on one layer before it is installed.

    Args:
        values: Settings by name of the attribute that keeps them per adapter (``r``, ``scaling``, …).
        tensors: Parameters by slot; ``SLOT.bias`` is the bias of the layer in a linear slot.
    """

    values: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Parts:
        """The parts in another dtype, modules among the settings included."""
        values = {k: v.to(dtype) if isinstance(v, nn.Module) else v for k, v in self.values.items()}
        return Parts(values, {k: t.to(dtype) for k, t in self.tensors.items()})


class AdapterLayer(BaseTunerLayer):
    """A layer with adapters of one method on it.

    It takes the place of the layer that it adapts. A block of several layers keeps its place, since what is inside keeps its names
    then: the adapted layer joins it as one more child and works on what the block gives.

    Args:
        base_layer: The layer to adapt, another adapted layer, or for methods with ``attached_as`` any module.

    Raises:
        ValueError: The base layer is of no supported kind.
    """

    linear_slots: ClassVar[tuple[str, ...]] = ()
    """Slots that hold a bias-free layer without a kernel of its own, or on convolutions a convolution (state-dict key
    ``slot.adapter.weight``). The first one reads the base layer's input; shapes come from ``self.kind.factor_shapes``."""
    parameter_slots: ClassVar[tuple[str, ...]] = ()
    """Slots that are plain parameters (state-dict key ``slot.adapter``)."""
    vector_slots: ClassVar[tuple[str, ...]] = ()
    """Slots that hold a module around one parameter (state-dict key ``slot.adapter.weight``, but ``slot`` alone in files)."""
    why_no_merge: str | None = None
    """Why the method cannot be merged, where it cannot; of a class, or of one layer."""
    delta_depends_on_weight: ClassVar[bool] = False
    """Whether ΔW is a function of the weight that it is added to; :meth:`needs_weight` where that differs by adapter."""
    shared_slots: ClassVar[tuple[str, ...]] = ()
    """Those of ``parameter_slots`` with one parameter for all layers of an adapter: the first layer holds it."""
    attached_as: ClassVar[str | None] = None
    """What the layer is called among the children of a block that it adapts. ``None``: the method works on the weight as a matrix,
    and so on single layers only."""
    adds_up: ClassVar[bool] = False
    """Whether a weighted sum of several adapters' parameters stands for the weighted sum of these adapters."""
    zeros_do_nothing: ClassVar[bool] = False
    """Whether an adapter of zeros changes nothing, nor do zeros behind its parameters in any dimension."""
    ties: ClassVar[bool] = False
    """Whether adapters act on every module that shares the layer's weight."""
    follows: AdapterLayer | None = None
    """The adapted layer whose adapters act here, where this one only shares its weight."""

    is_repeated: bool = False
    """Whether the model gives this layer one row for all of the batch and repeats what comes out of it."""

    base_layer: nn.Module
    kind: LayerKind
    attachment: Attachment
    out_features: int
    in_features: int
    matrix_shape: tuple[int, ...]
    cast_input_dtype_enabled: bool
    memo: Memo
    _first: dict[str, AdapterLayer]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        base = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        kind = kind_of(base, self.attached_as is not None)
        if kind is None:
            raise ValueError(f"{type(self).__name__} cannot adapt a layer of type {type(base_layer).__name__}.")
        attachment = Attachment(self)
        if not kind.has_matrix and any(True for _ in base.children()):
            attachment.block = base
        else:
            self._modules["base_layer"] = base_layer
        out_features, in_features = kind.features(base)
        self.__dict__.update(
            kind=kind, attachment=attachment, out_features=out_features, in_features=in_features,
            matrix_shape=kind.shape(base), cast_input_dtype_enabled=True, memo=Memo(), _first={},
        )  # fmt: skip
        for slot in self.linear_slots + self.vector_slots:
            self._modules[slot] = nn.ModuleDict()
        for slot in self.parameter_slots:
            self._modules[slot] = nn.ParameterDict()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "adapter_layer_names" not in cls.__dict__:
            cls.adapter_layer_names = cls.linear_slots + cls.parameter_slots + cls.vector_slots

    # -- what a method says ----------------------------------------------------------------------------------------

    def settings(self, config: Any, target: str) -> dict[str, Any]:
        """Settings of a new adapter, by name of the attribute that keeps them.

        Args:
            config: The adapter's configuration.
            target: Full name of the adapted module, for patterns.

        Raises:
            ValueError: The configuration does not suit this layer.
        """
        return {}

    def shapes(self, config: Any, settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shape of the parameter in each slot that a new adapter uses."""
        raise NotImplementedError

    def start(self, tensors: dict[str, torch.Tensor], config: Any, settings: dict[str, Any]) -> None:
        """Fill a new adapter's parameters, in place."""
        raise NotImplementedError

    def delta(self, name: str, weight: torch.Tensor | None) -> torch.Tensor:
        """ΔW of an adapter, of shape ``matrix_shape``: (out_features, in_features) for layers without a kernel.

        Args:
            name: The adapter.
            weight: The weight that it is added to, where :meth:`needs_weight` says so.
        """
        raise NotImplementedError

    def input_of(self, config: Any, target: str) -> str | None:
        """Name of a module that runs earlier and whose input ``after`` gets as ``x``; ``None``: the base layer's own.

        Args:
            config: The adapter's configuration.
            target: Full name of the adapted module.
        """
        return None

    def needs_weight(self, name: str) -> bool:
        """Whether what an adapter changes depends on the weight and bias that it is added to."""
        return self.delta_depends_on_weight

    def delta_bias(self, name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        """What the adapter adds to the layer's bias (``None``: it has none), shape (out_features,); ``None``: nothing."""
        return None

    def before(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Change the base layer's input, shape (batch, …, in_features); (batch, in_features, …) for convolutions."""
        return x

    def after(self, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()) -> torch.Tensor:
        """Change the base layer's output. This form goes through ΔW; a method may know a cheaper one.

        Args:
            name: The adapter.
            x: The layer's input, (batch, …, in_features), (batch, in_features, …) for convolutions, or indices.
            y: Its output so far, shaped likewise.
            earlier: Adapters that were applied to ``y`` before.
        """
        weight = self.matrix(earlier) if self.needs_weight(name) else None
        delta = self.delta(name, weight)
        return y + self.kind.product(self.get_base_layer(), self.cast_input(x, delta.dtype), delta)

    def whole(self, name: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
        """The output of a plain linear layer with one adapter, in one go, where that is cheaper than :meth:`after`.

        Args:
            name: The adapter.
            x: The layer's input, (batch, …, in_features).
            weight: Its weight, (out_features, in_features).
            bias: Its bias.

        Returns:
            (batch, …, out_features), or ``None`` for going through the base layer and :meth:`after`.
        """
        return None

    def after_groups(self, groups: Groups, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor | None:
        """Change the output of a mixed batch without a graph, all adapters at once.

        Args:
            groups: Which rows belong to which adapter. Some may not be on this layer.
            x: The layer's input, (rows, …, in_features).
            y: Its output.

        Returns:
            The changed output, or ``None`` for going through :meth:`after`, one adapter after the other.
        """
        return None

    def after_tied(
        self, layer: AdapterLayer, name: str, x: torch.Tensor, y: torch.Tensor, earlier: Sequence[str] = ()
    ) -> torch.Tensor:
        """Change the output of a layer that shares this one's weight; through ΔW where the method knows no cheaper form.

        Args:
            layer: The other layer, whose input and output ``x`` and ``y`` are; for the rest see :meth:`after`.
        """
        return AdapterLayer.after(layer, name, x, y, earlier)

    def repeated(self, layer: AdapterLayer, name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What files hold of a layer that shares this one's weight and adapter, for readers that look for it there.

        Args:
            layer: The other layer.
            name: The adapter.
            tensors: What files hold of this layer, by key.

        Returns:
            Tensors by key of the other layer, made from these; none where files name the adapter once.
        """
        return {}

    # -- forward ---------------------------------------------------------------------------------------------------

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._shared.plan is not None and not self._disable_adapters:
            return self._forward_mixed(x, *args, **kwargs)
        names = self.live_adapters()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) == 1 and not args and not kwargs and (y := self._in_one_go(names[0], x)) is not None:
            return y
        base_input = x
        for name in names:
            base_input = self.before(name, base_input)
        return self.adapted(x, self.base_layer(base_input, *args, **kwargs))

    def _in_one_go(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        if torch.compiler.is_compiling():
            return None
        operands = self.kind.operands(self.base_layer)
        return None if operands is None else self.whole(name, x, *operands)

    def adapted(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The output of the base layer, changed by the live adapters, or by that of each row in a mixed batch.

        Args:
            x: Its input.
            y: Its output.
        """
        try:
            if self._shared.plan is not None:
                return self._adapted_by_rows(x, y)
            names, dtype = self.live_adapters(), y.dtype
            for i, name in enumerate(names):
                y = self.after(name, self.attachment.read(name, x), y, names[:i])
            return y if y.dtype == dtype else y.to(dtype)
        finally:
            self.attachment.release()

    def _forward_mixed(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        plan = self._shared.plan
        assert plan is not None
        if self.merged:
            raise ValueError("`adapter_names` cannot be used while adapters are merged: call unmerge_adapter() first.")
        if not any(self.has_adapter(name) for name in plan.adapters):
            return self.base_layer(x, *args, **kwargs)
        self.kind.check_rows(self.get_base_layer(), x)
        if x.shape[0] == 1 and len(plan.names) > 1:  # one row for the whole batch, such as positions
            if self.is_repeated:
                return self._forward_repeated(plan, x, *args, **kwargs)
            x = x.expand(len(plan.names), *x.shape[1:])
        plan.rows(x, self._where())  # raises where rows do not fit
        if plan.only is not None and not args and not kwargs and (y := self._in_one_go(plan.only, x)) is not None:
            return y

        def scaled(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            part = x if rows is None else x.index_select(0, rows)
            for name in self._here(names):
                part = self.before(name, part)
            return part

        changes_input = type(self).before is not AdapterLayer.before
        base_input = by_rows(plan, x, self._where(), scaled) if changes_input else x
        return self._adapted_by_rows(x, self.base_layer(base_input, *args, **kwargs))

    def _forward_repeated(self, plan: MixedPlan, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output for one row that the model repeats for all of the batch: adapters of the rows have to be the same here."""
        if len({tuple(self._here(names)) for names in plan.kinds}) > 1:
            raise ValueError(
                f"`adapter_names`: the rows have different adapters, but the model gives {self._where()} the relative positions once "
                "for all rows. Give all rows the same adapter, or adapt neither queries nor keys nor positions of this model's "
                "attention (target_modules)."
            )
        self._shared.plan = MixedPlan(plan.kinds[:1])
        try:
            return self._forward_mixed(x, *args, **kwargs)
        finally:
            self._shared.plan = plan

    def _adapted_by_rows(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        plan = self._shared.plan
        assert plan is not None
        if not torch.is_grad_enabled():  # with a graph each adapter's own kernel keeps less
            groups = plan.groups(x, self._where())
            out = None if groups is None else self.after_groups(groups, x, y)
            if groups is not None:
                groups.end()
            if out is not None:
                return out if out.dtype == y.dtype else out.to(y.dtype)

        def changed(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            part, here = y if rows is None else y.index_select(0, rows), self._here(names)
            for i, name in enumerate(here):
                read = self.attachment.read(name, x)
                part = self.after(name, read if rows is None else read.index_select(0, rows), part, here[:i])
            return part.to(y.dtype)

        return by_rows(plan, x, self._where(), changed)

    def _here(self, names: Names) -> list[str]:
        return [name for name in adapters_of(names) if self.has_adapter(name)]

    def _where(self) -> str:
        return f"a layer of type {type(self.get_base_layer()).__name__}"

    @property
    def is_idle(self) -> bool:
        """Whether the layer does what its base layer does, since it is switched off or no adapter in use is on it."""
        if self._disable_adapters:
            return True
        plan = self._shared.plan
        return not (self.live_adapters() if plan is None else any(self.has_adapter(n) for n in plan.adapters))

    def live_adapters(self) -> list[str]:
        """The adapters that forward applies: active, on this layer, and not merged; none where a mixed batch's plan decides."""
        if self._disable_adapters or self._shared.plan is not None:
            return []
        return [n for n in self._active_adapter if n not in self.merged_adapters and self.has_adapter(n)]

    def cast_input(self, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The input in the adapter's dtype. Indices stay as they are, and so does everything under autocast."""
        if not self.cast_input_dtype_enabled or not x.is_floating_point() or x.dtype == dtype:
            return x
        if torch.is_autocast_enabled(x.device.type):
            return x
        return x.to(dtype)

    def fits(self, x: torch.Tensor, weight: torch.Tensor, *factors: torch.Tensor) -> bool:
        """Whether dtypes are those that a kernel for layer and update together takes: all the same, or a half-precision layer under
        float32 factors.

        Args:
            x: The layer's input.
            weight: Its weight.
            *factors: Parameters of an adapter.
        """
        wide = self.cast_input_dtype_enabled and weight.dtype in HALF
        return x.dtype == weight.dtype and (
            all(f.dtype == x.dtype for f in factors) or (wide and all(f.dtype == torch.float32 for f in factors))
        )

    def _cast_input_dtype(self, x: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
        return None if x is None else self.cast_input(x, dtype)

    # -- weights ---------------------------------------------------------------------------------------------------

    @property
    def is_attached(self) -> bool:
        return self.attachment.block is not None

    def get_base_layer(self) -> nn.Module:
        if self.attachment.block is not None:
            return self.attachment.block
        base: Any = self.base_layer
        while isinstance(base, BaseTunerLayer):
            base = base.base_layer
        return base

    def matrix(self, names: Iterable[str]) -> torch.Tensor:
        """The weight as a matrix with adapters of this layer added, and all live ones of layers below.

        Adapters that have no ΔW are left out.
        """
        if isinstance(self.base_layer, AdapterLayer):
            weight = self.base_layer.matrix(self.base_layer.live_adapters())
        else:
            weight = self.kind.to_matrix(self.base_layer, self.weight)
        for name in names if self.why_no_merge is None else ():
            weight = weight + self.delta(name, weight)
        return weight

    def offset(self, names: Iterable[str]) -> torch.Tensor | None:
        """The bias, shape (out_features,), with what adapters of this layer and all live ones of layers below add to it."""
        if isinstance(self.base_layer, AdapterLayer):
            bias = self.base_layer.offset(self.base_layer.live_adapters())
        else:
            bias = getattr(self.base_layer, "bias", None)
        for name in names:
            change = self.delta_bias(name, bias)
            if change is not None:
                bias = change if bias is None else bias + change
        return bias

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """ΔW of an adapter in the layout of the base layer's weight."""
        if self.why_no_merge is not None:
            raise ValueError(f"{type(self).__name__} has no ΔW: {self.why_no_merge}.")
        weight = self.matrix(()) if self.needs_weight(adapter) else None
        return self.kind.from_matrix(self.get_base_layer(), self.delta(adapter, weight))

    # -- adapters --------------------------------------------------------------------------------------------------

    def build(self, config: Any, target: str, device: torch.device | str | None = None) -> Parts:
        """Make a new adapter's parts without touching the layer.

        Args:
            config: The adapter's configuration.
            target: Full name of the adapted module.
            device: ``"meta"`` makes shapes only; otherwise the base layer's device is used.

        Returns:
            The parts, in float32 where the base layer is in half precision.

        Raises:
            ValueError: The configuration does not suit this layer.
        """
        settings = self.settings(config, target)
        shapes = self.shapes(config, settings)
        base_device, dtype = self.device_and_dtype()
        dtype = torch.promote_types(dtype, torch.float32)
        if device is None and base_device.type == "meta":
            device = base_device
        if device is not None and torch.device(device).type == "meta":
            return Parts(settings, {s: torch.empty(shape, dtype=dtype, device="meta") for s, shape in shapes.items()})
        tensors = {slot: torch.empty(shape, dtype=dtype) for slot, shape in shapes.items()}
        with torch.no_grad():
            self.start(tensors, config, settings)
        return Parts(settings, {s: t.to(device=base_device, dtype=dtype) for s, t in tensors.items()})

    def enter(self, model: nn.Module, name: str) -> None:
        if self.is_attached:
            self.attachment.attach()
        else:
            super().enter(model, name)

    def install(self, name: str, parts: Parts, first: AdapterLayer | None = None) -> None:
        """Add an adapter made by :meth:`build`; it is frozen until it is activated.

        Args:
            name: The adapter.
            parts: Its parts.
            first: The layer that holds what its layers share; this one when not given.
        """
        if first is not None and first is not self:
            self._first[name] = first
        for attribute, value in parts.values.items():
            if isinstance(value, nn.Module):
                value.train(self.training)
            getattr(self, attribute)[name] = value
        for key, tensor in parts.tensors.items():
            slot, _, leaf = key.partition(".")
            if slot in self.shared_slots and name in self._first:
                continue
            if slot in self.parameter_slots:
                getattr(self, slot)[name] = nn.Parameter(tensor, requires_grad=False)
            elif leaf:
                getattr(self, slot)[name].register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))
            else:
                module = self._module_for(slot, tensor)
                for parameter in module._parameters.values():
                    if parameter is not None:
                        parameter.requires_grad = False
                module.training = self.training
                getattr(self, slot)[name] = module

    def _module_for(self, slot: str, tensor: torch.Tensor) -> nn.Module:
        if slot in self.vector_slots:
            return Vector(tensor)
        return self.kind.factor(self.get_base_layer(), tensor, inner=slot == self.linear_slots[0])

    def own_key(self, part: str, name: str) -> str:
        """Where a tensor of :class:`Parts` lies in this module once it is installed."""
        slot, _, leaf = part.partition(".")
        return f"{slot}.{name}" if slot in self.parameter_slots else f"{slot}.{name}.{leaf or 'weight'}"

    def retune(self, name: str, settings: dict[str, Any]) -> None:
        """Give an adapter that is in use other settings, see :meth:`settings`."""
        for attribute, value in settings.items():
            if isinstance(value, nn.Module):
                value.train(self.training)
            getattr(self, attribute)[name] = value

    def make_room(self, rank: int | None, *, dry_run: bool = False) -> None:
        """Prepare all adapters for being replaced by others up to a rank without a change that compiled code would notice.

        Args:
            rank: The rank; the adapters' own when not given.
            dry_run: Check only.

        Raises:
            ValueError: An adapter has a larger rank.
        """

    def into_room(self, name: str, slot: str, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """A replacement for an adapter's parameter in a slot, in the shape that it takes in place.

        Args:
            name: The adapter.
            slot: The slot.
            value: The replacement, in the shape that its configuration asks for.
            shape: That of the parameter that is there.

        Raises:
            ValueError: It does not fit.
        """
        return value

    def parameter(self, slot: str, name: str) -> Any:
        """An adapter's parameter in one of ``parameter_slots``, or ``None``; attributes of modules would take several times as long, which
        shows in mixed batches."""
        holder: Any = self._modules[slot]
        found = holder._parameters.get(name)
        return holder[name] if found is None and name in holder else found

    def shared(self, slot: str, name: str) -> nn.Parameter:
        """The parameter of one of ``shared_slots``, wherever it is held; ``PeftError`` if it is sharded apart from this layer."""
        parameter = getattr(self._first.get(name, self), slot)[name]
        if type(parameter) is not nn.Parameter and is_dtensor(parameter):
            raise PeftError(
                f"{slot!r} of adapter {name!r} is shared by layers that were sharded apart, so it is not gathered here. "
                "Shard the model as one unit: `fully_shard(model)` alone."
            )
        return parameter

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._first.pop(adapter_name, None)
        self.attachment.forget(adapter_name)

    def correct_layout(self, config: Any, target: str) -> None:
        """Set ``config.fan_in_fan_out``, whether the weight is stored as (in_features, out_features), to what the layer does.

        Args:
            config: Configuration with that field.
            target: Full name of the adapted module, for the warning.

        Raises:
            ValueError: It was wrong, when strict; a warning otherwise.
        """
        stored_transposed = self.kind.name == "Conv1D"
        if config.fan_in_fan_out != stored_transposed and self.kind.name in ("Linear", "Conv1D"):
            doubt(
                f"fan_in_fan_out is {config.fan_in_fan_out}, but the target {target!r} is a {self.kind.name}. "
                f"Setting fan_in_fan_out to {stored_transposed}."
            )
            config.fan_in_fan_out = stored_transposed

    def device_and_dtype(self) -> tuple[torch.device, torch.dtype]:
        """Device of the base weight and its dtype; float32 where the weight is no plain float tensor."""
        base = self.get_base_layer()
        tensor = getattr(base, "weight", None)
        if not isinstance(tensor, torch.Tensor):
            tensor = next(itertools.chain(base.parameters(), base.buffers()), torch.empty(0))
        plain = tensor.dtype in HALF or tensor.dtype in (torch.float32, torch.float64)
        return tensor.device, tensor.dtype if plain else torch.float32

    # -- merging ---------------------------------------------------------------------------------------------------

    def why_not_mergeable(self, names: Sequence[str] = ()) -> str | None:
        """Why adapters cannot be merged here, or ``None`` where they can."""
        below: Any = self.base_layer if self.why_no_merge is None else None
        while isinstance(below, AdapterLayer):
            if below.why_no_merge is not None and not below.is_idle:
                return f"an adapter between it and the weight, a {type(below).__name__}, cannot be merged"
            below = below.base_layer
        bias = getattr(self.get_base_layer(), "bias", None)
        if bias is None and any(self.delta_bias(name, None) is not None for name in names):
            return "it has no bias to merge the adapter's into; use the adapter unmerged"
        return self.why_no_merge or self.kind.why_not_mergeable(self.get_base_layer())

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, keep_original: bool = True
    ) -> None:
        """Add adapters to the base weight.

        Args:
            safe_merge: Check the merged weight for NaN and infinity first.
            adapter_names: Which; the active ones when not given.
            keep_original: Keep a copy of the weight in host memory, so that unmerging restores it bit for bit. Without it
                unmerging subtracts.

        Raises:
            ValueError: The layer or method cannot be merged, or ``safe_merge`` found a broken weight.
        """
        merging.merge_layer(self, adapter_names, safe_merge=safe_merge, keep_original=keep_original)

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take merged adapters out of the base weight.

        Args:
            adapter_names: Which; all merged ones when not given.
        """
        merging.unmerge_layer(self, adapter_names)

    def _get_name(self) -> str:
        package = type(self).__module__.split(".")
        return f"{package[2] if package[:2] == ['peft', 'tuners'] else package[-1]}.{type(self).__name__}"

    def extra_repr(self) -> str:
        return f"merged={self.merged_adapters}" if self.merged_adapters else ""
