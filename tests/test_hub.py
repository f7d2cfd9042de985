"""The Hub, played by a folder: downloads, missing files, uploads."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

import tiny
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import check_if_peft_model
from settings import logits, randomise

BASE = tiny.LLAMA


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub with one repository, ``someone/adapter``; what was asked for is noted."""
    folder = tmp_path / "hub"
    asked = []

    def download(repo_id, filename, *, subfolder=None, revision=None, **rest):
        asked.append((repo_id, filename, subfolder, revision))
        path = folder / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise EntryNotFoundError(f"404: {path}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    model = get_peft_model(BASE.build(), LoraConfig(task_type="CAUSAL_LM")).eval()
    randomise(model)
    model.save_pretrained(folder / "someone" / "adapter")
    shutil.copytree(folder / "someone" / "adapter", folder / "someone" / "many" / "inner")
    return model, asked


def test_adapters_come_from_the_hub_by_id_revision_and_subfolder(hub):
    model, asked = hub
    loaded = PeftModel.from_pretrained(BASE.build(), "someone/adapter", revision="v2")
    assert logits(loaded, BASE).equal(logits(model, BASE))
    assert {a[3] for a in asked} == {"v2"}
    loaded.load_adapter("someone/many", "inner", subfolder="inner")
    loaded.set_adapter("inner")
    assert logits(loaded, BASE).equal(logits(model, BASE))
    assert PeftConfig.from_pretrained("someone/many", subfolder="inner").r == 8
    assert check_if_peft_model("someone/adapter") and not check_if_peft_model("someone/nothing")


def test_a_repository_without_an_adapter(hub):
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'someone/nothing'"):
        PeftModel.from_pretrained(BASE.build(), "someone/nothing")
    with pytest.raises(ValueError, match="Can't find 'adapter_config.json' at 'no such folder!'"):
        PeftConfig.from_pretrained("no such folder!")


def test_no_connection_is_not_taken_for_a_missing_file(monkeypatch):
    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(LocalEntryNotFoundError, match="no connection"):
        PeftModel.from_pretrained(BASE.build(), "someone/adapter")


def test_uploading(hub, monkeypatch, tmp_path):
    model, _ = hub
    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, **options):
            calls["create"] = (repo_id, options)
            return type("Repo", (), {"repo_id": f"me/{repo_id}"})

        def create_branch(self, repo_id, **options):
            calls["branch"] = (repo_id, options)

        def upload_folder(self, *, repo_id, folder_path, **options):
            shutil.copytree(folder_path, tmp_path / "uploaded")
            calls["upload"] = (repo_id, options)
            return "https://example.org/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model.peft_config["default"].base_model_name_or_path = "someone/base"
    address = model.push_to_hub("new", token="t", private=True, revision="dev", tags=["films"], commit_message="First")
    assert address == "https://example.org/commit"
    assert calls["create"] == ("new", {"private": True, "exist_ok": True})
    assert calls["branch"] == ("me/new", {"branch": "dev", "exist_ok": True})
    assert calls["upload"][0] == "me/new" and calls["upload"][1]["commit_message"] == "First"
    card = (Path(tmp_path) / "uploaded" / "README.md").read_text()
    assert "base_model: someone/base" in card and "- films" in card and "library_name: peft" in card
    assert (tmp_path / "uploaded" / "adapter_model.safetensors").exists()
