"""Check every byte of published folders: python launch/check_files.py FOLDER [FOLDER ...]"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.tools.check_files import main

    sys.exit(main())
