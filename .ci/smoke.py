"""Use the installed wheel, without extras, from outside the tree."""

import subprocess
from importlib.resources import files
from pathlib import Path

import refattn

if "site-packages" not in Path(refattn.__file__).parts:
    raise SystemExit(f"refattn came from {refattn.__file__}, not from the wheel")
if not files("refattn").joinpath("py.typed").is_file():
    raise SystemExit("the wheel has no py.typed")

o = refattn.softmax.attend([[1.0]], [[0.0], [0.0]], [[1.0], [3.0]])
if o.tolist() != [[2.0]]:
    raise SystemExit(f"attend answered {o}; expected [[2.0]]")

try:
    refattn.softmax.attend([[1.0]], [[0.0]], [[1.0]], backend="cpu")
except ImportError as error:
    if "pip install 'refattn[cpu]'" not in str(error):
        raise SystemExit(f"the missing extra is not named: {error}") from None
else:
    raise SystemExit("backend='cpu' answered without its extra")

command = subprocess.run(["refattn", "--help"], capture_output=True, text=True)
print(command.stdout + command.stderr, end="")
one_line = command.stderr.count("\n") == 1 and "pip install 'refattn[study]'" in command.stderr
if command.returncode != 0 and not (command.returncode == 2 and one_line):
    raise SystemExit(f"refattn --help: exit code {command.returncode}")
