"""LoRA adapters (arXiv 2106.09685) of a fully fine-tuned AR, by truncated SVD.

The best approximation of a weight update by a matrix of rank r keeps its r largest singular values
(Eckart and Young 1936). So a fully fine-tuned AR can be shipped as adapters of its base LLM.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from slm.config import LoRAConfig
from slm.data.coverage import Coverage
from slm.models.ar import SpeechLM, add_adapters, load_base
from slm.tokenization.vocabulary import extend

PREFIX, ADAPTER = "base_model.model.", "default"
"""peft's prefix of the LLM's modules, and its name of the only adapter."""


class Factors(NamedTuple):
    """A matrix `b @ a` of rank R."""

    a: Float[Tensor, "R I"]
    b: Float[Tensor, "O R"]


def factorize(change: Float[Tensor, "O I"], rank: int) -> Factors:
    """The nearest matrix of this rank in the Frobenius norm (truncated SVD), with factors of equal
    norm; padded with zeros where the matrix has a lower rank."""
    u, values, v = torch.linalg.svd(change, full_matrices=False)
    root = values[:rank].sqrt()
    spare = rank - len(root)
    a = functional.pad(root[:, None] * v[:rank], (0, 0, 0, spare))
    return Factors(a, functional.pad(u[:, :rank] * root, (0, spare)))


def as_adapters(lm: SpeechLM, base: str | Path, rank: int, coverage: Coverage) -> SpeechLM:
    """A fully fine-tuned AR as LoRA adapters of its base LLM.

    Norms and the embedding rows of `used_rows` are stored in full; other rows are the base LLM's.

    Args:
        lm: the AR.
        base: path or hub id of the LLM that it was trained from.
        rank: of the adapters.
        coverage: of the training data.

    Raises:
        ValueError: for another LLM, an AR with adapters, and trained parameters that adapters
            cannot represent.
    """
    if lm.origin["adapter"]:
        raise ValueError("this AR was trained with LoRA adapters: copy it as it is")
    loaded = load_base(base, lm.origin["num_layers"])
    if loaded.digest != lm.origin["digest"]:
        raise ValueError(f"{base}: not the LLM that the AR was trained from, {lm.origin['name']}")
    extend(loaded.lm, lm.vocabulary, seed=0)
    trained = dict(lm.lm.named_modules())
    tables = (lm.lm.get_input_embeddings(), lm.lm.get_output_embeddings())
    norms = [name for name, module in trained.items() if _is_norm(module)]
    before = {
        name: module.weight.detach().clone()
        for name, module in loaded.lm.named_modules()
        if isinstance(module, nn.Linear) and trained[name] not in tables
    }
    _check_covered(lm, loaded.lm, {*before, *norms})
    rows = used_rows(lm, coverage)
    settings = LoRAConfig(rank=rank, alpha=float(rank))
    adapted = add_adapters(loaded.lm, settings, rows, norms)
    with torch.no_grad():
        for name, module in adapted.named_modules():
            plain = name.removeprefix(PREFIX)
            if plain in before:
                change = trained[plain].weight - before[plain]
                _put(module, factorize(change.float(), rank))
            elif plain in norms:
                _put_full(module, trained[plain])
        for name, rows_of in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                table = name.removeprefix(PREFIX).split(".token_adapter.")[0]
                rows_of.copy_(trained[table].weight[rows])
    origin = {**lm.origin, "adapter": True, "name": str(base)}
    origin.pop("relative", None)
    return SpeechLM(adapted, lm.tokenizer, origin).eval()


def used_rows(lm: SpeechLM, coverage: Coverage) -> list[int]:
    """Ids of new tokens and of the tokens that texts of the training's characters can have; all ids
    where texts are not encoded by characters."""
    tokenizer = lm.tokenizer
    found = set(lm.vocabulary.new_ids)
    forms = {tokenizer.text.tts_form, tokenizer.text.asr_form}
    if forms != {"characters"} or lm.origin.get("tasks", {}).get("text"):
        return sorted(found | set(range(lm.vocabulary.num_text)))
    found.update(tokenizer.text_range("asr"))
    for ids in tokenizer.character_ids([*coverage.characters, " "]):
        found.update(ids)
    found.add(lm.vocabulary.eos)
    return sorted(found)


def _is_norm(module: nn.Module) -> bool:
    """A module whose parameters are vectors, such as RMSNorm."""
    own = dict(module.named_parameters(recurse=False))
    return bool(own) and all(each.ndim == 1 for each in own.values())


def _check_covered(lm: SpeechLM, base: nn.Module, covered: set[str]) -> None:
    """Raises ValueError for a trained parameter that is neither covered nor in a table."""
    tables = {
        id(module) for module in (lm.lm.get_input_embeddings(), lm.lm.get_output_embeddings())
    }
    old, modules = dict(base.named_parameters()), dict(lm.lm.named_modules())
    for name, parameter in lm.lm.named_parameters():
        module, _, kind = name.rpartition(".")
        is_covered = module in covered and (kind == "weight" or _is_norm(modules[module]))
        if is_covered or id(modules[module]) in tables or torch.equal(parameter, old[name]):
            continue
        raise ValueError(
            f"{name} of {lm.origin['name']} was trained, and adapters cannot represent it: "
            "ship the AR as it is"
        )


def _put(module: Any, factors: Factors) -> None:
    module.lora_A[ADAPTER].weight.copy_(factors.a)
    module.lora_B[ADAPTER].weight.copy_(factors.b)


def _put_full(module: Any, trained: nn.Module) -> None:
    module.modules_to_save[ADAPTER].load_state_dict(trained.state_dict())
