"""What stages are measured to cost."""

import pytest
import torch

from hf_ensemble.runs import StageCost
from hf_ensemble.runs.costs import measured_cost


class Device:
    """Memory of an accelerator, as torch counts it."""

    def __init__(self, patch, is_initialized=True):
        self.peak = 0
        patch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda: self.peak)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)

    def reset(self):
        self.peak = 0

    def use(self, amount):
        self.peak = max(self.peak, amount)


def test_each_measurement_has_its_own_peak(monkeypatch):
    device = Device(monkeypatch)
    device.use(900)
    with measured_cost() as outer:
        device.use(500)
        with measured_cost() as first:
            device.use(100)
        with pytest.raises(KeyboardInterrupt), measured_cost():
            device.use(300)
            raise KeyboardInterrupt
        with measured_cost() as second:
            device.use(200)
    with measured_cost() as after:
        device.use(50)
    peaks = [meter.cost.peak_memory for meter in (outer, first, second, after)]
    assert peaks == [500, 100, 200, 50] and outer.cost.memory_of == "device"


def test_without_an_accelerator_in_use_memory_is_the_processs(monkeypatch):
    device = Device(monkeypatch, is_initialized=False)
    device.use(7)
    with measured_cost() as meter:
        pass
    assert meter.cost.memory_of == "process" and meter.cost.peak_memory > 2**20 and device.peak == 7
    # One that was initialised and that nothing is on.
    Device(monkeypatch)
    with measured_cost() as meter:
        pass
    assert meter.cost.memory_of == "process" and meter.cost.peak_memory > 2**20


def test_costs_add_up_but_for_the_peak():
    total = StageCost(1.0, 2.0, 3, 4, 50) + StageCost(10.0, 20.0, 30, 40, 5, "device")
    assert total == StageCost(11.0, 22.0, 33, 44, 50, "device")
