from __future__ import annotations

import torch

from repfusion_env.stream import ImageStream

CPU = torch.device("cpu")


def test_every_epoch_shows_each_image_once_in_another_order():
    stream = ImageStream(10, CPU, shuffle=True)
    ids = torch.cat([stream.take(count) for count in (3, 9, 1, 17)])  # three epochs, cut anywhere
    epochs = ids.view(3, 10)
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(10))
    assert not torch.equal(epochs[0], epochs[1])


def test_a_bank_is_shown_in_order_without_shuffling_however_many_lanes_there_are():
    stream = ImageStream(4, CPU, shuffle=False)
    assert stream.take(10).tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_order_depends_on_the_seed_alone_and_goes_on_from_its_state():
    stream, other = ImageStream(50, CPU, shuffle=True), ImageStream(50, CPU, shuffle=True)
    other.reset(1)
    assert not torch.equal(stream.take(50), other.take(50))
    stream.reset(1)
    stream.take(70)
    state = stream.state_dict()
    resumed = ImageStream(50, CPU, shuffle=True)
    resumed.load_state_dict(state)
    assert torch.equal(stream.take(120), resumed.take(120))


def test_taken_ids_do_not_change_when_the_stream_goes_on():
    stream = ImageStream(6, CPU, shuffle=True)
    first = stream.take(4)
    kept = first.clone()
    first += 100
    stream.reset(0)
    assert torch.equal(stream.take(4), kept)
