"""Checkpoints: an adapter's tensors out of a model and into it, by the keys that its file uses."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from .activation import configs_of
from .errors import MismatchError, PeftError, doubt, shorten
from .holder import BaseTunerLayer, adapted_modules, require_adapters
from .injection import bias_parameters
from .layer import AdapterLayer
from .sharding import fill, full_shape, plain_name, reshard, whole
from .targets import EMBEDDING_NAMES, base_modules

PREFIX = "base_model.model."
HALF_PREFIX = "base_model."


@dataclass
class LoadResult:
    """What became of the keys of a file.

    Args:
        missing_keys: Keys of the adapter that the file lacks; their parameters keep their start values.
        unexpected_keys: Keys of the file that the model has no place for.
        mismatched_keys: Keys whose shapes differ, where that was allowed.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[str] = field(default_factory=list)


def file_prefix(name: str) -> str:
    """Name of an adapted module in files: layers of other methods around it, and wrappers, leave no trace."""
    return re.sub(r"(\.base_layer)+$", "", plain_name(name))


def _namer(model: nn.Module, config: Any) -> Callable[[str], str]:
    """A function from names in a model to those in an adapter's file.

    Files of weight methods call the base model ``base_model.model``, those with virtual tokens ``base_model``, whichever of the two
    the holder does.
    """
    if not hasattr(model, "get_base_model"):
        return lambda name: name
    here = HALF_PREFIX if model.base_model is model.get_base_model() else PREFIX  # type: ignore[operator]
    there = HALF_PREFIX if getattr(config, "is_prompt_learning", False) else PREFIX
    return lambda name: there + name.removeprefix(here) if name.startswith(here) else name


def adapter_tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Key in the file, key in the model, and tensor of each tensor of an adapter, base biases that it trains included."""
    config = configs_of(model).get(adapter_name)
    named = _namer(model, config)
    for name, layer in adapted_modules(model):
        for file_key, own_key, tensor in layer.adapter_tensors(adapter_name):
            if not name:
                yield file_key, own_key, tensor
            elif layer.stands_alone:
                yield file_key, f"{name}.{own_key}", tensor
            else:
                yield f"{named(file_prefix(name))}.{plain_name(file_key)}", f"{name}.{own_key}", tensor
    for name, parameter in bias_parameters(model, config, adapter_name).items():
        yield named(plain_name(name)), name, parameter


def repeats(model: nn.Module, adapter_name: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What an adapter's file holds of layers that follow others, made from the rest of it.

    Args:
        model: The model.
        adapter_name: The adapter.
        tensors: Its tensors by file key.
    """
    named, layers = _namer(model, configs_of(model).get(adapter_name)), dict(adapted_modules(model))
    names = {id(layer): name for name, layer in layers.items()}
    found: dict[str, torch.Tensor] = {}
    for name, layer in layers.items():
        if not isinstance(layer, AdapterLayer) or layer.follows is None or not layer.has_adapter(adapter_name):
            continue
        stem = named(file_prefix(names[id(layer.follows)])) + "."
        own = {key.removeprefix(stem): tensor for key, tensor in tensors.items() if key.startswith(stem)}
        again = layer.follows.repeated(layer, adapter_name, own)
        found |= {f"{named(file_prefix(name))}.{key}": tensor for key, tensor in again.items()}
    return found


def training_tensors(
    model: nn.Module, adapter_name: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What training goes on from where an adapter's own file holds only a result of it; empty for most adapters.

    Args:
        model: The model.
        adapter_name: The adapter.
        state_dict: Take the tensors from here, by their keys in the model.
    """
    return {
        key: whole(tensor if state_dict is None else state_dict[f"{name}.{own_key}"], own_key)
        for name, layer in adapted_modules(model)
        for key, own_key, tensor in layer.training_tensors(adapter_name)
    }


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, torch.Tensor]:
    """An adapter's tensors by the keys of its file, whole.

    Tensors that ``fully_shard`` has spread over processes are gathered, one by one, so every process has to call this.

    Args:
        model: The model.
        state_dict: Take the tensors from here (gathered from many processes, for example), by their keys in the model.
        adapter_name: The adapter.
        unwrap_compiled: Look into a model made by ``torch.compile``.
        save_embedding_layers: Add the embeddings of the base model; ``"auto"``: where they are adapted or were resized.

    Returns:
        Tensors by file key; not copied.

    Raises:
        ValueError: Unknown adapter.
        PeftError: ``state_dict`` lacks tensors of the adapter or holds parts of them, or the model does. A partial adapter is
            never returned.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    require_adapters(model, adapter_name, configs_of(model))
    result: dict[str, torch.Tensor] = {}
    if state_dict is not None:
        for name, layer in adapted_modules(model):
            result.update(layer.fold(adapter_name, state_dict, f"{name}." if name else ""))
    lacking = []
    for file_key, own_key, tensor in adapter_tensors(model, adapter_name):
        if file_key in result:
            continue
        if state_dict is None:
            result[file_key] = whole(tensor, own_key)
        elif (known := own_key if own_key in state_dict else plain_name(own_key)) in state_dict:
            result[file_key] = whole(state_dict[known], known)
            shape, found = full_shape(tensor), tuple(result[file_key].shape)
            if found != shape and shape is not None:
                lacking.append(f"{known} of shape {shape}, not {found}")
        else:
            lacking.append(own_key)
    if lacking:
        raise PeftError(
            f"The state dict given lacks {len(lacking)} tensors of adapter {adapter_name!r}: {shorten(lacking)}. "
            "Pass the full state dict of this very model, gathered from all processes."
        )
    result |= repeats(model, adapter_name, result)
    empty = [key for key, tensor in result.items() if tensor.numel() == 0]
    if empty or not result:
        raise PeftError(
            f"Adapter {adapter_name!r} has {f'tensors without values: {shorten(empty)}' if empty else 'no tensors'}. Are its "
            "parameters sharded over processes? Then gather them first and pass them as `state_dict`."
        )
    if wants_embeddings(model, adapter_name, save_embedding_layers):
        source = model.state_dict() if state_dict is None else state_dict
        names = [n for n in embedding_weights(model) if n in source]
        adapted = [n for n in names if n.endswith(".base_layer.weight")]
        named = _namer(model, configs_of(model)[adapter_name])
        for name in adapted or names:
            weight = whole(source[name], name)
            taken = any(weight.data_ptr() == other.data_ptr() for other in result.values())
            result[named(name)] = weight.clone() if taken else weight  # some writers refuse tied weights
    return result


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, torch.Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadResult:
    """Write an adapter's tensors into a model.

    Parameters on the meta device are replaced by the tensors given; others are written in place, so that optimisers stay valid.

    Args:
        model: The model, with the adapter in it.
        peft_model_state_dict: Tensors by file key; the prefixes ``base_model.model.``, ``base_model.`` and none are accepted.
        adapter_name: The adapter.
        ignore_mismatched_sizes: Leave tensors of other shapes out, instead of raising.
        low_cpu_mem_usage: Accepted for compatibility; it is always so.

    Returns:
        Missing, unexpected and mismatched keys.

    Raises:
        ValueError: Unknown adapter.
        MismatchError: Shapes differ, or integers stand for weights. The model is as it was.
    """
    with _room(model, peft_model_state_dict, adapter_name):
        result, assignments = _plan(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes)
    _carry_out(model, assignments, adapter_name)
    return result


def load(
    model: nn.Module,
    tensors: Mapping[str, torch.Tensor],
    adapter_name: str,
    source: str,
    ignore_mismatched_sizes: bool = False,
) -> LoadResult:
    """Write the tensors of a file into a model, after saying which keys are missing or of no use.

    Args:
        model: The model, with the adapter in it.
        tensors: Tensors by file key.
        adapter_name: The adapter.
        source: Where they come from, for messages.
        ignore_mismatched_sizes: Leave tensors of other shapes out, instead of raising.

    Raises:
        ValueError: Shapes differ; or keys do, when strict. No weight has changed then.
    """
    with _room(model, tensors, adapter_name):
        result, assignments = _plan(model, tensors, adapter_name, ignore_mismatched_sizes)
        report(result, adapter_name, source)
    _carry_out(model, assignments, adapter_name)
    return result


def report(result: LoadResult, adapter_name: str, source: str) -> None:
    """Say which keys were not used or not found.

    Raises:
        ValueError: When strict.
    """
    if result.missing_keys:
        doubt(
            f"{source} lacks {len(result.missing_keys)} tensors of adapter {adapter_name!r}: {shorten(result.missing_keys, 4)}. "
            "They keep their start values. Is the file complete, and the base model the right one? (Found missing adapter keys "
            "while loading the checkpoint.)"
        )
    if result.mismatched_keys:
        doubt(
            f"{len(result.mismatched_keys)} tensors of {source} have other shapes than the model's and were left out, as "
            f"ignore_mismatched_sizes asks: {shorten(result.mismatched_keys, 4)}. These parameters keep their start values."
        )
    if result.unexpected_keys:
        doubt(
            f"{source} holds {len(result.unexpected_keys)} tensors that the model has no place for: "
            f"{shorten(result.unexpected_keys, 4)}. They are not used. Is the base model the right one?"
        )


# -- embeddings of the base model ------------------------------------------------------------------------------------


def embedding_weights(model: nn.Module) -> list[str]:
    """Names in the model of the input and output embeddings' weights, those trained in full by an adapter left out."""
    base = getattr(model, "get_base_model", lambda: model)()
    wanted = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(base, getter)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(layer, AdapterLayer):
            layer = layer.get_base_layer()
        if layer is not None and not isinstance(layer, BaseTunerLayer):
            wanted.add(id(layer))
    names = []
    for name, module in base_modules(model).items():  # adapters are not walked through, however many there are
        while isinstance(module, AdapterLayer):
            name, module = f"{name}.base_layer", module.base_layer
        if id(module) in wanted:
            names.append(f"{name}.weight")
    return names


def wants_embeddings(model: nn.Module, adapter_name: str, choice: bool | Literal["auto"]) -> bool:
    """Whether the base model's embeddings belong into the adapter's file."""
    if choice != "auto":
        return bool(choice)
    config = configs_of(model)[adapter_name]
    targets = getattr(config, "target_modules", None)
    if getattr(config, "token_indices", None):
        targets = None  # only rows of it are adapted
    if targets and not isinstance(targets, str) and any(t.rsplit(".", 1)[-1] in EMBEDDING_NAMES for t in targets):
        return True
    base_config = getattr(getattr(model, "get_base_model", lambda: model)(), "config", None)
    vocab, path = getattr(base_config, "vocab_size", None), getattr(config, "base_model_name_or_path", None)
    if vocab is None or not path or not embedding_weights(model):
        return False
    original = _vocab_size_on_disk(path)
    return original is not None and original != vocab


def _vocab_size_on_disk(path: str) -> int | None:
    """Vocabulary size of a base model as published; ``None`` where that cannot be told without a download."""
    import json

    file = os.path.join(path, "config.json")
    if not os.path.isdir(path):
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            cached = try_to_load_from_cache(path, "config.json")
        except HFValidationError:
            return None
        file = cached if isinstance(cached, str) else ""
    if not os.path.isfile(file):
        return None
    with open(file, encoding="utf-8") as stream:
        values = json.load(stream)
    return values.get("vocab_size") or values.get("text_config", {}).get("vocab_size")


# -- steps -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _room(model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str) -> Iterator[None]:
    """Within this context adapters have the form that these tensors are of; an error gives them their own form back."""
    require_adapters(model, adapter_name, configs_of(model))
    changed = [
        undo for _, layer in adapted_modules(model) if (undo := layer.adjust_to(adapter_name, tensors)) is not None
    ]
    try:
        yield
    except Exception:
        for undo in changed:
            undo()
        raise


def _plan(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], adapter_name: str, ignore_mismatched_sizes: bool
) -> tuple[LoadResult, list[tuple[str, torch.Tensor]]]:
    """What loading would do: which key in the model gets which tensor. Changes nothing."""
    reshard(model)
    places = {file_key: own_key for file_key, own_key, _ in adapter_tensors(model, adapter_name)}
    made: dict[str, str] = {}  # results of training, in whose place what makes them is read
    for name, layer in adapted_modules(model):
        if makers := {key: f"{name}.{own}" for key, own, _ in layer.training_tensors(adapter_name)}:
            made |= {key: own for key, own in places.items() if own.startswith(f"{name}.")}
            places |= makers
    places = {key: own for key, own in places.items() if key not in made}
    base_weights = {n: n for n in embedding_weights(model)}
    inner = getattr(getattr(model, "get_base_model", lambda: model)(), "base_model_prefix", "")
    start_of_followers = followers(model)
    result = LoadResult()
    assignments: list[tuple[str, torch.Tensor]] = []
    problems, dtypes = [], []
    found = set()
    used: dict[int, torch.Tensor] = {}
    followed: dict[str, torch.Tensor] = {}
    clashes: list[str] = []
    for key, tensor in tensors.items():
        file_key = placed(key, places, inner) or placed(key, base_weights)
        left_out = _is_leftover(key) or placed(key, made) or key.removeprefix(PREFIX).startswith(start_of_followers)
        if file_key is None and left_out:
            followed[key] = tensor
            continue
        if file_key is None:
            result.unexpected_keys.append(key)
            continue
        found.add(file_key)
        own_key = places.get(file_key, file_key)
        current = _tensor(model, own_key)
        if current.is_floating_point() != tensor.is_floating_point():
            dtypes.append(f"{key}: the file has {_dtype(tensor)}, the model {_dtype(current)}")
        elif current.shape != tensor.shape:
            problems.append(f"{key}: the file has {tuple(tensor.shape)}, the model {tuple(current.shape)}")
            result.mismatched_keys.append(key)
        else:
            assignments.append((own_key, tensor))
            twin = used.setdefault(id(current), tensor)  # of modules that share a parameter each has a key
            if twin is not tensor and not torch.equal(twin, tensor):
                clashes.append(key)
    _report_clashes(model, adapter_name, clashes, followed, lambda key: placed(key, places, inner), tensors)
    if problems and not ignore_mismatched_sizes:
        raise MismatchError(
            f"Tensors of adapter {adapter_name!r} do not fit the model ({len(problems)}): {'; '.join(problems[:4])}. The adapter "
            "was made for another base model, another rank or another number of labels."
        )
    if dtypes:
        raise MismatchError(
            f"Tensors of adapter {adapter_name!r} have types that are no weights ({len(dtypes)}): {'; '.join(dtypes[:4])}. "
            "The file is damaged, or was not written as an adapter."
        )
    result.missing_keys = [k for k, own in places.items() if k not in found and id(_tensor(model, own)) not in used]
    return result, assignments


def _report_clashes(
    model: nn.Module,
    adapter_name: str,
    clashes: list[str],
    followed: Mapping[str, torch.Tensor],
    place_of: Callable[[str], str | None],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Say where a file has other values for modules that share a weight.

    Args:
        model: The model.
        adapter_name: The adapter.
        clashes: Keys found so far.
        followed: Tensors that are not read, since they repeat what the file holds of the layer that is followed.
        place_of: The key by which the model knows a key of the file.
        tensors: All tensors of the file.
    """
    again = repeats(model, adapter_name, {place_of(k) or k: t for k, t in tensors.items()}) if followed else {}
    for key, tensor in followed.items():
        other = again.get(placed(key, dict.fromkeys(again, "")) or "")
        if other is not None and (other.shape != tensor.shape or not torch.equal(other, tensor)):
            clashes.append(key)
    if clashes:
        doubt(
            f"The tensors given for adapter {adapter_name!r} hold other values for {shorten(clashes, 4)} than for the module whose weight "
            "is shared there: only one of them is used. Was the adapter trained on a model without tied weights?"
        )


def _carry_out(model: nn.Module, assignments: list[tuple[str, torch.Tensor]], adapter_name: str) -> None:
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] = {}
    for own_key, tensor in assignments:
        _assign(model, own_key, tensor, made)
    _materialise(model, adapter_name)
    for _, layer in adapted_modules(model):
        layer.loaded(adapter_name)


def placed(key: str, places: Mapping[str, str], inner: str = "") -> str | None:
    """The key by which the model knows a key of a file, or ``None``.

    Args:
        key: The key.
        places: Keys that the model knows.
        inner: What the model without a head is called inside a model with one: a file made with the one fits the other.
    """
    bare, half = key.removeprefix(PREFIX), key.removeprefix("base_model.")
    candidates = [key, bare, half, PREFIX + key, PREFIX + half, HALF_PREFIX + key, HALF_PREFIX + bare]
    if inner:
        candidates += [f"{PREFIX}{inner}.{bare}", PREFIX + bare.removeprefix(f"{inner}.")]
    for candidate in candidates:
        if candidate in places:
            return candidate
    # A base layer's own tensors change their name when another adapter wraps the layer.
    for candidate in candidates:
        stem, _, leaf = candidate.rpartition(".")
        twin = (
            f"{stem.removesuffix('.base_layer')}.{leaf}"
            if stem.endswith(".base_layer")
            else f"{stem}.base_layer.{leaf}"
        )
        if twin in places:
            return twin
    return None


def followers(model: nn.Module) -> tuple[str, ...]:
    """Starts of the keys of tied layers: some writers give them too the tensors that they share."""
    tied = (n for n, layer in adapted_modules(model) if isinstance(layer, AdapterLayer) and layer.follows is not None)
    return tuple(f"{file_prefix(name).removeprefix(PREFIX)}." for name in tied)


def _is_leftover(key: str) -> bool:
    """Whether a key repeats what the file holds elsewhere: some writers add biases of heads under inner names too."""
    return ".original_module." in key or ".modules_to_save." in key


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _holder(model: nn.Module, own_key: str) -> tuple[nn.Module, str]:
    parent, _, leaf = own_key.rpartition(".")
    return model.get_submodule(parent), leaf


def _tensor(model: nn.Module, own_key: str) -> torch.Tensor:
    module, leaf = _holder(model, own_key)
    return getattr(module, leaf)


def _assign(
    model: nn.Module,
    own_key: str,
    tensor: torch.Tensor,
    made: dict[int, tuple[torch.Tensor, nn.Parameter]] | None = None,
) -> None:
    """Write a value, or put it in the place of a tensor on the meta device.

    Args:
        model: The model.
        own_key: Which.
        tensor: The value.
        made: Parameters that were replaced so far and what replaced them, by the former's identity: modules that shared one go on
            sharing.
    """
    module, leaf = _holder(model, own_key)
    current = getattr(module, leaf)
    if current.device.type != "meta":
        fill(current, tensor)
        return
    if made is not None and id(current) in made:
        module.register_parameter(leaf, made[id(current)][1])
        return
    owner = _owner(model, own_key)
    device = owner.device_and_dtype()[0] if hasattr(owner, "device_and_dtype") else _real_device(owner)
    value = tensor.detach().to(device=device, dtype=current.dtype)
    if isinstance(current, nn.Parameter):
        parameter = nn.Parameter(value, requires_grad=current.requires_grad)
        module.register_parameter(leaf, parameter)
        if made is not None:
            made[id(current)] = current, parameter
    else:
        module.register_buffer(leaf, value)


def _owner(model: nn.Module, own_key: str) -> nn.Module:
    """The adapted module that a tensor of an adapter belongs to."""
    module = owner = model
    for part in own_key.split(".")[:-1]:
        module = module._modules[part]  # type: ignore[assignment]
        if isinstance(module, BaseTunerLayer):
            owner = module
    return owner


def _real_device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _materialise(model: nn.Module, adapter_name: str) -> None:
    """Give parameters that are still on the meta device their start values."""
    config = configs_of(model)[adapter_name]
    for name, layer in adapted_modules(model):
        if not any(t.device.type == "meta" for _, _, t in layer.adapter_tensors(adapter_name)):
            continue
        if isinstance(layer, AdapterLayer):
            if layer.device_and_dtype()[0].type == "meta":
                continue  # the base model itself has no weights yet
            target = file_prefix(name).removeprefix(PREFIX)
            target = target.rpartition(".")[0] if layer.is_attached else target
            for part, tensor in layer.build(config, target).tensors.items():
                if adapter_name not in getattr(layer, part.partition(".")[0]):
                    continue  # another layer holds what all share
                own_key = layer.own_key(part, adapter_name)
                if _tensor(layer, own_key).device.type == "meta":
                    _assign(layer, own_key, tensor)
        elif layer.stands_alone:
            makers = list(layer.training_tensors(adapter_name))
            for _, own_key, tensor in makers or list(layer.adapter_tensors(adapter_name)):
                if tensor.device.type == "meta":
                    _assign(layer, own_key, torch.randn(tensor.shape))
        else:
            for key, own_key, tensor in list(layer.adapter_tensors(adapter_name)):
                if tensor.device.type == "meta":
                    _assign(layer, own_key, _tensor(layer.get_base_layer(), key).detach().clone())
