"""P-tuning v2, which the peer does not have, written as prefix tuning, which it has; and the peer's prefix tuning as P-tuning v2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import peft
from peft.helpers import convert_adapter

from .cases import BASES, Case, virtual
from .conftest import Lab

CASES = [
    ("bert-classifier", "SEQ_CLS", "none"),
    ("bert-tagger", "TOKEN_CLS", "mlp"),
    ("bert-reader", "QUESTION_ANS", "none"),
    ("gpt2", "CAUSAL_LM", "mlp"),
    ("llama", "CAUSAL_LM", "none"),
    ("t5", "SEQ_2_SEQ_LM", "none"),
]


def saved_base(name: str, folder: Path) -> Any:
    """A base model with random weights, saved and read, of three layers where it has a decoder's cross-attention."""
    base = BASES[name]
    torch.manual_seed(0)
    odd = (
        {"num_decoder_layers": 3} if name == "t5" else {}
    )  # with an even number layers share places in the peer's files
    config = getattr(transformers, base.config)(**{**base.values, **odd})
    getattr(transformers, base.model)(config).save_pretrained(folder)
    return getattr(transformers, base.model).from_pretrained(folder)


def randomise(model: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize(("base", "task", "made"), CASES, ids=[c[0] for c in CASES])
def test_the_peer_reads_it_as_prefix_tuning(lab: Lab, base: str, task: str, made: str, tmp_path: Path) -> None:
    parts = {"encoder": False, "cross_attention": False} if base == "t5" else {}
    config = peft.PTuningV2Config(task, num_virtual_tokens=5, reparameterization=made, **parts)
    model = peft.get_peft_model(saved_base(base, tmp_path / "base"), config).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", as_prefix_tuning=True)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids.flip(1)
    peer = lab.workers["peer"]
    peer.send(
        op="read", model=BASES[base].model, base=str(tmp_path / "base"), adapter=str(tmp_path / "adapter"),
        inputs={name: tensor.tolist() for name, tensor in inputs.items()},
    )  # fmt: skip
    theirs = peer.receive()
    assert theirs["type"] == "PREFIX_TUNING"
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(theirs["output"]), model(**inputs)[0], atol=1e-5, rtol=1e-5)
        if "generated" in theirs:
            greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            assert theirs["generated"] == model.generate(**inputs, **greedy)[:, -5:].tolist()


@pytest.mark.parametrize("base", ["bert-classifier", "gpt2", "t5"])
def test_the_peers_prefix_tuning_becomes_p_tuning_v2(lab: Lab, base: str) -> None:
    task = next(task for name, task, _ in CASES if name == base)
    case: Case = virtual(f"prefix-{base}", "PrefixTuningConfig", base, task)
    folder = lab.saved(case, "peer")
    torch.manual_seed(0)
    plain = getattr(transformers, BASES[base].model)(getattr(transformers, BASES[base].config)(**BASES[base].values))
    model = peft.PeftModel.from_pretrained(plain.eval(), folder)
    ids = torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if base == "t5" else {})}
    convert_adapter(model, "default", "P_TUNING_V2", "v2")
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.set_adapter("v2")
        assert torch.equal(model(**inputs)[0], expected)
