"""Operations that autograd and `torch.compile` see as one: a pure-torch reference, and faster twins per device."""

from oft_diffusion.kernels.block_rotate import block_rotate

__all__ = ["block_rotate"]
