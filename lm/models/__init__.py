"""Models: one file per architecture, each with a frozen `Config` and `build(config, rules) ->
Model`.

The contract (`lm.types.Model`) is one linen module with the fields `config` and `rules` and:

    model(inputs, *, encoder=None, cache=None, train=False) -> Output    hidden states, before the
                                                                         vocabulary projection
    model.logits(hidden) -> [B, T, V]                float32 logits of (a chunk of) them
    model.init_cache(batch_size, length) -> Cache    what generation carries
    model.num_microbatches                           parts that it cuts the rows of a pass into

`Config` has `check(length)`, which raises ValueError on sizes that don't fit together, naming the
config path, and properties or fields `vocab_size`, `max_length`, `is_causal` (a token of `inputs`
sees only itself and those before it, but for marked prefixes) and `takes_encoder` (`encoder` must
be given; with a cache, in the first call alone, which keeps what later ones need). It may offer
`attention_kinds` (dicts of the fields of `lm.selfcheck.Heads`) and `logit_softcap`, which the
start-up check then covers.

A leaf of a cache has its rows along one axis, as long as `batch_size`, or belongs to all of them;
beam search replaces rows by others. A cached call may begin with padding (segment 0), which leaves
no trace. Parameters of a stack of layers, [L, ...], lie under `layers`, which `lm.layers.stack.run`
also runs where generation has taken them apart (`lm.parameters.apart`). Everything else (loss,
optimizer, generation, export) knows models through this alone.
"""
