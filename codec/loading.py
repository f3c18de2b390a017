"""Any codec by its folder or hub id."""

import json
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from codec.contract import SpeechCodec
from codec.folder import check_config_file, check_device, check_source
from codec.model import Codec


def load_codec(
    path_or_hub_id: str | Path, device: str = "cpu", *, fold: bool = True
) -> SpeechCodec:
    """A trained codec, ready to encode and decode, from a local folder or a hub id.

    It is one of ours, or EnCodec, DAC, Mimi or X-Codec2 of transformers, which config.json tells.
    The weight norm of ours is folded, which is faster: pass `fold=False`, or use
    `Codec.from_pretrained`, to train it further. Raises `ValueError` when it is missing or its
    files do not fit together.
    """
    path, source = Path(path_or_hub_id), str(path_or_hub_id)
    check_device(device)
    check_source(path)
    try:
        file = path / "config.json"
        if not path.is_dir():
            file = Path(hf_hub_download(source, "config.json"))
        check_config_file(file)
        # Ours have none; all of transformers' have.
        if "model_type" in json.loads(file.read_text(encoding="utf-8")):
            from codec.baselines import load_baseline

            return load_baseline(source, device)
        codec = Codec.from_pretrained(source, map_location=device)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such folder, and not to be had from the hub either "
            f"({type(error).__name__}); check the name"
        ) from error
    return codec.fold_weight_norm() if fold else codec
