"""Faults that public reports describe in trainers, planted in a real GRPOTrainer and its batch. Nothing here knows of verdicts.

`FAULTS` names for each the report, what was wrong, and which causes may be named: the first is the truth, the others mean the
same. bench_reports.py plants them one after another in what computes the old logprobs of one batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEMPERATURE = 0.7
#: Old weights and the trainer's, one way or the other.
WEIGHTS = ("weights_differ", "stale_weights", "adapter")
#: Another model's arithmetic on the trainer's side.
MODEL = ("weights_differ", "stale_weights", "engine_build", "head_precision")
#: What the trainer does to the logits of a model that is right.
LOGITS = ("logits",)


@dataclass(kw_only=True)
class Step:
    """What a trainer is asked for at one step: its model, the rows it computes, and what it hands on.

    `ids` and `mask` are [rows, prompt + completion], padded on both sides; `keep` is how many columns are the completion's.
    `logps` [rows, keep] are the trainer's, `rollout` the engine's.
    """

    trainer: Any
    ids: Any
    mask: Any
    keep: int
    rollout: Any
    completion_mask: Any
    logps: Any = None

    def compute(self, ids: Any = None, mask: Any = None, keep: int = 0) -> Any:
        """The trainer's own function, on these rows."""
        ids, mask = self.ids if ids is None else ids, self.mask if mask is None else mask
        with torch.no_grad():
            function = self.trainer._get_per_token_logps_and_entropies
            return function(self.trainer.model, ids, mask, keep or self.keep, batch_size=len(ids))[0]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reported fault. `inside` is a context in which the trainer computes, `step` what happens in place of computing, and
    `after` what becomes of the numbers. `stays`: the fault is still there when the trainer's model is asked again.
    """

    report: str
    fault: str
    causes: tuple[str, ...]
    inside: Callable[[Any], Any] | None = None
    step: Callable[[Step], Any] | None = None
    after: Callable[[Step], None] | None = None
    rollouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    objective: str = "token"
    stays: bool = False
    dtype: str = "float32"


# -- where the trainer computes -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def weights(trainer: Any, change: Callable[[str, Any], Any]) -> Iterator[None]:
    """Other weights; `change(name, tensor)` gives them."""
    kept = {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}
    with torch.no_grad():
        for name, tensor in trainer.model.state_dict().items():
            tensor.copy_(change(name, tensor))
        yield
        trainer.model.load_state_dict(kept)


def other_weights(*parts: str, change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda trainer: weights(trainer, lambda name, x: change(x) if any(part in name for part in parts) else x)


def noised(x: Any) -> Any:
    return x + 0.2 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def another_step(trainer: Any) -> Any:
    from safetensors.torch import load_file

    folder = Path(f"{trainer.model.config._name_or_path}-step2")
    if not folder.is_dir():
        return weights(trainer, lambda name, x: noised(x))
    state = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return weights(trainer, lambda name, x: state[name])


@contextlib.contextmanager
def attribute(trainer: Any, names: tuple[str, ...], value: Callable[[Any], Any]) -> Iterator[None]:
    """An attribute of all modules that have it."""
    changed = [(m, n, getattr(m, n)) for m in trainer.model.modules() for n in names if hasattr(m, n)]
    for module, name, before in changed:
        setattr(module, name, value(before))
    yield
    for module, name, before in changed:
        setattr(module, name, before)


@contextlib.contextmanager
def frequencies(trainer: Any, change: Callable[[Any], Any]) -> Iterator[None]:
    rotary = trainer.model.model.rotary_emb
    before = rotary.inv_freq
    rotary.inv_freq = change(before)
    yield
    rotary.inv_freq = before


@contextlib.contextmanager
def dropout(trainer: Any, where: str) -> Iterator[None]:
    """Dropout in the attention, or on what each layer hands on, in training mode."""
    trainer.model.train()
    handles, changed = [], []
    if where == "attention":
        changed = [m for m in trainer.model.modules() if hasattr(m, "attention_dropout")]
        for module in changed:
            module.attention_dropout = 0.2
    else:
        layer_dropout = torch.nn.Dropout(0.1)

        def drop(module: Any, _: Any, out: Any) -> Any:
            return layer_dropout(out) if module.training else out

        handles = [layer.mlp.register_forward_hook(drop) for layer in trainer.model.model.layers]
    yield
    for module in changed:
        module.attention_dropout = 0.0
    for handle in handles:
        handle.remove()


@contextlib.contextmanager
def adapter(trainer: Any, times: float) -> Iterator[None]:
    """A LoRA delta on the queries, so many times."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, x: Any) -> Any:
        if "q_proj" not in name and "v_proj" not in name:
            return x
        a, b = (torch.randn(shape, generator=generator) for shape in ((x.shape[0], 4), (4, x.shape[1])))
        return x + times * 0.3 * x.std() * (a @ b)

    with weights(trainer, change):
        yield


# -- how it computes ----------------------------------------------------------------------------------------------------


def of_logits(
    change: Callable[[Any], Any] = lambda x: x, temperature: float = TEMPERATURE, dtype: Any = None
) -> Callable[[Step], Any]:
    """A trainer that takes the logits of the model's forward, as older ones do, and does something to them; `dtype` is that in
    which the head is computed.
    """

    def step(step: Step) -> Any:
        model, keep = step.trainer.model, step.keep
        with torch.no_grad():
            hidden = model.model(input_ids=step.ids, attention_mask=step.mask).last_hidden_state[:, -keep - 1 : -1]
            weight = model.lm_head.weight
            logits = hidden @ weight.T if dtype is None else (hidden.to(dtype) @ weight.to(dtype).T).float()
        values = (change(logits) / temperature).log_softmax(-1)
        return values.gather(-1, step.ids[:, -keep:, None])[..., 0]

    return step


# -- what it computes of ------------------------------------------------------------------------------------------------


def without_a_mask(step: Step) -> Any:
    return step.compute(mask=torch.ones_like(step.mask))


def mask_by_id(step: Step) -> Any:
    """The mask is made anew of the ids: the token that happens to be the padding's is not seen anywhere."""
    completion = step.ids[:, -step.keep :]
    common = torch.bincount(completion[step.mask[:, -step.keep :].bool()]).argmax()
    return step.compute(mask=step.mask * (step.ids != common))


def loss_mask_for_attention(step: Step) -> Any:
    mask = step.mask.clone()
    mask[:, -step.keep + 4 : -step.keep + 10] = 0
    return step.compute(mask=mask)


def start_token_missing(step: Step) -> Any:
    """The first token of each prompt is taken away."""
    first = step.mask.argmax(1)
    mask = step.mask.clone()
    mask[torch.arange(len(mask)), first] = 0
    return step.compute(mask=mask)


def inserted(step: Step) -> Any:
    """A token stands between prompt and completion."""
    start = step.ids[:, :1].clone().fill_(int(step.ids[0, step.mask[0].argmax()]))
    keep = step.keep
    ids = torch.cat([step.ids[:, :-keep], start, step.ids[:, -keep:]], 1)
    mask = torch.cat([step.mask[:, :-keep], torch.ones_like(start), step.mask[:, -keep:]], 1)
    return step.compute(ids, mask)


def prompt_end_missing(step: Step) -> Any:
    """The last token of each prompt, a line break of the chat template, is missing."""
    keep = step.keep
    ids = torch.cat([step.ids[:, : -keep - 1], step.ids[:, -keep:]], 1)
    return step.compute(ids, torch.cat([step.mask[:, : -keep - 1], step.mask[:, -keep:]], 1))


def prompt_middle_missing(step: Step) -> Any:
    """A part of each prompt was left out when it was rendered again."""
    mask = step.mask.clone()
    mask[:, -step.keep - 14 : -step.keep - 8] = 0
    return step.compute(mask=mask)


def other_tokens(step: Step) -> Any:
    """Text that was encoded again: some tokens of the completions are other ones."""
    ids = step.ids.clone()
    columns = ids[:, -step.keep :]
    columns[:, 3::7] = (columns[:, 3::7] + 1) % 256
    return step.compute(ids)


def _packed(step: Step, reset: bool, *, border: bool = False) -> Any:
    """All rows one after another in one, each seeing those before it unless there is a `border`; with positions that begin
    anew, or go on.
    """
    rows = [row[mask.bool()] for row, mask in zip(step.ids, step.mask, strict=True)]
    ids = torch.cat(rows)[None]
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None] if reset else torch.arange(ids.shape[1])[None]
    model = step.trainer.model
    owner = torch.cat([torch.full((len(row),), number) for number, row in enumerate(rows)])
    hidden = torch.ones((ids.shape[1],) * 2, dtype=torch.bool).triu(1)
    hidden = hidden | (owner[:, None] != owner) if border else hidden
    causal = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)[None, None]
    with torch.no_grad():
        out = model(input_ids=ids, position_ids=positions, attention_mask=causal).logits[0] / step.trainer.temperature
    values = out.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    logps, end = torch.zeros(len(rows), step.keep), 0
    for number, row in enumerate(rows):
        count = int(step.mask[number, -step.keep :].sum())
        end += len(row)
        logps[number, :count] = values[end - 1 - count : end - 1]
    return logps


# -- what becomes of the numbers -----------------------------------------------------------------------------------------


def column(change: Callable[[Any, Any], Any]) -> Callable[[Step], None]:
    """The trainer's numbers [rows, keep], as a function of them and of which are real."""

    def after(step: Step) -> None:
        step.logps = change(step.logps, step.completion_mask.bool())

    return after


def engine_column(change: Callable[[Any, Any], Any]) -> Callable[[Step], None]:
    """The same of the rollouts' numbers."""

    def after(step: Step) -> None:
        step.rollout = change(step.rollout, step.completion_mask.bool())

    return after


def row_wise_offset(step: Step) -> None:
    """Each row is cut at the batch's longest prompt: shorter prompts' numbers start later."""
    lengths = step.mask[:, : -step.keep].sum(1)
    for row, by in enumerate((lengths.max() - lengths).tolist()):
        step.logps[row] = step.logps[row].roll(-min(by, 3))


def sorted_by_length(x: Any, mask: Any) -> Any:
    return x[mask.sum(1).argsort()]


def half_sorted(x: Any, mask: Any) -> Any:
    x = x.clone()
    x[: len(x) // 2] = x[: len(x) // 2].flip(0)
    return x


def last_is_zero(count: int) -> Callable[[Any, Any], Any]:
    def change(x: Any, mask: Any) -> Any:
        x = x.clone()
        for row, length in enumerate(mask.sum(1).tolist()):
            x[row, max(length - count, 0) : length] = 0.0
        return x

    return change


def time_permuted(x: Any, mask: Any) -> Any:
    x = x.clone()
    for row, length in enumerate(mask.sum(1).tolist()):
        x[row, :length] = x[row, :length].flip(0)
    return x


def means(x: Any, mask: Any) -> Any:
    return ((x * mask).sum(1, keepdim=True) / mask.shape[1]).expand_as(x).clone()


def nan_rows(x: Any, mask: Any) -> Any:
    x = x.clone()
    x[1::4] = torch.nan
    return x


def placeholders(x: Any, mask: Any) -> Any:
    x = x.clone()
    x[:, 2::5] = 1.0
    return x


def at_a_border(step: Step) -> None:
    """The rows are cut in two for two ranks, and the labels shifted after the cut: the token at the border is another one."""
    ids = step.ids.clone()
    border = step.keep // 3
    ids[:, -step.keep + border] = ids[:, -step.keep]
    other = step.compute(ids)
    step.logps[:, border] = other[:, border]


def wrong_slice(step: Step) -> Any:
    """The first columns of the row, where the prompt's tokens are, stand for the completion's."""
    whole = step.compute(keep=step.ids.shape[1] - 1)
    first = step.mask.argmax(1).tolist()
    return torch.stack([row[start : start + step.keep] for row, start in zip(whole, first, strict=True)])


def after_next(step: Step) -> Any:
    """Labels are shifted twice: each distribution is asked for the token after the next."""
    model, keep = step.trainer.model, step.keep
    with torch.no_grad():
        out = model(input_ids=step.ids, attention_mask=step.mask).logits[:, -keep - 1 : -1] / step.trainer.temperature
    labels = torch.cat([step.ids[:, -keep + 1 :], step.ids[:, -1:]], 1)
    return out.log_softmax(-1).gather(-1, labels[..., None])[..., 0]


def _windowed(step: Step, size: int) -> Any:
    """Each token sees so many before it."""
    width = step.ids.shape[1]
    places = torch.arange(width)
    seen = (places[:, None] >= places) & (places[:, None] - places < size)
    allowed = seen[None, None] & step.mask[:, None, None].bool()
    bias = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    with torch.no_grad():
        out = step.trainer.model(input_ids=step.ids, attention_mask=bias).logits[:, -step.keep - 1 : -1]
    labels = step.ids[:, -step.keep :, None]
    return (out / step.trainer.temperature).log_softmax(-1).gather(-1, labels)[..., 0]


def _drifting(x: Any, mask: Any) -> Any:
    """Rows one after another without padding, each with one number fewer than it has tokens."""
    flat = torch.cat([row[1:length] for row, length in zip(x, mask.sum(1).tolist(), strict=True)])
    flat = torch.cat([flat, flat[: len(x)]])
    out, start = x.clone(), 0
    for row, length in enumerate(mask.sum(1).tolist()):
        out[row, :length] = flat[start : start + length]
        start += length
    return out


# -- the list -----------------------------------------------------------------------------------------------------------

FAULTS: tuple[Fault, ...] = (
    # temperature and logits
    Fault(report="huggingface/trl#3029", fault="the trainer does not divide by the temperature", causes=("temperature",),
          step=of_logits(temperature=1.0)),
    Fault(report="huggingface/trl#4159", fault="the engine's logprobs are raw", causes=("raw_vs_processed", "temperature"),
          rollouts={"logprobs_mode": "raw_logprobs"}),
    Fault(report="THUDM/slime#557", fault="another temperature on the trainer's side", causes=("temperature",),
          step=of_logits(temperature=0.9)),
    Fault(report="unslothai/unsloth-zoo#593", fault="another formula for a soft cap", causes=LOGITS,
          step=of_logits(lambda x: x * (x / 8).tanh())),
    Fault(report="apple/ml-cross-entropy#48", fault="a soft cap on one side", causes=LOGITS,
          step=of_logits(lambda x: 8 * (x / 8).tanh())),
    Fault(report="unslothai/unsloth#11277", fault="the scale of the logits is left out",
          causes=("logits", "temperature"), step=of_logits(lambda x: 0.8 * x)),
    Fault(report="modelscope/ms-swift#8427", fault="no temperature, and the numbers one position late",
          causes=("shifted_positions", "temperature"), step=of_logits(temperature=1.0),
          after=column(lambda x, _: x.roll(1, 1))),
    Fault(report="OpenRLHF/OpenRLHF#634", fault="logits are bfloat16", causes=("head_precision", "logits"),
          objective="sequence", step=of_logits(lambda x: x.bfloat16().float())),
    Fault(report="allenai/open-instruct#1387", fault="the head is computed in bfloat16", causes=("head_precision",),
          objective="sequence", step=of_logits(dtype=torch.bfloat16)),
    # modes
    Fault(report="huggingface/trl#3234", fault="dropout is on where old logprobs are computed", causes=("dropout",),
          inside=lambda t: dropout(t, "attention"), stays=True),
    Fault(report="huggingface/trl#4", fault="dropout between the layers is on", causes=("dropout",),
          inside=lambda t: dropout(t, "layers"), stays=True),
    # masks and positions
    Fault(report="huggingface/trl#2708", fault="no attention mask: padding before the prompt is seen",
          causes=("attention_mask",), step=without_a_mask),
    Fault(report="AI-Hypercomputer/maxtext#5198", fault="the mask is made of the padding's id, which is a word too",
          causes=("attention_mask",), step=mask_by_id),
    Fault(report="Time-Search/TimeSearch-R#7", fault="the loss mask is taken for the attention mask",
          causes=("attention_mask",), step=loss_mask_for_attention),
    Fault(report="huggingface/nanoVLM#204", fault="packed rows see those before them", causes=("packing",),
          step=lambda s: _packed(s, reset=False)),
    Fault(report="DeepOpt-com/WrinkleFree-Monorepo#53", fault="packed rows with positions of their own see those before them",
          causes=("packing",), step=lambda s: _packed(s, reset=True)),
    Fault(report="huggingface/transformers#35924", fault="a sliding window on one side",
          causes=("attention_mask", *MODEL),
          step=lambda s: _windowed(s, 8)),
    Fault(report="huggingface/transformers#29285", fault="frequencies of the rotary in few bits", causes=MODEL,
          inside=lambda t: frequencies(t, lambda x: x.round(decimals=1)), stays=True),
    # what was before the tokens
    Fault(report="huggingface/trl#3520", fault="the prompt's start token is missing", causes=("prompt",),
          step=start_token_missing),
    Fault(report="axolotl-ai-cloud/axolotl#1616", fault="a start token between prompt and completion", causes=("prompt",),
          step=inserted),
    Fault(report="verl-project/verl#3720", fault="the last token of the prompt's template is missing", causes=("prompt",),
          step=prompt_end_missing),
    Fault(report="verl-project/verl#3960", fault="a part of the prompt is missing when it is rendered again",
          causes=("prompt", "attention_mask", *MODEL), step=prompt_middle_missing),
    Fault(report="huggingface/trl#5224", fault="the trainer has other tokens: text encoded again",
          causes=("wrong_token", "prompt", *MODEL), step=other_tokens),
    # which numbers
    Fault(report="PrimeIntellect-ai/prime-rl#1525", fault="each number is that of the next token",
          causes=("shifted_positions",), after=column(lambda x, _: x.roll(-1, 1))),
    Fault(report="huggingface/trl#6191", fault="rows are cut at the longest prompt's end", causes=("shifted_positions",),
          after=row_wise_offset),
    Fault(report="PrimeIntellect-ai/prime-rl#606", fault="packed numbers have one entry less a sample",
          causes=("shifted_positions", "wrong_token"), after=column(lambda x, m: _drifting(x, m))),
    Fault(report="lucidrains/PaLM-rlhf-pytorch#31", fault="the numbers are those of the row's first tokens",
          causes=("wrong_token", "shifted_positions", *MODEL), step=wrong_slice),
    Fault(report="allenai/open-instruct#1549", fault="labels are shifted twice", causes=("wrong_token",),
          step=after_next),
    Fault(report="huggingface/trl#4038", fault="labels are shifted after rows were cut for two ranks",
          causes=("wrong_token", "wrong_values", *MODEL), after=at_a_border),
    Fault(report="verl-project/verl#2185", fault="rows are in another order", causes=("wrong_token",),
          after=column(sorted_by_length)),
    Fault(report="thunlp/JustRL#5", fault="half of the rows are in another order", causes=("wrong_token",),
          after=column(half_sorted)),
    Fault(report="kvablack/ddpo-pytorch#29", fault="numbers are permuted along the row", causes=("wrong_token", *MODEL),
          after=column(time_permuted)),
    Fault(report="ray-project/ray#37240", fault="probabilities for logprobs", causes=("wrong_values",),
          after=column(lambda x, _: x.exp())),
    Fault(report="jingyaogong/minimind#298", fault="the mean of the padded row for every token", causes=("wrong_values",),
          after=column(means)),
    Fault(report="yaof20/Flash-RL#19", fault="placeholders of 1 are left in", causes=("wrong_values",),
          after=column(placeholders)),
    Fault(report="OpenRLHF/OpenRLHF#1240", fault="NaN of masked positions spreads over rows",
          causes=("wrong_values", "weights_differ", "engine_build"), after=column(nan_rows)),
    Fault(report="huggingface/trl#3867", fault="the rollouts have the likeliest token's logprob", causes=("wrong_token",),
          rollouts={"likeliest": True}),
    Fault(report="NovaSky-AI/SkyRL#758", fault="an end token put there by hand has a logprob of 0 in the rollouts",
          causes=("wrong_values",), after=engine_column(last_is_zero(1))),
    Fault(report="rllm-org/rllm#816", fault="rollouts are filled up with 0", causes=("wrong_values",),
          after=engine_column(last_is_zero(4))),
    # weights
    Fault(report="verl-project/verl#7495", fault="the engine never got the adapter", causes=WEIGHTS,
          inside=lambda t: adapter(t, 1.0), stays=True),
    Fault(report="radixark/miles#1087", fault="an adapter is merged twice on one side", causes=WEIGHTS,
          inside=lambda t: adapter(t, 2.0), stays=True),
    Fault(report="NovaSky-AI/SkyRL#1345", fault="the engine has the weights of another step", causes=WEIGHTS,
          inside=another_step, stays=True),
    Fault(report="THUDM/slime#345", fault="the head is not the one it should be tied to", causes=(*WEIGHTS, "head_precision"),
          inside=other_weights("lm_head", change=noised), stays=True),
    Fault(report="huggingface/trl#5932", fault="one layer was not updated", causes=WEIGHTS,
          inside=other_weights("layers.2.", change=noised), stays=True),
    Fault(report="NVIDIA-NeMo/Megatron-Bridge#2381", fault="another epsilon in the norms", causes=MODEL,
          inside=lambda t: attribute(t, ("variance_epsilon",), lambda _: 0.3), stays=True),
)  # fmt: skip


# -- what is healthy ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def attention(trainer: Any, name: str) -> Iterator[None]:
    config = trainer.model.config
    before, config._attn_implementation = config._attn_implementation, name
    yield
    config._attn_implementation = before


@contextlib.contextmanager
def checkpointing(trainer: Any) -> Iterator[None]:
    trainer.model.train()
    trainer.model.gradient_checkpointing_enable()
    yield
    trainer.model.gradient_checkpointing_disable()
    trainer.model.eval()


def with_gradients(step: Step) -> Any:
    function = step.trainer._get_per_token_logps_and_entropies
    return function(step.trainer.model, step.ids, step.mask, step.keep, batch_size=len(step.ids))[0].detach()


def padded_further(step: Step) -> Any:
    """Sixteen more columns of padding before every prompt."""
    more = torch.zeros(len(step.ids), 16, dtype=step.ids.dtype)
    return step.compute(torch.cat([more, step.ids], 1), torch.cat([more, step.mask], 1))


def one_by_one(step: Step) -> Any:
    return torch.cat([step.compute(step.ids[i : i + 1], step.mask[i : i + 1]) for i in range(len(step.ids))])


@contextlib.contextmanager
def peft_adapter(trainer: Any, folder: str, *, merged: bool) -> Iterator[None]:
    """The adapter that the engine has, on the trainer's model or merged into it."""
    from peft import PeftModel

    base = trainer.model
    with weights(trainer, lambda name, x: x):  # merging changes the base, which comes back
        adapted = PeftModel.from_pretrained(base, folder)
        trainer.model = adapted.merge_and_unload() if merged else adapted
        yield
        trainer.model = base if merged else adapted.unload()


def write_adapter(model: str, folder: str) -> str:
    """A LoRA adapter that moves logprobs, as PEFT writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder)
    return folder


def healthy(adapter_folder: str) -> tuple[Fault, ...]:
    """What trainers do that is no fault; rollouts of an adapter are asked of an engine that has it."""
    lora = {"adapter": adapter_folder}
    common: dict[str, Any] = {"report": "", "causes": ()}
    return (
        Fault(fault="as TRL computes it", **common),
        Fault(fault="eager attention", inside=lambda t: attention(t, "eager"), **common),
        Fault(fault="sdpa attention", inside=lambda t: attention(t, "sdpa"), **common),
        Fault(fault="more padding before the prompts", step=padded_further, **common),
        Fault(fault="one row at a time", step=one_by_one, **common),
        Fault(fault="packed, with a border between rows", step=lambda s: _packed(s, reset=True, border=True), **common),
        Fault(fault="gradient checkpointing", inside=checkpointing, step=with_gradients, **common),
        Fault(fault="the logits of the model's own forward", step=of_logits(), **common),
        Fault(fault="autocast to bfloat16", inside=lambda t: torch.autocast("cpu", torch.bfloat16), dtype="bfloat16", **common),
        Fault(fault="a LoRA adapter, not merged", inside=lambda t: peft_adapter(t, adapter_folder, merged=False), stays=True,
              rollouts=lora, **common),
        Fault(fault="a LoRA adapter, merged", inside=lambda t: peft_adapter(t, adapter_folder, merged=True), stays=True,
              rollouts=lora, **common),
        Fault(fault="min_tokens", rollouts={"min_tokens": 8}, **common),
        Fault(fault="tokens of a tool between", rollouts={"tool": True}, **common),
    )  # fmt: skip
