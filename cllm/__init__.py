"""CLLM: train small language models on the CPU you have, and turn the runs into evidence.

Names are imported when they are first used, so that ``import cllm`` costs next to nothing.
"""

import importlib

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "Batch": "data",
    "Config": "config",
    "GPT": "gpt",
    "GPTConfig": "gpt",
    "InputError": "errors",
    "Task": "task",
    "Tensor": "tensor",
    "Trainer": "train",
    "capture": "nn",
    "cat": "tensor",
    "einsum": "tensor",
    "evaluate": "evaluation",
    "get_num_threads": "kernels",
    "gradcheck": "tensor",
    "load": "saved",
    "manual_seed": "rng",
    "no_grad": "tensor",
    "set_num_threads": "kernels",
    "stack": "tensor",
    "where": "tensor",
}

_MODULES = (
    "checkpoint", "config", "data", "errors", "figures", "functional", "generate", "gpt", "kernels",
    "metrics", "nn", "optim", "records", "reference", "rng", "schedules", "sweep", "task", "tensor", "train",
)  # fmt: skip

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(f"cllm.{_HOMES[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"cllm.{name}")
    else:
        raise AttributeError(f"module 'cllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__():
    return sorted(__all__)
