"""vLLM for CPUs: the logprobs of speculative decoding with random sampling are wrong. Without pytest-logprob-parity.

    python speculative_sampling_at_temperature.py MODEL

An engine with ngram drafts writes completions at T=0 and at T=1, and reports processed logprobs. Another engine of the same
checkpoint, without drafts and in a process of its own, scores the same tokens in a prefill, whose logprobs are those of T=1.
"""

import json
import os
import subprocess
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "logprobs_mode": "processed_logprobs"}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 4, "prompt_lookup_min": 2}


def score(model, whole):
    """The prompt logprobs of each sequence's own tokens."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, **OPTIONS)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in whole], params, use_tqdm=False)
    return [
        [p[t].logprob for p, t in zip(o.prompt_logprobs[1:], ids[1:], strict=True)]
        for o, ids in zip(outputs, whole, strict=True)
    ]


def main(model):
    import numpy as np
    from vllm import LLM, SamplingParams

    llm = LLM(model, speculative_config=DRAFTS, **OPTIONS)
    prompts = [[3, *range(40 + i, 60 + i), *range(40 + i, 60 + i), 4] for i in range(16)]
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, max_tokens=48, logprobs=0, ignore_eos=True)
        outputs = [o.outputs[0] for o in llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)]
        told = [[p[t].logprob for p, t in zip(o.logprobs, o.token_ids, strict=True)] for o in outputs]
        whole = json.dumps([[*p, *o.token_ids] for p, o in zip(prompts, outputs, strict=True)])
        command = [sys.executable, __file__, model, "score"]
        answer = subprocess.run(command, input=whole, capture_output=True, text=True, check=True).stdout
        scored = json.loads(answer.strip().splitlines()[-1])
        d = np.concatenate([np.array(t) - s[-len(t) :] for t, s in zip(told, scored, strict=True)])
        broken = ~np.isfinite(d)
        far = int((np.abs(d[~broken]) > 0.01).sum())
        print(
            f"T={temperature:g}: of {len(d)} tokens {far} are more than 0.01 nats from the prefill's logprobs, "
            f"{int(broken.sum())} are not finite; largest difference {np.abs(d[~broken]).max():.3g} nats"
        )


if __name__ == "__main__":
    if sys.argv[2:] == ["score"]:
        print(json.dumps(score(sys.argv[1], json.loads(sys.stdin.read()))))
    else:
        main(sys.argv[1])
