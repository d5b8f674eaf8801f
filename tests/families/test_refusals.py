"""Bases that cannot be trained, or not so, are refused by a look at their configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import diffusers
import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError

from oft_diffusion import load
from oft_diffusion.errors import ConfigError
from oft_diffusion.load import load_pipeline
from oft_diffusion.training.find import download_base, find_base
from tests.library.support import assert_one_sentence


@pytest.fixture
def flux(folder_of: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder_of("FluxPipeline"), tmp_path / "model"))


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("kind", "instead"),
    [
        ("FluxKontextPipeline", "whose pipeline is FluxPipeline"),
        ("WanImageToVideoPipeline", "whose pipeline is WanPipeline"),
        ("StableDiffusionXLInpaintPipeline", "whose pipeline is StableDiffusionXLPipeline"),
        ("StableDiffusionInpaintPipeline", "whose pipeline is StableDiffusionPipeline"),
        ("QwenImageEditPlusPipeline", "whose pipeline is QwenImagePipeline"),
        ("LTXPipeline", "of one of those families"),
    ],
)
def test_pipelines_that_are_not_trained_are_named_with_their_sibling(kind: str, instead: str, flux: Path) -> None:
    edit(flux / "model_index.json", _class_name=kind)
    with pytest.raises(ConfigError, match=rf"is a {kind}") as caught:
        find_base(str(flux))
    assert instead in caught.value.fix


def test_a_scheduler_of_another_kind_is_refused(flux: Path) -> None:
    scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "epsilon", "num_train_timesteps": 1000}
    (flux / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = json.loads((flux / "model_index.json").read_text())
    edit(flux / "model_index.json", scheduler=[index["scheduler"][0], "DDIMScheduler"])
    with pytest.raises(ConfigError, match=r"prediction_type 'epsilon'.*flow, as a FluxPipeline is trained"):
        find_base(str(flux))


def test_a_denoiser_of_more_channels_than_the_vae_makes_is_refused(flux: Path) -> None:
    edit(flux / "transformer" / "config.json", in_channels=64)
    with pytest.raises(ConfigError, match="takes 64 channels, but its VAE makes 16"):
        find_base(str(flux))


def test_sides_are_multiples_of_the_vae_and_the_patches(flux: Path) -> None:
    base = find_base(str(flux))
    base.check_resolution(16)
    with pytest.raises(ConfigError, match=r"resolution = 18 is no multiple of 4.*its VAE and its patches.*16 or 20"):
        base.check_resolution(18)


@pytest.mark.parametrize("part", ["text_encoder_2", "tokenizer_2"])
def test_a_missing_text_encoder_or_tokenizer_is_named(part: str, flux: Path) -> None:
    shutil.rmtree(flux / part)
    with pytest.raises(ConfigError, match=part):
        find_base(str(flux))


@pytest.mark.parametrize(
    ("name", "part", "what_to_do"),
    [
        ("StableDiffusionXLPipeline", "text_encoder_2", "download or copy the model again"),
        ("StableDiffusion3Pipeline", "text_encoder_2", "download or copy the model again"),
        ("FluxPipeline", "text_encoder_2", "download or copy the model again"),
        ("HiDreamImagePipeline", "text_encoder_4", "pass Llama 3.1 8B Instruct as text_encoder_4"),
    ],
)
def test_a_text_encoder_that_is_left_empty_is_named_unless_it_is_no_need(
    name: str, part: str, what_to_do: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = Path(shutil.copytree(folder_of(name), tmp_path / "model"))
    edit(model / "model_index.json", **{part: [None, None], part.replace("text_encoder", "tokenizer"): [None, None]})
    with pytest.raises(ConfigError, match=f"lacks {part}") as caught:
        find_base(str(model))
    assert what_to_do in caught.value.fix


def test_a_gated_repository_is_told_from_a_wrong_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> None:
        response = httpx2.Response(403, request=httpx2.Request("GET", "https://example.org/api"))
        try:
            raise GatedRepoError("403 Client Error. (Request ID: 1)", response=response)
        except GatedRepoError as error:
            raise OSError("Cannot load model: please check out the root cause in the stacktrace above.") from error

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    monkeypatch.setattr(diffusers.AutoPipelineForText2Image, "from_pretrained", download)
    monkeypatch.setattr(load, "snapshot_download", download)
    for fetch in (download_base, load_pipeline):
        with pytest.raises(ConfigError) as caught:
            fetch("owner/name")
        assert_one_sentence(caught, "the hub gives no access to the model owner/name", "hf auth login", "licence")


def test_clip_skip_is_for_pipelines_that_know_it(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match="clip_skip = 1, but a FluxPipeline knows none"):
        find_base(str(folder_of("FluxPipeline"))).check_clip_skip(1)
    xl = find_base(str(folder_of("StableDiffusionXLPipeline")))
    xl.check_clip_skip(None)
    xl.check_clip_skip(1)
    with pytest.raises(ConfigError, match="clip_skip = 2, but CLIP has 3 layers"):
        xl.check_clip_skip(2)  # SDXL takes the last layer but one as it is


@pytest.mark.parametrize(("name", "sides"), [("QwenImagePipeline", 4), ("ZImagePipeline", 4), ("SanaPipeline", 2)])
def test_patches_that_are_packed_count_once(name: str, sides: int, folder_of: Callable[[str], Path]) -> None:
    assert find_base(str(folder_of(name))).sides == sides


def test_a_single_file_of_a_family_without_a_loader_is_refused(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("QwenImagePipeline")
    [file] = (folder / "transformer").glob("*.safetensors")
    with pytest.raises(ConfigError, match="loads no QwenImagePipeline from a single file"):
        find_base(str(file), str(folder))


def test_experts_without_a_boundary_are_refused(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(folder_of("WanPipeline"), tmp_path / "model"))
    edit(model / "model_index.json", boundary_ratio=None)
    with pytest.raises(ConfigError, match="no boundary_ratio between them"):
        find_base(str(model))
