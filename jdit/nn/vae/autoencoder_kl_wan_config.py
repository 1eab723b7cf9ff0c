"""What Wan's autoencoders differ in: widths, levels, patches, and the statistics of their latents.

Source: diffusers models/autoencoders/autoencoder_kl_wan.py and scripts/convert_wan_to_diffusers.py (the values of 2.2).
"""

import dataclasses
import math

from jdit.sharding import Rules

MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
    -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
    2.8251, 1.9160,
)  # fmt: skip
MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AutoencoderKLWanConfig:
    """Architecture; the defaults are Wan 2.1's.

    Attributes:
        width, decoder_width: channels of multiplier 1; decoder_width None is `width`.
        multipliers: of each level's width, finest first; each further level halves rows and columns.
        layers: residual blocks a level in the encoder (the decoder has one more).
        attention: scales (1, 1/2, 1/4 ...) at which the encoder attends after each block; not in `residual` networks.
        temporal: whether the change of resolution after each level also halves the frames.
        residual: levels have a shortcut of averages and repeats around them (2.2).
        patch: p x p pixels become channels first; in_channels and out_channels count them.
        mean, std: of raw latents, a value a channel, see `normalise`.
        time_factor, space_factor: what pipelines and tiles take for the compression; the architecture has its own.
        dropout: of training.

    Raises:
        ValueError: the values contradict one another; the message has all findings.
    """

    in_channels: int = 3
    out_channels: int = 3
    width: int = 96
    decoder_width: int | None = None
    latent_channels: int = 16
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    layers: int = 2
    attention: tuple[float, ...] = ()
    temporal: tuple[bool, ...] = (False, True, True)
    residual: bool = False
    patch: int | None = None
    mean: tuple[float, ...] = MEAN_21
    std: tuple[float, ...] = STD_21
    time_factor: int | None = 4
    space_factor: int | None = 8
    dropout: float = 0.0
    dtype: str = "float32"
    rules: Rules = dataclasses.field(default_factory=Rules)

    def __post_init__(self):
        wrong, n = [], len(self.multipliers)
        if not n:
            wrong.append("multipliers is empty")
        if len(self.temporal) < n - 1:
            wrong.append(f"temporal has {len(self.temporal)} values for {n - 1} changes of resolution")
        if self.residual and not wrong:
            for side, levels in (("encoder", self.encoder_levels), ("decoder", self.decoder_levels)):
                for i, (c_in, c_out, time, space) in enumerate(levels):
                    volume = time * space**2
                    down, up = c_in * volume % c_out, (space > 1 and c_out * volume % c_in)
                    if down if side == "encoder" else up:
                        wrong.append(f"the shortcut of {side} level {i} cannot map {c_in} to {c_out} channels")
        if wrong:
            raise ValueError("Wan autoencoder config: " + "; ".join(wrong))

    def _levels(self, widths: list[int], temporal: tuple[bool, ...]) -> list[tuple[int, int, int, int]]:
        last = len(self.multipliers) - 1
        steps = [(2 if t else 1, 2) for t in temporal[:last]] + [(1, 1)]
        return [(a, b, *step) for a, b, step in zip(widths, widths[1:], steps)]

    @property
    def encoder_levels(self) -> list[tuple[int, int, int, int]]:
        """(channels in, channels out, factor of the frames, factor of rows and columns), finest first."""
        return self._levels([self.width * m for m in (1, *self.multipliers)], self.temporal)

    @property
    def decoder_levels(self) -> list[tuple[int, int, int, int]]:
        """As `encoder_levels`, coarsest first. Without `residual`, a change of resolution halves the channels."""
        base = self.decoder_width or self.width
        levels = self._levels([base * m for m in (self.multipliers[-1], *self.multipliers[::-1])], self.temporal[::-1])
        if self.residual:
            return levels
        return [(a if i == 0 else a // 2, b, time, space) for i, (a, b, time, space) in enumerate(levels)]

    @property
    def frame_factors(self) -> tuple[int, int]:
        """Frames that become one latent frame, and that a latent frame becomes (but for the first)."""
        times = [[level[2] for level in levels] for levels in (self.encoder_levels, self.decoder_levels)]
        return math.prod(times[0]), math.prod(times[1])

    @property
    def pixel_factor(self) -> int:
        """Pixels that a latent pixel has along each side."""
        return 2 ** (len(self.multipliers) - 1) * (self.patch or 1)
