"""Files of other tools in a pipeline: weights equal what each tool's own formula gives, which is written elsewhere."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor

from oft_diffusion import fuse_oft, list_oft_adapters, load_oft_weights, set_oft_adapters, unfuse_oft
from oft_diffusion.errors import AdapterFileError, ConfigError
from oft_diffusion.files import save_adapter_file
from oft_diffusion.formats import read
from tests.helpers.tiny_sd import write_tiny_sd
from tests.library.support import assert_one_sentence, copy_pipe, distance, draw
from tests.peers import algebra, kohya_oft, lycoris_oft, onetrainer, peft_oft, sd_scripts, wild
from tests.peers.a1111 import a1111_oft
from tests.peers.comfy_node import VARIANTS, merged_weight_comfy_node, write_comfy_node_only

ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
LINEAR = (f"{ATTENTION}.attn1.to_q", f"{ATTENTION}.attn2.to_k", f"{ATTENTION}.ff.net.2", "time_embedding.linear_1")
POINT = ("down_blocks.0.attentions.0.proj_in", "up_blocks.0.resnets.0.conv_shortcut")
KERNEL = ("down_blocks.0.resnets.0.conv1", "down_blocks.0.downsamplers.0.conv", "conv_in")
TEXT = ("encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc2")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(write_tiny_sd(tmp_path_factory.mktemp("tiny")))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def shapes(pipe: Any, layers: Mapping[str, tuple[str, str]]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(getattr(pipe, part).get_submodule(name).weight.shape) for key, (part, name) in layers.items()}


def flat(*layers: str, prefix: str = "lora_unet_") -> dict[str, tuple[str, str]]:
    return {prefix + layer.replace(".", "_"): ("unet", layer) for layer in layers}


def flat_text(*layers: str, prefix: str = "lora_te_text_model_") -> dict[str, tuple[str, str]]:
    return {prefix + layer.replace(".", "_"): ("text_encoder", layer) for layer in layers}


EVERYTHING = flat(*LINEAR, *POINT, *KERNEL) | flat_text(*TEXT)


def assert_weights(
    base: Any,
    path: Path,
    layers: Mapping[str, tuple[str, str]],
    formula: Callable[[Tensor, dict[str, Tensor], float], Tensor],
    tensors: Mapping[str, Tensor],
    *,
    strengths: tuple[float, ...] = (1.0, 0.4, -0.7, 0.0),
    moves: bool = True,
    **options: Any,
) -> Any:
    """At each strength every layer's weight is the formula's, all others are the base's, and live equals fused."""
    pipe = copy_pipe(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = load_oft_weights(pipe, path, adapter_name="theirs", **options)
    assert loaded.matched == len(layers)
    kept = {part: {n: p.clone() for n, p in getattr(base, part).state_dict().items()} for part in loaded.components}
    for strength in strengths:
        set_oft_adapters(pipe, ["theirs"], strength)
        live = draw(pipe)
        fuse_oft(pipe)
        assert distance(draw(pipe), live) < 1e-4
        touched = set()
        for key, (part, name) in layers.items():
            weight = getattr(base, part).get_submodule(name).weight.detach()
            wanted = formula(weight, algebra.of_layer(tensors, key), strength)
            got = getattr(pipe, part).get_submodule(name).weight.detach().double()
            scale = float(weight.abs().max())
            assert float((got - wanted).abs().max()) < 1e-5 * max(1.0, scale), key
            assert (float((wanted - weight).abs().max()) > 1e-3 * scale) == (moves and strength != 0.0)
            touched.add((part, f"{name}.weight"))
        for part, state in kept.items():
            for name, tensor in getattr(pipe, part).state_dict().items():
                assert (part, name) in touched or torch.equal(tensor, state[name])
        unfuse_oft(pipe)
    return list_oft_adapters(pipe)[0]


def linear_in(formula: Callable[..., Tensor], *told: Any, **more: Any) -> Callable[..., Tensor]:
    return lambda weight, tensors, strength: formula(weight, tensors, *told, strength, **more)


def blended(formula: Callable[..., Tensor], *told: Any) -> Callable[..., Tensor]:
    """For tools without a strength: the linear blend."""

    def at(weight: Tensor, tensors: dict[str, Tensor], strength: float) -> Tensor:
        return algebra.blend(weight, formula(weight, tensors, *told), strength)

    return at


# -- PEFT --------------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 16},
        {"block_size": 48},  # which divides nothing: PEFT takes each layer's nearest
        {"terms": 2},
        {"terms": 3},
        {"terms": 4},
        {"terms": 6},
        {"exact": True},
        {"exact": True, "coft": True, "eps": 0.3},
        {"block_share": True},
        {"coft": True, "eps": 0.2},
        {"coft": True, "eps": 0.2, "block_share": True},
        {"peft_version": "0.17.1"},
        {"peft_version": "0.17.1", "terms": 7},
        {"peft_version": "0.17.1", "exact": True},
        {"peft_version": "0.17.1", "block_share": True},
        {"peft_version": "0.17.1", "coft": True, "eps": 0.2},
        {"peft_version": None, "terms": 6},
        {"peft_version": "0.18.0.dev0@abcdef"},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_peft(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = {peft_oft.PREFIX + name: ("unet", name) for name in (*LINEAR, *POINT)}
    modules = shapes(base, {name: ("unet", name) for name in (*LINEAR, *POINT)})
    folder = peft_oft.write_peft(tmp_path / "peft", modules, **options)
    config = json.loads((folder / "adapter_config.json").read_text())
    loaded = assert_weights(
        base,
        folder,
        layers,
        blended(peft_oft.merged_weight_peft, config),
        load_file(folder / "adapter_model.safetensors"),
    )
    assert loaded.format == "PEFT"


@pytest.mark.parametrize("version", ["0.21.2", "0.17.1"])
def test_a_folder_of_peft_for_a_text_encoder(base: Any, tmp_path: Path, version: str) -> None:
    for prefix in ("", "text_model."):  # transformers 5, and before
        names = {prefix + name: ("text_encoder", name) for name in TEXT}
        layers = {peft_oft.PREFIX + name: meant for name, meant in names.items()}
        folder = peft_oft.write_peft(tmp_path / f"peft{prefix}", shapes(base, names), peft_version=version)
        tensors = peft_oft.peft_file(shapes(base, names)).tensors
        config = peft_oft.peft_config(list(names), peft_version=version)
        loaded = assert_weights(base, folder, layers, blended(peft_oft.merged_weight_peft, config), tensors)
        assert loaded.components == ("text_encoder",)


@pytest.mark.parametrize("write", [peft_oft.write_old_peft, peft_oft.write_peft_boft, peft_oft.write_peft_embedding])
def test_what_peft_has_beside_is_refused(base: Any, tmp_path: Path, write: Any) -> None:
    names = {name: ("unet", name) for name in (f"{ATTENTION}.attn1.to_q",)}
    pipe = copy_pipe(base)
    with pytest.raises(AdapterFileError) as error:
        load_oft_weights(pipe, write(tmp_path / "peft", shapes(base, names)))
    assert_one_sentence(error, "adapter_model.safetensors")


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("version", ["0.13", "0.15"])
def test_peft_before_oftv2_is_refused(base: Any, tmp_path: Path, version: Any, live: bool) -> None:
    names = {name: ("unet", name) for name in (f"{ATTENTION}.attn1.to_q",)}
    folder = peft_oft.write_old_peft(tmp_path / "peft", shapes(base, names), version=version, live=live)
    with pytest.raises(AdapterFileError, match=r"PEFT 0\.15 or older"):
        load_oft_weights(copy_pipe(base), folder)


@pytest.mark.parametrize("version", ["0.21.2", "0.17.1"])
def test_pefts_larger_kernels_are_refused(base: Any, tmp_path: Path, version: str) -> None:
    names = {name: ("unet", name) for name in (*LINEAR, KERNEL[0])}
    folder = peft_oft.write_peft(tmp_path / "peft", shapes(base, names), peft_version=version)
    with pytest.raises(AdapterFileError, match="convolution of 9 taps") as error:
        load_oft_weights(copy_pipe(base), folder)
    assert_one_sentence(error, KERNEL[0])


# -- single files of input rotations ----------------------------------------------------------------------------------


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scaled": True},
        {"scaled": True, "dtype": torch.bfloat16},
        {"block_share": True},
        {"coft_eps": 0.2},
        {"coft_eps": 0.2, "scaled": True},
        {"config": True, "block_size": 8},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_onetrainer(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    written = onetrainer.write_onetrainer(shapes(base, EVERYTHING), **options)
    formula = linear_in(onetrainer.merged_weight_onetrainer, written.metadata)
    path = algebra.save(written, tmp_path / "one.safetensors")
    assert assert_weights(base, path, EVERYTHING, formula, written.tensors).format == "OneTrainer"


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "options",
    [{}, {"coft": True, "coft_eps": 0.3}, {"coft": True}, {"block_share": True, "oft_names": True, "coft": True}],
    ids=str,
)
def test_sd_scripts(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    written = sd_scripts.write_sd_scripts(shapes(base, EVERYTHING), **options)
    path = algebra.save(written, tmp_path / "kohya.safetensors")
    formula = linear_in(sd_scripts.merged_weight_sd_scripts, written.metadata)
    moves = "coft" not in options or "coft_eps" in options  # its default bound leaves nearly nothing
    assert assert_weights(base, path, EVERYTHING, formula, written.tensors, moves=moves).format == "sd-scripts"


def test_scaled_files_of_builds_before_the_merge(base: Any, tmp_path: Path) -> None:
    written = onetrainer.write_onetrainer(shapes(base, EVERYTHING), scaled=True, legacy_scale=True)
    path = algebra.save(written, tmp_path / "one.safetensors")
    file = read(path, {part: getattr(base, part) for part in ("unet", "text_encoder")}, legacy_scaled=True).file
    ours = save_adapter_file(tmp_path / "ours", file.components, file.metadata)
    formula = linear_in(onetrainer.merged_weight_onetrainer, written.metadata, legacy_scale=True)
    assert_weights(base, ours, EVERYTHING, formula, written.tensors, strengths=(1.0, 0.0))


def test_the_old_divisor_is_refused_where_nothing_is_scaled(base: Any, tmp_path: Path) -> None:
    parts = {part: getattr(base, part) for part in ("unet", "text_encoder")}
    peft = peft_oft.write_peft(tmp_path / "parts" / "unet", shapes(base, {n: ("unet", n) for n in LINEAR}))
    plain = algebra.save(onetrainer.write_onetrainer(shapes(base, EVERYTHING)), tmp_path / "plain.safetensors")
    outputs = algebra.save(lycoris_oft.write_lycoris(shapes(base, EVERYTHING)), tmp_path / "outputs.safetensors")
    for path in (plain, outputs, peft.parent):
        with pytest.raises(ConfigError) as error:
            read(path, parts, legacy_scaled=True)
        named = "adapter_model.safetensors" if path.is_dir() else path.name
        assert_one_sentence(error, named, "--legacy-scaled", "oft_R.scaled_oft", "leave it out")


@pytest.mark.thinned(5)
@pytest.mark.parametrize(
    ("revision", "old"),
    [("1336b9b8", True), ("607470f7", True), ("75ee0917", True), ("86ae381", True), ("b46986d6", False),
     ("1336b9", False), ("", False), ("git not installed", False)],
)  # fmt: skip
def test_the_first_series_of_onetrainer_is_told_by_the_revision(
    base: Any, tmp_path: Path, revision: str, old: bool
) -> None:
    written = onetrainer.write_onetrainer(shapes(base, EVERYTHING))
    written.metadata["ot_revision"] = revision
    path = algebra.save(written, tmp_path / "one.safetensors")
    formula = linear_in(onetrainer.merged_weight_onetrainer, written.metadata, old_series=old)
    assert_weights(base, path, EVERYTHING, formula, written.tensors, strengths=(1.0, 0.4))


@pytest.mark.parametrize(
    "options", [{}, {"scaled": False}, {"coft": True, "coft_eps": 0.5}, {"block_share": True}], ids=str
)
def test_a_fork_whose_strength_turns(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    written = wild.write_musubi(shapes(base, EVERYTHING), **options)
    path = algebra.save(written, tmp_path / "fork.safetensors")
    formula = linear_in(wild.merged_weight_musubi, written.metadata)
    assert_weights(base, path, EVERYTHING, formula, written.tensors, strengths=(1.0, 0.0))


@pytest.mark.parametrize("strength", [0.3, 0.7])
def test_a_strength_of_that_fork_between_0_and_1_is_a_power(base: Any, tmp_path: Path, strength: float) -> None:
    written = wild.write_musubi(shapes(base, EVERYTHING))

    def power(weight: Tensor, tensors: dict[str, Tensor], s: float) -> Tensor:
        values, vectors = torch.linalg.eig(wild.musubi_rotation(tensors))
        rotation = (vectors @ torch.diag_embed(values**s) @ torch.linalg.inv(vectors)).real
        ours = algebra.times(weight, rotation.mT if weight.dim() == 2 else rotation)
        theirs = wild.merged_weight_musubi(weight, tensors, written.metadata, s)
        assert float((ours - theirs).norm()) < 0.1 * float((theirs - weight.double()).norm())  # near, as documented
        return ours

    path = algebra.save(written, tmp_path / "fork.safetensors")
    assert_weights(base, path, EVERYTHING, power, written.tensors, strengths=(strength,))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "options",
    [{}, {"exact": True}, {"terms": 6}, {"coft": True, "eps": 0.3}, {"renamed": True}, {"block_share": True}],
    ids=str,
)
def test_a_trainer_that_tells_all_by_tensors(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = flat(*LINEAR, *POINT, *KERNEL, prefix="oftv2_unet_")
    written = wild.write_wan(shapes(base, layers), **options)
    path = algebra.save(written, tmp_path / "wan.safetensors")
    assert_weights(base, path, layers, blended(wild.merged_weight_wan, written.metadata), written.tensors)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("options", [{}, {"scaled": True}, {"block_share": True}], ids=str)
def test_a_file_that_does_not_tell_whose_it_is(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    written = onetrainer.write_onetrainer(shapes(base, EVERYTHING), **options)
    path = algebra.save(written._replace(metadata={}), tmp_path / "who.safetensors")
    if "scaled" not in options:  # only OneTrainer has that
        with pytest.warns(UserWarning, match="does not tell which tool wrote it"):
            load_oft_weights(copy_pipe(base), path)
    assert_weights(base, path, EVERYTHING, linear_in(merged_weight_comfy_node, None), written.tensors)


@pytest.mark.parametrize("variant", VARIANTS)
def test_kinds_of_oft_without_a_counterpart_are_refused_by_name(base: Any, tmp_path: Path, variant: Any) -> None:
    path = algebra.save(write_comfy_node_only(shapes(base, EVERYTHING), variant), tmp_path / "x.safetensors")
    with pytest.raises(AdapterFileError) as error:
        load_oft_weights(copy_pipe(base), path)
    kind = {"clipped_oft": "clipped OFT", "cans_oft": "CANS"}.get(variant, "DoRA-OFT")
    assert_one_sentence(error, kind, "x.safetensors")


def test_embeddings_beside_are_told(base: Any, tmp_path: Path) -> None:
    written = onetrainer.write_onetrainer(shapes(base, EVERYTHING), embedding="sks")
    path = algebra.save(written, tmp_path / "one.safetensors")
    with pytest.warns(UserWarning, match="1 embedding tensors were left out"):
        load_oft_weights(copy_pipe(base), path)


# -- output side ------------------------------------------------------------------------------------------------------


@pytest.mark.thinned(2)
@pytest.mark.parametrize("options", [{}, {"alpha": 10.0}, {"num_blocks": 8}, {"dtype": torch.bfloat16}], ids=str)
def test_kohyas_first_oft(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = flat(*LINEAR, *POINT, *KERNEL, prefix="oft_unet_")
    written = kohya_oft.write_kohya_oft(shapes(base, layers), **options)
    path = algebra.save(written, tmp_path / "kohya.safetensors")
    loaded = assert_weights(
        base, path, layers, linear_in(kohya_oft.merged_weight_kohya_oft, written.metadata), written.tensors
    )
    assert loaded.format.startswith("output-side OFT")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"constraint": 1e-3},
        {"constraint": 5.0},
        {"wrapper": "plain"},
        {"wrapper": "simpletuner"},
        {"wrapper": "simpletuner", "constraint": 1e-3},
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_lycoris(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = flat(*LINEAR, *POINT, *KERNEL, prefix="lycoris_") if "wrapper" in options else EVERYTHING
    written = lycoris_oft.write_lycoris(shapes(base, layers), **options)
    path = algebra.save(written, tmp_path / "lycoris.safetensors")
    assert_weights(base, path, layers, linear_in(lycoris_oft.merged_weight_lycoris, written.metadata), written.tensors)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    "options", [{}, {"constraint": 1e-3}, {"wrapper": "plain"}, {"wrapper": "simpletuner"}], ids=str
)
def test_lycoris_with_scaled_outputs(base: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    layers = flat(*LINEAR, *POINT, *KERNEL, prefix="lycoris_") if "wrapper" in options else EVERYTHING
    written = lycoris_oft.write_lycoris(shapes(base, layers), rescaled=True, **options)
    path = algebra.save(written, tmp_path / "lycoris.safetensors")
    # Blended whole, so that strength 0 is the base: LyCORIS's at strength 1, and A1111's at every one.
    for formula in (blended(lycoris_oft.merged_weight_lycoris), a1111_oft):
        assert_weights(base, path, layers, formula, written.tensors)


@pytest.mark.parametrize("rescaled", [False, True])
def test_old_lycoris_as_a1111_takes_it(base: Any, tmp_path: Path, rescaled: bool) -> None:
    written = lycoris_oft.write_lycoris_oft_diag(shapes(base, EVERYTHING), rescaled=rescaled)
    path = algebra.save(written, tmp_path / "old.safetensors")
    assert_weights(base, path, EVERYTHING, a1111_oft, written.tensors)


def test_old_lycoris(base: Any, tmp_path: Path) -> None:
    written = lycoris_oft.write_lycoris_oft_diag(shapes(base, EVERYTHING))
    path = algebra.save(written, tmp_path / "old.safetensors")
    assert_weights(base, path, EVERYTHING, linear_in(lycoris_oft.merged_weight_oft_diag, None), written.tensors)
    offset = algebra.save(
        lycoris_oft.write_lycoris_oft_diag(shapes(base, EVERYTHING), offset=True), tmp_path / "dev.safetensors"
    )
    with pytest.raises(AdapterFileError, match="no rotations"):
        load_oft_weights(copy_pipe(base), offset)


def test_boft_is_refused(base: Any, tmp_path: Path) -> None:
    path = algebra.save(lycoris_oft.write_lycoris_boft(shapes(base, EVERYTHING)), tmp_path / "boft.safetensors")
    with pytest.raises(AdapterFileError) as error:
        load_oft_weights(copy_pipe(base), path)
    assert_one_sentence(error, "BOFT", "boft.safetensors")


# -- what is not there ------------------------------------------------------------------------------------------------


def test_layers_that_the_pipeline_lacks(base: Any, tmp_path: Path) -> None:
    layers = shapes(base, EVERYTHING) | {"lora_unet_down_blocks_9_attn_to_q": (32, 32)}
    written = onetrainer.write_onetrainer(layers)
    path = algebra.save(written, tmp_path / "one.safetensors")
    pipe = copy_pipe(base)
    with pytest.raises(AdapterFileError) as error:
        load_oft_weights(pipe, path)
    assert_one_sentence(error, "lora_unet_down_blocks_9_attn_to_q", f"1 of its {len(layers)} layers", "strict=False")
    with pytest.warns(UserWarning, match="1 layers that this pipeline does not have"):
        loaded = load_oft_weights(pipe, path, strict=False)
    assert loaded.unmatched == ("lora_unet_down_blocks_9_attn_to_q",)
    assert loaded.matched == len(EVERYTHING)
