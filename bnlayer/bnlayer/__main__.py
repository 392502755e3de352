"""`python -m bnlayer` is the command `bnlayer`, for an environment whose scripts are not on the PATH.

The layer imports nothing of the command; which module that is, the installed distribution says.
"""

import os
import sys
from importlib.metadata import entry_points


def main() -> None:
    """Go on as the module of the command.

    The process begins anew, with the same options of the interpreter: to find this file, Python has imported the
    package and so NumPy, and the command must choose the number of NumPy's threads before that.
    """
    command = next(iter(entry_points(group="console_scripts", name="bnlayer")), None)
    if command is None:
        sys.exit("python -m bnlayer: the distribution is not installed, so there is no command: pip install bnlayer")
    given = len(sys.argv) - 1
    *options, module = sys.orig_argv[1 : len(sys.orig_argv) - given]
    if not module.endswith("bnlayer"):  # started as a file
        command.load()()
        return
    options.append(module.removesuffix("bnlayer") + command.module)  # "-m bnlayer", "-mbnlayer", "-Im bnlayer"
    os.execv(sys.executable, [sys.executable, *options, *sys.argv[1:]])  # noqa: S606 - nothing here is a shell's


main()
