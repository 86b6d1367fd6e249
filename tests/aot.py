"""Compiles kernels for sm_90 without a GPU, and reads what the compiler made of them. Run in a process of its own:
Triton must not have been imported for its interpreter.

    python tests/aot.py FILE     every case of FILE's ``cases()``, one JSON line each
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.pop("TRITON_INTERPRET", None)
TYPES = {"bf16": "*bf16", "fp16": "*fp16", "fp32": "*fp32", "i32": "*i32", "i64": "*i64"}


class Case(NamedTuple):
    """One compilation. ``arguments`` maps the kernel's non-constexpr parameters to Triton types ("*bf16", "i32",
    "fp32"); pointers are taken as divisible by 16, and so is an "i32:16", as launches take most strides."""

    name: str
    kernel: Any
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    matrix: bool = True
    """Whether matrix instructions must be there."""
    spills: int = 0
    """Bytes of registers that may be spilled: more than none only where nothing faster was found."""
    maximum: int | None = None
    """Registers that a thread may have, where a launch caps them."""


class Resources(NamedTuple):
    name: str
    registers: int
    spills: int
    shared: int
    matrix_instructions: int
    transposed_results: int


def most_spilled(name: str, bounds: dict[str, int], older: dict[str, int]) -> int:
    """Bytes of registers that a case may spill: the first bound whose kernel its name begins with. Those of ``older``
    stand before the others where Triton is 3.6, whose code for some kernels spills more than 3.7's."""
    tables = (older, bounds) if version("triton").startswith("3.6.") else (bounds,)
    return next((most for t in tables for kernel, most in t.items() if name.startswith(kernel)), 0)


def compile_case(case: Case, disassemble: bool = False) -> Resources:
    """Registers, bytes of spilled registers, bytes of shared memory, warp-group matrix instructions, and how many
    operands of a product are the transpose of another product's result.

    Matrix instructions are counted in the PTX, as disassembling takes as long as compiling; ``disassemble`` has a look
    whether the machine code has them where the PTX does.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    attributes = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.arguments.items()
        if kind.startswith("*") or kind.endswith(":16")
    }
    signature = {name: case.arguments.get(name, "constexpr").removesuffix(":16") for name in names}
    source = ASTSource(case.kernel, signature, constexprs=case.constants, attrs=attributes)
    options: dict[str, Any] = {"num_warps": case.warps, "num_stages": case.stages}
    if case.maximum is not None:
        options["maxnreg"] = case.maximum
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name) if disassemble else None
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    local = int(re.search(r"LOCAL:(\d+)", usage).group(1))
    matrix = len(re.findall(r"\bwgmma\.mma_async\b", made.asm["ptx"]))
    if code is not None and bool(re.search(r"\b[HQ]GMMA\b", code)) != bool(matrix):
        raise RuntimeError(
            f"{case.name}: {matrix} matrix instructions in the PTX, and others in the machine code"
        )
    return Resources(
        case.name,
        registers,
        max(stack, local),
        made.metadata.shared,
        matrix,
        transposed_results(made.asm["ttir"]),
    )


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), flag, path], check=True, capture_output=True, text=True).stdout


def transposed_results(ir: str) -> int:
    """How many operands of ``tt.dot`` come from a ``tt.trans`` of another ``tt.dot``'s result, casts, arithmetic, loops
    and branches between them included: a pattern that Triton 3.4 to 3.7.0 compiles wrongly on Hopper."""
    made = _definitions(ir)

    def reaches(name: str, transposed: bool, seen: set[tuple[str, bool]]) -> bool:
        if (name, transposed) in seen or name not in made:
            return False
        seen.add((name, transposed))
        operation, operands = made[name]
        if operation == "tt.dot":
            return transposed
        if operation in ("tt.load", "tt.descriptor_load", "tt.reduce"):
            return False
        return any(reaches(x, transposed or operation == "tt.trans", seen) for x in operands)

    dots = [operands for operation, operands in made.values() if operation == "tt.dot"]
    return sum(reaches(operand, False, set()) for operands in dots for operand in operands[:2])


def _definitions(ir: str) -> dict[str, tuple[str, list[str]]]:
    """Name -> operation and operands. What a loop carries is made of its start and of what an iteration yields; the
    result of a branch, of what either side yields."""
    value = r"%\w+(?:#\d+)?"
    made: dict[str, tuple[str, list[str]]] = {}
    regions: list[list[list[str]]] = []  # of every open brace, the operand lists that a yield in it adds to
    for line in ir.splitlines():
        found = re.match(r"\s*(%\w+)(?::(\d+))? = \"?([\w.]+)\"?(.*)", line)
        sinks: list[list[str]] = []
        if found and found[3] in ("scf.for", "scf.if", "scf.while"):
            carried = re.search(r"iter_args\((.*?)\) ->", found[4]) or re.search(r"^\s*\((.*?)\)", found[4])
            pairs = re.findall(rf"(%\w+) = ({value})", carried[1]) if carried else []
            names = [found[1]] if found[2] is None else [f"{found[1]}#{i}" for i in range(int(found[2]))]
            for i, name in enumerate(names):
                sources = [pairs[i][1]] if i < len(pairs) else []
                made[name] = (found[3], sources)
                if i < len(pairs):
                    made[pairs[i][0]] = (found[3], sources)
                sinks.append(sources)
        elif found:
            made[found[1]] = (found[3], re.findall(value, found[4].split(" : ")[0]))
        if given := re.match(r"\s*scf\.yield (.*?) : ", line):
            for sources, operand in zip(regions[-1], re.findall(value, given[1]), strict=False):
                sources.append(operand)
        text = line.strip()
        if text.startswith("} else"):
            continue  # the other side of a branch yields to the same results
        if text.startswith("}"):
            regions.pop()
        if text.endswith("{") or re.search(r"\(\{$", text):
            regions.append(sinks)
    return made


def main() -> None:
    path = Path(sys.argv[1]).resolve()
    sys.path[:0] = [str(path.parent), str(Path(__file__).resolve().parents[1])]  # not an installed package
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    looked_at = set()
    for case in module.cases():
        made = compile_case(case, disassemble=case.matrix not in looked_at)
        looked_at.add(case.matrix)
        print(json.dumps({**made._asdict(), "matrix": case.matrix, "allowed": case.spills}), flush=True)


if __name__ == "__main__":
    main()
