"""C++ for CPUs: compiled when it is first needed, and kept in a cache folder.

torch.compile vectorises neither random numbers nor a look at the bits of a number; and to import its compiler takes
longer than a step of many models.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import itertools
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import spec

HEADERS = Path(__file__).parent / "cpu"
# A product and a sum are not fused: the same bits on every processor. A square root that sets errno is a branch, and a
# loop with a branch is not vectorised.
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fPIC", "-fopenmp"),
)
# Constants of `spec`.
_INTEGERS = ("CHUNK", "ALIGN", "GROUP", "SIGNED_LEVELS", "UNSIGNED_LEVELS", "NOISE_CENTRE")
_FLOATS = ("LARGE", "SMALLEST", "NOISE_LINEAR", "NOISE_CUBIC")
# Names of columns that C++ has other uses for.
_KEYWORDS = {"new"}


class Unavailable(RuntimeError):
    """C++ cannot be compiled or loaded here."""


def _structure(name: str, element: str, columns: tuple[str, ...]) -> str:
    fields = ", ".join(f"{column}_" if column in _KEYWORDS else column for column in columns)
    return f"struct {name} {{\n  {element} {fields};\n}};\n"


def prelude() -> str:
    """What C++ takes from `spec`: constants, a row of a table, rows of coefficients."""
    integers = {name: getattr(spec, name) for name in _INTEGERS}
    words = {name: getattr(spec, name) for name in ("WEYL", "MIX", "STEP")}
    words |= {f"MIX{i}": factor for i, factor in enumerate(spec.MIXES)}
    return "".join(
        [
            "#include <cstdint>\n",
            *(f"constexpr int64_t {name} = {value};\n" for name, value in integers.items()),
            *(f"constexpr uint32_t {name} = {value}u;\n" for name, value in words.items()),
            *(f"constexpr float {name} = {float(getattr(spec, name)).hex()}f;\n" for name in _FLOATS),
            *(f"constexpr int COMBINED_{name.upper()} = {i};\n" for i, name in enumerate(spec.COMBINED)),
            *(f"constexpr int ALONG_{name.upper()} = {i};\n" for i, name in enumerate(spec.ALONG)),
            _structure("Segment", "int64_t", spec.TABLE),
            _structure("Member", "int64_t", spec.MEMBER),
            "namespace numbers {\n",
            *(_structure(name, "double", columns) for name, columns in {"climb": spec.CLIMB, **spec.NUMBERS}.items()),
            "}\nnamespace coefficients {\n",
            *(
                f"template <typename C>\n{_structure(name, 'C', columns)}"
                for name, columns in {"perturb": spec.PERTURB, "direction": spec.DIRECTION, **spec.DESCEND}.items()
            ),
            "}\n",
        ]
    )


def function(header: str, instance: str, *types: type, returns: type | None = None) -> Callable[..., Any]:
    """A function template of a header with these arguments, compiled.

    Args:
        header: a file in cpu/, without ".h".
        instance: the function with its template arguments, in C++.
        types: ctypes of the function's arguments.
        returns: ctype of what it returns.

    Raises:
        Unavailable: it cannot be compiled or loaded.
    """
    address = ctypes.c_void_p.in_dll(library(source(header, instance)), "entry").value
    assert address is not None
    return ctypes.CFUNCTYPE(returns, *types)(address)


def source(header: str, instance: str) -> str:
    """C++ that makes an instance of a function template known as `entry`."""
    return f'{prelude()}#include "{header}.h"\nextern "C" {{\nauto* entry = &{instance};\n}}\n'


_failure: Unavailable | None = None


def library(text: str) -> ctypes.CDLL:
    """C++, compiled with the headers of cpu/ at hand and loaded.

    Raises:
        Unavailable: that is not possible, for whatever reason. It is not tried again, and warned of once.
    """
    global _failure
    if _failure is None:
        try:
            return _cached(text)
        except Exception as error:
            _failure = Unavailable(str(error))
            warnings.warn(
                f"fsam_triton: no working C++ compiler ({error}); CPU passes run as eager PyTorch, several times "
                "slower. Install g++ or clang++, or set CXX.",
                RuntimeWarning,
                stacklevel=3,
            )
    raise _failure


def available() -> bool:
    """Whether C++ can be compiled and loaded, as far as is known; see `library`."""
    return _can_compile() and _failure is None


@functools.cache
def _can_compile() -> bool:
    try:
        library("")
    except Unavailable:
        return False
    return True


def _cached(text: str) -> ctypes.CDLL:
    name = f"{hashlib.sha256(_surroundings() + text.encode()).hexdigest()[:32]}.so"
    trouble: Exception = FileNotFoundError("there is no folder to keep compiled code in")
    for folder in _folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check_private(folder)
            with contextlib.suppress(OSError):
                return ctypes.CDLL(str(folder / name))
            return _compiled(text, folder, name)
        # The folder cannot be written, is full, or one from which nothing may be executed.
        except (OSError, subprocess.SubprocessError) as error:
            trouble = error
    raise trouble


def _folders() -> Iterator[Path]:
    """Where compiled code may be kept, the best place first."""
    # "~" stays as it is if nobody knows the user.
    for cache in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(cache):
            yield Path(cache) / "fsam_triton"
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir()) / f"fsam_triton-{os.getuid()}"


def _check_private(folder: Path) -> None:
    """What is loaded from there is run: nobody else may have put it there."""
    status = folder.stat()
    if status.st_uid not in (0, os.getuid()) or status.st_mode & 0o022:
        raise PermissionError(f"{folder} belongs to somebody else, or others may write to it")


def _compiled(text: str, folder: Path, name: str) -> ctypes.CDLL:
    """The library `name`; several processes may compile it at once, each at a place of its own."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        place = Path(scratch)
        (place / "pass.cpp").write_text(text)
        _run([*compiler(), *FLAGS, f"-I{HEADERS}", "-c", "pass.cpp", "-o", "pass.o"], scratch)
        # PyTorch has loaded an OpenMP library for everybody. Another one would have threads of its own, in the way of
        # PyTorch's: it is linked only where the compiler's code does without the first.
        try:
            loaded = _linked(place, name)
        except OSError:
            loaded = _linked(place, name, "-fopenmp")
        os.replace(place / name, folder / name)
        return loaded


def _linked(place: Path, name: str, *options: str) -> ctypes.CDLL:
    _run([*compiler(), "-shared", *options, "pass.o", "-o", name], str(place))
    return ctypes.CDLL(str(place / name))


def _run(command: list[str], folder: str) -> None:
    # The compiler has temporary files, too.
    environment = {**os.environ, "TMPDIR": folder}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, errors="replace")
    if run.returncode:
        lines = [line for line in run.stderr.splitlines() if "error" in line] or run.stderr.splitlines() or ["?"]
        raise subprocess.SubprocessError(f"{shlex.join(command[:1])} failed: {lines[0][:200]}")


@functools.cache
def compiler() -> list[str]:
    """The words of a command line that call the C++ compiler."""
    named = os.environ.get("CXX")
    for words in [shlex.split(named)] if named else [["g++"], ["clang++"], ["c++"]]:
        if words and (path := shutil.which(words[0])):
            return [os.path.abspath(path), *words[1:]]
    raise FileNotFoundError(f"{'CXX is ' + named if named else 'g++, clang++'}: not found")


@functools.cache
def _surroundings() -> bytes:
    """What else compiled code depends on: headers, compiler, flags, processor."""
    program = os.path.realpath(compiler()[0])
    status = os.stat(program)
    facts = (compiler(), program, status.st_size, status.st_mtime_ns, FLAGS, platform.machine(), _processor())
    digest = hashlib.sha256(repr(facts).encode())
    for header in sorted(HEADERS.glob("*.h")):
        digest.update(header.read_bytes())
    return digest.digest()


def _processor() -> str:
    """What tells processors with other instructions apart, where Linux says so; else an empty string."""
    facts = ("vendor_id", "cpu family", "model", "stepping", "flags", "CPU", "Features", "isa", "cpu\t")
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        # A paragraph for each core, of which the first will do.
        first = itertools.takewhile(lambda line: line != "\n", file)
        return "".join(line for line in first if line.startswith(facts))
    return ""
