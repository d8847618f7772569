"""Faults that public reports describe in engines, planted in the code of a real vLLM. Nothing here knows of verdicts.

`FAULTS` names for each the report, what was wrong, and which causes a diagnosis may name: the first is the truth, the others
mean the same. bench_reports.py plants them one after another.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from catalogue.anatomy import load_checkpoint
from catalogue.engine_site import EngineSite

from pytest_logprob_parity.trace import Trace

#: The goldens that faults are planted against: how they are sampled.
GOLDENS: Mapping[str, Mapping[str, Any]] = {
    "T=0.7": {},
    "top-p": {"top_p": 0.9},
    "penalty": {"repetition_penalty": 1.3},
    "greedy": {"temperature": 0.0},
}
TEMPERATURE = 0.7

# What the engine computes otherwise than the checkpoint says, for all requests or for some.
BUILD = ("engine_build", "attention_backend", "kv_cache_dtype")
CONTEXT = ("prefix_cache", "batch_shape", "chunked_prefill", "stale_kv_cache", *BUILD)
#: What is in memory is not the checkpoint: from outside it looks as another computation does.
MEMORY = ("weights_differ", "stale_weights", *BUILD)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One reported fault. `site` plants it in the worker; `asked` changes the request, `free` that of the free generation."""

    report: str
    fault: str
    causes: tuple[str, ...]
    golden: str = "T=0.7"
    site: Callable[[Worker], None] | None = None
    asked: Callable[[Trace], Trace] | None = None
    free: Callable[[Trace], Trace] | None = None


class Worker(EngineSite):
    """The model and the sampler of a vLLM worker, with what reports need beside the catalogue's operations."""

    other_step: Path

    def reported(self, change: Callable[[Any, Any, list[tuple[str, int]]], None]) -> None:
        """Change what the sampler hands on: `change(all logprobs [rows, V], handed on, rows)`, in place.

        What is handed on is vLLM's LogprobsTensors: ids and logprobs [rows, 1 + k] with the taken token first, ranks [rows].
        `rows` are request and position.
        """
        sampler, runner = self._runner.sampler, self._runner
        original = sampler.gather_logprobs

        def gather(logprobs: Any, num_logprobs: int, token_ids: Any) -> Any:
            handed = original(logprobs, num_logprobs, token_ids)
            requests = runner.input_batch.req_ids
            change(logprobs, handed, [(name, len(runner.requests[name].output_token_ids)) for name in requests])
            return handed

        self._set(sampler, "gather_logprobs", gather)

    def tokens_of(self, request: str) -> tuple[list[int], list[int]]:
        """The prompt and the tokens so far of a request."""
        state = self._runner.requests[request]
        return list(state.prompt_token_ids), list(state.output_token_ids)

    def embeddings(self, factor: float) -> None:
        """Multiply what the embedding gives."""
        layer = self._model.model.embed_tokens
        self._undo.append(layer.register_forward_hook(lambda _, __, out: out * factor).remove)

    def residual(self, factor: float) -> None:
        """Multiply what each layer adds."""
        for layer in self._layers:
            for part in (layer.self_attn.o_proj, layer.mlp.down_proj):
                self._undo.append(
                    part.register_forward_hook(
                        lambda _, __, out: (out[0] * factor, *out[1:]) if isinstance(out, tuple) else out * factor
                    ).remove
                )

    def logits_of_rows(self, change: Callable[[Any, list[tuple[str, int]]], Any]) -> None:
        """Change the logits [rows, V] by request and position."""
        runner = self._runner

        def changed(logits: Any) -> Any:
            names = runner.input_batch.req_ids[: len(logits)]
            return change(logits.clone(), [(name, len(runner.requests[name].output_token_ids)) for name in names])

        self.logits(changed)


# -- what the sampler computes and hands on -----------------------------------------------------------------------------


def one_late(where: Callable[[int], bool]) -> Callable[[Worker], None]:
    """At some positions a token has the logprob of the one before it in its request."""

    def plant(worker: Worker) -> None:
        last: dict[str, Any] = {}

        def change(_: Any, handed: Any, rows: Any) -> None:
            now = handed.logprobs[:, 0].clone()
            for row, (name, position) in enumerate(rows):
                if position and where(position):
                    handed.logprobs[row, 0] = last[name]
                last[name] = now[row]

        worker.reported(change)

    return plant


def column(change: Callable[[Any], Any], where: Callable[[int], bool] = lambda position: True) -> Callable[[Worker], None]:
    """The taken tokens' logprobs changed by a function, at some positions."""

    def plant(worker: Worker) -> None:
        def changed(_: Any, handed: Any, rows: Any) -> None:
            for row, (_, position) in enumerate(rows):
                if where(position):
                    handed.logprobs[row, 0] = change(handed.logprobs[row, 0])

        worker.reported(changed)

    return plant


def likeliest(worker: Worker) -> None:
    worker.reported(lambda _, handed, rows: handed.logprobs[:, 0].copy_(handed.logprobs[:, 1]))


def ranks_one_too_large(worker: Worker) -> None:
    worker.reported(lambda _, handed, rows: handed.selected_token_ranks.add_(1))


def looked_up_in_sorted(worker: Worker) -> None:
    """The token's id is taken for a place in the logprobs sorted by size."""

    def change(logprobs: Any, handed: Any, rows: Any) -> None:
        ordered = logprobs.sort(-1, descending=True).values
        handed.logprobs[:, 0] = ordered.gather(-1, handed.logprob_token_ids[:, :1].long())[:, 0]

    worker.reported(change)


def of_a_placeholder(worker: Worker) -> None:
    """The logprob of the last id of the vocabulary, as an index of -1 gives it."""
    worker.reported(lambda logprobs, handed, rows: handed.logprobs[:, 0].copy_(logprobs[:, -1]))


def chosen_alone_is_raw(worker: Worker) -> None:
    """The taken token's logprob is computed from the logits anew, without the temperature; the list beside it is right."""
    kept: dict[str, Any] = {}

    def keep(x: Any) -> Any:
        kept["raw"] = x.log_softmax(-1)
        return x

    def change(_: Any, handed: Any, rows: Any) -> None:
        handed.logprobs[:, 0] = kept["raw"].gather(-1, handed.logprob_token_ids[:, :1].long())[:, 0]

    worker.logits(keep)
    worker.reported(change)


def first_row_of_a_batch(worker: Worker) -> None:
    """The first row of each step has the logits of the second one."""

    def change(x: Any) -> Any:
        x = x.clone()
        x[0] = x[min(1, len(x) - 1)]
        return x

    worker.logits(change)


def mask_of_another_row(share: int) -> Callable[[Worker], None]:
    """One id in `share` is masked, as the grammar of another request has it, in every second row."""

    def change(x: Any) -> Any:
        x = x.clone()
        x[::2, ::share] = -torch.inf
        return x

    return lambda worker: worker.logits(change)


def rows_swapped(worker: Worker) -> None:
    """Neighbours in the batch have each other's distribution; the taken tokens are their own."""

    def swapped_rows(x: Any) -> Any:
        even = len(x) // 2 * 2
        return torch.cat([x[:even].unflatten(0, (-1, 2)).flip(1).flatten(0, 1), x[even:]])

    worker.distribution(lambda _, logprobs: swapped_rows(logprobs))


def nan_row(worker: Worker) -> None:
    """The third row of each step that has one is NaN."""
    worker.reported(lambda _, handed, rows: handed.logprobs[2:3].fill_(float("nan")))


def nan_step(worker: Worker) -> None:
    """A step in twenty is NaN for all that are in it."""

    def change(_: Any, handed: Any, rows: Any) -> None:
        if rows and rows[0][1] % 20 == 7:
            handed.logprobs.fill_(float("nan"))

    worker.reported(change)


def distribution(change: Callable[[Any], Any]) -> Callable[[Worker], None]:
    """Logprobs as a function of the logits divided by the temperature."""
    return lambda worker: worker.distribution(lambda scaled, _: change(scaled))


def logits(change: Callable[[Any], Any]) -> Callable[[Worker], None]:
    return lambda worker: worker.logits(change)


def stray_shard(x: Any) -> Any:
    """The second quarter of the vocabulary comes from the third shard and the other way round."""
    quarter = x.shape[-1] // 4
    parts = list(x.split(quarter, -1))
    parts[1], parts[2] = parts[2], parts[1]
    return torch.cat(parts, -1)


def not_renormalised(worker: Worker) -> None:
    worker.distribution(lambda scaled, logprobs: scaled.log_softmax(-1).masked_fill(logprobs.isinf(), float("-inf")))


def penalty_of_output_alone(worker: Worker) -> None:
    """The repetition penalty counts what was written and not the prompt."""

    def change(x: Any, rows: Any) -> Any:
        for row, (name, _) in enumerate(rows):
            prompt, written = worker.tokens_of(name)
            only = sorted(set(prompt) - set(written))
            values = x[row, only]  # undone here, so that vLLM's own penalty leaves them as they were
            x[row, only] = torch.where(values > 0, values * 1.3, values / 1.3)
        return x

    worker.logits_of_rows(change)


# -- the model ----------------------------------------------------------------------------------------------------------


def stale_keys(first: int, last: int) -> Callable[[Worker], None]:
    """Keys and values of positions `first` to `last` stand as something else left them."""

    def change(_: int, positions: Any, keys: Any, values: Any) -> tuple[Any, Any]:
        stale = ((positions >= first) & (positions < last))[:, None, None]
        return torch.where(stale, keys.roll(1, -1), keys), torch.where(stale, values.roll(1, -1), values)

    return lambda worker: worker.keys_values(change)


def scaled_keys(worker: Worker) -> None:
    worker.keys_values(lambda _, __, k, v: (k * 0.5, v))


def in_8_bits(worker: Worker) -> None:
    def rounded(x: Any) -> Any:
        return x.to(torch.float8_e4m3fn).to(x)

    worker.keys_values(lambda _, __, k, v: (rounded(k), rounded(v)))


# -- the weights in memory ----------------------------------------------------------------------------------------------


def tensors(*parts: str, change: Callable[[Any], Any]) -> Callable[[Worker], None]:
    """The tensors whose name holds one of `parts`, changed."""
    return lambda worker: worker.weights(
        lambda state: {n: change(t) for n, t in state.items() if any(part in n for part in parts)}
    )


def swapped(one: str, other: str) -> Callable[[Worker], None]:
    """Two kinds of tensors have each other's content, in every layer."""

    def change(state: Mapping[str, Any]) -> dict[str, Any]:
        return {n: state[n.replace(one, "?").replace(other, one).replace("?", other)] for n in state if one in n or other in n}

    return lambda worker: worker.weights(change)


def interleaved(x: Any) -> Any:
    """Rows of each head interleaved, as another rotary layout wants them."""
    heads = x.view(-1, 2, 16, x.shape[-1]) if x.shape[0] % 32 == 0 else x.view(-1, 2, x.shape[0] // 2, x.shape[-1])
    return heads.transpose(1, 2).reshape(x.shape)


def uninitialised(x: Any) -> Any:
    return x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)


def another_step(worker: Worker) -> None:
    """The weights of another step of the same training, or noised ones where there is none."""
    if worker.other_step.is_dir():
        worker.weights(lambda state: load_checkpoint(worker.other_step))
    else:
        tensors("layers", change=lambda x: x + 0.3 * uninitialised(x))(worker)


# -- the request --------------------------------------------------------------------------------------------------------


def sampled(**changes: Any) -> Callable[[Trace], Trace]:
    return lambda trace: trace.with_(sampling=dataclasses.replace(trace.sampling, **changes))


# -- the list -----------------------------------------------------------------------------------------------------------

_T = TEMPERATURE
_RAW = distribution(lambda s: (s * _T).log_softmax(-1))
_ZERO = column(lambda x: 0 * x)
_VLLM, _LLAMA, _NEMO = "vllm-project/vllm", "ggml-org/llama.cpp", "NVIDIA-NeMo/RL"
FAULTS: tuple[Fault, ...] = (
    # the sampler
    Fault(report="sgl-project/sglang#2664", fault="logprobs are those before the temperature",
          causes=("raw_vs_processed", "temperature"), site=_RAW),
    Fault(report="PrimeIntellect-ai/prime-rl#697", fault="the temperature divides the logprobs, after the softmax",
          causes=("wrong_values", "temperature"), site=distribution(lambda s: (s * _T).log_softmax(-1) / _T)),
    Fault(report="radixark/miles#1345", fault="scored at another temperature than sampled: 1.3 for 0.7",
          causes=("temperature",), site=distribution(lambda s: (s * _T / 1.3).log_softmax(-1))),
    Fault(report="NVIDIA/TensorRT-LLM#2486", fault="penalties are in the logprobs and the temperature is not",
          causes=("temperature",), golden="penalty", site=_RAW),
    Fault(report=f"{_VLLM}#43125", fault="the chosen token's logprob ignores the mode, the list beside it does not",
          causes=("raw_vs_processed", "wrong_values"), site=chosen_alone_is_raw),
    Fault(report=f"{_VLLM}#13175", fault="padding of the vocabulary is in the normaliser", causes=("wrong_values",),
          site=distribution(lambda s: torch.cat([s, s.amax(-1, keepdim=True).expand(-1, 512) - 7], -1)
                            .log_softmax(-1)[:, :-512])),
    Fault(report=f"{_LLAMA}#7093", fault="top-p takes tokens away and the rest is not normalised again",
          causes=("truncation",), golden="top-p", site=not_renormalised),
    Fault(report=f"{_NEMO}#902", fault="logprobs are those before top-p", causes=("truncation", "raw_vs_processed"),
          golden="top-p", site=distribution(lambda s: s.log_softmax(-1))),
    Fault(report="huggingface/text-generation-inference#2108", fault="logprobs are those after a top-p nobody asked for",
          causes=("truncation",), asked=sampled(top_p=0.95)),
    Fault(report="vllm-project/vllm-ascend#7789", fault="the repetition penalty has no effect",
          causes=("penalties", "raw_vs_processed"), golden="penalty", asked=sampled(repetition_penalty=1.0)),
    Fault(report=f"{_VLLM}#5349", fault="the repetition penalty forgets the prompt", causes=("penalties",), golden="penalty",
          site=penalty_of_output_alone),
    Fault(report=f"{_VLLM}#22896", fault="half of the vocabulary is masked in every second row",
          causes=("truncation", *BUILD), site=mask_of_another_row(2)),
    Fault(report="vllm-project/vllm-gaudi#1200", fault="the mask of a grammar lies on rows that have none",
          causes=("truncation", *BUILD), site=mask_of_another_row(5)),
    # what is handed on
    Fault(report="AI-Hypercomputer/maxtext#2103", fault="each token has the logprob of the one before",
          causes=("shifted_positions",), site=one_late(lambda p: True)),
    Fault(report=f"{_NEMO}#3297", fault="the first of the list stands for the sampled token", causes=("wrong_token",),
          site=likeliest),
    Fault(report="abetlen/llama-cpp-python#453", fault="the token's id is taken for a place in the sorted logprobs",
          causes=("wrong_token", "wrong_values"), site=looked_up_in_sorted),
    Fault(report="meta-llama/llama#583", fault="the logprob is that of a placeholder token",
          causes=("wrong_token", "wrong_values"), site=of_a_placeholder),
    Fault(report=f"{_VLLM}#29216", fault="rows of a batch are swapped", causes=("wrong_token",), site=rows_swapped),
    Fault(report="GeeeekExplorer/nano-vllm#89", fault="the first row of each step is another one's",
          causes=("wrong_token", *CONTEXT), site=first_row_of_a_batch),
    Fault(report=f"{_LLAMA}#27972", fault="accepted drafts have a logprob of 0",
          causes=("speculative_decoding", "wrong_values"), site=column(lambda x: 0 * x, lambda p: p % 3 != 0)),
    Fault(report="NVIDIA/TensorRT-LLM#2406", fault="all logprobs are 0", causes=("wrong_values",), site=_ZERO),
    Fault(report="sgl-project/sglang#5761", fault="greedy requests have logprobs of 0", causes=("wrong_values", "wrong_token"),
          golden="greedy", site=_ZERO),
    Fault(report=f"{_VLLM}#34497", fault="after accepted drafts a token has the logprob of the one before",
          causes=("speculative_decoding", "shifted_positions"), site=one_late(lambda p: p % 4 == 3)),
    Fault(report=f"{_LLAMA}#10783", fault="probabilities for logprobs", causes=("wrong_values",),
          site=column(lambda x: x.exp())),
    Fault(report=f"{_VLLM}#36746", fault="ranks are one too large", causes=("wrong_values", "engine_build"),
          site=ranks_one_too_large),
    Fault(report="pytorch/torchtitan#3668", fault="one row of a batch is NaN", causes=BUILD, site=nan_row),
    Fault(report=f"{_VLLM}#57017", fault="all that share a step are NaN", causes=BUILD, site=nan_step),
    # the model
    Fault(report=f"{_VLLM}#52158", fault="the scale of the logits is left out", causes=BUILD, site=logits(lambda x: 0.8 * x)),
    Fault(report=f"{_VLLM}#52173", fault="a soft cap of the logits on one side", causes=BUILD,
          site=logits(lambda x: 8 * (x / 8).tanh())),
    Fault(report="unslothai/unsloth-zoo#593", fault="another formula for the soft cap", causes=BUILD,
          site=logits(lambda x: x * (x / 8).tanh())),
    Fault(report="THUDM/slime#1671", fault="two shards of the vocabulary are swapped", causes=BUILD, site=logits(stray_shard)),
    Fault(report=f"{_VLLM}#831", fault="linear rope scaling on one side", causes=BUILD, site=lambda w: w.rope(lambda x: x / 4)),
    Fault(report=f"{_VLLM}#48621", fault="another factor on cosine and sine", causes=BUILD,
          site=lambda w: w.attention_scale(1.3)),
    Fault(report=f"{_VLLM}#16564", fault="the rotary cache is lost in sleep", causes=MEMORY,
          site=lambda w: w.rope(lambda x: 0 * x)),
    Fault(report=f"{_VLLM}#5908", fault="a sliding window on one side", causes=BUILD, site=lambda w: w.window(16)),
    Fault(report=f"{_LLAMA}#13951", fault="another attention scale", causes=BUILD, site=lambda w: w.attention_scale(0.7)),
    Fault(report=f"{_VLLM}#16832", fault="what was written before a preemption is lost", causes=CONTEXT,
          site=stale_keys(160, 176)),
    Fault(report="ROCm/vllm#317", fault="keys in the cache have another scale", causes=("kv_cache_dtype", *BUILD),
          site=scaled_keys),
    Fault(report=f"{_NEMO}#3008", fault="keys and values in 8 bits without a scale", causes=("kv_cache_dtype", *BUILD),
          site=in_8_bits),
    # caches and weights after an update
    Fault(report=f"{_NEMO}#4018", fault="the prompts' keys and values are of weights before", causes=CONTEXT,
          site=stale_keys(0, 144)),
    Fault(report="InternLM/lmdeploy#4917", fault="the last block of the prompts is of weights before", causes=CONTEXT,
          site=stale_keys(144, 160)),
    Fault(report=f"{_VLLM}#29341", fault="weights are lost in sleep", causes=MEMORY,
          site=tensors("layers", change=uninitialised)),
    Fault(report="huggingface/trl#5312", fault="the weights are those of another step", causes=MEMORY, site=another_step),
    Fault(report="verl-project/verl#3461", fault="the base weights of one layer are lost", causes=MEMORY,
          site=tensors("layers.2.", change=uninitialised)),
    Fault(report=f"{_VLLM}#42821", fault="gate and up projections are swapped", causes=MEMORY,
          site=swapped("gate_proj", "up_proj")),
    Fault(report="1CatAI/1Cat-vLLM#21", fault="tensors are left out by the loader", causes=MEMORY,
          site=tensors("down_proj", change=lambda x: 0 * x)),
    Fault(report=f"{_VLLM}#47874", fault="a matrix is transposed", causes=MEMORY,
          site=tensors("o_proj", change=lambda x: x.T.reshape(x.shape))),
    Fault(report=f"{_VLLM}#26995", fault="queries and keys are laid out for another rotary", causes=MEMORY,
          site=tensors("q_proj", "k_proj", change=interleaved)),
    Fault(report=f"{_VLLM}#31464", fault="norm weights are one too large", causes=MEMORY,
          site=tensors("layernorm", change=lambda x: x + 1)),
    Fault(report="linkedin/Liger-Kernel#74", fault="norm weights are taken for what is added to 1", causes=MEMORY,
          site=tensors("norm", change=lambda x: x - 0.3)),
    Fault(report=f"{_VLLM}#51665", fault="the tied head does not follow the embedding", causes=MEMORY,
          site=tensors("lm_head", change=lambda x: x + 0.3 * uninitialised(x))),
)  # fmt: skip
