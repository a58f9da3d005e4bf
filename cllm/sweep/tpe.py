"""Settings proposed from what others have reached: optuna's tree-structured Parzen estimator, in rounds.

A round's settings are all proposed before any of them runs, so how many workers there are changes nothing.
Each block has a sampler of its own, and each of its rounds a fresh one: its proposals are a function of the
sampler's seed, the block, the round's place and what the rounds before have reached.
"""

import statistics
from importlib.util import find_spec
from itertools import chain

from cllm.errors import InputError
from cllm.sweep import space as spaces

__all__ = ["first", "propose", "rounds"]

FIRST, LATER = 8, 4  # settings of a block in the first round, which covers the space evenly, and in others
REFUSED = 50  # proposals in a row that are known already or cannot be; then the covering sequence goes on


def rounds(config, n_blocks):
    """The rounds as (begin, end) among the settings' places."""
    begin, size = 0, FIRST
    while begin < config.trials:
        end = min(begin + size * n_blocks, config.trials)
        yield begin, end
        begin, size = end, LATER


def first(config, blocks):
    """The settings of the first round: points of a Sobol sequence.

    Raises
    ------
    InputError
        When optuna is not there, or a block has fewer settings than its share of all trials.
    """
    if find_spec("optuna") is None:
        raise InputError('sweep.method = "tpe" needs optuna; install it: pip install "cllm[tpe]"')
    (_, end), *_ = rounds(config, len(blocks))
    return spaces.sampled(blocks, "qmc", config.trials, config.sampler_seed)[:end]


def propose(sweep, begin, end, results):
    """The settings of a round that are not known yet: the blocks take turns.

    Parameters
    ----------
    sweep : Sweep
        Its settings before place `begin` are those of the finished rounds. Of this round's it has none, or
        the first ones, when the round was cut short by a smaller sweep.trials.
    begin, end : int
        The round's places, as `rounds` has them.
    results : dict
        Trial name -> Result; those of the rounds before have ended.

    Returns
    -------
    list of dict
    """
    numbers = sweep.numbers
    samplers = [_Sampler(sweep, place, begin, results) for place in range(len(sweep.blocks))]
    known = {spaces.key(sweep.settings[number]) for number in sweep.left_out | set(numbers[:begin])}
    proposed = []
    for place in range(begin, end):
        # Those that are there are proposed once more, so that the samplers go on as if never cut short.
        proposed.append(samplers[place % len(samplers)].ask(known))
        if place < len(numbers):
            proposed[-1] = sweep.settings[numbers[place]]
        known.add(spaces.key(proposed[-1]))
    return proposed[len(numbers) - begin :]


class _Sampler:
    """optuna's sampler for one block in one round."""

    def __init__(self, sweep, place, begin, results):
        import optuna
        from numpy.random import SeedSequence

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.place, self.block = sweep, place, sweep.blocks[place]
        self.distributions = {_name(axis): _distribution(axis) for axis in self.block.free}
        (seed,) = SeedSequence([sweep.config.sampler_seed, place, begin]).generate_state(1)
        sampler = optuna.samplers.TPESampler(seed=int(seed), n_startup_trials=1, multivariate=True)
        self.study = optuna.create_study(direction=sweep.config.goal, sampler=sampler)
        for number in sweep.numbers[:begin]:
            # A setting that two blocks have counts in the first.
            if next(block for block in sweep.blocks if sweep.settings[number] in block) is self.block:
                self.study.add_trial(self._finished(number, results))

    def _finished(self, number, results):
        """A setting of an earlier round as optuna's trial: its mean over seeds.

        One that was dropped at a rung counts with its mean there, below those that went further; one with a
        failed seed counts as worse than all others.
        """
        from optuna.trial import TrialState, create_trial

        setting = self.sweep.settings[number]
        params = {_name(axis): axis.number(setting) for axis in self.block.free}
        found = [results[self.sweep.trial(number, seed).name] for seed in self.sweep.config.seeds]
        states, values = {result.state for result in found}, [result.value for result in found]
        facts = {"state": TrialState.PRUNED}
        if states == {"finished"}:
            facts = {"state": TrialState.COMPLETE, "value": statistics.fmean(values)}
        elif states == {"pruned"} and None not in values:
            facts["intermediate_values"] = {found[0].step: statistics.fmean(values)}
        return create_trial(params=params, distributions=self.distributions, **facts)

    def ask(self, known):
        """A setting that is not known yet, and whose configuration can be."""
        refused = set(known)
        for setting in chain((self._proposal() for _ in range(REFUSED)), self._covering(refused)):
            if spaces.key(setting) not in refused and self.sweep.fault(setting) is None:
                return setting
            refused.add(spaces.key(setting))

    def _proposal(self):
        params = self.study.ask(self.distributions).params
        return self.block.filled(axis.of(params[_name(axis)]) for axis in self.block.free)

    def _covering(self, known):
        """New settings of the sequence that the first round began with."""
        trials = self.sweep.config.trials
        stream = spaces.stream(self.block, self.place, "qmc", self.sweep.config.sampler_seed)
        while True:
            yield spaces.next_new(stream, known, self.sweep.blocks, self.place, trials)


def _name(axis):
    return ",".join(axis.names)


def _distribution(axis):
    """The numbers of an axis, as `axis.of` takes them."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(axis, spaces.Choices):
        return CategoricalDistribution(range(axis.size))
    if axis.step is not None:
        return IntDistribution(0, axis.size - 1)
    kind = IntDistribution if axis.integer else FloatDistribution
    return kind(axis.low, axis.high, log=axis.log)
