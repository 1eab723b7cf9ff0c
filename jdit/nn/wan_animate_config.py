"""The architecture of Wan-Animate's transformer (arXiv 2509.14055; upstream transformer_wan_animate.py)."""

import dataclasses

from jdit.nn.wan import WanConfig


@dataclasses.dataclass(frozen=True)
class WanAnimateConfig(WanConfig):
    """Wan's architecture and what follows a pose and a face; the names in brackets are upstream's.

    Attributes:
        group: layers from one face adapter to the next; it stands behind a group's first [inject_face_latents_blocks].
        face_channels: widths of the motion encoder at the face's size, at half of it, and so on down to 4 x 4
            [motion_encoder_channel_sizes]; as many levels make up the size [motion_encoder_size].
        motion_features: of a face's appearance [motion_style_dim].
        motion_directions: how many directions of motion are told apart [motion_dim].
        motion_width: of the space that they lie in [motion_encoder_dim].
        face_width: of the layers over time [face_encoder_hidden_dim].
        face_tokens: a latent frame's, one learned token beside them left out [face_encoder_num_heads].
        face_chunk: frames of a sample that the motion encoder takes at once, for memory [motion_encoder_batch_size].
    """

    in_channels: int = 36
    image_dim: int | None = 1280
    group: int = 5
    face_channels: tuple[int, ...] = (32, 64, 128, 256, 512, 512, 512, 512)
    motion_features: int = 512
    motion_directions: int = 20
    motion_width: int = 512
    face_width: int = 1024
    face_tokens: int = 4
    face_chunk: int = 8

    def __post_init__(self):
        super().__post_init__()
        if self.in_channels % 2 or self.in_channels < 6:
            raise ValueError(f"in_channels {self.in_channels} must be twice the latent channels and 4 of the mask")
        if self.group < 1 or self.layers % self.group:  # upstream has no adapter for the last, shorter group
            raise ValueError(f"{self.layers} layers do not divide into groups of {self.group} with a face adapter each")
        if self.motion_directions > self.motion_width:
            raise ValueError(f"{self.motion_directions} directions of motion in a space of {self.motion_width}")
        if not self.face_channels or self.face_chunk < 1:
            raise ValueError(
                f"face_channels {self.face_channels}, face_chunk {self.face_chunk}: one or more are needed"
            )

    @property
    def latent_channels(self) -> int:
        """Channels of the pose; the input has as many of noise and of what is known, and 4 of a mask."""
        return (self.in_channels - 4) // 2

    @property
    def face_size(self) -> int:
        """Rows and columns of a face in pixels."""
        return 2 << len(self.face_channels)
