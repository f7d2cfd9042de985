"""Reading and writing adapter files: folders or the Hub, safetensors only, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import re
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from . import checksum
from .errors import PeftWarning

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
TRAINING_WEIGHTS_NAME = "adapter_training.safetensors"
"""What training goes on from, for adapters whose own file holds only a result of it. Nothing else reads it."""

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
    folder: str | os.PathLike, files: Mapping[str, bytes | Callable[[str], None]], without: Iterable[str] = ()
) -> None:
    """Write files so that a failure leaves the old ones whole: all to temporary names first, then all renamed.

    Args:
        folder: Where to; made if missing.
        files: Path of each file inside the folder, and its bytes or a function that writes them to the path that it is given.
        without: Paths of files that the new ones make wrong; removed if they are there.

    Raises:
        ValueError: ``folder`` is a file.
        OSError: It cannot be written. Nothing in it has changed.
    """
    folder = os.fspath(folder) or "."
    if os.path.isfile(folder):
        raise ValueError(f"Provided path ({folder!r}) should be a directory, not a file. Give a folder.")
    written: list[tuple[str, str]] = []
    made: list[str] = []
    try:
        for name, content in files.items():
            final = os.path.join(folder, name)
            parent, leaf = os.path.split(final)
            _make_folders(parent, made)
            if os.path.isdir(final):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), final)
            _sweep(parent, leaf)
            # In a folder of its own: writers make temporary files of their own beside what they write.
            temporary = os.path.join(tempfile.mkdtemp(prefix=f".{leaf}.", suffix=".tmp", dir=parent), leaf)
            written.append((temporary, final))
            with open(temporary, "wb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)  # what the user's umask makes of a new file
                if not callable(content):
                    file.write(content)
            if callable(content):
                content(temporary)
                os.chmod(temporary, mode)
            _sync(temporary)
        for temporary, final in written:
            os.replace(temporary, final)
        for name in without:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
    except BaseException as error:
        _remove_folders(written)
        for path in reversed(made):
            with contextlib.suppress(OSError):
                os.rmdir(path)
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror or str(error)
            raise OSError(
                error.errno, f"{reason}: nothing was saved, and what was there is as it was", folder
            ) from error
        raise
    _remove_folders(written)
    for path in {os.path.dirname(final) for _, final in written}:
        # The new names reach the disk too, where the system lets a folder be synchronised.
        with contextlib.suppress(OSError):
            _sync(path)


def _make_folders(folder: str, made: list[str]) -> None:
    """Make a folder and those above it, and note which are new; another process may be making the same ones."""
    if not folder or os.path.isdir(folder):
        return
    _make_folders(os.path.dirname(folder), made)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), folder) from None
    else:
        made.append(folder)


def _remove_folders(written: list[tuple[str, str]]) -> None:
    for temporary, _ in written:
        shutil.rmtree(os.path.dirname(temporary), ignore_errors=True)


def _sweep(folder: str, name: str) -> None:
    """Remove temporary folders that a killed process left behind; those of the last hour may be in use by another one."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(f".{name}.") and entry.name.endswith(".tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > 3600:
                        shutil.rmtree(entry.path, ignore_errors=True)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_writer(tensors: Mapping[str, torch.Tensor]) -> Callable[[str], None]:
    """A function that writes tensors as safetensors with a checksum; tensors that share memory are written each in full."""
    ready: dict[str, torch.Tensor] = {}
    seen: set[tuple[torch.device, int]] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        if place in seen:
            tensor = tensor.clone()
        seen.add(place)
        ready[key] = tensor.contiguous()

    def write(path: str) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file(ready, path, metadata=checksum.METADATA)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        checksum.seal(path, {key: tuple(tensor.shape) for key, tensor in ready.items()})

    return write


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
    subfolder = kwargs.pop("subfolder", None)
    kwargs.pop("use_safetensors", None)
    download, unknown = hub_kwargs(kwargs)
    if unknown:
        raise TypeError(f"load_peft_weights does not know the arguments {sorted(unknown)}.")
    target = device if device is not None else infer_device()

    def read(name: str) -> dict[str, torch.Tensor] | None:
        path = fetch(model_id, name, subfolder, **download)
        if path is None:
            return None
        return read_tensors(path, str(target))

    tensors = next((t for n in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (t := read(n)) is not None), None)
    if tensors is None:
        tensors = _read_foreign(fetch(model_id, CONFIG_NAME, subfolder, **download), read)
    if tensors is None:
        where = os.path.join(str(model_id), *([subfolder] if subfolder else []))
        raise ValueError(
            f"Can't find weights for the adapter in {where!r}: expected {SAFETENSORS_WEIGHTS_NAME!r} "
            f"(or {WEIGHTS_NAME!r} from old versions). Is it the folder or Hub id of an adapter?"
        )
    for pattern, replacement in (key_mapping or {}).items():
        tensors = {re.sub(pattern, replacement, k): v for k, v in tensors.items()}
    return tensors


def read_tensors(path: str, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Read one file of tensors.

    Args:
        path: The file: safetensors, or, by any other ending, a pickle of tensors alone.
        device: Where to put them.

    Raises:
        ValueError: It is damaged, or holds more than tensors.
    """
    return _read_safetensors(path, device) if path.endswith(".safetensors") else _read_pickle(path, device)


def load_training_weights(
    model_id: str | os.PathLike, device: str, subfolder: str | None = None, **download: Any
) -> dict[str, torch.Tensor]:
    """Read what training goes on from, if it was saved beside an adapter.

    Args:
        model_id: Folder, or Hub id.
        device: Where to put the tensors.
        subfolder: Folder inside it.
        **download: Arguments of ``huggingface_hub.hf_hub_download``.

    Raises:
        ValueError: The file is damaged.
    """
    path = fetch(model_id, TRAINING_WEIGHTS_NAME, subfolder, **download)
    return {} if path is None else _read_safetensors(path, device)


def _read_foreign(
    config: str | None, read: Callable[[str], dict[str, torch.Tensor] | None]
) -> dict[str, torch.Tensor] | None:
    """Tensors of a folder that another library wrote, or ``None`` where it is not known."""
    from ..registry import foreign_reader

    if config is None:
        return None
    with open(config, "rb") as file:
        try:
            values = json.load(file)
        except ValueError:  # no JSON: the configuration's own reader says so
            return None
    reader = foreign_reader(values) if isinstance(values, dict) else None
    return None if reader is None else reader.read_weights(read, values)


def _read_pickle(path: str, device: str) -> dict[str, torch.Tensor]:
    try:
        tensors = torch.load(path, map_location=torch.device(device), weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path!r} is a pickle that is damaged or holds more than tensors; such files are not run. "
            f"Save the adapter as safetensors instead. ({type(error).__name__})"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(v, torch.Tensor) for v in tensors.values()):
        raise ValueError(f"{path!r} does not hold a dictionary of tensors, so it is no adapter.")
    return tensors


def _read_safetensors(path: str, device: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=device)
        checksum.verify(path)
    except checksum.ChecksumError as error:
        raise ValueError(
            f"{path!r} is damaged: {error}. Copy or download it again. If a program changed it on purpose, that program has to "
            f"leave {checksum.KEY!r} out of the file's metadata."
        ) from error
    except SafetensorError as error:
        with open(path, "rb") as file:
            pointer = file.read(100).startswith(b"version https://git-lfs")
        mend = "It is a pointer of Git LFS: fetch the file itself with `git lfs pull`" if pointer else "Copy it again"
        raise ValueError(f"{path!r} is damaged or not a safetensors file: {error}. {mend}.") from error
    return {key: _aligned(tensor) for key, tensor in tensors.items()}


ALIGNMENT = 64
"""Bytes to which torch aligns what it allocates on a CPU."""


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that starts where torch's own would: products of small matrices round by how their operands are aligned."""
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


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
