"""Every kernel through the whole compiler, for any NVIDIA GPU, on a machine that has none.

    for report in xray(["softmax"], archs=[80, 90], dtypes=["bf16"]):
        print(report.specimen, report.arch, report.registers, report.verdict)

Triton compiles a kernel exactly as a launch would, with the same specialisation, once a driver says
which GPU is "there": ours says so and has no memory. What comes out is weighed: registers, stack
and spills (cuobjdump, ptxas), tensor-core instructions and the width of memory accesses (PTX),
shared memory and occupancy against what the architecture has.

This happens in a process of its own. Whether `tl` means the compiler or the interpreter is settled
when triton is first imported, and a crash of the compiler must not be ours.

For the author of a kernel: beside the kernel stands one generator, which gives for "fp32", "fp16"
or "bf16" every launch that is worth looking at, and nothing for a dtype that the kernel lacks:

    def specimens(dtype: str) -> Iterator[Specimen]:
        size = {"fp32": 4, "fp16": 2, "bf16": 2}[dtype]
        yield Specimen(
            "a row at once",
            _softmax_row,
            {"x": f"*{dtype}", "y": f"*{dtype}", "columns": 1024, "stride": 1024, "BLOCK": 1024},
            num_warps=4,
            bytes=2 * 1024 * size,
            flops=5 * 1024,
        )

The arguments are those of a launch, so integers stand for what they are: 1 and multiples of 16 are
specialised, 1023 makes the loads narrow. "*bf16" is a pointer to 16-byte aligned memory (also
"*i32", "*i64" …), None an absent array.
`tests/kernels/test_compile.py -k every_kernel` compiles the specimens of all files for sm_80 and
sm_90 and holds their `faults` empty; what cannot be mended is listed as `Known`, with its reason:

    known=(Known("spills", "two accumulators at float32", archs=(80,), at_most=64),)
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tinygrad_llm.kernels import mode

KIB = 1024


class Architecture(NamedTuple):
    """What one multiprocessor (SM) has, from the CUDA programming guide's table of capabilities."""

    example: str
    warps: int  # that can be resident at once
    programs: int  # thread blocks
    shared: int  # bytes of shared memory
    shared_program: int  # of which one program may have so many
    reserved: int  # bytes of shared memory that the system keeps of each program


ARCHITECTURES = {
    75: Architecture("T4, RTX 20", 32, 16, 64 * KIB, 64 * KIB, 0),
    80: Architecture("A100", 64, 32, 164 * KIB, 163 * KIB, KIB),
    86: Architecture("A10, RTX 30", 48, 16, 100 * KIB, 99 * KIB, KIB),
    89: Architecture("L4, RTX 40", 48, 24, 100 * KIB, 99 * KIB, KIB),
    90: Architecture("H100, H200", 64, 32, 228 * KIB, 227 * KIB, KIB),
    100: Architecture("B200", 64, 32, 228 * KIB, 227 * KIB, KIB),
    120: Architecture("RTX 50", 48, 24, 100 * KIB, 99 * KIB, KIB),
}
DTYPES = ("fp32", "fp16", "bf16")
REGISTERS = 65536  # 32-bit ones of a multiprocessor, on all of the above

DOES_NOT_COMPILE = "does not compile"
SPILLS = "spills"
NO_TENSOR_CORES = "no tensor cores"
SHARED_MEMORY = "shared memory"
FAULTS = (DOES_NOT_COMPILE, SPILLS, NO_TENSOR_CORES, SHARED_MEMORY)

MISSING = "Triton is not installed: pip install triton (for Linux; to compile needs no GPU)"


# --- what a kernel file says ----------------------------------------------------------------------


@dataclass(frozen=True)
class Known:
    """A fault that is accepted: which one of FAULTS, why, on what, and up to how many bytes of it.

    Raises ValueError for a fault that there is not, or no reason.
    """

    fault: str
    reason: str
    archs: tuple[int, ...] = ()  # all of them
    at_most: int | None = None

    def __post_init__(self) -> None:
        if self.fault not in FAULTS:
            raise ValueError(f"a known fault is one of {', '.join(FAULTS)}, got {self.fault!r}")
        if not self.reason:
            raise ValueError(f"a known fault ({self.fault}) needs its reason, got none")

    def covers(self, fault: str, arch: int, amount: int) -> bool:
        """Whether this fault, on this architecture and of this size, is the accepted one."""
        here = not self.archs or arch in self.archs
        return fault == self.fault and here and (self.at_most is None or amount <= self.at_most)


@dataclass(frozen=True)
class Specimen:
    """One launch of a kernel that is worth looking at; the docstring of this file shows one.

    `bytes` and `flops` are of one program (0: not said); `options` are further ones of a launch,
    such as num_ctas or maxnreg; `archs` the architectures that the kernel is made for, all when
    empty.
    """

    name: str
    kernel: Any  # what @triton.jit made
    arguments: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    known: tuple[Known, ...] = ()
    archs: tuple[int, ...] = ()


# --- what comes out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Report:
    """One specimen, compiled for one architecture and dtype, and what was found.

    `loads` and `stores` count the instructions on global memory by their width in bytes per thread.
    `dots` counts the `tl.dot`s that ask for tensor cores: all but those of exact float32.
    """

    kernel: str
    specimen: str
    dtype: str
    arch: int
    error: str = ""  # why it does not compile; the rest is then empty
    registers: int = 0  # per thread
    stack: int = 0  # bytes per thread
    spills: int = 0  # bytes that a thread stores and loads because the registers did not suffice
    shared: int = 0  # bytes per program
    shared_limit: int = 0
    warps: int = 0  # per program
    resident_warps: int = 0  # per multiprocessor, when all programs are this one
    max_warps: int = 0
    limited_by: str = ""  # registers, shared memory, warps or programs
    dots: int = 0
    tensor_cores: dict[str, int] = field(default_factory=dict)  # mma.sync, wgmma, tcgen05
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    bulk_copies: int = 0  # through the tensor memory accelerator
    atomics: int = 0
    bytes: int = 0  # per program, as the kernel's file says
    flops: int = 0
    faults: tuple[str, ...] = ()  # must be mended
    known: tuple[str, ...] = ()  # accepted, with the reason
    notes: tuple[str, ...] = ()  # worth knowing
    ptx: str = ""  # where asked for
    sass: str = ""

    @property
    def verdict(self) -> str:
        """All that was found, in words: 'good' when that is nothing."""
        return "; ".join([*self.faults, *self.known, *self.notes]) or "good"


def occupancy(arch: int, registers: int, shared: int, warps: int) -> tuple[int, str]:
    """(warps that a multiprocessor can hold of programs such as this, what is the limit).

    Registers are given out by 256 to a warp and to four warps at a time, shared memory by 128
    bytes. The formula of NVIDIA's occupancy calculator.
    """
    sm = ARCHITECTURES[arch]
    per_warp = max(256, _round_up(registers * 32, 256))
    per_program = _round_up(shared + sm.reserved, 128)
    programs = {
        "warps": sm.warps // warps,
        "programs": sm.programs,
        "registers": REGISTERS // per_warp // 4 * 4 // warps,
        "shared memory": sm.shared // per_program if per_program else sm.programs,
    }
    limit = min(programs, key=lambda what: programs[what])
    return programs[limit] * warps, limit


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


# --- which kernels there are ----------------------------------------------------------------------

FOLDER = Path(__file__).parent


def kernels() -> dict[str, str]:
    """The kernel files that offer specimens, with the first line of their docstrings.

    They are read, not imported: the list needs no Triton.
    """
    found = {}
    for path in sorted(FOLDER.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if _offers_specimens(tree):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def _offers_specimens(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef) and node.name == "specimens" for node in tree.body)


def find(kernel: str) -> Path:
    """The file of a kernel, by its name in this folder or by a path that ends in .py.

    Raises ValueError with one sentence, and the nearest name, where there is none.
    """
    if kernel.endswith(".py"):
        path = Path(kernel)
        if not path.is_file():
            raise ValueError(f"there is no file {kernel}")
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError) as error:
            raise ValueError(f"{kernel} is not Python: {error}") from error
        if not _offers_specimens(tree):
            raise ValueError(
                f"{kernel} has no function specimens(dtype), which says what to compile"
            )
        return path
    names = kernels()
    if kernel not in names:
        raise ValueError(f"unknown kernel {kernel!r}: {nearest(kernel, names)}")
    return FOLDER / f"{kernel}.py"


def nearest(word: str, words: Iterable[str]) -> str:
    """'did you mean …?' for a word close to one of these, else what there is."""
    known = list(words)
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there is {', '.join(known) or 'none yet'}"


# --- compiling, seen from outside -----------------------------------------------------------------


def available() -> bool:
    """Whether Triton is installed; it is not imported for that."""
    return importlib.util.find_spec("triton") is not None


def xray(
    names: Sequence[str],
    archs: Sequence[int] = (80, 90),
    dtypes: Sequence[str] = DTYPES,
    code: Sequence[str] = (),
) -> Generator[Report, None, None]:
    """A Report for every specimen of these kernels, dtype and architecture, as each is ready.

    `names` are those of `kernels()`, or paths of files of your own; `code` may ask for the "ptx"
    and the "sass". One more process compiles them all; what it compiled before comes from
    Triton's cache on disk. Raises ValueError for an unknown kernel, architecture or dtype and
    RuntimeError where Triton is missing or a kernel's file cannot be imported.
    """
    for arch in archs:
        if arch not in ARCHITECTURES:
            known = map(str, ARCHITECTURES)
            raise ValueError(f"unknown architecture {arch}: {nearest(str(arch), known)}")
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}: {nearest(dtype, DTYPES)}")
    request = {
        "files": [[name, _path(name)] for name in names],
        "archs": list(archs),
        "dtypes": list(dtypes),
        "code": list(code),
    }
    if not available():
        raise RuntimeError(MISSING)
    return _reports(request)


def _path(name: str) -> str | None:
    """Of somebody's own file; one of ours is imported by its name."""
    path = find(name)
    return None if path.parent == FOLDER else str(path.absolute())


def _reports(request: dict[str, Any]) -> Generator[Report, None, None]:
    """Those of one worker; when the compiler takes it down, a report of that and a new worker."""
    done: list[list[Any]] = []
    while True:
        begun: list[Any] | None = None
        complaint = ""
        for line in _worker({**request, "done": done}):
            if "begun" in line:
                begun = line["begun"]
            elif "report" in line:
                report = _report(line["report"])
                done.append([report.kernel, report.dtype, report.arch, report.specimen])
                begun = None
                yield report
            else:
                complaint = line["failed"]
        if begun is None:
            if complaint:
                raise RuntimeError(f"the kernels cannot be compiled: {complaint}")
            return
        done.append(begun)
        kernel, dtype, arch, specimen = begun
        words = f"the compiler crashed ({_last_line(complaint) or 'without a word'})"
        yield _judged(Report(kernel, specimen, dtype, arch, error=words), ())


def _worker(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The lines that one worker process writes; last {"failed": …} if it ended badly."""
    # The package may be reached through sys.path alone; at its end, it hides nothing.
    start = "import sys; sys.path.append(sys.argv[1]); from tinygrad_llm.kernels import compile"
    # -P: nor do the files of the present folder, such as one that is called triton.py.
    command = [sys.executable, "-P", "-c", f"{start}; compile.serve()", str(_package_folder())]
    environment = {
        **os.environ,
        mode.VARIABLE: "gpu",
        "TRITON_INTERPRET": "0",  # for a kernel file of somebody else, which imports triton itself
        "TRITON_DEFAULT_FP_FUSION": "1",  # as a launch has it; 3.9 warns when it is not said
    }
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(request))
                process.stdin.close()
            yield from map(json.loads, process.stdout)
            if process.wait() != 0:
                errors.seek(0)
                yield {"failed": errors.read().strip() or f"exit status {process.returncode}"}
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def _package_folder() -> Path:
    spec = importlib.util.find_spec("tinygrad_llm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def _report(values: dict[str, Any]) -> Report:
    """From JSON, which knows neither tuples nor integers as keys."""
    for name in ("loads", "stores"):
        values[name] = {int(width): count for width, count in values[name].items()}
    for name in ("faults", "known", "notes"):
        values[name] = tuple(values[name])
    return Report(**values)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# --- the verdict ----------------------------------------------------------------------------------

TENSOR_CORES_FROM = 80  # Triton has none for older ones, whatever the hardware has


def _judged(report: Report, known: Sequence[Known], scalar_dots: bool = False) -> Report:
    """The report with its faults, those of them that are known, and its notes."""
    faults, accepted = [], []
    for fault, amount, words in _findings(report, scalar_dots):
        cover = next((k for k in known if k.covers(fault, report.arch, amount)), None)
        if cover is None:
            faults.append(words)
        else:
            accepted.append(f"{words} (known: {cover.reason})")
    notes = () if report.error else tuple(_notes(report))
    return dataclasses.replace(report, faults=tuple(faults), known=tuple(accepted), notes=notes)


def _findings(report: Report, scalar_dots: bool) -> Iterator[tuple[str, int, str]]:
    """(which fault, how much, in words)"""
    if report.error:
        yield DOES_NOT_COMPILE, 0, f"{DOES_NOT_COMPILE}: {report.error}"
        return
    if report.spills:
        yield SPILLS, report.spills, f"spills {report.spills} bytes a thread"
    if report.dots and (scalar_dots or not report.tensor_cores):
        why = (
            f" (Triton uses those of sm_{TENSOR_CORES_FROM} and newer)"
            if report.arch < TENSOR_CORES_FROM
            else ""
        )
        yield NO_TENSOR_CORES, 0, f"no tensor cores although there is a tl.dot{why}"
    if report.shared > report.shared_limit:
        words = f"{report.shared} bytes of shared memory, {report.shared_limit} are the limit"
        yield SHARED_MEMORY, report.shared - report.shared_limit, words


def _notes(report: Report) -> Iterator[str]:
    if report.stack and not report.spills:
        yield f"{report.stack} bytes of stack"
    if _mostly_narrow(report.loads):
        yield "scalar loads"
    if _mostly_narrow(report.stores):
        yield "scalar stores"
    best = {90: "wgmma", 100: "tcgen05"}.get(report.arch)
    if report.tensor_cores and best is not None and best not in report.tensor_cores:
        yield f"mma.sync where {best} is faster"


def _mostly_narrow(widths: Mapping[int, int]) -> bool:
    """Whether half of the data or more moves by 4 bytes or less at a time; a few scalars may."""
    narrow = {width: count for width, count in widths.items() if width <= 4}
    return sum(narrow.values()) >= 4 and 2 * _bytes(narrow) >= _bytes(widths)


def _bytes(widths: Mapping[int, int]) -> int:
    return sum(width * count for width, count in widths.items())


# --- compiling, in the process of its own ---------------------------------------------------------


def serve() -> None:
    """Answer the request on standard input, by a line when a specimen begins and one at its end.

    What Triton and LLVM print goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = json.load(sys.stdin)

    def answer(**line: Any) -> None:
        print(json.dumps(line), file=answers, flush=True)

    done = {tuple(key) for key in request["done"]}
    seen = set()
    for name, path in request["files"]:
        module = _import(name, path)
        for dtype in request["dtypes"]:
            for specimen in module.specimens(dtype):
                for arch in request["archs"]:
                    key = (name, dtype, arch, specimen.name)
                    if key in seen:
                        raise ValueError(f"two specimens are called {key}")
                    seen.add(key)
                    if key in done or (specimen.archs and arch not in specimen.archs):
                        continue
                    answer(begun=key)
                    report = _compile(name, specimen, dtype, arch, request["code"])
                    answer(report=dataclasses.asdict(report))


def _import(name: str, path: str | None) -> Any:
    if path is None:
        return importlib.import_module(f"tinygrad_llm.kernels.{name}")
    alias = f"xray_of_{Path(path).stem}"  # a file may be called as a module of Python's is
    sys.path.append(str(Path(path).parent))  # for what stands beside it
    spec = importlib.util.spec_from_file_location(alias, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module  # where inspect, which Triton asks for the source, looks
    spec.loader.exec_module(module)
    return module


def _compile(kernel: str, specimen: Specimen, dtype: str, arch: int, code: Sequence[str]) -> Report:
    def compiled() -> Any:
        return _compiled(specimen, arch)

    empty = Report(kernel, specimen.name, dtype, arch, bytes=specimen.bytes, flops=specimen.flops)
    try:
        result = compiled()
    except Exception as error:  # the compiler's, whatever they are: each is one specimen's end
        words = f"{type(error).__name__}: {_complaint(error)}"
        return _judged(dataclasses.replace(empty, error=words), specimen.known)

    ptx, ttir, ttgir = (result.asm[stage] for stage in ("ptx", "ttir", "ttgir"))
    registers, stack = _resources(result.asm["cubin"])
    warps = _warps(ptx)
    shared = result.metadata.shared
    resident, limit = occupancy(arch, registers, shared, warps)
    dots, exact_dots = _dots(ttir)
    loads, stores = _widths(ptx)
    report = dataclasses.replace(
        empty,
        registers=registers,
        stack=stack,
        spills=_spills(specimen.kernel, compiled) if stack else 0,
        shared=shared,
        shared_limit=ARCHITECTURES[arch].shared_program,
        warps=warps,
        resident_warps=resident,
        max_warps=ARCHITECTURES[arch].warps,
        limited_by=limit,
        dots=dots,
        tensor_cores=_tensor_cores(ptx),
        loads=loads,
        stores=stores,
        bulk_copies=ptx.count("cp.async.bulk.tensor"),
        atomics=len(re.findall(r"\b(?:atom|red)\.(?:[\w:]+\.)*global", ptx)),
        ptx=ptx if "ptx" in code else "",
        sass=result.asm["sass"] if "sass" in code else "",
    )
    return _judged(report, specimen.known, bool(dots and not exact_dots and _scalar_dots(ttgir)))


def _complaint(error: BaseException) -> str:
    """The last words of the innermost error: above them stands the source of the kernel."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _last_line(str(error)) or "no message"


def _compiled(specimen: Specimen, arch: int) -> Any:
    """Triton's CompiledKernel: .asm['ttir' | 'ttgir' | 'ptx' | 'cubin'] and .metadata."""
    import triton

    device: Any = _NoDevice(arch)
    triton.runtime.driver.set_active(device)
    return specimen.kernel.warmup(
        grid=(1,),
        num_warps=specimen.num_warps,
        num_stages=specimen.num_stages,
        **{name: _argument(value) for name, value in specimen.arguments.items()},
        **specimen.options,
    )


class _NoDevice:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # what is compiled is kept by device: one for each architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)


def _argument(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("*"):
        return _Pointer(value[1:])
    return value


_NAMES = {
    **{"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"},
    **{f"i{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"u{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"i1": "bool", "fp8e4nv": "float8_e4m3fn", "fp8e5": "float8_e5m2"},
}


class _Pointer:
    """A pointer argument with no memory behind it; address 0 is a multiple of 16."""

    def __init__(self, dtype: str) -> None:
        import ml_dtypes
        import numpy as np

        if dtype not in _NAMES:
            raise ValueError(f"unknown pointer '*{dtype}': {nearest(dtype, _NAMES)}")
        self.dtype = np.dtype(getattr(ml_dtypes, _NAMES[dtype], _NAMES[dtype]))

    def data_ptr(self) -> int:
        return 0


# --- reading what the compiler wrote --------------------------------------------------------------


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack), as the cubin asks for them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump names no registers: {done.stdout.strip()!r}")
    return max(int(r) for r, _ in found), max(int(s) for _, s in found)


def _spills(kernel: Any, compiled: Callable[[], Any]) -> int:
    """Bytes of spill stores and loads.

    The cubin knows only the stack, which also holds arrays of libdevice. What spilled is in
    ptxas' words, which are lost when the kernel came from the cache: it is compiled again.
    """
    from triton import knobs

    kernel.device_caches.clear()
    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True
        compiled()
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue())
    if not found:
        raise RuntimeError(f"ptxas says nothing of spills: {log.getvalue().strip()!r}")
    return sum(int(stores) + int(loads) for stores, loads in found)


def _warps(ptx: str) -> int:
    """Of a program, with those that warp specialisation adds to num_warps."""
    found = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
    if found is None:
        raise RuntimeError("the PTX does not say how many threads a program has")
    return -(-int(found[1]) // 32)


def _dots(ttir: str) -> tuple[int, int]:
    """(those that ask for tensor cores, those of exact float32), before any layout is chosen.

    %d = tt.dot %a, %b, %c, inputPrecision = tf32 : tensor<64x32xf16> * tensor<32x64xf16> -> …
    """
    exact = others = 0
    for line in re.findall(r"= tt\.dot(?:_scaled)? .*", ttir):
        if re.search(r": tensor<[\dx]*xf(?:32|64)> \*", line) and "inputPrecision" not in line:
            exact += 1
        else:
            others += 1
    return others, exact


def _scalar_dots(ttgir: str) -> bool:
    """Whether a dot was left in a layout that no tensor core has."""
    return re.search(r"= tt\.dot .*-> tensor<[^>]*#blocked", ttgir) is not None


def _tensor_cores(ptx: str) -> dict[str, int]:
    kinds = {
        "mma.sync": r"\bmma\.sync",
        "wgmma": r"\bwgmma\.mma_async",
        "tcgen05": r"\btcgen05\.mma",
    }
    counts = {kind: len(re.findall(pattern, ptx)) for kind, pattern in kinds.items()}
    return {kind: count for kind, count in counts.items() if count}


def _widths(ptx: str) -> tuple[dict[int, int], dict[int, int]]:
    """How many loads from, and stores to, global memory by their bytes per thread.

    ld.global.L1::evict_last.v4.b32 -> 16      cp.async.cg.shared.global [a], [b], 0x10; -> 16

    ld.global.nc is left out: so LLVM reads tables of its own, such as those of sin.
    """
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    access = r"\b(ld|st)\.(?:[\w:]+\.)*?global((?:\.[\w:]+)*?)(?:\.v(\d))?\.[bsuf](\d+)\s"
    for kind, how, lanes, bits in re.findall(access, ptx):
        if ".nc" not in how:
            widths[kind][int(lanes or 1) * int(bits) // 8] += 1
    copy = r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\],\s*\[[^\]]*\],\s*(\w+)"
    for size in re.findall(copy, ptx):
        widths["ld"][int(size, 0)] += 1
    return dict(sorted(widths["ld"].items())), dict(sorted(widths["st"].items()))
