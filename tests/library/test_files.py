import hashlib
import json
import os
import re
import stat
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from oft_diffusion.config import OFTConfig
from oft_diffusion.disk import tensor_digest, write_atomically
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.files import FILE_NAME, load_adapter_file, save_adapter_file
from oft_diffusion.inject import inject_oft, load_oft_state_dict, oft_state_dict
from oft_diffusion.metadata import FORMAT_VERSION, HEADER_KEY, AdapterMetadata
from tests.library.support import (
    adapter_file,
    assert_one_sentence,
    excite,
    generators,
    split_raw,
    tiny_unet,
    unet_state,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


# Round trips


@st.composite
def adapters(draw):
    """Components of any layout, as `save_adapter_file` takes them, and metadata that fits."""
    components, configs = {}, {}
    for part in draw(st.lists(st.sampled_from(["unet", "text_encoder", "text_encoder_2"]), min_size=1, unique=True)):
        block_size = draw(st.sampled_from([2, 3, 4, 8, 32]))
        names = draw(
            st.lists(st.from_regex(r"[a-z]{1,3}(\.[a-z0-9_]{1,4}){0,3}", fullmatch=True), min_size=1, max_size=4)
        )
        components[part] = {
            f"{name}.oft_R.weight": generators(
                draw(st.integers(1, 4)), block_size, seed=draw(st.integers(0, 99)), norm=draw(st.floats(0.01, 5))
            ).to(draw(st.sampled_from(DTYPES)))
            for name in names
        }
        configs[part] = OFTConfig(
            block_size=block_size,
            targets=draw(st.sampled_from(["attention", "all-linear", (r".*\.to_q", r".*\.to_k")])),
            parametrisation=draw(st.sampled_from(["cayley", "cayley_neumann"])),
            neumann_order=draw(st.integers(1, 8)),
            scaled=draw(st.booleans()),
            share_qkv=draw(st.booleans()),
            coft_eps=draw(st.none() | st.floats(0.01, 10)),
        )
    text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    plain = st.none() | st.booleans() | st.integers(-9, 9) | st.floats(allow_nan=False) | text
    metadata = AdapterMetadata(
        components=configs,
        base={"name": draw(text), "components": dict.fromkeys(components, "UNet2DConditionModel")},
        trigger=draw(st.none() | text),
        class_word=draw(st.none() | text),
        training=draw(st.dictionaries(text, plain | st.lists(plain, max_size=3), max_size=3)),
    )
    return components, metadata


@given(adapter=adapters())
def test_what_is_saved_is_loaded_bit_by_bit(folder, adapter):
    components, metadata = adapter
    path = save_adapter_file(folder / "any.safetensors", components, metadata)
    loaded = load_adapter_file(path)
    assert loaded.path == path
    assert {part: set(state) for part, state in loaded.components.items()} == {p: set(s) for p, s in components.items()}
    for part, state in components.items():
        for name, tensor in state.items():
            found = loaded.components[part][name]
            assert found.dtype == tensor.dtype
            assert torch.equal(found, tensor)
    for field in ("components", "base", "trigger", "class_word", "training"):
        assert getattr(loaded.metadata, field) == getattr(metadata, field)


@given(adapter=adapters())
def test_saving_what_was_loaded_keeps_the_digest(folder, adapter):
    first = load_adapter_file(save_adapter_file(folder / "first.safetensors", *adapter))
    second = load_adapter_file(save_adapter_file(folder / "second.safetensors", first.components, first.metadata))
    assert second.metadata.sha256 == first.metadata.sha256
    assert split_raw(first.path.read_bytes())[1] == split_raw(second.path.read_bytes())[1]


def test_a_folder_gets_the_default_name_and_is_found_by_it(tmp_path):
    metadata = AdapterMetadata(components={"unet": OFTConfig(block_size=8)})
    path = save_adapter_file(tmp_path / "deep" / "er", {"unet": unet_state()}, metadata)
    assert path == tmp_path / "deep" / "er" / FILE_NAME
    assert load_adapter_file(path.parent).path == path
    assert load_adapter_file(str(path)).path == path


def test_views_of_one_tensor_and_transposed_memory_are_saved_as_they_read(tmp_path):
    flat = generators(6, 8)
    state = {"a.oft_R.weight": flat[:3], "b.oft_R.weight": flat[3:], "c.oft_R.weight": flat.T.contiguous().T}
    path = save_adapter_file(tmp_path, {"unet": state}, AdapterMetadata(components={"unet": OFTConfig(block_size=8)}))
    for name, tensor in state.items():
        assert torch.equal(load_adapter_file(path).components["unet"][name], tensor)


# Metadata


def test_metadata_says_everything_about_the_adapter(tmp_path):
    config = OFTConfig(block_size=8, parametrisation="cayley_neumann", neumann_order=4, targets=(".*to_q", ".*to_k"))
    path = adapter_file(
        tmp_path,
        components={"unet": config},
        base={"name": "tiny", "components": {"unet": "UNet2DConditionModel"}},
        class_word="mug",
        training={"steps": 400, "learning_rate": 1e-3},
    )
    header = json.loads(split_raw(path.read_bytes())[0]["__metadata__"][HEADER_KEY])
    assert header["format_version"] == FORMAT_VERSION == 1
    assert header["components"]["unet"] == config.to_dict()
    assert header["components"]["unet"]["parametrisation"] == "cayley_neumann"
    assert header["base"] == {"name": "tiny", "components": {"unet": "UNet2DConditionModel"}}
    assert (header["trigger"], header["class_word"]) == ("sks", "mug")
    assert header["training"] == {"steps": 400, "learning_rate": 1e-3}
    for package in ("torch", "diffusers", "transformers", "safetensors"):
        assert header["software"][package] == version(package)
    assert {"python", "oft-diffusion"} <= set(header["software"])
    assert re.fullmatch(r"[0-9a-f]{64}", header["sha256"])
    age = datetime.now(timezone.utc) - datetime.fromisoformat(header["created"])
    assert timedelta(seconds=-2) < age < timedelta(minutes=5)


def test_the_metadata_is_written_afresh_on_every_save(tmp_path):
    stale = {"software": {"torch": "0"}, "created": "1970-01-01T00:00:00+00:00", "sha256": "0" * 64}
    metadata = load_adapter_file(adapter_file(tmp_path, **stale)).metadata
    assert metadata.software["torch"] == version("torch")
    assert not metadata.created.startswith("1970")
    assert metadata.sha256 != "0" * 64


def test_the_digest_can_be_recomputed_by_anyone(tmp_path):
    path = adapter_file(tmp_path)
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + tensor.numpy().tobytes())
    assert load_adapter_file(path).metadata.sha256 == digest.hexdigest()


def test_the_digest_sees_names_dtypes_shapes_and_bits():
    tensor = generators(2, 8)
    flipped = tensor.clone()
    flipped.view(torch.int32)[1, 3] ^= 1
    others = [{"a": tensor}, {"b": tensor}, {"a": tensor.view(4, 14)}, {"a": flipped}, {"a": tensor.double()}]
    assert len({tensor_digest(each) for each in others}) == len(others)
    assert tensor_digest({"a": tensor, "b": flipped}) == tensor_digest({"b": flipped, "a": tensor})


# Others read the same tensors


def test_plain_safetensors_reads_the_file(tmp_path):
    state = unet_state()
    path = adapter_file(tmp_path)
    found = load_file(path)
    assert set(found) == {f"unet.{name}" for name in state}
    assert all(torch.equal(found[f"unet.{name}"], tensor) for name, tensor in state.items())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["format"] == "pt"


@pytest.mark.parametrize("block_size", [4, 8, 16])
def test_names_and_packing_are_those_of_peft(tmp_path, block_size):
    ours, theirs = tiny_unet(), tiny_unet()
    bank = inject_oft(ours, OFTConfig(block_size=block_size, parametrisation="cayley_neumann", neumann_order=4))
    excite(bank)
    path = save_adapter_file(
        tmp_path, {"unet": oft_state_dict(ours)}, AdapterMetadata({"unet": bank.adapters["default"].config})
    )
    state = {name.removeprefix("unet."): tensor for name, tensor in load_file(path).items()}

    config = peft.OFTConfig(
        r=0,
        oft_block_size=block_size,
        target_modules=["to_q", "to_k", "to_v", "to_out.0"],
        use_cayley_neumann=True,
        num_cayley_neumann_terms=5,
    )
    peft.inject_adapter_in_model(config, theirs)
    assert set(peft.get_peft_model_state_dict(theirs)) == set(state)
    outcome: Any = peft.set_peft_model_state_dict(theirs, state)
    assert not outcome.unexpected_keys

    noise, time = torch.randn(2, 4, 8, 8), torch.tensor([3, 500])
    text = torch.randn(2, 5, 32)
    with torch.no_grad():
        base = tiny_unet()(noise, time, text).sample
        mine, peers = ours(noise, time, text).sample, theirs(noise, time, text).sample
    moved = (mine - base).abs().max()
    assert moved > 0.01
    assert (mine - peers).abs().max() < 2e-5 * base.abs().max()

    # And back: what PEFT saves is what we load.
    other = tiny_unet()
    inject_oft(other, OFTConfig(block_size=block_size, parametrisation="cayley_neumann", neumann_order=4))
    load_oft_state_dict(other, peft.get_peft_model_state_dict(theirs))
    with torch.no_grad():
        assert torch.equal(other(noise, time, text).sample, mine)


# Writing, whole or not at all


def _no_space(*_args, **_kwargs):
    raise OSError(28, "No space left on device")


def _interrupted(*_args, **_kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod", "write"])
@pytest.mark.parametrize("old", [True, False])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step, old):
    path = tmp_path / "mug.safetensors"
    before = adapter_file(tmp_path).read_bytes() if old else None
    _break(monkeypatch, step, _no_space)
    with pytest.raises(AdapterFileError) as error:
        adapter_file(tmp_path, trigger="other")
    assert_one_sentence(error, "mug.safetensors", "No space left on device")
    assert sorted(tmp_path.iterdir()) == ([path] if old else [])
    if old:
        assert path.read_bytes() == before
        assert load_adapter_file(path).metadata.trigger == "sks"


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_ctrl_c_while_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, step):
    path = adapter_file(tmp_path)
    before = path.read_bytes()
    _break(monkeypatch, step, _interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter_file(tmp_path, trigger="other")
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def _break(monkeypatch, step, how):
    if step == "write":
        real = os.fdopen

        class Full:
            def __init__(self, *args):
                self.file = real(*args)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            write = how

        monkeypatch.setattr(os, "fdopen", Full)
    elif step == "fsync":
        monkeypatch.setattr(os, "fsync", how)
    else:
        monkeypatch.setattr(os, step, how)
        monkeypatch.setattr(Path, step, how)


def test_a_file_where_a_folder_is_wanted_is_one_sentence(tmp_path):
    (tmp_path / "taken").write_text("x")
    with pytest.raises(AdapterFileError) as error:
        save_adapter_file(
            tmp_path / "taken" / "mug.safetensors", {"unet": unet_state()}, AdapterMetadata({"unet": OFTConfig(8)})
        )
    assert_one_sentence(error, "mug.safetensors")


def test_a_folder_of_the_files_name_is_one_sentence(tmp_path):
    (tmp_path / "mug.safetensors").mkdir()
    with pytest.raises(AdapterFileError) as error:
        adapter_file(tmp_path)
    assert_one_sentence(error, "mug.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["mug.safetensors"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_one_sentence(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(AdapterFileError) as error:
            adapter_file(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert_one_sentence(error, "mug.safetensors", "Permission denied")
    assert not list(tmp_path.iterdir())


def test_a_read_only_filesystem_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("oft_diffusion.disk.tempfile.mkstemp", refuse)
    with pytest.raises(AdapterFileError) as error:
        adapter_file(tmp_path)
    assert_one_sentence(error, "mug.safetensors", "Permission denied")


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_permissions_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = adapter_file(tmp_path)
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_an_existing_file_is_replaced_in_one_step(tmp_path):
    path = adapter_file(tmp_path)
    reader = path.open("rb")
    old = path.read_bytes()
    write_atomically(path, b"new")
    assert (path.read_bytes(), reader.read()) == (b"new", old)
    reader.close()
