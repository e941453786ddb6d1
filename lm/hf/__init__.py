"""Hugging Face checkpoints in and out.

A family of models is a module with the name of its `model_type` in config.json:

    MODEL           the component of `lm.models` that it is, `decoder` say
    ARCHITECTURE    the class that `transformers` loads, for config.json
    BARE            its class without the projection to the vocabulary
    PREFIX          of the names of its tensors, which a checkpoint of the bare model lacks
    from_hf(keys)   the fields of `config.model` {path: value} of a config.json (lm/hf/keys.py)
    to_hf(model)    the config.json, a dict, of a resolved `config.model`
    weight_map(model)  its parameters beside the names of their tensors (lm/hf/table.py)
    aliases(model)  {name: name} of tensors that only repeat another one
    BUFFERS         a pattern of names of tensors that hold no parameters
    RENAMED         (pattern, replacement) of names that older checkpoints use

Nothing is dropped in silence: a key of config.json that nobody reads, a value that can't be
represented, a tensor that no row names and a parameter that no tensor fills are errors.
"""
