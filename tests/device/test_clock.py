"""The stage clock on CUDA, with events that finish when the test says so; and the same limits on a real device."""

from __future__ import annotations

import pytest
import torch

from models.regad import RegAD
from tests.device.pretend import Event
from training.loop import Trainer
from utils.stages import StageClock


class Slow(Event):
    """An event that finishes when the host waits for it."""

    finished = False
    waits = 0

    def query(self) -> bool:
        """Whether the device has done all work before the event."""
        return Slow.finished

    def synchronize(self) -> None:
        """Waits for the event."""
        Slow.finished, Slow.waits = True, Slow.waits + 1


def test_the_clock_waits_only_when_it_is_read(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Slow)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("the host waits"))
    clock = StageClock(torch.device("cuda"))
    for _ in range(3):
        with clock("network"):
            pass
    with clock.on_host()("decode"):
        pass
    assert Slow.waits == 0
    seconds = clock.seconds
    assert seconds["network"] == pytest.approx(0.003) and seconds["decode"] < 1 and Slow.waits == 1
    with clock("network"):  # finished at once: collected without waiting
        pass
    assert not clock._under_way and Slow.waits == 1


@pytest.mark.cuda
def test_a_training_step_on_cuda_waits_for_nothing():
    """PyTorch reports waits of the backward pass too, which the rehearsal cannot run."""
    trainer = Trainer(RegAD("rotation_scale", 64).cuda(), 0.01, 0.9)
    images = torch.rand(4, 3, 64, 64, device="cuda")
    for mode in ("default", "error"):  # the first step allocates
        torch.cuda.set_sync_debug_mode(mode)
        trainer.step(images, images[:, None], StageClock())
    torch.cuda.set_sync_debug_mode("default")
