"""Tiny random models of transformers' codec classes, saved as `load_codec` takes them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conftest import voiced
from transformers import (
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MimiConfig,
    MimiModel,
    Wav2Vec2BertConfig,
    Xcodec2Config,
    Xcodec2Model,
)

# Three codebooks of 16 entries at 24 kHz: 75 frames of 4 bits are 300 bit/s.
ENCODEC = {
    "num_filters": 4, "hidden_size": 16, "codebook_size": 16, "target_bandwidths": (0.3, 0.9),
}  # fmt: skip
# An odd stride, as the released models of 16 and 24 kHz have one.
DAC = {
    "encoder_hidden_size": 4, "downsampling_ratios": (2, 4, 5, 8), "decoder_hidden_size": 64,
    "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 4,
}  # fmt: skip
MIMI = {
    "sampling_rate": 16_000, "num_filters": 4, "hidden_size": 16, "upsampling_ratios": [8, 5, 4],
    "num_quantizers": 4, "codebook_size": 16, "codebook_dim": 8, "upsample_groups": 16,
    "vector_quantization_hidden_dimension": 8, "num_hidden_layers": 2, "intermediate_size": 24,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 50,
    "layer_scale_initial_scale": 0.5,
}  # fmt: skip
SEMANTIC = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "feature_projection_input_dim": 160, "conv_depthwise_kernel_size": 5,
}  # fmt: skip
XCODEC2 = {
    "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 16, "encoder_hidden_size": 2, "quantization_dim": 80,
    "quantization_levels": (4, 4, 4),
}  # fmt: skip
MODELS: dict[str, Callable[..., Any]] = {
    "encodec": lambda **changes: EncodecModel(EncodecConfig(**{**ENCODEC, **changes})),
    "dac": lambda **changes: DacModel(DacConfig(**{**DAC, **changes})),
    "mimi": lambda **changes: MimiModel(MimiConfig(**{**MIMI, **changes})),
    "xcodec2": lambda **changes: Xcodec2Model(
        Xcodec2Config(
            semantic_model_config=Wav2Vec2BertConfig(**SEMANTIC), **{**XCODEC2, **changes}
        )
    ),
}


def save_baseline(folder: Path, kind: str, **changes: Any) -> Path:
    """Random networks whose codebooks fit the latents of a speech-like signal."""
    torch.manual_seed(0)
    model = MODELS[kind](**changes).eval()
    with torch.no_grad():
        wave = torch.from_numpy(voiced(4.0))[None, None]
        for name, parameter in model.named_parameters():
            # The biases of transformers' initialization would dominate the input.
            if name.endswith("bias"):
                parameter.zero_()
            elif kind == "xcodec2" and parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
        if kind == "encodec":
            fill(model.quantizer.layers, model.encoder(wave))
        elif kind == "xcodec2":  # Scaled to the output of the semantic encoder.
            model.acoustic_encoder.conv2.weight /= model.acoustic_encoder(wave).std()
        elif kind == "mimi":
            latent = model.encoder(wave).latents
            for part in (
                model.quantizer.semantic_residual_vector_quantizer,
                model.quantizer.acoustic_residual_vector_quantizer,
            ):
                fill(part.layers, part.input_proj(latent))
    model.save_pretrained(folder)
    return folder


def fill(layers: Any, latent: torch.Tensor) -> None:
    """Sets the entries of each codebook to frames of its residual, latent (1,D,T)."""
    for layer in layers:
        table = layer.codebook
        size = table.codebook_size
        frames = torch.randperm(latent.shape[-1])[:size]
        (table.embed_sum if hasattr(table, "embed_sum") else table.embed).copy_(
            latent[0, :, frames].T
        )
        table._embed = None
        latent = latent - layer.decode(layer.encode(latent))
