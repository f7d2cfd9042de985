"""Run by torchrun in tests: trains every method under DistributedDataParallel and writes losses and adapters to a folder."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from settings import ONE_EACH, ONE_EACH_IDS, randomise

STEPS = 3


def train(setting, base, rank: int = 0, world: int = 1):
    """Losses over the global batch of a few steps, and the model."""
    model = setting.model(base)
    randomise(model)
    model.train()
    wrapped = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs = base.inputs(rows=4)
    part = {k: v[rank * (4 // world) : (rank + 1) * (4 // world)] for k, v in inputs.items()}
    losses = []
    for _ in range(STEPS):
        loss = wrapped(**part, labels=part["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
            mean /= world
        losses.append(float(mean))
    return losses, model


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    result = {}
    for (setting, base), name in zip(ONE_EACH, ONE_EACH_IDS, strict=True):
        losses, model = train(setting, base, rank, world)
        result[name] = losses
        model.save_pretrained(folder / name, is_main_process=rank == 0)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
