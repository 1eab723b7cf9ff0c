"""What HunyuanVideo's autoencoders differ in.

Source: diffusers models/autoencoders/autoencoder_kl_hunyuan_video.py.
"""

import dataclasses
from typing import NamedTuple

from jdit.nn.layers import silu
from jdit.sharding import Rules

ACTIVATIONS = {"silu": silu, "swish": silu}
EPS = 1e-6
"""Of every norm, whatever the config, as upstream."""


class Level(NamedTuple):
    """A resolution: channels in and out, and the factors of frames and of rows and columns after it."""

    c_in: int
    c_out: int
    time: int
    space: int


@dataclasses.dataclass(frozen=True)
class AutoencoderKLHunyuanVideoConfig:
    """Architecture; the defaults are HunyuanVideo's.

    Attributes:
        channels: width of each level, finest first.
        layers: residual blocks a level in the encoder (the decoder has one more).
        groups: groups of each group norm.
        act: in the residual blocks; before the last convolution of a side it is always silu, as upstream.
        scale: latents are handed to the transformer as z * scale.
        space_factor: pixels that a latent pixel has along each side. On both sides of the network, the first levels
            that run change rows and columns (also of the last one, where there are as few).
        time_factor: pixel frames of a latent frame (but for the first). On both sides, the last levels that run, the
            very last apart, change the frames. Upstream's decoder knows 4 alone.
        mid_attention: at the coarsest level each pixel attends to those of its own and of earlier frames.

    Raises:
        ValueError: the values contradict one another; the message has all findings.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    channels: tuple[int, ...] = (128, 256, 512, 512)
    layers: int = 2
    act: str = "silu"
    groups: int = 32
    scale: float = 0.476986
    space_factor: int = 8
    time_factor: int = 4
    mid_attention: bool = True
    dtype: str = "float32"
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self):
        wrong, n = [], len(self.channels)
        if bad := [c for c in self.channels if c % self.groups]:
            wrong.append(f"channels {bad} are not divisible into {self.groups} norm groups")
        if self.act not in ACTIVATIONS:
            wrong.append(f"act {self.act!r} is not among {list(ACTIVATIONS)}")
        if self.layers < 1:
            wrong.append(f"layers is {self.layers}, at least 1 is needed")
        if self.scale == 0:
            wrong.append("scale is 0")
        if self.time_factor != 4:
            wrong.append(f"time_factor is {self.time_factor}, supported is 4")
        elif n < 3:
            wrong.append(f"channels has {n} levels: a time_factor of 4 needs at least 3")
        fits = [2**i for i in range(n + 1)]
        if self.space_factor not in fits:
            wrong.append(f"space_factor is {self.space_factor}, with {n} levels it can be one of {fits}")
        if wrong:
            raise ValueError("HunyuanVideo autoencoder config: " + "; ".join(wrong))

    def _levels(self, widths: tuple[int, ...]) -> list[Level]:
        last, halvings = len(widths) - 1, self.space_factor.bit_length() - 1
        doublings = self.time_factor.bit_length() - 1
        return [
            Level(
                widths[max(i - 1, 0)], c, 2 if last - doublings <= i < last else 1, 2 if i < halvings else 1
            ) for i, c in enumerate(widths)
        ]  # fmt: skip

    @property
    def encoder_levels(self) -> list[Level]:
        """Finest first."""
        return self._levels(self.channels)

    @property
    def decoder_levels(self) -> list[Level]:
        """Coarsest first."""
        return self._levels(self.channels[::-1])

    def frames(self, latent_frames: int) -> int:
        """Frames that this many latent frames become."""
        return 1 + (latent_frames - 1) * self.time_factor

    def latent_frames(self, frames: int) -> int:
        """Latent frames that this many frames become."""
        return 1 + (frames - 1) // self.time_factor
