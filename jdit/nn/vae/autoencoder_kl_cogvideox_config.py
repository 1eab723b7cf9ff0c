"""What CogVideoX's autoencoders differ in, and their tiles.

Source: diffusers models/autoencoders/autoencoder_kl_cogvideox.py.
"""

import dataclasses
import math
from typing import NamedTuple

from jdit.nn.layers import silu
from jdit.sharding import Rules

ACTIVATIONS = {"silu": silu, "swish": silu}
Pair = tuple[int, int]


class Grid(NamedTuple):
    """A grid of tiles: size and step in the input's pixels, blended and kept rows and columns in the result's."""

    size: Pair
    stride: Pair
    blend: Pair
    keep: Pair


class ShareTiles(NamedTuple):
    """Tiles in pixels and the share of each that overlaps the next, as upstream's `enable_tiling` takes them.

    Each number is rounded down by itself, as upstream. Where the steps are no whole number of latent pixels, joined
    tiles give pictures of another size than the whole would be.
    """

    height: int
    width: int
    share_height: float = 1 / 6
    share_width: float = 1 / 5

    def grid(self, factor: int, *, decode: bool) -> Grid:
        """For an autoencoder with latent pixels of `factor` x `factor` pixels.

        Raises:
            ValueError: tiles or steps of less than a pixel of input or result.
        """
        pixels = self.height, self.width
        latent = self.height // factor, self.width // factor
        size, result = (latent, pixels) if decode else (pixels, latent)
        shares = self.share_height, self.share_width
        stride = tuple(int(n * (1 - s)) for n, s in zip(size, shares))
        blend = tuple(int(n * s) for n, s in zip(result, shares))
        keep = tuple(n - b for n, b in zip(result, blend))
        if min(*stride, *keep, *latent) < 1 or min(shares) < 0:
            raise ValueError(f"{self}: tiles and their steps are at least {factor} pixels, shares in [0, 1)")
        return Grid(size, (stride[0], stride[1]), (blend[0], blend[1]), (keep[0], keep[1]))


@dataclasses.dataclass(frozen=True)
class AutoencoderKLCogVideoXConfig:
    """Architecture; the defaults are CogVideoX 2B's (5B and 1.5 differ in `scale` and `invert_scale`).

    Attributes:
        channels: width of each level, finest first; each further level halves rows and columns.
        layers: residual blocks a level in the encoder (the decoder has one more).
        groups: groups of each group norm. eps: of the norms in the encoder's residual blocks; the others have 1e-6.
        time_factor: pixel frames of a latent frame; as many levels as its binary logarithm, rounded down, halve the
            frames.
        scale: latents are handed to the transformer as z * scale.
        invert_scale: a picture that the transformer is conditioned on is divided by `scale` instead (1.5): for
            pipelines, `normalise` does not read it.
        quant_conv, post_quant_conv: 1x1 convolutions after the encoder and before the decoder. Upstream gives them
            out_channels, so that they need as many latent channels.
        sample_height, sample_width: pixels that the network was made for; a tile has half of each.
        force_upcast: upstream's wish for float32, which its pipelines do not heed; `dtype` decides.

    Raises:
        ValueError: the values contradict one another; the message has all findings.
    """

    in_channels: int = 3
    out_channels: int = 3
    channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers: int = 3
    act: str = "silu"
    eps: float = 1e-6
    groups: int = 32
    time_factor: float = 4
    sample_height: int = 480
    sample_width: int = 720
    scale: float = 1.15258426
    invert_scale: bool = False
    quant_conv: bool = False
    post_quant_conv: bool = False
    force_upcast: bool = True
    dtype: str = "float32"
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self):
        wrong = []
        if not self.channels:
            wrong.append("channels is empty")
        if bad := [c for c in self.channels if c % self.groups]:
            wrong.append(f"channels {bad} are not divisible into {self.groups} norm groups")
        if self.act not in ACTIVATIONS:
            wrong.append(f"act {self.act!r} is not among {list(ACTIVATIONS)}")
        if self.time_factor < 1:
            wrong.append(f"time_factor is {self.time_factor}, at least 1 is needed")
        if self.layers < 1:
            wrong.append(f"layers is {self.layers}, at least 1 is needed")
        if self.scale == 0:
            wrong.append("scale is 0")
        for name in ("quant_conv", "post_quant_conv"):
            if getattr(self, name) and self.out_channels != self.latent_channels:
                wrong.append(
                    f"{name} has out_channels, {self.out_channels}, and cannot take {self.latent_channels} "
                    "latent_channels"
                )
        if wrong:
            raise ValueError("CogVideoX autoencoder config: " + "; ".join(wrong))

    @property
    def space_factor(self) -> int:
        """Pixels that a latent pixel has along each side."""
        return 2 ** (len(self.channels) - 1)

    @property
    def halvings(self) -> int:
        """Levels that halve the frames: the finest of the encoder, and, doubling them, the coarsest of the decoder."""
        return min(int(math.log2(self.time_factor)), len(self.channels) - 1)

    @property
    def frame_factors(self) -> Pair:
        """Frames that become one latent frame, and that a latent frame becomes (but for the first)."""
        return 2**self.halvings, 2**self.halvings

    def frames(self, latent_frames: int) -> int:
        """Frames that this many latent frames become."""
        odd = latent_frames % 2
        return odd + (latent_frames - odd) * self.frame_factors[1]

    @property
    def tiles(self) -> ShareTiles:
        """The tiles that upstream takes if nothing is said: half of the sample's height and width."""
        return ShareTiles(self.sample_height // 2, self.sample_width // 2)
