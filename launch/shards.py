"""Tokenise a corpus into memory-mapped shards: python launch/shards.py CONFIG.yaml [key=value ...]

A killed build continues when it is started again. With --scheduler tcp://… the workers of a Dask cluster do the work.
"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.cli import main

    sys.exit(main("shards"))
