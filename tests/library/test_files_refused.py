"""Every broken, foreign or hostile file is refused with one sentence that names it, and nothing else ever comes out."""

import hashlib
import io
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import SEAL_KEY
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.metadata import FORMAT_VERSION, HEADER_KEY, AdapterMetadata
from tests.library.support import (
    LAYER,
    adapter_file,
    assert_one_sentence,
    generators,
    seal_again,
    split_raw,
    unet_state,
    with_metadata,
    write_raw,
)

NAME = "unet." + LAYER.format("to_q")


def refused(path, *words):
    """`path` is refused in one sentence with the file's name and these words."""
    with pytest.raises(AdapterFileError) as error:
        load_adapter_file(path)
    assert_one_sentence(error, path.name, *words)
    return str(error.value)


@pytest.fixture
def path(tmp_path):
    return adapter_file(tmp_path)


@pytest.fixture(scope="module")
def module_path(tmp_path_factory):
    return adapter_file(tmp_path_factory.mktemp("refused"))


@pytest.fixture(scope="module")
def sound(module_path):
    return module_path.read_bytes()


# Not there


def test_missing_file_and_folder(tmp_path):
    refused(tmp_path / "none.safetensors", "does not exist")
    refused(tmp_path / "none", "does not exist")
    refused(tmp_path / ("x" * 300 + ".safetensors"))
    with pytest.raises(AdapterFileError, match=r"nul\\x00byte.safetensors does not exist"):
        load_adapter_file(tmp_path / "nul\0byte.safetensors")


def test_folder_without_an_adapter_names_what_it_holds(tmp_path):
    refused(tmp_path, "oft_adapter.safetensors", "no .safetensors file")
    path = adapter_file(tmp_path)
    assert load_adapter_file(tmp_path).path == path  # the only one
    (tmp_path / "other.safetensors").write_bytes(path.read_bytes())
    refused(tmp_path, "oft_adapter.safetensors", "mug.safetensors, other.safetensors", "weight_name")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_unreadable_file_and_folder(path):
    path.chmod(0)
    refused(path, "Permission denied")
    path.parent.chmod(0)
    try:
        refused(path, "Permission denied")
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("name", ["mug.bin", "mug.PT", "mug.ckpt"])
def test_a_pickles_name_is_not_written(tmp_path, name):
    with pytest.raises(AdapterFileError) as error:
        save_adapter_file(tmp_path / name, {"unet": unet_state()}, AdapterMetadata(components={}))
    assert_one_sentence(error, name, "mug.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt", ".pth", ".safetensors"])
def test_a_pickle_is_never_opened(tmp_path, suffix):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path = tmp_path / f"evil{suffix}"
    torch.save({NAME: generators(2, 8)}, path)
    refused(path)
    path.write_bytes(pickle.dumps(Bomb()))
    message = refused(path)
    assert ("pickle" in message) == (suffix != ".safetensors")
    assert not (tmp_path / "exploded").exists()


# Damaged


@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
def test_a_file_cut_anywhere(module_path, sound, share):
    module_path.write_bytes(sound[: int(share * len(sound))])
    refused(module_path)


def test_a_file_cut_at_every_boundary(module_path, sound):
    header = 8 + int.from_bytes(sound[:8], "little")
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(sound) - 4, len(sound) - 1):
        module_path.write_bytes(sound[:size])
        refused(module_path)


def test_bytes_after_the_end(path, sound):
    path.write_bytes(sound + b"\0" * 8)
    refused(path)


@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_in_the_tensors(module_path, sound, place, mask):
    start = 8 + int.from_bytes(sound[:8], "little")
    damaged = bytearray(sound)
    damaged[start + int(place * (len(sound) - start))] ^= mask
    module_path.write_bytes(damaged)
    refused(module_path)


@given(place=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_a_flipped_byte_in_the_header(module_path, sound, place, mask):
    start = 8 + int.from_bytes(sound[:8], "little")
    damaged = bytearray(sound)
    damaged[int(place * start)] ^= mask
    module_path.write_bytes(damaged)
    refused(module_path)


@given(noise=st.binary(max_size=300))
def test_noise(module_path, noise):
    module_path.write_bytes(noise)
    refused(module_path)


# Hostile headers


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 24_000_000, 3, 0])
def test_a_header_length_that_lies(path, sound, length):
    path.write_bytes(length.to_bytes(8, "little") + sound[8:])
    refused(path)


def test_a_header_just_over_the_limit_is_not_parsed(path):
    write_raw(path, b'{"a": "' + b"x" * 5_000_001 + b'"}')
    refused(path, "header", "5,000,000")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"null", b"[]", b'"x"', b"{}", b"\xff\xfe{}", b"not json", b'{"a": 1}', b"[" * 100_000 + b"]" * 100_000,
     b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"PK\x03\x04", b"<!doctype html><title>404</title>"],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_a_header_that_is_no_safetensors_header(path, text):
    refused(write_raw(path, text, b"\0" * 64))


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [-8, 216]},
        {"data_offsets": [0, 10**18]},
        {"data_offsets": [224, 0]},
        {"data_offsets": [8, 232]},
        {"data_offsets": [0, 224, 448]},
        {"data_offsets": "0,224"},
        {"shape": [10**10, 10**10]},
        {"shape": [-2, -28]},
        {"shape": [2, 29]},
        {"shape": []},
        {"dtype": "F7"},
        {"dtype": None},
    ],
    ids=json.dumps,
)
def test_a_tensor_entry_that_lies(path, change):
    header, body = split_raw(path.read_bytes())
    header[NAME].update(change)
    refused(write_raw(path, header, body))


def test_tensors_that_overlap(path):
    header, body = split_raw(path.read_bytes())
    names = [name for name in header if name != "__metadata__"]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    refused(write_raw(path, header, body))


@pytest.mark.parametrize("twice", ["__metadata__", NAME])
def test_duplicated_keys(path, twice):
    header, body = split_raw(path.read_bytes())
    other = dict(header[twice])
    if twice == NAME:
        other |= {"dtype": "I32"}
    for first, second in ((header[twice], other), (other, header[twice])):
        rest = {key: value for key, value in header.items() if key != twice}
        entries = [json.dumps({key: value})[1:-1] for key, value in [(twice, first), *rest.items(), (twice, second)]]
        write_raw(path, b"{" + ", ".join(entries).encode() + b"}", body)
        refused(path, "twice")


# Tensors that are no generators


def saved_raw(tmp_path, tensors):
    path = tmp_path / "raw.safetensors"
    save_file(tensors, path, {HEADER_KEY: AdapterMetadata({"unet": OFTConfig(block_size=8)}).to_json()})
    return path


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn, torch.complex64]
)
def test_wrong_dtype(tmp_path, dtype):
    refused(saved_raw(tmp_path, {NAME: torch.zeros(2, 28).to(dtype)}), NAME, str(dtype))


@pytest.mark.parametrize("shape", [(28,), (2, 27), (2, 0), (0, 28), (0, 0), (1, 2, 28), (), (28, 2)])
def test_wrong_shape(tmp_path, shape):
    refused(saved_raw(tmp_path, {NAME: torch.zeros(shape)}), NAME, str(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    tensor = generators(2, 8).to(dtype)
    tensor[1, 27] = value
    refused(saved_raw(tmp_path, {NAME: tensor}), NAME, "not finite")


def test_at_most_three_bad_tensors_are_named(tmp_path):
    bad = {f"unet.layer{i}.oft_R.weight": torch.full((2, 28), float("nan")) for i in range(7)}
    message = refused(saved_raw(tmp_path, bad), "7 unusable")
    assert message.count("layer") == 3


def test_bad_tensors_are_not_written_either(tmp_path):
    metadata = AdapterMetadata({"unet": OFTConfig(block_size=8)})
    for tensor in (torch.full((2, 28), float("nan")), torch.zeros(2, 27), torch.zeros(2, 28, dtype=torch.int64)):
        with pytest.raises(AdapterFileError) as error:
            save_adapter_file(tmp_path / "mug.safetensors", {"unet": {"a.oft_R.weight": tensor}}, metadata)
        assert_one_sentence(error, "mug.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("components", "configured"),
    [({}, {}), ({"unet": {}}, {"unet": 8}), ({"unet": {}}, {}), ({"unet": 1}, {}), ({"unet": 1}, {"unet": 8, "vae": 8}),
     ({"unet": 1}, {"unet": 16}), ({"unet": 1}, {"unet": "auto"})],
)  # fmt: skip
def test_what_could_not_be_loaded_is_not_written(tmp_path, components, configured):
    metadata = AdapterMetadata({part: OFTConfig(block_size=size) for part, size in configured.items()})
    states = {part: unet_state() if state else {} for part, state in components.items()}
    with pytest.raises(AdapterFileError) as error:
        save_adapter_file(tmp_path / "mug.safetensors", states, metadata)
    assert_one_sentence(error, "mug.safetensors")
    assert not list(tmp_path.iterdir())


def test_more_beside_an_adapter_than_would_be_read_is_not_written(tmp_path):
    metadata = AdapterMetadata({"unet": OFTConfig(block_size=8)}, training={"notes": "x" * 5_000_000})
    with pytest.raises(AdapterFileError) as error:
        save_adapter_file(tmp_path / "mug.safetensors", {"unet": unet_state()}, metadata)
    assert_one_sentence(error, "mug.safetensors", "could not be loaded again", "5,000,000")
    assert not list(tmp_path.iterdir())


def test_no_tensor_at_all(tmp_path):
    refused(saved_raw(tmp_path, {}), "no tensors at all")


# Other tools' files


@pytest.mark.parametrize(
    "name", ["unet.down.to_q.lora_A.weight", "lora_unet_down_blocks_0_to_q.lora_down.weight", "unet.x.lora.up.weight"]
)
def test_a_lora_is_recognised(tmp_path, name):
    refused(saved_raw(tmp_path, {name: torch.zeros(4, 8)}), "LoRA", "load_lora_weights")


def test_a_whole_model_or_a_mixture_is_refused(tmp_path):
    refused(saved_raw(tmp_path, {"unet.conv_in.weight": torch.zeros(4, 4, 3, 3)}), "conv_in.weight")
    refused(saved_raw(tmp_path, {NAME: generators(2, 8), "alpha": torch.ones(1)}), "alpha")


def test_another_tools_oft_file_is_refused_since_nothing_says_how_it_rotates(tmp_path):
    for metadata in (None, {}, {"format": "pt"}, {"ss_network_module": "networks.oft"}):
        save_file({NAME: generators(2, 8)}, tmp_path / "other.safetensors", metadata)
        refused(tmp_path / "other.safetensors", "another tool", "metadata")


def test_numpy_and_zip_files_in_disguise(tmp_path):
    path = tmp_path / "disguised.safetensors"
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    path.write_bytes(buffer.getvalue())
    refused(path)


# Metadata


@pytest.mark.parametrize("number", [FORMAT_VERSION + 1, 10**9, 0, -1, 1.5, True, None, "1", [], {}])
def test_a_format_version_that_we_do_not_know(path, number):
    refused(with_metadata(path, {"format_version": number}), "format version", "upgrade")


@pytest.mark.parametrize("entry", ["format_version", "trigger", "components", "parametrisation", "strength"])
def test_metadata_nested_as_deep_as_it_can_be_read(path, entry):
    config = {**OFTConfig(block_size=8).to_dict(), "parametrisation": "<here>"}
    change = {"components": {"unet": config}} if entry == "parametrisation" else {entry: "<here>"}
    header, body = split_raw(with_metadata(path, change).read_bytes())
    text = header["__metadata__"][HEADER_KEY]
    for depth in range(800, 1000, 10):  # parsed, and then too deep to be shown
        header["__metadata__"][HEADER_KEY] = text.replace('"<here>"', "[" * depth + "]" * depth)
        refused(seal_again(write_raw(path, header, body)))


def test_no_format_version(path):
    header, _ = split_raw(path.read_bytes())
    ours = json.loads(header["__metadata__"][HEADER_KEY])
    del ours["format_version"]
    refused(with_metadata(path, json.dumps(ours)), "format version")


def test_a_setting_of_a_newer_version_is_named(path):
    config = {**OFTConfig(block_size=8).to_dict(), "householder": 2}
    refused(with_metadata(path, {"components": {"unet": config}}), "householder", "upgrade")


def test_an_entry_of_a_newer_version_is_named(path):
    refused(with_metadata(path, {"licence": "x"}), "licence")


@pytest.mark.parametrize(
    "change",
    [
        {"components": []},
        {"components": {"unet": []}},
        {"components": {"unet": None}},
        {"components": {"unet": {"block_size": 0}}},
        {"components": {"unet": {"block_size": "auto"}}},
        {"components": {"unet": {"block_size": 16}}},
        {"components": {"unet": {"block_size": 8, "targets": 3}}},
        {"components": {"unet": {"block_size": 8, "targets": []}}},
        {"components": {"unet": {"block_size": 8, "parametrisation": "householder"}}},
        {"components": {"unet": {"block_size": 8, "parametrisation": ["cayley"]}}},
        {"components": {"unet": {"block_size": 8, "neumann_order": 10**9}}},
        {"components": {"unet": {"block_size": 8, "scaled": "no"}}},
        {"components": {"unet": {"block_size": 8, "coft_eps": "1"}}},
        {"components": {}},
        {"components": {"unet": {"block_size": 8}, "vae": {"block_size": 8}}},
        {"base": []},
        {"base": "sd15"},
        {"base": {"components": ["unet"]}},
        {"base": {"components": {"unet": 3}}},
        {"trigger": 3},
        {"class_word": ["mug"]},
        {"training": [1]},
        {"software": None},
        {"created": 0},
        {"sha256": None},
        {"sha256": "0" * 64},
    ],
    ids=json.dumps,
)
def test_metadata_of_the_wrong_kind(path, change):
    refused(with_metadata(path, change))


@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "[]", "3", '"x"', "{}", "[" * 100_000 + "]" * 100_000, '{"format_version": ' + "9" * 5000 + "}",
     '{"format_version": 1, "training": ' + '{"a":' * 100_000 + "1" + "}" * 100_001],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_metadata_that_is_not_ours(path, text):
    refused(with_metadata(path, text))


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    key=st.sampled_from([*AdapterMetadata({}).__dict__, "unknown"]),
)
def test_any_metadata_is_read_or_refused(module_path, sound, value, key):
    module_path.write_bytes(sound)
    with_metadata(module_path, {key: value})
    try:
        file = load_adapter_file(module_path)
    except AdapterFileError as error:
        assert module_path.name in str(error)  # noqa: PT017 - either is right
    else:
        assert AdapterMetadata.from_json(file.metadata.to_json()).to_json() == file.metadata.to_json()


# The seal


def test_a_changed_text_an_added_one_and_another_layout_are_noticed(path):
    header, body = split_raw(path.read_bytes())
    texts = header["__metadata__"]
    told = texts[HEADER_KEY]
    for changed in (
        {**header, "__metadata__": {**texts, HEADER_KEY: told.replace('"trigger": "sks"', '"trigger": "skt"')}},
        {**header, "__metadata__": {**texts, HEADER_KEY: told.replace(", ", ",")}},
        {**header, "__metadata__": {**texts, "licence": "x"}},
        {**header, "__metadata__": {**texts, "format": "np"}},
        {**header, "__metadata__": {k: v for k, v in texts.items() if k != SEAL_KEY}},
        header,  # with spaces that were not there
        dict(reversed(header.items())),
    ):
        refused(write_raw(path, changed, body), "SHA-256")
    seal_again(write_raw(path, header, body))
    assert load_adapter_file(path).metadata.trigger == "sks"


def test_the_seal_can_be_recomputed_by_anyone(path):
    data = path.read_bytes()
    seal = split_raw(data)[0]["__metadata__"][SEAL_KEY]
    assert data.count(seal.encode()) == 1
    assert hashlib.sha256(data.replace(seal.encode(), b"0" * 64)).hexdigest() == seal


def test_a_text_that_looks_like_a_seal_is_none(tmp_path):
    for text in (f'"{SEAL_KEY}":"{"0" * 64}"', "0" * 64, "é\n" * 50):
        assert load_adapter_file(adapter_file(tmp_path, trigger=text)).metadata.trigger == text


# What is refused before it costs anything


def test_a_header_with_more_than_any_adapter_has(path):
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    refused(write_raw(path, {f"{i}.oft_R.weight": entry for i in range(20_001)}), "20,001 tensors")
    refused(write_raw(path, {"__metadata__": {str(i): "" for i in range(1_001)}}), "1,001 texts")
    refused(write_raw(path, {"x" * 251: entry}), "251 characters")
    refused(write_raw(path, {"a": {**entry, "shape": [1] * 9}}), "9 axes")
    refused(write_raw(path, {"a": {**entry, "more": []}}))
    refused(write_raw(path, {NAME: {**entry, "shape": [2**63, 0]}}))


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "../../etc/passwd", "", "\u202eb", "x" * 100_000])
def test_names_that_would_spoil_a_message(tmp_path, name):
    path = tmp_path / "mug.safetensors"
    entry = {"dtype": "F32", "shape": [2, 28], "data_offsets": [0, 224]}
    message = refused(write_raw(path, {f"{name}.oft_R.weight": entry}, bytes(224)))
    assert message.isprintable()


def test_float64_that_float32_cannot_hold(tmp_path):
    refused(saved_raw(tmp_path, {NAME: torch.full((2, 28), 1e300, dtype=torch.float64)}), NAME, "not finite")


@pytest.mark.parametrize("shape", [(2, 4), (1, 8), (16, 1), (4, 4)])
def test_scales_that_are_not_those_of_their_generator(tmp_path, shape):
    scale = NAME.replace("oft_R", "oft_scale")
    refused(saved_raw(tmp_path, {NAME: generators(2, 8), scale: torch.ones(shape)}), scale, str(shape))
    refused(saved_raw(tmp_path, {scale: torch.ones(2, 8)}), scale)


@pytest.mark.parametrize(
    "change",
    [
        {"probes": {"rotations": {"unet": {"a": 10**400}}}},
        {"base": {"fingerprints": {"unet": {"samples": [["a", [4], "float32", 0, 10**400]]}}}},
        {"base": {"fingerprints": {"unet": {"samples": [["a", [4], "float32", 0, float("nan")]]}}}},
        {"base": {"fingerprints": {"unet": {"samples": [["a", [10**400], "float32", 0, 0.5]]}}}},
        {"base": {"fingerprints": {"unet": {"samples": [["a", [4], "float32", -1, 0.5]]}}}},
        {"base": {"fingerprints": {"unet": {"samples": [[["a"], [4], "float32", 0, 0.5]]}}}},
        {"base": {"fingerprints": {"unet": {"samples": [0.5]}}}},
        {"base": {"fingerprints": {"unet": {}}}},
        {"base": {"fingerprints": {"unet": {"samples": [], "config": [4]}}}},
        {"strength": 10**400},
        {"components": {"unet": {"block_size": 8, "coft_eps": 10**400}}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_numbers_that_no_float_holds(path, change):
    refused(with_metadata(path, change))


def test_the_digest_of_other_tensors(tmp_path):
    (tmp_path / "a").mkdir()
    path, other = adapter_file(tmp_path), adapter_file(tmp_path / "a", trigger="other")
    changed = save_adapter_file(
        other, {"unet": {n: t * 1.001 for n, t in unet_state().items()}}, AdapterMetadata({"unet": OFTConfig(8)})
    )
    header, _ = split_raw(path.read_bytes())
    refused(write_raw(path, header, split_raw(changed.read_bytes())[1]), "SHA-256")


def test_a_renamed_layer_changes_the_digest(path):
    data = path.read_bytes()
    refused_path = path
    refused_path.write_bytes(data.replace(b"attn1.to_q", b"attn2.to_q"))
    refused(refused_path, "SHA-256")
