"""The flags of scripts that run a model with weights of fewer bits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lm.types import Params

if TYPE_CHECKING:
    from lm.compression.quantized_weights import WeightFormat


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --weights and --group."""
    parser.add_argument(
        "--weights",
        choices=("float", "int8", "int4"),
        default="float",
        help="bits of the matrices in memory (default: float, as they were trained)",
    )
    parser.add_argument(
        "--group",
        type=int,
        metavar="N",
        help="--weights=int4: inputs that share a scale: 32 (the default), 64 or 128",
    )


def weight_format(args: argparse.Namespace) -> WeightFormat | None:
    """The format that the flags ask for; None: float.

    Raises:
        ValueError: the flags don't go together.
    """
    from lm.compression.quantized_weights import WeightFormat

    if args.group is not None and args.weights != "int4":
        raise ValueError(f"--group ({args.group}) is for --weights=int4, not {args.weights}")
    return None if args.weights == "float" else WeightFormat(args.weights, args.group or 32)


def quantized(args: argparse.Namespace, experiment: Any, params: Params) -> Params:
    """The parameters of an `lm.training.experiment.Experiment`, as the flags say.

    Raises:
        ValueError: the flags don't go together, or the model takes pictures.
    """
    from lm.compression.quantized_weights import quantize_params

    weights = weight_format(args)
    if weights is None:
        return params
    if getattr(experiment.config.model, "takes_images", False):
        raise ValueError(
            f"--weights={args.weights} is for models of tokens, and config.model.name="
            f"{experiment.config_dict.model.name} takes pictures"
        )
    return quantize_params(params, experiment.boxed_params, experiment.param_rules, weights)
