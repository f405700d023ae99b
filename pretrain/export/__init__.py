"""A checkpoint as a plain Hugging Face folder, proven equal to our model before it gets its name.

    config.json  generation_config.json (decoders)  model.safetensors
    tokenizer.json  tokenizer_config.json  vocab.txt (bert)
    README.md    the model card
    index.json   what it was made from, and the certificate; written last

The proof is parity.py, which runs in a process of its own: this package never imports transformers.
"""

from pretrain.export.stage import ExportConfig, opened, run, verify

__all__ = ["ExportConfig", "opened", "run", "verify"]
