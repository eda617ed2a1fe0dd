import hashlib
from pathlib import Path

import numpy as np
import pytest
from breakhis.data.field import FIELD_SIZE, draw_field
from breakhis.data.naming import find_breakhis
from breakhis.data.records import patients
from breakhis.data.sources import BENIGN, BREAKHIS
from breakhis.data.synthetic import draw_tree
from breakhis.data.tissue import Stain
from PIL import Image

SUBTYPES, MAGNIFICATIONS = BREAKHIS.classes["subtype"], BREAKHIS.magnifications
TYPICAL = Stain(haematoxylin=1.0, eosin=1.0, hue=0.0, white=(240, 242, 240), growth=1.0)


def digests(root: Path) -> dict[str, str]:
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in root.rglob("*.png")}


def nuclei(subtype: str, magnification: str, seed: int) -> np.ndarray:
    """Find the dark purple pixels of a field in the typical stain, (height, width)."""
    field = draw_field(subtype, magnification, TYPICAL, np.random.default_rng(seed))
    return np.asarray(field)[..., 0] < 130


@pytest.mark.slow
def test_the_seed_decides_every_byte(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert draw_tree(tmp_path / name, seed, ("400X",), patients_per_subtype=1, images_per_patient=1) == 8
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == b
    assert a.keys() == c.keys()
    assert all(a[name] != c[name] for name in a)
    assert len(set(a.values())) == 8
    for path in (tmp_path / "a").rglob("*.png"):
        with Image.open(path) as picture:
            assert (picture.size, picture.mode) == (FIELD_SIZE, "RGB")


def test_the_reader_of_the_real_data_reads_the_tree(synthetic_tree):
    records = find_breakhis(synthetic_tree).records
    assert len(records) == 48
    assert {record.labels["subtype"] for record in records} == set(SUBTYPES)
    assert len(patients(records)) == 24
    assert {record.magnification for record in records} == {"100X"}
    path = records[0].path
    assert path.relative_to(synthetic_tree).parts[:5] == ("BreaKHis_v1", "histology_slides", "breast", "benign", "SOB")
    with Image.open(path) as picture:  # half of a field, see `synthetic_tree`
        assert (picture.size, picture.mode) == (tuple(side // 2 for side in FIELD_SIZE), "RGB")


def test_one_magnification_is_a_part_of_the_full_tree(tmp_path, monkeypatch):
    def draw_noise(subtype, magnification, stain, rng):
        return Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))

    monkeypatch.setattr("breakhis.data.synthetic.draw_field", draw_noise)  # quick, and shows the random state
    assert draw_tree(tmp_path / "full", 0, patients_per_subtype=1, images_per_patient=1) == 8 * len(MAGNIFICATIONS)
    draw_tree(tmp_path / "part", 0, ("40X",), patients_per_subtype=1, images_per_patient=1)
    full, part = digests(tmp_path / "full"), digests(tmp_path / "part")
    assert part == {name: digest for name, digest in full.items() if "-40-" in name}
    assert len(set(full.values())) == len(full)


@pytest.mark.slow
def test_malignant_nuclei_cover_more_of_the_field():
    cover = {kind: np.mean([nuclei(kind, "100X", seed).mean() for seed in range(3)]) for kind in SUBTYPES}
    benign = [cover[kind] for kind in BENIGN]
    malignant = [cover[kind] for kind in SUBTYPES if kind not in BENIGN]
    assert min(malignant) > max(benign)
    assert np.mean(malignant) > 2 * np.mean(benign)


@pytest.mark.parametrize("subtype", ["F", "DC"])
def test_magnification_sets_the_size_of_a_nucleus(subtype):
    def mean_run(magnification: str) -> float:
        """Measure the mean length of a horizontal run of nuclear pixels, px."""
        dark = np.pad(nuclei(subtype, magnification, 0), ((0, 0), (1, 1))).astype(int)
        starts = (np.diff(dark, axis=1) == 1).sum()
        return dark.sum() / starts

    runs = [mean_run(magnification) for magnification in MAGNIFICATIONS]
    assert runs == sorted(runs)
    assert runs[-1] > 2 * runs[0]


def test_a_patient_has_one_stain(synthetic_tree):
    by_patient = {}
    for record in find_breakhis(synthetic_tree).records:
        if record.labels["subtype"] == "F":
            colour = np.asarray(Image.open(record.path), dtype=float).mean(axis=(0, 1))
            by_patient.setdefault(record.patient_id, []).append(colour)
    within = np.mean([np.ptp(rows, axis=0).mean() for rows in by_patient.values()])
    between = np.ptp([np.mean(rows, axis=0) for rows in by_patient.values()], axis=0).mean()
    assert between > 2 * within
