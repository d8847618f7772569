"""What PipelineRL's actors hand to its trainer: TrainingText records, here made of a trace, for this folder has no actor."""


def records_of(trace, tokenizer=None):
    records = []
    for i in range(trace.num_sequences):
        prompt, completion, (start, stop) = trace.prompt(i), trace.completion(i), trace.bounds(i)
        records.append(
            {
                "text": tokenizer.decode(prompt + completion) if tokenizer else "",
                "input_ids": prompt + completion,
                "labels": [-100] * len(prompt) + completion,
                "logprobs": trace.logprobs[start:stop].tolist(),
                "prompt_tokens": len(prompt),
                "output_tokens": len(completion),
                "group_id": str(trace.group[i]),
                "metadata": {"model_version": 0},
            }
        )
    return records
