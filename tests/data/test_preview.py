"""The preview grid shows two epochs of each sample."""

from controlfill.data.hints import open_spec
from controlfill.data.preview import preview
from controlfill.data.sample import PreparedSource
from controlfill.data.sources import make_preparation, open_source
from controlfill.options import DataOptions


def test_the_grid_has_a_row_per_sample():
    options = DataOptions(image_size=32)
    data = PreparedSource(open_source("world:shapes", options), make_preparation(options), 0)
    picture, skipped = preview(data, open_spec("masked-latent+mask"), 3, 48)
    assert picture.shape == (3 * (48 + 16 + 4) + 4, 6 * 52 + 4, 3)
    assert not skipped
    assert picture.std() > 20
