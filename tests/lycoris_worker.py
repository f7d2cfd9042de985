"""Runs in an environment with LyCORIS: puts its modules on a small network, writes the files and notes the outputs."""

from __future__ import annotations

import os
import sys

import torch
from safetensors.torch import save_file
from torch import nn

RANKS = {"linear_dim": 2, "linear_alpha": 3.0, "conv_dim": 2, "conv_alpha": 5.0}
CASES = {
    "loha": {"algo": "loha", **RANKS},
    "loha-core": {"algo": "loha", **RANKS, "use_tucker": True},
    "loha-scalar": {"algo": "loha", **RANKS, "use_scalar": True},
    "loha-root": {"algo": "loha", **RANKS, "rs_lora": True},
    "lokr": {"algo": "lokr", **RANKS},
    "lokr-factor": {"algo": "lokr", **RANKS, "factor": 4},
    "lokr-both": {"algo": "lokr", **RANKS, "linear_dim": 1, "conv_dim": 1, "factor": 4, "decompose_both": True},
    "lokr-first": {"algo": "lokr", **RANKS, "linear_dim": 4, "conv_dim": 4, "factor": 16, "decompose_both": True},
    "lokr-core": {"algo": "lokr", **RANKS, "factor": 4, "use_tucker": True},
    "lokr-whole": {"algo": "lokr", **RANKS, "full_matrix": True},
}


class Net(nn.Module):
    """Linear layers, and convolutions over lines, planes and points."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 16, 3, padding=1)
        self.plane = nn.Conv2d(8, 24, 3, padding=1)
        self.point = nn.Conv2d(24, 12, 1)
        self.blocks = nn.ModuleList([nn.Linear(192, 64), nn.Linear(64, 36)])
        self.head = nn.Linear(36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.line(x)).reshape(len(x), 8, 4, 4)
        x = torch.tanh(self.point(torch.tanh(self.plane(x)))).flatten(1)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def main(folder: str) -> None:
    """Writes `base.safetensors` and, for each case, NAME.safetensors; `outputs.safetensors` has the input and all outputs."""
    from lycoris import LycorisNetwork, create_lycoris

    names = ["line", "plane", "point", "blocks.0", "blocks.1", "head"]
    LycorisNetwork.apply_preset({"enable_conv": True, "target_module": [], "target_name": names})
    torch.manual_seed(0)
    base, x = Net(), torch.randn(3, 4, 8)
    save_file(base.state_dict(), os.path.join(folder, "base.safetensors"))
    outputs = {"x": x, "plain": base(x).detach()}
    for name, options in CASES.items():
        net = Net()
        net.load_state_dict(base.state_dict())
        lycoris = create_lycoris(net, 1.0, **options)
        lycoris.apply_to()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in lycoris.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
            outputs[name] = net(x)
        lycoris.save_weights(os.path.join(folder, f"{name}.safetensors"), torch.float32, {})
    save_file(outputs, os.path.join(folder, "outputs.safetensors"))


if __name__ == "__main__":
    main(sys.argv[1])
