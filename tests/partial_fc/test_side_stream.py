"""In which order the row update is queued beside the rest of a step, on torch.cpu's streams, which are told here."""

import pytest
import torch

from pfc.partial_fc import PartialFC, RowSGD, objectives

Calls = list[tuple[str, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What was called, in order: ("main", "record", "1") …; ("update",) is an optimizer's, on the stream before it."""
    told: Calls = []

    class Event(str):
        __slots__ = ()

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def record_event(self) -> Event:
            event = Event(sum(call[1] == "record" for call in told) + 1)
            told.append((self.name, "record", event))
            return event

        def wait_event(self, event: Event) -> None:
            assert isinstance(event, Event)
            told.append((self.name, "wait for event", event))

        def wait_stream(self, stream: "Stream") -> None:
            told.append((self.name, "wait for stream", stream.name))

    monkeypatch.setattr(torch.cpu, "Stream", Stream)
    monkeypatch.setattr(torch.cpu, "_current_stream", Stream("main"))
    monkeypatch.setattr(torch.cpu, "_default_cpu_stream", torch.cpu.current_stream())
    update = RowSGD._step

    def tell(self: RowSGD, gradients: list) -> None:
        told.append((torch.cpu.current_stream().name, "update"))  # type: ignore[attr-defined]
        update(self, gradients)

    monkeypatch.setattr(RowSGD, "_step", tell)
    return told


def pieces() -> tuple[PartialFC, RowSGD]:
    head = PartialFC(20, 8, objective=objectives.CosFace())
    return head, RowSGD(head, 0.1)


def backward(head: PartialFC) -> None:
    head(torch.randn(4, 8, requires_grad=True), torch.arange(4)).backward()


def test_the_update_begins_where_the_heads_gradients_are_there(calls: Calls) -> None:
    head, optimizer = pieces()
    backward(head)
    calls.append(("main", "backward pass of the backbone"))
    optimizer.step()
    assert calls == [
        ("main", "record", "1"),
        ("main", "backward pass of the backbone"),
        ("side", "wait for event", "1"),
        ("side", "update"),
        ("side", "record", "2"),
    ]
    calls.clear()
    optimizer.zero_grad()
    backward(head)
    assert calls == [("main", "wait for event", "2"), ("main", "record", "1")], "the next forward pass waits for it"


@pytest.mark.parametrize("what", ["found_inf", "grad_scale", "unscaled", "clipped", "scaled anew"])
def test_it_waits_for_all_where_something_came_after(calls: Calls, what: str) -> None:
    head, optimizer = pieces()
    backward(head)
    assert head.gradient_scale.grad is not None
    if what in ("found_inf", "grad_scale"):
        setattr(optimizer, what, torch.zeros(()) if what == "found_inf" else torch.ones(()))
    elif what == "unscaled":
        head.gradient_scale.grad.div_(2.0)
    elif what == "clipped":
        torch.nn.utils.clip_grad_norm_([head.gradient_scale], 0.1)
    else:
        head.gradient_scale.grad = torch.ones(())
    optimizer.step()
    assert calls[1:3] == [("side", "wait for stream", "main"), ("side", "update")]


@pytest.mark.parametrize("what", ["a loss without gradients", "optimizer state", "centers"])
def test_it_waits_for_who_used_the_centers_since(calls: Calls, what: str) -> None:
    head, optimizer = pieces()
    backward(head)
    if what == "optimizer state":
        optimizer.state_dict()
    elif what == "centers":
        _ = head.centers
    else:
        with torch.no_grad():
            head(torch.randn(4, 8), torch.arange(4))
    optimizer.step()
    assert ("side", "wait for stream", "main") in calls
    assert ("side", "wait for event", "1") not in calls


def test_memory_is_held_until_the_stream_that_it_goes_back_to_has_waited(calls: Calls) -> None:
    head, optimizer = pieces()
    backward(head)
    optimizer.step()
    optimizer.zero_grad()
    stream = head.side_stream
    assert stream is not None
    with torch.cpu.stream(torch.cpu.Stream("third")):  # type: ignore[call-arg]
        head.state_dict()
        assert calls[-1][:2] == ("third", "wait for event")
        assert stream._in_use
    _ = head.centers
    assert not stream._in_use


@pytest.mark.parametrize("how", ["deepcopy", "double", "pickle"])
def test_a_copy_waits_for_the_update(calls: Calls, how: str) -> None:
    head, optimizer = pieces()
    backward(head)
    optimizer.step()
    calls.clear()
    if how == "double":
        head.double()
    else:
        head.__getstate__()
    assert calls[0] == ("main", "wait for event", "2")


def test_what_an_update_that_failed_had_begun_is_waited_for(calls: Calls) -> None:
    head, optimizer = pieces()
    backward(head)

    def fail(_: list) -> None:
        raise RuntimeError("out of memory")

    optimizer._step = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert calls[-1][:2] == ("side", "record")
    with pytest.raises(RuntimeError, match="applied already"):
        optimizer.step()


def test_the_mark_is_that_of_the_last_pass(calls: Calls) -> None:
    head, optimizer = pieces()
    backward(head)
    backward(head)
    optimizer.step()
    marks = [event for name, what, *event in calls if (name, what) == ("main", "record")]
    assert calls[-3] == ("side", "wait for event", *marks[-1])


@pytest.mark.parametrize("ask", ["centers", "state_dict", "skipped_steps", "load_centers", "optimizer state"])
def test_who_looks_at_the_centers_waits_for_the_update(calls: Calls, ask: str) -> None:
    head, optimizer = pieces()
    backward(head)
    optimizer.step()
    calls.clear()
    if ask == "load_centers":
        head.load_centers(torch.ones(20, 8))
    elif ask == "state_dict":
        head.state_dict()
    elif ask == "optimizer state":
        optimizer.state_dict()
    else:
        getattr(head if ask == "centers" else optimizer, ask)
    assert calls[0] == ("main", "wait for event", "2")


def test_what_the_update_reads_is_held_until_the_stream_has_been_waited_for(calls: Calls) -> None:
    """Memory that is freed goes back to the stream on which it was taken, which does not know the other one's."""
    head, optimizer = pieces()
    backward(head)
    stream, gradient = head.side_stream, head.row_gradients[0]
    assert stream is not None
    optimizer.step()
    optimizer.zero_grad()
    assert any(one is gradient for one in stream._in_use)
    head.wait_for_update()
    assert not stream._in_use


def test_nothing_is_held_where_the_work_is_done_at_once() -> None:
    head, optimizer = pieces()
    backward(head)
    optimizer.step()
    assert head.side_stream is not None
    assert not head.side_stream._in_use


def test_a_gpus_streams_take_these_calls() -> None:
    """Every method that is used exists in torch.cuda, with arguments for what is handed over."""
    import inspect

    inspect.signature(torch.cuda.Stream).bind()
    inspect.signature(torch.cuda.current_stream).bind(torch.device("cuda", 0))
    inspect.signature(torch.cuda.stream).bind(object())
    inspect.signature(torch.cuda.Stream.wait_event).bind(object(), object())
    inspect.signature(torch.cuda.Stream.wait_stream).bind(object(), object())
    inspect.signature(torch.cuda.Stream.record_event).bind(object())
    inspect.signature(torch.accelerator.device_index).bind(0)
    inspect.signature(torch.cuda.get_device_properties).bind(torch.device("cuda", 0))
    inspect.signature(torch.cuda.get_device_capability).bind(torch.device("cuda", 0))
    inspect.signature(torch.cuda.is_current_stream_capturing).bind()
