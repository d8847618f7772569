"""Runs in vLLM's worker: takes checkpoint folders through vLLM's own start, update and finish of a weight update.

vLLM's weight transfer engines get tensors from a trainer, over NCCL or CUDA IPC. This one reads a folder instead, so that the
same routes can be used where there is no trainer, on CPUs too.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Final

from ...checkpoint.digests import find_model
from ...checkpoint.weight_update import WeightUpdate, check_finite, check_fits, tensors_of
from ...errors import UsageError

#: The key of the folder in `update_info` of vLLM's /update_weights.
FOLDER: Final = "folder"
#: Where the worker keeps the folder that it was started with: vLLM's reload overwrites its own.
_MODEL: Final = "_logprob_parity_model"
#: What marks our transfer engine.
_MARK: Final = "reads_checkpoint_folders"


def open_transfer(worker: Any) -> str:
    """Make this worker take checkpoint folders. Returns "", or why it does not. Doing it twice does nothing."""
    if not hasattr(worker, "_weight_update_active"):
        return "this vLLM has no start and finish of a weight update"
    there = worker.weight_transfer_engine
    if there is not None:
        return "" if hasattr(there, _MARK) else f"it has a weight transfer of its own, {type(there).__name__}"
    worker.weight_transfer_engine = _transfer_engine(worker)
    return ""


def why_refused(worker: Any, folder: str) -> str:
    """Why this worker should not load a checkpoint folder: it is not there, not whole, not finite, or of another
    architecture; "" where it fits.
    """
    if not hasattr(worker, _MODEL):
        setattr(worker, _MODEL, str(worker.vllm_config.model_config.model))
    update = WeightUpdate(weights=Path(folder))
    try:
        check_fits(update, find_model(getattr(worker, _MODEL), Path.cwd()))
        check_finite(update)
    except UsageError as error:
        return str(error)
    return ""


def _transfer_engine(worker: Any) -> Any:
    import torch
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclasses.dataclass
    class Update(WeightTransferUpdateInfo):  # type: ignore[misc]
        folder: str

    class CheckpointTransfer(WeightTransferEngine):  # type: ignore[misc]
        """As vLLM's NCCL engine, but for where the tensors come from."""

        init_info_cls = WeightTransferInitInfo
        update_info_cls = Update
        supports_draft_weight_update = False
        reads_checkpoint_folders = True

        def init_transfer_engine(self, init_info: Any) -> None:
            pass

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: dict[str, Any]) -> None:
            try:
                self.receive_weights(self.parse_update_info(update_info))
            except BaseException:
                with contextlib.suppress(Exception):  # else layers stay without numbers, and the next step ends the engine
                    self.finish_weight_update()
                raise
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Any) -> None:
            self.model.load_weights(tensors_of(Path(update_info.folder)))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)

        def shutdown(self) -> None:
            pass

    model = worker.model_runner.get_model()
    return CheckpointTransfer(WeightTransferConfig(backend="logprob_parity"), worker.vllm_config, worker.device, model)
