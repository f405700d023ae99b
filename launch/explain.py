"""Show what a run reads, and when: python launch/explain.py RUN_OR_CONFIG --step N | --document WHERE | --lengths"""

if __name__ == "__main__":
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from pretrain.tools.explain import main

    sys.exit(main())
