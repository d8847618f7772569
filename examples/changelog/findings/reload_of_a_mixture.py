"""vLLM for CPUs: a mixture of experts that loads its own weights once more computes something else. Without our plugin.

python reload_of_a_mixture.py MODEL
"""

import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(model):
    import numpy as np
    from vllm import LLM, SamplingParams

    llm = LLM(model, dtype="float32", enforce_eager=True, max_model_len=512, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": [3, *range(40 + i, 70 + i), 4]} for i in range(16)]
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)

    def logprobs():
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return np.array([next(iter(p.values())).logprob for o in outputs for p in o.prompt_logprobs[1:]])

    before = logprobs()
    print(f"asked twice: largest difference {np.abs(logprobs() - before).max():.3g} nats")
    llm.collective_rpc("reload_weights")
    print(f"after reload_weights of the same checkpoint: RMS {np.sqrt(np.mean((logprobs() - before) ** 2)):.3g} nats")


if __name__ == "__main__":
    main(sys.argv[1])
