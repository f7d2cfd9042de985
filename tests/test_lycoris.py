"""Files of LyCORIS: outputs by the papers' formulas, and what cannot be read is refused with the model as it was.

The comparison with LyCORIS itself needs an environment with it, named by PEFT_LYCORIS_PYTHON (`make lycoris` makes one and runs
this file).
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from lycoris_worker import CASES
from lycoris_worker import Net as Written
from peft import PeftModel
from peft.lycoris import load_lycoris

LYCORIS = os.environ.get("PEFT_LYCORIS_PYTHON", "")

RANK, ALPHA = 2, 3.0


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"first_layer": nn.Linear(48, 64), "second": nn.Linear(64, 36)})

    def forward(self, x):
        return self.body["second"](self.body["first_layer"](x))


def loha(rows, columns):
    slots = {
        "hada_w1_a": torch.randn(rows, RANK),
        "hada_w1_b": torch.randn(RANK, columns),
        "hada_w2_a": torch.randn(rows, RANK),
        "hada_w2_b": torch.randn(RANK, columns),
    }
    w1a, w1b, w2a, w2b = slots.values()
    return slots, (w1a @ w1b) * (w2a @ w2b) * ALPHA / RANK  # Hyeon-Woo et al. 2021, arXiv 2108.06098, eq. 3


def lokr(rows, columns):
    small = {64: 8, 48: 6, 36: 6}  # the factors nearest to the square root
    m, n = small[rows], small[columns]
    slots = {
        "lokr_w1": torch.randn(m, n),
        "lokr_w2_a": torch.randn(rows // m, RANK),
        "lokr_w2_b": torch.randn(RANK, columns // n),
    }
    w1, w2a, w2b = slots.values()
    return slots, torch.kron(w1, w2a @ w2b) * ALPHA / RANK  # Yeh et al. 2023, arXiv 2309.14859, eq. 6


def written(folder, net, make, prefix="lycoris_"):
    """A file for both layers, and their weights with the change in them."""
    tensors, weights = {}, {}
    for name, layer in net.body.items():
        slots, change = make(*layer.weight.shape)
        weights[name] = layer.weight.detach() + change
        for slot, tensor in {**slots, "alpha": torch.tensor(ALPHA)}.items():
            tensors[f"{prefix}body_{name}.{slot}"] = tensor
    save_file(tensors, folder / "adapter.safetensors")
    return tensors, weights


@pytest.mark.parametrize("make", [loha, lokr])
@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_"])
def test_outputs_follow_the_formulas(make, prefix, tmp_path):
    net, x = Net(), torch.randn(5, 48)
    _, weights = written(tmp_path, net, make, prefix)
    expected = x
    for name, layer in net.body.items():
        expected = F.linear(expected, weights[name], layer.bias)
    model = load_lycoris(net, tmp_path / "adapter.safetensors", strict=True)
    torch.testing.assert_close(model(x), expected, atol=1e-3, rtol=1e-4)
    assert not any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        assert not torch.allclose(model(x), expected, atol=1e-2)


@pytest.mark.parametrize(
    "extra, message",
    [
        ({"lycoris_body_second.dora_scale": torch.ones(36, 1)}, "dora_scale"),
        ({"lycoris_elsewhere.hada_w1_a": torch.ones(36, 2)}, "does not have"),
        ({"lycoris_body_second.hada_w1_a": torch.ones(7, 2)}, "second"),
    ],
)
def test_what_cannot_be_read_is_refused_and_the_model_as_before(extra, message, tmp_path):
    net = Net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tensors, _ = written(tmp_path, net, loha)
    save_file(tensors | extra, tmp_path / "adapter.safetensors")
    with pytest.raises(ValueError, match=message):
        load_lycoris(net, tmp_path / "adapter.safetensors", strict=True)
    after = net.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_for_another_model_is_refused(tmp_path):
    written(tmp_path, Net(), lokr)
    with pytest.raises(ValueError, match="Is the base model the right one"):
        load_lycoris(nn.Sequential(nn.Linear(3, 3)), tmp_path / "adapter.safetensors")


def test_splits_of_their_own_and_lines_of_channels(tmp_path):
    """A factor of 4 gives w1 four rows, and of 4 and 8 channels the smaller part; a line's whole factor is in the plain order."""
    net = nn.Module()
    net.line, net.flat = nn.Conv1d(4, 16, 3), nn.Linear(8, 12)
    w1, w2, v1, v2 = torch.randn(4, 1), torch.randn(4, 4, 3), torch.randn(3, 2), torch.randn(4, 4)
    save_file(
        {
            "lycoris_line.lokr_w1": w1, "lycoris_line.lokr_w2": w2, "lycoris_line.alpha": torch.tensor(ALPHA),
            "lycoris_flat.lokr_w1": v1, "lycoris_flat.lokr_w2": v2, "lycoris_flat.alpha": torch.tensor(ALPHA),
        },
        tmp_path / "adapter.safetensors",
    )  # fmt: skip
    layers = load_lycoris(net, tmp_path / "adapter.safetensors", strict=True).base_model.model
    torch.testing.assert_close(layers.line.get_delta_weight("default"), torch.kron(w1[..., None], w2))
    torch.testing.assert_close(layers.flat.get_delta_weight("default"), torch.kron(v1, v2))


@pytest.fixture(scope="module")
def written_by_lycoris(tmp_path_factory):
    """A folder with files and outputs of LyCORIS."""
    folder = tmp_path_factory.mktemp("lycoris")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [LYCORIS, str(Path(__file__).with_name("lycoris_worker.py")), str(folder)], check=True, env=environment
    )
    return folder


@pytest.mark.skipif(
    not os.path.exists(LYCORIS),
    reason="PEFT_LYCORIS_PYTHON names no interpreter with LyCORIS: `make lycoris` makes one",
)
@pytest.mark.parametrize("name", CASES)
def test_outputs_are_those_of_lycoris(name, written_by_lycoris, tmp_path):
    def plain():
        net = Written()
        net.load_state_dict(load_file(written_by_lycoris / "base.safetensors"))
        return net

    outputs = load_file(written_by_lycoris / "outputs.safetensors")
    x = outputs["x"]
    torch.testing.assert_close(plain()(x), outputs["plain"])
    model = load_lycoris(plain(), written_by_lycoris / f"{name}.safetensors", strict=True)
    torch.testing.assert_close(model(x), outputs[name], atol=1e-5, rtol=1e-5)
    assert (outputs[name] - outputs["plain"]).abs().max() > 0.03
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(plain(), tmp_path, strict=True)
    torch.testing.assert_close(again(x), outputs[name], atol=1e-5, rtol=1e-5)
