"""Operations that autograd and `torch.compile` see as one: a pure-torch reference, and faster twins per device."""

from oft_diffusion.kernels import inlined as _inlined  # noqa: F401 - registers itself
from oft_diffusion.kernels.block_rotate import block_rotate
from oft_diffusion.kernels.rotate_shared import block_rotate_shared

__all__ = ["block_rotate", "block_rotate_shared"]
