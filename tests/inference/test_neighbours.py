from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import records

from artifacts import neighbours as files
from artifacts.features import Features
from artifacts.images import Pixels
from artifacts.layout import Split
from artifacts.manifest import Row
from artifacts.neighbours import FeatureNormaliser, NeighbourIndex
from artifacts.store import Digest
from errors import Corrupt
from inference.neighbours import nearest, sheet
from training.fitting.head_fit import Scaler

RANDOM = np.random.default_rng(2)


def rows(count: int) -> list[Row]:
    return [
        Row(f"{number}.png", records.digest(str(number)), (f"label {number % 2}",), None, None, Split.TRAIN)
        for number in range(count)
    ]


def keep(rows: list[Row], features: Features) -> NeighbourIndex:
    """Keep images as a run does."""
    scaler = Scaler.fit(features, np.arange(len(features)))
    directions = FeatureNormaliser(scaler.mean.astype(np.float32), scaler.scale.astype(np.float32))
    return files.build_index(rows, features, directions)


def by_hand(features: Features, wanted: Features) -> list[int]:
    """Return rows by the cosine to one, of features standardised as everywhere: the mean off, over the deviation."""
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    standard, other = (features - mean) / deviation, (wanted - mean) / deviation
    cosine = standard @ other / (np.linalg.norm(standard, axis=1) * np.linalg.norm(other))
    return [int(row) for row in np.argsort(-cosine)]


def test_the_nearest_by_the_cosine_of_standardised_features_come_first() -> None:
    scales = 10.0 ** RANDOM.integers(-6, 4, 12)  # as of backbones, whose channels differ that much
    features = (RANDOM.normal(3, 1, (20_000, 12)) * scales).astype(np.float32)
    wanted = (RANDOM.normal(3, 1, 12) * scales).astype(np.float32)
    kept = files.load(keep(rows(len(features)), features).dump())
    [found] = nearest(kept, wanted[None])
    assert [one.training_image.path for one in found] == [f"{row}.png" for row in by_hand(features, wanted)[:3]]
    assert 1 >= found[0].similarity >= found[1].similarity >= found[2].similarity > 0.5
    [itself, other] = nearest(kept, features[[77, 78]], count=1)
    assert itself[0].training_image == kept.images[77] and other[0].training_image == kept.images[78]
    assert itself[0].similarity == pytest.approx(1, abs=1e-3)
    assert itself[0].training_image.labels == ("label 1",)


def test_few_images_and_channels_that_never_change_are_no_trouble() -> None:
    features = np.array([[1, 5], [2, 5]], np.float32)
    [found] = nearest(keep(rows(2), features), np.array([[3, 5]], np.float32))
    assert [(one.training_image.path, round(one.similarity)) for one in found] == [("1.png", 1), ("0.png", -1)]
    [alone] = nearest(keep(rows(1), features[:1]), features[1:])
    assert [one.similarity for one in alone] == [0.0]


def test_a_file_that_is_there_twice_is_shown_once_and_nothing_is_nearer_than_itself() -> None:
    features = RANDOM.normal(size=(40, 6)).astype(np.float32)
    twice = rows(40)
    twice[5] = replace(twice[4], path="again.png")
    features[5] = features[4]
    [found] = nearest(keep(twice, features), features[4:5])
    assert len({one.training_image.image for one in found}) == 3 and found[0].training_image.image == twice[4].sha256
    assert found[0].similarity <= 1


def test_of_very_many_images_an_even_sample_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MOST_BYTES", 2 * 4 * 10)
    features = RANDOM.normal(size=(100, 4)).astype(np.float32)
    kept = keep(rows(100), features)
    assert [one.path for one in kept.images] == [f"{row}.png" for row in range(0, 100, 11)]
    assert kept.vectors.shape == (10, 4)
    assert kept.normaliser.mean == pytest.approx(features.mean(axis=0), rel=1e-5)


def test_a_harmed_file_is_told() -> None:
    data = keep(rows(3), RANDOM.normal(size=(3, 4)).astype(np.float32)).dump()
    with pytest.raises(Corrupt, match="cannot be read"):
        files.load(data[:-1])
    with pytest.raises(Corrupt, match="cannot be read"):
        files.load(b"not a file at all")


def test_the_picture_shows_the_image_then_its_neighbours_and_grey_for_one_that_is_gone() -> None:
    kept = keep(rows(3), np.array([[1, 0], [0, 1], [-1, -1]], np.float32))
    [found] = nearest(kept, np.array([[1, 0]], np.float32))
    colours = {found[0].training_image.image: (0, 255, 0), found[2].training_image.image: (0, 0, 255)}

    def read(image: Digest) -> Pixels | None:
        colour = colours.get(image)
        return None if colour is None else np.full((8, 8, 3), colour, np.uint8)

    picture = np.asarray(sheet(np.full((8, 8, 3), (255, 0, 0), np.uint8), found, read))
    middles = [tuple(picture[90, 90 + place * 196]) for place in range(4)]
    assert middles == [(255, 0, 0), (0, 255, 0), (128, 128, 128), (0, 0, 255)]
