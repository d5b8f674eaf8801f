"""The page: its tabs, its looks, and how it is served."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oft_diffusion.errors import ConfigError

from .session import Session
from .workspace import is_token, new_token

_CSS = """
.status { padding: 0.5rem 0.75rem; border-radius: 8px; min-height: 3.1rem; }
.status { background: var(--background-fill-secondary); }
.status.problem { background: var(--error-background-fill); color: var(--error-text-color); }
.status .bar { height: 4px; margin-top: 0.4rem; border-radius: 2px; background: var(--border-color-primary); }
.status .bar div { height: 100%; border-radius: 2px; background: var(--color-accent); transition: width 0.3s; }
.status.problem .bar { visibility: hidden; }
#trigger-warning { padding: 0.25rem 0.75rem; border-left: 3px solid var(--color-accent); }
.note:not(:empty) { padding: 0.5rem 0.75rem; border-left: 3px solid var(--color-accent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 0.75rem; }
.card { display: flex; gap: 0.75rem; padding: 0.75rem; border-radius: 8px; background: var(--background-fill-primary); }
.card { border: 1px solid var(--border-color-primary); overflow-wrap: anywhere; }
.card img, .card > div:first-child { width: 64px; height: 64px; border-radius: 6px; flex: none; object-fit: cover; }
.card > div:first-child { background: var(--background-fill-secondary); }
.card .misfit { color: var(--error-text-color); }
.about { width: 100%; font-size: 0.9rem; } .about th { text-align: left; vertical-align: top; padding-right: 1rem; }
.about td { overflow-wrap: anywhere; }
footer { display: none !important; }
"""
_HEAD = """<meta name="description" content="Pictures of your own subjects, with OFT adapters">"""


def build(session: Session) -> Any:
    """The page as gradio Blocks."""
    import gradio as gr

    from .adapters_tab import AdaptersTab
    from .compare_tab import CompareTab
    from .generate_tab import GenerateTab
    from .train_tab import TrainTab

    with gr.Blocks(title="oft-diffusion", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        person = gr.BrowserState(None, storage_key="oft-diffusion-person", secret="oft-diffusion")
        gr.Markdown(f"# oft-diffusion\nDraws with **{session.abilities.model}**, on {session.device}.")
        with gr.Tab("Generate", id="generate"):
            drawing = GenerateTab(session, person)
        with gr.Tab("Compare", id="compare"):
            comparing = CompareTab(session, person)
        train_place = gr.Tab("Train", id="train")
        with gr.Tab("Adapters", id="adapters"):
            menus: list[Any] = [(menu, drawing.choices) for menu, _ in drawing.slots]
            fitting = [(menu, lambda: drawing.choices()[1:]) for menu in (comparing.adapter, comparing.others)]
            shelf = AdaptersTab(session, [*menus, *fitting])
        with train_place:
            training = TrainTab(session, person, shelf.refresh, shelf.changed)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        known = page.load(lambda token: token if is_token(token) else new_token(), [person], [person], **private)
        known.then(shelf.refresh, None, shelf.changed, **private)
        known.then(training.look, [person], [training.photos, training.note], **private)
        known.then(drawing.resume, [person], drawing.shown, concurrency_limit=None, **private)
        known.then(training.again, [person], training.shown, concurrency_limit=None, **private)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """`oft-diffusion app`.

    Raises:
        ConfigError: the model cannot be loaded, or the options would open the app to everyone.
    """
    options = _parser().parse_args(arguments)
    auth = _auth(options)
    workspace = options.workspace.absolute()
    os.environ["GRADIO_TEMP_DIR"] = str(workspace / "temporary")  # before gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[options.dtype]
    session = Session(workspace, options.model, config_dir=options.config_dir, device=options.device, dtype=dtype)
    page = build(session)
    page.queue(max_size=256, default_concurrency_limit=16, api_open=False)
    try:
        page.launch(**served(session, options.host, options.port, auth), inbrowser=options.open)
    finally:
        session.machine.stop()
    return 0


def served(session: Session, host: str, port: int | None, auth: list[tuple[str, str]] | None) -> dict[str, Any]:
    """How the page is launched: nothing is told, shared or readable that need not be."""
    import gradio as gr

    return {
        "server_name": host, "server_port": port, "auth": auth, "share": False, "show_error": False,
        "allowed_paths": [str(session.workspace.people), str(session.workspace.adapters)],
        "max_file_size": "50mb", "enable_monitoring": False, "mcp_server": False, "footer_links": [],
        "css": _CSS, "head": _HEAD, "theme": gr.themes.Soft(font=["system-ui", "sans-serif"]), "ssr_mode": False,
    }  # fmt: skip


def _auth(options: argparse.Namespace) -> list[tuple[str, str]] | None:
    pairs = [tuple(pair.split(":", 1)) for pair in options.auth]
    if wrong := [pair for pair in pairs if len(pair) != 2 or not all(pair)]:
        raise ConfigError(
            f"--auth with {len(wrong)} entries that are no pair", expected="NAME:PASSWORD", fix="correct it"
        )
    if options.host not in ("127.0.0.1", "localhost", "::1") and not pairs:
        raise ConfigError(
            f"--host {options.host} would let everyone in the network use this machine",
            expected="--auth NAME:PASSWORD beside it",
            fix="add --auth, or leave --host out",
        )
    return [(name, password) for name, password in pairs] or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="oft-diffusion app", description="Draw, compare and train in the browser.")
    parser.add_argument(
        "--model", default="pocket", help="pipeline folder, checkpoint or hub id (default: the shipped one)"
    )
    parser.add_argument("--config-dir", metavar="FOLDER", help="of a checkpoint's architecture, in diffusers' format")
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path("oft-app"),
        help="folder for adapters, runs and pictures (default: oft-app)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    parser.add_argument("--auth", action="append", default=[], metavar="NAME:PASSWORD", help="may be repeated")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--open", action="store_true", help="open a browser window")
    return parser
