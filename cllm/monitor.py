"""What a run records of its inside: gradients, updates and activations layer by layer; TensorBoard files."""

import math
import numbers
import shutil
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np

from cllm import kernels, records
from cllm.errors import InputError
from cllm.files import why
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
    """A callback that writes each record's numbers to an event file in RUN/tensorboard.

    At its first record it writes those that the run has already, in place of an earlier file: the series is
    as continuous as the records are, however often the run was stopped. What cannot be written, as on a full
    disk, is a warning, and ends it.

    Raises
    ------
    InputError
        When tensorboardX is missing.
    """

    FLUSH = 10.0  # seconds; its own writer has a thread, for whose end it would wait for ever on a full disk

    def __init__(self):
        try:
            from tensorboardX.proto import event_pb2, summary_pb2
            from tensorboardX.record_writer import RecordWriter
        except ImportError as error:
            raise InputError(
                f"monitor.tensorboard needs tensorboardX ({error}); "
                'install it: pip install "cllm[tensorboard]"'
            ) from None
        self.event, self.summary, self.open = event_pb2.Event, summary_pb2.Summary, RecordWriter
        self.file = None
        self.failed = False

    def __call__(self, trainer, record):
        if self.failed:
            return
        try:
            if self.file is None or record["step"] <= self.last.get(record["split"], -1):
                self._begin(trainer.run_dir)  # the run's first record, or it went back
                self._flush()
            self._write(record)
            if record["split"] != "train" or time.monotonic() - self.flushed > self.FLUSH:
                self._flush()
        except OSError as error:
            self._fail(error)

    def close(self):
        if self.file is not None and not self.failed:
            try:
                self._flush()
                self.file.close()
            except OSError as error:
                self._fail(error)

    def _begin(self, run_dir):
        folder = run_dir / "tensorboard"
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        self.last = {}
        self.file = self.open(str(folder / f"events.out.tfevents.{time.time_ns()}"))
        self._add(self.event(wall_time=time.time(), file_version="brain.Event:2"))
        for record in records.Run(run_dir).records:
            self._write(record)

    def _write(self, record):
        step, split = record["step"], record["split"]
        self.last[split] = step
        named = {key: records.number(value) for key, value in record.items() if key not in ("step", "split")}
        values = [
            self.summary.Value(tag=f"{split}/{key}", simple_value=value)
            for key, value in named.items() if isinstance(value, numbers.Real)
        ]  # fmt: skip
        self._add(self.event(wall_time=time.time(), step=step, summary=self.summary(value=values)))

    def _add(self, event):
        self.file.write(event.SerializeToString())

    def _flush(self):
        self.file.flush()
        self.flushed = time.monotonic()

    def _fail(self, error):
        self.failed = True
        warnings.warn(
            f"TensorBoard's file cannot be written ({why(error)}); the run goes on without it, and resuming "
            "writes it anew",
            stacklevel=2,
        )
