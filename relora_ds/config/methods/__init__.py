"""One module per training method: its settings and the rules that they obey.

Importing the package imports every module in it, and each registers the settings that it holds.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
