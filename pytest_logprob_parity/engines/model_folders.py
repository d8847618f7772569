"""Where the models of specs lie on the disk: folders of model and tokenizer, and the adapters on top."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.digests import find_model, find_tokenizer
from ..spec import EngineSpec

if TYPE_CHECKING:
    from ..checkpoint.adapter import Adapter


class ModelFolders:
    """Folders by spec. Relative ones are looked for below `root` first."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[EngineSpec, tuple[Path, Path]] = {}
        self._adapters: dict[EngineSpec, Adapter] = {}

    def know(self, spec: EngineSpec, model: str, tokenizer: str) -> None:
        """Remember where the model and the tokenizer of an engine are that somebody else built. Raises UsageError."""
        self._folders[spec] = (find_model(model, self.root), find_model(tokenizer, self.root))

    def folders(self, spec: EngineSpec) -> tuple[Path, Path]:
        """The folders of a spec's model and tokenizer; the second may hold none. Raises UsageError; starts nothing."""
        if spec not in self._folders:
            model = find_model(spec.model, self.root)
            tokenizer = model if spec.tokenizer is None else find_tokenizer(find_model(spec.tokenizer, self.root))
            self._folders[spec] = (model, tokenizer)
        return self._folders[spec]

    def adapter(self, spec: EngineSpec, *, keep: bool = False) -> Adapter | None:
        """The adapter of a spec: as its folder holds it now, or, with `keep`, as it was read last. Raises UsageError."""
        if spec.adapter is None:
            return None
        from ..checkpoint.adapter import read_adapter

        if not keep or spec not in self._adapters:
            self._adapters[spec] = read_adapter(self.absolute(spec.adapter), self.folders(spec)[0])
        return self._adapters[spec]

    def loaded_adapter(self, spec: EngineSpec) -> Adapter | None:
        """The adapter of a spec as it was read last; None where it has none, or nobody has asked."""
        return self._adapters.get(spec)

    def absolute(self, folder: str | Path) -> Path:
        """A folder, relative ones below `root` first."""
        below = self.root / folder
        return (below if below.is_dir() else Path(folder)).absolute()
