"""The examples with libraries that use this one: they run, and do what they say."""

from __future__ import annotations

import re

import pytest
import torch

import peft
from test_examples import load_example

MISSING = "`pip install 'peft[clients]'` installs the libraries that use this one; `make install` does"


def test_diffusers(tmp_path):
    pytest.importorskip("diffusers", reason=MISSING)
    images = load_example("diffusers_lora").main(["--out", str(tmp_path)])

    def same(one, other):
        return torch.allclose(images[one], images[other], atol=2e-5)

    assert same("unloaded", "plain") and same("disabled", "plain") and same("ink again", "ink")
    assert same("fused", "mixed") and same("unfused", "mixed") and same("swapped in", "oil, UNet only")
    for one, other in (("ink", "plain"), ("oil", "plain"), ("ink", "oil"), ("mixed", "ink"), ("oil, UNet only", "oil")):
        assert not same(one, other), (one, other)


@pytest.mark.example
def test_sentence_transformers(tmp_path):
    pytest.importorskip("sentence_transformers", reason=MISSING)
    before, after, reloaded = load_example("sentence_transformers_adapter").main(["--out", str(tmp_path)])
    assert torch.equal(after, reloaded)
    # A question's own answer stands out more from the others'.
    assert (after.softmax(1).diag() > before.softmax(1).diag()).all()
    files = {f.name for f in (tmp_path / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files


@pytest.mark.skipif(
    not hasattr(peft, "PrefixTuningConfig"), reason="TRL's DPO imports the configuration of prefix tuning"
)
def test_trl(tmp_path, capsys):
    pytest.importorskip("trl", reason=MISSING)
    fine_tuned, preferred = load_example("trl_sft_dpo").main(["--out", str(tmp_path), "--steps", "12"])
    assert type(fine_tuned) is type(preferred) is peft.PeftModelForCausalLM
    told = dict(re.findall(r"(SFT|DPO): (loss .*)", capsys.readouterr().out))
    for stage in ("SFT", "DPO"):
        first, last, *margin = map(float, re.findall(r"-?\d+\.\d+", told[stage]))
        assert last < first and all(m > 0.05 for m in margin)
        assert (tmp_path / stage.lower() / "adapter_model.safetensors").exists()
    assert len(margin) == 1
