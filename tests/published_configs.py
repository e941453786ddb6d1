"""config.json files as they were published: all keys and values, of every family that lm/hf claims.

Each is named by its model on huggingface.co, and read from a public copy of it. `shrunken` gives
one with the same keys and small sizes, of which a model with random weights is made.
"""

import copy

SAMPLES = {"text-generation": {"do_sample": True, "max_length": 50}}
SUMMARY = {
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    **SUMMARY,
    "task_specific_params": SAMPLES,
    "vocab_size": 50257,
}
BERT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
MODERN = {  # what Llama and those after it have in common
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
LLAMA32 = {
    **MODERN,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "vocab_size": 128256,
}
GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": None,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 106],
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "initializer_range": 0.02,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "model_type": "gemma3_text",
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "use_cache": True,
    "vocab_size": 262144,
}
VISION = {
    "hidden_size": 1152,
    "image_size": 896,
    "intermediate_size": 4304,
    "model_type": "siglip_vision_model",
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
    "vision_use_head": False,
}
GEMMA3_27B = {  # what text_config leaves out are the defaults of its class
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "head_dim": 128,
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "model_type": "gemma3_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 62,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": VISION,
}
GEMMA3_4B = {
    **GEMMA3_27B,
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
T5 = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 2048,
    "d_kv": 64,
    "d_model": 512,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "relu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 6,
    "num_heads": 8,
    "num_layers": 6,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "use_cache": True,
    "vocab_size": 32128,
}
BEAMS = {"early_stopping": True, "max_length": 300, "num_beams": 4}
CONFIGS = {
    # openai-community/gpt2-medium
    "gpt2-medium": {
        **GPT2,
        "n_embd": 1024,
        "n_head": 16,
        "n_layer": 24,
        "n_special": 0,
        "predict_special_tokens": True,
    },
    # distilbert/distilgpt2
    "distilgpt2": {
        **GPT2,
        "_num_labels": 1,
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "n_inner": None,
        "n_layer": 6,
        "reorder_and_upcast_attn": False,
        "scale_attn_by_inverse_layer_idx": False,
        "scale_attn_weights": True,
    },
    # an early copy of it, of transformers 2
    "distilgpt2-2019": {
        **{key: value for key, value in GPT2.items() if key != "activation_function"},
        "finetuning_task": None,
        "n_layer": 6,
        "num_labels": 1,
        "output_attentions": False,
        "output_hidden_states": False,
        "pruned_heads": {},
        "torchscript": False,
        "use_bfloat16": False,
    },
    # the text decoder of Chatterbox, whose two names of one size agree
    "chatterbox-gpt2": {**GPT2, "hidden_size": 768, "n_ctx": 8196, "n_positions": 8196},
    # google-bert/bert-base-chinese
    "bert-base-chinese": {
        **BERT,
        "architectures": ["BertForMaskedLM"],
        "directionality": "bidi",
        "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12,
        "pooler_num_fc_layers": 3,
        "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
        "vocab_size": 21128,
    },
    # sentence-transformers/all-MiniLM-L6-v2
    "all-MiniLM-L6-v2": {
        **BERT,
        "_name_or_path": "nreimers/MiniLM-L6-H384-uncased",
        "architectures": ["BertModel"],
        "classifier_dropout": None,
        "gradient_checkpointing": False,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 6,
        "position_embedding_type": "absolute",
        "transformers_version": "4.41.2",
        "use_cache": True,
        "vocab_size": 30522,
    },
    # TinyLlama/TinyLlama-1.1B-Chat-v1.0
    "TinyLlama-1.1B": {
        **MODERN,
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.35.0",
        "vocab_size": 32000,
    },
    # meta-llama/Llama-3.2-1B-Instruct, and its copy by unsloth
    "Llama-3.2-1B": {**LLAMA32, "eos_token_id": [128001, 128008, 128009]},
    "unsloth-Llama-3.2-1B": {
        **LLAMA32,
        "eos_token_id": 128001,
        "pad_token_id": 128004,
        "transformers_version": "4.52.0.dev0",
        "unsloth_fixed": True,
        "unsloth_version": "2025.12.5",
    },
    # mistralai/Mistral-7B-v0.1, and Mistral-Small by unsloth
    "Mistral-7B-v0.1": {
        **{key: value for key, value in MODERN.items() if key != "attention_dropout"},
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "transformers_version": "4.34.0.dev0",
        "vocab_size": 32000,
    },
    "Mistral-Small-24B": {
        **MODERN,
        "architectures": ["MistralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "pad_token_id": 11,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 1000000000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.10.2",
        "unsloth_version": "2025.12.5",
        "vocab_size": 131072,
    },
    # Qwen/Qwen2.5-0.5B, and Qwen2.5-Coder-32B-Instruct with its longer context
    "Qwen2.5-0.5B": {
        **MODERN,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "transformers_version": "4.40.1",
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "Qwen2.5-Coder-32B": {
        **MODERN,
        "architectures": ["Qwen2ForCausalLM"],
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "max_position_embeddings": 32768,
        "max_window_layers": 70,
        "model_type": "qwen2",
        "num_attention_heads": 40,
        "num_hidden_layers": 64,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
            "type": "yarn",
        },
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "transformers_version": "4.43.1",
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    # Qwen/Qwen3-0.6B
    "Qwen3-0.6B": {
        **MODERN,
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "model_type": "qwen3",
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "transformers_version": "4.51.0",
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    # google/gemma-3-1b-it, 4b-it (its defaults left out) and 27b-it
    "gemma-3-1b-it": GEMMA3_1B,
    "gemma-3-4b-it": GEMMA3_4B,
    "gemma-3-27b-it": GEMMA3_27B,
    # mistralai/Mixtral-8x7B-v0.1
    "Mixtral-8x7B": {
        **MODERN,
        "architectures": ["MixtralForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "transformers_version": "4.36.0.dev0",
        "vocab_size": 32000,
    },
    # google-t5/t5-small and google/t5-v1_1-base
    "t5-small": {
        **T5,
        "n_positions": 512,
        "task_specific_params": {
            "summarization": {**BEAMS, "length_penalty": 2.0, "no_repeat_ngram_size": 3},
            "translation_en_to_de": {**BEAMS, "prefix": "translate English to German: "},
        },
    },
    "t5-v1_1-base": {
        **T5,
        "_name_or_path": "google/t5-v1_1-base",
        "classifier_dropout": 0.0,
        "d_model": 768,
        "dense_act_fn": "gelu_new",
        "feed_forward_proj": "gated-gelu",
        "is_gated_act": True,
        "num_decoder_layers": 12,
        "num_heads": 12,
        "num_layers": 12,
        "tie_word_embeddings": False,
        "transformers_version": "4.33.2",
    },
}
FAMILIES = {
    "gpt2": "gpt2-medium",
    "bert": "bert-base-chinese",
    "llama": "Llama-3.2-1B",
    "mistral": "Mistral-7B-v0.1",
    "mixtral": "Mixtral-8x7B",
    "qwen2": "Qwen2.5-0.5B",
    "qwen3": "Qwen3-0.6B",
    "gemma3_text": "gemma-3-1b-it",
    "gemma3": "gemma-3-4b-it",
    "t5": "t5-small",
}
_SMALL = {
    **dict.fromkeys(("n_embd", "hidden_size", "d_model"), 16),
    **dict.fromkeys(("n_head", "num_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("n_layer", "num_hidden_layers"), 2),
    **dict.fromkeys(("num_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("n_positions", "n_ctx", "max_position_embeddings"), 64),
    **dict.fromkeys(("intermediate_size", "d_ff"), 24),
    **dict.fromkeys(("head_dim", "d_kv"), 8),
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 264,
    "pooler_fc_size": 16,
    "sliding_window": 5,
    "original_max_position_embeddings": 16,
}


def shrunken(name, **changes):
    """A config of `CONFIGS` with the same keys and small sizes, as a new dict.

    changes: values in place of those; of a nested `text_config`, there.
    """
    tree = _shrink(copy.deepcopy(CONFIGS[name]))
    text = tree.get("text_config", tree)
    if text is not tree:  # what it leaves out are large defaults
        sizes = ("head_dim", "num_attention_heads", "num_key_value_heads", "vocab_size")
        text |= {key: _SMALL[key] for key in (*sizes, "max_position_embeddings")}
        tree["vision_config"] |= {"image_size": 28, "num_hidden_layers": 1}
        tree["mm_tokens_per_image"] = 4
    if "sliding_window_pattern" in text:
        text["num_hidden_layers"] = text["sliding_window_pattern"] + 1
    text |= changes
    return tree


def _shrink(tree):
    for key, value in tree.items():
        if isinstance(value, dict):
            _shrink(value)
        elif value is not None and key in _SMALL:
            tree[key] = _SMALL[key]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if tree.get(key) is not None:
            ids = tree[key] if isinstance(tree[key], list) else [tree[key]]
            small = [i % 264 for i in ids]
            tree[key] = small if isinstance(tree[key], list) else small[0]
    return tree
