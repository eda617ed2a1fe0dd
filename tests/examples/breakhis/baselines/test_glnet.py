import pytest
import torch
from torch import Tensor, nn

from tests.support.baselines import make_small, neutralise_norms, set_weights


def one_unit() -> nn.Module:
    """Make a network whose two vectors have one number, which depends on channel 0 alone."""
    model = make_small("glnet", hidden=1, num_classes=1)
    neutralise_norms(model)
    first = [1.0] + [0.0] * 95
    set_weights(model.global_branch[0], [first])
    set_weights(model.local_branch[0], [[[[value]] for value in first]])
    set_weights(model.fc, [[1.0, 10.0]], 0.5)
    return model


def make_map(height: int, width: int) -> Tensor:
    return torch.zeros(1, 96, height, width)


def test_the_vectors_by_hand():
    """Regions of 6 x 8 positions are 2 x 2. The largest value, 8, shares its region with three zeros: its mean is 2.

    Another region is 3 everywhere. The mean of the map is (8 + 4 * 3) / 48.
    """
    model, x = one_unit(), make_map(6, 8)
    x[0, 0, 0, 0] = 8
    x[0, 0, 2:4, 6:8] = 3
    assert model.describe(x).tolist() == [[pytest.approx(20 / 48), 3]]
    assert model.forward_head(x).item() == pytest.approx(20 / 48 + 10 * 3 + 0.5)


def test_both_vectors_are_cut_off_below_zero():
    model, x = one_unit(), make_map(3, 4)
    x[0, 0, 1] = -5
    assert model.describe(x).tolist() == [[0, 0]]
    x[0, 0, 2, 2] = 7
    assert model.describe(x).tolist() == [[0, 7]]


@pytest.mark.parametrize("place", [(0, 0), (0, 3), (2, 0), (2, 3), (1, 2)])
def test_there_are_three_rows_of_four_regions(place):
    """A map of 9 x 16 positions has regions of 3 x 4; a block that fills one region has its mean there."""
    model, x = one_unit(), make_map(9, 16)
    row, column = place
    x[0, 0, 3 * row : 3 * row + 3, 4 * column : 4 * column + 4] = 2
    assert model.describe(x)[0, 1].item() == pytest.approx(2)
    moved = x.roll((1, 2), (2, 3))  # so it meets several regions
    assert model.describe(moved)[0, 1].item() == pytest.approx(2 * 2 / 3 * 2 / 4)


def test_tiles_are_parts_of_the_enlarged_image():
    model = make_small("glnet-tiles")
    image = torch.randn(1, 3, 64, 64).repeat_interleave(3, 2).repeat_interleave(4, 3)  # scaled by 3 and 4
    maps = model.tile_maps(image)
    whole = torch.nn.functional.interpolate(image, (3 * 192, 4 * 256), mode="bilinear")
    height, width = maps.shape[2] // 3, maps.shape[3] // 4
    for row, column in [(0, 0), (1, 2), (2, 3)]:
        tile = whole[:, :, 192 * row : 192 * row + 192, 256 * column : 256 * column + 256]
        expected = model.trunk.forward_features(tile)
        assert expected.shape == (1, 96, height, width)
        part = maps[:, :, height * row : height * row + height, width * column : width * column + width]
        torch.testing.assert_close(part, expected)


def test_with_tiles_only_the_regions_differ():
    model, images = make_small("glnet-tiles"), torch.randn(2, 3, 64, 64)
    plain = make_small("glnet")
    plain.load_state_dict(model.state_dict())
    tiled = model.forward_head(model.forward_features(images), True, model.tile_maps(images))
    features = plain.forward_head(plain.forward_features(images), pre_logits=True)
    assert torch.equal(tiled[:, :8], features[:, :8])
    assert (tiled[:, 8:] - features[:, 8:]).abs().max() > 1e-4
    torch.testing.assert_close(model(images), model.fc(tiled))


def test_tiles_of_the_images_of_a_batch_do_not_mix():
    model, images = make_small("glnet-tiles"), torch.randn(3, 3, 40, 48)
    maps = model.tile_maps(images)
    assert maps.shape == (3, 96, 6, 8)
    torch.testing.assert_close(model.tile_maps(images[1:2]), maps[1:2])


def test_regions_are_given_with_tiles_alone():
    x = make_map(2, 2)
    with pytest.raises(ValueError, match="regions must be given with tiles='image' alone, got None with 'image'"):
        make_small("glnet-tiles").forward_head(x)
    with pytest.raises(ValueError, match="regions must be given with tiles='image' alone, got a map with 'map'"):
        make_small("glnet").forward_head(x, regions=x)


def test_channels_of_the_local_map_are_dropped_whole():
    model, x = make_small("glnet", region_drop_rate=0.5).train(), torch.randn(4, 96, 3, 4)
    dropped = nn.Sequential(*model.local_branch[:4])(x)
    empty = (dropped == 0).all((2, 3)).float().mean().item()
    assert 0.2 < empty < 0.8
    assert model.global_branch[3].p == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"tiles": "grid"}, "tiles must be one of 'map', 'image', got 'grid'"),
        ({"region_drop_rate": -1}, "region_drop_rate must be a number from 0 to below 1, got -1"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_small("glnet", **arguments)
