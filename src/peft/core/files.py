"""Reading and writing adapter files: folders or the Hub, safetensors only, written whole or not at all."""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .errors import PeftWarning

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"

_HUB_KEYS = {
    "cache_dir", "force_download", "local_files_only", "token", "revision", "repo_type", "library_name",
    "library_version", "user_agent", "etag_timeout", "headers", "endpoint", "local_dir",
}  # fmt: skip
# Accepted because callers pass them along; they say nothing about the file.
_IGNORED_KEYS = {"proxies", "resume_download", "use_auth_token", "tqdm_class", "commit_hash", "_commit_hash"}


def hub_kwargs(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split keyword arguments into those of a Hub download and the others."""
    download = {k: v for k, v in kwargs.items() if k in _HUB_KEYS and v is not None}
    others = {k: v for k, v in kwargs.items() if k not in _HUB_KEYS | _IGNORED_KEYS}
    return download, others


def fetch(model_id: str | os.PathLike, filename: str, subfolder: str | None = None, **download: Any) -> str | None:
    """Path of a file in a local folder, or of its download from the Hub.

    Args:
        model_id: Folder, or Hub id.
        filename: Name of the file.
        subfolder: Folder inside it.
        **download: Arguments of ``huggingface_hub.hf_hub_download``.

    Returns:
        The path, or ``None`` where there is no such file.
    """
    folder = os.path.join(model_id, subfolder) if subfolder else os.fspath(model_id)
    if os.path.isdir(folder) or os.path.isdir(model_id):
        path = os.path.join(folder, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    try:
        return hf_hub_download(os.fspath(model_id), filename, subfolder=subfolder, **download)
    except HFValidationError:
        return None  # neither a folder nor a Hub id
    except LocalEntryNotFoundError:
        raise  # no connection: say so, and do not claim that the file is missing
    except EntryNotFoundError:
        return None


def write_atomically(
    folder: str | os.PathLike, files: Mapping[str, bytes | Callable[[str], None]], *, subfolder: str = ""
) -> None:
    """Write files so that a crash leaves the old ones whole: each to a temporary name first, then all renamed.

    Args:
        folder: Where to; made if missing.
        files: Name of each file, and its bytes or a function that writes them to the path that it is given.
        subfolder: Folder inside it.

    Raises:
        ValueError: ``folder`` is a file.
        OSError: It cannot be written.
    """
    folder = os.path.join(folder, subfolder) if subfolder else os.fspath(folder)
    if os.path.isfile(folder):
        raise ValueError(f"Provided path ({folder!r}) should be a directory, not a file. Give a folder.")
    os.makedirs(folder, exist_ok=True)
    umask = os.umask(0)
    os.umask(umask)
    written: list[tuple[str, str]] = []
    try:
        for name, content in files.items():
            handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
            os.close(handle)
            written.append((temporary, os.path.join(folder, name)))
            if callable(content):
                content(temporary)
            else:
                with open(temporary, "wb") as file:
                    file.write(content)
            descriptor = os.open(temporary, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.chmod(temporary, 0o666 & ~umask)
        for temporary, final in written:
            os.replace(temporary, final)
    except BaseException:
        for temporary, _ in written:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise


def safetensors_writer(tensors: Mapping[str, torch.Tensor]) -> Callable[[str], None]:
    """A function that writes tensors as safetensors; tensors that share memory are written each in full."""
    from safetensors.torch import save_file

    ready: dict[str, torch.Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        if place in seen:
            tensor = tensor.clone()
        seen.add(place)
        ready[key] = tensor.contiguous()
    return lambda path: save_file(ready, path, metadata={"format": "pt"})


def load_peft_weights(
    model_id: str | os.PathLike, device: str | None = None, key_mapping: dict[str, str] | None = None, **kwargs: Any
) -> dict[str, torch.Tensor]:
    """Read an adapter's tensors from a folder or from the Hub.

    Args:
        model_id: Folder, or Hub id.
        device: Where to put the tensors, for example ``"cpu"`` or ``"cuda:0"``; the best one found when not given.
        key_mapping: Regular expressions and replacements, applied to the names of the tensors.
        **kwargs: ``subfolder``, and arguments of ``huggingface_hub.hf_hub_download``.

    Returns:
        Tensors by name, as they stand in the file.

    Raises:
        ValueError: There is no adapter file, or it is damaged, or it is a pickle with anything but tensors in it.
    """
    import re

    subfolder = kwargs.pop("subfolder", None)
    kwargs.pop("use_safetensors", None)
    download, unknown = hub_kwargs(kwargs)
    if unknown:
        raise TypeError(f"load_peft_weights does not know the arguments {sorted(unknown)}.")
    target = device if device is not None else infer_device()
    path = fetch(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, **download)
    tensors: dict[str, torch.Tensor]
    if path is not None:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(path, device=str(target))
        except SafetensorError as error:
            raise ValueError(
                f"{path!r} is damaged or not a safetensors file: {error}. Save the adapter again."
            ) from error
    else:
        path = fetch(model_id, WEIGHTS_NAME, subfolder, **download)
        if path is None:
            where = os.path.join(str(model_id), *([subfolder] if subfolder else []))
            raise ValueError(
                f"Can't find weights for the adapter in {where!r}: expected {SAFETENSORS_WEIGHTS_NAME!r} "
                f"(or {WEIGHTS_NAME!r} from old versions). Is it the folder or Hub id of an adapter?"
            )
        try:
            tensors = torch.load(path, map_location=torch.device(target), weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{path!r} is a pickle that is damaged or holds more than tensors; such files are not run. "
                f"Save the adapter as safetensors instead. ({type(error).__name__})"
            ) from error
        if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
            raise ValueError(f"{path!r} does not hold a dictionary of tensors, so it is no adapter.")
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, k): v for k, v in tensors.items()}
    return tensors


def upload(
    folder: str,
    repo_id: str,
    *,
    message: str,
    description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: list[str] | None = None,
) -> str:
    """Upload a folder of adapters to the Hub, its model card with further tags.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi, ModelCard

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    card_path = os.path.join(folder, "README.md")
    if tags and os.path.isfile(card_path):
        card = ModelCard.load(card_path)
        card.data["tags"] = sorted({*(card.data.get("tags") or []), *tags})
        card.save(card_path)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        commit_message=message,
        commit_description=description,
        revision=revision,
        create_pr=create_pr,
    )
    return str(commit)


def infer_device() -> str:
    """The best device of this machine: an accelerator if there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator() if hasattr(torch, "accelerator") else None
    if accelerator is not None:
        return accelerator.type
    return "cuda" if torch.cuda.is_available() else "cpu"


def warn_pickle() -> None:
    """Say that no pickles are written."""
    warnings.warn(
        "safe_serialization=False is ignored: adapters are written as safetensors only, which every version of the "
        "field's libraries reads.",
        PeftWarning,
        stacklevel=3,
    )


def accepts(function: Callable[..., Any], name: str) -> bool:
    """Whether a function takes an argument of this name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
