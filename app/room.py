"""How much room there is on the server's disk, for all together: nothing begins that it has no room for."""

from __future__ import annotations

import shutil

from oft_diffusion.errors import DataError

from .workspace import Workspace

LEAST_FREE = 1_000_000_000  # bytes of the disk
MOST_TEMPORARY = 20_000_000_000  # bytes of uploads, and of files to be fetched
MOST_ADAPTERS = 500


def check_room(workspace: Workspace, coming: int = 0) -> None:
    """Refuse to make or take more where it would fill the disk; of what is temporary, the oldest goes for it.

    Args:
        workspace: where it would lie.
        coming: how many bytes of it are known of.

    Raises:
        DataError: there is no room.
    """
    most = MOST_TEMPORARY - coming if _is_free(workspace, coming) else 0
    left = workspace.trim(most)
    if not _is_free(workspace, coming):
        raise DataError(
            "the server's disk is nearly full", expected=f"{(LEAST_FREE + coming) / 1e9:.1f} GB that are free",
            fix="delete what you need no more, under Adapters, or tell whoever runs the server",
        )  # fmt: skip
    if left > MOST_TEMPORARY - coming:
        raise DataError(
            f"uploads and files to be fetched take {(left + coming) / 1e9:.1f} GB",
            expected=f"at most {MOST_TEMPORARY / 1e9:.0f} GB", fix="try again in an hour, when older ones may go",
        )  # fmt: skip


def check_shelf(workspace: Workspace) -> None:
    """Refuse one more adapter where there are too many, or no room.

    Raises:
        DataError: there are.
    """
    if (count := sum(1 for _ in workspace.adapters.iterdir())) >= MOST_ADAPTERS:
        raise DataError(
            f"there are {count} adapters", expected=f"at most {MOST_ADAPTERS}", fix="delete some, under Adapters"
        )
    check_room(workspace)


def _is_free(workspace: Workspace, coming: int) -> bool:
    return shutil.disk_usage(workspace.root).free - coming >= LEAST_FREE
