"""Both kinds of mail between real ranks, in one launch."""

import functools
from typing import Any

import pytest
import torch
from ranks import run_ranks

from outgrow.parallel.mail import Mail, MailError, SharedMail
from outgrow.parallel.mesh import open_mesh
from outgrow.parallel.message_mail import MessageMail

LIKES = [torch.empty(3, 5), torch.empty(2, dtype=torch.int64), torch.empty(0, 4), torch.empty(4, dtype=torch.bfloat16)]


def content(number: int) -> list[torch.Tensor | None]:
    """What message `number` has: every third one lacks a tensor."""
    tensors = [
        torch.arange(15.0).view(3, 5) + number,
        torch.tensor([number, -number]),
        torch.empty(0, 4),
        torch.full((4,), number / 2, dtype=torch.bfloat16),
    ]
    return [None if number % 3 == 0 and place == 1 else tensor for place, tensor in enumerate(tensors)]


def is_content(found: list[torch.Tensor | None], number: int) -> bool:
    pairs = zip(found, content(number), strict=True)
    return all((a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)) for a, b in pairs)


def talk(mail: Mail, rank: int) -> dict[str, Any]:
    other = 1 - rank
    found: dict[str, Any] = {}
    for step in (1, 2):  # the second one uses the buffers of the first again
        mail.begin(step)
        for number in range(4):
            mail.send(other, ("SEND_F", 0, number), content(number + 10 * step + rank), LIKES)
        received = {
            number: mail.receive(other, ("SEND_F", 0, number), LIKES)
            for number in ((2, 0, 3, 1) if rank else (0, 1, 2, 3))
        }
        found[f"step {step}"] = [is_content(each, number + 10 * step + other) for number, each in received.items()]
        found[f"rows {step}"] = mail.exchange("NORM", [float(rank), step / 3]).tolist()
    mail.begin(3)
    changed = torch.ones(3, 5)
    mail.send(other, ("SEND_B", 1, 0), [changed], LIKES[:1])
    changed.fill_(7.0)  # its values were taken
    (value,) = mail.receive(other, ("SEND_B", 1, 0), LIKES[:1])
    assert value is not None
    found["taken"] = value.unique().tolist()
    mail.exchange("END", [1.0])  # nobody leaves before all have what was sent
    return found


def give_up(mail: Mail, rank: int) -> Any:
    """A step that fails on rank 0, what it had sent in it, and the next one."""
    mail.begin(4)
    if rank == 0:
        mail.send(1, ("SEND_F", 0, 0), content(1), LIKES)
        mail.fail("ValueError: no")
        said = ""
    else:
        with pytest.raises(MailError) as error:
            mail.receive(0, ("SEND_F", 0, 1), LIKES)
        said = str(error.value)
    mail.begin(5)
    mail.send(1 - rank, ("SEND_F", 0, 0), content(2), LIKES)
    fresh = is_content(mail.receive(1 - rank, ("SEND_F", 0, 0), LIKES), 2)
    mail.exchange("END", [1.0])  # nobody leaves before all have what was sent
    return said, fresh


def exchange(rank: int) -> dict[str, Any]:
    group = open_mesh(2).pipeline_group
    assert group is not None
    found: dict[str, Any] = {}
    shared, messages = SharedMail(group), MessageMail(group)
    try:
        found["shared"] = talk(shared, rank)
        found["failed"] = give_up(shared, rank)
        found["forgets"] = shared.forgets, messages.forgets
        found["messages"] = talk(messages, rank)
    finally:
        shared.close()
        shared.close()
        messages.close()
    return found


@functools.cache
def outcomes() -> list[dict[str, Any]]:
    return run_ranks(exchange, 2)


@pytest.mark.parametrize("kind", ["shared", "messages"])
def test_messages_are_found_by_their_keys_in_any_order(kind: str):
    for found in (each[kind] for each in outcomes()):
        for step in (1, 2):
            assert found[f"step {step}"] == [True] * 4
            assert found[f"rows {step}"] == [[0.0, step / 3], [1.0, step / 3]]
        assert found["taken"] == [1.0]


def test_a_step_that_was_given_up_leaves_nothing_behind():
    first, second = (each["failed"] for each in outcomes())
    assert first == ("", True)
    assert "rank 0 of the pipeline gave the step up: ValueError: no" in second[0]
    assert second[1]
    assert [each["forgets"] for each in outcomes()] == [(True, False)] * 2
