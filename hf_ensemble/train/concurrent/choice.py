"""How many trainings are run at once, by what their first passes take."""

from collections.abc import Callable, Sequence

from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ...errors import ConfigurationError
from ...runs import Concurrency, ConcurrencyTrial

# How much faster twice as many have to be.
_LEAST_GAIN = 1.05


def chosen_concurrency(names: Sequence[str], round_seconds: Callable[[Sequence[str]], list[float]]) -> Concurrency:
    """How many trainings to run at once: twice as many are tried as long as that gains, and fits into memory.

    A trial gains if it is faster than the one before by 5 %, and each of its rounds is faster than any of the same
    trainings one after the other, so that it is no accident of the clock.

    Args:
        names (`Sequence[str]`): the trainings.
        round_seconds (`Callable`):
            From trainings to the seconds of rounds, in each of which all of them make a pass, at once. Raises
            `ConfigurationError` for trainings that cannot share passes.
    """
    trials: list[ConcurrencyTrial] = []
    alone: dict[str, list[float]] = {}
    best, speed_up, is_full, told = 1, 1.0, False, []
    while not is_full and best < len(names):
        tried = names[: 2 * best]
        try:
            alone |= {name: round_seconds([name]) for name in tried if name not in alone}
            seconds = round_seconds(tried)
        except ConfigurationError as error:
            return Concurrency(1, str(error))
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            is_full = True
            told.append(f"{len(tried)} at once do not fit into memory")
            continue
        trial = ConcurrencyTrial(len(tried), seconds, [sum(own) for own in zip(*(alone[name] for name in tried))])
        trials.append(trial)
        told.append(f"{len(tried)} at once are {trial.speed_up:.2f} times as fast as one after the other")
        if trial.speed_up < _LEAST_GAIN * speed_up or max(seconds) >= min(trial.seconds_alone):
            told[-1] += ", too little or too uncertain to count"
            break
        best, speed_up = len(tried), trial.speed_up
    if is_full:
        # Outside of the handler: the exception holds the tensors of the failed passes.
        clear_device_cache(garbage_collection=True)
    return Concurrency(best, "; ".join(told), trials)
