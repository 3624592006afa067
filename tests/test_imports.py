"""The floors of the house: who may import whom, and what importing costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tinygrad_llm

PACKAGE = Path(tinygrad_llm.__file__).parent

# From the ground up. A file imports from its own floor and from those below, never upwards.
FLOORS = [
    {"backend"},
    {"kernels"},
    {"dispatch"},
    {"watch", "tensor", "autograd"},
    {"ops"},
    {"gradcheck", "storage", "checkpointing"},
    {"nn", "optim"},
    {"models", "data", "peft"},
    {"metrics"},
    {"generate", "tasks"},
    {"train", "finetune", "explain"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}

# The one knot: Tensor's methods call the ops.
KNOTS = {("tensor", "ops")}

OTHER_FRAMEWORKS = {"torch", "tensorflow", "jax", "keras", "mxnet"}


def files() -> list[Path]:
    found = sorted(PACKAGE.rglob("*.py"))
    # A link to the folder beside the package, which rglob does not follow.
    found += [p for p in sorted((PACKAGE / "kernels").rglob("*.py")) if p not in found]
    return [p for p in found if p != PACKAGE / "__init__.py"]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> list[str]:
    """Every module that a file imports, at its top or inside a function, as a dotted name."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def test_there_is_something_to_check() -> None:
    assert {room_of(p) for p in files()} >= {"backend", "tensor", "autograd", "ops", "nn", "cli"}


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards_only(path: Path) -> None:
    room = room_of(path)
    assert room in FLOOR, f"{room} has no floor yet: add it to FLOORS"
    for name in imports_of(path):
        top, *rest = name.split(".")
        assert top not in OTHER_FRAMEWORKS, f"{path.name} imports {top}"
        assert top != "kernels", f"{path.name}: import tinygrad_llm.kernels.*"
        if top != "tinygrad_llm":
            continue
        other = rest[0] if rest else ""
        if other not in FLOOR:  # a public name of the package itself
            other = "ops"
        upwards = FLOOR[other] > FLOOR[room]
        assert not upwards or (room, other) in KNOTS, f"{room} imports {other}, a floor above it"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_numpy_and_ml_dtypes_only() -> None:
    code = """
import sys, numpy, ml_dtypes
before = {name.partition(".")[0] for name in sys.modules}
import tinygrad_llm
after = {name.partition(".")[0] for name in sys.modules}
print(*sorted(n for n in after - before if n not in sys.stdlib_module_names))
"""
    assert run(code) == "tinygrad_llm"


def test_no_other_framework_after_a_training_step() -> None:
    code = """
import sys
import tinygrad_llm as tg
from tinygrad_llm import nn, ops, optim
model = nn.Linear(4, 3)
optimiser = optim.AdamW(model.parameters())
ops.cross_entropy(model(tg.randn(2, 4)), tg.randint(0, 3, (2,))).backward()
optimiser.step()
heavy = {"torch", "tensorflow", "jax", "cupy", "triton", "tokenizers", "matplotlib", "rich", "tyro"}
print(*sorted(heavy & set(sys.modules)))
"""
    assert run(code) == ""


def test_any_module_can_be_imported_first() -> None:
    for module in ("autograd", "ops.softmax", "tensor", "watch", "backend", "nn", "gradcheck"):
        assert run(f"import tinygrad_llm.{module}; print('ok')") == "ok"
