"""The engine arguments of the installed vLLM, read from its source: vLLM is not imported, so markers are cheap."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path
from typing import Final

#: Names of settings whose values are secret: `hf_token`, `api_key`, `ssl_keyfile`, a password in an extra configuration.
_SECRET: Final = re.compile(r"(token|key|keys|keyfile)$|ssl|passw|secret|credential|authorization|bearer", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret, so that its value is never printed."""
    return _SECRET.search(name) is not None


@functools.lru_cache(maxsize=1)
def vllm_engine_arguments() -> frozenset[str]:
    """Names of the fields of vLLM's EngineArgs; empty where vLLM is not installed."""
    spec = importlib.util.find_spec("vllm")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        source = Path(folder, "engine", "arg_utils.py")
        if source.is_file():
            for node in ast.parse(source.read_text("utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
                    return frozenset(
                        item.target.id
                        for item in node.body
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                    )
    return frozenset()
