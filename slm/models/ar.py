"""The AR: a pretrained causal LM whose vocabulary is extended by codebook 1.

Its folder, `ar/` of a voice:

    base.json          the base LLM: name, digest, number of layers; LoRA adapters or all weights
    vocabulary.json    the id map
    alphabet.json      the forms of text and speech (slm/tokenization/tokenizer.py)
    coverage.json      characters and lengths of the training data (slm/data/sequences.py)
    adapter_*          peft's files, with the embedding rows of new tokens; or the full model
    tokenizer*         the LLM's tokenizer, so that full weights need no base
"""

import json
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from codec.io import (
    DAMAGE,
    apply_umask_to_weights,
    atomic_file,
    fits_type,
    parse_json,
    sha256_of_tensors,
)
from codec.program import quiet_transformers, reason_of
from codec.tokens import CodecStamp
from codec.weights import check_layers, check_pickled, check_sizes, stored_shapes, weights_of
from slm.config import ARConfig, LoRAConfig
from slm.data.ar import IGNORE, ARBatch
from slm.data.interleaving import sequence_format
from slm.data.sequences import ASR, CONTINUATION, TASKS, TEXT, TTS
from slm.models.attention import packed_inputs, use_training_attention
from slm.models.lm_head import PositionGroup, check_head, group_logits, speech_ids, text_ids
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import Vocabulary, extend, row_parameters

logger = logging.getLogger(__name__)

BASE_FILE = "base.json"
BASE_KEYS = {"name": str, "digest": str, "num_layers": int | None, "adapter": bool}
"""Keys of base.json and their types."""
SAMPLES_PER_TENSOR = 4096
ADAPTER_KEYS = {
    *("base_model_name_or_path", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout"),
    *("modules_to_save", "peft_type", "peft_version", "r", "target_modules", "task_type"),
    "trainable_token_indices",
}
"""Keys of adapter_config.json that differ between voices."""


class Scores(NamedTuple):
    """Sums over targets, one entry for each of the model's `groups`."""

    nll: Float[Tensor, " G"]
    correct: Float[Tensor, " G"]
    """Targets with the highest logit."""
    targets: Float[Tensor, " G"]
    """Number of targets."""


def check_task(tasks: Mapping[str, float], task: str) -> None:
    """Raises ValueError if `task`, tts or asr, is not among the training tasks of a voice (by
    weight; older voices have no record of them and were trained on both)."""
    if tasks.get(task, 1.0) == 0:
        does, fails = {"tts": ("transcribes", "synthesize"), "asr": ("synthesizes", "transcribe")}[
            task
        ]
        raise ValueError(f"this voice {does}, but cannot {fails}: it was trained without {task}")


class SpeechLM(nn.Module):
    """A causal LM over text and codebook 1; built by `create` or `load`."""

    groups = TASKS

    def __init__(self, lm: Any, tokenizer: SpeechTextTokenizer, origin: dict[str, Any]):
        super().__init__()
        self.lm = lm
        self.tokenizer = tokenizer
        self.format = sequence_format(tokenizer)
        self.origin = origin
        self.config = lm.config

    @classmethod
    def create(cls, config: ARConfig, codec: CodecStamp, seed: int) -> "SpeechLM":
        """A pretrained LLM with new embedding rows for `codec`'s codebook 1, ready to be trained;
        with LoRA adapters if configured."""
        base = load_base(config.base, config.num_layers)
        tokenizer = SpeechTextTokenizer.create(
            base.lm, base.tokenizer, codec, config.text, config.speech
        )
        vocabulary = tokenizer.vocabulary
        extend(base.lm, vocabulary, seed, config.init_scale)
        if config.letter_init is not None:
            init_from_letters(base.lm, tokenizer, Letters.load(config.letter_init))
        lm = base.lm
        use_training_attention(lm)
        if config.start_from is not None:
            cls._start_from(lm, vocabulary, base.digest, config)
        if config.gradient_checkpointing:
            with warnings.catch_warnings():  # Its later name is not in every release.
                warnings.simplefilter("ignore", FutureWarning)
                lm.gradient_checkpointing_enable({"use_reentrant": False})
            lm.enable_input_require_grads()
        if config.lora is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                lm = add_adapters(lm, config.lora, vocabulary.new_ids)
        origin = {
            "name": config.base,
            "digest": base.digest,
            "num_layers": config.num_layers,
            "adapter": config.lora is not None,
            "tasks": asdict(config.tasks),
        }
        return cls(lm, tokenizer, origin)

    @classmethod
    def _start_from(cls, lm: Any, vocabulary: Vocabulary, digest: str, config: ARConfig) -> None:
        """Copies the weights of `config.start_from` into `lm`.

        Raises:
            ValueError: where they do not fit, or are LoRA adapters.
        """
        folder, source = config.start_from, cls.load(str(config.start_from))
        if source.origin["adapter"]:
            raise ValueError(f"{folder}: has LoRA adapters; only fully trained weights can be used")
        for what, found, wanted in (
            ("number of layers", source.origin["num_layers"], config.num_layers),
            ("text LLM", source.origin["digest"], digest),
            ("number of rows", source.vocabulary.size, vocabulary.size),
            ("frame rate", source.vocabulary.codec.frame_rate, vocabulary.codec.frame_rate),
        ):
            if found != wanted:
                raise ValueError(f"{folder}: another {what} ({found}, here {wanted})")
        if source.vocabulary.codec.digest != vocabulary.codec.digest:
            logger.warning(
                "%s was trained on another codec's codes: it must have the same codebook 1", folder
            )
        lm.load_state_dict(source.lm.state_dict())

    @property
    def vocabulary(self) -> Vocabulary:
        """Id ranges of text, special tokens and speech."""
        return self.tokenizer.vocabulary

    def check_task(self, task: str) -> None:
        """Raises ValueError for a task that the model was not trained on."""
        check_task(self.origin.get("tasks", {}), task)

    @property
    def max_positions(self) -> int:
        """Context length of the LLM, in tokens."""
        return int(getattr(self.config, "max_position_embeddings", 1 << 20))

    def forward(self, batch: ARBatch) -> Scores:
        """Losses at target positions, each over the ids that its target may have: codes and their
        end for speech, the form of transcripts for asr, all text ids for text."""
        labels, tasks = batch.labels.flatten(), batch.tasks.flatten()
        is_target, is_speech = labels != IGNORE, (tasks == TTS) | (tasks == CONTINUATION)
        groups = [
            PositionGroup((is_target & chosen).nonzero()[:, 0], ids)
            for chosen, ids in [
                (is_speech, speech_ids(self.tokenizer)),
                (tasks == ASR, text_ids(self.tokenizer, "asr")),
                (tasks == TEXT, text_ids(self.tokenizer, "text")),
            ]
        ]
        # Costly rows, and of the same table as the others': no rank lacks a gradient without them.
        groups = groups[: 2 + bool(len(groups[2].positions))]
        inputs = {"input_ids": batch.tokens}
        if batch.documents is not None:
            inputs |= packed_inputs(self.lm, batch.documents)
        logits = group_logits(self.lm, groups, owner=self, **inputs)
        scores = [
            score(each, ids.columns(labels[positions]), tasks[positions], len(TASKS))
            for each, (positions, ids) in zip(logits, groups, strict=True)
        ]
        return Scores(*(torch.stack(parts).sum(0) for parts in zip(*scores, strict=True)))

    def save(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Writes the folder described above.

        Args:
            folder: is created.
            state: the trained parameters by name, where an engine has partitioned them
                (slm/train.py gathers them); None: the model's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = dict(self.state_dict()) if state is None else dict(state)
        weights = {name.removeprefix("lm."): value for name, value in weights.items()}
        if self.origin["adapter"]:
            # `auto` would look for the base on the hub, and would copy all of the table.
            self.lm.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)
        else:
            self.lm.save_pretrained(folder, state_dict=weights)
        apply_umask_to_weights(folder)
        self.tokenizer.text_tokenizer.save_pretrained(folder)
        self.tokenizer.save(folder)
        self.save_origin(folder)

    def save_origin(self, folder: str | Path, loaded_from: str | Path | None = None) -> None:
        """Writes base.json. The path of a local LLM is stored relative to the folder as well, so
        that both can be moved together.

        Args:
            folder: `ar/` of the voice.
            loaded_from: the folder of the AR that this one is a copy of; None: a new one.
        """
        folder, origin = Path(folder), dict(self.origin)
        if loaded_from is not None and "relative" in origin:
            origin["relative"] = os.path.relpath(Path(loaded_from) / origin["relative"], folder)
        elif Path(origin["name"]).exists():
            origin["relative"] = os.path.relpath(origin["name"], folder)
        with atomic_file(folder / BASE_FILE) as temporary:
            temporary.write_text(json.dumps(origin, indent=1))

    @classmethod
    def load(
        cls, folder: str | Path, base: str | Path | None = None, dtype: torch.dtype = torch.float32
    ) -> "SpeechLM":
        """The AR of a folder, for inference: adapters are merged.

        Args:
            folder: `ar/` of a voice.
            base: the LLM's path or hub id, if it has moved.
            dtype: of the weights.

        Raises:
            ValueError: for a folder that is incomplete, or whose LLM is not found.
        """
        folder = Path(folder)
        vocabulary = Vocabulary.load(folder)
        origin = _read_object(folder / BASE_FILE, BASE_KEYS)
        if origin["adapter"]:
            lm, text_tokenizer = _load_adapted(folder, origin, vocabulary, base, dtype)
        else:
            lm, text_tokenizer, _ = load_base(folder, None, dtype)
        if lm.get_input_embeddings().weight.shape[0] != vocabulary.size:
            raise ValueError(f"{folder}: its table of tokens does not fit its vocabulary.json")
        tokenizer = SpeechTextTokenizer.load(folder, text_tokenizer)
        return cls(lm, tokenizer, origin).eval().requires_grad_(False)


def score(
    logits: Float[Tensor, "N V"], labels: Tensor, groups: Tensor, num_groups: int,
    shares: Float[Tensor, "V V"] | None = None,
) -> Scores:  # fmt: skip
    """Sums over targets by group, in float32.

    Args:
        shares: target distribution of each label, a row each; None: one-hot.
    """
    logits = logits.float()
    wanted = labels if shares is None else shares[labels]
    nll = functional.cross_entropy(logits, wanted, reduction="none")
    correct = (logits.detach().argmax(-1) == labels).float()
    zeros = torch.zeros(num_groups, device=logits.device)
    return Scores(
        nll=zeros.index_add(0, groups, nll),
        correct=zeros.index_add(0, groups, correct),
        targets=zeros.index_add(0, groups, torch.ones_like(nll)),
    )


class Base(NamedTuple):
    """A text LLM as loaded, before it is extended."""

    lm: Any
    tokenizer: Any
    digest: str
    """`digest_of` its parameters; the same in any precision."""


def load_base(
    name: str | Path, num_layers: int | None = None, dtype: torch.dtype = torch.float32
) -> Base:
    """Loads a causal LM and its tokenizer.

    Args:
        name: hub id, folder or .gguf file.
        num_layers: keeps the first layers only; None: all.
        dtype: of the weights.

    Raises:
        ValueError: where it cannot be loaded, or its logits are not supported.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    path = Path(name)
    where: dict[str, Any] = {}
    source = str(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path}: no such .gguf file")
        source, where = str(path.parent), {"gguf_file": path.name}
    elif not path.is_dir() and (path.is_absolute() or str(name).count("/") != 1):
        raise ValueError(f"{name}: no such folder of a text LLM, nor a hub id (owner/name)")
    with _named_errors(name):
        check_layers(Path(source))
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **where)
    if num_layers is not None:
        _keep_layers(config, num_layers, str(name))
    with _named_errors(name), quiet_transformers():
        for file in weights_of(path):
            if file.suffix == ".bin":
                check_pickled(file)
        check_sizes(
            lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=False),
            [path] if path.suffix == ".gguf" else weights_of(path),
        )
    # With `num_layers`, transformers would list the layers that are left out.
    with _named_errors(name), quiet_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=dtype, attn_implementation="sdpa",
            output_loading_info=True, trust_remote_code=False, **where,
        )  # fmt: skip
        lm, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **where)
    if lacking := sorted(info["missing_keys"]):
        raise ValueError(f"{name}: its weights lack {', '.join(lacking[:3])}; fetch it again")
    check_head(lm, str(name))
    return Base(lm, tokenizer, digest_of(lm))


@contextmanager
def _named_errors(name: str | Path) -> Iterator[None]:
    """Turns errors of transformers into one line that names the LLM."""
    try:
        yield
    except Exception as error:  # tokenizers raises bare ones
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name}: cannot be loaded as a text LLM: {reason}") from error


def _keep_layers(config: Any, num_layers: int, name: str) -> None:
    if num_layers > config.num_hidden_layers:
        raise ValueError(
            f"ar.num_layers is {num_layers}, but {name} has only {config.num_hidden_layers} layers"
        )
    config.num_hidden_layers = num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:num_layers]


def digest_of(lm: nn.Module) -> str:
    """16 hex digits over names, shapes and up to 4096 evenly spaced values of every parameter, in
    bfloat16: identifies an LLM in under a second, but is no proof against tampering."""
    samples = []
    for name, parameter in sorted(lm.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES_PER_TENSOR)].to(torch.bfloat16)
        samples.append((f"{name}{tuple(parameter.shape)}", sample.view(torch.int16)))
    return sha256_of_tensors(samples)


def add_adapters(
    lm: Any, config: LoRAConfig, rows: Sequence[int], full_modules: Sequence[str] = ()
) -> Any:
    """An LLM with LoRA adapters (peft).

    Args:
        rows: ids whose embedding rows are trained.
        full_modules: names of modules whose parameters are trained directly.

    Raises:
        ValueError: for `config.targets` that name the embedding or the head.
    """
    from peft import LoraConfig, get_peft_model

    tables = (lm.get_input_embeddings(), lm.get_output_embeddings())
    names = [name for name, module in lm.named_modules() if module in tables]
    for target in config.targets:
        if any(f".{name}".endswith(f".{target}") for name in names):
            raise ValueError(
                f"lora.targets: {target} is the table of tokens, whose new rows are trained and "
                "whose old rows stay frozen; leave it out"
            )
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
        trainable_token_indices=row_parameters(lm, rows),
        modules_to_save=list(full_modules) or None,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        # peft asks transformers for an attribute under its old name.
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(lm, settings)


class Letters(NamedTuple):
    """Distribution of each code of codebook 1 over letters, written by recipes/make_clips.py.

    A code of a semantic codebook often stands for a letter or two. New embedding rows that start as
    a mixture of the letters' rows let the LLM match speech and text from the first step on.
    """

    letters: str
    shares: Float[np.ndarray, "K L"]
    """Column 0 is the end of a word, the others are the letters."""

    def save(self, path: str | Path) -> None:
        """Writes one JSON file, with shares rounded to four digits."""
        record = {"letters": self.letters, "shares": np.round(self.shares, 4).tolist()}
        with atomic_file(Path(path)) as temporary:
            temporary.write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Letters":
        """Raises ValueError for a file that is missing or of another kind."""
        try:
            record = parse_json(Path(path).read_text(encoding="utf-8"))
            letters, shares = record["letters"], np.array(record["shares"], dtype=np.float32)
            if shares.ndim != 2 or shares.shape[1] != len(letters) + 1:
                raise ValueError("a row must have a share for each letter and a word's end")
            if not np.isfinite(shares).all() or shares.min() < 0 or shares.max() > 1:
                raise ValueError("shares lie in [0, 1]")
        except DAMAGE as error:
            raise ValueError(
                f"{path}: no letters of codes ({reason_of(error)}); recipes/make_clips.py writes "
                "them"
            ) from error
        return cls(letters, shares)


def init_from_letters(lm: Any, tokenizer: SpeechTextTokenizer, letters: Letters) -> None:
    """Adds to the embedding row of each code, in place, the mixture of its letters' rows minus the
    mean row of text. A BPE piece gets the mean of its codes' mixtures.

    Raises:
        ValueError: for a codebook of another size, or an LLM without tokens of single letters.
    """
    vocabulary = tokenizer.vocabulary
    if len(letters.shares) != vocabulary.codebook_size:
        raise ValueError(
            f"ar.letter_init is of {len(letters.shares)} codes, but codebook 1 has "
            f"{vocabulary.codebook_size}; make the letters of these tokens"
        )
    if "characters" not in (tokenizer.text.tts_form, tokenizer.text.asr_form):
        logger.warning(
            "ar.letter_init helps little where neither text.tts_form nor .asr_form is characters"
        )
    try:
        ids = tokenizer.character_ids([" ", *letters.letters])
    except ValueError as error:
        raise ValueError(f"ar.letter_init: {error}; or leave ar.letter_init out") from error
    embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    tables = [embedding] if head.weight is embedding.weight else [embedding, head]
    pieces, units = np.arange(vocabulary.num_pieces), tokenizer.bpe
    codes_of = [row if units is None else units.decode(row) for row in pieces[:, None]]
    shares = torch.from_numpy(np.stack([letters.shares[codes].mean(0) for codes in codes_of]))
    new_rows = torch.from_numpy(vocabulary.encode_pieces(pieces))
    with torch.no_grad():
        for table in tables:
            rows = torch.stack([table.weight[one].float().mean(0) for one in ids])
            rows -= table.weight[: vocabulary.num_text].float().mean(0)
            table.weight[new_rows] += (shares.to(rows) @ rows).to(table.weight.dtype)


def _read_object(path: Path, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object that has the keys of `kinds`, with values of these types. Raises ValueError
    when it is missing or damaged."""
    try:
        record = parse_json(path.read_text())
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
        if lacking := [key for key in kinds if key not in record]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if wrong := [key for key, kind in kinds.items() if not fits_type(record[key], kind)]:
            raise ValueError(f"its {wrong[0]} is {record[wrong[0]]!r}"[:200])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: missing or damaged ({reason_of(error)}); copy the voice again"
        ) from error
    return record


def _check_adapter(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises ValueError for settings of LoRA that voices do not have: peft imports modules by name,
    matches regular expressions and downloads files for some.

    Args:
        shapes: of the adapters' tensors.
    """
    from peft import LoraConfig

    record = _read_object(path, {"peft_type": str, "target_modules": list | str | None, "r": int})
    usual = LoraConfig().to_dict()
    names = ("target_modules", "modules_to_save")
    most = max((shape[0] for name, shape in shapes.items() if ".lora_A." in name), default=0)
    known = usual.keys() & record.keys() - ADAPTER_KEYS
    wrong = [key for key in known if record[key] != usual[key]]
    wrong += ["peft_type"] if record["peft_type"] != "LORA" else []
    wrong += ["r"] if record["r"] > most else []
    wrong += [key for key in names if not isinstance(record.get(key), list | None)]
    if wrong:
        shown = repr(record[min(wrong)])[:60]
        raise ValueError(f"{path}: a voice has no {min(wrong)} {shown}; copy the voice again")


def _find_base(folder: Path, origin: Mapping[str, Any], base: str | Path | None) -> str | Path:
    """Path or hub id of the LLM: `base`, else relative to the voice, else by name."""
    if base is not None:
        return base
    named, relative = origin["name"], origin.get("relative")
    if not isinstance(relative, str | None):
        raise ValueError(f"{folder / BASE_FILE}: damaged (its relative is {relative!r:.100})")
    candidates = [folder / relative] if relative else []
    candidates += [folder.parent / named, Path(named)]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    if relative is None and named.count("/") == 1:
        return named
    raise ValueError(
        f"{folder / BASE_FILE}: its text LLM {named} is not there; put its path "
        "(absolute, or relative to the voice folder) or hub id in place of `name`"
    )


def _load_adapted(
    folder: Path,
    origin: Mapping[str, Any],
    vocabulary: Vocabulary,
    base: str | Path | None,
    dtype: torch.dtype,
) -> tuple[Any, Any]:
    from peft import PeftModel, get_peft_model_state_dict

    found = _find_base(folder, origin, base)
    loaded = load_base(found, origin["num_layers"], dtype)
    if loaded.digest != origin["digest"]:
        raise ValueError(
            f"{found}: not the text LLM that {folder} was trained on: its digest is "
            f"{loaded.digest}, {BASE_FILE} has {origin['digest']}"
        )
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise ValueError(f"{file} is missing; copy the voice again")
    shapes = stored_shapes(file)
    _check_adapter(folder / "adapter_config.json", shapes)
    rows = max(loaded.lm.get_input_embeddings().weight.shape[0], len(loaded.tokenizer))
    most = rows + max((shape[0] for shape in shapes.values() if shape), default=0)
    if vocabulary.text_size != rows or vocabulary.size > most:
        raise ValueError(
            f"{folder}: its vocabulary.json has {vocabulary.size} tokens, {vocabulary.text_size} "
            f"of them of the text LLM, which has {rows}; copy the voice again"
        )
    extend(loaded.lm, vocabulary, seed=0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Missing tensors are an error, below.
            lm = PeftModel.from_pretrained(loaded.lm, str(folder))
    except (*DAMAGE, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file}: it does not fit its text LLM: {reason}") from error
    expected = get_peft_model_state_dict(lm, save_embedding_layers=False)
    if lacking := sorted(expected.keys() - shapes.keys()):
        raise ValueError(f"{file}: it lacks {lacking[0]}; copy the voice again")
    return lm.merge_and_unload(), loaded.tokenizer
