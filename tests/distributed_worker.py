"""Run by torchrun in tests: trains adapters in several processes, and writes losses and adapters to a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import tiny
from peft import LoraConfig, get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from peft.utils.other import fsdp_auto_wrap_policy
from settings import ONE_EACH, ONE_EACH_IDS, SETTINGS, randomise

STEPS = 3
SHARED_SLOTS = ("bottleneck_phm_shared_rule",)
# In the blocks, and beside them: what the outermost unit holds stays gathered after a forward pass.
SHARDED = dataclasses.replace(
    SETTINGS[0],
    config=lambda **kw: LoraConfig(
        **{**kw, "target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["norm"]}
    ),
)


def data_parallel(model):
    return DistributedDataParallel(model)


def shard(model):
    """Each block, then the rest, as `fully_shard` is meant to be used; but a tensor that layers share ties them together."""
    if any(shared in n for n, _ in model.named_parameters() for shared in SHARED_SLOTS):
        return fully_shard(model)
    return shard_blocks(model)


def shard_blocks(model):
    base = model.get_base_model()
    for block in [m for m in base.modules() if type(m).__name__ in base._no_split_modules]:
        fully_shard(block)
    return fully_shard(model)


def train(setting, base, rank: int = 0, world: int = 1, wrap=lambda model: model):
    """Losses over the global batch of a few steps, and the model."""
    model = setting.model(base)
    randomise(model)
    model.train()
    wrapped = wrap(model)
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


def all_sharded(model) -> bool:
    return all(isinstance(p, DTensor) for p in model.parameters())


def refusal(call) -> str:
    """What a call that has to fail says."""
    try:
        call()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def sharded(folder: Path, rank: int, world: int) -> dict:
    """Training, saving, loading and what is refused under `fully_shard`."""
    losses, model = train(SHARDED, tiny.LLAMA, rank, world, shard)
    told = {"losses": losses, "sharded": all_sharded(model)}
    model.save_pretrained(folder / "sharded", is_main_process=rank == 0)
    dist.barrier()

    def outputs():
        with torch.no_grad():
            return model(**tiny.LLAMA.inputs()).logits

    expected = outputs()
    zeros = {k: torch.zeros_like(v) for k, v in get_peft_model_state_dict(model).items()}
    set_peft_model_state_dict(model, zeros)
    told["other weights, other outputs"] = not torch.allclose(outputs(), expected)
    result = set_peft_model_state_dict(model, load_peft_weights(folder / "sharded", device="cpu"))
    told["missing"], told["unexpected"] = result.missing_keys, result.unexpected_keys
    told["still sharded"] = all_sharded(model)
    told["same outputs after loading"] = torch.equal(outputs(), expected)
    model.load_adapter(folder / "sharded", "frozen")
    model.set_adapter("frozen", inference_mode=True)
    told["a second adapter for inference"] = float((outputs() - expected).abs().max())
    told["merge"] = refusal(model.merge_adapter)
    told["add"] = refusal(lambda: model.add_adapter("new", LoraConfig(target_modules=["q_proj"])))
    local = {k: v.to_local() if isinstance(v, DTensor) else v for k, v in model.state_dict().items()}
    told["partial"] = refusal(lambda: model.save_pretrained(folder / "partial", state_dict=local))
    return told


def fully_sharded_data_parallel(rank: int, world: int) -> dict:
    """Training, and what is refused, under the older FSDP. It cannot gather on CPUs, whatever the model, so saving is not tried."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    told = {}
    for whole_blocks in (True, False):

        def wrap(model, whole_blocks=whole_blocks):
            policy = ModuleWrapPolicy({type(b) for b in model.get_base_model().model.layers})
            if not whole_blocks:
                policy = fsdp_auto_wrap_policy(model)
            return FullyShardedDataParallel(
                model, auto_wrap_policy=policy, use_orig_params=whole_blocks, device_id=torch.device("cpu")
            )

        losses, model = train(SETTINGS[0], tiny.LLAMA, rank, world, wrap)
        told["original parameters" if whole_blocks else "flat parameters"] = {
            "losses": losses,
            "save": refusal(lambda model=model: model.save_pretrained("nowhere")),
            "merge": refusal(model.merge_adapter),
            "add": refusal(lambda model=model: model.add_adapter("new", LoraConfig(target_modules=["q_proj"]))),
        }
    return told


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    result = {}
    for (setting, base), name in zip(ONE_EACH, ONE_EACH_IDS, strict=True):
        losses, model = train(setting, base, rank, world, data_parallel)
        result[name] = losses
        model.save_pretrained(folder / name, is_main_process=rank == 0)
        result[f"{name}, sharded"], model = train(setting, base, rank, world, shard)
        model.save_pretrained(folder / f"{name}, sharded", is_main_process=rank == 0)
    result["fully_shard"] = sharded(folder, rank, world)
    compacter = next((s, b) for s, b in ONE_EACH if s.name == "compacter")
    result["shared"] = refusal(lambda: train(*compacter, rank, world, shard_blocks))
    result["FSDP"] = fully_sharded_data_parallel(rank, world)
    if rank == 0:
        (folder / "losses.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main(Path(sys.argv[1]))
