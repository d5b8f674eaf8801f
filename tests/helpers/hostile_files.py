"""Files that somebody sends who means no good, or has mistaken what is asked for."""

from __future__ import annotations

import io
import json
import struct
import zipfile
import zlib
from functools import cache
from pathlib import Path

from PIL import Image, PngImagePlugin

PICKLE = b"\x80\x04\x95cos\nsystem\n(S'touch hurt'\ntR."
HURT = "<img src=x onerror='window.hurt=1'>"  # in a name
_SVG = b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.hurt=1</script></svg>"
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(hurt) (w) file\n"


@cache
def _png(side: int) -> bytes:
    """A black square of one bit per pixel, which takes next to no bytes, nor memory here."""
    packer, rows = zlib.compressobj(), bytes(100 * (1 + -(-side // 8)))
    packed = b"".join(packer.compress(rows) for _ in range(side // 100)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@cache
def _zip_bomb() -> bytes:
    """Three hundred megabytes of nothing, in 300 kilobytes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("../../evil.txt", "w") as entry:
        for _ in range(300):
            entry.write(bytes(1_000_000))
    return file.getvalue()


def hostile_pictures(folder: Path) -> list[Path]:
    """Files for which nothing but a sentence should come back; the first says it has 30,000 x 30,000 pixels."""
    return _written(
        folder,
        {
            "huge.png": _png(30_000),
            "bomb.png": _png(9_000),
            "zip.png": _zip_bomb(),
            "pickle.png": PICKLE,
            "fake.png": b"no picture",
            "page.svg": _SVG,
            "svg.png": _SVG,
            "script.jpg": _EPS,
            "cut.png": _png(1000)[:60],
            "empty.png": b"",
            f"{HURT}.png": b"no picture",
            f"{'a' * 200}.png": b"no picture",
        },
    )


def hostile_adapters(folder: Path, adapter: bytes) -> list[Path]:
    """The same for adapters; one of them is half of a good one."""
    claim = json.dumps({"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    return _written(
        folder,
        {
            "pickle.safetensors": PICKLE,
            "zip.safetensors": _zip_bomb(),
            "empty.safetensors": b"",
            "header.safetensors": struct.pack("<Q", 2**62) + b"{",
            "long.safetensors": struct.pack("<Q", 90_000_000) + b"{",
            "claim.safetensors": struct.pack("<Q", len(claim)) + claim,
            "deep.safetensors": struct.pack("<Q", 200_000) + b"[" * 100_000 + b"]" * 100_000,
            "half.safetensors": adapter[: len(adapter) // 2],
        },
    )


def hostile_settings(folder: Path) -> list[Path]:
    """Pictures whose settings cannot be used."""
    texts = {
        "deep.png": '{"steps":' + "[" * 100_000 + "]" * 100_000 + "}",
        "endless.png": '{"prompt": "x", "steps": 1e999}',
        "many.png": '{"prompt": "x", "steps": 100000}',
        "long.png": json.dumps({"prompt": "x" * 100_000}),
        "wide.png": '{"prompt": "x", "width": {"a": 1}}',
        "list.png": "[1, 2]",
        "adapters.png": '{"prompt": "x", "adapters": ["../../etc/passwd"]}',
        "path.png": '{"prompt": "x", "scheduler": "os.system", "seed": -5}',
    }
    found = []
    for name, text in texts.items():
        told = PngImagePlugin.PngInfo()
        told.add_text("oft_diffusion", text, zip=True)
        found.append(folder / name)
        Image.new("RGB", (8, 8)).save(found[-1], pnginfo=told)
    bloated = PngImagePlugin.PngInfo()
    for i in range(8):
        bloated.add_text(f"oft_diffusion{i}", " " * 10_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(folder / "bloated.png", pnginfo=bloated)
    return [*found, folder / "bloated.png"]


def _written(folder: Path, files: dict[str, bytes]) -> list[Path]:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]
