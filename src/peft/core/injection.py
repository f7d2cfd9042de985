"""Injection: putting an adapter into a base model. Everything is checked and built first; only then is the model changed."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .collecting import no_collection
from .errors import NoMatchingPeftModuleError, PeftError, did_you_mean, doubt, shorten
from .extra_modules import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, find_modules_to_save, fit_head, is_fresh
from .holder import BaseTunerLayer, adapted_modules, shared_of
from .layer import HALF, AdapterLayer, Parts
from .mixed import Shared
from .replication import replicated
from .sharding import is_sharded, reshard
from .targets import (
    ALL_LINEAR,
    HEAD_NAMES,
    base_modules,
    check_supported,
    find_targets,
    repeats_rows,
    shortest_names,
)
from .tied import TiedLayer, by_weight, follower, leaders, tied_modules, tied_to
from .token_rows import TokenRowsLayer, find_token_rows

if TYPE_CHECKING:
    from .tuner import BaseTuner


@dataclass
class Placed:
    """One adapter on one layer, ready to be put in place.

    Args:
        name: Full name of the place.
        layer: What holds adapters there.
        is_new: Whether it is not a part of the model yet.
        parts: What it installs.
        source: Name of the module whose input the adapter reads, where that is not the place's own.
    """

    name: str
    layer: BaseTunerLayer
    is_new: bool
    parts: Any
    source: str | None = None


@no_collection()
def inject(
    model: nn.Module,
    config: Any,
    adapter_name: str,
    tuner_cls: type[BaseTuner],
    *,
    on_meta: bool = False,
    state_dict: Mapping[str, Any] | None = None,
    activate: bool = False,
    autocast_adapter_dtype: bool = False,
) -> None:
    """Put a new adapter into a base model, in place.

    The first adapter of a model freezes the base model, becomes active and trains (unless ``config.inference_mode``); any further
    one is inactive and frozen unless ``activate`` is set, and changes no flag of anything else.

    Args:
        model: The base model.
        config: The adapter's configuration. Its ``target_modules`` are filled in where the model's defaults are used.
        adapter_name: Name of the new adapter.
        tuner_cls: The method.
        on_meta: Make the parameters on the meta device, to be assigned from a file.
        state_dict: Tensors of the adapter: the layers that these name are adapted, whatever the configuration says.
        activate: Make a further adapter the active one.
        autocast_adapter_dtype: Keep its parameters in float32 where the base model is in half precision, which trains stably.

    Raises:
        ValueError: The name is taken or unsuitable, or the configuration does not suit the model. The model is as it was.
    """
    known: dict[str, Any] = getattr(model, "peft_config", None) or {}
    check_adapter_name(adapter_name, known)
    reshard(model)
    tuner_cls.check_config(config, model)
    first = not any(True for _ in adapted_modules(model))
    shared = shared_of(model) or Shared()

    with replicated(model, config, known):
        names = getattr(config, "modules_to_save", None)
        names = tuner_cls.default_heads(config) if names is None else names
        heads = find_modules_to_save(model, list(names)) if names else {}
        heads |= _tied_heads(model, config, heads)
        placements, values = tuner_cls.plan(model, config, heads, on_meta, state_dict, autocast_adapter_dtype)
        _check_sharded(config, placements)
        _check_bias(config, known)
        fit_head(model, config, heads)
        first_of = leaders(heads) if getattr(config, "ensure_weight_tying", False) else {}
        memos: dict[str, dict[int, Any]] = {name: {} for name in heads}
        copies = {name: _copy(module, on_meta, memos[first_of.get(name, name)]) for name, module in heads.items()}

    # From here on nothing fails.
    for field, value in values.items():
        setattr(config, field, value)
    active = next((m.active_adapters for _, m in adapted_modules(model)), [adapter_name])
    if first:
        for parameter in model.parameters():
            parameter.requires_grad = False
    for place in placements:
        if place.is_new:
            place.layer.enter(model, place.name)
        _join(place.layer, shared, active)
        place.layer.install(adapter_name, place.parts, placements[0].layer)
        if place.source is not None:
            place.layer.attachment.watch(adapter_name, place.source, model.get_submodule(place.source))
    for name, module in heads.items():
        wrapper = module if isinstance(module, ModulesToSaveWrapper) else ModulesToSaveWrapper(module)
        if wrapper is not module:
            wrapper.training = module.training
            wrapper.enter(model, name)
        _join(wrapper, shared, active)
        wrapper.install(adapter_name, copies[name])
    if first or activate:
        for _, layer in adapted_modules(model):
            layer.__dict__["_active_adapter"] = [adapter_name]
            layer.set_requires_grad(adapter_name, not config.inference_mode)
    if not config.inference_mode:
        _train_biases(model, config, adapter_name)
    known[adapter_name] = config
    model.peft_config = known  # type: ignore[assignment]
    _warn_frozen_head(model, config, heads)


def check_adapter_name(name: str, known: Mapping[str, Any]) -> None:
    """Refuse names that are taken or cannot be part of a key or a path.

    Raises:
        ValueError: With what is wrong.
    """
    if not isinstance(name, str) or not name or "." in name or "/" in name or "\\" in name or "\0" in name:
        raise ValueError(f"An adapter's name is a non-empty string without '.', '/' and '\\', got {name!r}.")
    if name == "__base__":
        raise ValueError("The adapter name '__base__' stands for the plain model in mixed batches; choose another.")
    if name in known:
        raise ValueError(
            f"Adapter {name!r} already exists. Delete it first with delete_adapter({name!r}), or choose another name."
        )
    for holder in (nn.ModuleDict(), nn.ParameterDict()):
        if hasattr(holder, name):
            raise ValueError(
                f"The adapter name {name!r} is an attribute of torch's {type(holder).__name__}; choose another."
            )


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Keep an adapter's half-precision parameters in float32, which trains stably.

    Args:
        model: The model.
        adapter_name: The adapter.
        autocast_adapter_dtype: Do nothing when false.
    """
    if not autocast_adapter_dtype:
        return
    for _, layer in adapted_modules(model):
        if not isinstance(layer, AuxiliaryTrainingWrapper):
            for parameter in layer.adapter_parameters(adapter_name):
                if parameter.dtype in HALF:
                    parameter.data = parameter.data.float()


# -- steps -----------------------------------------------------------------------------------------------------------


def plan_layers(
    model: nn.Module,
    config: Any,
    tuner_cls: type[BaseTuner],
    heads: dict[str, nn.Module],
    on_meta: bool,
    state_dict: Mapping[str, Any] | None,
    autocast_adapter_dtype: bool,
) -> tuple[list[Placed], dict[str, Any]]:
    """Find the layers that a configuration means and build an adapter for each, without changing the model.

    Returns:
        What to put where, and values of configuration fields that were filled in.
    """
    if state_dict is None:
        targets = tuner_cls.find_defaults(config, model)
        places = find_targets(model, config, targets)
    else:
        places, targets = _places_of_state_dict(model, tuner_cls, state_dict), config.target_modules
    places = _outside_heads(places, heads)
    filtered = config.target_modules is None and getattr(config, "layers_to_transform", None) is not None
    if isinstance(targets, str) and (targets.lower() == ALL_LINEAR or filtered):
        # Names say it all; a configuration cannot have both an expression and a choice of layers.
        targets = shortest_names(places, base_modules(model))
    placements = _build(model, config, tuner_cls, places, heads, on_meta, autocast_adapter_dtype)
    _check_patterns(config, places)
    return placements, {"target_modules": targets}


def _build(
    model: nn.Module,
    config: Any,
    tuner_cls: type[BaseTuner],
    places: dict[str, nn.Module],
    heads: dict[str, nn.Module],
    on_meta: bool,
    autocast_adapter_dtype: bool,
) -> list[Placed]:
    placements = []
    modules = base_modules(model)
    shared = by_weight(modules)
    if getattr(config, "ensure_weight_tying", False):
        for name in list(places):  # of tied modules the first is adapted, the others follow
            if name in places:
                places = {n: m for n, m in places.items() if n not in tied_modules(shared, name, places[name])}
    attaches = tuner_cls.layer_cls.attached_as is not None
    wanted = [(n, m, tuner_cls.layer_cls, tuner_cls.make_layer, attaches) for n, m in places.items()]
    wanted += [(n, m, TokenRowsLayer, TokenRowsLayer.wrap, False) for n, m in find_token_rows(model, config).items()]
    outermost: dict[str, nn.Module] = {}  # one module may get two layers
    for name, module, layer_cls, make, attached in wanted:
        parent = modules.get(name.rpartition(".")[0], model)
        check_supported(name, module, parent, attached)
        layer = _layer_on(module, layer_cls)
        is_new = layer is None
        try:
            if layer is None:
                layer = outermost[name] = make(outermost.get(name, module), config)
                layer.training = module.training
                if repeats_rows(parent):
                    layer.is_repeated = True
            if layer.why_no_merge is None and layer.merged:
                raise PeftError("other adapters are merged into it; call unmerge_adapter() first")
            parts = layer.build(config, name, "meta" if on_meta else None)
            source = layer.input_of(config, name)
            if source is not None and source not in modules:
                raise PeftError(f"it should read the input of {source!r}, which the model does not have")
            if not autocast_adapter_dtype:
                parts = parts.to(layer.device_and_dtype()[1])
        except (ValueError, NotImplementedError, PeftError) as error:
            raise type(error)(f"Cannot adapt {name!r}: {error}") from error
        placements.append(Placed(name, layer, is_new, parts, source))
    return placements + _tied(config, placements, outermost, shared, heads)


def _tied(
    config: Any,
    placements: list[Placed],
    outermost: dict[str, nn.Module],
    shared: Mapping[int, Mapping[str, nn.Module]],
    heads: Mapping[str, nn.Module],
) -> list[Placed]:
    """Layers that follow the adapted ones, on the modules that share their weight."""
    followers, apart = [], {}
    wanted = getattr(config, "ensure_weight_tying", None)
    for place in placements:
        layer = place.layer
        if not isinstance(layer, AdapterLayer) or not layer.kind.has_matrix:
            continue
        others = tied_modules(shared, place.name, layer)
        if others and not (layer.ties or wanted):
            apart[place.name] = sorted(others)
            continue
        for name, module in others.items():
            outer = outermost.get(name, module)
            twin = follower(outer, layer)
            is_new = twin is None
            if twin is None:
                twin = outermost[name] = TiedLayer(outer, layer)
                twin.training = module.training
            followers.append(Placed(name, twin, is_new, Parts(), None))
    if apart and wanted is False:
        listed = "; ".join(f"{name!r} with {shorten(others)}" for name, others in apart.items())
        doubt(
            f"Adapted modules share their weight with others ({listed}), to which the change does not apply, so it cannot be merged. "
            "Set ensure_weight_tying=True to change the weight for all of them, or untie the weights."
        )
    if wanted and not followers and not _any_tied(heads):
        doubt(
            "ensure_weight_tying=True, but no module that the adapter trains shares its weight with another: there is nothing to tie."
        )
    return followers


def _tied_heads(model: nn.Module, config: Any, heads: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Further modules to train in full, since they share a weight with those named and are to go on doing so."""
    wanted = getattr(config, "ensure_weight_tying", None)
    others = tied_to(heads, base_modules(model)) if heads and wanted is not None else {}
    if wanted is False and (others or _any_tied(heads)):
        doubt(
            f"Weights of modules_to_save are shared ({shorten([*heads, *others])}), and each module that is trained gets a copy of "
            "its own: the model is no longer tied. Set ensure_weight_tying=True to train the shared weight."
        )
    return others if wanted else {}


def _any_tied(heads: Mapping[str, nn.Module]) -> bool:
    return any(name != first for name, first in leaders(heads).items())


def _layer_on(module: nn.Module, layer_cls: type[AdapterLayer]) -> AdapterLayer | None:
    """The layer of this method among those that wrap one another at a place."""
    attached = module._modules.get(layer_cls.attached_as) if layer_cls.attached_as is not None else None
    if isinstance(attached, layer_cls):
        return attached
    while isinstance(module, BaseTunerLayer):
        if isinstance(module, layer_cls):
            return module
        module = module._modules.get("base_layer")  # type: ignore[assignment]
    return None


def _join(layer: BaseTunerLayer, shared: Shared, active: list[str]) -> None:
    if layer._shared is not shared:
        layer.__dict__.update(_shared=shared, _active_adapter=list(active))


def _outside_heads(places: dict[str, nn.Module], heads: dict[str, nn.Module]) -> dict[str, nn.Module]:
    inside = [n for n in places if any(n == h or n.startswith(f"{h}.") for h in heads)]
    if not inside:
        return places
    if len(inside) == len(places):
        raise NoMatchingPeftModuleError(
            f"All target modules ({shorten(inside)}) lie inside modules_to_save ({shorten(heads)}), which are trained in full."
        )
    doubt(
        f"Target modules {shorten(inside)} lie inside modules_to_save, which are trained in full; they get no adapter of their own."
    )
    return {n: m for n, m in places.items() if n not in inside}


def _copy(module: nn.Module, on_meta: bool, memo: dict[int, Any]) -> nn.Module:
    """A copy of a module to save; on meta its parameters are shapes only. Copies made with one ``memo`` share what they shared."""
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    if on_meta:
        for p in module.parameters():
            memo.setdefault(id(p), nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad))
    hooks = module.__dict__.get("_hf_hook")
    twin = copy.deepcopy(module, memo)
    if hooks is not None:
        from accelerate.hooks import remove_hook_from_module

        remove_hook_from_module(twin)
    return twin


def _places_of_state_dict(
    model: nn.Module, tuner_cls: type[BaseTuner], state_dict: Mapping[str, Any]
) -> dict[str, nn.Module]:
    modules, cls = base_modules(model), tuner_cls.layer_cls
    slots = "|".join(re.escape(s) for s in cls.adapter_layer_names)
    found = rf"\.(?:{re.escape(cls.attached_as)}\.)?({slots})(\..*)?$" if cls.attached_as else rf"\.({slots})(\..*)?$"
    names = {re.sub(found, "", k) for k in state_dict if re.search(found, k)}
    names = {n if n in modules else n.removeprefix("base_model.model.") for n in names}
    unknown = sorted(n for n in names if n not in modules)
    if unknown:
        raise ValueError(f"The state dict adapts modules that the model does not have: {shorten(unknown)}.")
    if not names:
        raise ValueError(
            f"The state dict holds no tensors of this method: none of its keys names {slots.replace('|', ', ')}."
        )
    return {n: m for n, m in modules.items() if n in names}


def _check_patterns(config: Any, places: Mapping[str, Any]) -> None:
    idle = config.idle_patterns(places) if hasattr(config, "idle_patterns") else []
    if idle:
        known = [*places, *{n.rsplit(".", 1)[-1] for n in places}]
        hints = "; ".join(f"{field}[{key!r}]{did_you_mean(key, known)}" for field, key in idle)
        doubt(
            f"Patterns match none of the adapted modules, so they do nothing: {hints}. A key means the end of a module's name, "
            "at a dot. Mend or remove them."
        )


def _check_sharded(config: Any, placements: list[Placed]) -> None:
    sharded = [
        place.name
        for place in placements
        for parameter in place.layer.get_base_layer().parameters(recurse=False)
        # DeepSpeed shards the model while it is loaded, and takes in the adapters later.
        if is_sharded(parameter) and not hasattr(parameter, "ds_id")
    ]
    if sharded and not config.inference_mode:
        raise PeftError(
            f"The model is sharded already ({shorten(sharded, 3)}), so a new adapter's gradients would not be summed over the "
            "processes. Add adapters before the model is sharded; for inference only, set inference_mode=True."
        )


def _check_bias(config: Any, known: Mapping[str, Any]) -> None:
    bias = getattr(config, "bias", "none")
    others = [n for n, c in known.items() if getattr(c, "bias", "none") != "none"]
    if bias != "none" and others:
        raise ValueError(
            f"Only one adapter of a model can train biases, since they belong to the base model, but {shorten(others)} "
            f"already does and the new one has bias={bias!r}. Use bias='none'."
        )


def bias_parameters(model: nn.Module, config: Any, adapter_name: str) -> dict[str, nn.Parameter]:
    """The base model's biases that an adapter trains, by their name in the model."""
    bias = getattr(config, "bias", "none")
    if bias == "none":
        return {}
    if bias == "all":
        slots = _adapter_parameter_ids(model)
        return {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1] == "bias" and id(p) not in slots}
    found = {}
    for name, layer in adapted_modules(model):
        if isinstance(layer, AdapterLayer) and layer.has_adapter(adapter_name):
            base_bias = getattr(layer.get_base_layer(), "bias", None)
            if isinstance(base_bias, nn.Parameter):
                found[f"{name}.base_layer.bias"] = base_bias
    return found


def _adapter_parameter_ids(model: nn.Module) -> set[int]:
    """Parameters of adapters and extra trained modules (and the originals that the latter replace)."""
    ids: set[int] = set()
    for _, layer in adapted_modules(model):
        for name in layer.adapter_names():
            ids |= {id(p) for p in layer.adapter_parameters(name)}
        if isinstance(layer, ModulesToSaveWrapper):
            ids |= {id(p) for p in layer.original_module.parameters()}
    return ids


def _train_biases(model: nn.Module, config: Any, adapter_name: str) -> None:
    for parameter in bias_parameters(model, config, adapter_name).values():
        parameter.requires_grad_(True)


def _warn_frozen_head(model: nn.Module, config: Any, heads: dict[str, nn.Module]) -> None:
    name = type(model).__name__
    if config.inference_mode or not name.endswith(("ForSequenceClassification", "ForTokenClassification")):
        return
    if getattr(config, "modules_to_save", None) == []:
        return  # which says so
    for head_name in HEAD_NAMES:
        head = getattr(model, head_name, None)
        # A head that nobody has trained gives random outputs for ever; a trained one may rightly stay as it is.
        if isinstance(head, nn.Module) and head_name not in heads and is_fresh(head) and not _has_adapter(head):
            if not any(getattr(p, "_is_hf_initialized", False) for p in model.parameters()):
                return  # built from a config, not loaded: everything is fresh, and so probably a test
            task = "SEQ_CLS" if name.endswith("ForSequenceClassification") else "TOKEN_CLS"
            doubt(
                f"The head {head_name!r} of this {name} is newly initialised and stays frozen, so its outputs are random. "
                f"Give the configuration task_type={task!r} or modules_to_save=[{head_name!r}]."
            )


def _has_adapter(module: nn.Module) -> bool:
    return any(True for _ in adapted_modules(module))
