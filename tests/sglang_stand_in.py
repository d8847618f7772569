"""A small server on loopback that answers as SGLang 0.5.23's sources say: no build of SGLang runs on CPUs without AMX.

Its logprobs are real: transformers' forward pass in float32. What it takes and answers is written after these files of the
wheel: entrypoints/http_server.py (routes, errors), managers/io_struct.py (GenerateReqInput), managers/tokenizer_manager.py
(meta_info, lengths), managers/scheduler.py and managers/scheduler_components/logprob_result_processor.py (which logprobs).
"""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np


class SglangStandIn:
    """`after(answer)` edits the answer to /generate in place; `hidden` are paths that are not there; `info` and `about` are
    what /server_info and /model_info tell.
    """

    def __init__(self, model, name):
        self.model = model
        self.after = lambda answer: None
        self.hidden = ()
        self.about = {"model_path": name, "served_model_name": name, "is_generation": True, "weight_version": "default"}
        self.info = {
            "version": "0.5.23", "dtype": "float32", "disable_radix_cache": True, "disable_overlap_schedule": False,
            "chunked_prefill_size": 8192, "attention_backend": "triton", "tp_size": 1, "dp_size": 1, "context_length": None,
            "kv_cache_dtype": "auto", "quantization": None, "max_running_requests": 64, "internal_states": [{}],
        }  # fmt: skip
        self.asked = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, method, path, body):
        """(status, JSON) for a request."""
        if path in self.hidden:
            return 404, {"detail": "Not Found"}
        if method == "GET":
            told = {"/model_info": self.about, "/get_model_info": self.about, "/server_info": self.info,
                    "/get_server_info": self.info}  # fmt: skip
            return (200, told[path]) if path in told else (404, {"detail": "Not Found"})
        if path != "/generate":
            return 404, {"detail": "Not Found"}
        self.asked.append(body)
        try:
            made = self.generate(**body)
        except ValueError as error:
            return 400, {"error": {"message": str(error)}}
        self.after(made)
        return 200, made

    def generate(
        self, input_ids, sampling_params, return_logprob=False, logprob_start_len=-1, top_logprobs_num=0,
        return_text_in_logprobs=False, stream=False,
    ):  # fmt: skip
        vocabulary = self.model.config.vocab_size
        length = self.model.config.max_position_embeddings
        if len(input_ids) >= length:
            raise ValueError(
                f"The input ({len(input_ids)} tokens) is longer than the model's context length ({length} tokens)."
            )
        if logprob_start_len > len(input_ids):
            raise ValueError(f"{logprob_start_len=} is higher than the number of input tokens {len(input_ids)=}.")
        assert sampling_params["max_new_tokens"] == 0, "only scoring is written here"
        assert return_logprob
        assert not stream
        assert not return_text_in_logprobs
        rows = self.logprobs(input_ids)
        tokens = input_ids[logprob_start_len:]
        # Row i is of the token at logprob_start_len + i + 1; the last is of a token that is not there, and goes.
        kept = rows[logprob_start_len:-1]
        values = [None, *(_number(row[token]) for row, token in zip(kept, tokens[1:], strict=True))]
        order = [np.argsort(-row, kind="stable")[:top_logprobs_num].tolist() for row in kept]
        tops = [None, *([[_number(row[i]), i, None] for i in ids] for row, ids in zip(kept, order, strict=True))]
        clipped = [token if token < vocabulary - 1 else 0 for token in tokens]
        return {
            "text": "",
            "output_ids": [],
            "meta_info": {
                "id": "0", "finish_reason": {"type": "length", "length": 0}, "prompt_tokens": len(input_ids),
                "weight_version": "default", "num_retractions": 0, "reasoning_tokens": 0, "completion_tokens": 0,
                "cached_tokens": 0,
                "input_token_logprobs": [[value, token, None] for value, token in zip(values, clipped, strict=True)],
                "output_token_logprobs": [], "output_token_logprobs_length": 0,
                **({"input_top_logprobs": tops, "output_top_logprobs": []} if top_logprobs_num else {}),
            },
        }  # fmt: skip

    def logprobs(self, ids):
        import torch

        with self._lock, torch.no_grad():
            return self.model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()

    def _handler(stand_in):  # noqa: N805
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                status, told = stand_in.answer(self.command, self.path, json.loads(body) if body else None)
                content = json.dumps(told).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815

            def log_message(self, *_):
                pass

            def handle(self):
                with contextlib.suppress(ConnectionError):  # a client that gave up
                    super().handle()

        return Handler


def _number(value):
    """A number as orjson writes it: null in place of NaN and of infinities."""
    return float(value) if np.isfinite(value) else None
