"""A request to stop is kept when a library swallows the exception it raised."""

import contextlib
import signal
import threading

import pytest

from trtvlm.scripts.stopping import stoppable


def terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


@pytest.mark.parametrize(
    ("number", "handler", "error"),
    [(signal.SIGINT, signal.default_int_handler, KeyboardInterrupt), (signal.SIGTERM, terminated, SystemExit)],
)
def test_a_swallowed_stop_is_raised_again(number: signal.Signals, handler, error: type[BaseException]) -> None:  # type: ignore[no-untyped-def]
    before = signal.signal(number, handler)
    try:
        with stoppable() as check:
            check()
            with contextlib.suppress(error):  # as a native library does with what its callback raises
                signal.raise_signal(number)
                pytest.fail("the signal raised nothing where it landed")
            with pytest.raises(error):
                check()
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as check:
            signal.raise_signal(signal.SIGINT)
            check()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_may_use_it() -> None:
    done = []

    def work() -> None:
        with stoppable() as check:
            check()
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done
