"""The whole idea in one file is the same method: equal losses, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from oft_diffusion.files import load_adapter_file
from oft_diffusion.training import TrainConfig
from tests.helpers.tiny_sd import draw_pictures, write_tiny_sd
from tests.training.conftest import Run
from train_scripts import train_dreambooth_minimal as minimal

FILE = Path(minimal.__file__)


def losses_of_minimal(config: TrainConfig, out: Path, *extra: str) -> list[float]:
    arguments = [
        config.model, config.instance_dir, config.trigger, config.class_word, "--output-dir", str(out), "--resolution",
        str(config.resolution), "--block-size", str(config.block_size), "--steps", str(config.steps),
        "--learning-rate", str(config.learning_rate), "--seed", str(config.seed), *extra,
    ]  # fmt: skip
    return minimal.main(arguments)


def test_minimal_gives_the_losses_of_train(config: Callable[..., TrainConfig], run: Run, tmp_path: Path) -> None:
    settings = config(steps=7, seed=3)
    _, result = run(settings)
    assert losses_of_minimal(settings, tmp_path / "minimal") == list(result.losses)
    ours, theirs = (load_adapter_file(p).components["unet"] for p in (result.adapter, tmp_path / "minimal"))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert any(tensor.abs().max() > 1e-3 for tensor in ours.values())


@pytest.mark.thinned(2)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_with_prior_preservation(
    prediction_type: str, config: Callable[..., TrainConfig], run: Run, tmp_path: Path
) -> None:
    base = write_tiny_sd(tmp_path, prediction_type=prediction_type)
    class_dir = draw_pictures(tmp_path / "class", count=4)
    settings = config(steps=4, model=str(base), prior_preservation=True, class_dir=str(class_dir))
    _, result = run(settings)
    assert losses_of_minimal(settings, tmp_path / "minimal", "--class-images", str(class_dir)) == list(result.losses)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".webp"])
def test_pictures_as_cameras_write_them(
    suffix: str, config: Callable[..., TrainConfig], run: Run, tmp_path: Path
) -> None:
    photos, class_dir = (draw_pictures(tmp_path / name, suffix=suffix) for name in ("photos", "class"))
    settings = config(instance_dir=str(photos), prior_preservation=True, class_dir=str(class_dir))
    _, result = run(settings)
    assert losses_of_minimal(settings, tmp_path / "minimal", "--class-images", str(class_dir)) == list(result.losses)
    assert len(list(class_dir.iterdir())) == 3  # none was made


def test_a_folder_without_pictures_is_one_sentence(
    config: Callable[..., TrainConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config(instance_dir=str(tmp_path / "nothing"))
    with pytest.raises(SystemExit):
        losses_of_minimal(settings, tmp_path / "minimal")
    assert "nothing holds no PNG, JPEG or WebP images" in capsys.readouterr().err


def test_pickled_weights_are_not_loaded(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    model = write_tiny_sd(tmp_path)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"a pickle")
    with pytest.raises(OSError, match="safetensors"):
        losses_of_minimal(config(model=str(model)), tmp_path / "minimal")


def test_minimal_makes_class_images(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    settings = config(steps=1)
    losses_of_minimal(settings, tmp_path / "minimal", "--class-images", str(tmp_path / "class"), "--class-count", "2")
    assert len(list((tmp_path / "class").glob("*.png"))) == 2


def test_it_is_short_and_stands_alone() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert text.count("\n") < 120
    assert "oft_diffusion.training import" not in text
