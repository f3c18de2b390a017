"""Any codec by its folder or hub id."""

from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from codec.folder import check_config_file, check_device
from codec.model import Codec


def load_codec(path_or_hub_id: str | Path, device: str = "cpu", *, fold: bool = True) -> Codec:
    """A trained codec, ready to encode and decode, from a local folder or a hub id.

    Its weight norm is folded, which is faster: pass `fold=False`, or use `Codec.from_pretrained`,
    to train it further. Raises `ValueError` when it is missing or its files do not fit together.
    """
    path = Path(path_or_hub_id)
    check_device(device)
    if path.is_dir():
        check_config_file(path / "config.json")
    try:
        codec = Codec.from_pretrained(str(path_or_hub_id), map_location=device)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise ValueError(
            f"{path_or_hub_id}: no such folder, and not to be had from the hub either "
            f"({type(error).__name__}); check the name"
        ) from error
    return codec.fold_weight_norm() if fold else codec
