"""Memory and time of attention by itself on a TPU, by kernel and length; writes to docs/scale.md.

    python scripts/attention_table.py                                   # about ten compiles
    python scripts/attention_table.py --lengths=4096 --kernels=splash   # one, printed alone

Compiles attention forward and backward, 16 heads of 128 and 4 of keys and values, bfloat16, causal,
one row on each shard of the batch, and reads temporaries and the least times from the program as
scripts/plan.py does. Lengths from 32,768 on are sharded over `sequence`, 8,192 tokens a chip.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from lm import cli

DOCS = Path(__file__).resolve().parent.parent / "docs/scale.md"
HEADING = "## Splash against XLA's attention"
LENGTHS = (4096, 8192, 32768, 131072)
SHARD = 8192  # tokens of a row on one chip, where a chip does not hold all of them
HEADS, KV_HEADS, SIZE = 16, 4, 128
KERNELS = {
    "splash": ("splash", "gather"),
    "XLA": ("xla", "gather"),
    "XLA in a ring": ("xla", "ring"),
}


@dataclasses.dataclass(frozen=True)
class Needs:
    """One device; bounds in seconds are those of `lm.compiled.roofline`."""

    temporaries: int
    fits: bool
    flops: float
    lower_bound_s: float
    upper_bound_s: float
    bottleneck: str

    def cell(self) -> str:
        held = f"{self.temporaries / 2**30:.3f} GiB" if self.fits else "does not fit"
        span = f"{self.lower_bound_s * 1e3:.2f} to {self.upper_bound_s * 1e3:.2f}"
        return f"{held}; {span} ms, {self.bottleneck}"


def measure(
    topology: str, length: int, kernel: str, sequence_parallel: str, sequence: int
) -> Needs:
    """Compiles one of them with the length over `sequence` devices, and the rest over `data`."""
    import jax
    import jax.numpy as jnp

    from lm.compiled import compiling, costs, hlo, interconnect, roofline, traffic
    from lm.compiled import topology as topologies
    from lm.config.schema import MeshConfig
    from lm.kernels import attention_kernels
    from lm.kernels.dot_product import self_mask
    from lm.parallel.sharding import make_rules
    from lm.types import Tokens

    target = topologies.parse(topology)
    devices = topologies.devices(target)
    rows = len(devices) // sequence
    rules = make_rules(MeshConfig(data=rows, sequence=sequence), devices)

    def of(heads: int) -> Any:
        sharding = rules.sharding("batch", None, "length", None)
        shape = (rows, heads, length, SIZE)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    def both(q: Any, k: Any, v: Any, tokens: Tokens, gradient: Any) -> Any:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return attention_kernels.attend(
                *(q, k, v, self_mask(tokens, order=sequence)),  # balanced, as in a decoder
                rules=rules,
                kernel=kernel,
                sequence_parallel=sequence_parallel,
                scale=SIZE**-0.5,
            )

        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(gradient)

    stream: Any = jax.ShapeDtypeStruct(
        (rows, length), jnp.int32, sharding=rules.sharding("batch", "length")
    )
    arrays = (of(HEADS), of(KV_HEADS), of(KV_HEADS), Tokens(stream, stream, stream), of(HEADS))
    made = compiling.compile_step(jax.jit(both).lower(*arrays))
    module = hlo.read(made.program.hlo_module)
    found = traffic.collectives(module, rules.mesh.shape)
    coords = interconnect.chip_coords(target, rules.mesh)
    done = costs.count_flops_and_hbm_bytes(module)
    priced = interconnect.price(found, target, coords)
    times = roofline.times(target, module, done, priced, "bfloat16")
    held = made.size("temp_size")
    return Needs(
        held,
        not made.refusal,
        done.flops,
        times.lower_bound_s,
        times.upper_bound_s,
        times.bottleneck,
    )


def main() -> int:
    parser = cli.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--lengths", type=cli.list_of(int), default=[*LENGTHS])
    parser.add_argument("--kernels", type=cli.list_of(str), default=[*KERNELS])
    args = parser.parse_args()
    rows = []
    for length in args.lengths:
        sequence = max(1, length // SHARD) if length > SHARD else 1
        cells = [f"{length:,}", str(sequence)]
        for name in args.kernels:
            if name == "XLA in a ring" and sequence == 1:
                cells.append("")
                continue
            cells.append(measure(args.topology, length, *KERNELS[name], sequence).cell())
            print(f"{length} {name}: {cells[-1]}", flush=True)
        rows.append("| " + " | ".join(cells) + " |")
    if (args.lengths, args.kernels) == ([*LENGTHS], [*KERNELS]):
        _write(args.topology, args.kernels, rows)
    return 0


def _write(topology: str, names: list[str], rows: list[str]) -> None:
    """Put the table at the head of its section, and leave what people wrote below it."""
    text = DOCS.read_text()
    start = text.index(HEADING)
    below = text.index("\n\n", text.index("\n|", start))
    table = [
        f"{HEADING}\n",
        "Made by `python scripts/attention_table.py`: attention by itself, forward and backward, "
        f"on {topology},\none row of 16 heads of 128 (4 of keys and values) on each shard of the "
        "batch. Temporaries of a\ndevice; bounds of the time by the schedule; what binds.\n",
        "| length | sequence | " + " | ".join(names) + " |",
        "|" + "---|" * (2 + len(names)),
        *rows,
    ]
    DOCS.write_text(text[:start] + "\n".join(table) + text[below:])


if __name__ == "__main__":
    cli.run(main)
