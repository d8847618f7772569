"""vLLM for CPUs: a prompt that is prefilled in chunks ends the engine if the request has a seed. Without our plugin.

python chunked_prefill_with_seeds.py MODEL
"""

import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def main(model):
    from vllm import LLM, SamplingParams

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_batched_tokens": 64}
    llm = LLM(model, enable_chunked_prefill=True, **options)
    prompts = [{"prompt_token_ids": [3, *range(40, 190), 4]} for _ in range(4)]
    for seed in (None, 1):
        try:
            outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=1.0, seed=seed), use_tqdm=False)
            print(f"seed={seed}: {sum(len(o.outputs[0].token_ids) for o in outputs)} tokens")
        except Exception as error:
            print(f"seed={seed}: the engine ends: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(sys.argv[1])
