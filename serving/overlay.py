"""A model repository as a server behind the door sees it: links to the real one, without its queue limits.

tritonserver 2.51 ends when clients leave a full queue, and with a queue limit it may look at a waiting request only
half a second later; the door has limits of its own in their place. The links also
give every path a name that a shell takes.
"""

from __future__ import annotations

from pathlib import Path

from google.protobuf import text_format

from vilu.serving.about import CONFIG, load_config


class Overlay:
    """The models of `repository`, shown in a folder that changes with every start of a server."""

    def __init__(self, repository: Path) -> None:
        self.repository = repository
        self.folder: Path | None = None

    def show_in(self, folder: Path) -> Path:
        """Show every model in a new folder, and return it. Raises UserError for a configuration that is none."""
        folder.mkdir()
        self.folder = folder
        for config in self.repository.glob(f"*/{CONFIG}"):
            self.refresh(config.parent.name)
        return folder

    def refresh(self, model: str) -> None:
        """Show a model as it is now: its configuration and its versions may have changed."""
        source = self.repository / model
        if self.folder is None or not (source / CONFIG).is_file():
            return
        shown = self.folder / model
        shown.mkdir(exist_ok=True)
        for old in shown.iterdir():
            if old.is_symlink():
                old.unlink()
        for entry in source.iterdir():
            if entry.name != CONFIG:
                (shown / entry.name).symlink_to(entry)
        config = load_config(source / CONFIG)
        if config.HasField("dynamic_batching"):
            config.dynamic_batching.ClearField("default_queue_policy")
        part = shown / f"{CONFIG}.part"
        part.write_text(text_format.MessageToString(config), "utf-8")
        part.replace(shown / CONFIG)
