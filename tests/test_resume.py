"""Runs that are killed again and again, at any moment, end with the weights of a run that was not: for every method."""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time

import pytest
import torch
from safetensors.torch import load_file

import peft
import recipe_data as data
from peft.recipes.methods import methods

# What is made by a network while it trains has more to keep than what is saved at the end; these are the ones worth testing each time.
OFTEN = {
    "prefix-tuning with a projection": {"name": "prefix-tuning", "prefix_projection": True},
    "p-tuning": {"name": "p-tuning"},
}
CASES = OFTEN | {
    name: {"name": name}
    for name in methods()
    if name.islower() and name not in (*OFTEN, "trainable-tokens") and "_" not in name
}
CASES["p-tuning-v2 with a network"] = {"name": "p-tuning-v2", "reparameterization": "mlp"}
SLOW = [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in CASES]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resumed")
    bert = data.save_bert(folder / "bert")
    reviews = data.write_csv(folder / "reviews.csv", data.reviews(60))
    return {
        "task": "sequence-classification", "model": str(bert), "data": {"train": str(reviews), "max_length": 32},
        "training": {"epochs": 2, "save_every": 2, "learning_rate": 0.01},
    }  # fmt: skip


# Forked from a process that has imported everything and computed nothing: one whose threads have worked cannot be forked safely.
SERVER = multiprocessing.get_context("forkserver") if "forkserver" in multiprocessing.get_all_start_methods() else None
if SERVER is not None:
    SERVER.set_forkserver_preload(["peft.recipes.training", "transformers.trainer"])


def go_on(recipe: dict) -> None:
    """Go on with a run, in a process of its own."""
    torch.manual_seed(random.SystemRandom().randrange(2**31))  # what was drawn before a run must not count
    peft.finetune(recipe, resume=True, tell=None)


def run_and_kill(recipe: dict, after: float | None) -> bool:
    """Go on with a run in a process of its own, killed after some seconds.

    Returns:
        Whether it came to its end.
    """
    child = SERVER.Process(target=go_on, args=(recipe,))
    child.start()
    child.join(after)
    if after is not None:
        child.kill()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL), "a run that went on failed; what it said stands above"
    return child.exitcode == 0


@pytest.mark.skipif(SERVER is None, reason="kills processes that it forks")
@pytest.mark.parametrize("name", SLOW)
def test_killed_at_any_time_it_ends_with_the_same_weights(recipe, tmp_path, name):
    recipe = recipe | {"method": CASES[name]}
    start = time.perf_counter()
    whole = peft.finetune(recipe | {"out": str(tmp_path / "whole")}, tell=None)
    took = time.perf_counter() - start
    killed = recipe | {"out": str(tmp_path / "killed")}
    for _ in range(4):
        if run_and_kill(killed, random.uniform(0.2, 1.0) * took):
            break
    else:
        assert run_and_kill(killed, None)
    one, other = (load_file(next((tmp_path / n).glob("*model.safetensors"))) for n in ("whole", "killed"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    report = json.loads((tmp_path / "killed" / "metrics.json").read_text())
    assert report["test"] == whole.report["test"] and report["best"] == whole.report["best"]
    assert not (tmp_path / "killed" / "checkpoints").exists()
