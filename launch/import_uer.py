"""Make a Hugging Face folder of a BERT of UER-py: python launch/import_uer.py CONFIG.yaml [key=value ...]"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.cli import main

    sys.exit(main("import_uer"))
