"""Calls of the tensor-parallel functions of both NeMo frameworks, in a group of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def flat_rows(logits: Any, token_ids: Any) -> tuple[Any, Any]:
    """Copies of logits and ids with one batch axis, [B, L, V] and [B, L]: the functions write into them."""
    return logits.reshape(-1, *logits.shape[-2:]).clone(), token_ids.reshape(-1, token_ids.shape[-1]).clone()


@contextlib.contextmanager
def group_of_one() -> Iterator[Any]:
    """A context with a torch process group of this process alone: the existing one, or a temporary one."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if own:
            dist.destroy_process_group()
