"""slm/config.py: files of older voices, under old names and with removed keys."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from slm import config
from slm.config import (
    REMOVED_FIELDS,
    RENAMED_FIELDS,
    NARConfig,
    SamplingConfig,
    SpeechFormConfig,
    TextConfig,
    from_json,
)

CONFIGS = (TextConfig(), SpeechFormConfig(), NARConfig(), SamplingConfig())


@pytest.mark.parametrize("value", CONFIGS, ids=lambda one: type(one).__name__)
def test_what_is_written_is_read(value) -> None:
    record = json.loads(json.dumps(asdict(value)))
    assert from_json(type(value), record) == value
    old = {new: old for old, new in RENAMED_FIELDS[type(value).__name__].items()}
    removed = {key: ok[0] for key, ok in REMOVED_FIELDS.get(type(value).__name__, {}).items()}
    older = {old.get(key, key): one for key, one in record.items()} | removed
    assert older.keys() != record.keys()
    assert from_json(type(value), older) == value
    with pytest.raises(TypeError, match="unheard_of"):
        from_json(type(value), {"unheard_of": 1})


def test_old_names_are_not_fields() -> None:
    for tables in (RENAMED_FIELDS, REMOVED_FIELDS):
        for name, table in tables.items():
            assert not {field.name for field in fields(getattr(config, name))} & table.keys()
    for name, table in RENAMED_FIELDS.items():
        assert set(table.values()) <= {field.name for field in fields(getattr(config, name))}


def test_removed_features_in_use_are_refused() -> None:
    with pytest.raises(ValueError, match="nar_iterations is 4: this feature was removed; use 1"):
        from_json(SamplingConfig, {"nar_iterations": 4})
    with pytest.raises(ValueError, match="masked is True"):
        NARConfig.from_json({"masked": True})
    assert NARConfig.from_json({"masked": False, "of_a_newer_version": 1}) == NARConfig()
    for cache in ("dynamic", "static"):
        assert from_json(SamplingConfig, {"cache": cache}) == SamplingConfig()


def test_the_shipped_voice_loads() -> None:
    shipped = Path(__file__).parents[2] / "models" / "small"
    sampling = from_json(SamplingConfig, json.loads((shipped / "sampling.json").read_text()))
    assert (sampling.temperature, sampling.max_attempts) == (0.7, 3)
    nar = NARConfig.from_json(json.loads((shipped / "nar" / "config.json").read_text()))
    assert (nar.conv_kernel, nar.label_smoothing_neighbors, nar.prompt_matching) == (9, 10.0, True)


@pytest.mark.parametrize(
    ("cls", "values"),
    [
        (SamplingConfig, {"temperature": "hot"}),
        (SamplingConfig, {"max_attempts": 1.5}),
        (SamplingConfig, {"frames_per_token": [1.0]}),
        (SamplingConfig, {"checks": "loop"}),
        (NARConfig, {"width": True}),
        (NARConfig, {"codebook_sizes": [8, None]}),
    ],
)
def test_values_of_files_have_their_types(cls: type, values: dict) -> None:
    (key,) = values
    with pytest.raises(ValueError, match=rf"^{key}: .* is not of type"):
        from_json(cls, values)
