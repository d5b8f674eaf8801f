"""Weights that come layer by layer: the same answers and gradients to the bit, and two weights there at once."""

from __future__ import annotations

import copy
import importlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from safetensors.torch import load
from torch import Tensor, nn

from benchmarks.full_size import full_size
from oft_diffusion import OFTConfig, inject_oft, remove_oft
from oft_diffusion.errors import TargetError
from oft_diffusion.load import load_pipeline
from oft_diffusion.streaming import Homes, StreamedForward, stream_weights, streamed_bytes, streamed_layers
from oft_diffusion.training import TrainConfig, estimate, prepare, train
from oft_diffusion.training.count import count
from oft_diffusion.training.find import find_base
from tests.helpers.two_devices import pretend_two_devices
from tests.library.support import assert_one_sentence, excite
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
def test_each_weight_is_sent_once_for_its_forward_and_its_backward(
    kind: str, checkpointed: bool, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet = denoiser(kind, model, tmp_path)
    stream_weights(unet, 1.0, WHERE)
    adapted(unet)
    if checkpointed:
        unet.enable_gradient_checkpointing()
    forwards = streamed(unet)
    (stream,) = {forward.stream for forward in forwards}
    events: list[tuple[str, StreamedForward]] = []
    send, take = stream._send, stream.take

    def sending(owner: StreamedForward, place: Any) -> None:
        events.append(("sent", owner))
        send(owner, place)

    def taking(owner: StreamedForward, *, backward: bool) -> Tensor:
        data = take(owner, backward=backward)
        assert torch.equal(data.view(torch.uint8).cpu(), owner.home.view(torch.uint8))
        events.append(("taken", owner))
        return data

    monkeypatch.setattr(stream, "_send", sending)
    monkeypatch.setattr(stream, "take", taking)
    for _ in range(3):  # the third knows all that follows
        events.clear()
        unet(*inputs(torch.float32)).sample.sum().backward()
    taken = [owner for what, owner in events if what == "taken"]
    sent = [owner for what, owner in events if what == "sent"]
    turns = [owner for i, owner in enumerate(taken) if i == 0 or taken[i - 1] is not owner]
    assert set(taken) == set(forwards)
    # Each turn's weight is sent while the one before is used, unless it is there from the turn before that.
    before = [turns[-1], *turns[:-1]]
    after = [*turns[1:], turns[0]]
    assert sent == [owner for old, owner in zip(before, after, strict=True) if owner is not old]
    held = sum(place.memory.nbytes for place in stream._places)
    assert held == pytest.approx(2 * max(forward.home.nbytes for forward in forwards), abs=1024)
    assert streamed_bytes(unet) == pytest.approx(sum(forward.home.nbytes for forward in forwards) - held, abs=1024)
    assert held < streamed_bytes(unet)


def test_on_a_card_copies_and_work_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place is written to after the work with what was there, and worked with after it was written to."""
    log: list[tuple[str, str, str]] = []  # on which stream, what, of which

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> tuple[str, int]:
            log.append((self.name, "record", ""))
            return self.name, len(log) - 1

        def wait_event(self, event: tuple[str, int]) -> None:
            log.append((self.name, "wait", str(event[1])))

    main, side = Stream("main"), Stream("side")
    net = nn.Sequential(nn.ModuleList(nn.Linear(8, 8, bias=False) for _ in range(4))).requires_grad_(False)
    stream_weights(net, 1.0, torch.device("cpu"))
    forwards = streamed(net)
    stream = forwards[0].stream
    stream._side = side  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    send = stream._send

    def sending(owner: StreamedForward, place: Any) -> None:
        send(owner, place)
        log.append(("side", f"copied into {id(place)}", str(forwards.index(owner))))

    monkeypatch.setattr(stream, "_send", sending)
    for _ in range(2):
        for forward in forwards:
            stream.take(forward, backward=False)
            log.append(("main", f"works with {id(stream._places[0])}", str(forwards.index(forward))))
    ready: dict[str, int] = {"main": -1, "side": -1}  # up to where each knows the other to be done
    last_work: dict[str, int] = {}
    last_copy: dict[str, int] = {}
    for i, (who, what, which) in enumerate(log):
        if what == "wait":
            ready[who] = max(ready[who], int(which))
        elif what.startswith("copied into"):
            place = what.rpartition(" ")[2]
            assert last_work.get(place, -1) <= ready["side"], f"{i}: overwritten while in use"
            last_copy[place] = i
        elif what.startswith("works with"):
            place = what.rpartition(" ")[2]
            # the event is recorded right before the copy is noted here
            assert last_copy[place] - 1 <= ready["main"], f"{i}: used before it was there"
            last_work[place] = i
    assert sum(what.startswith("copied") for _, what, _ in log) == 9  # the next round's first, too


def test_weights_wait_in_large_pieces_that_lie_as_they_did() -> None:
    homes = Homes(WHERE)
    tensors = [torch.randn(24, 16).t(), torch.arange(7, dtype=torch.int8), torch.randn(5, 3).to(torch.float8_e4m3fn)]
    copies = [homes.copy(tensor) for tensor in tensors]
    for tensor, copied in zip(tensors, copies, strict=True):
        assert (copied.dtype, copied.shape, copied.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert torch.equal(copied.float(), tensor.float())
        assert copied.is_pinned() is (DEVICE == "cuda")
    if DEVICE == "cuda":
        assert len({copied.untyped_storage().data_ptr() for copied in copies}) == 1


@pytest.fixture
def two_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_two_devices(monkeypatch)


@pytest.mark.usefixtures("two_devices")
@pytest.mark.skipif(DEVICE == "cuda", reason="a card has two devices by itself")
@pytest.mark.parametrize("kind", KINDS)
def test_nobody_reads_a_weight_that_is_away(kind: str, model: Path, tmp_path: Path) -> None:
    wanted = answer(adapted(denoiser(kind, model, tmp_path)), torch.float32)
    unet = denoiser(kind, model, tmp_path)
    stream_weights(unet, 1.0, WHERE)
    adapted(unet).enable_gradient_checkpointing()
    for _ in range(2):
        for own, want in zip(answer(unet, torch.float32), wanted, strict=True):
            assert torch.equal(own, want)
    assert all(forward.weight.bulk().is_meta for forward in streamed(unet))


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


def test_a_bias_that_is_trained_is_refused(model: Path, tmp_path: Path) -> None:
    unet = denoiser(PLAIN, model, tmp_path)
    stream_weights(unet, 1.0, WHERE)
    adapted(unet)
    own = next(forward.weight.layer for forward in streamed(unet) if forward.weight.layer.bias is not None)
    own.bias.requires_grad_()
    with pytest.raises(TargetError) as error:
        unet(*inputs(torch.float32))
    assert_one_sentence(error, "bias that is trained", "layer_offload")


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


@pytest.mark.thinned(3)
@pytest.mark.usefixtures("as_on_a_card", "two_devices")
@pytest.mark.skipif(DEVICE == "cuda", reason="a card has two devices by itself")
@pytest.mark.parametrize("kind", [*ON_A_PROCESSOR, GGUF])
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
    grids = [files[1] for _, files in runs]
    assert grids[0] == grids[1]


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


def test_what_bitsandbytes_puts_on_a_card_first_is_counted(model: Path, pictures: Path, tmp_path: Path) -> None:
    for kind in ("nf4", "torchao-int8"):
        config = settings(kind, model, pictures, tmp_path, layer_offload=0.5)
        found = count(config, find_base(config.model))
        assert found.arriving == (found.parts["unet"] if kind == "nf4" else 0)
    memory = estimate(replace(config, quantization=None, text_encoder_quantization=None)).memory
    loading = replace(memory, arriving=2 * memory.peak)
    assert (loading.peak, loading.beside, loading.peak_is_loading) == (2 * memory.peak, 0, True)


def test_of_what_was_saved_in_few_bits_that_share_is_counted(model: Path, pictures: Path, tmp_path: Path) -> None:
    config = settings("nf4", model, pictures, tmp_path, layer_offload=1.0, quantization=None)
    base = find_base(config.model)
    plain = count(config, base)
    told = {**base.parts, "unet": {**base.parts["unet"], "quantization_config": {"quant_method": "bitsandbytes"}}}
    others = {**told, "unet": {**told["unet"], "quantization_config": {"quant_method": "torchao"}}}
    files = tmp_path / "saved"
    (files / "unet").mkdir(parents=True)
    (files / "unet" / "model.safetensors").write_bytes(bytes(plain.parts["unet"] // 4))
    found = count(config, replace(base, parts=told, weights=files))
    assert found.parts["unet"] == found.arriving == plain.parts["unet"] // 4
    assert plain.streamed / 5 < found.streamed < plain.streamed / 3
    assert count(config, replace(base, parts=others, weights=files)).arriving == 0  # goes there layer by layer


def test_on_a_processor_it_does_nothing_and_says_so(model: Path, pictures: Path, tmp_path: Path) -> None:
    if DEVICE == "cuda":
        pytest.skip("on a card it does something")
    notes: list[str] = []
    config = settings("nf4", model, pictures, tmp_path, layer_offload=1.0, steps=1, validation_prompts=[])
    with train(config, progress=False, on_note=notes.append) as run:
        assert run.parts is not None
        assert not streamed(run.parts.family.denoiser)
    assert "without a CUDA card this does nothing: layer_offload = 1.0" in notes
