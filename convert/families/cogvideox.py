"""CogVideoX 1.0 and 1.5: diffusers folders and the original (SAT) releases."""

from convert import autoencoder_kl_cogvideox as vae
from convert import cogvideox, single, t5
from convert.family import Family, Original
from convert.layout import Signature

_DIT = ("mixins.patch_embed.proj.weight", "transformer.layers.{i}.attention.query_key_value.weight")
_VAE = ("encoder.conv_in.conv.weight", "encoder.down.{i}.block.{j}.conv1.conv.weight", "decoder.conv_out.conv.weight")
_PREFIX = "model.diffusion_model."

FAMILY = Family(
    pipelines=("CogVideoXPipeline", "CogVideoXImageToVideoPipeline", "CogVideoXVideoToVideoPipeline"),
    components={"transformer": cogvideox.CLASS, "vae": vae.CLASS, "text_encoder": "T5EncoderModel"},
    tokenizers={"tokenizer": "T5TokenizerFast"},
    scheduler={
        "_class_name": "CogVideoXDDIMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
        "beta_schedule": "scaled_linear", "clip_sample": False, "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True, "set_alpha_to_one": True, "snr_shift_scale": 1.0,
        "timestep_spacing": "trailing",
    },
    originals={
        "transformer": Original(cogvideox.CLASS, cogvideox.original_config, cogvideox.original_rules, _PREFIX),
        "vae": Original(vae.CLASS, vae.original_config, vae.original_rules, "first_stage_model."),
        "text_encoder": Original(
            "T5EncoderModel", single.t5_config, t5.original_rules, "text_encoders.t5xxl.transformer."
        ),
    },
    signatures=(
        Signature("cogvideox", "transformer", _DIT, (), _PREFIX),
        Signature("cogvideox", "transformer", _DIT),
        Signature("cogvideox", "vae", _VAE, (), "first_stage_model."),
        Signature("cogvideox", "vae", _VAE),
        Signature("cogvideox", "text_encoder", t5.KEYS, (), "text_encoders.t5xxl.transformer."),
        Signature("cogvideox", "text_encoder", t5.KEYS, (t5.SECOND_BIAS,)),
    ),
    pipeline=cogvideox.pipeline,
    complete=cogvideox.complete,
    ignored=("loss.",),
    tokenizers_beside={"tokenizer": ("t5-v1_1-xxl",)},
)  # fmt: skip
