from __future__ import annotations

import re

import pytest
import torch

from repfusion_env.data import ImageBank


def bank(count: int = 4, classes: tuple[str, ...] = ("a", "b")) -> ImageBank:
    images = torch.arange(count * 3 * 2 * 2).reshape(count, 3, 2, 2).to(torch.uint8)
    return ImageBank("toy", images, torch.arange(count) % 2, classes)


def test_it_knows_its_length_and_shape():
    assert len(bank(5)) == 5
    assert bank().shape == (3, 2, 2)


def test_pixels_reach_from_minus_one_to_one_in_the_order_of_the_ids():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1, 1)
    values = ImageBank("toy", images, torch.zeros(3).long(), ("a",)).pixels(torch.tensor([2, 0, 1]))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.flatten(), torch.tensor([1.0, -1.0, -0.6]))


def test_head_keeps_the_first_images_and_their_labels():
    short = bank(6).head(3)
    assert torch.equal(short.images, bank(6).images[:3])
    assert short.labels.tolist() == [0, 1, 0]
    assert len(bank(6).head(100)) == 6


def test_the_fingerprint_tells_contents_apart_and_nothing_else():
    same = ImageBank("other name", bank().images.clone(), bank().labels, ("a", "b"))
    assert bank().fingerprint == same.fingerprint == bank().to("cpu").fingerprint
    pixel = bank().images.clone()
    pixel[3, 2, 1, 1] += 1
    changed = [
        ImageBank("toy", pixel, bank().labels, ("a", "b")),
        ImageBank("toy", bank().images, 1 - bank().labels, ("a", "b")),
        ImageBank("toy", bank().images, bank().labels, ("a", "c")),
        ImageBank("toy", bank().images.reshape(4, 3, 1, 4), bank().labels, ("a", "b")),
    ]
    assert len({bank().fingerprint, *(other.fingerprint for other in changed)}) == 5


GOOD = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("images", "labels", "kind", "sentence"),
    [
        (
            GOOD.float(),
            LABELS,
            TypeError,
            "images must be uint8 of shape (M, C, H, W), not float32",
        ),
        (GOOD[0], LABELS, TypeError, "not uint8 (1, 4, 4)"),
        (GOOD, LABELS.float(), TypeError, "labels must be int64 of shape (M,), not float32 (2,)"),
        (GOOD, LABELS[:, None], TypeError, "not int64 (2, 1)"),
        (GOOD[:0], LABELS[:0], ValueError, "data set 'toy' is empty"),
        (GOOD, LABELS[:1], ValueError, "has 2 images but 1 labels"),
        (GOOD, LABELS + 1, ValueError, "labels must be in 0..1 (2 classes), but they reach"),
        (GOOD, LABELS - 1, ValueError, "from -1 to 0"),
    ],
)
def test_wrong_content_is_refused_in_one_sentence(images, labels, kind, sentence):
    with pytest.raises(kind, match=re.escape(sentence)) as caught:
        ImageBank("toy", images, labels, ("a", "b"))
    assert "\n" not in str(caught.value)
