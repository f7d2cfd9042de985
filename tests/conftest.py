"""Shared set-up of the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The models of the tests are so small that the kernels would leave them to the plain operations; processes that tests start inherit it.
os.environ.setdefault("PEFT_KERNELS_FROM", "0")
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
