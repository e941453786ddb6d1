"""The decoder once more, in numpy and for one document: no batch, mask, cache or scan."""

import math

import jax
import numpy as np

from lm.layers.positions import rotary_frequencies  # held to the papers in test_positions


def reference(config, params, ids):
    """float64 logits [T, V] of one document, ids: int [T], by loops over layers and heads."""
    c = config
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    length, kv_heads = len(ids), c.num_kv_heads or c.num_heads
    size = c.head_dim or c.embed_dim // c.num_heads

    def norm(x, p):
        return rms(x - x.mean(-1, keepdims=True) if c.norm == "layer" else x, p) + p.get("bias", 0)

    def rms(x, p):
        return (
            x
            / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
            * (p["scale"] + (c.norm == "rms_plus_one"))
        )

    def gelu(x):
        return np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)

    def gelu_tanh(x):
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    def silu(x):
        return x / (1 + np.exp(-x))

    def relu(x):
        return np.maximum(x, 0)

    def mlp(x, p):
        up = x @ p["up"]["weight"] + p["up"].get("bias", 0)
        if "gate" in p:
            gate = x @ p["gate"]["weight"] + p["gate"].get("bias", 0)
            act = {"reglu": relu, "geglu": gelu, "geglu_tanh": gelu_tanh, "swiglu": silu}
            h = act[c.activation](gate) * up
        else:
            act = {"relu": relu, "relu2": lambda x: relu(x) ** 2, "gelu": gelu, "silu": silu}
            act |= {"gelu_tanh": gelu_tanh, "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x))}
            h = act[c.activation](up)
        return h @ p["down"]["weight"] + p["down"].get("bias", 0)

    def rotated(x, position, local):
        frequencies, magnitude = rotary_frequencies(c.rotary, size, local)
        z = (x[: size // 2] + 1j * x[size // 2 :]) * np.exp(1j * position * frequencies)
        return np.concatenate([z.real, z.imag]) * magnitude

    def bias(head, back):
        if c.positions == "alibi":
            slopes = [2.0 ** (-8 * (i + 1) / 4) for i in range(4)]
            slopes += [2.0 ** (-8 * (i + 1) / 8) for i in (0, 2)]
            return -slopes[head] * back
        if c.positions == "relative":
            exact, most = c.relative_buckets // 2, c.relative_max_distance
            bucket = back
            if back >= exact:
                steps = math.log(back / exact) / math.log(most / exact) * exact
                bucket = min(exact + int(steps + 1e-6), c.relative_buckets - 1)
            return p["relative"]["weight"][bucket, head]
        return 0.0

    def attention(x, p, local):
        def heads(name):
            return np.einsum("td,dnh->tnh", x, p[name]["weight"]) + p[name].get("bias", 0)

        q, k, v = heads("query"), heads("key"), heads("value")
        if c.qk_norm:
            q, k = rms(q, p["query_norm"]), rms(k, p["key_norm"])
        y = np.zeros_like(q)
        for n in range(c.num_heads):
            kv = n // (c.num_heads // kv_heads)
            for t in range(length):
                seen = range(max(0, t - c.window + 1) if local else 0, t + 1)
                scores = []
                for s in seen:
                    a, b = q[t, n], k[s, kv]
                    if c.positions == "rotary":
                        a, b = rotated(a, t, local), rotated(b, s, local)
                    score = a @ b * (size**-0.5 if c.query_scale is None else c.query_scale)
                    if c.attention_softcap:
                        score = c.attention_softcap * np.tanh(score / c.attention_softcap)
                    scores.append(score + bias(n, t - s))
                weights = np.exp(np.array(scores) - max(scores))
                y[t, n] = weights / weights.sum() @ v[list(seen), kv]
        out = p["out"]
        return np.einsum("tnh,nhd->td", y, out["weight"]) + out.get("bias", 0)

    x = p["embedding"]["weight"][ids] * c.embed_scale
    if c.positions == "learned":
        x = x + p["position"]["weight"][:length]
    if c.positions == "sinusoidal":
        half = c.embed_dim // 2
        angles = np.arange(length)[:, None] * 1e4 ** (-np.arange(half) / (half - 1))
        x = x + np.concatenate([np.sin(angles), np.cos(angles)], -1)
    for i in range(c.num_layers):
        own = jax.tree.map(lambda w, i=i: w[i], p["layers"])
        local = c.layer_pattern[i % len(c.layer_pattern)] == "local"
        before, after = c.norm_placement != "post", c.norm_placement == "both"
        h = norm(x, own["attention_norm"]) if before else x
        a = attention(h, own["attention"], local)
        a = norm(a, own["attention_post_norm"]) if after else a
        if c.parallel_block:
            m = mlp(h, own["mlp"])
            x = x + a + (norm(m, own["mlp_post_norm"]) if after else m)
            x = x if before else norm(x, own["attention_norm"])
        else:
            x = x + a
            x = x if before else norm(x, own["attention_norm"])
            m = mlp(norm(x, own["mlp_norm"]) if before else x, own["mlp"])
            x = x + (norm(m, own["mlp_post_norm"]) if after else m)
            x = x if before else norm(x, own["mlp_norm"])
    x = norm(x, p["norm"]) if c.norm_placement != "post" else x
    logits = x @ (p["embedding"]["weight"].T if c.tie_embeddings else p["head"]["weight"])
    return c.logit_softcap * np.tanh(logits / c.logit_softcap) if c.logit_softcap else logits
