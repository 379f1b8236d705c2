import threading
import time

import pytest

from bebop.data.ahead import prepared_ahead


def test_items_come_in_order_and_one_is_worked_on_ahead():
    done: list[int] = []
    ready = prepared_ahead(range(5), lambda i: done.append(i) or i * i)
    assert next(ready) == 0
    deadline = time.monotonic() + 5
    while done != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert done == [0, 1], "the next one is ready, and no more than that"
    assert list(ready) == [1, 4, 9, 16]


def test_stalling_data_are_said(caplog):
    go_on = threading.Event()
    ready = prepared_ahead([0], lambda _: go_on.wait(10), patience=0.05)
    threading.Timer(0.3, go_on.set).start()
    assert next(ready) is True
    assert "no data for 0 s" in caplog.text
    assert len(caplog.records) >= 3


def test_an_error_arrives_where_the_item_would_have():
    ready = prepared_ahead([1, 0, 1], lambda x: 1 // x)
    assert next(ready) == 1
    with pytest.raises(ZeroDivisionError):
        next(ready)


def test_a_timeout_of_the_work_itself_is_no_stall():
    def read(_):
        raise TimeoutError("the file server")

    with pytest.raises(TimeoutError, match="the file server"):
        next(prepared_ahead([0], read, patience=5))
