"""Decisions and errors that the processes of one run share."""

import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that writes files and makes choices."""
    return PartialState().is_main_process


def wait_for_everyone() -> None:
    """Block until every process gets here."""
    PartialState().wait_for_everyone()


def run_on_all(function: Callable[[], T]) -> list[T]:
    """Call `function` on every process; each gets the results of all, in the order of the ranks.

    `function` must not communicate with other processes.

    Raises:
        Whatever it raises on any process, on all of them, so that none waits for one that has failed.
    """
    if PartialState().num_processes == 1:
        return [function()]
    outcomes = gather_object([_outcome(function)])
    _raise_first(outcomes)
    return [result for result, _ in outcomes]


def run_on_main(function: Callable[[], T]) -> T:
    """Call `function` on the main process alone; every process gets its result, or the error that it raised.

    `function` must not communicate with other processes.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    outcomes = [_outcome(function) if state.is_main_process else (None, None)]
    broadcast_object_list(outcomes, from_process=0)
    _raise_first(outcomes)
    return outcomes[0][0]


def run_on_main_first(function: Callable[[], T]) -> T:
    """Call `function` on the main process, and when that is done on the others; each gets its own result.

    `function` must not communicate with other processes.

    Raises:
        Whatever it raises on the main process, on all of them; what it raises on another, on that one.
    """
    state = PartialState()
    if state.num_processes == 1:
        return function()
    result, error = _outcome(function) if state.is_main_process else (None, None)
    errors = [(None, error)]
    broadcast_object_list(errors, from_process=0)
    _raise_first(errors)
    return result if state.is_main_process else function()


def run_in_step(function: Callable[[], T]) -> list[T]:
    """[`run_on_all`] for a `function` that communicates with other processes, as often on each.

    Raises:
        Whatever it raises on this process, which has to end then: the others wait for it.
    """
    return [function()] if PartialState().num_processes == 1 else gather_object([function()])


def split_between_processes(items: list[T]) -> list[T]:
    """Every n-th item, beginning with this process's rank."""
    state = PartialState()
    return items[state.process_index :: state.num_processes]


def even_share(count: int) -> list[int]:
    """This process's positions among `count`: as many as every other's, for which some are taken twice."""
    state = PartialState()
    each = -(-count // state.num_processes)
    return [(state.process_index + i * state.num_processes) % count for i in range(each)]


def _outcome(function: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return function(), None
    except Exception as error:
        return None, _portable(error)


def _portable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:  # whatever an exception's own arguments raise when they are copied
        return RuntimeError(f"{type(error).__name__}: {error}")


def _raise_first(outcomes: list[tuple[Any, Exception | None]]) -> None:
    for rank, (_, error) in enumerate(outcomes):
        if error is not None:
            if PartialState().process_index != rank:
                error.add_note(f"Raised by process {rank}.")
            raise error
