"""Files of LyCORIS: outputs by the papers' formulas, and what cannot be read is refused with the model as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from peft.lycoris import load_lycoris

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
