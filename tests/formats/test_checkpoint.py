"""Merged checkpoints and folders: the fused pipeline's pictures, and nothing else changed, in files or pipeline."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from oft_diffusion import OFTConfig, fuse_oft, inject_oft
from oft_diffusion.errors import AdapterError, AdapterFileError, TargetError
from oft_diffusion.formats import checkpoint
from oft_diffusion.formats.checkpoint import export_checkpoint, export_folder
from oft_diffusion.formats.live import EXPORT_KEY
from oft_diffusion.formats.names import ComponentLayers, Meaning, checkpoint_names, describe
from oft_diffusion.hooks import bank_of
from oft_diffusion.load import load_pipeline
from tests.helpers.single_files import write_single_file
from tests.helpers.tiny_families import side_of, tiny_family
from tests.library.support import assert_one_sentence, assert_unchanged, excite, fingerprint

SD, XL, SD3, FLUX = (
    "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"
)  # fmt: skip
PARTS = {SD: ("unet", "text_encoder"), XL: ("unet", "text_encoder", "text_encoder_2")}
ROUNDING = 1e-5
SERIES = {"parametrisation": "cayley_series", "neumann_order": 2}


class Base:
    """A tiny base as a folder and as a single file, with metadata."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        pipe = tiny_family(name, root / name)
        self.folder, self.file = root / name / "folder", root / name / "base.safetensors"
        pipe.save_pretrained(self.folder)
        tensors = load_file(write_single_file(pipe, self.file))
        save_file(tensors, self.file, metadata={"format": "pt", "modelspec.title": "tiny"})

    def load(self, file: Path | None = None, dtype: torch.dtype = torch.float32) -> Any:
        pipe = load_pipeline(file or self.folder, dtype, config_dir=self.folder if file else None)
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    root, made = tmp_path_factory.mktemp("bases"), {}

    def find(name: str) -> Base:
        if name not in made:
            made[name] = Base(name, root)
        return made[name]

    return find


def layers_of(pipe: Any, part: str) -> dict[str, nn.Module]:
    model = getattr(pipe, part)
    return {name: model.get_submodule(name) for name in ComponentLayers.from_model(model).layers}


def adapt(pipe: Any, parts: Any, kept: Callable[[str], bool] = lambda layer: True, **settings: Any) -> None:
    for seed, part in enumerate(parts):
        layers = [name for name in layers_of(pipe, part) if kept(name)]
        bank = inject_oft(getattr(pipe, part), OFTConfig(block_size=4, **settings), layers=layers)
        excite(bank, seed=seed, norm=0.3)
        bank.freeze("default")


def draw(pipe: Any, name: str) -> Tensor:
    size = {"height": side_of(name), "width": side_of(name)}
    generator = torch.Generator().manual_seed(0)
    picture: Tensor = pipe("a dog", num_inference_steps=2, generator=generator, output_type="pt", **size).images
    return picture


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewritten(source: Path, path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = load_file(source)
    change(tensors)
    save_file(tensors, path, metadata=metadata(source))
    return path


def weight(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


# Single files


@pytest.mark.thinned(3)
@pytest.mark.parametrize("series", [{}, SERIES], ids=["", "another series"])
@pytest.mark.parametrize("name", [SD, XL])
def test_a_merged_file_draws_what_is_fused(
    name: str, series: dict[str, Any], base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    base = base_of(name)
    pipe = base.load()
    plain = draw(pipe, name)
    adapt(pipe, PARTS[name], **series)
    for part in PARTS[name]:
        bank = bank_of(getattr(pipe, part))
        assert bank is not None
        bank.set_adapters(["default"], 0.8)
    live, before = draw(pipe, name), fingerprint(pipe)
    path = export_checkpoint(pipe, base.file, tmp_path / "new" / "merged.safetensors")
    assert path == tmp_path / "new" / "merged.safetensors"
    assert [p.name for p in path.parent.iterdir()] == ["merged.safetensors"]
    assert_unchanged(pipe, before)
    fuse_oft(pipe)
    picture = draw(base.load(path), name)
    assert distance(picture, draw(pipe, name)) < ROUNDING
    assert distance(picture, live) < 10 * ROUNDING
    assert distance(picture, plain) > 1e-2


@pytest.mark.parametrize("name", [SD, XL])
def test_only_tensors_of_adapted_layers_change(name: str, base_of: Callable[[str], Base], tmp_path: Path) -> None:
    base = base_of(name)
    pipe = base.load()
    adapt(pipe, PARTS[name], lambda layer: layer.endswith(("to_q", "q_proj", "conv1")))
    old = load_file(base.file)
    path = export_checkpoint(pipe, base.file, tmp_path / "merged.safetensors")
    new = load_file(path)
    assert list(new) == list(old)
    touched = set()
    for part in PARTS[name]:
        layers = [layer for layer in layers_of(pipe, part) if layer.endswith(("to_q", "q_proj", "conv1"))]
        touched |= set(checkpoint_names(describe(pipe_modules(pipe)), part, layers, old))
    assert {key for key in old if not torch.equal(old[key], new[key])} == touched
    assert all(new[key].dtype == old[key].dtype for key in old)
    fused = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    if name == XL:  # OpenCLIP's, of whose rows q's are the first third
        assert fused in touched
        rows = len(old[fused]) // 3
        assert not torch.equal(new[fused][:rows], old[fused][:rows])
        assert torch.equal(new[fused][rows:], old[fused][rows:])
    told = metadata(path)
    note = json.loads(told.pop(EXPORT_KEY))
    assert told == metadata(base.file)
    assert (note["format"], note["file"]) == ("checkpoint", "base.safetensors")
    assert note["adapters"]["unet"] == [{"name": "default", "strength": 1.0, "mode": "rotation"}]
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def pipe_modules(pipe: Any) -> dict[str, nn.Module]:
    return {part: module for part, module in pipe.components.items() if isinstance(module, nn.Module)}


def native_file(pipe: Any, part: str, path: Path, prefix: str = "") -> dict[str, Meaning]:
    """A denoiser as a file of native names, and what lies in each of its tensors."""
    about, layers = describe(pipe_modules(pipe)), layers_of(pipe, part)
    names: dict[str, Meaning] = {}
    for layer in layers:  # of any file that has all names
        names |= checkpoint_names(about, part, [layer], _Any(prefix))
    tensors = {}
    for name, meaning in names.items():
        own = [weight(layers[layer]) for layer in meaning.layers]
        whole = own[0].new_zeros(sum(map(len, own)), *own[0].shape[1:])
        for leaf, tensor in zip(meaning.leaves, own, strict=True):
            leaf.put(whole, tensor)
        tensors[name] = whole
    save_file({**tensors, "other": torch.arange(7)}, path)
    return names


class _Any(set):
    def __init__(self, prefix: str) -> None:
        super().__init__()
        self.prefix = prefix

    def __contains__(self, name: object) -> bool:
        return str(name).startswith(self.prefix)


@pytest.mark.parametrize("name", [SD3, FLUX])
@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_fused_and_swapped_rows(name: str, prefix: str, tmp_path: Path) -> None:
    pipe = tiny_family(name, tmp_path)
    names = native_file(pipe, "transformer", tmp_path / "base.safetensors", prefix)
    adapt(pipe, ["transformer"], lambda layer: "to_k" not in layer)
    path = export_checkpoint(pipe, tmp_path / "base.safetensors", tmp_path / "merged.safetensors")
    old, new = load_file(tmp_path / "base.safetensors"), load_file(path)
    assert torch.equal(new["other"], old["other"])
    base = {layer: weight(module).clone() for layer, module in layers_of(pipe, "transformer").items()}
    fuse_oft(pipe)
    seen = 0
    for key, meaning in names.items():
        for leaf in meaning.leaves:
            fused = weight(layers_of(pipe, "transformer")[leaf.layer])
            assert distance(leaf.take(new[key]), fused) < 1e-6
            assert torch.equal(leaf.take(new[key]), base[leaf.layer]) == ("to_k" in leaf.layer)
            seen += len(leaf.rows or ()) > 1
    assert seen > 0


@pytest.mark.thinned(5)
@pytest.mark.parametrize("file_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pipe_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_precisions_may_differ(
    file_dtype: torch.dtype, pipe_dtype: torch.dtype, base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    base = base_of(XL)

    def cast(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: t.to(file_dtype) for key, t in tensors.items() if t.is_floating_point()})

    file = rewritten(base.file, tmp_path / "base.safetensors", cast)
    pipe = base.load(dtype=pipe_dtype)
    adapt(pipe, PARTS[XL])
    new = load_file(export_checkpoint(pipe, file, tmp_path / "merged.safetensors"))
    assert {t.dtype for t in new.values() if t.is_floating_point()} == {file_dtype}
    exact = base.load()
    adapt(exact, PARTS[XL])
    best = load_file(export_checkpoint(exact, base.file, tmp_path / "exact.safetensors"))
    # As exact as the file's own precision allows, whatever the pipeline's is.
    for key, wanted in best.items():
        error = float((new[key].float() - wanted.float()).norm())
        assert error <= 2 * torch.finfo(file_dtype).eps * float(wanted.float().norm()) + 1e-6, key


def test_of_a_large_file_little_is_in_memory(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        pytest.skip("no way to measure memory here")

    def peak() -> int:
        [line] = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    base, size = base_of(SD), 300 * 2**20
    file = rewritten(
        base.file, tmp_path / "base.safetensors", lambda t: t.update(large=torch.zeros(size, dtype=torch.uint8))
    )
    pipe = base.load()
    adapt(pipe, PARTS[SD])
    clear.write_text("5")  # begins the measuring anew
    before = peak()
    path = export_checkpoint(pipe, file, tmp_path / "merged.safetensors")
    assert path.stat().st_size > size
    assert peak() - before < size / 4


def refused(pipe: Any, file: Path, target: Path, *words: str, kind: Any = AdapterFileError) -> None:
    before = {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()}
    with pytest.raises(kind) as error:
        export_checkpoint(pipe, file, target)
    assert_one_sentence(error, *words)
    assert {path: path.read_bytes() for path in target.parent.rglob("*") if path.is_file()} == before


def test_another_base_is_refused(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    base, target = base_of(SD), tmp_path / "merged.safetensors"
    pipe = base.load()
    adapt(pipe, PARTS[SD], lambda layer: layer.endswith(("to_q", "q_proj")))
    touched = "model.diffusion_model.output_blocks.{}.1.transformer_blocks.0.attn1.to_q.weight"

    def change(keys: list[str], by: float) -> Path:
        def apply(tensors: dict[str, Tensor]) -> None:
            for key in keys:
                tensors[key].view(-1)[3] += by

        return rewritten(base.file, tmp_path / "other.safetensors", apply)

    # The first in the file that differs is named.
    first, second = touched.format(2), touched.format(3)
    order = [key for key in load_file(base.file) if key in (first, second)]
    refused(pipe, change([first, second], 1e-3), target, "other.safetensors is not the base", order[0], "0.001 apart")
    refused(pipe, change([first], 1e-6), target, first, "up_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q")
    # What the adapter does not touch may differ: the file's stays.
    free = touched.format(2).replace("to_q", "to_k")
    new = load_file(export_checkpoint(pipe, change([free], 1.0), target))
    assert float((new[free] - load_file(base.file)[free]).abs().max()) == pytest.approx(1.0)


def test_of_two_components_of_one_name_one_is_written(tmp_path: Path) -> None:
    pipe = tiny_family("WanPipeline", tmp_path)
    native_file(pipe, "transformer_2", tmp_path / "base.safetensors")
    adapt(pipe, ["transformer", "transformer_2"], lambda layer: layer != "patch_embedding")
    target = tmp_path / "merged.safetensors"
    refused(pipe, tmp_path / "base.safetensors", target, "transformer and of transformer_2", kind=TargetError)
    with pytest.raises(AdapterFileError) as error:
        export_checkpoint(pipe, tmp_path / "base.safetensors", target, components=["transformer"])
    assert_one_sentence(error, "is not the base of this pipeline")
    path = export_checkpoint(pipe, tmp_path / "base.safetensors", target, components=["transformer_2"])
    fuse_oft(pipe)
    name = "model.diffusion_model.blocks.0.self_attn.q.weight"
    assert distance(load_file(path)[name], weight(pipe.transformer_2.blocks[0].attn1.to_q)) < 1e-6


def test_files_that_cannot_be_merged_are_refused(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    base, target = base_of(SD), tmp_path / "merged.safetensors"
    pipe = base.load()
    refused(pipe, base.file, target, "no adapter acts", kind=AdapterError)
    refused(pipe.unet, base.file, target, "is no pipeline", kind=AdapterError)
    adapt(pipe, PARTS[SD])
    refused(pipe, tmp_path / "absent.safetensors", target, "absent.safetensors cannot be read")
    refused(pipe, tmp_path / "base.ckpt", target, "base.ckpt")
    refused(pipe, base.file, tmp_path / "merged.pt", "merged.pt", "merged.safetensors")
    refused(pipe, base.file, tmp_path / "no" / "parent.safetensors" / "x", kind=AdapterFileError)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(base.file.read_bytes())
    refused(pipe, copy, copy, "is the base itself")
    copy.write_bytes(base.file.read_bytes()[:-1])
    refused(pipe, copy, target, "copy.safetensors cannot be read")
    key = "model.diffusion_model.input_blocks.0.0.weight"
    rewritten(base.file, copy, lambda tensors: tensors.update({key: tensors[key].to(torch.float8_e4m3fn)}))
    refused(pipe, copy, target, key, "F8_E4M3")
    rewritten(base.file, copy, lambda tensors: tensors.update({key: tensors[key][:, :1].contiguous()}))
    refused(pipe, copy, target, key, "(32, 1, 3, 3) instead of (32, 4, 3, 3)")
    rewritten(base.file, copy, lambda tensors: tensors.pop(key))
    refused(pipe, copy, target, "copy.safetensors lacks 1 tensors of unet", key)
    fuse_oft(pipe)
    refused(pipe, base.file, target, "is merged", kind=AdapterError)
    other = tiny_family("PixArtSigmaPipeline", tmp_path)
    adapt(other, ["transformer"])
    refused(other, base.file, target, "PixArt", kind=TargetError)


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("where", ["amid", "at the end"])
def test_a_file_that_breaks_off_leaves_nothing(
    stop: BaseException, where: str, base_of: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_of(SD)
    pipe = base.load()
    adapt(pipe, PARTS[SD])
    copied = 0

    def copy(reader: Any, writer: Any, count: int) -> None:
        nonlocal copied
        writer.write(reader.read(count))
        copied += 1
        if copied == 20:
            raise stop

    def sync(handle: int) -> None:
        raise stop

    (tmp_path / "merged.safetensors").write_bytes(b"old")
    monkeypatch.setattr(*((checkpoint, "_copy", copy) if where == "amid" else (os, "fsync", sync)))
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else AdapterFileError) as error:
        export_checkpoint(pipe, base.file, tmp_path / "merged.safetensors")
    if isinstance(stop, OSError):
        assert_one_sentence(error, "merged.safetensors cannot be written", "No space left")  # type: ignore[arg-type]
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("merged.safetensors", b"old")]


# Folders


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("keep_base", "series"), [("cpu", {}), ("disk", {}), ("cpu", SERIES)], ids=["cpu", "disk", "another series"]
)
@pytest.mark.parametrize("name", [SD, XL])
def test_a_merged_folder_draws_what_is_fused(
    name: str, keep_base: Any, series: dict[str, Any], base_of: Callable[[str], Base], tmp_path: Path
) -> None:
    pipe = base_of(name).load()
    plain = draw(pipe, name)
    adapt(pipe, PARTS[name], **series)
    live, before = draw(pipe, name), fingerprint(pipe)
    folder = export_folder(pipe, tmp_path / "new" / "merged", keep_base=keep_base)
    assert folder == tmp_path / "new" / "merged"
    assert [p.name for p in folder.parent.iterdir()] == ["merged"]
    assert folder.stat().st_mode == folder.parent.stat().st_mode
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe, name), live)
    merged = type(pipe).from_pretrained(folder)
    merged.set_progress_bar_config(disable=True)
    fuse_oft(pipe)
    assert distance(draw(merged, name), draw(pipe, name)) < ROUNDING
    assert distance(draw(merged, name), plain) > 1e-2


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_folder_that_breaks_off_leaves_nothing(
    stop: BaseException, base_of: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = base_of(SD).load()
    adapt(pipe, PARTS[SD])
    before, live = fingerprint(pipe), draw(pipe, SD)
    save = type(pipe).save_pretrained

    def breaks_off(self: Any, folder: Any, **options: Any) -> None:
        save(self, folder, **options)
        raise stop

    monkeypatch.setattr(type(pipe), "save_pretrained", breaks_off)
    with pytest.raises(KeyboardInterrupt if isinstance(stop, KeyboardInterrupt) else AdapterFileError):
        export_folder(pipe, tmp_path / "merged")
    assert not list(tmp_path.iterdir())
    assert_unchanged(pipe, before)
    assert torch.equal(draw(pipe, SD), live)


def test_folders_that_cannot_be_written_are_refused(base_of: Callable[[str], Base], tmp_path: Path) -> None:
    from peft import LoraConfig

    pipe = base_of(SD).load()

    def refused_folder(kind: Any, *words: str, folder: Path = tmp_path / "merged") -> None:
        listed = set(tmp_path.rglob("*"))
        with pytest.raises(kind) as error:
            export_folder(pipe, folder)
        assert_one_sentence(error, *words)
        assert set(tmp_path.rglob("*")) == listed

    refused_folder(AdapterError, "no adapter acts")
    adapt(pipe, PARTS[SD])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    refused_folder(AdapterFileError, "full is there already", folder=tmp_path / "full")
    refused_folder(AdapterFileError, "mine is there already", folder=tmp_path / "full" / "mine")
    refused_folder(AdapterFileError, "cannot be written", folder=tmp_path / "full" / "mine" / "inside")
    (tmp_path / "empty").mkdir()
    assert list(export_folder(pipe, tmp_path / "empty").glob("model_index.json"))
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "style")
    refused_folder(AdapterError, "a LoRA is loaded into unet")
