"""Files of other tools that contradict themselves, or ask for what nobody can compute: refused in one sentence each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from oft_diffusion import load_oft_weights
from oft_diffusion.errors import AdapterFileError
from oft_diffusion.formats import read
from tests.helpers.tiny_families import tiny_family
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import LAYER, Maker, assert_loading_refused, assert_one_sentence
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, peft_oft, sd_scripts, wild

NAMES = [LAYER.format(name).removesuffix(".oft_R.weight") for name in ("to_q", "to_k")]
KEYS = {prefix: [prefix + name.replace(".", "_") for name in NAMES] for prefix in ("lora_unet_", "oft_unet_")}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One for all: refused files leave it as it is, which each test checks."""
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shapes(keys: list[str]) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(keys, (32, 32))


def written(folder: Path, made: algebra.Written, tensors: Mapping[str, Tensor | None], **texts: str) -> Path:
    """The file with other tensors, None for one that is to be left out, and other texts."""
    kept = {name: t for name, t in {**made.tensors, **tensors}.items() if t is not None}
    return algebra.save(algebra.Written(kept, made.metadata | texts), folder / "theirs.safetensors")


# PEFT's configuration


def peft(folder: Path, change: Mapping[str, Any] | str, lost: str = "") -> Path:
    peft_oft.write_peft(folder / "peft", shapes(NAMES), block_size=8, coft=True, eps=0.3)
    path = folder / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    config.pop(lost, None)
    path.write_text(change if isinstance(change, str) else json.dumps({**config, **change}))
    return folder / "peft"


@pytest.mark.parametrize(
    "change",
    [
        {"eps": 10**400}, {"eps": float("nan")}, {"eps": 0}, {"eps": -1}, {"eps": None}, {"eps": [1]}, {"eps": True},
        {"coft": "true"}, {"coft": None}, {"use_cayley_neumann": "no"}, {"use_cayley_neumann": 1},
        {"num_cayley_neumann_terms": 10**400}, {"num_cayley_neumann_terms": 1}, {"num_cayley_neumann_terms": 34},
        {"num_cayley_neumann_terms": "5"}, {"num_cayley_neumann_terms": 5.5}, {"num_cayley_neumann_terms": None},
        {"peft_version": "9" * 5000 + ".1"}, {"peft_version": "new"}, {"peft_version": 18}, {"peft_type": "BOFT"},
        {"peft_type": ["OFT"]},
    ],
    ids=lambda change: str(change)[:50],
)  # fmt: skip
def test_settings_of_peft(pipe: Any, tmp_path: Path, change: Mapping[str, Any]) -> None:
    (entry,) = change
    word = "PEFT's" if entry == "peft_type" else entry
    assert_loading_refused(pipe, peft(tmp_path, change), "adapter_model.safetensors", word)


@pytest.mark.parametrize("entry", ["eps", "coft", "peft_type", "peft_version", "num_cayley_neumann_terms"])
def test_settings_nested_as_deep_as_they_can_be_read(pipe: Any, tmp_path: Path, entry: str) -> None:
    folder = peft(tmp_path, {entry: "<here>"})
    path = folder / "adapter_config.json"
    text = path.read_text()
    for depth in range(800, 1000, 10):  # parsed, and then too deep to be shown
        path.write_text(text.replace('"<here>"', "[" * depth + "]" * depth))
        with pytest.raises(AdapterFileError) as error:
            read(folder / "adapter_model.safetensors", {"unet": pipe.unet})
        assert_one_sentence(error, "adapter_model.safetensors")


@pytest.mark.parametrize("lost", ["coft", "use_cayley_neumann", "num_cayley_neumann_terms", "eps"])
def test_settings_that_peft_always_writes(pipe: Any, tmp_path: Path, lost: str) -> None:
    assert_loading_refused(pipe, peft(tmp_path, {}, lost), lost)


@pytest.mark.parametrize(
    "text",
    ["", "{", "{}", "[]", "null", '{"coft": false, "coft": true}', "[" * 100_000, '{"a":' * 100_000, "\ufeff{}",
     '{"x": "' + "x" * 1_000_000 + '"}'],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_a_configuration_that_is_none(pipe: Any, tmp_path: Path, text: str) -> None:
    assert_loading_refused(pipe, peft(tmp_path, text), "configuration of adapter_model.safetensors")


# Settings in the header


@pytest.mark.parametrize(
    "text",
    ['{"oft_coft": true', '["oft_coft"]', '{"oft_coft": 1}', '{"oft_coft": true, "coft_eps": 1e999}', "[" * 100_000,
     '{"oft_coft": false, "oft_coft": true}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_settings_of_onetrainer(pipe: Any, tmp_path: Path, text: str) -> None:
    made = onetrainer.write_onetrainer(shapes(KEYS["lora_unet_"]), block_size=8)
    assert_loading_refused(pipe, written(tmp_path, made, {}, ot_config=text), "theirs.safetensors", "o")


@pytest.mark.parametrize(
    "text", ['{"coft": "True"', "3", '{"coft": "True", "coft_eps": "0"}', '{"coft": "True", "coft_eps": "x"}']
)
def test_settings_of_sd_scripts(pipe: Any, tmp_path: Path, text: str) -> None:
    made = sd_scripts.write_sd_scripts(shapes(KEYS["lora_unet_"]), block_size=8)
    assert_loading_refused(pipe, written(tmp_path, made, {}, ss_network_args=text), "theirs.safetensors")


def test_a_bound_that_nobody_knows_how_to_take(pipe: Any, tmp_path: Path) -> None:
    made = sd_scripts.write_sd_scripts(shapes(KEYS["lora_unet_"]), block_size=8, coft=True, coft_eps=0.3)
    assert_loading_refused(pipe, written(tmp_path, made, {}, ss_network_module="networks.oft_v9"), "coft")


# Settings as tensors


@pytest.mark.parametrize(
    ("name", "value"),
    [("oft_coft_metadata", torch.tensor(1.0)), ("oft_coft_metadata", torch.zeros(2)), ("coft_eps_metadata", None),
     ("coft_eps_metadata", torch.tensor(0.1)), ("scaled_oft_metadata", torch.tensor([1.0, 0.0])),
     ("scaled_oft_metadata", torch.tensor(0.5))],
    ids=str,
)  # fmt: skip
def test_settings_of_a_fork_that_differ_or_are_several(
    pipe: Any, tmp_path: Path, name: str, value: Tensor | None
) -> None:
    made = wild.write_musubi(shapes(KEYS["lora_unet_"]), block_size=8, coft=name == "coft_eps_metadata")
    path = written(tmp_path, made, {f"{KEYS['lora_unet_'][1]}.{name}": value})
    assert_loading_refused(pipe, path, "theirs.safetensors", name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_cayley_neumann", torch.tensor(0)), ("num_cayley_neumann_terms", torch.tensor(6)), ("coft", torch.tensor(1)),
     ("num_cayley_neumann_terms", None), ("coft", torch.zeros(3))],
    ids=str,
)  # fmt: skip
def test_settings_of_a_trainer_that_differ_or_are_several(
    pipe: Any, tmp_path: Path, name: str, value: Tensor | None
) -> None:
    made = wild.write_wan(shapes(KEYS["lora_unet_"]), block_size=8)
    path = written(tmp_path, made, {f"{KEYS['lora_unet_'][1]}.oft_{name}_buffer": value})
    assert_loading_refused(pipe, path, "theirs.safetensors", f"oft_{name}_buffer")


@pytest.mark.parametrize("value", [torch.zeros(2), torch.zeros(0), None], ids=str)
def test_a_bound_of_outputs_that_is_no_number(pipe: Any, tmp_path: Path, value: Tensor | None) -> None:
    made = kohya_oft.write_kohya_oft(shapes(KEYS["oft_unet_"]))
    assert_loading_refused(pipe, written(tmp_path, made, {f"{KEYS['oft_unet_'][0]}.alpha": value}), "alpha")


# Settings that contradict the tensors, or are of another tool


def declared(tool: str, **options: Any) -> algebra.Written:
    write: dict[str, Any] = {"onetrainer": onetrainer.write_onetrainer, "sd-scripts": sd_scripts.write_sd_scripts}
    write |= {"musubi": wild.write_musubi, "wan": wild.write_wan}
    return write[tool](shapes(KEYS["lora_unet_"]), **{"block_size": 16, **options})


@pytest.mark.parametrize(
    ("tool", "suffix", "value"),
    [("onetrainer", "alpha", 0.5), ("sd-scripts", "alpha", 0.5), ("wan", "alpha", 0.5),
     ("onetrainer", "rescale", 0.5), ("sd-scripts", "oft_coft_eps_metadata", 0.5), ("wan", "coft_eps_metadata", 0.5),
     ("wan", "oft_R.scaled_oft", 1.0), ("musubi", "rescale", 2.0)],
)  # fmt: skip
def test_settings_that_a_tool_does_not_have(pipe: Any, tmp_path: Path, tool: str, suffix: str, value: float) -> None:
    key = KEYS["lora_unet_"][0]
    path = written(tmp_path, declared(tool), {f"{key}.{suffix}": torch.tensor(value)})
    assert_loading_refused(pipe, path, "theirs.safetensors", suffix)


def test_an_alpha_that_nobody_knows(pipe: Any, tmp_path: Path) -> None:
    made = declared("onetrainer")._replace(metadata={})
    alpha = {f"{KEYS['lora_unet_'][0]}.alpha": torch.tensor(0.5)}
    assert_loading_refused(pipe, written(tmp_path, made, alpha), "an unknown tool", "alpha")


@pytest.mark.parametrize(
    ("tool", "suffix", "value"),
    [("musubi", "oft_block_size_metadata", 64.0), ("musubi", "alpha", 0.5), ("musubi", "oft_block_share_metadata", 1.0),
     ("wan", "oft_block_size_buffer", 8), ("wan", "oft_block_share_buffer", 1), ("wan", "oft_rank_buffer", 5),
     ("wan", "oft_block_size_buffer", [16, 16])],
    ids=str,
)  # fmt: skip
def test_blocks_that_are_not_what_a_layer_says(pipe: Any, tmp_path: Path, tool: str, suffix: str, value: Any) -> None:
    key = KEYS["lora_unet_"][0]
    path = written(tmp_path, declared(tool), {f"{key}.{suffix}": torch.tensor(value)})
    assert_loading_refused(pipe, path, "theirs.safetensors", key, suffix)


def test_one_block_for_all_where_a_file_says_that_each_has_its_own(pipe: Any, tmp_path: Path) -> None:
    for tool, suffix in (("musubi", "oft_block_share_metadata"), ("wan", "oft_block_share_buffer")):
        changed = {f"{key}.{suffix}": torch.tensor(0) for key in KEYS["lora_unet_"]}
        path = written(tmp_path, declared(tool, block_share=True), changed)
        assert_loading_refused(pipe, path, "theirs.safetensors", suffix)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"oft_block_size": 8}, "oft_block_size=8"), ({"oft_block_size": "16"}, "oft_block_size"),
     ({"oft_scaled": True}, "oft_scaled"), ({"oft_block_share": True}, "block_share"), ({"peft_type": "LORA"}, "LORA")],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_onetrainer_that_its_tensors_contradict(
    pipe: Any, tmp_path: Path, change: Mapping[str, Any], word: str
) -> None:
    made = declared("onetrainer", config=True)
    told = json.dumps({**json.loads(made.metadata["ot_config"]), **change})
    assert_loading_refused(pipe, written(tmp_path, made, {}, ot_config=told), "theirs.safetensors", word)


def test_a_configuration_of_peft_that_its_tensors_contradict(pipe: Any, tmp_path: Path) -> None:
    assert_loading_refused(pipe, peft(tmp_path, {"oft_block_size": 16}), "adapter_model.safetensors", "oft_block_size")
    assert_loading_refused(pipe, peft(tmp_path, {"block_share": True}), "adapter_model.safetensors", "block_share")


def test_scales_of_some_layers_alone(pipe: Any, tmp_path: Path) -> None:
    first = f"{KEYS['lora_unet_'][0]}.oft_R.scaled_oft"
    path = written(tmp_path, declared("onetrainer", scaled=True), {first: None})
    assert_loading_refused(pipe, path, "theirs.safetensors", "oft_R.scaled_oft")
    told = {"ot_config": json.dumps({"oft_scaled": False})}
    path = written(tmp_path, declared("onetrainer", scaled=True), {}, **told)
    assert_loading_refused(pipe, path, "theirs.safetensors", "oft_scaled")


def test_a_shared_block_of_sd_scripts_that_is_none(pipe: Any, tmp_path: Path) -> None:
    told = {"ss_network_args": json.dumps({"block_share": "True"})}
    assert_loading_refused(pipe, written(tmp_path, declared("sd-scripts"), {}, **told), "block_share")


@pytest.mark.parametrize("tool", ["musubi", "wan"])
def test_a_bound_that_the_header_asks_for_and_the_tensors_do_not(pipe: Any, tmp_path: Path, tool: str) -> None:
    told = {"ss_network_args": json.dumps({"coft": "True"})}
    assert_loading_refused(pipe, written(tmp_path, declared(tool), {}, **told), "theirs.safetensors", "coft")


@pytest.mark.parametrize(("tool", "suffix"), [("musubi", "coft_eps_metadata"), ("wan", "oft_coft_eps_buffer")])
def test_a_bound_without_its_size(pipe: Any, tmp_path: Path, tool: str, suffix: str) -> None:
    lost = {f"{key}.{suffix}": None for key in KEYS["lora_unet_"]}
    path = written(tmp_path, declared(tool, coft=True), lost)
    assert_loading_refused(pipe, path, "theirs.safetensors", suffix)


# What tools train beside OFT


@pytest.mark.parametrize(
    ("name", "word"),
    [("{}.w_norm", "norms (LyCORIS"), ("{}.b_norm", "norms (LyCORIS"), ("{}.diff_b", "biases"),
     ("{}.lora_up.weight", "a LoRA"), ("{}.diff", "whole weights"), ("{}.bias", "biases (PEFT"),
     ("{}.weight", "whole layers (PEFT"), ("{}.surprise", "tensors of no OFT")],
)  # fmt: skip
def test_what_is_beside_rotations_is_named(pipe: Any, tmp_path: Path, name: str, word: str) -> None:
    beside = name.format(KEYS["lora_unet_"][0])
    path = written(tmp_path, declared("onetrainer"), {beside: torch.zeros(32)})
    assert_loading_refused(pipe, path, "theirs.safetensors", word, beside)


def test_a_text_encoder_that_may_be_one_of_two(tmp_path: Path) -> None:
    xl = tiny_family("StableDiffusionXLPipeline", tmp_path)
    name = "encoder.layers.0.self_attn.q_proj"
    shape = tuple(xl.text_encoder.get_submodule(name).weight.shape)
    folder = peft_oft.write_peft(tmp_path / "peft", {f"text_model.{name}": shape}, block_size=8)
    for strict in (True, False):
        with pytest.raises(AdapterFileError, match="may be a layer of text_encoder or of text_encoder_2") as error:
            load_oft_weights(xl, folder, strict=strict)
        assert_one_sentence(error, "adapter_model.safetensors", "component=")
    assert load_oft_weights(xl, folder, component="text_encoder").components == ("text_encoder",)


# Tensors


def test_the_marker_of_another_tool(pipe: Any, tmp_path: Path) -> None:
    for made in (
        sd_scripts.write_sd_scripts(shapes(KEYS["lora_unet_"]), block_size=8),
        wild.write_wan(shapes(KEYS["lora_unet_"]), block_size=8),
    ):
        marker = f"{KEYS['lora_unet_'][0]}.oft_R.scaled_oft"
        assert_loading_refused(pipe, written(tmp_path, made, {marker: torch.tensor(True)}), "oft_R.scaled_oft")


@pytest.mark.parametrize("suffix", ["oft_rotation.weight", "rescale"])
def test_two_meanings_of_a_layers_input(pipe: Any, tmp_path: Path, suffix: str) -> None:
    made = onetrainer.write_onetrainer(shapes(KEYS["lora_unet_"]), block_size=8)
    key = KEYS["lora_unet_"][0]
    path = written(tmp_path, made, {f"{key}.{suffix}": made.tensors[f"{key}.oft_R.weight"]})
    assert_loading_refused(pipe, path, "theirs.safetensors", key)


@pytest.mark.parametrize("suffix", ["oft_diag", "oft_blocks.0"])
def test_two_meanings_of_a_layers_output(pipe: Any, tmp_path: Path, suffix: str) -> None:
    made = lycoris_oft.write_lycoris(shapes(KEYS["lora_unet_"]))
    key = KEYS["lora_unet_"][0]
    path = written(tmp_path, made, {f"{key}.{suffix}": made.tensors[f"{key}.oft_blocks"]})
    assert_loading_refused(pipe, path, "theirs.safetensors", key, suffix)


def test_blocks_of_one_output(pipe: Any, tmp_path: Path) -> None:
    made = lycoris_oft.write_lycoris(shapes(KEYS["lora_unet_"]))
    path = written(tmp_path, made, {f"{KEYS['lora_unet_'][0]}.oft_blocks": torch.zeros(32, 1, 1)})
    assert_loading_refused(pipe, path, "theirs.safetensors", "(32, 1, 1)")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.complex64, torch.uint16], ids=str)
def test_numbers_of_a_kind_that_nobody_trains(pipe: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    made = lycoris_oft.write_lycoris(shapes(KEYS["lora_unet_"]))
    for name in ("oft_blocks", "alpha"):
        key = f"{KEYS['lora_unet_'][0]}.{name}"
        path = written(tmp_path, made, {key: torch.ones(made.tensors[key].shape).to(dtype)})
        assert_loading_refused(pipe, path, "theirs.safetensors", key, str(dtype))


@pytest.mark.parametrize("value", [3e38, 1e300])
@pytest.mark.parametrize("terms", [None, 5, 33])
def test_finite_numbers_that_make_no_finite_rotation(
    pipe: Any, tmp_path: Path, terms: int | None, value: float
) -> None:
    dtype = torch.float32 if value < 1e39 else torch.float64
    folder = peft_oft.write_peft(tmp_path / "peft", shapes(NAMES), block_size=8, exact=terms is None, terms=terms or 5)
    tensors = {f"{peft_oft.PREFIX}{name}.oft_R.weight": torch.full((4, 28), value, dtype=dtype) for name in NAMES}
    algebra.save(algebra.Written(tensors, {"format": "pt"}), folder / "adapter_model.safetensors")
    assert_loading_refused(pipe, folder, "adapter_model.safetensors")


# Ours, damaged


def test_a_file_of_ours_without_its_metadata_is_not_read_as_another_tools(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    path = Maker(pipe, tmp_path / "made")("mug", parts=("unet",))
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"oft_diffusion"', b'"oft_diffusiom"'))
    assert_loading_refused(pipe, path, "mug.safetensors", "oft-diffusion without its metadata")
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"is a file of oft-diffusion\. Expected: another tool's"):
        read(path, {"unet": pipe.unet})
    bare = algebra.save(algebra.Written(load(data), {}), path)
    assert_loading_refused(pipe, bare, "mug.safetensors", "names of a file of oft-diffusion")


@pytest.mark.parametrize("part", ["unet", "transformer_2", "prior", "prior_prior", "text_encoder"])
def test_any_component_of_ours_without_its_metadata(tmp_path: Path, part: str) -> None:
    packed = {f"{part}.to_q.oft_R.weight": torch.zeros(2, 28)}
    path = algebra.save(algebra.Written(packed, {"format": "pt"}), tmp_path / "mug.safetensors")
    model = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 16)})
    with pytest.raises(AdapterFileError) as error:
        read(path, {part: model})
    assert_one_sentence(error, "mug.safetensors", "names of a file of oft-diffusion")


def load(data: bytes) -> dict[str, Tensor]:
    from safetensors.torch import load as load_bytes

    return load_bytes(data)
