"""How an adapted layer reaches what it does not wrap: a block that it works on, and modules whose input it reads."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import PeftError

if TYPE_CHECKING:
    from .layer import AdapterLayer


class Attachment:
    """The hooks of one adapted layer.

    Args:
        layer: The adapted layer.

    Attributes:
        block: The block that the layer works on, where it does not wrap its base layer. Kept here, out of the layer's own modules:
            the layer is a child of the block, and a tree has no cycles.
        sources: By adapter: name of the module whose input it reads, where that is not the base layer's own.
    """

    def __init__(self, layer: AdapterLayer) -> None:
        self.layer = layer
        self.block: nn.Module | None = None
        self.sources: dict[str, str] = {}
        self._watched: dict[str, nn.Module] = {}
        self._seen: dict[str, torch.Tensor] = {}

    # -- a block -------------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Join the block: as its child, called with its input and output each time it runs."""
        assert self.block is not None and self.layer.attached_as is not None
        self.block.add_module(self.layer.attached_as, self.layer)
        self.block.register_forward_hook(self._after_block, with_kwargs=True)

    def detach(self) -> None:
        """Leave the block and all watched modules as they were."""
        for module in self._watched.values():
            _remove_hooks(module, "_forward_pre_hooks", self)
        self._watched.clear()
        if self.block is not None:
            _remove_hooks(self.block, "_forward_hooks", self)
            delattr(self.block, str(self.layer.attached_as))

    def _after_block(self, block: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
        if self.layer.is_idle:
            return None
        y = output[0] if isinstance(output, tuple) else output
        if not isinstance(y, torch.Tensor):
            raise PeftError(
                f"An adapter on a {type(block).__name__} works on a tensor or on a tuple that begins with one, but the block gave a "
                f"{type(output).__name__}. Name a layer inside it."
            )
        y = self.layer.adapted(_first_tensor(args, kwargs), y)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    # -- inputs of other modules ---------------------------------------------------------------------------------------

    def watch(self, adapter_name: str, source: str, module: nn.Module) -> None:
        """Let an adapter read another module's input.

        Args:
            adapter_name: The adapter.
            source: The module's name.
            module: The module; it runs before the base layer.
        """
        self.sources[adapter_name] = source
        if source not in self._watched:
            self._watched[source] = module
            module.register_forward_pre_hook(functools.partial(_keep_input, self, source), with_kwargs=True)

    def forget(self, adapter_name: str) -> None:
        """Forget what an adapter reads."""
        self.sources.pop(adapter_name, None)

    def read(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What an adapter reads: the input of the module it watches, else ``x``."""
        source = self.sources.get(adapter_name)
        if source is None:
            return x
        if source not in self._seen:
            raise PeftError(
                f"Adapter {adapter_name!r} reads the input of {source!r}, which has not run before this layer."
            )
        return self._seen[source]

    def release(self) -> None:
        """Let go of the inputs that were kept for one run of the layer."""
        self._seen.clear()


def _keep_input(
    attachment: Attachment, source: str, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> None:
    if not attachment.layer.is_idle:
        attachment._seen[source] = _first_tensor(args, kwargs)


def _first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


def _remove_hooks(module: nn.Module, kind: str, attachment: Attachment) -> None:
    """Remove the hooks of an attachment. Handles would do, but do not survive copies and pickles of a model."""
    hooks = getattr(module, kind)
    for key, hook in list(hooks.items()):
        if getattr(hook, "__self__", None) is attachment or attachment in getattr(hook, "args", ()):
            del hooks[key]
            getattr(module, f"{kind}_with_kwargs").pop(key, None)
