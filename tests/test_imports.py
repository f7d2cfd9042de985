"""The house: imports go down only, no method knows another, and importing the package is cheap."""

from __future__ import annotations

import ast
import importlib
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

import peft

SOURCE = Path(peft.__file__).parent
# From the bottom up: a file may import from its own level and from those before it.
LEVELS = {
    "core/errors": 0,
    "core/checksum": 0,
    "core/files": 0,
    "core/architectures": 0,
    "kernels": 0,
    "registry": 1,
    "field_checks": 2,
    "config": 2,
    "core": 3,
    "tuners": 4,
    "model": 5,
    "task_models": 5,
    "mapping": 6,
    "auto": 6,
    "lycoris": 7,
    "functional": 7,
    "helpers": 7,
    "peft_model": 7,
    "mapping_func": 7,
    "mixed_model": 7,
    "optimizers": 7,
    "utils": 7,
    "recipes": 8,
    "cli": 9,
    "cli_look": 9,
    "__main__": 9,
    "": 9,
}
FILES = sorted(SOURCE.rglob("*.py"))


def level(module: str) -> int:
    parts = module.split("/")
    while parts and "/".join(parts) not in LEVELS:
        parts.pop()
    return LEVELS["/".join(parts)] if parts else LEVELS[""]


def imports_at_load(path: Path) -> set[str]:
    """Modules of the package that a file imports when it is loaded, as paths."""
    package = path.relative_to(SOURCE).with_suffix("").parts
    package = package[:-1]
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = [*base, *(node.module.split(".") if node.module else [])]
            if node.module is None:
                found.update("/".join([*target, a.name]) for a in node.names)
            else:
                found.add("/".join(target))
                for alias in node.names:
                    if (SOURCE.joinpath(*target) / f"{alias.name}.py").exists():
                        found.add("/".join([*target, alias.name]))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_down_only(path):
    own = str(path.relative_to(SOURCE).with_suffix("")).removesuffix("/__init__").removesuffix("__init__")
    for target in imports_at_load(path):
        # core/__init__ and the like stand for the package's front, not for a lower room.
        assert level(target) <= level(own), f"{own} imports {target}"


@pytest.mark.parametrize("path", [p for p in FILES if "core" in p.parts], ids=lambda p: p.name)
def test_the_engine_knows_no_method(path):
    assert not any(target.startswith("tuners") for target in imports_at_load(path))
    code = ast.unparse(ast.parse(path.read_text())).lower()
    for method in ("lora", "loha", "lokr", "ia3", "prefix_tuning", "bottleneck"):
        assert method not in code, f"{path.name} names {method}"


@pytest.mark.parametrize("path", [p for p in FILES if "tuners" in p.parts], ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_method_imports_another(path):
    own = path.relative_to(SOURCE).with_suffix("").parts[:2]
    for target in imports_at_load(path):
        parts = tuple(target.split("/"))
        assert parts[0] != "tuners" or parts[:2] == own, f"{path.name} imports {target}"


def test_every_file_says_what_it_is_for():
    for path in FILES:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_every_public_name_is_there_and_has_documentation():
    for name in peft.__all__:
        value = getattr(peft, name)
        assert value.__doc__ if callable(value) else value is not None, name
    assert set(peft.__all__) <= set(dir(peft))


def test_a_name_of_another_version_is_an_error_with_a_suggestion():
    with pytest.raises(AttributeError, match="did you mean 'LoraConfig'"):
        _ = peft.LoraConfg


PATHS = {
    "peft.optimizers": ["create_loraplus_optimizer", "create_lorafa_optimizer"],
    "peft.functional": ["inject_adapter_in_model", "set_adapter", "delete_adapter", "cast_adapter_dtype", "set_requires_grad"],
    "peft.helpers": ["disable_input_dtype_casting", "rescale_adapter_scale", "check_if_peft_model", "update_forward_signature"],
    "peft.utils": ["ModulesToSaveWrapper", "_get_submodules", "get_peft_model_state_dict", "PeftType", "infer_device"],
    "peft.utils.other": ["AuxiliaryTrainingWrapper", "fsdp_auto_wrap_policy", "ModulesToSaveWrapper"],
    "peft.utils.hotswap": ["hotswap_adapter", "hotswap_adapter_from_state_dict", "prepare_model_for_compiled_hotswap"],
    "peft.utils.merge_utils": ["ties", "dare_linear", "dare_ties", "magnitude_prune", "task_arithmetic", "prune"],
    "peft.utils.save_and_load": ["get_peft_model_state_dict"],
    "peft.utils.transformers_weight_conversion": ["build_peft_weight_mapping"],
    "peft.tuners.tuners_utils": ["BaseTunerLayer", "BaseTuner"],
    "peft.tuners.lora": ["LoraLayer", "LoraConfig", "LoraModel", "Linear", "Embedding"],
    "peft.tuners.lora.layer": ["LoraLayer", "Linear"],
    "peft.tuners.ia3.layer": ["IA3Layer"],
    "peft.tuners.loha.layer": ["LoHaLayer"],
    "peft.tuners.lokr.layer": ["LoKrLayer", "factorization"],
    "peft.tuners": ["LoraConfig", "IA3Config", "LoHaConfig", "LoKrConfig"],
    "peft.peft_model": ["PeftModel", "get_layer_status"],
    "peft.mapping": ["get_peft_model"],
    "peft.config": ["PeftConfig"],
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_paths_that_other_libraries_import(path):
    module = importlib.import_module(path)
    for name in PATHS[path]:
        assert hasattr(module, name), name


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, peft; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'accelerate')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_importing_the_package_costs_little_more_than_torch_and_transformers():
    def seconds(code):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    plain, ours = "import torch, transformers", "import torch, transformers, peft"
    ratios = [seconds(ours) / seconds(plain) for _ in range(5)]
    assert statistics.median(ratios) <= 1.15
