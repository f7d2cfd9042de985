"""Merging adapters into base weights and taking them out again, bit for bit."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import PeftError, PeftWarning, doubt, shorten
from .sharding import reshard

if TYPE_CHECKING:
    from .layer import AdapterLayer

logger = logging.getLogger("peft")
_ATTRIBUTE = "_peft_merge_record"


class MergeRecord:
    """What was merged into one base layer, in order, and the weight as it was before.

    Kept as a plain attribute of the base layer: outside the state dict, shared by all adapters that wrap it, copied with it.
    """

    def __init__(self, layer: Any, keep_original: bool) -> None:
        self.base = layer
        self.entries: list[tuple[AdapterLayer, str]] = []
        self.originals: dict[str, torch.Tensor] = {}
        self._stamp: dict[str, tuple[int, torch.dtype, int]] = {}
        self._inherited: dict[str, torch.dtype] = {}
        if keep_original:
            for key in ("weight", "bias"):
                tensor = getattr(layer, key, None)
                if tensor is not None:
                    self.originals[key] = tensor.detach().to("cpu", copy=True)

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.originals.values())

    def _current(self) -> dict[str, tuple[int, torch.dtype, int]]:
        tensors = {key: getattr(self.base, key) for key in self.originals}
        return {k: (t._version, t.dtype, t.data_ptr()) for k, t in tensors.items() if t is not None}

    def stamp(self) -> None:
        """Remember the state of the weights as this module has just written them."""
        self._stamp = self._current()

    @property
    def intact(self) -> bool:
        """Whether nobody else has changed the weights since."""
        return bool(self.originals) and self._stamp == self._current()

    def write(self, key: str, value: torch.Tensor) -> None:
        with torch.no_grad():
            getattr(self.base, key).copy_(value)

    # A copy's tensors have other addresses and versions: judge before copying, stamp afterwards.
    def __deepcopy__(self, memo: dict[int, Any]) -> MergeRecord:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        intact = self.intact
        for key, value in self.__dict__.items():
            twin.__dict__[key] = {} if key == "_stamp" else copy.deepcopy(value, memo)
        twin._inherited = self._dtypes() if intact else {}
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stamp": {}, "_inherited": self._dtypes() if self.intact else {}}

    def _dtypes(self) -> dict[str, torch.dtype]:
        return {key: dtype for key, (_, dtype, _) in self._stamp.items()}

    def settle(self) -> None:
        """After a copy or unpickling: take over the judgement made on the source, unless the copy was changed since."""
        if self._inherited:
            current = self._current()
            if self._inherited == {k: dtype for k, (version, dtype, _) in current.items() if version == 0}:
                self._stamp = current
            self._inherited = {}


def record_of(layer: AdapterLayer) -> MergeRecord | None:
    """The merge record of a layer's base, if anything is merged into it."""
    record = layer.get_base_layer().__dict__.get(_ATTRIBUTE)
    if record is not None:
        record.settle()
    return record


def merged_weights(
    layers_and_names: Iterable[tuple[AdapterLayer, str]], weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a base layer with adapters added, summed in at least float32 and rounded once.

    Args:
        layers_and_names: Adapted layers over the same base, and the adapter to add from each, in order.
        weight: The base layer's weight, in its own layout.
        bias: Its bias.
    """
    entries = list(layers_and_names)
    layer = entries[0][0]
    base, kind = layer.get_base_layer(), layer.kind
    wide = torch.promote_types(weight.dtype, torch.float32)
    matrix = kind.to_matrix(base, weight).to(wide)
    new_bias = None if bias is None else bias.to(wide)
    with torch.no_grad():
        for adapted, name in entries:
            if new_bias is not None and (change := adapted.delta_bias(name, new_bias)) is not None:
                new_bias = new_bias + change.to(wide)
            matrix = matrix + adapted.delta(name, matrix if adapted.needs_weight(name) else None).to(wide)
    matrix = kind.from_matrix(base, matrix).to(weight.dtype)
    return matrix, None if bias is None or new_bias is None else new_bias.to(bias.dtype)


def names_to_merge(layer: AdapterLayer, adapter_names: Sequence[str] | None) -> list[str]:
    """Those of the asked adapters that are on this layer and not merged yet."""
    if layer.follows is not None:
        return []  # merged where the shared weight is adapted
    names = layer.active_adapters if adapter_names is None else adapter_names
    return [n for n in names if layer.has_adapter(n) and n not in layer.merged_adapters]


def merge_layer(
    layer: AdapterLayer, adapter_names: Sequence[str] | None, *, safe_merge: bool, keep_original: bool
) -> None:
    """Merge adapters of one layer; see :meth:`AdapterLayer.merge`."""
    names = names_to_merge(layer, adapter_names)
    if not names:
        return
    if (reason := layer.why_not_mergeable(names)) is not None:
        raise ValueError(f"Cannot merge {shorten(names)}: {reason}.")
    base: Any = layer.get_base_layer()
    record = record_of(layer)
    if record is None:
        record = MergeRecord(base, keep_original)
    elif record.originals and not record.intact:
        _drop_originals(record)
    # Adapters of layers that wrap one another act from the inside outwards, in whatever order they were merged.
    entries = sorted(record.entries + [(layer, name) for name in names], key=lambda entry: len(_layers_below(entry[0])))
    bias = getattr(base, "bias", None)
    if record.originals:  # one rounding for all adapters
        start = {k: t.to(base.weight.device) for k, t in record.originals.items()}
        weight, bias_value = merged_weights(entries, start["weight"], start.get("bias"))
    else:
        weight, bias_value = merged_weights(
            [(layer, n) for n in names], base.weight.detach(), None if bias is None else bias.detach()
        )
    if safe_merge and not all(t is None or bool(torch.isfinite(t).all()) for t in (weight, bias_value)):
        raise ValueError(
            f"Merging {shorten(names)} would write NaN or infinity into the weight of a {type(base).__name__}; nothing "
            "was merged. The adapter is broken, or its scale overflows the weight's dtype."
        )
    record.write("weight", weight)
    if bias_value is not None and any(_changes_bias(*entry) for entry in entries):
        record.write("bias", bias_value)
    record.entries = entries
    record.stamp()
    base.__dict__[_ATTRIBUTE] = record
    layer.merged_adapters.extend(names)


def unmerge_layer(layer: AdapterLayer, adapter_names: Sequence[str] | None) -> None:
    """Take adapters out of one layer's base weight; see :meth:`AdapterLayer.unmerge`."""
    names = [n for n in layer.merged_adapters if adapter_names is None or n in adapter_names]
    record = record_of(layer)
    if not names or record is None:
        return
    base: Any = record.base
    if record.originals and not record.intact:
        _drop_originals(record)
    leaving = [(adapted, n) for adapted, n in record.entries if adapted is layer and n in names]
    staying = [entry for entry in record.entries if not (entry[0] is layer and entry[1] in names)]
    touches_bias = any(_changes_bias(*entry) for entry in record.entries)
    if record.originals:
        start = {k: t.to(base.weight.device) for k, t in record.originals.items()}
        weight, bias = start["weight"], start.get("bias")
        if staying:
            weight, bias = merged_weights(staying, weight, bias)
        record.write("weight", weight)
        if bias is not None and touches_bias:
            record.write("bias", bias)
    else:
        dependent = [n for adapted, n in leaving if adapted.needs_weight(n)]
        if dependent:
            raise PeftError(
                f"Cannot subtract {shorten(dependent)}: the method's change depends on the weight it was added to, and no "
                "copy of that weight was kept. Merge with keep_original=True, or load the base model again."
            )
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        matrix = layer.kind.to_matrix(base, base.weight.detach()).to(wide)
        offset = base.bias.detach().to(wide) if touches_bias else None
        with torch.no_grad():
            for adapted, name in leaving:
                matrix = matrix - adapted.delta(name, None).to(wide)
                if offset is not None and (change := adapted.delta_bias(name, offset)) is not None:
                    offset = offset - change.to(wide)
        record.write("weight", layer.kind.from_matrix(base, matrix).to(base.weight.dtype))
        if offset is not None:
            record.write("bias", offset.to(base.bias.dtype))
    record.entries = staying
    layer.merged_adapters = [n for n in layer.merged_adapters if n not in names]
    if staying:
        record.stamp()
    else:
        base.__dict__.pop(_ATTRIBUTE, None)


def _drop_originals(record: MergeRecord) -> None:
    record.originals.clear()
    # Not strict: this happens in the middle of undoing things, where an error would leave the adapter merged for good.
    warnings.warn(
        f"The weight of a {type(record.base).__name__} was changed, cast or moved after adapters were merged into it, so "
        "the kept copy no longer fits and is dropped. Unmerging subtracts instead, which rounds.",
        PeftWarning,
        stacklevel=4,
    )


def _changes_bias(layer: AdapterLayer, name: str) -> bool:
    bias = getattr(layer.get_base_layer(), "bias", None)
    return bias is not None and layer.delta_bias(name, bias) is not None


# -- the whole model -------------------------------------------------------------------------------------------------


def merge_model(
    model: nn.Module, adapter_names: Sequence[str] | None, *, safe_merge: bool = False, keep_original: bool = True
) -> None:
    """Merge adapters in all layers of a model, after checking that every layer can be merged.

    Raises:
        ValueError: A layer or method cannot be merged, a weight is tied to another module, or ``safe_merge`` found NaN.
    """
    reshard(model)
    check_nothing_alone(model, adapter_names)
    layers = mergeable_layers(model, adapter_names)
    check_mergeable(model, layers)
    if safe_merge:  # a first pass that writes nothing, so that a broken layer leaves all others untouched
        for name, layer, names in layers:
            base: Any = layer.get_base_layer()
            bias = getattr(base, "bias", None)
            weight, new_bias = merged_weights([(layer, n) for n in names], base.weight.detach(), bias)
            if not all(t is None or bool(torch.isfinite(t).all()) for t in (weight, new_bias)):
                raise ValueError(
                    f"Merging {shorten(names)} would write NaN or infinity into {name!r}; nothing was merged. "
                    "The adapter is broken, or its scale overflows the weight's dtype."
                )
    kept = 0
    for _, layer, names in layers:
        layer.merge(adapter_names=names, keep_original=keep_original)
        if keep_original and (record := record_of(layer)) is not None:
            kept += record.nbytes
    if kept:
        logger.info("Merged %d layers; the copies that make unmerging exact take %.1f MB.", len(layers), kept / 1e6)


def mergeable_layers(
    model: nn.Module, adapter_names: Sequence[str] | None
) -> list[tuple[str, AdapterLayer, list[str]]]:
    """Name, layer and adapters to merge, for all layers that have something to merge; inner layers first."""
    from .holder import adapted_modules
    from .layer import AdapterLayer

    found = []
    for name, module in adapted_modules(model):
        if isinstance(module, AdapterLayer) and (names := names_to_merge(module, adapter_names)):
            found.append((name, module, names))
    # Of layers that wrap one another the outer is listed first; the inner one comes first in the forward pass.
    return sorted(found, key=lambda entry: -entry[0].count("base_layer"))


def check_nothing_alone(model: nn.Module, adapter_names: Sequence[str] | None) -> None:
    """Refuse to merge adapters that change no weight, so that nothing of them is lost in silence.

    Raises:
        ValueError: With what to merge instead.
    """
    from .holder import adapted_modules

    for _, module in adapted_modules(model):
        names = module.active_adapters if adapter_names is None else adapter_names
        if module.stands_alone and (alone := [n for n in names if module.has_adapter(n)]):
            others = [n for n in names if n not in alone]
            hint = (
                f" Name the others: adapter_names={others}."
                if others
                else " Keep the adapter, or call unload() to remove it."
            )
            raise ValueError(
                f"Cannot merge {shorten(alone)}: virtual tokens and prefixes are no change of a weight.{hint}"
            )


def check_mergeable(model: nn.Module, layers: Sequence[tuple[str, AdapterLayer, list[str]]]) -> None:
    """Refuse before anything is changed.

    Raises:
        ValueError: With the name of the first layer that cannot be merged, and the reason.
    """
    owners: dict[Any, list[tuple[str, nn.Module]]] = {}
    followers: dict[tuple[int, int], AdapterLayer] = {}
    for module_name, module in model.named_modules(remove_duplicate=True):
        if (source := module.__dict__.get("follows")) is not None:
            followers[id(module.get_base_layer()), id(source)] = module  # type: ignore[assignment, operator]
            asked = [n for _, layer, names in layers if layer is source for n in names if module.has_adapter(n)]  # type: ignore[operator]
            if asked and not module.is_tied:
                raise ValueError(
                    f"Cannot merge {shorten(asked)}: {module_name!r} was tied to an adapted module and has a weight of its own now, into "
                    "which nothing would be merged. Tie the weights again: call tie_weights() before adapting the model."
                )
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(_identity(parameter), []).append(
                    (f"{module_name}.{key}" if module_name else key, module)
                )
    for name, layer, names in layers:
        if (reason := layer.why_not_mergeable(names)) is not None:
            raise ValueError(f"Cannot merge {shorten(names)} into {name!r}: {reason}.")
        base = layer.get_base_layer()
        sharing = []
        for owner, module in owners.get(_identity(base.weight), []):  # type: ignore[arg-type]
            twin = followers.get((id(module), id(layer)))
            if twin is None or not all(map(twin.has_adapter, names)):
                sharing.append(owner)
        if len(sharing) > 1:
            raise ValueError(
                f"Cannot merge {shorten(names)} into {name!r}: its weight is tied ({', '.join(sharing)}), so merging would "
                "change the other module too. Adapters trained with ensure_weight_tying=True act on both and can be merged; for this "
                "one untie them first: set config.tie_word_embeddings = False and give one of "
                "them its own copy, e.g. `module.weight = torch.nn.Parameter(module.weight.clone())`."
            )
    _check_order(layers)
    bad = [name for name, layer, _ in layers if (r := record_of(layer)) is not None and r.originals and not r.intact]
    if bad:
        doubt(
            f"Weights with merged adapters were changed since: {shorten(bad)}. Unmerging them will subtract and round."
        )


def _identity(parameter: torch.Tensor) -> Any:
    """What parameters have in common that are one, or share their memory."""
    place = parameter.data_ptr() if type(parameter.data) is torch.Tensor and parameter.device.type != "meta" else 0
    return (parameter.device, place) if place else id(parameter)


def _layers_below(layer: AdapterLayer) -> list[AdapterLayer]:
    """The adapted layers of other methods that a layer wraps, outer before inner."""
    from .layer import AdapterLayer

    found: list[AdapterLayer] = []
    below = layer.base_layer
    while isinstance(below, AdapterLayer):
        found.append(below)
        below = below.base_layer
    return found


def _check_order(layers: Sequence[tuple[str, AdapterLayer, list[str]]]) -> None:
    """Refuse to merge an adapter past unmerged ones inside it, unless both only add to the weight.

    Raises:
        ValueError: With the names of both.
    """
    asked = {(layer, adapter) for _, layer, names in layers for adapter in names}
    for name, layer, names in layers:
        for below in _layers_below(layer):
            waiting = [n for n in below.live_adapters() if (below, n) not in asked]
            if waiting and (layer.delta_depends_on_weight or below.delta_depends_on_weight):
                raise ValueError(
                    f"Cannot merge {shorten(names)} into {name!r}: it acts on the output of {shorten(waiting)}, which is active on the "
                    "same layer and not merged. Merge them together, or that one first."
                )
