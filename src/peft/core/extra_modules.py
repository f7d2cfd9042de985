"""Extra trained modules: layers that an adapter trains in full (``modules_to_save``) and new classification heads."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from .errors import did_you_mean, doubt, shorten
from .holder import BaseTunerLayer
from .mixed import Names, adapters_of, by_rows
from .targets import HEAD_NAMES, base_modules


class AuxiliaryTrainingWrapper(BaseTunerLayer):
    """A module that adapters replace or extend as a whole.

    Args:
        module_to_save: The module of the base model.
        adapter_name: Name of the first adapter, if any.
    """

    def __init__(self, module_to_save: nn.Module, adapter_name: str | None = None) -> None:
        super().__init__()
        self.original_module = module_to_save

    def get_base_layer(self) -> nn.Module:
        return self.original_module

    def adapter_state_dict(
        self, adapter_name: str, state_dict: dict[str, Any] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of an adapter by their key in its file."""
        return {key: tensor for key, _, tensor in self.adapter_tensors(adapter_name)}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Where each key of an adapter's file belongs in this module."""
        return {key: own for key, own, _ in self.adapter_tensors(adapter_name)}


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """A module of which each adapter has a copy of its own, trained in full."""

    adapter_layer_names = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str | None = None) -> None:
        super().__init__(module_to_save)
        if isinstance(module_to_save, (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)):
            raise TypeError(f"modules_to_save cannot be a container such as {type(module_to_save).__name__}.")
        self.modules_to_save = nn.ModuleDict()
        if adapter_name is not None:
            self.install(adapter_name, copy.deepcopy(module_to_save))
            self._active_adapter = [adapter_name]

    def install(self, name: str, module: nn.Module) -> None:
        """Add an adapter's copy; it is frozen until it is activated."""
        module.requires_grad_(False)
        self.modules_to_save[name] = module

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        if name in self.modules_to_save:
            # Through the state dict, which knows which buffers are persistent.
            for key, tensor in self.modules_to_save[name].state_dict(keep_vars=True).items():
                yield key, f"modules_to_save.{name}.{key}", tensor

    def set_adapter(self, adapter_names: Any, inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self.copy_of(names)
        super().set_adapter(names, inference_mode)

    def copy_of(self, names: Iterable[str]) -> nn.Module:
        """The copy in use where these adapters act together: that of the one that has its own, else the original.

        Raises:
            ValueError: Several have their own.
        """
        here = [n for n in names if n in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(
                f"Only one adapter can be active for a module that is trained in full, but {shorten(here)} all have their own "
                f"{type(self.original_module).__name__}. Activate one of them. An adapter that others share needs none of its "
                "own: make it with modules_to_save=[]."
            )
        return self.modules_to_save[here[0]] if here else self.original_module

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        super().delete_adapter(adapter_name)
        if new_active_adapters:
            self.set_adapter(new_active_adapters)

    @property
    def weight(self) -> Any:
        return self.current().weight

    @property
    def bias(self) -> Any:
        return self.current().bias

    def current(self) -> nn.Module:
        """The copy in use: that of the active adapter, else the original."""
        if not self._disable_adapters:
            for name in self._active_adapter:
                if name in self.modules_to_save:
                    return self.modules_to_save[name]
        return self.original_module

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        plan = self._shared.plan
        if plan is None or self._disable_adapters or not any(n in self.modules_to_save for n in plan.adapters):
            return self.current()(x, *args, **kwargs)

        def run(names: Names, rows: torch.Tensor | None) -> torch.Tensor:
            module = self.copy_of(adapters_of(names))
            return module(x if rows is None else x.index_select(0, rows), *args, **kwargs)

        return by_rows(plan, x, f"modules_to_save {type(self.original_module).__name__}", run)

    def __getattr__(self, name: str) -> Any:
        with suppress(AttributeError):
            return super().__getattr__(name)
        if "modules_to_save" not in self.__dict__.get("_modules", {}):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.current(), name)


# -- planning --------------------------------------------------------------------------------------------------------


def find_modules_to_save(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    """Modules whose full name ends with one of the names.

    Args:
        model: The base model.
        names: The names; ``classifier`` and ``score`` may be missing, since both are tried for every classifier.

    Raises:
        ValueError: A name is in no module and is not optional, and strictness asks for it; a warning otherwise.
    """
    modules = base_modules(model)
    found: dict[str, nn.Module] = {}
    used = set()
    for name, module in modules.items():
        # Without a dot before it: "norm" means "input_layernorm" too, as configurations in use rely on.
        hits = [n for n in names if name.endswith(n)]
        if hits and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
            used.update(hits)
    idle = [n for n in names if n not in used and n not in HEAD_NAMES]
    if idle:
        hints = "; ".join(f"{n!r}{did_you_mean(n, [m.rsplit('.', 1)[-1] for m in modules])}" for n in idle)
        doubt(
            f"modules_to_save match no module of the model: {hints}. They are not trained. Mend the names, or remove them."
        )
    return found


def is_fresh(module: nn.Module) -> bool:
    """Whether transformers has just initialised the module's parameters, rather than read them from a checkpoint."""
    return not any(getattr(p, "_is_hf_initialized", False) for p in module.parameters())


def fresh_parts(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Parts of a model beside its base that transformers has just initialised, as some heads have besides the classifier.

    Args:
        model: The base model, head included.
        names: Names of modules that are trained anyway.

    Returns:
        Their names; none where the whole model is new, and so was not loaded.
    """
    if is_fresh(model):
        return []
    found = []
    for name, part in model.named_children():
        if name == getattr(model, "base_model_prefix", "") or any(name.endswith(n) for n in names):
            continue
        original = part.original_module if isinstance(part, ModulesToSaveWrapper) else part
        has_any = any(True for _ in original.parameters())
        if has_any and not isinstance(original, BaseTunerLayer) and is_fresh(original):
            found.append(name)
    return found


def resized_head(module: nn.Module, num_labels: int) -> nn.Module:
    """A copy of a classification head with another number of outputs; its last linear layer is newly initialised."""
    head = copy.deepcopy(module)
    name, linear = [(n, m) for n, m in head.named_modules() if isinstance(m, nn.Linear)][-1]
    new = nn.Linear(linear.in_features, num_labels, linear.bias is not None).to(
        linear.weight.device, linear.weight.dtype
    )
    new.training = linear.training
    if not name:
        return new
    parent_name, _, child = name.rpartition(".")
    setattr(head.get_submodule(parent_name), child, new)
    return head


def head_outputs(module: nn.Module) -> int | None:
    """Number of outputs of a head: those of its last linear layer."""
    last = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return last[-1].out_features if last else None


def fit_head(model: nn.Module, config: Any, heads: dict[str, nn.Module]) -> None:
    """Give a freshly initialised head the number of labels that the adapter was trained with.

    Args:
        model: The base model; its ``config.num_labels``, label names and ``num_labels`` attribute follow.
        config: The adapter's configuration; nothing happens unless it records ``num_labels``.
        heads: Modules to save, by name.

    Raises:
        ValueError: The head differs and is not fresh, so that resizing it would lose trained weights.
    """
    wanted = getattr(config, "num_labels", None)
    model_config = getattr(model, "config", None)
    if wanted is None or model_config is None or not hasattr(model, "num_labels"):
        return
    trained = {n: m for n, m in heads.items() if n.rsplit(".", 1)[-1] in HEAD_NAMES}
    for name, module in trained.items():
        used = isinstance(module, AuxiliaryTrainingWrapper)
        found = head_outputs(module.get_base_layer() if isinstance(module, AuxiliaryTrainingWrapper) else module)
        if found is None or found == wanted:
            continue
        if used or not is_fresh(module):
            raise ValueError(
                f"The adapter was trained with {wanted} labels, but the head {name!r} of this model has {found} and is already "
                f"trained or in use. Load the base model with num_labels={wanted}."
            )
        parent_name, _, child = name.rpartition(".")
        heads[name] = new = resized_head(module, wanted)
        setattr(model.get_submodule(parent_name), child, new)
        model_config.num_labels = model.num_labels = wanted  # type: ignore[assignment]
    if trained and all(is_fresh(m) for m in heads.values()) and _labels_are_unnamed(model_config):
        if config.id2label and len(config.id2label) == model_config.num_labels:
            model_config.id2label = {int(k): v for k, v in config.id2label.items()}
            model_config.label2id = {v: int(k) for k, v in config.id2label.items()}
        if config.problem_type is not None:
            model_config.problem_type = config.problem_type


def _labels_are_unnamed(model_config: Any) -> bool:
    return all(v == f"LABEL_{k}" for k, v in (model_config.id2label or {}).items())


def record_head(config: Any, model: nn.Module, heads: dict[str, nn.Module]) -> None:
    """Write the number and names of the labels into the configuration of an adapter that trains a head."""
    model_config = getattr(model, "config", None)
    trained = [n for n in heads if n.rsplit(".", 1)[-1] in HEAD_NAMES]
    if not trained or not hasattr(model, "num_labels") or model_config is None:
        return
    config.num_labels = model_config.num_labels
    config.id2label = {str(k): v for k, v in model_config.id2label.items()}
    config.problem_type = getattr(model_config, "problem_type", None)
