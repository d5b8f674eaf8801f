"""What is deployed, as far as it can be looked at without Docker or a Space: files agree, and the Space's app runs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import parse_wheel_filename

from app.main import AUTH, arguments_of
from oft_diffusion.errors import ConfigError
from tests.helpers.app_command import ROOT, free_port, started

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = ROOT / "app" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def dockerfile() -> list[tuple[str, str]]:
    """Its instructions, in order: name and rest."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    whole = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE))
    lines = [line.partition(" ") for line in whole.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in lines]


def told(name: str) -> list[str]:
    return [rest for found, rest in dockerfile() if found == name]


def copied() -> list[str]:
    """What is copied into the image."""
    return [source for rest in told("COPY") for source in shlex.split(rest)[:-1]]


def test_the_image_begins_with_a_python_that_will_do() -> None:
    [image] = told("FROM")
    version = image.partition(":")[2].partition("-")[0]
    assert version in SpecifierSet(PROJECT["requires-python"])
    assert dockerfile()[0][0] == "FROM"
    known = ["FROM", "RUN", "WORKDIR", "COPY", "USER", "EXPOSE", "ENTRYPOINT"]
    assert {name for name, _ in dockerfile()} <= set(known)


def test_what_the_image_copies_is_there_and_makes_the_wheel() -> None:
    assert all((ROOT / source).exists() for source in copied())
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel = hatch["targets"]["wheel"]
    needed = [*wheel["packages"], *wheel["force-include"], PROJECT["readme"], *PROJECT["license-files"]]
    for name in [*needed, "pyproject.toml"]:
        assert any(Path(name).is_relative_to(source) for source in copied()), name


def test_what_the_image_copies_is_all_that_docker_is_sent() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    [everything, *sent, caches] = [line for line in lines if not line.startswith("#")]
    assert (everything, caches) == ("*", "**/__pycache__")
    assert {line.removeprefix("!") for line in sent} == set(copied())


def test_what_the_image_installs_is_what_the_project_has_tested() -> None:
    [package] = re.findall(r'pip install .*?"([^"]+)"', " ".join(told("RUN")))
    assert set(re.findall(r"\w+", package)) <= set(EXTRAS)
    assert " -c constraints.txt " in told("RUN")[1]
    assert "constraints.txt" in copied()
    assert re.search(r"^torch==[0-9.]+( |$)", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_image_runs_the_app_for_no_root_and_asks_for_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [name for name, _ in dockerfile()]
    [user], [entry], [port] = told("USER"), told("ENTRYPOINT"), told("EXPOSE")
    assert user != "0"
    assert f"useradd --uid {user} --create-home" in told("RUN")[0]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")
    script, verb, *arguments = json.loads(entry)
    assert script in PROJECT["scripts"]
    assert verb == "app"
    monkeypatch.delenv(AUTH, raising=False)
    with pytest.raises(ConfigError, match="would let everyone in the network"):
        arguments_of(arguments)
    monkeypatch.setenv(AUTH, "me:secret")
    options, auth = arguments_of(arguments)
    assert auth == [("me", "secret")]
    assert (options.host, str(options.port)) == ("0.0.0.0", port)
    assert str(options.workspace) == told("WORKDIR")[-1]
    assert f"chown {user} {options.workspace}" in told("RUN")[0]


def front() -> dict[str, str]:
    """What the Space's README says above its text."""
    text = (DEPLOY / "space" / "README.md").read_text(encoding="utf-8")
    pairs = [line.partition(": ") for line in text.split("---")[1].strip().splitlines()]
    return {name: value.strip('"') for name, _, value in pairs}


def test_the_space_says_what_the_project_says() -> None:
    found = front()
    assert found["sdk"] == "gradio"
    [gradio] = [Requirement(text) for text in EXTRAS["app"] if text.startswith("gradio")]
    assert found["sdk_version"] in gradio.specifier
    assert f"gradio=={found['sdk_version']} " in (ROOT / "constraints.txt").read_text()
    assert found["python_version"] in SpecifierSet(PROJECT["requires-python"])
    assert found["license"] == PROJECT["license"].lower()
    assert (DEPLOY / "space" / found["app_file"]).is_file()
    lines = (DEPLOY / "space" / "requirements.txt").read_text().splitlines()
    [needed] = [line for line in lines if not line.startswith("#")]
    file, extras = needed.removeprefix("./").rstrip("]").split("[")
    name, version, _, tags = parse_wheel_filename(file)
    assert (name, str(version)) == (PROJECT["name"], PROJECT["version"])
    assert {str(tag) for tag in tags} == {"py3-none-any"}
    assert set(extras.split(",")) == {"app", "train"} <= set(EXTRAS)


def test_the_space_is_not_installed_without_its_wheel(space: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-index", "--dry-run", "-r", "requirements.txt"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=space)
    assert ended.returncode == 1
    assert "oft_diffusion" in ended.stderr
    assert "No such file" in ended.stderr


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """The folder as a Space has it."""
    return Path(shutil.copytree(DEPLOY / "space", tmp_path / "space"))


def test_a_space_without_a_password_does_not_start(space: Path) -> None:
    command = [sys.executable, str(space / front()["app_file"])]
    ended = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, cwd=space)
    assert ended.returncode == 1
    assert "OFT_AUTH" in ended.stderr


@pytest.mark.slow
def test_a_space_asks_for_the_password_and_serves(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(space)
    port = free_port()
    environment = {
        "OFT_AUTH": "me:secret", "GRADIO_SERVER_PORT": str(port), "SYSTEM": "spaces", "SPACE_ID": "me/oft-diffusion",
        "SPACE_HOST": "me-oft-diffusion.hf.space", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, front()["app_file"]]
    with (
        started(command, port, environment=environment) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert "auth_required" in client.get("/").text
        assert client.get("/config").status_code == 401
        wrong = client.post("/login", data={"username": "me", "password": "wrong"})
        assert wrong.status_code == 400
        right = client.post("/login", data={"username": "me", "password": "secret"})
        assert right.status_code == 200
        config = client.get("/config")
        assert config.status_code == 200
        assert "oft-diffusion" in config.json()["title"]
    assert (space / "oft-app" / "adapters").is_dir()
