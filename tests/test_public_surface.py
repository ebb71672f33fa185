"""The names that users import: what `__all__` says, whatever was imported before."""

import importlib
import pkgutil
import random
import subprocess
import sys

import pytest

PACKAGES = ("engines", "runtime", "vocabtrim_export")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_public_name_is_also_a_submodules(package):
    """Importing the submodule would put it in the name's place."""
    module = importlib.import_module(package)
    assert not {each.name for each in pkgutil.iter_modules(module.__path__)} & set(module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_what_their_homes_have_in_any_order_and_again(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for seed in range(3):
        for name in random.Random(seed).sample(module.__all__, len(module.__all__)):
            scope = {}
            exec(f"from {package} import {name}", scope)
            home = importlib.import_module(scope[name].__module__)
            assert home.__name__.split(".")[0] in PACKAGES
            assert scope[name] is getattr(home, name)
            assert name in dir(module)


def test_a_name_that_needs_the_extra_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None; from vocabtrim_export import Coverage, {name}"
    for name, code_of_exit in (("VocabMap", 1), ("export", 1), ("select_vocab", 0)):
        done = subprocess.run([sys.executable, "-c", code.format(name=name)], capture_output=True, text=True)
        assert done.returncode == code_of_exit
        assert ("pip install 'vocabtrim-export[export]'" in done.stderr) == (name == "export")


def test_what_measures_is_not_on_the_front_page():
    import runtime

    homes = {getattr(runtime, name).__module__ for name in runtime.__all__}
    assert not [home for home in homes if home.startswith(("runtime.measure", "runtime.verification"))]
