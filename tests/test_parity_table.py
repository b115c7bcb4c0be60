"""The families at full size against PyTorch: long, by hand."""

import pytest

pytest.importorskip("torchvision_cpu")
pytest.importorskip("timm")
import parity
import parity_table


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "small_input"),
    [
        (name, small_input)
        for name, case in parity_table.CASES.items()
        for small_input in ((False, True) if case.stem else (False,))
    ],
)
def test_full_size_equals_pytorch(name, small_input):
    errors = parity_table.measure(name, small_input)
    assert parity.within_bounds(errors), errors


def test_every_family_is_in_the_table():
    """Every name of MODELS, or one of its family and depth class."""
    listed = {name.split()[0] for name in parity_table.CASES}
    assert set(parity_table.MODELS) - listed == {
        "resnet8",
        "resnet14",
        "resnet32",
        "resnet44",
        "resnet110",
        "resnet32x4",
    }
