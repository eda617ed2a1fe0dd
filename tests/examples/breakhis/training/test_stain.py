import numpy as np
import torch
from breakhis.training.stain import StainJitter
from PIL import Image
from skimage.color import rgb2hed


def test_stain_jitter_changes_stains_and_keeps_the_glass_clear():
    stained = Image.new("RGB", (4, 4), (150, 90, 160))
    purple = []
    for seed in range(30):
        torch.manual_seed(seed)
        changed = np.asarray(StainJitter(0.2)(stained))
        assert changed.dtype == np.uint8
        purple.append(rgb2hed(changed)[0, 0, 0])
        torch.manual_seed(seed)
        assert np.array_equal(changed, np.asarray(StainJitter(0.2)(stained)))
        torch.manual_seed(seed)
        glass = np.asarray(StainJitter(0.2)(Image.new("RGB", (4, 4), (255, 255, 255))))
        assert glass.min() > 215
    before = rgb2hed(np.asarray(stained))[0, 0, 0]
    assert min(purple) < 0.9 * before < 1.1 * before < max(purple)
    unchanged = np.asarray(StainJitter(0)(stained)).astype(int) - np.asarray(stained)
    assert abs(unchanged).max() <= 1
