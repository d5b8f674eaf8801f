"""Weights that come layer by layer: the same answers and gradients to the bit, and two weights there at once."""

from __future__ import annotations

import copy
import importlib
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks.full_size import full_size
from oft_diffusion import OFTConfig, inject_oft, remove_oft
from oft_diffusion.load import load_pipeline
from oft_diffusion.streaming import StreamedForward, stream_weights, streamed_bytes, streamed_layers
from oft_diffusion.training import TrainConfig, estimate, prepare, train
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base
from tests.library.support import excite
from tests.quantization.backends import DEVICE, GGUF, ON_A_PROCESSOR, denoiser_knobs, settings
from tests.quantization.test_numerics import answer, inputs

PLAIN = "plain"
KINDS = [*ON_A_PROCESSOR, GGUF, PLAIN]
WHERE = torch.device(DEVICE)


def denoiser(kind: str, model: Path, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    knobs = {} if kind == PLAIN else denoiser_knobs(kind, model, folder)
    return load_pipeline(model, dtype, DEVICE, **knobs).unet.requires_grad_(False).train()


def adapted(unet: Any) -> Any:
    excite(inject_oft(unet, OFTConfig(block_size=16)), norm=0.3)
    return unet


def streamed(module: nn.Module) -> list[StreamedForward]:
    own = (layer.__dict__.get("forward") for layer in module.modules())
    return [forward for forward in own if isinstance(forward, StreamedForward)]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_answers_and_gradients_are_those_without(
    kind: str, share: float, checkpointed: bool, model: Path, tmp_path: Path
) -> None:
    unet = adapted(denoiser(kind, model, tmp_path))
    if checkpointed:
        unet.enable_gradient_checkpointing()
    wanted = answer(unet, torch.float32)
    remove_oft(unet)
    stream_weights(unet, share, WHERE)
    adapted(unet)
    homes = {forward: forward.home for forward in streamed(unet)}
    for _ in range(3):  # the second knows what follows, the third what follows between steps
        for own, want in zip(answer(unet, torch.float32), wanted, strict=True):
            assert torch.equal(own, want)
        for forward, home in homes.items():
            bulk = forward.weight.bulk()
            assert bulk.device.type == "cpu"
            assert bulk.data_ptr() == home.data_ptr()
    remove_oft(unet)
    assert len(streamed(unet)) == len(homes)
    with torch.no_grad():
        unet(*inputs(torch.float32))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", PLAIN])
def test_two_weights_are_there_at_once_and_none_is_sent_for_in_vain(
    kind: str, checkpointed: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = denoiser(kind, model, tmp_path)
    stream_weights(unet, 1.0, WHERE)
    adapted(unet)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    forwards = streamed(unet)
    (stream,) = {forward.stream for forward in forwards}
    there: list[Any] = []
    most, sent, taken = list[int](), Counter[StreamedForward](), Counter[StreamedForward]()
    send_for, take = stream._send_for, stream.take

    def sending(owner: StreamedForward) -> Any:
        sent[owner] += 1
        coming = send_for(owner)
        there.append(weakref.ref(coming.data.untyped_storage()))
        alive = [storage for own in there if (storage := own()) is not None]
        assert len(alive) <= 2
        most.append(sum(storage.nbytes() for storage in alive))
        return coming

    def taking(owner: StreamedForward, *, backward: bool) -> Tensor:
        taken[owner] += 1
        return take(owner, backward=backward)

    monkeypatch.setattr(stream, "_send_for", sending)
    monkeypatch.setattr(stream, "take", taking)
    for _ in range(3):
        sent.clear()
        taken.clear()
        unet(*inputs(torch.float32)).sample.sum().backward()
    assert all(0 < sent[forward] <= taken[forward] for forward in forwards)
    assert sent.total() <= taken.total()
    assert max(most) <= 2 * max(forward.home.nbytes for forward in forwards) < streamed_bytes(unet) / 2


def test_which_layers_are_streamed() -> None:
    for name, share_of_all in {"Flux.1": 0.99, "SD 3.5 Large": 0.99, "SDXL": 0.86}.items():
        model = next(m for m in full_size(name, "meta", torch.bfloat16).values() if _denoises(m))
        every = list(streamed_layers(model, 1.0))
        numbers = sum(layer.weight.numel() for layer in every)
        assert numbers > share_of_all * sum(p.numel() for p in model.parameters())
        first = next(model.parameters())  # by which others tell where a component is
        assert all(layer.weight is not first for layer in every)
        for share in (0.1, 0.5, 0.75):
            some, owed = set(streamed_layers(model, share)), 0.0
            for layer in every:  # spread, so that one is on its way while others work
                owed += (share - (layer in some)) * layer.weight.numel()
                assert abs(owed) <= max(layer.weight.numel() for layer in every)
            assert some < set(every)


def _denoises(module: nn.Module) -> bool:
    return isinstance(module, ModelMixin) and "Autoencoder" not in type(module).__name__


def test_copies_have_weights_of_their_own(model: Path, tmp_path: Path) -> None:
    unet = denoiser("int8", model, tmp_path)
    wanted = unet(*inputs(torch.float32)).sample
    stream_weights(unet, 1.0, WHERE)
    unet(*inputs(torch.float32))
    copied = copy.deepcopy(unet)
    assert {f.stream for f in streamed(copied)}.isdisjoint(f.stream for f in streamed(unet))
    assert all(f.weight.layer in set(copied.modules()) for f in streamed(copied))
    for forward in streamed(unet):
        forward.home.zero_()
    assert torch.equal(copied(*inputs(torch.float32)).sample, wanted)


# -- in training, as if a processor were a card -----------------------------------------------------------------------


@pytest.fixture
def as_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (prepare, importlib.import_module(estimate.__module__)):
        monkeypatch.setattr(module, "streams", lambda config, _: bool(config.layer_offload))


def trained(config: TrainConfig) -> tuple[list[float], list[bytes]]:
    """Losses, and the adapter and the last grid."""
    with train(config, progress=False) as run:
        losses = [step.loss for step in run]
    return losses, [run.result.adapter.read_bytes(), run.result.pictures[-1].read_bytes()]


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("kind", ["nf4", GGUF])
def test_a_run_learns_the_same(kind: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    common = {"prior_preservation": True, "num_class_images": 2, "text_encoder": False}
    caches = {"cache_text_embeddings": True, "drop_encoders": True, "gradient_checkpointing": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        runs = [
            trained(settings(kind, model, pictures, Path(name), **common, **caches, **own))
            for name, own in {"whole": {}, "streamed": {"layer_offload": 1.0}}.items()
        ]
    assert runs[0][0] == runs[1][0]
    whole, own = (load(files[0]) for _, files in runs)
    assert whole.keys() == own.keys()
    assert all(torch.equal(whole[key], own[key]) for key in whole)


@pytest.mark.usefixtures("as_on_a_card")
@pytest.mark.parametrize("kind", [*ON_A_PROCESSOR, PLAIN])
def test_what_is_counted_off_the_card_is_what_waits(kind: str, model: Path, pictures: Path, tmp_path: Path) -> None:
    own = {"quantization": None, "text_encoder_quantization": None} if kind == PLAIN else {}
    config = settings("nf4" if kind == PLAIN else kind, model, pictures, tmp_path, layer_offload=0.6, **own)
    base = find_base(config.model)
    family = prepare.load_family(config, base, torch.device("cpu"))
    waiting = streamed_bytes(family.denoiser)
    assert waiting > 0
    assert count(config, base).streamed == pytest.approx(waiting, rel=0.02)


@pytest.mark.usefixtures("as_on_a_card")
def test_the_estimate_leaves_out_what_waits(model: Path, pictures: Path, tmp_path: Path) -> None:
    whole, streamed = (
        estimate(settings("nf4", model, pictures, tmp_path / str(share), layer_offload=share)).memory
        for share in (0.0, 1.0)
    )
    config = settings("nf4", model, pictures, tmp_path, layer_offload=1.0)
    assert streamed.base == whole.base
    assert streamed.parked - whole.parked == count(config, find_base(config.model)).streamed > 0


def test_on_a_processor_it_does_nothing_and_says_so(model: Path, pictures: Path, tmp_path: Path) -> None:
    if DEVICE == "cuda":
        pytest.skip("on a card it does something")
    notes: list[str] = []
    config = settings("nf4", model, pictures, tmp_path, layer_offload=1.0, steps=1, validation_prompts=[])
    with train(config, progress=False, on_note=notes.append) as run:
        assert run.parts is not None
        assert not streamed(run.parts.family.denoiser)
    assert "without a CUDA card this does nothing: layer_offload = 1.0" in notes
