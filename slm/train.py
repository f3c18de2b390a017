"""Training of the AR and the NAR: steps are functions, the loop owns everything else.

Perplexity of plain text: what an LLM knew, and still knows after it has learnt speech.
"""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional

from slm.config import OptimConfig
from slm.data.ar import ARBatch, Data, Share
from slm.data.nar import NARBatch
from slm.models.ar import Scores, SpeechLM
from slm.models.lm_head import IdRange, PositionGroup, group_logits
from slm.tokenization.tokenizer import SpeechTextTokenizer
from slm.tokenization.vocabulary import encode_texts

logger = logging.getLogger(__name__)


@runtime_checkable
class Run(Protocol):
    """A stage of a run folder; recipes/lib/run.py has it."""

    accelerator: Accelerator

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def save(self, step: int) -> None: ...

    def resume(self, *, noted: bool = False) -> int: ...

    def progress(self, total: int, initial: int, label: str) -> Any: ...


class Losses(NamedTuple):
    """What a step makes of a batch."""

    total: Tensor
    """To go back from: the batch's part in the mean over the step's targets."""
    scores: Scores


Step = Callable[[nn.Module, Any, float], Losses]


def ar_step(model: nn.Module, batch: ARBatch, num_targets: float) -> Losses:
    """Cross-entropy of codebook 1 (tts, continuation) and of text (asr, text), targets only."""
    scores = model(batch)
    return Losses(scores.nll.sum() / num_targets, scores)


def nar_step(model: nn.Module, batch: NARBatch, num_targets: float) -> Losses:
    """Cross-entropy of codebook 2 and of one codebook of the rest, behind the prompt."""
    scores = model(batch)
    return Losses(scores.nll.sum() / num_targets, scores)


def learning_rate(step: int, config: OptimConfig) -> float:
    """Linear warm-up, then a cosine down to `final_lr_share`. A function of the step: no state."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_share + (1 - config.final_lr_share) * cosine)


def fit(
    model: nn.Module,
    step_losses: Step,
    train: Data,
    dev: Data | None,
    run: Run,
    config: OptimConfig,
) -> nn.Module:
    """Trains to `config.steps`, from the newest checkpoint if there is one.

    Returns the prepared model; `gather` gets its weights, and `accelerator.free_memory` lets it go.
    """
    accelerator = run.accelerator
    groups: tuple[str, ...] = model.groups  # type: ignore[assignment]
    optimizer = make_optimizer(model, config)
    _tell_engine(accelerator, config)
    model, optimizer = accelerator.prepare(model, optimizer)
    logger.info(
        "%s; padding %.1f %% of positions", describe(accelerator, model), 100 * train.padding_share
    )
    start = run.resume(noted=True)  # A step's losses are logged before it is saved.
    meter = Meter(groups)
    shares = _ahead(train, range(start, config.steps), run, config)
    bar = run.progress(config.steps, start, "/".join(groups[:2]))
    for step in range(start, config.steps + 1):
        last = step == config.steps
        fresh = step == start and start > 0  # what this checkpoint's run already did
        with meter.paused():
            if dev is not None and due(step, config.eval_every, last) and not fresh:
                run.log(evaluate(model, step_losses, dev, accelerator, config, groups), step)
            if due(step, config.save_every, last) and step > start:
                run.save(step)
        if last:
            break
        rate = learning_rate(step, config)
        meter.norm = _train_step(
            model, optimizer, step_losses, next(shares), accelerator, config, rate, meter
        )
        if due(step + 1, config.log_every, step + 1 == config.steps):
            values = meter.values(accelerator)
            run.log({**values, "train/lr": rate}, step + 1)
            bar.set_postfix_str(meter.line(values), refresh=False)
        bar.update(1)
    bar.close()
    shares.close()
    return model


def due(step: int, every: int, last: bool) -> bool:
    return last or (step > 0 and step % every == 0)


def _ahead(
    data: Data, steps: range, run: Run, config: OptimConfig
) -> Generator[list[Share], None, None]:
    """This rank's micro-batches of each step, made by a thread while the step before it trains."""
    rank, world = run.accelerator.process_index, run.accelerator.num_processes

    def shares(step: int) -> list[Share]:
        micros = range(config.accumulate)
        return [data.share(step, micro, rank, world, config.accumulate) for micro in micros]

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(shares, steps[0]) if steps else None
        for step in steps:
            assert following is not None
            made = following.result()
            following = pool.submit(shares, step + 1) if step + 1 in steps else None
            yield made


def _train_step(
    model: nn.Module, optimizer: Any, step_losses: Step, shares: Sequence[Share],
    accelerator: Accelerator, config: OptimConfig, rate: float, meter: "Meter",
) -> Any:  # fmt: skip
    """One optimiser step; returns the gradient's norm before it was clipped."""
    norm: Any = 0.0
    model.train()
    for group in optimizer.param_groups:
        group["lr"] = rate
    for share in shares:
        with accelerator.accumulate(model):
            losses = step_losses(
                model, to_device(share.batch, accelerator.device), share.num_targets
            )
            accelerator.backward(losses.total)
            if accelerator.sync_gradients:
                # DeepSpeed has clipped and stepped inside backward; here it only tells the norm.
                limit = config.clip_norm or math.inf
                norm = accelerator.clip_grad_norm_(model.parameters(), limit)
            optimizer.step()
            optimizer.zero_grad()
        meter.add(losses.scores)
    return norm


@torch.no_grad()
def evaluate(
    model: nn.Module, step_losses: Step, dev: Data, accelerator: Accelerator,
    config: OptimConfig, groups: tuple[str, ...],
) -> dict[str, float]:  # fmt: skip
    """Losses over the dev set on all ranks, each with as many batches; sums are reduced."""
    model.eval()
    rank, world = accelerator.process_index, accelerator.num_processes
    meter = Meter(groups)
    for index in range(min(dev.num_steps(world, 1), config.eval_batches)):
        share = dev.share(index, 0, rank, world, 1)
        losses = step_losses(model, to_device(share.batch, accelerator.device), share.num_targets)
        meter.add(Scores(*(sums * share.weight for sums in losses.scores)))
    values = meter.values(accelerator)
    return {
        name.replace("train/", "dev/"): value
        for name, value in values.items()
        if "per_s" not in name
    }


class Meter:
    """Sums of scores since the last look, on this rank."""

    def __init__(self, groups: tuple[str, ...]):
        self.groups = groups
        self.norm: Any = 0.0
        self._clear()

    def _clear(self) -> None:
        self._sums: Tensor | None = None
        self._since = time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place meanwhile is no training: its time does not count."""
        start = time.monotonic()
        yield
        self._since += time.monotonic() - start

    def add(self, scores: Scores) -> None:
        sums = torch.stack([part.detach().double() for part in scores])
        self._sums = sums if self._sums is None else self._sums + sums

    def values(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all ranks, and begins anew. All ranks call it."""
        assert self._sums is not None
        sums: Any = accelerator.reduce(self._sums.float(), reduction="sum")
        nll, correct, targets = sums.tolist()
        values = {
            "train/loss": sum(nll) / max(1.0, sum(targets)),
            "train/accuracy": sum(correct) / max(1.0, sum(targets)),
            "train/tokens_per_s": sum(targets) / max(1e-9, time.monotonic() - self._since),
            "train/grad_norm": float(self.norm or 0.0),
        }
        for index, name in enumerate(self.groups):
            if targets[index]:
                values[f"train/{name}_loss"] = nll[index] / targets[index]
                values[f"train/{name}_accuracy"] = correct[index] / targets[index]
        self._clear()
        return values

    def line(self, values: Mapping[str, float]) -> str:
        return (
            f"loss {values['train/loss']:.3f} accuracy {values['train/accuracy']:.3f} "
            f"{values['train/tokens_per_s']:.0f} target tokens/s"
        )


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over what is trained; only matrices decay."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.lr, betas=config.betas, fused=True,
    )  # fmt: skip


def _tell_engine(accelerator: Accelerator, config: OptimConfig) -> None:
    """Accumulation and clipping are ours to configure; DeepSpeed does both, so it is told."""
    accelerator.gradient_accumulation_steps = config.accumulate
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is None:
        return
    plugin.deepspeed_config.update(
        gradient_accumulation_steps=config.accumulate,
        gradient_clipping=config.clip_norm,
        # Batches have their own sizes; DeepSpeed only multiplies this number.
        train_micro_batch_size_per_gpu=1,
        train_batch_size=config.accumulate * accelerator.num_processes,
    )


def describe(accelerator: Accelerator, model: nn.Module) -> str:
    """What the prepared model really is: engine class, ZeRO stage, ranks, precision."""
    trained = sum(_numel(p) for p in model.parameters() if p.requires_grad)
    total = sum(_numel(p) for p in model.parameters())
    stage = getattr(model, "zero_optimization_stage", None)
    zero = f", ZeRO stage {stage()}" if stage is not None else ""
    return (
        f"{type(model).__name__}{zero}, world size {accelerator.num_processes}, "
        f"precision {accelerator.mixed_precision}, {accelerator.device}, "
        f"{trained / 1e6:.2f} of {total / 1e6:.2f} M parameters trained"
    )


def _numel(parameter: Any) -> int:
    """Under ZeRO-3 a parameter's own size is its part on this rank."""
    return getattr(parameter, "ds_numel", parameter.numel())


def gather(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters of a prepared model by name, whole, on the CPU. All ranks call it.

    Only the main process gets them; ZeRO-3 gathers one at a time.
    """
    state: dict[str, Tensor] = {}
    whole: Any = accelerator.unwrap_model(model)
    for name, parameter in whole.named_parameters():
        if not parameter.requires_grad:
            continue
        with _whole(parameter):
            if accelerator.is_main_process:
                state[name] = parameter.detach().cpu().clone()
    return state


def _whole(parameter: nn.Parameter) -> Any:
    if not hasattr(parameter, "ds_id"):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters([parameter], modifier_rank=None)


def to_device(batch: Any, device: torch.device) -> Any:
    """A NamedTuple of tensors on `device`."""
    moved = (part if part is None else part.to(device, non_blocking=True) for part in batch)
    return type(batch)(*moved)


@torch.inference_mode()
def text_perplexity(
    lm: Any, tokenizer: Any, texts: Sequence[str], *, rows: Literal["text", "all"] = "text",
    window: int = 512, positions: int = 2048,
) -> float:  # fmt: skip
    """exp of the mean negative log-likelihood of the texts' tokens, but the first of each window.

    `lm` is a SpeechLM or a base LLM, `tokenizer` the LLM's own or a SpeechTextTokenizer with it. A
    text is cut into windows of at most `window` tokens (fewer where the LLM holds fewer) that do
    not see each other; nothing is put before or behind it. A batch has at most `positions`
    positions, or one window.

    `rows` says what a token competes with. "text": the ids that the tokenizer knows, so that before
    training a SpeechLM and its base LLM are equal. "all": every row of the table; a SpeechLM has
    more of them, and its perplexity is higher by what it gives to them, even before training.
    """
    if window < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {window}")
    if isinstance(tokenizer, SpeechTextTokenizer):
        tokenizer = tokenizer.text_tokenizer
    model = lm.lm if isinstance(lm, SpeechLM) else lm
    window = min(window, getattr(model.config, "max_position_embeddings", window))
    table = model.get_output_embeddings().weight.shape[0]
    asked = IdRange(0, min(len(tokenizer), table) if rows == "text" else table, None)
    windows = [
        ids[start : start + window]
        for ids in encode_texts(tokenizer, texts)
        for start in range(0, len(ids), window)
    ]
    windows = sorted((ids for ids in windows if len(ids) > 1), key=len)
    if not windows:
        raise ValueError("no text of at least 2 tokens; give longer texts")
    was_training = lm.training
    lm.eval()
    try:
        sums = [_sum(model, batch, asked) for batch in _batches(windows, positions)]
    finally:
        lm.train(was_training)
    return math.exp(math.fsum(sums) / sum(len(ids) - 1 for ids in windows))


def _batches(windows: Sequence[list[int]], positions: int) -> Iterator[list[list[int]]]:
    """Of windows that come by length."""
    batch: list[list[int]] = []
    for ids in windows:
        if batch and len(ids) * (len(batch) + 1) > positions:
            yield batch
            batch = []
        batch.append(ids)
    yield batch


def _sum(model: Any, batch: Sequence[list[int]], rows: IdRange) -> float:
    """Negative log-likelihood of all tokens but the first ones."""
    device = next(model.parameters()).device
    longest = max(len(ids) for ids in batch)
    # What pads on the right is seen by no token before it.
    padded = [ids + ids[:1] * (longest - len(ids)) for ids in batch]
    tokens = torch.tensor(padded, device=device)
    lengths = torch.tensor([len(ids) for ids in batch], device=device)
    known = torch.arange(1, longest + 1, device=device) < lengths[:, None]
    where = known.flatten().nonzero()[:, 0]
    (logits,) = group_logits(model, [PositionGroup(where, rows)], input_ids=tokens)
    following: Tensor = tokens.flatten()[where + 1]
    return (
        functional.cross_entropy(logits.float(), following, reduction="none").double().sum().item()
    )
