"""Parameters for tests, and their way into the modules of other libraries."""

import flax.linen as nn
import jax
import numpy as np


def random_params(boxed, seed=0):
    """Values for every parameter, none at a special value such as a bias of zero."""
    rng = np.random.default_rng(seed)

    def one(path, leaf):
        values = rng.normal(size=leaf.shape).astype(np.float32)
        name = path[-1].key
        return 1 + 0.2 * values if name == "scale" else (0.1 if name == "bias" else 0.3) * values

    return jax.tree_util.tree_map_with_path(one, nn.meta.unbox(boxed))


def torch_linear(params, num_in=1):
    """{weight [out, in], bias [out]} of a `Linear` with `num_in` input dimensions."""
    weight = params["weight"]
    size = int(np.prod(weight.shape[:num_in]))
    state = {"weight": weight.reshape(size, -1).T}
    return state | ({"bias": params["bias"].reshape(-1)} if "bias" in params else {})


def torch_norm(params):
    """{weight, bias} of a `Norm`."""
    return {"weight": params["scale"]} | ({"bias": params["bias"]} if "bias" in params else {})


def load_torch(module, parts, *, rest=()):
    """Fills a torch module with {prefix: {name: array}}; what else it has must be in `rest`."""
    import torch

    state = {
        f"{prefix}.{name}": torch.tensor(np.array(array))
        for prefix, part in parts.items()
        for name, array in part.items()
    }
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(rest), (missing, unexpected)
    return module.eval()
