"""Pre-train a model: {deepspeed --num_accelerators N | python} launch/pretrain.py CONFIG.yaml [key=value ...]"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    # `deepspeed` puts launch/ first on sys.path, where this very file would shadow the package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.cli import main

    sys.exit(main("pretrain"))
