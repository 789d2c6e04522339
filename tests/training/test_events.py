"""TensorBoard's event files of a training, read back with TensorBoard."""

from __future__ import annotations

import pytest

import train
from utils import errors
from utils.errors import UserError


def entry(epoch: int, steps: int, auroc: float) -> dict:
    scores = {"image_auroc": {"mean": auroc}, "pixel_auroc": None}
    return {"epoch": epoch, "steps": steps, "lr": 0.1 if steps else None, **scores, "held_out": scores}


def test_losses_by_step_and_scores_by_epoch_also_after_a_resumption(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from training.curve import Events

    (tmp_path / "events.out.tfevents.1.of_an_earlier_run").write_bytes(b"x")
    history = [entry(0, 0, 0.5), entry(1, 2, 0.6)]
    events = Events(tmp_path, [])
    for one, losses in zip(history, ([], [-0.1, -0.2]), strict=True):
        events.add(one, losses)
    events.add(entry(2, 2, 0.9), [-9.0, -9.0])  # an epoch that the killed run did not save
    events.writer.close()
    resumed = Events(tmp_path, history)
    resumed.add(entry(2, 2, 0.7), [-0.3, -0.4])
    resumed.writer.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    values = {name: [(event.step, event.value) for event in found.Scalars(name)] for name in found.Tags()["scalars"]}
    assert set(values) == {"loss", "learning rate", "epoch", "image_auroc", "held out/image_auroc"}
    assert dict(values["loss"]) == pytest.approx({1: -0.1, 2: -0.2, 3: -0.3, 4: -0.4})
    assert dict(values["image_auroc"]) == pytest.approx({0: 0.5, 2: 0.6, 4: 0.7})


def test_without_tensorboard_one_sentence_and_only_if_it_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "find_spec", lambda name: None)
    flags = ["--obj", "ring", "--data_path", str(tmp_path / "no data"), "--save_dir", str(tmp_path)]
    with pytest.raises(UserError, match=r"^no package tensorboard: run pip install tensorboard$"):
        train.main([*flags, "--tensorboard"])
    with pytest.raises(UserError, match="no data folder"):
        train.main(flags)
