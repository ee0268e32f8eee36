"""The packages that can be called, as `import halfulp` alone gives them."""

import subprocess
import sys

import pytest

import halfulp


def test_modules_of_a_room_need_no_import_of_their_own():
    code = "import halfulp; halfulp.sharpness.ratios.measured; halfulp.check.prices.price"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("room", ["check", "sharpness"])
def test_what_a_room_does_not_have_is_no_attribute(room):
    with pytest.raises(AttributeError, match=f"'halfulp.{room}' has no attribute 'nothing'"):
        getattr(halfulp, room).nothing  # noqa: B018
