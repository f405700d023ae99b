"""A checkpoint as a plain Hugging Face folder, proven equal to our model before it gets its name.

    config.json  generation_config.json (decoders)  model.safetensors
    tokenizer.json  tokenizer_config.json  vocab.txt (bert)
    README.md    the model card
    index.json   what it was made from, and the certificate; written last

A dialect is a module with `TOKENIZER_KIND` and three functions: `objections(model)` says why it cannot express a model,
`config(model, vocab_size, specials)` is its config.json, `weights(model, ours)` our tensors under its names. The proof
is parity.py, which runs in a process of its own. Importing this package does not import transformers: training asks
`check` before it starts.
"""

from pretrain.export.stage import DIALECTS, ExportConfig, check, opened, run, verify

__all__ = ["DIALECTS", "ExportConfig", "check", "opened", "run", "verify"]
