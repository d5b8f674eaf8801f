"""What `load_oft_weights` refuses, in one sentence each, and that the pipeline is then as it was."""

import json
import shutil

import pytest
import torch

from oft_diffusion import (
    OFTConfig,
    inject_oft,
    list_oft_adapters,
    load_oft_weights,
    oft_state_dict,
    save_oft_weights,
    unload_oft_weights,
)
from oft_diffusion.errors import AdapterError, AdapterFileError, ConfigError
from oft_diffusion.files import load_adapter_file, save_adapter_file
from oft_diffusion.formats.guess import guessed_base
from oft_diffusion.metadata import AdapterMetadata
from tests.helpers.tiny_families import tiny_family
from tests.library.support import (
    BOTH,
    assert_loading_refused,
    assert_one_sentence,
    assert_unchanged,
    copy_pipe,
    distance,
    draw,
    excite,
    fingerprint,
    tiny_unet,
    with_metadata,
)
from tests.peers import algebra, onetrainer, peft_oft

# Files that do not fit


@pytest.mark.parametrize("part", BOTH)
@pytest.mark.parametrize("loaded_before", [False, True])
def test_another_architecture_is_named(pipe, mug, plain, tmp_path, part, loaded_before):
    if loaded_before:
        load_oft_weights(pipe, plain)
    path = tmp_path / "mug.safetensors"
    shutil.copy(mug, path)
    classes = dict.fromkeys(BOTH, None) | load_adapter_file(mug).metadata.base["components"]
    with_metadata(path, {"base": {"name": "x", "components": {**classes, part: "FluxTransformer2DModel"}}})
    assert_loading_refused(pipe, path, "mug.safetensors", "FluxTransformer2DModel", type(getattr(pipe, part)).__name__)


@pytest.mark.parametrize("kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline"])
def test_both_pipelines_are_named(mug, tmp_path, kind):
    """Of Stable Diffusion 1 and XL the components have the same classes."""
    other = tiny_family(kind, tmp_path)
    with pytest.raises(AdapterFileError) as error:
        load_oft_weights(other, mug)
    assert_one_sentence(error, "mug.safetensors", "a StableDiffusionPipeline (", kind)
    assert list_oft_adapters(other) == []


def test_options_that_would_do_nothing(pipe, mug, tmp_path):
    assert_loading_refused(pipe, mug, "component='unet'", "mug.safetensors", kind=ConfigError, component="unet")
    assert_loading_refused(pipe, mug, "weight_name='x.safetensors'", weight_name="x.safetensors")
    assert load_oft_weights(pipe, mug, weight_name=mug.name).matched > 0
    unload_oft_weights(pipe)
    for source in (None, {"a": torch.zeros(1)}, 3):
        assert_loading_refused(pipe, source, "no place of an adapter")


def test_a_missing_component_is_named(pipe, plain, tmp_path):
    file = load_adapter_file(plain)
    configs = {"transformer": OFTConfig(block_size=8), "text_encoder": file.metadata.components["text_encoder"]}
    states = {"transformer": file.components["unet"], "text_encoder": file.components["text_encoder"]}
    path = save_adapter_file(tmp_path / "flux.safetensors", states, AdapterMetadata(configs))
    assert_loading_refused(
        pipe, path, "flux.safetensors", "'transformer'", "StableDiffusionPipeline", "vae, text_encoder, unet"
    )
    pipe.text_encoder = None
    assert_loading_refused(pipe, plain, "plain.safetensors", "'text_encoder'")
    for part in ("scheduler", "tokenizer"):
        path = save_adapter_file(
            tmp_path / "odd.safetensors", {part: file.components["unet"]}, AdapterMetadata({part: OFTConfig(8)})
        )
        assert_loading_refused(pipe, path, "odd.safetensors", repr(part))


@pytest.mark.parametrize("loaded_before", [False, True])
@pytest.mark.parametrize("width", [16, 24])
def test_another_size_names_the_first_three_mismatches(pipe, make, mug, plain, loaded_before, width):
    if loaded_before:
        load_oft_weights(pipe, plain, strength=0.7)
    pipe.unet = tiny_unet(width=width) if not loaded_before else pipe.unet
    if loaded_before:
        other = copy_pipe(make.base)
        other.unet = tiny_unet(width=width)
        for part in BOTH:
            excite(inject_oft(getattr(other, part), OFTConfig(block_size=8), "a"), "a")
        mug = save_oft_weights(other, make.folder / f"other-{width}", "a")
    message = assert_loading_refused(pipe, mug, mug.name, "unet", "shape", "mismatch(es)", "; ...")
    assert message.count("has shape") == 3


def test_a_block_size_that_does_not_divide_names_the_file(pipe, make):
    wide = make("wide", parts=("unet",), config=OFTConfig(block_size=16))
    pipe.unet = tiny_unet(width=24)
    assert_loading_refused(pipe, wide, "wide.safetensors", "unet", "divide its 24 features", "16")


def without_layer(file, path, part, becomes=None):
    """The file less one layer of a component, or with that layer under another name."""
    states = {name: dict(state) for name, state in file.components.items()}
    first = next(iter(states[part]))
    tensor = states[part].pop(first)
    if becomes is not None:
        states[part][f"{becomes}.oft_R.weight"] = tensor
    return save_adapter_file(path, states, file.metadata)


@pytest.mark.parametrize("name", ["down_blocks.9.to_q", "conv_norm_out", "conv_in.lora_A", "time_embedding", ""])
def test_other_layers_than_the_models(pipe, plain, tmp_path, name):
    path = without_layer(load_adapter_file(plain), tmp_path / "odd.safetensors", "unet", becomes=name)
    assert_loading_refused(pipe, path, "odd.safetensors", name, "1 of 32 layers", "UNet2DConditionModel")


def test_a_file_of_a_time_when_its_target_set_had_fewer_layers(pipe, plain, tmp_path, base_pipe):
    path = without_layer(load_adapter_file(plain), tmp_path / "old.safetensors", "unet")
    assert load_adapter_file(path).metadata.components["unet"].targets == "attention"
    adapter = load_oft_weights(pipe, path)
    stored = load_adapter_file(path).components["unet"]
    found = oft_state_dict(pipe.unet, adapter.name)
    assert found.keys() == stored.keys()
    assert len(found) == 31
    assert distance(draw(pipe), draw(base_pipe)) > 0.01


@pytest.mark.parametrize("targets", [[r"(([a-z_]|\d|\.)+)+!"], ["("], [r"blocks\.\d+\.qkv"], "a-set-of-tomorrow"])
def test_a_files_patterns_are_information_and_never_run(pipe, plain, tmp_path, base_pipe, targets):
    # The first, if it were ever matched against a layer's name, would hold this test up for ever.
    path = tmp_path / "plain.safetensors"
    shutil.copy(plain, path)
    config = {**OFTConfig(block_size=8).to_dict(), "targets": targets}
    with_metadata(path, {"components": dict.fromkeys(BOTH, config)})
    load_oft_weights(pipe, path)
    reference = copy_pipe(base_pipe)
    load_oft_weights(reference, plain)
    assert torch.equal(draw(pipe), draw(reference))


def test_a_failure_in_the_last_component_takes_the_first_one_back(pipe, plain, mug, tmp_path):
    file = load_adapter_file(plain)
    for broken in BOTH:
        without_layer(file, tmp_path / f"{broken}.safetensors", broken, becomes="nowhere")
        assert_loading_refused(pipe, tmp_path / f"{broken}.safetensors", f"{broken}.safetensors", "nowhere")
    load_oft_weights(pipe, mug, adapter_name="mug", strength=0.5)
    for broken in BOTH:
        assert_loading_refused(pipe, tmp_path / f"{broken}.safetensors", "nowhere")
    assert [a.name for a in list_oft_adapters(pipe)] == ["mug"]


def test_ctrl_c_while_loading_leaves_nothing(pipe, mug, monkeypatch):
    before = fingerprint(pipe)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("oft_diffusion.bank.OFTBank.freeze", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_oft_weights(pipe, mug)
    assert_unchanged(pipe, before)


def test_names_that_are_taken_or_unusable(pipe, mug, plain):
    load_oft_weights(pipe, mug, adapter_name="mug")
    assert_loading_refused(pipe, plain, "'mug'", kind=AdapterError, adapter_name="mug")
    for name in ("a/b", "a.b", "pop", "ü", " "):
        assert_loading_refused(pipe, plain, repr(name), kind=AdapterError, adapter_name=name)
    assert_loading_refused(pipe, plain, "nan", kind=AdapterError, strength=float("nan"))


# What the base predicts


def test_an_adapter_of_a_base_that_predicts_something_else_is_assert_loading_refused(pipe, make):
    known = {"name": "sd-2-1", "prediction_type": "v_prediction", "components": {"unet": "UNet2DConditionModel"}}
    other = make("velocity", seed=4, base=known)
    assert_loading_refused(pipe, other, "predicts 'v_prediction'", "says 'epsilon'", "sd-2-1")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    assert load_oft_weights(pipe, other).name == "velocity"


# What is no pipeline


def test_a_component_is_no_pipeline(pipe, plain, tmp_path):
    calls = (
        lambda: load_oft_weights(pipe.unet, plain),
        lambda: list_oft_adapters(pipe.unet),
        lambda: save_oft_weights(pipe.unet, tmp_path, "a"),
        lambda: load_oft_weights(None, plain),
    )
    for call in calls:
        with pytest.raises(AdapterError) as error:
            call()
        assert_one_sentence(error, "is no pipeline", "pass the pipeline itself")


@pytest.mark.parametrize("name", [5, ["mug"], ("a", "b")])
def test_an_adapter_name_that_is_no_text(pipe, plain, name):
    assert_loading_refused(pipe, plain, "adapter name", repr(name), kind=AdapterError, adapter_name=name)


# other tools' files for other architectures


@pytest.mark.parametrize(
    ("layer", "width", "model"),
    [
        ("lora_transformer_single_transformer_blocks_0_attn_to_q", 64, "Flux"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv", 64, "Stable Diffusion 3"),
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_4_attn1_to_q", 64, "Stable Diffusion XL"),
    ],
)
def test_a_file_of_another_tool_names_both_models(pipe, tmp_path, layer, width, model):
    written = onetrainer.write_onetrainer({layer: (width, width)}, block_size=8)
    silent = {entry: text for entry, text in written.metadata.items() if not entry.startswith("modelspec")}
    path = algebra.save(written._replace(metadata=silent), tmp_path / "theirs.safetensors")
    told = assert_loading_refused(pipe, path, "theirs.safetensors", model, "unet (UNet2DConditionModel)", layer)
    assert "component=" not in told  # which would not help


def test_a_name_of_a_megabyte_is_looked_at_in_no_time():
    assert guessed_base({}, {}, ["down_blocks_" * 100_000]) == "a Stable Diffusion UNet"


def test_what_a_header_says_of_its_model_is_told(pipe, tmp_path):
    written = onetrainer.write_onetrainer({"lora_transformer_x": (64, 64)}, block_size=8)
    told = written.metadata | {"modelspec.architecture": "Flux.1-dev/lora"}
    path = algebra.save(written._replace(metadata=told), tmp_path / "theirs.safetensors")
    assert_loading_refused(pipe, path, "Flux.1-dev/lora", "this SD 1 pipeline")


def test_what_peft_says_of_its_model_is_told(pipe, tmp_path):
    folder = peft_oft.write_peft(tmp_path / "peft", {"transformer_blocks.0.attn.to_q": (64, 64)}, block_size=8)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "FluxTransformer2DModel", "parent_library": "diffusers"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert_loading_refused(pipe, folder, "FluxTransformer2DModel", "UNet2DConditionModel", component="unet")


def test_the_right_names_and_another_width_name_both_models(pipe, tmp_path):
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    folder = peft_oft.write_peft(tmp_path / "peft", {layer: (128, 128)}, block_size=8)
    words = ("a Stable Diffusion UNet", "unet (UNet2DConditionModel)", "32 input features", layer)
    assert_loading_refused(pipe, folder, *words, component="unet")
