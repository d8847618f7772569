"""What calling the functions of both NeMo frameworks takes: their tensor-parallel code, in a group of one process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


def flat_rows(logits: Any, token_ids: Any) -> tuple[Any, Any]:
    """Logits [B, L, V] and ids [B, L] of either with any axes in front, copied: these functions write into them."""
    return logits.reshape(-1, *logits.shape[-2:]).clone(), token_ids.reshape(-1, token_ids.shape[-1]).clone()


@contextlib.contextmanager
def group_of_one() -> Iterator[Any]:
    """A torch process group of this process alone: the one that is there, or one for a while."""
    import torch.distributed as dist

    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        if own:
            dist.destroy_process_group()
