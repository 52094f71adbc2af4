"""Safetensors headers: what the reference implementation writes is read, everything malformed is refused by name."""

import json
import time
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file

from flux_lora.checkpoint.header import MAX_HEADER_BYTES, TensorFileError, read_header

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def with_header(text: bytes, data: bytes = bytes(4)) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def with_entry(name: str = "a", **changes: object) -> bytes:
    return with_header(json.dumps({name: ENTRY | changes}).encode())


MALFORMED = {
    "empty": (b"", "only 0 bytes"),
    "header that is not there": (with_header(b"{}", b"")[:9], "it is truncated"),
    "header of zero bytes": (bytes(8), "not a JSON object"),
    "header that would be larger than the format allows": (
        bytes([0, 0, 0, 8, 0, 0, 0, 0, 1]),
        "not a safetensors file",
    ),
    "a header larger than the format allows, cut off": (
        bytes([0, 0, 0, 8, 0, 0, 0, 0]) + b"{",
        "not a safetensors file",
    ),
    "zip": (b"PK\x03\x04" + bytes(20), "a zip or PyTorch pickle"),
    "pickle": (b"\x80\x04\x95" + b"a" * 20, "a Python pickle"),
    "page": (b"<!DOCTYPE html>" + bytes(20), "a text file"),
    "list": (with_header(b"[]"), "not a JSON object"),
    "byte order mark": (with_header(b"\xef\xbb\xbf{}", b""), "not a JSON object"),
    "UTF-16": (with_header("{}".encode("utf-16-le"), b""), "not JSON in UTF-8"),
    "Latin-1": (with_header(b'{"\xe9":1}'), "not JSON in UTF-8"),
    "half of the JSON": (with_header(b'{"a":'), "not JSON in UTF-8"),
    "nested too deep": (with_header(b'{"a":' * 100_000), "not JSON in UTF-8"),
    "number of 5000 digits": (with_header(b'{"a":' + b"9" * 5000 + b"}"), "not JSON in UTF-8"),
    "lone surrogate in a name": (with_entry("\ud800"), "half of a surrogate pair"),
    "lone surrogate in the metadata": (
        with_header(b'{"__metadata__":{"a":"\\udfff"}}', b""),
        "half of a surrogate pair",
    ),
    "metadata that are a list": (with_header(b'{"__metadata__":[]}', b""), "not a map of strings"),
    "metadata that are numbers": (with_header(b'{"__metadata__":{"a":1}}', b""), "not a map of strings"),
    "metadata named twice": (with_header(b'{"__metadata__":{},"__metadata__":{}}', b""), "names a tensor twice"),
    "a text of the metadata named twice": (with_header(b'{"__metadata__":{"a":"","a":""}}', b""), "a tensor twice"),
    "metadata that are a text": (with_header(b'{"__metadata__":"null"}', b""), "not a map of strings"),
    "something behind the object": (with_header(b"{} {}", b""), "not JSON in UTF-8"),
    "a comma too many": (with_header(b'{"__metadata__":{},}', b""), "not JSON in UTF-8"),
    "no comma": (with_header(b'{"__metadata__":{} "a":1}', b""), "not JSON in UTF-8"),
    "too many tensors": (
        with_header(b"{" + b",".join(b'"%d":1' % i for i in range(100_001)) + b"}"),
        "more than 100,000",
    ),
    "too many texts": (
        with_header(b'{"__metadata__":{' + b",".join(b'"%d":""' % i for i in range(100_001)) + b"}}"),
        "more than 100,000 entries",
    ),
    "name twice": (with_header(b'{"a":1,"a":2}'), "names a tensor twice"),
    "name without end": (with_entry("a" * 1_000_000), "more than 512 characters"),
    "entry that is a number": (with_header(b'{"a":1}'), "lacks dtype, shape or data_offsets"),
    "entry without type": (with_header(b'{"a":{"shape":[],"data_offsets":[0,4]}}'), "lacks dtype, shape"),
    "one offset": (with_entry(data_offsets=[0]), "lacks dtype, shape or data_offsets"),
    "type that is a list": (with_entry(dtype=["F32"]), r"unknown type \['F32'\]"),
    "type without end": (with_entry(dtype="F" * 1_000_000), "unknown type 'FFF"),
    "fraction in the shape": (with_entry(shape=[1.0]), "not a whole number from 0"),
    "boolean in the shape": (with_entry(shape=[True]), "not a whole number from 0"),
    "negative offset": (with_entry(data_offsets=[-4, 0]), "not a whole number from 0"),
    "nine dimensions": (with_entry(shape=[1] * 9), "has 9 dimensions; at most 8"),
    "a hundred thousand dimensions": (with_entry(shape=[2**63 - 1] * 100_000), "has 100000 dimensions"),
    "shape of another size": (with_entry(shape=[2**63 - 1] * 8), "which is not F32 of shape"),
    "hole": (with_entry(data_offsets=[4, 8]), "leaves a hole"),
    "bytes after the end": (with_header(json.dumps({"a": ENTRY}).encode(), bytes(5)), "1 bytes follow"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_refused_at_once_and_in_brief(case: str, tmp_path: Path) -> None:
    contents, reason = MALFORMED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(contents)
    started = time.process_time()
    with pytest.raises(TensorFileError, match=reason) as caught:
        read_header(path)
    assert time.process_time() - started < 2
    assert len(str(caught.value)) < 400


def test_padding_and_eight_dimensions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps({"a": ENTRY | {"shape": [1] * 8}}).encode() + b"   "))
    assert read_header(path).tensors["a"].shape == (1,) * 8


def test_null_for_metadata_is_none(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(json.dumps({"__metadata__": None, "a": ENTRY}).encode()))
    assert read_header(path).metadata == {}
    assert list(load_file(path)) == list(read_header(path).tensors) == ["a"]


def test_the_limit_is_that_of_the_format(tmp_path: Path) -> None:
    """Also of the reference implementation, which is asked too."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(b"{}".ljust(MAX_HEADER_BYTES), b""))
    assert read_header(path).tensors == load_file(path) == {}
    path.write_bytes(with_header(b"{}".ljust(MAX_HEADER_BYTES + 1), b""))
    with pytest.raises(TensorFileError, match="its header has 100,000,001 bytes, and the format allows 100,000,000"):
        read_header(path)
    with pytest.raises(SafetensorError, match="header too large"):
        load_file(path)


MILLIONS = 6_000_000
HOSTILE = {
    "a list in a list in a list": (b'{"a":{"shape":' + b"[" * MILLIONS, "not JSON"),
    "millions of numbers": (b'{"a":{"shape":[' + b"1," * MILLIONS + b"1]}}", "more than 4,000,000 bytes"),
    "millions of lists": (b'{"a":{"shape":[' + b"[]," * MILLIONS + b"1]}}", "more than 4,000,000 bytes"),
    "millions of objects": (b'{"a":{"b":[' + b"{}," * MILLIONS + b"1]}}", "not JSON"),
    "a name of millions of escapes": (b'{"' + b"\\n" * MILLIONS + b'":1}', "more than 512 characters"),
    "a text without end": (b'{"__metadata__":{"a":"' + b"\\n" * MILLIONS, "not JSON"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_become_no_objects_by_the_million(case: str, tmp_path: Path) -> None:
    """Python's own objects, which is where a header of tens of megabytes could become gigabytes."""
    contents, reason = HOSTILE[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(with_header(contents, b""))
    tracemalloc.start()
    try:
        with pytest.raises(TensorFileError, match=reason):
            read_header(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < len(contents) + 100 * 2**20


def test_captions_of_a_whole_training_are_passed_over(tmp_path: Path) -> None:
    """As sd-scripts writes them: JSON in a text of the metadata."""
    captions = json.dumps(
        {"1_style": {f"a picture of “subject” {i}, " + "soft light, " * 20: 1 for i in range(50_000)}}
    )
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"ss_tag_frequency": captions, "ss_base_model_version": "flux1"})
    assert path.stat().st_size > 10_000_000
    assert read_header(path).metadata == {"ss_base_model_version": "flux1"}
    assert read_header(path).tensors["a"].shape == (1,)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter("__metadata__".__ne__)
shapes = st.lists(st.integers(0, 3), max_size=4)
tensors = st.dictionaries(names, st.builds(torch.zeros, shapes, dtype=st.sampled_from(list(DTYPES))), max_size=4)


@given(tensors, st.dictionaries(names, names, max_size=3))
def test_what_the_library_writes_reads_back(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file(tensors, path, metadata or None)  # which it writes as broken JSON for {} and no tensors
    header = read_header(path)
    read = {name: (info.dtype, info.shape) for name, info in header.tensors.items()}
    assert read == {name: (DTYPES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    assert header.metadata == metadata


@given(st.data())
def test_any_truncation_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = save({"a": torch.ones(3), "b": torch.ones(2, 2)}, {"key": "value"})
    path = tmp_path_factory.getbasetemp() / "truncated.safetensors"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(TensorFileError, match="truncated|too few"):
        read_header(path)
