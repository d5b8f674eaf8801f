"""Latents that are easy to denoise: few channels, uncorrelated, all of deviation 1."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from oft_diffusion.pocket.model import LATENT_CHANNELS, build_vae


@torch.no_grad()
def condense(wide: AutoencoderKL, means: Tensor, deviation: float) -> AutoencoderKL:
    """An autoencoder of `LATENT_CHANNELS` channels: the principal components of a wide one's latents, scaled to 1.

    Pipelines know one scaling factor for all channels. Channels of unlike deviation would be lost in noise at unlike
    times, correlated ones told twice, and the weak ones be mostly noise to the denoiser. The change of coordinates is
    folded into the convolutions next to the bottleneck. It is exact for what the kept components hold, but for a
    border of one latent pixel, where padding meets the folded offset.

    Args:
        wide: from `build_vae(channels)`, trained.
        means: its posterior means of some pictures, `(n, channels, h, w)`.
        deviation: the new posterior's, the same everywhere.
    """
    flat = means.permute(0, 2, 3, 1).flatten(0, 2).double()
    centre = flat.mean(0)
    variances, vectors = torch.linalg.eigh((flat - centre).T @ (flat - centre) / len(flat))
    scale, vectors = variances[-LATENT_CHANNELS:].sqrt(), vectors[:, -LATENT_CHANNELS:]
    into, back = (vectors / scale).T.float(), (vectors * scale).float()

    narrow = build_vae()
    kept = {k: v for k, v in wide.state_dict().items() if v.shape == narrow.state_dict()[k].shape}
    narrow.load_state_dict(kept, strict=False)
    _fold_encoder(wide, narrow, into, centre.float(), deviation)
    _fold_decoder(wide, narrow, back, centre.float())
    return narrow.to(wide.device)


def _fold_encoder(wide: AutoencoderKL, narrow: AutoencoderKL, into: Tensor, centre: Tensor, deviation: float) -> None:
    quant, kernel, bias = _parts(wide.quant_conv, wide.encoder.conv_out)
    channels = len(centre)
    both = into @ quant[0][:channels]
    out = narrow.encoder.conv_out
    assert out.bias is not None
    out.weight.zero_()
    out.weight[:LATENT_CHANNELS] = torch.einsum("ij,jchw->ichw", both, kernel)
    out.bias[:LATENT_CHANNELS] = both @ bias + into @ (quant[1][:channels] - centre)
    out.bias[LATENT_CHANNELS:] = 2 * torch.tensor(deviation).log()  # the second half: logarithms of variances
    _make_identity(narrow.quant_conv)


def _fold_decoder(wide: AutoencoderKL, narrow: AutoencoderKL, back: Tensor, centre: Tensor) -> None:
    post, kernel, bias = _parts(wide.post_quant_conv, wide.decoder.conv_in)
    first = narrow.decoder.conv_in
    assert first.bias is not None
    first.weight.copy_(torch.einsum("ochw,cj->ojhw", kernel, post[0] @ back))
    first.bias.copy_(bias + kernel.sum((2, 3)) @ (post[0] @ centre + post[1]))
    _make_identity(narrow.post_quant_conv)


def _parts(pointwise: nn.Conv2d | None, conv: nn.Conv2d) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """A 1x1 convolution as (matrix, offset), and another one's kernel and bias."""
    assert pointwise is not None
    assert pointwise.bias is not None
    assert conv.bias is not None
    tensors = pointwise.weight[:, :, 0, 0], pointwise.bias, conv.weight, conv.bias
    matrix, offset, kernel, bias = (t.cpu() for t in tensors)
    return (matrix, offset), kernel, bias


def _make_identity(pointwise: nn.Conv2d | None) -> None:
    assert pointwise is not None
    assert pointwise.bias is not None
    pointwise.weight.copy_(torch.eye(len(pointwise.weight)).view_as(pointwise.weight))
    pointwise.bias.zero_()
