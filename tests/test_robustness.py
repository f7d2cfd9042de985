"""Damaged files, hostile input, full disks and killed processes: one clear error, and everything as it was."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from peft.core import checksum
from settings import logits, randomise

BASE = tiny.LLAMA
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def small_adapter(folder, sealed=True):
    """A model with a very small adapter, saved; without a checksum it is as other writers leave it."""
    config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=["q_proj"], layers_to_transform=[0])
    model = get_peft_model(BASE.build(), config).eval()
    randomise(model)
    model.save_pretrained(folder)
    if not sealed:
        save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"format": "pt"})
    return model


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# -- the checksum ----------------------------------------------------------------------------------------------------


def test_equal_adapters_are_equal_files_and_other_readers_pass_over_the_checksum(tmp_path):
    model = small_adapter(tmp_path / "a")
    for _ in range(4):
        model.save_pretrained(tmp_path / "b")
        assert content(tmp_path / "a") == content(tmp_path / "b")
    with safe_open(tmp_path / "a" / WEIGHTS, "pt") as file:
        metadata = file.metadata()
        assert set(file.keys()) == set(load_peft_weights(tmp_path / "a"))
    assert metadata["format"] == "pt" and metadata[checksum.KEY].startswith(checksum.PREFIX)
    assert metadata[checksum.KEY] != checksum.METADATA[checksum.KEY]


def test_a_copy_by_another_writer_keeps_or_drops_the_checksum(tmp_path):
    small_adapter(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    for kept in [metadata] * 4 + [{"format": "pt"}, None]:  # several times: the order of metadata is random
        save_file(tensors, tmp_path / WEIGHTS, metadata=kept)
        assert all(torch.equal(tensors[k], v) for k, v in load_peft_weights(tmp_path).items())
    save_file({k: v * 2 for k, v in tensors.items()}, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(
        ValueError, match=r"damaged: its content does not match its checksum.*leave 'peft_checksum' out"
    ):
        load_peft_weights(tmp_path)


def test_each_flipped_bit_of_the_weights_is_noticed(tmp_path):
    small_adapter(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    for position in range(start, len(data)):
        (tmp_path / WEIGHTS).write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match="does not match its checksum"):
            load_peft_weights(tmp_path)


# -- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_truncated_at_every_length(tmp_path, sealed):
    small_adapter(tmp_path, sealed)
    data = (tmp_path / WEIGHTS).read_bytes()
    for length in range(len(data)):
        (tmp_path / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged or not a safetensors file"):
            load_peft_weights(tmp_path)


def mutations(data, count, seed):
    """Copies with one to eight bytes changed; half of them in the first part, where names, types and places stand."""
    rng = random.Random(seed)
    header = 8 + int.from_bytes(data[:8], "little")
    for i in range(count):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
            position = rng.randrange(header if i % 2 else len(data))
            changed[position] ^= rng.randrange(1, 256) if rng.random() < 0.5 else 1 << rng.randrange(8)
        if changed != data:
            yield bytes(changed)


def meaning(data):
    """What a file says to any reader: names, types, shapes and places of its tensors, and their bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    return {k: v for k, v in header.items() if k != "__metadata__"}, data[end:]


COUNTS = [300, pytest.param(10_000, marks=pytest.mark.slow)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("sealed", [True, False], ids=["with-checksum", "without"])
def test_changed_bytes_in_the_weights(tmp_path, count, sealed):
    model = small_adapter(tmp_path, sealed)
    before, names = logits(model, BASE), [n for n, _ in model.named_parameters()]
    data = (tmp_path / WEIGHTS).read_bytes()
    tally = {"tried": 0, "refused": 0, "warned": 0, "same": 0, "other weights": 0, "silent": 0}
    for changed in mutations(data, count, seed=count):
        (tmp_path / WEIGHTS).write_bytes(changed)
        tally["tried"] += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.load_adapter(tmp_path, "other")
            except ValueError as error:  # anything else is a crash and fails the test
                assert "adapter" in str(error) or "damaged" in str(error)
                tally["refused"] += 1
                assert list(model.peft_config) == ["default"]
                continue
        model.delete_adapter("other")
        (tensors, values), (old_tensors, old_values) = meaning(changed), meaning(data)
        if caught:
            tally["warned"] += 1
        elif tensors != old_tensors:
            tally["silent"] += 1
        elif values == old_values:
            tally["same"] += 1  # a blank became another blank, or a comment changed: the same file to every reader
        else:
            tally["other weights"] += 1  # numbers are numbers: without a checksum nobody can tell
    print(tally)
    assert tally["silent"] == 0 and tally["refused"] > count / 3
    assert tally["other weights"] == 0 or not sealed
    assert torch.equal(logits(model, BASE), before) and names == [n for n, _ in model.named_parameters()]


def _as_told(read, told):
    """Whether a field holds what the file says: sets in any order, the method's name in any case."""
    return read == told or (isinstance(told, list) and read == sorted(told)) or read == str(told).upper()


@pytest.mark.parametrize("count", COUNTS)
def test_changed_bytes_in_the_configuration(tmp_path, count):
    model = small_adapter(tmp_path)
    before = logits(model, BASE)
    data = (tmp_path / CONFIG).read_bytes()
    tally = {"tried": 0, "refused": 0, "warned": 0, "same": 0, "other values": 0, "silent": 0}
    wanted = json.loads(data)
    for changed in mutations(len(data).to_bytes(8, "little") + data, count, seed=count):
        (tmp_path / CONFIG).write_bytes(changed[8:])
        tally["tried"] += 1
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                model.load_adapter(tmp_path, "other")
            except (ValueError, NotImplementedError):  # anything else is a crash and fails the test
                tally["refused"] += 1
                assert list(model.peft_config) == ["default"]
                continue
        read = model.peft_config["other"].to_json_dict()
        model.delete_adapter("other")
        told = json.loads(changed[8:])
        if caught:
            tally["warned"] += 1
        elif told == wanted:
            tally["same"] += 1  # a blank became another blank
        elif all(_as_told(read[k], v) for k, v in told.items() if k != "inference_mode"):
            tally["other values"] += 1  # another valid value of a field, as anybody may write it, is taken as it stands
        else:
            tally["silent"] += 1
    print(tally)
    assert tally["silent"] == 0
    assert tally["refused"] > count / 3 and torch.equal(logits(model, BASE), before)


def test_integers_in_place_of_weights(tmp_path):
    small_adapter(tmp_path)
    save_file({k: v.to(torch.int32) for k, v in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    plain = BASE.build()
    with pytest.raises(ValueError, match=r"types that are no weights \(2\).*the file has int32, the model float32"):
        PeftModel.from_pretrained(plain, tmp_path)
    assert not hasattr(plain, "peft_config")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged or not a safetensors file"),
        (b"PK\x03\x04" + bytes(500), "damaged or not a safetensors file"),
        (b"\x80\x02}q\x00." + bytes(200), "damaged or not a safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
    ],
    ids=["empty", "zip", "pickle", "lfs-pointer"],
)
def test_not_safetensors(tmp_path, data, message):
    small_adapter(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_peft_weights(tmp_path)


def spoil(folder, **changes):
    """Change the configuration, and take one tensor away."""
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **changes}))
    tensors = load_file(folder / WEIGHTS)
    del tensors[next(k for k in tensors if "lora" in k)]
    save_file(tensors, folder / WEIGHTS)


def state(model):
    return {
        "names": {n: id(p) for n, p in model.named_parameters()},
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "flags": {n: p.requires_grad for n, p in model.named_parameters()},
        "modules": {n: id(m) for n, m in model.named_modules()},
        "config": model.config.to_dict(),
        "adapters": sorted(getattr(model, "peft_config", {})),
        "labels": getattr(model, "num_labels", None),
    }


def assert_same(model, before):
    after = state(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert all(torch.equal(values[n], v) for n, v in old.items())


def test_a_load_that_fails_leaves_layers_heads_flags_and_configurations(tmp_path):
    BERT = tiny.BERT
    get_peft_model(BERT.build(num_labels=5), LoraConfig(task_type="SEQ_CLS", bias="lora_only")).save_pretrained(
        tmp_path
    )
    spoil(tmp_path, target_modules=["query", "value", "dense"])
    plain = BERT.build()
    plain.classifier.weight.requires_grad_(False)
    before = state(plain)
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(plain, tmp_path, strict=True, is_trainable=True)
    assert_same(plain, before)
    model = get_peft_model(BERT.build(num_labels=5), LoraConfig(task_type="SEQ_CLS", target_modules=["key"]))
    before = state(model)
    for name in ("other", "default"):  # a new adapter, and new weights for one that is there
        with pytest.raises(ValueError, match="lacks"):
            model.load_adapter(tmp_path, name, strict=True, is_trainable=True)
        assert_same(model, dict(before))


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["PEFT_TEST_BOMB"],)


def configured(**changes):
    return lambda folder: (folder / CONFIG).write_text(
        json.dumps({**json.loads((folder / CONFIG).read_text()), **changes})
    )


def retyped(change):
    return lambda folder: save_file({k: change(v) for k, v in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)


def pickled(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))


BROKEN = {
    "cut short": lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]),
    "empty": lambda folder: (folder / WEIGHTS).write_bytes(b""),
    "text": lambda folder: (folder / WEIGHTS).write_text("not tensors"),
    "integers": retyped(lambda tensor: tensor.to(torch.int64)),
    "other shapes": retyped(lambda tensor: tensor[:1].contiguous()),
    "code in a pickle": pickled,
    "no weights": lambda folder: (folder / WEIGHTS).unlink(),
    "no configuration": lambda folder: (folder / CONFIG).unlink(),
    "no JSON": lambda folder: (folder / CONFIG).write_text("{"),
    "a list": lambda folder: (folder / CONFIG).write_text("[]"),
    "unknown method": configured(peft_type="LORRA"),
    "method that is not built": configured(peft_type="XLORA"),
    "rank 0": configured(r=0),
    "rank in quotes": configured(r="8"),
    "dropout 1.5": configured(lora_dropout=1.5),
    "targets that are not there": configured(target_modules=["nothing"]),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_gives_one_error_and_changes_nothing(fault, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_TEST_BOMB", str(tmp_path / "exploded"))
    folder = tmp_path / "adapter"
    model, plain = small_adapter(folder), BASE.build()
    configuration = (folder / CONFIG).read_bytes()
    BROKEN[fault](folder)
    files = content(folder)
    calls = [
        (plain, lambda: PeftModel.from_pretrained(plain, folder)),
        (model, lambda: model.load_adapter(folder, "other")),
    ]
    if files.get(CONFIG) == configuration:  # an adapter that is there takes weights alone
        calls.append((model, lambda: model.load_adapter(folder, "default")))
    for target, call in calls:
        before = state(target)
        with pytest.raises((ValueError, NotImplementedError)) as caught, warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call()
        assert str(caught.value).strip() and caught.type is not UnicodeDecodeError
        assert_same(target, before)
    assert content(folder) == files and not (tmp_path / "exploded").exists()


def test_a_load_that_fails_gives_a_replicated_model_its_own_layers_back(tmp_path):
    options = {"task_type": "CAUSAL_LM", "layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}
    get_peft_model(BASE.build(), LoraConfig(**options)).save_pretrained(tmp_path)
    spoil(tmp_path)
    plain = BASE.build()
    before, expected = state(plain), logits(plain, BASE)
    with pytest.raises(ValueError, match="lacks"):
        PeftModel.from_pretrained(plain, tmp_path, strict=True)
    assert_same(plain, before)
    assert torch.equal(logits(plain, BASE), expected)
    assert [layer.self_attn.layer_idx for layer in plain.model.layers] == [0, 1]


# -- names and folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "..", ".", "a.b", "../up", "a\\b", "", "a\0b", 5, None])
def test_adapter_names_that_are_no_names(tmp_path, name):
    model = small_adapter(tmp_path)
    plain = BASE.build()
    with pytest.raises(ValueError, match="An adapter's name is a non-empty string without"):
        get_peft_model(plain, LoraConfig(), adapter_name=name)
    assert not hasattr(plain, "peft_config")
    for call in (model.load_adapter, lambda folder, name: model.add_adapter(name, LoraConfig())):
        with pytest.raises(ValueError, match="An adapter's name is a non-empty string without"):
            call(tmp_path, name)
    assert list(model.peft_config) == ["default"]


def test_folders_that_are_none(tmp_path):
    model = small_adapter(tmp_path / "adapter")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="should be a directory, not a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="nothing was saved"):
        model.save_pretrained(tmp_path / "file" / "inside")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "taken" / CONFIG).mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match="nothing was saved"):
        model.save_pretrained(tmp_path / "taken")
    assert os.listdir(tmp_path / "taken") == [CONFIG]


@contextlib.contextmanager
def as_nobody():
    """As a user to whom permissions mean something."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_folder_that_cannot_be_written():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        folder = Path(place, "adapter")
        model = small_adapter(folder)
        before = content(folder)
        randomise(model, seed=5)
        folder.chmod(0o555)
        with as_nobody():
            for target in (folder, folder / "new"):
                with pytest.raises(PermissionError, match="nothing was saved"):
                    model.save_pretrained(target)
        folder.chmod(0o755)
        assert content(folder) == before


def test_a_full_disk_leaves_all_files_of_all_adapters(tmp_path):
    model = small_adapter(tmp_path)
    model.add_adapter("big", LoraConfig(r=8, target_modules="all-linear"))
    model.save_pretrained(tmp_path)
    before = content(tmp_path)
    for name in ("default", "big"):
        randomise(model, name, seed=7)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the first adapter, which is written first, but not for the second.
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize(tmp_path / "big" / WEIGHTS) - 1000, hard))
    try:
        for folder in (tmp_path, tmp_path / "new" / "folder"):
            with pytest.raises(OSError, match="nothing was saved, and what was there is as it was"):
                model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content(tmp_path) == before
    assert not (tmp_path / "new").exists()


KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
import tiny
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, load_peft_weights

folder, rng, left_over = sys.argv[1], random.Random(0), 0
model = get_peft_model(tiny.LLAMA.build(), LoraConfig(task_type="CAUSAL_LM", r=64))
model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=64))

def save(value):
    for name in model.peft_config:
        for tensor in get_peft_model_state_dict(model, adapter_name=name).values():
            tensor.data.fill_(value)
    model.save_pretrained(folder)

save(0)
begin = time.perf_counter()
save(0)
duration = time.perf_counter() - begin
for moment in range(50):
    child = os.fork()
    if child == 0:
        for value in range(1, 10**6):
            save(value)
    time.sleep(rng.uniform(0.1, 1.6) * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    left_over += any(name.endswith(".tmp") for name in os.listdir(folder))
    for place in (folder, os.path.join(folder, "second")):
        values = {float(v) for t in load_peft_weights(place).values() for v in t.unique()}
        assert len(values) == 1, values
PeftModel.from_pretrained(tiny.LLAMA.build(), folder, strict=True)
print("killed", moment + 1, "in the middle", left_over)
for name in os.listdir(folder):
    if name.endswith(".tmp"):
        os.utime(os.path.join(folder, name), (0, 0))
save(1)
print(sorted(n for n in os.listdir(folder) if n != "second"))
"""


def test_killed_at_fifty_moments_of_saving(tmp_path):
    command = [sys.executable, "-c", KILLER, str(tmp_path), os.path.dirname(__file__)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    told = run.stdout.split()
    assert told[:2] == ["killed", "50"] and int(told[5]) > 5, run.stdout
    # What killed processes left behind is gone after an hour, with the next save.
    assert run.stdout.splitlines()[1] == str(["README.md", CONFIG, WEIGHTS])


# -- configurations on a model -----------------------------------------------------------------------------------------


def test_patterns_that_match_nothing(tmp_path, monkeypatch):
    options = {
        "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"qproj": 3, "v_proj": 2},
        "rank_pattern": {"k_proj": 2},
    }
    with pytest.warns(UserWarning, match=r"rank_pattern\['k_proj'\].*alpha_pattern\['qproj'\] \(did you mean 'q_proj'"):
        get_peft_model(BASE.build(), LoraConfig(**options))
    plain = BASE.build()
    with pytest.raises(ValueError, match=r"alpha_pattern\['qproj'\]"):
        get_peft_model(plain, LoraConfig(**options), strict=True)
    assert not hasattr(plain, "peft_config") and "lora" not in str(plain)


def test_a_rank_above_the_size_of_the_layer_is_accepted(tmp_path):
    model = get_peft_model(BASE.build(), LoraConfig(r=100, target_modules=["v_proj"])).eval()
    randomise(model, scale=0.05)
    expected = logits(model, BASE)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, BASE), expected, atol=1e-4, rtol=1e-4)


def test_a_file_without_a_method(tmp_path):
    small_adapter(tmp_path)
    values = json.loads((tmp_path / CONFIG).read_text())
    del values["peft_type"]
    (tmp_path / CONFIG).write_text(json.dumps(values))
    with (
        pytest.raises(ValueError, match="`peft_type` is missing"),
        pytest.warns(UserWarning, match="does not know the keys"),
    ):
        PeftModel.from_pretrained(BASE.build(), tmp_path)
