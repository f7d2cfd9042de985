"""The tuner: a thin module around a base model with adapters of one weight method, with the verbs a user calls."""

from __future__ import annotations

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from . import activation, merging
from .architectures import default_targets
from .combining import Combination, combine
from .errors import PeftWarning, shorten
from .extra_modules import ModulesToSaveWrapper
from .holder import BaseTunerLayer, adapted_modules, require_adapters
from .injection import Placed, inject, plan_layers
from .kinds import kind_of
from .layer import AdapterLayer
from .replication import restore
from .targets import resolve_defaults
from .tied import embeddings_are_tied
from .token_rows import TokenRowsLayer


class BaseTuner(nn.Module):
    """A base model with adapters of a weight method in it.

    Args:
        model: The base model, changed in place.
        peft_config: Configuration of the first adapter, or configurations by adapter name.
        adapter_name: Name of the first adapter.
        low_cpu_mem_usage: Make the adapter's parameters on the meta device.
        state_dict: Adapt the layers that these tensors name.
        autocast_adapter_dtype: Keep the adapter's parameters in float32 where the base model is in half precision.

    Raises:
        ValueError: The configuration does not suit the model.
    """

    layer_cls: ClassVar[type[AdapterLayer]]
    """The method's layer."""
    layers: ClassVar[Mapping[str, type[AdapterLayer]]] = {}
    """Its subclasses that programs know by name, by the name of the kind of layer that each is for."""
    default_role: ClassVar[str] = "attention"
    """Which column of the table of default targets the method uses."""
    prefix: ClassVar[str] = ""
    """How the method's attributes on adapted layers begin."""
    is_outer: ClassVar[bool] = True
    """Whether the tuner stands around the base model in a :class:`~peft.PeftModel`, rather than beside it."""

    def __init__(
        self,
        model: nn.Module,
        peft_config: Any,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        autocast_adapter_dtype: bool = False,
    ) -> None:
        super().__init__()
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            inject(
                model, config, name, type(self), on_meta=low_cpu_mem_usage, state_dict=state_dict,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
        self.model = model
        self.peft_config: dict[str, Any] = model.peft_config  # type: ignore[assignment]

    # -- what a method may say -------------------------------------------------------------------------------------

    @classmethod
    def check_config(cls, config: Any, model: nn.Module) -> None:
        """Refuse a configuration that the method cannot honour on this model.

        Raises:
            ValueError: Or ``NotImplementedError``, with the reason.
        """

    @classmethod
    def find_defaults(cls, config: Any, model: nn.Module) -> set[str] | str:
        """The configured targets, or the method's defaults for the model's type. May fill in other fields that depend on it.

        Raises:
            ValueError: No targets are configured, and there are no defaults for the model.
        """
        return resolve_defaults(config, model, functools.partial(default_targets, role=cls.default_role))

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        config: Any,
        heads: dict[str, nn.Module],
        on_meta: bool,
        state_dict: Mapping[str, torch.Tensor] | None,
        autocast_adapter_dtype: bool,
    ) -> tuple[list[Placed], dict[str, Any]]:
        """What to put where in a model, and values of configuration fields that were filled in; the model is not changed."""
        return plan_layers(model, config, cls, heads, on_meta, state_dict, autocast_adapter_dtype)

    @classmethod
    def default_heads(cls, config: Any) -> tuple[str, ...]:
        """Modules that are trained in full where the configuration names none."""
        return ()

    @classmethod
    def file_renamings(cls, adapter_name: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Patterns and replacements that lead from keys of a file to those of a base model with the adapter in it.

        Returns:
            Those for what stands around the base model, and those for the adapter's own tensors.
        """
        layer = cls.layer_cls
        own: list[tuple[str, str]] = []
        both: tuple[type[AdapterLayer], ...] = (layer, TokenRowsLayer)
        for leaf in ("weight", "bias"):
            own += [(rf"\.{re.escape(s)}\.{leaf}$", f".{s}.{adapter_name}.{leaf}") for s in layer.linear_slots]
        own += [(rf"\.{re.escape(s)}$", f".{s}.{adapter_name}.weight") for s in layer.vector_slots]
        for each in dict.fromkeys(both):
            own += [(rf"\.{re.escape(each.file_prefix + s)}$", f".{s}.{adapter_name}") for s in each.parameter_slots]
        return [(r"^base_model\.model\.", "")], own

    @classmethod
    def make_layer(cls, base_layer: nn.Module, config: Any) -> AdapterLayer:
        """Wrap a layer."""
        kind = kind_of(base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer)
        return cls.layers.get(kind.name if kind else "", cls.layer_cls)(base_layer)

    def for_file(
        self, adapter_name: str, tensors: dict[str, torch.Tensor], config: Any, initial: str | None = None
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """Change what is written of an adapter.

        Args:
            adapter_name: The adapter.
            tensors: Its tensors by file key.
            config: Its configuration, a copy.
            initial: Folder or Hub id of the adapter as it was at the start, where the user gives it to have it subtracted.

        Raises:
            ValueError: The method has no such start, or the folder holds another one.
        """
        if initial is not None:
            raise ValueError(
                f"path_initial_model_for_weight_conversion is given, but adapters of type {type(self).__name__} are not measured "
                "against a start that could be subtracted. Leave it out."
            )
        return tensors, config

    @classmethod
    def in_form(cls, method: Any, tensors: dict[str, torch.Tensor], config: Any) -> tuple[dict[str, torch.Tensor], Any]:
        """An adapter's tensors and configuration as those of another method that gives the same outputs.

        Args:
            method: The other method, as the registry knows it.
            tensors: The adapter's tensors by file key.
            config: Its configuration, filled.

        Raises:
            ValueError: There is no such adapter of the other method.
        """
        if method.tuner_cls is cls:
            return tensors, config
        raise ValueError(
            f"An adapter of type {getattr(config.peft_type, 'value', config.peft_type)} cannot be written as one of type "
            f"{method.peft_type}: what it computes has no form in that method."
        )

    # -- adapters --------------------------------------------------------------------------------------------------

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Add the adapter whose configuration stands in ``peft_config`` under this name."""
        config = self.peft_config.pop(adapter_name)
        inject(
            model, config, adapter_name, type(self), on_meta=low_cpu_mem_usage, state_dict=state_dict,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, all others inactive and frozen.

        Raises:
            ValueError: Unknown name.
        """
        activation.set_adapter(self.model, adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen, active or not."""
        activation.set_requires_grad(self.model, adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: Unknown name.
        """
        require_adapters(self.model, adapter_name, self.peft_config)
        activation.delete_adapter(self.model, adapter_name)
        del self.peft_config[adapter_name]

    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
        """Add an adapter that stands for the weighted sum of others; it is inactive until :meth:`set_adapter`.

        Args:
            adapters: Names of the adapters.
            weights: A weight for each.
            adapter_name: Name of the new adapter.

        Raises:
            ValueError: Unknown names, or the method's adapters cannot be added up. The model is as it was.
        """
        combine(self.model, adapters, weights, adapter_name, Combination())

    def enable_adapter_layers(self) -> None:
        """Switch adapters on."""
        activation.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Switch adapters off: the model computes what its base model does."""
        trained = [n for n in self.active_adapters if getattr(self.peft_config.get(n), "bias", "none") != "none"]
        if trained:
            warnings.warn(
                f"Adapter {shorten(trained)} trained biases of the base model (bias={self.peft_config[trained[0]].bias!r}), so "
                "with adapters disabled the outputs still differ from those of the untouched base model.",
                PeftWarning,
                stacklevel=2,
            )
        activation.enable_adapters(self.model, False)

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return next((layer.active_adapters for _, layer in adapted_modules(self.model)), [])

    @property
    def active_adapter(self) -> list[str]:
        return self.active_adapters

    # -- merging ---------------------------------------------------------------------------------------------------

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, keep_original: bool = True
    ) -> None:
        """Add adapters to the base weights.

        Args:
            adapter_names: Which; the active ones when not given.
            safe_merge: Check for NaN and infinity before anything is changed.
            keep_original: Keep a copy of the weights in host memory, so that unmerging is exact.

        Raises:
            ValueError: Unknown name, or a layer cannot be merged. Nothing is changed then.
        """
        if adapter_names is not None:
            adapter_names = require_adapters(self.model, adapter_names, self.peft_config)
        merging.check_nothing_alone(self.model, adapter_names)
        if not merging.mergeable_layers(self.model, adapter_names):
            warnings.warn("All adapters asked for are already merged; nothing to do.", PeftWarning, stacklevel=2)
            return
        merging.merge_model(self.model, adapter_names, safe_merge=safe_merge, keep_original=keep_original)

    def unmerge_adapter(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take adapters out of the base weights: all merged ones, or those named, in any order."""
        for _, layer in reversed(list(adapted_modules(self.model))):
            layer.unmerge(adapter_names)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Add adapters to the base weights for good and take this library's layers out.

        Args:
            progressbar: Show progress.
            safe_merge: Check for NaN and infinity before anything is changed.
            adapter_names: Which; the active ones when not given.

        Returns:
            The plain model.

        Raises:
            ValueError: A layer cannot be merged. Nothing is changed then.
        """
        if adapter_names is not None:
            adapter_names = require_adapters(self.model, adapter_names, self.peft_config)
        merging.merge_model(self.model, adapter_names, safe_merge=safe_merge, keep_original=False)
        return self._unload(adapter_names, progressbar)

    def unload(self) -> nn.Module:
        """Take adapters and this library's layers out.

        Returns:
            The plain base model, with its own weights.
        """
        self.unmerge_adapter()
        return self._unload([], False)

    def _unload(self, merged: Sequence[str] | None, progressbar: bool) -> nn.Module:
        from tqdm import tqdm

        names = self.active_adapters if merged is None else list(merged)
        tied = embeddings_are_tied(self.model)
        places = [(n, m) for n, m in adapted_modules(self.model) if not n.endswith(".base_layer")]
        for name, layer in tqdm(
            places, disable=not progressbar, desc="Unloading" if not names else "Merging and unloading"
        ):
            if isinstance(layer, AdapterLayer):
                layer.attachment.detach()
            if layer.is_attached:
                continue
            base = layer.get_base_layer()
            if isinstance(layer, ModulesToSaveWrapper):
                base = next((layer.modules_to_save[n] for n in names if n in layer.modules_to_save), base)
            base.__dict__.pop(merging._ATTRIBUTE, None)
            if not name:
                raise ValueError(
                    "The model itself is one adapted layer; there is no place to put the plain layer back."
                )
            layer.leave(self.model, name, base)
        if tied and not embeddings_are_tied(self.model):
            self._untie()
        if not names:  # what is merged stays as deep as it was trained
            restore(self.model)
        with contextlib.suppress(AttributeError):
            del self.model.peft_config
        return self.model

    def _untie(self) -> None:
        """Write into the model's configuration that its embeddings are no longer tied, so that saving it keeps both."""
        config = getattr(self.model, "config", None)
        configs = [c for c in (config, getattr(config, "get_text_config", lambda: None)()) if c is not None]
        if any(getattr(c, "tie_word_embeddings", False) for c in configs):
            for each in configs:
                each.tie_word_embeddings = False
            warnings.warn(
                "The input and output embeddings were tied, and one of them was trained in full: they are two weights now, and "
                "config.tie_word_embeddings is set to False. To keep them tied, train with ensure_weight_tying=True.",
                PeftWarning,
                stacklevel=4,
            )

    # -- the module ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model" or "model" not in self._modules:
                raise
            return getattr(self.model, name)

    def get_model_config(self, model: nn.Module) -> dict[str, Any]:
        """The base model's configuration as a dictionary."""
        config = getattr(model, "config", None)
        return (
            config if isinstance(config, dict) else config.to_dict() if config is not None else {"model_type": "custom"}
        )

    def named_adapted_layers(self) -> Iterator[tuple[str, BaseTunerLayer]]:
        """Names and modules of all adapted layers."""
        return adapted_modules(self.model)
