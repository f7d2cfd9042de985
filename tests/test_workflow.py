"""The Snakemake workflow, and training with several processes: each as a user starts it, on tiny data."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import peft
import recipe_data as data

ROOT = Path(__file__).resolve().parents[1]
SNAKEMAKE = os.environ.get("PEFT_SNAKEMAKE") or shutil.which("snakemake")
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(Path(peft.__file__).parents[1]),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


# What `accelerate config` would put into the environment for FSDP.
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    bert = data.save_bert(folder / "bert")
    reviews = data.write_csv(folder / "reviews.csv", data.reviews(64))
    path = folder / "recipe.yaml"
    lines = [
        "task: sequence-classification", f"model: {bert}", f"data: {{train: {reviews}, max_length: 32}}",
        "training: {epochs: 1, batch_size: 4}",
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.skipif(
    SNAKEMAKE is None,
    reason="PEFT_SNAKEMAKE names no snakemake, and none is installed: `make workflow` makes an environment for it",
)
def test_the_workflow_runs_methods_and_seeds_to_a_report(recipe, tmp_path):
    out = tmp_path / "out"
    settings = [
        f"recipe={recipe}",
        "methods=[lora,head]",
        "seeds=[0]",
        f"out={out}",
        f"peft={sys.executable} -m peft",
    ]
    command = [SNAKEMAKE, "--snakefile", ROOT / "workflows" / "Snakefile", "--cores", "2", "--config", *settings]
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads((out / "comparison.json").read_text())
    assert len(comparison["runs"]) == 2 and all(r["report"] for r in comparison["runs"])
    for method in ("lora", "head"):
        measured = json.loads((out / f"{method}-0" / "evaluation.json").read_text())
        saved = json.loads((out / f"{method}-0" / "metrics.json").read_text())
        assert measured == pytest.approx(saved["test"], abs=1e-5)
    assert (out / "report.html").exists()


def train_with_two_processes(recipe: Path, out: Path, *changes: str, **environment: str) -> str:
    """What `peft train` says, started twice."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, "-m", "peft", "train", str(recipe), "--out", str(out), *changes]
    environment = {**ENVIRONMENT, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_one_adapter(recipe, tmp_path, kind):
    said = train_with_two_processes(recipe, tmp_path / "run", **(FSDP if kind == "fsdp" else {}))
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    # 52 training rows, four for each of two processes.
    assert report["steps"] == 7 and said.count("parameters train") == 1
    assert set(load_file(tmp_path / "run" / "adapter_model.safetensors"))


@pytest.mark.slow
def test_two_processes_train_tasks_together(tmp_path):
    recipe = data.write_shared_recipe(tmp_path, data.save_bert(tmp_path / "bert"))
    out = tmp_path / "run"
    said = train_with_two_processes(recipe, out, "method=lora", "epochs=4", "batch_size=4", "save_every=null")
    reports = json.loads((out / "metrics.json").read_text())["tasks"]
    assert said.count("parameters train") == 1 and reports.keys() == {"mood", "names"}
    weights = {n: load_file(out / n / "adapter_model.safetensors") for n in reports}
    common = weights["mood"].keys() & weights["names"].keys()
    assert common and all(torch.equal(weights["mood"][k], weights["names"][k]) for k in common if "classifier" not in k)
    # Both tasks have been learnt, each with its own head.
    assert reports["mood"]["validation"]["accuracy"] >= 0.8
