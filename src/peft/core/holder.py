"""Whatever holds adapters: which are there, which are active and trainable; and the walk over all such modules of a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from .errors import did_you_mean, doubt
from .flags import set_flag
from .mixed import Shared


class BaseTunerLayer(nn.Module):
    """Anything that holds adapters, has active ones among them and can be switched off."""

    adapter_layer_names: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold parameters or modules by adapter."""
    other_param_names: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold settings by adapter."""
    file_prefix: ClassVar[str] = ""
    """What stands before the slots' names in files."""
    vector_slots: ClassVar[tuple[str, ...]] = ()
    """Attributes that hold modules around one parameter, whose name files leave out."""

    stands_alone: ClassVar[bool] = False
    """Whether it is a module of its own, in place of none; files then name its tensors without a module."""

    _disable_adapters: bool
    _active_adapter: list[str]
    _shared: Shared
    merged_adapters: list[str]

    def __init__(self) -> None:
        super().__init__()
        # Plain attributes go past torch's bookkeeping: a model gets hundreds of layers at once.
        self.__dict__.update(_disable_adapters=False, _active_adapter=[], merged_adapters=[], _shared=Shared())

    # -- what is there ---------------------------------------------------------------------------------------------

    def adapter_names(self) -> list[str]:
        """All adapters on this layer, in the order they were added."""
        names = (getattr(self, slot).keys() for slot in self.adapter_layer_names + self.other_param_names)
        return list(dict.fromkeys(itertools.chain.from_iterable(names)))

    def _get_available_adapters(self) -> set[str]:
        return set(self.adapter_names())

    def has_adapter(self, name: str) -> bool:
        """Whether the layer holds this adapter."""
        modules = (
            self._modules
        )  # asked of every layer about every row's adapter: attributes and generators take ten times as long
        for slot in self.adapter_layer_names:  # noqa: SIM110
            if name in (modules[slot] if slot in modules else getattr(self, slot)):  # type: ignore[operator]
                return True
        return False

    def adapter_entries(self, name: str) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
        """Slots of this adapter and what they hold."""
        for slot in self.adapter_layer_names:
            holder = getattr(self, slot)
            if name in holder:
                yield slot, holder[name]

    def adapter_tensors(self, name: str) -> Iterator[tuple[str, str, nn.Parameter | torch.Tensor]]:
        """Key in the adapter's file, key in the module, and tensor of each of this adapter's tensors."""
        for slot, entry in self.adapter_entries(name):
            if isinstance(entry, nn.Module):
                for key, tensor in itertools.chain(entry.named_parameters(), entry.named_buffers()):
                    leaf = "" if slot in self.vector_slots else f".{key}"
                    yield f"{self.file_prefix}{slot}{leaf}", f"{slot}.{name}.{key}", tensor
            else:
                yield f"{self.file_prefix}{slot}", f"{slot}.{name}", entry

    def adapter_parameters(self, name: str) -> Iterator[nn.Parameter]:
        """The parameters of this adapter."""
        for _, entry in self.adapter_entries(name):
            if isinstance(entry, nn.Module):
                yield from entry.parameters()
            else:
                yield entry

    @property
    def active_adapter(self) -> list[str]:
        """The active adapters, whether or not they are on this layer."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        return list(self._active_adapter)

    @property
    def disable_adapters(self) -> bool:
        """Whether the layer behaves as its base layer."""
        return self._disable_adapters

    @property
    def merged(self) -> bool:
        """Whether any adapter is merged into the base weight."""
        return bool(self.merged_adapters)

    # -- switching -------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and all others frozen.

        Args:
            adapter_names: One name or several.
            inference_mode: Leave the active ones frozen too.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in self.adapter_names():
            self._set_trainable(name, name in names and not inference_mode)
        self._active_adapter = names

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the layer on (its active adapters become trainable) or off (the plain base layer, all frozen)."""
        if enabled:
            self.set_adapter(self._active_adapter)
        else:
            if self.merged_adapters:
                self.unmerge()
            for name in self.adapter_names():
                self._set_trainable(name, False)
        self._disable_adapters = not enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen without activating them."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names:
            self._set_trainable(name, requires_grad)

    def _set_trainable(self, name: str, requires_grad: bool) -> None:
        for parameter in self.adapter_parameters(name):
            set_flag(parameter, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; where it was the only active one the first that is left becomes active."""
        if adapter_name in self.merged_adapters:
            self.unmerge([adapter_name])
        for slot in self.adapter_layer_names + self.other_param_names:
            holder = getattr(self, slot)
            if adapter_name in holder:
                del holder[adapter_name]
        if adapter_name in self._active_adapter:
            self._active_adapter = [n for n in self._active_adapter if n != adapter_name]

    # -- for the engine --------------------------------------------------------------------------------------------

    def enter(self, model: nn.Module, name: str) -> None:
        """Take the place of the module of this name."""
        *path, child = name.split(".")
        parent: Any = model
        for part in path:
            parent = parent._modules[part]
        if isinstance(parent, (nn.ModuleList, nn.Sequential)):
            parent[int(child)] = self
        else:
            setattr(parent, child, self)

    def leave(self, model: nn.Module, name: str, plain: nn.Module) -> None:
        """Give the place back to a plain module."""
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, plain)

    def training_tensors(self, name: str) -> Iterator[tuple[str, str, torch.Tensor]]:
        """Key in the file for resuming, key in the module, and tensor of what an adapter trains where its own file holds a result of it."""
        yield from ()

    def fold(self, name: str, state_dict: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
        """What an adapter's file holds where that is made from trained tensors, taken from a state dict.

        Args:
            name: The adapter.
            state_dict: The state dict of the whole model.
            prefix: This module's name in the model, with a dot behind it.
        """
        return {}

    def adjust_to(self, name: str, tensors: Mapping[str, torch.Tensor]) -> Callable[[], None] | None:
        """Get ready for tensors of an adapter's files, of whichever of its forms they are.

        Returns:
            What undoes it, if anything was done.
        """
        return None

    def loaded(self, name: str) -> None:
        """Finish what :meth:`adjust_to` began, after an adapter's tensors were written."""

    def let_go(self) -> None:
        """Give modules that are not under this one back what was changed about them."""

    def get_base_layer(self) -> nn.Module:
        """The layer under all adapters."""
        raise NotImplementedError

    @property
    def is_attached(self) -> bool:
        """Whether this is a further child of a block that it works on, and stands for no module of the base model."""
        return False

    @property
    def weight(self) -> Any:
        """The base layer's weight; some models read it directly."""
        return self.get_base_layer().weight

    @property
    def bias(self) -> Any:
        """The base layer's bias."""
        return self.get_base_layer().bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, where the method has something to add."""

    def unmerge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Take merged adapters out of the base weight."""

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's scale, where the method has one. Other libraries call this on every layer."""

    def scale_layer(self, scale: float) -> None:
        """Multiply the scale of all active adapters, where the method has one."""

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo :meth:`scale_layer`."""


# -- walking ---------------------------------------------------------------------------------------------------------


def adapted_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, BaseTunerLayer]]:
    """Names and modules of everything that holds adapters, outer before inner.

    The walk does not descend into the adapters themselves, so its cost does not grow with their number.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [(prefix, model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if isinstance(module, BaseTunerLayer):
            yield name, module
            base = module._modules.get("base_layer")
            if base is not None and (base._modules or isinstance(base, BaseTunerLayer)):
                stack.append((f"{name}.base_layer" if name else "base_layer", base))
            continue
        for child_name, child in reversed(module._modules.items()):
            if child is not None and (child._modules or isinstance(child, BaseTunerLayer)):
                stack.append((f"{name}.{child_name}" if name else child_name, child))


def shared_of(model: nn.Module) -> Shared | None:
    """The state that the adapted layers of a model share, or ``None`` where there are none."""
    return next((module._shared for _, module in adapted_modules(model)), None)


def require_adapters(model: nn.Module, names: str | Sequence[str], known: Iterable[str]) -> list[str]:
    """Check names of adapters.

    Raises:
        ValueError: None given, or an unknown one.
    """
    asked = [names] if isinstance(names, str) else list(names)
    known = list(known)
    if not asked:
        raise ValueError("Give at least one adapter name; to use none, call disable_adapter_layers().")
    for name in asked:
        if name not in known:
            raise ValueError(
                f"Adapter {name!r} not found{did_you_mean(name, known)}. Loaded: {', '.join(known) or 'none'}."
            )
    if len(set(asked)) < len(asked):
        doubt(f"Adapter names are given twice: {asked}. Each is applied once.")
    return list(dict.fromkeys(asked))
