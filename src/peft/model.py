"""The model a user holds: a thin holder around a base model with adapters in it, that names, saves, loads and delegates."""

from __future__ import annotations

import contextlib
import copy
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from transformers.utils import PushToHubMixin

from .config import PeftConfig
from .core import activation, checkpoints, status
from .core.errors import PeftWarning, strictness
from .core.extra_modules import fresh_parts, record_head
from .core.files import (
    CONFIG_NAME,
    SAFETENSORS_WEIGHTS_NAME,
    TRAINING_WEIGHTS_NAME,
    hub_kwargs,
    load_peft_weights,
    load_training_weights,
    safetensors_writer,
    upload,
    warn_pickle,
    write_atomically,
)
from .core.holder import adapted_modules, require_adapters, shared_of
from .core.injection import check_adapter_name, inject
from .core.layer import AdapterLayer
from .core.mixed import MixedPlan, batch_size_of, check_names, planned
from .core.model_card import model_card
from .core.own_loss import own_loss
from .core.preparation import enable_input_gradients, is_checkpointing
from .core.prompts import NAME as PROMPTS
from .core.prompts import Prompts
from .core.soft_prompts import whole_outputs
from .core.undo import undone_on_failure
from .registry import get_method, in_form

_ROW_ARGUMENTS = {"adapter_names", "allow_mixed_training", "task_ids"}
"""Arguments of a call that say something of each row of its batch, to this library alone."""


class PeftModel(PushToHubMixin, nn.Module):
    """A base model with adapters.

    Args:
        model: The base model, changed in place.
        peft_config: Configuration of the first adapter.
        adapter_name: Its name.
        autocast_adapter_dtype: Keep adapter parameters in float32 where the base model is in half precision.
        low_cpu_mem_usage: Make the adapter's parameters on the meta device, to be assigned from a file.

    Attributes:
        base_model: The method's model, whose ``model`` is the base model; or the base model itself for methods with virtual tokens.
        tuner: The method's model in both cases.
        peft_config: Configuration of each adapter by name.
        active_adapter: Name of the active adapter.

    Raises:
        ValueError: The configuration does not suit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        self._add_head(peft_config, model)
        checkpoints = is_checkpointing(model)  # asks every module, and there are fewer before
        tuner_cls = get_method(peft_config.peft_type).tuner_cls
        tuner = tuner_cls(
            model,
            {adapter_name: peft_config},
            adapter_name,
            low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )
        self.__dict__["tuner"] = tuner  # no child: either it is `base_model`, or it stands beside it
        self.base_model: nn.Module = tuner if tuner.is_outer else model
        self.peft_type = peft_config.peft_type
        self.special_peft_forward_args = {"adapter_names", "allow_mixed_training"}
        self._name_base(peft_config)
        if checkpoints:
            self.prepare_model_for_gradient_checkpointing(model)
        # Tensor parallelism inside pretraining splits weights in a way that adapters do not see.
        base_config = getattr(model, "config", None)
        if getattr(base_config, "pretraining_tp", 1) not in (None, 1):
            base_config.pretraining_tp = 1  # type: ignore[union-attr]

    # -- what a task adds ------------------------------------------------------------------------------------------

    head_names: tuple[str, ...] = ()
    """Heads that the task trains in full besides the adapter."""
    position_labels: tuple[str, ...] | None = None
    """Labels that the task has one of for each position, virtual tokens included; ``None``: outputs leave their positions out."""

    def _add_head(self, config: PeftConfig, model: nn.Module) -> None:
        """Let an adapter train the task's head, unless its ``modules_to_save`` is an empty list: a part that others share has no head."""
        if not self.head_names or not hasattr(config, "modules_to_save") or config.modules_to_save == []:
            return
        names = list(config.modules_to_save or [])
        missing = [n for n in self.head_names if n not in names]
        if missing and not config.inference_mode:
            # What the base's file lacks would be random again in the next process.
            missing += fresh_parts(model, [*names, *missing])
        config.modules_to_save = names + missing

    def _name_base(self, config: PeftConfig) -> None:
        base = self.get_base_model()
        if config.base_model_name_or_path is None:
            config.base_model_name_or_path = getattr(base, "name_or_path", None) or None
        if config.peft_version is None:
            from . import __version__

            config.peft_version = __version__

    # -- adapters --------------------------------------------------------------------------------------------------

    @property
    def prompts(self) -> Prompts | None:
        """What holds virtual tokens and prefixes in the base model, if there are any."""
        return self.get_base_model()._modules.get(PROMPTS)  # type: ignore[return-value]

    @property
    def prompt_encoder(self) -> nn.ModuleDict:
        """What makes the virtual tokens or prefix of each adapter that has any."""
        if self.prompts is None:
            raise AttributeError(
                f"{type(self).__name__} has no adapter with virtual tokens, and so no `prompt_encoder`."
            )
        return self.prompts.prompt_encoder

    def get_prompt_embedding_to_save(self, adapter_name: str) -> torch.Tensor:
        """An adapter's table as its file holds it."""
        require_adapters(self, adapter_name, self.prompt_encoder)
        return self.prompt_encoder[adapter_name]().detach().cpu()

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Configuration of each adapter by name."""
        return self.tuner.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return self.tuner.active_adapters

    @property
    def active_adapter(self) -> Any:
        """Name of the active adapter; a list where several are active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of the active adapter."""
        names = self.active_adapters
        if not names:
            raise ValueError("No adapter is active: the model has none left. Add or load one.")
        return self.peft_config[names[0]]

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names of modules that adapters train in full."""
        names = {n for c in self.peft_config.values() for n in (getattr(c, "modules_to_save", None) or ())}
        return names or None

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether any adapter acts on the outputs."""
        return any(not m.disable_adapters and m.active_adapters for _, m in adapted_modules(self))

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        strict: bool | None = None,
    ) -> None:
        """Add a new adapter; it is inactive and frozen until :meth:`set_adapter`.

        Args:
            adapter_name: Its name.
            peft_config: Its configuration.
            low_cpu_mem_usage: Make its parameters on the meta device.
            autocast_adapter_dtype: Keep its parameters in float32 where the base model is in half precision.
            strict: Raise instead of warning about doubtful things.

        Raises:
            ValueError: The name is taken, or the configuration does not suit the model. The model is as it was.
        """
        check_adapter_name(adapter_name, self.peft_config)
        self._add_head(peft_config, self.get_base_model())
        tuner_cls = get_method(peft_config.peft_type).tuner_cls
        base = self.get_base_model()
        with strictness(strict):
            inject(
                base, peft_config, adapter_name, tuner_cls, on_meta=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )  # fmt: skip
        # All adapters may have been deleted in between, and the dictionary with them.
        self.tuner.peft_config = base.peft_config  # type: ignore[assignment]
        self._name_base(peft_config)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters active and trainable, and all others inactive and frozen.

        Args:
            adapter_name: One name or several.
            inference_mode: Leave the active ones frozen too.

        Raises:
            ValueError: Unknown name.
        """
        self.tuner.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen, active or not.

        Raises:
            ValueError: Unknown name.
        """
        self.tuner.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter.

        Raises:
            ValueError: Unknown name.
        """
        self.tuner.delete_adapter(adapter_name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within this context the model behaves as its base model; afterwards everything is as it was, every flag included."""
        with activation.disabled(self):
            yield

    # -- calling ---------------------------------------------------------------------------------------------------

    def get_base_model(self) -> nn.Module:
        """The base model."""
        return self.tuner.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model.

        Args:
            *args: Passed on.
            **kwargs: Passed on, but for ``adapter_names``: one adapter name per row of the batch, ``"__base__"`` for the plain
                model; ``allow_mixed_training``: let such a batch be used in training mode; and ``task_ids``, (batch,): the task
                of each row, for multitask prompts.

        Raises:
            ValueError: ``adapter_names`` of the wrong length or with an unknown name, or while adapters are merged; ``task_ids`` that
                do not fit.
        """
        if not _ROW_ARGUMENTS & kwargs.keys():
            return self._run(args, kwargs)
        with self._rows(args, kwargs, expands=False) as rest:
            return self._run(args, rest)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.prompts is None or self.position_labels is None:
            return self.base_model(*args, **kwargs)
        kwargs, weigh = own_loss(self.prompts, kwargs)
        with whole_outputs(self.prompts, kwargs, self.position_labels) as changed:
            output = self.base_model(*args, **changed)
        return output if weigh is None else weigh(output)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's ``generate``; ``adapter_names`` and ``task_ids`` as in :meth:`forward`."""
        generate = self.get_base_model().generate  # type: ignore[operator]
        with self.prompts.held() if self.prompts is not None else contextlib.nullcontext():
            if not _ROW_ARGUMENTS & kwargs.keys():
                return generate(*args, **kwargs)
            with self._rows(args, kwargs, expands=True) as rest:
                return generate(*args, **rest)

    @property
    def takes_tasks(self) -> bool:
        """Whether any adapter has virtual tokens of its own for several tasks, so that ``task_ids`` mean something."""
        return self.prompts is not None and self.prompts.has_tasks

    @contextlib.contextmanager
    def _rows(self, args: Sequence[Any], kwargs: dict[str, Any], *, expands: bool) -> Iterator[dict[str, Any]]:
        """Within this context each row of a batch has the adapter and the task that a call names for it; gives the other arguments."""
        with self._mixed(args, kwargs, expands=expands) as rest:
            if not self.takes_tasks:  # then `task_ids` are the base model's, if it has any
                yield rest
                return
            assert self.prompts is not None
            task_ids = rest.pop("task_ids", None)
            rows = batch_size_of(args, rest)
            with (
                contextlib.nullcontext() if task_ids is None else self.prompts.by_task(task_ids, rows, expands=expands)
            ):
                yield rest

    @contextlib.contextmanager
    def _mixed(self, args: Sequence[Any], kwargs: dict[str, Any], *, expands: bool) -> Iterator[dict[str, Any]]:
        rest = {k: v for k, v in kwargs.items() if k not in self.special_peft_forward_args}
        names, allow_training = kwargs.get("adapter_names"), kwargs.get("allow_mixed_training", False)
        if names is None:
            yield rest
            return
        names = check_names(names, self.peft_config, batch_size_of(args, rest))
        if self.training and not allow_training:
            raise ValueError(
                "`adapter_names` is meant for inference: call model.eval() first, or pass allow_mixed_training=True to train "
                "several adapters in one batch."
            )
        activation.check_not_merged(self, "use `adapter_names`")
        shared = shared_of(self)
        if shared is None:
            raise ValueError("`adapter_names` needs a model with adapters, but all of them were removed.")
        with planned(self, shared, MixedPlan(names, expands=expands)):
            yield rest

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "tuner" or "tuner" not in self.__dict__:
                raise
            return getattr(self.tuner, name)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients flow into the first checkpointed block although everything below it is frozen."""
        if not getattr(model, "is_loaded_in_8bit", False) and not getattr(model, "is_loaded_in_4bit", False):
            enable_input_gradients(model)
        return model

    # -- saving ----------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        as_prefix_tuning: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write adapters: ``default`` into the folder itself, any other into a folder of its own inside it.

        Args:
            save_directory: The folder; made if missing.
            safe_serialization: Only ``True`` has an effect: adapters are written as safetensors.
            selected_adapters: Which; all when not given.
            save_embedding_layers: Write the base model's embeddings too; ``"auto"``: where they are adapted or were resized.
            is_main_process: Write nothing where this is false, as on the other processes of a distributed run.
            path_initial_model_for_weight_conversion: Folder of the adapter as it was at its start. Adapters whose start was read
                off the base weights (LoRA's ``"pissa"``, ``"olora"``) are written as plain ones of twice the rank.
            as_prefix_tuning: Write adapters of P-tuning v2 as prefix tuning, which other libraries read too, where they compute the
                same. What makes the table while it trains is left out.
            **kwargs: ``state_dict``: take the tensors from here. Others are accepted for compatibility.

        Raises:
            ValueError: Unknown adapter, ``save_directory`` is a file, or an adapter has no form as prefix tuning.
            OSError: It cannot be written.
        """
        if os.path.isfile(save_directory):
            raise ValueError(
                f"Provided path ({str(save_directory)!r}) should be a directory, not a file. Give a folder."
            )
        if not safe_serialization:
            warn_pickle()
        names = (
            list(self.peft_config)
            if selected_adapters is None
            else require_adapters(self, selected_adapters, self.peft_config)
        )
        state_dict = kwargs.get("state_dict")
        if not is_main_process and state_dict is not None:
            return  # where the caller has gathered, only the main process has something to do
        # Gather everything before anything is written; all processes take part.
        contents = {}
        for name in names:
            tensors = checkpoints.get_peft_model_state_dict(
                self, state_dict, name, save_embedding_layers=save_embedding_layers
            )
            config = copy.copy(self.peft_config[name])
            tensors, config = self.tuner.for_file(name, tensors, config, path_initial_model_for_weight_conversion)
            if as_prefix_tuning:
                tensors, config = in_form("PREFIX_TUNING", tensors, config)
            contents[name] = tensors, config
        resume = {n: {} if as_prefix_tuning else checkpoints.training_tensors(self, n, state_dict) for n in names}
        if not is_main_process:
            return
        files: dict[str, Any] = {}
        stale: list[str] = []
        for name, (tensors, config) in contents.items():
            config.inference_mode = True
            base = self.get_base_model()
            if config.task_type is None or config.is_prompt_learning:
                config.auto_mapping = {
                    "base_model_class": type(base).__name__,
                    "parent_library": type(base).__module__,
                }
            record_head(config, base, dict(self._heads_of(name)))
            folder = "" if name == "default" else name
            files[os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)] = safetensors_writer(tensors)
            files[os.path.join(folder, CONFIG_NAME)] = config.to_file()
            training = os.path.join(folder, TRAINING_WEIGHTS_NAME)
            if resume[name]:
                files[training] = safetensors_writer(resume[name])
            else:
                stale.append(training)
        write_atomically(save_directory, {**files, "README.md": self._model_card(save_directory)}, without=stale)

    def _heads_of(self, adapter_name: str) -> Iterator[tuple[str, nn.Module]]:
        for name, module in adapted_modules(self):
            if not isinstance(module, AdapterLayer) and module.has_adapter(adapter_name):
                yield name, module

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """Upload the adapters, with a model card that names the base model.

        Args:
            repo_id: Hub id; the repository is made if missing.
            commit_message: Message of the commit.
            commit_description: Its description.
            private: Whether a repository made here is private.
            token: Access token.
            revision: Branch to upload to; made if missing.
            create_pr: Open a pull request instead of committing.
            max_shard_size: No effect: an adapter is one file.
            tags: Further tags for the card.

        Returns:
            Address of the commit.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return upload(
                folder, repo_id, message=commit_message or "Upload adapter", description=commit_description, private=private,
                token=token, revision=revision, create_pr=create_pr, tags=tags,
            )  # fmt: skip

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write a ``README.md`` that says what the adapter is; an existing one keeps its text and gets its metadata updated."""
        write_atomically(output_dir, {"README.md": self._model_card(output_dir)})

    def _model_card(self, folder: str | os.PathLike) -> bytes:
        return model_card(os.path.join(folder, "README.md"), self.peft_config, self.get_base_model()).encode()

    # -- loading ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Load an adapter onto a base model.

        Args:
            model: The base model, changed in place.
            model_id: Folder or Hub id of the adapter.
            adapter_name: Name it gets here.
            is_trainable: Load it for further training; otherwise it is frozen and the model put into evaluation mode.
            config: Use this configuration instead of the file's.
            autocast_adapter_dtype: Keep its parameters in float32 where the base model is in half precision.
            ephemeral_gpu_offload: Not built yet.
            low_cpu_mem_usage: Accepted for compatibility: parameters are always made on the meta device and then assigned.
            key_mapping: Regular expressions and replacements, applied to the keys of the file.
            strict: Raise instead of warning about missing or unexpected keys and other doubtful things.
            **kwargs: ``subfolder``, ``torch_device``, ``ignore_mismatched_sizes`` and download arguments (``revision``, ``token``, …).

        Returns:
            The model, of the class that the adapter's task type names.

        Raises:
            ValueError: No adapter there, or it does not fit the model.
        """
        _refuse_offload(ephemeral_gpu_offload)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **_config_kwargs(kwargs))
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {type(config).__name__}.")
        else:
            config = copy.copy(config)
        config.inference_mode = not is_trainable
        weights = _read_weights(model_id, key_mapping, kwargs)
        resume = _read_training_weights(model_id, config, kwargs)
        from .mapping import model_class

        with strictness(strict), undone_on_failure(model):
            holder = model_class(config, cls)(
                model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, low_cpu_mem_usage=not resume
            )
            holder._take(
                {**weights, **resume}, adapter_name, str(model_id), kwargs.get("ignore_mismatched_sizes", False)
            )
        if not is_trainable:
            holder.eval()
        return holder

    def load_adapter(
        self,
        model_id: str | os.PathLike,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool | None = None,
        **kwargs: Any,
    ) -> checkpoints.LoadResult:
        """Load a further adapter, or read the weights of one that is there already from a file.

        The active adapter stays the active one, and no flag of anything else changes.

        Args:
            model_id: Folder or Hub id of the adapter.
            adapter_name: Name it gets here; if it exists, its weights are replaced.
            is_trainable: Load it for training.
            torch_device: Where to read the tensors to; they end up on the devices of the layers that they belong to.
            autocast_adapter_dtype: Keep its parameters in float32 where the base model is in half precision.
            ephemeral_gpu_offload: Not built yet.
            low_cpu_mem_usage: Accepted for compatibility: parameters are always made on the meta device and then assigned.
            key_mapping: Regular expressions and replacements, applied to the keys of the file.
            strict: Raise instead of warning about missing or unexpected keys.
            **kwargs: ``subfolder``, ``ignore_mismatched_sizes`` and download arguments (``revision``, ``token``, …).

        Returns:
            Missing, unexpected and mismatched keys.

        Raises:
            ValueError: No adapter there, or it does not fit the model. The model is as it was.
        """
        _refuse_offload(ephemeral_gpu_offload)
        kwargs = {**kwargs, "torch_device": torch_device}
        config = None
        if adapter_name not in self.peft_config:
            check_adapter_name(adapter_name, self.peft_config)
            config = PeftConfig.from_pretrained(model_id, **_config_kwargs(kwargs))
            config.inference_mode = not is_trainable
        weights = _read_weights(model_id, key_mapping, kwargs)
        resume = _read_training_weights(model_id, config or self.peft_config[adapter_name], kwargs)
        with strictness(strict), undone_on_failure(self.get_base_model()):
            if config is not None:
                self.add_adapter(
                    adapter_name, config, low_cpu_mem_usage=not resume, autocast_adapter_dtype=autocast_adapter_dtype
                )
            result = self._take(
                {**weights, **resume}, adapter_name, str(model_id), kwargs.get("ignore_mismatched_sizes", False)
            )
        if is_trainable:
            self.set_requires_grad(adapter_name)
        return result

    def _take(
        self, weights: dict[str, torch.Tensor], adapter_name: str, source: str, ignore_mismatched_sizes: bool
    ) -> checkpoints.LoadResult:
        return checkpoints.load(self, weights, adapter_name, source, ignore_mismatched_sizes)

    # -- numbers ---------------------------------------------------------------------------------------------------

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters, and of all."""
        return status.count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Print the number of trainable parameters, of all parameters, and the percentage."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def get_layer_status(self) -> list[status.TunerLayerStatus]:
        """State of each adapted layer."""
        return status.get_layer_status(self)

    def get_model_status(self) -> status.TunerModelStatus:
        """State of the model."""
        return status.get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether an adapter can be written as plain LoRA."""
        layers = [m for _, m in adapted_modules(self) if isinstance(m, AdapterLayer) and m.has_adapter(adapter_name)]
        return bool(layers) and all(
            getattr(m, "supports_lora_conversion", lambda n: False)(adapter_name) for m in layers
        )

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, if it says one."""
        return getattr(self.get_base_model(), "dtype", None)


class PeftMixedModel(PeftModel):
    """A model whose adapters are of different methods.

    Every :class:`PeftModel` can hold adapters of several weight methods; this class exists because callers ask for it by name.
    """

    @property
    def active_adapter(self) -> list[str]:
        """Names of the active adapters."""
        return self.active_adapters


def _refuse_offload(ephemeral_gpu_offload: bool) -> None:
    if ephemeral_gpu_offload:
        raise NotImplementedError("ephemeral_gpu_offload is not built in this version of peft. Leave it out.")


def _config_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {"subfolder": kwargs.get("subfolder"), **hub_kwargs(kwargs)[0]}


_LOADING_KEYS = {
    "subfolder", "torch_device", "ignore_mismatched_sizes", "use_safetensors", "device_map", "max_memory", "offload_folder",
    "offload_dir", "offload_index", "adapter_name", "low_cpu_mem_usage",
}  # fmt: skip


def _read_weights(
    model_id: str | os.PathLike, key_mapping: dict[str, str] | None, kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    download, others = hub_kwargs(kwargs)
    unknown = sorted(set(others) - _LOADING_KEYS)
    if unknown:
        warnings.warn(f"Arguments {unknown} are not known here and have no effect.", PeftWarning, stacklevel=4)
    device = kwargs.get("torch_device") or "cpu"
    return load_peft_weights(
        model_id, device=device, key_mapping=key_mapping, subfolder=kwargs.get("subfolder"), **download
    )


def _read_training_weights(
    model_id: str | os.PathLike, config: PeftConfig, kwargs: dict[str, Any]
) -> dict[str, torch.Tensor]:
    if (
        config.inference_mode or not config.is_prompt_learning
    ):  # no other family has such a file; spare the Hub a question
        return {}
    device = kwargs.get("torch_device") or "cpu"
    return load_training_weights(model_id, device, kwargs.get("subfolder"), **hub_kwargs(kwargs)[0])


__all__ = ["PeftMixedModel", "PeftModel"]
