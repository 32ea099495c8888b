"""No product of 32 bits is part of an address: tensors have more than 2**31 elements, and products wrap around."""

import re

import pytest

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ir, make_backend

from bench import kernel_builds as kb

BUILDS = list(kb.configurations())
# Of the values that an address is made of, these must have 64 bits. (Sums of 32 bits count elements of a block.)
PRODUCT = re.compile(r"arith\.(?:muli|shli|trunci)")
NAME = re.compile(r"%[\w#$.-]+")


def first_ir(one: kb.Build) -> str:
    """Triton's IR after its first passes, which inline functions; no machine code is made."""
    target = GPUTarget("cuda", 90, 32)
    source, backend, context = one.source(), make_backend(target), ir.context()
    options = backend.parse_options({"num_warps": one.warps(32), **dict(one.options)})
    ir.load_dialects(context)
    backend.load_dialects(context)
    stages = {}
    backend.add_stages(stages, options, source.language)
    arguments = (backend.get_codegen_implementation(options), backend.get_module_map(), context)
    module = source.make_ir(target, options, *arguments)
    return str(stages["ttir"](module, {}))


class Values:
    """What each value in a text of Triton's IR is made of. Names are those of a region, and used again in others."""

    def __init__(self, text: str) -> None:
        self.line: list[str] = []
        self.made_of: list[set[int]] = []
        # Offsets of addresses.
        self.offsets: set[int] = set()
        # Open regions: how far their first line is indented, names, and what is handed on from round to round and out:
        # for each place, the values that get it.
        self._regions: list[tuple[int, dict[str, int], list[list[int]]]] = [(-1, {}, [])]
        for line in text.splitlines():
            self._read(re.sub(r"\s*loc\(.*", "", line))

    def _define(self, name: str, line: str, made_of: set[int]) -> int:
        self._regions[-1][1][name] = len(self.line)
        self.line.append(line)
        self.made_of.append(made_of)
        return len(self.line) - 1

    def _of(self, names: list[str]) -> set[int]:
        """Arguments and constants of the kernel are made of nothing."""
        return {
            next((region[name] for _, region, _ in self._regions[::-1] if name in region), -1) for name in names
        } - {-1}

    def _read(self, line: str) -> None:
        indent, text, handed_on = len(line) - len(line.lstrip()), line.strip(), []
        while self._regions[-1][0] >= indent:
            handed_on = self._regions.pop()[2]
        definition = re.match(r"(%[\w$.-]+)(?::(\d+))? = (.*)", text)
        operation = definition[3] if definition else text
        names = NAME.findall(operation)
        if operation.startswith(("scf.yield", "scf.condition")):
            for name, place in zip(names[operation.startswith("scf.condition") :], self._regions[-1][2], strict=False):
                for value in place:
                    self.made_of[value] |= self._of([name])
        elif operation.startswith("^bb"):
            for name, place in zip(names, self._regions[-1][2], strict=False):
                place.append(self._define(name, "", set(place)))
        elif operation.startswith("}"):
            if operation.endswith("{"):
                self._regions.append((indent, {}, handed_on))
        else:
            carried = re.findall(r"(%[\w$.-]+) = (%[\w#$.-]+)", re.sub(r"scf\.for %\S+ = %\S+", "", operation))
            is_loop = operation.startswith(("scf.for", "scf.while"))
            # A number from memory has the width that it has.
            made_of = set() if is_loop or operation.startswith(("tt.load", "scf.if")) else self._of(names)
            places = []
            if definition:
                base, count = definition[1], int(definition[2] or 1)
                results = [base] if count == 1 else [f"{base}#{k}" for k in range(count)]
                places = [[self._define(name, text, set(made_of))] for name in results]
            if operation.startswith("tt.addptr"):
                self.offsets |= self._of(names[1:])
            if text.endswith("{"):
                initial = [self._of([of]) for _, of in carried] if is_loop else []
                self._regions.append((indent, {}, places))
                for (name, _), values, place in zip(carried, initial, places, strict=False):
                    self.made_of[place[0]] |= values
                    place.append(self._define(name, "", values))


def narrow_products(text: str) -> list[str]:
    """Lines of 32-bit products that offsets of addresses depend on."""
    values, found, seen = Values(text), [], set()
    offsets = values.offsets
    while offsets:
        value = offsets.pop()
        if value in seen:
            continue
        seen.add(value)
        line = values.line[value]
        if "arith.trunci" in line and not any(values.made_of[of] for of in values.made_of[value]):
            # A number that is kept in 64 bits, as it is: of a block, not of an element.
            continue
        if PRODUCT.search(line) and re.search(r"(?:: i32|xi32>|to i32)$", line):
            found.append(line)
        offsets |= values.made_of[value]
    return found


@pytest.mark.parametrize("one", BUILDS, ids=lambda one: one.name)
def test_no_product_of_32_bits_is_part_of_an_address(one):
    text = first_ir(one)
    assert "tt.addptr" in text
    assert narrow_products(text) == []


def test_a_product_of_32_bits_is_found():
    """Through sums, conversions and the rounds of a loop; one of 64 bits is none."""
    text = """
    %0 = tt.get_program_id x : i32
    %1 = arith.muli %0, %stride : i32
    %2 = arith.extsi %1 : i32 to i64
    %3 = scf.for %i = %c0 to %c9 step %c1 iter_args(%at = %2) -> (i64)  : i32 {
      %4 = tt.addptr %ptr, %at : !tt.ptr<f32>, i64
      %5 = arith.addi %at, %c1 : i64
      scf.yield %5 : i64
    }
    """
    assert narrow_products(text) == ["%1 = arith.muli %0, %stride : i32"]
    wide = text.replace("%1 = arith.muli %0, %stride : i32", "%1 = arith.muli %0, %stride : i64")
    assert narrow_products(wide) == []
    assert narrow_products(text.replace("tt.addptr %ptr, %at", "tt.addptr %ptr, %i")) == []
