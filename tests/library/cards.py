"""What the tests of model cards and of pushing share."""

import inspect
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError

from oft_diffusion.files import FILE_NAME
from oft_diffusion.pipeline.card import CARD_NAME
from tests.library.support import adapter_file

REPO = "me/mug-oft"
PROMPT = "a photo of sks mug on a table"
STEPS: dict[str, Any] = {"steps": 2, "guidance": 4.0, "negative_prompt": "red dog"}


def bare(tmp_path, **metadata):
    """A folder with an adapter and no more."""
    (tmp_path / "bare").mkdir(exist_ok=True)
    adapter_file(tmp_path, **metadata).rename(tmp_path / "bare" / FILE_NAME)
    return tmp_path / "bare"


def card_of(folder):
    return ModelCard.load(folder / CARD_NAME)


def blocks(folder, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", card_of(folder).text, flags=re.DOTALL | re.MULTILINE)


def block(folder, language):
    return blocks(folder, language)[0]


class Hub:
    """Copies what is uploaded into a folder, and serves it; its calls fit the real client's signatures."""

    def __init__(self, root):
        self.root, self.asked, self.refusal = root, {}, None

    def __call__(self, token=None):
        self.asked["token"] = token
        return self

    def create_repo(self, repo_id, **options):
        inspect.signature(HfApi.create_repo).bind(self, repo_id, **options)
        self.asked["create"] = {"repo_id": repo_id, **options}
        if self.refusal is not None:
            raise self.refusal
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, **options):
        inspect.signature(HfApi.upload_folder).bind(self, **options)
        self.asked["upload"] = options
        source = Path(options["folder_path"])
        files = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]
        for name in (f for f in files if any(fnmatch(f, pattern) for pattern in options["allow_patterns"])):
            shutil.copy(source / name, self.root / options["repo_id"] / name)

    def download(self, repo_id, filename, **options):
        path = self.root / repo_id / filename
        if not path.is_file():
            raise EntryNotFoundError(f"404: {filename}")
        return str(path)
