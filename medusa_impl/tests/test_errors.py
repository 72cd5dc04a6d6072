"""The one exception type for mistakes, over the borders that it has to cross."""

from __future__ import annotations

import copy
import multiprocessing
from multiprocessing.queues import SimpleQueue

import pytest

from medusa_impl.errors import UserError

WHOLE = UserError(found="3 heads", need="4", where="heads.safetensors", do="train them again")


def parts(error: UserError) -> tuple[object, ...]:
    return type(error), str(error), error.found, error.need, error.where, error.do


def send(queue: SimpleQueue[UserError]) -> None:
    for error in (WHOLE, UserError(found="none", need="one")):
        queue.put(error)


def test_an_error_comes_whole_out_of_another_process() -> None:
    """Regression: pickling gave an exception without arguments, which could not be made again; three places
    took it apart by hand.
    """
    context = multiprocessing.get_context("spawn")
    queue: SimpleQueue[UserError] = context.SimpleQueue()
    process = context.Process(target=send, args=(queue,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert parts(queue.get()) == parts(WHOLE)
    assert parts(queue.get()) == (UserError, "found none; need one", "none", "one", None, None)


def test_an_error_can_be_copied_and_raised_again() -> None:
    with pytest.raises(UserError, match=r"found 3 heads; need 4; in heads.safetensors; to mend it: train"):
        raise copy.deepcopy(WHOLE)
