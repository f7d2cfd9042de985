"""Optimisers for LoRA: which rate each parameter gets, and what LoRA-FA makes of B's gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tiny
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from settings import randomise


def bert(**options):
    config = {"target_modules": ["word_embeddings", "query"], "task_type": "SEQ_CLS", "r": 4, "lora_alpha": 8}
    return get_peft_model(tiny.BERT.build(), LoraConfig(**{**config, **options}))


def loss_of(model):
    return model(**tiny.BERT.inputs()).logits.sub(1).pow(2).sum()


def test_loraplus_gives_each_kind_of_parameter_its_rate_and_decay():
    model = bert(use_dora=True, bias="lora_only")
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-4, loraplus_lr_ratio=16, loraplus_weight_decay=0.1, betas=(0.8, 0.9)
    )
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["betas"] == (0.8, 0.9)
    of = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert set(of) == {id(p) for p in trainable.values()}
    for name, parameter in trainable.items():
        if "lora_embedding" in name:
            wanted = (1e-6, 0.1)
        elif "lora_B" in name or "magnitude" in name:
            wanted = (1.6e-3, 0.1)
        elif name.endswith("bias"):
            wanted = (1.6e-3, 0.0)
        else:
            wanted = (1e-4, 0.1)
        assert of[id(parameter)] == pytest.approx(wanted), name


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"loraplus_lr_ratio": -1}, {"loraplus_lr_embedding": 0}])
def test_loraplus_refuses_rates_that_are_not_positive(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` should be positive"):
        create_loraplus_optimizer(bert(), torch.optim.SGD, **{"lr": 1e-3, "loraplus_lr_ratio": 4, **wrong})


def test_loraplus_refuses_a_model_of_which_nothing_trains():
    with pytest.raises(ValueError, match="No parameter of the model trains"):
        create_loraplus_optimizer(nn.Linear(2, 2).requires_grad_(False), torch.optim.SGD, lr=1.0, loraplus_lr_ratio=2)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"layer.1.attention.self.query": 2}}],
    ids=["plain", "rs", "ranks"],
)
def test_lorafa_takes_the_step_of_b_that_changes_the_weight_most_like_its_gradient(options):
    """With plain steps in place of Adam's: s ΔB A is the gradient of the whole weight, projected on the rows of A."""
    model = bert(target_modules=["query"], **options)
    randomise(model)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2)
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
    assert len(layers) == 2 and not any(m.lora_A["default"].weight.requires_grad for m in layers)
    seen = {}
    optimizer._adam = lambda parameter, gradient, group: seen.update({id(parameter): gradient})
    weights = [m.base_layer.weight.requires_grad_() for m in layers]
    loss_of(model).backward()
    optimizer.step()
    for layer, weight in zip(layers, weights, strict=True):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        projected = weight.grad @ a.T @ torch.linalg.inv(a @ a.T) @ a
        torch.testing.assert_close(layer.scaling["default"] * seen[id(b)] @ a, projected, atol=1e-4, rtol=1e-3)


def test_lorafa_learns_resumes_and_leaves_a_alone(tmp_path):
    torch.manual_seed(0)
    model = bert(target_modules=["query", "value"])
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    losses = []
    for _ in range(4):
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_B" in n or "modules_to_save" in n}
    again = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-2, weight_decay=0.1)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt"))
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    results = []
    for each in (optimizer, again):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[name])
        loss_of(model).backward()
        each.step()
        each.zero_grad()
        results.append({n: p.detach().clone() for n, p in model.named_parameters()})
    assert all(torch.equal(results[0][n], results[1][n]) for n in values)


def test_lorafa_refuses_what_contradicts_the_adapters():
    with pytest.raises(ValueError, match="use_rslora=True is given, but the configuration of 'default' says otherwise"):
        create_lorafa_optimizer(bert(), r=4, lora_alpha=8, lr=1e-2, use_rslora=True)
    grouped = get_peft_model(tiny.GROUPED.build(), LoraConfig(target_modules=["line.conv"]))
    with pytest.raises(
        ValueError, match="LoRA-FA is for layers whose A reads what the weight reads, but at .*line.conv'"
    ):
        create_lorafa_optimizer(grouped, r=8, lora_alpha=8, lr=1e-2)
    assert next(p for n, p in grouped.named_parameters() if "lora_A" in n).requires_grad
