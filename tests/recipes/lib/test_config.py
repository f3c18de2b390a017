import dataclasses
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml
from conftest import ROOT

from codec.training.run import resolved
from recipes.lib.config import RECIPES, help_text, load_config, naming_key


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    window: int = 64
    """Samples."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Optim:
    lr: float = 1e-3
    """Peak learning
    rate."""
    betas: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr must be positive, got {self.lr}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    out: Path
    """The run folder."""
    family: Literal["seanet", "spectral"] = "spectral"
    optim: Optim = field(default_factory=Optim)
    extra: Optim | None = None
    steps: int = 3
    weights: dict[str, float] = field(default_factory=lambda: {"mel": 1.0})
    scales: tuple[Scale, ...] = (Scale(), Scale(window=128))
    limit: int | None = None
    mode: Literal["a", "b"] | None = None
    files: tuple[Path, ...] = ()
    seed: int = 0


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_then_files_then_settings(file: Callable[[str], str]) -> None:
    first = file("steps: 5\noptim:\n  lr: 1e-4\n  betas: [0.5, 0.6]\n")
    second = file("steps: 7\n")
    config = load_config(
        Config, ["--config", first, f"--config={second}", "out=a b=c", "optim.lr=2e-4"]
    )
    expected = Config(out=Path("a b=c"), steps=7, optim=Optim(lr=2e-4, betas=(0.5, 0.6)))
    assert config == expected
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 1


def test_a_file_extends_others(tmp_path: Path) -> None:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    write("a.yaml", "steps: 5\noptim: {lr: 0.1}\nscales: [{window: 1}, {window: 2}]\nextra: null\n")
    write("b.yaml", "steps: 6\nfamily: seanet\n")
    below = write("c/c.yaml", "extends: [../a.yaml, ../b.yaml]\noptim: {betas: [0.5, 0.6]}\n")
    top = write("d.yaml", "extends: c/c.yaml\nout: x\nscales: [{window: 3}]\n")
    config = load_config(Config, ["--config", str(top)])
    assert config == Config(
        out=Path("x"), steps=6, family="seanet", optim=Optim(lr=0.1, betas=(0.5, 0.6)),
        scales=(Scale(window=3),),
    )  # fmt: skip
    for text, message in [
        ("extends: 3\n", f"{below}: extends names a file, or a list of files"),
        ("extends: [../d.yaml]\n", f"{below}: extends d.yaml, which extends it"),
        ("extends: [none.yaml]\n", f"{below.parent}/none.yaml: no such configuration file"),
        ("step: 3\n", f"{top}: step: no such key; did you mean steps?"),
    ]:
        below.write_text(text)
        with pytest.raises(ValueError, match=r".") as caught:
            load_config(Config, ["--config", str(top)])
        assert str(caught.value).startswith(message)


def test_nested_dataclasses_keep_their_types(file: Callable[[str], str]) -> None:
    config = load_config(
        Config,
        ["--config", file("scales:\n- window: 32\n"), "out=x", "extra.lr=0.5", "weights.wave=2"],
    )
    assert config.scales == (Scale(window=32),)
    assert config.extra == Optim(lr=0.5)
    assert config.weights == {"mel": 1.0, "wave": 2.0}
    assert load_config(Config, ["out=x"]).scales == (Scale(), Scale(window=128))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lrr=1", "optim.lrr: no such key; did you mean optim.lr?"),
        ("step=1", "step: no such key; did you mean steps?"),
        ("optim.learning_rate=1", "optim.learning_rate: no such key; did you mean optim.lr?"),
        ("output_dir=x", "output_dir: no such key; did you mean out?"),
        ("zzz=1", "zzz: no such key; --help lists the keys"),
        ("steps=many", "steps=many: expected a whole number"),
        ("family=dac", "family=dac: expected one of: seanet, spectral"),
        ("optim.betas=[1]", "optim.betas=[1]: expected a list of two numbers"),
        ("optim.betas=[a,b]", "optim.betas=[a, b]: expected a list of two numbers"),
        ("optim.betas=[{a: 1}, 2]", "optim.betas[0]={a: 1}: expected a number"),
        ("optim=3", "optim=3: expected keys below it, such as optim.lr"),
        ("steps.lr=3", "steps.lr: steps takes one value (a whole number), no keys below it"),
        ("extra.lrr=3", "extra.lrr: no such key; did you mean extra.lr"),
        ("steps=null", "steps=null: expected a whole number"),
        ("steps='a\n\n\nb'", r'steps="a\n\nb": expected a whole number'),
        ("steps=[", "steps=[: the value is not valid YAML"),
        ("optim.lr=-1", "optim.lr must be positive, got -1"),
        ("scales=[{windw: 3}]", "scales[0].windw: no such key; did you mean window?"),
        ("scales=[{window: 3}, {weight: x}]", "scales[1].weight=x: expected a number"),
        (
            "scales.0.window=3",
            "scales.0.window: scales is a list of items with the keys window, weig",
        ),
        ("scales=3", "scales=3: expected a list of items with the keys window, weight"),
        ("weights=[1]", "weights=[1]: expected names with numbers"),
        ("optim=[1]", "optim=[1]: expected keys below it, such as optim.lr"),
        ("weights.mel=x", "weights.mel=x: weights takes names with numbers"),
        ("extra=3", "extra=3: expected keys below it, or null"),
        ("limit=no", "limit=false: expected a whole number or null"),
        ("mode=x", "mode=x: expected one of: a, b, null"),
        ("files=3", "files=3: expected a list of paths"),
        ("--output=x", "--output=x: settings are key=value or --config FILE; did you mean out?"),
        ("--zzz", "--zzz: settings are key=value or --config FILE; --help lists the keys"),
        ("steps", "steps: settings are key=value or --config FILE"),
        ("--config", "--config needs a file name"),
        ("--config=nowhere.yaml", "nowhere.yaml: no such configuration file"),
    ],
)
def test_mistakes_are_one_line(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(Config, ["out=x", setting])
    said = str(caught.value)
    assert said.startswith(message)
    assert "\n" not in said


def test_mistakes_in_a_file_name_it(file: Callable[[str], str]) -> None:
    for text, message in [
        ("optim:\n  lrr: 1\n", "optim.lrr: no such key; did you mean optim.lr"),
        ("- 1\n", "a configuration file holds `key: value`"),
        ("a: [\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
    ]:
        path = file(text)
        with pytest.raises(ValueError, match=r".") as caught:
            load_config(Config, ["--config", path])
        assert str(caught.value).startswith(f"{path}: {message}")
        assert "\n" not in str(caught.value)


def test_errors_of_a_value_name_its_key() -> None:
    with pytest.raises(ValueError, match=r"^codec: none: no such folder$"), naming_key("codec"):
        raise ValueError("none: no such folder")


def test_a_key_without_default_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"^out has no default: give out=VALUE$"):
        load_config(Config, [])


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        load_config(Config, ["--help"], "Trains.")
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.strip() == help_text(Config, "Trains.").strip()
    assert text.startswith("Trains.\n")
    assert "  out: a path\n      The run folder.\n" in text
    assert "  optim.lr: a number = 0.001\n      Peak learning rate.\n" in text
    assert "  family: one of: seanet, spectral = spectral\n" in text
    assert "  extra: keys below it, or null = null\n" in text
    assert "  extra.lr: a number = 0.001\n" in text


def test_what_is_resolved_loads_again(tmp_path: Path) -> None:
    config = load_config(Config, ["out=x", "optim.lr=0.5", "scales=[{window: 8}]"])
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(resolved(config)))
    assert load_config(Config, ["--config", str(tmp_path / "c.yaml")]) == config


def test_the_last_of_equal_keys_wins_in_its_own_place() -> None:
    config = load_config(Config, ["out=x", "extra.lr=1", "steps=4", "extra=null", "extra.lr=2"])
    assert config.extra == Optim(lr=2.0)
    assert load_config(Config, ["out=x", "extra.lr=1", "extra=null"]).extra is None


def test_items_of_a_list_have_defaults() -> None:
    (scale,) = load_config(Config, ["out=x", "scales=[{}]"]).scales
    assert scale == Scale()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    max_attempts: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    num_items: int = 8
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layers:
    conv_kernel: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Current:
    """Keys that had other names."""

    num_asr_items: int = 1
    tts_eval: Evaluation = field(default_factory=Evaluation)
    half: bool = False
    nar: Layers | None = field(default_factory=Layers)


def test_keys_of_older_versions_are_read_with_a_warning(
    file: Callable[[str], str], caplog: pytest.LogCaptureFixture
) -> None:
    old = file("num_items: 2\nspeak:\n  num_items: 4\n  sampling: {tries: 5, cache: static}\n")
    config = load_config(
        Current, ["--config", old, "half=true", "speak.sampling.tries=6", "nar.kernel=9"]
    )
    sampling = Sampling(max_attempts=6)
    evaluation = Evaluation(num_items=4, sampling=sampling)
    assert config == Current(
        num_asr_items=2, tts_eval=evaluation, half=True, nar=Layers(conv_kernel=9)
    )
    assert caplog.messages == [
        f"{old}: num_items is called num_asr_items now",
        f"{old}: speak.num_items is called tts_eval.num_items now",
        f"{old}: speak.sampling.tries is called tts_eval.sampling.max_attempts now",
        f"{old}: speak.sampling.cache was removed, and is ignored",
        "speak.sampling.tries is called tts_eval.sampling.max_attempts now",
        "nar.kernel is called nar.conv_kernel now",
    ]
    with pytest.raises(ValueError, match="nar_iterations=8: this feature was removed; remove the"):
        load_config(Current, ["speak.sampling.nar_iterations=8"])


@pytest.mark.parametrize(
    ("recipe", "given", "expected"),
    [
        (
            "tts",
            "codec/smoke",
            "codec.spectral.encoder_width: codec takes one value (a text)",
        ),
        ("tts", "export/smoke", "cuts: no such key"),
        ("asr", "semantic/small", ""),
        ("train_codec", "tts/smoke", ""),
        ("export_tokens", "codec/smoke", ""),
        ("train_semantic", "tts/paper", ""),
    ],
)
def test_a_configuration_of_another_recipe_names_that_recipe(
    recipe: str, given: str, expected: str
) -> None:
    source = (ROOT / "recipes" / f"{recipe}.py").read_text()
    (loaded,) = set(re.findall(r"load_(?:voice_)?config\(\s*(\w+)", source))
    cls = getattr(importlib.import_module(f"recipes.{recipe}"), loaded)
    path = f"recipes/configs/{given}.yaml"
    with pytest.raises(ValueError, match=r".") as caught:
        load_config(cls, ["--config", str(ROOT / path)])
    message = str(caught.value)
    assert message.startswith(f"{ROOT / path}: {expected}")
    right = RECIPES[given.partition("/")[0]]
    assert message.endswith(f"; this looks like a configuration of recipes/{right}")
    assert "\n" not in message


@pytest.mark.parametrize("seed", [10**23, 2**32, -1])
def test_a_seed_that_a_generator_cannot_take_is_named(seed: int) -> None:
    with pytest.raises(
        ValueError, match=rf"seed={seed}: expected a whole number from 0 to 2\*\*32"
    ):
        load_config(Config, ["out=o", f"seed={seed}"])
    assert load_config(Config, ["out=o", f"seed={2**32 - 1}"]).seed == 2**32 - 1
