"""Fields of configurations: a value of the wrong type is refused at construction, by the name of its field."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest

import toy
from peft import LoraConfig, PeftConfig
from peft.registry import get_method, registered_types

CONFIGS = [get_method(name).config_cls for name in registered_types()]
FIELDS = [
    (cls, f.name)
    for cls in CONFIGS
    for f in dataclasses.fields(cls)
    if f.init and f.name not in ("peft_type", "task_type")
]


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=lambda v: v if isinstance(v, str) else v.__name__)
def test_no_field_takes_just_anything(cls, name):
    with pytest.raises((ValueError, NotImplementedError), match=name):
        cls(**{name: object()})


WRONG = {
    "r": ["8", 8.5, None, True, [8], 0, -1, {}],
    "lora_alpha": ["16", None, True, math.nan, math.inf, [1]],
    "lora_dropout": ["0.1", None, True, 1.5, -0.1, 1, math.nan],
    "target_modules": [5, {"q_proj": 1}, ["q_proj", 5], b"q_proj", "(unclosed"],
    "exclude_modules": [5, [None], "[unclosed"],
    "fan_in_fan_out": ["yes", 1, "false"],
    "bias": ["some", None, True, 0],
    "use_rslora": ["no", 0],
    "modules_to_save": ["classifier", 5, [5]],
    "init_lora_weights": [5, None, "no such start", ["gaussian"]],
    "layers_to_transform": ["1", [1, "2"], 1.5, [True]],
    "layers_pattern": [5, [5]],
    "rank_pattern": [["q"], {"q": "8"}, {"q": True}, {"(": 4}, "q=8"],
    "alpha_pattern": [["q"], {"q": "8"}, {"q": math.nan}, {"q": None}, {"*": 4}],
    "inference_mode": ["no", 2],
    "base_model_name_or_path": [5, ["bert"]],
    "revision": [5],
    "auto_mapping": ["x", [1]],
    "task_type": [5, "SEQCLS", ["SEQ_CLS"]],
    "runtime_config": [5, "x"],
    "use_dora": ["yes"],
    "layer_replication": [[1, 2], [[1, 2, 3]], "x"],
    "trainable_token_indices": ["1", [1.5]],
}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in WRONG.items() for v in values], ids=lambda v: repr(v)
)
def test_wrong_values_of_lora(name, value):
    with pytest.raises((ValueError, NotImplementedError), match=name):
        LoraConfig(**{name: value})


def test_the_message_says_what_was_asked_what_was_found_and_the_mend():
    for values, message in (
        ({"r": "8"}, r"`r` should be an integer, got '8' \(str\)\. Write it without quotes\."),
        ({"modules_to_save": "head"}, r"a list of strings or None, got 'head' \(str\)\. Write \['head'\]\."),
        ({"use_rslora": 1}, r"`use_rslora` should be True or False, got 1 \(int\)"),
        ({"bias": "some"}, r"`bias` should be 'none', 'all' or 'lora_only', got 'some'"),
        ({"target_modules": "*proj"}, r"`target_modules` holds '\*proj', which is no valid regular expression"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraConfig(**values)


def test_values_that_mean_the_same_are_taken_and_can_be_written():
    config = LoraConfig(
        r=np.int64(4),
        lora_alpha=16.5,
        lora_dropout=0,
        target_modules=("q_proj", "v_proj"),
        modules_to_save={"head": 1}.keys(),
        layers_to_transform=range(2),
        rank_pattern=None,
    )
    assert type(config.r) is int and config.layers_to_transform == [0, 1] and config.modules_to_save == ["head"]
    written = json.loads(config.to_file())
    assert written["r"] == 4 and written["lora_alpha"] == 16.5 and written["layers_to_transform"] == [0, 1]


def test_null_in_a_file_stands_for_the_default_of_a_flag(tmp_path):
    values = {"peft_type": "LORA", "use_rslora": None, "fan_in_fan_out": None, "layers_pattern": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    config = PeftConfig.from_pretrained(tmp_path)
    assert config.use_rslora is False and config.fan_in_fan_out is False


@dataclasses.dataclass
class Unresolvable(toy.DiagScaleConfig):
    extra: NoSuchName = None  # type: ignore[name-defined] # noqa: F821


def test_annotations_that_only_type_checkers_know_are_passed_over():
    assert Unresolvable(extra=object()).extra is not None
