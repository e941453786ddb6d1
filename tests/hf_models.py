"""Tiny models of `transformers` with random weights, one or more of each family."""

import numpy as np

SIZES = {
    "vocab_size": 259,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WIDE = {"head_dim": 8}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "vocab_size": 259,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}
GEMMA = {
    **SIZES,
    **WIDE,
    "num_hidden_layers": 3,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 24,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}
# name: (class of its config, its values); the families first, each with its usual options
CASES = {
    "gpt2": ("GPT2Config", GPT2),
    "llama": ("LlamaConfig", SIZES),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 5}),
    "qwen2": ("Qwen2Config", {**SIZES, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {**SIZES, **WIDE}),
    "gemma3_text": ("Gemma3TextConfig", GEMMA),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "router_aux_loss_coef": 0.02}),
    # other options of theirs
    "gpt2_relu": ("GPT2Config", {**GPT2, "n_inner": 40, "activation_function": "relu"}),
    "llama3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama_biases": ("LlamaConfig", {**SIZES, **WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama_yarn": ("LlamaConfig", {**SIZES, "rope_parameters": YARN, "hidden_act": "gelu"}),
    "mistral_global": ("MistralConfig", {**SIZES, "sliding_window": None, **WIDE}),
    "qwen2_windows": (
        "Qwen2Config",
        {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3_biases": ("Qwen3Config", {**SIZES, **WIDE, "attention_bias": True}),
    "gemma3_stretched": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "attention_bias": True,
            "final_logit_softcapping": 10.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "mixtral_window": (
        "MixtralConfig",
        {**SIZES, "num_local_experts": 3, "num_experts_per_tok": 1, "sliding_window": 5},
    ),
}
FAMILIES = tuple(CASES)[:7]
BERT = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
T5 = {
    "vocab_size": 259,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "dropout_rate": 0.0,
}
# no decoders: name: (class, class of its config, its values)
OTHERS = {
    "bert": ("BertForPreTraining", "BertConfig", {**BERT, "type_vocab_size": 3}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5_v1_1": (
        "T5ForConditionalGeneration",
        "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
}


def make(name, seed=0, **changes):
    """The model of a case, all of its parameters random: none is at 0 or 1, where it began.

    changes: of the values of its config.
    """
    import torch
    import transformers

    ids = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
    torch.manual_seed(seed)
    if name in OTHERS:
        kind, config_kind, values = OTHERS[name]
        values = {**values, **changes}
        config = getattr(transformers, config_kind)(**values, **ids, decoder_start_token_id=257)
        model = getattr(transformers, kind)(config)
    else:
        kind, values = CASES[name]
        config = getattr(transformers, kind)(**{**values, **changes}, **ids)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            # where it began, and so much that logits are far from uniform
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.2))
    return model.eval()


def logits(model, ids, mask=None):
    """float32 [B, T, V] of ids [B, T], in which `mask` is 0 at padding."""
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(np.asarray(mask), dtype=torch.long)
        ids = torch.tensor(np.asarray(ids), dtype=torch.long)
        return model(ids, attention_mask=mask).logits.numpy()
