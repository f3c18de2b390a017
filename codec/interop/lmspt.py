"""The released LM-SPT's files into our codecs, and ours into its.

It publishes tensors as safetensors; their configuration is a YAML file of its Python package
(lmspt/infer/conf/model), from which Hydra builds the model.
"""

from math import prod
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_file

from codec.config import CodecConfig
from codec.folder import check_out_folder, written_together
from codec.interop import check_foreign, read_config_text, read_json, read_state
from codec.lmspt_original import SEMANTIC, filled_lmspt, to_lmspt
from codec.lmspt_original_config import config_from_lmspt, config_to_lmspt
from codec.model import Codec

MODEL_CLASS = "lmspt.model_codec.lmspt_model.LMSPT"
DECODER_CLASS = "lmspt.model_codec.dac_model.Decoder"


def import_lmspt(config_file: str | Path, checkpoint_file: str | Path) -> Codec:
    """The codec of a published configuration and checkpoint, ready to use or to train further.

    The configuration is YAML or JSON with the keys of the model, alone or under `model`. The
    checkpoint is safetensors or a state_dict saved with torch.save, with old or new names of weight
    norm, in any floating-point numbers. Raises `ValueError` when a file is damaged or they do not
    fit.
    """
    try:
        config = config_from_lmspt(_read_config(Path(config_file)))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from error
    try:
        return filled_lmspt(config, read_state(Path(checkpoint_file)))
    except ValueError as error:
        raise ValueError(f"{checkpoint_file}: {error}") from error


def lmspt_files(config: CodecConfig) -> tuple[str, str]:
    """Names of the configuration and the checkpoint that `export_lmspt` writes, after the original.

    12.5 Hz with codebooks of 16384 and 4096 entries has the name that its get_model asks for:
    lmspt_12d5hz_16384_4096.safetensors. Raises `ValueError` as `export_lmspt`.
    """
    theirs = config_to_lmspt(config)
    rate = f"{theirs['sample_rate'] / prod(theirs['encoder_rates']):g}".replace(".", "d")
    acoustic = theirs["acoustic_codebook_size"]
    acoustic = acoustic if isinstance(acoustic, list) else [acoustic]
    sizes = [theirs["semantic_codebook_size"], *acoustic]
    stem = "_".join([f"lmspt_{rate}hz", *map(str, sizes)])
    return f"{stem}_{theirs['n_codebooks']}vq.yaml", f"{stem}.safetensors"


def export_lmspt(codec: Codec, folder: str | Path, *, overwrite: bool = False) -> None:
    """Writes the files of `lmspt_files`, which the original's get_model loads or Hydra builds.

    Of a shared encoder the checkpoint has the acoustic name alone, as the original's own and as it
    demands when it loads. Raises `ValueError` for another family, for what the original has no
    place for, for a folded codec and for files that are there already unless `overwrite`.
    """
    original, folder = to_lmspt(codec), Path(folder)
    check_out_folder(folder)
    config_name, checkpoint_name = lmspt_files(codec.config)
    for file in (folder / config_name, folder / checkpoint_name):
        if file.exists() and not overwrite:
            raise ValueError(f"{file}: is there already; choose another folder")
    state = original.state
    if codec.config.lmspt.shared_encoder:
        state = {name: state[name] for name in state if not name.startswith(SEMANTIC)}
    auxiliary = {"_target_": DECODER_CLASS, **original.config["aux_decoder"]}
    model = {"_target_": MODEL_CLASS, **original.config, "aux_decoder": auxiliary}
    with written_together(folder) as temporary:
        text = yaml.safe_dump({"model": model}, sort_keys=False, default_flow_style=None)
        (temporary / config_name).write_text(text, encoding="utf-8")
        save_file(state, temporary / checkpoint_name, metadata={"format": "pt"})


def _read_config(file: Path) -> dict[str, Any]:
    if file.suffix == ".json":
        return read_json(file)
    text = read_config_text(file)
    try:
        config = yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        raise ValueError("holds no keys and values in YAML; copy it again")
    check_foreign(config)
    return config
