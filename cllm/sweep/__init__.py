"""Sweeps: settings times seeds, run by worker processes, ending in a table and a verdict.

A sweep's file becomes a `Sweep` (plan); its [[space]] blocks are the settings (space); its trials are
ordinary runs in SWEEP/trials/. `run` hands them to workers (engine), and gathers a `Result` for each
(results). Everything is in the trials' own files: a sweep that was stopped at any point goes on from there.
"""

from cllm.sweep.forecast import forecast
from cllm.sweep.plan import Sweep, SweepConfig, Trial
from cllm.sweep.results import Result
from cllm.sweep.run import run

__all__ = ["Result", "Sweep", "SweepConfig", "Trial", "forecast", "run"]
