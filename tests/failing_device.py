"""A decoder whose device fails once, in the middle of a step: for tests of launchers.

The failure is a callback of the compiled step that raises: JAX's runtime makes a JaxRuntimeError of
it, as of a fault of a real device.
"""

import dataclasses
import itertools
import os
import pathlib
import signal

import jax

from lm.config.fields import field
from lm.models import decoder


@dataclasses.dataclass(frozen=True)
class Config(decoder.Config):
    fail_after: int = field(12, "Batches before the device fails.")
    marker: str = field("", "File that is there when it has failed; empty: it fails each time.")
    how: str = field("error", "An error, or kill: SIGKILL to its process.")


class FailingDecoder(decoder.Decoder):
    def __call__(self, inputs, *, train=False, **rest):
        if train:
            ids = jax.pure_callback(_fail_once(self.config), inputs.ids, inputs.ids)
            inputs = dataclasses.replace(inputs, ids=ids)
        return super().__call__(inputs, train=train, **rest)


def build(config, rules):
    return FailingDecoder(config, rules)


def _fail_once(config):
    made, marker = itertools.count(), pathlib.Path(config.marker)

    def check(ids):
        if next(made) >= config.fail_after and not (config.marker and marker.exists()):
            if config.marker:
                marker.touch()
            if config.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the link to the chip is down")
        return ids

    return check
