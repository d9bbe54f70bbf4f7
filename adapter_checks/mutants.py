"""How many small faults, planted one at a time in the checks, do their tests notice?

    python adapter_checks/mutants.py --minutes 40    # from the root of the repository

Each mutant changes one comparison, constant, logical operator or condition of one module, or takes one entry out of a
list. It is compiled in a process of its own, forked from one that has imported the libraries already; no file is
written, so it can be stopped at any time. Mutants are drawn at random, the same ones for the same seed. Linux and
macOS only. What a test runs in a further process does not meet the mutant.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib.util
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = {
    "adapter_config": ["test_adapter_folder.py"],
    "adapter_folder": ["test_adapter_folder.py", "test_adapters.py"],
    "adapter_numbers": ["test_adapter_folder.py"],
    "base_shapes": ["test_adapter_folder.py", "test_adapters.py"],
    "counting": ["test_counting.py"],
    "initialisation": ["test_initialisation.py"],
    "lora_config": ["test_lora_config.py"],
    "merged_weights": ["test_merged_folder.py"],
    "names": ["test_names.py"],
    "other_methods": ["test_soft_prompts.py"],
    "online_run": ["test_preference_run.py"],
    "preference_data": ["test_preference_data.py"],
    "preference_run": ["test_preference_run.py"],
    "reference_model": ["test_preference_run.py"],
    "run_log": ["test_preference_run.py"],
    "safetensors_header": ["test_safetensors_header.py"],
    "soft_prompts": ["test_soft_prompts.py"],
    "training": ["test_training_data.py"],
    "training_data": ["test_training_data.py"],
    "vocabulary": ["test_vocabulary.py"],
}
SECONDS = 240  # for one mutant; longer counts as noticed, since such a run would not pass unseen
SWAPS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def variants(node: ast.AST) -> list[ast.AST]:
    """The node with one change each."""
    found: list[ast.AST] = []
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            changed = copy.deepcopy(node)
            changed.ops[place] = SWAPS[type(operator)]()
            found.append(changed)
    elif isinstance(node, ast.BoolOp):
        found.append(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        found.append(node.operand)
    elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
        found.append(ast.If(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        found.append(ast.Constant(not node.value))
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        found.append(ast.Constant(node.value * 10 if isinstance(node.value, float) else node.value + 1))
    elif isinstance(node, (ast.Tuple, ast.List)) and isinstance(node.ctx, ast.Load) and len(node.elts) > 1:
        if all(isinstance(entry, ast.Constant) for entry in node.elts):
            for place in range(len(node.elts)):
                changed = copy.deepcopy(node)
                del changed.elts[place]
                found.append(changed)
    return found


class Mutate(ast.NodeTransformer):
    """Count the changes that are possible (target None), or make the one of that number."""

    def __init__(self, target: int | None = None):
        self.target, self.count, self.line, self.what = target, 0, 0, ""

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, (ast.JoinedStr, ast.arg, ast.AnnAssign)):  # messages and types
            return node
        for changed in variants(node):
            if self.count == self.target:
                self.line = node.lineno
                self.what = f"{ast.unparse(node).splitlines()[0]}  ->  {ast.unparse(changed).splitlines()[0]}"
                self.count += 1
                return ast.copy_location(changed, node)
            self.count += 1
        return self.generic_visit(node)


def mutant(module: str, number: int | None) -> tuple[ast.Module, Mutate]:
    tree, mutate = ast.parse((HERE / f"src/adapter_checks/{module}.py").read_text(encoding="utf-8")), Mutate(number)
    return ast.fix_missing_locations(mutate.visit(tree)), mutate


class Finder:
    """Gives `import adapter_checks.<module>` the mutant in the place of the file."""

    def __init__(self, module: str, tree: ast.Module):
        self.name, self.tree = f"adapter_checks.{module}", tree

    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        exec(compile(self.tree, f"<mutant of {self.name}>", "exec"), module.__dict__)


def passes(module: str, tree: ast.Module, seconds: int = SECONDS) -> bool:
    """Whether the module's tests pass with this mutant, in a child process."""
    import pytest

    child = os.fork()
    if child == 0:
        os.setsid()
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stdout.fileno(), 2)
        sys.meta_path.insert(0, Finder(module, tree))
        files = [str(HERE / "tests" / name) for name in TESTS[module]]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *files]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return status == 0
        time.sleep(0.1)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--only", nargs="+", choices=TESTS, default=list(TESTS), metavar="MODULE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(HERE / "src"))
    import peft  # noqa: F401 (forks have them)

    for module in options.only:
        if not passes(module, mutant(module, None)[0]):
            raise SystemExit(f"The tests of {module} fail, or take more than {SECONDS} s, without any mutant.")
    todo = [(module, n) for module in options.only for n in range(mutant(module, None)[1].count)]
    print(f"{len(todo)} mutants are possible in {len(options.only)} modules; {options.minutes:g} minutes.", flush=True)
    random.Random(options.seed).shuffle(todo)
    tried, noticed = Counter(), Counter()
    for module, number in todo:
        if time.monotonic() > end:
            break
        tree, mutate = mutant(module, number)
        tried[module] += 1
        if passes(module, tree):
            print(f"survived: {module}.py:{mutate.line}: {mutate.what}", flush=True)
        else:
            noticed[module] += 1
    for module in sorted(tried):
        print(f"{module:<20}{noticed[module]:>4} of {tried[module]:>3} noticed")
    total = sum(tried.values())
    print(f"{'all':<20}{sum(noticed.values()):>4} of {total:>3} noticed ({sum(noticed.values()) / max(total, 1):.0%})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
