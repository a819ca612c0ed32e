"""Weight files of others: found, checked before anything is read, and read without a second copy."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from outgrow.memory.errors import DiskFault
from outgrow.runtime.weight_files import find_weights, open_weights

STATE = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.tensor([1, 2]),
    "none": torch.empty(0, 4),
    "c": torch.tensor(3.0),
}


def save(path: Path, state: dict[str, torch.Tensor] | None = None) -> Path:
    safetensors.torch.save_file(STATE if state is None else state, path)
    return path


def sharded(folder: Path) -> Path:
    shards = {"model-00001-of-00002.safetensors": ["a", "none"], "model-00002-of-00002.safetensors": ["b", "c"]}
    for shard, names in shards.items():
        save(folder / shard, {name: STATE[name] for name in names})
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 44}, "weight_map": weight_map}))
    return index


def read(path: Path) -> dict[str, torch.Tensor]:
    values = {}
    for name, stored in open_weights(path).tensors.items():
        values[name] = torch.full(stored.shape, 9, dtype=stored.dtype)
        stored.read_into(values[name])
    return values


def same(values: dict[str, torch.Tensor]) -> bool:
    return values.keys() == STATE.keys() and all(torch.equal(values[name], value) for name, value in STATE.items())


def test_one_file_by_its_name_or_by_its_folder(tmp_path):
    path = save(tmp_path / "model.safetensors")
    save(tmp_path / "other.safetensors", {"x": torch.ones(1)})
    assert find_weights(tmp_path) == find_weights(str(path)) == path
    assert same(read(tmp_path))
    assert read(tmp_path / "other.safetensors").keys() == {"x"}
    path.rename(tmp_path / "deep")
    assert find_weights(tmp_path).name == "other.safetensors", "the only one there is"


def test_shards_by_their_index(tmp_path):
    index = sharded(tmp_path)
    assert find_weights(tmp_path) == index
    assert same(read(tmp_path))
    assert same(read(index))


def test_values_are_converted_and_written_also_where_they_lie_apart(tmp_path):
    value = torch.randn(300, 7000)
    save(tmp_path / "w.safetensors", {"a": value})
    stored = open_weights(tmp_path).tensors["a"]
    target = torch.zeros(300, 7000, dtype=torch.bfloat16)
    stored.read_into(target)
    assert torch.equal(target, value.bfloat16())
    assert stored.same_values(target)
    target[299, 6999] += 1
    assert not stored.same_values(target)
    apart = torch.zeros(7000, 300).t()
    stored.read_into(apart)
    assert torch.equal(apart, value)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ((), "holds neither model.safetensors nor model.safetensors.index.json"),
        (("pytorch_model.bin",), r"holds neither .*; it holds pytorch_model\.bin, which must be saved as safetensors"),
        (("a.safetensors", "b.safetensors"), r"holds 2 safetensors files \(a\.safetensors, b\.safetensors\) but no "),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(tmp_path, files, words):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=words):
        find_weights(tmp_path)
    with pytest.raises(ValueError, match="no such file or folder on this machine"):
        find_weights(tmp_path / "not there")
    (tmp_path / "weights.pt").touch()
    with pytest.raises(ValueError, match="is no safetensors file"):
        find_weights(tmp_path / "weights.pt")


def framed(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no length of a header"),
        (b"\x10\0\0", "no length of a header"),
        (b"\xff" * 20, "no length of a header"),
        (struct.pack("<Q", 500) + b"{}", "header has 500 bytes, the file has 10: it is truncated"),
        (framed(b"\xff\xfe{}"), "header cannot be read"),
        (framed(b'{"a": '), "header cannot be read"),
        (framed(["a"]), "header cannot be read"),
        (framed({"a": ENTRY}), "ends with a at byte .*: it is truncated"),
        (framed({"a": ENTRY}) + b"\0" * 7, "it is truncated"),
        (framed({"a": ENTRY}) + b"\0" * 9, r"ends with a at byte \d+, but it has \d+ bytes;"),
        (
            framed({"a": ENTRY | {"data_offsets": [0, 4]}}) + b"\0" * 8,
            r"a of shape \[2\] in F32 does not fill bytes 0 to 4",
        ),
        (framed({"a": ENTRY | {"shape": [-2]}}) + b"\0" * 8, r"a of shape \[-2\]"),
        (framed({"a": ENTRY | {"shape": ["2"]}}) + b"\0" * 8, r"a of shape"),
        (framed({"a": {"dtype": "F32"}}), "says nothing useful of a"),
        (framed({"a": 3}), "says nothing useful of a"),
        (framed({"a": ENTRY | {"dtype": "F4"}}) + b"\0" * 8, "a has the dtype F4, which cannot be converted"),
    ],
)
def test_a_broken_file_is_named(tmp_path, content, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_weights(tmp_path)
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = save(tmp_path / "whole").read_bytes()
    path = tmp_path / "model.safetensors"
    for num_bytes in range(len(content)):
        path.write_bytes(content[:num_bytes])
        with pytest.raises(ValueError, match=r"model\.safetensors is broken"):
            open_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of safetensors files"):
        open_weights(tmp_path)


def test_index_and_shards_must_match(tmp_path):
    index = sharded(tmp_path)
    content = json.loads(index.read_text())
    content["weight_map"]["extra"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"says that extra lies in model-00001-of-00002\.safetensors, but it does not"):
        open_weights(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names the shard model-00002-of-00002\.safetensors, which is not there"):
        open_weights(tmp_path)


def test_a_file_that_changes_after_it_was_checked_is_a_fault(tmp_path):
    path = save(tmp_path / "w.safetensors", {"a": torch.ones(1000)})
    stored = open_weights(tmp_path).tensors["a"]
    path.write_bytes(path.read_bytes()[:-4])
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(DiskFault, match=r"w\.safetensors ended at byte \d+, in the middle of a"):
            stored.read_into(torch.zeros(1000, dtype=dtype))
    path.unlink()
    with pytest.raises(DiskFault, match=r"a cannot be read: .*No such file"):
        stored.read_into(torch.zeros(1000))


STREAMING = """
import sys
import torch
from torch import nn
from outgrow.memory.process import read_process_memory
from outgrow.runtime.building import build_model
from outgrow.runtime.filling import InitFiller, WeightsFiller

def build():
    return nn.Sequential(*(nn.Linear(4096, 2048, bias=False) for _ in range(8)))

def init(module):
    if isinstance(module, nn.Linear):
        nn.init.ones_(module.weight)

model = build_model(build, 0, lambda num_bytes: False).model
fillers = [InitFiller(init, 0, model), *(WeightsFiller(path, model) for path in sys.argv[1:])]
before = read_process_memory().resident_bytes
tensor = torch.empty(2048, 4096)
for filler in fillers:
    for index in range(8):
        filler.fill(str(index), model[index], {f"{index}.weight": tensor})
        expected = 1 if isinstance(filler, InitFiller) else index
        assert tensor[0, 0].item() == tensor[-1, -1].item() == expected, (filler, index)
grown = read_process_memory().peak_bytes - before
print(grown)
"""


def test_filling_takes_the_memory_of_one_unit(tmp_path):
    paths = []
    for dtype in (torch.float32, torch.bfloat16):
        weights = {f"{index}.weight": torch.full((2048, 4096), float(index), dtype=dtype) for index in range(8)}
        paths.append(save(tmp_path / f"{len(paths)}.safetensors", weights))
    command = [sys.executable, "-c", STREAMING, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    layer = 32 << 20
    assert int(done.stdout) < 3 * layer, "the tensor, and small change; the file has eight layers"
