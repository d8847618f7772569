"""Which engine arguments the installed vLLM has, read from its source: nothing is imported, so markers are cheap."""

from __future__ import annotations

import ast
import functools
import importlib.util
from pathlib import Path


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
