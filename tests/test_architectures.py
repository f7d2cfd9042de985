"""The table of default targets: every entry is held against a model of its type, built by transformers."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, BertConfig, EncoderDecoderConfig, GPT2Config, LlavaConfig
from transformers.pytorch_utils import Conv1D

from peft.core.architectures import DEFAULTS, ROLES, closest_model_types, default_targets, model_types_of
from tiny_architectures import FROM_WHOLE, build_on_meta

TESTED_TRANSFORMERS = Version("5.23")

KINDS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)

# Types that transformers cannot build: their code comes with the checkpoint.
REMOTE_CODE = {
    "RefinedWeb": "the first name of falcon, before transformers took it in",
    "RefinedWebModel": "the first name of falcon, before transformers took it in",
    "btlm": "never taken into transformers",
    "chatglm": "its successors were taken in as glm, under other names of layers",
    "rwkv7": "transformers has an earlier version, rwkv",
}

# Types that transformers builds with the help of another package.
NEEDS = {"gemma3n": "timm"}

# Entries kept for configurations in the field although some of their names match nothing in a default model.
IDLE = {
    ("blip-2", "attention"): {"q", "v"},  # where its language model is a T5; by default it is an OPT
    ("mixtral", "key_value_feedforward"): {"w2"},  # transformers 5 stacks the experts into one parameter
    ("mixtral", "feedforward"): {"w2"},
}


def matches(targets: list[str] | str, name: str) -> bool:
    """The rule that targets follow everywhere: a regular expression for all of the name, or its end at a dot."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith("." + target) for target in targets)


def matched(targets: list[str] | str, model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if matches(targets, name)}


@pytest.mark.parametrize("model_type", sorted(set(DEFAULTS) - set(REMOTE_CODE)))
def test_defaults_match_layers_of_a_model(model_type):
    known = model_type in CONFIG_MAPPING or model_type in FROM_WHOLE
    if not known and Version(version("transformers")) < TESTED_TRANSFORMERS:
        pytest.skip(f"transformers {version('transformers')} has no models of type {model_type} yet")
    if model_type in NEEDS:
        pytest.importorskip(NEEDS[model_type], reason=f"models of type {model_type} need {NEEDS[model_type]}")
    model = build_on_meta(model_type)
    assert model_types_of(model.config)[0] == model_type
    for role in ROLES:
        targets = default_targets(model_type, role)
        if not targets:
            continue
        found = matched(targets, model)
        idle = IDLE.get((model_type, role), set())
        assert found or idle == set(targets), f"{role} {targets} matches nothing"
        unfit = {name: type(module).__name__ for name, module in found.items() if not isinstance(module, KINDS)}
        assert not unfit, f"{role} {targets} matches what is no layer"
        if isinstance(targets, list):
            assert {target for target in targets if not matched([target], model)} == idle, "names that match nothing"


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_feedforward_is_a_part_of_what_is_rescaled(model_type):
    rescaled, feedforward = (default_targets(model_type, role) for role in ROLES[1:])
    assert (rescaled is None) == (feedforward is None)
    if isinstance(rescaled, list) and isinstance(feedforward, list):
        assert set(feedforward) <= set(rescaled)
    if isinstance(rescaled, list):
        assert rescaled


@pytest.mark.parametrize("model_type", sorted(REMOTE_CODE))
def test_types_with_remote_code_are_not_in_transformers(model_type):
    assert model_type in DEFAULTS
    assert model_type not in CONFIG_MAPPING, "transformers builds it now: hold its entry against a model"


def test_exceptions_are_about_entries():
    assert {model_type for model_type, _ in IDLE} | set(NEEDS) | set(FROM_WHOLE) <= set(DEFAULTS)


def test_coverage():
    assert len(DEFAULTS) >= 200
    known = Counter(role for role in ROLES for t in DEFAULTS if default_targets(t, role) is not None)
    assert known["attention"] == len(DEFAULTS)
    assert known["key_value_feedforward"] == known["feedforward"] >= 190
    families = (
        "bert gpt2 llama t5 bart mistral qwen3 gemma3 deberta-v2 modernbert vit clip whisper wav2vec2 llava mamba"
    )
    assert set(families.split()) <= set(DEFAULTS)


def test_unknown_types_and_roles():
    assert default_targets("no_such_type", "attention") is None
    with pytest.raises(ValueError, match="attention, key_value_feedforward, feedforward"):
        default_targets("bert", "queries")


def test_a_caller_cannot_change_the_table():
    default_targets("bert", "attention").append("key")
    assert default_targets("bert", "attention") == ["query", "value"]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("xlm_roberta", "xlm-roberta"),
        ("llama5", "llama"),
        ("Qwen3-Omni", "qwen3"),
        ("deberta_v2", "deberta-v2"),
        ("mistrel", "mistral"),
    ],
)
def test_closest_model_types(asked, expected):
    close = closest_model_types(asked)
    assert close[0] == expected
    assert len(close) <= 3


@pytest.mark.parametrize("asked", ["", "zzzzqqqq"])
def test_nothing_is_close(asked):
    assert closest_model_types(asked) == []


def test_model_types_of_composites():
    assert model_types_of(BertConfig()) == ["bert"]
    assert model_types_of(LlavaConfig()) == ["llava", "llama"]
    assert model_types_of({"model_type": "unheard", "text_config": {"model_type": "qwen2"}}) == ["unheard", "qwen2"]
    # Names of the encoder alone would leave the decoder as it is, without a word.
    two = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(), GPT2Config())
    assert model_types_of(two) == ["encoder-decoder"]
    one = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(), BertConfig())
    assert model_types_of(one) == ["encoder-decoder", "bert"]
    for nothing in (None, {}, object(), {"model_type": None}):
        assert model_types_of(nothing) == []


PEER_TABLES = """
import json, peft.utils as u
tables = {n: getattr(u, n) for n in dir(u) if n.startswith("TRANSFORMERS_MODELS_TO_") and n.endswith("MODULES_MAPPING")}
print(json.dumps({n: {k: v if isinstance(v, str) else sorted(v) for k, v in t.items()} for n, t in tables.items()}))
"""


@pytest.fixture(scope="module")
def peer_tables() -> dict[str, dict[str, list[str] | str]]:
    """The peer's tables of default modules, by their names."""
    default = Path(__file__).parents[1] / ".venv-peer" / "bin" / "python"
    python = os.environ.get("PEFT_PEER_PYTHON", str(default))
    if not Path(python).exists():
        pytest.skip("the peer is not installed: run `make peer`, or name its Python in PEFT_PEER_PYTHON")
    # Isolated: nothing of this library may be found in the place of the peer's.
    run = subprocess.run([python, "-I", "-c", PEER_TABLES], capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


@pytest.mark.interop
def test_every_type_of_the_peer_is_covered(peer_tables):
    assert {model_type for table in peer_tables.values() for model_type in table} <= set(DEFAULTS)


@pytest.mark.interop
@pytest.mark.parametrize(
    ("role", "methods"),
    [
        ("attention", ["LORA", "LOHA", "LOKR"]),
        ("key_value_feedforward", ["IA3"]),
        ("feedforward", ["IA3_FEEDFORWARD"]),
    ],
)
def test_defaults_equal_the_peers(peer_tables, role, methods):
    for method in methods:
        suffix = "MODULES_MAPPING" if method.endswith("FEEDFORWARD") else "TARGET_MODULES_MAPPING"
        table = peer_tables[f"TRANSFORMERS_MODELS_TO_{method}_{suffix}"]
        ours = {model_type: default_targets(model_type, role) for model_type in table}
        assert table
        assert {t: v if isinstance(v, str) else set(v) for t, v in ours.items()} == {
            t: v if isinstance(v, str) else set(v) for t, v in table.items()
        }
