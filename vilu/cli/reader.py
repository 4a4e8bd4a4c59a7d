"""Reading the data sets of `vilu eval`, each embedded with the CLIP of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vilu.errors import UserError

if TYPE_CHECKING:
    from vilu.checkpoint import Checkpoint
    from vilu.cli.progress import Bar
    from vilu.clip import Clip
    from vilu.data import Source
    from vilu.embeddings import EmbeddedSet


class Reader:
    """Reads each data set once and loads each CLIP once."""

    def __init__(
        self,
        root: Path | None,
        cache: Path | None,
        dtype: str,
        projection: bool,
        clip_name: str | None,
        pretrained: str | None,
        bar: Bar,
        columns: dict[str, Any],
    ) -> None:
        self.root, self.cache, self.dtype, self.projection, self.bar = root, cache, dtype, projection, bar
        self.clip_name, self.pretrained, self.columns = clip_name, pretrained, columns
        self.skipped: list[str] = []
        self.clips: dict[str, Clip] = {}
        self.sources: dict[int, Source] = {}  # by the identity of the set that was embedded from it
        self._sets: dict[tuple[object, ...], EmbeddedSet] = {}

    def read(self, kind: str, name: str | Path, split: str, checkpoint: Checkpoint, path: Path) -> EmbeddedSet:
        """Read a data set and embed it with the checkpoint's CLIP and prompts. Messages call the checkpoint `path`."""
        from vilu.class_set import DEFAULT_TEMPLATES
        from vilu.data import embed, load_embeddings, open_source

        if kind == "embeddings":
            key: tuple[object, ...] = (str(name),)
            if key not in self._sets:
                self._sets[key] = load_embeddings(Path(name))
            return self._sets[key]
        clip = self._clip(checkpoint, path)
        templates = checkpoint.class_set.templates if checkpoint.class_set else DEFAULT_TEMPLATES
        key = (kind, str(name), split, id(clip), templates)
        if key not in self._sets:
            self.bar(f"reading {name}", 0, 1)
            if kind == "dataset":
                embedded = str(name) in ("digits", "shapes", "shapes-captions")
                source = open_source(dataset=str(name), root=None if embedded else self.root, split=split)
            else:
                source = open_source(str(name), split=split, cache=self.cache, **self.columns)
            self._sets[key] = embed(
                source,
                clip,
                cache=self.cache,
                dtype=self.dtype,
                projection=self.projection and _has_projections(clip),
                templates=templates,
                progress=lambda what, done, total: self.bar(f"{name}, {split}: {what}", done, total),
            )
            self.skipped += self._sets[key].skipped
            self.sources[id(self._sets[key])] = source
        return self._sets[key]

    def _clip(self, checkpoint: Checkpoint, path: Path) -> Clip:
        from vilu.clip import load_clip, load_clip_for

        def load_once(name: str, pretrained: str | None, fingerprint: str = "") -> Clip:
            label = " ".join(filter(None, (name, pretrained)))
            if label not in self.clips:
                self.bar(f"loading {label}", 0, 1)
                self.clips[label] = load_clip(name, pretrained, fingerprint=fingerprint)
            return self.clips[label]

        return load_clip_for(checkpoint, path, self.clip_name, self.pretrained, load=load_once)


def _has_projections(clip: Clip) -> bool:
    """Whether both towers end in one linear projection, which BayesVLM needs. Otherwise its row gives the reason."""
    import torch

    side = clip.transform.size
    try:
        with torch.no_grad():
            clip.project_pixels(torch.zeros(1, side, side, 3, dtype=torch.uint8, device=clip.mean.device))
            clip.project_tokens(clip.tokenize(["a"]).to(clip.mean.device))
    except UserError:
        return False
    return True
