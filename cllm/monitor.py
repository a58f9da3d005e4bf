"""What a run records of its inside: gradients, updates and activations layer by layer; TensorBoard files."""

import math
import numbers
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from cllm import kernels, records
from cllm.errors import InputError
from cllm.nn import watching
from cllm.tensor import Tensor

__all__ = ["Monitor", "MonitorConfig", "TensorBoard", "layer_of"]


@dataclass(frozen=True)
class MonitorConfig:
    """[monitor]: what the records hold besides loss, learning rate, gradient norm and times.

    Parameters
    ----------
    layers : int
        Steps between records of each layer's gradient norm and update-to-weight ratio, and the whole model's
        ratio, and at the first step; 0: none.
    activations : int
        Steps between records of the size of what each module gives, and at the first step; 0: none.
    tensorboard : bool
        Whether the records also go to TensorBoard event files, in RUN/tensorboard (extra `tensorboard`).
    """

    layers: int = 50
    activations: int = 0
    tensorboard: bool = False

    def __post_init__(self):
        for name in ("layers", "activations"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must be 0 or more")


def layer_of(name):
    """The layer that a parameter belongs to: "transformer.h.3.attn.c_attn.weight" is of "h.3"."""
    parts = name.removeprefix("transformer.").split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return parts[0]


class Monitor:
    """Measures within the steps whose turn it is.

    Parameters
    ----------
    config : MonitorConfig
    model : nn.Module
    units : cllm.parallel.Units
        All of them measure at the same steps.
    """

    def __init__(self, config, model, units):
        self.config, self.model, self.units = config, model, units
        self.layers = {}  # layer -> its parameters' names
        for name, _ in model.named_parameters():
            self.layers.setdefault(layer_of(name), []).append(name)

    def forward(self, step):
        """A context for the forward passes of a step, which gives a dict of what to record."""
        if not _due(self.config.activations, step):
            return nullcontext({})
        return self._activations()

    @contextmanager
    def _activations(self):
        found, sizes = {}, _Sizes(self.model)
        with watching(self.model, sizes):
            yield found
        rows = {}
        for part in self.units.gather(sizes.rows):
            for name, more in part.items():
                rows.setdefault(name, []).extend(more)
        for name, passes in rows.items():
            squares, largest, zeros, n = zip(*passes)
            # Rounded once: the same bits however the passes are shared among units.
            found[f"activation_rms.{name}"] = math.sqrt(math.fsum(squares) / sum(n))
            found[f"activation_max.{name}"] = float(np.max(largest))
            found[f"activation_zeros.{name}"] = sum(zeros) / sum(n)

    def gradients(self, step, buffer):
        """What to record of the gradients of a step, before they are clipped."""
        if not _due(self.config.layers, step):
            return {}
        table, found = buffer.statistics(), {}
        for layer, names in self.layers.items():
            if norms := [table[name]["norm"] for name in names if name in table]:
                found[f"grad_norm.{layer}"] = math.hypot(*norms)
        return found

    def update(self, step, buffer):
        """A context for the update of a step, which gives a dict of what to record."""
        if not _due(self.config.layers, step):
            return nullcontext({})
        return self._ratios(buffer.parameters)

    @contextmanager
    def _ratios(self, parameters):
        found = {}
        weights = kernels.array_statistics([p.data for p in parameters.values()])[:, 0]
        changed = [p.data.copy() for p in parameters.values()]
        yield found
        for change, p in zip(changed, parameters.values()):
            np.subtract(p.data, change, out=change)
        changes = kernels.array_statistics(changed)[:, 0]
        place = {name: i for i, name in enumerate(parameters)}
        groups = {f".{layer}": names for layer, names in self.layers.items()} | {"": list(parameters)}
        for key, names in groups.items():
            rows = [place[name] for name in names]
            # Weights that were all zero have no ratio, so the record has none.
            if weights[rows].sum() > 0:
                found[f"update_ratio{key}"] = float(np.sqrt(changes[rows].sum() / weights[rows].sum()))


def _due(interval, step):
    return interval > 0 and (step % interval == 0 or step == 1)


class _Sizes:
    """Notes sum of squares, largest magnitude, zeros and number of elements of what each module gives."""

    def __init__(self, model):
        self.names = {id(module): name.removeprefix("transformer.") for name, module in model.named_modules()}
        self.rows = {}  # name -> a tuple for each time that the module was called

    def wants(self, module, name):
        return False  # fused operations stay fused: what is trained keeps its bits

    def offer(self, module, name, value):
        pass

    def output(self, module, value, given):
        value = value[0] if isinstance(value, tuple) else value
        name = self.names[id(module)]
        if isinstance(value, Tensor) and name and value.data.size:
            squares, largest, zeros, _ = kernels.array_statistics([np.ascontiguousarray(value.data)])[0]
            row = float(squares), float(largest), int(zeros), value.data.size
            self.rows.setdefault(name, []).append(row)


class TensorBoard:
    """A callback that writes each record's numbers to event files in RUN/tensorboard.

    At its first record it writes those that the run has already, in place of earlier files: the series is as
    continuous as the records are, however often the run was stopped.

    Raises
    ------
    InputError
        When tensorboardX is missing.
    """

    def __init__(self):
        try:
            import tensorboardX  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"monitor.tensorboard needs tensorboardX ({error}); "
                'install it: pip install "cllm[tensorboard]"'
            ) from None
        self.writer = None

    def __call__(self, trainer, record):
        if self.writer is None or record["step"] < self.last:  # the run's first, or it went back
            self._begin(trainer.run_dir)
        self._write(record)

    def _begin(self, run_dir):
        from tensorboardX import SummaryWriter

        self.close()
        folder = run_dir / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        self.writer = SummaryWriter(str(folder))
        for record in records.Run(run_dir).records:
            self._write(record)

    def _write(self, record):
        self.last = record["step"]
        for key, value in record.items():
            value = records.number(value)
            if key not in ("step", "split") and isinstance(value, numbers.Real):
                self.writer.add_scalar(f"{record['split']}/{key}", value, record["step"])

    def close(self):
        if self.writer is not None:
            self.writer.close()
            self.writer = None
