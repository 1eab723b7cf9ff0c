"""Qwen-Image's autoencoder: Wan 2.1's network, trained further on pictures, which it sees as videos of one frame.

Source: diffusers models/autoencoders/autoencoder_kl_qwenimage.py; arXiv 2508.02324, section 2.3.
"""

import dataclasses

from jdit.nn.vae.autoencoder_kl_wan import AutoencoderKLWan
from jdit.nn.vae.autoencoder_kl_wan_config import AutoencoderKLWanConfig


@dataclasses.dataclass(frozen=True)
class AutoencoderKLQwenImageConfig(AutoencoderKLWanConfig):
    """Architecture; the defaults are the release's, which are Wan 2.1's, its statistics of the latents included."""


class AutoencoderKLQwenImage(AutoencoderKLWan):
    """Encoder and decoder of pictures (B, 1, H, W, 3); see `AutoencoderKLWan`."""
