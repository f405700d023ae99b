"""From raw text to a pre-trained Transformer that stock `transformers` opens."""

__version__ = "0.1.0"
