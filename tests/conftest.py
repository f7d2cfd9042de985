"""Shared set-up of the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
from peft.kernels import modes

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _small_inputs_take_the_kernels(monkeypatch):
    """The models of the tests are so small that the hand-written kernels would leave them to the plain operations."""
    monkeypatch.setattr(modes, "FEW", 0)
