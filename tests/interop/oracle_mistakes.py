"""The oracle's wrong calls: each is made once, and what it raises is reported."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cases import CASES
from oracle_models import Perceptron, build_base, make_inputs
from oracle_names import describe_error

import peft


def mistakes(bases: str, folder: str) -> dict[str, Any]:
    """What each wrong call raises, or None."""
    case = next(case for case in CASES if case.name == "bert-classifier")

    def wrapped(**values: Any) -> Any:
        return peft.get_peft_model(build_base(case, bases), peft.LoraConfig(task_type="SEQ_CLS", **values))

    def stored(**values: Any) -> str:
        place = tempfile.mkdtemp(dir=folder)
        wrapped(**values).save_pretrained(place)
        return place

    def read(place: str, **kwargs: Any) -> None:
        peft.PeftModel.from_pretrained(build_base(case, bases), place, **kwargs)

    def edit(place: str, **values: Any) -> str:
        path = Path(place, "adapter_config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return place

    def without_weights() -> None:
        place = stored()
        os.remove(os.path.join(place, "adapter_model.safetensors"))
        read(place)

    def two_biases() -> None:
        wrapped(bias="all").add_adapter("second", peft.LoraConfig(task_type="SEQ_CLS", bias="all"))

    def mixed(rows: list[str], training: bool = False, merge: bool = False) -> None:
        model = wrapped()
        model.train(training)
        if merge:
            model.base_model.merge_adapter()
        model(**make_inputs(case)[0], adapter_names=rows)

    def empty(place: str) -> str:
        Path(place).mkdir(parents=True, exist_ok=True)
        return place

    calls: dict[str, Callable[[], Any]] = {
        "no target matches": lambda: wrapped(target_modules=["no_such_module"]),
        "no regex matches": lambda: wrapped(target_modules="no_such_module"),
        "target of a wrong kind": lambda: wrapped(target_modules=["attention"]),
        "all targets excluded": lambda: wrapped(target_modules=["query"], exclude_modules=["query"]),
        "rank zero": lambda: wrapped(r=0),
        "unknown bias": lambda: wrapped(bias="some"),
        "unknown start": lambda: wrapped(init_lora_weights="no such start"),
        "unknown task": lambda: peft.LoraConfig(task_type="NO_SUCH_TASK"),
        "layers with a regex": lambda: peft.LoraConfig(target_modules="query", layers_to_transform=[1]),
        "pattern with a regex": lambda: peft.LoraConfig(target_modules="query", layers_pattern="layer"),
        "pattern without layers": lambda: peft.LoraConfig(target_modules=["query"], layers_pattern="layer"),
        "no targets known": lambda: peft.get_peft_model(Perceptron(), peft.LoraConfig()),
        "second adapter with biases": two_biases,
        "activate the unknown": lambda: wrapped().set_adapter("unknown"),
        "delete the unknown": lambda: wrapped().delete_adapter("unknown"),
        "save the unknown": lambda: wrapped().save_pretrained(
            tempfile.mkdtemp(dir=folder), selected_adapters=["unknown"]
        ),
        "status of a plain model": lambda: peft.get_model_status(Perceptron()),
        "layer status of a plain model": lambda: peft.get_layer_status(Perceptron()),
        "load nothing": lambda: read(empty(os.path.join(folder, "empty"))),
        "load without weights": without_weights,
        "load an unknown method": lambda: read(edit(stored(), peft_type="NO_SUCH_METHOD")),
        "load another rank": lambda: read(edit(stored(), r=3)),
        "load a string for targets that match nothing": lambda: read(edit(stored(), target_modules="nothing")),
        "mixed batch: unknown adapter": lambda: mixed(["default", "unknown", "default"]),
        "mixed batch: wrong length": lambda: mixed(["default"]),
        "mixed batch: in training": lambda: mixed(["default"] * 3, training=True),
        "mixed batch: merged": lambda: mixed(["default"] * 3, merge=True),
        "save into a file": lambda: wrapped().save_pretrained(os.path.join(folder, "a file")),
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "a file").write_text("")
    report: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            call()
            report[name] = None
        except Exception as error:
            report[name] = describe_error(error)
    return report
