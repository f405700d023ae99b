"""List a folder without lock files: one stays beside every output folder that was ever begun."""

from pathlib import Path


def entries(folder: Path) -> list[str]:
    """Return the sorted names of a folder's entries."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))
