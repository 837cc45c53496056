"""Runs a command in a Python that lacks a package: without.py MODULE PACKAGE [options]."""
import importlib
import sys

module, missing = sys.argv[1:3]


class Blocked:
    def find_spec(self, name, *_):
        if name.split(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Blocked())
sys.argv[:3] = [f"{module}.py"]
importlib.import_module(module).main()
