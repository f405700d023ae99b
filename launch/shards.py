"""Tokenise a corpus into memory-mapped shards: python launch/shards.py CONFIG.yaml [key=value ...]"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.cli import main

    sys.exit(main("shards"))
