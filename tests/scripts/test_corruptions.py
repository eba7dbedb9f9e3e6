"""Each corruption does what the paper says."""

import hashlib
import io
import json

import numpy as np
import pytest
from conftest import load_script, photograph
from PIL import Image

from apm.choices import CORRUPTIONS, SEVERITIES

corruptions = load_script("misc_scripts/corruptions.py")
PARAMETERS = corruptions.PARAMETERS
SETS = ("cifar", "imagenet")
WITHOUT_CHANCE = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate"}
WITHOUT_CHANCE |= {"jpeg_compression"}
# Where the published parameters give up some of one thing for more of another from one severity to
# the next, so that only the last is sure to be further from the clean image than the first.
UNEVEN = {("glass_blur", "cifar"), ("glass_blur", "imagenet"), ("motion_blur", "cifar")}
UNEVEN |= {("snow", "imagenet"), ("frost", "cifar"), ("pixelate", "cifar")}


def texture(height: int = 70, width: int = 90) -> np.ndarray:
    """Bright needles on a dark ground, in place of a photograph of frost."""
    needles = np.random.default_rng(3).random((height, width, 1)) ** 2
    return (needles * (200, 220, 255)).astype(np.uint8)


def made(image, corruption, severity, parameters="imagenet", seed=0, textures=None) -> np.ndarray:
    return corruptions.corrupt(
        np.asarray(image),
        corruption,
        severity,
        np.random.default_rng(seed),
        parameters=parameters,
        frost_textures=[texture()] if textures is None else textures,
    )


def plain(value: int, side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), value, np.uint8)


def point(side: int = 65) -> np.ndarray:
    image = plain(0, side)
    image[side // 2, side // 2] = 255
    return image


def test_they_are_those_that_the_data_set_reads_with_five_severities_each():
    assert tuple(PARAMETERS) == CORRUPTIONS
    for sets in PARAMETERS.values():
        assert tuple(sets) == SETS and {len(levels) for levels in sets.values()} == {5}


@pytest.mark.parametrize("parameters", SETS)
@pytest.mark.parametrize("corruption", PARAMETERS)
def test_any_size_keeps_its_shape_and_is_decided_by_the_seed(corruption, parameters):
    for size in ((1, 1), (2, 9), (40, 23)):
        image = np.asarray(photograph(*size))
        before = image.copy()
        for severity in SEVERITIES:
            first, again, other = (
                made(image, corruption, severity, parameters, s) for s in (5, 5, 6)
            )
            assert first.shape == image.shape and first.dtype == np.uint8
            assert np.array_equal(first, again)
            if size == (40, 23):
                assert np.array_equal(first, other) == (corruption in WITHOUT_CHANCE)
        assert np.array_equal(image, before)


@pytest.mark.parametrize("parameters", SETS)
@pytest.mark.parametrize("corruption", [name for name in PARAMETERS if name != "elastic_transform"])
def test_severity_takes_images_further_from_the_clean_one(corruption, parameters):
    distances = np.zeros(5)
    for seed in range(6):
        image = np.asarray(photograph(48, 48, seed))
        for index, severity in enumerate(SEVERITIES):
            damaged = made(image, corruption, severity, parameters, seed)
            distances[index] += np.abs(damaged.astype(int) - image).mean()
    assert distances[4] > 1.2 * distances[0] > 0
    assert (np.diff(distances) > 0).all() or (corruption, parameters) in UNEVEN


@pytest.mark.parametrize("parameters", SETS)
def test_gaussian_noise_has_the_published_sigma(parameters):
    for severity, sigma in enumerate(PARAMETERS["gaussian_noise"][parameters], 1):
        noisy = made(plain(128, 150), "gaussian_noise", severity, parameters) / 255
        if sigma <= 0.12:  # hardly any value leaves [0, 1]
            assert noisy.std() == pytest.approx(sigma, rel=0.02)
        assert noisy.mean() == pytest.approx(0.5, abs=0.01)


def test_shot_noise_has_the_variance_of_counting():
    photons = PARAMETERS["shot_noise"]["cifar"][2]
    for value in (25, 100):
        noisy = made(plain(value, 150), "shot_noise", 3, "cifar") / 255
        assert noisy.mean() == pytest.approx(value / 255, rel=0.02)
        assert noisy.var() == pytest.approx(value / 255 / photons, rel=0.05)
    assert made(plain(0), "shot_noise", 5).max() == 0


def test_impulse_noise_turns_the_published_share_of_values_black_or_white():
    noisy = made(plain(100, 200), "impulse_noise", 5)
    assert np.mean(noisy == 0) == pytest.approx(0.27 / 2, rel=0.05)
    assert np.mean(noisy == 255) == pytest.approx(0.27 / 2, rel=0.05)
    assert set(np.unique(noisy)) == {0, 100, 255}
    hit = (noisy != 100).sum(axis=2)
    assert (hit == 1).any()  # a channel, not the pixel


def test_defocus_spreads_a_point_over_a_disc():
    disc = made(point(), "defocus_blur", 1)[..., 0]  # radius 3
    y, x = np.mgrid[-32:33, -32:33]
    inside = x**2 + y**2 <= 9
    assert (disc[inside] > 5).all() and (disc[x**2 + y**2 > 5**2] == 0).all()
    assert disc[inside].std() < 1
    assert np.array_equal(disc, disc.T) and np.array_equal(disc, disc[::-1])


def test_glass_moves_colours_by_the_published_reach():
    image = np.random.default_rng(1).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    moved = made(image, "glass_blur", 1, "cifar")  # a reach of 1; a blur of 0.05 px is none
    row, column = np.mgrid[2:29, 2:29]
    candidates = [image[row - up, column - left] for up in (0, 1) for left in (0, 1)]
    taken = np.stack([(moved[2:29, 2:29] == colours).all(axis=2) for colours in candidates])
    assert taken.any(axis=0).all()
    assert (taken.mean(axis=(1, 2)) > 0.2).all()  # each of the four about as often


def test_motion_smears_a_point_along_one_line_near_the_horizontal():
    angles = []
    for seed in range(12):
        streak = made(point(), "motion_blur", 2, seed=seed)[..., 0]
        places = np.argwhere(streak > 0) - 32
        _, lengths, axes = np.linalg.svd(places / np.sqrt(len(places)), full_matrices=False)
        assert lengths[0] > 4 and lengths[1] < 0.4
        angles.append(np.degrees(np.arctan(axes[0][0] / axes[0][1])))
    assert max(np.abs(angles)) < 47 and np.ptp(angles) > 30


def test_zoom_blurs_the_border_more_than_the_centre():
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = np.asarray(Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST))
    change = np.abs(made(image, "zoom_blur", 1).astype(int) - image).mean(axis=2)
    assert change[:16].mean() > 2 * change[40:56, 40:56].mean()


def test_zoom_smears_along_the_radius_and_not_across():
    y, x = np.mgrid[-40:40, -40:40] + 0.5
    radius, angle = np.hypot(y, x), np.arctan2(y, x)
    ring = (radius > 15) & (radius < 35)
    changes = []
    for pattern in (np.sin(8 * angle), np.sin(radius)):  # spokes, rings
        image = np.repeat((127 + 120 * pattern)[..., None], 3, axis=2).astype(np.uint8)
        changes.append(np.abs(made(image, "zoom_blur", 3).astype(int) - image)[ring].mean())
    assert changes[1] > 4 * changes[0]


@pytest.mark.parametrize("parameters", SETS)
def test_snow_only_brightens_and_washes_colours_out(parameters):
    image = np.asarray(photograph(64, 64))
    snowy = made(image, "snow", 5, parameters)
    assert (snowy >= image).all()
    assert snowy.mean() > image.mean() + 10
    assert np.ptp(snowy, axis=2).mean() < np.ptp(image, axis=2).mean()


@pytest.mark.parametrize("parameters", SETS)
def test_snow_whitens_the_dark_and_falls_with_its_mirror_image(parameters):
    snowy = made(plain(0), "snow", 1, parameters)
    image_weight = PARAMETERS["snow"][parameters][0][-1]
    assert snowy.min() == pytest.approx(255 * (1 - image_weight) / 2, abs=1)  # between the flakes
    assert snowy.max() > 3 * snowy.min() and np.array_equal(snowy, snowy[::-1, ::-1])


@pytest.mark.parametrize(
    ("parameters", "stride", "weight"), [("cifar", 5, 0.2), ("imagenet", 1, 0.4)]
)
def test_frost_adds_a_piece_of_the_texture(parameters, stride, weight):
    row, column = np.mgrid[:250, :250].astype(np.uint8)
    ramps = np.stack([row, column, np.full_like(row, 250)], axis=2)
    frosty = made(plain(0, 32), "frost", 1, parameters, textures=[ramps]) / weight
    assert np.allclose(np.diff(frosty[..., 0], axis=0).mean(), stride, rtol=0.1)
    assert np.allclose(np.diff(frosty[..., 1], axis=1).mean(), stride, rtol=0.1)
    assert np.ptp(frosty[..., 2]) == 0 and frosty[0, 0, 2] == pytest.approx(250, abs=3)


def test_frost_takes_every_texture_and_the_whole_of_each():
    textures = [np.full((40, 40, 3), value, np.uint8) for value in (50, 100, 200)]
    levels = {made(plain(0, 8), "frost", 1, seed=s, textures=textures)[0, 0, 0] for s in range(30)}
    assert levels == {20, 40, 80}
    ramp = np.repeat(np.arange(40, dtype=np.uint8)[None, :, None], 40, axis=0).repeat(3, axis=2) * 5
    starts = {made(plain(0, 38), "frost", 1, seed=s, textures=[ramp])[0, 0, 0] for s in range(30)}
    assert starts == {0, 2, 4}


@pytest.mark.parametrize("parameters", SETS)
def test_fog_takes_contrast_and_adds_a_smooth_cloud(parameters):
    image = np.asarray(photograph(64, 64))
    foggy = made(image, "fog", 5, parameters)
    assert foggy.max() <= image.max()
    assert foggy.std() < image.std()
    cloud = made(plain(128), "fog", 1, parameters).astype(int)[..., 0]
    assert np.ptp(cloud) > 5
    assert np.abs(np.diff(cloud, axis=1)).mean() < 0.1 * np.ptp(cloud)
    assert made(plain(0), "fog", 5, parameters).max() == 0


@pytest.mark.parametrize("parameters", SETS)
def test_brightness_raises_the_value_and_keeps_hue_and_saturation(parameters):
    image = np.random.default_rng(0).integers(10, 110, (20, 20, 3), dtype=np.uint8)
    for severity, added in enumerate(PARAMETERS["brightness"][parameters], 1):
        bright = made(image, "brightness", severity, parameters).astype(float)
        assert bright.mean() > image.mean()
        value, brighter = image.max(axis=2), bright.max(axis=2)
        assert np.allclose(brighter - value, 255 * added, atol=0.6)
        assert np.allclose(bright / brighter[..., None], image / value[..., None], atol=0.03)
        assert (made(plain(0), "brightness", severity, parameters) == round(255 * added)).all()


@pytest.mark.parametrize("parameters", SETS)
def test_contrast_keeps_the_mean_and_leaves_the_published_share(parameters):
    image = np.asarray(photograph(64, 64))
    for severity, remaining in enumerate(PARAMETERS["contrast"][parameters], 1):
        flat = made(image, "contrast", severity, parameters)
        assert np.allclose(flat.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=0.3)
        assert np.allclose(flat.std(axis=(0, 1)), remaining * image.std(axis=(0, 1)), atol=0.4)


def bend(severity: int) -> float:
    """How far an even ramp is from even after an elastic transform, in grey levels."""
    ramp = np.repeat(np.arange(0, 192, 2, dtype=np.uint8)[None, :, None], 96, axis=0).repeat(
        3, axis=2
    )
    moved = made(ramp, "elastic_transform", severity, "cifar")[16:-16, 16:-16, 0]
    row, column = np.mgrid[:64, :64].reshape(2, -1)
    plane = np.column_stack([row, column, np.ones_like(row)])
    values = moved.ravel().astype(float)
    fit = np.linalg.lstsq(plane, values, rcond=None)[0]
    return np.abs(plane @ fit - values).max()


def test_elastic_moves_are_affine_at_first_and_local_later():
    assert bend(1) < 1
    assert bend(5) > 3


def test_elastic_leaves_a_plain_image():
    for severity in SEVERITIES:
        assert (made(plain(77), "elastic_transform", severity) == 77).all()


def test_pixelate_makes_blocks_of_their_mean_colour():
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    blocky = made(image, "pixelate", 5)  # a quarter of the side
    blocks = blocky.reshape(8, 4, 12, 4, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    means = image.reshape(8, 4, 12, 4, 3).mean(axis=(1, 3))
    assert np.abs(blocks[:, 0, :, 0] - means).max() <= 1


@pytest.mark.parametrize("parameters", SETS)
def test_jpeg_is_that_of_pillow_at_the_published_quality(parameters):
    picture = photograph()
    for severity, quality in enumerate(PARAMETERS["jpeg_compression"][parameters], 1):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        expected = np.asarray(Image.open(file))
        assert np.array_equal(made(picture, "jpeg_compression", severity, parameters), expected)


def test_parameters_are_the_published_ones():
    """ImageNet-C and CIFAR-10-C are these numbers: whoever changes one looks it up."""
    content = json.dumps(PARAMETERS, sort_keys=True)
    digest = hashlib.sha256(content.encode()).hexdigest()
    assert digest == "96353f0d104e9881ff8aeab52def243925fc3c3e1581be73f9ddd42b0a1e8ebe"
