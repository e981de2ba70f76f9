"""The paper's window."""
import numpy as np
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

from nnunetv2_hyspark.normalization.ct_window import CTWindow01Normalization


def test_hounsfield_units_become_numbers_from_0_to_1():
    image = np.array([[[-1024, -175, 37.5, 250, 3000]]], np.int16).astype(np.float64)
    image[0, 0, 2] = 37.5
    result = CTWindow01Normalization(False, {}).run(image)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 0], [0, 0, 0.5, 1, 1])


def test_nnunet_finds_it_where_it_looks_for_its_own():
    import nnunetv2

    folder = f"{nnunetv2.__path__[0]}/preprocessing/normalization"
    found = recursive_find_python_class(folder, "CTWindow01Normalization", "nnunetv2.preprocessing.normalization")
    assert found is not None and issubclass(found, ImageNormalization)
