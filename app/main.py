"""`oft-diffusion app`: its options, and how the page is served."""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from oft_diffusion.errors import ConfigError
from oft_diffusion.load import usual_dtype

from .looks import CSS, HEAD, theme
from .model import QUANTIZED
from .session import Session
from .workspace import Workspace

# How many events the page and programs may have going at once.
QUEUE: dict[str, Any] = {"max_size": 256, "default_concurrency_limit": 16, "api_open": False}
AUTH = "OFT_AUTH"  # the environment's variable of passwords: what `--auth` has, all who list processes can read
_THREADS = 512  # each event that looks on at a job holds one; gradio's 40 would leave none to cancel with


def main(arguments: Sequence[str] | None = None) -> int:
    """`oft-diffusion app`.

    Raises:
        ConfigError: the model cannot be loaded, another server has the workspace, the port is in use, or the options
            would open the app to everyone.
    """
    options, auth = arguments_of(arguments)
    workspace = options.workspace.absolute()
    os.environ["GRADIO_TEMP_DIR"] = str(workspace / "temporary")  # before gradio is imported
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    dtype = getattr(torch, options.dtype) if options.dtype else usual_dtype(options.device)
    with Workspace(workspace).alone():
        session = Session(
            workspace, options.model, config_dir=options.config_dir, device=options.device, dtype=dtype,
            quantized={knob: value for knob in QUANTIZED if (value := getattr(options, knob)) is not None},
        )  # fmt: skip
        _serve(session, options, auth)
    return 0


def _serve(session: Session, options: argparse.Namespace, auth: list[tuple[str, str]] | None) -> None:
    from .page import build

    page, ended = build(session), threading.Event()
    page.queue(**QUEUE)
    threading.Thread(target=session.workspace.keep_clean, args=(ended,), daemon=True).start()
    try:
        _launch(page, served(session, options.host, options.port, auth, share=options.share), inbrowser=options.open)
        page.block_thread()
    finally:
        ended.set()
        session.machine.stop()


def _launch(page: Any, how: dict[str, Any], *, inbrowser: bool) -> None:
    """Serve a page, and go on.

    Raises:
        ConfigError: its port is in use.
    """
    try:
        page.launch(**how, inbrowser=inbrowser, prevent_thread_lock=True)
    except OSError as error:
        raise ConfigError(
            f"the app cannot be served at {how['server_name']}, port {how['server_port'] or '7860 to 7959'}",
            expected="a port that nothing else uses, at an address of this machine",
            fix="choose another --port, or end what uses it",
        ) from error


def arguments_of(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[tuple[str, str]] | None]:
    """The options, and who may come in: everyone, where it is None.

    Raises:
        ConfigError: they would open the app to people without a password.
    """
    options = _parser().parse_args(arguments)
    return options, _auth(options)


def served(
    session: Session, host: str, port: int | None, auth: list[tuple[str, str]] | None, *, share: bool = False
) -> dict[str, Any]:
    """How the page is launched: nothing is told, shared, kept or readable that need not be."""
    from .gate import gated

    return {
        "server_name": host, "server_port": port, "auth": auth, "share": share, "show_error": False,
        "allowed_paths": [str(session.workspace.people), str(session.workspace.adapters)],
        "max_threads": _THREADS, "max_file_size": "50mb", "enable_monitoring": False, "mcp_server": False,
        "run_history": False, "app_kwargs": gated(session.workspace), "footer_links": [], "css": CSS, "head": HEAD,
        "theme": theme(), "ssr_mode": False,
    }  # fmt: skip


def _auth(options: argparse.Namespace) -> list[tuple[str, str]] | None:
    pairs: list[tuple[str, str]] = []
    for place, told in (("--auth", options.auth), (AUTH, os.environ.get(AUTH, "").splitlines())):
        found = [(name, password) for name, _, password in (text.partition(":") for text in told)]
        if wrong := sum(not all(pair) for pair in found):
            raise ConfigError(f"{place} has {wrong} that are no pair", expected="NAME:PASSWORD each", fix="correct it")
        pairs += found
    elsewhere = options.host not in ("127.0.0.1", "localhost", "::1")
    if (elsewhere or options.share) and not pairs:
        asked, whom = ("--share", "on the internet") if options.share else (f"--host {options.host}", "in the network")
        raise ConfigError(
            f"{asked} would let everyone {whom} use this machine",
            expected=f"--auth NAME:PASSWORD, or the same in the environment variable {AUTH}",
            fix=f"give one, or leave {asked.split()[0]} out",
        )
    return pairs or None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="oft-diffusion app",
        description="Draw, compare and train in the browser.",
        epilog=f"Who lists processes can read --auth. {AUTH} in the environment, a pair in each line, is the same.",
    )
    parser.add_argument(
        "--model", default="pocket", help="pipeline folder, checkpoint or hub id (default: the shipped one)"
    )
    parser.add_argument("--config-dir", metavar="FOLDER", help="of a checkpoint's architecture, in diffusers' format")
    for knob, about in QUANTIZED.items():
        parser.add_argument(f"--{knob.replace('_', '-')}", metavar="WHICH", help=f"{about} (docs/quantization.md)")
    parser.add_argument(
        "--workspace",
        type=Path,
        default=Path("oft-app"),
        help="folder for adapters, runs and pictures (default: oft-app)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    parser.add_argument("--port", type=int, help="default: 7860, or the next that is free")
    parser.add_argument(
        "--auth", action="append", default=[], metavar="NAME:PASSWORD", help="let in nobody else; may be repeated"
    )
    parser.add_argument("--share", action="store_true", help="a link through gradio's servers; wants --auth")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 where the device computes in it"
    )
    parser.add_argument("--open", action="store_true", help="open a browser window")
    return parser
