"""Draw one microscope field that looks like breast tissue stained with haematoxylin and eosin.

The drawing follows the physics of a stained slide: each pixel holds an amount of haematoxylin (nuclei, purple) and of
eosin (cytoplasm and stroma, pink), and both absorb light exponentially (Beer-Lambert).
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from breakhis.data.tissue import TISSUES, Stain, Tissue

FIELD_SIZE = (350, 230)  # px, width and height: half of BreakHis' 700 x 460
PIXELS_PER_UM_AT_100X = 0.7  # px/um in a drawn field, so that a nucleus of 7 um spans 5 px at 100X
SUPERSAMPLING = 2  # shapes are drawn at twice the size and averaged down: smooth edges without an antialiasing library

HAEMATOXYLIN = np.array([0.58, 0.72, 0.28])  # absorbance per unit of stain in R, G, B
EOSIN = np.array([0.10, 0.76, 0.28])

Array = NDArray[np.float64]


def draw_field(subtype: str, magnification: str, stain: Stain, rng: np.random.Generator) -> Image.Image:
    """Draw one field.

    Args:
        subtype: A, F, PT, TA, DC, LC, MC or PC.
        magnification: "40X", "100X", "200X" or "400X".
        stain: The patient's stain.
        rng: Source of all random numbers; the same state gives the same image.

    Returns:
        An RGB image of `FIELD_SIZE`.
    """
    field = _Field(TISSUES[subtype], int(magnification.removesuffix("X")), stain.growth, rng)
    {
        "glands": field.add_glands,
        "nests": field.add_nests,
        "files": field.add_files,
        "islands": field.add_islands,
        "ribbons": field.add_ribbons,
    }[field.tissue.pattern]()
    field.add_stroma_cells()
    field.add_vacuoles()
    return field.develop(stain)


def _rotation(angle: float) -> Array:
    """Return the 2 x 2 matrix that turns row vectors by `angle` radians."""
    return np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


class _Field:
    """A field under construction: layers of stain amounts on a supersampled canvas, and the shapes drawn on them."""

    def __init__(self, tissue: Tissue, magnification: int, growth: float, rng: np.random.Generator) -> None:
        self.tissue, self.growth, self.rng = tissue, growth, rng
        self.scale = PIXELS_PER_UM_AT_100X * magnification / 100 * SUPERSAMPLING  # canvas px per um
        self.width, self.height = (SUPERSAMPLING * side for side in FIELD_SIZE)
        self.nuclei, self.epithelium, self.lumen = (Image.new("L", (self.width, self.height)) for _ in range(3))
        self._lay_fibres()

    def _noise(self, length: float) -> Array:
        """Draw smooth noise, (height, width), with variance 1 and a mean near 0, that varies over `length` um."""
        step = max(length * self.scale, 1.0)
        grid = self.rng.standard_normal((int(self.height / step) + 3, int(self.width / step) + 3))
        # Crop at a random place, else the nodes of the grid would be at the same pixels in each field.
        left, top = self.rng.uniform(0, 1, 2)
        box = (left, top, left + self.width / step, top + self.height / step)
        image = Image.fromarray(grid.astype(np.float32)).resize(
            (self.width, self.height), Image.Resampling.BICUBIC, box
        )
        return np.asarray(image, dtype=np.float64) / 0.65  # interpolation reduces the standard deviation to this

    def _lay_fibres(self) -> None:
        """Draw collagen: irregular bands along a slowly bending direction; `self.angle` is the direction in radians."""
        y, x = np.mgrid[: self.height, : self.width] / self.scale
        direction = self.rng.uniform(0, np.pi)
        across = y * np.cos(direction) - x * np.sin(direction) + 22 * self._noise(110) + 3.5 * self._noise(24)
        gradient_y, gradient_x = np.gradient(across)
        self.angle = np.arctan2(-gradient_x, gradient_y)
        self.fibres = np.zeros_like(across)
        for thickness, weight in ((9.0, 0.6), (3.5, 0.45)):
            profile = self.rng.standard_normal(4096)
            position = (across + 1.2 * self._noise(30)) / thickness
            self.fibres += weight * np.interp(position % 4095, np.arange(4096), profile)
        self.fibres += 0.35 * self._noise(6)

    def _lattice(self, spacing: float, disorder: float) -> Array:
        """Return the points (n, 2) of a hexagonal lattice, in canvas px, each off by up to `disorder` spacings (um)."""
        step = spacing * self.scale
        reach = int(np.hypot(self.width, self.height) / 2 / (step * 0.866)) + 2
        row, column = (grid.ravel() for grid in np.mgrid[-reach : reach + 1, -reach : reach + 1])
        points = np.stack([column + 0.5 * (row % 2), row * 0.866], axis=1) + self.rng.uniform(0, 1, 2)
        points += self.rng.uniform(-disorder, disorder, points.shape)
        points = step * points @ _rotation(self.rng.uniform(0, np.pi)) + (self.width / 2, self.height / 2)
        margin = 2 * step  # a gland whose centre lies outside can reach into the field
        return points[np.all((points > -margin) & (points < margin + np.array([self.width, self.height])), axis=1)]

    def _inside(self, points: Array) -> Array:
        """Return the points that lie on the canvas."""
        x, y = points.T
        return points[(x >= 0) & (y >= 0) & (x < self.width) & (y < self.height)]

    def _at(self, layer: NDArray, points: Array) -> NDArray:
        """Return the values of a (height, width) layer at the points."""
        return layer[points[:, 1].astype(int), points[:, 0].astype(int)]

    def _draw_nuclei(self, points: Array, diameter: float, aspect: float, angles: Array) -> None:
        """Draw ellipses with a dark rim and a paler inside; `diameter` in um, `angles` in radians."""
        n = len(points)
        size = diameter * self.growth * self.scale * np.exp(self.tissue.pleomorphism * self.rng.standard_normal(n))
        stretch = np.sqrt(aspect * np.exp(0.12 * self.rng.standard_normal(n)))
        shade = (self.tissue.chromatin * self.rng.uniform(120, 180, n)).astype(int)
        paleness = self.rng.uniform(0.55, 1.0, n)
        turn = np.linspace(0, 2 * np.pi, 14, endpoint=False)
        along, across = np.cos(turn) * (size * stretch / 2)[:, None], np.sin(turn) * (size / stretch / 2)[:, None]
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        outline = np.stack([along * cos - across * sin, along * sin + across * cos], axis=2)
        draw = ImageDraw.Draw(self.nuclei)
        shows_chromatin = diameter * self.scale > 12  # px; below that the rim is thinner than a pixel
        for centre, ring, dark, pale in zip(points, outline, shade, paleness, strict=True):
            draw.polygon([tuple(p) for p in ring + centre], fill=int(dark))
            if shows_chromatin:
                draw.polygon([tuple(p) for p in 0.74 * ring + centre], fill=int(dark * pale))
                draw.polygon([tuple(p) for p in 0.22 * ring + 0.25 * ring[3] + centre], fill=int(dark))

    def _fill_with_cells(self, mask: NDArray[np.bool_]) -> None:
        """Fill a (height, width) mask with epithelial cells: cytoplasm, and nuclei at the tissue's crowding."""
        tissue = self.tissue
        self.epithelium.paste(190, mask=Image.fromarray(mask))
        points = self._inside(self._lattice(tissue.crowding * tissue.nucleus, tissue.disorder))
        points = points[self._at(mask, points)]
        self._draw_nuclei(points, tissue.nucleus, 1.2, self.rng.uniform(0, np.pi, len(points)))

    def add_glands(self) -> None:
        """Draw ducts: an open lumen inside a ring of cells."""
        tissue, um = self.tissue, self.scale
        epithelium, lumen = ImageDraw.Draw(self.epithelium), ImageDraw.Draw(self.lumen)
        turn = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        for centre in self._lattice(tissue.spacing, tissue.disorder):
            radius = tissue.feature * self.rng.uniform(0.75, 1.2)
            aspect = 1 + (tissue.aspect - 1) * self.rng.uniform(0.5, 1.4)
            wobble = 1 + sum(
                0.09 / k * self.rng.standard_normal() * np.cos(k * turn + self.rng.uniform(0, 6)) for k in (2, 3, 5)
            )
            shape = np.stack([np.cos(turn) * np.sqrt(aspect), np.sin(turn) / np.sqrt(aspect)], axis=1)
            shape *= radius * wobble[:, None]
            # Bend long ducts, as they bend around stroma.
            shape[:, 1] += 0.28 * (aspect - 1) * (shape[:, 0] / (radius * np.sqrt(aspect))) ** 2 * radius / aspect
            shape = shape @ _rotation(self.rng.uniform(0, np.pi))
            height = 1.5 * tissue.nucleus / radius * np.sqrt(aspect)  # the cells' height as a share of the radius
            opening = max(1 - height, 0.12) * self.rng.uniform(0.75, 1.05)
            epithelium.polygon([tuple(p) for p in centre + um * shape], fill=200)
            lumen.polygon([tuple(p) for p in centre + um * opening * shape], fill=255)
            self._ring_of_nuclei(centre, shape * (1 + opening) / 2)

    def _ring_of_nuclei(self, centre: Array, ring: Array) -> None:
        """Draw nuclei along a closed curve (n, 2) in um around a centre in canvas px, at the tissue's crowding."""
        closed = np.vstack([ring, ring[:1]])
        length = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(closed, axis=0), axis=1))])
        count = max(int(length[-1] / (self.tissue.crowding * self.tissue.nucleus * 0.85)), 3)
        stops = np.linspace(0, length[-1], count, endpoint=False)
        points = np.stack([np.interp(stops, length, closed[:, i]) for i in (0, 1)], axis=1)
        points += 0.12 * self.tissue.nucleus * self.rng.standard_normal(points.shape)
        outward = np.arctan2(points[:, 1], points[:, 0])
        self._draw_nuclei(centre + self.scale * points, self.tissue.nucleus, 1.35, outward)

    def add_nests(self) -> None:
        """Draw solid nests of any shape, with a few ragged holes."""
        terrain = self._noise(self.tissue.feature) + 0.3 * self._noise(14)
        nests = terrain > np.quantile(terrain, 1 - self.tissue.coverage)
        holes = nests & (self._noise(26) > 2.1)
        self.lumen.paste(255, mask=Image.fromarray(holes))
        self._fill_with_cells(nests & ~holes)

    def add_files(self) -> None:
        """Draw single files: rows of cells, one after the other, along the fibres."""
        tissue = self.tissue
        for start in self._inside(self._lattice(tissue.feature, tissue.disorder)):
            point, row, headings = start, [], []
            for _ in range(int(self.rng.integers(3, 9))):
                heading = float(self._at(self.angle, point[None])[0])
                row.append(point + 0.15 * tissue.nucleus * self.scale * self.rng.standard_normal(2))
                headings.append(heading)
                step = tissue.crowding * tissue.nucleus * self.scale
                point = point + step * np.array([np.cos(heading), np.sin(heading)])
                if not len(self._inside(point[None])):
                    break
            self._draw_nuclei(np.array(row), tissue.nucleus, 1.15, np.array(headings))

    def add_islands(self) -> None:
        """Draw islands of cells that float in lakes of pale mucin."""
        lake = self._noise(120) > -0.75
        terrain = np.where(lake, self._noise(self.tissue.feature), -9.0)
        islands = terrain > np.quantile(terrain, 1 - self.tissue.coverage)
        self.lumen.paste(225, mask=Image.fromarray(lake & ~islands))
        self._fill_with_cells(islands)

    def add_ribbons(self) -> None:
        """Draw papillae: winding ribbons of cells with stroma on one side and open space on the other."""
        terrain = self._noise(self.tissue.feature) + 0.12 * self._noise(15)
        low, high = np.quantile(terrain, [0.5 - self.tissue.coverage / 2, 0.5 + self.tissue.coverage / 2])
        self.lumen.paste(255, mask=Image.fromarray(terrain > high))
        self._fill_with_cells((terrain >= low) & (terrain <= high))

    def add_stroma_cells(self) -> None:
        """Draw spindle nuclei along the fibres, outside of cells and lumina."""
        tissue = self.tissue
        taken = (np.asarray(self.epithelium) > 0) | (np.asarray(self.lumen) > 0)
        points = self._inside(self._lattice(tissue.stroma_spacing, 0.45))
        points = points[~self._at(taken, points)]
        angles = self._at(self.angle, points) + 0.2 * self.rng.standard_normal(len(points))
        self._draw_nuclei(points, 6.0, tissue.spindle, angles)

    def add_vacuoles(self) -> None:
        """Draw a few round white vacuoles in clusters, in any tissue."""
        lumen, nuclei = ImageDraw.Draw(self.lumen), ImageDraw.Draw(self.nuclei)
        for centre in self._inside(self._lattice(230, 0.45)):
            for _ in range(int(self.rng.integers(0, 4))):
                x, y = centre + self.scale * self.rng.normal(0, 22, 2)
                radius = self.scale * self.rng.uniform(4, 13)
                box = (x - radius, y - radius, x + radius, y + radius)
                lumen.ellipse(box, fill=255)
                nuclei.ellipse(box, fill=0)

    def develop(self, stain: Stain) -> Image.Image:
        """Compute the image from the layers: absorbance of both stains, lamp, optics, sensor noise."""
        nuclei, cells, lumen = (
            np.asarray(layer, dtype=np.float64) / 255 for layer in (self.nuclei, self.epithelium, self.lumen)
        )
        solid = 1 - lumen
        grain = 1 + 0.16 * self._noise(2.2)
        stroma = np.clip(0.48 + 0.30 * self.fibres, 0.02, 1.15) * (1 - np.minimum(cells * 1.25, 1))
        # Nuclei that reach over the edge of a lumen become thinner there, but are not cut off.
        purple = (1.7 * nuclei * grain + 0.20 * cells + 0.08 * stroma) * np.maximum(solid, 0.5 * (nuclei > 0))
        pink = (stroma + 0.50 * cells * grain) * (1 - 0.5 * nuclei) * solid
        purple += 0.06 * lumen * (lumen < 0.95)  # mucin is faintly blue
        turn = stain.hue * np.array([-0.10, 0.03, 0.09])  # red absorbs less and blue more towards the red side
        absorbance = stain.haematoxylin * purple[..., None] * (HAEMATOXYLIN + turn)
        absorbance += stain.eosin * pink[..., None] * (EOSIN + 0.5 * turn)
        lamp = 1 - 0.05 * np.hypot(*np.meshgrid(np.linspace(-1, 1, self.width), np.linspace(-1, 1, self.height))) ** 2
        light = np.asarray(stain.white) * np.exp(-absorbance) * lamp[..., None]
        image = Image.fromarray(np.clip(light, 0, 255).astype(np.uint8)).resize(FIELD_SIZE, Image.Resampling.BOX)
        pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.45)), dtype=np.float64)
        pixels += self.rng.normal(0, 2.0, pixels.shape)
        return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
