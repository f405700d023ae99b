"""Compare vocabularies on the same text: python launch/compare_tokenizers.py CONFIG.yaml [key=value ...]"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.cli import main

    sys.exit(main("compare_tokenizers"))
