"""Qwen3, a decoder (Qwen team 2025, arXiv:2505.09388), as `Qwen3ForCausalLM` of transformers has it."""

from typing import TYPE_CHECKING

from pretrain.dialects.dialect import Dialect
from pretrain.dialects.naming import differences, rename
from pretrain.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

CARD = """\
{front}
# A Qwen3 decoder

{size}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "path/to/this/folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
prompt = tokenizer("In the beginning", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=40)[0], skip_special_tokens=True))
```

## Good to know

- **`{end}` begins and ends a document.** The tokenizer writes it before a text and nothing after the text, so a prompt
  looks like the start of a document in training. `generate` stops at the next `{end}`. To train on whole documents,
  append `tokenizer.eos_token_id` yourself.
- **Padding is on the left**, because `generate` needs it there for prompts of several lengths.
{lossless}- **Length.** {length}
  Longer inputs are extrapolation. config.json allows {positions:,} positions, so a program that reads it, such as
  lm-eval, must be told `max_length={longest}`.
- **Scoring text with lm-eval.** lm-eval puts a begin mark before a text that the tokenizer has begun with `{end}`
  already, and it scores the second mark too. For whole texts (`loglikelihood_rolling`: perplexity, bits per byte) pass
  `--model_args pretrained=FOLDER,dtype=float32,add_bos_token=False,max_length={longest}`. Multiple choice, where a
  context is given, is right without `add_bos_token=False`.
- **Marks inside text.** In the corpus the characters `{end}` were text. transformers reads them as the mark, unless you
  call `tokenizer(text, split_special_tokens=True)`.
- The model continues text. It was not trained to follow instructions and has no chat template.
"""

OUTSIDE = {"embed": "model.embed_tokens", "final_norm": "model.norm", "head.decoder": "lm_head"}
INSIDE = {  # the modules of each layer
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention_norm": "input_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp_norm": "post_attention_layernorm",
}


class Qwen3(Dialect):
    """`Qwen3ForCausalLM`."""

    tokenizer_kind = "byte"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = CARD
    wanted = {
        "causal": True,
        "norm": "rmsnorm",
        "norm_position": "pre",
        "positions": "rope",
        "mlp": "swiglu",
        "bias": False,
        "qk_norm": True,
        "transform_head": False,
    }

    def objections(self, model: ModelConfig) -> list[str]:
        """A line for each key with a value that Qwen3 cannot have; no lines if the model is a Qwen3."""
        return differences(model, "qwen3", self.wanted)

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. Documents begin and end with the same mark."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": vocab_size,
            "hidden_size": model.width,
            "num_hidden_layers": model.layers,
            "num_attention_heads": model.heads,
            "num_key_value_heads": model.KV,
            "head_dim": model.E,
            "intermediate_size": model.mlp_width,
            "hidden_act": "silu",
            "max_position_embeddings": model.max_positions,
            "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
            "rope_theta": model.rope_theta,  # transformers 4 reads it here
            "rms_norm_eps": model.norm_eps,
            "attention_bias": False,
            "attention_dropout": model.dropout,  # ours also drops after the two branches, where Qwen3 has no dropout
            "use_sliding_window": False,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            "bos_token_id": specials["eod"],
            "eos_token_id": specials["eod"],
            "pad_token_id": specials["pad"],
            "dtype": "float32",
            "torch_dtype": "float32",  # the name of `dtype` in transformers 4
        }

    def weights(self, model: ModelConfig, ours: "dict[str, Tensor]") -> "dict[str, Tensor]":
        """Our tensors under Qwen3's names."""
        return rename(ours, model.layers, OUTSIDE, "model.layers", INSIDE)
