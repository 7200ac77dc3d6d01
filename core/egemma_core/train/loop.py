"""The training loop: plain, logged, and able to go on after it was stopped."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from egemma_core.errors import ConfigError, EgemmaError
from egemma_core.nn.encoder import Encoder
from egemma_core.prompts import Prompts
from egemma_core.tokens import Tokenizer
from egemma_core.train.data import Batches, Pair, pad, tokenize
from egemma_core.train.loss import matryoshka_loss

STATE, LOG = "state.pt", "log.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One contrastive run."""

    steps: int
    learning_rate: float = 1e-3  # peak; cosine decay to a hundredth
    warmup_steps: int = 100
    weight_decay: float = 0.01  # on matrices; norms and the embedding table have none
    temperature: float = 0.05
    max_gradient_norm: float = 1.0
    bfloat16: bool = True  # autocast of the matrix products; norms and the loss stay float32
    texts_per_chunk: int = 64  # texts of similar length that are padded together
    log_every: int = 20  # steps
    save_every: int = 200  # steps between saved states

    def __post_init__(self) -> None:
        if not 0 <= self.warmup_steps < self.steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps}: it must end before steps={self.steps}.")
        if self.learning_rate <= 0 or self.temperature <= 0 or min(self.texts_per_chunk, self.log_every, self.save_every) < 1:
            raise ConfigError("learning_rate, temperature, texts_per_chunk, log_every and save_every must be positive.")


class DivergedError(EgemmaError):
    """The loss is no longer a number."""


def train(encoder: Encoder, batches: Batches, config: TrainConfig, folder: Path, dev: Sequence[Pair] = ()) -> Encoder:
    """Train `encoder` in place and return it in evaluation mode.

    A state in `folder` is picked up where it was left. `log.jsonl` there gets one line per `log_every` steps, and the
    recall on `dev` with every saved state.

    Raises:
        DivergedError: the loss became NaN or infinite; the last saved state is intact.
        ConfigError: the state in `folder` was made with another config.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimizer = make_optimizer(encoder, config)
    step, seconds, num_tokens = _restore(encoder, optimizer, config, folder / STATE)
    dims, pad_id = encoder.config.dims, encoder.config.pad_id
    encoder.train()
    started = time.monotonic() - seconds
    losses: list[float] = []
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        batch = batches.at(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.bfloat16):
            vectors = encode_rows(encoder, [*batch.queries, *batch.documents], pad_id, config.texts_per_chunk)
        queries, documents = vectors[: len(batch.queries)], vectors[len(batch.queries) :]
        loss = matryoshka_loss(queries, documents, batch.masked, config.temperature, dims)
        if not math.isfinite(loss.item()):
            raise DivergedError(
                f"step {step} ({batch.name}): loss={loss.item()}. Lower learning_rate={config.learning_rate} and start again."
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_norm = nn.utils.clip_grad_norm_(encoder.parameters(), config.max_gradient_norm)
        optimizer.step()
        step += 1
        num_tokens += sum(map(len, batch.queries)) + sum(map(len, batch.documents))
        losses.append(loss.item() / len(dims))
        seconds = time.monotonic() - started
        if step % config.log_every == 0 or step == config.steps:
            _log(
                folder / LOG,
                step=step,
                loss=round(sum(losses) / len(losses), 4),
                gradient_norm=round(float(gradient_norm), 3),
                learning_rate=round(learning_rate(step - 1, config), 7),
                tokens=num_tokens,
                seconds=round(seconds, 1),
            )
            losses = []
        if step % config.save_every == 0 or step == config.steps:
            _save(encoder, optimizer, config, folder / STATE, step=step, seconds=seconds, num_tokens=num_tokens)
            if dev:
                scores = recall(encoder, batches.tokenizer, batches.prompts, dev, max_tokens=batches.max_tokens)
                _log(
                    folder / LOG,
                    step=step,
                    seconds=round(seconds, 1),
                    **{f"dev_recall@{k}": round(value, 4) for k, value in scores.items()},
                )
    return encoder.eval()


def encode_rows(encoder: Encoder, rows: Sequence[tuple[int, ...]], pad_id: int, texts_per_chunk: int = 64) -> Tensor:
    """(rows, dim) vectors in the order of `rows`. Rows of similar length go through the encoder together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    parts = [
        encoder(*pad([rows[index] for index in order[start : start + texts_per_chunk]], pad_id))
        for start in range(0, len(order), texts_per_chunk)
    ]
    return torch.cat(parts)[torch.tensor(order).argsort()]


@torch.no_grad()
def recall(
    encoder: Encoder, tokenizer: Tokenizer, prompts: Prompts, pairs: Sequence[Pair], *, max_tokens: int, at: Sequence[int] = (1, 10)
) -> dict[int, float]:
    """Share of queries whose positive is among the first k of all the positives, under the default prompt, for each k."""
    was_training = encoder.training
    encoder.eval()
    texts = sorted({pair.positive for pair in pairs})
    queries = encode_rows(
        encoder, tokenize(tokenizer, prompts.query(), [pair.query for pair in pairs], max_tokens), tokenizer.pad_id
    )
    documents = encode_rows(encoder, tokenize(tokenizer, prompts.document(), texts, max_tokens), tokenizer.pad_id)
    encoder.train(was_training)
    scores = queries @ documents.T  # (Q, N)
    position = {text: index for index, text in enumerate(texts)}
    own = torch.tensor([position[pair.positive] for pair in pairs])
    better = (scores > scores.gather(1, own[:, None])).sum(1)  # (Q,)
    return {k: (better < k).float().mean().item() for k in at}


def make_optimizer(encoder: Encoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; only matrices that multiply are decayed."""
    named = list(encoder.named_parameters())
    decayed = [weight for name, weight in named if weight.ndim == 2 and not name.startswith("embed_tokens")]
    kept = [weight for name, weight in named if weight.ndim != 2 or name.startswith("embed_tokens")]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98))


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def _save(
    encoder: Encoder,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    path: Path,
    *,
    step: int,
    seconds: float,
    num_tokens: int,
) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "encoder": encoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "config": asdict(config),
            "step": step,
            "seconds": seconds,
            "num_tokens": num_tokens,
        },
        temporary,
    )
    os.replace(temporary, path)  # a kill leaves the old state or the new one, never half of one


def _restore(encoder: Encoder, optimizer: torch.optim.Optimizer, config: TrainConfig, path: Path) -> tuple[int, float, int]:
    if not path.exists():
        return 0, 0.0, 0
    state = torch.load(path, weights_only=True)
    if state["config"] != asdict(config):
        raise ConfigError(f"{path} was made with {state['config']}, this is {asdict(config)}. Use that config, or another folder.")
    encoder.load_state_dict(state["encoder"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["seconds"], state["num_tokens"]


def _log(path: Path, **fields: float) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")
