"""The entries of a folder but for the lock files, which stay beside every folder that was made or begun."""

from pathlib import Path


def entries(folder: Path) -> list[str]:
    """Names, sorted."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
