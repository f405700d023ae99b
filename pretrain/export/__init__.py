"""Export a checkpoint as a plain Hugging Face folder. It is published only if its answers equal those of our model.

    config.json  generation_config.json (decoders)  model.safetensors
    tokenizer.json  tokenizer_config.json  vocab.txt (bert)
    README.md    the model card, and its facts as model_card.json
    index.json   the fingerprints of its sources, and the certificate; written last

parity.py opens the folder in a process of its own: no other module of this package imports transformers.
"""

from pretrain.export.stage import ExportConfig, opened, run, verify

__all__ = ["ExportConfig", "opened", "run", "verify"]
