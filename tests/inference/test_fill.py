"""Classical fills fill the hole and touch nothing else."""

import numpy as np
import pytest

from controlfill.errors import UserError
from controlfill.inference.fill import FILLS, check_fills, fill_with


@pytest.mark.parametrize("name", ["telea", "navier-stokes", "biharmonic"])
def test_a_gradient_is_continued(name, photo, hole):
    blank = photo.copy()
    blank[hole > 0] = 0
    filled = fill_with(name, blank, hole)
    np.testing.assert_array_equal(filled[hole == 0], photo[hole == 0])
    error = np.abs(filled.astype(int) - photo)[hole > 0].mean()
    assert error < 12
    assert error > 0 or name == "biharmonic"


@pytest.mark.parametrize("name", sorted(FILLS))
def test_without_known_pixels_the_fill_is_grey(name, photo):
    assert (fill_with(name, photo, np.full(photo.shape[:2], 255, np.uint8)) == 128).all()


def test_unknown_fills_are_refused():
    with pytest.raises(UserError, match="no fill is called 'magic'; there are: telea"):
        check_fills(["telea", "magic"])
