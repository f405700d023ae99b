"""GPT-2, a decoder (Radford et al. 2019), as `GPT2LMHeadModel` of transformers has it."""

from pretrain.dialects import cards
from pretrain.dialects.dialect import FP32, Dialect, decoder_marks, even_heads, ungrouped_heads
from pretrain.dialects.names import Names
from pretrain.model.config import ModelConfig

ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}


class Gpt2(Dialect):
    """`GPT2LMHeadModel`."""

    name = "gpt2"
    model_type = "gpt2"
    auto_class = "AutoModelForCausalLM"
    pipeline = "text-generation"
    card = cards.decoder(
        "A GPT-2 decoder",
        """\
**Padded batches need `position_ids`.** Positions are learned, and the model does not count them from the attention
mask. `generate` passes them by itself; your own call of the model must.""",
    )
    wanted = {
        "causal": True,
        "norm": "layernorm",
        "norm_position": "pre",
        "positions": "learned",
        "bias": True,
        "transform_head": False,
    }
    free = {"kv_heads", "head_width", "mlp", "tie_embeddings"}
    names = Names(
        outside={
            "embed": "transformer.wte",
            "embed_position": "transformer.wpe",
            "final_norm": "transformer.ln_f",
            "head.decoder": "lm_head",
        },
        layer="transformer.h",
        inside={
            ("attention.q", "attention.k", "attention.v"): "attn.c_attn",
            "attention.out": "attn.c_proj",
            "attention_norm": "ln_1",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
            "mlp_norm": "ln_2",
        },
        transposed=True,
    )

    def further_objections(self, model: ModelConfig) -> list[str]:
        lines = ungrouped_heads(model, self.name) + even_heads(model, self.name)
        if model.mlp not in ACTIVATIONS:
            lines.append(f"model.mlp = {model.mlp}: gpt2 has {' or '.join(ACTIVATIONS)}")
        return lines

    def config(self, model: ModelConfig, vocab_size: int, specials: dict[str, int]) -> dict:
        """The contents of config.json. Documents begin and end with the same mark."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.model_type,
            "vocab_size": vocab_size,
            "n_embd": model.width,
            "n_layer": model.layers,
            "n_head": model.heads,
            "n_inner": model.mlp_width,
            "n_positions": model.max_positions,
            "activation_function": ACTIVATIONS[model.mlp],
            "resid_pdrop": model.dropout,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "layer_norm_epsilon": model.norm_eps,
            "initializer_range": model.init_std,
            "tie_word_embeddings": model.tie_embeddings,
            **decoder_marks(specials),
            **FP32,
        }

    def shape(self, config: dict) -> dict:
        named = {theirs: ours for ours, theirs in ACTIVATIONS.items()}
        return {
            "layers": config["n_layer"],
            "width": config["n_embd"],
            "heads": config["n_head"],
            "mlp_width": config["n_inner"] or 4 * config["n_embd"],
            "max_positions": config["n_positions"],
            "norm_eps": config["layer_norm_epsilon"],
            "mlp": named.get(config["activation_function"], "gelu_tanh"),
            "tie_embeddings": config["tie_word_embeddings"],
            "dropout": config["resid_pdrop"],
            "init_std": config["initializer_range"],
        }
