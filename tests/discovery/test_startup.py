"""The start-up hook against small stand-ins for nnU-Net, each in a process of its own."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nnunetv2_hyspark

PACKAGE = Path(nnunetv2_hyspark.__file__).parent

FIND_27 = '''
import importlib, pkgutil

def recursive_find_python_class(folder: str, class_name: str, current_module: str):
    for _, name, is_package in pkgutil.iter_modules([folder]):
        if not is_package:
            module = importlib.import_module(current_module + "." + name)
            if hasattr(module, class_name):
                return getattr(module, class_name)
    for _, name, is_package in pkgutil.iter_modules([folder]):
        if is_package:
            inner = current_module + "." + name
            found = recursive_find_python_class(folder + "/" + name, class_name, current_module=inner)
            if found is not None:
                return found
'''
FIND_28 = (
    FIND_27.replace("recursive_find", "_recursive_find")
    + '''
def recursive_find_python_class(folder, class_name, current_module, base_folder=None, verbose=False):
    return _recursive_find_python_class(folder, class_name, current_module)
'''
)
NNUNET = {
    "utilities/find_class_by_name.py": FIND_28,
    "utilities/plans_handling/plans_handler.py": (
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class\n"
    ),
    "run/load_pretrained_weights.py": (
        "def load_pretrained_weights(network, fname, verbose=False):\n    print('stock', fname, verbose)\n"
    ),
    "training/nnUNetTrainer/stock.py": "class nnUNetTrainer: pass\nclass InBoth: pass\n",
    "experiment_planning/stock.py": "",
    "preprocessing/normalization/stock.py": "",
    "preprocessing/preprocessors/stock.py": "class DefaultPreprocessor: pass\n",
}
OURS = {
    "trainers/a_first.py": "class InBoth: pass\nclass First: pass\n",
    "trainers/b_second.py": "class Second: pass\n",
    "planners/planner.py": "class Planner: pass\n",
    "normalization/scheme.py": "class Scheme: pass\nclass DefaultPreprocessor: pass\n",
    "preprocessing/preprocessor.py": "class Preprocessor: pass\n",
}
# what every script below starts with
PRELUDE = '''
import sys
import nnunetv2_hyspark._startup as startup
startup.install()

def find(name, package="training.nnUNetTrainer"):
    import nnunetv2
    from nnunetv2.utilities.plans_handling.plans_handler import recursive_find_python_class
    folder = nnunetv2.__path__[0] + "/" + package.replace(".", "/")
    found = recursive_find_python_class(folder, name, current_module="nnunetv2." + package)
    return found and found.__module__
'''


class Sandbox:
    """Stand-ins for nnU-Net and for our package around the real start-up module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in NNUNET.items():
            self.write(f"nnunetv2/{name}", text)
        for name, text in OURS.items():
            self.write(f"nnunetv2_hyspark/{name}", text)
        for name in ("__init__.py", "_startup.py"):
            shutil.copy(PACKAGE / name, folder / "nnunetv2_hyspark")

    def write(self, name: str, text: str) -> None:
        """Write a module, and make the folders above it packages."""
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for parent in file.relative_to(self.folder).parents[:-1]:
            (self.folder / parent / "__init__.py").touch()
        file.write_text(text)

    def run(self, script: str, prelude: str = PRELUDE, **variables: str) -> tuple[list[str], list[str]]:
        """Lines of stdout and of stderr; -S leaves the environment's own start-up files out."""
        finished = subprocess.run(
            [sys.executable, "-S", "-c", prelude + script],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={"PYTHONPATH": str(self.folder), **variables},
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout.splitlines(), finished.stderr.splitlines()


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


@pytest.mark.parametrize("finder", [FIND_27, FIND_28], ids=["2.7", "2.8"])
def test_ours_are_found_where_nnunet_finds_none(sandbox, finder):
    sandbox.write("nnunetv2/utilities/find_class_by_name.py", finder)
    out, err = sandbox.run(
        "print(find('nnUNetTrainer'), find('InBoth'), find('First'), find('Second'), find('Unknown'))\n"
        "print(find('Planner', 'experiment_planning'), find('Scheme', 'preprocessing.normalization'))\n"
        "print(find('Preprocessor', 'preprocessing'), find('DefaultPreprocessor', 'preprocessing'))\n"
        "print(find('First', 'experiment_planning'), find('First', 'preprocessing'), find('Scheme', 'preprocessing'))\n"
    )
    stock = "nnunetv2.training.nnUNetTrainer.stock"
    assert out == [
        f"{stock} {stock} nnunetv2_hyspark.trainers.a_first nnunetv2_hyspark.trainers.b_second None",
        "nnunetv2_hyspark.planners.planner nnunetv2_hyspark.normalization.scheme",
        "nnunetv2_hyspark.preprocessing.preprocessor nnunetv2.preprocessing.preprocessors.stock",
        "None None None",
    ]
    assert err == []


def test_nothing_is_imported_at_start_or_before_it_is_needed(sandbox):
    out, _ = sandbox.run(
        "import sys\nbefore = set(sys.modules)\nimport nnunetv2_hyspark._startup as startup\nstartup.install()\n"
        "print(sorted(set(sys.modules) - before - {'__future__'}))\n"
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as find\n"
        "find('nnunetv2/training/nnUNetTrainer', 'nnUNetTrainer', 'nnunetv2.training.nnUNetTrainer')\n"
        "print([name for name in sys.modules if name.startswith('nnunetv2_hyspark.trainers')])\n"
        "find('nnunetv2/training/nnUNetTrainer', 'First', 'nnunetv2.training.nnUNetTrainer')\n"
        "print([name for name in sys.modules if name.startswith('nnunetv2_hyspark.trainers.')])\n",
        prelude="import os\n",
    )
    assert out == [
        "['nnunetv2_hyspark', 'nnunetv2_hyspark._startup']",
        "[]",
        "['nnunetv2_hyspark.trainers.a_first']",
    ]


def test_installing_twice_or_in_two_versions_wraps_once(sandbox):
    shutil.copy(PACKAGE / "_startup.py", sandbox.folder / "other_version.py")
    out, err = sandbox.run(
        "startup.install()\nimport other_version\nother_version.install()\nprint(find('First'))\n"
        "from nnunetv2.utilities import find_class_by_name as module\n"
        "print(sum(hasattr(finder, 'is_hyspark_hook') for finder in sys.meta_path))\n"
        "wrapped = module.recursive_find_python_class\nprint(hasattr(wrapped.__wrapped__, 'is_hyspark_hook'))\n"
        "startup.StartupHook()._extend(module)\nprint(module.recursive_find_python_class is wrapped)\n"
        "import importlib\nimportlib.reload(module)\n"
        "again = module.recursive_find_python_class\n"
        "print(again.is_hyspark_hook, hasattr(again.__wrapped__, 'is_hyspark_hook'), vars(module.__loader__).keys())\n"
    )
    assert out == [
        "nnunetv2_hyspark.trainers.a_first",
        "1",
        "False",
        "True",
        "True False dict_keys(['name', 'path'])",
    ]
    assert err == []


def test_coming_late_reaches_names_imported_before(sandbox):
    out, err = sandbox.run(
        "import nnunetv2.utilities.plans_handling.plans_handler as handler\n"
        "import nnunetv2_hyspark._startup as startup\nstartup.install()\n"
        "find = handler.recursive_find_python_class\n"
        "print(find('nnunetv2/training/nnUNetTrainer', 'First', 'nnunetv2.training.nnUNetTrainer').__module__)\n",
        prelude="",
    )
    assert (out, err) == (["nnunetv2_hyspark.trainers.a_first"], [])


@pytest.mark.parametrize(("value", "found"), [("1", False), ("true", False), ("0", True), ("", True)])
def test_switching_off(sandbox, value, found):
    script = (
        "print(find('First'), startup.is_active())\n"
        "from nnunetv2.run.load_pretrained_weights import load_pretrained_weights as load\n"
        "class Network:\n    def hyspark_load_pretrained(self, fname): print('ours')\n"
        "load(Network(), 'x')\n"
    )
    out, err = sandbox.run(script, nnUNet_hyspark_disable=value)
    assert out == (["nnunetv2_hyspark.trainers.a_first True", "ours"] if found else ["None False", "stock x False"])
    assert err == []


def test_a_broken_module_of_ours_is_named_once_and_the_others_still_work(sandbox):
    sandbox.write("nnunetv2_hyspark/trainers/a_broken.py", "import no_such_dependency\n")
    out, err = sandbox.run("print(find('nnUNetTrainer'))\nprint(find('Second'), find('Second'), find('Unknown'))\n")
    assert out == [
        "nnunetv2.training.nnUNetTrainer.stock",
        "nnunetv2_hyspark.trainers.b_second nnunetv2_hyspark.trainers.b_second None",
    ]
    [line] = err
    assert "nnunetv2_hyspark.trainers.a_broken" in line
    assert "ModuleNotFoundError: No module named 'no_such_dependency'" in line
    assert "nnU-Net works on without HySparK" in line


def test_a_broken_package_of_ours_leaves_the_stock_trainer(sandbox):
    sandbox.write("nnunetv2_hyspark/trainers/__init__.py", "raise RuntimeError('two\\nlines')\n")
    out, err = sandbox.run("print(find('First'), find('nnUNetTrainer'))\n")
    assert out == ["None nnunetv2.training.nnUNetTrainer.stock"]
    assert len(err) == 1
    assert "two lines" in err[0]


def test_packages_that_we_do_not_have_are_no_reason_to_warn_but_missing_trainers_are(sandbox):
    for name in ("normalization", "preprocessing", "trainers"):
        shutil.rmtree(sandbox.folder / "nnunetv2_hyspark" / name)
    out, err = sandbox.run("print(find('A', 'preprocessing'), find('B', 'preprocessing.normalization'), find('C'))\n")
    assert out == ["None None None"]
    assert len(err) == 1
    assert "nnunetv2_hyspark.trainers" in err[0]


@pytest.mark.parametrize(
    "text",
    [
        "def another_name(): pass\nrecursive_find_python_class = None\n",
        "def recursive_find_python_class(class_name, *, where): pass\n",
        "recursive_find_python_class = print\n",
    ],
)
def test_a_changed_function_is_left_alone_with_one_warning(sandbox, text):
    sandbox.write("nnunetv2/utilities/find_class_by_name.py", text)
    out, err = sandbox.run(
        "import nnunetv2.utilities.plans_handling.plans_handler\n"
        "from nnunetv2.utilities.find_class_by_name import recursive_find_python_class as function\n"
        "print(hasattr(function, '__wrapped__'))\n"
    )
    assert out == ["False"]
    assert len(err) == 1
    assert "nnU-Net works on without HySparK" in err[0]


def test_a_moved_function_is_noticed(sandbox):
    (sandbox.folder / "nnunetv2/utilities/find_class_by_name.py").unlink()
    sandbox.write("nnunetv2/utilities/plans_handling/plans_handler.py", "")
    _, err = sandbox.run("import nnunetv2.utilities.plans_handling.plans_handler\n")
    assert len(err) == 1
    assert "nnunetv2.utilities.find_class_by_name" in err[0]


def test_an_error_inside_nnunet_stays_nnunets(sandbox):
    sandbox.write("nnunetv2/utilities/find_class_by_name.py", "raise KeyError('stock')\n")
    out, err = sandbox.run(
        "try:\n    import nnunetv2.utilities.find_class_by_name\nexcept KeyError as error:\n    print(error)\n"
    )
    assert (out, err) == (["'stock'"], [])


def test_pretrained_weights_are_handed_to_a_network_that_wants_them(sandbox):
    out, err = sandbox.run(
        "from nnunetv2.run.load_pretrained_weights import load_pretrained_weights as load\n"
        "class Ours:\n    def hyspark_load_pretrained(self, fname): print('ours', fname)\n"
        "class Stock: pass\n"
        "class OptimizedModule:\n    def __init__(self, inside): self._orig_mod = inside\n"
        "class DistributedDataParallel:\n    def __init__(self, inside): self.module = inside\n"
        "load(Ours(), 'a', verbose=True)\n"
        "load(DistributedDataParallel(OptimizedModule(Ours())), fname='b')\n"
        "load(OptimizedModule(DistributedDataParallel(Ours())), 'c')\n"
        "load(Stock(), 'd', verbose=True)\n"
        "stranger = Stock()\nstranger.hyspark_load_pretrained = print\nload(stranger, 'e')\n"
        "load(network=OptimizedModule(Stock()), fname='f')\n"
    )
    assert out == ["ours a", "ours b", "ours c", "stock d True", "stock e False", "stock f False"]
    assert err == []


def test_a_changed_loader_is_left_alone_with_one_warning(sandbox):
    sandbox.write("nnunetv2/run/load_pretrained_weights.py", "def load_pretrained_weights(path): pass\n")
    out, err = sandbox.run(
        "from nnunetv2.run.load_pretrained_weights import load_pretrained_weights as load\n"
        "print(hasattr(load, '__wrapped__'))\n"
    )
    assert out == ["False"]
    assert len(err) == 1
    assert "load_pretrained_weights" in err[0]


def test_starting_never_fails(sandbox):
    out, err = sandbox.run("sys.meta_path = None\nstartup.install()\nprint('started')\n")
    assert out == ["started"]
    assert len(err) == 1


def test_real_nnunet_has_the_functions_that_are_wrapped():
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
    from nnunetv2.utilities.plans_handling.plans_handler import recursive_find_python_class

    assert recursive_find_python_class.is_hyspark_hook
    assert load_pretrained_weights.is_hyspark_hook


def test_torch_wrappers_have_the_names_that_are_unwrapped():
    import torch

    from nnunetv2_hyspark._startup import _unwrapped

    network = torch.nn.Linear(1, 1)
    assert _unwrapped(torch.compile(network)) is network
    assert torch.nn.parallel.DistributedDataParallel.__name__ == "DistributedDataParallel"
